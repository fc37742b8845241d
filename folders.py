"""A folder of one's own photographs: its classes, which side each is on, and what of it is no image.

`train/CLASS/*` and `test/CLASS/*` (or `query`, `gallery`) are a split already; one folder a class is dealt into
training and test classes. A class keeps its side for good: which one it was dealt is remembered in conversion.json,
and new classes are dealt, by a hash of their name and the seed, so that the share of test classes holds.
"""
import hashlib
import os
import unicodedata
from collections import Counter
from pathlib import Path

from engine.errors import UserError
from engine.files import readable, stamp_of
from raw_sets import SUBSETS, Item

DEFAULT_RATIO = 0.5  # of the classes, that become test classes
LONGEST_STEM = 200  # bytes; file systems take names of 255


def deal(labels: list[str], earlier: dict[str, str], ratio: float, seed: int) -> dict[str, str]:
    """Deal classes into `train` and `test`.

    Args:
        labels: of all classes that are there.
        earlier: {label: side} of an earlier deal, also of classes that are gone; they keep it.
        ratio: share of the classes that become test classes; of two classes or more at least one, and not all.
        seed: of the deal of new classes.

    Returns:
        {label: side}, the earlier ones and those of the labels.
    """
    new = sorted((label for label in labels if label not in earlier),
                 key=lambda label: hashlib.sha256(f'{seed} {label}'.encode()).digest())
    num_test = max(1, min(round(ratio * len(labels)), len(labels) - 1))
    num_new = num_test - sum(earlier.get(label) == 'test' for label in labels)
    return {**earlier, **{label: 'test' if number < num_new else 'train' for number, label in enumerate(new)}}


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
    stem = ''.join(letter if letter.isprintable() and letter not in '/\\' else '_' for letter in name)
    if len(stem.encode()) <= LONGEST_STEM:
        return stem
    start, whole = stem.encode()[:LONGEST_STEM - 17].decode(errors='ignore'), hashlib.sha256(stem.encode()).hexdigest()
    return f'{start}_{whole[:16]}'


def list_folder(folder: Path, suffixes: set[str]) -> tuple[list[Path], Counter]:
    """Return the images below a class folder, and the endings of all other files that are not hidden, counted.

    Raises:
        UserError: if the folder cannot be read, which is not to be taken for an empty one, or has no name in UTF-8.
    """
    def unreadable(here: str) -> None:
        raise UserError(f'the folder {here} of a class cannot be read; give yourself permission, or move it away')

    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise UserError(f'the name of the class folder {os.fsencode(folder)!r} is not in UTF-8; rename it') from None
    images, others = [], Counter()
    for here, folders, files in os.walk(folder, onerror=lambda error: unreadable(error.filename)):
        if not os.access(here, os.X_OK):  # its names are known, but not its files
            unreadable(here)
        folders[:] = [name for name in folders if not name.startswith('.')]
        for path in (Path(here, name) for name in [*folders, *files] if not name.startswith('.')):
            if path.is_symlink() and not path.is_file():
                others['links that are not followed'] += 1
            elif path.is_file() and path.suffix.lower() in suffixes:
                images.append(path)
            elif path.is_file():
                others[readable(path.suffix.lower()) or 'without ending'] += 1
    return sorted(images), others


def find_renamed(found: list[tuple[Path, str, str]], root: Path, sides: dict[str, str], known: dict) -> dict[str, str]:
    """Return {new label: old label} of classes that hold the photographs of one that is gone.

    Args:
        found: path below root, subset and label of each image.
        sides: {label: side} of an earlier deal.
        known: {(file name, size, time): label} of an earlier conversion.
    """
    present, votes = {label for _, _, label in found}, {}
    for path, _, label in found:
        if label not in sides:
            old = known.get((path.name, *(stamp_of(root / path) or [])))
            votes.setdefault(label, Counter())[old if old in sides and old not in present else None] += 1
    return {label: old for label, counter in votes.items() for old in [counter.most_common(1)[0][0]] if old}


def read_folder(root: Path, ratio: float | None = None, seed: int | None = None, earlier: dict | None = None,
                known: dict | None = None) -> tuple[list[Item], dict[str, str], dict]:
    """Read a folder of one's own.

    Folders whose names differ in their Unicode form alone are one class.

    Args:
        ratio, seed: of the deal, where there is one folder a class; None: those of the earlier one, 0.5 and 0.
        earlier: what an earlier call returned as `deal`.
        known: {(file name, size, time): label} of an earlier conversion, by which a renamed class is known.

    Returns:
        images, {label: name}, and {'deal': see `settle_deal`, or {} where the folder is split already,
        'left_out': {ending: number}, 'empty': [class folder without images, ...], 'renamed': {new label: old one}}.
    """
    from engine.images import IMAGE_SUFFIXES

    def classes(folder: Path) -> list[Path]:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith('.')
                      and not (folder == root and path.name == 'uncropped'))

    def label_of(folder: Path) -> str:
        return unicodedata.normalize('NFC', folder.name)

    named = {path.name.lower(): path for path in classes(root)}
    subsets, dealt = [subset for subset in SUBSETS if subset in named], {}
    if subsets in (['train', 'test'], ['train', 'query', 'gallery']):
        for flag, value in (('test_ratio', ratio), ('seed', seed)):
            if value is not None:
                raise UserError(f'--{flag} {value} has no effect: {root} is split into {" and ".join(subsets)} '
                                'already; leave it out')
        folders = [(folder, subset) for subset in subsets for folder in classes(named[subset])]
        beside = [path for path in classes(root) if path.name.lower() not in subsets]
    elif subsets:
        raise UserError(f'{root} holds {" and ".join(subsets)}; it needs train and test, or train, query and gallery, '
                        'each with one folder per class, or just one folder per class')
    else:
        folders, beside = [(folder, '') for folder in classes(root)], []
    left_out, empty, found = Counter(), [], []
    for folder, subset in folders:
        images, others = list_folder(folder, IMAGE_SUFFIXES)
        left_out += others
        empty += [] if images else [folder.name]
        found += [(path.relative_to(root), subset, label_of(folder)) for path in images]
    left_out += Counter({f'images in {folder.name}/': len(list_folder(folder, IMAGE_SUFFIXES)[0]) for folder in beside})
    loose = [path.name for place in (root, *map(named.get, subsets)) for path in place.iterdir()
             if path.suffix.lower() in IMAGE_SUFFIXES]
    if loose and not found:
        raise UserError(f'{root} holds {len(loose)} images, but no folder for each class; sort them into folders')
    left_out += Counter({'images beside the class folders': len(loose)} if loose else {})
    earlier, renamed = earlier or {}, {}
    if not subsets:
        sides = earlier.get('sides', {})
        renamed = find_renamed(found, root, sides, known or {})
        earlier = {**earlier, 'sides': {**sides, **{new: sides[old] for new, old in renamed.items()}}}
        dealt = settle_deal(root, list(dict.fromkeys(label for _, _, label in found)), earlier, ratio, seed)
    items = [Item(path.as_posix(), subset or dealt['sides'][label], label, file_stem(path))
             for path, subset, label in found]
    return items, {item.label: item.label for item in items}, {
        'deal': dealt, 'left_out': dict(left_out), 'empty': empty, 'renamed': renamed}
