"""Recipes, second names, contradictions and flags without effect: what a command line means."""
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
import trunks
from conftest import REPOSITORY

import model
import recipes
import train
from common.errors import UserError
from recipes import RECIPES
from training.options import parse_options


def settle(*words):
    return vars(parse_options([str(word) for word in words])[1][0])


def expect(settings, **expected):
    assert {name: settings[name] for name in expected} == pytest.approx(expected)


# One line per recipe, as the papers' own pages print it.
PUBLISHED = {
    'balanced_proxy': {
        'base_loss': 'balanced_proxy', 'proxy_update': 'gradient', 'scale': 32, 'margin': 0.1,
        'optimizer_type': 'adamw', 'lr': 1e-4, 'proxy_lr': 1e-2, 'weight_decay': 1e-4, 'lr_schedule': 'step',
        'lr_decay_step': 5, 'lr_decay_gamma': 0.5, 'batch_size': 64, 'num_epochs': 20, 'warm_up': 2, 'clip_value': 0,
        'image_size': 224,
        'resize_size': 256, 'feature_dim': 512, 'drop_last': False, 'pooling': 'max', 'layer_norm': True,
        'head_bias': False, 'proxy_init': 'unit', 'freeze_bn': True},
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
    settings = settle('--recipe', recipe)
    for name, value in PUBLISHED[recipe].items():
        assert settings[name] == (pytest.approx(value) if isinstance(value, float) else value), name


@pytest.mark.parametrize(('data', 'trunk', 'expected'), [
    ('cub', 'inception', {'lr_decay_step': 10, 'batch_size': 180, 'warm_up': 1, 'freeze_bn': True}),
    ('cub', 'resnet50', {'lr_decay_step': 5, 'batch_size': 120, 'warm_up': 5}),
    ('car', 'inception', {'lr_decay_step': 20, 'batch_size': 180, 'warm_up': 1}),
    ('car', 'resnet50', {'lr_decay_step': 10, 'batch_size': 120, 'warm_up': 5}),
    ('sop', 'inception', {'lr': 6e-4, 'proxy_lr': 6e-2, 'lr_decay_step': 20, 'lr_decay_gamma': 0.25,
                          'freeze_bn': False}),
    ('isc', 'inception', {'lr': 6e-4, 'lr_decay_step': 20, 'lr_decay_gamma': 0.25, 'freeze_bn': False})])
def test_proxy_anchor_follows_data_set_and_trunk(data, trunk, expected):
    expect(settle('--recipe', 'proxy_anchor', '--data_name', data, '--backbone_type', trunk), **expected)


@pytest.mark.parametrize('recipe', RECIPES)
def test_recalls_follow_the_data_set(recipe):
    for data, recalls in (('sop', (1, 10, 100, 1000)), ('isc', (1, 10, 20, 30, 40, 50))):
        assert settle('--recipe', recipe, '--data_name', data)['recalls'] == recalls


def test_asymptotic_proxy_is_softer_and_slower_on_the_large_sets():
    for data in ('sop', 'isc'):
        expect(settle('--loss_name', 'asymptotic_proxy', '--data_name', data), scale=20, lr=4e-5)


def test_a_flag_wins_over_the_recipe():
    expect(settle('--recipe', 'proxy_anchor', '--lr', 0.01, '--num_epochs', 7, '--layer_norm', 1), lr=0.01,
           proxy_lr=1.0, num_epochs=7, layer_norm=True)


def test_a_loss_chooses_the_recipe_of_its_name():
    assert settle('--loss_name', 'proxy_anchor')['recipe'] == 'proxy_anchor'
    assert settle('--loss_name', 'cos_face')['recipe'] == settle()['recipe'] == 'balanced_proxy'
    expect(settle('--loss_name', 'cos_face'), scale=64, margin=0.35)
    expect(settle('--recipe', 'asymptotic_proxy', '--loss_name', 'proxy_nca', '--data_name', 'sop'), scale=9)


def test_scale_and_margin_of_a_recipe_are_those_of_its_loss_only():
    expect(settle('--recipe', 'whitened_margin'), scale=32, margin=0.1, min_crop=0.2)
    expect(settle('--recipe', 'whitened_margin', '--margin', 0.3, '--scale', 8, '--min_crop', 0.5), scale=8, margin=0.3,
           min_crop=0.5)
    expect(settle('--recipe', 'whitened_margin', '--loss_name', 'arc_face'), scale=64, margin=0.5, min_crop=0.2)
    assert settle('--recipe', 'whitened_margin', '--loss_name', 'proxy_nca')['margin'] is None
    expect(settle('--recipe', 'whitened_mirror'), scale=32, margin=None, mirror=True)
    expect(settle('--recipe', 'whitened_mirror', '--flip_tta', 0, '--color_jitter', 0.5), mirror=False, color_jitter=0.5)
    assert settle('--recipe', 'whitened_start')['margin'] is None


def test_second_names_mean_the_same():
    theirs = settle('--loss', 'Proxy_Anchor', '--model', 'bn_inception', '--embedding-size', 256, '--batch-size', 30,
                    '--lr', 0.1, '--dataset', 'Inshop', '--warm', 3, '--bn-freeze', 1, '--lr-decay-step', 7,
                    '--lr-decay-gamma', 0.3, '--alpha', 16, '--mrg', 0.2, '--IPC', 2, '--epochs', 4, '--gpu-id', -1,
                    '--workers', 1, '--optimizer', 'SGD', '--weight-decay', 0.5, '--remark', 'x')
    ours = settle('--loss_name', 'proxy_anchor', '--backbone_type', 'inception', '--feature_dim', 256,
                  '--batch_size', 30, '--lr', 0.1, '--data_name', 'isc', '--warm_up', 3, '--freeze_bn', 1,
                  '--lr_decay_step', 7, '--lr_decay_gamma', 0.3, '--scale', 16, '--margin', 0.2,
                  '--images_per_class', 2, '--num_epochs', 4,
                  '--device', 'cpu', '--num_workers', 1, '--optimizer_type', 'sgd', '--weight_decay', 0.5,
                  '--remark', 'x')
    assert theirs == ours


@pytest.mark.parametrize(('given', 'name'), [
    ('cars', 'car'), ('SOP', 'sop'), ('Inshop', 'isc'), ('CUB_200_2011', 'cub')])
def test_data_sets_answer_to_their_second_names(given, name):
    assert settle('--dataset', given)['data_name'] == name


@pytest.mark.parametrize(('words', 'rule', 'optimizer'), [
    (('--optimizer_type', 'adam*'), 'momentum', 'adam'), (('--optimizer_type', 'sgd*'), 'momentum', 'sgd'),
    (('--recipe', 'momentum_proxy'), 'momentum', 'adam'),
    (('--recipe', 'momentum_proxy', '--optimizer_type', 'adam'), 'gradient', 'adam'),
    (('--recipe', 'whitened_margin', '--optimizer_type', 'sgd'), 'positive', 'sgd'),
    (('--recipe', 'momentum_proxy', '--proxy_update', 'positive'), 'positive', 'adam'),
    (('--loss_name', 'positive_proxy'), 'positive', 'adamw'),
    (('--recipe', 'positive_proxy', '--loss_name', 'normalized_softmax'), 'gradient', 'adamw')])
def test_the_rule_of_the_proxies_can_be_said_in_three_ways(words, rule, optimizer):
    settings = settle(*words)
    assert (settings['proxy_update'], settings['optimizer_type']) == (rule, optimizer)


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
    (('--feature_dim', 0), ('--feature_dim 0 must lie between 1',)), (('--num_epochs', 0), ('--num_epochs 0',)),
    (('--batch_size', 0), ('--batch_size 0',)), (('--lr', -1), ('--lr -1.0 must lie between',)),
    (('--lr', 'nan'), ('--lr nan must lie between',)), (('--temperature', 0), ('--temperature 0.0',)),
    (('--recipe', 'asymptotic_proxy', '--momentum', 1.5), ('--momentum 1.5 must lie between',)),
    (('--resume', '--overwrite'), ('contradict',)), (('--resize_size', 100), ('--resize_size 100',)),
    (('--lr_milestones', '0.8,0.5', '--lr_schedule', 'multistep'), ('ascending fractions',)),
    (('--batchsize', 3), ('--batchsize is no flag', "did you mean '--batch_size'")),
    (('--margin', 'nan'), ('--margin nan must lie between',)), (('--seed', 10**20), ('--seed',)),
    (('--recipe', 'asymptotic_proxy', '--proxy_init', 'unit'), ('--proxy_init unit has no effect',)),
    (('--data_name', '../etc'), ('no plain folder name',)), (('--min_crop', 0), ('--min_crop 0.0',)),
    (('--resize_size', 0, '--cache_size', 100), ('--cache_size 100', '224 pixels of a test image')),
    (('--color_jitter', 1.5), ('--color_jitter 1.5',)), (('--grayscale', -1), ('--grayscale -1.0',))])
def test_bad_settings_name_flag_value_and_remedy(words, parts):
    with pytest.raises(UserError) as error:
        settle(*words)
    assert '\n' not in str(error.value)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(('words', 'name'), [
    ((), 'car_resnet50_balanced_proxy_512'),
    (('--data_name', 'cub', '--backbone_type', 'inception', '--feature_dim', 256), 'cub_inception_balanced_proxy_256'),
    (('--recipe', 'asymptotic_proxy', '--temperature', 0.05), 'car_resnet50_asymptotic_proxy_512_t0.05'),
    (('--recipe', 'asymptotic_proxy', '--momentum', 0.9), 'car_resnet50_asymptotic_proxy_512_m0.9'),
    (('--recipe', 'momentum_proxy'), 'car_resnet50_proxy_nca_512_momentum_proxy'),
    (('--proxy_update', 'positive', '--remark', 'My Run!'), 'car_resnet50_balanced_proxy_512_positive_my-run-'),
    (('--crop_type', 'cropped', '--seed', 3), 'car_resnet50_balanced_proxy_512_cropped_seed3'),
    (('--backbone_type', 'timm:vit_small_patch16_224.dino'), 'car_timm-vit_small_patch16_224.dino_balanced_proxy_512')])
def test_run_names_hold_loss_rule_seed_and_remark(words, name):
    assert settle(*words)['run'] == name


def test_the_help_comes_without_waiting_for_torch():
    result = subprocess.run([sys.executable, '-X', 'importtime', REPOSITORY / 'train.py', '--help'], check=True,
                            capture_output=True, text=True)
    imported = {line.rsplit('|', 1)[1].strip() for line in result.stderr.splitlines() if line.startswith('import time')}
    assert 'argparse' in imported
    assert not imported & {'torch', 'numpy', 'pandas', 'PIL', 'matplotlib'}
    assert 'train.py --recipe asymptotic_proxy --feature_dim 1024' in result.stdout


def test_every_registered_name_is_built_in_the_code():
    for entry in recipes.LOSSES.values():
        assert issubclass(getattr(model, entry.class_name), model.ProxyLoss)
    for builder in recipes.TRUNKS.values():
        assert callable(getattr(trunks, builder))
    for recipe in RECIPES:
        for optimizer in recipes.OPTIMIZER_NAMES:
            for schedule in recipes.SCHEDULE_NAMES:
                args = parse_options(['--recipe', recipe, '--optimizer_type', optimizer, '--lr_schedule', schedule])[1][0]
                network = torch.nn.Sequential(OrderedDict(trunk=torch.nn.Linear(2, 2), refactor=torch.nn.Linear(2, 2)))
                criterion = model.make_loss('cos_face', num_classes=3, feature_dim=2, proxy_update=args.proxy_update)
                train.build_schedule(train.build_optimizer(network, criterion, args), args).step()
