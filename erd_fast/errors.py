"""Exceptions for mistakes a user can make, and the wording they share: which field, what was given, what is allowed."""

import difflib
from collections.abc import Iterable


class ErdFastError(Exception):
    """Base of every error that a user can cause. The command line prints its message alone, without a traceback.

    Attributes:
        told: another process tells it.
    """

    told = False


class ConfigError(ErdFastError):
    """A configuration field, preset or argument has a value that is not allowed."""


class DataError(ErdFastError):
    """A latent store, image source or checkpoint on disk is missing, damaged or of the wrong form."""


class RunError(ErdFastError):
    """A run cannot start or go on: another configuration in its folder, no permission, a loss that is not finite."""


class BackendUnavailableError(ErdFastError):
    """An op was asked for by name on a backend that cannot run it.

    Attributes:
        op, backend: what was asked for.
        reason: why it cannot.
        remedy: what to do.
    """

    def __init__(self, op: str, backend: str, reason: str, remedy: str):
        super().__init__(f"{op}: backend {backend} cannot run: {reason}; {remedy}")
        self.op, self.backend, self.reason, self.remedy = op, backend, reason, remedy


def unknown_name(what: str, given: str, allowed: Iterable[str]) -> str:
    """Message for a name that is not in ``allowed``: the nearest allowed name, then all of them."""
    names = list(allowed)
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"unknown {what} {given!r}{hint}; allowed: {', '.join(names)}"
