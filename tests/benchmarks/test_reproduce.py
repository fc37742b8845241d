"""The runs behind the tables: they are those that are committed, and only what is missing is trained."""
import shlex
import subprocess
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pytest
from made_runs import write_run

from benchmarks import reproduce
from benchmarks.reproduce import Row, Run, Table, list_runs
from common.errors import UserError

REPOSITORY = Path(__file__).parents[2]
WEIGHTS = '/weights/tf_efficientnet_lite0-imagenet.pth'
SMALL = {'small': Table({'one': Row('--recipe positive_proxy', seeds=(1, 2)),
                         'two': Row('--recipe balanced_proxy', seeds=(1,))}, '--warm_up 0', epochs=2)}


def runs_of(table: str) -> list[Run]:
    return list_runs(table, '/data', WEIGHTS, 'results', None)


# ---------------------------------------------------- the runs ------------------------------------------------------
@pytest.mark.parametrize('table', sorted(file.stem for file in (REPOSITORY / 'results/grid').glob('*.csv')))
def test_a_committed_table_holds_the_runs_that_would_be_trained_today(table):
    committed = pd.read_csv(REPOSITORY / f'results/grid/{table}.csv').groupby(['args.remark', 'args.seed'])
    runs = {(run.name, run.seed): run for run in runs_of(table)}
    assert set(committed.groups) <= set(runs)
    for key, rows in committed:
        options = runs[key].options
        assert rows['epoch'].tolist() == list(range(1, options.num_epochs + 1))
        settings = rows.filter(like='args.').rename(columns=lambda column: column.removeprefix('args.'))
        assert len(settings.drop_duplicates()) == 1
        for name, value in settings.iloc[0].drop('run').items():  # names have changed
            assert as_text(value) == as_text(expected(options, name)), (key, name)


def expected(options, name: str):
    """Return an option as a file of the run stores it."""
    value = getattr(options, name)
    return Path(value).name if name in ('weights', 'init') and value else value


def as_text(value) -> str:
    """Return a setting as text, from a CSV or from the options: `0.1`, `1,2,4,8`, and nothing for None."""
    if isinstance(value, tuple):
        return ','.join(map(as_text, value))
    if value is None or value != value:  # NaN
        return ''
    try:
        return f'{float(value):.10g}'
    except ValueError:
        return str(value)


def test_runs_of_a_table_have_names_of_their_own():
    for table in reproduce.TABLES:
        files = [run.files.statistics for run in runs_of(table)]
        assert len(set(files)) == len(files)
        assert {file.parent for file in files} == {Path('results/sweep' if table == 'sweep' else
                                                        f'results/grid/{table}')}


def differing(one: Run, other: Run) -> set[str]:
    """Return the settings in which two runs differ, besides their names."""
    settings, others = asdict(one.options), asdict(other.options)
    return {name for name in settings if settings[name] != others[name]} - {
        'run', 'remark', 'results_dir', 'explicit_flags'}


def test_a_row_of_an_ablation_changes_what_it_is_named_after():
    starts = {'without-whitening': {'head_init'}, 'without-means': {'proxy_init'},
              'without-both': {'head_init', 'proxy_init'}, 'without-small-batches': {'batch_size'},
              'with-gem': {'pooling'},
              'without-rate-and-schedule': {'lr', 'backbone_lr', 'proxy_lr', 'lr_schedule', 'lr_decay_step'}}
    runs = {run.name: run for run in runs_of('ablation') if run.seed == 1}
    assert {row: differing(runs['whitened_start'], runs[row]) for row in starts} == starts


def test_whitened_start_is_whitened_mirror_without_its_mirror_image():
    runs = {run.name: run for run in runs_of('long') if run.seed == 1}
    assert differing(runs['whitened_start'], runs['whitened_mirror']) == {'flip_tta'}


def test_a_last_stage_starts_from_the_model_of_the_same_row_and_seed():
    models = {(run.name, run.seed): str(run.files.model) for run in runs_of('car20')
              if run.name in reproduce.BEST_ON_CARS}
    last = runs_of('car20_192')
    assert {(run.name, run.seed): run.options.init for run in last} == models
    assert {(run.options.weights, run.options.image_size, run.options.num_epochs) for run in last} == {('none', 192, 4)}


def test_the_sweep_changes_the_momentum_alone():
    runs = [run for run in runs_of('sweep') if run.seed == 1]
    assert [run.options.momentum for run in runs] == list(reproduce.MOMENTA)
    assert all(differing(runs[0], run) == {'momentum'} for run in runs[1:])
    assert {run.options.weights for run in runs} == {'none'}


def test_other_seeds_replace_those_of_the_rows():
    runs = list_runs('long', '/data', WEIGHTS, 'results', (7, 8))
    assert [run.seed for run in runs] == [7] * 5 + [8] * 5


def test_make_hands_its_variables_on():
    printed = subprocess.run(['make', '-n', 'results', 'DATA=/photographs', 'WEIGHTS=w.pth', 'JOBS=2'], cwd=REPOSITORY,
                             capture_output=True, text=True, check=True).stdout
    (line,) = [line for line in printed.splitlines() if 'reproduce.py' in line]
    args = reproduce.get_args(shlex.split(line)[2:])
    assert (args.data_path, args.weights, args.jobs) == ('/photographs', 'w.pth', 2)
    assert args.tables == [table for table in reproduce.TABLES if table != 'sweep']


# ---------------------------------------------------- what is trained ----------------------------------------------
class Trainings:
    """Stands for the trainings that are started: each writes its statistics and ends at the second look."""

    def __init__(self, fail=()):
        self.fail, self.started, self.running, self.most, self.terminated = fail, [], 0, 0, []

    def __call__(self, command):
        return FakeTraining(self, command[2:])


class FakeTraining:
    def __init__(self, trainings, words):
        options = reproduce.parse_options(words)[0]
        self.trainings, self.options, self.key, self.looks = trainings, options, (options.remark, options.seed), 0
        self.returncode = None
        trainings.started.append((*self.key, words[-1]))
        trainings.running += 1
        trainings.most = max(trainings.most, trainings.running)

    def poll(self):
        self.looks += 1
        if self.looks > 1 and self.returncode is None:
            self.trainings.running -= 1
            self.returncode = 2 if self.key in self.trainings.fail else 0
            if not self.returncode:
                write_finished(self.options)
        return self.returncode

    def terminate(self):
        self.trainings.terminated.append(self.key)

    def wait(self):
        return self.returncode


def write_finished(options, num_epochs=None):
    folder = Path(options.results_dir)
    folder.mkdir(parents=True, exist_ok=True)
    recalls = [10.0 + options.seed / 3] * (num_epochs or options.num_epochs)
    return write_run(folder, options.run, recalls, remark=options.remark, seed=options.seed,
                     num_epochs=options.num_epochs)


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder to work in where the only table is SMALL, and no process is started."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, 'TABLES', SMALL)
    monkeypatch.setattr(reproduce, 'POLL_SECONDS', 0)
    monkeypatch.setattr(reproduce, 'GRACE_SECONDS', 0)
    monkeypatch.setattr(reproduce, 'prepare_data', lambda runs: None)
    return tmp_path


@pytest.fixture
def trainings(work, monkeypatch):
    kept = Trainings()
    monkeypatch.setattr(reproduce.subprocess, 'Popen', kept)
    return kept


def test_what_is_missing_is_trained_and_collected(work, trainings, call_script):
    call_script(reproduce, 'small')
    assert trainings.started == [('one', 1, '--overwrite'), ('two', 1, '--overwrite'), ('one', 2, '--overwrite')]
    table = pd.read_csv(work / 'results/grid/small.csv')
    assert table[['args.remark', 'args.seed', 'epoch']].to_numpy().tolist() == [
        ['one', 1, 1], ['one', 1, 2], ['two', 1, 1], ['two', 1, 2], ['one', 2, 1], ['one', 2, 2]]


def test_what_is_in_the_csv_is_kept_though_its_files_are_gone(work, trainings, call_script):
    call_script(reproduce, 'small')
    before = (work / 'results/grid/small.csv').read_bytes()
    for path in (work / 'results/grid/small').iterdir():
        path.unlink()
    trainings.started.clear()
    call_script(reproduce, 'small')
    assert trainings.started == []
    call_script(reproduce, 'small', '--seeds', '1,2')
    assert trainings.started == [('two', 2, '--overwrite')]
    assert (work / 'results/grid/small.csv').read_bytes().startswith(before)


@pytest.mark.parametrize(('epochs', 'has_checkpoint', 'expected'), [
    (2, False, []), (2, True, []), (1, False, ['--overwrite']), (1, True, ['--resume']), (0, True, ['--resume']),
    (0, False, ['--overwrite'])])
def test_a_finished_run_is_kept_and_one_that_was_interrupted_continues(work, trainings, call_script, epochs,
                                                                      has_checkpoint, expected):
    run = list_runs('small', '/data', WEIGHTS, 'results', None)[0]
    run.files.folder.mkdir(parents=True)
    if epochs:
        write_finished(run.options, epochs)
    if has_checkpoint:
        run.files.checkpoint.touch()
    call_script(reproduce, 'small')
    assert [flag for name, seed, flag in trainings.started if (name, seed) == ('one', 1)] == expected
    table = pd.read_csv(run.table_csv)
    assert len(table[(table['args.remark'] == 'one') & (table['args.seed'] == 1)]) == 2


@pytest.mark.parametrize('jobs', [1, 2])
def test_so_many_trainings_run_at_a_time(trainings, call_script, jobs):
    call_script(reproduce, '--jobs', jobs)
    assert trainings.most == jobs


def test_a_last_stage_waits_for_its_first_one(trainings, call_script, monkeypatch):
    rows = {'one': Row('--recipe positive_proxy', seeds=(1,))}
    monkeypatch.setattr(reproduce, 'TABLES', {
        'first': Table(rows, '--warm_up 0', epochs=2),
        'last': Table(rows, '--warm_up 0', epochs=1, start_from='first')})
    call_script(reproduce, '--jobs', '2')
    assert [words for *_, words in trainings.started] == ['--overwrite', '--overwrite']
    assert trainings.most == 1


def test_a_failed_training_ends_the_others_and_says_which(work, trainings, call_script):
    trainings.fail = [('one', 1)]
    with pytest.raises(UserError, match='small/one seed 1: train.py ended with code 2'):
        call_script(reproduce, '--jobs', '2')
    assert trainings.terminated == [('two', 1)]
    assert trainings.started == [('one', 1, '--overwrite'), ('two', 1, '--overwrite')]


def test_the_list_says_what_is_missing_and_changes_nothing(work, trainings, call_script):
    runs = list_runs('small', '/data', WEIGHTS, 'results', None)
    write_finished(runs[0].options)
    write_finished(runs[1].options, 1)
    runs[1].files.checkpoint.touch()
    printed = call_script(reproduce, '--list')
    assert printed.splitlines() == ['table       runs  finished  missing', 'small          3         1        2',
                                    'missing: small/two seed 1, 1 of 2 epochs',
                                    'missing: small/one seed 2, not started']
    assert trainings.started == []
    assert not (work / 'results/grid/small.csv').exists()


def test_a_column_that_older_runs_lack_is_empty_in_their_rows(work, trainings, call_script):
    call_script(reproduce, 'small')
    table = pd.read_csv(work / 'results/grid/small.csv', dtype=str).drop(columns='binary_R@1')
    table.to_csv(work / 'results/grid/small.csv', index=False)
    call_script(reproduce, 'small', '--seeds', '1,2')
    again = pd.read_csv(work / 'results/grid/small.csv', dtype=str)
    assert again['binary_R@1'].isna().tolist() == 6 * [True] + 2 * [False]
    pd.testing.assert_frame_equal(again[table.columns][:6], table)


@pytest.mark.parametrize('contents', [b'', b'\xff\xfe\x00', b'a,b\n1,2\n', b'epoch,args.remark,args.seed\n1,x\n',
                                      b'epoch,args.remark,args.seed\none,x,1\n'])
def test_a_csv_that_is_no_table_of_runs_is_named_in_one_line(work, trainings, call_script, contents):
    path = work / 'results/grid/small.csv'
    path.parent.mkdir(parents=True)
    path.write_bytes(contents)
    with pytest.raises(UserError, match=r'small\.csv is not a table of runs'):
        call_script(reproduce)
    assert trainings.started == []


@pytest.mark.parametrize(('words', 'message'), [
    (['smal'], "TABLE 'smal' is not known; did you mean 'small'?"), (['--jobs', '0'], '--jobs 0 must be at least 1'),
    (['--seeds', '0,1'], '--seeds: .0,1. must be'), (['--sed', '1'], '--sed ')])
def test_a_mistake_is_answered_in_one_line(work, words, message):
    with pytest.raises(UserError, match=message.replace('?', r'\?')):
        reproduce.get_args(words)


@pytest.mark.slow
def test_runs_are_trained_by_train_py(work, monkeypatch, call_script):
    monkeypatch.undo()
    monkeypatch.chdir(work)
    monkeypatch.setattr(reproduce, 'PREPARATIONS', {'glyph': '--glyph_classes 9 --glyph_images 4'})
    monkeypatch.setattr(reproduce, 'TABLES', {'sweep': Table(
        {'m0.5': Row('--momentum 0.5', seeds=(1, 2))}, '--recipe asymptotic_proxy --backbone_type timm:test_resnet '
        '--batch_size 8 --recalls 1,2', epochs=2, data_name='glyph', folder='sweep')})
    call_script(reproduce, 'sweep', '--jobs', 2)
    table = pd.read_csv(work / 'results/sweep.csv')
    assert sorted(table['args.seed']) == [1, 1, 2, 2]
    assert 'missing' not in call_script(reproduce, 'sweep').split('\n', 1)[1]
