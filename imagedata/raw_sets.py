"""The known raw data sets: their folder names, annotation files, splits and complete counts.

To add one, write a `read_*` function that returns a list of RawImage and the names of the classes, and add an entry to
RAW_SETS. Nothing here reads pixels, so that importing the names of the data sets is instant.
"""
import contextlib
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from common.errors import UserError, reason_of
from common.files import is_folder_name, is_inside

SUBSETS = ('train', 'test', 'query', 'gallery')
READER_MEMORY = 4 * 2**30  # bytes; the annotations of CARS196 need 200 MB, most of it for importing SciPy


class RawImage(NamedTuple):
    """One image of a raw data set."""

    source: str  # path below the data set's folder
    subset: str  # train, test, query or gallery
    label: str
    stem: str  # file name below uncropped/, without its suffix
    box: tuple[int, int, int, int] | None = None  # left, top, right, bottom in stored pixels: before EXIF turns them


# ---------------------------------------------------- annotation files ---------------------------------------------
def read_table(path: Path, columns: int, header_lines: int = 0, last_is_path: bool = False) -> Iterator[list[str]]:
    """Yield `file:line` followed by the fields of each line of a text table.

    Args:
        columns: number of fields in a line.
        header_lines: lines to skip.
        last_is_path: the last field may hold spaces.

    Raises:
        UserError: naming file and line where a line has another number of fields.
    """
    try:
        lines = path.read_text(encoding='utf-8').split('\n')
    except UnicodeDecodeError:
        raise UserError(f'{path} is not a UTF-8 text file; unpack the archive again') from None
    for number, line in enumerate(lines[header_lines:], start=header_lines + 1):
        if not line.strip():
            continue
        fields = line.split(maxsplit=columns - 1 if last_is_path else -1)
        if len(fields) != columns:
            raise UserError(f'{path}:{number}: expected {columns} fields, got {len(fields)} in {line[:60]!r}; unpack '
                            'the archive again')
        yield [f'{path}:{number}', *fields]


def parse_class(text: str, line: str) -> int:
    """Parse a class number found at `file:line` of an annotation file."""
    try:
        return int(text)
    except ValueError:
        raise UserError(f'{line}: the class {text[:40]!r} is not an integer; unpack the archive again') from None


def check_path(path: str, line: str) -> str:
    """Return an image path found at `file:line`; raise a UserError if it leaves the data set's folder."""
    if not is_inside(path) or path.split('/')[-1] in ('', '.'):
        raise UserError(f'{line}: {path[:60]!r} is not the path of an image below the data set; unpack the archive '
                        'again')
    return path


def limit_memory(num_bytes: int) -> None:
    """Limit the memory of this process; Windows has no such limits, and macOS refuses this one."""
    with contextlib.suppress(ImportError, AttributeError, ValueError, OSError):
        import resource

        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = num_bytes if hard == resource.RLIM_INFINITY else min(num_bytes, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def read_annotations(file: str) -> tuple[list, list[str]]:
    """Return [[path, class, x1, y1, x2, y2], ...] and the class names, from class 1 on, of cars_annos.mat."""
    import numpy as np
    from scipy.io import loadmat

    limit_memory(READER_MEMORY)
    contents = loadmat(file)
    rows = [[str(row['relative_im_path'].item()), int(row['class'].item()),
             *(int(row[f'bbox_{edge}'].item()) for edge in ('x1', 'y1', 'x2', 'y2'))]
            for row in contents['annotations'].reshape(-1)]
    return rows, [str(name.item()) for name in contents.get('class_names', np.empty(0)).reshape(-1)]


def read_car(root: Path) -> tuple[list[RawImage], dict[str, str]]:
    """Read CARS196 (Krause et al., 2013): classes 1-98 train, 99-196 test, whatever its own `test` field says.

    A separate process reads the annotations: on a damaged file, SciPy's reader may crash or allocate any amount of
    memory.
    """
    file = root / 'cars_annos.mat'
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
        pool.submit(os.getpid).result()  # a process that cannot start says nothing about the file
        try:
            rows, names = pool.submit(read_annotations, str(file)).result()
        except Exception as error:  # BrokenProcessPool if it crashed, else whatever SciPy raised
            raise UserError(f'{file} is not the annotation file of CARS196 ({reason_of(error)}); download it again') \
                from None
    images = []
    for path, label, x1, y1, x2, y2 in rows:
        subset = 'train' if label <= 98 else 'test'
        box = (x1 - 1, y1 - 1, x2, y2)  # MATLAB counts pixels from 1, both ends included
        images.append(RawImage(check_path(path, str(file)), subset, str(label), Path(path).stem, box))
    return images, {str(number): name for number, name in enumerate(names, start=1)}


def read_cub(root: Path) -> tuple[list[RawImage], dict[str, str]]:
    """Read CUB-200-2011 (Wah et al., 2011): classes 1-100 train, 101-200 test."""
    labels = {}
    for line, image_id, label in read_table(root / 'image_class_labels.txt', 2):
        labels[image_id] = parse_class(label, line)
    boxes = {}
    for line, image_id, *numbers in read_table(root / 'bounding_boxes.txt', 5):
        try:
            x, y, width, height = (float(number) for number in numbers)
            boxes[image_id] = (math.floor(x), math.floor(y), math.ceil(x + width), math.ceil(y + height))
        except (ValueError, OverflowError):
            raise UserError(f'{line}: the box {" ".join(numbers)[:60]!r} is not four finite numbers; unpack the '
                            'archive again') from None
    images = []
    for line, image_id, path in read_table(root / 'images.txt', 2, last_is_path=True):
        if image_id not in labels or image_id not in boxes:
            raise UserError(f'{line}: image {image_id[:40]} has no label or no box in the other files; unpack the '
                            'archive again')
        label = labels[image_id]
        subset = 'train' if label <= 100 else 'test'
        source = f'images/{check_path(path, line)}'
        images.append(RawImage(source, subset, str(label), Path(path).stem, boxes[image_id]))
    return images, {image.label: Path(image.source).parent.name for image in images}


def read_sop(root: Path) -> tuple[list[RawImage], dict[str, str]]:
    """Read Stanford Online Products (Oh Song et al., CVPR 2016): its two lists are the split."""
    images = []
    for subset in ('train', 'test'):
        table = read_table(root / f'Ebay_{subset}.txt', 4, header_lines=1, last_is_path=True)
        for line, _, label, _, path in table:
            label = str(parse_class(label, line))
            stem = os.path.splitext(check_path(path, line))[0].replace('/', '_')
            images.append(RawImage(path, subset, label, stem))
    return images, {image.label: f'{image.source.split("_final")[0]} {image.label}' for image in images}


def read_isc(root: Path) -> tuple[list[RawImage], dict[str, str]]:
    """Read In-shop Clothes Retrieval (Liu et al., CVPR 2016): its list names train, query and gallery."""
    images = []
    for line, path, label, subset in read_table(root / 'Eval/list_eval_partition.txt', 3, header_lines=2):
        if subset not in ('train', 'query', 'gallery'):
            raise UserError(f'{line}: evaluation status {subset[:40]!r} is not train, query or gallery; unpack the '
                            'archive again')
        check_path(path, line)
        stem = os.path.splitext(path)[0].removeprefix('img/').replace('/', '_')
        images.append(RawImage(f'Img/{path}', subset, label, stem))
    return images, {image.label: image.label for image in images}


# ---------------------------------------------------- registry -----------------------------------------------------
class RawSet(NamedTuple):
    """A known raw data set."""

    names: tuple[str, ...]  # accepted folder names, lower case: ours, Proxy Anchor's --dataset, the archive's own
    files: tuple[str, ...]  # annotation files, which identify the data set
    read: Callable[[Path], tuple[list[RawImage], dict[str, str]]]  # returns the images and {label: class name}
    counts: dict[str, tuple[int, int]]  # {subset: (classes, images)} of the complete set, from its paper


RAW_SETS = {
    'car': RawSet(('car', 'cars', 'cars196'), ('cars_annos.mat',), read_car,
                  {'train': (98, 8054), 'test': (98, 8131)}),
    'cub': RawSet(('cub', 'cub_200_2011', 'cub200', 'cub-200-2011'),
                  ('images.txt', 'image_class_labels.txt', 'bounding_boxes.txt'), read_cub,
                  {'train': (100, 5864), 'test': (100, 5924)}),
    'sop': RawSet(('sop', 'stanford_online_products'), ('Ebay_train.txt', 'Ebay_test.txt'), read_sop,
                  {'train': (11318, 59551), 'test': (11316, 60502)}),
    'isc': RawSet(('isc', 'inshop', 'inshop_clothes', 'in-shop', 'in-shop clothes retrieval benchmark'),
                  ('Eval/list_eval_partition.txt',), read_isc,
                  {'train': (3997, 25882), 'query': (3985, 14218), 'gallery': (3985, 12612)}),
}


def canonical_data_name(name: str) -> str:
    """Return the short name of a data set (`CUB_200_2011`, `Inshop`, `cars` -> `cub`, `isc`, `car`).

    Other folder names are returned unchanged.
    """
    for short_name, raw_set in RAW_SETS.items():
        if name.lower() in raw_set.names:
            return short_name
    if not is_folder_name(name):
        raise UserError(f'--data_name {name!r} is not a plain folder name; name a folder in --data_path')
    return name


def find_root(data_path: str | Path, data_name: str) -> Path | None:
    """Return the folder of a data set below `data_path`, or None.

    It may have any of the names of a known data set, in upper or lower case. Of several folders, one that holds the
    data set comes first, then the one whose name is exactly `data_name`.
    """
    data_path = Path(data_path)
    raw_set = RAW_SETS.get(data_name)
    names = raw_set.names if raw_set else (data_name.lower(),)
    folders = [path for path in data_path.iterdir() if path.is_dir()] if data_path.is_dir() else []

    def preference(folder: Path) -> tuple:
        holds_data = raw_set is None or any(
            (folder / name).exists() for name in (raw_set.files[0], 'uncropped_data_dicts.pth'))
        return not holds_data, folder.name != data_name, folder.name

    candidates = [path for path in folders if path.name == data_name or path.name.lower() in names]
    return min(candidates, key=preference, default=None)


def check_data_path(data_path: Path, flag: str = '--data_path') -> None:
    """Raise a UserError if the folder of data sets is none."""
    if not data_path.is_dir():
        problem = 'is not a folder' if data_path.exists() else 'does not exist'
        raise UserError(f'{flag} {data_path} {problem}; name the folder that holds your data sets, or '
                        'make a small one: python data_utils.py --data_path data --data_name glyph')


# ---------------------------------------------------- splits -------------------------------------------------------
def count_images(classes: dict[str, list[str]]) -> int:
    """Return the number of images of a subset {label: [path, ...]}."""
    return sum(len(paths) for paths in classes.values())


def images_of(split: dict) -> list[str]:
    """Return the paths of all images of a split, each once."""
    return list(dict.fromkeys(path for subset in SUBSETS if subset in split
                              for paths in split[subset].values() for path in paths))
