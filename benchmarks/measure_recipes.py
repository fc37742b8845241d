"""Measure the runs of the tables car, cub, grocery and car20 in four ways: the tables of docs/results.md.

    python benchmarks/reproduce.py car cub grocery car20 --data_path /home/data --weights imagenet    # trains them
    python benchmarks/measure_recipes.py --data_path /home/data

Each model in results/grid/TABLE is measured as it was trained, with flip augmentation, with larger images, and with
both, by evaluate.py. Its R@1 and MAP@R and R@1 of the binary codes are added to results/recipes.csv; a row that is
there is not measured again: to measure anew, remove the file. At the end the tables are printed in Markdown.
"""
from pathlib import Path
from statistics import mean

from bench_common import REPOSITORY, evaluate, read_csv, write_csv  # first: it finds the modules of the repository
from reproduce import TABLES, list_runs
from utils import Parser, run_script, user_path

FILE, PRETRAINED = REPOSITORY / 'results/recipes.csv', REPOSITORY / 'results/pretrained.csv'
MEASURED = ('car', 'cub', 'grocery', 'car20')
# At 192 px, cars are squeezed to the square as a whole, the others are cropped: chosen on training classes held out.
LARGE = {'car': '--image_size 192 --resize_size 0', 'cub': '--image_size 192', 'grocery': '--image_size 192'}
WAYS = ('as trained', 'flip', '192 px', '192 px, flip')
COLUMNS = ('table', 'recipe', 'seed', 'way', 'R@1', 'MAP@R', 'binary_R@1')


def flags_of(way: str, data_name: str) -> list[str]:
    """Return the flags of evaluate.py for a way to measure."""
    return [*(LARGE[data_name].split() if '192 px' in way else ()), *(['--flip_tta', '1'] if 'flip' in way else ())]


def measure(data_path: str, results_dir: Path) -> list[dict[str, str]]:
    """Measure what is missing in the CSV of the models that are there, and return all of its rows."""
    rows = read_csv(FILE)
    known = {(row['table'], row['recipe'], row['seed'], row['way']) for row in rows}
    for table in MEASURED:
        for run in list_runs(table, data_path, 'imagenet', str(results_dir), None):
            for way in WAYS:
                key = (table, run.name, str(run.seed), way)
                if key in known or not run.files.model.is_file():
                    continue
                results = evaluate('--model', run.files.model, '--data_path', data_path,
                                   *flags_of(way, run.options.data_name))
                values = (results['dense']['R@1'], results['dense']['MAP@R'], results['binary']['R@1'])
                rows.append(dict(zip(COLUMNS, (*key, *(f'{value:.2f}' for value in values)), strict=True)))
                write_csv(FILE, COLUMNS, rows)
    return rows


# ---------------------------------------------------- tables -------------------------------------------------------
def format_mean(values: list[float]) -> str:
    """Return the mean, with half of its 95 % interval where there are several values."""
    import pandas as pd

    from training.summary import mean_and_half_interval

    average, half = mean_and_half_interval(pd.Series(values))
    return f'{average:.1f}' if len(values) == 1 else f'{average:.1f} ± {half:.1f}'


def format_table(rows: list[dict[str, str]], table: str) -> str:
    """Return the Markdown table of a table of runs: a row per recipe, best R@1 with flip first."""
    rows = [row for row in rows if row['table'] == table]
    values = {}
    for row in rows:
        values.setdefault(row['recipe'], {}).setdefault(row['way'], []).append(row)
    cells = {}
    for recipe, ways in values.items():
        cells[recipe] = [recipe, str(len(ways['as trained']))]
        cells[recipe] += [' / '.join(format_mean([float(row[metric]) for row in ways[way]]) for metric in
                                     ('R@1', 'MAP@R')) for way in WAYS]
        cells[recipe].append(format_mean([float(row['binary_R@1']) for row in ways['as trained']]))
    order = sorted(values, key=lambda recipe: -sum(float(row['R@1']) for row in values[recipe]['flip'])
                   / len(values[recipe]['flip']))
    header = ['recipe', 'seeds', *WAYS, 'R@1 of binary codes']
    lines = [header, ['---'] * len(header), *(cells[recipe] for recipe in order)]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def format_comparison(pretrained: list[dict[str, str]], rows: list[dict[str, str]]) -> str:
    """Return the Markdown table of docs/search.md: R@1 / MAP@R without training, and of whitened_mirror.

    Args:
        pretrained: rows of results/pretrained.csv.
        rows: of results/recipes.csv.
    """
    names = ('car', 'cub', 'grocery')
    values = {(row['features'], row['data_name']): [row] for row in pretrained}
    for row in rows:
        if row['recipe'] == 'whitened_mirror' and row['table'] in names:
            name = 'six epochs of training' + ('' if row['way'] == 'as trained' else f', {row["way"]}')
            values.setdefault((name, row['table']), []).append(row)
    lines = ['| features | cars | birds | groceries |', '|---|---|---|---|']
    for features in dict.fromkeys(features for features, _ in values):
        cells = [' / '.join(f'{mean(float(row[metric]) for row in values[features, name]):.1f}'
                            for metric in ('R@1', 'MAP@R')) for name in names]
        lines.append(f'| {features} | {" | ".join(cells)} |')
    return '\n'.join(lines)


def main() -> None:
    """Measure what is missing, and print the tables."""
    parser = Parser(description=__doc__)
    parser.add_argument('--data_path', type=user_path, default='/home/data', help='folder of the data sets '
                        '[%(default)s]')
    parser.add_argument('--results_dir', type=user_path, default=str(REPOSITORY / 'results'), help='folder that holds '
                        'grid/TABLE [%(default)s]')
    args = parser.parse_args()
    rows = measure(args.data_path, Path(args.results_dir))
    for table in MEASURED:
        if any(row['table'] == table for row in rows):
            print(f'\n{table}, {TABLES[table].epochs} epochs, R@1 / MAP@R:\n\n{format_table(rows, table)}')
    print(f'\n{format_comparison(read_csv(PRETRAINED), rows)}')


if __name__ == '__main__':
    run_script(main)
