"""How a run starts, continues and is kept: its claim on its files, checkpoints, and the model of another run."""
import contextlib
import shlex
from dataclasses import asdict
from pathlib import Path

import torch

from common.distributed import world_rank
from common.errors import UserError, reason_of
from common.files import check_fields, is_whole, load, make_folder, remove_torn, save
from common.results import RunFiles, find_result
from model import EmbeddingNet
from retrieval.database import seen_classes
from retrieval.model_file import load_model_file
from training.options import RunOptions, parse_options
from training.statistics import split_fingerprint

CHECKPOINT_VERSION = 3
CHECKPOINT_SCHEMA = {
    'version': lambda value: value == CHECKPOINT_VERSION, 'args': dict, 'split': str, 'epoch': is_whole(1),
    'rows': lambda rows: type(rows) is list and all(
        type(row) is dict and {type(value) for value in row.values()} <= {int, float}
        for row in rows), 'model': dict, 'criterion': dict, 'optimizer': dict, 'schedule': dict,
    'rng': lambda value: value.dtype == torch.uint8}
# Options that do not change the result of a run: they may differ when it is resumed, and its files leave them out.
CHANGEABLE = ('data_path', 'results_dir', 'device', 'num_workers', 'on_collapse', 'seeds', 'resume', 'overwrite',
              'allow_seen', 'pretrained_baseline', 'log_to', 'explicit_flags')


# ---------------------------------------------------- the files of a run -------------------------------------------
@contextlib.contextmanager
def claim_run(files: RunFiles, resume: bool, overwrite: bool):
    """Hold the run's files for this process; on Ctrl-C or SIGTERM, say which epoch is saved.

    Raises:
        UserError: if the folder cannot be written to, another process trains a run of this name, or the name is taken
            and neither --resume nor --overwrite is set.
    """
    name = files.name
    make_folder('--results_dir', files.folder)
    lock = contextlib.nullcontext()
    if world_rank() == 0:
        lock = files.locked(f'another process is training the run {name} in {files.folder}; wait for it, or give this '
                            'run another name with --remark WORD')
    with lock:
        is_taken = any(file.exists() for file in files.all())
        if resume and not files.checkpoint.is_file():
            hint = ' and with --overwrite' if is_taken else ''
            raise UserError(f'--resume: there is no {files.checkpoint}; start the run without --resume{hint}')
        if is_taken and not (resume or overwrite):
            raise UserError(f'a run named {name} is in {files.folder} already; add --resume to continue it, --remark '
                            'WORD to give this one another name, or --overwrite to replace it')
        if world_rank() == 0:
            remove_torn(files.folder, [file.name for file in files.all()])
        earlier_checkpoint = checkpoint_time(files)
        try:
            yield
        except KeyboardInterrupt as stop:
            if not files.checkpoint.exists():
                hint = 'no epoch was complete, nothing is saved'
            elif overwrite and earlier_checkpoint == checkpoint_time(files):
                hint = f'no epoch was complete, and the earlier run {name} is untouched'
            else:
                instead = ' in place of --overwrite' if overwrite else ''
                hint = (f'epoch {load_checkpoint_file(files.checkpoint)["epoch"]} of {name} is saved; the same command '
                        f'with --resume{instead} continues it')
            raise type(stop)(hint) from None


def checkpoint_time(files: RunFiles) -> int | None:
    """Return the time in ns at which a run's checkpoint was written, None without one."""
    return files.checkpoint.stat().st_mtime_ns if files.checkpoint.exists() else None


# ---------------------------------------------------- checkpoints --------------------------------------------------
def settings_of(options: RunOptions) -> dict:
    """Return the options that decide a run's result, as its files store them: no absolute paths, no device."""
    settings = {name: value for name, value in asdict(options).items() if name not in CHANGEABLE}
    return settings | {'weights': Path(options.weights).name, 'init': options.init and Path(options.init).name}


def command_of(options: RunOptions) -> str:
    """Return the command line that trains this run again, without its folders, device and seed."""
    # The defaults of the others depend on these.
    first = ('recipe', 'data_name', 'backbone_type', 'loss_name', 'proxy_update', 'miner')
    words = [word for name in first if getattr(options, name) for word in (f'--{name}', getattr(options, name))]
    [plain] = parse_options(words)
    settings, defaults = settings_of(options), settings_of(plain)
    for name in sorted(settings.keys() - {'run', 'seed', 'base_loss', 'remark', 'temperature'}):
        value = settings[name]
        if value == defaults[name] or value is None:
            continue
        if name in ('deterministic', 'compile'):
            words.append(f'--{name}')
            continue
        if isinstance(value, tuple):
            value = ','.join(map(str, value))
        words += [f'--{name}', str(int(value) if isinstance(value, bool) else value)]
    return shlex.join(['python', 'train.py', *words])


def save_checkpoint(file: Path, model, criterion, optimizer, schedule, rows: list[dict], split: dict, origin: dict
                    ) -> None:
    """Save everything that --resume needs after an epoch; `origin` holds args, epoch, made_with and seen_classes."""
    save({'model': model.state_dict(), 'criterion': criterion.state_dict(), 'optimizer': optimizer.state_dict(),
          'schedule': schedule.state_dict(), 'rng': torch.get_rng_state(), 'rows': rows,
          'split': split_fingerprint(split), 'version': CHECKPOINT_VERSION, **origin}, file)


def load_checkpoint_file(file: Path) -> dict:
    """Load a `{run}_checkpoint.pth`; raises UserError unless its parts have the right types."""
    contents = load(file, 'checkpoint', CHECKPOINT_SCHEMA)
    check_fields(contents, {'rows': lambda rows: len(rows) == contents['epoch']}, file, 'checkpoint')
    return contents


def load_checkpoint(file: Path, options: RunOptions, split: dict) -> dict:
    """Load the checkpoint of a run, and check that it was started with the same options on the same data.

    Raises:
        UserError: naming the options that differ.
    """
    checkpoint = load_checkpoint_file(file)
    if checkpoint['split'] != split_fingerprint(split):
        raise UserError(f'--resume: the data set {options.data_name} was converted again since the run {options.run} '
                        'began; convert it as it was, or name a new run with --remark')
    now, before = settings_of(options), dict(checkpoint['args'])
    if type(before.get('num_epochs')) is int and options.num_epochs > before['num_epochs']:
        if options.lr_schedule not in ('step', 'constant'):
            raise UserError(f'--num_epochs {options.num_epochs}: the schedule {options.lr_schedule} of this run was '
                            f'laid out for {before["num_epochs"]} epochs and has ended; start a new run from its '
                            'model with --init')
        before['num_epochs'] = options.num_epochs
    different = [f'--{name} {now.get(name)} (was {" ".join(str(before.get(name)).split())})'
                 for name in sorted(now.keys() | before.keys(), key=str)
                 if repr(now.get(name)) != repr(before.get(name))]  # a damaged file may hold tensors
    if different:
        raise UserError(f'--resume: the run {options.run} was started with other settings: {", ".join(different)}; '
                        'use the same, or name a new run with --remark')
    trained = {'epoch', 'lr', 'proxy_lr'}
    recalls = {f'{kind}_R@{k}' for kind in ('dense', 'binary') for k in options.recalls}
    check_fields(checkpoint, {'rows': lambda rows: all(
        trained <= row.keys() and recalls & row.keys() in (set(), recalls) for row in rows)}, file, 'checkpoint')
    return checkpoint


def restore(checkpoint: dict, file: Path, model, criterion, optimizer, schedule) -> None:
    """Put the states of a checkpoint into model, criterion, optimizer, schedule and the random generator."""
    try:
        model.load_state_dict(checkpoint['model'])
        criterion.load_state_dict(checkpoint['criterion'])
        optimizer.load_state_dict(checkpoint['optimizer'])
        for parameter, state in optimizer.state.items():  # torch does not check these shapes
            for name, value in state.items():
                if torch.is_tensor(value) and value.shape not in (parameter.shape, ()):
                    raise ValueError(f'{name} of the optimizer has the shape {tuple(value.shape)}')
        schedule.load_state_dict(checkpoint['schedule'])
        torch.set_rng_state(checkpoint['rng'])
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
        raise UserError(f'{file} is damaged ({reason_of(error)}); start again with --overwrite') from None


# ---------------------------------------------------- fine-tuning --------------------------------------------------
def load_initial_weights(file: str, model: EmbeddingNet, results_dir: str) -> list[str]:
    """Load the weights of another run's model into a network like it (--init).

    Returns:
        the names of the classes that it was trained on.

    Raises:
        UserError: if the file is not a model, or of another architecture.
    """
    contents = load_model_file(find_result('--init', RunFiles.ENDINGS['model'], file, results_dir))
    different = [f'--{name} {value} (there {contents["config"].get(name)})'
                 for name, value in asdict(model.config).items()
                 if name not in ('image_size', 'freeze_bn', 'flip_tta') and contents['config'].get(name) != value]
    if different:
        raise UserError(f'--init {file} is another network: {", ".join(different)}; use the same settings')
    try:
        model.load_state_dict(contents['state_dict'])
    except (RuntimeError, TypeError, AttributeError) as error:
        side = contents['config'].get('image_size')
        if side != model.config.image_size:
            raise UserError(f'--init {file} was trained with --image_size {side}, and its weights fit no other; use it'
                            ) from None
        raise UserError(f'--init {file} does not fit its own description ({reason_of(error)})') from None
    return seen_classes(contents)
