"""setup.py: what is built from what is there, what the CUDA kernels use, and how the library loads."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from support.builds import build_all

ARCHS = ("80", "90", "100")


@pytest.fixture
def fresh(setup, monkeypatch):
    """setup.py's plan under changed circumstances."""
    for name in ("ERD_FAST_CUDA", "ERD_FAST_CUDA_ARCHS", "CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)
    clear = setup.plan.cache_clear
    clear()
    yield setup
    clear()


@pytest.fixture(scope="module")
def objects(setup, plan) -> dict[str, Path]:
    """Every .cu, and the bindings with them, compiled as setup.py does it, with warnings as errors."""
    if plan.toolkit is None:
        pytest.skip(plan.reason)
    found = setup.Plan(plan.compiler, plan.torch, plan.toolkit, list(ARCHS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "NVCC_FLAGS", (*setup.NVCC_FLAGS, "-Werror=all-warnings"))
        sources = (*setup.CUDA_SOURCES, "bindings.cpp")
        jobs = [(f"{name}.o", functools.partial(setup.compile_command, found, f"csrc/{name}")) for name in sources]
        return dict(zip(sources, build_all(jobs), strict=True))


@pytest.mark.build
@pytest.mark.parametrize("op", ["draw", "q_sample", "diffusion_loss", "linear_gelu", "grad_norm", "adamw_ema"])
def test_kernels_keep_to_registers(objects, op):
    cuobjdump = _cuobjdump()
    used = subprocess.run(
        [cuobjdump, "--dump-resource-usage", objects[f"{op}.cu"]], capture_output=True, text=True, check=True
    ).stdout
    for arch in ARCHS:
        assert f"arch = sm_{arch}" in used
    kernels = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", used)
    assert len(kernels) % len(ARCHS) == 0
    assert len(kernels) == len(re.findall("_(?:fwd|bwd)_kernel", used))
    for registers, stack, _, local in kernels:
        assert (stack, local) == ("0", "0"), used
        assert int(registers) <= 64  # four blocks of 256 threads a multiprocessor
    listed = subprocess.run([cuobjdump, "--list-ptx", objects[f"{op}.cu"]], capture_output=True, text=True).stdout
    assert "sm_80.ptx" in listed


def _cuobjdump() -> Path:
    triton = pytest.importorskip("triton")
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@pytest.mark.build
def test_the_whole_library_loads_without_a_driver(objects, twins, setup, plan, tmp_path):
    library = tmp_path / setup.LIBRARY
    setup.link(plan, [*objects.values(), *twins], library)
    assert library.stat().st_size < 5 << 20
    facts = _in_a_process(tmp_path, "import _C; C = torch.ops._erd_fast_C; print(C.has_cuda(), C.has_cuda_stream())")
    # The stream is asked of libtorch_cuda.so: NULL where torch has none, and only there.
    assert facts == f"True {torch.version.cuda is not None}"


def _in_a_process(folder: Path, code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"import torch; {code}"],
        cwd=folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.mark.build
def test_the_library_has_one_name_for_others_and_no_path(cpu_library):
    tools = subprocess.run(["readelf", "-d", "-W", cpu_library], capture_output=True, text=True)
    if tools.returncode:
        pytest.skip("no readelf")
    assert "libtorch.so" in tools.stdout and "libtorch_cpu.so" in tools.stdout
    assert "RPATH" not in tools.stdout and "RUNPATH" not in tools.stdout
    symbols = subprocess.run(["readelf", "--dyn-syms", "-W", cpu_library], capture_output=True, text=True).stdout
    ours = [line.split()[-1] for line in symbols.splitlines() if " UND " not in line and " FUNC " in line]
    assert "PyInit__C" in ours
    assert not [name for name in ours if "erd_fast" in name]


def test_without_a_compiler_the_package_is_python_alone(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    assert not fresh.plan().cpu
    assert fresh.extensions() == []
    assert "no C++ compiler" in fresh.plan().reason
    assert fresh.describe(fresh.plan(), cpu=False) == {
        "cuda": False, "cpu": False, "archs": [], "reason": fresh.plan().reason,
    }  # fmt: skip


def test_without_torch_the_package_is_python_alone(fresh, plan, monkeypatch):
    monkeypatch.setattr(fresh, "find_torch", lambda: None)
    assert fresh.extensions() == []
    assert "torch was not found" in fresh.plan().reason


def test_without_nvcc_the_cpu_part_is_built(fresh, plan, monkeypatch):
    monkeypatch.setattr(fresh, "find_toolkit", lambda packages: (None, "no CUDA toolkit"))
    assert fresh.plan().cpu and fresh.plan().toolkit is None
    assert fresh.describe(fresh.plan(), cpu=True) == {
        "cuda": False, "cpu": True, "archs": [], "reason": "no CUDA toolkit",
    }  # fmt: skip
    fresh.plan.cache_clear()
    monkeypatch.setenv("ERD_FAST_CUDA", "1")
    with pytest.raises(SystemExit, match="ERD_FAST_CUDA=1, but the CUDA part cannot be built: no CUDA toolkit"):
        fresh.plan()


def test_cuda_can_be_left_out(fresh, plan, monkeypatch):
    monkeypatch.setenv("ERD_FAST_CUDA", "0")
    assert fresh.plan().cpu and fresh.plan().toolkit is None
    assert "ERD_FAST_CUDA=0" in fresh.plan().reason
    fresh.plan.cache_clear()
    monkeypatch.setenv("ERD_FAST_CUDA", "yes")
    with pytest.raises(SystemExit, match="ERD_FAST_CUDA: given 'yes', allowed auto, 0 or 1"):
        fresh.plan()


@pytest.mark.parametrize(("given", "archs", "ptx"), [("90", ["90"], "90"), ("9.0;8.0", ["90", "80"], "80")])
def test_architectures_are_named(fresh, monkeypatch, given, archs, ptx):
    monkeypatch.setenv("ERD_FAST_CUDA_ARCHS", given)
    assert fresh.architectures(Path("/toolkit")) == archs
    command = fresh.nvcc_command(Path("/toolkit"), "g++", archs, "a.cu", Path("a.o"))
    codes = [argument for argument in command if argument.startswith("-gencode")]
    assert codes == [
        *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs),
        f"-gencode=arch=compute_{ptx},code=compute_{ptx}",
    ]


def test_a_bad_architecture_is_refused(fresh, monkeypatch):
    monkeypatch.setenv("ERD_FAST_CUDA_ARCHS", "hopper")
    with pytest.raises(SystemExit, match="ERD_FAST_CUDA_ARCHS: given 'hopper', allowed numbers such as 80;90;100"):
        fresh.architectures(Path("/toolkit"))


def _fake_build(setup: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, refused: set[str]) -> dict[str, Any]:
    """What BuildExt records if the named sources do not compile."""
    from setuptools import Distribution

    def build_library(found: Any, output: Path, work: Path) -> None:
        sources = [*setup.CPU_SOURCES, *(setup.CUDA_SOURCES if found.toolkit else ())]
        for name in sources:
            if name in refused:
                raise setup.BuildError(f"compile {name}\n{name}:1: error: unknown word")
        output.parent.mkdir(parents=True, exist_ok=True)
        output.touch()

    recorded: list[dict[str, Any]] = []
    monkeypatch.setattr(setup, "build_library", build_library)
    monkeypatch.setattr(setup, "record", lambda folder, built: recorded.append(built))
    distribution = Distribution({"name": "erd-fast", "ext_modules": setup.extensions()})
    command = setup.BuildExt(distribution)
    command.build_lib, command.build_temp = str(folder / "lib"), str(folder / "temp")
    command.ensure_finalized()
    command.build_extension(command.extensions[0])
    return recorded[-1]


def test_a_part_that_does_not_compile_is_left_out_with_its_reason(fresh, plan, monkeypatch, tmp_path, capsys):
    whole = fresh.Plan(plan.compiler, plan.torch, Path("/toolkit"), ["80"])
    monkeypatch.setattr(fresh, "plan", lambda: whole)
    built = _fake_build(fresh, tmp_path, monkeypatch, {"q_sample.cu"})
    assert built["cpu"] and not built["cuda"]
    assert built["reason"] == "the CUDA part failed to build: q_sample.cu:1: error: unknown word"
    built = _fake_build(fresh, tmp_path, monkeypatch, {"q_sample.cpp"})
    assert not built["cpu"] and not built["cuda"]
    assert built["reason"] == "csrc failed to build: q_sample.cpp:1: error: unknown word"
    assert "PyTorch is used instead" in capsys.readouterr().err
    monkeypatch.setenv("ERD_FAST_CUDA", "1")
    whole.toolkit = Path("/toolkit")
    with pytest.raises(SystemExit, match=r"q_sample.cu:1: error"):
        _fake_build(fresh, tmp_path, monkeypatch, {"q_sample.cu"})
