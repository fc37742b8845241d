"""Draw what runs measured: the curves of one run, several runs in one plot, or a sweep over a setting.

    python plot.py results/car_resnet50_balanced_proxy_512_statistics.csv                    # one run, four panels
    python plot.py results/*_statistics.csv --metric dense_R@1 loss --output results/runs.png   # a panel per metric
    python plot.py --sweep results/sweep --over momentum --line loss_name --metric dense_R@1
    python plot.py --table results/grid/rules --over loss_name --line proxy_update

Reads {run}_statistics.csv: a row an epoch, what was measured, then the run's settings as columns `args.NAME`. A sweep
or a table takes one epoch of each run in a folder (the last one, or the best). A sweep draws mean and standard
deviation over the seeds along a number; a table prints a line of Markdown for each value of one setting and a column
for each of another, the mean and half of its 95 % interval, dense beside binary, and draws them too. Everything is
drawn as PNG and PDF.
"""
from pathlib import Path

import pandas as pd

from engine.errors import UserError, nearest
from engine.files import make_folder
from engine.runs import RunFiles, read_statistics
from recipes import NOT_ALWAYS
from summary import mean_and_half_interval
from utils import COLOURS, GREY, Parser, check_replaceable, plot_style, run_script, save_figure, user_path

ENDING = f'_{RunFiles.ENDINGS["statistics"]}'
TITLES = {'loss': 'loss', 'accuracy': 'training accuracy (%)', 'lr': 'learning rate', 'img_s': 'images per second',
          'proxy_lr': 'learning rate of the proxies', 'angle_to_proxy': 'class mean to proxy (degrees)'}
LESS_IS_BETTER = {'loss', 'angle_to_proxy'}
LINES = ('-', '--', ':', '-.')
MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X')  # 8 colours and 7 markers: 56 runs look different
# Settings that may differ between runs of one line in a sweep: repetitions and names.
FREE = {'seed', 'run', 'remark'}
# Settings that follow another one: two words for one, or a multiple of it.
FOLLOWING = {'scale': {'temperature'}, 'temperature': {'scale'}, 'lr': {'trunk_lr', 'proxy_lr'},
             'image_size': {'resize_size'}}


# ---------------------------------------------------- statistics files ----------------------------------------------
def check_metric(table: pd.DataFrame, metric: str, path: str | Path) -> None:
    """Refuse a metric that a statistics file does not have, and list those that it has."""
    measured = [column for column in table.select_dtypes('number') if not column.startswith('args.')
                and column != 'epoch']
    if metric not in measured:
        raise UserError(f'--metric {metric} is not in {path}{nearest(metric, measured)} (there are: '
                        f'{", ".join(measured)})')
    if not table[metric].abs().lt(float('inf')).all():  # nor is NaN
        raise UserError(f'{path}: {metric} is empty or infinite in some epochs; draw another --metric')


def title_of(metric: str) -> str:
    """Return the label of an axis: `dense_R@1` -> `R@1, dense (%)`."""
    if metric.startswith('val_'):
        return title_of(metric.removeprefix('val_')).replace(' (%)', ', held out classes (%)')
    kind, _, name = metric.partition('_')
    return TITLES.get(metric, f'{name}, {kind} (%)' if kind in ('dense', 'binary') else metric)


def short_names(paths: list[Path]) -> list[str]:
    """Name runs by the parts of their file names that differ; the same file twice is one too many.

    Raises:
        UserError: if two files have one name.
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


# ---------------------------------------------------- curves --------------------------------------------------------
def draw_curves(table: pd.DataFrame, target: Path, title: str) -> Path:
    """Draw the curves of one run in four panels: loss, accuracy, learning rate, R@1; the best epoch is marked.

    Args:
        table: the statistics, a row an epoch.
        target: PNG file; a PDF is written beside it.

    Raises:
        UserError: if the statistics lack one of these.
    """
    for metric in ('loss', 'accuracy', 'lr', 'dense_R@1'):
        check_metric(table, metric, title)
    chosen_by = 'val_dense_R@1' if 'val_dense_R@1' in table else 'dense_R@1'
    epochs, best = table['epoch'], table[chosen_by].idxmax()
    # Few epochs are seen as points, many as a line.
    style = {'marker': 'o', 'markersize': 3} if len(table) <= 30 else {}
    with plot_style():
        from matplotlib import pyplot
        from matplotlib.ticker import MaxNLocator

        figure, axes = pyplot.subplots(2, 2, figsize=(7.2, 4.8), layout='constrained')
        for axis, metric in zip(axes.flat, ('loss', 'accuracy', 'lr', 'dense_R@1'), strict=True):
            axis.plot(epochs, table[metric], color=COLOURS[0], label='network' if metric == 'lr' else 'dense', **style)
            axis.set(xlabel='epoch', ylabel=title_of(metric), xlim=span(epochs))
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            axis.axvline(epochs[best], color=GREY, linewidth=0.8, linestyle=':', zorder=0)
        rates, recall = axes[1]
        rates.set_yscale('log')
        rates.yaxis.set_major_formatter(lambda rate, _: f'{rate:g}')
        rates.yaxis.set_minor_formatter(lambda rate, _: '')
        if 'proxy_lr' in table and (table['proxy_lr'] > 0).all():
            rates.plot(epochs, table['proxy_lr'], color=COLOURS[1], linestyle='--', label='proxies', **style)
            rates.legend()
        if 'binary_R@1' in table:
            recall.plot(epochs, table['binary_R@1'], color=COLOURS[1], linestyle='--', label='binary', **style)
        if 'epoch0_R@1' in table:
            recall.axhline(table['epoch0_R@1'].iloc[-1], color=GREY, linewidth=0.8, label='untouched trunk')
        if 'val_dense_R@1' in table:
            recall.plot(epochs, table['val_dense_R@1'], color=COLOURS[2], linestyle=':', label='held out', **style)
        word = 'best' if chosen_by == 'dense_R@1' else 'chosen'
        recall.plot(epochs[best], table['dense_R@1'][best], '*', color=COLOURS[5], markersize=9, zorder=3,
                    label=f'{word}: epoch {epochs[best]}, {table["dense_R@1"][best]:.1f} %')
        recall.set_ylabel('R@1 (%)')
        recall.legend()
        figure.suptitle(title)
        return save_figure(figure, target)


def span(epochs: pd.Series) -> tuple[float, float]:
    """Return the limits of the epoch axis, with room for a single epoch too."""
    return epochs.min() - 0.5, epochs.max() + 0.5


def draw_runs(tables: dict[str, pd.DataFrame], metrics: list[str], target: Path) -> Path:
    """Draw several runs in one plot, a panel per metric; in those of retrieval each run's best epoch is marked."""
    with plot_style():
        from matplotlib import pyplot
        from matplotlib.ticker import MaxNLocator

        figure, axes = pyplot.subplots(1, len(metrics), figsize=(3.8 * len(metrics), 3.2 + 0.16 * len(tables)),
                                       squeeze=False, layout='constrained')
        for axis, metric in zip(axes[0], metrics, strict=True):
            for number, (name, table) in enumerate(tables.items()):
                colour, line = COLOURS[number % len(COLOURS)], LINES[number % len(LINES)]
                axis.plot(table['epoch'], table[metric], color=colour, linestyle=line, label=name, markersize=3.5,
                          marker=MARKERS[number % len(MARKERS)], markevery=max(1, len(table) // 15))
                if metric.startswith(('dense_', 'binary_')):
                    best = table[metric].idxmax()
                    axis.plot(table['epoch'][best], table[metric][best], '*', color=colour, markersize=9)
            axis.set(xlabel='epoch', ylabel=title_of(metric))
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc='outside lower center', ncols=2)
        return save_figure(figure, target)


# ---------------------------------------------------- sweeps and tables --------------------------------------------
def read_runs(flag: str, folder: str | Path, settings: dict[str, str], metrics: list[str], epoch: str) -> pd.DataFrame:
    """Read one epoch of each run of a folder.

    Args:
        flag: the one that names the folder, for errors.
        folder: holds the statistics files.
        settings: flag -> the setting that it names.
        metrics: columns that every run has to have.
        epoch: `last`, or `best` by dense R@1.

    Returns:
        a row of the statistics per run.

    Raises:
        UserError: if the folder holds no runs, one is not finished, or a setting or metric is missing.
    """
    paths = sorted(Path(folder).glob(f'*{ENDING}'))
    if not paths:
        raise UserError(f'{flag} {folder} holds no *{ENDING}; train into it with --results_dir {folder}')
    rows = []
    for path in paths:
        table = read_statistics(path)
        table = table.assign(**{f'args.{name}': value for name, value in NOT_ALWAYS.items()
                                if f'args.{name}' not in table})
        for metric in metrics:
            check_metric(table, metric, path)
        known = [column.removeprefix('args.') for column in table if column.startswith('args.')]
        for name_of, name in settings.items():
            if name not in known:
                raise UserError(f'{name_of} {name} is no setting of the run in {path}{nearest(name, known)}')
        last = table.iloc[-1]
        if 'args.num_epochs' in table and last['epoch'] < last['args.num_epochs']:
            raise UserError(f'{path}: {last["epoch"]} of {last["args.num_epochs"]} epochs; finish this run with '
                            '--resume, or move it away')
        if epoch == 'best' and 'dense_R@1' not in table:
            raise UserError(f'--epoch best needs dense_R@1, which {path} does not have; use --epoch last')
        rows.append(last if epoch == 'last' else table.loc[table['dense_R@1'].idxmax()])
    return pd.DataFrame(rows, index=[path.name for path in paths])


def check_alike(flag: str, runs: pd.DataFrame, by: list[str], free: set) -> None:
    """Refuse runs that would be averaged though they differ in more than their seed, and one that is there twice."""
    fixed = [column for column in runs if column.startswith('args.') and column.removeprefix('args.') not in free]
    for name, group in runs.groupby([f'args.{setting}' for setting in by], dropna=False):
        different = [column.removeprefix('args.') for column in fixed if group[column].nunique(dropna=False) > 1]
        if different:
            raise UserError(f'{flag}: the runs of {" ".join(by)} {" ".join(map(str, name))} differ in '
                            f'{", ".join(different)} too; keep runs that are not of this sweep elsewhere')


def read_sweep(folder: str | Path, over: str, line: str, metric: str, epoch: str) -> pd.DataFrame:
    """Read one number from each run of a folder: a table with the columns line, over, seed and metric.

    Args and errors are those of `read_runs`; besides, what is swept has to be a number, and the runs of a line may
    differ in nothing but it and their seed.
    """
    runs = read_runs('--sweep', folder, {'--over': over, '--line': line}, [metric], epoch)
    if not pd.api.types.is_numeric_dtype(runs[f'args.{over}'].infer_objects()) or runs[f'args.{over}'].isna().any():
        raise UserError(f'--over {over} is no number in every run of {folder}; sweep over a number')
    check_alike(f'--sweep {folder}', runs, [line], FREE | {over, line} | FOLLOWING.get(over, set()))
    runs = runs.rename(columns={f'args.{line}': 'line', f'args.{over}': 'over', 'args.seed': 'seed'})
    twice = runs.duplicated(['line', 'over', 'seed'])
    if twice.any():
        raise UserError(f'--sweep {folder}: {runs.index[twice][0]} has the {line}, {over} and seed of another run')
    return runs[['line', 'over', 'seed', metric]].infer_objects().reset_index(drop=True)


def summarize(runs: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return mean, standard deviation (n - 1; 0 for one seed) and number of seeds per line and swept value."""
    table = runs.groupby(['line', 'over'], dropna=False)[metric].agg(['mean', 'std', 'count']).reset_index()
    return table.fillna({'std': 0.0})


def draw_sweep(summary: pd.DataFrame, over: str, line: str, metric: str, epoch: str, target: Path) -> Path:
    """Draw the mean of a metric over a setting, a line per value of another, with a band of one standard deviation."""
    with plot_style():
        from matplotlib import pyplot

        figure, axis = pyplot.subplots(figsize=(4.6, 3.4), layout='constrained')
        for number, (name, part) in enumerate(summary.groupby('line', dropna=False)):
            colour = COLOURS[number % len(COLOURS)]
            axis.plot(part['over'], part['mean'], color=colour, marker='o', markersize=3.5, label=str(name),
                      linestyle=LINES[number % len(LINES)])
            axis.fill_between(part['over'], part['mean'] - part['std'], part['mean'] + part['std'], color=colour,
                              alpha=0.2, linewidth=0)
        seeds = summary['count']
        number = f'{seeds.min()}' if seeds.min() == seeds.max() else f'{seeds.min()} to {seeds.max()}'
        axis.set(xlabel=over.replace('_', ' '), ylabel=f'{title_of(metric)}, {epoch} epoch')
        axis.set_title(f'mean and standard deviation, {number} seed{"s" if seeds.max() > 1 else ""}')
        axis.legend(title=line.replace('_', ' '), title_fontsize=7)
        return save_figure(figure, target)


def tabulate(folder: str | Path, over: str, line: str | None, metrics: list[str], epoch: str) -> pd.DataFrame:
    """Return mean, half of the 95 % interval (Student's t; NaN for one seed) and number of seeds of each cell.

    Args and errors are those of `read_runs`; besides, the runs of a cell may differ in nothing but their seed.

    Returns:
        a table with the columns over, line, metric, mean, half, seeds, best (of its metric, a loss where it is
        least); what is best in the first metric comes first.
    """
    settings = {'--over': over} | ({'--line': line} if line else {})
    runs, names = read_runs('--table', folder, settings, metrics, epoch), list(settings.values())
    check_alike(f'--table {folder}', runs, names, FREE - {over, line})
    runs['args.'] = ''  # the one column of a table without --line
    keys = [f'args.{over}', f'args.{line or ""}']
    twice = runs.duplicated([*keys, 'args.seed'])
    if twice.any():
        raise UserError(f'--table {folder}: {runs.index[twice][0]} has the {", ".join(names)} and seed of another run')
    cells = []
    for (row, column), group in runs.groupby(keys, dropna=False):
        for metric in metrics:
            mean, half = mean_and_half_interval(group[metric].astype(float))
            cells.append({'over': str(row), 'line': str(column), 'metric': metric, 'mean': mean, 'half': half,
                          'seeds': len(group)})
    table = pd.DataFrame(cells)
    goodness = table['mean'].where(~table['metric'].isin(LESS_IS_BETTER), -table['mean'])
    table['best'] = goodness == goodness.groupby(table['metric']).transform('max')
    first = table['metric'] == metrics[0]
    ranked = goodness[first].groupby(table['over'][first]).max().sort_values(ascending=False)
    order = {name: number for number, name in enumerate(ranked.index)}
    return table.sort_values(['over', 'line'], key=lambda names: names.map(order).fillna(0) if names.name == 'over'
                             else names, kind='stable').reset_index(drop=True)


def format_cells(table: pd.DataFrame, over: str, metrics: list[str]) -> str:
    """Return what `tabulate` found as Markdown; the best of each metric is bold."""
    columns = [(metric, line) for metric in metrics for line in sorted(table['line'].unique())]

    def text(found: pd.DataFrame) -> str:
        if found.empty:
            return ''
        cell = found.iloc[0]
        value = f'{cell["mean"]:.1f}' + (f' ± {cell["half"]:.1f}' if cell['seeds'] > 1 else '')
        return f'**{value}**' if cell['best'] else value

    titles = [f'{line}: {title_of(metric)}' if line else title_of(metric) for metric, line in columns]
    lines = [f'| {over} | {" | ".join(titles)} | seeds |', '|---' * (len(columns) + 2) + '|']
    for name, row in table.groupby('over', sort=False):
        cells = [text(row[(row['metric'] == metric) & (row['line'] == line)]) for metric, line in columns]
        low, high = row['seeds'].min(), row['seeds'].max()
        lines.append(f'| {name} | {" | ".join(cells)} | {low if low == high else f"{low} to {high}"} |')
    return '\n'.join(lines)


def draw_table(table: pd.DataFrame, metrics: list[str], epoch: str, target: Path) -> Path:
    """Draw what `tabulate` found: a panel a metric, a row for each value, a colour a line, a bar for the interval."""
    with plot_style():
        from matplotlib import pyplot

        names, lines = list(table['over'].unique())[::-1], sorted(table['line'].unique())
        figure, axes = pyplot.subplots(1, len(metrics), figsize=(3.6 * len(metrics), 1.1 + 0.32 * len(names)),
                                       squeeze=False, sharey=True, layout='constrained')
        for axis, metric in zip(axes[0], metrics, strict=True):
            for number, line in enumerate(lines):
                part = table[(table['metric'] == metric) & (table['line'] == line)]
                heights = [names.index(name) + 0.22 * ((len(lines) - 1) / 2 - number) for name in part['over']]
                axis.errorbar(part['mean'], heights, xerr=part['half'].fillna(0), fmt=MARKERS[number % len(MARKERS)],
                              color=COLOURS[number % len(COLOURS)], markersize=4, capsize=2, label=line or None)
            axis.set(xlabel=f'{title_of(metric)}, {epoch} epoch', yticks=range(len(names)), yticklabels=names,
                     ylim=(-0.6, len(names) - 0.4))
            axis.grid(axis='x', alpha=0.3)
        if any(lines):
            handles, labels = axes[0, 0].get_legend_handles_labels()
            figure.legend(handles, labels, loc='outside upper center', ncols=len(lines))
        return save_figure(figure, target)


# ---------------------------------------------------- command line --------------------------------------------------
def get_args(argv: list[str] | None = None):
    """Parse the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument('statistics', nargs='*', type=user_path, help=f'one or more RUN{ENDING}')
    parser.add_argument('--sweep', type=user_path, metavar='FOLDER', help='draw a sweep from the statistics files of a '
                        'folder')
    parser.add_argument('--table', type=user_path, metavar='FOLDER', help='print a table of the runs of a folder in '
                        'Markdown, and draw it')
    parser.add_argument('--over', help='--sweep: the setting on the horizontal axis [momentum]; --table: that of the '
                        'rows [loss_name]')
    parser.add_argument('--line', help='--sweep: the setting that has a line for each value, as loss_name or '
                        'backbone_type [loss_name]; --table: that of the columns [none]')
    parser.add_argument('--epoch', choices=('last', 'best'), help='--sweep, --table: which epoch of a run; the best '
                        'one is chosen on the test classes [last]')
    parser.add_argument('--metric', nargs='+', help='column of the statistics, as dense_R@1, binary_R@1, loss, '
                        'dense_MAP@R; several make several panels [one run: loss, accuracy, lr and R@1; else '
                        'dense_R@1]')
    parser.add_argument('--output', type=user_path, help='PNG file; a PDF is written beside it [beside the statistics]')
    args = parser.parse_args(argv)
    sources = [bool(args.statistics), args.sweep is not None, args.table is not None]
    if sum(sources) != 1:
        raise UserError('name statistics files, or a folder with --sweep or --table, one of them' if any(sources) else
                        'nothing to draw: name statistics files, or a folder with --sweep or --table')
    defaults = {'over': 'loss_name', 'line': None, 'epoch': 'last'} if args.table is not None else {
        'over': 'momentum', 'line': 'loss_name', 'epoch': 'last'}
    for flag, default in defaults.items():
        if getattr(args, flag) is None:
            setattr(args, flag, default)
        elif args.statistics:
            raise UserError(f'--{flag} {getattr(args, flag)} has no effect without --sweep or --table; leave it out')
    if args.over == args.line:
        raise UserError(f'--over and --line are both {args.line}; choose two settings')
    if args.sweep is not None and len(args.metric or ()) > 1:
        raise UserError(f'--metric {" ".join(args.metric)}: a sweep shows one metric; name one')
    if args.output is not None and not args.output.endswith('.png'):
        raise UserError(f'--output {args.output} must end in .png; a PDF is written beside it')
    return args


def main() -> None:
    """Draw what the command line names and print where it is."""
    args = get_args()
    if args.sweep is not None:
        metric = args.metric[0] if args.metric else 'dense_R@1'
        summary = summarize(read_sweep(args.sweep, args.over, args.line, metric, args.epoch), metric)
        default = Path(args.sweep) / f'sweep_{args.over}_{metric}.png'
        print(f'{title_of(metric)}, {args.epoch} epoch')
        print(summary.rename(columns={'line': args.line, 'over': args.over, 'count': 'seeds'}).to_string(
            index=False, float_format=lambda value: f'{value:.4g}'))
    elif args.table is not None:
        metrics = args.metric or ['dense_R@1', 'binary_R@1']
        cells = tabulate(args.table, args.over, args.line, metrics, args.epoch)
        default = Path(args.table) / f'table_{args.over}.png'
        print(format_cells(cells, args.over, metrics))
    else:
        paths = [Path(name) for name in args.statistics]
        tables = dict(zip(short_names(paths), map(read_statistics, paths), strict=True))
        metrics = args.metric or ['dense_R@1']
        for path, table in zip(paths, tables.values(), strict=True):
            for metric in metrics:
                check_metric(table, metric, path)
        run = paths[0].name.removesuffix(ENDING)
        single = len(paths) == 1 and not args.metric
        default = paths[0].with_name(f'{run}_curves.png' if single else f'runs_{"_".join(metrics)}.png')
    target = Path(args.output) if args.output is not None else default
    make_folder('--output', target.parent)
    for file in (target, target.with_suffix('.pdf')):
        check_replaceable(file)
    if args.sweep is not None:
        print(draw_sweep(summary, args.over, args.line, metric, args.epoch, target))
    elif args.table is not None:
        print(draw_table(cells, metrics, args.epoch, target))
    elif single:
        print(draw_curves(next(iter(tables.values())), target, run))
    else:
        print(draw_runs(tables, metrics, target))


if __name__ == '__main__':
    run_script(main)
