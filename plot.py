"""Draw what runs measured: the curves of one run, several runs in one plot, or a sweep over a setting.

    python plot.py results/car_resnet50_balanced_proxy_512_statistics.csv                    # one run, four panels
    python plot.py results/*_statistics.csv --metric dense_R@1 loss --output results/runs.png   # a panel per metric
    python plot.py --sweep results/sweep --over momentum --line loss_name --metric dense_R@1

Reads {run}_statistics.csv: a row an epoch, what was measured, then the run's settings as columns `args.NAME`. A sweep
takes one epoch of each run in a folder (the last one, or the best), and draws mean and standard deviation over the
seeds. Everything is written as PNG and PDF.
"""
from pathlib import Path

import pandas as pd

from engine.errors import UserError, nearest
from engine.files import make_folder
from engine.runs import RunFiles, read_statistics
from utils import COLOURS, GREY, Parser, check_replaceable, plot_style, run_script, save_figure, user_path

ENDING = f'_{RunFiles.ENDINGS["statistics"]}'
TITLES = {'loss': 'loss', 'accuracy': 'training accuracy (%)', 'lr': 'learning rate', 'img_s': 'images per second',
          'proxy_lr': 'learning rate of the proxies', 'angle_to_proxy': 'class mean to proxy (degrees)'}
LINES = ('-', '--', ':', '-.')
MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X')  # 8 colours and 7 markers: 56 runs look different
# Settings that may differ between runs of one line in a sweep: repetitions and names.
FREE = {'seed', 'run', 'remark'}
SAME = {'scale': 'temperature', 'temperature': 'scale'}  # two words for one setting


# ---------------------------------------------------- statistics files ----------------------------------------------
def check_metric(table: pd.DataFrame, metric: str, path: str | Path) -> None:
    """Refuse a metric that a statistics file does not have, and list those that it has."""
    measured = [column for column in table.select_dtypes('number') if not column.startswith('args.')
                and column != 'epoch']
    if metric not in measured:
        raise UserError(f'--metric {metric} is not in {path}{nearest(metric, measured)} (there are: '
                        f'{", ".join(measured)})')
    if not table[metric].notna().all():
        raise UserError(f'{path}: {metric} is empty in some epochs; draw another --metric')


def title_of(metric: str) -> str:
    """Return the label of an axis: `dense_R@1` -> `R@1, dense (%)`."""
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


# ---------------------------------------------------- sweeps --------------------------------------------------------
def read_sweep(folder: str | Path, over: str, line: str, metric: str, epoch: str) -> pd.DataFrame:
    """Read one number from each run of a folder.

    Args:
        folder: holds the statistics files.
        over: the setting that was swept (a number).
        line: the setting that tells the lines apart.
        metric: the column to read.
        epoch: `last`, or `best` by dense R@1.

    Returns:
        a table with the columns line, over, seed and metric, a row per run.

    Raises:
        UserError: if the folder holds no runs, one is not finished, a setting is missing, or runs that would be
            averaged differ in more than their seed.
    """
    paths = sorted(Path(folder).glob(f'*{ENDING}'))
    if not paths:
        raise UserError(f'--sweep {folder} holds no *{ENDING}; train into it with --results_dir {folder}')
    rows = []
    for path in paths:
        table = read_statistics(path)
        check_metric(table, metric, path)
        settings = [column.removeprefix('args.') for column in table if column.startswith('args.')]
        for flag, name in (('--over', over), ('--line', line)):
            if name not in settings:
                raise UserError(f'{flag} {name} is no setting of the run in {path}{nearest(name, settings)}')
        last = table.iloc[-1]
        if 'args.num_epochs' in table and last['epoch'] < last['args.num_epochs']:
            raise UserError(f'{path}: {last["epoch"]} of {last["args.num_epochs"]} epochs; finish this run with '
                            '--resume, or move it away')
        if epoch == 'best' and 'dense_R@1' not in table:
            raise UserError(f'--epoch best needs dense_R@1, which {path} does not have; use --epoch last')
        rows.append(last if epoch == 'last' else table.loc[table['dense_R@1'].idxmax()])
    runs = pd.DataFrame(rows, index=[path.name for path in paths])
    if not pd.api.types.is_numeric_dtype(runs[f'args.{over}'].infer_objects()) or runs[f'args.{over}'].isna().any():
        raise UserError(f'--over {over} is no number in every run of {folder}; sweep over a number')
    free = FREE | {over, SAME.get(over), line}
    fixed = [column for column in runs if column.startswith('args.') and column.removeprefix('args.') not in free]
    for name, group in runs.groupby(f'args.{line}', dropna=False):
        different = [column.removeprefix('args.') for column in fixed if group[column].nunique(dropna=False) > 1]
        if different:
            raise UserError(f'--sweep {folder}: the runs of {line} {name} differ in {", ".join(different)} too; keep '
                            'runs that are not of this sweep elsewhere')
    runs = runs.rename(columns={f'args.{line}': 'line', f'args.{over}': 'over', 'args.seed': 'seed'})
    twice = runs.duplicated(['line', 'over', 'seed'])
    if twice.any():
        raise UserError(f'--sweep {folder}: {runs.index[twice][0]} has the {line}, {over} and seed of another run')
    return runs[['line', 'over', 'seed', metric]].infer_objects().reset_index(drop=True)


def summarize(runs: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return mean, standard deviation (n - 1; 0 for one seed) and number of seeds per line and swept value."""
    table = runs.groupby(['line', 'over'])[metric].agg(['mean', 'std', 'count']).reset_index()
    return table.fillna({'std': 0.0})


def draw_sweep(summary: pd.DataFrame, over: str, line: str, metric: str, epoch: str, target: Path) -> Path:
    """Draw the mean of a metric over a setting, a line per value of another, with a band of one standard deviation."""
    with plot_style():
        from matplotlib import pyplot

        figure, axis = pyplot.subplots(figsize=(4.6, 3.4), layout='constrained')
        for number, (name, part) in enumerate(summary.groupby('line')):
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


# ---------------------------------------------------- command line --------------------------------------------------
def get_args(argv: list[str] | None = None):
    """Parse the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument('statistics', nargs='*', type=user_path, help=f'one or more RUN{ENDING}')
    parser.add_argument('--sweep', type=user_path, metavar='FOLDER', help='draw a sweep from the statistics files of a '
                        'folder')
    parser.add_argument('--over', help='--sweep: the setting on the horizontal axis [momentum]')
    parser.add_argument('--line', help='--sweep: the setting that has a line for each value, as loss_name or '
                        'backbone_type [loss_name]')
    parser.add_argument('--epoch', choices=('last', 'best'), help='--sweep: which epoch of a run; the best one is '
                        'chosen on the test classes [last]')
    parser.add_argument('--metric', nargs='+', help='column of the statistics, as dense_R@1, binary_R@1, loss, '
                        'dense_MAP@R; several make several panels [one run: loss, accuracy, lr and R@1; else '
                        'dense_R@1]')
    parser.add_argument('--output', type=user_path, help='PNG file; a PDF is written beside it [beside the statistics]')
    args = parser.parse_args(argv)
    if bool(args.statistics) == (args.sweep is not None):
        raise UserError('name statistics files, or a folder with --sweep, not both' if args.statistics else
                        'nothing to draw: name statistics files, or a folder with --sweep')
    for flag, default in (('over', 'momentum'), ('line', 'loss_name'), ('epoch', 'last')):
        if getattr(args, flag) is None:
            setattr(args, flag, default)
        elif args.sweep is None:
            raise UserError(f'--{flag} {getattr(args, flag)} has no effect without --sweep; leave it out')
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
    elif single:
        print(draw_curves(next(iter(tables.values())), target, run))
    else:
        print(draw_runs(tables, metrics, target))


if __name__ == '__main__':
    run_script(main)
