"""What the tests share: small raw data sets in their true formats, and a way to type a command line."""
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# One thread: the tests run side by side, and sums depend on the number of threads in their last bits. It is read where
# torch is imported.
os.environ.update({'COLUMNS': '120', 'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '1'})

import pytest  # noqa: E402
from faults import PRELOAD, TINY, run_file, train  # noqa: E402
from raw_trees import make_car, make_cub, make_isc, make_sop  # noqa: E402

REPOSITORY = Path(__file__).parent.parent
ENVIRONMENT = dict(os.environ)


def start_command(*words: str, out: Path, err: Path, cwd: Path = REPOSITORY):
    """Start `python words...` as a user would, what it prints going to two files; returns the process.

    It is forked from one that has imported torch and its kin already, which spares four seconds each time.
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


@pytest.fixture(scope='session')
def raw_sets(tmp_path_factory) -> Path:
    """A data path with the four raw data sets, converted."""
    data_path = tmp_path_factory.mktemp('data')
    for make in (make_car, make_cub, make_sop, make_isc):
        make(data_path)
    result = type_command('data_utils.py', '--data_path', data_path)
    assert result.returncode == 0, result.stderr
    return data_path


@pytest.fixture(scope='module')
def run(raw_sets, tmp_path_factory):
    """The folder of a short run with its files: TINY of faults.py."""
    folder = tmp_path_factory.mktemp('run')
    code, printed = train((*TINY, '--num_epochs', 1, '--warm_up', 0, '--num_workers', 0, '--data_path', raw_sets,
                           '--results_dir', folder), folder.with_suffix('.log'))
    assert code == 0, printed
    return folder


@pytest.fixture
def own_car(raw_sets, tmp_path) -> Path:
    """A data path with a converted CARS196 that a test may spoil; the files keep their times."""
    shutil.copytree(raw_sets / 'car', tmp_path / 'own_car' / 'car')
    return tmp_path / 'own_car'


@pytest.fixture
def call_script(monkeypatch, capsys):
    """Call a script's main in this process as if these words had been typed; returns what it printed."""
    def call(script, *words):
        monkeypatch.setattr(sys, 'argv', ['script.py', *map(str, words)])
        script.main()
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
