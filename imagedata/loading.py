"""From a split file to batches: the data set, its transforms, the order of an epoch, and the loaders.

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

from common.distributed import shard, world_rank, world_size
from common.errors import UserError, reason_of, suggestion
from common.files import are_texts, check_paths, load
from common.images import BrokenImage, load_image, resize_for
from imagedata.cache import Cache
from imagedata.raw_sets import check_data_path, find_root, images_of

MAX_RATIO = 32  # long side : short side of test images; of longer ones, the centre is resized alone


# ---------------------------------------------------- split files --------------------------------------------------
class ImageData(NamedTuple):
    """A converted data set."""

    root: Path  # its folder
    split: dict  # {'train': {label: [path, ...]}, 'test' or 'query' and 'gallery', 'class_names': {label: name}}
    cache: Cache | None = None  # if there is one, pixels are read from it instead of from image files


def open_data(data_path: str | Path, data_name: str, crop_type: str = 'uncropped', cache_size: int = 0) -> ImageData:
    """Load a split file and, if `cache_size` is not 0, open the cache of that many pixels.

    Raises:
        UserError: if path or split file is missing (naming the command that makes it), the split is empty, or the
            cache does not fit it.
    """
    data_path = Path(data_path)
    check_data_path(data_path)
    command = shlex.join(['python', 'data_utils.py', '--data_path', str(data_path), '--data_name', data_name])
    file = find_split(data_path, data_name, crop_type, command)
    split = read_split(file, command)
    if not cache_size:
        return ImageData(file.parent, split)
    try:
        return ImageData(file.parent, split, Cache(file.parent, crop_type, cache_size, images_of(split)))
    except UserError as error:
        raise UserError(f'--cache_size {cache_size}: {error}; build it with: {command} --cache_size {cache_size}') \
            from None


def find_split(data_path: Path, data_name: str, crop_type: str, command: str) -> Path:
    """Return the split file of a data set; a UserError names the command that makes it."""
    root = find_root(data_path, data_name)
    if root is None and data_name == 'glyph':
        raise UserError(f'--data_name glyph is not in {data_path} yet; make it with: {command}')
    if root is None:
        folders = sorted(path.name for path in data_path.iterdir() if path.is_dir())
        raise UserError(f'--data_name {data_name}: no such data set in {data_path}{suggestion(data_name, folders)} '
                        f'(there are: {", ".join(folders) or "none"})')
    file = root / f'{crop_type}_data_dicts.pth'
    if file.is_file():
        return file
    if crop_type == 'cropped' and (root / 'uncropped_data_dicts.pth').is_file():
        raise UserError(f'--crop_type cropped: {data_name} has no bounding boxes; leave it out')
    raise UserError(f'--data_name {data_name} is not converted yet (no {file}); run: {command}')


def read_split(file: Path, command: str) -> dict:
    """Read a split file of any origin and return only what was checked, with labels as strings.

    Raises:
        UserError: naming the command that makes the file again.
    """
    contents = load(file, 'split file', {'train': dict})
    split = {}
    for subset in ('train', 'test') if 'test' in contents else ('train', 'query', 'gallery'):
        classes = contents.get(subset)
        if not isinstance(classes, dict) or not all(are_texts(paths) for paths in classes.values()):
            raise UserError(f'{file}: {subset} is not {{label: [path, ...]}}; convert again: {command}')
        check_paths(file, (path for paths in classes.values() for path in paths))
        split[subset] = {str(label): paths for label, paths in classes.items() if paths}
        if not split[subset]:
            raise UserError(f'{file}: no images in {subset}; convert again: {command}')
    names = contents.get('class_names')
    split['class_names'] = {str(label): str(name) for label, name in names.items()} if isinstance(names, dict) else {}
    return split


def hold_out(split: dict, ratio: float, seed: int) -> dict:
    """Move a share of the training classes, at least two, drawn with the seed, to a subset `val`.

    Raises:
        UserError: if fewer than two classes would be left to train on, or no held-out class has two images.
    """
    labels = sorted(split['train'])
    num_held_out = max(2, round(ratio * len(labels)))  # with one class, every retrieved image would be correct
    held_out = set(np.random.default_rng(seed).permutation(labels)[:num_held_out].tolist())
    val = {label: paths for label, paths in split['train'].items() if label in held_out}
    if len(labels) - num_held_out < 2 or max(map(len, val.values())) < 2:
        raise UserError(f'--val_ratio {ratio} of {len(labels)} training classes holds out {num_held_out}, which '
                        'leaves fewer than two to train on, or none of which has two images; choose another, or leave '
                        'it out')
    train = {label: paths for label, paths in split['train'].items() if label not in held_out}
    return {**split, 'train': train, 'val': val}


# ---------------------------------------------------- data set, transforms ------------------------------------------
class RetrievalDataset:
    """The images of one subset of a split, with labels 0..C-1 in the order of the split.

    An image's augmentation depends on (seed, epoch, index) alone, not on the workers or on earlier random numbers.

    Args:
        data: of `open_data`.
        subset: its name in the split.
        transform: a function from a PIL image or a uint8 tensor (3, H, W) to a uint8 tensor, of `make_transform`.
        seed: of the augmentation.
        labels: {label: index}, which query and gallery share; None numbers the classes in the order of the split.
    """

    def __init__(self, data: ImageData, subset: str, transform, seed: int = 0, labels: dict[str, int] | None = None):
        self.root = data.root
        self.cache = data.cache
        self.transform = transform
        self.seed = seed
        classes = data.split[subset]
        index_of = labels or {label: index for index, label in enumerate(classes)}
        self.class_names = [data.split['class_names'].get(label, label) for label in index_of]
        self.images = [path for paths in classes.values() for path in paths]
        self.labels = [index_of[label] for label, paths in classes.items() for _ in paths]
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers see it change

    def set_epoch(self, epoch: int) -> None:
        """Use the augmentation of another epoch from now on."""
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        """Return the image, uint8 (3, H, W), and its label; a UserError names a file that is missing or broken."""
        image = self.read(index)
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(mix(self.seed, int(self.epoch), index))
        try:
            return self.transform(image), self.labels[index]
        except BrokenImage as error:
            raise UserError(f'the image {self.root / self.images[index]} is broken ({error}); remove it, and convert '
                            'the data set again with data_utils.py') from None
        finally:
            torch.set_rng_state(state)

    def read(self, index: int):
        """Return the untransformed image: RGB from its file, or a uint8 tensor (3, H, W) from the cache."""
        if self.cache is not None:
            return self.cache.read(self.images[index])
        path = self.root / self.images[index]
        try:
            return load_image(path)
        except BrokenImage as error:
            raise UserError(f'the image {path} is missing or broken ({error}); convert the data set again with '
                            'data_utils.py; --skip_bad leaves such images out') from None


def mix(*numbers: int) -> int:
    """Hash integers of at least 0 into one seed of 63 bits."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


class CropAndResize:
    """Torchvision's RandomResizedCrop, at twice its speed for tensors, because the crop is copied before the resize.

    torch resizes uint8 images fastest in channels_last order, but does not take that path for a view of a larger
    image.
    """

    def __init__(self, random_resized_crop):
        self.random_resized_crop = random_resized_crop

    def __call__(self, image):
        wrapped = self.random_resized_crop
        part = transforms.functional.crop(image, **wrapped.make_params([image]))
        if torch.is_tensor(part):
            part = part[None].contiguous(memory_format=torch.channels_last)[0]
        return transforms.functional.resize(part, wrapped.size, wrapped.interpolation, antialias=wrapped.antialias)


class CropThin:
    """Crop an image that is much longer than wide to its centre, so that a resize of its short side stays small.

    Args:
        max_ratio: of the long side to the short one; other images pass unchanged.
    """

    def __init__(self, max_ratio: int):
        self.max_ratio = max_ratio

    def __call__(self, image):
        height, width = transforms.functional.get_size(image)
        longest = self.max_ratio * min(height, width)
        if max(height, width) <= longest:
            return image
        return transforms.functional.center_crop(image, [min(height, longest), min(width, longest)])


class Transform(transforms.Compose):
    """Steps from an image to a tensor; whatever goes wrong in one, also a lack of memory, is a BrokenImage."""

    def forward(self, image):
        """Apply the steps to an image; raises BrokenImage."""
        try:
            return super().forward(image)
        except Exception as error:
            raise BrokenImage(f'it cannot be transformed: {reason_of(error)}') from error


def make_transform(training: bool, image_size: int, resize_size: int | None = None, interpolation: str = 'bilinear',
                   min_crop: float = 0.08, flip: float = 0.5, color_jitter: float = 0.0, grayscale: float = 0.0):
    """Build the transform from a PIL image or a uint8 tensor to a uint8 tensor (3, image_size, image_size).

    Training crops a random part, flips it and changes its colours; testing resizes the short side to `resize_size`
    and crops the centre. Scaling, channel order, mean and std belong to the backbone and happen on the device
    (`EmbeddingNet.preprocess`).

    Args:
        image_size: side of the crop in pixels.
        resize_size: short side before the centre crop; None: image_size x 256/224; 0: no crop, the whole image is
            squeezed to the square.
        interpolation: `bilinear` or `bicubic`, as the backbone was trained.
        min_crop: smallest share of the image's area in a training crop.
        flip: probability of a horizontal flip.
        color_jitter: largest change of brightness, contrast and saturation as a share, and, halved, of the hue as a
            share of the colour circle.
        grayscale: probability that an image loses its colours.
    """
    mode = transforms.InterpolationMode(interpolation)
    if training:
        steps = [CropAndResize(transforms.RandomResizedCrop(image_size, scale=(min_crop, 1.0), interpolation=mode))]
        if flip:
            steps.append(transforms.RandomHorizontalFlip(flip))
        if color_jitter:
            steps.append(transforms.ColorJitter(color_jitter, color_jitter, color_jitter, color_jitter / 2))
        if grayscale:
            steps.append(transforms.RandomGrayscale(grayscale))
    else:
        short_side = resize_for(image_size) if resize_size is None else resize_size
        max_ratio = max(MAX_RATIO, image_size // (short_side or image_size) + 2)  # the centre crop lacks nothing
        steps = [*([CropThin(max_ratio)] if short_side else []),
                 transforms.Resize(short_side or (image_size, image_size), interpolation=mode),
                 transforms.CenterCrop(image_size)]
    return Transform([*steps, transforms.PILToTensor()])


# ---------------------------------------------------- batches ------------------------------------------------------
class BatchSampler:
    """Yield the batches of an epoch as lists of indices, of each batch this process's contiguous share.

    The order depends on (seed, epoch) alone.

    Args:
        labels: the label of each image.
        batch_size: N, over all processes.
        images_per_class: 0 shuffles all images; k draws N/k classes for each batch and k images of each, with
            replacement only if a class has fewer than k (Proxy Anchor's balanced sampling, `--IPC`).
        drop_last: leave out a last, smaller batch.
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
        self.num_images = len(labels)
        self.batch_size = batch_size
        self.images_per_class = images_per_class
        self.drop_last = drop_last or images_per_class > 0
        self.seed = seed
        self.epoch = 0
        self.rank = world_rank()
        self.num_ranks = world_size()

    def set_epoch(self, epoch: int) -> None:
        """Use the order of another epoch from now on."""
        self.epoch = epoch

    def __len__(self) -> int:
        if self.drop_last:
            return self.num_images // self.batch_size
        return math.ceil(self.num_images / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.whole_batches():
            yield batch[len(batch) * self.rank // self.num_ranks:len(batch) * (self.rank + 1) // self.num_ranks]

    def whole_batches(self) -> Iterator[list[int]]:
        """Yield the batches of all processes."""
        rng = np.random.default_rng([self.seed, self.epoch])
        if not self.images_per_class:
            order = rng.permutation(self.num_images).tolist()
            yield from (order[start * self.batch_size:(start + 1) * self.batch_size] for start in range(len(self)))
            return
        num_classes = self.batch_size // self.images_per_class
        for _ in range(len(self)):
            batch = []
            for label in rng.choice(list(self.by_class), num_classes, replace=False):
                images = self.by_class[label]
                replace = len(images) < self.images_per_class
                batch += rng.choice(images, self.images_per_class, replace=replace).tolist()
            yield batch


def end_with_parent(_worker: int) -> None:
    """End a worker process when the process that reads from it dies: the `worker_init_fn` of a DataLoader.

    PyTorch itself watches the parent process, but under the start method `forkserver` (the default of Python 3.14)
    that is another process, which lives on.
    """
    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Loader(DataLoader):
    """A DataLoader that also notices if a worker process dies while it hands over a batch.

    PyTorch raises a RuntimeError once it sees that a worker has ended. If the connection to it breaks before that, the
    error of the connection comes through instead.
    """

    def __iter__(self) -> Iterator:
        return self._check(super().__iter__())  # which starts the workers at once

    @staticmethod
    def _check(batches: Iterator) -> Iterator:
        try:
            yield from batches
        except (EOFError, ConnectionError) as error:
            raise RuntimeError('DataLoader worker ended while it handed over a batch') from error


def make_loader(dataset: RetrievalDataset, batches, num_workers: int, device: torch.device) -> DataLoader:
    """Build a loader from batches, each a sequence of indices; the one place that configures a DataLoader."""
    # With its own generator, the network's random numbers do not depend on the number of workers.
    return Loader(dataset, batch_sampler=batches, num_workers=num_workers, pin_memory=device.type == 'cuda',
                  persistent_workers=num_workers > 0, worker_init_fn=end_with_parent, generator=torch.Generator())


def batches_in_order(count: int, batch_size: int) -> list[range]:
    """Return this process's share of the batches of a whole data set in order.

    Processes share whole batches, since the last bits of an embedding can depend on the size of its batch.
    """
    batches = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    return [batches[index] for index in shard(len(batches))]


def make_test_loaders(data: ImageData, transform, batch_size: int, num_workers: int, device: torch.device,
                      ) -> dict[str, DataLoader]:
    """Return {'test': loader}, or {'test': loader of the queries, 'gallery': loader} if there is a gallery."""
    subsets = {'test': 'test'} if 'test' in data.split else {'test': 'query', 'gallery': 'gallery'}
    classes = dict.fromkeys(label for subset in subsets.values() for label in data.split[subset])
    labels = {label: index for index, label in enumerate(classes)}
    loaders = {}
    for name, subset in subsets.items():
        dataset = RetrievalDataset(data, subset, transform, labels=labels)
        loaders[name] = make_loader(dataset, batches_in_order(len(dataset), batch_size), num_workers, device)
    return loaders
