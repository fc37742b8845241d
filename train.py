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

from settings import get_args
from utils import (UserError, first_process_first, load, make_folder, progress, run_script, save, save_statistics,
                   select_device, start_processes, world_rank, world_size)

if __name__ == '__main__':
    run_script(lambda: get_args(description=__doc__))  # --help and mistakes need not wait for the imports below

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from cache import Cache
from data_utils import BatchSampler, RetrievalDataset, count_images, make_transform, read_split
from evaluate import make_data_base, make_test_loaders, measure, use_amp
from metrics import COUNTS
from model import LOSSES, EmbeddingNet
from recipes import MOMENTUM

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
        from plot import draw_curves, read_statistics  # half a second, most of it pandas, before the first batch

        draw_curves(read_statistics(files['statistics']), files['curves'], args.run)
        print_end(rows, args, files, test_loaders['test'].dataset.images[0])


if __name__ == '__main__':
    run_script(main)
