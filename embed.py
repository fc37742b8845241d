"""Embed any folder of images into a data base that serve.py, test.py and report.py search; no labels are needed.

    python embed.py --images /photos/museum --data_base museum.pth     # a pretrained backbone, whitened on these images
    python embed.py --images /photos/museum --data_base museum.pth --model results/RUN_model.pth    # a trained model
    python embed.py --data_base museum.pth --images /photos/new        # adds images; unchanged ones are skipped
    python embed.py --data_base museum.pth --update                    # embeds changed files, removes deleted ones
    python embed.py --data_base museum.pth --refit                     # whitens and embeds all images again
    python embed.py --data_base museum.pth --remove 'loans/*'
    python embed.py --data_base museum.pth --move /photos/museum /backup/museum   # the folder has another name now
    python embed.py --data_base museum.pth --list 'birds/*'
    python embed.py --data_base museum.pth --duplicates 0.98           # groups of similar images, as CSV and figure
    python embed.py --data_base museum.pth --csv museum.csv --npy museum.npy --parquet museum.parquet
    python embed.py --qdrant http://localhost:6333 --collection museum --model results/RUN_model.pth --images FOLDER

The data base stores the absolute path of --images, and image paths relative to it. The model lies beside it,
museum_model.pth, and embeds what is added later. Embeddings are saved every few thousand images: after an interruption
of any kind, the same command continues. Files that cannot be read are counted, named and left out.

Without --model, the features of a pretrained backbone are whitened on up to 20,000 of the images, see docs/search.md. A
call that is interrupted before these are embedded starts again.
"""
import contextlib
import csv
import io
import math
import os
import random
import shlex
import shutil
import time
from collections import Counter
from pathlib import Path

from common.errors import UserError, reason_of
from common.files import (LARGEST_FEATURE_DIM, LARGEST_SIDE, check_replaceable, make_folder, remove_torn, save,
                          stamp_of, write_atomically)
from recipes import POOLINGS, canonical_backbone
from utils import (Parser, add_collection_flags, add_device_flags, check_between, check_collection_flags,
                   refuse_without_effect, run_script, user_path)

SAVED_EVERY = 4096  # images
FIT_SAMPLE = 20_000  # images on which a pretrained backbone is whitened, at most
MAX_NAMED = 5  # broken files in the message about them
MAX_GROUPS, MAX_IN_GROUP = 60, 10  # of duplicates, in the figure
DUPLICATE_COLUMNS = ['group', 'similarity', 'image', 'duplicate']
TABLE_FLAGS = ('csv', 'npy', 'parquet')
BACKBONE_FLAGS = ('backbone_type', 'weights', 'image_size', 'pooling', 'feature_dim')
ACTION_FLAGS = ('update', 'refit', 'remove', 'move', 'list', 'duplicates', *TABLE_FLAGS)


# ---------------------------------------------------- command line --------------------------------------------------
def get_args(argv: list[str] | None = None):
    """Parse and check the command line."""
    parser = Parser(description=__doc__)
    add_collection_flags(parser, data_base='data base to create or to change, .pth', model='RUN_model.pth of train.py '
                         'or of evaluate.py --save, or a folder or an ONNX file of export.py [a new data base: a '
                         'pretrained backbone]; needed with --qdrant for --images and --update')
    parser.add_argument('--images', type=user_path, metavar='FOLDER', help='add the images in this folder and its '
                        'subfolders; hidden ones are skipped')
    parser.add_argument('--exclude', nargs='+', metavar='PATTERN', help='leave out these paths below --images; * and ? '
                        'are wildcards')
    parser.add_argument('--labels', type=user_path, metavar='folder|CSV', help='classes of --images: `folder` takes '
                        'the first subfolder of each path; a CSV file has the columns path,label, with paths relative '
                        'to --images [none]')
    parser.add_argument('--dtype', choices=('float32', 'float16'), help='of the features; float16 halves the file and '
                        'changes similarities by about 0.0002 [that of the data base; float32]')
    group = parser.add_argument_group('a new data base without --model')
    group.add_argument('--backbone_type', help='pretrained backbone, or timm:MODEL; docs/backbones.md compares them '
                       '[timm:vit_small_patch14_dinov2.lvd142m]')
    group.add_argument('--weights', type=user_path, help='of the backbone: imagenet for those that come with it, or '
                       'the path of a state dict [imagenet]')
    group.add_argument('--image_size', type=int, help='side of the centre crop in pixels [224]')
    group.add_argument('--pooling', choices=POOLINGS, help='of the features [native, that of its authors, for a '
                       'transformer of timm; avg_max, average plus maximum, for others]')
    group.add_argument('--feature_dim', type=int, help='numbers per image after the whitening [512, or as many as the '
                       'backbone has]')
    group = parser.add_argument_group('an existing data base')
    group.add_argument('--update', action='store_true', help='embed changed files again, and remove images whose files '
                       'were deleted')
    group.add_argument('--refit', action='store_true', help='whiten the pretrained backbone on the images that the '
                       'data base has now, and embed them all again')
    group.add_argument('--remove', nargs='+', metavar='PATTERN', help='remove these images or folders; * and ? are '
                       'wildcards')
    group.add_argument('--move', nargs=2, type=user_path, metavar=('OLD', 'NEW'), help='the images in the folder OLD '
                       'are in NEW now; nothing is embedded again')
    group.add_argument('--confirm', action='store_true', help='let --update remove more than half of the images of a '
                       'folder, or look into one that holds your home folder, --remove all images, and --move go on '
                       'where files are missing or have changed')
    group.add_argument('--list', nargs='?', const='*', metavar='PATTERN', help='print the images')
    group.add_argument('--duplicates', type=float, metavar='SIMILARITY', help='write the groups of images that pairs '
                       'of at least this cosine connect to DATA_BASE_duplicates.csv, and draw them in '
                       'DATA_BASE_duplicates.png')
    group.add_argument('--csv', type=user_path, metavar='FILE', help='write a row per image: file, class, features')
    group.add_argument('--npy', type=user_path, metavar='FILE', help='write the features (N, D) in the order of --list')
    group.add_argument('--parquet', type=user_path, metavar='FILE', help='like --csv, with all features in one '
                       'column; needs pyarrow')
    group.add_argument('--overwrite', action='store_true', help='let --csv, --npy and --parquet replace files')
    group = parser.add_argument_group('computation')
    group.add_argument('--batch_size', type=int, help='images embedded at once [that of the model]')
    group.add_argument('--num_workers', type=int, default=2, help='processes that decode images [%(default)s]')
    group.add_argument('--amp', choices=('auto', 'on', 'off'), help='embed in bfloat16 [that of the model]')
    add_device_flags(group)
    args = parser.parse_args(argv)
    check_between(args, {'batch_size': (1, 2**31), 'num_workers': (0, 1024), 'duplicates': (-1, 1),
                         'image_size': (16, LARGEST_SIDE), 'feature_dim': (1, LARGEST_FEATURE_DIM)})
    if args.backbone_type is not None:
        canonical_backbone(args.backbone_type)
    check_collection_flags(args)
    check_combinations(args)
    return args


def check_combinations(args) -> None:
    """Raise a UserError for flags that do not belong together, and if there is nothing to do."""
    def is_set(name: str) -> bool:
        return getattr(args, name) is not None and getattr(args, name) is not False  # 0 is a similarity

    if args.qdrant is not None:
        refuse_without_effect(args, dict.fromkeys(('duplicates', *BACKBONE_FLAGS, *TABLE_FLAGS), ' with --qdrant'))
        if args.refit:
            raise UserError('--refit has no effect with --qdrant; leave it out')
        if args.move:
            raise UserError('--move has no effect with --qdrant; embed the new folder, and --remove the old one')
        if args.model is None and (is_set('images') or args.update):
            raise UserError('--qdrant stores no model: name it with --model')
    elif not args.data_base.endswith('.pth'):
        raise UserError(f'--data_base {args.data_base} must end in .pth')
    if not any(map(is_set, ('images', 'dtype', *ACTION_FLAGS))):
        raise UserError('nothing to do: add --images FOLDER, or one of --' + ', --'.join(ACTION_FLAGS))
    if not is_set('images'):
        updates_qdrant = args.qdrant is not None and args.update
        refuse_without_effect(args, {'labels': ' without --images', 'exclude': ' without --images',
                                     'model': '' if updates_qdrant else ' without --images'})
    if args.model is not None:
        refuse_without_effect(args, dict.fromkeys(BACKBONE_FLAGS, ' with --model'))
    if args.refit and any(map(is_set, ('images', 'update', 'remove', 'move', 'dtype', *BACKBONE_FLAGS))):
        raise UserError('--refit embeds the images of the data base as they are; call it by itself, without --images, '
                        '--update, --remove, --move, --dtype and flags of the backbone')
    if args.confirm and not (args.update or args.remove or args.move):
        raise UserError('--confirm has no effect without --update, --remove or --move; leave it out')
    if args.move and not all(folder.strip() for folder in args.move):
        raise UserError('--move: an empty name names no folder; is a variable of the shell unset?')
    if args.remove and not all(pattern.strip() for pattern in args.remove):
        raise UserError('--remove: an empty pattern names no image; is a variable of the shell unset?')
    if args.overwrite and not any(map(is_set, TABLE_FLAGS)):
        raise UserError('--overwrite has no effect without --csv, --npy or --parquet; leave it out')


if __name__ == '__main__':  # --help and mistakes need not wait for the imports below
    ARGS = run_script(get_args)

import torch
from torch import nn
from torch.nn import functional as F

from common.distributed import select_device
from common.results import RunFiles
from imagedata.folders import read_labels, resolve_image_folder, scan_images
from model import EmbeddingNet
from retrieval.collection import DTYPES, CollectionItem, FileCollection, filter_items
from retrieval.database import ORIGIN, load_data_base
from retrieval.duplicates import group_similar, similarities_to_first
from retrieval.embedding import WithoutHead
from retrieval.image_files import Embedded, embed_files, join
from retrieval.model_file import check_device, load_model, load_model_file, model_contents, model_fingerprint
from retrieval.onnx_file import OnnxNet
from retrieval.pretrained import DEFAULT_DIM, build_pretrained, fit_whitening, pretrained_settings, without_whitening
from retrieval.qdrant import open_qdrant
from training.statistics import provenance


# ---------------------------------------------------- embedding -----------------------------------------------------
def embed_items(items: list[CollectionItem], collection, model: EmbeddingNet, settings: dict, num_workers: int,
                device: torch.device, network: nn.Module | None = None) -> list[str]:
    """Embed images and add them to a collection, about SAVED_EVERY at a time; returns the files out of reach.

    Args:
        network: computes other features than the embeddings of the model.

    Raises:
        UserError: if the embeddings are not finite.
    """
    # Whole batches are saved, so that a call that continues has the same ones: the last bits of an embedding can
    # depend on its batch.
    batches_at_once = max(1, SAVED_EVERY // settings['batch_size'])
    batches, start, lost = [], 0, []
    for batch in embed_files([item.file for item in items], model, settings, num_workers, device, network):
        batches.append(batch)
        end = start + sum(len(embedded.reasons) for embedded in batches)
        if len(batches) == batches_at_once or end == len(items):
            lost += add_embedded(collection, items[start:end], join(batches))
            batches, start = [], end
    return lost


def add_embedded(collection, items: list[CollectionItem], embedded: Embedded) -> list[str]:
    """Add embedded images to a collection, note broken files in it, and name them.

    Returns:
        the files that are out of reach: they may be sound, so the collection keeps what it knows of them.

    Raises:
        UserError: if the embeddings are not finite.
    """
    if not embedded.embeddings.isfinite().all():
        raise UserError(f'the embeddings of {items[0].file} and the images after it are not finite; the model is '
                        'broken')
    added, broken, lost = [], [], []
    for item, reason, is_out_of_reach in zip(items, embedded.reasons, embedded.out_of_reach, strict=True):
        if is_out_of_reach:
            lost.append(f'{item.file} ({reason})')
        elif reason:
            broken.append(item)
            print(f'cannot be read: {item.file} ({reason})')
        else:
            added.append(item)
    collection.add(added, embedded.embeddings[embedded.readable()], broken)
    return lost


# ---------------------------------------------------- without a model -----------------------------------------------
def fit_model(model: EmbeddingNet, settings: dict, feature_dim: int | None, items: list[CollectionItem],
              collection: FileCollection, num_workers: int, device: torch.device
              ) -> tuple[list[CollectionItem], list[str]]:
    """Whiten a pretrained network on a sample of the images, save it beside the collection, and add the sample to that.

    Returns:
        the images that are left to embed, and the files out of reach.

    Raises:
        UserError: if no image of the sample can be read.
    """
    sample = items
    if len(items) > FIT_SAMPLE:
        sample = random.Random(0).sample(items, FIT_SAMPLE)
    sample = {item.file: item for item in sample}
    # The features before the whitening are a collection of their own, so that an interrupted call continues.
    unwhitened = FileCollection(sample_file(collection.file), {'args': settings},
                                model_fingerprint(model_contents(model, {'args': settings})))
    known = {item.file: item.stamp for item in unwhitened.items()}
    lost = embed_items([item for item in sample.values() if known.get(item.file) != item.stamp], unwhitened, model,
                       settings, num_workers, device, UnitFeatures(model))
    unwhitened.finish()
    rows, embedded = [], []
    for row, item in enumerate(unwhitened.items()):
        if item.file in sample and item.stamp == sample[item.file].stamp:
            rows.append(row)
            embedded.append(sample[item.file])
    if not embedded:
        unreadable = f'none of the {len(sample):,} images can be read, for instance {next(iter(sample))}'
        raise UserError(describe_lost(lost) if lost else unreadable)
    features = unwhitened.data_base.test.features[rows, :-1] * math.sqrt(model.num_features)
    line = fit_whitening(model, features, feature_dim)
    print(f'{model.config.backbone_type}: {line}', flush=True)
    contents = model_contents(model, {'args': settings, 'made_with': provenance(device)})
    save(contents, RunFiles.beside(collection.file).model)
    collection.set_model({key: contents[key] for key in ORIGIN if key in contents}, model_fingerprint(contents))
    with torch.no_grad():
        embeddings = F.normalize(model.head(features.to(device)), dim=-1).cpu()
    collection.add(embedded, embeddings, list(unwhitened.broken.values()))
    return [item for item in items if item.file not in sample], lost


class UnitFeatures(nn.Module):
    """A network's layer-normalised features (N, F), over sqrt(F), as unit rows (N, F + 1): a data base holds no others.

    The last number makes up for the length, which is at most 1, and less where the features hardly vary.
    """

    def __init__(self, model: EmbeddingNet):
        super().__init__()
        self.network, self.length = WithoutHead(model), math.sqrt(model.num_features)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.network(images).float() / self.length
        rest = (1 - features.square().sum(-1, keepdim=True)).clamp(min=0).sqrt()
        return torch.cat([features, rest], dim=-1)


def sample_file(file: Path) -> Path:
    """Return the file of the features on which the model of a data base is whitened, deleted once that is complete."""
    return Path(f'{file}.sample')


def asked_settings(args) -> dict:
    """Return how the command line asks for images to be embedded, where it says something."""
    return {name: getattr(args, name) for name in ('batch_size', 'amp') if getattr(args, name) is not None}


def refit(args, collection: FileCollection, device: torch.device) -> None:
    """Whiten a pretrained backbone on all images of a collection, embed them again, and replace data base and model.

    Until it ends the data base stays as it was. An interrupted call starts again.

    Raises:
        UserError: if the model was trained, the data base is a link, or image files are missing.
    """
    file, settings = collection.file, dict(collection.origin['args'])
    if not settings.get('pretrained'):
        raise UserError(f'--refit: the model of {file} was trained; only a pretrained backbone is whitened')
    if RunFiles.beside(file).onnx.exists():
        raise UserError(f'--refit makes another model than {RunFiles.beside(file).onnx}, and needs the PyTorch model; '
                        'move the ONNX file away, and export it again afterwards')
    if file.is_symlink():
        raise UserError(f'--refit replaces {file}, which is a link; name the file that it leads to')
    model = load_kept_model(file, collection.fingerprint, device)
    stamps = {item: stamp_of(item.file) for item in collection.items()}
    missing = [item.file for item, stamp in stamps.items() if stamp is None]
    if missing:
        raise UserError(f'--refit: {len(missing):,} images are missing, for instance {missing[0]}; call --update first')
    folder = refit_folder(file)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    target = FileCollection(folder / file.name, {'args': {}}, dtype=collection.dtype)
    settings |= asked_settings(args)
    model, feature_dim = without_whitening(model), model.config.feature_dim
    items = [item.with_stamp(stamp) for item, stamp in stamps.items()]
    left, lost = fit_model(model, settings, feature_dim, items, target, args.num_workers, device)
    lost += embed_items(left, target, model, settings, args.num_workers, device)
    if lost:
        raise UserError(describe_lost(lost))
    target.finish()
    shutil.copymode(file, target.file)
    os.replace(target.file, file)
    finish_refit(file)


def describe_lost(files: list[str]) -> str:
    """Say which files were out of reach, for instance because a disk dropped out, and what to do."""
    return (f'{len(files):,} files could not be reached, for instance {files[0]}; all others are saved, and the same '
            'command tries these again')


def refit_folder(file: Path) -> Path:
    """Return the folder in which --refit makes the next data base and model."""
    return Path(f'{file}.refit')


def finish_refit(file: Path) -> None:
    """Move the model of a --refit to its data base, which was moved already."""
    folder = refit_folder(file)
    if file.is_file() and folder.is_dir() and not (folder / file.name).exists():
        model = RunFiles.beside(folder / file.name).model
        fingerprint = load_data_base(file).sources.fingerprint
        if model.exists() and model_fingerprint(load_model_file(model)) == fingerprint:
            os.replace(model, RunFiles.beside(file).model)
            shutil.rmtree(folder)


# ---------------------------------------------------- data base and model ------------------------------------------
def open_collection(args) -> FileCollection:
    """Open the data base of the command line, or start a new one.

    Raises:
        UserError: if it does not exist and there are no images to start it with, or the model is another one.
    """
    file, dtype = Path(args.data_base), DTYPES.get(args.dtype)
    if file.is_file():
        refuse_without_effect(args, dict.fromkeys(BACKBONE_FLAGS, f': {file} exists and has its model'))
    elif args.images is None:
        raise UserError(f'there is no data base {file}; create it with --images FOLDER')
    model_file, kept = args.model, RunFiles.beside(file).model_for(torch.device('cpu'))
    if model_file is None and not file.is_file() and kept.exists():
        model_file = kept
        check_interrupted(args, model_file)
    if model_file is None:
        return FileCollection(file, {'args': {}}, dtype=dtype)
    contents = load_model_file(model_file)
    origin = {key: contents[key] for key in ORIGIN if key in contents}
    return FileCollection(file, origin, model_fingerprint(contents), dtype)


def check_interrupted(args, model_file: Path) -> None:
    """Check that a model without its data base is that of an interrupted call with the same flags.

    Raises:
        UserError: if it is another one.
    """
    contents = load_model_file(model_file)
    config, settings = contents['config'], contents['args']
    made = {'backbone_type': config['backbone_type'], 'image_size': config['image_size'], 'pooling': config['pooling'],
            'weights': settings.get('weights'), 'feature_dim': settings.get('feature_dim')}
    asked = {name: getattr(args, name) for name in made if getattr(args, name) is not None}
    if 'weights' in asked:
        asked['weights'] = Path(asked['weights']).name
    if 'backbone_type' in asked:
        asked['backbone_type'] = canonical_backbone(asked['backbone_type'])
    if not settings.get('pretrained') or asked != {name: made[name] for name in asked}:
        raise UserError(f'{model_file} is there without its data base, and was not made by this command; move it away, '
                        'or name it with --model')


def keep_model(model_file: str, data_base: Path) -> None:
    """Copy a model, a file or a folder of export.py, beside the data base, unless there is one already.

    An ONNX file stays one, and may lie beside the model that it was exported from.

    Raises:
        UserError: if it cannot embed an image.
    """
    files, is_onnx = RunFiles.beside(data_base), Path(model_file).suffix == '.onnx'
    copy = files.onnx if is_onnx else files.model
    if copy.exists():
        return
    model, contents = load_model(model_file)
    side = model.config.image_size
    try:
        with torch.no_grad():
            embedding = model(torch.full((1, 3, side, side), 127, dtype=torch.uint8))
    except Exception as error:  # a network of other sizes than it says raises what its layers raise
        raise UserError(f'--model {model_file} cannot embed an image of {side} px ({reason_of(error)})') from None
    if not embedding.isfinite().all():
        raise UserError(f'--model {model_file}: its embeddings are not finite; the model is broken')
    if is_onnx:
        write_atomically(copy, lambda file: file.write(Path(model_file).read_bytes()))
    else:
        save(contents, copy)


def load_kept_model(data_base: Path, fingerprint: str, device: torch.device) -> EmbeddingNet | OnnxNet:
    """Load the model beside a data base.

    Raises:
        UserError: if it is missing, or another one than that of the data base.
    """
    file = RunFiles.beside(data_base).model_for(device)
    if not file.exists():
        raise UserError(f'the model of {data_base}, {file}, is missing; name it with --model')
    model, contents = load_model(file, device)
    if model_fingerprint(contents) != fingerprint:
        raise UserError(f'{file} is not the model that embeds {data_base}; move it away, and name that one with '
                        '--model')
    return model


# ---------------------------------------------------- changes -------------------------------------------------------
def scan_folder(images: str, exclude: list[str], labels_flag: str | None, collection) -> list[CollectionItem]:
    """Return the images of --images that are new or have changed; unchanged ones get the classes of --labels."""
    folder, below = resolve_image_folder(Path(images), collection.folders())
    stamps, left_out = scan_images(Path(folder, below), exclude)
    skipped = ', '.join(f'{count:,} {reason}' for reason, count in left_out.most_common())
    if not stamps:
        raise UserError(f'--images {images} holds no images' + (f' (but {skipped})' if skipped else ''))
    labels = read_labels(labels_flag, list(stamps), str(Path(folder, below))) or {}
    known = {item.file: item for item in collection.items(folder)}
    to_embed, relabelled = [], []
    for path, stamp in stamps.items():
        file = f'{folder}/{below}{path}'
        earlier = known.get(file) or collection.broken.get(file)
        label = labels.get(path, earlier.label if earlier else '')
        if earlier is None or earlier.stamp != tuple(stamp):
            to_embed.append(CollectionItem(folder, below + path, label, *stamp))
        elif file in known and label != earlier.label:
            relabelled.append(earlier._replace(label=label))
    summary = f'{folder}: {len(stamps):,} images, {len(to_embed):,} to embed'
    print(f'{summary}; left out: {skipped}' if skipped else summary)
    if relabelled:
        collection.relabel(relabelled)
        print(f'{len(relabelled):,} images have a new class')
    return to_embed


def update(collection, confirmed: bool) -> list[CollectionItem]:
    """Remove images whose files were deleted; return those that have changed, and broken files to try again.

    Raises:
        UserError: if a whole folder or most of its images are missing, for instance because a disk is not mounted, or
            a folder holds the home folder; but for the first, it is allowed if it is `confirmed`.
    """
    print(f'--update looks into {", ".join(collection.folders())}')
    for folder in collection.folders():
        if Path.home().is_relative_to(folder) and not confirmed:  # as a stranger's data base may ask
            raise UserError(f'--update: the data base names {folder}, which holds all your files; if you have embedded '
                            'it yourself, add --confirm')
        if not Path(folder).is_dir():
            raise UserError(f'--update: the folder {folder} is missing; if it is gone for good, use --remove '
                            f'{shlex.quote(folder)}')
    deleted, to_embed = [], []
    for item in collection.items():
        stamp = stamp_of(item.file)
        if stamp is None:
            deleted.append(item)
        elif tuple(stamp) != item.stamp:
            to_embed.append(item.with_stamp(stamp))
    if not confirmed:
        check_removal(collection, deleted)
    if deleted:
        collection.remove(deleted)
    for file, item in list(collection.broken.items()):
        if Path(file).is_file():  # not for a link to itself
            to_embed.append(item.with_stamp(stamp_of(file)))
        else:
            del collection.broken[file]
    print(f'{len(deleted):,} deleted images are removed; {len(to_embed):,} changed or broken ones are embedded')
    return to_embed


def check_removal(collection, deleted: list[CollectionItem]) -> None:
    """Raise a UserError if more than half of a folder's images were deleted, as it seems when a disk is not mounted."""
    counts = Counter(item.folder for item in collection.items())
    for folder, count in Counter(item.folder for item in deleted).items():
        if 2 * count > counts[folder]:
            raise UserError(f'--update: {count:,} of the {counts[folder]:,} images in {folder} are missing; is a disk '
                            'not mounted? If they were deleted, add --confirm, and they leave the collection')


def remove(patterns: list[str], collection, confirmed: bool) -> None:
    """Remove the images that match patterns, and forget such broken files.

    Raises:
        UserError: if there are none, or if all images would be removed and that is not `confirmed`.
    """
    removed = filter_items(list(collection.items()), patterns)
    forgotten = filter_items(list(collection.broken.values()), patterns)
    if not removed and not forgotten:
        raise UserError(f'--remove {" ".join(patterns)} matches none of the {len(collection):,} images; --list prints '
                        'them')
    if len(removed) == len(collection) and removed and not confirmed:
        raise UserError(f'--remove {" ".join(patterns)} matches all {len(collection):,} images; to remove them all, '
                        'add --confirm')
    if removed:
        collection.remove(removed)
    for item in forgotten:
        del collection.broken[item.file]
    print(f'{len(removed):,} images removed' + (f', {len(forgotten):,} broken files forgotten' if forgotten else ''))


def resolve_move(old: str, new: str, folders: list[str]) -> dict[str, str]:
    """Return {folder: where it is now} of the folders of a collection that --move names.

    Raises:
        UserError: if OLD is none of the folders and holds none, NEW is no folder, or it overlaps one that stays.
    """
    moved = {}
    for spelling in (os.path.abspath(old), os.path.realpath(old)):
        moved = moved or {folder: str(Path(new).resolve() / Path(folder).relative_to(spelling))
                          for folder in folders if Path(folder).is_relative_to(spelling)}
    if not moved:
        raise UserError(f'--move {old} is no folder of the collection (there are: {", ".join(folders)})')
    for folder in moved.values():
        if not Path(folder).is_dir():
            raise UserError(f'--move: {folder} is not a folder; name the one that holds the images now')
    for folder in moved.values():
        for other in (name for name in folders if name not in moved):
            if Path(folder).is_relative_to(other) or Path(other).is_relative_to(folder):
                raise UserError(f'--move: {folder} overlaps {other}, which is in the collection already; --remove one '
                                'of the two')
    return moved


def move(old: str, new: str, collection: FileCollection, confirmed: bool) -> None:
    """Give the images of a folder that was moved their new paths, and the times that copied files have now.

    A file of the same size is taken for the same.

    Raises:
        UserError: as `resolve_move`, or if files are missing or differ and that is not `confirmed`; those that do keep
            their stamps, so that --update finds them.
    """
    folders = resolve_move(old, new, collection.folders())
    by_file, differing = {}, []
    for item in (*collection.items(), *collection.broken.values()):
        moved = item._replace(folder=folders.get(item.folder, item.folder))
        stamp = stamp_of(moved.file) if item.folder in folders else item.stamp
        if stamp is not None and stamp[0] == item.size:
            moved = moved.with_stamp(stamp)
        else:
            differing.append(moved.file)
        by_file[item.file] = moved
    if differing and not confirmed:
        raise UserError(f'--move: {len(differing):,} files are missing in {new} or have other sizes, the first: '
                        f'{differing[0]}; to move the others all the same, add --confirm, and then call --update')
    collection.move(by_file)
    print(f'{sum(item.folder in folders.values() for item in collection.items()):,} images are in {new} now')


def change(args, collection, model: EmbeddingNet | None, device: torch.device) -> None:
    """Update, remove and add images as the command line says."""
    to_embed = {}  # file -> item: --update and --images may find the same ones
    lost = []
    if args.move:
        move(*args.move, collection, args.confirm)
    if args.update:
        to_embed |= {item.file: item for item in update(collection, args.confirm)}
    if args.remove:
        remove(args.remove, collection, args.confirm)
        for item in filter_items(list(to_embed.values()), args.remove):
            del to_embed[item.file]
    if args.images is not None:
        to_embed |= {item.file: item for item in scan_folder(args.images, args.exclude or [], args.labels, collection)}
    if args.model is not None and args.qdrant is None:
        keep_model(args.model, Path(args.data_base))
    if to_embed:
        start, items = time.perf_counter(), list(to_embed.values())
        if collection.fingerprint is None:
            model = build_pretrained(args.backbone_type, args.weights, args.image_size, args.pooling, device)
            settings = pretrained_settings(args.weights, model.config.image_size) | asked_settings(args)
            settings['feature_dim'] = args.feature_dim or DEFAULT_DIM
            items, lost = fit_model(model, settings, args.feature_dim, items, collection, args.num_workers, device)
        model = model or load_kept_model(Path(args.data_base), collection.fingerprint, device)
        settings = collection.origin['args'] | asked_settings(args)
        lost += embed_items(items, collection, model, settings, args.num_workers, device)
        print(f'{len(to_embed):,} images in {time.perf_counter() - start:.0f} s')
    collection.finish()
    if args.qdrant is None:
        sample_file(Path(args.data_base)).unlink(missing_ok=True)
    if collection.broken:
        named = ', '.join(list(collection.broken)[:MAX_NAMED]) + (' ...' if len(collection.broken) > MAX_NAMED else '')
        print(f'{len(collection.broken):,} images cannot be read and are left out: {named}')
    if lost:
        raise UserError(describe_lost(lost))


# ---------------------------------------------------- duplicates ---------------------------------------------------
def find_duplicates(threshold: float, collection: FileCollection) -> None:
    """Write the groups of images that pairs of at least this cosine connect to a CSV file, and draw them.

    A row is an image and its cosine to the first image of its group.

    Raises:
        UserError: if a file of another program would be replaced.
    """
    stem = collection.file.with_suffix('')
    table, figure = Path(f'{stem}_duplicates.csv'), Path(f'{stem}_duplicates.png')
    if table.exists() and not table.read_bytes().startswith(','.join(DUPLICATE_COLUMNS).encode()):
        raise UserError(f'{table} exists, was not written by this script and is not replaced; move it away')
    check_replaceable(figure, '--duplicates')
    items, features = list(collection.items()), collection.data_base.test.features.float()
    groups = group_similar(features, threshold)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(DUPLICATE_COLUMNS)
    for number, group in enumerate(groups, start=1):
        for index, similarity in zip(group[1:], similarities_to_first(features, group), strict=True):
            writer.writerow([number, f'{similarity:.6f}', items[group[0]].file, items[index].file])
    write_atomically(table, lambda file: file.write(text.getvalue().encode()))
    print(f'{sum(map(len, groups)):,} images in {len(groups):,} groups of at least {threshold:g}: {table}')
    if groups:
        print(draw_groups(groups[:MAX_GROUPS], items, features, figure))


def draw_groups(groups: list[list[int]], items: list[CollectionItem], features: torch.Tensor, target: Path) -> Path:
    """Draw a row per group of duplicates: its first image, then the others; returns the path of the figure."""
    from retrieval.figures import draw_rows

    rows = []
    for number, (first, *others) in enumerate(groups, start=1):
        others = others[:MAX_IN_GROUP]
        similarities = similarities_to_first(features, [first, *others])
        retrieved = [{'file': Path(items[index].file), 'class': items[index].label, 'similarity': similarity,
                      'correct': None} for index, similarity in zip(others, similarities, strict=True)]
        rows.append({'query': Path(items[first].file), 'class': items[first].label, 'note': f'group {number}',
                     'retrieved': retrieved})
    return draw_rows(rows, target)


# ---------------------------------------------------- tables -------------------------------------------------------
def write_csv(target, items: list[CollectionItem], features: torch.Tensor) -> None:
    """Write a line per image: file, class and each feature, a part at a time."""
    import pandas as pd

    for start in range(0, len(items), SAVED_EVERY):
        part = items[start:start + SAVED_EVERY]
        table = pd.DataFrame({'image': [item.file for item in part], 'class': [item.label for item in part]})
        columns = pd.DataFrame(features[start:start + SAVED_EVERY].float().numpy()).add_prefix('feature_')
        table.join(columns).to_csv(target, index=False, header=start == 0)


def write_npy(target, items: list[CollectionItem], features: torch.Tensor) -> None:
    """Write the features as a NumPy array (N, D)."""
    import numpy as np

    np.save(target, features.numpy())


def write_parquet(target, items: list[CollectionItem], features: torch.Tensor) -> None:
    """Write a row per image: file, class and a list of features."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError('--parquet needs pyarrow; install it with: pip install pyarrow') from None
    rows = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(features.numpy().reshape(-1)), features.shape[1])
    parquet.write_table(pyarrow.table({'image': [item.file for item in items], 'class': [item.label for item in items],
                                       'features': rows}), target)


TABLE_WRITERS = {'csv': write_csv, 'npy': write_npy, 'parquet': write_parquet}


def write_tables(args, collection: FileCollection) -> None:
    """Write the features for other programs, as --csv, --npy and --parquet say.

    Raises:
        UserError: if a file exists and --overwrite is not set, or pyarrow is missing.
    """
    targets = {flag: Path(getattr(args, flag)) for flag in TABLE_FLAGS if getattr(args, flag)}
    beside = RunFiles.beside(collection.file)
    taken = {path.resolve() for path in (collection.file, beside.model, beside.onnx)}
    for flag, target in targets.items():
        if target.resolve() in taken:
            raise UserError(f'--{flag} {target} is the data base, its model, or named twice; name another file')
        taken.add(target.resolve())
        if target.exists() and not args.overwrite:
            raise UserError(f'--{flag} {target} exists already; add --overwrite to replace it')
        make_folder(f'--{flag}', target.parent)
    items, features = list(collection.items()), collection.data_base.test.features
    for flag, target in targets.items():
        write_atomically(target, lambda file, write=TABLE_WRITERS[flag]: write(file, items, features))
        print(f'{target}: {len(items):,} images')


# ---------------------------------------------------- main ----------------------------------------------------------
def run(args, collection, name: str, model: EmbeddingNet | None, device: torch.device) -> None:
    """Change a collection, then print and write what the command line asks for.

    Raises:
        UserError: if the collection is new and none of its images can be read.
    """
    try:
        change(args, collection, model, device)
    except KeyboardInterrupt as stop:
        message = ''
        if collection.num_added:
            message = f'{collection.num_added:,} new images are saved; the same command continues'
        raise type(stop)(message) from None
    if not len(collection):
        if args.images is not None:
            raise UserError(f'--images {args.images}: none of the images can be read')
        print(f'{name} has no images left')
        return
    if args.list is not None:
        for item in filter_items(list(collection.items()), [args.list]):
            print(f'{item.path}  {item.label}'.rstrip())
    if args.duplicates is not None:
        find_duplicates(args.duplicates, collection)
    if args.csv or args.npy or args.parquet:
        write_tables(args, collection)
    print(f'{name}: {len(collection):,} images of {len(collection.folders()):,} folders')
    if args.images is not None:
        flags = ['--data_base', args.data_base]
        if args.qdrant is not None:
            flags = ['--qdrant', args.qdrant, '--collection', args.collection, '--model', args.model]
        print(f'next:\n  {shlex.join(["python", "serve.py", *flags])}')


def main(args) -> None:
    """Open the data base or Qdrant collection of the command line, and do what it says."""
    device = select_device(args.device)
    if args.model is not None:
        check_device(args.model, device)
    if args.qdrant is not None:
        collection, model = open_qdrant(args.qdrant, args.collection, args.model, device,
                                        create=args.images is not None, dtype=DTYPES.get(args.dtype))
        with contextlib.closing(collection):
            run(args, collection, f'{args.collection} in {args.qdrant}', model, device)
        return
    file = Path(args.data_base)
    make_folder('--data_base', file.parent)
    files = RunFiles.beside(file)
    with files.locked(f'--data_base {file}: another process is changing it; wait until it has finished'):
        remove_torn(file.parent, [file.name, files.model.name, files.onnx.name])
        finish_refit(file)
        collection = open_collection(args)
        if args.refit:
            refit(args, collection, device)
            collection = open_collection(args)
        run(args, collection, str(file), None, device)


if __name__ == '__main__':
    run_script(lambda: main(ARGS))
