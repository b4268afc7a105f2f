"""Stages of a measurement under one time budget: each is a process with a limit, and each row is on disk as it comes.

A stage that raises, hangs or is killed costs only itself. Whenever the whole is killed, the rows written so far stay.
"""

import contextlib
import ctypes
import functools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

_POLL_S, _DEATH_S = 0.05, 5.0
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


class Rows:
    """A file of JSON objects, one per line, to which several processes append."""

    def __init__(self, file: Path):
        self._file = file

    def write(self, kind: str, **facts: Any) -> None:
        """Append a row. It is on disk when this returns. Numbers that are not finite become null.

        Raises:
            OSError: the disk is full, or the file may not be written.
        """
        line = json.dumps({"kind": kind, "time": round(time.time(), 1), **_finite(facts)}, default=str).encode() + b"\n"
        handle = os.open(self._file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.fstat(handle).st_size
            if size and os.pread(handle, 1, size - 1) != b"\n":  # a writer was stopped in the middle of its row
                line = b"\n" + line
            if os.write(handle, line) < len(line):  # in one piece, so that rows of several processes do not mix
                raise OSError(f"{self._file}: no space left for a row")
            os.fsync(handle)
        finally:
            os.close(handle)

    def read(self, *kinds: str) -> list[dict[str, Any]]:
        """The rows of these kinds, or all; without lines that were cut off."""
        if not self._file.exists():
            return []
        found = []
        for line in self._file.read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return [row for row in found if not kinds or row["kind"] in kinds]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Stage(NamedTuple):
    """A command, and the seconds that it may take."""

    name: str
    command: list[str]
    limit: float


class _Running(NamedTuple):
    stage: Stage
    process: subprocess.Popen[bytes]
    began: float


class Runner:
    """Runs stages until ``seconds`` have passed since it was made.

    Args:
        rows: where the outcome of each stage goes, as a row of kind ``stage``.
        log: file for what stages print.
        folder: where commands run. environment: what they get in addition to this process's.
        least: seconds that must be left for a stage to begin: with less it does not get past its imports.
    """

    def __init__(
        self,
        rows: Rows,
        log: Path,
        seconds: float,
        folder: Path,
        environment: Mapping[str, str] | None = None,
        least: float = 12.0,
    ):
        self._rows, self._log, self._folder = rows, log, folder
        self._environment = {**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})}
        self._least, self._end = least, time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    def run(self, *stages: Stage) -> None:
        """Run ``stages`` at the same time, and wait until all have ended or were killed at their limit."""
        if self.left < self._least:
            for stage in stages:
                self._note(stage, "no time left", 0.0)
            return
        running: list[_Running] = []
        try:
            for stage in stages:
                try:
                    running.append(self._begin(stage))
                except OSError as error:
                    self._note(stage, f"did not start: {error}", 0.0)
            while running:
                running = [one for one in running if not self._ended(one)]
                time.sleep(_POLL_S)
        finally:
            for one in running:  # this process is being stopped
                _kill(one.process)

    def _begin(self, stage: Stage) -> _Running:
        with open(self._log, "ab") as log:
            log.write(f"\n--- {stage.name}\n".encode())
            log.flush()
            process = subprocess.Popen(
                stage.command,
                cwd=self._folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,  # so that what a stage starts is killed with it
                preexec_fn=functools.partial(_die_with, os.getpid()),
            )
        return _Running(stage, process, time.monotonic())

    def _ended(self, one: _Running) -> bool:
        """Whether a stage has ended, by itself or because its time is up."""
        passed, code = time.monotonic() - one.began, one.process.poll()
        if code is None:
            if passed < one.stage.limit and self.left > 0:
                return False
            outcome = f"killed at its limit of {min(passed, one.stage.limit):.0f} s"
        elif code < 0:
            known = -code in signal.valid_signals() and not signal.SIGRTMIN < -code < signal.SIGRTMAX
            outcome = f"killed by {signal.Signals(-code).name if known else f'signal {-code}'}"
        else:
            outcome = "ok" if code == 0 else f"failed with exit status {code}"
        if not _kill(one.process):  # also what it left running
            outcome += ", and has not ended yet"
        self._note(one.stage, outcome, passed)
        return True

    def _note(self, stage: Stage, outcome: str, seconds: float) -> None:
        try:
            self._rows.write("stage", stage=stage.name, outcome=outcome, seconds=round(seconds, 1))
        except OSError as error:  # what follows may still print
            print(f"{stage.name}: {outcome} ({error})", file=sys.stderr)


def _die_with(parent: int) -> None:
    """In a new process, before its program starts: be killed when the runner ends, however that ends."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _kill(process: subprocess.Popen[bytes]) -> bool:
    """Kill a stage and what it has started; whether it has ended. A call of a GPU's driver can hold it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    try:
        process.wait(_DEATH_S)
    except subprocess.TimeoutExpired:
        return False
    return True


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Within the block SIGTERM ends this process as SIGINT does: with the stages that it runs."""

    def stop(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
