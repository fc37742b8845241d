"""The pages of results say what the committed statistics say."""
import importlib
import re
import sys
from functools import cache
from pathlib import Path

import pandas as pd
import pytest

import plot

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
    rows = script.read_csv(REPOSITORY / 'results/recipes.csv')
    results = (REPOSITORY / 'docs/results.md').read_text(encoding='utf-8')
    tables = dict.fromkeys(row['table'] for row in rows)
    assert tables
    for table in tables:
        assert script.format_table(rows, table) in results


def test_the_readme_says_how_good_the_recipes_are():
    script, readme = measure_recipes(), (REPOSITORY / 'README.md').read_text(encoding='utf-8')
    pretrained, rows = (script.read_csv(file) for file in (script.PRETRAINED, script.FILE))
    names = ('car', 'cub', 'grocery')
    lines = {'not trained, whitened on the searched images': [
        row['R@1'] for name in names for row in pretrained
        if (row['data_name'], row['features']) == (name, 'whitened on the searched images')]}
    titles = {'as trained': 'six epochs of `whitened_mirror`', '192 px, flip': 'the same, 192 px and flip'}
    for way, title in titles.items():
        lines[title] = [row['R@1'] for name in names for row in rows if (
            row['table'], row['recipe'], row['seed'], row['way']) == (name, 'whitened_mirror', '1', way)]
    for title, values in lines.items():
        assert len(values) == 3
        assert f'| {title} | {" | ".join(f"{float(value):.1f}" for value in values)} |' in readme


def test_the_pages_say_how_far_apart_the_recipes_are():
    script = measure_recipes()
    values = pd.DataFrame(script.read_csv(script.FILE)).set_index(['way', 'table', 'recipe', 'seed'])
    values = values[['R@1', 'MAP@R']].astype(float).groupby(['way', 'table', 'recipe']).mean()
    results, readme = (' '.join((REPOSITORY / name).read_text(encoding='utf-8').split())
                       for name in ('docs/results.md', 'README.md'))
    leads = {}
    for table, best in (('car', 'whitened_mirror'), ('cub', 'proxy_anchor')):
        ranked = values.loc['flip', table]['R@1'].sort_values()
        assert ranked.index[-1] == best
        leads[table] = f'{ranked.iloc[-1] - ranked.iloc[-2]:.1f}'
    groceries = values.loc['flip', 'grocery']
    spread, maps = f'{groceries["R@1"].max() - groceries["R@1"].min():.1f}', groceries['MAP@R'].sort_values()
    assert f'`whitened_mirror` leads on cars by {leads["car"]} points of R@1 and `proxy_anchor` on birds by ' \
           f'{leads["cub"]}; on groceries all lie within {spread} points, and `{maps.index[-1]}` has the best ' \
           f'MAP@R by {maps.iloc[-1] - maps.iloc[-2]:.1f}.' in results
    assert f'`whitened_mirror` leads on cars by {leads["car"]} points and `proxy_anchor` on birds by ' \
           f'{leads["cub"]}, while on groceries all are within {spread};' in readme
    larger = [values.loc[(way, 'car', 'whitened_mirror'), 'R@1'] for way in ('as trained', '192 px, flip')]
    assert f'On cars, flip and 192 px together bring {larger[1] - larger[0]:.1f} points' in results


def test_the_page_says_what_an_epoch_without_a_measurement_saves():
    rows = pd.read_csv(REPOSITORY / 'results/grid/car.csv')
    seconds = list(rows[rows['args.recipe'].eq('proxy_anchor') & rows['args.seed'].eq(1)]['seconds'])
    text = ' '.join((REPOSITORY / 'docs/performance.md').read_text(encoding='utf-8').split())
    assert f'take {min(seconds[1:5]):.0f} to {max(seconds[1:5]):.0f} s, and the last one, which also measures 2,042 ' \
           f'test images, {seconds[5]:.0f} s: an epoch that is not measured is ' \
           f'{100 - 100 * sum(seconds[1:5]) / 4 / seconds[5]:.0f} % shorter' in text


@pytest.mark.parametrize(('table', 'name', 'best', 'words'), [
    ('own', 'whitened_mirror', 'positive_proxy', '{} points above the best of the five, and {} in'),
    ('own', 'whitened_margin', 'positive_proxy', '`whitened_margin` {} and {}'),
    ('own', 'whitened_start', 'positive_proxy', '`whitened_start` {} and {}, the intervals apart'),
    ('long', 'whitened_mirror', 'proxy_anchor', '{} points above it, and {} in binary codes'),
    ('long', 'whitened_start', 'proxy_anchor', '`whitened_start` {} and {}:')])
def test_the_page_says_how_far_a_recipe_is_above_the_best_of_the_five(table, name, best, words):
    differences = [f'{mean(table, name, metric) - mean(table, best, metric):.1f}'
                   for metric in ('dense_R@1', 'binary_R@1')]
    assert words.format(*differences) in prose()


@pytest.mark.parametrize(('metric', 'words'), [('val_dense_R@1', ' points of dense R@1'),
                                               ('val_binary_R@1', ' in binary codes')])
def test_the_page_says_how_far_whitened_margin_is_above_whitened_start(metric, words):
    first, second, third = gains(('margin', 'whitened_margin'), ('ablation', 'whitened_start'), metric)
    assert f'{first}, {second} and {third}{words}' in prose()


@pytest.mark.parametrize(('metric', 'better', 'worse', 'words'), [
    ('dense', 'whitened_margin', 'without-large-crops', 'large crops account for {} to {} points of dense R@1'),
    ('dense', 'whitened_margin', 'without-batches-of-32', 'the batches of 32 for {} to {},'),
    ('dense', 'whitened_margin', 'without-margin', 'the margin for {} to {},'),
    ('binary', 'without-margin', 'whitened_margin', 'and it costs {} to {} in binary codes'),
    ('dense', 'with-colors', 'whitened_margin', 'Colours change dense R@1 by {} to {} points'),
    ('binary', 'with-colors', 'whitened_margin', 'and binary codes by {} to {}.')])
def test_the_page_says_what_each_part_of_whitened_margin_brings(metric, better, worse, words):
    low, *_, high = sorted(gains(('margin', better), ('margin', worse), f'val_{metric}_R@1'))
    assert words.format(low, high) in prose()


@pytest.mark.parametrize(('row', 'words'), [
    ('without-whitening', 'above itself without whitening'), ('without-means', 'without the means'),
    ('without-both', 'without both'), ('without-small-batches', 'in batches of 120'),
    ('without-rate-and-schedule', 'at a rate of 1e-4 halved every 3 epochs'),
    ('positive_proxy', 'above `positive_proxy`'), ('with-gem', 'more on these cars')])
def test_the_page_says_what_each_part_of_whitened_start_brings(row, words):
    better, worse = ('with-gem', 'whitened_start') if row == 'with-gem' else ('whitened_start', row)
    low, *_, high = sorted(gains(('ablation', better), ('ablation', worse), 'val_dense_R@1'))
    assert re.search(rf'{low} to {high} (points (of dense R@1 )?)?{re.escape(words)}', prose())


def test_the_table_of_pretrained_backbones_is_that_of_the_committed_files():
    script = measure_recipes()
    rows = [script.read_csv(file) for file in (script.PRETRAINED, script.FILE)]
    assert script.format_comparison(*rows) in (REPOSITORY / 'docs/search.md').read_text(encoding='utf-8')
