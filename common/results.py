"""Names and places of what the scripts write: {results_dir}/{run}_{ending}."""
import re
import unicodedata
from pathlib import Path

from common.errors import UserError, suggestion
from common.files import lock


def run_name(*parts) -> str:
    """Join the parts of a run's name with `_`, in lower case; all but letters, digits, `_` and `.` becomes `-`."""
    words = [re.sub(r'[^\w.-]+', '-', unicodedata.normalize('NFC', str(part)).lower()) for part in parts]
    return '_'.join(word for word in words if word)


class RunFiles:
    """The paths of a run's files: {folder}/{name}_{ending}."""

    ENDINGS = {'statistics': 'statistics.csv', 'model': 'model.pth', 'data_base': 'data_base.pth',
               'checkpoint': 'checkpoint.pth', 'curves': 'curves.png', 'curves_pdf': 'curves.pdf',
               'log': 'log.json'}

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = Path(folder), name
        for file, ending in self.ENDINGS.items():
            setattr(self, file, self.folder / f'{name}_{ending}')
        self.onnx = self.folder / f'{name}_model.onnx'  # of export.py, no file of the run itself

    @classmethod
    def beside(cls, data_base: Path) -> 'RunFiles':
        """Return the files that belong to a data base: {run}_data_base.pth of a run, or any FILE.pth of embed.py."""
        return cls(data_base.parent, data_base.name.removesuffix('.pth').removesuffix('_data_base'))

    def all(self) -> list[Path]:
        """Return all paths."""
        return [getattr(self, file) for file in self.ENDINGS]

    def model_for(self, device) -> Path:
        """Return the model that embeds on a device: on the CPU, or without another one, the ONNX file if it exists."""
        return self.onnx if self.onnx.is_file() and (device.type == 'cpu' or not self.model.is_file()) else self.model

    def locked(self, message: str):
        """Return a context manager that holds the run's lock, see `common.files.lock`."""
        return lock(self.folder / f'.{self.name}.lock', message)


def find_result(flag: str, ending: str, name: str, results_dir: str) -> Path:
    """Return the file (or the folder with an exported model) that a flag names, as it stands or in the results folder.

    Raises:
        UserError: if there is none, with a list of the files of that ending, or if it is an ONNX file.
    """
    if Path(name).suffix == '.onnx':
        raise UserError(f'{flag} {name} is an ONNX file, which embed.py and serve.py read; name the model that it was '
                        'exported from')
    for path in (Path(name), Path(results_dir) / name):
        if path.is_file() or (path / 'config.json').is_file():
            return path
    known = sorted(path.name for path in Path(results_dir).glob(f'*_{ending}'))
    raise UserError(f'{flag} {name} is neither a file nor in {results_dir}{suggestion(name, known)} (there are: '
                    f'{", ".join(known) or "none; train first"})')
