"""Measure retrieval: Recall@K (dense and binary), MAP@R and R-precision, of a model, a data base, or a bare trunk.

    python evaluate.py --data_base results/car_resnet50_balanced_proxy_512_data_base.pth
    python evaluate.py --resume results/car_resnet50_balanced_proxy_512_model.pth --data_path /home/data
    python evaluate.py --zero_shot --data_path /home/data --data_name cub --backbone_type resnet50

`--data_base` measures the features that a training run saved; `--resume` embeds the test images again with a run's
model; `--zero_shot` measures the pooled features of a pretrained trunk, from which a training starts. With --save the
latter two leave a data base and a model, which test.py and report.py search as those of a run:
{data}_{trunk}_{feature length}_zero_shot_data_base.pth, or {run}_on_{data}_data_base.pth.
All numbers are per cent; what they mean stands in metrics.py. The last lines say above which similarity queries whose
class is absent from the searched images would still be answered.
"""
import json
import shlex
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from dataset import make_test_loaders, make_transform, open_data
from engine.errors import UserError, reason_of
from engine.files import make_folder, save
from engine.images import BrokenImage, to_image
from engine.processes import bfloat16_is_fast, gather_rows, progress, select_device, start_processes, world_rank
from engine.runs import (DataBase, RunFiles, Subset, check_seen, find_result, load_data_base, provenance, run_name,
                         seen_classes)
from metrics import NUMBERS_OF_QUERIES, measure_absent, retrieval_metrics
from model import EmbeddingNet, NetConfig, load_model
from raw_sets import canonical_data_name
from recipes import POOLINGS, canonical_backbone, resize_for
from utils import (Parser, add_device_flags, check_between, int_list, refuse_without_effect, run_script, switch,
                   user_path)

# Flags of the command line: of embedding images, and of the trunk, which --resume takes from the model.
EMBED_FLAGS = ('data_path', 'data_name', 'crop_type', 'batch_size', 'num_workers', 'amp', 'image_size', 'resize_size',
               'mirror')
TRUNK_FLAGS = ('backbone_type', 'pooling', 'feature_dim')


# ---------------------------------------------------- embeddings -----------------------------------------------------
def use_amp(choice: str, device: torch.device) -> bool:
    """Decide whether to compute in bfloat16: `on`, `off`, or `auto`: where the device is fast at it."""
    return bfloat16_is_fast(device) if choice == 'auto' else choice == 'on'


def embed_batch(model: nn.Module, images: torch.Tensor, device: torch.device, amp: bool) -> torch.Tensor:
    """Embed uint8 images (N, 3, H, W), where `amp` says so in bfloat16; returns (N, D) float32 on the device."""
    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
        return model(images.to(device, non_blocking=True)).float()


@torch.inference_mode()
def extract_embeddings(model: nn.Module, loader: DataLoader, device: torch.device, amp: bool) -> torch.Tensor:
    """Embed the images of a loader in their order; returns (N, D) float32 on the CPU, of all processes."""
    model.eval()
    embeddings = [torch.zeros(0, model.feature_dim, device=device)]  # a process may have no batch
    for images, _ in progress(loader, desc='embed', total=len(loader)):
        embeddings.append(embed_batch(model, images, device, amp))
    return gather_rows(torch.cat(embeddings)).cpu()


def make_data_base(model: nn.Module, loaders: dict[str, DataLoader], device: torch.device, amp: bool) -> DataBase:
    """Embed the test images, or queries and gallery, of `make_test_loaders`."""
    subsets = {name: Subset(loader.dataset.images, torch.tensor(loader.dataset.labels),
                            extract_embeddings(model, loader, device, amp)) for name, loader in loaders.items()}
    sizes = {name: [(loader.dataset.root / path).stat().st_size for path in loader.dataset.images]
             for name, loader in loaders.items()}
    return DataBase(loaders['test'].dataset.class_names, **subsets, sizes=sizes)


def measure(data_base: DataBase, recalls: tuple[int, ...], device: torch.device, kinds=('dense', 'binary')
            ) -> dict[str, dict[str, float]]:
    """Return {'dense': metrics, 'binary': metrics} of a data base, computed on `device` (the CPU in place of MPS)."""
    tensors = tensors_on(data_base, device)
    return {kind: retrieval_metrics(*tensors, recalls=recalls, binary=kind == 'binary') for kind in kinds}


def tensors_on(data_base: DataBase, device: torch.device) -> tuple:
    """Return what is measured of a data base on a device, on the CPU in place of MPS, which has no float64."""
    return data_base.tensors(torch.device('cpu') if device.type == 'mps' else device)


@torch.no_grad()  # unlike inference_mode it leaves embeddings that may be given to a loss
def embed_images(model: EmbeddingNet, images, run: dict | None = None, batch_size: int = 64) -> torch.Tensor:
    """Embed photographs of any kind, as the test images of a run are, from one's own Python.

    Args:
        model: of `load_model`, on any device.
        images: paths, PIL images, or uint8 arrays (H, W, 3), RGB, of any sizes; any iterable, read as it comes.
        run: the second value of `load_model`: its short side before the crop, and bfloat16 where its data base is in
            bfloat16; None: image_size x 256/224, in float32.
        batch_size: images embedded at once.

    Returns:
        (N, D) float32, unit rows, on the CPU; N may be 0.

    Raises:
        UserError: with the number of the first image that cannot be read.
    """
    model.eval()
    device, settings = model.mean.device, run['args'] if run else {'resize_size': None, 'amp': 'off'}
    transform = make_transform(False, model.config.image_size, settings['resize_size'], model.interpolation)
    embeddings, batch = [torch.zeros(0, model.feature_dim)], []

    def embed_waiting() -> None:
        if batch:
            embeddings.append(embed_batch(model, torch.stack(batch), device, use_amp(settings['amp'], device)).cpu())
            batch.clear()

    for number, image in enumerate(images):
        try:
            batch.append(transform(to_image(image)))
        except BrokenImage as error:
            name = f', {image},' if isinstance(image, (str, Path)) else ''
            raise UserError(f'image {number}{name} cannot be read ({error})') from None
        if len(batch) == batch_size:
            embed_waiting()
    embed_waiting()
    return torch.cat(embeddings)


# ---------------------------------------------------- what is printed ----------------------------------------------
def format_table(results: dict[str, dict[str, float]]) -> str:
    """Format the results that `main` gathers as a table of per cents, with what they were measured on."""
    columns = [key for key in results['dense'] if key not in NUMBERS_OF_QUERIES]
    widths = {column: max(9, len(column) + 2) for column in columns}
    lines = [' ' * 8 + ''.join(f'{column:>{widths[column]}}' for column in columns)]
    for kind in ('dense', 'binary'):
        if kind in results:
            lines.append(f'{kind:<8}' + ''.join(f'{results[kind][column]:{widths[column]}.2f}' for column in columns))
    for row in results['absent']:
        lines.append(f'class absent: {100 * row["rate"]:g} % answered above similarity {row["threshold"]:.4f}, which '
                     f'keeps {row["kept"]:.1f} of {row["right"]:.1f} % right answers')
    dense, on = results['dense'], results['measured_on']
    left_out = f', {dense["without_positive"]:,} without a positive left out' if dense['without_positive'] else ''
    mirrored = ', each image with its mirror image' if on['mirror'] else ''
    cut = f'cut from {on["resize_size"]}' if on['resize_size'] else 'whole'
    size = f'; images of {on["image_size"]} px, {cut}' if on['image_size'] else ''  # others' files need not say it
    lines.append(f'{on["data_name"]}, {on["crop_type"]}{mirrored}: {dense["queries"]:,} queries of {on["classes"]:,} '
                 f'test classes{left_out}{size}')
    if on['seen_classes']:
        lines.append(f'NOT of unseen classes: {on["seen_classes"]:,} of them were trained on')
    return '\n'.join(lines)


def describe_origin(origin: dict) -> str:
    """Say in a line how a model or data base was made: run, seed, epoch, code, versions, device."""
    run, made = origin['args'], origin.get('made_with')
    made = made if isinstance(made, dict) else {}  # of a file that others wrote
    changed = {'yes': ' with changes', 'no': '', 'unknown': ''}.get(str(made.get('changed_since')), '')
    training = 'not trained' if run.get('zero_shot') else (
        f'recipe {run.get("recipe")}, seed {run.get("seed")}, epoch {origin.get("epoch")}')
    return (f'{run.get("run", "a run without a name")}: {training}; code {str(made.get("commit"))[:12]}{changed}, '
            f'torch {made.get("torch")}, torchvision {made.get("torchvision")}, {made.get("device")}')


# ---------------------------------------------------- command line ---------------------------------------------------
def get_args(argv: list[str] | None = None):
    """Parse the command line; a flag that does not belong to the chosen source is an error."""
    parser = Parser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument('--data_base', type=user_path, metavar='FILE', help='measure the features of a data base')
    source.add_argument('--resume', type=user_path, metavar='FILE', help='embed the test images with a run\'s model')
    source.add_argument('--zero_shot', action='store_true', help='measure a pretrained trunk without any training')
    parser.add_argument('--data_path', type=user_path, help='folder that holds the data sets [/home/data]')
    parser.add_argument('--data_name', '--dataset', help='data set [that of the model; car for --zero_shot]')
    parser.add_argument('--crop_type', choices=('uncropped', 'cropped'), help='which split file [that of the model]')
    parser.add_argument('--backbone_type', '--model', help='trunk, or timm:MODEL [that of the model; resnet50]')
    parser.add_argument('--weights', type=user_path, help='of the trunk for --zero_shot: imagenet or a file [imagenet]')
    parser.add_argument('--pooling', choices=POOLINGS,
                        help='of the trunk for --zero_shot [avg]; must agree with the model of --resume')
    parser.add_argument('--feature_dim', '--embedding-size', type=int, help='must agree with the model of --resume')
    parser.add_argument('--image_size', type=int, help='side of the centre crop in pixels [that of the model; 224]')
    parser.add_argument('--resize_size', type=int, help='short side before the crop; 0: the whole image, squeezed to '
                        'the square [in the proportion of the model; image_size x 256/224]')
    parser.add_argument('--mirror', type=switch, metavar='{0,1}', help='embed an image as the mean with its mirror '
                        'image, or not [as the model was trained to; 0]')
    parser.add_argument('--batch_size', '--batch-size', type=int, help="images embedded at once [the model's; 64]")
    parser.add_argument('--num_workers', '--workers', type=int, help='processes that decode images [2]')
    parser.add_argument('--amp', choices=('auto', 'on', 'off'), help='embed in bfloat16 [that of the model; auto]')
    parser.add_argument('--allow_seen', action='store_true', help='measure although test classes are among those '
                        'trained on, and say so beside the numbers')
    parser.add_argument('--save', action='store_true', help='leave a data base and a model in --results_dir')
    parser.add_argument('--overwrite', action='store_true', help='--save: replace those of an earlier call')
    parser.add_argument('--results_dir', type=user_path, default='results', help='where files are that are named '
                        'without a folder, and where --save writes [%(default)s]')
    parser.add_argument('--recalls', type=int_list, help='values of K [those of the run; 1,2,4,8]')
    add_device_flags(parser)
    parser.add_argument('--json', action='store_true', help='print one line of JSON instead of a table')
    args = parser.parse_args(argv)
    chosen = '--zero_shot' if args.zero_shot else '--resume' if args.resume is not None else '--data_base'
    useless = {'--data_base': EMBED_FLAGS + TRUNK_FLAGS + ('weights',), '--resume': ('weights',),
               '--zero_shot': ('feature_dim',)}[chosen]
    for flag, needed in (('save', args.data_base is None), ('overwrite', args.save)):
        if getattr(args, flag) and not needed:
            raise UserError(f'--{flag} has no effect {"with --data_base" if flag == "save" else "without --save"}; '
                            'leave it out')
    refuse_without_effect(args, dict.fromkeys(useless, f' with {chosen}'))
    check_between(args, {'batch_size': (1, 2**31), 'num_workers': (0, 1024), 'image_size': (16, 8192),
                         'resize_size': (16 if args.resize_size else 0, 8192)})
    return args


def embed(args, model: EmbeddingNet, run: dict, trained_size: int, device: torch.device) -> DataBase:
    """Embed the test images that the command line names, with the settings of the run where it names none.

    The data base's `args` are then those of the run, but for what was measured and how.

    Args:
        trained_size: side of the images of the run, in whose proportion to their short side a larger one is cut.
    """
    image_size = model.config.image_size
    settings = {'data_name': 'car', 'crop_type': 'uncropped', 'batch_size': 64, 'amp': 'auto',
                'resize_size': resize_for(trained_size), 'recalls': (1, 2, 4, 8), **run, 'image_size': image_size}
    settings['resize_size'] = settings['resize_size'] * image_size // trained_size
    settings |= {name: getattr(args, name) for name in settings if getattr(args, name, None) is not None}
    settings |= {'data_name': canonical_data_name(settings['data_name']), 'mirror': model.config.mirror}
    if 0 < settings['resize_size'] < image_size:
        raise UserError(f'--resize_size {settings["resize_size"]} must be at least the image size, {image_size}, or 0')
    data = open_data(args.data_path or '/home/data', settings['data_name'], settings['crop_type'])
    loaders = make_test_loaders(data, make_transform(False, image_size, settings['resize_size'], model.interpolation),
                                settings['batch_size'], 2 if args.num_workers is None else args.num_workers, device)
    data_base = make_data_base(model, loaders, device, use_amp(settings['amp'], device))
    data_base.origin = {'args': settings}
    return data_base


def open_trunk(args, device: torch.device) -> tuple[EmbeddingNet, dict]:
    """Build the bare trunk of --zero_shot; returns it and what there is to say of its origin."""
    model = EmbeddingNet(NetConfig(args.backbone_type or 'resnet50', 0, args.pooling or 'avg', layer_norm=False,
                                   image_size=args.image_size or 224), args.weights or 'imagenet')
    name = canonical_data_name(args.data_name or 'car')
    run = run_name(name, model.config.backbone_type, model.feature_dim, 'zero_shot')
    return model.to(device, memory_format=torch.channels_last), {
        'args': {'run': run, 'zero_shot': True, 'weights': Path(args.weights or 'imagenet').name},
        'made_with': provenance(device)}


def open_model(args, device: torch.device) -> tuple[EmbeddingNet, dict]:
    """Load the model of --resume, and check that the flags of a trunk name the same; returns it and its contents."""
    file = find_result('--resume', RunFiles.ENDINGS['model'], args.resume, args.results_dir)
    model, contents = load_model(file, device)
    for flag in TRUNK_FLAGS:
        given, own = getattr(args, flag), getattr(model.config, flag)
        given = canonical_backbone(given) if flag == 'backbone_type' and given else given
        if given is not None and given != own:
            raise UserError(f'--{flag} {given} is not that of {args.resume} ({own}); leave it out')
    return model, contents


def change_config(model: EmbeddingNet, args) -> None:
    """Give a model the mirror image and the size of images that the command line names; raises UserError where the
    trunk takes no other size.
    """
    if args.mirror is not None:
        model.config = replace(model.config, mirror=args.mirror)
    if args.image_size in (None, model.config.image_size):
        return
    model.config = replace(model.config, image_size=args.image_size)
    try:
        embed_batch(model.eval(), torch.zeros(1, 3, args.image_size, args.image_size, dtype=torch.uint8),
                    model.mean.device, amp=False)
    except (AssertionError, ValueError, RuntimeError) as error:
        raise UserError(f'--image_size {args.image_size} does not fit {model.config.backbone_type} '
                        f'({reason_of(error)}); leave it out') from None


def files_to_save(args, run: str) -> RunFiles:
    """Return where --save writes the data base and the model of a name.

    Raises:
        UserError: if there are files of these names, and --overwrite is not set.
    """
    files = RunFiles(make_folder('--results_dir', Path(args.results_dir)), run)
    taken = [file for file in (files.model, files.data_base) if file.exists()]
    if taken and not args.overwrite:
        raise UserError(f'--save: {taken[0]} is there already; add --overwrite to replace it')
    return files


def save_measured(args, files: RunFiles, data_base: DataBase, model: EmbeddingNet) -> None:
    """Save a data base that was made here and the model beside it, and print what comes next."""
    save({'config': asdict(model.config), 'state_dict': model.state_dict(), **data_base.origin}, files.model)
    data_base.save(files.data_base)
    words = ['python', 'test.py', '--data_base', str(files.data_base), '--data_path', args.data_path or '/home/data',
             '--query_img_name', data_base.test.images[0]]
    print(f'saved; next:\n  {shlex.join(words)}')


def main() -> None:
    """Measure what the command line names and print a table or JSON."""
    args = get_args()
    device = select_device(start_processes(args.device))
    model = None
    if args.data_base is not None:
        data_base = load_data_base(find_result('--data_base', RunFiles.ENDINGS['data_base'], args.data_base,
                                               args.results_dir))
        origin = {**data_base.proxies, **data_base.origin}
    else:
        model, origin = open_trunk(args, device) if args.zero_shot else open_model(args, device)
        trained_size = model.config.image_size
        change_config(model, args)
        name = origin['args'].get('run', 'run')
        if args.resume is not None:
            name = run_name(name, 'on', canonical_data_name(args.data_name or origin['args']['data_name']))
            origin['args'] = {'trained_on': origin['args']['data_name'], **origin['args']}
        files = files_to_save(args, name) if args.save else None
        data_base = embed(args, model, origin['args'] if args.resume is not None else {}, trained_size, device)
    settings = data_base.origin['args']
    both = check_seen(seen_classes(origin), data_base.class_names, args.allow_seen)
    bare = bool(origin['args'].get('zero_shot'))
    kinds = ('dense',) if bare else ('dense', 'binary')  # most trunks end in a ReLU, whose signs say nothing
    results = measure(data_base, tuple(args.recalls or settings['recalls']), device, kinds)
    results['absent'] = measure_absent(*tensors_on(data_base, device))
    results['measured_on'] = {'data_name': settings['data_name'], 'crop_type': settings['crop_type'],
                              'mirror': settings.get('mirror', False), 'image_size': settings.get('image_size'),
                              'resize_size': settings['resize_size'],
                              'classes': len(data_base.class_names), 'seen_classes': len(both)}
    if args.json:
        if not args.zero_shot:
            results['made_by'] = {name: origin.get(name) for name in ('args', 'epoch', 'made_with')}
        print(json.dumps(results, default=str, skipkeys=True))
    else:
        print(format_table(results))
        if not args.zero_shot:
            print(describe_origin(origin))
    if args.save and world_rank() == 0:
        data_base.origin = {**{key: origin[key] for key in ('epoch', 'made_with', 'seen_classes') if key in origin},
                            'absent': results['absent'], 'args': {**origin['args'], **settings, 'run': name}}
        save_measured(args, files, data_base, model)


if __name__ == '__main__':
    run_script(main)
