"""The nearest rows of a matrix of features: exact, from a fast pass.

One pass over the features in float32 (or in bfloat16 over a copy, if the processor has instructions for it) finds all
rows that can be among the nearest, since its error has a bound; only these are computed again in float64.
"""
import torch

from common.distributed import bfloat16_is_fast, progress
from retrieval.counting import (TILE_SIDE, Cosine, Search, as_matrix, entries_above, grouped_positives, largest_norms,
                                on_grid)

BLOCK_ROWS = 2**15  # of the features, in the fast pass
CONVERTED_ROWS = 2**13  # of features that are converted first: what is converted stays in the processor's cache
BLOCK_ENTRIES = 2**22  # float64 numbers at a time, in the exact one: 32 MiB
LONGEST_ROW = 1.01  # the norm up to which load_data_base accepts a unit row


class Nearest:
    """Features (N, D), rows of unit length to 1 %, of any floating type, in which queries are searched.

    Args:
        features: kept as they are; a row that is not finite is never retrieved.
        resident: for many searches: keep a copy in bfloat16, if the processor multiplies it fast, for the fast pass.
    """

    def __init__(self, features: torch.Tensor, resident: bool = False):
        self.features, self.coarse, self.rounding = features, None, 0.0
        if resident and bfloat16_is_fast(features.device):
            self.coarse = features.bfloat16()
            self.rounding = max((largest_norms(part.float())[1] for part in features.split(BLOCK_ROWS)), default=0.0)
            self.rounding = self.rounding if self.rounding == self.rounding else 2.0**-8  # NaN: a row is not finite

    def error(self, queries: torch.Tensor) -> float:
        """Return the error bound of the fast pass for float32 queries (Q, D); see counting.Cosine."""
        length, rounding = largest_norms(queries)
        error = 1.001 * (queries.shape[1] + 4) * 2.0**-24 * length * LONGEST_ROW
        if self.coarse is not None:
            error = 1.01 * (error + rounding * LONGEST_ROW + length * self.rounding)
            error += 1.01 * 2.0**-8 * (length * LONGEST_ROW + error)  # the sum is rounded to 8 bits
        return error + 2.0**-32

    def exact(self, queries: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, binary: bool) -> torch.Tensor:
        """Return similarities (n,), float64, of n pairs of a query and a row, as `metrics.similarity_of` does."""
        dim, parts = queries.shape[1], [queries.new_zeros(0, dtype=torch.float64)]
        for row, column in zip(*(numbers.split(max(1, BLOCK_ENTRIES // dim)) for numbers in (rows, columns)),
                               strict=True):
            one, other = queries[row], self.features[column]
            if binary:
                parts.append(1 - ((one >= 0) != (other >= 0)).sum(1).double() / dim)
            else:
                parts.append(on_grid(one.double().mul_(other).sum(1)))
        return torch.cat(parts)

    def search(self, queries: torch.Tensor, number: int, binary: bool = False) -> list[list[tuple[int, float]]]:
        """Find the rows nearest to each query, nearest first, ties in the order of the rows.

        Args:
            queries: (Q, D) float32 or float64, unit rows.
            number: of rows to return; all if there are fewer.
            binary: compare signs, a zero counting as +1; the similarity is then the share of equal bits.

        Returns:
            for each query [(row, similarity), ...]; [] for a query that is not finite.
        """
        number = min(number, len(self.features))
        is_finite = queries.isfinite().all(1)
        queries = queries.where(is_finite[:, None], 0.0)  # one that is not finite must not spoil the others
        signs = torch.where(queries >= 0, 1.0, -1.0)
        asked, error = (signs, 0.0) if binary else (queries.float(), self.error(queries.float()))
        source = self.features if binary or self.coarse is None else self.coarse
        asked = asked.to(torch.bfloat16 if source is self.coarse else torch.float32)
        block, buffer = min(BLOCK_ROWS, len(source)), None
        if source.dtype != asked.dtype:
            block = min(CONVERTED_ROWS, len(source))
            buffer = asked.new_empty(block * source.shape[1])
        tile = asked.new_empty(len(asked) * block)
        best, found = queries.new_full((len(queries), number), -torch.inf, dtype=torch.float32), []
        for start in range(0, len(source), block):
            part = source[start:start + block]
            if buffer is not None:  # allocating memory in each turn would cost more than the product
                part = as_matrix(buffer, *part.shape).copy_(part)
            part = torch.where(part >= 0, 1.0, -1.0) if binary else part
            similarity = torch.mm(asked, part.T, out=as_matrix(tile, len(asked), len(part))).float()
            similarity.nan_to_num_(nan=-torch.inf)
            nearest = similarity.topk(min(number, len(part)), 1).values
            best = torch.cat([best, nearest], 1).topk(number, 1).values
            rows, columns = (similarity >= best[:, -1:] - 2 * error).nonzero(as_tuple=True)
            found.append((rows, columns + start, similarity[rows, columns]))
        rows, columns, values = (torch.cat(parts) for parts in zip(*found, strict=True))
        close = values >= best[rows, -1] - 2 * error
        rows, columns = rows[close], columns[close]
        similarity = self.exact(queries, rows, columns, binary)
        answers = []
        for query in range(len(queries)):
            own = (rows == query).nonzero()[:, 0]
            own = own[similarity[own].isfinite() & is_finite[query]]
            own = own[similarity[own].argsort(descending=True, stable=True)[:number]]
            answers.append(list(zip(columns[own].tolist(), similarity[own].tolist(), strict=True)))
        return answers


def best_similarities(queries: torch.Tensor, labels: torch.Tensor, gallery: torch.Tensor | None = None,
                      gallery_labels: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each query's largest cosine to an image of its class, and to one of another class: (Q,) float64 each.

    -inf stands for none. Without a gallery the queries are searched in each other, each left out of its own search.

    Args:
        queries, gallery: features (Q, D), (G, D), float32 or float64, unit rows.
        labels, gallery_labels: (Q,), (G,) int64.
    """
    itself = gallery is None
    gallery, gallery_labels = (queries, labels) if itself else (gallery, gallery_labels)
    compare, side = Cosine(queries, gallery), TILE_SIDE[queries.device.type]
    search = Search(compare, labels, gallery_labels, itself)
    positive = torch.cat([found[:, 0] for _, _, found in grouped_positives(search)])
    negative = torch.full_like(positive, -torch.inf)
    tiles = [(slice(row, row + side), slice(column, column + side)) for row in range(0, len(queries), side)
             for column in range(0, len(gallery), side)]
    for rows, columns in progress(tiles, desc='best negatives', unit='tile', delay=2):
        tile = compare.tile(rows, columns).masked_fill_(labels[rows, None] == gallery_labels[columns], -torch.inf)
        highest = tile.amax(1).double()
        # Compute again only what can exceed the best of the tile and the best so far.
        lowest = torch.maximum(highest - 2 * compare.error, negative[rows] - compare.error).to(compare.dtype)
        lowest = torch.nextafter(lowest, torch.full_like(lowest, -torch.inf))
        lowest = lowest.masked_fill(highest == -torch.inf, torch.inf)
        for row, column, _ in entries_above(tile, lowest, False):
            similarity = compare.pairs(row + rows.start, column + columns.start, torch.float64)
            negative[rows].scatter_reduce_(0, row, similarity, 'amax')
    return positive, negative
