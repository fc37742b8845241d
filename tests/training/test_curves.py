"""The curves of one run show its statistics."""
import pandas as pd
import pytest
from made_runs import points_of, write_run

from common.errors import UserError
from training import curves


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Draw the curves of a run whose R@1 takes these values; returns the axes of loss, accuracy, rates and R@1."""
    from matplotlib import pyplot

    kept = []
    monkeypatch.setattr(curves, 'save_figure', lambda figure, target: kept.append(figure))

    def call(recalls, **columns):
        table = pd.read_csv(write_run(tmp_path, 'run', recalls)).assign(**columns)
        curves.draw_curves(table, tmp_path / 'curves.png', 'a run')
        return kept[-1].axes

    yield call
    for figure in kept:
        pyplot.close(figure)


def test_curves_show_the_statistics_and_mark_the_best_epoch(draw):
    loss, accuracy, rate, recall = draw([10.0, 30.0, 20.0])
    assert points_of(loss)['dense'] == [(1, 5.0), (2, 2.5), (3, 5 / 3)]
    assert points_of(accuracy)['dense'] == [(1, 10.0), (2, 20.0), (3, 30.0)]
    assert points_of(rate) == {'network': [(1, 1e-4), (2, 1e-4), (3, 1e-4)],
                               'proxies': [(1, 1e-2), (2, 1e-2), (3, 1e-2)]}
    assert points_of(recall) == {'dense': [(1, 10.0), (2, 30.0), (3, 20.0)],
                                 'binary': [(1, 5.0), (2, 15.0), (3, 10.0)], 'best: epoch 2, 30.0 %': [(2, 30.0)]}


def test_the_marked_epoch_is_the_one_chosen_on_held_out_classes(draw):
    recall = draw([10.0, 30.0, 20.0], **{'val_dense_R@1': [60.0, 50.0, 70.0]})[3]
    assert points_of(recall)['chosen: epoch 3, 20.0 %'] == [(3, 20.0)]
    assert points_of(recall)['held-out classes'] == [(1, 60.0), (2, 50.0), (3, 70.0)]


def test_epochs_after_which_nothing_was_measured_have_no_point(draw):
    loss, _, _, recall = draw([float('nan'), 30.0, float('nan'), 20.0])
    assert [x for x, _ in points_of(loss)['dense']] == [1, 2, 3, 4]
    assert points_of(recall) == {'dense': [(2, 30.0), (4, 20.0)], 'binary': [(2, 15.0), (4, 10.0)],
                                 'best: epoch 2, 30.0 %': [(2, 30.0)]}


def test_the_pretrained_backbone_is_a_line_in_the_panel_of_recall(draw):
    recall = draw([20.0, 30.0], **{'pretrained_R@1': 25.0})[3]
    assert {y for _, y in points_of(recall)['pretrained backbone']} == {25.0}


def test_moving_proxies_have_no_learning_rate_in_the_curves(draw):
    assert list(points_of(draw([20.0, 30.0], proxy_lr=0.0)[2])) == ['network']


def test_one_epoch_lies_inside_its_axis(draw):
    for axis in draw([20.0]):
        assert axis.get_xlim() == (0.5, 1.5)


@pytest.mark.parametrize(('column', 'message'), [('accuracy', '--metric accuracy is not in a run'),
                                                 ('dense_R@1', '--metric dense_R@1 is not in a run')])
def test_curves_need_their_four_metrics(tmp_path, column, message):
    table = pd.read_csv(write_run(tmp_path, 'run', [20.0])).drop(columns=column)
    with pytest.raises(UserError, match=message):
        curves.draw_curves(table, tmp_path / 'curves.png', 'a run')


def test_a_metric_that_is_not_there_is_answered_with_those_that_are():
    table = pd.DataFrame({'epoch': [1], 'loss': [2.0], 'dense_R@1': [3.0], 'args.seed': [4], 'name': ['x']})
    with pytest.raises(UserError, match=r"dense_R@2 is not in FILE; did you mean 'dense_R@1'\? "
                                        r'\(there are: loss, dense_R@1\)'):
        curves.check_metric(table, 'dense_R@2', 'FILE')


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_a_metric_that_is_empty_or_infinite_is_refused(value):
    with pytest.raises(UserError, match='FILE: loss is empty or infinite in some epochs'):
        curves.check_metric(pd.DataFrame({'epoch': [1, 2], 'loss': [2.0, value]}), 'loss', 'FILE')


@pytest.mark.parametrize(('metric', 'title'), [
    ('dense_R@2', 'R@2, dense (%)'), ('val_binary_R@1', 'R@1, binary, held-out classes (%)'),
    ('accuracy', 'training accuracy (%)'), ('silhouette', 'silhouette')])
def test_an_axis_is_named_after_what_it_shows(metric, title):
    assert curves.title_of(metric) == title
