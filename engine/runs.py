"""All that a run leaves: its name, lock, model, data base, checkpoint and statistics, and how each was made.

Named, described and read here, and nowhere else; train.py saves a model and a checkpoint, model.py makes a network of
the one, begin.py goes on from the other. PyTorch and pandas are imported where they are used.
"""
import hashlib
import json
import platform
import re
import subprocess
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from engine.errors import UserError, nearest, reason_of
from engine.files import (are_texts, check_fields, check_paths, is_folder_name, is_whole, load, lock, save,
                          write_atomically)
from engine.processes import world_size

if TYPE_CHECKING:
    import torch

CHECKPOINT_VERSION = 2
LARGEST = {'side': 8192, 'feature_dim': 65536}  # what a training accepts


# ---------------------------------------------------- names and places ---------------------------------------------
def run_name(*parts) -> str:
    """Join the parts of a run's name with `_`; but for letters, digits, `_` and `.` all becomes `-`."""
    words = [re.sub(r'[^\w.-]+', '-', unicodedata.normalize('NFC', str(part)).lower()) for part in parts]
    return '_'.join(word for word in words if word)


class RunFiles:
    """Where the files of a run lie: {folder}/{name}_{ending}."""

    ENDINGS = {'statistics': 'statistics.csv', 'model': 'model.pth', 'data_base': 'data_base.pth',
               'checkpoint': 'checkpoint.pth', 'curves': 'curves.png', 'curves_pdf': 'curves.pdf',
               'log': 'log.json'}

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = Path(folder), name
        for kind, ending in self.ENDINGS.items():
            setattr(self, kind, self.folder / f'{name}_{ending}')

    @classmethod
    def beside(cls, data_base: Path) -> 'RunFiles':
        """Return the files of the run that a data base is of."""
        return cls(data_base.parent, data_base.name.removesuffix('.pth').removesuffix('_data_base'))

    def all(self) -> list[Path]:
        """Return all paths, those of the pictures too."""
        return [getattr(self, kind) for kind in self.ENDINGS]

    def locked(self, message: str):
        """Return what holds the run's lock, see `lock`."""
        return lock(self.folder / f'.{self.name}.lock', message)


def find_result(flag: str, ending: str, name: str, results_dir: str) -> Path:
    """Return a file that a run left, or a folder with a model, as it is named or in the results folder.

    Raises:
        UserError: if there is none, with a list of its like.
    """
    def is_there(path: Path) -> bool:
        return path.is_file() or (path / 'config.json').is_file()

    file = Path(name) if is_there(Path(name)) else Path(results_dir) / name
    if not is_there(file):
        there = sorted(path.name for path in Path(results_dir).glob(f'*_{ending}'))
        raise UserError(f'{flag} {name} is neither a file nor in {results_dir}{nearest(name, there)} (there are: '
                        f'{", ".join(there) or "none; train first"})')
    return file


def provenance(device) -> dict:
    """Return what a file should say of the code and the machine that made it: commit, versions, device, processes."""
    import torch
    import torchvision

    def git(*words: str) -> str | None:
        try:
            result = subprocess.run(['git', '-C', str(Path(__file__).parent), *words], capture_output=True, text=True,
                                    check=True)
        except (OSError, subprocess.CalledProcessError):  # no git, or the code came without its history
            return None
        return result.stdout.strip()

    changes = git('status', '--porcelain', '--untracked-files=no')
    return {'commit': git('rev-parse', 'HEAD') or 'unknown', 'changed_since': 'unknown' if changes is None else
            'yes' if changes else 'no', 'python': platform.python_version(), 'torch': str(torch.__version__),
            'torchvision': str(torchvision.__version__), 'processes': world_size(),
            'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type}


# ---------------------------------------------------- statistics ---------------------------------------------------
def save_statistics(rows: list[dict], settings: dict, path: Path, made_with: dict | None = None) -> None:
    """Save a run's statistics as CSV, a row an epoch.

    Behind what was measured stand a column `args.NAME` per setting and `made.NAME` per part of `provenance`.
    """
    import pandas as pd

    plain = {f'args.{name}': ','.join(map(str, value)) if isinstance(value, (list, tuple)) else value
             for name, value in settings.items()} | {f'made.{name}': value for name, value in (made_with or {}).items()}
    table = pd.DataFrame([{**row, **plain} for row in rows])
    write_atomically(path, lambda file: table.to_csv(file, index=False))


def read_statistics(path: str | Path):
    """Read the statistics of a run: a DataFrame with a row an epoch.

    Raises:
        UserError: if the file is missing, empty, or no statistics file.
    """
    import pandas as pd

    path = Path(path)
    if not path.is_file():
        raise UserError(f'there is no statistics file {path}; train.py writes them as '
                        f'RUN_{RunFiles.ENDINGS["statistics"]}')
    try:
        table = pd.read_csv(path)
    except ValueError as error:  # of pandas, for an empty or ragged file, or one that is no text
        raise UserError(f'{path} is no statistics file ({reason_of(error)})') from None
    if 'epoch' not in table or not len(table) or not pd.api.types.is_numeric_dtype(table['epoch']) or \
            not table['epoch'].between(0, 2**31).all():
        raise UserError(f'{path} is no statistics file: it has no rows with an epoch')
    return table


# ---------------------------------------------------- model, checkpoint --------------------------------------------
# The settings of a run that are used after the training.
RUN = {'data_name': is_folder_name, 'crop_type': lambda value: value in ('uncropped', 'cropped'),
       'batch_size': is_whole(1), 'resize_size': is_whole(0, LARGEST['side']),
       'amp': lambda value: value in ('auto', 'on', 'off'),
       'recalls': lambda value: len(value) > 0 and all(map(is_whole(1), value)) and list(value) == sorted(value)}
MODEL = {'config': dict, 'state_dict': dict, 'args': dict}
CHECKPOINT = {
    'version': lambda value: value == CHECKPOINT_VERSION, 'args': dict, 'split': str, 'epoch': is_whole(1),
    'rows': lambda rows: type(rows) is list and all(
        type(row) is dict and row.keys() == rows[0].keys() and {type(value) for value in row.values()} <= {int, float}
        for row in rows), 'model': dict, 'criterion': dict, 'optimizer': dict, 'schedule': dict,
    'rng': lambda value: str(value.dtype) == 'torch.uint8'}


def load_folder(folder: Path) -> dict:
    """Load config.json and model.safetensors as one dict; raises UserError as `load` does."""
    if not (folder / 'config.json').is_file():
        raise UserError(f'{folder} holds no config.json; name a model file, or a folder that export.py wrote')
    try:
        from safetensors.torch import load_file

        contents = {**json.loads((folder / 'config.json').read_text(encoding='utf-8')),
                    'state_dict': load_file(folder / 'model.safetensors')}
    except ImportError:
        raise UserError(f'{folder} holds a model as safetensors; to read it: pip install safetensors') from None
    except Exception as error:  # safetensors has errors of its own, and JSON raises what it stumbles over
        raise UserError(f'{folder} cannot be read as a model ({reason_of(error)})') from None
    check_fields(contents, MODEL, folder, 'model')
    return contents


def load_model_file(path: str | Path) -> dict:
    """Load a `{run}_model.pth`, or a folder that export.py wrote: {'config', 'state_dict', 'args', ...}.

    Raises:
        UserError: if the file is missing, corrupt, or no model of this project.
    """
    contents = load_folder(Path(path)) if Path(path).is_dir() else load(path, 'model', MODEL)
    check_fields(contents['args'], RUN, path, 'model')
    check_fields(contents['config'], {'feature_dim': is_whole(0, LARGEST['feature_dim']),
                                      'image_size': is_whole(1, LARGEST['side'])}, path, 'model')
    return contents


def load_checkpoint_file(path: Path) -> dict:
    """Load a `{run}_checkpoint.pth`, whose parts are of the right types; raises UserError where they are not."""
    contents = load(path, 'checkpoint', CHECKPOINT)
    check_fields(contents, {'rows': lambda rows: len(rows) == contents['epoch']}, path, 'checkpoint')
    return contents


# ---------------------------------------------------- classes that were trained on ---------------------------------
def seen_classes(contents: dict) -> list[str]:
    """Return the names of the classes that the model of a file has been trained on, as far as the file says it."""
    seen = contents.get('seen_classes', contents.get('train_class_names', []))
    return seen if are_texts(seen) else []


def check_seen(seen, measured: list[str], allowed: bool, kind: str = 'test classes') -> list[str]:
    """Return which of the classes to be measured, of which an error speaks as `kind`, were trained on.

    Raises:
        UserError: if there are some, unless that is allowed.
    """
    trained = set(seen)
    both = [name for name in measured if name in trained]
    if both and not allowed:
        raise UserError(f'{len(both)} of {len(measured)} {kind} were trained on, the first: {both[0]}; numbers '
                        'on them say nothing of unseen classes: measure others, or add --allow_seen')
    return both


ORIGIN = ('args', 'epoch', 'made_with', 'seen_classes', 'absent')  # what models and data bases say of their making


def absent_threshold(origin: dict) -> float | None:
    """Return the similarity above which 5 % of the queries whose class is absent would still be answered.

    It is what metrics.absent_thresholds found for the run; None where a file does not say it.
    """
    rows = origin.get('absent')
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, dict) and row.get('rate') == 0.05 and type(row.get('threshold')) is float:
            return row['threshold']
    return None


# ---------------------------------------------------- data base ----------------------------------------------------
class Subset(NamedTuple):
    """Embedded images: paths below the data set's folder, labels (n,) int64, features (n, D) unit rows."""

    images: list
    labels: 'torch.Tensor'
    features: 'torch.Tensor'


@dataclass
class Sources:
    """Where the images of a collection are from, and what their files were when they were embedded."""

    folders: list[str]  # absolute
    numbers: 'torch.Tensor'  # (n,) int64, the folder of each image
    times: 'torch.Tensor'  # (n,) int64, of their last change, ns; their sizes are those of the data base
    fingerprint: str  # of the model
    broken: dict[str, list]  # files that could not be read: their size, time and class


@dataclass
class DataBase:
    """The embedded test images (queries) and the gallery, where there is one, with the names of their classes.

    An image of label -1 has no class: in the data base of a run there is none.
    """

    class_names: list[str]  # by label
    test: Subset
    gallery: Subset | None = None  # what queries are searched in; without it, in each other
    origin: dict = field(default_factory=dict)  # the run's args, epoch, made_with, seen_classes, absent
    proxies: dict = field(default_factory=dict)  # train_proxies (C, D) and train_class_names
    sizes: dict = field(default_factory=dict)  # subset -> bytes of its image files, by which a changed one is known
    sources: Sources | None = None  # of a collection, which embed.py made

    @property
    def subsets(self) -> dict[str, Subset]:
        """The subsets by their names, `test` and perhaps `gallery`."""
        return {'test': self.test} if self.gallery is None else {'test': self.test, 'gallery': self.gallery}

    @property
    def searched(self) -> str:
        """The name of the subset that queries are searched in."""
        return 'test' if self.gallery is None else 'gallery'

    def class_of(self, label: int) -> str | None:
        """Return the name of a class, None for the label -1."""
        return self.class_names[label] if label >= 0 else None

    def tensors(self, device=None) -> tuple:
        """Return query features and labels, then those of the gallery or None, as `retrieval_metrics` takes them.

        Images without a class are left out.

        Raises:
            UserError: if no image has a class.
        """
        found = []
        for subset in (self.test, self.gallery):
            if subset is not None and not (subset.labels >= 0).any():
                raise UserError('no image of this data base has a class, so that there is nothing to measure; embed '
                                'the images again with --labels')
            known = slice(None) if subset is None or (subset.labels >= 0).all() else subset.labels >= 0
            found += [None, None] if subset is None else [subset.features[known], subset.labels[known]]
        found = [tensor.float() if tensor is not None and tensor.element_size() == 2 else tensor for tensor in found]
        return tuple(tensor if tensor is None else tensor.to(device) for tensor in found)

    def save(self, path: Path) -> None:
        """Save as a plain dict: class_names, test_images, test_labels, test_features, gallery_..., train_..., args."""
        subsets = {f'{name}_{part}': value for name, subset in self.subsets.items()
                   for part, value in subset._asdict().items()}
        sizes = {f'{name}_sizes': value for name, value in self.sizes.items()}
        known = {} if self.sources is None else {key: getattr(self.sources, name) for name, key in SOURCES.items()}
        save({'class_names': self.class_names, **subsets, **sizes, **self.proxies, **self.origin, **known}, path)


# The names in a file of what Sources holds.
SOURCES = {'folders': 'folders', 'numbers': 'test_folders', 'times': 'test_times', 'fingerprint': 'model_fingerprint',
           'broken': 'broken'}


def fingerprint_of(config: dict, state_dict: dict) -> str:
    """Return a hash that two models share where they are built alike and have the same weights, hexadecimal."""
    import torch

    found = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, value in sorted(state_dict.items()):
        found.update(f'{name} {value.dtype} {tuple(value.shape)}'.encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def are_stamps(value) -> bool:
    """Tell whether a value is {file: [bytes, time in ns, class]}, or without the classes, as it was once."""
    return type(value) is dict and are_texts(list(value)) and all(
        type(stamp) is list and list(map(type, stamp)) in ([int, int, str], [int, int]) for stamp in value.values())


def load_sources(contents: dict, path: Path) -> Sources | None:
    """Return what the contents of a data base say of where its images are from; None for that of a run.

    Raises:
        UserError: if that cannot be used.
    """
    import torch

    if 'folders' not in contents:
        return None
    count = len(contents['test_images'])

    def is_column(value) -> bool:
        return value.layout == torch.strided and value.dtype == torch.int64 and value.shape == (count,)

    check_fields(contents, {
        'folders': lambda folders: are_texts(folders) and all(
            Path(folder).is_absolute() and '\0' not in folder and '..' not in Path(folder).parts for folder in folders),
        'test_folders': lambda numbers: is_column(numbers) and int(numbers.min()) >= 0
        and int(numbers.max()) < len(contents['folders']),
        'test_times': is_column, 'test_sizes': lambda sizes: type(sizes) is list and len(sizes) == count
        and all(type(size) is int for size in sizes),
        'model_fingerprint': str, 'broken': are_stamps}, path, 'collection')
    return Sources(**{name: contents[key] for name, key in SOURCES.items()})


def is_features(value, count: int, dim: int) -> bool:
    """Tell whether a value of a stranger's file can be used as features (count, dim)."""
    import torch

    return (torch.is_tensor(value) and value.layout == torch.strided and value.device.type == 'cpu'
            and value.is_contiguous() and not value.requires_grad and value.is_floating_point()
            and value.shape == (count, dim) and dim > 0)


def longest_row(features) -> float:
    """Return the largest norm of the rows of features (n, D), those that are not finite left out."""
    import torch

    norms = (torch.linalg.vector_norm(part.double(), dim=1) for part in features.split(2**14))  # a part: memory
    return max(norm.nan_to_num(nan=0.0).amax().item() for norm in norms)


def load_data_base(path: str | Path) -> DataBase:
    """Load a data base and check that its parts fit each other.

    Raises:
        UserError: if the file is missing, corrupt, empty, or no data base of this project.
    """
    import torch

    contents = load(path, 'data base', {
        'test_images': are_texts, 'test_labels': torch.is_tensor, 'test_features': lambda value: value.ndim == 2,
        'class_names': are_texts, 'args': dict})
    check_fields(contents['args'], RUN, path, 'data base')
    names, dim, subsets = contents['class_names'], contents['test_features'].shape[1], {}
    for name in ('test', 'gallery') if any(str(key).startswith('gallery_') for key in contents) else ('test',):
        count = len(contents[f'{name}_images']) if are_texts(contents.get(f'{name}_images')) else 0
        check_fields(contents, {
            f'{name}_images': lambda images, count=count: 0 < count == len(images),
            f'{name}_labels': lambda labels, count=count: labels.layout == torch.strided and labels.is_contiguous()
            and labels.dtype == torch.int64 and labels.shape == (count,) and int(labels.min()) >= -1
            and int(labels.max()) < len(names),
            f'{name}_features': lambda features, count=count: is_features(features, count, dim)}, path, 'data base')
        subset = Subset(*(contents[f'{name}_{part}'] for part in Subset._fields))
        if longest_row(subset.features) > 1.01:  # metrics.py counts those of NaN
            raise UserError(f'{path}: the {name} features are no unit rows, so that their products are no cosines; '
                            'train again')
        check_paths(path, subset.images)
        subsets[name] = subset
    parts = [{key: contents[key] for key in keys if key in contents} for keys in (
        ORIGIN, ('train_proxies', 'train_class_names'))]
    sizes = {name: found for name, subset in subsets.items()
             if isinstance(found := contents.get(f'{name}_sizes'), list) and len(found) == len(subset.images)}
    return DataBase(names, **subsets, origin=parts[0], proxies=parts[1], sizes=sizes,
                    sources=load_sources(contents, path))
