"""What is exported embeds as the model does, says how it was made, and takes nobody's files."""
import json
import re
import sys

import pytest
import torch
from conftest import REPOSITORY, assert_one_line_error, type_command
from faults import BACKBONE
from torch import nn

import export
from common.errors import UserError
from export import CPU, OnnxNetwork, TorchNetwork, check_equal, first_classes, get_args, quantise, to_onnx, trace
from model import EmbeddingNet, NetConfig
from retrieval.database import load_data_base
from retrieval.embedding import embed_images, measure
from retrieval.model_file import load_model, load_model_file

onnx = pytest.importorskip('onnx')
for name in ('onnxruntime', 'onnxscript', 'safetensors'):
    pytest.importorskip(name)
NAME = 'car_timm-test_resnet_balanced_proxy_16'


def images(number: int, size: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (number, 3, size, size), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(number))


@pytest.fixture(scope='module')
def exported(run, raw_sets, tmp_path_factory):
    """A folder with everything that can be exported, and what was printed."""
    folder = tmp_path_factory.mktemp('exported')
    result = type_command('export.py', '--model', run / f'{NAME}_model.pth', '--data_path', raw_sets, '--num_workers',
                          0, '--onnx', folder / 'model.onnx', '--int8', '--torch', folder / 'model.pt2',
                          '--folder', folder / 'hub')
    assert result.returncode == 0, result.stderr
    assert result.stderr == ''
    return folder, result.stdout


def networks(folder) -> dict:
    return {'model.onnx': OnnxNetwork((folder / 'model.onnx').read_bytes(), 16),
            'model.pt2': TorchNetwork((folder / 'model.pt2').read_bytes(), 16),
            'hub': load_model(folder / 'hub', CPU)[0]}


# ---------------------------------------------------- the same embeddings -------------------------------------------
@pytest.mark.parametrize('number', [1, 2, 5])
def test_what_is_exported_embeds_any_number_of_images_as_the_model_does(run, exported, number):
    model, _ = load_model(run / f'{NAME}_model.pth', CPU)
    with torch.inference_mode():
        expected = model(images(number))
        for name, network in networks(exported[0]).items():
            torch.testing.assert_close(network(images(number)), expected, rtol=0, atol=2e-6, msg=name)


@pytest.mark.parametrize(('name', 'pooling'), [('timm:test_efficientnet', 'gem'), ('timm:test_vit', 'cls'),
                                               ('resnet18', 'avg_max')])
def test_depthwise_convolutions_tokens_and_bgr_come_through(name, pooling):
    torch.manual_seed(0)
    model = EmbeddingNet(NetConfig(name, 7, pooling, image_size=32), 'none').eval()
    model.bgr = name == 'resnet18'  # as BN-Inception, in a fifth of its time
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):  # statistics that are not those of the start
                layer.running_mean.normal_(), layer.running_var.uniform_(0.5, 2)
        expected = model(images(3))
    program = trace(model)
    found = OnnxNetwork(to_onnx(program, {}, name), 7)(images(3))
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images(3)), expected, rtol=0, atol=2e-6)


def test_8_bit_integers_are_a_third_of_the_size_and_near(run, exported):
    model, _ = load_model(run / f'{NAME}_model.pth', CPU)
    file = exported[0] / 'model_int8.onnx'
    assert file.stat().st_size < (exported[0] / 'model.onnx').stat().st_size / 2.5
    kinds = {node.op_type for node in onnx.load(file).graph.node}
    assert 'QuantizeLinear' in kinds
    with torch.inference_mode():
        cosine = (OnnxNetwork(file.read_bytes(), 16)(images(9)) * model(images(9))).sum(1)
    assert cosine.min() > 0.95


def test_the_ranges_of_8_bit_integers_are_those_of_the_calibration_images():
    torch.manual_seed(0)
    whole = to_onnx(trace(EmbeddingNet(NetConfig(BACKBONE, 7, image_size=32), 'none')), {}, BACKBONE)
    ranges = [sorted(onnx.numpy_helper.to_array(value).item() for value in onnx.load_from_string(
        quantise(whole, batch, {}, BACKBONE)).graph.initializer if value.name.endswith('_scale') and not value.dims)
        for batch in (images(4), images(4) // 8)]
    assert len(ranges[0]) > 10
    assert ranges[0] != ranges[1]


def test_the_mirror_image_comes_through_in_floats_and_in_8_bit_integers():
    torch.manual_seed(0)
    model = EmbeddingNet(NetConfig(BACKBONE, 7, image_size=32, mirror=True), 'none').eval()
    with torch.no_grad():
        expected, alone = model(images(6)), model.embed(images(6))
    assert (expected * alone).sum(1).min() < 0.98
    whole = to_onnx(trace(model), {}, BACKBONE)
    torch.testing.assert_close(OnnxNetwork(whole, 7)(images(6)), expected, rtol=0, atol=5e-6)
    small = OnnxNetwork(quantise(whole, images(6), {}, BACKBONE), 7)
    assert (small(images(6)) * expected).sum(1).min() > 0.99


# ---------------------------------------------------- the table -----------------------------------------------------
def test_the_table_has_recall_before_and_after(run, exported, raw_sets):
    rows = {cells[0]: cells[1:] for cells in (line.strip('| ').split(' | ') for line in exported[1].splitlines()
                                             if line.startswith('| '))}
    assert list(rows)[1:] == ['the model', 'model.onnx', 'model_int8.onnx', 'model.pt2', 'hub']
    found = json.loads(type_command('evaluate.py', '--json', '--data_base', run / f'{NAME}_data_base.pth').stdout)
    expected = [f'{found[kind]["R@1"]:.2f}' for kind in ('dense', 'binary')]
    assert f'R@1 of {NAME}_data_base.pth: {expected[0]}, binary {expected[1]}' in exported[1]
    for name in ('the model', 'model.onnx', 'model.pt2', 'hub'):
        assert rows[name][:2] == expected, name
        assert float(rows[name][2]) < 2e-6
    assert 1e-5 < float(rows['model_int8.onnx'][2]) < 0.3


def test_a_part_of_the_test_images_is_whole_classes():
    split = {'train': {'a': ['1']}, 'query': {'b': ['2', '3'], 'c': ['4'], 'd': ['5']},
             'gallery': {'b': ['6'], 'd': ['7'], 'c': ['8', '9']}, 'class_names': {}}
    assert first_classes(split, 3) == {**split, 'query': {'b': ['2', '3'], 'c': ['4']},
                                       'gallery': {'b': ['6'], 'c': ['8', '9']}}
    assert first_classes(split, None) == split


def test_without_a_data_set_random_pixels_are_compared(run, tmp_path):
    result = type_command('export.py', '--model', run / f'{NAME}_model.pth', '--num_images', 0, '--torch',
                          tmp_path / 'm.pt2', '--folder', tmp_path / 'hub')
    assert result.returncode == 0, result.stderr
    assert 'random pixels' in result.stdout
    assert '| m.pt2 | - | - | ' in result.stdout
    assert 'Not measured' in (tmp_path / 'hub/README.md').read_text()


def test_a_part_of_the_test_images_makes_no_numbers_for_the_card(run, raw_sets, tmp_path):
    result = type_command('export.py', '--model', run / f'{NAME}_model.pth', '--data_path', raw_sets, '--num_images', 8,
                          '--folder', tmp_path / 'hub')
    assert result.returncode == 0, result.stderr
    assert '8 test images' in result.stdout
    assert 'Not measured' in (tmp_path / 'hub/README.md').read_text()


# ---------------------------------------------------- what the files say --------------------------------------------
def test_the_onnx_file_says_how_images_are_made_and_names_no_place(exported):
    model = onnx.load(exported[0] / 'model.onnx')
    told = {entry.key: entry.value for entry in model.metadata_props}
    assert told['images'] == 'uint8 RGB (N, 3, 32, 32), 0 to 255'
    assert told['resize_size'] == '36'
    assert json.loads(told['network'])['backbone_type'] == BACKBONE
    for file in exported[0].rglob('*.*'):
        for place in (exported[0], REPOSITORY, sys.prefix):
            assert str(place).encode() not in file.read_bytes(), file.name


def test_the_folder_is_read_as_a_model_is(run, exported, raw_sets):
    first, second = (load_model_file(path) for path in (run / f'{NAME}_model.pth', exported[0] / 'hub'))
    assert second['config'] == first['config']
    assert second['args']['recipe'] == first['args']['recipe']
    assert second['seen_classes'] == first['seen_classes']
    printed = [type_command('evaluate.py', '--resume', path, '--data_path', raw_sets, '--num_workers', 0).stdout
               for path in (run / f'{NAME}_model.pth', exported[0] / 'hub')]
    assert printed[0] == printed[1] != ''


def test_the_lines_of_the_card_run_and_embed_py_takes_the_folder(run, exported, raw_sets, tmp_path, monkeypatch):
    card = (exported[0] / 'hub/README.md').read_text()
    monkeypatch.chdir(exported[0])
    for name, image in zip('ab', sorted((raw_sets / 'car/uncropped').iterdir()), strict=False):
        for folder in (tmp_path / 'new', exported[0]):
            folder.mkdir(exist_ok=True)
            (folder / f'{name}.jpg').write_bytes(image.read_bytes())
    left = {}
    exec(card.split('```python\n')[1].split('```')[0], left)
    model, contents = load_model(run / f'{NAME}_model.pth', CPU)
    assert torch.equal(left['embeddings'], embed_images(model, ['a.jpg', 'b.jpg'], contents))
    for place in (('--data_base', tmp_path / 'new.pth'), ('--qdrant', tmp_path / 'qdrant', '--collection', 'new')):
        result = type_command(REPOSITORY / 'embed.py', '--model', 'hub', '--images', tmp_path / 'new', '--num_workers',
                              0, *place, cwd=exported[0])
        assert result.returncode == 0, result.stderr
        assert '2 images of 1 folders' in result.stdout
    torch.testing.assert_close(load_data_base(tmp_path / 'new.pth').test.features, left['embeddings'])


def test_the_card_has_recipe_results_protocol_and_provenance(run, exported):
    yaml = pytest.importorskip('yaml')
    _, front, card = (exported[0] / 'hub/README.md').read_text().split('---\n', 2)
    result = yaml.safe_load(front)['model-index'][0]['results'][0]
    model, contents = load_model(run / f'{NAME}_model.pth', CPU)
    metrics = {metric['type']: metric['value'] for metric in result['metrics']}
    found = measure(load_data_base(run / f'{NAME}_data_base.pth'), (1, 2), CPU)
    assert metrics['dense R@1'] == round(found['dense']['R@1'], 2)
    assert metrics['binary R@2'] == round(found['binary']['R@2'], 2)
    for part in (f'`{BACKBONE}`', 'recipe `balanced_proxy`', '12 queries of 3 test classes', 'not trained on',
                 'chosen on the test classes', f'code {contents["made_with"]["commit"][:12]}', 'seed 0'):
        assert part in card, part


def test_a_folder_that_is_damaged_ends_in_one_line(exported, tmp_path):
    for file in ('config.json', 'model.safetensors', 'README.md'):
        (tmp_path / file).write_bytes((exported[0] / 'hub' / file).read_bytes())
    (tmp_path / 'model.safetensors').write_bytes((exported[0] / 'hub/model.safetensors').read_bytes()[:-9])
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        load_model_file(tmp_path)
    (tmp_path / 'config.json').write_text('{"config": {}}')
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        load_model_file(tmp_path)


# ---------------------------------------------------- refusals ------------------------------------------------------
class Branching(nn.Module):
    """A trunk whose way depends on its numbers, which no exporter can follow."""

    def forward(self, features):
        return features if features.mean() > 0 else -features


def test_a_trunk_that_cannot_be_exported_is_named_in_one_line():
    model = EmbeddingNet(NetConfig(BACKBONE, 7, image_size=32), 'none')
    model.trunk.network = nn.Sequential(model.trunk.network)
    model.trunk.network.forward_features = Branching()
    with pytest.raises(UserError, match=f'{BACKBONE} cannot be exported') as error:
        trace(model)
    assert '\n' not in str(error.value)


def test_an_export_that_differs_is_not_written():
    expected = nn.functional.normalize(images(5).float().flatten(1), dim=1)
    check_equal(lambda batch: expected[:len(batch)] + 1e-6, images(5), expected, '--onnx')
    for wrong in (lambda batch: expected[:len(batch)] * 1.5, lambda batch: expected[:len(batch)] * torch.nan):
        with pytest.raises(UserError, match='--onnx: the exported model differs'):
            check_equal(wrong, images(5), expected, '--onnx')


def test_files_of_others_are_not_replaced_and_own_ones_are(run, raw_sets, exported, tmp_path):
    (tmp_path / 'hub').mkdir()
    (tmp_path / 'hub/README.md').write_text('mine')
    words = ('export.py', '--model', run / f'{NAME}_model.pth', '--num_images', 0)
    for target in (('--folder', tmp_path / 'hub'), ('--torch', run / f'{NAME}_model.pth')):
        assert_one_line_error(type_command(*words, *target), target[0], 'not replaced')
    assert (tmp_path / 'hub/README.md').read_text() == 'mine'
    for target in ('model.onnx', 'model_int8.onnx', 'model.pt2', *(f'hub/{name}' for name in export.FOLDER_FILES)):
        assert export.check_replaceable(exported[0] / target)


@pytest.mark.parametrize(('words', 'part'), [
    ((), 'nothing to export'), (('--int8', '--torch', 'x.pt2'), '--int8 needs --onnx'),
    (('--onnx', 'x', '--torch', 'x'), 'one file twice'), (('--onnx', 'x', '--num_images', '-1'), '--num_images -1'),
    (('--onnx', 'x', '--int8', '--num_images', '0'), '--int8 needs --onnx FILE, and training images')])
def test_a_mistaken_command_line_is_refused(words, part):
    with pytest.raises(UserError, match=part):
        get_args(['--model', 'm', *words])


def test_a_missing_package_is_one_line_that_says_what_to_install(monkeypatch):
    monkeypatch.setattr(export.importlib.util, 'find_spec', lambda name: None if name == 'onnxruntime' else name)
    with pytest.raises(UserError, match='--onnx needs onnxruntime; install .* -r requirements-export.txt'):
        get_args(['--model', 'm', '--onnx', 'x.onnx'])
