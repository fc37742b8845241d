"""toy.py: two dimensions, and what it draws is what it measured."""
import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import call_main
from PIL import Image

import model
import toy
from common.errors import UserError
from retrieval.metrics import retrieval_metrics
from retrieval.model_file import load_model

EPOCHS = 2
MOVING, LEARNABLE = 'toy_glyph_asymptotic_proxy_moving_m0.5_t0.03', 'toy_glyph_asymptotic_proxy_learnable_t0.03'


class SmallNet(torch.nn.Module):
    """In place of the ResNet18, which takes seconds an epoch: 64 features of a 32 px image."""

    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 64, 7, stride=4, padding=3)
        self.maxpool, self.act = torch.nn.MaxPool2d(2), torch.nn.ReLU()

    def forward(self, images):
        return self.act(self.conv1(images))


def use_small_network(patch) -> None:
    patch.setitem(model.BACKBONES, 'resnet18', lambda name, weights: model.Backbone(SmallNet(), 64))


@pytest.fixture(scope='module')
def toys(tmp_path_factory):
    """A small comparison with its animation: the folder, and what train_toy returned for both."""
    folder = tmp_path_factory.mktemp('toy')
    with pytest.MonkeyPatch.context() as patch:
        use_small_network(patch)
        patch.setattr(toy, 'TRAIN_GLYPHS', 6)
        patch.setattr(toy, 'TEST_IMAGES', 5)
        trained = {}
        train_toy = toy.train_toy
        patch.setattr(toy, 'train_toy', lambda args, learnable, device: trained.setdefault(
            learnable, train_toy(args, learnable, device)))
        call_main(toy, '--data_name', 'glyph', '--compare', '--animate', '--batch_size', 7, '--num_epochs', EPOCHS,
                  '--results_dir', folder)
    return folder, trained


def test_a_toy_writes_statistics_model_embeddings_and_figures(toys):
    names = {path.name for path in toys[0].iterdir()}
    files = {f'{run}_{kind}' for run in (MOVING, LEARNABLE) for kind in ('statistics.csv', 'model.pth',
                                                                         'embeddings.pth')}
    assert names == files | {f'{MOVING}_compared.{suffix}' for suffix in ('png', 'pdf', 'gif')}


@pytest.mark.parametrize('run', [MOVING, LEARNABLE])
def test_a_toy_keeps_its_best_epoch(toys, run):
    table = pd.read_csv(toys[0] / f'{run}_statistics.csv')
    frame = torch.load(toys[0] / f'{run}_embeddings.pth', weights_only=True)
    assert table['epoch'].tolist() == list(range(1, EPOCHS + 1))
    assert frame['epoch'] == table['epoch'][table['dense_R@1'].idxmax()]
    again = retrieval_metrics(frame['test_embeddings'], frame['test_labels'], recalls=(1,))['R@1']
    assert again == pytest.approx(table['dense_R@1'].max(), abs=1e-9)
    contents = torch.load(toys[0] / f'{run}_model.pth', weights_only=True)
    assert contents['epoch'] == frame['epoch']
    assert contents['args']['with_learnable_proxy'] is (run == LEARNABLE)


def test_an_epoch_that_is_no_better_does_not_replace_the_best_one(tmp_path, call_script, monkeypatch):
    use_small_network(monkeypatch)
    monkeypatch.setattr(toy, 'TRAIN_GLYPHS', 2)
    monkeypatch.setattr(toy, 'TEST_IMAGES', 2)
    recalls = iter([90.0, 50.0, 50.0, 30.0])  # the first one is measured before the training
    monkeypatch.setattr(toy, 'retrieval_metrics', lambda *_args, **_kwargs: {'R@1': next(recalls)})
    monkeypatch.setattr(toy, 'draw_toys', lambda toys, target: target)
    call_script(toy, '--data_name', 'glyph', '--batch_size', 7, '--num_epochs', 3, '--results_dir', tmp_path)
    for kind in ('embeddings', 'model'):
        assert torch.load(tmp_path / f'{MOVING}_{kind}.pth', weights_only=True)['epoch'] == 1


def test_toy_embeddings_and_proxies_lie_on_the_circle(toys):
    for trained in toys[1].values():
        for frame in trained['frames']:
            assert frame['proxies'].shape == (7, 2)
            for name in ('train_embeddings', 'test_embeddings', 'proxies'):
                torch.testing.assert_close(frame[name].norm(dim=1), torch.ones(len(frame[name])))


def test_moving_and_learnable_proxies_start_alike_and_then_differ(toys):
    moving, learnable = (toys[1][kind]['frames'] for kind in (False, True))
    torch.testing.assert_close(moving[0]['train_embeddings'], learnable[0]['train_embeddings'], atol=0, rtol=0)
    torch.testing.assert_close(moving[0]['proxies'], learnable[0]['proxies'])
    assert (moving[1]['proxies'] - learnable[1]['proxies']).abs().max() > 0.01


def test_train_and_test_classes_of_a_toy_are_disjoint(toys):
    frame = toys[1][False]['best']
    assert len(frame['train_classes']) == 7
    assert len(frame['test_classes']) == 3
    assert not set(frame['train_classes']) & set(frame['test_classes'])
    assert frame['test_labels'].bincount().tolist() == [5, 5, 5]


def test_the_animation_has_a_picture_before_the_training_and_after_each_epoch(toys):
    with Image.open(toys[0] / f'{MOVING}_compared.gif') as gif:
        assert gif.n_frames == EPOCHS + 1


def test_the_angle_between_class_mean_and_proxy_is_that_of_the_loops():
    rng = torch.Generator().manual_seed(0)
    embeddings = torch.nn.functional.normalize(torch.randn(11, 2, generator=rng, dtype=torch.float64), dim=1)
    proxies = torch.nn.functional.normalize(torch.randn(3, 2, generator=rng, dtype=torch.float64), dim=1)
    labels = torch.arange(11) % 3
    for label, angle in enumerate(toy.angles_to_proxies(embeddings, labels, proxies)):
        x = sum(embeddings[i, 0].item() for i in range(11) if labels[i] == label)
        y = sum(embeddings[i, 1].item() for i in range(11) if labels[i] == label)
        between = abs(math.degrees(math.atan2(y, x) - math.atan2(proxies[label, 1].item(), proxies[label, 0].item())))
        assert angle.item() == pytest.approx(min(between, 360 - between), abs=1e-9)


def test_the_figure_shows_embeddings_proxies_and_names(toys, figures, tmp_path):
    toy.draw_toys({'moving': toys[1][False]}, tmp_path / 'toy.png')
    frame = toys[1][False]['best']
    for axis, subset in zip(figures[0].axes, ('test', 'train'), strict=True):
        shown = np.concatenate([collection.get_offsets() for collection in axis.collections])
        expected = torch.cat([frame[f'{subset}_embeddings'], 1.3 * frame['proxies']]).numpy()
        np.testing.assert_allclose(np.sort(shown, axis=0), np.sort(expected, axis=0), atol=1e-6)
        names = [text.get_text() for text in axis.texts if text.get_text()]
        assert names == frame['train_classes']
    legend = figures[0].axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == frame['test_classes']


def test_a_toy_model_embeds_again(toys, monkeypatch):
    use_small_network(monkeypatch)
    contents = torch.load(toys[0] / f'{MOVING}_model.pth', weights_only=True)
    network = model.EmbeddingNet(model.NetConfig(**contents['config']), 'none')
    network.load_state_dict(contents['state_dict'])
    assert network.eval()(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape == (1, 2)
    with pytest.raises(UserError, match='crop_type'):  # it is no run of train.py
        load_model(toys[0] / f'{MOVING}_model.pth', torch.device('cpu'))


def write_stl10(root, monkeypatch):
    """Write STL10's binary files with 12 images a class, and make torchvision expect their md5."""
    import hashlib

    from torchvision.datasets import STL10

    folder = root / 'stl10_binary'
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(1, 11, dtype=np.uint8), 12)
    names = ('airplane', 'bird', 'car', 'cat', 'deer', 'dog', 'horse', 'monkey', 'ship', 'truck')
    (folder / 'class_names.txt').write_text('\n'.join(names) + '\n')
    (folder / 'fold_indices.txt').write_text('0 1\n' * 10)
    (folder / 'unlabeled_X.bin').write_bytes(b'')
    for split in ('train', 'test'):
        rng.integers(0, 256, (120, 3, 96, 96), dtype=np.uint8).tofile(folder / f'{split}_X.bin')
        labels.tofile(folder / f'{split}_y.bin')
    for files in ('train_list', 'test_list'):
        sums = [[name, hashlib.md5((folder / name).read_bytes()).hexdigest()] for name, _ in getattr(STL10, files)]
        monkeypatch.setattr(STL10, files, sums)
    monkeypatch.setattr(STL10, 'url', (root / 'nothing.tar.gz').as_uri())
    return folder


@pytest.mark.parametrize('words', [['--with_learnable_proxy'], ['--momentum', '0.3', '--temperature', '0.1']])
def test_the_toy_trains_on_stl10(tmp_path, monkeypatch, call_script, words):
    write_stl10(tmp_path / 'stl10', monkeypatch)
    use_small_network(monkeypatch)
    monkeypatch.setattr(toy, 'draw_toys', lambda toys, target: target)
    monkeypatch.setitem(toy.IMAGE_SIZE, 'stl10', 32)
    printed = call_script(toy, *words, '--data_path', tmp_path / 'stl10', '--weights', 'none', '--num_epochs', 1,
                          '--batch_size', 42, '--results_dir', tmp_path)
    run = 'learnable_t0.03' if len(words) == 1 else 'moving_m0.3_t0.1'
    assert printed.endswith(f'toy_stl10_asymptotic_proxy_{run}.png\n')
    frame = torch.load(next(tmp_path.glob('*_embeddings.pth')), weights_only=True)
    assert frame['train_classes'] == ['airplane', 'bird', 'car', 'cat', 'deer', 'dog', 'horse']
    assert frame['test_classes'] == ['monkey', 'ship', 'truck']
    assert frame['test_labels'].bincount().tolist() == [12, 12, 12]


def test_stl10_takes_train_images_from_train_and_at_most_so_many_test_images_from_test(tmp_path, monkeypatch):
    folder = write_stl10(tmp_path, monkeypatch)
    monkeypatch.setattr(toy, 'TEST_IMAGES', 5)
    images, labels, _ = toy.load_stl10(str(tmp_path))
    assert np.bincount(labels).tolist() == [12] * 7 + [5] * 3
    pixels = {split: np.fromfile(folder / f'{split}_X.bin', np.uint8).reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)
              for split in ('train', 'test')}  # the files are in columns
    np.testing.assert_array_equal(np.asarray(images[13]), pixels['train'][13])
    np.testing.assert_array_equal(np.asarray(images[-1]), pixels['test'][9 * 12 + 4])


def test_stl10_that_is_damaged_or_cannot_be_downloaded_is_an_error(tmp_path, monkeypatch, call_script):
    folder = write_stl10(tmp_path, monkeypatch)
    with open(folder / 'test_X.bin', 'r+b') as file:
        file.write(b'\0\0\0\0\0\0\0\0')
    with pytest.raises(UserError, match='--data_name glyph'):
        call_script(toy, '--data_path', tmp_path, '--weights', 'none', '--results_dir', tmp_path)


@pytest.mark.parametrize(('words', 'parts'), [
    (['--with_learnable_proxy', '--momentum', '0.3'], ['--momentum 0.3', 'no effect']),
    (['--with_learnable_proxy', '--compare'], ['--with_learnable_proxy', '--compare']),
    (['--temperature', '0'], ['--temperature 0']), (['--lr', 'nan'], ['--lr nan']),
    (['--num_epochs', '0'], ['--num_epochs 0']), (['--momentum', '2'], ['--momentum 2']),
    (['--batch_size', '0'], ['--batch_size 0']), (['--loss_name', 'positive_proxy'], ['positive_proxy']),
    (['--animations'], ['--animations', "'--animate'"])])
def test_a_flag_that_cannot_be_used_is_an_error(tmp_path, call_script, words, parts):
    with pytest.raises(UserError) as error:
        call_script(toy, '--data_name', 'glyph', '--results_dir', tmp_path, *words)
    assert all(part in str(error.value) for part in parts), error.value


def test_a_toy_whose_loss_is_not_finite_says_so(tmp_path, call_script, monkeypatch):
    use_small_network(monkeypatch)
    monkeypatch.setattr(toy, 'TRAIN_GLYPHS', 2)
    monkeypatch.setattr(toy, 'TEST_IMAGES', 2)
    with pytest.raises(UserError, match=r'the loss is not finite at --lr 1e\+30; lower it'):
        call_script(toy, '--data_name', 'glyph', '--results_dir', tmp_path, '--batch_size', 4, '--lr', 1e30)


def test_a_toy_never_replaces_another_in_silence(toys, call_script):
    with pytest.raises(UserError, match='_statistics.csv exists already; add --overwrite'):
        call_script(toy, '--data_name', 'glyph', '--results_dir', toys[0])


@pytest.mark.parametrize('angles', [[1.0, 1.01, 1.02, 1.0, 1.2], [3.1, -3.1, 3.14], [0.5, 0.5], [2.0]])
def test_names_around_the_circle_are_pushed_apart_in_their_order(angles):
    moved = toy.spread(angles)
    order = sorted(range(len(angles)), key=angles.__getitem__)
    turned = [moved[index] for index in order] + [moved[order[0]] + 2 * math.pi]
    assert all(later - earlier > toy.LABEL_GAP - 1e-6 for earlier, later in zip(turned, turned[1:], strict=False))
    assert max(abs(new - old) for new, old in zip(moved, angles, strict=True)) <= toy.LABEL_GAP * len(angles)


def test_paths_of_the_toy_may_begin_with_a_home_folder(monkeypatch):
    monkeypatch.setenv('HOME', '/home/me')
    args = toy.get_args(['--results_dir', '~/x', '--data_path', '~/y', '--weights', '~/w'])
    assert (args.results_dir, args.data_path, args.weights) == ('/home/me/x', '/home/me/y', '/home/me/w')
