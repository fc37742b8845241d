"""Time and memory of recall at the size of SOP's test set and beyond, against what one would take instead.

    python benchmarks/bench_recall.py                      # 60,502 images of 11,316 classes; about half an hour
    python benchmarks/bench_recall.py --num_images 6000 --growth 1 --repetitions 1

`ours` is retrieval_metrics: R@1, 10, 100 and 1000, MAP@R and R-precision; `ours, binary` the same of the signs.
`full matrix` is the N x N similarities with a top-1000; `blocks, loop` Proxy Anchor's way, blocks of 10,000 queries
with a Python loop over the queries for each K; `product` the float32 products alone, below which no exact search goes
that compares each query with each image; `faiss` the search alone for 1,001 neighbours in an IndexFlatIP, `faiss,
binary` in an IndexBinaryFlat; `pml` pytorch-metric-learning's AccuracyCalculator for R@1, MAP@R and R-precision. Each
measurement is a process of its own, and they take turns. Memory is the peak above the process with its features.
The features are made with a fixed seed, class means with noise, so that R@1 is about 0.8 for features and for signs. On
a GPU (`--device cuda`) ours runs there. Ends with one line of JSON.

    pip install faiss-cpu pytorch-metric-learning
"""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from bench_common import finish, median

RECALLS = (1, 10, 100, 1000)
METHODS = ('ours', 'product', 'faiss', 'pml', 'full matrix', 'blocks, loop', 'ours, binary', 'faiss, binary')


def make_features(num_images: int, num_classes: int, dim: int, noise: float = 2.15):
    """Return unit rows (N, D) and labels (N,): a mean for each class, and noise that leaves R@1 at about 0.8."""
    import torch

    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(num_images) % num_classes
    features = torch.randn(num_images, dim, generator=generator).mul_(noise)
    features += torch.randn(num_classes, dim, generator=generator)[labels]
    return features.div_(features.norm(dim=1, keepdim=True)), labels


def recall_of_neighbours(labels, neighbours) -> dict:
    """Return Recall@K of neighbours (N, K), the query not among them."""
    hit = labels[neighbours] == labels[:, None]
    return {f'R@{k}': 100 * hit[:, :k].any(1).double().mean().item() for k in RECALLS}


def full_matrix(features, labels) -> dict:
    similarity = features @ features.T
    similarity.fill_diagonal_(-1)
    return recall_of_neighbours(labels, similarity.topk(RECALLS[-1], 1).indices)


def blocks_and_loop(features, labels) -> dict:
    import torch

    neighbours = []
    for block in features.split(10000):
        # The query itself is taken to be the first.
        neighbours.append(labels[(block @ features.T).topk(1 + RECALLS[-1], 1).indices[:, 1:]])
    neighbours = torch.cat(neighbours)
    return {f'R@{k}': 100 * sum(bool(label in row[:k]) for label, row in zip(labels, neighbours, strict=True))
            / len(labels) for k in RECALLS}


def products_alone(features, labels) -> dict:
    for block in features.split(1024):
        block @ features.T
    return {}


def with_faiss(features, labels) -> dict:
    import faiss

    index = faiss.IndexFlatIP(features.shape[1])
    index.add(features.numpy())
    start = time.perf_counter()
    index.search(features.numpy(), 1 + RECALLS[-1])
    return {'seconds': time.perf_counter() - start}


def with_faiss_binary(features, labels) -> dict:
    import faiss
    import numpy as np

    codes = np.packbits(features.numpy() >= 0, axis=1)
    index = faiss.IndexBinaryFlat(features.shape[1])
    index.add(codes)
    start = time.perf_counter()
    index.search(codes, 1 + RECALLS[-1])
    return {'seconds': time.perf_counter() - start}


def with_pml(features, labels) -> dict:
    import torch
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    calculator = AccuracyCalculator(include=('precision_at_1', 'mean_average_precision_at_r', 'r_precision'),
                                    k='max_bin_count', device=torch.device('cpu'))
    found = calculator.get_accuracy(features, labels)
    return {'R@1': 100 * found['precision_at_1'], 'MAP@R': 100 * found['mean_average_precision_at_r']}


def measure_here(method: str, num_images: int, num_classes: int, dim: int, device: str) -> dict:
    """Measure one method in this process: seconds, peak MiB above the features, and the metrics."""
    import torch

    from retrieval.metrics import retrieval_metrics

    features, labels = make_features(num_images, num_classes, dim, 1.65 if 'binary' in method else 2.15)

    def ours(binary: bool) -> dict:
        placed = features.to(device), labels.to(device)
        if device != 'cpu':
            retrieval_metrics(*placed, recalls=RECALLS, binary=binary)  # starts the GPU's libraries
            torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated() if device != 'cpu' else 0
        start = time.perf_counter()
        found = retrieval_metrics(*placed, recalls=RECALLS, binary=binary)
        found['seconds'] = time.perf_counter() - start
        if device != 'cpu':
            found['mib'] = (torch.cuda.max_memory_allocated() - held) / 2**20
        return found

    call = {'ours': lambda: ours(False), 'ours, binary': lambda: ours(True), 'faiss': lambda: with_faiss(
        features, labels), 'faiss, binary': lambda: with_faiss_binary(features, labels), 'pml': lambda: with_pml(
        features, labels), 'full matrix': lambda: full_matrix(features, labels),
        'blocks, loop': lambda: blocks_and_loop(features, labels), 'product': lambda: products_alone(features, labels)
        }[method]
    features[:2048] @ features[:2048].T  # starts the threads and buffers of the products
    Path('/proc/self/clear_refs').write_text('5')  # forgets the peak until now
    held = memory('VmRSS')
    start = time.perf_counter()
    found = call()
    seconds = time.perf_counter() - start
    return {'seconds': seconds, 'mib': memory('VmHWM') - held, **found}


def memory(name: str) -> float:
    """Return a line of /proc/self/status in MiB."""
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith(name))


def measure(method: str, num_images: int, num_classes: int, args) -> dict:
    """Measure one method in a fresh process."""
    words = [method, num_images, num_classes, args.feature_dim, args.device]
    # What is given back goes back to the system at once, so that the peak is that of what was held.
    environment = {**os.environ, 'MALLOC_MMAP_THRESHOLD_': str(2**18)}
    result = subprocess.run([sys.executable, __file__, '--child', json.dumps(words)], text=True, check=True,
                            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
    return json.loads(result.stdout.splitlines()[-1])


def is_exact(args) -> bool:
    """Compare ours with a product in float64 and a sort on the first 4,000 images, one in four an exact copy."""
    import torch

    from retrieval.metrics import retrieval_metrics

    features, labels = make_features(4000, 800, args.feature_dim)
    features[1::4] = features[::4]
    similarity = features.double() @ features.double().T
    similarity = (similarity * 2**33).round() / 2**33
    similarity.fill_diagonal_(-torch.inf)
    positive = (labels[:, None] == labels).fill_diagonal_(False)
    best = similarity.masked_fill(~positive, -torch.inf).amax(1, keepdim=True)
    rank = ((similarity > best) & ~positive).sum(1) + ((similarity == best) & ~positive).sum(1) / 2
    ours = retrieval_metrics(features, labels, recalls=RECALLS)
    return all(ours[f'R@{k}'] == 100 * (rank < k).double().mean().item() for k in RECALLS)


def get_args():
    from utils import Parser

    parser = Parser(description=__doc__)
    parser.add_argument('--num_images', type=int, default=60502, help='[%(default)s]')
    parser.add_argument('--num_classes', type=int, default=11316, help='[%(default)s]')
    parser.add_argument('--feature_dim', type=int, default=512, help='[%(default)s]')
    parser.add_argument('--methods', nargs='+', choices=METHODS, default=METHODS, help='[all]')
    parser.add_argument('--growth', nargs='+', type=int, default=(1, 2, 4), help='ours at multiples of the images '
                        '[1 2 4]')
    parser.add_argument('--repetitions', type=int, default=3, help='turns [%(default)s]')
    parser.add_argument('--device', default='cpu', help='of ours [%(default)s]')
    parser.add_argument('--child', help='used by the script itself')
    return parser.parse_args()


def main() -> None:
    args = get_args()
    if args.child:
        print(json.dumps(measure_here(*json.loads(args.child))))
        return
    result = {'benchmark': 'recall', 'num_images': args.num_images, 'device': args.device, 'exact': is_exact(args),
              'seconds': {}, 'mib': {}, 'ours_is_faster': {}, 'growth': {}}
    print(f'equal to float64 and a sort on 4,000 images with copies: {result["exact"]}')
    found = {method: [] for method in args.methods}
    for _ in range(args.repetitions):
        for method in args.methods:
            found[method].append(measure(method, args.num_images, args.num_classes, args))
    print(f'{"":<16}{"seconds":>9}{"MiB":>9}{"ours is":>10}  metrics')
    for method, turns in found.items():
        ours = found.get('ours, binary' if method == 'faiss, binary' else 'ours')
        result['seconds'][method] = round(median([turn['seconds'] for turn in turns]), 2)
        result['mib'][method] = round(max(turn['mib'] for turn in turns))
        faster = ''
        if ours:  # among --methods
            ratio = median([theirs['seconds'] / mine['seconds'] for theirs, mine in zip(turns, ours, strict=True)])
            result['ours_is_faster'][method], faster = round(ratio, 2), f'{ratio:.1f}x'
        shown = ', '.join(f'{name} {value:.2f}' for name, value in turns[0].items() if '@' in name)
        print(f'{method:<16}{result["seconds"][method]:>9.1f}{result["mib"][method]:>9.0f}{faster:>10}  {shown}')
    for growth in args.growth:
        turn = measure('ours', growth * args.num_images, growth * args.num_classes, args)
        result['growth'][growth] = {'seconds': round(turn['seconds'], 1), 'mib': round(turn['mib'])}
        print(f'{"ours":<16}{turn["seconds"]:>9.1f}{turn["mib"]:>9.0f}  at {growth} x the images', flush=True)
    finish(result)


if __name__ == '__main__':
    from utils import run_script

    run_script(main)
