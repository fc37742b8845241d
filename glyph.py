"""Draw the data set that needs no download: characters in the typefaces that matplotlib ships.

    python data_utils.py --data_path data --data_name glyph

A class is a character; its images differ in typeface, size, rotation, shear, place, colours and clutter.
"""
import functools
import json
import random
import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from engine.errors import UserError
from engine.files import save_json
from engine.processes import progress

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
    letters = [chr(code) for code in charmaps['DejaVuSans'] if unicodedata.category(chr(code)) in GLYPH_CATEGORIES]
    faces = {letter: [name for name in TYPEFACES if ord(letter) in charmaps[name]] for letter in letters}
    letters = sorted((letter for letter in letters if len(faces[letter]) >= 3), key=lambda letter: (
        bool(unicodedata.decomposition(letter)), unicodedata.category(letter)[0] != 'L', ord(letter)))
    font, outlines, chosen = typeface('DejaVuSans', 64), np.zeros((0, 400), np.float32), []
    for letter in letters:
        if not (mask := mask_of(letter, font)):
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
    corner = [rng.randint(0, size - side) for side in mask.size]
    image.paste(Image.new('RGB', mask.size, tuple(rng.randrange(120) for _ in range(3))), corner, mask)
    noise = np.random.RandomState(rng.getrandbits(32)).randint(-12, 13, (size, size, 3))
    return Image.fromarray(np.clip(np.asarray(image, np.int16) + noise, 0, 255).astype(np.uint8))


def make_glyph(root: Path, num_classes: int, num_images: int, seed: int) -> None:
    """Draw the data set `glyph` in the layout of a folder of one's own: two thirds of the characters train.

    The same settings give the same bytes (under the same versions of Pillow and matplotlib); a folder made with them
    already is left as it is.
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
    for number, (character, faces) in enumerate(progress(characters, desc='glyph', unit='class')):
        folder = root / ('train' if number < round(num_classes * 2 / 3) else 'test') / f'U+{ord(character):04X}'
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(num_images):
            image = draw_glyph(character, faces, random.Random(f'{seed} {ord(character)} {index}'))
            image.save(folder / f'{index:04d}.png')
    save_json(settings, stamp)
