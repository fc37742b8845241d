"""Several processes equal one: steps of every loss, metrics, whole runs, and scripts under torchrun.

One pair of processes, started once, does everything that the default tests claim (`work`); the tests then compare what
it left. Three processes and torchrun are slow tests.
"""
import contextlib
import io
import itertools
import json
import os
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import ENVIRONMENT, REPOSITORY, call_main
from faults import PRELOAD, TINY
from filelock import FileLock
from tiny_runs import NAME, train_in_group
from torch import distributed, multiprocessing, nn
from torch.nn import functional as F

import train as train_script
from common import distributed as processes
from common.distributed import (broadcast_state, first_process_first, gather_rows, progress, shard, start_processes,
                                stop_processes, use_amp, world_rank, world_size)
from common.errors import UserError
from imagedata.loading import RetrievalDataset, make_transform, open_data
from model import EmbeddingNet, NetConfig, make_loss
from recipes import LOSSES, PROXY_UPDATES
from retrieval import counting
from retrieval.database import load_data_base
from retrieval.embedding import WithoutHead, embed_images
from retrieval.metrics import retrieval_metrics
from retrieval.model_file import load_model
from training.pml import PmlLoss

C, D, IMAGE, STEPS = 5, 4, 6, 3
SHARES = {1: [7], 2: [5, 2], 3: [4, 0, 3]}  # samples of the batch in each process, by their number
LABELS = torch.tensor([[3, 0, 3, 1, 3, 0, 1], [0, 0, 0, 4, 4, 1, 0], [1, 1, 1, 1, 1, 1, 1]])  # class 2 never occurs
CASES = [*itertools.product(LOSSES, PROXY_UPDATES, ['adamw']), ('arc_face', 'gradient', 'sgd'),
         ('pml:ProxyAnchorLoss', 'gradient', 'adamw'),
         ('pml:TripletMarginLoss', 'gradient', 'adamw')]  # with a miner that draws at random
SECONDS = 120  # until processes that wait for each other are ended


# ---------------------------------------------------- what each process does --------------------------------------
def train_small(name: str, update: str, optimizer: str) -> dict:
    """Train on this process's share of each batch, as the training loop does; returns what a checkpoint holds."""
    torch.manual_seed(0)
    network = nn.Linear(IMAGE, D).double()
    sizes = {'num_classes': C, 'feature_dim': D}
    if name.startswith('pml:'):
        miner = 'DistanceWeightedMiner' if name == 'pml:TripletMarginLoss' else ''
        criterion = PmlLoss(name.removeprefix('pml:'), {}, miner=miner, miner_arguments={}, **sizes).double()
    else:
        criterion = make_loss(name, **sizes, proxy_update=update).double()
    groups = [{'params': list(network.parameters()), 'lr': 0.05}, {'params': list(criterion.parameters()), 'lr': 0.5}]
    groups = [group for group in groups if group['params']]
    optimizer = torch.optim.SGD(groups, momentum=0.9) if optimizer == 'sgd' else torch.optim.AdamW(groups)
    wrapped = nn.parallel.DistributedDataParallel(network) if world_size() > 1 else network
    if world_rank() > 0:  # what a loss draws is drawn by the first process
        torch.manual_seed(1000 + world_rank())
    start = sum(SHARES[world_size()][:world_rank()])
    own = slice(start, start + SHARES[world_size()][world_rank()])
    seen = []
    for step in range(STEPS):
        images = torch.randn(7, IMAGE, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        loss = criterion(F.normalize(wrapped(images[own]), dim=-1), LABELS[step][own])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(torch.stack([loss.detach(), criterion.accuracy.double()]))
    return {'seen': seen, 'network': network.state_dict(), 'criterion': criterion.state_dict(),
            'optimizer': optimizer.state_dict()['state'], 'num_samples': criterion.num_samples}


def train_all() -> dict:
    return {case: train_small(*case) for case in CASES}


def gather_unequal_rows() -> dict:
    """Gather rows 10 r, 10 r + 1, ... of process r, and a gradient that is weighted by 1 + r in process r."""
    rank = world_rank()
    rows = (10.0 * rank + torch.arange(SHARES[world_size()][rank]))[:, None].double().requires_grad_()
    gathered = gather_rows(rows)
    (gathered.square().sum() * (1 + rank)).backward()
    return {'rows': rows.detach(), 'gathered': gathered.detach(), 'gradient': rows.grad,
            'labels': gather_rows(rows.detach()[:, 0].long())}


def drift_apart() -> dict:
    """Move the state of a module apart in the processes, then together again."""
    torch.manual_seed(0)
    module = nn.BatchNorm1d(3)
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data.add_(world_rank())
    broadcast_state(module)
    return module.state_dict()


def measure_shared() -> list[dict]:
    """Measure retrieval in blocks of 16 queries that the processes share."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 9, (101,), generator=generator)
    features = F.normalize(torch.randn(101, 12, generator=generator), dim=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counting, 'tile_entries', lambda device: 1600)
        patch.setattr(counting, 'BLOCK_ROWS', 16)
        return [retrieval_metrics(*sets, recalls=(1, 5, 50), binary=binary) for binary in (False, True)
                for sets in ((features, labels), (features[:40], labels[:40], features[40:], labels[40:]))]


def wait_for_the_first(folder: Path) -> bool:
    """Let the first process write a file, late; tells whether it was there for this process."""
    with first_process_first():
        if world_rank() == 0:
            time.sleep(0.3)
            (folder / 'written').touch()
        return (folder / 'written').exists()


WHITENED = ('--head_init', 'whiten', '--proxy_init', 'mean', '--batch_size', '6', '--feature_dim', '4', '--remark', 'w',
            '--num_epochs', '1')
TIMM = ('--backbone_type', 'timm:test_convnext', '--freeze_bn', '1', '--num_epochs', '2', '--batch_size', '5')


@contextlib.contextmanager
def apart():
    """Let proxies and whitening differ in the processes, unless they take those of the first."""
    build, whiten = train_script.build_criterion, EmbeddingNet.whiten_head

    def build_apart(*args):
        criterion = build(*args)
        criterion.proxies.data.add_(0.1 * world_rank())
        return criterion

    def whiten_apart(self, features):
        whiten(self, features)
        self.head.weight.data.mul_(1 - 2 * world_rank())  # eigenvectors have either sign

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_script, 'build_criterion', build_apart)
        patch.setattr(EmbeddingNet, 'whiten_head', whiten_apart)
        yield patch


def start_whitened(data_path: Path, folder: Path) -> dict:
    """Begin a run, and return the state of its network after the start from its images."""
    kept, start = {}, train_script.start_from_images

    def keep(model, *rest):
        start(model, *rest)
        kept.update({name: value.clone() for name, value in model.state_dict().items()})
        raise KeyError('the training itself is not needed')

    with apart() as patch, contextlib.suppress(KeyError):
        patch.setattr(train_script, 'start_from_images', keep)
        train_in_group(data_path, folder, *WHITENED)
    return kept


def work(rank: int, world: int, port: int, folder: str, data_path: str) -> None:
    """Be one of the processes: do everything, and save the results."""
    torch.set_num_threads(1)
    os.environ.update({'RANK': str(rank), 'WORLD_SIZE': str(world), 'LOCAL_RANK': str(rank),
                       'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)})
    folder, data_path = Path(folder), Path(data_path)
    sys.stdout = io.StringIO()
    first = sys.stdout
    results = {'device': start_processes('auto'), 'trained': train_all(), 'rows': gather_unequal_rows(),
               'drift': drift_apart(), 'metrics': measure_shared(), 'waited': wait_for_the_first(folder),
               'shard': list(shard(C))}
    if world == 2:
        results['started'] = start_whitened(data_path, folder / 'started')
        with apart():
            for words in (TIMM, WHITENED):
                train_in_group(data_path, folder / 'runs', *words)
    print('a line')
    results['printed'] = first.getvalue()
    torch.save(results, folder / f'{rank}.pth')
    stop_processes()


def start(world: int, folder: Path, data_path: Path) -> list[dict]:
    """Run `work` in processes and return their results; if one fails or hangs, all end."""
    for part in ('runs', 'started'):
        (folder / part).mkdir()
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    torch.multiprocessing.get_context('forkserver').set_forkserver_preload(PRELOAD)
    context = multiprocessing.start_processes(work, (world, port, str(folder), str(data_path)), world, join=False,
                                              start_method='forkserver')
    deadline = time.monotonic() + SECONDS
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, f'{world} processes did not end within {SECONDS} s'
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f'{rank}.pth', weights_only=True) for rank in range(world)]


# ---------------------------------------------------- claims about a pair ----------------------------------------
@pytest.fixture(scope='module')
def pair(raw_sets, tmp_path_factory, worker_id) -> tuple[list[dict], Path]:
    """The results of two processes, and their folder; one worker of pytest-xdist starts them for all."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == 'master' else base.parent) / 'pair'
    with FileLock(f'{folder}.lock'):
        if not folder.exists():
            folder.mkdir()
            start(2, folder, raw_sets)
            (folder / 'done').touch()
        assert (folder / 'done').exists(), 'the two processes failed; another worker says why'
    return [torch.load(folder / f'{rank}.pth', weights_only=True) for rank in range(2)], folder


@pytest.fixture(scope='module')
def alone() -> dict:
    return train_all()


def flat(value, path: str = ''):
    """Yield every tensor and number in nested dicts and lists with its path."""
    if isinstance(value, (dict, list)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flat(part, f'{path} {key}')
    elif value is not None:
        yield path, torch.as_tensor(value, dtype=torch.float64)


def check_steps(results: list[dict], alone: dict) -> None:
    for result in results:  # each process ends with the same
        for case, parts in alone.items():
            expected, found = dict(flat(parts)), dict(flat(result['trained'][case]))
            assert found.keys() == expected.keys(), case
            for path, value in expected.items():
                torch.testing.assert_close(found[path], value, rtol=1e-10, atol=1e-10,
                                           msg=lambda text, case=case, path=path: f'{case}{path}: {text}')


def check_gathered(results: list[dict]) -> None:
    rows = [result['rows'] for result in results]
    expected = torch.cat([part['rows'] for part in rows])
    factor = len(rows) * (len(rows) + 1) / 2  # the sum of 1 + rank
    for part in rows:
        torch.testing.assert_close(part['gathered'], expected, rtol=0, atol=0)
        assert torch.equal(part['labels'], expected[:, 0].long())
        torch.testing.assert_close(part['gradient'], 2 * factor * part['rows'], rtol=1e-12, atol=0)


def test_two_processes_train_every_loss_with_every_update_as_one(pair, alone):
    check_steps(pair[0], alone)
    assert {result['num_samples'] for result in alone.values()} == {7}  # of the global batch


def test_gathered_rows_are_those_of_all_processes_and_carry_the_sum_of_their_gradients(pair):
    check_gathered(pair[0])


def test_metrics_of_shared_blocks_are_the_same_to_the_last_digit(pair):
    expected = measure_shared()
    assert all(result['metrics'] == expected for result in pair[0])


def test_broadcasting_gives_every_process_the_state_of_the_first(pair):
    for result in pair[0]:
        assert result['drift']['weight'].tolist() == [1, 1, 1]
        assert result['drift']['running_mean'].tolist() == [0, 0, 0]


def test_processes_share_rows_and_wait_for_the_first(pair):
    assert [result['shard'] for result in pair[0]] == [[0, 1], [2, 3, 4]]
    assert all(result['waited'] for result in pair[0])


def test_on_a_cpu_the_processes_choose_the_cpu_and_only_the_first_prints(pair):
    assert [result['device'] for result in pair[0]] == ['cpu', 'cpu']
    assert pair[0][0]['printed'].count('epoch 1/2: loss') == 1
    assert pair[0][0]['printed'].endswith('a line\n')
    assert pair[0][1]['printed'] == ''


def test_a_run_of_two_processes_is_that_of_one_to_rounding(pair, raw_sets, tmp_path):
    """Through the end of the warm-up, although proxies begin apart; some timm models have parts without gradient."""
    train_in_group(raw_sets, tmp_path, *TIMM)
    name = 'car_timm-test_convnext_balanced_proxy_16'
    folders = (pair[1] / 'runs', tmp_path)
    two, one = (pd.read_csv(folder / f'{name}_statistics.csv') for folder in folders)
    assert (two['made.processes'].tolist(), one['made.processes'].tolist()) == ([2, 2], [1, 1])
    drop = ['img_s', 'seconds', 'made.processes']
    pd.testing.assert_frame_equal(two.drop(columns=drop), one.drop(columns=drop), rtol=1e-3, atol=1e-3)
    two, one = (load_data_base(folder / f'{name}_data_base.pth') for folder in folders)
    torch.testing.assert_close(two.test.features, one.test.features, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(two.proxies['train_proxies'], one.proxies['train_proxies'], rtol=1e-3, atol=1e-3)


def test_what_processes_with_batchnorm_statistics_of_their_own_measure_is_the_model_that_they_save(pair, raw_sets):
    [file] = (pair[1] / 'runs').glob('*_w_model.pth')
    model, contents = load_model(file)
    data_base = load_data_base(file.with_name(file.name.replace('_model', '_data_base')))
    images = [raw_sets / 'car' / image for image in data_base.test.images]
    torch.testing.assert_close(embed_images(model, images, contents), data_base.test.features, rtol=0, atol=1e-5)


def test_a_start_from_images_uses_the_batchnorm_statistics_that_all_processes_have(pair, raw_sets, tmp_path):
    one, two = (result['started'] for result in pair[0])
    assert all(torch.equal(one[name], two[name]) for name in one)
    model = EmbeddingNet(NetConfig('timm:test_resnet', 4, freeze_bn=False, image_size=32), 'none')
    model.load_state_dict(one)
    data = open_data(raw_sets, 'car')
    images = torch.stack([image for image, _ in RetrievalDataset(data, 'train', make_transform(False, 32))])
    with torch.no_grad():
        model.whiten_head(WithoutHead(model).eval()(images))
    torch.testing.assert_close(model.head.weight.abs(), one['head.weight'].abs(), rtol=1e-3, atol=1e-4)


# ---------------------------------------------------- one process ------------------------------------------------
def test_in_one_process_nothing_is_shared():
    rows = torch.randn(3, 2)
    assert gather_rows(rows) is rows
    assert (world_rank(), world_size(), shard(C)) == (0, 1, range(C))
    assert start_processes('cuda:7') == 'cuda:7'


@pytest.mark.parametrize(('name', 'message'), [
    ('tpu', "--device 'tpu' is not known"), ('cuda:9', r'--device cuda:9: this machine has \d CUDA devices'),
    ('cuda:01', "--device 'cuda:01' is not known")])
def test_a_device_that_is_not_there_is_named(name, message):
    with pytest.raises(UserError, match=message):
        processes.select_device(name)
    assert processes.select_device('cpu') == torch.device('cpu')


def test_amp_is_on_where_it_is_asked_for_or_the_device_is_fast_at_it(monkeypatch):
    for fast in (True, False):
        monkeypatch.setattr(processes, 'bfloat16_is_fast', lambda device, fast=fast: fast)
        assert [use_amp(choice, torch.device('cpu')) for choice in ('on', 'off', 'auto')] == [True, False, fast]


def test_several_processes_on_one_device_are_refused(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(UserError, match='--device cuda:1: several processes run on --device cuda, a GPU each'):
        start_processes('cuda:1')


def test_a_bar_becomes_lines_where_the_output_is_a_file(capsys):
    writer = processes.LineWriter()
    for state in ('\rembed:  10%|#         | 1/10', '\rembed:  20%|##        | 2/10', '\r' + ' ' * 30 + '\r'):
        writer.write(state)
    assert capsys.readouterr().err == 'embed:  10%|#         | 1/10\nembed:  20%|##        | 2/10\n'
    assert list(progress(range(3))) == [0, 1, 2]
    assert capsys.readouterr().err == ''  # it is over before half a minute


# ---------------------------------------------------- slow -------------------------------------------------------
@pytest.mark.slow
def test_three_processes_of_which_one_has_no_image_equal_one(alone, raw_sets, tmp_path):
    results = start(3, tmp_path, raw_sets)
    check_steps(results, alone)
    check_gathered(results)
    expected = measure_shared()
    assert all(result['metrics'] == expected for result in results)


def give_up(rank: int, folder: str) -> None:
    distributed.init_process_group('gloo', f'file://{folder}/store', timedelta(seconds=SECONDS), 2, rank)
    if rank == 1:
        raise RuntimeError('process 1 gives up')
    gather_rows(torch.zeros(2, 2))


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others(tmp_path):
    with pytest.raises(Exception, match='process 1 gives up'):
        multiprocessing.spawn(give_up, (str(tmp_path),), nprocs=2)


def torchrun(count: int, *words, timeout: float = 200) -> subprocess.CompletedProcess:
    """Run a script in several processes as a user would."""
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(count)]
    return subprocess.run([*launcher, *map(str, words)], cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True,
                          text=True, timeout=timeout, check=False)


@pytest.mark.slow
def test_torchrun_gives_the_run_of_one_process_to_rounding_and_prints_once(raw_sets, tmp_path):
    words = (*TINY, '--data_path', raw_sets, '--num_workers', 0, '--batch_size', 5, '--num_epochs', 2, '--freeze_bn', 1,
             '--head_init', 'whiten', '--proxy_init', 'mean')
    call_main(train_script, *words, '--results_dir', tmp_path / '1')
    result = torchrun(2, 'train.py', *words, '--results_dir', tmp_path / '2')
    assert result.returncode == 0, result.stderr
    assert result.stdout.count('epoch 1/2: loss') == result.stdout.count('next:') == 1
    drop = ['img_s', 'seconds', 'made.processes']
    one, two = (pd.read_csv(tmp_path / size / f'{NAME}_statistics.csv').drop(columns=drop) for size in '12')
    pd.testing.assert_frame_equal(two, one, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize('count', [2, 3])
def test_evaluation_does_not_depend_on_the_number_of_processes(trained_run, raw_sets, count, call_script):
    import evaluate

    words = ('--model', next(trained_run.glob('*_model.pth')), '--data_path', raw_sets, '--batch_size', 5,
             '--num_workers', 0, '--json')
    several = torchrun(count, 'evaluate.py', *words)
    assert several.returncode == 0, several.stderr
    printed = several.stdout.splitlines()[-1]  # before it, Gloo of torch 2.10 says who is connected
    assert json.loads(printed) == json.loads(call_script(evaluate, *words))


@pytest.mark.slow
def test_a_process_that_fails_takes_the_others_down_with_its_message(own_car, tmp_path):
    (own_car / 'car/uncropped/000003.jpg').write_bytes(b'no image')
    result = torchrun(2, 'train.py', *TINY, '--data_path', own_car, '--batch_size', 6, '--num_epochs', 1, '--warm_up',
                      0, '--results_dir', tmp_path)
    assert result.returncode != 0
    assert '000003.jpg is missing or broken' in result.stderr


@pytest.mark.slow
def test_each_process_refuses_a_batch_that_is_too_small_for_all(raw_sets, tmp_path):
    result = torchrun(2, 'train.py', *TINY, '--freeze_bn', 1, '--batch_size', 1, '--data_path', raw_sets,
                      '--results_dir', tmp_path)
    assert result.returncode != 0
    assert result.stderr.count('error: --batch_size 1') == 2


# ---------------------------------------------------- memory ------------------------------------------------------
COUNT_FAULTS = """
import resource, sys
from common.distributed import keep_freed_memory
if sys.argv[1] == 'keep':
    keep_freed_memory()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = bytearray(2**26)
    del block
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def count_faults(mode: str, **variables) -> int:
    """Return the pages that the third of three equal blocks of 64 MiB faults in, in a process of its own."""
    environment = {name: value for name, value in ENVIRONMENT.items() if not name.startswith('MALLOC_')}
    done = subprocess.run([sys.executable, '-c', COUNT_FAULTS, mode], cwd=REPOSITORY, env={**environment, **variables},
                          capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != 'linux', reason='glibc only')
def test_freed_memory_is_kept_unless_the_environment_says_otherwise():
    num_pages = 2**26 // os.sysconf('SC_PAGE_SIZE')
    assert count_faults('default') > num_pages // 64  # pages may be huge
    assert count_faults('keep') < num_pages // 64
    assert count_faults('keep', MALLOC_MMAP_THRESHOLD_=str(2**20)) > num_pages // 64
