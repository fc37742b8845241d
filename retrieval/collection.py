"""Collections: embedded images that can be searched, added, removed and relabelled.

    collection = FileCollection(Path('museum.pth'))    # a data base file of embed.py
    collection.add(items, features)                    # saved at once, as a part of its own
    collection.finish()                                # merges the parts; from now on they are searched
    collection.search(features, k=10)                  # for each query [(index, similarity), ...], nearest first
    collection.item(7)                                 # the image with this index

`SearchableImages` searches the data base of a run or of embed.py in memory. `FileCollection` also changes it, and
`retrieval.qdrant.QdrantCollection` has the same methods for a Qdrant server. embed.py reads four attributes of the
latter two: `origin`, `fingerprint`, `broken` and `num_added`.
"""
import fnmatch
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from common.errors import UserError
from common.files import are_texts, check_fields, compose, is_inside, is_whole, load, save
from retrieval.database import DataBase, OpenDataBase, Sources, Subset, are_file_records, is_features, load_data_base
from retrieval.nearest import Nearest

DTYPES = {'float32': torch.float32, 'float16': torch.float16}
PART_SCHEMA = {'fingerprint': str, 'folders': are_texts, 'images': are_texts, 'labels': are_texts, 'sizes': list,
               'times': list, 'features': torch.is_tensor, 'broken': are_file_records}


# ---------------------------------------------------- images of a collection ---------------------------------------
class CollectionItem(NamedTuple):
    """An image of a collection, with the size and time that its file had when it was embedded."""

    folder: str  # absolute
    path: str  # relative to the folder
    label: str  # name of the class, '' if it is unknown
    size: int  # bytes
    time: int  # last change, ns

    @property
    def file(self) -> str:
        """The absolute path of the file, which identifies the image."""
        return f'{self.folder}/{self.path}'

    @property
    def stamp(self) -> tuple[int, int]:
        """Size and time: if they are unchanged, the image need not be embedded again."""
        return self.size, self.time

    def with_stamp(self, stamp) -> 'CollectionItem':
        """Return the image with another size and time."""
        size, time = stamp
        return self._replace(size=size, time=time)


def filter_items(items: list[CollectionItem], patterns: list[str]) -> list[CollectionItem]:
    """Return the images whose path, relative or absolute, matches a pattern or lies below the folder that it names.

    Both are compared in Unicode's composed form.
    """
    def fits(path: str, pattern: str) -> bool:
        path = compose(path)
        return path == pattern or fnmatch.fnmatchcase(path, pattern) or path.startswith(f'{pattern.rstrip("/")}/')

    patterns = [compose(pattern) for pattern in patterns]
    return [item for item in items
            if any(fits(item.path, pattern) or fits(item.file, pattern) for pattern in patterns)]


# ---------------------------------------------------- search -------------------------------------------------------
class SearchableImages:
    """The images of a data base, to be searched in memory; an image's index is its row.

    Args:
        data_base: with sources; None if there are no images.
        resident: optimise for many searches, see `retrieval.nearest.Nearest`.
    """

    supports_binary = True  # search by Hamming distance

    def __init__(self, data_base: DataBase | None, resident: bool = False):
        self.resident = resident
        self.origin = {} if data_base is None else data_base.origin
        self.set_data_base(data_base)

    def set_data_base(self, data_base: DataBase | None) -> None:
        """Search in this data base from now on."""
        self.data_base = data_base
        self.nearest = None  # Nearest, from the first search on
        self.texts = None  # what `find` looks in, from its first call on

    @classmethod
    def of_run(cls, opened: OpenDataBase) -> 'SearchableImages':
        """Return the searched subset of a run's data base, or all images of a collection's."""
        data_base = opened.data_base
        if data_base.sources is None:
            subset = data_base.subsets[data_base.searched]
            zeros = torch.zeros(len(subset.images), dtype=torch.int64)
            sizes = data_base.sizes.get(data_base.searched, zeros.tolist())
            sources = Sources([str(opened.roots[0].absolute())], zeros, zeros, '', {})
            data_base = DataBase(data_base.class_names, subset, origin=data_base.origin, sources=sources,
                                 sizes={'test': sizes})
        return cls(data_base, resident=True)

    def __len__(self) -> int:
        return 0 if self.data_base is None else len(self.data_base.test.images)

    def item(self, index: int) -> CollectionItem:
        """Return the image with this index; raises IndexError if there is none."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        sources, test = self.data_base.sources, self.data_base.test
        return CollectionItem(
            folder=sources.folders[int(sources.folder_of[index])], path=test.images[index],
            label=self.data_base.class_of(int(test.labels[index])) or '', size=self.data_base.sizes['test'][index],
            time=int(sources.times[index]))

    def items(self, folder: str | None = None) -> Iterator[CollectionItem]:
        """Yield all images, or those of a folder, in the order of their indices."""
        if self.data_base is None:
            return
        sources, test = self.data_base.sources, self.data_base.test
        names = [*self.data_base.class_names, '']  # the label -1, no class, selects the last one
        for folder_index, path, label, size, time in zip(
                sources.folder_of.tolist(), test.images, test.labels.tolist(), self.data_base.sizes['test'],
                sources.times.tolist(), strict=True):
            if folder in (None, sources.folders[folder_index]):
                yield CollectionItem(sources.folders[folder_index], path, names[label], size, time)

    def folders(self) -> list[str]:
        """Return the folders of the images."""
        return [] if self.data_base is None else list(self.data_base.sources.folders)

    def search(self, features: torch.Tensor, k: int, binary: bool = False) -> list[list[tuple[int, float]]]:
        """Return the k nearest images [(index, similarity), ...] of each query (Q, D), see `Nearest.search`."""
        if self.data_base is None:
            return [[] for _ in features]
        self.nearest = self.nearest or Nearest(self.data_base.test.features, self.resident)
        return self.nearest.search(features, k, binary)

    def feature(self, index: int) -> torch.Tensor:
        """Return the features (D,) of an image."""
        return self.data_base.test.features[index].float()

    def random_index(self) -> int:
        """Return the index of a random image."""
        return random.randrange(len(self))

    def find(self, words: str, limit: int) -> tuple[int, list[int]]:
        """Return the number of images whose path and class contain all words, and the indices of the first ones."""
        if self.texts is None:
            self.texts = [compose(f'{item.path} {item.label}').lower() for item in self.items()]
        parts = compose(words).lower().split()
        indices = [index for index, text in enumerate(self.texts) if all(part in text for part in parts)]
        return len(indices), indices[:limit]

    def index_of(self, path: str) -> int | None:
        """Return the index of the image of a relative or absolute path; None if no image, or several, have it."""
        path = compose(path)
        indices = [index for index, image in enumerate(map(compose, self.data_base.test.images))
                   if path == image or path.endswith(f'/{image}') and path == compose(self.item(index).file)]
        return indices[0] if len(indices) == 1 else None

    def close(self) -> None:
        """No-op: the file is not kept open."""


# ---------------------------------------------------- collections in a file ----------------------------------------
class FileCollection(SearchableImages):
    """A collection in a data base file, which a process may change while no other one does.

    `add` saves images as FILE.parts/00000000.pth and so on. `finish`, or opening the collection again after the
    process was killed, merges these parts into the file.

    Args:
        file: the data base; it is created with the first images.
        origin: for a new file: `args` and the other keys of `retrieval.database.ORIGIN`.
        fingerprint: of the model; None accepts that of the file, and in a new file waits for `set_model`.
        dtype: of the features; None: that of the file, float32 for a new one.

    Attributes:
        broken: {file: item} of the files that could not be read.
        num_added: images added since the collection was opened.

    Raises:
        UserError: if the file belongs to a run or to another model, or the parts are damaged.
    """

    def __init__(self, file: Path, origin: dict | None = None, fingerprint: str | None = None,
                 dtype: torch.dtype | None = None):
        super().__init__(load_data_base(file) if file.is_file() else None)
        self.broken = {}
        if self.data_base is not None:
            sources = self.data_base.sources
            if sources is None:
                raise UserError(f'--data_base {file} belongs to a training run, and its images are the test images; '
                                'name another file to embed into')
            if fingerprint not in (None, sources.fingerprint):
                raise UserError(f'--model: {file} holds embeddings of another model, and similarities between models '
                                'are meaningless; leave --model out, or name another --data_base')
            origin, fingerprint = self.data_base.origin, sources.fingerprint
            dtype = dtype or self.data_base.test.features.dtype
            self.broken = broken_from_records(sources.broken, sources.folders)
        self.file, self.parts_folder = file, Path(f'{file}.parts')
        self.set_model(origin, fingerprint)
        self.dtype = dtype or torch.float32
        self.num_added = 0
        self.parts = []  # [(items, file), ...] that are saved, and not merged yet
        self.read_parts()
        self.merge_parts()

    def set_model(self, origin: dict, fingerprint: str) -> None:
        """Say which model embeds the images of a new collection that was opened without one."""
        self.origin = {**origin, 'args': {**origin['args'], 'data_name': self.file.stem}}
        self.fingerprint = fingerprint

    # ------------------------------------------------ changes ------------------------------------------------------
    def add(self, items: list[CollectionItem], features: torch.Tensor, broken: list[CollectionItem] = ()) -> None:
        """Save images with their features (n, D), unit rows; they replace earlier ones of the same files.

        Args:
            broken: images that cannot be read: they are remembered, and removed from the collection.
        """
        if not items and not broken:
            return
        self.parts_folder.mkdir(parents=True, exist_ok=True)
        file = self.parts_folder / f'{len(self.parts):08d}.pth'
        save({'fingerprint': self.fingerprint, 'folders': [item.folder for item in items],
              'images': [item.path for item in items], 'labels': [item.label for item in items],
              'sizes': [item.size for item in items], 'times': [item.time for item in items],
              'features': features.to(self.dtype), 'broken': broken_to_records(broken)}, file)
        self.register_part(items, file, {item.file: item for item in broken})
        self.num_added += len(items)

    def remove(self, items: list[CollectionItem]) -> None:
        """Remove images, and save; without any image left, the file is deleted."""
        self.merge_parts()
        removed = {item.file for item in items}
        all_items = list(self.items())
        rows = [row for row, item in enumerate(all_items) if item.file not in removed]
        features = self.data_base.test.features[torch.tensor(rows, dtype=torch.int64)]
        self.write([all_items[row] for row in rows], features)

    def relabel(self, items: list[CollectionItem]) -> None:
        """Give images the classes that these items have, and save."""
        self.merge_parts()
        labels = {item.file: item.label for item in items}
        self.write([item._replace(label=labels.get(item.file, item.label)) for item in self.items()],
                   self.data_base.test.features)

    def move(self, by_file: dict[str, CollectionItem]) -> None:
        """Replace each image and each broken file by the item {file: item}, and save."""
        self.merge_parts()
        self.broken = {by_file[file].file: by_file[file] for file in self.broken}
        self.write([by_file[item.file] for item in self.items()], self.data_base.test.features)

    def finish(self) -> None:
        """Merge what was added, convert the features to the dtype asked for, and save which files are broken."""
        self.merge_parts()
        if self.data_base is not None and (self.data_base.test.features.dtype != self.dtype
                                           or self.data_base.sources.broken
                                           != broken_to_records(self.broken.values())):
            self.write(list(self.items()), self.data_base.test.features)

    # ------------------------------------------------ parts and file -----------------------------------------------
    def register_part(self, items: list[CollectionItem], file: Path, broken: dict[str, CollectionItem]) -> None:
        """Note a part that is on the disk."""
        self.parts.append((items, file))
        for item in items:
            self.broken.pop(item.file, None)
        self.broken |= broken

    def read_parts(self) -> None:
        """Register the parts that a killed process has left.

        Raises:
            UserError: if they are damaged, or belong to another model.
        """
        files = sorted(self.parts_folder.glob('*.pth')) if self.parts_folder.is_dir() else []
        dim = None if self.data_base is None else self.data_base.test.features.shape[1]
        for file in files:
            contents = load_part(file, dim)
            dim = contents['features'].shape[1]
            if contents['fingerprint'] != self.fingerprint:
                raise UserError(f'--model: {self.parts_folder} holds what an interrupted call embedded with another '
                                'model; continue with that model, or delete the folder')
            columns = (contents[name] for name in ('folders', 'images', 'labels', 'sizes', 'times'))
            items = [CollectionItem(*values) for values in zip(*columns, strict=True)]
            folders = [*self.folders(), *dict.fromkeys(contents['folders'])]
            self.register_part(items, file, broken_from_records(contents['broken'], folders))

    def merge_parts(self) -> None:
        """Merge the parts into the file; of several versions of an image the last one counts."""
        if not self.parts:
            return
        blocks = list(self.parts)
        if self.data_base is not None:
            blocks.insert(0, (list(self.items()), None))
        last = {item.file: (block, row) for block, (items, _) in enumerate(blocks) for row, item in enumerate(items)}
        for file in self.broken:
            last.pop(file, None)
        merged, features = [], None
        for block, (items, file) in enumerate(blocks):
            source = self.data_base.test.features if file is None else load(file, 'part of a data base')['features']
            rows = [row for row, item in enumerate(items) if last.get(item.file) == (block, row)]
            if features is None:  # allocated once: there may be millions of rows
                features = torch.empty(len(last), source.shape[1], dtype=self.dtype)
            torch.index_select(source.to(self.dtype), 0, torch.tensor(rows, dtype=torch.int64),
                               out=features[len(merged):len(merged) + len(rows)])
            merged += [items[row] for row in rows]
        self.write(merged, features)

    def write(self, items: list[CollectionItem], features: torch.Tensor) -> None:
        """Write the file with these images and features (n, D), then delete the parts, which are in it now."""
        if items:
            data_base = self.make_data_base(items, features)
            data_base.save(self.file)
        else:
            data_base = None
            self.file.unlink(missing_ok=True)
        self.set_data_base(data_base)
        if self.parts_folder.is_dir():
            shutil.rmtree(self.parts_folder)
        self.parts = []

    def make_data_base(self, items: list[CollectionItem], features: torch.Tensor) -> DataBase:
        """Return the data base of images and their features (n, D)."""
        folders = list(dict.fromkeys(item.folder for item in items))
        folder_index = {folder: index for index, folder in enumerate(folders)}
        class_names = list(dict.fromkeys(item.label for item in items if item.label))
        label_of = {name: label for label, name in enumerate(class_names)}
        labels = torch.tensor([label_of.get(item.label, -1) for item in items], dtype=torch.int64)
        sources = Sources(folders, torch.tensor([folder_index[item.folder] for item in items], dtype=torch.int64),
                          torch.tensor([item.time for item in items], dtype=torch.int64), self.fingerprint,
                          broken_to_records(self.broken.values()))
        return DataBase(class_names, Subset([item.path for item in items], labels, features.to(self.dtype)),
                        origin=self.origin, sizes={'test': [item.size for item in items]}, sources=sources)


def load_part(file: Path, dim: int | None) -> dict:
    """Load a part of a data base, with features of `dim` columns, or of any number for None.

    Raises:
        UserError: if it is damaged.
    """
    contents = load(file, 'part of a data base', PART_SCHEMA)
    count, features = len(contents['folders']), contents['features']

    def is_column(values: list, is_valid) -> bool:
        return len(values) == count and all(map(is_valid, values))

    check_fields(contents, {
        'folders': lambda values: is_column(values, os.path.isabs),
        'images': lambda values: is_column(values, is_inside),
        'labels': lambda values: is_column(values, lambda _: True),
        'sizes': lambda values: is_column(values, is_whole(0)),
        'times': lambda values: is_column(values, is_whole(-2**63)),
        'features': lambda _: is_features(features, count, dim or features.shape[-1])}, file, 'part of a data base')
    return contents


def broken_to_records(items) -> dict[str, list]:
    """Return {file: [bytes, time in ns, class]}, as data base files hold broken images."""
    return {item.file: [item.size, item.time, item.label] for item in items}


def broken_from_records(records: dict[str, list], folders: list[str]) -> dict[str, CollectionItem]:
    """Return {file: item} of what `broken_to_records` made; an image below none of the folders gets its parent folder.
    """
    broken = {}
    for file, (size, time, label) in records.items():
        folder = next((folder for folder in folders if file.startswith(f'{folder}/')), os.path.dirname(file))
        broken[file] = CollectionItem(folder, file[len(folder) + 1:], label, size, time)
    return broken
