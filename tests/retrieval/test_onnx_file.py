"""An ONNX file of export.py embeds and searches in place of the model that it was exported from, and of no other."""
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import call_main
from museum import DIM, SETTINGS, make_items, make_model, write_photos

import embed
import evaluate
import export
from common.errors import UserError
from common.files import save
from common.results import RunFiles, find_result
from retrieval.collection import FileCollection
from retrieval.database import DataBase, Subset, load_data_base
from retrieval.embedding import embed_images
from retrieval.model_file import load_model, load_model_file, model_fingerprint
from retrieval.onnx_file import OnnxNet
from retrieval.searcher import open_qdrant_searcher, open_searcher

onnx = pytest.importorskip('onnx')
for package in ('onnxruntime', 'onnxscript'):
    pytest.importorskip(package)

CPU, CUDA = torch.device('cpu'), torch.device('cuda')


def to_file(file: Path, *, int8: bool = False, **changes) -> Path:
    """Export model.pth beside a file to it, with some of its contents changed."""
    model, run = load_model(file.with_name('model.pth'))
    run = {**run, **changes}
    contents = export.to_onnx(model, export.describe_interface(model, run))
    if int8:
        images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
        run['args'] = {**run['args'], 'precision': 'int8'}
        contents = export.quantise(contents, images, export.describe_interface(model, run), 'test_resnet')
    file.write_bytes(contents)
    return file


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    """A folder with model.pth, model.onnx, int8.onnx, and photos of two classes in old/ and new/."""
    folder = tmp_path_factory.mktemp('onnx')
    make_model(folder / 'model.pth')
    to_file(folder / 'model.onnx')
    to_file(folder / 'int8.onnx', int8=True)
    write_photos(folder / 'old', {'ara': 4, 'zebra': 3})
    write_photos(folder / 'new', {'fox': 2, 'owl': 3})
    return folder


def add(folder: Path, data_base: Path, images: str, model: str | None) -> None:
    """Embed a folder of images into a data base."""
    words = [] if model is None else ['--model', folder / model]
    call_main(embed, '--data_base', data_base, '--images', folder / images, '--num_workers', 0, '--device', 'cpu',
              *words)


@pytest.fixture(scope='module')
def expected(folder, tmp_path_factory) -> DataBase:
    """All photos, embedded by PyTorch."""
    file = tmp_path_factory.mktemp('expected') / 'c.pth'
    add(folder, file, 'old', 'model.pth')
    add(folder, file, 'new', None)
    return load_data_base(file)


def search_with(searcher) -> tuple[list[int], torch.Tensor]:
    """Return the indices and similarities of the neighbours of an upload."""
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    (neighbours,) = searcher.collection.search(searcher.embed([image]), 5, False)
    indices, similarities = zip(*neighbours, strict=True)
    return list(indices), torch.tensor(similarities)


# ---------------------------------------------------- the same model ----------------------------------------------
def test_the_file_says_of_its_model_what_the_model_file_says(folder):
    (model, run), (network, contents) = load_model(folder / 'model.pth'), load_model(folder / 'model.onnx')
    assert isinstance(network, OnnxNet)
    assert model_fingerprint(contents) == model_fingerprint(run)
    for key in ('config', 'args', 'epoch', 'seen_classes'):
        assert contents[key] == run[key], key
    assert (network.config, network.feature_dim, network.interpolation) == (model.config, DIM, model.interpolation)


def test_photographs_are_embedded_as_the_model_embeds_them(folder):
    files = sorted((folder / 'old').rglob('*.jpg'))
    with_model, with_file = (embed_images(*load_model(folder / name)[:1], files, load_model_file(folder / name))
                             for name in ('model.pth', 'model.onnx'))
    torch.testing.assert_close(with_file, with_model, rtol=0, atol=2e-6)


@pytest.mark.parametrize(('first', 'second'), [('model.pth', 'model.onnx'), ('model.onnx', 'model.pth'),
                                               ('model.onnx', None)])
def test_a_collection_is_extended_by_either(folder, expected, tmp_path, first, second):
    add(folder, tmp_path / 'c.pth', 'old', first)
    add(folder, tmp_path / 'c.pth', 'new', second)
    data_base = load_data_base(tmp_path / 'c.pth')
    assert data_base.sources.fingerprint == expected.sources.fingerprint
    assert (data_base.test.images, data_base.origin) == (expected.test.images, expected.origin)
    torch.testing.assert_close(data_base.test.features, expected.test.features, rtol=0, atol=2e-6)
    assert (tmp_path / 'c_model.onnx').read_bytes() == (folder / 'model.onnx').read_bytes()
    assert (tmp_path / 'c_model.pth').exists() == ('model.pth' in (first, second))


@pytest.mark.parametrize(('embedded_by', 'searched_with'), [('model.pth', 'model.onnx'), ('model.onnx', 'model.pth')])
def test_a_collection_is_searched_with_either(folder, tmp_path, embedded_by, searched_with):
    answers = []
    add(folder, tmp_path / 'c.pth', 'old', embedded_by)
    for name in (embedded_by, searched_with):
        for kept in tmp_path.glob('c_model.*'):
            kept.unlink()
        shutil.copy(folder / name, tmp_path / f'c_model{Path(name).suffix}')
        searcher = open_searcher('c.pth', str(tmp_path), '/nowhere', CPU)
        assert isinstance(searcher.model, OnnxNet) == name.endswith('.onnx')
        answers.append(search_with(searcher))
    assert answers[0][0] == answers[1][0]
    torch.testing.assert_close(answers[0][1], answers[1][1], rtol=0, atol=5e-6)


@pytest.mark.parametrize(('first', 'second'), [('model.pth', 'model.onnx'), ('model.onnx', 'model.pth')])
def test_a_qdrant_collection_is_extended_and_searched_with_either(folder, tmp_path, first, second):
    pytest.importorskip('qdrant_client')
    for images, model in (('old', first), ('new', second)):
        call_main(embed, '--qdrant', tmp_path / 'q', '--collection', 'c', '--images', folder / images, '--num_workers',
                  0, '--device', 'cpu', '--model', folder / model)
    answers = []
    for name in (first, second):
        searcher = open_qdrant_searcher(str(tmp_path / 'q'), 'c', str(folder / name), CPU)
        answers.append(search_with(searcher))
        searcher.collection.close()
    assert answers[0][0] == answers[1][0]
    with pytest.raises(UserError, match='holds embeddings of another model'):
        open_qdrant_searcher(str(tmp_path / 'q'), 'c', str(folder / 'int8.onnx'), CPU)


def test_a_gpu_takes_the_pytorch_model_where_both_lie_beside_the_data_base(tmp_path):
    files = RunFiles.beside(tmp_path / 'c.pth')
    files.onnx.touch()
    assert files.model_for(CUDA) == files.model_for(CPU) == tmp_path / 'c_model.onnx'
    files.model.touch()
    assert (files.model_for(CUDA), files.model_for(CPU)) == (tmp_path / 'c_model.pth', tmp_path / 'c_model.onnx')


# ---------------------------------------------------- 8-bit integers ----------------------------------------------
def test_8_bit_integers_are_a_model_of_their_own(folder, tmp_path):
    add(folder, tmp_path / 'small.pth', 'old', 'int8.onnx')
    add(folder, tmp_path / 'small.pth', 'new', None)
    data_base = load_data_base(tmp_path / 'small.pth')
    assert len(data_base.test.images) == 12
    assert data_base.sources.fingerprint == load_model_file(folder / 'int8.onnx')['fingerprint']
    searcher = open_searcher('small.pth', str(tmp_path), '/nowhere', CPU)
    assert len(search_with(searcher)[0]) == 5
    for other in ('model.pth', 'model.onnx'):
        with pytest.raises(UserError, match='holds embeddings of another model'):
            add(folder, tmp_path / 'small.pth', 'old', other)
    add(folder, tmp_path / 'c.pth', 'old', 'model.pth')
    with pytest.raises(UserError, match='holds embeddings of another model'):
        add(folder, tmp_path / 'c.pth', 'new', 'int8.onnx')
    assert not (tmp_path / 'c_model.onnx').exists()
    shutil.copy(folder / 'int8.onnx', tmp_path / 'c_model.onnx')
    with pytest.raises(UserError, match='c_model.onnx belongs to another run'):
        open_searcher('c.pth', str(tmp_path), '/nowhere', CPU)
    with pytest.raises(UserError, match='c_model.onnx is not the model that embeds'):
        add(folder, tmp_path / 'c.pth', 'new', None)


def test_two_calibrations_are_two_models(folder, tmp_path):
    shutil.copy(folder / 'model.pth', tmp_path)
    assert (load_model_file(to_file(tmp_path / 'm.onnx', int8=True))['fingerprint']
            != load_model_file(folder / 'int8.onnx')['fingerprint'])


# ---------------------------------------------------- the data base of a run --------------------------------------
@pytest.mark.parametrize(('name', 'epoch', 'is_its_own'), [('model.onnx', 3, True), ('int8.onnx', 3, False),
                                                           ('model.onnx', 4, False)])
def test_the_data_base_of_a_run_is_searched_with_its_export_alone(folder, tmp_path, name, epoch, is_its_own):
    (tmp_path / 'data/birds').mkdir(parents=True)
    (tmp_path / 'data/birds/uncropped_data_dicts.pth').touch()
    items, features = make_items(5)
    data_base = DataBase(['a'], Subset([item.path for item in items], torch.zeros(5, dtype=torch.int64), features))
    data_base.origin = {'args': SETTINGS, 'epoch': epoch, 'seen_classes': ['trained']}
    data_base.save(tmp_path / 'r_data_base.pth')
    shutil.copy(folder / name, tmp_path / 'r_model.onnx')
    words = 'r_data_base.pth', str(tmp_path), str(tmp_path / 'data'), CPU
    if is_its_own:
        assert isinstance(open_searcher(*words).model, OnnxNet)
    else:
        with pytest.raises(UserError, match='r_model.onnx belongs to another run'):
            open_searcher(*words)


def test_what_a_trained_run_says_of_itself_survives_the_export(trained_run, tmp_path):
    run = load_model_file(next(trained_run.glob('*_model.pth')))
    origin = load_data_base(next(trained_run.glob('*_data_base.pth'))).origin
    shutil.copy(next(trained_run.glob('*_model.pth')), tmp_path / 'model.pth')
    model, _ = load_model(tmp_path / 'model.pth')
    metadata = export.describe_interface(model, run)
    assert json.loads(metadata['origin']) == json.loads(json.dumps(origin))


# ---------------------------------------------------- refusals ----------------------------------------------------
def test_another_model_is_refused(folder, tmp_path):
    make_model(tmp_path / 'model.pth', seed=1)
    to_file(tmp_path / 'model.onnx')
    add(folder, tmp_path / 'c.pth', 'old', 'model.pth')
    with pytest.raises(UserError, match='holds embeddings of another model'):
        add(tmp_path, tmp_path / 'c.pth', 'model.onnx', 'model.onnx')
    shutil.copy(tmp_path / 'model.onnx', tmp_path / 'c_model.onnx')
    with pytest.raises(UserError, match='c_model.onnx belongs to another run'):
        open_searcher('c.pth', str(tmp_path), '/nowhere', CPU)


def refused(file: Path, device: torch.device = CPU) -> str:
    """Return the line by which a model file is refused."""
    with pytest.raises(UserError, match=re.escape(str(file))) as error:
        load_model(file, device)
    assert '\n' not in str(error.value)
    return str(error.value)


def test_a_gpu_is_refused_before_anything_is_written(folder, tmp_path, monkeypatch):
    assert '--device cuda: ' in refused(folder / 'model.onnx', CUDA)
    monkeypatch.setattr(embed, 'select_device', lambda name: CUDA)
    with pytest.raises(UserError, match='model.onnx is an ONNX file, which runs on the CPU; add --device cpu'):
        add(folder, tmp_path / 'c.pth', 'old', 'model.onnx')
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    assert 'needs onnxruntime; install it with: pip install onnxruntime' in refused(folder / 'model.onnx')


def test_a_file_of_another_program_is_refused(folder, tmp_path):
    foreign = onnx.load(folder / 'model.onnx')
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / 'foreign.onnx')
    assert 'its metadata lack fingerprint, network, origin, interpolation' in refused(tmp_path / 'foreign.onnx')
    (tmp_path / 'foreign.onnx').write_bytes((folder / 'model.onnx').read_bytes()[:1000])
    assert 'cannot be read as an ONNX file' in refused(tmp_path / 'foreign.onnx')
    assert 'there is no model' in refused(tmp_path / 'none.onnx')


@pytest.mark.parametrize(('key', 'value', 'part'), [
    ('network', '{"backbone_type": "resnet18", "feature_dim": 9, "image_size": 32}', 'its graph maps'),
    ('network', '[]', 'does not fit its own description'), ('network', '{', 'does not fit its own description'),
    ('origin', '[' * 10**5, 'does not fit its own description'), ('origin', '{}', 'lacks args'),
    ('origin', '{"args": {}}', 'lacks data_name'), ('interpolation', 'cubic', 'interpolation cannot be used')])
def test_metadata_that_do_not_fit_are_refused(folder, tmp_path, key, value, part):
    changed = onnx.load(folder / 'model.onnx')
    metadata = {entry.key: entry.value for entry in changed.metadata_props}
    onnx.helper.set_model_props(changed, {**metadata, key: value})
    onnx.save(changed, tmp_path / 'm.onnx')
    assert part in refused(tmp_path / 'm.onnx')


def test_weights_that_were_changed_under_the_same_metadata_are_refused(folder, tmp_path):
    changed = onnx.load(folder / 'model.onnx')
    (head,) = [tensor for tensor in changed.graph.initializer if tensor.name == 'head.weight']
    weights = onnx.numpy_helper.to_array(head)
    head.CopyFrom(onnx.numpy_helper.from_array(weights[::-1].copy(), head.name))
    onnx.save(changed, tmp_path / 'm.onnx')
    assert 'does not embed as the model that it names' in refused(tmp_path / 'm.onnx')
    head.CopyFrom(onnx.numpy_helper.from_array(weights * float('nan'), head.name))
    onnx.save(changed, tmp_path / 'm.onnx')
    assert 'differs by nan' in refused(tmp_path / 'm.onnx')


def test_scripts_that_need_weights_refuse_an_onnx_file(folder):
    for script, words in ((evaluate, []), (export, ['--folder', folder / 'hub', '--num_images', 0])):
        with pytest.raises(UserError, match='--model .*model.onnx is an ONNX file, which embed.py and serve.py read'):
            call_main(script, '--model', folder / 'model.onnx', *words)
    with pytest.raises(UserError, match='--init m.onnx is an ONNX file'):
        find_result('--init', 'model.pth', 'm.onnx', 'results')


def test_a_refit_asks_to_move_the_onnx_file_away(folder, tmp_path):
    contents = load_model_file(folder / 'model.pth')
    contents['args'] = {**contents['args'], 'pretrained': True}
    save(contents, tmp_path / 'c_model.pth')
    items, features = make_items(5)
    collection = FileCollection(tmp_path / 'c.pth', {'args': contents['args']}, model_fingerprint(contents))
    collection.add(items, features)
    collection.finish()
    shutil.copy(folder / 'model.onnx', tmp_path / 'c_model.onnx')
    with pytest.raises(UserError, match='--refit makes another model than .*c_model.onnx'):
        call_main(embed, '--data_base', tmp_path / 'c.pth', '--refit')
