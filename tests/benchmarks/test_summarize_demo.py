"""What `make demo` prints at its end."""
import importlib.util
import re
import subprocess

from conftest import REPOSITORY
from made_runs import write_run


def load_script():
    spec = importlib.util.spec_from_file_location('summarize_demo', REPOSITORY / 'benchmarks/summarize_demo.py')
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_the_demo_ends_with_recall_before_and_after_the_training(tmp_path, monkeypatch):
    (tmp_path / 'results').mkdir()
    file = write_run(tmp_path / 'results', 'demo', [30.0, 90.25])
    lines = file.read_text().splitlines()
    file.write_text('\n'.join([f'{lines[0]},pretrained_R@1', *(f'{line},1.75' for line in lines[1:])]))
    monkeypatch.chdir(tmp_path)
    printed = load_script().summarize('demo', 'results/top8.png')
    assert re.findall(r'[\d.]+(?= %)', printed) == ['1.8', '90.2']  # of the last epoch
    assert 'results/top8.png' in printed


def test_the_demo_names_the_run_and_the_figure_that_its_commands_write():
    printed = subprocess.run(['make', '--dry-run', '--always-make', 'demo'], cwd=REPOSITORY, capture_output=True,
                             text=True, check=True).stdout.replace('\\\n', ' ')
    run, figure = re.search(r'summarize_demo\.py (\S+) (\S+)', printed).groups()
    queries = re.search(r'--query_img_name (.*)', printed)[1].split()
    first = queries[0].removesuffix('.png')
    assert figure == f'results/{first}_and_{len(queries) - 1}_more/top8.png'
    assert f'results/{run}_data_base.pth' in printed
    assert '--pretrained_baseline 1' in printed  # what is printed as `before the training`
