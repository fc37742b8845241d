"""Several processes over Gloo against one: every loss, every way in which proxies move, whole and sharded proxies."""
import itertools
import time
from datetime import timedelta

import pytest
import torch
from torch import distributed
from torch.nn import functional as F

import model
from common.distributed import check_same, gather_rows, shard, world_rank, world_size
from common.errors import UserError
from model import make_loss
from recipes import LOSSES, PROXY_UPDATES
from training.pml import PmlLoss

C, D, IMAGE = 5, 4, 6
STEPS = 3
SHARES = {1: [7], 2: [5, 2], 3: [4, 0, 3]}  # samples of the batch in each process, by their number
LABELS = torch.tensor([[3, 0, 3, 1, 3, 0, 1], [0, 0, 0, 4, 4, 1, 0], [1, 1, 1, 1, 1, 1, 1]])  # class 2 never occurs
OPTIMIZERS = {'sgd': lambda groups: torch.optim.SGD(groups, momentum=0.9), 'adam': torch.optim.AdamW}
SHARDED = [name for name, entry in LOSSES.items() if getattr(model, entry.class_name).negatives != 'matrix']
CASES = [*itertools.product(SHARDED, PROXY_UPDATES, ['adam']), ('arc_face', 'gradient', 'sgd')]
# Losses whose proxies are not shared out: of pytorch-metric-learning, and with a miner that draws.
WHOLE = [('pml:ProxyAnchorLoss', 'gradient', 'adam'), ('pml:TripletMarginLoss', 'gradient', 'adam')]
SECONDS = 90  # until processes that wait for each other are ended


# ---------------------------------------------------- what each process does -----------------------------------------
def build(name: str, rule: str, optimizer: str, shard_proxies: bool):
    """Build a small network, a loss and an optimizer; the same values in any number of processes."""
    torch.manual_seed(0)
    network = torch.nn.Linear(IMAGE, D).double()
    sizes = {'num_classes': C, 'feature_dim': D}
    if name.startswith('pml:'):
        miner = 'DistanceWeightedMiner' if name == 'pml:TripletMarginLoss' else ''
        criterion = PmlLoss(name.removeprefix('pml:'), {}, miner=miner, miner_arguments={}, **sizes).double()
    else:
        criterion = make_loss(name, **sizes, proxy_update=rule, shard_proxies=shard_proxies).double()
    groups = [{'params': list(network.parameters()), 'lr': 0.05}, {'params': list(criterion.parameters()), 'lr': 0.5}]
    return network, criterion, OPTIMIZERS[optimizer]([group for group in groups if group['params']])


def train(network, criterion, optimizer, steps: range) -> list[torch.Tensor]:
    """Train on this process's share of each batch, as the training loop does; returns loss and accuracy of each."""
    if world_size() > 1:
        network = torch.nn.parallel.DistributedDataParallel(network)
    if world_rank() > 0:  # what a loss draws is drawn by the first process
        torch.manual_seed(1000 + world_rank())
    start = sum(SHARES[world_size()][:world_rank()])
    mine = slice(start, start + SHARES[world_size()][world_rank()])
    seen = []
    for step in steps:
        images = torch.randn(7, IMAGE, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        loss = criterion(F.normalize(network(images[mine]), dim=-1), LABELS[step][mine])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(torch.stack([loss.detach(), criterion.accuracy.double()]))
    return seen


def run_case(case: tuple, shard_proxies: bool) -> dict:
    """Train, and return all that a checkpoint holds."""
    network, criterion, optimizer = build(*case, shard_proxies)
    seen = train(network, criterion, optimizer, range(STEPS))
    return {'seen': seen, 'network': network.state_dict(), 'criterion': criterion.full_state_dict(),
            'optimizer': criterion.full_optimizer_state(optimizer)['state']}


def run_all(shard_proxies: bool) -> dict:
    return {case: run_case(case, shard_proxies) for case in (CASES if shard_proxies else CASES + WHOLE)}


def resume(shard_proxies: bool) -> dict:
    """Train, stop before the last step, and go on from what was saved with a network and proxies of another start."""
    case = ('proxy_anchor', 'gradient', 'adam')
    network, criterion, optimizer = build(*case, shard_proxies)
    train(network, criterion, optimizer, range(STEPS - 1))
    saved = [network.state_dict(), criterion.full_state_dict(), criterion.full_optimizer_state(optimizer)]
    network, criterion, optimizer = build(*case, shard_proxies)
    criterion.proxies.data.add_(1)
    network.load_state_dict(saved[0])
    criterion.load_full_state_dict(saved[1])
    criterion.load_full_optimizer_state(optimizer, saved[2])
    train(network, criterion, optimizer, range(STEPS - 1, STEPS))
    return {case: {'network': network.state_dict(), 'criterion': criterion.full_state_dict(),
                   'optimizer': criterion.full_optimizer_state(optimizer)['state']}}


def gather_unequal_rows() -> dict:
    """Gather rows 10 r, 10 r + 1, ... of process r, and a gradient that is weighted by 1 + r in process r."""
    rank = world_rank()
    rows = (10.0 * rank + torch.arange(SHARES[world_size()][rank]))[:, None].double().requires_grad_()
    gathered = gather_rows(rows)
    (gathered.square().sum() * (1 + rank)).backward()
    return {'rows': rows.detach(), 'gathered': gathered.detach(), 'gradient': rows.grad,
            'labels': gather_rows(rows.detach()[:, 0].long())}


def other_seed(shard_proxies: bool) -> str:
    torch.manual_seed(world_rank())
    try:
        make_loss('proxy_anchor', num_classes=C, feature_dim=D, shard_proxies=shard_proxies)
    except UserError as error:
        return str(error)
    return ''


def drift_apart() -> dict:
    criterion = build('proxy_nca', 'gradient', 'sgd', False)[1]
    first = criterion.proxies.detach().clone()
    criterion.proxies.data.add_(world_rank())
    criterion.synchronise()
    return {'first': first, 'proxies': criterion.proxies.detach()}


def work(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group('gloo', f'file://{folder}/store', timedelta(seconds=SECONDS), world, rank)
    results = {'whole': run_all(False), 'sharded': run_all(True), 'resumed': resume(True),
               'rows': gather_unequal_rows(), 'other_seed': [other_seed(False), other_seed(True)],
               'drift': drift_apart(), 'shard': list(shard(C)), 'held': len(build(*CASES[0], True)[1].proxies)}
    check_same('the shape of what came out', torch.tensor([len(results)]))
    torch.save(results, f'{folder}/{rank}.pth')
    distributed.destroy_process_group()


def fail(rank: int, world: int, folder: str) -> None:
    distributed.init_process_group('gloo', f'file://{folder}/store', timedelta(seconds=SECONDS), world, rank)
    if rank == 1:
        raise RuntimeError('process 1 gives up')
    gather_rows(torch.zeros(2, 2))


def start(function, world: int, folder) -> None:
    """Run `function(rank, world, folder)` in processes; if one fails or none gets on, all end."""
    context = torch.multiprocessing.spawn(function, (world, str(folder)), world, join=False)
    deadline = time.monotonic() + SECONDS
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, f'{world} processes did not end within {SECONDS} s'
    finally:
        for process in context.processes:
            process.kill()


# ---------------------------------------------------- claims ---------------------------------------------------------
@pytest.fixture(scope='module')
def alone():
    return run_all(shard_proxies=False)


def flat(value, path: str = ''):
    """Yield every tensor and number in nested dicts and lists with its path."""
    if isinstance(value, (dict, list)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flat(part, f'{path} {key}')
    elif value is not None:
        yield path, torch.as_tensor(value, dtype=torch.float64)


def assert_equal_runs(ours: dict, theirs: dict) -> None:
    """Compare runs case by case: every number to 1e-10."""
    for case, parts in ours.items():
        mine, other = dict(flat(parts)), dict(flat({name: theirs[case][name] for name in parts}))
        assert mine.keys() == other.keys(), case
        for path, value in mine.items():
            torch.testing.assert_close(value, other[path], rtol=1e-10, atol=1e-10,
                                       msg=lambda text, case=case, path=path: f'{case}{path}: {text}')


@pytest.mark.parametrize('world', [2, 3])
def test_several_processes_equal_one(world, alone, tmp_path):
    """One start of the processes for all claims about them, since a start takes seconds."""
    start(work, world, tmp_path)
    results = [torch.load(tmp_path / f'{rank}.pth', weights_only=True) for rank in range(world)]
    for result in results:  # each process ends with the same
        assert_equal_runs(result['whole'], alone)
        assert_equal_runs(result['sharded'], alone)
        assert_equal_runs(result['resumed'], alone)
        assert all('--seed' in message for message in result['other_seed'])
        torch.testing.assert_close(result['drift']['proxies'], result['drift']['first'], rtol=0, atol=0)
        assert result['held'] == len(result['shard']) < C
    assert sum((result['shard'] for result in results), []) == list(range(C))

    rows = [result['rows'] for result in results]
    expected = torch.cat([part['rows'] for part in rows])
    factor = world * (world + 1) / 2  # the sum of 1 + rank
    for part in rows:
        torch.testing.assert_close(part['gathered'], expected, rtol=0, atol=0)
        assert torch.equal(part['labels'], expected[:, 0].long())
        torch.testing.assert_close(part['gradient'], 2 * factor * part['rows'], rtol=1e-12, atol=0)


def test_a_process_that_fails_ends_the_others(tmp_path):
    with pytest.raises(Exception, match='process 1 gives up'):
        start(fail, 2, tmp_path)


def test_in_one_process_sharding_changes_nothing(alone):
    assert (world_rank(), world_size(), shard(C)) == (0, 1, range(C))
    assert_equal_runs({case: run_case(case, True) for case in CASES[::4]}, alone)
    assert_equal_runs(resume(True), alone)


def test_more_processes_than_classes_are_refused(monkeypatch):
    monkeypatch.setattr('proxies.world_size', lambda: C + 1)
    with pytest.raises(UserError, match='--shard_proxies'):
        make_loss('proxy_anchor', num_classes=C, feature_dim=D, shard_proxies=True)
