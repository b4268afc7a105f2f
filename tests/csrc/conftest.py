"""csrc, built for tests: the CPU twins at each instruction set, and the CUDA kernels run by cuda_emulation.h.

The flags are those of setup.py. The ops have names of their own, since a process can register ``_erd_fast_C`` only once
and an installed extension may have done so.
"""

import functools
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from support.builds import ROOT, build, build_all

LEVELS = {"baseline": 0, "avx2": 1, "avx512": 2}
TEST_FOLDER = Path(__file__).resolve().parent
STAND_IN = "liberd_fast_cublaslt_stand_in.so"


@pytest.fixture(scope="session")
def setup() -> ModuleType:
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("erd_fast_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def plan(setup: ModuleType) -> Any:
    """What can be built here, CUDA included."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ERD_FAST_CUDA", "auto")
        patch.delenv("ERD_FAST_CUDA_ARCHS", raising=False)
        found = setup.plan()
    if not found.cpu:
        pytest.skip(found.reason)
    return found


@pytest.fixture(scope="session")
def twins(setup: ModuleType, plan: Any) -> list[Path]:
    """Objects of the CPU twins."""
    names = [name for name in setup.CPU_SOURCES if name != "bindings.cpp"]
    return build_all((f"{name}.o", functools.partial(_compile, setup, plan, name, ())) for name in names)


@pytest.fixture(scope="session")
def cpu_library(setup: ModuleType, plan: Any, twins: list[Path]) -> Path:
    named = ["-DERD_FAST_LIBRARY=_erd_fast_test_cpu"]
    bindings = build("bindings.cpp.o", lambda output: _compile(setup, plan, "bindings.cpp", named, output))
    return build("cpu.so", lambda output: setup.link_command(_cpu_only(setup, plan), [bindings, *twins], output))


@pytest.fixture(scope="session")
def emulated_library(setup: ModuleType, plan: Any, twins: list[Path]) -> Path:
    headers = _cuda_headers(plan)
    if headers is None:
        pytest.skip("no CUDA headers (cuda_fp16.h) to emulate the kernels with")
    flags = [
        *("-O1", "-w", f"-I{TEST_FOLDER}", "-isystem", str(headers), "-DERD_FAST_CUDA", "-DERD_FAST_EMULATED"),
        *("-DERD_FAST_LIBRARY=_erd_fast_test_emulated", f'-DERD_FAST_CUBLASLT="{STAND_IN}"'),
    ]
    sources = ("bindings.cpp", *setup.CUDA_SOURCES)
    objects = build_all(
        (f"emulated_{name}.o", functools.partial(_compile, setup, plan, name, flags)) for name in sources
    )
    return build("emulated.so", lambda output: setup.link_command(_cpu_only(setup, plan), [*objects, *twins], output))


def _cpu_only(setup: ModuleType, plan: Any) -> Any:
    return setup.Plan(plan.compiler, plan.torch)


def _compile(setup: ModuleType, plan: Any, name: str, flags: Sequence[str], output: Path) -> list[str]:
    """As setup.py compiles a source of csrc/, with more flags; the host compiler takes a .cu for C++."""
    compiler, *rest = setup.compile_command(_cpu_only(setup, plan), f"csrc/{name}", output)
    return [compiler, "-x", "c++", *rest, *flags]


def _cuda_headers(plan: Any) -> Path | None:
    """Headers of a toolkit, or those that come with torch; they are enough to emulate."""
    folders = [plan.toolkit and plan.toolkit / "include", plan.torch.parent / "nvidia/cu13/include"]
    return next((folder for folder in folders if folder and (folder / "cuda_fp16.h").is_file()), None)


@pytest.fixture(scope="session")
def headers(plan: Any) -> list[str]:
    """Flags for the folders of cublasLt.h and of what it includes: of a toolkit, and of torch's own libraries."""
    toolkit = [plan.toolkit / "include"] if plan.toolkit else []
    folders = [*toolkit, plan.torch.parent / "nvidia/cu13/include"]
    for name in ("cublasLt.h", "cuda_fp16.h", "crt/host_defines.h"):
        if not any((folder / name).is_file() for folder in folders):
            pytest.skip(f"no {name}")
    return [flag for folder in folders for flag in ("-isystem", str(folder))]


@pytest.fixture(scope="session")
def stand_in(plan: Any, headers: list[str]) -> Path:
    """The library that emulated kernels find in the place of cuBLASLt, once it is loaded."""
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", f"-Wl,-soname,{STAND_IN}", *headers]
    source = str(TEST_FOLDER / "cublaslt_stand_in.cpp")
    return build(STAND_IN, lambda output: [plan.compiler, *flags, source, "-o", str(output)])


@pytest.fixture(scope="session")
def cpu_ops(cpu_library: Path) -> Any:
    torch.ops.load_library(str(cpu_library))
    return torch.ops._erd_fast_test_cpu


@pytest.fixture(scope="session")
def emulated_ops(emulated_library: Path) -> Any:
    torch.ops.load_library(str(emulated_library))
    return torch.ops._erd_fast_test_emulated


@pytest.fixture(params=[*LEVELS, "emulated"])
def ops(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The ops under each instruction set of this machine, and the CUDA kernels emulated."""
    if request.param == "emulated":
        yield request.getfixturevalue("emulated_ops")
        return
    found = request.getfixturevalue("cpu_ops")
    best = found.cpu_level()
    if LEVELS[request.param] > best:
        pytest.skip(f"this CPU has no {request.param}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found.cpu_level(LEVELS[request.param])
    yield found
    found.cpu_level(best)
    torch.set_num_threads(threads)
