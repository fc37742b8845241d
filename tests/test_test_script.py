"""test.py: which image a query names, what it retrieves, and what the figures and files show."""
import importlib.util
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, call_main
from PIL import Image
from raw_trees import make_own, write_image
from shop import NAMES, RUN, make_shop

import data_utils
import evaluate
from common.errors import UserError
from retrieval.database import load_data_base, open_data_base
from retrieval.search import choose_queries, nearest_images, rank_queries
from utils import DEFAULT_DATA_BASE

NAME = 'car_timm-test_resnet_balanced_proxy_16'
FRAME_COLOURS = {True: (0, 158, 115), False: (213, 94, 0), None: (153, 153, 153)}


def load_script():
    """Import test.py under another name: `test` is a package of Python's own."""
    spec = importlib.util.spec_from_file_location('test_script', REPOSITORY / 'test.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


test_script = load_script()


@pytest.fixture
def real_figures():
    """Ask for real figures in a test, see `quick_figures`."""


@pytest.fixture(autouse=True)
def quick_figures(request, monkeypatch):
    """Write empty figures, which would take a second each to draw, except in tests that ask for `real_figures`."""
    def draw(_answers, target: Path) -> Path:
        for file in (target, target.with_suffix('.pdf')):
            file.write_bytes(b'')
        return target

    if 'real_figures' not in request.fixturenames:
        monkeypatch.setattr(test_script, 'draw_rows', draw)


@pytest.fixture
def look_up(trained_run, raw_sets, tmp_path, call_script):
    """Look a query up in the data base of the trained run; files go to tmp_path. Returns what is printed."""
    def call(*words) -> str:
        return call_script(test_script, '--data_base', trained_run / f'{NAME}_data_base.pth', '--data_path', raw_sets,
                           '--results_dir', tmp_path, *words)
    return call


def answers_in(folder: Path) -> list[dict]:
    """Return the answers that retrieval.json in a folder holds."""
    return json.loads((folder / 'retrieval.json').read_text())['answers']


# ---------------------------------------------------- queries ------------------------------------------------------
def test_the_published_retrieval_command_runs_after_the_default_training(run, raw_sets, real_figures, call_script):
    (run / f'{NAME}_data_base.pth').rename(run / DEFAULT_DATA_BASE)
    words = ('--retrieval_num', '10')  # as two of the published pages print it
    call_script(test_script, *words, '--data_path', raw_sets, '--results_dir', run)
    names = sorted(path.name for path in (run / '008055').iterdir())
    assert names[0] == 'query_img.jpg'
    assert len([name for name in names if re.fullmatch(r'retrieval_img_\d+_-?\d\.\d{4}\.jpg', name)]) == 10
    assert {'top10.png', 'top10.pdf'} < set(names)


@pytest.mark.parametrize('query', ['uncropped/000014.jpg', '000014.jpg', '{0}/car/uncropped/000014.jpg',
                                   '{0}/../{1}/car/uncropped/000014.jpg', '{0}/car/car_ims/000014.jpg', '000014'])
def test_a_query_is_named_by_path_file_name_absolute_path_or_raw_photograph(trained_run, raw_sets, query):
    opened = open_data_base(str(trained_run / f'{NAME}_data_base.pth'), 'results', str(raw_sets))
    query = query.format(raw_sets, raw_sets.name)
    if query == '000014':  # a file name without its suffix is not one
        with pytest.raises(UserError, match="is neither .*; did you mean '000014.jpg'"):
            test_script.find_query(query, opened)
        return
    subset, index = test_script.find_query(query, opened)
    assert opened.data_base.subsets[subset].images[index] == 'uncropped/000014.jpg'


@pytest.mark.parametrize(('words', 'parts'), [
    (('--query_img_name', '000041.jpg'), ('neither an image', 'did you mean')),
    (('--query_img_name', 'a\nb'), ('--query_img_name a', 'is neither')),
    (('--query_img_name', '000014.jpg', '--retrieval_num', 12), ('--retrieval_num 12', '11 images')),
    (('--retrieval_num', 0), ('--retrieval_num 0 must be at least 1',))])
def test_a_query_that_cannot_be_answered_is_an_error(look_up, words, parts):
    with pytest.raises(UserError) as error:
        look_up(*words)
    assert all(part in str(error.value) for part in parts), error.value


def test_a_link_out_of_the_data_set_is_not_followed(trained_run, own_car, tmp_path, call_script):
    image = load_data_base(trained_run / f'{NAME}_data_base.pth').test.images[0]
    (tmp_path / 'secret.jpg').write_bytes(b'secret')
    (own_car / 'car' / image).unlink()
    os.symlink(tmp_path / 'secret.jpg', own_car / 'car' / image)
    with pytest.raises(UserError, match=f'{image} is a link out of'):
        call_script(test_script, '--data_base', trained_run / f'{NAME}_data_base.pth', '--data_path', own_car,
                    '--results_dir', tmp_path, '--query_img_name', image)


# ---------------------------------------------------- retrieval ----------------------------------------------------
@pytest.mark.parametrize('binary', [False, True])
def test_images_are_retrieved_in_the_order_of_their_similarity(look_up, trained_run, tmp_path, binary):
    printed = look_up('--query_img_name', '000014.jpg', '--retrieval_num', 11, *(['--binary'] if binary else []))
    assert printed.startswith('000014.jpg (Maker Model 99):')
    data_base = load_data_base(trained_run / f'{NAME}_data_base.pth')
    images, labels, features = data_base.test
    features, index = features.double(), images.index('uncropped/000014.jpg')
    similarity = features @ features[index]
    if binary:
        similarity = ((features >= 0) == (features[index] >= 0)).double().mean(1)
    (answer,) = answers_in(tmp_path / '000014')
    assert sorted(hit['image'] for hit in answer['retrieved']) == sorted(set(images) - {'uncropped/000014.jpg'})
    expected = similarity[torch.arange(12) != index].sort(descending=True).values.tolist()
    assert [hit['similarity'] for hit in answer['retrieved']] == pytest.approx(expected, abs=1e-6)
    for hit in answer['retrieved']:
        position = images.index(hit['image'])
        assert hit['similarity'] == pytest.approx(similarity[position].item(), abs=1e-6)
        assert hit['correct'] == (labels[position] == labels[index])
        assert hit['class'] == data_base.class_names[labels[position]]


def test_frames_are_green_for_the_class_red_for_others_and_grey_if_it_is_unknown(look_up, real_figures, tmp_path):
    photograph = tmp_path / 'my photo.png'
    write_image(photograph, 50, 1, 'L')
    look_up('--query_img_name', '000014.jpg', photograph, '--retrieval_num', 4)
    for folder in ('000014', 'my photo'):
        (answer,) = answers_in(tmp_path / folder)
        assert (answer['class'] is None) == (folder == 'my photo')
        assert {hit['correct'] for hit in answer['retrieved']} == ({None} if folder == 'my photo' else {True, False})
        for rank, hit in enumerate(answer['retrieved'], start=1):
            with Image.open(tmp_path / folder / f'retrieval_img_{rank}_{hit["similarity"]:.4f}.jpg') as image:
                frame = image.getpixel((2, image.height // 2))
            assert frame == pytest.approx(FRAME_COLOURS[hit['correct']], abs=12)
    with Image.open(tmp_path / '000014_and_1_more/top4.png') as both, Image.open(tmp_path / '000014/top4.png') as one:
        assert both.height > 1.8 * one.height  # a row for each query


def test_in_shop_queries_are_searched_in_the_gallery(trained_run, raw_sets, tmp_path, call_script):
    call_main(evaluate, '--model', trained_run / f'{NAME}_model.pth', '--data_path', raw_sets, '--data_name', 'isc',
              '--num_workers', 0, '--save', '--results_dir', tmp_path)
    file = tmp_path / f'{NAME}_on_isc_data_base.pth'
    data_base = load_data_base(file)
    query = data_base.test.images[1]
    call_script(test_script, '--data_base', file.name, '--data_path', raw_sets, '--results_dir', tmp_path,
                '--query_img_name', query, '--retrieval_num', 6)
    (answer,) = answers_in(tmp_path / Path(query).stem)
    assert {hit['image'] for hit in answer['retrieved']} == set(data_base.gallery.images)


# ---------------------------------------------------- files --------------------------------------------------------
def test_only_files_that_it_wrote_are_replaced(look_up, tmp_path):
    words = ('--query_img_name', '000014.jpg', '--retrieval_num')
    look_up(*words, 3)
    (tmp_path / '000014/notes.txt').write_text('mine')
    look_up(*words, 2)
    names = sorted(path.name for path in (tmp_path / '000014').iterdir())
    assert len([name for name in names if name.startswith('retrieval_img')]) == 2
    assert 'notes.txt' in names
    assert 'top3.png' not in names
    (tmp_path / '000014/top4.png').write_text('mine too')
    with pytest.raises(UserError, match='top4.png was not written by test.py'):
        look_up(*words, 4)
    assert (tmp_path / '000014/top4.png').read_text() == 'mine too'


def test_images_that_are_missing_are_grey_tiles_and_counted(tmp_path, call_script):
    make_shop(tmp_path)
    for index in (0, 1):
        (tmp_path / 'birds' / 'uncropped' / 'test' / f'{index:03d}.jpg').unlink()
    printed = call_script(test_script, '--data_path', tmp_path, '--results_dir', tmp_path / 'results', '--data_base',
                          f'{RUN}_data_base.pth', '--query_img_name', '000.jpg', '--retrieval_num', 27)
    assert '2 of 28 images are missing or broken and drawn grey, the first: ' in printed
    with Image.open(tmp_path / 'results' / '000' / 'query_img.jpg') as image:
        assert image.getpixel((20, 20)) == pytest.approx((0xBB, 0xBB, 0xBB), abs=3)


# ---------------------------------------------------- sheets -------------------------------------------------------
@pytest.fixture(scope='module')
def shop(tmp_path_factory):
    """A data path with a small data set, and a data base of it in results/."""
    folder = tmp_path_factory.mktemp('shop')
    make_shop(folder)
    return folder


@pytest.mark.parametrize(('words', 'select'), [
    (['--select', 'worst'], 'worst'), (['--select', 'best'], 'best'), (['--select', 'worst', '--binary'], 'worst'),
    ([], 'random'), (['--seed', '5'], 'random')])
def test_a_sheet_shows_the_queries_that_are_selected(shop, tmp_path, call_script, words, select):
    shutil.copy(shop / 'results' / f'{RUN}_data_base.pth', tmp_path)
    printed = call_script(test_script, '--num_queries', 3, '--retrieval_num', 2, '--data_base', f'{RUN}_data_base.pth',
                          '--results_dir', tmp_path, '--data_path', shop, *words)
    folder = tmp_path / f'{RUN}_{select}'
    assert {path.name for path in folder.iterdir()} == {'top2.png', 'top2.pdf', 'retrieval.json'}
    data_base, binary = load_data_base(tmp_path / f'{RUN}_data_base.pth'), '--binary' in words
    ranked = rank_queries(data_base, binary)
    chosen = choose_queries(ranked, select, 3, 5 if '--seed' in words else 0)
    answers = answers_in(folder)
    assert [answer['query'] for answer in answers] == [f'{index:03d}.jpg' for index in chosen]
    for answer, query in zip(answers, chosen, strict=True):
        assert answer['class'] == NAMES[data_base.test.labels[query]]
        assert answer['note'] == f'first hit at rank {ranked["rank"][query].item() + 1:g}'
        assert f'{answer["query"]} ({answer["class"]}): {answer["note"]}' in printed
        hits = nearest_images(data_base.test.features[query], data_base, ('test', query), 2, binary)
        assert [hit['image'] for hit in answer['retrieved']] == [data_base.test.images[index] for index, _ in hits]


@pytest.mark.parametrize(('words', 'parts'), [
    (['--select', 'worst'], ['--select worst', '--num_queries']), (['--seed', '1'], ['--seed 1', '--num_queries']),
    (['--num_queries', '2', '--query_img_name', '000.jpg'], ['contradict']), (['--num_queries', '0'], ['0', '200']),
    (['--num_queries', '28'], ['28', '27 queries']),
    (['--num_queries', '2', '--select', 'best', '--seed', '3'], ['--seed 3', '--select best']),
    (['--num_queries', '2', '--retrieval_num', '28'], ['--retrieval_num 28', '27'])])
def test_a_sheet_that_cannot_be_drawn_is_an_error(shop, tmp_path, call_script, words, parts):
    with pytest.raises(UserError) as error:
        call_script(test_script, '--data_base', shop / 'results' / f'{RUN}_data_base.pth', '--data_path', shop,
                    '--results_dir', tmp_path, *words)
    assert all(part in str(error.value) for part in parts), error.value


# ---------------------------------------------------- your own photographs ----------------------------------------
@pytest.fixture(scope='module')
def embedded(trained_run, tmp_path_factory) -> Path:
    """A data path with six classes of three photographs, and a data base of three of them in results/."""
    folder = tmp_path_factory.mktemp('photographs')
    make_own(folder, images=3)
    call_main(data_utils, '--data_path', folder, '--data_name', 'mine')
    call_main(evaluate, '--model', trained_run / f'{NAME}_model.pth', '--data_path', folder, '--data_name', 'mine',
              '--num_workers', 0, '--save', '--results_dir', folder / 'results')
    return folder


@pytest.fixture
def photographs(embedded, tmp_path) -> Path:
    """A copy of them that a test may change."""
    return Path(shutil.copytree(embedded, tmp_path / 'photographs'))


@pytest.fixture
def search_photographs(photographs, call_script):
    """Look a query up among the photographs; returns what is printed."""
    def call(query, retrieval_num: int = 2) -> str:
        return call_script(test_script, '--data_base', f'{NAME}_on_mine_data_base.pth', '--data_path', photographs,
                           '--results_dir', photographs / 'results', '--query_img_name', query, '--retrieval_num',
                           retrieval_num)
    return call


def a_test_class(folder: Path) -> str:
    """Return the name of a test class of the photographs."""
    return load_data_base(folder / 'results' / f'{NAME}_on_mine_data_base.pth').class_names[0]


def test_a_photograph_is_known_by_the_path_where_its_owner_keeps_it(photographs, search_photographs):
    label = a_test_class(photographs)
    printed = search_photographs(photographs / 'mine' / label / '1.jpg', 8)
    assert f'{label}_1.jpg ({label}):' in printed
    assert f'uncropped/{label}_1.jpg' not in printed  # not its own neighbour


def test_two_photographs_of_one_name_keep_their_results_apart(photographs, search_photographs):
    for person, colour in (('ann', 'red'), ('bob', 'blue')):
        (photographs / person).mkdir()
        Image.new('RGB', (40, 40), colour).save(photographs / person / 'IMG_1.jpg')
    for person in ('ann', 'bob', 'ann'):
        search_photographs(photographs / person / 'IMG_1.jpg')
    red, blue = (Image.open(photographs / 'results' / folder / 'query_img.jpg').getpixel((90, 90))
                 for folder in ('IMG_1', 'IMG_1_2'))
    assert red[0] > 200 > blue[0]
    assert not (photographs / 'results/IMG_1_3').exists()


def test_an_existing_file_is_meant_rather_than_an_image_of_its_name(photographs, tmp_path, monkeypatch):
    label = a_test_class(photographs)
    (tmp_path / 'elsewhere').mkdir()
    Image.new('RGB', (40, 40), 'green').save(tmp_path / 'elsewhere' / f'{label}_1.jpg')
    opened = open_data_base(f'{NAME}_on_mine_data_base.pth', str(photographs / 'results'), str(photographs))
    assert test_script.find_query(f'{label}_1.jpg', opened) is not None
    monkeypatch.chdir(tmp_path / 'elsewhere')
    assert test_script.find_query(f'{label}_1.jpg', opened) is None  # embedded as a photograph from elsewhere


def test_photographs_that_changed_or_are_gone_since_they_were_embedded_are_counted(photographs, search_photographs):
    label = a_test_class(photographs)
    Image.new('RGB', (90, 90), 'blue').save(photographs / 'mine' / label / '1.jpg')
    (photographs / 'mine' / label / '2.jpg').unlink()
    call_main(data_utils, '--data_path', photographs, '--data_name', 'mine')
    printed = search_photographs(f'{label}_0.jpg')
    assert f'1 images of this data base are no longer in the data set, the first: uncropped/{label}_2.jpg' in printed
    assert f'1 images of this data base have changed since it was made, the first: uncropped/{label}_1.jpg' in printed
