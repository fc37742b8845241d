"""Search in a data base: rank its queries, choose some of them, and find the images nearest to one."""
import numpy as np
import torch

from common.distributed import progress
from common.errors import UserError
from retrieval.database import DataBase
from retrieval.metrics import check_features, similarity_of
from retrieval.nearest import Nearest

BLOCK_ENTRIES = 2**24  # similarities at a time: 128 MiB in float64
NO_MATCH = 'no close match'  # shown beside an answer below the open-set threshold


def rank_queries(data_base: DataBase, binary: bool = False) -> dict[str, torch.Tensor]:
    """Compute, for each query of a data base, how well it finds its class.

    Images without a class do not count as negatives.

    Returns:
        {'rank': (Q,) float64, negatives nearer than the best positive, tied ones as half, NaN without a positive;
        'margin': (Q,) float64, similarity of the best positive less that of the best negative;
        'nearest': (Q,) int64, the nearest image of the searched subset}.

    Raises:
        UserError: if features are not finite, or not unit rows.
    """
    queries, searched = data_base.test, data_base.subsets[data_base.searched]
    check_features('query', queries.features, queries.labels, unit=not binary)
    check_features('gallery', searched.features, searched.labels, unit=not binary)
    unlabelled = searched.labels < 0
    ranks, margins, nearest = [], [], []
    block = max(1, BLOCK_ENTRIES // len(searched.features))
    for start in progress(range(0, len(queries.features), block), desc='rank', delay=2):
        similarity = similarity_of(queries.features[start:start + block], searched.features, binary)
        labels = queries.labels[start:start + block, None]
        positive = (labels == searched.labels) & (labels >= 0)
        if data_base.gallery is None:  # a query does not find itself
            rows = torch.arange(len(similarity))
            similarity[rows, start + rows] = -torch.inf
            positive[rows, start + rows] = False
        negative = ~positive & ~unlabelled
        best = similarity.masked_fill(~positive, -torch.inf).amax(1)
        # The query itself, at -inf, may stand among the negatives: it is never nearer than a positive.
        best_negative = similarity.masked_fill(~negative, -torch.inf).amax(1)
        nearer = ((similarity > best[:, None]) & negative).sum(1)
        tied = ((similarity == best[:, None]) & negative).sum(1)
        ranks.append((nearer + tied / 2).double().where(positive.any(1), torch.nan))
        margins.append(best - best_negative)
        nearest.append(similarity.argmax(1))  # the first of equals, as in nearest_images
    return {'rank': torch.cat(ranks), 'margin': torch.cat(margins), 'nearest': torch.cat(nearest)}


def choose_queries(ranked: dict[str, torch.Tensor], select: str, num_queries: int, seed: int = 0) -> list[int]:
    """Choose queries that have a positive.

    Args:
        ranked: of `rank_queries`.
        select: `worst`: the rank of the best positive is largest, then the margin smallest; `best`: the reverse;
            `random`.
        seed: of the random choice.

    Raises:
        UserError: if there are fewer than num_queries.
    """
    rank, margin = ranked['rank'].tolist(), ranked['margin'].tolist()
    order = [index for index, value in enumerate(rank) if value == value]  # not NaN
    if num_queries > len(order):
        raise UserError(f'--num_queries {num_queries} is more than the {len(order)} queries that have another image of '
                        'their class to find')
    if select == 'random':
        return np.random.default_rng(seed).permutation(order)[:num_queries].tolist()
    order.sort(key=lambda index: (rank[index], -margin[index], index), reverse=select == 'worst')
    return order[:num_queries]


def nearest_images(feature: torch.Tensor, data_base: DataBase, skip: tuple[str, int] | None = None,
                   number: int = 10, binary: bool = False) -> list[tuple[int, float]]:
    """Return the nearest images of the searched subset as (index, similarity), nearest first, ties in their order.

    Args:
        feature: (D,) of the query, a unit vector, as `embed_images` returns them.
        data_base: of `load_data_base`; the index counts in `data_base.subsets[data_base.searched].images`.
        skip: the query's own subset and index, which is not retrieved; None for a query from outside.
        number: how many; fewer if the subset holds fewer.
        binary: rank by Hamming distance; the similarity is then the share of equal bits.
    """
    own_index = skip[1] if skip and skip[0] == data_base.searched else None
    nearest = Nearest(data_base.subsets[data_base.searched].features)
    hits = nearest.search(feature[None], number + (own_index is not None), binary)[0]
    return [(index, similarity) for index, similarity in hits if index != own_index][:number]
