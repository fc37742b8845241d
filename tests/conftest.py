"""Fixtures: small raw data sets in their true formats, one trained run, and two ways to call a script.

A default test calls a script's main in its own process (`call_script`); tests marked slow start it (`type_command`).
"""
import inspect
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# One thread: the tests run side by side, and sums depend on the number of threads in their last bits. It is read where
# torch is imported; numba, with which UMAP is compiled, sets the number for all libraries once more.
os.environ.update({'COLUMNS': '120', 'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '1', 'NUMBA_NUM_THREADS': '1'})

import pytest  # noqa: E402
from faults import PRELOAD, TINY, run_file  # noqa: E402
from raw_trees import make_car, make_cub, make_isc, make_sop  # noqa: E402

REPOSITORY = Path(__file__).parent.parent
ENVIRONMENT = dict(os.environ)


def start_command(*words: str, out: Path, err: Path, cwd: Path = REPOSITORY):
    """Start `python words...` as a user would, with its output in two files; returns the process.

    It is forked from a process that has imported torch already, which saves seconds each time.
    """
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=run_file, args=([str(word) for word in words], str(cwd), dict(ENVIRONMENT),
                                                     str(out), str(err)))
    process.start()
    return process


def type_command(*words: str, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess:
    """Run `python words...` as a user would, from the repository."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / 'out', Path(folder) / 'err'
        process = start_command(*words, out=out, err=err, cwd=cwd)
        process.join(300)
        assert process.exitcode is not None, f'{words} has not ended after five minutes'
        return subprocess.CompletedProcess(words, process.exitcode, out.read_text(), err.read_text())


def assert_one_line_error(result: subprocess.CompletedProcess, *parts: str) -> None:
    """Check exit code 2 and one error line that holds all parts, no traceback; a progress bar may stand before it."""
    lines = [line for line in result.stderr.splitlines() if ': error: ' in line]
    assert result.returncode == 2, result.stderr
    assert len(lines) == 1, result.stderr
    assert 'Traceback' not in result.stderr
    for part in parts:
        assert part in lines[0], lines[0]


def call_main(script, *words) -> None:
    """Call a script's main in this process with a command line."""
    words = [str(word) for word in words]
    if script.__name__ == 'train':
        from training.options import parse_options

        script.main(parse_options(words))
    elif inspect.signature(script.main).parameters:
        script.main(script.get_args(words))
    else:
        argv, sys.argv = sys.argv, [f'{script.__name__}.py', *words]
        try:
            script.main()
        finally:
            sys.argv = argv

# Processes that tests start are forked from one that has imported this.
multiprocessing.set_forkserver_preload(PRELOAD)


@pytest.fixture(scope='session')
def raw_sets(tmp_path_factory) -> Path:
    """A data path with the four raw data sets, converted."""
    import data_utils

    data_path = tmp_path_factory.mktemp('data')
    for make in (make_car, make_cub, make_sop, make_isc):
        make(data_path)
    call_main(data_utils, '--data_path', data_path)
    return data_path


@pytest.fixture(scope='session')
def trained_run(raw_sets, tmp_path_factory) -> Path:
    """The folder of a run of one epoch with its files: TINY of faults.py, on CARS196. Tests must not change it."""
    import train

    folder = tmp_path_factory.mktemp('run')
    call_main(train, *TINY, '--num_epochs', 1, '--warm_up', 0, '--num_workers', 0, '--data_path', raw_sets,
              '--results_dir', folder)
    return folder


@pytest.fixture
def run(trained_run, tmp_path) -> Path:
    """A copy of `trained_run` that a test may change."""
    return Path(shutil.copytree(trained_run, tmp_path / 'run'))


@pytest.fixture
def own_car(raw_sets, tmp_path) -> Path:
    """A data path with a converted CARS196 that a test may spoil; the files keep their times."""
    shutil.copytree(raw_sets / 'car', tmp_path / 'own_car' / 'car')
    return tmp_path / 'own_car'


@pytest.fixture
def call_script(capsys):
    """Call a script's main in this process with a command line; returns what it printed."""
    def call(script, *words) -> str:
        capsys.readouterr()
        call_main(script, *words)
        return capsys.readouterr().out
    return call


@pytest.fixture
def figures(monkeypatch):
    """Keep the figures that are saved, so that a test can look into them."""
    from matplotlib import pyplot

    import plot
    import toy

    kept = []

    def keep(figure, target, dpi=0):
        kept.append(figure)
        return target

    monkeypatch.setattr(plot, 'save_figure', keep)
    monkeypatch.setattr(toy, 'save_figure', keep)
    yield kept
    for figure in kept:
        pyplot.close(figure)


@pytest.fixture(scope='module')
def browser():
    """Headless Chromium that keeps its console."""
    chromium, driver = shutil.which('chromium'), shutil.which('chromedriver')
    if not chromium or not driver:
        pytest.skip('needs a browser: the Debian packages chromium and chromium-driver')
    webdriver = pytest.importorskip('selenium.webdriver', reason='selenium is not installed')
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ('--headless=new', '--no-sandbox', '--disable-dev-shm-usage', '--window-size=1100,900'):
        options.add_argument(argument)
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield driver
    driver.quit()
