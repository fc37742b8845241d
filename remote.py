"""A collection in Qdrant: a server or a cluster at a URL, or its embedded mode in a folder.

    collection = QdrantCollection('http://localhost:6333', 'museum')   # the methods of collection.FileCollection

An image is a point: its features as the vector, folder, path, class, size and time as payload, and a hash of folder and
path as its number, so that one that is added twice is there once. The model's fingerprint and the settings of its run
stand in the collection's metadata. A key of the server is read from QDRANT_API_KEY.
"""
import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from functools import lru_cache

import torch

from collection import Item
from engine.counting import cosine_similarity
from engine.errors import Unreachable, UserError, reason_of

AT_ONCE = 1024  # points in a request
LARGE = 10**5  # images from which on vectors lie on the disk, and their signs in memory
OVERSAMPLING = 4.0  # candidates by sign, of which the nearest are chosen by the vectors themselves
EXACT = 20_000  # images that Qdrant compares one by one, as it does by itself below its indexing threshold
MOST_FOLDERS = 1000


def number_of_point(file: str) -> int:
    """Return the number of an image: 63 bits of a hash of its folder and path."""
    return int.from_bytes(hashlib.sha256(file.encode()).digest()[:8], 'big') >> 1


class QdrantCollection:
    """A collection in Qdrant, with the methods of FileCollection.

    Args:
        place: URL of a server, or a folder for the embedded mode, which one process at a time can use.
        name: of the collection.
        origin: what is said of its origin, of a new one.
        fingerprint: of the model.
        dim: D, of a new one; None: it has to be there.
        dtype: of its vectors; None: of a new one float32.

    Raises:
        UserError: if qdrant-client is missing, the server does not answer, the collection is not there, is none of
            this project, or was made with another model.
    """

    ranks_codes = False  # by Hamming distance

    def __init__(self, place: str, name: str, origin: dict | None = None, fingerprint: str | None = None,
                 dim: int | None = None, dtype: torch.dtype | None = None):
        try:
            from qdrant_client import QdrantClient, models
        except ImportError:
            raise UserError('--qdrant needs qdrant-client; install it with: pip install -r requirements-serve.txt'
                            ) from None
        self.place, self.name, self.models, self.parts, self.broken = place, name, models, [], {}
        self.is_server, self.one = '://' in place, threading.RLock()
        with self.asking():
            self.client = QdrantClient(url=place, api_key=os.environ.get('QDRANT_API_KEY'), timeout=60) \
                if self.is_server else QdrantClient(path=place, force_disable_check_same_thread=True)
            if not self.client.collection_exists(name):
                if dim is None or origin is None:
                    raise UserError(f'--collection {name} is not in {place}; begin it with --model and --images')
                self.create(origin, fingerprint, dim, dtype)
            config = self.client.get_collection(name).config
        found, vectors = config.metadata or {}, config.params.vectors
        datatype = getattr(getattr(vectors, 'datatype', None), 'value', 'float32')
        if not {'origin', 'fingerprint'} <= found.keys():
            raise UserError(f'--collection {name} in {place} was not made by embed.py; name another')
        self.origin, self.fingerprint = json.loads(found['origin']), found['fingerprint']
        if fingerprint not in (None, self.fingerprint):
            raise UserError(f'--model: --collection {name} holds images that another model embedded, and similarities '
                            'across models mean nothing; name that model, or another collection')
        if dtype is not None and str(dtype) != f'torch.{datatype}':
            raise UserError(f'--dtype: the vectors of --collection {name} are of the type {datatype}; leave it out, or '
                            'name another collection')
        self.item = lru_cache(2**14)(self.item)

    @contextlib.contextmanager
    def asking(self):
        """Turn what the client raises into a line that names the place; the embedded mode is asked by one at a time."""
        from qdrant_client.http.exceptions import ApiException

        with contextlib.nullcontext() if self.is_server else self.one:
            try:
                yield
            except UserError:
                raise
            except (ApiException, OSError, RuntimeError, ValueError) as error:
                raise Unreachable(f'--qdrant {self.place}: {reason_of(error)}') from None

    def create(self, origin: dict, fingerprint: str, dim: int, dtype: torch.dtype | None) -> None:
        """Create the collection and the indices of what is asked for by name."""
        models = self.models
        self.client.create_collection(
            self.name, metadata={'origin': json.dumps(origin, default=str), 'fingerprint': fingerprint},
            vectors_config=models.VectorParams(
                size=dim, distance=models.Distance.DOT,  # of unit rows: cosines
                datatype=models.Datatype.FLOAT16 if dtype == torch.float16 else models.Datatype.FLOAT32))
        if self.is_server:  # the embedded mode has no indices
            for field in ('folder', 'path', 'whole'):
                self.client.create_payload_index(self.name, field, models.PayloadSchemaType.KEYWORD)
            self.client.create_payload_index(self.name, 'text', models.TextIndexParams(
                type=models.TextIndexType.TEXT, tokenizer=models.TokenizerType.PREFIX, lowercase=True))

    # ------------------------------------------------ the three methods --------------------------------------------
    def add(self, items: list[Item], features: torch.Tensor, broken: dict[str, list] | None = None) -> None:
        """Add images with their features (n, D), unit rows; one that is there is replaced, or removed if `broken`."""
        self.broken |= broken or {}
        self.delete(list(broken or {}))
        with self.asking():
            for start in range(0, len(items), AT_ONCE):
                part = items[start:start + AT_ONCE]
                self.client.upsert(self.name, wait=True, points=self.models.Batch(
                    ids=[number_of_point(f'{item.folder}/{item.path}') for item in part],
                    vectors=features[start:start + AT_ONCE].float().tolist(),
                    payloads=[self.payload(item) for item in part]))
        self.item.cache_clear()

    def remove(self, places: list[tuple[str, str]]) -> None:
        """Remove images, named by folder and path."""
        self.delete(['/'.join(place) for place in places])

    def delete(self, files: list[str]) -> None:
        """Remove images, named by their files; one that is not there is none."""
        with self.asking():
            for start in range(0, len(files), AT_ONCE):
                self.client.delete(self.name, wait=True, points_selector=self.models.PointIdsList(
                    points=[number_of_point(file) for file in files[start:start + AT_ONCE]]))
        self.item.cache_clear()

    def search(self, features: torch.Tensor, number: int, binary: bool = False) -> list[list[tuple[int, float]]]:
        """Return for each query (Q, D) the numbers of the nearest images with their similarity, nearest first.

        Similarities are computed from the vectors that come back, in float64; which those are is exact up to EXACT
        images, and beyond as good as Qdrant's index.
        """
        if binary:
            raise UserError('Qdrant ranks by cosine alone; leave binary out')
        models = self.models
        exact = not self.is_server or len(self) <= EXACT
        params = None if not self.is_server else models.SearchParams(
            exact=exact, quantization=None if exact else models.QuantizationSearchParams(
                rescore=True, oversampling=OVERSAMPLING))
        with self.asking():
            found = self.client.query_batch_points(self.name, requests=[models.QueryRequest(
                query=query, limit=number, params=params, with_vector=True) for query in features.float().tolist()])
        answers = []
        for query, answer in zip(features, found, strict=True):
            if not answer.points:
                answers.append([])
                continue
            vectors = torch.tensor([point.vector for point in answer.points])
            similarity = cosine_similarity(query[None].float(), vectors)[0].tolist()
            answers.append(sorted(zip((point.id for point in answer.points), similarity, strict=True),
                                  key=lambda pair: (-pair[1], pair[0])))
        return answers

    # ------------------------------------------------ what is there ------------------------------------------------
    def __len__(self) -> int:
        with self.asking():
            return self.client.count(self.name, exact=not self.is_server).count

    @staticmethod
    def payload(item: Item) -> dict:
        """Return what is kept of an image beside its features."""
        return {**item._asdict(), 'whole': f'{item.folder}/{item.path}', 'text': f'{item.path} {item.label}'.lower()}

    def item(self, number: int) -> Item:
        """Return the image of a number; raises IndexError where there is none."""
        with self.asking():
            found = self.client.retrieve(self.name, [number]) if 0 <= number < 2**63 else []
        if not found:
            raise IndexError(number)
        return Item(*(found[0].payload[name] for name in Item._fields))

    def matching(self, **values) -> object:
        """Return a filter for payloads with these values."""
        return self.models.Filter(must=[self.models.FieldCondition(key=key, match=self.models.MatchValue(value=value))
                                        for key, value in values.items()])

    def items(self, folder: str | None = None) -> Iterator[Item]:
        """Yield all images, or those of a folder."""
        chosen, offset = None if folder is None else self.matching(folder=folder), None
        while True:
            with self.asking():
                found, offset = self.client.scroll(self.name, chosen, limit=AT_ONCE, offset=offset)
            yield from (Item(*(point.payload[name] for name in Item._fields)) for point in found)
            if offset is None:
                return

    def folders(self) -> list[str]:
        """Return the folders that images are from."""
        with self.asking():
            return sorted(hit.value for hit in self.client.facet(self.name, 'folder', limit=MOST_FOLDERS).hits)

    def relabel(self, labels: dict[tuple[str, str], str]) -> None:
        """Give images, named by folder and path, other classes."""
        models, places = self.models, list(labels)
        with self.asking():
            for start in range(0, len(places), AT_ONCE):
                self.client.batch_update_points(self.name, [models.SetPayloadOperation(set_payload=models.SetPayload(
                    payload={'label': labels[place], 'text': f'{place[1]} {labels[place]}'.lower()},
                    points=[number_of_point('/'.join(place))])) for place in places[start:start + AT_ONCE]])
        self.item.cache_clear()

    def finish(self) -> None:
        """Keep the signs of a large collection in memory, and its vectors on the disk."""
        if self.is_server and len(self) >= LARGE:
            models = self.models
            with self.asking():
                if self.client.get_collection(self.name).config.quantization_config is None:
                    self.client.update_collection(
                        self.name, vectors_config={'': models.VectorParamsDiff(on_disk=True)},
                        quantization_config=models.BinaryQuantization(
                            binary=models.BinaryQuantizationConfig(always_ram=True)))

    def close(self) -> None:
        """Part from the server; the embedded mode lets go of its folder."""
        self.client.close()

    # ------------------------------------------------ by name ------------------------------------------------------
    def feature(self, number: int) -> torch.Tensor:
        """Return the features (D,) of an image."""
        with self.asking():
            return torch.tensor(self.client.retrieve(self.name, [number], with_vectors=True)[0].vector)

    def any(self) -> int:
        """Return the number of an image at random."""
        with self.asking():
            return self.client.query_points(self.name, query=self.models.SampleQuery(
                sample=self.models.Sample.RANDOM), limit=1).points[0].id

    def find(self, words: str, most: int) -> tuple[int, list[int]]:
        """Return how many images hold all words in their path or class, and the numbers of the first ones."""
        models = self.models
        chosen = models.Filter(must=[models.FieldCondition(key='text', match=models.MatchText(text=word))
                                     for word in words.lower().split()])
        with self.asking():
            count = self.client.count(self.name, count_filter=chosen).count
            return count, [point.id for point in self.client.scroll(self.name, chosen, limit=most)[0]]

    def number_of(self, path: str) -> int | None:
        """Return the number of the image of a path, below its folder or whole; None where there is none, or several."""
        with self.asking():
            found = {point.id for values in ({'path': path}, {'whole': path})
                     for point in self.client.scroll(self.name, self.matching(**values), limit=2)[0]}
        return found.pop() if len(found) == 1 else None
