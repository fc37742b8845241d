"""How a run begins: its files claimed, its checkpoint found to fit and restored, or another run's model taken over."""
import argparse
import contextlib
import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from engine.errors import UserError, reason_of
from engine.files import check_fields, make_folder, remove_torn
from engine.processes import world_rank
from engine.runs import RunFiles, find_result, load_checkpoint_file, load_model_file, seen_classes
from recipes import NOT_ALWAYS

# Where a run stands, how fast it goes and what it says: free to change between a run and its --resume, and left out of
# its files.
CHANGEABLE = ('data_path', 'results_dir', 'device', 'num_workers', 'shard_proxies', 'on_collapse', 'seeds', 'resume',
              'overwrite', 'allow_seen', 'epoch0', 'log_to', 'given')


class Start(NamedTuple):
    """How a run begins, besides its settings."""

    files: RunFiles
    resume: bool  # go on from its checkpoint
    replaced: list  # files of earlier runs, removed once the first epoch of this one is complete


@contextlib.contextmanager
def claim_run(start: Start, overwrite: bool):
    """Hold the run's files for this process.

    Raises:
        UserError: if the folder cannot be written to, another process trains a run of this name, or the name is taken
            and neither --resume nor --overwrite is set.
    """
    files, name = start.files, start.files.name
    make_folder('--results_dir', files.folder)
    alone = files.locked(f'another process is training the run {name} in {files.folder}; wait for it, or name this one '
                         'otherwise with --remark WORD')
    with alone if world_rank() == 0 else contextlib.nullcontext():
        taken = any(file.exists() for file in files.all())
        if start.resume and not files.checkpoint.is_file():
            raise UserError(f'--resume: there is no {files.checkpoint}; start the run '
                            f'without --resume{" and with --overwrite" if taken else ""}')
        if taken and not (start.resume or overwrite):
            raise UserError(f'a run named {name} is in {files.folder} already; add --resume to go on with it, --remark '
                            'WORD to name this one otherwise, or --overwrite to replace it')
        if world_rank() == 0:
            remove_torn(files.folder, [file.name for file in files.all()])
        earlier = files.checkpoint.stat().st_mtime_ns if files.checkpoint.exists() else None
        try:
            yield
        except KeyboardInterrupt as stop:
            if not files.checkpoint.exists():
                hint = 'no epoch was complete, nothing is saved'
            elif overwrite and earlier == files.checkpoint.stat().st_mtime_ns:
                hint = f'no epoch was complete, and the run {name} from before is untouched'
            else:
                hint = (f'epoch {load_checkpoint_file(files.checkpoint)["epoch"]} of {name} is saved; the same command '
                        f'with --resume{" for --overwrite" if overwrite else ""} goes on')
            raise type(stop)(hint) from None


def settings_of(args: argparse.Namespace) -> dict:
    """Return the settings that make a run what it is: no paths, no device, so that its files say nothing of a place."""
    settings = {name: value for name, value in vars(args).items() if name not in CHANGEABLE}
    return {**settings, 'weights': Path(args.weights).name, 'init': args.init and Path(args.init).name}


def fingerprint(split: dict) -> str:
    """Return a hash of the classes, images and subsets of a split."""
    return hashlib.sha256(json.dumps(split).encode()).hexdigest()


def load_checkpoint(file: Path, args: argparse.Namespace, split: dict) -> dict:
    """Load the checkpoint of a run and check that it was started with the same settings on the same data.

    Raises:
        UserError: naming the settings that differ.
    """
    checkpoint = load_checkpoint_file(file)
    if checkpoint['split'] != fingerprint(split):
        raise UserError(f'--resume: the data set {args.data_name} was converted anew since the run {args.run} began; '
                        'convert it as it was, or name a new run with --remark')
    now, before = NOT_ALWAYS | settings_of(args), NOT_ALWAYS | checkpoint['args']
    if type(before.get('num_epochs')) is int and args.num_epochs > before['num_epochs']:
        if args.lr_schedule not in ('step', 'constant'):
            raise UserError(f'--num_epochs {args.num_epochs}: the schedule {args.lr_schedule} of this run was laid out '
                            f'for {before["num_epochs"]} epochs, and is at its end; start a new run from its model '
                            'with --init')
        before['num_epochs'] = args.num_epochs
    differ = [f'--{name} {now.get(name)} (was {" ".join(str(before.get(name)).split())})'
              for name in sorted(now.keys() | before.keys(), key=str)
              if repr(now.get(name)) != repr(before.get(name))]  # a tensor has no one answer to !=
    if differ:
        raise UserError(f'--resume: the run {args.run} was started with other settings: {", ".join(differ)}; give the '
                        'same, or name a new run with --remark')
    columns = {'epoch', 'lr', 'proxy_lr', *(f'{kind}_R@{k}' for kind in ('dense', 'binary') for k in args.recalls)}
    check_fields(checkpoint, {'rows': lambda rows: all(columns <= row.keys() for row in rows)}, file, 'checkpoint')
    return checkpoint


def restore(checkpoint: dict, file: Path, model, learner, schedule) -> None:
    """Put the states of a checkpoint into model, criterion, optimizer, schedule and the random generator."""
    optimizer = learner.optimizer
    try:
        model.load_state_dict(checkpoint['model'])
        learner.criterion.load_full_state_dict(checkpoint['criterion'])
        learner.criterion.load_full_optimizer_state(optimizer, checkpoint['optimizer'])
        for parameter, state in optimizer.state.items():  # torch does not look at the shapes
            for name, value in state.items():
                if torch.is_tensor(value) and value.shape not in (parameter.shape, ()):
                    raise ValueError(f'{name} of the optimizer has the shape {tuple(value.shape)}')
        schedule.load_state_dict(checkpoint['schedule'])
        torch.set_rng_state(checkpoint['rng'])
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
        raise UserError(f'{file} is damaged ({reason_of(error)}); start again with --overwrite') from None


def start_from(file: str, model, results_dir: str) -> list[str]:
    """Put the weights of a run's model into a network like it; returns the names of the classes it was trained on.

    Raises:
        UserError: if the file is no model, or of a network of another kind.
    """
    contents = load_model_file(find_result('--init', RunFiles.ENDINGS['model'], file, results_dir))
    differ = [f'--{name} {value} (there {contents["config"].get(name)})' for name, value in asdict(model.config).items()
              if name not in ('image_size', 'freeze_bn', 'mirror') and contents['config'].get(name) != value]
    if differ:
        raise UserError(f'--init {file} is another network: {", ".join(differ)}; give the same')
    try:
        model.load_state_dict(contents['state_dict'])
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f'--init {file} does not fit its own description ({reason_of(error)})') from None
    return seen_classes(contents)
