"""README and docs say what is so: their links lead somewhere, their commands run, their recipes for adding work."""
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

import recipes
from training.options import parse_options

PAGES = sorted([REPOSITORY / 'README.md', *(REPOSITORY / 'docs').glob('*.md')])
LONGEST, MOST_LINES = 119, 220
# What makes a printed command small; a later flag wins.
TRAIN = ('--weights', 'none', '--image_size', '32', '--batch_size', '4', '--num_epochs', '1', '--warm_up', '0',
         '--recalls', '1,2', '--num_workers', '0', '--on_collapse', 'warn', '--amp', 'off', '--overwrite')
BACKBONE = 'timm:test_resnet'
# Printed commands that are parsed and not run: page, beginning of the command, reason.
PARSED = [
    ('docs/command_lines.md', '', 'tests/test_scripts.py runs these lines, and test.py and evaluate.py after them'),
    ('docs/own_photographs.md', '', 'tests/test_folders.py does the same on a folder of its own'),
    ('', 'torchrun', 'needs GPUs or machines; tests/test_distributed.py runs several processes'),
    ('', 'srun', 'needs a cluster'),
    ('', 'python benchmarks/', 'takes minutes to an hour'),
    ('', 'python toy.py', 'downloads STL10, or takes minutes; tests/test_pictures.py trains a small one'),
    ('', 'python embed.py --qdrant', 'needs a server; tests/test_collection.py embeds into the embedded mode'),
    ('', 'python serve.py', 'runs until it is stopped; tests/test_serve.py serves'),
    ('', 'python evaluate.py --resume results/grid/', 'models are not committed; tests/test_ingredients.py does it'),
    ('', 'python report.py', 'takes half a minute where UMAP is installed; tests/test_report.py writes one'),
]
# Targets of make that are not run: they are printed by `make -n`, which parses the Makefile. Those of the demo are run.
PRINTED_TARGETS = ('test', 'sweep', 'results', 'serve', 'gpu')


def name_of(page: Path) -> str:
    return page.relative_to(REPOSITORY).as_posix()


def blocks(page: Path, language: str) -> list[tuple[str, str]]:
    """Return the fenced blocks of a language: the text since the block before, and the block."""
    return re.findall(rf'(?:\A|```\n)((?:(?!```).)*?)```{language}\n(.*?)(?=```\n)', page.read_text(), re.DOTALL)


def prose(page: Path) -> list[tuple[int, str]]:
    """Return the numbered lines that are neither code nor table."""
    lines, code = [], False
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        code ^= line.startswith('```')
        if not (code or line.startswith(('|', '    '))):
            lines.append((number, line))
    return lines


# ---------------------------------------------------- form ----------------------------------------------------------
def test_the_readme_is_read_in_five_minutes():
    assert len((REPOSITORY / 'README.md').read_text().splitlines()) <= MOST_LINES


@pytest.mark.parametrize('page', PAGES, ids=name_of)
def test_prose_fits_the_width_of_the_code(page):
    assert [(number, line) for number, line in prose(page) if len(line) > LONGEST] == []


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


def test_every_page_of_docs_is_linked_from_the_readme():
    text = (REPOSITORY / 'README.md').read_text()
    assert [name_of(page) for page in PAGES[1:] if f']({name_of(page)}' not in text] == []


def test_every_file_of_the_top_level_and_of_the_engine_is_described():
    listed = re.findall(r'\w+\.py', (REPOSITORY / 'README.md').read_text().split('## Files')[1].split('\n## ')[0])
    files = [path.name for folder in ('', 'engine') for path in (REPOSITORY / folder).glob('[a-z]*.py')]
    assert sorted(listed) == sorted(files)


def test_the_recipes_page_is_what_recipes_prints():
    result = type_command('recipes.py')
    assert result.stdout == recipes.format_table() + '\n'
    assert result.stdout in (REPOSITORY / 'docs/recipes.md').read_text()


# ---------------------------------------------------- command lines -------------------------------------------------
def commands_of(page: Path, variables: dict[str, str]) -> list[list[str]]:
    """Return the words of each command in the bash blocks of a page, its variables filled in as a shell does."""
    commands, variables = [], dict(variables)
    for _, block in blocks(page, 'bash'):
        text = ''
        for line in block.replace('\\\n', ' ').splitlines():
            text = f'{text} {line}' if text else line
            if text.split(' #')[0].count('"') % 2:  # a value that goes on in the next line
                continue
            text = re.sub(r'\$(\w+)', lambda found: variables[found[1]], text)
            words, text = shlex.split(text, comments=True), ''
            assigned = re.fullmatch(r'([A-Z]+)=(.*)', words[0]) if len(words) == 1 else None
            if assigned:
                variables[assigned[1]] = assigned[2]
            elif words:
                commands.append(words)
    return commands


def replaced(words: list[str], texts: dict[str, str]) -> list[str]:
    """Return words, the paths of a user's data replaced by those that are here."""
    for printed, here in texts.items():
        words = [here + word[len(printed):] if word == printed or word.startswith(f'{printed}/') else word
                 for word in words]
    return words


def parse(words: list[str], monkeypatch) -> None:
    """Let the script that a command names read its flags, and go no further; raises what it raises."""
    if 'torchrun' in words:
        from torch.distributed.run import get_args_parser

        known = get_args_parser().parse_args(words[words.index('torchrun') + 1:])
        words = ['python', known.training_script, *known.training_script_args]
    script, words = REPOSITORY / words[1], words[2:]
    monkeypatch.setattr(sys, 'argv', [str(script), *words])
    monkeypatch.syspath_prepend(script.parent)
    if script.name == 'train.py':
        parse_options(words)
        return
    spec = importlib.util.spec_from_file_location(f'script_{script.stem}', script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if hasattr(module, 'get_args'):
        module.get_args()
    else:
        module.get_parser().parse_args()


class Workspace:
    """A folder in which commands are typed: small data, and what they leave."""

    def __init__(self, folder: Path, raw_sets: Path):
        from common.files import save
        from model import EmbeddingNet, NetConfig

        self.folder = folder
        self.weights = str(folder / 'weights.pth')
        save(EmbeddingNet(NetConfig(BACKBONE, 4, image_size=32), 'none').trunk.network.state_dict(), Path(self.weights))
        for label in range(6):
            for number in range(4):
                write_image(folder / f'me/flowers/{label}/{number}.jpg', label, number)
        for name in ('museum/birds/0', 'museum/birds/1', 'museum/loans/0', 'museum/loans/1', 'new/0', 'photo'):
            write_image(folder / f'me/{name}.jpg', len(name), 0)
        self.texts = {'/home/data': str(raw_sets), '/home/me': str(folder / 'me')}
        self.variables = {'DATA': str(raw_sets), 'WEIGHTS': self.weights, 'HEAD_NODE': 'node', 'SLURM_NNODES': '2'}

    def run(self, words: list[str]) -> None:
        """Type a command, made small, and check that it ends well."""
        script, words = words[1], replaced(words[2:], self.texts)
        words = [file for word in words for file in self.matches(word)]
        words += self.small(script, words)
        result = type_command(REPOSITORY / script, *words, cwd=self.folder)
        assert result.returncode == 0, (script, words, result.stderr)

    def matches(self, word: str) -> list[str]:
        """Return the files that a word with a star stands for, as a shell does, or the word."""
        return (sorted(str(path) for path in self.folder.glob(word)) if '*' in word else []) or [word]

    def small(self, script: str, words: list[str]) -> list[str]:
        """Return the flags that make a command small."""
        if script == 'train.py':
            seeds = ('--seeds', '1,2') if '--seeds' in words else ()
            narrow = ('--feature_dim', '64') if {'whitened_start', 'whitened_mirror'} & {*words} else ()  # than BACKBONE
            return [*TRAIN, *seeds, *narrow, *(('--backbone_type', BACKBONE) if 'resnet18' not in words else ())]
        if script == 'data_utils.py' and 'glyph' in words:
            return ['--glyph_classes', '9', '--glyph_images', '4']
        if script == 'evaluate.py' and '--zero_shot' in words:
            return ['--backbone_type', BACKBONE, '--weights', self.weights, '--image_size', '32', '--recalls', '1,2',
                    '--num_workers', '0']
        if script == 'export.py' or script == 'evaluate.py' and '--resume' in words:
            return ['--num_workers', '0']
        if script == 'test.py' and '--query_img_name' in words and any(word.endswith('museum.pth') for word in words):
            return ['--retrieval_num', '3']
        if script == 'test.py' and '--query_img_name' in words:
            car = any('car_' in word for word in words)
            glyphs = sorted(path.name for path in (self.folder / 'data/glyph/uncropped').glob('test_*'))
            return ['--query_img_name', '000014.jpg' if car else glyphs[0], '--retrieval_num', '3']
        return []


@pytest.fixture(scope='module')
def workspace(raw_sets, tmp_path_factory) -> Workspace:
    """A workspace after `make demo`, whose commands are run as make prints them, and a run of a sweep and of cars."""
    workspace = Workspace(tmp_path_factory.mktemp('workspace'), raw_sets)
    printed = make('demo').replace('\\\n', ' ')
    demo = [shlex.split(line) for line in printed.splitlines() if re.match(r'\S+/python \w+\.py ', line)]
    assert [words[1] for words in demo] == ['data_utils.py', 'train.py', 'evaluate.py', 'test.py']
    sweep = ['python', 'train.py', '--data_path', 'data', '--data_name', 'glyph', '--recipe', 'asymptotic_proxy',
             '--results_dir', 'results/sweep']
    cars = ['python', 'train.py', '--data_path', '/home/data', '--recipe', 'positive_proxy']
    caches = [['python', 'data_utils.py', '--data_path', '/home/data', '--data_name', name, '--cache_size', size]
              for name, size in (('car', '146'), ('cub', '256'))]
    for words in (*demo, sweep, cars, *caches):
        workspace.run(words)
    shutil.copytree(REPOSITORY / 'results/grid', workspace.folder / 'results/grid')
    # Of the trunk that the figure was made with: as small as the others, under its name.
    results = workspace.folder / 'results'
    shutil.copy(results / 'car_timm-test_resnet_positive_proxy_512_data_base.pth',
                results / 'car_timm-tf_efficientnet_lite0_positive_proxy_512_data_base.pth')
    return workspace


def make(*words: str) -> str:
    """Return what make would do."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith('MAKE')}
    result = subprocess.run(['make', '-n', *words], cwd=REPOSITORY, env=environment, capture_output=True, text=True,
                            check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize('page', PAGES, ids=name_of)
def test_every_printed_command_runs_or_at_least_parses(page, workspace, monkeypatch, capsys):
    for words in commands_of(page, workspace.variables):
        command = ' '.join(words)
        if words[0] == 'make':
            assert words[1] == 'demo' or words[1] in PRINTED_TARGETS, command  # the demo ran in the workspace
            make(*words[1:])
        elif any(name_of(page).startswith(where) and command.startswith(start) for where, start, _ in PARSED):
            parse(words, monkeypatch)
        else:
            assert words[0] == 'python', command
            workspace.run(words)


def test_what_is_parsed_only_is_printed_somewhere(workspace):
    printed = [(name_of(page), ' '.join(words)) for page in PAGES for words in commands_of(page, workspace.variables)]
    for where, start, _ in PARSED:
        assert any(page.startswith(where) and command.startswith(start) for page, command in printed)


def test_the_systems_lines_are_those_that_are_run():
    from test_scripts import PRINTED

    printed = {' '.join(words[2:]) for words in commands_of(REPOSITORY / 'docs/command_lines.md', {})}
    assert [words for words, _ in PRINTED if words not in printed] == []


# ---------------------------------------------------- how to add ----------------------------------------------------
SMALL_RUN = (*TRAIN, '--freeze_bn', '0', '--feature_dim', '8', '--results_dir', 'results/new')


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


def follow(copy: Path, *places: str) -> None:
    """Do in a copy what the README says under `How to add`, for the blocks whose place is named just before them.

    A place is a file, to whose end code goes (in raw_sets.py above the registry), or a registry, which gets a line.
    """
    section = copy / 'section.md'
    section.write_text((copy / 'README.md').read_text().split('## How to add')[1].split('\n## ')[0])
    code = {}
    for before, block in blocks(section, 'python'):
        named = re.findall(r'`(\w+\.(?:py|[A-Z_]+))`', before)
        code[named[-1]] = block
    for place in places:
        module, _, name = place.partition('.')
        file = copy / f'{module}.py'
        text = file.read_text()
        if name != 'py':
            text, number = re.subn(rf'^{name} = {{', lambda found, block=code[place]: f'{found[0]}\n{block}', text,
                                   flags=re.MULTILINE)
            assert number == 1, place
        elif module == 'raw_sets':
            above, below = text.split('\nRAW_SETS = {')
            text = f'{above}\n{code[place]}\n\nRAW_SETS = {{{below}'
        else:
            text = f'{text}\n\n{code[place]}'
        file.write_text(text)


def type_in(copy: Path, *words) -> str:
    """Run `python words...` in a copy, in a process that has imported nothing of the original."""
    result = subprocess.run([sys.executable, *map(str, words)], cwd=copy, env=ENVIRONMENT, capture_output=True,
                            text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_readme_adds_a_loss(copy, raw_sets):
    follow(copy, 'model.py', 'recipes.LOSSES')
    type_in(copy, 'train.py', '--data_path', raw_sets, '--backbone_type', BACKBONE, '--loss_name', 'proxy_hinge',
            *SMALL_RUN)
    assert (copy / 'results/new/car_timm-test_resnet_proxy_hinge_8_statistics.csv').is_file()


def test_the_readme_adds_a_trunk(copy, raw_sets):
    follow(copy, 'trunks.py', 'recipes.TRUNKS')
    type_in(copy, 'train.py', '--data_path', raw_sets, '--backbone_type', 'mobilenet_v3_small', *SMALL_RUN)
    assert (copy / 'results/new/car_mobilenet_v3_small_balanced_proxy_8_statistics.csv').is_file()


def test_the_readme_adds_a_data_set(copy):
    follow(copy, 'raw_sets.py', 'raw_sets.RAW_SETS')
    lines = []
    for label in range(6):
        for number in range(4):
            write_image(copy / f'data/flora/{label}/{number}.jpg', label, number)
            lines.append(f'{label}/{number}.jpg,species {label},{"train" if label < 3 else "test"}\n')
    (copy / 'data/flora/labels.csv').write_text(''.join(lines))
    printed = type_in(copy, 'data_utils.py', '--data_path', 'data', '--data_name', 'flora')
    assert 'flora: the counts are those of the complete data set' in printed
    type_in(copy, 'train.py', '--data_path', 'data', '--data_name', 'flora', '--backbone_type', BACKBONE, *SMALL_RUN)
    assert (copy / 'results/new/flora_timm-test_resnet_balanced_proxy_8_statistics.csv').is_file()
