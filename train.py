"""Train an embedding network with proxies, and keep the best epoch's model and data base.

    python train.py --data_path data --data_name glyph --recipe proxy_anchor
    python train.py --data_name cub --backbone_type inception --feature_dim 256       # Balanced Proxy, the default
    python train.py --recipe asymptotic_proxy --feature_dim 1024
    python train.py --recipe momentum_proxy --momentum 0.6
    python train.py --loss Proxy_Anchor --model bn_inception --embedding-size 512 --batch-size 180 --lr 1e-4 \\
                    --dataset cub --warm 1 --bn-freeze 1 --lr-decay-step 10           # Proxy Anchor's own spelling

Several processes, one per GPU or on one CPU, share each batch and give the results of a single process:

    torchrun --nproc_per_node 8 train.py --data_name sop --recipe proxy_anchor --batch_size 1440

A recipe (recipes.py) sets the defaults of a paper for the data set and backbone at hand; a flag on the command line
wins. A run writes to results/: {run}_statistics.csv (a row per epoch), {run}_model.pth and {run}_data_base.pth (of the
epoch with the best R@1 on the test classes, or on held-out training classes with --val_ratio), {run}_checkpoint.pth
(for --resume), and at its end {run}_curves.png and .pdf. Several seeds also write {run}_seeds.csv:

    python train.py --recipe proxy_anchor --val_ratio 0.2 --seeds 1,2,3,4,5           # --resume continues all of them
"""
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

from training.options import PML_PREFIX, RunOptions, check_data, name_of_seeds, parse_options
from utils import parse_keywords, run_script

if __name__ == '__main__':  # --help and mistakes need not wait for the imports below
    RUNS = run_script(lambda: parse_options(description=__doc__))

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader

from common.distributed import (broadcast, broadcast_buffers, broadcast_state, first_process_first,
                                keep_freed_memory, progress, select_device, start_processes, use_amp, world_rank,
                                world_size)
from common.errors import UserError
from common.files import save
from common.results import RunFiles
from imagedata.loading import (BatchSampler, ImageData, RetrievalDataset, batches_in_order, hold_out, make_loader,
                               make_test_loaders, make_transform, open_data)
from model import EmbeddingNet, NetConfig, make_loss
from recipes import MOMENTUM
from retrieval.database import check_seen, seen_classes
from retrieval.embedding import (PretrainedBaseline, WithoutHead, extract_embeddings, make_data_base, measure,
                                 measure_open_set_of)
from retrieval.model_file import model_contents
from training.checkpoint import (claim_run, command_of, load_checkpoint, load_initial_weights, restore, save_checkpoint,
                                 settings_of)
from training.curves import draw_curves
from training.statistics import describe_split, provenance, read_statistics, save_statistics
from training.summary import (check_collapse, chosen_epoch, epoch_title, flatten, format_epoch, format_seconds,
                              print_end, report_seeds)
from training.tracking import Tracker


# ---------------------------------------------------- one epoch ----------------------------------------------------
def train_one_epoch(network: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader,
                    device: torch.device, amp: bool = False, clip_value: float = 0.0, title: str = '',
                    batches: Iterator | None = None) -> dict:
    """Train on every batch of the loader once.

    Args:
        network: images (N, 3, H, W) uint8 -> embeddings (N, D).
        criterion: embeddings, labels (N,) -> loss; see model.ProxyLoss.
        amp: compute the network in bfloat16; the loss is always float32.
        clip_value: clip each gradient entry to +-clip_value; 0 is off.
        title: of the progress bar.
        batches: of the loader, where its workers have started already.

    Returns:
        {'loss': mean, 'accuracy': per cent, 'img_s': images per second}.

    Raises:
        UserError: if the loss is not finite, with the step and the images in its batch.
    """
    network.train()
    criterion.train()
    parameters = [parameter for group in optimizer.param_groups for parameter in group['params']]
    meter = Meter(device)
    bar = progress(loader if batches is None else batches, desc=title, unit='batch', total=len(loader))
    for images, labels in bar:
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            embeddings = network(images)
        loss = criterion(embeddings, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if clip_value:
            nn.utils.clip_grad_value_(parameters, clip_value)
        optimizer.step()
        meter.add(loss.detach(), criterion.accuracy, criterion.num_samples)
        if meter.is_due():
            bar.set_postfix_str(str(meter), refresh=False)
            if not meter.is_finite():
                break
    if not meter.is_finite():
        raise UserError(describe_failure(meter.finite_steps() + 1, loader, optimizer))
    return meter.means()


class Meter:
    """Running means of loss and accuracy, kept on the device: reading them would wait for it in each step."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(4, device=device)  # loss, accuracy, images, steps with a finite loss
        self.start = self.last_read = time.perf_counter()

    def add(self, loss: torch.Tensor, accuracy: torch.Tensor, num_samples: int) -> None:
        self.sums[:3] += torch.stack([loss, accuracy, self.sums.new_ones(())]) * num_samples
        self.sums[3] += self.sums[0].isfinite()

    def is_due(self, interval: float = 0.3) -> bool:
        """Tell whether `interval` seconds have passed since this was last true."""
        now = time.perf_counter()
        due = now - self.last_read > interval
        if due:
            self.last_read = now
        return due

    def is_finite(self) -> bool:
        return math.isfinite(self.sums[0].item())

    def finite_steps(self) -> int:
        return int(self.sums[3].item())

    def means(self) -> dict[str, float]:
        """Return loss, accuracy (per cent) and images per second so far."""
        loss, accuracy, count, _ = self.sums.tolist()  # waits for the device
        return {'loss': loss / count, 'accuracy': 100 * accuracy / count,
                'img_s': count / (time.perf_counter() - self.start)}

    def __str__(self) -> str:
        return 'loss {loss:.4f}, accuracy {accuracy:.1f} %, {img_s:.0f} img/s'.format(**self.means())


def describe_failure(step: int, loader: DataLoader, optimizer: torch.optim.Optimizer) -> str:
    """Say in which step of an epoch the loss was not finite, with which learning rates and images."""
    rates = ' and '.join(f'{group["lr"]:g} ({group["role"]})' for group in optimizer.param_groups)
    batch = list(loader.batch_sampler)[step - 1]
    images = ', '.join(loader.dataset.images[index] for index in batch[:4])
    more = ', ...' if len(batch) > 4 else ''
    return (f'the loss is not finite in step {step} of this epoch, at a learning rate of {rates}, with {len(batch)} '
            f'images, {images}{more}; lower --lr or --proxy_lr, or set --clip_value 10')


# ---------------------------------------------------- what a run is built from -------------------------------------
def build_model(options: RunOptions, device: torch.device, weights: str) -> EmbeddingNet:
    """Build the network, in channels_last."""
    config = NetConfig(options.backbone_type, options.feature_dim, options.pooling, options.layer_norm,
                       options.head_bias, options.freeze_bn, image_size=options.image_size,
                       max_pool=options.max_pool, flip_tta=options.flip_tta)
    with first_process_first():  # it downloads the weights, the others find them
        model = EmbeddingNet(config, weights)
    if options.head_init == 'whiten' and model.feature_dim > model.num_features:
        raise UserError(f'--head_init whiten cannot make {model.feature_dim} numbers of the {model.num_features} of '
                        f'{options.backbone_type}; set --feature_dim {model.num_features} or less, or --head_init '
                        'random')
    return model.to(device, memory_format=torch.channels_last)


def build_criterion(options: RunOptions, num_classes: int, feature_dim: int) -> nn.Module:
    """Build the loss with its proxies: one of model.py, or of pytorch-metric-learning."""
    if not options.base_loss.startswith(PML_PREFIX):
        return make_loss(options.base_loss, num_classes=num_classes, feature_dim=feature_dim, scale=options.scale,
                         margin=options.margin, proxy_update=options.proxy_update,
                         momentum=options.momentum or MOMENTUM, proxy_init=options.proxy_init)
    from training.pml import PmlLoss

    criterion = PmlLoss(options.base_loss.removeprefix(PML_PREFIX), parse_keywords(options.loss_args),
                        miner=options.miner, miner_arguments=parse_keywords(options.miner_args),
                        num_classes=num_classes, feature_dim=feature_dim)
    reason = f'has no effect: {options.loss_name} has no proxies; leave it out'
    if 'proxy_lr' in options.explicit_flags and not list(criterion.parameters()):
        raise UserError(f'--proxy_lr {options.proxy_lr} {reason}')
    if options.on_collapse == 'stop' and not criterion.has_proxies:
        raise UserError(f'--on_collapse stop {reason}')
    return criterion


def build_optimizer(model: EmbeddingNet, criterion: nn.Module, options: RunOptions) -> torch.optim.Optimizer:
    """Build the optimizer: groups with their own learning rates for the network, the backbone and the proxies."""
    backbone, proxies = list(model.backbone.parameters()), list(criterion.parameters())
    if options.backbone_lr == options.lr:
        groups = [{'role': 'network', 'params': list(model.parameters()), 'lr': options.lr}]
    else:
        in_backbone = set(map(id, backbone))
        others = [parameter for parameter in model.parameters() if id(parameter) not in in_backbone]
        groups = [{'role': 'network', 'params': others, 'lr': options.lr},
                  {'role': 'backbone', 'params': backbone, 'lr': options.backbone_lr}]
    if proxies:  # none if they move by momentum
        groups.append({'role': 'proxies', 'params': proxies, 'lr': options.proxy_lr})
    if options.optimizer_type == 'sgd':
        return torch.optim.SGD(groups, lr=options.lr, weight_decay=options.weight_decay, momentum=0.9)
    optimizer = {'adamw': torch.optim.AdamW, 'adam': torch.optim.Adam}[options.optimizer_type]
    fused = model.mean.device.type in ('cpu', 'cuda')  # one pass over all weights instead of one per operation
    return optimizer(groups, lr=options.lr, weight_decay=options.weight_decay, fused=fused)


def build_schedule(optimizer: torch.optim.Optimizer, options: RunOptions):
    """Build the schedule of the learning rates, in epochs."""
    schedules, gamma = torch.optim.lr_scheduler, options.lr_decay_gamma
    if options.lr_schedule == 'step':
        return schedules.StepLR(optimizer, options.lr_decay_step, gamma)
    if options.lr_schedule == 'multistep':
        milestones = [max(1, round(share * options.num_epochs)) for share in options.lr_milestones]
        return schedules.MultiStepLR(optimizer, milestones, gamma)
    if options.lr_schedule == 'cosine':
        return schedules.CosineAnnealingLR(optimizer, options.num_epochs)
    return schedules.ConstantLR(optimizer, factor=1.0)


def build_train_loader(data: ImageData, sampler: BatchSampler, model: EmbeddingNet, options: RunOptions,
                       device: torch.device) -> DataLoader:
    """Build the loader of augmented training batches."""
    augment = make_transform(True, options.image_size, None, model.interpolation, options.min_crop, options.flip,
                             options.color_jitter, options.grayscale)
    return make_loader(RetrievalDataset(data, 'train', augment, options.seed), sampler, options.num_workers, device)


def start_batches(loader: DataLoader, epoch: int) -> Iterator:
    """Let the workers decode the first batches of an epoch, and return the iterator that reads them."""
    loader.dataset.set_epoch(epoch)
    loader.batch_sampler.set_epoch(epoch)
    return iter(loader)


def start_from_images(model: EmbeddingNet, criterion: nn.Module, images: RetrievalDataset, options: RunOptions,
                      device: torch.device, amp: bool) -> None:
    """Initialise head (`whiten`) and proxies (`mean`) from the training images, without augmentation."""
    if options.head_init == 'random' and options.proxy_init != 'mean':
        return
    if not options.freeze_bn:  # training uses the statistics of its batches, so the start uses theirs as well
        sampler = BatchSampler(images.labels, options.batch_size, options.images_per_class, options.drop_last,
                               options.seed)
        update_bn(make_loader(images, sampler, options.num_workers, device), WithoutHead(model), device)
        broadcast_buffers(model)
    loader = make_loader(images, batches_in_order(len(images), options.batch_size), options.num_workers, device)
    features = extract_embeddings(WithoutHead(model), loader, device, amp)
    if options.head_init == 'whiten':
        model.whiten_head(features)
        broadcast(model.head.weight.data)  # eigenvectors may differ from machine to machine
    if options.proxy_init == 'mean':
        with torch.no_grad():
            embeddings = F.normalize(model.head(features.to(device)), dim=-1)
        criterion.start_at_class_means(embeddings, torch.tensor(images.labels, device=device))


def wrap_network(model: EmbeddingNet, device: torch.device, compiled: bool) -> nn.Module:
    """Compile the network where asked, and wrap it for several processes.

    DistributedDataParallel synchronises the parameters that were not frozen when it was built, so the network is
    wrapped again whenever that changes.
    """
    network = torch.compile(model) if compiled else model
    if world_size() > 1:  # some timm models keep parts of their head, which features do not pass
        network = DistributedDataParallel(network, device_ids=[device.index] if device.type == 'cuda' else None,
                                          find_unused_parameters=model.config.backbone_type.startswith('timm:'))
    return network


# ---------------------------------------------------- one run ------------------------------------------------------
def train(options: RunOptions, files: RunFiles, device: torch.device, resume: bool = False, replaced=()) -> list[dict]:
    """Train one run.

    Args:
        resume: continue from its checkpoint.
        replaced: files of earlier runs, removed once the first epoch of this one is complete.

    Returns:
        the rows of its statistics, a dict per epoch.
    """
    torch.manual_seed(options.seed)
    torch.use_deterministic_algorithms(options.deterministic)
    torch.backends.cudnn.benchmark = not options.deterministic  # images have one size, so its search pays
    amp, settings = use_amp(options.amp, device), settings_of(options)

    # ---- data ----
    data = open_data(options.data_path, options.data_name, options.crop_type, options.cache_size)
    if options.val_ratio:
        data = data._replace(split=hold_out(data.split, options.val_ratio, options.seed))
    split, num_classes = data.split, len(data.split['train'])
    made_with = {**provenance(device), **describe_split(split), 'command': command_of(options)}
    labels = [label for label, paths in enumerate(split['train'].values()) for _ in paths]
    sampler = BatchSampler(labels, options.batch_size, options.images_per_class, options.drop_last, options.seed)
    check_data(options, split, device, sampler.drop_last)
    checkpoint = load_checkpoint(files.checkpoint, options, split) if resume else None

    # ---- model, loss, optimizer ----
    model = build_model(options, device, 'none' if checkpoint else options.weights)
    criterion = build_criterion(options, num_classes, model.feature_dim).to(device)
    optimizer = build_optimizer(model, criterion, options)
    schedule = build_schedule(optimizer, options)
    seen = []  # classes that the initial model was trained on
    if options.init is not None and checkpoint:
        seen = seen_classes(checkpoint)
    elif options.init is not None:
        seen = load_initial_weights(options.init, model, options.results_dir)

    # ---- loaders ----
    loader = build_train_loader(data, sampler, model, options, device)
    plain = make_transform(False, options.image_size, options.resize_size, model.interpolation)
    test_loaders = make_test_loaders(data, plain, options.batch_size, options.num_workers, device)
    trained_classes, test_set = loader.dataset.class_names, test_loaders['test'].dataset
    trained_and_tested = check_seen({*seen, *trained_classes}, test_set.class_names, options.allow_seen)
    made_with['seen_test_classes'] = len(trained_and_tested)
    if trained_and_tested:
        print(f'NOT on unseen classes: {len(trained_and_tested):,} test classes are trained on')
    val_loaders = None
    if options.val_ratio:
        val_data = data._replace(split={**split, 'test': split['val']})
        val_loaders = make_test_loaders(val_data, plain, options.batch_size, options.num_workers, device)
        check_seen(seen, val_loaders['test'].dataset.class_names, options.allow_seen,
                   'classes that --val_ratio holds out')
    seen = list(dict.fromkeys([*trained_classes, *seen]))

    # ---- start or resume ----
    rows, baseline = [], None
    if checkpoint:
        rows, baseline = checkpoint['rows'], checkpoint['rows'][-1].get('pretrained_R@1')
        restore(checkpoint, files.checkpoint, model, criterion, optimizer, schedule)
    else:
        if options.pretrained_baseline:
            data_base = make_data_base(PretrainedBaseline(model), test_loaders, device, amp)
            baseline = measure(data_base, (1,), device, ('dense',))['dense']['R@1']
            print(f'before the training: R@1 {baseline:.2f} of the backbone', flush=True)
        start_from_images(model, criterion, RetrievalDataset(data, 'train', plain), options, device, amp)
    proxies_move_by = '' if options.base_loss.startswith(PML_PREFIX) else f' with proxy update {options.proxy_update}'
    precision = 'bfloat16' if amp else 'float32'
    print(f'{options.run}: recipe {options.recipe}, {options.base_loss}{proxies_move_by}; {len(labels):,} images of '
          f'{num_classes:,} classes; {device}, {precision}')
    if options.warm_up >= options.num_epochs:
        print('the backbone stays frozen in all epochs: only the head and the proxies learn')
    tracker = Tracker(options.log_to, files, settings | made_with, resume)

    # ---- epochs ----
    first_epoch, start = len(rows) + 1, time.perf_counter()
    batches = start_batches(loader, first_epoch) if first_epoch <= options.num_epochs else None
    for epoch in range(first_epoch, options.num_epochs + 1):
        epoch_start = time.perf_counter()
        if epoch in (first_epoch, options.warm_up + 1):
            network = None  # drop the previous wrapper and its hooks before the next one is built
            model.freeze_backbone(epoch <= options.warm_up)
            network = wrap_network(model, device, options.compile)
        broadcast_state(criterion)
        title = epoch_title(epoch, first_epoch, options.num_epochs, time.perf_counter() - start)
        rates = {group['role']: group['lr'] for group in optimizer.param_groups}
        trained = train_one_epoch(network, criterion, optimizer, loader, device, amp, options.clip_value, title,
                                  batches)
        if epoch < options.num_epochs:  # the next epoch's first batches are decoded while this one is measured
            batches = start_batches(loader, epoch + 1)
        schedule.step()
        broadcast_buffers(model)

        # ---- measure ----
        row = {'epoch': epoch, **trained, 'lr': rates['network'], 'proxy_lr': rates.get('proxies', 0.0)}
        if baseline is not None:
            row['pretrained_R@1'] = baseline
        if epoch % options.eval_every == 0 or epoch == options.num_epochs:
            data_base = make_data_base(model, test_loaders, device, amp)
            row |= flatten(measure(data_base, options.recalls, device))
            if val_loaders:
                val_metrics = measure(make_data_base(model, val_loaders, device, amp), (1,), device)
                row |= {f'val_{name}': value for name, value in flatten(val_metrics).items()}
        rows.append({**row, 'seconds': time.perf_counter() - epoch_start})
        print(format_epoch(row, options), flush=True)

        # ---- save; the checkpoint comes last, so that a crash before it repeats the epoch ----
        origin = {'args': settings, 'epoch': epoch, 'made_with': made_with, 'seen_classes': seen}
        if world_rank() == 0:
            if epoch == 1:  # --overwrite takes effect
                for file in replaced:
                    file.unlink(missing_ok=True)
            if chosen_epoch(rows) is rows[-1]:
                open_set = measure_open_set_of(data_base, device)
                data_base.origin = {'open_set': open_set, **origin}
                data_base.add_proxies(trained_classes, criterion.unit_proxies())
                save(model_contents(model, data_base.origin), files.model)
                data_base.save(files.data_base)
            save_statistics(rows, settings, files.statistics, made_with)
            save_checkpoint(files.checkpoint, model, criterion, optimizer, schedule, rows, split, origin)
        tracker.log(rows)
        # With random weights even the first full epoch may stay at chance.
        if epoch > options.warm_up + 1 and criterion.has_proxies:
            check_collapse(row, num_classes, options)

    # ---- end ----
    if world_rank() == 0:
        draw_curves(read_statistics(files.statistics), files.curves, options.run)
        tracker.finish(files.curves)
        print(f'{options.num_epochs - first_epoch + 1} epochs in {format_seconds(time.perf_counter() - start)}')
        print_end(rows, options, files, test_set.images[0])
    return rows


def main(runs: list[RunOptions]) -> None:
    """Train the runs of `parse_options`, which differ in their seed alone, one after the other."""
    first = runs[0]
    if first.deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # read when the GPU is first used
    device = select_device(start_processes(first.device))
    keep_freed_memory()
    all_files = [RunFiles(Path(first.results_dir), options.run) for options in runs]
    rows_of_seeds = {}
    for number, (options, files) in enumerate(zip(runs, all_files, strict=True)):
        resume, overwrite = options.resume, options.overwrite
        if options.seeds and resume:  # seeds without a complete epoch start now
            resume = files.checkpoint.is_file() or has_complete_epochs(files.statistics)
            overwrite = not resume
        # --overwrite trains the later seeds anew as well, even if this call is interrupted and then resumed.
        later = all_files[number + 1:] if options.overwrite else []
        replaced = [*files.all(), *(file for other in later for file in (other.checkpoint, other.statistics))]
        with claim_run(files, resume, overwrite):
            rows_of_seeds[options.seed] = train(options, files, device, resume, replaced)
    if first.seeds and world_rank() == 0:
        report_seeds(rows_of_seeds, name_of_seeds(runs), Path(first.results_dir))


def has_complete_epochs(statistics: Path) -> bool:
    """Tell whether a run's statistics hold more than its first epoch, whose checkpoint may be missing."""
    return statistics.is_file() and len(read_statistics(statistics)) > 1


if __name__ == '__main__':
    run_script(lambda: main(RUNS))
