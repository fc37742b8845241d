"""What --images, --labels and patterns of embed.py name: image files below a folder, their classes, some of them."""
import csv
import fnmatch
import io
import os
import unicodedata
from collections import Counter
from pathlib import Path

from collection import Item
from engine.errors import UserError, nearest
from engine.files import is_inside, read_json, readable
from engine.images import IMAGE_SUFFIXES


def find_images(folder: Path) -> tuple[dict[str, tuple[int, int]], Counter]:
    """Find the image files below a folder.

    Returns:
        {path below it: (bytes, time of the last change in ns)} in the order of the paths, and what is left out: the
        endings of other files, links to folders, links that lead out of the folder, names that no data base can hold,
        and the copies that data_utils.py made of the images beside them.

    Raises:
        UserError: if a folder cannot be read, which is not to be taken for an empty one.
    """
    def unreadable(error: OSError) -> None:
        raise UserError(f'--images: the folder {error.filename} cannot be read ({error.strerror}); give yourself '
                        'permission, or name another')

    found, left_out, top = {}, Counter(), folder.resolve()
    for here, folders, files in os.walk(folder, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        for name in ('uncropped', 'cropped') if is_converted(Path(here)) else ():
            if name in folders:
                folders.remove(name)
                left_out[f'copies in {name}/'] += len(os.listdir(Path(here, name)))
        left_out.update('links to folders' for name in folders if os.path.islink(os.path.join(here, name)))
        for name in sorted(files):
            file = Path(here, name)
            path, suffix = file.relative_to(folder).as_posix(), file.suffix.lower()
            if name.startswith('.'):
                continue
            if suffix not in IMAGE_SUFFIXES:
                left_out[readable(suffix) or 'without ending'] += 1
            elif not is_inside(path) or not path.isprintable():
                left_out['names with strange letters'] += 1
            elif file.is_symlink() and not file.resolve().is_relative_to(top):
                left_out['links out of the folder'] += 1
            else:
                stamp = file.stat() if file.exists() else None
                found[path] = (stamp.st_size, stamp.st_mtime_ns) if stamp else (0, 0)
    return dict(sorted(found.items())), left_out


def is_converted(folder: Path) -> bool:
    """Tell whether data_utils.py has converted a folder."""
    return read_json(folder / 'conversion.json', {'made_by': lambda value: value == 'data_utils.py'}) is not None


def place_of(images: Path, known: list[str]) -> tuple[str, str]:
    """Return the folder that paths are relative to, and the path of --images below it: one that is known, or itself.

    Raises:
        UserError: if a known folder lies below it, whose images would be in the data base twice.
    """
    if not images.is_dir():
        raise UserError(f'--images {images} is no folder')
    images = images.resolve()
    for folder in known:
        if images.is_relative_to(folder):
            below = images.relative_to(folder).as_posix()
            return folder, '' if below == '.' else f'{below}/'
        if Path(folder).is_relative_to(images):
            raise UserError(f'--images {images} holds {folder}, which is in the data base already; name the folders '
                            'beside it, or make a new data base of the whole')
    return str(images), ''


def normal(label: str) -> str:
    """Return the name of a class in the form of Unicode in which data_utils.py writes it (NFC)."""
    return unicodedata.normalize('NFC', label)


def read_labels(flag: str | None, paths: list[str], folder: str) -> dict[str, str] | None:
    """Return {path: class} for the paths of images below a folder, without those that have none; None: not asked for.

    Raises:
        UserError: if the CSV is none, or names no image that is there.
    """
    if flag is None:
        return None
    if flag == 'folder':
        return {path: normal(path.split('/')[0]) for path in paths if '/' in path}
    try:
        rows = list(csv.DictReader(io.StringIO(Path(flag).read_text(encoding='utf-8-sig'))))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f'--labels {flag} is neither `folder` nor a CSV file that can be read ({error})') from None
    if not rows or not {'path', 'label'} <= rows[0].keys():
        raise UserError(f'--labels {flag} needs a first line with the columns path,label, and a line an image')
    given = {row['path'] or '': normal((row['label'] or '').strip()) for row in rows}
    labels = {path: given[path] for path in paths if given.get(path)}
    if not labels:
        raise UserError(f'--labels {flag} names no image below {folder}; its first path is {rows[0]["path"]!r}'
                        f'{nearest(rows[0]["path"] or "", paths[:10000])}')
    if len(given) > len(labels):
        missing = next(path for path in given if path not in labels)
        print(f'{len(given) - len(labels):,} lines of {flag} name no image of the folder, or no class, the first: '
              f'{missing}')
    return labels


def matching(items: list[Item], patterns: list[str]) -> list[Item]:
    """Return the images whose path, or whole path, is a pattern, matches it, or lies below a folder that does."""
    def fits(path: str, pattern: str) -> bool:
        return path == pattern or fnmatch.fnmatchcase(path, pattern) or path.startswith(f'{pattern.rstrip("/")}/')

    return [item for item in items if any(fits(item.path, pattern) or fits(f'{item.folder}/{item.path}', pattern)
                                          for pattern in patterns)]
