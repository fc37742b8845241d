"""The leaderboard: rows of finished runs, and the page that is made of them."""
import importlib.util
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY
from made_runs import write_run

from common.errors import UserError
from imagedata.raw_sets import RAW_SETS

MADE = {'made.split': 'ab' * 32, 'made.images': 'train: 20 of 4 classes, test: 9 of 3 classes', 'made.device': 'cpu',
        'made.processor': 'Some CPU, 2 cores', 'made.commit': 'c' * 40, 'made.changed_since': 'no',
        'made.command': 'python train.py --recipe proxy_anchor', 'made.seen_test_classes': 0, 'seconds': 1800.0,
        'dense_MAP@R': 12.5}
SETTINGS = {'recipe': 'proxy_anchor', 'data_name': 'car', 'backbone_type': 'resnet18', 'image_size': 128,
            'flip_tta': False, 'val_ratio': 0.0, 'init': None}


@pytest.fixture
def leaderboard(tmp_path, monkeypatch):
    """The script, which reads and writes in a folder of its own."""
    monkeypatch.setattr(sys, 'path', [str(REPOSITORY / 'benchmarks'), *sys.path])
    spec = importlib.util.spec_from_file_location('leaderboard', REPOSITORY / 'benchmarks/leaderboard.py')
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, 'FILE', tmp_path / 'leaderboard.csv')
    monkeypatch.setattr(script, 'PAGE', tmp_path / 'leaderboard.md')
    return script


def write_made_run(folder, seed: int, recalls: list[float], made: dict | None = None, **settings) -> str:
    """Write the statistics of a run; returns the path of the file."""
    file = write_run(folder, f'run{seed}', recalls, **{**SETTINGS, 'seed': seed, **settings})
    pd.read_csv(file).assign(**{**MADE, **(made or {})}).to_csv(file, index=False)
    return str(file)


def call(script, monkeypatch, *files) -> list[dict]:
    """Call the script with files, and return the rows of its CSV."""
    monkeypatch.setattr(sys, 'argv', ['leaderboard.py', *files])
    script.main()
    return script.read_csv(script.FILE)


def test_seeds_of_one_command_are_one_row_with_the_mean_of_their_last_epochs(leaderboard, tmp_path, monkeypatch):
    recalls = {1: [90.0, 60.0], 2: [10.0, 63.0], 3: [10.0, 64.5]}
    [row] = call(leaderboard, monkeypatch, *(write_made_run(tmp_path, *run) for run in recalls.items()))
    last = np.array([60.0, 63.0, 64.5])
    half = 4.302652729911275 * last.std(ddof=1) / np.sqrt(3)  # Student's t for 2 degrees of freedom
    assert (row['R@1'], row['R@1_half'], row['MAP@R']) == (f'{last.mean():.2f}', f'{half:.2f}', '12.50')
    assert (row['seeds'], row['hours'], row['hardware']) == ('1 2 3', '1.00', 'Some CPU, 2 cores')
    page = leaderboard.PAGE.read_text()
    assert '### car, split abababababab\n\ntrain: 20 of 4 classes, test: 9 of 3 classes.\n' in page
    assert f'| proxy_anchor | resnet18 | 128 | 2 | no | 1 2 3 | {last.mean():.2f} ± {half:.2f} | 12.50 |' in page


def test_the_hardware_and_the_commits_of_all_seeds_are_named(leaderboard, tmp_path, monkeypatch):
    other = {'made.device': 'Some GPU', 'made.commit': 'd' * 40, 'made.changed_since': 'yes'}
    [row] = call(leaderboard, monkeypatch, write_made_run(tmp_path, 1, [50.0]),
                 write_made_run(tmp_path, 2, [50.0], other))
    assert row['hardware'] == 'Some CPU, 2 cores, Some GPU'
    assert row['commit'] == f'{"c" * 12}, {"d" * 12}+'


def test_a_remark_stands_behind_the_recipe_unless_it_is_its_name(leaderboard, tmp_path, monkeypatch):
    for index, remark in enumerate(('frozen', 'proxy_anchor', '')):
        rows = call(leaderboard, monkeypatch, write_made_run(
            tmp_path, 1, [50.0 - index], {'made.command': f'python train.py --lr {index}'}, remark=remark))
    assert [row['recipe'] for row in rows] == ['proxy_anchor (frozen)', 'proxy_anchor', 'proxy_anchor']


def test_a_row_replaces_that_of_the_same_command_and_split_alone(leaderboard, tmp_path, monkeypatch):
    call(leaderboard, monkeypatch, write_made_run(tmp_path, 1, [50.0]))
    call(leaderboard, monkeypatch, write_made_run(tmp_path, 2, [70.0], {'made.command': 'python train.py --lr 1'}))
    call(leaderboard, monkeypatch, write_made_run(tmp_path, 3, [40.0], {'made.split': 'cd' * 32}))
    rows = call(leaderboard, monkeypatch, write_made_run(tmp_path, 4, [60.0]))
    assert [(row['split'][:2], row['R@1'], row['seeds']) for row in rows] == [
        ('ab', '70.00', '2'), ('ab', '60.00', '4'), ('cd', '40.00', '3')]  # best first within a split


def test_a_run_on_a_complete_data_set_fills_its_section(leaderboard, tmp_path, monkeypatch):
    (train_classes, train_images), (test_classes, test_images) = RAW_SETS['cub'].counts.values()
    images = f'train: {train_images:,} of {train_classes:,} classes, test: {test_images:,} of {test_classes:,} classes'
    call(leaderboard, monkeypatch, write_made_run(tmp_path, 1, [66.0], {'made.images': images}, data_name='cub'))
    page = leaderboard.PAGE.read_text()
    section = page.split('### cub')[1].split('###')[0]
    assert '| 66.00 |' in section
    assert page.count('No run yet') == len(RAW_SETS) - 1


@pytest.mark.parametrize(('made', 'settings', 'message'), [
    ({'made.split': None}, {}, 'made.split is missing; train this run with the present version'),
    ({'made.seen_test_classes': 2}, {}, 'measured on classes that it was trained on'),
    ({}, {'num_epochs': 9}, '2 of 9 epochs; finish this run with --resume'),
    ({}, {'val_ratio': 0.2}, r'trained on a part of the classes \(--val_ratio\)'),
    ({}, {'init': 'x_model.pth'}, r'started from another run \(--init\)')])
def test_a_run_that_cannot_be_compared_is_refused_and_nothing_is_written(leaderboard, tmp_path, monkeypatch, made,
                                                                        settings, message):
    file = write_made_run(tmp_path, 1, [50.0, 60.0], made, **settings)
    with pytest.raises(UserError, match=message):
        call(leaderboard, monkeypatch, file)
    assert not leaderboard.FILE.exists()


def test_code_that_was_changed_is_marked_and_a_seed_counts_once(leaderboard, tmp_path, monkeypatch):
    file = write_made_run(tmp_path, 1, [50.0], {'made.changed_since': 'yes'})
    [row] = call(leaderboard, monkeypatch, file)
    assert row['commit'] == 'c' * 12 + '+'
    again = write_run(tmp_path, 'copy', [50.0], **{**SETTINGS, 'seed': 1})
    pd.read_csv(again).assign(**MADE).to_csv(again, index=False)
    with pytest.raises(UserError, match='the same seed is named twice'):
        call(leaderboard, monkeypatch, file, str(again))


def test_the_committed_page_is_made_of_the_committed_rows(leaderboard):
    rows = leaderboard.read_csv(REPOSITORY / 'results/leaderboard.csv')
    assert leaderboard.format_page(rows) == (REPOSITORY / 'docs/leaderboard.md').read_text(encoding='utf-8')
