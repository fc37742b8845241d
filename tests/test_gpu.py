"""What a GPU would see, without one: a tensor that is made on the wrong device fails here.

Losses and networks run on fake CUDA tensors, which have shapes, types and devices but no numbers. The metrics choose
their way by numbers, so they run on `OnGPU`: tensors that keep their numbers on the CPU, say that they are on CUDA, and
refuse to be mixed with others where a GPU refuses it. What neither sees: backward passes, autocast, kernels, pinned
memory, NCCL, --compile, and the loop of train.py; `make gpu` runs these on a machine with a GPU.
"""
import itertools
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY
from torch import nn
from torch._subclasses import FakeTensorMode  # the only way to get one: torch has no public name for it
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import model
import train
from common import distributed
from common.errors import UserError
from model import EmbeddingNet, NetConfig, make_loss
from recipes import LOSSES, PROXY_UPDATES
from retrieval import counting, metrics, nearest
from retrieval.embedding import PretrainedBaseline
from retrieval.metrics import measure_open_set, plain_metrics, retrieval_metrics

GPU = torch.device('cuda', 0)


# ---------------------------------------------------- fake tensors -------------------------------------------------
def place(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Move what `Module.to` would move, parameters and buffers, to a fake GPU; the module was made on the CPU."""
    with mode:
        for part in module.modules():
            for name, value in list(part.named_parameters(recurse=False)):
                setattr(part, name, nn.Parameter(torch.empty(value.shape, dtype=value.dtype, device=GPU)))
            for name, value in list(part.named_buffers(recurse=False)):
                setattr(part, name, torch.empty(value.shape, dtype=value.dtype, device=GPU))
    return module


@pytest.mark.parametrize('update', PROXY_UPDATES)
@pytest.mark.parametrize('loss_name', LOSSES)
def test_every_loss_with_every_proxy_update_stays_on_its_device(loss_name, update):
    mode = FakeTensorMode()
    criterion = place(make_loss(loss_name, num_classes=7, feature_dim=5, proxy_update=update), mode)
    with mode:
        embeddings = torch.empty(6, 5, device=GPU, requires_grad=True)
        loss = criterion(embeddings, torch.zeros(6, dtype=torch.int64, device=GPU))
        assert loss.device == criterion.proxies.device == criterion.accuracy.device == GPU
        assert loss.requires_grad


@pytest.mark.parametrize(('name', 'pooling'), [
    ('resnet18', 'max'), ('timm:test_efficientnet', 'avg_max'), ('timm:test_vit', 'cls'), ('timm:test_resnet', 'gem'),
    pytest.param('inception', 'avg', marks=pytest.mark.slow), pytest.param('googlenet', 'max', marks=pytest.mark.slow)])
def test_every_kind_of_backbone_embeds_on_its_device(name, pooling):
    mode = FakeTensorMode()
    network = place(EmbeddingNet(NetConfig(name, 5, pooling, image_size=64, flip_tta=True), 'none'), mode).eval()
    with mode:
        images = torch.empty(2, 3, 64, 64, dtype=torch.uint8, device=GPU)
        embeddings, baseline = network(images), PretrainedBaseline(network)(images)
    assert embeddings.device == baseline.device == GPU
    assert embeddings.dtype == baseline.dtype == torch.float32


def test_a_start_from_images_reaches_network_and_proxies_on_their_device(monkeypatch):
    class Images(list):
        labels = [0, 0, 1, 1, 2, 2]

    monkeypatch.setattr(train, 'make_loader', lambda *_: None)
    monkeypatch.setattr(train, 'extract_embeddings', lambda *_: torch.empty(6, 512))  # on the CPU, as it returns them
    mode = FakeTensorMode()
    network = place(EmbeddingNet(NetConfig('resnet18', 5, image_size=64), 'none'), mode)
    criterion = place(make_loss('proxy_nca', num_classes=3, feature_dim=5), mode)
    options = SimpleNamespace(head_init='whiten', proxy_init='mean', batch_size=2, num_workers=0, freeze_bn=True)
    with mode:
        train.start_from_images(network, criterion, Images(range(6)), options, GPU, False)
    assert network.head.weight.device == criterion.proxies.device == GPU


def test_a_loss_with_a_tensor_on_the_wrong_device_fails(monkeypatch):
    monkeypatch.setattr(model, 'count_labels', lambda labels, num_classes: torch.zeros(num_classes))  # no device
    mode = FakeTensorMode()
    criterion = place(make_loss('proxy_nca', num_classes=7, feature_dim=5, proxy_update='momentum'), mode)
    with mode, pytest.raises(RuntimeError, match='device'):
        criterion(torch.empty(6, 5, device=GPU), torch.zeros(6, dtype=torch.int64, device=GPU))


def test_bfloat16_is_fast_on_gpus_since_ampere(monkeypatch):
    for capability, fast in (((8, 0), True), ((9, 0), True), ((7, 5), False)):
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device, capability=capability: capability)
        assert distributed.bfloat16_is_fast(GPU) == fast


# ---------------------------------------------------- tensors with numbers -----------------------------------------
class OnGPU(torch.Tensor):
    """A tensor that says it is on a GPU, and refuses to be mixed with others where a GPU refuses it."""

    MIXES = ('copy_', '__getitem__', '__setitem__')  # a GPU's tensor takes an index or a value from the CPU

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(function, '__name__', '')
        owner = getattr(function, '__self__', None)
        if name == '__get__' and owner in (torch.Tensor.device, torch.Tensor.is_cuda):
            return GPU if owner is torch.Tensor.device else True
        target = find_device(args[1:], kwargs)
        if name == 'cpu' or target is not None and target.type == 'cpu':
            return super().__torch_function__(function, types, *without_device(args, kwargs)).as_subclass(torch.Tensor)
        check_mix(name, args, kwargs)
        return super().__torch_function__(function, types, *without_device(args, kwargs))


class PretendedGPU(TorchFunctionMode):
    """Tensors that are made on or moved to a GPU are `OnGPU`."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        target = find_device(args, kwargs)
        if target is None or target.type == 'cpu' or any(issubclass(kind, OnGPU) for kind in types):
            return function(*args, **kwargs)
        args, kwargs = without_device(args, kwargs)
        return function(*args, **kwargs).as_subclass(OnGPU)


def find_device(args, kwargs: dict) -> torch.device | None:
    """Return the device that a call names."""
    named = [value for value in args if isinstance(value, torch.device)]
    device = kwargs.get('device', named[0] if named else None)
    return None if device is None else torch.device(device)


def without_device(args, kwargs: dict) -> tuple:
    """Return the arguments of a call without its device."""
    return (tuple(torch.device('cpu') if isinstance(value, torch.device) else value for value in args),
            {key: torch.device('cpu') if key == 'device' and value is not None else value
             for key, value in kwargs.items()})


def check_mix(name: str, args, kwargs: dict) -> None:
    """Raise an error, as a GPU does, if a call mixes tensors of both devices; numbers () may be anywhere."""
    tensors = list(tensors_in([*args, *kwargs.values()]))
    if name in OnGPU.MIXES and isinstance(tensors[0], OnGPU):
        return
    if any(not isinstance(tensor, OnGPU) and tensor.ndim for tensor in tensors):
        raise RuntimeError(f'{name}: tensors on cuda and on the cpu')


def tensors_in(value):
    """Yield the tensors of nested lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_in(part)


def make_points(count: int, dim: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return unit rows, some of them copies of others, and labels."""
    generator = torch.Generator().manual_seed(seed)
    features = F.normalize(torch.randn(count, dim, generator=generator), dim=1)
    features[1::5] = features[::5][:len(features[1::5])]
    return features, torch.randint(0, classes, (count,), generator=generator)


@pytest.mark.parametrize(('binary', 'gallery'), [*itertools.product((False, True), (False, True))])
def test_metrics_on_a_gpu_are_those_of_the_definition(binary, gallery, monkeypatch):
    for module in (counting, nearest):
        monkeypatch.setattr(module, 'tile_entries', lambda device: 700)
    monkeypatch.setattr(counting, 'BLOCK_ROWS', 20)
    arguments = [*make_points(70, 7, 9, 0), *(make_points(50, 7, 9, 1) if gallery else ())]
    expected = plain_metrics(*arguments, recalls=(1, 5, 20), binary=binary)
    with PretendedGPU():
        placed = [tensor.to(GPU) for tensor in arguments]
        assert {tensor.device for tensor in placed} == {GPU}
        found = retrieval_metrics(*placed, recalls=(1, 5, 20), binary=binary)
        open_set = measure_open_set(*placed)
    assert found == pytest.approx(expected, abs=1e-9)
    assert open_set == measure_open_set(*arguments)


def test_metrics_with_a_tensor_on_the_wrong_device_fail(monkeypatch):
    monkeypatch.setattr(metrics.torch, 'arange', lambda *words, device=None: torch.ones(words[-1] - words[0]).cumsum(0))
    with PretendedGPU(), pytest.raises(RuntimeError, match='cuda and on the cpu'):
        metrics.score_queries(torch.ones(3, 2, dtype=torch.float64, device=GPU), torch.ones(3, device=GPU))


# ---------------------------------------------------- make gpu -----------------------------------------------------
@pytest.fixture
def bench_gpu(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / 'benchmarks')
    import bench_gpu

    return bench_gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU, which would be measured')
def test_without_a_gpu_the_benchmark_says_so(tmp_path, bench_gpu, call_script):
    with pytest.raises(UserError, match='no CUDA device on this machine'):
        call_script(bench_gpu, '--output', tmp_path / 'gpu.md')
    assert not (tmp_path / 'gpu.md').exists()


@pytest.mark.slow
def test_the_rows_of_recall_and_losses_agree_with_what_they_are_compared_with(bench_gpu):
    assert len(bench_gpu.ROWS) == 8
    args = SimpleNamespace(device='cpu', small=True)
    row = bench_gpu.recall_row(args, {'images': 1100, 'test_classes': 300})
    assert len({float(value) for value in re.findall(r'\d+\.\d{4}', row['note'])}) == 1
    note = bench_gpu.loss_row(50, args)['note'].split('loss ')[1]
    ours, theirs = map(float, note.split(', theirs '))
    assert ours == pytest.approx(theirs, abs=1e-4)
    line = bench_gpu.format_row('a row', {'ours': '1 s', 'theirs': '2 s', 'faster': 2.0, 'mib': 3.2, 'their_mib': 4.4})
    assert line == '| a row | 2 s | 1 s | 2.0 x | 3 (4) |  |'


@pytest.mark.slow
def test_a_row_that_fails_says_why(bench_gpu):
    args = SimpleNamespace(device='cpu', num_workers=0, small=True)
    row = bench_gpu.row_of_child('deterministic', args, '/nowhere', 60)
    assert row['ours'] == 'FAILED'
    assert 'Error' in row['note']
    assert not row['ok']
