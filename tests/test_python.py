"""From one's own Python: what the pages print runs, takes what people have, and raises one kind of error."""
import sys

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, type_command
from faults import TINY, train
from PIL import Image
from test_readme import TRAIN

import evaluate
from common.errors import UserError
from imagedata.loading import open_data
from model import make_loss
from retrieval.database import load_data_base
from retrieval.embedding import embed_images
from retrieval.metrics import plain_metrics
from retrieval.model_file import load_model
from retrieval.search import nearest_images

NAME = 'car_timm-test_resnet_balanced_proxy_16'


@pytest.fixture(scope='module')
def run(raw_sets, tmp_path_factory):
    """Model, its contents, data base and data of a short run."""
    folder = tmp_path_factory.mktemp('run')
    code, printed = train((*TINY, '--num_epochs', 1, '--warm_up', 0, '--num_workers', 0, '--resize_size', 48,
                           '--data_path', raw_sets, '--results_dir', folder), folder.with_suffix('.log'))
    assert code == 0, printed
    return (*load_model(folder / f'{NAME}_model.pth'), load_data_base(folder / f'{NAME}_data_base.pth'),
            open_data(raw_sets, 'car'))


def execute(page: str, **names) -> dict:
    """Run the Python block of a page's section on one's own Python, as printed; returns the names that it leaves."""
    text = (REPOSITORY / page).read_text().split('own Python\n', 1)[1].split('\n## ')[0]
    exec(compile(text.split('```python\n')[1].split('```')[0], page, 'exec'), names)  # noqa: S102
    return names


def test_the_lines_of_the_readme_run_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = type_command(REPOSITORY / 'data_utils.py', '--data_path', 'data', '--data_name', 'glyph', '--glyph_classes',
                        9, '--glyph_images', 4, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    trained = type_command(REPOSITORY / 'train.py', '--data_path', 'data', '--data_name', 'glyph', '--backbone_type',
                           'resnet18', '--feature_dim', 128, *TRAIN, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    left = execute('README.md')
    assert left['embeddings'].shape == (1, 128)
    assert left['found'][0] == (0, pytest.approx(1, abs=1e-5))
    assert left['metrics']['queries'] == 12
    assert left['loss'].isfinite()


def test_the_loop_of_somebody_else_learns(capsys):
    torch.manual_seed(0)
    assert execute('docs/export.md')['loss'] < 0.5
    assert 'accuracy of the last batch: 1.00' in capsys.readouterr().out


# ---------------------------------------------------- images --------------------------------------------------------
def test_paths_pictures_and_arrays_give_the_features_of_the_data_base(run):
    model, contents, data_base, data = run
    paths = [data.root / path for path in data_base.test.images]
    pictures = [Image.open(path).convert('RGB') for path in paths]
    for images in (paths, list(map(str, paths)), pictures, map(np.asarray, pictures)):
        found = embed_images(model, images, contents, batch_size=5)
        torch.testing.assert_close(found, data_base.test.features, rtol=0, atol=1e-6)
    assert embed_images(model, []).shape == (0, 16)


def test_a_picture_is_turned_upright_and_grey_becomes_rgb(run):
    model, contents, _, data = run
    picture = Image.open(data.root / run[2].test.images[0]).convert('L').crop((0, 0, 40, 60))
    turned = picture.transpose(Image.Transpose.ROTATE_90)  # which orientation 6 takes back
    turned.getexif()[0x0112] = 6
    grey = np.asarray(picture)
    found = embed_images(model, [turned, grey, np.stack([grey] * 3, 2)], contents)
    torch.testing.assert_close(found, found[:1].expand(3, -1), rtol=0, atol=1e-6)


@pytest.mark.parametrize(('image', 'part'), [
    ('nowhere.jpg', 'image 1, nowhere.jpg, cannot be read'), (np.zeros((4, 5)), r'\(4, 5\) of float64'),
    (np.zeros((3, 40, 40), np.uint8), r'\(3, 40, 40\) of uint8; expected is \(H, W, 3\)'), (None, 'image 1 cannot'),
    (Image.new('F', (9, 9)), 'no known range')])
def test_what_is_no_image_is_named_by_its_number(run, image, part):
    with pytest.raises(UserError, match=part):
        embed_images(run[0], [np.zeros((40, 40, 3), np.uint8), image])


# ---------------------------------------------------- search, metrics, losses ---------------------------------------
def test_a_search_finds_the_nearest_and_skips_nothing_unless_told(run):
    data_base = run[2]
    similarity = data_base.test.features.double() @ data_base.test.features[3].double()
    order = similarity.argsort(descending=True)
    found = nearest_images(data_base.test.features[3], data_base, number=4)
    assert [index for index, _ in found] == order[:4].tolist()
    assert [index for index, _ in nearest_images(data_base.test.features[3], data_base, ('test', 3), 4)] == \
        order[1:5].tolist()


@pytest.mark.parametrize('kind', [np.int32, np.uint8, np.int64])
def test_metrics_take_arrays_as_they_are(kind):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(11, 5))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    labels = (np.arange(11) % 3).astype(kind)
    features.flags.writeable = False
    expected = plain_metrics(torch.tensor(features[:6]), torch.tensor(labels[:6]).long(), torch.tensor(features[6:]),
                             torch.tensor(labels[6:]).long(), (1, 2))
    found = evaluate.retrieval_metrics(features[:6], labels[:6], features[6:], labels[6:], recalls=(1, 2))
    assert found == pytest.approx(expected)
    assert evaluate.retrieval_metrics(features.tolist(), labels.tolist(), recalls=(1,))['queries'] == 11


@pytest.mark.parametrize('labels', [['a'] * 4, [0.5] * 4, [0, 1], [None] * 4])
def test_labels_that_are_none_raise_the_one_kind_of_error(labels):
    with pytest.raises(UserError):
        evaluate.retrieval_metrics(np.eye(4), labels, recalls=(1,))


def test_an_unknown_loss_raises_the_one_kind_of_error():
    with pytest.raises(UserError, match='did you mean \'arc_face\''):
        make_loss('arcface', num_classes=3, feature_dim=2)


def test_an_import_reads_no_command_line(monkeypatch):
    code = ("import sys; sys.argv = ['x', '--nonsense']\n"
            'import browse, engine.runs, evaluate, export, model, train\nassert not hasattr(train, "COMMAND")')
    import subprocess
    assert subprocess.run([sys.executable, '-c', code], cwd=REPOSITORY, check=False).returncode == 0
