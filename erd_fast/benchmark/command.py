"""`erd-fast bench`: measure, print a table, write JSON and, of whole steps and of data, a picture."""

from collections.abc import Iterable
from pathlib import Path

from erd_fast.benchmark import data, data_report, ops, records, step, step_report
from erd_fast.benchmark.records import Record
from erd_fast.files import write_bytes

_REPORTS = {"step": step_report, "data": data_report}


def measure(what: str, pattern: str, seconds: float | None, file: Path | None) -> None:
    """Measure ``ops``, ``attention``, ``step`` or ``data``; ``seconds`` for each variant, or what is usual there.

    Raises:
        ConfigError: no case contains the pattern. RunError: something of ours computes something else than it should.
    """
    found, report = records.collect(_measuring(what, pattern, seconds), file), _REPORTS.get(what)
    print("\n".join([report.table(found) if report else records.table(found), *records.limits(found)]))
    if file is None:
        return
    print(f"wrote {file}")
    if report:
        drawn = file.with_suffix(".png")
        write_bytes(drawn, report.picture(found))
        print(f"wrote {drawn}")


def _measuring(what: str, pattern: str, seconds: float | None) -> Iterable[Record]:
    if what == "step":
        return step.bench_step(pattern, seconds or step.SECONDS)
    if what == "data":
        return data.bench_data(pattern, seconds or data.SECONDS)
    return ops.bench(what, pattern, seconds or ops.SECONDS)
