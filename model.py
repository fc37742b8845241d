"""The method: an embedding network, one proxy per class, and the losses that train both.

    model = EmbeddingNet(NetConfig('resnet50', feature_dim=512))
    criterion = make_loss('balanced_proxy', num_classes=98, feature_dim=512)  # owns the proxies (C, D)
    embeddings = model(images)            # (N, D) float32, unit rows, of uint8 RGB images (N, 3, H, W)
    loss = criterion(embeddings, labels)  # labels (N,) int64 in [0, C)

In reading order: backbones, the embedding network, the proxies and their three updates, the losses.

Notation in docstrings: x_i is the unit embedding of image i, p_c the unit proxy of class c, s_ic = x_i . p_c their
cosine similarity, y_i the label of image i, alpha the scale (1 / temperature) and delta the margin.

To add a loss, write one class with `compute_loss` and register it below, with its defaults in recipes.LOSSES. It works
with every proxy update and every backbone. To add a backbone, write one `build_*` function and add it to BACKBONES; any
timm model works without code as `timm:NAME`.
"""
import math
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from common.distributed import gather_rows, world_size
from common.errors import UserError, check_choice, reason_of, suggestion
from common.weights import NO_DOWNLOAD, check_hub, fill_backbone, load_weights
from recipes import BACKBONE_NAMES, LOSSES, MOMENTUM, POOLINGS, PROXY_UPDATES, canonical_backbone

# ---------------------------------------------------- backbones -----------------------------------------------------
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BN_INCEPTION_URL = 'http://data.lip6.fr/cadene/pretrainedmodels/bn_inception-52deb4733.pth'


class Backbone(NamedTuple):
    """A network without its classification head, and the pixel format that it was trained on."""

    module: nn.Module  # images -> feature map (N, F, H, W) or tokens (N, L, F)
    num_features: int  # F
    mean: tuple = IMAGENET_MEAN
    std: tuple = IMAGENET_STD
    value_range: float = 1.0  # pixels are scaled to [0, value_range] before mean and std apply
    bgr: bool = False
    interpolation: str = 'bilinear'
    prefix_tokens: int = 0  # class and register tokens before the patch tokens


def without_head(network: nn.Module, *head: str) -> nn.Sequential:
    """Return a network without some of its layers; the others keep their names, so that their weights still fit."""
    return nn.Sequential(OrderedDict((name, layer) for name, layer in network.named_children()
                                     if name not in head))


def build_resnet(name: str, weights: str) -> Backbone:
    """Build a torchvision ResNet (He et al., CVPR 2016, arXiv 1512.03385)."""
    from torchvision import models

    network = models.get_model(name, weights=None)
    state_dict = load_weights(weights, models.get_model_weights(name)['IMAGENET1K_V1'].url)
    module = fill_backbone(without_head(network, 'avgpool', 'fc'), state_dict, ('fc.',), name)
    return Backbone(module, network.fc.in_features)


def build_googlenet(name: str, weights: str) -> Backbone:
    """Build torchvision's GoogLeNet without auxiliary heads (Szegedy et al., CVPR 2015, arXiv 1409.4842).

    Pixels are scaled like those of a ResNet, as the published systems do, although these weights were trained on
    pixels in [-1, 1] (torchvision's `transform_input`).
    """
    from torchvision import models

    network = models.googlenet(weights=None, aux_logits=False, transform_input=False, init_weights=weights == 'none')
    state_dict = load_weights(weights, models.GoogLeNet_Weights.IMAGENET1K_V1.url)
    module = fill_backbone(without_head(network, 'avgpool', 'dropout', 'fc'), state_dict, ('fc.', 'aux1.', 'aux2.'),
                           name)
    return Backbone(module, network.fc.in_features)


def build_bn_inception(name: str, weights: str) -> Backbone:
    """Build pretrainedmodels' BN-Inception (Ioffe & Szegedy, ICML 2015, arXiv 1502.03167).

    It takes BGR pixels in [0, 255], as its Caffe weights expect.
    """
    from pretrainedmodels import bninception

    network = bninception(pretrained=None)
    num_features = network.last_linear.in_features
    del network.last_linear
    network.forward = network.features  # up to the last feature map
    state_dict = load_weights(weights, BN_INCEPTION_URL)
    if state_dict is not None:  # the file stores BatchNorm vectors with shape (1, F)
        state_dict = {key: value.squeeze(0) if '_bn.' in key and value.ndim == 2 else value
                      for key, value in state_dict.items()}
    return Backbone(fill_backbone(network, state_dict, ('last_linear.',), name), num_features,
                    mean=(104.0, 117.0, 128.0), std=(1.0, 1.0, 1.0), value_range=255.0, bgr=True)


class TimmFeatures(nn.Module):
    """A timm model up to its last feature map (N, F, H, W) or its tokens (N, L, F)."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.channels_last = str(getattr(network, 'output_fmt', 'NCHW')).endswith('NHWC')

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.network.forward_features(images)
        return features.permute(0, 3, 1, 2) if self.channels_last else features

    def pool(self, features: torch.Tensor) -> torch.Tensor:
        """Pool as the model's authors do before their classifier: class token, average or attention pooling."""
        if self.channels_last:
            features = features.permute(0, 2, 3, 1)
        return self.network.forward_head(features, pre_logits=True)


def build_timm(name: str, weights: str, image_size: int) -> Backbone:
    """Build any model of timm (github.com/huggingface/pytorch-image-models), with its mean, std and interpolation."""
    import timm

    if not timm.is_model(name):
        raise UserError(f'--backbone_type timm:{name} is not a model of timm {timm.__version__}'
                        f'{suggestion(name, timm.list_models())}; timm.list_models() lists them')
    repository = timm.get_pretrained_cfg_value(name, 'hf_hub_id')
    if weights == 'imagenet' and repository:
        check_hub(repository)
    try:
        network = timm.create_model(name, pretrained=weights == 'imagenet', num_classes=0)
    except Exception as error:  # the hub client has a family of network errors of its own
        if weights == 'imagenet':
            raise UserError(f'the weights of timm:{name} could not be downloaded ({reason_of(error)}); {NO_DOWNLOAD}'
                            ) from None
        raise UserError(f'--backbone_type timm:{name} cannot be built ({reason_of(error)})') from None
    pretrained = network.pretrained_cfg
    if weights not in ('imagenet', 'none'):
        head = pretrained.get('classifier') or 'classifier'
        head = (head,) if isinstance(head, str) else head
        fill_backbone(network, load_weights(weights, ''), tuple(f'{layer}.' for layer in head), f'timm:{name}')
    if pretrained.get('fixed_input_size') and image_size != pretrained['input_size'][-1]:
        set_input_size(network, name, image_size)
    return Backbone(TimmFeatures(network), network.num_features, pretrained['mean'], pretrained['std'],
                    interpolation=pretrained['interpolation'],
                    prefix_tokens=getattr(network, 'num_prefix_tokens', 0))


def set_input_size(network: nn.Module, name: str, image_size: int) -> None:
    """Adapt a timm transformer to another image size, and try it on one image."""
    if not hasattr(network, 'set_input_size'):
        side = network.pretrained_cfg['input_size'][-1]
        raise UserError(f'--backbone_type timm:{name} takes images of {side} px only; set --image_size {side}')
    try:
        network.set_input_size(img_size=image_size)
        network.eval()  # the trial must not change BatchNorm statistics
        with torch.no_grad():
            network.forward_features(torch.zeros(1, 3, image_size, image_size))
        network.train()
    except (AssertionError, ValueError, RuntimeError) as error:
        raise UserError(f'--image_size {image_size} does not fit timm:{name} ({error})') from None


class Float32GroupedConv:
    """Mixed into a grouped convolution: it trains in float32 on a CPU, where its bfloat16 backward pass is slow."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if features.device.type != 'cpu' or not (torch.is_grad_enabled() and torch.is_autocast_enabled('cpu')):
            return super().forward(features)
        with torch.autocast('cpu', enabled=False):
            return super().forward(features.float()).to(torch.get_autocast_dtype('cpu'))


BACKBONES = {'resnet50': build_resnet, 'inception': build_bn_inception, 'googlenet': build_googlenet,
             'resnet18': build_resnet, 'resnet101': build_resnet}
assert tuple(BACKBONES) == BACKBONE_NAMES  # the command line lists these names without importing torch


def build_backbone(name: str, weights: str, image_size: int) -> Backbone:
    """Build a backbone of BACKBONES, or `timm:NAME`, for square images with sides of image_size pixels."""
    if name.startswith('timm:'):
        backbone = build_timm(name.removeprefix('timm:'), weights, image_size)
    else:
        backbone = BACKBONES[name](name, weights)
    for layer in backbone.module.modules():
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:  # timm has subclasses, whose forward pass is kept
            layer.__class__ = type(type(layer).__name__, (Float32GroupedConv, type(layer)), {})
    return backbone


# ---------------------------------------------------- embedding network ---------------------------------------------
# Weight of the mean eigenvalue that is added to each one: before a training, and without any.
WHITENING_SHRINKAGE, PCA_SHRINKAGE = 0.3, 30.0


@dataclass(frozen=True)
class NetConfig:
    """The architecture of an embedding network, as its model file stores it.

    Attributes:
        backbone_type: a key of BACKBONES, or `timm:` and the name of a timm model.
        feature_dim: D, the length of an embedding; 0 leaves the head out (D is then the backbone's num_features).
        pooling: `max`, `avg`, `avg_max` (their sum, Proxy Anchor), `gem` (generalised mean, its power learned) or
            `cls` (the class token of a transformer) or `native` (as the authors of a timm model pool).
        layer_norm: normalise the pooled features (without weights) before the head.
        head_bias: give the head a bias, and Proxy Anchor's initial values (kaiming normal fan_out, bias 0).
        freeze_bn: keep the BatchNorm statistics of the backbone fixed, in training too.
        image_size: side of the square images in pixels.
        max_pool: keep the max-pool in the stem of a ResNet; leave it out for images below about 100 px.
        flip_tta: horizontal-flip test-time augmentation: outside training, the embedding of an image is the mean of
            its own and that of its mirror image.
    """

    backbone_type: str
    feature_dim: int
    pooling: str = 'max'
    layer_norm: bool = True
    head_bias: bool = False
    freeze_bn: bool = True
    image_size: int = 224
    max_pool: bool = True
    flip_tta: bool = False


class EmbeddingNet(nn.Module):
    """Map images to unit vectors: backbone -> pooling -> layer norm -> linear head -> L2 normalisation.

    Args:
        config: the architecture.
        weights: of the backbone: `imagenet`, `none`, or the path of a state dict.

    Raises:
        UserError: if the backbone is unknown, its weights cannot be loaded, or a setting does not fit it.
    """

    def __init__(self, config: NetConfig, weights: str = 'imagenet'):
        super().__init__()
        self.config = config
        check_choice('--pooling', config.pooling, POOLINGS)
        name = canonical_backbone(config.backbone_type)
        backbone = build_backbone(name, weights, config.image_size)
        if not config.max_pool:
            if not hasattr(backbone.module, 'maxpool'):
                raise UserError(f'--max_pool 0 is for the ResNets; leave it out with --backbone_type {name}')
            backbone.module.maxpool = nn.Identity()
        if config.pooling == 'cls' and not backbone.prefix_tokens:
            raise UserError(f'--pooling cls needs a transformer with a class token, not {name}')
        if config.pooling == 'native' and not isinstance(backbone.module, TimmFeatures):
            raise UserError(f'--pooling native is for models of timm, not {name}')

        self.backbone, self.prefix_tokens = backbone.module, backbone.prefix_tokens
        self.interpolation, self.bgr, self.value_range = backbone.interpolation, backbone.bgr, backbone.value_range
        # Some heads of timm widen the pooled features before the classifier.
        network = getattr(backbone.module, 'network', None)
        native_features = getattr(network, 'head_hidden_size', backbone.num_features)
        self.num_features = native_features if config.pooling == 'native' else backbone.num_features
        # What suits the backbone without training. Of timm's models, those with tokens name their pooling by a string.
        is_transformer = isinstance(getattr(network, 'global_pool', None), str)
        is_native = native_features == self.num_features and (is_transformer or config.pooling == 'native')
        self.pretrained_pooling = 'native' if is_native else 'avg_max'
        self.feature_dim = config.feature_dim or self.num_features
        if config.pooling == 'gem':
            self.gem_power = nn.Parameter(torch.tensor(3.0))
        self.head = nn.Identity()
        if config.feature_dim:
            self.head = nn.Linear(self.num_features, config.feature_dim, bias=config.head_bias)
        if config.feature_dim and config.head_bias:
            nn.init.kaiming_normal_(self.head.weight, mode='fan_out')
            nn.init.zeros_(self.head.bias)
        self.register_buffer('mean', torch.tensor(backbone.mean).view(3, 1, 1), persistent=False)
        self.register_buffer('std', torch.tensor(backbone.std).view(3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> 'EmbeddingNet':
        """Switch between training and evaluation; frozen BatchNorm stays in evaluation mode."""
        super().train(mode)
        if mode and self.config.freeze_bn:
            for module in self.backbone.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def freeze_backbone(self, frozen: bool) -> None:
        """Freeze the backbone (warm-up) or let it learn. Clears its gradients: AdamW moves weights with stale ones."""
        for parameter in self.backbone.parameters():
            parameter.requires_grad_(not frozen)
            parameter.grad = None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the embeddings (N, D), float32 or wider, unit rows, of uint8 RGB images (N, 3, H, W).

        The row of an image without any features, as a blank one can be, is zero: it is similar to nothing.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or not images.shape[0]:
            raise UserError(f'images are {tuple(images.shape)} of {images.dtype}; expected are (N, 3, H, W) of '
                            'torch.uint8, RGB from 0 to 255, N at least 1')
        embeddings = self.embed(images)
        if self.config.flip_tta and not self.training:
            embeddings = F.normalize(embeddings + self.embed(images.flip(3)), dim=-1)
        return embeddings

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Return the embeddings (N, D) of images without test-time augmentation."""
        embeddings = self.head(self.compute_features(images))
        return unit_rows(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)))

    def compute_features(self, images: torch.Tensor) -> torch.Tensor:
        """Return the input of the head (N, num_features): pooled and, where configured, layer-normalised."""
        features = self.pool(self.backbone(self.preprocess(images)), self.config.pooling)
        return F.layer_norm(features, features.shape[-1:]) if self.config.layer_norm else features

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """Convert uint8 RGB images (N, 3, H, W) to the pixel format that the backbone was trained on."""
        images = images.to(self.mean.dtype).mul(self.value_range / 255)
        images = images.flip(1) if self.bgr else images
        return ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def pool(self, features: torch.Tensor, pooling: str) -> torch.Tensor:
        """Pool a feature map (N, F, H, W) or tokens (N, L, F) to (N, F).

        Source of `gem`, (mean max(f, 1e-6)^p)^(1/p): Radenovic et al., TPAMI 2018, arXiv 1711.02512.
        """
        if pooling == 'native':
            return self.backbone.pool(features)
        if pooling == 'cls':
            return features[:, 0]
        if features.ndim == 3:
            features = features[:, self.prefix_tokens:].transpose(1, 2)
        features = features.flatten(2)
        if pooling == 'max':
            return features.amax(2)
        if pooling == 'avg':
            return features.mean(2)
        if pooling == 'avg_max':
            return features.mean(2) + features.amax(2)
        return features.float().clamp(min=1e-6).pow(self.gem_power).mean(2).pow(1 / self.gem_power)

    @torch.no_grad()
    def whiten_head(self, features: torch.Tensor) -> None:
        """Initialise the head as the whitening of features (N, num_features) of images.

        Row k of the head is the k-th principal direction divided by sqrt(l_k + s mean(l)), where l are the eigenvalues
        of the second moment of the unit features and s is WHITENING_SHRINKAGE. Without shrinkage, directions in which
        the images hardly vary would get the largest weights. The head keeps the norm that it had, so that learning
        rates keep their meaning.

        Source: Jegou & Chum, Negative Evidences and Co-occurrences in Image Retrieval, ECCV 2012.
        """
        weight = self.head.weight
        rows = whitening(F.normalize(features.double(), dim=-1), WHITENING_SHRINKAGE)[:len(weight)].to(weight.dtype)
        weight.copy_(rows * (weight.norm().to(rows.device) / rows.norm()))

    @torch.no_grad()
    def add_whitening(self, features: torch.Tensor, feature_dim: int) -> None:
        """Give a network without a head the PCA whitening of its features as one; no labels are needed.

        y = V^T (x - mu) / sqrt(l + s mean(l)), where mu, l and V are the mean and the eigenvalues and eigenvectors of
        the covariance of the features, and s is PCA_SHRINKAGE. A weak shrinkage harms where the backbone knows the
        classes already; docs/search.md.

        Args:
            features: (N, num_features) as `compute_features` returns them, layer-normalised.
            feature_dim: D, the length of the embeddings from now on, at most num_features.

        Source: Jegou & Chum, Negative Evidences and Co-occurrences in Image Retrieval, ECCV 2012.
        """
        assert self.config.layer_norm  # so that all features have one norm
        assert not self.config.feature_dim
        features = features.double()
        mean = features.mean(0)
        rows = whitening(features - mean, PCA_SHRINKAGE)[:feature_dim]
        self.head = nn.Linear(self.num_features, feature_dim).to(self.mean)
        self.head.weight.copy_(rows)
        self.head.bias.copy_(-rows @ mean)
        self.config = replace(self.config, feature_dim=feature_dim, head_bias=True)
        self.feature_dim = feature_dim


def unit_rows(rows: torch.Tensor) -> torch.Tensor:
    """Divide rows (N, D) by their norms; a row of zeros is kept, and gets no gradient.

    F.normalize would multiply the gradient of such a row by 1e12, which a bias of the head receives.
    """
    norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / norms.where(norms > 0, math.inf)


def whitening(features: torch.Tensor, shrinkage: float) -> torch.Tensor:
    """Return the rows V^T / sqrt(l + s mean(l)) (F, F), the largest l first, of the second moment of features (N, F).
    """
    eigenvalues, directions = torch.linalg.eigh(features.T @ features / len(features))  # ascending
    eigenvalues, directions = eigenvalues.clamp(min=0).flip(0), directions.flip(1)
    return (directions / (eigenvalues + shrinkage * eigenvalues.mean()).sqrt()).T


# ---------------------------------------------------- proxies and their updates -------------------------------------
def init_proxies(num_classes: int, feature_dim: int, proxy_init: str) -> torch.Tensor:
    """Draw proxies (C, D): unit random rows, or for `kaiming` normal ones of fan_out C (Proxy Anchor).

    `mean` draws unit rows, which `ProxyLoss.start_at_class_means` replaces before the training.
    """
    proxies = torch.randn(num_classes, feature_dim)
    return proxies * math.sqrt(2 / num_classes) if proxy_init == 'kaiming' else F.normalize(proxies, dim=-1)


def cosine_similarity(embeddings: torch.Tensor, proxies: torch.Tensor) -> torch.Tensor:
    """Return s (N, C) of unit embeddings (N, D) and proxies (C, D) of any length."""
    return embeddings @ F.normalize(proxies, dim=-1).T


def similarity_for_positive_update(embeddings: torch.Tensor, proxies: torch.Tensor, labels: torch.Tensor
                                   ) -> torch.Tensor:
    """Return s (N, C) through which each proxy receives the gradient of its own class's images only, averaged.

    The embeddings receive the full gradient. The values are those of `cosine_similarity`: the term that carries the
    gradient of the positive pairs to the proxies is zero.

    Source: Positive Proxy, Learning with only positive embeddings for fine-grained image retrieval.
    """
    similarity = cosine_similarity(embeddings, proxies.detach())
    positive = (embeddings.detach() * F.normalize(proxies, dim=-1)[labels]).sum(1)  # (N,)
    positive = positive / count_labels(labels, len(proxies))[labels]
    zero_with_gradient = positive - positive.detach()
    return similarity.scatter_add(1, labels[:, None], zero_with_gradient[:, None])


def move_proxies(proxies: torch.Tensor, embeddings: torch.Tensor, labels: torch.Tensor, momentum: float
                 ) -> torch.Tensor:
    """Return proxies (C, D) after p_c <- normalize((1 - m) p_c + m sum_{i: y_i = c} x_i) for the classes in the batch.

    Classes without an image in the batch keep their proxy.

    Source: Asymptotic Proxy; Momentum Proxy (`adam*`, `sgd*`).
    """
    class_sums = torch.zeros_like(proxies).index_add_(0, labels, embeddings.to(proxies.dtype))
    moved = F.normalize((1 - momentum) * proxies + momentum * class_sums, dim=-1)
    in_batch = count_labels(labels, len(proxies)) > 0
    return torch.where(in_batch[:, None], moved, proxies)


def count_labels(labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Return the number of images of each class (C,), int64; unlike bincount it does not wait for the device."""
    return torch.zeros(num_classes, dtype=torch.int64, device=labels.device).index_add_(
        0, labels, torch.ones_like(labels))


class ProxyLoss(nn.Module):
    """A loss on the similarities of embeddings and proxies, one proxy per class; each loss adds its formula.

    How the proxies are updated is a second choice, independent of the formula:

    - `gradient`: they are parameters, trained by the gradient of the loss;
    - `positive`: they are parameters; p_c receives the gradient of its own class's n_c images in the batch only,
      1/n_c sum_{i: y_i = c} dL/ds_ic ds_ic/dp_c;
    - `momentum`: they are a buffer without gradient, moved towards their class once the loss of a training batch is
      computed.

    With several processes the loss is that of the global batch: each process gathers all embeddings and computes the
    same loss, so that the gradient of the proxies is complete in every process. Wrap the network in
    DistributedDataParallel, not this module.

    Args:
        num_classes: C.
        feature_dim: D.
        scale: alpha.
        margin: delta; None where the formula has no margin.
        proxy_update: `gradient`, `positive` or `momentum`.
        momentum: m in (0, 1], used by the update `momentum`.
        proxy_init: `unit`, `kaiming` or `mean`, see `init_proxies`.
    """

    has_proxies = True

    def __init__(self, num_classes: int, feature_dim: int, scale: float, margin: float | None = None,
                 proxy_update: str = 'gradient', momentum: float = MOMENTUM, proxy_init: str = 'unit'):
        super().__init__()
        check_choice('--proxy_update', proxy_update, PROXY_UPDATES)
        if not 0 < momentum <= 1:
            raise UserError(f'--momentum {momentum} must be above 0 and at most 1')
        if not 0 < scale < math.inf:
            raise UserError(f'--scale {scale} must be a positive number')
        self.num_classes, self.scale, self.margin = num_classes, scale, margin
        self.proxy_update, self.momentum = proxy_update, momentum
        proxies = init_proxies(num_classes, feature_dim, proxy_init)
        if proxy_update == 'momentum':
            self.register_buffer('proxies', F.normalize(proxies, dim=-1))
        else:
            self.proxies = nn.Parameter(proxies)
        self.accuracy = torch.zeros(())  # share of the last batch nearest to its own proxy; stays on the device
        self.num_samples = 0  # in the last batch, of all processes

    def compute_loss(self, similarity: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss () of cosine similarities (N, C) and labels (N,); each loss writes its own."""
        raise NotImplementedError

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss () of unit embeddings (N, D) of any float type with labels (N,) int64 in [0, C).

        Rows may also be zero, see EmbeddingNet.forward.
        With several processes they are one process's part of the batch, and the loss is that of the whole batch.
        """
        with torch.autocast(embeddings.device.type, enabled=False):  # similarities, exponentials, sums in float32
            check_batch(embeddings, labels, self.proxies.shape[1], self.num_classes)
            dtype = torch.promote_types(embeddings.dtype, self.proxies.dtype)
            embeddings, labels = gather_rows(embeddings.to(dtype)), gather_rows(labels)
            proxies = self.proxies.to(dtype)
            if self.proxy_update == 'positive':
                similarity = similarity_for_positive_update(embeddings, proxies, labels)
            else:
                similarity = cosine_similarity(embeddings, proxies)
            loss = self.compute_loss(similarity, labels)
            self.accuracy = (similarity.detach().argmax(1) == labels).float().mean()
            self.num_samples = len(labels)
            if self.training and self.proxy_update == 'momentum':
                self.proxies = move_proxies(self.proxies, embeddings.detach(), labels, self.momentum)
        return loss

    @torch.no_grad()
    def start_at_class_means(self, embeddings: torch.Tensor, labels: torch.Tensor) -> None:
        """Put each proxy at the mean direction of its class's embeddings (N, D); labels (N,) cover every class.

        Source: Qi, Brown, Lowe, Low-Shot Learning with Imprinted Weights, CVPR 2018, arXiv 1712.07136.
        """
        self.proxies.copy_(F.normalize(torch.zeros_like(self.proxies).index_add_(0, labels, embeddings), dim=-1))

    def unit_proxies(self) -> torch.Tensor:
        """Return the proxies (C, D) as unit rows, without gradient."""
        return F.normalize(self.proxies.detach(), dim=-1)


def check_batch(embeddings: torch.Tensor, labels: torch.Tensor, dim: int, num_classes: int) -> None:
    """Refuse a batch whose loss would be meaningless.

    Values are checked on a CPU only, where reading them costs no wait for the device.

    Raises:
        UserError: with what was expected.
    """
    if embeddings.ndim != 2 or embeddings.shape[1] != dim or not embeddings.is_floating_point():
        raise UserError(f'embeddings are {tuple(embeddings.shape)} of {embeddings.dtype}; expected are (N, {dim}) '
                        'floats')
    if labels.shape != embeddings.shape[:1] or labels.dtype != torch.int64:
        raise UserError(f'labels are {tuple(labels.shape)} of {labels.dtype}; expected are ({len(embeddings)},) of '
                        'torch.int64, one for each embedding')
    if not len(labels) and world_size() == 1:
        raise UserError('the batch is empty; a loss needs at least one embedding')
    if embeddings.device.type != 'cpu' or not len(labels):
        return
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise UserError(f'labels lie between {int(labels.min())} and {int(labels.max())}; expected are 0 to '
                        f'{num_classes - 1}, one for each of the {num_classes} classes')
    norms = torch.linalg.vector_norm(embeddings.detach().float(), dim=1)
    deviation = (norms - 1).abs().where(norms > 0, 0.0)
    if (deviation > 0.05).any():  # the norm of a unit row in bfloat16 deviates by up to 0.004
        raise UserError(f'embeddings are not unit rows: a norm deviates from 1 by {float(deviation.max()):.3g}; '
                        'normalise them, as EmbeddingNet does')


# ---------------------------------------------------- losses --------------------------------------------------------
LOG_ZERO = -1e30  # stands for log 0: unlike -inf it leaves no NaN in sums, differences and gradients
LOSS_CLASSES = {}


def register(name: str):
    """Register a loss class under a name of recipes.LOSSES, where its scale and margin stand."""
    def decorate(cls: type) -> type:
        assert name in LOSSES, f'{name} needs an entry in recipes.LOSSES'
        LOSS_CLASSES[name] = cls
        return cls

    return decorate


def make_loss(name: str, *, scale: float | None = None, margin: float | None = None, **settings) -> ProxyLoss:
    """Build a loss by its name in recipes.LOSSES; its scale and margin are the paper's unless they are given.

    Args:
        settings: num_classes and feature_dim, and what else ProxyLoss takes.

    Raises:
        UserError: if the name is unknown, a setting is out of range, or a margin is given for a loss without one.
    """
    defaults = LOSSES[check_choice('the loss', name, LOSSES)]
    if margin is not None and defaults.margin is None:
        raise UserError(f'--margin {margin} has no effect: {name} has no margin; leave it out')
    scale = defaults.scale if scale is None else scale
    margin = defaults.margin if margin is None else margin
    return LOSS_CLASSES[name](scale=scale, margin=margin, **settings)


def own_class_mask(similarity: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return whether each entry of similarity (N, C) is a positive pair, i.e. c = y_i."""
    return labels[:, None] == torch.arange(similarity.shape[1], device=labels.device)


def masked_logsumexp(z: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return log sum_{i: mask_ic} exp(z_ic) (C,) of z (N, C), LOG_ZERO where the mask holds no image."""
    return z.masked_fill(~mask, LOG_ZERO).logsumexp(0)


def masked_logmeanexp(z: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return log mean_{i: mask_ic} exp(z_ic) (C,) of z (N, C), about LOG_ZERO where the mask holds no image."""
    return masked_logsumexp(z, mask) - mask.sum(0, dtype=z.dtype).clamp(min=1).log()


def log1p_exp(z: torch.Tensor) -> torch.Tensor:
    """Return log(1 + exp(z)) to the last digit; F.softplus drops the 1 above 20."""
    return torch.logaddexp(z, torch.zeros_like(z))


@register('proxy_anchor')
class ProxyAnchor(ProxyLoss):
    """1/|P+| sum_{c in P+} log(1 + sum_{i: y_i = c} exp(-alpha (s_ic - delta)))
    + 1/C sum_c log(1 + sum_{i: y_i != c} exp(alpha (s_ic + delta))), where P+ are the classes in the batch.

    Source: Kim et al., CVPR 2020, arXiv 2003.13911, eq. 4.
    """

    def compute_loss(self, similarity: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        own = own_class_mask(similarity, labels)
        positive = masked_logsumexp(-self.scale * (similarity - self.margin), own)  # (C,)
        negative = masked_logsumexp(self.scale * (similarity + self.margin), ~own)
        return log1p_exp(positive).sum() / own.any(0).sum() + log1p_exp(negative).mean()


@register('balanced_proxy')
class BalancedProxy(ProxyLoss):
    """1/C sum_c log(1 + mean_{i: y_i = c} exp(-alpha (s_ic - delta)) + mean_{i: y_i != c} exp(alpha (s_ic + delta))),
    where an empty mean is 0.

    A class's positives and negatives are each averaged inside one log, so they contribute equally, although the
    negatives are far more. The paper's text is not public; this is the definition used here. It is the loss of the
    previous stage in the author's own public code, which has the same command line, scale and margin (there with
    AdamP; the system's page adds weight decay and layer norm).

    Source: Balanced proxy loss for fine-grained image retrieval, Pattern Recognition Letters.
    """

    def compute_loss(self, similarity: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        own = own_class_mask(similarity, labels)
        positive = masked_logmeanexp(-self.scale * (similarity - self.margin), own)  # (C,)
        negative = masked_logmeanexp(self.scale * (similarity + self.margin), ~own)
        return log1p_exp(torch.logaddexp(positive, negative)).mean()


@register('balanced_proxy_split')
class BalancedProxySplit(ProxyLoss):
    """Balanced Proxy with a log for each of its two means, as in Proxy Anchor:
    1/|P+| sum_{c in P+} log(1 + mean_{i: y_i = c} exp(-alpha (s_ic - delta)))
    + 1/C sum_c log(1 + mean_{i: y_i != c} exp(alpha (s_ic + delta))).

    Another reading of the system's page, for comparison.
    """

    def compute_loss(self, similarity: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        own = own_class_mask(similarity, labels)
        positive = masked_logmeanexp(-self.scale * (similarity - self.margin), own)
        negative = masked_logmeanexp(self.scale * (similarity + self.margin), ~own)
        return log1p_exp(positive).sum() / own.any(0).sum() + log1p_exp(negative).mean()


@register('normalized_softmax')
class NormalizedSoftmax(ProxyLoss):
    """The cross entropy of alpha s_ic. Source: Zhai & Wu, BMVC 2019, arXiv 1811.12649."""

    def compute_loss(self, similarity: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.scale * similarity, labels)


@register('proxy_nca')
class ProxyNCA(ProxyLoss):
    """ProxyNCA++: the cross entropy of -alpha d_ic, d_ic = ||x_i - p_c||^2, with the positive in the denominator.

    Since d_ic = 2 - 2 s_ic, and the 2 is the same in all logits, the logits are 2 alpha s_ic.

    Source: Movshovitz-Attias et al., ICCV 2017, arXiv 1703.07464; Teh et al., ECCV 2020, arXiv 2004.01113, eq. 5.
    """

    def compute_loss(self, similarity: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(2 * self.scale * similarity, labels)


@register('cos_face')
class CosFace(ProxyLoss):
    """The cross entropy of alpha (s_ic - delta [c = y_i]). Source: Wang et al., CVPR 2018, arXiv 1801.09414, eq. 4."""

    def compute_loss(self, similarity: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        own = own_class_mask(similarity, labels)
        return F.cross_entropy(self.scale * torch.where(own, similarity - self.margin, similarity), labels)


@register('arc_face')
class ArcFace(ProxyLoss):
    """The cross entropy of alpha cos(theta_ic + delta [c = y_i]), where theta = arccos s and delta is in radians.

    Once theta + delta passes pi, s - delta sin(delta) takes its place, which keeps falling with s. The cosine of the
    sum is written without acos, whose gradient is infinite at s = 1.

    Source: Deng et al., CVPR 2019, arXiv 1801.07698, eq. 3.
    """

    def compute_loss(self, similarity: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        own = similarity.gather(1, labels[:, None])  # (N, 1)
        sine_squared = 1 - own.square()  # rounding can take it to 0 or below, where sqrt has no finite gradient
        sine = sine_squared.where(sine_squared > 0, 1.0).sqrt().where(sine_squared > 0, 0.0)
        with_margin = own * math.cos(self.margin) - sine * math.sin(self.margin)
        past_pi = own < -math.cos(self.margin)
        with_margin = torch.where(past_pi, own - self.margin * math.sin(self.margin), with_margin)
        return F.cross_entropy(self.scale * similarity.scatter(1, labels[:, None], with_margin), labels)
