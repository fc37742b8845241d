"""Folders of your own photographs: their classes, how the classes are split, and which files are images.

`read_folder` reads a folder to train on. `train/CLASS/*` and `test/CLASS/*` (or `query` and `gallery`) are a split
already; with one folder per class, the classes are split here. A class keeps its side for good: conversion.json
remembers it, and new classes are assigned by a hash of their name and the seed, so that the share of test classes
holds.

`scan_images` and `read_labels` read a folder to search in, where images need no class.
"""
import csv
import errno
import fnmatch
import hashlib
import io
import os
import posixpath
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from common.errors import UserError, reason_of, suggestion
from common.files import UNFIT_FOR_NAMES, compose, is_inside, read_json, readable, stamp_of
from common.images import IMAGE_SUFFIXES
from imagedata.raw_sets import SUBSETS, RawImage

SPECIAL_FILES = 'special files such as pipes, sockets and devices'
DEFAULT_RATIO = 0.5  # of the classes become test classes
MAX_NAMED = 3  # paths in a message
LONGEST_STEM = 200  # bytes; file systems allow names of 255
MANIFEST = 'conversion.json'  # where data_utils.py remembers its last conversion of a folder
MADE_BY = 'data_utils.py'  # its field `made_by`

# Folders that operating systems, NAS systems and programs fill with copies of photographs, or with deleted ones.
SYSTEM_FOLDERS = {
    'folders of thumbnails': ('@eaDir', '.@__thumb', '.thumbnails', '.thumbs', '.wd_tv', '.wdmc', '@Transcode',
                              '*.lrdata', 'appdata_*/preview', 'iPod Photo Cache', '.picasaoriginals',
                              '*.photoslibrary/resources', '*.photoslibrary/Thumbnails', '*.photoslibrary/Previews',
                              '*.photolibrary/Thumbnails', '*.photolibrary/Previews',
                              '*.aplibrary/Thumbnails', '*.aplibrary/Previews'),
    'recycle bins': ('#recycle', '@Recycle', '$RECYCLE.BIN', '.Trash', '.Trash-*', '.Trashes', '.recycle', '.recycler',
                     'files_trashbin', '#trash', '.recycle_bin', 'Network Trash Folder', '.dropbox.cache'),
    'folders of snapshots': ('#snapshot', '@Recently-Snapshot', '@GMT-*', '~snapshot', '.snapshot', '.snapshots',
                             '@snapshots', '.zfs', '@sharesnap', 'files_versions'),
    'folders of the system': ('System Volume Information', 'lost+found', 'FOUND.[0-9][0-9][0-9]', '__MACOSX',
                              '.AppleDouble', '.AppleDB',
                              '.AppleDesktop', 'Temporary Items', '.TemporaryItems', '.fseventsd',
                              '.Spotlight-V100', '.DocumentRevisions-V100', '@tmp', '#tmp', '.@upload_cache'),
}
SYSTEM_NAMES = {kind: re.compile('|'.join(map(fnmatch.translate, patterns)), re.IGNORECASE)
                for kind, patterns in SYSTEM_FOLDERS.items()}  # one expression each, since there can be many folders


# ---------------------------------------------------- files of a folder -------------------------------------------
def printable(path: str) -> str:
    """Return a path in which whatever cannot be printed is escaped."""
    return ''.join(letter if letter.isprintable() or unicodedata.category(letter) == 'Zs'
                   else letter.encode('unicode_escape').decode() for letter in path)


def kind_of_system_folder(parent: Path, name: str) -> str | None:
    """Return how a folder of a NAS or an operating system is counted, None for any other folder."""
    for kind, names in SYSTEM_NAMES.items():
        if names.match(name) or names.match(f'{parent.name}/{name}'):
            return f'{kind} ({printable(name)})'
    return None


class Skipper:
    """Decide which files and folders below a folder are not looked at, and count them.

    Hidden files and folders are skipped without a count.

    Args:
        root: the folder.
        exclude: patterns of paths below it, or of names at any depth, where * and ? are wildcards; a folder stands for
            all that is in it.

    Raises:
        UserError: if a pattern is empty.
    """

    def __init__(self, root: Path, exclude: Sequence[str] = ()):
        self.root = root
        self.exclude = {pattern: compose(pattern).removeprefix('./').rstrip('/') for pattern in exclude}
        self.left_out = Counter()
        for pattern, normalized in self.exclude.items():
            if not normalized:
                raise UserError(f'--exclude {pattern!r} is empty; name the files or folders to leave out')

    def skips(self, parent: Path, name: str, is_folder: bool) -> bool:
        """Tell whether a file or folder is skipped; counts it."""
        kind = kind_of_system_folder(parent, name) if is_folder else None
        if kind is None and name.startswith('.'):
            return True
        kind = kind or self.kind_of_excluded(parent, name)
        if kind is not None:
            self.left_out[kind] += 1
        return kind is not None

    def kind_of_excluded(self, parent: Path, name: str) -> str | None:
        """Return how a file or folder that a pattern matches is counted, None for any other."""
        if not self.exclude:
            return None
        path = parent / name
        spellings = [compose(text) for text in (name, path.relative_to(self.root).as_posix(), str(path))]
        for pattern, normalized in self.exclude.items():
            if any(fnmatch.fnmatchcase(spelling, normalized) for spelling in spellings):
                return f'excluded by {printable(pattern)}'
        return None

    def subfolders(self, folder: Path) -> list[Path]:
        """Return the folders in a folder that are not skipped."""
        return sorted(path for path in folder.iterdir() if path.is_dir() and not self.skips(folder, path.name, True))


def walk_visible(top: Path, skipper: Skipper) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Walk a folder like os.walk, in sorted order and without what a skipper skips.

    Raises:
        UserError: if a folder cannot be read, which must not be mistaken for an empty one.
    """
    def refuse(folder: str, reason: str) -> None:
        raise UserError(f'the folder {folder} cannot be read ({reason}); give yourself permission, or move it away')

    def visible(folder: Path, names: list[str], are_folders: bool) -> list[str]:
        return sorted(name for name in names if not skipper.skips(folder, name, are_folders))

    for folder, subfolders, files in os.walk(top, onerror=lambda error: refuse(error.filename, error.strerror)):
        if not os.access(folder, os.X_OK):
            refuse(folder, 'its files can be listed, but not opened')
        parent = Path(folder)
        subfolders[:] = visible(parent, subfolders, True)
        yield parent, subfolders, visible(parent, files, False)


def is_image_name(path: Path) -> bool:
    """Tell whether a file's suffix is that of an image format that can be read."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def suffix_of(path: Path) -> str:
    """Return how a file that is left out is counted: by its suffix, lower case."""
    return readable(path.suffix.lower()) or 'without ending'


def reason_to_leave_out(file: Path, path: str) -> str | None:
    """Return why a data base cannot hold an image file, whatever is in it; None if it can.

    Raises:
        UserError: if the file system does not tell.
    """
    if not is_inside(path) or UNFIT_FOR_NAMES.search(path):
        return 'names with control characters, backslashes or undecodable bytes'
    try:
        mode = os.stat(file).st_mode
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return 'links to nothing'
        raise UserError(f'the file {file} cannot be read ({error.strerror}); check the disk, or move it away') from None
    return None if stat.S_ISREG(mode) else SPECIAL_FILES


def list_folder(folder: Path, skipper: Skipper | None = None) -> tuple[list[Path], Counter]:
    """Return the images below a class folder, and how many files of which suffix are left out.

    Links to files are followed, links to folders are not.

    Args:
        folder: the class folder.
        skipper: skips more, and counts that itself; None: one for this folder, whose counts are returned too.

    Raises:
        UserError: if a folder cannot be read, or the folder's name is not UTF-8.
    """
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise UserError(f'the name of the class folder {os.fsencode(folder)!r} is not UTF-8; rename it') from None
    images, left_out = [], Counter()
    own_skipper = skipper or Skipper(folder)
    for parent, subfolders, files in walk_visible(folder, own_skipper):
        for path in (parent / name for name in (*subfolders, *files)):
            if path.is_symlink() and not path.is_file():
                left_out['links that are not followed'] += 1
            elif path.is_file() and is_image_name(path):
                images.append(path)
            elif path.is_file():
                left_out[suffix_of(path)] += 1
            elif not path.is_dir():
                left_out[SPECIAL_FILES] += 1
    return sorted(images), left_out if skipper else left_out + own_skipper.left_out


# ---------------------------------------------------- class split -------------------------------------------------
def split_classes(labels: list[str], earlier: dict[str, str], ratio: float, seed: int) -> dict[str, str]:
    """Split classes into `train` and `test`.

    Args:
        labels: all classes of the folder.
        earlier: {label: side} of an earlier split, which these classes keep, whether their folder is still there or
            not.
        ratio: share of the classes that become test classes; of two or more, at least one and not all of them.
        seed: orders the new classes.

    Returns:
        {label: side} of the earlier classes and of all labels.
    """
    new = sorted((label for label in labels if label not in earlier),
                 key=lambda label: hashlib.sha256(f'{seed} {label}'.encode()).digest())
    num_test = max(1, min(round(ratio * len(labels)), len(labels) - 1))
    num_new_test = max(0, num_test - sum(earlier.get(label) == 'test' for label in labels))
    return {**earlier, **dict.fromkeys(new[:num_new_test], 'test'), **dict.fromkeys(new[num_new_test:], 'train')}


def choose_class_split(root: Path, labels: list[str], earlier: dict, ratio: float | None, seed: int | None) -> dict:
    """Split the classes of a folder, where the sides, ratio and seed of an earlier split hold.

    Args:
        root: the folder, for the messages.
        labels: all its classes.
        earlier: what an earlier call returned, or parts of it.
        ratio, seed: as given by flags, or None.

    Returns:
        {'ratio': float, 'seed': int, 'sides': {label: 'train' or 'test'}}.

    Raises:
        UserError: if ratio or seed differs from the earlier one, or the ratio is not between 0 and 1.
    """
    def resolve(flag: str, asked, remembered, default):
        if None not in (asked, remembered) and asked != remembered:
            raise UserError(f'--{flag} {asked}: the classes of {root} were split with --{flag} {remembered}; leave '
                            'the flag out, or split them again with --resplit (models trained so far will have seen '
                            'test classes)')
        return next(value for value in (remembered, asked, default) if value is not None)

    ratio = resolve('test_ratio', ratio, earlier.get('ratio'), DEFAULT_RATIO)
    seed = resolve('seed', seed, earlier.get('seed'), 0)
    if not 0 < ratio < 1:
        raise UserError(f'--test_ratio {ratio} must lie between 0 and 1')
    return {'ratio': ratio, 'seed': seed, 'sides': split_classes(labels, earlier.get('sides', {}), ratio, seed)}


def find_renamed(images: list[RawImage], root: Path, sides: dict[str, str],
                 known: dict[tuple, str]) -> dict[str, str]:
    """Return {new label: old label} of classes that hold the photographs of a class that is gone.

    Args:
        images: all images of the folder.
        sides: {label: side} of an earlier split.
        known: {(file name, size, time): label} of the images of an earlier conversion.
    """
    labels = {image.label for image in images}
    votes = {}
    for image in images:
        if image.label in sides:
            continue
        path = root / image.source
        old_label = known.get((path.name, *(stamp_of(path) or [])))
        if old_label not in sides or old_label in labels:
            old_label = None
        votes.setdefault(image.label, Counter())[old_label] += 1
    winners = {label: counter.most_common(1)[0][0] for label, counter in votes.items()}
    return {label: old_label for label, old_label in winners.items() if old_label}


# ---------------------------------------------------- folders to train on -----------------------------------------
class OwnFolder(NamedTuple):
    """What a folder of your own photographs holds."""

    images: list[RawImage]
    class_split: dict  # of `choose_class_split`; {} if the folder has train/ and test/
    left_out: Counter  # {suffix or kind of file: number}
    empty: list[str]  # class folders without images
    renamed: dict[str, str]  # {new label: old label}

    @property
    def class_names(self) -> dict[str, str]:
        """Return {label: name}; the folder's name is both."""
        return {image.label: image.label for image in self.images}


def file_stem(path: Path) -> str:
    """Return an image's file name below uncropped/, without its suffix: its whole path as one printable word."""
    name = compose(path.with_suffix('').as_posix())
    stem = ''.join(letter if letter.isprintable() and letter not in '/\\' else '_' for letter in name)
    if len(stem.encode()) <= LONGEST_STEM:
        return stem
    start = stem.encode()[:LONGEST_STEM - 17].decode(errors='ignore')
    return f'{start}_{hashlib.sha256(stem.encode()).hexdigest()[:16]}'


def find_subset_folders(root: Path, folders: list[Path]) -> dict[str, Path]:
    """Return {subset: folder} of a folder that is split already, {} for one folder per class.

    Raises:
        UserError: if only some of the subsets are there.
    """
    by_name = {folder.name.lower(): folder for folder in folders}
    subset_folders = {subset: by_name[subset] for subset in SUBSETS if subset in by_name}
    if list(subset_folders) not in ([], ['train', 'test'], ['train', 'query', 'gallery']):
        raise UserError(f'{root} holds {" and ".join(subset_folders)}; it needs train and test, or train, query and '
                        'gallery, each with one folder per class, or just one folder per class')
    return subset_folders


def count_outside(root: Path, folders: list[Path], subset_folders: dict[str, Path], skipper: Skipper) -> Counter:
    """Count the images that lie in no class folder: beside them, or, in a folder that is split, beside the subsets."""
    left_out = Counter()
    for folder in (root, *subset_folders.values()):
        loose = sum(is_image_name(path) and path.is_file() and not skipper.skips(folder, path.name, False)
                    for path in folder.iterdir())
        left_out += Counter({'images beside the class folders': loose})
    if subset_folders:
        for folder in folders:
            if folder not in subset_folders.values() and folder.name != 'uncropped':
                left_out += Counter({f'images in {folder.name}/': len(list_folder(folder, skipper)[0])})
    return left_out


def check_real_paths(root: Path, images: list[RawImage]) -> None:
    """Raise a UserError if links lead to one photograph twice: it would count as two, perhaps in training and test."""
    folders, sources = {}, {}
    for image in images:
        path = root / image.source
        if path.parent not in folders:
            folders[path.parent] = os.path.realpath(path.parent)
        real = os.path.realpath(path) if path.is_symlink() else f'{folders[path.parent]}/{path.name}'
        earlier = sources.setdefault(real, image.source)
        if earlier != image.source:
            raise UserError(f'{root}: {printable(earlier)} and {printable(image.source)} are one file, '
                            f'{printable(real)}, reached through a link; remove the link, or leave it out with '
                            '--exclude')


def read_folder(root: Path, ratio: float | None = None, seed: int | None = None, earlier: dict | None = None,
                known: dict[tuple, str] | None = None, exclude: Sequence[str] = ()) -> OwnFolder:
    """Read a folder of your own photographs; folders whose names differ only in their Unicode form are one class.

    Args:
        ratio, seed: of the class split, for one folder per class; None: those of the earlier split, or 0.5 and 0.
        earlier: the `class_split` of an earlier call.
        known: {(file name, size, time): label} of an earlier conversion, by which a renamed class is recognised.
        exclude: patterns of files and folders to leave out, see `Skipper`.

    Raises:
        UserError: if a folder cannot be read or has no class folders, a photograph is reached twice, or a flag has no
            effect or differs from before.
    """
    skipper = Skipper(root, exclude)
    folders = skipper.subfolders(root)
    subset_folders = find_subset_folders(root, folders)
    for flag, value in (('test_ratio', ratio), ('seed', seed)):
        if subset_folders and value is not None:
            raise UserError(f'--{flag} {value} has no effect: {root} is split into {" and ".join(subset_folders)} '
                            'already; leave it out')
    if subset_folders:
        class_folders = [(folder, subset) for subset, parent in subset_folders.items()
                         for folder in skipper.subfolders(parent)]
    else:
        class_folders = [(folder, '') for folder in folders if folder.name != 'uncropped']

    images, left_out, empty = [], count_outside(root, folders, subset_folders, skipper), []
    for folder, subset in class_folders:
        paths, others = list_folder(folder, skipper)
        left_out += others
        if not paths:
            empty.append(folder.name)
        for path in (path.relative_to(root) for path in paths):
            images.append(RawImage(path.as_posix(), subset, compose(folder.name), file_stem(path)))
    check_real_paths(root, images)
    left_out += skipper.left_out
    loose = left_out['images beside the class folders']
    if loose and not images:
        raise UserError(f'{root} holds {loose} images, but no folder for each class; sort them into folders')
    if subset_folders:
        return OwnFolder(images, {}, left_out, empty, {})

    earlier = earlier or {}
    sides = earlier.get('sides', {})
    renamed = find_renamed(images, root, sides, known or {})
    sides = {**sides, **{label: sides[old_label] for label, old_label in renamed.items()}}
    labels = list(dict.fromkeys(image.label for image in images))
    class_split = choose_class_split(root, labels, {**earlier, 'sides': sides}, ratio, seed)
    images = [image._replace(subset=class_split['sides'][image.label]) for image in images]
    return OwnFolder(images, class_split, left_out, empty, renamed)


# ---------------------------------------------------- folders to search in ----------------------------------------
def is_converted(folder: Path) -> bool:
    """Tell whether data_utils.py has converted a folder."""
    return read_json(folder / MANIFEST, {'made_by': lambda value: value == MADE_BY}) is not None


def resolve_image_folder(images: Path, known: list[str]) -> tuple[str, str]:
    """Return the folder that image paths are relative to, and the path of --images below it.

    Args:
        images: what --images names.
        known: the folders of a data base.

    Returns:
        (a known folder, the path below it with `/` at its end) if --images lies below it, else (--images, '').

    Raises:
        UserError: if --images is not a folder, or holds a known folder, whose images would be added twice.
    """
    if not images.is_dir():
        raise UserError(f'--images {images} is not a folder')
    images = images.resolve()
    for folder in known:
        if images.is_relative_to(folder):
            below = images.relative_to(folder).as_posix()
            return folder, '' if below == '.' else f'{below}/'
        if Path(folder).is_relative_to(images):
            raise UserError(f'--images {images} holds {folder}, which is in the data base already; name the folders '
                            'beside it, or make a new data base of the whole')
    return str(images), ''


def scan_images(folder: Path, exclude: Sequence[str] = ()) -> tuple[dict[str, tuple[int, int]], Counter]:
    """Find the image files below a folder.

    Args:
        folder: where to look.
        exclude: patterns of files and folders to leave out, see `Skipper`.

    Returns:
        {path below the folder: (bytes, time of the last change in ns)} in the order of the paths, and a count of what
        is left out: files of other suffixes, links to folders, to nothing, and out of the folder, special files, names
        that a data base cannot hold, the copies that data_utils.py made of the images beside them, folders of systems,
        and what is excluded.

    Raises:
        UserError: if a folder, or the size of a file, cannot be read, or a pattern is empty.
    """
    images, left_out, top = {}, Counter(), folder.resolve()
    skipper, unusual = Skipper(folder, exclude), {}
    for parent, subfolders, files in walk_visible(folder, skipper):
        for name in ('uncropped', 'cropped') if is_converted(parent) else ():
            if name in subfolders:
                subfolders.remove(name)
                left_out[f'copies in {name}/'] += len(os.listdir(parent / name))
        left_out['links to folders'] += sum((parent / name).is_symlink() for name in subfolders)
        for file in (parent / name for name in files):
            path = file.relative_to(folder).as_posix()
            if not is_image_name(file):
                left_out[suffix_of(file)] += 1
            elif file.is_symlink() and not Path(os.path.realpath(file)).is_relative_to(top):
                left_out['links out of the folder'] += 1
            elif reason := reason_to_leave_out(file, path):
                unusual.setdefault(reason, []).append(path)
            else:
                images[path] = tuple(stamp_of(file) or (0, 0))  # it may vanish: reported when it is embedded
    for reason, paths in unusual.items():
        others = ', ...' if len(paths) > 1 else ''
        left_out[f'{reason} ({printable(paths[0])}{others})'] = len(paths)
    return dict(sorted(images.items())), left_out + skipper.left_out  # without zeros


class LabelLine(NamedTuple):
    """A line of a CSV file of classes."""

    number: int
    path: str  # as it is written there
    label: str


def read_label_lines(flag: str) -> list[LabelLine]:
    """Read the lines of a CSV file with the columns path,label, separated by commas, semicolons or tabs.

    Raises:
        UserError: if it cannot be read, lacks these columns, or a line has more fields than its header.
    """
    try:
        text = Path(flag).read_text(encoding='utf-8-sig')
        header_line = text.split('\n', 1)[0]
        delimiter = max(',;\t', key=header_line.count)
        reader = csv.reader(io.StringIO(text, newline=''), delimiter=delimiter, strict=True)
        rows = [(reader.line_num, row) for row in reader if any(row)]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f'--labels {flag} is neither `folder` nor a readable CSV file ({reason_of(error)})') from None
    header = [field.strip().lower() for field in rows[0][1]] if rows else []
    if len(rows) < 2 or not {'path', 'label'} <= set(header):
        raise UserError(f'--labels {flag} needs a header line with the columns path,label and one line per image')
    lines = []
    for number, row in rows[1:]:
        if any(row[len(header):]):
            raise UserError(f'--labels {flag}, line {number}: {len(row)} fields instead of {len(header)} in '
                            f'{delimiter.join(row)[:60]!r}; put a path or a class that holds a {delimiter!r} between '
                            'quotation marks')
        fields = dict(zip(header, row, strict=False))
        if 'path' not in fields:
            raise UserError(f'--labels {flag}, line {number}: {delimiter.join(row)[:60]!r} has no path')
        lines.append(LabelLine(number, fields['path'], compose(fields.get('label', '').strip())))
    return lines


class PathFinder:
    """Find the images of a folder by their paths as people write them.

    Beside the path below the folder it accepts `./` before it, backslashes, absolute paths, and the other Unicode form
    of a name.

    Args:
        paths: the images, below the folder.
        folder: the folder.
    """

    def __init__(self, paths: list[str], folder: str):
        self.paths, self.folder = set(paths), folder
        self.by_form = {}  # by the composed form, which several names may have
        for path in paths:
            self.by_form.setdefault(compose(path), []).append(path)

    def spellings(self, written: str) -> Iterator[str]:
        """Yield what a path can mean, from the letter to the spirit."""
        yield written
        slashed = written.strip().replace('\\', '/')
        yield slashed
        yield posixpath.normpath(slashed)
        if slashed.startswith('/') and '\0' not in slashed:
            yield os.path.relpath(slashed, self.folder)
            yield os.path.relpath(os.path.realpath(slashed), os.path.realpath(self.folder))

    def find(self, written: str) -> list[str]:
        """Return the images that a path names, [] if there are none."""
        for spelling in self.spellings(written):
            if spelling in self.paths:
                return [spelling]
            if compose(spelling) in self.by_form:
                return self.by_form[compose(spelling)]
        return []


def read_labels(flag: str | None, paths: list[str], folder: str) -> dict[str, str] | None:
    """Return {path: class} as --labels says, without images that have none; None without the flag.

    Prints how many lines of a CSV file name no image, or no class.

    Args:
        flag: `folder`, for the first folder of each path, or a CSV file with the columns path,label.
        paths: the images below the folder.
        folder: what the paths are relative to.

    Raises:
        UserError: if the CSV file cannot be read, gives an image two classes, or names none of the images.
    """
    if flag is None:
        return None
    if flag == 'folder':
        return {path: compose(path.split('/')[0]) for path in paths if '/' in path}
    lines, finder = read_label_lines(flag), PathFinder(paths, folder)
    chosen, unknown, unlabelled = {}, [], []
    for line in lines:
        images = finder.find(line.path)
        if not images:
            unknown.append(line.path)
        elif not line.label:
            unlabelled.append(line.path)
        for image in images if line.label else ():
            earlier = chosen.setdefault(image, line)
            if earlier.label != line.label:
                raise UserError(f'--labels {flag} gives {printable(image)} two classes: {printable(earlier.label)} in '
                                f'line {earlier.number}, {printable(line.label)} in line {line.number}; keep one of '
                                'them')
    if len(unknown) == len(lines):
        raise UserError(f'--labels {flag} names no image below {folder}; its first path is {unknown[0]!r}'
                        f'{suggestion(unknown[0], paths[:10000])}')
    for reason, written in (('name no image of the folder', unknown), ('name no class', unlabelled)):
        if written:
            names = ', '.join(map(printable, written[:MAX_NAMED])) + (', ...' if len(written) > MAX_NAMED else '')
            print(f'{len(written):,} lines of {flag} {reason}: {names}')
    return {path: chosen[path].label for path in paths if path in chosen}
