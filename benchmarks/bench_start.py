"""Seconds from typing `python train.py` to the help, to a mistyped flag's answer, and to the end of the first step.

    python benchmarks/bench_start.py

The training is that of `make demo`. Each is a process of its own; the first turn, which fills the disk's cache, is not
counted. Ends with one line of JSON.
"""
import fcntl
import os
import pty
import shlex
import struct
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path

from bench_common import finish, median, take_turns

REPOSITORY = Path(__file__).parent.parent


def demo_words() -> list[str]:
    """Return the flags with which `make demo` trains."""
    printed = subprocess.run(['make', '--dry-run', '--always-make', 'demo'], cwd=REPOSITORY, check=True,
                             capture_output=True, text=True).stdout.replace('\\\n', ' ')
    (line,) = [line for line in printed.splitlines() if 'train.py' in line]
    return shlex.split(line.split('train.py', 1)[1])


def get_args():
    from utils import Parser

    parser = Parser(description=__doc__)
    parser.add_argument('--repetitions', type=int, default=3, help='turns [%(default)s]')
    return parser.parse_args()


def first_step(folder: str) -> tuple[float, float]:
    """Start the demo's training and end it after a step; returns the seconds until its bar began and showed it."""
    command = [sys.executable, REPOSITORY / 'train.py', *demo_words(), '--data_path', folder, '--results_dir', folder]
    start, began, seen = time.perf_counter(), None, b''
    terminal, its_end = pty.openpty()  # into a file the bar would write a line every half minute
    fcntl.ioctl(its_end, termios.TIOCSWINSZ, struct.pack('4H', 24, 120, 0, 0))  # rows and columns
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=its_end) as process:
        os.close(its_end)
        while b' 1/80 ' not in seen:
            try:
                seen += os.read(terminal, 2**16)
            except OSError:  # nobody writes any more
                raise SystemExit(f'the training ended: {seen.decode()}') from None
            if began is None and b' 0/80 ' in seen:
                began = time.perf_counter() - start
        stepped = time.perf_counter() - start
        process.terminate()
    os.close(terminal)
    return began, stepped


def main() -> None:
    args = get_args()
    moments = []
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, REPOSITORY / 'data_utils.py', '--data_path', folder, '--data_name', 'glyph'],
                       check=True, capture_output=True)
        seconds = take_turns({
            'help': lambda: subprocess.run([sys.executable, REPOSITORY / 'train.py', '--help'], check=True,
                                           capture_output=True),
            'mistyped flag': lambda: subprocess.run([sys.executable, REPOSITORY / 'train.py', '--los', 'x'],
                                                    check=False, capture_output=True),
            'training': lambda: moments.append(first_step(folder))}, args.repetitions)
    del seconds['training']  # with its end
    seconds['first batch asked for'], seconds['first step done'] = zip(*moments[1:], strict=True)
    result = {name: round(median(values), 2) for name, values in seconds.items()}
    for name, value in result.items():
        print(f'{name:<24}{value:>6.2f} s')
    finish({'benchmark': 'start', 'seconds': result})


if __name__ == '__main__':
    from utils import run_script

    run_script(main)
