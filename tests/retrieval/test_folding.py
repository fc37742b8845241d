"""A model whose BatchNorms are folded embeds as before; what cannot be folded stays as it is."""
import pytest
import torch
from torch import nn

from model import EmbeddingNet, NetConfig
from retrieval.folding import fold_batch_norm


def make_network(backbone_type: str, **config) -> EmbeddingNet:
    """Return a network of random weights and BatchNorm statistics, in evaluation mode."""
    torch.manual_seed(0)
    model = EmbeddingNet(NetConfig(backbone_type, 7, image_size=64, **config), 'none').eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    return model


def count_norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@torch.no_grad()
@pytest.mark.parametrize(('backbone_type', 'left'), [
    ('resnet18', 0), ('timm:tf_efficientnet_lite0', 0), ('timm:test_resnet', 0), ('timm:test_vit', 0),
    ('inception', None)])
def test_a_folded_model_embeds_as_before(backbone_type, left):
    model = make_network(backbone_type, flip_tta=True)
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    expected, before = model(images), count_norms(model)
    folded = fold_batch_norm(model)
    assert torch.allclose(folded(images), expected, rtol=0, atol=1e-5)
    assert left is None or count_norms(folded) == left
    assert count_norms(model) == before
    assert torch.equal(model(images), expected)


@torch.no_grad()
def test_a_convolution_that_feeds_more_than_its_batch_norm_is_not_folded():
    model = make_network('resnet18')

    class Stem(nn.Module):
        def __init__(self, conv, norm):
            super().__init__()
            self.conv, self.norm = conv, norm

        def forward(self, features):
            output = self.conv(features)
            return self.norm(output) + output

    norm = nn.BatchNorm2d(64).eval()
    norm.running_var.fill_(3.0)
    model.backbone.conv1 = Stem(model.backbone.conv1, norm)
    assert fold_batch_norm(model) is model
