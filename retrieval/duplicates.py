"""Groups of similar rows of features. The pairs, of which there can be half a square of the rows, are never held."""
import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from common.distributed import progress
from retrieval.counting import TILE_SIDE, Cosine, entries_above

PAIRS_AT_ONCE = 2**16  # after which groups are joined, so that most pairs of a large group are skipped


def group_similar(features: torch.Tensor, threshold: float) -> list[list[int]]:
    """Return the groups of rows of features (N, D), unit rows, that pairs of at least this cosine connect.

    Cosines near the threshold are computed in float64. Groups, and the rows in them, are in the order of the rows.
    """
    compare, group_of = Cosine(features, features), torch.arange(len(features))
    lowest = torch.full((len(features),), threshold - compare.error, dtype=torch.float64).to(compare.dtype)
    lowest = torch.nextafter(lowest, torch.full_like(lowest, -torch.inf))  # so that it is not rounded up
    side = TILE_SIDE['cpu']
    starts = range(0, len(features), side)
    tiles = [(slice(row, row + side), slice(column, column + side)) for row in starts for column in starts
             if row <= column]
    for rows, columns in progress(tiles, desc='pairs', unit='tile', delay=2):
        for entries in entries_above(compare.tile(rows, columns), lowest[rows], False):
            row, column = entries[0] + rows.start, entries[1] + columns.start
            for one, other in zip(row.split(PAIRS_AT_ONCE), column.split(PAIRS_AT_ONCE), strict=True):
                is_apart = group_of[one] != group_of[other]
                one, other = one[is_apart], other[is_apart]
                is_near = compare.pairs(one, other, torch.float64) >= threshold
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
    others = torch.tensor(group[1:])
    return Cosine(features[group[0]][None], features).pairs(torch.zeros_like(others), others, torch.float64).tolist()
