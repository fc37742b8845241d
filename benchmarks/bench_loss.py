"""Time and memory of one forward and backward of a loss at many classes, against what one would take instead.

    python benchmarks/bench_loss.py                        # about 15 minutes on two idle cores
    python benchmarks/bench_loss.py --classes 100,11318    # under a minute

`ours` is model.py, `pml` pytorch-metric-learning (it has no balanced_proxy), `naive` the formula as it is written: unit
proxies, cosines, a one-hot mask, exponentials, sums. Times are medians over turns in which each takes a step after the
other, in one process; at a million classes, where not all fit beside each other, that of one step. Memory is the
largest resident size of a fresh process during two steps, less that before them, when embeddings and proxies are there
already; the gradient of the proxies is in it, which all of them need.
Ends with one line of JSON.
"""
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
from common.errors import UserError, check_choice  # noqa: E402  a script finds modules beside itself only
from model import make_loss  # noqa: E402
from utils import Parser, int_list, run_script  # noqa: E402

LOSS_NAMES = ('proxy_anchor', 'balanced_proxy', 'normalized_softmax')
LARGE = 10**6  # from here on, the process that measures memory measures time as well


# ---------------------------------------------------- what is compared ----------------------------------------------
class Naive(nn.Module):
    """A loss as its formula reads, without care for memory."""

    def __init__(self, loss_name: str, num_classes: int, feature_dim: int):
        super().__init__()
        self.formula = NAIVE[loss_name]
        self.proxies = nn.Parameter(F.normalize(torch.randn(num_classes, feature_dim), dim=-1))

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        similarity = embeddings @ F.normalize(self.proxies, dim=-1).T
        return self.formula(similarity, F.one_hot(labels, len(self.proxies)), labels)


def naive_proxy_anchor(s, own, labels, alpha=32.0, delta=0.1):
    """As in Proxy Anchor's own code: exponentials of all pairs, masked, summed."""
    positive = torch.where(own == 1, torch.exp(-alpha * (s - delta)), torch.zeros_like(s)).sum(0)
    negative = torch.where(own == 0, torch.exp(alpha * (s + delta)), torch.zeros_like(s)).sum(0)
    num_present = (own.sum(0) > 0).sum()
    return torch.log(1 + positive).sum() / num_present + torch.log(1 + negative).mean()


def naive_balanced_proxy(s, own, labels, alpha=32.0, delta=0.1):
    count = own.sum(0)
    positive = torch.where(own == 1, torch.exp(-alpha * (s - delta)), torch.zeros_like(s)).sum(0)
    negative = torch.where(own == 0, torch.exp(alpha * (s + delta)), torch.zeros_like(s)).sum(0)
    return torch.log(1 + positive / count.clamp(min=1) + negative / (len(s) - count).clamp(min=1)).mean()


def naive_normalized_softmax(s, own, labels, alpha=32.0):
    return -(torch.log_softmax(alpha * s, 1) * own).sum(1).mean()


NAIVE = {'proxy_anchor': naive_proxy_anchor, 'balanced_proxy': naive_balanced_proxy,
         'normalized_softmax': naive_normalized_softmax}


def pml(loss_name: str, num_classes: int, feature_dim: int) -> nn.Module | None:
    from pytorch_metric_learning import losses

    if loss_name == 'proxy_anchor':
        return losses.ProxyAnchorLoss(num_classes, feature_dim, margin=0.1, alpha=32)
    if loss_name == 'normalized_softmax':
        return losses.NormalizedSoftmaxLoss(num_classes, feature_dim, temperature=1 / 32)
    return None


def ours(loss_name: str, num_classes: int, feature_dim: int, **settings) -> nn.Module:
    return make_loss(loss_name, num_classes=num_classes, feature_dim=feature_dim, **settings)


IMPLEMENTATIONS = {'ours': ours, 'pml': pml, 'naive': Naive}


# ---------------------------------------------------- measurements --------------------------------------------------
def make_batch(args, num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    embeddings = F.normalize(torch.randn(args.batch_size, args.feature_dim, generator=generator), dim=-1)
    return embeddings, torch.randint(0, num_classes, (args.batch_size,), generator=generator)


def step(criterion: nn.Module, embeddings: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the milliseconds of one forward and backward, to embeddings and proxies."""
    for parameter in criterion.parameters():
        parameter.grad = None
    embeddings = embeddings.detach().requires_grad_()
    begin = time.perf_counter()
    criterion(embeddings, labels).backward()
    return 1e3 * (time.perf_counter() - begin)


def time_in_turns(args, kinds: list[str], loss_name: str, num_classes: int) -> dict[str, float]:
    """Return the median milliseconds of each implementation."""
    batch = make_batch(args, num_classes)
    criteria = {kind: IMPLEMENTATIONS[kind](loss_name, num_classes, args.feature_dim) for kind in kinds}
    times = {kind: [] for kind in criteria}
    for turn in range(args.repeats + 3):
        for kind, criterion in criteria.items():
            milliseconds = step(criterion, *batch)
            if turn >= 3:  # the first ones warm up
                times[kind].append(milliseconds)
    return {kind: statistics.median(values) for kind, values in times.items()}


def resident(field: str) -> float:
    """Return `VmRSS` (resident now) or `VmHWM` (at most so far) of this process in MiB."""
    line = next(line for line in Path('/proc/self/status').read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def available_gib() -> int:
    """Return the memory that is free now, less a part for others."""
    lines = Path('/proc/meminfo').read_text().splitlines()
    return int(0.85 * next(int(line.split()[1]) for line in lines if line.startswith('MemAvailable')) / 2**20)


def measure_child(args) -> None:
    """Measure one implementation in this process and print it as JSON."""
    kind, loss_name, num_classes, memory = args.child.split(',')
    limit = int(memory) * 2**30 + 4 * 2**30  # about 4 GiB are mapped and never used
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    torch.manual_seed(0)
    embeddings, labels = make_batch(args, int(num_classes))
    small = IMPLEMENTATIONS[kind](loss_name, 10, args.feature_dim)
    step(small, embeddings, labels % 10)  # loads what is loaded at the first call
    criterion = IMPLEMENTATIONS[kind](loss_name, int(num_classes), args.feature_dim)
    Path('/proc/self/clear_refs').write_text('5')  # VmHWM starts anew from here
    before = resident('VmRSS')
    times = [step(criterion, embeddings, labels) for _ in range(2)]
    print(json.dumps({'peak_mib': resident('VmHWM') - before, 'resident_mib': resident('VmHWM'), 'ms': times[-1]}))


def measure_memory(kind: str, loss_name: str, num_classes: int, memory: int) -> dict | None:
    """Measure in a fresh process; returns None where it does not fit in `memory` GiB."""
    command = [sys.executable, __file__, *sys.argv[1:], '--child', f'{kind},{loss_name},{num_classes},{memory}']
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode == 0:
        return json.loads(child.stdout.splitlines()[-1])
    if any(word in child.stderr for word in ('allocate memory', 'MemoryError', 'alloc')):
        return None
    raise UserError(f'{kind} {loss_name} with {num_classes} classes failed: {child.stderr.strip()[-300:]}')


# ---------------------------------------------------- main -----------------------------------------------------------
def get_parser() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_argument('--classes', type=int_list, default=(100, 11318, 10**6), help='numbers of classes; 11,318 is '
                        'sop [100,11318,1000000]')
    parser.add_argument('--losses', default=','.join(LOSS_NAMES), help='[%(default)s]')
    parser.add_argument('--kinds', default=','.join(IMPLEMENTATIONS), help='what to measure; the first one is what the '
                        'others are compared with [%(default)s]')
    parser.add_argument('--batch_size', type=int, default=180, help='N [%(default)s]')
    parser.add_argument('--feature_dim', type=int, default=512, help='D [%(default)s]')
    parser.add_argument('--repeats', type=int, default=15, help='turns that are timed [%(default)s]')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads(), help='[all cores: %(default)s]')
    parser.add_argument('--memory', type=int, default=24, help='GiB that a step may take; what needs more is reported '
                        'as not fitting [%(default)s]')
    parser.add_argument('--child', help='used by this script itself: what to measure in a fresh process')
    return parser


def cpu_name() -> str:
    lines = Path('/proc/cpuinfo').read_text().splitlines()
    return next((line.split(':')[1].strip() for line in lines if line.startswith('model name')), platform.machine())


def main() -> None:
    """Measure all, print a table, and end with one line of JSON."""
    args = get_parser().parse_args()
    torch.set_num_threads(args.threads)
    if args.child:
        return measure_child(args)
    for flag, words, choices in (('--losses', args.losses, LOSS_NAMES), ('--kinds', args.kinds, IMPLEMENTATIONS)):
        for word in words.split(','):
            check_choice(flag, word, choices)
    load = os.getloadavg()[0]
    rows = []
    print(f'N = {args.batch_size}, D = {args.feature_dim}, {args.threads} threads; load before {load:.1f}\n')
    print(f'{"loss":<20}{"classes":>10}  {"":<12}{"ms":>10}{"MiB":>10}{"x time":>9}{"x memory":>10}')
    for loss_name in args.losses.split(','):
        for num_classes in args.classes:
            kinds = [kind for kind in args.kinds.split(',') if kind != 'pml' or pml(loss_name, 2, 2) is not None]
            times = time_in_turns(args, kinds, loss_name, num_classes) if num_classes < LARGE else {}
            for kind in kinds:
                memory = min(args.memory, available_gib())
                result = measure_memory(kind, loss_name, num_classes, memory)
                row = {'loss': loss_name, 'classes': num_classes, 'kind': kind, 'fits': result is not None}
                shown = f'  does not fit in {memory} GiB'
                if result is not None:
                    row.update({**result, 'ms': times.get(kind, result['ms'])})
                    first = next(other for other in [*rows, row] if 'ms' in other and
                                 (other['loss'], other['classes']) == (loss_name, num_classes))
                    shown = (f'{row["ms"]:>10.1f}{row["peak_mib"]:>10.1f}{row["ms"] / first["ms"]:>9.2f}'
                             f'{row["peak_mib"] / first["peak_mib"]:>10.2f}')
                rows.append(row)
                print(f'{loss_name:<20}{num_classes:>10,}  {kind:<12}{shown}', flush=True)
    import pytorch_metric_learning

    rows = [{name: round(value, 1) if isinstance(value, float) else value for name, value in row.items()}
            for row in rows]
    print(json.dumps({'benchmark': 'loss', 'batch_size': args.batch_size, 'feature_dim': args.feature_dim,
                      'repeats': args.repeats, 'rows': rows, 'torch': torch.__version__, 'python':
                      platform.python_version(), 'pytorch_metric_learning': pytorch_metric_learning.__version__,
                      'cpu': cpu_name(), 'cores': os.cpu_count(), 'threads': args.threads, 'load_before': load}))


if __name__ == '__main__':
    run_script(main)
