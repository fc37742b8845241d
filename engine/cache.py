"""Images packed into one uint8 memory map, so that an epoch decodes nothing.

`{crop_type}_cache_{size}.bin` holds the pixels (height, width, RGB) of each image one after the other, the short side
reduced to `size`, the aspect kept; smaller images stay as they are. `{crop_type}_cache_{size}.pth` says where each
image lies and which file it was made from. The map is shared by all processes that read it: the operating system keeps
in memory what is in use, and gives it up when others need it.
"""
import contextlib
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from engine.errors import UserError
from engine.files import are_texts, is_whole, load, remove_torn, save, stamp_of, write_atomically
from engine.images import BrokenImage, load_image
from engine.processes import progress

IMAGES_AT_ONCE = 512  # on their way from the decoders to the file
INDEX = {'images': are_texts, 'shapes': list, 'checksums': list, 'stamps': list, 'size': is_whole(1)}


def cache_files(root: Path, crop_type: str, size: int) -> tuple[Path, Path]:
    """Return the paths of the pixels and of the index."""
    return tuple(root / f'{crop_type}_cache_{size}.{suffix}' for suffix in ('bin', 'pth'))


def build_cache(root: Path, crop_type: str, size: int, images: list[str]) -> int:
    """Write the cache of some images (paths below root) unless a sound one is there; returns its bytes."""
    pixels_file, index_file = cache_files(root, crop_type, size)
    with contextlib.suppress(UserError):  # where there is none, or an old one
        cache = Cache(root, crop_type, size, images)
        if cache.places.keys() == set(images):  # one of more images may hold some that were deleted since
            return cache.total
    index_file.unlink(missing_ok=True)  # without its index a cache is not used
    remove_torn(root, [pixels_file.name, index_file.name])
    index = {'images': images, 'shapes': [], 'checksums': [], 'stamps': [stamp_of(root / path) for path in images],
             'size': size}

    def decode(path: str) -> np.ndarray:
        from torchvision.transforms import functional

        try:
            image = load_image(root / path)
            # As the test transform does (bilinear); never enlarged.
            return np.asarray(functional.resize(image, size) if min(image.size) > size else image)
        except BrokenImage as error:
            raise UserError(f'the image {root / path} is missing or broken ({error}); convert the data set again') \
                from None

    def write(file) -> None:
        bar = progress(range(0, len(images), IMAGES_AT_ONCE), desc=f'{root.name} cache', unit=f'x{IMAGES_AT_ONCE} img')
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in bar:
                for pixels in pool.map(decode, images[start:start + IMAGES_AT_ONCE]):
                    file.write(pixels.tobytes())
                    index['checksums'].append(zlib.crc32(pixels.tobytes()))
                    index['shapes'].append(list(pixels.shape[:2]))

    write_atomically(pixels_file, write)
    save(index, index_file)
    return pixels_file.stat().st_size


class Cache:
    """Packed images, by their paths; `images`, below root, are those that will be read.

    Raises:
        UserError: if there is no such cache, or it is truncated or older than the images.
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
            places = zip(ends.tolist(), shapes.tolist(), index['checksums'], index['stamps'], strict=True)
            self.places = dict(zip(index['images'], places, strict=True))
        except (ValueError, TypeError, OverflowError, IndexError):
            raise UserError(f'{index_file} is damaged') from None
        there = self.file.stat().st_size
        if there != self.total or (shapes < 1).any():
            raise UserError(f'{self.file} has {there:,} bytes instead of {self.total:,}: it is truncated')
        stale = [path for path in images if path not in self.places or self.places[path][3] != stamp_of(root / path)]
        if stale:
            raise UserError(f'{self.file} is stale: {len(stale):,} images are new or have changed since, the first: '
                            f'{stale[0]}')
        self.pixels = None
        self.checked = set()  # paths whose pixels this process has compared with their checksum

    def __getstate__(self) -> dict:
        return {**self.__dict__, 'pixels': None}  # a worker opens the map itself instead of getting a copy

    def read(self, path: str):
        """Return the image at a path of the split, a uint8 tensor (3, H, W), its pixels in the order (H, W, 3)."""
        import torch

        if self.pixels is None:
            # Not copied, so that a crop reads no more than its part; 'c': a write would stay in this process.
            self.pixels = np.asarray(np.memmap(self.file, np.uint8, 'c'))
        end, (height, width), checksum, _ = self.places[path]
        pixels = self.pixels[end - 3 * height * width:end].reshape(height, width, 3)
        if path not in self.checked:
            if zlib.crc32(pixels) != checksum:
                raise UserError(f'{self.file} is damaged where it holds {path}; delete it and build it again')
            self.checked.add(path)
        return torch.from_numpy(pixels).permute(2, 0, 1)
