"""What a run reports: the columns of its statistics, a line per epoch, a collapse, its end, the mean over seeds."""
import shlex
from pathlib import Path

from common.errors import UserError
from common.files import write_atomically
from common.results import RunFiles
from retrieval.metrics import NUMBERS_OF_QUERIES
from training.options import RunOptions


# ---------------------------------------------------- an epoch -----------------------------------------------------
def flatten(results: dict[str, dict[str, float]]) -> dict[str, float]:
    """Turn {'dense': {'R@1': ...}, ...} into {'dense_R@1': ...}, the columns of the statistics."""
    return {f'{kind}_{name}': value for kind, metrics in results.items() for name, value in metrics.items()
            if name not in NUMBERS_OF_QUERIES}


def format_recalls(row: dict, recalls: tuple[int, ...]) -> str:
    """Return the recalls of an epoch as a phrase: `R@1 72.09 R@2 81.24 (binary 70.11 79.30)`."""
    dense = ' '.join(f'R@{k} {row[f"dense_R@{k}"]:.2f}' for k in recalls)
    binary = ' '.join(f'{row[f"binary_R@{k}"]:.2f}' for k in recalls)
    return f'{dense} (binary {binary})'


def format_epoch(row: dict, options: RunOptions) -> str:
    """Return the line that is printed after an epoch."""
    trained = (f'epoch {row["epoch"]}/{options.num_epochs}: loss {row["loss"]:.4f}, accuracy {row["accuracy"]:.1f} %, '
               f'{row["img_s"]:.0f} img/s')
    return f'{trained}; {format_recalls(row, options.recalls)}' if measured_rows([row]) else trained


def check_collapse(row: dict, num_classes: int, options: RunOptions) -> None:
    """Stop, or warn, if the accuracy of an epoch is that of chance: moving proxies can collapse to one point.

    Source: Asymptotic Proxy, whose runs collapsed at a momentum of 0.05 to 0.1.
    """
    chance = 100 / num_classes
    if row['accuracy'] >= min(2 * chance, chance + 5):
        return
    rates = f'{row["lr"]:g}' + (f' and {row["proxy_lr"]:g} (proxies)' if row['proxy_lr'] else '')
    message = (f'collapsed? an accuracy of {row["accuracy"]:.2f} % in epoch {row["epoch"]} is chance for {num_classes} '
               f'classes, at a learning rate of {rates}; try a smaller --lr')
    if options.proxy_update == 'momentum':
        message += f', or a --momentum nearer 0.5 than {options.momentum:g}'
    if options.proxy_update != 'gradient':
        message += ', or --proxy_update gradient'
    if options.on_collapse == 'stop':
        raise UserError(f'{message}; --resume --on_collapse warn continues nevertheless')
    print(message, flush=True)


# ---------------------------------------------------- the end of a run --------------------------------------------
def chosen_epoch(rows: list[dict]) -> dict | None:
    """Return the row of the best epoch, by R@1 on held-out training classes if there are any, else on the test classes.

    None if no epoch has been measured yet (--eval_every).
    """
    return max(measured_rows(rows), key=lambda row: row.get('val_dense_R@1', row['dense_R@1']), default=None)


def best_epoch(rows: list[dict]) -> dict:
    """Return the row of the epoch with the best R@1 on the test classes, as the papers choose it."""
    return max(measured_rows(rows), key=lambda row: row['dense_R@1'])


def measured_rows(rows: list[dict]) -> list[dict]:
    """Return the rows of the epochs after which retrieval was measured."""
    return [row for row in rows if 'dense_R@1' in row]


def format_seconds(seconds: float) -> str:
    """Return a duration as text: `45 s`, `3 min 5 s`, `2 h 7 min`."""
    whole = round(seconds)
    if whole < 60:
        return f'{whole} s'
    if whole < 3600:
        return f'{whole // 60} min {whole % 60} s'
    return f'{whole // 3600} h {whole % 3600 // 60} min'


def epoch_title(epoch: int, first_epoch: int, num_epochs: int, seconds: float) -> str:
    """Return the title of an epoch's progress bar: from the second epoch on with the time left for the whole training.

    Args:
        first_epoch: the epoch with which this call began.
        seconds: since then.
    """
    title = f'epoch {epoch}/{num_epochs}'
    if epoch == first_epoch:
        return title
    seconds_per_epoch = seconds / (epoch - first_epoch)
    return f'{title}, {format_seconds(seconds_per_epoch * (num_epochs - epoch + 1))} left'


def print_end(rows: list[dict], options: RunOptions, files: RunFiles, query: str) -> None:
    """Print the chosen, the best and the last epoch, and the commands to run next.

    Args:
        query: path of a test image, for the retrieval command.
    """
    best, chosen, last = best_epoch(rows), chosen_epoch(rows), rows[-1]
    if options.val_ratio:
        print(f'epoch {chosen["epoch"]}, chosen on held-out training classes: '
              f'{format_recalls(chosen, options.recalls)}')
    if len(measured_rows(rows)) > 1:
        print(f'best epoch {best["epoch"]} (chosen on the test classes, as in the papers): '
              f'{format_recalls(best, options.recalls)}')
    print(f'last epoch {last["epoch"]}: {format_recalls(last, options.recalls)}')
    baseline = last.get('pretrained_R@1')
    if baseline is not None and baseline > best['dense_R@1']:
        print(f'the pretrained backbone (R@1 {baseline:.2f}) is better than every epoch of this training; to search '
              'with it, use evaluate.py --pretrained --save')
    evaluate = ['python', 'evaluate.py', '--data_base', str(files.data_base)]
    if options.allow_seen:
        evaluate.append('--allow_seen')
    retrieve = ['python', 'test.py', '--data_base', str(files.data_base), '--data_path', options.data_path]
    if options.results_dir != 'results':
        retrieve += ['--results_dir', options.results_dir]
    print('next:')
    print(f'  {shlex.join(evaluate)}')
    print(f'  {shlex.join([*retrieve, "--query_img_name", query])}')


# ---------------------------------------------------- several seeds -----------------------------------------------
def mean_and_half_interval(values) -> tuple[float, float]:
    """Return the mean of a pandas series, and half of the 95 % confidence interval of the mean (Student's t).

    The half is NaN for a single value.
    """
    from scipy import stats

    if len(values) == 1:
        return values.mean(), float('nan')
    return values.mean(), stats.t.ppf(0.975, len(values) - 1) * values.sem()


def report_seeds(runs: dict[int, list[dict]], name: str, folder: Path) -> None:
    """Save and print mean, standard deviation and 95 % interval of R@1 over runs that differ in their seed alone.

    Args:
        runs: {seed: rows of its statistics}.
        name: of the run without a seed.
        folder: where {name}_seeds.csv goes.
    """
    import pandas as pd

    epochs = {'last': lambda rows: rows[-1], 'best on the test classes': best_epoch}
    if 'val_dense_R@1' in next(iter(runs.values()))[-1]:
        epochs = {'chosen on held-out training classes': chosen_epoch, **epochs}
    table = []
    for epoch, choose in epochs.items():
        values = pd.Series([choose(rows)['dense_R@1'] for rows in runs.values()])
        mean, half = mean_and_half_interval(values)
        table.append({'run': name, 'epoch': epoch, 'seeds': ' '.join(map(str, runs)), 'mean_R@1': mean,
                      'std_R@1': values.std(), 'low_R@1': max(0.0, mean - half), 'high_R@1': min(100.0, mean + half)})
    file = folder / f'{name}_seeds.csv'
    write_atomically(file, lambda target: pd.DataFrame(table).to_csv(target, index=False))
    print(f'R@1 over {len(runs)} seeds, {file}:')
    print('| run | epoch | R@1, mean and standard deviation | 95 % interval of the mean |\n|---|---|---|---|')
    for row in table:
        print(f'| {name} | {row["epoch"]} | {row["mean_R@1"]:.2f} +- {row["std_R@1"]:.2f} | '
              f'{row["low_R@1"]:.2f} to {row["high_R@1"]:.2f} |')
