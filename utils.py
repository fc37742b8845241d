"""What the scripts share: how they end, pieces of their command lines, the style of their pictures."""
import argparse
import ast
import os
import re
import signal
import sys
from pathlib import Path

from engine.errors import UserError, nearest, reason_of
from engine.files import write_atomically
from engine.processes import stop_processes, world_size


# ---------------------------------------------------- how a script ends --------------------------------------------
class Terminated(KeyboardInterrupt):
    """SIGTERM, as a scheduler sends it before it ends a job."""


def catch_signals() -> None:
    """Let SIGINT and SIGTERM end the script by an exception, and a second one at once."""
    def interrupt(number: int, _frame) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)


def run_script(main):
    """Call `main` and end as a script should; returns what `main` returns.

    Exit code 2 and one line for what the user can mend, 130 for Ctrl-C, 143 for SIGTERM.
    """
    script = Path(sys.argv[0]).name
    catch_signals()
    try:
        return main()
    except UserError as error:
        message = str(error).rsplit('errors.UserError: ', 1)[-1]  # a DataLoader's worker sends its traceback along
        sys.exit(fail(f'{script}: error: {" ".join(message.split())}', 2))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone: nothing left to say
        sys.exit(1)
    except OSError as error:
        if error.filename is None:
            raise
        sys.exit(fail(f'{script}: error: cannot use {error.filename}: {error.strerror}; mend it or name another', 2))
    except RuntimeError as error:
        if 'DataLoader worker' in str(error):
            sys.exit(fail(f'{script}: error: a process that reads images has died ({reason_of(error)}); if memory ran '
                          'out, lower --num_workers', 2))
        if int(os.environ.get('WORLD_SIZE', 1)) == 1 or not re.search('gloo|NCCL|[Cc]onnection', str(error)):
            raise
        sys.exit(fail(f'{script}: stopped, since another process did', 1))
    except KeyboardInterrupt as stop:
        name, code = ('SIGTERM', 143) if isinstance(stop, Terminated) else ('Ctrl-C', 130)
        if int(os.environ.get('RANK', 0)) > 0:  # all processes get the signal, and the first one says it
            sys.exit(code)
        sys.exit(fail(f'{script}: stopped by {name}' + (f': {stop}' if str(stop) else ''), code))
    finally:
        stop_processes()
        for number in (signal.SIGINT, signal.SIGTERM):  # nothing is left to tidy up
            signal.signal(number, signal.SIG_DFL)


def fail(line: str, code: int) -> int:
    """Print a script's last line and return its exit code."""
    rank = int(os.environ.get('RANK', 0))
    # What goes wrong before the processes know each other goes wrong in all of them: one says it.
    if rank == 0 or world_size() > 1:
        print(f'rank {rank}: {line}' if world_size() > 1 else line, file=sys.stderr, flush=True)
    return code


# ---------------------------------------------------- command lines ------------------------------------------------
MOST = 2**63 - 1  # of whole numbers: what torch takes as a seed


class Parser(argparse.ArgumentParser):
    """An argument parser without abbreviations, whose errors are one line with a suggestion."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str):
        unknown = re.match(r'unrecognized arguments: (--[^\s=]+)', message)
        if unknown:
            options = [option for action in self._actions for option in action.option_strings]
            message = f'{unknown[1]} is no flag of {self.prog}{nearest(unknown[1], options)}; see --help'
        raise UserError(message)


def parser_of_numbers(kind: type, is_sound, what: str):
    """Return a parser of numbers with commas between, which says `what` they must be."""
    def parse(text: str) -> tuple:
        try:
            values = tuple(kind(part) for part in text.split(','))
        except ValueError:
            values = ()
        if not values or not is_sound(values):
            raise argparse.ArgumentTypeError(f'{text!r} must be {what}')
        return values

    return parse


int_list = parser_of_numbers(int, lambda values: values[0] > 0 and list(values) == sorted(set(values)),
                             'positive, ascending whole numbers with commas between, as in 1,2,4,8')
fraction_list = parser_of_numbers(
    float, lambda values: all(0 < value < 1 for value in values) and list(values) == sorted(set(values)),
    'ascending fractions of the epochs, as in 0.5,0.8')
seed_list = parser_of_numbers(
    int, lambda values: len(set(values)) == len(values) > 1 and min(values) >= 0 and max(values) < 2**63,
    'two or more different seeds, as in 1,2,3')


def user_path(text: str) -> str:
    """Parse a path: `~` is the home folder, where a shell has not replaced it already, as in `--output=~/x.png`."""
    return os.path.expanduser(text)


def parse_keywords(text: str) -> dict:
    """Parse `margin=0.2,kind=hard,sizes=[1,2]` to keyword arguments: Python's literals, and bare words as text.

    Raises:
        ValueError: if it is nothing of the kind.
    """
    try:
        call = ast.parse(f'f({text})', mode='eval').body
        if call.args or not all(keyword.arg for keyword in call.keywords):
            raise ValueError
        return {argument.arg: argument.value.id if isinstance(argument.value, ast.Name) else
                ast.literal_eval(argument.value) for argument in call.keywords}
    except (SyntaxError, ValueError, AttributeError, MemoryError, RecursionError):
        raise ValueError(f'{text!r} must be A=1,B=2, names and values') from None


def keyword_text(text: str) -> str:
    """Parse a flag that holds keyword arguments, and leave it as it is."""
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
    """Translate Proxy Anchor's `--gpu-id N` into a device: GPU N where there is a GPU, `-1` or no GPU the CPU."""
    import torch

    try:
        index = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r} must be a number, -1 for the CPU') from None
    return f'cuda:{index}' if index >= 0 and torch.cuda.is_available() else 'cpu'


def add_device_flags(parser) -> None:
    """Add --device, and --gpu_id for it."""
    parser.add_argument('--device', default='auto', help='auto, cpu, mps, cuda, cuda:N [%(default)s]')
    parser.add_argument('--gpu_id', '--gpu-id', type=gpu_id, dest='device', metavar='N', help='Proxy Anchor\'s '
                        'spelling of --device cuda:N; -1 or a machine without a GPU: the CPU')


def check_between(args, ranges: dict[str, tuple]) -> None:
    """Refuse settings out of range with their flag: {name: (smallest, largest or None)}; None is a flag not given."""
    for name, (low, high) in ranges.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= (MOST if high is None else high):
            raise UserError(f'--{name} {value} must ' + (f'be at least {low}' if high is None and value < low else
                                                         f'lie between {low} and {MOST if high is None else high}'))


def refuse_without_effect(args, reasons: dict[str, str]) -> None:
    """Refuse flags that were given and would change nothing: {name: why, or an empty word where it has an effect}."""
    for name, reason in reasons.items():
        if reason and getattr(args, name) is not None:
            raise UserError(f'--{name} {getattr(args, name)} has no effect{reason}; leave it out')


def check_place(args) -> None:
    """Refuse flags that name no place of a collection, or two: --data_base, or --qdrant with --collection."""
    if (args.data_base is None) == (args.qdrant is None):
        raise UserError('name one of --data_base FILE and --qdrant URL')
    if (args.qdrant is None) != (args.collection is None):
        raise UserError('--qdrant URL and --collection NAME go together')


# ---------------------------------------------------- pictures -----------------------------------------------------
# Okabe & Ito, told apart by the colour-blind too: blue, orange, green, purple, sky blue, vermilion, yellow, black.
COLOURS = ('#0072B2', '#E69F00', '#009E73', '#CC79A7', '#56B4E9', '#D55E00', '#F0E442', '#000000')
GREEN, RED, GREY = '#009E73', '#D55E00', '#999999'


def plot_style():
    """Return a context in which matplotlib draws in the style of SciencePlots, without LaTeX and without a screen."""
    import warnings

    import matplotlib

    matplotlib.use('Agg')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # SciencePlots warns under matplotlib 3.11
        import scienceplots  # noqa: F401  registers the styles
    from matplotlib import pyplot

    # Plain text everywhere: a class or file name may hold a dollar sign.
    text = {'font.family': 'sans-serif', 'font.sans-serif': ['DejaVu Sans'], 'text.parse_math': False,
            'axes.formatter.use_mathtext': False, 'font.size': 8, 'axes.labelsize': 8, 'axes.titlesize': 8,
            'xtick.labelsize': 7, 'ytick.labelsize': 7, 'legend.fontsize': 7, 'figure.titlesize': 9}
    return pyplot.style.context(['science', 'no-latex', text])


MADE_HERE = 'proxies for image retrieval'  # stands in each file that --output names, so that it may be replaced


def check_replaceable(target: Path, flag: str = '--output') -> Path:
    """Return a path, given by a flag, that may be written to: what is there was written by these scripts, or there is
    nothing.

    Raises:
        UserError: if a file of somebody else is there.
    """
    if target.exists() and (target.is_dir() or MADE_HERE.encode() not in target.read_bytes()):
        raise UserError(f'{flag} {target} is there, was not written by these scripts and is not replaced; move it '
                        'away, or name another')
    return target


def save_figure(figure, target: Path, dpi: int = 200) -> Path:
    """Save a figure as PNG and PDF, `target` with either suffix, and close it; returns the PNG's path. Atomic."""
    from matplotlib import pyplot

    # Without the date the same picture has the same bytes.
    for suffix, metadata in (('.pdf', {'CreationDate': None, 'Keywords': MADE_HERE}), ('.png', {'Source': MADE_HERE})):
        write_atomically(target.with_suffix(suffix), lambda file, kind=suffix[1:], metadata=metadata: figure.savefig(
            file, format=kind, dpi=dpi, metadata=metadata))
    pyplot.close(figure)
    return target.with_suffix('.png')
