"""What a GPU would see, without one: a tensor that is made on the wrong device fails here.

Losses and networks run on fake CUDA tensors (FakeTensorMode), which have shapes, types and devices but no numbers. The
metrics choose their way by numbers, so that they run on tensors that have both: `PretendedGPU` keeps the numbers on the
CPU, says CUDA, and refuses what a GPU refuses. What neither sees: autograd's engine, which asks for a driver (the one
backward written here is called directly), autocast, kernels, pinned memory, NCCL, --compile, and the loop of train.py;
`make gpu` runs these on a machine with a GPU.
"""
import itertools
import re
from types import SimpleNamespace

import engine.similarities
import pytest
import torch
from conftest import REPOSITORY, assert_one_line_error, type_command
from engine import counting, processes
from engine.similarities import Pairs, Similarities
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import train
from model import EmbeddingNet, NetConfig, make_loss
from recipes import LOSSES, PROXY_UPDATES
from retrieval import metrics
from retrieval.metrics import measure_open_set, plain_metrics, retrieval_metrics

GPU = torch.device('cuda', 0)


# ---------------------------------------------------- fake tensors -------------------------------------------------
def place(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Move what `Module.to` would move, parameters and buffers, to a fake GPU; the module is made on the CPU before."""
    with mode:
        for part in module.modules():
            for name, value in part._parameters.items():
                if value is not None:
                    part._parameters[name] = nn.Parameter(torch.empty(value.shape, dtype=value.dtype, device=GPU))
            for name, value in part._buffers.items():
                if value is not None:
                    part._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device=GPU)
    return module


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('rule', PROXY_UPDATES)
@pytest.mark.parametrize('loss_name', LOSSES)
def test_every_loss_with_every_rule_stays_on_its_device(loss_name, rule, training, monkeypatch):
    monkeypatch.setitem(engine.similarities.SIMILARITIES_AT_ONCE, 'cuda', 12)  # in several blocks
    mode = FakeTensorMode()
    criterion = make_loss(loss_name, num_classes=7, feature_dim=5, proxy_update=rule)
    criterion = place(criterion, mode).train(training)
    with mode:
        embeddings = torch.empty(6, 5, device=GPU, requires_grad=True)
        loss = criterion(embeddings, torch.zeros(6, dtype=torch.int64, device=GPU))
        assert loss.device == criterion.proxies.device == criterion.accuracy.device == GPU
        assert loss.requires_grad


class Context(SimpleNamespace):
    """What autograd would give to Similarities: its engine does not start without a driver."""

    needs_input_grad = (True, True, False, False)

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors):
        pass


@pytest.mark.parametrize('negatives', ['of_class', 'of_sample'])
def test_the_gradient_of_the_similarities_stays_on_its_device(negatives, monkeypatch):
    monkeypatch.setitem(engine.similarities.SIMILARITIES_AT_ONCE, 'cuda', 12)
    context = Context()
    with FakeTensorMode():
        batch = torch.empty(6, 5, device=GPU), torch.empty(7, 5, device=GPU)
        found = Similarities.forward(context, *batch, torch.zeros(6, dtype=torch.int64, device=GPU),
                                     Pairs(2.0, negatives, range(7), 7))
        gradients = Similarities.backward(context, found[0], found[1], None)[:2]
    for gradient, tensor in zip(gradients, batch, strict=True):
        assert (gradient.device, gradient.shape) == (GPU, tensor.shape)


@pytest.mark.parametrize(('name', 'pooling'), [
    ('resnet18', 'max'), ('googlenet', 'avg_max'), ('inception', 'avg'), ('timm:test_efficientnet', 'max'),
    ('timm:test_vit', 'cls'), ('timm:test_resnet', 'gem')])
def test_every_kind_of_trunk_embeds_on_its_device(name, pooling):
    mode = FakeTensorMode()
    network = place(EmbeddingNet(NetConfig(name, 5, pooling, image_size=64), 'none'), mode).train()
    with mode:
        images = torch.empty(2, 3, 64, 64, dtype=torch.uint8, device=GPU)
        embeddings, floor = network(images), network.pretrained_baseline()(images)
    assert embeddings.device == floor.device == GPU
    assert embeddings.dtype == floor.dtype == torch.float32


def test_a_start_from_images_reaches_network_and_proxies_on_their_device(monkeypatch):
    class Images(list):
        labels = [0, 0, 1, 1, 2, 2]

    monkeypatch.setattr(train, 'make_loader', lambda *_: None)
    monkeypatch.setattr(train, 'extract_embeddings', lambda *_: torch.empty(6, 512))  # on the CPU, as it returns them
    mode = FakeTensorMode()
    network = place(EmbeddingNet(NetConfig('resnet18', 5, image_size=64), 'none'), mode)
    criterion = place(make_loss('proxy_nca', num_classes=3, feature_dim=5), mode)
    args = SimpleNamespace(head_init='whiten', proxy_init='mean', batch_size=2, num_workers=0)
    with mode:
        train.start_from_images(train.Learner(network, criterion, None, GPU), Images(range(6)), args)
    assert network.refactor.weight.device == criterion.proxies.device == GPU


def test_a_tensor_on_the_wrong_device_is_seen(monkeypatch):
    monkeypatch.setattr('proxies.row_of', lambda labels, classes: (torch.zeros(6, dtype=torch.int64), labels >= 0))
    mode = FakeTensorMode()
    criterion = place(make_loss('proxy_nca', num_classes=7, feature_dim=5, proxy_update='momentum'), mode)
    with mode, pytest.raises(RuntimeError, match='device'):
        criterion(torch.empty(6, 5, device=GPU), torch.zeros(6, dtype=torch.int64, device=GPU))


# ---------------------------------------------------- tensors with numbers -----------------------------------------
class Pretended(torch.Tensor):
    """A tensor that says it were on a GPU; its numbers are those of `inner`, on the CPU."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=GPU)

    def __init__(self, inner: torch.Tensor):
        self.inner = inner

    def tolist(self) -> list:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError('used outside of PretendedGPU')


class PretendedGPU(TorchDispatchMode):
    """Compute on the CPU what is said to be on a GPU; refuse to mix the two where a GPU refuses it."""

    _mode_key = torch._C._TorchDispatchModeKey.FAKE  # spares torch the search for a driver
    MIXING = ('copy_', '_to_copy', 'index', 'index_put', 'index_put_', '_index_put_impl_')  # these take both

    def __enter__(self):
        torch._C._ensureCUDADeviceGuardSet()  # as FakeTensorMode does: nobody asks the driver for the current GPU
        make = self.make = torch.tensor  # which would go to the driver without coming by here
        torch.tensor = lambda data, device=None, **more: make(data, **more).to(device or 'cpu')
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        torch.tensor = self.make

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, seen = dict(kwargs or {}), []
        name = function.overloadpacket.__name__

        def open_up(value):
            if isinstance(value, torch.Tensor):
                seen.append((isinstance(value, Pretended), value.ndim))
            return value.inner if isinstance(value, Pretended) else value

        placed = torch.device(kwargs['device']).type == 'cuda' if kwargs.get('device') is not None else None
        if placed:
            kwargs['device'] = torch.device('cpu')
        opened = tree_map(open_up, (args, kwargs))
        on_gpu = any(there for there, _ in seen)
        if on_gpu and name not in self.MIXING and any(ndim and not there for there, ndim in seen):
            raise RuntimeError(f'{name}: tensors on cuda and on the cpu')
        result = function(*opened[0], **opened[1])
        if function._schema.is_mutable:  # in place: the same tensor as before
            return kwargs.get('out', args[0])
        if placed if placed is not None else on_gpu:
            return tree_map(lambda value: Pretended(value) if isinstance(value, torch.Tensor) else value, result)
        return result


def points(number: int, dim: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return unit rows, some of them copies of others, and labels."""
    generator = torch.Generator().manual_seed(seed)
    features = F.normalize(torch.randn(number, dim, generator=generator), dim=1)
    features[1::5] = features[::5][:len(features[1::5])]
    return features, torch.randint(0, classes, (number,), generator=generator)


@pytest.mark.parametrize(('binary', 'gallery'), [*itertools.product((False, True), (False, True))])
def test_metrics_on_a_gpu_are_those_of_the_definition(binary, gallery, monkeypatch):
    monkeypatch.setitem(counting.TILE_SIDE, 'cuda', 32)  # several tiles
    monkeypatch.setattr(counting, 'SAMPLED_IMAGES', 16)  # so few that some queries take the second pass
    monkeypatch.setattr(counting, 'bfloat16_is_fast', lambda device: not binary)
    arguments = [*points(70, 7, 9, 0), *(points(50, 7, 9, 1) if gallery else ())]
    expected = plain_metrics(*arguments, recalls=(1, 5, 20), binary=binary)
    with PretendedGPU():
        placed = [tensor.to(GPU) for tensor in arguments]
        assert {tensor.device for tensor in placed} == {GPU}
        found = retrieval_metrics(*placed, recalls=(1, 5, 20), binary=binary)
        absent = measure_open_set(*placed)
    assert found == pytest.approx(expected, abs=1e-9)
    assert absent == measure_open_set(*arguments)


def test_metrics_with_a_tensor_on_the_wrong_device_are_seen(monkeypatch):
    monkeypatch.setattr(metrics.torch, 'arange', lambda *words, device=None: torch.ones(words[-1] - words[0]).cumsum(0))
    with PretendedGPU(), pytest.raises(RuntimeError, match='cuda and on the cpu'):
        metrics.score_queries(torch.ones(3, 2, dtype=torch.float64, device=GPU), torch.ones(3, device=GPU))


# ---------------------------------------------------- make gpu -----------------------------------------------------
@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU, which would be measured')
def test_without_a_gpu_the_benchmark_says_so_and_ends_with_2(tmp_path):
    result = type_command('benchmarks/bench_gpu.py', '--output', tmp_path / 'gpu.md')
    assert_one_line_error(result, 'no CUDA device on this machine')
    assert not (tmp_path / 'gpu.md').exists()


def test_the_rows_of_recall_and_losses_agree_with_what_they_are_compared_with(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / 'benchmarks')
    import bench_gpu

    assert len(bench_gpu.ROWS) == 8
    args = SimpleNamespace(device='cpu', small=True)
    row = bench_gpu.recall_row(args, {'images': 1500, 'test_classes': 300})
    assert len({float(value) for value in re.findall(r'\d+\.\d{4}', row['note'])}) == 1
    note = bench_gpu.loss_row(50, args)['note'].split('loss ')[1]
    ours, theirs = map(float, note.split(', theirs '))
    assert ours == pytest.approx(theirs, abs=1e-4)
    line = bench_gpu.format_row('a row', {'ours': '1 s', 'theirs': '2 s', 'faster': 2.0, 'mib': 3.2, 'their_mib': 4.4})
    assert line == '| a row | 2 s | 1 s | 2.0 x | 3 (4) |  |'


def test_a_row_that_fails_says_why(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / 'benchmarks')
    import bench_gpu

    args = SimpleNamespace(device='cpu', num_workers=0, small=True)
    row = bench_gpu.row_of_child('deterministic', args, '/nowhere', 60)
    assert row['ours'] == 'FAILED'
    assert 'Error' in row['note']
    assert not row['ok']


def test_bfloat16_is_asked_of_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (8, 0))
    assert processes.bfloat16_is_fast(GPU)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (7, 5))
    assert not processes.bfloat16_is_fast(GPU)
