"""Several runs in one figure, sweeps and tables: what they show is what was measured."""
import math
import shutil

import numpy as np
import pandas as pd
import pytest
from made_runs import points_of, write_run
from PIL import Image
from scipy import stats

import plot
from common.errors import UserError


def join(folder, target):
    """Write the statistics in a folder into one CSV, and return it."""
    tables = [pd.read_csv(path) for path in sorted(folder.glob('*_statistics.csv'))]
    pd.concat(tables).to_csv(target, index=False)
    return target


# ---------------------------------------------------- one run and several -------------------------------------------
def test_pictures_are_written_as_png_and_pdf(tmp_path, call_script):
    path = write_run(tmp_path, 'a_run_with_m0.5', [10.0, 30.0])
    call_script(plot, path)
    call_script(plot, path, '--metric', 'loss', '--output', tmp_path / 'new' / 'x.png')
    for stem in ('a_run_with_m0.5_curves', 'new/x'):
        with Image.open(tmp_path / f'{stem}.png') as image:
            assert min(image.size) > 400
        assert (tmp_path / f'{stem}.pdf').read_bytes().startswith(b'%PDF')


def test_a_picture_of_these_scripts_is_replaced_and_another_file_is_not(tmp_path, call_script):
    path = write_run(tmp_path, 'run', [10.0, 30.0])
    words = (path, '--metric', 'loss', '--output', tmp_path / 'x.png')
    call_script(plot, *words)
    call_script(plot, *words)
    (tmp_path / 'x.pdf').write_text('mine')
    with pytest.raises(UserError, match=r'--output .*x\.pdf'):
        call_script(plot, *words)
    assert (tmp_path / 'x.pdf').read_text() == 'mine'


def test_several_runs_are_named_by_what_differs(tmp_path, figures, call_script):
    paths = [write_run(tmp_path, f'car_resnet50_{loss}_512', [1.0, 2.0]) for loss in ('proxy_nca', 'arc_face')]
    call_script(plot, *paths, '--metric', 'dense_R@1', 'loss')
    recall, loss = figures[0].axes
    assert points_of(recall) == {name: [(1, 1.0), (2, 2.0)] for name in ('proxy_nca_512', 'arc_face_512')}
    assert set(points_of(loss)) == {'proxy_nca_512', 'arc_face_512'}
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ['proxy_nca_512', 'arc_face_512']


def test_twelve_runs_in_one_plot_all_look_different(tmp_path, figures, call_script):
    paths = [write_run(tmp_path, f'run_{index}', [1.0, 2.0]) for index in range(12)]
    call_script(plot, *paths, '--metric', 'loss')
    looks = {(line.get_color(), line.get_marker()) for line in figures[0].axes[0].lines}
    assert len(looks) == 12


# ---------------------------------------------------- sweeps --------------------------------------------------------
SWEPT = {(momentum, seed): 50 * momentum + 3 * seed ** 2 for momentum in (0.1, 0.5, 0.9) for seed in (1, 2, 3)}


def write_sweep(folder, **settings):
    for (momentum, seed), recall in SWEPT.items():
        for loss, offset in (('asymptotic_proxy', 0), ('proxy_nca', 1)):
            write_run(folder, f'{loss}_m{momentum}_seed{seed}', [99.0, recall + offset], momentum=momentum, seed=seed,
                      loss_name=loss, scale=9.0 + offset, **settings)


def test_a_sweep_draws_mean_and_deviation_over_the_seeds(tmp_path, figures, call_script):
    write_sweep(tmp_path)
    printed = call_script(plot, '--sweep', tmp_path)
    lines = points_of(figures[0].axes[0])
    mean = 3 * (1 + 4 + 9) / 3
    for name, offset in (('asymptotic_proxy', 0), ('proxy_nca', 1)):
        assert [x for x, _ in lines[name]] == [0.1, 0.5, 0.9]
        assert [y for _, y in lines[name]] == pytest.approx([50 * m + mean + offset for m in (0.1, 0.5, 0.9)])
    spread = 3 * math.sqrt(((1 - 14 / 3) ** 2 + (4 - 14 / 3) ** 2 + (9 - 14 / 3) ** 2) / 2)
    band = figures[0].axes[0].collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx(45 + mean + spread)
    assert f'{5 + mean:.4g}' in printed
    assert f'{spread:.4g}' in printed
    assert printed.endswith(f'{tmp_path}/sweep_momentum_dense_R@1.png\n')


def test_a_sweep_over_one_csv_is_the_sweep_over_its_runs(tmp_path, figures, call_script):
    (tmp_path / 'runs').mkdir()
    write_sweep(tmp_path / 'runs')
    of_folder = call_script(plot, '--sweep', tmp_path / 'runs').splitlines()
    of_file = call_script(plot, '--sweep', join(tmp_path / 'runs', tmp_path / 'all.csv')).splitlines()
    assert of_file[:-1] == of_folder[:-1]
    assert of_file[-1] == f'{tmp_path}/all_sweep_momentum_dense_R@1.png'


def test_a_sweep_draws_runs_without_a_remark_beside_those_with_one(tmp_path, figures, call_script):
    for remark, offset in ((None, 0), ('cached', 1)):
        for seed in (1, 2):
            write_run(tmp_path, f'{remark}_seed{seed}', [40.0 + offset], momentum=0.5, seed=seed, remark=remark)
    call_script(plot, '--sweep', tmp_path, '--line', 'remark')
    assert sorted(y for points in points_of(figures[0].axes[0]).values() for _, y in points) == [40, 41]


def test_a_sweep_of_the_best_epoch_says_so(tmp_path, figures, call_script):
    write_sweep(tmp_path)
    call_script(plot, '--sweep', tmp_path, '--epoch', 'best')
    axis = figures[0].axes[0]
    assert all(y == 99.0 for line in points_of(axis).values() for _, y in line)
    assert axis.get_ylabel() == 'R@1, dense (%), best epoch'


def test_what_follows_the_setting_that_is_swept_may_differ(tmp_path, figures, call_script):
    for rate in (1e-4, 1e-3):
        write_run(tmp_path, f'r{rate}', [50.0], lr=rate, backbone_lr=rate, proxy_lr=100 * rate, loss_name='a', seed=0)
    call_script(plot, '--sweep', tmp_path, '--over', 'lr')
    assert points_of(figures[0].axes[0])['a'] == [(1e-4, 50.0), (1e-3, 50.0)]


def test_runs_that_differ_in_more_than_the_sweep_are_not_averaged(tmp_path, call_script):
    write_sweep(tmp_path)
    write_run(tmp_path, 'other', [1.0, 2.0], momentum=0.7, seed=1, scale=9.0, batch_size=7)
    with pytest.raises(UserError, match='asymptotic_proxy also differ in batch_size'):
        call_script(plot, '--sweep', tmp_path)


def test_a_sweep_refuses_a_run_that_is_not_finished(tmp_path, call_script):
    write_run(tmp_path, 'half', [1.0, 2.0], num_epochs=3)
    with pytest.raises(UserError, match=r'half_statistics.csv: 2 of 3 epochs.*--resume'):
        call_script(plot, '--sweep', tmp_path)


def test_a_sweep_refuses_the_same_run_twice(tmp_path, call_script):
    write_run(tmp_path, 'one', [1.0])
    write_run(tmp_path, 'two', [2.0])
    with pytest.raises(UserError, match='two_statistics.csv has the loss_name, momentum and seed of another run'):
        call_script(plot, '--sweep', tmp_path)


# ---------------------------------------------------- tables --------------------------------------------------------
RECALLS = {('proxy_nca', 'momentum'): (60.0, 62.0, 61.0), ('proxy_nca', 'positive'): (50.0, 50.5, 50.1),
           ('arc_face', 'momentum'): (70.0, 40.0, 55.0)}


def write_grid(folder, **settings):
    for (loss, update), recalls in RECALLS.items():
        for seed, recall in enumerate(recalls, start=1):
            write_run(folder, f'{loss}_{update}_{seed}', [99.0, recall], loss_name=loss, proxy_update=update,
                      seed=seed, remark=f'x{seed}', **settings)


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


def test_a_table_of_one_csv_is_the_table_of_its_runs(tmp_path, figures, call_script):
    (tmp_path / 'runs').mkdir()
    write_grid(tmp_path / 'runs')
    words = ('--line', 'proxy_update')
    of_folder = call_script(plot, '--table', tmp_path / 'runs', *words).splitlines()
    of_file = call_script(plot, '--table', join(tmp_path / 'runs', tmp_path / 'all.csv'), *words).splitlines()
    assert of_file[:-1] == of_folder[:-1]
    assert (of_folder[-1], of_file[-1]) == (f'{tmp_path}/runs/table_loss_name.png',
                                            f'{tmp_path}/all_table_loss_name.png')


def test_a_table_without_columns_of_one_seed_claims_no_interval(tmp_path, figures, call_script):
    for index, loss in enumerate(('proxy_nca', 'arc_face')):
        write_run(tmp_path, loss, [60.0 + index, 50.0], loss_name=loss, seed=1)
    printed = call_script(plot, '--table', tmp_path, '--epoch', 'best', '--metric', 'dense_R@1')
    assert printed.splitlines()[:4] == ['| loss_name | R@1, dense (%) | seeds |', '|---|---|---|',
                                        '| arc_face | **61.0** | 1 |', '| proxy_nca | 60.0 | 1 |']
    assert figures[0].axes[0].get_xlabel() == 'R@1, dense (%), best epoch'
    assert not np.isnan(figures[0].axes[0].containers[0][2][0].get_segments()[0]).any()


def test_the_least_loss_is_the_best(tmp_path, figures, call_script):
    for index, loss in enumerate(('proxy_nca', 'arc_face')):
        path = write_run(tmp_path, loss, [50.0 + index], loss_name=loss, seed=1)
        pd.read_csv(path).assign(loss=2.0 + index).to_csv(path, index=False)
    printed = call_script(plot, '--table', tmp_path, '--metric', 'loss', 'dense_R@1')
    assert printed.splitlines()[2:4] == ['| proxy_nca | **2.0** | 50.0 | 1 |', '| arc_face | 3.0 | **51.0** | 1 |']


def test_cells_of_different_numbers_of_seeds_say_so(tmp_path, figures, call_script):
    write_grid(tmp_path)
    (tmp_path / 'proxy_nca_positive_3_statistics.csv').unlink()
    printed = call_script(plot, '--table', tmp_path, '--line', 'proxy_update', '--metric', 'dense_R@1')
    assert printed.splitlines()[2].endswith(' | 2 to 3 |')


def test_runs_of_a_cell_that_differ_in_more_than_their_seed_are_not_averaged(tmp_path, call_script):
    write_grid(tmp_path)
    write_run(tmp_path, 'other', [1.0, 2.0], loss_name='proxy_nca', proxy_update='positive', seed=4, batch_size=7)
    with pytest.raises(UserError, match='proxy_nca positive also differ in batch_size'):
        call_script(plot, '--table', tmp_path, '--line', 'proxy_update')


def test_a_setting_that_only_some_runs_have_is_a_difference(tmp_path, call_script):
    write_run(tmp_path, 'one', [1.0], loss_name='arc_face', seed=1, batch_size=64)
    write_run(tmp_path, 'two', [1.0], loss_name='arc_face', seed=2)
    with pytest.raises(UserError, match='arc_face also differ in batch_size'):
        call_script(plot, '--table', tmp_path)


def test_a_table_refuses_the_same_run_twice(tmp_path, call_script):
    for name in ('one', 'two'):
        write_run(tmp_path, name, [1.0], loss_name='proxy_nca', seed=1)
    with pytest.raises(UserError, match='two_statistics.csv has the loss_name and seed of another run'):
        call_script(plot, '--table', tmp_path)


@pytest.mark.parametrize(('words', 'message'), [
    (('--over', 'los'), '--over los is not a setting'), (('--line', 'update'), '--line update is not a setting'),
    (('--over', 'seed', '--line', 'seed'), 'both seed'), (('--metric', 'dense_R@9'), 'dense_R@9')])
def test_what_cannot_be_tabulated_is_one_line(words, message, tmp_path, call_script):
    write_grid(tmp_path)
    with pytest.raises(UserError, match=message):
        call_script(plot, '--table', tmp_path, *words)


# ---------------------------------------------------- mistakes ------------------------------------------------------
def test_a_csv_that_holds_a_run_twice_is_refused(tmp_path, call_script):
    path = write_run(tmp_path, 'run', [1.0])
    shutil.copy(path, tmp_path / 'again_statistics.csv')
    table = join(tmp_path, tmp_path / 'all.csv')
    with pytest.raises(UserError, match=r'all\.csv, run run: an epoch has two rows'):
        call_script(plot, '--table', table)
    with pytest.raises(UserError, match=r'all\.csv holds several runs; draw them with --table or --sweep'):
        call_script(plot, table)


def test_a_csv_whose_runs_have_no_name_is_refused(tmp_path, call_script):
    path = write_run(tmp_path, 'run', [1.0])
    pd.read_csv(path).drop(columns='args.run').to_csv(path, index=False)
    with pytest.raises(UserError, match=r'--table .*run_statistics.csv is no table of runs: .* args\.run'):
        call_script(plot, '--table', path)


@pytest.mark.parametrize(('words', 'parts'), [
    (['{0}', '--metric', 'dense_R@2'], ['dense_R@2', "'dense_R@1'"]),
    (['{0}', '--metric', 'epoch'], ['--metric epoch']),
    (['{0}', '--metric', 'args.seed'], ['--metric args.seed']), ([], ['nothing to draw']),
    (['{0}', '--sweep', '{2}'], ['name one of these']), (['{0}', '{0}'], ['twice']), (['{1}'], ['no statistics file']),
    (['{2}/none.csv'], ['none.csv']), (['--sweep', '{2}/nothing'], ['nothing', '--results_dir']),
    (['--sweep', '{2}', '--over', 'momentun'], ['momentun', "'momentum'"]),
    (['--sweep', '{2}', '--line', 'los'], ['--line los']),
    (['--sweep', '{2}', '--over', 'loss_name', '--line', 'seed'], ['--over loss_name', 'number']),
    (['{0}', '--epoch', 'best'], ['--epoch best', '--sweep']), (['{0}', '--output', 'x.jpg'], ['x.jpg', '.png']),
    (['--sweep', '{2}', '--metric', 'loss', 'lr'], ['one metric'])])
def test_what_cannot_be_drawn_is_one_line(tmp_path, call_script, words, parts):
    good = write_run(tmp_path, 'good', [1.0])
    (tmp_path / 'bad.csv').write_text('these are\nno, statistics, at all\n')
    with pytest.raises(UserError) as error:
        call_script(plot, *[word.format(good, tmp_path / 'bad.csv', tmp_path) for word in words])
    assert all(part in str(error.value) for part in parts), error.value
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('contents', [b'', b'\x89PNG\r\n\x1a\n\xff\xfe', b'epoch\n', b'epoch,loss\nfirst,1\n',
                                      b'epoch,dense_R@1\n1,\n', b'epoch,dense_R@1\n1,often\n',
                                      b'epoch,dense_R@1\ninf,1\n', b'epoch,dense_R@1\n1,inf\n', b'\0' * 40])
def test_a_broken_statistics_file_is_named_in_one_line(tmp_path, call_script, contents):
    path = tmp_path / 'x_statistics.csv'
    path.write_bytes(contents)
    with pytest.raises(UserError, match='x_statistics.csv'):
        call_script(plot, path, '--metric', 'dense_R@1')
