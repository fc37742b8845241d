"""Fold each BatchNorm into the convolution before it, which makes a network in float32 faster on a CPU.

    model = fold_batch_norm(model)        # for inference alone; embeddings differ by rounding, about 5e-7
"""
import copy

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from model import EmbeddingNet

TOLERANCE = 1e-4  # of an embedding; if it differs by more, a convolution feeds more than its BatchNorm


@torch.no_grad()
def fold_batch_norm(model: EmbeddingNet) -> EmbeddingNet:
    """Return a copy of a model in which BatchNorms are folded into their convolutions; the model itself if none can be.

    Args:
        model: in evaluation mode.
    """
    side = model.config.image_size
    images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = images.to(model.mean.device)
    folded = copy.deepcopy(model)
    expected = model(images)
    for name, convolution, norm in convolutions_with_norm(folded, images):
        convolution.weight, convolution.bias = fuse_conv_bn_weights(
            convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
        # timm has a BatchNorm that drops out and applies the activation as well.
        folded.set_submodule(name, nn.Sequential(getattr(norm, 'drop', nn.Identity()),
                                                 getattr(norm, 'act', nn.Identity())))
    return folded if torch.allclose(folded(images), expected, rtol=0, atol=TOLERANCE) else model


def convolutions_with_norm(model: nn.Module, images: torch.Tensor) -> list[tuple[str, nn.Conv2d, nn.BatchNorm2d]]:
    """Return the BatchNorms, with their names, whose input is the output of a convolution; each is called once."""
    outputs, pairs, calls = [], [], []  # the outputs are kept, so that no two have the same id

    def after_convolution(module, _inputs, output) -> None:
        outputs.append((id(output), module, output))
        calls.append(module)

    def before_norm(module, inputs) -> None:
        pairs.extend((module, convolution) for number, convolution, _ in outputs if number == id(inputs[0]))
        calls.append(module)

    handles = [module.register_forward_hook(after_convolution) for module in model.modules()
               if isinstance(module, nn.Conv2d)]
    norms = {module: name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    handles += [norm.register_forward_pre_hook(before_norm) for norm in norms]
    model.embed(images)
    for handle in handles:
        handle.remove()
    return [(norms[norm], convolution, norm) for norm, convolution in pairs
            if calls.count(norm) == calls.count(convolution) == 1]
