"""Count, for each query, the negatives nearer than each of its positives: exactly, without a matrix of all pairs.

Recall@K, MAP@R and R-precision need these counts for the nearest positives only. For a block of queries:

1. compute the similarities to their positives in float64;
2. find each query's nearest negatives by a fast product, whose error has a bound (`nearest_negatives`);
3. compute in float64 those of them that are closer to a positive than this bound, and count (`count_nearest`);
4. compare the queries for which that many negatives decide nothing with the whole gallery in float64 (`count_all`).

Processes share the blocks.
"""
import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from common.distributed import progress, world_rank, world_size

FAST_DTYPE = {'cpu': torch.float32, 'cuda': torch.float16}  # of the fast product
BLOCK_ROWS = 1024  # the fewest queries of a block, if their positives fit into a tile
FIRST_RANK = 10  # of a negative up to which most queries are decided, whatever the largest K


def tile_entries(device: torch.device) -> int:
    """Return how many similarities to compute at a time: on a GPU, where each call costs, as free memory allows."""
    if device.type != 'cuda':
        return 2**24
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(2**27, free // 64)


def on_grid(similarity: torch.Tensor) -> torch.Tensor:
    """Round float64 similarities to multiples of 2^-33, in place.

    Equal rows must tie wherever they stand, but the last bits of a product depend on the position of a row in its
    block. The grid is far coarser than the rounding of float64, and far finer than that of the float32 features.
    """
    return similarity.mul_(2.0**33).round_().mul_(2.0**-33)


def cosine_similarity(query: torch.Tensor, gallery: torch.Tensor) -> torch.Tensor:
    """Return the cosines (..., Q, G) of unit rows (..., Q, D) and (..., G, D), float64, on a grid of 2^-33."""
    return on_grid(query.double() @ gallery.double().transpose(-1, -2))


def signs_of(features: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return -1 and +1 for features of any shape; a zero counts as +1."""
    return (features >= 0).to(dtype).mul_(2).sub_(1)


def largest_norms(features: torch.Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """Return the largest norm of a row of features (N, D), and of a row's rounding error in a dtype."""
    norm = rounding = 0.0
    for part in features.split(2**14):  # in parts, without a second tensor of their size
        error = part - part.to(dtype).to(part.dtype)
        norm = max(norm, torch.linalg.vector_norm(part, dim=1).amax().item())
        rounding = max(rounding, torch.linalg.vector_norm(error, dim=1).amax().item())
    return norm, rounding


@contextlib.contextmanager
def float32_sums():
    """Let a GPU sum float16 products in float32, whatever the user of this package has allowed."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_fp16_reduced_precision_reduction = matmul.allow_fp16_reduced_precision_reduction, False
    try:
        yield
    finally:
        matmul.allow_fp16_reduced_precision_reduction = before


class Similarity:
    """Cosines of unit rows, queries (Q, D) and a gallery (G, D); with `binary` the products of their signs.

    A product of signs is D - 2 x the Hamming distance: a whole number, exact in float32, and in float16 up to 2048.

    Attributes:
        dtype: of the fast product.
        error: bound of the error of an entry of the fast product.
    """

    def __init__(self, query: torch.Tensor, gallery: torch.Tensor, binary: bool):
        self.query, self.gallery, self.binary, dim = query, gallery, binary, query.shape[1]
        self.dtype = torch.float32 if binary and dim > 2048 else FAST_DTYPE[query.device.type]
        self.error = 0.0
        if not binary:
            (length, rounding), (gallery_length, gallery_rounding) = (largest_norms(rows, self.dtype)
                                                                      for rows in (query, gallery))
            # For rounded rows |x'y' - xy| <= |x' - x| |y'| + |x| |y' - y|. A float32 sum of D products, in any order,
            # is off by at most D 2^-23 |x'| |y'|, half of that if each step rounds to nearest (Higham, Accuracy and
            # Stability of Numerical Algorithms, section 3.1). It is rounded to `dtype`, its exact value to the grid.
            gallery_length += gallery_rounding
            summing = (length + rounding) * gallery_length * (dim * 2.0**-23 + torch.finfo(self.dtype).eps / 2)
            self.error = 1.01 * (rounding * gallery_length + length * gallery_rounding + summing) + 2.0**-33

    def fast(self, rows, columns) -> torch.Tensor:
        """Return similarities (r, c) of `dtype`."""
        query, gallery = (signs_of(part, self.dtype) if self.binary else part.to(self.dtype)
                          for part in (self.query[rows], self.gallery[columns]))
        with float32_sums():
            return query @ gallery.T

    def exact(self, rows, columns) -> torch.Tensor:
        """Return similarities (r, c) in float64."""
        if self.binary:
            return self.fast(rows, columns).double()
        return cosine_similarity(self.query[rows], self.gallery[columns])

    def of_pairs(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Return the cosines (n,), float64, of n pairs."""
        step = max(1, 2**19 // self.query.shape[1])  # what stays in a processor's cache
        parts = [self.query[row].double().mul_(self.gallery[column]).sum(1)
                 for row, column in zip(rows.split(step), columns.split(step), strict=True)]
        return on_grid(torch.cat(parts))


class Search(NamedTuple):
    """Queries and the gallery that they are searched in."""

    compare: Similarity
    query_labels: torch.Tensor  # (Q,) int64
    gallery_labels: torch.Tensor  # (G,)
    itself: bool  # the queries are the gallery, each is left out of its own search

    def parts_of_gallery(self, rows: torch.Tensor, entries: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield slices of the gallery, and which of them are of the class of each query of `rows`: (r, g) bool.

        Args:
            entries: r x g of a part.
        """
        step = max(1, entries // len(rows))
        for start in range(0, len(self.gallery_labels), step):
            columns = slice(start, start + step)
            yield columns, self.query_labels[rows, None] == self.gallery_labels[columns]


def split_queries(search: Search) -> tuple[torch.Tensor, ...]:
    """Return the rows of all queries in blocks; those of a class lie together, so that a block has few classes."""
    entries = tile_entries(search.query_labels.device)
    largest_class = int(search.gallery_labels.unique(return_counts=True)[1].max())
    size = max(BLOCK_ROWS, entries // len(search.gallery_labels))
    size = min(size, math.isqrt(entries // largest_class))  # even if each query is of another class
    return search.query_labels.argsort(stable=True).split(max(1, size))


def positive_similarities(search: Search, rows: torch.Tensor) -> torch.Tensor:
    """Return the similarities of queries to the images of their class, descending, (r, R) float64, padded with -inf.

    R is at least 1.
    """
    columns = torch.isin(search.gallery_labels, search.query_labels[rows]).nonzero()[:, 0]
    positive = search.query_labels[rows, None] == search.gallery_labels[columns]
    if search.itself:
        positive &= rows[:, None] != columns
    similarity = search.compare.exact(rows, columns).masked_fill_(~positive, -torch.inf)
    none = similarity.new_full((len(rows), 1), -torch.inf)
    return torch.cat([similarity, none], 1).topk(max(1, int(positive.sum(1).max()))).values


def nearest_negatives(search: Search, rows: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return similarity (r, n), by the fast product, and column (r, n) of the negatives nearest to each query.

    n is `number` or, if that is smaller, the gallery; for a query with fewer negatives some similarities are -inf.
    """
    values = torch.empty(len(rows), 0, dtype=search.compare.dtype, device=rows.device)
    found = torch.empty(len(rows), 0, dtype=torch.int64, device=rows.device)
    for columns, same_class in search.parts_of_gallery(rows, tile_entries(rows.device)):
        value, column = search.compare.fast(rows, columns).masked_fill_(same_class, -torch.inf).topk(
            min(number, same_class.shape[1]), sorted=False)
        values, column = torch.cat([values, value], 1), torch.cat([found, column + columns.start], 1)
        values, order = values.topk(min(number, values.shape[1]), sorted=False)
        found = column.gather(1, order)
    return values, found


def positions(positives: torch.Tensor, values: torch.Tensor, error: torch.Tensor | float) -> list[torch.Tensor]:
    """Return how many of the descending positives (r, R) surely exceed values (r, n), and how many may reach them.

    Args:
        error: bound of the error of the values.
    """
    ascending = -positives
    return [torch.searchsorted(ascending, -(values + error)),
            torch.searchsorted(ascending, -(values - error), right=True)]


def add_counts(counts: torch.Tensor, places: list[torch.Tensor]) -> None:
    """Count negatives between the positives: in a tie with some, half of one before them and half of it after them."""
    for place in places:
        counts.scatter_add_(1, place, counts.new_full((), 0.5).expand(place.shape))


def count_nearest(search: Search, rows: torch.Tensor, positives: torch.Tensor, number: int
                  ) -> tuple[torch.Tensor, torch.Tensor]:
    """Count, among the `number` nearest negatives, those nearer than each positive (r, R); those tied are half.

    Returns:
        the counts (r, R), float64, and the similarity (r,) that no negative left out exceeds.
    """
    values, columns = nearest_negatives(search, rows, number)
    values = values.double()
    farthest = values.amin(1) + search.compare.error
    first, last = positions(positives, values, search.compare.error)
    close = ((first != last) & (values > -torch.inf)).nonzero(as_tuple=True)
    if search.compare.error:
        error = torch.full_like(values, search.compare.error)
        values[close], error[close] = search.compare.of_pairs(rows[close[0]], columns[close]), 0.0
        first, last = positions(positives, values, error)
    counts = positives.new_zeros(len(rows), positives.shape[1] + 1)
    add_counts(counts, [first, last])
    if number >= len(search.gallery_labels):
        farthest.fill_(-torch.inf)
    return counts[:, :-1].cumsum(1), farthest


def count_all(search: Search, rows: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """Count as `count_nearest` does, among all negatives and with all similarities in float64."""
    counts = positives.new_zeros(len(rows), positives.shape[1] + 1)
    for columns, same_class in search.parts_of_gallery(rows, tile_entries(rows.device) // 8):
        values = search.compare.exact(rows, columns).masked_fill_(same_class, -torch.inf)
        add_counts(counts, positions(positives, values, 0.0))
    return counts[:, :-1].cumsum(1)


def count_decisive(search: Search, rows: torch.Tensor, positives: torch.Tensor, largest: int) -> torch.Tensor:
    """Count the negatives nearer than each positive (r, R), as far as that decides a metric: (r, R) float64.

    A count may be too small only where it already puts its positive behind rank R and, for the best positive, behind
    the largest K.
    """
    number, order = (positives > -torch.inf).sum(1), torch.arange(1, positives.shape[1] + 1, device=rows.device)
    nearer, left = torch.empty_like(positives), torch.arange(len(rows), device=rows.device)
    for rank in dict.fromkeys(max(positives.shape[1], rank) for rank in (FIRST_RANK, largest)):
        # Of negatives that tie with a positive one half is counted, so twice as many decide.
        nearer[left], farthest = count_nearest(search, rows[left], positives[left], 2 * rank + 16)
        undecided = order + nearer[left] <= number[left, None]
        undecided[:, 0] |= nearer[left, 0] < largest
        undecided &= (order <= number[left, None]) & (positives[left] <= farthest[:, None])
        left = left[undecided.any(1)]
        if not len(left):
            return nearer
    nearer[left] = count_all(search, rows[left], positives[left])
    return nearer


def nearer_negatives(queries: tuple, gallery: tuple | None, binary: bool, largest: int):
    """Count the negatives nearer than each positive, block by block of this process's share of the queries.

    Args:
        queries: features (Q, D) and labels (Q,).
        gallery: features (G, D) and labels (G,); None: the queries are searched in each other, each left out of its own
            search by its index.
        binary: compare signs by Hamming distance instead of features by cosine.
        largest: the largest K of Recall@K.

    Yields:
        nearer (r, R) float64, for the descending positives of each query the number of nearer negatives plus half of
        the tied ones, as far as that decides a metric; and the number (r,) of each query's positives, at most R.
    """
    (features, labels), (gallery_features, gallery_labels) = queries, gallery or queries
    search = Search(Similarity(features, gallery_features, binary), labels, gallery_labels, gallery is None)
    blocks = split_queries(search)[world_rank()::world_size()]
    for rows in progress(blocks, desc='recall', unit='block', delay=2):
        positives = positive_similarities(search, rows)
        yield count_decisive(search, rows, positives, largest), (positives > -torch.inf).sum(1)
