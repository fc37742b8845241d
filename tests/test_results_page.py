"""The pages of results say what the committed statistics say."""
import argparse
import importlib
import re
import sys
from functools import cache
from pathlib import Path

import pandas as pd
import pytest

import plot
from training.summary import mean_and_half_interval

REPOSITORY = Path(__file__).parent.parent


@cache
def measure_recipes():
    """Return the script that measures the runs on equal terms."""
    sys.path.insert(0, str(REPOSITORY / 'benchmarks'))
    try:
        return importlib.import_module('measure_recipes')
    finally:
        sys.path.pop(0)


@cache
def page() -> str:
    return (REPOSITORY / 'docs/ablation.md').read_text(encoding='utf-8')


@cache
def prose() -> str:
    """Return the page in one line."""
    return ' '.join(page().split())


@cache
def last_epochs(table: str) -> pd.DataFrame:
    """Return the last epoch of each committed run of a table, indexed by its remark and seed."""
    rows = pd.read_csv(REPOSITORY / f'results/grid/{table}.csv').groupby('args.run').tail(1)
    return rows.set_index(['args.remark', 'args.seed']).sort_index()


def mean(table: str, name: str, metric: str) -> float:
    return last_epochs(table).loc[name, metric].mean()


def gains(better: tuple[str, str], worse: tuple[str, str], metric: str) -> list[float]:
    """Return how far (table, name) is above another with the seeds 1 to 3, in points."""
    one, other = (last_epochs(table).loc[name, metric] for table, name in (better, worse))
    return [round(one[seed] - other[seed], 1) for seed in (1, 2, 3)]


def test_the_tables_of_the_page_are_those_of_the_committed_files(tmp_path, call_script, monkeypatch):
    commands = re.findall(r'```bash\npython plot\.py (--table [^\n]*)\n```\n\n(\|.*?)\n\n', page(), flags=re.S)
    monkeypatch.setattr(plot, 'draw_table', lambda cells, metrics, epoch, target: target)  # takes half a second
    monkeypatch.chdir(REPOSITORY)
    for index, (words, table) in enumerate(commands):
        printed = call_script(plot, *words.split(), '--output', tmp_path / f'{index}.png')
        assert table == printed.rsplit('\n', 2)[0].strip(), words
    assert len(commands) == page().count('python plot.py --table')
    assert {words.split()[1] for words, _ in commands} == {
        f'results/grid/{path.name}' for path in (REPOSITORY / 'results/grid').glob('*.csv')
        if path.stem not in measure_recipes().MEASURED}


def test_each_way_of_measuring_adds_its_flags_alone():
    script = measure_recipes()
    flags = {way: script.flags_of(way, 'car') for way in script.WAYS}
    large, flip = ['--image_size', '192', '--resize_size', '0'], ['--flip_tta', '1']
    assert flags == {'as trained': [], 'flip': flip, '192 px': large, '192 px, flip': [*large, *flip]}
    assert script.flags_of('192 px', 'cub') == large[:2]


def test_the_tables_on_equal_terms_are_those_of_the_committed_file():
    script = measure_recipes()
    rows = script.read_csv(script.FILE)
    results = (REPOSITORY / 'docs/results.md').read_text(encoding='utf-8')
    tables = dict.fromkeys(row['table'] for row in rows)
    assert tables
    statistics = {table: script.read_csv(REPOSITORY / f'results/grid/{table}.csv') for table in tables}
    for table in tables:
        expected = script.format_stages(rows, statistics) if script.TABLES[table].start_from else \
            script.format_table(rows, statistics[table], table)
        assert expected in results


def test_every_row_on_equal_terms_is_measured_in_every_way_and_was_trained_to_its_last_epoch():
    script = measure_recipes()
    ways = {}
    for row in script.read_csv(script.FILE):
        ways.setdefault((row['table'], row['recipe'], row['seed']), []).append(row['way'])
    assert all(sorted(measured) == sorted(script.ways_of(table)) for (table, *_), measured in ways.items())
    seeds = {}
    for table, recipe, seed in ways:
        if recipe not in script.UNTRAINED:
            assert last_epochs(table).loc[(recipe, int(seed)), 'epoch'] == script.TABLES[table].epochs
            seeds.setdefault((table, recipe), []).append(int(seed))
    assert {tuple(sorted(of_recipe)) for of_recipe in seeds.values()} == {(1, 2, 3)}  # as the page says


def test_a_model_that_is_not_there_is_not_measured_and_the_backbone_once_for_each_data_set(tmp_path):
    script = measure_recipes()
    args = argparse.Namespace(data_path='/photos', weights='w.pth', results_dir=str(tmp_path))
    (run,) = (run for run in script.list_runs('car20', '/photos', 'w.pth', str(tmp_path), None)
              if (run.name, run.seed) == ('proxy_anchor', 2))
    run.files.model.parent.mkdir(parents=True)
    run.files.model.touch()
    measurements = script.list_measurements(args)
    assert {key[:3] for key in measurements} == {('car20', 'proxy_anchor', '2'), *(
        (name, features, '') for name in ('car', 'cub', 'grocery', 'emoji') for features in script.UNTRAINED)}
    assert measurements['car20', 'proxy_anchor', '2', 'flip'] == [
        '--model', str(run.files.model), '--data_path', '/photos', '--flip_tta', '1']
    whitened = ' '.join(measurements['cub', 'whitened on the searched images', '', '192 px'])
    assert whitened == '--pretrained --backbone_type timm:tf_efficientnet_lite0 --image_size 128 --data_name cub ' \
                       '--whiten test --weights w.pth --data_path /photos --image_size 192'


def test_what_is_missing_is_measured_and_what_is_there_is_kept(tmp_path, monkeypatch):
    script, asked = measure_recipes(), []

    def evaluate(*flags):
        asked.append(flags)
        return {'dense': {'R@1': 50.125, 'MAP@R': 20.0}, 'binary': {'R@1': 30.0, 'MAP@R': 10.0}}

    monkeypatch.setattr(script, 'FILE', tmp_path / 'recipes.csv')
    monkeypatch.setattr(script, 'evaluate', evaluate)
    args = argparse.Namespace(data_path='/photos', weights='imagenet', results_dir=str(tmp_path))
    kept = {'table': 'cub', 'recipe': script.BACKBONE, 'seed': '', 'way': 'flip', 'R@1': '1.00', 'MAP@R': '2.00',
            'binary_R@1': '3.00'}
    script.write_csv(script.FILE, script.COLUMNS, [kept])
    rows = script.measure(args)
    assert rows == script.read_csv(script.FILE)
    assert rows[0] == kept
    assert len(rows) == len(asked) + 1 == 4 * len(script.UNTRAINED) * len(script.WAYS)
    assert {(row['R@1'], row['MAP@R'], row['binary_R@1']) for row in rows[1:]} == {('50.12', '20.00', '30.00')}
    assert script.measure(args) == rows
    assert len(asked) == len(rows) - 1


def test_two_seeds_have_a_mean_and_three_an_interval():
    script = measure_recipes()
    assert script.format_mean([1.0, 2.0]) == '1.5'
    assert script.format_mean([1.0, 2.0, 3.0]) == '2.0 ± 2.5'


def test_the_minutes_of_a_recipe_count_the_fastest_epoch_of_each_kind():
    statistics = [{'args.remark': name, 'args.seed': seed, 'args.warm_up': '1', 'epoch': str(epoch), 'seconds': seconds}
                  for name, seed, times in (('a', '1', ('40', '120', '900')), ('a', '2', ('30', '500', '150')),
                                            ('b', '1', ('1', '1', '1')))
                  for epoch, seconds in enumerate(times, start=1)]
    assert measure_recipes().minutes_of(statistics, 'a') == (30 + 120 + 120) / 60


def test_the_readme_says_how_good_the_recipes_are():
    script, readme = measure_recipes(), (REPOSITORY / 'README.md').read_text(encoding='utf-8')
    rows = script.read_csv(script.FILE)
    for title, recipe, way in (
            ('not trained, whitened on the searched images', 'whitened on the searched images', 'as trained'),
            ('the same, 192 px and flip', 'whitened on the searched images', '192 px, flip'),
            ('six epochs of `whitened_mirror`, without flip', 'whitened_mirror', 'as trained'),
            ('the same runs, 192 px and flip', 'whitened_mirror', '192 px, flip')):
        cells = [f'{pd.Series(values).mean():.1f}' for values in (
            [float(row['R@1']) for row in rows if (row['table'], row['recipe'], row['way']) == (table, recipe, way)]
            for table in ('car', 'cub', 'grocery', 'emoji'))]
        assert f'| {title} | {" | ".join(cells)} |' in readme


def test_the_page_says_what_the_whitening_brings():
    script = measure_recipes()
    values = {(row['table'], row['recipe'], row['way']): float(row['R@1']) for row in script.read_csv(script.FILE)}
    gains = {table: sorted(values[table, 'whitened on the searched images', way] - values[table, 'backbone alone', way]
                           for way in script.WAYS) for table in ('car', 'cub', 'grocery')}
    page = ' '.join((REPOSITORY / 'docs/search.md').read_text(encoding='utf-8').split())
    assert f'raises R@1 by {gains["car"][0]:.1f} to {gains["car"][-1]:.1f} points on cars and by ' \
           f'{gains["grocery"][0]:.1f} to {gains["grocery"][-1]:.1f} on groceries, and lowers it by up to ' \
           f'{-gains["cub"][0]:.1f} on birds' in page


def test_the_pages_say_how_far_apart_the_recipes_are():
    script = measure_recipes()
    frame = pd.DataFrame(script.read_csv(script.FILE)).astype({'R@1': float, 'MAP@R': float})
    means = frame.groupby(['way', 'table', 'recipe'])[['R@1', 'MAP@R']].mean()
    results, readme = (' '.join((REPOSITORY / name).read_text(encoding='utf-8').split())
                       for name in ('docs/results.md', 'README.md'))

    def ranked(table: str, metric: str) -> pd.Series:
        """Return the means of the six recipes with flip, worst first."""
        return means.loc['flip', table].loc[list(script.TABLES['car20'].rows), metric].sort_values()

    cars, birds, groceries = (ranked(table, 'R@1') for table in ('car', 'cub', 'grocery'))
    car_map, bird_map, grocery_map = (ranked(table, 'MAP@R') for table in ('car', 'cub', 'grocery'))
    assert cars.index[-1] == car_map.index[-1] == 'whitened_mirror'
    assert f'`whitened_mirror` is {cars.iloc[-1] - cars.iloc[-2]:.1f} points of R@1 above `{cars.index[-2]}`, ' \
           f'and {cars.iloc[-1] - cars.iloc[0]:.1f} above `{cars.index[0]}`' in results
    own = means.loc[:, 'car', 'whitened_mirror']['R@1']
    spread = own['as trained'] - means.loc['as trained', 'car'].loc[list(script.TABLES['car20'].rows), 'R@1'].min()
    assert own['192 px'] - own['as trained'] == pytest.approx(spread, rel=0.2)  # nearly as much
    assert f'192 px alone bring {own["192 px"] - own["as trained"]:.1f} points to `whitened_mirror`, and with flip ' \
           f'{own["192 px, flip"] - own["as trained"]:.1f}.' in results
    intervals = {(way, name): mean_and_half_interval(rows['R@1']) for (way, table, name), rows in
                 frame.groupby(['way', 'table', 'recipe']) if table == 'car'}
    apart = [way for way in script.WAYS if intervals[way, cars.index[-1]][0] - intervals[way, cars.index[-1]][1] >
             sum(intervals[way, cars.index[-2]])]
    assert apart == ['192 px, flip']
    assert 'The intervals of the first two overlap, except at 192 px with flip.' in results
    backbone = means.loc[('flip', 'cub', 'backbone alone')]
    assert f'The recipes lie within {birds.iloc[-1] - birds.iloc[0]:.1f} points of R@1, and the best of them is ' \
           f'{birds.iloc[-1] - backbone["R@1"]:.1f} above the backbone without training' in results
    assert f'from {backbone["MAP@R"]:.1f} to {bird_map.iloc[-1]:.1f} with `{bird_map.index[-1]}`' in results
    assert f'the recipes lie within {groceries.iloc[-1] - groceries.iloc[0]:.1f} points of R@1, and ' \
           f'`{grocery_map.index[-1]}` has the best MAP@R, {grocery_map.iloc[-1]:.1f}, with an ' \
           'interval above all others' in results
    ends = {name: mean_and_half_interval(rows['MAP@R']) for (way, table, name), rows in
            frame.groupby(['way', 'table', 'recipe']) if (way, table) == ('flip', 'grocery') and name in grocery_map}
    best, half = ends.pop(grocery_map.index[-1])
    assert best - half > max(map(sum, ends.values()))
    assert f'`whitened_mirror` is {cars.iloc[-1] - cars.iloc[-2]:.1f} points above the next recipe on cars' in readme
    assert f'on birds and groceries all six are within {birds.iloc[-1] - birds.iloc[0]:.1f} and ' \
           f'{groceries.iloc[-1] - groceries.iloc[0]:.1f}' in readme
    assert f'`{grocery_map.index[-1]}` is better on groceries: {grocery_map.iloc[-1]:.1f}, and `whitened_mirror` ' \
           f'{grocery_map["whitened_mirror"]:.1f}.' in readme
    head, whitened = (means.loc[('flip', 'car', name), 'R@1'] for name in ('head_only', script.WHITENED))
    assert f'on cars it has {head:.1f}, and the whitening without training {whitened:.1f}' in results


def test_the_pages_say_how_the_recipes_end_after_20_epochs():
    script = measure_recipes()
    frame = pd.DataFrame(script.read_csv(script.FILE)).astype({'R@1': float, 'MAP@R': float, 'binary_R@1': float})
    flip = frame[frame['way'] == 'flip'].set_index(['table', 'recipe'])
    means = flip[['R@1', 'MAP@R', 'binary_R@1']].groupby(level=[0, 1]).mean()
    own, anchor = (means.loc['car20', name] for name in ('whitened_mirror', 'proxy_anchor'))
    results, readme = (' '.join((REPOSITORY / name).read_text(encoding='utf-8').split())
                       for name in ('docs/results.md', 'README.md'))
    gains = (means.loc['car20', 'R@1'] - means.loc['car', 'R@1']).dropna().sort_values()
    assert list(gains.index.sort_values()) == sorted(script.TABLES['car20'].rows)
    assert f'between {gains.iloc[0]:.1f} points of R@1 (`{gains.index[0]}`) and {gains.iloc[-1]:.1f} ' \
           f'(`{gains.index[-1]}`)' in results
    lead = (means.loc['car', 'whitened_mirror'] - means.loc['car', 'proxy_anchor'])['R@1']
    assert f'which was {lead:.1f} points of R@1 behind `whitened_mirror` after six epochs, is level with it: ' \
           f'{anchor["R@1"]:.1f} and {own["R@1"]:.1f}, and {own["MAP@R"]:.1f} in MAP@R both' in results
    assert f'{anchor["MAP@R"]:.1f}' == f'{own["MAP@R"]:.1f}'
    assert f'stays {own["binary_R@1"] - anchor["binary_R@1"]:.1f} points ahead in binary codes' in results
    behind = own['R@1'] - means.loc['car20', 'R@1'].drop(['whitened_mirror', 'proxy_anchor']).sort_values()
    assert behind.index[-1] == 'positive_proxy'
    assert f'is {behind.iloc[-1]:.1f} points behind, and the other three are {behind.iloc[-2]:.1f} to ' \
           f'{behind.iloc[0]:.1f} behind, all with intervals apart from its own' in results
    intervals = {name: mean_and_half_interval(flip.loc[('car20', name), 'R@1'])
                 for name in ('whitened_mirror', *behind.index)}
    mean_of_own, half_of_own = intervals.pop('whitened_mirror')
    assert all(sum(interval) < mean_of_own - half_of_own for interval in intervals.values())
    assert f'after six epochs on cars it is {lead:.1f} points of R@1 above `proxy_anchor`' in readme


def test_the_pages_say_which_recipe_is_better_on_many_classes():
    script = measure_recipes()
    frame = pd.DataFrame(script.read_csv(script.FILE)).astype({'R@1': float, 'MAP@R': float})
    flip = frame[(frame['way'] == 'flip') & (frame['table'] == 'emoji')].set_index('recipe')[['R@1', 'MAP@R']]
    means = flip.groupby(level=0).mean()
    gains = means.loc['proxy_anchor'] - means.loc['whitened_mirror']
    backbone = means.loc['backbone alone', 'R@1']
    results, readme = (' '.join((REPOSITORY / name).read_text(encoding='utf-8').split())
                       for name in ('docs/results.md', 'README.md'))
    assert f'`proxy_anchor` is {gains["R@1"]:.1f} points of R@1 and {gains["MAP@R"]:.1f} of MAP@R above ' \
           '`whitened_mirror`; the intervals of R@1 overlap, those of MAP@R are apart' in results
    for metric, are_apart in (('R@1', False), ('MAP@R', True)):
        (high, high_half), (low, low_half) = (mean_and_half_interval(flip.loc[name, metric])
                                              for name in ('proxy_anchor', 'whitened_mirror'))
        assert (high - high_half > low + low_half) == are_apart
    anchor, momentum = means.loc['proxy_anchor'], means.loc['momentum_proxy']
    assert f'`proxy_anchor` and `momentum_proxy` are level: {anchor["R@1"]:.1f} and {momentum["R@1"]:.1f}, and ' \
           f'{anchor["MAP@R"]:.1f} and {momentum["MAP@R"]:.1f} in MAP@R' in results
    trained = means.loc[list(script.TABLES['car20'].rows), 'R@1'].sort_values()
    assert list(trained.index[3:]) == ['whitened_mirror', 'momentum_proxy', 'proxy_anchor']
    behind = trained['whitened_mirror'] - trained.iloc[:3]
    assert f'The other three recipes are {behind.min():.1f} to {behind.max():.1f} points of R@1 below ' \
           '`whitened_mirror`' in results
    head, whitened = (means.loc[name, 'R@1'] - backbone for name in ('head_only', script.WHITENED))
    assert f'Training brings {anchor["R@1"] - backbone:.1f} points of R@1 to the backbone, training the head alone ' \
           f'{head:.1f}, and the whitening without training {whitened:.1f}.' in results
    assert f'{gains["R@1"]:.1f} points above it' in readme


def test_the_pages_say_what_a_last_stage_brings():
    script = measure_recipes()
    frame = pd.DataFrame(script.read_csv(script.FILE)).astype({'R@1': float, 'MAP@R': float})
    means = frame[frame['way'] == '192 px, flip'].groupby(['table', 'recipe'])[['R@1', 'MAP@R']].mean()
    gains = means.loc['car20_192'] - means.loc['car20']
    anchor, own = gains.loc['proxy_anchor'], gains.loc['whitened_mirror']
    results, readme = (' '.join((REPOSITORY / name).read_text(encoding='utf-8').split())
                       for name in ('docs/results.md', 'README.md'))
    assert f'brings {anchor["R@1"]:.1f} points of R@1 and {anchor["MAP@R"]:.1f} of MAP@R to `proxy_anchor`' in results
    assert f'and {own["R@1"]:.1f} and {own["MAP@R"]:.1f} to `whitened_mirror`' in results
    assert f'[gain another {own["R@1"]:.1f} to {anchor["R@1"]:.1f} points]' in readme
    for recipe in gains.dropna().index:
        last, before = (script.minutes_of(script.read_csv(REPOSITORY / f'results/grid/{table}.csv'), recipe)
                        for table in ('car20_192', 'car20'))
        assert last / before == pytest.approx(0.5, abs=0.06)  # half as much again


def test_the_page_says_what_an_epoch_without_a_measurement_saves():
    rows = pd.read_csv(REPOSITORY / 'results/grid/car.csv')
    seconds = list(rows[rows['args.recipe'].eq('proxy_anchor') & rows['args.seed'].eq(1)]['seconds'])
    text = ' '.join((REPOSITORY / 'docs/performance.md').read_text(encoding='utf-8').split())
    assert f'take {min(seconds[1:5]):.0f} to {max(seconds[1:5]):.0f} s, and the last one, which also measures 2,042 ' \
           f'test images, {seconds[5]:.0f} s: an epoch that is not measured is ' \
           f'{100 - 100 * sum(seconds[1:5]) / 4 / seconds[5]:.0f} % shorter' in text


@pytest.mark.parametrize(('table', 'name', 'best', 'words'), [
    ('long', 'whitened_mirror', 'proxy_anchor', '`whitened_mirror` is {} points above `proxy_anchor`, the best of the '
     'systems in the table, and {} in binary codes'),
    ('long', 'whitened_start', 'proxy_anchor', '`whitened_start` is {} and {} points above it')])
def test_the_page_says_how_far_a_recipe_is_above_the_best_of_the_five(table, name, best, words):
    differences = [f'{mean(table, name, metric) - mean(table, best, metric):.1f}'
                   for metric in ('dense_R@1', 'binary_R@1')]
    assert words.format(*differences) in prose()


def test_the_page_says_how_the_lead_shrinks():
    rows = pd.read_csv(REPOSITORY / 'results/grid/long.csv')
    curves = rows[rows['args.seed'] <= 3].groupby(['args.remark', 'epoch'])['dense_R@1'].mean()
    own, other = curves['whitened_start'], curves['proxy_anchor']
    epochs = (1, 2, 4, 6, 8, 10, 14, 20)
    for name in ('whitened_start', 'proxy_anchor', 'positive_proxy'):
        assert f'| `{name}` | {" | ".join(f"{curves[name][epoch]:.1f}" for epoch in epochs)} |' in page()
    assert f'a lead of {own[6] - other[6]:.1f} points after six epochs shrink to {own[20] - other[20]:.1f}?' in prose()
    first, second, third = (other.index[other >= own[epoch]][0] for epoch in (2, 6, 10))
    assert f'`proxy_anchor` needs {first}, {second} and {third} epochs for the R@1 that `whitened_start` has after ' \
           '2, 6 and 10' in prose()


@pytest.mark.parametrize(('row', 'words'), [
    ('without-whitening', 'above itself without whitening'), ('without-means', 'without the means'),
    ('without-both', 'without both'), ('without-small-batches', 'in batches of 120'),
    ('without-rate-and-schedule', 'above itself at a rate of 1e-4 halved every 3 epochs'),
    ('positive_proxy', 'above `positive_proxy`'), ('with-gem', 'more on these cars')])
def test_the_page_says_what_each_part_of_whitened_start_brings(row, words):
    better, worse = ('with-gem', 'whitened_start') if row == 'with-gem' else ('whitened_start', row)
    low, *_, high = sorted(gains(('ablation', better), ('ablation', worse), 'val_dense_R@1'))
    assert re.search(rf'{low} to {high} (points )?{re.escape(words)}', prose())


def test_the_table_of_pretrained_backbones_is_that_of_the_committed_files():
    script = measure_recipes()
    page = (REPOSITORY / 'docs/search.md').read_text(encoding='utf-8')
    assert script.format_comparison(script.read_csv(script.FILE)) in page
