"""Break runs and files at length and count what happened; the tests do the same at a small size.

    python benchmarks/soak.py                                           # about an hour on two cores
    python benchmarks/soak.py --kills 5 --process_kills 1 --inputs 10000 --damages 50 --tampers 50   # minutes

Runs of each way in which proxies move are killed by SIGKILL at random moments, with 0 and 2 workers and with 2
processes, resumed, and compared bit for bit with the uninterrupted run. Random texts go through every parser; truncated
and bit-flipped checkpoints, data bases, models, weights, annotations and caches are read, and such whose checksums are
right and whose contents are strange. Where a tmpfs can be mounted, a run fills one. Ends with one line of JSON; every
fault is printed, and the exit code is 1 if there is one.
"""
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_common import finish

sys.path.insert(0, str(Path(__file__).parent.parent / 'tests'))


def kill_runs(data: Path, folder: Path, number: int, rng) -> dict:
    """Kill runs at random moments, resume them, compare; returns counts and faults."""
    from faults import RULES, TINY, differing_results, train
    from tqdm import tqdm

    faults, killed, saved_before = [], 0, 0
    whole, seconds = {}, {}
    for rule, words in RULES.items():
        for workers in (0, 0, 2):  # the first one starts the process from which the others are forked
            whole[rule] = folder / f'whole_{rule}'
            shutil.rmtree(whole[rule], ignore_errors=True)
            start = time.perf_counter()
            code, printed = train((*words, *TINY, '--num_workers', workers, '--data_path', data, '--results_dir',
                                   whole[rule]), folder / 'whole.log')
            seconds[rule, workers] = time.perf_counter() - start
            if code:
                raise SystemExit(f'the uninterrupted run failed: {printed}')
    bar = tqdm(total=number, desc='kill', dynamic_ncols=True)
    while killed < number:
        rule, workers = list(RULES)[killed % 3], (0, 2)[killed // 3 % 2]
        results, log = folder / 'killed', folder / 'killed.log'
        command = (*RULES[rule], *TINY, '--num_workers', workers, '--data_path', data, '--results_dir', results)
        code, _ = train(command, log, seconds=rng.uniform(0.3, seconds[rule, workers]))
        if code == -signal.SIGKILL:  # else it was done before
            killed += 1
            bar.update()
            saved = bool(list(results.glob('*_checkpoint.pth')))
            saved_before += saved
            code, printed = train((*command, '--resume' if saved else '--overwrite'), log)
            different = differing_results(whole[rule], results) if code == 0 else [printed]
            if different:
                faults.append(f'{rule}, {workers} workers: {different}')
        shutil.rmtree(results, ignore_errors=True)
    return {'kills': killed, 'with_a_checkpoint': saved_before, 'faults': faults}


def kill_processes(data: Path, folder: Path, number: int, rng) -> dict:
    """Kill both processes of a run that torchrun started, some time after an epoch is saved, resume, compare."""
    from faults import RULES, TINY, differing_results, start_torchrun, torchrun_killed
    from tqdm import tqdm

    def finish_run(*words) -> str:
        with start_torchrun(words) as process:
            printed = process.communicate()[0]
        return printed if process.returncode else ''

    faults, killed, epochs, kills = [], folder / 'two_killed', [], 0
    for index in tqdm(range(number), desc='kill two processes', dynamic_ncols=True):
        rule = list(RULES)[index % len(RULES)]
        words = (*RULES[rule], *TINY, '--num_workers', 0, '--data_path', data, '--results_dir')
        whole = folder / f'two_whole_{rule}'
        if not whole.exists():
            finish_run(*words, whole)
        printed = torchrun_killed((*words, killed), rng.uniform(0, 0.5))
        kills += 'next:' not in printed  # else it had ended before
        epochs.append(sum(line.startswith('epoch ') and ': loss' in line for line in printed.splitlines()))
        failure = finish_run(*words, killed, '--resume')
        different = [failure] if failure else differing_results(whole, killed)
        if different:
            faults.append(f'{rule}, 2 processes: {different}')
        shutil.rmtree(killed)
    return {'kills': kills, 'epochs_before': epochs, 'faults': faults}


def fuzz_parsers(folder: Path, number: int, rng) -> dict:
    from faults import fuzz, fuzz_targets
    from raw_trees import make_cub, make_isc, make_sop
    from tqdm import tqdm

    for make in (make_cub, make_sop, make_isc):
        make(folder)
    targets, faults, step = fuzz_targets(folder), [], 1000
    for _ in tqdm(range(0, number, step), desc='fuzz', dynamic_ncols=True):
        faults += fuzz(targets, step, rng)
    return {'inputs': number, 'parsers': len(targets), 'faults': faults}


def damage_files(data: Path, folder: Path, number: int, rng) -> dict:
    """Read damaged files of each kind; what is not refused has to be the same."""
    import torch
    from training.checkpoint import load_checkpoint_file
    from faults import BACKBONE, TINY, damaged, differences, train
    from tqdm import tqdm

    from common.errors import UserError
    from common.files import load
    from common.weights import load_weights
    from imagedata.cache import Cache, build_cache
    from imagedata.loading import open_data
    from imagedata.raw_sets import images_of, read_car
    from model import EmbeddingNet, NetConfig
    from retrieval.database import load_data_base
    from retrieval.model_file import load_model

    train((*TINY, '--num_workers', 0, '--data_path', data, '--results_dir', folder / 'run'), folder / 'run.log')
    root, split, _ = open_data(data, 'car')
    images = images_of(split)
    build_cache(root, 'uncropped', 24, images)

    weights = folder / 'weights.pth'
    torch.save(EmbeddingNet(NetConfig(BACKBONE, 16), 'none').backbone.state_dict(), weights)

    def pixels(_) -> list:
        cache = Cache(root, 'uncropped', 24, images)
        return [cache.read(path).clone() for path in images]

    (run,) = (path.name.removesuffix('_model.pth') for path in (folder / 'run').glob('*_model.pth'))
    kinds = {'checkpoint': (folder / 'run' / f'{run}_checkpoint.pth', load_checkpoint_file),
             'data base': (folder / 'run' / f'{run}_data_base.pth',
                           lambda path: load_data_base(path) and load(path, 'data base')),
             'model': (folder / 'run' / f'{run}_model.pth', lambda path: load_model(path, torch.device('cpu'))[1]),
             'weights': (weights, lambda path: load_weights(str(path), None)),
             'annotations (.mat)': (root / 'cars_annos.mat', lambda _: [item._asdict() for item in read_car(root)[0]]),
             'cache index': (root / 'uncropped_cache_24.pth', pixels),
             'cache': (root / 'uncropped_cache_24.bin', pixels)}
    counts, faults = {}, []
    for kind, (file, read) in kinds.items():
        good, contents, refused = read(file), file.read_bytes(), 0
        for _ in tqdm(range(number), desc=kind, dynamic_ncols=True):
            file.write_bytes(damaged(contents, rng))
            try:
                if differences(good, read(file)):
                    faults.append(f'a damaged {kind} was loaded as something else')
            except UserError:
                refused += 1
            except Exception as error:
                faults.append(f'a damaged {kind} ended in {type(error).__name__}: {error}')
        file.write_bytes(contents)
        counts[kind] = {'damaged': number, 'refused': refused, 'the same': number - refused}
    return {**counts, 'faults': faults}


def tamper_files(data: Path, folder: Path, number: int, rng) -> dict:
    """Read files whose checksums are right and whose contents are strange."""
    from faults import TINY, tamper, tamper_targets, train
    from tqdm import tqdm

    run = folder / 'tampered_run'
    train((*TINY, '--num_epochs', 1, '--warm_up', 0, '--num_workers', 0, '--data_path', data, '--results_dir', run),
          folder / 'tampered.log')
    targets, faults = tamper_targets(run, data, folder), []
    for name, target in tqdm(targets.items(), desc='tamper', dynamic_ncols=True):
        faults += tamper({name: target}, number, rng)
    return {'files': number * len(targets), 'kinds': list(targets), 'faults': faults}


def fill_disk(data: Path, folder: Path) -> dict:
    """Train onto a tmpfs without room for the second checkpoint, then make room and go on."""
    from faults import TINY, differing_results, train

    from common.files import load

    disk = folder / 'disk'
    disk.mkdir()
    mount = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=64m', 'tmpfs', disk], capture_output=True, text=True,
                           check=False)
    if mount.returncode:
        return {'full_disk': f'not tried: {mount.stderr.strip()}', 'faults': []}
    try:
        words = (*TINY, '--num_workers', 0, '--data_path', data, '--results_dir')
        train((*words, folder / 'undisturbed'), folder / 'disk.log')
        train((*words, disk), folder / 'disk.log', ('step', 5))  # dies in the second epoch
        (checkpoint,) = disk.glob('*_checkpoint.pth')
        (disk / 'fill').write_bytes(bytes(max(0, shutil.disk_usage(disk).free - 2**20)))
        code, printed = train((*words, disk, '--resume'), folder / 'disk2.log')
        line = [line for line in printed.splitlines() if 'error:' in line]
        sound = load(checkpoint, 'checkpoint')['epoch'] == 1
        fine = code == 2 and len(line) == 1 and 'No space left on device' in line[0] and sound
        (disk / 'fill').unlink()
        code, _ = train((*words, disk, '--resume'), folder / 'disk3.log')
        different = differing_results(folder / 'undisturbed', disk) if code == 0 else ['does not go on']
        return {'full_disk': line[0] if line else printed[-300:],
                'faults': ([] if fine else [f'full disk: {printed}']) + different}
    finally:
        subprocess.run(['umount', disk], check=True)


def get_args():
    from utils import Parser

    parser = Parser(description=__doc__)
    parser.add_argument('--kills', type=int, default=50, help='[%(default)s]')
    parser.add_argument('--process_kills', type=int, default=6, help='of two processes that share a run [%(default)s]')
    parser.add_argument('--inputs', type=int, default=1_000_000, help='texts for the parsers [%(default)s]')
    parser.add_argument('--damages', type=int, default=200, help='of each kind of file [%(default)s]')
    parser.add_argument('--tampers', type=int, default=2000, help='files of each kind with strange contents '
                        '[%(default)s]')
    parser.add_argument('--seed', type=int, default=0, help='[%(default)s]')
    return parser.parse_args()


def main() -> None:
    args = get_args()
    import numpy as np
    from raw_trees import make_car

    rng = np.random.default_rng(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_car(folder / 'data')
        subprocess.run([sys.executable, Path(__file__).parent.parent / 'data_utils.py', '--data_path', folder / 'data',
                        '--data_name', 'car'], check=True, capture_output=True)
        result = {'benchmark': 'soak', 'seed': args.seed,
                  'killed': kill_runs(folder / 'data', folder, args.kills, rng),
                  'killed_two_processes': kill_processes(folder / 'data', folder, args.process_kills, rng),
                  'damaged': damage_files(folder / 'data', folder, args.damages, rng),
                  'tampered': tamper_files(folder / 'data', folder, args.tampers, rng),
                  'disk': fill_disk(folder / 'data', folder),
                  'fuzzed': fuzz_parsers(folder / 'raw', args.inputs, rng)}
    faults = [fault for part in result.values() if isinstance(part, dict) for fault in part['faults']]
    for fault in faults:
        print(fault)
    finish({**result, 'number_of_faults': len(faults)})
    sys.exit(bool(faults))


if __name__ == '__main__':
    from utils import run_script

    run_script(main)
