"""Trunks, weights and the embedding network."""
import copy
import hashlib

import numpy as np
import pytest
import torch
import trunks
from torch import nn

from common.errors import UserError
from common.weights import load_weights
from model import EmbeddingNet, NetConfig
from recipes import TRUNKS


def images(size, n=2):
    return torch.from_numpy(np.random.RandomState(0).randint(0, 256, (n, 3, size, size), dtype=np.uint8))


@pytest.mark.parametrize(('name', 'width'), [('resnet18', 512), ('resnet50', 2048), ('resnet101', 2048),
                                             ('googlenet', 1024), ('inception', 1024)])
def test_trunks_give_unit_embeddings_from_their_feature_width(name, width):
    torch.manual_seed(0)
    network = EmbeddingNet(NetConfig(name, 7, image_size=64), 'none').eval()
    with torch.no_grad():
        embeddings = network(images(64))
    assert network.refactor.in_features == width
    assert embeddings.shape == (2, 7)
    assert embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(2))


def test_the_trunks_of_the_papers_are_there():
    assert set(TRUNKS) >= {'resnet18', 'resnet50', 'resnet101', 'googlenet', 'inception'}


@pytest.mark.parametrize('name', ['resnet18', 'googlenet'])
def test_a_trunk_computes_what_torchvision_computes(name):
    from torchvision import models
    torch.manual_seed(1)
    extra = {'aux_logits': False, 'init_weights': True} if name == 'googlenet' else {}
    whole = models.get_model(name, weights=None, **extra).eval()
    whole.fc, whole.dropout = nn.Identity(), nn.Identity()
    network = EmbeddingNet(NetConfig(name, 0, 'avg', layer_norm=False), 'none').eval()
    network.trunk.load_state_dict(whole.state_dict())
    pixels = images(64)
    scaled = (pixels / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / \
        torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        expected = nn.functional.normalize(whole(scaled), dim=-1)
        torch.testing.assert_close(network(pixels), expected, rtol=1e-4, atol=1e-5)


def test_bn_inception_takes_bgr_pixels_from_0_to_255():
    network = EmbeddingNet(NetConfig('inception', 3), 'none')
    pixels = torch.tensor([200, 100, 50], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = torch.tensor([50.0 - 104, 100.0 - 117, 200.0 - 128]).view(1, 3, 1, 1)
    torch.testing.assert_close(network.preprocess(pixels), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize('name', ['timm:resnet10t', 'timm:vit_tiny_patch16_224', 'timm:swin_tiny_patch4_window7_224',
                                  'timm:tf_efficientnet_lite0'])
@pytest.mark.parametrize('size', [64, 224])
def test_timm_models_of_every_layout_embed_images_of_any_size(name, size):
    """A feature map, tokens, and a feature map with channels last."""
    import timm
    network = EmbeddingNet(NetConfig(name, 5, image_size=size), 'none').eval()
    with torch.no_grad():
        assert network(images(size, 1)).shape == (1, 5)
    settings = timm.create_model(name.removeprefix('timm:')).pretrained_cfg
    assert network.mean.flatten().tolist() == pytest.approx(settings['mean'])
    assert network.std.flatten().tolist() == pytest.approx(settings['std'])
    assert network.interpolation == settings['interpolation']


def test_a_training_step_in_bfloat16_computes_depthwise_convolutions_in_float32_on_a_cpu():
    torch.manual_seed(0)
    network = EmbeddingNet(NetConfig('timm:mobilenetv3_small_050', 7, image_size=64), 'none')
    layer = next(module for module in network.modules() if isinstance(module, nn.Conv2d) and module.groups > 1)
    other = next(module for module in network.modules() if isinstance(module, nn.Conv2d) and module.groups == 1)
    features, seen = torch.rand(2, layer.in_channels, 8, 8), []
    with torch.no_grad():
        exact = layer(features)
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    copy_of_layer = copy.deepcopy(layer)
    with torch.autocast('cpu', torch.bfloat16):
        torch.testing.assert_close(layer(features), exact.bfloat16(), rtol=0, atol=0)  # rounded once, at the end
        with torch.no_grad():
            assert not torch.equal(layer(features), exact.bfloat16())  # embedding stays in bfloat16
        with torch.no_grad():
            copy_of_layer.weight.zero_()
        assert not copy_of_layer(features).any()  # a copy computes with its own weights
        assert other(torch.rand(2, other.in_channels, 8, 8)).dtype == torch.bfloat16
    assert set(seen) == {torch.bfloat16}


def test_pooling_is_over_the_map_or_the_patch_tokens():
    network = EmbeddingNet(NetConfig('resnet18', 3), 'none')
    features = torch.tensor([[[[1.0, 2], [3, 6]]]])
    for pooling, expected in (('max', 6.0), ('avg', 3.0), ('avg_max', 9.0)):
        assert network.pool(features, pooling).tolist() == [[expected]]
    network = EmbeddingNet(NetConfig('timm:vit_tiny_patch16_224', 3, 'cls'), 'none')
    tokens = torch.tensor([[[7.0], [1], [3]]])  # the class token, two patches
    assert network.pool(tokens, 'cls').item() == 7
    assert network.pool(tokens, 'avg').item() == 2


def test_layer_norm_and_bias_follow_their_flags():
    torch.manual_seed(1)
    network = EmbeddingNet(NetConfig('resnet18', 6, layer_norm=False, head_bias=True), 'none')
    assert network.refactor.bias.tolist() == [0] * 6
    assert abs(network.refactor.weight.std().item() - (2 / 6) ** 0.5) < 0.02  # kaiming normal, fan_out
    assert EmbeddingNet(NetConfig('resnet18', 6), 'none').refactor.bias is None
    seen = []
    network = EmbeddingNet(NetConfig('resnet18', 6), 'none').eval()
    network.refactor.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    with torch.no_grad():
        network(images(64))
    torch.testing.assert_close(seen[0].mean(-1), torch.zeros(2), rtol=0, atol=1e-4)


@pytest.mark.parametrize('frozen', [True, False])
def test_batchnorm_statistics_are_frozen_where_asked(frozen):
    network = EmbeddingNet(NetConfig('resnet18', 4, freeze_bn=frozen), 'none').train()
    before = network.trunk.bn1.running_mean.clone()
    network(images(64))
    assert torch.equal(network.trunk.bn1.running_mean, before) == frozen
    assert network.training


def test_warm_up_leaves_the_trunk_alone_under_adamw():
    network = EmbeddingNet(NetConfig('resnet18', 4), 'none')
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, weight_decay=0.1)
    network.train()
    for frozen in (False, True, True):  # a first free step leaves gradients and AdamW's averages behind
        network.freeze_trunk(frozen)
        before = network.trunk.conv1.weight.clone(), network.refactor.weight.clone()
        optimizer.zero_grad(set_to_none=False)  # a gradient that stays at zero still lets AdamW move a weight
        network(images(64)).square().sum(0)[0].backward()
        optimizer.step()
        assert torch.equal(network.trunk.conv1.weight, before[0]) == frozen
        assert not torch.equal(network.refactor.weight, before[1])


def test_max_pool_can_be_left_out_of_a_resnet_only():
    network = EmbeddingNet(NetConfig('resnet18', 4, max_pool=False), 'none')
    assert network.trunk(torch.zeros(1, 3, 48, 48)).shape == (1, 512, 3, 3)
    with pytest.raises(UserError, match='--max_pool 0 is for the ResNets'):
        EmbeddingNet(NetConfig('googlenet', 4, max_pool=False), 'none')


# ---------------------------------------------------- weights --------------------------------------------------------
def save_trunk(name, path):
    torch.manual_seed(5)
    whole = {f'fc.{key}': value for key, value in nn.Linear(8, 2).state_dict().items()}
    network = EmbeddingNet(NetConfig(name, 4), 'none')
    torch.save({**network.trunk.state_dict(), **whole}, path)
    return network


def test_weights_from_a_file_are_loaded_without_the_head(tmp_path):
    saved = save_trunk('resnet18', tmp_path / 'r.pth')
    loaded = EmbeddingNet(NetConfig('resnet18', 4), str(tmp_path / 'r.pth'))
    for key, value in saved.trunk.state_dict().items():
        assert torch.equal(loaded.trunk.state_dict()[key], value)


def test_timm_weights_from_a_file_are_loaded_without_the_head(tmp_path):
    import timm
    saved = timm.create_model('resnet10t', num_classes=3)
    torch.save(saved.state_dict(), tmp_path / 't.pth')
    loaded = EmbeddingNet(NetConfig('timm:resnet10t', 4), str(tmp_path / 't.pth'))
    assert torch.equal(loaded.trunk.network.layer4[0].conv1.weight, saved.layer4[0].conv1.weight)
    with pytest.raises(UserError, match='not those of --backbone_type timm:tf_efficientnet_lite0'):
        EmbeddingNet(NetConfig('timm:tf_efficientnet_lite0', 4), str(tmp_path / 't.pth'))


def test_weights_of_another_trunk_are_refused(tmp_path):
    save_trunk('resnet18', tmp_path / 'r.pth')
    with pytest.raises(UserError, match='not those of --backbone_type resnet50: 165 tensors missing'):
        EmbeddingNet(NetConfig('resnet50', 4), str(tmp_path / 'r.pth'))


def test_weights_that_would_execute_code_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath('executed').touch, ())
    torch.save({'conv1.weight': Evil()}, tmp_path / 'evil.pth')
    with pytest.raises(UserError, match='evil.pth cannot be read'):
        EmbeddingNet(NetConfig('resnet18', 4), str(tmp_path / 'evil.pth'))
    assert not (tmp_path / 'executed').exists()


def publish(tmp_path, monkeypatch, break_hash=False):
    """Serve a state dict under a file:// address with its hash in its name, as the model zoos do."""
    saved = save_trunk('resnet18', tmp_path / 'w.pth')
    digest = hashlib.sha256((tmp_path / 'w.pth').read_bytes()).hexdigest()[:8]
    digest = digest[::-1] if break_hash else digest
    published = tmp_path / f'resnet18-{digest}.pth'
    (tmp_path / 'w.pth').rename(published)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    return saved, published.as_uri()


def test_a_download_is_checked_and_kept(tmp_path, monkeypatch):
    saved, url = publish(tmp_path, monkeypatch)
    state_dict = load_weights('imagenet', url)
    assert torch.equal(state_dict['conv1.weight'], saved.trunk.conv1.weight)
    (tmp_path / url.rsplit('/', 1)[1]).unlink()
    assert load_weights('imagenet', url).keys() == state_dict.keys()


def test_a_download_with_another_hash_is_refused(tmp_path, monkeypatch):
    _, url = publish(tmp_path, monkeypatch, break_hash=True)
    with pytest.raises(UserError, match='--weights FILE'):
        load_weights('imagenet', url)
    assert not list((tmp_path / 'hub/checkpoints').iterdir())


def test_a_download_that_fails_is_one_line_and_never_random_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    with pytest.raises(UserError, match='could not be downloaded from file:///nowhere/w-0123abcd.pth'):
        load_weights('imagenet', 'file:///nowhere/w-0123abcd.pth')


def test_bn_inception_weights_with_rows_for_vectors_are_read(tmp_path, monkeypatch):
    network = EmbeddingNet(NetConfig('inception', 4), 'none')
    rows = {key: value[None] if '_bn.' in key and value.ndim == 1 else value
            for key, value in network.trunk.state_dict().items() if 'num_batches' not in key}
    path = tmp_path / 'b.pth'
    torch.save(rows, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:9]
    path.rename(tmp_path / f'bn_inception-{digest}.pth')
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    monkeypatch.setattr(trunks, 'BN_INCEPTION_URL', (tmp_path / f'bn_inception-{digest}.pth').as_uri())
    loaded = EmbeddingNet(NetConfig('inception', 4), 'imagenet')
    assert torch.equal(loaded.trunk.conv1_7x7_s2.weight, network.trunk.conv1_7x7_s2.weight)


@pytest.mark.parametrize(('name', 'message'), [
    ('resnet5', "did you mean 'resnet50'"), ('timm:nothing_like_it', 'is no model of timm')])
def test_an_unknown_trunk_is_named(name, message):
    with pytest.raises(UserError, match=message):
        EmbeddingNet(NetConfig(name, 4), 'none')


def test_class_token_pooling_needs_a_class_token():
    with pytest.raises(UserError, match='--pooling cls needs a transformer'):
        EmbeddingNet(NetConfig('resnet18', 4, 'cls'), 'none')
