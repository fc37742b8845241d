"""Embed any folder of images with a trained model, into a data base that test.py and report.py search.

    python embed.py --model results/RUN_model.pth --images /photos/museum --data_base museum.pth
    python embed.py --data_base museum.pth --images /photos/new        # adds; what is there and unchanged is kept
    python embed.py --data_base museum.pth --update                    # changed files again, vanished ones out
    python embed.py --data_base museum.pth --remove 'loans/*'
    python embed.py --data_base museum.pth --list 'birds/*'
    python embed.py --data_base museum.pth --duplicates 0.98           # pairs above a similarity: a CSV and a sheet
    python embed.py --data_base museum.pth --csv museum.csv --npy museum.npy --parquet museum.parquet
    python embed.py --qdrant http://localhost:6333 --collection museum --model results/RUN_model.pth --images FOLDER

The data base keeps paths relative to --images, whose place it remembers, and lies beside a copy of the model,
museum_model.pth. It is saved every few thousand images: a call that was cut off, however it was, goes on when it is
typed again. Files that cannot be read are counted, named and left out.
"""
import contextlib
import csv
import io
import os
import shlex
import time
from pathlib import Path

from engine.errors import UserError
from engine.files import make_folder, remove_torn, save, stamp_of, write_atomically
from utils import (Parser, add_device_flags, check_between, check_place, check_replaceable, refuse_without_effect,
                   run_script, user_path)

SAVED_EVERY = 4096  # images
MOST_NAMED = 5  # broken files in a line
MOST_GROUPS, MOST_IN_A_GROUP = 60, 10  # of duplicates, in the sheet
DUPLICATES = ['group', 'similarity', 'image', 'duplicate']  # columns of their CSV
ACTIONS = ('update', 'remove', 'list', 'duplicates', 'csv', 'npy', 'parquet')


# ---------------------------------------------------- command line --------------------------------------------------
def get_args(argv: list[str] | None = None):
    """Parse the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument('--data_base', type=user_path, metavar='FILE', help='to make or to change, .pth')
    parser.add_argument('--qdrant', metavar='URL', help='in place of --data_base: a Qdrant server, or a folder for its '
                        'embedded mode; --images needs --model then')
    parser.add_argument('--collection', metavar='NAME', help='of --qdrant')
    parser.add_argument('--model', type=user_path, metavar='FILE', help='RUN_model.pth of a training, or of '
                        'evaluate.py --save; needed for a new data base alone')
    parser.add_argument('--images', type=user_path, metavar='FOLDER', help='add the images below it, with all its '
                        'folders but hidden ones')
    parser.add_argument('--labels', type=user_path, metavar='folder|CSV', help='classes: `folder` takes the first '
                        'folder below --images, a CSV with the columns path,label names paths below it [none]')
    parser.add_argument('--dtype', choices=('float32', 'float16'), help='of the features; float16 halves the file, and '
                        'moves a similarity by about 0.0002 [that of the file; float32]')
    change = parser.add_argument_group('a data base that is there')
    change.add_argument('--update', action='store_true', help='embed again what has changed, remove what has vanished')
    change.add_argument('--remove', nargs='+', metavar='PATTERN', help='images or folders; * and ? stand for any '
                        'letters')
    change.add_argument('--list', nargs='?', const='*', metavar='PATTERN', help='print its images')
    change.add_argument('--duplicates', type=float, metavar='SIMILARITY', help='pairs of at least this similarity, '
                        'into DATA_BASE_duplicates.csv and .png beside it')
    for name, what in (('csv', 'a row an image: file, class, features'), ('npy', 'the features (N, D) alone, in the '
                       'order of --list'), ('parquet', 'as --csv, the features in one column; needs pyarrow')):
        change.add_argument(f'--{name}', type=user_path, metavar='FILE', help=f'write {what}')
    change.add_argument('--overwrite', action='store_true', help='--csv, --npy, --parquet: replace a file')
    parser.add_argument('--batch_size', type=int, help="images embedded at once [the model's]")
    parser.add_argument('--num_workers', type=int, default=2, help='processes that decode images [%(default)s]')
    parser.add_argument('--amp', choices=('auto', 'on', 'off'), help="embed in bfloat16 [as the model's run did]")
    add_device_flags(parser)
    args = parser.parse_args(argv)
    check_between(args, {'batch_size': (1, 2**31), 'num_workers': (0, 1024), 'duplicates': (-1, 1)})
    check_place(args)
    if args.qdrant is not None:
        refuse_without_effect(args, dict.fromkeys(('duplicates', 'csv', 'npy', 'parquet'), ' with --qdrant'))
        if (args.images is not None or args.update) and args.model is None:
            raise UserError('--qdrant keeps no model: name it with --model')
    elif not args.data_base.endswith('.pth'):
        raise UserError(f'--data_base {args.data_base} must end in .pth')
    if args.images is None and all(getattr(args, name) in (None, []) or getattr(args, name) is False
                                   for name in (*ACTIONS, 'dtype')):
        raise UserError('nothing to do: add --images FOLDER, or one of --' + ', --'.join(ACTIONS))
    for flag, needed in (('labels', args.images), ('model', args.images or (args.qdrant and args.update))):
        if getattr(args, flag) is not None and not needed:
            raise UserError(f'--{flag} {getattr(args, flag)} has no effect without --images; leave it out')
    if args.overwrite and not (args.csv or args.npy or args.parquet):
        raise UserError('--overwrite has no effect without --csv, --npy or --parquet; leave it out')
    return args


if __name__ == '__main__':  # --help and mistakes need not wait for the imports below
    ARGS = run_script(get_args)

import torch

from collection import DTYPES, FileCollection, Item
from dataset import batches_in_order, make_loader, make_transform
from engine.images import BrokenImage, load_image
from engine.nearest import pairs_above
from engine.processes import progress, select_device
from engine.runs import ORIGIN, RunFiles, fingerprint_of, load_model_file
from evaluate import embed_batch, use_amp
from listing import find_images, matching, place_of, read_labels
from model import EmbeddingNet, load_model


# ---------------------------------------------------- embedding -----------------------------------------------------
class Photographs:
    """Image files for a DataLoader: each a uint8 tensor (3, side, side), and whether it could be read."""

    def __init__(self, files: list[str], transform, side: int):
        self.files, self.transform, self.side = files, transform, side

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, bool]:
        """Return the image, grey and False where the file cannot be read."""
        try:
            return self.transform(load_image(Path(self.files[index]))), True
        except BrokenImage:
            return torch.full((3, self.side, self.side), 127, dtype=torch.uint8), False


@torch.inference_mode()
def embed_items(items: list[Item], collection, model: EmbeddingNet, settings: dict, workers: int,
                device: torch.device) -> None:
    """Embed images and add them to a collection, SAVED_EVERY at a time, with the names of those that are broken.

    Args:
        items: of the files; whole batches of them are saved, so that a call that goes on has the same ones.
        settings: batch_size, resize_size, amp.

    Raises:
        UserError: if the model's embeddings are not finite.
    """
    transform = make_transform(False, model.config.image_size, settings['resize_size'], model.interpolation)
    files = [f'{item.folder}/{item.path}' for item in items]
    batch_size, amp = settings['batch_size'], use_amp(settings['amp'], device)
    batches = batches_in_order(len(files), batch_size)
    loader = make_loader(Photographs(files, transform, model.config.image_size), batches, workers, device)
    whole = batch_size * max(1, SAVED_EVERY // batch_size)
    features, readable = torch.empty(min(whole, len(files)), model.feature_dim), []
    with progress(None, desc='embed', total=len(items), unit='img') as bar:
        done = 0
        for images, sound in loader:
            found = embed_batch(model, images, device, amp).cpu()
            if not found.isfinite().all():
                raise UserError(f'the embeddings of {files[done + len(readable)]} and others are not finite; the model '
                                'is broken')
            features[len(readable):len(readable) + len(found)] = found
            readable += sound.tolist()
            bar.update(len(found))
            if len(readable) == whole or done + len(readable) == len(files):
                own, kept = items[done:done + len(readable)], torch.tensor(readable)
                collection.add([item for item, good in zip(own, readable, strict=True) if good],
                               features[:len(readable)][kept],
                               {f'{item.folder}/{item.path}': [item.size, item.time, item.label]
                                for item, good in zip(own, readable, strict=True) if not good})
                done, readable = done + len(readable), []


def open_collection(args) -> FileCollection:
    """Open the data base that the command line names, or begin it with the model.

    Raises:
        UserError: if there is none and no model to begin it with, or the model is another one.
    """
    file = Path(args.data_base)
    dtype = DTYPES[args.dtype] if args.dtype else None
    if args.model is None:
        if not file.is_file():
            raise UserError(f'there is no data base {file}; begin it with --model RUN_model.pth --images FOLDER')
        return FileCollection(file, dtype=dtype)
    contents = load_model_file(args.model)
    origin = {key: contents[key] for key in ORIGIN if key in contents}
    collection = FileCollection(file, origin, fingerprint_of(contents['config'], contents['state_dict']), dtype)
    copy = RunFiles.beside(file).model
    if copy.exists():
        there = load_model_file(copy)
        if fingerprint_of(there['config'], there['state_dict']) != collection.fingerprint:
            raise UserError(f'{copy} is there and another model; move it away, or name another --data_base')
    return collection


def keep_model(args) -> None:
    """Copy the model that the command line names, a file or a folder of export.py, beside the data base."""
    copy = RunFiles.beside(Path(args.data_base)).model
    if not copy.exists():
        save(load_model_file(args.model), copy)


def open_remote(args):
    """Open the collection of --qdrant, or begin it with the model."""
    from remote import QdrantCollection

    if args.model is None:
        return QdrantCollection(args.qdrant, args.collection, dtype=args.dtype and DTYPES[args.dtype])
    contents = load_model_file(args.model)
    origin = {key: contents[key] for key in ORIGIN if key in contents} if args.images is not None else None
    return QdrantCollection(
        args.qdrant, args.collection, origin=origin,
        fingerprint=fingerprint_of(contents['config'], contents['state_dict']),
        dim=load_model(args.model, torch.device('cpu'))[0].feature_dim, dtype=args.dtype and DTYPES[args.dtype])


def load_own_model(args, collection, device: torch.device) -> tuple[EmbeddingNet, dict]:
    """Load the model of a collection; returns it and the settings of embedding.

    Raises:
        UserError: if it is gone, or another one.
    """
    file = Path(args.model) if args.qdrant else RunFiles.beside(Path(args.data_base)).model
    if not file.exists():  # with --qdrant it may be a folder of export.py
        raise UserError(f'the model {file} of this data base is gone; name it with --model')
    model, contents = load_model(file, device)
    if fingerprint_of(contents['config'], contents['state_dict']) != collection.fingerprint:
        raise UserError(f'{file} is not the model that embedded {args.data_base or args.collection}; put that one back')
    given = {name: getattr(args, name) for name in ('batch_size', 'amp') if getattr(args, name) is not None}
    return model, {**contents['args'], **given}


def add_folder(args, collection) -> list[Item]:
    """Return the images of --images that are to be embedded; those that are there get the classes of --labels."""
    folder, below = place_of(Path(args.images), collection.folders())
    found, left_out = find_images(Path(folder, below))
    others = ', '.join(f'{number:,} {what}' for what, number in left_out.most_common())
    if not found:
        raise UserError(f'--images {args.images} holds no images{f" (but {others})" if others else ""}')
    labels = read_labels(args.labels, found, str(Path(folder, below)))
    labels = labels and {below + path: label for path, label in labels.items()}
    stamps = {below + path: stamp for path, stamp in found.items()}
    known = {item.path: item for item in collection.items(folder)}
    there = {path: item.label for path, item in known.items()}
    broken = {path: collection.broken.get(f'{folder}/{path}', []) for path in stamps}
    new = [Item(folder, path, (labels or {}).get(path, there.get(path, class_of_broken(broken[path]))), *stamp)
           for path, stamp in stamps.items() if (path not in known or known[path][3:] != stamp)
           and broken[path][:2] != list(stamp)]
    changed = {(folder, path): label for path, label in (labels or {}).items()
               if path in known and known[path].label != label}
    print(f'{folder}: {len(found):,} images, {len(new):,} to embed'
          + (f'; left out: {others}' if others else ''))
    if changed:
        collection.relabel(changed)
        print(f'{len(changed):,} images have another class now')
    return new


def class_of_broken(known: list) -> str:
    """Return the class in what a collection knows of a broken file, which once was its size and time alone."""
    return known[2] if len(known) > 2 else ''


def item_of_broken(collection, file: str) -> Item:
    """Return a file that could not be read as an image of a collection, with its size and time of now if it is there.
    """
    folder = next((root for root in collection.folders() if file.startswith(f'{root}/')), os.path.dirname(file))
    return Item(folder, file[len(folder) + 1:], class_of_broken(collection.broken[file]), *(stamp_of(file) or (0, 0)))


def update(collection) -> list[Item]:
    """Remove the images whose files have vanished, and return those that have changed, to be embedded again.

    Raises:
        UserError: if a whole folder is gone, as when a disk is not there.
    """
    for folder in collection.folders():
        if not Path(folder).is_dir():
            raise UserError(f'--update: the folder {folder} is not there; if it is gone for good, use --remove '
                            f'{shlex.quote(folder)}')
    gone, changed = [], []
    for item in collection.items():
        try:
            stamp = os.stat(Path(item.folder, item.path))
        except (FileNotFoundError, NotADirectoryError):
            gone.append((item.folder, item.path))
            continue
        if (stamp.st_size, stamp.st_mtime_ns) != item[3:]:
            changed.append(item._replace(size=stamp.st_size, time=stamp.st_mtime_ns))
    if gone:
        collection.remove(gone)
    # They may have been broken for a while only.
    changed += [item_of_broken(collection, file) for file in collection.broken if os.path.isfile(file)]
    collection.broken = {}
    print(f'{len(gone):,} images have vanished and are removed, {len(changed):,} have changed or were broken')
    return changed


# ---------------------------------------------------- what is asked of it ------------------------------------------
def find_duplicates(args, collection: FileCollection) -> None:
    """Write all pairs of images above a similarity as CSV, and groups of them as a sheet.

    Raises:
        UserError: if a file of somebody else is in the way.
    """
    from sheets import draw_rows

    file = Path(args.data_base)
    table, sheet = (file.with_name(f'{file.stem}_duplicates.{suffix}') for suffix in ('csv', 'png'))
    if table.exists() and not table.read_bytes().startswith(','.join(DUPLICATES).encode()):
        raise UserError(f'{table} is there, was not written by this script and is not replaced; move it away')
    check_replaceable(sheet, '--duplicates')
    items, features = list(collection.items()), collection.base.test.features
    pairs = pairs_above(features.float(), args.duplicates)
    group_of = {}
    for one, other, _ in pairs:  # of each image the first one that it is like, directly or by others
        first, second = (root_of(group_of, index) for index in (one, other))
        group_of[max(first, second)] = min(first, second)
    groups = {}
    for index in sorted({index for pair in pairs for index in pair[:2]}):
        groups.setdefault(root_of(group_of, index), []).append(index)
    numbers = {first: number for number, first in enumerate(groups, start=1)}
    paths = [f'{item.folder}/{item.path}' for item in items]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(DUPLICATES)
    writer.writerows([numbers[root_of(group_of, one)], f'{similarity:.6f}', paths[one], paths[other]]
                     for one, other, similarity in pairs)
    write_atomically(table, lambda target: target.write(text.getvalue().encode()))
    print(f'{len(pairs):,} pairs of at least {args.duplicates:g} in {len(groups):,} groups: {table}')
    if not pairs:
        return
    answers = []
    for first, members in list(groups.items())[:MOST_GROUPS]:
        similar = features[members[1:]].double() @ features[first].double()
        answers.append({'query': Path(paths[first]), 'class': items[first].label, 'note': f'group {numbers[first]}',
                        'retrieved': [{'file': Path(paths[index]), 'class': items[index].label, 'correct': None,
                                       'similarity': value} for index, value in
                                      zip(members[1:], similar.tolist(), strict=True)][:MOST_IN_A_GROUP]})
    print(draw_rows(answers, sheet))


def root_of(group_of: dict[int, int], index: int) -> int:
    """Return the first image of the group that an image belongs to."""
    while index in group_of and group_of[index] != index:
        index = group_of[index]
    return index


def export(args, collection: FileCollection) -> None:
    """Write the features for other tools.

    Raises:
        UserError: if a file is there and --overwrite is not set, or pyarrow is missing.
    """
    import numpy as np
    import pandas as pd

    asked = {name: Path(getattr(args, name)) for name in ('csv', 'npy', 'parquet') if getattr(args, name)}
    taken = {path.resolve() for path in (collection.file, RunFiles.beside(collection.file).model)}
    for name, file in asked.items():
        if file.resolve() in taken:
            raise UserError(f'--{name} {file} is the data base, its model, or named twice; name another file')
        taken.add(file.resolve())
        if file.exists() and not args.overwrite:
            raise UserError(f'--{name} {file} is there already; add --overwrite to replace it')
        make_folder(f'--{name}', file.parent)
    features = collection.base.test.features
    items = list(collection.items())
    for name, file in asked.items():
        columns = {'image': [f'{item.folder}/{item.path}' for item in items], 'class': [item.label for item in items]}
        if name == 'npy':
            write_atomically(file, lambda target: np.save(target, features.numpy()))
        elif name == 'parquet':
            try:
                import pyarrow
                from pyarrow import parquet
            except ImportError:
                raise UserError('--parquet needs pyarrow; install it with: pip install pyarrow') from None
            flat = pyarrow.array(features.numpy().reshape(-1))
            table = pyarrow.table({**columns, 'features': pyarrow.FixedSizeListArray.from_arrays(
                flat, features.shape[1])})
            write_atomically(file, lambda target, table=table: parquet.write_table(table, target))
        else:
            def write(target, columns=columns) -> None:
                for start in range(0, len(items), SAVED_EVERY):
                    rows = slice(start, start + SAVED_EVERY)
                    table = pd.DataFrame({key: values[rows] for key, values in columns.items()}).join(pd.DataFrame(
                        features[rows].float().numpy()).add_prefix('feature_'))
                    table.to_csv(target, index=False, header=start == 0)
            write_atomically(file, write)
        print(f'{file}: {len(items):,} images')


def change(args, collection) -> None:
    """Do to a data base what the command line asks for."""
    new = update(collection) if args.update else []
    if args.remove:
        chosen = matching(list(collection.items()), args.remove)
        forgotten = matching([item_of_broken(collection, file) for file in collection.broken], args.remove)
        if not chosen and not forgotten:
            raise UserError(f'--remove {" ".join(args.remove)} fits none of the {len(collection):,} images; --list '
                            'prints them')
        for item in forgotten:
            del collection.broken[f'{item.folder}/{item.path}']
        if chosen:
            collection.remove([(item.folder, item.path) for item in chosen])
        print(f'{len(chosen):,} images removed'
              + (f', {len(forgotten):,} that cannot be read are forgotten' if forgotten else ''))
        removed = set(matching(new, args.remove))
        new = [item for item in new if item not in removed]
    if args.images is not None:  # what has changed below it is found a second time
        new = list({item[:2]: item for item in [*new, *add_folder(args, collection)]}.values())
    if args.model is not None and args.qdrant is None:
        keep_model(args)
    if new:
        device = select_device(args.device)
        model, settings = load_own_model(args, collection, device)
        start = time.perf_counter()
        embed_items(new, collection, model, settings, args.num_workers, device)
        print(f'{len(new):,} images in {time.perf_counter() - start:.0f} s')
    collection.finish()
    if collection.broken:
        named = ', '.join(list(collection.broken)[:MOST_NAMED])
        print(f'{len(collection.broken):,} images cannot be read and are left out: {named}'
              f'{" ..." if len(collection.broken) > MOST_NAMED else ""}')


def main(args) -> None:
    """Do what the command line names."""
    if args.qdrant is not None:
        with contextlib.closing(open_remote(args)) as collection:
            change_and_show(args, collection, f'{args.collection} in {args.qdrant}')
        return
    file = Path(args.data_base)
    make_folder('--data_base', file.parent)
    files = RunFiles.beside(file)
    with files.locked(f'--data_base {file}: another process is at work on it; wait for it'):
        remove_torn(file.parent, [file.name, files.model.name])
        change_and_show(args, open_collection(args), str(file))


def change_and_show(args, collection, name: str) -> None:
    """Change a collection and answer what is asked of it.

    Raises:
        UserError: if it is new and none of its images can be read.
    """
    try:
        change(args, collection)
    except KeyboardInterrupt as stop:
        kept = sum(len(items) for items, _ in collection.parts)
        raise type(stop)(f'{kept:,} new images are kept; the same call goes on' if kept else '') from None
    if not len(collection):
        if args.images is not None:
            raise UserError(f'--images {args.images}: none of its images can be read')
        print(f'{name} holds no images any more')
        return
    if args.list is not None:
        for item in matching(list(collection.items()), [args.list]):
            print(f'{item.path}{f"  {item.label}" if item.label else ""}')
    if args.duplicates is not None:
        find_duplicates(args, collection)
    if args.csv or args.npy or args.parquet:
        export(args, collection)
    print(f'{name}: {len(collection):,} images of {len(collection.folders()):,} folders')
    if args.images is not None:
        words = ['--qdrant', args.qdrant, '--collection', args.collection, '--model', args.model] if args.qdrant else \
            ['--data_base', args.data_base]
        print(f'next:\n  {shlex.join(["python", "serve.py", *words])}')


if __name__ == '__main__':
    run_script(lambda: main(ARGS))
