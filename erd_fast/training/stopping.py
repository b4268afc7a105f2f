"""Signals that ask a run to stop where it may."""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any


class StopRequest:
    """The signal that asked the run to stop, or 0."""

    signal = 0


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request; a second one acts as usual."""
    stop = StopRequest()

    def note(number: int, frame: Any) -> None:
        stop.signal = number
        for name, handler in before.items():
            signal.signal(name, handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
