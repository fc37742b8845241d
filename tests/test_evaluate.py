"""evaluate.py: the numbers of a data base, of a model, and of a pretrained backbone, and what --save writes."""
import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import call_main
from faults import BACKBONE
from raw_trees import make_own, write_image

import data_utils
import evaluate
import report
from common.errors import UserError
from common.files import load, save
from common.images import load_image
from evaluate import get_args
from imagedata.loading import make_transform
from model import EmbeddingNet, NetConfig
from retrieval.database import load_data_base
from retrieval.model_file import load_model

NAME = 'car_timm-test_resnet_balanced_proxy_16'


@pytest.fixture
def evaluate_as_json(call_script):
    """Call evaluate.py with --json; returns what it measured."""
    def call(*words) -> dict:
        return json.loads(call_script(evaluate, *words, '--num_workers', 0, '--json'))
    return call


@pytest.fixture(scope='module')
def weights(tmp_path_factory) -> Path:
    """A file with weights of a backbone, which pass for pretrained ones."""
    file = tmp_path_factory.mktemp('weights') / 'w.pth'
    torch.manual_seed(3)
    torch.save(EmbeddingNet(NetConfig(BACKBONE, 4), 'none').backbone.network.state_dict(), file)
    return file


# ---------------------------------------------------- command line ------------------------------------------------
def test_the_evaluation_command_that_proxy_anchor_publishes_means_a_model():
    words = '--gpu-id 0 --batch-size 120 --model bn_inception --embedding-size 512 --dataset cub --resume best.pth'
    args = get_args(words.split())
    assert (args.model, args.backbone_type, args.data_name) == ('best.pth', 'bn_inception', 'cub')
    assert (args.batch_size, args.feature_dim) == (120, 512)
    assert args.device in ('cpu', 'cuda:0')


@pytest.mark.parametrize(('words', 'parts'), [
    ((), ('choose one of', 'none')),
    (('--pretrained', '--data_base', 'x'), ('--data_base and --pretrained',)),
    (('--data_base', 'x', '--weights', 'none'), ('--weights none has no effect with --data_base',)),
    (('--data_base', 'x', '--flip_tta', '1'), ('--flip_tta True has no effect with --data_base',)),
    (('--data_base', 'x', '--save'), ('--save has no effect',)),
    (('--model', 'x', '--overwrite'), ('--overwrite has no effect without --save',)),
    (('--model', 'x', '--resume', 'y'), ('--model x and --resume y both name a model',)),
    (('--model', 'resnet50', '--backbone_type', 'resnet18', '--resume', 'y'), ('both name a backbone',)),
    (('--pretrained', '--feature_dim', '9', '--whiten', 'off'), ('--feature_dim 9 has no effect with --whiten off',)),
    (('--model', 'x', '--whiten', 'train'), ('--whiten train has no effect with --model',)),
    (('--pretrained', '--batch_size', '0'), ('--batch_size 0 must lie between 1',)),
    (('--pretrained', '--num_workers', '-1'), ('--num_workers -1',)),
    (('--pretrained', '--image_size', '0'), ('--image_size 0',)),
    (('--pretrained', '--resize_size', '8'), ('--resize_size 8',)),
    (('--pretrained', '--recalls', '2,1'), ('--recalls', 'ascending')),
    (('--pretrained', '--data_nam', 'cub'), ("did you mean '--data_name'",))])
def test_a_command_line_that_cannot_be_meant_is_an_error(words, parts):
    with pytest.raises(UserError) as error:
        get_args(list(words))
    assert '\n' not in str(error.value)
    assert all(part in str(error.value) for part in parts), error.value


def test_a_data_base_is_found_by_its_bare_name(trained_run, call_script):
    printed = call_script(evaluate, '--data_base', f'{NAME}_data_base.pth', '--results_dir', trained_run)
    assert 'car, uncropped: 12 queries of 3 test classes' in printed
    with pytest.raises(UserError, match=f"did you mean '{NAME}_data_base.pth'"):
        call_script(evaluate, '--data_base', f'{NAME}_data_bas.pth', '--results_dir', trained_run)


# ---------------------------------------------------- numbers -----------------------------------------------------
@pytest.mark.parametrize('source', ['--data_base', '--model', '--resume'])
def test_evaluation_gives_the_numbers_of_the_training_to_the_last_digit(trained_run, raw_sets, evaluate_as_json,
                                                                       call_script, source):
    row = pd.read_csv(trained_run / f'{NAME}_statistics.csv', dtype=str).iloc[-1]
    if source == '--data_base':
        printed = call_script(evaluate, source, trained_run / f'{NAME}_data_base.pth', '--json')
        measured = json.loads(printed)
    else:
        measured = evaluate_as_json(source, trained_run / f'{NAME}_model.pth', '--data_path', raw_sets)
    assert measured['made_by']['epoch'] == int(row['epoch']) == 1
    for kind in ('dense', 'binary'):
        for name in ('R@1', 'R@2', 'MAP@R', 'R-precision'):
            assert measured[kind][name] == float(row[f'{kind}_{name}'])


def test_what_was_measured_stands_in_table_json_and_data_base(trained_run, raw_sets, tmp_path, call_script,
                                                             evaluate_as_json):
    for label in 'uvw':
        for number in range(3):
            subset = 'train' if label == 'u' else 'test'
            write_image(tmp_path / 'other' / subset / label / f'{number}.jpg', ord(label), number)
    call_main(data_utils, '--data_path', tmp_path, '--data_name', 'other')
    words = ('--model', trained_run / f'{NAME}_model.pth', '--data_path', tmp_path, '--data_name', 'other')
    printed = call_script(evaluate, *words, '--num_workers', 0, '--save', '--results_dir', tmp_path)
    assert 'other, uncropped: 6 queries of 2 test classes' in printed
    assert evaluate_as_json(*words)['measured_on'] == {
        'data_name': 'other', 'crop_type': 'uncropped', 'flip_tta': False, 'image_size': 32, 'resize_size': 36,
        'classes': 2, 'seen_classes': 0}
    data_base = load_data_base(tmp_path / f'{NAME}_on_other_data_base.pth')
    settings = data_base.origin['args']
    assert (settings['data_name'], settings['trained_on']) == ('other', 'car')
    assert set(data_base.class_names) == {'v', 'w'}
    assert load_model(tmp_path / f'{NAME}_on_other_model.pth')[1]['args'] == settings


def test_a_table_says_how_the_model_was_made(trained_run, call_script):
    printed = call_script(evaluate, '--data_base', trained_run / f'{NAME}_data_base.pth')
    assert f'{NAME}: recipe balanced_proxy, seed 0, epoch 1; code ' in printed
    assert f'torch {torch.__version__}' in printed


def test_a_data_base_of_a_stranger_may_say_anything_of_its_making(trained_run, tmp_path, call_script):
    data_base = load(trained_run / f'{NAME}_data_base.pth', 'data base')
    for made_with in ([1], 'x', None, {'commit': [1], 'changed_since': [2]}):
        save({**data_base, 'made_with': made_with, 'epoch': torch.zeros(2)}, tmp_path / 'd.pth')
        for words in ((), ('--json',)):
            assert call_script(evaluate, '--data_base', tmp_path / 'd.pth', *words)


# ---------------------------------------------------- classes that were trained on --------------------------------
def test_a_model_is_not_measured_on_classes_that_it_was_trained_on(run, tmp_path, call_script, evaluate_as_json):
    make_own(tmp_path, images=3)
    call_main(data_utils, '--data_path', tmp_path, '--data_name', 'mine')
    split = load(tmp_path / 'mine/uncropped_data_dicts.pth', 'split file')
    model = load(run / f'{NAME}_model.pth', 'model')
    save({**model, 'seen_classes': ['elsewhere', *list(split['test'])[:2]]}, run / 'seen_model.pth')
    words = ('--model', run / 'seen_model.pth', '--data_path', tmp_path, '--data_name', 'mine')
    with pytest.raises(UserError, match='2 of 3 test classes were trained on, the first: .*--allow_seen'):
        call_script(evaluate, *words, '--num_workers', 0)
    printed = call_script(evaluate, *words, '--num_workers', 0, '--allow_seen')
    assert 'NOT on unseen classes: 2 of them were trained on' in printed
    assert evaluate_as_json(*words, '--allow_seen')['measured_on']['seen_classes'] == 2


# ---------------------------------------------------- pretrained backbones ----------------------------------------
@pytest.fixture
def pretrained(raw_sets, weights):
    """The words that measure a pretrained backbone on CUB-200-2011."""
    return ('--pretrained', '--data_path', raw_sets, '--data_name', 'cub', '--backbone_type', BACKBONE, '--weights',
            weights, '--image_size', 32, '--resize_size', 0, '--recalls', '1,2')


@pytest.mark.parametrize('whiten', ['test', 'train', 'off'])
def test_a_pretrained_backbone_is_measured_alone_and_whitened_without_labels(
        pretrained, raw_sets, weights, evaluate_as_json, monkeypatch, whiten):
    from retrieval.embedding import embed_images
    from retrieval.metrics import retrieval_metrics
    from retrieval.pretrained import build_pretrained

    fitted = []
    monkeypatch.setattr('retrieval.pretrained.FEWEST_IMAGES', 3)
    monkeypatch.setattr(evaluate, 'fit_whitening', lambda model, features, dim, fit=evaluate.fit_whitening:
                        fitted.append(features) or fit(model, features, dim))
    measured = evaluate_as_json(*pretrained, '--whiten', whiten, '--amp', 'off')
    model = build_pretrained(BACKBONE, str(weights), 32, None, torch.device('cpu'))
    run = {'args': {'resize_size': 0, 'amp': 'off'}}
    split = load(raw_sets / 'cub/uncropped_data_dicts.pth', 'split file')
    files = {side: [raw_sets / 'cub' / path for paths in split[side].values() for path in paths] for side in split}
    labels = torch.tensor([label for label, paths in enumerate(split['test'].values()) for _ in paths])
    alone = retrieval_metrics(embed_images(model, files['test'], run), labels, recalls=(1, 2))
    if whiten == 'off':
        assert measured.keys() == {'dense', 'binary', 'open_set', 'measured_on'}
        assert measured['dense'] == pytest.approx(alone)
        return
    assert measured['backbone'] == pytest.approx(alone)
    transform = make_transform(False, 32, 0, model.interpolation)
    with torch.no_grad():
        features = model.compute_features(torch.stack([transform(load_image(file)) for file in files[whiten]]))
    directions = [torch.nn.functional.normalize(values, dim=1) for values in (features, fitted[0])]
    torch.testing.assert_close(*directions, atol=1e-4, rtol=0)  # of the images that --whiten names
    model.add_whitening(features, min(512, model.num_features))
    whitened = retrieval_metrics(embed_images(model, files['test'], run), labels, recalls=(1, 2))
    assert measured['dense'] == pytest.approx(whitened)


def test_a_pretrained_backbone_is_saved_and_measured_again(pretrained, tmp_path, raw_sets, call_script):
    first = call_script(evaluate, *pretrained, '--num_workers', 0, '--save', '--results_dir', tmp_path)
    (data_base,) = tmp_path.glob('cub_timm-test_resnet_*_pretrained_data_base.pth')
    model = Path(str(data_base).replace('data_base', 'model'))
    assert f'python test.py --data_base {data_base} --data_path {raw_sets} --query_img_name uncropped/' in first
    for words in (('--data_base', data_base), ('--model', model, '--data_path', raw_sets, '--num_workers', 0)):
        again = call_script(evaluate, *words)
        assert again.splitlines()[1] in first.splitlines()
        assert 'not trained' in again
    printed = call_script(evaluate, '--model', model, '--data_path', raw_sets, '--num_workers', 0, '--save',
                          '--results_dir', tmp_path / 'again', '--json')
    assert json.loads(printed)['measured_on']['data_name'] == 'cub'
    (saved,) = (tmp_path / 'again').glob('*_data_base.pth')
    assert load_data_base(saved).origin['args']['pretrained'] is True
    with pytest.raises(UserError, match='--save: .*pretrained_model.pth is there already; add --overwrite'):
        call_script(evaluate, *pretrained, '--num_workers', 0, '--save', '--results_dir', tmp_path)
    call_script(evaluate, *pretrained, '--num_workers', 0, '--save', '--overwrite', '--results_dir', tmp_path)


@pytest.mark.slow
def test_a_pretrained_backbone_is_searched_reported_and_exported(pretrained, tmp_path, raw_sets, call_script):
    import export
    from test_test_script import test_script

    call_script(evaluate, *pretrained, '--num_workers', 0, '--save', '--results_dir', tmp_path)
    (data_base,) = tmp_path.glob('*_pretrained_data_base.pth')
    foreign = shutil.copy(raw_sets / 'car/uncropped/000001.jpg', tmp_path / 'foreign.jpg')
    for query in (load_data_base(data_base).test.images[0], foreign):
        call_script(test_script, '--data_base', data_base, '--data_path', raw_sets, '--results_dir', tmp_path,
                    '--retrieval_num', 3, '--query_img_name', query)
    call_script(report, '--data_base', data_base, '--data_path', raw_sets)
    call_script(export, '--model', str(data_base).replace('data_base', 'model'), '--data_path', raw_sets, '--folder',
                tmp_path / 'hub')
    card = ' '.join((tmp_path / 'hub/README.md').read_text().split())
    assert 'of its weights `w.pth`' in card  # the folder is nobody's business
    assert re.search(r'resized to 32 x 32 px \(\w+\) without keeping their proportions', card)
    assert 'recipe' not in card


# ---------------------------------------------------- files that are something else -------------------------------
def test_files_that_are_something_else_are_refused(run, raw_sets, tmp_path, call_script):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath('executed').touch, ())

    model, data_base = run / f'{NAME}_model.pth', run / f'{NAME}_data_base.pth'
    (tmp_path / 'short.pth').write_bytes(data_base.read_bytes()[:2000])
    torch.save({'test_images': Evil()}, tmp_path / 'evil.pth')
    save({**load(data_base, 'file'), 'test_labels': torch.zeros(3, dtype=torch.int64)}, tmp_path / 'uneven.pth')
    save({**load(data_base, 'file'), 'test_features': 3 * load_data_base(data_base).test.features},
         tmp_path / 'long.pth')
    save({**load(model, 'file'), 'config': {**load(model, 'file')['config'], 'backbone_type': 'resnet50'}},
         tmp_path / 'other.pth')
    for words, part in ((('--data_base', model), 'is not a data base of this project: it lacks test_images'),
                        (('--model', data_base), 'is not a model of this project'),
                        (('--data_base', tmp_path / 'short.pth'), 'is corrupt'),
                        (('--data_base', tmp_path / 'evil.pth'), 'evil.pth cannot be read'),
                        (('--data_base', tmp_path / 'uneven.pth'), 'not a valid data base: test_labels cannot be'),
                        (('--data_base', tmp_path / 'long.pth'), 'the test features are not unit rows'),
                        (('--model', tmp_path / 'other.pth', '--data_path', raw_sets), 'does not fit its own'),
                        (('--resume', model, '--model', 'resnet50', '--data_path', raw_sets), 'is not that of')):
        with pytest.raises(UserError, match=part):
            call_script(evaluate, *words)
    assert not (tmp_path / 'executed').exists()
