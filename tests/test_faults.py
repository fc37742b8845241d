"""A run that is killed, stopped, or cannot write: nothing is lost, nothing is torn, one line says what to do."""
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY, assert_one_line_error, type_command
from faults import RULES, TINY, children_of, differing_results, start_torchrun, start_train, torchrun_killed, train
from PIL import Image

from common.errors import UserError
from common.files import load, save
from common.results import RunFiles

NAME = 'car_timm-test_resnet_{}_16'
NAMES = {'gradient': NAME.format('balanced_proxy'), 'positive': NAME.format('balanced_proxy') + '_positive',
         'momentum': NAME.format('asymptotic_proxy')}
# Three epochs write statistics and checkpoint each, the first (and perhaps a later one) model and data base before;
# 12 images in batches of 4 are 3 steps an epoch.
FAULTS = [('write', 1), ('write', 2), ('write', 3), ('write', 4), ('write', 5), ('file', 'curves.pdf'),
          ('step', 2), ('step', 5), ('embed', 2)]


@pytest.fixture(scope='module')
def whole(raw_sets, tmp_path_factory):
    """An uninterrupted run for each way in which the proxies move."""
    folders = {}
    for rule, words in RULES.items():
        folders[rule] = tmp_path_factory.mktemp(rule)
        code, printed = train(command(raw_sets, folders[rule], words), folders[rule].with_suffix('.log'))
        assert code == 0, printed
    return folders


def command(raw_sets, folder, words):
    return (*words, *TINY, '--num_workers', 0, '--data_path', raw_sets, '--results_dir', folder)


@pytest.mark.parametrize('fault', FAULTS)
@pytest.mark.parametrize('rule', RULES)
def test_a_run_killed_anywhere_goes_on_bit_for_bit(whole, raw_sets, tmp_path, rule, fault):
    words = command(raw_sets, tmp_path / 'killed', RULES[rule])
    code, _ = train(words, tmp_path / 'log', fault)
    assert code == -signal.SIGKILL
    saved = (tmp_path / 'killed' / f'{NAMES[rule]}_checkpoint.pth').is_file()
    code, printed = train((*words, '--resume' if saved else '--overwrite'), tmp_path / 'log2')
    assert code == 0, printed
    assert ('epoch 1/3' in printed) is not saved  # it goes on, and does not begin again
    assert not differing_results(whole[rule], tmp_path / 'killed')


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


def test_seeds_that_are_overwritten_keep_none_of_the_old_runs(raw_sets, tmp_path):
    words = (*command(raw_sets, tmp_path / 'r', RULES['gradient']), '--seeds', '1,2', '--num_epochs', 2, '--warm_up', 0)
    assert train(words, tmp_path / 'log')[0] == 0
    second = tmp_path / 'r' / f'{NAMES["gradient"]}_seed2_checkpoint.pth'
    before = load(second, 'checkpoint')
    save({**before, 'made_with': {'commit': 'old'}}, second)
    assert train((*words, '--overwrite'), tmp_path / 'log2', ('send', signal.SIGTERM, 8))[0] == 143  # in the second run
    assert not second.exists()
    code, printed = train((*words, '--resume'), tmp_path / 'log3')
    assert code == 0, printed
    assert load(second, 'checkpoint')['made_with']['commit'] != 'old'


@pytest.mark.parametrize('seed', range(2))
def test_a_run_with_workers_killed_at_a_random_moment_goes_on_bit_for_bit(whole, raw_sets, tmp_path, seed):
    words = (*RULES['gradient'], *TINY, '--num_workers', 2, '--data_path', raw_sets, '--results_dir', tmp_path / 'k')
    seconds = np.random.default_rng(seed).uniform(0.5, 4)
    train(words, tmp_path / 'log', seconds=seconds)
    saved = (tmp_path / 'k' / f'{NAMES["gradient"]}_checkpoint.pth').is_file()
    code, printed = train((*words, '--resume' if saved else '--overwrite'), tmp_path / 'log2')
    assert code == 0, printed
    assert ('epoch 1/3' in printed) is not saved  # it goes on, and does not begin again
    assert not differing_results(whole['gradient'], tmp_path / 'k')


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


def test_two_killed_processes_go_on_bit_for_bit(raw_sets, tmp_path):
    words = (*RULES['gradient'], *TINY, '--num_workers', 0, '--data_path', raw_sets, '--results_dir')
    printed = torchrun_killed((*words, tmp_path / 'killed'))
    assert 'epoch 1/3' in printed
    assert 'next:' not in printed
    for more in ((tmp_path / 'whole',), (tmp_path / 'killed', '--resume')):
        with start_torchrun((*words, *more)) as process:
            printed = process.communicate(timeout=200)[0]
        assert process.returncode == 0, printed
    assert 'epoch 1/3: loss' not in printed  # it goes on, and does not begin again
    assert not differing_results(tmp_path / 'whole', tmp_path / 'killed')


# ---------------------------------------------------- signals -------------------------------------------------------
@pytest.mark.parametrize(('number', 'code', 'name'), [(signal.SIGTERM, 143, 'SIGTERM'), (signal.SIGINT, 130, 'Ctrl-C')])
def test_a_signal_ends_a_run_with_a_line_that_says_how_to_go_on(whole, raw_sets, tmp_path, number, code, name):
    words = command(raw_sets, tmp_path / 'r', RULES['momentum'])
    ended, printed = train(words, tmp_path / 'log', ('send', number, 5))  # in the second epoch
    assert ended == code
    last = printed.strip().splitlines()[-1]
    assert last.endswith(f'train.py: stopped by {name}: epoch 1 of {NAMES["momentum"]} is saved; the same command with '
                         '--resume goes on')
    assert 'Traceback' not in printed
    assert train((*words, '--resume'), tmp_path / 'log2')[0] == 0
    assert not differing_results(whole['momentum'], tmp_path / 'r')


def test_a_signal_in_the_first_epoch_leaves_nothing(raw_sets, tmp_path):
    ended, printed = train(command(raw_sets, tmp_path / 'r', ()), tmp_path / 'log', ('send', signal.SIGTERM, 2))
    assert ended == 143
    assert printed.strip().endswith('no epoch was complete, nothing is saved')
    assert not list((tmp_path / 'r').iterdir())


def test_a_second_signal_ends_a_script_at_once(tmp_path):
    script = ('import sys, time; sys.path.insert(0, sys.argv[1]); from utils import run_script\n'
              'def main():\n    try:\n        print("ready", flush=True); time.sleep(60)\n'
              '    finally:\n        print("tidying", flush=True); time.sleep(60)\n'
              'run_script(main)')
    with subprocess.Popen([sys.executable, '-c', script, REPOSITORY], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == 'ready\n'
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == 'tidying\n'
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == -signal.SIGINT


# ---------------------------------------------------- disks ---------------------------------------------------------
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


def test_a_folder_that_vanishes_is_named(tmp_path):
    with pytest.raises(UserError, match='cannot write .*gone/a.pth: No such file'):
        save({'a': 1}, tmp_path / 'gone' / 'a.pth')


def test_a_file_that_vanishes_while_it_is_written_is_named(tmp_path, monkeypatch):
    save({'a': 1}, tmp_path / 'a.pth')
    fsync = os.fsync

    def lose(number: int) -> None:
        fsync(number)
        for file in tmp_path.glob('.a.pth.*'):
            file.unlink()

    monkeypatch.setattr(os, 'fsync', lose)
    with pytest.raises(UserError, match='cannot write .*a.pth: No such file'):
        save({'a': 2}, tmp_path / 'a.pth')
    assert load(tmp_path / 'a.pth', 'file') == {'a': 1}


# ---------------------------------------------------- two runs, workers, losses -------------------------------------
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


def test_a_lock_ends_with_its_context(tmp_path):
    refused = pytest.raises(UserError, match='taken')
    files = RunFiles(tmp_path, 'run')
    with files.locked('taken'), refused, files.locked('taken'):
        pass
    assert not list(tmp_path.iterdir())


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


def test_a_loss_that_is_not_finite_names_step_rate_and_images(raw_sets, tmp_path):
    result = type_command('train.py', *TINY, '--num_workers', 0, '--data_path', raw_sets, '--results_dir', tmp_path,
                          '--warm_up', 0, '--lr', '1e30', '--optimizer_type', 'sgd')
    assert_one_line_error(result, 'the loss is not finite in step 2 of this epoch', '1e+30', '4 images', '.jpg',
                          '--clip_value')


@pytest.mark.parametrize('choice', ['stop', 'warn', None])
def test_a_collapse_stops_or_warns(tmp_path, choice):
    # Every image is the same: nothing can be learned, in however many epochs.
    for subset in ('train', 'test'):
        for label in range(40 if subset == 'train' else 2):
            folder = tmp_path / 'grey' / subset / f'{subset}_{label}'
            folder.mkdir(parents=True)
            for number in range(2):
                Image.new('RGB', (32, 32), (90, 90, 90 + number)).save(folder / f'{number}.png')
    assert type_command('data_utils.py', '--data_path', tmp_path, '--data_name', 'grey').returncode == 0
    given = ('--on_collapse', choice) if choice else ()
    words = [word for word in TINY if word not in ('--on_collapse', 'warn')]
    result = type_command('train.py', '--recipe', 'asymptotic_proxy', *words, '--num_workers', 0, '--data_path',
                          tmp_path, '--data_name', 'grey', '--batch_size', 16, '--results_dir', tmp_path / 'r', *given)
    if choice == 'warn':
        assert result.returncode == 0, result.stderr
        assert 'collapsed? an accuracy of' in result.stdout
    else:
        assert_one_line_error(result, 'in epoch 3 is chance for 40 classes', '--momentum nearer 0.5',
                              '--on_collapse warn')
    assert len(pd.read_csv(tmp_path / 'r' / 'grey_timm-test_resnet_asymptotic_proxy_16_statistics.csv')) == 3
