"""Train the runs behind the tables of docs/results.md and docs/ablation.md, and collect their statistics into CSVs.

    python benchmarks/reproduce.py --list                                      # what is finished and what is missing
    python benchmarks/reproduce.py --data_path /home/data --weights imagenet   # every table: about a day on two cores
    python benchmarks/reproduce.py car cub --seeds 1,2,3 --jobs 2
    python benchmarks/reproduce.py sweep                                       # docs/gallery.md: 21 small runs

TABLES below says which runs there are: a run is a row of a table with one seed. Its files go to
{results_dir}/grid/TABLE/, and when it ends its statistics are added to {results_dir}/grid/TABLE.csv. A run whose last
epoch is in that CSV is finished and kept; an interrupted one continues from its checkpoint. So the same command, given
again, does what is left. To train a table again, remove its CSV and its folder.

With two jobs on two cores, OMP_NUM_THREADS=1 in the environment is faster than one job on both.
"""
import csv
import io
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # a script finds only the modules beside itself

from common.errors import UserError, check_choice, reason_of  # noqa: E402
from common.files import write_atomically  # noqa: E402
from common.results import RunFiles  # noqa: E402
from training.options import RunOptions, parse_options  # noqa: E402
from utils import Parser, check_between, int_list, run_script, user_path  # noqa: E402

POLL_SECONDS = 0.2  # between two looks at the running processes
GRACE_SECONDS = 5  # in which they may end by themselves before they are terminated


# ---------------------------------------------------- the runs ------------------------------------------------------
class Row(NamedTuple):
    """A row of a table: the runs that differ in their seed alone."""

    flags: str
    seeds: tuple[int, ...] = (1, 2, 3)


class Table(NamedTuple):
    """Runs that share a data set, a number of epochs and flags; the name of a row is the --remark of its runs."""

    rows: dict[str, Row]
    flags: str = ''
    epochs: int = 6
    data_name: str = 'car'
    folder: str = 'grid/{table}'  # in --results_dir
    start_from: str | None = None  # a table: each run starts from its model of the same row and seed


PHOTOGRAPHS = ('--backbone_type timm:tf_efficientnet_lite0 --image_size 128 --cache_size 146 --recalls 1,2,4,8 '
               '--num_workers 0 --on_collapse warn')
GLYPHS = ('--backbone_type timm:resnet10t --weights none --freeze_bn 0 --feature_dim 64 --image_size 32 '
          '--resize_size 32 --min_crop 0.8 --flip 0 --batch_size 25 --lr 1e-3 --lr_schedule cosine --recalls 1,2,4 '
          '--num_workers 0 --on_collapse warn')
# Flags of train.py for every run on a data set, and of data_utils.py. Emoji reach to the edges of their images.
PROTOCOLS = {'car': PHOTOGRAPHS, 'cub': PHOTOGRAPHS, 'grocery': PHOTOGRAPHS,
             'emoji': f'{PHOTOGRAPHS} --resize_size 0 --cache_size 0', 'glyph': GLYPHS}
PREPARATIONS = {'car': '--cache_size 146', 'cub': '--cache_size 146', 'grocery': '--test_ratio 0.5 --cache_size 146',
                'emoji': '--test_ratio 0.5 --skip_duplicates', 'glyph': '--glyph_classes 150'}
GLYPH_PATH = 'data/sweep'  # where the small data set of the sweep is drawn

PUBLISHED = ('balanced_proxy', 'asymptotic_proxy', 'positive_proxy', 'momentum_proxy', 'proxy_anchor')
LOSSES = ('normalized_softmax', 'balanced_proxy', 'proxy_anchor', 'proxy_nca', 'cos_face', 'arc_face')
UPDATES = ('positive', 'momentum', 'gradient')
MOMENTA = (0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95)
# One schedule for all recipes.
SCHEDULE = '--batch_size 120 --warm_up 1 --lr 1e-4 --lr_schedule step --lr_decay_step 3 --lr_decay_gamma 0.5'
# A recipe that has no name of its own any more.
WHITENED_START = '--recipe whitened_mirror --flip_tta 0'
# The recipes with their own rates and schedules, on equal terms: batches of 64, no flip augmentation in the test, the
# last epoch. At its page's rate of 1e-3 momentum_proxy does not learn on this backbone.
EQUAL_TERMS = {name: Row(f'--recipe {name}') for name in (*PUBLISHED, 'whitened_mirror')}
EQUAL_TERMS['momentum_proxy'] = Row('--recipe momentum_proxy --lr 1e-4')
SIX_EPOCHS = {**EQUAL_TERMS, 'head_only': Row('--recipe whitened_mirror --warm_up 6')}  # the backbone stays frozen
BEST_ON_CARS = ('whitened_mirror', 'proxy_anchor')
# A third of whitened_mirror's rates; the proxies start at the class means.
LAST_STAGE = ('--image_size 192 --resize_size 0 --min_crop 0.3 --cache_size 0 --warm_up 0 --lr 1e-4 --proxy_lr 3e-3 '
              '--lr_schedule cosine --proxy_init mean')
EQUAL_FLAGS = '--batch_size 64 --flip_tta 0'

TABLES = {
    'car': Table(SIX_EPOCHS, f'{EQUAL_FLAGS} --eval_every 6'),
    'cub': Table(SIX_EPOCHS, f'{EQUAL_FLAGS} --eval_every 6', data_name='cub'),
    'grocery': Table(SIX_EPOCHS, f'{EQUAL_FLAGS} --eval_every 6', data_name='grocery'),
    'emoji': Table(SIX_EPOCHS, f'{EQUAL_FLAGS} --eval_every 6', data_name='emoji'),
    'car20': Table(EQUAL_TERMS, f'{EQUAL_FLAGS} --eval_every 20', epochs=20),
    # Four more epochs on whole images of 192 px.
    'car20_192': Table({name: Row(f'--recipe {name} {LAST_STAGE}') for name in BEST_ON_CARS},
                       f'{EQUAL_FLAGS} --eval_every 4', epochs=4, start_from='car20'),
    # The remaining tables were trained on cars with red and blue exchanged: docs/ablation.md.
    'long': Table({
        'whitened_mirror': Row('--recipe whitened_mirror', (1, 2, 3, 4, 5)),
        'whitened_start': Row(WHITENED_START),
        'proxy_anchor': Row('--recipe proxy_anchor'),
        'positive_proxy': Row('--recipe positive_proxy'),
        'balanced_proxy': Row('--recipe balanced_proxy', seeds=(1,)),
    }, '--batch_size 64', epochs=20),
    # Parts of whitened_start, measured on held out training classes.
    'ablation': Table({
        'positive_proxy': Row('--recipe positive_proxy'),
        'whitened_start': Row(WHITENED_START),
        'without-whitening': Row(f'{WHITENED_START} --head_init random'),
        'without-means': Row(f'{WHITENED_START} --proxy_init unit'),
        'without-both': Row(f'{WHITENED_START} --head_init random --proxy_init unit'),
        'without-rate-and-schedule': Row(
            f'{WHITENED_START} --lr 1e-4 --proxy_lr 1e-2 --lr_schedule step --lr_decay_step 3'),
        'without-small-batches': Row(f'{WHITENED_START} --batch_size 120'),
        'with-gem': Row(f'{WHITENED_START} --pooling gem'),
    }, '--batch_size 64 --val_ratio 0.4 --pretrained_baseline 0'),
    # Every loss with every proxy update, and Balanced Proxy with two logarithms.
    'rules': Table({
        **{f'{loss}-{update}': Row(f'--loss_name {loss} --proxy_update {update}')
           for loss in LOSSES for update in UPDATES},
        'balanced_proxy_split-gradient': Row('--loss_name balanced_proxy_split --proxy_update gradient'),
    }, f'--recipe positive_proxy {SCHEDULE}'),
    # ArcFace at other scales and rates of its proxies.
    'arc_face': Table({
        f'{scale}-{proxy_lr}': Row(f'--scale {scale} --proxy_lr {proxy_lr}', seeds=(1,))
        for scale, proxy_lr in ((32, 0.01), (16, 0.01), (64, 0.0001))
    }, f'--recipe positive_proxy {SCHEDULE} --loss_name arc_face --proxy_update gradient'),
    # R@1 over the momentum of moving proxies, on half of glyph.
    'sweep': Table({f'm{momentum}': Row(f'--momentum {momentum}') for momentum in MOMENTA},
                   '--recipe asymptotic_proxy', epochs=5, data_name='glyph', folder='sweep'),
}


@dataclass(frozen=True)
class Run:
    """One training: a row of a table with one seed."""

    table: str
    name: str  # of the row
    seed: int
    words: tuple[str, ...]  # the command line of train.py, without --resume and --overwrite
    options: RunOptions

    @property
    def title(self) -> str:
        return f'{self.table}/{self.name} seed {self.seed}'

    @property
    def files(self) -> RunFiles:
        return RunFiles(Path(self.options.results_dir), self.options.run)

    @property
    def table_csv(self) -> Path:
        """The table's CSV, beside its folder."""
        return self.files.folder.with_suffix('.csv')


def list_runs(table: str, data_path: str, weights: str, results_dir: str, seeds: tuple[int, ...] | None) -> list[Run]:
    """Return the runs of a table, the first seed of every row first; `seeds` replace those of the rows."""
    entry = TABLES[table]
    if entry.data_name == 'glyph':
        data_path = GLYPH_PATH
    shared = ['--data_path', data_path, '--data_name', entry.data_name, *PROTOCOLS[entry.data_name].split(),
              *entry.flags.split(), '--num_epochs', str(entry.epochs),
              '--results_dir', str(Path(results_dir) / entry.folder.format(table=table))]
    models = {}
    if entry.start_from:
        models = {(run.name, run.seed): str(run.files.model)
                  for run in list_runs(entry.start_from, data_path, weights, results_dir, seeds)}
    runs = []
    for name, row in entry.rows.items():
        for seed in seeds or row.seeds:
            initial = ('--init', models[name, seed]) if models else ('--weights', weights)
            words = (*initial, *shared, *row.flags.split(), '--seed', str(seed), '--remark', name)
            (options,) = parse_options(list(words))
            runs.append(Run(table, name, seed, words, options))
    return sorted(runs, key=lambda run: run.seed)


# ---------------------------------------------------- what is finished ---------------------------------------------
def read_rows(path: Path) -> list[dict[str, str]]:
    """Read a CSV of statistics as text, so that it is written again as it was; no rows if there is no file.

    Raises:
        UserError: if it is not a CSV of statistics.
    """
    if not path.is_file():
        return []
    try:
        with open(path, newline='', encoding='utf-8') as file:
            reader = csv.DictReader(file, strict=True)
            columns = set(reader.fieldnames or ())
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f'{path} is not a table of runs ({reason_of(error)}); move it away') from None
    absent = {'epoch', 'args.remark', 'args.seed'} - columns
    if absent:
        raise UserError(f'{path} is not a table of runs: it has no column {min(absent)}; move it away')
    for row in rows:
        is_complete = None not in row and None not in row.values()  # as many cells as the header
        if not (is_complete and row['epoch'].isdecimal() and row['args.seed'].isdecimal()):
            raise UserError(f'{path} is not a table of runs: row {rows.index(row) + 1} cannot be read; move it away')
    return rows


def epochs_of(rows: list[dict[str, str]], run: Run) -> int:
    """Return the last epoch of a run among the rows of a CSV; 0 if there is none."""
    key = (run.name, str(run.seed))
    return max((int(row['epoch']) for row in rows if (row['args.remark'], row['args.seed']) == key), default=0)


def find_missing(runs: list[Run]) -> list[Run]:
    """Return the runs that are finished neither in the CSV of their table nor in its folder."""
    tables = {path: read_rows(path) for path in {run.table_csv for run in runs}}
    return [run for run in runs if run.options.num_epochs > max(
        epochs_of(tables[run.table_csv], run), epochs_of(read_rows(run.files.statistics), run))]


def collect(runs: list[Run]) -> None:
    """Add the statistics of finished runs to the CSV of their table; those that are in it already stay."""
    for path in {run.table_csv for run in runs}:
        rows = read_rows(path)
        num_rows = len(rows)
        for run in runs:
            if run.table_csv == path and epochs_of(rows, run) < run.options.num_epochs:
                statistics = read_rows(run.files.statistics)
                if epochs_of(statistics, run) >= run.options.num_epochs:
                    rows += statistics
        if len(rows) > num_rows:
            write_rows(path, rows)


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """Write a CSV; a column that a row lacks is empty in it."""
    text = io.StringIO(newline='')
    columns = dict.fromkeys(column for row in rows for column in row)
    writer = csv.DictWriter(text, list(columns), restval='', lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def print_state(runs: list[Run], missing: list[Run]) -> None:
    """Print how many runs of each table are finished, and a line for each that is not."""
    print(f'{"table":<10}{"runs":>6}{"finished":>10}{"missing":>9}')
    for table in dict.fromkeys(run.table for run in runs):
        num_runs = sum(run.table == table for run in runs)
        num_missing = sum(run.table == table for run in missing)
        print(f'{table:<10}{num_runs:>6}{num_runs - num_missing:>10}{num_missing:>9}')
    for run in missing:
        epochs = epochs_of(read_rows(run.files.statistics), run)
        state = f'{epochs} of {run.options.num_epochs} epochs' if run.files.checkpoint.is_file() else 'not started'
        print(f'missing: {run.title}, {state}')


# ---------------------------------------------------- training -----------------------------------------------------
def prepare_data(runs: list[Run]) -> None:
    """Convert the data sets of these runs and build their caches; what is there already is kept."""
    for path, name in dict.fromkeys((run.options.data_path, run.options.data_name) for run in runs):
        command = [sys.executable, str(REPOSITORY / 'data_utils.py'), '--data_path', path, '--data_name', name,
                   *PREPARATIONS[name].split()]
        if code := subprocess.run(command, check=False).returncode:
            raise UserError(f'data_utils.py ended with code {code}; its message is above')


def start(run: Run) -> subprocess.Popen:
    """Start the training of a run, from its checkpoint if it has one."""
    go_on = '--resume' if run.files.checkpoint.is_file() else '--overwrite'
    print(f'{run.title}: {go_on}', flush=True)
    return subprocess.Popen([sys.executable, str(REPOSITORY / 'train.py'), *run.words, go_on])


def next_run(waiting: list[Run], running: Iterable[Run]) -> Run | None:
    """Return the first run that does not start from the model of one that is in training; None if there is none."""
    in_training = {str(run.files.model) for run in running}
    return next((run for run in waiting if run.options.init not in in_training), None)


def train(runs: list[Run], jobs: int) -> None:
    """Train runs, `jobs` at a time, and collect each one's statistics when it ends.

    Raises:
        UserError: if a training fails; those that run beside it are ended, and keep their checkpoints.
    """
    waiting, running = list(runs), {}
    try:
        while waiting or running:
            while len(running) < jobs and (run := next_run(waiting, running)):
                waiting.remove(run)
                running[run] = start(run)
            time.sleep(POLL_SECONDS)
            for run in [run for run, process in running.items() if process.poll() is not None]:
                code = running.pop(run).returncode
                if code or find_missing([run]):
                    raise UserError(f'{run.title}: train.py ended with code {code} before its last epoch; its message '
                                    'is above, and the same command goes on with what is missing')
                collect([run])
    finally:
        stop(list(running.values()))


def stop(processes: list[subprocess.Popen]) -> None:
    """End trainings; those that Ctrl-C in a terminal has reached as well may end by themselves first."""
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(POLL_SECONDS)
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait()


# ---------------------------------------------------- command line --------------------------------------------------
def get_args(argv: list[str] | None = None):
    """Parse and check the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument('tables', nargs='*', metavar='TABLE', help=f'{", ".join(TABLES)} [all but sweep]')
    parser.add_argument('--list', action='store_true', help='print what is finished and what is missing, and train '
                        'nothing')
    parser.add_argument('--seeds', type=int_list, metavar='1,2,3', help='seeds of every row [those of the table]')
    parser.add_argument('--data_path', type=user_path, default='/home/data', help='folder that holds car, cub, '
                        f'grocery and emoji; sweep draws its data set in {GLYPH_PATH} [%(default)s]')
    parser.add_argument('--weights', type=user_path, default='imagenet', help='weights of EfficientNet-Lite0: '
                        'imagenet, or the path of a state dict; sweep starts from random weights [%(default)s]')
    parser.add_argument('--jobs', type=int, default=1, help='trainings at a time [%(default)s]')
    parser.add_argument('--results_dir', type=user_path, default='results', help='folder that holds grid/TABLE.csv '
                        '[%(default)s]')
    args = parser.parse_args(argv)
    for table in args.tables:
        check_choice('TABLE', table, TABLES)
    check_between(args, {'jobs': (1, None)})
    args.tables = list(dict.fromkeys(args.tables)) or [table for table in TABLES if table != 'sweep']
    return args


def main() -> None:
    """Train what is missing of the tables that the command line names, or list it."""
    args = get_args()
    runs = [run for table in args.tables
            for run in list_runs(table, args.data_path, args.weights, args.results_dir, args.seeds)]
    missing = find_missing(runs)
    print_state(runs, missing)
    if args.list:
        return
    collect(runs)
    if missing:
        prepare_data(missing)
        train(missing, args.jobs)


if __name__ == '__main__':
    run_script(main)
