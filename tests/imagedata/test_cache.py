"""The cache: the same pixels as the files, and never used if it is stale, truncated or damaged."""
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from raw_trees import make_cub

from common.errors import UserError
from common.images import load_image
from data_utils import convert
from imagedata.cache import build_cache, cache_files
from imagedata.loading import RetrievalDataset, make_transform, open_data
from imagedata.raw_sets import images_of, read_cub

SIZE = 24


def build(data_path, size=SIZE, crop_type='uncropped'):
    data = open_data(data_path, 'cub', crop_type)
    return build_cache(data.root, crop_type, size, images_of(data.split))


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    """A data path with a converted CUB of 12 images and its caches."""
    data_path = tmp_path_factory.mktemp('cached')
    root = make_cub(data_path, classes=(1, 2, 101, 102), images=3)
    convert(root, *read_cub(root))
    for crop_type in ('uncropped', 'cropped'):
        build(data_path, SIZE, crop_type)
    return data_path


@pytest.fixture
def data_path(built, tmp_path):
    """A copy of it that a test may damage; the files keep their times."""
    shutil.copytree(built, tmp_path / 'data')
    return tmp_path / 'data'


@pytest.mark.parametrize('crop_type', ['uncropped', 'cropped'])
def test_the_cache_holds_the_images_with_their_short_side_reduced(built, crop_type):
    root, split, cache = open_data(built, 'cub', crop_type, SIZE)
    for path in images_of(split):
        image, cached = load_image(root / path), cache.read(path)
        assert cached.dtype == torch.uint8
        assert min(cached.shape[1:]) == min(SIZE, *image.size)
        assert cached.shape[2] / cached.shape[1] == pytest.approx(image.width / image.height, rel=0.05)


def test_test_images_from_the_cache_equal_those_from_the_files(built):
    data = open_data(built, 'cub', cache_size=SIZE)
    transform = make_transform(False, 16, SIZE)
    files, packed = (RetrievalDataset(part, 'test', transform) for part in (data._replace(cache=None), data))
    for (image, label), (cached, same_label) in zip(files, packed, strict=True):
        assert label == same_label
        assert torch.equal(image, cached)


def test_training_crops_from_the_cache_are_those_of_the_files_to_rounding(built):
    data = open_data(built, 'cub', cache_size=SIZE)
    transform = make_transform(True, 16, min_crop=0.5)
    for epoch in (1, 2):
        sets = [RetrievalDataset(part, 'train', transform, seed=3) for part in (data._replace(cache=None), data)]
        for dataset in sets:
            dataset.set_epoch(epoch)
        correlations = [np.corrcoef(a[0].flatten(), b[0].flatten())[0, 1] for a, b in zip(*sets, strict=True)]
        del correlations[0]  # of the grey image, which is noise alone
        assert min(correlations) > 0.5  # the noise is reduced before the crop instead of after it
        assert np.mean(correlations) > 0.75


def test_small_images_are_never_enlarged(data_path):
    build(data_path, 512)
    root, split, cache = open_data(data_path, 'cub', cache_size=512)
    path = images_of(split)[1]
    assert np.array_equal(cache.read(path).permute(1, 2, 0), load_image(root / path))


def test_a_valid_cache_is_not_built_again(data_path):
    pixels, _ = cache_files(data_path / 'cub', 'uncropped', SIZE)
    before = pixels.stat().st_mtime_ns
    assert build(data_path) == pixels.stat().st_size
    assert pixels.stat().st_mtime_ns == before


def test_a_cache_of_more_images_is_built_again(data_path):
    root, split, _ = open_data(data_path, 'cub')
    images = images_of(split)
    before = cache_files(root, 'uncropped', SIZE)[0].stat().st_size
    assert build_cache(root, 'uncropped', SIZE, images[1:]) < before


def test_what_a_killed_build_has_left_is_removed(data_path):
    left = data_path / 'cub/.uncropped_cache_25.bin.0123abcd'
    left.write_bytes(b'half')
    build(data_path, 25)
    assert not left.exists()


def test_a_worker_opens_the_map_itself(built):
    _, split, cache = open_data(built, 'cub', cache_size=SIZE)
    path = images_of(split)[0]
    cache.read(path)
    sent = pickle.dumps(cache)
    assert len(sent) < cache.total / 2
    assert torch.equal(pickle.loads(sent).read(path), cache.read(path))


def remove_pixels(root):
    cache_files(root, 'uncropped', SIZE)[0].unlink()


def truncate(root):
    pixels, _ = cache_files(root, 'uncropped', SIZE)
    os.truncate(pixels, pixels.stat().st_size - 1)


def replace_an_image(root):
    Image.new('RGB', (40, 40)).save(root / 'uncropped/Some_Bird_0001_1.jpg')


def drop_a_shape(root):
    index = cache_files(root, 'uncropped', SIZE)[1]
    contents = torch.load(index, weights_only=True)
    torch.save({**contents, 'shapes': contents['shapes'][1:]}, index)


@pytest.mark.parametrize(('damage', 'word'), [(remove_pixels, 'there is no cache'), (truncate, 'truncated'),
                                              (replace_an_image, 'stale'), (drop_a_shape, 'damaged')])
def test_a_cache_that_is_not_valid_is_named_and_built_again(data_path, damage, word):
    damage(data_path / 'cub')
    with pytest.raises(UserError, match=rf'--cache_size {SIZE}: .*{word}.*--data_name cub --cache_size {SIZE}$'):
        open_data(data_path, 'cub', cache_size=SIZE)
    build(data_path)
    open_data(data_path, 'cub', cache_size=SIZE)


def test_changed_pixels_are_noticed_when_they_are_read(data_path):
    pixels, _ = cache_files(data_path / 'cub', 'uncropped', SIZE)
    data = bytearray(pixels.read_bytes())
    data[-1] ^= 1
    pixels.write_bytes(data)
    _, split, cache = open_data(data_path, 'cub', cache_size=SIZE)
    *others, last = images_of(split)
    for path in others:
        cache.read(path)
    with pytest.raises(UserError, match=f'is damaged where it holds {last}'):
        cache.read(last)


def test_a_build_that_fails_leaves_no_cache(data_path):
    remove_pixels(data_path / 'cub')
    (data_path / 'cub/uncropped/Some_Bird_0001_2.jpg').write_bytes(b'no image')
    with pytest.raises(UserError, match='Some_Bird_0001_2.jpg is missing or broken'):
        build(data_path)
    assert not any(file.exists() for file in cache_files(data_path / 'cub', 'uncropped', SIZE))
    assert not list((data_path / 'cub').glob('.*'))
