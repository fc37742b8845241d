"""Conversion of the raw data sets in their true formats, folders of one's own, glyph, and the order of the batches."""
import os
import random
import shutil

import numpy as np
import pytest
import torch
from conftest import assert_one_line_error, type_command
from PIL import Image
from raw_trees import HEIGHT, WIDTH, make_car, make_cub, make_isc, make_sop, write_image
from torch.utils.data import DataLoader

import glyph
import raw_sets as raw
from data_utils import check_counts
from dataset import BatchSampler, ImageData, RetrievalDataset, make_transform, open_data
from engine.errors import UserError
from engine.files import lock
from engine.images import load_image
from metrics import retrieval_metrics


def split_of(data_path, name, crop_type='uncropped'):
    return torch.load(raw.find_root(data_path, name) / f'{crop_type}_data_dicts.pth', weights_only=True)


def shape_of(split):
    return {subset: {label: len(paths) for label, paths in split[subset].items()} for subset in split
            if subset != 'class_names'}


# ---------------------------------------------------- the four data sets ---------------------------------------------
def test_car_is_split_by_class_number(raw_sets):
    split = split_of(raw_sets, 'car')
    assert shape_of(split) == {'train': {'1': 4, '2': 4, '98': 4}, 'test': {'99': 4, '100': 4, '196': 4}}
    assert split['train']['1'][0] == 'uncropped/000001.jpg'
    assert split['class_names']['98'] == 'Maker Model 98'


def test_cub_is_split_by_class_number(raw_sets):
    split = split_of(raw_sets, 'cub')
    assert shape_of(split) == {'train': {'1': 4, '2': 4, '100': 4}, 'test': {'101': 4, '102': 4, '200': 4}}
    assert split['class_names']['101'] == '101.Some_Bird'


def test_sop_follows_its_lists_and_keeps_file_names_apart(raw_sets):
    split = split_of(raw_sets, 'sop')
    assert shape_of(split) == {'train': dict.fromkeys('123', 4), 'test': dict.fromkeys(('11319', '11320', '11321'), 4)}
    assert split['train']['1'][0] == 'uncropped/chair_final_111085122871_0.JPG'
    assert split['class_names']['1'] == 'chair 1'


def test_isc_has_queries_and_a_gallery(raw_sets):
    split = split_of(raw_sets, 'isc')
    items = {f'id_0000000{number}': 2 for number in (7, 8, 9)}
    assert shape_of(split) == {'train': {f'id_0000000{number}': 4 for number in (1, 2, 3)}, 'query': items,
                               'gallery': items}
    assert split['query']['id_00000007'][0] == 'uncropped/WOMEN_Dresses_id_00000007_01_1_front.jpg'


def test_rgb_images_are_linked_and_others_become_rgb_jpeg(raw_sets):
    source = raw_sets / 'cub/images/001.Some_Bird/Some_Bird_0001_1.jpg'
    assert os.path.samefile(source, raw_sets / 'cub/uncropped/Some_Bird_0001_1.jpg')
    with Image.open(raw_sets / 'cub/uncropped/Some_Bird_0001_0.jpg') as image:
        assert (image.mode, image.format) == ('RGB', 'JPEG')


def test_cropped_images_have_the_size_of_their_box(raw_sets):
    with Image.open(raw_sets / 'car/cropped/000001.jpg') as image:
        assert image.size == (40, 35)  # columns 3 to 42 and rows 2 to 36, counted from 1
        assert image.layer[0][1:3] == (1, 1)  # 4:4:4, no chroma subsampling
    with Image.open(raw_sets / 'cub/cropped/Some_Bird_0001_1.jpg') as image:
        assert image.size == (30, 36)  # x 4..34, y 3..38.5
    assert split_of(raw_sets, 'cub', 'cropped')['train']['1'][0] == 'cropped/Some_Bird_0001_0.jpg'


def test_a_second_run_decodes_what_changed_alone(tmp_path):
    root = make_cub(tmp_path)
    assert '24 decoded now' in type_command('data_utils.py', '--data_path', tmp_path).stdout
    stamp = (root / 'uncropped_data_dicts.pth').stat().st_mtime_ns
    assert ' 0 decoded now' in type_command('data_utils.py', '--data_path', tmp_path).stdout
    assert (root / 'uncropped_data_dicts.pth').stat().st_mtime_ns == stamp
    write_image(root / 'images/001.Some_Bird/Some_Bird_0001_2.jpg', 9, 9)
    assert ' 1 decoded now' in type_command('data_utils.py', '--data_path', tmp_path).stdout


@pytest.mark.parametrize(('make', 'folder', 'name'), [
    (make_car, 'cars196', 'car'), (make_cub, 'CUB_200_2011', 'cub'), (make_sop, 'Stanford_Online_Products', 'sop'),
    (make_isc, 'Inshop_Clothes', 'isc')])
def test_the_archives_own_folder_names_are_found(tmp_path, make, folder, name):
    make(tmp_path, folder)
    result = type_command('data_utils.py', '--data_path', tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count('not found; looked in') == 3
    assert open_data(tmp_path, name).root == tmp_path / folder


def test_counts_are_checked_against_the_complete_data_set():
    counts = raw.RAW_SETS['cub'].counts
    assert 'complete data set' in check_counts({'train': (100, 5864), 'test': (100, 5924)}, counts)
    assert '5,863 images instead of 100 and 5,864' in check_counts(
        {'train': (100, 5863), 'test': (100, 5924)}, counts)


# ---------------------------------------------------- what goes wrong ------------------------------------------------
def test_broken_and_missing_images_are_reported_together(tmp_path):
    root = make_cub(tmp_path)
    images = sorted(root.glob('images/*/*.jpg'))
    images[0].unlink()
    images[5].write_bytes(images[5].read_bytes()[:300])
    images[9].write_bytes(b'no image at all')
    result = type_command('data_utils.py', '--data_path', tmp_path, '--data_name', 'cub')
    assert_one_line_error(result, '3 of 24 images', images[0].name, images[5].name, images[9].name, '--skip_bad')
    assert not (root / 'uncropped_data_dicts.pth').exists()
    result = type_command('data_utils.py', '--data_path', tmp_path, '--data_name', 'cub', '--skip_bad')
    assert result.returncode == 0
    assert '3 broken or missing images left out' in result.stdout
    assert sum(shape_of(split_of(tmp_path, 'cub'))['train'].values()) == 9


def test_at_most_twenty_failures_are_named(tmp_path):
    root = make_car(tmp_path)
    shutil.rmtree(root / 'car_ims')
    result = type_command('data_utils.py', '--data_path', tmp_path)
    assert_one_line_error(result, '24 of 24 images', '000020.jpg', 'and 4 more')
    assert '000021.jpg' not in result.stderr


def test_annotation_errors_name_file_and_line(tmp_path):
    root = make_cub(tmp_path)
    (root / 'images.txt').write_text('1 a.jpg\n2\n')
    assert_one_line_error(type_command('data_utils.py', '--data_path', tmp_path, '--data_name', 'cub'), 'images.txt:2:')
    for name, line in (('image_class_labels.txt', '3 x'), ('bounding_boxes.txt', '3 1 2 nan 4'),
                       ('images.txt', '3 ..')):
        root = make_cub(tmp_path)
        lines = (root / name).read_text().splitlines()
        (root / name).write_text('\n'.join([*lines[:2], line, *lines[3:]]))
        result = type_command('data_utils.py', '--data_path', tmp_path, '--data_name', 'cub')
        assert_one_line_error(result, f'{name}:3:')
    root = make_sop(tmp_path)
    (root / 'Ebay_test.txt').write_text('image_id class_id super_class_id path\n1 2 3 a.jpg\n1 2\n')
    assert_one_line_error(type_command('data_utils.py', '--data_path', tmp_path, '--data_name', 'sop'),
                          'Ebay_test.txt:3:')
    root = make_car(tmp_path)
    data = bytearray((root / 'cars_annos.mat').read_bytes())
    data[len(data) // 2] ^= 255  # compressed, as the real one: the reader fails in zlib
    (root / 'cars_annos.mat').write_bytes(data)
    assert_one_line_error(type_command('data_utils.py', '--data_path', tmp_path, '--data_name', 'car'),
                          'cars_annos.mat', 'download it again')
    (root / 'cars_annos.mat').write_bytes(b'not MATLAB')
    assert_one_line_error(type_command('data_utils.py', '--data_path', tmp_path, '--data_name', 'car'),
                          'cars_annos.mat', 'download it again')


def test_a_folder_that_another_process_converts_is_left_alone(tmp_path):
    make_own(tmp_path)
    with lock(tmp_path / 'mine/.conversion.lock', ''):
        assert_one_line_error(convert_own(tmp_path), 'another process is converting', 'mine')
    assert not (tmp_path / 'mine/uncropped').exists()
    assert convert_own(tmp_path).returncode == 0
    assert not (tmp_path / 'mine/.conversion.lock').exists()


def test_missing_data_is_named(tmp_path):
    result = type_command('data_utils.py', '--data_path', tmp_path / 'no')
    assert_one_line_error(result, '--data_path', 'does not exist')
    assert_one_line_error(type_command('data_utils.py', '--data_path', tmp_path), 'no known raw data set')
    (tmp_path / 'flowers').mkdir()
    result = type_command('data_utils.py', '--data_path', tmp_path, '--data_name', 'flower')
    assert_one_line_error(result, "did you mean 'flowers'")
    (tmp_path / 'flowers').rename(tmp_path / 'FLOWERS')
    result = type_command('data_utils.py', '--data_path', tmp_path, '--data_name', 'FLOWRS')
    assert_one_line_error(result, "did you mean 'FLOWERS'")


def convert_own(tmp_path, *words):
    return type_command('data_utils.py', '--data_path', tmp_path, '--data_name', 'mine', *words)


def make_own(tmp_path, classes='abcdef'):
    for label in classes:
        for number in range(2):
            write_image(tmp_path / 'mine' / label / f'{number}.jpg', ord(label), number)
    return tmp_path / 'mine'


def test_originals_are_never_written_through_their_hard_links(tmp_path):
    root = make_own(tmp_path)
    assert convert_own(tmp_path).returncode == 0
    before = {path: path.read_bytes() for path in root.glob('[a-f]/*.jpg')}
    Image.new('P', (20, 20)).save(root / 'a/0.gif')  # sorts first and takes the name of the link to a/0.jpg
    assert convert_own(tmp_path).returncode == 0
    assert {path: path.read_bytes() for path in before} == before
    grey = tmp_path / 'grey.jpg'
    Image.new('L', (30, 30)).save(grey)
    (root / 'b/0.jpg').write_bytes(grey.read_bytes())  # in place: its link in uncropped/ changes with it
    assert convert_own(tmp_path).returncode == 0
    assert (root / 'b/0.jpg').read_bytes() == grey.read_bytes()


def test_a_new_split_of_the_same_images_is_written(tmp_path):
    make_own(tmp_path)
    tests = []
    for words in ((), ('--test_ratio', 0.2), ('--seed', 7, '--test_ratio', 0.5)):
        assert convert_own(tmp_path, *words, *(['--resplit'] if tests else [])).returncode == 0
        tests.append(set(split_of(tmp_path, 'mine')['test']))
    assert [len(labels) for labels in tests] == [3, 1, 3]
    assert tests[0] != tests[2]


def test_a_split_file_that_was_damaged_is_written_again(tmp_path):
    root = make_own(tmp_path)
    assert convert_own(tmp_path).returncode == 0
    (root / 'uncropped_data_dicts.pth').write_bytes(b'junk')
    (root / 'uncropped/a_0.jpg').unlink()
    result = convert_own(tmp_path)
    assert ' 1 decoded now' in result.stdout
    assert len(split_of(tmp_path, 'mine')['test']) == 3


@pytest.mark.parametrize('name', ['uncropped/a.jpg', 'conversion.json', 'uncropped_data_dicts.pth'])
def test_files_that_it_did_not_write_are_never_replaced(tmp_path, name):
    root = make_own(tmp_path)
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_text('{"mine": 1}')
    assert_one_line_error(convert_own(tmp_path), name.split('/')[0], 'did not write', 'move that away')
    assert (root / name).read_text() == '{"mine": 1}'


def test_glyph_made_anew_leaves_what_others_put_there(tmp_path):
    command = ('data_utils.py', '--data_path', tmp_path, '--data_name', 'glyph', '--glyph_images', 2)
    assert type_command(*command, '--glyph_classes', 6).returncode == 0
    write_image(tmp_path / 'glyph/train/mine/1.jpg', 1, 1)
    assert type_command(*command, '--glyph_classes', 9).returncode == 0
    assert (tmp_path / 'glyph/train/mine/1.jpg').is_file()
    assert len(split_of(tmp_path, 'glyph')['train']) == 7


def test_an_image_listed_twice_is_an_error(tmp_path):
    root = make_sop(tmp_path)
    lines = (root / 'Ebay_train.txt').read_text().splitlines()
    with (root / 'Ebay_test.txt').open('a') as file:
        file.write(lines[1])
    assert_one_line_error(type_command('data_utils.py', '--data_path', tmp_path), 'is listed twice')


def test_the_classification_split_of_cars_is_told_apart(tmp_path):
    write_image(tmp_path / 'car/train/Acura/1.jpg', 1, 1)
    result = type_command('data_utils.py', '--data_path', tmp_path, '--data_name', 'cars196')
    assert_one_line_error(result, 'cars_annos.mat', '8,144 / 8,041', '8,054 / 8,131')


@pytest.mark.parametrize(('words', 'line'), [
    (('glyph', '--glyph_classes', 0), '--glyph_classes 0'), (('glyph', '--glyph_images', 1), '--glyph_images 1'),
    (('mine', '--seed', 3), '--seed 3 has no effect'),
    (('mine', '--test_ratio', 0.3), '--test_ratio 0.3 has no effect')])
def test_numbers_that_cannot_be_and_a_deal_of_what_is_split_are_errors(tmp_path, words, line):
    for subset in ('train', 'test'):
        write_image(tmp_path / 'mine' / subset / 'a/0.jpg', 0, 0)
    assert_one_line_error(type_command('data_utils.py', '--data_path', tmp_path, '--data_name', *words), line)


@pytest.mark.parametrize('words', [('--test_ratio', 0.3), ('--glyph_classes', 5)])
def test_a_flag_without_effect_is_an_error(tmp_path, words):
    make_cub(tmp_path)
    result = type_command('data_utils.py', '--data_path', tmp_path, '--data_name', 'cub', *words)
    assert_one_line_error(result, f'{words[0]} {words[1]} has no effect')


# ---------------------------------------------------- one's own photographs ------------------------------------------
def test_a_folder_per_class_is_split_by_class(tmp_path):
    for label in range(6):
        for number in range(3):
            write_image(tmp_path / f'flowers/kind {label}/{number}.png', label, number)
    (tmp_path / 'flowers/kind 0/.DS_Store').write_bytes(b'x')
    command = ('data_utils.py', '--data_path', tmp_path, '--data_name', 'flowers', '--test_ratio', '0.33')
    assert type_command(*command).returncode == 0
    split = split_of(tmp_path, 'flowers')
    train, test = set(split['train']), set(split['test'])
    assert (len(train), len(test), train & test) == (4, 2, set())
    assert all(path.endswith('.png') for paths in split['train'].values() for path in paths)
    assert ' 0 decoded now' in type_command(*command).stdout  # and uncropped/ is no class


@pytest.mark.parametrize('subsets', [('train', 'test'), ('train', 'query', 'gallery')])
def test_folders_of_subsets_are_taken_as_they_are(tmp_path, subsets):
    for subset in subsets:
        for label in 'ab':
            write_image(tmp_path / 'mine' / subset / label / '1.jpg', 1, 1)
            write_image(tmp_path / 'mine' / subset / label / '1.png', 1, 2, 'RGBA')
    assert type_command('data_utils.py', '--data_path', tmp_path, '--data_name', 'mine').returncode == 0
    split = split_of(tmp_path, 'mine')
    assert shape_of(split) == {subset: {'a': 2, 'b': 2} for subset in subsets}
    paths = [path for subset in subsets for paths in split[subset].values() for path in paths]
    assert len(set(paths)) == len(paths) == len(os.listdir(tmp_path / 'mine/uncropped'))
    assert all((tmp_path / 'mine' / path).is_file() for path in paths)


def test_folder_names_of_subsets_may_be_capital_and_images_symbolic_links(tmp_path):
    write_image(tmp_path / 'store/x.jpg', 1, 1)
    for subset in ('Train', 'Test'):
        for label in 'ab':
            (tmp_path / 'mine' / subset / label).mkdir(parents=True)
            (tmp_path / 'mine' / subset / label / '1.jpg').symlink_to('../../../store/x.jpg')
    assert convert_own(tmp_path).returncode == 0
    split = split_of(tmp_path, 'mine')
    assert shape_of(split) == {'train': {'a': 1, 'b': 1}, 'test': {'a': 1, 'b': 1}}
    assert load_image(tmp_path / 'mine' / split['test']['a'][0]).size == (WIDTH, HEIGHT)


def test_16_bit_images_keep_their_greys(tmp_path):
    ramp = np.linspace(0, 65535, 256 * 4).astype(np.uint16).reshape(4, 256)
    Image.fromarray(ramp).save(tmp_path / 'ramp.png')
    grey = np.asarray(load_image(tmp_path / 'ramp.png'))[..., 0]
    np.testing.assert_allclose(grey, ramp / 257, atol=1)


def test_an_empty_subset_is_an_error(tmp_path):
    write_image(tmp_path / 'mine/train/a/1.jpg', 1, 1)
    (tmp_path / 'mine/test').mkdir()
    result = type_command('data_utils.py', '--data_path', tmp_path, '--data_name', 'mine')
    assert_one_line_error(result, 'no images in test')


def test_photographs_are_turned_upright(tmp_path):
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:, :15] = 255  # the left half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / 'photo.jpg', exif=exif)
    image = np.asarray(load_image(tmp_path / 'photo.jpg'))
    assert image.shape == (30, 20, 3)
    assert image[:10].mean() > 250
    assert image[20:].mean() < 5


# ---------------------------------------------------- glyph ----------------------------------------------------------
def test_glyph_is_the_same_bytes_for_the_same_seed(tmp_path):
    files = {}
    for name, seed in (('one', 3), ('two', 3), ('three', 4)):
        result = type_command('data_utils.py', '--data_path', tmp_path / name, '--data_name', 'glyph',
                              '--glyph_classes', 9, '--glyph_images', 2, '--seed', seed)
        assert result.returncode == 0, result.stderr
        assert 'train 6 classes 12 images, test 3 classes 6 images' in result.stdout
        root = tmp_path / name / 'glyph'
        files[name] = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob('*.png')}
    assert files['one'] == files['two']
    assert files['one'] != files['three']


def test_glyph_leaves_room_to_learn():
    """Nearest neighbours on raw pixels find the same character among 100 in less than 30 % of the cases."""
    characters = glyph.drawable_characters(300)[::3]
    images = [np.asarray(glyph.draw_glyph(*characters[label], random.Random(f'{label} {number}')), np.float32)
              for label in range(100) for number in range(20)]
    pixels = torch.from_numpy(np.stack(images)).flatten(1)
    features = torch.nn.functional.normalize(pixels - pixels.mean(1, keepdim=True), dim=-1)
    assert retrieval_metrics(features, torch.arange(100).repeat_interleave(20), recalls=(1,))['R@1'] < 30


def test_glyph_has_hundreds_of_characters_that_differ():
    characters = glyph.drawable_characters(900)
    assert len({character for character, _ in characters}) == 900
    assert all(len(faces) >= 3 for _, faces in characters)
    lookalikes = {'A', '\u0391', '\u0410'}  # Latin, Greek, Cyrillic
    assert len(lookalikes & {character for character, _ in characters}) == 1
    with pytest.raises(UserError, match='they have'):
        glyph.drawable_characters(10**5)


# ---------------------------------------------------- batches --------------------------------------------------------
def make_set(raw_sets, epoch):
    dataset = RetrievalDataset(open_data(raw_sets, 'car'), 'train', make_transform(True, 16), seed=5)
    sampler = BatchSampler(dataset.labels, 4, seed=5)
    dataset.set_epoch(epoch)
    sampler.set_epoch(epoch)
    return dataset, sampler


def epoch_of(raw_sets, epoch, num_workers):
    dataset, sampler = make_set(raw_sets, epoch)
    return [(images.clone(), labels.clone())
            for images, labels in DataLoader(dataset, batch_sampler=sampler, num_workers=num_workers)]


def test_batches_are_the_same_with_and_without_workers(raw_sets):
    for (images, labels), (other_images, other_labels) in zip(epoch_of(raw_sets, 2, 0), epoch_of(raw_sets, 2, 4),
                                                              strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


def test_each_epoch_has_its_own_order_and_augmentation(raw_sets):
    order = {epoch: [index for batch in make_set(raw_sets, epoch)[1] for index in batch] for epoch in (1, 2)}
    assert order[1] != order[2]
    assert sorted(order[1]) == sorted(order[2]) == list(range(12))
    images = {epoch: make_set(raw_sets, epoch)[0][3][0] for epoch in (1, 2)}
    assert not torch.equal(images[1], images[2])


def test_workers_that_live_on_see_the_new_epoch(raw_sets):
    dataset, sampler = make_set(raw_sets, 1)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=2, persistent_workers=True)
    for epoch in (1, 2):
        dataset.set_epoch(epoch)
        sampler.set_epoch(epoch)
        for (images, _), (expected, _) in zip(loader, epoch_of(raw_sets, epoch, 0), strict=True):
            assert torch.equal(images, expected)


def test_augmentation_leaves_the_global_generator_alone(raw_sets):
    dataset, _ = make_set(raw_sets, 1)
    torch.manual_seed(9)
    expected = torch.rand(1)
    torch.manual_seed(9)
    dataset[0]
    assert torch.rand(1) == expected


def test_balanced_batches_hold_k_images_of_each_class():
    labels = [0] * 5 + [1] * 3 + [2] * 7 + [3] * 4
    sampler = BatchSampler(labels, 9, images_per_class=3, seed=1)
    assert len(sampler) == 19 // 9
    for batch in sampler:
        drawn = [labels[index] for index in batch]
        assert sorted(drawn.count(label) for label in set(drawn)) == [3, 3, 3]
        assert len(set(batch)) == 9  # no class has fewer than 3, so nothing is drawn twice
    batch = next(iter(BatchSampler([0, 1, 1, 1, 1], 4, images_per_class=2)))
    assert batch.count(0) == 2  # class 0 has one image


@pytest.mark.parametrize(('drop_last', 'sizes'), [(False, [4, 4, 3]), (True, [4, 4])])
def test_the_last_batch_is_kept_or_dropped(drop_last, sizes):
    assert [len(batch) for batch in BatchSampler([0] * 11, 4, drop_last=drop_last)] == sizes


@pytest.mark.parametrize(('batch_size', 'images_per_class', 'message'), [
    (10, 4, 'must be a multiple of --images_per_class 4'), (21, 0, 'the 20 training images'),
    (18, 3, 'needs 6 classes')])
def test_a_batch_that_does_not_fit_is_an_error(batch_size, images_per_class, message):
    with pytest.raises(UserError, match=message):
        BatchSampler([index % 5 for index in range(20)], batch_size, images_per_class)


def test_test_images_are_resized_and_centre_cropped():
    image = Image.new('RGB', (WIDTH, HEIGHT))
    image.putpixel((WIDTH // 2, HEIGHT // 2), (255, 0, 0))
    tensor = make_transform(False, 35, HEIGHT)(image)
    assert tensor.shape == (3, 35, 35)
    assert tensor.dtype == torch.uint8
    assert tensor[0].nonzero().tolist() == [[18, 18]]  # cut from row 2 = (40 - 35) / 2 and column 6
    assert make_transform(False, 224)(image).shape == (3, 224, 224)
    whole = make_transform(False, 35, 0)(image)  # PIL's own resize, which knows no crop
    assert whole.permute(1, 2, 0).tolist() == np.asarray(image.resize((35, 35), Image.BILINEAR)).tolist()


def test_a_missing_image_at_training_time_is_named(raw_sets):
    data = ImageData(raw_sets / 'car', {'test': {'1': ['uncropped/gone.jpg']}, 'class_names': {}})
    dataset = RetrievalDataset(data, 'test', make_transform(False, 16))
    with pytest.raises(UserError, match='gone.jpg is missing or broken'):
        dataset[0]
