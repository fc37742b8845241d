"""Device and memory of a process, and what several processes share; in a world of one each function is a no-op.

With GPUs, a Gloo group stands beside NCCL for small values on the CPU: row counts, so that no step waits for the
device, and the state of the random generator. torch is imported where it is used.
"""
import contextlib
import ctypes
import os
import re
import sys

from common.errors import UserError


# ---------------------------------------------------- device -------------------------------------------------------
def select_device(name: str):
    """Return the torch.device for `auto`, `cpu`, `mps`, `cuda` or `cuda:N`; a missing one is an error."""
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
    # torch.cpu has no public test; most AVX-512 cores emulate bfloat16 slowly.
    return device.type == 'cpu' and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def use_amp(choice: str, device) -> bool:
    """Decide whether to compute in bfloat16: `on`, `off`, or `auto`, i.e. where the device is fast at it."""
    return bfloat16_is_fast(device) if choice == 'auto' else choice == 'on'


def keep_freed_memory() -> None:
    """Let glibc keep the memory that a step frees for the next step; on other systems this does nothing.

    By default it returns blocks above some MiB to the kernel, and each step faults the same pages in again. The
    variables MALLOC_..._ of the environment win.
    """
    libc = ctypes.CDLL(None) if sys.platform == 'linux' else None
    if not hasattr(libc, 'gnu_get_libc_version'):
        return
    mmap_threshold, trim_threshold, top_pad = -3, -1, -2  # of malloc.h
    for option, variable, value in ((mmap_threshold, 'MALLOC_MMAP_THRESHOLD_', 2**30),
                                    (trim_threshold, 'MALLOC_TRIM_THRESHOLD_', -1),  # never
                                    (top_pad, 'MALLOC_TOP_PAD_', 2**28)):
        if variable not in os.environ:
            libc.mallopt(option, value)


# ---------------------------------------------------- processes ----------------------------------------------------
def start_processes(device_name: str) -> str:
    """Join the processes that torchrun started (RANK, WORLD_SIZE), if any; from then on only rank 0 prints.

    Returns:
        the --device of this process: with GPUs the one of its LOCAL_RANK, since each process needs its own.
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
    """Leave the group of processes; after an error without waiting for the others."""
    if world_size() > 1:
        from torch import distributed

        if sys.exc_info()[0] is None:
            distributed.barrier()  # until rank 0 has written its files
            distributed.destroy_process_group()


@contextlib.contextmanager
def first_process_first():
    """Let rank 0 run the block before the others, so that they find what it has downloaded."""
    from torch import distributed

    if world_rank() > 0:
        distributed.barrier()
    yield
    if world_size() > 1 and world_rank() == 0:
        distributed.barrier()


def world_size() -> int:
    """Return the number of processes that train together, 1 without torch.distributed."""
    if 'torch' not in sys.modules:  # do not spend a second on its import in scripts that do without
        return 1
    from torch import distributed

    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def world_rank() -> int:
    """Return the rank of this process, from 0."""
    if world_size() == 1:
        return 0
    from torch import distributed

    return distributed.get_rank()


def shard(count: int) -> range:
    """Return this process's contiguous share of `count` rows, in rank order."""
    return range(count * world_rank() // world_size(), count * (world_rank() + 1) // world_size())


# ---------------------------------------------------- tensors ------------------------------------------------------
def sum_over_processes(tensor):
    """Replace a tensor by its sum over all processes, in place, and return it; it carries no gradient."""
    from torch import distributed

    if world_size() > 1:
        distributed.all_reduce(tensor)
    return tensor


def broadcast(tensor) -> None:
    """Replace a tensor by that of rank 0, in place."""
    from torch import distributed

    if world_size() > 1:
        distributed.broadcast(tensor, 0)


def broadcast_state(module) -> None:
    """Give every process the parameters and buffers of rank 0: sums on a GPU differ in their last bits."""
    for tensor in (*module.parameters(), *module.buffers()):
        broadcast(tensor.data)


def broadcast_buffers(module) -> None:
    """Give every process the buffers of rank 0: BatchNorm statistics are those of each process's own images."""
    for buffer in module.buffers():
        broadcast(buffer)


def gather_rows(tensor):
    """Concatenate the rows of all processes in rank order; differentiable, and every process has to call it.

    The rows (n, ...), n >= 0, may differ in number; they require a gradient on all processes or on none. The backward
    pass sums the gradient over the processes and returns that of the process's own rows. Where each process computes
    the same loss of all rows, DistributedDataParallel's mean then makes the network's gradient that of one process,
    without a factor.
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


# ---------------------------------------------------- progress -----------------------------------------------------
def progress(items, **options):
    """Return a tqdm bar over items, shown by rank 0 only, which vanishes when it is done.

    Where the output is not a terminal, it prints a line every half minute instead.
    """
    from tqdm import tqdm

    options = {'leave': False, 'dynamic_ncols': True, 'disable': world_rank() > 0, **options}
    if not sys.stderr.isatty():
        options |= {'file': LineWriter(), 'mininterval': 30, 'delay': 30}
    return tqdm(items, **options)


class LineWriter:
    """A file for tqdm that prints each state of the bar as a line of its own."""

    def write(self, text: str) -> None:
        text = text.replace('\r', '').strip()
        if text:
            sys.stderr.write(f'{text}\n')

    def flush(self) -> None:
        sys.stderr.flush()
