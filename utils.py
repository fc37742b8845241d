"""Plumbing shared by the scripts: errors, command lines, seeds, devices, files that are never torn, run names.

This module imports no other module of the project.
"""
import argparse
import contextlib
import difflib
import json
import os
import re
import signal
import sys
import tempfile
from pathlib import Path

DATA_NAMES = {  # second names of the data sets: Proxy Anchor's --dataset and the archives' own folders, lower case
    'car': ('car', 'cars', 'cars196'),
    'cub': ('cub', 'cub_200_2011', 'cub200', 'cub-200-2011'),
    'sop': ('sop', 'stanford_online_products'),
    'isc': ('isc', 'inshop', 'inshop_clothes', 'in-shop', 'in-shop clothes retrieval benchmark'),
}


# ---------------------------------------------------- errors, command line --------------------------------------------
class UserError(ValueError):
    """Something that the person at the keyboard can mend: one line with the flag or file, the value and the remedy."""


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


def run_script(main) -> None:
    """Call `main` and end as a script should.

    Exit code 2 and one line for what the user can mend, 130 for Ctrl-C, 143 for SIGTERM.
    """
    script = Path(sys.argv[0]).name
    catch_signals()
    try:
        main()
    except UserError as error:
        message = str(error).rsplit('utils.UserError: ', 1)[-1]  # a DataLoader's worker sends its traceback along
        sys.exit(_fail(f'{script}: error: {" ".join(message.split())}', 2))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone: nothing left to say
        sys.exit(1)
    except OSError as error:
        if error.filename is None:
            raise
        sys.exit(_fail(f'{script}: error: cannot use {error.filename}: {error.strerror}; mend it or name another', 2))
    except RuntimeError as error:
        if int(os.environ.get('WORLD_SIZE', 1)) == 1 or not re.search('gloo|NCCL|[Cc]onnection', str(error)):
            raise
        sys.exit(_fail(f'{script}: stopped, since another process did', 1))
    except KeyboardInterrupt as stop:
        name, code = ('SIGTERM', 143) if isinstance(stop, Terminated) else ('Ctrl-C', 130)
        if int(os.environ.get('RANK', 0)) > 0:  # all processes get the signal, and the first one says it
            sys.exit(code)
        sys.exit(_fail(f'{script}: stopped by {name}' + (f': {stop}' if str(stop) else ''), code))
    finally:
        stop_processes()
        for number in (signal.SIGINT, signal.SIGTERM):  # nothing is left to tidy up
            signal.signal(number, signal.SIG_DFL)


def _fail(line: str, code: int) -> int:
    rank = int(os.environ.get('RANK', 0))
    # What goes wrong before the processes know each other goes wrong in all of them: one says it.
    if rank == 0 or world_size() > 1:
        print(f'rank {rank}: {line}' if world_size() > 1 else line, file=sys.stderr, flush=True)
    return code


def nearest(value: str, choices) -> str:
    """Return `; did you mean 'x'?` for the choice nearest to a mistyped value, or nothing."""
    match = difflib.get_close_matches(str(value).lower(), [str(choice) for choice in choices], n=1, cutoff=0.5)
    return f'; did you mean {match[0]!r}?' if match else ''


def check_choice(flag: str, value: str, choices) -> str:
    """Return `value` if it is one of `choices`, else raise a UserError that lists them and suggests the nearest."""
    choices = list(choices)
    if value not in choices:
        raise UserError(f'{flag} {value!r} is not known{nearest(value, choices)} (there are: {", ".join(choices)})')
    return value


def canonical_data_name(name: str) -> str:
    """Return the short name of a data set (`CUB_200_2011`, `Inshop`, `cars` -> `cub`, `isc`, `car`); others stay."""
    for short, names in DATA_NAMES.items():
        if name.lower() in names:
            return short
    if name.startswith('.') or Path(name).name != name or not name.isprintable():
        raise UserError(f'--data_name {name!r} is no plain folder name; name a folder in --data_path')
    return name


def int_list(text: str) -> tuple[int, ...]:
    """Parse `1,2,4,8`; Recall@K needs positive, ascending numbers."""
    try:
        values = tuple(int(part) for part in text.split(','))
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r} must be whole numbers with commas between, as in 1,2,4,8') from None
    if not values or values[0] < 1 or any(a >= b for a, b in zip(values, values[1:], strict=False)):
        raise argparse.ArgumentTypeError(f'{text!r} must be positive and ascending, as in 1,2,4,8')
    return values


def fraction_list(text: str) -> tuple[float, ...]:
    """Parse `0.5,0.8`: ascending fractions of the training."""
    try:
        values = tuple(float(part) for part in text.split(','))
    except ValueError:
        values = ()
    if not values or not all(0 < value < 1 for value in values) or list(values) != sorted(set(values)):
        raise argparse.ArgumentTypeError(f'{text!r} must be ascending fractions of the epochs, as in 0.5,0.8')
    return values


def seed_list(text: str) -> tuple[int, ...]:
    """Parse `1,2,3`: different seeds."""
    try:
        values = tuple(int(part) for part in text.split(','))
    except ValueError:
        values = ()
    if len(set(values)) < max(2, len(values)) or min(values) < 0 or max(values) >= 2**63:
        raise argparse.ArgumentTypeError(f'{text!r} must be two or more different seeds, as in 1,2,3')
    return values


def switch(text: str) -> bool:
    """Parse a flag's 0 or 1."""
    if text not in ('0', '1'):
        raise argparse.ArgumentTypeError(f'must be 0 or 1, not {text!r}')
    return text == '1'


# ---------------------------------------------------- randomness, device ---------------------------------------------
def select_device(name: str):
    """Return the torch.device for `auto`, `cpu`, `mps`, `cuda` or `cuda:N`.

    Raises:
        UserError: if that device is not there; no other one is taken in its place.
    """
    import torch

    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    if not re.fullmatch(r'cpu|mps|cuda(:(0|[1-9]\d?))?', name):
        raise UserError(f'--device {name!r} is not known (there are: auto, cpu, mps, cuda, cuda:N)')
    device = torch.device(name)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == 'cuda' and (device.index or 0) >= count:
        raise UserError(f'--device {name}: this machine has {count} CUDA devices; use --device cpu or auto')
    if device.type == 'mps' and not torch.backends.mps.is_available():
        raise UserError('--device mps: not available on this machine; use --device cpu or auto')
    return device


def gpu_id(text: str) -> str:
    """Translate Proxy Anchor's `--gpu-id N` into a device: GPU N where there is a GPU, `-1` or no GPU the CPU."""
    import torch

    try:
        index = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r} must be a number, -1 for the CPU') from None
    return f'cuda:{index}' if index >= 0 and torch.cuda.is_available() else 'cpu'


def bfloat16_is_fast(device) -> bool:
    """Tell whether the device multiplies bfloat16 natively: GPUs since Ampere, CPUs with AVX512-BF16 or AMX."""
    import torch

    if device.type == 'cuda':
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # Any core with AVX-512 is able to, most of them by slow emulation.
    native = (torch.cpu._is_avx512_bf16_supported, torch.cpu._is_amx_tile_supported)
    return device.type == 'cpu' and any(is_supported() for is_supported in native)


# ---------------------------------------------------- distributed ----------------------------------------------------
# In a world of one process each of these does nothing. With GPUs, Gloo stands beside NCCL for what lies on the CPU:
# numbers of rows, so that no step waits for the device to know them, and the state of the random generator.
def start_processes(device_name: str) -> str:
    """Join the processes that torchrun started (RANK, WORLD_SIZE), if it did; only rank 0 prints from then on.

    NCCL connects GPUs, Gloo CPUs.

    Args:
        device_name: of --device.

    Returns:
        the device of this process: with several GPUs the one that torchrun numbered for it.

    Raises:
        UserError: if a process has no GPU of its own.
    """
    if int(os.environ.get('WORLD_SIZE', 1)) == 1:
        return device_name
    import torch
    from torch import distributed

    if device_name == 'auto':
        device_name = 'cuda' if torch.cuda.is_available() else 'cpu'
    if device_name not in ('cuda', 'cpu'):
        raise UserError(f'--device {device_name}: several processes run on --device cuda, a GPU each, or on cpu')
    if device_name == 'cuda':
        device_name = f'cuda:{os.environ["LOCAL_RANK"]}'
        torch.cuda.set_device(select_device(device_name))
    distributed.init_process_group('gloo' if device_name == 'cpu' else 'cpu:gloo,cuda:nccl')
    if world_rank() > 0:
        sys.stdout = open(os.devnull, 'w')  # noqa: SIM115  until the process ends
    return device_name


def stop_processes() -> None:
    """Part from the other processes; after an error without waiting for them."""
    if world_size() > 1:
        from torch import distributed

        if sys.exc_info()[0] is None:
            distributed.barrier()  # rank 0 has written its files
            distributed.destroy_process_group()


@contextlib.contextmanager
def first_process_first():
    """Let the first process go ahead, so that the others find what it downloads."""
    if world_size() == 1:
        yield
        return
    from torch import distributed

    if world_rank() > 0:
        distributed.barrier()
    yield
    if world_rank() == 0:
        distributed.barrier()


def progress(items, **words):
    """Return a progress bar over items that vanishes at its end and is shown by the first process only."""
    from tqdm import tqdm

    return tqdm(items, leave=False, dynamic_ncols=True, **{'disable': world_rank() > 0, **words})


def world_size() -> int:
    """Return the number of processes that train together, 1 without torch.distributed."""
    if 'torch' not in sys.modules:  # a second that a script without torch need not spend
        return 1
    from torch import distributed

    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def world_rank() -> int:
    """Return the number of this process, from 0."""
    from torch import distributed

    return distributed.get_rank() if world_size() > 1 else 0


def shard(count: int) -> range:
    """Return which of `count` rows this process holds when all processes share them, in rank order."""
    return range(count * world_rank() // world_size(), count * (world_rank() + 1) // world_size())


def sum_over_processes(tensor):
    """Return the sum of a tensor over all processes; it takes the tensor's place and carries no gradient."""
    from torch import distributed

    if world_size() > 1:
        distributed.all_reduce(tensor)
    return tensor


def broadcast(tensor) -> None:
    """Give a tensor the values that it has on the first process."""
    from torch import distributed

    if world_size() > 1:
        distributed.broadcast(tensor, 0)


def gather_rows(tensor):
    """Concatenate the rows of all processes in rank order; differentiable, and every process has to call it.

    Its backward sums the gradient over the processes and returns the own rows. Where each process computes the same
    loss of all rows, the network's gradients are then those of `world_size()` losses, until the mean that
    DistributedDataParallel takes makes them those of one: a process alone would have the same, without a factor.

    Args:
        tensor: (n, ...), n >= 0 may differ between processes; it requires a gradient on all of them or on none.

    Returns:
        (sum of n, ...), the same on every process.
    """
    import torch
    from torch import distributed

    if world_size() == 1:
        return tensor
    size = torch.tensor([len(tensor)])
    sizes = [torch.empty_like(size) for _ in range(world_size())]
    distributed.all_gather(sizes, size)
    sizes = [int(size) for size in sizes]
    padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])  # Gloo gathers equal shapes only
    padded[:len(tensor)] = tensor.detach()
    parts = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(parts, padded)
    parts = [part[:size] for part, size in zip(parts, sizes, strict=True)]
    parts[world_rank()] = tensor  # the one part that carries a gradient
    rows = torch.cat(parts)
    if rows.requires_grad:
        rows.register_hook(lambda gradient: sum_over_processes(gradient.clone(memory_format=torch.contiguous_format)))
    return rows


def check_same(what: str, tensor) -> None:
    """Raise a UserError if a tensor is not the same on every process."""
    if any((row != tensor).any() for row in gather_rows(tensor[None])):
        raise UserError(f'{what} differs between the processes; give all of them the same --seed')


# ---------------------------------------------------- files ----------------------------------------------------------
def write_atomically(path: Path, write) -> None:
    """Call `write(file)` on a temporary file beside `path`, sync it to the disk, then rename it over `path`.

    A reader finds the old file or the new one, never a part; after an error the old one is still there.
    """
    path = Path(path)
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
    except OSError as error:
        raise UserError(f'cannot write {path}: {error.strerror}; choose a folder that can be written to') from None
    watched = None
    try:
        with os.fdopen(handle, 'wb') as file:
            watched = Watched(file)
            write(watched)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        error = watched.error or error if watched and isinstance(error, Exception) else error
        if isinstance(error, OSError):
            raise UserError(f'cannot write {path}: {error.strerror}; it is not saved, and the file before it is '
                            'untouched') from None
        raise


class Watched:
    """A file that remembers why a write failed: torch.save ends in a RuntimeError that does not say it."""

    def __init__(self, file):
        self.file, self.error = file, None

    def __getattr__(self, name: str):
        return getattr(self.file, name)

    def write(self, data) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise


@contextlib.contextmanager
def locked(path: Path, message: str):
    """Hold a lock file as long as the context lasts; the system lets go of it when the process dies, however it does.

    Raises:
        UserError: with the message, if another process holds it.
    """
    import fcntl

    while True:
        with open(path, 'w') as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(message) from None
            # Another process may have removed the file between the two lines above.
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save(contents: dict, path: Path) -> None:
    """Save a plain dict of tensors, lists, numbers and strings, on the CPU, so that `load` can read it; atomic."""
    import torch

    def to_cpu(value):
        if isinstance(value, dict):
            return {key: to_cpu(part) for key, part in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(to_cpu(part) for part in value)
        return value.cpu() if torch.is_tensor(value) else value

    plain = to_cpu(contents)
    write_atomically(path, lambda file: torch.save(plain, file))


def load(path: Path, kind: str, keys: tuple[str, ...] = ()) -> dict:
    """Load a `.pth` file onto the CPU without executing anything in it; its checksums (CRC-32) have to be right.

    Args:
        path: the file.
        kind: what it should be, for the messages (`data base`, `model`, ...).
        keys: what the dict in it must hold.

    Raises:
        UserError: if it is missing, corrupt, would need code to be executed, or is something else.
    """
    import warnings
    import zipfile

    import torch

    path = Path(path)
    if not path.is_file():
        raise UserError(f'there is no {kind} {path}')
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of a damaged file; what matters is in the error
            if zipfile.is_zipfile(path):  # since torch 1.6; torch.load does not look at its checksums
                with zipfile.ZipFile(path) as archive:
                    broken = archive.testzip()
                if broken:
                    raise ValueError(f'the checksum of {broken} is wrong')
            contents = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # a damaged archive raises whatever the unpickler or the zip reader stumbles over
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise UserError(f'{path} cannot be read as a {kind}: it is corrupt, or holds more than tensors and plain '
                        f'values ({reason})') from None
    missing = [key for key in keys if not isinstance(contents, dict) or key not in contents]
    if missing:
        raise UserError(f'{path} is no {kind} of this project: it lacks {", ".join(missing)}')
    return contents


def save_json(contents, path: Path, indent: int | None = None) -> None:
    """Save what JSON can hold; atomic."""
    write_atomically(path, lambda file: file.write(json.dumps(contents, indent=indent).encode()))


def provenance(device) -> dict:
    """Return what a file should say of the code and the machine that made it: commit, versions, device, processes."""
    import platform
    import subprocess

    import torch
    import torchvision

    def git(*words: str) -> str | None:
        try:
            result = subprocess.run(['git', '-C', str(Path(__file__).parent), *words], capture_output=True, text=True,
                                    check=True)
        except (OSError, subprocess.CalledProcessError):  # no git, or the code came without its history
            return None
        return result.stdout.strip()

    changes = git('status', '--porcelain', '--untracked-files=no')
    return {'commit': git('rev-parse', 'HEAD') or 'unknown', 'changed_since': 'unknown' if changes is None else
            'yes' if changes else 'no', 'python': platform.python_version(), 'torch': str(torch.__version__),
            'torchvision': str(torchvision.__version__), 'processes': world_size(),
            'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type}


def save_statistics(rows: list[dict], settings: dict, path: Path, made_with: dict | None = None) -> None:
    """Save a run's statistics as CSV, a row an epoch.

    Behind what was measured stand a column `args.NAME` per setting and `made.NAME` per part of `provenance`.
    """
    import pandas as pd

    plain = {f'args.{name}': ','.join(map(str, value)) if isinstance(value, (list, tuple)) else value
             for name, value in settings.items()} | {f'made.{name}': value for name, value in (made_with or {}).items()}
    table = pd.DataFrame([{**row, **plain} for row in rows])
    write_atomically(path, lambda file: table.to_csv(file, index=False))


def make_folder(flag: str, path: Path) -> Path:
    """Create a folder that can be written to, or say which flag names another."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f'{flag} {path} cannot be written to ({error.strerror}); choose another folder') from None
    return path


# ---------------------------------------------------- runs -----------------------------------------------------------
def run_name(*parts) -> str:
    """Join the parts of a run's name with `_`, in `[a-z0-9_.-]`: what else occurs becomes `-`."""
    words = [re.sub(r'[^a-z0-9_.-]+', '-', str(part).lower()) for part in parts]
    return '_'.join(word for word in words if word)


# ---------------------------------------------------- pictures ------------------------------------------------------
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


def save_figure(figure, target: Path, dpi: int = 200) -> Path:
    """Save a figure as PNG and PDF, `target` with either suffix, and close it; returns the PNG's path. Atomic."""
    from matplotlib import pyplot

    for suffix, metadata in (('.pdf', {'CreationDate': None}), ('.png', None)):  # the same picture, the same bytes
        write_atomically(target.with_suffix(suffix), lambda file, kind=suffix[1:], metadata=metadata: figure.savefig(
            file, format=kind, dpi=dpi, metadata=metadata))
    pyplot.close(figure)
    return target.with_suffix('.png')
