"""A collection with the model that embeds for it: requests that arrive together share a batch. Used by serve.py."""
import asyncio
import io
import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from browse import load_run_model, open_run
from collection import SearchedImages
from dataset import make_transform
from engine.errors import Unreachable, UserError
from engine.images import load_image
from engine.processes import select_device
from engine.runs import absent_threshold, fingerprint_of
from evaluate import embed_batch, use_amp
from model import load_model

BATCH = 16  # requests that are embedded at once


class Refused(Exception):
    """A request that is answered by a status of 4xx and one line."""

    def __init__(self, status: int, line: str):
        self.status, self.line = status, line
        super().__init__(line)


class Query(NamedTuple):
    """What is searched for: pixels or features, and how."""

    image: torch.Tensor | None  # uint8 (3, side, side), to be embedded
    feature: torch.Tensor | None  # (D,)
    number: int
    binary: bool


class Searcher:
    """A collection with the model that embeds for it; requests that arrive together share a batch.

    Args:
        collection: what is searched in.
        model: the network, or None where it is gone: then only images of the collection can be searched for.
        settings: of its run: resize_size, amp.
        threshold: similarity up to which an answer is probably wrong, or None.
    """

    def __init__(self, collection, model, settings: dict, threshold: float | None, device: torch.device):
        self.collection, self.model, self.threshold, self.device = collection, model, threshold, device
        self.amp = use_amp(settings['amp'], device)
        self.transform = None if model is None else make_transform(
            False, model.config.image_size, settings['resize_size'], model.interpolation)
        self.one_by_one = ThreadPoolExecutor(1)  # of batches
        self.decoders = ThreadPoolExecutor(os.cpu_count() or 1)  # so many unpacked images are in memory at most
        self.waiting, self.worker = None, None

    @torch.inference_mode()
    def embed(self, images: list[torch.Tensor]) -> torch.Tensor:
        """Embed uint8 images (3, side, side); returns (N, D) float32."""
        return embed_batch(self.model, torch.stack(images), self.device, self.amp).cpu()

    def answer(self, queries: list[Query]) -> list[list[tuple[int, float]]]:
        """Search for all queries of a batch."""
        features = [query.feature for query in queries]
        sent = [place for place, query in enumerate(queries) if query.image is not None]
        if sent:
            for place, feature in zip(sent, self.embed([queries[place].image for place in sent]), strict=True):
                features[place] = feature
        answers = [None] * len(queries)
        for binary in {query.binary for query in queries}:
            places = [place for place, query in enumerate(queries) if query.binary == binary]
            most = max(queries[place].number for place in places)
            found = self.collection.search(torch.stack([features[place] for place in places]), most, binary)
            for place, row in zip(places, found, strict=True):
                answers[place] = row[:queries[place].number]
        return answers

    async def work(self) -> None:
        """Answer what is waiting, a batch at a time, for ever."""
        while True:
            batch = [await self.waiting.get()]
            while len(batch) < BATCH and not self.waiting.empty():
                batch.append(self.waiting.get_nowait())
            try:
                answers = await asyncio.get_running_loop().run_in_executor(
                    self.one_by_one, self.answer, [query for query, _ in batch])
            except Exception as error:  # each request reports it; the next ones are to be answered
                for _, answered in batch:
                    if not answered.done():
                        answered.set_exception(failure_of(error))
                continue
            for (_, answered), answer in zip(batch, answers, strict=True):
                if not answered.done():  # a client may have gone
                    answered.set_result(answer)

    async def search(self, query: Query) -> list[tuple[int, float]]:
        """Return what a query finds."""
        if self.worker is None:
            self.waiting = asyncio.Queue()
            self.worker = asyncio.create_task(self.work())
        answered = asyncio.get_running_loop().create_future()
        self.waiting.put_nowait((query, answered))
        return await answered

    async def decode(self, data: bytes) -> torch.Tensor:
        """Read what was sent as the model wants it; raises BrokenImage."""
        return await asyncio.get_running_loop().run_in_executor(
            self.decoders, lambda: self.transform(load_image(io.BytesIO(data))))


def failure_of(error: Exception) -> Exception:
    """Return what a request is told of an error in its batch."""
    if isinstance(error, Unreachable):
        return Unreachable(str(error))
    return Refused(422, str(error)) if isinstance(error, UserError) else RuntimeError(f'the search failed: {error}')


def open_searcher(args) -> Searcher:
    """Open the collection that the command line names, with its model."""
    if args.qdrant is not None:
        return open_remote(args)
    run, device = open_run(args.data_base, args.results_dir, args.data_path), select_device(args.device)
    model, settings = None, run.data_base.origin['args']
    if run.files.model.is_file():
        model, settings = load_run_model(run, device)
    else:
        print(f'there is no {run.files.model}: only images of the data base can be searched for')
    return Searcher(SearchedImages.of_run(run), model, settings, absent_threshold(run.data_base.origin), device)


def open_remote(args) -> Searcher:
    """Open a collection of Qdrant with the model that is named.

    Raises:
        UserError: if that is not the one that embedded it.
    """
    from remote import QdrantCollection

    device, model, fingerprint = select_device(args.device), None, None
    if args.model is not None:
        model, contents = load_model(args.model, device)
        fingerprint = fingerprint_of(contents['config'], contents['state_dict'])
    collection = QdrantCollection(args.qdrant, args.collection, fingerprint=fingerprint)
    return Searcher(collection, model, collection.origin['args'], absent_threshold(collection.origin), device)
