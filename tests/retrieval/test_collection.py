"""A collection in a file and one in Qdrant have the same methods and give the same answers.

A server is tested, too, where QDRANT_URL names one.
"""
import os
import shutil
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
from faults import tamper
from museum import DIM, SETTINGS, make_items

from common.errors import UserError
from common.files import save
from common.results import RunFiles
from retrieval.collection import CollectionItem, FileCollection, SearchableImages, filter_items
from retrieval.database import DataBase, OpenDataBase, Subset, load_data_base
from retrieval.metrics import similarity_of

ORIGIN = {'args': SETTINGS, 'open_set': [{'rate': 0.05, 'threshold': 0.5, 'marked': 50.0}]}
FINGERPRINT = 'f' * 64


def test_images_of_a_run_have_the_sizes_of_its_data_base(tmp_path):
    images = Subset(['0.jpg', '1.jpg'], torch.tensor([0, 0]), torch.eye(2))
    for sizes, expected in (({'test': [30, 40]}, [30, 40]), ({}, [0, 0])):
        opened = OpenDataBase(DataBase(['a'], images, sizes=sizes), RunFiles(tmp_path, 'run'), [tmp_path])
        collection = SearchableImages.of_run(opened)
        assert [collection.item(index).size for index in range(2)] == expected


class Reopened:
    """Opens one collection again and again, in a file, in a folder of Qdrant or on its server."""

    def __init__(self, store: str, folder: Path):
        self.store, self.folder, self.name, self.last = store, folder, f'test_{uuid.uuid4().hex}', None

    def open(self, fingerprint: str | None = FINGERPRINT, dim: int | None = DIM):
        """Open the collection, after closing it."""
        if self.last is not None:
            self.last.close()
        if self.store == 'file':
            self.last = FileCollection(self.folder / 'c.pth', ORIGIN, fingerprint)
        else:
            from retrieval.qdrant import QdrantCollection

            location = os.environ['QDRANT_URL'] if self.store == 'server' else str(self.folder / 'qdrant')
            self.last = QdrantCollection(location, self.name, ORIGIN, fingerprint, dim)
        return self.last

    def delete(self) -> None:
        """Close the collection, and delete it from a server."""
        if self.last is not None:
            if self.store == 'server':
                self.last.client.delete_collection(self.name)
            self.last.close()


@pytest.fixture(params=['file', 'embedded', 'server'])
def store(request, tmp_path):
    if request.param != 'file':
        pytest.importorskip('qdrant_client')
    if request.param == 'server' and 'QDRANT_URL' not in os.environ:
        pytest.skip('needs a Qdrant server at QDRANT_URL')
    reopened = Reopened(request.param, tmp_path)
    yield reopened
    reopened.delete()


def neighbours(collection, queries, k):
    """Return what a collection finds: [(item, similarity), ...] per query."""
    return [[(collection.item(index), similarity) for index, similarity in row]
            for row in collection.search(queries, k)]


def expected_neighbours(items, features, queries, k):
    """Return the same from the matrix of all similarities."""
    similarity = similarity_of(queries, features)
    order = similarity.argsort(dim=1, descending=True)[:, :k]
    return [[(items[index], similarity[query, index].item()) for index in row]
            for query, row in enumerate(order.tolist())]


# ---------------------------------------------------- files and Qdrant -------------------------------------------
def test_the_nearest_images_are_found_after_adding_replacing_removing_and_reopening(store):
    items, features = make_items(57)
    queries = make_items(3)[1]
    collection = store.open()
    collection.add(items[:30], features[:30])
    collection.add(items[30:], features[30:])
    collection.finish()
    assert collection.num_added == 57
    assert neighbours(collection, queries, 5) == expected_neighbours(items, features, queries, 5)
    collection.add(items[10:12], features[20:22])  # other photographs under their names
    features[10:12] = features[20:22]
    features[20:22] = make_items(2)[1]
    items[20:22] = [item._replace(size=99) for item in items[20:22]]
    collection.add(items[20:22], features[20:22])
    collection.remove(items[:7])
    assert len(collection) == 50
    for how in ({}, {'dim': None}, {'fingerprint': None, 'dim': None}):
        again = store.open(**how) if how else collection
        assert neighbours(again, queries, 6) == expected_neighbours(items[7:], features[7:], queries, 6)
        assert len(again.search(queries, 200)[0]) == 50


def test_an_image_that_becomes_unreadable_is_not_found_until_it_can_be_read_again(store):
    items, features = make_items(9)
    collection = store.open()
    collection.add(items, features)
    collection.finish()
    collection.add([], features[:0], [items[4]])
    collection.finish()
    assert collection.broken == {items[4].file: items[4]}
    assert sorted(collection.items()) == sorted(item for item in items if item != items[4])
    assert items[4] not in [item for item, _ in neighbours(collection, features[4:5], 9)[0]]
    again = store.open()
    assert len(again) == 8
    again.add([items[4]], features[4:5])
    again.finish()
    assert again.broken == {}
    assert neighbours(again, features[4:5], 1)[0][0][0] == items[4]


def test_images_are_looked_up_by_index_path_folder_and_words(store):
    items, features = make_items(21)
    collection = store.open()
    assert len(collection) == 0
    assert collection.folders() == []
    collection.add(items, features)
    collection.finish()
    assert sorted(collection.items()) == sorted(items)
    assert sorted(collection.items('/photos/1')) == sorted(item for item in items if item.folder == '/photos/1')
    assert sorted(collection.folders()) == ['/photos/0', '/photos/1']
    index = collection.index_of('birds/004.jpg')
    assert collection.item(index) == items[4]
    assert collection.index_of('/photos/0/birds/004.jpg') == index
    assert collection.index_of('/photos/1/birds/004.jpg') is None
    torch.testing.assert_close(collection.feature(index), features[4], atol=0, rtol=0)
    count, indices = collection.find('ARA birds', 3)
    assert (count, len(indices)) == (7, 3)
    assert all(collection.item(index).label == 'Ara macao' for index in indices)
    assert collection.find('ara nothing', 3) == (0, [])
    assert collection.item(collection.random_index()) in items
    for wrong in (-1, 10**6, 2**70):
        with pytest.raises(IndexError):
            collection.item(wrong)


def test_a_new_class_is_found_by_its_name(store):
    items, features = make_items(9)
    collection = store.open()
    collection.add(items, features)
    collection.finish()
    assert collection.item(collection.index_of('birds/004.jpg')).label == 'Ara macao'
    collection.relabel([items[4]._replace(label='Kiwi')])
    assert collection.item(collection.index_of('birds/004.jpg')).label == 'Kiwi'
    assert collection.find('kiwi', 9)[0] == 1
    assert collection.find('ara', 9)[0] == 2
    assert neighbours(collection, features[4:5], 1)[0][0][0] == items[4]._replace(label='Kiwi')


def test_a_path_in_two_folders_is_ambiguous(store):
    items, features = make_items(2)
    collection = store.open()
    collection.add([items[0], items[0]._replace(folder='/photos/1')], features)
    collection.finish()
    assert collection.index_of('birds/000.jpg') is None
    assert collection.item(collection.index_of('/photos/1/birds/000.jpg')).folder == '/photos/1'


def test_another_model_is_refused(store):
    items, features = make_items(4)
    collection = store.open()
    collection.add(items, features)
    collection.finish()
    with pytest.raises(UserError, match='--model: .* of another model'):
        store.open(fingerprint='e' * 64)


# ---------------------------------------------------- files -------------------------------------------------------
def test_what_is_added_is_on_the_disk_at_once_and_merged_when_the_file_is_opened_again(tmp_path):
    items, features = make_items(9)
    FileCollection(tmp_path / 'c.pth', ORIGIN, FINGERPRINT).add(items[:4], features[:4], [items[8]])
    killed = FileCollection(tmp_path / 'c.pth', ORIGIN, FINGERPRINT)
    assert list(killed.items()) == items[:4]
    assert killed.broken == {items[8].file: items[8]}
    killed.add(items[2:6], features[4:8])  # without finish
    again = FileCollection(tmp_path / 'c.pth')
    assert list(again.items()) == items[:6]
    torch.testing.assert_close(again.data_base.test.features, torch.cat([features[:2], features[4:8]]), atol=0, rtol=0)
    assert not (tmp_path / 'c.pth.parts').exists()


def test_an_interrupted_merge_is_repeated_without_a_change(tmp_path):
    items, features = make_items(9)
    collection = FileCollection(tmp_path / 'c.pth', ORIGIN, FINGERPRINT)
    for start in (0, 3, 6):
        collection.add(items[start:start + 3], features[start:start + 3])
    parts = shutil.copytree(tmp_path / 'c.pth.parts', tmp_path / 'copy')
    collection.finish()
    (parts / '00000000.pth').unlink()  # the process died while it deleted the parts
    shutil.move(parts, tmp_path / 'c.pth.parts')
    again = FileCollection(tmp_path / 'c.pth')
    assert list(again.items()) == items
    assert torch.equal(again.data_base.test.features, features)


def test_the_last_version_of_an_image_counts(tmp_path):
    items, features = make_items(3)
    collection = FileCollection(tmp_path / 'c.pth', ORIGIN, FINGERPRINT)
    collection.add(items, features)
    collection.add([], features[:0], items[:2])
    collection.add(items[1:2], features[2:3])
    collection.finish()
    assert sorted(collection.items()) == sorted(items[1:])
    assert list(collection.broken) == [items[0].file]
    index = collection.index_of(items[1].path)
    assert torch.equal(collection.feature(index), features[2])


def test_the_dtype_of_the_file_holds_until_another_one_is_asked_for(tmp_path):
    items, features = make_items(4)
    collection = FileCollection(tmp_path / 'c.pth', ORIGIN, FINGERPRINT, torch.float16)
    collection.add(items[:3], features[:3])
    collection.finish()
    collection = FileCollection(tmp_path / 'c.pth')
    collection.add(items[3:], features[3:])
    collection.finish()
    assert load_data_base(tmp_path / 'c.pth').test.features.dtype == torch.float16
    FileCollection(tmp_path / 'c.pth', dtype=torch.float32).finish()
    stored = load_data_base(tmp_path / 'c.pth').test.features
    assert stored.dtype == torch.float32
    assert torch.equal(stored, features.half().float())


def test_the_file_names_its_origin_model_and_itself(tmp_path):
    items, features = make_items(4)
    collection = FileCollection(tmp_path / 'c.pth', ORIGIN, FINGERPRINT)
    collection.add(items, features)
    collection.finish()
    data_base = load_data_base(tmp_path / 'c.pth')
    assert data_base.origin == {**ORIGIN, 'args': {**SETTINGS, 'data_name': 'c'}}
    assert data_base.sources.fingerprint == FINGERPRINT
    assert data_base.sources.folders == ['/photos/0', '/photos/1']


def test_damaged_parts_and_those_of_another_model_are_refused(tmp_path):
    items, features = make_items(2)
    collection = FileCollection(tmp_path / 'c.pth', ORIGIN, FINGERPRINT)
    collection.add(items[:1], features[:1])
    collection.finish()
    collection.add(items[1:], features[1:])
    part = tmp_path / 'c.pth.parts/00000000.pth'
    good = torch.load(part, weights_only=True)
    for name, value in (('fingerprint', 'other'), ('images', ['../y.jpg']), ('sizes', ['1']), ('features', None),
                        ('features', torch.zeros(1, 3)), ('broken', {'x': 1}), ('times', []), ('times', [2**63]),
                        ('folders', ['photos'])):
        save({**good, name: value}, part)
        with pytest.raises(UserError, match=r'c\.pth\.parts'):
            FileCollection(tmp_path / 'c.pth')
    save(good, part)
    assert list(FileCollection(tmp_path / 'c.pth').items()) == items


@pytest.mark.parametrize('number', [25, pytest.param(400, marks=pytest.mark.slow)])
def test_a_tampered_file_or_part_is_read_or_refused_in_one_line(number, tmp_path):
    items, features = make_items(9)
    collection = FileCollection(tmp_path / 'c.pth', ORIGIN, FINGERPRINT)
    collection.add(items[:7], features[:7], items[7:8])
    collection.finish()
    collection.add(items[8:], features[8:], items[6:7])
    part = tmp_path / 'c.pth.parts/00000000.pth'
    good, good_part = (torch.load(file, weights_only=True) for file in (tmp_path / 'c.pth', part))
    part.unlink()
    file = tmp_path / 'tampered.pth'

    def read() -> None:
        opened = FileCollection(file)
        list(opened.items())
        opened.find('ara', 5)
        for binary in (False, True):
            opened.search(features[:1], 20, binary)

    def read_file(contents) -> None:
        torch.save(contents, file)
        read()

    def read_part(contents) -> None:
        shutil.copy(tmp_path / 'c.pth', file)
        (tmp_path / 'tampered.pth.parts').mkdir(exist_ok=True)
        torch.save(contents, tmp_path / 'tampered.pth.parts/00000000.pth')
        read()

    faults = tamper({'collection': (good, read_file), 'part': (good_part, read_part)}, number,
                    np.random.default_rng(number))
    assert not faults


# ---------------------------------------------------- items, search -----------------------------------------------
@pytest.mark.parametrize(('pattern', 'expected'), [
    ('a', ['a/x.jpg']), ('a*', ['a/x.jpg', 'ab/x.jpg', 'a[1].jpg']), ('a/', ['a/x.jpg']), ('a[1].jpg', ['a[1].jpg']),
    ('/photos/a?/*', ['ab/x.jpg']), ('/photos/b', ['b/a/x.jpg']), ('x.jpg', [])])
def test_a_pattern_is_a_path_a_folder_or_has_wildcards(pattern, expected):
    items = [CollectionItem('/photos', path, '', 0, 0) for path in ('a/x.jpg', 'ab/x.jpg', 'a[1].jpg', 'b/a/x.jpg')]
    assert [item.path for item in filter_items(items, [pattern])] == expected
    assert filter_items(items, ['nothing', pattern]) == filter_items(items, [pattern])


def test_without_images_nothing_is_found():
    empty = SearchableImages(None)
    assert (len(empty), list(empty.items()), empty.search(torch.ones(2, DIM), 3)) == (0, [], [[], []])
