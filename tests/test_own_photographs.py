"""Training and searching on your own photographs: what is left of test_folders.py, to be moved beside its scripts."""
import json
import shutil
import unicodedata

import pandas as pd
import pytest
import torch
from conftest import REPOSITORY, assert_one_line_error, type_command
from faults import TINY
from PIL import Image
from raw_trees import make_own, write_image

from common.errors import UserError
from common.files import load, save
from common.results import run_name
from export import describe_protocol
from imagedata.raw_sets import find_root
from model import EmbeddingNet, NetConfig, make_loss
from recipes import LOSSES
from retrieval.metrics import retrieval_metrics
from train import build_optimizer
from training.options import parse_options

QUICK = (*TINY, '--num_epochs', 1, '--warm_up', 0, '--num_workers', 0, '--drop_last', 1, '--data_name', 'mine')
NAME = 'mine_timm-test_resnet_balanced_proxy_16'


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
    make_own(folder, images=3)
    assert convert(folder).returncode == 0
    result = train(folder)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture
def own(trained, tmp_path):
    """A copy of them that a test may spoil."""
    shutil.copytree(trained, tmp_path / 'own')
    return tmp_path / 'own'


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
        parse_options(['--num_epochs', '1'])
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
        parse_options(['--cache_size', '224', '--image_size', '224'])


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


# ---------------------------------------------------- odd names ----------------------------------------------------
def test_a_folder_named_like_a_formula_is_trained_on(tmp_path):
    make_own(tmp_path, 'abcde', images=3)
    for number in range(3):
        write_image(tmp_path / 'mine' / '\\frac' / f'{number}.jpg', 3, number)
    assert convert(tmp_path).returncode == 0
    assert '\\frac' in sides_of(tmp_path)
    result = train(tmp_path)
    assert result.returncode == 0, result.stderr


def test_names_keep_their_letters():
    assert run_name('Köln Fotos', 'resnet18') == 'köln-fotos_resnet18'
    assert run_name(unicodedata.normalize('NFD', 'Köln'), 'Птицы/2') == 'köln_птицы-2'


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
    args = parse_options(['--results_dir=~/r', '--data_path=~/d', '--weights=~/w.pth'])[1][0]
    assert not any('~' in path for path in (args.results_dir, args.data_path, args.weights))


# ---------------------------------------------------- going on, fine-tuning, the pretrained baseline --------------
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
    assert table['pretrained_R@1'].tolist() == [pytest.approx(floor)]
    assert f'epoch 0: R@1 {floor:.2f} of the pretrained_baseline trunk' in result.stdout
    result = train(own, '--weights', weights, '--pretrained_baseline', 0, '--remark', 'without')
    assert 'epoch 0:' not in result.stdout
    assert 'pretrained_R@1' not in pd.read_csv(own / 'r' / f'{NAME}_without_statistics.csv')


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
        args = parse_options(['--loss_name', 'normalized_softmax', '--proxy_update', rule])[1][0]
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


def test_a_mistyped_trunk_gets_the_nearest_name():
    with pytest.raises(UserError, match="did you mean 'tf_efficientnet_lite0'"):
        EmbeddingNet(NetConfig('timm:tf_efficientnet_lit0', 4), 'none')


def test_evaluation_finds_a_run_by_its_bare_name(own):
    result = type_command('evaluate.py', '--data_base', f'{NAME}_data_base.pth', '--results_dir', own / 'r')
    assert 'mine, uncropped: 9 queries of 3 test classes' in result.stdout
    result = type_command('evaluate.py', '--data_base', f'{NAME}_data_bas.pth', '--results_dir', own / 'r')
    assert_one_line_error(result, f"did you mean '{NAME}_data_base.pth'")


def test_a_photograph_that_became_another_one_is_told(own):
    label = next(label for label, side in sides_of(own).items() if side == 'test')
    Image.new('RGB', (90, 90), 'blue').save(own / 'mine' / label / '1.jpg')
    assert convert(own).returncode == 0
    result = type_command('test.py', '--data_base', own / 'r' / f'{NAME}_data_base.pth', '--data_path', own,
                          '--results_dir', own / 'r', '--query_img_name', f'{label}_0.jpg', '--retrieval_num', 2)
    assert f'1 images of this data base have changed since, and are not those that were embedded, the first: ' \
           f'uncropped/{label}_1.jpg' in result.stdout


def test_a_file_that_is_there_is_meant_and_not_one_of_its_name(own, tmp_path):
    label = next(label for label, side in sides_of(own).items() if side == 'test')
    (tmp_path / 'elsewhere').mkdir()
    Image.new('RGB', (40, 40), 'green').save(tmp_path / 'elsewhere' / f'{label}_1.jpg')
    words = ('--data_base', own / 'r' / f'{NAME}_data_base.pth', '--data_path', own, '--results_dir', own / 'r',
             '--retrieval_num', 2, '--query_img_name', f'{label}_1.jpg')
    there = type_command(REPOSITORY / 'test.py', *words, cwd=tmp_path / 'elsewhere')
    assert f'{label}_1.jpg (class unknown):' in there.stdout
    assert f'{label}_1.jpg ({label}):' in type_command('test.py', *words).stdout



# ---------------------------------------------------- cache --------------------------------------------------------
@pytest.mark.parametrize('num_workers', [0, 2])
def test_training_reads_the_cache(own, num_workers):
    assert convert(own, '--cache_size', 36).returncode == 0
    result = train(own, '--cache_size', 36, '--num_workers', num_workers, '--remark', 'cached')
    assert result.returncode == 0, result.stderr
    table = pd.read_csv(own / 'r' / f'{NAME}_cached_statistics.csv')
    assert table['args.cache_size'].tolist() == [36]


def test_training_without_the_cache_it_names_stops(own):
    result = train(own, '--cache_size', 999, '--remark', 'cached')
    assert_one_line_error(result, '--cache_size 999', 'there is no cache', 'data_utils.py')
