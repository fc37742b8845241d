"""What a command line means: recipes, second names, contradictions, flags without effect, names of runs."""
import dataclasses
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from conftest import REPOSITORY

import train
from common.errors import UserError
from model import make_loss
from recipes import LOSSES, OPTIMIZER_NAMES, RECIPES, SCHEDULE_NAMES
from training import options as options_module
from training.options import RunOptions, check_data, name_of_seeds, parse_options


def parse(*words) -> RunOptions:
    """Parse a command line of one run."""
    [options] = parse_options([str(word) for word in words])
    return options


def expect(options: RunOptions, **expected) -> None:
    assert {name: getattr(options, name) for name in expected} == pytest.approx(expected)


# ---------------------------------------------------- recipes -----------------------------------------------------
# What the papers' own pages print.
PUBLISHED = {
    'balanced_proxy': {
        'base_loss': 'balanced_proxy', 'proxy_update': 'gradient', 'scale': 32, 'margin': 0.1,
        'optimizer_type': 'adamw', 'lr': 1e-4, 'proxy_lr': 1e-2, 'weight_decay': 1e-4, 'lr_schedule': 'step',
        'lr_decay_step': 5, 'lr_decay_gamma': 0.5, 'batch_size': 64, 'num_epochs': 20, 'warm_up': 2, 'clip_value': 0,
        'image_size': 224, 'resize_size': 256, 'feature_dim': 512, 'drop_last': False, 'pooling': 'max',
        'layer_norm': True, 'head_bias': False, 'proxy_init': 'unit', 'freeze_bn': True},
    'asymptotic_proxy': {
        'base_loss': 'normalized_softmax', 'proxy_update': 'momentum', 'momentum': 0.5, 'scale': 1 / 0.03,
        'optimizer_type': 'adam', 'lr': 1e-4, 'proxy_lr': None, 'weight_decay': 0, 'lr_schedule': 'multistep',
        'lr_milestones': (0.5,), 'lr_decay_gamma': 0.1, 'batch_size': 128, 'num_epochs': 30, 'warm_up': 0,
        'image_size': 256, 'resize_size': 292, 'pooling': 'max', 'layer_norm': True},
    'positive_proxy': {
        'base_loss': 'normalized_softmax', 'proxy_update': 'positive', 'scale': 32, 'optimizer_type': 'adamw',
        'lr': 1e-4, 'proxy_lr': 1e-2, 'weight_decay': 1e-4, 'lr_decay_step': 5, 'lr_decay_gamma': 0.5,
        'batch_size': 64, 'num_epochs': 20, 'warm_up': 0},
    'momentum_proxy': {
        'base_loss': 'proxy_nca', 'proxy_update': 'momentum', 'momentum': 0.5, 'scale': 9, 'optimizer_type': 'adam',
        'lr': 1e-3, 'weight_decay': 0, 'lr_schedule': 'multistep', 'lr_milestones': (0.5, 0.8), 'lr_decay_gamma': 0.1,
        'batch_size': 64, 'num_epochs': 20, 'warm_up': 0},
    'proxy_anchor': {
        'base_loss': 'proxy_anchor', 'proxy_update': 'gradient', 'scale': 32, 'margin': 0.1, 'optimizer_type': 'adamw',
        'lr': 1e-4, 'proxy_lr': 1e-2, 'weight_decay': 1e-4, 'lr_decay_gamma': 0.5, 'num_epochs': 60, 'clip_value': 10,
        'pooling': 'avg_max', 'layer_norm': False, 'head_bias': True, 'proxy_init': 'kaiming', 'drop_last': True,
        'recalls': (1, 2, 4, 8, 16, 32)},
}


@pytest.mark.parametrize('recipe', PUBLISHED)
def test_a_recipe_sets_what_its_page_prints(recipe):
    options = parse('--recipe', recipe)
    for name, value in PUBLISHED[recipe].items():
        assert getattr(options, name) == (pytest.approx(value) if isinstance(value, float) else value), name


@pytest.mark.parametrize(('data', 'backbone', 'expected'), [
    ('cub', 'inception', {'lr_decay_step': 10, 'batch_size': 180, 'warm_up': 1, 'freeze_bn': True}),
    ('cub', 'resnet50', {'lr_decay_step': 5, 'batch_size': 120, 'warm_up': 5}),
    ('car', 'inception', {'lr_decay_step': 20, 'batch_size': 180, 'warm_up': 1}),
    ('car', 'resnet50', {'lr_decay_step': 10, 'batch_size': 120, 'warm_up': 5}),
    ('sop', 'inception', {'lr': 6e-4, 'proxy_lr': 6e-2, 'lr_decay_step': 20, 'lr_decay_gamma': 0.25,
                          'freeze_bn': False}),
    ('isc', 'inception', {'lr': 6e-4, 'lr_decay_step': 20, 'lr_decay_gamma': 0.25, 'freeze_bn': False})])
def test_proxy_anchor_follows_data_set_and_backbone(data, backbone, expected):
    expect(parse('--recipe', 'proxy_anchor', '--data_name', data, '--backbone_type', backbone), **expected)


@pytest.mark.parametrize('recipe', RECIPES)
def test_recalls_follow_the_data_set(recipe):
    for data, recalls in (('sop', (1, 10, 100, 1000)), ('isc', (1, 10, 20, 30, 40, 50))):
        assert parse('--recipe', recipe, '--data_name', data).recalls == recalls


def test_asymptotic_proxy_is_softer_and_slower_on_the_large_sets():
    for data in ('sop', 'isc'):
        expect(parse('--loss_name', 'asymptotic_proxy', '--data_name', data), scale=20, lr=4e-5)


def test_a_flag_wins_over_the_recipe():
    expect(parse('--recipe', 'proxy_anchor', '--lr', 0.01, '--num_epochs', 7, '--layer_norm', 1), lr=0.01,
           proxy_lr=1.0, num_epochs=7, layer_norm=True)
    expect(parse('--recipe', 'whitened_mirror'), flip_tta=True, head_init='whiten', proxy_init='mean', color_jitter=0)
    expect(parse('--recipe', 'whitened_mirror', '--flip_tta', 0, '--color_jitter', 0.5), flip_tta=False,
           color_jitter=0.5)


def test_a_loss_chooses_the_recipe_of_its_name():
    assert parse('--loss_name', 'proxy_anchor').recipe == 'proxy_anchor'
    assert parse('--loss_name', 'cos_face').recipe == parse().recipe == 'balanced_proxy'


def test_scale_and_margin_are_those_of_the_loss_unless_the_recipe_of_that_loss_sets_them():
    expect(parse('--loss_name', 'cos_face'), scale=64, margin=0.35)
    expect(parse('--loss_name', 'cos_face', '--margin', 0.3, '--scale', 8), scale=8, margin=0.3)
    expect(parse('--recipe', 'asymptotic_proxy', '--data_name', 'sop'), scale=20)
    expect(parse('--recipe', 'asymptotic_proxy', '--loss_name', 'proxy_nca', '--data_name', 'sop'), scale=9)
    expect(parse('--recipe', 'whitened_mirror'), scale=32, margin=None)
    expect(parse('--recipe', 'whitened_mirror', '--loss_name', 'arc_face'), scale=64, margin=0.5, flip_tta=True)


def test_what_a_recipe_says_of_the_start_gives_way_to_a_model_and_to_losses_with_weights_of_their_own(monkeypatch):
    monkeypatch.setitem(RECIPES['proxy_anchor'], 'settings', RECIPES['proxy_anchor']['settings'] | {
        'head_init': 'whiten', 'proxy_init': 'mean'})
    words = ('--recipe', 'proxy_anchor')
    assert parse(*words).head_init == 'whiten'
    expect(parse(*words, '--init', 'a_model.pth'), head_init='random', proxy_init='mean', weights='none')
    expect(parse(*words, '--loss_name', 'pml:SupConLoss'), head_init='whiten', proxy_init='unit')
    expect(parse(*words, '--proxy_update', 'momentum', '--proxy_init', 'unit'), proxy_update='momentum',
           proxy_init='unit')
    with pytest.raises(UserError, match='--head_init whiten and --init contradict each other'):
        parse(*words, '--init', 'a_model.pth', '--head_init', 'whiten')


@pytest.mark.parametrize(('words', 'backbone_lr', 'proxy_lr'), [
    ((), 0.2, 20.0), (('--backbone_lr', 0.01), 0.01, 20.0), (('--proxy_lr', 3), 0.2, 3.0),
    (('--recipe', 'transformer'), 0.02, 20.0)])
def test_the_rates_of_backbone_and_proxies_are_multiples_of_lr_unless_they_are_given(words, backbone_lr, proxy_lr):
    expect(parse('--lr', 0.2, *words), lr=0.2, backbone_lr=backbone_lr, proxy_lr=proxy_lr)


# ---------------------------------------------------- second names ------------------------------------------------
def test_second_names_mean_the_same():
    theirs = parse('--loss', 'Proxy_Anchor', '--model', 'bn_inception', '--embedding-size', 256, '--batch-size', 30,
                   '--lr', 0.1, '--dataset', 'Inshop', '--warm', 3, '--bn-freeze', 1, '--lr-decay-step', 7,
                   '--lr-decay-gamma', 0.3, '--alpha', 16, '--mrg', 0.2, '--IPC', 2, '--epochs', 4, '--gpu-id', -1,
                   '--workers', 1, '--optimizer', 'SGD', '--weight-decay', 0.5, '--remark', 'x')
    ours = parse('--loss_name', 'proxy_anchor', '--backbone_type', 'inception', '--feature_dim', 256,
                 '--batch_size', 30, '--lr', 0.1, '--data_name', 'isc', '--warm_up', 3, '--freeze_bn', 1,
                 '--lr_decay_step', 7, '--lr_decay_gamma', 0.3, '--scale', 16, '--margin', 0.2,
                 '--images_per_class', 2, '--num_epochs', 4, '--device', 'cpu', '--num_workers', 1,
                 '--optimizer_type', 'sgd', '--weight_decay', 0.5, '--remark', 'x')
    assert theirs == ours


@pytest.mark.parametrize(('given', 'name'), [
    ('cars', 'car'), ('SOP', 'sop'), ('Inshop', 'isc'), ('CUB_200_2011', 'cub')])
def test_data_sets_answer_to_their_second_names(given, name):
    assert parse('--dataset', given).data_name == name


@pytest.mark.parametrize(('words', 'update', 'optimizer'), [
    (('--optimizer_type', 'adam*'), 'momentum', 'adam'), (('--optimizer_type', 'sgd*'), 'momentum', 'sgd'),
    (('--recipe', 'momentum_proxy'), 'momentum', 'adam'),
    (('--recipe', 'momentum_proxy', '--optimizer_type', 'adam'), 'gradient', 'adam'),
    (('--recipe', 'whitened_mirror', '--optimizer_type', 'sgd'), 'positive', 'sgd'),
    (('--recipe', 'momentum_proxy', '--proxy_update', 'positive'), 'positive', 'adam'),
    (('--loss_name', 'positive_proxy'), 'positive', 'adamw'),
    (('--recipe', 'positive_proxy', '--loss_name', 'normalized_softmax'), 'gradient', 'adamw')])
def test_the_proxy_update_can_be_given_in_three_ways(words, update, optimizer):
    options = parse(*words)
    assert (options.proxy_update, options.optimizer_type) == (update, optimizer)


# ---------------------------------------------------- refusals ----------------------------------------------------
@pytest.mark.parametrize(('words', 'parts'), [
    (('--momentum', 0.6), ('--recipe asymptotic_proxy', '--recipe momentum_proxy')),
    (('--recipe', 'balanced'), ("did you mean 'balanced_proxy'", 'there are: balanced_proxy, asymptotic_proxy')),
    (('--loss_name', 'arcface'), ("did you mean 'arc_face'",)),
    (('--backbone_type', 'resnet52'), ("did you mean 'resnet50'",)),
    (('--optimizer_type', 'adamm'), ('adamw, adam, sgd',)),
    (('--loss_name', 'asymptotic_proxy', '--proxy_update', 'gradient'), ('--loss_name normalized_softmax',)),
    (('--loss_name', 'positive_proxy', '--optimizer_type', 'adam*'), ('contradict',)),
    (('--loss_name', 'proxy_nca', '--momentum', 0.5), ('--momentum 0.5 has no effect', '--proxy_update momentum')),
    (('--loss_name', 'normalized_softmax', '--margin', 0.1), ('--margin 0.1 has no effect',)),
    (('--recipe', 'momentum_proxy', '--proxy_lr', 0.1), ('--proxy_lr 0.1 has no effect',)),
    (('--scale', 32, '--temperature', 0.03), ('--scale 32.0 and --temperature 0.03',)),
    (('--lr_schedule', 'cosine', '--lr_decay_step', 3), ('--lr_decay_step 3 has no effect',)),
    (('--lr_schedule', 'step', '--lr_milestones', '0.5'), ('--lr_milestones', 'has no effect')),
    (('--lr_schedule', 'constant', '--lr_decay_gamma', 0.1), ('--lr_decay_gamma 0.1 has no effect',)),
    (('--images_per_class', 4, '--drop_last', 1), ('--drop_last', 'no effect')),
    (('--recalls', '4,2'), ('ascending',)), (('--recalls', '0,2'), ('positive',)),
    (('--recalls', 'a'), ('--recalls', 'whole numbers')), (('--recalls', '2,2'), ('ascending',)),
    (('--recalls', '2,4'), ('--recalls 2,4 must begin with 1',)),
    (('--feature_dim', 0), ('--feature_dim 0 must lie between 1',)), (('--num_epochs', 0), ('--num_epochs 0',)),
    (('--batch_size', 0), ('--batch_size 0',)), (('--lr', -1), ('--lr -1.0 must lie between',)),
    (('--lr', 'nan'), ('--lr nan must lie between',)), (('--temperature', 0), ('--temperature 0.0',)),
    (('--recipe', 'asymptotic_proxy', '--momentum', 1.5), ('--momentum 1.5 must lie between',)),
    (('--resume', '--overwrite'), ('contradict',)), (('--resize_size', 100), ('--resize_size 100',)),
    (('--lr_milestones', '0.8,0.5', '--lr_schedule', 'multistep'), ('ascending fractions',)),
    (('--batchsize', 3), ('--batchsize is not a flag', "did you mean '--batch_size'")),
    (('--margin', 'nan'), ('--margin nan must lie between',)),
    (('--loss_name', 'arc_face', '--margin', 28.6), ('--margin 28.6 must lie between 0 and 2',)),
    (('--seed', 10**20), ('--seed',)),
    (('--recipe', 'asymptotic_proxy', '--proxy_init', 'unit'), ('--proxy_init unit has no effect',)),
    (('--data_name', '../etc'), ('--data_name', 'folder name')), (('--min_crop', 0), ('--min_crop 0.0',)),
    (('--resize_size', 0, '--cache_size', 100), ('--cache_size 100', '224 pixels of a test image')),
    (('--color_jitter', 1.5), ('--color_jitter 1.5',)), (('--grayscale', -1), ('--grayscale -1.0',)),
    (('--seeds', '1'), ('--seeds',)), (('--seeds', '1,1'), ('--seeds',)),
    (('--seeds', '1,2', '--seed', 3), ('contradict',)), (('--val_ratio', 1), ('--val_ratio 1',)),
    (('--init', 'a_model.pth', '--weights', 'imagenet'), ('--init and --weights contradict',)),
    (('--num_epochs', 2), ('--num_epochs 2 ends within the warm-up', '--warm_up 0', '--warm_up 2')),
    (('--log_to', 'tensorbord'), ('--log_to', "did you mean 'tensorboard'")),
    (('--layer_norm', 2), ('must be 0 or 1',))])
def test_bad_settings_name_flag_value_and_remedy(words, parts):
    with pytest.raises(UserError) as error:
        parse(*words)
    assert '\n' not in str(error.value)
    for part in parts:
        assert part in str(error.value)


SPLIT = {'train': {label: list('0123') for label in 'abc'}, 'test': {label: list('0123') for label in 'de'}}


@pytest.mark.parametrize(('words', 'processes', 'part'), [
    ((), 1, None), (('--batch_size', 11), 1, 'add --drop_last 1, or choose another size'),
    (('--batch_size', 1), 1, '--batch_size 1 leaves a batch of one image'),
    (('--batch_size', 11, '--drop_last', 1), 1, None),
    (('--batch_size', 4, '--images_per_class', 2), 8, '--batch_size 4 of 12 images leaves a batch with no image'),
    (('--batch_size', 10, '--images_per_class', 2), 4, None),
    (('--batch_size', 10, '--freeze_bn', 1), 3, '--batch_size 10 of 12 images leaves a batch with no image'),
    (('--batch_size', 10), 2, 'or of one in a process'), (('--batch_size', 10, '--drop_last', 1), 2, None),
    (('--batch_size', 4, '--images_per_class', 2), 4, 'no BatchNorm statistics; choose another size')])
def test_batches_too_small_for_batchnorm_or_the_processes_are_refused(monkeypatch, words, processes, part):
    options = parse('--data_name', 'car', '--recalls', 1, '--freeze_bn', 0, *words)
    monkeypatch.setattr(options_module, 'world_size', lambda: processes)
    with pytest.raises(UserError, match=part) if part else nullcontext():
        check_data(options, SPLIT, torch.device('cpu'), options.drop_last or options.images_per_class > 0)


@pytest.mark.parametrize(('split', 'words', 'part'), [
    ({'test': {'c': ['2', '3']}}, (), '--data_name car has one test class'),
    ({'test': {'c': ['2'], 'd': ['3']}}, (), 'no test class has two images'),
    ({'train': {'a': ['1', '2']}}, (), '--data_name car has one training class'),
    ({}, ('--recalls', '1,8'), 'R@8 asks for more than the 7 images'),
    ({}, ('--compile',), '--compile needs a C[+][+] compiler')])
def test_data_or_a_machine_that_a_run_cannot_use_are_refused(monkeypatch, split, words, part):
    monkeypatch.setenv('CXX', 'no-such-compiler')
    options = parse('--data_name', 'car', '--recalls', 1, *words)
    with pytest.raises(UserError, match=part):
        check_data(options, {**SPLIT, **split}, torch.device('cpu'), False)


# ---------------------------------------------------- runs --------------------------------------------------------
@pytest.mark.parametrize(('words', 'name'), [
    ((), 'car_resnet50_balanced_proxy_512'),
    (('--data_name', 'cub', '--backbone_type', 'inception', '--feature_dim', 256), 'cub_inception_balanced_proxy_256'),
    (('--recipe', 'asymptotic_proxy', '--temperature', 0.05), 'car_resnet50_asymptotic_proxy_512_t0.05'),
    (('--recipe', 'asymptotic_proxy', '--momentum', 0.9), 'car_resnet50_asymptotic_proxy_512_m0.9'),
    (('--recipe', 'momentum_proxy'), 'car_resnet50_proxy_nca_512_momentum_proxy'),
    (('--proxy_update', 'positive', '--remark', 'My Run!'), 'car_resnet50_balanced_proxy_512_positive_my-run-'),
    (('--crop_type', 'cropped', '--seed', 3), 'car_resnet50_balanced_proxy_512_cropped_seed3'),
    (('--margin', 0.3, '--val_ratio', 0.2), 'car_resnet50_balanced_proxy_512_d0.3_val0.2'),
    (('--loss_name', 'pml:SoftTripleLoss', '--loss_args', 'centers_per_class=3,margin=0.02'),
     'car_resnet50_pml-softtripleloss_512_centers_per_class-3-margin-0.02'),
    (('--loss_name', 'pml:SupConLoss', '--miner', 'BatchHardMiner'),
     'car_resnet50_pml-supconloss_512_batchhardminer'),
    (('--backbone_type', 'timm:vit_small_patch16_224.dino'), 'car_timm-vit_small_patch16_224.dino_balanced_proxy_512')])
def test_run_names_hold_loss_update_seed_and_remark(words, name):
    assert parse(*words).run == name


def test_seeds_are_runs_that_differ_in_seed_and_name_alone():
    runs = parse_options(['--seeds', '5,0,7', '--lr', '0.1'])
    assert [(options.seed, options.run) for options in runs] == [
        (5, 'car_resnet50_balanced_proxy_512_seed5'), (0, 'car_resnet50_balanced_proxy_512'),
        (7, 'car_resnet50_balanced_proxy_512_seed7')]
    assert {dataclasses.replace(options, seed=0, run='') for options in runs} == {
        dataclasses.replace(runs[0], seed=0, run='')}
    assert name_of_seeds(runs) == 'car_resnet50_balanced_proxy_512'


def test_options_are_frozen_and_know_the_flags_that_were_given():
    options = parse('--lr', 0.1, '--overwrite')
    assert {'lr', 'overwrite'} <= set(options.explicit_flags)
    assert not {'scale', 'momentum', 'num_epochs', 'seed'} & set(options.explicit_flags)
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.lr = 0.2


def test_the_command_line_is_read_without_waiting_for_torch_or_pillow():
    words = ('-c', 'import sys; from training.options import get_parser; get_parser(); print(*sys.modules)')
    result = subprocess.run([sys.executable, *words], cwd=REPOSITORY, check=True, capture_output=True, text=True)
    imported = set(result.stdout.split())
    assert 'argparse' in imported
    assert not imported & {'torch', 'numpy', 'pandas', 'PIL', 'matplotlib'}


@pytest.mark.parametrize('recipe', RECIPES)
def test_every_recipe_can_be_combined_with_every_loss_optimizer_and_schedule(recipe):
    network = torch.nn.Module()
    network.backbone, network.head = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    network.mean = torch.zeros(3)
    for optimizer in OPTIMIZER_NAMES:
        for schedule in SCHEDULE_NAMES:
            options = parse('--recipe', recipe, '--optimizer_type', optimizer, '--lr_schedule', schedule)
            criterion = make_loss('cos_face', num_classes=3, feature_dim=2, proxy_update=options.proxy_update)
            built = train.build_optimizer(network, criterion, options)
            train.build_schedule(built, options)
            assert type(built).__name__.lower() == optimizer
    for loss in LOSSES:
        options = parse('--recipe', recipe, '--loss_name', loss)
        assert train.build_criterion(options, 3, 2).scale == options.scale


@pytest.mark.parametrize(('words', 'is_measured'), [
    ((), True), (('--weights', 'w.pth'), True), (('--weights', 'none'), False), (('--init', 'm.pth'), False),
    (('--pretrained_baseline', 0), False), (('--weights', 'none', '--pretrained_baseline', 1), True)])
def test_the_backbone_is_measured_before_the_training_unless_its_weights_are_random_or_a_runs(words, is_measured):
    assert parse(*words).pretrained_baseline is is_measured
