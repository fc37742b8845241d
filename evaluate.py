"""Measure retrieval: Recall@K (dense and binary), MAP@R and R-precision.

    python evaluate.py --data_base results/car_resnet50_balanced_proxy_512_data_base.pth
    python evaluate.py --model results/car_resnet50_balanced_proxy_512_model.pth --data_path /home/data
    python evaluate.py --pretrained --data_path /home/data --data_name cub --backbone_type resnet50
    python evaluate.py --gpu-id 0 --batch-size 120 --model bn_inception --embedding-size 512 --dataset cub \\
                       --resume best_model.pth                                 # Proxy Anchor's own spelling

`--data_base` measures the features that a training saved; `--model` embeds the test images again with a run's model;
`--pretrained` measures what embed.py does without a model: the features of a pretrained backbone, alone and whitened on
the searched images, without their labels. With --save, the last two write a data base and a model that test.py and
report.py search like those of a run: {data}_{backbone}_{feature length}_pretrained_data_base.pth, or
{run}_on_{data}_data_base.pth.
All numbers are per cent; retrieval/metrics.py defines them. The lines `no close match` below the table give
similarities below which an answer is doubtful, since the class of a query may be absent from the searched images.
"""
import json
import math
import shlex
from dataclasses import replace
from pathlib import Path

import torch

from common.distributed import select_device, start_processes, use_amp, world_rank
from common.errors import UserError, reason_of
from common.files import LARGEST_FEATURE_DIM, LARGEST_SIDE, make_folder, save
from common.images import resize_for
from common.results import RunFiles, find_result, run_name
from imagedata.loading import make_test_loaders, make_transform, open_data
from imagedata.raw_sets import canonical_data_name
from model import EmbeddingNet
from recipes import BACKBONE_NAMES, POOLINGS, canonical_backbone
from retrieval.database import DataBase, check_seen, load_data_base, seen_classes
from retrieval.embedding import (describe_origin, embed_batch, format_results, make_data_base, measure,
                                 measure_open_set_of)
from retrieval.model_file import load_model, model_contents
from retrieval.pretrained import DEFAULT_BACKBONE, DEFAULT_DIM, build_pretrained, fit_whitening
from training.statistics import provenance
from utils import (Parser, add_device_flags, check_between, int_list, refuse_without_effect, run_script, switch,
                   user_path)

# Flags about embedding images, and about the backbone, which --model takes from the file.
EMBEDDING_FLAGS = ('data_path', 'data_name', 'crop_type', 'batch_size', 'num_workers', 'amp', 'image_size',
                   'resize_size', 'flip_tta')
BACKBONE_FLAGS = ('backbone_type', 'pooling', 'feature_dim')
DEFAULTS = {'data_name': 'car', 'crop_type': 'uncropped', 'batch_size': 64, 'amp': 'auto', 'recalls': (1, 2, 4, 8)}


# ---------------------------------------------------- command line ------------------------------------------------
def get_args(argv: list[str] | None = None):
    """Parse the command line; a flag that does not belong to the chosen source is an error."""
    parser = Parser(description=__doc__)
    group = parser.add_argument_group('what to measure: one of')
    group.add_argument('--data_base', type=user_path, metavar='FILE', help='the features of a data base')
    group.add_argument('--model', type=user_path, metavar='FILE', help='a run\'s model, which embeds the test images '
                       'again. The name of a backbone here means --backbone_type (Proxy Anchor\'s spelling)')
    group.add_argument('--resume', type=user_path, metavar='FILE', help='Proxy Anchor\'s spelling of --model FILE')
    group.add_argument('--pretrained', action='store_true', help='a pretrained backbone without any training')

    group = parser.add_argument_group('data')
    group.add_argument('--data_path', type=user_path, help='folder that holds the data sets [/home/data]')
    group.add_argument('--data_name', '--dataset', help='data set [that of the model; car]')
    group.add_argument('--crop_type', choices=('uncropped', 'cropped'), help='which split file [that of the model]')
    group.add_argument('--image_size', type=int, help='side of the centre crop in pixels [that of the model; 224]')
    group.add_argument('--resize_size', type=int, help='short side before the crop; 0: the whole image, squeezed to '
                       'the square [in the proportion of the model; image_size x 256/224]')
    group.add_argument('--batch_size', '--batch-size', type=int, help="images embedded at once [the model's; 64]")
    group.add_argument('--num_workers', '--workers', type=int, help='processes that decode images [2]')

    group = parser.add_argument_group('network')
    group.add_argument('--backbone_type', help=f'backbone, or timm:MODEL [that of the model; {DEFAULT_BACKBONE}]')
    group.add_argument('--weights', type=user_path, help='of the backbone, with --pretrained: imagenet or a file '
                       '[imagenet]')
    group.add_argument('--pooling', choices=POOLINGS, help='of the backbone, with --pretrained [native for a '
                       'transformer of timm, avg_max for others]; with --model it must be that of the model')
    group.add_argument('--feature_dim', '--embedding-size', type=int, help='numbers per image after the whitening '
                       '[512]; with --model it must be that of the model')
    group.add_argument('--whiten', choices=('test', 'train', 'off'), help='images on which a pretrained backbone is '
                       'whitened: the searched ones, the training images, or none [test]')
    group.add_argument('--flip_tta', type=switch, metavar='{0,1}', help='embed an image as the mean with its mirror '
                       'image, or not [as the model was trained to; 0]')
    group.add_argument('--amp', choices=('auto', 'on', 'off'), help='embed in bfloat16 [that of the model; auto]')
    add_device_flags(group)

    group = parser.add_argument_group('results')
    group.add_argument('--recalls', type=int_list, help='values of K [those of the run; 1,2,4,8]')
    group.add_argument('--allow_seen', action='store_true', help='measure although test classes are among those '
                       'trained on, and say so beside the numbers')
    group.add_argument('--save', action='store_true', help='write a data base and a model to --results_dir')
    group.add_argument('--overwrite', action='store_true', help='with --save: replace those of an earlier call')
    group.add_argument('--results_dir', type=user_path, default='results', help='where files named without a folder '
                       'are, and where --save writes [%(default)s]')
    group.add_argument('--json', action='store_true', help='print one line of JSON instead of a table')
    args = parser.parse_args(argv)
    translate_proxy_anchor(args)

    sources = {'--data_base': args.data_base is not None, '--model': args.model is not None,
               '--pretrained': args.pretrained}
    chosen = [flag for flag, is_set in sources.items() if is_set]
    if len(chosen) != 1:
        raise UserError(f'choose one of --data_base FILE, --model FILE and --pretrained, not '
                        f'{" and ".join(chosen) or "none"}')
    useless = {'--data_base': (*EMBEDDING_FLAGS, *BACKBONE_FLAGS, 'weights', 'whiten'),
               '--model': ('weights', 'whiten'), '--pretrained': ()}
    refuse_without_effect(args, dict.fromkeys(useless[chosen[0]], f' with {chosen[0]}'))
    if args.save and args.data_base is not None:
        raise UserError('--save has no effect with --data_base; leave it out')
    if args.overwrite and not args.save:
        raise UserError('--overwrite has no effect without --save; leave it out')
    if args.whiten == 'off' and args.feature_dim is not None:
        raise UserError(f'--feature_dim {args.feature_dim} has no effect with --whiten off; leave it out')
    check_between(args, {'batch_size': (1, 2**31), 'num_workers': (0, 1024), 'image_size': (16, LARGEST_SIDE),
                         'feature_dim': (0 if args.model else 1, LARGEST_FEATURE_DIM),
                         'resize_size': (16 if args.resize_size else 0, LARGEST_SIDE)})
    return args


def translate_proxy_anchor(args) -> None:
    """Translate `--model BACKBONE` to --backbone_type, and `--resume FILE` to --model."""
    if args.model is not None and (args.model in (*BACKBONE_NAMES, 'bn_inception') or args.model.startswith('timm:')):
        if args.backbone_type is not None:
            raise UserError(f'--model {args.model} and --backbone_type {args.backbone_type} both name a backbone; '
                            'leave one of them out')
        args.model, args.backbone_type = None, args.model
    if args.resume is not None:
        if args.model is not None:
            raise UserError(f'--model {args.model} and --resume {args.resume} both name a model; leave one of them out')
        args.model = args.resume


# ---------------------------------------------------- what is measured --------------------------------------------
def load_pretrained(args, device: torch.device) -> tuple[EmbeddingNet, dict]:
    """Build the pretrained backbone of --pretrained; returns it and its origin (`args`, `made_with`)."""
    model = build_pretrained(args.backbone_type, args.weights, args.image_size, args.pooling, device)
    feature_dim = min(args.feature_dim or DEFAULT_DIM, model.num_features)
    if args.whiten == 'off':
        feature_dim = model.num_features
    data_name = canonical_data_name(args.data_name or DEFAULTS['data_name'])
    run = run_name(data_name, model.config.backbone_type, feature_dim, 'pretrained')
    settings = {'run': run, 'pretrained': True, 'weights': Path(args.weights or 'imagenet').name}
    return model, {'args': settings, 'made_with': provenance(device)}


def load_trained(args, device: torch.device) -> tuple[EmbeddingNet, dict]:
    """Load the model of --model; returns it and its origin.

    Raises:
        UserError: if a flag names another backbone, pooling or feature length than the model has.
    """
    model, contents = load_model(find_result('--model', RunFiles.ENDINGS['model'], args.model, args.results_dir),
                                 device)
    for flag in BACKBONE_FLAGS:
        asked, actual = getattr(args, flag), getattr(model.config, flag)
        if flag == 'backbone_type' and asked is not None:
            asked = canonical_backbone(asked)
        if asked is not None and asked != actual:
            raise UserError(f'--{flag} {asked} is not that of {args.model} ({actual}); leave it out')
    run = contents['args'].get('run', 'run')
    data_name = contents['args']['data_name']
    name = run_name(run, 'on', canonical_data_name(args.data_name or data_name))
    return model, {**contents, 'args': {'trained_on': data_name, **contents['args'], 'run': name}}


def change_config(model: EmbeddingNet, args) -> None:
    """Set flip_tta and the image size that the command line asks for.

    Raises:
        UserError: if the backbone takes no other image size.
    """
    if args.flip_tta is not None:
        model.config = replace(model.config, flip_tta=args.flip_tta)
    if args.image_size in (None, model.config.image_size):
        return
    model.config = replace(model.config, image_size=args.image_size)
    try:
        embed_batch(model.eval(), torch.zeros(1, 3, args.image_size, args.image_size, dtype=torch.uint8),
                    model.mean.device, amp=False)
    except (AssertionError, ValueError, RuntimeError) as error:
        raise UserError(f'--image_size {args.image_size} does not fit {model.config.backbone_type} '
                        f'({reason_of(error)}); leave it out') from None


def embed_data_set(args, model: EmbeddingNet, run: dict, trained_size: int, device: torch.device,
                   subset: str = 'test') -> DataBase:
    """Embed the test or `train` images, with the settings of the run where the command line says nothing else.

    Args:
        run: settings of the model's run; {} for a pretrained backbone.
        trained_size: side of the images that the model was trained on. At another image size, the short side before
            the crop keeps its proportion.

    Returns:
        the data base; its origin holds the settings as `args`.
    """
    image_size = model.config.image_size
    settings = {**DEFAULTS, 'resize_size': resize_for(trained_size), **run, 'image_size': image_size}
    settings['resize_size'] = settings['resize_size'] * image_size // trained_size
    settings |= {name: getattr(args, name) for name in (*EMBEDDING_FLAGS, 'recalls')
                 if name in settings and getattr(args, name, None) is not None}
    settings |= {'data_name': canonical_data_name(settings['data_name']), 'flip_tta': model.config.flip_tta}
    if 0 < settings['resize_size'] < image_size:
        raise UserError(f'--resize_size {settings["resize_size"]} must be at least the image size, {image_size}, or 0')
    data = open_data(args.data_path or '/home/data', settings['data_name'], settings['crop_type'])
    transform = make_transform(False, image_size, settings['resize_size'], model.interpolation)
    if subset == 'train':
        data = data._replace(split={'test': data.split['train'], 'class_names': data.split['class_names']})
    loaders = make_test_loaders(data, transform, settings['batch_size'],
                                2 if args.num_workers is None else args.num_workers, device)
    data_base = make_data_base(model, loaders, device, use_amp(settings['amp'], device))
    data_base.origin = {'args': settings}
    return data_base


def whiten(args, model: EmbeddingNet, data_base: DataBase, trained_size: int, device: torch.device) -> DataBase:
    """Whiten a pretrained network on the searched images of a data base, or on the training images; embed again."""
    fitted_on = data_base.subsets[data_base.searched]
    if args.whiten == 'train':
        fitted_on = embed_data_set(args, model, {}, trained_size, device, 'train').test
    features = fitted_on.features * math.sqrt(model.num_features)  # as they were before the L2 normalisation
    line = fit_whitening(model, features, args.feature_dim)
    if not args.json:
        print(f'{model.config.backbone_type}: {line}')
    return embed_data_set(args, model, {}, trained_size, device)


def files_to_save(args, run: str) -> RunFiles:
    """Return where --save writes a data base and a model.

    Raises:
        UserError: if files of these names are there, and --overwrite is not set.
    """
    files = RunFiles(make_folder('--results_dir', Path(args.results_dir)), run)
    taken = [file for file in (files.model, files.data_base) if file.exists()]
    if taken and not args.overwrite:
        raise UserError(f'--save: {taken[0]} is there already; add --overwrite to replace it')
    return files


def save_measured(args, files: RunFiles, data_base: DataBase, model: EmbeddingNet) -> None:
    """Save the data base and the model, and print the next command; not with --json, which is one line."""
    save(model_contents(model, data_base.origin), files.model)
    data_base.save(files.data_base)
    if args.json:
        return
    command = ['python', 'test.py', '--data_base', str(files.data_base), '--data_path', args.data_path or '/home/data',
               '--query_img_name', data_base.test.images[0]]
    print(f'saved; next:\n  {shlex.join(command)}')


def main() -> None:
    """Measure what the command line names, and print a table or JSON."""
    args = get_args()
    device = select_device(start_processes(args.device))
    model = files = alone = None
    if args.data_base is not None:
        data_base = load_data_base(find_result('--data_base', RunFiles.ENDINGS['data_base'], args.data_base,
                                               args.results_dir))
        origin = {**data_base.proxies, **data_base.origin}
    else:
        model, origin = load_pretrained(args, device) if args.pretrained else load_trained(args, device)
        trained_size = model.config.image_size
        change_config(model, args)
        if args.save:
            files = files_to_save(args, origin['args']['run'])
        run = {} if args.pretrained else origin['args']
        data_base = embed_data_set(args, model, run, trained_size, device)
        if args.pretrained and args.whiten != 'off':
            alone, data_base = data_base, whiten(args, model, data_base, trained_size, device)

    settings = data_base.origin['args']
    trained_on = check_seen(seen_classes(origin), data_base.class_names, args.allow_seen)
    recalls = tuple(args.recalls or settings['recalls'])
    results = measure(data_base, recalls, device)
    if alone is not None:
        results['backbone'] = measure(alone, recalls, device, ('dense',))['dense']
    results['open_set'] = measure_open_set_of(data_base, device)
    results['measured_on'] = {'data_name': settings['data_name'], 'crop_type': settings['crop_type'],
                              'flip_tta': settings.get('flip_tta', False), 'image_size': settings.get('image_size'),
                              'resize_size': settings['resize_size'], 'classes': len(data_base.class_names),
                              'seen_classes': len(trained_on)}
    if args.json:
        if not args.pretrained:
            results['made_by'] = {name: origin.get(name) for name in ('args', 'epoch', 'made_with')}
        print(json.dumps(results, default=str, skipkeys=True))
    else:
        print(format_results(results))
        if not args.pretrained:
            print(describe_origin(origin))
    if files and world_rank() == 0:
        kept = {key: origin[key] for key in ('epoch', 'made_with', 'seen_classes') if key in origin}
        data_base.origin = {**kept, 'open_set': results['open_set'], 'args': {**origin['args'], **settings}}
        save_measured(args, files, data_base, model)


if __name__ == '__main__':
    run_script(main)
