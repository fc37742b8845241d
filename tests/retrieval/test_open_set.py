"""Open-set thresholds against their definition in loops, and where answers are marked."""
import importlib.util
import math
import shutil

import pytest
import torch
from conftest import REPOSITORY
from torch.nn import functional as F

import evaluate
from common.files import load, save
from retrieval import counting
from retrieval.database import load_data_base, open_set_threshold
from retrieval.metrics import OPEN_SET_RATES, measure_open_set, open_set_thresholds, similarity_of


def make_features(count: int, dim: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def thresholds_by_loops(features, labels, gallery, gallery_labels, rate: float) -> dict:
    """Search for each query among the images without its class, and among all, with loops in float64."""
    itself, absent_answers, right_answers = gallery is None, [], []
    if itself:
        gallery, gallery_labels = features, labels
    for query, label in enumerate(labels.tolist()):
        similarity = similarity_of(features[query][None], gallery)[0].tolist()
        others = [value for image, value in enumerate(similarity) if gallery_labels[image] != label]
        own = [value for image, value in enumerate(similarity) if gallery_labels[image] == label
               and not (itself and image == query)]
        absent_answers.append(max(others))
        if own and max(own) > max(others):
            right_answers.append(max(own))
    threshold = max(value for value in right_answers
                    if sum(answer < value for answer in right_answers) <= rate * len(right_answers))
    return {'rate': rate, 'threshold': threshold,
            'lost': 100 * sum(answer < threshold for answer in right_answers) / len(right_answers),
            'marked': 100 * sum(answer < threshold for answer in absent_answers) / len(absent_answers)}


@pytest.mark.parametrize('gallery', [False, True])
def test_thresholds_equal_those_of_leaving_out_each_class_in_turn(gallery, monkeypatch):
    monkeypatch.setattr(counting, 'tile_entries', lambda device: 300)
    labels = torch.arange(53) % 12
    labels[-1] = 12  # without another image
    features = F.normalize(make_features(53, 9, 0) + 1.5 * make_features(13, 9, 1)[labels], dim=1)
    features[40], features[50] = features[41], features[20]  # ties, of one class and of two
    others = (features[:30].roll(1, 1), labels[:30]) if gallery else (None, None)
    for row in measure_open_set(features, labels, *others, rates=(0.0, 0.05, 0.3, 0.999)):
        assert row == pytest.approx(thresholds_by_loops(features, labels, *others, row['rate']), abs=1e-12)
    assert [row['rate'] for row in measure_open_set(features, labels, *others)] == list(OPEN_SET_RATES)


def test_right_answers_that_tie_with_the_threshold_are_kept():
    positive = torch.tensor([0.9, 0.6, 0.6, 0.6, 0.2, -math.inf], dtype=torch.float64)
    negative = torch.tensor([0.5, 0.1, 0.1, 0.1, 0.3, 0.7], dtype=torch.float64)  # the fifth answer is wrong
    row = open_set_thresholds(positive, negative, (0.5,))[0]  # two of four may be lost, but three tie for it
    assert row == {'rate': 0.5, 'threshold': 0.6, 'lost': 0.0, 'marked': pytest.approx(100 * 5 / 6)}


def test_without_a_right_answer_there_is_no_threshold():
    assert measure_open_set(make_features(5, 3, 0), torch.zeros(5, dtype=torch.int64)) == []  # a single class
    assert open_set_thresholds(torch.tensor([0.1]), torch.tensor([0.2])) == []


def test_a_run_stores_its_thresholds_in_data_base_and_model_and_evaluate_prints_them(trained_run, call_script):
    file = next(trained_run.glob('*_data_base.pth'))
    data_base = load_data_base(file)
    expected = measure_open_set(*data_base.tensors())
    assert len(expected) == len(OPEN_SET_RATES)
    assert data_base.origin['open_set'] == expected == load(next(trained_run.glob('*_model.pth')), 'model')['open_set']
    printed = call_script(evaluate, '--data_base', file)
    for row in expected:
        assert (f'no close match below similarity {row["threshold"]:.4f}: {row["marked"]:.1f} % of the answers to '
                f'queries whose class is absent, {row["lost"]:.1f} % of the right answers') in printed


def test_evaluate_says_once_that_no_threshold_separates(trained_run, call_script, monkeypatch):
    file = next(trained_run.glob('*_data_base.pth'))
    for marked, is_said in ((9.9, True), (10.0, False)):
        rows = [{'rate': rate, 'threshold': 0.5, 'lost': 1.0, 'marked': marked} for rate in OPEN_SET_RATES]
        monkeypatch.setattr(evaluate, 'measure_open_set_of', lambda data_base, device, rows=rows: rows)
        assert call_script(evaluate, '--data_base', file).count('No threshold separates') == is_said


def load_test_script():
    spec = importlib.util.spec_from_file_location('retrieve', REPOSITORY / 'test.py')  # `test` is a standard package
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_a_photograph_from_elsewhere_is_marked_below_the_threshold_and_an_image_of_the_data_base_never(
        run, raw_sets, tmp_path, call_script):
    script, file = load_test_script(), next(run.glob('*_data_base.pth'))
    photograph = shutil.copy(raw_sets / 'cub/images/001.Some_Bird/Some_Bird_0001_1.jpg', tmp_path / 'bird.jpg')
    contents = load(file, 'data base')
    for threshold, is_marked in ((1.1, True), (-1.1, False)):
        save({**contents, 'open_set': [{'rate': 0.05, 'threshold': threshold, 'marked': 50.0}]}, file)
        for query, name, may_be_marked in ((photograph, 'bird.jpg (class unknown)', True),
                                           ('000014.jpg', '000014.jpg (Maker Model 99)', False)):
            printed = call_script(script, '--data_base', file, '--data_path', raw_sets, '--results_dir', tmp_path,
                                  '--query_img_name', query, '--retrieval_num', 3)
            assert (f'{name}: no close match' in printed) == (is_marked and may_be_marked)


@pytest.mark.parametrize('rows', [
    None, 3, {'rate': 0.05}, [3], [{'rate': 0.01}], [{'rate': 0.05, 'threshold': '1', 'marked': 50.0}],
    [{'rate': 0.05, 'threshold': 0.25}], [{'rate': 0.05, 'threshold': 0.25, 'marked': 'x'}]])
def test_a_file_from_elsewhere_may_hold_anything_as_its_thresholds(rows):
    assert open_set_threshold({'open_set': rows}) is None


def test_a_threshold_is_used_if_it_marks_absent_classes_twice_as_often_as_right_answers():
    for marked, threshold in ((10.0, 0.25), (9.9, None)):
        rows = [{'rate': 0.01, 'threshold': 0.1, 'marked': 50.0}, {'rate': 0.05, 'threshold': 0.25, 'marked': marked}]
        assert open_set_threshold({'open_set': rows}) == threshold
