"""Ways to break a run and the files that it reads, shared by the tests and by benchmarks/soak.py."""
import argparse
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import torch

# Half a million parameters, so that files are written, damaged and read at once.
BACKBONE = 'timm:test_resnet'
TINY = ('--backbone_type', BACKBONE, '--feature_dim', '16', '--weights', 'none', '--image_size', '32', '--batch_size',
        '4', '--num_epochs', '3', '--warm_up', '1', '--freeze_bn', '0', '--recalls', '1,2', '--on_collapse', 'warn',
        '--amp', 'off')
RULES = {'gradient': ('--proxy_update', 'gradient'), 'positive': ('--proxy_update', 'positive'),
         'momentum': ('--recipe', 'asymptotic_proxy')}


PRELOAD = ['faults', 'train', 'torchvision', 'pandas', 'scipy.io', 'timm', 'pretrainedmodels', 'matplotlib']


# ---------------------------------------------------- runs ----------------------------------------------------------
def redirect(out: str, err: str) -> None:
    """Write what this process prints to files, and sum in one thread: sums depend on their number in the last bits."""
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
    sys.stdout = open(1, 'w', buffering=1, closefd=False)  # noqa: SIM115  of this process, until it ends
    sys.stderr = open(2, 'w', buffering=1, closefd=False)  # noqa: SIM115
    torch.set_num_threads(1)


def run_file(words: list[str], folder: str, environment: dict, out: str, err: str) -> None:
    """Be `python words...` in a folder."""
    redirect(out, err)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = words
    sys.path[0:0] = [str(Path(words[0]).resolve().parent)]
    runpy.run_path(words[0], run_name='__main__')


def train_in_child(words: list, log: str, fault: tuple | None) -> None:
    """Call train.py's main with a fault built in, as a script would be called.

    Args:
        words: of the command line.
        log: file for what it prints.
        fault: ('write', n) dies where it syncs its n-th file to the disk, ('file', name) where it syncs the first
            one of that name, ('step', n) in its n-th optimizer step,
            ('embed', n) before it embeds its n-th set of test images; ('send', signal, n) gets a signal in its n-th
            step; ('full', bytes) can write no file of more bytes.
    """
    import train
    from training.options import parse_options
    from utils import run_script

    redirect(log, log)
    count = 0

    def before(function, number: int, act):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == number:
                act()
            return function(*args, **kwargs)
        return call

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    kind = fault[0] if fault else None
    if kind == 'write':
        os.fsync = before(os.fsync, fault[1], die)
    elif kind == 'file':
        fsync = os.fsync
        os.fsync = lambda number: die() if fault[1] in os.readlink(f'/proc/self/fd/{number}') else fsync(number)
    elif kind == 'step':
        torch.optim.Optimizer.zero_grad = before(torch.optim.Optimizer.zero_grad, fault[1], die)
    elif kind == 'embed':
        train.make_data_base = before(train.make_data_base, fault[1], die)
    elif kind == 'send':
        torch.optim.Optimizer.zero_grad = before(torch.optim.Optimizer.zero_grad, fault[2],
                                                 lambda: os.kill(os.getpid(), fault[1]))
    elif kind == 'full':
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write then fails as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault[1], fault[1]))
    sys.argv = ['train.py', *map(str, words)]
    run_script(lambda: train.main(parse_options()))


def embed_in_child(words: list, log: str, fault: tuple) -> None:
    """Call embed.py's main, a part each four images, with a fault built in.

    Args:
        words: of the command line.
        log: file for what it prints.
        fault: ('before', n) or ('after', n) dies where it renames its n-th file; ('send', signal) gets a signal once a
            part is saved.
    """
    import embed
    from utils import run_script

    redirect(log, log)
    embed.SAVED_EVERY = 4
    kind, number = fault
    replace, add = os.replace, embed.FileCollection.add

    def rename(*paths) -> None:
        nonlocal number
        number -= 1
        if number == 0 and kind == 'before':
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)
        if number == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def send(*parts) -> None:
        add(*parts)
        os.kill(os.getpid(), number)

    if kind == 'send':
        embed.FileCollection.add = send
    else:
        os.replace = rename
    sys.argv = ['embed.py', *words]
    run_script(lambda: embed.main(embed.get_args()))


def run_embed(words, log: Path, fault: tuple) -> tuple[int, str]:
    """Embed with a fault; returns exit code (minus the signal that killed it) and what it printed."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=embed_in_child, args=([str(word) for word in words], str(log), fault))
    process.start()
    process.join(300)
    return process.exitcode, Path(log).read_text()


def start_train(words, log: Path, fault: tuple | None = None):
    """Start a training in a process whose imports are done already; returns the process."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=train_in_child, args=([str(word) for word in words], str(log), fault))
    process.start()
    return process


def train(words, log: Path, fault: tuple | None = None, seconds: float | None = None) -> tuple[int, str]:
    """Train; returns exit code (minus the signal that killed it) and what it printed.

    Args:
        seconds: kill it after so long.
    """
    process = start_train(words, log, fault)
    if seconds is not None:
        time.sleep(seconds)
        process.kill()
    process.join(300)
    code = process.exitcode
    process.kill()
    return code, Path(log).read_text() if Path(log).exists() else ''


def children_of(number: int) -> list[int]:
    """Return the processes below a process."""
    children = [int(word) for file in Path(f'/proc/{number}/task').glob('*/children')
                for word in file.read_text().split()]
    return children + [below for child in children for below in children_of(child)]


def start_torchrun(words) -> subprocess.Popen:
    """Start a training in two processes, of one thread each, by torchrun; its lines come through a pipe."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2',
               Path(__file__).parent.parent / 'train.py', *words]
    return subprocess.Popen([str(word) for word in command], env={**os.environ, 'OMP_NUM_THREADS': '1'}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def torchrun_killed(words, seconds: float = 0) -> str:
    """Start a training by torchrun and kill all its processes so long after its second epoch; returns what it printed.

    They are sessions of their own, and would go on if torchrun alone was killed.
    """
    printed = ''
    with start_torchrun(words) as process:
        for line in process.stdout:
            printed += line
            if line.startswith('epoch 2/'):
                time.sleep(seconds)
                children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
                for number in (process.pid, *map(int, children)):
                    os.kill(number, signal.SIGKILL)
                printed += process.stdout.read()
    return printed


# The speed, the command, and the state of the repository may differ.
IGNORED = {'img_s', 'seconds', 'command', 'commit', 'changed_since'}


def differences(one, other, path: str = '') -> list[str]:
    """Return the paths at which two plain contents differ, apart from IGNORED."""
    if type(one) is not type(other):
        return [path]
    if isinstance(one, dict):
        different = [] if one.keys() == other.keys() else [f'{path} (keys)']
        for key in one.keys() & other.keys() - IGNORED:
            different += differences(one[key], other[key], f'{path}.{key}')
        return different
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return [f'{path} (length)']
        return [where for index, (a, b) in enumerate(zip(one, other, strict=True))
                for where in differences(a, b, f'{path}[{index}]')]
    is_equal = torch.equal(one, other) if torch.is_tensor(one) else one == other
    return [] if is_equal else [path]


def differing_results(one: Path, other: Path) -> list[str]:
    """Return where the files of two runs differ: weights, proxies, optimizer, statistics, data base, figures."""
    names = sorted(path.name for path in one.iterdir())
    different = [] if names == sorted(path.name for path in other.iterdir()) else ['files']
    for name in names:
        a, b = one / name, other / name
        if not b.exists():
            continue
        if a.suffix == '.csv':
            ignored = [*IGNORED, *(f'made.{column}' for column in IGNORED)]
            tables = [pd.read_csv(path).drop(columns=ignored, errors='ignore').astype(str) for path in (a, b)]
            different += [] if tables[0].equals(tables[1]) else [name]
        elif a.suffix == '.pth':
            different += differences(*(torch.load(path, weights_only=True) for path in (a, b)), name)
        else:
            different += [] if a.read_bytes() == b.read_bytes() else [name]
    return different


# ---------------------------------------------------- files ---------------------------------------------------------
def damaged(data: bytes, rng) -> bytes:
    """Cut a file off at a random position, or flip one of its bits."""
    position = int(rng.integers(len(data)))
    if rng.random() < 0.5:
        return data[:position]
    return data[:position] + bytes([data[position] ^ 1 << int(rng.integers(8))]) + data[position + 1:]


STRANGE = (None, True, 0, -1, 1, 2.5, float('nan'), 2**40, 2**70, '', 'x', '../x', 'x' * 300, b'x', [], {}, (), [None],
           ['x'], {'a': 1}, {1: 'a'}, torch.zeros(0), torch.zeros(()), torch.zeros(2, 3),
           torch.full((3, 4), torch.nan), torch.full((4,), 2**62), torch.zeros(1, dtype=torch.complex64),
           torch.eye(3).to_sparse())


def tampered(value, rng):
    """Change one thing, anywhere in nested dicts, lists and tensors: another value, type, shape, or nothing at all."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.9:
        copy = dict(value) if isinstance(value, dict) else list(value)
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = keys[int(rng.integers(len(keys)))]
        if rng.random() < 0.1:
            del copy[key]
        else:
            copy[key] = tampered(copy[key], rng)
        return copy
    if torch.is_tensor(value) and rng.random() < 0.7:
        changes = (value[:-1] if value.ndim else value, value[None], value.double(), value.long(), value.half(),
                   -value, value * 1e30, value * torch.nan, value.expand(2, *value.shape))
        return changes[int(rng.integers(len(changes)))]
    return STRANGE[int(rng.integers(len(STRANGE)))]


def tamper_targets(run: Path, data: Path, folder: Path) -> dict:
    """Return readers of files that others may have made: {name: (good contents, function of contents)}.

    A function returns, or raises UserError; anything else is a fault.

    Args:
        run: the folder of a run that was trained with TINY for one epoch without warm-up.
        data: the data path with its data set, car.
        folder: for the files.
    """
    from common.files import load
    from imagedata.loading import open_data
    from model import make_loss
    from retrieval.database import load_data_base
    from retrieval.embedding import measure
    from retrieval.model_file import load_model
    from training.checkpoint import load_checkpoint, restore
    from training.options import parse_options

    good = {kind: load(next(run.glob(f'*_{kind}.pth')), kind) for kind in ('checkpoint', 'model', 'data_base')}
    options = parse_options([str(word) for word in (*TINY, '--num_epochs', 1, '--warm_up', 0, '--data_path', data)])[0]
    split = open_data(data, 'car').split
    cpu = torch.device('cpu')
    model = load_model(next(run.glob('*_model.pth')), cpu)[0]
    criterion = make_loss(options.base_loss, num_classes=len(split['train']), feature_dim=options.feature_dim)
    optimizer = torch.optim.AdamW([{'params': list(model.parameters())}, {'params': list(criterion.parameters())}])
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    file = folder / 'tampered.pth'

    def checkpoint(contents) -> None:
        torch.save(contents, file)
        restore(load_checkpoint(file, options, split), file, model, criterion, optimizer, schedule)

    def data_base(contents) -> None:
        torch.save(contents, file)
        loaded = load_data_base(file)
        measure(loaded, tuple(loaded.origin['args']['recalls']), cpu)

    def network(contents) -> None:
        torch.save(contents, file)
        load_model(file, cpu)

    def split_file(contents) -> None:
        (folder / 'tampered').mkdir(exist_ok=True)
        torch.save(contents, folder / 'tampered' / 'uncropped_data_dicts.pth')
        open_data(folder, 'tampered')

    return {'checkpoint': (good['checkpoint'], checkpoint), 'data base': (good['data_base'], data_base),
            'model': (good['model'], network), 'split file': (split, split_file)}


def tamper(targets: dict, number: int, rng) -> list[str]:
    """Read a number of tampered files of each kind; returns the faults."""
    import traceback

    from common.errors import UserError

    faults = []
    for name, (good, function) in targets.items():
        function(good)
        for _ in range(number):
            try:
                function(tampered(good, rng))
            except UserError as error:
                if '\n' in str(error):
                    faults.append(f'{name}: more than a line: {error}')
            except Exception as error:
                faults.append(f'{name}: {type(error).__name__}: {error}; {traceback.format_exc(limit=-2)}')
    return faults


def mutated(text: str, rng) -> str:
    """Change a text at one to four positions: characters, digits, lines, pieces of it."""
    strange = ['', ' ', '\n', '\t', '\0', ',', '-', '.', '..', '/', '\\', '%', '{', '"', "'", '0', '1', '-1', '1e999',
               'nan', 'inf', '99999999999999999999', 'é', '\u202e', '\ud800', '😀', 'a' * 300, '--', '=',
               '__class__']
    for _ in range(int(rng.integers(1, 5))):
        start = int(rng.integers(len(text) + 1))
        end = min(len(text), start + int(rng.integers(0, 6)))
        piece = strange[int(rng.integers(len(strange)))]
        if rng.random() < 0.2 and text:
            again = int(rng.integers(len(text)))
            piece = text[again:again + int(rng.integers(1, 30))]
        text = text[:start] + piece + text[end:]
    return text


def fuzz_targets(folder: Path) -> dict:
    """Return what is fuzzed: {name: (good inputs, function of an input)}.

    A function returns, or raises UserError (ArgumentTypeError from the parser of a value); anything else is a fault.
    """
    from common.files import check_paths
    from imagedata.raw_sets import RAW_SETS
    from training.options import parse_options
    from training.statistics import read_statistics
    from utils import fraction_list, int_list, seed_list

    def on_raw_set(name: str, file: str):
        def read(text: str) -> None:
            root = folder / name
            path = root / file
            good = path.read_bytes()
            try:
                path.write_text(text, errors='surrogatepass', newline='')
                items, _ = RAW_SETS[name].read(root)
                check_paths(root, (item.source for item in items))
            finally:
                path.write_bytes(good)
        return (folder / name / file).read_text(), read

    def statistics(text: str) -> None:
        path = folder / 'fuzzed_statistics.csv'
        path.write_text(text, errors='surrogatepass', newline='')
        read_statistics(path)

    lines = ['--recipe proxy_anchor --lr 1e-4 --data_name cub', '--momentum 0.6 --recipe momentum_proxy --seeds 1,2,3',
             '--loss Proxy_Anchor --model bn_inception --embedding-size 512 --batch-size 180 --warm 1 --bn-freeze 1',
             '--recalls 1,2,4 --lr_milestones 0.5,0.8 --lr_schedule multistep --temperature 0.05 --val_ratio 0.2']
    row = 'epoch,loss,dense_R@1,args.seed\n1,2.5,50.0,0\n2,1.5,60.25,0\n'
    targets = {'command line': (lines, lambda text: parse_options(text.split())),
               '--recalls': (['1,2,4,8', '1,10,100,1000'], int_list), '--seeds': (['1,2,3'], seed_list),
               '--lr_milestones': (['0.5,0.8'], fraction_list), 'statistics': ([row], statistics)}
    for name, file in (('cub', 'images.txt'), ('cub', 'image_class_labels.txt'), ('cub', 'bounding_boxes.txt'),
                       ('sop', 'Ebay_train.txt'), ('isc', 'Eval/list_eval_partition.txt')):
        good, read = on_raw_set(name, file)
        targets[file] = ([good], read)
    return targets


def fuzz(targets: dict, number: int, rng) -> list[str]:
    """Try a number of inputs in turn over all targets; returns the faults: target, input, error."""
    from common.errors import UserError

    faults = []
    names = list(targets)
    for index in range(number):
        name = names[index % len(names)]
        good, function = targets[name]
        text = mutated(good[int(rng.integers(len(good)))], rng)
        try:
            function(text)
        except (UserError, argparse.ArgumentTypeError):
            pass
        except SystemExit as end:  # of --help
            if end.code not in (0, None):
                faults.append(f'{name}: {text[:200]!r} ended with {end.code}')
        except Exception as error:
            faults.append(f'{name}: {text[:200]!r} ended in {type(error).__name__}: {error}')
    return faults
