"""Read image files of any origin as upright RGB images; whatever goes wrong is a BrokenImage."""
import contextlib
import io
import os
import re
import stat
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageChops, ImageDraw, ImageFont, ImageOps, JpegImagePlugin, features

# Pillow goes by a file's contents, not by its name, and would start Ghostscript for PostScript in a .jpg.
IMAGE_FORMATS = ['JPEG', 'PNG', 'WEBP', 'BMP', 'TIFF', 'GIF', 'PPM', 'JPEG2000']
IMAGE_SUFFIXES = {'.jpg', '.jpeg', '.jfif', '.jpe', '.png', '.webp', '.bmp', '.tif', '.tiff', '.gif', '.ppm', '.jp2',
                  '.j2k', '.jpf', '.jpx', '.j2c', '.mpo', '.apng', '.pgm', '.pbm', '.pnm'}
if features.check('avif'):  # a Pillow that is built from source may lack it
    IMAGE_FORMATS.append('AVIF')
    IMAGE_SUFFIXES.add('.avif')
with contextlib.suppress(ImportError):  # the format of many phones, if pillow-heif is installed
    from pillow_heif import register_heif_opener

    register_heif_opener()
    IMAGE_FORMATS.append('HEIF')
    IMAGE_SUFFIXES |= {'.heic', '.heif', '.hif'}

DECODED_PIXELS = 2**30 // 4 // 3  # the most that are decoded at full size: 89 megapixels, Pillow's own limit
MAX_PIXELS = 300_000_000  # of baseline JPEG and HEIF, the formats of phones, which take 108 to 200 megapixels
MAX_SCANS = 100  # of a progressive JPEG file; encoders write about ten, and each takes time for the whole image
ROWS_AT_ONCE = 256  # of 16-bit images

Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # prepare_size has lower limits for most formats
warnings.simplefilter('ignore', Image.DecompressionBombWarning)  # prepare_size raises an error instead
warnings.filterwarnings('ignore', category=UserWarning, module=r'PIL\.')  # about EXIF blocks that are damaged


TURNS = {  # by the EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BrokenImage(OSError):
    """An image file that is missing, truncated, or not an image."""


class StoredImage(NamedTuple):
    """The pixels of an image file as they are stored, which the EXIF orientation may turn."""

    pixels: Image.Image  # RGB
    turn: Image.Transpose | None  # to be done to show it upright
    is_rgb: bool  # whether the file itself is
    shrink: int = 1  # the file's sides are this many times as long

    def upright(self) -> Image.Image:
        """Return the whole image, upright."""
        return self.turned(self.pixels)

    def crop(self, box: tuple[int, int, int, int]) -> Image.Image:
        """Return the part in a box, upright.

        Args:
            box: left, top, right, bottom in stored pixels, as the programs that annotate data sets count them; cut to
                the image, and at least one pixel.
        """
        width, height = self.pixels.size
        left = max(0, min(box[0] // self.shrink, width - 1))
        top = max(0, min(box[1] // self.shrink, height - 1))
        right = max(left + 1, min(-(-box[2] // self.shrink), width))  # rounded up
        bottom = max(top + 1, min(-(-box[3] // self.shrink), height))
        return self.turned(self.pixels.crop((left, top, right, bottom)))

    def turned(self, pixels: Image.Image) -> Image.Image:
        """Turn a part of the stored pixels upright."""
        return pixels if self.turn is None else pixels.transpose(self.turn)


def resize_for(image_size: int) -> int:
    """Return the short side in pixels to which test images are resized before the centre crop: 224 -> 256."""
    return image_size * 256 // 224


def grey_to_rgb(image: Image.Image) -> Image.Image:
    """Convert grey of 16 bits, or of 8 bits in a wider mode, to 8-bit RGB; in parts, since NumPy's copies are large."""
    def parts():
        for top in range(0, image.height, ROWS_AT_ONCE):
            part = image.crop((0, top, image.width, min(top + ROWS_AT_ONCE, image.height)))
            yield top, np.asarray(part, np.int32)  # NumPy 2.1.0 crashes on big-endian numbers

    divisor = 257 if max(part.max() for _, part in parts()) > 255 else 1
    transparent = image.info.get('transparency', -1)  # a grey level of some PNG files
    rgb = Image.new('RGB', image.size)
    for top, part in parts():
        grey = (part.clip(0, 65535) // divisor).astype(np.uint8)
        grey[part == transparent] = 255
        rgb.paste(Image.fromarray(grey).convert('RGB'), (0, top))
    return rgb


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB, what is transparent on white.

    Pillow's own conversion of 16-bit grey clips all values above 255, and that of transparent images uncovers whatever
    colours the transparent pixels have.
    """
    if image.mode.startswith('I'):  # I;16 and its variants, or I, as which Pillow reads some 16-bit files
        return grey_to_rgb(image)
    if image.mode == 'F':
        raise ValueError('floating-point images have no known range; convert them to 8 bits')
    if image.has_transparency_data:
        layer = image.convert('RGBA')
        rgb = Image.new('RGB', image.size, 'white')
        rgb.paste(layer, mask=layer)
        return rgb
    return image.convert('RGB')


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """Return how an image is turned upright by its EXIF orientation; None if it is, or has none that can be read."""
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # a damaged EXIF block raises a dozen kinds of errors, and says nothing about the pixels
        return None


def jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield marker and contents of each segment of a JPEG file, up to its end marker: phones append videos."""
    position = 2
    while marker := re.compile(rb'\xff[^\x00\x01\xd0-\xd8\xff]').search(data, position):
        kind, start = data[marker.end() - 1], marker.end() + 2
        if kind == 0xd9:
            return
        position = start - 2 + int.from_bytes(data[start - 2:start], 'big')
        yield kind, data[start:position]


def has_all_scans(data: bytes) -> bool:
    """Tell whether a JPEG file's scans, of which the last may be truncated, hold each coefficient to its last bit."""
    num_components, complete = 0, set()  # complete: (component, coefficient)
    for kind, segment in jpeg_segments(data):
        if 0xc0 <= kind <= 0xcf and kind not in (0xc4, 0xc8, 0xcc):  # frame header
            num_components = len(segment[6::3])
        elif kind == 0xda:  # scan header
            first, last, precision = segment[-3:]
            if precision % 16 == 0:
                complete |= {(component, number) for component in segment[1:-3:2] for number in range(first, last + 1)}
    return len(complete) == 64 * num_components


def load_unended_jpeg(data: bytes) -> Image.Image | None:
    """Decode a JPEG file that lacks its end marker, if it holds all pixels; else return None.

    It is decoded with different bytes after its end: a decoder that lacks pixels takes them from there.
    """
    if data.endswith(bytes(16)):  # what a file system puts in place of lost blocks
        data = data.rstrip(b'\0')
    data = data.removesuffix(b'\xff')  # half of the end marker
    restarts = re.findall(rb'\xff([\xd0-\xd7])', data[data.rfind(b'\xff\xda'):])
    restart = bytes([0xff, 0xd0 + (restarts[-1][0] + 1) % 8 if restarts else 0xd0])  # 0xd0 is a multiple of 8
    images = []
    for filler in (64 * b'\x55', 64 * b'\xaa'):  # no bit is the same
        image = Image.open(io.BytesIO(data + filler + restart + filler + b'\xff\xd9'), formats=['JPEG'])
        prepare_size(image)
        image.load()
        images.append(image)
    are_equal = ImageChops.difference(*images).getbbox() is None
    return images[0] if are_equal and has_all_scans(data) else None


def load_pixels(image: Image.Image, file: Path) -> Image.Image:
    """Decode an image that was opened from a file, also a JPEG file that lacks nothing but its end marker."""
    def read_file() -> bytes:
        return file.getvalue() if isinstance(file, io.BytesIO) else Path(file).read_bytes()

    if (image.info.get('progressive')
            and sum(kind == 0xda for kind, _ in jpeg_segments(read_file())) > MAX_SCANS):
        raise OSError(f'a progressive JPEG file of more than {MAX_SCANS} scans')
    try:
        image.load()
        return image
    except OSError as error:
        if 'truncated' not in str(error) or image.format not in ('JPEG', 'MPO'):
            raise
        mended = None
        with contextlib.suppress(Exception):  # then it is broken for the first reason
            mended = load_unended_jpeg(read_file())
        if mended is None:
            raise
        return mended


def prepare_size(image: Image.Image, side: int | None = None) -> int:
    """Let a large JPEG file be decoded at a fraction of its size; other images of ordinary sizes stay as they are.

    Args:
        side: let any JPEG file be decoded at a fraction of its size, but to no shorter sides.

    Returns:
        by how much its sides are to be shrunk: 1, 2 or 4.

    Raises:
        DecompressionBombError: if an image has too many pixels, since a small file can unpack to fill the memory.
    """
    num_pixels = image.width * image.height
    is_jpeg = isinstance(image, JpegImagePlugin.JpegImageFile) and not image.info.get('progressive')
    limit = MAX_PIXELS if is_jpeg or image.format == 'HEIF' else DECODED_PIXELS
    if num_pixels > limit:
        raise Image.DecompressionBombError(f'{image.width} x {image.height} pixels exceed the limit of {limit:,} for '
                                           'such a file: a decompression bomb?')
    shrink = 1
    while num_pixels > shrink**2 * DECODED_PIXELS:
        shrink *= 2
    if side is not None:
        image.draft(None, (min(side, image.width), min(side, image.height)))
    elif shrink > 1 and is_jpeg:
        image.draft(None, (image.width // shrink, image.height // shrink))
    return shrink


def open_stored(path: Path, side: int | None = None) -> StoredImage:
    """Read an image as RGB in the orientation in which it is stored, with a `side` as `prepare_size` does.

    Raises:
        BrokenImage: if the file cannot be read, for whatever reason.
    """
    try:
        if isinstance(path, (str, Path)) and not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError('not a regular file')  # to open a named pipe would wait for ever
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            shrink = prepare_size(image, side)
            pixels = load_pixels(image, path)
            is_large = shrink > 1 and not isinstance(image, JpegImagePlugin.JpegImageFile)
            rgb = to_rgb(pixels.reduce(shrink) if is_large else pixels)
            rgb.info.pop('comment', None)  # a GIF's can be too long for a JPEG file
            return StoredImage(rgb, turn_of(pixels), pixels.mode == 'RGB', shrink)
    except Exception as error:  # damaged files raise a dozen kinds of errors, from OSError to struct.error
        raise BrokenImage(getattr(error, 'strerror', None) or str(error) or type(error).__name__) from error


def open_image(path: Path) -> tuple[Image.Image, bool]:
    """Read an image as RGB, turned upright by its EXIF orientation, and tell whether the file itself is RGB.

    Raises:
        BrokenImage: if the file cannot be read, for whatever reason.
    """
    stored = open_stored(path)
    return stored.upright(), stored.is_rgb


def load_image(path: Path) -> Image.Image:
    """Read an image as RGB, turned upright by its EXIF orientation; raises BrokenImage."""
    return open_image(path)[0]


def to_image(image) -> Image.Image:
    """Convert a path, a PIL image, or a uint8 array (H, W, 3) or (H, W) to an upright RGB image.

    Raises:
        BrokenImage: if it is none of these, or cannot be read.
    """
    if isinstance(image, (str, Path)):
        return load_image(Path(image))
    try:
        if not isinstance(image, Image.Image):
            image = np.asarray(image)
            if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
                raise ValueError(f'expected a uint8 array (H, W, 3) or (H, W), got {image.shape} of {image.dtype}')
            image = Image.fromarray(image)
        image.load()
        return StoredImage(to_rgb(image), turn_of(image), False).upright()
    except Exception as error:  # Pillow opens files lazily, so reading a PIL image can fail in as many ways
        raise BrokenImage(str(error) or type(error).__name__) from error


def load_tile(path: Path, side: int) -> tuple[Image.Image, bool]:
    """Load an image as a square tile padded with white, and tell whether it could be read.

    A file that cannot be read becomes a grey tile with its name.
    """
    try:
        image = open_stored(path, 2 * side).upright()
        longest = side * min(image.size)  # what is thinner than a pixel of the tile is cut off at both ends
        if max(image.size) > longest:
            image = ImageOps.fit(image, (min(image.width, longest), min(image.height, longest)))
        return ImageOps.pad(image, (side, side), color='white'), True
    except (OSError, ValueError, MemoryError):
        tile = Image.new('RGB', (side, side), '#BBBBBB')
        font = ImageFont.load_default(max(8, side // 12))
        name = textwrap.fill(path.name, max(1, int(side / font.getlength('m'))))
        ImageDraw.Draw(tile).multiline_text((side / 2, side / 2), name, '#333333', font, 'mm', align='center')
        return tile, False
