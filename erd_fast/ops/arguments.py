"""Checks that ops share: op, argument, given, allowed."""

from torch import Tensor


def check_shape(op: str, argument: str, given: Tensor | None, allowed: tuple[int, ...]) -> None:
    """Raise ValueError unless ``given`` is None or has the shape ``allowed``: nothing broadcasts by accident."""
    if given is not None and tuple(given.shape) != allowed:
        raise ValueError(f"{op}: {argument}: given shape {tuple(given.shape)}, allowed {allowed}")
