"""Many clients at serve.py at once: seconds of a search, and errors, beside the model's own time for one image.

    python benchmarks/bench_serve.py                     # 16 clients, 2,000 searches, 2,048 images; some minutes
    python benchmarks/bench_serve.py --searches 100 --clients 4 --images 128

Made photographs (JPEG, 500 x 375 px) are embedded with a backbone of random weights, then served by another process.
Each client sends one picture after the other over HTTP and waits for its answer (decode, embed, search). `alone` is
one client. `model` is the network on one image and on 16 in memory, in this process, before and after. Ends with one
line of JSON.
"""
import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from dataclasses import asdict
from pathlib import Path

from bench_common import finish, median, write_photographs

ROOT = Path(__file__).parent.parent


def measure_model(backbone_type: str, weights_file: Path, repetitions: int = 7) -> dict:
    """Return the seconds of the network for one image and for 16; writes its model file where there is none."""
    import torch

    from common.files import save
    from model import EmbeddingNet, NetConfig
    from common.distributed import use_amp

    torch.manual_seed(0)
    network = EmbeddingNet(NetConfig(backbone_type, 512), 'none').to(memory_format=torch.channels_last).eval()
    if not weights_file.exists():
        settings = {'data_name': 'made', 'crop_type': 'uncropped', 'batch_size': 64, 'resize_size': 256, 'amp': 'auto',
                    'recalls': [1], 'run': 'made'}
        save({'config': asdict(network.config), 'state_dict': network.state_dict(), 'args': settings}, weights_file)
    found = {}
    for number in (1, 16):
        images, seconds = torch.randint(0, 256, (number, 3, 224, 224), dtype=torch.uint8), []
        for _ in range(repetitions + 1):
            start = time.perf_counter()
            with torch.inference_mode(), torch.autocast('cpu', torch.bfloat16,
                                                        enabled=use_amp('auto', torch.device('cpu'))):
                network(images)
            seconds.append(time.perf_counter() - start)
        found[number] = median(seconds[1:])
    return found


def send(url: str, pictures: list[bytes], clients: int, searches: int) -> dict:
    """Let a number of clients search; returns errors, seconds a search (p50, p95) and searches per second."""
    turns, seconds, errors = itertools.count(), [], []

    def client() -> None:
        while (turn := next(turns)) < searches:
            start = time.perf_counter()
            try:
                request = urllib.request.Request(f'{url}/search?k=20', pictures[turn % len(pictures)])
                with urllib.request.urlopen(request, timeout=600) as answer:
                    assert len(json.loads(answer.read())['results']) == 20
            except Exception as error:
                errors.append(str(error))
            seconds.append(time.perf_counter() - start)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole = time.perf_counter() - begin
    seconds.sort()
    return {'clients': clients, 'searches': searches, 'errors': len(errors), 'p50_s': seconds[len(seconds) // 2],
            'p95_s': seconds[int(len(seconds) * 0.95)], 'per_s': searches / whole}


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=int, default=2048, help='in the collection [%(default)s]')
    parser.add_argument('--clients', type=int, default=16, help='[%(default)s]')
    parser.add_argument('--searches', type=int, default=2000, help='[%(default)s]')
    parser.add_argument('--backbone_type', default='resnet18', help='[%(default)s]')
    return parser


def main() -> None:
    args = get_parser().parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        before = measure_model(args.backbone_type, folder / 'made_model.pth')
        write_photographs(folder / 'photos', args.images, (500, 375))
        subprocess.run([sys.executable, ROOT / 'embed.py', '--model', folder / 'made_model.pth', '--images',
                        folder / 'photos', '--data_base', folder / 'made.pth'], check=True, stdout=sys.stderr)
        pictures = [file.read_bytes() for file in sorted((folder / 'photos').rglob('*.jpg'))[:64]]
        with subprocess.Popen([sys.executable, ROOT / 'serve.py', '--data_base', folder / 'made.pth', '--port', '0'],
                              stdout=subprocess.PIPE, text=True) as server:
            url = re.search(r'http://\S+?(?=;)', server.stdout.readline())[0]
            send(url, pictures, 1, 4)  # not counted
            alone = send(url, pictures, 1, max(20, args.searches // 20))
            many = send(url, pictures, args.clients, args.searches)
            server.terminate()
        after = measure_model(args.backbone_type, folder / 'made_model.pth')
    model = {f'model_{number}_s': (before[number] + after[number]) / 2 for number in before}
    for row in (alone, many):
        print(f'{row["clients"]:>3} clients: {row["searches"]:,} searches, {row["errors"]} errors, p50 '
              f'{1000 * row["p50_s"]:.0f} ms, p95 {1000 * row["p95_s"]:.0f} ms, {row["per_s"]:.1f} a second')
    print(f'model: 1 image {1000 * model["model_1_s"]:.0f} ms, 16 images {1000 * model["model_16_s"]:.0f} ms')
    finish({'alone': alone, 'many': many, 'backbone_type': args.backbone_type, 'images': args.images, **model})


if __name__ == '__main__':
    main()
