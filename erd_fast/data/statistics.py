"""What the numbers of a store are like: sums over rows, which add up over pieces of a store."""

import dataclasses
import functools
import hashlib
import math
import operator
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from erd_fast.data.manifest import Manifest
from erd_fast.data.store import LatentStore
from erd_fast.latents import LOGVAR_RANGE

VALUES = (-5.0, 5.0)
"""Range of the histograms of values as the model sees them."""
SPREADS = (-8.0, 2.0)
"""Range of the histograms of log10 std, before scaling."""
BINS = 100
_LN_10 = math.log(10)
_COMBINE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"lowest": torch.minimum, "highest": torch.maximum}


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Of C channels; ``value`` is the mean of a posterior, or the stored number where there is none, as the model sees
    it: (z - shift) * scale, or -1 to 1 for pixels. Rows that are not finite are counted and left out of all else.

    Attributes:
        rows: how many were looked at.
        not_finite: rows with NaN or an infinity.
        constant: rows whose numbers are all the same.
        sums, squares: (C,) float64 of values.
        variances: (C,) float64, sums of posterior variances, scaled; zero where there is no posterior.
        per_channel: numbers of a channel that the sums are over.
        lowest, highest: (channels stored,) of stored numbers.
        values: (C, BINS) histogram of values; the last bins have what lies outside.
        spreads: (C, BINS) histogram of log10 of the posterior's std, not scaled.
    """

    rows: int
    not_finite: tuple[int, ...]
    constant: tuple[int, ...]
    sums: Tensor
    squares: Tensor
    variances: Tensor
    per_channel: int
    lowest: Tensor
    highest: Tensor
    values: Tensor
    spreads: Tensor

    def __add__(self, other: "Statistics") -> "Statistics":
        def combined(name: str) -> Any:
            return _COMBINE.get(name, operator.add)(getattr(self, name), getattr(other, name))

        return Statistics(**{field.name: combined(field.name) for field in dataclasses.fields(self)})

    @property
    def mean(self) -> Tensor:
        """(C,) of what the model is trained on."""
        return self.sums / self.per_channel

    @property
    def std(self) -> Tensor:
        """(C,) of what the model is trained on, draws from the posterior included."""
        return ((self.squares + self.variances) / self.per_channel - self.mean**2).clamp_min(0).sqrt()

    @property
    def overall_std(self) -> float:
        """Root of the mean variance of the channels."""
        return float(self.std.square().mean().sqrt())


def measure(latents: Tensor, first_row: int, manifest: Manifest) -> Statistics:
    """Of stored rows (n, C or 2C, H, W), the first of which is row ``first_row`` of its store."""
    stored = latents.float()
    flat = stored.flatten(1)
    finite = flat.isfinite().all(1)
    constant = finite & (flat == flat[:, :1]).all(1) & (flat.shape[1] > 1)
    kept = stored if finite.all() else stored[finite]
    values, log_std = _halves(kept, manifest)
    scale = _scale(manifest)
    nothing = torch.zeros(manifest.shape[0], dtype=torch.float64)
    variances = nothing if log_std is None else _sum(10 ** (2 * log_std)) * scale**2
    return Statistics(
        rows=len(latents),
        not_finite=_rows(~finite, first_row),
        constant=_rows(constant, first_row),
        sums=_sum(values),
        squares=_sum(values * values),
        variances=variances,
        per_channel=values[:, 0].numel(),
        lowest=kept.amin((0, 2, 3)) if len(kept) else torch.full((stored.shape[1],), math.inf),
        highest=kept.amax((0, 2, 3)) if len(kept) else torch.full((stored.shape[1],), -math.inf),
        values=_histograms(values, VALUES),
        spreads=torch.zeros_like(_histograms(values, VALUES)) if log_std is None else _histograms(log_std, SPREADS),
    )


def measure_some(store: LatentStore, runs: int = 64, length: int = 16) -> Statistics:
    """Of ``runs`` runs of ``length`` rows spread evenly over the store: what can be read in a moment from a disk."""
    count = len(store)
    whole = count <= runs * length
    firsts = range(0, count, length) if whole else [run * (count - length) // (runs - 1) for run in range(runs)]
    return total(measure(store.gather(torch.arange(f, min(f + length, count))), f, store.manifest) for f in firsts)


def total(parts: Iterable[Statistics]) -> Statistics:
    """The sum of at least one part."""
    return functools.reduce(operator.add, parts)


def digests(latents: Tensor) -> np.ndarray:
    """A 128-bit hash of each row: (n,) of 16 bytes."""
    rows = latents.contiguous().view(torch.uint8).flatten(1).numpy()
    joined = b"".join(hashlib.blake2b(row, digest_size=16).digest() for row in rows)
    return np.frombuffer(joined, "V16")


def _halves(stored: Tensor, manifest: Manifest) -> tuple[Tensor, Tensor | None]:
    """Values, and log10 of the posterior's std."""
    if manifest.kind == "pixels":
        return stored / 127.5 - 1, None
    channels = manifest.shape[0]
    shift = torch.tensor(manifest.shift or (0.0,) * channels)[:, None, None]
    values = (stored[:, :channels] - shift) * _scale(manifest).float()[:, None, None]
    if manifest.kind == "sample":
        return values, None
    second = stored[:, channels:]
    if manifest.kind == "mean_logvar":
        return values, second.clamp(*LOGVAR_RANGE) / (2 * _LN_10)
    return values, second.clamp_min(0).clamp_min(1e-30).log10()


def _scale(manifest: Manifest) -> Tensor:
    return torch.tensor(manifest.scale or (1.0,) * manifest.shape[0], dtype=torch.float64)


def _sum(x: Tensor) -> Tensor:
    return x.sum((0, 2, 3), dtype=torch.float64)


def _rows(chosen: Tensor, first_row: int) -> tuple[int, ...]:
    return tuple((chosen.nonzero()[:, 0] + first_row).tolist())


def _histograms(x: Tensor, limits: tuple[float, float]) -> Tensor:
    low, high = limits
    return torch.stack([torch.histc(c.clamp(low, high), BINS, low, high) for c in x.unbind(1)]).long()
