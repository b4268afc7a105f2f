"""The hidden folder in which a store grows over several tries and in several processes, until it is whole.

::

    .STORE.encoding/settings.json               what must not change between two tries
                    shard-00000.json            a shard that is finished, and what was broken in it
                    store/shard-00000.safetensors ...
                    lock, rank-0.lock           held while a process works

Whoever is the last to leave finds all shards there and makes the store; ``store`` becomes it by one rename, and only
then anything is removed. So a process that sees something missing here also sees the store.
"""

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from erd_fast.errors import DataError, RunError
from erd_fast.files import make_folder, publish, read_json, remove_partial, write_json


class Unfinished:
    """A store ``dst`` that is being made."""

    def __init__(self, dst: Path):
        self.dst = dst
        self.folder = dst.parent / f".{dst.resolve().name}.encoding"
        self.store = self.folder / "store"

    @contextlib.contextmanager
    def joined(self, rank: int) -> Iterator[IO[str]]:
        """Work here as number ``rank``; gives a lock that says so until :meth:`leave`.

        Raises:
            RunError: another process works here as this number, or the folder cannot be made.
        """
        own, common = self._opened(f"rank-{rank}.lock", "lock")
        with own, common:
            if not _locked(own, fcntl.LOCK_EX | fcntl.LOCK_NB):
                raise RunError(f"another process is encoding into {self.dst}; wait for it, or name another folder")
            _locked(common, fcntl.LOCK_SH)
            try:
                yield common
            except BaseException:
                if not any(self.folder.glob("shard-*.json")) and self.leave(common):
                    self.remove()  # nothing to go on from
                raise

    def leave(self, common: IO[str]) -> bool:
        """Whether nobody else is left; nobody can join then."""
        fcntl.flock(common, fcntl.LOCK_UN)
        return _locked(common, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def check_settings(self, settings: dict[str, Any]) -> None:
        """Raises DataError if shards here were made with other ones."""
        file = self.folder / "settings.json"
        if not file.is_file():
            write_json(file, settings)
            return
        begun = read_json(file)
        for name in settings:
            if begun.get(name) != settings[name]:
                raise DataError(
                    f"{self.dst} was begun with {name} {begun.get(name)!r}, given {settings[name]!r}: "
                    f"go on with that, or remove {self.folder} to begin anew"
                )

    def note(self, number: int) -> dict[str, Any] | None:
        """What was noted of shard ``number``; None if it is to be made."""
        file = self._note_file(number)
        if not file.is_file():
            return None
        found = read_json(file)
        made = found["shard"] and self.store / found["shard"]["file"]
        whole = made is None or (made.is_file() and made.stat().st_size == found["shard"]["bytes"])
        return found if whole else None

    def write_note(self, number: int, content: dict[str, Any]) -> None:
        write_json(self._note_file(number), content)

    def publish(self) -> None:
        """``store`` becomes ``dst``."""
        publish(self.store, self.dst)

    def tidy(self) -> None:
        """Remove what killed processes left. Nobody else may be here."""
        remove_partial(self.folder)
        remove_partial(self.store)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _note_file(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.json"

    def _opened(self, *names: str) -> list[IO[str]]:
        while True:
            make_folder(self.store)
            try:
                return [open(self.folder / name, "a") for name in names]
            except FileNotFoundError:  # another process has made the store this moment, and removed the folder
                continue


def _locked(file: IO[str], how: int) -> bool:
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        return False
    except OSError as error:
        raise RunError(f"cannot lock {file.name}: {error.strerror}") from error
    return True
