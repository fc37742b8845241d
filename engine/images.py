"""Read images of strangers: RGB, upright, or BrokenImage, whatever is wrong with them."""
import contextlib
import textwrap
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, features

# Of these alone: Pillow goes by a file's contents, and would start Ghostscript for PostScript in a .jpg.
IMAGE_FORMATS = ['JPEG', 'PNG', 'WEBP', 'BMP', 'TIFF', 'GIF', 'PPM', 'JPEG2000']
IMAGE_SUFFIXES = {'.jpg', '.jpeg', '.jfif', '.jpe', '.png', '.webp', '.bmp', '.tif', '.tiff', '.gif', '.ppm', '.jp2',
                  '.j2k'}
if features.check('avif'):  # since Pillow 11.3
    IMAGE_FORMATS.append('AVIF')
    IMAGE_SUFFIXES.add('.avif')
with contextlib.suppress(ImportError):  # what a phone writes, where pillow-heif is installed
    from pillow_heif import register_heif_opener

    register_heif_opener()
    IMAGE_FORMATS.append('HEIF')
    IMAGE_SUFFIXES |= {'.heic', '.heif'}

warnings.simplefilter('ignore', Image.DecompressionBombWarning)  # open_image makes an error of it


class BrokenImage(OSError):
    """An image file that is missing, cut off, or no image."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB; Pillow's own conversion of 16-bit grey cuts off all above 255."""
    if image.mode.startswith('I'):  # I;16 and its kin, or I, into which Pillow reads some 16-bit files
        grey = np.asarray(image).astype(np.int64)
        grey = grey.clip(0, 65535) // 257 if grey.max() > 255 else grey.clip(0)
        return Image.fromarray(grey.astype(np.uint8)).convert('RGB')
    if image.mode == 'F':
        raise ValueError('images of floating-point numbers have no known range; convert them to 8 bits')
    return image.convert('RGB')


def open_image(path: Path) -> tuple[Image.Image, bool]:
    """Read an image as RGB, upright as its EXIF orientation says, and tell whether the file itself is RGB.

    Raises BrokenImage, whatever Pillow stumbles over.
    """
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # a small file can unpack to fill the memory
                raise Image.DecompressionBombError(f'{image.width} x {image.height} pixels, more than the '
                                                   f'{Image.MAX_IMAGE_PIXELS} of Pillow: a decompression bomb?')
            image.load()
            return to_rgb(ImageOps.exif_transpose(image)), image.mode == 'RGB'
    except Exception as error:  # a damaged file ends in any of a dozen errors, from OSError to struct.error
        raise BrokenImage(getattr(error, 'strerror', None) or str(error) or type(error).__name__) from error


def load_image(path: Path) -> Image.Image:
    """Read an image as RGB, upright as its EXIF orientation says; raises BrokenImage."""
    return open_image(path)[0]


def to_image(image) -> Image.Image:
    """Return what may be a path, a PIL image, or an array (H, W, 3) or (H, W) of uint8, as RGB, upright.

    Raises:
        BrokenImage: if it is none of these, or cannot be read.
    """
    if isinstance(image, (str, Path)):
        return load_image(Path(image))
    try:
        if not isinstance(image, Image.Image):
            image = np.asarray(image)
            if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
                raise ValueError(f'an array {image.shape} of {image.dtype}; expected is (H, W, 3) of uint8')
            image = Image.fromarray(image)
        return to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # of an image that Pillow opened and cannot read, any
        raise BrokenImage(str(error) or type(error).__name__) from error


def load_tile(path: Path, side: int) -> tuple[Image.Image, bool]:
    """Load an image as a square tile, padded with white, or grey with its name where it cannot be read; tell which."""
    try:
        return ImageOps.pad(load_image(path), (side, side), color='white'), True
    except BrokenImage:
        tile = Image.new('RGB', (side, side), '#BBBBBB')
        font = ImageFont.load_default(max(8, side // 12))
        name = textwrap.fill(path.name, max(1, int(side / font.getlength('m'))))
        ImageDraw.Draw(tile).multiline_text((side / 2, side / 2), name, '#333333', font, 'mm', align='center')
        return tile, False
