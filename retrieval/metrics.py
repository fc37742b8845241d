"""Recall@K, MAP@R and R-precision, by cosine or by the Hamming distance of signs; open-set thresholds.

    metrics = retrieval_metrics(features, labels, recalls=(1, 10, 100, 1000))  # each query among the others
    metrics = retrieval_metrics(query_features, query_labels, gallery_features, gallery_labels, binary=True)

A query is never its own neighbour: it is left out by its index. A negative tied with a positive counts as half. A query
without another image of its class is left out, and their number is reported. `plain_metrics` is the definition as one
reads it; `retrieval_metrics` computes the same numbers from the counts of counting.py, without the memory and time of
all similarities in float64.
"""
import numpy as np
import torch

from common.distributed import gather_rows
from common.errors import UserError
from retrieval.counting import cosine_similarity, nearer_negatives
from retrieval.nearest import best_similarities

OPEN_SET_RATES = (0.01, 0.05)  # share of the right answers that a threshold may lose
NUMBERS_OF_QUERIES = ('queries', 'without_positive')  # the metrics that are not per cents


# ---------------------------------------------------- the definition ------------------------------------------------
def similarity_of(query: torch.Tensor, gallery: torch.Tensor, binary: bool = False) -> torch.Tensor:
    """Return similarities (Q, G), float64, larger is nearer, of features (Q, D) and (G, D).

    Cosines of unit rows, on a grid of 2^-33, so that equal rows tie wherever they stand; with `binary` the share of
    equal bits of sign(features), where a zero counts as +1.
    """
    if not binary:
        return cosine_similarity(query, gallery)
    signs = [torch.where(features >= 0, 1.0, -1.0) for features in (query, gallery)]
    dim = query.shape[1]
    return 1 - (dim - (signs[0] @ signs[1].T).double()) / 2 / dim


def count_nearer(scores: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
    """Count for one query the negatives nearer than each positive; those tied with it count as half.

    Args:
        scores: (G,) similarities to the searched images.
        positive: (G,) bool, which of them are of the query's class.

    Returns:
        (R,) float64, one count per positive, the nearest first.
    """
    positives = scores[positive].sort(descending=True).values[:, None]
    negatives = scores[~positive]
    return (negatives > positives).sum(1).double() + (negatives == positives).sum(1).double() / 2


def score_queries(nearer: torch.Tensor, number: torch.Tensor) -> dict[str, torch.Tensor]:
    """Score each query by the number of negatives nearer than each of its positives.

    The j-th positive has rank_j = j + the negatives nearer than it. With R positives,
    MAP@R = 1/R sum_{j: rank_j <= R} j / rank_j, and R-precision is the share of positives with rank_j <= R.

    Args:
        nearer: (Q, R) of `count_nearer`; in each row only the first `number` are used.
        number: (Q,) of each query's positives, at least 1.

    Returns:
        {'nearer', 'MAP@R', 'R-precision'}: (Q,) float64 each, 'nearer' of the best positive.

    Source: Musgrave et al., A Metric Learning Reality Check, ECCV 2020, arXiv 2003.08505, section 3.2 (MAP@R).
    """
    order = torch.arange(1, nearer.shape[1] + 1, device=nearer.device)
    number = number[:, None].double()
    rank = order + nearer
    counts = (order <= number) & (rank <= number)
    return {'nearer': nearer[:, 0], 'MAP@R': ((counts * order / rank).sum(1, keepdim=True) / number)[:, 0],
            'R-precision': (counts.sum(1, keepdim=True) / number)[:, 0]}


def average(scores: list[dict[str, torch.Tensor]], recalls: tuple[int, ...]) -> dict[str, float]:
    """Average over all queries, also those of other processes, in per cent.

    R@K is the share of queries with fewer than K negatives nearer than their best positive: with one negative tied with
    it a query is still right at K = 1, with two it is not.
    """
    # Sorted, so that no sum depends on the order of the images or the number of processes.
    nearer, *shares = (gather_rows(torch.cat([part[name] for part in scores])).sort().values
                       for name in ('nearer', 'MAP@R', 'R-precision'))
    return {**{f'R@{k}': 100 * (nearer < k).double().mean().item() for k in recalls},
            'MAP@R': 100 * shares[0].mean().item(), 'R-precision': 100 * shares[1].mean().item(),
            'queries': len(nearer)}


def plain_metrics(query_features: torch.Tensor, query_labels: torch.Tensor,
                  gallery_features: torch.Tensor | None = None, gallery_labels: torch.Tensor | None = None,
                  recalls: tuple[int, ...] = (1, 2, 4, 8), binary: bool = False) -> dict[str, float]:
    """Compute what `retrieval_metrics` does by its definition, query by query, from all similarities."""
    itself = gallery_features is None
    if itself:
        gallery_features, gallery_labels = query_features, query_labels
    similarity = similarity_of(query_features, gallery_features, binary)
    scores = []
    for query, label in enumerate(query_labels):
        searched = torch.arange(len(gallery_labels)) != (query if itself else -1)
        positive = gallery_labels[searched] == label
        if positive.any():
            nearer = count_nearer(similarity[query, searched], positive)
            scores.append(score_queries(nearer[None], torch.tensor([len(nearer)])))
    return {**average(scores, recalls), 'without_positive': len(query_labels) - len(scores)}


# ---------------------------------------------------- the same, fast ------------------------------------------------
def check_features(name: str, features: torch.Tensor, labels: torch.Tensor, unit: bool) -> None:
    """Refuse features (n, D) and labels (n,) of which no metric can be computed.

    Args:
        unit: rows must have norm 1 (to 1 %), so that their products are cosines, or be zero, as blank images can be.

    Raises:
        UserError: with what was expected.
    """
    if features.ndim != 2 or not features.is_floating_point() or not features.numel():
        raise UserError(f'{name} features are {tuple(features.shape)} of {features.dtype}; expected are (n, D) floats')
    if labels.shape != features.shape[:1] or labels.dtype != torch.int64:
        raise UserError(f'{name} labels are {tuple(labels.shape)} of {labels.dtype}; expected are ({len(features)},) '
                        'of torch.int64')
    lengths = torch.cat([torch.linalg.vector_norm(part, dim=1) for part in features.split(2**14)])
    broken = int((~lengths.isfinite()).sum())
    if broken:
        raise UserError(f'{broken} of {len(features)} {name} features are not finite; the model that made them is '
                        'broken')
    if unit and (((lengths - 1).abs() > 0.01) & (lengths > 0)).any():
        raise UserError(f'the {name} features are not unit rows, so their products are not cosines; normalise them')


def to_tensor(values, kind: torch.dtype | None = None) -> torch.Tensor | None:
    """Return an array-like as a tensor, whole numbers as `kind`; a tensor is returned unchanged.

    Raises:
        UserError: if it holds no numbers.
    """
    if values is None or torch.is_tensor(values):
        return values
    values = np.asarray(values)
    if values.dtype.kind not in 'iuf':
        raise UserError(f'features and labels are arrays of numbers, not {values.shape} of {values.dtype}')
    tensor = torch.from_numpy(values if values.flags.writeable else values.copy())
    return tensor.to(kind) if kind and values.dtype.kind in 'iu' else tensor


def retrieval_metrics(query_features: torch.Tensor, query_labels: torch.Tensor,
                      gallery_features: torch.Tensor | None = None, gallery_labels: torch.Tensor | None = None,
                      recalls: tuple[int, ...] = (1, 2, 4, 8), binary: bool = False) -> dict[str, float]:
    """Compute Recall@K, MAP@R and R-precision exactly; with several processes, all of them have to call it.

    The result does not depend on the order of the gallery. Tensors may be on any device; NumPy arrays work too.

    Args:
        query_features: (Q, D) float32 or float64, unit rows.
        query_labels: (Q,) int64; of an array any whole numbers.
        gallery_features, gallery_labels: (G, D), (G,); None: the queries are searched in each other, each left out of
            its own search by its index.
        recalls: the values of K.
        binary: compare sign(features) by Hamming distance instead of features by cosine.

    Returns:
        {'R@1': per cent, ..., 'MAP@R': per cent, 'R-precision': per cent, 'queries': number measured,
        'without_positive': number left out}.

    Raises:
        UserError: if a K is larger than the gallery, features or labels cannot be used, or no query has a positive.
    """
    symmetric = gallery_features is None
    query_features, gallery_features = to_tensor(query_features), to_tensor(gallery_features)
    query_labels, gallery_labels = to_tensor(query_labels, torch.int64), to_tensor(gallery_labels, torch.int64)
    check_features('query', query_features, query_labels, unit=not binary)
    if not symmetric:
        check_features('gallery', gallery_features, gallery_labels, unit=not binary)
    searched = len(query_features) - 1 if symmetric else len(gallery_features)
    if max(recalls) > searched:
        raise UserError(f'R@{max(recalls)} asks for more than the {searched} images that a query is searched in; set '
                        '--recalls to smaller numbers, as in --recalls 1,2')
    nothing = query_features.new_zeros(0, 1, dtype=torch.float64)
    scores = [score_queries(nothing, nothing[:, 0])]  # for a process without a query
    for nearer, number in nearer_negatives((query_features, query_labels),
                                           None if symmetric else (gallery_features, gallery_labels), binary,
                                           max(recalls)):
        has_positive = number > 0
        scores.append(score_queries(nearer[has_positive], number[has_positive]))
    metrics = average(scores, recalls)
    if not metrics['queries']:
        raise UserError('no query has another image of its class to find; a test class needs at least two images')
    return {**metrics, 'without_positive': len(query_labels) - metrics['queries']}


# ---------------------------------------------------- open set ----------------------------------------------------
def open_set_thresholds(positive: torch.Tensor, negative: torch.Tensor, rates: tuple[float, ...] = OPEN_SET_RATES
                        ) -> list[dict[str, float]]:
    """Find similarities below which an answer is called `no close match`, since the query's class may be absent.

    A search always returns a neighbour, even for a query whose class has no image in the collection. An answer is
    marked if its similarity is below a threshold t. Two shares describe t:

    - lost: of the R right answers (queries whose best positive is nearer than any negative, p_q > n_q), the share that
      is marked, #{q right: p_q < t} / R;
    - marked: if each class is left out of the searched images in turn, the nearest image of each of its Q queries is
      its best negative; the share of these answers that is marked, #{q: n_q < t} / Q.

    The threshold of a rate r is the largest at which at most the share r of the right answers is lost:

        t_r = p_(k+1), k = floor(r R), of the right answers' p_(1) <= p_(2) <= ... <= p_(R).

    Answers that tie with t_r are not marked. Thresholds hold for a collection of this size: among more images, the
    best negative is nearer.

    Args:
        positive, negative: p_q and n_q, (Q,) float64; p_q is -inf for a query without a positive.
        rates: r in [0, 1).

    Returns:
        [{'rate': r, 'threshold': t_r, 'lost', 'marked': per cent}, ...]; [] if no answer is right.
    """
    right = positive[positive > negative].sort().values
    if not len(right):
        return []
    rows = []
    for rate in rates:
        threshold = right[int(rate * len(right))]
        rows.append({'rate': rate, 'threshold': threshold.item(),
                     'lost': 100 * (right < threshold).double().mean().item(),
                     'marked': 100 * (negative < threshold).double().mean().item()})
    return rows


def measure_open_set(query_features: torch.Tensor, query_labels: torch.Tensor,
                     gallery_features: torch.Tensor | None = None, gallery_labels: torch.Tensor | None = None,
                     rates: tuple[float, ...] = OPEN_SET_RATES) -> list[dict[str, float]]:
    """Return `open_set_thresholds` of features and labels, as `retrieval_metrics` takes them; [] for a single class.
    """
    positive, negative = best_similarities(query_features, query_labels, gallery_features, gallery_labels)
    measured = negative > -torch.inf
    return open_set_thresholds(positive[measured], negative[measured], rates)
