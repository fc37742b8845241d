"""Trunks, the embedding network, and the proxy losses.

    embeddings = model(images)               # (N, D) float32, unit rows; images (N, 3, H, W) uint8
    loss = criterion(embeddings, labels)     # the criterion owns the proxies (C, D)

To add a loss, write one class with its formula on the cosine similarities and one entry in LOSSES; to add a trunk,
one function and one entry in BACKBONES. Every loss works with each of the three ways in which proxies move
(`gradient`, `positive`, `momentum`), see ProxyLoss.
"""
import math
import re
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from recipes import LOSS_SETTINGS, MOMENTUM, POOLINGS, PROXY_UPDATES, canonical_backbone
from utils import (UserError, broadcast, check_choice, check_same, gather_rows, load, shard, sum_over_processes,
                   world_size)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BN_INCEPTION_URL = 'http://data.lip6.fr/cadene/pretrainedmodels/bn_inception-52deb4733.pth'


# ---------------------------------------------------- trunks ---------------------------------------------------------
class Trunk(NamedTuple):
    """A network without its head, and the pixels that it was trained on."""

    module: nn.Module
    width: int  # channels of its features
    mean: tuple = IMAGENET_MEAN
    std: tuple = IMAGENET_STD
    value_range: float = 1.0  # pixels are scaled to [0, value_range] before mean and std
    bgr: bool = False
    interpolation: str = 'bilinear'
    prefix_tokens: int = 0  # class and register tokens before the patch tokens


def load_weights(weights: str, url: str | None) -> dict | None:
    """Return a state dict for `--weights`: `none`, `imagenet` (downloaded once, checked against its hash) or a path.

    Raises:
        UserError: if the download fails or does not have the hash in its file name, or the path holds no weights.
    """
    if weights == 'none':
        return None
    if weights != 'imagenet':
        contents = load(weights, 'weights file')
        contents = contents.get('state_dict', contents) if isinstance(contents, dict) else None
        if not isinstance(contents, dict) or not contents or not all(
                isinstance(key, str) and torch.is_tensor(value) for key, value in contents.items()):
            raise UserError(f'--weights {weights} holds no state dict (a dict of tensors by name)')
        return contents
    file = Path(torch.hub.get_dir()) / 'checkpoints' / url.rsplit('/', 1)[1]
    hash_prefix = re.search(r'-([a-f0-9]{8,})\.pth$', file.name)[1]
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(file), hash_prefix)
        except (OSError, RuntimeError) as error:  # RuntimeError: the hash differs
            raise UserError(f'the ImageNet weights could not be downloaded from {url} ({error}); get the file '
                            'elsewhere and name it with --weights FILE, or train from scratch with --weights '
                            'none') from None
    return load(file, 'weights file')


def fill(module: nn.Module, state_dict: dict | None, head: tuple[str, ...], name: str) -> nn.Module:
    """Load a state dict strictly, but for the keys of the classification head, which the module does not have.

    Raises:
        UserError: if keys or shapes are not those of the trunk `name`.
    """
    if state_dict is None:
        return module
    state_dict = {key: value for key, value in state_dict.items() if not key.startswith(head)}
    expected = module.state_dict()
    counters = {key for key in expected if key.endswith('num_batches_tracked')}  # not in files of old PyTorch
    missing = [key for key in expected if key not in state_dict and key not in counters]
    unexpected = [key for key in state_dict if key not in expected]
    reshaped = [key for key, value in expected.items()
                if key in state_dict and getattr(state_dict[key], 'shape', None) != value.shape]
    if missing or unexpected or reshaped:
        example = (missing + unexpected + reshaped)[0]
        raise UserError(f'--weights are not those of --backbone_type {name}: {len(missing)} tensors missing, '
                        f'{len(unexpected)} unexpected, {len(reshaped)} of another shape (e.g. {example})')
    module.load_state_dict({**{key: expected[key] for key in counters}, **state_dict})
    return module


def headless(network: nn.Module, *head: str) -> nn.Sequential:
    """Return a network without the layers of its head, under the same names, so that its weights still fit."""
    return nn.Sequential(OrderedDict((name, layer) for name, layer in network.named_children()
                                     if name not in head and layer is not None))


def resnet(name: str, weights: str) -> Trunk:
    """Build a torchvision ResNet up to its last feature map (He et al., CVPR 2016, arXiv 1512.03385)."""
    from torchvision import models

    url = models.get_model_weights(name)['IMAGENET1K_V1'].url
    whole = models.get_model(name, weights=None)
    trunk = headless(whole, 'avgpool', 'fc')
    return Trunk(fill(trunk, load_weights(weights, url), ('fc.',), name), whole.fc.in_features)


def googlenet(name: str, weights: str) -> Trunk:
    """Build torchvision's GoogLeNet without auxiliary heads (Szegedy et al., CVPR 2015, arXiv 1409.4842)."""
    from torchvision import models

    whole = models.googlenet(weights=None, aux_logits=False, transform_input=False, init_weights=weights == 'none')
    trunk = headless(whole, 'avgpool', 'dropout', 'fc')
    url = models.GoogLeNet_Weights.IMAGENET1K_V1.url
    return Trunk(fill(trunk, load_weights(weights, url), ('fc.', 'aux1.', 'aux2.'), name), whole.fc.in_features)


class BNInceptionFeatures(nn.Module):
    """pretrainedmodels' BN-Inception up to its last feature map (Ioffe & Szegedy, ICML 2015, arXiv 1502.03167)."""

    def __init__(self):
        super().__init__()
        from pretrainedmodels import bninception

        whole = bninception(pretrained=None)
        self.width = whole.last_linear.in_features
        for key, layer in whole.named_children():
            if key != 'last_linear':
                self.add_module(key, layer)
        self.compute = type(whole).features

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.compute(self, images)


def bn_inception(name: str, weights: str) -> Trunk:
    """Build BN-Inception: BGR pixels in [0, 255], as its Caffe weights expect."""
    module = BNInceptionFeatures()
    state_dict = load_weights(weights, BN_INCEPTION_URL)
    if state_dict is not None:  # its BatchNorm vectors have shape (1, C)
        state_dict = {key: value.squeeze(0) if value.ndim == 2 and value.shape[0] == 1 and '_bn.' in key else value
                      for key, value in state_dict.items()}
    return Trunk(fill(module, state_dict, ('last_linear.',), name), module.width,
                 mean=(104.0, 117.0, 128.0), std=(1.0, 1.0, 1.0), value_range=255.0, bgr=True)


class TimmFeatures(nn.Module):
    """A timm model up to its last feature map (N, C, H, W) or its tokens (N, L, C)."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.channels_last = str(getattr(network, 'output_fmt', 'NCHW')).endswith('NHWC')

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.network.forward_features(images)
        return features.permute(0, 3, 1, 2) if self.channels_last else features


def timm_trunk(name: str, weights: str, image_size: int) -> Trunk:
    """Build any model of timm by its name, with timm's own mean, std and interpolation (github.com/rwightman/timm)."""
    import timm

    if not timm.is_model(name):
        families = timm.list_models(f'*{name[:6]}*')[:8]
        raise UserError(f'--backbone_type timm:{name} is no model of timm {timm.__version__}; '
                        f'timm.list_models() lists them' + (f' (near it: {", ".join(families)})' if families else ''))
    try:
        network = timm.create_model(name, pretrained=weights == 'imagenet', num_classes=0)
    except Exception as error:  # the hub client has a family of network errors of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        if weights != 'imagenet':
            raise UserError(f'--backbone_type timm:{name} cannot be built ({reason})') from None
        raise UserError(f'the weights of timm:{name} could not be downloaded ({reason}); get the file elsewhere and '
                        'name it with --weights FILE, or train from scratch with --weights none') from None
    pretrained = network.pretrained_cfg
    if weights not in ('imagenet', 'none'):
        heads = pretrained.get('classifier') or 'classifier'
        heads = (heads,) if isinstance(heads, str) else tuple(heads)
        fill(network, load_weights(weights, None), tuple(f'{head}.' for head in heads), f'timm:{name}')
    if pretrained.get('fixed_input_size') and image_size != pretrained['input_size'][-1]:
        if not hasattr(network, 'set_input_size'):
            raise UserError(f'--backbone_type timm:{name} takes images of {pretrained["input_size"][-1]} px only; '
                            f'set --image_size {pretrained["input_size"][-1]}')
        try:
            network.set_input_size(img_size=image_size)
            network.eval()  # a trial must not move BatchNorm statistics
            with torch.no_grad():
                network.forward_features(torch.zeros(1, 3, image_size, image_size))
            network.train()
        except (AssertionError, ValueError, RuntimeError) as error:
            raise UserError(f'--image_size {image_size} does not fit timm:{name} ({error})') from None
    return Trunk(TimmFeatures(network), network.num_features, pretrained['mean'], pretrained['std'],
                 interpolation=pretrained['interpolation'], prefix_tokens=getattr(network, 'num_prefix_tokens', 0))


BACKBONES = {
    'resnet50': resnet, 'inception': bn_inception, 'googlenet': googlenet, 'resnet18': resnet, 'resnet101': resnet,
}


# ---------------------------------------------------- embedding network ----------------------------------------------
class EmbeddingNet(nn.Module):
    """Map images to unit vectors: trunk -> pooling -> layer norm -> linear (`refactor`) -> L2 normalise.

    Args:
        backbone_type: a key of BACKBONES, or `timm:` and the name of a timm model.
        feature_dim: D, the length of an embedding; 0 leaves the linear layer out (D is the trunk's width).
        pooling: `max`, `avg`, `avg_max` (their sum, Proxy Anchor) or `cls` (the class token of a transformer).
        layer_norm: normalise the pooled features (no weights) before the linear layer.
        linear_bias: give the linear layer a bias, with Proxy Anchor's start (kaiming normal fan_out, bias 0).
        freeze_bn: keep the trunk's BatchNorm statistics as they are, in training too.
        weights: `imagenet`, `none`, or the path of a state dict of the trunk.
        image_size: side of the square images in pixels.
        max_pool: keep the max-pool in the stem of a ResNet; leave it out for images below about 100 px.

    Raises:
        UserError: if the trunk is not known, its weights cannot be had, or a setting does not fit it.
    """

    def __init__(self, backbone_type: str, feature_dim: int, pooling: str = 'max', layer_norm: bool = True,
                 linear_bias: bool = False, freeze_bn: bool = True, weights: str = 'imagenet', image_size: int = 224,
                 max_pool: bool = True):
        super().__init__()
        self.config = {
            'backbone_type': backbone_type, 'feature_dim': feature_dim, 'pooling': pooling, 'layer_norm': layer_norm,
            'linear_bias': linear_bias, 'freeze_bn': freeze_bn, 'image_size': image_size, 'max_pool': max_pool,
        }
        check_choice('--pooling', pooling, POOLINGS)
        if feature_dim < 0:
            raise UserError(f'--feature_dim {feature_dim} must be at least 1')
        backbone_type = canonical_backbone(backbone_type)
        if not max_pool and BACKBONES.get(backbone_type) is not resnet:
            raise UserError(f'--max_pool 0 is for the ResNets; leave it out with --backbone_type {backbone_type}')
        if backbone_type.startswith('timm:'):
            trunk = timm_trunk(backbone_type.removeprefix('timm:'), weights, image_size)
        else:
            trunk = BACKBONES[backbone_type](backbone_type, weights)
        if not max_pool:
            trunk.module.maxpool = nn.Identity()
        if pooling == 'cls' and not trunk.prefix_tokens:
            raise UserError(f'--pooling cls needs a transformer with a class token, not {backbone_type}')

        self.trunk = trunk.module
        self.interpolation, self.bgr, self.value_range = trunk.interpolation, trunk.bgr, trunk.value_range
        self.pooling, self.prefix_tokens = pooling, trunk.prefix_tokens
        self.layer_norm, self.freeze_bn = layer_norm, freeze_bn
        self.feature_dim = feature_dim or trunk.width
        self.refactor = nn.Linear(trunk.width, feature_dim, bias=linear_bias) if feature_dim else nn.Identity()
        if feature_dim and linear_bias:
            nn.init.kaiming_normal_(self.refactor.weight, mode='fan_out')
            nn.init.zeros_(self.refactor.bias)
        self.register_buffer('mean', torch.tensor(trunk.mean).view(3, 1, 1), persistent=False)
        self.register_buffer('std', torch.tensor(trunk.std).view(3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> 'EmbeddingNet':
        """Switch the mode; BatchNorm statistics stay frozen (eval mode) where `freeze_bn` asks for it."""
        super().train(mode)
        if mode and self.freeze_bn:
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

    def pool(self, features: torch.Tensor) -> torch.Tensor:
        """Pool a feature map (N, C, H, W) or tokens (N, L, C) to (N, C)."""
        if features.ndim == 3:
            if self.pooling == 'cls':
                return features[:, 0]
            features = features[:, self.prefix_tokens:].transpose(1, 2)
        features = features.flatten(2)
        pooled = {'max': lambda: features.amax(2), 'avg': lambda: features.mean(2),
                  'avg_max': lambda: features.mean(2) + features.amax(2)}
        return pooled[self.pooling]()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the embeddings (N, D), float32 or wider, unit rows, of uint8 RGB images (N, 3, H, W)."""
        features = self.pool(self.trunk(self.preprocess(images)))
        if self.layer_norm:
            features = F.layer_norm(features, features.shape[-1:])
        features = self.refactor(features)
        return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


# ---------------------------------------------------- losses ---------------------------------------------------------
LOG_ZERO = -1e30  # unlike -inf it gives no NaN in a difference of two of them
# Similarities worked on at one time: on a CPU so many that they stay in its cache, elsewhere enough to fill the device.
BLOCK_ELEMENTS = {'cpu': 2**18}


def place(labels: torch.Tensor, classes: range) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the row (N,) of each label among those of `classes`, 0 for others, and whether it is among them (N,)."""
    here = (labels >= classes.start) & (labels < classes.stop)
    return torch.where(here, labels - classes.start, 0), here


def block_rows(z: torch.Tensor) -> int:
    """Return how many rows of a matrix make a block."""
    return max(1, BLOCK_ELEMENTS.get(z.device.type, 2**24) // z.shape[1])


class Similarities(torch.autograd.Function):
    """Compare embeddings with proxies by their cosine, and reduce the (N, C) similarities to what a loss needs.

    A loss here depends on s_ic = x_i . p_c / |p_c| through two vectors: the similarity to the own proxy, and a
    log-sum-exp over the other pairs. Autograd sees these vectors only. The similarities are held once, from forward to
    backward; exponentials and gradients exist for a block of classes at a time, and unit proxies not at all.

    Args of `apply`:
        embeddings: (N, D), unit rows.
        proxies: (c, D), of any length; the rows of `classes`.
        labels: (N,) in [0, C).
        alpha: factor of s in the exponentials.
        negatives: `of_class`, the samples of other classes, or `of_sample`, the other classes.
        classes: the classes whose proxies this process holds.
        num_classes: C; where `classes` are fewer, vectors and embedding gradients are joined over the processes.

    Returns:
        own (N,), s_iy of a sample i of class y; negative, log sum_{i: y_i != c} exp(alpha s_ic) (C,) `of_class`, or
        log sum_{c != y_i} exp(alpha s_ic) (N,) `of_sample`; hit (N,), whether the own proxy is nearer than all others.
    """

    @staticmethod
    def forward(ctx, embeddings, proxies, labels, alpha, negatives, classes, num_classes):
        join = gather_rows if len(classes) < num_classes else nn.Identity()
        norms = torch.linalg.vector_norm(proxies, dim=1, keepdim=True).clamp_(min=1e-12)  # (c, 1)
        z = proxies.new_empty(len(proxies), len(embeddings))  # (c, N), alpha s, transposed: a class is one row
        parts, columns = (tensor.split(block_rows(z)) for tensor in (z, proxies, norms)), embeddings.T.contiguous()
        for z_part, proxies_part, norms_part in zip(*parts, strict=True):
            torch.mm(proxies_part, columns, out=z_part).mul_(alpha / norms_part)
        row, here = place(labels, classes)
        own = z.gather(0, row[None])
        z.scatter_(0, row[None], own.masked_fill(here, LOG_ZERO))  # z now holds the negatives alone
        own = own.masked_fill(~here, -math.inf)
        blocks = z.split(block_rows(z))
        nearest = torch.stack([block.amax(0) for block in blocks]).amax(0, keepdim=True)
        if negatives == 'of_class':
            total = torch.cat([block.logsumexp(1) for block in blocks])[:, None]  # (c, 1)
            negative = join(total)[:, 0]
        else:
            total = join(torch.stack([block.logsumexp(0) for block in blocks])).logsumexp(0, keepdim=True)  # (1, N)
            negative = total[0]
        own, nearest = join(torch.stack([own, nearest], 1)).amax(0)
        hit = own > nearest
        own = own / alpha
        ctx.save_for_backward(embeddings, proxies, norms, z, own, total, row, here)
        ctx.settings = alpha, negatives, classes, num_classes
        ctx.mark_non_differentiable(hit)
        return own, negative, hit

    @staticmethod
    @once_differentiable
    def backward(ctx, own_gradient, negative_gradient, _):
        embeddings, proxies, norms, z, own, total, row, here = ctx.saved_tensors
        alpha, negatives, classes, num_classes = ctx.settings
        if negatives == 'of_class':
            weight = negative_gradient[classes.start:classes.stop, None]
        else:
            weight = negative_gradient[None]
        weight, total = weight.expand_as(z), total.expand_as(z)
        # ds/dx = u and ds/dp = (x - s u) / |p| with u = p / |p|: first the own pairs, then the others.
        unit, slope = proxies[row] / norms[row], (own_gradient * here)[:, None]
        embedding_gradient = slope * unit
        proxy_gradient = torch.empty_like(proxies) if ctx.needs_input_grad[1] else None
        with torch.autocast(z.device.type, enabled=False):
            for start in range(0, len(z), block_rows(z)):
                b = slice(start, start + block_rows(z))
                slopes = (z[b] - total[b]).exp_().mul_(weight[b])  # dL/dz
                radial = (slopes * z[b]).sum(1, keepdim=True) / norms[b].square()
                slopes.mul_(alpha / norms[b])  # dL/d(x . p)
                embedding_gradient.addmm_(slopes.T, proxies[b])
                if proxy_gradient is not None:
                    torch.mm(slopes, embeddings, out=proxy_gradient[b]).addcmul_(proxies[b], radial, value=-1)
        if proxy_gradient is not None:
            proxy_gradient.index_add_(0, row, slope / norms[row] * (embeddings - own[:, None] * unit))
        if len(classes) < num_classes:
            sum_over_processes(embedding_gradient)
        return embedding_gradient, proxy_gradient, None, None, None, None, None


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

    Args:
        num_classes: C.
        feature_dim: D.
        proxy_update: `gradient`, `positive` or `momentum`.
        momentum: m in (0, 1], for `momentum` only.
        scale: alpha = 1 / temperature; None takes the loss's own.
        margin: delta; None takes the loss's own.
        proxy_init: `unit` (unit random rows) or `kaiming` (normal, fan_out; Proxy Anchor).
        shard_proxies: hold C / W of the proxies in each of W processes.

    Source: Positive Proxy (`positive`), Asymptotic Proxy and Momentum Proxy (`momentum`).
    """

    scale: float
    margin: float | None = None  # None: the formula has no margin
    negatives = 'of_sample'  # what the formula's log-sum-exp runs over, see Similarities
    slope = 1.0  # of the exponents in alpha s; 2 where they hold squared distances, d = 2 - 2 s

    def __init__(self, num_classes: int, feature_dim: int, proxy_update: str = 'gradient', momentum: float = MOMENTUM,
                 scale: float | None = None, margin: float | None = None, proxy_init: str = 'unit',
                 shard_proxies: bool = False):
        super().__init__()
        check_choice('--proxy_update', proxy_update, PROXY_UPDATES)
        if not 0 < momentum <= 1:
            raise UserError(f'--momentum {momentum} must be above 0 and at most 1')
        if margin is not None and self.margin is None:
            raise UserError(f'--margin {margin} has no effect: {type(self).__name__} has no margin; leave it out')
        if scale is not None and not 0 < scale < math.inf:
            raise UserError(f'--scale {scale} must be a positive number')
        if shard_proxies and num_classes < world_size():
            raise UserError(f'--shard_proxies: {num_classes} classes are fewer than the {world_size()} processes; '
                            'leave it out')
        self.num_classes, self.proxy_update, self.momentum = num_classes, proxy_update, momentum
        self.scale = self.scale if scale is None else scale
        self.margin = self.margin if margin is None else margin
        self.classes = shard(num_classes) if shard_proxies else range(num_classes)  # those whose proxies are here
        proxies = self.draw_proxies(feature_dim, proxy_init)
        if proxy_update == 'momentum':
            self.register_buffer('proxies', F.normalize(proxies, dim=-1))
        else:
            self.proxies = nn.Parameter(proxies)
        self.accuracy = torch.zeros(())  # share of the last batch whose nearest proxy is its own; stays on the device
        self.num_samples = 0  # in the last batch, of all processes

    def draw_proxies(self, feature_dim: int, proxy_init: str) -> torch.Tensor:
        """Draw all proxies, 65,536 at a time, and return those of this process; a seed gives the same to any number."""
        check_same('the random state in which the proxies are drawn', torch.get_rng_state())
        proxies = torch.empty(len(self.classes), feature_dim)
        for start in range(0, self.num_classes, 2**16):
            block = torch.randn(min(2**16, self.num_classes - start), feature_dim)
            if proxy_init == 'kaiming':
                block *= math.sqrt(2 / self.num_classes)  # fan_out is the number of rows
            else:
                block = F.normalize(block, dim=-1)
            first, last = max(start, self.classes.start), min(start + len(block), self.classes.stop)
            if first < last:
                proxies[first - self.classes.start:last - self.classes.start] = block[first - start:last - start]
        return proxies

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

    def formula(self, own: torch.Tensor, negative: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss (); each loss writes its own.

        Args:
            own: (N,), s_iy, the cosine similarity of sample i to the proxy of its class y.
            negative: log sum exp(slope alpha s_ic), over the samples i of other classes for each class (C,) where
                `negatives` is `of_class`, over the other classes c for each sample (N,) where it is `of_sample`.
            labels: (N,).
        """
        raise TypeError(f'{type(self).__name__} has no formula')

    @torch.no_grad()
    def move_proxies(self, embeddings: torch.Tensor, labels: torch.Tensor) -> None:
        """Move the proxies of the classes in the batch towards their embeddings; the others stay as they are."""
        row, here = place(labels, self.classes)
        same = labels[:, None] == labels  # (N, N)
        first = same.int().argmax(1) == torch.arange(len(labels), device=labels.device)  # one sample for each class
        sums = same.to(embeddings.dtype) @ embeddings  # (N, D), of the class of each sample
        old = self.proxies[row]
        moved = F.normalize((1 - self.momentum) * old + self.momentum * sums, dim=-1)
        step = torch.where((first & here)[:, None], moved - old, 0)
        self.proxies = self.proxies.index_add(0, row, step)  # a new tensor: the backward still needs the old one

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss () of embeddings (N, D; any float type) with labels (N,) int64 in [0, C).

        With several processes they are each one's part of the batch, and the loss is that of the whole.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            dtype = torch.promote_types(embeddings.dtype, self.proxies.dtype)  # float32 or wider
            embeddings, labels = gather_rows(embeddings.to(dtype)), gather_rows(labels)
            proxies = self.proxies.to(dtype)
            own, negative, hit = Similarities.apply(
                embeddings, proxies.detach() if self.proxy_update == 'positive' else proxies, labels,
                self.slope * self.scale, self.negatives, self.classes, self.num_classes)
            if self.proxy_update == 'positive':
                # Straight-through: adds zero, and carries the gradient of the positive pairs alone to the proxies.
                row, here = place(labels, self.classes)
                positive = (embeddings.detach() * F.normalize(proxies[row], dim=-1)).sum(-1)
                positive = torch.where(here, positive / self.count(labels)[labels], 0)
                own = own + (positive - positive.detach())
            self.accuracy, self.num_samples = hit.float().mean(), len(labels)
            loss = self.formula(own, negative, labels)
            if self.training and self.proxy_update == 'momentum':
                self.move_proxies(embeddings.detach().to(self.proxies.dtype), labels)
        return loss

    # ---- several processes; in one, these are the plain values ----
    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the rows (C, ...) of all classes from those (c, ...) of this process's; every process has to call."""
        return gather_rows(rows) if len(self.classes) < self.num_classes else rows

    def all_proxies(self) -> torch.Tensor:
        """Return the proxies (C, D) of all classes, without gradient; every process has to call it."""
        return self.gather(self.proxies.detach())

    def synchronise(self) -> None:
        """Give every process the proxies of the first: sums on a GPU differ in their last bits from run to run."""
        if len(self.classes) == self.num_classes:
            broadcast(self.proxies.detach())

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """Return the state of all processes as one would have it; every process has to call it."""
        return {'proxies': self.all_proxies()}

    def load_full_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Load what `full_state_dict` returned, in any number of processes."""
        own = {'proxies': state_dict['proxies'][self.classes.start:self.classes.stop]}
        if len(state_dict['proxies']) != self.num_classes:
            raise RuntimeError(f'{len(state_dict["proxies"])} proxies for {self.num_classes} classes')
        self.load_state_dict(own)

    def full_optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict:
        """Return the state dict of an optimizer as one process would have it; every process has to call it."""
        contents = optimizer.state_dict()
        for number in self._numbers(optimizer, contents):
            contents['state'][number] = {
                name: self.gather(value) if torch.is_tensor(value) and value.ndim else value  # a step has no rows
                for name, value in contents['state'][number].items()}
        return contents

    def load_full_optimizer_state(self, optimizer: torch.optim.Optimizer, contents: dict) -> None:
        """Load what `full_optimizer_state` returned, in any number of processes."""
        state = dict(contents['state'])
        for number in self._numbers(optimizer, contents):
            state[number] = {name: value[self.classes.start:self.classes.stop]
                             if torch.is_tensor(value) and value.ndim else value
                             for name, value in state[number].items()}
        optimizer.load_state_dict({**contents, 'state': state})

    def _numbers(self, optimizer: torch.optim.Optimizer, contents: dict) -> list[int]:
        """Return under which number the optimizer's state dict has the proxies, if it has."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group['params']]
        return [number for number in contents['state'] if parameters[number] is self.proxies]


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
    scale, margin = LOSS_SETTINGS['proxy_anchor']
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
    scale, margin = LOSS_SETTINGS['balanced_proxy']
    negatives = 'of_class'

    def formula(self, own: torch.Tensor, negative: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        count = self.count(labels).to(own.dtype)  # (C,) positives of each class
        positive = self.logsumexp_by_class(-self.scale * (own - self.margin), labels) - count.clamp(min=1).log()
        negative = negative + self.scale * self.margin - (len(labels) - count).clamp(min=1).log()
        return log1pexp(torch.logaddexp(positive, negative)).mean()  # a log of a mean is that of the sum, less log n


class NormalizedSoftmax(ProxyLoss):
    """Normalized softmax: the cross entropy of alpha s. Source: Zhai & Wu, BMVC 2019, arXiv 1811.12649."""
    scale, margin = LOSS_SETTINGS['normalized_softmax']

    def formula(self, own: torch.Tensor, negative: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return cross_entropy(self.scale * own, negative)


class ProxyNCA(ProxyLoss):
    """ProxyNCA++: the cross entropy of -alpha d, d_ic = ||x_i - p_c||^2 = 2 - 2 s_ic, the positive in the denominator.

    The 2 is the same in all logits and drops out.

    Source: Movshovitz-Attias et al., ICCV 2017, arXiv 1703.07464; Teh et al., ECCV 2020, arXiv 2004.01113, eq. 5.
    """
    scale, margin = LOSS_SETTINGS['proxy_nca']
    slope = 2.0

    def formula(self, own: torch.Tensor, negative: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return cross_entropy(2 * self.scale * own, negative)


class CosFace(ProxyLoss):
    """CosFace: the cross entropy of alpha (s_ic - delta [c = y_i]).

    Source: Wang et al., CVPR 2018, arXiv 1801.09414, eq. 4.
    """
    scale, margin = LOSS_SETTINGS['cos_face']

    def formula(self, own: torch.Tensor, negative: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return cross_entropy(self.scale * (own - self.margin), negative)


class ArcFace(ProxyLoss):
    """ArcFace: the cross entropy of alpha cos(theta_ic + delta [c = y_i]), theta = arccos s, delta in radians.

    Once theta + delta passes pi, s - delta sin(delta) takes its place, which keeps falling with s. There is no acos:
    its gradient is infinite at s = 1.

    Source: Deng et al., CVPR 2019, arXiv 1801.07698, eq. 3.
    """
    scale, margin = LOSS_SETTINGS['arc_face']

    def formula(self, own: torch.Tensor, negative: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        square = 1 - own.square()  # rounding can take it to 0 and below, where sqrt has no finite gradient
        sine = square.where(square > 0, 1.0).sqrt().where(square > 0, 0.0)
        turned = own * math.cos(self.margin) - sine * math.sin(self.margin)
        past_pi = own < -math.cos(self.margin)
        target = torch.where(past_pi, own - self.margin * math.sin(self.margin), turned)
        return cross_entropy(self.scale * target, negative)


LOSSES = {
    'balanced_proxy': BalancedProxy, 'proxy_anchor': ProxyAnchor, 'normalized_softmax': NormalizedSoftmax,
    'proxy_nca': ProxyNCA, 'cos_face': CosFace, 'arc_face': ArcFace,
}
