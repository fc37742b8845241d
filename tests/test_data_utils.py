"""data_utils.py: what a conversion writes, keeps, removes and refuses."""
import errno
import importlib.util
import json
import shutil
import unicodedata

import data_utils
import numpy as np
import pytest
import torch
from data_utils import compare_counts, convert, remove_orphans, unique_stems
from PIL import Image, features
from raw_trees import HEIGHT, WIDTH, make_car, make_cub, make_isc, make_own, make_own_split, make_sop, write_image

from common.errors import UserError
from common.files import lock
from common.images import load_image
from imagedata.folders import split_classes
from imagedata.loading import open_data
from imagedata.raw_sets import RAW_SETS, RawImage, find_root, images_of, read_cub
from utils import run_script


@pytest.fixture
def run(call_script, tmp_path):
    """Run data_utils.py on the folder of a test with more words; returns what it printed."""
    def call(*words):
        return call_script(data_utils, '--data_path', tmp_path, *words)
    return call


@pytest.fixture
def run_own(run):
    """Run data_utils.py on the data set `mine`."""
    return lambda *words: run('--data_name', 'mine', *words)


def split_of(data_path, name='mine', crop_type='uncropped'):
    return torch.load(find_root(data_path, name) / f'{crop_type}_data_dicts.pth', weights_only=True)


def sides_of(data_path):
    split = split_of(data_path)
    return {label: side for side in ('train', 'test') for label in split[side]}


def count_classes(split):
    return {subset: {label: len(paths) for label, paths in split[subset].items()} for subset in split
            if subset != 'class_names'}


# ---------------------------------------------------- what it writes -----------------------------------------------
@pytest.fixture(scope='module')
def cub(tmp_path_factory):
    """A converted CUB-200-2011."""
    root = make_cub(tmp_path_factory.mktemp('data'), images=2)
    convert(root, *read_cub(root))
    return root


def test_a_split_file_holds_paths_by_subset_and_label(cub):
    split = split_of(cub.parent, 'cub')
    assert count_classes(split) == {'train': {'1': 2, '2': 2, '100': 2}, 'test': {'101': 2, '102': 2, '200': 2}}
    assert split['train']['1'] == ['uncropped/Some_Bird_0001_0.jpg', 'uncropped/Some_Bird_0001_1.jpg']
    assert split['class_names']['101'] == '101.Some_Bird'
    assert split_of(cub.parent, 'cub', 'cropped')['train']['1'][0] == 'cropped/Some_Bird_0001_0.jpg'


def test_rgb_images_are_linked_and_others_become_rgb_jpeg(cub):
    assert (cub / 'images/001.Some_Bird/Some_Bird_0001_1.jpg').samefile(cub / 'uncropped/Some_Bird_0001_1.jpg')
    with Image.open(cub / 'uncropped/Some_Bird_0001_0.jpg') as image:
        assert (image.mode, image.format) == ('RGB', 'JPEG')


def test_cropped_images_have_the_size_of_their_box(cub):
    with Image.open(cub / 'cropped/Some_Bird_0001_1.jpg') as image:
        assert image.size == (30, 36)  # x 4 to 34, y 3 to 38.5
        assert image.layer[0][1:3] == (1, 1)  # 4:4:4, no chroma subsampling


def test_a_box_that_leaves_the_image_is_cut_to_it(tmp_path):
    images = []
    for subset, box in (('train', (-5, -5, 9, 11)), ('test', (WIDTH + 3, HEIGHT + 3, WIDTH + 9, HEIGHT + 9))):
        write_image(tmp_path / f'{subset}.jpg', 1, 1)
        images.append(RawImage(f'{subset}.jpg', subset, subset, subset, box))
    convert(tmp_path, images, {})
    assert load_image(tmp_path / 'cropped/train.jpg').size == (9, 11)
    assert load_image(tmp_path / 'cropped/test.jpg').size == (1, 1)


def test_a_box_longer_than_a_jpeg_file_can_be_is_reduced(tmp_path):
    images = []
    for subset in ('train', 'test'):
        Image.new('RGBA', (30, 66_000), (200, 10, 10, 128)).save(tmp_path / f'{subset}.png')
        images.append(RawImage(f'{subset}.png', subset, subset, subset, (0, 0, 30, 66_000)))
    convert(tmp_path, images, {})
    assert load_image(tmp_path / 'cropped/train.jpg').size == (30, 65_500)
    assert load_image(tmp_path / 'uncropped/train.png').size == (30, 66_000)


def test_a_full_disk_is_one_line(run_own, tmp_path, monkeypatch):
    Image.new('L', (30, 30)).save(make_own(tmp_path / 'raw') / 'a/grey.png')

    def fill_up(*_, **__):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(Image.Image, 'save', fill_up)
    with pytest.raises(UserError, match=r'/raw/mine/a/grey.png cannot be converted to .*/mine \(No space left on '):
        run_own('--raw_path', tmp_path / 'raw')


def test_a_data_set_may_be_named_with_a_narrow_space(call_script, tmp_path):
    name = 'birds 3\u202fPM\u00a0'
    make_own(tmp_path, folder=name)
    assert 'train 3 classes 6 images' in call_script(data_utils, '--data_path', tmp_path, '--data_name', name)


@pytest.mark.parametrize('orientation', range(1, 9))
def test_a_box_holds_for_the_pixels_before_the_rotation(tmp_path, orientation):
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[3:11, 24:40] = 255  # the object, 16 x 8
    exif = Image.Exif()
    exif[0x0112] = orientation
    images = [RawImage(f'{subset}.jpg', subset, subset, subset, (24, 3, 40, 11)) for subset in ('train', 'test')]
    for image in images:
        Image.fromarray(pixels).save(tmp_path / image.source, exif=exif)
    convert(tmp_path, images, {})
    cropped = load_image(tmp_path / 'cropped/train.jpg')
    assert cropped.size == ((16, 8) if orientation <= 4 else (8, 16))
    assert np.asarray(cropped).min() > 240
    assert load_image(tmp_path / 'uncropped/train.jpg').size == ((WIDTH, HEIGHT) if orientation <= 4 else
                                                                 (HEIGHT, WIDTH))


def test_file_names_that_repeat_get_a_number():
    images = [RawImage('', 'train', '', stem) for stem in ('a', 'A', 'a_2', 'b', 'a')]
    assert unique_stems(images) == ['a', 'A_2', 'a_2_2', 'b', 'a_3']


def test_images_are_copied_where_the_file_system_has_no_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError

    monkeypatch.setattr('os.link', refuse)
    root = make_own_split(tmp_path, {'train': 'a', 'test': 'b'})
    convert(root, [RawImage(f'{subset}/{label}/0.jpg', subset, label, label)
                   for subset, label in (('train', 'a'), ('test', 'b'))], {})
    assert (root / 'uncropped/a.jpg').read_bytes() == (root / 'train/a/0.jpg').read_bytes()
    assert not (root / 'uncropped/a.jpg').samefile(root / 'train/a/0.jpg')


def test_every_known_raw_set_in_a_folder_is_converted(run, tmp_path):
    for make, folder in ((make_cub, 'CUB_200_2011'), (make_sop, 'sop'), (make_isc, 'Inshop_Clothes')):
        make(tmp_path, folder, images=2)
    printed = run()
    assert 'cub: train 3 classes 6 images, test 3 classes 6 images; 12 decoded now' in printed
    assert 'isc: train 3 classes 6 images, query 3 classes 3 images, gallery 3 classes 3 images' in printed
    assert 'car: not found; looked in' in printed
    assert split_of(tmp_path, 'sop')['train']['1'][0] == 'uncropped/chair_final_111085122871_0.JPG'
    assert list(split_of(tmp_path, 'isc')) == ['train', 'query', 'gallery', 'class_names']


def test_counts_are_compared_with_the_complete_data_set():
    counts = RAW_SETS['cub'].counts
    assert compare_counts(counts, counts) == 'the counts are those of the complete data set'
    assert 'train has 100 classes and 5,863 images instead of 100 and 5,864. Results' in compare_counts(
        {**counts, 'train': (100, 5863)}, counts)
    assert 'test has 0 classes and 0 images' in compare_counts({'train': counts['train']}, counts)


def test_a_cache_is_built_of_each_crop_type(cub, call_script):
    printed = call_script(data_utils, '--data_path', cub.parent, '--data_name', 'cub', '--cache_size', 16)
    for crop_type in ('uncropped', 'cropped'):
        assert f'cub: cache of 12 {crop_type} images' in printed
        assert (cub / f'{crop_type}_cache_16.bin').is_file()


def test_glyph_is_drawn_and_converted(run, tmp_path):
    printed = run('--data_name', 'glyph', '--glyph_classes', 6, '--glyph_images', 2, '--seed', 3)
    assert 'glyph: train 4 classes 8 images, test 2 classes 4 images; 12 decoded now' in printed
    assert json.loads((tmp_path / 'glyph/glyph.json').read_text())['seed'] == 3


@pytest.mark.parametrize('make', [make_own, make_cub])
def test_a_data_set_that_is_only_read_is_converted_elsewhere(call_script, tmp_path, make):
    (tmp_path / 'raw').mkdir()
    raw = make(tmp_path / 'raw')
    before = sorted(path for path in tmp_path.glob('raw/**/*'))
    words = ('--raw_path', raw.parent, '--data_path', tmp_path / 'new', '--data_name', raw.name, '--cache_size', 16)
    assert f'{raw.name}: train 3 classes' in call_script(data_utils, *words)
    assert sorted(path for path in tmp_path.glob('raw/**/*')) == before
    data = open_data(tmp_path / 'new', raw.name, cache_size=16)
    assert len(images_of(data.split)) == len(data.cache.entries) == len([path for path in before if path.is_file()
                                                                       and path.suffix == '.jpg'])
    assert all((tmp_path / 'new' / raw.name / path).is_file() for path in images_of(data.split))
    assert ' 0 decoded now' in call_script(data_utils, *words)


def test_a_data_set_that_cannot_be_written_to_names_the_flag(run_own, tmp_path, monkeypatch):
    make_own(tmp_path)

    def refuse(*_, **__):
        raise OSError(30, 'Read-only file system')

    monkeypatch.setattr('tempfile.TemporaryFile', refuse)
    with pytest.raises(UserError, match=r'--data_path .*mine cannot be written to \(Read-only file system\); choose '
                       'another folder, and name that of the raw images with --raw_path'):
        run_own()


def test_raw_path_is_a_folder_and_not_for_glyph(call_script, tmp_path):
    with pytest.raises(UserError, match='--raw_path .*missing does not exist'):
        call_script(data_utils, '--raw_path', tmp_path / 'missing', '--data_path', tmp_path)
    with pytest.raises(UserError, match='--raw_path x has no effect: glyph is drawn'):
        call_script(data_utils, '--raw_path', 'x', '--data_path', tmp_path, '--data_name', 'glyph')


# ---------------------------------------------------- converting again ---------------------------------------------
def test_a_second_run_decodes_only_what_changed(run_own, tmp_path):
    root = make_own(tmp_path)
    assert '12 decoded now' in run_own()
    stamp = (root / 'uncropped_data_dicts.pth').stat().st_mtime_ns
    assert ' 0 decoded now' in run_own()
    assert (root / 'uncropped_data_dicts.pth').stat().st_mtime_ns == stamp
    write_image(root / 'a/1.jpg', 9, 9)
    assert ' 1 decoded now' in run_own()


def test_originals_are_never_overwritten_through_their_hard_links(run_own, tmp_path):
    root = make_own(tmp_path)
    run_own()
    before = {path: path.read_bytes() for path in root.glob('[a-f]/*.jpg')}
    Image.new('P', (20, 20)).save(root / 'a/0.gif')  # sorts first and takes the name of the link to a/0.jpg
    run_own()
    assert {path: path.read_bytes() for path in before} == before
    grey = tmp_path / 'grey.jpg'
    Image.new('L', (30, 30)).save(grey)
    (root / 'b/0.jpg').write_bytes(grey.read_bytes())  # in place: its link in uncropped/ changes with it
    run_own()
    assert (root / 'b/0.jpg').read_bytes() == grey.read_bytes()


def test_a_split_file_that_was_damaged_is_written_again(run_own, tmp_path):
    root = make_own(tmp_path)
    run_own()
    before = split_of(tmp_path)
    (root / 'uncropped_data_dicts.pth').write_bytes(b'junk')
    (root / 'uncropped/a_0.jpg').unlink()
    assert ' 1 decoded now' in run_own()
    assert split_of(tmp_path) == before


def test_a_conversion_that_was_interrupted_goes_on(run_own, tmp_path, monkeypatch):
    root = make_own(tmp_path)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(data_utils, 'remove_orphans', interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_own()
    assert len(list((root / 'uncropped').iterdir())) == 12
    assert '12 decoded now' in run_own()


def test_a_photograph_that_is_gone_is_kept_nowhere(run_own, tmp_path):
    root = make_own(tmp_path)
    run_own('--cache_size', 16)
    (root / 'a/1.jpg').unlink()
    printed = run_own()
    assert '1 that are gone from the folder removed' in printed
    assert 'removed the cache uncropped_cache_16, which held images that are gone or have changed' in printed
    assert not list(root.glob('uncropped_cache_*'))
    assert not (root / 'uncropped/a_1.jpg').exists()
    assert 'a_1' not in str(split_of(tmp_path))
    assert 'a/1.jpg' not in (root / 'conversion.json').read_text()


def test_a_photograph_that_was_replaced_leaves_no_cache_of_the_old_one(run_own, tmp_path):
    root = make_own(tmp_path)
    run_own('--cache_size', 16)
    write_image(root / 'a/1.jpg', 9, 9)
    run_own()
    assert not list(root.glob('uncropped_cache_*'))


def test_new_photographs_and_another_split_leave_the_cache(run_own, tmp_path):
    root = make_own(tmp_path)
    run_own('--cache_size', 16)
    make_own(tmp_path, 'gh')
    run_own('--resplit', '--seed', 3)
    assert len(list(root.glob('uncropped_cache_*'))) == 2


def test_a_broken_photograph_that_is_skipped_loses_its_copy(run_own, tmp_path):
    root = make_own(tmp_path)
    run_own()
    (root / 'a/1.jpg').unlink()
    (root / 'a/1.jpg').write_bytes(b'broken')
    assert '1 broken or missing images left out' in run_own('--skip_bad')
    assert not (root / 'uncropped/a_1.jpg').exists()
    assert (root / 'a/1.jpg').read_bytes() == b'broken'


def test_files_that_belong_to_no_photograph_are_removed(run_own, tmp_path):
    root = make_own(tmp_path)
    Image.new('RGB', (30, 30), 'red').save(root / 'a/face.png')
    run_own()
    Image.new('L', (30, 30)).save(root / 'a/face.png')  # anonymised: its copy is now face.jpg
    (root / 'uncropped/left.png').write_bytes(b'of a conversion that was killed')
    (root / 'uncropped/kept').mkdir()
    (root / 'my_uncropped_cache_1.pth').write_bytes(b'of somebody else')
    assert 'removed 1 files from uncropped/ that belong to no photograph' in run_own()
    assert {path.name for path in (root / 'uncropped').iterdir() if path.name[1] != '_'} == {'kept'}
    assert (root / 'uncropped/a_face.jpg').exists()
    assert not (root / 'uncropped/a_face.png').exists()
    assert (root / 'my_uncropped_cache_1.pth').exists()


def test_orphans_of_the_last_conversion_are_removed_without_a_word(tmp_path, capsys):
    (tmp_path / 'uncropped').mkdir()
    (tmp_path / 'uncropped/a.jpg').touch()
    entry = data_utils.Entry('a.jpg', 0, 'a', None, 'train', 'a', 'a', 0, 0)
    remove_orphans(tmp_path, ['uncropped'], {}, {'a': entry})
    assert not (tmp_path / 'uncropped/a.jpg').exists()
    assert capsys.readouterr().out == ''


def test_when_all_photographs_go_their_copies_go(run_own, tmp_path):
    root = make_own(tmp_path)
    run_own()
    for label in 'abcdef':
        shutil.rmtree(root / label)
    with pytest.raises(UserError, match='no images in train'):
        run_own()
    assert not list((root / 'uncropped').iterdir())
    assert not (root / 'uncropped_data_dicts.pth').exists()


# ---------------------------------------------------- class split --------------------------------------------------
def test_a_class_keeps_its_side_when_others_come_and_go(run_own, tmp_path):
    root = make_own(tmp_path, 'abcdefghij')
    run_own('--test_ratio', 0.3)
    before = sides_of(tmp_path)
    assert list(before.values()).count('test') == 3
    make_own(tmp_path, 'klmnopqrst')
    for words in ((), ('--test_ratio', 0.3)):  # the ratio is remembered
        run_own(*words)
        after = sides_of(tmp_path)
        assert {label: after[label] for label in before} == before
        assert list(after.values()).count('test') == 6
    gone = next(label for label, side in before.items() if side == 'test')
    shutil.rmtree(root / gone)
    run_own()
    make_own(tmp_path, gone)
    run_own()
    assert sides_of(tmp_path)[gone] == 'test'


def test_another_ratio_or_seed_is_refused_and_changes_nothing(run_own, tmp_path):
    make_own(tmp_path)
    run_own('--test_ratio', 0.34)
    before = sides_of(tmp_path)
    for flag, value in (('--test_ratio', 0.5), ('--seed', 5)):
        with pytest.raises(UserError, match=f'{flag} {value}: .* --resplit'):
            run_own(flag, value)
    assert sides_of(tmp_path) == before


def test_resplit_says_how_many_classes_changed_sides(run_own, tmp_path):
    make_own(tmp_path, 'abcdefghij')
    run_own('--test_ratio', 0.3)
    before = sides_of(tmp_path)
    printed = run_own('--test_ratio', 0.5, '--seed', 5, '--resplit')
    after = sides_of(tmp_path)
    changed = sum(before[label] != side for label, side in after.items())
    assert changed > 0
    assert list(after.values()).count('test') == 5
    assert f'{changed} of 10 classes changed sides: models trained before have seen test classes' in printed


def test_resplit_keeps_ratio_and_seed_unless_others_are_given(run_own, tmp_path):
    make_own(tmp_path, 'abcdefgh')
    run_own('--test_ratio', 0.25)
    before = sides_of(tmp_path)
    assert '0 of 8 classes changed sides\n' in run_own('--resplit')
    assert sides_of(tmp_path) == before


def test_a_resplit_that_fails_changes_no_side(run_own, tmp_path):
    root = make_own(tmp_path)
    run_own()
    before = sides_of(tmp_path)
    seed = next(seed for seed in range(1, 50) if split_classes(list('abcdef'), {}, 0.5, seed) != before)
    (root / 'a/broken.jpg').touch()
    with pytest.raises(UserError, match='1 of 13 images are broken or missing'):
        run_own('--resplit', '--seed', seed)
    (root / 'a/broken.jpg').unlink()
    run_own()
    assert sides_of(tmp_path) == before
    run_own('--resplit', '--seed', seed)
    assert sides_of(tmp_path) == split_classes(list('abcdef'), {}, 0.5, seed)


def test_a_renamed_class_keeps_its_side(run_own, tmp_path):
    root = make_own(tmp_path)
    run_own()
    before = sides_of(tmp_path)
    for label in before:
        (root / label).rename(root / f'{label}_new')
    assert 'a_new holds the photographs of a, which is gone, and keeps its side' in run_own()
    assert sides_of(tmp_path) == {f'{label}_new': side for label, side in before.items()}


# ---------------------------------------------------- your own photographs -----------------------------------------
def test_what_is_left_out_is_counted_and_named(run_own, tmp_path):
    root = make_own(tmp_path)
    for name in ('one.xyz', 'two.xyz', 'notes.txt', 'README'):
        (root / 'b' / name).touch()
    (root / 'empty').mkdir()
    write_image(root / 'loose.jpg', 1, 1)
    printed = run_own()
    assert 'mine: left out: 1 .txt, 2 .xyz, 1 images beside the class folders, 1 without ending\n' in printed
    assert 'mine: 1 class folders hold no image, the first: empty' in printed


def test_what_is_excluded_is_not_converted(run_own, tmp_path):
    root = make_own(tmp_path)
    write_image(root / 'a/small/0.jpg', 1, 1)
    write_image(root / 'a/@eaDir/0.jpg', 1, 1)
    printed = run_own('--exclude', 'small', 'nothing')
    assert '12 decoded now' in printed
    assert 'mine: left out: 1 excluded by small, 1 folders of thumbnails (@eaDir)\n' in printed


def test_every_format_that_can_be_read_is_converted(run_own, tmp_path):
    root = make_own(tmp_path)
    picture = Image.new('RGB', (40, 40), 'red')
    formats = {'jfif': 'JPEG', 'jpe': 'JPEG', 'jp2': 'JPEG2000', 'webp': 'WEBP', 'TIF': 'TIFF', 'bmp': 'BMP'}
    if features.check('avif'):
        formats['avif'] = 'AVIF'
    for suffix, name in formats.items():
        picture.save(root / f'a/photo.{suffix}', name)
    assert f'{12 + len(formats)} decoded now' in run_own()
    paths = [path for side in ('train', 'test') for path in split_of(tmp_path)[side].get('a', [])]
    assert len(paths) == 2 + len(formats)
    assert all(load_image(root / path).mode == 'RGB' for path in paths)


def test_heic_is_read_with_its_package_and_named_without(run_own, tmp_path):
    root = make_own(tmp_path)
    (root / 'a/photo.heic').touch()
    if importlib.util.find_spec('pillow_heif') is None:
        assert 'left out: 1 .heic (pip install pillow-heif)' in run_own()
        return
    import pillow_heif

    pillow_heif.from_pillow(Image.new('RGB', (40, 40), 'red')).save(root / 'a/photo.heic')
    assert '13 decoded now' in run_own()


def test_odd_names_are_converted(run_own, tmp_path):
    make_own(tmp_path, 'ab')
    for number, label in enumerate((unicodedata.normalize('NFD', 'Käfer'), '\\frac', 'L' * 200, 'with space')):
        write_image(tmp_path / 'mine' / label / ('f' * 60 + ' .jpg'), 9, number)
    run_own()
    split = split_of(tmp_path)
    assert set(sides_of(tmp_path)) == {'a', 'b', unicodedata.normalize('NFC', 'Käfer'), '\\frac', 'L' * 200,
                                       'with space'}
    paths = [path for side in ('train', 'test') for paths in split[side].values() for path in paths]
    assert all((tmp_path / 'mine' / path).is_file() for path in paths)


def test_subset_folders_with_links_to_images_are_converted(run_own, tmp_path):
    for number, (subset, label) in enumerate((subset, label) for subset in ('Train', 'Test') for label in 'ab'):
        write_image(tmp_path / f'store/{number}.jpg', 1, number)
        (tmp_path / 'mine' / subset / label).mkdir(parents=True)
        (tmp_path / 'mine' / subset / label / '1.jpg').symlink_to(f'../../../store/{number}.jpg')
    assert '2 classes are in training and test: results on them say nothing about unseen classes' in run_own()
    split = split_of(tmp_path)
    assert count_classes(split) == {'train': {'a': 1, 'b': 1}, 'test': {'a': 1, 'b': 1}}
    assert split['train']['a'] != split['test']['a']
    assert load_image(tmp_path / 'mine' / split['test']['a'][0]).size == (WIDTH, HEIGHT)


@pytest.fixture
def with_copies(tmp_path):
    """A data set `mine` of train/ and test/; two test images are copies of training images, one only of equal size."""
    root = make_own_split(tmp_path, {'train': 'ab', 'test': 'cd'})
    shutil.copy(root / 'train/a/0.jpg', root / 'test/c/copy.jpg')
    shutil.copy(root / 'train/b/1.jpg', root / 'test/d/0.jpg')
    shutil.copy(root / 'train/a/0.jpg', root / 'train/a/again.jpg')  # on the same side
    other = bytearray((root / 'train/a/0.jpg').read_bytes())
    other[15] ^= 1  # the density in its header, which changes no pixel
    (root / 'test/c/other.jpg').write_bytes(bytes(other))
    return root


def test_photographs_of_both_sides_are_counted(run_own, with_copies):
    printed = run_own()
    assert ('warning: mine: 2 photographs are byte for byte equal to one of another side, the first: test/c/copy.jpg '
            'and train/a/0.jpg;' in printed)
    assert '--skip_duplicates leaves them out' in printed
    assert 'test 2 classes 6 images' in printed


def test_photographs_of_both_sides_are_left_out_of_the_second(run_own, tmp_path, with_copies):
    printed = run_own('--skip_duplicates')
    assert 'mine: 2 photographs are byte for byte equal' in printed
    assert 'warning' not in printed
    assert count_classes(split_of(tmp_path)) == {'train': {'a': 3, 'b': 2}, 'test': {'c': 3, 'd': 1}}


def test_a_query_in_the_gallery_is_counted_too(run_own, tmp_path):
    root = make_own_split(tmp_path, {'train': 'ab', 'query': 'c', 'gallery': 'de'})
    shutil.copy(root / 'query/c/0.jpg', root / 'gallery/d/copy.jpg')
    assert '1 photographs are byte for byte equal to one of another side, the first: gallery/d/copy.jpg' in run_own()


def test_no_photographs_of_both_sides_are_not_mentioned(run_own, tmp_path):
    root = make_own(tmp_path)
    (root / 'a/gone.jpg').symlink_to('nothing.jpg')
    assert 'byte for byte' not in run_own()


# ---------------------------------------------------- what goes wrong ----------------------------------------------
def test_broken_and_missing_images_are_reported_together(run, tmp_path):
    root = make_cub(tmp_path)
    images = sorted(root.glob('images/*/*.jpg'))
    images[0].unlink()
    images[5].write_bytes(images[5].read_bytes()[:300])
    images[9].write_bytes(b'no image at all')
    with pytest.raises(UserError, match='3 of 24 images .*--skip_bad') as error:
        run('--data_name', 'cub')
    assert all(images[index].name in str(error.value) for index in (0, 5, 9))
    assert not (root / 'uncropped_data_dicts.pth').exists()
    assert '3 broken or missing images left out' in run('--data_name', 'cub', '--skip_bad')
    assert sum(count_classes(split_of(tmp_path, 'cub'))['train'].values()) == 9


def test_what_cannot_be_reached_keeps_its_copy_and_the_caches(tmp_path, call_script):
    raw, out = tmp_path / 'raw', tmp_path / 'out'
    make_cub(raw)
    words = ('--raw_path', raw, '--data_path', out, '--data_name', 'cub')
    call_script(data_utils, *words, '--cache_size', 16)
    before = {path: path.read_bytes() for path in out.rglob('*') if path.is_file()}
    (raw / 'cub/images').rename(raw / 'away')  # as when a disk is not mounted
    with pytest.raises(UserError, match='24 of 24 images are broken or missing'):
        call_script(data_utils, *words)
    assert {path: path.read_bytes() for path in out.rglob('*') if path.is_file()} == before
    (raw / 'away').rename(raw / 'cub/images')
    assert ' 0 decoded now' in call_script(data_utils, *words)


def test_what_a_failed_conversion_decoded_is_in_the_split_of_the_next(run, tmp_path):
    broken, *_, repaired = sorted(make_cub(tmp_path).glob('images/*/*.jpg'))
    sound = repaired.read_bytes()
    for file in (repaired, broken):
        file.write_bytes(b'broken')
    run('--data_name', 'cub', '--skip_bad')
    repaired.write_bytes(sound)
    with pytest.raises(UserError, match='1 of 24 images are broken or missing'):
        run('--data_name', 'cub')
    run('--data_name', 'cub', '--skip_bad')
    assert sum(map(len, split_of(tmp_path, 'cub')['test'].values())) == 12


def test_an_image_that_fills_the_memory_is_broken_like_others(run_own, tmp_path, monkeypatch):
    root = make_own(tmp_path)
    Image.new('L', (333, 5)).save(root / 'a/large.png')
    save = Image.Image.save

    def fail(image, *args, **kwargs):
        if image.width == 333:
            raise MemoryError
        save(image, *args, **kwargs)

    monkeypatch.setattr(Image.Image, 'save', fail)
    with pytest.raises(UserError, match=r'1 of 13 images are broken or missing: a/large.png \(MemoryError\)'):
        run_own()


def test_a_gif_whose_comment_is_too_long_for_jpeg_is_read(run_own, tmp_path):
    root = make_own(tmp_path)
    Image.new('P', (30, 30)).save(root / 'a/comment.gif', comment=bytes(70_000))
    run_own()
    assert (root / 'uncropped/a_comment.jpg').exists()


def test_an_image_too_long_for_jpeg_becomes_png(run_own, tmp_path):
    root = make_own(tmp_path)
    Image.new('RGBA', (3, 66_000)).save(root / 'a/screenshot.png')
    assert '13 decoded now' in run_own()
    assert load_image(root / 'uncropped/a_screenshot.png').size == (3, 66_000)
    assert ' 0 decoded now' in run_own()


def test_a_broken_image_is_named_without_its_control_characters(run_own, tmp_path):
    root = make_own(tmp_path)
    (root / 'a/x\x1b[31m\n.jpg').touch()
    with pytest.raises(UserError, match='broken or missing: a/x.x1b.31m.n.jpg ') as error:
        run_own()
    assert str(error.value).isprintable()


def test_at_most_twenty_failures_are_named(run, tmp_path):
    root = make_sop(tmp_path)
    shutil.rmtree(root / 'chair_final')
    shutil.rmtree(root / 'bicycle_final')
    with pytest.raises(UserError, match='24 of 24 images .*; and 4 more') as error:
        run('--data_name', 'sop')
    assert str(error.value).count('No such file') == 20


def test_a_folder_that_another_process_converts_is_left_alone(run_own, tmp_path):
    root = make_own(tmp_path)
    with lock(root / '.conversion.lock', ''), pytest.raises(UserError, match='another process is converting .*mine'):
        run_own()
    assert not (root / 'uncropped').exists()
    run_own()
    assert not (root / '.conversion.lock').exists()


@pytest.mark.parametrize('name', ['uncropped/a.jpg', 'conversion.json', 'uncropped_data_dicts.pth'])
def test_files_that_it_did_not_write_are_never_replaced(run_own, tmp_path, name):
    root = make_own(tmp_path)
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_text('{"mine": 1}')
    with pytest.raises(UserError, match=f'holds {name.split("/")[0]}, which this script did not write; move that away'):
        run_own()
    assert (root / name).read_text() == '{"mine": 1}'


def test_an_image_listed_twice_is_an_error(run, tmp_path):
    root = make_sop(tmp_path)
    with (root / 'Ebay_test.txt').open('a') as file:
        file.write((root / 'Ebay_train.txt').read_text().splitlines()[1])
    with pytest.raises(UserError, match='chair_final/111085122871_0.JPG is listed twice'):
        run('--data_name', 'sop')


def test_an_empty_subset_is_an_error_that_leaves_nothing(run_own, tmp_path):
    root = make_own_split(tmp_path, {'train': 'a'})
    (root / 'test').mkdir()
    with pytest.raises(UserError, match='no images in test'):
        run_own()
    assert not (root / 'conversion.json').exists()


def test_missing_data_is_named(run, tmp_path):
    with pytest.raises(UserError, match='--data_path .*no does not exist'):
        run('--data_path', tmp_path / 'no')
    with pytest.raises(UserError, match='holds no known raw data set'):
        run()
    (tmp_path / 'FLOWERS').mkdir()
    for name in ('flower', 'FLOWRS'):
        with pytest.raises(UserError, match="did you mean 'FLOWERS'"):
            run('--data_name', name)


def test_the_classification_split_of_cars_is_told_apart(run, tmp_path):
    write_image(tmp_path / 'car/train/Acura/1.jpg', 1, 1)
    with pytest.raises(UserError, match='lacks cars_annos.mat .*8,144 / 8,041.*8,054 / 8,131'):
        run('--data_name', 'cars196')


def test_a_folder_called_cars_is_told_what_it_was_taken_for(run, tmp_path):
    make_own(tmp_path, 'ab', folder='cars')
    with pytest.raises(UserError, match='is taken for the data set car by its name.*rename a folder of your own'):
        run('--data_name', 'cars')


@pytest.mark.parametrize(('words', 'message'), [
    (('glyph', '--glyph_classes', 0), '--glyph_classes 0 must'),
    (('glyph', '--glyph_images', 1), '--glyph_images 1 must'),
    (('mine', '--cache_size', 3), '--cache_size 3 must'),
    (('mine', '--glyph_classes', 5), '--glyph_classes 5 has no effect without --data_name glyph'),
    (('mine', '--seed', 3), '--seed 3 has no effect: .* is split into train and test already'),
    (('mine', '--test_ratio', 0.3), '--test_ratio 0.3 has no effect: .* is split'),
    (('mine', '--resplit'), '--resplit has no effect: .* is split'),
    (('cub', '--test_ratio', 0.3), '--test_ratio 0.3 has no effect on data sets with a split of their own'),
    (('cub', '--exclude', 'x'), '--exclude .* has no effect on'), (('mine', '--exclude', ''), "--exclude '' is empty"),
    (('cub', '--skip_duplicates'), '--skip_duplicates has no effect on'),
    (('cub', '--seed', 3), '--seed 3 has no effect on'), (('cub', '--resplit'), '--resplit has no effect on')])
def test_a_flag_out_of_range_or_without_effect_is_an_error(run, tmp_path, words, message):
    make_own_split(tmp_path, {'train': 'a', 'test': 'b'})
    with pytest.raises(UserError, match=message):
        run('--data_name', *words)


def test_a_mistake_ends_in_one_line_and_exit_code_2(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr('sys.argv', ['data_utils.py', '--data_path', str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        run_script(data_utils.main)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith('data_utils.py: error: --data_path')
    assert error.count('\n') == 1


# ---------------------------------------------------- a whole conversion of cars -----------------------------------
@pytest.mark.slow
def test_cars_are_converted_with_their_boxes(run, tmp_path):
    root = make_car(tmp_path, 'cars196')
    assert 'car: train 3 classes 12 images, test 3 classes 12 images; 24 decoded now' in run()
    assert load_image(root / 'cropped/000001.jpg').size == (40, 35)  # columns 3 to 42 and rows 2 to 36
    assert split_of(tmp_path, 'car')['class_names']['98'] == 'Maker Model 98'
