"""Tell TensorBoard, Weights & Biases or Trackio what a run's statistics say, epoch by epoch.

    log = RunLog(('tensorboard', 'wandb'), files, settings, resume=False)
    log.add(rows)                       # after each epoch; what a service has been told already is left out
    log.finish(files.curves)

What has been told is kept in `{run}_log.json`, so that a run that goes on goes on there too. The packages are imported
where they are used; none of them is needed.
"""
import importlib.util
import os
import secrets
from pathlib import Path
from typing import NamedTuple

from engine.errors import UserError, check_choice, reason_of
from engine.files import read_json, save_json
from engine.processes import world_rank
from engine.runs import RunFiles

PROJECT = 'proxies'  # WANDB_PROJECT names another


class Told(NamedTuple):
    """A run as a service gets to know it."""

    name: str
    folder: Path  # of the results
    number: str  # of the run, eight hexadecimal digits: a run that replaces another has one of its own
    epochs: int  # that the service has been told of
    settings: dict


class TensorBoard:
    """Event files in {results_dir}/tensorboard/{run}_{number}."""

    def __init__(self, told: Told):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(told.folder / 'tensorboard' / f'{told.name}_{told.number}',
                                    purge_step=told.epochs + 1 if told.epochs else None)
        if not told.epochs:
            lines = [f'| {name} | {value} |' for name, value in told.settings.items()]
            self.writer.add_text('settings', '\n'.join(['| setting | value |', '|---|---|', *lines]))

    def add(self, row: dict) -> None:
        for name, value in row.items():
            self.writer.add_scalar(name, value, row['epoch'])
        self.writer.flush()

    def finish(self, picture: Path, epoch: int) -> None:
        import numpy as np
        from PIL import Image

        self.writer.add_image('curves', np.asarray(Image.open(picture).convert('RGB')), epoch, dataformats='HWC')
        self.writer.close()


class WeightsAndBiases:
    """A run of wandb.ai, or, with WANDB_MODE=offline, a folder in {results_dir}/wandb for `wandb sync`."""

    def __init__(self, told: Told):
        import wandb

        self.image = wandb.Image
        self.run = wandb.init(project=os.environ.get('WANDB_PROJECT', PROJECT), name=told.name, id=told.number,
                              resume='allow', dir=str(told.folder), config=told.settings)

    def add(self, row: dict) -> None:
        self.run.log(row, step=row['epoch'])

    def finish(self, picture: Path, epoch: int) -> None:
        self.run.log({'curves': self.image(str(picture))}, step=epoch)
        self.run.finish()


class Trackio:
    """A run of Trackio, in TRACKIO_DIR on this machine, or where its own variables say."""

    def __init__(self, told: Told):
        import trackio

        self.trackio = trackio
        trackio.init(project=PROJECT, name=told.name, config=told.settings, resume='allow' if told.epochs else 'never')

    def add(self, row: dict) -> None:
        self.trackio.log(row, step=row['epoch'])

    def finish(self, picture: Path, epoch: int) -> None:
        self.trackio.log({'curves': self.trackio.Image(str(picture))}, step=epoch)
        self.trackio.finish()


SERVICES = {'tensorboard': TensorBoard, 'wandb': WeightsAndBiases, 'trackio': Trackio}  # named as their packages


def service_list(text: str) -> tuple[str, ...]:
    """Parse `--log_to`; raises UserError for a service that is not known or whose package is missing."""
    names = tuple(dict.fromkeys(text.split(','))) if text else ()
    for name in names:
        check_choice('--log_to', name, SERVICES)
        if importlib.util.find_spec(name) is None:
            raise UserError(f'--log_to {name}: the package {name} is not installed; pip install {name}')
    return names


class RunLog:
    """The services that follow a run; of several processes the first one tells them.

    Args:
        services: names, of SERVICES.
        files: of the run.
        settings: of the run, {name: value}.
        resume: go on where an earlier process stopped, in the same run where the service has one.

    Raises:
        UserError: if a service does not start. One that fails later is left out with a line, and the run goes on.
    """

    def __init__(self, services: tuple[str, ...], files: RunFiles, settings: dict, resume: bool):
        self.file, self.open = files.log, {}
        before = read_json(files.log, {'number': str, 'epochs': lambda value: all(
            type(epochs) is int for epochs in value.values())}) if resume else None
        self.told = before or {'number': secrets.token_hex(4), 'epochs': {}}
        for name in services if world_rank() == 0 else ():
            try:
                self.open[name] = SERVICES[name](Told(files.name, files.folder, self.told['number'],
                                                      self.told['epochs'].get(name, 0), settings))
            except Exception as error:  # each service has errors of its own, of keys, networks and disks
                raise UserError(f'--log_to {name}: it does not start ({reason_of(error)}); mend it, or leave it out') \
                    from None

    def tell(self, name: str, method: str, *words) -> bool:
        """Call a method of a service and tell whether it went well; one that fails is left out from then on."""
        try:
            getattr(self.open[name], method)(*words)
        except Exception as error:  # see above
            print(f'--log_to {name}: it failed and is left out from here on ({reason_of(error)})', flush=True)
            del self.open[name]
            return False
        return True

    def add(self, rows: list[dict]) -> None:
        """Tell the services of the epochs that they do not know yet; rows are those of the statistics."""
        for name in list(self.open):
            for row in rows[self.told['epochs'].get(name, 0):]:
                if not self.tell(name, 'add', row):
                    break
                self.told['epochs'][name] = row['epoch']
        if self.open:
            save_json(self.told, self.file)

    def finish(self, picture: Path) -> None:
        """Give the services the picture of the curves, and part from them."""
        for name in list(self.open):
            self.tell(name, 'finish', picture, self.told['epochs'].get(name, 0))
