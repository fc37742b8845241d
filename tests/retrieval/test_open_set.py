"""The similarity above which an answer can be trusted, against its definition in loops."""
import importlib.util
import math

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


def leave_out_each_class(features, labels, gallery, gallery_labels, rate: float) -> dict:
    """Search for each query among the images without its class; then among all, with loops in float64."""
    itself, answers, right, positives = gallery is None, [], [], []
    if itself:
        gallery, gallery_labels = features, labels
    for query, label in enumerate(labels.tolist()):
        similarity = similarity_of(features[query][None], gallery)[0].tolist()
        others = [value for image, value in enumerate(similarity) if gallery_labels[image] != label]
        own = [value for image, value in enumerate(similarity) if gallery_labels[image] == label
               and not (itself and image == query)]
        answers.append(max(others))
        positives.append(max(own) if own else None)
        right.append(bool(own) and max(own) > max(others))
    threshold = min(value for value in answers if sum(answer > value for answer in answers) <= rate * len(answers))
    found = [query for query, value in enumerate(positives) if value is not None]
    return {'rate': rate, 'threshold': threshold,
            'answered': 100 * sum(answer > threshold for answer in answers) / len(answers),
            'right': 100 * sum(right[query] for query in found) / len(found),
            'kept': 100 * sum(right[query] and positives[query] > threshold for query in found) / len(found)}


@pytest.mark.parametrize('pass_dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('gallery', [False, True])
def test_the_threshold_is_that_of_leaving_each_class_out_in_turn(gallery, pass_dtype, monkeypatch):
    monkeypatch.setattr(counting, 'bfloat16_is_fast', lambda device: pass_dtype == 'bfloat16')
    monkeypatch.setitem(counting.TILE_SIDE, 'cpu', 16)
    labels = torch.arange(53) % 12
    labels[-1] = 12  # without another image
    features = F.normalize(make_features(53, 9, 0) + 1.5 * make_features(13, 9, 1)[labels], dim=1)
    features[40], features[50] = features[41], features[20]  # ties, of one class and of two
    others = (features[:30].roll(1, 1), labels[:30]) if gallery else (None, None)
    for row in measure_open_set(features, labels, *others, rates=(0.0, 0.05, 0.3, 0.999)):
        assert row == pytest.approx(leave_out_each_class(features, labels, *others, row['rate']), abs=1e-12)
    assert [row['rate'] for row in measure_open_set(features, labels, *others)] == list(OPEN_SET_RATES)


def test_queries_that_tie_with_the_threshold_are_not_answered():
    negative = torch.tensor([0.9, 0.8, 0.8, 0.8, 0.5], dtype=torch.float64)
    positive = torch.tensor([0.95, 0.8, 0.85, -math.inf, 0.7], dtype=torch.float64)
    row = open_set_thresholds(positive, negative, (0.4,))[0]  # two of five may be answered, but three tie for it
    assert row == {'rate': 0.4, 'threshold': 0.8, 'answered': 20.0, 'right': 75.0, 'kept': 50.0}
    assert open_set_thresholds(positive, negative, (0.0,))[0]['answered'] == 0


def test_a_single_class_has_no_threshold():
    assert measure_open_set(make_features(5, 3, 0), torch.zeros(5, dtype=torch.int64)) == []


def test_a_run_stores_its_thresholds_in_data_base_and_model_and_evaluate_prints_them(trained_run, call_script):
    file = next(trained_run.glob('*_data_base.pth'))
    data_base = load_data_base(file)
    expected = measure_open_set(*data_base.tensors())
    assert len(expected) == len(OPEN_SET_RATES)
    assert data_base.origin['open_set'] == expected == load(next(trained_run.glob('*_model.pth')), 'model')['open_set']
    printed = call_script(evaluate, '--data_base', file)
    for row in expected:
        assert (f'class absent: {100 * row["rate"]:g} % answered above similarity {row["threshold"]:.4f}, which keeps '
                f'{row["kept"]:.1f} of {row["right"]:.1f} % right answers') in printed


def test_an_answer_below_the_threshold_is_marked(run, raw_sets, tmp_path, call_script):
    spec = importlib.util.spec_from_file_location('retrieve', REPOSITORY / 'test.py')  # `test` is a standard package
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    file = next(run.glob('*_data_base.pth'))
    contents = load(file, 'data base')
    for threshold, is_marked in ((0.99999, True), (-0.5, False)):
        save({**contents, 'open_set': [{'rate': 0.05, 'threshold': threshold}]}, file)
        printed = call_script(script, '--data_base', file, '--data_path', raw_sets, '--results_dir', tmp_path,
                              '--query_img_name', '000014.jpg', '--retrieval_num', 3)
        assert ('000014.jpg (Maker Model 99): probably not in the collection' in printed) == is_marked


@pytest.mark.parametrize('rows', [None, 3, {'rate': 0.05}, [3], [{'rate': 0.05, 'threshold': '1'}], [{'rate': 0.01}]])
def test_a_file_from_elsewhere_may_hold_anything_as_its_thresholds(rows):
    assert open_set_threshold({'open_set': rows}) is None
    assert open_set_threshold({'open_set': [{'rate': 0.05, 'threshold': 0.25}]}) == 0.25
