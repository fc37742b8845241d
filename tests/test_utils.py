"""What the command lines share: the help, parsers of values, and how a script ends."""
import argparse
import importlib
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ENVIRONMENT, REPOSITORY
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from recipes import RECIPES
from training.options import parse_options
from utils import Parser, Terminated, fraction_list, int_list, parse_keywords, run_script, seed_list, switch

SCRIPTS = ('train', 'evaluate', 'test', 'data_utils', 'embed', 'serve', 'export', 'plot', 'report', 'toy')
WITHOUT_TORCH = ('train', 'data_utils', 'embed', 'serve', 'export', 'plot', 'recipes')  # for --help and mistakes
# What changes nothing by default, so that there is no default to show.
NO_DEFAULT = (None, False, '', ())


# ---------------------------------------------------- help ---------------------------------------------------------
class Built(Exception):  # noqa: N818
    """Stops a script once its parser is complete."""


@pytest.fixture
def parser_of(monkeypatch):
    """Return the parser of a script, as its command line builds it."""
    def stop(parser, *_args, **_kwargs):
        raise Built(parser)

    def build(script: str) -> Parser:
        if script == 'train':
            parse = parse_options
        elif script == 'test':  # the name of a package of Python's own
            from test_test_script import test_script
            parse = test_script.get_args
        else:
            parse = importlib.import_module(script).get_args
        with monkeypatch.context() as patch:
            patch.setattr(Parser, 'parse_args', stop)
            with pytest.raises(Built) as built:
                parse([])
        return built.value.args[0]

    return build


@pytest.mark.parametrize('script', SCRIPTS)
def test_the_help_names_every_flag_with_a_text_and_its_default(parser_of, script):
    parser = parser_of(script)
    printed = ' '.join(parser.format_help().split())
    assert 'python ' in printed or script == 'train'  # the description shows how the script is called
    for action in parser._actions:
        flags = ', '.join(action.option_strings) or action.dest
        assert all(flag in printed for flag in action.option_strings), flags
        assert action.help, f'{flags} has no help'
        text = action.help % {**vars(action), 'prog': parser.prog}
        assert ' '.join(text.split()) in printed, flags
        default = action.default
        if default in NO_DEFAULT or default is argparse.SUPPRESS:
            continue
        parts = default if isinstance(default, (list, tuple)) else [default]
        shown = ','.join('1' if part is True else str(part) for part in parts)
        assert shown in text, f'{flags} does not show its default {shown}: {text}'


@pytest.mark.parametrize('script', WITHOUT_TORCH)
def test_the_help_does_not_wait_for_torch(script):
    words = [] if script == 'recipes' else ['--help']
    result = subprocess.run([sys.executable, '-X', 'importtime', f'{script}.py', *words], cwd=REPOSITORY, check=True,
                            capture_output=True, text=True)
    lines = [line for line in result.stderr.splitlines() if line.startswith('import time')]
    imported = {line.rsplit('|', 1)[1].strip() for line in lines}
    assert 'argparse' in imported or script == 'recipes'
    assert not imported & {'torch', 'pandas', 'matplotlib', 'torchvision'}
    assert result.stdout


# ---------------------------------------------------- how a script ends --------------------------------------------
def test_a_mistake_ends_a_script_with_exit_code_2_and_one_line():
    result = subprocess.run([sys.executable, 'train.py', '--recipe', 'balanced'], cwd=REPOSITORY, env=ENVIRONMENT,
                            capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stdout == ''
    assert result.stderr.splitlines() == [
        "train.py: error: --recipe 'balanced' is not known; did you mean 'balanced_proxy'? (there are: "
        f'{", ".join(RECIPES)})']


@pytest.mark.parametrize(('error', 'code', 'line'), [
    (UserError('--lr x\nis wrong'), 2, 'error: --lr x is wrong'),
    (UserError('Caught in a worker: common.errors.UserError: a.jpg is broken'), 2, 'error: a.jpg is broken'),
    (FileNotFoundError(2, 'No such file or directory', 'x.csv'), 2, 'error: cannot use x.csv: No such file'),
    (RuntimeError('DataLoader worker (pid 7) is killed by signal: Killed'), 2, 'a process that reads images has died'),
    (torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has'), 2,
     'error: out of memory (CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has); lower --batch_size'),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
                  'tried to allocate 400000000000 bytes. Error code 12 (Cannot allocate memory)'), 2,
     'lower --batch_size'),
    (RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`'), 2, 'out of memory'),
    (MemoryError(), 2, 'error: out of memory (MemoryError); lower --batch_size'),
    (MemoryError('Caught MemoryError in DataLoader worker process 0.\nOriginal Traceback:\n  x\nMemoryError\n'), 2,
     'out of memory (MemoryError); lower --batch_size'),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers "
                  'are out of shared memory. Please try to raise your shared memory limit.'), 2,
     'shared memory, /dev/shm, does not suffice'),
    (RuntimeError('Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback:\nRuntimeError: unable to '
                  'write to file </torch_9_1_0>: No space left on device (28)'), 2,
     'shared memory, /dev/shm, does not suffice for the batches of the processes that read images (RuntimeError: '
     'unable to write to file </torch_9_1_0>: No space left on device (28)); enlarge it'),
    (OSError(28, 'No space left on device'), 2, 'a disk, or /dev/shm, has no space left'),
    (KeyboardInterrupt(), 130, 'stopped by Ctrl-C'), (KeyboardInterrupt('epoch 3 is saved'), 130, ': epoch 3 is'),
    (Terminated(), 143, 'stopped by SIGTERM')])
def test_what_ends_a_script_is_one_line_with_its_exit_code(monkeypatch, capsys, error, code, line):
    monkeypatch.setattr(sys, 'argv', ['train.py'])

    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        run_script(main)
    assert ended.value.code == code
    printed = capsys.readouterr().err
    assert printed.startswith('train.py: ')
    assert line in printed
    assert printed.count('\n') == 1


def test_a_script_without_batches_suggests_none(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['report.py'])

    def main():
        torch.empty(2**50)

    with pytest.raises(SystemExit):
        run_script(main)
    assert 'report.py: error: out of memory' in (printed := capsys.readouterr().err)
    assert 'batch_size' not in printed


@pytest.mark.parametrize('error', [ZeroDivisionError('a bug'), RuntimeError('a bug'), OSError('without a file')])
def test_a_bug_keeps_its_traceback(error):
    def main():
        raise error

    with pytest.raises(type(error)):
        run_script(main)


@pytest.mark.slow
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


# ---------------------------------------------------- parsers of values --------------------------------------------
@given(st.lists(st.integers(-5, 10**6), max_size=6))
def test_recalls_and_seeds_are_read_as_they_are_written_or_refused(numbers):
    text = ','.join(map(str, numbers))
    is_ascending = numbers == sorted(set(numbers))
    for parse, is_valid in ((int_list, is_ascending and min(numbers, default=0) > 0),
                            (seed_list, len(set(numbers)) == len(numbers) > 1 and min(numbers) >= 0)):
        if is_valid:
            assert parse(text) == tuple(numbers)
        else:
            with pytest.raises(argparse.ArgumentTypeError, match=f'{text!r} must be '):
                parse(text)


def test_milestones_are_ascending_fractions():
    assert fraction_list('0.5,0.8') == (0.5, 0.8)
    for text in ('0.8,0.5', '0.5,1', '0', 'a', '', '0.5,nan'):
        with pytest.raises(argparse.ArgumentTypeError, match='ascending fractions'):
            fraction_list(text)


@pytest.mark.parametrize('script', ['train', 'evaluate', 'report'])
def test_the_home_folder_is_expanded_where_the_shell_does_not(script, monkeypatch):
    monkeypatch.setenv('HOME', '/home/me')
    if script == 'train':
        [args] = parse_options(['--results_dir=~/r', '--data_path=~/d', '--weights=~/w.pth'])
        assert args.weights == '/home/me/w.pth'
    else:
        words = ['--results_dir=~/r', '--data_path=~/d', *(['--model=~/m.pth'] if script == 'evaluate' else [])]
        args = importlib.import_module(script).get_args(words)
    assert (args.results_dir, args.data_path) == ('/home/me/r', '/home/me/d')


def test_a_switch_is_0_or_1():
    assert (switch('0'), switch('1')) == (False, True)
    with pytest.raises(argparse.ArgumentTypeError, match="must be 0 or 1, not 'yes'"):
        switch('yes')


def test_keyword_arguments_are_python_literals_or_words():
    assert parse_keywords('margin=0.2,type=hard,sizes=[1,2]') == {'margin': 0.2, 'type': 'hard', 'sizes': [1, 2]}
    assert parse_keywords('') == {}
    for text in ('0.2', 'a=open("x")', '**{}', 'a=', 'a=1)(', 'a=1)(b=2', '(' * 1000):
        with pytest.raises(ValueError, match='names and values'):
            parse_keywords(text)
