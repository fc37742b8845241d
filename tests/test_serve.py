"""The page and the API: their answers are what a search in the data base finds, whatever is sent to them."""
import base64
import io
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, assert_one_line_error, call_main, start_command
from faults import damaged
from museum import Server, make_model, write_photos
from PIL import Image
from raw_trees import write_image

import embed
import serve
from common.errors import Unreachable, UserError
from common.files import save
from retrieval.database import DataBase, Subset, load_data_base
from retrieval.embedding import embed_images
from retrieval.model_file import load_model
from retrieval.search import NO_MATCH, nearest_images
from retrieval.searcher import open_searcher
from serving import thumbnails, uploads

pytest.importorskip('fastapi')
connections = pytest.importorskip('serving.connections')
CPU = torch.device('cpu')


@pytest.fixture(scope='module')
def museum(tmp_path_factory) -> Path:
    """A folder with museum.pth of 15 images in three classes, one of them deleted since, and its model."""
    folder = tmp_path_factory.mktemp('served')
    write_photos(folder / 'photos', {'ara': 5, 'zebra': 5, "o'hara <b>": 5})
    write_image(folder / 'outside.jpg', 1, 77)
    call_main(embed, '--data_base', folder / 'museum.pth', '--images', folder / 'photos', '--labels', 'folder',
              '--num_workers', 0, '--model', make_model(folder / 'birds_run_model.pth'))
    contents = torch.load(folder / 'museum.pth', weights_only=True)
    save({**contents, 'open_set': [{'rate': 0.05, 'threshold': 0.9999, 'marked': 50.0}]}, folder / 'museum.pth')
    (folder / 'photos/zebra/4.jpg').unlink()
    return folder


def open_museum(museum: Path):
    return open_searcher(str(museum / 'museum.pth'), '', '/nowhere', CPU)


@pytest.fixture(scope='module')
def server(museum):
    with Server(open_museum(museum)) as server:
        yield server


def nearest_to_file(museum: Path, file: Path, k: int) -> list[tuple[str, str]]:
    """Return path and rounded similarity of what the library finds for an image file."""
    model, run = load_model(museum / 'museum_model.pth')
    data_base = load_data_base(museum / 'museum.pth')
    return [(data_base.test.images[index], f'{similarity:.4f}') for index, similarity in nearest_images(
        embed_images(model, [file], run)[0], data_base, number=k)]


# ---------------------------------------------------- answers -----------------------------------------------------
def test_an_upload_finds_what_the_library_finds(server, museum):
    answer = server.search((museum / 'outside.jpg').read_bytes(), '?k=15')
    assert [(result['path'], f'{result["similarity"]:.4f}') for result in answer['results']] == nearest_to_file(
        museum, museum / 'outside.jpg', 15)
    assert answer['query'] is None
    assert answer['threshold'] == 0.9999
    assert answer['no_close_match'] is (answer['results'][0]['similarity'] < 0.9999)
    by_codes = server.search((museum / 'outside.jpg').read_bytes(), '?k=15&binary=1')
    assert (by_codes['threshold'], by_codes['no_close_match']) == (None, None)  # the threshold is a cosine


@pytest.mark.slow
def test_curl_sends_a_form_or_raw_bytes(server, museum):
    expected = server.search((museum / 'outside.jpg').read_bytes(), '?k=3')
    for options in (['-F', f'image=@{museum}/outside.jpg'], ['--data-binary', f'@{museum}/outside.jpg'],
                    ['-T', f'{museum}/outside.jpg', '-X', 'POST']):
        answer = subprocess.run(['curl', '-s', *options, f'{server.url}/search?k=3'], capture_output=True, check=True)
        assert json.loads(answer.stdout) == expected


@pytest.mark.parametrize('binary', [False, True])
def test_an_image_of_the_collection_finds_the_others(server, museum, binary):
    data_base = load_data_base(museum / 'museum.pth')
    for number in (0, 7):
        expected = nearest_images(data_base.test.features[number], data_base, ('test', number), 9, binary)
        path = data_base.test.images[number]
        for asked in ({'image': str(number)}, {'path': path}, {'image': number},
                      {'path': str(museum / 'photos' / path)}):
            answer = server.search({**asked, 'k': 9, 'binary': binary})
            assert answer['query']['path'] == path
            assert [(int(result['image']), result['similarity']) for result in answer['results']] == expected
            assert [result['class'] for result in answer['results']] == [
                data_base.class_of(int(data_base.test.labels[index])) for index, _ in expected]
            assert (answer['threshold'], answer['no_close_match']) == (None, None)  # it is in the collection


def test_k_has_a_default_and_a_limit_and_may_exceed_the_collection(server, museum):
    upload = (museum / 'outside.jpg').read_bytes()
    assert len(server.search(upload)['results']) == min(15, uploads.DEFAULT_K)
    assert len(server.search(upload, f'?k={uploads.MAX_K}')['results']) == 15
    assert len(server.search(upload, '?k=2&binary=1')['results']) == 2
    assert server.request(f'/search?k={uploads.MAX_K + 1}', upload)[0] == 422


def test_words_find_files_and_classes(server):
    answer = json.loads(server.request('/find?q=ARA%200')[2])
    assert answer['count'] == 2
    assert [result['path'] for result in answer['results']] == ['ara/0.jpg', "o'hara <b>/0.jpg"]
    assert json.loads(server.request('/find?q=%20')[2]) == {'count': 0, 'results': []}


def test_a_random_image_is_one_of_the_collection(server, museum):
    answer = json.loads(server.request('/random')[2])
    assert answer['path'] == load_data_base(museum / 'museum.pth').test.images[int(answer['image'])]


def test_images_are_served_by_index_as_small_jpegs_that_browsers_keep(server):
    image = server.search({'image': '3', 'k': 1})['query']
    status, headers, body = server.request(f'/{image["url"]}')
    assert status == 200
    assert 'immutable' in headers['cache-control']
    assert headers['x-content-type-options'] == 'nosniff'
    with Image.open(io.BytesIO(body)) as picture:
        assert picture.format == 'JPEG'
        assert max(picture.size) <= thumbnails.THUMBNAIL_SIDE
    assert server.request('/images/3?v=old')[1]['cache-control'] == 'no-cache'
    for index in ('15', '-1', 'x', '..%2f..%2foutside.jpg', 'ara%2f0.jpg', '1e1', '9' * 5000):
        assert server.request(f'/images/{index}')[0] == 404, index


def test_the_url_of_an_image_changes_with_its_file(museum):
    collection = open_museum(museum).collection
    url = serve.summary_of(collection, 3)['url']
    item = collection.item(3)
    collection.item = lambda index: item.with_stamp((item.size, item.time + 1))
    changed = serve.summary_of(collection, 3)['url']
    assert url.split('?')[0] == changed.split('?')[0] == 'images/3'
    assert url != changed


def test_a_large_image_becomes_a_thumbnail_of_its_proportions(tmp_path):
    Image.new('RGB', (1000, 500)).save(tmp_path / 'a.png')
    with Image.open(io.BytesIO(thumbnails.make_thumbnail(str(tmp_path), 'a.png'))) as thumbnail:
        assert thumbnail.size == (thumbnails.THUMBNAIL_SIDE, thumbnails.THUMBNAIL_SIDE // 2)


@pytest.mark.parametrize('length', [0, 100_000])
def test_a_thumbnail_holds_pixels_alone(tmp_path, length):
    exif = Image.Exif()
    exif[0x010e] = 'a secret description'
    for name, options in (('a.jpg', {'exif': exif, 'comment': b'a secret'}), ('a.gif', {'comment': bytes(length)})):
        Image.new('RGB', (40, 30)).save(tmp_path / name, **options)
        thumbnail = thumbnails.make_thumbnail(str(tmp_path), name)
        assert b'secret' not in thumbnail
        assert len(thumbnail) < 2000


def test_an_image_that_was_deleted_or_replaced_by_a_link_is_not_served(server, museum):
    index = load_data_base(museum / 'museum.pth').test.images.index('zebra/4.jpg')
    assert server.request(f'/images/{index}')[0] == 404
    link = museum / 'photos/zebra/4.jpg'
    link.symlink_to(museum / 'outside.jpg')
    assert server.request(f'/images/{index}')[0] == 404
    link.unlink()


def test_the_pages_load_nothing_from_elsewhere(server):
    schema = json.loads(server.request('/openapi.json')[2])
    assert {'/search', '/find', '/random', '/images/{index}', '/health', '/ready', '/metrics'} == schema['paths'].keys()
    docs, page = (server.request(address)[2].decode() for address in ('/docs', '/'))
    assert 'POST /search' in docs
    for text in (docs, page):
        assert not re.search(r'(?:src|href)\s*=\s*"(?:https?:)?//', text)
    assert "default-src 'none'" in server.request('/')[1]['content-security-policy']
    assert json.loads(server.request('/health')[2]) == {'status': 'ok'}
    assert json.loads(server.request('/ready')[2]) == {'status': 'ready', 'images': 15}


def test_a_run_is_searched_in_its_gallery_and_without_a_model(tmp_path):
    settings = {'data_name': 'birds', 'crop_type': 'uncropped', 'batch_size': 4, 'resize_size': 32, 'amp': 'auto',
                'recalls': [1]}
    write_photos(tmp_path / 'birds', {'a': 3, 'b': 2})
    gallery = Subset(['a/1.jpg', 'b/0.jpg', 'b/1.jpg'], torch.tensor([0, 1, 1]), torch.eye(5)[1:4])
    DataBase(['a', 'b'], Subset(['a/0.jpg'], torch.tensor([0]), torch.eye(5)[:1]), gallery,
             origin={'args': settings}).save(tmp_path / 'run_data_base.pth')
    with Server(open_searcher('run_data_base.pth', str(tmp_path), str(tmp_path), CPU)) as server:
        answer = server.search({'image': '2', 'k': 5})
        assert answer['query']['path'] == 'b/1.jpg'
        assert [result['class'] for result in answer['results']] == ['a', 'b']
        assert answer['threshold'] is None
        assert server.request('/images/2')[0] == 200
        status, _, body = server.request('/search', (tmp_path / 'birds/a/0.jpg').read_bytes())
        assert (status, 'the model is missing' in body.decode()) == (409, True)
        assert 'id="drop"' not in server.request('/')[2].decode()


# ---------------------------------------------------- hostile requests --------------------------------------------
def bomb() -> bytes:
    """Return a small PNG file that claims to have 9500 x 9500 pixels."""
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))

    header = struct.pack('>IIBBBBB', 9500, 9500, 8, 0, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(bytes(1000))) + chunk(
        b'IEND', b'')


DEEP_JSON = b'[' * 5000


@pytest.mark.parametrize(('query_string', 'body', 'status', 'part'), [
    ('', lambda: bytes(uploads.MAX_UPLOAD + 1), 413, '20,000,000 bytes'), ('', bomb, 415, 'decompression bomb'),
    ('', lambda: b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n', 415, 'unknown format'),
    ('', lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', 415, 'cannot be read'),
    ('', lambda: b'', 415, 'cannot be read'), ('?k=0', lambda: b'x', 422, 'k must be'),
    ('?k=1e9', lambda: b'x', 422, 'k must be'), ('?binary=maybe', lambda: b'x', 422, 'binary must be'),
    ('?path=ara/0.jpg', lambda: b'x', 422, 'as JSON'), ('', lambda: {'path': '../outside.jpg'}, 404, 'outside.jpg'),
    ('', lambda: {'path': '/etc/passwd'}, 404, 'passwd'), ('', lambda: [], 422, 'JSON'),
    ('', lambda: {'path': 'ara/0.jpg', 'image': '0'}, 422, 'JSON'),
    ('', lambda: DEEP_JSON, 422, 'JSON'), ('', lambda: {'image': '99'}, 404, "'99'"),
    ('', lambda: {'image': True}, 404, 'True'), ('', lambda: {'image': 0, 'k': 2.5}, 422, 'k must be'),
    ('', lambda: {'path': 'x' * 10**5}, 413, '10,000 bytes')])
def test_what_cannot_be_searched_for_is_refused_in_one_line(server, museum, tmp_path, monkeypatch, query_string, body,
                                                             status, part):
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    before = sorted(museum.rglob('*'))
    headers = {'Content-Type': 'application/json'} if body() == DEEP_JSON else {}
    answered, _, answer = server.request(f'/search{query_string}', body(), **headers)
    line = json.loads(answer)['error']
    assert answered == status
    assert part in line
    assert '\n' not in line
    assert '0x' not in line  # no address of an object
    assert sorted(museum.rglob('*')) == before
    assert list(tmp_path.iterdir()) == []


def scan_bomb() -> bytes:
    """Return a progressive JPEG file of one colour whose decoding takes half a minute: 8,000 x 8,000 px, 95 scans."""
    buffer = io.BytesIO()
    Image.new('RGB', (8000, 8000)).save(buffer, 'JPEG', progressive=True)
    data = buffer.getvalue()
    scans = [match.start() for match in re.finditer(rb'\xff\xda', data)]
    last = data[scans[-1]:-2]
    return data[:-2] + (95 - len(scans)) * last + data[-2:]


@pytest.mark.slow
def test_a_picture_that_takes_too_long_is_refused_and_stops_no_other(museum):
    searcher = open_museum(museum)
    searcher.decoders.seconds = 1
    picture, bomb = (museum / 'outside.jpg').read_bytes(), scan_bomb()
    with Server(searcher) as server, ThreadPoolExecutor(8) as senders:
        server.search(picture)  # the processes have started
        bombs = [senders.submit(server.request, '/search', bomb) for _ in range(8)]
        assert server.request('/find?q=ara')[0] == 200
        answers = [future.result() for future in bombs]
        assert {status for status, *_ in answers} == {415}
        assert {json.loads(body)['error'] for *_, body in answers} == {
            'the picture cannot be read (it takes more than 1 seconds)'}
        assert len(server.search(picture)['results']) == 15


@pytest.mark.parametrize('count', [8, pytest.param(200, marks=pytest.mark.slow)])
def test_damaged_pictures_and_json_are_answered_below_500(server, count):
    rng, buffer = np.random.default_rng(count), io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(buffer, 'PNG')
    for _ in range(count):
        assert server.request('/search?k=2', damaged(buffer.getvalue(), rng))[0] in (200, 415)
    good = b'{"path": "ara/0.jpg", "k": 3, "binary": false}'
    for _ in range(count):
        status, _, answer = server.request('/search', damaged(good, rng), **{'Content-Type': 'application/json'})
        assert status in (200, 404, 422), answer


def test_another_site_cannot_pass_itself_off_as_the_server(server):
    assert server.request('/health', Host='evil.example')[0] == 400


def test_an_unreachable_collection_is_explained_to_the_operator_alone(museum, monkeypatch, capsys):
    searcher = open_museum(museum)

    def unreachable(*_):
        raise Unreachable('--qdrant http://x: connection refused')

    with Server(searcher) as server:
        monkeypatch.setattr(searcher.collection, 'search', unreachable)
        assert server.request('/search', (museum / 'outside.jpg').read_bytes())[0] == 503
        for name in ('item', 'random_index', 'find', 'index_of'):
            monkeypatch.setattr(searcher.collection, name, unreachable)
        for address, body in (('/images/3', None), ('/random', None), ('/find?q=ara', None),
                              ('/search', {'image': '3'}), ('/search', {'path': 'ara/0.jpg'})):
            status, _, answer = server.request(address, body)
            assert (status, json.loads(answer)) == (503, {'error': 'the collection cannot be reached'}), address
        assert capsys.readouterr().err == 6 * '--qdrant http://x: connection refused\n'


def test_a_token_is_required_of_everything_but_health(museum):
    with Server(open_museum(museum), 'let-me-in') as server:
        for address in ('/', '/images/0', '/find?q=a', '/docs', '/openapi.json', '/?token=wrong', '/random'):
            assert server.request(address)[0] == 401, address
        assert server.request('/search', {'image': '0'})[0] == 401
        assert server.request('/health')[0] == 200
        assert server.request('/search', {'image': '0'}, Authorization='Bearer let-me-in')[0] == 200
        assert server.request('/', Cookie='token=let-me-in')[0] == 200
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        with opener.open(f'{server.url}/?token=let-me-in') as answer:
            assert answer.url == f'{server.url}/'  # the token does not stay in the address
        with opener.open(f'{server.url}/images/0') as answer:
            assert answer.status == 200


# ---------------------------------------------------- clients, signals --------------------------------------------
@pytest.mark.parametrize('searches', [12, pytest.param(200, marks=pytest.mark.slow)])
def test_many_clients_get_the_answers_of_one(server, museum, searches):
    pictures = [(museum / 'outside.jpg').read_bytes(), (museum / 'photos/ara/0.jpg').read_bytes()]

    def search(number: int) -> list[str]:
        return [result['path'] for result in server.search(pictures[number % 2], '?k=5')['results']]

    alone = [search(0), search(1)]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(search, range(searches)))
    assert together == [alone[number % 2] for number in range(searches)]


@pytest.fixture
def hosts_of(museum, monkeypatch):
    """Call serve.py without serving; returns the names that clients may address it by."""
    def call(host: str, address: str, *words) -> list[str]:
        hosts = []
        sock = SimpleNamespace(getsockname=lambda: (address, 8000))
        monkeypatch.setattr(serve, 'listen', lambda *_: sock)
        monkeypatch.setattr(serve, 'make_app', lambda api, names, *_: hosts.extend(names))
        monkeypatch.setattr(connections, 'make_server', lambda app: SimpleNamespace(run=lambda sockets: None))
        serve.main(serve.get_args(['--data_base', str(museum / 'museum.pth'), '--host', host, *words]))
        return hosts
    return call


def test_a_local_server_answers_to_its_own_name(hosts_of):
    for host in ('127.0.0.1', '::1', 'here.example'):
        assert hosts_of(host, '127.0.0.1') == ['localhost', host]


def test_a_public_server_says_who_can_see_the_images(hosts_of, capsys):
    assert hosts_of('0.0.0.0', '0.0.0.0', '--allowed_host', 'a.example', 'b.example') == [
        'localhost', '0.0.0.0', socket.gethostname(), 'a.example', 'b.example']
    assert 'Anyone who can reach this machine over the network can search' in capsys.readouterr().out
    hosts_of('0.0.0.0', '0.0.0.0', '--token', 'let-me-in')
    assert 'and knows the token can search' in capsys.readouterr().out
    hosts_of('127.0.0.1', '127.0.0.1')
    assert 'Anyone' not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize('is_stalled', [False, True])
def test_sigterm_ends_the_server_after_the_request_at_hand(museum, tmp_path, is_stalled):
    picture, out, err = (museum / 'outside.jpg').read_bytes(), tmp_path / 'out', tmp_path / 'err'
    process = start_command('serve.py', '--data_base', museum / 'museum.pth', '--port', '0', out=out, err=err)
    try:
        while not (out.exists() and out.read_text().endswith('\n')):
            assert process.is_alive(), err.read_text()
            process.join(0.1)
        assert re.fullmatch(r'15 images at http://127\.0\.0\.1:\d+; press Ctrl-C to stop\n', out.read_text())
        with socket.create_connection(('127.0.0.1', int(re.search(r':(\d+);', out.read_text())[1]))) as connection:
            connection.sendall(b'POST /search?k=2 HTTP/1.1\r\nHost: 127.0.0.1\r\nExpect: 100-continue\r\n'
                               b'Connection: close\r\nContent-Length: %d\r\n\r\n' % len(picture))
            assert connection.recv(100).startswith(b'HTTP/1.1 100')  # it waits for the picture now
            os.kill(process.pid, signal.SIGTERM)
            connection.sendall(picture[:3] if is_stalled else picture)
            answer = b''.join(iter(lambda: connection.recv(2**16), b''))
        assert answer.startswith(b'HTTP/1.1 500' if is_stalled else b'HTTP/1.1 200')
        if not is_stalled:
            assert len(json.loads(answer.split(b'\r\n\r\n')[1])['results']) == 2
        process.join(60)
        assert process.exitcode == 0, err.read_text()
    finally:
        process.kill()


def test_a_changed_collection_is_reloaded_and_a_broken_one_is_not(museum, tmp_path, capsys):
    for name in ('museum.pth', 'museum_model.pth'):
        shutil.copy(museum / name, tmp_path / name)
    args = serve.get_args(['--data_base', str(tmp_path / 'museum.pth'), '--device', 'cpu'])
    with Server(serve.open_collection(args)) as server:
        assert len(server.search({'image': '0'})['results']) == 14
        call_main(embed, '--data_base', tmp_path / 'museum.pth', '--remove', 'ara')
        assert len(server.search({'image': '0'})['results']) == 14
        server.request('/images/0')
        assert server.api.thumbnail.cache_info().currsize == 1
        serve.reload(server.api, args)
        assert server.api.thumbnail.cache_info().currsize == 0
        assert len(server.search({'image': '0'})['results']) == 9
        (tmp_path / 'museum.pth').write_bytes(b'broken')
        serve.reload(server.api, args)
        assert len(server.search((museum / 'outside.jpg').read_bytes())['results']) == 10
    printed = capsys.readouterr()
    assert 'reloaded: 10 images' in printed.out
    assert printed.err.startswith('not reloaded: ')


@pytest.mark.slow
def test_sighup_reloads_and_ends_nothing(museum, tmp_path):
    out, err = tmp_path / 'out', tmp_path / 'err'
    process = start_command('serve.py', '--data_base', museum / 'museum.pth', '--port', '0', out=out, err=err)
    try:
        for line in ('press Ctrl-C to stop\n', 'reloaded: 15 images\n'):
            while not (out.exists() and out.read_text().endswith(line)):
                assert process.is_alive(), err.read_text()
                process.join(0.1)
            os.kill(process.pid, signal.SIGHUP if 'Ctrl-C' in line else signal.SIGTERM)
        process.join(60)
        assert process.exitcode == 0, err.read_text()
    finally:
        process.kill()


@pytest.mark.slow
def test_the_dockerfile_copies_all_that_the_server_imports(museum, tmp_path):
    for line in (REPOSITORY / 'Dockerfile').read_text().splitlines():
        if line.startswith('COPY'):
            *sources, target = line.split()[1:]
            for source in map(REPOSITORY.joinpath, sources):
                if source.is_dir():
                    shutil.copytree(source, tmp_path / target)
                else:
                    shutil.copy(source, tmp_path / target)
    done = subprocess.run([sys.executable, 'serve.py', '--data_base', museum / 'museum.pth', '--host', '0.0.0.0',
                           '--port', '0', '--device', 'none'], cwd=tmp_path, capture_output=True, text=True)
    assert_one_line_error(done, "--device 'none'")  # read after all imports
    assert {file.name for file in tmp_path.iterdir()} >= {'serve.py', 'serving', 'templates'}


# ---------------------------------------------------- mistakes -----------------------------------------------------
def test_a_missing_package_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, 'fastapi', None)
    with pytest.raises(UserError, match='pip install -r requirements-serve.txt'):
        serve.main(serve.get_args(['--data_base', 'x.pth']))


@pytest.mark.parametrize(('words', 'message'), [
    (['--token', 'short'], '--token: a token must be 8 or more'),
    (['--token', 'let-me-in', '--token_file', 'x'], 'name one of --token WORD and --token_file FILE'),
    (['--root_path', 'museum/'], '--root_path museum/ must be like /museum'), (['--port', '70000'], '--port 70000'),
    (['--model', 'm.pth'], '--model m.pth has no effect with --data_base')])
def test_a_mistaken_command_line_is_refused(words, message):
    with pytest.raises(UserError, match=message):
        serve.get_args(['--data_base', 'm.pth', *words])


def test_flags_of_a_data_base_are_refused_with_qdrant():
    with pytest.raises(UserError, match='--data_path /photos has no effect with --qdrant'):
        serve.get_args(['--qdrant', 'folder', '--collection', 'museum', '--data_path', '/photos'])


def test_the_token_is_read_from_a_file_or_the_environment(tmp_path, monkeypatch):
    words, file = ['--data_base', 'm.pth'], tmp_path / 'token'
    file.write_text('let-me-in\n')
    assert serve.get_args([*words, '--token_file', str(file)]).token == 'let-me-in'
    monkeypatch.setenv('SERVE_TOKEN', 'from-outside')
    assert serve.get_args(words).token == 'from-outside'
    assert serve.get_args([*words, '--token', 'typed-word']).token == 'typed-word'
    monkeypatch.setenv('SERVE_TOKEN', '')  # an empty token must not open the server
    with pytest.raises(UserError, match='SERVE_TOKEN: a token must be'):
        serve.get_args(words)


@pytest.mark.parametrize(('words', 'message'), [
    (['--data_base', 'no.pth'], '--data_base no.pth'),
    (['--data_base', 'no.pth', '--host', '1.2.3.4'], '--host 1.2.3.4 --port 0 is not available')])
def test_what_cannot_be_served_is_refused(words, message):
    with pytest.raises(UserError, match=message):
        serve.main(serve.get_args(['--port', '0', *words]))


def test_answers_are_sent_without_delay():
    """asyncio sets TCP_NODELAY on connections whose listening socket names its protocol."""
    with serve.listen('127.0.0.1', 0) as listening:
        assert listening.proto == socket.IPPROTO_TCP


def test_a_taken_port_is_refused():
    taken = serve.listen('127.0.0.1', 0)
    port = taken.getsockname()[1]
    with pytest.raises(UserError, match=f'--port {port} is not available'):
        serve.listen('127.0.0.1', port)
    taken.close()


# ---------------------------------------------------- in a browser -------------------------------------------------
def find(browser, selector):
    from selenium.webdriver.common.by import By

    return browser.find_elements(By.CSS_SELECTOR, selector)


def wait_for(browser, condition):
    from selenium.webdriver.support.wait import WebDriverWait

    return WebDriverWait(browser, 60).until(lambda _: condition())


def shown(browser):
    """Return path and similarity of the results that the page shows, read at one moment."""
    return [tuple(pair) for pair in browser.execute_script(
        "return [...document.querySelectorAll('#results .tile')].map("
        r'tile => [tile.title, tile.textContent.match(/\d\.\d{4}/)[0]])')]


@pytest.fixture
def page(server, browser):
    browser.get('about:blank')
    browser.get(server.url)
    yield browser
    # The deleted image is answered by 404, which a browser logs.
    assert [entry for entry in browser.get_log('browser') if entry['level'] == 'SEVERE'
            and not re.search(r'/images/\d+\?.*404', entry['message'])] == []


@pytest.mark.slow
def test_the_page_shows_what_the_library_finds_and_searches_on(page, server, museum):
    find(page, '#file')[0].send_keys(str(museum / 'outside.jpg'))
    wait_for(page, lambda: len(find(page, '#results .tile')) == 15)
    assert shown(page) == nearest_to_file(museum, museum / 'outside.jpg', 15)
    absent = server.search((museum / 'outside.jpg').read_bytes())['no_close_match']
    assert find(page, '#note')[0].is_displayed() == absent
    assert (NO_MATCH in find(page, '#note')[0].text) == absent
    first = shown(page)[0][0]
    find(page, '#results .tile')[0].click()
    wait_for(page, lambda: len(shown(page)) == 14)
    assert find(page, '#query .tile')[0].get_dom_attribute('title') == first
    expected = server.search({'path': first})['results']
    assert shown(page) == [(result['path'], f'{result["similarity"]:.4f}') for result in expected]
    assert [tile.get_dom_attribute('class').split()[-1] for tile in find(page, '#results .tile')] == [
        'same' if result['class'] == first.split('/')[0] else 'other' for result in expected]


@pytest.mark.slow
def test_a_picture_that_is_dropped_or_pasted_is_searched_for(page, museum):
    send = """
        const bytes = Uint8Array.from(atob(arguments[0]), letter => letter.charCodeAt(0)), sent = new DataTransfer();
        sent.items.add(new File([bytes], 'dropped.jpg', {type: 'image/jpeg'}));
        document.dispatchEvent(arguments[1] === 'drop' ? new DragEvent('drop', {dataTransfer: sent, cancelable: true})
            : new ClipboardEvent('paste', {clipboardData: sent}));"""
    for event, name in (('drop', 'ara/0.jpg'), ('paste', 'zebra/1.jpg')):
        page.execute_script(send, base64.b64encode((museum / 'photos' / name).read_bytes()).decode(), event)
        wait_for(page, lambda name=name: shown(page)[:1] == [(name, '1.0000')])


@pytest.mark.slow
def test_words_keys_the_random_button_and_an_error_on_the_page(page, tmp_path):
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
    page.execute_script("document.querySelector('#results').replaceChildren()")
    find(page, '#random')[0].click()
    wait_for(page, lambda: len(find(page, '#results .tile')) == 14)
    (tmp_path / 'no.jpg').write_bytes(b'no picture')
    find(page, '#file')[0].send_keys(str(tmp_path / 'no.jpg'))
    wait_for(page, lambda: 'the picture cannot be read' in find(page, '#error')[0].text)
    log = [entry['message'] for entry in page.get_log('browser')]  # a browser logs the refusal itself
    assert [line for line in log if '/search' not in line and '404' not in line] == []


@pytest.mark.slow
def test_an_error_of_the_words_and_of_the_random_button_is_shown(page, server):
    page.execute_script("window.fetch = async () => new Response('{\"error\": \"busy\"}', {status: 503});")
    for act in (lambda: find(page, '#random')[0].click(), lambda: find(page, '#words')[0].send_keys('ara')):
        page.execute_script("document.querySelector('#error').textContent = ''")
        act()
        wait_for(page, lambda: find(page, '#error')[0].text == 'busy')
    page.execute_script("window.fetch = async () => { throw new TypeError('offline'); };")
    find(page, '#random')[0].click()
    wait_for(page, lambda: find(page, '#error')[0].text == 'the server does not answer')


@pytest.mark.slow
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
