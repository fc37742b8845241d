"""The page and the interface: what they answer is what test.py finds, whatever is sent to them."""
import asyncio
import base64
import io
import json
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import assert_one_line_error, start_command, type_command
from faults import damaged
from PIL import Image
from raw_trees import write_image
from test_embed import SETTINGS, make_model
from test_hostile import write_bomb
from test_report import RUN, make_shop

import embed
import serve
from common.errors import Unreachable, UserError
from common.files import save
from retrieval.database import load_data_base, open_data_base
from retrieval.search import NO_MATCH, nearest_images

pytest.importorskip('fastapi')
uvicorn = pytest.importorskip('uvicorn')


@pytest.fixture(scope='module')
def museum(tmp_path_factory) -> Path:
    """A folder with museum.pth of 15 images in three classes, one of them gone, and its model."""
    folder = tmp_path_factory.mktemp('served')
    for label, name in enumerate(('ara', 'zebra', "o'hara <b>")):
        for number in range(5):
            write_image(folder / 'photos' / name / f'{number}.jpg', label, number)
    write_image(folder / 'outside.jpg', 1, 77)
    embed.main(embed.get_args(['--data_base', str(folder / 'museum.pth'), '--images', str(folder / 'photos'),
                               '--labels', 'folder', '--num_workers', '0',
                               '--model', str(make_model(folder / 'birds_run_model.pth', 0))]))
    contents = torch.load(folder / 'museum.pth', weights_only=True)
    save({**contents, 'absent': [{'rate': 0.05, 'threshold': 0.9999}]}, folder / 'museum.pth')
    (folder / 'photos/zebra/4.jpg').unlink()
    return folder


def open_interface(data_base: Path, data_path: Path = Path('/nowhere')) -> serve.Interface:
    args = serve.get_args(['--data_base', str(data_base), '--data_path', str(data_path)])
    return serve.Interface(searching.open_searcher(args), data_base.stem)


class Server:
    """A server in a thread of this process."""

    def __init__(self, interface: serve.Interface, token: str | None = None):
        listening = serve.listen('127.0.0.1', 0)
        self.url = f'http://127.0.0.1:{listening.getsockname()[1]}'
        app = serve.make_app(interface, ['127.0.0.1'], token)
        self.server = uvicorn.Server(uvicorn.Config(app, log_level='warning'))
        self.thread = threading.Thread(target=self.server.run, args=([listening],))
        self.thread.start()

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()

    def ask(self, address: str, body=None, **headers) -> tuple[int, dict, bytes]:
        """Return status, headers and body of an answer; a body that is no bytes is sent as JSON."""
        if body is not None and not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {'Content-Type': 'application/json', **headers}
        request = urllib.request.Request(f'{self.url}{address}', body, headers)
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status, dict(answer.headers), answer.read()
        except urllib.error.HTTPError as error:
            return error.code, dict(error.headers), error.read()

    def search(self, body, words: str = '') -> dict:
        status, _, answer = self.ask(f'/search{words}', body)
        assert status == 200, answer
        return json.loads(answer)


@pytest.fixture(scope='module')
def server(museum):
    server = Server(open_interface(museum / 'museum.pth'))
    yield server
    server.stop()


def printed_by_test(museum: Path, query: Path, number: int) -> list[tuple[str, str]]:
    """Return path and similarity of what test.py finds."""
    with tempfile.TemporaryDirectory() as folder:
        result = type_command('test.py', '--data_base', museum / 'museum.pth', '--query_img_name', query,
                              '--retrieval_num', number, '--results_dir', folder)
    assert result.returncode == 0, result.stderr
    found = re.findall(r'^ +\d+  (\S+)  (.+?\.jpg)  ', result.stdout, re.MULTILINE)
    return [(path, similarity) for similarity, path in found]


# ---------------------------------------------------- answers -------------------------------------------------------
def test_a_picture_finds_what_test_py_finds(server, museum):
    answer = server.search((museum / 'outside.jpg').read_bytes(), '?k=15')
    assert [(found['path'], f'{found["similarity"]:.4f}') for found in answer['results']] == printed_by_test(
        museum, museum / 'outside.jpg', 15)
    assert answer['query'] is None
    assert answer['probably_absent'] is (answer['results'][0]['similarity'] <= 0.9999)


@pytest.mark.parametrize('binary', [False, True])
def test_an_image_of_the_collection_finds_the_others(server, museum, binary):
    base = load_data_base(museum / 'museum.pth')
    for number in (0, 7):
        expected = nearest_images(base.test.features[number], base, ('test', number), 9, binary)
        for asked in ({'image': str(number)}, {'path': base.test.images[number]}, {'image': number},
                      {'path': str(museum / 'photos' / base.test.images[number])}):
            answer = server.search({**asked, 'k': 9, 'binary': binary})
            assert answer['query']['path'] == base.test.images[number]
            assert [(int(found['image']), found['similarity']) for found in answer['results']] == expected
            assert [found['class'] for found in answer['results']] == [base.class_of(int(base.test.labels[index]))
                                                                       for index, _ in expected]
            assert (answer['probably_absent'] is None) == binary  # the threshold is one of cosines


def test_words_find_files_and_classes(server):
    found = json.loads(server.ask('/find?q=ARA%200')[2])
    assert found['count'] == 2
    assert [one['path'] for one in found['results']] == ['ara/0.jpg', "o'hara <b>/0.jpg"]
    assert json.loads(server.ask('/find?q=%20')[2]) == {'count': 0, 'results': []}


def test_images_are_served_by_number_as_small_copies_that_last(server, museum):
    found = server.search({'image': '3', 'k': 1})['query']
    status, headers, body = server.ask(f'/{found["url"]}')
    assert status == 200
    assert 'immutable' in headers['cache-control']
    assert headers['x-content-type-options'] == 'nosniff'
    with Image.open(io.BytesIO(body)) as image:
        assert image.format == 'JPEG'
        assert max(image.size) <= serve.THUMBNAIL
    assert server.ask('/images/3?v=old')[1]['cache-control'] == 'no-cache'
    base = load_data_base(museum / 'museum.pth')
    assert server.ask(f'/images/{base.test.images.index("zebra/4.jpg")}')[0] == 404  # it was deleted
    link, number = museum / 'photos/zebra/4.jpg', base.test.images.index('zebra/4.jpg')
    link.symlink_to(museum / 'outside.jpg')
    assert server.ask(f'/images/{number}')[0] == 404  # a link out of the folder
    link.unlink()
    for name in ('15', '-1', 'x', '..%2f..%2foutside.jpg', 'ara%2f0.jpg', '1e1', '9' * 5000):
        assert server.ask(f'/images/{name}')[0] == 404, name


def test_the_interface_is_described_without_fetching_anything(server):
    schema = json.loads(server.ask('/openapi.json')[2])
    assert {'/search', '/find', '/images/{number}', '/health'} <= schema['paths'].keys()
    page = server.ask('/docs')[2].decode()
    assert 'POST /search' in page
    for text in (page, server.ask('/')[2].decode()):
        assert not re.search(r'(?:src|href)\s*=\s*"(?:https?:)?//', text)
    assert json.loads(server.ask('/health')[2]) == {'status': 'ok', 'images': 15}


# ---------------------------------------------------- hostile ------------------------------------------------------
def bomb() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write_bomb(Path(folder) / 'bomb.png', 9500)
        return (Path(folder) / 'bomb.png').read_bytes()


@pytest.mark.parametrize(('words', 'body', 'status', 'part'), [
    ('', lambda: bytes(serve.MOST_BYTES + 1), 413, '20,000,000 bytes'), ('', bomb, 415, 'decompression bomb'),
    ('', lambda: b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n', 415, 'of no format that is known'),
    ('', lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', 415, 'no picture'), ('', lambda: b'', 415, 'no picture'),
    ('?k=0', lambda: b'x', 422, 'k must be'), ('?k=1e9', lambda: b'x', 422, 'k must be'),
    ('?binary=maybe', lambda: b'x', 422, 'binary must be'), ('?path=ara/0.jpg', lambda: b'x', 422, 'as JSON'),
    ('', lambda: {'path': '../outside.jpg'}, 404, 'outside.jpg'), ('', lambda: {'path': '/etc/passwd'}, 404, 'passwd'),
    ('', lambda: {'path': 'ara/0.jpg', 'image': '0'}, 422, 'JSON'), ('', lambda: [], 422, 'JSON'),
    ('', lambda: {'image': '99'}, 404, "'99'"), ('', lambda: {'image': True}, 404, 'True'),
    ('', lambda: {'image': 0, 'k': 2.5}, 422, 'k must be'), ('', lambda: {'path': 'x' * 10**5}, 413, '10,000 bytes')])
def test_what_cannot_be_searched_for_is_refused_in_one_line(server, museum, tmp_path, monkeypatch, words, body, status,
                                                             part):
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    before = sorted(museum.rglob('*'))
    found, _, answer = server.ask(f'/search{words}', body())
    line = json.loads(answer)['error']
    assert found == status
    assert part in line
    assert '\n' not in line
    assert '0x' not in line
    assert sorted(museum.rglob('*')) == before
    assert list(tmp_path.iterdir()) == []


def test_damaged_pictures_and_strange_json_are_answered_below_500(server):
    rng, buffer = np.random.default_rng(0), io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(buffer, 'PNG')
    for _ in range(60):
        assert server.ask('/search?k=2', damaged(buffer.getvalue(), rng))[0] in (200, 415)
    good = b'{"path": "ara/0.jpg", "k": 3, "binary": false}'
    for _ in range(60):
        status, _, answer = server.ask('/search', damaged(good, rng), **{'Content-Type': 'application/json'})
        assert status in (200, 404, 422), answer


def test_another_site_cannot_pass_itself_off_as_the_server(server):
    assert server.ask('/health', Host='evil.example')[0] == 400


def test_a_collection_that_cannot_be_reached_is_one_line_on_the_servers_side_alone(museum, monkeypatch, capsys):
    interface = open_interface(museum / 'museum.pth')
    server = Server(interface)

    def unreachable(*_):
        raise Unreachable('--qdrant http://x: connection refused')

    try:
        monkeypatch.setattr(interface.collection, 'search', unreachable)
        picture = (museum / 'outside.jpg').read_bytes()
        assert server.ask('/search', picture)[0] == 503
        for name in ('item', 'any', 'find', 'index_of'):
            monkeypatch.setattr(interface.collection, name, unreachable)
        for address, body in (('/images/3', None), ('/any', None), ('/find?q=ara', None), ('/search', {'image': '3'}),
                              ('/search', {'path': 'ara/0.jpg'})):
            status, _, answer = server.ask(address, body)
            assert (status, json.loads(answer)) == (503, {'error': 'the collection cannot be reached'}), address
        assert capsys.readouterr().err == 6 * '--qdrant http://x: connection refused\n'
    finally:
        server.stop()


def test_a_token_is_asked_of_everything_but_health(museum, server):
    guarded = Server(open_interface(museum / 'museum.pth'), 'let-me-in')
    try:
        for address in ('/', '/images/0', '/find?q=a', '/docs', '/openapi.json', '/?token=wrong', '/any'):
            assert guarded.ask(address)[0] == 401, address
        assert guarded.ask('/search', {'image': '0'})[0] == 401
        assert guarded.ask('/health')[0] == 200
        assert guarded.ask('/search', {'image': '0'}, Authorization='Bearer let-me-in')[0] == 200
        assert guarded.ask('/', Cookie='token=let-me-in')[0] == 200
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        with opener.open(f'{guarded.url}/?token=let-me-in') as answer:
            assert answer.url == f'{guarded.url}/'  # the word is not left in the address
        with opener.open(f'{guarded.url}/images/0') as answer:
            assert answer.status == 200
    finally:
        guarded.stop()


# ---------------------------------------------------- together -----------------------------------------------------
def test_requests_that_arrive_together_share_a_batch_and_one_that_fails_stops_no_other():
    collection = SimpleNamespace(search=lambda features, number, binary: [[(int(row[0]), 1.0)] * number
                                                                          for row in features])
    searcher = searching.Searcher(collection, None, SETTINGS, None, torch.device('cpu'))
    batches, answer, free = [], searcher.answer, threading.Event()

    def slow(queries):
        batches.append(len(queries))
        free.wait()
        if any(query.feature[0] == 13 for query in queries):
            raise ValueError('unlucky')
        return answer(queries)

    searcher.answer = slow

    async def run() -> list:
        first = asyncio.create_task(searcher.search(searching.Query(None, torch.tensor([0.0]), 1, False)))
        while not batches:
            await asyncio.sleep(0.001)
        queries = [searching.Query(None, torch.tensor([float(index)]), index, False) for index in range(1, 23)]
        others = [asyncio.create_task(searcher.search(query)) for query in queries]
        await asyncio.sleep(0)
        free.set()
        return await asyncio.gather(first, *others, return_exceptions=True)

    found = asyncio.run(run())
    assert batches == [1, searching.BATCH, 22 - searching.BATCH]
    assert all(isinstance(one, RuntimeError) and 'unlucky' in str(one) for one in found[1:17])
    assert found[0] == [(0, 1.0)]
    assert [len(one) for one in found[17:]] == list(range(17, 23))


def test_many_clients_get_the_answers_of_one(server, museum):
    pictures = [(museum / 'outside.jpg').read_bytes(), (museum / 'photos/ara/0.jpg').read_bytes()]
    alone = [[found['path'] for found in server.search(picture, '?k=5')['results']] for picture in pictures]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda index: [found['path'] for found in server.search(
            pictures[index % 2], '?k=5')['results']], range(64)))
    assert together == [alone[index % 2] for index in range(64)]


def test_a_local_server_answers_to_its_own_name_whatever_it_is(museum, monkeypatch):
    hosts = []
    monkeypatch.setattr(serve, 'make_app', lambda interface, names, token: hosts.append(names))
    monkeypatch.setattr(uvicorn, 'Server', lambda config: SimpleNamespace(run=lambda sockets: sockets[0].close()))
    for host, address in (('127.0.0.1', '127.0.0.1'), ('::1', '[::1]'), ('here.example', 'here.example')):
        sock = SimpleNamespace(getsockname=lambda: ('127.0.0.1', 8000), close=lambda: None)
        monkeypatch.setattr(serve, 'listen', lambda *_, sock=sock: sock)
        serve.main(serve.get_args(['--data_base', str(museum / 'museum.pth'), '--host', host]))
        assert address in hosts[-1]
    assert all('[::1]' in names for names in hosts)  # as a browser writes it


def test_sigterm_ends_the_server_after_the_request_at_hand(museum, tmp_path):
    picture, out, err = (museum / 'outside.jpg').read_bytes(), tmp_path / 'out', tmp_path / 'err'
    process = start_command('serve.py', '--data_base', museum / 'museum.pth', '--port', '0', out=out, err=err)
    try:
        while not (out.exists() and out.read_text().endswith('\n')):
            assert process.is_alive(), err.read_text()
            process.join(0.1)
        assert re.fullmatch(r'15 images at http://127\.0\.0\.1:\d+; Ctrl-C ends it\n', out.read_text())
        with socket.create_connection(('127.0.0.1', int(re.search(r':(\d+);', out.read_text())[1]))) as connection:
            connection.sendall(b'POST /search?k=2 HTTP/1.1\r\nHost: 127.0.0.1\r\nExpect: 100-continue\r\n'
                               b'Connection: close\r\nContent-Length: %d\r\n\r\n' % len(picture))
            assert connection.recv(100).startswith(b'HTTP/1.1 100')  # it waits for the picture now
            os.kill(process.pid, signal.SIGTERM)
            connection.sendall(picture)
            answer = b''.join(iter(lambda: connection.recv(2**16), b''))
        assert answer.startswith(b'HTTP/1.1 200')
        assert len(json.loads(answer.split(b'\r\n\r\n')[1])['results']) == 2
        process.join(60)
        assert process.exitcode == 0, err.read_text()
    finally:
        process.kill()


# ---------------------------------------------------- command line -------------------------------------------------
def test_the_data_base_of_a_run_is_served_without_its_model(tmp_path):
    file = make_shop(tmp_path, gallery=(4, 2, 5, 1, 3))
    server = Server(open_interface(file, tmp_path))
    try:
        base = load_data_base(file)
        found = server.search({'image': '2', 'k': 5})
        assert found['query']['path'] == base.gallery.images[2]  # what is searched in
        assert server.ask('/images/2')[0] == 200
        status, _, answer = server.ask('/search', (tmp_path / 'birds' / base.test.images[0]).read_bytes())
        assert (status, 'the model is not there' in answer.decode()) == (409, True)
        assert 'id="drop"' not in server.ask('/')[2].decode()
    finally:
        server.stop()
    assert open_data_base(f'{RUN}_data_base.pth', tmp_path / 'results', tmp_path).roots == [tmp_path / 'birds']


def test_without_its_packages_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'fastapi', None)
    with pytest.raises(UserError, match='pip install -r requirements-serve.txt'):
        serve.main(serve.get_args(['--data_base', 'x.pth']))


@pytest.mark.parametrize(('words', 'parts'), [
    ([], ['no.pth']), (['--token', 'short'], ['--token']), (['--port', '70000'], ['--port 70000']),
    (['--host', '1.2.3.4'], ['--host 1.2.3.4'])])
def test_what_cannot_be_served_is_one_line(words, parts):
    assert_one_line_error(type_command('serve.py', '--port', '0', '--data_base', 'no.pth', *words), *parts)


def test_a_port_that_is_taken_is_one_line():
    taken = serve.listen('127.0.0.1', 0)
    with pytest.raises(UserError, match=f'--port {taken.getsockname()[1]} cannot be had'):
        serve.listen('127.0.0.1', taken.getsockname()[1])
    taken.close()


# ---------------------------------------------------- in a browser -------------------------------------------------
def find(browser, selector):
    from selenium.webdriver.common.by import By

    return browser.find_elements(By.CSS_SELECTOR, selector)


def wait_for(browser, is_so):
    from selenium.webdriver.support.wait import WebDriverWait

    return WebDriverWait(browser, 60).until(lambda _: is_so())


def shown(browser):
    """Return path and similarity of the results, at one moment."""
    return [tuple(pair) for pair in browser.execute_script(
        "return [...document.querySelectorAll('#results .tile')].map("
        r'one => [one.title, one.textContent.match(/\d\.\d{4}/)[0]])')]


@pytest.fixture
def page(server, browser):
    browser.get('about:blank')
    browser.get(server.url)
    yield browser
    # The image that was deleted and the link that leads out are answered by 404, which a browser logs.
    assert [entry for entry in browser.get_log('browser') if entry['level'] == 'SEVERE'
            and not re.search(r'/images/\d+\?.*404', entry['message'])] == []


def test_the_page_shows_what_test_py_finds_and_searches_on(page, server, museum):
    find(page, '#file')[0].send_keys(str(museum / 'outside.jpg'))
    wait_for(page, lambda: len(find(page, '#results .tile')) == 15)
    assert shown(page) == printed_by_test(museum, museum / 'outside.jpg', 15)
    absent = server.search((museum / 'outside.jpg').read_bytes())['probably_absent']
    assert find(page, '#note')[0].is_displayed() == absent
    assert (NO_MATCH in find(page, '#note')[0].text) == absent
    first = shown(page)[0][0]
    find(page, '#results .tile')[0].click()
    wait_for(page, lambda: len(shown(page)) == 14)
    assert find(page, '#query .tile')[0].get_dom_attribute('title') == first
    expected = server.search({'path': first})['results']
    assert shown(page) == [(one['path'], f'{one["similarity"]:.4f}') for one in expected]
    assert [tile.get_dom_attribute('class').split()[-1] for tile in find(page, '#results .tile')] == [
        'same' if one['class'] == first.split('/')[0] else 'other' for one in expected]


def test_a_picture_that_is_dropped_or_pasted_is_searched_for(page, museum):
    send = """
        const bytes = Uint8Array.from(atob(arguments[0]), letter => letter.charCodeAt(0)), sent = new DataTransfer();
        sent.items.add(new File([bytes], 'dropped.jpg', {type: 'image/jpeg'}));
        document.dispatchEvent(arguments[1] === 'drop' ? new DragEvent('drop', {dataTransfer: sent, cancelable: true})
            : new ClipboardEvent('paste', {clipboardData: sent}));"""
    for kind, name in (('drop', 'ara/0.jpg'), ('paste', 'zebra/1.jpg')):
        page.execute_script(send, base64.b64encode((museum / 'photos' / name).read_bytes()).decode(), kind)
        wait_for(page, lambda name=name: shown(page)[:1] == [(name, '1.0000')])


def test_words_keys_and_an_error_on_the_page(page, tmp_path):
    from selenium.webdriver.common.keys import Keys

    find(page, 'body')[0].send_keys('/')
    page.switch_to.active_element.send_keys('<b> 3')
    wait_for(page, lambda: find(page, '#count')[0].text == '1 image')
    page.switch_to.active_element.send_keys(Keys.TAB)
    page.switch_to.active_element.send_keys(Keys.ENTER)
    wait_for(page, lambda: len(find(page, '#results .tile')) == 14)
    assert find(page, '#query .tile')[0].get_dom_attribute('title') == "o'hara <b>/3.jpg"
    page.execute_script('document.activeElement.blur()')
    find(page, 'body')[0].send_keys(Keys.ARROW_RIGHT)
    assert page.switch_to.active_element.get_dom_attribute('class').startswith('tile')
    (tmp_path / 'no.jpg').write_bytes(b'no picture')
    find(page, '#file')[0].send_keys(str(tmp_path / 'no.jpg'))
    wait_for(page, lambda: 'no picture that can be read' in find(page, '#error')[0].text)
    log = [entry['message'] for entry in page.get_log('browser')]  # a browser logs the refusal itself
    assert [line for line in log if '/search' not in line and '404' not in line] == []


def test_the_page_fits_a_phone(page, museum):
    page.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', {'width': 360, 'height': 740, 'deviceScaleFactor': 2,
                                                                'mobile': True})
    try:
        find(page, '#file')[0].send_keys(str(museum / 'outside.jpg'))
        wait_for(page, lambda: len(find(page, '#results .tile')) == 15)
        assert page.execute_script('return document.documentElement.scrollWidth') <= 360
        assert find(page, '#results .tile')[0].size['width'] >= 120
    finally:
        page.execute_cdp_cmd('Emulation.clearDeviceMetricsOverride', {})
