"""Which backends ops ran on: a record for logs and reports, which nothing reads to decide anything."""

import contextlib
import contextvars
import logging
from collections.abc import Iterator
from typing import Any

_active: contextvars.ContextVar["Recording | None"] = contextvars.ContextVar("erd_fast_recording", default=None)
_log = logging.getLogger("erd_fast.ops")


class Recording:
    """The backends that each op ran on while this was the active recording.

    Attributes:
        backends: op -> names of backends, in the order of their first use.
        dry: choose backends without running them; ops return uninitialised outputs.
        calls: (op, backend, arguments) of each call while it was dry.
    """

    def __init__(self, dry: bool = False):
        self.dry = dry
        self.backends: dict[str, list[str]] = {}
        self.calls: list[tuple[str, str, dict[str, Any]]] = []

    def names(self) -> dict[str, str]:
        """op -> its backends with commas."""
        return {op: ", ".join(backends) for op, backends in sorted(self.backends.items())}

    def note(self, op: str, backend: str, args: dict[str, Any]) -> None:
        """Add a call; the first one on a backend is logged."""
        if self.dry:
            self.calls.append((op, backend, args))
            return
        seen = self.backends.setdefault(op, [])
        if backend not in seen:
            seen.append(backend)
            _log.info("%s runs on %s", op, backend)


@contextlib.contextmanager
def record(recording: Recording | None = None) -> Iterator[Recording]:
    """Record within this block, and in threads that run in a copy of its context."""
    recording = Recording() if recording is None else recording
    token = _active.set(recording)
    try:
        yield recording
    finally:
        _active.reset(token)


active_recording = _active.get
