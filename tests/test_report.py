"""report.py: what the page shows is what is measured, in a real browser too."""
import base64
import io
import json
import re
import sys
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import call_main, type_command
from PIL import Image
from shop import NAMES, RUN, make_shop, rank_in_loops

import report
from common.errors import UserError
from common.files import load, save
from retrieval.database import load_data_base
from retrieval.metrics import measure_open_set, retrieval_metrics
from retrieval.search import choose_queries, rank_queries


@pytest.fixture(scope='module')
def shop(tmp_path_factory):
    """A data path with a small data set, and a data base of it in results/."""
    folder = tmp_path_factory.mktemp('shop')
    make_shop(folder)
    return folder


def draw_nothing(_table, target, title):
    target.write_text(title)  # in place of the curves
    return target


@pytest.fixture
def quick(monkeypatch):
    """Leave out what takes seconds: the figures (the fixture `written` draws them), and UMAP, which is compiled first.
    """
    monkeypatch.setattr(report, 'draw_open_set_curve', lambda curve: 'AAAA')
    monkeypatch.setattr(report, 'draw_curves', draw_nothing)
    monkeypatch.setitem(sys.modules, 'umap', None)


@pytest.fixture
def write_report(quick, call_script):
    """Write a report of a shop; returns its text, its data, and what was printed."""
    def write(folder, *words):
        printed = call_script(report, '--data_path', folder, '--results_dir', folder / 'results', '--data_base',
                              f'{RUN}_data_base.pth', *words)
        html = (folder / 'results' / f'{RUN}_report.html').read_text()
        return html, data_of(html), printed
    return write


def data_of(html: str) -> dict:
    """Return what the script on a page reads."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1])


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    """A report of a shop, written once for the tests that only read it: its text and its data."""
    folder = tmp_path_factory.mktemp('written')
    make_shop(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, 'umap', None)
        call_main(report, '--data_path', folder, '--data_base', folder / 'results' / f'{RUN}_data_base.pth')
    html = (folder / 'results' / f'{RUN}_report.html').read_text()
    return html, data_of(html)


# ---------------------------------------------------- the file ------------------------------------------------------
# ---------------------------------------------------- the file ----------------------------------------------------
def test_a_report_loads_nothing_from_elsewhere(shop, write_report):
    html, _, printed = write_report(shop)
    assert not re.search(r'(?:src|href)\s*=\s*"(?!data:|#)', html)
    assert not re.search(r'https?://|@import|url\(', html)
    assert "default-src 'none'" in html
    assert '28 of 28 images' in printed


def test_a_report_holds_the_figures_of_curves_and_open_set(written):
    figures = re.findall(r'src="data:image/png;base64,([^"]+)"\s+alt="(\w+)', written[0])
    assert [title for _, title in figures] == ['Answers', 'Loss']
    for figure, _ in figures:
        assert Image.open(io.BytesIO(base64.b64decode(figure))).width > 400


def test_names_from_files_never_become_markup(written):
    html, data = written
    assert data['classes'] == NAMES
    assert '<script>alert' not in html
    assert '&lt;script&gt;alert(1)&lt;/script&gt;' in html


def test_a_report_gives_the_measured_recalls(written, shop):
    html, _ = written
    data_base = load_data_base(shop / 'results' / f'{RUN}_data_base.pth')
    for kind in ('dense', 'binary'):
        metrics = retrieval_metrics(data_base.test.features, data_base.test.labels, recalls=(1, 2, 4),
                                    binary=kind == 'binary')
        row = re.search(rf'<th scope="row">{kind}</th>(.*?)</tr>', html)[1]
        assert re.findall(r'<td>([\d.]+)</td>', row) == [f'{metrics[name]:.2f}' for name in
                                                         ('R@1', 'R@2', 'R@4', 'MAP@R', 'R-precision')]
    assert '1 queries without another image of' in html


def test_a_report_gives_the_measured_open_set_thresholds(written, shop):
    html, _ = written
    data_base = load_data_base(shop / 'results' / f'{RUN}_data_base.pth')
    section = html.split('<h2 id="open-set">')[1].split('<h2')[0]
    for row in measure_open_set(data_base.test.features, data_base.test.labels):
        cells = [f'{row["threshold"]:.4f}', f'{row["marked"]:.1f} %', f'{row["lost"]:.1f} %']
        assert ' '.join(f'<td>{cell}</td>' for cell in cells) in re.sub(r'\s*<td>', ' <td>', section)


def test_the_open_set_curve_holds_the_shares_at_rates_up_to_20_per_cent(shop):
    data_base = load_data_base(shop / 'results' / f'{RUN}_data_base.pth')
    curve = report.measure_open_set_curve(data_base)
    assert len(curve['lost']) == len(curve['marked']) == 41
    assert curve['marked'] == sorted(curve['marked'])  # a higher threshold marks more of either
    assert curve['lost'] == sorted(curve['lost'])
    (row,) = measure_open_set(data_base.test.features, data_base.test.labels, rates=(0.1,))
    assert (curve['lost'][20], curve['marked'][20]) == (row['lost'], row['marked'])


# ---------------------------------------------------- classes -----------------------------------------------------
def test_the_recall_of_the_classes_averages_to_that_of_the_whole(shop):
    data_base = load_data_base(shop / 'results' / f'{RUN}_data_base.pth')
    ranked = {'dense': rank_queries(data_base), 'binary': rank_queries(data_base, True)}
    classes = report.measure_classes(ranked, report.ImageList(data_base))
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
    for query, (rank, _, nearest) in enumerate(rank_in_loops(data_base, binary=False)):
        if rank >= 1:
            counts[data_base.test.labels[query].item(), searched[nearest]] += 1
    pairs = report.confused_pairs(rank_queries(data_base), report.ImageList(data_base))
    assert sum(sum(pair['counts']) for pair in pairs) == sum(counts.values()) > 0
    for pair in pairs:
        a, b = pair['classes']
        assert pair['counts'] == (counts[a, b], counts[b, a])
        assert counts[a, b] >= counts[b, a]
        assert data_base.test.labels[pair['example']] == a
    assert [-sum(pair['counts']) for pair in pairs] == sorted(-sum(pair['counts']) for pair in pairs)


def test_a_report_on_classes_that_were_trained_on_says_so(tmp_path, write_report):
    path = make_shop(tmp_path)
    save({**torch.load(path, weights_only=True), 'seen_classes': [*NAMES[1:3], 'another']}, path)
    html = ' '.join(write_report(tmp_path)[0].split())
    assert 'Not on unseen classes:</strong> the model was trained on 2 of these classes' in html
    assert 'none of them seen' not in html


# ---------------------------------------------------- images ------------------------------------------------------
def test_the_rows_of_a_report_are_the_hardest_and_the_easiest_queries(written, shop):
    html, data = written
    ranked = rank_queries(load_data_base(shop / 'results' / f'{RUN}_data_base.pth'))
    rows = re.findall(r'data-query="(\d+)" data-retrieved="([\d ]+)"', html)
    expected = [*choose_queries(ranked, 'worst', 8), *choose_queries(ranked, 'best', 8)]
    assert [int(query) for query, _ in rows] == expected  # all images are shown, so an index is that of the data base
    for query, retrieved in rows:
        neighbours = [image for image, _ in data['neighbours'][int(query)]]
        assert list(map(int, retrieved.split())) == neighbours[:8]
        assert data['ranks'][int(query)] == ranked['rank'][int(query)] + 1


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


def test_thumbnails_of_many_images_stay_within_their_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(report, 'THUMBNAIL_BYTES', 5e4)
    noise = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)  # the worst to compress
    Image.fromarray(noise).save(tmp_path / 'noise.png')
    thumbnails, side = report.make_thumbnails([tmp_path / 'noise.png'] * 30)
    assert sum(map(len, thumbnails)) <= report.THUMBNAIL_BYTES
    assert side < report.THUMBNAIL_SIDES[0]
    assert len(report.encode_thumbnail(tmp_path / 'noise.png', report.THUMBNAIL_SIDES[0])) * 30 > 5e4


# ---------------------------------------------------- map ---------------------------------------------------------
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


def test_the_neighbours_of_all_are_the_nearest():
    features = torch.nn.functional.normalize(torch.randn(40, 6, generator=torch.Generator().manual_seed(0)), dim=1)
    indices, distances = report.neighbours_of_all(features)
    expected = (1 - features.double() @ features.double().T).clamp(0).sort(1)
    assert indices.tolist() == expected.indices[:, :15].tolist()
    np.testing.assert_allclose(distances, expected.values[:, :15], atol=1e-6)


@pytest.mark.slow
def test_a_umap_keeps_clusters_apart():
    pytest.importorskip('umap', reason='umap-learn is not installed')
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    features = 5 * torch.eye(3, 8)[labels] + 0.3 * torch.randn(60, 8, generator=rng)
    points = torch.from_numpy(report.map_embeddings(torch.nn.functional.normalize(features, dim=1))['UMAP'])
    assert retrieval_metrics(torch.nn.functional.normalize(points - points.mean(0), dim=1).float(), labels,
                             recalls=(1,))['R@1'] > 90


# ---------------------------------------------------- what belongs to the run -------------------------------------
def test_a_report_holds_the_curves_of_its_own_run_only(run, raw_sets, quick, call_script):
    name = 'car_timm-test_resnet_balanced_proxy_16'
    words = ('--data_base', run / f'{name}_data_base.pth', '--data_path', raw_sets)
    call_script(report, *words)
    html = (run / f'{name}_report.html').read_text()
    assert 'Epoch 1, the last.' in html
    curves = re.search(r'src="data:image/png;base64,([^"]+)"\s+alt="Loss, training accuracy', html)[1]
    assert base64.b64decode(curves).decode() == name
    table = pd.read_csv(run / f'{name}_statistics.csv')
    table['args.run'] = 'another'
    table.to_csv(run / 'another_statistics.csv', index=False)
    with pytest.raises(UserError, match=f'belongs to the run another, the data base to {name}'):
        call_script(report, *words, '--statistics', run / 'another_statistics.csv')


def test_a_report_says_how_the_epoch_was_chosen(run, raw_sets, quick, call_script):
    file = run / 'car_timm-test_resnet_balanced_proxy_16_data_base.pth'
    contents = load(file, 'data base')
    contents['args']['num_epochs'] = 3  # of which each was measured
    save(contents, file)
    call_script(report, '--data_base', file, '--data_path', raw_sets)
    assert 'Best epoch 1, chosen on\n    these images' in file.with_name(
        file.name.replace('_data_base.pth', '_report.html')).read_text()


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
def test_a_report_that_cannot_be_written_is_an_error(tmp_path, write_report, change, words, parts):
    path = make_shop(tmp_path)
    save({**torch.load(path, weights_only=True), **change}, path)
    with pytest.raises(UserError) as error:
        write_report(tmp_path, *words)
    assert all(part in str(error.value) for part in parts), error.value
    assert not (tmp_path / 'results' / f'{RUN}_report.html').exists()


def test_a_file_that_the_scripts_did_not_write_is_not_replaced(shop, tmp_path, quick, call_script):
    words = ('--data_base', shop / 'results' / f'{RUN}_data_base.pth', '--data_path', shop, '--output',
             tmp_path / 'mine.html')
    (tmp_path / 'mine.html').write_text('my thesis')
    with pytest.raises(UserError, match='--output .*mine.html exists .* not replaced'):
        call_script(report, *words)
    assert (tmp_path / 'mine.html').read_text() == 'my thesis'
    (tmp_path / 'mine.html').unlink()
    for _ in range(2):  # what it wrote itself, it replaces
        call_script(report, *words)


# ---------------------------------------------------- in a browser ------------------------------------------------
@pytest.fixture
def page(written, tmp_path, browser):
    """The report, opened from the disk."""
    (tmp_path / 'report.html').write_text(written[0])
    browser.get('about:blank')
    browser.get((tmp_path / 'report.html').as_uri())
    yield browser
    assert [entry for entry in browser.get_log('browser') if entry['level'] == 'SEVERE'] == []


def find(page, selector):
    from selenium.webdriver.common.by import By

    return page.find_elements(By.CSS_SELECTOR, selector)


def paths_of(page, selector):
    return [tile.get_dom_attribute('data-path') for tile in find(page, f'{selector} .tile')]


@pytest.mark.slow
@pytest.mark.parametrize('query', ['uncropped/test/005.jpg', 'uncropped/test/027.jpg'])
def test_the_browser_shows_the_neighbours_that_test_py_prints(page, shop, tmp_path, query):
    result = type_command('test.py', '--query_img_name', query, '--retrieval_num', 20, '--data_path', shop,
                          '--data_base', shop / 'results' / f'{RUN}_data_base.pth', '--results_dir', tmp_path)
    printed = re.findall(r'^ +(\d+)  (-?[\d.]+)  (\S+)  .*(same|other) class$', result.stdout, re.MULTILINE)
    assert len(printed) == 20
    find(page, '#search')[0].send_keys(query)
    find(page, '#hits button')[0].click()
    assert paths_of(page, '#query') == [query]
    assert paths_of(page, '#neighbours') == [path for _, _, path, _ in printed]
    tiles = find(page, '#neighbours .tile')
    assert [tile.get_dom_attribute('class').split()[1] for tile in tiles] == [verdict for _, _, _, verdict in printed]
    assert [tile.text.splitlines()[0].split()[1:] for tile in tiles] == [[rank, similarity] for rank, similarity, _, _
                                                                        in printed]


@pytest.mark.slow
def test_a_class_is_found_by_any_of_its_words(page):
    find(page, '#search')[0].send_keys('zebraFINK')
    assert find(page, '#count')[0].text == '3 images'
    assert paths_of(page, '#hits') == [f'uncropped/test/{index:03d}.jpg' for index in (24, 25, 26)]


@pytest.mark.slow
def test_a_neighbour_that_is_clicked_becomes_the_query(page):
    neighbour = paths_of(page, '#neighbours')[2]
    find(page, '#neighbours .tile')[2].click()
    assert paths_of(page, '#query') == [neighbour]
    assert page.current_url.endswith(neighbour.replace('/', '%2F'))


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_pointer_on_the_map_shows_the_image_there(page):
    from selenium.webdriver import ActionChains

    canvas = find(page, '#map')[0]
    page.execute_script('arguments[0].scrollIntoView({block: "center"})', canvas)
    x, y = page.execute_script('return positionOf(26)')
    size = canvas.size
    ActionChains(page).move_to_element_with_offset(canvas, x - size['width'] / 2, y - size['height'] / 2).perform()
    nearest = page.execute_script('return pointed')
    assert find(page, '#pointed')[0].text.endswith(f'{nearest:03d}.jpg')
    position = page.execute_script(f'return positionOf({nearest})')
    assert abs(position[0] - x) + abs(position[1] - y) < 4


@pytest.mark.slow
def test_the_class_table_sorts_by_the_column_whose_heading_is_clicked(page):
    def column(number):
        return [cell.get_property('textContent') for cell in find(page, f'#class-table tbody td:nth-child({number})')]

    assert [float(value) for value in column(3)] == sorted(float(value) for value in column(3))
    button = find(page, '#class-table th:nth-child(2) button')[0]
    for descending in (False, True):
        button.click()
        assert [int(value) for value in column(2)] == sorted((7, 8, 9, 3), reverse=descending)
    assert find(page, '#class-table th:nth-child(2)')[0].get_dom_attribute('aria-sort') == 'descending'


@pytest.mark.slow
def test_every_picture_has_a_text_and_loads(page):
    page.execute_async_script('Promise.all([...document.images].map(image => image.decode())).then(arguments[0])')
    assert page.execute_script('return [...document.images].every(image => image.alt && image.naturalWidth)')
    assert len(find(page, 'img')) > 50


@pytest.mark.slow
def test_the_report_fits_the_width_of_a_phone(page):
    page.execute_cdp_cmd('Emulation.setDeviceMetricsOverride',
                         {'width': 360, 'height': 740, 'deviceScaleFactor': 2, 'mobile': True})
    try:
        assert page.execute_script('return document.documentElement.scrollWidth') <= 360
    finally:
        page.execute_cdp_cmd('Emulation.clearDeviceMetricsOverride', {})
