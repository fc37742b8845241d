"""A collection of embedded images: add to it, remove from it, search in it.

    collection = FileCollection(Path('museum.pth'))
    collection.add(items, features)
    collection.remove([(item.folder, item.path)])
    collection.search(features, number=10)      # [[(number of the image, similarity), ...] for each query]
    collection.item(7)                          # the image of a number

`FileCollection` is a data base file, as a run's; `SearchedImages` is what is only searched. What is added is saved at
once as a part of its own, in FILE.parts/, and joined with the rest before anything else is done, so that a process that
is killed loses nothing of it.
"""
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from browse import OpenRun
from engine.errors import UserError
from engine.files import are_texts, check_fields, is_inside, load, save
from engine.nearest import Nearest
from engine.runs import DataBase, Sources, Subset, are_stamps, is_features, load_data_base

DTYPES = {'float32': torch.float32, 'float16': torch.float16}
PART = {'fingerprint': str, 'folders': are_texts, 'images': lambda images: are_texts(images) and all(
    map(is_inside, images)), 'labels': are_texts, 'sizes': list, 'times': list, 'features': torch.is_tensor,
    'broken': are_stamps}


class Item(NamedTuple):
    """An image of a collection."""

    folder: str  # absolute
    path: str  # below the folder
    label: str  # the name of its class, or nothing
    size: int  # of its file when it was embedded, bytes
    time: int  # of its file's last change, ns


class SearchedImages:
    """Embedded images to search in.

    Args:
        base: with sources; None: there is no image.
        resident: for many searches, see engine.nearest.Nearest.
    """

    ranks_codes = True  # by Hamming distance

    def __init__(self, base: DataBase | None, resident: bool = False):
        self.base, self.resident, self.searched, self.names = base, resident, None, None

    @classmethod
    def of_run(cls, run: OpenRun) -> 'SearchedImages':
        """Return what is searched in a run's data base, or in a collection's."""
        base = run.data_base
        if base.sources is None:
            test, count = base.subsets[base.searched], len(base.subsets[base.searched].images)
            zeros = torch.zeros(count, dtype=torch.int64)
            base = DataBase(base.class_names, test, origin=base.origin, sizes={'test': [0] * count},
                            sources=Sources([str(run.roots[0].absolute())], zeros, zeros, '', {}))
        return cls(base, resident=True)

    def join(self) -> None:
        """Nothing is added to them."""

    def __len__(self) -> int:
        self.join()
        return 0 if self.base is None else len(self.base.test.images)

    def item(self, row: int) -> Item:
        """Return the image of a number, from 0; raises IndexError where there is none."""
        if not 0 <= row < len(self.base.test.images):
            raise IndexError(row)
        sources, test = self.base.sources, self.base.test
        return Item(sources.folders[int(sources.numbers[row])], test.images[row],
                    self.base.class_of(int(test.labels[row])) or '', self.base.sizes['test'][row],
                    int(sources.times[row]))

    def items(self, folder: str | None = None) -> Iterator[Item]:
        """Yield all images, or those of a folder, in the order of the file."""
        self.join()
        if self.base is not None:
            sources, names = self.base.sources, [*self.base.class_names, '']  # the label -1 is the last one
            for number, path, label, size, time in zip(
                    sources.numbers.tolist(), self.base.test.images, self.base.test.labels.tolist(),
                    self.base.sizes['test'], sources.times.tolist(), strict=True):
                if folder in (None, sources.folders[number]):
                    yield Item(sources.folders[number], path, names[label], size, time)

    def search(self, features: torch.Tensor, number: int, binary: bool = False) -> list[list[tuple[int, float]]]:
        """Return for each query (Q, D) the numbers of the nearest images with their similarity: Nearest.search."""
        self.join()
        if self.base is None:
            return [[] for _ in features]
        self.searched = self.searched or Nearest(self.base.test.features, self.resident)
        return self.searched.search(features, number, binary)

    def close(self) -> None:
        """Part from the file, which is not held open."""

    def feature(self, number: int) -> torch.Tensor:
        """Return the features (D,) of an image."""
        return self.base.test.features[number].float()

    def any(self) -> int:
        """Return the number of an image at random."""
        return random.randrange(len(self))

    def find(self, words: str, most: int) -> tuple[int, list[int]]:
        """Return how many images hold all words in their path or class, and the numbers of the first ones."""
        if self.names is None:
            self.names = [f'{item.path} {item.label}'.lower() for item in self.items()]
        parts = words.lower().split()
        found = [number for number, name in enumerate(self.names) if all(part in name for part in parts)]
        return len(found), found[:most]

    def number_of(self, path: str) -> int | None:
        """Return the number of the image of a path, below its folder or whole; None where there is none, or several."""
        found = [number for number, image in enumerate(self.base.test.images) if path == image or path.endswith(
            f'/{image}') and path == f'{self.item(number).folder}/{image}']
        return found[0] if len(found) == 1 else None


class FileCollection(SearchedImages):
    """A collection in a data base file.

    Args:
        file: of the data base; it need not be there yet.
        origin: what the file says of its origin, of a new one: args and whatever DataBase holds as `origin`.
        fingerprint: of the model, of a new one.
        dtype: of its features, None: that of the file, of a new one float32.

    Raises:
        UserError: if the file is none that embed.py made, or was made with another model.
    """

    def __init__(self, file: Path, origin: dict | None = None, fingerprint: str | None = None,
                 dtype: torch.dtype | None = None):
        super().__init__(load_data_base(file) if file.is_file() else None)
        self.file, self.folder = file, Path(f'{file}.parts')
        if self.base is not None and self.base.sources is None:
            raise UserError(f'--data_base {file} is that of a run, whose images are its test images; name another file '
                            'to embed into')
        self.origin = origin if self.base is None else self.base.origin
        self.fingerprint = fingerprint if self.base is None else self.base.sources.fingerprint
        if fingerprint not in (None, self.fingerprint):
            raise UserError(f'--model: {file} holds images that another model embedded, and similarities across models '
                            'mean nothing; leave --model out, or name another --data_base')
        self.dtype = dtype or (torch.float32 if self.base is None else self.base.test.features.dtype)
        self.broken = {} if self.base is None else dict(self.base.sources.broken)
        self.next_part, self.parts = 0, []
        self.read_parts()

    def folders(self) -> list[str]:
        """Return the folders that images are from."""
        return list(dict.fromkeys([*([] if self.base is None else self.base.sources.folders),
                                   *(item.folder for items, _ in self.parts for item in items)]))

    def add(self, items: list[Item], features: torch.Tensor, broken: dict[str, list] | None = None) -> None:
        """Add images with their features (n, D), unit rows; one that is there is replaced. They are saved at once.

        Args:
            broken: {file: [bytes, ns, class]} of files that could not be read, which are remembered; an image that is
                there and is among them now is removed.
        """
        if not items and not broken:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        file, features = self.folder / f'{self.next_part:08d}.pth', features.to(self.dtype)
        save({'fingerprint': self.fingerprint, 'folders': [item.folder for item in items],
              'images': [item.path for item in items], 'labels': [item.label for item in items],
              'sizes': [item.size for item in items], 'times': [item.time for item in items], 'features': features,
              'broken': broken or {}}, file)
        self.took(items, file, broken or {})

    def took(self, items: list[Item], file: Path, broken: dict) -> None:
        """Take note of a part that is on the disk."""
        self.parts.append((items, file))
        self.next_part = int(file.stem) + 1
        for item in items:
            self.broken.pop(f'{item.folder}/{item.path}', None)
        self.broken |= broken
        self.searched = self.names = None

    def remove(self, places: list[tuple[str, str]]) -> None:
        """Remove images, named by folder and path."""
        self.join()
        gone = set(places)
        self.keep([row for row, item in enumerate(self.items()) if (item.folder, item.path) not in gone])

    def relabel(self, labels: dict[tuple[str, str], str]) -> None:
        """Give images, named by folder and path, other classes."""
        items = [item._replace(label=labels.get((item.folder, item.path), item.label)) for item in self.items()]
        self.write(items, self.base.test.features)

    def finish(self) -> None:
        """Write what was added, in the type of features that was asked for, and what is known of broken files."""
        self.join()
        if self.base is not None and (self.base.test.features.dtype != self.dtype
                                      or self.base.sources.broken != self.broken):
            self.write(list(self.items()), self.base.test.features)

    def keep(self, rows: list[int]) -> None:
        """Keep some of the images, and save; the file goes with the last one."""
        items = [self.item(row) for row in rows]
        self.write(items, self.base.test.features[torch.tensor(rows, dtype=torch.int64)])

    def join(self) -> None:
        """Join the parts with the file, and save it; nothing happens where there are none."""
        if not self.parts:
            return
        rows, self.parts, parts = {}, [], self.parts  # (folder, path): where it is, the last one counts
        kept = list(self.items())
        for number, items in enumerate([kept, *(items for items, _ in parts)]):
            rows |= {(item.folder, item.path): (number, row) for row, item in enumerate(items)}
        rows = {place: found for place, found in rows.items() if '/'.join(place) not in self.broken}
        sources = [self.base.test.features if kept else None]
        items, features, position = [], None, 0
        for number, (own, file) in enumerate([(kept, None), *parts]):
            source = sources[0] if file is None else load(file, 'part of a data base')['features']
            chosen = [row for row, item in enumerate(own) if rows.get((item.folder, item.path)) == (number, row)]
            if source is None:
                continue
            if features is None:
                features = torch.empty(len(rows), source.shape[1], dtype=self.dtype)
            torch.index_select(source.to(self.dtype), 0, torch.tensor(chosen, dtype=torch.int64),
                               out=features[position:position + len(chosen)])
            items += [own[row] for row in chosen]
            position += len(chosen)
        self.write(items, features)

    def write(self, items: list[Item], features: torch.Tensor) -> None:
        """Write the file of images and their features (n, D), then remove the parts, which it holds now."""
        folders = list(dict.fromkeys(item.folder for item in items))
        self.origin = {**self.origin, 'args': {**self.origin['args'], 'data_name': self.file.stem}}
        names = list(dict.fromkeys(item.label for item in items if item.label))
        of_folder, of_name = ({name: number for number, name in enumerate(found)} for found in (folders, names))
        sources = Sources(folders, torch.tensor([of_folder[item.folder] for item in items], dtype=torch.int64),
                          torch.tensor([item.time for item in items], dtype=torch.int64), self.fingerprint,
                          dict(self.broken))
        test = Subset([item.path for item in items],
                      torch.tensor([of_name.get(item.label, -1) for item in items], dtype=torch.int64),
                      features.to(self.dtype))
        self.base = DataBase(names, test, origin=self.origin, sizes={'test': [item.size for item in items]},
                             sources=sources)
        self.searched = self.names = None
        if items:
            self.base.save(self.file)
        else:
            self.base = None
            self.file.unlink(missing_ok=True)
        if self.folder.is_dir():
            shutil.rmtree(self.folder)
        self.next_part, self.parts = 0, []

    def read_parts(self) -> None:
        """Take over what a process that was cut off has embedded.

        Raises:
            UserError: if they are damaged, or of another model.
        """
        dim = None if self.base is None else self.base.test.features.shape[1]
        for file in sorted(self.folder.glob('*.pth')) if self.folder.is_dir() else []:
            if not file.stem.isdecimal():  # half written
                continue
            contents = load(file, 'part of a data base', PART)
            columns = [contents[name] for name in ('folders', 'images', 'labels', 'sizes', 'times')]
            count = len(columns[0])
            dim = dim or contents['features'].shape[-1]
            check_fields(contents, {
                'images': lambda _, columns=columns, count=count: all(len(column) == count for column in columns),
                'folders': lambda folders: all(map(os.path.isabs, folders)),
                'sizes': lambda sizes: all(type(size) is int for size in sizes),
                'times': lambda times: all(type(time) is int for time in times),
                'features': lambda features, count=count, dim=dim: is_features(features, count, dim)},
                file, 'part of a data base')
            if self.fingerprint is None:
                self.fingerprint = contents['fingerprint']
            if contents['fingerprint'] != self.fingerprint:
                raise UserError(f'--model: {self.folder} holds images of a call that was cut off, which another model '
                                'embedded; go on with that model, or delete the folder')
            self.took([Item(*values) for values in zip(*columns, strict=True)], file, contents['broken'])
