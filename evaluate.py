"""Measure retrieval: Recall@K (dense and binary), MAP@R and R-precision, of a model, a data base, or a bare trunk.

    python evaluate.py --data_base results/car_resnet50_balanced_proxy_512_data_base.pth
    python evaluate.py --resume results/car_resnet50_balanced_proxy_512_model.pth --data_path /home/data
    python evaluate.py --zero_shot --data_path /home/data --data_name cub --backbone_type resnet50

`--data_base` measures the features that a training run saved; `--resume` embeds the test images again with a run's
model; `--zero_shot` measures the pooled features of a pretrained trunk, from which a training starts.
All numbers are per cent; what they mean stands in metrics.py.
"""
import json

import torch
from torch.utils.data import DataLoader

from dataset import make_test_loaders, make_transform, open_data
from engine.errors import UserError
from engine.processes import bfloat16_is_fast, gather_rows, progress, select_device, start_processes
from engine.runs import DataBase, Subset, load_data_base
from metrics import NUMBERS_OF_QUERIES, retrieval_metrics
from model import EmbeddingNet, NetConfig, load_model
from raw_sets import canonical_data_name
from recipes import POOLINGS, canonical_backbone, resize_for
from utils import Parser, add_device_flags, check_between, int_list, refuse_without_effect, run_script

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


@torch.inference_mode()
def extract_embeddings(model: EmbeddingNet, loader: DataLoader, device: torch.device, amp: bool) -> torch.Tensor:
    """Embed the images of a loader in their order; returns (N, D) float32 on the CPU, of all processes."""
    model.eval()
    embeddings = [torch.zeros(0, model.feature_dim, device=device)]  # a process may have no batch
    for images, _ in progress(loader, desc='embed', total=len(loader)):
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            embeddings.append(model(images.to(device, non_blocking=True)))
    return gather_rows(torch.cat(embeddings)).cpu()


def make_data_base(model: EmbeddingNet, loaders: dict[str, DataLoader], device: torch.device, amp: bool) -> DataBase:
    """Embed the test images, or queries and gallery, of `make_test_loaders`."""
    subsets = {name: Subset(loader.dataset.images, torch.tensor(loader.dataset.labels),
                            extract_embeddings(model, loader, device, amp)) for name, loader in loaders.items()}
    return DataBase(loaders['test'].dataset.class_names, **subsets)


def measure(data_base: DataBase, recalls: tuple[int, ...], device: torch.device) -> dict[str, dict[str, float]]:
    """Return {'dense': metrics, 'binary': metrics} of a data base, computed on `device` (the CPU in place of MPS)."""
    tensors = data_base.tensors(torch.device('cpu') if device.type == 'mps' else device)  # MPS has no float64
    return {kind: retrieval_metrics(*tensors, recalls=recalls, binary=kind == 'binary') for kind in ('dense', 'binary')}


# ---------------------------------------------------- what is printed ----------------------------------------------
def format_table(results: dict[str, dict[str, float]]) -> str:
    """Format {'dense': metrics, 'binary': metrics} as a table of per cents."""
    columns = [key for key in results['dense'] if key not in NUMBERS_OF_QUERIES]
    widths = {column: max(9, len(column) + 2) for column in columns}
    lines = [' ' * 8 + ''.join(f'{column:>{widths[column]}}' for column in columns)]
    for kind, metrics in results.items():
        lines.append(f'{kind:<8}' + ''.join(f'{metrics[column]:{widths[column]}.2f}' for column in columns))
    dense = results['dense']
    left_out = f', {dense["without_positive"]:,} without a positive left out' if dense['without_positive'] else ''
    return '\n'.join([*lines, f'{dense["queries"]:,} queries{left_out}'])


def describe_origin(origin: dict) -> str:
    """Say in a line how a model or data base was made: run, seed, epoch, code, versions, device."""
    run, made = origin['args'], origin.get('made_with')
    made = made if isinstance(made, dict) else {}  # of a file that others wrote
    changed = {'yes': ' with changes', 'no': '', 'unknown': ''}.get(str(made.get('changed_since')), '')
    return (f'{run.get("run", "a run without a name")}: recipe {run.get("recipe")}, seed {run.get("seed")}, epoch '
            f'{origin.get("epoch")}; code {str(made.get("commit"))[:12]}{changed}, torch {made.get("torch")}, '
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
    add_device_flags(parser)
    parser.add_argument('--json', action='store_true', help='print one line of JSON instead of a table')
    args = parser.parse_args(argv)
    chosen = '--zero_shot' if args.zero_shot else '--resume' if args.resume is not None else '--data_base'
    useless = {'--data_base': EMBED_FLAGS + TRUNK_FLAGS + ('weights',), '--resume': ('weights',),
               '--zero_shot': ('feature_dim',)}[chosen]
    refuse_without_effect(args, dict.fromkeys(useless, f' with {chosen}'))
    check_between(args, {'batch_size': (1, 2**31), 'num_workers': (0, 1024), 'image_size': (16, 8192),
                         'resize_size': (16, 8192)})
    return args


def embed(args, model: EmbeddingNet, run: dict, device: torch.device) -> DataBase:
    """Embed the test images that the command line names, with the settings of the run where it names none."""
    def setting(name, default):
        given = getattr(args, name)
        return given if given is not None else run.get(name, default)

    data = open_data(args.data_path or '/home/data', canonical_data_name(setting('data_name', 'car')),
                     setting('crop_type', 'uncropped'))
    image_size = model.config.image_size
    resize_size = setting('resize_size', None) or resize_for(image_size)
    if resize_size < image_size:
        raise UserError(f'--resize_size {resize_size} must be at least the image size, {image_size}')
    loaders = make_test_loaders(data, make_transform(False, image_size, resize_size, model.interpolation),
                                setting('batch_size', 64), 2 if args.num_workers is None else args.num_workers, device)
    return make_data_base(model, loaders, device, use_amp(setting('amp', 'auto'), device, model, training=False))


def open_source(args, device: torch.device) -> DataBase:
    """Return the data base that the command line names, or one of the images and the model that it names."""
    if args.data_base is not None:
        return load_data_base(args.data_base)
    if args.resume is None:
        model = EmbeddingNet(NetConfig(args.backbone_type or 'resnet50', 0, args.pooling or 'avg', layer_norm=False,
                                       image_size=args.image_size or 224), args.weights or 'imagenet')
        return embed(args, model.to(device, memory_format=torch.channels_last), {}, device)
    model, contents = load_model(args.resume, device)
    for flag in TRUNK_FLAGS:
        given, own = getattr(args, flag), getattr(model.config, flag)
        given = canonical_backbone(given) if flag == 'backbone_type' and given else given
        if given is not None and given != own:
            raise UserError(f'--{flag} {given} is not that of {args.resume} ({own}); leave it out')
    data_base = embed(args, model, contents['args'], device)
    data_base.origin = contents
    return data_base


def main() -> None:
    """Measure what the command line names and print a table or JSON."""
    args = get_args()
    device = select_device(start_processes(args.device))
    data_base = open_source(args, device)
    run = data_base.origin.get('args', {})
    results = measure(data_base, tuple(args.recalls or run.get('recalls', (1, 2, 4, 8))), device)
    if args.zero_shot:
        del results['binary']  # most trunks end in a ReLU, whose signs say nothing
    if args.json:
        if run:
            results['made_by'] = {name: data_base.origin.get(name) for name in ('args', 'epoch', 'made_with')}
        print(json.dumps(results, default=str, skipkeys=True))
        return
    print(format_table(results))
    if run:
        print(describe_origin(data_base.origin))


if __name__ == '__main__':
    run_script(main)
