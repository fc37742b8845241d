"""Draw what runs measured: the curves of a run, several runs in one figure, a sweep over a setting, a table of runs.

    python plot.py results/car_resnet50_balanced_proxy_512_statistics.csv                    # one run, four panels
    python plot.py results/*_statistics.csv --metric dense_R@1 loss --output results/runs.png   # one panel per metric
    python plot.py --sweep results/sweep --over momentum --line loss_name --metric dense_R@1
    python plot.py --table results/grid/rules.csv --over loss_name --line proxy_update

A run's {run}_statistics.csv has a row per epoch: what was measured, then its settings as columns `args.NAME`.
--sweep and --table read a folder of such files, or one CSV that holds the rows of several runs, and take one epoch of
each run: the last one, or the best. A sweep draws the mean and standard deviation over seeds against a numerical
setting. A table is printed as Markdown, a row for each value of one setting and a column for each value of another, and
drawn as well; its cells hold the mean over seeds and half of its 95 % interval. Figures are written as PNG and PDF.
"""
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UserError, suggestion
from common.files import check_replaceable, make_folder
from common.results import RunFiles
from retrieval.figures import COLOURS, plot_style, save_figure
from training.curves import check_metric, draw_curves, measured_rows, title_of
from training.statistics import read_statistics
from utils import Parser, run_script, user_path

if TYPE_CHECKING:  # imported where it is used, so that --help and mistakes need not wait for it
    import pandas as pd

ENDING = f'_{RunFiles.ENDINGS["statistics"]}'
LESS_IS_BETTER = {'loss', 'angle_to_proxy'}
LINES = ('-', '--', ':', '-.')
MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X')  # 8 colours and 7 markers: 56 runs look different
# Settings that may differ between the runs that are averaged: repetitions and names.
FREE = {'seed', 'run', 'remark'}
# Settings that change with another one, because they are the same quantity or a multiple of it.
FOLLOWING = {'scale': {'temperature'}, 'temperature': {'scale'}, 'lr': {'backbone_lr', 'proxy_lr'},
             'image_size': {'resize_size'}}


# ---------------------------------------------------- reading runs --------------------------------------------------
def short_names(paths: list[Path]) -> list[str]:
    """Name runs by the parts of their file names that differ.

    Raises:
        UserError: if a file is named twice.
    """
    names = [path.name.removesuffix(ENDING).removesuffix('.csv') for path in paths]
    if len(set(names)) < len(names):
        names = [path.as_posix().removesuffix(ENDING) for path in paths]
    if len(set(names)) < len(names):
        raise UserError('a statistics file is named twice; name each run once')
    parts = [name.split('_') for name in names]
    start = 0
    while len(parts) > 1 and all(len(part) > start + 1 and part[:start + 1] == parts[0][:start + 1] for part in parts):
        start += 1
    return ['_'.join(part[start:]) for part in parts]


def load_runs(flag: str, source: Path) -> dict[str, pd.DataFrame]:
    """Load the statistics of several runs.

    Args:
        flag: the flag that names the source, for errors.
        source: a folder of {run}_statistics.csv, or one CSV with the rows of several runs, told apart by `args.run`.

    Returns:
        {where it was read: statistics of a run, a row per epoch}.
    """
    if source.is_file():
        table = read_statistics(source)
        if 'args.run' not in table:
            raise UserError(f'{flag} {source} is no table of runs: it has no column args.run')
        return {f'{source}, run {run}': rows for run, rows in table.groupby('args.run', sort=False, dropna=False)}
    paths = sorted(source.glob(f'*{ENDING}'))
    if not paths:
        raise UserError(f'{flag} {source} is neither a CSV of several runs nor a folder that holds *{ENDING}; train '
                        f'into a folder with --results_dir {source}')
    return {path.as_posix(): read_statistics(path) for path in paths}


def check_run(where: str, table: pd.DataFrame, settings: dict[str, str], metrics: list[str]) -> None:
    """Raise a UserError if a run lacks a setting (flag -> its name) or a metric, or is not finished."""
    for metric in metrics:
        check_metric(table, metric, where)
    known = [column.removeprefix('args.') for column in table if column.startswith('args.')]
    for flag, name in settings.items():
        if name not in known:
            raise UserError(f'{flag} {name} is not a setting of the run in {where}{suggestion(name, known)}')
    if table['epoch'].duplicated().any():
        raise UserError(f'{where}: an epoch has two rows; keep each run once')
    last = table.iloc[-1]
    if 'args.num_epochs' in table and last['epoch'] < last['args.num_epochs']:
        raise UserError(f'{where}: {last["epoch"]} of {last["args.num_epochs"]} epochs; finish this run with '
                        '--resume, or move it away')


def read_runs(flag: str, source: Path, settings: dict[str, str], metrics: list[str], epoch: str) -> pd.DataFrame:
    """Read one epoch of each run: a row per run, indexed by where it was read.

    Args:
        flag: the flag that names the source, for errors.
        source: see `load_runs`.
        settings: {flag: the setting that it names}.
        metrics: columns that every run must have.
        epoch: `last`, or `best` by dense R@1.

    Raises:
        UserError: if there are no runs, or one is not finished or lacks a setting or a metric.
    """
    import pandas as pd

    chosen = {}
    for where, table in load_runs(flag, source).items():
        check_run(where, table, settings, metrics)
        if epoch == 'last':
            chosen[where] = table.iloc[-1]
        elif 'dense_R@1' in table:
            chosen[where] = table.loc[table['dense_R@1'].idxmax()]
        else:
            raise UserError(f'--epoch best needs dense_R@1, which {where} does not have; use --epoch last')
    return pd.DataFrame(list(chosen.values()), index=list(chosen))


def check_alike(source: str, runs: pd.DataFrame, names: list[str], free: set[str]) -> None:
    """Refuse to average runs that differ in more than their seed, or a run that is there twice.

    Args:
        source: flag and value that name the runs, for errors.
        runs: a row per run.
        names: settings; runs that have the same values of these are averaged.
        free: settings in which they may differ.
    """
    columns = [f'args.{name}' for name in names]
    fixed = [column for column in runs if column.startswith('args.') and column.removeprefix('args.') not in free]
    for values, group in runs.groupby(columns, dropna=False):
        different = [column.removeprefix('args.') for column in fixed if group[column].nunique(dropna=False) > 1]
        if different:
            raise UserError(f'{source}: the runs of {" ".join(names)} {" ".join(map(str, values))} also differ in '
                            f'{", ".join(different)}; keep runs of other settings elsewhere')


def check_once(source: str, runs: pd.DataFrame, names: list[str]) -> None:
    """Refuse two runs that have the same seed and the same values of these settings."""
    repeated = runs.duplicated([*(f'args.{name}' for name in names), 'args.seed'])
    if repeated.any():
        raise UserError(f'{source}: {runs.index[repeated][0]} has the {", ".join(names)} and seed of another run')


def range_text(counts) -> str:
    """Return numbers of seeds as a text: `3`, or `1 to 3` if they differ."""
    low, high = min(counts), max(counts)
    return f'{low}' if low == high else f'{low} to {high}'


# ---------------------------------------------------- several runs --------------------------------------------------
def draw_runs(tables: dict[str, pd.DataFrame], metrics: list[str], target: Path) -> Path:
    """Draw several runs in one figure, a panel per metric; each run's best epoch is marked in those of retrieval."""
    with plot_style():
        from matplotlib import pyplot
        from matplotlib.ticker import MaxNLocator

        figure, axes = pyplot.subplots(1, len(metrics), figsize=(3.8 * len(metrics), 3.2 + 0.16 * len(tables)),
                                       squeeze=False, layout='constrained')
        for axis, metric in zip(axes[0], metrics, strict=True):
            for index, (name, table) in enumerate(tables.items()):
                colour = COLOURS[index % len(COLOURS)]
                table = measured_rows(table, metric)
                axis.plot(table['epoch'], table[metric], color=colour, linestyle=LINES[index % len(LINES)], label=name,
                          marker=MARKERS[index % len(MARKERS)], markersize=3.5, markevery=max(1, len(table) // 15))
                if metric.startswith(('dense_', 'binary_')):
                    best = table[metric].idxmax()
                    axis.plot(table['epoch'][best], table[metric][best], '*', color=colour, markersize=9)
            axis.set(xlabel='epoch', ylabel=title_of(metric))
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc='outside lower center', ncols=2)
        return save_figure(figure, target)


# ---------------------------------------------------- sweeps --------------------------------------------------------
def summarize_sweep(source: Path, over: str, line: str, metric: str, epoch: str) -> pd.DataFrame:
    """Return mean, standard deviation and number of seeds of a metric for each line and each value of a setting.

    Args and errors are those of `read_runs`; besides, the setting must be a number in every run, and the runs of a
    line may differ only in it and in their seed.

    Returns:
        a table with the columns line, over, mean, std (of a sample; 0 for one seed) and count.
    """
    from pandas.api.types import is_numeric_dtype

    runs = read_runs('--sweep', source, {'--over': over, '--line': line}, [metric], epoch).infer_objects()
    swept = runs[f'args.{over}']
    if not is_numeric_dtype(swept) or swept.isna().any():
        raise UserError(f'--over {over} is not a number in every run of {source}; sweep over a number')
    check_alike(f'--sweep {source}', runs, [line], FREE | {over, line} | FOLLOWING.get(over, set()))
    check_once(f'--sweep {source}', runs, [line, over])
    runs = runs.rename(columns={f'args.{line}': 'line', f'args.{over}': 'over'})
    summary = runs.groupby(['line', 'over'], dropna=False)[metric].agg(['mean', 'std', 'count']).reset_index()
    return summary.fillna({'std': 0.0})


def draw_sweep(summary: pd.DataFrame, over: str, line: str, metric: str, epoch: str, target: Path) -> Path:
    """Draw the mean of a metric against a setting, a line per value of another, with a band of one deviation."""
    with plot_style():
        from matplotlib import pyplot

        figure, axis = pyplot.subplots(figsize=(4.6, 3.4), layout='constrained')
        for index, (name, part) in enumerate(summary.groupby('line', dropna=False)):
            colour = COLOURS[index % len(COLOURS)]
            axis.plot(part['over'], part['mean'], color=colour, marker='o', markersize=3.5, label=str(name),
                      linestyle=LINES[index % len(LINES)])
            axis.fill_between(part['over'], part['mean'] - part['std'], part['mean'] + part['std'], color=colour,
                              alpha=0.2, linewidth=0)
        plural = 's' if summary['count'].max() > 1 else ''
        axis.set(xlabel=over.replace('_', ' '), ylabel=f'{title_of(metric)}, {epoch} epoch')
        axis.set_title(f'mean and standard deviation, {range_text(summary["count"])} seed{plural}')
        axis.legend(title=line.replace('_', ' '), title_fontsize=7)
        return save_figure(figure, target)


# ---------------------------------------------------- tables --------------------------------------------------------
def tabulate(source: Path, over: str, line: str | None, metrics: list[str], epoch: str) -> pd.DataFrame:
    """Return mean, half of its 95 % interval (Student's t; NaN for one seed) and number of seeds of each cell.

    Args and errors are those of `read_runs`; besides, the runs of a cell may differ only in their seed.

    Returns:
        a row per cell with the columns over, line, metric, mean, half, seeds and best (whether it is the best of its
        metric: the largest, or the smallest loss); sorted by the first metric, best first.
    """
    import pandas as pd

    from training.summary import mean_and_half_interval

    settings = {'--over': over}
    if line:
        settings['--line'] = line
    names = list(settings.values())
    runs = read_runs('--table', source, settings, metrics, epoch)
    check_alike(f'--table {source}', runs, names, FREE - set(names))
    check_once(f'--table {source}', runs, names)
    runs['args.'] = ''  # the only column of a table without --line
    cells = []
    for (row, column), group in runs.groupby([f'args.{over}', f'args.{line or ""}'], dropna=False):
        for metric in metrics:
            mean, half = mean_and_half_interval(group[metric].astype(float))
            cells.append({'over': str(row), 'line': str(column), 'metric': metric, 'mean': mean, 'half': half,
                          'seeds': len(group)})
    return rank_cells(pd.DataFrame(cells), metrics[0])


def rank_cells(cells: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Mark the best cell of each metric, and sort the rows of the table by their best cell of one metric."""
    goodness = cells['mean'].where(~cells['metric'].isin(LESS_IS_BETTER), -cells['mean'])
    cells['best'] = goodness == goodness.groupby(cells['metric']).transform('max')
    best_of_row = goodness.where(cells['metric'] == metric).groupby(cells['over']).transform('max')
    order = cells.assign(goodness=best_of_row).sort_values(['goodness', 'over', 'line'],
                                                           ascending=[False, True, True], kind='stable').index
    return cells.loc[order].reset_index(drop=True)


def format_table(cells: pd.DataFrame, over: str, metrics: list[str]) -> str:
    """Return what `tabulate` found as Markdown; the best of each metric is bold."""
    columns = [(metric, line) for metric in metrics for line in sorted(cells['line'].unique())]
    titles = [f'{line}: {title_of(metric)}' if line else title_of(metric) for metric, line in columns]
    lines = [f'| {over} | {" | ".join(titles)} | seeds |', '|---' * (len(columns) + 2) + '|']
    for name, row in cells.groupby('over', sort=False):
        texts = [format_cell(row[(row['metric'] == metric) & (row['line'] == line)]) for metric, line in columns]
        lines.append(f'| {name} | {" | ".join(texts)} | {range_text(row["seeds"])} |')
    return '\n'.join(lines)


def format_cell(found: pd.DataFrame) -> str:
    """Return a cell as text, `58.2 ± 2.1`, from the row of `tabulate` that was found for it, or none."""
    if found.empty:
        return ''
    cell = found.iloc[0]
    text = f'{cell["mean"]:.1f}'
    if cell['seeds'] > 1:
        text += f' ± {cell["half"]:.1f}'
    return f'**{text}**' if cell['best'] else text


def draw_table(cells: pd.DataFrame, metrics: list[str], epoch: str, target: Path) -> Path:
    """Draw what `tabulate` found: a panel per metric, a height per row, a colour per column, a bar per interval."""
    names = list(cells['over'].unique())[::-1]  # the best row on top
    lines = sorted(cells['line'].unique())
    with plot_style():
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(1, len(metrics), figsize=(3.6 * len(metrics), 1.1 + 0.32 * len(names)),
                                       squeeze=False, sharey=True, layout='constrained')
        for axis, metric in zip(axes[0], metrics, strict=True):
            for index, line in enumerate(lines):
                part = cells[(cells['metric'] == metric) & (cells['line'] == line)]
                shift = 0.22 * ((len(lines) - 1) / 2 - index)
                heights = [names.index(name) + shift for name in part['over']]
                axis.errorbar(part['mean'], heights, xerr=part['half'].fillna(0), fmt=MARKERS[index % len(MARKERS)],
                              color=COLOURS[index % len(COLOURS)], markersize=4, capsize=2, label=line or None)
            axis.set(xlabel=f'{title_of(metric)}, {epoch} epoch', yticks=range(len(names)), yticklabels=names,
                     ylim=(-0.6, len(names) - 0.4))
            axis.grid(axis='x', alpha=0.3)
        if any(lines):
            handles, labels = axes[0, 0].get_legend_handles_labels()
            figure.legend(handles, labels, loc='outside upper center', ncols=len(lines))
        return save_figure(figure, target)


# ---------------------------------------------------- command line --------------------------------------------------
def get_parser() -> Parser:
    """Build the parser; a default of None depends on what is drawn."""
    parser = Parser(description=__doc__)
    parser.add_argument('statistics', nargs='*', type=user_path, help=f'one or more files RUN{ENDING}')
    parser.add_argument('--sweep', type=user_path, metavar='SOURCE', help='draw a sweep over the runs of a folder of '
                        f'RUN{ENDING}, or of one CSV')
    parser.add_argument('--table', type=user_path, metavar='SOURCE', help='print and draw a table of the runs of a '
                        f'folder of RUN{ENDING}, or of one CSV')
    parser.add_argument('--over', help='--sweep: the setting on the horizontal axis [momentum]; --table: the setting '
                        'of the rows [loss_name]')
    parser.add_argument('--line', help='--sweep: the setting that has a line for each of its values, as loss_name or '
                        'backbone_type [loss_name]; --table: the setting of the columns [none]')
    parser.add_argument('--epoch', choices=('last', 'best'), help='--sweep, --table: which epoch of each run; the '
                        'best one is chosen on the test classes [last]')
    parser.add_argument('--metric', nargs='+', help='column of the statistics, as dense_R@1, binary_R@1, loss or '
                        'dense_MAP@R; each has a panel [one run: loss, accuracy, lr and R@1; several runs, --sweep: '
                        'dense_R@1; --table: dense_R@1 and binary_R@1]')
    parser.add_argument('--output', type=user_path, help='PNG file; a PDF is written beside it [beside the '
                        'statistics]')
    return parser


def get_args(argv: list[str] | None = None):
    """Parse and check the command line."""
    args = get_parser().parse_args(argv)
    num_sources = bool(args.statistics) + (args.sweep is not None) + (args.table is not None)
    if num_sources == 0:
        raise UserError('nothing to draw: name statistics files, or a folder or CSV with --sweep or --table')
    if num_sources > 1:
        raise UserError('name one of these: statistics files, --sweep SOURCE, --table SOURCE')
    if args.statistics:
        for flag in ('over', 'line', 'epoch'):
            if getattr(args, flag) is not None:
                raise UserError(f'--{flag} {getattr(args, flag)} has no effect without --sweep or --table; leave it '
                                'out')
    if args.sweep is not None:
        args.over = args.over or 'momentum'
        args.line = args.line or 'loss_name'
        if len(args.metric or ()) > 1:
            raise UserError(f'--metric {" ".join(args.metric)}: a sweep shows one metric; name one')
    if args.table is not None:
        args.over = args.over or 'loss_name'
    args.epoch = args.epoch or 'last'
    if args.over is not None and args.over == args.line:
        raise UserError(f'--over and --line are both {args.over}; choose two settings')
    if args.output is not None and not args.output.endswith('.png'):
        raise UserError(f'--output {args.output} must end in .png; a PDF is written beside it')
    return args


def beside(source: Path, name: str) -> Path:
    """Return the path of a figure in a folder, or beside a CSV."""
    return source / name if source.is_dir() else source.with_name(f'{source.stem}_{name}')


def output_file(output: str | None, default: Path) -> Path:
    """Return the PNG file to write: --output, or the default; what is there must be a figure of these scripts."""
    target = default if output is None else Path(output)
    make_folder('--output', target.parent)
    for file in (target, target.with_suffix('.pdf')):
        check_replaceable(file)
    return target


def plot_sweep(args) -> None:
    """Print and draw a sweep."""
    source = Path(args.sweep)
    metric = args.metric[0] if args.metric else 'dense_R@1'
    summary = summarize_sweep(source, args.over, args.line, metric, args.epoch)
    print(f'{title_of(metric)}, {args.epoch} epoch')
    print(summary.rename(columns={'line': args.line, 'over': args.over, 'count': 'seeds'}).to_string(
        index=False, float_format=lambda value: f'{value:.4g}'))
    target = output_file(args.output, beside(source, f'sweep_{args.over}_{metric}.png'))
    print(draw_sweep(summary, args.over, args.line, metric, args.epoch, target))


def plot_table(args) -> None:
    """Print and draw a table."""
    source = Path(args.table)
    metrics = args.metric or ['dense_R@1', 'binary_R@1']
    cells = tabulate(source, args.over, args.line, metrics, args.epoch)
    print(format_table(cells, args.over, metrics))
    target = output_file(args.output, beside(source, f'table_{args.over}.png'))
    print(draw_table(cells, metrics, args.epoch, target))


def plot_statistics(args) -> None:
    """Draw the four panels of one run, or a panel per metric of one run or several."""
    paths = [Path(name) for name in args.statistics]
    tables = {name: read_statistics(path) for name, path in zip(short_names(paths), paths, strict=True)}
    metrics = args.metric or ['dense_R@1']
    for path, table in zip(paths, tables.values(), strict=True):
        if table['epoch'].duplicated().any():
            raise UserError(f'{path} holds several runs; draw them with --table or --sweep')
        for metric in metrics:
            check_metric(table, metric, path)
    if len(paths) == 1 and not args.metric:
        run = paths[0].name.removesuffix(ENDING)
        target = output_file(args.output, paths[0].with_name(f'{run}_curves.png'))
        print(draw_curves(tables.popitem()[1], target, run))
    else:
        target = output_file(args.output, paths[0].with_name(f'runs_{"_".join(metrics)}.png'))
        print(draw_runs(tables, metrics, target))


def main() -> None:
    """Draw what the command line names, and print where it is."""
    args = get_args()
    if args.sweep is not None:
        plot_sweep(args)
    elif args.table is not None:
        plot_table(args)
    else:
        plot_statistics(args)


if __name__ == '__main__':
    run_script(main)
