"""Files from strangers: damaged, crafted or absurd, they end in success or in one line, and never as something else."""
import argparse
import contextlib
import os
import re
import shutil
import struct
import zlib
from multiprocessing import spawn
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, assert_one_line_error, type_command
from training.checkpoint import load_checkpoint_file
from faults import BACKBONE, damaged, differences, fuzz, fuzz_targets, tamper, tamper_targets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from raw_trees import make_car, make_cub, make_isc, make_sop
from scipy.io import loadmat, savemat

from common.errors import UserError
from common.files import check_paths, image_file, load, save
from common.images import BrokenImage, load_image
from common.results import run_name
from imagedata.cache import Cache, build_cache
from imagedata.loading import open_data
from imagedata.raw_sets import RAW_SETS, images_of, read_car
from model import EmbeddingNet, NetConfig
from retrieval.database import load_data_base
from retrieval.model_file import load_model
from utils import int_list, seed_list

NAME = 'car_timm-test_resnet_balanced_proxy_16'


# ---------------------------------------------------- damage -------------------------------------------------------
def read_damaged(path, data: bytes, read):
    """Return what is read from a damaged file, None where it is refused by a line with its name.

    What is not refused has to be the same: some bits say nothing, as those of the padding between tensors.
    """
    path.write_bytes(data)
    try:
        return read(path)
    except UserError as error:
        if path.name not in str(error) or '\n' in str(error):
            raise
        return None


@pytest.mark.parametrize('kind', ['checkpoint', 'data base', 'model'])
def test_a_damaged_file_is_refused_or_the_same(run, tmp_path, kind):
    file = run / f'{NAME}_{kind.replace(" ", "_")}.pth'
    read = {'data base': lambda path: load_data_base(path) and load(path, kind),
            'model': lambda path: load_model(path, torch.device('cpu'))[1], 'checkpoint': load_checkpoint_file}[kind]
    good, data, rng = read(file), file.read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        found = read_damaged(tmp_path / 'damaged.pth', damaged(data, rng), read)
        refused += found is None
        assert found is None or not differences(good, found)
    assert refused >= 150


def test_damaged_weights_are_refused_or_the_same(tmp_path):
    network = EmbeddingNet(NetConfig(BACKBONE, 4), 'none')
    torch.save(network.trunk.state_dict(), tmp_path / 'w.pth')
    good, data = load(tmp_path / 'w.pth', 'weights file'), (tmp_path / 'w.pth').read_bytes()
    rng = np.random.default_rng(1)
    for _ in range(200):
        found = read_damaged(tmp_path / 'damaged.pth', damaged(data, rng), lambda path: load(path, 'weights file'))
        assert found is None or not differences(good, found)


def test_a_damaged_cache_is_refused_or_the_same(own_car):
    root, split, _ = open_data(own_car, 'car')
    images = images_of(split)
    build_cache(root, 'uncropped', 24, images)

    def pixels():
        cache = Cache(root, 'uncropped', 24, images)
        return [cache.read(path).clone() for path in images]

    good, rng = pixels(), np.random.default_rng(2)
    for suffix in ('bin', 'pth'):
        file = root / f'uncropped_cache_24.{suffix}'
        data, refused = file.read_bytes(), 0
        for _ in range(200):
            found = read_damaged(file, damaged(data, rng), lambda _: pixels())
            refused += found is None
            assert found is None or not differences(good, found)
        file.write_bytes(data)
        assert refused >= 100


def test_a_data_base_of_a_stranger_may_say_anything_of_its_origin(run, tmp_path):
    data_base = load(run / f'{NAME}_data_base.pth', 'data base')
    for made in ([1], 'x', None, {'commit': [1], 'changed_since': [2]}):
        save({**data_base, 'made_with': made, 'epoch': torch.zeros(2)}, tmp_path / 'd.pth')
        for words in ((), ('--json',)):
            result = type_command('evaluate.py', '--data_base', tmp_path / 'd.pth', *words)
            assert result.returncode == 0, result.stderr


def test_features_that_are_no_unit_rows_are_refused(run, tmp_path):
    data_base = load(run / f'{NAME}_data_base.pth', 'data base')
    save({**data_base, 'test_features': 3 * data_base['test_features']}, tmp_path / 'd.pth')
    with pytest.raises(UserError, match='d.pth: the test features are no unit rows'):
        load_data_base(tmp_path / 'd.pth')


# ---------------------------------------------------- paths --------------------------------------------------------
@pytest.mark.parametrize('path', ['../../etc/passwd', '/etc/passwd', 'uncropped/../../x.jpg', '..', 'a\\..\\b', 'a\0b'])
def test_a_path_that_leaves_the_folder_is_refused_by_name(run, raw_sets, tmp_path, path):
    data_base = load(run / f'{NAME}_data_base.pth', 'data base')
    save({**data_base, 'test_images': [path, *data_base['test_images'][1:]]}, tmp_path / 'evil.pth')
    with pytest.raises(UserError, match='evil.pth: the image .* does not lie in'):
        load_data_base(tmp_path / 'evil.pth')
    (tmp_path / 'mine').mkdir()
    save({'train': {'a': [path, 'x.jpg']}, 'test': {'b': ['y.jpg']}}, tmp_path / 'mine/uncropped_data_dicts.pth')
    with pytest.raises(UserError, match='does not lie in'):
        open_data(tmp_path, 'mine')


def test_a_link_out_of_the_folder_is_refused_by_name(run, raw_sets, tmp_path):
    (tmp_path / 'secret.jpg').write_bytes(b'secret')
    root = tmp_path / 'data/car'
    shutil.copytree(raw_sets / 'car', root)
    image = load_data_base(run / f'{NAME}_data_base.pth').test.images[0]
    (root / image).unlink()
    os.symlink(tmp_path / 'secret.jpg', root / image)
    with pytest.raises(UserError, match='is a link out of'):
        image_file(root, image)
    result = type_command('test.py', '--data_base', run / f'{NAME}_data_base.pth', '--data_path', tmp_path / 'data',
                          '--results_dir', tmp_path, '--query_img_name', image)
    assert_one_line_error(result, image, 'is a link out of')


def test_annotations_that_lead_out_of_the_folder_are_refused(tmp_path):
    root = make_cub(tmp_path)
    table = (root / 'images.txt').read_text()
    first = table.splitlines()[0].split()[1]
    (root / 'images.txt').write_text(table.replace(first, '../../../x.jpg'))
    assert_one_line_error(type_command('data_utils.py', '--data_path', tmp_path, '--data_name', 'cub'), 'x.jpg',
                          'is no path of an image below the data set')


# ---------------------------------------------------- images -------------------------------------------------------
def write_bomb(path, side: int) -> None:
    """Write a small PNG file that says it has side x side pixels."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    header = struct.pack('>IIBBBBB', side, side, 8, 0, 0, 0, 0)
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(bytes(10**6)))
                     + chunk(b'IEND', b''))


@pytest.mark.parametrize('side', [9500, 50_000])  # Pillow warns of the first and refuses the second
def test_a_decompression_bomb_is_refused(tmp_path, side):
    write_bomb(tmp_path / 'bomb.png', side)
    with pytest.raises(BrokenImage, match='decompression bomb'):
        load_image(tmp_path / 'bomb.png')


def test_postscript_is_no_image(tmp_path):
    (tmp_path / 'x.jpg').write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n')
    with pytest.raises(BrokenImage, match='cannot identify'):  # and not: unable to locate Ghostscript
        load_image(tmp_path / 'x.jpg')


def test_a_damaged_image_is_broken_or_an_image(tmp_path):
    rng = np.random.default_rng(3)
    for suffix in ('jpg', 'png', 'gif', 'webp', 'tif', 'bmp'):
        Image.fromarray(rng.integers(0, 256, (24, 20, 3), dtype=np.uint8)).save(tmp_path / f'good.{suffix}')
        data = (tmp_path / f'good.{suffix}').read_bytes()
        for _ in range(60):
            (tmp_path / f'bad.{suffix}').write_bytes(damaged(data, rng))
            with contextlib.suppress(BrokenImage):
                assert load_image(tmp_path / f'bad.{suffix}').mode == 'RGB'


# ---------------------------------------------------- fuzzing ------------------------------------------------------
@pytest.mark.parametrize('seed', [0, 1])
def test_no_text_ends_in_anything_but_success_or_one_line(tmp_path, seed):
    for make in (make_cub, make_sop, make_isc):
        make(tmp_path)
    assert not fuzz(fuzz_targets(tmp_path), 5000, np.random.default_rng(seed))


PROPERTY = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@PROPERTY
@given(st.lists(st.integers(-5, 10**6), max_size=6))
def test_recalls_and_seeds_are_read_as_they_are_written_or_refused(numbers):
    text = ','.join(map(str, numbers))
    for parse, sound in ((int_list, len(numbers) > 0 and min(numbers, default=0) > 0
                          and numbers == sorted(set(numbers))),
                         (seed_list, len(numbers) > 1 and min(numbers) >= 0 and len(set(numbers)) == len(numbers))):
        if sound:
            assert parse(text) == tuple(numbers)
        else:
            with pytest.raises(argparse.ArgumentTypeError):
                parse(text)


@PROPERTY
@given(st.lists(st.text(st.sampled_from('ab./\\\0~ \n') | st.characters(), max_size=12), min_size=1, max_size=4))
def test_a_path_that_is_accepted_lies_below_the_folder(parts):
    path = '/'.join(parts)
    with contextlib.suppress(UserError):
        check_paths(Path('x.pth'), [path])
        assert f'{os.path.normpath(os.path.join("/data/car", path))}/'.startswith('/data/car/')


@PROPERTY
@given(st.lists(st.text(max_size=20) | st.floats() | st.integers(), max_size=5))
def test_a_run_name_is_a_file_name(parts):
    assert re.fullmatch(r'[\w.-]*', run_name(*parts))


@PROPERTY
@given(table=st.text(st.sampled_from('01 \t\n./-a') | st.characters(), max_size=60),
       file=st.sampled_from(['cub/images.txt', 'cub/bounding_boxes.txt', 'sop/Ebay_test.txt',
                             'isc/Eval/list_eval_partition.txt']))
def test_any_text_as_annotations_is_read_or_refused(tmp_path, table, file):
    for make in (make_cub, make_sop, make_isc):
        if not (tmp_path / file.split('/')[0]).exists():
            make(tmp_path)
    good = (tmp_path / file).read_bytes()
    (tmp_path / file).write_text(table, encoding='utf-8', errors='surrogatepass', newline='')
    name = file.split('/')[0]
    with contextlib.suppress(UserError):
        items, _ = RAW_SETS[name].read(tmp_path / name)
        assert all(item.source[0] != '/' and '..' not in item.source.split('/') for item in items)
    (tmp_path / file).write_bytes(good)


def test_no_tampered_file_ends_in_anything_but_success_or_one_line(run, raw_sets, tmp_path):
    assert not tamper(tamper_targets(run, raw_sets, tmp_path), 150, np.random.default_rng(4))


def test_an_optimizer_of_other_shapes_is_refused(run, raw_sets, tmp_path):
    good, read = tamper_targets(run, raw_sets, tmp_path)['checkpoint']
    state = {number: {**values, 'exp_avg': torch.zeros(1)} for number, values in good['optimizer']['state'].items()}
    with pytest.raises(UserError, match='exp_avg of the optimizer has the shape'):
        read({**good, 'optimizer': {**good['optimizer'], 'state': state}})


def test_a_model_that_asks_for_all_memory_is_refused(run, tmp_path):
    contents = load(run / f'{NAME}_model.pth', 'model')
    save({**contents, 'config': {**contents['config'], 'feature_dim': 20_000_000}}, tmp_path / 'm.pth')
    with pytest.raises(UserError, match='m.pth is no sound model: feature_dim cannot be used'):
        load_model(tmp_path / 'm.pth', torch.device('cpu'))


@pytest.mark.parametrize('features', [torch.ones(1, 1).expand(12, 10**9), torch.zeros(12, 0),
                                      torch.eye(12).requires_grad_()])
def test_features_that_cannot_be_used_are_refused(run, tmp_path, features):
    contents = load(run / f'{NAME}_data_base.pth', 'data base')
    assert len(contents['test_features']) == 12
    torch.save({**contents, 'test_features': features}, tmp_path / 'd.pth')
    with pytest.raises(UserError, match='no sound data base: test_features cannot be used'):
        load_data_base(tmp_path / 'd.pth')


def test_of_a_split_file_only_what_was_checked_is_used(tmp_path):
    (tmp_path / 'mine').mkdir()
    save({'train': {'a': ['x.jpg']}, 'test': {'b': ['y.jpg']}, 'query': {'a': ['../../private.jpg']},
          'note': torch.zeros(1)}, tmp_path / 'mine/uncropped_data_dicts.pth')
    assert open_data(tmp_path, 'mine').split.keys() == {'train', 'test', 'class_names'}


@pytest.mark.parametrize('shapes', [[], [[2**70, 1]]])
def test_a_cache_index_that_says_nothing_is_refused(tmp_path, shapes):
    (tmp_path / 'uncropped_cache_24.bin').write_bytes(b'x')
    number = len(shapes)
    save({'images': ['x.jpg'] * number, 'shapes': shapes, 'checksums': [0] * number, 'stamps': [[0, 0]] * number,
          'size': 24}, tmp_path / 'uncropped_cache_24.pth')
    with pytest.raises(UserError, match='uncropped_cache_24.pth is damaged'):
        Cache(tmp_path, 'uncropped', 24, ['x.jpg'])


def test_a_reader_of_annotations_that_crashes_is_one_line(tmp_path, monkeypatch):
    root = make_car(tmp_path)
    (tmp_path / 'crash').write_text('#!/bin/sh\nkill -SEGV $$\n')
    (tmp_path / 'crash').chmod(0o700)
    monkeypatch.setattr(spawn, '_python_exe', os.fsencode(tmp_path / 'crash'))
    with pytest.raises(UserError, match='cars_annos.mat is no annotation file of CARS196 .A process in'):
        read_car(root)


def test_damaged_annotations_are_refused_or_read(tmp_path):
    root = make_car(tmp_path)
    contents = {name: value for name, value in loadmat(root / 'cars_annos.mat').items() if name[0] != '_'}
    savemat(root / 'cars_annos.mat', contents)  # without compression, whose checksum catches most damage
    data, rng, refused = (root / 'cars_annos.mat').read_bytes(), np.random.default_rng(0), 0
    assert len(read_car(root)[0]) == 24
    for _ in range(40):
        refused += read_damaged(root / 'cars_annos.mat', damaged(data, rng), lambda _: read_car(root)) is None
    assert refused > 20  # half of them are cut off


def test_a_checkpoint_of_other_contents_is_refused(tmp_path):
    save({'version': 2, 'model': 5}, tmp_path / 'c.pth')
    with pytest.raises(UserError, match='is no checkpoint of this project: it lacks'):
        load_checkpoint_file(tmp_path / 'c.pth')


def test_nothing_is_given_to_a_shell():
    for file in (*REPOSITORY.glob('*.py'), *REPOSITORY.glob('engine/*.py')):
        code = file.read_text()
        assert 'shell=True' not in code
        assert 'os.system' not in code
        assert 'pickle.load' not in code
        assert 'weights_only=False' not in code
