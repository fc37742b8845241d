"""Any folder becomes a data base: what it contains, how it changes, and what an interruption does to it."""
import csv
import errno
import os
import re
import runpy
import shutil
import signal
import stat
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from faults import differences, run_embed
from museum import DIM, make_model, write_photos
from PIL import Image
from raw_trees import write_image

import embed
import evaluate
import report
from common.errors import UserError
from common.files import MADE_HERE, save
from common.images import BrokenImage, load_image
from common.results import RunFiles
from imagedata.loading import make_transform
from retrieval import image_files
from retrieval.database import load_data_base
from retrieval.metrics import similarity_of
from retrieval.model_file import load_model
from retrieval.search import nearest_images, rank_queries


@pytest.fixture(scope='module')
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp('model') / 'birds_run_model.pth')


@pytest.fixture
def museum(tmp_path) -> Path:
    """A folder of 11 images, with a broken one, a hidden one, a link out of the folder and a text file."""
    folder = write_photos(tmp_path / 'museum', {'ara': 4, 'zebra': 3, 'loans/ara': 3})
    write_image(folder / 'loose [1].jpg', 4, 0)
    (folder / 'notes.txt').write_text('x')
    (folder / 'broken.png').write_bytes(b'no image')
    write_image(folder / '.hidden/0.jpg', 0, 0)
    (tmp_path / 'secret.jpg').write_bytes((folder / 'ara/0.jpg').read_bytes())
    (folder / 'link.jpg').symlink_to(tmp_path / 'secret.jpg')
    return folder


@pytest.fixture
def call(call_script, tmp_path):
    """Call embed.py on museum.pth in this process; returns what it printed."""
    def call_embed(*words, name='museum.pth') -> str:
        return call_script(embed, '--data_base', tmp_path / name, '--num_workers', 0, *words)
    return call_embed


@pytest.fixture
def embedded(call, model, museum, tmp_path) -> Path:
    """museum.pth: the museum, embedded with the classes of its folders."""
    call('--model', model, '--images', museum, '--labels', 'folder')
    return tmp_path / 'museum.pth'


def classes_of(file: Path) -> dict[str, str | None]:
    """Return {path: class} of a data base, in its order."""
    data_base = load_data_base(file)
    return dict(zip(data_base.test.images, map(data_base.class_of, data_base.test.labels.tolist()), strict=True))


def feature_of(data_base, path: str) -> torch.Tensor:
    """Return the features of the image with this path."""
    return data_base.test.features[data_base.test.images.index(path)]


def load(path):
    return torch.load(path, weights_only=True)


# ---------------------------------------------------- adding images ------------------------------------------------
def test_a_folder_becomes_a_data_base_of_the_models_embeddings(call, model, museum, tmp_path):
    printed = call('--model', model, '--images', museum, '--labels', 'folder')
    assert '12 images, 12 to embed; left out: 1 links out of the folder, 1 .txt' in printed
    assert f'1 images cannot be read and are left out: {museum}/broken.png' in printed
    data_base = load_data_base(tmp_path / 'museum.pth')
    assert list(classes_of(tmp_path / 'museum.pth').items()) == [
        *((f'ara/{number}.jpg', 'ara') for number in range(4)),
        *((f'loans/ara/{number}.jpg', 'loans') for number in range(3)), ('loose [1].jpg', None),
        *((f'zebra/{number}.jpg', 'zebra') for number in range(3))]
    assert data_base.sources.folders == [str(museum)]
    network = load_model(model)[0]
    transform = make_transform(False, 32, 36, network.interpolation)
    with torch.inference_mode():
        expected = torch.cat([network(transform(load_image(museum / path))[None]) for path in data_base.test.images])
    torch.testing.assert_close(data_base.test.features, expected, atol=1e-6, rtol=0)
    assert (tmp_path / 'museum_model.pth').read_bytes() == model.read_bytes()
    assert not (tmp_path / 'museum.pth.parts').exists()


def test_float16_halves_the_features_and_hardly_changes_similarities(call, embedded):
    float32 = load_data_base(embedded).test.features
    call('--dtype', 'float16')
    float16 = load_data_base(embedded).test.features
    assert float16.dtype == torch.float16
    assert (similarity_of(float16, float16) - similarity_of(float32, float32)).abs().max() < 5e-4


def test_only_new_and_changed_files_are_embedded_again(call, embedded, museum):
    before = load(embedded)
    assert '12 images, 0 to embed' in call('--images', museum)  # nor is the broken one tried again
    assert differences(before, load(embedded)) == []
    write_image(museum / 'ara/1.jpg', 5, 9)
    write_image(museum / 'new.jpg', 6, 1)
    assert '13 images, 2 to embed' in call('--images', museum)
    after = load_data_base(embedded)
    assert sorted(after.test.images) == sorted([*before['test_images'], 'new.jpg'])
    for row, path in enumerate(before['test_images']):
        is_equal = torch.equal(before['test_features'][row], after.test.features[after.test.images.index(path)])
        assert is_equal == (path != 'ara/1.jpg')


@pytest.mark.parametrize('flag', ['--update', '--images'])
def test_a_file_of_the_same_size_and_another_time_has_changed(flag, call, embedded, museum):
    (museum / 'broken.png').unlink()
    os.utime(museum / 'ara/1.jpg', ns=(10**18, 10**18))
    assert '\n1 images in ' in (call('--update') if flag == '--update' else call('--images', museum))


def test_a_second_folder_keeps_its_own_paths(call, embedded, museum, tmp_path):
    shutil.copytree(museum / 'ara', tmp_path / 'new/ara')
    call('--images', tmp_path / 'new')
    data_base = load_data_base(embedded)
    assert data_base.sources.folders == [str(museum), str(tmp_path / 'new')]
    assert data_base.test.images.count('ara/0.jpg') == 2


def test_a_folder_below_a_known_one_keeps_its_paths_and_one_above_is_refused(call, embedded, museum, tmp_path):
    write_image(museum / 'ara/late.jpg', 3, 3)
    assert '5 images, 1 to embed' in call('--images', museum / 'ara')
    data_base = load_data_base(embedded)
    assert data_base.test.images[-1] == 'ara/late.jpg'
    assert data_base.sources.folders == [str(museum)]
    with pytest.raises(UserError, match='holds .*museum, which is in the data base already'):
        call('--images', tmp_path)


def test_batches_and_workers_are_those_of_the_command_line(call, model, museum, tmp_path, monkeypatch):
    batches = []

    def count(model, images, device, amp):
        batches.append((len(images), amp))
        return torch.nn.functional.normalize(torch.ones(len(images), DIM), dim=1)

    monkeypatch.setattr(image_files, 'embed_batch', count)
    call('--model', model, '--images', museum, '--batch_size', 5, '--amp', 'on')
    assert batches == [(5, True), (5, True), (2, True)]


def test_a_first_call_that_finds_no_images_keeps_no_model(call, model, museum, tmp_path):
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match='holds no images'):
        call('--model', make_model(tmp_path / 'other_model.pth', 1), '--images', tmp_path / 'empty')
    assert '11 images of 1 folders' in call('--model', model, '--images', museum)


def test_a_folder_of_broken_images_alone_makes_no_data_base(call, model, tmp_path):
    (tmp_path / 'bad').mkdir()
    (tmp_path / 'bad/x.jpg').write_bytes(b'no image')
    with pytest.raises(UserError, match='bad: none of the images can be read'):
        call('--model', model, '--images', tmp_path / 'bad')
    assert not (tmp_path / 'museum.pth').exists()


def test_embeddings_that_are_not_finite_are_refused(call, model, museum, tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, 'embed_batch', lambda model, images, *_: torch.full((len(images), DIM), torch.nan))
    with pytest.raises(UserError, match='not finite; the model is broken'):
        call('--model', model, '--images', museum)


# ---------------------------------------------------- broken files -------------------------------------------------
@pytest.mark.parametrize('flag', ['--update', '--images'])
def test_an_image_that_became_unreadable_is_removed(flag, call, embedded, museum):
    (museum / 'ara/1.jpg').write_bytes(b'no image any more')
    printed = call('--update') if flag == '--update' else call('--images', museum)
    assert f'2 images cannot be read and are left out: {museum}/' in printed
    data_base = load_data_base(embedded)
    assert 'ara/1.jpg' not in data_base.test.images
    assert len(data_base.test.images) == len(data_base.test.features) == 10


@pytest.mark.parametrize('flag', ['--update', '--images'])
def test_an_image_that_was_broken_for_a_while_keeps_its_class(flag, call, embedded, museum):
    repaired = (museum / 'zebra/0.jpg').read_bytes()
    (museum / 'zebra/0.jpg').write_bytes(b'half of it')
    call('--update')
    assert 'zebra/0.jpg' not in classes_of(embedded)
    assert load_data_base(embedded).sources.broken[f'{museum}/zebra/0.jpg'][2] == 'zebra'
    (museum / 'zebra/0.jpg').write_bytes(repaired)
    call(*(['--update'] if flag == '--update' else ['--images', museum]))
    assert classes_of(embedded)['zebra/0.jpg'] == 'zebra'
    assert f'{museum}/zebra/0.jpg' not in load_data_base(embedded).sources.broken


def test_a_broken_file_is_forgotten_with_its_folder(call, embedded, museum):
    (museum / 'ara/bad.jpg').write_bytes(b'no image')
    call('--images', museum)
    assert '4 images removed, 1 broken files forgotten' in call('--remove', 'ara')
    write_image(museum / 'ara/bad.jpg', 1, 1)
    call('--update')
    assert not [path for path in classes_of(embedded) if path.startswith('ara')]
    assert '0 images removed, 1 broken files forgotten' in call('--remove', 'broken.png')
    assert load_data_base(embedded).sources.broken == {}


def test_update_tries_no_broken_file_that_is_gone_or_links_to_itself(call, embedded, museum):
    (museum / 'loop.jpg').symlink_to('loop.jpg')
    (museum / 'gone.jpg').symlink_to('nothing.jpg')
    printed = call('--images', museum)
    assert 'left out: 2 links to nothing (gone.jpg, ...)' in printed
    assert '1 images cannot be read' in printed
    assert '1 changed or broken ones are embedded' in call('--update')
    assert list(load_data_base(embedded).sources.broken) == [f'{museum}/broken.png']


# ---------------------------------------------------- removing, updating -------------------------------------------
def test_images_are_removed_by_path_folder_or_pattern(call, embedded):
    assert '3 images removed' in call('--remove', 'loans')
    assert '1 images removed' in call('--remove', 'loose [1].jpg')
    assert '2 images removed' in call('--remove', 'ara/[01].jpg')
    data_base = load_data_base(embedded)
    assert data_base.test.images == ['ara/2.jpg', 'ara/3.jpg', 'zebra/0.jpg', 'zebra/1.jpg', 'zebra/2.jpg']
    assert len(data_base.test.features) == 5
    with pytest.raises(UserError, match='--remove nothing matches none of the 5 images'):
        call('--remove', 'nothing')
    with pytest.raises(UserError, match='matches all 5 images; to remove them all, add --confirm'):
        call('--remove', '*')
    assert 'museum.pth has no images left' in call('--remove', '*', '--confirm')
    assert not embedded.exists()


@pytest.mark.parametrize(('words', 'message'), [
    (('--remove', ''), '--remove: an empty pattern names no image'),
    (('--remove', 'ara', ' '), '--remove: an empty pattern names no image'),
    (('--remove', '/'), '--remove / matches all 11 images; to remove them all, add --confirm'),
    (('--list', '--confirm'), '--confirm has no effect without --update, --remove or --move')])
def test_no_slip_removes_all_images(call, embedded, words, message):
    with pytest.raises(UserError, match=message):
        call(*words)
    assert len(load_data_base(embedded).test.images) == 11


def test_update_embeds_changed_files_and_removes_deleted_ones(call, embedded, museum):
    write_image(museum / 'zebra/0.jpg', 1, 7)
    (museum / 'zebra/1.jpg').unlink()
    write_image(museum / 'broken.png', 2, 2)
    assert '1 deleted images are removed; 2 changed or broken ones are embedded' in call('--update')
    assert list(classes_of(embedded).items())[-2:] == [('zebra/0.jpg', 'zebra'), ('broken.png', None)]
    assert 'zebra/1.jpg' not in classes_of(embedded)
    assert load_data_base(embedded).sources.broken == {}


def test_update_of_a_missing_folder_removes_nothing(call, embedded, museum, tmp_path):
    shutil.move(museum, tmp_path / 'away')
    with pytest.raises(UserError, match='museum is missing'):  # a disk may not be mounted
        call('--update')
    assert len(load_data_base(embedded).test.images) == 11


def test_update_keeps_a_collection_whose_folder_is_an_empty_mount_point(call, embedded, museum, tmp_path):
    before = classes_of(embedded)
    shutil.move(museum, tmp_path / 'away')
    museum.mkdir()
    with pytest.raises(UserError, match='--update: 11 of the 11 images in .*museum are missing; is a disk not mounted'):
        call('--update')
    assert classes_of(embedded) == before
    museum.rmdir()
    shutil.move(tmp_path / 'away', museum)
    for path in ('ara', 'loans'):  # 7 of 11
        shutil.rmtree(museum / path)
    with pytest.raises(UserError, match='7 of the 11 images'):
        call('--update')
    assert '7 deleted images are removed' in call('--update', '--confirm')


def test_update_asks_before_it_looks_into_the_home_folder_and_above(call, embedded, museum, capsys):
    contents = load(embedded)
    paths = [f'{str(museum)[1:]}/{path}' for path in contents['test_images']]
    save({**contents, 'folders': ['/'], 'test_images': paths, 'broken': {}}, embedded)
    with pytest.raises(UserError, match='the data base names /, which holds all your files'):
        call('--update')
    assert '--update looks into /\n' in capsys.readouterr().out
    assert '0 deleted images are removed' in call('--update', '--confirm')


@pytest.mark.parametrize('flag', ['--images', '--update'])
def test_a_file_that_is_out_of_reach_is_not_taken_for_a_broken_one(flag, call, embedded, museum, monkeypatch):
    before = load_data_base(embedded)
    for path in ('ara/1.jpg', 'zebra/0.jpg'):
        write_image(museum / path, 5, 9)

    def drop_out(file):
        if file.name == '1.jpg':
            try:
                raise OSError(errno.EIO, 'Input/output error')
            except OSError as error:
                raise BrokenImage('Input/output error') from error
        return load_image(file)

    words = (flag, museum) if flag == '--images' else (flag,)
    with monkeypatch.context() as context:
        context.setattr(image_files, 'load_image', drop_out)
        with pytest.raises(UserError, match=r'1 files could not be reached, for instance .*/ara/1.jpg \(Input/output'):
            call(*words)
    after = load_data_base(embedded)
    assert list(after.sources.broken) == [f'{museum}/broken.png']
    assert torch.equal(feature_of(after, 'ara/1.jpg'), feature_of(before, 'ara/1.jpg'))
    assert not torch.equal(feature_of(after, 'zebra/0.jpg'), feature_of(before, 'zebra/0.jpg'))
    call(*words)
    assert not torch.equal(feature_of(load_data_base(embedded), 'ara/1.jpg'), feature_of(before, 'ara/1.jpg'))


def test_each_broken_file_is_named_with_its_reason(call, model, museum):
    (museum / 'empty.jpg').touch()
    printed = call('--model', model, '--images', museum)
    assert re.search(r'cannot be read: .*/broken.png \(.+\)\n', printed)
    assert re.search(r'cannot be read: .*/empty.jpg \(.+\)\n', printed)


def test_a_link_stays_a_link_and_a_file_keeps_its_mode(call, embedded, museum, tmp_path):
    (tmp_path / 'elsewhere').mkdir()
    shutil.move(embedded, tmp_path / 'elsewhere/real.pth')
    embedded.symlink_to('elsewhere/real.pth')
    (tmp_path / 'elsewhere/real.pth').chmod(0o600)
    write_image(museum / 'new.jpg', 5, 9)
    call('--images', museum)
    assert embedded.is_symlink()
    assert stat.S_IMODE((tmp_path / 'elsewhere/real.pth').stat().st_mode) == 0o600
    assert len(load_data_base(tmp_path / 'elsewhere/real.pth').test.images) == 12


@pytest.mark.parametrize(('written', 'asked'), [('NFC', 'NFD'), ('NFD', 'NFC')])
def test_a_name_is_found_in_either_unicode_form(written, asked, call, model, museum):
    path = unicodedata.normalize(written, 'Käfer/grün.jpg')
    write_image(museum / path, 5, 9)
    call('--model', model, '--images', museum)
    pattern = unicodedata.normalize(asked, 'Käfer/grün.jpg')
    assert call('--list', pattern).splitlines()[-2] == path
    assert '1 images removed' in call('--remove', unicodedata.normalize(asked, 'Käfer'))


def test_excluded_paths_are_left_out(call, model, museum):
    printed = call('--model', model, '--images', museum, '--exclude', 'loans', '*.png')
    assert '8 images, 8 to embed' in printed
    with pytest.raises(UserError, match='--exclude .* has no effect without --images'):
        call('--exclude', 'loans', '--update')


def test_what_update_finds_is_embedded_once_and_not_if_it_is_removed(call, embedded, museum):
    for path in ('ara/0.jpg', 'zebra/0.jpg'):
        write_image(museum / path, 6, 6)
    assert '\n2 images in ' in call('--update', '--remove', 'ara', '--images', museum / 'zebra')  # and broken.png
    paths = load_data_base(embedded).test.images
    assert not [path for path in paths if path.startswith('ara/')]
    assert paths.count('zebra/0.jpg') == 1


# ---------------------------------------------------- moved folders -----------------------------------------------
def test_a_collection_whose_folder_moved_keeps_its_rows_and_embeds_nothing(call, embedded, museum, tmp_path):
    before = load(embedded)
    shutil.copytree(museum, tmp_path / 'disk/new', copy_function=shutil.copyfile, symlinks=True)  # with other times
    shutil.rmtree(museum)
    assert '11 images are in' in call('--move', f'{museum}/', tmp_path / 'disk/new')
    after = load(embedded)
    assert after['folders'] == [str(tmp_path / 'disk/new')]
    assert list(after['broken']) == [f'{tmp_path}/disk/new/broken.png']
    assert differences({**before, 'folders': 0, 'broken': 0, 'test_times': 0},
                       {**after, 'folders': 0, 'broken': 0, 'test_times': 0}) == []
    assert '12 images, 0 to embed' in call('--images', tmp_path / 'disk/new')
    assert '0 deleted images are removed; 1 changed or broken' in call('--update')


def test_all_folders_below_the_one_that_moved_are_moved(call, embedded, museum, tmp_path):
    (tmp_path / 'away').mkdir()
    write_image(tmp_path / 'disk/a/0.jpg', 1, 1)
    write_image(tmp_path / 'disk/b/0.jpg', 2, 1)
    call('--images', tmp_path / 'disk/a')
    call('--images', tmp_path / 'disk/b')
    shutil.move(tmp_path / 'disk', tmp_path / 'away/disk')
    call('--move', tmp_path / 'disk', tmp_path / 'away/disk')
    folders = load_data_base(embedded).sources.folders
    assert folders == [str(museum), f'{tmp_path}/away/disk/a', f'{tmp_path}/away/disk/b']


def test_a_move_that_cannot_be_meant_is_refused(call, embedded, museum, tmp_path):
    before = load(embedded)
    write_image(tmp_path / 'other/0.jpg', 1, 1)
    for words, message in (((tmp_path / 'nowhere', museum), r'nowhere is no folder of the collection .*museum'),
                           ((museum / 'ara', tmp_path), 'ara is no folder of the collection'),
                           ((museum, tmp_path / 'missing'), 'missing is not a folder'),
                           ((museum, ''), 'an empty name names no folder'),
                           ((museum, tmp_path / 'other'), '12 files are missing in .*other or have other sizes')):
        with pytest.raises(UserError, match=message):
            call('--move', *words)
    assert differences(before, load(embedded)) == []
    call('--images', tmp_path / 'other')
    with pytest.raises(UserError, match='museum overlaps .*museum, which is in the collection already'):
        call('--move', tmp_path / 'other', museum)


def test_a_confirmed_move_leaves_changed_files_to_update(call, embedded, museum, tmp_path):
    shutil.move(museum, tmp_path / 'new')
    (tmp_path / 'new/ara/0.jpg').unlink()
    (tmp_path / 'new/ara/1.jpg').write_bytes((tmp_path / 'new/ara/1.jpg').read_bytes() + b'more')
    with pytest.raises(UserError, match='2 files are missing in .*new or have other sizes, the first: .*new/ara/0.jpg'):
        call('--move', museum, tmp_path / 'new')
    printed = call('--move', museum, tmp_path / 'new', '--confirm', '--update')
    assert '1 deleted images are removed; 2 changed or broken ones are embedded' in printed
    assert classes_of(embedded)['ara/1.jpg'] == 'ara'


# ---------------------------------------------------- classes ------------------------------------------------------
def test_labels_are_relative_to_the_folder_that_is_named(call, embedded, museum, tmp_path):
    call('--images', museum / 'loans', '--labels', 'folder')
    (tmp_path / 'labels.csv').write_text('path,label\n0.jpg,horse\n')
    call('--images', museum / 'zebra', '--labels', tmp_path / 'labels.csv')
    classes = classes_of(embedded)
    assert [classes[path] for path in ('ara/0.jpg', 'loans/ara/0.jpg', 'zebra/0.jpg', 'zebra/1.jpg')] == [
        'ara', 'ara', 'horse', 'zebra']


def test_classes_can_be_given_later_and_change_no_embedding(call, model, museum, tmp_path):
    call('--model', model, '--images', museum)
    features = load_data_base(tmp_path / 'museum.pth').test.features
    (tmp_path / 'labels.csv').write_text('path,label\nara/0.jpg,"parrot, red"\nara/1.jpg,"parrot, red"\n')
    assert '2 images have a new class' in call('--images', museum, '--labels', tmp_path / 'labels.csv')
    assert list(classes_of(tmp_path / 'museum.pth').values()) == ['parrot, red'] * 2 + [None] * 9
    assert torch.equal(load_data_base(tmp_path / 'museum.pth').test.features, features)


@pytest.mark.parametrize('source', ['folder', 'csv'])
def test_a_class_has_one_name_in_either_unicode_form(source, call, model, tmp_path):
    decomposed, composed = 'cafe\u0301', 'caf\u00e9'
    write_image(tmp_path / 'photos' / decomposed / '0.jpg', 1, 1)
    (tmp_path / 'labels.csv').write_text(f'path,label\n{decomposed}/0.jpg,{decomposed}\n', encoding='utf-8')
    call('--model', model, '--images', tmp_path / 'photos', '--labels',
         'folder' if source == 'folder' else tmp_path / 'labels.csv')
    assert load_data_base(tmp_path / 'museum.pth').class_names == [composed]


# ---------------------------------------------------- model --------------------------------------------------------
def test_another_model_is_refused(call, embedded, museum, tmp_path):
    other = make_model(tmp_path / 'other_model.pth', 1)
    with pytest.raises(UserError, match='--model: .* holds embeddings of another model'):
        call('--model', other, '--images', museum)
    write_image(museum / 'new.jpg', 1, 1)
    (tmp_path / 'museum_model.pth').write_bytes(other.read_bytes())
    with pytest.raises(UserError, match='museum_model.pth is not the model that embeds'):
        call('--images', museum)
    (tmp_path / 'museum_model.pth').unlink()
    with pytest.raises(UserError, match='museum_model.pth, is missing; name it with --model'):
        call('--images', museum)


@pytest.mark.parametrize('fault', ['nan', 'shape', 'number', 'size'])
def test_a_refused_model_does_not_stay_beside_the_data_base(call, model, museum, tmp_path, fault):
    contents = load(model)
    weight = contents['state_dict']['head.weight']
    if fault == 'size':
        contents['config']['image_size'] = 1
        contents['config']['backbone_type'] = 'inception'
    else:
        contents['state_dict']['head.weight'] = {'nan': weight * torch.nan, 'shape': weight[:, :3], 'number': 3}[fault]
    save(contents, tmp_path / 'bad_model.pth')
    with pytest.raises(UserError, match='bad_model.pth'):
        call('--model', tmp_path / 'bad_model.pth', '--images', museum)
    assert not (tmp_path / 'museum_model.pth').exists()
    assert '11 images of 1 folders' in call('--model', model, '--images', museum)


def test_the_data_base_of_a_run_is_not_added_to(call, embedded, museum, tmp_path):
    contents = load(embedded)
    save({key: value for key, value in contents.items() if key != 'folders'}, tmp_path / 'run.pth')
    with pytest.raises(UserError, match='run.pth belongs to a training run'):
        call('--images', museum, name='run.pth')


# ---------------------------------------------------- what it prints and writes -----------------------------------
def test_list_prints_paths_and_classes(call, embedded):
    first, *lines, last = call('--list').splitlines()
    assert 'broken.png' in first
    assert lines[0] == 'ara/0.jpg  ara'
    assert lines[7] == 'loose [1].jpg'
    assert last == f'{embedded}: 11 images of 1 folders'
    assert call('--list', 'loans').splitlines()[1:-1] == [f'loans/ara/{number}.jpg  loans' for number in range(3)]


def test_tables_contain_what_the_data_base_contains(call, embedded, museum, tmp_path):
    parquet = pytest.importorskip('pyarrow.parquet')
    call('--csv', tmp_path / 'm.csv', '--npy', tmp_path / 'm.npy', '--parquet', tmp_path / 'm.parquet')
    data_base = load_data_base(embedded)
    features = data_base.test.features.numpy()
    np.testing.assert_array_equal(np.load(tmp_path / 'm.npy'), features)
    table = parquet.read_table(tmp_path / 'm.parquet').to_pydict()
    np.testing.assert_array_equal(np.array(table['features'], dtype=np.float32), features)
    with open(tmp_path / 'm.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert table['image'] == [row['image'] for row in rows] == [f'{museum}/{path}' for path in data_base.test.images]
    assert table['class'] == [row['class'] for row in rows]
    assert [row['class'] for row in rows][6:9] == ['loans', '', 'zebra']
    np.testing.assert_allclose(np.array([[float(row[f'feature_{d}']) for d in range(DIM)] for row in rows]), features,
                               rtol=1e-6)


def test_a_long_csv_is_written_in_parts_with_one_header(call, embedded, tmp_path, monkeypatch):
    monkeypatch.setattr(embed, 'SAVED_EVERY', 4)
    call('--csv', tmp_path / 'm.csv')
    lines = (tmp_path / 'm.csv').read_text().splitlines()
    assert len(lines) == 12
    assert sum(line.startswith('image,class,feature_0') for line in lines) == 1


def test_tables_replace_no_file_without_overwrite_and_never_the_data_base(call, embedded, tmp_path):
    before = load(embedded)
    call('--npy', tmp_path / 'm.npy')
    with pytest.raises(UserError, match='m.npy exists already; add --overwrite'):
        call('--npy', tmp_path / 'm.npy')
    call('--npy', tmp_path / 'm.npy', '--overwrite')
    for words in (('--csv', embedded), ('--npy', tmp_path / 'museum_model.pth'),
                  ('--csv', tmp_path / 'x', '--npy', tmp_path / 'museum/../x')):
        with pytest.raises(UserError, match='is the data base, its model, or named twice'):
            call(*words, '--overwrite')
    assert differences(before, load(embedded)) == []
    assert not (tmp_path / 'x').exists()


@pytest.fixture
def drawn(monkeypatch) -> list:
    """Keep the rows of figures instead of drawing them."""
    kept = []

    def draw_rows(rows, target):
        kept.extend(rows)
        for suffix in ('.png', '.pdf'):
            target.with_suffix(suffix).write_text(MADE_HERE)
        return target.with_suffix('.png')

    monkeypatch.setattr('retrieval.figures.draw_rows', draw_rows)
    return kept


def test_duplicates_are_groups(call, model, museum, tmp_path, drawn):
    for name in ('copy.jpg', 'loans/copy.jpg'):
        shutil.copy(museum / 'zebra/2.jpg', museum / name)
    shutil.copy(museum / 'ara/0.jpg', museum / 'other.jpg')
    call('--model', model, '--images', museum)
    assert '5 images in 2 groups of at least 0.999999' in call('--duplicates', '0.999999')
    with open(tmp_path / 'museum_duplicates.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    groups = {number: {Path(row[column]).relative_to(museum).as_posix() for row in rows if row['group'] == number
                       for column in ('image', 'duplicate')} for number in ('1', '2')}
    assert groups == {'1': {'ara/0.jpg', 'other.jpg'}, '2': {'copy.jpg', 'loans/copy.jpg', 'zebra/2.jpg'}}
    assert [Path(row['image']).name for row in rows] == ['0.jpg', 'copy.jpg', 'copy.jpg']
    assert {row['similarity'] for row in rows} == {'1.000000'}
    assert [(row['note'], row['query'], [other['file'] for other in row['retrieved']]) for row in drawn] == [
        ('group 1', museum / 'ara/0.jpg', [museum / 'other.jpg']),
        ('group 2', museum / 'copy.jpg', [museum / 'loans/copy.jpg', museum / 'zebra/2.jpg'])]


@pytest.mark.slow
def test_duplicates_are_drawn(call, model, museum, tmp_path):
    shutil.copy(museum / 'zebra/2.jpg', museum / 'copy.jpg')
    call('--model', model, '--images', museum)
    call('--duplicates', '0.999999')
    call('--duplicates', '0.999999')  # replaces its own figure
    with Image.open(tmp_path / 'museum_duplicates.png') as image:
        assert image.width > image.height


def test_duplicates_of_similarity_zero_can_be_asked_for_and_replace_no_foreign_file(call, embedded, tmp_path, drawn):
    assert 'groups of at least 0: ' in call('--duplicates', '0')
    assert '0 images in 0 groups of at least 1: ' in call('--duplicates', '1')
    (tmp_path / 'museum_duplicates.csv').write_text('mine')
    with pytest.raises(UserError, match='museum_duplicates.csv exists, was not written'):
        call('--duplicates', '0.99')


# ---------------------------------------------------- mistakes -----------------------------------------------------
@pytest.mark.parametrize(('words', 'message'), [
    ([], 'nothing to do: add --images FOLDER'), (['--update', '--labels', 'folder'], '--labels folder has no effect'),
    (['--list', '--model', 'x.pth'], '--model x.pth has no effect without --images'),
    (['--update', '--overwrite'], '--overwrite has no effect'), (['--duplicates', '1.5'], '--duplicates 1.5'),
    (['--list', '--imges', 'x'], "--imges .*did you mean '--images'"),
    (['--list', '--batch_size', '0'], '--batch_size 0')])
def test_a_mistaken_command_line_is_refused(words, message):
    with pytest.raises(UserError, match=message):
        embed.get_args(['--data_base', 'm.pth', *words])


def test_a_data_base_has_a_suffix_and_must_exist_or_be_created(call, tmp_path):
    with pytest.raises(UserError, match='m.npy must end in .pth'):
        embed.get_args(['--data_base', 'm.npy', '--list'])
    with pytest.raises(UserError, match='there is no data base .*; create it with --images FOLDER'):
        call('--update')
    with pytest.raises(UserError, match='holds no images'):
        call('--images', tmp_path)


# ---------------------------------------------------- interruptions -----------------------------------------------
def test_an_interrupted_call_continues_and_ends_as_an_uninterrupted_one(call, model, museum, tmp_path, monkeypatch):
    monkeypatch.setattr(embed, 'SAVED_EVERY', 4)
    call('--model', model, '--images', museum, name='whole.pth')
    embed_batch, embedded = image_files.embed_batch, []

    def interrupted(model, images, *rest):
        embedded.append(len(images))
        if len(embedded) == 3:
            raise KeyboardInterrupt
        return embed_batch(model, images, *rest)

    monkeypatch.setattr(image_files, 'embed_batch', interrupted)
    with pytest.raises(KeyboardInterrupt, match='7 new images are saved; the same command continues'):
        call('--model', model, '--images', museum)
    assert len(list((tmp_path / 'museum.pth.parts').iterdir())) == 2
    assert '12 images, 4 to embed' in call('--model', model, '--images', museum)
    whole, resumed = load(tmp_path / 'whole.pth'), load(tmp_path / 'museum.pth')
    assert (whole['args'].pop('data_name'), resumed['args'].pop('data_name')) == ('whole', 'museum')
    assert differences(whole, resumed) == []


def test_two_calls_at_once_are_refused(call, embedded):
    with RunFiles.beside(embedded).locked('held'), pytest.raises(
            UserError, match='museum.pth: another process is changing it'):
        call('--update')


def test_temporary_files_of_a_killed_call_are_removed(call, model, museum, tmp_path):
    leftovers = [tmp_path / '.museum.pth.01234567', tmp_path / '.museum_model.pth.89abcdef']
    for file in leftovers:
        file.write_bytes(b'half')
    call('--model', model, '--images', museum)
    assert not any(file.exists() for file in leftovers)


@pytest.mark.slow
def test_a_killed_call_continues_and_ends_as_one_that_was_not_killed(call, model, museum, tmp_path, monkeypatch):
    monkeypatch.setattr(embed, 'SAVED_EVERY', 4)
    call('--model', model, '--images', museum, name='whole.pth')
    words = ['--data_base', tmp_path / 'museum.pth', '--num_workers', 0, '--model', model, '--images', museum]
    # Renamed are the model, then three parts, then the data base; a later call begins by merging what parts there are.
    for number, when, rows in ((3, 'before', 0), (2, 'after', 4), (1, 'after', 7)):
        code, printed = run_embed(words, tmp_path / 'log', (when, number))
        assert code == -signal.SIGKILL, printed
        file = tmp_path / 'museum.pth'
        assert (len(load_data_base(file).test.images) if file.exists() else 0) == rows, number
    call('--model', model, '--images', museum)
    whole, resumed = load(tmp_path / 'whole.pth'), load(tmp_path / 'museum.pth')
    del whole['args']['data_name'], resumed['args']['data_name']
    assert differences(whole, resumed) == []
    assert not (tmp_path / 'museum.pth.parts').exists()  # it existed when the last one was killed


@pytest.mark.slow
def test_ctrl_c_says_what_is_saved(museum, model, tmp_path):
    code, printed = run_embed(['--data_base', tmp_path / 'm.pth', '--num_workers', 0, '--model', model, '--images',
                               museum], tmp_path / 'log', ('send', signal.SIGINT))
    assert code == 130, printed
    assert 'stopped by Ctrl-C: 4 new images are saved; the same command continues' in printed


# ---------------------------------------------------- other scripts -----------------------------------------------
def test_test_py_retrieves_from_a_collection(call_script, call, model, museum, tmp_path, drawn):
    lookup = SimpleNamespace(**runpy.run_path(str(REPOSITORY / 'test.py')))  # the standard library has a `test`, too
    call('--model', model, '--images', museum)
    shutil.copytree(museum / 'ara', tmp_path / 'new/ara')
    call('--images', tmp_path / 'new')
    words = ('--data_base', tmp_path / 'museum.pth', '--results_dir', tmp_path, '--retrieval_num', 2)
    with pytest.raises(UserError, match=f'names 2 images.*{museum}/ara/0.jpg'):
        call_script(lookup, *words, '--query_img_name', 'ara/0.jpg')
    printed = call_script(lookup, *words, '--query_img_name', tmp_path / 'secret.jpg')
    assert 'secret.jpg (class unknown)' in printed
    assert '1  1.0000  ara/0.jpg' in printed  # the same photograph


def test_report_and_evaluate_read_a_collection_without_classes(call_script, call, model, museum, tmp_path):
    call('--model', model, '--images', museum)
    words = ('--data_base', tmp_path / 'museum.pth')
    call_script(report, *words, '--output', tmp_path / 'r.html', '--max_images', 11)
    html = (tmp_path / 'r.html').read_text()
    assert 'id="class-table"' not in html
    assert 'no class' in html
    with pytest.raises(UserError, match='no image of this data base has a class.*--labels'):
        call_script(evaluate, *words)


def test_images_without_a_class_are_neither_right_nor_wrong(embedded):
    data_base = load_data_base(embedded)
    features, labels = data_base.tensors()[:2]
    assert len(features) == len(labels) == 10
    ranks = rank_queries(data_base)['rank']
    assert ranks.isnan().tolist() == [path == 'loose [1].jpg' for path in data_base.test.images]
    loose = data_base.test.images.index('loose [1].jpg')
    for query, rank in enumerate(ranks.tolist()):
        if query != loose:
            neighbours = nearest_images(data_base.test.features[query], data_base, ('test', query), 11)
            is_positive = [bool(data_base.test.labels[index] == data_base.test.labels[query])
                           for index, _ in neighbours if index != loose]
            assert rank == is_positive.index(True)
