"""The nearest rows of a matrix of features: exact, from a fast pass.

One pass over the features in float32 (or in bfloat16 over a copy, if the processor has instructions for it) finds all
rows that can be among the nearest, since its error has a bound; only these are computed again in float64.
"""
import torch

from common.distributed import bfloat16_is_fast, progress
from retrieval.counting import (
    Search,
    Similarity,
    largest_norms,
    nearest_negatives,
    on_grid,
    positive_similarities,
    signs_of,
    split_queries,
    tile_entries,
)

BLOCK_ROWS = 2**15  # of the features, in the fast pass
CONVERTED_ROWS = 2**13  # of features that are converted first: what is converted stays in the processor's cache
BLOCK_ENTRIES = 2**22  # float64 numbers at a time, in the exact one: 32 MiB
LONGEST_ROW = 1.01  # the norm up to which load_data_base accepts a unit row
CANDIDATES = 16  # of the fast pass for a query's nearest negative


def as_matrix(buffer: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Return the start of a flat buffer as a matrix, so that a loop allocates no memory."""
    return buffer[:rows * columns].view(rows, columns)


class Nearest:
    """Features (N, D), rows of unit length to 1 %, of any floating type, in which queries are searched.

    Args:
        features: kept as they are; a row that is not finite is never retrieved.
        resident: for many searches: keep a copy in bfloat16, if the processor multiplies it fast, for the fast pass.
    """

    def __init__(self, features: torch.Tensor, resident: bool = False):
        self.features, self.coarse, self.rounding = features, None, 0.0
        self.is_finite = torch.cat([part.isfinite().all(1) for part in features.split(BLOCK_ROWS)])
        if resident and bfloat16_is_fast(features.device):
            self.coarse = features.bfloat16()
            self.rounding = max((largest_norms(part.float(), torch.bfloat16)[1]
                                 for part in features.split(BLOCK_ROWS)), default=0.0)
            self.rounding = self.rounding if self.rounding == self.rounding else 2.0**-8  # NaN: a row is not finite

    def error(self, queries: torch.Tensor) -> float:
        """Return the error bound of the fast pass for float32 queries (Q, D); see counting.Similarity."""
        length, rounding = largest_norms(queries, torch.bfloat16)
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
        asked = signs_of(queries, torch.float32) if binary else queries.float()
        error = 0.0 if binary else self.error(asked)
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
            part = signs_of(part, torch.float32) if binary else part
            similarity = torch.mm(asked, part.T, out=as_matrix(tile, len(asked), len(part))).float()
            similarity[:, ~self.is_finite[start:start + block]] = -torch.inf
            nearest = similarity.topk(min(number, len(part)), 1).values
            best = torch.cat([best, nearest], 1).topk(number, 1).values
            rows, columns = (similarity >= best[:, -1:] - 2 * error).nonzero(as_tuple=True)
            found.append((rows, columns + start, similarity[rows, columns]))
        rows, columns, values = (torch.cat(parts) for parts in zip(*found, strict=True))
        close = (values >= best[rows, -1] - 2 * error) & (values > -torch.inf)
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
    compared, compared_labels = (queries, labels) if gallery is None else (gallery, gallery_labels)
    search = Search(Similarity(queries, compared, False), labels, compared_labels, gallery is None)
    positive, negative = torch.full((2, len(queries)), -torch.inf, dtype=torch.float64, device=queries.device)
    for rows in progress(split_queries(search), desc='best negatives', unit='block', delay=2):
        positive[rows] = positive_similarities(search, rows)[:, 0]
        negative[rows] = best_negatives(search, rows)
    return positive, negative


def best_negatives(search: Search, rows: torch.Tensor) -> torch.Tensor:
    """Return each query's largest similarity to an image of another class, (r,) float64; -inf for none."""
    values, columns = nearest_negatives(search, rows, CANDIDATES)
    values = values.double()
    close = (values >= values.amax(1, keepdim=True) - 2 * search.compare.error) & (values > -torch.inf)
    row, candidate = close.nonzero(as_tuple=True)
    values.fill_(-torch.inf)[row, candidate] = search.compare.of_pairs(rows[row], columns[row, candidate])
    best = values.amax(1)
    left = close.all(1).nonzero()[:, 0]  # there may be more that are as close
    if len(left):
        for part, same_class in search.parts_of_gallery(rows[left], tile_entries(rows.device) // 8):
            similarity = search.compare.exact(rows[left], part).masked_fill_(same_class, -torch.inf)
            best[left] = best[left].maximum(similarity.amax(1))
    return best
