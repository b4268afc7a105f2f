"""Histograms of a store as a picture: values of each channel, spread of the posterior, samples of each class."""

import io
from typing import TYPE_CHECKING

import numpy as np
import torch

from erd_fast.data.statistics import BINS, SPREADS, VALUES, Statistics
from erd_fast.data.store import LatentStore
from erd_fast.latents import has_posterior

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MUTED = "#9a9a94"
_MOST_LINES = 16  # channels, beyond which lines tell nothing apart and need no legend


def draw_statistics(store: LatentStore, measured: Statistics) -> bytes:
    """A PNG file."""
    import matplotlib.style
    from matplotlib.figure import Figure

    manifest = store.manifest
    panels = [_values]
    if has_posterior(manifest.kind):
        panels.append(_spreads)
    if manifest.num_classes > 1:
        panels.append(_classes)
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}
    with matplotlib.style.context({**style, "axes.grid": True, "grid.color": "#e4e4e0"}, after_reset=True):
        figure = Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
        for axes, draw in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            draw(axes, store, measured)
        figure.suptitle(f"{store.path.name}: {len(store):,} samples, {manifest.kind} {manifest.shape}", fontsize=10)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _values(axes: "Axes", store: LatentStore, measured: Statistics) -> None:
    of_posterior = has_posterior(store.manifest.kind)
    _lines(axes, measured.values.numpy(), VALUES)
    x = np.linspace(*VALUES, 200)
    axes.plot(x, np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi), color="black", linestyle="--", linewidth=1, label="normal")
    name = "mean of the posterior" if of_posterior else "pixels" if store.manifest.kind == "pixels" else "latents"
    axes.set_title(f"{name}, as the model sees it: std {measured.overall_std:.3g}", loc="left", fontsize=9)
    axes.set(xlabel="value", ylabel="density")
    if len(measured.values) <= _MOST_LINES:
        axes.legend(frameon=False, title="channel", fontsize=8)


def _spreads(axes: "Axes", store: LatentStore, measured: Statistics) -> None:
    _lines(axes, measured.spreads.numpy(), SPREADS)
    axes.set_title("std of the posterior, not scaled", loc="left", fontsize=9)
    axes.set(xlabel="log10 std", ylabel="density")


def _classes(axes: "Axes", store: LatentStore, measured: Statistics) -> None:
    counts = torch.bincount(store.labels, minlength=store.manifest.num_classes).sort(descending=True).values
    axes.bar(np.arange(len(counts)), counts.numpy(), width=0.8 if len(counts) <= 100 else 1.0, color=_MUTED)
    axes.set_title(f"samples of each of {len(counts):,} classes, most first", loc="left", fontsize=9)
    axes.set(xlabel="class", ylabel="samples")
    axes.set_ylim(bottom=0)


def _lines(axes: "Axes", histograms: np.ndarray, limits: tuple[float, float]) -> None:
    edges = np.linspace(*limits, BINS + 1)
    for channel, counts in enumerate(histograms):
        density = counts / max(counts.sum(), 1) / (edges[1] - edges[0])
        axes.stairs(density, edges, linewidth=1.2, label=str(channel))
