"""Pretrained backbones without training: their features, the whitening, and the data bases that embed.py makes so."""
import os
import stat
import urllib.request

import numpy as np
import pytest
import torch
from museum import make_model, write_photos
from raw_trees import write_image
from torch.nn import functional

import embed
from common.errors import UserError
from common.images import load_image
from common.weights import check_hub
from imagedata.loading import make_transform
from model import EmbeddingNet, NetConfig
from retrieval import image_files, pretrained
from retrieval.database import load_data_base
from retrieval.embedding import PretrainedBaseline, embed_images
from retrieval.model_file import load_model
from retrieval.pretrained import build_pretrained, fit_whitening, without_whitening

BACKBONE = 'timm:test_resnet'
CPU = torch.device('cpu')


@pytest.fixture(scope='module')
def weights(tmp_path_factory) -> str:
    """A file with weights of a backbone, which pass for pretrained ones."""
    file = tmp_path_factory.mktemp('weights') / 'w.pth'
    torch.manual_seed(3)
    torch.save(EmbeddingNet(NetConfig(BACKBONE, 0), 'none').backbone.network.state_dict(), file)
    return str(file)


@pytest.fixture
def network(weights) -> EmbeddingNet:
    return build_pretrained(BACKBONE, weights, 32, None, CPU)


def slow_whitening(features: np.ndarray, dim: int, shrinkage: float = 30.0) -> np.ndarray:
    """Whiten features (N, F) by the formula, one image and direction at a time, in float64."""
    features = np.asarray(features, dtype=np.float64)
    mean = sum(features) / len(features)
    covariance = sum(np.outer(row - mean, row - mean) for row in features) / len(features)
    variances, directions = np.linalg.eigh(covariance)
    largest = np.argsort(-variances)[:dim]
    rows = []
    for row in features:
        projected = [directions[:, index] @ (row - mean) / np.sqrt(variances[index] + shrinkage * variances.mean())
                     for index in largest]
        rows.append(np.array(projected) / np.linalg.norm(projected))
    return np.array(rows)


def assert_same_similarities(embeddings, expected, tolerance: float = 1e-5) -> None:
    """Assert that two sets of embeddings have the same cosines: directions are defined up to their sign."""
    embeddings, expected = (np.asarray(values, dtype=np.float64) for values in (embeddings, expected))
    np.testing.assert_allclose(embeddings @ embeddings.T, expected @ expected.T, atol=tolerance)


def make_features(count: int, dim: int) -> torch.Tensor:
    """Return random features (count, dim) of very different variances, as a layer norm leaves them."""
    generator = torch.Generator().manual_seed(count)
    features = torch.randn(count, dim, generator=generator) * torch.logspace(0, -2, dim) + torch.linspace(-1, 1, dim)
    return functional.layer_norm(features, (dim,))


def whiten(network: EmbeddingNet, features: torch.Tensor) -> torch.Tensor:
    """Return the embeddings of a network with these inputs of its head."""
    return functional.normalize(network.head(features), dim=1).detach()


# ---------------------------------------------------- whitening ---------------------------------------------------
@pytest.mark.parametrize('count', [60, 600])  # fewer images than directions, and more
def test_the_whitening_is_that_of_the_formula(network, count):
    features = make_features(count, network.num_features)
    line = fit_whitening(network, features, 40)
    assert line == f'whitened on {count} images: 40 numbers per image'
    assert whiten(network, features).shape == (count, 40)
    assert_same_similarities(whiten(network, features), slow_whitening(features.numpy(), 40))


def test_without_a_feature_dim_512_numbers_are_kept():
    lite0 = build_pretrained('timm:tf_efficientnet_lite0', 'none', 32, None, CPU)
    assert fit_whitening(lite0, make_features(60, 1280), None) == 'whitened on 60 images: 512 numbers per image'


def test_a_whitened_network_embeds_images_as_its_features_are_whitened(network):
    images = torch.randint(0, 256, (60, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = network.compute_features(images)
        fit_whitening(network, features, 40)
        assert_same_similarities(network(images), slow_whitening(features.numpy(), 40))


@pytest.mark.parametrize(('features', 'line'), [
    (make_features(49, 512), '49 images are too few to whiten the features on (50 are needed)'),
    (make_features(1, 512).expand(60, -1), 'the images do not differ, so the features cannot be whitened')])
def test_too_few_or_equal_images_leave_the_backbone_alone(network, features, line):
    features = features[:, :network.num_features]
    assert fit_whitening(network, features, None) == line
    assert network.feature_dim == network.num_features
    assert torch.equal(whiten(network, features), functional.normalize(features, dim=1))


@pytest.mark.parametrize(('name', 'pooling', 'kind', 'dim'), [
    ('efficientvit_b0', None, 'avg_max', 128), ('efficientvit_b0', 'native', 'native', 1280),
    ('lcnet_050', 'native', 'native', 1280)])
def test_a_head_of_timm_that_widens_the_features_is_taken_where_it_is_asked_for_alone(name, pooling, kind, dim):
    network = build_pretrained(f'timm:{name}', 'none', 64, pooling, CPU)
    assert (network.config.pooling, network.num_features) == (kind, dim)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    assert network(images).shape == PretrainedBaseline(network)(images).shape == (2, dim)
    network.add_whitening(make_features(60, dim), 8)
    assert network(images).shape == (2, 8)


def test_without_whitening_a_network_is_as_before(network):
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        features = network(images)
        fit_whitening(network, make_features(60, network.num_features), 40)
        assert torch.equal(without_whitening(network)(images), features)


def test_a_transformer_pools_as_its_authors_do_and_other_backbones_by_average_and_maximum(network):
    transformer = build_pretrained('timm:test_vit', 'none', 160, None, CPU)
    assert (network.config.pooling, transformer.config.pooling) == ('avg_max', 'native')
    assert build_pretrained('timm:test_vit', 'none', 160, 'cls', CPU).config.pooling == 'cls'
    images = torch.randint(0, 256, (2, 3, 160, 160), dtype=torch.uint8)
    timm_model = transformer.backbone.network
    with torch.no_grad():
        tokens = timm_model.forward_features(transformer.preprocess(images))
        expected = timm_model.fc_norm(tokens[:, 0])  # global_pool is 'token'
        torch.testing.assert_close(transformer.pool(tokens, 'native'), expected)
    with pytest.raises(UserError, match='--pooling native is for models of timm'):
        build_pretrained('resnet18', 'none', 32, 'native', CPU)


# ---------------------------------------------------- embed.py without a model ------------------------------------
@pytest.fixture
def photos(tmp_path):
    """A folder of twelve images without classes."""
    return write_photos(tmp_path / 'photos', {'a': 5, 'b': 4, 'c': 3})


@pytest.fixture
def call(call_script, tmp_path, monkeypatch, weights):
    """Call embed.py on museum.pth; returns what it printed."""
    monkeypatch.setattr(pretrained, 'FEWEST_IMAGES', 6)

    def call_embed(*words) -> str:
        return call_script(embed, '--data_base', tmp_path / 'museum.pth', '--num_workers', 0, *words)
    return call_embed


@pytest.fixture
def flags(weights) -> tuple:
    return ('--backbone_type', BACKBONE, '--weights', weights, '--image_size', 32, '--feature_dim', 9, '--amp', 'off')


def features_of(file) -> dict[str, np.ndarray]:
    """Return {path: features} of a data base."""
    test = load_data_base(file).test
    return dict(zip(test.images, test.features.numpy(), strict=True))


def test_a_folder_without_classes_is_embedded_by_a_backbone_whitened_on_it(call, flags, photos, tmp_path, network):
    printed = call('--images', photos, *flags)
    assert f'{BACKBONE}: whitened on 12 images: 9 numbers per image' in printed
    assert f'python serve.py --data_base {tmp_path}/museum.pth' in printed
    found = features_of(tmp_path / 'museum.pth')
    files = [photos / path for path in found]
    transform = make_transform(False, 32, 36, network.interpolation)
    with torch.no_grad():
        alone = network.compute_features(torch.stack([transform(load_image(file)) for file in files]))
    assert_same_similarities(list(found.values()), slow_whitening(alone.numpy(), 9))
    model, contents = load_model(tmp_path / 'museum_model.pth')
    again = embed_images(model, files, contents)  # as serve.py embeds a query
    np.testing.assert_allclose(again, list(found.values()), atol=1e-5)


def test_each_image_is_embedded_once_and_the_whitening_takes_a_sample(call, flags, photos, monkeypatch):
    read = []
    monkeypatch.setattr(embed, 'FIT_SAMPLE', 7)
    monkeypatch.setattr(image_files, 'load_image', lambda file: read.append(file) or load_image(file))
    assert 'whitened on 7 images' in call('--images', photos, *flags)
    assert len(read) == len(set(read)) == 12


def test_broken_images_are_no_part_of_the_whitening(call, flags, photos, tmp_path):
    (photos / 'broken.jpg').write_bytes(b'no image')
    printed = call('--images', photos, *flags)
    assert 'whitened on 12 images' in printed
    assert '1 images cannot be read and are left out' in printed
    assert len(features_of(tmp_path / 'museum.pth')) == 12


def test_a_folder_of_broken_images_is_one_line(call, flags, tmp_path):
    (tmp_path / 'broken').mkdir()
    (tmp_path / 'broken/a.jpg').write_bytes(b'no image')
    with pytest.raises(UserError, match='none of the 1 images can be read, for instance .*a.jpg'):
        call('--images', tmp_path / 'broken', *flags)
    assert not (tmp_path / 'museum_model.pth').exists()


def test_three_images_are_embedded_by_the_backbone_alone(call, flags, tmp_path):
    folder = write_photos(tmp_path / 'few', {'a': 3})
    printed = call('--images', folder, *flags)
    assert '3 images are too few to whiten the features on (6 are needed)' in printed
    assert len(features_of(tmp_path / 'museum.pth')) == 3


def test_images_that_are_added_later_are_projected_by_what_was_fitted(call, flags, photos, tmp_path):
    call('--images', photos, *flags)
    model, before = (tmp_path / 'museum_model.pth').read_bytes(), features_of(tmp_path / 'museum.pth')
    write_image(photos / 'new.jpg', 7, 1)
    assert '13 images, 1 to embed' in call('--images', photos)
    after = features_of(tmp_path / 'museum.pth')
    assert (tmp_path / 'museum_model.pth').read_bytes() == model
    assert all(np.array_equal(after[path], features) for path, features in before.items())
    model, contents = load_model(tmp_path / 'museum_model.pth')
    np.testing.assert_allclose(embed_images(model, [photos / 'new.jpg'], contents)[0], after['new.jpg'], atol=1e-5)


def test_an_interrupted_call_goes_on_with_the_whitening_that_it_had(call, flags, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(embed, 'FIT_SAMPLE', 7)
    call('--images', photos, *flags)
    expected = features_of(tmp_path / 'museum.pth')
    for file in (tmp_path / 'museum.pth', tmp_path / 'museum_model.pth'):
        file.unlink()

    embed_items = embed.embed_items

    def stop_after_the_sample(items, collection, *rest):
        if collection.file.name == 'museum.pth':
            raise KeyboardInterrupt
        return embed_items(items, collection, *rest)

    with monkeypatch.context() as context:
        context.setattr(embed, 'embed_items', stop_after_the_sample)
        with pytest.raises(KeyboardInterrupt):
            call('--images', photos, *flags)
    assert not (tmp_path / 'museum.pth').exists()
    for other in (('--image_size', 64), ('--feature_dim', 8)):
        with pytest.raises(UserError, match='museum_model.pth is there without its data base, and was not made by'):
            call('--images', photos, *flags, *other)
    printed = call('--images', photos, *flags)
    assert '12 images, 5 to embed' in printed
    found = features_of(tmp_path / 'museum.pth')
    assert found.keys() == expected.keys()
    for path, features in found.items():
        np.testing.assert_allclose(features, expected[path], atol=1e-5)


def test_a_call_that_is_interrupted_within_the_sample_reads_no_image_again(call, flags, photos, tmp_path, monkeypatch):
    call('--images', photos, *flags, '--batch_size', 2)
    expected = features_of(tmp_path / 'museum.pth')
    for file in (tmp_path / 'museum.pth', tmp_path / 'museum_model.pth'):
        file.unlink()
    read, load = [], image_files.load_image

    def load_seven(file):
        if len(read) == 7:
            raise KeyboardInterrupt
        read.append(file)
        return load(file)

    monkeypatch.setattr(embed, 'SAVED_EVERY', 2)
    with monkeypatch.context() as context:
        context.setattr(image_files, 'load_image', load_seven)
        with pytest.raises(KeyboardInterrupt):
            call('--images', photos, *flags, '--batch_size', 2)
    monkeypatch.setattr(image_files, 'load_image', lambda file: read.append(file) or load(file))
    call('--images', photos, *flags, '--batch_size', 2)
    assert len(read) == 13  # the seventh image twice: its part was not complete
    assert len(set(read)) == 12
    found = features_of(tmp_path / 'museum.pth')
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[path], features) for path, features in expected.items())
    assert sorted(file.name for file in tmp_path.glob('museum*')) == ['museum.pth', 'museum_model.pth']


def test_an_image_that_changes_while_the_sample_is_interrupted_is_embedded_as_it_is_now(call, flags, photos, tmp_path,
                                                                                        monkeypatch):
    monkeypatch.setattr(embed, 'SAVED_EVERY', 2)
    with monkeypatch.context() as context:
        context.setattr(embed, 'fit_whitening', interrupt)  # all of the sample is embedded
        with pytest.raises(KeyboardInterrupt):
            call('--images', photos, *flags, '--batch_size', 2)
    changed = sorted(photos.rglob('*.jpg'))[0]
    write_image(changed, 9, 99)
    os.utime(changed, ns=(1, 1))
    call('--images', photos, *flags, '--batch_size', 2)
    found = features_of(tmp_path / 'museum.pth')
    assert len(found) == 12
    model, contents = load_model(tmp_path / 'museum_model.pth')
    np.testing.assert_allclose(embed_images(model, [changed], contents)[0],
                               found[str(changed.relative_to(photos))], atol=1e-5)


def interrupt(*_):
    raise KeyboardInterrupt


def test_refit_whitens_and_embeds_all_images_again(call, flags, photos, tmp_path):
    call('--images', photos, '--labels', 'folder', *flags)
    write_photos(photos, {'d': 6})
    call('--images', photos)
    before = features_of(tmp_path / 'museum.pth')
    (tmp_path / 'museum.pth').chmod(0o600)
    assert 'whitened on 18 images: 9 numbers per image' in call('--refit')
    after = load_data_base(tmp_path / 'museum.pth')
    assert [after.class_of(label) for label in after.test.labels[:5]] == ['a'] * 5
    assert stat.S_IMODE((tmp_path / 'museum.pth').stat().st_mode) == 0o600
    refitted = features_of(tmp_path / 'museum.pth')
    assert refitted.keys() == before.keys()
    (tmp_path / 'fresh').mkdir()
    call('--images', photos, *flags, '--data_base', tmp_path / 'fresh/museum.pth')
    fresh = features_of(tmp_path / 'fresh/museum.pth')
    assert_same_similarities([refitted[path] for path in fresh], list(fresh.values()))
    assert sorted(path.name for path in tmp_path.glob('museum*')) == ['museum.pth', 'museum_model.pth']


@pytest.mark.parametrize('moment', ['embedding', 'renaming'])
def test_a_refit_that_stops_loses_nothing(call, flags, photos, tmp_path, monkeypatch, moment):
    call('--images', photos, *flags)
    write_photos(photos, {'d': 6})
    call('--images', photos)
    before = features_of(tmp_path / 'museum.pth')

    def stop(*_):
        raise KeyboardInterrupt

    calls = iter([lambda file: None, stop])  # main calls finish_refit at its start
    with monkeypatch.context() as context:
        if moment == 'embedding':
            context.setattr(embed, 'embed_items', stop)
        else:
            context.setattr(embed, 'finish_refit', lambda file: next(calls)(file))
        with pytest.raises(KeyboardInterrupt):
            call('--refit')
    if moment == 'embedding':
        assert before.keys() == features_of(tmp_path / 'museum.pth').keys()
        assert all(np.array_equal(features, before[path])
                   for path, features in features_of(tmp_path / 'museum.pth').items())
        call('--refit')
    write_image(photos / 'new.jpg', 7, 1)
    call('--images', photos)  # with the model that fits the data base
    assert len(features_of(tmp_path / 'museum.pth')) == 19
    assert sorted(path.name for path in tmp_path.glob('museum*')) == ['museum.pth', 'museum_model.pth']


def test_refit_is_refused_where_it_cannot_be_done(call, flags, photos, tmp_path):
    call('--images', photos, '--model', make_model(tmp_path / 'run_model.pth'))
    with pytest.raises(UserError, match='--refit: the model of .*museum.pth was trained'):
        call('--refit')
    for file in (tmp_path / 'museum.pth', tmp_path / 'museum_model.pth'):
        file.unlink()
    call('--images', photos, *flags)
    (tmp_path / 'link.pth').symlink_to('museum.pth')
    with pytest.raises(UserError, match='--refit replaces .*link.pth, which is a link'):
        call('--data_base', tmp_path / 'link.pth', '--refit')
    (photos / 'a/0.jpg').unlink()
    with pytest.raises(UserError, match='--refit: 1 images are missing, for instance .*a/0.jpg; call --update'):
        call('--refit')


@pytest.mark.parametrize(('words', 'message'), [
    (('--image_size', 64), '--image_size 64 has no effect: .*museum.pth exists and has its model'),
    (('--model', 'x_model.pth', '--feature_dim', 4), '--feature_dim 4 has no effect with --model'),
    (('--refit',), '--refit embeds the images of the data base as they are'),
    (('--refit', '--qdrant', 'folder'), 'name one of --data_base FILE and --qdrant URL'),
    (('--backbone_type', 'resnet51'), "--backbone_type 'resnet51' is not known; did you mean 'resnet50'"),
    (('--feature_dim', 0), '--feature_dim 0 must lie between 1')])
def test_flags_without_an_effect_are_refused(call, flags, photos, words, message):
    call('--images', photos, *flags)
    with pytest.raises(UserError, match=message.replace('?', r'\?')):
        call('--images', photos, *words)


# ---------------------------------------------------- the hub -----------------------------------------------------
def test_a_hub_that_cannot_be_reached_is_one_line_in_seconds(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:1')
    with pytest.raises(UserError, match=r'127.0.0.1:1 cannot be reached .*download http://127.0.0.1:1/timm/x/resolve'):
        check_hub('timm/x')


def test_a_model_in_the_cache_needs_no_hub(monkeypatch, tmp_path):
    import huggingface_hub

    def refuse(*_args, **_kwargs):
        raise AssertionError('the hub was asked')

    monkeypatch.setattr(urllib.request, 'urlopen', refuse)
    monkeypatch.setattr(huggingface_hub, 'try_to_load_from_cache', lambda repository, name: os.fspath(tmp_path / name))
    check_hub('timm/x')
