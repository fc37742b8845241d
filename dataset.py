"""From a split file to batches: the data set, its transforms, the order of an epoch, and the DataLoaders.

    data = open_data('/home/data', 'cub')                       # what data_utils.py wrote
    training = RetrievalDataset(data, 'train', make_transform(True, 224))
    loader = make_loader(training, BatchSampler(training.labels, 64), num_workers=2, device=torch.device('cpu'))
"""
import math
import multiprocessing
import os
import shlex
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader
from torchvision.transforms import v2 as transforms

from engine.cache import Cache
from engine.errors import UserError, nearest
from engine.files import check_paths, load
from engine.images import BrokenImage, load_image
from engine.processes import shard, world_rank, world_size
from raw_sets import check_data_path, find_root, images_of
from recipes import resize_for


# ---------------------------------------------------- split files ---------------------------------------------------
class ImageData(NamedTuple):
    """A converted data set."""

    root: Path  # its folder
    split: dict  # {'train': {label: [path, ...]}, 'test' or 'query' and 'gallery', 'class_names': {label: name}}
    cache: Cache | None = None  # to read pixels from instead of decoding files


def open_data(data_path: str | Path, data_name: str, crop_type: str = 'uncropped', cache_size: int = 0) -> ImageData:
    """Load a split file, and open the cache of `cache_size` pixels where that is not 0.

    Raises:
        UserError: if the path or the split is not there (naming the command that makes it), the split is empty, or
            the cache does not fit it.
    """
    data_path = Path(data_path)
    check_data_path(data_path)
    root = find_root(data_path, data_name)
    command = shlex.join(['python', 'data_utils.py', '--data_path', str(data_path), '--data_name', data_name])
    if root is None:
        there = sorted(path.name for path in data_path.iterdir() if path.is_dir())
        if data_name == 'glyph':
            raise UserError(f'--data_name glyph is not in {data_path} yet; make it with: {command}')
        raise UserError(f'--data_name {data_name}: no such data set in {data_path}{nearest(data_name, there)} '
                        f'(there are: {", ".join(there) or "none"})')
    file = root / f'{crop_type}_data_dicts.pth'
    if not file.is_file():
        if crop_type == 'cropped' and (root / 'uncropped_data_dicts.pth').is_file():
            raise UserError(f'--crop_type cropped: {data_name} has no bounding boxes; leave it out')
        raise UserError(f'--data_name {data_name} is not converted yet (no {file}); run: {command}')
    split = read_split(file, command)
    if not cache_size:
        return ImageData(root, split)
    try:
        return ImageData(root, split, Cache(root, crop_type, cache_size, images_of(split)))
    except UserError as error:
        raise UserError(f'--cache_size {cache_size}: {error}; build it with: {command} --cache_size {cache_size}') \
            from None


def read_split(file: Path, command: str) -> dict:
    """Read a split file of any maker and return what was checked of it, labels as strings; `command` makes it anew."""
    contents = load(file, 'split file', {'train': dict})
    split = {}
    for subset in ('train', 'test') if 'test' in contents else ('train', 'query', 'gallery'):
        entries = contents.get(subset)
        if not isinstance(entries, dict) or not all(
                isinstance(paths, list) and all(isinstance(path, str) for path in paths) for paths in entries.values()):
            raise UserError(f'{file}: {subset} is not {{label: [path, ...]}}; convert again: {command}')
        check_paths(file, (path for paths in entries.values() for path in paths))
        split[subset] = {str(label): paths for label, paths in entries.items() if paths}
        if not split[subset]:
            raise UserError(f'{file}: no images in {subset}; convert again: {command}')
    names = contents.get('class_names')
    split['class_names'] = {str(label): str(name) for label, name in names.items()} if isinstance(names, dict) else {}
    return split


def hold_out(split: dict, ratio: float, seed: int) -> dict:
    """Move a share of the training classes, two at least, drawn with the seed, to a subset `val`.

    Raises:
        UserError: if fewer than two classes would be left to train on, or none held out has two images.
    """
    labels = sorted(split['train'])
    number = max(2, round(ratio * len(labels)))  # among images of one class whatever is found is right
    held = set(np.random.default_rng(seed).permutation(labels)[:number].tolist())
    val = {label: paths for label, paths in split['train'].items() if label in held}
    if len(labels) - number < 2 or max(map(len, val.values())) < 2:
        raise UserError(f'--val_ratio {ratio} of {len(labels)} training classes holds out {number}, which leaves too '
                        'few to train on, or none of which has two images; choose another, or leave it out')
    train = {label: paths for label, paths in split['train'].items() if label not in held}
    return {**split, 'train': train, 'val': val}


# ---------------------------------------------------- data set, transforms ------------------------------------------
class RetrievalDataset:
    """The images of one subset of a split, with labels 0..C-1 in the order of the split.

    What an image looks like in an epoch depends on (seed, epoch, index) alone, not on workers or on what was drawn
    before.

    Args:
        data: of `open_data`.
        subset: its name in the split.
        transform: a function from a PIL image or a uint8 tensor (3, H, W) to a uint8 tensor, of `make_transform`.
        seed: of the augmentation.
        labels: {label: number}; None numbers the classes as they come. Query and gallery share one.
    """

    def __init__(self, data: ImageData, subset: str, transform, seed: int = 0, labels: dict[str, int] | None = None):
        self.root, self.cache, self.transform, self.seed = data.root, data.cache, transform, seed
        classes = data.split[subset]
        numbers = labels or {label: number for number, label in enumerate(classes)}
        self.class_names = [data.split['class_names'].get(label, label) for label in numbers]
        self.images = [path for paths in classes.values() for path in paths]
        self.labels = [numbers[label] for label, paths in classes.items() for _ in paths]
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # seen by workers that live on

    def set_epoch(self, epoch: int) -> None:
        """Draw the augmentation of another epoch from now on."""
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        """Return the image, uint8 (3, H, W), and its label; raises UserError naming a file that is missing or broken.
        """
        image = self.read(index)
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(mix(self.seed, int(self.epoch), index))
        try:
            return self.transform(image), self.labels[index]
        finally:
            torch.set_rng_state(state)

    def read(self, index: int):
        """Return the image as it is on the disk, RGB, or a uint8 tensor (3, H, W) from the cache."""
        if self.cache is not None:
            return self.cache.read(self.images[index])
        path = self.root / self.images[index]
        try:
            return load_image(path)
        except BrokenImage as error:
            raise UserError(f'the image {path} is missing or broken ({error}); convert the data set again with '
                            'data_utils.py, --skip_bad leaves such images out') from None


def mix(*numbers: int) -> int:
    """Hash whole numbers of at least 0 into one seed of 63 bits."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


class CropAndResize:
    """Apply torchvision's RandomResizedCrop, to tensors in half the time: it copies the crop before it resizes it.

    torch resizes uint8 fastest where the colours of a pixel lie together, and takes the detour by another order for a
    part of such a tensor.
    """

    def __init__(self, random_resized_crop):
        self.drawn = random_resized_crop

    def __call__(self, image):
        part = transforms.functional.crop(image, **self.drawn.make_params([image]))
        if torch.is_tensor(part):
            part = part[None].contiguous(memory_format=torch.channels_last)[0]
        return transforms.functional.resize(part, self.drawn.size, self.drawn.interpolation,
                                            antialias=self.drawn.antialias)


def make_transform(training: bool, image_size: int, resize_size: int | None = None, interpolation: str = 'bilinear',
                   min_crop: float = 0.08, flip: float = 0.5, color_jitter: float = 0.0, grayscale: float = 0.0):
    """Build the transform from a PIL image or a uint8 tensor to a uint8 tensor (3, image_size, image_size).

    Training crops a random part, flips it and changes its colours; testing resizes the short side to `resize_size` and
    takes the centre. Scaling, channel order, mean and std belong to the trunk and happen on the device
    (`EmbeddingNet.preprocess`).

    Args:
        image_size: side of the crop in pixels.
        resize_size: short side before the centre crop; None: image_size x 256/224; 0: no crop, the whole image is
            squeezed to the square.
        interpolation: `bilinear` or `bicubic`, as the trunk was trained.
        min_crop: smallest share of the image's area in a training crop.
        flip: probability of a horizontal flip.
        color_jitter: largest change of brightness, contrast and saturation as a share, and, halved, of the hue as a
            share of the colour circle.
        grayscale: probability that an image loses its colours.
    """
    mode = transforms.InterpolationMode(interpolation)
    if training:
        steps = [CropAndResize(transforms.RandomResizedCrop(image_size, scale=(min_crop, 1.0), interpolation=mode)),
                 transforms.RandomHorizontalFlip(flip),
                 transforms.ColorJitter(color_jitter, color_jitter, color_jitter, color_jitter / 2),
                 transforms.RandomGrayscale(grayscale)]
    else:
        short_side = resize_for(image_size) if resize_size is None else resize_size
        steps = [transforms.Resize(short_side or (image_size, image_size), interpolation=mode),
                 transforms.CenterCrop(image_size)]
    return transforms.Compose([*steps, transforms.PILToTensor()])


# ---------------------------------------------------- batches ------------------------------------------------------
class BatchSampler:
    """Yield this process's contiguous share of each batch of an epoch as lists of indices; (seed, epoch) decide.

    Args:
        labels: the label of each image.
        batch_size: N, of all processes.
        images_per_class: 0 shuffles all images; k draws N/k classes for a batch and k images of each, with replacement
            only where a class has fewer than k (Proxy Anchor's balanced sampling, `--IPC`).
        drop_last: leave a last, smaller batch out.
        seed: of the order.

    Raises:
        UserError: if the batch does not fit the data.
    """

    def __init__(self, labels: list[int], batch_size: int, images_per_class: int = 0, drop_last: bool = False,
                 seed: int = 0):
        if not 1 <= batch_size <= len(labels):
            raise UserError(f'--batch_size {batch_size} must lie between 1 and the {len(labels)} training images')
        if images_per_class < 0 or images_per_class and batch_size % images_per_class:
            raise UserError(f'--batch_size {batch_size} must be a multiple of --images_per_class {images_per_class}')
        self.by_class = {}
        for index, label in enumerate(labels):
            self.by_class.setdefault(label, []).append(index)
        if images_per_class and batch_size // images_per_class > len(self.by_class):
            raise UserError(f'--batch_size {batch_size} with --images_per_class {images_per_class} needs '
                            f'{batch_size // images_per_class} classes, but the data has {len(self.by_class)}')
        self.length, self.batch_size, self.images_per_class = len(labels), batch_size, images_per_class
        self.drop_last, self.seed, self.epoch = drop_last or images_per_class > 0, seed, 0
        self.rank, self.num_ranks = world_rank(), world_size()

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of another epoch from now on."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length // self.batch_size if self.drop_last else math.ceil(self.length / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.whole_batches():
            yield batch[len(batch) * self.rank // self.num_ranks:len(batch) * (self.rank + 1) // self.num_ranks]

    def whole_batches(self) -> Iterator[list[int]]:
        """Yield the batches of all processes."""
        rng = np.random.default_rng([self.seed, self.epoch])
        if not self.images_per_class:
            order = rng.permutation(self.length).tolist()
            yield from (order[start * self.batch_size:(start + 1) * self.batch_size] for start in range(len(self)))
            return
        for _ in range(len(self)):
            classes = rng.choice(list(self.by_class), self.batch_size // self.images_per_class, replace=False)
            yield [int(index) for label in classes for index in rng.choice(
                self.by_class[label], self.images_per_class, replace=len(self.by_class[label]) < self.images_per_class)]


def end_with_parent(_worker: int) -> None:
    """Let a worker process end when the one that reads from it dies: the `worker_init_fn` of a DataLoader.

    PyTorch's own watch looks at the parent process, which with the start method `forkserver` (that of Python 3.14) is
    another one, and lives on.
    """
    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def make_loader(dataset: RetrievalDataset, batches, num_workers: int, device: torch.device) -> DataLoader:
    """Build the loader of some batches, each a sequence of indices; the one place that configures a DataLoader."""
    return DataLoader(dataset, batch_sampler=batches, num_workers=num_workers, pin_memory=device.type == 'cuda',
                      persistent_workers=num_workers > 0, worker_init_fn=end_with_parent,
                      generator=torch.Generator())  # else the network's random numbers depended on the workers


def batches_in_order(count: int, batch_size: int) -> list[range]:
    """Return this process's share of the batches of a whole data set in its order.

    Whole batches are shared, since the last bits of an embedding can depend on the size of its batch.
    """
    batches = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    return [batches[number] for number in shard(len(batches))]


def make_test_loaders(data: ImageData, transform, batch_size: int, num_workers: int, device: torch.device,
                      ) -> dict[str, DataLoader]:
    """Return {'test': loader}, or {'test': loader of the queries, 'gallery': loader} where there is a gallery."""
    subsets = {'test': 'test'} if 'test' in data.split else {'test': 'query', 'gallery': 'gallery'}
    names = dict.fromkeys(label for subset in subsets.values() for label in data.split[subset])
    labels = {label: number for number, label in enumerate(names)}
    sets = {name: RetrievalDataset(data, subset, transform, labels=labels) for name, subset in subsets.items()}
    return {name: make_loader(dataset, batches_in_order(len(dataset), batch_size), num_workers, device)
            for name, dataset in sets.items()}
