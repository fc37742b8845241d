"""Turn raw data sets into split files, and split files into batches.

    python data_utils.py --data_path /home/data                     # every known raw set that is there
    python data_utils.py --data_path /home/data --data_name cub car
    python data_utils.py --data_path data --data_name glyph         # made here, no download
    python data_utils.py --data_path /home/me --data_name flowers   # flowers/train/CLASS/*.jpg, flowers/test/CLASS/...

Under {data_path}/{data_name} this writes the images to `uncropped/` (hard links where the file system has them) and,
where there are bounding boxes, to `cropped/`, and the split files `uncropped_data_dicts.pth` and
`cropped_data_dicts.pth`: {'train': {label: [path, ...]}, 'test': {...}, 'class_names': {label: name}}, for In-shop
`train`, `query` and `gallery`; paths relative to {data_path}/{data_name}. `conversion.json` remembers what was decoded,
so that a second run reads only what is new.

PyTorch is imported where it is used, so that a run with nothing to do ends at once.
"""
import functools
import json
import math
import multiprocessing
import os
import random
import shlex
import shutil
import subprocess
import sys
import textwrap
import threading
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from recipes import resize_for
from utils import (DATA_NAMES, Parser, UserError, canonical_data_name, load, make_folder, nearest, run_script, save,
                   save_json)

# Classes and images of the complete data sets: {subset: (classes, images)}, from the papers that introduced the splits.
COUNTS = {
    'car': {'train': (98, 8054), 'test': (98, 8131)},
    'cub': {'train': (100, 5864), 'test': (100, 5924)},
    'sop': {'train': (11318, 59551), 'test': (11316, 60502)},
    'isc': {'train': (3997, 25882), 'query': (3985, 14218), 'gallery': (3985, 12612)},
}
# Of these alone: Pillow goes by a file's contents, and would start Ghostscript for PostScript in a .jpg.
IMAGE_FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'TIFF', 'GIF', 'PPM')
IMAGE_SUFFIXES = {'.jpg', '.jpeg', '.png', '.webp', '.bmp', '.tif', '.tiff', '.gif', '.ppm'}
SUBSETS = ('train', 'test', 'query', 'gallery')
MOST_WORKERS = 1024  # processes that decode images
FAILURES_SHOWN = 20


class Item(NamedTuple):
    """One image of a raw data set."""

    source: str  # path below the data set's folder
    subset: str  # train, test, query or gallery
    label: str
    stem: str  # file name below uncropped/, without its ending
    box: tuple[int, int, int, int] | None = None  # left, top, right, bottom in pixels


# ---------------------------------------------------- raw data sets --------------------------------------------------
def find_root(data_path: str | Path, data_name: str) -> Path | None:
    """Return the folder of a data set below `data_path`, under its short name or its archive's own, or None."""
    data_path = Path(data_path)
    names = DATA_NAMES.get(data_name, (data_name.lower(),))
    folders = [path for path in data_path.iterdir() if path.is_dir()] if data_path.is_dir() else []
    found = [path for path in folders if path.name == data_name or path.name.lower() in names]
    wanted = RAW_SETS[data_name].files[0] if data_name in RAW_SETS else ''
    # Of several, the one that holds the data set, then the one of the short name.
    return min(found, default=None, key=lambda path: (
        not ((path / wanted).exists() or (path / 'uncropped_data_dicts.pth').exists()),
        path.name != data_name, path.name))


def read_table(path: Path, columns: int, header_lines: int = 0, last_is_path: bool = False) -> Iterator[list[str]]:
    """Yield `file:line` and then the fields of each line of a text table.

    Raises:
        UserError: with file and line number where a line does not have `columns` fields.
    """
    try:
        lines = path.read_text(encoding='utf-8').split('\n')
    except UnicodeDecodeError:
        raise UserError(f'{path} is no text file in UTF-8; unpack the archive again') from None
    for number, line in enumerate(lines[header_lines:], start=header_lines + 1):
        if not line.strip():
            continue
        fields = line.split(maxsplit=columns - 1 if last_is_path else -1)
        if len(fields) != columns:
            raise UserError(f'{path}:{number}: {len(fields)} fields instead of {columns} in {line[:60]!r}; '
                            'unpack the archive again')
        yield [f'{path}:{number}', *fields]


def as_int(text: str, place: str) -> int:
    """Parse a class number at `file:line` of an annotation file."""
    try:
        return int(text)
    except ValueError:
        raise UserError(f'{place}: the class {text[:40]!r} is no whole number; unpack the archive again') from None


def check_path(path: str, place: str) -> str:
    """Return the path of an image below the data set's folder, or refuse it with `file:line`."""
    parts = path.split('/')
    if not parts[0] or parts[-1] in ('', '.') or '..' in parts:
        raise UserError(f'{place}: {path[:60]!r} is no path of an image below the data set; unpack the archive again')
    return path


def read_car(root: Path) -> tuple[list[Item], dict[str, str]]:
    """Read CARS196 (Krause et al., 2013): classes 1-98 train, 99-196 test, whatever its own `test` field says."""
    file = root / 'cars_annos.mat'
    reader = subprocess.run([sys.executable, str(Path(__file__).with_name('car_annotations.py')), str(file)],
                            capture_output=True, text=True, check=False)
    if reader.returncode:
        reason = (reader.stderr.strip().splitlines() or ['the reader crashed'])[-1][:80]
        raise UserError(f'{file} is no annotation file of CARS196 ({reason}); download it again')
    rows, names = json.loads(reader.stdout)
    class_names = {str(number): name for number, name in enumerate(names, start=1)}
    # MATLAB counts pixels from 1, both ends included.
    items = [Item(check_path(path, str(file)), 'train' if label <= 98 else 'test', str(label), Path(path).stem,
                  (x1 - 1, y1 - 1, x2, y2)) for path, label, x1, y1, x2, y2 in rows]
    return items, class_names


def read_cub(root: Path) -> tuple[list[Item], dict[str, str]]:
    """Read CUB-200-2011 (Wah et al., 2011): classes 1-100 train, 101-200 test."""
    labels = {image_id: as_int(label, place)
              for place, image_id, label in read_table(root / 'image_class_labels.txt', 2)}
    boxes = {}
    for place, image_id, *numbers in read_table(root / 'bounding_boxes.txt', 5):
        try:
            x, y, width, height = (float(number) for number in numbers)
            boxes[image_id] = (math.floor(x), math.floor(y), math.ceil(x + width), math.ceil(y + height))
        except (ValueError, OverflowError):
            raise UserError(f'{place}: the box {" ".join(numbers)[:60]!r} is not made of numbers; unpack the archive '
                            'again') from None
    items = []
    for place, image_id, path in read_table(root / 'images.txt', 2, last_is_path=True):
        if image_id not in labels or image_id not in boxes:
            raise UserError(f'{place}: image {image_id[:40]} has no label or no box in the other files; unpack the '
                            'archive again')
        path, label = check_path(path, place), labels[image_id]
        items.append(Item(f'images/{path}', 'train' if label <= 100 else 'test', str(label), Path(path).stem,
                          boxes[image_id]))
    return items, {item.label: Path(item.source).parent.name for item in items}


def read_sop(root: Path) -> tuple[list[Item], dict[str, str]]:
    """Read Stanford Online Products (Oh Song et al., CVPR 2016): the two lists are the split."""
    items = []
    for subset in ('train', 'test'):
        table = read_table(root / f'Ebay_{subset}.txt', 4, header_lines=1, last_is_path=True)
        for place, _, label, _, path in table:
            label = str(as_int(label, place))
            stem = os.path.splitext(check_path(path, place))[0].replace('/', '_')
            items.append(Item(path, subset, label, stem))
    return items, {item.label: f'{item.source.split("_final")[0]} {item.label}' for item in items}


def read_isc(root: Path) -> tuple[list[Item], dict[str, str]]:
    """Read In-shop Clothes Retrieval (Liu et al., CVPR 2016): train, query and gallery as its list says."""
    file = root / 'Eval/list_eval_partition.txt'
    items = []
    for place, path, label, subset in read_table(file, 3, header_lines=2):
        if subset not in ('train', 'query', 'gallery'):
            raise UserError(f'{place}: evaluation status {subset[:40]!r} is not train, query or gallery; unpack the '
                            'archive again')
        check_path(path, place)
        stem = os.path.splitext(path)[0].removeprefix('img/').replace('/', '_')
        items.append(Item(f'Img/{path}', subset, label, stem))
    return items, {item.label: item.label for item in items}


def read_folder(root: Path, test_ratio: float | None, seed: int) -> tuple[list[Item], dict[str, str]]:
    """Read a folder of one's own: `train/CLASS/*` and `test/CLASS/*` (or `query`, `gallery`), or one folder a class.

    With one folder a class, `test_ratio` of the classes (None: half), drawn from `seed`, become test classes.
    """
    def images(folder: Path) -> list[Path]:
        return sorted(path for path in folder.rglob('*') if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
                      and not any(part.startswith('.') for part in path.relative_to(folder).parts))

    def classes(folder: Path) -> list[Path]:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith('.')
                      and path.name not in ('uncropped', 'cropped'))

    named = {path.name.lower(): path for path in classes(root)}
    subsets = [subset for subset in SUBSETS if subset in named]
    if subsets in (['train', 'test'], ['train', 'query', 'gallery']):
        if test_ratio is not None:
            raise UserError(f'--test_ratio {test_ratio} has no effect: {root} is split into {" and ".join(subsets)} '
                            'already; leave it out')
        folders = [(folder, subset) for subset in subsets for folder in classes(named[subset])]
    elif subsets:
        raise UserError(f'{root} holds {" and ".join(subsets)}; it needs train and test, or train, query and gallery, '
                        'each with one folder per class, or just one folder per class')
    else:
        folders = classes(root)
        test_ratio = 0.5 if test_ratio is None else test_ratio
        if not 0 < test_ratio < 1:
            raise UserError(f'--test_ratio {test_ratio} must lie between 0 and 1')
        order = random.Random(seed).sample(range(len(folders)), len(folders))
        num_test = max(1, round(test_ratio * len(folders)))
        folders = [(folder, 'test' if order[i] < num_test else 'train') for i, folder in enumerate(folders)]
    items = [Item(path.relative_to(root).as_posix(), subset, folder.name,
                  path.relative_to(root).with_suffix('').as_posix().replace('/', '_'))
             for folder, subset in folders for path in images(folder)]
    return items, {item.label: item.label for item in items}


class RawSet(NamedTuple):
    """A known raw data set: the files that tell it, and its reader."""

    files: tuple[str, ...]
    read: Callable[[Path], tuple[list[Item], dict[str, str]]]


RAW_SETS = {
    'car': RawSet(('cars_annos.mat',), read_car),
    'cub': RawSet(('images.txt', 'image_class_labels.txt', 'bounding_boxes.txt'), read_cub),
    'sop': RawSet(('Ebay_train.txt', 'Ebay_test.txt'), read_sop),
    'isc': RawSet(('Eval/list_eval_partition.txt',), read_isc),
}


# ---------------------------------------------------- glyph: made, not downloaded -------------------------------------
TYPEFACES = (  # of those that matplotlib ships, the ones with many alphabets
    'DejaVuSans', 'DejaVuSans-Bold', 'DejaVuSans-Oblique', 'DejaVuSansMono', 'DejaVuSansMono-Bold',
    'DejaVuSerif', 'DejaVuSerif-Bold', 'DejaVuSerif-Italic', 'STIXGeneral', 'STIXGeneralBol', 'STIXGeneralItalic',
)
GLYPH_SIZE = 48  # px, side of an image
GLYPH_CLASSES, GLYPH_IMAGES = 300, 20  # unless the flags say otherwise
GLYPH_CATEGORIES = ('Lu', 'Ll', 'Lo', 'Nd', 'Sm', 'So', 'Po', 'Sc')  # Unicode's letters, digits and symbols
GLYPH_LIKENESS = 0.85  # two characters whose outlines correlate more than this count as one


def typeface_file(name: str) -> str:
    """Return the path of a typeface that matplotlib ships."""
    import matplotlib

    return str(Path(matplotlib.get_data_path()) / 'fonts/ttf' / f'{name}.ttf')


@functools.cache
def typeface(name: str, size: int) -> ImageFont.FreeTypeFont:
    """Load a typeface at a size in pixels."""
    return ImageFont.truetype(typeface_file(name), size)


def mask_of(character: str, font: ImageFont.FreeTypeFont) -> Image.Image | None:
    """Draw a character white on black, cut to its outline; None if it leaves no ink."""
    left, top, right, bottom = font.getbbox(character)
    mask = Image.new('L', (right - left + 4, bottom - top + 4))
    ImageDraw.Draw(mask).text((2 - left, 2 - top), character, fill=255, font=font)
    return mask.crop(mask.getbbox()) if mask.getbbox() else None


def drawable_characters(count: int) -> list[tuple[str, list[str]]]:
    """Return `count` characters that look different, each with the typefaces that have it, simple letters first.

    Alphabets share shapes (A, Alpha and the Cyrillic A; o and O), and a class must be one shape: a character whose
    outline, scaled to a square, correlates with an earlier one's is left out.
    """
    from matplotlib.ft2font import FT2Font

    charmaps = {name: set(FT2Font(typeface_file(name)).get_charmap()) for name in TYPEFACES}
    shared = charmaps['DejaVuSans']
    letters = [chr(code) for code in sorted(shared) if unicodedata.category(chr(code)) in GLYPH_CATEGORIES]
    faces = {letter: [name for name in TYPEFACES if ord(letter) in charmaps[name]] for letter in letters}
    letters = [letter for letter in letters if len(faces[letter]) >= 3]
    letters.sort(key=lambda letter: (bool(unicodedata.decomposition(letter)),
                                     unicodedata.category(letter)[0] != 'L', ord(letter)))
    font, outlines, chosen = typeface('DejaVuSans', 64), np.zeros((0, 400), np.float32), []
    for letter in letters:
        mask = mask_of(letter, font)
        if mask is None:
            continue
        outline = np.asarray(mask.resize((20, 20), Image.Resampling.BILINEAR), np.float32).reshape(-1)
        outline -= outline.mean()
        outline /= max(float(np.linalg.norm(outline)), 1e-6)
        if len(outlines) and float((outlines @ outline).max()) > GLYPH_LIKENESS:
            continue
        outlines = np.vstack([outlines, outline])
        chosen.append((letter, faces[letter]))
        if len(chosen) == count:
            return chosen
    raise UserError(f'--glyph_classes {count} is more than the typefaces hold; they have {len(chosen)} different ones')


def draw_glyph(character: str, faces: list[str], rng: random.Random) -> Image.Image:
    """Draw one image: the character, dark, in random typeface, size, rotation, shear and place, over light clutter."""
    size = GLYPH_SIZE
    image = Image.new('RGB', (size, size), tuple(rng.randrange(150, 256) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randrange(2, 5)):  # clutter: strokes and blots
        colour = tuple(rng.randrange(80, 256) for _ in range(3))
        ends = [rng.randrange(-8, size + 8) for _ in range(4)]
        if rng.random() < 0.5:
            draw.line(ends, fill=colour, width=rng.randrange(1, 3))
        else:
            radius = rng.randrange(2, 6)
            draw.ellipse((ends[0] - radius, ends[1] - radius, ends[0] + radius, ends[1] + radius), fill=colour)
    mask = mask_of(character, typeface(rng.choice(faces), 64))
    mask = ImageOps.expand(mask, border=max(mask.size) // 2)
    shear = rng.uniform(-0.2, 0.2)
    mask = mask.transform(mask.size, Image.Transform.AFFINE, (1, shear, -shear * mask.height / 2, 0, 1, 0),
                          Image.Resampling.BILINEAR)
    mask = mask.rotate(rng.uniform(-20, 20), Image.Resampling.BILINEAR)
    mask = mask.crop(mask.getbbox())
    scale = rng.uniform(0.55, 0.9) * size / max(mask.size)
    mask = mask.resize([max(2, round(side * scale)) for side in mask.size], Image.Resampling.LANCZOS)
    place = [rng.randint(0, size - side) for side in mask.size]
    image.paste(Image.new('RGB', mask.size, tuple(rng.randrange(120) for _ in range(3))), place, mask)
    noise = np.random.RandomState(rng.getrandbits(32)).randint(-12, 13, (size, size, 3))
    return Image.fromarray(np.clip(np.asarray(image, np.int16) + noise, 0, 255).astype(np.uint8))


def make_glyph(root: Path, num_classes: int, num_images: int, seed: int) -> None:
    """Draw the data set `glyph` in the layout of a folder of one's own: two thirds of the characters train.

    The same settings give the same bytes (under the same versions of Pillow and matplotlib); a folder made with them
    already is left as it is.

    Raises:
        UserError: if the settings are out of range or the typefaces do not hold so many characters.
    """
    if num_classes < 3 or num_images < 2:
        raise UserError(f'--glyph_classes {num_classes} and --glyph_images {num_images} must be at least 3 and 2')
    settings = {'classes': num_classes, 'images': num_images, 'seed': seed, 'size': GLYPH_SIZE, 'complete': True}
    stamp = root / 'glyph.json'
    if stamp.is_file() and stamp.read_text() == json.dumps(settings):
        return
    characters = drawable_characters(num_classes)
    random.Random(seed).shuffle(characters)
    if stamp.is_file():  # ours, but made otherwise or cut short
        for image in [*root.glob('train/U+*/[0-9]*.png'), *root.glob('test/U+*/[0-9]*.png')]:
            image.unlink()
    elif any((root / folder).exists() for folder in ('train', 'test')):
        raise UserError(f'{root} holds train or test, but was not made by this script; move it away')
    save_json({**settings, 'complete': False}, stamp)
    num_train = round(num_classes * 2 / 3)
    for number, (character, faces) in enumerate(tqdm(characters, desc='glyph', unit='class', dynamic_ncols=True)):
        folder = root / ('train' if number < num_train else 'test') / f'U+{ord(character):04X}'
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(num_images):
            image = draw_glyph(character, faces, random.Random(f'{seed} {ord(character)} {index}'))
            image.save(folder / f'{index:04d}.png')
    save_json(settings, stamp)


# ---------------------------------------------------- conversion ----------------------------------------------------
warnings.simplefilter('ignore', Image.DecompressionBombWarning)  # open_image makes an error of it


def check_paths(file: Path, paths) -> None:
    """Raise a UserError that names the first path in a file which leaves the data set's folder."""
    for path in paths:
        if path.startswith('/') or '\\' in path or '\0' in path or '..' in path.split('/'):
            raise UserError(f'{file}: the image {path!r} does not lie in the data set\'s folder; the file is not to be '
                            'trusted')


def image_file(root: Path, image: str) -> Path:
    """Return the file of an image of a data base; raises UserError where a symbolic link leads out of the folder."""
    if not (root / image).resolve().is_relative_to(root.resolve()):
        raise UserError(f'the image {root / image} is a link out of the data set\'s folder; it is not to be trusted')
    return root / image


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
    """Read an image as RGB, upright as its EXIF orientation says; tell whether the file itself is RGB.

    Raises:
        BrokenImage: whatever Pillow stumbles over.
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


def load_tile(path: Path, side: int) -> tuple[Image.Image, bool]:
    """Load an image as a square tile, padded with white; returns it and whether it could be read.

    An image that is missing or broken becomes a grey tile with its name.
    """
    try:
        return ImageOps.pad(load_image(path), (side, side), color='white'), True
    except BrokenImage:
        tile = Image.new('RGB', (side, side), '#BBBBBB')
        font = ImageFont.load_default(max(8, side // 12))
        letters = max(1, int(side / font.getlength('m')))  # in a line
        name = '\n'.join(textwrap.wrap(path.name, letters))
        ImageDraw.Draw(tile).multiline_text((side / 2, side / 2), name, '#333333', font, 'mm', align='center')
        return tile, False


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file (of a symbolic link: what it points to), or copy it where the file system cannot."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)


def convert_item(root: Path, item: Item, stem: str) -> tuple[str, int]:
    """Decode one image, put it into `uncropped/` and, with a box, into `cropped/`.

    Returns:
        file name and size in bytes in `uncropped/`.

    Raises:
        BrokenImage: if it cannot be decoded.
    """
    source = root / item.source
    rgb, is_rgb = open_image(source)
    target = root / 'uncropped' / f'{stem}{source.suffix if is_rgb else ".jpg"}'
    target.unlink(missing_ok=True)  # it may be a hard link to an original, which must not be written through
    if is_rgb:
        link_or_copy(source, target)
    else:
        rgb.save(target, quality=95, subsampling=0)
    if item.box:
        left, top, right, bottom = item.box
        left, top = max(0, min(left, rgb.width - 1)), max(0, min(top, rgb.height - 1))
        right, bottom = max(left + 1, min(right, rgb.width)), max(top + 1, min(bottom, rgb.height))
        cropped = root / 'cropped' / f'{stem}.jpg'
        cropped.unlink(missing_ok=True)
        rgb.crop((left, top, right, bottom)).save(cropped, quality=95, subsampling=0)
    return target.name, target.stat().st_size


def unique_stems(items: list[Item]) -> list[str]:
    """Return one file name (without its ending) for each item; a name met twice, in any case, gets a number."""
    stems, taken = [], set()
    for item in items:
        stem, number = item.stem, 2
        while stem.lower() in taken:
            stem, number = f'{item.stem}_{number}', number + 1
        taken.add(stem.lower())
        stems.append(stem)
    return stems


def open_manifest(root: Path, folders: list[str]) -> dict:
    """Return what an earlier conversion wrote down, or an empty manifest.

    {'made_by': 'data_utils.py', 'splits': {file: [size, time]}, 'files': {source: [file name and size in uncropped/,
    stem, box, subset, label, class name, size and time of the source]}}

    Raises:
        UserError: if files of these names are there, but not from an earlier conversion.
    """
    file = root / 'conversion.json'
    try:
        manifest = json.loads(file.read_text()) if file.is_file() else {}
        if manifest.get('made_by') == 'data_utils.py' and isinstance(manifest['files'], dict):
            return manifest
    except (ValueError, AttributeError, KeyError):
        pass  # not ours, like any other file of that name
    names = ['conversion.json', *folders, *(f'{folder}_data_dicts.pth' for folder in folders)]
    foreign = [name for name in names if (root / name).exists()]
    if foreign:
        raise UserError(f'{root} holds {", ".join(foreign)} that this script did not write; move that away')
    return {'made_by': 'data_utils.py', 'files': {}, 'splits': {}}


def find_changes(root: Path, items: list[Item], class_names: dict[str, str], manifest: dict, folders: list[str]
                 ) -> tuple[dict, dict[str, str], list[tuple[Item, list]]]:
    """Compare the raw files with an earlier conversion.

    Returns:
        what is done ({source: manifest entry}), what is missing ({source: reason}), and what is left to decode.
    """
    sizes = {}
    for folder in folders:
        with os.scandir(root / folder) as entries:
            sizes[folder] = {entry.name: entry.stat().st_size for entry in entries}
    done, failures, todo = {}, {}, []
    top = str(root)
    for item, stem in zip(items, unique_stems(items), strict=True):
        try:
            status = os.stat(f'{top}/{item.source}')  # strings: pathlib takes seconds for 100,000 images
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            failures[item.source] = getattr(error, 'strerror', None) or str(error)
            continue
        key = [stem, list(item.box) if item.box else None, item.subset, item.label, class_names.get(item.label),
               status.st_size, status.st_mtime_ns]
        name, size, *known = manifest['files'].get(item.source, [None, None])
        whole = known == key and sizes['uncropped'].get(name) == size
        if whole and (not item.box or sizes['cropped'].get(f'{stem}.jpg')):
            done[item.source] = [name, size, *key]
        else:
            todo.append((item, key))
    return done, failures, todo


def convert(root: Path, items: list[Item], class_names: dict[str, str], skip_bad: bool = False) -> dict:
    """Decode every image that is new or changed, in parallel, and write the split files.

    Args:
        root: the data set's folder.
        items: the images, as a `read_*` gives them.
        class_names: {label: name}.
        skip_bad: leave broken and missing images out instead of failing.

    Returns:
        {'decoded': number of images decoded, 'skipped': number left out, 'split': the split of `uncropped/`}.

    Raises:
        UserError: if images are broken or missing (all of them are counted, the first twenty named), one is listed
            twice, or a subset is empty.
    """
    check_items(root, items)
    folders = ['uncropped', 'cropped'] if any(item.box for item in items) else ['uncropped']
    manifest = open_manifest(root, folders)
    for folder in folders:
        make_folder('the folder', root / folder)
    manifest_file = root / 'conversion.json'
    if not manifest_file.is_file():  # first of all, so that a conversion cut short is known as ours
        save_json(manifest, manifest_file)
    done, failures, todo = find_changes(root, items, class_names, manifest, folders)

    def decode(job: tuple[Item, list]):
        try:
            return convert_item(root, job[0], job[1][0])
        except BrokenImage as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        bar = tqdm(pool.map(decode, todo), total=len(todo), desc=root.name, unit='img', dynamic_ncols=True,
                   disable=not todo)
        for (item, key), result in zip(todo, bar, strict=True):
            if isinstance(result, BrokenImage):
                failures[item.source] = str(result)
            else:
                done[item.source] = [*result, *key]
    unchanged = list(done.items()) == list(manifest['files'].items())
    manifest['files'] = done
    if not unchanged:
        save_json(manifest, manifest_file)
    if failures and not skip_bad:
        shown = '; '.join(f'{name} ({reason})' for name, reason in list(failures.items())[:FAILURES_SHOWN])
        more = f'; and {len(failures) - FAILURES_SHOWN} more' if len(failures) > FAILURES_SHOWN else ''
        raise UserError(f'{root}: {len(failures)} of {len(items)} images are broken or missing: {shown}{more}. '
                        'Unpack them again, or leave them out with --skip_bad')
    items = [item for item in items if item.source in done]
    check_items(root, items)
    splits = {folder: make_split(items, done, class_names, folder) for folder in folders}
    files = {f'{folder}_data_dicts.pth': split for folder, split in splits.items()}
    if not unchanged or manifest['splits'] != {name: stamp_of(root / name) for name in files}:
        for name, split in files.items():
            save(split, root / name)
        manifest['splits'] = {name: stamp_of(root / name) for name in files}
        save_json(manifest, manifest_file)
    return {'decoded': len(todo), 'skipped': len(failures), 'split': splits['uncropped']}


def stamp_of(file: Path) -> list[int] | None:
    """Return size and time of a file, or None."""
    try:
        found = os.stat(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return [found.st_size, found.st_mtime_ns]


def check_items(root: Path, items: list[Item]) -> None:
    """Refuse an empty subset, and an image that is listed twice (it could train and test at once)."""
    present = {item.subset for item in items}
    for subset in ('train', 'query', 'gallery') if present & {'query', 'gallery'} else ('train', 'test'):
        if subset not in present:
            raise UserError(f'{root}: no images in {subset}; it needs train/CLASS/ and test/CLASS/, or one folder for '
                            'each of at least two classes (python data_utils.py --help)')
    if len({item.source for item in items}) < len(items):
        seen = set()
        twice = next(item.source for item in items if item.source in seen or seen.add(item.source))
        raise UserError(f'{root}: the image {twice} is listed twice; unpack the archive again')


def make_split(items: list[Item], done: dict, class_names: dict[str, str], folder: str) -> dict:
    """Gather converted items into {subset: {label: [path, ...]}, ..., 'class_names': {label: name}}."""
    split = {subset: {} for subset in SUBSETS if any(item.subset == subset for item in items)}
    for item in items:
        name, _, stem = done[item.source][:3]
        name = f'{stem}.jpg' if folder == 'cropped' else name
        split[item.subset].setdefault(item.label, []).append(f'{folder}/{name}')
    labels = {label for subset in split.values() for label in subset}
    return {**split, 'class_names': {label: class_names.get(label, label) for label in sorted(labels)}}


def count_split(split: dict) -> dict[str, tuple[int, int]]:
    """Return {subset: (classes, images)}."""
    return {subset: (len(split[subset]), count_images(split[subset])) for subset in SUBSETS if subset in split}


def count_images(classes: dict[str, list[str]]) -> int:
    """Return the number of images of a subset."""
    return sum(len(paths) for paths in classes.values())


def check_counts(data_name: str, counts: dict[str, tuple[int, int]]) -> str:
    """Compare a conversion with the complete data set and return a sentence for the screen."""
    if data_name not in COUNTS:
        return ''
    expected = COUNTS[data_name]
    if counts == expected:
        return 'the counts are those of the complete data set'
    differ = [f'{subset} has {counts.get(subset, (0, 0))[0]:,} classes and {counts.get(subset, (0, 0))[1]:,} images '
              f'instead of {classes:,} and {images:,}' for subset, (classes, images) in expected.items()
              if counts.get(subset) != (classes, images)]
    return f'not the complete data set: {"; ".join(differ)}. Numbers on it do not compare with published ones'


def process(data_path: Path, data_name: str, args) -> None:
    """Convert one data set and say what it holds.

    Raises:
        UserError: if it is not there, its files are broken, or a subset is empty.
    """
    root = find_root(data_path, data_name)
    if data_name == 'glyph':
        root = make_folder('--data_path', root or data_path / 'glyph')
        make_glyph(root, args.glyph_classes or GLYPH_CLASSES, args.glyph_images or GLYPH_IMAGES, args.seed)
    if root is None:
        looked = ' or '.join(DATA_NAMES.get(data_name, (data_name,)))
        there = [path.name for path in data_path.iterdir() if path.is_dir()]
        raise UserError(f'--data_name {data_name}: there is no folder {looked} in {data_path}'
                        f'{nearest(data_name, [*there, *RAW_SETS, "glyph"])} (there are: '
                        f'{", ".join(sorted(there)) or "none"}); extract the data set there')
    if data_name in RAW_SETS:
        raw = RAW_SETS[data_name]
        missing = [file for file in raw.files if not (root / file).is_file()]
        if missing:
            mirror = data_name == 'car' and any((root / name).is_dir() for name in ('train', 'cars_train'))
            note = (' (train and test folders, 8,144 / 8,041 images, are the classification split with every class in '
                    'both halves; retrieval needs classes 1-98 / 99-196, 8,054 / 8,131 images)') if mirror else ''
            raise UserError(f'{root} lacks {", ".join(missing)}{note}; extract the data set\'s own archive there')
        items, class_names = raw.read(root)
        check_paths(root, (item.source for item in items))
    else:
        items, class_names = read_folder(root, args.test_ratio, args.seed)
    result = convert(root, items, class_names, args.skip_bad)
    counts = count_split(result['split'])
    parts = ', '.join(f'{subset} {classes:,} classes {images:,} images' for subset, (classes, images) in counts.items())
    left_out = f'; {result["skipped"]:,} broken or missing images left out' if result['skipped'] else ''
    print(f'{data_name}: {parts}; {result["decoded"]:,} decoded now{left_out}')
    note = check_counts(data_name, counts)
    if note:
        print(f'{data_name}: {note}')
    if args.cache_size is not None:
        from cache import build_cache

        for crop_type in ('uncropped', 'cropped'):
            if (root / f'{crop_type}_data_dicts.pth').is_file():
                images, size = build_cache(data_path, data_name, crop_type, args.cache_size)
                print(f'{data_name}: cache of {images:,} {crop_type} images, {size / 1e6:,.0f} MB')


# ---------------------------------------------------- data set, transforms, batches -----------------------------------
def read_split(data_path: str | Path, data_name: str, crop_type: str = 'uncropped') -> tuple[Path, dict]:
    """Load a split file.

    Returns:
        the data set's folder, and {'train': {label: [path, ...]}, 'test' or 'query' and 'gallery', 'class_names'};
        labels are strings.

    Raises:
        UserError: if the path or the split is not there (naming the command that makes it), or the split is empty.
    """
    data_path = Path(data_path)
    if not data_path.is_dir():
        what = 'is no folder' if data_path.exists() else 'does not exist'
        raise UserError(f'--data_path {data_path} {what}; name the folder that holds your data sets')
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
    split = load(file, 'split file', ('train',))
    subsets = ('train', 'test') if 'test' in split else ('train', 'query', 'gallery')
    for subset in subsets:
        entries = split.get(subset)
        if not isinstance(entries, dict) or not all(
                isinstance(paths, list) and all(isinstance(path, str) for path in paths) for paths in entries.values()):
            raise UserError(f'{file}: {subset} is not {{label: [path, ...]}}; convert again: {command}')
        split[subset] = {str(label): paths for label, paths in entries.items() if paths}
        check_paths(file, (path for paths in entries.values() for path in paths))
        if not split[subset]:
            raise UserError(f'{file}: no images in {subset}; convert again: {command}')
    names = split.get('class_names')
    split['class_names'] = {str(label): str(name) for label, name in names.items()} if isinstance(names, dict) else {}
    return root, {name: split[name] for name in split if name in (*subsets, 'class_names')}  # what was checked


class RetrievalDataset:
    """The images of one subset of a split, with labels 0..C-1 in the order of the split.

    What an image looks like in an epoch depends on (seed, epoch, index) alone, not on workers or on what was drawn
    before.

    Args:
        root: the data set's folder.
        classes: {label: [path, ...]}.
        transform: a function from a PIL image or a uint8 tensor (3, H, W) to one of its size.
        seed: of the augmentation.
        class_names: {label: name}; a label without one is its own name.
        labels: {label: number}; None numbers the classes as they come. Query and gallery share one.
        cache: of cache.py, to read pixels from instead of decoding files.
    """

    def __init__(self, root: Path, classes: dict[str, list[str]], transform, seed: int = 0,
                 class_names: dict[str, str] | None = None, labels: dict[str, int] | None = None, cache=None):
        import torch

        self.root, self.transform, self.seed, self.cache = Path(root), transform, seed, cache
        numbers = labels or {label: number for number, label in enumerate(classes)}
        self.class_names = [(class_names or {}).get(label, label) for label in numbers]
        self.images = [path for paths in classes.values() for path in paths]
        self.labels = [numbers[label] for label, paths in classes.items() for _ in paths]
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # seen by workers that live on
        self.reading = torch.full((MOST_WORKERS,), -1).share_memory_()  # the image in each worker's hands

    def set_epoch(self, epoch: int) -> None:
        """Draw the augmentation of another epoch from now on."""
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        """Return the image, uint8 (3, H, W), and its label.

        Raises:
            UserError: naming the file, if it is missing or broken.
        """
        import torch

        worker = torch.utils.data.get_worker_info()
        if worker:
            self.reading[worker.id] = index
        image = self.read(index)
        if worker:
            self.reading[worker.id] = -1
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


def end_with_parent(_worker: int) -> None:
    """Let a worker process end when the one that reads from it dies: the `worker_init_fn` of a DataLoader.

    PyTorch's own watch looks at the parent process, which with the start method `forkserver` (that of Python 3.14) is
    another one, and lives on.
    """
    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def batches(loader):
    """Yield the batches of a loader.

    Raises:
        UserError: naming the images that were being read, if a worker process died.
    """
    try:
        yield from loader
    except RuntimeError as error:
        if 'DataLoader worker' not in str(error):
            raise
        images = [loader.dataset.images[index] for index in loader.dataset.reading.tolist() if index >= 0]
        raise UserError(f'a process that reads images has died while reading {" or ".join(images) or "none of them"} '
                        f'({str(error).splitlines()[0]}); if memory ran out, lower --num_workers') from None


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
        import torch
        from torchvision.transforms.v2 import functional

        part = functional.crop(image, **self.drawn.make_params([image]))
        if torch.is_tensor(part):
            part = part[None].contiguous(memory_format=torch.channels_last)[0]
        return functional.resize(part, self.drawn.size, self.drawn.interpolation, antialias=self.drawn.antialias)


def make_transform(training: bool, image_size: int, resize_size: int | None = None, interpolation: str = 'bilinear',
                   min_crop: float = 0.08, flip: float = 0.5):
    """Build the transform from a PIL image or a uint8 tensor to a uint8 tensor (3, image_size, image_size).

    Training crops a random part and flips it; testing resizes the short side to `resize_size` and takes the centre.
    Scaling, channel order, mean and std belong to the trunk and happen on the device (`EmbeddingNet.preprocess`).

    Args:
        image_size: side of the crop in pixels.
        resize_size: short side before the centre crop; None: image_size x 256/224.
        interpolation: `bilinear` or `bicubic`, as the trunk was trained.
        min_crop: smallest share of the image's area in a training crop.
        flip: probability of a horizontal flip.
    """
    from torchvision.transforms import v2 as transforms

    mode = transforms.InterpolationMode(interpolation)
    if training:
        steps = [CropAndResize(transforms.RandomResizedCrop(image_size, scale=(min_crop, 1.0), interpolation=mode)),
                 transforms.RandomHorizontalFlip(flip)]
    else:
        steps = [transforms.Resize(resize_size or resize_for(image_size), interpolation=mode),
                 transforms.CenterCrop(image_size)]
    return transforms.Compose([*steps, transforms.PILToTensor()])


class BatchSampler:
    """Yield the batches of an epoch as lists of indices; they depend on (seed, epoch) alone.

    Args:
        labels: the label of each image.
        batch_size: N.
        images_per_class: 0 shuffles all images; k draws N/k classes for a batch and k images of each, with replacement
            only where a class has fewer than k (Proxy Anchor's balanced sampling, `--IPC`).
        drop_last: leave a last, smaller batch out.
        seed: of the order.
        rank, num_ranks: yield this process's contiguous share of each batch.

    Raises:
        UserError: if the batch does not fit the data.
    """

    def __init__(self, labels: list[int], batch_size: int, images_per_class: int = 0, drop_last: bool = False,
                 seed: int = 0, rank: int = 0, num_ranks: int = 1):
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
        self.rank, self.num_ranks = rank, num_ranks

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


# ---------------------------------------------------- command line --------------------------------------------------
def get_args(argv: list[str] | None = None):
    """Parse the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument('--data_path', default='/home/data', help='folder that holds the data sets [%(default)s]')
    parser.add_argument('--data_name', nargs='+', default=[], metavar='NAME',
                        help='car, cub, sop, isc, glyph, or a folder of your own; without it, every known raw set')
    parser.add_argument('--test_ratio', type=float,
                        help='share of the classes that become test classes, for a folder of your own with one folder '
                             'per class [0.5]')
    parser.add_argument('--cache_size', type=int, help='also pack all images, their short side reduced to this many '
                        'pixels, into one file for train.py --cache_size')
    parser.add_argument('--skip_bad', action='store_true', help='leave broken and missing images out')
    parser.add_argument('--glyph_classes', type=int, help=f'characters of glyph, 2/3 train [{GLYPH_CLASSES}]')
    parser.add_argument('--glyph_images', type=int, help=f'images per character of glyph [{GLYPH_IMAGES}]')
    parser.add_argument('--seed', type=int, default=0, help='of glyph and of --test_ratio [%(default)s]')
    args = parser.parse_args(argv)
    args.data_name = [canonical_data_name(name) for name in args.data_name]
    for flag in ('glyph_classes', 'glyph_images'):
        if getattr(args, flag) is not None and 'glyph' not in args.data_name:
            raise UserError(f'--{flag} {getattr(args, flag)} has no effect without --data_name glyph; leave it out')
    if args.test_ratio is not None and all(name in RAW_SETS or name == 'glyph' for name in args.data_name):
        raise UserError(f'--test_ratio {args.test_ratio} has no effect on data sets with a split of their own; leave '
                        'it out')
    if not 0 <= args.seed < 2**63:
        raise UserError(f'--seed {args.seed} must be a number of at least 0')
    if args.cache_size is not None and not 16 <= args.cache_size <= 8192:
        raise UserError(f'--cache_size {args.cache_size} must lie between 16 and 8192')
    return args


def main() -> None:
    """Convert the data sets that the command line names, or all that are there."""
    args = get_args()
    data_path = Path(args.data_path)
    if not data_path.is_dir() and args.data_name != ['glyph']:
        what = 'is no folder' if data_path.exists() else 'does not exist'
        raise UserError(f'--data_path {data_path} {what}; name the folder that holds your data sets')
    if args.data_name:
        for data_name in args.data_name:
            process(data_path, data_name, args)
        return
    found = False
    for data_name, raw in RAW_SETS.items():
        root = find_root(data_path, data_name)
        if root and all((root / file).is_file() for file in raw.files):
            process(data_path, data_name, args)
            found = True
        else:
            folders = ', '.join(DATA_NAMES.get(data_name, (data_name,)))
            print(f'{data_name}: not found; looked in {data_path} for a folder {folders} with {", ".join(raw.files)}')
    if not found:
        raise UserError(f'--data_path {data_path} holds no known raw data set; name your own with --data_name, or make '
                        'one with --data_name glyph')


if __name__ == '__main__':
    run_script(main)
