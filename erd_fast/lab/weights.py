"""Every weighting rule on every target and schedule, as pictures and tables (docs/math.md C, D).

A weight can be looked at in three ways, and the same rule looks different in each:

- *raw*: w(t), mean 1, what multiplies the squared error of the target;
- *in x0-space*: w D^2 / sigma^2, what it amounts to on the squared error of the x0 estimate, so that targets compare;
- *effort*: M(lambda) = w p |dt / d lambda|, the density of training effort over log-SNR.
"""

import csv
import dataclasses
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from erd_fast import page
from erd_fast.diffusion import RULES, SCHEDULES, TARGETS, Schedule, get_schedule, is_derived, loss_factor, weight_table
from erd_fast.diffusion.schedule import Array
from erd_fast.files import make_folder, write_bytes
from erd_fast.lab.identities import Identity, measure_identities

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_POINTS = 101  # of a curve in curves.csv
_POINTS_DRAWN = 401
_LOG_SNR_SHOWN = 12.0
_QUANTILES = (0.05, 0.5, 0.95)
# A colour for each family of rules; its members differ in their dashes.
_STYLES: dict[str, tuple[str, Any, float]] = {
    "constant": ("#202020", (0, (5, 2)), 1.4),
    "erd": ("#1664c0", "solid", 2.6),
    "min_snr": ("#2e9958", "solid", 1.2),
    "max_snr": ("#2e9958", "dashed", 1.2),
    "soft_min_snr": ("#2e9958", "dotted", 1.4),
    "p2": ("#e08a1e", "solid", 1.2),
    "debias": ("#cc3d3d", "solid", 1.2),
    "min_debias": ("#cc3d3d", "dashed", 1.2),
    "max_debias": ("#cc3d3d", "dotted", 1.4),
    "snr": ("#8656c0", "solid", 1.2),
    "inv_snr": ("#8656c0", "dashed", 1.2),
    "trunc_snr": ("#8656c0", "dotted", 1.4),
    "sigma_sqrt": ("#8c6239", "solid", 1.2),
    "cosmap": ("#8c6239", "dashed", 1.2),
    "sit_velocity": ("#3aa6b5", "solid", 1.2),
    "sit_likelihood": ("#3aa6b5", "dashed", 1.2),
}


@dataclasses.dataclass(frozen=True)
class Weighting:
    """One rule on one target and schedule, on the schedule's grid; each array is (K,)."""

    schedule: Schedule
    target: str
    rule: str
    mean: float
    """Z, the mean of the bare rule over uniform t."""
    weight: Array
    """w(t), mean 1."""
    weight_x0: Array
    """w D^2 / sigma^2."""
    effort: Array
    """M(lambda), with integral 1."""

    @property
    def derived(self) -> bool:
        return is_derived(self.rule, self.target)

    def log_snr_quantiles(self) -> list[float]:
        """Log-SNR above which 5, 50 and 95 per cent of the effort lie."""
        share = np.cumsum(self.weight) / self.weight.sum()
        return [float(self.schedule.log_snr[np.searchsorted(share, q)]) for q in _QUANTILES]


def weightings(schedule: Schedule) -> Iterator[Weighting]:
    """Every rule on every target, on this schedule, with the rules' own parameters."""
    slopes: dict[str, Any] = {"d_alpha": schedule.d_alpha, "d_sigma": schedule.d_sigma}
    for target in TARGETS:
        factor = loss_factor("x0", target, schedule.alpha, schedule.sigma, **slopes)
        for rule in RULES:
            bare = weight_table(rule, target, schedule, "none")
            weight = bare / bare.mean()
            effort = weight / np.abs(schedule.d_log_snr)
            yield Weighting(schedule, target, rule, float(bare.mean()), weight, weight * factor, effort)


def write_weights(folder: Path) -> list[Path]:
    """Write ``weights.html``, a picture for each schedule, ``weights.csv`` and ``curves.csv`` into ``folder``.

    ``weights.csv`` has a row for each combination: form (published or derived), Z, smallest and largest weight, and the
    log-SNR above which 5, 50 and 95 % of the effort lie. ``curves.csv`` has the three views at up to 101 times.

    Returns:
        The files' paths, the page first.

    Raises:
        RunError: the folder may not be written to.
    """
    make_folder(folder)
    everything = {name: list(weightings(get_schedule(name))) for name in SCHEDULES}
    pictures = {name: _picture(found) for name, found in tqdm(everything.items(), "drawing", disable=None)}
    rows = [found for group in everything.values() for found in group]
    files = {
        "weights.html": _html(everything, pictures, measure_identities()).encode(),
        **{f"{name}.png": picture for name, picture in pictures.items()},
        "weights.csv": _csv(_SUMMARY, map(_summary, rows)),
        "curves.csv": _csv(_CURVES, (line for row in rows for line in _curve(row))),
    }
    for name, content in files.items():
        write_bytes(folder / name, content)
    return [folder / name for name in files]


_SUMMARY = (
    "schedule",
    "target",
    "rule",
    "form",
    "mean",
    "smallest",
    "largest",
    "log_snr_5",
    "log_snr_50",
    "log_snr_95",
)
_CURVES = ("schedule", "target", "rule", "t", "log_snr", "weight", "weight_x0", "effort")


def _summary(found: Weighting) -> tuple[Any, ...]:
    form = "derived" if found.derived else "published"
    numbers = (found.mean, found.weight.min(), found.weight.max(), *found.log_snr_quantiles())
    return found.schedule.name, found.target, found.rule, form, *(f"{number:.6g}" for number in numbers)


def _curve(found: Weighting) -> Iterator[tuple[Any, ...]]:
    schedule = found.schedule
    time, log_snr = _unit_time(schedule), schedule.log_snr
    for at in np.unique(np.linspace(0, len(schedule) - 1, _POINTS).round().astype(int)):
        numbers = (time[at], log_snr[at], found.weight[at], found.weight_x0[at], found.effort[at])
        yield schedule.name, found.target, found.rule, *(f"{number:.6g}" for number in numbers)


def _csv(titles: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(titles)
    writer.writerows(rows)
    return text.getvalue().encode()


def _unit_time(schedule: Schedule) -> Array:
    return (np.arange(len(schedule)) + 0.5) / len(schedule)


def _picture(found: list[Weighting]) -> bytes:
    """A row for each target; its weights raw over t, in x0-space over log-SNR, and the effort over log-SNR."""
    import matplotlib.style
    from matplotlib.figure import Figure

    schedule = found[0].schedule
    by_time = np.unique(np.linspace(0, len(schedule) - 1, _POINTS_DRAWN).round().astype(int))
    wanted = np.linspace(_LOG_SNR_SHOWN, -_LOG_SNR_SHOWN, _POINTS_DRAWN)
    by_snr = np.unique(np.searchsorted(-schedule.log_snr, -wanted).clip(0, len(schedule) - 1))
    with matplotlib.style.context({"font.size": 9, "axes.grid": True, "grid.color": "#e4e4e0"}, after_reset=True):
        figure = Figure(figsize=(13, 3.1 * len(TARGETS)), layout="constrained")
        grid = figure.subplots(len(TARGETS), 3)
        for row, target in zip(grid, TARGETS, strict=True):
            mine = [weighting for weighting in found if weighting.target == target]
            _lines(row[0], mine, _unit_time(schedule)[by_time], "weight", by_time)
            _lines(row[1], mine, schedule.log_snr[by_snr], "weight_x0", by_snr)
            _lines(row[2], mine, schedule.log_snr[by_snr], "effort", by_snr)
            row[0].set(title=f"target {target}: weight, mean 1", xlabel="t", xlim=(0, 1))
            row[1].set(title=f"target {target}: in x0-space", xlabel="log-SNR")
            row[2].set(title=f"target {target}: effort over log-SNR", xlabel="log-SNR", yscale="linear")
            row[2].set_ylim(
                0,
                2.0
                * max(weighting.effort[by_snr].max() for weighting in mine if weighting.rule in ("constant", "erd")),
            )
            for axes in row[:2]:
                _limit_decades(axes)
            for axes in row[1:]:
                axes.set_xlim(_LOG_SNR_SHOWN, -_LOG_SNR_SHOWN)
        handles = grid[0, 0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=8, frameon=False)
        figure.suptitle(f"Schedule {schedule.name}: data on the left, noise on the right", fontsize=12)
        drawn, file = io.BytesIO(), io.BytesIO()
        figure.savefig(drawn, format="png", dpi=100)
    # 128 colours are enough for lines, and a quarter of the bytes.
    Image.open(drawn).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(file, format="png", optimize=True)
    return file.getvalue()


def _lines(axes: "Axes", found: list[Weighting], x: Array, view: str, rows: Array) -> None:
    # ERD last: it lies on top of what it equals.
    for weighting in sorted(found, key=lambda weighting: weighting.rule == "erd"):
        colour, dashes, width = _STYLES[weighting.rule]
        y = getattr(weighting, view)[rows]
        axes.plot(x, y, color=colour, linestyle=dashes, linewidth=width, label=weighting.rule)
    axes.set_yscale("log")


def _limit_decades(axes: "Axes") -> None:
    """Eight decades at most, around 1: some rules span twenty."""
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 1e-4), min(high, 1e4))


_INTRODUCTION = (
    "A weight multiplies the squared error of what the model predicts, so one objective has another weight for each "
    "target. The pictures show every rule with its default parameters: the weight itself, with mean 1 over t; what it "
    "amounts to on the squared error of the x0 estimate, where targets compare; and the effort it gives each log-SNR, "
    "as a density. Curves are cut at 0.0001 and 10,000, and efforts at twice those of constant and erd."
)
_IDENTITIES = "Both sides are computed on the schedules named, and differ by rounding alone."
_RULES = (
    "Log-SNR above which half of the effort lies (5 % and 95 % of it), and the largest weight over its mean. "
    "* derived: not published for this target, carried over from the rule's form on x0 or eps."
)


def _html(everything: dict[str, list[Weighting]], pictures: dict[str, bytes], identities: list[Identity]) -> str:
    named = [
        (found.statement, f"{found.difference:.2g} on {', '.join(found.schedules)}", found.consequence)
        for found in identities
    ]
    table = page.table(named, "Identity", "Largest difference", "What it means")
    parts = [page.section("What is the same", table, _IDENTITIES)]
    for name, found in everything.items():
        picture = page.picture(
            pictures[name], f"Weight, weight in x0-space and effort of every rule on schedule {name}"
        )
        parts.append(page.section(f"Schedule {name}", page.lines([picture, _rules_table(found)]), _RULES))
    return page.page("Loss weightings", [page.header("Loss weightings", summary=_INTRODUCTION), *parts])


def _rules_table(found: list[Weighting]) -> str:
    cells = {(weighting.rule, weighting.target): _cell(weighting) for weighting in found}
    return page.table([(rule, *(cells[rule, target] for target in TARGETS)) for rule in RULES], "Rule", *TARGETS)


def _cell(found: Weighting) -> str:
    high, median, low = (f"{level:.1f}".replace("-0.0", "0.0") for level in found.log_snr_quantiles())
    return f"{median} ({high} to {low}), {page.number(found.weight.max())}{'*' if found.derived else ''}"
