"""Any folder becomes a data base: what is in it, what changes it, and what cutting it off does to it."""
import csv
import json
import shutil
import signal
import threading
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_one_line_error, type_command
from faults import differences, run_embed, tamper
from PIL import Image
from raw_trees import write_image

import embed
from common.errors import UserError
from common.files import save
from common.images import load_image
from imagedata.folders import read_labels, scan_images
from imagedata.loading import make_transform
from model import EmbeddingNet, NetConfig
from retrieval.collection import FileCollection, Item, matching
from retrieval.database import load_data_base
from retrieval.metrics import similarity_of
from retrieval.model_file import load_model
from retrieval.nearest import ROWS_AT_ONCE, Nearest, pairs_above
from retrieval.search import nearest_images, rank_queries

SETTINGS = {'data_name': 'birds', 'crop_type': 'uncropped', 'batch_size': 4, 'resize_size': 36, 'amp': 'off',
            'recalls': [1, 2], 'run': 'birds_run'}


def make_model(file: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    network = EmbeddingNet(NetConfig('timm:resnet10t', 7, image_size=32), 'none')
    save({'config': asdict(network.config), 'state_dict': network.state_dict(), 'args': SETTINGS, 'epoch': 3,
          'seen_classes': ['trained']}, file)
    return file


@pytest.fixture(scope='module')
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp('model') / 'birds_run_model.pth', 0)


@pytest.fixture
def museum(tmp_path) -> Path:
    """A folder of 11 images in three folders, two of them beside each other by name only, and what is no image."""
    folder = tmp_path / 'museum'
    for label, (name, count) in enumerate((('ara', 4), ('zebra', 3), ('loans/ara', 3))):
        for number in range(count):
            write_image(folder / name / f'{number}.jpg', label, number)
    write_image(folder / 'loose [1].jpg', 4, 0)
    (folder / 'notes.txt').write_text('x')
    (folder / 'broken.png').write_bytes(b'no image')
    write_image(folder / '.hidden/0.jpg', 0, 0)
    (tmp_path / 'secret.jpg').write_bytes((folder / 'ara/0.jpg').read_bytes())
    (folder / 'link.jpg').symlink_to(tmp_path / 'secret.jpg')
    return folder


@pytest.fixture
def call(monkeypatch, capsys, tmp_path, model):
    """Call embed.py in this process on museum.pth; returns what it printed."""
    def call_embed(*words, name='museum.pth'):
        args = embed.get_args(['--data_base', str(tmp_path / name), '--num_workers', '0', *map(str, words)])
        embed.main(args)
        return capsys.readouterr().out
    return call_embed


def load(path):
    return torch.load(path, weights_only=True)


# ---------------------------------------------------- what it makes --------------------------------------------------
def test_a_folder_becomes_a_data_base_with_the_models_own_embeddings(call, museum, model, tmp_path):
    printed = call('--model', model, '--images', museum, '--labels', 'folder')
    assert '12 images, 12 to embed; left out: 1 links out of the folder, 1 .txt' in printed
    assert f'1 images cannot be read and are left out: {museum}/broken.png' in printed
    base = load_data_base(tmp_path / 'museum.pth')
    assert base.test.images == ['ara/0.jpg', 'ara/1.jpg', 'ara/2.jpg', 'ara/3.jpg', 'loans/ara/0.jpg',
                                'loans/ara/1.jpg', 'loans/ara/2.jpg', 'loose [1].jpg', 'zebra/0.jpg', 'zebra/1.jpg',
                                'zebra/2.jpg']
    assert [base.class_of(label) for label in base.test.labels.tolist()] == [
        *['ara'] * 4, *['loans'] * 3, None, *['zebra'] * 3]
    assert base.sources.folders == [str(museum)]
    network = load_model(model, torch.device('cpu'))[0]
    transform = make_transform(False, 32, 36, network.interpolation)
    with torch.inference_mode():
        expected = torch.cat([network(transform(load_image(museum / path))[None]) for path in base.test.images])
    torch.testing.assert_close(base.test.features, expected, atol=1e-6, rtol=0)
    assert (tmp_path / 'museum_model.pth').read_bytes() == model.read_bytes()
    assert not (tmp_path / 'museum.pth.parts').exists()


def test_float16_halves_the_features_and_moves_a_similarity_by_little(call, museum, model, tmp_path):
    call('--model', model, '--images', museum)
    fine = load_data_base(tmp_path / 'museum.pth').test.features
    call('--dtype', 'float16')
    half = load_data_base(tmp_path / 'museum.pth').test.features
    assert half.dtype == torch.float16
    assert (similarity_of(half, half) - similarity_of(fine, fine)).abs().max() < 5e-4


def test_adding_twice_is_adding_once_and_only_what_changed_is_computed_again(call, museum, model, tmp_path):
    call('--model', model, '--images', museum)
    before = load(tmp_path / 'museum.pth')
    assert '12 images, 0 to embed' in call('--images', museum)  # nor is the broken one tried again
    assert differences(before, load(tmp_path / 'museum.pth')) == []
    write_image(museum / 'ara/1.jpg', 5, 9)
    write_image(museum / 'new.jpg', 6, 1)
    assert '13 images, 2 to embed' in call('--images', museum)
    after = load_data_base(tmp_path / 'museum.pth')
    assert sorted(after.test.images) == sorted([*before['test_images'], 'new.jpg'])
    for row, path in enumerate(before['test_images']):
        same = torch.equal(before['test_features'][row], after.test.features[after.test.images.index(path)])
        assert same == (path != 'ara/1.jpg')


@pytest.mark.parametrize('words', [('--update',), ('--images',)])
def test_an_image_that_became_unreadable_is_in_the_data_base_no_more(words, call, museum, model, tmp_path):
    call('--model', model, '--images', museum)
    (museum / 'ara/1.jpg').write_bytes(b'no image any more')
    printed = call(*words, *([museum] if words == ('--images',) else []))
    assert f'2 images cannot be read and are left out: {museum}/' in printed
    base = load_data_base(tmp_path / 'museum.pth')
    assert 'ara/1.jpg' not in base.test.images
    assert len(base.test.images) == len(base.test.features) == 10
    write_image(museum / 'ara/1.jpg', 5, 9)
    call('--images', museum)
    assert 'ara/1.jpg' in load_data_base(tmp_path / 'museum.pth').test.images


def test_several_folders_are_told_apart(call, museum, model, tmp_path):
    shutil.copytree(museum / 'ara', tmp_path / 'new/ara')
    call('--model', model, '--images', museum)
    call('--images', tmp_path / 'new')
    base = load_data_base(tmp_path / 'museum.pth')
    assert base.sources.folders == [str(museum), str(tmp_path / 'new')]
    assert base.test.images.count('ara/0.jpg') == 2
    words = ('test.py', '--data_base', tmp_path / 'museum.pth', '--results_dir', tmp_path, '--retrieval_num', 2)
    assert_one_line_error(type_command(*words, '--query_img_name', 'ara/0.jpg'), 'names 2 images',
                          f'{museum}/ara/0.jpg')
    result = type_command(*words, '--query_img_name', tmp_path / 'new/ara/0.jpg')
    assert result.returncode == 0, result.stderr
    assert '1  1.0000  ara/0.jpg' in result.stdout


def test_a_folder_below_a_known_one_keeps_its_paths_and_one_above_is_refused(call, museum, model, tmp_path):
    call('--model', model, '--images', museum)
    write_image(museum / 'ara/late.jpg', 3, 3)
    assert '5 images, 1 to embed' in call('--images', museum / 'ara')
    base = load_data_base(tmp_path / 'museum.pth')
    assert base.test.images[-1] == 'ara/late.jpg'
    assert base.sources.folders == [str(museum)]
    with pytest.raises(UserError, match='holds .*museum, which is in the data base already'):
        call('--images', tmp_path)


def test_images_are_removed_by_path_folder_or_pattern(call, museum, model, tmp_path):
    call('--model', model, '--images', museum)
    assert '3 images removed' in call('--remove', 'loans')
    assert '1 images removed' in call('--remove', 'loose [1].jpg')
    assert '2 images removed' in call('--remove', 'ara/[01].jpg')
    base = load_data_base(tmp_path / 'museum.pth')
    assert base.test.images == ['ara/2.jpg', 'ara/3.jpg', 'zebra/0.jpg', 'zebra/1.jpg', 'zebra/2.jpg']
    assert len(base.test.features) == 5
    with pytest.raises(UserError, match="--remove nothing fits none of the 5 images"):
        call('--remove', 'nothing')
    call('--remove', '*')
    assert not (tmp_path / 'museum.pth').exists()


def test_update_embeds_what_changed_and_removes_what_vanished(call, museum, model, tmp_path):
    call('--model', model, '--images', museum, '--labels', 'folder')
    write_image(museum / 'zebra/0.jpg', 1, 7)
    (museum / 'zebra/1.jpg').unlink()
    write_image(museum / 'broken.png', 2, 2)
    printed = call('--update')
    assert '1 images have vanished and are removed, 2 have changed or were broken' in printed
    base = load_data_base(tmp_path / 'museum.pth')
    assert base.test.images[-2:] == ['zebra/0.jpg', 'broken.png']
    assert base.class_of(int(base.test.labels[-2])) == 'zebra'
    assert base.sources.broken == {}
    shutil.move(museum, tmp_path / 'away')
    with pytest.raises(UserError, match='museum is not there'):  # a disk that is not mounted empties nothing
        call('--update')
    assert len(load_data_base(tmp_path / 'museum.pth').test.images) == 11


def test_an_image_that_was_broken_for_a_while_keeps_its_class(call, museum, model, tmp_path):
    call('--model', model, '--images', museum, '--labels', 'folder')
    repaired = (museum / 'zebra/0.jpg').read_bytes()

    def classes_and_broken():
        base = load_data_base(tmp_path / 'museum.pth')
        classes = dict(zip(base.test.images, map(base.class_of, base.test.labels.tolist()), strict=True))
        return classes.get('zebra/0.jpg'), f'{museum}/zebra/0.jpg' in base.sources.broken

    for mend in (['--update'], ['--images', museum]):
        assert classes_and_broken() == ('zebra', False)
        (museum / 'zebra/0.jpg').write_bytes(b'half of it')
        call('--update')
        assert classes_and_broken() == (None, True)
        (museum / 'zebra/0.jpg').write_bytes(repaired)
        call(*mend)
    assert classes_and_broken() == ('zebra', False)


def test_what_update_finds_changed_is_embedded_once_and_not_where_it_is_removed(call, museum, model, tmp_path):
    call('--model', model, '--images', museum)
    for path in ('ara/0.jpg', 'zebra/0.jpg'):
        write_image(museum / path, 6, 6)
    assert '\n2 images in ' in call('--update', '--remove', 'ara', '--images', museum / 'zebra')  # and broken.png
    paths = load_data_base(tmp_path / 'museum.pth').test.images
    assert not [path for path in paths if path.startswith('ara/')]
    assert paths.count('zebra/0.jpg') == 1


def test_labels_are_those_below_the_folder_that_is_named(call, museum, model, tmp_path):
    call('--model', model, '--images', museum, '--labels', 'folder')
    call('--images', museum / 'loans', '--labels', 'folder')
    (tmp_path / 'labels.csv').write_text('path,label\n0.jpg,horse\n')
    call('--images', museum / 'zebra', '--labels', tmp_path / 'labels.csv')
    base = load_data_base(tmp_path / 'museum.pth')
    labels = dict(zip(base.test.images, map(base.class_of, base.test.labels.tolist()), strict=True))
    assert [labels[path] for path in ('ara/0.jpg', 'loans/ara/0.jpg', 'zebra/0.jpg', 'zebra/1.jpg')] == [
        'ara', 'ara', 'horse', 'zebra']


def test_classes_come_from_a_csv_and_can_be_given_later(call, museum, model, tmp_path):
    call('--model', model, '--images', museum)
    features = load_data_base(tmp_path / 'museum.pth').test.features
    (tmp_path / 'labels.csv').write_text('path,label\nara/0.jpg,"parrot, red"\nara/1.jpg,"parrot, red"\nno.jpg,x\n')
    printed = call('--images', museum, '--labels', tmp_path / 'labels.csv')
    assert '2 images have another class now' in printed
    assert 'labels.csv name no image of the folder, or no class, the first: no.jpg' in printed
    base = load_data_base(tmp_path / 'museum.pth')
    assert [base.class_of(label) for label in base.test.labels.tolist()] == ['parrot, red'] * 2 + [None] * 9
    assert torch.equal(base.test.features, features)
    for text in ('a,b\n1,2\n', '', 'path,label\nno.jpg,x\n'):
        (tmp_path / 'labels.csv').write_text(text)
        with pytest.raises(UserError, match='--labels .*labels.csv'):
            read_labels(str(tmp_path / 'labels.csv'), base.test.images, str(museum))


def test_another_model_is_refused(call, museum, model, tmp_path):
    call('--model', model, '--images', museum)
    other = make_model(tmp_path / 'other_model.pth', 1)
    with pytest.raises(UserError, match='--model: .* another model embedded'):
        call('--model', other, '--images', museum)
    (tmp_path / 'museum_model.pth').write_bytes(other.read_bytes())
    write_image(museum / 'new.jpg', 1, 1)
    with pytest.raises(UserError, match='museum_model.pth is not the model that embedded'):
        call('--images', museum)


def test_what_other_tools_read_is_what_the_data_base_holds(call, museum, model, tmp_path):
    parquet = pytest.importorskip('pyarrow.parquet')
    call('--model', model, '--images', museum, '--labels', 'folder')
    call('--csv', tmp_path / 'm.csv', '--npy', tmp_path / 'm.npy', '--parquet', tmp_path / 'm.parquet')
    base = load_data_base(tmp_path / 'museum.pth')
    features = base.test.features.numpy()
    np.testing.assert_array_equal(np.load(tmp_path / 'm.npy'), features)
    table = parquet.read_table(tmp_path / 'm.parquet').to_pydict()
    np.testing.assert_array_equal(np.array(table['features'], dtype=np.float32), features)
    with open(tmp_path / 'm.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert table['image'] == [row['image'] for row in rows] == [f'{museum}/{path}' for path in base.test.images]
    assert [row['class'] for row in rows][6:9] == ['loans', '', 'zebra']
    np.testing.assert_allclose(np.array([[float(row[f'feature_{d}']) for d in range(7)] for row in rows]), features,
                               rtol=1e-6)
    with pytest.raises(UserError, match='m.npy is there already; add --overwrite'):
        call('--npy', tmp_path / 'm.npy')


def test_pairs_of_any_positive_similarity_can_be_asked_for(call, museum, model):
    call('--model', model, '--images', museum)
    assert 'pairs of at least 0 in ' in call('--duplicates', '0')


def test_duplicates_are_pairs_and_a_sheet(call, museum, model, tmp_path):
    for name in ('copy.jpg', 'loans/copy.jpg'):
        shutil.copy(museum / 'zebra/2.jpg', museum / name)
    call('--model', model, '--images', museum)
    assert '3 pairs of at least 0.999999 in 1 groups' in call('--duplicates', '0.999999')
    with open(tmp_path / 'museum_duplicates.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    names = {str(museum / name) for name in ('zebra/2.jpg', 'copy.jpg', 'loans/copy.jpg')}
    assert {row['image'] for row in rows} | {row['duplicate'] for row in rows} == names
    with Image.open(tmp_path / 'museum_duplicates.png') as image:
        assert image.width > image.height
    (tmp_path / 'museum_duplicates.csv').write_text('mine')
    with pytest.raises(UserError, match='museum_duplicates.csv is there, was not written'):
        call('--duplicates', '0.99')


@pytest.mark.parametrize(('words', 'parts'), [
    ([], ['nothing to do']), (['--images', 'nowhere'], ['there is no data base', '--model']),
    (['--update', '--labels', 'folder'], ['--labels folder has no effect without --images']),
    (['--update', '--overwrite'], ['--overwrite']), (['--duplicates', '1.5'], ['--duplicates 1.5']),
    (['--list', '--imges', 'x'], ['--imges', "'--images'"])])
def test_what_cannot_be_done_is_one_line(tmp_path, words, parts):
    assert_one_line_error(type_command('embed.py', '--data_base', tmp_path / 'm.pth', *words), *parts)


def test_the_data_base_of_a_run_is_not_added_to(call, museum, model, tmp_path):
    call('--model', model, '--images', museum)
    contents = load(tmp_path / 'museum.pth')
    save({key: value for key, value in contents.items() if key != 'folders'}, tmp_path / 'run.pth')
    with pytest.raises(UserError, match='run.pth is that of a run'):
        call('--images', museum, name='run.pth')


# ---------------------------------------------------- what is cut off -----------------------------------------------
def test_a_call_that_is_killed_goes_on_and_ends_as_one_that_was_not(call, museum, model, tmp_path, monkeypatch):
    monkeypatch.setattr(embed, 'SAVED_EVERY', 4)
    call('--model', model, '--images', museum, name='whole.pth')
    words = ['--data_base', tmp_path / 'museum.pth', '--num_workers', 0, '--model', model, '--images', museum]
    # Renamed are the model, then three parts, then the data base; a later call begins by joining what parts there are.
    for number, when, rows in ((3, 'before', 0), (2, 'after', 4), (1, 'after', 7)):
        code, printed = run_embed(words, tmp_path / 'log', (when, number))
        assert code == -signal.SIGKILL, printed
        base = tmp_path / 'museum.pth'
        assert (len(load_data_base(base).test.images) if base.exists() else 0) == rows, number
    call('--model', model, '--images', museum)
    whole, mine = load(tmp_path / 'whole.pth'), load(tmp_path / 'museum.pth')
    assert mine['args'].pop('data_name') == 'museum'
    assert whole['args'].pop('data_name') == 'whole'
    assert differences(whole, mine) == []
    assert not (tmp_path / 'museum.pth.parts').exists()  # it was there when the last one was killed


def test_ctrl_c_says_what_is_kept(museum, model, tmp_path):
    code, printed = run_embed(['--data_base', tmp_path / 'm.pth', '--num_workers', 0, '--model', model, '--images',
                               museum], tmp_path / 'log', ('send', signal.SIGINT))
    assert code == 130, printed
    assert 'stopped by Ctrl-C: 4 new images are kept; the same call goes on' in printed


def test_two_calls_at_once_are_refused(call, museum, model, tmp_path, monkeypatch):
    call('--model', model, '--images', museum)
    seen = []

    def second(*_):
        thread = threading.Thread(target=lambda: seen.append(type_command(
            'embed.py', '--data_base', tmp_path / 'museum.pth', '--update')))
        thread.start()
        thread.join()

    monkeypatch.setattr(embed, 'change', second)
    call('--update')
    assert_one_line_error(seen[0], 'museum.pth: another process is at work on it')


# ---------------------------------------------------- other scripts -------------------------------------------------
def test_test_and_report_and_evaluate_read_a_collection_without_classes(call, museum, model, tmp_path):
    call('--model', model, '--images', museum)
    base = ('--data_base', tmp_path / 'museum.pth')
    result = type_command('test.py', *base, '--results_dir', tmp_path, '--query_img_name', tmp_path / 'secret.jpg',
                          '--retrieval_num', 3)
    assert result.returncode == 0, result.stderr
    assert 'secret.jpg (class unknown)' in result.stdout
    found = json.loads((tmp_path / 'secret/retrieval.json').read_text())['answers'][0]['retrieved']
    assert found[0]['image'] == 'ara/0.jpg'  # the same photograph
    assert found[0]['similarity'] == pytest.approx(1, abs=1e-5)
    assert {answer['correct'] for answer in found} == {None}
    result = type_command('report.py', *base, '--output', tmp_path / 'r.html', '--max_images', 11)
    assert result.returncode == 0, result.stderr
    html = (tmp_path / 'r.html').read_text()
    assert 'id="class-table"' not in html
    assert html.count('no class') >= 1
    assert_one_line_error(type_command('evaluate.py', *base), 'no image of this data base has a class', '--labels')


def test_images_without_a_class_are_neither_right_nor_wrong(call, museum, model, tmp_path):
    call('--model', model, '--images', museum, '--labels', 'folder')
    base = load_data_base(tmp_path / 'museum.pth')
    features, labels = base.tensors()[:2]
    assert len(features) == len(labels) == 10
    ranked = rank_queries(base)
    assert ranked['rank'].isnan().tolist() == [path == 'loose [1].jpg' for path in base.test.images]
    loose = base.test.images.index('loose [1].jpg')
    for query, rank in enumerate(ranked['rank'].tolist()):
        if query != loose:
            others = [index for index, _ in nearest_images(base.test.features[query], base, ('test', query), 11)
                      if index != loose]
            assert rank == [bool(base.test.labels[index] == base.test.labels[query]) for index in others].index(True)


# ---------------------------------------------------- parts ---------------------------------------------------------
@pytest.mark.parametrize('dtype', [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize('resident', [False, True])
def test_the_nearest_rows_are_those_of_the_whole_product(dtype, resident, monkeypatch):
    monkeypatch.setattr('engine.nearest.bfloat16_is_fast', lambda device: True)
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(ROWS_AT_ONCE + 500, 9, generator=generator), dim=1)
    features[ROWS_AT_ONCE - 5:ROWS_AT_ONCE + 5] = features[3]  # equals, on both sides of a block
    features[7] = torch.nan
    queries = torch.nn.functional.normalize(torch.randn(40, 9, generator=generator), dim=1)
    queries[0], queries[1] = features[3], torch.nan
    features = features.to(dtype)
    nearest = Nearest(features, resident)
    for binary in (False, True):
        found = nearest.search(queries, 13, binary)
        assert found[1] == []
        for query in (0, *range(2, 40)):
            similarity = similarity_of(queries[query][None], features, binary)[0]
            similarity = similarity.nan_to_num(nan=-1.0)
            order = similarity.argsort(descending=True, stable=True)[:13]
            assert found[query] == list(zip(order.tolist(), similarity[order].tolist(), strict=True))
    assert len(nearest.search(queries, 10**6)[2]) == len(features) - 1


def test_pairs_above_a_similarity_are_all_of_them(monkeypatch):
    monkeypatch.setattr('engine.nearest.TILE_SIDE', {'cpu': 64})
    features = torch.nn.functional.normalize(torch.randn(150, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    features[140] = features[2]
    similarity = similarity_of(features, features)
    for threshold in (0.9, similarity[3, 7].item(), -0.5):
        expected = {(one, other): similarity[one, other].item() for one in range(150) for other in range(one + 1, 150)
                    if similarity[one, other] >= threshold}
        found = pairs_above(features, threshold)
        assert {pair[:2]: pair[2] for pair in found} == expected
        assert [pair[2] for pair in found] == sorted(expected.values(), reverse=True)


def test_a_pattern_means_a_path_a_folder_or_letters(museum):
    items = [Item('/photos', path, '', 0, 0) for path in ('a/x.jpg', 'ab/x.jpg', 'a[1].jpg', 'b/a/x.jpg')]
    for pattern, expected in (('a', ['a/x.jpg']), ('a*', ['a/x.jpg', 'ab/x.jpg', 'a[1].jpg']), ('a/', ['a/x.jpg']),
                              ('a[1].jpg', ['a[1].jpg']), ('/photos/a?/*', ['ab/x.jpg']), ('x.jpg', [])):
        assert [item.path for item in matching(items, [pattern])] == expected, pattern


def test_a_folder_that_cannot_be_read_is_not_taken_for_an_empty_one(museum, monkeypatch):
    def walk(folder, onerror):
        onerror(PermissionError(13, 'Permission denied', f'{folder}/locked'))
        return []

    monkeypatch.setattr('os.walk', walk)
    with pytest.raises(UserError, match='locked cannot be read'):
        scan_images(museum)


def test_links_to_folders_are_counted_and_not_followed(call, museum, model, tmp_path):
    write_image(tmp_path / 'elsewhere/0.jpg', 1, 1)
    (museum / 'elsewhere').symlink_to(tmp_path / 'elsewhere')
    assert '12 images, 12 to embed; left out: 1 links to folders, 1 links out' in call(
        '--model', model, '--images', museum)


def test_copies_of_a_conversion_are_no_images_of_their_own(call, model, tmp_path):
    for label in 'abcd':
        for number in range(2):
            write_image(tmp_path / 'own' / label / f'{number}.jpg', ord(label), number)
    assert type_command('data_utils.py', '--data_path', tmp_path, '--data_name', 'own').returncode == 0
    printed = call('--model', model, '--images', tmp_path / 'own', '--labels', 'folder')
    assert '8 images, 8 to embed; left out: 8 copies in uncropped/' in printed
    assert load_data_base(tmp_path / 'museum.pth').class_names == list('abcd')
    assert '8 images, 8 to embed' in call('--model', model, '--images', tmp_path / 'own/uncropped', name='copies.pth')


@pytest.mark.parametrize('named_by', ['folder', 'csv'])
def test_classes_have_one_name_in_whatever_form_of_unicode_it_is_written(named_by, call, model, tmp_path):
    written, name = 'cafe\u0301', 'caf\u00e9'
    write_image(tmp_path / 'own' / written / '0.jpg', 1, 1)
    (tmp_path / 'labels.csv').write_text(f'path,label\n{written}/0.jpg,{written}\n', encoding='utf-8')
    call('--model', model, '--images', tmp_path / 'own', '--labels',
         'folder' if named_by == 'folder' else tmp_path / 'labels.csv')
    assert load_data_base(tmp_path / 'museum.pth').class_names == [name]


def test_a_first_call_that_finds_no_images_keeps_no_model(call, museum, model, tmp_path):
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match='holds no images'):
        call('--model', make_model(tmp_path / 'other_model.pth', 1), '--images', tmp_path / 'empty')
    assert '11 images of 1 folders' in call('--model', model, '--images', museum)


def test_what_a_killed_call_has_half_written_is_removed(call, museum, model, tmp_path):
    left = [tmp_path / '.museum.pth.01234567', tmp_path / '.museum_model.pth.89abcdef']
    for file in left:
        file.write_bytes(b'half')
    call('--model', model, '--images', museum)
    assert not any(file.exists() for file in left)


def test_an_export_replaces_neither_the_data_base_nor_another_export(call, museum, model, tmp_path):
    call('--model', model, '--images', museum)
    before = load(tmp_path / 'museum.pth')
    for words in (('--csv', tmp_path / 'museum.pth'), ('--npy', tmp_path / 'museum_model.pth'),
                  ('--csv', tmp_path / 'x', '--npy', tmp_path / 'museum/../x')):
        with pytest.raises(UserError, match='is the data base, its model, or named twice'):
            call(*words, '--overwrite')
    assert differences(before, load(tmp_path / 'museum.pth')) == []
    assert not (tmp_path / 'x').exists()


def test_what_could_not_be_read_is_forgotten_with_its_folder(call, museum, model, tmp_path):
    (museum / 'ara/bad.jpg').write_bytes(b'no image')
    call('--model', model, '--images', museum)
    assert '4 images removed, 1 that cannot be read are forgotten' in call('--remove', 'ara')
    write_image(museum / 'ara/bad.jpg', 1, 1)
    call('--update')
    assert not [path for path in load_data_base(tmp_path / 'museum.pth').test.images if path.startswith('ara')]
    assert '0 images removed, 1 that cannot be read are forgotten' in call('--remove', 'broken.png')
    assert load_data_base(tmp_path / 'museum.pth').sources.broken == {}


def test_damaged_parts_and_those_of_another_model_are_refused(call, museum, model, tmp_path):
    call('--model', model, '--images', museum)
    base = load_data_base(tmp_path / 'museum.pth')
    collection = FileCollection(tmp_path / 'museum.pth')
    collection.add([Item('/x', 'y.jpg', '', 1, 1)], base.test.features[:1])
    part = tmp_path / 'museum.pth.parts/00000000.pth'
    good = load(part)
    for name, value in (('fingerprint', 'other'), ('images', ['../y.jpg']), ('sizes', ['1']), ('features', None),
                        ('features', torch.zeros(1, 3)), ('broken', {'x': 1}), ('times', [])):
        save({**good, name: value}, part)
        with pytest.raises(UserError, match=r'museum\.pth\.parts'):
            FileCollection(tmp_path / 'museum.pth')
    save(good, part)
    assert [item.path for item in FileCollection(tmp_path / 'museum.pth').items()][-1] == 'y.jpg'


def test_no_tampered_collection_or_part_ends_in_anything_but_success_or_one_line(call, museum, model, tmp_path):
    call('--model', model, '--images', museum, '--labels', 'folder')
    file, part = tmp_path / 'tampered.pth', tmp_path / 'museum.pth.parts/00000000.pth'
    base = load(tmp_path / 'museum.pth')
    query = base['test_features'][:1].clone()
    FileCollection(tmp_path / 'museum.pth').add([Item('/x', 'y.jpg', 'a', 1, 1)], query, {'b': [1, 1]})
    good_part = load(part)
    part.unlink()

    def read(collection) -> None:
        list(collection.items())
        for binary in (False, True):
            collection.search(query, 20, binary)
        collection.find('ara', 5)

    def of_file(contents) -> None:
        torch.save(contents, file)
        read(FileCollection(file))

    def of_part(contents) -> None:
        shutil.copy(tmp_path / 'museum.pth', file)
        (tmp_path / 'tampered.pth.parts').mkdir(exist_ok=True)
        torch.save(contents, tmp_path / 'tampered.pth.parts/00000000.pth')
        read(FileCollection(file))

    faults = tamper({'collection': (base, of_file), 'part': (good_part, of_part)}, 150, np.random.default_rng(5))
    assert not faults
