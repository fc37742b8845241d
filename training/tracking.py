"""Experiment tracking: report a run's statistics to TensorBoard or Weights & Biases, epoch by epoch.

    tracker = Tracker(('tensorboard', 'wandb'), files, settings, resume=False)
    tracker.log(rows)                   # after each epoch; logs only the rows that a service does not have yet
    tracker.finish(files.curves)

What was logged is kept in `{run}_log.json`, so that a resumed run continues in the same place. Neither package is
required; each is imported where it is used.
"""
import importlib.util
import os
import secrets
from pathlib import Path
from typing import NamedTuple

from common.distributed import world_rank
from common.errors import UserError, check_choice, reason_of
from common.files import read_json, save_json
from common.results import RunFiles

PROJECT = 'proxies'  # unless WANDB_PROJECT names another


class TrackedRun(NamedTuple):
    """What a service is told when it starts."""

    name: str
    results_dir: Path
    run_id: str  # eight hexadecimal digits; a run that replaces another one gets a new id
    num_logged: int  # epochs that the service already has
    settings: dict


class TensorBoard:
    """Event files in {results_dir}/tensorboard/{run}_{run_id}."""

    def __init__(self, run: TrackedRun):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(run.results_dir / 'tensorboard' / f'{run.name}_{run.run_id}',
                                    purge_step=run.num_logged + 1 if run.num_logged else None)
        if not run.num_logged:
            lines = [f'| {name} | {value} |' for name, value in run.settings.items()]
            self.writer.add_text('settings', '\n'.join(['| setting | value |', '|---|---|', *lines]))

    def log(self, row: dict) -> None:
        for name, value in row.items():
            self.writer.add_scalar(name, value, row['epoch'])
        self.writer.flush()

    def finish(self, figure: Path, epoch: int) -> None:
        import numpy as np
        from PIL import Image

        self.writer.add_image('curves', np.asarray(Image.open(figure).convert('RGB')), epoch, dataformats='HWC')
        self.writer.close()


class WeightsAndBiases:
    """A run of wandb.ai, or, with WANDB_MODE=offline, a folder in {results_dir}/wandb for `wandb sync`."""

    def __init__(self, run: TrackedRun):
        import wandb

        self.image = wandb.Image
        self.run = wandb.init(project=os.environ.get('WANDB_PROJECT', PROJECT), name=run.name, id=run.run_id,
                              resume='allow', dir=str(run.results_dir), config=run.settings)

    def log(self, row: dict) -> None:
        self.run.log(row, step=row['epoch'])

    def finish(self, figure: Path, epoch: int) -> None:
        self.run.log({'curves': self.image(str(figure))}, step=epoch)
        self.run.finish()


SERVICES = {'tensorboard': TensorBoard, 'wandb': WeightsAndBiases}  # keys are the names of their packages


def parse_services(text: str) -> tuple[str, ...]:
    """Parse `--log_to`; raises UserError for an unknown service, or one whose package is missing."""
    names = tuple(dict.fromkeys(text.split(','))) if text else ()
    for name in names:
        check_choice('--log_to', name, SERVICES)
        if importlib.util.find_spec(name) is None:
            raise UserError(f'--log_to {name}: the package {name} is not installed; pip install {name}')
    return names


class Tracker:
    """The services that track a run; of several processes only rank 0 reports.

    Args:
        services: keys of SERVICES.
        files: of the run.
        settings: of the run, {name: value}.
        resume: continue where an earlier process stopped.

    Raises:
        UserError: if a service does not start. One that fails later is dropped with a message, and the run goes on.
    """

    def __init__(self, services: tuple[str, ...], files: RunFiles, settings: dict, resume: bool):
        self.file, self.services = files.log, {}
        earlier = None
        if resume:
            earlier = read_json(files.log, {'run_id': str, 'epochs': lambda value: all(
                type(epochs) is int for epochs in value.values())})
        self.state = earlier or {'run_id': secrets.token_hex(4), 'epochs': {}}  # epochs: {service: number logged}
        for name in services if world_rank() == 0 else ():
            run = TrackedRun(files.name, files.folder, self.state['run_id'], self.num_logged(name), settings)
            try:
                self.services[name] = SERVICES[name](run)
            except Exception as error:  # each service has its own errors for keys, networks and disks
                raise UserError(f'--log_to {name}: it does not start ({reason_of(error)}); fix that, or leave it out'
                                ) from None

    def num_logged(self, name: str) -> int:
        """Return how many epochs a service has."""
        return self.state['epochs'].get(name, 0)

    def log(self, rows: list[dict]) -> None:
        """Log the rows of the statistics that a service does not have yet."""
        for name in list(self.services):
            for row in rows[self.num_logged(name):]:
                if not self.call(name, 'log', row):
                    break
                self.state['epochs'][name] = row['epoch']
        if self.services:
            save_json(self.state, self.file)

    def finish(self, figure: Path) -> None:
        """Log the figure of the curves, and close the services."""
        for name in list(self.services):
            self.call(name, 'finish', figure, self.num_logged(name))

    def call(self, name: str, method: str, *args) -> bool:
        """Call a method of a service and return whether it succeeded; a service that fails is dropped."""
        try:
            getattr(self.services[name], method)(*args)
        except Exception as error:  # see __init__
            print(f'--log_to {name}: it failed and is dropped ({reason_of(error)})', flush=True)
            del self.services[name]
            return False
        return True
