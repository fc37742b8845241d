"""What a training can add to any loss: a start from its images, rates, pooling, colours, the mirror image."""
import colorsys
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_one_line_error, type_command
from PIL import Image
from test_losses import C, D, N, build, make_batch
from test_scripts import NAME, TINY, train
from torch.nn import functional as F

import recipes
import train as train_module
from common.errors import UserError
from common.results import RunFiles
from evaluate import change_config
from imagedata.loading import RetrievalDataset, make_transform, open_data
from model import EmbeddingNet, NetConfig, make_loss
from recipes import PROXY_UPDATES
from retrieval.database import load_data_base
from retrieval.embedding import embed_images
from retrieval.model_file import load_model
from training.checkpoint import Start
from training.options import parse_options


# ---------------------------------------------------- pooling, rates -------------------------------------------------
def test_gem_is_the_mean_of_powers_and_learns_the_power():
    network = EmbeddingNet(NetConfig('resnet18', 4, pooling='gem', image_size=32), 'none')
    features = torch.rand(2, 5, 3, 3, dtype=torch.float64)
    features[0, 0, 0, 0] = -1.0  # cut off at 1e-6
    for power in (3, 1.7):  # at the start, and as it may be learned
        network.power.data.fill_(power)
        slow = [[(sum(max(float(value), 1e-6) ** power for value in channel.flatten()) / 9) ** (1 / power)
                 for channel in image] for image in features]
        torch.testing.assert_close(network.pool(features, 'gem').detach(), torch.tensor(slow), rtol=1e-5, atol=1e-6)
    network.pool(features, 'gem').sum().backward()
    assert network.power.grad.isfinite()
    assert network.power.grad != 0
    network.freeze_trunk(True)
    assert network.power.requires_grad  # it belongs to the head, which learns in the warm-up


@pytest.mark.parametrize(('words', 'trunk', 'proxies'), [
    (('--lr', '0.2'), 0.2, 20.0), (('--lr', '0.2', '--backbone_lr', '0.01'), 0.01, 20.0),
    (('--lr', '0.2', '--backbone_lr', '0.01', '--proxy_lr', '3'), 0.01, 3.0)])
def test_trunk_head_and_proxies_have_their_rates(words, trunk, proxies):
    from train import build_optimizer

    _, [args] = parse_options(['--recipe', 'proxy_anchor', '--data_name', 'cub', *words])
    network = EmbeddingNet(NetConfig('resnet18', 4, image_size=32), 'none')
    criterion = build('proxy_anchor', torch.randn(C, 4))
    rates = {id(parameter): group['lr'] for group in build_optimizer(network, criterion, args).param_groups
             for parameter in group['params']}
    assert len(rates) == len([*network.parameters(), *criterion.parameters()])
    assert {rates[id(parameter)] for parameter in network.trunk.parameters()} == {trunk}
    assert rates[id(network.refactor.weight)] == 0.2
    assert rates[id(criterion.proxies)] == proxies


def test_the_recipe_for_transformers_trains_a_class_token_at_a_small_rate(raw_sets, tmp_path):
    words = ('--recipe', 'transformer', '--backbone_type', 'timm:test_vit', *TINY[2:], '--weights', 'none')
    result = train(raw_sets, tmp_path, *words, '--num_epochs', 2)
    assert result.returncode == 0, result.stderr
    [file] = tmp_path.glob('*_checkpoint.pth')
    contents = torch.load(file, weights_only=True)
    assert contents['args']['pooling'] == 'cls'
    assert contents['args']['backbone_lr'] == pytest.approx(contents['args']['lr'] / 10)
    assert contents['rows'][1]['lr'] == pytest.approx(contents['rows'][0]['lr'] / 2)  # cosine: half way
    with pytest.raises(UserError, match='class token'):
        EmbeddingNet(NetConfig('resnet18', 4, pooling=contents['args']['pooling'], image_size=32), 'none')


def test_training_crops_are_of_the_share_that_was_asked_for(raw_sets):
    _, [args] = parse_options([str(word) for word in ('--data_path', raw_sets, *TINY, '--min_crop', 1, '--flip', 0)])
    training = train_module.prepare(args, Start(RunFiles(raw_sets, 'none'), False, []), torch.device('cpu'))
    images = training.loader.dataset
    first = [images[index][0] for index in range(len(images))]
    images.set_epoch(7)  # a crop of the whole image leaves little to draw
    changed = [(one.float() - images[index][0].float()).abs().mean() for index, one in enumerate(first)]
    assert sum(changed) / len(changed) < 1
    images.transform = make_transform(True, args.image_size, min_crop=0.08, flip=0.0)
    changed = [(one.float() - images[index][0].float()).abs().mean() for index, one in enumerate(first)]
    assert sum(changed) / len(changed) > 5  # grey levels; with small crops they are others in each epoch


def test_each_epoch_has_its_own_crops_and_order_and_gradients_are_clipped_as_the_recipe_says(raw_sets):
    words = ('--recipe', 'proxy_anchor', '--data_path', raw_sets, *TINY)
    _, [args] = parse_options([str(word) for word in words])
    training = train_module.prepare(args, Start(RunFiles(raw_sets, 'none'), False, []), torch.device('cpu'))
    assert training.learner.clip_value == 10
    seen = []
    for epoch in (1, 2):
        train_module.run_epoch(training, epoch)
        images = training.loader.dataset
        seen.append(([*training.loader.batch_sampler], torch.stack([images[index][0] for index in range(len(images))])))
    assert seen[0][0] != seen[1][0]
    assert not torch.equal(seen[0][1], seen[1][1])


def test_the_untouched_trunk_is_pooled_by_the_mean():
    torch.manual_seed(1)
    network = EmbeddingNet(NetConfig('resnet18', 4, 'max', image_size=64), 'none').eval()
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        expected = torch.nn.functional.normalize(network.trunk(network.preprocess(images)).mean((2, 3)), dim=-1)
        torch.testing.assert_close(network.pretrained_baseline()(images), expected)


def test_colours_change_in_training_images_alone(raw_sets):
    words = ('--data_path', raw_sets, *TINY, '--color_jitter', 0.4, '--grayscale', 1)
    _, [args] = parse_options([str(word) for word in words])
    training = train_module.prepare(args, Start(RunFiles(raw_sets, 'none'), False, []), torch.device('cpu'))
    for images, grey in ((training.loader.dataset, True), (training.test_loaders['test'].dataset, False)):
        assert all(torch.equal(image[0], image[1]) and torch.equal(image[1], image[2]) for image, _ in images) == grey


@pytest.mark.parametrize('strength', [0.0, 0.1, 0.3])
def test_color_jitter_changes_brightness_by_up_to_its_share_and_the_hue_by_half_of_it(strength):
    transform = make_transform(True, 16, color_jitter=strength)
    torch.manual_seed(0)
    grey, colour = [[transform(Image.new('RGB', (20, 20), one))[:, 3, 5] / 255 for _ in range(300)]
                    for one in ((120, 120, 120), (130, 80, 30))]  # far from where values would be cut off
    shares = [float(one[0]) * 255 / 120 - 1 for one in grey]
    turned = [(colorsys.rgb_to_hsv(*one.tolist())[0] - 30 / 360 + 0.5) % 1 - 0.5 for one in colour]
    for drawn, largest in ((shares, strength), (turned, strength / 2)):
        assert [min(drawn), max(drawn)] == pytest.approx([-largest, largest], rel=0.1, abs=0.008)


# ---------------------------------------------------- all at once --------------------------------------------------
EXTRAS = ('--backbone_lr', '1e-4', '--pooling', 'gem', '--head_init', 'whiten', '--proxy_init', 'mean', '--flip_tta', '1',
          '--color_jitter', '0.3', '--grayscale', '0.2')


def test_a_run_with_every_ingredient_goes_on_bit_for_bit(raw_sets, tmp_path):
    whole, cut = tmp_path / 'whole', tmp_path / 'cut'
    words = (*TINY, *EXTRAS, '--lr_schedule', 'constant')
    assert train(raw_sets, whole, *words, '--num_epochs', 2).returncode == 0
    assert train(raw_sets, cut, *words, '--num_epochs', 1).returncode == 0
    assert train(raw_sets, cut, *words, '--num_epochs', 2, '--resume').returncode == 0
    ends = [torch.load(folder / f'{NAME}_checkpoint.pth', weights_only=True) for folder in (whole, cut)]
    for part in ('model', 'criterion'):
        for name, value in ends[0][part].items():
            assert torch.equal(value, ends[1][part][name]), (part, name)


# ---------------------------------------------------- a start from the images ---------------------------------------
def test_the_linear_layer_starts_as_the_whitening_of_the_features():
    torch.manual_seed(0)
    model = EmbeddingNet(NetConfig('resnet18', 20, image_size=32), 'none')
    length = model.refactor.weight.detach().norm()
    features = torch.randn(700, 512) * torch.linspace(0.2, 3, 512) + 0.5
    model.whiten(features * torch.rand(700, 1))  # their lengths do not matter
    features = features / features.square().sum(1, keepdim=True).sqrt()
    # The reference takes components from the singular values of the features, not from their moments.
    _, values, rows = torch.linalg.svd(features.double(), full_matrices=False)
    eigenvalues = values**2 / 700
    outputs = features.double() @ model.refactor.weight.detach().double().T
    moment = outputs.T @ outputs / 700
    shares = eigenvalues[:20] / (eigenvalues[:20] + 0.3 * eigenvalues.mean())
    torch.testing.assert_close(moment / moment[0, 0], torch.diag(shares / shares[0]), rtol=1e-3, atol=1e-4)
    weight = model.refactor.weight.detach()
    torch.testing.assert_close(weight.norm(), length)
    torch.testing.assert_close((weight[0].double() @ rows[0]).abs().float(), weight[0].norm())


def test_fewer_images_than_features_still_give_a_layer_of_full_rank():
    model = EmbeddingNet(NetConfig('resnet18', 40, image_size=32), 'none')
    model.whiten(F.normalize(torch.randn(9, 512), dim=-1))
    assert torch.linalg.matrix_rank(model.refactor.weight) == 40


def test_more_numbers_than_the_trunk_has_are_refused_before_anything_is_measured(raw_sets, tmp_path):
    result = train(raw_sets, tmp_path, *TINY, '--recipe', 'whitened_start', '--feature_dim', 513)
    assert_one_line_error(result, '513 numbers of the 512 of resnet18', '--feature_dim 512 or less', '--head_init')
    assert result.stdout == ''


@pytest.mark.parametrize('rule', PROXY_UPDATES)
def test_proxies_start_at_the_means_of_their_classes(rule):
    embeddings, proxies = make_batch(2)
    criterion = build('normalized_softmax', proxies, proxy_update=rule)
    labels = torch.arange(N) % C
    criterion.start_at_means(embeddings.detach(), labels)
    expected = []
    for number in range(C):
        total = sum(embeddings[i].detach() for i in range(N) if labels[i] == number)
        expected.append(total / total.square().sum().sqrt())
    torch.testing.assert_close(criterion.proxies.detach(), torch.stack(expected))
    criterion.classes = range(1, 3)  # the share of one of several processes
    criterion.proxies = torch.nn.Parameter(torch.zeros(2, D, dtype=torch.float64)) if rule != 'momentum' else (
        torch.zeros(2, D, dtype=torch.float64))
    criterion.start_at_means(embeddings.detach(), labels)
    torch.testing.assert_close(criterion.proxies.detach(), torch.stack(expected[1:3]))


@pytest.mark.parametrize('layer_norm', [0, 1])
def test_a_run_starts_from_its_training_images(raw_sets, tmp_path, layer_norm):
    words = ('--head_init', 'whiten', '--proxy_init', 'mean', '--lr', 1e-30, '--freeze_bn', 1, '--amp', 'off',
             '--layer_norm', layer_norm, '--pretrained_baseline', 0)
    assert train(raw_sets, tmp_path, *TINY, *words, '--num_epochs', 1, '--warm_up', 0).returncode == 0
    model, contents = load_model(tmp_path / f'{NAME}_model.pth')
    paths = open_data(raw_sets, 'car').split['train'].values()
    images = [raw_sets / 'car' / path for of_class in paths for path in of_class]
    seen = []
    hook = model.refactor.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    embeddings, first = embed_images(model, images, contents), 0
    hook.remove()
    features = torch.cat(seen)
    reference = EmbeddingNet(model.config, 'none')
    reference.whiten(features)
    outputs, expected = features @ model.refactor.weight.detach().T, features @ reference.refactor.weight.detach().T
    grams = [rows @ rows.T / rows.norm()**2 for rows in (outputs, expected)]  # free of signs and rotations
    torch.testing.assert_close(*grams, rtol=1e-3, atol=1e-5)
    proxies = load_data_base(tmp_path / f'{NAME}_data_base.pth').proxies['train_proxies']
    for proxy, of_class in zip(proxies, paths, strict=True):
        mean = F.normalize(embeddings[first:first + len(of_class)].sum(0), dim=0)
        torch.testing.assert_close(proxy, mean, rtol=1e-4, atol=1e-4)
        first += len(of_class)


def test_a_start_fits_the_statistics_that_the_training_normalises_by(raw_sets):
    nearest = {}
    for freeze_bn in (0, 1):
        words = ['--data_path', raw_sets, *TINY, '--head_init', 'whiten', '--proxy_init', 'mean', '--amp', 'off',
                 '--freeze_bn', freeze_bn]
        args = parse_options([str(word) for word in words])[1][0]
        training = train_module.prepare(args, Start(RunFiles(raw_sets, 'none'), False, []), torch.device('cpu'))
        plain = make_transform(False, 32, args.resize_size, training.model.interpolation)
        pixels = RetrievalDataset(training.data, 'train', plain)
        images, criterion = torch.stack([pixels[index][0] for index in range(len(pixels))]), training.learner.criterion
        with torch.no_grad():
            training.model.train()
            criterion.eval()(training.model(images), torch.tensor(pixels.labels))
        nearest[freeze_bn] = float(criterion.accuracy)
    assert nearest[0] > 0.8
    assert nearest[1] > 0.8


@pytest.mark.parametrize('layer_norm', [False, True])
def test_means_are_those_of_the_embeddings_where_the_linear_layer_has_a_bias(monkeypatch, layer_norm):
    torch.manual_seed(0)
    model = EmbeddingNet(NetConfig('resnet18', 6, layer_norm=layer_norm, head_bias=True, image_size=32), 'none')
    torch.nn.init.normal_(model.refactor.bias)
    criterion = make_loss('proxy_anchor', num_classes=2, feature_dim=6)
    images, labels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), [0, 1, 1, 0]
    monkeypatch.setattr(train_module, 'make_loader', lambda *_: [(images, None)])
    args = SimpleNamespace(head_init='random', proxy_init='mean', batch_size=4, num_workers=0)
    data = type('Images', (list,), {'labels': labels})(range(4))
    train_module.start_from_images(train_module.Learner(model, criterion, None, torch.device('cpu')), data, args)
    embeddings = model.eval()(images).detach()
    expected = F.normalize(torch.stack([embeddings[0] + embeddings[3], embeddings[1] + embeddings[2]]), dim=-1)
    torch.testing.assert_close(criterion.proxies.detach(), expected)


def test_all_processes_start_from_the_whitening_of_the_first(monkeypatch):
    model = EmbeddingNet(NetConfig('resnet18', 6, image_size=32), 'none')
    criterion, of_first = make_loss('proxy_anchor', num_classes=2, feature_dim=6), torch.randn(6, 512)
    monkeypatch.setattr(train_module, 'make_loader', lambda *_: None)
    monkeypatch.setattr(train_module, 'extract_embeddings', lambda *_: torch.eye(2, 512))
    monkeypatch.setattr(train_module, 'broadcast', lambda tensor: tensor.copy_(of_first))
    args = SimpleNamespace(head_init='whiten', proxy_init='mean', batch_size=4, num_workers=0)
    data = type('Images', (list,), {'labels': [1, 0]})(range(2))
    train_module.start_from_images(train_module.Learner(model, criterion, None, torch.device('cpu')), data, args)
    assert torch.equal(model.refactor.weight, of_first)
    torch.testing.assert_close(criterion.proxies.detach(), F.normalize(of_first[:, [1, 0]].T, dim=-1))


def test_what_a_recipe_says_of_the_start_gives_way_to_a_model_and_to_losses_with_weights_of_their_own(monkeypatch):
    monkeypatch.setitem(recipes.RECIPES['proxy_anchor'], 'settings', recipes.RECIPES['proxy_anchor']['settings'] | {
        'head_init': 'whiten', 'proxy_init': 'mean'})
    words = ['--recipe', 'proxy_anchor']
    assert parse_options(words)[1][0].head_init == 'whiten'
    tuned = parse_options([*words, '--init', 'a_model.pth'])[1][0]
    assert (tuned.head_init, tuned.proxy_init) == ('random', 'mean')
    borrowed = parse_options([*words, '--loss_name', 'pml:SupConLoss'])[1][0]
    assert (borrowed.head_init, borrowed.proxy_init) == ('whiten', 'unit')
    still = parse_options([*words, '--proxy_update', 'momentum', '--proxy_init', 'unit'])[1][0]
    assert (still.proxy_update, still.proxy_init) == ('momentum', 'unit')
    with pytest.raises(UserError, match='--head_init whiten and --init contradict each other'):
        parse_options([*words, '--init', 'a_model.pth', '--head_init', 'whiten'])


# ---------------------------------------------------- the mirror image ----------------------------------------------
def test_outside_the_training_an_embedding_is_the_mean_with_that_of_the_mirror_image():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (3, 3, 32, 40), dtype=torch.uint8)
    model = EmbeddingNet(NetConfig('resnet18', 8, image_size=32, mirror=True), 'none').eval()
    plain = EmbeddingNet(NetConfig('resnet18', 8, image_size=32), 'none').eval()
    plain.load_state_dict(model.state_dict())
    mirrored = torch.stack([torch.stack([image[:, :, 39 - column] for column in range(40)], dim=2) for image in images])
    both = plain(images) + plain(mirrored)
    torch.testing.assert_close(model(images), both / both.square().sum(1, keepdim=True).sqrt())
    assert not torch.allclose(model(images), plain(images), atol=1e-3)
    torch.testing.assert_close(model.train()(images), plain.train()(images))


def test_a_run_with_the_mirror_image_is_searched_and_exported_as_it_was_measured(raw_sets, tmp_path):
    words = ('--flip_tta', 1, '--num_epochs', 1, '--warm_up', 0, '--amp', 'off')
    assert train(raw_sets, tmp_path, *TINY, *words).returncode == 0
    (tmp_path / 'car').symlink_to(raw_sets / 'car')
    data_base, file = load_data_base(tmp_path / f'{NAME}_data_base.pth'), tmp_path / f'{NAME}_model.pth'
    images = [tmp_path / 'car' / image for image in data_base.test.images]
    model, contents = load_model(file)
    assert model.config.mirror
    torch.testing.assert_close(embed_images(model, images, contents), data_base.test.features)
    result = type_command('export.py', '--model', file, '--data_path', tmp_path, '--torch', tmp_path / 'model.pt2')
    assert result.returncode == 0, result.stderr
    transform = make_transform(False, 32, contents['args']['resize_size'], model.interpolation)
    pixels = torch.stack([transform(Image.open(image).convert('RGB')) for image in images])
    program = torch.export.load(tmp_path / 'model.pt2').module()
    torch.testing.assert_close(program(pixels), data_base.test.features, rtol=1e-4, atol=1e-4)


@pytest.fixture
def finished(raw_sets, tmp_path):
    """The folder of a run of one epoch."""
    assert train(raw_sets, tmp_path / 'r', *TINY, '--num_epochs', 1, '--warm_up', 0).returncode == 0
    return tmp_path / 'r'


def test_a_finished_run_is_measured_with_the_mirror_image_and_saved_so(raw_sets, finished):
    words = ('evaluate.py', '--resume', finished / f'{NAME}_model.pth', '--data_path', raw_sets, '--results_dir',
             finished, '--save')
    for mirror in (0, 1):
        result = type_command(*words, '--flip_tta', mirror, *(['--overwrite'] if mirror else []))
        assert result.returncode == 0, result.stderr
        model, contents = load_model(finished / f'{NAME}_on_car_model.pth')
        data_base = load_data_base(finished / f'{NAME}_on_car_data_base.pth')
        assert model.config.mirror == contents['args']['mirror'] == data_base.origin['args']['mirror'] == bool(mirror)
        assert ('each image with its mirror image' in result.stdout) == bool(mirror)
        images = [raw_sets / 'car' / image for image in data_base.test.images]
        torch.testing.assert_close(embed_images(model, images, contents), data_base.test.features)


@pytest.mark.parametrize(('words', 'size', 'resize', 'said'), [
    ((), 32, 36, 'cut from 36'), (('--image_size', 64), 64, 72, 'cut from 72'),
    (('--image_size', 64, '--resize_size', 0), 64, 0, 'whole')])
def test_a_finished_run_is_measured_and_saved_at_another_size(raw_sets, finished, words, size, resize, said):
    result = type_command('evaluate.py', '--resume', finished / f'{NAME}_model.pth', '--data_path', raw_sets,
                          '--results_dir', finished, '--save', '--amp', 'off', *words)
    assert result.returncode == 0, result.stderr
    assert f'images of {size} px, {said}' in result.stdout
    model, contents = load_model(finished / f'{NAME}_on_car_model.pth')
    data_base = load_data_base(finished / f'{NAME}_on_car_data_base.pth')
    assert (model.config.image_size, contents['args']['resize_size']) == (size, resize)
    images = [raw_sets / 'car' / image for image in data_base.test.images]
    torch.testing.assert_close(embed_images(model, images, contents), data_base.test.features)
    pixels = torch.stack([make_transform(False, size, resize)(Image.open(image).convert('RGB')) for image in images])
    torch.testing.assert_close(model(pixels).detach(), data_base.test.features, rtol=1e-4, atol=1e-4)


def test_a_trunk_that_takes_one_size_says_so():
    model = EmbeddingNet(NetConfig('timm:test_vit', 4, pooling='cls', image_size=160), 'none')
    with pytest.raises(UserError, match='--image_size 100 does not fit timm:test_vit'):
        change_config(model, SimpleNamespace(mirror=None, image_size=100))


# ---------------------------------------------------- runs from before --------------------------------------------
def test_a_run_of_an_earlier_version_goes_on_and_is_started_from(raw_sets, finished):
    checkpoint, model = (finished / f'{NAME}_{kind}.pth' for kind in ('checkpoint', 'model'))
    later = ('head_init', 'mirror', 'color_jitter', 'grayscale')
    for file, part, names in ((checkpoint, 'args', later), (model, 'config', ('mirror',))):
        contents = torch.load(file, weights_only=True)
        for name in names:
            del contents[part][name]
        contents['args'] |= {'ema': 0.98}
        torch.save(contents, file)
    result = train(raw_sets, finished, *TINY, '--warm_up', 0, '--num_epochs', 2, '--resume')
    assert_one_line_error(result, '--ema 0.0 (was 0.98)')
    contents = torch.load(checkpoint, weights_only=True)
    contents['args']['ema'] = 0.0
    torch.save(contents, checkpoint)
    for words in (('--num_epochs', 2, '--resume'), ('--num_epochs', 1, '--init', model, '--remark', 'b')):
        result = train(raw_sets, finished, *TINY, '--warm_up', 0, *words)
        assert result.returncode == 0, result.stderr
