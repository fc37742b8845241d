"""Train an embedding network with proxies and keep the best epoch's model and data base.

    python train.py --data_path data --data_name glyph --recipe proxy_anchor
    python train.py --data_name cub --backbone_type inception --feature_dim 256       # Balanced Proxy, the default
    python train.py --recipe asymptotic_proxy --feature_dim 1024
    python train.py --recipe momentum_proxy --momentum 0.6
    python train.py --loss Proxy_Anchor --model bn_inception --embedding-size 512 --batch-size 180 --lr 1e-4 \\
                    --dataset cub --warm 1 --bn-freeze 1 --lr-decay-step 10           # Proxy Anchor's own spelling

Several processes, a GPU each or on one CPU, share each batch and give the numbers of one:

    torchrun --nproc_per_node 8 train.py --data_name sop --recipe proxy_anchor --batch_size 1440

A recipe (recipes.py) sets the defaults of a paper for the data set and trunk at hand; a flag on the command line wins.
A run leaves in results/: {run}_statistics.csv (a row an epoch), {run}_model.pth and {run}_data_base.pth (best R@1 on
the test classes), {run}_checkpoint.pth (for --resume), and at its end {run}_curves.png and .pdf.
"""
import argparse
import hashlib
import json
import math
import shlex
import time
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from cache import Cache
from data_utils import BatchSampler, RetrievalDataset, count_images, make_transform, read_split, resize_for
from evaluate import make_data_base, make_test_loaders, measure, use_amp
from metrics import COUNTS
from model import (BACKBONES, COMBINED_LOSSES, LOSSES, MOMENTUM, POOLINGS, PROXY_UPDATES, EmbeddingNet,
                   canonical_backbone)
from plot import draw_curves
from recipes import RECIPES, recipe_settings
from utils import (Parser, UserError, canonical_data_name, check_choice, first_process_first, fraction_list, gpu_id,
                   int_list, load, make_folder, progress, run_name, run_script, save, save_statistics, select_device,
                   start_processes, switch, world_rank, world_size)

OPTIMIZERS = {
    'adamw': torch.optim.AdamW, 'adam': torch.optim.Adam,
    'sgd': lambda groups, **kwargs: torch.optim.SGD(groups, momentum=0.9, **kwargs),
}
SCHEDULES = {
    'step': lambda optimizer, args: torch.optim.lr_scheduler.StepLR(
        optimizer, args.lr_decay_step, args.lr_decay_gamma),
    'multistep': lambda optimizer, args: torch.optim.lr_scheduler.MultiStepLR(
        optimizer, [max(1, round(share * args.num_epochs)) for share in args.lr_milestones], args.lr_decay_gamma),
    'cosine': lambda optimizer, args: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.num_epochs),
    'constant': lambda optimizer, args: torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
}
# Where a run stands and how fast it goes: free to change between a run and its --resume, and left out of its files.
PLACE = ('data_path', 'results_dir', 'device', 'num_workers', 'shard_proxies', 'resume', 'overwrite')
CHECKPOINT_VERSION = 1
RUN_FILES = ('statistics.csv', 'model.pth', 'data_base.pth', 'checkpoint.pth', 'curves.png')


# ---------------------------------------------------- command line ---------------------------------------------------
def get_parser() -> Parser:
    """Build the parser; a default of None means: as the recipe says."""
    parser = Parser(description=__doc__, epilog='In brackets the default; a flag without one takes that of the recipe.')
    group = parser.add_argument_group('what to train')
    group.add_argument('--recipe', help='paper whose hyper-parameters are the defaults: ' + ', '.join(RECIPES) +
                       ' [the one named like --loss_name, else balanced_proxy]')
    group.add_argument('--loss_name', '--loss', type=str.lower, help='loss: ' + ', '.join([*LOSSES, *COMBINED_LOSSES]) +
                       ' [the recipe\'s]. asymptotic_proxy is normalized_softmax with proxies moved by momentum and '
                       'temperature 0.03; positive_proxy is normalized_softmax with --proxy_update positive')
    group.add_argument('--proxy_update', choices=PROXY_UPDATES, help='how the proxies move: by the loss\'s gradient, '
                       'by that of the positive embeddings alone, or by momentum towards their class [the recipe\'s]')
    group.add_argument('--backbone_type', '--model', default='resnet50', help='trunk: ' + ', '.join(BACKBONES) +
                       ' (BN-Inception is inception), or timm:MODEL [%(default)s]')
    group.add_argument('--weights', default='imagenet', help='of the trunk: imagenet (downloaded once, checked), none '
                       '(random), or the path of a state dict [%(default)s]')

    group = parser.add_argument_group('data')
    group.add_argument('--data_path', default='/home/data', help='folder that holds the data sets [%(default)s]')
    group.add_argument('--data_name', '--dataset', default='car', help='car, cub, sop, isc, glyph, or a folder of your '
                       'own, converted by data_utils.py [%(default)s]')
    group.add_argument('--crop_type', choices=('uncropped', 'cropped'), default='uncropped',
                       help='whole images, or cut to the bounding box (car, cub) [%(default)s]')
    group.add_argument('--image_size', type=int, help='side of the crop in pixels; papers: 224, Asymptotic 256')
    group.add_argument('--resize_size', type=int, help='short side of test images before the crop '
                       '[image_size x 256/224]')
    group.add_argument('--min_crop', type=float, default=0.08, help='smallest share of the area in a random crop; '
                       'raise it where objects fill the image [%(default)s]')
    group.add_argument('--flip', type=float, default=0.5, help='probability of a horizontal flip; 0 where left and '
                       'right matter, as in text [%(default)s]')
    group.add_argument('--batch_size', '--batch-size', type=int, help='of all processes together; papers: 64, '
                       'Asymptotic 128, Anchor 180 or 120')
    group.add_argument('--images_per_class', '--IPC', type=int, help='draw each batch as batch/k classes with k images '
                       'each (Proxy Anchor\'s balanced sampling); 0 shuffles all images [0]')
    group.add_argument('--cache_size', type=int, default=0, help='read images from the cache that '
                       'data_utils.py --cache_size made: their short side in pixels, best that of --resize_size; 0 '
                       'decodes the files [0]')
    group.add_argument('--num_workers', '--workers', type=int, default=2, help='processes that decode images; 0 '
                       'decodes in this one; the batches are the same [%(default)s]')

    group = parser.add_argument_group('network')
    group.add_argument('--feature_dim', '--embedding-size', type=int, help='length of an embedding; papers: 512')
    group.add_argument('--pooling', choices=POOLINGS, help='papers: max; Proxy Anchor avg_max, the sum of both; cls is '
                       'the class token of a transformer')
    group.add_argument('--layer_norm', type=switch, metavar='{0,1}', help='normalise the pooled features before the '
                       'linear layer; papers: 1, Proxy Anchor 0')
    group.add_argument('--linear_bias', type=switch, metavar='{0,1}', help='papers: 0; Proxy Anchor 1')
    group.add_argument('--max_pool', type=switch, default=True, metavar='{0,1}', help='the max-pool in the stem of a '
                       'ResNet; 0 for images below about 100 px [1]')
    group.add_argument('--freeze_bn', '--bn-freeze', type=switch, metavar='{0,1}', help='keep the BatchNorm statistics '
                       'of the pretrained trunk; papers: 1, Proxy Anchor on sop and isc 0. Set 0 with --weights none: '
                       'the statistics of an untrained trunk say nothing')

    group = parser.add_argument_group('loss')
    group.add_argument('--scale', '--alpha', type=float, help='alpha; papers: 32, proxy_nca 9, cos_face, arc_face 64')
    group.add_argument('--temperature', type=float, help='1 / scale, the Asymptotic Proxy spelling; paper: 0.03, '
                       '0.05 on sop and isc')
    group.add_argument('--margin', '--mrg', type=float, help='delta; papers: 0.1, cos_face 0.35, arc_face 0.5 rad')
    group.add_argument('--momentum', type=float, help='m of moving proxies (not of the optimizer), in (0, 1]; papers: '
                       '0.5. Asymptotic Proxy saw runs collapse at 0.05 to 0.1')
    group.add_argument('--proxy_init', choices=('unit', 'kaiming'), help='start of the proxies; papers: unit random '
                       'rows, Proxy Anchor kaiming')

    group = parser.add_argument_group('optimisation')
    group.add_argument('--num_epochs', '--epochs', type=int, help='papers: 20, Asymptotic 30, Proxy Anchor 60')
    group.add_argument('--warm_up', '--warm', type=int, help='first epochs in which the trunk is frozen and only the '
                       'linear layer and the proxies learn; this is no ramp of the learning rate. Papers: Balanced 2, '
                       'Proxy Anchor 1 (5 with resnet50), the others 0')
    group.add_argument('--optimizer_type', '--optimizer', type=str.lower, help='adamw, adam, sgd (momentum 0.9); adam* '
                       'and sgd* add --proxy_update momentum (Momentum Proxy\'s spelling)')
    group.add_argument('--lr', type=float, help='learning rate of the network; papers: 1e-4, Momentum Proxy 1e-3 (its '
                       'author later used 2e-5), Asymptotic 4e-5 and Proxy Anchor 6e-4 on sop and isc')
    group.add_argument('--proxy_lr', type=float, help='learning rate of the proxies; papers: 100 x lr, Momentum Proxy '
                       '1 x lr')
    group.add_argument('--weight_decay', '--weight-decay', type=float, help='papers: 1e-4, Asymptotic and Momentum 0')
    group.add_argument('--clip_value', type=float, help='clip each gradient entry to +-value; 0 is off; Proxy '
                       'Anchor 10')
    group.add_argument('--lr_schedule', choices=list(SCHEDULES), help='step: every --lr_decay_step epochs; multistep: '
                       'at --lr_milestones; cosine: to zero; constant. Papers: step, Asymptotic and Momentum multistep')
    group.add_argument('--lr_decay_step', '--lr-decay-step', type=int, help='epochs between the steps; papers: 5, '
                       'Proxy Anchor 5 to 20 by data set and trunk')
    group.add_argument('--lr_decay_gamma', '--lr-decay-gamma', type=float, help='factor at a step or milestone; '
                       'papers: 0.5, multistep 0.1, Proxy Anchor 0.25 on sop and isc')
    group.add_argument('--lr_milestones', type=fraction_list, help='fractions of the epochs; papers: Asymptotic 0.5, '
                       'Momentum 0.5,0.8')
    group.add_argument('--drop_last', type=switch, metavar='{0,1}', help='leave a last, smaller batch out; papers: 0, '
                       'Proxy Anchor 1')

    group = parser.add_argument_group('the run')
    group.add_argument('--recalls', type=int_list, help='values of K; papers: 1,2,4,8 (sop 1,10,100,1000; isc '
                       '1,10,20,30,40,50; Proxy Anchor 1,2,4,8,16,32)')
    group.add_argument('--seed', type=int, default=0, help='of weights, order and augmentation [%(default)s]')
    group.add_argument('--device', default='auto', help='auto, cpu, mps, cuda, cuda:N [%(default)s]')
    group.add_argument('--gpu_id', '--gpu-id', type=gpu_id, dest='device', metavar='N', help='Proxy Anchor\'s spelling '
                       'of --device cuda:N; -1 or a machine without a GPU: the CPU')
    group.add_argument('--shard_proxies', action='store_true', help='with several processes: each holds its share of '
                       'the proxies and of their optimizer state; for millions of classes')
    group.add_argument('--amp', choices=('auto', 'on', 'off'), default='auto', help='compute the network in bfloat16; '
                       'auto: where the device is fast at it. The loss is float32 always [%(default)s]')
    group.add_argument('--results_dir', default='results', help='where the run\'s files go [%(default)s]')
    group.add_argument('--remark', default='', help='added to the run\'s name')
    group.add_argument('--resume', action='store_true', help='go on from the run\'s last checkpoint')
    group.add_argument('--overwrite', action='store_true', help='replace the files of a run of the same name')
    return parser


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line and settle every setting: flag, else recipe.

    Raises:
        UserError: for a value that is not known or out of range, a contradiction, or a flag without effect.
    """
    args = get_parser().parse_args(argv)
    args.data_name = canonical_data_name(args.data_name)
    args.backbone_type = canonical_backbone(args.backbone_type)
    if args.loss_name is not None:
        check_choice('--loss_name', args.loss_name, [*LOSSES, *COMBINED_LOSSES])
    if args.momentum is not None and not (args.recipe or args.loss_name or args.proxy_update or args.optimizer_type):
        raise UserError(f'--momentum {args.momentum} belongs to two systems: add --recipe asymptotic_proxy or '
                        '--recipe momentum_proxy')
    default = args.loss_name if args.loss_name in RECIPES else 'balanced_proxy'
    args.recipe = check_choice('--recipe', default if args.recipe is None else args.recipe, RECIPES)
    given = {name for name, value in vars(args).items() if value is not None}
    settings = recipe_settings(args.recipe, args.data_name, args.backbone_type)
    settle_loss(args, settings, given)
    for name, value in settings.items():
        if name not in given and name in vars(args):
            setattr(args, name, value)
    args.optimizer_type = args.optimizer_type.removesuffix('*')
    check_choice('--optimizer_type', args.optimizer_type, OPTIMIZERS)
    check_effect(args, given)
    check_ranges(args)
    if args.proxy_update == 'momentum':
        args.proxy_lr = None
    elif args.proxy_lr is None:
        args.proxy_lr = args.lr * settings['proxy_lr_factor']
    args.resize_size = args.resize_size or resize_for(args.image_size)
    args.run = name_run(args, settings, given)
    return args


def settle_loss(args: argparse.Namespace, settings: dict, given: set) -> None:
    """Settle loss, rule, scale and momentum, each of which can be said in more than one way."""
    own_loss = args.loss_name in (None, settings['loss_name'])
    args.loss_name = args.loss_name or settings['loss_name']
    combined = COMBINED_LOSSES.get(args.loss_name, {})
    star = (args.optimizer_type or settings['optimizer_type']).endswith('*')
    said = {f'--loss_name {args.loss_name}': combined.get('proxy_update'),
            f'--proxy_update {args.proxy_update}': args.proxy_update,
            f'--optimizer_type {args.optimizer_type}': 'momentum' if star and 'optimizer_type' in given else None}
    said = {flag: rule for flag, rule in said.items() if rule}
    if len(set(said.values())) > 1:
        remedy = f'; use --loss_name {combined["loss_name"]}' if combined else '; leave one of them out'
        raise UserError(f'{" and ".join(said)} contradict each other: the proxies move in one way{remedy}')
    args.proxy_update = next(iter(said.values()), 'momentum' if star else 'gradient')
    if 'momentum' in given and args.proxy_update != 'momentum':
        raise UserError(f'--momentum {args.momentum} has no effect while the proxies move by {args.proxy_update}; add '
                        '--proxy_update momentum, or leave it out')
    if args.proxy_update == 'momentum' and args.momentum is None:
        args.momentum = MOMENTUM
    args.base_loss = combined.get('loss_name', args.loss_name)
    if args.scale is not None and args.temperature is not None:
        raise UserError(f'--scale {args.scale} and --temperature {args.temperature} say the same (temperature = '
                        '1 / scale); leave one of them out')
    if args.temperature is None and args.scale is None:
        args.temperature = (settings.get('temperature') if own_loss else None) or combined.get('temperature')
    if args.temperature is not None:
        if not 1e-6 <= args.temperature < float('inf'):
            raise UserError(f'--temperature {args.temperature} must be a number above 1e-6')
        args.scale = 1 / args.temperature
    loss = LOSSES[args.base_loss]
    if args.margin is not None and loss.margin is None:
        raise UserError(f'--margin {args.margin} has no effect: {args.loss_name} has no margin; leave it out')
    args.scale = loss.scale if args.scale is None else args.scale
    args.margin = loss.margin if args.margin is None else args.margin


def check_effect(args: argparse.Namespace, given: set) -> None:
    """Refuse flags that would change nothing."""
    useless = {
        'proxy_lr': args.proxy_update == 'momentum' and 'proxies that move by momentum have no learning rate',
        'lr_decay_step': args.lr_schedule != 'step' and f'--lr_schedule {args.lr_schedule} has no such step',
        'lr_milestones': args.lr_schedule != 'multistep' and f'--lr_schedule {args.lr_schedule} has no milestones',
        'lr_decay_gamma': args.lr_schedule in ('cosine', 'constant') and f'--lr_schedule {args.lr_schedule} has none',
        'proxy_init': args.proxy_update == 'momentum' and 'proxies that move by momentum start as unit random rows',
        'drop_last': args.images_per_class > 0 and '--images_per_class makes full batches only',
    }
    for name, reason in useless.items():
        if name in given and reason:
            raise UserError(f'--{name} {getattr(args, name)} has no effect: {reason}; leave it out')
    if args.resume and args.overwrite:
        raise UserError('--resume and --overwrite contradict each other; leave one of them out')


def check_ranges(args: argparse.Namespace) -> None:
    """Refuse numbers out of range, with the flag."""
    at_most = {'feature_dim': 65536, 'image_size': 8192, 'resize_size': 8192, 'num_workers': 1024}
    at_least = {'feature_dim': 1, 'num_epochs': 1, 'image_size': 16, 'lr_decay_step': 1, 'warm_up': 0, 'num_workers': 0,
                'weight_decay': 0, 'clip_value': 0, 'seed': 0, 'images_per_class': 0, 'batch_size': 1, 'cache_size': 0}
    for name, smallest in at_least.items():
        largest = at_most.get(name, 2**63 - 1)
        if not smallest <= getattr(args, name) <= largest:
            raise UserError(f'--{name} {getattr(args, name)} must lie between {smallest} and {largest}')
    if args.margin is not None and not 0 <= args.margin < float('inf'):
        raise UserError(f'--margin {args.margin} must be a number of at least 0')
    for name in ('lr', 'proxy_lr', 'lr_decay_gamma', 'scale'):
        value = getattr(args, name)
        if value is not None and not 0 < value < float('inf'):
            raise UserError(f'--{name} {value} must be a positive number')
    if args.momentum is not None and not 0 < args.momentum <= 1:
        raise UserError(f'--momentum {args.momentum} must be above 0 and at most 1')
    if not 0 < args.min_crop <= 1 or not 0 <= args.flip <= 1:
        raise UserError(f'--min_crop {args.min_crop} must lie in (0, 1] and --flip {args.flip} in [0, 1]')
    if args.resize_size is not None and not args.image_size <= args.resize_size <= at_most['resize_size']:
        raise UserError(f'--resize_size {args.resize_size} must lie between --image_size {args.image_size} and '
                        f'{at_most["resize_size"]}')


def name_run(args: argparse.Namespace, settings: dict, given: set) -> str:
    """Name the run: data set, trunk, loss, feature length, then what differs from the recipe of that loss."""
    loss_recipe = args.loss_name if args.loss_name in RECIPES else 'balanced_proxy'
    star = settings['optimizer_type'].endswith('*')
    recipe_rule = COMBINED_LOSSES.get(args.loss_name, {}).get('proxy_update', 'momentum' if star else 'gradient')
    return run_name(
        args.data_name, args.backbone_type, args.loss_name, args.feature_dim,
        args.recipe if args.recipe != loss_recipe else '',
        args.proxy_update if args.proxy_update != recipe_rule else '',
        f't{1 / args.scale:.4g}' if given & {'scale', 'temperature'} else '',
        f'd{args.margin:g}' if 'margin' in given else '',
        f'm{args.momentum:g}' if 'momentum' in given else '',
        args.crop_type if args.crop_type != 'uncropped' else '',
        f'seed{args.seed}' if args.seed else '',
        args.remark)


# ---------------------------------------------------- one epoch ------------------------------------------------------
def train_one_epoch(model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader,
                    device: torch.device, amp: bool, clip_value: float, title: str) -> dict[str, float]:
    """Train on every batch of the loader once; returns mean loss, accuracy (per cent) and images per second.

    Raises:
        UserError: if the loss is not finite.
    """
    model.train()
    criterion.train()
    parameters = [parameter for group in optimizer.param_groups for parameter in group['params']]
    totals = torch.zeros(3, device=device)  # sums of loss and accuracy, images; read a few times a second
    start = shown = time.perf_counter()
    bar = progress(loader, desc=title, unit='batch')
    for images, labels in bar:
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            embeddings = model(images)
        loss = criterion(embeddings, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if clip_value:
            nn.utils.clip_grad_value_(parameters, clip_value)
        optimizer.step()

        totals += torch.stack([loss.detach(), criterion.accuracy, totals.new_ones(())]) * criterion.num_samples
        if time.perf_counter() - shown > 0.3:
            shown = time.perf_counter()
            mean = read_totals(totals, shown - start)
            bar.set_postfix_str(f'loss {mean["loss"]:.4f}, accuracy {mean["accuracy"]:.1f} %, '
                                f'{mean["img_s"]:.0f} img/s')
    return read_totals(totals, time.perf_counter() - start)


def distribute(model: EmbeddingNet, device: torch.device) -> nn.Module:
    """Wrap the network so that its gradient is the mean over the processes; one process needs no wrapper.

    Freezing after wrapping fails, and what was frozen when wrapped is never synchronised: wrap again when that changes.
    """
    if world_size() == 1:
        return model
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == 'cuda' else None)


def read_totals(totals: torch.Tensor, seconds: float) -> dict[str, float]:
    """Read the meter of an epoch; this waits for the device."""
    loss, accuracy, count = totals.tolist()
    if not math.isfinite(loss):
        raise UserError(f'the loss is not finite after {count:.0f} images of this epoch; lower --lr or --proxy_lr')
    return {'loss': loss / count, 'accuracy': 100 * accuracy / count, 'img_s': count / seconds}


# ---------------------------------------------------- files of a run -------------------------------------------------
def claim_run(args: argparse.Namespace) -> dict[str, Path]:
    """Return the paths of the run's files, {'statistics': ..., 'model': ..., ...}.

    Raises:
        UserError: if the folder cannot be written to, or the name is taken and neither --resume nor --overwrite is set.
    """
    folder = make_folder('--results_dir', Path(args.results_dir))
    files = {name.split('.')[0]: folder / f'{args.run}_{name}' for name in RUN_FILES}
    taken = any(file.exists() for file in files.values())
    if args.resume and not files['checkpoint'].is_file():
        raise UserError(f'--resume: there is no {files["checkpoint"]}; start the run without --resume')
    if taken and not (args.resume or args.overwrite):
        raise UserError(f'a run named {args.run} is in {folder} already; add --resume to go on with it, --remark WORD '
                        'to name this one otherwise, or --overwrite to replace it')
    return files


def portable_args(args: argparse.Namespace) -> dict:
    """Return the settings that make a run what it is: no paths, no device, so that its files say nothing of a place."""
    settings = {name: value for name, value in vars(args).items() if name not in PLACE}
    settings['weights'] = Path(args.weights).name
    return settings


def fingerprint(split: dict) -> str:
    """Return a hash of the classes, images and subsets of a split."""
    return hashlib.sha256(json.dumps(split).encode()).hexdigest()


def load_checkpoint(file: Path, args: argparse.Namespace, split: dict) -> dict:
    """Load the checkpoint of a run and check that it was started with the same settings on the same data.

    Raises:
        UserError: naming the settings that differ.
    """
    checkpoint = load(file, 'checkpoint', ('version', 'args', 'split', 'epoch', 'rows', 'model', 'criterion',
                                           'optimizer', 'schedule', 'rng'))
    if checkpoint['version'] != CHECKPOINT_VERSION:
        raise UserError(f'--resume: {file} was written by another version of train.py; start again with --overwrite')
    if checkpoint['split'] != fingerprint(split):
        raise UserError(f'--resume: the data set {args.data_name} was converted anew since the run {args.run} began; '
                        'convert it as it was, or name a new run with --remark')
    now, before = portable_args(args), checkpoint['args']
    differ = [f'--{name} {now.get(name)} (was {before.get(name)})' for name in sorted(now.keys() | before.keys())
              if now.get(name) != before.get(name)]
    if differ:
        raise UserError(f'--resume: the run {args.run} was started with other settings: {", ".join(differ)}; give the '
                        'same, or name a new run with --remark')
    return checkpoint


def restore(checkpoint: dict, file: Path, model, criterion, optimizer, schedule) -> None:
    """Put the states of a checkpoint into model, criterion, optimizer, schedule and the random generator."""
    try:
        model.load_state_dict(checkpoint['model'])
        criterion.load_full_state_dict(checkpoint['criterion'])
        criterion.load_full_optimizer_state(optimizer, checkpoint['optimizer'])
        schedule.load_state_dict(checkpoint['schedule'])
        torch.set_rng_state(checkpoint['rng'])
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = str(error).splitlines()[0][:120]
        raise UserError(f'{file} is damaged ({reason}); start again with --overwrite') from None


def flatten(results: dict[str, dict[str, float]]) -> dict[str, float]:
    """Turn {'dense': {'R@1': ...}, ...} into {'dense_R@1': ...}, the columns of the statistics."""
    return {f'{kind}_{name}': value for kind, metrics in results.items() for name, value in metrics.items()
            if name not in COUNTS}


def describe(row: dict, recalls: tuple[int, ...]) -> str:
    """Return the recalls of an epoch as a phrase: `R@1 72.09 R@2 81.24 (binary 70.11 79.30)`."""
    dense = ' '.join(f'R@{k} {row[f"dense_R@{k}"]:.2f}' for k in recalls)
    binary = ' '.join(f'{row[f"binary_R@{k}"]:.2f}' for k in recalls)
    return f'{dense} (binary {binary})'


def print_end(rows: list[dict], args: argparse.Namespace, files: dict[str, Path], query: str) -> None:
    """Print the best and the last epoch, and the commands that come next."""
    best = max(rows, key=lambda row: row['dense_R@1'])
    print(f'best epoch {best["epoch"]} (chosen on the test classes, as in the papers): {describe(best, args.recalls)}')
    print(f'last epoch {rows[-1]["epoch"]}: {describe(rows[-1], args.recalls)}')
    look_up = ['python', 'test.py', '--data_base', str(files['data_base']), '--data_path', args.data_path]
    if args.results_dir != 'results':
        look_up += ['--results_dir', args.results_dir]
    print('next:')
    print('  ' + shlex.join(['python', 'evaluate.py', '--data_base', str(files['data_base'])]))
    print('  ' + shlex.join([*look_up, '--query_img_name', query]))


def check_data(args: argparse.Namespace, split: dict) -> None:
    """Refuse settings that do not fit the data, before anything is built."""
    if len(split['train']) < 2:
        raise UserError(f'--data_name {args.data_name} has one training class; a loss needs at least two')
    num_images = count_images(split['train'])
    last_batch = num_images % args.batch_size
    if min(args.batch_size, last_batch if last_batch and not args.drop_last else num_images) < world_size():
        raise UserError(f'--batch_size {args.batch_size} of {num_images} images leaves a batch with no image for some '
                        f'of the {world_size()} processes; add --drop_last 1, or choose another size')
    if args.shard_proxies and world_size() == 1:
        raise UserError('--shard_proxies has no effect in one process; start several with torchrun, or leave it out')
    if not (args.freeze_bn or args.drop_last or args.images_per_class) and 1 in (args.batch_size, last_batch):
        raise UserError(f'--batch_size {args.batch_size} leaves a batch of one image, which has no BatchNorm '
                        'statistics; add --drop_last 1, or choose another size')
    searched = count_images(split['gallery']) if 'gallery' in split else count_images(split['test']) - 1
    if args.recalls[-1] > searched:
        raise UserError(f'--recalls {args.recalls[-1]} is larger than the {searched} images that a query is searched '
                        'in')


# ---------------------------------------------------- main -----------------------------------------------------------
def main() -> None:
    """Train as the command line says."""
    args = get_args()
    device = select_device(start_processes(args.device))
    torch.manual_seed(args.seed)

    # ---- data ----
    root, split = read_split(args.data_path, args.data_name, args.crop_type)
    sampler = BatchSampler([number for number, paths in enumerate(split['train'].values()) for _ in paths],
                           args.batch_size, args.images_per_class, args.drop_last, args.seed, world_rank(),
                           world_size())
    check_data(args, split)
    files = claim_run(args)
    checkpoint = load_checkpoint(files['checkpoint'], args, split) if args.resume else None
    cache = Cache(root, args.crop_type, args.cache_size, split) if args.cache_size else None

    # ---- model, loss, optimizer ----
    with first_process_first():
        model = EmbeddingNet(args.backbone_type, args.feature_dim, args.pooling, args.layer_norm, args.linear_bias,
                             args.freeze_bn, 'none' if checkpoint else args.weights, args.image_size, args.max_pool)
    model = model.to(device, memory_format=torch.channels_last)
    criterion = LOSSES[args.base_loss](len(split['train']), model.feature_dim, args.proxy_update,
                                       args.momentum or MOMENTUM, args.scale, args.margin, args.proxy_init,
                                       args.shard_proxies).to(device)
    groups = [{'params': list(model.parameters()), 'lr': args.lr}]
    if args.proxy_update != 'momentum':
        groups.append({'params': list(criterion.parameters()), 'lr': args.proxy_lr})
    optimizer = OPTIMIZERS[args.optimizer_type](groups, lr=args.lr, weight_decay=args.weight_decay)
    schedule = SCHEDULES[args.lr_schedule](optimizer, args)
    train_amp, test_amp = (use_amp(args.amp, device, model, training) for training in (True, False))

    train_set = RetrievalDataset(root, split['train'], make_transform(
        True, args.image_size, interpolation=model.interpolation, min_crop=args.min_crop, flip=args.flip),
        args.seed, split['class_names'], cache=cache)
    loader = DataLoader(train_set, batch_sampler=sampler, num_workers=args.num_workers,
                        pin_memory=device.type == 'cuda', persistent_workers=args.num_workers > 0)
    test_loaders = make_test_loaders(
        root, split, make_transform(False, args.image_size, args.resize_size, model.interpolation), args.batch_size,
        args.num_workers, device, cache)

    first_epoch, rows = 1, []
    if checkpoint:
        restore(checkpoint, files['checkpoint'], model, criterion, optimizer, schedule)
        first_epoch, rows = checkpoint['epoch'] + 1, checkpoint['rows']
    print(f'{args.run}: recipe {args.recipe}, {args.base_loss} with proxies moved by {args.proxy_update}; '
          f'{len(train_set):,} images of {len(split["train"]):,} classes; {device}, '
          f'{"bfloat16" if train_amp else "float32"}')

    # ---- epochs: the first one writes all four files, which is when --overwrite takes place ----
    for epoch in range(first_epoch, args.num_epochs + 1):
        if epoch in (first_epoch, args.warm_up + 1):
            network = None  # parts the old wrapper from the parameters
            model.freeze_trunk(epoch <= args.warm_up)
            network = distribute(model, device)
        criterion.synchronise()
        train_set.set_epoch(epoch)
        sampler.set_epoch(epoch)
        rates = [group['lr'] for group in optimizer.param_groups]
        trained = train_one_epoch(network, criterion, optimizer, loader, device, train_amp, args.clip_value,
                                  f'epoch {epoch}/{args.num_epochs}')
        schedule.step()
        data_base = make_data_base(model, test_loaders, device, test_amp)
        results = measure(data_base, args.recalls, device)
        row = {'epoch': epoch, **trained, 'lr': rates[0], 'proxy_lr': rates[-1] if len(rates) > 1 else 0.0,
               **flatten(results)}
        print(f'epoch {epoch}/{args.num_epochs}: loss {row["loss"]:.4f}, accuracy {row["accuracy"]:.1f} %, '
              f'{row["img_s"]:.0f} img/s; {describe(row, args.recalls)}', flush=True)
        chance = 100 / len(split['train'])
        # Not in the first epoch of the whole network: from random weights it starts at chance.
        if row['accuracy'] < min(2 * chance, chance + 5) and epoch > args.warm_up + 1:
            print(f'collapsed? an accuracy of {row["accuracy"]:.2f} % is chance for {len(split["train"])} classes; '
                  'try a smaller --lr' + (', or a --momentum nearer 0.5' if args.proxy_update == 'momentum' else ''))

        # ---- save: what --resume reads comes last, so that a crash before it repeats the epoch ----
        best = all(row['dense_R@1'] > earlier['dense_R@1'] for earlier in rows)
        rows.append(row)
        made_by = {'args': portable_args(args), 'epoch': epoch}
        proxies, criterion_state = criterion.all_proxies(), criterion.full_state_dict()
        optimizer_state = criterion.full_optimizer_state(optimizer)
        if world_rank() > 0:
            continue
        if best:
            save({'config': model.config, 'state_dict': model.state_dict(), **made_by}, files['model'])
            save({**data_base, 'train_proxies': nn.functional.normalize(proxies, dim=-1).cpu(),
                  'train_class_names': train_set.class_names, **made_by}, files['data_base'])
        save_statistics(rows, portable_args(args), files['statistics'])
        save({'model': model.state_dict(), 'criterion': criterion_state, 'optimizer': optimizer_state,
              'schedule': schedule.state_dict(), 'rng': torch.get_rng_state(), 'rows': rows,
              'split': fingerprint(split), 'version': CHECKPOINT_VERSION, **made_by}, files['checkpoint'])
    if world_rank() == 0:
        draw_curves(pd.DataFrame(rows), files['curves'], args.run)
        print_end(rows, args, files, test_loaders['test'].dataset.images[0])


if __name__ == '__main__':
    run_script(main)
