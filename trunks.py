"""Trunks: networks without their heads, with ImageNet weights, a file of weights, or none.

To add one, write a function of its name and weights that returns a Trunk, and one line in recipes.TRUNKS; any model
of timm needs nothing: `--backbone_type timm:NAME`.
"""
import pickle
from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import nn

from engine.errors import UserError, nearest, reason_of
from engine.files import load
from recipes import TRUNKS

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BN_INCEPTION_URL = 'http://data.lip6.fr/cadene/pretrainedmodels/bn_inception-52deb4733.pth'
ELSEWHERE = 'get the file elsewhere and name it with --weights FILE, or train from scratch with --weights none'


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
    """Return a state dict for `--weights`: `none`, `imagenet` (downloaded once, checked against the hash in its file
    name) or a path.
    """
    if weights == 'none':
        return None
    if weights != 'imagenet':
        contents = load(weights, 'weights file')
        if isinstance(contents, dict) and {'config', 'state_dict', 'args'} <= contents.keys():
            raise UserError(f'--weights {weights} is the model of a run, not the weights of a trunk; to start from it, '
                            f'use --init {weights}')
        contents = contents.get('state_dict', contents) if isinstance(contents, dict) else None
        if not isinstance(contents, dict) or not contents or not all(
                isinstance(key, str) and torch.is_tensor(value) for key, value in contents.items()):
            raise UserError(f'--weights {weights} holds no state dict (a dict of tensors by name)')
        return contents
    try:
        return torch.hub.load_state_dict_from_url(url, map_location='cpu', check_hash=True, weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:  # RuntimeError: the hash differs
        raise UserError(f'the ImageNet weights could not be downloaded from {url} ({reason_of(error)}); {ELSEWHERE}') \
            from None


def fill(module: nn.Module, state_dict: dict | None, head: tuple[str, ...], name: str) -> nn.Module:
    """Load a state dict strictly, but for the keys of the classification head, which the module does not have."""
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

    whole = models.get_model(name, weights=None)
    state_dict = load_weights(weights, models.get_model_weights(name)['IMAGENET1K_V1'].url)
    return Trunk(fill(headless(whole, 'avgpool', 'fc'), state_dict, ('fc.',), name), whole.fc.in_features)


def googlenet(name: str, weights: str) -> Trunk:
    """Build torchvision's GoogLeNet without auxiliary heads (Szegedy et al., CVPR 2015, arXiv 1409.4842).

    As in the systems that use it, pixels are scaled like those of a ResNet, although these weights were trained on
    pixels in [-1, 1] (torchvision's `transform_input`).
    """
    from torchvision import models

    whole = models.googlenet(weights=None, aux_logits=False, transform_input=False, init_weights=weights == 'none')
    trunk = headless(whole, 'avgpool', 'dropout', 'fc')
    state_dict = load_weights(weights, models.GoogLeNet_Weights.IMAGENET1K_V1.url)
    return Trunk(fill(trunk, state_dict, ('fc.', 'aux1.', 'aux2.'), name), whole.fc.in_features)


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
        raise UserError(f'--backbone_type timm:{name} is no model of timm {timm.__version__}'
                        f'{nearest(name, timm.list_models())}; timm.list_models() lists them')
    try:
        network = timm.create_model(name, pretrained=weights == 'imagenet', num_classes=0)
    except Exception as error:  # the hub client has a family of network errors of its own
        raise UserError(f'the weights of timm:{name} could not be downloaded ({reason_of(error)}); {ELSEWHERE}'
                        if weights == 'imagenet' else
                        f'--backbone_type timm:{name} cannot be built ({reason_of(error)})') from None
    pretrained = network.pretrained_cfg
    if weights not in ('imagenet', 'none'):
        heads = pretrained.get('classifier') or 'classifier'
        heads = [heads] if isinstance(heads, str) else heads
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


class GroupedConv:
    """Mixed into a convolution in groups, above all a depthwise one: a CPU takes several times as long for its
    backward in bfloat16 as in float32, so that a training step under autocast computes this layer in float32.
    """

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if features.device.type != 'cpu' or not (torch.is_grad_enabled() and torch.is_autocast_enabled('cpu')):
            return super().forward(features)
        with torch.autocast('cpu', enabled=False):
            return super().forward(features.float()).to(torch.get_autocast_dtype('cpu'))


def build_trunk(name: str, weights: str, image_size: int) -> Trunk:
    """Build a trunk of recipes.TRUNKS, or `timm:NAME`, for square images of a size in pixels."""
    if name.startswith('timm:'):
        trunk = timm_trunk(name.removeprefix('timm:'), weights, image_size)
    else:
        trunk = globals()[TRUNKS[name]](name, weights)
    for layer in trunk.module.modules():
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:  # a mixed-in class keeps the names of the weights
            layer.__class__ = type(type(layer).__name__, (GroupedConv, type(layer)), {})
    return trunk
