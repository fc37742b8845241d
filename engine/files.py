"""Files that are never torn, and files of strangers that execute nothing and hold what they should."""
import contextlib
import glob
import json
import os
import secrets
import tempfile
import warnings
import zipfile
from pathlib import Path

from engine.errors import UserError, reason_of


def write_atomically(path: Path, write) -> None:
    """Call `write(file)` on a temporary file beside `path`, sync it to the disk, then rename it over `path`.

    A reader finds the old file or the new one, never a part; after an error the old one is still there.
    """
    path = Path(path)
    temporary = path.with_name(f'.{path.name}.{secrets.token_hex(4)}')
    try:
        with open(temporary, 'xb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch.save hides why a write failed
        if isinstance(cause, OSError):
            raise UserError(f'cannot write {path}: {cause.strerror}; it is not saved, and what stood there before is '
                            'untouched') from None
        raise


@contextlib.contextmanager
def lock(path: Path, message: str):
    """Hold a file as a lock; the system lets go of it when the process dies, however it does.

    Raises:
        UserError: with the message, if another process holds it.
    """
    from filelock import FileLock, Timeout

    held = FileLock(path, timeout=0)
    try:
        held.acquire()
    except Timeout:
        raise UserError(message) from None
    try:
        yield
    finally:
        Path(path).unlink(missing_ok=True)  # while it is held: who waits for it looks again
        held.release()


def remove_torn(folder: Path, names) -> None:
    """Remove what a process that was killed while it wrote files of these names has left."""
    for name in names:
        for left in folder.glob(f'.{glob.escape(name)}.{8 * "[0-9a-f]"}'):
            left.unlink()


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
    """Save what JSON can hold; atomic."""
    write_atomically(path, lambda file: file.write(json.dumps(contents, indent=indent).encode()))


def make_folder(flag: str, path: Path) -> Path:
    """Create a folder that can be written to, or say which flag names another."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f'{flag} {path} cannot be written to ({error.strerror}); choose another folder') from None
    return path


def load(path: Path, kind: str, schema: dict | None = None) -> dict:
    """Load a `.pth` file onto the CPU without executing anything in it; its checksums (CRC-32) have to be right.

    `kind` is what it should be, for the messages (`data base`, `model`, ...), `schema` what the dict in it must hold.

    Raises:
        UserError: if it is missing, corrupt, would need code to be executed, or is something else.
    """
    import torch

    path = Path(path)
    if not path.is_file():
        raise UserError(f'there is no {kind} {path}')
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of a damaged file; what matters is in the error
            if zipfile.is_zipfile(path):  # since torch 1.6; torch.load does not look at its checksums
                with zipfile.ZipFile(path) as archive:
                    if broken := archive.testzip():
                        raise ValueError(f'the checksum of {broken} is wrong')
            contents = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # a damaged archive raises whatever the unpickler or the zip reader stumbles over
        raise UserError(f'{path} cannot be read as a {kind}: it is corrupt, or holds more than tensors and plain '
                        f'values ({reason_of(error)})') from None
    if schema:
        check_fields(contents, schema, path, kind)
    return contents


def read_json(path: Path, schema: dict) -> dict | None:
    """Read a JSON file that holds what a schema says, see `check_fields`; None where there is none, or another."""
    try:
        contents = json.loads(path.read_text())
        check_fields(contents, schema, path, 'file')
    except (OSError, ValueError):  # of ValueErrors: no JSON, no text, or not what the schema says
        return None
    return contents


def check_fields(contents, schema: dict, path: Path, kind: str) -> None:
    """Refuse contents (of any type) of a file whose fields are not what a schema says, naming those that are not.

    A schema is {field: its type, exactly, or a function that tells whether a value is sound}.
    """
    def is_sound(value, rule) -> bool:
        try:
            return type(value) is rule if isinstance(rule, type) else bool(rule(value))
        except Exception:  # a value of another type than expected raises anything when it is looked at
            return False

    missing = [field for field in schema if not isinstance(contents, dict) or field not in contents]
    if missing:
        raise UserError(f'{path} is no {kind} of this project: it lacks {", ".join(missing)}')
    wrong = [field for field, rule in schema.items() if not is_sound(contents[field], rule)]
    if wrong:
        raise UserError(f'{path} is no sound {kind}: {", ".join(wrong)} cannot be used; it was damaged, or made by '
                        'another version or program')


def is_whole(low: int, high: int = 2**63 - 1):
    """Return a rule for a schema: a whole number from low to high."""
    return lambda value: type(value) is int and low <= value <= high


def readable(name: str) -> str:
    """Return a name of a file as it can be printed: bytes that are no UTF-8 are written as numbers."""
    return name.encode(errors='backslashreplace').decode()


def are_texts(value) -> bool:
    """Tell whether a value is a list of strings."""
    return isinstance(value, list) and all(isinstance(part, str) for part in value)


def is_folder_name(name) -> bool:
    """Tell whether a text names a folder beside others: visible, without a path, printable."""
    return isinstance(name, str) and not name.startswith('.') and Path(name).name == name and name.isprintable()


def is_inside(path: str) -> bool:
    """Tell whether a path of a file stays in the folder that it is relative to."""
    return not (path.startswith('/') or '\\' in path or '\0' in path or '..' in path.split('/'))


def check_paths(file: Path, paths) -> None:
    """Raise a UserError that names the first path in a file which leaves the data set's folder."""
    for path in paths:
        if not is_inside(path):
            raise UserError(f'{file}: the image {path!r} does not lie in the data set\'s folder; the file is not to be '
                            'trusted')


def image_file(root: Path, image: str) -> Path:
    """Return the file of an image of a data base; raises UserError where a symbolic link leads out of the folder."""
    if not (root / image).resolve().is_relative_to(root.resolve()):
        raise UserError(f'the image {root / image} is a link out of the data set\'s folder; it is not to be trusted')
    return root / image


def stamp_of(file: Path) -> list[int] | None:
    """Return size and time of a file, or None."""
    try:
        found = os.stat(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return [found.st_size, found.st_mtime_ns]
