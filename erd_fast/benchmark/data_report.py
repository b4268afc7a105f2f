"""Records of reading latents as a table and as a picture."""

import io
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from erd_fast.benchmark.data import PACES
from erd_fast.benchmark.data_variants import BASELINES, OURS
from erd_fast.benchmark.records import Record, aligned

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OURS, _BASELINES, _PACE = "#1664c0", "#9a9a94", "#c0392b"


def table(records: Iterable[Record]) -> str:
    """A line for each record, and how many times faster each reader of ours is than each baseline."""
    found = list(records)
    columns: dict[str, Callable[[Record], str]] = {
        "group": lambda record: record.group,
        "case": lambda record: record.case,
        "variant": lambda record: record.variant,
        "latents/s": lambda record: _number(record.latents_per_sec, "{:,.0f}"),
        "CPU ms/1000": lambda record: _number(record.cpu_ms_per_1k, "{:.1f}"),
        "processes": lambda record: _number(record.processes, "{}"),
        "images/s": lambda record: _number(record.images_per_sec, "{:,.1f}"),
        "wait": lambda record: _number(record.wait_pct, "{:.2f}%"),
        "growth MiB": lambda record: _number(record.growth_bytes, "{:.1f}", 2**20),
        "median ms": lambda record: f"{1e3 * record.median_s:.3f}",
        "iqr ms": lambda record: f"{1e3 * record.iqr_s:.3f}",
        "runs": lambda record: str(record.runs),
    }
    lines = [[name, *(write(record) for record in found)] for name, write in columns.items()]
    shown = [column for column in lines if any(column[1:])]
    ratios = [f"{ours} / {base}: {ratio:.1f}" for ours, base, ratio in speedups(found)]
    return "\n".join([aligned([*zip(*shown, strict=True)], names=3), *([""] if ratios else []), *ratios])


def speedups(records: Sequence[Record]) -> list[tuple[str, str, float]]:
    """(reader, baseline, latents a second of the one over the other) of all that were read."""
    rates = {record.variant: record.latents_per_sec for record in records if record.latents_per_sec is not None}
    pairs = [(ours, base) for ours in OURS for base in BASELINES if ours in rates and base in rates]
    return [(ours, base, rates[ours] / rates[base]) for ours, base in pairs]


def _number(value: float | None, form: str, unit: int = 1) -> str:
    return "" if value is None else form.format(value if unit == 1 else value / unit)


def picture(records: Iterable[Record]) -> bytes:
    """A PNG file: latents a second beside what training takes, CPU time, and the part of a step that waits."""
    import matplotlib.style
    from matplotlib.figure import Figure

    found = list(records)
    draws: list[tuple[Callable[[Axes, Sequence[Record]], None], list[Record]]] = [
        (_draw_rates, [record for record in found if record.latents_per_sec is not None]),
        (_draw_cpu, [record for record in found if record.cpu_ms_per_1k is not None]),
        (_draw_waits, [record for record in found if record.wait_pct is not None]),
    ]
    panels = [(draw, chosen) for draw, chosen in draws if chosen]
    heights = [1.0 + 0.26 * len(chosen) for _, chosen in panels]
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.style.context(style, after_reset=True):
        figure = Figure(figsize=(8, max(sum(heights), 1.0)), layout="constrained")
        if panels:
            grid = figure.subplots(len(panels), squeeze=False, height_ratios=heights)
            for axes, (draw, chosen) in zip(grid[:, 0], panels, strict=True):
                draw(axes, chosen)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _draw_rates(axes: "Axes", records: Sequence[Record]) -> None:
    """On a logarithmic axis, so points and no bars."""
    rates = [record.latents_per_sec or math.nan for record in records]
    spreads = [rate * record.iqr_s / record.median_s / 2 for record, rate in zip(records, rates, strict=True)]
    for place, (record, rate, spread) in enumerate(zip(records, rates, spreads, strict=True)):
        axes.errorbar(rate, place, xerr=spread, fmt="o", color=_colour(record), capsize=2)
        axes.annotate(f"{rate:,.0f}", (rate + spread, place), (8, 0), textcoords="offset points", va="center")
    for model, pace in PACES.items():
        axes.axvline(pace, color=_PACE, linestyle=":", linewidth=1)
        axes.text(pace, -0.85, f" {model} takes {pace:,}", color=_PACE, va="center", fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(min([*PACES.values(), *rates]) / 2, max([*PACES.values(), *rates]) * 4)
    _name_rows(axes, [record.variant for record in records], "latents a second")
    axes.set_ylim(top=-1.3)


def _draw_cpu(axes: "Axes", records: Sequence[Record]) -> None:
    _bars(axes, records, [record.cpu_ms_per_1k or 0.0 for record in records], "{:.1f}")
    _name_rows(axes, [record.variant for record in records], "milliseconds of CPU for 1000 latents")


def _draw_waits(axes: "Axes", records: Sequence[Record]) -> None:
    _bars(axes, records, [record.wait_pct or 0.0 for record in records], "{:.2f}")
    names = [
        f"{record.case.split()[0]}{', trained' * (record.group == 'data/step')}: {record.variant}" for record in records
    ]
    _name_rows(axes, names, "% of a step's time waiting for its batch, at the pace of a large GPU")


def _bars(axes: "Axes", records: Sequence[Record], values: Sequence[float], form: str) -> None:
    axes.barh(range(len(values)), values, color=[_colour(record) for record in records])
    for place, value in enumerate(values):
        axes.text(value, place, f" {form.format(value)}", va="center")
    axes.set_xlim(0, 1.15 * max(*values, 1e-9))


def _name_rows(axes: "Axes", names: Sequence[str], title: str) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.6)
    axes.set_title(title, loc="left", fontsize=10)


def _colour(record: Record) -> str:
    return _OURS if record.variant in OURS else _BASELINES
