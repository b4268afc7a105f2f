"""Files that are whole or absent: atomic writes, and the folder for cached imports and judges.

Permissions are those of any new file or folder, as the umask has them. safetensors replaces a file by one that only its
owner can read, so files get their permissions when they are whole.
"""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from erd_fast.errors import DataError, RunError


def cache_dir() -> Path:
    """Folder of imported stores and trained judges: ``ERD_FAST_CACHE``, else ``~/.cache/erd-fast``."""
    given = os.environ.get("ERD_FAST_CACHE")
    return Path(given) if given else Path(os.path.expanduser("~/.cache/erd-fast"))


def cache_folder(name: str) -> Path:
    """The cache's folder ``name``, made if need be. Raises RunError where that is not permitted."""
    try:
        return make_folder(cache_dir() / name)
    except RunError as error:
        raise RunError(f"{error}; the environment variable ERD_FAST_CACHE names the cache's folder") from error


def make_folder(path: Path) -> Path:
    """Create ``path`` with its parents. Raises RunError where that is not permitted."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot create the folder {path}: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise RunError(f"no permission to write in {path}")
    return path


def write_text(path: Path, text: str) -> None:
    """:func:`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that readers see the old content or the new one, never a part."""
    with whole_file(path) as partial:
        partial.write_bytes(content)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a file to write; on a clean end it becomes ``path`` in one rename, otherwise it is removed.

    Raises:
        RunError: a write failed.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.unlink(missing_ok=True)  # of a killed process of this number
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)
        _sync(partial)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk by its own exception
        raise RunError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises DataError where it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from error


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder to fill; on a clean end it becomes ``path`` in one rename, otherwise it is removed.

    If ``path`` appeared meanwhile (another process made it), that one is kept. Raises RunError on a failed write.
    """
    make_folder(path.parent)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.mkdir()
        yield partial
        for file in filter(Path.is_file, partial.iterdir()):
            file.chmod(partial.stat().st_mode & 0o666)
        try:
            _rename_whole(partial, path)
        except OSError:
            if not path.is_dir():
                raise
            shutil.rmtree(partial, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise RunError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        if partial.exists():
            shutil.rmtree(partial, ignore_errors=True)


def publish(folder: Path, path: Path) -> None:
    """A folder whose files are whole becomes ``path`` in one rename. Raises RunError where that fails, as where
    something else is there; the folder stays then."""
    try:
        _rename_whole(folder, path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}") from error


def _rename_whole(folder: Path, path: Path) -> None:
    for file in folder.iterdir():
        _sync(file)
    _sync(folder)
    os.rename(folder, path)
    _sync(path.parent)


def remove_partial(folder: Path) -> None:
    """Remove what killed writers left in ``folder``. Only one process may write there."""
    for left in folder.glob(".*.partial"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
