"""A data base: embedded images with their paths and classes. What it holds, how it is saved, loaded and opened.

    data_base = load_data_base('results/RUN_data_base.pth')     # of a run, or a collection that embed.py made
    data_base.test.features                                     # (n, D), unit rows

A data base file is a plain dict: class_names, test_images, test_labels, test_features, gallery_... where there is a
gallery, train_proxies, train_class_names, args and what else ORIGIN lists. A collection also holds SOURCE_KEYS.
"""
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from common.errors import UserError
from common.files import are_texts, check_fields, check_paths, image_file, load, save
from common.results import RunFiles, find_result
from imagedata.raw_sets import find_root
from model import EmbeddingNet
from retrieval.model_file import SAVED_SETTINGS, load_model, model_fingerprint
from retrieval.onnx_file import OnnxNet

ORIGIN = ('args', 'epoch', 'made_with', 'seen_classes', 'open_set')  # what models and data bases say of their making
MARKED_RATE = 0.05  # share of right answers that may be called `no close match`
LONGEST_UNIT_ROW = 1.01  # a norm up to which a row passes as a unit row


# ---------------------------------------------------- what a file says of its making -----------------------------
def seen_classes(contents: dict) -> list[str]:
    """Return the names of the classes that a model was trained on, as far as its file or data base says it."""
    seen = contents.get('seen_classes', contents.get('train_class_names', []))
    return seen if are_texts(seen) else []


def check_seen(seen, measured: list[str], allowed: bool, what: str = 'test classes') -> list[str]:
    """Return the measured classes that were trained on.

    Args:
        seen: names of the classes that were trained on.
        measured: names of the classes to be measured, called `what` in the error.
        allowed: do not raise.

    Raises:
        UserError: if there are some, unless that is allowed.
    """
    seen = set(seen)
    both = [name for name in measured if name in seen]
    if both and not allowed:
        raise UserError(f'{len(both)} of {len(measured)} {what} were trained on, the first: {both[0]}; numbers on them '
                        'say nothing about unseen classes: measure others, or add --allow_seen')
    return both


def open_set_threshold(origin: dict) -> float | None:
    """Return the similarity below which an answer is called `no close match`, None if no threshold is worth it.

    It is the one that metrics.open_set_thresholds measured at MARKED_RATE, if it marks the answers to queries of absent
    classes at least twice as often as right answers: if such queries are as frequent as others, two of three marks are
    then right.
    """
    rows = origin.get('open_set')
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, dict) and row.get('rate') == MARKED_RATE and {type(row.get(key)) for key in (
                'threshold', 'marked')} == {float} and row['marked'] >= 200 * MARKED_RATE:
            return row['threshold']
    return None


# ---------------------------------------------------- data base ---------------------------------------------------
class Subset(NamedTuple):
    """Embedded images: paths below the data set's folder, labels (n,) int64, features (n, D) unit rows."""

    images: list
    labels: torch.Tensor
    features: torch.Tensor


@dataclass
class Sources:
    """Where the images of a collection come from, and what their files were when they were embedded."""

    folders: list[str]  # absolute
    folder_of: torch.Tensor  # (n,) int64, index of each image's folder
    times: torch.Tensor  # (n,) int64, last change of each file in ns; the sizes are those of the data base
    fingerprint: str  # of the model
    broken: dict[str, list]  # files that could not be read: [bytes, ns, class]


SOURCE_KEYS = {'folders': 'folders', 'folder_of': 'test_folders', 'times': 'test_times',
               'fingerprint': 'model_fingerprint', 'broken': 'broken'}  # attribute of Sources -> key in the file


@dataclass
class DataBase:
    """The embedded test images (queries) and the gallery, if there is one, with the names of their classes.

    The label -1 stands for an image without a class; only collections have such images.
    """

    class_names: list[str]  # by label
    test: Subset
    gallery: Subset | None = None  # what queries are searched in; without it, in each other
    origin: dict = field(default_factory=dict)  # keys of ORIGIN
    proxies: dict = field(default_factory=dict)  # train_proxies (C, D) and train_class_names
    sizes: dict = field(default_factory=dict)  # subset -> bytes of its image files, to notice changed ones
    sources: Sources | None = None  # of a collection

    @property
    def subsets(self) -> dict[str, Subset]:
        """The subsets by name: `test` and perhaps `gallery`."""
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
        tensors = []
        for subset in (self.test, self.gallery):
            if subset is None:
                tensors += [None, None]
                continue
            labelled = subset.labels >= 0
            if not labelled.any():
                raise UserError('no image of this data base has a class, so there is nothing to measure; embed the '
                                'images again with --labels')
            features, labels = subset.features, subset.labels
            if not labelled.all():
                features, labels = features[labelled], labels[labelled]
            if features.element_size() == 2:  # float16
                features = features.float()
            tensors += [features.to(device), labels.to(device)]
        return tuple(tensors)

    def add_proxies(self, class_names: list[str], proxies: torch.Tensor | None) -> None:
        """Keep the names of the training classes and their unit proxies (C, D), if the loss has proxies."""
        self.proxies = {'train_class_names': class_names}
        if proxies is not None:
            self.proxies['train_proxies'] = proxies.cpu()

    def save(self, path: Path) -> None:
        """Save as a plain dict; atomic."""
        subsets = {f'{name}_{part}': value for name, subset in self.subsets.items()
                   for part, value in subset._asdict().items()}
        sizes = {f'{name}_sizes': value for name, value in self.sizes.items()}
        sources = {}
        if self.sources is not None:
            sources = {key: getattr(self.sources, name) for name, key in SOURCE_KEYS.items()}
        save({'class_names': self.class_names, **subsets, **sizes, **self.proxies, **self.origin, **sources}, path)


# ---------------------------------------------------- loading -----------------------------------------------------
def load_data_base(path: str | Path) -> DataBase:
    """Load a data base, and check that its parts fit each other.

    Raises:
        UserError: if the file is missing, corrupt, empty, or not a data base of this project.
    """
    contents = load(path, 'data base', {
        'test_images': are_texts, 'test_labels': torch.is_tensor, 'test_features': lambda value: value.ndim == 2,
        'class_names': are_texts, 'args': dict})
    check_fields(contents['args'], SAVED_SETTINGS, path, 'data base')
    dim, has_gallery = contents['test_features'].shape[1], any(str(key).startswith('gallery_') for key in contents)
    names = ('test', 'gallery') if has_gallery else ('test',)
    subsets = {name: load_subset(contents, name, dim, path) for name in names}
    sizes = {}
    for name, subset in subsets.items():
        value = contents.get(f'{name}_sizes')
        if isinstance(value, list) and len(value) == len(subset.images):
            sizes[name] = value
    return DataBase(contents['class_names'], **subsets, sizes=sizes, sources=load_sources(contents, path),
                    origin={key: contents[key] for key in ORIGIN if key in contents},
                    proxies={key: contents[key] for key in ('train_proxies', 'train_class_names') if key in contents})


def load_subset(contents: dict, name: str, dim: int, path: str | Path) -> Subset:
    """Return a subset of a file's contents whose features have `dim` columns; raises UserError if it is damaged."""
    images = contents.get(f'{name}_images')
    count, num_classes = len(images) if are_texts(images) else 0, len(contents['class_names'])

    def are_labels(labels) -> bool:
        return (labels.layout == torch.strided and labels.is_contiguous() and labels.dtype == torch.int64
                and labels.shape == (count,) and int(labels.min()) >= -1 and int(labels.max()) < num_classes)

    check_fields(contents, {
        f'{name}_images': lambda _: count > 0, f'{name}_labels': are_labels,
        f'{name}_features': lambda features: is_features(features, count, dim)}, path, 'data base')
    subset = Subset(images, contents[f'{name}_labels'], contents[f'{name}_features'])
    if longest_row(subset.features) > LONGEST_UNIT_ROW:  # metrics.py reports rows that are not finite
        raise UserError(f'{path}: the {name} features are not unit rows, so their products are not cosines; train '
                        'again')
    check_paths(path, subset.images)
    return subset


def load_sources(contents: dict, path: str | Path) -> Sources | None:
    """Return the sources of a collection's contents, None for a run's; raises UserError if they are damaged."""
    if 'folders' not in contents:
        return None
    count = len(contents['test_images'])

    def is_folder(folder: str) -> bool:
        return Path(folder).is_absolute() and '\0' not in folder and '..' not in Path(folder).parts

    def is_column(value) -> bool:
        return value.layout == torch.strided and value.dtype == torch.int64 and value.shape == (count,)

    check_fields(contents, {
        'folders': lambda folders: are_texts(folders) and all(map(is_folder, folders)),
        'test_folders': lambda column: is_column(column) and int(column.min()) >= 0
        and int(column.max()) < len(contents['folders']),
        'test_times': is_column, 'test_sizes': lambda sizes: type(sizes) is list and len(sizes) == count
        and all(type(size) is int for size in sizes),
        'model_fingerprint': str, 'broken': are_file_records}, path, 'collection')
    return Sources(**{name: contents[key] for name, key in SOURCE_KEYS.items()})


def are_file_records(value) -> bool:
    """Tell whether a value is {file: [bytes, time in ns, class]}."""
    return type(value) is dict and are_texts(list(value)) and all(
        type(record) is list and list(map(type, record)) == [int, int, str] for record in value.values())


def is_features(value, count: int, dim: int) -> bool:
    """Tell whether a value of an untrusted file can be used as features (count, dim)."""
    return (torch.is_tensor(value) and value.layout == torch.strided and value.device.type == 'cpu'
            and value.is_contiguous() and not value.requires_grad and value.is_floating_point()
            and value.shape == (count, dim) and dim > 0)


def longest_row(features: torch.Tensor) -> float:
    """Return the largest norm of the rows of features (n, D); rows that are not finite count as 0."""
    norms = (torch.linalg.vector_norm(part.double(), dim=1) for part in features.split(2**14))  # in parts: memory
    return max(norm.nan_to_num(nan=0.0).amax().item() for norm in norms)


# ---------------------------------------------------- with its images and its model ------------------------------
class OpenDataBase(NamedTuple):
    """A data base with the files that belong to it."""

    data_base: DataBase
    files: RunFiles  # beside it: model, statistics, ...
    roots: list[Path]  # folders of its images: that of the data set, or those of a collection

    def root_of(self, index: int) -> int:
        """Return the index of the folder that an image of a collection lies in, 0 for that of a run."""
        return 0 if self.data_base.sources is None else int(self.data_base.sources.folder_of[index])

    def image_file(self, subset: str, index: int) -> Path:
        """Return the file of an image; raises UserError if a link leads out of its folder."""
        return image_file(self.roots[self.root_of(index)], self.data_base.subsets[subset].images[index])


def open_data_base(name: str, results_dir: str, data_path: str) -> OpenDataBase:
    """Open a data base, named by its file or its name in the results folder, with the folders of its images.

    Raises:
        UserError: if it is missing or damaged, or its data set is missing.
    """
    file = find_result('--data_base', RunFiles.ENDINGS['data_base'], name, results_dir)
    data_base = load_data_base(file)
    if data_base.sources is not None:
        return OpenDataBase(data_base, RunFiles.beside(file), [Path(folder) for folder in data_base.sources.folders])
    data_name = data_base.origin['args']['data_name']
    root = find_root(data_path, data_name)
    if root is None:
        raise UserError(f'--data_path {data_path} holds no folder {data_name}, the data set of {file.name}; name the '
                        'folder that does, or rename it back')
    return OpenDataBase(data_base, RunFiles.beside(file), [root])


def load_model_of(opened: OpenDataBase, device: torch.device) -> tuple[EmbeddingNet | OnnxNet, dict]:
    """Load the model that made a data base, which lies beside it; returns it and the settings of its run.

    Raises:
        UserError: if it is missing, or another one.
    """
    file = opened.files.model_for(device)
    model, contents = load_model(file, device)
    origin, sources = opened.data_base.origin, opened.data_base.sources
    if sources is not None:
        is_same = model_fingerprint(contents) == sources.fingerprint
    elif isinstance(model, OnnxNet):  # exported again? what was measured of the model tells it from an earlier one
        is_same = {key: contents[key] for key in ORIGIN if key in contents} == json.loads(json.dumps(origin))
    else:
        is_same = contents['args'] == origin['args']
    if not is_same:
        raise UserError(f'{file} belongs to another run than the data base; keep the files of a run '
                        'together')
    return model, origin['args']


def warn_if_images_changed(opened: OpenDataBase) -> None:
    """Print how many images of a run's data base are missing now, or are not those that were embedded.

    A collection may be large, and `embed.py --update` brings it up to date, so nothing is printed for it.
    """
    if opened.data_base.sources is not None:
        return
    missing, changed = [], []
    for name, subset in opened.data_base.subsets.items():
        sizes = opened.data_base.sizes.get(name, [None] * len(subset.images))
        for image, size in zip(subset.images, sizes, strict=True):
            file = opened.roots[0] / image
            if not file.exists():
                missing.append(image)
            elif size is not None and file.stat().st_size != size:
                changed.append(image)
    for images, what in ((missing, 'are no longer in the data set'), (changed, 'have changed since it was made')):
        if images:
            print(f'{len(images):,} images of this data base {what}, the first: {images[0]}; train or evaluate again')
