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

    @classmethod
    def beside(cls, data_base: Path) -> 'RunFiles':
        """Return the files that belong to a data base: {run}_data_base.pth of a run, or any FILE.pth of embed.py."""
        return cls(data_base.parent, data_base.name.removesuffix('.pth').removesuffix('_data_base'))

    def all(self) -> list[Path]:
        """Return all paths."""
        return [getattr(self, file) for file in self.ENDINGS]

    def locked(self, message: str):
        """Return a context manager that holds the run's lock, see `common.files.lock`."""
        return lock(self.folder / f'.{self.name}.lock', message)


def find_result(flag: str, ending: str, name: str, results_dir: str) -> Path:
    """Return the file (or the folder with an exported model) that a flag names, as it stands or in the results folder.

    Raises:
        UserError: if there is none, with a list of the files of that ending.
    """
    for path in (Path(name), Path(results_dir) / name):
        if path.is_file() or (path / 'config.json').is_file():
            return path
    known = sorted(path.name for path in Path(results_dir).glob(f'*_{ending}'))
    raise UserError(f'{flag} {name} is neither a file nor in {results_dir}{suggestion(name, known)} (there are: '
                    f'{", ".join(known) or "none; train first"})')
