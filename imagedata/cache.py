"""A cache of decoded images: one memory-mapped file of uint8 pixels, so that an epoch decodes nothing.

`{crop_type}_cache_{size}.bin` holds the pixels (height, width, RGB) of one image after the other. The short side is
reduced to `size` and the aspect ratio kept; smaller images stay as they are. `{crop_type}_cache_{size}.pth` is the
index: where each image lies, and which file it was made from. All processes that read the map share it: the operating
system keeps the parts in use in memory and evicts them when it needs the memory.
"""
import contextlib
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.distributed import progress
from common.errors import UserError, reason_of
from common.files import are_texts, is_whole, load, remove_torn, save, stamp_of, write_atomically
from common.images import BrokenImage, load_image

IMAGES_AT_ONCE = 512  # decoded before they are written
INDEX = {'images': are_texts, 'shapes': list, 'checksums': list, 'stamps': list, 'size': is_whole(1)}


class CacheEntry(NamedTuple):
    """Where the cache holds an image."""

    end: int  # offset in bytes
    shape: tuple[int, int]  # height and width
    checksum: int  # CRC-32 of the pixels
    stamp: list[int]  # size and time of the file it was made from


def cache_files(root: Path, crop_type: str, size: int) -> tuple[Path, Path]:
    """Return the paths of the pixels and of the index."""
    name = f'{crop_type}_cache_{size}'
    return root / f'{name}.bin', root / f'{name}.pth'


def build_cache(root: Path, crop_type: str, size: int, images: list[str]) -> int:
    """Write the cache of the images (paths below root) unless a valid one exists; returns its size in bytes."""
    pixels_file, index_file = cache_files(root, crop_type, size)
    with contextlib.suppress(UserError):  # there is none, or it is out of date
        cache = Cache(root, crop_type, size, images)
        if cache.entries.keys() == set(images):  # a cache of more images may hold some that were deleted since
            return cache.total
    index_file.unlink(missing_ok=True)  # a cache without its index is never used
    remove_torn(root, [pixels_file.name, index_file.name])
    stamps = [stamp_of(root / path) for path in images]
    index = {'images': images, 'shapes': [], 'checksums': [], 'stamps': stamps, 'size': size}

    def write(file) -> None:
        for pixels in decode_in_parallel(root, images, size):
            file.write(pixels.tobytes())
            index['checksums'].append(zlib.crc32(pixels.tobytes()))
            index['shapes'].append(list(pixels.shape[:2]))

    write_atomically(pixels_file, write)
    save(index, index_file)
    return pixels_file.stat().st_size


def decode_in_parallel(root: Path, images: list[str], size: int):
    """Yield the pixels (H, W, 3) of each image in order, the short side reduced to `size`."""
    starts = progress(range(0, len(images), IMAGES_AT_ONCE), desc=f'{root.name} cache', unit=f'x{IMAGES_AT_ONCE} img')
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in starts:
            yield from pool.map(lambda path: decode(root / path, size), images[start:start + IMAGES_AT_ONCE])


def decode(file: Path, size: int) -> np.ndarray:
    """Decode an image and reduce its short side to `size`, bilinearly for every backbone; never enlarge it.

    Raises:
        UserError: naming the file, if it is missing or broken.
    """
    from torchvision.transforms import functional

    try:
        image = load_image(file)
        return np.asarray(functional.resize(image, size) if min(image.size) > size else image)
    except (BrokenImage, MemoryError, ValueError) as error:
        raise UserError(f'the image {file} is missing or broken ({reason_of(error)}); convert the data set again') \
            from None


class Cache:
    """The packed images of a split, read by path.

    Args:
        images: paths below root that will be read.

    Raises:
        UserError: if there is no such cache, or it is truncated, damaged or older than the images.
    """

    def __init__(self, root: Path, crop_type: str, size: int, images: list[str]):
        self.file, index_file = cache_files(root, crop_type, size)
        if not index_file.is_file() or not self.file.is_file():
            raise UserError(f'there is no cache {self.file}')
        index = load(index_file, 'cache index', INDEX)
        try:
            shapes = np.array(index['shapes'], dtype=np.int64).reshape(len(index['images']), 2)
            ends = np.cumsum(3 * shapes.prod(1))
            self.total = int(ends[-1])
            fields = zip(ends.tolist(), shapes.tolist(), index['checksums'], index['stamps'], strict=True)
            self.entries = dict(zip(index['images'], map(CacheEntry._make, fields), strict=True))
        except (ValueError, TypeError, OverflowError, IndexError):
            raise UserError(f'{index_file} is damaged') from None
        num_bytes = self.file.stat().st_size
        if num_bytes != self.total or (shapes < 1).any():
            raise UserError(f'{self.file} has {num_bytes:,} bytes instead of {self.total:,}: it is truncated')
        stale = [path for path in images
                 if path not in self.entries or self.entries[path].stamp != stamp_of(root / path)]
        if stale:
            raise UserError(f'{self.file} is stale: {len(stale):,} images are new or have changed since, the first: '
                            f'{stale[0]}')
        self.pixels = None  # the memory map, opened at the first read
        self.checked = set()  # paths whose checksum this process has compared

    def __getstate__(self) -> dict:
        return {**self.__dict__, 'pixels': None}  # a worker opens the map itself instead of receiving a copy

    def read(self, path: str):
        """Return an image as a uint8 tensor (3, H, W) whose memory order is (H, W, 3)."""
        import torch

        if self.pixels is None:
            # A view, so that a crop reads only its own part; with mode 'c', a write would stay in this process.
            self.pixels = np.asarray(np.memmap(self.file, np.uint8, 'c'))
        entry = self.entries[path]
        height, width = entry.shape
        pixels = self.pixels[entry.end - 3 * height * width:entry.end].reshape(height, width, 3)
        if path not in self.checked:
            if zlib.crc32(pixels) != entry.checksum:
                raise UserError(f'{self.file} is damaged where it holds {path}; delete it and build it again')
            self.checked.add(path)
        return torch.from_numpy(pixels).permute(2, 0, 1)
