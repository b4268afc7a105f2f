"""Run all GPU measurements within a few minutes, the most important first: ``python bench/run.py gpu``.

    python bench/run.py gpu --seconds 480 --out DIR       on a machine with a GPU, torch, Triton and pytest
    python bench/run.py gpu --rehearse --out DIR          a dry run of the stages on a CPU with tiny sizes
    python bench/run.py gpu --only tests --out DIR        the stages whose name contains this, after the extension's

DIR must not hold results already. It receives rows.jsonl (one row per measurement, written immediately), results.json
(machine, records, failures), summary.txt and log.txt.
"""

import argparse
import dataclasses
import functools
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from erd_fast.benchmark import ops as bench_ops
from erd_fast.benchmark import step as bench_step
from erd_fast.benchmark.data_sources import write_latents
from erd_fast.benchmark.data_steps import bench_steps
from erd_fast.benchmark.records import Record, machine, table
from erd_fast.benchmark.stages import Rows, Runner, Stage, stopped_by_signals
from erd_fast.benchmark.step_cases import StepCase, make_problem
from erd_fast.benchmark.step_check import check, witness
from erd_fast.benchmark.step_ours import IN_FLOAT16, OURS, Ours
from erd_fast.benchmark.timing import captured, interleaved, wall
from erd_fast.benchmark.workload import Variant
from erd_fast.errors import ErdFastError, RunError
from erd_fast.files import make_folder, write_json, write_text
from erd_fast.numerics import allow_reduced_precision_reductions
from erd_fast.ops.availability import extension_unavailable
from erd_fast.training.config import ModelConfig

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 480.0
STEP_SECONDS, OP_SECONDS, MATMUL_SECONDS = 2.0, 0.3, 0.1  # for each variant
UNUSABLE = 3
"""Exit status of a stage after a CUDA error that stays: what remains of the stage needs another process."""
ROOMY = 100 << 30
"""Bytes of a GPU on which a large model can be compiled while tests run."""

OPS = (
    "ops/draw N=256",
    "ops/q_sample drawn N=256",
    "ops/diffusion_loss N=256",
    "ops/step N=256",
    "ops/grad_norm P=128M",
    "ops/adamw_ema P=128M",
    *(
        f"ops/{op} D=1152 T=256 N=256 {mode}"
        for op in ("residual_ada_layer_norm", "ada_layer_norm", "linear_gelu")
        for mode in ("forward", "backward")
    ),
    *(
        f"attention {shape} N=256 {mode}"
        for shape in ("DiT-XL/2 T=256 H=16 K=72", "DiT-S/2 T=256 H=6 K=64")
        for mode in ("forward", "backward")
    ),
)
"""Cases of ``erd-fast bench ops`` and ``bench attention``."""
REHEARSED_OPS = ("ops/draw N=8", "ops/grad_norm P=32M", "attention DiT-S/2 T=256 H=6 K=64 N=8 forward")

LAYERS = {"qkv": (3456, 1152), "proj": (1152, 1152), "fc1": (4608, 1152), "fc2": (1152, 4608)}
"""Output and input widths of the linear layers in a block of DiT-XL/2."""

TESTS = (
    "tests/ops/test_gpu.py",
    "tests/models/test_gpu.py",
    "tests/training/test_gpu.py",
    "tests/ops/test_residual_ada_layer_norm.py",
    "tests/ops/test_ada_layer_norm.py",
    "tests/ops/test_attention.py",
    "tests/ops/test_linear_gelu.py",
    "tests/ops/test_backends.py",
    "tests/ops/test_adamw_ema.py",
    "tests/data/test_gpu.py",
    "tests/benchmark/test_gpu.py",
)
"""Files with tests that run on a GPU where there is one."""
LEFT_OUT = "speed_of_a_copy or more_than_32_bits"
"""Tests that need the GPU, or 32 GiB of it, to themselves."""
REHEARSED_TESTS = ("tests/ops/test_gpu.py", "tests/ops/test_grad_norm.py")

Measure = Callable[[Rows], None]


class Part(NamedTuple):
    """A stage: its name, the seconds that it may take, and what it does."""

    name: str
    limit: float
    measure: Measure


def plan(rehearse: bool) -> list[list[Part]]:
    """The stages in order; those of one list run at the same time."""
    if rehearse:
        model = ModelConfig("DiT-tiny/2", hidden_size=32, depth=1, num_heads=1)
        small = functools.partial(measure_step, StepCase(model, 8, side=8), seconds=0.1)
        return [
            [Part("extension", 60, build_extension)],
            [Part("machine", 30, functools.partial(measure_machine, counts=(256,), seconds=0.01))],
            *([Part(f"step {name}", 40, functools.partial(small, name))] for name in (OURS, IN_FLOAT16)),
            [Part("ops", 40, functools.partial(measure_ops, REHEARSED_OPS, seconds=0.01))],
            [Part("reading", 40, functools.partial(measure_reading, model, 8, 64, 3))],
            [
                Part("tests", 60, functools.partial(run_tests, REHEARSED_TESTS, workers=2)),
                Part("warm compile", 90, functools.partial(small, "compile", warm=True)),
            ],
            *([Part(f"step {name}", 40, functools.partial(small, name))] for name in ("compile", "sdpa-fused")),
            [Part("step recompute-on", 40, functools.partial(small, "recompute-on"))],
        ]
    cases = {name: StepCase(ModelConfig(name), size) for name, size in (("DiT-XL/2", 128), ("DiT-S/2", 256))}

    def step(model: str, variant: str, limit: float, **how: Any) -> Part:
        name = f"{'warm' if how else 'step'} {model} {variant}"
        return Part(name, limit, functools.partial(measure_step, cases[model], variant, seconds=STEP_SECONDS, **how))

    return [
        [Part("extension", 120, build_extension)],
        [Part("machine", 40, functools.partial(measure_machine, counts=(65536, 32768), seconds=MATMUL_SECONDS))],
        [step("DiT-XL/2", OURS, 90)],
        [step("DiT-XL/2", IN_FLOAT16, 75)],
        [step("DiT-S/2", OURS, 45)],
        [Part("ops", 100, functools.partial(measure_ops, OPS, seconds=OP_SECONDS))],
        [Part("reading", 60, functools.partial(measure_reading, ModelConfig("DiT-S/2"), 256, 16_384, 50))],
        [
            Part("tests", 130, functools.partial(run_tests, TESTS, workers=8)),
            step("DiT-XL/2", "compile", 150, warm=True),
            step("DiT-S/2", "compile", 150, warm=True),
        ],
        [step("DiT-XL/2", "compile", 150)],
        [step("DiT-S/2", "compile", 50)],
        [step("DiT-XL/2", "recompute-off", 60)],
        [step("DiT-XL/2", "compile-graphs", 80)],
        [step("DiT-S/2", "compile-graphs", 60)],
        [step("DiT-XL/2", "sdpa-fused", 50)],
        [step("DiT-S/2", "sdpa-fused", 30)],
        [step("DiT-S/2", "recompute-off", 30)],
        [step("DiT-S/2", "official", 30)],
        [step("DiT-XL/2", "official", 50)],
    ]


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def build_extension(rows: Rows) -> None:
    """Build the compiled extension in place, only for this GPU, unless there is one that loads and runs here."""
    needed = device().type
    reason, built = str(extension_unavailable(needed) or ""), False
    if reason:
        architecture = "".join(map(str, torch.cuda.get_device_capability())) if needed == "cuda" else ""
        chosen = {"ERD_FAST_CUDA_ARCHS": architecture} if architecture else {"ERD_FAST_CUDA": "0"}
        subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, env=os.environ | chosen)
        code = f"from erd_fast.ops.availability import *; print(extension_unavailable({needed!r}) or '')"
        probe = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        failure = probe.stderr[-500:] or f"loading it ended with exit status {probe.returncode}"
        reason, built = failure if probe.returncode else probe.stdout.strip(), True
    rows.write("extension", device=needed, built=built, reason=reason)
    if reason:
        raise RuntimeError(f"no compiled kernels for {needed}: {reason}")


def measure_machine(rows: Rows, *, counts: Iterable[int], seconds: float) -> None:
    """Copy bandwidth, a square product, and every product of DiT-XL/2's linear layers."""
    on = device()
    write_record(rows, bench_ops.copy(on, seconds))
    write_record(rows, bench_ops.matmul(on, seconds))
    for count in counts:
        for layer, (outputs, inputs) in LAYERS.items():
            for case, left, right in products(count, outputs, inputs, on):
                sampler = (captured if on.type == "cuda" else wall)([functools.partial(torch.mm, left, right)])
                (timing,) = interleaved([sampler], seconds)
                flops = 2 * left.shape[0] * left.shape[1] * right.shape[1]
                rates = bench_ops.rates_of(timing, flops, on)
                name = f"{layer} {case} M={count}"
                write_record(rows, Record("machine/linear", name, "eager", "", **dataclasses.asdict(timing), **rates))


def products(
    count: int, outputs: int, inputs: int, on: torch.device
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """The products of a linear layer on ``count`` rows, with the layouts that autograd gives them."""
    how = {"device": on, "dtype": torch.bfloat16 if on.type == "cuda" else torch.float32}
    x, dy = torch.randn(count, inputs, **how), torch.randn(count, outputs, **how)
    weight = torch.randn(outputs, inputs, **how)
    yield "forward", x, weight.t()
    yield "dgrad", dy, weight
    yield "wgrad", dy.t(), x


def measure_step(case: StepCase, variant: str, rows: Rows, *, seconds: float, warm: bool = False) -> None:
    """A training step: its row first, then the check, which takes longer. ``warm`` only fills the compiler's caches."""
    named = {"group": case.group, "case": case.name, "variant": variant}
    if warm and torch.cuda.is_available() and torch.cuda.mem_get_info()[1] < ROOMY:
        rows.write("warm", **named, skipped="too little memory to compile during the tests")
        return
    problem = make_problem(case, device())
    began = time.perf_counter()
    trainer, facts = bench_step.begin(problem, variant)
    ready_s = round(time.perf_counter() - began, 1)
    if warm:
        rows.write("warm", **named, ready_s=ready_s)
        return
    (timing,) = interleaved([bench_step.sampler_of(trainer)], seconds, bench_step.LEAST_RUNS)
    record = bench_step.record_of(case, variant, facts, None, timing, problem.device)
    choices = trainer.tuner.choices(problem.device) if isinstance(trainer, Ours) else {}
    write_record(rows, record, checked=False, ready_s=ready_s, choices=choices)
    evidence = witness(trainer)
    del trainer
    bench_step.make_room()
    try:
        off = check(problem, evidence, f"{case.group} {case.name}, {variant}")
    except Exception as error:
        rows.write("check", **named, error=shortened(error))
        raise
    rows.write("check", **named, loss_off=off.loss, gradient_off=off.gradient)


def measure_ops(wanted: Iterable[str], rows: Rows, *, seconds: float) -> None:
    """The cases that have not been measured; a variant that is off or fails is noted, and not timed."""
    on = device()
    known = {f"{row['group']} {row['case']}" for row in rows.read("record", "case")}
    every = {f"{case.group} {case.name}": case for what in ("ops", "attention") for case in bench_ops.cases(what, on)}
    for name in (name for name in wanted if name not in known):
        case = every[name]
        broken = [row["variant"] for row in rows.read("variant") if f"{row['group']} {row['case']}" == name]

        def failed(variant: Variant, error: Exception, case: Any = case) -> None:
            rows.write("variant", group=case.group, case=case.name, variant=str(variant), error=shortened(error))
            if not usable():  # the other variants are measured by the next process
                raise SystemExit(UNUSABLE)

        try:
            for record in bench_ops.bench_case(case, on, seconds, compiled=False, without=broken, failed=failed):
                write_record(rows, record)
        except Exception as error:
            rows.write("case", group=case.group, case=case.name, error=shortened(error))
        if not usable():
            raise SystemExit(UNUSABLE)


def usable() -> bool:
    """Whether the GPU still works in this process: an illegal access ends that for good."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return True
    except RuntimeError:
        return False


def measure_reading(model: ModelConfig, batch_size: int, count: int, steps: int, rows: Rows) -> None:
    """Training steps on a store that is resident, and on one that is read: ``wait_pct`` is a run's data_wait_pct."""
    with tempfile.TemporaryDirectory() as folder:
        store = write_latents(Path(folder) / "store", count)
        case = f"{model.name} N={batch_size}"
        for record in bench_steps(model, case, batch_size, store, ("resident", "mmap"), device(), steps):
            write_record(rows, record)


def run_tests(files: Iterable[str], rows: Rows, *, workers: int) -> None:
    """Tests that use the GPU, several at a time where pytest-xdist is installed; a row for each as it ends."""
    import pytest

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    several = ["--numprocesses", str(workers)] if importlib.util.find_spec("xdist") else []
    how = ["--quiet", "--continue-on-collection-errors", "-p", "no:cacheprovider", "-k", f"not ({LEFT_OUT})", *several]
    status = pytest.main([*how, *files], plugins=[Outcomes(rows)])
    if status:
        raise SystemExit(int(status))


class Outcomes:
    """A plugin of pytest that writes a row for each test."""

    def __init__(self, rows: Rows):
        self._rows = rows

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._write(report, seconds=round(report.duration, 2))

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._write(report)

    def _write(self, report: Any, **more: Any) -> None:
        why = {"why": report.longreprtext[-2000:]} if report.failed else {}
        self._rows.write("test", test=report.nodeid, outcome=report.outcome, **more, **why)


def write_record(rows: Rows, record: Record, **more: Any) -> None:
    given = {name: value for name, value in dataclasses.asdict(record).items() if value is not None}
    rows.write("record", **given, **more)


def shortened(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def results(rows: Rows, commit: str) -> dict[str, Any]:
    """What ``bench/results`` takes, ``{"machine", "records"}``, with what failed. A step whose check has not passed is
    in ``unchecked`` and not among the records."""
    facts = next((without(row, "kind", "time") for row in rows.read("machine")), {})
    if commit:
        facts |= {"commit": commit, "dirty": None}
    checks = {identity(row): row for row in rows.read("check")}
    records, unchecked = [], []
    for row in rows.read("record"):
        record, checked = without(row, "kind", "time", "checked"), checks.get(identity(row), {})
        if row.get("checked", True) or "loss_off" in checked:
            offs = {name: checked[name] for name in ("loss_off", "gradient_off") if name in checked}
            records.append(record | offs)
        else:
            unchecked.append(record | {"error": checked.get("error", "was not checked")})
    counts = Counter(row["outcome"] for row in rows.read("test"))
    return {
        "machine": facts,
        "records": records,
        "unchecked": unchecked,
        "stages": [without(row, "kind", "time") for row in rows.read("stage")],
        "tests": {**counts, "failed_tests": [row["test"] for row in rows.read("test") if row["outcome"] == "failed"]},
        "failures": [without(row, "time") for row in rows.read("variant", "case", "failed")],
    }


def identity(row: dict[str, Any]) -> tuple[str, ...]:
    return row["group"], row["case"], row["variant"]


def without(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}


def summary(found: dict[str, Any]) -> str:
    """The results as text: records, what is off or failed, tests, stages."""
    fields = {field.name for field in dataclasses.fields(Record)}
    records = [Record(**{name: row[name] for name in row if name in fields}) for row in found["records"]]
    records = [dataclasses.replace(record, backend=shorter(record.backend)) for record in records]
    tests = without(found["tests"], "failed_tests")
    lines = [
        f"{name}: {value}"
        for name, value in found["machine"].items()
        if name in ("device", "torch", "triton", "commit")
    ]
    lines = (
        ["REHEARSAL with tiny sizes on a CPU: no figure below is a measurement", *lines]
        if found["rehearsal"]
        else lines
    )
    lines += ["", table(records) if records else "no records"]
    lines += [""] * bool(found["unchecked"] or found["failures"])
    lines += [f"UNCHECKED {' '.join(identity(row))}: {row['error']}" for row in found["unchecked"]]
    lines += [
        f"FAILED {' '.join(str(row[name]) for name in row if name != 'error')}: {row['error']}"
        for row in found["failures"]
    ]
    lines += ["", f"tests: {', '.join(f'{count} {outcome}' for outcome, count in tests.items()) or 'none ran'}"]
    lines += [f"FAILED {name}" for name in found["tests"]["failed_tests"]]
    lines += ["", *(f"{row['stage']:<28}{row['seconds']:>7.1f} s  {row['outcome']}" for row in found["stages"])]
    return "\n".join(lines) + "\n"


def shorter(used: str) -> str:
    """The backend that most ops ran on, with a mark where others have another one."""
    most, _, others = used.partition(",")
    return f"{most}, …" if others else most


def run_stage(part: Part, rows: Rows) -> int:
    """What the process of a stage does."""
    allow_reduced_precision_reductions(False)  # as training does
    try:
        if not rows.read("machine"):
            rows.write("machine", **machine())
        part.measure(rows)
    except Exception as error:
        traceback.print_exc()
        rows.write("failed", stage=part.name, error=shortened(error))
        return 1
    return 0


def run_all(folder: Path, rows: Rows, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the stages, and write the results after each."""
    # Commands run in the checkout, whether the package is installed or not.
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    environment |= {"CUDA_VISIBLE_DEVICES": ""} if arguments.rehearse else {}
    runner = Runner(rows, folder / "log.txt", arguments.seconds, ROOT, environment)
    command = [sys.executable, str(ROOT / "bench" / "run.py"), "gpu", "--out", str(folder)]
    command += ["--rehearse"] * arguments.rehearse

    def collected() -> dict[str, Any]:
        return {"rehearsal": arguments.rehearse, **results(rows, arguments.commit)}

    def run(parts: list[Part]) -> None:
        print(f"{runner.left:4.0f} s left: {', '.join(part.name for part in parts)}", flush=True)
        runner.run(*(Stage(part.name, [*command, "--stage", part.name], part.limit) for part in parts))
        try:
            write_json(folder / "results.json", collected())
        except RunError as error:  # rows.jsonl has it all
            print(error, file=sys.stderr)

    for parts in plan(arguments.rehearse):
        # Without the extension the others would measure something else.
        if chosen := [part for part in parts if arguments.only in part.name or part.measure is build_extension]:
            run(chosen)
    again = [part for parts in plan(arguments.rehearse) for part in parts if part.name == "ops"]
    failures = -1
    while lost_the_gpu(rows) and len(rows.read("variant", "case")) > failures:  # each time a failure fewer remains
        failures = len(rows.read("variant", "case"))
        run(again)
    return collected()


def lost_the_gpu(rows: Rows) -> bool:
    """Whether the last process of the ops ended with a CUDA error that stays."""
    outcomes = [row["outcome"] for row in rows.read("stage") if row["stage"] == "ops"]
    return outcomes[-1:] == [f"failed with exit status {UNUSABLE}"]


def main(given: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="bench/run.py gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help=f"total time limit in seconds (default {SECONDS:.0f})"
    )
    default = ROOT / "out" / "gpu" / time.strftime("%Y%m%d-%H%M%S")
    parser.add_argument(
        "--out", type=Path, default=default, help="folder for the four files (default out/gpu/DATE-TIME)"
    )
    parser.add_argument("--rehearse", action="store_true", help="dry run on a CPU with tiny sizes")
    parser.add_argument("--only", default="", metavar="TEXT", help="only the stages whose name contains TEXT")
    parser.add_argument("--commit", default="", help="commit of the sources, where there is no .git")
    parser.add_argument("--stage", help=argparse.SUPPRESS)  # what the process of a stage is called with
    arguments = parser.parse_args(given)
    folder = arguments.out.resolve()
    rows = Rows(folder / "rows.jsonl")
    named = {part.name: part for parts in plan(arguments.rehearse) for part in parts}
    if arguments.stage:
        return run_stage(named[arguments.stage], rows)
    if not arguments.rehearse and not torch.cuda.is_available():
        parser.error("no CUDA device is visible to PyTorch; --rehearse runs the stages on a CPU")
    if not any(arguments.only in name for name in named):
        parser.error(f"--only must be part of a stage's name, got {arguments.only!r}; stages: {', '.join(named)}")
    if not arguments.seconds > 0:
        parser.error(f"--seconds must be above 0, got {arguments.seconds}")
    try:
        make_folder(folder)
        (folder / "rows.jsonl").touch(exist_ok=False)  # of two runs at once only one passes here
    except FileExistsError:
        parser.error(f"--out must be a folder without results, got {arguments.out}, which holds rows.jsonl")
    except ErdFastError as error:
        parser.error(f"--out: {error}")
    with stopped_by_signals():
        found = run_all(folder, rows, arguments)
    text = summary(found)
    write_text(folder / "summary.txt", text)
    print(f"\n{text}\nwrote {folder}")
    return int(has_failed(found))


def has_failed(found: dict[str, Any]) -> bool:
    outcomes = {row["outcome"] for row in found["stages"]} - {"ok", "no time left"}
    return bool(outcomes or found["unchecked"] or found["failures"] or found["tests"]["failed_tests"])
