"""What a run reports: the best epoch, a collapse, its end, and the mean over several seeds."""
from types import SimpleNamespace

import pandas as pd
import pytest

from common.errors import UserError
from common.results import RunFiles
from training import summary
from training.options import parse_options


def rows_of(*recalls, **columns) -> list[dict]:
    """Return statistics whose R@1 takes these values."""
    return [{'epoch': epoch, 'dense_R@1': recall, 'binary_R@1': recall / 2, **columns}
            for epoch, recall in enumerate(recalls, start=1)]


# ---------------------------------------------------- time --------------------------------------------------------
@pytest.mark.parametrize(('seconds', 'text'), [
    (0.4, '0 s'), (59.4, '59 s'), (59.6, '1 min 0 s'), (185, '3 min 5 s'), (3599.7, '1 h 0 min'), (7630, '2 h 7 min')])
def test_durations_are_rounded_to_what_a_person_says(seconds, text):
    assert summary.format_seconds(seconds) == text


def test_the_progress_bar_says_how_long_the_whole_training_will_take():
    assert summary.epoch_title(1, 1, 4, 0.5) == 'epoch 1/4'
    assert summary.epoch_title(3, 1, 4, 120) == 'epoch 3/4, 2 min 0 s left'  # a minute each; two are left
    assert summary.epoch_title(3, 3, 4, 1) == 'epoch 3/4'  # resumed
    assert summary.epoch_title(4, 3, 4, 50) == 'epoch 4/4, 50 s left'


# ---------------------------------------------------- the best epoch ----------------------------------------------
def test_held_out_classes_choose_the_epoch_and_without_them_the_test_classes():
    rows = rows_of(50.0, 60.0, 90.0)
    assert summary.chosen_epoch(rows)['epoch'] == 3
    for row, held_out in zip(rows, (70.0, 80.0, 80.0), strict=True):
        row['val_dense_R@1'] = held_out
    assert summary.chosen_epoch(rows)['epoch'] == 2  # the first of equals


# ---------------------------------------------------- a collapse --------------------------------------------------
def collapse(accuracy: float, *words) -> None:
    """Check an epoch of a run with 40 classes for a collapse: 2.5 % is chance."""
    [options] = parse_options(['--recipe', 'asymptotic_proxy', '--momentum', '0.1', *words])
    row = {'epoch': 4, 'accuracy': accuracy, 'lr': 1e-4, 'proxy_lr': 0.0}
    summary.check_collapse(row, 40, options)


def test_an_accuracy_at_chance_stops_a_run_whose_proxies_move():
    with pytest.raises(UserError) as error:
        collapse(4.9)
    for part in ('an accuracy of 4.90 % in epoch 4 is chance for 40 classes', 'a learning rate of 0.0001;',
                 '--momentum nearer 0.5 than 0.1', '--proxy_update gradient', '--resume --on_collapse warn continues'):
        assert part in str(error.value)


def test_a_collapse_is_a_warning_where_it_is_asked_for_and_where_proxies_learn(capsys):
    collapse(4.9, '--on_collapse', 'warn')
    assert 'collapsed? an accuracy of 4.90 %' in capsys.readouterr().out
    [options] = parse_options([])
    summary.check_collapse({'epoch': 4, 'accuracy': 2.0, 'lr': 1e-4, 'proxy_lr': 0.01}, 98, options)
    printed = capsys.readouterr().out
    assert 'a learning rate of 0.0001 and 0.01 (proxies)' in printed
    assert '--momentum' not in printed


def test_an_accuracy_above_chance_is_no_collapse(capsys):
    collapse(5.0)
    assert capsys.readouterr().out == ''


# ---------------------------------------------------- the end -----------------------------------------------------
@pytest.mark.parametrize(('baseline', 'is_told'), [(60.5, True), (59.5, False), (None, False)])
def test_a_training_that_is_worse_than_the_pretrained_backbone_is_told(baseline, is_told, tmp_path, capsys):
    options = SimpleNamespace(val_ratio=0, recalls=(1,), data_path='data', results_dir='results', allow_seen=False)
    columns = {} if baseline is None else {'pretrained_R@1': baseline}
    summary.print_end(rows_of(60.0, 50.0, **columns), options, RunFiles(tmp_path, 'x'), 'a.jpg')
    printed = capsys.readouterr().out
    assert ('is better than every epoch of this training' in printed) == is_told
    assert not is_told or f'the pretrained backbone (R@1 {baseline:.2f})' in printed


def test_commands_at_the_end_hold_the_folders_of_the_run(tmp_path, capsys):
    options = SimpleNamespace(val_ratio=0, recalls=(1,), data_path='my data', results_dir='r', allow_seen=True)
    summary.print_end(rows_of(60.0), options, RunFiles(tmp_path, 'x'), 'a b.jpg')
    evaluate, retrieve = capsys.readouterr().out.splitlines()[-2:]
    assert evaluate == f'  python evaluate.py --data_base {tmp_path}/x_data_base.pth --allow_seen'
    assert retrieve == (f"  python test.py --data_base {tmp_path}/x_data_base.pth --data_path 'my data' --results_dir "
                        "r --query_img_name 'a b.jpg'")


# ---------------------------------------------------- several seeds -----------------------------------------------
def test_seeds_are_reported_with_mean_deviation_and_interval(tmp_path, capsys):
    runs = {seed: rows_of(best, last) for seed, best, last in ((4, 60.0, 50.0), (0, 55.0, 52.0), (9, 59.0, 57.0))}
    summary.report_seeds(runs, 'name', tmp_path)
    row = pd.read_csv(tmp_path / 'name_seeds.csv').set_index('epoch').loc['last']
    half = 4.302652729 * 13**0.5 / 3**0.5  # Student's t with two degrees of freedom, 95 %; the variance is 13
    assert (row['mean_R@1'], row['std_R@1'], row['seeds']) == (53, pytest.approx(13**0.5), '4 0 9')
    assert (row['low_R@1'], row['high_R@1']) == pytest.approx((53 - half, 53 + half))
    printed = capsys.readouterr().out
    assert '| name | last | 53.00 +- 3.61 | 44.04 to 61.96 |' in printed
    assert '| name | best on the test classes | 58.00 +- 2.65 |' in printed


def test_an_interval_of_per_cents_lies_between_0_and_100(tmp_path):
    summary.report_seeds({seed: rows_of(recall) for seed, recall in ((1, 40.0), (2, 90.0), (3, 99.0))}, 'name',
                         tmp_path)
    row = pd.read_csv(tmp_path / 'name_seeds.csv').set_index('epoch').loc['last']
    assert (row['low_R@1'], row['high_R@1']) == (0, 100)
