"""A folder of one's own photographs: splits that stay, classes that were seen, photographs that go and that are odd."""
import importlib.util
import json
import os
import shutil
import unicodedata
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import REPOSITORY, assert_one_line_error, type_command
from faults import TINY
from PIL import Image, features
from raw_trees import write_image

from engine.errors import UserError
from engine.files import load, save
from engine.runs import run_name
from export import describe_protocol
from folders import deal, file_stem, list_folder, settle_deal
from listing import find_images
from metrics import retrieval_metrics
from model import EmbeddingNet, NetConfig, make_loss
from raw_sets import find_root
from recipes import LOSSES
from settings import get_runs
from train import build_optimizer

QUICK = (*TINY, '--num_epochs', 1, '--warm_up', 0, '--num_workers', 0, '--drop_last', 1, '--data_name', 'mine')
NAME = 'mine_timm-test_resnet_balanced_proxy_16'


def make_own(tmp_path, classes='abcdef', images=3):
    for label in classes:
        for number in range(images):
            write_image(tmp_path / 'mine' / label / f'{number}.jpg', ord(label), number)
    return tmp_path / 'mine'


def convert(tmp_path, *words):
    return type_command('data_utils.py', '--data_path', tmp_path, '--data_name', 'mine', *words)


def sides_of(tmp_path):
    split = torch.load(find_root(tmp_path, 'mine') / 'uncropped_data_dicts.pth', weights_only=True)
    return {label: side for side in ('train', 'test') for label in split[side]}


def train(tmp_path, *words):
    return type_command('train.py', *QUICK, '--data_path', tmp_path, '--results_dir', tmp_path / 'r', *words)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A folder of six classes of three images, and a run on it."""
    folder = tmp_path_factory.mktemp('own')
    make_own(folder)
    assert convert(folder).returncode == 0
    result = train(folder)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture
def own(trained, tmp_path):
    """A copy of them that a test may spoil."""
    shutil.copytree(trained, tmp_path / 'own')
    return tmp_path / 'own'


# ---------------------------------------------------- splits that stay ---------------------------------------------
def test_a_class_keeps_its_side_when_others_come_and_go(tmp_path):
    make_own(tmp_path, 'abcdefghij')
    assert convert(tmp_path, '--test_ratio', 0.3).returncode == 0
    before = sides_of(tmp_path)
    assert sum(side == 'test' for side in before.values()) == 3
    make_own(tmp_path, 'klmnopqrst')
    for words in ((), ('--test_ratio', 0.3)):  # the ratio is remembered
        assert convert(tmp_path, *words).returncode == 0
        after = sides_of(tmp_path)
        assert {label: after[label] for label in before} == before
        assert sum(side == 'test' for side in after.values()) == 6  # its share holds
    gone = next(label for label, side in before.items() if side == 'test')
    shutil.rmtree(tmp_path / 'mine' / gone)
    assert convert(tmp_path).returncode == 0
    make_own(tmp_path, gone)
    assert convert(tmp_path).returncode == 0
    assert sides_of(tmp_path)[gone] == 'test'


def test_new_classes_are_dealt_by_their_name_and_the_seed_alone():
    earlier = deal(list('abcdefghij'), {}, 0.3, 0)
    new = list('klmnopqrstuvwxyz')
    one, other = (deal([*order, *earlier], earlier, 0.3, seed) for order, seed in ((new, 0), (new[::-1], 0)))
    assert one == other
    assert sum(side == 'test' for side in one.values()) == round(0.3 * 26)
    assert deal(new, {}, 0.3, 0) != deal(new, {}, 0.3, 1)


def test_another_ratio_is_refused_and_a_new_deal_says_what_it_breaks(tmp_path):
    make_own(tmp_path, 'abcdefghij')
    assert convert(tmp_path, '--test_ratio', 0.3).returncode == 0
    before = sides_of(tmp_path)
    assert_one_line_error(convert(tmp_path, '--test_ratio', 0.5), '--test_ratio 0.5', '--test_ratio 0.3', '--resplit')
    assert_one_line_error(convert(tmp_path, '--seed', 5), '--seed 5', '--seed 0', '--resplit')
    assert sides_of(tmp_path) == before
    result = convert(tmp_path, '--test_ratio', 0.5, '--seed', 5, '--resplit')
    assert result.returncode == 0, result.stderr
    changed = sum(before[label] != side for label, side in sides_of(tmp_path).items())
    assert changed > 0
    assert f'{changed} of 10 classes changed sides: what was trained before has seen test classes' in result.stdout


def test_a_new_deal_that_fails_changes_no_side(tmp_path):
    make_own(tmp_path, 'abcdef')
    assert convert(tmp_path).returncode == 0
    before = sides_of(tmp_path)
    seed = next(seed for seed in range(1, 50) if deal(list('abcdef'), {}, 0.5, seed) != before)
    (tmp_path / 'mine/a/broken.jpg').touch()
    assert_one_line_error(convert(tmp_path, '--resplit', '--seed', seed), '1 of', 'broken or missing')
    (tmp_path / 'mine/a/broken.jpg').unlink()
    assert convert(tmp_path).returncode == 0
    assert sides_of(tmp_path) == before
    assert 'classes changed sides: what was trained before' in convert(tmp_path, '--resplit', '--seed', seed).stdout
    assert sides_of(tmp_path) == deal(list('abcdef'), {}, 0.5, seed)


def test_a_deal_leaves_no_side_empty(tmp_path):
    for ratio in (0.001, 0.999):
        sides = deal(list('abcd'), {}, ratio, 0)
        assert sorted(sides.values()).count('test') == (1 if ratio < 0.5 else 3)


def test_a_deal_of_before_deals_were_remembered_is_kept(tmp_path):
    make_own(tmp_path)
    assert convert(tmp_path, '--test_ratio', 0.34).returncode == 0
    before, manifest = sides_of(tmp_path), json.loads((tmp_path / 'mine/conversion.json').read_text())
    del manifest['deal']
    (tmp_path / 'mine/conversion.json').write_text(json.dumps(manifest))
    make_own(tmp_path, 'ghijkl')
    assert convert(tmp_path).returncode == 0
    assert {label: side for label, side in sides_of(tmp_path).items() if label in before} == before
    assert sum(side == 'test' for side in sides_of(tmp_path).values()) == 4


@pytest.mark.parametrize('ratio', [0.0, 1.0, -1.0, float('nan')])
def test_a_ratio_that_deals_nothing_is_refused(tmp_path, ratio):
    with pytest.raises(UserError, match='--test_ratio .* must lie between 0 and 1'):
        settle_deal(tmp_path, ['a', 'b'], {}, ratio, None)


# ---------------------------------------------------- classes that were trained on ---------------------------------
def test_a_model_is_not_measured_on_classes_that_it_was_trained_on(own):
    before = sides_of(own)
    assert convert(own, '--resplit', '--seed', 3).returncode == 0
    seen = [label for label, side in sides_of(own).items() if side == 'test' and before[label] == 'train']
    assert seen
    words = ('evaluate.py', '--resume', f'{NAME}_model.pth', '--results_dir', own / 'r', '--data_path', own)
    assert_one_line_error(type_command(*words), f'{len(seen)} of 3 test classes were trained on', '--allow_seen')
    result = type_command(*words, '--allow_seen')
    assert f'NOT of unseen classes: {len(seen)} of them were trained on' in result.stdout
    found = json.loads(type_command(*words, '--allow_seen', '--json').stdout)
    assert found['measured_on'] == {'data_name': 'mine', 'crop_type': 'uncropped', 'mirror': False, 'image_size': 32,
                                    'resize_size': 36, 'classes': 3, 'seen_classes': len(seen)}


def test_classes_that_an_earlier_model_has_seen_do_not_choose_the_epoch_of_a_later_one(tmp_path):
    for subset, labels in (('train', 'abcd'), ('test', 'ef')):
        for label in labels:
            for number in range(3):
                write_image(tmp_path / 'mine' / subset / label / f'{number}.jpg', ord(label), number)
    assert convert(tmp_path).returncode == 0
    assert train(tmp_path).returncode == 0
    words = ('--init', tmp_path / 'r' / f'{NAME}_model.pth', '--val_ratio', 0.5, '--remark', 'tuned')
    assert_one_line_error(train(tmp_path, *words), '2 of 2 classes that --val_ratio holds out were trained on',
                          '--allow_seen')
    assert train(tmp_path, *words, '--allow_seen').returncode == 0


def test_training_on_test_classes_says_so_in_table_and_report(tmp_path):
    for subset in ('train', 'test'):
        for label in 'abc' if subset == 'train' else 'bcd':
            for number in range(3):
                write_image(tmp_path / 'mine' / subset / label / f'{number}.jpg', ord(label), number + 5 * len(subset))
    assert '2 classes are in training and test' in convert(tmp_path).stdout
    assert_one_line_error(train(tmp_path), '2 of 3 test classes were trained on', '--allow_seen')
    result = train(tmp_path, '--allow_seen')
    assert result.returncode == 0
    assert 'NOT of unseen classes: 2' in result.stdout
    words = ('--data_base', tmp_path / 'r' / f'{NAME}_data_base.pth')
    assert_one_line_error(type_command('evaluate.py', *words), '2 of 3 test classes were trained on')
    assert 'NOT of unseen classes: 2' in type_command('evaluate.py', *words, '--allow_seen').stdout
    assert type_command('report.py', *words, '--data_path', tmp_path).returncode == 0
    html = (tmp_path / 'r' / f'{NAME}_report.html').read_text()
    assert 'Not of unseen classes:</strong> 2 of these classes' in html
    assert 'none of them seen' not in ' '.join(html.split())


def test_what_was_measured_stands_in_table_json_and_data_base(own):
    for label in 'uvw':
        for number in range(3):
            folder = own / 'other' / ('train' if label == 'u' else 'test') / label
            write_image(folder / f'{number}.jpg', ord(label), number)
    assert type_command('data_utils.py', '--data_path', own, '--data_name', 'other').returncode == 0
    words = ('evaluate.py', '--resume', own / 'r' / f'{NAME}_model.pth', '--data_path', own, '--data_name', 'other')
    assert 'other, uncropped: 6 queries of 2 test classes' in type_command(*words).stdout
    assert json.loads(type_command(*words, '--json').stdout)['measured_on']['data_name'] == 'other'
    result = type_command(*words, '--save', '--results_dir', own / 'saved')
    assert result.returncode == 0, result.stderr
    data_base = load(own / 'saved' / f'{NAME}_on_other_data_base.pth', 'data base')
    assert data_base['args']['data_name'] == 'other'
    assert set(data_base['class_names']) == {'v', 'w'}
    assert 'The epoch was chosen on the test classes of mine.' in describe_protocol(data_base, seen=0)


# ---------------------------------------------------- settings that would lie --------------------------------------
def test_a_warm_up_over_all_epochs_is_refused_unless_asked_for(trained, tmp_path):
    with pytest.raises(UserError, match='--num_epochs 1 ends within the warm-up of the recipe balanced_proxy, 2 '):
        get_runs(['--num_epochs', '1'])
    result = train(trained, '--warm_up', 1, '--results_dir', tmp_path)
    assert 'the trunk stays frozen in all epochs' in result.stdout


def test_the_trunk_learns_from_the_epoch_after_the_warm_up_on(trained, tmp_path):
    def trunk(warm_up, num_epochs):
        remark = f'{warm_up}of{num_epochs}'
        words = ('--num_epochs', num_epochs, '--warm_up', warm_up, '--remark', remark, '--results_dir', tmp_path)
        assert train(trained, *words).returncode == 0
        return load(tmp_path / f'{NAME}_{remark}_checkpoint.pth', 'checkpoint')['model']

    torch.manual_seed(0)
    start = EmbeddingNet(NetConfig('timm:test_resnet', 16, freeze_bn=False, image_size=32), 'none').state_dict()
    weights = [name for name in start if name.startswith('trunk') and name.endswith('weight') and start[name].ndim == 4]
    for frozen in (trunk(1, 1), trunk(2, 2)):
        assert all(torch.equal(frozen[name], start[name]) for name in weights)
    free = trunk(1, 2)
    assert not any(torch.equal(free[name], start[name]) for name in weights)


def test_a_cache_of_fewer_pixels_than_the_crop_is_refused():
    with pytest.raises(UserError, match='--cache_size 224 is smaller than the 256 pixels of a test image'):
        get_runs(['--cache_size', '224', '--image_size', '224'])


def test_statistics_of_another_run_are_refused(own):
    statistics = own / 'r' / f'{NAME}_statistics.csv'
    table = pd.read_csv(statistics)
    table['args.run'] = 'another'
    table.to_csv(own / 'another_statistics.csv', index=False)
    result = type_command('report.py', '--data_base', own / 'r' / f'{NAME}_data_base.pth', '--data_path', own,
                          '--statistics', own / 'another_statistics.csv')
    assert_one_line_error(result, 'is of the run another')


@pytest.mark.parametrize('images', [torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, 8, 8).byte(),
                                    torch.zeros(0, 3, 8, 8).byte(), torch.zeros(3, 8, 8).byte()])
def test_images_that_are_no_bytes_are_refused(images):
    with pytest.raises(UserError, match='expected are .N, 3, H, W. of torch.uint8'):
        EmbeddingNet(NetConfig('timm:test_resnet', 4), 'none')(images)


@pytest.mark.parametrize(('embeddings', 'labels', 'part'), [
    (torch.eye(4), torch.arange(4), r'expected are \(N, 3\) floats'),
    (2 * torch.eye(3), torch.arange(3), 'no unit rows'), (torch.eye(3), torch.arange(2), 'one for each embedding'),
    (torch.eye(3), torch.arange(3).float(), 'torch.int64'), (torch.eye(3), torch.arange(3) + 3, 'expected are 0 to 4'),
    (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), 'batch is empty')])
def test_a_loss_refuses_what_is_no_batch(embeddings, labels, part):
    with pytest.raises(UserError, match=part):
        make_loss('proxy_anchor', num_classes=5, feature_dim=3)(embeddings, labels)


@pytest.mark.parametrize(('features', 'labels', 'part'), [
    (2 * torch.eye(3), torch.zeros(3).long(), 'no unit rows'), (torch.eye(3), torch.zeros(3), 'torch.int64'),
    (torch.eye(3).long(), torch.zeros(3).long(), 'floats'), (torch.zeros(0, 3), torch.zeros(0).long(), 'floats'),
    (torch.eye(3), torch.zeros(2).long(), r'\(3,\)')])
def test_metrics_refuse_what_is_no_data_base(features, labels, part):
    with pytest.raises(UserError, match=part):
        retrieval_metrics(features, labels, recalls=(1,))


# ---------------------------------------------------- photographs that go ------------------------------------------
def test_a_photograph_that_is_gone_is_kept_nowhere(own):
    label = next(label for label, side in sides_of(own).items() if side == 'test')
    image = next((own / 'mine' / label).iterdir())
    copy = own / 'mine/uncropped' / f'{image.parent.name}_{image.name}'
    assert copy.is_file()
    image.unlink()
    result = convert(own)
    assert '1 that are gone from the folder removed' in result.stdout
    assert not copy.exists()
    data_base = own / 'r' / f'{NAME}_data_base.pth'
    query = next(path for path in load(data_base, 'data base')['test_images'] if path != f'uncropped/{copy.name}')
    result = type_command('test.py', '--data_base', data_base, '--data_path', own, '--results_dir', own / 'r',
                          '--query_img_name', query, '--retrieval_num', 2)
    assert f'1 images of this data base are no longer in the data set, the first: uncropped/{copy.name}' in \
        result.stdout


def test_a_broken_photograph_that_is_skipped_loses_its_copy(own):
    (own / 'mine/a/1.jpg').write_bytes(b'broken')
    assert convert(own, '--skip_bad').returncode == 0
    assert not (own / 'mine/uncropped/a_1.jpg').exists()
    assert (own / 'mine/a/1.jpg').read_bytes() == b'broken'


# ---------------------------------------------------- odd names and formats ----------------------------------------
def test_every_format_that_can_be_read_is_read_and_the_rest_counted(tmp_path):
    make_own(tmp_path)
    picture = Image.new('RGB', (40, 40), 'red')
    names = ['photo.jfif', 'photo.jpe', 'photo.jp2'] + (['photo.avif'] if features.check('avif') else [])
    for name in names:
        kind = {'jfif': 'JPEG', 'jpe': 'JPEG', 'jp2': 'JPEG2000', 'avif': 'AVIF'}[name.split('.')[1]]
        picture.save(tmp_path / 'mine/a' / name, kind)
    for name in ('one.xyz', 'two.xyz', 'notes.txt', 'README'):
        (tmp_path / 'mine/b' / name).write_text('')
    (tmp_path / 'mine/empty').mkdir()
    result = convert(tmp_path)
    assert result.returncode == 0, result.stderr
    assert f'{18 + len(names)} decoded now' in result.stdout
    assert 'left out: 1 .txt, 2 .xyz, 1 without ending' in result.stdout
    assert '1 class folders hold no image, the first: empty' in result.stdout


def test_heic_is_read_with_its_package_and_named_without(tmp_path):
    make_own(tmp_path)
    (tmp_path / 'mine/a/photo.heic').write_bytes(b'')
    if importlib.util.find_spec('pillow_heif') is None:
        assert 'left out: 1 .heic (pip install pillow-heif)' in convert(tmp_path).stdout
        return
    import pillow_heif

    pillow_heif.from_pillow(Image.new('RGB', (40, 40), 'red')).save(tmp_path / 'mine/a/photo.heic')
    assert '19 decoded now' in convert(tmp_path).stdout


def test_names_that_differ_in_their_unicode_form_alone_are_one_class(tmp_path):
    make_own(tmp_path)
    for number, form in enumerate(('NFC', 'NFD')):
        write_image(tmp_path / 'mine' / unicodedata.normalize(form, 'Käfer') / f'{number}.jpg', 9, number)
    result = convert(tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(sides_of(tmp_path)) == 7
    assert unicodedata.normalize('NFC', 'Käfer') in sides_of(tmp_path)


def test_a_folder_named_like_a_formula_is_trained_on(tmp_path):
    make_own(tmp_path, 'abcde')
    for number in range(3):
        write_image(tmp_path / 'mine' / '\\frac' / f'{number}.jpg', 3, number)
    assert convert(tmp_path).returncode == 0
    assert '\\frac' in sides_of(tmp_path)
    result = train(tmp_path)
    assert result.returncode == 0, result.stderr


def test_names_keep_their_letters():
    assert run_name('Köln Fotos', 'resnet18') == 'köln-fotos_resnet18'
    assert run_name(unicodedata.normalize('NFD', 'Köln'), 'Птицы/2') == 'köln_птицы-2'
    assert file_stem(Path('a\\b/c\x07/d.jpg')) == 'a_b_c__d'


# ---------------------------------------------------- queries ------------------------------------------------------
def test_a_photograph_is_known_by_the_path_where_its_owner_keeps_it(own):
    label = next(label for label, side in sides_of(own).items() if side == 'test')
    result = type_command('test.py', '--data_base', own / 'r' / f'{NAME}_data_base.pth', '--data_path', own,
                          '--results_dir', own / 'r', '--query_img_name', own / 'mine' / label / '1.jpg',
                          '--retrieval_num', 3)
    assert result.returncode == 0, result.stderr
    assert f'{label}_1.jpg ({label}):' in result.stdout
    assert f'uncropped/{label}_1.jpg' not in result.stdout


def test_two_photographs_of_one_name_keep_their_results_apart(own):
    for person, colour in (('ann', 'red'), ('bob', 'blue')):
        (own / person).mkdir()
        Image.new('RGB', (40, 40), colour).save(own / person / 'IMG_1.jpg')
    words = ('test.py', '--data_base', own / 'r' / f'{NAME}_data_base.pth', '--data_path', own, '--results_dir',
             own / 'r', '--retrieval_num', 3, '--query_img_name')
    for person in ('ann', 'bob', 'ann'):
        result = type_command(*words, own / person / 'IMG_1.jpg')
        assert result.returncode == 0, result.stderr
    red, blue = (Image.open(own / 'r' / folder / 'query_img.jpg').getpixel((90, 90)) for folder in ('IMG_1', 'IMG_1_2'))
    assert red[0] > 200 > blue[0]
    assert not (own / 'r/IMG_1_3').exists()


# ---------------------------------------------------- files of others ----------------------------------------------
@pytest.mark.parametrize('script', ['plot.py', 'report.py'])
def test_a_file_that_was_not_written_here_is_not_replaced(own, script):
    mine = own / ('mine.png' if script == 'plot.py' else 'mine.html')
    words = {'plot.py': (own / 'r' / f'{NAME}_statistics.csv',),
             'report.py': ('--data_base', own / 'r' / f'{NAME}_data_base.pth', '--data_path', own)}[script]
    mine.write_text('my thesis')
    assert_one_line_error(type_command(script, *words, '--output', mine), f'--output {mine} is there', 'not replaced')
    assert mine.read_text() == 'my thesis'
    mine.unlink()
    for _ in range(2):  # what it wrote itself, it replaces
        assert type_command(script, *words, '--output', mine).returncode == 0


def test_the_home_folder_is_expanded():
    args = get_runs(['--results_dir=~/r', '--data_path=~/d', '--weights=~/w.pth'])[1][0]
    assert not any('~' in path for path in (args.results_dir, args.data_path, args.weights))


# ---------------------------------------------------- going on, fine-tuning, the untouched trunk -------------------
def test_a_finished_run_goes_on_for_more_epochs(own):
    words = ('--lr_schedule', 'step', '--lr_decay_step', 1)
    assert train(own, *words, '--remark', 'whole', '--num_epochs', 3).returncode == 0
    assert train(own, *words, '--remark', 'later').returncode == 0
    assert train(own, *words, '--remark', 'later', '--num_epochs', 3, '--resume').returncode == 0
    whole, later = (load(own / 'r' / f'{NAME}_{name}_checkpoint.pth', 'checkpoint') for name in ('whole', 'later'))
    assert all(torch.equal(whole['model'][name], later['model'][name]) for name in whole['model'])
    assert later['args']['num_epochs'] == 3
    assert_one_line_error(train(own, *words, '--remark', 'later', '--num_epochs', 2, '--resume'), '--num_epochs 2')
    assert train(own, '--remark', 'c', '--lr_schedule', 'cosine').returncode == 0
    result = train(own, '--remark', 'c', '--lr_schedule', 'cosine', '--num_epochs', 2, '--resume')
    assert_one_line_error(result, 'the schedule cosine of this run was laid out for 1 epochs', '--init')


def test_a_run_starts_from_the_model_of_another_and_remembers_what_that_had_seen(own):
    model = own / 'r' / f'{NAME}_model.pth'
    result = train(own, '--init', model, '--lr', 1e-30, '--remark', 'tuned')
    assert result.returncode == 0, result.stderr
    first, tuned = (load(own / 'r' / f'{NAME}{name}_model.pth', 'model') for name in ('', '_tuned'))
    weight = 'refactor.weight'
    torch.testing.assert_close(tuned['state_dict'][weight], first['state_dict'][weight], rtol=1e-3, atol=1e-6)
    assert_one_line_error(train(own, '--weights', model, '--remark', 'x'), 'is the model of a run', f'--init {model}')
    assert_one_line_error(train(own, '--init', model, '--feature_dim', 8), '--feature_dim 8 (there 16)')
    save({**first, 'seen_classes': [*first['seen_classes'], 'elsewhere']}, own / 'r/of_others_model.pth')
    assert train(own, '--init', own / 'r/of_others_model.pth', '--remark', 'y').returncode == 0
    (own / 'r/of_others_model.pth').unlink()  # a run that goes on does not need it
    words = ('--remark', 'y', '--init', own / 'r/of_others_model.pth', '--resume', '--num_epochs', 2)
    assert train(own, *words).returncode == 0
    assert 'elsewhere' in load(own / 'r' / f'{NAME}_y_model.pth', 'model')['seen_classes']


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(3)
    torch.save(EmbeddingNet(NetConfig('timm:test_resnet', 4), 'none').trunk.network.state_dict(), tmp_path / 'w.pth')
    return tmp_path / 'w.pth'


def test_the_untouched_trunk_is_saved_and_searched(own, weights):
    words = ('evaluate.py', '--zero_shot', '--data_path', own, '--data_name', 'mine', '--backbone_type',
             'timm:test_resnet', '--weights', weights, '--image_size', 32, '--resize_size', 0, '--recalls', '1,2')
    result = type_command(*words, '--save', '--results_dir', own / 'r')
    assert result.returncode == 0, result.stderr
    name = next((own / 'r').glob('mine_timm-test_resnet_*_zero_shot_data_base.pth'))
    look_up = ('test.py', '--data_base', name, '--data_path', own, '--results_dir', own / 'r', '--retrieval_num', 3)
    (own / 'foreign.jpg').write_bytes((own / 'mine/a/0.jpg').read_bytes())
    for source in (('--data_base', name), ('--resume', str(name).replace('data_base', 'model'), '--data_path', own)):
        again = type_command('evaluate.py', *source, '--results_dir', own / 'r')
        assert again.returncode == 0
        assert again.stdout.splitlines()[1] == result.stdout.splitlines()[1]
        assert 'binary' not in again.stdout
    result = type_command('export.py', '--model', str(name).replace('data_base', 'model'), '--data_path', own,
                          '--folder', own / 'hub')
    assert result.returncode == 0, result.stderr
    card = (own / 'hub/README.md').read_text()
    assert 'Not trained\nfurther: the pooled features of its weights `w.pth`' in card
    assert 'squeeze the whole image to 32 x 32 px' in card
    assert 'The epoch was chosen' not in card
    assert 'binary' not in card
    assert 'recipe' not in card.split('## Recipe')[1]
    for query in (load(name, 'data base')['test_images'][0], own / 'foreign.jpg'):
        assert type_command(*look_up, '--query_img_name', query).returncode == 0
    assert type_command('report.py', '--data_base', name, '--data_path', own).returncode == 0
    assert_one_line_error(type_command(*words, '--save', '--results_dir', own / 'r'), 'is there already', '--overwrite')


def test_the_floor_is_measured_first(own, weights):
    result = train(own, '--weights', weights, '--lr', 0.5, '--proxy_lr', 5.0, '--remark', 'bad')
    assert result.returncode == 0, result.stderr
    table = pd.read_csv(own / 'r' / f'{NAME}_bad_statistics.csv')
    floor = json.loads(type_command('evaluate.py', '--zero_shot', '--data_path', own, '--data_name', 'mine', '--json',
                                    '--backbone_type', 'timm:test_resnet', '--weights', weights, '--image_size', 32,
                                    '--recalls', '1,2', '--amp', 'off').stdout)['dense']['R@1']
    assert table['epoch0_R@1'].tolist() == [pytest.approx(floor)]
    assert f'epoch 0: R@1 {floor:.2f} of the untouched trunk' in result.stdout
    result = train(own, '--weights', weights, '--epoch0', 0, '--remark', 'without')
    assert 'epoch 0:' not in result.stdout
    assert 'epoch0_R@1' not in pd.read_csv(own / 'r' / f'{NAME}_without_statistics.csv')


def test_parameters_of_a_loss_are_trained_and_saved():
    class Tempered(type(make_loss('normalized_softmax', num_classes=3, feature_dim=2))):
        def __init__(self, config):
            super().__init__(config)
            self.heat = torch.nn.Parameter(torch.tensor(2.0))

        def formula(self, own, negative, labels):
            return self.heat * super().formula(own, negative, labels)

    from model import ProxyConfig

    assert LOSSES['normalized_softmax'].margin is None
    for rule in ('gradient', 'momentum'):
        criterion = Tempered(ProxyConfig(3, 2, rule, scale=4.0))
        args = get_runs(['--loss_name', 'normalized_softmax', '--proxy_update', rule])[1][0]
        optimizer = build_optimizer(torch.nn.Linear(2, 2), criterion, args)
        assert any(parameter is criterion.heat for group in optimizer.param_groups for parameter in group['params'])
        criterion.heat.data.fill_(5.0)
        other = Tempered(ProxyConfig(3, 2, rule, scale=4.0))
        other.load_full_state_dict(criterion.full_state_dict())
        assert other.heat == 5
        assert torch.equal(other.proxies, criterion.proxies)


# ---------------------------------------------------- messages -----------------------------------------------------
def test_classes_of_one_image_are_named_and_not_a_flag_that_was_never_given(tmp_path):
    make_own(tmp_path, 'abcdefgh', images=1)
    assert convert(tmp_path).returncode == 0
    words = [word for word in QUICK if word not in ('--recalls', '1,2')]
    result = type_command('train.py', *words, '--data_path', tmp_path, '--results_dir', tmp_path / 'r')
    assert_one_line_error(result, 'no test class has two images')


def test_a_folder_called_cars_is_told_what_it_was_taken_for(tmp_path):
    make_own(tmp_path).rename(tmp_path / 'cars')
    result = type_command('data_utils.py', '--data_path', tmp_path, '--data_name', 'cars')
    assert_one_line_error(result, 'is taken for the data set car by its name', 'rename a folder of your own')


def test_a_mistyped_trunk_gets_the_nearest_name():
    with pytest.raises(UserError, match="did you mean 'tf_efficientnet_lite0'"):
        EmbeddingNet(NetConfig('timm:tf_efficientnet_lit0', 4), 'none')


def test_evaluation_finds_a_run_by_its_bare_name(own):
    result = type_command('evaluate.py', '--data_base', f'{NAME}_data_base.pth', '--results_dir', own / 'r')
    assert 'mine, uncropped: 9 queries of 3 test classes' in result.stdout
    result = type_command('evaluate.py', '--data_base', f'{NAME}_data_bas.pth', '--results_dir', own / 'r')
    assert_one_line_error(result, f"did you mean '{NAME}_data_base.pth'")


# ---------------------------------------------------- what a walk with odd folders found ---------------------------
def test_a_cache_does_not_keep_what_is_gone(own):
    assert convert(own, '--cache_size', 32).returncode == 0
    cache = own / 'mine/uncropped_cache_32.bin'
    size = cache.stat().st_size
    (own / 'mine/a/1.jpg').unlink()
    assert 'the cache uncropped_cache_32 held images that are gone and is removed' in convert(own).stdout
    assert not cache.exists()
    assert convert(own, '--cache_size', 32).returncode == 0
    assert cache.stat().st_size < size


def test_nothing_stays_that_no_photograph_explains(own):
    Image.new('RGB', (30, 30), 'red').save(own / 'mine/a/face.png')
    assert convert(own).returncode == 0
    Image.new('L', (30, 30)).save(own / 'mine/a/face.png')  # anonymised: its copy is now face.jpg
    (own / 'mine/uncropped/left.png').write_bytes(b'of a conversion that was killed')
    (own / 'mine/uncropped/kept').mkdir()
    (own / 'mine/my_uncropped_cache_1.pth').write_bytes(b'of somebody else')
    assert '1 files in uncropped/ that belonged to no photograph are removed' in convert(own).stdout
    assert (own / 'mine/uncropped/kept').is_dir()
    assert (own / 'mine/my_uncropped_cache_1.pth').exists()
    assert {path.name for path in (own / 'mine/uncropped').iterdir() if 'face' in path.name or 'left' in path.name} == {
        'a_face.jpg'}


def test_when_all_photographs_go_their_copies_go(own):
    for label in 'abcdef':
        shutil.rmtree(own / 'mine' / label)
    assert_one_line_error(convert(own), 'no images in train')
    assert not list((own / 'mine/uncropped').iterdir())
    assert not (own / 'mine/uncropped_data_dicts.pth').exists()


def test_a_photograph_that_became_another_one_is_told(own):
    label = next(label for label, side in sides_of(own).items() if side == 'test')
    Image.new('RGB', (90, 90), 'blue').save(own / 'mine' / label / '1.jpg')
    assert convert(own).returncode == 0
    result = type_command('test.py', '--data_base', own / 'r' / f'{NAME}_data_base.pth', '--data_path', own,
                          '--results_dir', own / 'r', '--query_img_name', f'{label}_0.jpg', '--retrieval_num', 2)
    assert f'1 images of this data base have changed since, and are not those that were embedded, the first: ' \
           f'uncropped/{label}_1.jpg' in result.stdout


def test_a_renamed_class_keeps_its_side(own):
    before = sides_of(own)
    for label in before:
        (own / 'mine' / label).rename(own / 'mine' / f'{label}_new')
    result = convert(own)
    assert result.returncode == 0, result.stderr
    assert sides_of(own) == {f'{label}_new': side for label, side in before.items()}
    assert 'a_new holds the photographs of a, which is gone, and keeps its side' in result.stdout


def test_long_names_are_shortened_and_told_apart(tmp_path):
    make_own(tmp_path, 'ab')
    for end in ('x', 'y'):
        write_image(tmp_path / 'mine' / ('L' * 200) / f'{"f" * 100}{end}.jpg', 5, ord(end))
    assert convert(tmp_path).returncode == 0
    names = [path.name for path in (tmp_path / 'mine/uncropped').iterdir() if path.name.startswith('L')]
    assert len(names) == 2
    assert all(len(name) < 220 for name in names)


def test_what_lies_beside_the_class_folders_is_counted(tmp_path):
    root = make_own(tmp_path)
    write_image(root / 'loose.jpg', 1, 1)
    (root / 'a/album').symlink_to(root / 'b')
    assert 'left out: 1 images beside the class folders, 1 links that are not followed' in convert(tmp_path).stdout
    flat = tmp_path / 'flat'
    write_image(flat / 'one.jpg', 1, 1)
    result = type_command('data_utils.py', '--data_path', tmp_path, '--data_name', 'flat')
    assert_one_line_error(result, 'holds 1 images, but no folder for each class')


def test_what_lies_beside_the_folders_of_a_split_is_counted(tmp_path):
    for subset, classes in (('train', 'ab'), ('Test', 'cd'), ('val', 'ef')):
        for label in classes:
            write_image(tmp_path / 'mine' / subset / label / '0.jpg', ord(label), 1)
    write_image(tmp_path / 'mine/train/loose.jpg', 1, 1)
    printed = convert(tmp_path).stdout
    assert 'left out: 1 images beside the class folders, 2 images in val/' in printed
    assert 'train 2 classes 2 images, test 2 classes 2 images' in printed


@pytest.mark.parametrize('kind', ['listing', 'entering'])
def test_a_folder_in_a_class_that_cannot_be_read_is_not_taken_for_an_empty_one(tmp_path, monkeypatch, kind):
    root = make_own(tmp_path)
    write_image(root / 'a/album/0.jpg', 1, 1)  # permissions do not bind the user root
    assert len(list_folder(root / 'a', {'.jpg'})[0]) == 4
    scandir, access = os.scandir, os.access

    def refused(folder):
        if str(folder).endswith('album'):
            raise PermissionError(13, 'Permission denied', str(folder))
        return scandir(folder)

    if kind == 'listing':
        monkeypatch.setattr(os, 'scandir', refused)
    else:
        monkeypatch.setattr(os, 'access', lambda path, mode: not str(path).endswith('album') and access(path, mode))
    with pytest.raises(UserError, match='album of a class cannot be read'):
        list_folder(root / 'a', {'.jpg'})


def test_an_ending_that_is_not_utf8_is_counted_and_can_be_printed(tmp_path):
    root = make_own(tmp_path)
    (root / 'a/notes.t\udce4t').touch()
    for others in (list_folder(root / 'a', {'.jpg'})[1], find_images(root)[1]):
        assert others == {'.t\\udce4t': 1}
        assert ' '.join(others).encode()


def test_a_class_folder_not_named_in_utf8_is_named(tmp_path):
    make_own(tmp_path)
    (tmp_path / 'mine/a').rename(tmp_path / 'mine/caf\udce9')
    assert_one_line_error(convert(tmp_path), 'is not in UTF-8; rename it')


def test_a_new_deal_keeps_ratio_and_seed_unless_others_are_given(tmp_path):
    make_own(tmp_path, 'abcdefgh')
    assert convert(tmp_path, '--test_ratio', 0.25).returncode == 0
    before = sides_of(tmp_path)
    result = convert(tmp_path, '--resplit')
    assert '0 of 8 classes changed sides\n' in result.stdout
    assert sides_of(tmp_path) == before


def test_a_file_that_is_there_is_meant_and_not_one_of_its_name(own, tmp_path):
    label = next(label for label, side in sides_of(own).items() if side == 'test')
    (tmp_path / 'elsewhere').mkdir()
    Image.new('RGB', (40, 40), 'green').save(tmp_path / 'elsewhere' / f'{label}_1.jpg')
    words = ('--data_base', own / 'r' / f'{NAME}_data_base.pth', '--data_path', own, '--results_dir', own / 'r',
             '--retrieval_num', 2, '--query_img_name', f'{label}_1.jpg')
    there = type_command(REPOSITORY / 'test.py', *words, cwd=tmp_path / 'elsewhere')
    assert f'{label}_1.jpg (class unknown):' in there.stdout
    assert f'{label}_1.jpg ({label}):' in type_command('test.py', *words).stdout
