"""What no test without a GPU can see, measured on one in under ten minutes: a table of eight rows, results/gpu.md.

    make gpu                                               # or: python benchmarks/bench_gpu.py
    python benchmarks/bench_gpu.py --device cpu --small    # tries the rows at a small size; its numbers mean nothing

1 to 3, a training step at 224 px: `theirs` is the loop that the five systems' pages print (float32, NCHW, PIL
transforms to float tensors, no cache, `.item()` in each step), ours train_one_epoch from the same files, from the
cache, from a tensor that is on the GPU already, and the same with --compile; images per second, medians of turns of at
least eight batches a worker. `decoding` is what the workers deliver to a loop that does nothing with it. 4, recall at
the size of SOP's test set, against the whole matrix with a top-1000. 5 and 6, a loss at many classes, against the
formula as it is written. 7, a run on glyph with --deterministic, and the same in two goes with --resume. 8, two
processes over NCCL against one. Memory is the peak above what was held before. Each row is a process of its own; one
that fails says why.
"""
import functools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from bench_common import REPOSITORY, machine, median, take_turns, write_photographs
from common.images import resize_for

SECONDS = 570  # for all rows: what is left of it is a row's limit
ROWS = {'resnet50': 'training step, ResNet50', 'inception': 'training step, BN-Inception',
        'timm:vit_small_patch16_224': 'training step, ViT-S', 'recall': 'recall, {images:,} images',
        'loss': 'proxy_anchor, 11,318 classes', 'large loss': 'proxy_anchor, {classes:,} classes',
        'deterministic': 'glyph, --deterministic, --resume', 'processes': 'glyph, two processes, NCCL'}
BATCHES_PER_WORKER = 8  # fewer would measure how the workers start
SIZES = {False: {'batch': 128, 'steps': 12, 'images': 60502, 'test_classes': 11316, 'classes': 10**6, 'pixels': 224,
                 'glyphs': ()},
         True: {'batch': 4, 'steps': 1, 'images': 3000, 'test_classes': 500, 'classes': 20000, 'pixels': 64,
                'glyphs': ('--glyph_classes', '12', '--glyph_images', '4')}}
GLYPH = ('--data_name', 'glyph', '--recipe', 'proxy_anchor', '--backbone_type', 'resnet18', '--weights', 'none',
         '--max_pool', '0', '--freeze_bn', '0', '--feature_dim', '128', '--image_size', '48', '--resize_size', '48',
         '--batch_size', '24', '--warm_up', '0', '--lr', '1e-3', '--lr_schedule', 'constant', '--min_crop', '0.8',
         '--flip', '0', '--on_collapse', 'warn', '--recalls', '1,2')


# ---------------------------------------------------- one row, in a process of its own ----------------------------
class Peak:
    """Memory of the GPU in MiB, above what is held where it is made; 0 without a GPU."""

    def __init__(self):
        import torch

        self.held = 0
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.held = torch.cuda.memory_allocated()

    def read(self) -> float:
        import torch

        return (torch.cuda.max_memory_allocated() - self.held) / 2**20 if torch.cuda.is_available() else 0.0


def seconds_of(step, repetitions: int = 5) -> float:
    """Return the median seconds of a step that waits for the GPU, after two that are not counted."""
    import torch

    def whole():
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    whole()
    return median(take_turns({'step': whole}, repetitions)['step'])


def num_batches(args, size: dict) -> int:
    """Return the batches of a turn."""
    return max(size['steps'], BATCHES_PER_WORKER * args.num_workers)


def decoding_step(photographs, settings, device):
    """Return a function that reads an epoch of training batches, and does nothing with them."""
    from imagedata.loading import BatchSampler, RetrievalDataset, make_loader, make_transform

    data = RetrievalDataset(photographs, 'train', make_transform(True, settings.image_size))
    sampler = BatchSampler(data.labels, settings.batch_size, drop_last=True)
    loader = make_loader(data, sampler, settings.num_workers, device)
    return lambda: [None for _ in loader]


def training_row(backbone: str, args, size: dict) -> dict:
    import torch
    from bench_train import our_step, seeds_step

    from imagedata.loading import open_data

    device = torch.device(args.device)
    settings = SimpleNamespace(image_size=size['pixels'], batch_size=size['batch'], num_workers=args.num_workers)
    photographs = open_data(args.folder, 'photographs')
    cached = open_data(args.folder, 'photographs', cache_size=resize_for(size['pixels']))
    if args.small:
        backbone = 'timm:test_vit' if 'vit' in backbone else 'resnet18'
    ours = functools.partial(our_step, backbone, args=settings, device=device)
    ways = {'theirs': lambda: seeds_step(backbone, photographs.root, photographs.split, settings, device),
            'files': lambda: ours(images=photographs)[0], 'cache': lambda: ours(images=cached)[0],
            'memory': lambda: ours(images=cached, feed='tensor')[0],
            'compiled': lambda: ours(images=cached, feed='tensor', compiled=True)[0],
            'decoding': lambda: decoding_step(photographs, settings, device)}
    steps, peaks, first = {}, {}, {}
    for name, build in ways.items():
        peak, steps[name] = Peak(), build()
        start = time.perf_counter()
        steps[name]()
        first[name], peaks[name] = time.perf_counter() - start, peak.read()
    seconds = take_turns(steps, 2)
    images = size['batch'] * num_batches(args, size)
    rates = {name: images / median(values) for name, values in seconds.items()}
    compiling = first['compiled'] - median(seconds['compiled'])
    ours = (f'{rates["files"]:,.0f} img/s from files, {rates["cache"]:,.0f} from the cache, {rates["memory"]:,.0f} '
            f'from memory, {rates["compiled"]:,.0f} compiled ({compiling:.0f} s)')
    note = (f'batch {size["batch"]}, {size["pixels"]} px, {args.num_workers} workers; decoding '
            f'{rates["decoding"]:,.0f} img/s; from memory {rates["memory"] / rates["theirs"]:.1f} x')
    return {'theirs': f'{rates["theirs"]:,.0f} img/s', 'ours': ours, 'faster': rates['files'] / rates['theirs'],
            'note': note, 'mib': peaks['memory'], 'their_mib': peaks['theirs']}


def recall_row(args, size: dict) -> dict:
    import torch
    from bench_recall import RECALLS, full_matrix, make_features

    from retrieval.metrics import retrieval_metrics

    features, labels = (tensor.to(args.device) for tensor in make_features(size['images'], size['test_classes'], 512))
    found, seconds, peaks = {}, {}, {}
    for name, call in (('ours', lambda: retrieval_metrics(features, labels, recalls=RECALLS)),
                       ('binary', lambda: retrieval_metrics(features, labels, recalls=RECALLS, binary=True)),
                       ('theirs', lambda: full_matrix(features, labels))):
        peak = Peak()
        try:
            found[name], peaks[name], seconds[name] = call(), peak.read(), seconds_of(call, 3)
        except torch.cuda.OutOfMemoryError:
            found[name] = None
    row = {'ours': f'{seconds["ours"]:.2f} s, binary {seconds["binary"]:.2f} s', 'mib': peaks['ours'],
           'note': f'R@1 {found["ours"]["R@1"]:.4f}'}
    if found['theirs'] is None:
        return {**row, 'theirs': 'does not fit'}
    return {**row, 'theirs': f'{seconds["theirs"]:.2f} s', 'their_mib': peaks['theirs'],
            'faster': seconds['theirs'] / seconds['ours'],
            'note': f'{row["note"]}, theirs {found["theirs"]["R@1"]:.4f}'}


def loss_row(num_classes: int, args) -> dict:
    import torch
    from bench_loss import Naive
    from torch.nn import functional as F

    from model import make_loss

    torch.manual_seed(0)
    embeddings = F.normalize(torch.randn(180, 512), dim=1).to(args.device).requires_grad_()
    labels = torch.randint(num_classes, (180,)).to(args.device)
    seconds, peaks, values = {}, {}, {}
    for name in ('ours', 'theirs'):
        criterion = (make_loss('proxy_anchor', num_classes=num_classes, feature_dim=512) if name == 'ours' else
                     Naive('proxy_anchor', num_classes, 512)).to(args.device)
        if name == 'ours':
            proxies = criterion.proxies.data
        else:
            criterion.proxies.data = proxies

        def step(criterion=criterion, name=name) -> None:
            criterion.zero_grad(set_to_none=True)
            loss = criterion(embeddings, labels)
            loss.backward()
            values[name] = loss.item()

        peak = Peak()
        try:
            step()
            peaks[name], seconds[name] = peak.read(), seconds_of(step)
        except torch.cuda.OutOfMemoryError:
            return {'theirs': 'does not fit', 'ours': f'{1e3 * seconds["ours"]:.1f} ms', 'mib': peaks['ours']}
        del criterion, step
    return {'theirs': f'{1e3 * seconds["theirs"]:.1f} ms', 'ours': f'{1e3 * seconds["ours"]:.1f} ms',
            'faster': seconds['theirs'] / seconds['ours'], 'mib': peaks['ours'], 'their_mib': peaks['theirs'],
            'note': f'forward and backward of 180 embeddings; loss {values["ours"]:.5f}, theirs {values["theirs"]:.5f}'}


def train_glyph(args, folder: str, *words: str, processes: int = 1) -> tuple:
    """Train on glyph by the command line; returns its statistics and its seconds."""
    from training.statistics import read_statistics

    start = time.perf_counter()
    launcher = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(processes)]
    subprocess.run([sys.executable, *(launcher if processes > 1 else ()), REPOSITORY / 'train.py', '--data_path',
                    args.folder, *GLYPH, '--device', args.device, '--num_workers', '2', '--results_dir',
                    Path(args.folder) / folder, *words], check=True, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    return read_statistics(next((Path(args.folder) / folder).glob('*_statistics.csv'))), seconds


def deterministic_row(args, _size: dict) -> dict:
    whole, seconds = train_glyph(args, 'whole', '--num_epochs', '2', '--deterministic')
    train_glyph(args, 'halves', '--num_epochs', '1', '--deterministic')
    halves, _ = train_glyph(args, 'halves', '--num_epochs', '2', '--deterministic', '--resume')
    same = [column for column in whole if column.startswith(('loss', 'accuracy', 'dense', 'binary'))]
    equal = whole[same].equals(halves[same])
    return {'ours': f'R@1 {whole["dense_R@1"].iloc[-1]:.2f} after 2 epochs, {seconds:.0f} s',
            'note': f'1 epoch and --resume: {"the same to the last digit" if equal else "NOT the same"}', 'ok': equal}


def processes_row(args, _size: dict) -> dict:
    import torch

    if args.device != 'cpu' and torch.cuda.device_count() < 2:
        return {'ours': '-', 'note': 'not run: one GPU'}
    one, seconds = train_glyph(args, 'one', '--num_epochs', '1', '--amp', 'off', '--freeze_bn', '1')
    two, both = train_glyph(args, 'two', '--num_epochs', '1', '--amp', 'off', '--freeze_bn', '1', processes=2)
    off = abs(two['loss'].iloc[-1] / one['loss'].iloc[-1] - 1)
    shown = [f'loss {table["loss"].iloc[-1]:.5f}, {table["img_s"].iloc[-1]:,.0f} img/s, {time_taken:.0f} s'
             for table, time_taken in ((one, seconds), (two, both))]
    return {'theirs': f'one process: {shown[0]}', 'ours': shown[1],
            'note': f'losses differ by {off:.1e} of their value', 'ok': bool(off < 0.05)}


def measure_row(name: str, args, size: dict) -> dict:
    """Measure one row in this process."""
    calls = {'recall': recall_row, 'deterministic': deterministic_row, 'processes': processes_row,
             'loss': lambda args, size: loss_row(11318 if not args.small else 1000, args),
             'large loss': lambda args, size: loss_row(size['classes'], args)}
    return calls.get(name, functools.partial(training_row, name))(args, size)


# ---------------------------------------------------- the table ---------------------------------------------------
def make_data(args, folder: str, size: dict) -> None:
    """Make the photographs and the glyphs that the rows train on."""
    write_photographs(Path(folder) / 'photographs', 2 * size['batch'] * num_batches(args, size), (500, 375))
    cache = ('--cache_size', str(resize_for(size['pixels'])))
    for name, words in (('photographs', cache), ('glyph', size['glyphs'])):
        subprocess.run([sys.executable, REPOSITORY / 'data_utils.py', '--data_path', folder, '--data_name', name,
                        *words], check=True, capture_output=True)


def row_of_child(name: str, args, folder: str, seconds: float) -> dict:
    """Measure a row in a fresh process; where it fails or takes too long, the row says so."""
    words = [sys.executable, __file__, '--device', args.device, '--num_workers', str(args.num_workers), '--row', name,
             '--folder', folder, *(['--small'] if args.small else [])]
    try:
        result = subprocess.run(words, capture_output=True, text=True, check=True, timeout=max(1, seconds))
        return json.loads(result.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired as error:
        return {'ours': f'not done in {error.timeout:.0f} s', 'ok': False}
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if line.strip()]
        return {'ours': 'FAILED', 'note': (lines or ['without a word'])[-1][:200].replace('|', '/'), 'ok': False}


def format_row(title: str, row: dict) -> str:
    faster = f'{row["faster"]:.1f} x' if 'faster' in row else ''
    mib = f'{row["mib"]:,.0f}' + (f' ({row["their_mib"]:,.0f})' if 'their_mib' in row else '') if 'mib' in row else ''
    return f'| {title} | {row.get("theirs", "")} | {row["ours"]} | {faster} | {mib} | {row.get("note", "")} |'


def get_args():
    from utils import Parser, user_path

    parser = Parser(description=__doc__)
    parser.add_argument('--device', default='cuda', help='[%(default)s]')
    parser.add_argument('--output', type=user_path, default=str(REPOSITORY / 'results/gpu.md'), help='Markdown file '
                        '[results/gpu.md]')
    parser.add_argument('--num_workers', type=int, default=8, help='processes that decode images, of both loops '
                        '[%(default)s]')
    parser.add_argument('--small', action='store_true', help='try the rows at a small size')
    parser.add_argument('--row', choices=ROWS, help='used by the script itself')
    parser.add_argument('--folder', help='used by the script itself')
    return parser.parse_args()


def main() -> None:
    args = get_args()
    from common.files import MADE_HERE, check_replaceable

    size = SIZES[args.small]
    if args.row:
        print(json.dumps(measure_row(args.row, args, size)))
        return
    import torch

    from common.errors import UserError
    from common.files import write_atomically

    if args.device != 'cpu' and not torch.cuda.is_available():
        raise UserError('this measures a GPU, and torch finds no CUDA device on this machine; run it where one is')
    output, start = check_replaceable(Path(args.output)), time.perf_counter()
    about = machine()
    lines = [f'<!-- {MADE_HERE} -->', '# On a GPU', '', f'{about["gpu"] or "no GPU"} ({torch.cuda.device_count()}), '
             f'{about["cpu"]}, {about["cores"]} cores, Python {about["python"]}, torch {about["torch"]}, '
             f'torchvision {about["torchvision"]}; {args.num_workers} workers'
             f'{", AT A SMALL SIZE" if args.small else ""}.', '',
             '| | theirs | ours | faster by | peak MiB (theirs) | |', '|---|---|---|---|---|---|']
    print('\n'.join(lines[2:]), flush=True)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        make_data(args, folder, size)
        for name, title in ROWS.items():
            row = row_of_child(name, args, folder, SECONDS - (time.perf_counter() - start))
            failed += not row.get('ok', True)
            lines.append(format_row(title.format(**size), row))
            print(lines[-1], flush=True)
    lines += ['', f'In {time.perf_counter() - start:.0f} s. `benchmarks/bench_gpu.py` says what each row is.', '']
    write_atomically(output, lambda file: file.write('\n'.join(lines).encode()))
    print(f'written: {output}')
    if failed:
        raise UserError(f'{failed} of the {len(ROWS)} rows failed; see {output}')


if __name__ == '__main__':
    from utils import run_script

    run_script(main)
