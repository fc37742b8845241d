"""Turn raw data sets into split files.

    python data_utils.py --data_path /home/data                     # every known raw set that is there
    python data_utils.py --data_path /home/data --data_name cub car
    python data_utils.py --data_path data --data_name glyph         # made here, no download
    python data_utils.py --data_path /home/me --data_name flowers   # flowers/train/CLASS/*.jpg, flowers/test/CLASS/...
    python data_utils.py --data_path /home/me --data_name flowers --test_ratio 0.3         # flowers/CLASS/*.jpg

Under {data_path}/{data_name} this writes the images to `uncropped/` (hard links where the file system has them) and,
where there are bounding boxes, to `cropped/`, and the split files `uncropped_data_dicts.pth` and
`cropped_data_dicts.pth`: {'train': {label: [path, ...]}, 'test': {...}, 'class_names': {label: name}}, for In-shop
`train`, `query` and `gallery`; paths relative to {data_path}/{data_name}. `conversion.json` remembers what was decoded,
so that a second run reads only what is new, and which side a class of one's own was dealt. A conversion mirrors the
folder: of an image that is gone nothing is kept. PyTorch is imported where it is used, so that a run with nothing to do
ends at once.
"""
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from engine.errors import UserError, nearest
from engine.files import check_paths, load, lock, make_folder, read_json, save, save_json, stamp_of
from engine.images import BrokenImage, open_image
from engine.processes import progress
from folders import DEFAULT_RATIO, read_folder
from glyph import GLYPH_CLASSES, GLYPH_IMAGES, make_glyph
from raw_sets import (RAW_SETS, SUBSETS, Item, canonical_data_name, check_data_path, count_images, find_root,
                      images_of)
from utils import Parser, check_between, run_script, user_path

FAILURES_SHOWN = 20


# ---------------------------------------------------- conversion ----------------------------------------------------
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
    stem, box, subset, label, class name, size and time of the source]}, 'deal': of folders.py}

    Raises:
        UserError: if files of these names are there, but not from an earlier conversion.
    """
    manifest = read_json(root / 'conversion.json', {
        'made_by': lambda value: value == 'data_utils.py', 'files': dict, 'splits': dict})
    if manifest:
        return manifest
    names = ['conversion.json', *folders, *(f'{folder}_data_dicts.pth' for folder in folders)]
    foreign = [name for name in names if (root / name).exists()]
    if foreign:
        raise UserError(f'{root} holds {", ".join(foreign)} that this script did not write; move that away')
    return {'made_by': 'data_utils.py', 'files': {}, 'splits': {}, 'deal': {}}


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


def earlier_deal(manifest: dict) -> dict:
    """Return the deal that a manifest remembers; one of before deals were remembered says it by its images."""
    sides = {entry[5]: entry[4] for entry in manifest['files'].values()}
    if manifest.get('deal') or set(sides.values()) != {'train', 'test'}:
        return manifest.get('deal', {})
    return {'sides': sides}


def mirror(root: Path, folders: list[str], done: dict, earlier: dict) -> None:
    """Remove from the folders that a conversion fills every file that belongs to no image of this one.

    What the earlier one did not know either, as after a conversion that was killed, is counted on the screen.
    """
    for folder in folders:
        kept, known = ({entry[0] if folder == 'uncropped' else f'{entry[2]}.jpg' for entry in entries.values()}
                       for entries in (done, earlier))
        others = [file for file in (root / folder).iterdir() if file.name not in kept and not file.is_dir()]
        for file in others:
            file.unlink()
        unknown = sum(file.name not in known for file in others)
        if unknown:
            print(f'{root.name}: {unknown} files in {folder}/ that belonged to no photograph are removed')


def drop_stale_caches(root: Path, done: dict) -> None:
    """Remove caches that hold images which are not among those of this conversion, and say so."""
    from engine.cache import INDEX

    kept = {f'uncropped/{entry[0]}' for entry in done.values()} | {f'cropped/{entry[2]}.jpg' for entry in done.values()}
    for index_file in root.glob('*cropped_cache_*.pth'):
        if not re.fullmatch(r'(un)?cropped_cache_\d+', index_file.stem):
            continue
        try:
            images = set(load(index_file, 'cache index', INDEX)['images'])
        except UserError:
            images = {None}
        if not images <= kept:
            index_file.unlink()
            index_file.with_suffix('.bin').unlink(missing_ok=True)
            what = 'cannot be read' if images == {None} else 'held images that are gone'
            print(f'{root.name}: the cache {index_file.stem} {what} and is removed; --cache_size builds another')


def convert(root: Path, items: list[Item], class_names: dict[str, str], skip_bad: bool = False,
            dealt: dict | None = None) -> dict:
    """Decode every image that is new or changed, in parallel, and write the split files.

    Args:
        items: the images, as a `read_*` gives them.
        class_names: {label: name}.
        skip_bad: leave broken and missing images out instead of failing.
        dealt: of `read_folder`, to be remembered.

    Returns:
        {'decoded', 'skipped', 'gone': numbers of images, 'splits': {folder: split}}.

    Raises:
        UserError: if images are broken or missing (all of them are counted, the first twenty named), one is listed
            twice, or a subset is empty.
    """
    check_twice(root, items)
    folders = ['uncropped', 'cropped'] if any(item.box for item in items) else ['uncropped']
    manifest, manifest_file = open_manifest(root, folders), root / 'conversion.json'
    if not manifest_file.is_file():  # first of all, so that a conversion cut short is known as ours
        check_subsets(root, items)
        manifest['deal'] = dealt or {}
        save_json(manifest, manifest_file)
    for folder in folders:
        make_folder('the folder', root / folder)
    done, failures, todo = find_changes(root, items, class_names, manifest, folders)
    decode(root, todo, done, failures)
    mirror(root, folders, done, manifest['files'])
    gone = len(manifest['files'].keys() - done.keys() - failures.keys())
    unchanged = list(done.items()) == list(manifest['files'].items()) and manifest.get('deal') == (dealt or {})
    stops = bool(failures) and not skip_bad  # no split file says what was dealt anew
    manifest |= {'files': done} | ({} if stops else {'deal': dealt or {}})
    if not unchanged:
        save_json(manifest, manifest_file)
        drop_stale_caches(root, done)
    if stops:
        shown = '; '.join(f'{name} ({reason})' for name, reason in list(failures.items())[:FAILURES_SHOWN])
        more = f'; and {len(failures) - FAILURES_SHOWN} more' if len(failures) > FAILURES_SHOWN else ''
        raise UserError(f'{root}: {len(failures)} of {len(items)} images are broken or missing: {shown}{more}. '
                        'Mend them or unpack them again, or leave them out with --skip_bad')
    items = [item for item in items if item.source in done]
    try:
        check_subsets(root, items)
    except UserError:
        for folder in folders:  # of an earlier conversion, whose images are gone
            (root / f'{folder}_data_dicts.pth').unlink(missing_ok=True)
        raise
    splits = {folder: make_split(items, done, class_names, folder) for folder in folders}
    stamps = {f'{folder}_data_dicts.pth': stamp_of(root / f'{folder}_data_dicts.pth') for folder in folders}
    if not unchanged or manifest['splits'] != stamps:
        for folder, split in splits.items():
            save(split, root / f'{folder}_data_dicts.pth')
        manifest['splits'] = {name: stamp_of(root / name) for name in stamps}
        save_json(manifest, manifest_file)
    decoded = sum(item.source not in failures for item, _ in todo)
    return {'decoded': decoded, 'skipped': len(failures), 'gone': gone, 'splits': splits}


def decode(root: Path, todo: list[tuple[Item, list]], done: dict, failures: dict) -> None:
    """Convert what `find_changes` left, and add it to what is done or has failed."""
    def try_one(job: tuple[Item, list]):
        try:
            return convert_item(root, job[0], job[1][0])
        except BrokenImage as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = progress(pool.map(try_one, todo), total=len(todo), desc=root.name, unit='img')
        for (item, key), result in zip(todo, results, strict=True):
            if isinstance(result, BrokenImage):
                failures[item.source] = str(result)
            else:
                done[item.source] = [*result, *key]


def check_subsets(root: Path, items: list[Item]) -> None:
    """Refuse a data set without images in one of its subsets."""
    present = {item.subset for item in items}
    for subset in ('train', 'query', 'gallery') if present & {'query', 'gallery'} else ('train', 'test'):
        if subset not in present:
            raise UserError(f'{root}: no images in {subset}; it needs train/CLASS/ and test/CLASS/, or one folder for '
                            'each of at least two classes (python data_utils.py --help); where classes of one side '
                            'are all gone, --resplit deals the others anew')


def check_twice(root: Path, items: list[Item]) -> None:
    """Refuse an image that is listed twice: it could train and test at once."""
    seen = set()
    twice = next((item.source for item in items if item.source in seen or seen.add(item.source)), None)
    if twice:
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


def check_counts(counts: dict[str, tuple[int, int]], expected: dict[str, tuple[int, int]]) -> str:
    """Compare a conversion with the complete data set and return a sentence for the screen."""
    if counts == expected:
        return 'the counts are those of the complete data set'
    differ = [f'{subset} has {counts.get(subset, (0, 0))[0]:,} classes and {counts.get(subset, (0, 0))[1]:,} images '
              f'instead of {classes:,} and {images:,}' for subset, (classes, images) in expected.items()
              if counts.get(subset) != (classes, images)]
    return f'not the complete data set: {"; ".join(differ)}. Numbers on it do not compare with published ones'


def read_known(root: Path, data_name: str) -> tuple[list[Item], dict[str, str]]:
    """Return the images of a data set of RAW_SETS and the names of its classes.

    Raises:
        UserError: if it lacks a file, or one is not what it should be.
    """
    raw = RAW_SETS[data_name]
    missing = [file for file in raw.files if not (root / file).is_file()]
    if missing:
        mirrored = data_name == 'car' and any((root / name).is_dir() for name in ('train', 'cars_train'))
        note = (' (train and test folders, 8,144 / 8,041 images, are the classification split with every class in '
                'both halves; retrieval needs classes 1-98 / 99-196, 8,054 / 8,131 images)') if mirrored else ''
        raise UserError(f'{root} is taken for the data set {data_name} by its name, and lacks {", ".join(missing)}'
                        f'{note}; extract the data set\'s own archive there, or rename a folder of your own')
    items, class_names = raw.read(root)
    check_paths(root, (item.source for item in items))
    return items, class_names


def read_own(root: Path, args, seed: int | None) -> tuple[list[Item], dict[str, str], dict]:
    """Read a folder of one's own as `read_folder` does, and say what of it was left out, and what a new deal breaks."""
    manifest = open_manifest(root, ['uncropped'])
    earlier = earlier_deal(manifest)
    known = {(Path(source).name, *entry[7:9]): entry[5] for source, entry in manifest['files'].items()}
    kept = earlier
    if args.resplit:  # ratio and seed are remembered, where no others are given
        kept = {name: earlier.get(name) for name, given in (('ratio', args.test_ratio), ('seed', seed))
                if given is None}
    items, class_names, found = read_folder(root, args.test_ratio, seed, kept, known)
    if args.resplit and not found['deal']:
        raise UserError(f'--resplit has no effect: {root} is split into train and test already; leave it out')
    if args.resplit:
        before = earlier.get('sides', {})
        changed = sum(before.get(label, side) != side for label, side in found['deal']['sides'].items())
        print(f'{root.name}: {changed} of {len(class_names)} classes changed sides' + (
            ': what was trained before has seen test classes, and no number of it holds on this split' if changed else
            ''))
    for new, old in found['renamed'].items():
        print(f'{root.name}: {new} holds the photographs of {old}, which is gone, and keeps its side')
    hints = {'.heic': ' (pip install pillow-heif)', '.heif': ' (pip install pillow-heif)',
             '.avif': ' (needs Pillow 11.3)'}
    if found['left_out']:
        print(f'{root.name}: left out: ' + ', '.join(
            f'{number:,} {ending}{hints.get(ending, "")}' for ending, number in sorted(found['left_out'].items())))
    if found['empty']:
        print(f'{root.name}: {len(found["empty"])} class folders hold no image, the first: {found["empty"][0]}')
    both = len({item.label for item in items if item.subset == 'train'}
               & {item.label for item in items if item.subset != 'train'})
    if both:
        print(f'{root.name}: {both} classes are in training and test: numbers on them say nothing of unseen classes')
    return items, class_names, found['deal']


def process(data_path: Path, data_name: str, args) -> None:
    """Find one data set, of which glyph need not be there, and convert it while no other process does.

    Raises:
        UserError: if it is not there, its files are broken, or a subset is empty.
    """
    root, raw = find_root(data_path, data_name), RAW_SETS.get(data_name)
    if root is None and data_name == 'glyph':
        root = data_path / 'glyph'
    if root is None:
        there = [path.name for path in data_path.iterdir() if path.is_dir()]
        raise UserError(f'--data_name {data_name}: there is no folder {" or ".join(raw.names if raw else [data_name])} '
                        f'in {data_path}{nearest(data_name, [*there, *RAW_SETS, "glyph"])} (there are: '
                        f'{", ".join(sorted(there)) or "none"}); extract the data set there')
    make_folder('--data_path', root)
    with lock(root / '.conversion.lock', f'another process is converting {root}; wait for it'):
        convert_and_tell(root, data_name, args)


def convert_and_tell(root: Path, data_name: str, args) -> None:
    """Convert one data set and say what it holds."""
    raw, seed = RAW_SETS.get(data_name), args.seed
    if data_name == 'glyph':
        make_glyph(root, args.glyph_classes or GLYPH_CLASSES, args.glyph_images or GLYPH_IMAGES, args.seed or 0)
        seed = None  # it is that of the images, which are split already
    items, class_names, dealt = (*read_known(root, data_name), {}) if raw else read_own(root, args, seed)
    result = convert(root, items, class_names, args.skip_bad, dealt)
    split = result['splits']['uncropped']
    counts = {subset: (len(split[subset]), count_images(split[subset])) for subset in SUBSETS if subset in split}
    parts = ', '.join(f'{subset} {classes:,} classes {images:,} images' for subset, (classes, images) in counts.items())
    more = f'; {result["skipped"]:,} broken or missing images left out' if result['skipped'] else ''
    more += f'; {result["gone"]:,} that are gone from the folder removed' if result['gone'] else ''
    print(f'{data_name}: {parts}; {result["decoded"]:,} decoded now{more}')
    if raw:
        print(f'{data_name}: {check_counts(counts, raw.counts)}')
    if args.cache_size is not None:
        from engine.cache import build_cache

        for crop_type, split in result['splits'].items():
            images = images_of(split)
            size = build_cache(root, crop_type, args.cache_size, images)
            print(f'{data_name}: cache of {len(images):,} {crop_type} images, {size / 1e6:,.0f} MB')


# ---------------------------------------------------- command line --------------------------------------------------
def get_args(argv: list[str] | None = None):
    """Parse the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument('--data_path', type=user_path, default='/home/data', help='folder that holds the data sets '
                        '[%(default)s]')
    parser.add_argument('--data_name', nargs='+', default=[], metavar='NAME',
                        help='car, cub, sop, isc, glyph, or a folder of your own; without it, every known raw set')
    parser.add_argument('--test_ratio', type=float,
                        help='share of the classes that become test classes, for a folder of your own with one folder '
                             f'per class; remembered, so that a class keeps its side [{DEFAULT_RATIO}]')
    parser.add_argument('--resplit', action='store_true', help='deal the classes of a folder of your own anew; what '
                        'was trained before has then seen test classes')
    parser.add_argument('--cache_size', type=int, help='also pack all images, their short side reduced to this many '
                        'pixels, into one file for train.py --cache_size')
    parser.add_argument('--skip_bad', action='store_true', help='leave broken and missing images out')
    parser.add_argument('--glyph_classes', type=int, help=f'characters of glyph, 2/3 train [{GLYPH_CLASSES}]')
    parser.add_argument('--glyph_images', type=int, help=f'images per character of glyph [{GLYPH_IMAGES}]')
    parser.add_argument('--seed', type=int, help='of glyph and of --test_ratio [0]')
    args = parser.parse_args(argv)
    args.data_name = [canonical_data_name(name) for name in args.data_name]
    for flag in ('glyph_classes', 'glyph_images'):
        if getattr(args, flag) is not None and 'glyph' not in args.data_name:
            raise UserError(f'--{flag} {getattr(args, flag)} has no effect without --data_name glyph; leave it out')
    if all(name in RAW_SETS or name == 'glyph' for name in args.data_name):
        for flag, given in ((f'--test_ratio {args.test_ratio}', args.test_ratio is not None),
                            ('--resplit', args.resplit),
                            (f'--seed {args.seed}', args.seed is not None and 'glyph' not in args.data_name)):
            if given:
                raise UserError(f'{flag} has no effect on data sets with a split of their own; leave it out')
    check_between(args, {'seed': (0, None), 'cache_size': (16, 8192), 'glyph_classes': (3, None),
                         'glyph_images': (2, None)})
    return args


def main() -> None:
    """Convert the data sets that the command line names, or all that are there."""
    args = get_args()
    data_path = Path(args.data_path)
    if args.data_name != ['glyph']:
        check_data_path(data_path)
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
            print(f'{data_name}: not found; looked in {data_path} for a folder {", ".join(raw.names)} with '
                  f'{", ".join(raw.files)}')
    if not found:
        raise UserError(f'--data_path {data_path} holds no known raw data set; name your own with --data_name, or make '
                        'one with --data_name glyph')


if __name__ == '__main__':
    run_script(main)
