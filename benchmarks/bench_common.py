"""What the benchmarks share: the machine, photographs made with a fixed seed, turns, evaluate.py, CSV files."""
import csv
import io
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # a script finds modules beside itself only


def machine() -> dict:
    """Return processor, threads and versions, as every result needs them beside it."""
    import torch
    import torchvision

    names = [line.split(':')[1].strip() for line in Path('/proc/cpuinfo').read_text().splitlines()
             if line.startswith('model name')] if Path('/proc/cpuinfo').is_file() else []
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {'cpu': names[0] if names else platform.processor(), 'cores': os.cpu_count(),
            'threads': torch.get_num_threads(), 'gpu': gpu, 'python': platform.python_version(),
            'torch': torch.__version__, 'torchvision': torchvision.__version__}


def write_photograph(file: Path, size: tuple[int, int], index: int) -> None:
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(index)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    coarse = coarse.resize(size, Image.Resampling.BICUBIC)
    pixels = np.asarray(coarse, np.int16) + rng.integers(-12, 13, (size[1], size[0], 3))
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, quality=90)


def write_photographs(folder: Path, count: int, size: tuple[int, int], classes: int = 8) -> None:
    """Write JPEG files with the blur and the noise of photographs under train/CLASS and test/CLASS, half each.

    Args:
        folder: of a data set of one's own, for data_utils.py.
        count: files.
        size: width and height in pixels.
        classes: in each half.
    """
    files = [folder / subset / f'{subset}_{index // 2 % classes}' / f'{index:05d}.jpg'
             for index, subset in zip(range(count), itertools.cycle(('test', 'train')), strict=False)]
    for parent in {file.parent for file in files}:
        parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context('spawn')) as pool:
        list(pool.map(write_photograph, files, [size] * count, range(count), chunksize=32))


def take_turns(steps: dict, repetitions: int) -> dict[str, list[float]]:
    """Call each step in turn, `repetitions` times after one that is not counted; returns the seconds of each call."""
    seconds = {name: [] for name in steps}
    for repetition in range(repetitions + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if repetition:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median(values) -> float:
    return statistics.median(values)


def finish(result: dict) -> None:
    """Print the last line: one line of JSON with the machine beside the numbers."""
    print(json.dumps({**result, 'machine': machine()}))


# ---------------------------------------------------- measured tables ----------------------------------------------
def evaluate(*flags) -> dict:
    """Return what evaluate.py measures.

    Raises:
        UserError: if it fails; its own message is printed above.
    """
    from common.errors import UserError

    command = [sys.executable, REPOSITORY / 'evaluate.py', '--json', *flags]
    done = subprocess.run([str(word) for word in command], check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f'evaluate.py ended with code {done.returncode}; its message is above')
    return json.loads(done.stdout)


def read_csv(file: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV, none if there is no file."""
    if not file.is_file():
        return []
    with open(file, newline='', encoding='utf-8') as opened:
        return list(csv.DictReader(opened))


def write_csv(file: Path, columns: tuple[str, ...], rows: list[dict[str, str]]) -> None:
    """Write rows as a CSV."""
    from common.files import write_atomically

    text = io.StringIO(newline='')
    writer = csv.DictWriter(text, columns, lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(file, lambda target: target.write(text.getvalue().encode()))
