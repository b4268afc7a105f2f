"""Run folder -> ``report.html``: one page with its charts, tables and samples. What a run lacks is left out."""

import dataclasses
import io
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from erd_fast import page
from erd_fast.errors import RunError
from erd_fast.files import read_json, write_text
from erd_fast.training.build import make_process
from erd_fast.training.config import RunConfig, load_config
from erd_fast.training.metrics import read_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STRIP_WIDTH = 662  # pixels: ten tiles of 64 and their gaps
_MOST_POINTS = 400  # of a curve; longer ones show means of neighbouring log lines
_MEANINGS = {
    "step": "optimizer steps taken",
    "images": "images trained on, repeats counted",
    "loss": "training loss, weighted by w(t), mean over the last log interval",
    "grad_norm": "global norm of the last step's gradients, before clipping",
    "skipped": "steps of the whole run that were not taken: their gradients were not finite",
    "loss_scale": "factor of the float16 loss",
    "loss_by_t": "unweighted loss in equal ranges of t/T, last log interval; bin 1 has the least noise",
    "lr": "learning rate of the last step",
    "images_per_sec": "speed in the last log interval, without previews, evaluations and checkpoints",
    "step_ms": "milliseconds a step in the last log interval",
    "tflops": "model TFLOP/s: three forward passes an image, no credit for recomputation",
    "mfu": "tflops as a share of the GPU's datasheet bf16 peak",
    "data_wait_pct": "per cent of the time spent waiting for data",
    "max_reserved_gib": "most GPU memory reserved at once, GiB",
    "class_accuracy": "share of samples that a small classifier, the judge, puts in the class asked for",
    "fd_classifier": "Fréchet distance in the judge's features; no FID, compares only on the same data",
    "judge_holdout_accuracy": "what the judge itself reaches on unseen real images",
    "world_size": "processes that trained together",
    "local_batch": "images of a step in one process",
}
_HEADLINES = {
    "class_accuracy": "class accuracy",
    "fd_classifier": "classifier Fréchet distance (no FID)",
    "loss": "loss",
    "images_per_sec": "images per second",
}
# metric: title, unit, note, and the least top of an axis from 0; None for one that may be logarithmic
_CURVES = {
    "loss": ("Loss", "loss", "Weighted by w(t), mean of each log interval.", None),
    "grad_norm": ("Gradient norm", "norm", "Over all parameters, before clipping.", None),
    "images_per_sec": ("Training speed", "images/s", "Without previews, evaluations and checkpoints.", 0.0),
    "data_wait_pct": ("Data wait", "% of time", "Time that steps waited for their batch.", 1.0),
}
_EVENTS = {
    "resume": "resumed from the checkpoint of this step",
    "end": "finished",
    "skipped": "no step was taken since the last line",
}


@dataclasses.dataclass(frozen=True)
class _Run:
    """What a run folder holds."""

    name: str
    config: RunConfig
    lines: list[dict[str, Any]]
    events: list[dict[str, Any]]
    metrics: dict[str, Any]
    samples: list[tuple[int, bytes]]  # (step, PNG file), by step


def write_report(folder: Path) -> Path:
    """Write ``folder/report.html`` from the run's configuration, log, metrics and samples. Returns its path.

    Raises:
        RunError: the folder holds no run, or may not be written to.
        ConfigError: its config.yaml is not one that this version reads.
        DataError: its metrics.json is damaged.
    """
    path = folder / "report.html"
    write_text(path, _page(_read(folder)))
    return path


def _read(folder: Path) -> _Run:
    if not (folder / "config.yaml").is_file():
        what = "holds no run (no config.yaml)" if folder.is_dir() else "is not a folder"
        raise RunError(f"{folder} {what}; name a folder that training wrote, such as runs/digits")
    log, stored = read_log(folder / "log.jsonl"), folder / "metrics.json"
    lines = [line for line in log if "event" not in line]
    last = {name: line[name] for line in lines for name in line}
    return _Run(
        name=folder.resolve().name,
        config=load_config(folder / "config.yaml"),
        lines=lines,
        events=[line for line in log if "event" in line],
        metrics=read_json(stored) if stored.is_file() else last,
        samples=_samples(folder / "samples"),
    )


def _samples(folder: Path) -> list[tuple[int, bytes]]:
    """The previews by step, without files that are not whole."""
    found = []
    for path in folder.glob("step-*.png"):
        step, png = re.fullmatch(r"step-(\d+)", path.stem), path.read_bytes()
        if step and png.startswith(b"\x89PNG\r\n\x1a\n") and png[-8:-4] == b"IEND":
            found.append((int(step[1]), png))
    return sorted(found)


def _page(run: _Run) -> str:
    smoothed = "Each point is the mean of several log lines." if len(run.lines) > _MOST_POINTS else ""
    parts = [
        _header(run),
        _tiles(run),
        page.section("Samples", _final_samples(run)),
        page.section("Training", page.grid(_curve_chart(run, "loss"), _curve_chart(run, "grad_norm")), smoothed),
        page.section("Noise levels", page.grid(_loss_by_t_chart(run), _weight_chart(run))),
        page.section("Samples over training", _sample_strip(run), "The same noise and labels each time."),
        page.section("Speed", page.grid(_curve_chart(run, "images_per_sec"), _curve_chart(run, "data_wait_pct"))),
        page.section("Metrics", _metrics_table(run), "The last value of each."),
        page.section("Events", _events_table(run)),
        page.section("Configuration", _config_tables(run)),
    ]
    return page.page(f"{run.name} · {run.config.model.name}", parts)


def _header(run: _Run) -> str:
    given, data = run.config.diffusion, run.config.data.path or "No data set"
    summary = f"{data}: {given.target} target, {given.schedule} schedule, {given.weighting} weighting"
    return page.header(run.name, run.config.model.name, summary)


def _tiles(run: _Run) -> str:
    """The headline figures."""
    metrics = run.metrics
    numbers = {name: metrics[name] for name in _HEADLINES if isinstance(metrics.get(name), int | float)}
    tiles = {_HEADLINES[name]: page.number(value) for name, value in numbers.items()}
    if "class_accuracy" in numbers:
        tiles["class accuracy"] = f"{100 * numbers['class_accuracy']:.1f} %"
    steps = max((line.get("step", 0) for line in [*run.lines, *run.events, metrics]), default=0)
    if steps:
        tiles[f"of {run.config.train.steps:,} steps"] = page.number(steps)
    return page.tiles(tiles)


def _final_samples(run: _Run) -> str:
    how = f", {run.config.eval.sampler_steps} Heun steps, guidance scale {run.config.eval.cfg_scale:g}"
    return page.lines(_picture(step, png, how) for step, png in run.samples[-1:])


def _sample_strip(run: _Run) -> str:
    if len(run.samples) < 2:
        return ""
    pictures = page.lines(_picture(step, _narrow(png)) for step, png in run.samples)
    return f'<div class="strip">\n{pictures}\n</div>'


def _narrow(png: bytes) -> bytes:
    """A picture of the strip. Grids of 256 x 256 images have megabytes each; those of small images stay as they are."""
    with Image.open(io.BytesIO(png)) as image:
        if image.width <= _STRIP_WIDTH:
            return png
        file = io.BytesIO()
        height = image.height * _STRIP_WIDTH // image.width
        image.resize((_STRIP_WIDTH, height), Image.Resampling.BOX).save(file, "png")
        return file.getvalue()


def _picture(step: int, png: bytes, more: str = "") -> str:
    return page.picture(png, f"Grid of samples at step {step:,}", f"step {step:,}{more}", magnify=True)


def _curve_chart(run: _Run, metric: str) -> str:
    found = [(line["step"], line[metric]) for line in run.lines if isinstance(line.get(metric), int | float)]
    if not found:
        return ""
    title, unit, note, least_top = _CURVES[metric]
    (first, begin), (last, end) = found[0], found[-1]
    steps, values = _thin(np.array(found, dtype=np.float64)).T

    def draw(axes: "Axes") -> None:
        axes.plot(steps, values, color=page.ACCENT)
        _step_axes(axes, unit, least_top)

    alt = f"{title}, {unit}: {page.number(begin)} at step {first:,}, {page.number(end)} at step {last:,}."
    return page.chart(metric, title, note, alt, draw)


def _loss_by_t_chart(run: _Run) -> str:
    rows = [(line["step"], *line["loss_by_t"]) for line in run.lines if line.get("loss_by_t")]
    if not rows:
        return ""
    steps, *curves = _thin(np.array(rows, dtype=np.float64)).T  # None, an empty bin, becomes NaN
    bins = len(curves)

    def draw(axes: "Axes") -> None:
        from matplotlib.colors import LinearSegmentedColormap

        colours = LinearSegmentedColormap.from_list("noise", page.NOISE_COLOURS)(np.linspace(0, 1, bins))
        for number, (curve, colour) in enumerate(zip(curves, colours, strict=True)):
            label = f"{number + 1}: {number / bins:.2g} to {(number + 1) / bins:.2g}"
            found = ~np.isnan(curve)
            axes.plot(steps[found], curve[found], color=tuple(colour), label=label)
        _step_axes(axes, "unweighted loss", None)
        axes.figure.legend(title="bin: t/T", loc="outside right center", fontsize=7.5, title_fontsize=7.5)

    last, *ends = rows[-1]
    alt = f"Unweighted loss by noise level over training; bins 1 to {bins} at step {last:,}: {page.text(ends)}."
    note = f"Unweighted; bin 1 has the least noise, bin {bins} the most."
    return page.chart("loss_by_t", "Loss by noise level", note, alt, draw)


def _weight_chart(run: _Run) -> str:
    given = run.config.diffusion
    with warnings.catch_warnings(action="ignore"):  # training gave them
        process = make_process(run.config)
    schedule = process.schedule
    shown = np.linspace(0, len(schedule) - 1, 200).round().astype(int)
    time, weight = (shown + 0.5 * (not schedule.discrete)) / len(schedule), process.weight.numpy()[shown]

    def draw(axes: "Axes") -> None:
        axes.plot(time, weight, color=page.ACCENT, label=given.weighting)
        if process.density is not None:
            axes.plot(time, process.density[shown] * len(schedule), color=page.INK, label="density of t")
        axes.plot([0, 1], [1, 1], color=page.MUTED, linestyle="--", label="constant 1")
        axes.set(xlabel="t/T (0: data, 1: noise)", ylabel="weight w(t)", xlim=(0, 1), ylim=(0, None))
        axes.legend()

    alt = f"Weight {given.weighting}, least to most noise: {page.text(weight[[0, 50, 100, 149, 199]].tolist())}."
    note = f"For target {given.target}, schedule {given.schedule}, normalize {given.normalize}, t {given.t_sampler}."
    return page.chart("weight", "Loss weighting", note, alt, draw)


def _step_axes(axes: "Axes", ylabel: str, least_top: float | None) -> None:
    """Steps, and values from 0 to ``least_top`` or more; None: logarithmic if they span a factor of 10."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set(xlabel="step", ylabel=ylabel)
    for line in axes.lines:
        line.set_marker("o" if np.size(line.get_xdata()) <= 40 else "")
    axes.locator_params(axis="x", nbins=5, integer=True)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    low, high = axes.dataLim.y0, axes.dataLim.y1
    if least_top is not None:
        axes.set_ylim(0, max(least_top, 1.1 * high) or 1.0)
    elif 0 < 10 * low < high:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 1e3 * low else (1.0,)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _thin(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """At most _MOST_POINTS rows: means of equally many neighbours, without the oldest that fill no group."""
    group = -(-len(rows) // _MOST_POINTS)
    groups = rows[len(rows) % group :].reshape(-1, group, rows.shape[1])
    return np.ma.masked_invalid(groups).mean(axis=1).filled(np.nan)


def _metrics_table(run: _Run) -> str:
    rows = [(name, page.text(value), _MEANINGS.get(name, "")) for name, value in run.metrics.items()]
    return f'<div class="metrics">{page.table(rows, "Metric", "Value", "Meaning")}</div>' if rows else ""


def _events_table(run: _Run) -> str:
    events = ((event["event"], event.get("step")) for event in run.events)
    return page.table([(f"step {page.text(step)}", _EVENTS.get(event, str(event))) for event, step in events])


def _config_tables(run: _Run) -> str:
    """A table for each section, with names as the command line takes them."""
    sections: dict[str, list[tuple[str, ...]]] = {}
    for name, value in run.config.flat().items():
        text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        shown = "not set" if value in (None, "") else text
        sections.setdefault(name.split(".")[0], []).append((name, shown))
    return f'<div class="config">\n{page.lines(map(page.table, sections.values()))}\n</div>'
