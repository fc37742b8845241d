"""How a run is claimed, continues from its checkpoint, and starts from the model of another one."""
import shlex
import signal
from contextlib import nullcontext

import pytest
import torch
from faults import RULES, differing_results
from tiny_runs import NAME, options_of, train_tiny
from torch import nn

import train
from common.errors import UserError
from common.files import load, save
from common.results import RunFiles
from imagedata.loading import open_data
from model import EmbeddingNet, NetConfig, make_loss
from training.checkpoint import (CHANGEABLE, claim_run, command_of, load_checkpoint, load_checkpoint_file,
                                 load_initial_weights, restore, save_checkpoint, settings_of)
from training.options import parse_options
from utils import Terminated, catch_signals

SPLIT = {'train': {'a': ['1.jpg', '2.jpg'], 'b': ['3.jpg']}, 'test': {'c': ['4.jpg', '5.jpg']}}


# ---------------------------------------------------- checkpoints ------------------------------------------------
def make_parts(seed: int) -> dict:
    """Return a network, a criterion, an optimizer and a schedule."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 4))
    criterion = make_loss('proxy_nca', num_classes=3, feature_dim=4)
    optimizer = torch.optim.AdamW([{'params': list(model.parameters())}, {'params': list(criterion.parameters())}])
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.1)
    return {'model': model, 'criterion': criterion, 'optimizer': optimizer, 'schedule': schedule}


def take_step(model, criterion, optimizer, schedule) -> list[torch.Tensor]:
    """Train one epoch of one random batch; returns the parameters, buffers and learning rates after it."""
    embeddings = nn.functional.normalize(model(torch.randn(6, 3)), dim=-1)
    optimizer.zero_grad()
    criterion(embeddings, torch.randint(3, (6,))).backward()
    optimizer.step()
    schedule.step()
    return [tensor.clone() for part in (model, criterion) for tensor in part.state_dict().values()] + [
        torch.tensor(group['lr']) for group in optimizer.param_groups]


def test_what_is_restored_goes_on_as_what_was_saved(tmp_path):
    file, parts = tmp_path / 'run_checkpoint.pth', make_parts(0)
    take_step(**parts)
    row = {'epoch': 1, 'lr': 0.1, 'proxy_lr': 0.1, 'dense_R@1': 50.0, 'binary_R@1': 40.0}
    save_checkpoint(file, *parts.values(), [row], SPLIT, {'args': {}, 'epoch': 1, 'made_with': {}})
    expected = [take_step(**parts) for _ in range(2)]  # the second one at another learning rate
    others = make_parts(1)
    take_step(**others)
    restore(load_checkpoint_file(file), file, *others.values())
    for epoch in expected:
        assert all(torch.equal(*pair) for pair in zip(epoch, take_step(**others), strict=True))


@pytest.mark.parametrize('spoil', [
    lambda contents: contents['optimizer']['state'][0].update(exp_avg=torch.zeros(2, 2)),
    lambda contents: contents['model'].pop('0.weight'), lambda contents: contents.update(rng=torch.zeros(3).byte()),
    lambda contents: contents['criterion'].update(proxies=torch.zeros(7, 4)),
    lambda contents: contents['optimizer']['param_groups'].pop()])
def test_a_checkpoint_of_other_shapes_is_damaged(tmp_path, spoil):
    file, parts = tmp_path / 'run_checkpoint.pth', make_parts(0)
    take_step(**parts)
    save_checkpoint(file, *parts.values(), [{'epoch': 1}], SPLIT, {'args': {}, 'epoch': 1})
    contents = load_checkpoint_file(file)
    spoil(contents)
    with pytest.raises(UserError, match=r'run_checkpoint\.pth is damaged .* start again with --overwrite'):
        restore(contents, file, *make_parts(0).values())


@pytest.mark.parametrize(('change', 'field'), [
    ({'epoch': 0}, 'epoch'), ({'version': 2}, 'version'), ({'epoch': 3}, 'rows'), ({'rows': [{'epoch': '1'}]}, 'rows'),
    ({'optimizer': []}, 'optimizer'), ({'rng': torch.zeros(5)}, 'rng')])
def test_a_checkpoint_whose_parts_have_other_types_is_refused(tmp_path, change, field):
    file, parts = tmp_path / 'run_checkpoint.pth', make_parts(0)
    save_checkpoint(file, *parts.values(), [{'epoch': 1}], SPLIT, {'args': {}, 'epoch': 1})
    save({**load(file, 'checkpoint'), **change}, file)
    with pytest.raises(UserError, match=f'is not a valid checkpoint: {field}'):
        load_checkpoint_file(file)


# ---------------------------------------------------- resumed runs -----------------------------------------------
def stop_in_epoch(number: int, monkeypatch, stop) -> None:
    """Call `stop` when the epoch of that number begins, once."""
    train_one_epoch, epochs = train.train_one_epoch, []

    def interrupted(*args):
        epochs.append(args)
        if len(epochs) == number:
            stop()
        return train_one_epoch(*args)

    monkeypatch.setattr(train, 'train_one_epoch', interrupted)


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize('update', RULES)
def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(update, raw_sets, tmp_path, monkeypatch):
    """Interrupted at the end of the warm-up: weights, proxies, optimizer, statistics and data base."""
    words = (*RULES[update], '--num_epochs', 2, '--proxy_init', 'mean', '--lr_schedule', 'cosine')
    whole = train_tiny(raw_sets, tmp_path / 'whole', *words)
    stop_in_epoch(2, monkeypatch, interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_tiny(raw_sets, tmp_path / 'cut', *words)
    cut = train_tiny(raw_sets, tmp_path / 'cut', *words, '--resume')
    assert not differing_results(whole, cut)


def test_files_of_a_run_hold_no_folders_and_nothing_that_may_change(trained_run, raw_sets):
    options = options_of(raw_sets, trained_run, '--num_epochs', 1, '--weights', raw_sets / 'w.pth')
    settings = settings_of(options)
    assert settings['weights'] == 'w.pth'
    assert not set(CHANGEABLE) & settings.keys()
    assert not any(str(value).startswith('/') for value in settings.values())
    contents = load(trained_run / f'{NAME}_checkpoint.pth', 'checkpoint')
    assert contents['args'].keys() == settings.keys()


@pytest.mark.parametrize('words', [
    (), ('--recipe', 'proxy_anchor', '--data_name', 'sop', '--seed', 3), ('--lr', 3e-4, '--recalls', '1,3'),
    ('--loss_name', 'cos_face', '--proxy_update', 'positive', '--temperature', 0.03125, '--margin', 0.2),
    ('--recipe', 'asymptotic_proxy', '--momentum', 0.7, '--compile', '--flip_tta', 1, '--layer_norm', 0),
    ('--recipe', 'positive_proxy', '--proxy_lr', 0.5, '--backbone_lr', 1e-6, '--lr_schedule', 'cosine'),
    ('--clip_value', 5, '--weight_decay', 0.01, '--drop_last', 1, '--resize_size', 0,
     '--val_ratio', 0.2, '--eval_every', 2, '--pooling', 'gem', '--head_init', 'whiten', '--proxy_init', 'mean',
     '--lr_decay_step', 3, '--lr_decay_gamma', 0.3, '--flip', 0, '--min_crop', 0.5, '--color_jitter', 0.3,
     '--grayscale', 0.1, '--cache_size', 300, '--warm_up', 1, '--optimizer_type', 'adam', '--amp', 'off'),
    ('--loss_name', 'pml:TripletMarginLoss', '--loss_args', 'margin=0.1', '--miner', 'TripletMarginMiner')])
def test_the_command_of_a_run_gives_its_settings(words):
    [options] = parse_options([*map(str, words)])
    command = shlex.split(command_of(options))
    assert command[:2] == ['python', 'train.py']
    [again] = parse_options([*command[2:], '--seed', str(options.seed)])
    same = {'run': again.run, 'temperature': options.temperature}  # the scale says the same as the temperature
    assert settings_of(again) | same == settings_of(options) | same


def test_the_command_of_a_run_names_what_differs_from_its_recipe_alone():
    [options] = parse_options(['--data_name', 'cub', '--lr', '0.5', '--num_workers', '3', '--results_dir', '/tmp/x'])
    assert command_of(options) == ('python train.py --recipe balanced_proxy --data_name cub --backbone_type resnet50 '
                                   '--loss_name balanced_proxy --proxy_update gradient --backbone_lr 0.5 --lr 0.5 '
                                   '--proxy_lr 50.0')


@pytest.mark.parametrize(('words', 'message'), [
    (('--lr', 0.5), r'--lr 0\.5 \(was 0\.0001\)'), (('--recalls', '1,3'), r'--recalls \(1, 3\) \(was \(1, 2\)\)'),
    (('--grayscale', 0.5), r'--grayscale 0\.5 \(was 0\.0\)'), (('--device', 'cpu', '--num_workers', 2), None),
    (('--num_epochs', 2), None)])
def test_resume_names_the_settings_that_differ(trained_run, raw_sets, words, message):
    options = options_of(raw_sets, trained_run, '--num_epochs', 1, '--warm_up', 0, *words)
    split = open_data(raw_sets, 'car').split
    with pytest.raises(UserError, match=message) if message else nullcontext():
        load_checkpoint(trained_run / f'{NAME}_checkpoint.pth', options, split)
    changed = {**split, 'train': dict(reversed(split['train'].items()))}
    with pytest.raises(UserError, match='the data set car was converted again'):
        load_checkpoint(trained_run / f'{NAME}_checkpoint.pth', options, changed)


def test_a_schedule_that_has_ended_cannot_be_extended(run, raw_sets):
    file = run / f'{NAME}_checkpoint.pth'
    contents = load(file, 'checkpoint')
    contents['args']['lr_schedule'] = 'cosine'
    save(contents, file)
    options = options_of(raw_sets, run, '--num_epochs', 2, '--warm_up', 0, '--lr_schedule', 'cosine')
    with pytest.raises(UserError, match='--num_epochs 2: the schedule cosine .* laid out for 1 epochs'):
        load_checkpoint(file, options, open_data(raw_sets, 'car').split)


# ---------------------------------------------------- a run's claim on its files ---------------------------------
def claim(folder, resume: bool = False, overwrite: bool = False):
    return claim_run(RunFiles(folder, NAME), resume, overwrite)


def test_a_name_that_is_taken_needs_a_word_and_one_that_is_not_cannot_be_resumed(run, tmp_path):
    with pytest.raises(UserError, match=f'a run named {NAME} is in .* --resume .* --remark WORD .* --overwrite'), \
            claim(run):
        pass
    for words in ({'resume': True}, {'overwrite': True}):
        with claim(run, **words):
            pass
    with pytest.raises(UserError, match=r'--resume: there is no .*_checkpoint\.pth; start the run without --resume$'), \
            claim(tmp_path / 'new', resume=True):
        pass
    (run / f'{NAME}_checkpoint.pth').unlink()
    with pytest.raises(UserError, match='start the run without --resume and with --overwrite'), claim(run, resume=True):
        pass


def test_two_processes_cannot_train_one_run_and_what_a_killed_one_left_is_removed(tmp_path):
    torn = tmp_path / f'.{NAME}_model.pth.0123abcd'
    others = [tmp_path / f'.{NAME}_model.pth.012', tmp_path / '.another_model.pth.0123abcd']
    for file in (torn, *others):
        file.touch()
    with claim(tmp_path):
        assert not torn.exists()
        assert all(file.exists() for file in others)
        with pytest.raises(UserError, match='another process .* the run'), claim(tmp_path):
            pass
    with claim(tmp_path):  # it is free again
        pass


@pytest.mark.parametrize('stop', [KeyboardInterrupt, Terminated])
def test_an_interrupted_run_says_what_is_saved(run, tmp_path, stop):
    with pytest.raises(stop, match='no epoch was complete, nothing is saved'), claim(tmp_path / 'new'):
        raise stop
    with pytest.raises(stop, match=f'epoch 1 of {NAME} is saved; the same command with --resume continues it'), \
            claim(run, resume=True):
        raise stop
    with pytest.raises(stop, match=f'the earlier run {NAME} is untouched'), claim(run, overwrite=True):
        raise stop

    def complete_an_epoch():
        save(load(run / f'{NAME}_checkpoint.pth', 'checkpoint'), run / f'{NAME}_checkpoint.pth')
        raise stop

    with pytest.raises(stop, match='with --resume in place of --overwrite continues it'), claim(run, overwrite=True):
        complete_an_epoch()


def test_a_signal_within_an_epoch_keeps_the_epochs_before(raw_sets, tmp_path, monkeypatch):
    stop_in_epoch(2, monkeypatch, lambda: signal.raise_signal(signal.SIGTERM))
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    catch_signals()
    try:
        with pytest.raises(Terminated, match=f'epoch 1 of {NAME} is saved'):
            train_tiny(raw_sets, tmp_path, '--num_epochs', 3)
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers, strict=True):
            signal.signal(number, handler)
    assert len(load_checkpoint_file(tmp_path / f'{NAME}_checkpoint.pth')['rows']) == 1


# ---------------------------------------------------- fine-tuning ------------------------------------------------
def test_a_run_starts_from_the_weights_of_a_model_of_the_same_architecture(trained_run):
    contents = load(trained_run / f'{NAME}_model.pth', 'model')
    model = EmbeddingNet(NetConfig(**{**contents['config'], 'image_size': 64, 'freeze_bn': True}), 'none')
    seen = load_initial_weights(f'{NAME}_model.pth', model, str(trained_run))
    for name, value in model.state_dict().items():
        assert torch.equal(value, contents['state_dict'][name])
    assert seen == contents['seen_classes'] == ['Maker Model 1', 'Maker Model 2', 'Maker Model 98']


def test_the_model_of_another_architecture_is_refused(trained_run, tmp_path):
    file = str(trained_run / f'{NAME}_model.pth')
    config = load(file, 'model')['config']
    with pytest.raises(UserError, match=r'--init .* is another network: --feature_dim 8 \(there 16\)'):
        load_initial_weights(file, EmbeddingNet(NetConfig(**{**config, 'feature_dim': 8}), 'none'), str(tmp_path))
    with pytest.raises(UserError, match=r'--pooling avg \(there max\)'):
        load_initial_weights(file, EmbeddingNet(NetConfig(**{**config, 'pooling': 'avg'}), 'none'), str(tmp_path))
    with pytest.raises(UserError, match=r'--init nowhere\.pth is neither a file nor in'):
        load_initial_weights('nowhere.pth', EmbeddingNet(NetConfig(**config), 'none'), str(tmp_path))
