"""The device of a process, and what several processes share: in a world of one that is what the one has.

With GPUs, Gloo stands beside NCCL for what lies on the CPU: numbers of rows, so that no step waits for the device to
know them, and the state of the random generator. PyTorch is imported where it is used.
"""
import contextlib
import os
import re
import sys

from engine.errors import UserError


def select_device(name: str):
    """Return the torch.device for `auto`, `cpu`, `mps`, `cuda` or `cuda:N`; one that is not there is never replaced."""
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


def bfloat16_is_fast(device) -> bool:
    """Tell whether the device multiplies bfloat16 natively: GPUs since Ampere, CPUs with AVX512-BF16 or AMX."""
    import torch

    if device.type == 'cuda':
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # Any core with AVX-512 is able to, most of them by slow emulation.
    return device.type == 'cpu' and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def start_processes(device_name: str) -> str:
    """Join the processes that torchrun started (RANK, WORLD_SIZE), if it did; only rank 0 prints from then on.

    Returns the --device of this process; with GPUs, of which each process needs its own, the one of its LOCAL_RANK.
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
    from torch import distributed

    if world_rank() > 0:
        distributed.barrier()
    yield
    if world_size() > 1 and world_rank() == 0:
        distributed.barrier()


def world_size() -> int:
    """Return the number of processes that train together, 1 without torch.distributed."""
    if 'torch' not in sys.modules:  # a second that a script without torch need not spend
        return 1
    from torch import distributed

    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def world_rank() -> int:
    """Return the number of this process, from 0."""
    if world_size() == 1:
        return 0
    from torch import distributed

    return distributed.get_rank()


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

    The rows (n, ...), n >= 0, may differ in number; they require a gradient on all processes or on none.
    The backward sums the gradient over the processes and returns the own rows. Where each process computes the same
    loss of all rows, the network's gradients are then those of `world_size()` losses, until the mean that
    DistributedDataParallel takes makes them those of one: a process alone would have the same, without a factor.
    """
    import torch
    from torch import distributed

    if world_size() == 1:
        return tensor
    sizes = [torch.empty(1, dtype=torch.int64) for _ in range(world_size())]
    distributed.all_gather(sizes, torch.tensor([len(tensor)]))
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


def progress(items, **words):
    """Return a progress bar over items, shown by the first process only; it vanishes at its end.

    Where the output is no terminal but a file, a line every half minute takes its place.
    """
    from tqdm import tqdm

    words = {'leave': False, 'dynamic_ncols': True, 'disable': world_rank() > 0, **words}
    if not sys.stderr.isatty():
        words |= {'file': LineWriter(), 'mininterval': 30, 'delay': 30}
    return tqdm(items, **words)


class LineWriter:
    """Writes to stderr the last state of a bar that tqdm draws with carriage returns, as a line."""

    def write(self, text: str) -> None:
        text = text.replace('\r', '').strip()
        if text:
            sys.stderr.write(f'{text}\n')

    def flush(self) -> None:
        sys.stderr.flush()
