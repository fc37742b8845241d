"""Retrieval metrics against brute force, one query at a time in float64, and against pytorch-metric-learning."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from common.errors import UserError
from retrieval import counting
from retrieval.metrics import plain_metrics, retrieval_metrics


# ---------------------------------------------------- slow versions -----------------------------------------------
def average_counts(counts, recalls) -> dict:
    """Return the metrics from the negatives before each positive of each query, [[...], ...]; a tied one is a half."""
    counts = [before for before in counts if before]
    hits, maps, precisions = [], [], []
    for before in counts:
        r = len(before)
        ranks = [j + nearer for j, nearer in enumerate(before, start=1)]
        hits.append([before[0] < k for k in recalls])
        maps.append(sum(j / rank for j, rank in enumerate(ranks, start=1) if rank <= r) / r)
        precisions.append(sum(rank <= r for rank in ranks) / r)
    shares = 100 * np.mean(hits, axis=0)
    return {**{f'R@{k}': share for k, share in zip(recalls, shares, strict=True)},
            'MAP@R': 100 * np.mean(maps), 'R-precision': 100 * np.mean(precisions), 'queries': len(counts)}


def brute_force(query, query_labels, gallery, gallery_labels, itself, recalls) -> dict:
    """Rank every gallery image for every query with Python's own sums; ties between classes count as half."""
    counts = []
    for i, x in enumerate(query.tolist()):
        scores = [(round(sum(a * b for a, b in zip(x, g, strict=True)), 10), bool(gallery_labels[j] == query_labels[i]))
                  for j, g in enumerate(gallery.tolist()) if not (itself and i == j)]
        positives = sorted((score for score, own in scores if own), reverse=True)
        negatives = [score for score, own in scores if not own]
        counts.append([sum(n > p for n in negatives) + sum(n == p for n in negatives) / 2 for p in positives])
    return average_counts(counts, recalls)


def brute_force_by_matrix(query, query_labels, gallery, gallery_labels, itself, recalls) -> dict:
    """Brute force as above, by matrices in float64: for more images than loops take."""
    similarity = ((query.double() @ gallery.double().T) * 2.0**33).round() / 2.0**33
    positive = query_labels[:, None] == gallery_labels
    if itself:
        similarity.fill_diagonal_(-torch.inf)
        positive.fill_diagonal_(False)
    return average_counts([[int((scores[~own] > p).sum()) + int((scores[~own] == p).sum()) / 2
                            for p in scores[own].sort(descending=True).values]
                           for scores, own in zip(similarity, positive, strict=True)], recalls)


def random_features(n: int, d: int, classes: int, seed: int, coarse: bool = False):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    features = torch.randn(n, d, generator=generator) + F.one_hot(labels, max(d, classes))[:, :d]
    if coarse:  # few values: many ties
        features = torch.randint(-1, 2, (n, d), generator=generator).float()
        features[features.abs().sum(1) == 0, 0] = 1
    return F.normalize(features, dim=-1), labels


def signs_of(features: torch.Tensor) -> torch.Tensor:
    return torch.where(features >= 0, 1.0, -1.0)


def assert_equal(ours: dict, theirs: dict) -> None:
    for key, value in theirs.items():
        assert ours[key] == pytest.approx(value, abs=1e-9), key


@pytest.fixture(autouse=True, params=['float32', 'float16'])
def fast_dtype(request, monkeypatch):
    """Every test holds for the fast product of a processor and for that of a GPU."""
    monkeypatch.setitem(counting.FAST_DTYPE, 'cpu', getattr(torch, request.param))


# ---------------------------------------------------- the definition ----------------------------------------------
RANDOM_SETS = {'n': st.integers(4, 23), 'd': st.integers(1, 5), 'classes': st.integers(1, 4),
               'seed': st.integers(0, 10**6), 'coarse': st.booleans(), 'gallery': st.integers(0, 11)}


def check_metrics(n: int, d: int, classes: int, seed: int, coarse: bool, gallery: int) -> None:
    query, query_labels = random_features(n, d, classes, seed, coarse)
    query_labels[:2] = query_labels[0]  # one query at least has a positive
    if gallery:
        features, labels = random_features(gallery, d, classes, seed + 1, coarse)
        labels[0] = query_labels[0]
        arguments, itself = (query, query_labels, features, labels), False
    else:
        arguments, itself = (query, query_labels), True
        features, labels = query, query_labels
    recalls = tuple(k for k in (1, 2, 5) if k <= len(features) - itself)
    expected = brute_force(query.double(), query_labels, features.double(), labels, itself, recalls)
    assert_equal(retrieval_metrics(*arguments, recalls=recalls), expected)
    assert_equal(plain_metrics(*arguments, recalls=recalls), expected)


@pytest.mark.parametrize('gallery', [0, 11])
@pytest.mark.parametrize('coarse', [False, True])
def test_metrics_equal_brute_force(coarse, gallery):
    for seed in range(4):
        check_metrics(17, 3, 4, seed, coarse, gallery)


@pytest.mark.slow
def test_metrics_of_many_random_sets_equal_brute_force(fast_dtype):
    @settings(max_examples=200, deadline=None)
    @given(**RANDOM_SETS)
    def check(**case):
        check_metrics(**case)

    check()


@pytest.mark.parametrize('gallery', [False, True])
def test_binary_metrics_equal_brute_force_on_signs(gallery):
    query, query_labels = random_features(31, 13, 4, 1)
    query[3, 2] = 0.0  # a zero counts as +1
    features, labels = random_features(29, 13, 4, 2)
    arguments = (query, query_labels, features, labels) if gallery else (query, query_labels)
    ours = retrieval_metrics(*arguments, recalls=(1, 3), binary=True)
    signs = [signs_of(x).double() for x in (query, features if gallery else query)]
    expected = brute_force(signs[0], query_labels, signs[1], labels if gallery else query_labels, not gallery, (1, 3))
    assert_equal(ours, expected)
    assert_equal(plain_metrics(*arguments, recalls=(1, 3), binary=True), expected)


def test_recall_excludes_the_query_itself_by_its_index_and_not_by_its_value():
    features = F.normalize(torch.tensor([[1.0, 0], [1.0, 0], [0, 1.0], [0.1, 1.0]]), dim=-1)
    labels = torch.tensor([0, 0, 1, 1])  # image 1 is an exact copy of image 0 and its nearest neighbour
    metrics = retrieval_metrics(features, labels, recalls=(1,))
    assert (metrics['R@1'], metrics['queries']) == (100, 4)
    opposite = torch.tensor([[1.0, 0], [-1.0, 0], [0, 1.0]])  # its own similarity set to 0 would still beat -1
    metrics = retrieval_metrics(opposite, torch.tensor([0, 0, 1]), recalls=(1, 2))
    assert (metrics['R@1'], metrics['R@2']) == (0, 100)


def test_tied_negatives_count_as_half():
    features = torch.ones(5, 1)
    labels = torch.tensor([0, 0, 1, 1, 1])
    metrics = retrieval_metrics(features, labels, recalls=(1, 2, 4))
    # Class 0 has 3 tied negatives, rank 1.5; class 1 has 2, rank 1.
    assert [metrics[f'R@{k}'] for k in (1, 2, 4)] == [0, 100, 100]


def test_order_of_the_gallery_does_not_matter_with_duplicates():
    features, labels = random_features(75, 37, 5, 3)
    features = torch.cat([features, features])
    labels = torch.cat([labels, labels.roll(1)])  # every image also stands under another class
    expected = retrieval_metrics(features, labels, recalls=(1, 2, 4))
    order = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    assert retrieval_metrics(features[order], labels[order], recalls=(1, 2, 4)) == pytest.approx(expected, abs=1e-12)


def test_classes_of_one_image_and_classes_only_in_the_gallery_count_as_negatives():
    query, query_labels = random_features(40, 6, 4, 12)
    gallery, gallery_labels = random_features(50, 6, 4, 13)
    query_labels[:3] = torch.tensor([90, 91, 92])  # nowhere in the gallery
    gallery_labels[:5] = 80  # no query
    gallery_labels[5] = 70  # one image
    query_labels[3] = 70
    assert_equal(retrieval_metrics(query, query_labels, gallery, gallery_labels, recalls=(1, 4)),
                 brute_force_by_matrix(query, query_labels, gallery, gallery_labels, False, (1, 4)))


def test_queries_without_a_positive_are_left_out_and_counted():
    features, labels = random_features(12, 4, 3, 5)
    labels[4] = 77
    metrics = retrieval_metrics(features, labels, recalls=(1,))
    assert (metrics['queries'], metrics['without_positive']) == (11, 1)
    assert_equal(metrics, brute_force(features.double(), labels, features.double(), labels, True, (1,)))


def test_metrics_equal_pytorch_metric_learning():
    from pytorch_metric_learning.distances import CosineSimilarity
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pytorch_metric_learning.utils.inference import CustomKNN

    features, labels = random_features(211, 16, 13, 6)
    calculator = AccuracyCalculator(include=('precision_at_1', 'mean_average_precision_at_r', 'r_precision'),
                                    k='max_bin_count', knn_func=CustomKNN(CosineSimilarity()),
                                    device=torch.device('cpu'))
    theirs = calculator.get_accuracy(features, labels)
    ours = retrieval_metrics(features, labels, recalls=(1,))
    assert ours['R@1'] == pytest.approx(100 * theirs['precision_at_1'], abs=1e-4)
    assert ours['MAP@R'] == pytest.approx(100 * theirs['mean_average_precision_at_r'], abs=1e-4)
    assert ours['R-precision'] == pytest.approx(100 * theirs['r_precision'], abs=1e-4)


def test_the_rows_of_blank_images_are_similar_to_nothing():
    features, labels = random_features(30, 4, 3, 8)
    features[::7] = 0
    expected = brute_force(features, labels, features, labels, True, (1, 2))
    metrics = retrieval_metrics(features, labels, recalls=(1, 2))
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)


# ---------------------------------------------------- bad input ---------------------------------------------------
def test_broken_features_are_counted():
    features, labels = random_features(9, 4, 2, 7)
    features[2, 1] = float('nan')
    features[5, 0] = float('inf')
    with pytest.raises(UserError, match='2 of 9 query features'):
        retrieval_metrics(features, labels, recalls=(1,))


@pytest.mark.parametrize(('features', 'labels', 'recalls', 'message'), [
    (torch.eye(4), [0, 0, 1, 1], (1, 4), 'R@4 asks for more than the 3'),
    (torch.eye(4), [0, 1, 2, 3], (1,), 'no query'), (2 * torch.eye(4), [0, 0, 1, 1], (1,), 'not unit rows'),
    (torch.eye(4) / 2, [0, 0, 1, 1], (1,), 'not unit rows'),
    (torch.eye(4)[0], [0], (1,), r'expected are \(n, D\) floats'),
    (torch.eye(4), [0, 1, 1], (1,), r'expected are \(4,\) of torch.int64')])
def test_what_cannot_be_measured_is_an_error(features, labels, recalls, message):
    with pytest.raises(UserError, match=message):
        retrieval_metrics(features, torch.tensor(labels), recalls=recalls)
