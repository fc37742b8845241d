"""Files: written atomically, and read from untrusted sources without executing anything in them."""
import contextlib
import errno
import glob
import json
import os
import re
import secrets
import stat
import tempfile
import unicodedata
import warnings
import zipfile
from pathlib import Path

from common.errors import UserError, reason_of

# The largest values that train.py accepts, and that a file may claim.
LARGEST_SIDE = 8192  # px, of an image
LARGEST_FEATURE_DIM = 65536
UNFIT_FOR_NAMES = re.compile('[\x00-\x1f\x7f-\x9f\ud800-\udfff]')  # control characters, undecodable bytes


def write_atomically(path: Path, write) -> None:
    """Call `write(file)` on a temporary file beside `path`, sync it to the disk, then rename it over `path`.

    A reader sees the old file or the new one, never a part; after an error the old one is still there. A link stays
    one, and the file it leads to is replaced; a file that is replaced keeps its mode.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f'.{path.name}.{secrets.token_hex(4)}')
    try:
        with open(temporary, 'xb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            temporary.chmod(stat.S_IMODE(path.stat().st_mode))
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch.save hides why a write failed
        if isinstance(cause, OSError):
            raise UserError(f'cannot write {path}: {cause.strerror}; it is not saved, and what was there before is '
                            'untouched') from None
        raise


@contextlib.contextmanager
def lock(path: Path, message: str):
    """Hold a file as a lock; the system releases it when the process ends, even if it is killed.

    Raises:
        UserError: with the message, if another process holds it.
    """
    from filelock import FileLock, Timeout

    file_lock = FileLock(path, timeout=0)
    try:
        file_lock.acquire()
    except Timeout:
        raise UserError(message) from None
    try:
        yield
    finally:
        Path(path).unlink(missing_ok=True)  # while it is held, so that a waiting process opens a new file
        file_lock.release()


def remove_torn(folder: Path, names) -> None:
    """Remove the temporary files that a process left when it was killed while writing files of these names."""
    for name in names:
        for temporary in folder.glob(f'.{glob.escape(name)}.{8 * "[0-9a-f]"}'):
            temporary.unlink()


def save(contents: dict, path: Path) -> None:
    """Save a plain dict of tensors, lists, numbers and strings, on the CPU, so that `load` can read it; atomic."""
    import torch

    def to_cpu(value):
        if isinstance(value, dict):
            return {key: to_cpu(part) for key, part in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(to_cpu(part) for part in value)
        return value.cpu() if torch.is_tensor(value) else value

    plain = to_cpu(contents)
    write_atomically(path, lambda file: torch.save(plain, file))


def save_json(contents, path: Path, indent: int | None = None) -> None:
    """Save as JSON; atomic."""
    write_atomically(path, lambda file: file.write(json.dumps(contents, indent=indent).encode()))


def make_folder(flag: str, path: Path) -> Path:
    """Create a folder and check that it can be written to; raises UserError with the flag that named it."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f'{flag} {path} cannot be written to ({error.strerror}); choose another folder') from None
    return path


def load(path: Path, kind: str, schema: dict | None = None) -> dict:
    """Load a `.pth` file onto the CPU without executing anything in it, and verify its checksums (CRC-32).

    Args:
        kind: what it should be, for messages: `data base`, `model`, ...
        schema: what the dict in it must hold, see `check_fields`.

    Raises:
        UserError: if it is missing, corrupt, needs code to be executed, or does not fit the schema.
    """
    import torch

    path = Path(path)
    if not path.is_file():
        raise UserError(f'there is no {kind} {path}')
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # about damaged files, for which there is an error
            if zipfile.is_zipfile(path):  # the format since torch 1.6; torch.load does not verify its checksums
                with zipfile.ZipFile(path) as archive:
                    if broken := archive.testzip():
                        raise ValueError(f'the checksum of {broken} is wrong')
            contents = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # a damaged archive makes the unpickler and the zip reader raise all kinds of errors
        raise UserError(f'{path} cannot be read as a {kind}: it is corrupt, or holds more than tensors and plain '
                        f'values ({reason_of(error)})') from None
    if schema:
        check_fields(contents, schema, path, kind)
    return contents


def read_json(path: Path, schema: dict) -> dict | None:
    """Read a JSON file that fits a schema, see `check_fields`; None if it is missing or does not fit."""
    try:
        contents = json.loads(path.read_text())
        check_fields(contents, schema, path, 'file')
    except (OSError, ValueError):  # ValueError: not text, not JSON, or not what the schema says
        return None
    return contents


def check_fields(contents, schema: dict, path: Path, kind: str) -> None:
    """Raise a UserError that names the fields of a file's contents (of any type) which do not fit a schema.

    A schema is {field: its exact type, or a function that tells whether a value is valid}.
    """
    def is_valid(value, rule) -> bool:
        try:
            return type(value) is rule if isinstance(rule, type) else bool(rule(value))
        except Exception:  # a value of an unexpected type can raise anything when it is inspected
            return False

    missing = [field for field in schema if not isinstance(contents, dict) or field not in contents]
    if missing:
        raise UserError(f'{path} is not a {kind} of this project: it lacks {", ".join(missing)}')
    wrong = [field for field, rule in schema.items() if not is_valid(contents[field], rule)]
    if wrong:
        raise UserError(f'{path} is not a valid {kind}: {", ".join(wrong)} cannot be used; it was damaged, or made by '
                        'another version or program')


def is_whole(low: int, high: int = 2**63 - 1):
    """Return a rule for a schema: an int from low to high."""
    return lambda value: type(value) is int and low <= value <= high


def readable(name: str) -> str:
    """Return a file name that can be printed: bytes that are not UTF-8 are escaped."""
    return name.encode(errors='backslashreplace').decode()


def are_texts(value) -> bool:
    """Tell whether a value is a list of strings."""
    return isinstance(value, list) and all(isinstance(part, str) for part in value)


def compose(text: str) -> str:
    """Return a text in Unicode's composed form (NFC): macOS and Linux write the same name differently."""
    return unicodedata.normalize('NFC', text)


def is_folder_name(name) -> bool:
    """Tell whether a text can name a data set's folder: no path, not hidden, no control characters."""
    return (isinstance(name, str) and not name.startswith('.') and Path(name).name == name
            and not UNFIT_FOR_NAMES.search(name))


def is_inside(path: str) -> bool:
    """Tell whether a relative path stays inside the folder that it is relative to."""
    return not (path.startswith('/') or '\\' in path or '\0' in path or '..' in path.split('/'))


def check_paths(file: Path, paths) -> None:
    """Raise a UserError for the first path in a file that leaves the data set's folder."""
    for path in paths:
        if not is_inside(path):
            raise UserError(f'{file}: the image {path!r} lies outside the data set\'s folder; do not trust this file')


def image_file(root: Path, image: str) -> Path:
    """Return the file of an image below a folder; raises UserError if a symbolic link leads out of the folder."""
    if not (root / image).resolve().is_relative_to(root.resolve()):
        raise UserError(f'the image {root / image} is a link out of its folder, and is not followed')
    return root / image


def stamp_of(file: Path) -> list[int] | None:
    """Return [bytes, time of the last change in ns] of a file, None if there is no such file.

    Raises:
        UserError: if the system cannot tell, for instance because a disk has dropped out.
    """
    try:
        status = os.stat(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link to itself
            return None
        raise UserError(f'{file} cannot be reached ({error.strerror}); try again when it can') from None
    # Data bases hold times as int64, which ends in the year 2262.
    return [status.st_size, max(-2**63, min(status.st_mtime_ns, 2**63 - 1))]


MADE_HERE = 'proxies for image retrieval'  # mark in files that the scripts write, and may replace


def check_replaceable(target: Path, flag: str = '--output') -> Path:
    """Return the path that a flag names, if nothing is there, or a file that these scripts wrote.

    Raises:
        UserError: if there is a file from elsewhere.
    """
    if target.exists() and (target.is_dir() or MADE_HERE.encode() not in target.read_bytes()):
        raise UserError(f'{flag} {target} exists and was not written by these scripts, so it is not replaced; move it '
                        'away, or name another file')
    return target
