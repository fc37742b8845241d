"""A tiny model, collection and server, shared by the tests of embed.py, serve.py and the collections."""
import json
import threading
import urllib.error
import urllib.request
from dataclasses import asdict
from pathlib import Path

import torch
from raw_trees import write_image

import serve
from common.files import save
from model import EmbeddingNet, NetConfig
from retrieval.collection import CollectionItem

SETTINGS = {'data_name': 'birds', 'crop_type': 'uncropped', 'batch_size': 4, 'resize_size': 36, 'amp': 'off',
            'recalls': [1, 2], 'run': 'birds_run'}
DIM = 7


def make_model(file: Path, seed: int = 0, **config) -> Path:
    """Write the model file of a network of random weights, for images of 32 px."""
    torch.manual_seed(seed)
    network = EmbeddingNet(NetConfig('timm:test_resnet', DIM, image_size=32, **config), 'none')
    save({'config': asdict(network.config), 'state_dict': network.state_dict(), 'args': SETTINGS, 'epoch': 3,
          'seen_classes': ['trained']}, file)
    return file


def write_photos(folder: Path, counts: dict[str, int]) -> Path:
    """Write so many images in each subfolder, whose colours differ; returns the folder."""
    for label, (name, count) in enumerate(counts.items()):
        for number in range(count):
            write_image(folder / name / f'{number}.jpg', label, number)
    return folder


def make_items(count: int) -> tuple[list[CollectionItem], torch.Tensor]:
    """Return images of two folders and three classes, one of them without a name, and random features (count, DIM)."""
    generator = torch.Generator().manual_seed(count)
    features = torch.nn.functional.normalize(torch.randn(count, DIM, generator=generator), dim=1)
    labels = ('', 'Ara macao', "Zebra's")
    return [CollectionItem(f'/photos/{index % 2}', f'birds/{index:03d}.jpg', labels[index % 3], index, 10**18)
            for index in range(count)], features


class Server:
    """A server in a thread of this process."""

    def __init__(self, searcher, token: str | None = None, hosts=('127.0.0.1',), root_path: str = '',
                 access_log: bool = False):
        from serving.connections import make_server

        listening = serve.listen('127.0.0.1', 0)
        self.url = f'http://127.0.0.1:{listening.getsockname()[1]}'
        self.api = serve.Api(searcher, 'museum')
        app = serve.make_app(self.api, hosts, token, root_path, access_log)
        self.server = make_server(app)
        self.thread = threading.Thread(target=self.server.run, args=([listening],))
        self.thread.start()

    def __enter__(self) -> 'Server':
        return self

    def __exit__(self, *_) -> None:
        self.server.should_exit = True
        self.thread.join()

    def request(self, address: str, body=None, **headers) -> tuple[int, dict, bytes]:
        """Return status, headers and body of a response; a body that is not bytes is sent as JSON."""
        if body is not None and not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {'Content-Type': 'application/json', **headers}
        request = urllib.request.Request(f'{self.url}{address}', body, headers)
        try:
            with urllib.request.urlopen(request) as response:
                return response.status, dict(response.headers), response.read()
        except urllib.error.HTTPError as error:
            return error.code, dict(error.headers), error.read()

    def search(self, body, query_string: str = '') -> dict:
        """Return the answer to a search, which must succeed."""
        status, _, answer = self.request(f'/search{query_string}', body)
        assert status == 200, answer
        return json.loads(answer)
