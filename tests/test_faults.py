"""A run that is killed, stopped, or cannot write: nothing is lost, nothing is torn, and one line says what to do.

The default tests interrupt a run in this process; the slow ones kill processes at every point and at random.
"""
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call_main
from faults import RULES, TINY, children_of, differing_results, start_torchrun, start_train, torchrun_killed, train
from tiny_runs import draw_nothing

import train as train_script
from common.files import load, save

NAME = 'car_timm-test_resnet_{}_16'
NAMES = {'gradient': NAME.format('balanced_proxy'), 'positive': NAME.format('balanced_proxy') + '_positive',
         'momentum': NAME.format('asymptotic_proxy')}
# Three epochs write statistics and checkpoint each, the first (and perhaps a later one) model and data base before;
# 12 images in batches of 4 are 3 steps an epoch.
FAULTS = [('write', 1), ('write', 2), ('write', 3), ('write', 4), ('write', 5), ('file', 'curves.pdf'),
          ('step', 2), ('step', 5), ('embed', 2)]


def command(raw_sets, folder, words):
    return (*words, *TINY, '--num_workers', 0, '--data_path', raw_sets, '--results_dir', folder)


# ---------------------------------------------------- interrupted in this process --------------------------------
class Killed(BaseException):
    """Ends a run as SIGKILL does: nothing catches it."""


@pytest.fixture
def interrupt(monkeypatch):
    """Train a command and raise an exception in its n-th step; returns the exception."""
    def call(words, step: int, error: BaseException) -> BaseException:
        zero_grad, steps = torch.optim.Optimizer.zero_grad, 0

        def count(*args, **kwargs):
            nonlocal steps
            steps += 1
            if steps == step:
                raise error
            zero_grad(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(train_script, 'draw_curves', draw_nothing)
            patch.setattr(torch.optim.Optimizer, 'zero_grad', count)
            with pytest.raises(type(error)) as raised:
                call_main(train_script, *words)
        return raised.value

    return call


def test_a_run_that_ends_in_an_epoch_goes_on_bit_for_bit(raw_sets, tmp_path, interrupt, call_script, monkeypatch):
    """Weights, proxies, optimizer, schedule, random state, statistics and data base."""
    monkeypatch.setattr(train_script, 'draw_curves', draw_nothing)
    words = ('--lr_decay_step', 1, '--color_jitter', 0.3, *command(raw_sets, tmp_path / 'whole', ()))
    call_script(train_script, *words)
    words = (*words[:-1], tmp_path / 'killed')
    interrupt(words, 5, Killed())
    torch.manual_seed(99)  # whatever else drew numbers in between
    printed = call_script(train_script, *words, '--resume')
    assert 'epoch 1/3' not in printed  # it continues, and does not begin again
    assert 'epoch 2/3' in printed
    assert not differing_results(tmp_path / 'whole', tmp_path / 'killed')


def test_ctrl_c_says_which_epoch_is_saved_and_how_to_continue(raw_sets, tmp_path, interrupt):
    words, name = command(raw_sets, tmp_path / 'r', ()), NAMES['gradient']
    stopped = interrupt(words, 2, KeyboardInterrupt())
    assert str(stopped) == 'no epoch was complete, nothing is saved'
    assert not list((tmp_path / 'r').iterdir())
    stopped = interrupt(words, 5, KeyboardInterrupt())
    assert str(stopped) == f'epoch 1 of {name} is saved; the same command with --resume continues it'
    before = {file.name: file.read_bytes() for file in (tmp_path / 'r').iterdir()}
    stopped = interrupt((*words, '--overwrite', '--lr', 0.5), 2, KeyboardInterrupt())
    assert str(stopped) == f'no epoch was complete, and the earlier run {name} is untouched'
    assert {file.name: file.read_bytes() for file in (tmp_path / 'r').iterdir()} == before
    stopped = interrupt((*words, '--overwrite', '--lr', 0.5), 5, KeyboardInterrupt())
    assert str(stopped).endswith('with --resume in place of --overwrite continues it')
    assert load(tmp_path / 'r' / f'{name}_model.pth', 'model')['args']['lr'] == 0.5


# ---------------------------------------------------- killed processes -------------------------------------------
@pytest.fixture(scope='module')
def whole(raw_sets, tmp_path_factory):
    """An uninterrupted run for each proxy update."""
    folders = {}
    for update, words in RULES.items():
        folders[update] = tmp_path_factory.mktemp(update)
        code, printed = train(command(raw_sets, folders[update], words), folders[update].with_suffix('.log'))
        assert code == 0, printed
    return folders


@pytest.mark.slow
@pytest.mark.parametrize('fault', FAULTS)
@pytest.mark.parametrize('update', RULES)
def test_a_run_killed_anywhere_goes_on_bit_for_bit(whole, raw_sets, tmp_path, update, fault):
    words = command(raw_sets, tmp_path / 'killed', RULES[update])
    code, _ = train(words, tmp_path / 'log', fault)
    assert code == -signal.SIGKILL
    saved = (tmp_path / 'killed' / f'{NAMES[update]}_checkpoint.pth').is_file()
    code, printed = train((*words, '--resume' if saved else '--overwrite'), tmp_path / 'log2')
    assert code == 0, printed
    assert ('epoch 1/3' in printed) is not saved  # it continues, and does not begin again
    assert not differing_results(whole[update], tmp_path / 'killed')


@pytest.mark.slow
def test_a_run_killed_while_it_overwrites_another_mixes_nothing(whole, raw_sets, tmp_path):
    shutil.copytree(whole['gradient'], tmp_path / 'r')
    words = command(raw_sets, tmp_path / 'r', RULES['gradient'])
    # Before the first epoch is saved the old run is whole; once it is being saved, it is gone.
    assert train((*words, '--lr', '0.01', '--overwrite'), tmp_path / 'log', ('step', 2))[0] == -signal.SIGKILL
    for lock in (tmp_path / 'r').glob('.*.lock'):
        lock.unlink()
    assert not differing_results(whole['gradient'], tmp_path / 'r')
    assert train((*words, '--lr', '0.01', '--overwrite'), tmp_path / 'log', ('write', 2))[0] == -signal.SIGKILL
    assert {load(file, 'file')['args']['lr'] for file in (tmp_path / 'r').glob('*.pth')} == {0.01}
    assert not list((tmp_path / 'r').glob('*_statistics.csv'))
    code, printed = train((*words, '--resume'), tmp_path / 'log2')
    assert code == 2
    assert '--resume: there is no' in printed
    assert 'without --resume and with --overwrite' in printed


@pytest.mark.slow
def test_seeds_that_are_overwritten_keep_none_of_the_old_runs(raw_sets, tmp_path):
    words = (*command(raw_sets, tmp_path / 'r', RULES['gradient']), '--seeds', '1,2', '--num_epochs', 2, '--warm_up',
             0)
    assert train(words, tmp_path / 'log')[0] == 0
    second = tmp_path / 'r' / f'{NAMES["gradient"]}_seed2_checkpoint.pth'
    before = load(second, 'checkpoint')
    save({**before, 'made_with': {'commit': 'old'}}, second)
    code, _ = train((*words, '--overwrite'), tmp_path / 'log2', ('send', signal.SIGTERM, 8))  # in the second run
    assert code == 143
    assert not second.exists()
    code, printed = train((*words, '--resume'), tmp_path / 'log3')
    assert code == 0, printed
    assert load(second, 'checkpoint')['made_with']['commit'] != 'old'


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(2))
def test_a_run_with_workers_killed_at_a_random_moment_goes_on_bit_for_bit(whole, raw_sets, tmp_path, seed):
    words = (*RULES['gradient'], *TINY, '--num_workers', 2, '--data_path', raw_sets, '--results_dir', tmp_path / 'k')
    seconds = np.random.default_rng(seed).uniform(0.5, 4)
    train(words, tmp_path / 'log', seconds=seconds)
    saved = (tmp_path / 'k' / f'{NAMES["gradient"]}_checkpoint.pth').is_file()
    code, printed = train((*words, '--resume' if saved else '--overwrite'), tmp_path / 'log2')
    assert code == 0, printed
    assert ('epoch 1/3' in printed) is not saved  # it continues, and does not begin again
    assert not differing_results(whole['gradient'], tmp_path / 'k')


@pytest.mark.slow
def test_the_workers_of_a_killed_run_end_with_it(raw_sets, tmp_path):
    run = start_train((*TINY, '--num_epochs', 1000, '--num_workers', 2, '--data_path', raw_sets, '--results_dir',
                       tmp_path / 'r'), tmp_path / 'log')
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob('r/*_checkpoint.pth')) and time.monotonic() < deadline:
        time.sleep(0.1)
    below = children_of(run.pid)
    assert len(below) >= 4  # to train and to test
    run.kill()
    run.join()
    while any(Path(f'/proc/{number}').exists() for number in below) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [number for number in below if Path(f'/proc/{number}').exists()]


@pytest.mark.slow
def test_two_killed_processes_go_on_bit_for_bit(raw_sets, tmp_path):
    words = (*RULES['gradient'], *TINY, '--num_workers', 0, '--data_path', raw_sets, '--results_dir')
    printed = torchrun_killed((*words, tmp_path / 'killed'))
    assert 'epoch 1/3' in printed
    assert 'next:' not in printed
    for more in ((tmp_path / 'whole',), (tmp_path / 'killed', '--resume')):
        with start_torchrun((*words, *more)) as process:
            printed = process.communicate(timeout=200)[0]
        assert process.returncode == 0, printed
    assert 'epoch 1/3: loss' not in printed  # it continues, and does not begin again
    assert not differing_results(tmp_path / 'whole', tmp_path / 'killed')


# ---------------------------------------------------- signals -----------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(('number', 'code', 'name'), [
    (signal.SIGTERM, 143, 'SIGTERM'), (signal.SIGINT, 130, 'Ctrl-C')])
def test_a_signal_ends_a_run_with_a_line_that_says_how_to_go_on(whole, raw_sets, tmp_path, number, code, name):
    words = command(raw_sets, tmp_path / 'r', RULES['momentum'])
    ended, printed = train(words, tmp_path / 'log', ('send', number, 5))  # in the second epoch
    assert ended == code
    last = printed.strip().splitlines()[-1]
    assert last.endswith(f'train.py: stopped by {name}: epoch 1 of {NAMES["momentum"]} is saved; the same command '
                         'with --resume continues it')
    assert 'Traceback' not in printed
    assert train((*words, '--resume'), tmp_path / 'log2')[0] == 0
    assert not differing_results(whole['momentum'], tmp_path / 'r')


@pytest.mark.slow
def test_a_signal_in_the_first_epoch_leaves_nothing(raw_sets, tmp_path):
    ended, printed = train(command(raw_sets, tmp_path / 'r', ()), tmp_path / 'log', ('send', signal.SIGTERM, 2))
    assert ended == 143
    assert printed.strip().endswith('no epoch was complete, nothing is saved')
    assert not list((tmp_path / 'r').iterdir())


# ---------------------------------------------------- disks, other processes --------------------------------------
@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoint_and_names_the_file(whole, raw_sets, tmp_path):
    words = command(raw_sets, tmp_path / 'r', RULES['gradient'])
    assert train(words, tmp_path / 'log', ('step', 5))[0] == -signal.SIGKILL  # the first epoch is saved
    checkpoint = tmp_path / 'r' / f'{NAMES["gradient"]}_checkpoint.pth'
    before = {file.name: file.read_bytes() for file in (tmp_path / 'r').glob('car*')}
    code, printed = train((*words, '--resume'), tmp_path / 'log2', ('full', checkpoint.stat().st_size // 4))
    assert code == 2
    lines = [line for line in printed.splitlines() if 'error:' in line]
    assert len(lines) == 1
    assert f'cannot write {tmp_path / "r" / NAMES["gradient"]}' in lines[0]
    assert 'File too large; it is not saved' in lines[0]
    assert 'Traceback' not in printed
    assert load(checkpoint, 'checkpoint')['epoch'] == 1
    assert checkpoint.read_bytes() == before[checkpoint.name]
    assert not list((tmp_path / 'r').glob('.*'))
    assert train((*words, '--resume'), tmp_path / 'log3')[0] == 0
    assert not differing_results(whole['gradient'], tmp_path / 'r')


@pytest.mark.slow
def test_a_second_run_of_the_same_name_stops(raw_sets, tmp_path):
    words = command(raw_sets, tmp_path / 'r', ())
    first = start_train((*words, '--num_epochs', 300), tmp_path / 'log')
    try:
        deadline = time.monotonic() + 60
        while not list((tmp_path / 'r').glob('.*.lock')) and time.monotonic() < deadline:
            time.sleep(0.1)
        code, printed = train((*words, '--overwrite'), tmp_path / 'log2')
        assert code == 2
        assert f'another process is training the run {NAMES["gradient"]}' in printed
    finally:
        first.kill()
        first.join()
    assert train((*words, '--overwrite'), tmp_path / 'log3')[0] == 0  # the lock of a dead process holds nobody up


@pytest.mark.slow
def test_a_worker_that_dies_ends_a_run_in_one_line(raw_sets, tmp_path):
    run = start_train((*TINY, '--num_epochs', 1000, '--num_workers', 2, '--data_path', raw_sets, '--results_dir',
                       tmp_path / 'r'), tmp_path / 'log')
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob('r/*_checkpoint.pth')) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(children_of(run.pid)[-1], signal.SIGKILL)
    run.join(60)
    printed = (tmp_path / 'log').read_text()
    assert run.exitcode == 2, printed
    assert printed.count('train.py: error: a process that reads images has died') == 1
    assert '--num_workers' in printed
    assert 'Traceback' not in printed
