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
import math
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from settings import PML, get_runs
from utils import parse_keywords, run_script

if __name__ == '__main__':  # --help and mistakes need not wait for the imports below
    COMMAND = run_script(lambda: get_runs(description=__doc__))

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader

from begin import Start, claim_run, fingerprint, load_checkpoint, restore, settings_of, start_from
from dataset import (BatchSampler, ImageData, RetrievalDataset, batches_in_order, hold_out, make_loader,
                     make_test_loaders, make_transform, open_data)
from engine.errors import UserError
from engine.files import save
from engine.logs import RunLog
from engine.processes import (broadcast, first_process_first, progress, select_device, start_processes, world_rank,
                              world_size)
from engine.runs import (CHECKPOINT_VERSION, DataBase, RunFiles, check_seen, load_model_file, provenance,
                         read_statistics, save_statistics, seen_classes)
from evaluate import extract_embeddings, make_data_base, measure, tensors_on, use_amp
from metrics import measure_absent
from model import EmbeddingNet, NetConfig, ProxyLoss, make_loss
from raw_sets import count_images
from recipes import MOMENTUM
from summary import check_collapse, chosen_epoch, describe, flatten, print_end, report_seeds


# ---------------------------------------------------- one epoch ------------------------------------------------------
@dataclass
class Learner:
    """What a training step needs."""

    network: nn.Module  # images -> embeddings
    criterion: ProxyLoss
    optimizer: torch.optim.Optimizer
    device: torch.device
    amp: bool = False  # compute the network in bfloat16
    clip_value: float = 0.0  # clip each gradient entry to +-value; 0 is off


def train_one_epoch(learner: Learner, loader: DataLoader, title: str) -> dict[str, float]:
    """Train on every batch of the loader once; returns mean loss, accuracy (per cent) and images per second.

    Raises:
        UserError: if the loss is not finite, with the step and what was in its batch.
    """
    network, criterion, optimizer, device = learner.network, learner.criterion, learner.optimizer, learner.device
    network.train()
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
    bar = progress(loader, desc=title, unit='batch', total=len(loader))
    for images, labels in bar:
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=learner.amp):
            embeddings = network(images)
        loss = criterion(embeddings, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if learner.clip_value:
            nn.utils.clip_grad_value_(parameters, learner.clip_value)
        optimizer.step()

        totals[:3] += torch.stack([loss.detach(), criterion.accuracy, totals.new_ones(())]) * criterion.num_samples
        totals[3] += totals[0].isfinite()  # the steps until the loss was not finite
        if time.perf_counter() - shown > 0.3:
            shown = time.perf_counter()
            mean = read()
            bar.set_postfix_str(f'loss {mean["loss"]:.4f}, accuracy {mean["accuracy"]:.1f} %, '
                                f'{mean["img_s"]:.0f} img/s', refresh=False)
    return read()


def describe_failure(step: int, loader: DataLoader, optimizer: torch.optim.Optimizer) -> str:
    """Say in which step of an epoch the loss was not finite, with which learning rates and images."""
    rates = ' and '.join(f'{group["lr"]:g} ({group["role"]})' for group in optimizer.param_groups)
    batch = list(loader.batch_sampler)[step - 1]
    images = ', '.join(loader.dataset.images[index] for index in batch[:4])
    return (f'the loss is not finite in step {step} of this epoch, at a learning rate of {rates}, '
            f'with {len(batch)} images, {images}{", ..." if len(batch) > 4 else ""}; lower --lr or --proxy_lr, or set '
            '--clip_value 10')


# ---------------------------------------------------- one run --------------------------------------------------------
def check_data(args: argparse.Namespace, split: dict, device: torch.device, sampler: BatchSampler) -> None:
    """Refuse settings that do not fit the data or the machine, before anything is built."""
    if len(split['train']) < 2:
        raise UserError(f'--data_name {args.data_name} has one training class; a loss needs at least two')
    num_images = count_images(split['train'])
    last_batch = num_images % args.batch_size
    if min(args.batch_size, last_batch if last_batch and not sampler.drop_last else num_images) < world_size():
        raise UserError(f'--batch_size {args.batch_size} of {num_images} images leaves a batch with no image for some '
                        f'of the {world_size()} processes; add --drop_last 1, or choose another size')
    if args.shard_proxies and world_size() == 1:
        raise UserError('--shard_proxies has no effect in one process; start several with torchrun, or leave it out')
    sizes = {args.batch_size} if sampler.drop_last else {args.batch_size, last_batch}
    if not args.freeze_bn and 1 in {size // world_size() for size in sizes}:
        hint = '' if sampler.drop_last or args.batch_size // world_size() == 1 else 'add --drop_last 1, or '
        raise UserError(f'--batch_size {args.batch_size} leaves a batch of one image, or of one in a process, which '
                        f'has no BatchNorm statistics; {hint}choose another size')
    if args.compile and device.type == 'cpu' and not shutil.which(os.environ.get('CXX', 'g++')):
        raise UserError('--compile needs a C++ compiler on a CPU and finds no g++; install one, or leave it out')
    if len(split['gallery' if 'gallery' in split else 'test']) < 2:
        raise UserError(f'--data_name {args.data_name} has one test class: whatever a query finds is of its class; '
                        'retrieval is measured among at least two')
    if 'gallery' not in split and max(map(len, split['test'].values())) < 2:
        raise UserError(f'--data_name {args.data_name}: no test class has two images, so that no query could find '
                        'another one of its class')
    searched = count_images(split['gallery']) if 'gallery' in split else count_images(split['test']) - 1
    if args.recalls[-1] > searched:
        raise UserError(f'R@{args.recalls[-1]} asks for more than the {searched} images that a query is searched in; '
                        'set --recalls to smaller numbers, as in --recalls 1,2')


@dataclass
class Training:
    """A run that is under way."""

    args: argparse.Namespace
    start: Start
    data: ImageData
    model: EmbeddingNet
    learner: Learner  # its network is the model, wrapped for several processes and compiled where asked
    schedule: torch.optim.lr_scheduler.LRScheduler
    loader: DataLoader
    test_loaders: dict  # subset -> DataLoader
    val_loaders: dict | None  # of held out training classes
    rows: list  # of the statistics, a dict an epoch
    made_with: dict
    seen: list  # names of the classes trained on, here or before --init
    floor: float | None  # R@1 of the untouched trunk


def build_optimizer(model: EmbeddingNet, criterion: ProxyLoss, args: argparse.Namespace) -> torch.optim.Optimizer:
    """Build the optimizer of the network and, at rates of their own, of the trunk and of proxies that learn."""
    groups = [{'role': 'network', 'params': list(model.parameters()), 'lr': args.lr}]
    if args.trunk_lr != args.lr:
        trunk = {id(parameter) for parameter in model.trunk.parameters()}
        groups[0]['params'] = [parameter for parameter in model.parameters() if id(parameter) not in trunk]
        groups.append({'role': 'trunk', 'params': list(model.trunk.parameters()), 'lr': args.trunk_lr})
    if list(criterion.parameters()):  # moving proxies are none
        groups.append({'role': 'proxies', 'params': list(criterion.parameters()), 'lr': args.proxy_lr})
    kind, more = {'adamw': (torch.optim.AdamW, {}), 'adam': (torch.optim.Adam, {}),
                  'sgd': (torch.optim.SGD, {'momentum': 0.9})}[args.optimizer_type]
    return kind(groups, lr=args.lr, weight_decay=args.weight_decay, **more)


def build_schedule(optimizer: torch.optim.Optimizer, args: argparse.Namespace):
    """Build the schedule of the learning rates, in epochs."""
    schedules, gamma = torch.optim.lr_scheduler, args.lr_decay_gamma
    milestones = [max(1, round(share * args.num_epochs)) for share in args.lr_milestones]
    return {'step': lambda: schedules.StepLR(optimizer, args.lr_decay_step, gamma),
            'multistep': lambda: schedules.MultiStepLR(optimizer, milestones, gamma),
            'cosine': lambda: schedules.CosineAnnealingLR(optimizer, args.num_epochs),
            'constant': lambda: schedules.ConstantLR(optimizer, factor=1.0)}[args.lr_schedule]()


def check_use_of_proxies(args: argparse.Namespace, criterion) -> None:
    """Refuse flags that a loss of pytorch-metric-learning has no use for."""
    without = f'has no effect: {args.loss_name} has no proxies; leave it out'
    if 'proxy_lr' in args.given and not list(criterion.parameters()):
        raise UserError(f'--proxy_lr {args.proxy_lr} {without}')
    if args.on_collapse == 'stop' and not criterion.has_proxies:
        raise UserError(f'--on_collapse stop {without}')


def build_learner(args: argparse.Namespace, num_classes: int, device: torch.device, weights: str):
    """Build the network, and the learner that trains it."""
    config = NetConfig(args.backbone_type, args.feature_dim, args.pooling, args.layer_norm, args.linear_bias,
                       args.freeze_bn, image_size=args.image_size, max_pool=args.max_pool, mirror=args.mirror)
    with first_process_first():
        model = EmbeddingNet(config, weights)
    if args.linear_init == 'whiten' and model.feature_dim > model.width:
        raise UserError(f'--linear_init whiten cannot make {model.feature_dim} numbers of the {model.width} of '
                        f'{args.backbone_type}; set --feature_dim {model.width} or less, or --linear_init random')
    model = model.to(device, memory_format=torch.channels_last)
    if args.base_loss.startswith(PML):
        from pml_losses import PmlLoss

        criterion = PmlLoss(args.base_loss.removeprefix(PML), parse_keywords(args.loss_args), miner=args.miner,
                            miner_arguments=parse_keywords(args.miner_args), num_classes=num_classes,
                            feature_dim=model.feature_dim).to(device)
        check_use_of_proxies(args, criterion)
    else:
        criterion = make_loss(args.base_loss, num_classes=num_classes, feature_dim=model.feature_dim,
                              proxy_update=args.proxy_update, momentum=args.momentum or MOMENTUM, scale=args.scale,
                              margin=args.margin, proxy_init=args.proxy_init,
                              shard_proxies=args.shard_proxies).to(device)
    return model, Learner(model, criterion, build_optimizer(model, criterion, args), device, use_amp(args.amp, device),
                          args.clip_value)


def prepare(args: argparse.Namespace, start: Start, device: torch.device) -> Training:
    """Open the data, build all that a run needs, and bring it to where its checkpoint stands."""
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(args.deterministic)
    made_with, floor = provenance(device), None

    # ---- data ----
    data = open_data(args.data_path, args.data_name, args.crop_type, args.cache_size)
    if args.val_ratio:
        data = data._replace(split=hold_out(data.split, args.val_ratio, args.seed))
    labels = [number for number, paths in enumerate(data.split['train'].values()) for _ in paths]
    sampler = BatchSampler(labels, args.batch_size, args.images_per_class, args.drop_last, args.seed)
    check_data(args, data.split, device, sampler)
    checkpoint = load_checkpoint(start.files.checkpoint, args, data.split) if start.resume else None

    # ---- network, loss, optimizer ----
    model, learner = build_learner(args, len(data.split['train']), device, 'none' if checkpoint else args.weights)
    seen = []
    if args.init is not None:  # a run that goes on has its own weights, and need not find that file again
        seen = seen_classes(load_model_file(start.files.model)) if checkpoint else start_from(
            args.init, model, args.results_dir)
    schedule = build_schedule(learner.optimizer, args)

    # ---- batches ----
    augment = make_transform(True, args.image_size, None, model.interpolation, args.min_crop, args.flip,
                             args.color_jitter, args.grayscale)
    loader = make_loader(RetrievalDataset(data, 'train', augment, args.seed), sampler, args.num_workers, device)
    plain = make_transform(False, args.image_size, args.resize_size, model.interpolation)
    splits = [data.split] + ([{**data.split, 'test': data.split['val']}] if args.val_ratio else [])
    loaders = [make_test_loaders(data._replace(split=split), plain, args.batch_size, args.num_workers, device)
               for split in splits]
    rows, names = checkpoint['rows'] if checkpoint else [], loader.dataset.class_names
    both = check_seen({*seen, *names}, loaders[0]['test'].dataset.class_names, args.allow_seen)
    if both:
        print(f'NOT of unseen classes: {len(both):,} test classes are trained on')
    if args.val_ratio:
        check_seen(seen, loaders[1]['test'].dataset.class_names, args.allow_seen, 'classes that --val_ratio holds out')
    if checkpoint:
        restore(checkpoint, start.files.checkpoint, model, learner, schedule)
        floor = rows[-1].get('epoch0_R@1')
    else:
        if args.epoch0 and args.weights != 'none':
            floor = measure_floor(learner, loaders[0])
        start_from_images(learner, RetrievalDataset(data, 'train', plain), args)
    return Training(args=args, start=start, data=data, model=model, learner=learner, schedule=schedule, loader=loader,
                    test_loaders=loaders[0], val_loaders=loaders[1] if args.val_ratio else None, rows=rows,
                    made_with=made_with, seen=list(dict.fromkeys([*names, *seen])), floor=floor)


def start_from_images(learner: Learner, images: RetrievalDataset, args: argparse.Namespace) -> None:
    """Start linear layer and proxies from the training images, without augmentation, where that is asked for."""
    if args.linear_init == 'random' and args.proxy_init != 'mean':
        return
    model, criterion, device = learner.network, learner.criterion, learner.device
    if not model.config.freeze_bn:  # a training by the statistics of its batches starts by theirs, not by the trunk's
        sampler = BatchSampler(images.labels, args.batch_size, args.images_per_class, args.drop_last, args.seed)
        update_bn(make_loader(images, sampler, args.num_workers, device), model.headless(), device)
        share_buffers(model)
    loader = make_loader(images, batches_in_order(len(images), args.batch_size), args.num_workers, device)
    features = extract_embeddings(model.headless(), loader, device, learner.amp)
    if args.linear_init == 'whiten':
        model.whiten(features)
        broadcast(model.refactor.weight.data)  # eigenvectors need not be the same on another machine
    if args.proxy_init == 'mean':
        with torch.no_grad():
            embeddings = nn.functional.normalize(model.refactor(features.to(device)), dim=-1)
        criterion.start_at_means(embeddings, torch.tensor(images.labels, device=device))


def share_buffers(model: nn.Module) -> None:
    """Give all processes the BatchNorm statistics of the first, where each has those of its own images."""
    for buffer in model.buffers():
        broadcast(buffer)


def measure_floor(learner: Learner, test_loaders: dict) -> float:
    """Return R@1 of the test classes by the trunk's average pooled features, as `evaluate.py --zero_shot` does."""
    data_base = make_data_base(learner.network.untouched(), test_loaders, learner.device, learner.amp)
    floor = measure(data_base, (1,), learner.device, ('dense',))
    print(f'epoch 0: R@1 {floor["dense"]["R@1"]:.2f} of the untouched trunk', flush=True)
    return floor['dense']['R@1']


def distribute(model: EmbeddingNet, device: torch.device) -> nn.Module:
    """Wrap the network so that its gradient is the mean over the processes; one process needs no wrapper.

    Freezing after wrapping fails, and what was frozen when wrapped is never synchronised: wrap again when that changes.
    """
    if world_size() == 1:
        return model
    # Some of timm's models keep parts of their head, which features do not pass.
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == 'cuda' else None,
                                   find_unused_parameters=model.config.backbone_type.startswith('timm:'))


def wrap_network(training: Training, frozen: bool) -> None:
    """Freeze the trunk for the warm-up, or let it learn, and wrap and compile the network anew for it."""
    learner = training.learner
    learner.network = training.model  # parts the old wrapper from the parameters
    training.model.freeze_trunk(frozen)
    learner.network = distribute(training.model, learner.device)
    if training.args.compile:
        learner.network = torch.compile(learner.network)


def run_epoch(training: Training, epoch: int) -> DataBase:
    """Train an epoch, measure it, add its row to the statistics, and return the data base of its test images."""
    args, model, learner = training.args, training.model, training.learner
    learner.criterion.synchronise()
    training.loader.dataset.set_epoch(epoch)
    training.loader.batch_sampler.set_epoch(epoch)
    rates = {group['role']: group['lr'] for group in learner.optimizer.param_groups}
    trained = train_one_epoch(learner, training.loader, f'epoch {epoch}/{args.num_epochs}')
    training.schedule.step()
    share_buffers(model)  # what is measured on all processes is what the first one saves
    data_base = make_data_base(model, training.test_loaders, learner.device, learner.amp)
    row = {'epoch': epoch, **trained, 'lr': rates['network'], 'proxy_lr': rates.get('proxies', 0.0),
           **flatten(measure(data_base, args.recalls, learner.device))}
    if training.floor is not None:
        row['epoch0_R@1'] = training.floor
    if training.val_loaders:
        found = measure(make_data_base(model, training.val_loaders, learner.device, learner.amp), (1,),
                        learner.device)
        row |= {f'val_{name}': value for name, value in flatten(found).items()}
    print(f'epoch {epoch}/{args.num_epochs}: loss {row["loss"]:.4f}, accuracy {row["accuracy"]:.1f} %, '
          f'{row["img_s"]:.0f} img/s; {describe(row, args.recalls)}', flush=True)
    training.rows.append(row)
    return data_base


def save_epoch(training: Training, data_base: DataBase) -> None:
    """Save the epoch; what --resume reads comes last, so that a crash before it repeats the epoch."""
    files, model, criterion, rows = training.start.files, training.model, training.learner.criterion, training.rows
    settings, epoch = settings_of(training.args), rows[-1]['epoch']
    made_by = {'args': settings, 'epoch': epoch, 'made_with': training.made_with}
    proxies, criterion_state = criterion.all_proxies(), criterion.full_state_dict()
    optimizer_state = criterion.full_optimizer_state(training.learner.optimizer)
    if world_rank() > 0:
        return
    if epoch == 1:  # --overwrite takes place: of what it replaces nothing may be left beside the new
        for file in training.start.replaced:
            file.unlink(missing_ok=True)
    if chosen_epoch(rows) is rows[-1]:
        absent = measure_absent(*tensors_on(data_base, training.learner.device))
        told = {'seen_classes': training.seen, 'absent': absent, **made_by}
        save({'config': asdict(model.config), 'state_dict': model.state_dict(), **told}, files.model)
        data_base.origin, data_base.proxies = told, {'train_class_names': training.loader.dataset.class_names}
        if proxies is not None:
            data_base.proxies['train_proxies'] = nn.functional.normalize(proxies, dim=-1).cpu()
        data_base.save(files.data_base)
    save_statistics(rows, settings, files.statistics, training.made_with)
    save({'model': model.state_dict(), 'criterion': criterion_state, 'optimizer': optimizer_state,
          'schedule': training.schedule.state_dict(), 'rng': torch.get_rng_state(), 'rows': rows,
          'split': fingerprint(training.data.split), 'version': CHECKPOINT_VERSION, **made_by}, files.checkpoint)


def train(args: argparse.Namespace, start: Start, device: torch.device) -> list[dict]:
    """Train one run as the command line says; returns the rows of its statistics."""
    training = prepare(args, start, device)
    rows, num_classes = training.rows, len(training.data.split['train'])
    moved = '' if args.base_loss.startswith(PML) else f' with proxies moved by {args.proxy_update}'
    print(f'{args.run}: recipe {args.recipe}, {args.base_loss}{moved}; '
          f'{len(training.loader.dataset):,} images of {num_classes:,} classes; {device}, '
          f'{"bfloat16" if training.learner.amp else "float32"}')
    if args.warm_up >= args.num_epochs:
        print('the trunk stays frozen in all epochs: only the linear layer and the proxies learn')
    log = RunLog(args.log_to, start.files, settings_of(args) | training.made_with, start.resume)
    first_epoch = len(rows) + 1
    for epoch in range(first_epoch, args.num_epochs + 1):
        if epoch in (first_epoch, args.warm_up + 1):
            wrap_network(training, frozen=epoch <= args.warm_up)
        save_epoch(training, run_epoch(training, epoch))
        log.add(rows)
        # From random weights the whole network may start at chance.
        if epoch > args.warm_up + 1 and training.learner.criterion.has_proxies:
            check_collapse(rows[-1], num_classes, args)
    if world_rank() == 0:
        from plot import draw_curves  # half a second, most of it pandas, before the first batch

        draw_curves(read_statistics(start.files.statistics), start.files.curves, args.run)
        log.finish(start.files.curves)
        print_end(rows, args, start.files, training.test_loaders['test'].dataset.images[0])
    return rows


def main(group: str, runs: list[argparse.Namespace]) -> None:
    """Train what `get_runs` returned, one run after the other."""
    first = runs[0]
    if first.deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # read when the GPU is first used
    device = select_device(start_processes(first.device))
    folder, finished = Path(first.results_dir), {}
    all_files = [RunFiles(folder, args.run) for args in runs]
    for number, (args, files) in enumerate(zip(runs, all_files, strict=True)):
        resume, overwrite = args.resume, args.overwrite
        if args.seeds:  # --resume starts those that are not there
            begun = files.checkpoint.is_file() or files.statistics.is_file() and len(read_statistics(
                files.statistics)) > 1
            resume = args.resume and begun
            overwrite = args.overwrite or (args.resume and not begun)  # of a first epoch that was cut off
        # With --overwrite the seeds that come later are to be trained anew as well, after an interruption too.
        later = all_files[number + 1:] if args.overwrite else []
        replaced = [file for other in later for file in (other.checkpoint, other.statistics)]
        start = Start(files, resume, [*files.all(), *replaced])
        with claim_run(start, overwrite):
            finished[args.seed] = train(args, start, device)
    if first.seeds and world_rank() == 0:
        report_seeds(finished, group, folder)


if __name__ == '__main__':
    run_script(lambda: main(*COMMAND))
