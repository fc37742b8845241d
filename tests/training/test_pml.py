"""The losses and miners of pytorch-metric-learning, by their names on the command line."""
import builtins
import inspect

import pytest
import torch
from conftest import assert_one_line_error, type_command
from pytorch_metric_learning import losses
from test_losses import C, D, assert_same, build, make_batch
from test_scripts import TINY, UnitLinear
from torch import nn

from common.errors import UserError
from train import Learner, train_one_epoch
from training.options import parse_options
from training.pml import PmlLoss

LABELS = torch.tensor([3, 0, 3, 1, 3, 0, 1])
SMALL_GLYPH = ('--data_name', 'glyph', *TINY, '--images_per_class', 4, '--batch_size', 16, '--warm_up', 0,
               '--lr_schedule', 'constant', '--val_ratio', 0)


def borrow(name: str, miner: str = '', miner_arguments: dict | None = None, **arguments) -> PmlLoss:
    torch.manual_seed(0)
    return PmlLoss(name, arguments, miner=miner, miner_arguments=miner_arguments or {}, num_classes=C, feature_dim=D)


# ---------------------------------------------------- what is computed -----------------------------------------------
def test_its_proxy_anchor_trains_to_the_numbers_of_ours():
    """Same start, same batches, AdamW with a rate for the proxies: weights after 20 steps, in float64."""
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(6, 3, generator=generator, dtype=torch.float64),
                torch.randint(C, (6,), generator=generator)) for _ in range(20)]
    start = make_batch(0)[1]
    ends = []
    for criterion in (build('proxy_anchor', start, scale=16.0, margin=0.2),
                      borrow('ProxyAnchorLoss', alpha=16, margin=0.2).double()):
        proxies = criterion.proxies if hasattr(criterion, 'proxies') else criterion.loss.proxies
        proxies.data.copy_(start)
        torch.manual_seed(1)
        network = UnitLinear(3, D).double()
        optimizer = torch.optim.AdamW([{'params': network.parameters(), 'lr': 0.01}, {'params': [proxies], 'lr': 0.1}])
        row = train_one_epoch(Learner(network, criterion, optimizer, torch.device('cpu')), batches, '')
        ends.append([network.weight.detach(), proxies.detach(), criterion.all_proxies(), torch.tensor(
            [row['loss'], row['accuracy']], dtype=torch.float64)])
    for ours, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)
    assert not torch.allclose(ends[0][1], start, atol=0.05)


@pytest.mark.parametrize(('name', 'weights'), [
    ('ProxyAnchorLoss', 'proxies'), ('ProxyNCALoss', 'proxies'), ('NormalizedSoftmaxLoss', 'W'), ('ArcFaceLoss', 'W'),
    ('P2SGradLoss', 'weight')])
def test_its_weights_are_proxies_a_row_a_class(name, weights):
    criterion = borrow(name)
    own = getattr(criterion.loss, weights)
    expected = own if weights == 'proxies' else own.T
    assert torch.equal(criterion.all_proxies(), expected)
    embeddings = nn.functional.normalize(expected.detach()[LABELS], dim=-1)
    criterion(embeddings, LABELS)
    assert criterion.accuracy == 1
    criterion(embeddings, (LABELS + 1) % C)
    assert criterion.accuracy == 0


@pytest.mark.parametrize('name', ['SoftTripleLoss', 'MultiSimilarityLoss', 'TripletMarginLoss'])
def test_without_proxies_the_accuracy_is_that_of_the_nearest_other_image(name):
    criterion, embeddings = borrow(name), nn.functional.normalize(make_batch(3)[0].detach().float(), dim=-1)
    assert criterion.all_proxies() is None
    criterion(embeddings, LABELS)
    hits = 0
    for i in range(len(LABELS)):
        similarity = [float(embeddings[i] @ other) if j != i else -2 for j, other in enumerate(embeddings)]
        nearest = similarity.index(max(similarity))
        hits += int(LABELS[nearest] == LABELS[i])
    assert criterion.accuracy == pytest.approx(hits / len(LABELS))


def test_a_miner_chooses_the_pairs_of_the_loss():
    embeddings = make_batch(4)[0]
    mined = borrow('TripletMarginLoss', 'BatchHardMiner')(embeddings, LABELS)
    from pytorch_metric_learning import miners
    expected = losses.TripletMarginLoss()(embeddings, LABELS, miners.BatchHardMiner()(embeddings, LABELS))
    assert_same([mined], [expected])
    assert not torch.isclose(mined, borrow('TripletMarginLoss')(embeddings, LABELS))


def test_what_a_loss_keeps_beside_its_weights_is_part_of_its_state():
    """DynamicSoftMarginLoss moves a histogram along."""
    first, batches = borrow('DynamicSoftMarginLoss'), [make_batch(seed)[0] for seed in range(3)]
    for batch in batches[:2]:
        first(batch, LABELS)
    other = borrow('DynamicSoftMarginLoss')
    other.load_full_state_dict(first.full_state_dict())
    assert torch.equal(first(batches[2], LABELS), other(batches[2], LABELS))
    assert not torch.equal(first(batches[2], LABELS), borrow('DynamicSoftMarginLoss')(batches[2], LABELS))


def test_every_loss_of_the_package_trains_or_says_in_one_line_why_not():
    trained, messages = [], {}
    for name in (name for name, cls in vars(losses).items() if inspect.isclass(cls) and issubclass(cls, nn.Module)):
        embeddings = make_batch(5)[0].detach().float().requires_grad_()
        try:
            borrow(name)(embeddings, LABELS).backward()
        except UserError as error:
            messages[name] = str(error)
            continue
        assert embeddings.grad.isfinite().all()
        trained.append(name)
    assert all(name in message and '\n' not in message for name, message in messages.items())
    assert len(trained) >= 28
    assert {'SoftTripleLoss', 'MultiSimilarityLoss', 'SupConLoss', 'TripletMarginLoss', 'CircleLoss'} <= set(trained)


def test_a_batch_that_a_loss_refuses_is_one_line():
    with pytest.raises(UserError, match='SmoothAPLoss refuses a batch of 7 images of 3 classes .* --images_per_class'):
        borrow('SmoothAPLoss')(make_batch(6)[0], LABELS)


# ---------------------------------------------------- errors ---------------------------------------------------------
@pytest.mark.parametrize(('words', 'parts'), [
    (('pml:Triplet',), ("did you mean 'TripletMarginLoss'", 'MultiSimilarityLoss')),
    (('pml:TripletMarginLoss', '--loss_args', 'margn=0.2'), ("did you mean 'margin'", 'swap')),
    (('pml:TripletMarginLoss', '--loss_args', 'margin=wide'), ('pml:TripletMarginLoss', 'wide')),
    (('pml:ArcFaceLoss', '--loss_args', 'num_classes=7'), ('num_classes', 'set by the data')),
    (('pml:CrossBatchMemory',), ('CrossBatchMemory needs loss',)),
    (('pml:VICRegLoss',), ('pml:VICRegLoss', 'embeddings and labels alone')),
    (('pml:SupConLoss', '--miner', 'HardMiner'), ('--miner HardMiner', 'BatchHardMiner'))])
def test_what_cannot_be_built_is_one_line_before_the_training(words, parts, raw_sets, tmp_path):
    result = type_command('train.py', '--loss_name', *words, '--data_path', raw_sets, '--results_dir', tmp_path, *TINY)
    assert_one_line_error(result, *parts)


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
    with pytest.raises(UserError) as caught:
        parse_options(['--loss_name', *words])
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize('text', ['margin', 'margin=', '1', '**x', 'a=b(c)', 'margin=0.2 alpha=3', '__import__("os")'])
def test_arguments_that_are_none_are_refused(text):
    with pytest.raises(UserError, match='must be A=1,B=2'):
        parse_options(['--loss_name', 'pml:TripletMarginLoss', '--loss_args', text])


def test_a_missing_package_is_one_line_and_it_is_imported_only_when_asked_for(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith('pytorch_metric_learning'):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, '__import__', without)
    with pytest.raises(UserError, match='pip install pytorch-metric-learning'):
        borrow('ProxyAnchorLoss')
    build('proxy_anchor', make_batch(0)[1])


# ---------------------------------------------------- runs -----------------------------------------------------------
@pytest.fixture(scope='module')
def glyph(tmp_path_factory):
    data_path = tmp_path_factory.mktemp('glyph')
    result = type_command('data_utils.py', '--data_path', data_path, '--data_name', 'glyph', '--glyph_classes', 12,
                          '--glyph_images', 8)
    assert result.returncode == 0, result.stderr
    return data_path


@pytest.mark.parametrize(('words', 'name', 'proxies'), [
    (('pml:SoftTripleLoss', '--loss_args', 'centers_per_class=3,margin=0.02'),
     'pml-softtripleloss_16_centers_per_class-3-margin-0.02', False),
    (('pml:MultiSimilarityLoss', '--miner', 'MultiSimilarityMiner', '--miner_args', 'epsilon=0.2'),
     'pml-multisimilarityloss_16_multisimilarityminer_epsilon-0.2', False),
    (('pml:SupConLoss',), 'pml-supconloss_16', False),
    (('pml:TripletMarginLoss', '--miner', 'TripletMarginMiner', '--miner_args', 'type_of_triplets=semihard'),
     'pml-tripletmarginloss_16_tripletmarginminer_type_of_triplets-semihard', False),
    (('pml:ProxyAnchorLoss',), 'pml-proxyanchorloss_16', True)])
def test_a_run_learns_goes_on_bit_for_bit_and_is_measured(words, name, proxies, glyph, tmp_path):
    run = f'glyph_resnet18_{name}'
    command = ('train.py', '--data_path', glyph, *SMALL_GLYPH, '--lr', 1e-3, '--loss_name', *words, '--results_dir')
    results = [type_command(*command, tmp_path / 'whole', '--num_epochs', 3),
               type_command(*command, tmp_path / 'cut', '--num_epochs', 2),
               type_command(*command, tmp_path / 'cut', '--num_epochs', 3, '--resume'),
               type_command('evaluate.py', '--data_base', tmp_path / f'whole/{run}_data_base.pth')]
    for result in results:
        assert result.returncode == 0, result.stderr
    assert 'proxies moved' not in results[0].stdout
    ends = [torch.load(tmp_path / folder / f'{run}_checkpoint.pth', weights_only=True) for folder in ('whole', 'cut')]
    for part in ('model', 'criterion'):
        for key, value in ends[0][part].items():
            assert not torch.is_tensor(value) or torch.equal(value, ends[1][part][key]), key
    rows = ends[0]['rows']
    assert rows[-1]['loss'] < rows[0]['loss'] or '--miner' in words  # mined pairs stay hard
    data_base = torch.load(tmp_path / f'whole/{run}_data_base.pth', weights_only=True)
    assert ('train_proxies' in data_base) == proxies
    assert (rows[0]['proxy_lr'] > 0) == ('SoftTriple' in words[0] or proxies)


@pytest.mark.parametrize('words', [('--proxy_lr', 0.1), ('--on_collapse', 'stop')])
def test_flags_for_proxies_are_refused_where_a_loss_has_none(words, glyph, tmp_path):
    result = type_command('train.py', '--data_path', glyph, *SMALL_GLYPH, '--results_dir', tmp_path, '--loss_name',
                          'pml:SupConLoss', *words)
    assert_one_line_error(result, f'{words[0]} {words[1]} has no effect', 'pml:SupConLoss has no proxies')
