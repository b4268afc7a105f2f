"""`erd-fast bench`: measure, print a table, write JSON and, of whole steps, a picture."""

from pathlib import Path

from erd_fast.benchmark import ops, records, step, step_report
from erd_fast.files import write_bytes


def measure(what: str, pattern: str, seconds: float | None, file: Path | None) -> None:
    """Measure ``ops``, ``attention`` or ``step``; ``seconds`` for each variant, or what is usual there.

    Raises:
        ConfigError: no case contains the pattern. RunError: something of ours computes something else than it should.
    """
    if what == "step":
        found = records.collect(step.bench_step(pattern, seconds or step.SECONDS), file)
        print(step_report.table(found))
    else:
        found = records.collect(ops.bench(what, pattern, seconds or ops.SECONDS), file)
        print(records.table(found))
    if file is None:
        return
    print(f"wrote {file}")
    if what == "step":
        drawn = file.with_suffix(".png")
        write_bytes(drawn, step_report.picture(found))
        print(f"wrote {drawn}")
