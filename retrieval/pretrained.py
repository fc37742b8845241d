"""Pretrained backbones as embedding networks without any training: which features they give, and their whitening."""
from dataclasses import replace
from pathlib import Path

import torch

from common.images import resize_for
from model import EmbeddingNet, NetConfig

# Small enough for a CPU, free to use commercially (Apache-2.0), and trained without labels on photographs of all kinds;
# docs/backbones.md compares it with others.
DEFAULT_BACKBONE = 'timm:vit_small_patch14_dinov2.lvd142m'
DEFAULT_SIZE = 224
DEFAULT_DIM = 512
FEWEST_IMAGES = 50  # on which features are whitened


def build_pretrained(backbone_type: str | None, weights: str | None, image_size: int | None, pooling: str | None,
                     device: torch.device) -> EmbeddingNet:
    """Build a network without a head: pooled features of a pretrained backbone, layer-normalised, as unit vectors.

    Without `pooling`, a transformer of timm pools as its authors do, any other backbone by average and maximum. The
    layer norm (without weights) gives all features one norm, so that a head can be added later.
    """
    config = NetConfig(backbone_type or DEFAULT_BACKBONE, 0, pooling or 'avg_max', layer_norm=True,
                       image_size=image_size or DEFAULT_SIZE)
    model = EmbeddingNet(config, weights or 'imagenet')
    model.config = replace(config, pooling=pooling or model.pretrained_pooling)
    return model.to(device, memory_format=torch.channels_last).eval()


def pretrained_settings(weights: str | None, image_size: int) -> dict:
    """Return the `args` of a model file for a pretrained network: how images are embedded with it."""
    return {'pretrained': True, 'weights': Path(weights or 'imagenet').name, 'data_name': 'photographs',
            'crop_type': 'uncropped', 'batch_size': 64, 'resize_size': resize_for(image_size), 'amp': 'auto',
            'recalls': (1, 2, 4, 8)}


def fit_whitening(model: EmbeddingNet, features: torch.Tensor, feature_dim: int | None) -> str:
    """Whiten a pretrained network on its features (N, num_features), and return a line that says so.

    Fewer than FEWEST_IMAGES images, or images that are all equal, leave the network as it is.
    """
    count = len(features)
    if count < FEWEST_IMAGES:
        return f'{count} images are too few to whiten the features on ({FEWEST_IMAGES} are needed)'
    if (features - features[0]).abs().max() < 1e-3:
        return 'the images do not differ, so the features cannot be whitened'
    model.add_whitening(features, min(feature_dim or DEFAULT_DIM, model.num_features))
    return f'whitened on {count:,} images: {model.feature_dim} numbers per image'


def without_whitening(model: EmbeddingNet) -> EmbeddingNet:
    """Return a pretrained network as it was before `fit_whitening`, with the same backbone."""
    stripped = EmbeddingNet(replace(model.config, feature_dim=0, head_bias=False), 'none')
    stripped.load_state_dict({name: value for name, value in model.state_dict().items()
                              if not name.startswith('head.')})
    return stripped.to(model.mean.device, memory_format=torch.channels_last).eval()
