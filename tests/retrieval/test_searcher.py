"""Requests that arrive together share a batch; one that fails stops no other."""
import asyncio
import threading
from types import SimpleNamespace

import pytest
import torch
from museum import DIM, SETTINGS, make_items, make_model

from common.errors import Unreachable, UserError
from common.images import load_image
from imagedata.loading import make_transform
from retrieval.collection import FileCollection
from retrieval.model_file import load_model
from retrieval.searcher import MAX_BATCH, Query, RequestError, Searcher, as_response_error, open_searcher

CPU = torch.device('cpu')


def query_of(value: float, k: int = 1, binary: bool = False) -> Query:
    return Query(None, torch.tensor([value]), k, binary)


def echo(features, k, binary):
    """Find, for each query, images whose index is its feature."""
    return [[(int(row[0]), 1.0)] * k for row in features]


def test_requests_that_arrive_together_share_a_batch_and_one_that_fails_stops_no_other():
    searcher = Searcher(SimpleNamespace(search=echo), None, None, CPU)
    batches, answer, may_go_on = [], searcher.answer, threading.Event()

    def slow_answer(queries):
        batches.append(len(queries))
        may_go_on.wait()
        if any(query.feature[0] == 13 for query in queries):
            raise ValueError('unlucky')
        return answer(queries)

    searcher.answer = slow_answer

    async def send_all() -> list:
        first = asyncio.create_task(searcher.search(query_of(0)))
        while not batches:
            await asyncio.sleep(0.001)
        others = [asyncio.create_task(searcher.search(query_of(value, k=value))) for value in range(1, 23)]
        await asyncio.sleep(0)
        may_go_on.set()
        return await asyncio.gather(first, *others, return_exceptions=True)

    answers = asyncio.run(send_all())
    assert batches == [1, MAX_BATCH, 22 - MAX_BATCH]
    assert answers[0] == [(0, 1.0)]
    failed, late = answers[1:1 + MAX_BATCH], answers[1 + MAX_BATCH:]
    assert all(isinstance(error, RuntimeError) and 'unlucky' in str(error) for error in failed)
    assert len(set(map(id, failed))) == MAX_BATCH  # each request raises its own exception
    assert late == [[(value, 1.0)] * value for value in range(1 + MAX_BATCH, 23)]


def test_a_client_that_disconnects_does_not_stop_the_others():
    searcher = Searcher(SimpleNamespace(search=echo), None, None, CPU)

    async def send_three() -> list:
        tasks = [asyncio.create_task(searcher.search(query_of(value))) for value in range(3)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, cancelled, last = asyncio.run(send_three())
    assert (first, last) == ([(0, 1.0)], [(2, 1.0)])
    assert isinstance(cancelled, asyncio.CancelledError)


def test_a_batch_may_mix_uploads_and_features_cosine_and_binary(tmp_path):
    model, contents = load_model(make_model(tmp_path / 'm_model.pth'))
    items, features = make_items(13)
    collection = FileCollection(tmp_path / 'c.pth', {'args': contents['args']}, 'f')
    collection.add(items, features)
    collection.finish()
    searcher = Searcher(collection, model, None, CPU)
    images = [torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8) for _ in range(2)]
    embeddings = searcher.embed(images)
    queries = [Query(images[0], None, 3, False), Query(None, features[4], 1, True), Query(images[1], None, 2, True),
               Query(None, features[5], 4, False)]
    searched = [embeddings[0], features[4], embeddings[1], features[5]]
    assert searcher.answer(queries) == [collection.search(feature[None], query.k, query.binary)[0]
                                        for feature, query in zip(searched, queries, strict=True)]


def test_an_upload_is_decoded_as_a_test_image(tmp_path):
    from raw_trees import write_image

    model, contents = load_model(make_model(tmp_path / 'm_model.pth'))
    searcher = Searcher(SimpleNamespace(origin={'args': contents['args']}), model, None, CPU)
    write_image(tmp_path / 'a.jpg', 1, 1)
    expected = make_transform(False, 32, 36, model.interpolation)(load_image(tmp_path / 'a.jpg'))
    assert torch.equal(asyncio.run(searcher.decode((tmp_path / 'a.jpg').read_bytes())), expected)


@pytest.mark.parametrize(('error', 'expected'), [
    (Unreachable('down'), Unreachable), (UserError('wrong'), RequestError), (ValueError('odd'), RuntimeError)])
def test_an_error_keeps_its_meaning_for_the_client(error, expected):
    response = as_response_error(error)
    assert type(response) is expected
    assert str(error) in str(response)
    assert response is not error


def test_the_model_beside_the_data_base_embeds_and_must_be_its_own(tmp_path, capsys):
    from retrieval.model_file import load_model_file, model_fingerprint

    contents = load_model_file(make_model(tmp_path / 'c_model.pth'))
    items, features = make_items(5)
    origin = {'args': SETTINGS, 'open_set': [{'rate': 0.05, 'threshold': 0.25, 'marked': 50.0}]}
    collection = FileCollection(tmp_path / 'c.pth', origin, model_fingerprint(contents))
    collection.add(items, features)
    collection.finish()
    searcher = open_searcher('c.pth', str(tmp_path), '/nowhere', CPU)
    assert searcher.threshold == 0.25
    assert searcher.embed([torch.zeros(3, 32, 32, dtype=torch.uint8)]).shape == (1, DIM)
    make_model(tmp_path / 'c_model.pth', 1)
    with pytest.raises(UserError, match='c_model.pth belongs to another run'):
        open_searcher('c.pth', str(tmp_path), '/nowhere', CPU)
    (tmp_path / 'c_model.pth').unlink()
    assert open_searcher('c.pth', str(tmp_path), '/nowhere', CPU).model is None
    assert 'only images of the data base can be searched for' in capsys.readouterr().out
