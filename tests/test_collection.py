"""A collection in a file and one in Qdrant give the same answers; a server is tried where QDRANT_URL is set."""
import os
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import assert_one_line_error, type_command
from raw_trees import write_image
from test_embed import SETTINGS, make_model
from test_serve import Server

import embed
import serve
from common.errors import UserError
from retrieval.collection import FileCollection, Item
from retrieval.metrics import similarity_of

ORIGIN, FINGERPRINT, DIM = {'args': SETTINGS, 'absent': [{'rate': 0.05, 'threshold': 0.5}]}, 'f' * 64, 11


class Opened:
    """A way to open one collection again and again."""

    def __init__(self, kind: str, folder: Path):
        self.kind, self.folder, self.name, self.last = kind, folder, f'test_{uuid.uuid4().hex}', None

    def open(self, fingerprint: str | None = FINGERPRINT, dim: int | None = DIM):
        """Open the collection, after what was opened before is closed."""
        if self.last is not None:
            self.last.close()
        if self.kind == 'file':
            self.last = FileCollection(self.folder / 'c.pth', ORIGIN, fingerprint)
        else:
            from retrieval.qdrant import QdrantCollection

            place = os.environ['QDRANT_URL'] if self.kind == 'server' else str(self.folder / 'qdrant')
            self.last = QdrantCollection(place, self.name, ORIGIN, fingerprint, dim)
        return self.last

    def end(self) -> None:
        """Leave nothing behind, on a server either."""
        if self.last is not None:
            if self.kind == 'server':
                self.last.client.delete_collection(self.name)
            self.last.close()


@pytest.fixture(params=['file', 'embedded', 'server'])
def place(request, tmp_path):
    if request.param != 'file':
        pytest.importorskip('qdrant_client')
    if request.param == 'server' and 'QDRANT_URL' not in os.environ:
        pytest.skip('needs a Qdrant server at QDRANT_URL')
    opened = Opened(request.param, tmp_path)
    yield opened
    opened.end()


def make_items(count: int) -> tuple[list[Item], torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    features = torch.nn.functional.normalize(torch.randn(count, DIM, generator=generator), dim=1)
    return [Item(f'/photos/{index % 2}', f'birds/{index:03d}.jpg', ('', 'Ara macao', "Zebra's")[index % 3], index,
                 10**18) for index in range(count)], features


def answers(collection, queries, number):
    return [[(collection.item(index), similarity) for index, similarity in row]
            for row in collection.search(queries, number)]


def expected(items, features, queries, number):
    similarity = similarity_of(queries, features)
    order = similarity.argsort(dim=1, descending=True)[:, :number]
    return [[(items[index], similarity[query, index].item()) for index in row]
            for query, row in enumerate(order.tolist())]


def test_it_finds_what_is_nearest_after_adding_replacing_removing_and_opening_again(place):
    items, features = make_items(57)
    queries = make_items(3)[1]
    collection = place.open()
    collection.add(items[:30], features[:30])
    collection.add(items[30:], features[30:])
    assert answers(collection, queries, 5) == expected(items, features, queries, 5)
    collection.add(items[10:12], features[20:22])  # other photographs under their names
    features[10:12] = features[20:22]
    features[20:22] = make_items(2)[1]
    collection.add([item._replace(size=99) for item in items[20:22]], features[20:22])
    items[20:22] = [item._replace(size=99) for item in items[20:22]]
    collection.remove([(item.folder, item.path) for item in items[:7]])
    collection.finish()
    assert len(collection) == 50
    for how in ({}, {'dim': None}, {'fingerprint': None, 'dim': None}):
        again = place.open(**how) if how else collection
        assert answers(again, queries, 6) == expected(items[7:], features[7:], queries, 6)
        assert len(again.search(queries, 200)[0]) == 50


def test_an_image_that_cannot_be_read_any_more_is_found_no_more_until_it_can(place):
    items, features = make_items(9)
    collection = place.open()
    collection.add(items, features)
    collection.finish()
    collection.add([], features[:0], {'/photos/0/birds/004.jpg': [3, 10**18]})
    collection.finish()
    left = [item for item in items if item != items[4]]
    assert sorted(collection.items()) == sorted(left)
    assert items[4] not in [item for item, _ in answers(collection, features[4:5], 9)[0]]
    again = place.open()
    assert len(again) == 8
    again.add(items[4:5], features[4:5])
    again.finish()
    assert answers(again, features[4:5], 1)[0][0][0] == items[4]


def test_it_says_what_is_in_it(place):
    items, features = make_items(21)
    collection = place.open()
    assert len(collection) == 0
    assert collection.folders() == []
    collection.add(items, features)
    collection.finish()
    assert sorted(collection.items()) == sorted(items)
    assert sorted(collection.items('/photos/1')) == sorted(item for item in items if item.folder == '/photos/1')
    assert sorted(collection.folders()) == ['/photos/0', '/photos/1']
    number = collection.index_of('birds/004.jpg')
    assert collection.item(number) == items[4]
    assert collection.index_of('/photos/0/birds/004.jpg') == number
    assert collection.index_of('/photos/1/birds/004.jpg') is None
    torch.testing.assert_close(collection.feature(number), features[4], atol=0, rtol=0)
    count, found = collection.find('ARA birds', 3)
    assert count == 7
    assert len(found) == 3
    assert all(collection.item(one).label == 'Ara macao' for one in found)
    assert collection.find('ara nothing', 3) == (0, [])
    assert collection.item(collection.any()) in items
    for wrong in (-1, 10**6, 2**70):
        with pytest.raises(IndexError):
            collection.item(wrong)
    collection.relabel({('/photos/0', 'birds/004.jpg'): 'Kiwi'})
    assert collection.item(collection.index_of('birds/004.jpg')).label == 'Kiwi'
    assert collection.find('kiwi', 9)[0] == 1


def test_a_path_in_two_folders_is_no_name(place):
    items, features = make_items(2)
    collection = place.open()
    collection.add([items[0], items[0]._replace(folder='/photos/1')], features)
    collection.finish()
    assert collection.index_of('birds/000.jpg') is None
    assert collection.item(collection.index_of('/photos/1/birds/000.jpg')).folder == '/photos/1'


def test_another_model_and_a_strange_collection_are_refused(place):
    items, features = make_items(4)
    collection = place.open()
    collection.add(items, features)
    collection.finish()
    with pytest.raises(UserError, match='--model: .* another model'):
        place.open(fingerprint='e' * 64)


# ---------------------------------------------------- the scripts --------------------------------------------------
@pytest.fixture
def photos(tmp_path) -> Path:
    for label, name in enumerate(('ara', 'zebra')):
        for number in range(4):
            write_image(tmp_path / 'photos' / name / f'{number}.jpg', label, number)
    (tmp_path / 'photos/broken.jpg').write_bytes(b'x')
    make_model(tmp_path / 'm_model.pth', 0)
    return tmp_path


def call_embed(*words) -> None:
    embed.main(embed.get_args([*map(str, words), '--num_workers', '0']))


def test_embed_and_serve_say_the_same_of_qdrant_as_of_a_file(photos, capsys):
    pytest.importorskip('qdrant_client')
    pytest.importorskip('fastapi')
    remote = ['--qdrant', str(photos / 'qdrant'), '--collection', 'museum']
    new = ('--model', photos / 'm_model.pth', '--images', photos / 'photos', '--labels', 'folder')
    call_embed('--data_base', photos / 'm.pth', *new)
    call_embed(*remote, *new)
    printed = capsys.readouterr().out
    assert printed.count('9 images, 9 to embed') == 2
    assert printed.count('1 images cannot be read and are left out') == 2
    call_embed(*remote, *new)  # of what is there only the broken one is tried again
    assert '9 images, 1 to embed' in capsys.readouterr().out
    call_embed(*remote, *new, '--dtype', 'float32')
    with pytest.raises(UserError, match='--dtype: the vectors of --collection museum are of the type float32'):
        call_embed(*remote, *new, '--dtype', 'float16')
    capsys.readouterr()
    write_image(photos / 'photos/ara/0.jpg', 3, 3)
    (photos / 'photos/zebra/3.jpg').unlink()
    for where in (remote, ['--data_base', str(photos / 'm.pth')]):
        model = ['--model', photos / 'm_model.pth'] if where is remote else []
        call_embed(*where, '--update', *model)
        assert '1 images have vanished and are removed' in capsys.readouterr().out
    found = []
    for words in (['--data_base', str(photos / 'm.pth')], [*remote, '--model', str(photos / 'm_model.pth')]):
        searcher = searching.open_searcher(serve.get_args(words))
        server = Server(serve.Interface(searcher, 'museum'))
        try:
            sent = server.search((photos / 'photos/ara/1.jpg').read_bytes(), '?k=5')
            asked = server.search({'path': 'zebra/0.jpg', 'k': 5})
            found.append([[(one['path'], one['class'], pytest.approx(one['similarity'], abs=1e-6))
                           for one in answer['results']] for answer in (sent, asked)])
            assert server.ask(f'/{asked["results"][0]["url"]}')[0] == 200
            queries = [{'path': 'zebra/0.jpg', 'binary': binary} for binary in (False, True, False)]
            with ThreadPoolExecutor() as threads:  # one that is refused does not take the others of its batch along
                statuses = [status for status, *_ in threads.map(server.ask, ['/search'] * 3, queries)]
            assert statuses == [200, 422 if '--qdrant' in words else 200, 200]
            with pytest.raises(UserError, match='by cosine alone') if '--qdrant' in words else nullcontext():
                searcher.collection.search(torch.ones(1, 7), 1, binary=True)
        finally:
            server.stop()
            searcher.collection.close()
    assert found[0] == found[1]
    assert [path for path, _, _ in found[0][0]][0] == 'ara/1.jpg'
    assert len(found[0][0]) == len(found[0][1]) == 5


@pytest.mark.parametrize(('words', 'parts'), [
    (['--qdrant', 'x'], ['--qdrant URL and --collection NAME go together']),
    (['--qdrant', 'x', '--collection', 'c', '--data_base', 'm.pth', '--update'], ['one of --data_base']),
    (['--qdrant', 'x', '--collection', 'c', '--csv', 'x.csv'], ['--csv', 'no effect with --qdrant']),
    (['--qdrant', 'x', '--collection', 'c', '--images', 'x'], ['name it with --model']),
    (['--qdrant', 'x', '--collection', 'c', '--update'], ['name it with --model']),
    (['--qdrant', 'x', '--collection', 'c', '--model', 'x.pth', '--list'], ['--model x.pth', 'without --images']),
    (['--qdrant', 'http://127.0.0.1:1', '--collection', 'c', '--list'], ['--qdrant http://127.0.0.1:1'])])
def test_what_cannot_be_is_one_line(words, parts):
    assert_one_line_error(type_command('embed.py', *words), *parts)
