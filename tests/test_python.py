"""From your own Python: what the pages print runs, takes what people have, and raises one kind of error."""
import re
import sys

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from PIL import Image
from test_readme import blocks, load_script

from common.errors import UserError
from imagedata.loading import open_data
from model import make_loss
from retrieval.database import load_data_base
from retrieval.embedding import embed_images
from retrieval.metrics import plain_metrics, retrieval_metrics
from retrieval.model_file import load_model

NAME = 'car_timm-test_resnet_balanced_proxy_16'


@pytest.fixture(scope='module')
def run(trained_run, raw_sets):
    """Model, its contents, data base and data of a short run."""
    return (*load_model(trained_run / f'{NAME}_model.pth'), load_data_base(trained_run / f'{NAME}_data_base.pth'),
            open_data(raw_sets, 'car'))


# ---------------------------------------------------- what the pages print ----------------------------------------
def test_the_python_of_the_readme_runs_as_it_is_printed(trained_run, raw_sets, tmp_path, monkeypatch):
    (block,) = [block for block in blocks((REPOSITORY / 'README.md').read_text(), 'python') if 'load_model' in block]
    (name,) = re.findall(r'results/([^\s\']+)_model\.pth', block)
    (tmp_path / 'results').mkdir()
    (tmp_path / 'data').mkdir()
    for kind in ('model', 'data_base'):
        (tmp_path / f'results/{name}_{kind}.pth').symlink_to(trained_run / f'{NAME}_{kind}.pth')
    (data_set,) = re.findall(r'data/(\w+)/', block)
    (tmp_path / 'data' / data_set).symlink_to(raw_sets / 'car')
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(block, 'README.md', 'exec'), names)  # noqa: S102
    assert names['embeddings'].shape == (1, 16)
    assert names['hits'][0] == (0, pytest.approx(1, abs=1e-5))
    assert names['metrics']['queries'] == 12
    assert names['loss'].isfinite()


def test_a_loss_learns_in_a_training_loop_of_your_own(capsys):
    torch.manual_seed(0)
    (block,) = [block for block in blocks((REPOSITORY / 'docs/export.md').read_text(), 'python')
                if 'make_loss' in block]
    names = {}
    exec(compile(block, 'docs/export.md', 'exec'), names)  # noqa: S102
    assert names['loss'] < 0.5
    assert 'accuracy of the last batch: 1.00' in capsys.readouterr().out


# ---------------------------------------------------- images --------------------------------------------------------
def test_paths_pictures_and_arrays_give_the_features_of_the_data_base(run):
    model, contents, data_base, data = run
    paths = [data.root / path for path in data_base.test.images]
    pictures = [Image.open(path).convert('RGB') for path in paths]
    for images in (paths, list(map(str, paths)), pictures, map(np.asarray, pictures)):
        embeddings = embed_images(model, images, contents, batch_size=5)
        torch.testing.assert_close(embeddings, data_base.test.features, rtol=0, atol=1e-6)
    assert embed_images(model, []).shape == (0, 16)


def test_images_are_resized_as_those_of_the_run(run):
    model, contents, data_base, data = run
    paths = [data.root / path for path in data_base.test.images[:3]]
    assert contents['args']['resize_size'] == 36
    other = embed_images(model, paths, {'args': {**contents['args'], 'resize_size': 0}})
    assert (other - data_base.test.features[:3]).abs().max() > 1e-4


def test_a_picture_is_turned_upright_and_grey_becomes_rgb(run):
    model, contents, _, data = run
    picture = Image.open(data.root / run[2].test.images[0]).convert('L').crop((0, 0, 40, 60))
    turned = picture.transpose(Image.Transpose.ROTATE_90)  # which orientation 6 takes back
    turned.getexif()[0x0112] = 6
    grey = np.asarray(picture)
    embeddings = embed_images(model, [turned, grey, np.stack([grey] * 3, 2)], contents)
    torch.testing.assert_close(embeddings, embeddings[:1].expand(3, -1), rtol=0, atol=1e-6)


@pytest.mark.parametrize(('image', 'part'), [
    ('nowhere.jpg', 'image 1, nowhere.jpg, cannot be read'), (np.zeros((4, 5)), r'\(4, 5\) of float64'),
    (np.zeros((3, 40, 40), np.uint8), r'\(3, 40, 40\) of uint8'), (None, 'image 1 cannot'),
    (Image.new('F', (9, 9)), 'no known range')])
def test_what_is_not_an_image_is_named_by_its_index(run, image, part):
    with pytest.raises(UserError, match=part):
        embed_images(run[0], [np.zeros((40, 40, 3), np.uint8), image])


@pytest.mark.parametrize('images', [torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, 8, 8).byte(),
                                    torch.zeros(0, 3, 8, 8).byte(), torch.zeros(3, 8, 8).byte()])
def test_a_network_refuses_what_are_not_images(run, images):
    with pytest.raises(UserError, match='expected are .N, 3, H, W. of torch.uint8'):
        run[0](images)


# ---------------------------------------------------- metrics, losses --------------------------------------------
@pytest.mark.parametrize('dtype', [np.int32, np.uint8, np.int64])
def test_metrics_take_arrays_as_they_are(dtype):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(11, 5))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    labels = (np.arange(11) % 3).astype(dtype)
    features.flags.writeable = False
    expected = plain_metrics(torch.tensor(features[:6]), torch.tensor(labels[:6]).long(), torch.tensor(features[6:]),
                             torch.tensor(labels[6:]).long(), (1, 2))
    metrics = retrieval_metrics(features[:6], labels[:6], features[6:], labels[6:], recalls=(1, 2))
    assert metrics == pytest.approx(expected)
    assert retrieval_metrics(features.tolist(), labels.tolist(), recalls=(1,))['queries'] == 11


@pytest.mark.parametrize('labels', [['a'] * 4, [0.5] * 4, [0, 1], [None] * 4])
def test_labels_that_are_not_whole_numbers_raise_a_user_error(labels):
    with pytest.raises(UserError):
        retrieval_metrics(np.eye(4), labels, recalls=(1,))


def test_an_unknown_loss_raises_a_user_error_with_a_suggestion():
    with pytest.raises(UserError, match='did you mean \'arc_face\''):
        make_loss('arcface', num_classes=3, feature_dim=2)


@pytest.mark.parametrize('script', ['train', 'evaluate', 'export', 'embed', 'serve', 'report', 'test'])
def test_an_import_reads_no_command_line(script, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['x', '--nonsense'])
    module = load_script(REPOSITORY / f'{script}.py')
    assert not {'RUNS', 'ARGS', 'args'} & vars(module).keys()
