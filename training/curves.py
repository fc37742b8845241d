"""The curves of one run, drawn from its statistics: loss, accuracy, learning rates and R@1 over the epochs.

pandas and matplotlib are imported where they are used, so that a script which draws only at its end starts at once.
"""
from pathlib import Path

from common.errors import UserError, suggestion
from retrieval.figures import COLOURS, GREY, plot_style, save_figure

PANELS = ('loss', 'accuracy', 'lr', 'dense_R@1')
FEW_EPOCHS = 30  # up to so many are drawn as points on the line
TITLES = {'loss': 'loss', 'accuracy': 'training accuracy (%)', 'lr': 'learning rate', 'img_s': 'images per second',
          'proxy_lr': 'learning rate of the proxies', 'angle_to_proxy': 'class mean to proxy (degrees)'}


def title_of(metric: str) -> str:
    """Return the axis label of a column of the statistics: `dense_R@1` -> `R@1, dense (%)`."""
    if metric.startswith('val_'):
        return title_of(metric.removeprefix('val_')).replace(' (%)', ', held-out classes (%)')
    kind, _, name = metric.partition('_')
    if kind in ('dense', 'binary'):
        return f'{name}, {kind} (%)'
    return TITLES.get(metric, metric)


def check_metric(table, metric: str, source: str | Path) -> None:
    """Check that a metric can be drawn: a column with a finite number in each epoch that has one.

    Args:
        table: DataFrame of the statistics, a row per epoch.
        metric: name of a column.
        source: file of the statistics, for the messages.

    Raises:
        UserError: if the column does not exist or holds no numbers (the columns that do are listed), or if a number
            is missing or infinite.
    """
    measured = [column for column in table.select_dtypes('number')
                if not column.startswith('args.') and column != 'epoch']
    if metric not in measured:
        raise UserError(f'--metric {metric} is not in {source}{suggestion(metric, measured)} (there are: '
                        f'{", ".join(measured)})')
    values = measured_rows(table, metric)[metric]
    if values.empty or not values.abs().lt(float('inf')).all():  # NaN is not less than infinity either
        raise UserError(f'{source}: {metric} is empty or infinite in some epochs; draw another --metric')


def measured_rows(table, metric: str):
    """Return the rows of the epochs after which a metric of retrieval was measured (--eval_every); else all rows."""
    return table[table[metric].notna()] if metric.startswith(('dense_', 'binary_', 'val_')) else table


def epoch_limits(epochs) -> tuple[float, float]:
    """Return the limits of the epoch axis, half an epoch wider than the data, so that one epoch has a width too."""
    return epochs.min() - 0.5, epochs.max() + 0.5


def draw_curves(table, target: Path, title: str) -> Path:
    """Draw loss, accuracy, learning rate and R@1 of one run in four panels; the chosen epoch is marked in each.

    Args:
        table: DataFrame of the statistics, a row per epoch.
        target: PNG file; a PDF is written beside it.
        title: above the panels; also names the statistics in errors.

    Returns:
        the path of the PNG.

    Raises:
        UserError: if one of the four metrics is missing.
    """
    for metric in PANELS:
        check_metric(table, metric, title)
    is_held_out = 'val_dense_R@1' in table
    chosen = table['val_dense_R@1' if is_held_out else 'dense_R@1'].idxmax()
    epochs = table['epoch']
    style = {'marker': 'o', 'markersize': 3} if len(table) <= FEW_EPOCHS else {}
    with plot_style():
        from matplotlib import pyplot
        from matplotlib.ticker import MaxNLocator

        figure, axes = pyplot.subplots(2, 2, figsize=(7.2, 4.8), layout='constrained')
        for axis, metric in zip(axes.flat, PANELS, strict=True):
            label = 'network' if metric == 'lr' else 'dense'
            rows = measured_rows(table, metric)
            axis.plot(rows['epoch'], rows[metric], color=COLOURS[0], label=label, **style)
            axis.set(xlabel='epoch', ylabel=title_of(metric), xlim=epoch_limits(epochs))
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            axis.axvline(epochs[chosen], color=GREY, linewidth=0.8, linestyle=':', zorder=0)
        complete_rates(axes[1, 0], table, style)
        complete_recall(axes[1, 1], table, style)
        word = 'chosen' if is_held_out else 'best'
        recall = table['dense_R@1'][chosen]
        axes[1, 1].plot(epochs[chosen], recall, '*', color=COLOURS[5], markersize=9, zorder=3,
                        label=f'{word}: epoch {epochs[chosen]}, {recall:.1f} %')
        axes[1, 1].legend()
        figure.suptitle(title)
        return save_figure(figure, target)


def complete_rates(axis, table, style: dict) -> None:
    """Make the axis of the learning rates logarithmic, and add the rate of proxies that learn."""
    axis.set_yscale('log')
    axis.yaxis.set_major_formatter(lambda rate, _: f'{rate:g}')
    axis.yaxis.set_minor_formatter(lambda rate, _: '')
    if 'proxy_lr' in table and (table['proxy_lr'] > 0).all():  # moving proxies have the rate 0
        axis.plot(table['epoch'], table['proxy_lr'], color=COLOURS[1], linestyle='--', label='proxies', **style)
        axis.legend()


def complete_recall(axis, table, style: dict) -> None:
    """Add to dense R@1 what else was measured: binary codes, held-out classes, the pretrained backbone."""
    table = measured_rows(table, 'dense_R@1')
    epochs = table['epoch']
    if 'binary_R@1' in table:
        axis.plot(epochs, table['binary_R@1'], color=COLOURS[1], linestyle='--', label='binary', **style)
    if 'pretrained_R@1' in table:
        axis.axhline(table['pretrained_R@1'].iloc[-1], color=GREY, linewidth=0.8, label='pretrained backbone')
    if 'val_dense_R@1' in table:
        axis.plot(epochs, table['val_dense_R@1'], color=COLOURS[2], linestyle=':', label='held-out classes', **style)
    axis.set_ylabel('R@1 (%)')
