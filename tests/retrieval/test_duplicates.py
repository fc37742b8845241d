"""Groups of similar rows: against all pairs of the similarities in float64."""
import pytest
import torch
from torch.nn import functional as F

from retrieval import duplicates
from retrieval.counting import Similarity
from retrieval.duplicates import group_similar, similarities_to_first
from retrieval.metrics import similarity_of


def make_features(count: int, dim: int) -> torch.Tensor:
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(0)), dim=1)


def group_in_loops(similarity: torch.Tensor, threshold: float) -> list[list[int]]:
    groups = [{row} for row in range(len(similarity))]
    for one, row in enumerate(similarity.tolist()):
        for other, value in enumerate(row):
            if value >= threshold and groups[one] is not groups[other]:
                groups[one] |= groups[other]
                for member in groups[other]:
                    groups[member] = groups[one]
    unique = {id(group): sorted(group) for group in groups}
    return sorted(group for group in unique.values() if len(group) > 1)


def test_groups_are_those_of_all_pairs(monkeypatch):
    monkeypatch.setattr(duplicates, 'SIDE', 64)
    monkeypatch.setattr(duplicates, 'PAIRS_AT_ONCE', 7)
    features = make_features(150, 5)
    features[140] = features[2]
    similarity = similarity_of(features, features)
    for threshold in (0.9, similarity[3, 7].item(), similarity[100, 20].item(), -0.5, 1):
        assert group_similar(features, threshold) == group_in_loops(similarity, threshold)


def test_a_chain_is_one_group_with_its_similarities_to_the_first_row():
    angles = torch.tensor([0.0, 2.0, 0.3, 0.6, 2.1])
    features = torch.stack([angles.cos(), angles.sin()], 1)
    assert group_similar(features, 0.95) == [[0, 2, 3], [1, 4]]
    assert similarities_to_first(features, [0, 2, 3]) == pytest.approx([0.95534, 0.82534], abs=1e-5)


def test_of_a_large_group_of_equal_rows_few_pairs_are_compared(monkeypatch):
    compared, of_pairs = [], Similarity.of_pairs

    def count(self, rows, columns):
        compared.append(len(rows))
        return of_pairs(self, rows, columns)

    monkeypatch.setattr(Similarity, 'of_pairs', count)
    features = make_features(1, 8).expand(3000, 8).contiguous()
    assert group_similar(features, 0.99) == [list(range(3000))]
    assert sum(compared) <= 2 * duplicates.PAIRS_AT_ONCE  # of 4.5 million
