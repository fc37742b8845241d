"""Convert raw data sets, or folders of your own photographs, to split files.

    python data_utils.py --data_path /home/data                     # every known raw data set in it
    python data_utils.py --data_path /home/data --data_name cub car
    python data_utils.py --data_path data --data_name glyph         # drawn here, no download
    python data_utils.py --data_path /home/me --data_name flowers   # flowers/train/CLASS/*.jpg, flowers/test/CLASS/...
    python data_utils.py --data_path /home/me --data_name flowers --test_ratio 0.3         # flowers/CLASS/*.jpg
    python data_utils.py --raw_path /mnt/sets --data_path /home/me --data_name cub         # /mnt/sets is only read

Writes to {data_path}/{data_name}:

    uncropped/                  all images as RGB; hard links to the originals where possible
    cropped/                    the images cropped to their bounding boxes, if the data set has them
    uncropped_data_dicts.pth    the split file of uncropped/
    cropped_data_dicts.pth      the split file of cropped/
    conversion.json             what was converted, so that a second run decodes only new and changed images; and which
                                classes of your own folder are test classes

A split file holds {'train': {label: [path, ...]}, 'test': {...}, 'class_names': {label: name}}, for In-shop `train`,
`query` and `gallery`; paths are relative to {data_path}/{data_name}. What belongs to an image that is gone is removed.
"""
import contextlib
import hashlib
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from common.distributed import progress
from common.errors import UserError, reason_of, suggestion
from common.files import check_paths, lock, make_folder, read_json, save, save_json, stamp_of
from common.images import BrokenImage, open_stored
from imagedata.folders import DEFAULT_RATIO, MADE_BY, MANIFEST, OwnFolder, printable, read_folder
from imagedata.glyph import GLYPH_CLASSES, GLYPH_IMAGES, make_glyph
from imagedata.raw_sets import (
    RAW_SETS,
    SUBSETS,
    RawImage,
    canonical_data_name,
    check_data_path,
    count_images,
    find_root,
    images_of,
)
from utils import Parser, check_between, refuse_without_effect, run_script, user_path

FAILURES_SHOWN = 20
TAIL_BYTES = 4096  # by which photographs of equal size are told apart
JPEG = {'quality': 95, 'subsampling': 0}  # 4:4:4, no chroma subsampling
LONGEST_JPEG = 65500  # pixels, of the longer side; libjpeg's limit
SUFFIX_HINTS = {'.heic': ' (pip install pillow-heif)', '.heif': ' (pip install pillow-heif)',
                '.avif': ' (needs Pillow 11.3)'}


# ---------------------------------------------------- what it writes ------------------------------------------------
class Entry(NamedTuple):
    """What conversion.json remembers of a converted image."""

    file_name: str  # in uncropped/
    file_size: int  # bytes, in uncropped/
    stem: str  # in cropped/ the file is {stem}.jpg
    box: list[int] | None
    subset: str
    label: str
    class_name: str | None
    source_size: int  # bytes
    source_time: int  # ns, of the last change

    def path(self, folder: str) -> str:
        """Return the image's path in the split file of `uncropped` or `cropped`."""
        return f'{folder}/{self.stem}.jpg' if folder == 'cropped' else f'{folder}/{self.file_name}'


@dataclass
class Manifest:
    """The contents of conversion.json."""

    made_by: str = MADE_BY
    files: dict[str, Entry] = field(default_factory=dict)  # by the path of the source
    splits: dict[str, list[int]] = field(default_factory=dict)  # {split file: [size, time]}
    class_split: dict = field(default_factory=dict)  # of `choose_class_split`

    def save(self, root: Path) -> None:
        """Write conversion.json."""
        save_json(vars(self), root / MANIFEST)


def photographs(manifest: Manifest) -> set[tuple]:
    """Return what tells converted photographs, and versions of one, apart."""
    return {(entry.file_name, entry.source_size, entry.source_time) for entry in manifest.files.values()}


def split_file(root: Path, folder: str) -> Path:
    """Return the split file of `uncropped` or `cropped`."""
    return root / f'{folder}_data_dicts.pth'


def open_manifest(root: Path, folders: list[str]) -> Manifest:
    """Return what the last conversion remembered, or an empty manifest.

    Raises:
        UserError: if files or folders of these names exist, but not from an earlier conversion.
    """
    def are_entries(files) -> bool:
        return all(len(entry) == len(Entry._fields) for entry in files.values())

    contents = read_json(root / MANIFEST, {'made_by': lambda value: value == MADE_BY, 'files': are_entries,
                                           'splits': dict})
    if contents is not None:
        files = {source: Entry(*entry) for source, entry in contents['files'].items()}
        return Manifest(files=files, splits=contents['splits'], class_split=contents.get('class_split', {}))
    paths = [root / MANIFEST, *(root / folder for folder in folders), *(split_file(root, folder) for folder in folders)]
    foreign = [path.name for path in paths if path.exists()]
    if foreign:
        raise UserError(f'{root} holds {", ".join(foreign)}, which this script did not write; move that away')
    return Manifest()


def make_split(entries: list[Entry], folder: str) -> dict:
    """Return the contents of a split file: {subset: {label: [path, ...]}, ..., 'class_names': {label: name}}."""
    split = {subset: {} for subset in SUBSETS if any(entry.subset == subset for entry in entries)}
    class_names = {}
    for entry in entries:
        split[entry.subset].setdefault(entry.label, []).append(entry.path(folder))
        class_names[entry.label] = entry.label if entry.class_name is None else entry.class_name
    return {**split, 'class_names': dict(sorted(class_names.items()))}


def remove_orphans(root: Path, folders: list[str], done: dict[str, Entry], earlier: dict[str, Entry]) -> None:
    """Remove all files from the output folders that belong to no converted image.

    Files that the earlier conversion did not know either, for instance of one that was killed, are counted on the
    screen.
    """
    for folder in folders:
        kept = {entry.path(folder) for entry in done.values()}
        known = {entry.path(folder) for entry in earlier.values()}
        num_unknown = 0
        for file in (root / folder).iterdir():
            path = f'{folder}/{file.name}'
            if path not in kept and not file.is_dir():
                file.unlink()
                num_unknown += path not in known
        if num_unknown:
            print(f'{root.name}: removed {num_unknown} files from {folder}/ that belong to no photograph')


def remove_caches(root: Path) -> None:
    """Remove all caches of a data set, and say so: they hold pixels of images that are gone."""
    for folder in ('uncropped', 'cropped'):
        for index_file in root.glob(f'{folder}_cache_[0-9]*.pth'):
            index_file.unlink()
            index_file.with_suffix('.bin').unlink(missing_ok=True)
            print(f'{root.name}: removed the cache {index_file.stem}, which held images that are gone or have changed; '
                  'build it again with --cache_size')


# ---------------------------------------------------- conversion ----------------------------------------------------
class Conversion(NamedTuple):
    """What `convert` did."""

    splits: dict[str, dict]  # {'uncropped': split, 'cropped': split}
    num_decoded: int
    num_skipped: int  # broken or missing
    num_gone: int  # since the last conversion


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file (for a symbolic link, the file it points to), or copy it where the file system cannot."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)


def convert_image(root: Path, image: RawImage, stem: str, raw_root: Path) -> tuple[str, int]:
    """Decode an image, put it into `uncropped/` and, if it has a box, into `cropped/`.

    Returns:
        file name and size in bytes in `uncropped/`.

    Raises:
        BrokenImage: if it cannot be decoded.
    """
    source = raw_root / image.source
    stored = open_stored(source)
    new_suffix = '.jpg' if max(stored.pixels.size) <= LONGEST_JPEG else '.png'
    suffix = source.suffix if stored.is_rgb else new_suffix
    target = root / 'uncropped' / f'{stem}{suffix}'
    target.unlink(missing_ok=True)  # it may be a hard link to an original, which must not be overwritten
    if stored.is_rgb:
        link_or_copy(source, target)
    else:
        stored.upright().save(target, **(JPEG if new_suffix == '.jpg' else {}))
    if image.box:
        cropped = root / 'cropped' / f'{stem}.jpg'
        cropped.unlink(missing_ok=True)
        pixels = stored.crop(image.box)
        pixels.thumbnail((LONGEST_JPEG, LONGEST_JPEG))  # smaller ones stay as they are
        pixels.save(cropped, **JPEG)
    return target.name, target.stat().st_size


def unique_stems(images: list[RawImage]) -> list[str]:
    """Return one file name (without suffix) per image; repeated names, in upper or lower case, get a number."""
    stems, taken = [], set()
    for image in images:
        stem = image.stem
        number = 1
        while stem.lower() in taken:
            number += 1
            stem = f'{image.stem}_{number}'
        taken.add(stem.lower())
        stems.append(stem)
    return stems


def find_changes(root: Path, images: list[RawImage], class_names: dict[str, str], earlier: dict[str, Entry],
                 folders: list[str], raw_root: Path
                 ) -> tuple[dict[str, Entry], dict[str, str], list[tuple[RawImage, Entry]]]:
    """Compare the raw images with an earlier conversion.

    Returns:
        {source: entry} of the images that are converted already, {source: reason} of those that are missing, and the
        images left to decode, with entries that lack file name and size.
    """
    sizes = {}
    for folder in folders:
        with os.scandir(root / folder) as files:
            sizes |= {f'{folder}/{file.name}': file.stat().st_size for file in files}
    done, failures, to_decode = {}, {}, []
    for image, stem in zip(images, unique_stems(images), strict=True):
        try:
            status = os.stat(f'{raw_root}/{image.source}')  # pathlib takes seconds for 100,000 images
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            failures[image.source] = getattr(error, 'strerror', None) or str(error)
            continue
        new = Entry('', 0, stem, image.box and list(image.box), image.subset, image.label,
                    class_names.get(image.label), status.st_size, status.st_mtime_ns)
        old = earlier.get(image.source)
        is_converted = (old is not None and old._replace(file_name='', file_size=0) == new
                        and sizes.get(old.path('uncropped')) == old.file_size
                        and (not old.box or sizes.get(old.path('cropped'))))
        if is_converted:
            done[image.source] = old
        else:
            to_decode.append((image, new))
    return done, failures, to_decode


def decode(root: Path, to_decode: list[tuple[RawImage, Entry]], done: dict[str, Entry],
           failures: dict[str, str], raw_root: Path) -> None:
    """Convert images in parallel, and add each to `done` or `failures`."""
    def try_one(job: tuple[RawImage, Entry]):
        image, entry = job
        try:
            return convert_image(root, image, entry.stem, raw_root)
        except (BrokenImage, MemoryError, ValueError) as error:
            return error
        except OSError as error:  # a full disk says nothing about the image
            raise UserError(f'{raw_root / image.source} cannot be converted to {root} ({error.strerror or error}); '
                            'free some space there, or check the disk, and call this again') from None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = progress(pool.map(try_one, to_decode), total=len(to_decode), desc=root.name, unit='img')
        for (image, entry), result in zip(to_decode, results, strict=True):
            if isinstance(result, Exception):
                failures[image.source] = reason_of(result)
            else:
                file_name, file_size = result
                done[image.source] = entry._replace(file_name=file_name, file_size=file_size)


def convert(root: Path, images: list[RawImage], class_names: dict[str, str], skip_bad: bool = False,
            class_split: dict | None = None, raw_root: Path | None = None) -> Conversion:
    """Decode all images that are new or have changed, and write the split files.

    Args:
        root: the folder that is written to.
        images: of a `read_*` function of raw_sets.py, or of `read_folder`.
        class_names: {label: name}.
        skip_bad: leave broken and missing images out instead of failing.
        class_split: of `read_folder`, to be remembered.
        raw_root: the folder that holds the raw images; None: `root`.

    Raises:
        UserError: if images are broken or missing (all are counted, the first twenty named), an image is listed
            twice, or a subset is empty.
    """
    raw_root = raw_root or root
    check_duplicates(raw_root, images)
    folders = ['uncropped', 'cropped'] if any(image.box for image in images) else ['uncropped']
    earlier = open_manifest(root, folders)
    new = Manifest(splits=earlier.splits, class_split=class_split or {})
    if not (root / MANIFEST).is_file():  # written first, so that an interrupted conversion is recognised as ours
        check_subsets(root, {image.subset for image in images})
        new.save(root)
    for folder in folders:
        make_folder('the folder', root / folder)
    new.files, failures, to_decode = find_changes(root, images, class_names, earlier.files, folders, raw_root)
    decode(root, to_decode, new.files, failures, raw_root)
    if failures and not skip_bad:  # an image that is out of reach keeps its copy, and the split files stay
        new.files |= {source: earlier.files[source] for source in failures if source in earlier.files}
        new.class_split = earlier.class_split
    new.files = {image.source: new.files[image.source] for image in images if image.source in new.files}
    remove_orphans(root, folders, new.files, earlier.files)
    has_changed = new.class_split != earlier.class_split or list(new.files.items()) != list(earlier.files.items())
    if photographs(earlier) - photographs(new):
        remove_caches(root)
    if has_changed:
        new.splits = {}  # they do not hold these images yet
        new.save(root)
    if failures and not skip_bad:
        raise UserError(describe_failures(raw_root, failures, len(images)))

    splits = write_splits(root, new, folders)
    num_decoded = sum(image.source in new.files for image, _ in to_decode)
    num_gone = len(earlier.files.keys() - new.files.keys() - failures.keys())
    return Conversion(splits, num_decoded, len(failures), num_gone)


def write_splits(root: Path, manifest: Manifest, folders: list[str]) -> dict:
    """Return {folder: split}, and write the split files unless they are those that the manifest remembers.

    Raises:
        UserError: if a subset is empty; split files of an earlier conversion are removed then.
    """
    entries = list(manifest.files.values())
    try:
        check_subsets(root, {entry.subset for entry in entries})
    except UserError:
        for folder in folders:
            split_file(root, folder).unlink(missing_ok=True)
        raise
    splits = {folder: make_split(entries, folder) for folder in folders}
    files = {folder: split_file(root, folder) for folder in folders}
    if manifest.splits != {file.name: stamp_of(file) for file in files.values()}:
        for folder, file in files.items():
            save(splits[folder], file)
        manifest.splits = {file.name: stamp_of(file) for file in files.values()}
        manifest.save(root)
    return splits


def describe_failures(root: Path, failures: dict[str, str], num_images: int) -> str:
    """Return the message about broken and missing images."""
    named = [f'{printable(source)} ({printable(reason)})' for source, reason in list(failures.items())[:FAILURES_SHOWN]]
    if len(failures) > FAILURES_SHOWN:
        named.append(f'and {len(failures) - FAILURES_SHOWN} more')
    return (f'{root}: {len(failures)} of {num_images} images are broken or missing: {"; ".join(named)}. Repair them or '
            'unpack them again, or leave them out with --skip_bad')


def check_subsets(root: Path, present: set[str]) -> None:
    """Raise a UserError if a subset has no images."""
    for subset in ('train', 'query', 'gallery') if present & {'query', 'gallery'} else ('train', 'test'):
        if subset not in present:
            raise UserError(f'{root}: no images in {subset}; it needs train/CLASS/ and test/CLASS/, or one folder for '
                            'each of at least two classes (python data_utils.py --help); if all classes of one side '
                            'are gone, --resplit splits the others again')


def check_duplicates(root: Path, images: list[RawImage]) -> None:
    """Raise a UserError if an image is listed twice: it could be in training and test."""
    seen = set()
    for image in images:
        if image.source in seen:
            raise UserError(f'{root}: the image {image.source} is listed twice; unpack the archive again')
        seen.add(image.source)


def read_known(root: Path, data_name: str) -> tuple[list[RawImage], dict[str, str]]:
    """Return the images and class names of a data set of RAW_SETS.

    Raises:
        UserError: if a file is missing or damaged.
    """
    raw_set = RAW_SETS[data_name]
    missing = [file for file in raw_set.files if not (root / file).is_file()]
    if missing:
        note = ''
        if data_name == 'car' and any((root / folder).is_dir() for folder in ('train', 'cars_train')):
            note = (' (train and test folders, 8,144 / 8,041 images, are the classification split with every class in '
                    'both halves; retrieval needs classes 1-98 / 99-196, 8,054 / 8,131 images)')
        raise UserError(f'{root} is taken for the data set {data_name} by its name, but lacks {", ".join(missing)}'
                        f'{note}; extract the data set\'s own archive there, or rename a folder of your own')
    images, class_names = raw_set.read(root)
    check_paths(root, (image.source for image in images))
    return images, class_names


def find_identical(root: Path, images: list[RawImage]) -> list[tuple[RawImage, RawImage]]:
    """Return pairs of an image and a later one in another subset whose files are equal byte for byte.

    The first is in training if one of them is. A file is read if its size is that of one in another subset, as a whole
    only if their last bytes are equal too. Files that cannot be read are equal to none.
    """
    def size(path: Path):
        return path.stat().st_size

    def tail(path: Path):
        with open(path, 'rb') as file:
            file.seek(max(0, size(path) - TAIL_BYTES))
            return file.read()

    def digest(path: Path):
        return hashlib.sha256(path.read_bytes()).digest()

    groups = [sorted(images, key=lambda image: SUBSETS.index(image.subset))]
    for property_of in (size, tail, digest):
        finer = {}
        for number, group in enumerate(groups):
            for image in group:
                with contextlib.suppress(OSError, ValueError):  # it is reported when it is decoded
                    finer.setdefault((number, property_of(root / image.source)), []).append(image)
        groups = [group for group in finer.values() if len({image.subset for image in group}) > 1]
    return [(group[0], image) for group in groups for image in group if image.subset != group[0].subset]


def drop_identical(root: Path, folder: OwnFolder, skip: bool) -> OwnFolder:
    """Warn of photographs that are in two subsets, byte for byte; with `skip`, leave out the second ones."""
    pairs = find_identical(root, folder.images)
    if not pairs:
        return folder
    first, second = (image.source for image in pairs[0])
    found = (f'{root.name}: {len(pairs):,} photographs are byte for byte equal to one of another side, the first: '
             f'{printable(second)} and {printable(first)}')
    if not skip:
        print(f'warning: {found}; results on them are too good; --skip_duplicates leaves them out')
        return folder
    print(f'{found}; they are left out')
    skipped = {image.source for _, image in pairs}
    return folder._replace(images=[image for image in folder.images if image.source not in skipped])


def read_own(root: Path, raw_root: Path, test_ratio: float | None, seed: int | None, resplit: bool,
             exclude: Sequence[str] = ()) -> OwnFolder:
    """Read a folder of your own photographs, with the class split of an earlier conversion to `root` unless `resplit`.

    Reports what was left out, and which classes changed sides.
    """
    manifest = open_manifest(root, ['uncropped'])
    known = {(Path(source).name, entry.source_size, entry.source_time): entry.label
             for source, entry in manifest.files.items()}
    earlier = dict(manifest.class_split)
    if resplit:  # ratio and seed are kept unless others are given
        earlier['sides'] = {}
        if test_ratio is not None:
            earlier.pop('ratio', None)
        if seed is not None:
            earlier.pop('seed', None)
    folder = read_folder(raw_root, test_ratio, seed, earlier, known, exclude)
    if resplit and not folder.class_split:
        raise UserError(f'--resplit has no effect: {raw_root} is split into train and test already; leave it out')
    if resplit:
        report_resplit(root.name, manifest.class_split.get('sides', {}), folder.class_split['sides'])
    report_folder(root.name, folder)
    return folder


# ---------------------------------------------------- what it prints -----------------------------------------------
def report_resplit(name: str, earlier: dict[str, str], sides: dict[str, str]) -> None:
    """Print how many classes --resplit moved; both arguments are {label: side}."""
    num_changed = sum(earlier.get(label, side) != side for label, side in sides.items())
    consequence = ''
    if num_changed:
        consequence = ': models trained before have seen test classes, and their results do not hold on this split'
    print(f'{name}: {num_changed} of {len(sides)} classes changed sides{consequence}')


def report_folder(name: str, folder: OwnFolder) -> None:
    """Print what is unusual about a folder of your own photographs."""
    for label, old_label in folder.renamed.items():
        print(f'{name}: {label} holds the photographs of {old_label}, which is gone, and keeps its side')
    if folder.left_out:
        parts = [f'{number:,} {suffix}{SUFFIX_HINTS.get(suffix, "")}'
                 for suffix, number in sorted(folder.left_out.items())]
        print(f'{name}: left out: {", ".join(parts)}')
    if folder.empty:
        print(f'{name}: {len(folder.empty)} class folders hold no image, the first: {folder.empty[0]}')
    training = {image.label for image in folder.images if image.subset == 'train'}
    shared = training & {image.label for image in folder.images if image.subset != 'train'}
    if shared:
        print(f'{name}: {len(shared)} classes are in training and test: results on them say nothing about unseen '
              'classes')


def report_conversion(data_name: str, conversion: Conversion) -> None:
    """Print how many classes and images a data set has, and whether a known data set is complete."""
    split = conversion.splits['uncropped']
    counts = {subset: (len(split[subset]), count_images(split[subset])) for subset in SUBSETS if subset in split}
    parts = [', '.join(f'{subset} {classes:,} classes {images:,} images'
                       for subset, (classes, images) in counts.items()),
             f'{conversion.num_decoded:,} decoded now']
    if conversion.num_skipped:
        parts.append(f'{conversion.num_skipped:,} broken or missing images left out')
    if conversion.num_gone:
        parts.append(f'{conversion.num_gone:,} that are gone from the folder removed')
    print(f'{data_name}: {"; ".join(parts)}')
    if data_name in RAW_SETS:
        print(f'{data_name}: {compare_counts(counts, RAW_SETS[data_name].counts)}')


def compare_counts(counts: dict[str, tuple[int, int]], expected: dict[str, tuple[int, int]]) -> str:
    """Compare the counts {subset: (classes, images)} of a conversion with those of the complete data set."""
    if counts == expected:
        return 'the counts are those of the complete data set'
    differences = []
    for subset, (num_classes, num_images) in expected.items():
        classes, images = counts.get(subset, (0, 0))
        if (classes, images) != (num_classes, num_images):
            differences.append(f'{subset} has {classes:,} classes and {images:,} images instead of {num_classes:,} and '
                               f'{num_images:,}')
    return f'not the complete data set: {"; ".join(differences)}. Results on it do not compare with published ones'


# ---------------------------------------------------- command line --------------------------------------------------
def get_args(argv: list[str] | None = None):
    """Parse and check the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument('--data_path', type=user_path, default='/home/data', help='folder that holds the data sets '
                        '[%(default)s]')
    parser.add_argument('--raw_path', type=user_path, help='folder that holds the raw data sets, if --data_path is not '
                        'to be written into them, for instance because they are read-only: images are then copied to '
                        '--data_path [that of --data_path]')
    parser.add_argument('--data_name', nargs='+', default=[], metavar='NAME',
                        help='car, cub, sop, isc, glyph, or a folder of your own [every known raw data set]')
    parser.add_argument('--cache_size', type=int, help='also pack all images, their short side reduced to this many '
                        'pixels, into one file for train.py --cache_size [no cache]')
    parser.add_argument('--skip_bad', action='store_true', help='leave broken and missing images out instead of '
                        'stopping')
    own = parser.add_argument_group('folders of your own, with one folder per class')
    own.add_argument('--test_ratio', type=float, help='share of the classes that become test classes; remembered, and '
                     f'each class keeps its side in later runs [{DEFAULT_RATIO}]')
    own.add_argument('--resplit', action='store_true', help='split the classes again from scratch; models trained '
                     'before will have seen some of the new test classes')
    own.add_argument('--exclude', nargs='+', metavar='PATTERN', help='leave out the files and folders whose name, or '
                     'path in the data set, matches; * and ? are wildcards. Thumbnails, recycle bins and snapshots of '
                     'NAS and operating systems are always left out')
    own.add_argument('--skip_duplicates', action='store_true', help='leave out the test photographs that are byte for '
                     'byte equal to a training photograph, and those of the gallery equal to a query, instead of '
                     'warning')
    glyph = parser.add_argument_group('glyph')
    glyph.add_argument('--glyph_classes', type=int, help='number of characters; two thirds of them are training '
                       f'classes [{GLYPH_CLASSES}]')
    glyph.add_argument('--glyph_images', type=int, help=f'images per character [{GLYPH_IMAGES}]')
    parser.add_argument('--seed', type=int, help='of the images of glyph, and of the split of your own classes [0]')
    args = parser.parse_args(argv)
    args.data_name = [canonical_data_name(name) for name in args.data_name]

    if args.raw_path and args.data_name == ['glyph']:
        raise UserError(f'--raw_path {args.raw_path} has no effect: glyph is drawn in --data_path; leave it out')
    no_glyph = '' if 'glyph' in args.data_name else ' without --data_name glyph'
    refuse_without_effect(args, {'glyph_classes': no_glyph, 'glyph_images': no_glyph})
    if all(name in RAW_SETS or name == 'glyph' for name in args.data_name):
        reason = ' on data sets with a split of their own'
        refuse_without_effect(args, {'test_ratio': reason, 'seed': reason if no_glyph else '', 'exclude': reason})
        for flag in ('resplit', 'skip_duplicates'):
            if getattr(args, flag):
                raise UserError(f'--{flag} has no effect{reason}; leave it out')
    check_between(args, {'seed': (0, None), 'cache_size': (16, 8192), 'glyph_classes': (3, None),
                         'glyph_images': (2, None)})
    return args


def find_data_set(data_path: Path, data_name: str) -> Path:
    """Return the folder of a data set; that of glyph need not exist yet."""
    root = find_root(data_path, data_name)
    if root is None and data_name == 'glyph':
        return data_path / 'glyph'
    if root is None:
        names = RAW_SETS[data_name].names if data_name in RAW_SETS else [data_name]
        folders = sorted(path.name for path in data_path.iterdir() if path.is_dir())
        raise UserError(f'--data_name {data_name}: there is no folder {" or ".join(names)} in {data_path}'
                        f'{suggestion(data_name, [*folders, *RAW_SETS, "glyph"])} (there are: '
                        f'{", ".join(folders) or "none"}); extract the data set there')
    return root


def find_folders(data_path: Path, raw_path: Path, data_name: str) -> tuple[Path, Path]:
    """Return the folder of a converted data set, which is created, and that of its raw images.

    Raises:
        UserError: if there are no raw images, or the first one cannot be written to.
    """
    raw_root = find_data_set(data_path if data_name == 'glyph' else raw_path, data_name)
    root = raw_root if raw_root.parent == data_path else find_root(data_path, data_name) or data_path / data_name
    try:
        return make_folder('--data_path', root), raw_root
    except UserError as error:
        raise UserError(f'{error}, and name that of the raw images with --raw_path') from None


def find_known_sets(data_path: Path) -> list[str]:
    """Return the names of the known data sets in a folder, and print which ones are missing."""
    data_names = []
    for data_name, raw_set in RAW_SETS.items():
        root = find_root(data_path, data_name)
        if root and all((root / file).is_file() for file in raw_set.files):
            data_names.append(data_name)
        else:
            print(f'{data_name}: not found; looked in {data_path} for a folder {", ".join(raw_set.names)} with '
                  f'{", ".join(raw_set.files)}')
    if not data_names:
        raise UserError(f'--data_path {data_path} holds no known raw data set; name your own with --data_name, or make '
                        'one with --data_name glyph')
    return data_names


def process(root: Path, raw_root: Path, data_name: str, args) -> None:
    """Convert one data set, `raw_root`, into `root`, and print what it holds."""
    class_split, seed = {}, args.seed
    if data_name == 'glyph':
        make_glyph(root, args.glyph_classes or GLYPH_CLASSES, args.glyph_images or GLYPH_IMAGES, seed or 0)
        seed = None  # it drew the images; their classes are split already
    if data_name in RAW_SETS:
        images, class_names = read_known(raw_root, data_name)
    else:
        folder = read_own(root, raw_root, args.test_ratio, seed, args.resplit, args.exclude or ())
        folder = drop_identical(raw_root, folder, args.skip_duplicates)
        images, class_names, class_split = folder.images, folder.class_names, folder.class_split
    conversion = convert(root, images, class_names, args.skip_bad, class_split, raw_root)
    report_conversion(data_name, conversion)
    if args.cache_size is None:
        return
    from imagedata.cache import build_cache  # imports torchvision

    for crop_type, split in conversion.splits.items():
        paths = images_of(split)
        num_bytes = build_cache(root, crop_type, args.cache_size, paths)
        print(f'{data_name}: cache of {len(paths):,} {crop_type} images, {num_bytes / 1e6:,.0f} MB')


def main() -> None:
    """Convert the data sets that the command line names, or all known ones."""
    args = get_args()
    data_path, raw_path = Path(args.data_path), Path(args.raw_path or args.data_path)
    if args.data_name != ['glyph']:
        check_data_path(raw_path, '--raw_path' if args.raw_path else '--data_path')
    for data_name in args.data_name or find_known_sets(raw_path):
        root, raw_root = find_folders(data_path, raw_path, data_name)
        with lock(root / '.conversion.lock', f'another process is converting {root}; wait for it'):
            process(root, raw_root, data_name, args)


if __name__ == '__main__':
    run_script(main)
