"""Files from strangers, damaged, crafted or absurd: reading them succeeds, or ends in one line, and nothing else.

The default tests try a few of each; the slow ones, hundreds.
"""
import contextlib
import os
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, call_main
from faults import BACKBONE, damaged, differences, fuzz, fuzz_targets, tamper, tamper_targets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from raw_trees import make_car, make_cub, make_isc, make_sop
from scipy.io import loadmat, savemat

import data_utils
from common.errors import UserError
from common.files import check_paths, image_file, load, save
from common.images import BrokenImage, load_image
from common.results import run_name
from imagedata.cache import Cache, build_cache
from imagedata.loading import open_data
from imagedata.raw_sets import RAW_SETS, images_of, read_car
from model import EmbeddingNet, NetConfig
from retrieval.database import load_data_base
from retrieval.model_file import load_model, load_model_file
from training.checkpoint import load_checkpoint_file

NAME = 'car_timm-test_resnet_balanced_proxy_16'
FEW_OR_MANY = [12, pytest.param(200, marks=pytest.mark.slow)]


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


@pytest.mark.parametrize('number', FEW_OR_MANY)
@pytest.mark.parametrize('kind', ['checkpoint', 'data base', 'model'])
def test_a_damaged_file_is_refused_or_read_as_it_was(trained_run, tmp_path, kind, number):
    file = trained_run / f'{NAME}_{kind.replace(" ", "_")}.pth'
    read = {'data base': lambda path: load_data_base(path) and load(path, kind),
            'model': lambda path: load_model(path, torch.device('cpu'))[1], 'checkpoint': load_checkpoint_file}[kind]
    good, data, rng = read(file), file.read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(number):
        contents = read_damaged(tmp_path / 'damaged.pth', damaged(data, rng), read)
        refused += contents is None
        assert contents is None or not differences(good, contents)
    assert refused >= 0.7 * number


@pytest.mark.parametrize('number', FEW_OR_MANY)
def test_damaged_weights_are_refused_or_read_as_they_were(tmp_path, number):
    network = EmbeddingNet(NetConfig(BACKBONE, 4), 'none')
    torch.save(network.backbone.state_dict(), tmp_path / 'w.pth')
    good, data = load(tmp_path / 'w.pth', 'weights file'), (tmp_path / 'w.pth').read_bytes()
    rng = np.random.default_rng(1)
    for _ in range(number):
        contents = read_damaged(tmp_path / 'damaged.pth', damaged(data, rng), lambda path: load(path, 'weights file'))
        assert contents is None or not differences(good, contents)


@pytest.mark.parametrize('number', FEW_OR_MANY)
def test_a_damaged_cache_is_refused_or_read_as_it_was(own_car, number):
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
        for _ in range(number):
            contents = read_damaged(file, damaged(data, rng), lambda _: pixels())
            refused += contents is None
            assert contents is None or not differences(good, contents)
        file.write_bytes(data)
        assert refused >= 0.4 * number


# ---------------------------------------------------- paths --------------------------------------------------------
@pytest.mark.parametrize('path', ['../../etc/passwd', '/etc/passwd', 'uncropped/../../x.jpg', '..', 'a\\..\\b',
                                  'a\0b'])
def test_a_path_that_leaves_the_folder_is_refused_by_name(trained_run, tmp_path, path):
    data_base = load(trained_run / f'{NAME}_data_base.pth', 'data base')
    save({**data_base, 'test_images': [path, *data_base['test_images'][1:]]}, tmp_path / 'evil.pth')
    with pytest.raises(UserError, match='evil.pth: the image .* lies outside'):
        load_data_base(tmp_path / 'evil.pth')
    (tmp_path / 'mine').mkdir()
    save({'train': {'a': [path, 'x.jpg']}, 'test': {'b': ['y.jpg']}}, tmp_path / 'mine/uncropped_data_dicts.pth')
    with pytest.raises(UserError, match='lies outside'):
        open_data(tmp_path, 'mine')


def test_a_link_out_of_the_folder_is_refused_by_name(tmp_path):
    (tmp_path / 'secret.jpg').write_bytes(b'secret')
    (tmp_path / 'car').mkdir()
    os.symlink(tmp_path / 'secret.jpg', tmp_path / 'car/a.jpg')
    with pytest.raises(UserError, match='car/a.jpg is a link out of its folder'):
        image_file(tmp_path / 'car', 'a.jpg')


def test_annotations_that_lead_out_of_the_folder_are_refused(tmp_path):
    root = make_cub(tmp_path)
    table = (root / 'images.txt').read_text()
    first = table.splitlines()[0].split()[1]
    (root / 'images.txt').write_text(table.replace(first, '../../../x.jpg'))
    with pytest.raises(UserError, match='x.jpg.* is not the path of an image below the data set'):
        call_main(data_utils, '--data_path', tmp_path, '--data_name', 'cub')


# ---------------------------------------------------- images -------------------------------------------------------
def write_bomb(path, side: int) -> None:
    """Write a small PNG file that says it has side x side pixels."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    header = struct.pack('>IIBBBBB', side, side, 8, 0, 0, 0, 0)
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(bytes(10**6)))
                     + chunk(b'IEND', b''))


@pytest.mark.parametrize('side', [9500, 50_000])  # Pillow warns about the first and refuses the second
def test_a_decompression_bomb_is_refused(tmp_path, side):
    write_bomb(tmp_path / 'bomb.png', side)
    with pytest.raises(BrokenImage, match='decompression bomb'):
        load_image(tmp_path / 'bomb.png')


def test_postscript_is_not_an_image(tmp_path):
    (tmp_path / 'x.jpg').write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n')
    with pytest.raises(BrokenImage, match='cannot identify'):  # and not: unable to locate Ghostscript
        load_image(tmp_path / 'x.jpg')


@pytest.mark.parametrize('number', [5, pytest.param(60, marks=pytest.mark.slow)])
def test_a_damaged_image_is_broken_or_an_image(tmp_path, number):
    rng = np.random.default_rng(3)
    for suffix in ('jpg', 'png', 'gif', 'webp', 'tif', 'bmp'):
        Image.fromarray(rng.integers(0, 256, (24, 20, 3), dtype=np.uint8)).save(tmp_path / f'good.{suffix}')
        data = (tmp_path / f'good.{suffix}').read_bytes()
        for _ in range(number):
            (tmp_path / f'bad.{suffix}').write_bytes(damaged(data, rng))
            with contextlib.suppress(BrokenImage):
                assert load_image(tmp_path / f'bad.{suffix}').mode == 'RGB'


# ---------------------------------------------------- fuzzing ------------------------------------------------------
@pytest.mark.parametrize(('seed', 'number'), [(0, 300), *(pytest.param(seed, 5000, marks=pytest.mark.slow)
                                                         for seed in (0, 1))])
def test_no_text_ends_in_anything_but_success_or_one_line(tmp_path, seed, number):
    for make in (make_cub, make_sop, make_isc):
        make(tmp_path)
    assert not fuzz(fuzz_targets(tmp_path), number, np.random.default_rng(seed))


PROPERTY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


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


@pytest.mark.parametrize('number', [15, pytest.param(150, marks=pytest.mark.slow)])
def test_no_tampered_file_ends_in_anything_but_success_or_one_line(trained_run, raw_sets, tmp_path, number):
    assert not tamper(tamper_targets(trained_run, raw_sets, tmp_path), number, np.random.default_rng(4))


def test_an_optimizer_of_other_shapes_is_refused(trained_run, raw_sets, tmp_path):
    good, read = tamper_targets(trained_run, raw_sets, tmp_path)['checkpoint']
    state = {number: {**values, 'exp_avg': torch.zeros(1)} for number, values in good['optimizer']['state'].items()}
    with pytest.raises(UserError, match='exp_avg of the optimizer has the shape'):
        read({**good, 'optimizer': {**good['optimizer'], 'state': state}})


def test_a_model_that_asks_for_all_memory_is_refused(trained_run, tmp_path):
    contents = load(trained_run / f'{NAME}_model.pth', 'model')
    save({**contents, 'config': {**contents['config'], 'feature_dim': 20_000_000}}, tmp_path / 'm.pth')
    with pytest.raises(UserError, match='m.pth is not a valid model: feature_dim cannot be used'):
        load_model(tmp_path / 'm.pth', torch.device('cpu'))


@pytest.mark.parametrize('value', [5, 'x', torch.ones(16).to_sparse(), torch.ones(2, device='meta'),
                                   torch.ones(1).expand(8 * 2**30), torch.ones(2, dtype=torch.complex64)])
def test_a_model_of_other_things_than_plain_tensors_is_refused(trained_run, tmp_path, value):
    contents = load(trained_run / f'{NAME}_model.pth', 'model')
    torch.save({**contents, 'state_dict': {**contents['state_dict'], 'mean': value}}, tmp_path / 'm.pth')
    assert (tmp_path / 'm.pth').stat().st_size < 10**7
    with pytest.raises(UserError, match='m.pth is not a valid model: its state_dict holds other things than plain'):
        load_model_file(tmp_path / 'm.pth')


def test_a_model_of_whole_numbers_is_refused(trained_run, tmp_path):
    contents = load(trained_run / f'{NAME}_model.pth', 'model')
    save({**contents, 'state_dict': {name: value.long() for name, value in contents['state_dict'].items()}},
         tmp_path / 'm.pth')
    with pytest.raises(UserError, match='m.pth does not fit its own description .* is of torch.int64'):
        load_model(tmp_path / 'm.pth')


@pytest.mark.parametrize('features', [torch.ones(1, 1).expand(12, 10**9), torch.zeros(12, 0),
                                      torch.eye(12).requires_grad_()])
def test_features_that_cannot_be_used_are_refused(trained_run, tmp_path, features):
    contents = load(trained_run / f'{NAME}_data_base.pth', 'data base')
    assert len(contents['test_features']) == 12
    torch.save({**contents, 'test_features': features}, tmp_path / 'd.pth')
    with pytest.raises(UserError, match='not a valid data base: test_features cannot be used'):
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
    (tmp_path / 'packages/scipy').mkdir(parents=True)
    (tmp_path / 'packages/scipy/__init__.py').touch()
    (tmp_path / 'packages/scipy/io.py').write_text(
        'import os, signal\ndef loadmat(file):\n    os.kill(os.getpid(), signal.SIGSEGV)\n')
    monkeypatch.syspath_prepend(tmp_path / 'packages')  # for the process that reads; this one has imported SciPy
    with pytest.raises(UserError, match='cars_annos.mat is not the annotation file of CARS196 .A process in'):
        read_car(root)


@pytest.mark.slow
def test_damaged_annotations_are_refused_or_read(tmp_path):
    root = make_car(tmp_path)
    contents = {name: value for name, value in loadmat(root / 'cars_annos.mat').items() if name[0] != '_'}
    savemat(root / 'cars_annos.mat', contents)  # without compression, whose checksum catches most damage
    data, rng, refused = (root / 'cars_annos.mat').read_bytes(), np.random.default_rng(0), 0
    assert len(read_car(root)[0]) == 24
    for _ in range(40):
        refused += read_damaged(root / 'cars_annos.mat', damaged(data, rng), lambda _: read_car(root)) is None
    assert refused > 16  # half of them are cut off


def test_a_checkpoint_of_other_contents_is_refused(tmp_path):
    save({'version': 2, 'model': 5}, tmp_path / 'c.pth')
    with pytest.raises(UserError, match='is not a checkpoint of this project: it lacks'):
        load_checkpoint_file(tmp_path / 'c.pth')


def test_nothing_is_given_to_a_shell_and_no_file_is_executed():
    files = [*REPOSITORY.glob('*.py'), *REPOSITORY.glob('[a-z]*/*.py')]
    assert {path.parent.name for path in files} >= {'common', 'imagedata', 'retrieval', 'training'}
    for file in files:
        code = file.read_text()
        if file.parent.name != 'tests':
            for word in ('shell=True', 'os.system', 'pickle.load', 'weights_only=False', 'trust_remote_code'):
                assert word not in code, (file, word)
