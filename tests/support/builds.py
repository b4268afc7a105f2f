"""Compiles C++ and CUDA for tests, and keeps the results in out/test-builds/ from one run to the next.

A result is found by what it was made of: the command, the compiler's version, torch's, and the content of every file of
csrc/ and tests/csrc/. Worker processes share the folder: a lock for each result keeps two of them from compiling it at
once, and it is complete as soon as it is there. What has not been used for two weeks is deleted.
"""

import contextlib
import fcntl
import functools
import hashlib
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
KEPT_S = 14 * 24 * 3600
Command = Callable[[Path], list[str]]
"""From the path of the output to the command that writes it."""


class CompileError(Exception):
    """A compiler or linker failed; the message is what it wrote."""


def build(name: str, command: Command) -> Path:
    """Return the file that ``command`` writes; its name ends in ``name``.

    The command names its inputs. Those outside csrc/ and tests/csrc/ must not change under one name, as results of
    this function and of :func:`source` do not.

    Raises:
        CompileError: the command failed.
    """
    target = _folder() / f"{_key(command(Path(name)))}-{name}"
    with _lock(target):
        if not _touch(target):
            unfinished = target.with_name(f"{os.getpid()}-{target.name}")
            whole = command(unfinished)
            done = subprocess.run(whole, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                unfinished.unlink(missing_ok=True)
                raise CompileError(f"{' '.join(whole)}\n{done.stdout}{done.stderr}")
            log_of(target).write_text(done.stdout + done.stderr)
            unfinished.replace(target)
    return target


def build_all(jobs: Iterable[tuple[str, Command]]) -> list[Path]:
    """Run :func:`build` for each (name, command), as many at a time as there are processors."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda job: build(*job), jobs))


def source(name: str, text: str) -> Path:
    """Return a file with this text."""
    target = _folder() / f"{_digest(text.encode())}-{name}"
    with _lock(target):
        if not _touch(target):
            unfinished = target.with_name(f"{os.getpid()}-{target.name}")
            unfinished.write_text(text)
            unfinished.replace(target)
    return target


def log_of(target: Path) -> Path:
    """Return the file with the compiler's output, which may be empty."""
    return target.with_name(f"{target.name}.log")


@functools.cache
def _folder() -> Path:
    folder = ROOT / "out" / "test-builds"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):  # another user's checkout
        folder = Path(tempfile.gettempdir()) / f"erd-fast-test-builds-{os.getuid()}"
        folder.mkdir(exist_ok=True)
    delete_unused(folder)
    return folder


def delete_unused(folder: Path) -> None:
    oldest = time.time() - KEPT_S
    for file in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another worker deleted it
            if file.stat().st_mtime < oldest:
                file.unlink()


def _touch(target: Path) -> bool:
    """Mark a result as used now; returns whether it exists."""
    for file in (target, log_of(target)):
        with contextlib.suppress(FileNotFoundError):
            os.utime(file)
    return target.exists()


@contextlib.contextmanager
def _lock(target: Path) -> Iterator[None]:
    with open(target.with_name(f"{target.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _key(command: list[str]) -> str:
    compilers = [command[0], *(part.removeprefix("-ccbin=") for part in command if part.startswith("-ccbin="))]
    facts = [*command, *map(_version, compilers), torch.__version__, _sources()]
    return _digest("\0".join(facts).encode())


@functools.cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout


@functools.cache
def _sources() -> str:
    """Digest of csrc/ and of the C++ of the tests."""
    folders = (ROOT / "csrc", ROOT / "tests" / "csrc")
    files = [file for folder in folders for file in sorted(folder.iterdir()) if file.is_file() and file.suffix != ".py"]
    return _digest(*(part for file in files for part in (file.name.encode(), file.read_bytes())))


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:24]
