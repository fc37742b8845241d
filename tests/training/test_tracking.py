"""The services that --log_to names get what the statistics hold, once, and cannot harm a run."""
import json

import pandas as pd
import pytest
import torch
from faults import TINY
from tiny_runs import NAME, train_tiny

import train
from common.errors import UserError
from common.results import RunFiles
from training import tracking
from training.tracking import Tracker, parse_services

ROWS = [{'epoch': epoch, 'loss': 1 / epoch, 'dense_R@1': 10.0 * epoch} for epoch in (1, 2, 3)]


class FakeService:
    """A service that remembers what it gets, and fails where `fails` says so."""

    fails = ()

    def __init__(self, run):
        self.run, self.received = run, []
        if 'start' in self.fails:
            raise OSError('no network')

    def log(self, row):
        if row['epoch'] in self.fails:
            raise RuntimeError('disk full')
        self.received.append(row['epoch'])

    def finish(self, figure, epoch):
        if 'finish' in self.fails:
            raise RuntimeError('disk full')
        self.received.append((figure, epoch))


@pytest.fixture
def fake_service(monkeypatch):
    """A class that takes TensorBoard's place."""
    service = type('Service', (FakeService,), {})
    monkeypatch.setitem(tracking.SERVICES, 'tensorboard', service)
    return service


# ---------------------------------------------------- real services ----------------------------------------------
def check_tensorboard(folder, table) -> None:
    """Check that the events in a folder are the numbers of the statistics, each once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    assert sorted(events.Tags()['scalars']) == sorted(table)
    for column in table:
        assert [event.step for event in events.Scalars(column)] == table['epoch'].tolist()
        assert [event.value for event in events.Scalars(column)] == pytest.approx(table[column].tolist(), rel=1e-6)
    assert events.Tags()['images'] == ['curves']
    text = events.Tensors('settings/text_summary')[0].tensor_proto.string_val[0].decode()
    assert '| base_loss | balanced_proxy |' in text


def test_tensorboard_gets_every_row_once_with_settings_and_curves(tmp_path):
    pytest.importorskip('tensorboard')
    from PIL import Image

    files, settings = RunFiles(tmp_path, 'a_run'), {'base_loss': 'balanced_proxy'}
    Image.new('RGB', (8, 8)).save(files.curves)
    first = Tracker(('tensorboard',), files, settings, resume=False)
    first.log(ROWS[:1])
    first.services['tensorboard'].writer.close()
    second = Tracker(('tensorboard',), files, settings, resume=True)
    second.log(ROWS)
    second.finish(files.curves)
    [folder] = (tmp_path / 'tensorboard').iterdir()
    check_tensorboard(folder, pd.DataFrame(ROWS))


@pytest.fixture(scope='module')
def tracked_run(raw_sets, tmp_path_factory):
    """The folder of a run of two epochs and a third after --resume, reported to TensorBoard and Weights & Biases."""
    pytest.importorskip('tensorboard')
    pytest.importorskip('wandb')
    from conftest import call_main

    folder = tmp_path_factory.mktemp('run')
    words = (*TINY, '--num_workers', 0, '--data_path', raw_sets, '--results_dir', folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('WANDB_MODE', 'offline')
        patch.setenv('WANDB_SILENT', 'true')
        call_main(train, *words, '--num_epochs', 2, '--log_to', 'tensorboard')
        call_main(train, *words, '--num_epochs', 3, '--resume', '--log_to', 'tensorboard,wandb')
    return folder


@pytest.mark.slow
def test_tensorboard_has_every_number_of_a_resumed_run_once(tracked_run):
    table = pd.read_csv(tracked_run / f'{NAME}_statistics.csv').filter(regex='^(?!args|made)')
    assert table['epoch'].tolist() == [1, 2, 3]
    [folder] = (tracked_run / 'tensorboard').iterdir()
    check_tensorboard(folder, table)


@pytest.mark.slow
def test_wandb_catches_up_offline_with_settings_and_curves(tracked_run):
    [folder] = (tracked_run / 'wandb').glob('offline-run-*')
    run_id = json.loads((tracked_run / f'{NAME}_log.json').read_text())['run_id']
    [file] = folder.glob(f'run-{run_id}.wandb')
    logged = file.read_bytes()
    table = pd.read_csv(tracked_run / f'{NAME}_statistics.csv', dtype=str)
    for word in ('dense_R@1', 'balanced_proxy', NAME, *table['loss']):
        assert word.encode() in logged, word
    assert len(list((folder / 'files/media/images').glob('curves_3_*.png'))) == 1


def test_wandb_is_called_as_it_documents(tmp_path, monkeypatch):
    calls = []

    class FakeRun:
        def log(self, row, step):
            calls.append(('log', row, step))

        def finish(self):
            calls.append('finish')

    fake = type('wandb', (), {'Image': staticmethod(lambda path: ('image', path)),
                              'init': staticmethod(lambda **named: calls.append(named) or FakeRun())})
    monkeypatch.setitem(__import__('sys').modules, 'wandb', fake)
    monkeypatch.delenv('WANDB_PROJECT', raising=False)
    tracker = Tracker(('wandb',), RunFiles(tmp_path, 'a_run'), {'lr': 1.0}, resume=False)
    tracker.log(ROWS[:1])
    tracker.finish(tmp_path / 'curves.png')
    assert calls == [
        {'project': 'proxies', 'name': 'a_run', 'id': tracker.state['run_id'], 'resume': 'allow', 'dir': str(tmp_path),
         'config': {'lr': 1.0}}, ('log', ROWS[0], 1),
        ('log', {'curves': ('image', str(tmp_path / 'curves.png'))}, 1), 'finish']


# ---------------------------------------------------- once, and no harm ------------------------------------------
def test_a_run_reports_its_rows_and_its_settings_without_paths_and_is_the_same_run(fake_service, trained_run, raw_sets,
                                                                                 tmp_path, monkeypatch):
    started = []
    init = FakeService.__init__
    monkeypatch.setattr(FakeService, '__init__', lambda self, run: init(self, run) or started.append(self))
    train_tiny(raw_sets, tmp_path, '--num_epochs', 1, '--warm_up', 0, '--log_to', 'tensorboard')
    [service] = started
    assert service.received == [1, (tmp_path / f'{NAME}_curves.png', 1)]
    assert service.run.settings['base_loss'] == 'balanced_proxy'
    assert not any(str(tmp_path) in str(value) or str(raw_sets) in str(value)
                   for value in service.run.settings.values())
    one, other = (torch.load(folder / f'{NAME}_model.pth', weights_only=True) for folder in (trained_run, tmp_path))
    assert one['args'] == other['args']
    assert all(torch.equal(value, other['state_dict'][key]) for key, value in one['state_dict'].items())


def test_a_resumed_run_keeps_its_id_and_a_new_one_gets_its_own(fake_service, tmp_path):
    files = RunFiles(tmp_path, 'a_run')
    first = Tracker(('tensorboard',), files, {}, resume=False)
    first.log(ROWS[:1])
    first.log(ROWS[:2])
    assert first.services['tensorboard'].received == [1, 2]
    second = Tracker(('tensorboard',), files, {}, resume=True)
    second.log(ROWS)
    assert second.services['tensorboard'].received == [3]
    assert second.services['tensorboard'].run.num_logged == 2
    other = Tracker(('tensorboard',), files, {}, resume=False)
    assert second.state['run_id'] == first.state['run_id'] != other.state['run_id']


@pytest.mark.parametrize('contents', ['', '[1]', '{"run_id": 3, "epochs": {}}',
                                      '{"run_id": "a", "epochs": {"x": "2"}}'])
def test_a_damaged_log_file_starts_a_new_log(fake_service, tmp_path, contents):
    files = RunFiles(tmp_path, 'a_run')
    files.log.write_text(contents)
    tracker = Tracker(('tensorboard',), files, {}, resume=True)
    tracker.log(ROWS)
    assert tracker.services['tensorboard'].received == [1, 2, 3]


def test_a_service_that_fails_is_dropped_and_catches_up_after_a_resume(fake_service, tmp_path, capsys):
    fake_service.fails = (2,)
    files = RunFiles(tmp_path, 'a_run')
    tracker = Tracker(('tensorboard',), files, {}, resume=False)
    tracker.log(ROWS[:1])
    tracker.log(ROWS[:2])
    assert '--log_to tensorboard: it failed and is dropped (disk full)' in capsys.readouterr().out
    tracker.log(ROWS)
    tracker.finish(tmp_path / 'curves.png')
    assert tracker.services == {}
    fake_service.fails = ('finish',)
    second = Tracker(('tensorboard',), files, {}, resume=True)
    second.log(ROWS)
    assert second.services['tensorboard'].received == [2, 3]
    second.finish(tmp_path / 'curves.png')  # fails, and nothing is raised
    assert second.services == {}


def test_of_several_processes_the_first_reports(fake_service, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, 'world_rank', lambda: 1)
    tracker = Tracker(('tensorboard',), RunFiles(tmp_path, 'a_run'), {}, resume=False)
    tracker.log(ROWS)
    tracker.finish(tmp_path / 'curves.png')
    assert tracker.services == {}
    assert list(tmp_path.iterdir()) == []


def test_a_service_that_does_not_start_is_one_line(fake_service, tmp_path):
    fake_service.fails = ('start',)
    with pytest.raises(UserError, match=r'--log_to tensorboard: it does not start \(no network\)'):
        Tracker(('tensorboard',), RunFiles(tmp_path, 'a_run'), {}, resume=False)


def test_a_service_that_is_not_known_or_not_installed_is_one_line(monkeypatch):
    assert parse_services('') == ()
    assert parse_services('tensorboard,tensorboard') == ('tensorboard',)
    with pytest.raises(UserError, match="--log_to 'wandbb' is not known; did you mean 'wandb'"):
        parse_services('tensorboard,wandbb')
    monkeypatch.setattr(tracking.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match='the package wandb is not installed; pip install wandb'):
        parse_services('wandb')
