"""Exact neighbours from a fast pass: against the whole matrix of similarities in float64."""
import math

import pytest
import torch
from torch.nn import functional as F

from retrieval import counting, nearest
from retrieval.metrics import similarity_of
from retrieval.nearest import Nearest, best_similarities


def order_of(similarity: torch.Tensor) -> list[int]:
    """Return the rows by falling similarity (N,), ties in the order of the rows."""
    values = similarity.tolist()
    return sorted(range(len(values)), key=lambda row: (-values[row], row))


def make_features(count: int, dim: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.fixture(params=['float32', 'bfloat16'])
def first_pass(request, monkeypatch):
    """For a processor without bfloat16 instructions, and for one with them."""
    monkeypatch.setattr(nearest, 'bfloat16_is_fast', lambda device: request.param == 'bfloat16')
    return request.param


@pytest.mark.parametrize('binary', [False, True])
@pytest.mark.parametrize('dtype', [torch.float16, torch.float32, torch.float64])
def test_neighbours_come_in_the_order_of_the_exact_similarity_and_ties_in_that_of_the_rows(dtype, binary, first_pass,
                                                                                         monkeypatch):
    monkeypatch.setattr(nearest, 'BLOCK_ROWS', 16)
    monkeypatch.setattr(nearest, 'CONVERTED_ROWS', 7)
    features = make_features(61, 9, 0)
    features[50], features[20] = features[3], features[3]  # equal rows in three blocks
    queries = torch.cat([features[:4], make_features(3, 9, 1)])
    features = features.to(dtype)
    answers = Nearest(features, resident=True).search(queries, 7, binary)
    for similarity, answer in zip(similarity_of(queries, features, binary), answers, strict=True):
        expected = order_of(similarity)[:7]
        assert [row for row, _ in answer] == expected
        assert [value for _, value in answer] == pytest.approx(similarity[expected].tolist(), abs=1e-9)
    assert [row for row, _ in answers[3]][:3] == [3, 20, 50]


def test_similarities_that_the_fast_pass_does_not_tell_apart_are_ranked_exactly(first_pass):
    centre = make_features(1, 64, 2).double()
    noise = 1e-7 * torch.randn(200, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    features = F.normalize(centre + noise, dim=1).float()
    similarity = similarity_of(features[:5], features)
    for row, answer in enumerate(Nearest(features, resident=True).search(features[:5], 20)):
        assert [column for column, _ in answer] == order_of(similarity[row])[:20]


@pytest.mark.parametrize('binary', [False, True])
@pytest.mark.parametrize('value', [torch.nan, torch.inf, -torch.inf])
def test_rows_and_queries_that_are_not_finite_are_not_retrieved(value, binary):
    features = make_features(9, 5, 4)
    features[2, 1] = value
    queries = torch.stack([features[0], torch.full((5,), torch.nan)])
    for number, found in ((20, 8), (3, 3)):  # a row that is left out takes no other row's place
        answers = Nearest(features).search(queries, number, binary)
        assert len(answers[0]) == found
        assert 2 not in dict(answers[0])
        assert answers[1] == []


@pytest.mark.parametrize('fast_dtype', [torch.float32, torch.float16])
@pytest.mark.parametrize('gallery', [False, True])
@pytest.mark.parametrize('candidates', [1, 5])  # 1: all queries are compared with the whole gallery
def test_the_best_positive_and_the_best_negative_are_those_of_all_similarities(gallery, fast_dtype, candidates,
                                                                               monkeypatch):
    monkeypatch.setitem(counting.FAST_DTYPE, 'cpu', fast_dtype)
    monkeypatch.setattr(nearest, 'CANDIDATES', candidates)
    for module in (counting, nearest):
        monkeypatch.setattr(module, 'tile_entries', lambda device: 300)
    labels = torch.arange(53) % 7
    labels[-1] = 7  # without another image
    features = F.normalize(make_features(53, 6, 5) + make_features(8, 6, 6)[labels], dim=1)
    features[40], features[50] = features[41], features[20]  # ties, of one class and of two
    others = (features[:30].roll(1, 1), labels[:30]) if gallery else (None, None)
    searched, searched_labels = others if gallery else (features, labels)
    positive, negative = best_similarities(features, labels, *others)
    for query, row in enumerate(similarity_of(features, searched).tolist()):
        own = [value for image, value in enumerate(row) if searched_labels[image] == labels[query]
               and (gallery or image != query)]
        other = [value for image, value in enumerate(row) if searched_labels[image] != labels[query]]
        assert positive[query] == pytest.approx(max(own, default=-math.inf), abs=1e-12)
        assert negative[query] == pytest.approx(max(other), abs=1e-12)


@pytest.mark.parametrize('fast_dtype', [torch.float32, torch.float16])
def test_the_best_negative_among_many_that_the_fast_product_does_not_tell_apart_is_exact(fast_dtype, monkeypatch):
    monkeypatch.setitem(counting.FAST_DTYPE, 'cpu', fast_dtype)
    noise = 1e-7 * torch.randn(200, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    features, labels = F.normalize(make_features(1, 64, 2).double() + noise, dim=1).float(), torch.arange(200) // 2
    negative = best_similarities(features, labels)[1]
    similarity = similarity_of(features, features).masked_fill_(labels[:, None] == labels, -torch.inf)
    assert torch.equal(negative, similarity.amax(1))


def test_in_a_single_class_there_is_no_best_negative():
    positive, negative = best_similarities(make_features(5, 3, 0), torch.zeros(5, dtype=torch.int64))
    assert negative.tolist() == [-math.inf] * 5
    assert (positive > -1).all()
