"""Tables over seeds: their numbers, their figure, and that the page of results holds what the committed files say."""
import math
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from test_pictures import write_run

import plot
from engine.errors import UserError
from settings import get_runs

REPOSITORY = Path(__file__).parent.parent
RECALLS = {('proxy_nca', 'momentum'): (60.0, 62.0, 61.0), ('proxy_nca', 'positive'): (50.0, 50.5, 50.1),
           ('arc_face', 'momentum'): (70.0, 40.0, 55.0)}


def write_grid(folder, **settings):
    for (loss, rule), recalls in RECALLS.items():
        for seed, recall in enumerate(recalls, start=1):
            write_run(folder, f'{loss}_{rule}_{seed}', [99.0, recall], loss_name=loss, proxy_update=rule, seed=seed,
                      remark=f'x{seed}', **settings)


def half_interval(values):
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return stats.t.ppf(0.975, len(values) - 1) * deviation / math.sqrt(len(values))


def test_a_table_holds_mean_and_half_of_the_interval_over_seeds(tmp_path, figures, call_script):
    write_grid(tmp_path)
    printed = call_script(plot, '--table', tmp_path, '--line', 'proxy_update', '--metric', 'dense_R@1')
    halves = {cell: half_interval(recalls) for cell, recalls in RECALLS.items()}
    nca = halves['proxy_nca', 'momentum'], halves['proxy_nca', 'positive']
    assert printed.splitlines()[:4] == [
        '| loss_name | momentum: R@1, dense (%) | positive: R@1, dense (%) | seeds |', '|---|---|---|---|',
        f'| proxy_nca | **61.0 ± {nca[0]:.1f}** | 50.2 ± {nca[1]:.1f} | 3 |',
        f'| arc_face | 55.0 ± {halves["arc_face", "momentum"]:.1f} |  | 3 |']
    axis = figures[0].axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ['arc_face', 'proxy_nca']
    drawn = {line.get_label(): line for line in axis.containers}
    assert list(drawn['momentum'][0].get_xdata()) == [61.0, 55.0]
    low, high = drawn['momentum'][2][0].get_segments()[0][:, 0]
    assert (low, high) == pytest.approx((61 - nca[0], 61 + nca[0]))


def test_a_table_without_columns_of_one_seed_claims_no_interval(tmp_path, figures, call_script):
    for number, loss in enumerate(('proxy_nca', 'arc_face')):
        write_run(tmp_path, loss, [60.0 + number, 50.0], loss_name=loss, seed=1)
    printed = call_script(plot, '--table', tmp_path, '--epoch', 'best', '--metric', 'dense_R@1')
    assert printed.splitlines()[:4] == ['| loss_name | R@1, dense (%) | seeds |', '|---|---|---|',
                                        '| arc_face | **61.0** | 1 |', '| proxy_nca | 60.0 | 1 |']
    assert figures[0].axes[0].get_xlabel() == 'R@1, dense (%), best epoch'
    assert not np.isnan(figures[0].axes[0].containers[0][2][0].get_segments()[0]).any()


def test_the_least_loss_is_the_best(tmp_path, figures, call_script):
    for number, loss in enumerate(('proxy_nca', 'arc_face')):
        write_run(tmp_path, loss, [50.0 + number], loss_name=loss, seed=1)
        path = tmp_path / f'{loss}_statistics.csv'
        pd.read_csv(path).assign(loss=2.0 + number).to_csv(path, index=False)
    printed = call_script(plot, '--table', tmp_path, '--metric', 'loss', 'dense_R@1')
    assert printed.splitlines()[2:4] == ['| proxy_nca | **2.0** | 50.0 | 1 |', '| arc_face | 3.0 | **51.0** | 1 |']


def test_runs_of_a_cell_that_differ_in_more_than_their_seed_are_not_averaged(tmp_path, call_script):
    write_grid(tmp_path)
    write_run(tmp_path, 'other', [1.0, 2.0], loss_name='proxy_nca', proxy_update='positive', seed=4, batch_size=7)
    with pytest.raises(UserError, match='proxy_nca positive differ in batch_size'):
        call_script(plot, '--table', tmp_path, '--line', 'proxy_update')


def test_a_run_from_before_there_was_a_setting_did_as_without_it(tmp_path, call_script):
    write_grid(tmp_path)
    write_run(tmp_path, 'later', [1.0, 50.5], loss_name='arc_face', proxy_update='momentum', seed=4,
              linear_init='random')
    half = half_interval([*RECALLS['arc_face', 'momentum'], 50.5])
    assert f'| arc_face | 53.9 ± {half:.1f} |' in call_script(plot, '--table', tmp_path, '--line', 'proxy_update')
    (tmp_path / 'two').mkdir()
    write_run(tmp_path / 'two', 'old', [50.5], loss_name='arc_face', seed=1)
    write_run(tmp_path / 'two', 'new', [60.5], loss_name='arc_face', seed=1, linear_init='whiten')
    assert '| random | 50.5 |' in call_script(plot, '--table', tmp_path / 'two', '--over', 'linear_init')
    write_run(tmp_path, 'other', [1.0, 50.5], loss_name='arc_face', proxy_update='momentum', seed=5,
              linear_init='whiten')
    with pytest.raises(UserError, match='arc_face momentum differ in linear_init'):
        call_script(plot, '--table', tmp_path, '--line', 'proxy_update')


def test_a_setting_that_is_missing_for_another_reason_is_not_made_up(tmp_path, call_script):
    write_run(tmp_path, 'one', [1.0], loss_name='arc_face', seed=1, batch_size=64)
    write_run(tmp_path, 'two', [1.0], loss_name='arc_face', seed=2)
    with pytest.raises(UserError, match='arc_face differ in batch_size'):
        call_script(plot, '--table', tmp_path)


def test_numbers_of_held_out_classes_are_named_so():
    assert plot.title_of('val_binary_R@1') == 'R@1, binary, held out classes (%)'
    assert plot.title_of('dense_R@2') == 'R@2, dense (%)'


@pytest.mark.parametrize(('words', 'message'), [
    (('--over', 'los'), '--over los is no setting'), (('--line', 'rule'), '--line rule is no setting'),
    (('--over', 'seed', '--line', 'seed'), 'both seed'), (('--metric', 'dense_R@9'), 'dense_R@9')])
def test_what_cannot_be_tabulated_is_one_line(words, message, tmp_path, call_script):
    write_grid(tmp_path)
    with pytest.raises(UserError, match=message):
        call_script(plot, '--table', tmp_path, *words)


def test_the_same_run_twice_is_refused(tmp_path, call_script):
    for name in ('one', 'two'):
        write_run(tmp_path, name, [1.0], loss_name='proxy_nca', seed=1)
    with pytest.raises(UserError, match='two_statistics.csv has the loss_name and seed of another run'):
        call_script(plot, '--table', tmp_path)


def test_the_page_of_results_holds_what_the_committed_files_say(tmp_path, call_script, monkeypatch):
    page = (REPOSITORY / 'docs/results.md').read_text(encoding='utf-8')
    commands = re.findall(r'```bash\npython plot\.py (--table [^\n]*)\n```\n\n(\|.*?)\n\n', page, flags=re.S)
    monkeypatch.chdir(REPOSITORY)
    for number, (words, table) in enumerate(commands):
        printed = call_script(plot, *words.split(), '--output', tmp_path / f'{number}.png')
        assert table == printed.rsplit('\n', 2)[0].strip(), words
    assert len(commands) == page.count('python plot.py --table')


def differing(one: dict, other: dict) -> set:
    return {name for name in one if one[name] != other[name]} - {'run', 'remark', 'results_dir', 'given'}


def test_every_run_of_the_grid_is_one_that_train_py_takes_and_the_one_of_its_name():
    result = subprocess.run(['make', '-n', 'results'], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    lines = [line.split('train.py ')[1].split(' $(ls')[0] for line in result.stdout.splitlines()
             if 'train.py' in line]
    runs = {(args.results_dir, args.remark, args.seed): args for args in (
        get_runs(shlex.split(line))[1][0] for line in lines)}
    assert len(runs) == len(lines) == 5 * 3 + 5 * 3 + 3 * 5 + (6 * 3 + 1) * 3 + 3 + 4 * 3 + 5 + 1 + 13 * 3 + 4 * 3
    starts = {'without-whitening': {'linear_init'}, 'without-means': {'proxy_init'},
              'without-both': {'linear_init', 'proxy_init'}, 'without-small-batches': {'batch_size'},
              'with-gem': {'pooling'},
              'without-rate-and-schedule': {'lr', 'trunk_lr', 'proxy_lr', 'lr_schedule', 'lr_decay_step'}}
    margins = {'without-margin': {'loss_name', 'base_loss', 'margin', 'temperature'},
               'without-large-crops': {'min_crop'}, 'without-batches-of-32': {'batch_size'},
               'with-colors': {'color_jitter', 'grayscale'}}
    whole = {}
    for folder, recipe, changed in (('ablation', 'whitened_start', starts), ('margin', 'whitened_margin', margins)):
        whole[recipe] = vars(runs[f'results/grid/{folder}', recipe, 1])
        assert (whole[recipe]['recipe'], whole[recipe]['val_ratio']) == (recipe, 0.4)
        for row, names in changed.items():
            assert differing(whole[recipe], vars(runs[f'results/grid/{folder}', row, 1])) == names
    assert differing(*whole.values()) - {'recipe'} == set.union(*margins.values()) - margins['with-colors']
    assert differing(*(vars(runs['results/grid/long', f'whitened_{kind}', 1]) for kind in ('start', 'mirror'))) == {
        'recipe', 'mirror'}
    for (folder, name, _), args in runs.items():
        if folder.endswith('rules'):
            assert (args.loss_name, args.proxy_update) == tuple(name.split('-'))
        if folder.endswith('arc_face'):
            assert (args.scale, args.proxy_lr) == tuple(map(float, name.split('-')))
        if not folder.endswith(('recipes', 'rules', 'arc_face')):
            small = args.recipe == 'whitened_margin' and name != 'without-batches-of-32'
            assert args.batch_size == (120 if name == 'without-small-batches' else 32 if small else 64)
        if folder.endswith(('recipes', 'own', 'long', 'check')):
            assert args.recipe == name
        assert args.data_name == ('cub' if folder.endswith('check') else 'car')


@pytest.mark.parametrize(('statistics', 'checkpoints', 'expected'), [
    ([7], 0, ''), ([6], 0, '--overwrite'), ([6], 1, '--resume'), ([], 1, '--resume'), ([4, 4], 0, '--overwrite'),
    ([4, 4], 2, '--resume'), ([4, 7], 0, '')])
def test_make_results_keeps_a_finished_run_and_goes_on_with_one_that_was_cut_off(tmp_path, statistics, checkpoints,
                                                                                expected):
    folder = tmp_path / 'results/grid/own'
    folder.mkdir(parents=True)
    for number, lines in enumerate(statistics):
        (folder / f'run{number}_seed4_positive_proxy_statistics.csv').write_text('line\n' * lines)
    (folder / 'run_seed14_positive_proxy_statistics.csv').write_text('line\n' * 7)
    for number in range(checkpoints):
        (folder / f'run{number}_seed4_positive_proxy_checkpoint.pth').touch()
    (tmp_path / 'python').write_text('#!/bin/sh\necho ${@##*/}')
    (tmp_path / 'python').chmod(0o755)
    result = subprocess.run(['make', '--no-print-directory', '-f', REPOSITORY / 'Makefile', '-o', 'cache-car',
                             f'BIN={tmp_path}', 'own/positive_proxy.4'], cwd=tmp_path, capture_output=True, text=True,
                            check=True)
    assert result.stdout.split()[-1:] == ([expected] if expected else [])


def test_make_results_refuses_a_seed_that_names_do_not_say():
    result = subprocess.run(['make', '-n', 'own/positive_proxy.0'], cwd=REPOSITORY, capture_output=True, text=True,
                            check=False)
    assert result.returncode == 2
    assert 'begin with 1' in result.stderr


def last_epochs(folder: str, metric: str) -> dict:
    """Return {(remark, seed): metric in the last epoch} of the committed runs of a folder of the grid."""
    rows = [pd.read_csv(path).iloc[-1] for path in (REPOSITORY / 'results/grid' / folder).glob('*_statistics.csv')]
    return {(row['args.remark'], row['args.seed']): row[metric] for row in rows}


def test_the_readme_says_of_the_recipes_what_the_committed_files_say():
    text = re.search(r'\*\*Which to take:.*?\n\n', (REPOSITORY / 'README.md').read_text(), flags=re.S)[0]
    expected = []
    for folder, recipe in (('own', 'whitened_mirror'), ('long', 'whitened_mirror'), ('own', 'positive_proxy'),
                           ('long', 'proxy_anchor')):
        recalls = [value for (name, _), value in last_epochs(folder, 'dense_R@1').items() if name == recipe]
        expected.append(f'{sum(recalls) / len(recalls):.1f}')
    assert re.findall(r'\d\d\.\d', text) == expected


def test_the_page_says_how_far_the_recipes_are_above_the_best_of_the_five():
    page = ' '.join((REPOSITORY / 'docs/results.md').read_text(encoding='utf-8').split())

    def gains(folder: str, recipe: str, best: str) -> list[str]:
        means = [{name: pd.Series({key: value for key, value in last_epochs(folder, metric).items()
                                   if key[0] == name}).mean() for name in (recipe, best)}
                 for metric in ('dense_R@1', 'binary_R@1')]
        return [f'{mean[recipe] - mean[best]:.1f}' for mean in means]

    for folder, recipe, best, words in (
            ('own', 'whitened_mirror', 'positive_proxy', '{} points above the best of the five, and {} in'),
            ('own', 'whitened_margin', 'positive_proxy', '`whitened_margin` {} and {}'),
            ('own', 'whitened_start', 'positive_proxy', '`whitened_start` {} and {}, the intervals apart'),
            ('long', 'whitened_mirror', 'proxy_anchor', '{} points above it, and {} in binary codes'),
            ('long', 'whitened_start', 'proxy_anchor', '`whitened_start` {} and {}:')):
        assert words.format(*gains(folder, recipe, best)) in page


def test_the_page_says_how_far_whitened_margin_is_above_whitened_start_on_held_out_classes():
    page = ' '.join((REPOSITORY / 'docs/results.md').read_text(encoding='utf-8').split())
    for metric, words in (('dense', ' points of dense R@1'), ('binary', ' in binary codes')):
        margin, start = (last_epochs(folder, f'val_{metric}_R@1') for folder in ('margin', 'ablation'))
        gains = [f'{margin["whitened_margin", seed] - start["whitened_start", seed]:.1f}' for seed in (1, 2, 3)]
        assert f'{gains[0]}, {gains[1]} and {gains[2]}{words}' in page


def test_the_page_says_of_the_parts_of_whitened_margin_what_the_committed_files_say():
    page = ' '.join((REPOSITORY / 'docs/results.md').read_text(encoding='utf-8').split())
    for metric, better, worse, words in (
            ('dense', 'whitened_margin', 'without-large-crops', 'large crops account for {} to {} points of dense R@1'),
            ('dense', 'whitened_margin', 'without-batches-of-32', 'the batches of 32 for {} to {},'),
            ('dense', 'whitened_margin', 'without-margin', 'the margin for {} to {},'),
            ('binary', 'without-margin', 'whitened_margin', 'and it costs {} to {} in binary codes'),
            ('dense', 'with-colors', 'whitened_margin', 'Colours change dense R@1 by {} to {} points'),
            ('binary', 'with-colors', 'whitened_margin', 'and binary codes by {} to {}.')):
        recalls = last_epochs('margin', f'val_{metric}_R@1')
        gains = sorted(round(recalls[better, seed] - recalls[worse, seed], 1) for seed in (1, 2, 3))
        assert words.format(gains[0], gains[-1]) in page, gains


def test_the_page_says_of_the_parts_of_whitened_start_what_the_committed_files_say():
    page = ' '.join((REPOSITORY / 'docs/results.md').read_text(encoding='utf-8').split())
    recalls = last_epochs('ablation', 'val_dense_R@1')
    for row, words in (('without-whitening', 'above itself without whitening'), ('without-means', 'without the means'),
                       ('without-both', 'without both'), ('without-small-batches', 'in batches of 120'),
                       ('without-rate-and-schedule', 'at a rate of 1e-4 halved every 3 epochs'),
                       ('positive_proxy', 'above `positive_proxy`'), ('with-gem', 'more on these cars')):
        better, worse = ('with-gem', 'whitened_start') if row == 'with-gem' else ('whitened_start', row)
        gains = sorted(round(recalls[better, seed] - recalls[worse, seed], 1) for seed in (1, 2, 3))
        assert re.search(rf'{gains[0]} to {gains[-1]} (points (of dense R@1 )?)?{re.escape(words)}', page), (row, gains)
