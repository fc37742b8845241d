"""Retrieval metrics of embeddings, exact: Recall@K, MAP@R and R-precision, by cosine or by Hamming distance of signs.

    metrics = retrieval_metrics(features, labels, recalls=(1, 10, 100, 1000))  # each query among the others
    metrics = retrieval_metrics(query_features, query_labels, gallery_features, gallery_labels, binary=True)

This file is the only home of metrics. A query is never its own neighbour, left out by its index; a negative tied with a
positive stands half before it; a query without another image of its class is left out and counted.

How `retrieval_metrics` is exact without a float64 product of everything with everything: a metric needs, for each
positive of a query, the number of negatives nearer than it, and only for positives among the nearest. So

1. the positives' similarities are computed in float64 (`positive_similarities`);
2. a sample of the gallery tells each query a similarity that few negatives exceed (`guess_threshold`);
3. one pass over all pairs, in bfloat16 where the processor has instructions for it and else in float32, picks those
   above it. A pick that lies farther from every positive of its query than the pass can be wrong is counted as it is,
   the others are computed again, in float32 and then in float64 (`count_nearer`). Where the queries are the gallery,
   each product serves both of its images, so that half of the matrix is enough;
4. queries that this leaves undecided, such as those whose best positive lies behind thousands, take a second pass
   with a threshold of their own.

Processes share the tiles of the passes; all counts are whole or half numbers, whose sum has no rounding.
"""
import copy

import numpy as np
import torch
from torch.nn import functional as F

from utils import (UserError, bfloat16_is_fast, gather_rows, progress, shard, sum_over_processes, world_rank,
                   world_size)

BLOCK_ELEMENTS = 2**24  # numbers held at once: 128 MiB in float64
TILE = {'cpu': 4096, 'cuda': 8192}  # side of the blocks of similarities
SAMPLE = 2048  # images of the gallery that tell the thresholds
CHUNK = 32  # similarities that share the test whether one of them is above the threshold
COUNTS = ('queries', 'without_positive')  # the metrics that are no per cents


# ---------------------------------------------------- similarities ---------------------------------------------------
def on_grid(similarity: torch.Tensor) -> torch.Tensor:
    """Round float64 similarities to multiples of 2^-33, in place.

    Equal rows must tie wherever they stand, but a product's last bits depend on where the row lies in a block. The
    grid lies far above the rounding of float64 and far below that of the float32 features.
    """
    return similarity.mul_(2.0**33).round_().mul_(2.0**-33)


def cosine_similarity(query: torch.Tensor, gallery: torch.Tensor) -> torch.Tensor:
    """Return the products (..., Q, G) of unit rows (..., Q, D) and (..., G, D), float64, on a grid of 2^-33."""
    return on_grid(query.double() @ gallery.double().transpose(-1, -2))


def signs(features: torch.Tensor) -> torch.Tensor:
    """Return the binary codes of features as float32 of -1 and +1; a zero counts as +1."""
    return torch.where(features >= 0, 1.0, -1.0)


def pack_codes(features: torch.Tensor) -> torch.Tensor:
    """Pack sign(features) (N, D) into bytes (N, ceil(D / 8)), uint8; the first feature is the lowest bit."""
    bits = F.pad((features >= 0).byte(), (0, -features.shape[1] % 8)).unflatten(1, (-1, 8))
    return (bits << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(2, dtype=torch.uint8)


def unpack_codes(codes: torch.Tensor, dim: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return packed codes (..., ceil(D / 8)) as (..., D) of -1 and +1."""
    bits = codes[..., None] >> torch.arange(8, dtype=torch.uint8, device=codes.device) & 1
    return bits.flatten(-2)[..., :dim].to(dtype).mul_(2).sub_(1)


def shaped(room: torch.Tensor | None, rows: int, columns: int) -> torch.Tensor | None:
    """Return the beginning of some memory as a matrix, so that a loop need not ask for memory in each turn."""
    return None if room is None else room[:rows * columns].view(rows, columns)


def longest(features: torch.Tensor) -> tuple[float, float]:
    """Return the largest norm of a row, and that of a row less the same row in bfloat16."""
    parts = features.split(2**14)  # spares a second tensor of their size
    return tuple(max(torch.linalg.vector_norm(rows(part), dim=1).amax().item() for part in parts)
                 for rows in (lambda part: part, lambda part: part - part.bfloat16().to(part.dtype)))


class Cosine:
    """Cosines of queries (Q, D) and a gallery (G, D), float32 or float64, unit rows.

    Attributes:
        dtype: of `tile`.
        error: no cosine of `tile` is off by more.
        finer: pairs of a dtype, and by what the cosines computed in it may be off.
    """

    def __init__(self, query: torch.Tensor, gallery: torch.Tensor):
        self.query, self.gallery, self.dim = query, gallery, query.shape[1]
        (query_length, query_rounding), (length, rounding) = longest(query), longest(gallery)
        # A float32 sum of D products, in any order, is off by at most D 2^-24 |x| |y| (Higham, Accuracy and Stability
        # of Numerical Algorithms, section 3.1); four more for rounding the rows to float32, and the grid's step.
        self.error = 1.001 * (self.dim + 4) * 2.0**-24 * query_length * length + 2.0**-33
        self.dtype, self.relative_error, self.finer = torch.float32, 0.0, ((torch.float64, 0.0),)
        if query.device.type == 'cpu' and bfloat16_is_fast(query.device):
            # Products of bfloat16 are summed in float32: |x'y' - xy| <= |x' - x| |y'| + |x| |y' - y| for the rounded
            # x', y'. The sum is then rounded to bfloat16, 8 bits.
            self.dtype, self.finer = torch.bfloat16, ((torch.float32, self.error), *self.finer)
            self.relative_error = 1.001 * 2.0**-8
            self.absolute_error = 1.01 * (self.error + query_rounding * length + query_length * rounding)
            largest = (query_length * length + self.absolute_error) / (1 - self.relative_error)  # value of a tile
            self.error = self.absolute_error + self.relative_error * largest
        else:
            self.absolute_error = self.error

    def tile(self, rows, columns, room: torch.Tensor | None = None) -> torch.Tensor:
        """Return similarities (r, c), dtype `dtype`, in `room` where it is given."""
        query, gallery = self.query[rows].to(self.dtype), self.gallery[columns].to(self.dtype)
        return torch.mm(query, gallery.T, out=shaped(room, len(query), len(gallery)))

    def error_of(self, value: torch.Tensor) -> torch.Tensor | float:
        """Return by what values of `tile`, float64, may be off."""
        return self.absolute_error + self.relative_error * value.abs() if self.relative_error else self.error

    def exact(self, rows, columns) -> torch.Tensor:
        """Return similarities (..., r, c) in float64 of rows (..., r) and columns (..., c)."""
        return cosine_similarity(self.query[rows], self.gallery[columns])

    def again(self, rows, columns, dtype: torch.dtype) -> torch.Tensor:
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

    def of(self, rows: torch.Tensor) -> 'Cosine':
        """Return the same for some of the queries."""
        part = copy.copy(self)
        part.query = self.query[rows]
        return part


class Hamming:
    """Equal less different bits, D - 2 x the Hamming distance, of the signs of queries (Q, D) and a gallery (G, D).

    They are kept as packed bits and unpacked tile by tile for a product of floats, which is exact: whole numbers below
    2^24. Up to D = 2047 there is room for two in one float, so that a product of x_i + 4096 x_k serves two queries.
    bfloat16 holds whole numbers up to 256 and even ones up to 512, and so all results up to D = 256 and for even D up
    to 512, since equal less different bits is as even as D.

    Attributes:
        dtype, error, finer: as those of Cosine; `tile` is exact.
    """
    error, finer = 0.0, ()

    def __init__(self, query: torch.Tensor, gallery: torch.Tensor):
        self.dim, self.query = query.shape[1], pack_codes(query)
        self.gallery = self.query if gallery is query else pack_codes(gallery)
        fits = self.dim <= (256 if self.dim % 2 else 512)
        native = query.device.type == 'cpu' and bfloat16_is_fast(query.device)
        self.dtype = torch.bfloat16 if fits and native else torch.float32

    def tile(self, rows, columns, room: torch.Tensor | None = None) -> torch.Tensor:
        """Return equal less different bits (r, c), dtype `dtype`, in `room` where it is given."""
        query, gallery = (unpack_codes(codes, self.dim, self.dtype)
                          for codes in (self.query[rows], self.gallery[columns]))
        tile = shaped(room, len(query), len(gallery))
        if self.dtype == torch.bfloat16 or self.dim > 2047 or len(query) % 2:
            return torch.mm(query, gallery.T, out=tile)
        tile = torch.empty(len(query), len(gallery), device=query.device) if tile is None else tile
        (first, second), (upper, lower) = query.chunk(2), tile.chunk(2)
        torch.mm(torch.add(first, second, alpha=4096), gallery.T, out=upper)
        torch.mul(upper, 1 / 4096, out=lower).round_()
        upper.sub_(lower, alpha=4096)
        return tile

    def error_of(self, value: torch.Tensor) -> float:
        """Return by what values of `tile` may be off."""
        return self.error

    def exact(self, rows, columns) -> torch.Tensor:
        """Return equal less different bits (..., r, c), float64, of rows (..., r) and columns (..., c)."""
        query, gallery = unpack_codes(self.query[rows], self.dim), unpack_codes(self.gallery[columns], self.dim)
        return (query @ gallery.transpose(-1, -2)).double()

    def of(self, rows: torch.Tensor) -> 'Hamming':
        """Return the same for some of the queries."""
        part = copy.copy(self)
        part.query = self.query[rows]
        return part


def similarity_to(gallery_features: torch.Tensor, binary: bool):
    """Return a function from query features (Q, D) to similarities (Q, G), float64, larger is nearer.

    Args:
        gallery_features: (G, D).
        binary: the share of equal bits of sign(features) instead of the cosine.
    """
    if not binary:
        return lambda query: cosine_similarity(query, gallery_features)
    codes, dim = signs(gallery_features), gallery_features.shape[1]
    return lambda query: 1 - (dim - (signs(query) @ codes.T).double()) / 2 / dim


# ---------------------------------------------------- counting -------------------------------------------------------
def positive_similarities(compare, query_labels: torch.Tensor, gallery_labels: torch.Tensor,
                          itself: torch.Tensor | None) -> torch.Tensor:
    """Return each query's similarities to the images of its class, descending, (Q, R) float64, padded with -inf.

    Args:
        compare: Cosine or Hamming.
        query_labels, gallery_labels: (Q,), (G,) int64.
        itself: (Q,) where each query stands in the gallery and is left out; None: nowhere.
    """
    query_order, gallery_order = query_labels.argsort(stable=True), gallery_labels.argsort(stable=True)
    sorted_queries, sorted_gallery = query_labels[query_order], gallery_labels[gallery_order]
    classes = sorted_queries.unique_consecutive()
    starts = torch.stack([torch.searchsorted(labels, classes) for labels in (sorted_queries, sorted_gallery)], 1)
    ends = torch.stack([torch.searchsorted(labels, classes, right=True) for labels in (sorted_queries, sorted_gallery)],
                       1)
    counts = ends - starts
    most = max(1, int(counts[:, 1].max()))
    positives = torch.full((len(query_labels), most), -torch.inf, dtype=torch.float64, device=query_labels.device)
    for size in counts.unique(dim=0).tolist():  # classes of one size at once
        members = [torch.arange(number, device=query_labels.device) for number in size]
        for part in starts[(counts == torch.tensor(size, device=counts.device)).all(1)].split(
                max(1, BLOCK_ELEMENTS // 8 // (compare.dim * sum(size) + size[0] * size[1] + 1))):
            rows, columns = query_order[part[:, :1] + members[0]], gallery_order[part[:, 1:] + members[1]]
            similarity = compare.exact(rows, columns)
            if itself is not None:
                similarity[itself[rows][:, :, None] == columns[:, None, :]] = -torch.inf
            positives[rows.flatten(), :size[1]] = similarity.flatten(0, 1)
    return positives.sort(1, descending=True).values


def number_above(positives: torch.Tensor, rows: torch.Tensor, bound: torch.Tensor, or_equal: bool) -> torch.Tensor:
    """Return how many of the positives (Q, R) of each of n rows are larger than its bound (n,), or equal: bisection."""
    low, high = torch.zeros_like(rows), torch.full_like(rows, positives.shape[1])
    for _ in range(positives.shape[1].bit_length()):
        middle = (low + high) // 2
        value = positives[rows, middle.clamp(max=positives.shape[1] - 1)]
        above = ((value >= bound) if or_equal else (value > bound)) & (low < high)
        low, high = low.where(~above, middle + 1), high.where(above, middle)
    return low


def picks(tile: torch.Tensor, threshold: torch.Tensor, transpose: bool):
    """Yield row, column, value, (n,) each, of the entries of a tile (r, c) that reach the threshold (r,) of the row.

    With `transpose` the tile is (c, r).
    """
    dtype, lowest = tile.dtype, -torch.inf
    if dtype == torch.bfloat16:
        if threshold.amin() > 0:  # from there on its bits are ordered as integers are, of which maxima are faster
            tile, threshold, lowest = tile.view(torch.int16), threshold.view(torch.int16), -2**15
        else:
            tile, threshold, dtype = tile.float(), threshold.float(), torch.float32
    width = tile.shape[not transpose]
    if width % CHUNK:
        tile = F.pad(tile, (0, 0, 0, -width % CHUNK) if transpose else (0, -width % CHUNK), value=lowest)
    if transpose:  # a maximum over the last dimension of tile.T would be slow
        chunks = tile.unflatten(0, (-1, CHUNK))
        highest, chunks = chunks.amax(1).T, chunks.permute(2, 0, 1)
    else:
        chunks = tile.unflatten(1, (-1, CHUNK))
        highest = chunks.amax(2)
    row, chunk = (highest >= threshold[:, None]).nonzero(as_tuple=True)
    for rows, numbers in zip(row.split(2**20 // CHUNK), chunk.split(2**20 // CHUNK), strict=True):
        values = chunks[rows, numbers]
        which, place = (values >= threshold[rows, None]).nonzero(as_tuple=True)
        yield rows[which], numbers[which] * CHUNK + place, values[which, place].view(dtype)


def count_nearer(compare, positives: torch.Tensor, threshold: torch.Tensor, query_labels: torch.Tensor,
                 gallery_labels: torch.Tensor, symmetric: bool, title: str) -> torch.Tensor:
    """Count for each positive the negatives nearer than it, plus half of those tied with it, (Q, R) float64.

    Args:
        compare: Cosine or Hamming.
        positives: (Q, R) of `positive_similarities`.
        threshold: (Q,) of compare.dtype; the count is complete for positives of at least threshold + compare.error,
            and too small, if anything, for the others.
        query_labels, gallery_labels: (Q,), (G,) int64.
        symmetric: the queries are the gallery.
        title: of the progress bar.
    """
    num_queries, most = positives.shape
    # Where a negative stands among the descending positives; all after it lie farther than the negative.
    places = torch.zeros(num_queries * (most + 1), dtype=torch.float64, device=positives.device)

    def count(tile: torch.Tensor, rows: slice, columns: slice, transpose: bool) -> None:
        products = {}
        for row, column, value in picks(tile, threshold[rows], transpose):
            negative = query_labels[rows][row] != gallery_labels[columns][column]
            row, column = row[negative] + rows.start, column[negative] + columns.start
            value = value[negative].double()
            error = compare.error_of(value)
            first = number_above(positives, row, value + error, or_equal=False)
            last = number_above(positives, row, value - error, or_equal=True)
            for dtype, error in compare.finer:
                close = (first != last).nonzero()[:, 0]  # a positive lies too near to tell which is larger
                row_close, column_close = row[close], column[close]
                if len(close) * 64 > tile.numel():  # too many to take one by one
                    if dtype not in products:
                        products[dtype] = compare.again(rows, columns, dtype)
                    value = products[dtype][row_close - rows.start, column_close - columns.start].double()
                else:
                    value = compare.pairs(row_close, column_close, dtype)
                first[close] = number_above(positives, row_close, value + error, or_equal=False)
                last[close] = number_above(positives, row_close, value - error, or_equal=True)
            half = positives.new_full((len(row),), 0.5)
            for place in (first, last):
                places.index_add_(0, row * (most + 1) + place, half)

    side = TILE.get(positives.device.type, TILE['cuda'])
    tiles = [(row, column) for row in range(0, num_queries, side)
             for column in range(row if symmetric else 0, len(gallery_labels), side)]
    own = tiles[world_rank()::world_size()]
    room = torch.empty(min(side, num_queries) * min(side, len(gallery_labels)), dtype=compare.dtype,
                       device=positives.device)
    for row, column in progress(own, desc=title, unit='tile', delay=2):
        rows, columns = slice(row, row + side), slice(column, column + side)
        tile = compare.tile(rows, columns, room)
        count(tile, rows, columns, False)
        if symmetric and row != column:
            count(tile, columns, rows, True)
    return sum_over_processes(places).view(num_queries, most + 1)[:, :-1].cumsum(1)


def guess_threshold(compare, needed: torch.Tensor, query_labels: torch.Tensor,
                    gallery_labels: torch.Tensor) -> torch.Tensor:
    """Return for each query a similarity (Q,), float32, that somewhat more than `needed` (Q,) negatives exceed.

    It is read from a sample of the gallery, so that it may be off; results do not depend on it, only the time does.
    """
    size = min(SAMPLE, len(gallery_labels))
    sample = torch.randperm(len(gallery_labels), generator=torch.Generator().manual_seed(0))[:size].sort().values
    sample = sample.to(query_labels.device)
    expected = needed * (size / len(gallery_labels))
    place = (expected + 2 * expected.sqrt() + 1).long().clamp(max=size)
    own = shard(len(query_labels))
    side = max(1, BLOCK_ELEMENTS // 4 // size)
    parts = [query_labels.new_zeros(0, dtype=torch.float32)]  # a process may have no query
    for start in range(own.start, own.stop, side):
        rows = slice(start, min(start + side, own.stop))
        similarity = compare.tile(rows, sample).float()
        similarity.masked_fill_(query_labels[rows, None] == gallery_labels[sample], -torch.inf)
        nearest = similarity.topk(int(place[rows].max()), 1).values
        parts.append(nearest.gather(1, place[rows, None] - 1)[:, 0])
    return gather_rows(torch.cat(parts)).clamp(min=-1e9)


def count_decisive(compare, positives: torch.Tensor, query_labels: torch.Tensor, gallery_labels: torch.Tensor,
                   symmetric: bool, largest: int) -> torch.Tensor:
    """Count the negatives nearer than each positive, (Q, R), as far as it decides a metric.

    A count that is not complete stands where the negatives found put the positive behind rank R already, and, for the
    best positive, behind the largest K too.
    """
    counted = positives > -torch.inf
    number = counted.sum(1)
    order = torch.arange(1, positives.shape[1] + 1, device=positives.device)
    needed = 2.0 * number + 1 + min(largest, 10)
    threshold = guess_threshold(compare, needed, query_labels, gallery_labels)
    last = positives.masked_fill(~counted, torch.inf).amin(1) - 2 * compare.error
    threshold = threshold.maximum(last.float()).to(compare.dtype)
    nearer = count_nearer(compare, positives, threshold, query_labels, gallery_labels, symmetric, 'recall')
    incomplete = counted & (positives < threshold.double()[:, None] + compare.error)
    undecided = incomplete & (order + nearer <= number[:, None])
    undecided[:, 0] |= incomplete[:, 0] & (nearer[:, 0] < largest)
    rows = undecided.any(1).nonzero()[:, 0]
    if len(rows):
        last = positives[rows].masked_fill(~undecided[rows], torch.inf).amin(1) - 2 * compare.error
        nearer[rows] = count_nearer(compare.of(rows), positives[rows], last.to(compare.dtype), query_labels[rows],
                                    gallery_labels, False, f'recall of {len(rows):,} far ones')
    return nearer


# ---------------------------------------------------- metrics --------------------------------------------------------
def check_finite(**features: torch.Tensor) -> None:
    """Raise a UserError that counts the rows which are not finite, if any."""
    for name, rows in features.items():
        broken = sum(int((~part.isfinite().all(1)).sum()) for part in rows.split(2**14))
        if broken:
            raise UserError(f'{broken} of {len(rows)} {name} features are not finite; the model that made them is '
                            'broken')


def retrieval_metrics(query_features: torch.Tensor, query_labels: torch.Tensor,
                      gallery_features: torch.Tensor | None = None, gallery_labels: torch.Tensor | None = None,
                      recalls: tuple[int, ...] = (1, 2, 4, 8), binary: bool = False) -> dict[str, float]:
    """Compute Recall@K, MAP@R and R-precision exactly; all processes that share the work have to call it.

    R@K is the share of queries with a positive among their K nearest, from the rank of the best positive; tied
    negatives count as half. With R the number of a query's positives, MAP@R = 1/R sum_{j: rank_j <= R} j / rank_j over
    them in the order of their similarity, and R-precision is the share of ranks up to R. The result does not depend on
    the order of the gallery.

    Args:
        query_features: (Q, D) float32, unit rows.
        query_labels: (Q,) int64.
        gallery_features, gallery_labels: (G, D), (G,); None: the queries are searched in each other, each left out of
            its own search by its index.
        recalls: the values of K, ascending.
        binary: compare sign(features) by Hamming distance instead of features by cosine.

    Returns:
        {'R@1': per cent, ..., 'MAP@R': per cent, 'R-precision': per cent, 'queries': number measured,
        'without_positive': number left out}.

    Raises:
        UserError: if a K is larger than the gallery, features are not finite, or no query has a positive.

    Source: Musgrave et al., A Metric Learning Reality Check, ECCV 2020, arXiv 2003.08505, section 3.2 (MAP@R).
    """
    symmetric = gallery_features is None
    if symmetric:
        gallery_features, gallery_labels = query_features, query_labels
    searched = len(gallery_features) - symmetric
    if recalls[-1] > searched:
        raise UserError(f'--recalls {recalls[-1]} is larger than the {searched} images that a query is searched in')
    check_finite(query=query_features, gallery=gallery_features)
    compare = (Hamming if binary else Cosine)(query_features, gallery_features)
    # All queries at once need their positives to fit.
    largest_class = int(gallery_labels.unique(return_counts=True)[1].max())
    groups = torch.arange(len(query_labels), device=query_labels.device).split(
        max(1, BLOCK_ELEMENTS // 2 // largest_class))
    ranks, maps, precisions = [], [], []
    for group in groups:
        whole, labels = len(groups) == 1, query_labels[group]
        compare_group = compare if whole else compare.of(group)
        positives = positive_similarities(compare_group, labels, gallery_labels, group if symmetric else None)
        found = positives[:, 0] > -torch.inf
        if not found.any():
            continue
        nearer = count_decisive(compare_group, positives, labels, gallery_labels, symmetric and whole, recalls[-1])
        order = torch.arange(1, positives.shape[1] + 1, device=labels.device)
        number = (positives > -torch.inf).sum(1, keepdim=True).double()
        rank = order + nearer
        counts = (order <= number) & (rank <= number)
        ranks.append(nearer[found, 0])
        maps.append(((counts * order / rank).sum(1, keepdim=True) / number)[found, 0])
        precisions.append((counts.sum(1, keepdim=True) / number)[found, 0])
    if not ranks:
        raise UserError('no query has another image of its class to find; a test class needs at least two images')
    rank = torch.cat(ranks)
    metrics = {f'R@{k}': 100 * (rank < k).double().mean().item() for k in recalls}
    metrics['MAP@R'] = 100 * torch.cat(maps).mean().item()
    metrics['R-precision'] = 100 * torch.cat(precisions).mean().item()
    return {**metrics, 'queries': len(rank), 'without_positive': len(query_labels) - len(rank)}


# ---------------------------------------------------- single queries -------------------------------------------------
def searched_subset(data_base: dict) -> str:
    """Return the subset that queries are searched in: the gallery where there is one."""
    return 'gallery' if 'gallery_images' in data_base else 'test'


def similarity_blocks(query_features: torch.Tensor, query_labels: torch.Tensor,
                      gallery_features: torch.Tensor | None = None, gallery_labels: torch.Tensor | None = None,
                      binary: bool = False):
    """Compare all queries with the gallery, block by block.

    Without a gallery the queries are searched in each other, each left out of its own search by its index.

    Args:
        query_features: (Q, D) float32, unit rows.
        query_labels: (Q,) int64.
        gallery_features, gallery_labels: (G, D), (G,); None: the queries themselves.
        binary: compare sign(features) by Hamming distance instead of features by cosine.

    Yields:
        similarity (n, G) float64, -inf where a query meets itself, and positive (n, G) bool, for n queries at a time.

    Raises:
        UserError: if features are not finite.
    """
    itself = gallery_features is None
    gallery_features = query_features if itself else gallery_features
    gallery_labels = query_labels if itself else gallery_labels
    check_finite(query=query_features, gallery=gallery_features)
    compare = similarity_to(gallery_features, binary)
    block = max(1, BLOCK_ELEMENTS // len(gallery_features))
    starts = range(0, len(query_features), block)
    for start in progress(starts, desc='rank', delay=2):
        rows = slice(start, start + block)
        similarity = compare(query_features[rows])
        positive = query_labels[rows, None] == gallery_labels
        if itself:
            own = torch.arange(len(similarity), device=similarity.device)
            similarity[own, start + own] = -torch.inf
            positive[own, start + own] = False
        yield similarity, positive


def best_positive_rank(similarity: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
    """Return the rank (Q,) of the best positive: negatives strictly nearer, plus half of those tied with it.

    Args:
        similarity: (Q, G), larger is nearer; -inf leaves an image out.
        positive: (Q, G) bool, same class.
    """
    best = similarity.masked_fill(~positive, -torch.inf).amax(1, keepdim=True)
    nearer = ((similarity > best) & ~positive).sum(1)
    tied = ((similarity == best) & ~positive).sum(1)
    return nearer + tied / 2


def rank_queries(data_base: dict, binary: bool = False) -> dict[str, torch.Tensor]:
    """Look at each query of a data base alone.

    Returns:
        {'rank': (Q,) float64, negatives nearer than the best positive, half of the tied, NaN without any positive;
        'margin': (Q,) float64, similarity of the best positive less that of the best negative;
        'nearest': (Q,) int64, the nearest image of the searched subset}.
    """
    tensors = [data_base.get(f'{subset}_{kind}') for subset in ('test', 'gallery') for kind in ('features', 'labels')]
    ranks, margins, nearest = [], [], []
    for similarity, positive in similarity_blocks(*tensors, binary=binary):
        ranks.append(best_positive_rank(similarity, positive).where(positive.any(1), torch.nan))
        best = [similarity.masked_fill(left_out, -torch.inf).amax(1) for left_out in (~positive, positive)]
        margins.append(best[0] - best[1])
        nearest.append(similarity.argmax(1))  # of ties the first, as in nearest_images
    return {'rank': torch.cat(ranks), 'margin': torch.cat(margins), 'nearest': torch.cat(nearest)}


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


def nearest_images(feature: torch.Tensor, data_base: dict, skip: tuple[str, int] | None, number: int,
                   binary: bool = False, compare=None) -> list[tuple[int, float]]:
    """Return the nearest images of the searched subset as (index, similarity), nearest first, ties in their order.

    Args:
        feature: (D,) of the query.
        skip: the query's own subset and index, which is not retrieved.
        number: how many; fewer where the subset holds fewer.
        binary: rank by Hamming distance; the similarity is then the share of equal bits.
        compare: of `similarity_to`, to spare its preparation for each of many queries.
    """
    subset = searched_subset(data_base)
    compare = compare or similarity_to(data_base[f'{subset}_features'], binary)
    similarity = compare(feature[None])[0]
    if skip and skip[0] == subset:
        similarity[skip[1]] = -torch.inf
    order = similarity.argsort(descending=True, stable=True)[:number].tolist()
    return [(index, similarity[index].item()) for index in order if similarity[index].isfinite()]
