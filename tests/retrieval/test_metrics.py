"""Retrieval metrics against brute force, one query at a time in float64, and against pytorch-metric-learning."""
import numpy as np
import pytest
import torch
from engine import counting
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from common.errors import UserError
from retrieval.counting import Cosine, Hamming, pack_codes, unpack_codes
from retrieval.metrics import plain_metrics, retrieval_metrics


@pytest.fixture(scope='module', autouse=True, params=['float32', 'bfloat16'])
def first_pass(request):
    """Every test holds for a processor without bfloat16 instructions and for one with them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counting, 'bfloat16_is_fast', lambda device: request.param == 'bfloat16')
        yield getattr(torch, request.param)


def measure(counts, recalls):
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


def brute_force(query, query_labels, gallery, gallery_labels, itself, recalls):
    """Rank every gallery image for every query with Python's own sums; ties between classes count as half."""
    counts = []
    for i, x in enumerate(query.tolist()):
        scores = [(round(sum(a * b for a, b in zip(x, g, strict=True)), 10), bool(gallery_labels[j] == query_labels[i]))
                  for j, g in enumerate(gallery.tolist()) if not (itself and i == j)]
        positives = sorted((score for score, own in scores if own), reverse=True)
        negatives = [score for score, own in scores if not own]
        counts.append([sum(n > p for n in negatives) + sum(n == p for n in negatives) / 2 for p in positives])
    return measure(counts, recalls)


def random_features(n, d, classes, seed, coarse=False):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    features = torch.randn(n, d, generator=generator) + F.one_hot(labels, max(d, classes))[:, :d]
    if coarse:  # few values: many ties
        features = torch.randint(-1, 2, (n, d), generator=generator).float()
        features[features.abs().sum(1) == 0, 0] = 1
    return F.normalize(features, dim=-1), labels


def assert_equal(ours, theirs):
    for key, value in theirs.items():
        assert ours[key] == pytest.approx(value, abs=1e-9), key


@settings(max_examples=60, deadline=None)
@given(n=st.integers(4, 23), d=st.integers(1, 5), classes=st.integers(1, 4), seed=st.integers(0, 10**6),
       coarse=st.booleans(), gallery=st.integers(0, 11))
def test_metrics_equal_brute_force(n, d, classes, seed, coarse, gallery):
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


@pytest.mark.parametrize('gallery', [False, True])
def test_binary_metrics_equal_brute_force_on_signs(gallery):
    query, query_labels = random_features(31, 13, 4, 1)
    query[3, 2] = 0.0  # a zero counts as +1
    features, labels = random_features(29, 13, 4, 2)
    arguments = (query, query_labels, features, labels) if gallery else (query, query_labels)
    ours = retrieval_metrics(*arguments, recalls=(1, 3), binary=True)
    sign = [torch.where(x >= 0, 1.0, -1.0).double() for x in (query, features if gallery else query)]
    expected = brute_force(sign[0], query_labels, sign[1], labels if gallery else query_labels, not gallery, (1, 3))
    assert_equal(ours, expected)
    assert_equal(plain_metrics(*arguments, recalls=(1, 3), binary=True), expected)


@pytest.mark.parametrize('d', [1, 7, 64, 65, 255, 257, 512, 514, 2047, 2048])
@pytest.mark.parametrize('queries', [4, 5])
def test_packed_codes_count_different_signs(first_pass, d, queries):
    features = torch.randn(9, d, generator=torch.Generator().manual_seed(d))
    features[0, 0] = 0.0  # a zero counts as +1
    features[1], features[2] = features[0], -features[0]
    features[2, 0] = -1.0
    assert pack_codes(features).numel() == 9 * -(-d // 8)
    assert torch.equal(unpack_codes(pack_codes(features), d), torch.where(features >= 0, 1.0, -1.0))
    different = ((features[:queries, None] >= 0) != (features[None] >= 0)).sum(-1)
    compare = Hamming(features[:queries], features)
    tile = compare.tile(slice(0, queries), slice(0, 9))
    assert tile.dtype == (first_pass if d in (1, 7, 64, 65, 255, 512) else torch.float32)
    assert torch.equal(tile.double(), d - 2.0 * different.double())
    assert torch.equal(compare.exact(torch.arange(queries), torch.arange(9)), d - 2.0 * different.double())


def test_a_query_is_excluded_by_its_index_and_not_by_its_value():
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
    features, labels = random_features(150, 37, 5, 3)
    features = torch.cat([features, features])
    labels = torch.cat([labels, labels.roll(1)])  # every image also stands under another class
    expected = retrieval_metrics(features, labels, recalls=(1, 2, 4))
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    assert retrieval_metrics(features[order], labels[order], recalls=(1, 2, 4)) == pytest.approx(expected, abs=1e-12)


def test_blocks_do_not_change_the_result(monkeypatch):
    features, labels = random_features(101, 8, 6, 4)
    whole = retrieval_metrics(features, labels)
    monkeypatch.setitem(counting.TILE_SIDE, 'cpu', 17)
    assert retrieval_metrics(features, labels) == whole


def rows_and_columns(query, query_labels, gallery, gallery_labels, itself, recalls):
    """Brute force as above, by matrices in float64: for more images than loops take."""
    similarity = ((query.double() @ gallery.double().T) * 2.0**33).round() / 2.0**33
    positive = query_labels[:, None] == gallery_labels
    if itself:
        similarity.fill_diagonal_(-torch.inf)
        positive.fill_diagonal_(False)
    return measure([[int((scores[~own] > p).sum()) + int((scores[~own] == p).sum()) / 2
                     for p in scores[own].sort(descending=True).values]
                    for scores, own in zip(similarity, positive, strict=True)], recalls)


@pytest.fixture
def small_pieces(monkeypatch):
    """Constants so small that few images take every path: many tiles, chunks, pieces, a sample, a second pass."""
    monkeypatch.setitem(counting.TILE_SIDE, 'cpu', 48)
    monkeypatch.setattr(counting, 'SAMPLED_IMAGES', 25)
    monkeypatch.setattr(counting, 'ENTRIES_A_TEST', 8)


@pytest.mark.parametrize('spread', [0.0, 1e-8, 1e-7, 1e-6, 1e-4])
@pytest.mark.parametrize('gallery', [False, True])
def test_similarities_that_float32_does_not_tell_apart_are_ranked_exactly(small_pieces, spread, gallery):
    generator = torch.Generator().manual_seed(8)
    centres = torch.randn(5, 96, generator=generator, dtype=torch.float64)
    kinds = torch.arange(260) % 5
    features = F.normalize(centres[kinds] + spread * torch.randn(260, 96, generator=generator), dim=-1).float()
    labels = torch.randint(0, 12, (260,), generator=generator)
    arguments = (features[:90], labels[:90], features[90:], labels[90:]) if gallery else (features, labels)
    searched = arguments if gallery else (features, labels, features, labels)
    assert_equal(retrieval_metrics(*arguments, recalls=(1, 3, 100)),
                 rows_and_columns(*searched, not gallery, (1, 3, 100)))


@pytest.mark.parametrize('d', [2, 512, 4096])
@pytest.mark.parametrize('kind', ['any signs', 'one sign', 'equal entries'])
def test_the_first_pass_is_off_by_no_more_than_it_says(first_pass, d, kind):
    features = torch.randn(300, d, generator=torch.Generator().manual_seed(d))
    features = F.normalize({'any signs': features, 'one sign': features.abs(),
                            'equal entries': 1 + torch.arange(300)[:, None] / 300 + 0 * features}[kind], dim=-1)
    features[::7] *= 1 + 0.9e-3  # unit rows as far as evaluate.py takes them
    compare, every = Cosine(features, features), slice(0, 300)
    tile = compare.tile(every, every)
    assert tile.dtype == first_pass
    off = (tile.double() - features.double() @ features.double().T).abs()
    bound = torch.as_tensor(compare.error_of(tile.double()))
    assert (off <= bound).all()
    assert (bound <= compare.error).all()
    if kind == 'any signs' and first_pass == torch.bfloat16:
        assert off.max() > compare.error / 8  # a bound that tells something
    for dtype, error in compare.finer:
        rows = torch.arange(300)
        for value, expected in ((compare.recompute(every, every, dtype), features.double() @ features.double().T),
                                (compare.pairs(rows, rows.flip(0), dtype),
                                 (features.double() * features.double().flip(0)).sum(1))):
            assert (value.double() - expected).abs().max() <= error + 2.0**-33


@pytest.mark.parametrize('binary', [False, True])
@pytest.mark.parametrize('noise', [0.5, 2.0, 50.0])
def test_near_and_far_positives_are_counted_alike(small_pieces, noise, binary):
    generator = torch.Generator().manual_seed(9)
    labels = torch.arange(330) % 41
    features = F.normalize(torch.randn(41, 30, generator=generator)[labels] + noise * torch.randn(
        330, 30, generator=generator), dim=-1)
    compared = torch.where(features >= 0, 1.0, -1.0) if binary else features
    recalls = (1, 10, 30, 50, 80, 120, 300)
    assert_equal(retrieval_metrics(features, labels, recalls=recalls, binary=binary),
                 rows_and_columns(compared, labels, compared, labels, True, recalls))


@pytest.mark.parametrize('binary', [False, True])
@pytest.mark.parametrize('guess', ['far too high', 'far too low', 'any'])
def test_a_wrong_guess_of_the_thresholds_changes_nothing(small_pieces, monkeypatch, guess, binary):
    generator = torch.Generator().manual_seed(10)
    features, labels = random_features(200, 16, 9, 10)
    unit = 16 if binary else 1  # the scale of the similarities
    thresholds = {'far too high': torch.full((200,), 2.0 * unit), 'far too low': torch.full((200,), -2.0 * unit),
                  'any': unit * (2 * torch.rand(200, generator=generator) - 1)}[guess]
    expected = retrieval_metrics(features, labels, recalls=(1, 7, 60), binary=binary)
    monkeypatch.setattr(counting, 'guess_threshold', lambda *arguments: thresholds)
    assert retrieval_metrics(features, labels, recalls=(1, 7, 60), binary=binary) == expected
    compared = torch.where(features >= 0, 1.0, -1.0) if binary else features
    assert_equal(expected, rows_and_columns(compared, labels, compared, labels, True, (1, 7, 60)))


def test_groups_of_queries_do_not_change_the_result(monkeypatch, small_pieces):
    features, labels = random_features(150, 8, 3, 11)
    whole = retrieval_metrics(features, labels)
    monkeypatch.setattr(counting, 'NUMBERS_AT_ONCE', 2500)  # classes of 50: groups of about 25 queries
    assert retrieval_metrics(features, labels) == whole


def test_classes_of_one_image_and_classes_only_in_the_gallery_count_as_negatives():
    query, query_labels = random_features(40, 6, 4, 12)
    gallery, gallery_labels = random_features(50, 6, 4, 13)
    query_labels[:3] = torch.tensor([90, 91, 92])  # nowhere in the gallery
    gallery_labels[:5] = 80  # no query
    gallery_labels[5] = 70  # one image
    query_labels[3] = 70
    assert_equal(retrieval_metrics(query, query_labels, gallery, gallery_labels, recalls=(1, 4)),
                 rows_and_columns(query, query_labels, gallery, gallery_labels, False, (1, 4)))


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


def test_broken_features_are_counted():
    features, labels = random_features(9, 4, 2, 7)
    features[2, 1] = float('nan')
    features[5, 0] = float('inf')
    with pytest.raises(UserError, match='2 of 9 query features'):
        retrieval_metrics(features, labels, recalls=(1,))


@pytest.mark.parametrize(('recalls', 'labels', 'message'), [((1, 4), [0, 0, 1, 1], 'R@4 asks for more than the 3'),
                                                           ((1,), [0, 1, 2, 3], 'no query')])
def test_what_cannot_be_measured_is_an_error(recalls, labels, message):
    with pytest.raises(UserError, match=message):
        retrieval_metrics(torch.eye(4), torch.tensor(labels), recalls=recalls)
