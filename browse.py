"""Look into a data base: open it with its images, rank its queries, choose some, find what is nearest to one."""
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from engine.errors import UserError
from engine.files import image_file
from engine.nearest import Nearest
from engine.processes import progress
from engine.runs import DataBase, RunFiles, find_result, fingerprint_of, load_data_base
from metrics import check_features, similarity_of
from model import EmbeddingNet, load_model
from raw_sets import find_root
from utils import user_path

SIMILARITIES_A_BLOCK = 2**24  # 128 MiB in float64
ABSENT = 'probably not in the collection'  # what is said of an answer below absent_threshold
DEFAULT_DATA_BASE = 'car_resnet50_balanced_proxy_512_data_base.pth'  # of train.py without any flags


class OpenRun(NamedTuple):
    """A data base with what belongs to it."""

    data_base: DataBase
    files: RunFiles  # of the run that made it
    roots: list[Path]  # the folders of its images: that of the data set, or those of a collection

    def folder(self, index: int) -> int:
        """Return the number of the folder that an image of a collection lies in, 0 for that of a run."""
        return 0 if self.data_base.sources is None else int(self.data_base.sources.numbers[index])

    def file(self, subset: str, index: int) -> Path:
        """Return the file of an image; raises UserError where a link leads out of its folder."""
        return image_file(self.roots[self.folder(index)], self.data_base.subsets[subset].images[index])


def add_data_base_flags(parser) -> None:
    """Add the flags by which `open_run` finds a data base and its images."""
    parser.add_argument('--data_base', type=user_path, default=DEFAULT_DATA_BASE, help='file, or its name in '
                        '--results_dir [%(default)s]')
    parser.add_argument('--data_path', type=user_path, default='/home/data', help='folder that holds the data sets; '
                        'what embed.py made knows its own folders [%(default)s]')
    parser.add_argument('--results_dir', type=user_path, default='results', help='where data bases are and pictures go '
                        '[%(default)s]')


def open_run(name: str, results_dir: str, data_path: str) -> OpenRun:
    """Open a data base, named by its file or its name in the results folder, with the folder of its images.

    Raises:
        UserError: if there is none, it is damaged, or its data set is not there.
    """
    file = find_result('--data_base', RunFiles.ENDINGS['data_base'], name, results_dir)
    data_base = load_data_base(file)
    if data_base.sources is not None:
        return OpenRun(data_base, RunFiles.beside(file), [Path(folder) for folder in data_base.sources.folders])
    data_name = data_base.origin['args']['data_name']
    root = find_root(data_path, data_name)
    if root is None:
        raise UserError(f'--data_path {data_path} holds no folder {data_name}, the data set of {file.name}; name the '
                        'folder that does, or give that one its name back')
    return OpenRun(data_base, RunFiles.beside(file), [root])


def load_run_model(run: OpenRun, device: torch.device) -> tuple[EmbeddingNet, dict]:
    """Load the model that made a data base, which lies beside it; returns it and the settings of the run.

    Raises:
        UserError: if it is another one, or not there.
    """
    model, contents = load_model(run.files.model, device)
    settings, sources = run.data_base.origin['args'], run.data_base.sources
    if sources is None:
        same = contents['args'] == settings
    else:
        same = fingerprint_of(contents['config'], contents['state_dict']) == sources.fingerprint
    if not same:
        raise UserError(f'{run.files.model} is of another run than the data base; keep the files of a run together')
    return model, settings


def tell_changes(run: OpenRun) -> None:
    """Say how many images of a data base are no longer in the data set, or are other ones than when it was made.

    Of a collection, which may be large and bring itself up to date, nothing is said.
    """
    if run.data_base.sources is not None:
        return
    for what, found in (('are no longer in the data set', lambda file, size: not file.exists()),
                        ('have changed since, and are not those that were embedded',
                         lambda file, size: file.exists() and size is not None and file.stat().st_size != size)):
        images = [image for name, subset in run.data_base.subsets.items() for image, size in zip(
            subset.images, run.data_base.sizes.get(name, [None] * len(subset.images)), strict=True)
            if found(run.roots[0] / image, size)]
        if images:
            print(f'{len(images):,} images of this data base {what}, the first: {images[0]}; train or evaluate again')


def rank_queries(data_base: DataBase, binary: bool = False) -> dict[str, torch.Tensor]:
    """Look at each query of a data base alone.

    Returns:
        {'rank': (Q,) float64, negatives nearer than the best positive, half of the tied, NaN without any positive;
        'margin': (Q,) float64, similarity of the best positive less that of the best negative;
        'nearest': (Q,) int64, the nearest image of the searched subset}. Images without a class are no negatives.

    Raises:
        UserError: if features are not finite or no unit rows.
    """
    queries, searched = data_base.test, data_base.subsets[data_base.searched]
    check_features('query', queries.features, queries.labels, unit=not binary)
    check_features('gallery', searched.features, searched.labels, unit=not binary)
    found = {'rank': [], 'margin': [], 'nearest': []}
    block = max(1, SIMILARITIES_A_BLOCK // len(searched.features))
    for start in progress(range(0, len(queries.features), block), desc='rank', delay=2):
        similarity = similarity_of(queries.features[start:start + block], searched.features, binary)
        labels = queries.labels[start:start + block, None]
        positive, unknown = (labels == searched.labels) & (labels >= 0), searched.labels < 0
        if data_base.gallery is None:
            own = torch.arange(len(similarity))
            similarity[own, start + own] = -torch.inf
            positive[own, start + own] = False
        best, best_negative = (similarity.masked_fill(left_out, -torch.inf).amax(1) for left_out in
                               (~positive, positive | unknown))
        before = [(relation(similarity, best[:, None]) & ~positive & ~unknown).sum(1)
                  for relation in (torch.gt, torch.eq)]
        found['rank'].append((before[0] + before[1] / 2).double().where(positive.any(1), torch.nan))
        found['margin'].append(best - best_negative)
        found['nearest'].append(similarity.argmax(1))  # of ties the first, as in nearest_images
    return {name: torch.cat(parts) for name, parts in found.items()}


def choose_queries(ranked: dict[str, torch.Tensor], how: str, number: int, seed: int = 0) -> list[int]:
    """Choose queries that have a positive.

    Args:
        ranked: of `rank_queries`.
        how: `worst`: the rank of the best positive is largest, then the margin smallest; `best`: the reverse;
            `random`.
        number: how many.
        seed: of the random choice.

    Raises:
        UserError: if there are not so many.
    """
    rank, margin = ranked['rank'].tolist(), ranked['margin'].tolist()
    order = [index for index, value in enumerate(rank) if value == value]
    if number > len(order):
        raise UserError(f'--num_queries {number} is more than the {len(order)} queries that have another image of '
                        'their class to find')
    if how == 'random':
        return np.random.default_rng(seed).permutation(order)[:number].tolist()
    order.sort(key=lambda index: (rank[index], -margin[index], index), reverse=how == 'worst')
    return order[:number]


def nearest_images(feature: torch.Tensor, data_base: DataBase, skip: tuple[str, int] | None = None,
                   number: int = 10, binary: bool = False) -> list[tuple[int, float]]:
    """Return the nearest images of the searched subset as (index, similarity), nearest first, ties in their order.

    Args:
        feature: (D,) of the query, a unit vector, as `embed_images` returns them.
        data_base: of `load_data_base`; the index counts in `data_base.subsets[data_base.searched].images`.
        skip: the query's own subset and index, which is not retrieved; None where it is no image of the data base.
        number: how many; fewer where the subset holds fewer.
        binary: rank by Hamming distance; the similarity is then the share of equal bits.
    """
    itself = skip[1] if skip and skip[0] == data_base.searched else None
    searched = Nearest(data_base.subsets[data_base.searched].features)
    found = searched.search(feature[None], number + (itself is not None), binary)[0]
    return [(index, similarity) for index, similarity in found if index != itself][:number]
