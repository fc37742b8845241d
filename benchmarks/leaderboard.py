"""Add finished runs to results/leaderboard.csv, and write docs/leaderboard.md from it.

    python benchmarks/leaderboard.py results/car_resnet50_proxy_anchor_512_seed1_statistics.csv ...    # a row for them
    python benchmarks/leaderboard.py results/grid/car.csv                                              # a table of runs
    python benchmarks/leaderboard.py                                                                   # the page alone

Runs that differ in their seed alone are one row. The numbers are those of the last epoch, so no epoch is chosen on the
test classes. Rows are compared within a section only, whose runs have the same split file: the same classes, images and
subsets. A row replaces an earlier one of the same command and split. A --remark is shown behind the recipe.
"""
from pathlib import Path

from bench_common import REPOSITORY, read_csv, write_csv  # first: it finds the modules of the repository
from common.errors import UserError
from common.files import write_atomically
from imagedata.raw_sets import RAW_SETS
from plot import load_runs
from training.summary import mean_and_half_interval
from utils import Parser, run_script, user_path

FILE, PAGE = REPOSITORY / 'results/leaderboard.csv', REPOSITORY / 'docs/leaderboard.md'
COLUMNS = ('data_name', 'split', 'images', 'recipe', 'backbone', 'image_size', 'epochs', 'flip_tta', 'seeds', 'R@1',
           'R@1_half', 'MAP@R', 'hours', 'hardware', 'commit', 'command')
SHOWN = {'recipe': 'recipe', 'backbone': 'backbone', 'image_size': 'px', 'epochs': 'epochs', 'flip_tta': 'flip',
         'seeds': 'seeds', 'R@1': 'R@1', 'MAP@R': 'MAP@R', 'hours': 'hours', 'hardware': 'hardware', 'commit': 'commit'}
NEEDED = ('args.recipe', 'args.num_epochs', 'dense_R@1', 'dense_MAP@R', 'seconds', 'made.split', 'made.command',
          'made.seen_test_classes')


# ---------------------------------------------------- rows ---------------------------------------------------------
def check_run(where: str, table) -> None:
    """Raise a UserError unless a run is finished, and measured on classes that it has not seen."""
    missing = [column for column in NEEDED if column not in table or table[column].isna().all()]
    if missing:
        raise UserError(f'{where}: {missing[0]} is missing; train this run with the present version')
    last = table.iloc[-1]
    if last['epoch'] < last['args.num_epochs']:
        raise UserError(f'{where}: {last["epoch"]} of {last["args.num_epochs"]} epochs; finish this run with --resume')
    if last['made.seen_test_classes']:
        raise UserError(f'{where} was measured on classes that it was trained on (--allow_seen), which no other row '
                        'was')
    for setting, reason in (('val_ratio', 'trained on a part of the classes'), ('init', 'started from another run')):
        if last[f'args.{setting}'] and last.notna()[f'args.{setting}']:
            raise UserError(f'{where} was {reason} (--{setting}), which no other row was; train it without')


def rows_of(tables: dict) -> list[dict]:
    """Return a row for each command and split among runs {name: DataFrame of statistics}."""
    groups = {}
    for where, table in tables.items():
        check_run(where, table)
        last = table.iloc[-1]
        groups.setdefault((last['made.split'], last['made.command']), []).append(table)
    return [row_of(group) for group in groups.values()]


def row_of(tables: list) -> dict:
    """Return the row of runs that differ in their seed alone."""
    import pandas as pd

    ends = pd.DataFrame([table.iloc[-1] for table in tables])
    first = ends.iloc[0]
    if ends['args.seed'].duplicated().any():
        raise UserError(f'{first["args.run"]}: the same seed is named twice; name each run once')
    mean, half = mean_and_half_interval(ends['dense_R@1'])
    hours = sum(table['seconds'].sum() for table in tables) / len(tables) / 3600
    hardware = ends['made.device'].where(ends['made.device'] != 'cpu', ends['made.processor'])
    changed = ends['made.changed_since'].map({'no': ''}).fillna('+')  # code that is not that of the commit
    commits = ends['made.commit'].str[:12] + changed
    recipe, remark = first['args.recipe'], first.get('args.remark')
    if isinstance(remark, str) and remark != recipe:  # NaN if there is none
        recipe = f'{recipe} ({remark})'
    values = (first['args.data_name'], first['made.split'][:12], first['made.images'], recipe,
              first['args.backbone_type'], first['args.image_size'], first['args.num_epochs'],
              'yes' if first['args.flip_tta'] else 'no', ' '.join(map(str, sorted(ends['args.seed']))), f'{mean:.2f}',
              '' if len(tables) == 1 else f'{half:.2f}', f'{ends["dense_MAP@R"].mean():.2f}', f'{hours:.2f}',
              ', '.join(hardware.unique()), ', '.join(commits.unique()), first['made.command'])
    return dict(zip(COLUMNS, map(str, values), strict=True))


def merge(rows: list[dict], new: list[dict]) -> list[dict]:
    """Return all rows, with new ones in place of earlier ones of the same split and command."""
    by_key = {(row['split'], row['command']): row for row in [*rows, *new]}
    return sorted(by_key.values(), key=lambda row: (row['data_name'], row['split'], -float(row['R@1'])))


# ---------------------------------------------------- page ---------------------------------------------------------
INTRODUCTION = """# Leaderboard

R@1 and MAP@R in per cent at the last epoch, on classes that were not trained on; ± gives half the width of the 95 %
confidence interval of the mean over the seeds. Compare rows within a section only: they have the same split. To add a
row, train a run and call

```
python benchmarks/leaderboard.py results/RUN_statistics.csv
```

which checks that the run is finished, that none of its test classes was trained on, and that it was started from a
pretrained backbone or from random weights. It adds a row to [results/leaderboard.csv](../results/leaderboard.csv), and
writes this page again.

## Complete data sets
"""
FIRST_RUN = """No run yet. The first one could be

```
python data_utils.py --data_path /home/data --data_name {name}
python train.py --data_path /home/data --data_name {name} --recipe proxy_anchor --seeds 1,2,3
```
"""


def format_page(rows: list[dict]) -> str:
    """Return the page: a section for each complete data set, with the commands to fill it, and for each other split."""
    sections = {}
    for row in rows:
        sections.setdefault((row['data_name'], row['images'], row['split']), []).append(row)
    complete = {name: ', '.join(f'{subset}: {images:,} of {classes:,} classes'
                                for subset, (classes, images) in entry.counts.items())
                for name, entry in RAW_SETS.items()}
    parts = [INTRODUCTION]
    for name, images in complete.items():
        parts.append(f'### {name}\n\n{images}.\n')
        filled = [section for key, section in sections.items() if key[:2] == (name, images)]
        parts += map(format_table, filled) if filled else [FIRST_RUN.format(name=name)]
    parts.append('## Parts of data sets, and others\n')
    for (name, images, split), section in sections.items():
        if complete.get(name) != images:
            parts.append(f'### {name}, split {split}\n\n{images}.\n\n{format_table(section)}')
    return '\n'.join(parts)


def format_table(rows: list[dict]) -> str:
    """Return a Markdown table, and the command of each row below it."""
    lines = [f'| {" | ".join(SHOWN.values())} |', f'|{"---|" * len(SHOWN)}']
    for row in rows:
        cells = {**row, 'R@1': f'{row["R@1"]} ± {row["R@1_half"]}' if row['R@1_half'] else row['R@1']}
        lines.append(f'| {" | ".join(cells[column] for column in SHOWN)} |')
    commands = '\n'.join(row['command'] for row in rows)
    return '\n'.join(lines) + f'\n\nThe commands, in this order:\n\n```\n{commands}\n```\n'


def main() -> None:
    """Add the runs of the command line, and write the page."""
    parser = Parser(description=__doc__)
    parser.add_argument('runs', nargs='*', type=user_path, metavar='STATISTICS', help='statistics of runs')
    args = parser.parse_args()
    tables = {}
    for source in args.runs:
        tables |= load_runs('STATISTICS', Path(source))
    rows = read_csv(FILE)
    if tables:
        rows = merge(rows, rows_of(tables))
        write_csv(FILE, COLUMNS, rows)
        print(f'{FILE}: {len(rows)} rows')
    write_atomically(PAGE, lambda file: file.write(format_page(rows).encode()))
    print(f'{PAGE} is written')


if __name__ == '__main__':
    run_script(main)
