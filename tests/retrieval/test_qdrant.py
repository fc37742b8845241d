"""embed.py and serve.py do with Qdrant what they do with a file; tests/retrieval/test_collection.py has the methods."""
import pickle
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from museum import DIM, SETTINGS, Server, make_items, make_model, write_photos
from raw_trees import write_image

import embed
from common.errors import Unreachable, UserError
from retrieval.qdrant import QdrantCollection, open_qdrant
from retrieval.searcher import open_qdrant_searcher, open_searcher

qdrant_client = pytest.importorskip('qdrant_client')
CPU = torch.device('cpu')


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder with photos/ of 8 images and a broken one, and m_model.pth."""
    write_photos(tmp_path / 'photos', {'ara': 4, 'zebra': 4})
    (tmp_path / 'photos/broken.jpg').write_bytes(b'x')
    make_model(tmp_path / 'm_model.pth')
    return tmp_path


@pytest.fixture
def call(photos, call_script):
    """Call embed.py on a collection in Qdrant; returns what it printed."""
    def call_embed(*words, model=True) -> str:
        model_flags = ('--model', photos / 'm_model.pth') if model else ()
        return call_script(embed, '--qdrant', photos / 'qdrant', '--collection', 'museum', '--num_workers', 0,
                           *model_flags, *words)
    return call_embed


def test_a_folder_is_added_updated_listed_and_removed(photos, call):
    new = ('--images', photos / 'photos', '--labels', 'folder')
    printed = call(*new)
    assert '9 images, 9 to embed' in printed
    assert '1 images cannot be read and are left out' in printed
    assert f'serve.py --qdrant {photos}/qdrant --collection museum --model {photos}/m_model.pth' in printed
    assert '9 images, 1 to embed' in call(*new)  # broken files are not remembered
    write_image(photos / 'photos/ara/0.jpg', 3, 3)
    (photos / 'photos/zebra/3.jpg').unlink()
    assert '1 deleted images are removed; 1 changed or broken ones are embedded' in call('--update')
    assert '3 images removed' in call('--remove', 'zebra', model=False)
    assert sorted(call('--list', model=False).splitlines()[:-1]) == [f'ara/{number}.jpg  ara' for number in range(4)]


def test_the_answers_of_the_server_are_those_of_a_file(photos, call, call_script):
    pytest.importorskip('fastapi')
    new = ('--images', photos / 'photos', '--labels', 'folder')
    call(*new)
    call_script(embed, '--data_base', photos / 'm.pth', '--num_workers', 0, '--model', photos / 'm_model.pth', *new)
    searchers = [open_searcher(str(photos / 'm.pth'), '', '', CPU),
                 open_qdrant_searcher(str(photos / 'qdrant'), 'museum', str(photos / 'm_model.pth'), CPU)]
    answers = []
    for searcher in searchers:
        with Server(searcher) as server:
            uploaded = server.search((photos / 'photos/ara/1.jpg').read_bytes(), '?k=5')
            asked = server.search({'path': 'zebra/0.jpg', 'k': 5})
            assert server.request(f'/{asked["results"][0]["url"]}')[0] == 200
        answers.append([[(result['path'], result['class'], pytest.approx(result['similarity'], abs=1e-6))
                         for result in answer['results']] for answer in (uploaded, asked)])
        searcher.collection.close()
    assert answers[0] == answers[1]
    assert answers[0][0][0][0] == 'ara/1.jpg'
    assert [len(results) for results in answers[0]] == [5, 5]


def test_an_answer_takes_few_requests(photos, call, monkeypatch):
    pytest.importorskip('fastapi')
    call('--images', photos / 'photos')
    searcher = open_qdrant_searcher(str(photos / 'qdrant'), 'museum', None, CPU)
    called = []
    for name in ('retrieve', 'scroll', 'query_batch_points', 'count', 'query_points'):
        function = getattr(searcher.collection.client, name)

        def counted(*words, name=name, function=function, **keywords):
            called.append(name)
            return function(*words, **keywords)

        monkeypatch.setattr(searcher.collection.client, name, counted)
    with Server(searcher) as server:
        assert len(server.search({'path': 'zebra/0.jpg', 'k': 5})['results']) == 5
        assert called == ['scroll', 'scroll', 'retrieve', 'query_batch_points']  # path, file, its vector, neighbours
        called.clear()
        assert server.request('/find?q=zebra')[0] == server.request('/random')[0] == 200
        assert called == ['count', 'scroll', 'query_points']
    searcher.collection.close()


def test_a_server_that_stalls_stops_no_other_request(photos, call, monkeypatch):
    pytest.importorskip('fastapi')
    call('--images', photos / 'photos')
    searcher = open_qdrant_searcher(str(photos / 'qdrant'), 'museum', None, CPU)
    may_go_on = threading.Event()

    def stall(*_words, **_keywords):
        may_go_on.wait(60)
        raise TimeoutError('no answer')

    for name in ('retrieve', 'scroll', 'query_batch_points', 'count', 'query_points'):
        monkeypatch.setattr(searcher.collection.client, name, stall)
    with Server(searcher) as server, ThreadPoolExecutor(8) as threads:
        waiting = [threads.submit(server.request, address, body) for address, body in (
            ('/', None), ('/random', None), ('/find?q=a', None), ('/images/1', None), ('/search', {'image': '1'}),
            ('/search', {'path': 'a'}))]
        assert server.request('/docs')[0] == server.request('/health')[0] == 200
        may_go_on.set()
        assert [future.result()[0] for future in waiting] == [503] * 6
    searcher.collection.close()


def test_binary_search_is_refused_and_stops_no_other_request(photos, call):
    pytest.importorskip('fastapi')
    call('--images', photos / 'photos')
    searcher = open_qdrant_searcher(str(photos / 'qdrant'), 'museum', None, CPU)
    with Server(searcher) as server, ThreadPoolExecutor() as threads:
        bodies = [{'path': 'zebra/0.jpg', 'binary': binary} for binary in (False, True, False)]
        statuses = [status for status, *_ in threads.map(server.request, ['/search'] * 3, bodies)]
    assert statuses == [200, 422, 200]
    with pytest.raises(UserError, match='by cosine only'):
        searcher.collection.search(torch.ones(1, DIM), 1, binary=True)
    searcher.collection.close()


def test_the_model_is_checked_and_creates_a_collection_only_if_it_may(photos, call):
    location, model = str(photos / 'qdrant'), str(photos / 'm_model.pth')
    with pytest.raises(UserError, match='museum does not exist in .*; create it with --model and --images'):
        open_qdrant(location, 'museum', model)
    call('--images', photos / 'photos')
    with pytest.raises(UserError, match='--model: --collection museum holds embeddings of another model'):
        open_qdrant(location, 'museum', str(make_model(photos / 'other_model.pth', 1)))
    collection, none = open_qdrant(location, 'museum')
    assert none is None
    assert collection.origin['args'] == SETTINGS
    collection.close()


def test_the_dtype_is_that_of_the_collection(photos, call):
    call('--images', photos / 'photos', '--dtype', 'float16')
    call('--images', photos / 'photos')
    call('--images', photos / 'photos', '--dtype', 'float16')
    with pytest.raises(UserError, match='--dtype: the vectors of --collection museum are float16'):
        call('--images', photos / 'photos', '--dtype', 'float32')


def test_a_collection_of_another_program_is_refused(tmp_path):
    client = qdrant_client.QdrantClient(path=str(tmp_path))
    vectors = qdrant_client.models.VectorParams(size=DIM, distance=qdrant_client.models.Distance.DOT)
    client.create_collection('foreign', vectors_config=vectors)
    client.close()
    with pytest.raises(UserError, match='foreign in .* was not created by embed.py'):
        QdrantCollection(str(tmp_path), 'foreign')


class Attack:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize('payload', [False, True])
def test_a_folder_that_executes_code_is_refused(tmp_path, payload):
    items, features = make_items(3)
    collection = QdrantCollection(str(tmp_path / 'q'), 'museum', {'args': SETTINGS}, 'f', DIM)
    collection.add(items, features)
    collection.close()
    attack = Attack(tmp_path / 'executed')
    if payload:
        attack = qdrant_client.models.PointStruct.model_construct(id=1, vector=[1.0] * DIM, payload={'path': attack})
    with sqlite3.connect(tmp_path / 'q/collection/museum/storage.sqlite') as points:
        points.execute('UPDATE points SET point = ?', (pickle.dumps(attack),))
    with pytest.raises(UserError, match='a pickle of .*, which could execute code, and is not opened'):
        QdrantCollection(str(tmp_path / 'q'), 'museum')
    assert not (tmp_path / 'executed').exists()


def test_more_images_than_fit_in_a_request_are_added_listed_and_removed(tmp_path, monkeypatch):
    monkeypatch.setattr('retrieval.qdrant.POINTS_PER_REQUEST', 4)
    items, features = make_items(11)
    items.sort()
    collection = QdrantCollection(str(tmp_path), 'many', {'args': SETTINGS}, 'f', DIM)
    collection.add(items, features)
    assert sorted(collection.items()) == items
    collection.relabel([item._replace(label='Kiwi') for item in items])
    assert collection.find('kiwi', 3)[0] == 11
    collection.remove(items[2:])
    assert sorted(collection.items()) == [item._replace(label='Kiwi') for item in items[:2]]
    collection.close()


def test_a_server_that_does_not_answer_is_unreachable():
    with pytest.raises(Unreachable, match='--qdrant http://127.0.0.1:1: '):
        QdrantCollection('http://127.0.0.1:1', 'museum')


@pytest.mark.parametrize(('words', 'message'), [
    (['--qdrant', 'x'], '--qdrant URL and --collection NAME go together'),
    (['--qdrant', 'x', '--collection', 'c', '--data_base', 'm.pth', '--update'], 'one of --data_base'),
    (['--qdrant', 'x', '--collection', 'c', '--csv', 'x.csv'], '--csv x.csv has no effect with --qdrant'),
    (['--qdrant', 'x', '--collection', 'c', '--images', 'x'], 'name it with --model'),
    (['--qdrant', 'x', '--collection', 'c', '--update'], 'name it with --model'),
    (['--qdrant', 'x', '--collection', 'c', '--model', 'x.pth', '--list'], '--model x.pth .* without --images')])
def test_a_mistaken_command_line_is_refused(words, message):
    with pytest.raises(UserError, match=message):
        embed.get_args(words)


def test_update_takes_a_model_without_images():
    args = embed.get_args(['--qdrant', 'x', '--collection', 'c', '--model', 'm.pth', '--update'])
    assert args.model == 'm.pth'
