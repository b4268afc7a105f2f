"""csrc, built for tests: the CPU twins at each instruction set, and the CUDA kernels run by cuda_emulation.h.

The flags are those of setup.py. Namespaces are renamed, since a process can register ``_erd_fast_C`` once only and an
installed extension may have done so.
"""

import fcntl
import importlib.util
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
LEVELS = {"baseline": 0, "avx2": 1, "avx512": 2}
# Emulated kernels take the place of the CPU twins, for whole batches.
EMULATED_TWINS = """
#include <stdexcept>
#include "launchers.h"
namespace erd_fast {
void draw_fwd_cpu(const DrawArguments& a, int64_t first, int64_t) {
    if (first == 0) launch_draw_fwd(a, nullptr);
}
void q_sample_fwd_cpu(const QSampleArguments& a, int64_t first, int64_t) {
    if (first == 0) launch_q_sample_fwd(a, nullptr);
}
void diffusion_loss_fwd_cpu(const DiffusionLossArguments&, int64_t, int64_t) {}
void diffusion_loss_sum_cpu(const DiffusionLossArguments& a) {
    launch_diffusion_loss_fwd(a, nullptr);
}
void grad_norm_fwd_cpu(const GradNormArguments&, int64_t, int64_t) {}
void grad_norm_sum_cpu(const GradNormArguments& a) {
    launch_grad_norm_fwd(a, nullptr);
}
void adamw_ema_advance_cpu(const AdamwEmaArguments& a) {
    launch_adamw_ema_fwd(a, nullptr);
}
void adamw_ema_fwd_cpu(const AdamwEmaArguments&, int64_t, int64_t) {}
int cpu_level() { return 0; }
bool set_cpu_level(int) { return false; }
}
"""


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
def built(tmp_path_factory: pytest.TempPathFactory, setup: ModuleType, plan: Any) -> Path:
    """Folder of the CPU part's objects, cpu.so and, where CUDA's headers are, emulated.so; one for all workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "csrc"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            _build(setup, plan, folder)
            (folder / "done").touch()
    return folder


def _build(setup: ModuleType, plan: Any, folder: Path) -> None:
    source = folder / "source"
    shutil.copytree(ROOT / "csrc", source)
    bindings = (source / "bindings.cpp").read_text()
    (source / "cpu.cpp").write_text(bindings.replace("_erd_fast_C", "_erd_fast_test_cpu"))
    cpu_only = setup.Plan(plan.compiler, plan.torch)
    twins = [name for name in setup.CPU_SOURCES if name != "bindings.cpp"]
    commands = [
        setup.compile_command(cpu_only, str(source / name), folder / f"{name}.o")
        for name in ("q_sample.cpp", "cpu.cpp", *(name for name in twins if name != "q_sample.cpp"))
    ]
    emulated: list[list[str]] = []
    headers = _cuda_headers(plan)
    if headers is not None:
        # What the CPU checks by reading the data must here reach the kernel.
        (source / "emulated.cpp").write_text(
            bindings.replace("_erd_fast_C", "_erd_fast_test_emulated")
            .replace("rows && !cuda &&", "false &&")
            .replace("STD_TORCH_CHECK(*a.counter >= 0 &&", "STD_TORCH_CHECK(true ||")
        )
        (source / "emulated_twins.cpp").write_text(EMULATED_TWINS)
        for name in setup.CUDA_SOURCES:
            (source / f"emulated_{name}.cpp").write_text(_emulated((source / name).read_text()))
        names = ("emulated.cpp", "emulated_twins.cpp", *(f"emulated_{name}.cpp" for name in setup.CUDA_SOURCES))
        extra = ["-O1", "-w", f"-I{ROOT / 'tests' / 'csrc'}", "-isystem", str(headers)]
        for name in names:
            command = setup.compile_command(cpu_only, str(source / name), folder / f"{name}.o")
            emulated.append([*command, *extra, *(["-DERD_FAST_CUDA"] if name != "emulated.cpp" else [])])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(setup.run, [*commands, *emulated]))
    setup.link(cpu_only, sorted(folder / f"{name}.o" for name in ("cpu.cpp", *twins)), folder / "cpu.so")
    if emulated:
        setup.link(cpu_only, [folder / f"{name}.o" for name in names], folder / "emulated.so")


def _cuda_headers(plan: Any) -> Path | None:
    """Headers of a toolkit, or those that come with torch; they are enough to emulate."""
    folders = [plan.toolkit and plan.toolkit / "include", plan.torch.parent / "nvidia/cu13/include"]
    return next((folder for folder in folders if folder and (folder / "cuda_fp16.h").is_file()), None)


def _emulated(text: str) -> str:
    text = re.sub(r"(\w+(?:<[^<>;]*>)?)<<<(.*?), stream>>>\((.*?)\);", r"emulate(\2, [&] { \1(\3); });", text)
    text = text.replace("extern __shared__ uint4 shared[];", "")
    assert "<<<" not in text and "emulate(" in text
    return '#include "cuda_emulation.h"\n' + text


@pytest.fixture(scope="session")
def cpu_ops(built: Path) -> Any:
    torch.ops.load_library(str(built / "cpu.so"))
    return torch.ops._erd_fast_test_cpu


@pytest.fixture(scope="session")
def emulated_ops(built: Path) -> Any:
    if not (built / "emulated.so").exists():
        pytest.skip("no CUDA headers (cuda_fp16.h) to emulate the kernels with")
    torch.ops.load_library(str(built / "emulated.so"))
    return torch.ops._erd_fast_test_emulated


@pytest.fixture(params=[*LEVELS, "emulated"])
def ops(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The ops under each instruction set of this machine, and the CUDA kernels emulated."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the emulation does a batch as a whole
    if request.param == "emulated":
        yield request.getfixturevalue("emulated_ops")
    else:
        found = request.getfixturevalue("cpu_ops")
        best = found.cpu_level()
        if LEVELS[request.param] > best:
            pytest.skip(f"this CPU has no {request.param}")
        found.cpu_level(LEVELS[request.param])
        yield found
        found.cpu_level(best)
    torch.set_num_threads(threads)
