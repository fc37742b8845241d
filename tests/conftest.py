"""What the tests share: small raw data sets in their true formats, and a way to type a command line."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
from raw_trees import make_car, make_cub, make_isc, make_sop

REPOSITORY = Path(__file__).parent.parent
# One thread: the tests run side by side, and sums depend on the number of threads in their last bits.
ENVIRONMENT = {**os.environ, 'COLUMNS': '120', 'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '1'}


def type_command(*words: str, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess:
    """Run `python words...` as a user would, from the repository."""
    return subprocess.run([sys.executable, *map(str, words)], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True,
                          timeout=300, check=False)


def assert_one_line_error(result: subprocess.CompletedProcess, *parts: str) -> None:
    """Check exit code 2 and one error line that holds all parts, no traceback; a progress bar may stand before it."""
    lines = [line for line in result.stderr.splitlines() if ': error: ' in line]
    assert result.returncode == 2, result.stderr
    assert len(lines) == 1, result.stderr
    assert 'Traceback' not in result.stderr
    for part in parts:
        assert part in lines[0], lines[0]


@pytest.fixture(scope='session')
def raw_sets(tmp_path_factory) -> Path:
    """A data path with the four raw data sets, converted."""
    data_path = tmp_path_factory.mktemp('data')
    for make in (make_car, make_cub, make_sop, make_isc):
        make(data_path)
    result = type_command('data_utils.py', '--data_path', data_path)
    assert result.returncode == 0, result.stderr
    return data_path
