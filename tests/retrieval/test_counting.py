"""The fast counts behind the metrics: error bounds, blocks, queries that the nearest negatives do not decide."""
import pytest
import torch
from test_metrics import assert_equal, brute_force_by_matrix, random_features, signs_of
from torch.nn import functional as F

from retrieval import counting
from retrieval.counting import Similarity
from retrieval.metrics import retrieval_metrics


@pytest.fixture(autouse=True, params=['float32', 'float16'])
def fast_dtype(request, monkeypatch) -> torch.dtype:
    """Every test holds for the fast product of a processor and for that of a GPU."""
    monkeypatch.setitem(counting.FAST_DTYPE, 'cpu', getattr(torch, request.param))
    return getattr(torch, request.param)


@pytest.fixture
def small_pieces(monkeypatch):
    """Constants so small that few images take every path: several blocks of queries and parts of the gallery."""
    monkeypatch.setattr(counting, 'tile_entries', lambda device: 1000)
    monkeypatch.setattr(counting, 'BLOCK_ROWS', 20)
    monkeypatch.setattr(counting, 'FIRST_RANK', 3)


@pytest.fixture
def counted_all(monkeypatch) -> list[int]:
    """The numbers of queries that are compared with the whole gallery in float64."""
    numbers, count_all = [], counting.count_all
    monkeypatch.setattr(counting, 'count_all', lambda search, rows, positives: numbers.append(len(rows)) or count_all(
        search, rows, positives))
    return numbers


# ---------------------------------------------------- similarities ------------------------------------------------
@pytest.mark.parametrize('d', [1, 7, 512, 2047, 2048, 2049])
def test_products_of_signs_are_exact(fast_dtype, d):
    features = torch.randn(9, d, generator=torch.Generator().manual_seed(d))
    features[0, 0] = 0.0  # a zero counts as +1
    features[1], features[2] = features[0], -features[0]
    features[2, 0] = -1.0
    different = ((features[:4, None] >= 0) != (features[None] >= 0)).sum(-1)
    compare = Similarity(features[:4], features, binary=True)
    product = compare.fast(slice(0, 4), slice(0, 9))
    assert product.dtype == (fast_dtype if d <= 2048 else torch.float32)
    assert compare.error == 0
    assert torch.equal(product.double(), d - 2.0 * different.double())
    assert torch.equal(compare.exact(torch.arange(4), torch.arange(9)), d - 2.0 * different.double())


@pytest.mark.parametrize('d', [2, 512])
@pytest.mark.parametrize('signs', ['any signs', 'one sign', 'equal entries'])
def test_the_fast_product_is_off_by_no_more_than_its_bound(fast_dtype, d, signs):
    features = torch.randn(100, d, generator=torch.Generator().manual_seed(d))
    features = F.normalize({'any signs': features, 'one sign': features.abs(),
                            'equal entries': 1 + torch.arange(100)[:, None] / 100 + 0 * features}[signs], dim=-1)
    features[::7] *= 1 + 0.9e-3  # unit rows as far as the metrics take them
    compare, every = Similarity(features, features, binary=False), slice(0, 100)
    product, exact = compare.fast(every, every), features.double() @ features.double().T
    assert product.dtype == fast_dtype
    off = (product.double() - exact).abs().max()
    assert off <= compare.error
    if fast_dtype == torch.float16 and signs != 'any signs':
        assert off > compare.error / 16  # the bound is not far too large
    rows = torch.arange(100)
    for value, expected in ((compare.exact(every, every), exact),
                            (compare.of_pairs(rows, rows.flip(0)), exact[rows, rows.flip(0)])):
        assert (value - expected).abs().max() <= 2.0**-33


def test_the_bound_holds_where_all_numbers_round_alike():
    features = torch.full((2, 1024), (1 + 2.0**-11) / 32)  # half way between two numbers of float16
    compare = Similarity(features, features, binary=False)
    off = (compare.fast(slice(0, 2), slice(0, 2)).double() - compare.exact(slice(0, 2), slice(0, 2))).abs().max()
    assert off <= compare.error


def test_sums_in_float32_are_asked_for_and_the_setting_of_the_user_returns(monkeypatch):
    matmul, seen = torch.backends.cuda.matmul, []
    before = matmul.allow_fp16_reduced_precision_reduction
    with counting.float32_sums():
        seen.append(matmul.allow_fp16_reduced_precision_reduction)
    assert seen == [False]
    assert matmul.allow_fp16_reduced_precision_reduction == before


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


@pytest.mark.parametrize('class_size', [2, 6])
def test_queries_with_more_close_negatives_than_are_taken_are_compared_with_all(fast_dtype, counted_all, class_size):
    generator = torch.Generator().manual_seed(10)
    features = F.normalize(torch.ones(300, 24) + 1e-6 * torch.randn(300, 24, generator=generator), dim=-1)
    labels = torch.arange(300) // class_size
    for recalls in ((1, 7), (1,)):
        assert_equal(retrieval_metrics(features, labels, recalls=recalls),
                     brute_force_by_matrix(features, labels, features, labels, True, recalls))
    assert sum(counted_all) >= 10


@pytest.mark.parametrize('binary', [False, True])
def test_of_a_model_that_embeds_all_images_alike_no_query_is_compared_with_all(counted_all, binary):
    features, labels = F.normalize(torch.ones(300, 24), dim=-1), torch.arange(300) // 2
    assert_equal(retrieval_metrics(features, labels, recalls=(1, 7), binary=binary),
                 brute_force_by_matrix(features, labels, features, labels, True, (1, 7)))
    assert counted_all == []


@pytest.mark.parametrize(('entries', 'block_rows'), [(170, 1), (400, 17), (2**20, 3), (2**20, 1000)])
def test_blocks_do_not_change_the_result(monkeypatch, entries, block_rows):
    features, labels = random_features(101, 8, 6, 4)
    whole = retrieval_metrics(features, labels)
    monkeypatch.setattr(counting, 'tile_entries', lambda device: entries)
    monkeypatch.setattr(counting, 'BLOCK_ROWS', block_rows)
    assert retrieval_metrics(features, labels) == whole


def test_a_block_of_queries_and_their_positives_fits_into_a_tile(monkeypatch):
    monkeypatch.setattr(counting, 'tile_entries', lambda device: 5000)
    features, labels = random_features(600, 8, 3, 11)  # classes of 200
    search = counting.Search(Similarity(features, features, False), labels, labels, True)
    blocks = counting.split_queries(search)
    assert all(counting.positive_similarities(search, rows).numel() <= 5000 for rows in blocks)
    assert torch.equal(torch.cat(blocks).sort().values, torch.arange(600))


@pytest.mark.parametrize(('free', 'entries'), [(80 * 2**30, 2**27), (2**30, 2**24 + 2**20)])
def test_tiles_on_a_gpu_fit_into_the_memory_that_is_free_or_kept_for_reuse(monkeypatch, free, entries):
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (free, 2 * free))
    monkeypatch.setattr(torch.cuda, 'memory_reserved', lambda device: 5 * 2**26)
    monkeypatch.setattr(torch.cuda, 'memory_allocated', lambda device: 4 * 2**26)
    assert counting.tile_entries(torch.device('cuda')) == entries
