"""The scripts as a user types them: every system's command lines, a whole run, resuming, retrieval, bad input."""
import copy
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import ENVIRONMENT, REPOSITORY, assert_one_line_error, type_command
from engine import processes
from PIL import Image
from raw_trees import make_car, write_image

import evaluate
import train as train_script
from common.errors import UserError
from common.results import RunFiles
from model import make_loss
from training import summary
from training.options import parse_options

SMALL = ('--weights', 'none', '--image_size', 32, '--batch-size', 4, '--num_epochs', 1, '--warm_up', 0, '--recalls',
         '1,2', '--num_workers', 0, '--on_collapse', 'warn')
TINY = ('--backbone_type', 'resnet18', '--feature_dim', 16, *SMALL)  # for runs that test the rest
NAME = 'car_resnet18_balanced_proxy_16'


@pytest.fixture
def expect_refusal(monkeypatch):
    """Call a script's main in this process and check that it ends in a UserError of one line that holds all parts.

    The way from a UserError to exit code 2 is tested with real processes; this spares the start of one per case.
    """
    def check(script, words, *parts):
        monkeypatch.setattr(sys, 'argv', ['script.py', *map(str, words)])
        with pytest.raises(UserError) as error:
            script.main(*([] if script is evaluate else parse_options()))
        assert '\n' not in str(error.value)
        for part in parts:
            assert part in str(error.value)
    return check


def train(raw_sets, results, *words):
    return type_command('train.py', *words, '--data_path', raw_sets, '--results_dir', results)


def load(path):
    return torch.load(path, weights_only=True)



# ---------------------------------------------------- the papers' command lines --------------------------------------
ANCHOR = '--gpu-id 0 --loss Proxy_Anchor --model {} --embedding-size 512 --batch-size {} --lr {} --dataset {} ' \
         '--warm {} --bn-freeze {} --lr-decay-step {}'
PRINTED = [
    ('--data_name cub --backbone_type inception --feature_dim 256', 'cub_inception_balanced_proxy_256'),
    ('--feature_dim 1024', 'car_resnet50_balanced_proxy_1024'),
    ('--data_name cub --backbone_type inception --loss_name normalized_softmax',
     'cub_inception_normalized_softmax_512'),
    (ANCHOR.format('bn_inception', 180, '1e-4', 'cub', 1, 1, 10), 'cub_inception_proxy_anchor_512'),
    (ANCHOR.format('resnet50', 120, '1e-4', 'cub', 5, 1, 5), 'cub_resnet50_proxy_anchor_512'),
    (ANCHOR.format('bn_inception', 180, '1e-4', 'cars', 1, 1, 20), 'car_inception_proxy_anchor_512'),
    (ANCHOR.format('resnet50', 120, '1e-4', 'cars', 5, 1, 10), 'car_resnet50_proxy_anchor_512'),
    (ANCHOR.format('bn_inception', 180, '6e-4', 'SOP', 1, 0, 20) + ' --lr-decay-gamma 0.25',
     'sop_inception_proxy_anchor_512'),
    (ANCHOR.format('bn_inception', 180, '6e-4', 'Inshop', 1, 0, 20) + ' --lr-decay-gamma 0.25',
     'isc_inception_proxy_anchor_512'),
]


@pytest.mark.parametrize(('words', 'run'), PRINTED)
def test_the_printed_training_command_runs(raw_sets, tmp_path, words, run):
    result = train(raw_sets, tmp_path, *words.split(), *SMALL)
    assert result.returncode == 0, result.stderr
    files = ('checkpoint.pth', 'curves.pdf', 'curves.png', 'data_base.pth', 'model.pth', 'statistics.csv')
    assert sorted(path.name for path in tmp_path.iterdir()) == [f'{run}_{file}' for file in files]
    if run == 'cub_inception_proxy_anchor_512':  # Proxy Anchor's page evaluates this one
        words = '--gpu-id 0 --batch-size 120 --model bn_inception --embedding-size 512 --dataset cub --resume'
        result = type_command('evaluate.py', *words.split(), tmp_path / f'{run}_model.pth', '--data_path', raw_sets)
        assert result.returncode == 0, result.stderr
        assert re.search(r'^dense +\d', result.stdout, re.MULTILINE)


def test_a_printed_command_that_two_systems_share_says_what_to_add(raw_sets, tmp_path):
    result = train(raw_sets, tmp_path, '--momentum', '0.6', *SMALL)
    assert_one_line_error(result, '--momentum 0.6', '--recipe asymptotic_proxy', '--recipe momentum_proxy')


@pytest.mark.parametrize(('recipe', 'run'), [
    ('asymptotic_proxy', 'car_resnet50_asymptotic_proxy_512_m0.6'),
    ('momentum_proxy', 'car_resnet50_proxy_nca_512_momentum_proxy_m0.6')])
def test_with_the_recipe_it_trains(raw_sets, tmp_path, recipe, run):
    result = train(raw_sets, tmp_path, '--momentum', '0.6', '--recipe', recipe, *SMALL)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / f'{run}_model.pth').is_file()


def test_the_printed_retrieval_command_runs_after_the_default_training(raw_sets, tmp_path):
    assert train(raw_sets, tmp_path, *SMALL).returncode == 0
    result = type_command('test.py', '--retrieval_num', 10, '--data_path', raw_sets, '--results_dir', tmp_path)
    assert result.returncode == 0, result.stderr
    names = sorted(path.name for path in (tmp_path / '008055').iterdir())
    assert names[0] == 'query_img.jpg'
    assert len([name for name in names if re.fullmatch(r'retrieval_img_\d+_-?\d\.\d{4}\.jpg', name)]) == 10
    assert 'top10.png' in names


# ---------------------------------------------------- a run and what it leaves ---------------------------------------
@pytest.fixture(scope='module')
def run(raw_sets, tmp_path_factory):
    """Two epochs on car, and what they printed."""
    results = tmp_path_factory.mktemp('results')
    result = train(raw_sets, results, *TINY, '--num_epochs', 2)
    assert result.returncode == 0, result.stderr
    return results, result.stdout


def test_statistics_have_a_row_for_each_epoch(run):
    results, printed = run
    table = pd.read_csv(results / f'{NAME}_statistics.csv')
    assert table['epoch'].tolist() == [1, 2]
    columns = {'loss', 'accuracy', 'img_s', 'lr', 'proxy_lr', 'dense_R@1', 'dense_R@2', 'binary_R@1', 'dense_MAP@R'}
    assert columns <= set(table)
    for epoch in (1, 2):
        assert f'epoch {epoch}/2: loss {table["loss"][epoch - 1]:.4f}' in printed


def test_the_data_base_is_plain_and_complete(run):
    data_base = load(run[0] / f'{NAME}_data_base.pth')
    assert len(data_base['test_images']) == len(data_base['test_labels']) == 12
    assert data_base['test_features'].shape == (12, 16)
    assert data_base['train_proxies'].shape == (3, 16)
    assert data_base['class_names'] == ['Maker Model 99', 'Maker Model 100', 'Maker Model 196']
    assert data_base['args']['recipe'] == 'balanced_proxy'
    assert not any(str(value).startswith('/') for value in data_base['args'].values())


def test_the_end_names_best_and_last_epoch_and_commands_that_work(run):
    _, printed = run
    assert re.search(r'best epoch [12] .*R@1 \d', printed)
    assert re.search(r'last epoch 2: R@1 \d', printed)
    commands = re.findall(r'^  python (.*)$', printed, re.MULTILINE)
    assert [command.split()[0] for command in commands] == ['evaluate.py', 'test.py']
    for command in commands:
        result = type_command(*shlex.split(command))
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize('source', ['data_base', 'resume'])
def test_evaluation_gives_the_numbers_of_the_training_to_the_last_digit(run, raw_sets, source):
    results, _ = run
    table = pd.read_csv(results / f'{NAME}_statistics.csv', dtype=str).filter(regex='^(?!args|made)').map(float)
    best = table.loc[table['dense_R@1'].idxmax()]
    words = ('--data_base', results / f'{NAME}_data_base.pth') if source == 'data_base' else \
        ('--resume', results / f'{NAME}_model.pth', '--data_path', raw_sets, '--num_workers', 0)
    result = type_command('evaluate.py', *words, '--json')
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout)
    assert measured['made_by']['epoch'] == best['epoch']
    for kind in ('dense', 'binary'):
        metrics = measured[kind]
        for name in ('R@1', 'R@2', 'MAP@R', 'R-precision'):
            assert metrics[name] == best[f'{kind}_{name}']


@pytest.mark.parametrize('words', [('--num_workers', 0), ('--num_workers', 1), ('--num_workers', 4)])
def test_neither_time_nor_workers_change_a_run(run, raw_sets, tmp_path, words):
    assert train(raw_sets, tmp_path, *TINY, '--num_epochs', 2, *words).returncode == 0
    tables = [pd.read_csv(folder / f'{NAME}_statistics.csv').drop(columns='img_s') for folder in (run[0], tmp_path)]
    pd.testing.assert_frame_equal(*tables, check_exact=True)


def test_zero_shot_measures_a_bare_trunk(raw_sets, tmp_path):
    from model import EmbeddingNet, NetConfig
    torch.save(EmbeddingNet(NetConfig('resnet18', 4), 'none').trunk.state_dict(), tmp_path / 'w.pth')
    result = type_command('evaluate.py', '--zero_shot', '--data_path', raw_sets, '--data_name', 'isc',
                          '--backbone_type', 'resnet18', '--weights', tmp_path / 'w.pth', '--image_size', 32,
                          '--recalls', '1,2', '--json')
    assert result.returncode == 0, result.stderr
    metrics = json.loads(result.stdout)
    assert metrics.keys() == {'dense', 'absent', 'measured_on'}
    assert metrics['dense']['queries'] == 6


def test_a_run_name_is_never_taken_twice_in_silence(run, raw_sets, tmp_path):
    for file in run[0].glob(f'{NAME}_*'):
        shutil.copy(file, tmp_path)
    before = (tmp_path / f'{NAME}_model.pth').read_bytes()
    result = train(raw_sets, tmp_path, *TINY, '--num_epochs', 2)
    assert_one_line_error(result, NAME, '--resume', '--remark', '--overwrite')
    assert (tmp_path / f'{NAME}_model.pth').read_bytes() == before
    assert train(raw_sets, tmp_path, *TINY, '--num_epochs', 2, '--remark', 'b').returncode == 0
    assert train(raw_sets, tmp_path, *TINY, '--num_epochs', 1, '--overwrite').returncode == 0
    assert len(pd.read_csv(tmp_path / f'{NAME}_statistics.csv')) == 1


def test_resume_names_the_settings_that_differ(run, raw_sets, tmp_path):
    for file in run[0].glob(f'{NAME}_*'):
        shutil.copy(file, tmp_path)
    result = train(raw_sets, tmp_path, *TINY, '--num_epochs', 2, '--lr', '0.5', '--resume')
    assert_one_line_error(result, '--lr 0.5 (was 0.0001)')
    result = train(raw_sets, tmp_path, *TINY, '--num_epochs', 2, '--recalls', '1,3', '--resume')
    assert_one_line_error(result, '--recalls (1, 3) (was (')
    result = train(raw_sets, tmp_path, *TINY, '--remark', 'new', '--resume')
    assert_one_line_error(result, '--resume: there is no')


# ---------------------------------------------------- retrieval ------------------------------------------------------
def look_up(run, raw_sets, *words, results=None):
    return type_command('test.py', '--data_base', run[0] / f'{NAME}_data_base.pth', '--data_path', raw_sets,
                        '--results_dir', results or run[0], *words)


@pytest.mark.parametrize('query', ['uncropped/000014.jpg', '000014.jpg', '{0}/car/uncropped/000014.jpg',
                                   '{0}/../{1}/car/uncropped/000014.jpg'])
def test_a_query_is_found_by_path_name_or_absolute_path(run, raw_sets, tmp_path, query):
    query = query.format(raw_sets, raw_sets.name)
    result = look_up(run, raw_sets, '--query_img_name', query, '--retrieval_num', 3, results=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith('000014.jpg (Maker Model 99):')
    assert '000014.jpg' not in result.stdout.split('\n', 1)[1].split(str(tmp_path))[0]  # never its own neighbour


@pytest.mark.parametrize('binary', [False, True])
def test_retrieval_is_in_the_order_of_similarity(run, raw_sets, tmp_path, binary):
    words = ('--binary',) if binary else ()
    result = look_up(run, raw_sets, '--query_img_name', '000014.jpg', '--retrieval_num', 11, *words, results=tmp_path)
    assert result.returncode == 0, result.stderr
    data_base = load(run[0] / f'{NAME}_data_base.pth')
    features = data_base['test_features'].double()
    index = data_base['test_images'].index('uncropped/000014.jpg')
    scores = features @ features[index]
    if binary:
        scores = ((features >= 0) == (features[index] >= 0)).double().mean(1)
    record = json.loads((tmp_path / '000014/retrieval.json').read_text())['answers'][0]['retrieved']
    assert len(record) == 11
    expected = scores[torch.arange(12) != index].sort(descending=True).values.tolist()
    for found, score in zip(record, expected, strict=True):
        place = data_base['test_images'].index(found['image'])
        assert found['similarity'] == pytest.approx(score, abs=1e-6)
        assert found['similarity'] == pytest.approx(scores[place].item(), abs=1e-6)
        assert found['correct'] == (data_base['test_labels'][place] == data_base['test_labels'][index])


def test_frames_are_green_for_the_class_red_elsewhere_and_grey_where_unknown(run, raw_sets, tmp_path):
    outside = tmp_path / 'my photo.png'
    write_image(outside, 50, 1, 'L')
    result = look_up(run, raw_sets, '--query_img_name', '000014.jpg', outside, '--retrieval_num', 8, results=tmp_path)
    assert result.returncode == 0, result.stderr
    colours = {True: (0, 158, 115), False: (213, 94, 0), None: (153, 153, 153)}
    for folder in ('000014', 'my photo'):
        answer = json.loads((tmp_path / folder / 'retrieval.json').read_text())['answers'][0]
        assert (answer['class'] is None) == (folder == 'my photo')
        for rank, found in enumerate(answer['retrieved'], start=1):
            file = tmp_path / folder / f'retrieval_img_{rank}_{found["similarity"]:.4f}.jpg'
            with Image.open(file) as image:
                assert image.getpixel((2, image.height // 2)) == pytest.approx(colours[found['correct']], abs=12)
    with Image.open(tmp_path / '000014_and_1_more/top8.png') as both, Image.open(tmp_path / '000014/top8.png') as one:
        assert both.height > 1.8 * one.height  # a row each


def test_in_shop_retrieves_from_the_gallery(raw_sets, tmp_path):
    run_name = 'isc_resnet18_balanced_proxy_16'
    assert train(raw_sets, tmp_path, *TINY, '--data_name', 'isc').returncode == 0
    data_base = load(tmp_path / f'{run_name}_data_base.pth')
    assert data_base['gallery_features'].shape == (6, 16)
    query = data_base['test_images'][0]
    result = type_command('test.py', '--data_base', f'{run_name}_data_base.pth', '--data_path', raw_sets,
                          '--results_dir', tmp_path, '--query_img_name', query, '--retrieval_num', 6)
    assert result.returncode == 0, result.stderr
    answer = json.loads(next(tmp_path.glob('*/retrieval.json')).read_text())['answers'][0]
    assert {found['image'] for found in answer['retrieved']} == set(data_base['gallery_images'])


def test_only_files_that_it_wrote_are_replaced(run, raw_sets, tmp_path):
    words = ('--query_img_name', '000014.jpg', '--retrieval_num')
    assert look_up(run, raw_sets, *words, 5, results=tmp_path).returncode == 0
    (tmp_path / '000014/notes.txt').write_text('mine')
    assert look_up(run, raw_sets, *words, 2, results=tmp_path).returncode == 0
    names = sorted(path.name for path in (tmp_path / '000014').iterdir())
    assert len([name for name in names if name.startswith('retrieval_img')]) == 2
    assert 'notes.txt' in names
    assert 'top5.png' not in names
    (tmp_path / '000014/top4.png').write_text('mine too')
    assert_one_line_error(look_up(run, raw_sets, *words, 4, results=tmp_path), 'top4.png was not written by test.py')
    assert (tmp_path / '000014/top4.png').read_text() == 'mine too'


@pytest.mark.parametrize(('words', 'parts'), [
    (('--query_img_name', '000041.jpg'), ('neither an image', 'did you mean')),
    (('--query_img_name', 'a\nb'), ('--query_img_name a b is neither',)),
    (('--retrieval_num', 12), ('--retrieval_num 12', '11 images')), (('--retrieval_num', 0), ('at least 1',))])
def test_a_query_that_cannot_be_answered_is_one_line(run, raw_sets, words, parts):
    defaults = ('--query_img_name', '000014.jpg') if '--query_img_name' not in words else ()
    assert_one_line_error(look_up(run, raw_sets, *defaults, *words), *parts)


# ---------------------------------------------------- bad input ------------------------------------------------------
def test_a_run_that_cannot_start_leaves_the_old_one_alone(run, raw_sets, tmp_path):
    for file in run[0].glob(f'{NAME}_*'):
        shutil.copy(file, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    result = train(raw_sets, tmp_path, *TINY, '--overwrite', '--weights', 'nowhere.pth')
    assert_one_line_error(result, 'there is no weights file nowhere.pth')
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_resume_notices_that_the_data_set_changed(own_car, tmp_path):
    assert train(own_car, tmp_path / 'r', *TINY, '--num_epochs', 2).returncode == 0
    (own_car / 'car/car_ims/000001.jpg').unlink()
    assert type_command('data_utils.py', '--data_path', own_car, '--skip_bad').returncode == 0
    result = train(own_car, tmp_path / 'r', *TINY, '--num_epochs', 2, '--resume')
    assert_one_line_error(result, 'the data set car was converted anew')


def test_a_batch_of_one_image_is_refused_where_batchnorm_learns(raw_sets, tmp_path):
    result = train(raw_sets, tmp_path, *TINY, '--batch_size', 11, '--freeze_bn', 0)
    assert_one_line_error(result, '--batch_size 11 leaves a batch of one image', '--drop_last 1')
    result = train(raw_sets, tmp_path, *TINY, '--freeze_bn', 0, '--batch_size', 1)
    assert_one_line_error(result, '--batch_size 1 leaves a batch of one image', 'statistics; choose another size')
    assert train(raw_sets, tmp_path, *TINY, '--batch_size', 11, '--freeze_bn', 0, '--drop_last', 1).returncode == 0


@pytest.mark.parametrize(('words', 'processes', 'part'), [
    ((), 1, None), (('--batch_size', 11), 1, 'add --drop_last 1, or choose another size'),
    (('--batch_size', 4, '--images_per_class', 2), 8, '--batch_size 4 of 12 images leaves a batch with no image'),
    (('--batch_size', 10, '--images_per_class', 2), 4, None),
    (('--batch_size', 10, '--freeze_bn', 1), 3, '--batch_size 10 of 12 images leaves a batch with no image'),
    (('--batch_size', 10), 2, 'or of one in a process'), (('--batch_size', 10, '--drop_last', 1), 2, None),
    (('--batch_size', 4, '--images_per_class', 2), 4, 'no BatchNorm statistics; choose another size')])
def test_batches_too_small_for_the_processes_are_refused(monkeypatch, words, processes, part):
    _, [args] = parse_options(['--data_name', 'car', '--recalls', '1', '--freeze_bn', '0', *map(str, words)])
    monkeypatch.setattr(train_script, 'world_size', lambda: processes)
    split = {'train': {label: list('0123') for label in 'abc'}, 'test': {label: list('0123') for label in 'de'}}
    sampler = SimpleNamespace(drop_last=args.drop_last or args.images_per_class > 0)
    with pytest.raises(UserError, match=part) if part else nullcontext():
        train_script.check_data(args, split, torch.device('cpu'), sampler)


def test_one_test_class_is_refused_since_all_that_is_found_is_of_it():
    _, [args] = parse_options(['--data_name', 'car', '--recalls', '1'])
    split = {'train': {'a': ['0'] * 64, 'b': ['1']}, 'test': {'c': ['2', '3']}}
    with pytest.raises(UserError, match='--data_name car has one test class'):
        train_script.check_data(args, split, torch.device('cpu'), SimpleNamespace(drop_last=False))


@pytest.mark.parametrize('contents', ['tensor', 'list', 'numbers', 'nested'])
def test_weights_that_are_no_state_dict_are_refused(raw_sets, tmp_path, expect_refusal, contents):
    torch.save({'tensor': torch.zeros(3), 'list': [1], 'numbers': {1: torch.zeros(2)},
                'nested': {'state_dict': 5}}[contents], tmp_path / 'w.pth')
    words = (*TINY, '--weights', tmp_path / 'w.pth', '--data_path', raw_sets, '--results_dir', tmp_path / 'r')
    expect_refusal(train_script, words, 'w.pth holds no state dict')


@pytest.mark.parametrize(('words', 'part'), [
    (('--batch_size', 0), '--batch_size 0'), (('--num_workers', -1), '--num_workers -1'),
    (('--image_size', 0), '--image_size 0'), (('--resize_size', 8), '--resize_size 8')])
def test_evaluation_refuses_numbers_out_of_range(raw_sets, expect_refusal, words, part):
    expect_refusal(evaluate, ('--zero_shot', '--data_path', raw_sets, '--weights', 'nowhere.pth', *words), part)


def test_data_that_is_not_there_is_named(raw_sets, tmp_path):
    assert_one_line_error(train(tmp_path / 'no', tmp_path, *TINY), '--data_path', 'does not exist')
    make_car(tmp_path)
    assert_one_line_error(train(tmp_path, tmp_path, *TINY), 'not converted yet',
                          f'python data_utils.py --data_path {tmp_path} --data_name car')
    assert_one_line_error(train(raw_sets, tmp_path, *TINY, '--data_name', 'carr'), "did you mean 'car'")
    assert_one_line_error(train(raw_sets, tmp_path, *TINY, '--data_name', 'sop', '--crop_type', 'cropped'),
                          'has no bounding boxes')


def test_an_image_that_breaks_is_named_from_a_worker_too(own_car, tmp_path):
    image = own_car / 'car/uncropped/000003.jpg'
    data = image.read_bytes()
    image.unlink()
    for workers in (0, 2):
        result = train(own_car, tmp_path / f'r{workers}', *TINY, '--num_workers', workers)
        assert_one_line_error(result, '000003.jpg is missing or broken')
    image.write_bytes(data[:len(data) // 2])
    assert_one_line_error(train(own_car, tmp_path / 'r', *TINY), '000003.jpg is missing or broken')


@pytest.mark.parametrize(('words', 'parts'), [
    (('--batch_size', 13), ('--batch_size 13', '12 training images')),
    (('--batch_size', 5, '--images_per_class', 2), ('--batch_size 5 must be a multiple',)),
    (('--recalls', '1,12'), ('R@12 asks for more than the 11 images', '--recalls 1,2')),
    (('--device', 'cuda:9'), ('--device cuda:9', '--device cpu')), (('--device', 'tpu'), ("--device 'tpu'",)),
    (('--backbone_type', 'timm:resnet10t', '--weights', 'nowhere.pth'), ('there is no weights file nowhere.pth',)),
    (('--weights', REPOSITORY / 'README.md'), ('README.md cannot be read as a weights file',))])
def test_settings_that_do_not_fit_data_or_machine_are_one_line(raw_sets, tmp_path, expect_refusal, words, parts):
    expect_refusal(train_script, (*TINY, *words, '--data_path', raw_sets, '--results_dir', tmp_path), *parts)
    assert not list(tmp_path.glob('*statistics.csv'))


def test_a_results_folder_that_cannot_be_written_is_named(raw_sets, tmp_path):
    (tmp_path / 'file').write_text('')
    assert_one_line_error(train(raw_sets, tmp_path / 'file', *TINY), '--results_dir', 'cannot be written to')


def test_files_that_are_something_else_are_refused(run, raw_sets, tmp_path, expect_refusal):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath('executed').touch, ())
    model, data_base = run[0] / f'{NAME}_model.pth', run[0] / f'{NAME}_data_base.pth'
    (tmp_path / 'short.pth').write_bytes(data_base.read_bytes()[:2000])
    torch.save({'test_images': Evil()}, tmp_path / 'evil.pth')
    torch.save({**load(data_base), 'test_labels': torch.zeros(3, dtype=torch.int64)}, tmp_path / 'uneven.pth')
    config = {**load(model)['config'], 'backbone_type': 'resnet50'}
    torch.save({**load(model), 'config': config}, tmp_path / 'other.pth')
    for words, part in ((('--data_base', model), 'is no data base of this project: it lacks test_images'),
                        (('--resume', data_base), 'is no model of this project'),
                        (('--data_base', tmp_path / 'short.pth'), 'is corrupt'),
                        (('--data_base', tmp_path / 'evil.pth'), 'evil.pth cannot be read'),
                        (('--data_base', tmp_path / 'uneven.pth'), 'no sound data base: test_labels cannot be used'),
                        (('--resume', tmp_path / 'other.pth', '--data_path', raw_sets), 'does not fit its own'),
                        (('--data_base', data_base, '--weights', 'none'), '--weights none has no effect'),
                        (('--resume', model, '--model', 'resnet50', '--data_path', raw_sets), 'is not that of')):
        expect_refusal(evaluate, words, part)
    assert not (tmp_path / 'executed').exists()


@pytest.mark.parametrize('script', ['data_utils.py', 'train.py', 'evaluate.py', 'test.py', 'toy.py', 'plot.py',
                                    'report.py'])
def test_help_is_printed(script):
    result = type_command(script, '--help')
    assert result.returncode == 0
    assert ('--metric' if script == 'plot.py' else '--data_path') in result.stdout


def test_deterministic_algorithms_change_nothing_on_a_cpu(run, raw_sets, tmp_path):
    assert train(raw_sets, tmp_path, *TINY, '--num_epochs', 2, '--deterministic').returncode == 0
    one, other = (load(folder / f'{NAME}_model.pth')['state_dict'] for folder in (run[0], tmp_path))
    assert all(torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------- compiling -----------------------------------------------------
def test_compile_needs_a_compiler(raw_sets, tmp_path, monkeypatch, expect_refusal):
    monkeypatch.setenv('CXX', 'no-such-compiler')
    expect_refusal(train_script, ('--compile', *TINY, '--data_path', raw_sets, '--results_dir', tmp_path),
                   '--compile', 'g++')


def test_a_compiled_run_is_the_run(run, raw_sets, tmp_path):
    words = ('train.py', *TINY, '--num_epochs', 2, '--compile', '--data_path', raw_sets, '--results_dir', tmp_path)
    # Any program that is there passes for a compiler, since compiling, which takes a minute, is left out.
    environment = {**ENVIRONMENT, 'CXX': sys.executable, 'TORCHDYNAMO_DISABLE': '1'}
    result = subprocess.run([sys.executable, *map(str, words)], cwd=REPOSITORY, env=environment, capture_output=True,
                            text=True, check=False)
    assert result.returncode == 0, result.stderr
    ours, plain = (load(folder / f'{NAME}_model.pth')['state_dict'] for folder in (tmp_path, run[0]))
    assert ours.keys() == plain.keys()
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


def test_the_network_is_compiled_frozen_and_once_more_when_it_learns(raw_sets, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setenv('CXX', sys.executable)
    monkeypatch.setattr(torch, 'compile', lambda network: compiled.append(
        [parameter.requires_grad for parameter in network.trunk.parameters()]) or network)
    train_script.main(*parse_options([*map(str, (
        *TINY, '--backbone_type', 'timm:test_resnet', '--num_epochs', 3, '--warm_up', 1, '--compile', '--data_path',
        raw_sets, '--results_dir', tmp_path))]))
    assert [any(learns) for learns in compiled] == [False, True]


# ---------------------------------------------------- held out classes, seeds ---------------------------------------
@pytest.fixture(scope='module')
def seeds(tmp_path_factory):
    """Three seeds, the epochs chosen on two of four training classes, what was printed, and the data."""
    results, data = tmp_path_factory.mktemp('seeds'), tmp_path_factory.mktemp('data')
    make_car(data, classes=(1, 2, 3, 98, 99, 100, 196))
    assert type_command('data_utils.py', '--data_path', data, '--data_name', 'car').returncode == 0
    result = train(data, results, *TINY, '--num_epochs', 2, '--val_ratio', 0.5, '--seeds', '5,0,7')
    assert result.returncode == 0, result.stderr
    return results, result.stdout, data


@pytest.mark.parametrize(('floor', 'told'), [(60.5, True), (59.5, False), (None, False)])
def test_a_training_below_the_untouched_trunk_is_told(floor, told, tmp_path, capsys):
    rows = [{'epoch': epoch, 'dense_R@1': dense, 'binary_R@1': 40.0} | ({'pretrained_R@1': floor} if floor else {})
            for epoch, dense in ((1, 60.0), (2, 50.0))]
    args = SimpleNamespace(val_ratio=0, recalls=(1,), data_path='data', results_dir='results', allow_seen=False)
    summary.print_end(rows, args, RunFiles(tmp_path, 'x'), 'a.jpg')
    printed = capsys.readouterr().out
    assert ('is better than every epoch' in printed) == told
    assert not told or f'the pretrained_baseline trunk (R@1 {floor:.2f})' in printed


def test_mean_deviation_and_interval_over_seeds(tmp_path, capsys):
    runs = {seed: [{'epoch': 1, 'dense_R@1': best}, {'epoch': 2, 'dense_R@1': last}]
            for seed, best, last in ((4, 60.0, 50.0), (0, 55.0, 52.0), (9, 59.0, 57.0))}
    summary.report_seeds(runs, 'name', tmp_path)
    row = pd.read_csv(tmp_path / 'name_seeds.csv').set_index('epoch').loc['last']
    half = 4.302652729 * 13**0.5 / 3**0.5  # Student's t with two degrees of freedom, 95 %; the variance is 13
    assert (row['mean_R@1'], row['std_R@1'], row['seeds']) == (53, pytest.approx(13**0.5), '4 0 9')
    assert (row['low_R@1'], row['high_R@1']) == pytest.approx((53 - half, 53 + half))
    printed = capsys.readouterr().out
    assert '| name | last | 53.00 +- 3.61 | 44.04 to 61.96 |' in printed
    assert '| name | best on the test classes | 58.00 +- 2.65 |' in printed


def test_a_bar_becomes_lines_where_the_output_is_a_file(capsys):
    writer = processes.LineWriter()
    for state in ('\rembed:  10%|#         | 1/10', '\rembed:  20%|##        | 2/10', '\r' + ' ' * 30 + '\r'):
        writer.write(state)
    assert capsys.readouterr().err == 'embed:  10%|#         | 1/10\nembed:  20%|##        | 2/10\n'
    bar = processes.progress(range(3))
    assert list(bar) == [0, 1, 2]
    assert capsys.readouterr().err == ''  # it is over before half a minute


def test_an_interval_of_per_cents_lies_between_0_and_100(tmp_path):
    runs = {seed: [{'epoch': 1, 'dense_R@1': recall}] for seed, recall in ((1, 40.0), (2, 90.0), (3, 99.0))}
    summary.report_seeds(runs, 'name', tmp_path)
    row = pd.read_csv(tmp_path / 'name_seeds.csv').set_index('epoch').loc['last']
    assert (row['low_R@1'], row['high_R@1']) == (0, 100)


def test_seeds_are_trained_and_reported(seeds):
    results, printed, _ = seeds
    table = pd.read_csv(results / f'{NAME}_val0.5_seeds.csv').set_index('epoch')
    last = [pd.read_csv(results / f'{NAME}_val0.5{seed}_statistics.csv')['dense_R@1'].iloc[-1]
            for seed in ('_seed5', '', '_seed7')]
    assert table.loc['last', 'mean_R@1'] == pytest.approx(sum(last) / 3)
    assert f'| {NAME}_val0.5 | last | {sum(last) / 3:.2f} +- ' in printed
    assert set(table.index) == {'chosen on held out training classes', 'last', 'best on the test classes'}


def test_seeds_that_are_complete_are_kept_and_those_that_are_not_trained(seeds, tmp_path):
    results = tmp_path / 'r'
    shutil.copytree(seeds[0], results)
    for file in results.glob('*_seed7_*'):
        file.unlink()
    before = {file: file.read_bytes() for file in results.glob('*_seed5_model.pth')}
    words = (seeds[2], results, *TINY, '--num_epochs', 2, '--val_ratio', 0.5, '--seeds', '5,0,7', '--resume')
    result = train(*words)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count('epoch 1/2') == 1
    assert all(file.read_bytes() == data for file, data in before.items())
    tables = [pd.read_csv(folder / f'{NAME}_val0.5_seeds.csv') for folder in (seeds[0], results)]
    pd.testing.assert_frame_equal(*tables)
    (results / f'{NAME}_val0.5_seed5_checkpoint.pth').unlink()
    assert_one_line_error(train(*words), 'seed5_checkpoint.pth', '--overwrite')
    assert all(file.read_bytes() == data for file, data in before.items())


def test_held_out_classes_choose_the_epoch_and_are_not_trained_on(seeds):
    results, printed, _ = seeds
    table = pd.read_csv(results / f'{NAME}_val0.5_statistics.csv')
    data_base = load(results / f'{NAME}_val0.5_data_base.pth')
    assert data_base['epoch'] == table['epoch'][table['val_dense_R@1'].idxmax()]
    assert len(data_base['train_class_names']) == len(data_base['train_proxies']) == 2  # of 4
    assert printed.count('chosen on held out training classes: R@1') == 3
    assert '8 images of 2 classes' in printed


def test_held_out_classes_have_the_say_over_the_test_classes():
    rows = [{'epoch': epoch, 'dense_R@1': test, 'val_dense_R@1': val}
            for epoch, test, val in ((1, 50.0, 70.0), (2, 60.0, 80.0), (3, 90.0, 80.0))]
    assert summary.chosen_epoch(rows)['epoch'] == 2  # of equals the first
    assert summary.chosen_epoch([{key: row[key] for key in ('epoch', 'dense_R@1')} for row in rows])['epoch'] == 3


def test_a_share_of_the_classes_is_held_out():
    split = {'train': {str(label): [f'{label}_{number}.jpg' for number in range(3)] for label in range(10)}, 'test': {}}
    held = [dataset.hold_out(split, 0.3, seed) for seed in (0, 0, 1)]
    for parts in held:
        assert len(parts['val']) == 3
        assert parts['train'] | parts['val'] == split['train']
        assert not parts['train'].keys() & parts['val'].keys()
    assert held[0] == held[1]
    assert len(dataset.hold_out(split, 0.01, 0)['val']) == 2  # one class alone would always be found
    assert held[0] != held[2]
    with pytest.raises(UserError, match='--val_ratio 0.9 of 10 training classes'):
        dataset.hold_out(split, 0.9, 0)


@pytest.mark.parametrize(('words', 'part'), [
    (('--seeds', '1'), '--seeds'), (('--seeds', '1,1'), '--seeds'), (('--seeds', '1,2', '--seed', 3), 'contradict'),
    (('--val_ratio', 1), '--val_ratio 1'), (('--recalls', '2,4'), '--recalls 2,4 must begin with 1')])
def test_seeds_and_shares_that_make_no_sense_are_refused(tmp_path, expect_refusal, words, part):
    expect_refusal(train_script, ('--results_dir', tmp_path, *words), part)


def test_files_say_how_they_were_made(run, raw_sets):
    results, _ = run
    for kind in ('model', 'data_base', 'checkpoint'):
        made = load(results / f'{NAME}_{kind}.pth')['made_with']
        assert made['torch'] == str(torch.__version__)
        assert (made['device'], made['processes']) == ('cpu', 1)
        assert len(made['commit']) == 40 or made['commit'] == 'unknown'
    row = pd.read_csv(results / f'{NAME}_statistics.csv').iloc[0]
    assert (row['made.torch'], row['args.recipe'], row['args.seed']) == (str(torch.__version__), 'balanced_proxy', 0)
    result = type_command('evaluate.py', '--data_base', results / f'{NAME}_data_base.pth')
    assert f'{NAME}: recipe balanced_proxy, seed 0, epoch ' in result.stdout
    assert f'torch {torch.__version__}' in result.stdout


# ---------------------------------------------------- rates ---------------------------------------------------------
@pytest.mark.parametrize(('words', 'factors'), [
    (('--lr_schedule', 'step', '--lr_decay_step', 2, '--lr_decay_gamma', 0.25), [1, 1, 0.25, 0.25, 0.0625]),
    (('--lr_schedule', 'multistep', '--lr_milestones', '0.2,0.8', '--lr_decay_gamma', 0.1), [1, 0.1, 0.1, 0.1, 0.01]),
    (('--lr_schedule', 'cosine'), [(1 + math.cos(math.pi * epoch / 5)) / 2 for epoch in range(5)]),
    (('--lr_schedule', 'constant'), [1] * 5)])
def test_the_rates_of_network_and_proxies_follow_the_schedule(raw_sets, tmp_path, words, factors):
    result = train(raw_sets, tmp_path, *TINY, '--backbone_type', 'timm:test_resnet', '--num_epochs', 5, '--lr', 1e-3,
                   '--proxy_lr', 0.5, '--weight_decay', 0.25, *words)
    assert result.returncode == 0, result.stderr
    (file,) = tmp_path.glob('*_statistics.csv')
    table = pd.read_csv(file)
    assert table['lr'].tolist() == pytest.approx([1e-3 * factor for factor in factors])
    assert table['proxy_lr'].tolist() == pytest.approx([0.5 * factor for factor in factors])
    (file,) = tmp_path.glob('*_checkpoint.pth')
    assert [group['weight_decay'] for group in load(file)['optimizer']['param_groups']] == [0.25, 0.25]


class UnitLinear(torch.nn.Linear):
    """A network with unit rows, as losses want them."""

    def forward(self, images):
        return torch.nn.functional.normalize(super().forward(images), dim=-1)


@pytest.mark.parametrize('clip_value', [0.0, 1e-3])
def test_gradients_are_clipped_entry_by_entry(clip_value):
    torch.manual_seed(1)
    model = UnitLinear(3, 2, bias=False)
    criterion = make_loss('normalized_softmax', num_classes=4, feature_dim=2, scale=100.0)
    parameters = [*model.parameters(), *criterion.parameters()]
    before = [parameter.detach().clone() for parameter in parameters]
    batches = [(torch.tensor([[5.0, 0, 0], [0, -5.0, 1]]), torch.tensor([2, 0]))]
    learner = train_script.Learner(model, criterion, torch.optim.SGD(parameters, lr=1.0), torch.device('cpu'),
                                   clip_value=clip_value)
    train_script.train_one_epoch(learner, batches, '')
    moved = max((old - new.detach()).abs().max().item() for old, new in zip(before, parameters, strict=True))
    assert moved == pytest.approx(clip_value, abs=1e-6) if clip_value else moved > 0.01


def test_an_epoch_takes_one_plain_step_for_each_batch():
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(1)
    model = UnitLinear(3, 2, bias=False).double()
    criterion = make_loss('proxy_anchor', num_classes=4, feature_dim=2).double()
    batches = [(torch.randn(5, 3, generator=generator).double(), torch.tensor([0, 1, 2, 1, 0])) for _ in range(3)]
    expected, last = copy.deepcopy(model), copy.deepcopy(criterion)
    for images, labels in batches:
        parameters = [*expected.parameters(), *last.parameters()]
        for parameter, gradient in zip(parameters, torch.autograd.grad(last(expected(images), labels), parameters),
                                       strict=True):
            parameter.data -= 0.1 * gradient
    optimizer = torch.optim.SGD([*model.parameters(), *criterion.parameters()], lr=0.1)
    train_script.train_one_epoch(train_script.Learner(model, criterion, optimizer, torch.device('cpu')), batches, '')
    assert torch.allclose(model.weight, expected.weight, rtol=1e-5)
    assert torch.allclose(criterion.proxies, last.proxies, rtol=1e-5)
