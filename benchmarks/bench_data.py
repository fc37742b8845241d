"""Images per second and core: decoding each file (PIL) against the cache of uint8 pixels (train.py --cache_size).

    python benchmarks/bench_data.py                                            # JPEG files made with a fixed seed
    python benchmarks/bench_data.py --data_path /home/data --data_name cub     # your own, converted already

One thread, no workers; both take turns over the same images, with the training transform (random crop of 224 px, flip)
and with that of the test (short side 256, centre crop). `decode` is what the five systems' pages do. Memory is by how
much the process's own (RssAnon) grows when it opens the cache once more and reads all of it: the map's pages belong to
the system and are shared by all workers. `first batch` is how long an epoch waits for its first batch, of 32 images
from two workers: where they start with the epoch, and where they start before the last epoch is measured, as in
train.py. Ends with one line of JSON.
"""
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_common import finish, median, take_turns, write_photographs


def own_memory() -> float:
    """Return the anonymous resident memory of this process in MB."""
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith('RssAnon')) / 1e3


def seconds_to_first_batch(data, image_size: int, seconds_ahead: float) -> float:
    """Return how long an epoch waits for its first batch if its workers start some seconds before it begins."""
    import torch

    from imagedata.loading import BatchSampler, RetrievalDataset, make_loader, make_transform
    from train import start_batches

    images = RetrievalDataset(data, 'train', make_transform(True, image_size))
    loader = make_loader(images, BatchSampler(images.labels, 32, drop_last=True), 2, torch.device('cpu'))
    list(start_batches(loader, 1))  # starts the workers
    begun = time.perf_counter()
    batches = start_batches(loader, 2)
    time.sleep(seconds_ahead)
    next(batches)
    return time.perf_counter() - begun - seconds_ahead


def get_args():
    from utils import Parser

    parser = Parser(description=__doc__)
    parser.add_argument('--data_path', help='folder that holds the data sets [a temporary one]')
    parser.add_argument('--data_name', default='photographs', help='data set [%(default)s]')
    parser.add_argument('--num_images', type=int, default=512, help='images that are read in a turn [%(default)s]')
    parser.add_argument('--image_size', type=int, default=224, help='side of the crop in pixels [%(default)s]')
    parser.add_argument('--cache_size', type=int, default=256, help='short side in the cache in pixels [%(default)s]')
    parser.add_argument('--repetitions', type=int, default=5, help='turns [%(default)s]')
    return parser.parse_args()


def main() -> None:
    args = get_args()
    import torch

    from imagedata.loading import RetrievalDataset, make_transform, open_data

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data_path = args.data_path or folder
        if args.data_path is None:
            write_photographs(Path(folder) / args.data_name, 2 * args.num_images, (500, 375))
        subprocess.run([sys.executable, Path(__file__).parent.parent / 'data_utils.py', '--data_path', data_path,
                        '--data_name', args.data_name, '--cache_size', str(args.cache_size)], check=True)
        data = open_data(data_path, args.data_name, cache_size=args.cache_size)
        cache = data.cache
        result = {'benchmark': 'data', 'cache_MB': round(cache.total / 1e6, 1), 'img_s': {}, 'ratio': {}}
        print(f'{"img/s on one core":<20}{"decode":>10}{"cache":>10}{"ratio":>8}')
        for name, training in (('training', True), ('test', False)):
            transform = make_transform(training, args.image_size, args.cache_size)
            sets = {source: RetrievalDataset(data._replace(cache=found), 'train', transform)
                    for source, found in (('decode', None), ('cache', cache))}
            count = min(args.num_images, len(sets['decode']))
            seconds = take_turns({source: lambda part=images, count=count: [part[index] for index in range(count)][:0]
                                  for source, images in sets.items()}, args.repetitions)
            speeds = {source: count / median(values) for source, values in seconds.items()}
            ratio = median([a / b for a, b in zip(seconds['decode'], seconds['cache'], strict=True)])
            print(f'{name:<20}{speeds["decode"]:>10.0f}{speeds["cache"]:>10.0f}{ratio:>8.2f}')
            result['img_s'][name] = {source: round(speed, 1) for source, speed in speeds.items()}
            result['ratio'][name] = round(ratio, 2)
        before = own_memory()
        cache = open_data(data_path, args.data_name, cache_size=args.cache_size).cache  # none of it is read yet
        count = sum(1 for image in map(cache.read, cache.entries) if image.shape[0] == 3)
        result['own_memory_MB'] = round(own_memory() - before, 1)
        print(f'read {count:,} images of a cache of {result["cache_MB"]:,} MB; own memory grew by '
              f'{result["own_memory_MB"]} MB')
        files = data._replace(cache=None)
        waits = [[seconds_to_first_batch(files, args.image_size, ahead) for ahead in (0.0, 5.0)]
                 for _ in range(args.repetitions)]
        result['first_batch_s'] = [round(median(values), 3) for values in zip(*waits, strict=True)]
        print('first batch after {:.2f} s, {:.3f} s if its workers started 5 s before'.format(*result['first_batch_s']))
    finish(result)


if __name__ == '__main__':
    from utils import run_script

    run_script(main)
