"""Folders of your own photographs: class splits that stay, renamed classes, odd names, and what is left out."""
import os
import shutil
import unicodedata
from pathlib import Path

import pytest
from raw_trees import make_own, make_own_split, make_special_file, write_image

from common.errors import UserError
from common.files import stamp_of
from imagedata.folders import (
    choose_class_split,
    file_stem,
    is_converted,
    list_folder,
    read_folder,
    read_labels,
    resolve_image_folder,
    scan_images,
    split_classes,
)


def num_test(sides):
    return list(sides.values()).count('test')


# ---------------------------------------------------- class split --------------------------------------------------
def test_a_class_keeps_its_side_when_others_come():
    before = split_classes(list('abcdefghij'), {}, 0.3, 0)
    assert num_test(before) == 3
    after = split_classes(list('abcdefghijklmnopqrst'), before, 0.3, 0)
    assert {label: after[label] for label in before} == before
    assert num_test(after) == 6  # the share of test classes holds


def test_a_class_that_goes_and_comes_back_keeps_its_side():
    before = split_classes(list('abcdef'), {}, 0.5, 0)
    gone = next(label for label, side in before.items() if side == 'test')
    without = split_classes([label for label in 'abcdef' if label != gone], before, 0.5, 0)
    assert split_classes(list('abcdef'), without, 0.5, 0) == before


def test_new_classes_are_split_by_their_name_and_the_seed_alone():
    earlier = split_classes(list('abcdefghij'), {}, 0.3, 0)
    new = list('klmnopqrstuvwxyz')
    forwards = split_classes([*new, *earlier], earlier, 0.3, 0)
    backwards = split_classes([*new[::-1], *earlier], earlier, 0.3, 0)
    assert forwards == backwards
    assert num_test(forwards) == round(0.3 * 26)
    assert split_classes(new, {}, 0.3, 0) != split_classes(new, {}, 0.3, 1)


def test_the_split_of_given_names_and_seed_is_the_same_on_every_machine():
    sides = split_classes(list('abcdefghij'), {}, 0.3, 0)
    assert {label for label, side in sides.items() if side == 'test'} == {'e', 'g', 'i'}


@pytest.mark.parametrize(('ratio', 'expected'), [(0.001, 1), (0.999, 3)])
def test_no_side_is_left_empty(ratio, expected):
    assert num_test(split_classes(list('abcd'), {}, ratio, 0)) == expected


def test_ratio_and_seed_are_remembered(tmp_path):
    first = choose_class_split(tmp_path, list('abcdefgh'), {}, 0.25, 7)
    again = choose_class_split(tmp_path, list('abcdefgh'), first, None, None)
    assert (first['ratio'], first['seed']) == (0.25, 7)
    assert first == again
    default = choose_class_split(tmp_path, list('abcdefgh'), {}, None, None)
    assert (default['ratio'], default['seed']) == (0.5, 0)


@pytest.mark.parametrize(('flag', 'ratio', 'seed'), [('--test_ratio 0.5', 0.5, None), ('--seed 5', None, 5)])
def test_another_ratio_or_seed_is_refused(tmp_path, flag, ratio, seed):
    earlier = choose_class_split(tmp_path, list('abcd'), {}, 0.3, None)
    with pytest.raises(UserError, match=f'{flag}: .* were split with --(test_ratio 0.3|seed 0); .* --resplit'):
        choose_class_split(tmp_path, list('abcd'), earlier, ratio, seed)


@pytest.mark.parametrize('ratio', [0.0, 1.0, -1.0, float('nan')])
def test_a_ratio_that_splits_nothing_is_refused(tmp_path, ratio):
    with pytest.raises(UserError, match='--test_ratio .* must lie between 0 and 1'):
        choose_class_split(tmp_path, ['a', 'b'], {}, ratio, None)


# ---------------------------------------------------- folders to train on ------------------------------------------
def test_a_folder_per_class_is_split_by_class(tmp_path):
    root = make_own(tmp_path, 'abcdef', images=3)
    (root / 'a/.DS_Store').touch()
    shutil.copytree(root / 'a', root / 'uncropped')  # what a conversion writes is no class
    folder = read_folder(root, 0.33)
    assert [len({image.label for image in folder.images if image.subset == subset}) for subset in ('train', 'test')] \
        == [4, 2]
    assert folder.class_names == {label: label for label in 'abcdef'}
    assert folder.images[0] == ('a/0.jpg', folder.class_split['sides']['a'], 'a', 'a_0', None)
    assert not folder.left_out


@pytest.mark.parametrize('subsets', [('train', 'test'), ('train', 'query', 'gallery'), ('Train', 'TEST')])
def test_folders_of_subsets_are_taken_as_they_are(tmp_path, subsets):
    root = make_own_split(tmp_path, dict.fromkeys(subsets, 'ab'))
    folder = read_folder(root)
    assert [image.source for image in folder.images] == [
        f'{subset}/{label}/{number}.jpg' for subset in subsets for label in 'ab' for number in range(2)]
    assert {image.subset for image in folder.images} == {subset.lower() for subset in subsets}
    assert folder.class_split == {}


def test_some_subsets_without_the_others_are_refused(tmp_path):
    root = make_own_split(tmp_path, {'train': 'ab', 'query': 'c'})
    with pytest.raises(UserError, match='holds train and query; it needs train and test, or train, query and gallery'):
        read_folder(root)


@pytest.mark.parametrize(('words', 'flag'), [({'ratio': 0.3}, '--test_ratio 0.3'), ({'seed': 3}, '--seed 3')])
def test_a_folder_that_is_split_takes_no_ratio_or_seed(tmp_path, words, flag):
    root = make_own_split(tmp_path, {'train': 'a', 'test': 'b'})
    with pytest.raises(UserError, match=f'{flag} has no effect: .* is split into train and test already'):
        read_folder(root, **words)


def test_names_that_differ_in_their_unicode_form_alone_are_one_class(tmp_path):
    for number, form in enumerate(('NFC', 'NFD')):
        write_image(tmp_path / unicodedata.normalize(form, 'Käfer') / f'{number}.jpg', 9, number)
    assert list(read_folder(tmp_path).class_names) == [unicodedata.normalize('NFC', 'Käfer')]


def test_a_renamed_class_keeps_its_side(tmp_path):
    root = make_own(tmp_path)
    before = read_folder(root)
    known = {(Path(image.source).name, *stamp_of(root / image.source)): image.label for image in before.images}
    for label in 'abc':
        (root / label).rename(root / f'{label}_new')
    after = read_folder(root, earlier=before.class_split, known=known)
    sides = before.class_split['sides']
    assert after.renamed == {f'{label}_new': label for label in 'abc'}
    assert {label: after.class_split['sides'][f'{label}_new'] for label in 'abc'} == \
        {label: sides[label] for label in 'abc'}


def test_a_copy_of_a_class_that_is_still_there_is_a_new_class(tmp_path):
    root = make_own(tmp_path)
    before = read_folder(root)
    known = {(Path(image.source).name, *stamp_of(root / image.source)): image.label for image in before.images}
    shutil.copytree(root / 'a', root / 'copy')
    assert read_folder(root, earlier=before.class_split, known=known).renamed == {}


def test_long_names_are_shortened_and_told_apart():
    stems = [file_stem(Path('ü' * 120, 'f' * 100, f'{end}.jpg')) for end in 'xy']
    assert len(set(stems)) == 2
    assert all(len(stem.encode()) <= 200 for stem in stems)


def test_a_file_stem_is_one_printable_word():
    assert file_stem(Path('a\\b/c\x07/d.jpg')) == 'a_b_c__d'
    assert file_stem(Path(unicodedata.normalize('NFD', 'Köln/1.png'))) == 'Köln_1'


# ---------------------------------------------------- what is left out ---------------------------------------------
def test_what_lies_beside_the_class_folders_is_counted(tmp_path):
    root = make_own(tmp_path)
    write_image(root / 'loose.jpg', 1, 1)
    (root / 'a/album').symlink_to(root / 'b')
    (root / 'empty').mkdir()
    (root / 'b/notes.TXT').touch()
    folder = read_folder(root)
    assert folder.left_out == {'images beside the class folders': 1, 'links that are not followed': 1, '.txt': 1}
    assert folder.empty == ['empty']


def test_what_lies_beside_the_folders_of_a_split_is_counted(tmp_path):
    root = make_own_split(tmp_path, {'train': 'ab', 'Test': 'cd', 'val': 'ef'})
    write_image(root / 'train/loose.jpg', 1, 1)
    folder = read_folder(root)
    assert folder.left_out == {'images beside the class folders': 1, 'images in val/': 4}
    assert len(folder.images) == 8


def test_images_without_class_folders_are_refused(tmp_path):
    write_image(tmp_path / 'one.jpg', 1, 1)
    with pytest.raises(UserError, match='holds 1 images, but no folder for each class'):
        read_folder(tmp_path)


def test_links_to_images_are_followed(tmp_path):
    write_image(tmp_path / 'store/x.jpg', 1, 1)
    (tmp_path / 'mine/a').mkdir(parents=True)
    (tmp_path / 'mine/a/1.jpg').symlink_to('../../store/x.jpg')
    (tmp_path / 'mine/a/2.jpg').symlink_to('../../store/gone.jpg')
    images, left_out = list_folder(tmp_path / 'mine/a')
    assert [path.name for path in images] == ['1.jpg']
    assert left_out == {'links that are not followed': 1}


SYSTEM_NAMES = ('@eaDir', '#recycle', '@Recycle', '$RECYCLE.BIN', 'System Volume Information', 'lost+found',
                '.thumbnails', '__MACOSX', '@Recently-Snapshot', '#snapshot', '@EADIR', '.@__thumb', '~snapshot',
                '.Trash-1000', 'Catalog Previews.lrdata', '@snapshots', '@Transcode', 'FOUND.000', 'files_trashbin',
                'files_versions', '#trash')


@pytest.mark.parametrize('name', SYSTEM_NAMES)
def test_the_folders_of_a_nas_or_a_system_are_skipped_and_counted(tmp_path, name):
    root = make_own(tmp_path, 'ab', images=1)
    write_image(root / name / 'photo.jpg/thumb.jpg', 1, 1)
    write_image(root / 'a' / name / 'thumb.jpg', 1, 1)
    folder = read_folder(root)
    assert [image.source for image in folder.images] == ['a/0.jpg', 'b/0.jpg']
    assert sum(folder.left_out.values()) == 2
    assert all(f'({name})' in kind for kind in folder.left_out)
    images, left_out = scan_images(root)
    assert list(images) == ['a/0.jpg', 'b/0.jpg']
    assert left_out == folder.left_out


@pytest.mark.parametrize('name', ['._0.jpg', '.DS_Store', '.trashed-1700000000-0.jpg', '0.jpg@SynoEAStream',
                                  '0.jpg:Zone.Identifier', 'Thumbs.db', 'desktop.ini', '0.jpg.part', '0.jpg~',
                                  '0.jpg.'])
def test_what_systems_leave_beside_photographs_is_no_image(tmp_path, name):
    root = make_own(tmp_path, 'ab', images=1)
    (root / 'a' / name).write_bytes((root / 'a/0.jpg').read_bytes())
    assert [image.source for image in read_folder(root).images] == ['a/0.jpg', 'b/0.jpg']
    assert list(scan_images(root)[0]) == ['a/0.jpg', 'b/0.jpg']


@pytest.mark.parametrize('name', ['CON.jpg', 'photo .jpg', 'photo. .jpg', 'IMG_1 (Conflicted copy).JPG', '-rf.jpg',
                                  '%2e.jpg', '[1].jpg', 'a,b";.jpg', f'{"x" * 251}.jpg', '0.JPG',
                                  'face.pgm', 'x.mpo', 'x.apng'])
def test_photographs_of_unusual_names_are_images(tmp_path, name):
    root = make_own(tmp_path, 'ab', images=1)
    (root / 'a' / name).write_bytes((root / 'a/0.jpg').read_bytes())
    sources = ['a/0.jpg', f'a/{name}', 'b/0.jpg']
    folder = read_folder(root)
    assert sorted(image.source for image in folder.images) == sorted(sources)
    assert len({image.stem for image in folder.images}) == 3 - (name == '0.JPG')  # data_utils.py numbers equal ones
    assert sorted(scan_images(root)[0]) == sorted(sources)


def test_class_folders_that_differ_in_case_are_two_classes(tmp_path):
    root = make_own(tmp_path, 'ab')
    (root / 'A').mkdir()
    if (root / 'A').samefile(root / 'a'):
        pytest.skip('this file system does not tell upper from lower case')
    write_image(root / 'A/0.jpg', 1, 1)
    assert sorted({image.label for image in read_folder(root).images}) == ['A', 'a', 'b']


def test_a_system_folder_that_cannot_be_read_is_skipped_like_others(tmp_path, monkeypatch):
    root = make_own(tmp_path, 'ab', images=1)
    (root / 'lost+found').mkdir()
    scandir = os.scandir

    def refuse_listing(folder):
        if str(folder).endswith('lost+found'):
            raise PermissionError(13, 'Permission denied', str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, 'scandir', refuse_listing)
    for _, left_out in ((None, read_folder(root).left_out), scan_images(root)):
        assert left_out == {'folders of the system (lost+found)': 1}


def test_the_previews_of_apple_photos_are_skipped_and_other_resources_are_not(tmp_path):
    write_image(tmp_path / 'Mine.photoslibrary/resources/derivatives/1.jpg', 1, 1)
    write_image(tmp_path / 'Mine.photoslibrary/originals/1.jpg', 1, 1)
    write_image(tmp_path / 'resources/1.jpg', 1, 1)
    assert list(scan_images(tmp_path)[0]) == ['Mine.photoslibrary/originals/1.jpg', 'resources/1.jpg']


@pytest.mark.parametrize(('pattern', 'kept'), [
    ('small', ['a/0.jpg', 'b/0.jpg', 'b/0_s.jpg']), ('*_s.jpg', ['a/0.jpg', 'a/small/0.jpg', 'b/0.jpg']),
    ('a/', ['b/0.jpg', 'b/0_s.jpg']), ('./a/*', ['b/0.jpg', 'b/0_s.jpg']), ('b/0.jp?', ['a/0.jpg', 'a/small/0.jpg',
                                                                                      'b/0_s.jpg'])])
def test_what_is_excluded_is_skipped_and_counted(tmp_path, pattern, kept):
    root = make_own(tmp_path, 'ab', images=1)
    write_image(root / 'a/small/0.jpg', 1, 1)
    write_image(root / 'b/0_s.jpg', 1, 1)
    images, left_out = scan_images(root, [pattern])
    assert list(images) == kept
    assert list(left_out) == [f'excluded by {pattern}']
    assert [image.source for image in read_folder(root, exclude=[pattern]).images] == kept


def test_a_pattern_finds_either_unicode_form(tmp_path):
    write_image(tmp_path / unicodedata.normalize('NFD', 'Käfer/0.jpg'), 1, 1)
    assert scan_images(tmp_path, ['Käfer'])[0] == {}
    assert scan_images(tmp_path, [f'{tmp_path}/Käfer'])[0] == {}


@pytest.mark.parametrize('pattern', ['', '/', './'])
def test_an_empty_pattern_excludes_nothing_and_is_refused(tmp_path, pattern):
    with pytest.raises(UserError, match='--exclude .* is empty'):
        scan_images(tmp_path, [pattern])


@pytest.mark.parametrize(('link', 'target'), [('latest', '.'), ('c', 'a'), ('c', '../mine/a'), ('a/9.jpg', '0.jpg'),
                                              ('b/9.jpg', '../a/0.jpg')])
def test_a_photograph_that_links_reach_twice_is_an_error(tmp_path, link, target):
    root = make_own(tmp_path, 'ab')
    (root / link).symlink_to(target)
    with pytest.raises(UserError, match=r'are one file, .*0.jpg, reached through a link; remove the link'):
        read_folder(root)
    assert len(read_folder(root, exclude=[link]).images) == 4


def test_two_subsets_that_are_one_place_are_an_error(tmp_path):
    root = make_own_split(tmp_path, {'train': 'ab'})
    (root / 'test').symlink_to('train')
    with pytest.raises(UserError, match='train/a/0.jpg and test/a/0.jpg are one file'):
        read_folder(root)


def test_a_class_folder_may_be_a_link(tmp_path):
    root = make_own(tmp_path, 'ab')
    (root / 'b').rename(tmp_path / 'elsewhere')
    (root / 'b').symlink_to('../elsewhere')
    assert len(read_folder(root).images) == 4


@pytest.mark.parametrize('refused', ['listing', 'entering'])
def test_a_folder_that_cannot_be_read_is_not_taken_for_an_empty_one(tmp_path, monkeypatch, refused):
    root = make_own(tmp_path, 'a')
    write_image(root / 'a/album/0.jpg', 1, 1)
    assert len(list_folder(root / 'a')[0]) == 3
    scandir, access = os.scandir, os.access  # permissions do not bind the user root, so the calls are replaced

    def refuse_listing(folder):
        if str(folder).endswith('album'):
            raise PermissionError(13, 'Permission denied', str(folder))
        return scandir(folder)

    if refused == 'listing':
        monkeypatch.setattr(os, 'scandir', refuse_listing)
    else:
        monkeypatch.setattr(os, 'access', lambda path, mode: not str(path).endswith('album') and access(path, mode))
    for read in (list_folder, scan_images):
        with pytest.raises(UserError, match='album cannot be read .*; give yourself permission'):
            read(root / 'a')


def test_a_suffix_that_is_not_utf8_is_counted_and_can_be_printed(tmp_path):
    root = make_own(tmp_path, 'a')
    (root / 'a/notes.t\udce4t').touch()
    for _, left_out in (list_folder(root / 'a'), scan_images(root)):
        assert left_out == {'.t\\udce4t': 1}
        assert ' '.join(left_out).encode()


def test_a_class_folder_whose_name_is_not_utf8_is_named(tmp_path):
    root = make_own(tmp_path, 'ab')
    (root / 'a').rename(root / 'caf\udce9')
    with pytest.raises(UserError, match='is not UTF-8; rename it'):
        read_folder(root)


# ---------------------------------------------------- folders to search in -----------------------------------------
def test_images_of_any_folder_are_listed_by_path_with_size_and_time(tmp_path):
    for name in ('b/2.jpg', 'b/1.JPG', 'a.jpg', '.hidden/3.jpg'):
        write_image(tmp_path / name, 1, 1)
    (tmp_path / 'notes').touch()
    (tmp_path / 'odd\x07.jpg').touch()
    (tmp_path / 'away.jpg').symlink_to('/etc/hostname')
    (tmp_path / 'folder').symlink_to(tmp_path / 'b')
    (tmp_path / 'gone.jpg').symlink_to('nothing.jpg')
    (tmp_path / 'loop.jpg').symlink_to('loop.jpg')
    images, left_out = scan_images(tmp_path)
    assert list(images) == ['a.jpg', 'b/1.JPG', 'b/2.jpg']
    assert images['a.jpg'] == tuple(stamp_of(tmp_path / 'a.jpg'))
    assert left_out == {'without ending': 1, 'links out of the folder': 1, 'links to folders': 1,
                        'names with control characters, backslashes or undecodable bytes (odd\\x07.jpg)': 1,
                        'links to nothing (gone.jpg, ...)': 2}


@pytest.mark.parametrize('kind', ['pipe', 'socket', 'device', 'link to itself', 'link to a pipe'])
def test_only_regular_files_are_images(tmp_path, kind):
    root = make_own(tmp_path, 'ab', images=1)
    make_special_file(root / 'a/x.jpg', kind)
    images, left_out = scan_images(root)
    assert list(images) == ['a/0.jpg', 'b/0.jpg']
    folder = read_folder(root)
    assert [image.source for image in folder.images] == ['a/0.jpg', 'b/0.jpg']
    assert sum(left_out.values()) == sum(folder.left_out.values()) == 1
    assert 'special files' in str(left_out) or 'links' in str(left_out)


def test_a_disk_that_fails_is_not_taken_for_an_empty_one(tmp_path, monkeypatch):
    write_image(tmp_path / 'x.jpg', 1, 1)
    stat = os.stat

    def fail(path, *args, **kwargs):
        if str(path).endswith('x.jpg') and kwargs.get('follow_symlinks', True):
            raise OSError(5, 'Input/output error', str(path))
        return stat(path, *args, **kwargs)

    monkeypatch.setattr(os, 'stat', fail)
    with pytest.raises(UserError, match='x.jpg cannot be read .Input/output error.; check the disk'):
        scan_images(tmp_path)


@pytest.mark.parametrize('name', [
    'Screenshot 2024\u202fPM', 'no\u00a0break', 'wide\u3000space', '👩\u200d🍳', '\u2067rtl', 'soft\u00adhyphen',
    'a\ufeffb', 'private \ue000', unicodedata.normalize('NFD', 'é')])
def test_names_of_any_letters_are_images(tmp_path, name):
    write_image(tmp_path / f'{name}/{name}.jpg', 1, 1)
    images, left_out = scan_images(tmp_path)
    assert list(images) == [f'{name}/{name}.jpg']
    assert not left_out


@pytest.mark.parametrize(('name', 'shown'), [
    ('a\nb', r'a\nb'), ('a\x1b[31m', r'a\x1b[31m'), ('a\x85', r'a\x85'), ('caf\udce9', r'caf\udce9'),
    ('a\\b', r'a\b'), ('e\u202f\x07', 'e\u202f\\x07')])
def test_names_that_cannot_be_held_are_named(tmp_path, name, shown):
    (tmp_path / f'{name}.jpg').touch()
    images, left_out = scan_images(tmp_path)
    assert not images
    assert left_out == {f'names with control characters, backslashes or undecodable bytes ({shown}.jpg)': 1}
    assert str(left_out).encode()


def test_the_copies_of_a_conversion_are_left_out(tmp_path):
    write_image(tmp_path / 'mine/uncropped/1.jpg', 1, 1)
    assert len(scan_images(tmp_path)[0]) == 1
    (tmp_path / 'mine/conversion.json').write_text('{"made_by": "data_utils.py"}')
    assert is_converted(tmp_path / 'mine')
    assert scan_images(tmp_path) == ({}, {'copies in uncropped/': 1, '.json': 1})


def test_a_folder_below_a_known_one_is_named_from_there(tmp_path):
    (tmp_path / 'photos/new').mkdir(parents=True)
    photos = str(tmp_path / 'photos')
    assert resolve_image_folder(tmp_path / 'photos', []) == (photos, '')
    assert resolve_image_folder(tmp_path / 'photos', [photos]) == (photos, '')
    assert resolve_image_folder(tmp_path / 'photos/new', [photos]) == (photos, 'new/')
    with pytest.raises(UserError, match='is in the data base already'):
        resolve_image_folder(tmp_path, [photos])
    with pytest.raises(UserError, match='is not a folder'):
        resolve_image_folder(tmp_path / 'no', [])


def test_labels_come_from_the_first_folder_or_from_a_csv(tmp_path, capsys):
    paths = ['ara/0.jpg', 'ara/old/1.jpg', 'x.jpg']
    assert read_labels(None, paths, '/photos') is None
    assert read_labels('folder', paths, '/photos') == {'ara/0.jpg': 'ara', 'ara/old/1.jpg': 'ara'}
    (tmp_path / 'l.csv').write_text('path,label\nx.jpg,"parrot, red"\nno.jpg,x\nara/0.jpg,\n')
    assert read_labels(str(tmp_path / 'l.csv'), paths, '/photos') == {'x.jpg': 'parrot, red'}
    printed = capsys.readouterr().out
    assert 'l.csv name no image of the folder: no.jpg\n' in printed
    assert 'l.csv name no class: ara/0.jpg\n' in printed


@pytest.fixture
def labels_of(tmp_path):
    """Return a function that reads the labels of images below /photos from the text of a CSV file."""
    def read(text: str, paths=('x.jpg', 'ara/0.jpg'), folder='/photos'):
        (tmp_path / 'l.csv').write_text(text)
        return read_labels(str(tmp_path / 'l.csv'), list(paths), str(folder))
    return read


@pytest.mark.parametrize('written', [
    'ara/0.jpg', './ara/0.jpg', '/photos/ara/0.jpg', '/photos/../photos/ara//0.jpg', 'ara\\0.jpg', '.\\ara\\0.jpg',
    ' ara/0.jpg ', 'ara//0.jpg', 'x/../ara/0.jpg'])
def test_a_path_may_be_written_as_people_write_it(labels_of, written):
    assert labels_of(f'path,label\n{written},Smith\n') == {'ara/0.jpg': 'Smith'}


def test_an_absolute_path_may_lead_through_a_link(labels_of, tmp_path):
    (tmp_path / 'photos').mkdir()
    (tmp_path / 'link').symlink_to('photos')
    (tmp_path / 'photos/x.jpg').touch()
    for folder, other in (('photos', 'link'), ('link', 'photos')):
        assert labels_of(f'path,label\n{tmp_path}/{other}/x.jpg,a\n', folder=tmp_path / folder) == {'x.jpg': 'a'}


@pytest.mark.parametrize('written', ['NFC', 'NFD'])
@pytest.mark.parametrize('stored', ['NFC', 'NFD'])
def test_a_path_finds_a_name_of_either_unicode_form(labels_of, written, stored):
    path = unicodedata.normalize(stored, 'Käfer/é.jpg')
    line = unicodedata.normalize(written, './Käfer/é.jpg,Käfer')
    assert labels_of(f'path,label\n{line}\n', [path]) == {path: unicodedata.normalize('NFC', 'Käfer')}


def test_names_that_differ_in_their_unicode_form_alone_are_told_apart_if_written_so(labels_of):
    both = [unicodedata.normalize(form, 'é.jpg') for form in ('NFC', 'NFD')]
    assert labels_of(f'path,label\n{both[0]},a\n{both[1]},b\n', both) == dict(zip(both, 'ab', strict=True))


@pytest.mark.parametrize('text', [
    'path;label\nx.jpg;Smith, John\n', 'path\tlabel\nx.jpg\tSmith, John\n', 'Label , Path\n"Smith, John",x.jpg\n',
    'path,label,note\nx.jpg,"Smith, John"\n', 'path,label\r\nx.jpg,"Smith, John",,\r\n\r\n',
    '\ufeffpath,label\nx.jpg,"Smith, John"\nx.jpg,"Smith, John"'])
def test_a_csv_file_of_any_program_is_read(labels_of, text):
    assert labels_of(text) == {'x.jpg': 'Smith, John'}


@pytest.mark.parametrize(('text', 'message'), [
    ('path,label\n\nx.jpg,Smith, John\n', "line 3: 3 fields instead of 2 in 'x.jpg,Smith, John'; put .* quotation"),
    ('path,label\nx.jpg,a\nara/0.jpg,b\n./x.jpg,c\n', 'gives x.jpg two classes: a in line 2, c in line 4'),
    ('label,path\na,x.jpg\nb\n', "line 3: 'b' has no path"),
    ('path,label\nx.jpg,"a\nara/0.jpg,b\n', 'readable CSV file .unexpected end of data'),
    ('path,label\n,\n,a\n', "names no image below /photos; its first path is ''"),
    ('path,label\n/photo/x.jpg,a\n', "first path is '/photo/x.jpg'; did you mean 'x.jpg'"),
    ('path,label\n/x.jpg,a\nC:\\\\x.jpg,a\n', "names no image below /photos; its first path is '/x.jpg'")])
def test_a_csv_file_that_contradicts_itself_is_refused_in_one_line(labels_of, text, message):
    with pytest.raises(UserError, match=message) as error:
        labels_of(text)
    assert '\n' not in str(error.value)


def test_the_first_paths_that_fit_no_image_are_named(labels_of, capsys):
    labels_of('path,label\nx.jpg,a\n' + ''.join(f'{number}.jpg,b\n' for number in range(1200)))
    assert '1,200 lines of' in (printed := capsys.readouterr().out)
    assert printed.endswith('name no image of the folder: 0.jpg, 1.jpg, 2.jpg, ...\n')


@pytest.mark.parametrize(('text', 'message'), [
    ('a,b\n1,2\n', 'needs a header line with the columns path,label'), ('', 'needs a header line'),
    ('path,label\nX.jpg,a\n', "names no image below /photos; its first path is 'X.jpg'; did you mean 'x.jpg'"),
    (None, 'is neither `folder` nor a readable CSV file')])
def test_labels_that_cannot_be_used_are_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / 'l.csv').write_text(text)
    with pytest.raises(UserError, match=message):
        read_labels(str(tmp_path / 'l.csv'), ['x.jpg'], '/photos')
