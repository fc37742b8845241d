"""The services that --log_to names are told what the statistics say, once, and cannot harm a run."""
import json
import sqlite3
import sys
import types

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ENVIRONMENT, REPOSITORY, assert_one_line_error, type_command
from engine import logs
from faults import TINY
from PIL import Image

from common.errors import UserError
from common.results import RunFiles
from training.tracking import RunLog, service_list

NAME = 'car_timm-test_resnet_balanced_proxy_16'
ROWS = [{'epoch': epoch, 'loss': 1 / epoch, 'dense_R@1': 10.0 * epoch} for epoch in (1, 2, 3)]


class StandIn:
    """A service that remembers what it is told, and fails where it is told to."""

    fails = ()

    def __init__(self, told):
        self.told, self.heard = told, []
        if 'start' in self.fails:
            raise OSError('no network')

    def add(self, row):
        if row['epoch'] in self.fails:
            raise RuntimeError('disk full')
        self.heard.append(row['epoch'])

    def finish(self, picture, epoch):
        self.heard.append((picture, epoch))


@pytest.fixture
def stand_in(monkeypatch):
    """A class that takes TensorBoard's place."""
    service = type('Service', (StandIn,), {})
    monkeypatch.setitem(logs.SERVICES, 'tensorboard', service)
    return service


# ---------------------------------------------------- real services ------------------------------------------------
@pytest.fixture(scope='module')
def run(raw_sets, tmp_path_factory):
    """The folder of a run of two epochs and a third after --resume, told to TensorBoard and Weights & Biases."""
    pytest.importorskip('tensorboard')
    pytest.importorskip('wandb')
    folder = tmp_path_factory.mktemp('run')
    words = ('train.py', *TINY, '--num_workers', 0, '--data_path', raw_sets, '--results_dir', folder)
    ENVIRONMENT.update({'WANDB_MODE': 'offline', 'WANDB_SILENT': 'true'})
    for more in (('--num_epochs', 2, '--log_to', 'tensorboard'),
                 ('--num_epochs', 3, '--resume', '--log_to', 'tensorboard,wandb')):
        result = type_command(*words, *more)
        assert result.returncode == 0, result.stderr
    return folder


def test_tensorboard_has_every_number_of_the_statistics_once(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (run / 'tensorboard').iterdir()
    events = EventAccumulator(str(folder)).Reload()
    table = pd.read_csv(run / f'{NAME}_statistics.csv').filter(regex='^(?!args|made)')
    assert sorted(events.Tags()['scalars']) == sorted(table)
    for column in table:
        assert [event.step for event in events.Scalars(column)] == [1, 2, 3]
        assert [event.value for event in events.Scalars(column)] == pytest.approx(table[column].tolist(), rel=1e-6)
    assert events.Tags()['images'] == ['curves']
    text = events.Tensors('settings/text_summary')[0].tensor_proto.string_val[0].decode()
    assert '| base_loss | balanced_proxy |' in text
    assert str(run) not in text


def test_wandb_catches_up_offline_with_settings_and_curves(run):
    (folder,) = (run / 'wandb').glob('offline-run-*')
    number = json.loads((run / f'{NAME}_log.json').read_text())['number']
    (file,) = folder.glob(f'run-{number}.wandb')
    told = file.read_bytes()
    table = pd.read_csv(run / f'{NAME}_statistics.csv', dtype=str)
    for word in ('dense_R@1', 'balanced_proxy', NAME, *table['loss']):
        assert word.encode() in told, word
    assert len(list((folder / 'files/media/images').glob('curves_3_*.png'))) == 1


def test_a_run_that_is_told_of_is_no_other_run(run):
    table = pd.read_csv(run / f'{NAME}_statistics.csv')
    assert len(table) == 3
    assert not any('log_to' in column for column in table)
    assert 'log_to' not in torch.load(run / f'{NAME}_model.pth', weights_only=True)['args']


def test_trackio_keeps_the_rows(tmp_path, monkeypatch):
    pytest.importorskip('trackio')
    monkeypatch.setenv('TRACKIO_DIR', str(tmp_path))
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / 'curves.png')
    code = ('import sys; from engine.logs import RunLog; from engine.runs import RunFiles\n'
            f'log = RunLog(("trackio",), RunFiles({str(tmp_path)!r}, "a_run"), {{"lr": 1.0}}, False)\n'
            f'log.add({ROWS!r}); from pathlib import Path; log.finish(Path({str(tmp_path)!r}) / "curves.png")')
    import subprocess
    subprocess.run([sys.executable, '-c', code], cwd=REPOSITORY, check=True)
    with sqlite3.connect(tmp_path / 'proxies.db') as connection:
        steps = [step for (step,) in connection.execute('SELECT step FROM metrics ORDER BY step')]
    assert steps[:3] == [1, 2, 3]


def test_trackio_is_called_as_it_documents(tmp_path, monkeypatch):
    """By a stand-in: the package asks for an older Pillow than the rest of the tests."""
    calls = []
    module = types.ModuleType('trackio')
    for name in ('init', 'log', 'finish'):
        setattr(module, name, lambda *words, call=name, **named: calls.append((call, words, named)))
    module.Image = lambda path: ('image', path)
    monkeypatch.setitem(sys.modules, 'trackio', module)
    files = RunFiles(tmp_path, 'a_run')
    first = RunLog(('trackio',), files, {'lr': 1.0}, resume=False)
    first.add(ROWS[:2])
    second = RunLog(('trackio',), files, {'lr': 1.0}, resume=True)
    second.add(ROWS)
    second.finish(tmp_path / 'curves.png')
    named = {'project': 'proxies', 'name': 'a_run', 'config': {'lr': 1.0}}
    assert calls == [('init', (), {**named, 'resume': 'never'}),
                     *(('log', (row,), {'step': row['epoch']}) for row in ROWS[:2]),
                     ('init', (), {**named, 'resume': 'allow'}), ('log', (ROWS[2],), {'step': 3}),
                     ('log', ({'curves': ('image', str(tmp_path / 'curves.png'))},), {'step': 3}), ('finish', (), {})]


# ---------------------------------------------------- once, and no harm --------------------------------------------
def test_a_run_that_goes_on_keeps_its_number_and_a_new_one_gets_its_own(stand_in, tmp_path):
    files = RunFiles(tmp_path, 'a_run')
    first = RunLog(('tensorboard',), files, {}, resume=False)
    first.add(ROWS[:1])
    first.add(ROWS[:2])
    assert first.open['tensorboard'].heard == [1, 2]
    second = RunLog(('tensorboard',), files, {}, resume=True)
    second.add(ROWS)
    assert second.open['tensorboard'].heard == [3]
    assert second.open['tensorboard'].told.epochs == 2
    other = RunLog(('tensorboard',), files, {}, resume=False)
    assert second.told['number'] == first.told['number'] != other.told['number']


def test_a_service_that_fails_is_left_out_and_catches_up_after_a_resume(stand_in, tmp_path, capsys):
    stand_in.fails = (2,)
    files = RunFiles(tmp_path, 'a_run')
    log = RunLog(('tensorboard',), files, {}, resume=False)
    log.add(ROWS[:1])
    log.add(ROWS[:2])
    assert '--log_to tensorboard: it failed and is left out from here on (disk full)' in capsys.readouterr().out
    log.add(ROWS)
    log.finish(tmp_path / 'curves.png')
    assert log.open == {}
    stand_in.fails = ()
    second = RunLog(('tensorboard',), files, {}, resume=True)
    second.add(ROWS)
    second.finish(tmp_path / 'curves.png')
    assert second.open['tensorboard'].heard == [2, 3, (tmp_path / 'curves.png', 3)]


def test_of_several_processes_the_first_tells(stand_in, tmp_path, monkeypatch):
    monkeypatch.setattr(logs, 'world_rank', lambda: 1)
    log = RunLog(('tensorboard',), RunFiles(tmp_path, 'a_run'), {}, resume=False)
    log.add(ROWS)
    log.finish(tmp_path / 'curves.png')
    assert log.open == {}
    assert list(tmp_path.iterdir()) == []


def test_a_service_that_does_not_start_is_one_line(stand_in, tmp_path):
    stand_in.fails = ('start',)
    with pytest.raises(UserError, match=r'--log_to tensorboard: it does not start \(no network\)'):
        RunLog(('tensorboard',), RunFiles(tmp_path, 'a_run'), {}, resume=False)


def test_a_service_that_is_not_known_or_not_installed_is_one_line(monkeypatch):
    assert_one_line_error(type_command('train.py', '--log_to', 'tensorboard,wandbb'), '--log_to', "'wandb'")
    monkeypatch.setattr(logs.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match='the package trackio is not installed; pip install trackio'):
        service_list('trackio')


def test_the_citation_names_the_five_papers():
    yaml = pytest.importorskip('yaml')
    cited = yaml.safe_load((REPOSITORY / 'CITATION.cff').read_text())
    assert {'cff-version', 'message', 'title', 'authors'} <= cited.keys()
    page = (REPOSITORY / 'README.md').read_text()
    titles = [reference['title'] for reference in cited['references']]
    assert len(titles) == 5
    assert all(title in page for title in titles[:4])
