"""Backbones, their weights and the embedding network: pooling, head, whitening, flips. The losses: test_losses.py."""
import copy
import hashlib

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import model
from common.errors import UserError
from common.weights import load_weights
from model import EmbeddingNet, NetConfig, make_loss
from recipes import BACKBONE_NAMES

SMALL = 'timm:test_resnet'  # half a million parameters


def make_images(side: int, count: int = 2, width: int | None = None) -> torch.Tensor:
    shape = (count, 3, side, width or side)
    return torch.from_numpy(np.random.RandomState(0).randint(0, 256, shape, dtype=np.uint8))


def build_net(name: str = SMALL, feature_dim: int = 4, **settings) -> EmbeddingNet:
    torch.manual_seed(1)
    return EmbeddingNet(NetConfig(name, feature_dim, **{'image_size': 32, **settings}), 'none')


# ---------------------------------------------------- backbones ----------------------------------------------------
def check_unit_embeddings(name: str, num_features: int, side: int) -> None:
    network = build_net(name, 7, image_size=side).eval()
    with torch.no_grad():
        embeddings = network(make_images(side))
    assert network.head.in_features == network.num_features == num_features
    assert embeddings.shape == (2, 7)
    assert embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(2))  # default tolerances of float32
    assert not torch.allclose(embeddings[0], embeddings[1])


@pytest.mark.parametrize(('name', 'num_features'), [('resnet18', 512), ('inception', 1024)])
def test_a_backbone_gives_unit_embeddings_from_its_number_of_features(name, num_features):
    check_unit_embeddings(name, num_features, 64)


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'num_features'), [('resnet18', 512), ('resnet50', 2048), ('resnet101', 2048),
                                                    ('googlenet', 1024), ('inception', 1024)])
def test_every_backbone_gives_unit_embeddings_at_full_size(name, num_features):
    check_unit_embeddings(name, num_features, 224)


def test_the_backbones_of_the_papers_are_there():
    assert set(model.BACKBONES) == set(BACKBONE_NAMES) >= {'resnet18', 'resnet50', 'resnet101', 'googlenet',
                                                           'inception'}


def scale_like_imagenet(images: torch.Tensor) -> torch.Tensor:
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    return (images / 255 - mean) / std


@pytest.mark.parametrize('name', ['resnet18', pytest.param('googlenet', marks=pytest.mark.slow)])
def test_a_backbone_computes_what_torchvision_computes(name):
    from torchvision import models

    torch.manual_seed(1)
    extra = {'aux_logits': False, 'init_weights': True} if name == 'googlenet' else {}
    whole = models.get_model(name, weights=None, **extra).eval()
    whole.fc, whole.dropout = nn.Identity(), nn.Identity()
    network = build_net(name, 0, pooling='avg', layer_norm=False).eval()
    network.backbone.load_state_dict(whole.state_dict())
    images = make_images(64)
    with torch.no_grad():
        expected = F.normalize(whole(scale_like_imagenet(images)), dim=-1)
        torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-5)


def test_bn_inception_takes_bgr_pixels_from_0_to_255():
    network = build_net('inception', 3)
    pixels = torch.tensor([200, 100, 50], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = torch.tensor([50.0 - 104, 100.0 - 117, 200.0 - 128]).view(1, 3, 1, 1)
    torch.testing.assert_close(network.preprocess(pixels), expected, rtol=0, atol=1e-4)


def check_timm(name: str, side: int) -> None:
    import timm

    network = build_net(f'timm:{name}', 5, image_size=side).eval()
    with torch.no_grad():
        assert network(make_images(side, 1)).shape == (1, 5)
    pretrained = timm.create_model(name).pretrained_cfg
    assert network.mean.flatten().tolist() == pytest.approx(pretrained['mean'])
    assert network.std.flatten().tolist() == pytest.approx(pretrained['std'])
    assert network.interpolation == pretrained['interpolation']


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit', 'test_mambaout'])
def test_timm_models_of_every_layout_embed_images_of_any_size(name):
    """A feature map, tokens, and a feature map with channels last; 64 px is the native size of none."""
    check_timm(name, 64)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['resnet10t', 'vit_tiny_patch16_224', 'swin_tiny_patch4_window7_224',
                                  'tf_efficientnet_lite0'])
@pytest.mark.parametrize('side', [64, 224])
def test_timm_models_of_full_size_embed_images_of_any_size(name, side):
    check_timm(name, side)


def test_a_feature_map_with_channels_last_is_pooled_over_its_pixels():
    network = build_net('timm:test_mambaout', 0, pooling='avg', layer_norm=False, image_size=64).eval()
    images = make_images(64)
    with torch.no_grad():
        expected = network.backbone.network.forward_features(network.preprocess(images)).mean((1, 2))
        torch.testing.assert_close(network(images), F.normalize(expected, dim=-1), rtol=1e-5, atol=1e-6)


def test_an_image_size_that_a_transformer_cannot_take_is_refused():
    with pytest.raises(UserError, match='--image_size 100 does not fit timm:test_vit'):
        build_net('timm:test_vit', image_size=100)
    one_size = nn.Identity()
    one_size.pretrained_cfg = {'input_size': (3, 160, 160)}
    with pytest.raises(UserError, match='takes images of 160 px only; set --image_size 160'):
        model.set_input_size(one_size, 'a_model', 100)


@pytest.mark.parametrize(('name', 'message'), [
    ('resnet5', "did you mean 'resnet50'"), ('timm:nothing_like_it', 'is not a model of timm')])
def test_an_unknown_backbone_is_named(name, message):
    with pytest.raises(UserError, match=message):
        build_net(name)


def test_a_training_step_in_bfloat16_computes_depthwise_convolutions_in_float32_on_a_cpu():
    network = build_net('timm:mobilenetv3_small_050', 7, image_size=64)
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
            copy_of_layer.weight.zero_()
        assert not copy_of_layer(features).any()  # a copy computes with its own weights
        assert other(torch.rand(2, other.in_channels, 8, 8)).dtype == torch.bfloat16
    assert set(seen) == {torch.bfloat16}


# ---------------------------------------------------- embedding network --------------------------------------------
def test_pooling_is_over_the_map_or_the_patch_tokens():
    network = build_net()
    features = torch.tensor([[[[1.0, 2], [3, 6]]]])
    for pooling, expected in (('max', 6.0), ('avg', 3.0), ('avg_max', 9.0)):
        assert network.pool(features, pooling).tolist() == [[expected]]
    network = build_net('timm:test_vit', 3, pooling='cls', image_size=160)
    tokens = torch.tensor([[[7.0], [1], [3]]])  # the class token, two patches
    assert network.pool(tokens, 'cls').item() == 7
    assert network.pool(tokens, 'avg').item() == 2
    assert network.pool(tokens, 'max').item() == 3


def test_gem_is_the_mean_of_powers_and_learns_the_power():
    network = build_net(pooling='gem')
    features = torch.rand(2, 5, 3, 3, dtype=torch.float64)
    features[0, 0, 0, 0] = -1.0  # clamped to 1e-6
    for power in (3, 1.7):  # the initial value, and another one that may be learned
        network.gem_power.data.fill_(power)
        slow = [[(sum(max(float(value), 1e-6) ** power for value in channel.flatten()) / 9) ** (1 / power)
                 for channel in image] for image in features]
        torch.testing.assert_close(network.pool(features, 'gem').detach(), torch.tensor(slow), rtol=1e-5, atol=1e-6)
    network.pool(features, 'gem').sum().backward()
    assert network.gem_power.grad.isfinite()
    assert network.gem_power.grad != 0
    network.freeze_backbone(True)
    assert network.gem_power.requires_grad  # it belongs to the head, which learns in the warm-up


def test_class_token_pooling_needs_a_class_token():
    with pytest.raises(UserError, match='--pooling cls needs a transformer'):
        build_net(pooling='cls')


def test_the_features_are_layer_normalised_where_asked():
    images, features = make_images(32), []
    for layer_norm in (True, False):
        network = build_net(layer_norm=layer_norm).eval()
        with torch.no_grad():
            features.append(network.compute_features(images))
    expected = (features[1] - features[1].mean(1, keepdim=True)) / features[1].std(1, correction=0, keepdim=True)
    torch.testing.assert_close(features[0], expected, rtol=1e-3, atol=1e-3)


def test_a_head_with_bias_has_the_initial_values_of_proxy_anchor():
    network = build_net('resnet18', 6, head_bias=True)
    assert network.head.bias.tolist() == [0] * 6
    assert abs(network.head.weight.std().item() - (2 / 6) ** 0.5) < 0.02  # kaiming normal, fan_out
    assert build_net(head_bias=False).head.bias is None


def test_without_a_head_an_embedding_is_the_normalised_features():
    network = build_net(feature_dim=0).eval()
    images = make_images(32)
    with torch.no_grad():
        torch.testing.assert_close(network(images), F.normalize(network.compute_features(images), dim=-1))
    assert network.feature_dim == network.num_features


@pytest.mark.parametrize('images', [
    torch.zeros(2, 3, 32, 32), torch.zeros(3, 32, 32, dtype=torch.uint8), torch.zeros(2, 32, 32, 3, dtype=torch.uint8),
    torch.zeros(0, 3, 32, 32, dtype=torch.uint8)])
def test_what_is_no_batch_of_uint8_images_is_refused(images):
    with pytest.raises(UserError, match='expected are'):
        build_net()(images)


@pytest.mark.parametrize('head_bias', [False, True])
def test_an_image_without_features_has_a_row_of_zeros_and_adds_nothing_to_the_gradient(head_bias):
    model = EmbeddingNet(NetConfig('resnet18', 8, image_size=32, head_bias=head_bias), weights='none').train()
    images = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    criterion = make_loss('proxy_anchor', num_classes=2, feature_dim=8)
    keep = torch.tensor([1.0, 0.0, 1.0]).view(3, 1, 1, 1)
    handle = model.backbone.register_forward_hook(lambda module, inputs, output: output * keep)
    embeddings = model(images)
    criterion(embeddings, torch.tensor([0, 1, 0])).backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    handle.remove()
    model.zero_grad()
    others = model(images[[0, 2]])
    criterion(torch.stack([others[0], torch.zeros(8), others[1]]), torch.tensor([0, 1, 0])).backward()
    assert torch.equal(embeddings[1], torch.zeros(8))
    torch.testing.assert_close(embeddings[[0, 2]], others)
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('frozen', [True, False])
def test_batchnorm_statistics_are_frozen_where_asked(frozen):
    network = build_net('resnet18', freeze_bn=frozen).train()
    before = network.backbone.bn1.running_mean.clone()
    network(make_images(32))
    assert torch.equal(network.backbone.bn1.running_mean, before) == frozen
    assert network.training


def test_warm_up_leaves_the_backbone_alone_under_adamw():
    network = build_net(freeze_bn=False)
    first = next(network.backbone.parameters())
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, weight_decay=0.1)
    network.train()
    for frozen in (False, True, True):  # a first free step leaves gradients and AdamW's averages behind
        network.freeze_backbone(frozen)
        before = first.clone(), network.head.weight.clone()
        optimizer.zero_grad(set_to_none=False)  # a gradient that stays at zero still lets AdamW move a weight
        network(make_images(32)).square().sum(0)[0].backward()
        optimizer.step()
        assert torch.equal(first, before[0]) == frozen
        assert not torch.equal(network.head.weight, before[1])


def test_max_pool_can_be_left_out_of_a_resnet_only():
    network = build_net('resnet18', max_pool=False)
    assert network.backbone(torch.zeros(1, 3, 48, 48)).shape == (1, 512, 3, 3)
    with pytest.raises(UserError, match='--max_pool 0 is for the ResNets'):
        build_net(SMALL, max_pool=False)


def test_with_flip_tta_an_embedding_is_the_mean_with_that_of_the_mirror_image():
    images = make_images(32, 3, width=40)
    network, plain = build_net(flip_tta=True).eval(), build_net().eval()
    plain.load_state_dict(network.state_dict())
    mirrored = torch.stack([images[..., 39 - column] for column in range(40)], dim=3)
    with torch.no_grad():
        both = plain(images) + plain(mirrored)
        torch.testing.assert_close(network(images), both / both.square().sum(1, keepdim=True).sqrt())
        assert not torch.allclose(network(images), plain(images), atol=1e-3)
        torch.testing.assert_close(network(mirrored), network(images))  # symmetric
        torch.testing.assert_close(network.train()(images), plain.train()(images))  # training does not flip


# ---------------------------------------------------- whitening ----------------------------------------------------
def test_the_head_starts_as_the_shrunk_whitening_of_the_features():
    network = build_net('resnet18', 20)
    length = network.head.weight.detach().norm()
    features = torch.randn(700, 512) * torch.linspace(0.2, 3, 512) + 0.5
    network.whiten_head(features * torch.rand(700, 1))  # the lengths of the rows do not matter
    features = features / features.square().sum(1, keepdim=True).sqrt()
    # The reference takes components from the singular values of the features, not from their moments.
    _, values, rows = torch.linalg.svd(features.double(), full_matrices=False)
    eigenvalues = values**2 / 700
    outputs = features.double() @ network.head.weight.detach().double().T
    moment = outputs.T @ outputs / 700
    shares = eigenvalues[:20] / (eigenvalues[:20] + 0.3 * eigenvalues.mean())
    torch.testing.assert_close(moment / moment[0, 0], torch.diag(shares / shares[0]), rtol=1e-3, atol=1e-4)
    weight = network.head.weight.detach()
    torch.testing.assert_close(weight.norm(), length)
    torch.testing.assert_close((weight[0].double() @ rows[0]).abs().float(), weight[0].norm())


def test_fewer_images_than_features_still_give_a_head_of_full_rank():
    network = build_net('resnet18', 40)
    network.whiten_head(torch.randn(9, 512))
    assert torch.linalg.matrix_rank(network.head.weight) == 40


# ---------------------------------------------------- weights ------------------------------------------------------
def save_backbone(path) -> EmbeddingNet:
    """Save the state dict of a ResNet18 with a classification head, as the model zoos do."""
    network = build_net('resnet18')
    head = {f'fc.{key}': value for key, value in nn.Linear(8, 2).state_dict().items()}
    torch.save({**network.backbone.state_dict(), **head}, path)
    return network


def test_weights_from_a_file_are_loaded_without_the_classification_head(tmp_path):
    saved = save_backbone(tmp_path / 'r.pth')
    loaded = EmbeddingNet(NetConfig('resnet18', 4), str(tmp_path / 'r.pth'))
    for key, value in saved.backbone.state_dict().items():
        assert torch.equal(loaded.backbone.state_dict()[key], value)


def test_timm_weights_from_a_file_are_loaded_without_the_classification_head(tmp_path):
    import timm

    saved = timm.create_model('test_resnet', num_classes=3)
    torch.save(saved.state_dict(), tmp_path / 't.pth')
    loaded = EmbeddingNet(NetConfig(SMALL, 4), str(tmp_path / 't.pth'))
    expected = saved.state_dict()
    for key, value in loaded.backbone.network.state_dict().items():
        assert torch.equal(value, expected[key])
    with pytest.raises(UserError, match='--weights do not fit timm:test_efficientnet'):
        EmbeddingNet(NetConfig('timm:test_efficientnet', 4), str(tmp_path / 't.pth'))


def test_weights_of_another_backbone_are_refused(tmp_path):
    save_backbone(tmp_path / 'r.pth')
    with pytest.raises(UserError, match=r'--weights do not fit inception: \d+ of its \d+ tensors are missing'):
        EmbeddingNet(NetConfig('inception', 4), str(tmp_path / 'r.pth'))


@pytest.mark.parametrize('change', ['missing', 'unexpected', 'reshaped'])
def test_one_tensor_that_does_not_fit_is_enough_to_refuse_weights(change):
    from common.weights import fill_backbone

    layer, state_dict = nn.Linear(3, 2), {'weight': torch.zeros(2, 3), 'bias': torch.ones(2), 'head.a': torch.zeros(1)}
    assert torch.equal(fill_backbone(layer, state_dict, ('head.',), 'net').bias, torch.ones(2))
    changed = {'missing': {'weight': state_dict['weight']}, 'unexpected': {**state_dict, 'scale': torch.zeros(1)},
               'reshaped': {**state_dict, 'bias': torch.zeros(3)}}[change]
    with pytest.raises(UserError, match='--weights do not fit net: .*for instance (bias|scale)'):
        fill_backbone(layer, changed, ('head.',), 'net')


def test_weights_that_would_execute_code_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath('executed').touch, ())

    torch.save({'conv1.weight': Evil()}, tmp_path / 'evil.pth')
    with pytest.raises(UserError, match=r'evil\.pth cannot be read'):
        load_weights(str(tmp_path / 'evil.pth'), '')
    assert not (tmp_path / 'executed').exists()


def test_the_model_of_a_run_is_refused_as_weights_of_a_backbone(tmp_path):
    torch.save({'config': {}, 'state_dict': {'a': torch.zeros(1)}, 'args': {}}, tmp_path / 'run_model.pth')
    with pytest.raises(UserError, match='use --init'):
        load_weights(str(tmp_path / 'run_model.pth'), '')


@pytest.mark.parametrize('contents', [torch.zeros(3), [1], {1: torch.zeros(2)}, {'state_dict': 5}, {}])
def test_a_file_without_a_state_dict_is_refused(tmp_path, contents):
    torch.save(contents, tmp_path / 'w.pth')
    with pytest.raises(UserError, match=r'w\.pth holds no state dict'):
        load_weights(str(tmp_path / 'w.pth'), '')


def publish(state_dict: dict, tmp_path, monkeypatch, right_hash: bool = True) -> str:
    """Serve a state dict under a file:// address with its hash in its name, as the model zoos do."""
    torch.save(state_dict, tmp_path / 'w.pth')
    digest = hashlib.sha256((tmp_path / 'w.pth').read_bytes()).hexdigest()[:8]
    published = tmp_path / f'weights-{digest if right_hash else digest[::-1]}.pth'
    (tmp_path / 'w.pth').rename(published)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    return published.as_uri()


def test_a_download_is_checked_and_kept(tmp_path, monkeypatch):
    url = publish({'a': torch.arange(3)}, tmp_path, monkeypatch)
    assert load_weights('imagenet', url)['a'].tolist() == [0, 1, 2]
    (tmp_path / url.rsplit('/', 1)[1]).unlink()
    assert load_weights('imagenet', url)['a'].tolist() == [0, 1, 2]


def test_a_download_with_another_hash_is_refused(tmp_path, monkeypatch):
    url = publish({'a': torch.arange(3)}, tmp_path, monkeypatch, right_hash=False)
    with pytest.raises(UserError, match='--weights FILE'):
        load_weights('imagenet', url)
    assert not list((tmp_path / 'hub/checkpoints').iterdir())


def test_a_download_that_fails_is_one_line_and_never_random_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    with pytest.raises(UserError, match=r'could not be downloaded from file:///nowhere/w-0123abcd\.pth'):
        load_weights('imagenet', 'file:///nowhere/w-0123abcd.pth')


def test_bn_inception_weights_with_rows_for_vectors_are_read(tmp_path, monkeypatch):
    network = build_net('inception')
    rows = {key: value[None] if '_bn.' in key and value.ndim == 1 else value
            for key, value in network.backbone.state_dict().items() if 'num_batches' not in key}
    monkeypatch.setattr(model, 'BN_INCEPTION_URL', publish(rows, tmp_path, monkeypatch))
    loaded = EmbeddingNet(NetConfig('inception', 4), 'imagenet')
    for name in ('conv1_7x7_s2.weight', 'conv1_7x7_s2_bn.weight'):
        assert torch.equal(loaded.backbone.state_dict()[name], network.backbone.state_dict()[name])


def test_every_grouped_convolution_of_a_backbone_trains_in_float32_under_autocast_on_a_cpu():
    network = EmbeddingNet(NetConfig('timm:tf_efficientnet_lite0', 8, image_size=32), 'none')
    dtypes = {}
    for name, layer in network.backbone.named_modules():
        if isinstance(layer, torch.nn.Conv2d) and layer.groups > 1:  # of timm's Conv2dSame too
            layer.weight.register_hook(lambda gradient, name=name: dtypes.__setitem__(name, gradient.dtype))
            assert 'Float32GroupedConv' in [ancestor.__name__ for ancestor in type(layer).__mro__]
    with torch.autocast('cpu', torch.bfloat16):
        network(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).sum().backward()
    assert len(dtypes) == 16
    assert set(dtypes.values()) == {torch.float32}


# ---------------------------------------------------- weights of other programs ------------------------------------
STATE = {'conv.weight': torch.arange(3.0), 'conv.bias': torch.zeros(1)}


@pytest.mark.parametrize('contents', [
    STATE, {'state_dict': STATE, 'epoch': 3}, {'model': STATE}, {'model_state_dict': STATE},
    {f'module.{key}': value for key, value in STATE.items()},
    {'model': {f'module._orig_mod.{key}': value for key, value in STATE.items()}}])
def test_a_state_dict_is_found_in_peoples_checkpoints(contents, tmp_path):
    torch.save(contents, tmp_path / 'w.pth')
    loaded = load_weights(str(tmp_path / 'w.pth'), '')
    assert loaded.keys() == STATE.keys()
    assert all(torch.equal(loaded[key], value) for key, value in STATE.items())


def test_weights_of_the_hub_are_read(tmp_path):
    from safetensors.torch import save_file

    save_file(STATE, tmp_path / 'model.safetensors')
    assert load_weights(str(tmp_path / 'model.safetensors'), '').keys() == STATE.keys()
    (tmp_path / 'model.safetensors').write_bytes(b'no tensors')
    for name in ('model.safetensors', 'missing.safetensors'):
        with pytest.raises(UserError, match=rf'--weights .*{name} cannot be read'):
            load_weights(str(tmp_path / name), '')


def test_a_file_without_a_state_dict_says_what_it_holds(tmp_path):
    torch.save({'epoch': 3, 'optimizer': {'lr': 0.1}}, tmp_path / 'w.pth')
    with pytest.raises(UserError, match='holds no state dict .*: its keys are epoch, optimizer'):
        load_weights(str(tmp_path / 'w.pth'), '')
