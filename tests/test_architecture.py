"""The rules of the house: who may import whom, how long functions and lines are, how many files stand at the root."""
import ast
from pathlib import Path

from conftest import REPOSITORY

ROOMS = ('common', 'imagedata', 'retrieval', 'serving', 'training')
MODULES = ('model', 'recipes', 'utils')  # at the root, imported by scripts
MAY_IMPORT = {  # what is not named here is a script
    'common': set(), 'recipes': {'common'}, 'utils': {'common'}, 'imagedata': {'common'},
    'model': {'common', 'recipes'},
    'retrieval': {'common', 'imagedata', 'model'},
    'serving': {'common', 'imagedata', 'retrieval'},
    'training': {'common', 'imagedata', 'retrieval', 'model', 'recipes', 'utils'}}
LONGEST_FUNCTION, LONGEST_LINE = 59, 120
# One run, read from top to bottom, and command lines, whose flags are one list.
LONG_FUNCTIONS = {'train.train', 'get_parser', 'get_args'}

FILES = [*REPOSITORY.glob('*.py'), *(file for room in ROOMS for file in (REPOSITORY / room).rglob('*.py'))]


def place_of(file: Path) -> str:
    """Return the room of a file, or the name of a module at the root."""
    parts = file.relative_to(REPOSITORY).with_suffix('').parts
    return parts[0]


def module_of(file: Path) -> str:
    """Return the dotted name of a file."""
    return '.'.join(file.relative_to(REPOSITORY).with_suffix('').parts)


def imports_of(tree: ast.AST) -> set[str]:
    """Return the dotted names of the modules that are imported anywhere in a file, in functions too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, 'imports are absolute'
            names |= {node.module, *(f'{node.module}.{alias.name}' for alias in node.names)}
    return names


TREES = {file: ast.parse(file.read_text()) for file in FILES}
OURS = {place_of(file) for file in FILES}


def test_a_file_imports_only_what_its_room_may():
    wrong = []
    for file, tree in TREES.items():
        place = place_of(file)
        imported = {name.split('.')[0] for name in imports_of(tree)} & OURS
        allowed = MAY_IMPORT.get(place, {*ROOMS, *MODULES}) | ({place} if place in ROOMS else set())
        wrong += [f'{module_of(file)} imports {name}' for name in sorted(imported - allowed)]
    assert not wrong


def test_no_file_imports_itself_by_way_of_others():
    known = {module_of(file): file for file in FILES}
    edges = {name: {other for other in imports_of(TREES[file]) if other in known} for name, file in known.items()}

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, ' -> '.join((*path, name))
        if name not in done:
            for other in edges[name]:
                walk(other, (*path, name))
            done.add(name)

    done = set()
    for name in edges:
        walk(name, ())
    assert edges['train'] >= {'model', 'training.options', 'retrieval.embedding'}  # the imports are seen


def test_at_most_13_python_files_stand_at_the_root():
    assert len(list(REPOSITORY.glob('*.py'))) <= 13
    scripts = {file.stem for file in REPOSITORY.glob('*.py')} - set(MODULES)
    assert scripts == {'train', 'evaluate', 'test', 'toy', 'embed', 'serve', 'export', 'plot', 'report', 'data_utils'}


def functions_of(file: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(TREES[file]) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def test_functions_fit_a_screen_and_lines_the_page():
    wrong = [f'{module_of(file)}.{node.name} has {node.end_lineno - node.lineno + 1} lines' for file in FILES
             for node in functions_of(file) if node.end_lineno - node.lineno + 1 > LONGEST_FUNCTION
             and not {node.name, f'{module_of(file)}.{node.name}'} & LONG_FUNCTIONS]
    wrong += [f'{file.relative_to(REPOSITORY)}:{number} has {len(line)} characters' for file in FILES
              for number, line in enumerate(file.read_text().splitlines(), start=1) if len(line) > LONGEST_LINE]
    assert not wrong


def test_the_method_is_in_one_file_of_about_500_lines_and_the_run_in_another():
    """The loss classes, the proxy updates and the network; the loop over epochs."""
    names = {node.name for node in TREES[REPOSITORY / 'model.py'].body if hasattr(node, 'name')}
    assert {'EmbeddingNet', 'ProxyLoss', 'ProxyAnchor', 'BalancedProxy', 'move_proxies',
            'similarity_for_positive_update', 'make_loss'} <= names
    names = {node.name for node in TREES[REPOSITORY / 'train.py'].body if hasattr(node, 'name')}
    assert {'train_one_epoch', 'build_optimizer', 'build_schedule', 'train', 'main'} <= names


WITH_EFFECT = {'common.images'}  # registers image formats whose package is installed
STATEMENTS = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.FunctionDef, ast.AsyncFunctionDef,
              ast.ClassDef, ast.Assert)
GUARDS = ("__name__ == '__main__'", 'TYPE_CHECKING')


def test_an_import_has_no_effect():
    """At the top level stand docstrings, imports, assignments, definitions and guards."""
    wrong = []
    for file in FILES:
        for node in TREES[file].body:
            is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            is_guard = isinstance(node, ast.If) and ast.unparse(node.test) in GUARDS
            if not (isinstance(node, STATEMENTS) or is_text or is_guard or module_of(file) in WITH_EFFECT):
                wrong.append(f'{module_of(file)}: {ast.unparse(node)[:80]}')
    assert not wrong


def test_the_tests_mirror_the_tree():
    tests = REPOSITORY / 'tests'
    for room in ROOMS:
        for file in (tests / room).glob('test_*.py'):
            subject = file.stem.removeprefix('test_')
            assert (REPOSITORY / room / f'{subject}.py').is_file() or subject in {'open_set'}, file
    names = [file.name for file in tests.rglob('test_*.py')]
    assert len(set(names)) == len(names)
    assert not list(tests.rglob('__init__.py'))
