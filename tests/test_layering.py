"""Imports run downwards only: the floors of docs/design.md, checked on the source text."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {
    "errors": 0,
    "files": 1,
    "extras": 1,
    "latents": 1,
    "numerics": 1,
    "progress": 1,
    "torchrun": 1,
    "random": 1,
    "kernels": 1,
    "data": 2,
    "evaluation": 2,
    "page": 2,
    "ops.availability": 2,
    "ops.core": 3,
    "ops": 4,
    "nn": 5,
    "diffusion": 5,
    "autoencoder": 5,
    "optim": 5,
    "models": 6,
    "sampling": 6,
    "training": 7,
    "lab": 7,
    "benchmark": 8,
    "prepare": 8,
    "report": 8,
    "info": 9,
    "cli": 10,
}
# These two stand on torch and NumPy alone, so that they can be taken without the rest.
ONLY_BASE = {"data", "evaluation"}
KERNELS_MAY_IMPORT = {"torch", "triton", "math", "typing", "collections", "__future__"}


def imports_of(file: Path) -> list[str]:
    """Dotted names that a file imports anywhere in it."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def room_of(dotted: str) -> str | None:
    """``erd_fast.ops.draw`` -> ``ops``, ``erd_fast.ops.core.op`` -> ``ops.core``; None for what is not ours."""
    package, *parts = dotted.split(".")
    if package != "erd_fast" or not parts:
        return None
    inner = ".".join(parts[:2])
    return inner if inner in FLOORS else parts[0]


def violations(file: Path, room: str) -> list[str]:
    """Imports of ``file`` in ``room`` that go up, sideways between floors, or out of a base room."""
    wrong = []
    for dotted in imports_of(file):
        other = room_of(dotted)
        if other is None or other == room or other == "__version__":
            continue
        below = FLOORS.get(other, 99) < FLOORS[room]
        if not below or (room in ONLY_BASE and FLOORS[other] > 1):
            wrong.append(f"{file.name} ({room}, floor {FLOORS[room]}) imports {dotted}")
    return wrong


def package_files() -> list[tuple[Path, str]]:
    package = ROOT / "erd_fast"
    names = {file: ".".join(file.relative_to(ROOT).with_suffix("").parts) for file in package.rglob("*.py")}
    return [(file, room) for file, name in names.items() if (room := room_of(name)) not in (None, "__init__")]


def test_every_room_has_a_floor():
    assert {room for _, room in package_files()} | {"kernels"} == set(FLOORS)


def test_imports_run_downwards():
    wrong = [line for file, room in package_files() for line in violations(file, room)]
    assert not wrong, "\n".join(wrong)


def test_an_upward_import_would_be_seen(tmp_path):
    file = tmp_path / "draw.py"
    file.write_text("def f():\n    from erd_fast.training.loop import train\n")
    assert violations(file, "ops")
    file.write_text("from erd_fast.ops import draw\n")
    assert violations(file, "data") and violations(file, "ops.core")
    file.write_text("from erd_fast.ops.core.op import Op\n")
    assert violations(file, "ops.availability") and not violations(file, "ops")


def test_kernels_import_torch_triton_and_siblings_alone():
    for file in (ROOT / "kernels").glob("*.py"):
        for dotted in imports_of(file):
            assert dotted.split(".")[0] in KERNELS_MAY_IMPORT, f"{file.name} imports {dotted}"


@pytest.mark.parametrize("module", ["erd_fast", "erd_fast.errors", "erd_fast.latents"])
def test_importing_the_package_is_light(module):
    code = f"import {module}, sys; print([m for m in ('torch', 'triton', 'tyro', 'matplotlib') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_an_op_has_one_name_everywhere():
    from erd_fast import ops

    for op in ops.OPS:
        assert (ROOT / "erd_fast" / "ops" / f"{op}.py").is_file()
        assert (ROOT / "tests" / "ops" / f"test_{op}.py").is_file()
