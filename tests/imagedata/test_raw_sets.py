"""The known raw data sets in their true formats, what is wrong with damaged ones, and the names of their folders."""
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPOSITORY
from raw_trees import make_car, make_cub, make_isc, make_own, make_sop

from common.errors import UserError
from imagedata.raw_sets import (
    RAW_SETS,
    canonical_data_name,
    check_data_path,
    count_images,
    find_root,
    images_of,
    read_annotations,
    read_car,
    read_cub,
    read_isc,
    read_sop,
)


def count_classes(images):
    """Return {subset: {label: number of images}}."""
    counts = {}
    for image in images:
        classes = counts.setdefault(image.subset, {})
        classes[image.label] = classes.get(image.label, 0) + 1
    return counts


# ---------------------------------------------------- the four data sets -------------------------------------------
def test_car_is_split_by_class_number(tmp_path):
    images, class_names = read_car(make_car(tmp_path))
    assert count_classes(images) == {'train': {'1': 4, '2': 4, '98': 4}, 'test': {'99': 4, '100': 4, '196': 4}}
    assert images[0].source == 'car_ims/000001.jpg'
    assert images[0].stem == '000001'
    assert images[0].box == (2, 1, 42, 36)  # columns 3 to 42 and rows 2 to 36, counted from 1
    assert class_names['98'] == 'Maker Model 98'


def test_cub_is_split_by_class_number(tmp_path):
    images, class_names = read_cub(make_cub(tmp_path))
    assert count_classes(images) == {'train': {'1': 4, '2': 4, '100': 4}, 'test': {'101': 4, '102': 4, '200': 4}}
    assert images[1].source == 'images/001.Some_Bird/Some_Bird_0001_1.jpg'
    assert images[1].stem == 'Some_Bird_0001_1'
    assert images[1].box == (4, 3, 34, 39)  # x 4 to 34, y 3 to 38.5
    assert class_names['101'] == '101.Some_Bird'


def test_sop_follows_its_lists_and_keeps_file_names_apart(tmp_path):
    images, class_names = read_sop(make_sop(tmp_path))
    assert count_classes(images) == {'train': dict.fromkeys('123', 4),
                                     'test': dict.fromkeys(('11319', '11320', '11321'), 4)}
    assert images[0].source == 'chair_final/111085122871_0.JPG'
    assert images[0].stem == 'chair_final_111085122871_0'
    assert class_names['1'] == 'chair 1'


def test_isc_has_queries_and_a_gallery(tmp_path):
    images, _ = read_isc(make_isc(tmp_path))
    items = {f'id_0000000{number}': 2 for number in (7, 8, 9)}
    assert count_classes(images) == {'train': {f'id_0000000{number}': 4 for number in (1, 2, 3)}, 'query': items,
                                     'gallery': items}
    query = next(image for image in images if image.subset == 'query')
    assert query.source == 'Img/img/WOMEN/Dresses/id_00000007/01_1_front.jpg'
    assert query.stem == 'WOMEN_Dresses_id_00000007_01_1_front'


# ---------------------------------------------------- damaged annotations ------------------------------------------
@pytest.mark.parametrize(('make', 'read', 'file', 'number', 'line'), [
    (make_cub, read_cub, 'images.txt', 2, '2'),
    (make_cub, read_cub, 'images.txt', 3, '3 ..'),
    (make_cub, read_cub, 'images.txt', 4, '4 /etc/passwd.jpg'),
    (make_cub, read_cub, 'images.txt', 5, '99 a.jpg'),
    (make_cub, read_cub, 'image_class_labels.txt', 3, '3 x'),
    (make_cub, read_cub, 'bounding_boxes.txt', 3, '3 1 2 nan 4'),
    (make_sop, read_sop, 'Ebay_test.txt', 3, '1 2'),
    (make_sop, read_sop, 'Ebay_train.txt', 2, '1 one 1 a.jpg'),
    (make_isc, read_isc, 'Eval/list_eval_partition.txt', 3, 'img/a.jpg id_1 val')])
def test_annotation_errors_name_file_and_line(tmp_path, make, read, file, number, line):
    root = make(tmp_path)
    lines = (root / file).read_text().splitlines()
    lines[number - 1] = line
    (root / file).write_text('\n'.join(lines))
    with pytest.raises(UserError, match=rf'{file}:{number}: .*unpack the archive again$'):
        read(root)


def test_a_table_that_is_not_text_is_refused(tmp_path):
    root = make_cub(tmp_path)
    (root / 'images.txt').write_bytes(b'\xff\xfe')
    with pytest.raises(UserError, match='images.txt is not a UTF-8 text file'):
        read_cub(root)


def test_annotations_of_cars_that_are_not_matlab_are_refused(tmp_path):
    (tmp_path / 'cars_annos.mat').write_bytes(b'not MATLAB')
    with pytest.raises(UserError, match='cars_annos.mat is not the annotation file of CARS196 .*; download it again'):
        read_car(tmp_path)


def test_a_reader_that_cannot_start_does_not_blame_the_annotations(tmp_path):
    make_car(tmp_path)
    script = tmp_path / 'script.py'  # it runs again in the process that it starts
    script.write_text('from pathlib import Path\nfrom imagedata.raw_sets import read_car\n'
                      f'read_car(Path({str(tmp_path / "car")!r}))\n')
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False,
                            env={**os.environ, 'PYTHONPATH': str(REPOSITORY)})
    assert result.returncode == 1
    assert "if __name__ == '__main__'" in result.stderr  # Python's own advice
    assert 'download it again' not in result.stderr


@pytest.mark.parametrize('system', ['Windows', 'macOS'])
def test_annotations_of_cars_are_read_where_memory_cannot_be_limited(tmp_path, monkeypatch, system):
    file = make_car(tmp_path) / 'cars_annos.mat'

    def refuse(*_):
        raise ValueError('current limit exceeds maximum limit')

    if system == 'Windows':
        monkeypatch.setitem(sys.modules, 'resource', None)
    else:
        monkeypatch.setattr('resource.setrlimit', refuse)
    assert len(read_annotations(str(file))[0]) == 24


@pytest.mark.slow
def test_damaged_annotations_of_cars_are_refused(tmp_path):
    file = make_car(tmp_path) / 'cars_annos.mat'
    good = file.read_bytes()
    for position in np.random.default_rng(0).integers(200, len(good), 5):  # compressed: the reader fails in zlib
        data = bytearray(good)
        data[position] ^= 255
        file.write_bytes(data)
        with pytest.raises(UserError, match='cars_annos.mat is not the annotation file of CARS196'):
            read_car(file.parent)


# ---------------------------------------------------- names and folders --------------------------------------------
@pytest.mark.parametrize(('folder', 'name'), [
    ('cars196', 'car'), ('CUB_200_2011', 'cub'), ('Stanford_Online_Products', 'sop'), ('Inshop_Clothes', 'isc')])
def test_the_archives_own_folder_names_are_found(tmp_path, folder, name):
    (tmp_path / folder).mkdir()
    (tmp_path / 'other').mkdir()
    assert canonical_data_name(folder) == name
    assert find_root(tmp_path, name) == tmp_path / folder


def test_of_several_folders_the_one_that_holds_the_data_set_is_taken(tmp_path):
    (tmp_path / 'cub').mkdir()
    make_cub(tmp_path, 'CUB_200_2011')
    assert find_root(tmp_path, 'cub') == tmp_path / 'CUB_200_2011'
    make_cub(tmp_path)
    assert find_root(tmp_path, 'cub') == tmp_path / 'cub'


def test_a_folder_of_your_own_is_found_in_upper_and_lower_case(tmp_path):
    make_own(tmp_path, 'ab', folder='Flowers')
    assert find_root(tmp_path, 'flowers') == tmp_path / 'Flowers'
    make_own(tmp_path, 'ab', folder='flowers')
    assert find_root(tmp_path, 'flowers') == tmp_path / 'flowers'
    assert find_root(tmp_path, 'birds') is None


@pytest.mark.parametrize('name', ['../x', 'a/b', '.hidden'])
def test_a_data_name_is_a_plain_folder_name(name):
    with pytest.raises(UserError, match='--data_name .* is not a plain folder name'):
        canonical_data_name(name)


def test_a_data_path_that_is_not_a_folder_is_named(tmp_path):
    (tmp_path / 'file').touch()
    for name, problem in (('no', 'does not exist'), ('file', 'is not a folder')):
        with pytest.raises(UserError, match=f'--data_path {tmp_path / name} {problem}'):
            check_data_path(tmp_path / name)


def test_the_counts_are_those_of_the_papers():
    totals = {name: sum(images for _, images in raw_set.counts.values()) for name, raw_set in RAW_SETS.items()}
    assert totals == {'car': 16185, 'cub': 11788, 'sop': 120053, 'isc': 52712}


def test_images_of_a_split_are_listed_once():
    split = {'query': {'a': ['1', '2']}, 'gallery': {'a': ['2', '3']}, 'class_names': {'a': 'a'}}
    assert images_of(split) == ['1', '2', '3']
    assert count_images(split['query']) == 2
