"""The losses and miners of pytorch-metric-learning, by their names on the command line."""
import builtins
import inspect

import pytest
import torch
from pytorch_metric_learning import losses, miners
from test_losses import C, D, assert_same, build, make_batch
from tiny_runs import train_tiny
from torch import nn
from torch.nn import functional as F

import train
from common.errors import UserError
from common.files import load
from training.options import parse_options
from training.pml import PmlLoss

LABELS = torch.tensor([3, 0, 3, 1, 3, 0, 1])


class UnitLinear(nn.Linear):
    """A network with unit rows, as losses want them."""

    def forward(self, images):
        return F.normalize(super().forward(images), dim=-1)


def make_pml(name: str, miner: str = '', miner_arguments: dict | None = None, **arguments) -> PmlLoss:
    torch.manual_seed(0)
    return PmlLoss(name, arguments, miner=miner, miner_arguments=miner_arguments or {}, num_classes=C, feature_dim=D)


def criterion_of(*words) -> nn.Module:
    """Build the loss of a command line."""
    [options] = parse_options(['--loss_name', *map(str, words)])
    return train.build_criterion(options, C, D)


# ---------------------------------------------------- what is computed -------------------------------------------
def test_its_proxy_anchor_trains_to_the_numbers_of_ours():
    """Same start, same batches, AdamW with a rate for the proxies: weights after 20 steps, in float64."""
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(6, 3, generator=generator, dtype=torch.float64),
                torch.randint(C, (6,), generator=generator)) for _ in range(20)]
    start = make_batch(0)[1]
    ends = []
    for criterion in (build('proxy_anchor', start, scale=16.0, margin=0.2),
                      make_pml('ProxyAnchorLoss', alpha=16, margin=0.2).double()):
        proxies = criterion.proxies if hasattr(criterion, 'proxies') else criterion.loss.proxies
        proxies.data.copy_(start)
        torch.manual_seed(1)
        network = UnitLinear(3, D).double()
        optimizer = torch.optim.AdamW([{'params': network.parameters(), 'lr': 0.01}, {'params': [proxies], 'lr': 0.1}])
        row = train.train_one_epoch(network, criterion, optimizer, batches, torch.device('cpu'))
        ends.append([network.weight.detach(), proxies.detach(), criterion.unit_proxies(), torch.tensor(
            [row['loss'], row['accuracy']], dtype=torch.float64)])
    for ours, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)
    assert not torch.allclose(ends[0][1], start, atol=0.05)


@pytest.mark.parametrize(('name', 'weights'), [
    ('ProxyAnchorLoss', 'proxies'), ('ProxyNCALoss', 'proxies'), ('NormalizedSoftmaxLoss', 'W'), ('ArcFaceLoss', 'W'),
    ('P2SGradLoss', 'weight')])
def test_its_weights_are_proxies_a_row_a_class(name, weights):
    criterion = make_pml(name)
    own = getattr(criterion.loss, weights).detach()
    expected = F.normalize(own if weights == 'proxies' else own.T, dim=-1)
    assert criterion.has_proxies
    torch.testing.assert_close(criterion.unit_proxies(), expected)
    criterion(expected[LABELS], LABELS)
    assert criterion.accuracy == 1
    assert criterion.num_samples == len(LABELS)
    criterion(expected[LABELS], (LABELS + 1) % C)
    assert criterion.accuracy == 0


@pytest.mark.parametrize('name', ['SoftTripleLoss', 'MultiSimilarityLoss', 'TripletMarginLoss'])
def test_without_proxies_the_accuracy_is_that_of_the_nearest_other_image(name):
    criterion, embeddings = make_pml(name), F.normalize(make_batch(3)[0].detach().float(), dim=-1)
    assert criterion.unit_proxies() is None
    assert not criterion.has_proxies
    criterion(embeddings, LABELS)
    hits = 0
    for i in range(len(LABELS)):
        similarity = [float(embeddings[i] @ other) if j != i else -2 for j, other in enumerate(embeddings)]
        hits += int(LABELS[similarity.index(max(similarity))] == LABELS[i])
    assert criterion.accuracy == pytest.approx(hits / len(LABELS))


def test_a_miner_chooses_the_pairs_of_the_loss():
    embeddings = make_batch(4)[0]
    mined = make_pml('TripletMarginLoss', 'BatchHardMiner')(embeddings, LABELS)
    expected = losses.TripletMarginLoss()(embeddings, LABELS, miners.BatchHardMiner()(embeddings, LABELS))
    assert_same([mined], [expected])
    assert not torch.isclose(mined, make_pml('TripletMarginLoss')(embeddings, LABELS))


def test_arguments_of_the_command_line_reach_loss_and_miner():
    criterion = criterion_of('pml:MultiSimilarityLoss', '--loss_args', 'alpha=3,beta=7.5', '--miner',
                             'MultiSimilarityMiner', '--miner_args', 'epsilon=0.2')
    assert (criterion.loss.alpha, criterion.loss.beta, criterion.miner.epsilon) == (3, 7.5, 0.2)
    assert criterion_of('pml:SoftTripleLoss', '--loss_args', 'centers_per_class=3').loss.fc.shape == (D, 3 * C)


def test_the_loss_is_float32_under_autocast():
    embeddings = F.normalize(make_batch(7, torch.float32)[0].detach(), dim=-1)
    criterion = make_pml('ProxyAnchorLoss')
    with torch.autocast('cpu', torch.bfloat16):
        inside = criterion(embeddings.bfloat16().float(), LABELS)
    assert inside.dtype == torch.float32
    assert inside == criterion(embeddings.bfloat16().float(), LABELS)


def test_what_a_loss_keeps_beside_its_weights_is_part_of_its_state():
    """DynamicSoftMarginLoss updates a histogram, which it keeps as a plain attribute."""
    first, batches = make_pml('DynamicSoftMarginLoss'), [make_batch(seed)[0] for seed in range(3)]
    for batch in batches[:2]:
        first(batch, LABELS)
    other = make_pml('DynamicSoftMarginLoss')
    other.load_state_dict(first.state_dict())
    assert torch.equal(first(batches[2], LABELS), other(batches[2], LABELS))
    assert not torch.equal(first(batches[2], LABELS), make_pml('DynamicSoftMarginLoss')(batches[2], LABELS))


def test_every_loss_of_the_package_trains_or_says_in_one_line_why_not():
    trained, messages = [], {}
    for name in (name for name, cls in vars(losses).items() if inspect.isclass(cls) and issubclass(cls, nn.Module)):
        embeddings = make_batch(5)[0].detach().float().requires_grad_()
        try:
            make_pml(name)(embeddings, LABELS).backward()
        except UserError as error:
            messages[name] = str(error)
            continue
        assert embeddings.grad.isfinite().all()
        trained.append(name)
    assert all(name in message and '\n' not in message for name, message in messages.items())
    assert len(trained) >= 28
    assert {'SoftTripleLoss', 'MultiSimilarityLoss', 'SupConLoss', 'TripletMarginLoss', 'CircleLoss'} <= set(trained)


# ---------------------------------------------------- errors -----------------------------------------------------
def test_a_batch_that_a_loss_refuses_is_one_line():
    with pytest.raises(UserError, match='SmoothAPLoss refuses a batch of 7 images of 3 classes .* --images_per_class'):
        make_pml('SmoothAPLoss')(make_batch(6)[0], LABELS)


@pytest.mark.parametrize(('words', 'parts'), [
    (('pml:Triplet',), ("did you mean 'TripletMarginLoss'", 'MultiSimilarityLoss')),
    (('pml:TripletMarginLoss', '--loss_args', 'margn=0.2'), ("did you mean 'margin'", 'swap')),
    (('pml:TripletMarginLoss', '--loss_args', 'margin=wide'), ('pml:TripletMarginLoss', 'wide')),
    (('pml:ArcFaceLoss', '--loss_args', 'num_classes=7'), ('num_classes', 'set by the data')),
    (('pml:CrossBatchMemory',), ('CrossBatchMemory needs loss',)),
    (('pml:VICRegLoss',), ('pml:VICRegLoss', 'embeddings and labels alone')),
    (('pml:SupConLoss', '--miner', 'HardMiner'), ('--miner HardMiner', 'BatchHardMiner')),
    (('pml:SupConLoss', '--proxy_lr', 0.1), ('--proxy_lr 0.1 has no effect', 'pml:SupConLoss has no proxies')),
    (('pml:SupConLoss', '--on_collapse', 'stop'), ('--on_collapse stop has no effect', 'has no proxies'))])
def test_what_cannot_be_built_is_one_line(words, parts):
    with pytest.raises(UserError) as error:
        criterion_of(*words)
    assert '\n' not in str(error.value)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(('words', 'parts'), [
    (('pml:ProxyNCALoss', '--proxy_update', 'positive'), ('--proxy_update positive', 'by the gradient')),
    (('pml:ProxyNCALoss', '--optimizer', 'adam*'), ('--proxy_update momentum', 'by the gradient')),
    (('pml:ProxyNCALoss', '--margin', '0.1'), ('--margin 0.1', '--loss_args')),
    (('pml:ProxyNCALoss', '--scale', '3'), ('--scale 3', '--loss_args')),
    (('pml:SupConLoss', '--miner_args', 'margin=1'), ('--miner_args', 'no --miner')),
    (('proxy_nca', '--loss_args', 'softmax_scale=1'), ('--loss_args', 'pml:NAME')),
    (('pml:ContrastiveLoss', '--scale', '0'), ('--scale 0', '--loss_args')),
    (('pml:ContrastiveLoss', '--margin', '0'), ('--margin 0', '--loss_args')),
    (('proxy_nca', '--miner', 'BatchHardMiner'), ('--miner BatchHardMiner', 'pml:NAME'))])
def test_flags_without_effect_are_refused(words, parts):
    with pytest.raises(UserError) as error:
        parse_options(['--loss_name', *words])
    for part in parts:
        assert part in str(error.value)


def test_a_missing_package_is_one_line_and_it_is_imported_only_when_asked_for(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith('pytorch_metric_learning'):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, '__import__', without)
    with pytest.raises(UserError, match='pip install pytorch-metric-learning'):
        criterion_of('pml:ProxyAnchorLoss')
    criterion_of('proxy_anchor')


# ---------------------------------------------------- runs -------------------------------------------------------
def test_a_run_with_a_mined_loss_without_proxies_is_trained_and_resumed(raw_sets, tmp_path, capsys):
    words = ('--warm_up', 0, '--images_per_class', 2, '--loss_name', 'pml:MultiSimilarityLoss', '--miner',
             'MultiSimilarityMiner')
    train_tiny(raw_sets, tmp_path, *words, '--num_epochs', 1)
    printed = capsys.readouterr().out
    assert 'pml:MultiSimilarityLoss; 12 images' in printed
    assert 'proxy update' not in printed
    train_tiny(raw_sets, tmp_path, *words, '--num_epochs', 2, '--resume')
    name = 'car_timm-test_resnet_pml-multisimilarityloss_16_multisimilarityminer'
    checkpoint = load(tmp_path / f'{name}_checkpoint.pth', 'checkpoint')
    assert [row['epoch'] for row in checkpoint['rows']] == [1, 2]
    assert [row['proxy_lr'] for row in checkpoint['rows']] == [0, 0]
    assert 'train_proxies' not in load(tmp_path / f'{name}_data_base.pth', 'data base')


@pytest.fixture(scope='module')
def glyph(tmp_path_factory):
    """A data path with a small glyph data set."""
    import data_utils
    from conftest import call_main

    data_path = tmp_path_factory.mktemp('glyph')
    call_main(data_utils, '--data_path', data_path, '--data_name', 'glyph', '--glyph_classes', 12, '--glyph_images', 8)
    return data_path


@pytest.mark.slow
@pytest.mark.parametrize(('words', 'has_proxies'), [
    (('pml:SoftTripleLoss', '--loss_args', 'centers_per_class=3,margin=0.02'), False),
    (('pml:MultiSimilarityLoss', '--miner', 'MultiSimilarityMiner', '--miner_args', 'epsilon=0.2'), False),
    (('pml:SupConLoss',), False),
    (('pml:TripletMarginLoss', '--miner', 'TripletMarginMiner', '--miner_args', 'type_of_triplets=semihard'), False),
    (('pml:ProxyAnchorLoss',), True)])
def test_a_run_learns_and_continues_bit_for_bit(words, has_proxies, glyph, tmp_path):
    has_weights = has_proxies or words[0] == 'pml:SoftTripleLoss'  # several centres per class
    words = ('--data_name', 'glyph', '--images_per_class', 4, '--batch_size', 16, '--warm_up', 0, '--lr_schedule',
             'constant', '--lr', 1e-3, '--loss_name', *words)
    train_tiny(glyph, tmp_path / 'whole', *words, '--num_epochs', 5)
    train_tiny(glyph, tmp_path / 'cut', *words, '--num_epochs', 2)
    train_tiny(glyph, tmp_path / 'cut', *words, '--num_epochs', 5, '--resume')
    ends = [load(next((tmp_path / folder).glob('*_checkpoint.pth')), 'checkpoint') for folder in ('whole', 'cut')]
    for part in ('model', 'criterion'):
        for key, value in ends[0][part].items():
            assert not torch.is_tensor(value) or torch.equal(value, ends[1][part][key]), key
    rows = ends[0]['rows']
    assert rows[-1]['loss'] < rows[0]['loss'] or '--miner' in words  # mined pairs stay hard
    assert ('train_proxies' in load(next((tmp_path / 'whole').glob('*_data_base.pth')), 'data base')) == has_proxies
    assert (rows[0]['proxy_lr'] > 0) == has_weights
