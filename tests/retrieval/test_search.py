"""The search in a data base: the ranking of its queries, the choice among them, and the nearest images of one."""
import numpy as np
import pytest
import torch
from shop import make_shop, rank_in_loops

from common.errors import UserError
from retrieval.database import load_data_base
from retrieval.metrics import similarity_of
from retrieval.search import choose_queries, nearest_images, rank_queries


@pytest.fixture(scope='module')
def shop(tmp_path_factory):
    """A data base of 28 images in five classes, one of which has a single image."""
    return load_data_base(make_shop(tmp_path_factory.mktemp('shop')))


@pytest.mark.parametrize('binary', [False, True])
@pytest.mark.parametrize('gallery', [(), (4, 2, 5, 1, 3)])
def test_queries_are_ranked_as_in_loops(tmp_path, gallery, binary):
    data_base = load_data_base(make_shop(tmp_path, gallery=gallery))
    ranked = rank_queries(data_base, binary)
    rank, margin, nearest = (np.array(part, float) for part in zip(*rank_in_loops(data_base, binary), strict=True))
    np.testing.assert_array_equal(ranked['rank'], rank)
    np.testing.assert_allclose(ranked['margin'], margin, atol=1e-7)
    np.testing.assert_array_equal(ranked['nearest'], nearest)


def test_worst_and_best_queries_stand_at_the_ends_of_the_ranking(shop):
    ranked = rank_queries(shop)
    number = int((~ranked['rank'].isnan()).sum())
    assert number == 27  # the only image of its class has no positive
    keys = [(ranked['rank'][index].item(), -ranked['margin'][index].item())
            for index in choose_queries(ranked, 'best', number)]
    assert keys == sorted(keys)
    assert choose_queries(ranked, 'worst', number) == choose_queries(ranked, 'best', number)[::-1]
    with pytest.raises(UserError, match='--num_queries 28 is more than the 27 queries'):
        choose_queries(ranked, 'best', 28)


def test_random_queries_depend_on_the_seed_alone(shop):
    ranked = rank_queries(shop)
    first, again, other = (choose_queries(ranked, 'random', 9, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert len(set(first)) == 9


def test_the_nearest_images_agree_with_the_ranking(shop):
    ranked = rank_queries(shop)
    for query, label in enumerate(shop.test.labels):
        hits = nearest_images(shop.test.features[query], shop, ('test', query), 99)
        assert len(hits) == 27  # all but the query itself
        assert hits[0][0] == ranked['nearest'][query]
        positives = [position for position, (image, _) in enumerate(hits) if shop.test.labels[image] == label]
        if ranked['rank'][query].isnan():
            assert not positives
        else:
            assert positives[0] == ranked['rank'][query]


def test_a_query_from_outside_finds_an_image_equal_to_it(shop):
    hits = nearest_images(shop.test.features[3], shop, number=4)
    expected = (shop.test.features.double() @ shop.test.features[3].double()).argsort(descending=True)
    assert [index for index, _ in hits] == expected[:4].tolist()
    assert hits[0] == (3, pytest.approx(1, abs=1e-6))


def test_a_similarity_does_not_depend_on_what_it_is_computed_with(shop):
    features = shop.test.features
    for binary in (False, True):
        rows = [similarity_of(feature[None], features, binary) for feature in features]
        assert torch.equal(torch.cat(rows), similarity_of(features, features, binary))
