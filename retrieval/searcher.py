"""Search in a collection for many clients at once: requests that arrive together share a batch. Used by serve.py."""
import asyncio
import contextlib
import io
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from common.distributed import use_amp
from common.errors import Unreachable, UserError
from common.images import load_image
from common.limited import LimitedProcesses, LimitExceeded
from imagedata.loading import make_transform
from model import EmbeddingNet
from retrieval.collection import SearchableImages
from retrieval.database import load_model_of, open_data_base, open_set_threshold
from retrieval.embedding import embed_batch
from retrieval.folding import fold_batch_norm
from retrieval.onnx_file import OnnxNet
from retrieval.qdrant import SERVE_SECONDS, open_qdrant

TEST_PICTURE = b'P6 1 1 255 ' + bytes(3)  # a PPM file of one black pixel
MAX_BATCH = 16  # requests that are answered together
DECODE_SECONDS, DECODE_MEGABYTES = 10, 2000  # of one image file
MAX_WAITING = 64  # searches that are answered or wait; more are refused


class RequestError(Exception):
    """A request that is refused: a status 4xx for a mistake of the client, 503 if the server is busy, and one line."""

    def __init__(self, status: int, message: str):
        self.status, self.message = status, message
        super().__init__(message)


class Query(NamedTuple):
    """What to search for: the pixels of an image that is embedded first, or a feature."""

    image: torch.Tensor | None  # uint8 (3, side, side)
    feature: torch.Tensor | None  # (D,)
    k: int  # number of neighbours
    binary: bool  # by Hamming distance


class Searcher:
    """Answers queries to a collection in batches, with the model that embeds for it.

    Args:
        collection: what is searched, of retrieval.collection or retrieval.qdrant.
        model: None if there is none; then queries must be features of the collection.
        threshold: similarity below which an answer is called `no close match`, or None.
        device: of the model.
    """

    def __init__(self, collection, model: EmbeddingNet | OnnxNet | None, threshold: float | None, device: torch.device):
        self.collection, self.model, self.threshold, self.device = collection, model, threshold, device
        if model is not None:
            settings = collection.origin['args']
            self.amp = use_amp(settings['amp'], device)
            if isinstance(model, EmbeddingNet) and device.type == 'cpu' and not self.amp:
                self.model = fold_batch_norm(model)
            self.transform = (model.config.image_size, settings['resize_size'], model.interpolation)
        self.batch_thread = ThreadPoolExecutor(1)
        count = os.cpu_count() or 1  # limits the decoded images in memory
        self.decoders = LimitedProcesses(count, DECODE_SECONDS, DECODE_MEGABYTES)
        self.decoder_threads = ThreadPoolExecutor(count)  # each waits for a process
        self.queue = deque()  # of (query, future)
        self.batch_task = None  # that answers the queue, until it is empty
        self.waiting = 0  # searches between their arrival and their answer

    @contextlib.contextmanager
    def admit(self):
        """Count a search while it is answered; raises RequestError if too many wait."""
        if self.waiting >= MAX_WAITING:
            raise RequestError(503, 'the server is busy; try again in some seconds')
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1

    async def in_decoder_thread(self, function, *args):
        """Call a function that uses `decoders`."""
        return await asyncio.get_running_loop().run_in_executor(self.decoder_threads, function, *args)

    async def decode(self, data: bytes) -> torch.Tensor:
        """Decode an image file to the pixels that the model expects; raises BrokenImage or LimitExceeded."""
        pixels = await self.in_decoder_thread(self.decoders.call, decode_pixels, data, *self.transform)
        return torch.from_numpy(pixels)

    async def search(self, query: Query) -> list[tuple[int, float]]:
        """Return the nearest images [(index, similarity), ...] of a query."""
        future = asyncio.get_running_loop().create_future()
        self.queue.append((query, future))
        if self.batch_task is None or self.batch_task.done():
            self.batch_task = asyncio.create_task(self.answer_queue())
        return await future

    async def answer_queue(self) -> None:
        """Answer the queue, one batch at a time."""
        while self.queue:
            batch = []
            while self.queue and len(batch) < MAX_BATCH:
                query, future = self.queue.popleft()
                if not future.done():  # else the client has left
                    batch.append((query, future))
            queries = [query for query, _ in batch]
            try:
                answers = await asyncio.get_running_loop().run_in_executor(self.batch_thread, self.answer, queries)
            except Exception as error:  # the requests of this batch report it; later ones are still answered
                for _, future in batch:
                    if not future.done():
                        future.set_exception(as_response_error(error))
                continue
            for (_, future), answer in zip(batch, answers, strict=True):
                if not future.done():  # the client may have left meanwhile
                    future.set_result(answer)

    def answer(self, queries: list[Query]) -> list[list[tuple[int, float]]]:
        """Return the nearest images of each query of a batch."""
        features = [query.feature for query in queries]
        to_embed = [index for index, query in enumerate(queries) if query.image is not None]
        if to_embed:
            embeddings = self.embed([queries[index].image for index in to_embed])
            for index, embedding in zip(to_embed, embeddings, strict=True):
                features[index] = embedding
        answers = [None] * len(queries)
        for binary in {query.binary for query in queries}:
            indices = [index for index, query in enumerate(queries) if query.binary == binary]
            largest_k = max(queries[index].k for index in indices)
            neighbours = self.collection.search(torch.stack([features[index] for index in indices]), largest_k, binary)
            for index, row in zip(indices, neighbours, strict=True):
                answers[index] = row[:queries[index].k]
        return answers

    async def check(self) -> int:
        """Embed a picture and search for it, as for a client; returns the number of images of the collection.

        Raises:
            RequestError: if it cannot be decoded.
        """
        if self.model is not None:
            try:
                pixels = await self.decode(TEST_PICTURE)
            except LimitExceeded as error:
                raise RequestError(503, f'a picture cannot be decoded ({error})') from None
            await self.search(Query(pixels, None, 1, False))
        return await asyncio.to_thread(len, self.collection)

    @torch.inference_mode()
    def embed(self, images: list[torch.Tensor]) -> torch.Tensor:
        """Embed uint8 images (3, side, side); returns (N, D) float32 on the CPU."""
        return embed_batch(self.model, torch.stack(images), self.device, self.amp).cpu()


def decode_pixels(data: bytes, image_size: int, resize_size: int | None, interpolation: str) -> np.ndarray:
    """Decode an image file to the pixels (3, image_size, image_size) of a test image; raises BrokenImage."""
    return make_transform(False, image_size, resize_size, interpolation)(load_image(io.BytesIO(data))).numpy()


def as_response_error(error: Exception) -> Exception:
    """Return the exception that a request raises for an error in its batch: each one needs its own object."""
    if isinstance(error, Unreachable):
        return Unreachable(str(error))
    if isinstance(error, UserError):
        return RequestError(422, str(error))
    return RuntimeError(f'the search failed: {error}')


def open_searcher(data_base: str, results_dir: str, data_path: str, device: torch.device) -> Searcher:
    """Open a data base of a run or of embed.py with the model beside it, if there is one.

    Args:
        data_base: file, or its name in results_dir.
        data_path: the folder that holds the data set of a run.
    """
    opened = open_data_base(data_base, results_dir, data_path)
    model = None
    if opened.files.model_for(device).is_file():
        model, _ = load_model_of(opened, device)
    else:
        print(f'there is no model {opened.files.model}: only images of the data base can be searched for')
    return Searcher(SearchableImages.of_run(opened), model, open_set_threshold(opened.data_base.origin), device)


def open_qdrant_searcher(location: str, name: str, model_file: str | None, device: torch.device) -> Searcher:
    """Open a Qdrant collection with the model that embedded it, or without a model."""
    collection, model = open_qdrant(location, name, model_file, device, timeout=SERVE_SECONDS)
    return Searcher(collection, model, open_set_threshold(collection.origin), device)
