"""Collections in Qdrant: a server or cluster at a URL, or the embedded mode in a folder.

    collection = QdrantCollection('http://localhost:6333', 'museum')    # same methods as FileCollection
    collection, model = open_qdrant('http://localhost:6333', 'museum', 'RUN_model.pth')

An image is a point: its vector are the features, its payload the fields of CollectionItem, and its id, which is also
its index, is a hash of the file's path, so that adding an image twice stores it once. The collection's metadata hold
the fingerprint of the model and the settings of its run. The server's API key is read from QDRANT_API_KEY.
"""
import contextlib
import hashlib
import io
import json
import os
import pickle
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import torch

from common.errors import Unreachable, UserError, reason_of
from model import EmbeddingNet
from retrieval.collection import CollectionItem
from retrieval.counting import cosine_similarity
from retrieval.database import ORIGIN
from retrieval.model_file import load_model, model_fingerprint
from retrieval.onnx_file import OnnxNet

POINTS_PER_REQUEST = 1024
QUANTISED_FROM = 10**5  # images; a larger collection keeps its vectors on disk, and their signs in memory
OVERSAMPLING = 4.0  # candidates by sign per result, which are ranked again by their vectors
EXACT_UP_TO = 20_000  # images that are compared one by one, as Qdrant does itself below its indexing threshold
MAX_FOLDERS = 1000
CACHED_ITEMS = 2**14
EMBED_SECONDS, SERVE_SECONDS = 60, 5  # that a server has to answer a request


def point_id(file: str) -> int:
    """Return the id of an image: 63 bits of a hash of its path."""
    return int.from_bytes(hashlib.sha256(file.encode()).digest()[:8], 'big') >> 1


def in_requests(values) -> Iterator:
    """Yield a sequence in parts of at most POINTS_PER_REQUEST."""
    for start in range(0, len(values), POINTS_PER_REQUEST):
        yield values[start:start + POINTS_PER_REQUEST]


def payload_of(item: CollectionItem) -> dict:
    """Return what a point holds besides the features; `file` and `text` are what `index_of` and `find` look in."""
    return {**item._asdict(), 'file': item.file, 'text': f'{item.path} {item.label}'.lower()}


def item_of(point) -> CollectionItem:
    """Return the image of a point."""
    return CollectionItem(*(point.payload[name] for name in CollectionItem._fields))


class PointUnpickler(pickle.Unpickler):
    """Unpickles the points of an embedded collection, which hold texts and numbers, and nothing else."""

    def find_class(self, module: str, name: str):
        if (module, name) == ('qdrant_client.http.models.models', 'PointStruct'):
            return super().find_class(module, name)
        raise UserError(f'--qdrant: the folder holds a pickle of {module}.{name}, which could execute code, and is not '
                        'opened; embed the images again into another folder')


class QdrantCollection:
    """A collection in Qdrant, with the methods and attributes of FileCollection; changes take effect at once.

    Args:
        location: URL of a server, or folder of the embedded mode, which only one process at a time can open.
        name: of the collection.
        origin: for a new collection: `args` and the other keys of `retrieval.database.ORIGIN`.
        fingerprint: of the model; None accepts that of the collection.
        dim: D of a new collection; without `origin` and `dim` the collection must exist.
        dtype: of the vectors; None: that of the collection, float32 for a new one.
        timeout: seconds that a server has to answer a request.

    Attributes:
        broken: {file: item} of the files that could not be read since the collection was opened.
        num_added: images added since the collection was opened.

    Raises:
        UserError: if qdrant-client is missing, the server does not answer, or the collection does not exist, is not
            one of embed.py, or belongs to another model.
    """

    supports_binary = False  # search by Hamming distance

    def __init__(self, location: str, name: str, origin: dict | None = None, fingerprint: str | None = None,
                 dim: int | None = None, dtype: torch.dtype | None = None, timeout: int = EMBED_SECONDS):
        try:
            from qdrant_client import models
        except ImportError:
            raise UserError('--qdrant needs qdrant-client; install it with: pip install -r requirements-serve.txt'
                            ) from None
        self.location, self.name, self.models, self.timeout = location, name, models, timeout
        self.is_server = '://' in location
        self.lock = threading.RLock()
        self.broken = {}
        self.num_added = 0
        self.client = self.connect()
        with self.request():
            if not self.client.collection_exists(name):
                if dim is None or origin is None:
                    raise UserError(f'--collection {name} does not exist in {location}; create it with --model and '
                                    '--images')
                self.create(origin, fingerprint, dim, dtype)
            config = self.client.get_collection(name).config
        metadata = config.metadata or {}
        self.check_config(metadata, config.params.vectors, fingerprint, dtype)
        self.origin, self.fingerprint = json.loads(metadata['origin']), metadata['fingerprint']
        self.items_read = {}  # {index: item} of the latest answers, which serve.py shows next

    # ------------------------------------------------ server -------------------------------------------------------
    def connect(self):
        """Return a client of the server, or of the embedded mode."""
        from qdrant_client import QdrantClient
        from qdrant_client.local import persistence

        with self.request():
            if self.is_server:
                return QdrantClient(url=self.location, api_key=os.environ.get('QDRANT_API_KEY'), timeout=self.timeout)
            # The embedded mode unpickles points, which would execute what a stranger's folder says.
            if not hasattr(persistence, 'pickle'):
                raise UserError('--qdrant: this version of qdrant-client reads folders in a way that is not checked; '
                                'name the URL of a server')
            persistence.pickle = SimpleNamespace(dumps=pickle.dumps,
                                                 loads=lambda data: PointUnpickler(io.BytesIO(data)).load())
            return QdrantClient(path=self.location, force_disable_check_same_thread=True)

    @contextlib.contextmanager
    def request(self):
        """Turn the client's errors into Unreachable; in embedded mode, let only one thread at a time pass."""
        from qdrant_client.http.exceptions import ApiException

        with contextlib.nullcontext() if self.is_server else self.lock:
            try:
                yield
            except UserError:
                raise
            except (ApiException, OSError, RuntimeError, ValueError) as error:
                raise Unreachable(f'--qdrant {self.location}: {reason_of(error)}') from None

    def create(self, origin: dict, fingerprint: str, dim: int, dtype: torch.dtype | None) -> None:
        """Create the collection, and indices of the payload fields that are searched."""
        models = self.models
        datatype = models.Datatype.FLOAT16 if dtype == torch.float16 else models.Datatype.FLOAT32
        self.client.create_collection(
            self.name, metadata={'origin': json.dumps(origin, default=str), 'fingerprint': fingerprint},
            # The dot product of unit vectors is their cosine.
            vectors_config=models.VectorParams(size=dim, distance=models.Distance.DOT, datatype=datatype))
        if self.is_server:  # the embedded mode has no indices
            for field in ('folder', 'path', 'file'):
                self.client.create_payload_index(self.name, field, models.PayloadSchemaType.KEYWORD)
            self.client.create_payload_index(self.name, 'text', models.TextIndexParams(
                type=models.TextIndexType.TEXT, tokenizer=models.TokenizerType.PREFIX, lowercase=True))

    def check_config(self, metadata: dict, vectors, fingerprint: str | None, dtype: torch.dtype | None) -> None:
        """Raise a UserError unless the collection is one of embed.py, of this model and dtype."""
        if not {'origin', 'fingerprint'} <= metadata.keys():
            raise UserError(f'--collection {self.name} in {self.location} was not created by embed.py; name another')
        if fingerprint not in (None, metadata['fingerprint']):
            raise UserError(f'--model: --collection {self.name} holds embeddings of another model, and similarities '
                            'between models are meaningless; name that model, or another collection')
        datatype = getattr(getattr(vectors, 'datatype', None), 'value', 'float32')
        if dtype is not None and str(dtype) != f'torch.{datatype}':
            raise UserError(f'--dtype: the vectors of --collection {self.name} are {datatype}; leave it out, or name '
                            'another collection')

    def close(self) -> None:
        """Disconnect from the server, or release the folder of the embedded mode."""
        self.client.close()

    # ------------------------------------------------ changes ------------------------------------------------------
    def add(self, items: list[CollectionItem], features: torch.Tensor, broken: list[CollectionItem] = ()) -> None:
        """Add images with their features (n, D), unit rows; they replace earlier ones of the same files.

        Args:
            broken: images that cannot be read: they are removed from the collection.
        """
        for item in items:
            self.broken.pop(item.file, None)
        self.broken |= {item.file: item for item in broken}
        self.remove(broken)
        with self.request():
            for part, vectors in zip(in_requests(items), in_requests(features.float()), strict=True):
                self.client.upsert(self.name, wait=True, points=self.models.Batch(
                    ids=[point_id(item.file) for item in part], vectors=vectors.tolist(),
                    payloads=[payload_of(item) for item in part]))
        self.num_added += len(items)
        self.items_read.clear()

    def remove(self, items: list[CollectionItem]) -> None:
        """Remove images; those that are not in the collection are ignored."""
        with self.request():
            for part in in_requests(items):
                self.client.delete(self.name, wait=True, points_selector=self.models.PointIdsList(
                    points=[point_id(item.file) for item in part]))
        self.items_read.clear()

    def relabel(self, items: list[CollectionItem]) -> None:
        """Give images the classes that these items have."""
        models = self.models
        with self.request():
            for part in in_requests(items):
                self.client.batch_update_points(self.name, [
                    models.SetPayloadOperation(set_payload=models.SetPayload(
                        payload=payload_of(item), points=[point_id(item.file)])) for item in part])
        self.items_read.clear()

    def finish(self) -> None:
        """Quantise a large collection: signs in memory, vectors on disk."""
        if not self.is_server or len(self) < QUANTISED_FROM:
            return
        models = self.models
        with self.request():
            if self.client.get_collection(self.name).config.quantization_config is None:
                self.client.update_collection(
                    self.name, vectors_config={'': models.VectorParamsDiff(on_disk=True)},
                    quantization_config=models.BinaryQuantization(
                        binary=models.BinaryQuantizationConfig(always_ram=True)))

    # ------------------------------------------------ search -------------------------------------------------------
    def search(self, features: torch.Tensor, k: int, binary: bool = False) -> list[list[tuple[int, float]]]:
        """Return the k nearest images [(index, similarity), ...] of each query (Q, D), nearest first.

        The similarities are computed in float64 from the vectors. Up to EXACT_UP_TO images the neighbours are exact;
        beyond, they are as good as Qdrant's index.
        """
        if binary:
            raise UserError('Qdrant ranks by cosine only; leave binary out')
        models = self.models
        params = None
        if self.is_server:
            exact = len(self) <= EXACT_UP_TO
            rescored = models.QuantizationSearchParams(rescore=True, oversampling=OVERSAMPLING)
            params = models.SearchParams(exact=exact, quantization=None if exact else rescored)
        with self.request():
            answers = self.client.query_batch_points(self.name, requests=[
                models.QueryRequest(query=query, limit=k, params=params, with_vector=True, with_payload=True)
                for query in features.float().tolist()])
        for answer in answers:
            self.remember(answer.points)
        return [rank_points(query, answer.points) for query, answer in zip(features, answers, strict=True)]

    def feature(self, index: int) -> torch.Tensor:
        """Return the features (D,) of an image."""
        with self.request():
            return torch.tensor(self.client.retrieve(self.name, [index], with_vectors=True)[0].vector)

    def random_index(self) -> int:
        """Return the index of a random image."""
        query = self.models.SampleQuery(sample=self.models.Sample.RANDOM)
        with self.request():
            return self.remember(self.client.query_points(self.name, query=query, limit=1).points)[0]

    def find(self, words: str, limit: int) -> tuple[int, list[int]]:
        """Return the number of images whose path and class contain all words, and the indices of the first ones."""
        models = self.models
        condition = models.Filter(must=[models.FieldCondition(key='text', match=models.MatchText(text=word))
                                        for word in words.lower().split()])
        with self.request():
            count = self.client.count(self.name, count_filter=condition).count
            return count, self.remember(self.client.scroll(self.name, condition, limit=limit)[0])

    def index_of(self, path: str) -> int | None:
        """Return the index of the image of a relative or absolute path; None if no image, or several, have it."""
        with self.request():
            ids = {point.id for field in ('path', 'file')
                   for point in self.client.scroll(self.name, self.field_equals(field, path), limit=2)[0]}
        return ids.pop() if len(ids) == 1 else None

    # ------------------------------------------------ items --------------------------------------------------------
    def __len__(self) -> int:
        with self.request():
            return self.client.count(self.name, exact=not self.is_server).count

    def item(self, index: int) -> CollectionItem:
        """Return the image with this index; raises IndexError if there is none."""
        item = self.items_read.get(index)
        if item is None:
            with self.request():
                points = self.client.retrieve(self.name, [index]) if 0 <= index < 2**63 else []
            if not points:
                raise IndexError(index)
            self.remember(points)
            item = item_of(points[0])
        return item

    def remember(self, points: list) -> list[int]:
        """Keep the images of points that hold their payload; returns their indices."""
        if len(self.items_read) > CACHED_ITEMS:
            self.items_read.clear()
        self.items_read |= {point.id: item_of(point) for point in points}
        return [point.id for point in points]

    def items(self, folder: str | None = None) -> Iterator[CollectionItem]:
        """Yield all images, or those of a folder."""
        condition = None if folder is None else self.field_equals('folder', folder)
        offset = None
        while True:
            with self.request():
                points, offset = self.client.scroll(self.name, condition, limit=POINTS_PER_REQUEST, offset=offset)
            yield from map(item_of, points)
            if offset is None:
                return

    def folders(self) -> list[str]:
        """Return the folders of the images."""
        with self.request():
            return sorted(hit.value for hit in self.client.facet(self.name, 'folder', limit=MAX_FOLDERS).hits)

    def field_equals(self, field: str, value: str):
        """Return a filter for the points with this value in a payload field."""
        match = self.models.MatchValue(value=value)
        return self.models.Filter(must=[self.models.FieldCondition(key=field, match=match)])


def rank_points(query: torch.Tensor, points: list) -> list[tuple[int, float]]:
    """Return [(id, cosine in float64), ...] of points that hold their vectors, most similar to a query (D,) first."""
    if not points:
        return []
    vectors = torch.tensor([point.vector for point in points])
    similarities = cosine_similarity(query[None].float(), vectors)[0].tolist()
    pairs = zip((point.id for point in points), similarities, strict=True)
    return sorted(pairs, key=lambda pair: (-pair[1], pair[0]))


def open_qdrant(location: str, name: str, model_file: str | None = None, device: torch.device | str = 'cpu',
                create: bool = False, dtype: torch.dtype | None = None, timeout: int = EMBED_SECONDS
                ) -> tuple[QdrantCollection, EmbeddingNet | OnnxNet | None]:
    """Open a collection together with the model that embeds for it.

    Args:
        model_file: None opens the collection without a model.
        create: create the collection if it does not exist; needs a model.
        dtype, timeout: see QdrantCollection.

    Raises:
        UserError: as QdrantCollection, for instance if another model embedded the collection.
    """
    if model_file is None:
        return QdrantCollection(location, name, dtype=dtype, timeout=timeout), None
    model, contents = load_model(model_file, device)
    new = {}
    if create:
        new = {'origin': {key: contents[key] for key in ORIGIN if key in contents}, 'dim': model.feature_dim}
    return QdrantCollection(location, name, fingerprint=model_fingerprint(contents), dtype=dtype, timeout=timeout,
                            **new), model
