"""What a run is built from and starts with: rates, augmentation, the start from its images, flips at test time."""
import colorsys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from test_losses import C, build
from tiny_runs import NAME, options_of, train_tiny
from torch.nn import functional as F

import evaluate
import train
from common.errors import UserError
from common.files import load
from imagedata.loading import BatchSampler, RetrievalDataset, make_loader, make_transform, open_data
from model import EmbeddingNet, NetConfig, make_loss
from retrieval.database import load_data_base
from retrieval.embedding import PretrainedBaseline, WithoutHead, embed_images
from retrieval.model_file import load_model
from training.options import parse_options

CPU = torch.device('cpu')


def build_net(feature_dim: int = 4, **settings) -> EmbeddingNet:
    torch.manual_seed(0)
    return EmbeddingNet(NetConfig('timm:test_resnet', feature_dim, **{'image_size': 32, **settings}), 'none')


# ---------------------------------------------------- rates -------------------------------------------------------
@pytest.mark.parametrize(('words', 'backbone', 'proxies', 'decays'), [
    ((), 0.2, 20.0, [0.3, 0.3]), (('--backbone_lr', 0.01), 0.01, 20.0, [0.3, 0.3, 0.3]),
    (('--backbone_lr', 0.01, '--proxy_lr', 3, '--optimizer_type', 'sgd'), 0.01, 3.0, [0.3, 0.3, 0.3])])
def test_every_parameter_has_the_rate_of_its_group_and_all_have_the_weight_decay(words, backbone, proxies, decays):
    [options] = parse_options([str(word) for word in (
        '--recipe', 'proxy_anchor', '--data_name', 'cub', '--lr', 0.2, '--weight_decay', 0.3, *words)])
    network, criterion = build_net(), build('proxy_anchor', torch.randn(C, 4))
    optimizer = train.build_optimizer(network, criterion, options)
    rates = {id(parameter): group['lr'] for group in optimizer.param_groups for parameter in group['params']}
    assert len(rates) == len([*network.parameters(), *criterion.parameters()])
    assert {rates[id(parameter)] for parameter in network.backbone.parameters()} == {backbone}
    assert rates[id(network.head.weight)] == 0.2
    assert rates[id(criterion.proxies)] == proxies
    assert [group['weight_decay'] for group in optimizer.param_groups] == decays


def test_proxies_that_move_by_momentum_are_in_no_group():
    [options] = parse_options(['--recipe', 'asymptotic_proxy'])
    optimizer = train.build_optimizer(build_net(), make_loss('cos_face', num_classes=3, feature_dim=4,
                                                             proxy_update='momentum'), options)
    assert [group['role'] for group in optimizer.param_groups] == ['network']


@pytest.fixture
def epochs_of(raw_sets, tmp_path, monkeypatch):
    """Run train.py with epochs that only note how they are called; returns what they have noted so far."""
    noted = []

    def note(network, criterion, optimizer, loader, device, amp, clip_value, *_) -> dict:
        optimizer.step()  # before the schedule, or torch warns
        noted.append(SimpleNamespace(
            rates=[group['lr'] for group in optimizer.param_groups], clip_value=clip_value,
            frozen={not parameter.requires_grad for parameter in network.backbone.parameters()},
            order=list(loader.batch_sampler), pixels=torch.stack([loader.dataset[index][0] for index in range(4)])))
        return {'loss': 1.0, 'accuracy': 50.0, 'img_s': 1.0}

    def call(*words) -> list:
        monkeypatch.setattr(train, 'train_one_epoch', note)
        train_tiny(raw_sets, tmp_path, '--recipe', 'proxy_anchor', '--warm_up', 2, '--lr', 1e-2, '--lr_schedule',
                   'step', '--lr_decay_step', 2, '--lr_decay_gamma', 0.25, *words)
        return noted

    return call


def test_each_epoch_has_its_warm_up_rates_order_and_crops_after_a_resume_too(epochs_of, tmp_path):
    epochs_of('--num_epochs', 1)
    noted = epochs_of('--num_epochs', 6, '--resume')
    assert [epoch.frozen for epoch in noted] == [{True}, {True}, {False}, {False}, {False}, {False}]
    factors = [1, 1, 0.25, 0.25, 0.0625, 0.0625]
    assert [epoch.rates for epoch in noted] == [[pytest.approx(1e-2 * factor), pytest.approx(factor)]
                                                for factor in factors]
    assert {epoch.clip_value for epoch in noted} == {10}  # of Proxy Anchor
    for one, other in zip(noted, noted[1:], strict=False):
        assert one.order != other.order
        assert not torch.equal(one.pixels, other.pixels)
    [file] = tmp_path.glob('*_checkpoint.pth')
    assert [row['lr'] for row in load(file, 'checkpoint')['rows']] == [epoch.rates[0] for epoch in noted]


# ---------------------------------------------------- augmentation ------------------------------------------------
def training_images(raw_sets, *words) -> RetrievalDataset:
    """Return the augmented training images of a run on CARS196."""
    options = options_of(raw_sets, raw_sets, *words)
    data = open_data(raw_sets, 'car')
    loader = train.build_train_loader(data, BatchSampler([0] * 12, 4), build_net(), options, CPU)
    return loader.dataset


def test_training_crops_are_of_the_share_that_was_asked_for(raw_sets):
    changes = {}
    for min_crop in (1, 0.08):
        images = training_images(raw_sets, '--min_crop', min_crop, '--flip', 0)
        first = [images[index][0].float() for index in range(len(images))]
        images.set_epoch(7)
        changed = [(one - images[index][0].float()).abs().mean() for index, one in enumerate(first)]
        changes[min_crop] = float(sum(changed) / len(changed))
    assert changes[1] < 1  # a crop of the whole image leaves little to draw
    assert changes[0.08] > 5  # grey levels; small crops are others in each epoch


def test_colours_change_in_training_images(raw_sets):
    for grayscale in (0, 1):
        images = training_images(raw_sets, '--color_jitter', 0.4, '--grayscale', grayscale)
        assert all(torch.equal(image[0], image[1]) and torch.equal(image[1], image[2])
                   for image, _ in images) == bool(grayscale)


@pytest.mark.parametrize('strength', [0.0, 0.3])
def test_color_jitter_changes_brightness_by_up_to_its_share_and_the_hue_by_half_of_it(strength):
    transform = make_transform(True, 16, color_jitter=strength)
    torch.manual_seed(0)
    grey, colour = [[transform(Image.new('RGB', (20, 20), one))[:, 3, 5] / 255 for _ in range(200)]
                    for one in ((120, 120, 120), (130, 80, 30))]  # far from where values would be cut off
    shares = [float(one[0]) * 255 / 120 - 1 for one in grey]
    turned = [(colorsys.rgb_to_hsv(*one.tolist())[0] - 30 / 360 + 0.5) % 1 - 0.5 for one in colour]
    for drawn, largest in ((shares, strength), (turned, strength / 2)):
        assert [min(drawn), max(drawn)] == pytest.approx([-largest, largest], rel=0.1, abs=0.008)


# ---------------------------------------------------- a start from the images -------------------------------------
def test_the_pretrained_baseline_is_the_layer_normalised_mean_plus_maximum_whatever_the_network_pools():
    network = build_net(pooling='max', layer_norm=False, image_size=64).eval()
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        features = network.backbone(network.preprocess(images))
        pooled = features.mean((2, 3)) + features.amax((2, 3))
        centered = pooled - pooled.mean(1, keepdim=True)
        standardised = centered / (centered.square().mean(1, keepdim=True) + 1e-5).sqrt()
        torch.testing.assert_close(PretrainedBaseline(network)(images), F.normalize(standardised, dim=-1))


def test_more_features_than_the_backbone_has_cannot_be_whitened(raw_sets, tmp_path):
    num_features = build_net().num_features
    options = options_of(raw_sets, tmp_path, '--head_init', 'whiten', '--feature_dim', num_features + 1)
    message = f'cannot make {num_features + 1} numbers of the {num_features} .* --feature_dim {num_features} or less'
    with pytest.raises(UserError, match=f'--head_init whiten {message}'):
        train.build_model(options, CPU, 'none')


@pytest.mark.parametrize('layer_norm', [0, 1])
def test_a_run_starts_from_its_training_images(raw_sets, tmp_path, layer_norm):
    """Saved after an epoch at a learning rate of almost 0."""
    train_tiny(raw_sets, tmp_path, '--head_init', 'whiten', '--proxy_init', 'mean', '--lr', 1e-30, '--freeze_bn', 1,
               '--layer_norm', layer_norm, '--num_epochs', 1, '--warm_up', 0)
    model, contents = load_model(tmp_path / f'{NAME}_model.pth')
    paths = open_data(raw_sets, 'car').split['train'].values()
    images = [raw_sets / 'car' / path for of_class in paths for path in of_class]
    seen = []
    hook = model.head.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    embeddings, first = embed_images(model, images, contents), 0
    hook.remove()
    features = torch.cat(seen)
    reference = EmbeddingNet(model.config, 'none')
    reference.whiten_head(features)
    outputs, expected = features @ model.head.weight.detach().T, features @ reference.head.weight.detach().T
    grams = [rows @ rows.T / rows.norm()**2 for rows in (outputs, expected)]  # free of signs and rotations
    torch.testing.assert_close(*grams, rtol=1e-3, atol=1e-5)
    proxies = load_data_base(tmp_path / f'{NAME}_data_base.pth').proxies['train_proxies']
    for proxy, of_class in zip(proxies, paths, strict=True):
        mean = F.normalize(embeddings[first:first + len(of_class)].sum(0), dim=0)
        torch.testing.assert_close(proxy, mean, rtol=1e-4, atol=1e-4)
        first += len(of_class)


@pytest.mark.parametrize('freeze_bn', [0, 1])
def test_a_start_fits_the_statistics_that_the_training_normalises_by(raw_sets, freeze_bn):
    options = options_of(raw_sets, raw_sets, '--head_init', 'whiten', '--proxy_init', 'mean', '--freeze_bn', freeze_bn,
                         '--recipe', 'positive_proxy')
    torch.manual_seed(0)
    model = train.build_model(options, CPU, 'none')
    images = RetrievalDataset(open_data(raw_sets, 'car'), 'train', make_transform(False, 32))
    criterion = train.build_criterion(options, 3, 16)
    train.start_from_images(model, criterion, images, options, CPU, False)
    pixels = torch.stack([image for image, _ in images])
    with torch.no_grad():
        criterion.eval()(model.train()(pixels), torch.tensor(images.labels))
    assert criterion.accuracy > 0.8


@pytest.mark.parametrize('layer_norm', [False, True])
def test_class_means_are_those_of_the_embeddings_where_the_head_has_a_bias(monkeypatch, layer_norm):
    model = build_net(6, layer_norm=layer_norm, head_bias=True)
    torch.nn.init.normal_(model.head.bias)
    criterion = make_loss('proxy_anchor', num_classes=2, feature_dim=6)
    images, labels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), [0, 1, 1, 0]
    monkeypatch.setattr(train, 'make_loader', lambda *_: [(images, None)])
    options = SimpleNamespace(head_init='random', proxy_init='mean', batch_size=4, num_workers=0, freeze_bn=True)
    data = type('Images', (list,), {'labels': labels})(range(4))
    train.start_from_images(model, criterion, data, options, CPU, False)
    embeddings = model.eval()(images).detach()
    expected = F.normalize(torch.stack([embeddings[0] + embeddings[3], embeddings[1] + embeddings[2]]), dim=-1)
    torch.testing.assert_close(criterion.proxies.detach(), expected)


def test_features_without_the_head_are_its_input(raw_sets):
    model = build_net().eval()
    images = RetrievalDataset(open_data(raw_sets, 'car'), 'train', make_transform(False, 32))
    loader = make_loader(images, [range(12)], 0, CPU)
    features = train.extract_embeddings(WithoutHead(model), loader, CPU, False)
    with torch.no_grad():
        torch.testing.assert_close(F.normalize(model.head(features), dim=-1), model(next(iter(loader))[0]))


# ---------------------------------------------------- runs --------------------------------------------------------
def test_the_recipe_for_transformers_trains_a_class_token_at_a_small_rate(raw_sets, tmp_path):
    train_tiny(raw_sets, tmp_path, '--recipe', 'transformer', '--backbone_type', 'timm:test_vit', '--num_epochs', 2)
    [file] = tmp_path.glob('*_checkpoint.pth')
    contents = load(file, 'checkpoint')
    assert contents['args']['pooling'] == 'cls'
    assert contents['args']['backbone_lr'] == pytest.approx(contents['args']['lr'] / 10)
    assert contents['rows'][1]['lr'] == pytest.approx(contents['rows'][0]['lr'] / 2)  # cosine: half way


INGREDIENTS = ('--backbone_lr', '1e-4', '--pooling', 'gem', '--head_init', 'whiten', '--proxy_init', 'mean',
               '--flip_tta', '1', '--color_jitter', '0.3', '--grayscale', '0.2', '--lr_schedule', 'constant')


def test_a_run_with_every_ingredient_continues_bit_for_bit_and_is_searched_as_it_was_measured(raw_sets, tmp_path):
    whole = train_tiny(raw_sets, tmp_path / 'whole', *INGREDIENTS, '--num_epochs', 2)
    cut = train_tiny(raw_sets, tmp_path / 'cut', *INGREDIENTS, '--num_epochs', 1)
    train_tiny(raw_sets, cut, *INGREDIENTS, '--num_epochs', 2, '--resume')
    ends = [load(folder / f'{NAME}_checkpoint.pth', 'checkpoint') for folder in (whole, cut)]
    for part in ('model', 'criterion'):
        for name, value in ends[0][part].items():
            assert torch.equal(value, ends[1][part][name]), (part, name)
    model, contents = load_model(whole / f'{NAME}_model.pth')
    data_base = load_data_base(whole / f'{NAME}_data_base.pth')
    assert model.config.flip_tta
    images = [raw_sets / 'car' / image for image in data_base.test.images]
    torch.testing.assert_close(embed_images(model, images, contents), data_base.test.features)


@pytest.mark.parametrize(('words', 'flip', 'size', 'resize', 'printed'), [
    ((), False, 32, 36, 'cut from 36'), (('--flip_tta', 1), True, 32, 36, 'with flip_tta'),
    (('--image_size', 64), False, 64, 72, 'cut from 72'),
    (('--image_size', 64, '--resize_size', 0), False, 64, 0, 'images of 64 px, whole')])
def test_a_finished_run_is_measured_and_saved_with_flips_and_at_another_size(trained_run, raw_sets, tmp_path, words,
                                                                           flip, size, resize, printed, call_script):
    output = call_script(evaluate, '--model', trained_run / f'{NAME}_model.pth', '--data_path', raw_sets,
                         '--results_dir', tmp_path, '--save', '--num_workers', 0, '--amp', 'off', *words)
    assert printed in output
    assert ('with flip_tta' in output) == flip
    model, contents = load_model(tmp_path / f'{NAME}_on_car_model.pth')
    data_base = load_data_base(tmp_path / f'{NAME}_on_car_data_base.pth')
    assert model.config.flip_tta == contents['args']['flip_tta'] == data_base.origin['args']['flip_tta'] == flip
    assert (model.config.image_size, contents['args']['resize_size']) == (size, resize)
    images = [raw_sets / 'car' / image for image in data_base.test.images]
    torch.testing.assert_close(embed_images(model, images, contents), data_base.test.features)
    pixels = torch.stack([make_transform(False, size, resize)(Image.open(image).convert('RGB')) for image in images])
    torch.testing.assert_close(model(pixels).detach(), data_base.test.features, rtol=1e-4, atol=1e-4)


def test_a_backbone_that_takes_one_size_says_so():
    model = EmbeddingNet(NetConfig('timm:test_vit', 4, pooling='cls', image_size=160), 'none')
    with pytest.raises(UserError, match='--image_size 100 does not fit timm:test_vit'):
        evaluate.change_config(model, SimpleNamespace(flip_tta=None, image_size=100))
