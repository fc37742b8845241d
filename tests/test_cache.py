"""The cache: the same pixels as the files, and never used when it is stale, cut off or damaged."""
import os
import pickle
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import assert_one_line_error, type_command
from PIL import Image
from raw_trees import make_car

from dataset import RetrievalDataset, make_transform, open_data
from engine.cache import build_cache, cache_files
from engine.errors import UserError
from engine.images import load_image
from raw_sets import images_of

SIZE = 24


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    """A converted car data set with its cache."""
    data_path = tmp_path_factory.mktemp('cached')
    make_car(data_path)
    result = type_command('data_utils.py', '--data_path', data_path, '--data_name', 'car', '--cache_size', SIZE)
    assert result.returncode == 0, result.stderr
    assert 'cache of 24 uncropped images' in result.stdout
    assert 'cache of 24 cropped images' in result.stdout
    return data_path


@pytest.fixture
def data_path(built, tmp_path):
    """A copy of it that a test may spoil; the files keep their times."""
    shutil.copytree(built, tmp_path / 'data')
    return tmp_path / 'data'


def open_cache(data_path, crop_type='uncropped'):
    data = open_data(data_path, 'car', crop_type, SIZE)
    return data.cache, data.root, data.split


def build(data_path, size):
    data = open_data(data_path, 'car')
    build_cache(data.root, 'uncropped', size, images_of(data.split))


def test_what_a_killed_call_has_half_written_is_removed(data_path):
    left = data_path / 'car/.uncropped_cache_25.bin.0123abcd'
    left.write_bytes(b'half')
    build(data_path, 25)
    assert not left.exists()


@pytest.mark.parametrize('crop_type', ['uncropped', 'cropped'])
def test_the_cache_holds_the_images_with_their_short_side_reduced(built, crop_type):
    cache, root, split = open_cache(built, crop_type)
    for paths in (*split['train'].values(), *split['test'].values()):
        for path in paths:
            image, cached = load_image(root / path), cache.read(path)
            assert cached.dtype == torch.uint8
            assert min(cached.shape[1:]) == min(SIZE, *image.size)
            assert cached.shape[2] / cached.shape[1] == pytest.approx(image.width / image.height, rel=0.05)


def test_test_images_from_the_cache_equal_those_from_the_files(built):
    data = open_data(built, 'car', cache_size=SIZE)
    transform = make_transform(False, 16, SIZE)
    files, packed = (RetrievalDataset(part, 'test', transform) for part in (data._replace(cache=None), data))
    for (image, label), (cached, same) in zip(files, packed, strict=True):
        assert label == same
        assert torch.equal(image, cached)


def test_training_crops_from_the_cache_are_those_of_the_files_to_rounding(built):
    data = open_data(built, 'car', cache_size=SIZE)
    transform = make_transform(True, 16, min_crop=0.5)
    for epoch in (1, 2):
        sets = [RetrievalDataset(part, 'train', transform, seed=3) for part in (data._replace(cache=None), data)]
        for dataset in sets:
            dataset.set_epoch(epoch)
        correlations = [np.corrcoef(a[0].flatten(), b[0].flatten())[0, 1] for a, b in zip(*sets, strict=True)]
        assert min(correlations) > 0.5  # noise, reduced before the crop instead of after it
        assert np.mean(correlations) > 0.75


def test_small_images_are_never_enlarged(data_path):
    build(data_path, 512)
    root, split, cache = open_data(data_path, 'car', cache_size=512)
    path = split['train'][next(iter(split['train']))][0]
    assert torch.equal(cache.read(path).permute(1, 2, 0), torch.from_numpy(np.array(load_image(root / path))))


def test_a_sound_cache_is_not_built_again(data_path):
    pixels, _ = cache_files(data_path / 'car', 'uncropped', SIZE)
    before = pixels.stat().st_mtime_ns
    build(data_path, SIZE)
    assert pixels.stat().st_mtime_ns == before


def test_a_worker_opens_the_map_itself(built):
    cache, _, split = open_cache(built)
    path = split['train'][next(iter(split['train']))][0]
    cache.read(path)
    sent = pickle.dumps(cache)
    assert len(sent) < cache.total / 2
    assert torch.equal(pickle.loads(sent).read(path), cache.read(path))


def spoil_missing(root):
    cache_files(root, 'uncropped', SIZE)[0].unlink()


def spoil_truncated(root):
    pixels, _ = cache_files(root, 'uncropped', SIZE)
    os.truncate(pixels, pixels.stat().st_size - 1)


def spoil_image(root):
    Image.new('RGB', (40, 40)).save(root / 'uncropped/000001.jpg')


def spoil_index(root):
    index = cache_files(root, 'uncropped', SIZE)[1]
    contents = torch.load(index, weights_only=True)
    torch.save({**contents, 'shapes': contents['shapes'][1:]}, index)


@pytest.mark.parametrize(('spoil', 'word'), [(spoil_missing, 'there is no cache'), (spoil_truncated, 'truncated'),
                                             (spoil_image, 'stale'), (spoil_index, 'damaged')])
def test_a_cache_that_is_not_sound_is_named_and_built_again(data_path, spoil, word):
    spoil(data_path / 'car')
    with pytest.raises(UserError, match=word) as error:
        open_cache(data_path)
    assert f'--data_name car --cache_size {SIZE}' in str(error.value)
    build(data_path, SIZE)
    open_cache(data_path)


def test_a_build_that_fails_leaves_no_cache(data_path):
    spoil_missing(data_path / 'car')
    (data_path / 'car/uncropped/000002.jpg').write_bytes(b'no image')
    with pytest.raises(UserError, match='000002.jpg is missing or broken'):
        build(data_path, SIZE)
    assert not any(file.exists() for file in cache_files(data_path / 'car', 'uncropped', SIZE))
    assert not list((data_path / 'car').glob('.*'))


@pytest.mark.parametrize('words', [['--num_workers', '0'], ['--num_workers', '2']])
def test_training_reads_the_cache(data_path, tmp_path, words):
    train = ('train.py', '--data_path', data_path, '--backbone_type', 'resnet18', '--weights', 'none', '--image_size',
             20, '--resize_size', SIZE, '--batch_size', 4, '--num_epochs', 1, '--recalls', '1', '--feature_dim', 8,
             '--warm_up', 0, '--results_dir', tmp_path / 'results', '--cache_size', SIZE, *words)
    result = type_command(*train)
    assert result.returncode == 0, result.stderr
    table = pd.read_csv(next((tmp_path / 'results').glob('*_statistics.csv')))
    assert table['args.cache_size'].tolist() == [SIZE]


def test_training_without_the_cache_it_names_stops(raw_sets, tmp_path):
    result = type_command('train.py', '--data_path', raw_sets, '--backbone_type', 'resnet18', '--weights', 'none',
                          '--cache_size', 999, '--num_workers', 0, '--results_dir', tmp_path, '--batch_size', 4,
                          '--recalls', '1')
    assert_one_line_error(result, '--cache_size 999', 'there is no cache', 'data_utils.py')
