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
from engine.runs import load_model_file
from proxies import ProxyConfig, ProxyLoss
from recipes import LOSSES, POOLINGS, TRUNKS, canonical_backbone
from trunks import build_trunk

SHRINKAGE = 0.3  # of the eigenvalues towards their mean, in whiten


# ---------------------------------------------------- embedding network ----------------------------------------------
@dataclass(frozen=True)
class NetConfig:
    """What an embedding network is, as its model file stores it.

    Attributes:
        backbone_type: a key of TRUNKS, or `timm:` and the name of a timm model.
        feature_dim: D, the length of an embedding; 0 leaves the linear layer out (D is the trunk's width).
        pooling: `max`, `avg`, `avg_max` (their sum, Proxy Anchor), `gem` (a mean of powers, the power learned) or
            `cls` (the class token of a transformer).
        layer_norm: normalise the pooled features (no weights) before the linear layer.
        linear_bias: give the linear layer a bias, with Proxy Anchor's start (kaiming normal fan_out, bias 0).
        freeze_bn: keep the trunk's BatchNorm statistics as they are, in training too.
        image_size: side of the square images in pixels.
        max_pool: keep the max-pool in the stem of a ResNet; leave it out for images below about 100 px.
        mirror: outside the training an embedding is the mean of those of an image and its mirror image.
    """

    backbone_type: str
    feature_dim: int
    pooling: str = 'max'
    layer_norm: bool = True
    linear_bias: bool = False
    freeze_bn: bool = True
    image_size: int = 224
    max_pool: bool = True
    mirror: bool = False


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
        if config.pooling == 'gem':
            self.power = nn.Parameter(torch.tensor(3.0))
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

    def headless(self) -> nn.Module:
        """Return the network up to its linear layer, which maps images to `features`; the weights are shared."""
        return Headless(self)

    @torch.no_grad()
    def whiten(self, features: torch.Tensor) -> None:
        """Start the linear layer as the whitening of the directions of features (N, width) of images.

        Its rows are their D first principal components, D at most the width, each divided by sqrt(l + s mean l), l the
        eigenvalues of the second moment, s SHRINKAGE: without the second term, directions in which a few images hardly
        vary would weigh the most. The moment is about 0, so that the layer needs no bias, and its weights get the
        length that they had before, so that a learning rate keeps its meaning.

        Source: Jegou & Chum, Negative Evidences and Co-occurrences in Image Retrieval, ECCV 2012.
        """
        weight, features = self.refactor.weight, F.normalize(features.double(), dim=-1)
        values, vectors = torch.linalg.eigh(features.T @ features / len(features))  # ascending
        values, vectors = values.clamp(min=0).flip(0), vectors.flip(1)
        rows = (vectors / (values + SHRINKAGE * values.mean()).sqrt())[:, :len(weight)].T.to(weight.dtype)
        weight.copy_(rows * (weight.norm().to(rows.device) / rows.norm()))

    def pool(self, features: torch.Tensor, pooling: str) -> torch.Tensor:
        """Pool a feature map (N, C, H, W) or tokens (N, L, C) to (N, C).

        `gem` is (mean max(f, 1e-6)^p)^(1/p), in float32. Source: Radenovic et al., TPAMI 2018, arXiv 1711.02512.
        """
        if features.ndim == 3:
            if pooling == 'cls':
                return features[:, 0]
            features = features[:, self.prefix_tokens:].transpose(1, 2)
        features = features.flatten(2)
        pooled = {'max': lambda: features.amax(2), 'avg': lambda: features.mean(2),
                  'avg_max': lambda: features.mean(2) + features.amax(2),
                  'gem': lambda: features.float().clamp(min=1e-6).pow(self.power).mean(2).pow(1 / self.power)}
        return pooled[pooling]()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the embeddings (N, D), float32 or wider, unit rows, of uint8 RGB images (N, 3, H, W)."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or not images.shape[0]:
            raise UserError(f'images are {tuple(images.shape)} of {images.dtype}; expected are (N, 3, H, W) of '
                            'torch.uint8, RGB from 0 to 255, N at least 1')
        embeddings = self.embed(images)
        if self.config.mirror and not self.training:
            embeddings = F.normalize(embeddings + self.embed(images.flip(3)), dim=-1)
        return embeddings

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Return the features (N, width) of images that the linear layer sees."""
        features = self.pool(self.trunk(self.preprocess(images)), self.config.pooling)
        return F.layer_norm(features, features.shape[-1:]) if self.config.layer_norm else features

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of images as they are."""
        features = self.refactor(self.features(images))
        return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


class BareTrunk(nn.Module):
    """The average pooled features of a network's trunk as embeddings: from where a training starts."""

    def __init__(self, model: EmbeddingNet):
        super().__init__()
        self.model, self.feature_dim = model, model.width

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.model.pool(self.model.trunk(self.model.preprocess(images)), 'avg')
        return F.normalize(features.float(), dim=-1)


class Headless(nn.Module):
    """A network without its linear layer."""

    def __init__(self, model: EmbeddingNet):
        super().__init__()
        self.model, self.feature_dim = model, model.width

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model.features(images).float()


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
def make_loss(name: str, **settings) -> ProxyLoss:
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
    The paper's text is not public; this is the definition used here. It is the loss of the stage before in the author's
    own public code, which has the same command line, scale and margin (there with AdamP; the system's page adds weight
    decay and layer norm).

    Source: Balanced proxy loss for fine-grained image retrieval, Pattern Recognition Letters.
    """
    negatives = 'of_class'

    def formula(self, own: torch.Tensor, negative: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        count = self.count(labels).to(own.dtype)  # (C,) positives of each class
        positive = self.logsumexp_by_class(-self.scale * (own - self.margin), labels) - count.clamp(min=1).log()
        negative = negative + self.scale * self.margin - (len(labels) - count).clamp(min=1).log()
        return self.combine(positive, negative, count > 0)  # a log of a mean is that of the sum, less log n

    def combine(self, positive: torch.Tensor, negative: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """Return the loss () of the logarithms (C,) of the means of each class, which is in the batch or not (C,)."""
        return log1pexp(torch.logaddexp(positive, negative)).mean()


class BalancedProxySplit(BalancedProxy):
    """Balanced Proxy with a logarithm for each of its two means, as Proxy Anchor has them:
    1/|P+| sum_{c in P+} log(1 + mean_{i: y_i = c} exp(-alpha (s_ic - delta)))
    + 1/C sum_c log(1 + mean_{i: y_i != c} exp(alpha (s_ic + delta))).

    Another reading of the system's page, for comparison.
    """

    def combine(self, positive: torch.Tensor, negative: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        return log1pexp(positive).sum() / present.sum() + log1pexp(negative).mean()


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
