"""How far a long task is: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import MutableMapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from tqdm import tqdm

_EVERY_S = 10.0
_BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{passed}<{left}, {rate_fmt}{postfix}]"
_COUNTER = "{desc}: {n_fmt}{unit} [{passed}, {rate_fmt}{postfix}]"


def duration(seconds: float) -> str:
    """Format a time as ``03:20:05``, or ``1 d 03:20:05`` from a day on."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    clock = f"{hours:02d}:{minutes:02d}:{seconds:02d}"
    return f"{days} d {clock}" if days else clock


def progress_bar(total: int | None, **how: Any) -> "tqdm[Any]":
    """A bar of tqdm with the times of :func:`duration`; ``how`` are tqdm's arguments, ``total`` None is unknown."""
    from tqdm import tqdm  # `make gpu` opens stores where it is not installed

    class Bar(tqdm):
        @property
        def format_dict(self) -> MutableMapping[str, Any]:
            fields = super().format_dict
            passed, done = fields["elapsed"], self.n - self.initial
            rate = fields["rate"] or (done / passed if passed else 0.0)
            left = duration(max(0.0, self.total - self.n) / rate) if self.total and rate else "?"
            return {**fields, "passed": duration(passed), "left": left}

    return Bar(total=total, bar_format=_COUNTER if total is None else _BAR, **how)


class Progress:
    """Counts ``total`` things, or as many as come for None. ``done`` of them were there at the start, and do not count
    as speed; ``quiet`` tells nothing."""

    def __init__(self, doing: str, unit: str, total: int | None, done: int = 0, quiet: bool = False):
        self._doing, self._total, self._done, self._unit = doing, total, done, unit
        bar = sys.stderr.isatty() and not quiet
        self._bar = progress_bar(total, initial=done, desc=doing, unit=unit, disable=not bar)
        self._quiet = quiet or bar
        self._began, self._first, self._told = time.monotonic(), done, time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()
        if error is None:
            self._tell()

    def count(self, more: int) -> None:
        """So many more are done."""
        self._done += more
        self._bar.update(more)
        if time.monotonic() - self._told >= _EVERY_S:
            self._tell()

    def _tell(self) -> None:
        self._told = time.monotonic()
        if self._quiet or self._done == self._first:
            return
        rate = (self._done - self._first) / (self._told - self._began)
        so_far, left = f"{self._doing} {self._done:,}", ""
        if self._total is not None:
            so_far, left = f"{so_far}/{self._total:,}", f"  {duration((self._total - self._done) / rate)} left"
        print(f"{so_far}  {rate:.1f} {self._unit}s/s{left}", flush=True)
