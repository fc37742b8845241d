"""What the scripts' command lines share: how a script ends, parsers of values, common flags and checks."""
import argparse
import ast
import errno
import os
import re
import signal
import sys
from pathlib import Path

from common.distributed import stop_processes, world_size
from common.errors import UserError, reason_of, suggestion


# ---------------------------------------------------- how a script ends --------------------------------------------
class Terminated(KeyboardInterrupt):
    """SIGTERM, which a scheduler sends before it kills a job."""


WITH_BATCH_SIZE = ('train.py', 'evaluate.py', 'embed.py', 'toy.py')
OUT_OF_MEMORY = re.compile('out of memory|MemoryError|DefaultCPUAllocator|not enough memory|ALLOC_FAILED|bad_alloc')
SHARED_MEMORY = re.compile(r'shared memory|</?torch_\d')


def catch_signals() -> None:
    """Turn SIGINT and SIGTERM into an exception; a second signal ends the process at once."""
    def interrupt(number: int, _frame) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)


def run_script(main):
    """Call `main` and return its result; errors end the process as a user expects.

    Exit code 2 and one line for what the user can fix, 130 for Ctrl-C, 143 for SIGTERM.
    """
    script = Path(sys.argv[0]).name
    catch_signals()
    try:
        return main()
    except UserError as error:
        message = str(error).rsplit('errors.UserError: ', 1)[-1]  # a DataLoader's worker sends its traceback along
        sys.exit(fail(f'{script}: error: {" ".join(message.split())}', 2))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader of the pipe is gone
        sys.exit(1)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = error.filename or 'a disk, or /dev/shm,'
            sys.exit(fail(f'{script}: error: {where} has no space left; free some, or write elsewhere', 2))
        if error.filename is None:
            raise
        sys.exit(fail(f'{script}: error: cannot use {error.filename}: {error.strerror}; fix it or name another', 2))
    except (RuntimeError, MemoryError) as error:
        if shortage := describe_shortage(error, script):
            sys.exit(fail(f'{script}: error: {shortage}', 2))
        if 'DataLoader worker' in str(error):
            sys.exit(fail(f'{script}: error: a process that reads images has died ({reason_of(error)}); if memory ran '
                          'out, lower --num_workers', 2))
        if int(os.environ.get('WORLD_SIZE', 1)) == 1 or not re.search('gloo|NCCL|[Cc]onnection', str(error)):
            raise
        sys.exit(fail(f'{script}: stopped, because another process stopped', 1))
    except KeyboardInterrupt as stop:
        name, code = 'Ctrl-C', 130
        if isinstance(stop, Terminated):
            name, code = 'SIGTERM', 143
        if int(os.environ.get('RANK', 0)) > 0:  # all processes get the signal; rank 0 reports it
            sys.exit(code)
        sys.exit(fail(f'{script}: stopped by {name}' + (f': {stop}' if str(stop) else ''), code))
    finally:
        stop_processes()
        for number in (signal.SIGINT, signal.SIGTERM):  # nothing is left to clean up
            signal.signal(number, signal.SIG_DFL)


def describe_shortage(error: Exception, script: str) -> str | None:
    """Say which memory ran out, and what helps; None if the error is another one."""
    lines = str(error).splitlines() or [type(error).__name__]  # a DataLoader's worker sends its traceback along
    for line in reversed(lines):
        if SHARED_MEMORY.search(line):
            return (f'shared memory, /dev/shm, does not suffice for the batches of the processes that read images '
                    f'({line[:120]}); enlarge it (docker run --shm-size 8g), lower --batch_size, or set --num_workers '
                    '0')
    for line in reversed(lines):
        if OUT_OF_MEMORY.search(line):
            remedy = 'lower --batch_size' if script in WITH_BATCH_SIZE else 'end other programs, or use --device cpu'
            return f'out of memory ({line[:120]}); {remedy}'
    return None


def fail(line: str, code: int) -> int:
    """Print a script's last line and return its exit code."""
    rank = int(os.environ.get('RANK', 0))
    # Before the processes have joined, all of them fail alike: one report is enough.
    if rank == 0 or world_size() > 1:
        print(f'rank {rank}: {line}' if world_size() > 1 else line, file=sys.stderr, flush=True)
    return code


# ---------------------------------------------------- command lines ------------------------------------------------
LARGEST_INT = 2**63 - 1  # what torch takes as a seed


class Parser(argparse.ArgumentParser):
    """An argument parser without abbreviations, whose errors are one line with a suggestion."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str):
        unknown = re.match(r'unrecognized arguments: (--[^\s=]+)', message)
        if unknown:
            options = [option for action in self._actions for option in action.option_strings]
            message = f'{unknown[1]} is not a flag of {self.prog}{suggestion(unknown[1], options)}; see --help'
        raise UserError(message)


def number_list(number: type, is_valid, what: str):
    """Return a parser of comma-separated numbers, whose error says `what` they must be."""
    def parse(text: str) -> tuple:
        try:
            values = tuple(number(part) for part in text.split(','))
        except ValueError:
            values = ()
        if not values or not is_valid(values):
            raise argparse.ArgumentTypeError(f'{text!r} must be {what}')
        return values

    return parse


int_list = number_list(int, lambda values: values[0] > 0 and list(values) == sorted(set(values)),
                       'positive, ascending, comma-separated whole numbers, as in 1,2,4,8')
fraction_list = number_list(
    float, lambda values: all(0 < value < 1 for value in values) and list(values) == sorted(set(values)),
    'ascending fractions of the epochs, as in 0.5,0.8')
seed_list = number_list(
    int, lambda values: len(set(values)) == len(values) > 1 and min(values) >= 0 and max(values) < 2**63,
    'two or more different seeds, as in 1,2,3')


def user_path(text: str) -> str:
    """Parse a path; expands `~` where the shell does not, as in `--output=~/x.png`."""
    return os.path.expanduser(text)


def parse_keywords(text: str) -> dict:
    """Parse keyword arguments, as `margin=0.2,type=hard,sizes=[1,2]`: Python literals, and bare words as text.

    Raises:
        ValueError: if it is anything else.
    """
    try:
        call = ast.parse(f'f({text})', mode='eval').body
        is_one_call = isinstance(call.func, ast.Name)  # and not f(a=1)(b=2), of the text `a=1)(b=2`
        if not is_one_call or call.args or not all(keyword.arg for keyword in call.keywords):
            raise ValueError
        values = {}
        for keyword in call.keywords:
            is_word = isinstance(keyword.value, ast.Name)
            values[keyword.arg] = keyword.value.id if is_word else ast.literal_eval(keyword.value)
        return values
    except (SyntaxError, ValueError, AttributeError, MemoryError, RecursionError):
        raise ValueError(f'{text!r} must be A=1,B=2, names and values') from None


def keyword_text(text: str) -> str:
    """Check a flag that holds keyword arguments, and return its text."""
    try:
        parse_keywords(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(error) from None
    return text


def switch(text: str) -> bool:
    """Parse a flag's 0 or 1."""
    if text not in ('0', '1'):
        raise argparse.ArgumentTypeError(f'must be 0 or 1, not {text!r}')
    return text == '1'


def gpu_id(text: str) -> str:
    """Translate Proxy Anchor's `--gpu-id N` to a device: GPU N, or the CPU for -1 and on machines without a GPU."""
    import torch

    try:
        index = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r} must be a number, -1 for the CPU') from None
    return f'cuda:{index}' if index >= 0 and torch.cuda.is_available() else 'cpu'


def add_device_flags(parser) -> None:
    """Add --device, and Proxy Anchor's --gpu-id."""
    parser.add_argument('--device', default='auto', help='auto, cpu, mps, cuda, cuda:N [%(default)s]')
    parser.add_argument('--gpu_id', '--gpu-id', type=gpu_id, dest='device', metavar='N', help='Proxy Anchor\'s '
                        'spelling of --device cuda:N; the CPU for -1 and on a machine without a GPU')


DEFAULT_DATA_BASE = 'car_resnet50_balanced_proxy_512_data_base.pth'  # of train.py without any flags


def add_data_base_flags(parser) -> None:
    """Add the flags that name a data base and its images, for `retrieval.database.open_data_base`."""
    parser.add_argument('--data_base', type=user_path, default=DEFAULT_DATA_BASE, help='file, or its name in '
                        '--results_dir [%(default)s]')
    parser.add_argument('--data_path', type=user_path, default='/home/data', help='folder that holds the data sets; '
                        'a collection of embed.py knows its own folders [%(default)s]')
    parser.add_argument('--results_dir', type=user_path, default='results', help='where data bases are, and where '
                        'figures are written [%(default)s]')


def check_between(args, ranges: dict[str, tuple]) -> None:
    """Raise a UserError for a setting out of range: {name: (smallest, largest or None)}; a setting of None passes."""
    for name, (low, high) in ranges.items():
        value, limit = getattr(args, name), LARGEST_INT if high is None else high
        if value is None or low <= value <= limit:
            continue
        if high is None and value < low:
            raise UserError(f'--{name} {value} must be at least {low}')
        raise UserError(f'--{name} {value} must lie between {low} and {limit}')


def refuse_without_effect(args, reasons: dict[str, str]) -> None:
    """Raise a UserError for a flag that was given and has no effect: {name: reason, or '' if it has one}."""
    for name, reason in reasons.items():
        if reason and getattr(args, name) is not None:
            raise UserError(f'--{name} {getattr(args, name)} has no effect{reason}; leave it out')


def add_collection_flags(parser, data_base: str, model: str) -> None:
    """Add --data_base, or --qdrant with --collection, and --model, with help for the first and the last."""
    parser.add_argument('--data_base', type=user_path, metavar='FILE', help=data_base)
    parser.add_argument('--qdrant', metavar='URL', help='instead of --data_base: a Qdrant server, or a folder for its '
                        'embedded mode')
    parser.add_argument('--collection', metavar='NAME', help='name of the collection in --qdrant')
    parser.add_argument('--model', type=user_path, metavar='FILE', help=model)


def check_collection_flags(args) -> None:
    """Check that a collection is named once: by --data_base, or by --qdrant with --collection."""
    if (args.data_base is None) == (args.qdrant is None):
        raise UserError('name one of --data_base FILE and --qdrant URL')
    if (args.qdrant is None) != (args.collection is None):
        raise UserError('--qdrant URL and --collection NAME go together')
