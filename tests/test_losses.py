"""The losses against slow versions written with loops, against pytorch-metric-learning, and at the edges of float."""
import math

import pytest
import torch
from pytorch_metric_learning import losses as reference
from torch.nn import functional as F

import model
from common.errors import UserError
from model import make_loss
from recipes import LOSSES, PROXY_UPDATES, LossDefaults

N, C, D = 7, 5, 4
LABELS = torch.tensor([3, 0, 3, 1, 3, 0, 1])  # classes 2 and 4 are not in the batch


def make_batch(seed: int, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    embeddings = F.normalize(torch.randn(N, D, generator=generator, dtype=torch.float64), dim=-1).to(dtype)
    return embeddings.requires_grad_(), torch.randn(C, D, generator=generator, dtype=torch.float64)


def build(name: str, proxies: torch.Tensor, **kwargs):
    criterion = make_loss(name, num_classes=len(proxies), feature_dim=proxies.shape[1], **kwargs).to(proxies.dtype)
    if isinstance(criterion.proxies, torch.nn.Parameter):
        criterion.proxies.data.copy_(proxies)
    else:
        criterion.proxies.copy_(F.normalize(proxies, dim=-1))
    return criterion


# ---------------------------------------------------- slow versions, one scalar at a time -----------------------------
def cross_entropy_loop(logits, labels):
    terms = [sum(torch.exp(z) for z in row).log() - row[label] for row, label in zip(logits, labels, strict=True)]
    return sum(terms) / len(terms)


def proxy_anchor_loop(s, labels, alpha=32.0, delta=0.1):
    present = sorted(set(labels))
    positive = sum(torch.log(1 + sum(torch.exp(-alpha * (s[i][c] - delta)) for i, y in enumerate(labels) if y == c))
                   for c in present) / len(present)
    negative = sum(torch.log(1 + sum((torch.exp(alpha * (s[i][c] + delta)) for i, y in enumerate(labels) if y != c),
                                     start=torch.zeros((), dtype=torch.float64))) for c in range(len(s[0]))) / len(s[0])
    return positive + negative


def balanced_proxy_loop(s, labels, alpha=32.0, delta=0.1):
    total = 0
    for c in range(len(s[0])):
        positive = [torch.exp(-alpha * (s[i][c] - delta)) for i, y in enumerate(labels) if y == c]
        negative = [torch.exp(alpha * (s[i][c] + delta)) for i, y in enumerate(labels) if y != c]
        mean = sum(sum(terms) / len(terms) for terms in (positive, negative) if terms)
        total = total + torch.log(1 + mean)
    return total / len(s[0])


def balanced_proxy_split_loop(s, labels, alpha=32.0, delta=0.1):
    first, second = [], []
    for c in range(len(s[0])):
        positive = [torch.exp(-alpha * (s[i][c] - delta)) for i, y in enumerate(labels) if y == c]
        negative = [torch.exp(alpha * (s[i][c] + delta)) for i, y in enumerate(labels) if y != c]
        first += [torch.log(1 + sum(positive) / len(positive))] if positive else []
        second += [torch.log(1 + sum(negative) / len(negative))] if negative else []
    return sum(first) / len(first) + sum(second) / len(s[0])


def normalized_softmax_loop(s, labels):
    return cross_entropy_loop([[32.0 * z for z in row] for row in s], labels)


def proxy_nca_loop(s, labels):
    return cross_entropy_loop([[-9.0 * (2 - 2 * z) for z in row] for row in s], labels)


def cos_face_loop(s, labels):
    return cross_entropy_loop([[64.0 * (z - 0.35 * (c == y)) for c, z in enumerate(row)]
                               for row, y in zip(s, labels, strict=True)], labels)


def arc_face_loop(s, labels):
    def turned(z):
        angle = torch.acos(z)
        return torch.cos(angle + 0.5) if angle + 0.5 <= math.pi else z - 0.5 * math.sin(0.5)
    return cross_entropy_loop([[64.0 * (turned(z) if c == y else z) for c, z in enumerate(row)]
                               for row, y in zip(s, labels, strict=True)], labels)


LOOPS = {'proxy_anchor': proxy_anchor_loop, 'balanced_proxy': balanced_proxy_loop, 'proxy_nca': proxy_nca_loop,
         'balanced_proxy_split': balanced_proxy_split_loop,
         'normalized_softmax': normalized_softmax_loop, 'cos_face': cos_face_loop, 'arc_face': arc_face_loop}


def loop_similarity(embeddings, proxies):
    return [[sum(x[d] * p[d] for d in range(D)) / sum(p[d] ** 2 for d in range(D)).sqrt() for p in proxies]
            for x in embeddings]


def assert_same(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


def test_every_loss_has_a_slow_version():
    assert LOOPS.keys() == LOSSES.keys()


@pytest.mark.parametrize('name', LOSSES)
def test_value_and_gradients_equal_the_loops(name):
    embeddings, proxies = make_batch(0)
    criterion = build(name, proxies)
    loss = criterion(embeddings, LABELS)
    ours = loss, *torch.autograd.grad(loss, (embeddings, criterion.proxies))
    proxies = proxies.requires_grad_()
    loss = LOOPS[name](loop_similarity(embeddings, proxies), LABELS.tolist())
    assert_same(ours, (loss, *torch.autograd.grad(loss, (embeddings, proxies))))


@pytest.mark.parametrize('name', LOSSES)
def test_the_row_of_a_blank_image_is_similar_to_no_proxy(name):
    embeddings, proxies = make_batch(0)
    with torch.no_grad():
        embeddings[2] = 0
    loss = build(name, proxies)(embeddings, LABELS)
    theirs = LOOPS[name](loop_similarity(embeddings, proxies), LABELS.tolist())
    assert_same((loss, *torch.autograd.grad(loss, embeddings)), (theirs, *torch.autograd.grad(theirs, embeddings)))


@pytest.mark.parametrize('name', LOSSES)
def test_a_batch_of_one_class_equals_the_loops(name):
    embeddings, proxies = make_batch(5)  # every other class has negatives only, and this one positives only
    criterion = build(name, proxies)
    labels = torch.full((N,), 2)
    loss = criterion(embeddings, labels)
    ours = loss, *torch.autograd.grad(loss, (embeddings, criterion.proxies))
    proxies = proxies.requires_grad_()
    loss = LOOPS[name](loop_similarity(embeddings, proxies), labels.tolist())
    assert_same(ours, (loss, *torch.autograd.grad(loss, (embeddings, proxies))))


@pytest.mark.parametrize('name', LOSSES)
def test_float32_keeps_the_digits_of_a_small_loss_beside_large_positives(name):
    """Own similarities of 0.9 or more, others near 0: a sum of all less the positives would have no digit left."""
    generator = torch.Generator().manual_seed(10)
    proxies = torch.linalg.qr(torch.randn(33, 33, generator=generator, dtype=torch.float64))[0]
    labels = torch.arange(22) % 11
    noise = torch.randn(22, 33, generator=generator, dtype=torch.float64)
    embeddings = F.normalize(proxies[labels] + 0.05 * noise, dim=-1)
    precise = build(name, proxies)(embeddings, labels)
    embeddings = embeddings.float().requires_grad_()
    criterion = build(name, proxies.float())
    loss = criterion(embeddings, labels)
    # A softmax loss below the rounding of its logits (scale 18 to 64, 2^-24 each) is 0 in float32.
    softmax = name not in ('proxy_anchor', 'balanced_proxy', 'balanced_proxy_split')
    torch.testing.assert_close(loss.double(), precise, rtol=1e-4, atol=64 * 2**-23 if softmax else 0)
    assert criterion.accuracy == 1


@pytest.mark.parametrize('name', LOSSES)
def test_accuracy_is_the_share_whose_nearest_proxy_is_their_own(name):
    embeddings, proxies = make_batch(11)
    criterion = build(name, proxies)
    criterion(embeddings, LABELS)
    nearest = (embeddings @ F.normalize(proxies, dim=-1).T).argmax(1)
    assert criterion.accuracy == (nearest == LABELS).float().mean()
    collapsed = build(name, torch.ones_like(proxies))
    collapsed(embeddings, LABELS)
    assert collapsed.accuracy <= max(LABELS.bincount()) / N  # proxies in one place tell nothing apart


@pytest.mark.parametrize('label', [-1, C])
@pytest.mark.parametrize('name', LOSSES)
def test_a_label_without_proxy_does_not_pass_for_a_loss(name, label):
    embeddings, proxies = make_batch(12)
    labels = LABELS.clone()
    labels[2] = label
    with pytest.raises(UserError, match='expected are 0 to 4'):
        build(name, proxies)(embeddings, labels)


REFERENCES = {
    'proxy_anchor': lambda: (reference.ProxyAnchorLoss(C, D, margin=0.1, alpha=32), 'proxies', False),
    'normalized_softmax': lambda: (reference.NormalizedSoftmaxLoss(C, D, temperature=1 / 32), 'W', True),
    'proxy_nca': lambda: (reference.ProxyNCALoss(C, D, softmax_scale=9), 'proxies', False),
    'cos_face': lambda: (reference.CosFaceLoss(C, D, margin=0.35, scale=64), 'W', True),
    'arc_face': lambda: (reference.ArcFaceLoss(C, D, margin=math.degrees(0.5), scale=64), 'W', True),
}


def test_every_loss_but_balanced_proxy_has_a_reference():
    assert REFERENCES.keys() == {'proxy_anchor', 'normalized_softmax', 'proxy_nca', 'cos_face', 'arc_face'}


@pytest.mark.parametrize('name', REFERENCES)
def test_value_and_gradients_equal_pytorch_metric_learning(name):
    embeddings, proxies = make_batch(3)
    criterion = build(name, proxies)
    loss = criterion(embeddings, LABELS)
    ours = loss, *torch.autograd.grad(loss, (embeddings, criterion.proxies))
    theirs, weight, transposed = REFERENCES[name]()
    theirs = theirs.double()
    parameter = getattr(theirs, weight)
    parameter.data.copy_(proxies.T if transposed else proxies)
    loss = theirs(embeddings, LABELS)
    embedding_gradient, proxy_gradient = torch.autograd.grad(loss, (embeddings, parameter))
    # They normalise the embeddings once more: of their gradient only the part along the sphere is the loss's.
    along = (ours[1] * embeddings).sum(-1, keepdim=True) * embeddings
    assert_same((ours[0], ours[1] - along, ours[2]),
                (loss, embedding_gradient, proxy_gradient.T if transposed else proxy_gradient))


def test_arc_face_keeps_falling_past_pi():
    criterion = make_loss('arc_face', num_classes=2, feature_dim=2, scale=4.0)
    angles = torch.linspace(0.0, math.pi, 400, dtype=torch.float64)
    across = torch.zeros((), dtype=torch.float64)  # one other class, at a right angle
    losses = torch.stack([criterion.compute_loss(torch.stack([own, across])[None], torch.tensor([0]))
                          for own in angles.cos()])
    assert (losses[1:] > losses[:-1]).all()


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('scale', [1.0, 32.0, 256.0])
@pytest.mark.parametrize('name', LOSSES)
def test_loss_and_gradients_are_finite_at_the_poles(name, scale, dtype):
    """Embeddings on, opposite and across their proxies, in every float type: s = 1, -1 and 0."""
    proxies = torch.eye(4)
    embeddings = torch.cat([proxies, -proxies, proxies.roll(1, 0)]).to(dtype).requires_grad_()
    labels = torch.arange(4).repeat(3)
    criterion = build(name, proxies, scale=scale)
    loss = criterion(embeddings, labels)
    loss.backward()
    assert loss.isfinite()
    assert embeddings.grad.isfinite().all()
    assert criterion.proxies.grad.isfinite().all()
    double = build(name, proxies.double(), scale=scale)(embeddings.detach().double(), labels)
    torch.testing.assert_close(loss.double(), double, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', LOSSES)
def test_loss_is_float32_under_autocast(name):
    embeddings, proxies = make_batch(4, torch.float32)
    criterion = build(name, proxies.float())
    with torch.autocast('cpu', torch.bfloat16):
        inside = criterion(embeddings, LABELS)
    assert inside.dtype == torch.float32
    assert inside == criterion(embeddings, LABELS)


@pytest.mark.parametrize('name', LOSSES)
def test_the_positive_update_gives_each_proxy_the_mean_of_its_own_samples_terms(name):
    embeddings, proxies = make_batch(6)
    plain, positive = (build(name, proxies, proxy_update=update) for update in ('gradient', 'positive'))
    losses = plain(embeddings, LABELS), positive(embeddings, LABELS)
    assert losses[0] == losses[1]
    gradients = [torch.autograd.grad(loss, embeddings, retain_graph=True)[0] for loss in losses]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=0)
    # dL/ds from the loops, then by hand: mean over the class's samples of dL/ds_ic ds_ic/dp_c.
    unit = F.normalize(proxies, dim=-1)
    similarity = (embeddings.detach() @ unit.T).requires_grad_()
    slope, = torch.autograd.grad(LOOPS[name](similarity, LABELS.tolist()), similarity)
    expected = torch.zeros_like(proxies)
    for c in range(C):
        own = [i for i in range(N) if LABELS[i] == c]
        for i in own:
            x = embeddings[i].detach()
            expected[c] += slope[i, c] * (x - (x @ unit[c]) * unit[c]) / proxies[c].norm() / len(own)
    gradient, = torch.autograd.grad(losses[1], positive.proxies)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('name', LOSSES)
def test_the_momentum_update_moves_the_classes_of_the_batch_after_the_loss(name):
    embeddings, proxies = make_batch(7)
    criterion = build(name, proxies, proxy_update='momentum', momentum=0.3)
    before = criterion.proxies.clone()
    loss = criterion(embeddings, LABELS)
    torch.testing.assert_close(loss, build(name, proxies)(embeddings, LABELS), rtol=1e-12, atol=0)
    loss.backward()
    assert embeddings.grad.isfinite().all()
    for c in range(C):
        moved = 0.7 * before[c] + 0.3 * sum(
            (embeddings[i].detach() for i in range(N) if LABELS[i] == c), torch.zeros(D, dtype=torch.float64))
        expected = moved / moved.norm() if c in LABELS else before[c]
        torch.testing.assert_close(criterion.proxies[c], expected, rtol=1e-12, atol=0)


def test_moving_proxies_are_a_buffer_and_stand_still_in_eval_mode():
    embeddings, proxies = make_batch(8)
    criterion = build('proxy_nca', proxies, proxy_update='momentum').eval()
    before = criterion.proxies.clone()
    criterion(embeddings, LABELS)
    assert not list(criterion.parameters())
    assert torch.equal(criterion.state_dict()['proxies'], before)


@pytest.mark.parametrize('update', PROXY_UPDATES)
@pytest.mark.parametrize('name', LOSSES)
def test_every_pair_of_loss_and_proxy_update_trains(name, update):
    torch.manual_seed(0)
    labels = torch.arange(C).repeat(6)
    centres = F.normalize(torch.randn(C, 16), dim=-1)
    images = centres[labels] + 0.3 * torch.randn(len(labels), 16)
    network, criterion = torch.nn.Linear(16, 32), make_loss(name, num_classes=C, feature_dim=32, proxy_update=update)
    groups = [{'params': list(network.parameters()), 'lr': 0.02}, {'params': list(criterion.parameters()), 'lr': 0.002}]
    optimizer = torch.optim.Adam([group for group in groups if group['params']])
    start = criterion(F.normalize(network(images), dim=-1), labels).item()
    for _ in range(50):
        loss = criterion(F.normalize(network(images), dim=-1), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < start / 2
    assert criterion.accuracy > 0.95


@pytest.mark.parametrize('kwargs', [{'margin': 0.1}, {'scale': 0.0}, {'momentum': 0.0}, {'proxy_update': 'sideways'}])
def test_a_setting_that_makes_no_sense_is_refused(kwargs):
    with pytest.raises(UserError):
        make_loss('normalized_softmax', num_classes=C, feature_dim=D, **kwargs)


@pytest.mark.parametrize('update', PROXY_UPDATES)
def test_proxies_start_at_the_mean_directions_of_their_classes(update):
    embeddings, proxies = make_batch(2)
    criterion = build('normalized_softmax', proxies, proxy_update=update)
    labels = torch.arange(N) % C
    criterion.start_at_class_means(embeddings.detach(), labels)
    expected = []
    for c in range(C):
        total = sum(embeddings[i].detach() for i in range(N) if labels[i] == c)
        expected.append(total / total.square().sum().sqrt())
    torch.testing.assert_close(criterion.proxies.detach(), torch.stack(expected))
    assert [*criterion.state_dict()] == ['proxies']


def test_unit_proxies_are_the_proxies_as_unit_rows_without_gradient():
    proxies = make_batch(14)[1]
    unit = build('proxy_anchor', proxies).unit_proxies()
    torch.testing.assert_close(unit, torch.stack([row / row.square().sum().sqrt() for row in proxies]))
    assert not unit.requires_grad


@pytest.mark.parametrize(('embeddings', 'labels', 'message'), [
    (torch.eye(3), torch.tensor([0, 1, 2]), r'expected are \(N, 4\) floats'),
    (torch.eye(4)[:, :4].long(), torch.arange(4), r'expected are \(N, 4\) floats'),
    (torch.eye(4), torch.arange(3), r'expected are \(4,\) of torch.int64'),
    (torch.eye(4), torch.arange(4).int(), r'expected are \(4,\) of torch.int64'),
    (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 'the batch is empty'),
    (1.2 * torch.eye(4), torch.arange(4), 'a norm deviates from 1 by 0.2'),
    (0.5 * torch.eye(4), torch.arange(4), 'a norm deviates from 1 by 0.5')])
def test_a_batch_whose_loss_would_be_meaningless_is_refused(embeddings, labels, message):
    with pytest.raises(UserError, match=message):
        make_loss('proxy_nca', num_classes=C, feature_dim=D)(embeddings, labels)


def test_proxies_start_as_the_recipes_say():
    torch.manual_seed(0)
    unit = make_loss('balanced_proxy', num_classes=50, feature_dim=64).proxies.detach()
    torch.testing.assert_close(unit.norm(dim=-1), torch.ones(50))
    kaiming = make_loss('proxy_anchor', num_classes=50, feature_dim=64, proxy_init='kaiming').proxies.detach()
    assert abs(kaiming.std().item() - math.sqrt(2 / 50)) < 0.02  # fan_out is the number of rows


def test_every_registered_loss_has_defaults_and_every_default_a_loss():
    assert model.LOSS_CLASSES.keys() == LOSSES.keys()


def test_a_loss_without_defaults_cannot_be_registered():
    with pytest.raises(AssertionError, match=r'recipes\.LOSSES'):
        model.register('no_such_loss')(model.ProxyLoss)


def test_a_new_loss_needs_its_formula_only(monkeypatch):
    monkeypatch.setitem(LOSSES, 'plain', LossDefaults(2.0))
    monkeypatch.setitem(model.LOSS_CLASSES, 'plain', None)  # put back what register changes

    @model.register('plain')
    class Plain(model.ProxyLoss):
        def compute_loss(self, similarity, labels):
            return -self.scale * similarity.gather(1, labels[:, None]).mean()

    embeddings, proxies = make_batch(13)
    unit = F.normalize(proxies, dim=-1)
    expected = -2 * sum(embeddings[i] @ unit[y] for i, y in enumerate(LABELS)) / N
    for update in PROXY_UPDATES:
        torch.testing.assert_close(build('plain', proxies, proxy_update=update)(embeddings, LABELS), expected)
