"""Names and places of what the scripts write."""
import unicodedata
from pathlib import Path

import pytest

from common.errors import UserError
from common.results import RunFiles, find_result, run_name


def test_a_run_name_joins_its_parts_and_keeps_letters_of_any_script():
    assert run_name('Köln Fotos', '', 'resnet18', 512) == 'köln-fotos_resnet18_512'
    assert run_name(unicodedata.normalize('NFD', 'Köln'), 'Птицы/2') == 'köln_птицы-2'
    assert run_name('timm:vit.dino', 'My Run!') == 'timm-vit.dino_my-run-'


def test_the_files_of_a_run_have_its_name_and_lie_in_one_folder():
    files = RunFiles(Path('r'), 'x')
    assert {file.name for file in files.all()} == {
        'x_statistics.csv', 'x_model.pth', 'x_data_base.pth', 'x_checkpoint.pth', 'x_curves.png', 'x_curves.pdf',
        'x_log.json'}
    assert {file.parent for file in files.all()} == {Path('r')}


@pytest.mark.parametrize(('data_base', 'model'), [('r/x_data_base.pth', 'r/x_model.pth'), ('museum.pth',
                                                                                           'museum_model.pth')])
def test_the_model_lies_beside_its_data_base(data_base, model):
    assert RunFiles.beside(Path(data_base)).model == Path(model)


def test_a_file_is_named_by_its_path_or_by_its_name_in_the_results_folder(tmp_path):
    (tmp_path / 'x_model.pth').touch()
    assert find_result('--model', 'model.pth', str(tmp_path / 'x_model.pth'), 'nowhere') == tmp_path / 'x_model.pth'
    assert find_result('--model', 'model.pth', 'x_model.pth', str(tmp_path)) == tmp_path / 'x_model.pth'
    with pytest.raises(UserError, match="--model x_modl.pth is neither a file .* did you mean 'x_model.pth'"):
        find_result('--model', 'model.pth', 'x_modl.pth', str(tmp_path))
    with pytest.raises(UserError, match='there are: none; train first'):
        find_result('--model', 'model.pth', 'x_model.pth', str(tmp_path / 'empty'))
