"""Random calls with csrc compiled for AddressSanitizer and UndefinedBehaviorSanitizer: `make soak`, three minutes on
two cores. An access outside a tensor, a table or a kernel's own memory, or an overflow, ends the process with a report.
"""

import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

import erd_fast
from support.random_calls import OPS, assert_right, run_calls

ROOT = Path(__file__).resolve().parents[2]
CALLS = 1000
COMPILED = [op for op in OPS if op != "attention"]
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g1")


@pytest.mark.soak
def test_random_calls_pass_the_sanitizers(tmp_path):
    environment = sanitized(tmp_path)
    run = run_calls(COMPILED, CALLS, environment)
    assert_right(run)
    lines = [line for line in run.stdout.splitlines() if " calls in " in line]
    assert f"erd_fast from {tmp_path / 'erd_fast'}" in run.stdout and len(lines) == len(COMPILED)
    print(*lines, sep="\n")


def sanitized(folder: Path) -> dict[str, str]:
    """A copy of the package in ``folder`` with the CPU part of csrc compiled with sanitizers, and the variables
    with which Python loads it."""
    spec = importlib.util.spec_from_file_location("erd_fast_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    compiler, torch = setup.find_compiler(), setup.find_torch()
    if setup.missing_tool() or torch is None:
        pytest.skip(setup.missing_tool() or "torch was not found")
    runtimes = [_library(compiler, name) for name in ("libasan.so", "libubsan.so", "libstdc++.so")]
    if None in runtimes:
        pytest.skip(f"{compiler} has no libasan.so or no libubsan.so")
    shutil.copytree(Path(erd_fast.__file__).parent, folder / "erd_fast", ignore=shutil.ignore_patterns("*.so", "__py*"))
    plan = setup.Plan(compiler, torch, reason="compiled with sanitizers")
    setup.CXX_FLAGS += SANITIZE
    objects = setup.compile_all(plan, folder / "objects", setup.CPU_SOURCES)
    libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-ltorch"]
    command = [compiler, "-shared", *SANITIZE, *objects, *libraries]
    subprocess.run([*command, "-o", folder / "erd_fast" / setup.LIBRARY], check=True)
    (folder / "erd_fast" / setup.RECORD).write_text(json.dumps(setup.describe(plan, cpu=True)))
    options = "detect_leaks=0:halt_on_error=1:detect_stack_use_after_return=1:allocator_may_return_null=1"
    # C++ exceptions are intercepted, so the library that throws them must be there from the start.
    return {"PYTHONPATH": str(folder), "LD_PRELOAD": " ".join(map(str, runtimes)), "ASAN_OPTIONS": options}


def _library(compiler: str, name: str) -> Path | None:
    found = Path(subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip())
    return found.resolve() if found.is_absolute() and os.access(found, os.R_OK) else None
