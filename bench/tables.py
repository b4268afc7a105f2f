"""Write the tables of README.md and docs/ from bench/results/: ``python bench/tables.py``, which ``make bench`` does.

A table stands between ``<!-- table: GROUP -->`` and ``<!-- end -->``, for each machine that measured the group;
``<!-- table: GROUP PART -->`` takes the cases alone whose name contains PART. ``<!-- table: step -->`` has images a
second, of ours and the baselines, of every model whose step was measured; ``<!-- table: data -->`` all of reading
latents. ``<!-- table: models -->`` is that of the models' sizes, which are counted and not measured.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from erd_fast.benchmark.data_variants import BASELINES
from erd_fast.benchmark.step_baselines import RECIPES
from erd_fast.benchmark.step_ours import OURS
from erd_fast.models import MODELS, create_model, model_flops

ROOT = Path(__file__).resolve().parents[1]
REGION = re.compile(r"(<!-- table: (\S+)(?: (.+?))? -->\n)(?s:.*?)(<!-- end -->)")

Results = dict[str, dict[str, Any]]
RATES: dict[str, tuple[str, Callable[[float], str]]] = {
    "GB/s": ("gb_per_s", lambda rate: _short(rate)),
    "of copy": ("gb_per_s", "{:.0%}".format),
    "images/s": ("images_per_sec", lambda rate: _short(rate)),
    "TFLOP/s": ("tflops", lambda rate: _short(rate)),
    "MFU": ("mfu", "{:.1%}".format),
    "gradient off": ("gradient_off", "{:.1e}".format),
    "GiB": ("peak_bytes", lambda count: f"{count / 2**30:.3g}"),
    "GiB eager": ("peak_bytes", lambda count: f"{count / 2**30:.3g}"),
}
"""Columns beside the times: which number of a record, ours if there is one, and how it is written."""


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def read_results(folder: Path = ROOT / "bench" / "results") -> Results:
    """Files with records, by path: ``<machine>/ops.json``."""
    found = {str(file.relative_to(folder)): json.loads(file.read_text()) for file in sorted(folder.glob("*/*.json"))}
    return {path: content for path, content in found.items() if "records" in content}


def render(text: str, results: Results) -> str:
    """The document with its tables as the results have them; the rest stays as it is."""

    def region(match: re.Match[str]) -> str:
        begin, group, part, end = match.groups()
        if group == "models":
            return begin + _models() + end
        wanted = re.compile(rf"{re.escape(part)}(?!\d)" if part else "")  # N=8 is not N=8192
        table = WHOLE.get(group, _step if group.startswith("step/") else _table)
        tables = [table(path, content, group, wanted) for path, content in results.items()]
        return begin + ("\n".join(filter(None, tables)) or "Not measured.\n") + end

    return REGION.sub(region, text)


def _table(path: str, content: dict[str, Any], group: str, part: re.Pattern[str]) -> str:
    """One machine's table, a row for each case and a column for each variant; empty if it has no such case."""
    records = [r for r in content["records"] if r["group"] == group and part.search(r["case"])]
    if not records:
        return ""
    rows: dict[str, dict[str, Any]] = {}
    for record in records:
        rows.setdefault(record["case"], {})[f"{record['variant']} {record['backend']}".strip()] = record
    columns = sorted(dict.fromkeys(name for row in rows.values() for name in row), key=_is_ours)  # baselines first
    copy = next((r["gb_per_s"] for r in content["records"] if r["group"] == "machine" and "gb_per_s" in r), None)
    baselines = [name for name in columns if not _is_ours(name) and _is_ours(columns[-1])]
    rates = [name for name, (key, _) in RATES.items() if any(key in record for record in records)]
    head = ["case", *columns, *(f"x {name}" for name in baselines), *rates]
    lines = [_caption(path, content["machine"]), "", _row(head), _row(["---", *["--:"] * (len(head) - 1)])]
    for case, row in rows.items():
        ours = next((record for name, record in row.items() if _is_ours(name)), None)
        shown = ours or next(iter(row.values()))
        times = [_time(row[name]) if name in row else "" for name in columns]
        speeds = [
            f"{row[name]['median_s'] / ours['median_s']:.2f}" if ours and name in row else "" for name in baselines
        ]
        lines.append(_row([case, *times, *speeds, *(_rate(name, shown, row.get("eager"), copy) for name in rates)]))
    return "\n".join(lines) + "\n"


def _rate(name: str, record: dict[str, Any], eager: dict[str, Any] | None, copy: float | None) -> str:
    """A cell of a column of RATES; empty where the record has no such number."""
    key, write = RATES[name]
    of = eager if name.endswith(" eager") else record
    value = None if of is None else of.get(key)
    if name == "of copy":
        value = None if value is None or not copy else value / copy
    return "" if value is None else write(value)


STEP_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "images/s": lambda record: _short(record["images_per_sec"]),
    "time": lambda record: _time(record),
    "N": lambda record: str(record.get("batch", "")),
    "TFLOP/s": lambda record: _short(record["tflops"]),
    "MFU": lambda record: _share(record.get("mfu")),
    "of matmul": lambda record: _share(record.get("of_matmul")),
    "loss off": lambda record: f"{record['loss_off']:.1e}",
    "gradient off": lambda record: f"{record['gradient_off']:.1e}",
    "GiB": lambda record: f"{record['peak_bytes'] / 2**30:.3g}" if "peak_bytes" in record else "",
}
"""Columns of a step's table, a row for each variant, beside its name and how many times ours is faster."""


def _step(path: str, content: dict[str, Any], group: str, part: re.Pattern[str]) -> str:
    """One machine's tables of one model's step, one for each case."""
    records = [r for r in content["records"] if r["group"] == group and part.search(r["case"])]
    matmul = next((r["tflops"] for r in content["records"] if r["case"] == "matmul"), None)
    tables = []
    for case in dict.fromkeys(record["case"] for record in records):
        rows = {record["variant"]: dict(record) for record in records if record["case"] == case}
        for row in rows.values():
            row |= {"of_matmul": row["tflops"] / matmul} if matmul else {}
        cells = {head: [write(row) for row in rows.values()] for head, write in STEP_COLUMNS.items()}
        cells = {head: column for head, column in cells.items() if any(column)}
        times = [_times(rows.get(OURS), row) for row in rows.values()]
        head = ["variant", f"x {OURS}", *cells]
        lines = [f"{case} on {_caption(path, content['machine'])}", "", _row(head)]
        lines += [_row(["---", *["--:"] * (len(head) - 1)])]
        lines += [_row([*line]) for line in zip(rows, times, *cells.values(), strict=True)]
        if OURS in rows:
            lines += ["", f"`{OURS}` ran on `{rows[OURS]['backend']}`."]
        tables.append("\n".join(lines) + "\n")
    return "\n".join(tables)


def _steps(path: str, content: dict[str, Any], group: str, part: re.Pattern[str]) -> str:
    """One machine's images a second of ours and of the baselines, a row for each case of a step."""
    cases: dict[tuple[str, str], dict[str, Any]] = {}
    for record in content["records"]:
        if record["group"].startswith("step/"):
            cases.setdefault((record["group"], record["case"]), {})[record["variant"]] = record
    names = [name for name in (*RECIPES, "apex") if any(name in rows for rows in cases.values())]
    if not cases:
        return ""
    head = ["model", "batch", *names, OURS, "x the fastest baseline"]
    lines = [_caption(path, content["machine"]), "", _row(head), _row(["---", "---", *["--:"] * (len(head) - 2)])]
    for (model, case), rows in cases.items():
        rates = [_short(rows[name]["images_per_sec"]) if name in rows else "" for name in (*names, OURS)]
        fastest = max((rows[name] for name in names if name in rows), key=lambda r: r["images_per_sec"], default=None)
        lines.append(_row([model.removeprefix("step/"), case, *rates, _times(rows.get(OURS), fastest)]))
    return "\n".join(lines) + "\n"


DATA_COLUMNS: dict[str, tuple[str, str, Callable[[float], str]]] = {
    "latents/s": ("data/read", "latents_per_sec", "{:,.0f}".format),
    "CPU ms per 1000": ("data/read", "cpu_ms_per_1k", lambda value: _short(value)),
    "MiB kept": ("data/memory", "growth_bytes", lambda count: f"{count / 2**20:.1f}"),
    "{case} waits": ("data/pace", "wait_pct", "{:.2f}%".format),
    "{case} trained waits": ("data/step", "wait_pct", "{:.2f}%".format),
    "{case} images/s": ("data/step", "images_per_sec", lambda rate: _short(rate)),
}
"""Columns of reading latents, for each case: group, which number of a record, and how it is written."""


def _data(path: str, content: dict[str, Any], group: str, part: re.Pattern[str]) -> str:
    """One machine's table of reading latents, a row for each variant."""
    records = [record for record in content["records"] if record["group"].startswith("data/")]
    if not records:
        return ""
    variants = dict.fromkeys(record["variant"] for record in records)
    columns: dict[str, dict[str, str]] = {}
    for head, (group, key, write) in DATA_COLUMNS.items():
        for record in records:
            if record["group"] == group:
                columns.setdefault(head.format(case=record["case"]), {})[record["variant"]] = write(record[key])
    rates = {r["variant"]: r["latents_per_sec"] for r in records if r["group"] == "data/read"}
    for base in BASELINES:
        if base in rates:
            columns[f"x {base}"] = {name: _short(rate / rates[base]) for name, rate in rates.items()}
    lines = [_caption(path, content["machine"]), "", _row(["reader", *columns])]
    lines += [_row(["---", *["--:"] * len(columns)])]
    lines += [_row([name, *(column.get(name, "") for column in columns.values())]) for name in variants]
    return "\n".join(lines) + "\n"


WHOLE = {"step": _steps, "data": _data}
"""Tables of more than one group."""


def _times(ours: dict[str, Any] | None, other: dict[str, Any] | None) -> str:
    return f"{ours['images_per_sec'] / other['images_per_sec']:.2f}" if ours and other else ""


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _models() -> str:
    """Every named model on the images it was published for; ``tiny`` on digits."""
    head = ["name", "images", "labels", "parameters", "GMAC"]
    lines = [_row(head), _row(["---", "---", "--:", "--:", "--:"])]
    for name in MODELS:
        how: dict[str, Any] = {"input_size": 8, "in_channels": 1, "num_classes": 10} if "tiny" in name else {}
        if name.endswith("/4") and name.startswith("U-ViT") and not how:
            how = {"input_size": 64, "in_channels": 3}  # published for pixels
        model = create_model(name, device="meta", **how)
        images = f"{model.in_channels} x {model.input_size} x {model.input_size}"
        labels = f"{model.num_classes:,}{' and null' * model.null_label}" if model.num_classes else "none"
        parameters = sum(parameter.numel() for parameter in model.parameters())
        lines.append(_row([f"`{name}`", images, labels, f"{parameters:,}", f"{model_flops(model) / 2e9:.4g}"]))
    return "\n".join(lines) + "\n"


def _caption(path: str, machine: dict[str, Any]) -> str:
    threads = "" if machine["driver"] else f", {machine['threads']} threads"
    commit = f"commit {machine['commit'][:7]}{' with changes' if machine['dirty'] else ''}" if machine["commit"] else ""
    facts = [f"torch {machine['torch']}", f"Triton {machine['triton']}", commit, machine["date"][:10]]
    return f"**{machine['device']}{threads}**, {', '.join(filter(None, facts))} (bench/results/{path})"


def _is_ours(column: str) -> bool:
    return column.startswith("erd-fast")


def _time(record: dict[str, Any]) -> str:
    """Median, and the interquartile range in brackets."""
    median, spread = record["median_s"], record["iqr_s"]
    unit, factor = ("s", 1.0) if median >= 1 else ("ms", 1e3) if median >= 1e-3 else ("µs", 1e6)
    return f"{_short(median * factor)} {unit} ({_short(spread * factor)})"


def _short(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    results = read_results()
    for file in documents():
        text = file.read_text()
        rendered = render(text, results)
        if rendered != text:
            file.write_text(rendered)
            print(f"wrote {file.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
