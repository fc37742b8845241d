"""The embedding network and the proxy losses.

    model = EmbeddingNet(NetConfig('resnet50', feature_dim=512))
    criterion = make_loss('balanced_proxy', num_classes=98, feature_dim=512)  # it owns the proxies (C, D)
    embeddings = model(images)               # (N, D) float32, unit rows; images (N, 3, H, W) uint8
    loss = criterion(embeddings, labels)

To add a loss, write one class with its formula on the cosine similarities and one line in recipes.LOSSES. Every loss
works with each of the three ways in which proxies move (`gradient`, `positive`, `momentum`), see ProxyLoss.
"""
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from engine.errors import UserError, check_choice, reason_of
from engine.processes import broadcast, check_same, gather_rows, shard, world_size
from engine.runs import load_model_file
from engine.similarities import LOG_ZERO, Pairs, Similarities, check_batch, draw_proxies, row_of
from recipes import LOSSES, MOMENTUM, POOLINGS, PROXY_UPDATES, TRUNKS, canonical_backbone
from trunks import build_trunk


# ---------------------------------------------------- embedding network ----------------------------------------------
@dataclass(frozen=True)
class NetConfig:
    """What an embedding network is, as its model file stores it.

    Attributes:
        backbone_type: a key of TRUNKS, or `timm:` and the name of a timm model.
        feature_dim: D, the length of an embedding; 0 leaves the linear layer out (D is the trunk's width).
        pooling: `max`, `avg`, `avg_max` (their sum, Proxy Anchor) or `cls` (the class token of a transformer).
        layer_norm: normalise the pooled features (no weights) before the linear layer.
        linear_bias: give the linear layer a bias, with Proxy Anchor's start (kaiming normal fan_out, bias 0).
        freeze_bn: keep the trunk's BatchNorm statistics as they are, in training too.
        image_size: side of the square images in pixels.
        max_pool: keep the max-pool in the stem of a ResNet; leave it out for images below about 100 px.
    """

    backbone_type: str
    feature_dim: int
    pooling: str = 'max'
    layer_norm: bool = True
    linear_bias: bool = False
    freeze_bn: bool = True
    image_size: int = 224
    max_pool: bool = True


class EmbeddingNet(nn.Module):
    """Map images to unit vectors: trunk -> pooling -> layer norm -> linear (`refactor`) -> L2 normalise.

    Args:
        config: what it is.
        weights: of the trunk: `imagenet`, `none`, or the path of a state dict.

    Raises:
        UserError: if the trunk is not known, its weights cannot be had, or a setting does not fit it.
    """

    def __init__(self, config: NetConfig, weights: str = 'imagenet'):
        super().__init__()
        self.config = config
        check_choice('--pooling', config.pooling, POOLINGS)
        name = canonical_backbone(config.backbone_type)
        if not config.max_pool and TRUNKS.get(name) != 'resnet':
            raise UserError(f'--max_pool 0 is for the ResNets; leave it out with --backbone_type {name}')
        trunk = build_trunk(name, weights, config.image_size)
        if not config.max_pool:
            trunk.module.maxpool = nn.Identity()
        if config.pooling == 'cls' and not trunk.prefix_tokens:
            raise UserError(f'--pooling cls needs a transformer with a class token, not {name}')

        self.trunk, self.prefix_tokens = trunk.module, trunk.prefix_tokens
        self.interpolation, self.bgr, self.value_range = trunk.interpolation, trunk.bgr, trunk.value_range
        self.width, self.feature_dim = trunk.width, config.feature_dim or trunk.width
        self.refactor = nn.Identity()
        if config.feature_dim:
            self.refactor = nn.Linear(trunk.width, config.feature_dim, bias=config.linear_bias)
            if config.linear_bias:
                nn.init.kaiming_normal_(self.refactor.weight, mode='fan_out')
                nn.init.zeros_(self.refactor.bias)
        self.register_buffer('mean', torch.tensor(trunk.mean).view(3, 1, 1), persistent=False)
        self.register_buffer('std', torch.tensor(trunk.std).view(3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> 'EmbeddingNet':
        """Switch the mode; BatchNorm statistics stay frozen (eval mode) where `freeze_bn` asks for it."""
        super().train(mode)
        if mode and self.config.freeze_bn:
            for module in self.trunk.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def freeze_trunk(self, frozen: bool) -> None:
        """Let the trunk learn or not (warm-up); clears its gradients, since AdamW moves a weight with a stale one."""
        for parameter in self.trunk.parameters():
            parameter.requires_grad_(not frozen)
            parameter.grad = None

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """Scale uint8 RGB images (N, 3, H, W) as the trunk was trained: its range, channel order, mean and std."""
        images = images.to(self.mean.dtype).mul(self.value_range / 255)
        images = images.flip(1) if self.bgr else images
        return ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def untouched(self) -> nn.Module:
        """Return the bare trunk: average pooling, no layer norm, no linear layer; the weights are shared."""
        return BareTrunk(self)

    def pool(self, features: torch.Tensor, pooling: str) -> torch.Tensor:
        """Pool a feature map (N, C, H, W) or tokens (N, L, C) to (N, C)."""
        if features.ndim == 3:
            if pooling == 'cls':
                return features[:, 0]
            features = features[:, self.prefix_tokens:].transpose(1, 2)
        features = features.flatten(2)
        pooled = {'max': lambda: features.amax(2), 'avg': lambda: features.mean(2),
                  'avg_max': lambda: features.mean(2) + features.amax(2)}
        return pooled[pooling]()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the embeddings (N, D), float32 or wider, unit rows, of uint8 RGB images (N, 3, H, W)."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or not images.shape[0]:
            raise UserError(f'images are {tuple(images.shape)} of {images.dtype}; expected are (N, 3, H, W) of '
                            'torch.uint8, RGB from 0 to 255, N at least 1')
        features = self.pool(self.trunk(self.preprocess(images)), self.config.pooling)
        if self.config.layer_norm:
            features = F.layer_norm(features, features.shape[-1:])
        features = self.refactor(features)
        return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


class BareTrunk(nn.Module):
    """The average pooled features of a network's trunk as embeddings: from where a training starts."""

    def __init__(self, model: EmbeddingNet):
        super().__init__()
        self.model, self.feature_dim = model, model.width

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.model.pool(self.model.trunk(self.model.preprocess(images)), 'avg')
        return F.normalize(features.float(), dim=-1)


def load_model(path: str | Path, device: torch.device | str = 'cpu') -> tuple[EmbeddingNet, dict]:
    """Build the network of a run from its `{run}_model.pth`, or a folder of export.py; returns it and its contents."""
    contents = load_model_file(path)
    try:
        model = EmbeddingNet(NetConfig(**contents['config']), 'none')
        model.load_state_dict(contents['state_dict'])
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f'{path} does not fit its own description ({reason_of(error)}); it was damaged or made by '
                        'another version') from None
    return model.to(device, memory_format=torch.channels_last).eval(), contents


# ---------------------------------------------------- losses ---------------------------------------------------------
@dataclass(frozen=True)
class ProxyConfig:
    """What a loss with proxies is built from.

    Attributes:
        num_classes: C.
        feature_dim: D.
        proxy_update: `gradient`, `positive` or `momentum`.
        momentum: m in (0, 1], for `momentum` only.
        scale: alpha = 1 / temperature.
        margin: delta; None where the formula has no margin.
        proxy_init: `unit` (unit random rows) or `kaiming` (normal, fan_out; Proxy Anchor).
        shard_proxies: hold C / W of the proxies in each of W processes.
    """

    num_classes: int
    feature_dim: int
    proxy_update: str = 'gradient'
    momentum: float = MOMENTUM
    scale: float | None = None
    margin: float | None = None
    proxy_init: str = 'unit'
    shard_proxies: bool = False


def make_loss(name: str, **settings) -> 'ProxyLoss':
    """Build a loss of recipes.LOSSES from settings of ProxyConfig; scale and margin are its own unless they are given.

    Raises:
        UserError: if a setting is out of range, or there is a margin for a loss that has none.
    """
    entry, config = LOSSES[check_choice('the loss', name, LOSSES)], ProxyConfig(**settings)
    if config.margin is not None and entry.margin is None:
        raise UserError(f'--margin {config.margin} has no effect: {name} has no margin; leave it out')
    return globals()[entry.class_name](replace(
        config, scale=entry.scale if config.scale is None else config.scale,
        margin=entry.margin if config.margin is None else config.margin))


class ProxyLoss(nn.Module):
    """Hold one proxy per class and the three ways in which proxies move; a loss adds its formula on the similarities.

    `gradient`: proxies are parameters, trained by the loss. `positive`: they are too, but class c receives only the
    terms of its own samples, averaged over them. `momentum`: they are a buffer without gradient; in training mode each
    call moves the proxies of the classes in the batch, after the loss was computed with those from before:
    p_c <- normalize((1 - m) p_c + m sum_{i: y_i = c} x_i).

    With several processes the loss is that of the global batch: each process gathers all embeddings and computes the
    same loss. The gradient of the proxies is then the same everywhere, and whole: do not wrap this module in
    DistributedDataParallel, only the network. Call `synchronise` where an epoch starts. With `shard_proxies` a process
    holds the proxies (and the optimizer their state) of its share of the classes; the values at the start, the loss
    and the steps are those of one process with all of them.

    Source: Positive Proxy (`positive`), Asymptotic Proxy and Momentum Proxy (`momentum`).
    """

    negatives = 'of_sample'  # what `formula` reads: see there
    slope = 1.0  # of the exponents in alpha s; 2 where they hold squared distances, d = 2 - 2 s

    def __init__(self, config: ProxyConfig):
        super().__init__()
        check_choice('--proxy_update', config.proxy_update, PROXY_UPDATES)
        if not 0 < config.momentum <= 1:
            raise UserError(f'--momentum {config.momentum} must be above 0 and at most 1')
        if not 0 < config.scale < math.inf:
            raise UserError(f'--scale {config.scale} must be a positive number')
        if config.shard_proxies and (config.num_classes < world_size() or self.negatives == 'matrix'):
            raise UserError(f'--shard_proxies: {config.num_classes} classes are fewer than the {world_size()} '
                            'processes, or the loss needs all similarities in one; leave it out')
        self.num_classes, self.proxy_update, self.momentum = config.num_classes, config.proxy_update, config.momentum
        self.scale, self.margin = config.scale, config.margin
        self.classes = shard(self.num_classes) if config.shard_proxies else range(self.num_classes)  # with proxies here
        check_same('the random state in which the proxies are drawn', torch.get_rng_state())
        proxies = draw_proxies(self.num_classes, self.classes, config.feature_dim, config.proxy_init)
        if self.proxy_update == 'momentum':
            self.register_buffer('proxies', F.normalize(proxies, dim=-1))
        else:
            self.proxies = nn.Parameter(proxies)
        self.accuracy = torch.zeros(())  # share of the last batch whose nearest proxy is its own; stays on the device
        self.num_samples = 0  # in the last batch, of all processes

    def formula(self, own: torch.Tensor, negative: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss (); each loss writes its own.

        Args:
            own: (N,), s_iy, the cosine similarity of sample i to the proxy of its class y.
            negative: log sum exp(slope alpha s_ic), over the samples i of other classes for each class (C,) where
                `negatives` is `of_class`, over the other classes c for each sample (N,) where it is `of_sample`.
            labels: (N,).

        Where `negatives` is `matrix` it is called as formula(similarity, labels) with all similarities (N, C): slower,
        and without --shard_proxies, but free to be anything.
        """
        raise TypeError(f'{type(self).__name__} has no formula')

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss () of embeddings (N, D; any float type) with labels (N,) int64 in [0, C).

        With several processes they are each one's part of the batch, and the loss is that of the whole.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            dtype = torch.promote_types(embeddings.dtype, self.proxies.dtype)  # float32 or wider
            check_batch(embeddings, labels, self.proxies.shape[1], self.num_classes)
            embeddings, labels = gather_rows(embeddings.to(dtype)), gather_rows(labels)
            proxies = self.proxies.to(dtype)
            fixed = proxies.detach() if self.proxy_update == 'positive' else proxies
            carried = self.carry_positives(embeddings, proxies, labels)
            if self.negatives == 'matrix':
                similarity, column = embeddings @ F.normalize(fixed, dim=-1).T, labels[:, None]
                hit = similarity.gather(1, column) > similarity.scatter(1, column, -math.inf).amax(1, keepdim=True)
                loss = self.formula(similarity.scatter_add(1, column, carried[:, None]), labels)
            else:
                own, negative, hit = Similarities.apply(embeddings, fixed, labels, Pairs(
                    self.slope * self.scale, self.negatives, self.classes, self.num_classes))
                loss = self.formula(own + carried, negative, labels)
            self.accuracy, self.num_samples = hit.float().mean(), len(labels)
            if self.training and self.proxy_update == 'momentum':
                self.move_proxies(embeddings.detach().to(self.proxies.dtype), labels)
        return loss

    def carry_positives(self, embeddings: torch.Tensor, proxies: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return zeros (N,) that under the rule `positive` carry the gradient of the positive pairs to the proxies."""
        if self.proxy_update != 'positive':
            return embeddings.new_zeros(len(labels))
        row, here = row_of(labels, self.classes)
        positive = (embeddings.detach() * F.normalize(proxies[row], dim=-1)).sum(-1)
        positive = torch.where(here, positive / self.count(labels)[labels], 0)
        return positive - positive.detach()

    @torch.no_grad()
    def move_proxies(self, embeddings: torch.Tensor, labels: torch.Tensor) -> None:
        """Move the proxies of the classes in the batch towards their embeddings; the others stay as they are."""
        row, here = row_of(labels, self.classes)
        same = labels[:, None] == labels  # (N, N)
        first = same.int().argmax(1) == torch.arange(len(labels), device=labels.device)  # one sample for each class
        sums = same.to(embeddings.dtype) @ embeddings  # (N, D), of the class of each sample
        old = self.proxies[row]
        moved = F.normalize((1 - self.momentum) * old + self.momentum * sums, dim=-1)
        step = torch.where((first & here)[:, None], moved - old, 0)
        self.proxies = self.proxies.index_add(0, row, step)  # a new tensor: the backward still needs the old one

    def count(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the number of samples of each class (C,); unlike bincount it does not wait for the device."""
        ones = torch.ones_like(labels, dtype=self.proxies.dtype)
        return torch.zeros(self.num_classes, dtype=ones.dtype, device=labels.device).index_add_(0, labels, ones)

    def logsumexp_by_class(self, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return log sum_{i: y_i = c} exp(z_i) (C,) of z (N,), LOG_ZERO for a class without samples."""
        empty = z.new_full((self.num_classes,), LOG_ZERO)
        largest = empty.scatter_reduce(0, labels, z.detach(), 'amax')
        total = torch.zeros_like(empty).index_add(0, labels, (z - largest[labels]).exp())
        return largest + total.where(total > 0, 1).log()  # without samples LOG_ZERO + 0

    # ---- several processes; in one, these are the plain values, and every process has to call them ----
    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the rows (C, ...) of all classes from those (c, ...) of this process's."""
        return gather_rows(rows) if len(self.classes) < self.num_classes else rows

    def all_proxies(self) -> torch.Tensor:
        """Return the proxies (C, D) of all classes, without gradient."""
        return self.gather(self.proxies.detach())

    def synchronise(self) -> None:
        """Give every process the values of the first: sums on a GPU differ in their last bits from run to run."""
        for name, tensor in self.state_dict().items():
            if name != 'proxies' or len(self.classes) == self.num_classes:
                broadcast(tensor)

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """Return the state of all processes as one would have it."""
        return {**self.state_dict(), 'proxies': self.all_proxies()}

    def load_full_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Load what `full_state_dict` returned, in any number of processes."""
        if len(state_dict['proxies']) != self.num_classes:
            raise RuntimeError(f'{len(state_dict["proxies"])} proxies for {self.num_classes} classes')
        self.load_state_dict({**state_dict, 'proxies': self.rows_here(state_dict['proxies'])})

    def full_optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict:
        """Return the state dict of an optimizer as one process would have it."""
        return self._change_optimizer_state(optimizer, optimizer.state_dict(), self.gather)

    def load_full_optimizer_state(self, optimizer: torch.optim.Optimizer, contents: dict) -> None:
        """Load what `full_optimizer_state` returned, in any number of processes."""
        optimizer.load_state_dict(self._change_optimizer_state(optimizer, contents, self.rows_here))

    def rows_here(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the rows (c, ...) of this process's classes from those (C, ...) of all."""
        return rows[self.classes.start:self.classes.stop]

    def _change_optimizer_state(self, optimizer: torch.optim.Optimizer, contents: dict, change) -> dict:
        """Return the state dict of an optimizer, what it knows of each row of the proxies changed."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group['params']]
        state = {number: {name: change(value) if torch.is_tensor(value) and value.ndim else value  # a step has no rows
                          for name, value in values.items()} if parameters[number] is self.proxies else values
                 for number, values in contents['state'].items()}
        return {**contents, 'state': state}


def log1pexp(z: torch.Tensor) -> torch.Tensor:
    """Return log(1 + exp(z)) to the last digit; F.softplus drops the 1 above 20."""
    return torch.logaddexp(z, torch.zeros_like(z))


def cross_entropy(target: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """Return the mean over samples of -log(e^target / (e^target + e^negative)), negative a log-sum-exp (N,)."""
    return log1pexp(negative - target).mean()


class ProxyAnchor(ProxyLoss):
    """Proxy Anchor: 1/|P+| sum_{c in P+} log(1 + sum_{i: y_i = c} exp(-alpha (s_ic - delta)))
    + 1/C sum_c log(1 + sum_{i: y_i != c} exp(alpha (s_ic + delta))), P+ the classes in the batch.

    Source: Kim et al., CVPR 2020, arXiv 2003.13911, eq. 4.
    """
    negatives = 'of_class'

    def formula(self, own: torch.Tensor, negative: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        positive = self.logsumexp_by_class(-self.scale * (own - self.margin), labels)  # (C,)
        num_present = (self.count(labels) > 0).sum()
        return log1pexp(positive).sum() / num_present + log1pexp(negative + self.scale * self.margin).mean()


class BalancedProxy(ProxyLoss):
    """Balanced Proxy: 1/C sum_c log(1 + mean_{i: y_i = c} exp(-alpha (s_ic - delta))
    + mean_{i: y_i != c} exp(alpha (s_ic + delta))), an empty mean is 0.

    The few positives and the many negatives of a class are averaged, so that both weigh alike, in one logarithm.
    The paper's text is not public; this is the definition used here. It follows the unified form that the same author
    published just before.

    Source: Balanced proxy loss for fine-grained image retrieval, Pattern Recognition Letters.
    """
    negatives = 'of_class'

    def formula(self, own: torch.Tensor, negative: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        count = self.count(labels).to(own.dtype)  # (C,) positives of each class
        positive = self.logsumexp_by_class(-self.scale * (own - self.margin), labels) - count.clamp(min=1).log()
        negative = negative + self.scale * self.margin - (len(labels) - count).clamp(min=1).log()
        return log1pexp(torch.logaddexp(positive, negative)).mean()  # a log of a mean is that of the sum, less log n


class NormalizedSoftmax(ProxyLoss):
    """Normalized softmax: the cross entropy of alpha s. Source: Zhai & Wu, BMVC 2019, arXiv 1811.12649."""

    def formula(self, own: torch.Tensor, negative: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return cross_entropy(self.scale * own, negative)


class ProxyNCA(ProxyLoss):
    """ProxyNCA++: the cross entropy of -alpha d, d_ic = ||x_i - p_c||^2 = 2 - 2 s_ic, the positive in the denominator.

    The 2 is the same in all logits and drops out.

    Source: Movshovitz-Attias et al., ICCV 2017, arXiv 1703.07464; Teh et al., ECCV 2020, arXiv 2004.01113, eq. 5.
    """
    slope = 2.0

    def formula(self, own: torch.Tensor, negative: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return cross_entropy(2 * self.scale * own, negative)


class CosFace(ProxyLoss):
    """CosFace: the cross entropy of alpha (s_ic - delta [c = y_i]).

    Source: Wang et al., CVPR 2018, arXiv 1801.09414, eq. 4.
    """

    def formula(self, own: torch.Tensor, negative: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return cross_entropy(self.scale * (own - self.margin), negative)


class ArcFace(ProxyLoss):
    """ArcFace: the cross entropy of alpha cos(theta_ic + delta [c = y_i]), theta = arccos s, delta in radians.

    Once theta + delta passes pi, s - delta sin(delta) takes its place, which keeps falling with s. There is no acos:
    its gradient is infinite at s = 1.

    Source: Deng et al., CVPR 2019, arXiv 1801.07698, eq. 3.
    """

    def formula(self, own: torch.Tensor, negative: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        square = 1 - own.square()  # rounding can take it to 0 and below, where sqrt has no finite gradient
        sine = square.where(square > 0, 1.0).sqrt().where(square > 0, 0.0)
        turned = own * math.cos(self.margin) - sine * math.sin(self.margin)
        past_pi = own < -math.cos(self.margin)
        target = torch.where(past_pi, own - self.margin * math.sin(self.margin), turned)
        return cross_entropy(self.scale * target, negative)
