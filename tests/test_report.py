"""Sheets and the report: what they show is what is measured, in a real browser too."""
import json
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_one_line_error, type_command
from PIL import Image
from raw_trees import write_image

import report
from common.errors import UserError
from common.files import save
from retrieval.database import load_data_base
from retrieval.metrics import retrieval_metrics, similarity_of
from retrieval.search import choose_queries, nearest_images, rank_queries
from training.statistics import save_statistics

NAMES = ['Ara & Co', '<script>alert(1)</script>', 'costs $5 or $6', 'Zebrafink', "O'Hara \"quoted\""]
RUN = 'birds_resnet18_balanced_proxy_5'
SETTINGS = {'data_name': 'birds', 'crop_type': 'uncropped', 'batch_size': 4, 'resize_size': 32, 'amp': 'auto',
            'recalls': [1, 2, 4]}


def make_shop(folder: Path, counts=(7, 8, 9, 3, 1), gallery=(), dim=5) -> Path:
    """Write a small data set and a data base of it with random features; returns the data base's path."""
    rng = torch.Generator().manual_seed(0)
    data_base = {'class_names': NAMES, 'args': SETTINGS, 'epoch': 2}
    for subset, numbers in (('test', counts), ('gallery', gallery)):
        if numbers:
            labels = [label for label, count in enumerate(numbers) for _ in range(count)]
            features = torch.randn(len(labels), dim, generator=rng) + 2 * torch.eye(5, dim)[labels]
            data_base[f'{subset}_images'] = [f'uncropped/{subset}/{index:03d}.jpg' for index in range(len(labels))]
            data_base[f'{subset}_labels'] = torch.tensor(labels)
            data_base[f'{subset}_features'] = torch.nn.functional.normalize(features, dim=1)
            for index, path in enumerate(data_base[f'{subset}_images']):
                write_image(folder / 'birds' / path, labels[index], index)
    (folder / 'results').mkdir()
    save(data_base, folder / 'results' / f'{RUN}_data_base.pth')
    rows = [{'epoch': epoch, 'loss': 1.0, 'accuracy': 50.0, 'lr': 1e-4, 'dense_R@1': 40.0} for epoch in (1, 2)]
    save_statistics(rows, {'seed': 0}, folder / 'results' / f'{RUN}_statistics.csv')
    return folder / 'results' / f'{RUN}_data_base.pth'


def load(path):
    return torch.load(path, weights_only=True)


@pytest.fixture(scope='module')
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp('shop')
    make_shop(folder)
    return folder


@pytest.fixture
def write_report(monkeypatch, capsys):
    """Write a report in this process; returns its text, its data, and what was printed."""
    def write(folder, *words):
        monkeypatch.setattr(sys, 'argv', ['report.py', '--data_path', str(folder), '--results_dir',
                                          str(folder / 'results'), '--data_base', f'{RUN}_data_base.pth',
                                          *map(str, words)])
        monkeypatch.setitem(sys.modules, 'umap', None)  # its compiler takes half a minute
        report.main()
        html = (folder / 'results' / f'{RUN}_report.html').read_text()
        data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1])
        return html, data, capsys.readouterr().out
    return write


# ---------------------------------------------------- single queries ------------------------------------------------
def brute_force(data_base, binary):
    """Rank every query with loops: (rank of the best positive with ties in the middle, margin, nearest image)."""
    subset = data_base.searched
    searched = data_base.subsets[subset]
    features, found = searched.features.double(), []
    for query, label in enumerate(data_base.test.labels):
        feature = data_base.test.features[query].double()
        best, others, nearest = -9.0, [], (-9.0, 0)
        for image, other in enumerate(searched.labels):
            if subset == 'test' and image == query:
                continue
            if binary:
                similarity = float(((feature >= 0) == (features[image] >= 0)).double().mean())
            else:
                similarity = float((feature * features[image]).sum())
            nearest = max(nearest, (similarity, -image))
            if other == label:
                best = max(best, similarity)
            else:
                others.append(similarity)
        ties = sum(abs(similarity - best) < 1e-9 for similarity in others)
        rank = sum(similarity > best + 1e-9 for similarity in others) + ties / 2
        found.append((rank if best > -9 else np.nan, best - max(others) if best > -9 else -np.inf, -nearest[1]))
    return found


@pytest.mark.parametrize('binary', [False, True])
@pytest.mark.parametrize('gallery', [(), (4, 2, 5, 1, 3)])
def test_queries_are_ranked_as_brute_force_does(tmp_path, gallery, binary):
    data_base = load_data_base(make_shop(tmp_path, gallery=gallery))
    ranked = rank_queries(data_base, binary)
    rank, margin, nearest = (np.array(part, float) for part in zip(*brute_force(data_base, binary), strict=True))
    np.testing.assert_array_equal(ranked['rank'], rank)
    np.testing.assert_allclose(ranked['margin'], margin, atol=1e-7)
    np.testing.assert_array_equal(ranked['nearest'], nearest)


def test_worst_and_best_queries_stand_at_the_ends_of_the_ranking(shop):
    ranked = rank_queries(load_data_base(shop / 'results' / f'{RUN}_data_base.pth'))
    number = int((~ranked['rank'].isnan()).sum())
    assert number == 27  # the one image of its class has no positive
    keys = [(ranked['rank'][index].item(), -ranked['margin'][index].item())
            for index in choose_queries(ranked, 'best', number)]
    assert keys == sorted(keys)
    assert choose_queries(ranked, 'worst', number) == choose_queries(ranked, 'best', number)[::-1]


def test_random_queries_depend_on_the_seed_alone(shop):
    ranked = rank_queries(load_data_base(shop / 'results' / f'{RUN}_data_base.pth'))
    first, again, other = (choose_queries(ranked, 'random', 9, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert len(set(first)) == 9


def test_the_nearest_images_agree_with_the_ranking(shop):
    data_base = load_data_base(shop / 'results' / f'{RUN}_data_base.pth')
    ranked = rank_queries(data_base)
    for query, label in enumerate(data_base.test.labels):
        found = nearest_images(data_base.test.features[query], data_base, ('test', query), 99)
        assert len(found) == 27
        assert found[0][0] == ranked['nearest'][query]
        hits = [place for place, (image, _) in enumerate(found) if data_base.test.labels[image] == label]
        assert (hits[0] if hits else None) == (None if ranked['rank'][query].isnan() else ranked['rank'][query])


def test_similarity_does_not_depend_on_the_block(shop):
    data_base = load_data_base(shop / 'results' / f'{RUN}_data_base.pth')
    features = data_base.test.features
    for binary in (False, True):
        rows = [similarity_of(feature[None], features, binary) for feature in features]
        assert torch.equal(torch.cat(rows), similarity_of(features, features, binary))


# ---------------------------------------------------- sheets --------------------------------------------------------
@pytest.mark.parametrize(('words', 'how'), [
    (['--select', 'worst'], 'worst'), (['--select', 'best'], 'best'), (['--select', 'worst', '--binary'], 'worst'),
    ([], 'random'), (['--seed', '5'], 'random')])
def test_a_sheet_shows_the_chosen_queries(shop, tmp_path, words, how):
    shutil.copy(shop / 'results' / f'{RUN}_data_base.pth', tmp_path)
    result = type_command('test.py', '--num_queries', 4, '--retrieval_num', 3, '--data_base', f'{RUN}_data_base.pth',
                          '--results_dir', tmp_path, '--data_path', shop, *words)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / f'{RUN}_{how}'
    assert {path.name for path in folder.iterdir()} == {'top3.png', 'top3.pdf', 'retrieval.json'}
    data_base = load_data_base(tmp_path / f'{RUN}_data_base.pth')
    ranked = rank_queries(data_base, '--binary' in words)
    chosen = choose_queries(ranked, how, 4, int(words[-1]) if '--seed' in words else 0)
    answers = json.loads((folder / 'retrieval.json').read_text())['answers']
    assert [answer['query'] for answer in answers] == [f'{index:03d}.jpg' for index in chosen]
    for answer, query in zip(answers, chosen, strict=True):
        assert answer['note'] == f'first hit at rank {ranked["rank"][query].item() + 1:g}'
        assert f'{answer["query"]} ({answer["class"]}): {answer["note"]}' in result.stdout
        expected = nearest_images(data_base.test.features[query], data_base, ('test', query), 3, '--binary' in words)
        assert [found['image'] for found in answer['retrieved']] == [data_base.test.images[i] for i, _ in expected]


def test_images_that_are_gone_are_grey_tiles_and_counted(tmp_path):
    make_shop(tmp_path)
    for index in (0, 1):
        (tmp_path / 'birds' / 'uncropped' / 'test' / f'{index:03d}.jpg').unlink()
    words = ('--data_path', tmp_path, '--results_dir', tmp_path / 'results', '--data_base', f'{RUN}_data_base.pth')
    result = type_command('test.py', '--query_img_name', '000.jpg', '--retrieval_num', 27, *words)
    assert result.returncode == 0, result.stderr
    assert '2 of 28 images are missing or broken and drawn grey, the first: ' in result.stdout
    tiles = tmp_path / 'results' / '000'
    with Image.open(tiles / 'query_img.jpg') as image:
        assert image.getpixel((20, 20)) == pytest.approx((0xBB, 0xBB, 0xBB), abs=3)


@pytest.mark.parametrize(('words', 'parts'), [
    (['--select', 'worst'], ['--select worst', '--num_queries']), (['--seed', '1'], ['--seed 1', '--num_queries']),
    (['--num_queries', '2', '--query_img_name', '000.jpg'], ['contradict']), (['--num_queries', '0'], ['0', '200']),
    (['--num_queries', '28'], ['28', '27 queries']), (['--num_queries', '2', '--select', 'best', '--seed', '3'],
                                                      ['--seed 3', '--select best']),
    (['--num_queries', '2', '--retrieval_num', '28'], ['--retrieval_num 28', '27'])])
def test_a_sheet_that_cannot_be_is_one_line(shop, tmp_path, words, parts):
    words = ['--data_base', shop / 'results' / f'{RUN}_data_base.pth', '--data_path', shop, '--results_dir', tmp_path,
             *words]
    assert_one_line_error(type_command('test.py', *words), *parts)


# ---------------------------------------------------- the file ------------------------------------------------------
def test_a_report_stands_alone(shop, write_report):
    html, _, printed = write_report(shop)
    assert not re.search(r'(?:src|href)\s*=\s*"(?!data:|#)', html)
    assert not re.search(r'https?://|@import|url\(', html)
    assert "default-src 'none'" in html
    assert '28 of 28 images' in printed


def test_names_from_files_are_never_markup(shop, write_report):
    html, data, _ = write_report(shop)
    assert data['classes'] == NAMES
    assert '<script>alert' not in html
    assert '&lt;script&gt;alert(1)&lt;/script&gt;' in html


def test_a_report_gives_the_measured_recalls(shop, write_report):
    html, _, _ = write_report(shop)
    data_base = load_data_base(shop / 'results' / f'{RUN}_data_base.pth')
    for kind in ('dense', 'binary'):
        metrics = retrieval_metrics(data_base.test.features, data_base.test.labels, recalls=(1, 2, 4),
                                    binary=kind == 'binary')
        row = re.search(rf'<th scope="row">{kind}</th>(.*?)</tr>', html)[1]
        assert re.findall(r'<td>([\d.]+)</td>', row) == [f'{metrics[name]:.2f}' for name in
                                                         ('R@1', 'R@2', 'R@4', 'MAP@R', 'R-precision')]
    assert '1 queries without another image of' in html


def test_recall_of_the_classes_averages_to_the_whole(shop):
    data_base = load_data_base(shop / 'results' / f'{RUN}_data_base.pth')
    ranked = {'dense': rank_queries(data_base), 'binary': rank_queries(data_base, True)}
    classes = report.measure_classes(ranked, report.Numbered(data_base))
    assert sorted((row['label'], row['queries']) for row in classes) == [(0, 7), (1, 8), (2, 9), (3, 3)]
    for kind in ranked:
        metrics = retrieval_metrics(data_base.test.features, data_base.test.labels, recalls=(1,),
                                    binary=kind == 'binary')
        assert sum(row['queries'] * row[kind] for row in classes) / 27 == pytest.approx(metrics['R@1'])


@pytest.mark.parametrize('gallery', [(), (4, 2, 5, 1, 3)])
def test_confused_classes_are_counted_as_in_loops(tmp_path, gallery):
    data_base = load_data_base(make_shop(tmp_path, gallery=gallery))
    searched = data_base.subsets[data_base.searched].labels.tolist()
    counts = Counter()
    for query, (rank, _, nearest) in enumerate(brute_force(data_base, False)):
        if rank >= 1:
            counts[data_base.test.labels[query].item(), searched[nearest]] += 1
    pairs = report.confused_pairs(rank_queries(data_base), report.Numbered(data_base))
    assert sum(sum(pair['counts']) for pair in pairs) == sum(counts.values()) > 0
    for pair in pairs:
        a, b = pair['classes']
        assert pair['counts'] == (counts[a, b], counts[b, a])
        assert data_base.test.labels[pair['example']] == a
    assert [-sum(pair['counts']) for pair in pairs] == sorted(-sum(pair['counts']) for pair in pairs)


def test_a_large_data_base_is_shown_in_part_with_all_neighbours(shop, write_report, monkeypatch):
    monkeypatch.setattr(report, 'NUM_NEIGHBOURS', 3)
    html, data, printed = write_report(shop, '--max_images', 20)
    assert len(data['paths']) <= 20
    assert f'{len(data["paths"])} of 28 images' in printed
    assert f'{len(data["paths"])} of 28 images are shown' in html
    shown = [neighbours for neighbours in data['neighbours'] if neighbours]
    assert len(shown) >= 5
    assert all(len(neighbours) == 3 for neighbours in shown)
    worst = choose_queries(rank_queries(load_data_base(shop / 'results' / f'{RUN}_data_base.pth')), 'worst', 1)[0]
    assert data['neighbours'][data['paths'].index(f'uncropped/test/{worst:03d}.jpg')]


def test_queries_with_a_gallery_find_gallery_images(tmp_path, write_report):
    make_shop(tmp_path, gallery=(4, 2, 5, 1, 3))
    _, data, _ = write_report(tmp_path)
    assert len(data['paths']) == 28 + 15
    for path, neighbours in zip(data['paths'], data['neighbours'], strict=True):
        assert (neighbours is None) == path.startswith('uncropped/gallery/')
        assert all(data['paths'][image].startswith('uncropped/gallery/') for image, _ in neighbours or [])


def test_missing_images_are_counted_in_a_report(tmp_path, write_report):
    make_shop(tmp_path)
    (tmp_path / 'birds' / 'uncropped' / 'test' / '003.jpg').unlink()
    (tmp_path / 'birds' / 'uncropped' / 'test' / '004.jpg').write_bytes(b'no image')
    html, data, printed = write_report(tmp_path)
    assert '2 of 28 images are missing or broken and shown as grey tiles' in printed
    assert '2 images are missing or broken' in html
    assert [index for index, thumbnail in enumerate(data['thumbnails']) if thumbnail is None] == [3, 4]


def test_thumbnails_of_many_images_stay_within_their_bytes(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)  # the worst to compress
    Image.fromarray(noise).save(tmp_path / 'noise.png')
    thumbnails, side = report.make_thumbnails([tmp_path / 'noise.png'] * report.MOST_IMAGES)
    assert sum(map(len, thumbnails)) <= report.THUMBNAIL_BYTES
    assert side < report.SIDES[0]


def test_the_map_is_a_principal_component_analysis():
    rng = torch.Generator().manual_seed(0)
    features = torch.randn(40, 7, generator=rng) * torch.arange(7, 0, -1)
    points = report.principal_components(features)
    _, _, axes = np.linalg.svd((features - features.mean(0)).double().numpy(), full_matrices=False)
    for column in range(2):
        expected = features.double().numpy() @ axes[column]
        assert abs(np.corrcoef(points[:, column], expected)[0, 1]) == pytest.approx(1, abs=1e-9)


def test_features_of_one_dimension_are_mapped_to_a_line():
    points = report.principal_components(torch.tensor([[1.0], [-1.0], [1.0]]))
    assert points[:, 1].tolist() == [0, 0, 0]
    assert len(set(points[:, 0])) == 2


def test_a_umap_keeps_clusters_apart():
    pytest.importorskip('umap', reason='umap-learn is not installed')
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    features = 5 * torch.eye(3, 8)[labels] + 0.3 * torch.randn(60, 8, generator=rng)
    points = torch.from_numpy(report.map_embeddings(torch.nn.functional.normalize(features, dim=1))['UMAP'])
    assert retrieval_metrics(torch.nn.functional.normalize(points - points.mean(0), dim=1).float(), labels,
                             recalls=(1,))['R@1'] > 90


def test_a_report_without_statistics_says_so(tmp_path, write_report):
    make_shop(tmp_path)
    (tmp_path / 'results' / f'{RUN}_statistics.csv').unlink()
    html, _, _ = write_report(tmp_path)
    assert f'There is no {RUN}_statistics.csv beside the data base' in html


@pytest.mark.parametrize(('change', 'words', 'parts'), [
    ({}, ['--statistics', 'none.csv'], ['none.csv']),
    ({}, ['--data_path', '/nowhere'], ['--data_path /nowhere', 'birds']),
    ({}, ['--max_images', '3'], ['--max_images 3']), ({}, ['--max_images', '1'], ['--max_images 1']),
    ({'test_images': [], 'test_labels': torch.zeros(0, dtype=torch.int64), 'test_features': torch.zeros(0, 5)}, [],
     ['test_images']),
    ({'class_names': NAMES[:3]}, [], ['test_labels']),
    ({'test_features': torch.full((28, 5), torch.nan)}, [], ['28 of 28', 'not finite']),
    ({'test_labels': torch.arange(28), 'class_names': [str(i) for i in range(28)]}, [], ['no query'])])
def test_a_report_that_cannot_be_is_one_line(tmp_path, write_report, change, words, parts):
    path = make_shop(tmp_path)
    save({**load(path), **change}, path)
    with pytest.raises(UserError) as error:
        write_report(tmp_path, *words)
    assert all(part in str(error.value) for part in parts), error.value
    assert not (tmp_path / 'results' / f'{RUN}_report.html').exists()


# ---------------------------------------------------- in a browser --------------------------------------------------
@pytest.fixture
def page(shop, browser, write_report):
    """The report, opened from the disk."""
    write_report(shop)
    browser.get('about:blank')
    browser.get((shop / 'results' / f'{RUN}_report.html').as_uri())
    yield browser
    assert [entry for entry in browser.get_log('browser') if entry['level'] == 'SEVERE'] == []


def find(page, selector):
    from selenium.webdriver.common.by import By

    return page.find_elements(By.CSS_SELECTOR, selector)


def paths_of(page, selector):
    return [tile.get_dom_attribute('data-path') for tile in find(page, f'{selector} .tile')]


@pytest.mark.parametrize('query', ['uncropped/test/005.jpg', 'uncropped/test/027.jpg'])
def test_the_browser_shows_the_neighbours_that_test_py_prints(page, shop, tmp_path, query):
    find(page, '#search')[0].send_keys(query)
    assert find(page, '#count')[0].text == '1 image'
    find(page, '#hits .tile')[0].click()
    assert paths_of(page, '#query') == [query]
    result = type_command('test.py', '--query_img_name', query, '--retrieval_num', 20, '--data_path', shop,
                          '--data_base', shop / 'results' / f'{RUN}_data_base.pth', '--results_dir', tmp_path)
    printed = re.findall(r'^ +(\d+)  (\S+)  (\S+)  .*  (same|other) class$', result.stdout, re.MULTILINE)
    assert paths_of(page, '#neighbours') == [path for _, _, path, _ in printed]
    tiles = find(page, '#neighbours .tile')
    assert [tile.get_dom_attribute('class').split()[1] for tile in tiles] == [kind for _, _, _, kind in printed]
    assert [tile.text.splitlines()[0].split()[1:] for tile in tiles] == [[rank, similarity] for rank, similarity, _, _
                                                                        in printed]


def test_a_class_is_searched_by_any_of_its_words(page):
    find(page, '#search')[0].send_keys('zebraFINK')
    assert find(page, '#count')[0].text == '3 images'
    assert paths_of(page, '#hits') == [f'uncropped/test/{index:03d}.jpg' for index in (24, 25, 26)]


def test_a_neighbour_that_is_pressed_becomes_the_query(page):
    neighbour = paths_of(page, '#neighbours')[2]
    find(page, '#neighbours .tile')[2].click()
    assert paths_of(page, '#query') == [neighbour]
    assert page.current_url.endswith(neighbour.replace('/', '%2F'))


def test_the_report_can_be_used_with_the_keyboard(page):
    from selenium.webdriver.common.keys import Keys

    find(page, '#search')[0].send_keys('zebrafink' + Keys.TAB * 2 + Keys.ENTER)  # past the button `Any image`
    page.switch_to.active_element.send_keys(Keys.TAB)
    page.switch_to.active_element.send_keys(Keys.ENTER)
    assert paths_of(page, '#query')[0].startswith('uncropped/test/')
    canvas = find(page, '#map')[0]
    canvas.send_keys(Keys.ARROW_RIGHT + Keys.ARROW_RIGHT)
    assert find(page, '#pointed')[0].text == f'{NAMES[0]}, 001.jpg'
    assert find(page, '#hover img')[0].get_property('naturalWidth') > 0
    canvas.send_keys(Keys.ENTER)
    assert paths_of(page, '#query') == ['uncropped/test/001.jpg']


def test_the_pointer_on_the_map_shows_the_image_there(page):
    from selenium.webdriver import ActionChains

    canvas = find(page, '#map')[0]
    page.execute_script('arguments[0].scrollIntoView({block: "center"})', canvas)
    x, y = page.execute_script('return place(26)')
    size = canvas.size
    ActionChains(page).move_to_element_with_offset(canvas, x - size['width'] / 2, y - size['height'] / 2).perform()
    nearest = page.execute_script('return pointed')
    assert find(page, '#pointed')[0].text.endswith(f'{nearest:03d}.jpg')
    there = page.execute_script(f'return place({nearest})')
    assert abs(there[0] - x) + abs(there[1] - y) < 4


def test_the_class_table_sorts_by_the_pressed_heading(page):
    def column(number):
        return [cell.get_property('textContent') for cell in find(page, f'#class-table tbody td:nth-child({number})')]

    assert [float(value) for value in column(3)] == sorted(float(value) for value in column(3))
    button = find(page, '#class-table th:nth-child(2) button')[0]
    for descending in (False, True):
        button.click()
        assert [int(value) for value in column(2)] == sorted((7, 8, 9, 3), reverse=descending)
    assert find(page, '#class-table th:nth-child(2)')[0].get_dom_attribute('aria-sort') == 'descending'


def test_every_picture_has_a_text_and_loads(page):
    page.execute_async_script('Promise.all([...document.images].map(image => image.decode())).then(arguments[0])')
    assert page.execute_script('return [...document.images].every(image => image.alt && image.naturalWidth)')
    assert len(find(page, 'img')) > 50


def test_a_phone_scrolls_in_one_direction_only(page):
    page.execute_cdp_cmd('Emulation.setDeviceMetricsOverride',
                         {'width': 360, 'height': 740, 'deviceScaleFactor': 2, 'mobile': True})
    try:
        assert page.execute_script('return document.documentElement.scrollWidth') <= 360
    finally:
        page.execute_cdp_cmd('Emulation.clearDeviceMetricsOverride', {})
