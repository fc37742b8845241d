"""Measure the recipes on equal terms, and the backbone without training: the tables of docs/results.md.

    python benchmarks/reproduce.py car cub grocery emoji car20 car20_192 --data_path /home/data   # trains them
    python benchmarks/measure_recipes.py --data_path /home/data

Each model in results/grid/TABLE is measured as it was trained, with flip augmentation, with larger images, and with
both, by evaluate.py; so is the backbone without training, alone and whitened. Their R@1, MAP@R and R@1 of the binary
codes are added to results/recipes.csv; what is there is not measured again: to measure anew, remove the file. At the
end the tables are printed in Markdown.
"""
import argparse
from pathlib import Path
from statistics import mean

from bench_common import REPOSITORY, evaluate, read_csv, write_csv  # first: it finds the modules of the repository
from reproduce import TABLES, list_runs
from utils import Parser, run_script, user_path

FILE = REPOSITORY / 'results/recipes.csv'
MEASURED = ('car', 'cub', 'grocery', 'emoji', 'car20', 'car20_192')
# At 192 px, cars are squeezed to the square as a whole, birds and groceries are cropped: chosen on held-out training
# classes. Emoji are square.
LARGE = {'car': '--image_size 192 --resize_size 0', 'cub': '--image_size 192', 'grocery': '--image_size 192',
         'emoji': '--image_size 192 --resize_size 0'}
WAYS = ('as trained', 'flip', '192 px', '192 px, flip')
COLUMNS = ('table', 'recipe', 'seed', 'way', 'R@1', 'MAP@R', 'binary_R@1')

# The rows without training: their name and flags of evaluate.py.
PRETRAINED = '--pretrained --backbone_type timm:tf_efficientnet_lite0 --image_size 128'  # a later flag wins
BACKBONE, WHITENED = 'backbone alone', 'whitened on the searched images'
UNTRAINED = {BACKBONE: '--whiten off', WHITENED: '--whiten test'}


# ---------------------------------------------------- measuring ----------------------------------------------------
def flags_of(way: str, data_name: str) -> list[str]:
    """Return the flags of evaluate.py for a way to measure."""
    return [*(LARGE[data_name].split() if '192 px' in way else ()), *(['--flip_tta', '1'] if 'flip' in way else ())]


def ways_of(table: str) -> tuple[str, ...]:
    """Return the ways in which a table's models are measured; what was trained at 192 px only at this size."""
    return WAYS[2:] if TABLES[table].start_from else WAYS


def list_measurements(args: argparse.Namespace) -> dict[tuple[str, str, str, str], list[str]]:
    """Return the flags of evaluate.py for each row of the CSV: (table, recipe, seed, way) -> flags.

    A recipe's model that is not there is left out. The rows without training have no seed.
    """
    measurements = {}
    for table in MEASURED:
        sources = {(run.name, str(run.seed)): ['--model', str(run.files.model)] for run in
                   list_runs(table, args.data_path, args.weights, args.results_dir, None) if run.files.model.is_file()}
        if table == TABLES[table].data_name:
            for name, flags in UNTRAINED.items():
                sources[name, ''] = f'{PRETRAINED} --data_name {table} {flags}'.split() + ['--weights', args.weights]
        for (recipe, seed), source in sources.items():
            for way in ways_of(table):
                measurements[table, recipe, seed, way] = [*source, '--data_path', args.data_path,
                                                          *flags_of(way, TABLES[table].data_name)]
    return measurements


def measure(args: argparse.Namespace) -> list[dict[str, str]]:
    """Measure what is missing in results/recipes.csv, and return all of its rows."""
    rows = read_csv(FILE)
    known = {(row['table'], row['recipe'], row['seed'], row['way']) for row in rows}
    for key, flags in list_measurements(args).items():
        if key in known:
            continue
        results = evaluate(*flags)
        values = (results['dense']['R@1'], results['dense']['MAP@R'], results['binary']['R@1'])
        rows.append(dict(zip(COLUMNS, (*key, *(f'{value:.2f}' for value in values)), strict=True)))
        write_csv(FILE, COLUMNS, rows)
    return rows


# ---------------------------------------------------- tables -------------------------------------------------------
def minutes_of(statistics: list[dict[str, str]], recipe: str) -> float:
    """Return the minutes that the training of a recipe takes on an idle machine, without measuring.

    Other programs only ever slow an epoch down. So an epoch counts with the seconds of the fastest one of its kind in
    all runs of the recipe: with the backbone frozen, or trained.

    Args:
        statistics: rows of results/grid/TABLE.csv, one for each epoch.
    """
    rows = [row for row in statistics if row['args.remark'] == recipe]
    seconds = {True: [], False: []}
    for row in rows:
        seconds[int(row['epoch']) <= int(row['args.warm_up'])].append(float(row['seconds']))
    num_runs = len({row['args.seed'] for row in rows})
    return sum(min(epochs) * len(epochs) for epochs in seconds.values() if epochs) / num_runs / 60


def format_mean(values: list[float]) -> str:
    """Return the mean, with half of its 95 % interval where there are at least three values."""
    import pandas as pd

    from training.summary import mean_and_half_interval

    average, half = mean_and_half_interval(pd.Series(values))
    return f'{average:.1f}' if len(values) < 3 else f'{average:.1f} ± {half:.1f}'


def format_table(rows: list[dict[str, str]], statistics: list[dict[str, str]], table: str) -> str:
    """Return the Markdown table of a table of runs: a row per recipe, best R@1 with flip first.

    Args:
        rows: of results/recipes.csv.
        statistics: of results/grid/TABLE.csv.
    """
    values = {}
    for row in rows:
        if row['table'] == table:
            values.setdefault(row['recipe'], {}).setdefault(row['way'], []).append(row)

    def rank(recipe: str) -> tuple[bool, float]:
        return recipe in UNTRAINED, -mean(float(row['R@1']) for row in values[recipe]['flip'])

    header = ['recipe', 'seeds', 'minutes', *WAYS, 'R@1 of binary codes, flip']
    lines = [header, ['---'] * len(header)]
    for recipe in sorted(values, key=rank):
        ways = values[recipe]
        untrained = recipe in UNTRAINED
        cells = [recipe, '' if untrained else str(len(ways['flip'])),
                 '' if untrained else f'{minutes_of(statistics, recipe):.0f}']
        cells += [' / '.join(format_mean([float(row[metric]) for row in ways[way]]) for metric in ('R@1', 'MAP@R'))
                  for way in WAYS]
        lines.append([*cells, format_mean([float(row['binary_R@1']) for row in ways['flip']])])
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def format_stages(rows: list[dict[str, str]], statistics: dict[str, list[dict[str, str]]]) -> str:
    """Return the Markdown table of recipes with and without a last stage at 192 px: best R@1 with flip first.

    Args:
        rows: of results/recipes.csv.
        statistics: of results/grid/TABLE.csv for the tables car20 and car20_192.
    """
    stages = {'car20': ('20 at 128 px', ('car20',)),
              'car20_192': ('20 at 128 px, 4 at 192 px', ('car20', 'car20_192'))}
    recipes = {row['recipe'] for row in rows if row['table'] == 'car20_192'}
    lines = []
    for table, (epochs, trained) in stages.items():
        for recipe in recipes:
            values = {way: [row for row in rows if (row['table'], row['recipe'], row['way']) == (table, recipe, way)]
                      for way in WAYS[2:]}
            flip = values['192 px, flip']
            minutes = sum(minutes_of(statistics[name], recipe) for name in trained)
            cells = [recipe, epochs, f'{minutes:.0f}']
            cells += [' / '.join(format_mean([float(row[metric]) for row in values[way]])
                                 for metric in ('R@1', 'MAP@R')) for way in values]
            lines.append((mean(float(row['R@1']) for row in flip),
                          [*cells, format_mean([float(row['binary_R@1']) for row in flip])]))
    header = ['recipe', 'epochs', 'minutes', *WAYS[2:], 'R@1 of binary codes, 192 px, flip']
    table = [header, ['---'] * len(header), *(cells for _, cells in sorted(lines, reverse=True))]
    return '\n'.join(f'| {" | ".join(cells)} |' for cells in table)


def format_comparison(rows: list[dict[str, str]]) -> str:
    """Return the Markdown table of docs/search.md: R@1 / MAP@R without training, and of whitened_mirror.

    Args:
        rows: of results/recipes.csv.
    """
    names = ('car', 'cub', 'grocery')
    values = {}
    for recipe in (*UNTRAINED, 'whitened_mirror'):
        for way in WAYS:
            title = 'six epochs of training' if recipe == 'whitened_mirror' else recipe
            title += '' if way == 'as trained' else f', {way}'
            for row in rows:
                if (row['recipe'], row['way']) == (recipe, way):
                    values.setdefault(title, {}).setdefault(row['table'], []).append(row)
    lines = ['| features | cars | birds | groceries |', '|---|---|---|---|']
    for title, tables in values.items():
        cells = [' / '.join(f'{mean(float(row[metric]) for row in tables[name]):.1f}' for metric in ('R@1', 'MAP@R'))
                 for name in names]
        lines.append(f'| {title} | {" | ".join(cells)} |')
    return '\n'.join(lines)


def main() -> None:
    """Measure what is missing, and print the tables."""
    parser = Parser(description=__doc__)
    parser.add_argument('--data_path', type=user_path, default='/home/data', help='folder of the data sets '
                        '[%(default)s]')
    parser.add_argument('--weights', type=user_path, default='imagenet', help='weights of EfficientNet-Lite0: '
                        'imagenet, or the path of a state dict [%(default)s]')
    parser.add_argument('--results_dir', type=user_path, default=str(REPOSITORY / 'results'), help='folder that holds '
                        'grid/TABLE [%(default)s]')
    args = parser.parse_args()
    rows = measure(args)
    statistics = {table: read_csv(Path(args.results_dir) / f'grid/{table}.csv') for table in MEASURED}
    for table in MEASURED:
        if any(row['table'] == table for row in rows):
            text = format_stages(rows, statistics) if TABLES[table].start_from else \
                format_table(rows, statistics[table], table)
            print(f'\n{table}, {TABLES[table].epochs} epochs, R@1 / MAP@R:\n\n{text}')
    print(f'\n{format_comparison(rows)}')


if __name__ == '__main__':
    run_script(main)
