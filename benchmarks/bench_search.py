"""What embedding costs beside the model alone, and a search in 10^5 and 10^6 images.

    python benchmarks/bench_search.py                      # about a quarter of an hour, 3 GB of memory
    python benchmarks/bench_search.py --num_images 64 --sizes 20000

`embed` is what embed.py does with JPEG files of 500 x 375 px, from the files to the features; `model` the same network
on batches that lie in memory, in turns with it. A search is that of test.py (`file`: float16 features, as they were
loaded) and that of serve.py (`resident`: with a second copy in bfloat16, where the processor multiplies it fast), of
one query and of 16 at once, in a process of its own; memory is its peak, that of the imports taken off. Features are
made with a fixed seed, around class means, 512 numbers. Ends with one line of JSON.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_common import finish, median, take_turns, write_photographs

DIM, CLASS = 512, 50  # numbers, images a class


def make_data_base(file: Path, count: int) -> None:
    """Write a collection of made float16 features."""
    import torch

    from retrieval.database import DataBase, Sources, Subset

    generator, features = torch.Generator().manual_seed(0), torch.empty(count, DIM, dtype=torch.float16)
    means = torch.randn(count // CLASS, DIM, generator=generator)
    for start in range(0, count, 50_000):
        rows = torch.arange(start, min(start + 50_000, count))
        made = means[rows % len(means)] + 2.15 * torch.randn(len(rows), DIM, generator=generator)
        features[rows] = torch.nn.functional.normalize(made, dim=1).half()
    settings = {'data_name': 'made', 'crop_type': 'uncropped', 'batch_size': 64, 'resize_size': 256, 'amp': 'auto',
                'recalls': [1]}
    images = [f'{number // 1000:04d}/{number:07d}.jpg' for number in range(count)]
    zeros = torch.zeros(count, dtype=torch.int64)
    sources = Sources(['/photos'], zeros, zeros, '0' * 64, {})
    DataBase(['made'], Subset(images, zeros, features), origin={'args': settings},
             sizes={'test': [0] * count}, sources=sources).save(file)


def peak_memory() -> float:
    """Return the most memory that this process has held, MB; getrusage counts that of its parent too."""
    return int(re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())[1]) / 1024


def measure_search(file: Path, resident: bool) -> dict:
    """Load a data base and search in it; called in a process of its own."""
    import torch

    from retrieval.database import load_data_base
    from retrieval.nearest import Nearest

    before = peak_memory()
    start = time.perf_counter()
    features = load_data_base(file).test.features
    nearest = Nearest(features, resident)
    found = {'load_s': time.perf_counter() - start}
    generator, answered = torch.Generator().manual_seed(1), []
    for number in (1, 16):
        rows = torch.randint(len(features), (number,), generator=generator)
        queries = torch.nn.functional.normalize(
            features[rows].float() + 0.05 * torch.randn(number, DIM, generator=generator), dim=1)
        seconds = take_turns({'search': lambda queries=queries: nearest.search(queries, 20)}, 7)['search']
        answered += zip(queries, nearest.search(queries, 20), strict=True)
        found[f'search_{number}_s'] = median(seconds)
    found['memory_mb'] = peak_memory() - before  # what follows takes more
    for query, answer in answered:
        whole = torch.cat([part.double() @ query.double() for part in features.split(2**16)])
        assert [row for row, _ in answer] == whole.topk(20).indices.tolist()
    return found


def measure_embedding(folder: Path, count: int, backbone_type: str, repetitions: int) -> dict:
    """Return images per second of embed.py's loop and of the network alone."""
    import torch

    from embed import embed_items
    from imagedata.folders import scan_images
    from model import EmbeddingNet, NetConfig
    from retrieval.collection import CollectionItem, FileCollection
    from common.distributed import use_amp

    write_photographs(folder / 'photos', count, (500, 375))
    device = torch.device('cpu')
    network = EmbeddingNet(NetConfig(backbone_type, DIM), 'none').to(memory_format=torch.channels_last).eval()
    settings = {'batch_size': 64, 'resize_size': 256, 'amp': 'auto', 'data_name': 'made', 'crop_type': 'uncropped',
                'recalls': [1]}
    photographs = scan_images(folder / 'photos')[0]
    items = [CollectionItem(str(folder / 'photos'), path, '', *stamp) for path, stamp in photographs.items()]
    images = torch.randint(0, 256, (64, 3, 224, 224), dtype=torch.uint8)
    calls = []

    def embed() -> None:
        calls.append(1)
        collection = FileCollection(folder / f'{len(calls)}.pth', {'args': settings}, '0' * 64)
        embed_items(items, collection, network, settings, 2, device)
        collection.finish()

    def model() -> None:
        with torch.inference_mode(), torch.autocast('cpu', torch.bfloat16, enabled=use_amp('auto', device)):
            for start in range(0, count, 64):
                network(images[:min(64, count - start)])

    seconds = take_turns({'model': model, 'embed': embed}, repetitions)
    shares = [one / other for one, other in zip(seconds['model'], seconds['embed'], strict=True)]
    return {'backbone_type': backbone_type, 'images': count, 'share_of_model': median(shares),
            **{f'{name}_img_s': count / median(values) for name, values in seconds.items()}}


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--num_images', type=int, default=384, help='photographs to embed [%(default)s]')
    parser.add_argument('--backbone_type', default='resnet50', help='[%(default)s]')
    parser.add_argument('--repetitions', type=int, default=3, help='of embedding [%(default)s]')
    parser.add_argument('--sizes', type=int, nargs='*', default=[10**5, 10**6], help='images to search in')
    parser.add_argument('--search', nargs=2, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    args = get_parser().parse_args()
    if args.search:
        print(json.dumps(measure_search(Path(args.search[0]), args.search[1] == 'resident')))
        return
    result = {'searches': []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.num_images:
            result['embedding'] = measure_embedding(folder, args.num_images, args.backbone_type, args.repetitions)
            print(json.dumps(result['embedding']))
        for count in args.sizes:
            file = folder / f'{count}.pth'
            make_data_base(file, count)
            for kind in ('file', 'resident'):
                done = subprocess.run([sys.executable, __file__, '--search', file, kind], env=os.environ, check=True,
                                      capture_output=True, text=True)
                found = {'images': count, 'kind': kind, 'file_mb': file.stat().st_size / 1e6, **json.loads(done.stdout)}
                result['searches'].append(found)
                print(f'{count:>9,} {kind:<9}' + ''.join(f'{key} {value:.3g}  ' for key, value in found.items()
                                                         if isinstance(value, float)))
            file.unlink()
    finish(result)


if __name__ == '__main__':
    main()
