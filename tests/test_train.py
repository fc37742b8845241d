"""train.py: the published commands, what a run does and leaves, what continues it, and what it refuses."""
import contextlib
import copy
import io
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import REPOSITORY, call_main
from faults import BACKBONE, TINY, differing_results
from museum import SETTINGS
from PIL import Image
from raw_trees import make_car, make_own, write_image
from tiny_runs import draw_nothing
from torch.nn import functional as F

import data_utils
import evaluate
import report
import train
from common.errors import UserError
from common.files import load, save
from common.results import RunFiles
from imagedata.raw_sets import find_root
from model import EmbeddingNet, NetConfig, make_loss
from retrieval.database import load_data_base
from training.checkpoint import load_initial_weights
from training.options import parse_options

NAME = 'car_timm-test_resnet_balanced_proxy_16'
OWN_NAME = 'mine_timm-test_resnet_balanced_proxy_16'
FILES = ('checkpoint.pth', 'curves.pdf', 'curves.png', 'data_base.pth', 'model.pth', 'statistics.csv')


@pytest.fixture(autouse=True)
def quick_curves(monkeypatch):
    monkeypatch.setattr(train, 'draw_curves', draw_nothing)


def tiny_words(data_path, results, *words) -> list:
    return [*TINY, '--num_workers', 0, '--warm_up', 0, '--data_path', data_path, '--results_dir', results, *words]


@pytest.fixture
def train_tiny(call_script):
    """Train on a data path into a folder with TINY, one epoch unless the words say more; returns what is printed."""
    def call(data_path, results, *words) -> str:
        return call_script(train, *tiny_words(data_path, results, '--num_epochs', 1, *words))
    return call


@pytest.fixture(scope='module')
def two_epochs(raw_sets, tmp_path_factory):
    """The folder of a run of two epochs, and what it printed."""
    folder, printed = tmp_path_factory.mktemp('two_epochs'), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(train, 'draw_curves', draw_nothing)
        call_main(train, *tiny_words(raw_sets, folder, '--num_epochs', 2))
    return folder, printed.getvalue()


@pytest.fixture(scope='module')
def every_second_epoch(raw_sets, tmp_path_factory):
    """Three epochs, measured after the second and the third; the folder and what it printed."""
    folder, printed = tmp_path_factory.mktemp('every_second'), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(train, 'draw_curves', draw_nothing)
        call_main(train, *tiny_words(raw_sets, folder, '--num_epochs', 3, '--eval_every', 2))
    return folder, printed.getvalue()


# ---------------------------------------------------- the published commands --------------------------------------
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
WITH_RECIPE = [('--momentum 0.6 --recipe asymptotic_proxy', 'car_resnet50_asymptotic_proxy_512_m0.6'),
               ('--momentum 0.6 --recipe momentum_proxy', 'car_resnet50_proxy_nca_512_momentum_proxy_m0.6')]
# What makes a published command small; a later flag wins.
SMALL = ('--weights', 'none', '--image_size', 32, '--batch-size', 4, '--num_epochs', 1, '--warm_up', 0, '--recalls',
         '1,2', '--num_workers', 0, '--on_collapse', 'warn')


@pytest.mark.parametrize(('words', 'run'), PRINTED + WITH_RECIPE)
def test_a_published_command_names_the_run_that_it_means(words, run):
    [options] = parse_options(words.split())
    assert options.run == run
    assert options.recipe == ('proxy_anchor' if 'Proxy_Anchor' in words else options.recipe)


def test_the_published_command_that_two_systems_share_says_what_to_add():
    with pytest.raises(UserError, match='--momentum 0.6 .* --recipe asymptotic_proxy or --recipe momentum_proxy'):
        parse_options(['--momentum', '0.6'])


@pytest.mark.slow
@pytest.mark.parametrize(('words', 'run'), PRINTED + WITH_RECIPE)
def test_a_published_command_trains(raw_sets, tmp_path, call_script, words, run):
    call_script(train, *words.split(), *SMALL, '--data_path', raw_sets, '--results_dir', tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f'{run}_{file}' for file in FILES]
    if run == 'cub_inception_proxy_anchor_512':  # the page of Proxy Anchor evaluates this one
        words = '--gpu-id 0 --batch-size 120 --model bn_inception --embedding-size 512 --dataset cub --resume'
        printed = call_script(evaluate, *words.split(), tmp_path / f'{run}_model.pth', '--data_path', raw_sets)
        assert re.search(r'^dense +\d', printed, re.MULTILINE)


# ---------------------------------------------------- worker processes -------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize('method', ['spawn', 'forkserver'])
def test_workers_of_every_start_method_give_the_results_of_none(method, raw_sets, tmp_path):
    """Python 3.14 starts processes by forkserver on Linux; macOS and Windows by spawn."""
    (tmp_path / 'sitecustomize.py').write_text(
        f'import multiprocessing\nmultiprocessing.set_start_method({method!r})\n')
    for workers in (0, 2):
        words = tiny_words(raw_sets, tmp_path / f'run{workers}', '--num_epochs', 2, '--num_workers', workers)
        done = subprocess.run([sys.executable, 'train.py', *map(str, words)], cwd=REPOSITORY, capture_output=True,
                              text=True, check=False, env={**os.environ, 'PYTHONPATH': str(tmp_path)})
        assert done.returncode == 0, done.stderr
    assert differing_results(tmp_path / 'run0', tmp_path / 'run2') == []


def test_the_workers_begin_an_epoch_before_the_last_one_is_measured(raw_sets, tmp_path, train_tiny, monkeypatch):
    calls, start_batches, measure = [], train.start_batches, train.measure
    monkeypatch.setattr(train, 'start_batches',
                        lambda loader, epoch: calls.append(epoch) or start_batches(loader, epoch))
    monkeypatch.setattr(train, 'measure', lambda *args: calls.append('measure') or measure(*args))
    train_tiny(raw_sets, tmp_path, '--num_epochs', 2)
    assert calls == [1, 2, 'measure', 'measure']


# ---------------------------------------------------- fewer evaluations ------------------------------------------
def test_eval_every_measures_those_epochs_and_the_last_and_trains_the_same(every_second_epoch, raw_sets, tmp_path,
                                                                           train_tiny):
    train_tiny(raw_sets, tmp_path, '--num_epochs', 3)
    rows, each = (pd.read_csv(folder / f'{NAME}_statistics.csv') for folder in (every_second_epoch[0], tmp_path))
    assert list(rows['dense_R@1'].notna()) == [False, True, True]
    pd.testing.assert_series_equal(rows['loss'], each['loss'])
    measured = [column for column in each if column.startswith(('dense_', 'binary_'))]
    pd.testing.assert_frame_equal(rows.loc[1:, measured], each.loc[1:, measured])


def test_an_epoch_without_a_measurement_prints_its_training_alone(every_second_epoch):
    first, second = (next(line for line in every_second_epoch[1].splitlines() if line.startswith(f'epoch {epoch}/3:'))
                     for epoch in (1, 2))
    assert first.endswith(' img/s')
    assert ' img/s; R@1 ' in second


def test_the_model_kept_is_that_of_the_best_measured_epoch(every_second_epoch):
    folder, printed = every_second_epoch
    best = pd.read_csv(folder / f'{NAME}_statistics.csv')['dense_R@1'].idxmax() + 1
    assert load_data_base(folder / f'{NAME}_data_base.pth').origin['epoch'] == best > 1
    assert re.search(rf'best epoch {best} \(chosen on the test classes.*R@1 \d', printed)


# ---------------------------------------------------- a run and what it leaves ------------------------------------
def test_a_run_leaves_statistics_model_data_base_checkpoint_and_curves(trained_run):
    assert sorted(path.name for path in trained_run.iterdir()) == [f'{NAME}_{file}' for file in FILES]


def test_statistics_have_a_row_for_each_epoch_as_it_was_printed(two_epochs):
    folder, printed = two_epochs
    table = pd.read_csv(folder / f'{NAME}_statistics.csv')
    assert table['epoch'].tolist() == [1, 2]
    columns = {'loss', 'accuracy', 'img_s', 'lr', 'proxy_lr', 'dense_R@1', 'dense_R@2', 'binary_R@1', 'dense_MAP@R'}
    assert columns <= set(table)
    for epoch, row in table.set_index('epoch').iterrows():
        assert (f'epoch {epoch}/2: loss {row["loss"]:.4f}, accuracy {row["accuracy"]:.1f} %, {row["img_s"]:.0f} img/s'
                f'; R@1 {row["dense_R@1"]:.2f} ') in printed


def test_the_data_base_is_plain_and_complete(two_epochs):
    contents = torch.load(two_epochs[0] / f'{NAME}_data_base.pth', weights_only=True)
    assert len(contents['test_images']) == len(contents['test_labels']) == len(contents['test_sizes']) == 12
    assert contents['test_features'].shape == (12, 16)
    assert contents['train_proxies'].shape == (3, 16)
    assert contents['class_names'] == ['Maker Model 99', 'Maker Model 100', 'Maker Model 196']
    assert contents['train_class_names'] == contents['seen_classes']
    assert contents['args']['recipe'] == 'balanced_proxy'
    assert not any(str(value).startswith('/') for value in contents['args'].values())


def test_the_model_and_the_data_base_are_of_the_best_epoch(two_epochs):
    table = pd.read_csv(two_epochs[0] / f'{NAME}_statistics.csv')
    best = table['epoch'][table['dense_R@1'].idxmax()]
    for kind in ('model', 'data_base'):
        assert load(two_epochs[0] / f'{NAME}_{kind}.pth', kind)['epoch'] == best
    assert load(two_epochs[0] / f'{NAME}_checkpoint.pth', 'checkpoint')['epoch'] == 2


def test_files_say_how_they_were_made(two_epochs):
    for kind in ('model', 'data_base', 'checkpoint'):
        made_with = load(two_epochs[0] / f'{NAME}_{kind}.pth', kind)['made_with']
        assert made_with['torch'] == str(torch.__version__)
        assert (made_with['device'], made_with['processes']) == ('cpu', 1)
        assert len(made_with['commit']) == 40 or made_with['commit'] == 'unknown'
    row = pd.read_csv(two_epochs[0] / f'{NAME}_statistics.csv').iloc[0]
    assert (row['made.torch'], row['args.recipe'], row['args.seed']) == (str(torch.__version__), 'balanced_proxy', 0)


def test_a_run_ends_with_its_best_and_last_epoch_and_commands_that_work(raw_sets, tmp_path, train_tiny, call_script,
                                                                       monkeypatch):
    from test_test_script import test_script

    monkeypatch.setattr(test_script, 'draw_rows', lambda answers, target: draw_nothing(None, target, None))
    printed = train_tiny(raw_sets, tmp_path)
    assert 'best epoch' not in printed  # there is one
    assert re.search(r'last epoch 1: R@1 \d', printed)
    commands = [shlex.split(command) for command in re.findall(r'^  python (.*)$', printed, re.MULTILINE)]
    assert [command[0] for command in commands] == ['evaluate.py', 'test.py']
    for script, command in zip((evaluate, test_script), commands, strict=True):
        assert call_script(script, *command[1:])


def test_the_checkpoint_is_saved_last_so_that_a_crash_repeats_the_epoch(raw_sets, tmp_path, train_tiny, monkeypatch):
    renamed, replace = [], os.replace
    monkeypatch.setattr(os, 'replace', lambda one, other: renamed.append(Path(other).name) or replace(one, other))
    train_tiny(raw_sets, tmp_path)
    assert renamed == [f'{NAME}_{file}' for file in ('model.pth', 'data_base.pth', 'statistics.csv', 'checkpoint.pth')]


@pytest.mark.parametrize('words', [
    ('--num_workers', 1), ('--deterministic',), pytest.param(('--num_workers', 4), marks=pytest.mark.slow)])
def test_neither_time_nor_workers_nor_deterministic_algorithms_change_a_run_on_a_cpu(
        two_epochs, raw_sets, tmp_path, train_tiny, words):
    """`--deterministic` is among the settings that files hold; all else is equal."""
    train_tiny(raw_sets, tmp_path, '--num_epochs', 2, *words)
    torch.use_deterministic_algorithms(False)
    differing = differing_results(two_epochs[0], tmp_path)
    allowed = {f'{NAME}_{kind}.pth.args.deterministic' for kind in ('model', 'data_base', 'checkpoint')}
    assert set(differing) <= (allowed | {f'{NAME}_statistics.csv'} if '--deterministic' in words else set())
    tables = [pd.read_csv(folder / f'{NAME}_statistics.csv') for folder in (two_epochs[0], tmp_path)]
    assert all(tables[0][column].equals(tables[1][column]) for column in ('loss', 'dense_MAP@R', 'binary_MAP@R'))


def test_the_initial_weights_depend_on_the_seed(raw_sets, tmp_path, train_tiny):
    train_tiny(raw_sets, tmp_path, '--seed', 3, '--lr', 1e-30)
    trained = load(tmp_path / f'{NAME}_seed3_checkpoint.pth', 'checkpoint')['model']
    heads = []
    for seed in (3, 0):
        torch.manual_seed(seed)
        heads.append(EmbeddingNet(NetConfig(BACKBONE, 16, image_size=32), 'none').head.weight.detach())
    torch.testing.assert_close(trained['head.weight'], heads[0], rtol=1e-3, atol=1e-6)
    assert not torch.allclose(trained['head.weight'], heads[1], atol=1e-2)


# ---------------------------------------------------- a name that is taken, and --resume --------------------------
def contents_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_run_name_is_never_taken_twice_in_silence(run, raw_sets, train_tiny):
    before = contents_of(run)
    with pytest.raises(UserError, match=f'a run named {NAME} is in .* --resume .* --remark .* --overwrite'):
        train_tiny(raw_sets, run)
    assert contents_of(run) == before
    train_tiny(raw_sets, run, '--remark', 'b')
    assert {name: data for name, data in contents_of(run).items() if name in before} == before
    train_tiny(raw_sets, run, '--seed', 3, '--overwrite')  # a name of its own
    train_tiny(raw_sets, run, '--lr', 0.5, '--overwrite')
    assert pd.read_csv(run / f'{NAME}_statistics.csv')['args.lr'].tolist() == [0.5]


@pytest.mark.parametrize(('words', 'part'), [
    (('--lr', '0.5'), r'--lr 0.5 \(was 0.0001\)'), (('--recalls', '1,3'), r'--recalls \(1, 3\) \(was \('),
    (('--proxy_update', 'positive', '--remark', '', '--margin', '0.1'), 'there is no .*positive_d0.1_checkpoint.pth'),
    (('--remark', 'new'), '--resume: there is no .*new_checkpoint.pth; start the run without --resume')])
def test_resume_names_what_differs(run, raw_sets, train_tiny, words, part):
    before = contents_of(run)
    with pytest.raises(UserError, match=part):
        train_tiny(raw_sets, run, '--resume', *words)
    assert contents_of(run) == before


@pytest.mark.parametrize('words', [('--weights', 'nowhere.pth'), ('--batch_size', 13), ('--init', 'nowhere.pth'),
                                   ('--data_name', 'none')])
def test_a_run_that_cannot_start_leaves_the_old_one_alone(run, raw_sets, train_tiny, words):
    before = contents_of(run)
    with pytest.raises(UserError):
        train_tiny(raw_sets, run, '--overwrite', *words)
    assert contents_of(run) == before


def test_a_second_run_of_the_same_name_at_the_same_time_stops(raw_sets, tmp_path, train_tiny):
    with RunFiles(tmp_path, NAME).locked('another test'), pytest.raises(
            UserError, match=f'another process is training the run {NAME}'):
        train_tiny(raw_sets, tmp_path, '--overwrite')
    train_tiny(raw_sets, tmp_path)
    assert not list(tmp_path.glob('.*'))


def test_resume_notices_that_the_data_set_changed(own_car, tmp_path, train_tiny):
    train_tiny(own_car, tmp_path / 'r')
    (own_car / 'car/car_ims/000001.jpg').unlink()
    call_main(data_utils, '--data_path', own_car, '--skip_bad')
    with pytest.raises(UserError, match='the data set car was converted again since the run'):
        train_tiny(own_car, tmp_path / 'r', '--resume')


def test_a_finished_run_goes_on_for_more_epochs(two_epochs, run, raw_sets, train_tiny):
    printed = train_tiny(raw_sets, run, '--num_epochs', 2, '--resume')
    assert 'epoch 1/' not in printed
    # The model and the data base may be those of the first epoch, and then hold the settings of that time.
    allowed = {f'{NAME}_{kind}.pth.args.num_epochs' for kind in ('model', 'data_base')}
    assert set(differing_results(two_epochs[0], run)) <= allowed
    with pytest.raises(UserError, match=r'--num_epochs 1 \(was 2\)'):
        train_tiny(raw_sets, run, '--resume')


# ---------------------------------------------------- what a run refuses ------------------------------------------
@pytest.mark.parametrize(('contents', 'part'), [
    (torch.zeros(3), 'holds no state dict'), ([1], 'holds no state dict'),
    ({1: torch.zeros(2)}, 'holds no state dict'), ({'state_dict': 5}, 'holds no state dict'),
    ({'config': {}, 'state_dict': {}, 'args': {}}, 'is the model of a run, .* use --init .*w.pth')])
def test_weights_that_are_not_a_state_dict_are_refused(raw_sets, tmp_path, train_tiny, contents, part):
    torch.save(contents, tmp_path / 'w.pth')
    with pytest.raises(UserError, match=part):
        train_tiny(raw_sets, tmp_path / 'r', '--weights', tmp_path / 'w.pth')


def test_data_that_is_missing_is_named(raw_sets, tmp_path, train_tiny):
    make_car(tmp_path)
    for data_path, words, part in (
            (tmp_path / 'no', (), '--data_path .*no does not exist'),
            (tmp_path, (), f'not converted yet.*python data_utils.py --data_path {tmp_path} --data_name car'),
            (raw_sets, ('--data_name', 'carr'), "did you mean 'car'"),
            (raw_sets, ('--data_name', 'sop', '--crop_type', 'cropped'), 'has no bounding boxes')):
        with pytest.raises(UserError, match=part):
            train_tiny(data_path, tmp_path / 'r', *words)


@pytest.mark.parametrize('num_workers', [0, pytest.param(2, marks=pytest.mark.slow)])
def test_an_image_that_breaks_is_named(own_car, tmp_path, train_tiny, num_workers):
    image = own_car / 'car/uncropped/000003.jpg'
    image.write_bytes(image.read_bytes()[:500])
    with pytest.raises(UserError, match='000003.jpg is missing or broken'):
        train_tiny(own_car, tmp_path / 'r', '--num_workers', num_workers)


@pytest.mark.parametrize(('words', 'parts'), [
    (('--batch_size', 13), ('--batch_size 13', '12 training images')),
    (('--batch_size', 5, '--images_per_class', 2), ('--batch_size 5 must be a multiple',)),
    (('--recalls', '1,12'), ('R@12 asks for more than the 11 images', '--recalls 1,2')),
    (('--batch_size', 11), ('--batch_size 11 leaves a batch of one image', '--drop_last 1')),
    (('--device', 'cuda:9'), ('--device cuda:9', '--device cpu')), (('--device', 'tpu'), ("--device 'tpu'",)),
    (('--backbone_type', 'timm:resnet10t', '--weights', 'nowhere.pth'), ('there is no weights file nowhere.pth',)),
    (('--backbone_type', 'timm:test_resnt'), ("did you mean 'test_resnet",)),
    (('--weights', REPOSITORY / 'README.md'), ('README.md cannot be read as a weights file',)),
    (('--head_init', 'whiten', '--feature_dim', 600), ('--head_init whiten cannot make 600 numbers',)),
    (('--cache_size', 99), ('--cache_size 99', 'there is no cache', 'data_utils.py')),
    (('--data_name', 'isc', '--val_ratio', 0.9), ('--val_ratio 0.9',))])
def test_settings_that_do_not_fit_data_or_machine_are_an_error(raw_sets, tmp_path, train_tiny, words, parts):
    with pytest.raises(UserError) as error:
        train_tiny(raw_sets, tmp_path, *words)
    assert '\n' not in str(error.value)
    assert all(part in str(error.value) for part in parts), error.value
    assert not list(tmp_path.glob('*statistics.csv'))


def test_a_results_folder_that_cannot_be_written_to_is_named(raw_sets, tmp_path, train_tiny):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='--results_dir .*file cannot be written to'):
        train_tiny(raw_sets, tmp_path / 'file')


def test_a_loss_that_is_not_finite_names_step_rate_and_images(raw_sets, tmp_path, train_tiny):
    with pytest.raises(UserError) as error:
        train_tiny(raw_sets, tmp_path, '--lr', '1e30', '--optimizer_type', 'sgd')
    for part in ('the loss is not finite in step 2 of this epoch', '1e+30', '4 images', '.jpg', '--clip_value'):
        assert part in str(error.value)


@pytest.fixture(scope='module')
def grey_images(tmp_path_factory) -> Path:
    """A data path with 40 training classes of equal images: nothing can be learned."""
    folder = tmp_path_factory.mktemp('grey')
    for subset, count in (('train', 40), ('test', 2)):
        for label in range(count):
            (folder / 'grey' / subset / f'{subset}_{label}').mkdir(parents=True)
            for number in range(2):
                image = Image.new('RGB', (32, 32), (90, 90, 90))
                image.save(folder / 'grey' / subset / f'{subset}_{label}' / f'{number}.png')
    call_main(data_utils, '--data_path', folder, '--data_name', 'grey')
    return folder


@pytest.mark.parametrize('choice', ['stop', pytest.param('warn', marks=pytest.mark.slow)])
def test_a_run_that_collapses_stops_or_warns_with_its_epochs_saved(grey_images, tmp_path, train_tiny, choice):
    words = ('--recipe', 'asymptotic_proxy', '--data_name', 'grey', '--batch_size', 16, '--num_epochs', 3,
             '--on_collapse', choice)
    if choice == 'stop':
        with pytest.raises(UserError, match='in epoch 2 is chance for 40 classes'):
            train_tiny(grey_images, tmp_path, *words)
    else:
        assert 'collapsed? an accuracy of' in train_tiny(grey_images, tmp_path, *words)
    epochs = pd.read_csv(tmp_path / 'grey_timm-test_resnet_asymptotic_proxy_16_statistics.csv')['epoch']
    assert epochs.tolist() == ([1, 2] if choice == 'stop' else [1, 2, 3])


# ---------------------------------------------------- compiling ---------------------------------------------------
def test_the_network_is_compiled_frozen_and_again_when_the_backbone_learns(raw_sets, tmp_path, train_tiny,
                                                                          monkeypatch):
    compiled = []
    monkeypatch.setenv('CXX', 'python3')  # any program passes for the compiler, which is not called
    monkeypatch.setattr(torch, 'compile', lambda network: compiled.append(
        [parameter.requires_grad for parameter in network.backbone.parameters()]) or network)
    train_tiny(raw_sets, tmp_path, '--num_epochs', 2, '--warm_up', 1, '--compile')
    assert [any(requires_grad) for requires_grad in compiled] == [False, True]
    assert [all(requires_grad) for requires_grad in compiled] == [False, True]


@pytest.mark.slow
def test_a_compiled_run_is_the_run_to_rounding(two_epochs, raw_sets, tmp_path, train_tiny):
    if not shutil.which(os.environ.get('CXX', 'g++')):
        pytest.skip('needs a C++ compiler')
    from torch._dynamo.utils import counters

    counters.clear()
    train_tiny(raw_sets, tmp_path, '--num_epochs', 2, '--compile')
    assert counters['stats']['unique_graphs'] > 0  # it was compiled
    torch._dynamo.reset()
    tables = [pd.read_csv(folder / f'{NAME}_statistics.csv') for folder in (two_epochs[0], tmp_path)]
    assert tables[1]['loss'].tolist() == pytest.approx(tables[0]['loss'].tolist(), rel=1e-3)
    bases = [load_data_base(folder / f'{NAME}_data_base.pth') for folder in (two_epochs[0], tmp_path)]
    assert [base.test.images for base in bases][0] == bases[1].test.images
    torch.testing.assert_close(bases[1].test.features, bases[0].test.features, rtol=0, atol=2e-2)


# ---------------------------------------------------- held-out classes, seeds -------------------------------------
@pytest.fixture(scope='module')
def seeds(tmp_path_factory):
    """Two seeds, whose epochs were chosen on two of four training classes: results, what was printed, data path."""
    results, data, printed = tmp_path_factory.mktemp('seeds'), tmp_path_factory.mktemp('data'), io.StringIO()
    make_car(data, classes=(1, 2, 3, 98, 99, 100, 196))
    call_main(data_utils, '--data_path', data, '--data_name', 'car')
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(train, 'draw_curves', draw_nothing)
        call_main(train, *tiny_words(data, results, '--num_epochs', 2, '--val_ratio', 0.5, '--seeds', '5,0'))
    return results, printed.getvalue(), data


def test_seeds_are_trained_and_reported(seeds):
    results, printed, _ = seeds
    table = pd.read_csv(results / f'{NAME}_val0.5_seeds.csv').set_index('epoch')
    last = [pd.read_csv(results / f'{NAME}_val0.5{seed}_statistics.csv')['dense_R@1'].iloc[-1]
            for seed in ('_seed5', '')]
    assert table.loc['last', 'mean_R@1'] == pytest.approx(sum(last) / 2)
    assert f'| {NAME}_val0.5 | last | {sum(last) / 2:.2f} +- ' in printed
    assert set(table.index) == {'chosen on held-out training classes', 'last', 'best on the test classes'}


def test_held_out_classes_choose_the_epoch_and_are_not_trained_on(seeds):
    results, printed, _ = seeds
    table = pd.read_csv(results / f'{NAME}_val0.5_statistics.csv')
    data_base = load_data_base(results / f'{NAME}_val0.5_data_base.pth')
    assert data_base.origin['epoch'] == table['epoch'][table['val_dense_R@1'].idxmax()]
    assert len(data_base.proxies['train_class_names']) == len(data_base.proxies['train_proxies']) == 2  # of 4
    assert printed.count('chosen on held-out training classes: R@1') == 2
    assert '8 images of 2 classes' in printed


def test_resume_keeps_complete_seeds_and_trains_the_others(seeds, tmp_path, train_tiny):
    results = Path(shutil.copytree(seeds[0], tmp_path / 'r'))
    for file in RunFiles(results, f'{NAME}_val0.5').all():  # of seed 0
        file.unlink(missing_ok=True)
    before = {file: file.read_bytes() for file in results.glob('*_seed5_model.pth')}
    words = (seeds[2], results, '--num_epochs', 2, '--val_ratio', 0.5, '--seeds', '5,0', '--resume')
    printed = train_tiny(*words)
    assert printed.count('epoch 1/2') == 1
    assert all(file.read_bytes() == data for file, data in before.items())
    assert not differing_results(seeds[0], results)
    (results / f'{NAME}_val0.5_seed5_checkpoint.pth').unlink()
    with pytest.raises(UserError, match='seed5_checkpoint.pth.*--overwrite'):
        train_tiny(*words)
    assert all(file.read_bytes() == data for file, data in before.items())


# ---------------------------------------------------- your own photographs ----------------------------------------
@pytest.fixture(scope='module')
def photographs(tmp_path_factory) -> Path:
    """A data path with six classes of three photographs, three of which are for training."""
    folder = tmp_path_factory.mktemp('photographs')
    make_own(folder, images=3)
    call_main(data_utils, '--data_path', folder, '--data_name', 'mine')
    return folder


def test_training_on_test_classes_says_so_wherever_numbers_stand(tmp_path, train_tiny, call_script, monkeypatch):
    for subset, labels in (('train', 'abc'), ('test', 'bcd')):
        for label in labels:
            for number in range(3):
                write_image(tmp_path / 'mine' / subset / label / f'{number}.jpg', ord(label), number + 5 * len(subset))
    assert '2 classes are in training and test' in call_script(data_utils, '--data_path', tmp_path, '--data_name',
                                                               'mine')
    words = (tmp_path, tmp_path / 'r', '--data_name', 'mine', '--drop_last', 1)
    with pytest.raises(UserError, match='2 of 3 test classes were trained on, .*--allow_seen'):
        train_tiny(*words)
    assert 'NOT on unseen classes: 2' in train_tiny(*words, '--allow_seen')
    statistics = pd.read_csv(tmp_path / 'r' / f'{OWN_NAME}_statistics.csv')
    assert statistics['made.seen_test_classes'].tolist() == [2]
    data_base = tmp_path / 'r' / f'{OWN_NAME}_data_base.pth'
    with pytest.raises(UserError, match='2 of 3 test classes were trained on'):
        call_script(evaluate, '--data_base', data_base)
    assert 'NOT on unseen classes: 2' in call_script(evaluate, '--data_base', data_base, '--allow_seen')
    monkeypatch.setattr(report, 'draw_curves', draw_nothing)
    monkeypatch.setattr(report, 'map_embeddings', lambda features: {'PCA': features[:, :2].numpy()})
    call_script(report, '--data_base', data_base, '--data_path', tmp_path)
    assert 'Not on unseen classes:</strong>' in (tmp_path / 'r' / f'{OWN_NAME}_report.html').read_text()


def test_classes_that_an_earlier_model_has_seen_do_not_choose_the_epoch_of_a_later_one(tmp_path, train_tiny):
    for subset, labels in (('train', 'abcd'), ('test', 'ef')):
        for label in labels:
            for number in range(3):
                write_image(tmp_path / 'mine' / subset / label / f'{number}.jpg', ord(label), number)
    call_main(data_utils, '--data_path', tmp_path, '--data_name', 'mine')
    words = (tmp_path, tmp_path / 'r', '--data_name', 'mine', '--drop_last', 1)
    train_tiny(*words)
    words = (*words, '--init', tmp_path / 'r' / f'{OWN_NAME}_model.pth', '--val_ratio', 0.5)
    with pytest.raises(UserError, match='2 of 2 classes that --val_ratio holds out were trained on.*--allow_seen'):
        train_tiny(*words)
    train_tiny(*words, '--allow_seen')


def test_a_warm_up_over_all_epochs_is_refused_unless_it_is_asked_for(raw_sets, tmp_path, train_tiny):
    with pytest.raises(UserError, match='--num_epochs 1 ends within the warm-up of the recipe balanced_proxy, 2 '):
        parse_options(['--num_epochs', '1'])
    printed = train_tiny(raw_sets, tmp_path, '--warm_up', 1)
    assert 'the backbone stays frozen in all epochs' in printed
    trained = load(tmp_path / f'{NAME}_checkpoint.pth', 'checkpoint')['model']
    torch.manual_seed(0)
    start = EmbeddingNet(NetConfig(BACKBONE, 16, freeze_bn=False, image_size=32), 'none').state_dict()
    convolutions = [name for name in start if name.startswith('backbone') and start[name].ndim == 4]
    assert all(torch.equal(trained[name], start[name]) for name in convolutions)
    assert not torch.equal(trained['head.weight'], start['head.weight'])


def test_the_backbone_learns_from_the_epoch_after_the_warm_up_on(raw_sets, tmp_path, train_tiny):
    train_tiny(raw_sets, tmp_path, '--warm_up', 1, '--num_epochs', 2)
    trained = load(tmp_path / f'{NAME}_checkpoint.pth', 'checkpoint')['model']
    torch.manual_seed(0)
    start = EmbeddingNet(NetConfig(BACKBONE, 16, freeze_bn=False, image_size=32), 'none').state_dict()
    convolutions = [name for name in start if name.startswith('backbone') and start[name].ndim == 4]
    assert not any(torch.equal(trained[name], start[name]) for name in convolutions)


def test_a_run_starts_from_the_model_of_another_and_remembers_what_that_one_had_seen(run, photographs, train_tiny):
    words = (photographs, run, '--data_name', 'mine', '--drop_last', 1)
    first = load(run / f'{NAME}_model.pth', 'model')
    save({**first, 'seen_classes': [*first['seen_classes'], 'elsewhere']}, run / 'of_others_model.pth')
    train_tiny(*words, '--init', run / 'of_others_model.pth', '--lr', 1e-30)
    tuned = load(run / f'{OWN_NAME}_model.pth', 'model')
    torch.testing.assert_close(tuned['state_dict']['head.weight'], first['state_dict']['head.weight'], rtol=1e-3,
                               atol=1e-6)
    assert {'elsewhere', 'Maker Model 1'} < set(tuned['seen_classes'])
    (run / 'of_others_model.pth').unlink()  # a run that goes on does not need it
    train_tiny(*words, '--init', run / 'of_others_model.pth', '--lr', 1e-30, '--resume', '--num_epochs', 2)
    assert 'elsewhere' in load(run / f'{OWN_NAME}_model.pth', 'model')['seen_classes']
    for flag, value in (('--feature_dim', 8), ('--pooling', 'avg')):
        with pytest.raises(UserError, match=rf'{flag} {value} \(there '):
            train_tiny(*words, '--init', run / f'{NAME}_model.pth', flag, value, '--remark', 'x')


def test_a_transformer_does_not_start_from_one_of_another_image_size(tmp_path):
    sizes = [EmbeddingNet(NetConfig('timm:test_vit', 8, image_size=side), 'none') for side in (160, 96)]
    save({'config': asdict(sizes[0].config), 'state_dict': sizes[0].state_dict(), 'args': SETTINGS,
          'seen_classes': []}, tmp_path / 'a_model.pth')
    with pytest.raises(UserError, match='was trained with --image_size 160, and its weights fit no other'):
        load_initial_weights(str(tmp_path / 'a_model.pth'), sizes[1], str(tmp_path))


def test_the_pretrained_backbone_is_measured_before_the_training(raw_sets, tmp_path, train_tiny, call_script):
    torch.manual_seed(3)
    torch.save(EmbeddingNet(NetConfig(BACKBONE, 4), 'none').backbone.network.state_dict(), tmp_path / 'w.pth')
    printed = train_tiny(raw_sets, tmp_path, '--weights', tmp_path / 'w.pth')
    measured = json.loads(call_script(
        evaluate, '--pretrained', '--data_path', raw_sets, '--backbone_type', BACKBONE, '--weights', tmp_path / 'w.pth',
        '--image_size', 32, '--recalls', '1,2', '--amp', 'off', '--whiten', 'off', '--num_workers', 0, '--json'))
    baseline = measured['dense']['R@1']
    assert f'before the training: R@1 {baseline:.2f} of the backbone' in printed
    table = pd.read_csv(tmp_path / f'{NAME}_statistics.csv')
    assert table['pretrained_R@1'].tolist() == [pytest.approx(baseline)]
    printed = train_tiny(raw_sets, tmp_path, '--weights', tmp_path / 'w.pth', '--pretrained_baseline', 0, '--remark',
                         'without')
    assert 'before the training' not in printed
    assert 'pretrained_R@1' not in pd.read_csv(tmp_path / f'{NAME}_without_statistics.csv')


@pytest.mark.parametrize('num_workers', [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_from_the_cache_reads_no_image_file(own_car, tmp_path, train_tiny, num_workers):
    call_main(data_utils, '--data_path', own_car, '--data_name', 'car', '--cache_size', 36)
    for image in (own_car / 'car/uncropped').iterdir():  # broken, but of the same size and time
        status = os.stat(image)
        image.write_bytes(bytes(status.st_size))
        os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    train_tiny(own_car, tmp_path, '--cache_size', 36, '--num_workers', num_workers)
    assert pd.read_csv(tmp_path / f'{NAME}_statistics.csv')['args.cache_size'].tolist() == [36]
    with pytest.raises(UserError, match='is missing or broken'):
        train_tiny(own_car, tmp_path, '--remark', 'decoded')


def test_a_folder_named_like_a_formula_is_trained_on(tmp_path, train_tiny):
    make_own(tmp_path, 'abcde', images=3)
    for number in range(3):
        write_image(tmp_path / 'mine' / '\\frac' / f'{number}.jpg', 3, number)
    call_main(data_utils, '--data_path', tmp_path, '--data_name', 'mine')
    split = load(find_root(tmp_path, 'mine') / 'uncropped_data_dicts.pth', 'split file')
    assert '\\frac' in {*split['train'], *split['test']}
    train_tiny(tmp_path, tmp_path / 'r', '--data_name', 'mine', '--drop_last', 1)


# ---------------------------------------------------- optimizer, schedule, one epoch ------------------------------
@pytest.mark.parametrize(('words', 'factors'), [
    ('--lr_schedule step --lr_decay_step 2 --lr_decay_gamma 0.25', [1, 1, 0.25, 0.25, 0.0625]),
    ('--lr_schedule multistep --lr_milestones 0.2,0.8 --lr_decay_gamma 0.1', [1, 0.1, 0.1, 0.1, 0.01]),
    ('--lr_schedule cosine', [(1 + math.cos(math.pi * epoch / 5)) / 2 for epoch in range(5)]),
    ('--lr_schedule constant', [1] * 5)])
def test_the_rates_of_network_backbone_and_proxies_follow_the_schedule(words, factors):
    [options] = parse_options(f'{words} --num_epochs 5 --lr 1e-3 --backbone_lr 1e-4 --proxy_lr 0.5 --weight_decay 0.25'
                              .split())
    model = EmbeddingNet(NetConfig(BACKBONE, 16), 'none')
    optimizer = train.build_optimizer(model, make_loss('cos_face', num_classes=3, feature_dim=16), options)
    schedule = train.build_schedule(optimizer, options)
    assert {group['weight_decay'] for group in optimizer.param_groups} == {0.25}
    assert sum(len(group['params']) for group in optimizer.param_groups) == len(list(model.parameters())) + 1
    for factor in factors:
        rates = {group['role']: group['lr'] for group in optimizer.param_groups}
        expected = {'network': 1e-3 * factor, 'backbone': 1e-4 * factor, 'proxies': 0.5 * factor}
        assert rates == pytest.approx(expected)
        optimizer.step()
        schedule.step()


def test_the_rates_of_an_epoch_are_those_that_it_was_trained_with(raw_sets, tmp_path, train_tiny):
    train_tiny(raw_sets, tmp_path, '--num_epochs', 2, '--lr', 1e-3, '--proxy_lr', 0.5, '--lr_decay_step', 1)
    table = pd.read_csv(tmp_path / f'{NAME}_statistics.csv')
    assert table['lr'].tolist() == pytest.approx([1e-3, 5e-4])
    assert table['proxy_lr'].tolist() == pytest.approx([0.5, 0.25])


class UnitLinear(torch.nn.Linear):
    """A network with unit rows, as losses expect them."""

    def forward(self, images):
        return F.normalize(super().forward(images), dim=-1)


@pytest.mark.parametrize('clip_value', [0.0, 1e-3])
def test_gradients_are_clipped_entry_by_entry(clip_value):
    torch.manual_seed(1)
    model = UnitLinear(3, 2, bias=False)
    criterion = make_loss('normalized_softmax', num_classes=4, feature_dim=2, scale=100.0)
    parameters = [*model.parameters(), *criterion.parameters()]
    before = [parameter.detach().clone() for parameter in parameters]
    batches = [(torch.tensor([[5.0, 0, 0], [0, -5.0, 1]]), torch.tensor([2, 0]))]
    optimizer = torch.optim.SGD([{'params': parameters}], lr=1.0)
    train.train_one_epoch(model, criterion, optimizer, batches, torch.device('cpu'), clip_value=clip_value)
    moved = [(old - new.detach()).abs().max().item() for old, new in zip(before, parameters, strict=True)]
    if clip_value:
        assert moved == pytest.approx([clip_value, clip_value], abs=1e-6)
    else:
        assert min(moved) > 0.01


def test_an_epoch_takes_one_plain_step_for_each_batch():
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(1)
    model = UnitLinear(3, 2, bias=False).double()
    criterion = make_loss('proxy_anchor', num_classes=4, feature_dim=2).double()
    batches = [(torch.randn(5, 3, generator=generator).double(), torch.tensor([0, 1, 2, 1, 0])) for _ in range(3)]
    expected, last = copy.deepcopy(model), copy.deepcopy(criterion)
    losses = []
    for images, labels in batches:
        parameters = [*expected.parameters(), *last.parameters()]
        losses.append(last(expected(images), labels))
        for parameter, gradient in zip(parameters, torch.autograd.grad(losses[-1], parameters), strict=True):
            parameter.data -= 0.1 * gradient
    optimizer = torch.optim.SGD([*model.parameters(), *criterion.parameters()], lr=0.1)
    trained = train.train_one_epoch(model, criterion, optimizer, batches, torch.device('cpu'))
    assert torch.allclose(model.weight, expected.weight, rtol=1e-5)
    assert torch.allclose(criterion.proxies, last.proxies, rtol=1e-5)
    assert trained['loss'] == pytest.approx(sum(loss.item() for loss in losses) / 3, rel=1e-5)


def test_parameters_of_a_loss_are_trained_and_saved():
    class Tempered(type(make_loss('normalized_softmax', num_classes=3, feature_dim=2))):
        def __init__(self, update):
            super().__init__(3, 2, scale=4.0, proxy_update=update)
            self.heat = torch.nn.Parameter(torch.tensor(2.0))

        def compute_loss(self, similarity, labels):
            return self.heat * super().compute_loss(similarity, labels)

    for update in ('gradient', 'momentum'):
        criterion, other = Tempered(update), Tempered(update)
        [options] = parse_options(['--loss_name', 'normalized_softmax', '--proxy_update', update])
        optimizer = train.build_optimizer(EmbeddingNet(NetConfig(BACKBONE, 2), 'none'), criterion, options)
        assert any(parameter is criterion.heat for group in optimizer.param_groups for parameter in group['params'])
        criterion.heat.data.fill_(5.0)
        other.load_state_dict(criterion.state_dict())
        assert other.heat == 5
        assert torch.equal(other.proxies, criterion.proxies)


@pytest.mark.parametrize('amp', [False, True])
def test_with_amp_the_network_computes_in_bfloat16(amp):
    network, dtypes = torch.nn.Linear(5, 4), []
    network.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    model = torch.nn.Sequential(network, torch.nn.Softmax(1))
    criterion = torch.nn.Module()
    criterion.accuracy, criterion.num_samples = torch.zeros(()), 3
    criterion.forward = lambda embeddings, labels: embeddings.float().square().sum()
    optimizer = torch.optim.SGD([{'role': 'network', 'params': list(model.parameters())}], lr=0.1)
    batches = [(torch.ones(3, 5), torch.zeros(3, dtype=torch.int64))]
    train.train_one_epoch(model, criterion, optimizer, batches, torch.device('cpu'), amp)
    assert dtypes == [torch.bfloat16 if amp else torch.float32]
    assert network.weight.grad.dtype == torch.float32
