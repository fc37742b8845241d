"""Count the negatives nearer than each positive of a query, exactly, without computing all similarities in float64.

Recall@K, MAP@R and R-precision need these counts for the nearest positives only. Per group of queries:

1. compute the similarities of the positives in float64 (`positive_similarities`);
2. estimate, from a sample of the gallery, a threshold that few negatives of each query exceed (`guess_threshold`);
3. compute all similarities once, in tiles, in bfloat16 if the processor has instructions for it, else in float32, and
   keep those above the threshold. The error of this pass has a bound: a negative farther than it from every positive
   of its query is counted, the others are computed again in float32 and then in float64 (`count_in_tiles`). If the
   queries are the gallery, each tile serves both of its sides, so half of the matrix is enough;
4. repeat step 3 with a lower threshold for the queries whose metrics are still undecided (`count_decisive`).

Processes share the tiles. All counts are multiples of 1/2, so their sums have no rounding errors.
"""
from copy import copy
from typing import NamedTuple

import torch
from torch.nn import functional as F

from common.distributed import (
    bfloat16_is_fast,
    gather_rows,
    progress,
    shard,
    sum_over_processes,
    world_rank,
    world_size,
)

BLOCK_ENTRIES = 2**24  # float64 numbers at a time: 128 MiB
TILE_SIDE = {'cpu': 4096, 'cuda': 8192}  # rows and columns of a tile of similarities
SAMPLED_IMAGES = 2048  # of the gallery, from which thresholds are estimated
ENTRIES_PER_TEST = 32  # similarities whose maximum is compared with the threshold first


def on_grid(similarity: torch.Tensor) -> torch.Tensor:
    """Round float64 similarities to multiples of 2^-33, in place.

    Equal rows must tie wherever they stand, but the last bits of a product depend on the position of a row in its
    block. The grid is far coarser than the rounding of float64, and far finer than that of the float32 features.
    """
    return similarity.mul_(2.0**33).round_().mul_(2.0**-33)


def cosine_similarity(query: torch.Tensor, gallery: torch.Tensor) -> torch.Tensor:
    """Return the cosines (..., Q, G) of unit rows (..., Q, D) and (..., G, D), float64, on a grid of 2^-33."""
    return on_grid(query.double() @ gallery.double().transpose(-1, -2))


def pack_codes(features: torch.Tensor) -> torch.Tensor:
    """Pack sign(features) (N, D) into bits (N, ceil(D / 8)), uint8; the first feature is the lowest bit."""
    bits = F.pad((features >= 0).byte(), (0, -features.shape[1] % 8)).unflatten(1, (-1, 8))
    return (bits << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(2, dtype=torch.uint8)


def unpack_codes(codes: torch.Tensor, dim: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return packed codes (..., ceil(D / 8)) as (..., D) of -1 and +1."""
    bits = codes[..., None] >> torch.arange(8, dtype=torch.uint8, device=codes.device) & 1
    return bits.flatten(-2)[..., :dim].to(dtype).mul_(2).sub_(1)


def as_matrix(buffer: torch.Tensor | None, rows: int, columns: int) -> torch.Tensor | None:
    """Return the start of a flat buffer as a matrix, so that a loop allocates no memory."""
    return None if buffer is None else buffer[:rows * columns].view(rows, columns)


def largest_norms(features: torch.Tensor) -> tuple[float, float]:
    """Return the largest norm of a row, and of a row's rounding error in bfloat16."""
    norm = rounding = 0.0
    for part in features.split(2**14):  # in parts, without a second tensor of their size
        error = part - part.bfloat16().to(part.dtype)
        norm = max(norm, torch.linalg.vector_norm(part, dim=1).amax().item())
        rounding = max(rounding, torch.linalg.vector_norm(error, dim=1).amax().item())
    return norm, rounding


class Cosine:
    """Cosines of queries (Q, D) and a gallery (G, D), float32 or float64, unit rows.

    Attributes:
        dtype: of `tile`.
        error: bound of the error of any entry of `tile`.
        finer: pairs of a more precise dtype and its error bound, for the entries that `tile` leaves undecided.
    """

    def __init__(self, query: torch.Tensor, gallery: torch.Tensor):
        self.query, self.gallery, self.dim = query, gallery, query.shape[1]
        (query_length, query_rounding), (length, rounding) = largest_norms(query), largest_norms(gallery)
        # The error of a float32 sum of D products, in any order, is at most D 2^-24 |x| |y| (Higham, Accuracy and
        # Stability of Numerical Algorithms, section 3.1); four more for rounding the rows to float32, and the grid.
        self.error = self.absolute_error = 1.001 * (self.dim + 4) * 2.0**-24 * query_length * length + 2.0**-33
        self.dtype, self.relative_error, self.finer = torch.float32, 0.0, ((torch.float64, 0.0),)
        if query.device.type == 'cpu' and bfloat16_is_fast(query.device):
            # Products of bfloat16 are summed in float32: |x'y' - xy| <= |x' - x| |y'| + |x| |y' - y| for the rounded
            # x', y'. The sum is then rounded to bfloat16, 8 bits.
            self.dtype, self.finer = torch.bfloat16, ((torch.float32, self.error), *self.finer)
            self.relative_error = 1.001 * 2.0**-8
            self.absolute_error = 1.01 * (self.error + query_rounding * length + query_length * rounding)
            largest = (query_length * length + self.absolute_error) / (1 - self.relative_error)  # value of a tile
            self.error = self.absolute_error + self.relative_error * largest

    def tile(self, rows, columns, buffer: torch.Tensor | None = None) -> torch.Tensor:
        """Return similarities (r, c) of `dtype`, in the buffer if there is one."""
        query, gallery = self.query[rows].to(self.dtype), self.gallery[columns].to(self.dtype)
        return torch.mm(query, gallery.T, out=as_matrix(buffer, len(query), len(gallery)))

    def error_of(self, value: torch.Tensor) -> torch.Tensor | float:
        """Return the error bound of some entries of `tile`, given as float64."""
        return self.absolute_error + self.relative_error * value.abs() if self.relative_error else self.error

    def exact(self, rows, columns) -> torch.Tensor:
        """Return similarities (..., r, c) in float64 of rows (..., r) and columns (..., c)."""
        return cosine_similarity(self.query[rows], self.gallery[columns])

    def recompute(self, rows, columns, dtype: torch.dtype) -> torch.Tensor:
        """Return similarities (r, c) computed in a dtype of `finer`."""
        if dtype == torch.float64:
            return self.exact(rows, columns)
        return self.query[rows].to(dtype) @ self.gallery[columns].to(dtype).T

    def pairs(self, rows: torch.Tensor, columns: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return similarities (n,), float64, of n pairs, computed in a dtype of `finer`."""
        step = max(1, 2**19 // self.dim)  # what stays in a processor's cache
        parts = [self.query[row].to(dtype).mul_(self.gallery[column]).sum(1)
                 for row, column in zip(rows.split(step), columns.split(step), strict=True)]
        similarity = torch.cat(parts).double()
        return on_grid(similarity) if dtype == torch.float64 else similarity


class Hamming:
    """Equal less different bits, D - 2 x the Hamming distance, of the signs of queries (Q, D) and a gallery (G, D).

    Codes are kept as packed bits and unpacked tile by tile for a product of floats, which is exact, since its results
    are whole numbers below 2^24. Up to D = 2047 one float holds two of them, so a product with x_i + 4096 x_k serves
    two queries. bfloat16 holds whole numbers up to 256 and even ones up to 512, and hence all results for D up to 256
    and for even D up to 512. The attributes are those of Cosine; `tile` is exact.
    """
    error, finer = 0.0, ()

    def __init__(self, query: torch.Tensor, gallery: torch.Tensor):
        self.dim, self.query = query.shape[1], pack_codes(query)
        self.gallery = self.query if gallery is query else pack_codes(gallery)
        fits = self.dim <= (256 if self.dim % 2 else 512)
        native = query.device.type == 'cpu' and bfloat16_is_fast(query.device)
        self.dtype = torch.bfloat16 if fits and native else torch.float32

    def tile(self, rows, columns, buffer: torch.Tensor | None = None) -> torch.Tensor:
        """Return equal less different bits (r, c) of `dtype`, in the buffer if there is one."""
        query, gallery = (unpack_codes(codes, self.dim, self.dtype)
                          for codes in (self.query[rows], self.gallery[columns]))
        tile = as_matrix(buffer, len(query), len(gallery))
        if self.dtype == torch.bfloat16 or self.dim > 2047 or len(query) % 2:
            return torch.mm(query, gallery.T, out=tile)
        tile = torch.empty(len(query), len(gallery), device=query.device) if tile is None else tile
        (first, second), (upper, lower) = query.chunk(2), tile.chunk(2)
        torch.mm(torch.add(first, second, alpha=4096), gallery.T, out=upper)
        torch.mul(upper, 1 / 4096, out=lower).round_()
        upper.sub_(lower, alpha=4096)
        return tile

    def error_of(self, value: torch.Tensor) -> float:
        """Return the error bound of entries of `tile`: 0."""
        return self.error

    def exact(self, rows, columns) -> torch.Tensor:
        """Return equal less different bits (..., r, c), float64, of rows (..., r) and columns (..., c)."""
        query, gallery = unpack_codes(self.query[rows], self.dim), unpack_codes(self.gallery[columns], self.dim)
        return (query @ gallery.transpose(-1, -2)).double()


class Search(NamedTuple):
    """Queries and the gallery that they are searched in."""

    compare: Cosine | Hamming
    query_labels: torch.Tensor  # (Q,) int64
    gallery_labels: torch.Tensor  # (G,)
    symmetric: bool  # the queries are the gallery

    def for_queries(self, rows: torch.Tensor) -> 'Search':
        """Return the search of some of the queries only."""
        compare = copy(self.compare)
        compare.query = compare.query[rows]
        return Search(compare, self.query_labels[rows], self.gallery_labels, False)


def positive_similarities(search: Search, itself: torch.Tensor | None) -> torch.Tensor:
    """Return each query's similarities to the images of its class, descending, (Q, R) float64, padded with -inf.

    Args:
        itself: (Q,) index of each query in the gallery, which is left out; None if the queries are not in it.
    """
    orders = [labels.argsort(stable=True) for labels in (search.query_labels, search.gallery_labels)]
    in_order = [search.query_labels[orders[0]], search.gallery_labels[orders[1]]]
    classes = in_order[0].unique_consecutive()
    starts = torch.stack([torch.searchsorted(labels, classes) for labels in in_order], 1)
    counts = torch.stack([torch.searchsorted(labels, classes, right=True) for labels in in_order], 1) - starts
    most = max(1, int(counts[:, 1].max()))
    positives = search.query_labels.new_full((len(search.query_labels), most), -torch.inf, dtype=torch.float64)
    for size in counts.unique(dim=0).tolist():  # classes of one size at once
        members = [torch.arange(number, device=positives.device) for number in size]
        for part in starts[(counts == torch.tensor(size, device=counts.device)).all(1)].split(
                max(1, BLOCK_ENTRIES // 8 // (search.compare.dim * sum(size) + size[0] * size[1] + 1))):
            rows, columns = (order[part[:, kind:kind + 1] + members[kind]] for kind, order in enumerate(orders))
            similarity = search.compare.exact(rows, columns)
            if itself is not None:
                similarity[itself[rows][:, :, None] == columns[:, None, :]] = -torch.inf
            positives[rows.flatten(), :size[1]] = similarity.flatten(0, 1)
    return positives.sort(1, descending=True).values


def grouped_positives(search: Search):
    """Yield groups of queries that fit into memory: their rows (q,), their search, their positive similarities."""
    largest_class = int(search.gallery_labels.unique(return_counts=True)[1].max())
    groups = torch.arange(len(search.query_labels), device=search.query_labels.device).split(
        max(1, BLOCK_ENTRIES // 2 // largest_class))
    for rows in groups:
        part = search if len(groups) == 1 else search.for_queries(rows)
        yield rows, part, positive_similarities(part, rows if search.symmetric else None)


def count_above(positives: torch.Tensor, rows: torch.Tensor, bound: torch.Tensor, or_equal: bool) -> torch.Tensor:
    """Return how many of the positives (Q, R) of each of n rows exceed (or reach) its bound (n,), by bisection."""
    low, high = torch.zeros_like(rows), torch.full_like(rows, positives.shape[1])
    for _ in range(positives.shape[1].bit_length()):
        middle = (low + high) // 2
        value = positives[rows, middle.clamp(max=positives.shape[1] - 1)]
        above = ((value >= bound) if or_equal else (value > bound)) & (low < high)
        low, high = low.where(~above, middle + 1), high.where(above, middle)
    return low


def entries_above(tile: torch.Tensor, threshold: torch.Tensor, transpose: bool):
    """Yield row, column and value (n,) of the entries of a tile (r, c) that reach the threshold (r,) of their row.

    With `transpose`, the tile is given as (c, r).
    """
    dtype, lowest = tile.dtype, -torch.inf
    if dtype == torch.bfloat16:
        if threshold.amin() > 0:  # positive bfloat16 bits are ordered like integers, whose maxima are faster
            tile, threshold, lowest = tile.view(torch.int16), threshold.view(torch.int16), -2**15
        else:
            tile, threshold, dtype = tile.float(), threshold.float(), torch.float32
    missing = -tile.shape[not transpose] % ENTRIES_PER_TEST
    if missing:
        tile = F.pad(tile, (0, 0, 0, missing) if transpose else (0, missing), value=lowest)
    if transpose:  # a maximum over the last dimension of tile.T is slow
        tests = tile.unflatten(0, (-1, ENTRIES_PER_TEST))
        highest, tests = tests.amax(1).T, tests.permute(2, 0, 1)
    else:
        tests = tile.unflatten(1, (-1, ENTRIES_PER_TEST))
        highest = tests.amax(2)
    for part in (highest >= threshold[:, None]).nonzero().split(2**20 // ENTRIES_PER_TEST):
        rows, numbers = part.unbind(1)
        values = tests[rows, numbers]
        found, position = (values >= threshold[rows, None]).nonzero(as_tuple=True)
        yield rows[found], numbers[found] * ENTRIES_PER_TEST + position, values[found, position].view(dtype)


def count_in_tiles(search: Search, positives: torch.Tensor, threshold: torch.Tensor, title: str) -> torch.Tensor:
    """Count for each positive (Q, R) the negatives nearer than it, and half of those tied with it, (Q, R) float64.

    Args:
        threshold: (Q,) of compare.dtype. The count is complete for positives of at least threshold + compare.error,
            and may be too small for the others.
        title: of the progress bar.
    """
    compare, query_labels, gallery_labels, symmetric = search
    num_queries, most = positives.shape
    # Number of negatives between each of the descending positives and the one before it.
    counts = torch.zeros(num_queries * (most + 1), dtype=torch.float64, device=positives.device)

    def count(tile: torch.Tensor, rows: slice, columns: slice, transpose: bool) -> None:
        products = {}
        for row, column, value in entries_above(tile, threshold[rows], transpose):
            negative = query_labels[rows][row] != gallery_labels[columns][column]
            row, column = row[negative] + rows.start, column[negative] + columns.start
            value = value[negative].double()
            error = compare.error_of(value)
            first = count_above(positives, row, value + error, or_equal=False)
            last = count_above(positives, row, value - error, or_equal=True)
            for dtype, error in compare.finer:
                close = (first != last).nonzero()[:, 0]  # closer to a positive than the error bound
                row_close, column_close = row[close], column[close]
                if len(close) * 64 > tile.numel():  # too many to compute pair by pair
                    if dtype not in products:
                        products[dtype] = compare.recompute(rows, columns, dtype)
                    value = products[dtype][row_close - rows.start, column_close - columns.start].double()
                else:
                    value = compare.pairs(row_close, column_close, dtype)
                first[close] = count_above(positives, row_close, value + error, or_equal=False)
                last[close] = count_above(positives, row_close, value - error, or_equal=True)
            # In a tie with positives, first and last differ: half of the negative counts before them, half after.
            half = positives.new_full((len(row),), 0.5)
            for position in (first, last):
                counts.index_add_(0, row * (most + 1) + position, half)

    side = TILE_SIDE.get(positives.device.type, TILE_SIDE['cuda'])
    tiles = [(slice(row, row + side), slice(column, column + side)) for row in range(0, num_queries, side)
             for column in range(row if symmetric else 0, len(gallery_labels), side)]
    buffer = positives.new_empty(min(side, num_queries) * min(side, len(gallery_labels)), dtype=compare.dtype)
    for rows, columns in progress(tiles[world_rank()::world_size()], desc=title, unit='tile', delay=2):
        tile = compare.tile(rows, columns, buffer)
        count(tile, rows, columns, False)
        if symmetric and rows != columns:
            count(tile, columns, rows, True)
    return sum_over_processes(counts).view(num_queries, most + 1)[:, :-1].cumsum(1)


def guess_threshold(search: Search, needed: torch.Tensor) -> torch.Tensor:
    """Estimate for each query a similarity (Q,), float32, that somewhat more than `needed` (Q,) negatives exceed.

    It comes from a sample of the gallery. Results do not depend on it, only the time does.
    """
    _, query_labels, gallery_labels, _ = search
    size = min(SAMPLED_IMAGES, len(gallery_labels))
    sample = torch.randperm(len(gallery_labels), generator=torch.Generator().manual_seed(0))[:size]
    sample = sample.sort().values.to(query_labels.device)
    expected = needed * (size / len(gallery_labels))
    rank = (expected + 2 * expected.sqrt() + 1).long().clamp(max=size)
    side = max(1, BLOCK_ENTRIES // 4 // size)
    parts = [query_labels.new_zeros(0, dtype=torch.float32)]  # a process may have no query
    own = shard(len(query_labels))
    for start in own[::side]:
        rows = slice(start, min(start + side, own.stop))
        similarity = search.compare.tile(rows, sample).float()
        similarity.masked_fill_(query_labels[rows, None] == gallery_labels[sample], -torch.inf)
        nearest = similarity.topk(int(rank[rows].max()), 1).values
        parts.append(nearest.gather(1, rank[rows, None] - 1)[:, 0])
    return gather_rows(torch.cat(parts)).clamp(min=-1e9)


def count_decisive(search: Search, positives: torch.Tensor, largest: int) -> torch.Tensor:
    """Count the negatives nearer than each positive, (Q, R), as far as that decides a metric.

    An incomplete count remains only if it already puts its positive behind rank R and, for the best positive, behind
    the largest K.
    """
    compare = search.compare
    counted = positives > -torch.inf
    number, order = counted.sum(1), torch.arange(1, positives.shape[1] + 1, device=positives.device)
    threshold = guess_threshold(search, 2.0 * number + 1 + min(largest, 10))
    last = positives.masked_fill(~counted, torch.inf).amin(1) - 2 * compare.error
    threshold = threshold.maximum(last.float()).to(compare.dtype)
    nearer = count_in_tiles(search, positives, threshold, 'recall')
    incomplete = counted & (positives < threshold.double()[:, None] + compare.error)
    undecided = incomplete & (order + nearer <= number[:, None])
    undecided[:, 0] |= incomplete[:, 0] & (nearer[:, 0] < largest)
    rows = undecided.any(1).nonzero()[:, 0]
    if len(rows):
        last = positives[rows].masked_fill(~undecided[rows], torch.inf).amin(1) - 2 * compare.error
        nearer[rows] = count_in_tiles(search.for_queries(rows), positives[rows], last.to(compare.dtype),
                                    f'recall of {len(rows):,} far ones')
    return nearer


def nearer_negatives(queries: tuple, gallery: tuple | None, binary: bool, largest: int):
    """Count the negatives nearer than each positive, group by group of queries.

    Args:
        queries: features (Q, D) and labels (Q,).
        gallery: features (G, D) and labels (G,); None: the queries are searched in each other, each left out of its own
            search by its index.
        binary: compare signs by Hamming distance instead of features by cosine.
        largest: the largest K of Recall@K.

    Yields:
        nearer (q, R) float64, for the descending positives of each query the number of nearer negatives plus half of
        the tied ones, as far as that decides a metric; and the number (q,) of each query's positives, at most R.
    """
    (features, labels), (gallery_features, gallery_labels) = queries, gallery or queries
    compare = (Hamming if binary else Cosine)(features, gallery_features)
    for _, search, positives in grouped_positives(Search(compare, labels, gallery_labels, gallery is None)):
        number = (positives > -torch.inf).sum(1)
        yield count_decisive(search, positives, largest) if number.any() else torch.zeros_like(positives), number
