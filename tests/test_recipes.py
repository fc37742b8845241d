"""The recipes as data: every entry is known, the table shows them all, and the papers are cited."""
import pytest
from conftest import REPOSITORY

from common.errors import UserError
from recipes import (BACKBONE_NAMES, COMBINED_LOSSES, COMMON, HEAD_INITS, LOSSES, OPTIMIZER_NAMES, POOLINGS,
                     PROXY_INITS, PROXY_UPDATES, RECIPES, SCHEDULE_NAMES, canonical_backbone, recipe_settings,
                     recipe_table)

CHOICES = {'loss_name': {*LOSSES, *COMBINED_LOSSES}, 'proxy_update': PROXY_UPDATES, 'pooling': POOLINGS,
           'head_init': HEAD_INITS, 'proxy_init': PROXY_INITS, 'optimizer_type': OPTIMIZER_NAMES,
           'lr_schedule': SCHEDULE_NAMES}
ONLY_IN_RECIPES = {'loss_name': '', 'temperature': 0.1, 'margin': 0.1}  # with a value of their type


@pytest.mark.parametrize('name', RECIPES)
def test_every_setting_of_a_recipe_is_known_and_has_the_type_of_the_common_one(name):
    known = {**COMMON, **ONLY_IN_RECIPES}
    for settings in (RECIPES[name]['settings'], *(values for _, values in RECIPES[name]['overrides'])):
        for key, value in settings.items():
            assert type(value) is type(known[key]), key
            assert value in CHOICES.get(key, [value])
    for condition, _ in RECIPES[name]['overrides']:
        assert condition.keys() <= {'data_name', 'backbone_type'}
        assert set(condition.get('backbone_type', ())) <= set(BACKBONE_NAMES)
        assert set(condition.get('data_name', ())) <= {'car', 'cub', 'sop', 'isc'}


def test_later_overrides_win_and_apply_where_all_their_conditions_hold():
    def decay(data, backbone):
        return recipe_settings('proxy_anchor', data, backbone)['lr_decay_step']

    assert [decay('car', 'inception'), decay('car', 'resnet50'), decay('cub', 'resnet50'), decay('mine', 'resnet50'),
            decay('cub', 'timm:x')] == [20, 10, 5, 10, 10]
    assert recipe_settings('proxy_anchor', 'mine', 'timm:x')['recalls'] == (1, 2, 4, 8, 16, 32)
    with pytest.raises(KeyError):
        recipe_settings('no_recipe', 'car', 'resnet50')


def test_a_recipe_is_a_copy_that_can_be_changed():
    recipe_settings('balanced_proxy', 'car', 'resnet50')['lr'] = 5.0
    assert recipe_settings('balanced_proxy', 'car', 'resnet50')['lr'] == 1e-4


def test_backbones_answer_to_their_second_name():
    assert canonical_backbone('bn_inception') == canonical_backbone('inception') == 'inception'
    assert canonical_backbone('timm:Anything') == 'timm:Anything'
    with pytest.raises(UserError, match="--backbone_type 'resnet5' is not known; did you mean 'resnet50'"):
        canonical_backbone('resnet5')


def test_the_table_shows_every_recipe_with_its_overrides_and_a_dash_without_effect():
    lines = recipe_table().splitlines()
    rows = {cells[0]: dict(zip(RECIPES, cells[1:], strict=True)) for cells in (
        [cell.strip() for cell in line.strip('|').split('|')] for line in lines if not line.startswith('|---'))}
    assert rows['']['proxy_anchor'] == 'proxy_anchor'
    assert set(COMMON) | {'source', 'loss_name', 'temperature', 'margin', 'momentum'} == rows.keys() - {''}
    assert rows['lr']['asymptotic_proxy'] == '0.0001; 4e-05 (sop, isc)'
    assert rows['temperature']['asymptotic_proxy'] == '0.03; 0.05 (sop, isc)'
    assert rows['lr_decay_step']['proxy_anchor'] == \
        '10; 20 (car); 5 (resnet50, cub); 10 (resnet50, car); 20 (sop, isc)'
    assert rows['proxy_lr_factor']['momentum_proxy'] == rows['momentum']['proxy_anchor'] == '-'
    assert rows['lr_decay_gamma']['whitened_mirror'] == rows['margin']['positive_proxy'] == '-'
    assert (rows['freeze_bn']['balanced_proxy'], rows['momentum']['momentum_proxy']) == ('yes', '0.5')


def test_the_citation_names_the_paper_of_every_recipe():
    yaml = pytest.importorskip('yaml')
    cited = yaml.safe_load((REPOSITORY / 'CITATION.cff').read_text())
    assert {'cff-version', 'message', 'title', 'authors'} <= cited.keys()
    titles = [reference['title'].lower() for reference in cited['references']]
    sources = {name: recipe['source'].lower() for name, recipe in RECIPES.items()
               if name not in ('whitened_mirror', 'transformer')}  # no papers
    assert len(titles) == len(sources) == 5
    for name, source in sources.items():
        assert sum(title in source for title in titles) == 1, name
