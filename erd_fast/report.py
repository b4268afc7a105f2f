"""Run folder -> ``report.html``: one page with its pictures in it, to read offline, send or keep.

It needs no network and no script. Charts are SVG whose colours are CSS variables, which follow the reader's
light or dark setting; sample grids are the run's PNG files, byte for byte. What a run lacks is left out.
"""

import base64
import dataclasses
import html
import io
import platform
import re
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

import erd_fast
from erd_fast.diffusion import get_schedule, resolve_target, weight_table
from erd_fast.errors import RunError
from erd_fast.files import read_json, write_text
from erd_fast.training.config import RunConfig, load_config
from erd_fast.training.metrics import read_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_POINTS = 400  # of a curve; longer ones show means of neighbouring log lines
_MEANINGS = {
    "step": "optimizer steps taken",
    "images": "images trained on, repeats counted",
    "loss": "training loss, weighted by w(t), mean over the last log interval",
    "grad_norm": "global norm of the last step's gradients, before clipping",
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
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_EVENTS = {"resume": "resumed from the checkpoint of this step", "end": "finished"}

# Colours that charts are drawn in, and the CSS variables that take their place.
_INK, _MUTED, _GRID, _ACCENT = "#010101", "#020202", "#030303", "#040404"
_VARIABLES = {_INK: "var(--ink)", _MUTED: "var(--muted)", _GRID: "var(--rule)", _ACCENT: "var(--accent)"}
_BIN_COLOURS = ("#2b83c6", "#9274c8", "#d8634a", "#d99a2b")  # least to most noise; on white and on black
_STYLE: dict[str, Any] = {
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _MUTED),
    **dict.fromkeys(("axes.spines.right", "axes.spines.top", "legend.frameon"), False),
    **{"axes.grid": True, "grid.color": _GRID, "grid.linewidth": 0.6, "text.color": _INK},
    **{"font.size": 8.5, "lines.linewidth": 1.4, "lines.markersize": 2.2, "svg.fonttype": "none"},
}
_CSS = """
:root { color-scheme: light dark; --page: #fcfcfa; --card: #f3f2ee; --ink: #1d1f22; --muted: #62676e;
  --rule: #dddbd5; --accent: #2468ad; }
@media (prefers-color-scheme: dark) { :root { --page: #15171a; --card: #1e2125; --ink: #e8e6e1;
  --muted: #a0a5ac; --rule: #353a40; --accent: #76b0ee; } }
* { box-sizing: border-box; overflow-wrap: anywhere; }
body { margin: 0 auto; max-width: 1100px; padding: 2.5rem 1.25rem 3rem; background: var(--page);
  color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0; } h1 span { color: var(--muted); font-weight: 400; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 3rem 0 1rem; } p { margin: .4rem 0 0; }
h2, footer { padding-top: .75rem; border-top: 1px solid var(--rule); } footer { margin-top: 3rem; }
.note, figcaption, footer { color: var(--muted); font-size: .875rem; } .note { margin: -.6rem 0 1rem; }
.tiles, .grid, .strip { display: grid; gap: 2rem 2.5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); }
.strip { gap: 1.25rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); }
.tiles { gap: .75rem; margin: 1.75rem 0 0; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); }
.tiles div { display: flex; flex-direction: column-reverse; justify-content: flex-end; padding: .8rem 1rem;
  background: var(--card); border-radius: 8px; }
.tiles dt, .metrics td:last-child, thead th { color: var(--muted); } .tiles dt { font-size: .8125rem; }
.tiles dd { margin: 0; font-size: 1.6rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
figure { margin: 0; min-width: 0; } figcaption strong { display: block; color: var(--ink); font-size: 1rem; }
svg, img { display: block; width: 100%; height: auto; margin: .4rem 0; stroke-linejoin: round; }
img { image-rendering: pixelated; border-radius: 4px; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .3rem 1rem .3rem 0; font-weight: 400; }
tr { border-bottom: 1px solid var(--rule); } tbody th { width: 14rem; white-space: nowrap; }
.metrics tbody th, .config th { font: .8125rem/1.6 ui-monospace, Menlo, Consolas, monospace; }
.config { columns: 26rem 2; column-gap: 2.5rem; } .config table { break-inside: avoid; margin: 0 0 1rem; }
@media (max-width: 600px) { body { padding: 1.5rem 1rem 2rem; } thead { display: none; }
  .metrics tr { display: grid; grid-template-columns: auto 1fr; gap: 0 1rem; padding: .35rem 0; }
  .metrics th, .metrics td { padding: 0; }
  .metrics td:last-child { grid-column: 1 / -1; } .metrics td:nth-child(2) { text-align: right; } }
"""


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
    title = html.escape(f"{run.name} · {run.config.model.name}")
    smoothed = "Each point is the mean of several log lines." if len(run.lines) > _MOST_POINTS else ""
    sections = [
        _header(run),
        _tiles(run),
        _section("Samples", _final_samples(run)),
        _section("Training", _grid(_curve_chart(run, "loss"), _curve_chart(run, "grad_norm")), smoothed),
        _section("Noise levels", _grid(_loss_by_t_chart(run), _weight_chart(run))),
        _section("Samples over training", _sample_strip(run), "The same noise and labels each time."),
        _section("Speed", _grid(_curve_chart(run, "images_per_sec"), _curve_chart(run, "data_wait_pct"))),
        _section("Metrics", _metrics_table(run), "The last value of each."),
        _section("Events", _events_table(run)),
        _section("Configuration", _config_tables(run)),
        _footer(),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_CSS}</style>\n</head>\n"
        f"<body>\n{_lines(sections)}\n</body>\n</html>\n"
    )


def _lines(parts: Iterable[str]) -> str:
    return "\n".join(part for part in parts if part)


def _section(title: str, body: str, note: str = "") -> str:
    note = f'<p class="note">{note}</p>' if note else ""
    return _lines(["<section>", f"<h2>{title}</h2>", note, body, "</section>"]) if body else ""


def _grid(*charts: str) -> str:
    return f'<div class="grid">\n{_lines(charts)}\n</div>' if any(charts) else ""


def _header(run: _Run) -> str:
    given, data = run.config.diffusion, run.config.data.path or "No data set"
    summary = f"{data}: {given.target} target, {given.schedule} schedule, {given.weighting} weighting"
    name, model = html.escape(run.name), html.escape(run.config.model.name)
    return f"<header>\n<h1>{name} <span>{model}</span></h1>\n<p>{html.escape(summary)}</p>\n</header>"


def _tiles(run: _Run) -> str:
    """The headline figures."""
    metrics = run.metrics
    numbers = {name: metrics[name] for name in _HEADLINES if isinstance(metrics.get(name), int | float)}
    tiles = {_HEADLINES[name]: _number(value) for name, value in numbers.items()}
    if "class_accuracy" in numbers:
        tiles["class accuracy"] = f"{100 * numbers['class_accuracy']:.1f} %"
    steps = max((line.get("step", 0) for line in [*run.lines, *run.events, metrics]), default=0)
    if steps:
        tiles[f"of {run.config.train.steps:,} steps"] = _number(steps)
    rows = _lines(f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in tiles.items())
    return f'<dl class="tiles">\n{rows}\n</dl>' if tiles else ""


def _final_samples(run: _Run) -> str:
    how = f", {run.config.eval.sampler_steps} Heun steps, guidance scale {run.config.eval.cfg_scale:g}"
    return _lines(_picture(step, png, how) for step, png in run.samples[-1:])


def _sample_strip(run: _Run) -> str:
    pictures = _lines(_picture(step, png) for step, png in run.samples)
    return f'<div class="strip">\n{pictures}\n</div>' if len(run.samples) > 1 else ""


def _picture(step: int, png: bytes, more: str = "") -> str:
    """At most a whole multiple of the picture's own size, so that all its pixels are equally large."""
    width, height = struct.unpack(">II", png[16:24])
    size = f'width="{width}" height="{height}" style="max-width: {width * max(1, 1060 // width)}px"'
    source = "data:image/png;base64," + base64.b64encode(png).decode()
    image = f'<img src="{source}" {size} alt="Grid of samples at step {step:,}">'
    return f"<figure>{image}<figcaption>step {step:,}{more}</figcaption></figure>"


def _curve_chart(run: _Run, metric: str) -> str:
    found = [(line["step"], line[metric]) for line in run.lines if isinstance(line.get(metric), int | float)]
    if not found:
        return ""
    title, unit, note, least_top = _CURVES[metric]
    (first, begin), (last, end) = found[0], found[-1]
    steps, values = _thin(np.array(found, dtype=np.float64)).T

    def draw(axes: "Axes") -> None:
        axes.plot(steps, values, color=_ACCENT)
        _step_axes(axes, unit, least_top)

    alt = f"{title}, {unit}: {_number(begin)} at step {first:,}, {_number(end)} at step {last:,}."
    return _chart(metric, title, note, alt, draw)


def _loss_by_t_chart(run: _Run) -> str:
    rows = [(line["step"], *line["loss_by_t"]) for line in run.lines if line.get("loss_by_t")]
    if not rows:
        return ""
    steps, *curves = _thin(np.array(rows, dtype=np.float64)).T  # None, an empty bin, becomes NaN
    bins = len(curves)

    def draw(axes: "Axes") -> None:
        from matplotlib.colors import LinearSegmentedColormap

        colours = LinearSegmentedColormap.from_list("noise", _BIN_COLOURS)(np.linspace(0, 1, bins))
        for number, (curve, colour) in enumerate(zip(curves, colours, strict=True)):
            label = f"{number + 1}: {number / bins:.2g} to {(number + 1) / bins:.2g}"
            found = ~np.isnan(curve)
            axes.plot(steps[found], curve[found], color=tuple(colour), label=label)
        _step_axes(axes, "unweighted loss", None)
        axes.figure.legend(title="bin: t/T", loc="outside right center", fontsize=7.5, title_fontsize=7.5)

    last, *ends = rows[-1]
    alt = f"Unweighted loss by noise level over training; bins 1 to {bins} at step {last:,}: {_text(ends)}."
    note = f"Unweighted; bin 1 has the least noise, bin {bins} the most."
    return _chart("loss_by_t", "Loss by noise level", note, alt, draw)


def _weight_chart(run: _Run) -> str:
    given = run.config.diffusion
    schedule = get_schedule(given.schedule)
    table = weight_table(given.weighting, resolve_target(given.target), schedule, given.normalize)
    shown = np.linspace(0, len(schedule) - 1, 200).round().astype(int)
    time, weight = (shown + 0.5 * (not schedule.discrete)) / len(schedule), table[shown]

    def draw(axes: "Axes") -> None:
        axes.plot(time, weight, color=_ACCENT, label=given.weighting)
        axes.plot([0, 1], [1, 1], color=_MUTED, linestyle="--", label="constant 1")
        axes.set(xlabel="t/T (0: data, 1: noise)", ylabel="weight w(t)", xlim=(0, 1), ylim=(0, None))
        axes.legend()

    alt = f"Weight {given.weighting}, least to most noise: {_text(weight[[0, 50, 100, 149, 199]].tolist())}."
    note = f"For target {given.target}, schedule {given.schedule}, normalize {given.normalize}."
    return _chart("weight", "Loss weighting", note, alt, draw)


def _chart(name: str, title: str, note: str, alt: str, draw: Callable[["Axes"], None]) -> str:
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context(_STYLE | {"svg.hashsalt": name}, after_reset=True):
        figure = Figure(figsize=(4.7, 2.8), layout="constrained")
        draw(figure.subplots())
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
    caption = f"<figcaption><strong>{title}</strong>{html.escape(note)}</figcaption>"
    return f"<figure>{caption}{_inline(file.getvalue(), name, html.escape(alt))}</figure>"


def _inline(svg: str, name: str, label: str) -> str:
    """Matplotlib's SVG file as an element of a page: own identifiers, the page's font and colours, label."""
    svg = re.sub(r"^.*?(?=<svg)|<metadata>.*?</metadata>\s*|<style.*?</style>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r' font-family: [^;"]*;| xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


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
        axes.set_ylim(0, max(least_top, 1.1 * high))
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
    rows = [(name, _text(value), _MEANINGS.get(name, "")) for name, value in run.metrics.items()]
    return f'<div class="metrics">{_table(rows, "Metric", "Value", "Meaning")}</div>' if rows else ""


def _events_table(run: _Run) -> str:
    events = ((event["event"], event.get("step")) for event in run.events)
    return _table([(f"step {_text(step)}", _EVENTS.get(event, str(event))) for event, step in events])


def _config_tables(run: _Run) -> str:
    """A table for each section, with names as the command line takes them."""
    sections: dict[str, list[tuple[str, ...]]] = {}
    for name, value in run.config.flat().items():
        text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        shown = "not set" if value in (None, "") else text
        sections.setdefault(name.split(".")[0], []).append((name, shown))
    return f'<div class="config">\n{_lines(map(_table, sections.values()))}\n</div>'


def _table(rows: Sequence[tuple[str, ...]], *titles: str) -> str:
    """Rows of plain text; the first cell names its row."""
    head = "".join(f'<th scope="col">{title}</th>' for title in titles)
    body = []
    for name, *cells in rows:
        data = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        body.append(f'<tr><th scope="row">{html.escape(name)}</th>{data}</tr>')
    head = f"<thead><tr>{head}</tr></thead>" if titles else ""
    return f"<table>{head}<tbody>\n{_lines(body)}\n</tbody></table>" if rows else ""


def _footer() -> str:
    import matplotlib

    versions = {"erd-fast": erd_fast, "PyTorch": torch, "Matplotlib": matplotlib}
    text = ", ".join(f"{name} {module.__version__}" for name, module in versions.items())
    return f"<footer>Written with {html.escape(text)}, Python {platform.python_version()}.</footer>"


def _number(value: float) -> str:
    """Four significant digits; whole numbers and large ones with their thousands separated."""
    return f"{value:,.0f}" if isinstance(value, int) or 1000 <= abs(value) < 1e15 else f"{value:.4g}"


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_text(item) for item in value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _number(value)
    return "none" if value is None else str(value)
