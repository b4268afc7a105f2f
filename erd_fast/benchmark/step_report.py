"""Records of whole steps as a table and as a picture: images a second, and how many times ours is faster."""

import io
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from erd_fast.benchmark.records import Record, aligned
from erd_fast.benchmark.step_baselines import RECIPES
from erd_fast.benchmark.step_ours import OURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OURS, _PIECES, _BASELINES = "#1664c0", "#a9c6e8", "#9a9a94"
_LEGEND = {OURS: _OURS, "baselines": _BASELINES, f"{OURS} with one piece changed": _PIECES}
_BAR = 0.28  # inches
_HEAD = 0.7  # inches of a panel's title and axis


def table(records: Iterable[Record]) -> str:
    """A line for each record. ``erd-fast x`` is the rate of ours over that of the line; ``of matmul`` its FLOP/s over
    those of a large product in the same run."""
    found = list(records)
    matmul = next((record.tflops for record in found if record.case == "matmul"), None)
    steps = [record for record in found if record.images_per_sec is not None]
    ours = {(record.group, record.case): record.images_per_sec for record in steps if record.variant == OURS}

    def of_matmul(record: Record) -> str:
        return "" if record.tflops is None or not matmul else f"{record.tflops / matmul:.0%}"

    def times(record: Record) -> str:
        rate, own = record.images_per_sec, ours.get((record.group, record.case))
        return "" if rate is None or own is None else f"{own / rate:.2f}"

    columns: dict[str, Callable[[Record], str]] = {
        "group": lambda record: record.group,
        "case": lambda record: record.case,
        "variant": lambda record: record.variant,
        "N": lambda record: _number(record.batch, "{}"),
        "images/s": lambda record: _number(record.images_per_sec, "{:.4g}"),
        "median": lambda record: _duration(record.median_s),
        "iqr": lambda record: _duration(record.iqr_s),
        "runs": lambda record: str(record.runs),
        "TFLOP/s": lambda record: _number(record.tflops, "{:.3g}"),
        "MFU": lambda record: _number(record.mfu, "{:.1%}"),
        "of matmul": of_matmul,
        "loss off": lambda record: _number(record.loss_off, "{:.1e}"),
        "gradient off": lambda record: _number(record.gradient_off, "{:.1e}"),
        "peak GiB": lambda record: _number(record.peak_bytes and record.peak_bytes / 2**30, "{:.2f}"),
        f"{OURS} x": times,
    }
    lines = [[name, *(write(record) for record in found)] for name, write in columns.items()]
    shown = [column for column in lines if any(column[1:])]  # what none of them has is left out
    backends = [f"{record.case} {record.variant}: {record.backend}" for record in steps if record.backend]
    return "\n".join([aligned([*zip(*shown, strict=True)], names=3), "", "backends", *backends])


def _duration(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 1 else f"{1e3 * seconds:.4g} ms"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def picture(records: Iterable[Record]) -> bytes:
    """A PNG file: a panel for each case, a bar of images a second for each variant with its interquartile range."""
    import matplotlib.style
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    panels: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record.images_per_sec is not None:
            panels.setdefault((record.group, record.case), []).append(record)
    heights = [_HEAD + _BAR * len(found) for found in panels.values()]
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.style.context(style, after_reset=True):
        figure = Figure(figsize=(8, max(sum(heights), 1.0)), layout="constrained")
        if panels:
            grid = figure.subplots(len(panels), squeeze=False, height_ratios=heights)
            for axes, ((group, case), found) in zip(grid[:, 0], panels.items(), strict=True):
                _bars(axes, found)
                axes.set_title(f"{group.removeprefix('step/')}, {case}: images a second", loc="left", fontsize=10)
            handles = [Patch(color=colour, label=label) for label, colour in _LEGEND.items()]
            figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _bars(axes: "Axes", found: Sequence[Record]) -> None:
    rates = [record.images_per_sec or math.nan for record in found]
    places = range(len(found))
    spreads = [rate * record.iqr_s / record.median_s / 2 for record, rate in zip(found, rates, strict=True)]
    colours = [_colour(record.variant) for record in found]
    axes.barh(places, rates, xerr=spreads, color=colours, error_kw={"elinewidth": 0.8, "capsize": 2})
    ends = [rate + spread for rate, spread in zip(rates, spreads, strict=True)]
    for place, record, rate, end in zip(places, found, rates, ends, strict=True):
        batch = f", N={record.batch}" if record.batch else ""
        axes.text(end, place, f" {rate:.4g}{batch}", va="center")
    axes.set_yticks(places, [record.variant for record in found])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * max(ends))


def _colour(variant: str) -> str:
    if variant == OURS:
        return _OURS
    return _BASELINES if variant in (*RECIPES, "apex") else _PIECES
