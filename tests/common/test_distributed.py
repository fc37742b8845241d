"""Several processes equal one: steps of the training, whole runs and evaluations under torchrun."""
import json
import subprocess
import sys

import pandas as pd
import pytest
import torch
from conftest import ENVIRONMENT, REPOSITORY, type_command
from engine import counting
from torch import distributed, multiprocessing

from common.distributed import shard
from common.results import RunFiles
from imagedata.loading import RetrievalDataset
from model import EmbeddingNet, NetConfig, make_loss
from retrieval import metrics
from retrieval.database import load_data_base
from retrieval.embedding import embed_images
from retrieval.model_file import load_model
from train import Learner, distribute, prepare, train_one_epoch
from training.checkpoint import Start
from training.options import parse_options

TINY = ('--backbone_type', 'resnet18', '--feature_dim', 16, '--weights', 'none', '--image_size', 32, '--num_workers', 0,
        '--warm_up', 0,
        '--recalls', '1,2', '--amp', 'off')


def torchrun(count, *words, timeout=200):
    """Run a script in several processes as a user would."""
    engine = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(count)]
    return subprocess.run([*engine, *map(str, words)], cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True,
                          text=True, timeout=timeout, check=False)


# ---------------------------------------------------- steps ---------------------------------------------------------
def train_small(rank: int, size: int, folder, shard_proxies: bool) -> None:
    """Train a ResNet18 in float64 for three epochs, the first one frozen, and save what came out."""
    torch.set_num_threads(1)
    if size > 1:
        distributed.init_process_group('gloo', f'file://{folder}/meet_{size}', rank=rank, world_size=size)
    torch.manual_seed(0)
    model = EmbeddingNet(NetConfig('resnet18', 5), 'none').double()
    criterion = make_loss('proxy_anchor', num_classes=6, feature_dim=5,
                          shard_proxies=shard_proxies and size > 1).double()
    optimizer = torch.optim.AdamW([{'params': list(model.parameters())},
                                   {'params': list(criterion.parameters()), 'lr': 1e-2}], lr=1e-3, weight_decay=1e-2)
    images = torch.randint(0, 256, (14, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(0, 6, (14,))
    batches = []
    for rows in (range(0, 7), range(7, 14)):  # 7 images do not divide by 2
        own = [rows[place] for place in shard(len(rows))]
        batches.append((images[own], labels[own]))
    learner, statistics = Learner(model, criterion, optimizer, torch.device('cpu'), clip_value=0.5), []
    for epoch in (1, 2, 3):
        if epoch < 3:
            learner.network = model
            model.freeze_trunk(epoch == 1)
            learner.network = distribute(model, torch.device('cpu'))
        trained = train_one_epoch(learner, batches, '')
        statistics.append([trained['loss'], trained['accuracy']])
    proxies = criterion.all_proxies()
    if rank == 0:
        torch.save({'model': model.state_dict(), 'proxies': proxies, 'statistics': torch.tensor(statistics)},
                   folder / f'{size}.pth')
    if size > 1:
        distributed.destroy_process_group()


@pytest.mark.parametrize('shard_proxies', [False, True])
def test_two_processes_train_as_one_through_the_end_of_the_warm_up(tmp_path, shard_proxies):
    train_small(0, 1, tmp_path, shard_proxies)
    multiprocessing.spawn(train_small, (2, tmp_path, shard_proxies), nprocs=2)
    one, two = (torch.load(tmp_path / f'{size}.pth', weights_only=True) for size in (1, 2))
    for name, value in one['model'].items():
        torch.testing.assert_close(two['model'][name], value, rtol=1e-10, atol=1e-10, msg=name)
    torch.testing.assert_close(two['proxies'], one['proxies'], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(two['statistics'], one['statistics'], rtol=1e-6, atol=1e-6)  # the meter is float32


# ---------------------------------------------------- metrics --------------------------------------------------------
def measure_shared(rank: int, size: int, folder) -> None:
    """Measure retrieval in tiles of 16 images that the processes share, and save what each of them finds."""
    torch.set_num_threads(1)
    if size > 1:
        distributed.init_process_group('gloo', f'file://{folder}/meet_{size}', rank=rank, world_size=size)
    counting.TILE_SIDE['cpu'], counting.SAMPLED_IMAGES = 16, 20
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 9, (101,), generator=generator)
    features = torch.nn.functional.normalize(torch.randn(101, 12, generator=generator), dim=1)
    found = [metrics.retrieval_metrics(*sets, recalls=(1, 5, 50), binary=binary) for binary in (False, True)
             for sets in ((features, labels), (features[:40], labels[:40], features[40:], labels[40:]))]
    (folder / f'{size}_{rank}.json').write_text(json.dumps(found))
    if size > 1:
        distributed.destroy_process_group()


def test_processes_that_share_the_tiles_find_the_same_to_the_last_digit(tmp_path):
    measure_shared(0, 1, tmp_path)
    for size in (2, 3):
        multiprocessing.spawn(measure_shared, (size, tmp_path), nprocs=size)
    found = [json.loads(file.read_text()) for file in tmp_path.glob('*.json')]
    assert len(found) == 6
    assert all(other == found[0] for other in found)


# ---------------------------------------------------- scripts -------------------------------------------------------
@pytest.fixture(scope='module')
def runs(raw_sets, tmp_path_factory):
    """The same training in one process and in two, and what the two printed."""
    folder = tmp_path_factory.mktemp('processes')
    words = ('train.py', *TINY, '--data_path', raw_sets, '--batch_size', 5, '--num_epochs', 2, '--warm_up', 1,
             '--head_init', 'whiten', '--proxy_init', 'mean')
    one = type_command(*words, '--results_dir', folder / '1')
    two = torchrun(2, *words, '--results_dir', folder / '2')
    assert one.returncode == 0, one.stderr
    assert two.returncode == 0, two.stderr
    return folder, two.stdout


NAME = 'car_resnet18_balanced_proxy_16'


def test_torchrun_gives_the_run_of_one_process_to_rounding(runs):
    one, two = (pd.read_csv(runs[0] / size / f'{NAME}_statistics.csv').drop(columns=['img_s', 'made.processes'])
                for size in '12')
    pd.testing.assert_frame_equal(two, one, rtol=1e-3, atol=1e-3)
    features = [torch.load(runs[0] / size / f'{NAME}_data_base.pth', weights_only=True)['test_features']
                for size in '12']
    torch.testing.assert_close(*features, rtol=1e-3, atol=1e-3)


def test_a_trunk_of_timm_with_parts_that_features_do_not_pass_trains_in_two_processes(raw_sets, tmp_path):
    result = torchrun(2, 'train.py', *TINY, '--data_path', raw_sets, '--batch_size', 4, '--num_epochs', 1, '--warm_up',
                      0, '--backbone_type', 'timm:test_convnext', '--results_dir', tmp_path)
    assert result.returncode == 0, result.stderr


def test_only_the_first_process_prints(runs):
    assert runs[1].count('epoch 1/2: loss') == 1
    assert runs[1].count('next:') == 1


def test_what_processes_with_statistics_of_their_own_measure_is_the_model_that_they_save(raw_sets, tmp_path):
    words = (*TINY, '--data_path', raw_sets, '--batch_size', 6, '--num_epochs', 1, '--freeze_bn', 0, '--drop_last', 1,
             '--results_dir', tmp_path)
    result = torchrun(2, 'train.py', *words)
    assert result.returncode == 0, result.stderr
    model, contents = load_model(tmp_path / f'{NAME}_model.pth')
    data_base = load_data_base(tmp_path / f'{NAME}_data_base.pth')
    images = [raw_sets / 'car' / image for image in data_base.test.images]
    torch.testing.assert_close(embed_images(model, images, contents), data_base.test.features, rtol=0, atol=1e-5)


def start_from_images_in(rank: int, words: list, folder) -> None:
    """Prepare a run in the first or second of two processes, and save its network."""
    torch.set_num_threads(1)
    distributed.init_process_group('gloo', f'file://{folder}/meet', rank=rank, world_size=2)
    training = prepare(parse_options(words)[1][0], Start(RunFiles(folder, 'none'), False, []), torch.device('cpu'))
    torch.save(training.model.state_dict(), folder / f'{rank}.pth')
    distributed.destroy_process_group()


def test_a_start_from_images_is_of_the_statistics_that_all_processes_have(raw_sets, tmp_path):
    words = [str(word) for word in (
        *TINY, '--data_path', raw_sets, '--batch_size', 6, '--freeze_bn', 0, '--head_init', 'whiten',
        '--feature_dim', 4)]
    multiprocessing.spawn(start_from_images_in, (words, tmp_path), nprocs=2)
    one, two = (torch.load(tmp_path / f'{rank}.pth', weights_only=True) for rank in (0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    training = prepare(parse_options(words)[1][0], Start(RunFiles(tmp_path, 'none'), False, []), torch.device('cpu'))
    training.model.load_state_dict(one)
    data, plain = training.data, training.test_loaders['test'].dataset.transform
    images = torch.stack([image for image, _ in RetrievalDataset(data, 'train', plain)])
    with torch.no_grad():
        training.model.whiten(training.model.headless().eval()(images))
    torch.testing.assert_close(training.model.refactor.weight.abs(), one['refactor.weight'].abs(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('count', [2, 3])
def test_evaluation_does_not_depend_on_the_number_of_processes(runs, raw_sets, count):
    words = ('evaluate.py', '--resume', runs[0] / '1' / f'{NAME}_model.pth', '--data_path', raw_sets, '--batch_size', 5,
             '--num_workers', 0, '--json')
    one, several = type_command(*words), torchrun(count, *words)
    assert several.returncode == 0, several.stderr
    assert json.loads(several.stdout) == json.loads(one.stdout)


def test_a_process_that_fails_takes_the_others_down_with_its_message(own_car, tmp_path):
    (own_car / 'car/uncropped/000003.jpg').write_bytes(b'no image')
    result = torchrun(2, 'train.py', *TINY, '--data_path', own_car, '--batch_size', 6, '--num_epochs', 1,
                      '--results_dir', tmp_path)
    assert result.returncode != 0
    assert '000003.jpg is missing or broken' in result.stderr


def test_flags_that_need_several_processes_say_so(raw_sets, tmp_path):
    result = type_command('train.py', *TINY, '--shard_proxies', '--batch_size', 4, '--data_path', raw_sets,
                          '--results_dir', tmp_path)
    assert result.returncode == 2
    assert '--shard_proxies has no effect in one process' in result.stderr
    result = torchrun(2, 'train.py', *TINY, '--batch_size', 1, '--data_path', raw_sets, '--results_dir', tmp_path)
    assert result.returncode != 0
    assert result.stderr.count('error: --batch_size 1') == 2  # each process has seen it
