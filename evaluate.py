"""Measure retrieval: Recall@K (dense and binary), MAP@R and R-precision, of a model, a data base, or a bare trunk.

    python evaluate.py --data_base results/car_resnet50_balanced_proxy_512_data_base.pth
    python evaluate.py --resume results/car_resnet50_balanced_proxy_512_model.pth --data_path /home/data
    python evaluate.py --zero_shot --data_path /home/data --data_name cub --backbone_type resnet50

`--data_base` measures the features that a training run saved; `--resume` embeds the test images again with a run's
model; `--zero_shot` measures the pooled features of a pretrained trunk, from which a training starts.
All numbers are per cent; what they mean stands in metrics.py.
"""
import json
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from data_utils import RetrievalDataset, batches, check_paths, end_with_parent, make_transform, read_split
from metrics import COUNTS, retrieval_metrics
from model import EmbeddingNet
from recipes import POOLINGS, canonical_backbone, resize_for
from utils import (Parser, UserError, bfloat16_is_fast, canonical_data_name, gather_rows, gpu_id, int_list, load,
                   nearest, progress, run_script, select_device, shard, start_processes)

# Flags of the command line: of embedding images, and of the trunk, which --resume takes from the model.
EMBED_FLAGS = ('data_path', 'data_name', 'crop_type', 'batch_size', 'num_workers', 'amp', 'resize_size')
TRUNK_FLAGS = ('backbone_type', 'image_size', 'pooling', 'feature_dim')


# ---------------------------------------------------- embeddings -----------------------------------------------------
def use_amp(choice: str, device: torch.device, model: EmbeddingNet, training: bool) -> bool:
    """Decide whether to compute in bfloat16: `on`, `off`, or `auto`: where the device is fast at it.

    Depthwise convolutions are the exception: on a CPU their backward is slower in bfloat16 than in float32, their
    forward is not.
    """
    if choice != 'auto':
        return choice == 'on'
    depthwise = any(isinstance(module, torch.nn.Conv2d) and module.groups > 1 for module in model.modules())
    return bfloat16_is_fast(device) and not (training and depthwise and device.type == 'cpu')


def make_loader(dataset: RetrievalDataset, batch_size: int, num_workers: int, device: torch.device) -> DataLoader:
    """Build a loader that goes through a data set in its order; each process gets its share of the batches.

    Whole batches are shared, since the last bits of an embedding can depend on the size of its batch.
    """
    batches = [range(start, min(start + batch_size, len(dataset))) for start in range(0, len(dataset), batch_size)]
    own = [batches[number] for number in shard(len(batches))]
    return DataLoader(dataset, batch_sampler=own, num_workers=num_workers, pin_memory=device.type == 'cuda',
                      persistent_workers=num_workers > 0, worker_init_fn=end_with_parent, generator=torch.Generator())


@torch.inference_mode()
def extract_embeddings(model: EmbeddingNet, loader: DataLoader, device: torch.device, amp: bool) -> torch.Tensor:
    """Embed the images of a loader in their order; returns (N, D) float32 on the CPU, of all processes."""
    model.eval()
    embeddings = [torch.zeros(0, model.feature_dim, device=device)]  # a process may have no batch
    for images, _ in progress(batches(loader), desc='embed', total=len(loader)):
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            embeddings.append(model(images.to(device, non_blocking=True)))
    return gather_rows(torch.cat(embeddings)).cpu()


def make_test_loaders(root: Path, split: dict, transform, batch_size: int, num_workers: int,
                      device: torch.device, cache=None) -> dict[str, DataLoader]:
    """Return {'test': loader}, or {'test': loader of the queries, 'gallery': loader} where there is a gallery."""
    subsets = {'test': split['test']} if 'test' in split else {'test': split['query'], 'gallery': split['gallery']}
    names = dict.fromkeys(label for classes in subsets.values() for label in classes)
    labels = {label: number for number, label in enumerate(names)}
    return {subset: make_loader(RetrievalDataset(root, classes, transform, class_names=split['class_names'],
                                                 labels=labels, cache=cache), batch_size, num_workers, device)
            for subset, classes in subsets.items()}


def make_data_base(model: EmbeddingNet, loaders: dict[str, DataLoader], device: torch.device, amp: bool) -> dict:
    """Embed the test images (queries and gallery) and gather paths, labels, features and class names."""
    data_base = {'class_names': next(iter(loaders.values())).dataset.class_names}
    for subset, loader in loaders.items():
        data_base[f'{subset}_images'] = loader.dataset.images
        data_base[f'{subset}_labels'] = torch.tensor(loader.dataset.labels)
        data_base[f'{subset}_features'] = extract_embeddings(model, loader, device, amp)
    return data_base


def measure(data_base: dict, recalls: tuple[int, ...], device: torch.device) -> dict[str, dict[str, float]]:
    """Return {'dense': metrics, 'binary': metrics} of a data base, computed on `device` (the CPU in place of MPS)."""
    device = torch.device('cpu') if device.type == 'mps' else device  # MPS has no float64
    tensors = [data_base.get(f'{subset}_{kind}') for subset in ('test', 'gallery') for kind in ('features', 'labels')]
    tensors = [tensor if tensor is None else tensor.to(device) for tensor in tensors]
    return {kind: retrieval_metrics(*tensors, recalls=recalls, binary=kind == 'binary') for kind in ('dense', 'binary')}


# ---------------------------------------------------- files of a run -------------------------------------------------
def load_model(path: str | Path, device: torch.device) -> tuple[EmbeddingNet, dict]:
    """Build the network of a run from its `{run}_model.pth`; returns it and the file's contents.

    Raises:
        UserError: if the file is missing, corrupt, or no model of this project.
    """
    contents = load(path, 'model', ('config', 'state_dict', 'args'))
    check_run(path, contents['args'])
    config = contents['config']
    try:
        if not (0 <= config['feature_dim'] <= 65536 and 0 < config['image_size'] <= 8192):  # before memory is asked for
            raise ValueError('a size that no training accepts')
        model = EmbeddingNet(**config, weights='none')
        model.load_state_dict(contents['state_dict'])
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f'{path} does not fit its own description ({str(error).splitlines()[0][:120]}); it was damaged '
                        'or made by another version') from None
    return model.to(device, memory_format=torch.channels_last).eval(), contents


def check_run(path: str | Path, run) -> None:
    """Check the settings of a run that its files carry, as far as they are used after the training.

    Raises:
        UserError: naming the first that is not what it should be.
    """
    fits = {'data_name': lambda value: isinstance(value, str) and value == canonical_data_name(value),
            'crop_type': lambda value: value in ('uncropped', 'cropped'),
            'batch_size': lambda value: isinstance(value, int) and value > 0,
            'resize_size': lambda value: isinstance(value, int) and 0 < value <= 8192,
            'amp': lambda value: value in ('auto', 'on', 'off'),
            'recalls': lambda value: all(isinstance(k, int) and k > 0 for k in value) and list(value) == sorted(value)
            and len(value) > 0}
    for name, is_right in fits.items():
        try:
            right = is_right(run[name])
        except (TypeError, KeyError, IndexError, UserError):
            right = False
        if not right:
            raise UserError(f'{path}: its settings lack a sound {name}; it was damaged, or made by another program')


def find_data_base(name: str, results_dir: str) -> Path:
    """Return the file of a data base: as it is named, or in the results folder."""
    file = Path(name) if Path(name).is_file() else Path(results_dir) / name
    if not file.is_file():
        there = sorted(path.name for path in Path(results_dir).glob('*_data_base.pth'))
        raise UserError(f'--data_base {name} is neither a file nor in {results_dir}{nearest(name, there)} (there are: '
                        f'{", ".join(there) or "none; train first"})')
    return file


def load_data_base(path: str | Path) -> dict:
    """Load a data base and check that its parts fit each other.

    Raises:
        UserError: if the file is missing, corrupt, empty, or no data base of this project.
    """
    data_base = load(path, 'data base', ('test_images', 'test_labels', 'test_features', 'class_names', 'args'))
    check_run(path, data_base['args'])
    names = data_base['class_names']
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f'{path}: class_names is no list of names; train again')
    has_gallery = any(key.startswith('gallery_') for key in data_base)
    for subset in ('test', 'gallery') if has_gallery else ('test',):
        images, labels, features = (data_base.get(f'{subset}_{kind}') for kind in ('images', 'labels', 'features'))
        fits = (isinstance(images, list) and all(isinstance(image, str) for image in images)
                and torch.is_tensor(labels) and torch.is_tensor(features)
                and features.layout == labels.layout == torch.strided
                and features.is_contiguous() and labels.is_contiguous() and not features.requires_grad
                and features.device.type == 'cpu' and features.ndim == 2 and features.shape[1] > 0
                and features.is_floating_point() and labels.dtype == torch.int64
                and features.shape[1] == data_base['test_features'].shape[1]
                and labels.shape == (len(images),) == (len(features),))
        if not fits or not images:
            raise UserError(f'{path}: the {subset} images, labels and features do not belong together or are empty; '
                            'train again')
        if (torch.linalg.vector_norm(features.double(), dim=1) > 1.01).any():  # of NaN metrics.py tells the number
            raise UserError(f'{path}: the {subset} features are no unit rows, so that their products are no cosines; '
                            'train again')
        check_paths(path, images)
        if int(labels.min()) < 0 or int(labels.max()) >= len(names):
            raise UserError(f'{path}: a label of {subset} has no class name; train again')
    return data_base


def format_table(results: dict[str, dict[str, float]]) -> str:
    """Format {'dense': metrics, 'binary': metrics} as a table of per cents."""
    columns = [key for key in results['dense'] if key not in COUNTS]
    widths = {column: max(9, len(column) + 2) for column in columns}
    lines = [' ' * 8 + ''.join(f'{column:>{widths[column]}}' for column in columns)]
    for kind, metrics in results.items():
        lines.append(f'{kind:<8}' + ''.join(f'{metrics[column]:{widths[column]}.2f}' for column in columns))
    dense = results['dense']
    left_out = f', {dense["without_positive"]:,} without a positive left out' if dense['without_positive'] else ''
    return '\n'.join([*lines, f'{dense["queries"]:,} queries{left_out}'])


def describe_origin(contents: dict) -> str:
    """Say in a line how a model or data base was made: run, seed, epoch, code, versions, device."""
    run, made = contents['args'], contents.get('made_with')
    made = made if isinstance(made, dict) else {}  # of a file that others wrote
    changed = {'yes': ' with changes', 'no': '', 'unknown': ''}.get(str(made.get('changed_since')), '')
    return (f'{run.get("run", "a run without a name")}: recipe {run.get("recipe")}, seed {run.get("seed")}, epoch '
            f'{contents.get("epoch")}; code {str(made.get("commit"))[:12]}{changed}, torch {made.get("torch")}, '
            f'torchvision {made.get("torchvision")}, {made.get("device")}')


# ---------------------------------------------------- command line ---------------------------------------------------
def get_args(argv: list[str] | None = None):
    """Parse the command line; a flag that does not belong to the chosen source is an error."""
    parser = Parser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument('--data_base', metavar='FILE', help='measure the features of a data base')
    source.add_argument('--resume', metavar='FILE', help='embed the test images with the model of a run')
    source.add_argument('--zero_shot', action='store_true', help='measure a pretrained trunk without any training')
    parser.add_argument('--data_path', help='folder that holds the data sets [/home/data]')
    parser.add_argument('--data_name', '--dataset', help='data set [that of the model; car for --zero_shot]')
    parser.add_argument('--crop_type', choices=('uncropped', 'cropped'), help='which split file [that of the model]')
    parser.add_argument('--backbone_type', '--model', help='trunk, or timm:MODEL [that of the model; resnet50]')
    parser.add_argument('--weights', help='of the trunk for --zero_shot: imagenet or a file [imagenet]')
    parser.add_argument('--pooling', choices=POOLINGS,
                        help='of the trunk for --zero_shot [avg]; must agree with the model of --resume')
    parser.add_argument('--feature_dim', '--embedding-size', type=int, help='must agree with the model of --resume')
    parser.add_argument('--image_size', type=int, help='side of the centre crop in pixels for --zero_shot [224]; must '
                        'agree with the model of --resume')
    parser.add_argument('--resize_size', type=int,
                        help='short side before the crop [that of the model; image_size x 256/224]')
    parser.add_argument('--batch_size', '--batch-size', type=int, help="images embedded at once [the model's; 64]")
    parser.add_argument('--num_workers', '--workers', type=int, help='processes that decode images [2]')
    parser.add_argument('--amp', choices=('auto', 'on', 'off'), help='embed in bfloat16 [that of the model; auto]')
    parser.add_argument('--recalls', type=int_list, help='values of K [those of the run; 1,2,4,8]')
    parser.add_argument('--device', default='auto', help='auto, cpu, mps, cuda, cuda:N [%(default)s]')
    parser.add_argument('--gpu_id', '--gpu-id', type=gpu_id, dest='device', metavar='N',
                        help='Proxy Anchor\'s spelling of --device cuda:N; -1 or a machine without a GPU: the CPU')
    parser.add_argument('--json', action='store_true', help='print one line of JSON instead of a table')
    args = parser.parse_args(argv)
    chosen = '--zero_shot' if args.zero_shot else '--resume' if args.resume is not None else '--data_base'
    useless = {'--data_base': EMBED_FLAGS + TRUNK_FLAGS + ('weights',), '--resume': ('weights',),
               '--zero_shot': ('feature_dim',)}[chosen]
    for flag in useless:
        if getattr(args, flag) is not None:
            raise UserError(f'--{flag} has no effect with {chosen}; leave it out')
    for flag, smallest, largest in (('batch_size', 1, 2**31), ('num_workers', 0, 1024), ('image_size', 16, 8192),
                                    ('resize_size', 16, 8192)):
        if getattr(args, flag) is not None and not smallest <= getattr(args, flag) <= largest:
            raise UserError(f'--{flag} {getattr(args, flag)} must lie between {smallest} and {largest}')
    return args


def embed_for(args, model: EmbeddingNet, run: dict, device: torch.device) -> dict:
    """Embed the test images that the command line names, with the settings of the run where it names none."""
    def setting(name, default):
        given = getattr(args, name)
        return given if given is not None else run.get(name, default)

    data_name = canonical_data_name(setting('data_name', 'car'))
    root, split = read_split(args.data_path or '/home/data', data_name, setting('crop_type', 'uncropped'))
    image_size = model.config['image_size']
    resize_size = setting('resize_size', None) or resize_for(image_size)
    if resize_size < image_size:
        raise UserError(f'--resize_size {resize_size} must be at least the image size, {image_size}')
    transform = make_transform(False, image_size, resize_size, model.interpolation)
    num_workers = args.num_workers if args.num_workers is not None else 2
    loaders = make_test_loaders(root, split, transform, setting('batch_size', 64), num_workers, device)
    return make_data_base(model, loaders, device, use_amp(setting('amp', 'auto'), device, model, training=False))


def main() -> None:
    """Measure what the command line names and print a table or JSON."""
    args = get_args()
    device = select_device(start_processes(args.device))
    if args.data_base is not None:
        data_base = contents = load_data_base(args.data_base)
        run = data_base['args']
    elif args.resume is not None:
        model, contents = load_model(args.resume, device)
        run = contents['args']
        for flag in TRUNK_FLAGS:
            given = getattr(args, flag)
            given = canonical_backbone(given) if flag == 'backbone_type' and given else given
            if given is not None and given != model.config[flag]:
                raise UserError(f'--{flag} {given} is not that of {args.resume} ({model.config[flag]}); leave it out')
        data_base = embed_for(args, model, run, device)
    else:
        run, contents = {}, None
        model = EmbeddingNet(args.backbone_type or 'resnet50', 0, args.pooling or 'avg', layer_norm=False,
                             weights=args.weights or 'imagenet', image_size=args.image_size or 224)
        model = model.to(device, memory_format=torch.channels_last)
        data_base = embed_for(args, model, run, device)
    results = measure(data_base, tuple(args.recalls or run.get('recalls', (1, 2, 4, 8))), device)
    if args.zero_shot:
        del results['binary']  # most trunks end in a ReLU, whose signs say nothing
    if args.json:
        if contents:
            results['made_by'] = {name: contents.get(name) for name in ('args', 'epoch', 'made_with')}
        print(json.dumps(results, default=str, skipkeys=True))
        return
    print(format_table(results))
    if contents:
        print(describe_origin(contents))


if __name__ == '__main__':
    run_script(main)
