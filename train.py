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
the test classes, or on held out training classes with --val_ratio), {run}_checkpoint.pth (for --resume), and at its end
{run}_curves.png and .pdf. Several runs that differ in their seed alone leave {run}_seeds.csv as well:

    python train.py --recipe proxy_anchor --val_ratio 0.2 --seeds 1,2,3,4,5           # --resume goes on where it ended
"""
import argparse
import contextlib
import functools
import hashlib
import json
import math
import os
import shlex
import shutil
import time
from pathlib import Path

from settings import get_args
from utils import (UserError, first_process_first, load, locked, make_folder, progress, provenance, run_script, save,
                   save_statistics, select_device, start_processes, world_rank, world_size, write_atomically)

if __name__ == '__main__':
    run_script(lambda: get_args(description=__doc__))  # --help and mistakes need not wait for the imports below

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from cache import Cache
from data_utils import (BatchSampler, RetrievalDataset, batches, count_images, end_with_parent, make_transform,
                        read_split)
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
PLACE = ('data_path', 'results_dir', 'device', 'num_workers', 'shard_proxies', 'on_collapse', 'seeds', 'runs', 'group',
         'resume', 'overwrite', 'replaced')
CHECKPOINT_VERSION = 2
CHECKPOINT = {'version': int, 'args': dict, 'split': str, 'epoch': int, 'rows': list, 'model': dict,
              'criterion': dict, 'optimizer': dict, 'schedule': dict, 'rng': torch.Tensor}
RUN_FILES = ('statistics.csv', 'model.pth', 'data_base.pth', 'checkpoint.pth', 'curves.png')


# ---------------------------------------------------- one epoch ------------------------------------------------------
def train_one_epoch(model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader,
                    device: torch.device, amp: bool, clip_value: float, title: str) -> dict[str, float]:
    """Train on every batch of the loader once; returns mean loss, accuracy (per cent) and images per second.

    Raises:
        UserError: if the loss is not finite, with the step and what was in its batch.
    """
    model.train()
    criterion.train()
    parameters = [parameter for group in optimizer.param_groups for parameter in group['params']]
    totals = torch.zeros(4, device=device)  # sums of loss and accuracy, images, steps; read a few times a second

    def read() -> dict[str, float]:
        """Read the meter; this waits for the device."""
        loss, accuracy, count, steps = totals.tolist()
        if not math.isfinite(loss):
            raise UserError(describe_failure(int(steps) + 1, loader, optimizer))
        seconds = time.perf_counter() - start
        return {'loss': loss / count, 'accuracy': 100 * accuracy / count, 'img_s': count / seconds}

    start = shown = time.perf_counter()
    bar = progress(batches(loader), desc=title, unit='batch', total=len(loader))
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

        totals[:3] += torch.stack([loss.detach(), criterion.accuracy, totals.new_ones(())]) * criterion.num_samples
        totals[3] += totals[0].isfinite()  # the steps until the loss was not finite
        if time.perf_counter() - shown > 0.3:
            shown = time.perf_counter()
            mean = read()
            bar.set_postfix_str(f'loss {mean["loss"]:.4f}, accuracy {mean["accuracy"]:.1f} %, '
                                f'{mean["img_s"]:.0f} img/s')
    return read()


def describe_failure(step: int, loader: DataLoader, optimizer: torch.optim.Optimizer) -> str:
    """Say in which step of an epoch the loss was not finite, with which learning rates and images."""
    rates = ' and '.join(f'{group["lr"]:g} ({what})' for group, what in zip(
        optimizer.param_groups, ('network', 'proxies'), strict=False))  # moving proxies have no rate
    batch = list(loader.batch_sampler)[step - 1]
    images = ', '.join(loader.dataset.images[index] for index in batch[:4])
    return (f'the loss is not finite in step {step} of this epoch, at a learning rate of {rates}, '
            f'with {len(batch)} images, {images}{", ..." if len(batch) > 4 else ""}; lower --lr or --proxy_lr, or set '
            '--clip_value 10')


def distribute(model: EmbeddingNet, device: torch.device) -> nn.Module:
    """Wrap the network so that its gradient is the mean over the processes; one process needs no wrapper.

    Freezing after wrapping fails, and what was frozen when wrapped is never synchronised: wrap again when that changes.
    """
    if world_size() == 1:
        return model
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == 'cuda' else None)


# ---------------------------------------------------- files of a run -------------------------------------------------
@contextlib.contextmanager
def claim_run(args: argparse.Namespace):
    """Hold the run's files for this process; gives their paths, {'statistics': ..., 'model': ..., ...}.

    Raises:
        UserError: if the folder cannot be written to, another process trains a run of this name, or the name is taken
            and neither --resume nor --overwrite is set.
    """
    folder = make_folder('--results_dir', Path(args.results_dir))
    files = {name.split('.')[0]: folder / f'{args.run}_{name}' for name in RUN_FILES}
    alone = locked(folder / f'.{args.run}.lock', f'another process is training the run {args.run} in {folder}; wait '
                   'for it, or name this one otherwise with --remark WORD')
    with alone if world_rank() == 0 else contextlib.nullcontext():
        taken = any(file.exists() for file in files.values())
        if args.resume and not files['checkpoint'].is_file():
            raise UserError(f'--resume: there is no {files["checkpoint"]}; start the run '
                            f'without --resume{" and with --overwrite" if taken else ""}')
        if taken and not (args.resume or args.overwrite):
            raise UserError(f'a run named {args.run} is in {folder} already; add --resume to go on with it, --remark '
                            'WORD to name this one otherwise, or --overwrite to replace it')
        if world_rank() == 0:  # what a process that was killed while it wrote has left
            for name in (*RUN_FILES, 'curves.pdf'):
                for left in folder.glob(f'.{args.run}_{name}.????????'):
                    left.unlink()
        earlier = files['checkpoint'].stat().st_mtime_ns if taken and files['checkpoint'].exists() else None
        try:
            yield files
        except KeyboardInterrupt as stop:
            file = files['checkpoint']
            if not file.exists():
                hint = 'no epoch was complete, nothing is saved'
            elif args.overwrite and earlier == file.stat().st_mtime_ns:
                hint = f'no epoch was complete, and the run {args.run} from before is untouched'
            else:
                epoch = load(file, 'checkpoint', ('epoch',))['epoch']
                hint = (f'epoch {epoch} of {args.run} is saved; the same command with '
                        f'--resume{" for --overwrite" if args.overwrite else ""} goes on')
            raise type(stop)(hint) from None


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
    checkpoint = load(file, 'checkpoint', tuple(CHECKPOINT))
    wrong = [name for name, kind in CHECKPOINT.items() if type(checkpoint[name]) is not kind]
    rows = checkpoint['rows']
    if wrong or checkpoint['epoch'] != len(rows) or not all(
            type(row) is dict and row.keys() == rows[0].keys() and all(
                type(value) in (int, float) for value in row.values()) for row in rows):
        raise UserError(f'--resume: {file} is damaged ({", ".join(wrong) or "rows"}); start again with --overwrite')
    if checkpoint['version'] != CHECKPOINT_VERSION:
        raise UserError(f'--resume: {file} was written by another version of train.py; start again with --overwrite')
    if checkpoint['split'] != fingerprint(split):
        raise UserError(f'--resume: the data set {args.data_name} was converted anew since the run {args.run} began; '
                        'convert it as it was, or name a new run with --remark')
    now, before = portable_args(args), checkpoint['args']
    differ = [f'--{name} {now.get(name)} (was {" ".join(str(before.get(name)).split())})'
              for name in sorted(now.keys() | before.keys(), key=str)
              if repr(now.get(name)) != repr(before.get(name))]  # a tensor has no one answer to !=
    if differ:
        raise UserError(f'--resume: the run {args.run} was started with other settings: {", ".join(differ)}; give the '
                        'same, or name a new run with --remark')
    columns = {'epoch', 'lr', 'proxy_lr', *(f'{kind}_R@{k}' for kind in ('dense', 'binary') for k in args.recalls)}
    if not all(columns <= row.keys() for row in rows):
        raise UserError(f'--resume: {file} is damaged (rows); start again with --overwrite')
    return checkpoint


def restore(checkpoint: dict, file: Path, model, criterion, optimizer, schedule) -> None:
    """Put the states of a checkpoint into model, criterion, optimizer, schedule and the random generator."""
    try:
        model.load_state_dict(checkpoint['model'])
        criterion.load_full_state_dict(checkpoint['criterion'])
        criterion.load_full_optimizer_state(optimizer, checkpoint['optimizer'])
        for parameter, state in optimizer.state.items():  # torch does not look at the shapes
            for name, value in state.items():
                if torch.is_tensor(value) and value.shape not in (parameter.shape, ()):
                    raise ValueError(f'{name} of the optimizer has the shape {tuple(value.shape)}')
        schedule.load_state_dict(checkpoint['schedule'])
        torch.set_rng_state(checkpoint['rng'])
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise UserError(f'{file} is damaged ({reason}); start again with --overwrite') from None


def flatten(results: dict[str, dict[str, float]]) -> dict[str, float]:
    """Turn {'dense': {'R@1': ...}, ...} into {'dense_R@1': ...}, the columns of the statistics."""
    return {f'{kind}_{name}': value for kind, metrics in results.items() for name, value in metrics.items()
            if name not in COUNTS}


def check_collapse(row: dict, num_classes: int, args: argparse.Namespace) -> None:
    """Stop, or warn, where an epoch's accuracy is that of chance: moving proxies can fall together.

    Source: Asymptotic Proxy, whose runs collapsed at a momentum of 0.05 to 0.1.
    """
    chance = 100 / num_classes
    if row['accuracy'] >= min(2 * chance, chance + 5):
        return
    rates = f'{row["lr"]:g}' + (f' and {row["proxy_lr"]:g} (proxies)' if row['proxy_lr'] else '')
    message = (f'collapsed? an accuracy of {row["accuracy"]:.2f} % in epoch {row["epoch"]} is chance for {num_classes} '
               f'classes, at a learning rate of {rates}; try a smaller --lr'
               + (f', or a --momentum nearer 0.5 than {args.momentum:g}' if args.proxy_update == 'momentum' else ''))
    if args.on_collapse == 'stop':
        raise UserError(f'{message}; --resume --on_collapse warn goes on all the same')
    print(message, flush=True)


def describe(row: dict, recalls: tuple[int, ...]) -> str:
    """Return the recalls of an epoch as a phrase: `R@1 72.09 R@2 81.24 (binary 70.11 79.30)`."""
    dense = ' '.join(f'R@{k} {row[f"dense_R@{k}"]:.2f}' for k in recalls)
    binary = ' '.join(f'{row[f"binary_R@{k}"]:.2f}' for k in recalls)
    return f'{dense} (binary {binary})'


def chosen_epoch(rows: list[dict]) -> dict:
    """Return the row of the best epoch: on held out training classes where there are some, else on the test classes."""
    return max(rows, key=lambda row: row.get('val_dense_R@1', row['dense_R@1']))


def print_end(rows: list[dict], args: argparse.Namespace, files: dict[str, Path], query: str) -> None:
    """Print the chosen, the last and the best epoch, and the commands that come next."""
    best, chosen = max(rows, key=lambda row: row['dense_R@1']), chosen_epoch(rows)
    if args.val_ratio:
        print(f'epoch {chosen["epoch"]}, chosen on held out training classes: {describe(chosen, args.recalls)}')
    print(f'best epoch {best["epoch"]} (chosen on the test classes, as in the papers): {describe(best, args.recalls)}')
    print(f'last epoch {rows[-1]["epoch"]}: {describe(rows[-1], args.recalls)}')
    look_up = ['python', 'test.py', '--data_base', str(files['data_base']), '--data_path', args.data_path]
    if args.results_dir != 'results':
        look_up += ['--results_dir', args.results_dir]
    print('next:')
    print('  ' + shlex.join(['python', 'evaluate.py', '--data_base', str(files['data_base'])]))
    print('  ' + shlex.join([*look_up, '--query_img_name', query]))


def report_seeds(runs: dict[int, list[dict]], name: str, folder: Path) -> None:
    """Save and print the mean of R@1 over runs that differ in their seed alone, and how sure it is.

    The interval holds the mean of more runs with 95 % confidence (Student's t distribution).

    Args:
        runs: {seed: rows of its statistics}.
        name: of the run without a seed.
        folder: where {name}_seeds.csv goes.
    """
    import pandas as pd
    from scipy import stats

    epochs = {'last': lambda rows: rows[-1], 'best on the test classes': lambda rows: max(
        rows, key=lambda row: row['dense_R@1'])}
    if 'val_dense_R@1' in next(iter(runs.values()))[0]:
        epochs = {'chosen on held out training classes': chosen_epoch, **epochs}
    table = []
    for epoch, choose in epochs.items():
        values = pd.Series([choose(rows)['dense_R@1'] for rows in runs.values()])
        half = stats.t.ppf(0.975, len(values) - 1) * values.sem()
        table.append({'run': name, 'epoch': epoch, 'seeds': ' '.join(map(str, runs)), 'mean_R@1': values.mean(),
                      'std_R@1': values.std(), 'low_R@1': values.mean() - half, 'high_R@1': values.mean() + half})
    write_atomically(folder / f'{name}_seeds.csv', lambda file: pd.DataFrame(table).to_csv(file, index=False))
    print(f'R@1 over {len(runs)} seeds, {folder / f"{name}_seeds.csv"}:')
    print('| run | epoch | R@1, mean and standard deviation | 95 % interval of the mean |\n|---|---|---|---|')
    for row in table:
        print(f'| {name} | {row["epoch"]} | {row["mean_R@1"]:.2f} +- {row["std_R@1"]:.2f} | '
              f'{row["low_R@1"]:.2f} to {row["high_R@1"]:.2f} |')


def hold_out(split: dict, ratio: float, seed: int) -> dict:
    """Move a share of the training classes, drawn with the seed, to a subset `val`.

    Raises:
        UserError: if fewer than two classes would be left to train on, or none held out has two images.
    """
    labels = sorted(split['train'])
    number = max(1, round(ratio * len(labels)))
    held = set(np.random.default_rng(seed).permutation(labels)[:number].tolist())
    val = {label: paths for label, paths in split['train'].items() if label in held}
    if len(labels) - number < 2 or max(map(len, val.values())) < 2:
        raise UserError(f'--val_ratio {ratio} of {len(labels)} training classes leaves too few to train on, or holds '
                        'out none with two images; choose another, or leave it out')
    train = {label: paths for label, paths in split['train'].items() if label not in held}
    return {**split, 'train': train, 'val': val}


def check_data(args: argparse.Namespace, split: dict, device: torch.device) -> None:
    """Refuse settings that do not fit the data or the machine, before anything is built."""
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
    if args.compile and device.type == 'cpu' and not shutil.which(os.environ.get('CXX', 'g++')):
        raise UserError('--compile needs a C++ compiler on a CPU and finds no g++; install one, or leave it out')
    searched = count_images(split['gallery']) if 'gallery' in split else count_images(split['test']) - 1
    if args.recalls[-1] > searched:
        raise UserError(f'--recalls {args.recalls[-1]} is larger than the {searched} images that a query is searched '
                        'in')


# ---------------------------------------------------- main -----------------------------------------------------------
def train(args: argparse.Namespace, files: dict[str, Path], device: torch.device) -> list[dict]:
    """Train one run as the command line says; returns the rows of its statistics."""
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(args.deterministic)
    made_with = provenance(device)

    # ---- data ----
    root, split = read_split(args.data_path, args.data_name, args.crop_type)
    cache = Cache(root, args.crop_type, args.cache_size, split) if args.cache_size else None
    split = hold_out(split, args.val_ratio, args.seed) if args.val_ratio else split
    sampler = BatchSampler([number for number, paths in enumerate(split['train'].values()) for _ in paths],
                           args.batch_size, args.images_per_class, args.drop_last, args.seed, world_rank(),
                           world_size())
    check_data(args, split, device)
    checkpoint = load_checkpoint(files['checkpoint'], args, split) if args.resume else None

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
                        pin_memory=device.type == 'cuda', persistent_workers=args.num_workers > 0,
                        worker_init_fn=end_with_parent,
                        generator=torch.Generator())  # else the network's random numbers depended on the workers
    test_transform = make_transform(False, args.image_size, args.resize_size, model.interpolation)
    make_loaders = functools.partial(
        make_test_loaders, root, transform=test_transform,
        batch_size=args.batch_size, num_workers=args.num_workers, device=device, cache=cache)
    test_loaders = make_loaders(split)
    val_loaders = make_loaders({'test': split['val'], 'class_names': split['class_names']}) if args.val_ratio else None

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
            network = torch.compile(network) if args.compile else network
        criterion.synchronise()
        train_set.set_epoch(epoch)
        sampler.set_epoch(epoch)
        rates = [group['lr'] for group in optimizer.param_groups]
        trained = train_one_epoch(network, criterion, optimizer, loader, device, train_amp, args.clip_value,
                                  f'epoch {epoch}/{args.num_epochs}')
        schedule.step()
        data_base = make_data_base(model, test_loaders, device, test_amp)
        row = {'epoch': epoch, **trained, 'lr': rates[0], 'proxy_lr': rates[-1] if len(rates) > 1 else 0.0,
               **flatten(measure(data_base, args.recalls, device))}
        if val_loaders:
            found = measure(make_data_base(model, val_loaders, device, test_amp), (1,), device)
            row |= {f'val_{name}': value for name, value in flatten(found).items()}
        print(f'epoch {epoch}/{args.num_epochs}: loss {row["loss"]:.4f}, accuracy {row["accuracy"]:.1f} %, '
              f'{row["img_s"]:.0f} img/s; {describe(row, args.recalls)}', flush=True)

        # ---- save: what --resume reads comes last, so that a crash before it repeats the epoch ----
        rows.append(row)
        best = chosen_epoch(rows) is row
        made_by = {'args': portable_args(args), 'epoch': epoch, 'made_with': made_with}
        proxies, criterion_state = criterion.all_proxies(), criterion.full_state_dict()
        optimizer_state = criterion.full_optimizer_state(optimizer)
        if world_rank() == 0:
            if epoch == 1:  # --overwrite takes place: of what it replaces nothing may be left beside the new
                for file in args.replaced:
                    file.unlink(missing_ok=True)
            if best:
                save({'config': model.config, 'state_dict': model.state_dict(), **made_by}, files['model'])
                save({**data_base, 'train_proxies': nn.functional.normalize(proxies, dim=-1).cpu(),
                      'train_class_names': train_set.class_names, **made_by}, files['data_base'])
            save_statistics(rows, portable_args(args), files['statistics'], made_with)
            save({'model': model.state_dict(), 'criterion': criterion_state, 'optimizer': optimizer_state,
                  'schedule': schedule.state_dict(), 'rng': torch.get_rng_state(), 'rows': rows,
                  'split': fingerprint(split), 'version': CHECKPOINT_VERSION, **made_by}, files['checkpoint'])
        if epoch > args.warm_up + 1:  # from random weights the whole network may start at chance
            check_collapse(row, len(split['train']), args)
    if world_rank() == 0:
        from plot import draw_curves, read_statistics  # half a second, most of it pandas, before the first batch

        draw_curves(read_statistics(files['statistics']), files['curves'], args.run)
        print_end(rows, args, files, test_loaders['test'].dataset.images[0])
    return rows


def main() -> None:
    """Train as the command line says, once for each seed."""
    args = get_args()
    if args.deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # read when the GPU is first used
    device = select_device(start_processes(args.device))
    runs, folder = {}, Path(args.results_dir)
    for seed, name in args.runs.items():
        one = argparse.Namespace(**{**vars(args), 'seed': seed, 'run': name})
        if args.seeds:  # --resume starts those that are not there
            one.resume = args.resume and (folder / f'{name}_checkpoint.pth').is_file()
            one.overwrite = args.overwrite or (args.resume and not one.resume)  # of a first epoch that was cut off
        # With --overwrite the seeds that come later are to be trained anew as well, after an interruption too.
        later = [other for number, other in args.runs.items() if args.overwrite and number not in runs]
        one.replaced = [*(folder / f'{name}_{file}' for file in (*RUN_FILES, 'curves.pdf')),
                        *(folder / f'{other}_checkpoint.pth' for other in later)]
        with claim_run(one) as files:
            runs[seed] = train(one, files, device)
    if args.seeds and world_rank() == 0:
        report_seeds(runs, args.group, Path(args.results_dir))


if __name__ == '__main__':
    run_script(main)
