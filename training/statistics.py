"""The statistics of a run, {run}_statistics.csv: written after each epoch, with the settings and how it was made.

torch and pandas are imported where they are used, so that a command line is read at once.
"""
import hashlib
import json
import os
import platform
import subprocess
from pathlib import Path

from common.distributed import world_size
from common.errors import UserError, reason_of
from common.files import write_atomically
from common.results import RunFiles
from imagedata.raw_sets import count_images


def provenance(device) -> dict:
    """Return what a file should say of the code and the machine that made it: commit, versions, device, processes."""
    import torch
    import torchvision

    def git(*words: str) -> str | None:
        try:
            result = subprocess.run(['git', '-C', str(Path(__file__).parent), *words], capture_output=True, text=True,
                                    check=True)
        except (OSError, subprocess.CalledProcessError):  # no git, or the code came without its history
            return None
        return result.stdout.strip()

    changes = git('status', '--porcelain', '--untracked-files=no')
    return {'commit': git('rev-parse', 'HEAD') or 'unknown', 'changed_since': 'unknown' if changes is None else
            'yes' if changes else 'no', 'python': platform.python_version(), 'torch': str(torch.__version__),
            'torchvision': str(torchvision.__version__), 'processes': world_size(),
            'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type,
            'processor': processor_name()}


def split_fingerprint(split: dict) -> str:
    """Return a hash of the classes, images and subsets of a split."""
    return hashlib.sha256(json.dumps(split).encode()).hexdigest()


def describe_split(split: dict) -> dict[str, str]:
    """Return what a file should say of the data: the hash of the split, and its numbers of images and classes."""
    numbers = [f'{subset}: {count_images(classes):,} of {len(classes):,} classes'
               for subset, classes in split.items() if subset != 'class_names']
    return {'split': split_fingerprint(split), 'images': ', '.join(numbers)}


def processor_name() -> str:
    """Return the processor's name and number of cores."""
    name, cpuinfo = platform.processor() or platform.machine(), Path('/proc/cpuinfo')
    if cpuinfo.is_file():
        names = [line.split(':')[1].strip() for line in cpuinfo.read_text().splitlines()
                 if line.startswith('model name')]
        name = names[0] if names else name
    return f'{name}, {os.cpu_count()} cores'


def save_statistics(rows: list[dict], settings: dict, path: Path, made_with: dict | None = None) -> None:
    """Save a run's statistics as CSV, a row an epoch; what was not measured after an epoch is empty.

    Behind what was measured stand a column `args.NAME` per setting and `made.NAME` per part of `provenance`.
    """
    import pandas as pd

    plain = {f'args.{name}': ','.join(map(str, value)) if isinstance(value, (list, tuple)) else value
             for name, value in settings.items()} | {f'made.{name}': value for name, value in (made_with or {}).items()}
    table = pd.DataFrame(rows).assign(**plain)
    write_atomically(path, lambda file: table.to_csv(file, index=False))


def read_statistics(path: str | Path):
    """Read the statistics of a run: a DataFrame with a row an epoch.

    Raises:
        UserError: if the file is missing, empty, or no statistics file.
    """
    import pandas as pd

    path = Path(path)
    if not path.is_file():
        raise UserError(f'there is no statistics file {path}; train.py writes them as '
                        f'RUN_{RunFiles.ENDINGS["statistics"]}')
    try:
        table = pd.read_csv(path)
    except ValueError as error:  # of pandas, for an empty or ragged file, or one that is no text
        raise UserError(f'{path} is no statistics file ({reason_of(error)})') from None
    if 'epoch' not in table or not len(table) or not pd.api.types.is_numeric_dtype(table['epoch']) or \
            not table['epoch'].between(0, 2**31).all():
        raise UserError(f'{path} is no statistics file: it has no rows with an epoch')
    return table
