"""What a run says of itself: its columns, the line of an epoch, whether it collapsed, its end, a mean over seeds."""
import argparse
import shlex
from pathlib import Path

from engine.errors import UserError
from engine.files import write_atomically
from engine.runs import RunFiles
from metrics import NUMBERS_OF_QUERIES


def flatten(results: dict[str, dict[str, float]]) -> dict[str, float]:
    """Turn {'dense': {'R@1': ...}, ...} into {'dense_R@1': ...}, the columns of the statistics."""
    return {f'{kind}_{name}': value for kind, metrics in results.items() for name, value in metrics.items()
            if name not in NUMBERS_OF_QUERIES}


def check_collapse(row: dict, num_classes: int, args: argparse.Namespace) -> None:
    """Stop, or warn, where an epoch's accuracy is that of chance: moving proxies can fall together.

    Source: Asymptotic Proxy, whose runs collapsed at a momentum of 0.05 to 0.1.
    """
    chance = 100 / num_classes
    if row['accuracy'] >= min(2 * chance, chance + 5):
        return
    rates = f'{row["lr"]:g}' + (f' and {row["proxy_lr"]:g} (proxies)' if row['proxy_lr'] else '')
    message = (f'collapsed? an accuracy of {row["accuracy"]:.2f} % in epoch {row["epoch"]} is chance for {num_classes} '
               f'classes, at a learning rate of {rates}; try a smaller --lr'
               + (f', or a --momentum nearer 0.5 than {args.momentum:g}' if args.proxy_update == 'momentum' else '')
               + (', or --proxy_update gradient' if args.proxy_update != 'gradient' else ''))
    if args.on_collapse == 'stop':
        raise UserError(f'{message}; --resume --on_collapse warn goes on all the same')
    print(message, flush=True)


def describe(row: dict, recalls: tuple[int, ...]) -> str:
    """Return the recalls of an epoch as a phrase: `R@1 72.09 R@2 81.24 (binary 70.11 79.30)`."""
    dense = ' '.join(f'R@{k} {row[f"dense_R@{k}"]:.2f}' for k in recalls)
    binary = ' '.join(f'{row[f"binary_R@{k}"]:.2f}' for k in recalls)
    return f'{dense} (binary {binary})'


def chosen_epoch(rows: list[dict]) -> dict:
    """Return the row of the best epoch: on held out training classes where there are some, else on the test classes."""
    return max(rows, key=lambda row: row.get('val_dense_R@1', row['dense_R@1']))


def print_end(rows: list[dict], args: argparse.Namespace, files: RunFiles, query: str) -> None:
    """Print the chosen, the last and the best epoch, and the commands that come next."""
    best, chosen = max(rows, key=lambda row: row['dense_R@1']), chosen_epoch(rows)
    if args.val_ratio:
        print(f'epoch {chosen["epoch"]}, chosen on held out training classes: {describe(chosen, args.recalls)}')
    print(f'best epoch {best["epoch"]} (chosen on the test classes, as in the papers): {describe(best, args.recalls)}')
    print(f'last epoch {rows[-1]["epoch"]}: {describe(rows[-1], args.recalls)}')
    evaluate = ['python', 'evaluate.py', '--data_base', str(files.data_base)]
    look_up = ['python', 'test.py', '--data_base', str(files.data_base), '--data_path', args.data_path]
    if args.results_dir != 'results':
        look_up += ['--results_dir', args.results_dir]
    floor = rows[-1].get('epoch0_R@1')
    if floor is not None and floor > best['dense_R@1']:
        print(f'the untouched trunk (R@1 {floor:.2f}) is better than every epoch of this training: it can be searched '
              'with evaluate.py --zero_shot --save')
    print('next:')
    print('  ' + shlex.join(evaluate + (['--allow_seen'] if args.allow_seen else [])))
    print('  ' + shlex.join([*look_up, '--query_img_name', query]))


def mean_and_half_interval(values) -> tuple[float, float]:
    """Return the mean of a pandas series and half of the interval that holds the mean of more with 95 % confidence.

    Student's t distribution; of one value the half is NaN.
    """
    from scipy import stats

    return values.mean(), stats.t.ppf(0.975, len(values) - 1) * values.sem() if len(values) > 1 else float('nan')


def report_seeds(runs: dict[int, list[dict]], name: str, folder: Path) -> None:
    """Save and print the mean of R@1 over runs that differ in their seed alone, and how sure it is.

    The interval holds the mean of more runs with 95 % confidence (Student's t distribution).

    Args:
        runs: {seed: rows of its statistics}.
        name: of the run without a seed.
        folder: where {name}_seeds.csv goes.
    """
    import pandas as pd

    epochs = {'last': lambda rows: rows[-1], 'best on the test classes': lambda rows: max(
        rows, key=lambda row: row['dense_R@1'])}
    if 'val_dense_R@1' in next(iter(runs.values()))[0]:
        epochs = {'chosen on held out training classes': chosen_epoch, **epochs}
    table = []
    for epoch, choose in epochs.items():
        values = pd.Series([choose(rows)['dense_R@1'] for rows in runs.values()])
        mean, half = mean_and_half_interval(values)
        table.append({'run': name, 'epoch': epoch, 'seeds': ' '.join(map(str, runs)), 'mean_R@1': mean,
                      'std_R@1': values.std(), 'low_R@1': max(0.0, mean - half), 'high_R@1': min(100.0, mean + half)})
    write_atomically(folder / f'{name}_seeds.csv', lambda file: pd.DataFrame(table).to_csv(file, index=False))
    print(f'R@1 over {len(runs)} seeds, {folder / f"{name}_seeds.csv"}:')
    print('| run | epoch | R@1, mean and standard deviation | 95 % interval of the mean |\n|---|---|---|---|')
    for row in table:
        print(f'| {name} | {row["epoch"]} | {row["mean_R@1"]:.2f} +- {row["std_R@1"]:.2f} | '
              f'{row["low_R@1"]:.2f} to {row["high_R@1"]:.2f} |')
