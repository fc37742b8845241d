"""README and docs say what is true: links lead somewhere, commands parse and run, and so do the steps of `How to add`.
"""
import argparse
import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, REPOSITORY, type_command
from raw_trees import write_image
from test_train import PRINTED, WITH_RECIPE

import recipes
from common.files import save
from model import EmbeddingNet, NetConfig
from training.options import parse_options

PAGES = sorted([REPOSITORY / 'README.md', *(REPOSITORY / 'docs').glob('*.md')])
LONGEST_LINE = 120
BACKBONE = 'timm:test_resnet'
VARIABLES = {'DATA': '/home/data', 'WEIGHTS': 'imagenet', 'HEAD_NODE': 'node', 'SLURM_NNODES': '2'}


def name_of(page: Path) -> str:
    return page.relative_to(REPOSITORY).as_posix()


def blocks(text: str, language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return re.findall(rf'^```{language}\n(.*?)^```', text, re.DOTALL | re.MULTILINE)


def prose(page: Path) -> list[tuple[int, str]]:
    """Return the numbered lines that are neither code nor table."""
    lines, code = [], False
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        code ^= line.startswith('```')
        if not (code or line.startswith(('|', '    '))):
            lines.append((number, line))
    return lines


# ---------------------------------------------------- form --------------------------------------------------------
@pytest.mark.parametrize('page', PAGES, ids=name_of)
def test_prose_fits_the_width_of_the_code(page):
    assert [(number, line) for number, line in prose(page) if len(line) > LONGEST_LINE] == []


def anchors(page: Path) -> set[str]:
    """Return the anchors that a forge gives to the headings of a page."""
    headings = [line.lstrip('# ') for _, line in prose(page) if line.startswith('#')]
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('page', PAGES, ids=name_of)
def test_every_link_and_image_leads_somewhere(page):
    for target in re.findall(r'\]\(([^)\s]+)\)', page.read_text()):
        if not re.match(r'https?:', target):
            path, _, anchor = target.partition('#')
            file = page.parent / path if path else page
            assert file.is_file(), target
            assert not anchor or anchor in anchors(file), target


def test_every_page_is_linked_from_the_readme():
    text = (REPOSITORY / 'README.md').read_text()
    assert [name_of(page) for page in PAGES if page.parent != REPOSITORY and f']({name_of(page)}' not in text] == []


def test_the_readme_describes_every_script_and_every_room():
    text = (REPOSITORY / 'README.md').read_text()
    scripts = [path.name for path in REPOSITORY.glob('[a-z]*.py')]
    rooms = [f'{path.parent.name}/' for path in REPOSITORY.glob('[a-z]*/__init__.py')]
    assert {'common/', 'imagedata/', 'retrieval/', 'training/'} <= set(rooms)
    assert [name for name in (*scripts, *rooms) if not re.search(rf'^ .*(?<!\S){re.escape(name)}  ', text,
                                                                 re.MULTILINE)] == []


def test_the_page_of_recipes_holds_the_table_that_recipes_py_prints():
    assert recipes.recipe_table() + '\n' in (REPOSITORY / 'docs/recipes.md').read_text()


def test_the_citation_claims_no_more_than_is_known():
    yaml = pytest.importorskip('yaml')
    cited = yaml.safe_load((REPOSITORY / 'CITATION.cff').read_text())
    assert cited['cff-version'] == '1.2.0'
    by_title = {reference['title'].lower(): reference for reference in cited['references']}
    for source in (recipes.RECIPES[name]['source'].lower() for name in ('balanced_proxy', 'asymptotic_proxy',
                                                                       'positive_proxy', 'momentum_proxy',
                                                                       'proxy_anchor')):
        (reference,) = [reference for title, reference in by_title.items() if title in source]
        if reference['authors'] == [{'name': 'unknown'}]:  # then it says what is known, and holds nothing else
            assert 'names the title' in reference['notes']
            assert not reference.keys() & {'year', 'doi', 'identifiers', 'volume', 'pages'}
            assert ('journal' in reference) == ('journal' in reference['notes'])
        else:
            assert all(author['family-names'] and author['given-names'] for author in reference['authors'])
            assert reference['year'] > 2000
            (identifier,) = reference['identifiers']
            assert identifier['value'].replace('arXiv:', 'arXiv ').lower() in source
    assert 'The authors of' not in (REPOSITORY / 'CITATION.cff').read_text()


# ---------------------------------------------------- command lines -----------------------------------------------
def commands_of(page: Path, variables: dict[str, str] = VARIABLES) -> list[list[str]]:
    """Return the words of each command in the bash blocks of a page, its variables filled in as a shell does."""
    commands, variables = [], dict(variables)
    for block in blocks(page.read_text(), 'bash'):
        text = ''
        for line in block.replace('\\\n', ' ').splitlines():
            text = f'{text} {line}' if text else line
            if text.split(' #')[0].count('"') % 2:  # a value that continues in the next line
                continue
            text = re.sub(r'\$(\w+)', lambda match: variables[match[1]], text)
            words, text = shlex.split(text, comments=True), ''
            assigned = re.fullmatch(r'([A-Z]+)=(.*)', words[0]) if len(words) == 1 else None
            if assigned:
                variables[assigned[1]] = assigned[2]
            elif words:
                commands.append(words)
    return commands


def parse(words: list[str]) -> None:
    """Let the script that a command names read its flags, and no more; raises what it raises."""
    if words[0] == 'make':
        assert make(*words[1:])
        return
    if 'torchrun' in words:  # perhaps behind srun
        from torch.distributed.run import get_args_parser

        launched = get_args_parser().parse_args(words[words.index('torchrun') + 1:])
        words = ['python', launched.training_script, *launched.training_script_args]
    assert words[0] == 'python', words
    script, words = REPOSITORY / words[1], words[2:]
    if script.name == 'train.py':
        parse_options(words)
    elif script.name == 'recipes.py':
        assert words == []
    else:
        module = load_script(script)
        if script.parent == REPOSITORY:
            module.get_args(words)
            return
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Parsed):  # a benchmark
            patch.setattr(sys, 'argv', [script.name, *words])
            patch.setattr(argparse.ArgumentParser, 'parse_args', parse_only)
            module.main()
            raise AssertionError(f'{script} has read no flags')


class Parsed(Exception):  # noqa: N818
    """Stops a script once it has read its flags."""


def parse_only(parser, argv=None):
    _, unknown = parser.parse_known_args(argv)
    assert not unknown, unknown
    raise Parsed


def load_script(script: Path):
    """Import a script of the root or of benchmarks/ by its file; test.py has the name of a package of Python's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(script.parent)
        spec = importlib.util.spec_from_file_location(f'script_{script.stem}', script)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def make(*words: str) -> str:
    """Return what make would do."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith('MAKE')}
    result = subprocess.run(['make', '-n', *words], cwd=REPOSITORY, env=environment, capture_output=True, text=True,
                            check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize('page', PAGES, ids=name_of)
def test_every_printed_command_is_one_that_its_script_understands(page):
    for words in commands_of(page):
        parse(words)


def test_the_systems_commands_are_on_their_page():
    printed = {' '.join(words[2:]) for words in commands_of(REPOSITORY / 'docs/command_lines.md')}
    assert [words for words, _ in PRINTED if words not in printed] == []
    assert WITH_RECIPE[1][0] in printed


def test_make_knows_the_targets_that_pages_name():
    for page in PAGES:
        for target in set(re.findall(r'`make ([\w-]+)', page.read_text())):
            assert make(target) is not None, (name_of(page), target)


@pytest.mark.parametrize('page', PAGES, ids=name_of)
def test_python_on_a_page_is_python(page):
    for block in blocks(page.read_text(), 'python'):
        block = block.replace('{..., ', '{')
        compile(f'{{{block}}}' if block.startswith(' ') else block, f'a block of {name_of(page)}', 'exec')


# ---------------------------------------------------- the quick start, typed as it is printed ----------------------
# What makes a printed command small; a later flag wins.
SMALL = ('--weights', 'none', '--image_size', '32', '--batch_size', '4', '--warm_up', '0', '--recalls', '1,2',
         '--num_workers', '0', '--on_collapse', 'warn', '--amp', 'off')
TYPED_PAGES = ('README.md', 'docs/own_photographs.md', 'docs/search.md', 'docs/experiment_tracking.md',
               'docs/export.md', 'docs/gallery.md')
# Commands on these pages that are parsed only: the beginning, and the reason.
PARSED = {'make ': 'the demo is typed by the workspace', 'python serve.py': 'runs until it is stopped',
          'python toy.py': 'takes minutes; tests/test_toy.py trains a small one',
          'python benchmarks/': 'takes minutes to an hour', 'python embed.py --qdrant': 'needs a server',
          'python report.py': 'compiles UMAP; tests/test_report.py writes reports',
          'python plot.py --sweep': 'needs the runs of make sweep; tests/test_plot.py draws sweeps'}


class Workspace:
    """A folder in which commands are typed, with small data."""

    def __init__(self, folder: Path, raw_sets: Path):
        self.folder, self.weights = folder, str(folder / 'weights.pth')
        save(EmbeddingNet(NetConfig(BACKBONE, 4, image_size=32), 'none').backbone.network.state_dict(),
             Path(self.weights))
        for label in range(6):
            for number in range(4):
                write_image(folder / f'me/flowers/{label}/{number}.jpg', label, number)
                write_image(folder / f'readonly/flowers/{label}/{number}.jpg', label, number)
        for name in ('museum/birds/0', 'museum/birds/1', 'museum/loans/0', 'museum/loans/1', 'new/0', 'photo'):
            write_image(folder / f'me/{name}.jpg', len(name), 0)
        self.places = {'/home/data': str(raw_sets), '/home/me': str(folder / 'me'),
                       '/mnt/readonly': str(folder / 'readonly')}
        printed = make('demo').replace('\\\n', ' ')
        self.demo = [shlex.split(line) for line in printed.splitlines() if re.match(r'\S+/python \w+\.py ', line)]
        assert [words[1] for words in self.demo] == ['data_utils.py', 'train.py', 'evaluate.py', 'test.py']

    def run(self, words: list[str]) -> None:
        """Type a command, made small, and check that it succeeds."""
        script, words = words[1], words[2:]
        for printed, actual in self.places.items():
            words = [re.sub(rf'^{printed}(?=/|$)', actual, word) for word in words]
        words = [match for word in words for match in self.matches(word)]
        words += self.small(script, words)
        result = type_command(REPOSITORY / script, *words, cwd=self.folder)
        assert result.returncode == 0, (script, words, result.stderr)

    def matches(self, word: str) -> list[str]:
        """Return the files that a word with a star stands for, as a shell does, or the word."""
        matches = sorted(str(path.relative_to(self.folder)) for path in self.folder.glob(word)) if '*' in word else []
        return matches or [word]

    def small(self, script: str, words: list[str]) -> list[str]:
        """Return the flags that make a command small."""
        if script == 'train.py':
            # A run that starts from weights keeps its own; whitening needs fewer features than BACKBONE has.
            small = SMALL[2:] if '--init' in words else SMALL
            seeds = ['--seeds', '1,2'] if '--seeds' in words else []
            narrow = ['--feature_dim', '64'] if 'whitened_mirror' in words else []
            has_small_backbone = {'resnet18', 'timm:resnet10t'} & set(words)
            backbone = [] if has_small_backbone else ['--backbone_type', BACKBONE]
            epochs = ['--resume'] if '--resume' in words else ['--num_epochs', '1', '--overwrite']
            return [*small, *seeds, *narrow, *backbone, *epochs]
        if script == 'data_utils.py' and 'glyph' in words:
            return ['--glyph_classes', '9', '--glyph_images', '4']
        if script == 'evaluate.py' and '--pretrained' in words:
            return ['--backbone_type', BACKBONE, '--weights', self.weights, '--image_size', '32', '--recalls', '1,2',
                    '--num_workers', '0']
        if script == 'export.py' or script == 'evaluate.py' and '--model' in words:
            return ['--num_workers', '0']
        if script == 'test.py' and '--num_queries' in words:
            return ['--retrieval_num', '3']
        if script == 'embed.py' and 'museum.pth' in words and not (self.folder / 'museum.pth').exists():
            return ['--backbone_type', BACKBONE, '--weights', self.weights, '--image_size', '32', '--num_workers', '0']
        if script == 'test.py' and any(word.endswith(('museum.pth', 'trained.pth')) for word in words):
            return ['--retrieval_num', '3']
        if script == 'test.py':
            glyphs = sorted(path.name for path in (self.folder / 'data/glyph/uncropped').glob('test_*'))
            return ['--query_img_name', glyphs[0], '--retrieval_num', '3']
        return []


@pytest.fixture(scope='module')
def workspace(raw_sets, tmp_path_factory) -> Workspace:
    """A workspace after `make demo`, whose commands are typed as make prints them, and the quick start of the README.
    """
    workspace = Workspace(tmp_path_factory.mktemp('workspace'), raw_sets)
    for words in workspace.demo:
        workspace.run(words)
    return workspace


@pytest.mark.slow
def test_the_commands_of_the_pages_run_one_after_the_other(workspace):
    """Some of a page's commands use what those of an earlier page have written."""
    for name in TYPED_PAGES:
        for words in commands_of(REPOSITORY / name):
            if not ' '.join(words).startswith(tuple(PARSED)):
                workspace.run(words)


def test_what_is_parsed_only_is_printed_somewhere():
    printed = [' '.join(words) for page in PAGES for words in commands_of(page)]
    assert [start for start in PARSED if not any(command.startswith(start) for command in printed)] == []


# ---------------------------------------------------- how to add --------------------------------------------------
SMALL_RUN = (*SMALL, '--num_epochs', '1', '--freeze_bn', '0', '--feature_dim', '8', '--results_dir', 'results/new')


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of the repository as it is in the working tree."""
    listed = subprocess.run(['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'], cwd=REPOSITORY,
                            capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split('\0')):
        if (REPOSITORY / name).is_file() and not name.startswith(('results/', 'tests/')):
            target = tmp_path / 'copy' / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, target)
    return tmp_path / 'copy'


def steps(what: str) -> list[str]:
    """Return the Python blocks of a part of `How to add`, which begins with its name in bold."""
    section = (REPOSITORY / 'README.md').read_text().split('## How to add')[1].split('\n## ')[0]
    (part,) = [part for part in re.split(r'^(?=\*\*)', section, flags=re.MULTILINE) if part.startswith(f'**{what}**')]
    return blocks(part, 'python')


def edit(file: Path, pattern: str, replacement: str) -> None:
    """Replace the only match of a pattern in a file."""
    text, count = re.subn(pattern, lambda match: match.expand(replacement), file.read_text(), flags=re.MULTILINE)
    assert count == 1, (file, pattern)
    file.write_text(text)


def type_in(copy: Path, *words) -> str:
    """Run `python words...` in a copy, in a process that has imported nothing of the original."""
    result = subprocess.run([sys.executable, *map(str, words)], cwd=copy, env=ENVIRONMENT, capture_output=True,
                            text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_the_readme_adds_a_loss(copy, raw_sets):
    loss, entry = steps('A loss')
    (copy / 'model.py').write_text(f'{(copy / "model.py").read_text()}\n\n{loss}')
    edit(copy / 'recipes.py', r'^LOSSES = \{\n', r'\g<0>' + entry)
    for update in recipes.PROXY_UPDATES:
        type_in(copy, 'train.py', '--data_path', raw_sets, '--backbone_type', BACKBONE, '--loss_name', 'proxy_hinge',
                '--proxy_update', update, '--remark', update, *SMALL_RUN)
    assert len(list((copy / 'results/new').glob('car_timm-test_resnet_proxy_hinge_8_*_statistics.csv'))) == 3
    assert 'proxy_hinge' in type_in(copy, 'train.py', '--help')


@pytest.mark.slow
def test_the_readme_adds_a_backbone(copy, raw_sets):
    function, entry = steps('A backbone')
    name, builder = re.search(r"\.\.\., '(\w+)': (\w+)}", entry).groups()
    edit(copy / 'model.py', r'^BACKBONES = \{', function.replace('\\', r'\\') + r'\n\n\g<0>')
    edit(copy / 'model.py', r'^(BACKBONES = \{[^}]*)\}', rf"\1, '{name}': {builder}}}")
    edit(copy / 'recipes.py', r'^(BACKBONE_NAMES = \([^)]*)\)', rf"\1, '{name}')")
    type_in(copy, 'train.py', '--data_path', raw_sets, '--backbone_type', name, *SMALL_RUN)
    assert (copy / f'results/new/car_{name}_balanced_proxy_8_statistics.csv').is_file()


@pytest.mark.slow
def test_the_readme_adds_a_data_set(copy):
    function, entry = steps('A data set')
    edit(copy / 'imagedata/raw_sets.py', r'^RAW_SETS = \{\n', function.replace('\\', r'\\') + r'\n\n\g<0>' + entry)
    lines = []
    for label in range(6):
        for number in range(4):
            write_image(copy / f'data/flora/{label}/{number}.jpg', label, number)
            subset = 'train' if label < 3 else 'test'
            lines.append(f'{label}/{number}.jpg,species {label},{subset}\n')
    (copy / 'data/flora/labels.csv').write_text(''.join(lines))
    printed = type_in(copy, 'data_utils.py', '--data_path', 'data', '--data_name', 'flora')
    assert 'not the complete data set' not in printed
    type_in(copy, 'train.py', '--data_path', 'data', '--data_name', 'flora', '--backbone_type', BACKBONE, *SMALL_RUN)
    assert (copy / 'results/new/flora_timm-test_resnet_balanced_proxy_8_statistics.csv').is_file()
