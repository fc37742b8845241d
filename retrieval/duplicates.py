"""Groups of similar rows of features. The pairs, of which there can be half a square of the rows, are never held."""
import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from common.distributed import progress
from retrieval.counting import Similarity, cosine_similarity

SIDE = 4096  # of a tile of similarities
PAIRS_AT_ONCE = 2**16  # after which groups are joined, so that most pairs of a large group are skipped


def group_similar(features: torch.Tensor, threshold: float) -> list[list[int]]:
    """Return the groups of rows of features (N, D), unit rows, that pairs of at least this cosine connect.

    Cosines near the threshold are computed in float64. Groups, and the rows in them, are in the order of the rows.
    """
    compare, group_of = Similarity(features, features, binary=False), torch.arange(len(features))
    starts = range(0, len(features), SIDE)
    tiles = [(slice(row, row + SIDE), slice(column, column + SIDE)) for row in starts for column in starts
             if row <= column]
    for rows, columns in progress(tiles, desc='pairs', unit='tile', delay=2):
        close = (compare.fast(rows, columns) >= threshold - compare.error).nonzero()
        for pairs in close.split(PAIRS_AT_ONCE):
            one, other = pairs[:, 0] + rows.start, pairs[:, 1] + columns.start
            is_apart = group_of[one] != group_of[other]
            one, other = one[is_apart], other[is_apart]
            is_near = compare.of_pairs(one, other) >= threshold
            if is_near.any():
                group_of = join_groups(group_of, one[is_near], other[is_near])
    members = {}
    for row, group in enumerate(group_of.tolist()):
        members.setdefault(group, []).append(row)
    return [rows for rows in members.values() if len(rows) > 1]


def join_groups(group_of: torch.Tensor, rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return the group (N,) of each row after those of pairs of rows were joined."""
    edges = (np.ones(len(rows)), (group_of[rows].numpy(), group_of[others].numpy()))
    joined = connected_components(coo_array(edges, shape=2 * group_of.shape), directed=False)[1]
    return torch.from_numpy(joined)[group_of].long()


def similarities_to_first(features: torch.Tensor, group: list[int]) -> list[float]:
    """Return the cosines, in float64, of the rows of a group to its first one, which is left out."""
    return cosine_similarity(features[group[:1]], features[group[1:]])[0].tolist()
