"""Draw the data set `glyph`, which needs no download: characters in the typefaces that matplotlib ships.

    python data_utils.py --data_path data --data_name glyph

A class is a character. Its images differ in typeface, size, rotation, shear, position, colours and clutter.
"""
import functools
import json
import random
import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from common.distributed import progress
from common.errors import UserError
from common.files import save_json

TYPEFACES = (  # those with many alphabets among the ones that matplotlib ships
    'DejaVuSans', 'DejaVuSans-Bold', 'DejaVuSans-Oblique', 'DejaVuSansMono', 'DejaVuSansMono-Bold',
    'DejaVuSerif', 'DejaVuSerif-Bold', 'DejaVuSerif-Italic', 'STIXGeneral', 'STIXGeneralBol', 'STIXGeneralItalic',
)
GLYPH_SIZE = 48  # px, side of an image
GLYPH_CLASSES = 300  # unless --glyph_classes says otherwise
GLYPH_IMAGES = 20  # per class, unless --glyph_images says otherwise
GLYPH_CATEGORIES = ('Lu', 'Ll', 'Lo', 'Nd', 'Sm', 'So', 'Po', 'Sc')  # Unicode's letters, digits and symbols
FEWEST_TYPEFACES = 3  # that must have a character
FONT_SIZE = 64  # px, before a character is scaled to its image
OUTLINE_SIZE = 20  # px, side of the square to which outlines are scaled to compare them
LARGEST_CORRELATION = 0.85  # of two outlines; characters that correlate more count as the same


# ---------------------------------------------------- characters --------------------------------------------------
def typeface_file(name: str) -> str:
    """Return the path of a typeface that matplotlib ships."""
    import matplotlib

    return str(Path(matplotlib.get_data_path()) / 'fonts/ttf' / f'{name}.ttf')


@functools.cache
def typeface(name: str, size: int) -> ImageFont.FreeTypeFont:
    """Load a typeface at a size in pixels."""
    return ImageFont.truetype(typeface_file(name), size)


def draw_mask(character: str, font: ImageFont.FreeTypeFont) -> Image.Image | None:
    """Draw a character white on black, cropped to its outline; None if it leaves no ink."""
    left, top, right, bottom = font.getbbox(character)
    mask = Image.new('L', (right - left + 4, bottom - top + 4))
    ImageDraw.Draw(mask).text((2 - left, 2 - top), character, fill=255, font=font)
    return mask.crop(mask.getbbox()) if mask.getbbox() else None


def normalized_outline(mask: Image.Image) -> np.ndarray:
    """Return the outline of a character, scaled to a square, as a vector of mean 0 and length 1."""
    outline = np.asarray(mask.resize((OUTLINE_SIZE, OUTLINE_SIZE), Image.Resampling.BILINEAR), np.float32).reshape(-1)
    outline -= outline.mean()
    outline /= max(float(np.linalg.norm(outline)), 1e-6)
    return outline


def find_typefaces() -> dict[str, list[str]]:
    """Return the typefaces of each character that several have, simple letters first."""
    from matplotlib.ft2font import FT2Font

    charmaps = {name: set(FT2Font(typeface_file(name)).get_charmap()) for name in TYPEFACES}
    faces = {}
    for character in map(chr, charmaps['DejaVuSans']):
        names = [name for name in TYPEFACES if ord(character) in charmaps[name]]
        if unicodedata.category(character) in GLYPH_CATEGORIES and len(names) >= FEWEST_TYPEFACES:
            faces[character] = names

    def simplicity(character: str) -> tuple:
        is_composed = bool(unicodedata.decomposition(character))
        is_letter = unicodedata.category(character)[0] == 'L'
        return is_composed, not is_letter, ord(character)

    return {character: faces[character] for character in sorted(faces, key=simplicity)}


def drawable_characters(count: int) -> list[tuple[str, list[str]]]:
    """Return `count` characters that look different, each with the typefaces that have it, simple letters first.

    Alphabets share shapes (A, Alpha and the Cyrillic A; o and O), but a class must be one shape: a character whose
    outline correlates with that of an earlier one is left out.
    """
    font = typeface('DejaVuSans', FONT_SIZE)
    outlines = np.zeros((0, OUTLINE_SIZE**2), np.float32)
    chosen = []
    for character, faces in find_typefaces().items():
        mask = draw_mask(character, font)
        if mask is None:
            continue
        outline = normalized_outline(mask)
        if len(outlines) and float((outlines @ outline).max()) > LARGEST_CORRELATION:
            continue
        outlines = np.vstack([outlines, outline])
        chosen.append((character, faces))
        if len(chosen) == count:
            return chosen
    raise UserError(f'--glyph_classes {count} is too many: the typefaces have only {len(chosen)} characters that look '
                    'different')


# ---------------------------------------------------- images ------------------------------------------------------
def draw_clutter(image: Image.Image, rng: random.Random) -> None:
    """Draw a few light strokes and blots."""
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randrange(2, 5)):
        colour = tuple(rng.randrange(80, 256) for _ in range(3))
        ends = [rng.randrange(-8, GLYPH_SIZE + 8) for _ in range(4)]
        if rng.random() < 0.5:
            draw.line(ends, fill=colour, width=rng.randrange(1, 3))
        else:
            radius = rng.randrange(2, 6)
            draw.ellipse((ends[0] - radius, ends[1] - radius, ends[0] + radius, ends[1] + radius), fill=colour)


def distort(mask: Image.Image, rng: random.Random) -> Image.Image:
    """Shear, rotate and scale a character."""
    mask = ImageOps.expand(mask, border=max(mask.size) // 2)
    shear = rng.uniform(-0.2, 0.2)
    mask = mask.transform(mask.size, Image.Transform.AFFINE, (1, shear, -shear * mask.height / 2, 0, 1, 0),
                          Image.Resampling.BILINEAR)
    mask = mask.rotate(rng.uniform(-20, 20), Image.Resampling.BILINEAR)
    mask = mask.crop(mask.getbbox())
    scale = rng.uniform(0.55, 0.9) * GLYPH_SIZE / max(mask.size)
    return mask.resize([max(2, round(side * scale)) for side in mask.size], Image.Resampling.LANCZOS)


def draw_glyph(character: str, faces: list[str], rng: random.Random) -> Image.Image:
    """Draw one image: a dark character, of random typeface, shape and position, over light clutter, with noise."""
    image = Image.new('RGB', (GLYPH_SIZE, GLYPH_SIZE), tuple(rng.randrange(150, 256) for _ in range(3)))
    draw_clutter(image, rng)
    mask = distort(draw_mask(character, typeface(rng.choice(faces), FONT_SIZE)), rng)
    corner = [rng.randint(0, GLYPH_SIZE - side) for side in mask.size]
    image.paste(Image.new('RGB', mask.size, tuple(rng.randrange(120) for _ in range(3))), corner, mask)
    noise = np.random.RandomState(rng.getrandbits(32)).randint(-12, 13, (GLYPH_SIZE, GLYPH_SIZE, 3))
    return Image.fromarray(np.clip(np.asarray(image, np.int16) + noise, 0, 255).astype(np.uint8))


def make_glyph(root: Path, num_classes: int, num_images: int, seed: int) -> None:
    """Draw the data set in the layout of your own folders; two thirds of the characters are training classes.

    The same settings give the same bytes, under the same versions of Pillow and matplotlib. A folder that was made
    with the same settings is left as it is; other images than the drawn ones are never touched.

    Raises:
        UserError: if the numbers are too small or too large, or the folder holds train/ or test/ of another origin.
    """
    if num_classes < 3 or num_images < 2:
        raise UserError(f'--glyph_classes {num_classes} and --glyph_images {num_images} must be at least 3 and 2')
    settings = {'classes': num_classes, 'images': num_images, 'seed': seed, 'size': GLYPH_SIZE, 'complete': True}
    settings_file = root / 'glyph.json'
    if settings_file.is_file() and settings_file.read_text() == json.dumps(settings):
        return
    characters = drawable_characters(num_classes)
    random.Random(seed).shuffle(characters)
    if settings_file.is_file():  # drawn by this script, but with other settings or not completely
        for image in [*root.glob('train/U+*/[0-9]*.png'), *root.glob('test/U+*/[0-9]*.png')]:
            image.unlink()
    elif any((root / folder).exists() for folder in ('train', 'test')):
        raise UserError(f'{root} holds train or test, but was not made by this script; move it away')
    save_json({**settings, 'complete': False}, settings_file)
    num_train = round(num_classes * 2 / 3)
    for number, (character, faces) in enumerate(progress(characters, desc='glyph', unit='class')):
        subset = 'train' if number < num_train else 'test'
        folder = root / subset / f'U+{ord(character):04X}'
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(num_images):
            image = draw_glyph(character, faces, random.Random(f'{seed} {ord(character)} {index}'))
            image.save(folder / f'{index:04d}.png')
    save_json(settings, settings_file)
