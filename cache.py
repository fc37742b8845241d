"""Pack the images of a split into one uint8 memory map, so that an epoch decodes nothing.

    python data_utils.py --data_path /home/data --data_name cub --cache_size 256      # writes it
    python train.py --data_path /home/data --data_name cub --cache_size 256           # reads it

`{crop_type}_cache_{size}.bin` holds the pixels (height, width, RGB) of each image one after the other, the short side
reduced to `size`, the aspect kept; smaller images stay as they are. `{crop_type}_cache_{size}.pth` says where each
image lies and which file it was made from. The map is shared by all processes that read it: the operating system keeps
in memory what is in use, and gives it up when others need it.
"""
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from data_utils import SUBSETS, BrokenImage, load_image, read_split, stamp_of
from utils import UserError, load, save, write_atomically

CHUNK = 512  # images on their way from the decoders to the file


def cache_files(root: Path, crop_type: str, size: int) -> tuple[Path, Path]:
    """Return the paths of the pixels and of the index."""
    return tuple(root / f'{crop_type}_cache_{size}.{suffix}' for suffix in ('bin', 'pth'))


def images_of(split: dict) -> list[str]:
    """Return the paths of all images of a split, each once."""
    return list(dict.fromkeys(path for subset in SUBSETS if subset in split
                              for paths in split[subset].values() for path in paths))


def shrink(image: Image.Image, size: int) -> Image.Image:
    """Reduce the short side to `size` as the test transform does (bilinear), never enlarge."""
    from torchvision.transforms import functional

    return functional.resize(image, size) if min(image.size) > size else image


def build_cache(data_path: Path, data_name: str, crop_type: str, size: int) -> tuple[int, int]:
    """Write the cache of a split unless a sound one is there; returns its images and bytes.

    Raises:
        UserError: if an image is broken, or the disk is full.
    """
    root, split = read_split(data_path, data_name, crop_type)
    pixels_file, index_file = cache_files(root, crop_type, size)
    images = images_of(split)
    try:
        cache = Cache(root, crop_type, size, split)
        return len(images), cache.total
    except UserError:
        index_file.unlink(missing_ok=True)  # without its index a cache is not used

    index = {'images': images, 'shapes': [], 'checksums': [], 'stamps': [stamp_of(root / path) for path in images],
             'size': size}

    def decode(path: str) -> np.ndarray:
        try:
            return np.asarray(shrink(load_image(root / path), size))
        except BrokenImage as error:
            raise UserError(f'the image {root / path} is missing or broken ({error}); convert the data set again with '
                            'data_utils.py, --skip_bad leaves such images out') from None

    def write(file) -> None:
        with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(
                total=len(images), desc=f'{root.name} cache', unit='img', dynamic_ncols=True) as bar:
            for start in range(0, len(images), CHUNK):
                for pixels in pool.map(decode, images[start:start + CHUNK]):
                    file.write(pixels.tobytes())
                    index['checksums'].append(zlib.crc32(pixels.tobytes()))
                    index['shapes'].append(list(pixels.shape[:2]))
                    bar.update()

    write_atomically(pixels_file, write)
    save(index, index_file)
    return len(images), pixels_file.stat().st_size


class Cache:
    """The packed images of a split, by their paths.

    Args:
        root: the data set's folder.
        crop_type: `uncropped` or `cropped`.
        size: short side in pixels, as it was built.
        split: of `read_split`.

    Raises:
        UserError: if there is no such cache, or it is truncated or older than the images.
    """

    def __init__(self, root: Path, crop_type: str, size: int, split: dict):
        self.file, index_file = cache_files(root, crop_type, size)
        remedy = f'build it with data_utils.py --data_name {root.name} --cache_size {size}'
        if not index_file.is_file() or not self.file.is_file():
            raise UserError(f'--cache_size {size}: there is no cache {self.file}; {remedy}')
        index = load(index_file, 'cache index', ('images', 'shapes', 'checksums', 'stamps', 'size'))
        try:
            shapes = np.array(index['shapes'], dtype=np.int64).reshape(len(index['images']), 2)
            stamps = dict(zip(index['images'], index['stamps'], strict=True))
            ends = np.cumsum(3 * shapes.prod(1))
            self.total = int(ends[-1])
            if len(index['checksums']) != len(shapes):
                raise ValueError
        except (ValueError, TypeError, OverflowError, IndexError):
            raise UserError(f'--cache_size {size}: {index_file} is damaged; {remedy}') from None
        if self.file.stat().st_size != self.total or (shapes < 1).any():
            raise UserError(f'--cache_size {size}: {self.file} has {self.file.stat().st_size:,} bytes instead of '
                            f'{self.total:,}: it is truncated; {remedy}')
        stale = [path for path in images_of(split) if stamps.get(path) != stamp_of(root / path)]
        if stale:
            raise UserError(f'--cache_size {size}: {self.file} is stale: {len(stale):,} images are new or have changed '
                            f'since, the first: {stale[0]}; {remedy}')
        self.places = {path: (int(end - 3 * height * width), int(height), int(width), checksum)
                       for path, end, (height, width), checksum
                       in zip(index['images'], ends, shapes, index['checksums'], strict=True)}
        self.pixels, self.remedy = None, remedy
        self.checked = set()  # paths whose pixels this process has compared with their checksum

    def __getstate__(self) -> dict:
        return {**self.__dict__, 'pixels': None}  # a worker opens the map itself instead of getting a copy

    def read(self, path: str):
        """Return the image at a path of the split, a uint8 tensor (3, H, W), its pixels in the order (H, W, 3)."""
        import torch

        if self.pixels is None:
            # Not copied, so that a crop reads no more than its part; 'c': a write would stay in this process.
            self.pixels = np.asarray(np.memmap(self.file, np.uint8, 'c'))
        start, height, width, checksum = self.places[path]
        pixels = self.pixels[start:start + 3 * height * width].reshape(height, width, 3)
        if path not in self.checked:
            if zlib.crc32(pixels) != checksum:
                raise UserError(f'{self.file} is damaged where it holds {path}; delete it, then {self.remedy}')
            self.checked.add(path)
        return torch.from_numpy(pixels).permute(2, 0, 1)
