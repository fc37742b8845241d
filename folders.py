"""A folder of one's own photographs: its classes, which side each is on, and what of it is no image.

`train/CLASS/*` and `test/CLASS/*` (or `query`, `gallery`) are a split already; one folder a class is dealt into
training and test classes. A class keeps its side for good: which one it was dealt is remembered in conversion.json,
and new classes are dealt, by a hash of their name and the seed, so that the share of test classes holds.
"""
import hashlib
import unicodedata
from collections import Counter
from pathlib import Path

from engine.errors import UserError
from raw_sets import SUBSETS, Item

DEFAULT_RATIO = 0.5  # of the classes, that become test classes


def deal(labels: list[str], earlier: dict[str, str], ratio: float, seed: int) -> dict[str, str]:
    """Deal classes into `train` and `test`.

    Args:
        labels: of all classes that are there.
        earlier: {label: side} of an earlier deal, also of classes that are gone; they keep it.
        ratio: share of the classes that become test classes, at least one.
        seed: of the deal of new classes.

    Returns:
        {label: side}, the earlier ones and those of the labels.
    """
    new = sorted((label for label in labels if label not in earlier),
                 key=lambda label: hashlib.sha256(f'{seed} {label}'.encode()).digest())
    num_test = max(1, round(ratio * len(labels))) - sum(earlier.get(label) == 'test' for label in labels)
    return {**earlier, **{label: 'test' if number < num_test else 'train' for number, label in enumerate(new)}}


def settle_deal(root: Path, labels: list[str], earlier: dict, ratio: float | None, seed: int | None) -> dict:
    """Return {'ratio', 'seed', 'sides': {label: side}} for the classes of a folder, from those of an earlier one.

    Raises:
        UserError: if ratio or seed is given and was another one.
    """
    for flag, given, known in (('test_ratio', ratio, earlier.get('ratio')), ('seed', seed, earlier.get('seed'))):
        if None not in (given, known) and given != known:
            raise UserError(f'--{flag} {given}: the classes of {root} were dealt with --{flag} {known}; leave it out, '
                            'or deal anew with --resplit (models trained so far then have seen test classes)')
    sides = earlier.get('sides', {})
    share = sum(side == 'test' for side in sides.values()) / len(sides) if sides else DEFAULT_RATIO
    ratio = next(value for value in (earlier.get('ratio'), ratio, share) if value is not None)
    if not 0 < ratio < 1:
        raise UserError(f'--test_ratio {ratio} must lie between 0 and 1')
    seed = earlier.get('seed') or seed or 0
    return {'ratio': ratio, 'seed': seed, 'sides': deal(labels, sides, ratio, seed)}


def file_stem(path: Path) -> str:
    """Return the name that an image gets below uncropped/, without its ending: its path, in one word."""
    name = unicodedata.normalize('NFC', path.with_suffix('').as_posix())
    return ''.join(letter if letter.isprintable() and letter not in '/\\' else '_' for letter in name)


def list_folder(folder: Path, suffixes: set[str]) -> tuple[list[Path], Counter]:
    """Return the images below a class folder, and the endings of all other files that are not hidden, counted."""
    files = [path for path in sorted(folder.rglob('*')) if path.is_file()
             and not any(part.startswith('.') for part in path.relative_to(folder).parts)]
    images = [path for path in files if path.suffix.lower() in suffixes]
    return images, Counter(path.suffix.lower() or 'without ending' for path in files
                           if path.suffix.lower() not in suffixes)


def read_folder(root: Path, ratio: float | None = None, seed: int | None = None, earlier: dict | None = None
                ) -> tuple[list[Item], dict[str, str], dict]:
    """Read a folder of one's own.

    Folders whose names differ in their Unicode form alone are one class.

    Args:
        ratio, seed: of the deal, where there is one folder a class; None: those of the earlier one, 0.5 and 0.
        earlier: what an earlier call returned as `deal`.

    Returns:
        images, {label: name}, and {'deal': see `settle_deal`, or {} where the folder is split already,
        'left_out': {ending: number}, 'empty': [class folder without images, ...]}.
    """
    from engine.images import IMAGE_SUFFIXES

    def classes(folder: Path) -> list[Path]:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith('.')
                      and path.name not in ('uncropped', 'cropped'))

    def label_of(folder: Path) -> str:
        return unicodedata.normalize('NFC', folder.name)

    named = {path.name.lower(): path for path in classes(root)}
    subsets, dealt = [subset for subset in SUBSETS if subset in named], {}
    if subsets in (['train', 'test'], ['train', 'query', 'gallery']):
        if ratio is not None:
            raise UserError(f'--test_ratio {ratio} has no effect: {root} is split into {" and ".join(subsets)} '
                            'already; leave it out')
        folders = [(folder, subset) for subset in subsets for folder in classes(named[subset])]
    elif subsets:
        raise UserError(f'{root} holds {" and ".join(subsets)}; it needs train and test, or train, query and gallery, '
                        'each with one folder per class, or just one folder per class')
    else:
        folders = [(folder, '') for folder in classes(root)]
    left_out, empty, found = Counter(), [], []
    for folder, subset in folders:
        images, others = list_folder(folder, IMAGE_SUFFIXES)
        left_out += others
        empty += [] if images else [folder.name]
        found += [(path.relative_to(root), subset, label_of(folder)) for path in images]
    if not subsets:
        dealt = settle_deal(root, list(dict.fromkeys(label for _, _, label in found)), earlier or {}, ratio, seed)
    items = [Item(path.as_posix(), subset or dealt['sides'][label], label, file_stem(path))
             for path, subset, label in found]
    return items, {item.label: item.label for item in items}, {
        'deal': dealt, 'left_out': dict(left_out), 'empty': empty}
