"""The folder of emoji: one class for each emoji, with the drawings of all makers that have it."""
import json

import pytest

from benchmarks import make_emoji
from common.errors import UserError


@pytest.fixture
def packages(tmp_path):
    """node_modules with two emoji, of which Facebook has drawn only one."""
    index = [{'unified': code, 'image': f'{code.lower()}.png',
              **{f'has_img_{maker}': code == '1F600' or maker != 'facebook' for maker in make_emoji.MAKERS}}
             for code in ('1F600', '0023-20E3')]
    for maker in make_emoji.MAKERS:
        folder = tmp_path / f'node_modules/emoji-datasource-{maker}/img/{maker}/64'
        folder.mkdir(parents=True)
        for emoji in index:
            if emoji[f'has_img_{maker}']:
                (folder / emoji['image']).write_text(f'{maker} {emoji["unified"]}')
    (tmp_path / 'node_modules/emoji-datasource-apple/emoji.json').write_text(json.dumps(index))
    return tmp_path / 'node_modules'


def test_each_emoji_is_a_class_with_the_drawings_of_its_makers(packages, tmp_path, call_script):
    printed = call_script(make_emoji, '--packages', packages, '--target', tmp_path / 'emoji')
    target = tmp_path / 'emoji'
    assert {str(path.relative_to(target)): path.read_text() for path in target.rglob('*.png')} == {
        f'{code}/{maker}.png': f'{maker} {code}' for code in ('1F600', '0023-20E3')
        for maker in make_emoji.MAKERS if (code, maker) != ('0023-20E3', 'facebook')}
    assert '7 drawings of 2 emoji' in printed


@pytest.mark.parametrize(('missing', 'message'), [
    ('emoji-datasource-apple/emoji.json', r'there is no .*emoji\.json; install the packages with: npm install'),
    ('emoji-datasource-twitter/img/twitter/64/1f600.png', r'1 of 7 drawings are missing, the first: .*1f600\.png'),
])
def test_a_package_that_is_missing_is_named_and_nothing_is_written(packages, tmp_path, call_script, missing, message):
    (packages / missing).unlink()
    with pytest.raises(UserError, match=message):
        call_script(make_emoji, '--packages', packages, '--target', tmp_path / 'emoji')
    assert not (tmp_path / 'emoji').exists()


def test_a_folder_that_is_there_is_not_overwritten(packages, tmp_path, call_script):
    (tmp_path / 'emoji').mkdir()
    with pytest.raises(UserError, match='emoji exists already'):
        call_script(make_emoji, '--packages', packages, '--target', tmp_path / 'emoji')
