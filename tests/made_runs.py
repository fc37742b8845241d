"""Statistics of runs that were never trained, and what a figure shows of them."""
from pathlib import Path

from training.statistics import save_statistics


def write_run(folder: Path, name: str, recalls: list[float], **settings) -> Path:
    """Write the statistics of a run whose R@1 takes these values, and return their file."""
    rows = [{'epoch': epoch, 'loss': 5.0 / epoch, 'accuracy': 10.0 * epoch, 'img_s': 100.0, 'lr': 1e-4,
             'proxy_lr': 1e-2, 'dense_R@1': recall, 'binary_R@1': recall / 2}
            for epoch, recall in enumerate(recalls, start=1)]
    settings = {'seed': 0, 'loss_name': 'asymptotic_proxy', 'num_epochs': len(recalls), 'momentum': 0.5, **settings}
    path = folder / f'{name}_statistics.csv'
    save_statistics(rows, {**settings, 'run': name}, path)
    return path


def points_of(axis) -> dict[str, list[tuple[float, float]]]:
    """Return {label: [(x, y), ...]} of the labelled lines of an axis."""
    return {line.get_label(): list(zip(line.get_xdata(), line.get_ydata(), strict=True))
            for line in axis.lines if not line.get_label().startswith('_')}
