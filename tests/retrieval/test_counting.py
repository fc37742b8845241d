"""The fast counts behind the metrics: packed codes, error bounds, tiles, thresholds, against brute force."""
import pytest
import torch
from test_metrics import assert_equal, brute_force_by_matrix, random_features, signs_of
from torch.nn import functional as F

from retrieval import counting
from retrieval.counting import Cosine, Hamming, pack_codes, unpack_codes
from retrieval.metrics import retrieval_metrics


@pytest.fixture(autouse=True, params=['float32', 'bfloat16'])
def first_pass(request, monkeypatch) -> torch.dtype:
    """Every test holds for a processor without bfloat16 instructions and for one with them."""
    monkeypatch.setattr(counting, 'bfloat16_is_fast', lambda device: request.param == 'bfloat16')
    return getattr(torch, request.param)


@pytest.fixture
def small_pieces(monkeypatch):
    """Constants so small that few images take every path: many tiles, chunks, pieces, a sample, a second pass."""
    monkeypatch.setitem(counting.TILE_SIDE, 'cpu', 48)
    monkeypatch.setattr(counting, 'SAMPLED_IMAGES', 25)
    monkeypatch.setattr(counting, 'ENTRIES_PER_TEST', 8)


# ---------------------------------------------------- similarities ------------------------------------------------
@pytest.mark.parametrize('queries', [4, 5])
@pytest.mark.parametrize('d', [1, 7, 65, 255, 257, 512, 514, 2047, 2048])
def test_packed_codes_count_different_signs(first_pass, d, queries):
    features = torch.randn(9, d, generator=torch.Generator().manual_seed(d))
    features[0, 0] = 0.0  # a zero counts as +1
    features[1], features[2] = features[0], -features[0]
    features[2, 0] = -1.0
    assert pack_codes(features).numel() == 9 * -(-d // 8)
    assert torch.equal(unpack_codes(pack_codes(features), d), signs_of(features))
    different = ((features[:queries, None] >= 0) != (features[None] >= 0)).sum(-1)
    compare = Hamming(features[:queries], features)
    tile = compare.tile(slice(0, queries), slice(0, 9))
    assert tile.dtype == (first_pass if d in (1, 7, 65, 255, 512) else torch.float32)
    assert torch.equal(tile.double(), d - 2.0 * different.double())
    assert torch.equal(compare.exact(torch.arange(queries), torch.arange(9)), d - 2.0 * different.double())


@pytest.mark.parametrize('d', [2, 512])
@pytest.mark.parametrize('signs', ['any signs', 'one sign', 'equal entries'])
def test_the_first_pass_is_off_by_no_more_than_its_bound(first_pass, d, signs):
    features = torch.randn(100, d, generator=torch.Generator().manual_seed(d))
    features = F.normalize({'any signs': features, 'one sign': features.abs(),
                            'equal entries': 1 + torch.arange(100)[:, None] / 100 + 0 * features}[signs], dim=-1)
    features[::7] *= 1 + 0.9e-3  # unit rows as far as the metrics take them
    compare, every = Cosine(features, features), slice(0, 100)
    tile, exact = compare.tile(every, every), features.double() @ features.double().T
    assert tile.dtype == first_pass
    off = (tile.double() - exact).abs()
    bound = torch.as_tensor(compare.error_of(tile.double()))
    assert (off <= bound).all()
    assert (bound <= compare.error).all()
    if signs == 'any signs' and first_pass == torch.bfloat16:
        assert off.max() > compare.error / 8  # the bound is not far too large
    rows = torch.arange(100)
    for dtype, error in compare.finer:
        for value, expected in ((compare.recompute(every, every, dtype), exact),
                                (compare.pairs(rows, rows.flip(0), dtype), exact[rows, rows.flip(0)])):
            assert (value.double() - expected).abs().max() <= error + 2.0**-33


# ---------------------------------------------------- counts ------------------------------------------------------
@pytest.mark.parametrize('spread', [0.0, 1e-8, 1e-7, 1e-6, 1e-4])
@pytest.mark.parametrize('gallery', [False, True])
def test_similarities_that_float32_does_not_tell_apart_are_ranked_exactly(small_pieces, spread, gallery):
    generator = torch.Generator().manual_seed(8)
    centres = torch.randn(5, 96, generator=generator, dtype=torch.float64)
    noise = torch.randn(130, 96, generator=generator)
    features = F.normalize(centres[torch.arange(130) % 5] + spread * noise, dim=-1).float()
    labels = torch.randint(0, 12, (130,), generator=generator)
    arguments = (features[:50], labels[:50], features[50:], labels[50:]) if gallery else (features, labels)
    searched = arguments if gallery else (features, labels, features, labels)
    assert_equal(retrieval_metrics(*arguments, recalls=(1, 3, 70)),
                 brute_force_by_matrix(*searched, not gallery, (1, 3, 70)))


@pytest.mark.parametrize('binary', [False, True])
@pytest.mark.parametrize('noise', [0.5, 2.0, 50.0])
def test_near_and_far_positives_are_counted_alike(small_pieces, noise, binary):
    generator = torch.Generator().manual_seed(9)
    labels = torch.arange(165) % 41
    features = F.normalize(torch.randn(41, 30, generator=generator)[labels] + noise * torch.randn(
        165, 30, generator=generator), dim=-1)
    compared = signs_of(features) if binary else features
    recalls = (1, 10, 30, 50, 80, 160)
    assert_equal(retrieval_metrics(features, labels, recalls=recalls, binary=binary),
                 brute_force_by_matrix(compared, labels, compared, labels, True, recalls))


@pytest.mark.parametrize('binary', [False, True])
@pytest.mark.parametrize('guess', ['far too high', 'far too low', 'any'])
def test_a_wrong_guess_of_the_thresholds_changes_nothing(small_pieces, monkeypatch, guess, binary):
    generator = torch.Generator().manual_seed(10)
    features, labels = random_features(120, 16, 9, 10)
    unit = 16 if binary else 1  # the scale of the similarities
    thresholds = {'far too high': torch.full((120,), 2.0 * unit), 'far too low': torch.full((120,), -2.0 * unit),
                  'any': unit * (2 * torch.rand(120, generator=generator) - 1)}[guess]
    monkeypatch.setattr(counting, 'guess_threshold', lambda *arguments: thresholds)
    compared = signs_of(features) if binary else features
    assert_equal(retrieval_metrics(features, labels, recalls=(1, 7, 60), binary=binary),
                 brute_force_by_matrix(compared, labels, compared, labels, True, (1, 7, 60)))


def test_tiles_do_not_change_the_result(monkeypatch):
    features, labels = random_features(101, 8, 6, 4)
    whole = retrieval_metrics(features, labels)
    monkeypatch.setitem(counting.TILE_SIDE, 'cpu', 17)
    assert retrieval_metrics(features, labels) == whole


def test_groups_of_queries_do_not_change_the_result(monkeypatch, small_pieces):
    features, labels = random_features(150, 8, 3, 11)
    whole = retrieval_metrics(features, labels)
    monkeypatch.setattr(counting, 'BLOCK_ENTRIES', 2500)  # classes of 50: groups of about 25 queries
    assert retrieval_metrics(features, labels) == whole
