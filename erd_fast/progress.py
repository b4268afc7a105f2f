"""How far a long task is: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from types import TracebackType
from typing import Self

_EVERY_S = 10.0


class Progress:
    """Counts ``total`` things, or as many as come for None. ``done`` of them were there at the start, and do not count
    as speed; ``quiet`` tells nothing."""

    def __init__(self, doing: str, unit: str, total: int | None, done: int = 0, quiet: bool = False):
        from tqdm import tqdm  # `make gpu` opens stores where it is not installed

        self._doing, self._total, self._done, self._unit = doing, total, done, unit
        bar = sys.stderr.isatty() and not quiet
        self._bar = tqdm(total=total, initial=done, desc=doing, unit=unit, disable=not bar)
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
            minutes, seconds = divmod(round((self._total - self._done) / rate), 60)
            so_far, left = f"{so_far}/{self._total:,}", f"  {minutes}:{seconds:02d} left"
        print(f"{so_far}  {rate:.1f} {self._unit}s/s{left}", flush=True)
