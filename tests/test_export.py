"""An export embeds as the model does, says how it was made, and replaces no file of another program."""
import contextlib
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, call_main
from filelock import FileLock
from museum import DIM, SETTINGS, make_model
from raw_trees import write_image
from torch import nn

import embed
import evaluate
import export
from common.errors import UserError
from common.files import MADE_HERE, save
from imagedata.loading import make_test_loaders, make_transform, open_data
from model import EmbeddingNet, NetConfig
from retrieval.database import load_data_base
from retrieval.embedding import embed_images, make_data_base, measure
from retrieval.model_file import load_model, load_model_file
from retrieval.onnx_file import OnnxNet

onnx = pytest.importorskip('onnx')
for package in ('onnxruntime', 'onnxscript', 'safetensors'):
    pytest.importorskip(package)

CPU = torch.device('cpu')
BACKBONE = 'timm:test_resnet'
TRAINED_SETTINGS = {**SETTINGS, 'recipe': 'proxy_anchor', 'base_loss': 'proxy_anchor', 'proxy_update': 'gradient',
                    'seed': 5, 'weights': 'none', 'val_ratio': 0.0}
MADE_WITH = {'commit': 'c0ffee' * 6, 'changed_since': 'no', 'torch': '2.6', 'torchvision': '0.21', 'device': 'cpu'}


def random_images(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(count))


def make_network() -> EmbeddingNet:
    torch.manual_seed(1)
    return EmbeddingNet(NetConfig(BACKBONE, DIM, image_size=32), 'none').eval()


@pytest.fixture(scope='module')
def run(tmp_path_factory) -> Path:
    """A folder with what a run leaves, without training: birds_run_model.pth, its data base, and its data set birds.

    The first two images of a class have its colour, the others that of no class, so that half of them are found.
    """
    folder = tmp_path_factory.mktemp('run')
    paths = {}
    for label, (name, count) in enumerate({'a': 4, 'b': 3, 'c': 4, 'd': 3, 'e': 4}.items()):
        paths[name] = [f'{name}/{number}.jpg' for number in range(count)]
        for number, path in enumerate(paths[name]):
            write_image(folder / 'birds' / path, label if number < 2 else 5, 10 * label + number)
    save({'train': {name: paths[name] for name in 'ab'}, 'test': {name: paths[name] for name in 'cde'}},
         folder / 'birds' / 'uncropped_data_dicts.pth')
    contents = load_model_file(make_model(folder / 'birds_run_model.pth', flip_tta=True))
    origin = {'args': TRAINED_SETTINGS, 'epoch': 3, 'made_with': MADE_WITH, 'seen_classes': ['a', 'b']}
    save({**contents, **origin}, folder / 'birds_run_model.pth')
    model, _ = load_model(folder / 'birds_run_model.pth')
    transform = make_transform(False, 32, 36, model.interpolation)
    loaders = make_test_loaders(open_data(folder, 'birds'), transform, 4, 0, CPU)
    data_base = make_data_base(model, loaders, CPU, amp=False)
    data_base.origin = origin
    data_base.save(folder / 'birds_run_data_base.pth')
    return folder


@pytest.fixture(scope='module')
def exported(run, tmp_path_factory, worker_id) -> Path:
    """A folder with model.onnx, model_int8.onnx, hub/, and printed.txt, what export.py printed.

    It takes seconds, so all processes of pytest-xdist share it.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == 'master' else base.parent
    folder = shared / 'exported'
    with FileLock(shared / 'exported.lock'):
        if not folder.exists():
            folder.mkdir()
            with (folder / 'printed.txt').open('w') as printed, contextlib.redirect_stdout(printed):
                call_main(export, '--model', run / 'birds_run_model.pth', '--data_path', run, '--num_workers', 0,
                          '--onnx', folder / 'model.onnx', '--int8', '--folder', folder / 'hub')
    return folder


# ---------------------------------------------------- the same embeddings -----------------------------------------
@pytest.mark.parametrize('count', [1, 2, 5])
def test_an_export_embeds_any_number_of_images_as_the_model_does(run, exported, count):
    model, _ = load_model(run / 'birds_run_model.pth')
    networks = OnnxNet((exported / 'model.onnx').read_bytes()), load_model(exported / 'hub')[0]
    with torch.inference_mode():
        expected = model(random_images(count))
        for network in networks:
            torch.testing.assert_close(network(random_images(count)), expected, rtol=0, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize(('backbone', 'pooling'), [('timm:test_efficientnet', 'gem'), ('timm:test_vit', 'cls'),
                                                   ('resnet18', 'avg_max')])
def test_depthwise_convolutions_tokens_and_bgr_are_exported(backbone, pooling):
    torch.manual_seed(0)
    model = EmbeddingNet(NetConfig(backbone, DIM, pooling, image_size=32), 'none').eval()
    model.bgr = backbone == 'resnet18'  # as BN-Inception, in a fifth of its time
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):  # other statistics than those of initialisation
                layer.running_mean.normal_()
                layer.running_var.uniform_(0.5, 2)
        expected = model(random_images(3))
    network = OnnxNet(export.to_onnx(model, {}))
    torch.testing.assert_close(network(random_images(3)), expected, rtol=0, atol=5e-6)


def test_8_bit_integers_are_smaller_and_close(run, exported):
    model, _ = load_model(run / 'birds_run_model.pth')
    file = exported / 'model_int8.onnx'
    assert file.stat().st_size < (exported / 'model.onnx').stat().st_size / 1.5
    assert 'QuantizeLinear' in {node.op_type for node in onnx.load(file).graph.node}
    with torch.inference_mode():
        cosine = (OnnxNet(file.read_bytes())(random_images(9)) * model(random_images(9))).sum(1)
    assert cosine.min() > 0.95


def test_flip_tta_is_part_of_the_export(run, exported):
    model, _ = load_model(run / 'birds_run_model.pth')
    network = OnnxNet((exported / 'model.onnx').read_bytes())
    with torch.inference_mode():
        without_flip = model.embed(random_images(6))
    assert (network(random_images(6)) * without_flip).sum(1).min() < 0.98


def test_the_calibration_images_set_the_ranges_of_8_bit_integers(exported):
    contents = (exported / 'model.onnx').read_bytes()
    ranges = []
    for calibration in (random_images(4), random_images(4) // 8):
        quantised = onnx.load_from_string(export.quantise(contents, calibration, {}, BACKBONE))
        ranges.append(sorted(onnx.numpy_helper.to_array(value).item() for value in quantised.graph.initializer
                             if value.name.endswith('_scale') and not value.dims))
    assert len(ranges[0]) > 10
    assert ranges[0] != ranges[1]


# ---------------------------------------------------- the table ---------------------------------------------------
def test_the_table_compares_recall_and_embeddings(run, exported):
    printed = (exported / 'printed.txt').read_text()
    rows = {cells[0]: cells[1:] for cells in (line.strip('| ').split(' | ') for line in printed.splitlines()
                                             if line.startswith('| '))}
    assert list(rows)[1:] == ['the model', 'model.onnx', 'model_int8.onnx', 'hub']
    metrics = measure(load_data_base(run / 'birds_run_data_base.pth'), (1,), CPU)
    expected = [f'{metrics[kind]["R@1"]:.2f}' for kind in ('dense', 'binary')]
    assert expected[0] not in ('0.00', '100.00')
    assert f'R@1 of birds_run_data_base.pth: {expected[0]}, binary {expected[1]}' in printed
    for name in ('the model', 'model.onnx', 'hub'):
        assert rows[name][:2] == expected, name
        assert float(rows[name][2]) < 2e-6
    assert 1e-5 < float(rows['model_int8.onnx'][2]) < 0.5
    assert '11 test images, float32' in printed


def test_part_of_the_test_images_is_whole_classes():
    split = {'train': {'a': ['1']}, 'query': {'b': ['2', '3'], 'c': ['4'], 'd': ['5']},
             'gallery': {'b': ['6'], 'd': ['7'], 'c': ['8', '9']}, 'class_names': {}}
    assert export.first_classes(split, 3) == {**split, 'query': {'b': ['2', '3'], 'c': ['4']},
                                              'gallery': {'b': ['6'], 'c': ['8', '9']}}
    assert export.first_classes(split, None) == split


@pytest.mark.parametrize(('count', 'expected'), [(0, 'random pixels'), (4, '4 test images')])
def test_fewer_images_are_compared_and_give_the_card_no_numbers(run, tmp_path, call_script, monkeypatch, count,
                                                                expected):
    monkeypatch.setattr(export, 'TIMED_TURNS', 1)
    printed = call_script(export, '--model', run / 'birds_run_model.pth', '--data_path', run, '--num_workers', 0,
                          '--num_images', count, '--folder', tmp_path / 'hub')
    assert printed.startswith(expected)
    assert ('| hub | - | - | 0.0e+00 |' in printed) == (count == 0)
    assert 'Not measured' in (tmp_path / 'hub/README.md').read_text()


def test_calibration_images_are_spread_over_the_training_classes(run, monkeypatch):
    monkeypatch.setattr(export, 'CALIBRATION_IMAGES', 2)
    model, contents = load_model(run / 'birds_run_model.pth')
    args = export.get_args(['--model', 'm', '--folder', 'x', '--data_path', str(run), '--num_workers', '0'])
    images = export.Comparison(model, contents, args).calibration_images()
    dataset = export.RetrievalDataset(open_data(run, 'birds'), 'train', make_transform(False, 32, 36))
    assert torch.equal(images, torch.stack([dataset[0][0], dataset[3][0]]))


# ---------------------------------------------------- contents of the files ---------------------------------------
def test_the_onnx_file_says_how_images_are_prepared_and_names_no_path(exported):
    metadata = {entry.key: entry.value for entry in onnx.load(exported / 'model.onnx').metadata_props}
    assert metadata['images'] == 'uint8 RGB (N, 3, 32, 32), 0 to 255'
    assert metadata['resize_size'] == '36'
    assert metadata['interpolation'] == 'bilinear'
    assert json.loads(metadata['network'])['backbone_type'] == BACKBONE
    for file in (exported / 'model.onnx', exported / 'model_int8.onnx', *(exported / 'hub').iterdir()):
        for path in (exported, REPOSITORY, sys.prefix):
            assert str(path).encode() not in file.read_bytes(), file.name


def test_the_folder_is_read_wherever_a_model_file_is(run, exported, call_script, tmp_path):
    hub = exported / 'hub'
    from_file, from_folder = load_model_file(run / 'birds_run_model.pth'), load_model_file(hub)
    for key in ('config', 'args', 'epoch', 'made_with', 'seen_classes'):
        assert from_folder[key] == from_file[key], key
    printed = [call_script(evaluate, '--model', path, '--data_path', run, '--num_workers', 0)
               for path in (run / 'birds_run_model.pth', hub)]
    assert printed[0] == printed[1] != ''
    assert '18 images, 18 to embed' in call_script(
        embed, '--model', hub, '--images', run / 'birds', '--num_workers', 0, '--data_base', tmp_path / 'c.pth')


def test_the_usage_of_the_card_runs(run, exported, monkeypatch):
    card = (exported / 'hub/README.md').read_text()
    monkeypatch.chdir(exported)
    for name in 'ab':
        shutil.copy(run / 'birds' / name / '0.jpg', f'{name}.jpg')
    variables = {}
    exec(card.split('```python\n')[1].split('```')[0], variables)
    model, contents = load_model(run / 'birds_run_model.pth')
    assert torch.equal(variables['embeddings'], embed_images(model, ['a.jpg', 'b.jpg'], contents))


def test_the_card_has_recipe_results_protocol_and_provenance(run, exported):
    yaml = pytest.importorskip('yaml')
    _, metadata, card = (exported / 'hub/README.md').read_text().split('---\n', 2)
    result = yaml.safe_load(metadata)['model-index'][0]['results'][0]
    assert result['dataset'] == {'name': 'birds', 'type': 'birds'}
    values = {metric['type']: metric['value'] for metric in result['metrics']}
    metrics = measure(load_data_base(run / 'birds_run_data_base.pth'), (1, 2), CPU)
    assert values['dense R@1'] == round(metrics['dense']['R@1'], 2)
    assert values['binary R@2'] == round(metrics['binary']['R@2'], 2)
    for part in (f'`{BACKBONE}`', 'recipe `proxy_anchor`', '11 queries of 3 test classes',
                 'test classes were not trained on', 'chosen on the test classes', 'code c0ffeec0ffee', 'seed 5',
                 'resized to a short\nside of 36 px (bilinear)', '32 x 32 px'):
        assert part in card, part


def test_the_card_of_a_trained_run_can_be_rendered(trained_run):
    file = next(trained_run.glob('*_model.pth'))
    model, contents = load_model(file)
    card = export.render_card(model, contents, load_data_base(str(file).replace('_model', '_data_base')), 'hub')
    assert f'# {contents["args"]["run"]}\n' in card
    assert f'recipe `{contents["args"]["recipe"]}`' in card


@pytest.mark.parametrize(('settings', 'num_seen', 'part'), [
    ({}, 3, '3 of the test classes were TRAINED ON'), ({'val_ratio': 0.2}, 0, 'chosen on held-out training classes'),
    ({'trained_on': 'cub'}, 0, 'chosen on the test classes of cub'), ({}, 0, 'slightly optimistic')])
def test_the_protocol_says_what_the_numbers_are_of(settings, num_seen, part):
    protocol = export.describe_protocol(settings, num_seen)
    assert part in protocol
    assert ('were not trained on' in protocol) == (num_seen == 0)


def test_the_card_of_a_pretrained_backbone_says_nothing_of_training(run):
    model, contents = load_model(run / 'birds_run_model.pth')
    contents['args'] = {**SETTINGS, 'pretrained': True, 'weights': 'imagenet', 'resize_size': 0}
    card = export.render_card(model, contents, load_data_base(run / 'birds_run_data_base.pth'), 'hub')
    assert 'features of its weights `imagenet`' in card
    assert 'without keeping their proportions' in card
    for word in ('recipe `', 'epoch was chosen'):
        assert word not in card, word


def test_a_damaged_folder_is_refused_in_one_line(exported, tmp_path):
    hub = shutil.copytree(exported / 'hub', tmp_path / 'hub')
    (hub / 'model.safetensors').write_bytes((hub / 'model.safetensors').read_bytes()[:-9])
    with pytest.raises(UserError, match=re.escape(str(hub))):
        load_model_file(hub)
    (hub / 'config.json').write_text('{"config": {}}')
    with pytest.raises(UserError, match=re.escape(str(hub))):
        load_model_file(hub)


# ---------------------------------------------------- refusals ----------------------------------------------------
class Branching(nn.Module):
    """A backbone whose control flow depends on its values, which no exporter can follow."""

    def forward(self, features):
        return features if features.mean() > 0 else -features


def test_a_backbone_that_cannot_be_exported_is_named_in_one_line():
    model = make_network()
    model.backbone.network = nn.Sequential(model.backbone.network)
    model.backbone.network.forward_features = Branching()
    with pytest.raises(UserError, match=f'--onnx: {BACKBONE} cannot be exported.*--folder may still work') as error:
        export.to_onnx(model, {})
    assert '\n' not in str(error.value)


def test_an_export_that_differs_is_refused():
    expected = nn.functional.normalize(random_images(5).float().flatten(1), dim=1)
    export.check_equal(lambda batch: expected[:len(batch)] + 1e-6, random_images(5), expected, '--onnx')
    for factor in (1.5, torch.nan):
        with pytest.raises(UserError, match='--onnx: the embeddings of the exported model differ'):
            export.check_equal(lambda batch, factor=factor: expected[:len(batch)] * factor, random_images(5), expected,
                               '--onnx')
    with pytest.raises(UserError, match='differ'):  # a model that is right for batches only
        export.check_equal(lambda batch: expected[:len(batch)] * (1 if len(batch) > 1 else 2), random_images(5),
                           expected, '--onnx')


def test_an_export_that_differs_is_not_written(run, tmp_path, monkeypatch):
    other = make_network()
    monkeypatch.setattr(export, 'to_onnx', lambda *_: b'')
    monkeypatch.setattr(export, 'OnnxNet', lambda *_: other)
    with pytest.raises(UserError, match='nothing is written'):
        call_main(export, '--model', run / 'birds_run_model.pth', '--num_images', 0, '--onnx', tmp_path / 'm.onnx')
    assert list(tmp_path.iterdir()) == []


def test_files_of_other_programs_are_not_replaced_and_earlier_exports_are(run, exported, tmp_path):
    (tmp_path / 'hub').mkdir()
    (tmp_path / 'hub/README.md').write_text('mine')
    for flag, target in (('--folder', tmp_path / 'hub'), ('--onnx', run / 'birds_run_model.pth')):
        with pytest.raises(UserError, match=f'{flag} .*not replaced'):
            export.get_args(['--model', 'm', flag, str(target)])
    for target in ('model.onnx', 'model_int8.onnx', *(f'hub/{name}' for name in export.FOLDER_FILES)):
        assert MADE_HERE.encode() in (exported / target).read_bytes(), target


@pytest.mark.parametrize(('words', 'message'), [
    ((), 'nothing to export'), (('--int8', '--folder', 'x'), '--int8 needs --onnx'),
    (('--onnx', 'x/README.md', '--folder', 'x'), 'name the same file'),
    (('--onnx', 'x', '--num_images', '-1'), '--num_images -1'),
    (('--onnx', 'x', '--int8', '--num_images', '0'), '--int8 needs --onnx FILE, and training images')])
def test_a_mistaken_command_line_is_refused(words, message):
    with pytest.raises(UserError, match=message):
        export.get_args(['--model', 'm', *words])


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setattr(export.importlib.util, 'find_spec', lambda name: None if name == 'onnxruntime' else name)
    with pytest.raises(UserError, match='--onnx needs onnxruntime; install .* -r requirements-export.txt'):
        export.get_args(['--model', 'm', '--onnx', 'x.onnx'])
