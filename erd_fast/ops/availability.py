"""What this machine has: the compiled extension, a GPU and a driver that can run it, Triton."""

import ctypes
import functools
import importlib.util
import json
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

import erd_fast

_PACKAGE = Path(erd_fast.__file__).parent
_BUILD = "run pip install . in erd-fast's source folder with a C++ compiler (for cuda also nvcc) on PATH"


class Reason(NamedTuple):
    """Why something cannot run, and what to do about it."""

    reason: str
    remedy: str

    def __str__(self) -> str:
        return "; ".join(self)


NO_GPU = Reason(
    "no CUDA device is visible to PyTorch",
    "run it on a machine with an NVIDIA GPU, or take another backend (reference runs everywhere)",
)


def extension_unavailable(device: str) -> Reason | None:
    """Why the compiled kernels for ``cuda`` or ``cpu`` cannot run."""
    compiled, reason = extension()
    if device not in compiled:
        return Reason(reason, _BUILD)
    return _cuda_unavailable() if device == "cuda" else None


@functools.cache
def _cuda_unavailable() -> Reason | None:
    facts, driver = build_facts(), driver_version()
    if driver and (reason := driver_too_old(driver, facts.get("toolkit", 0))):  # PyTorch may not see the GPU then
        warnings.warn(f"the CUDA kernels are left out: {reason}", RuntimeWarning, stacklevel=2)
        return reason
    if not _gpu():
        return NO_GPU
    return too_old(torch.cuda.get_device_capability(), facts["archs"])


def driver_version() -> int:
    """The CUDA version of the driver, 13000 for 13.0; 0 without a driver."""
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return version.value


def too_old(capability: tuple[int, int], architectures: list[str]) -> Reason | None:
    """Why a GPU of this compute capability cannot run what was built for ``architectures``. The PTX of the lowest of
    them runs on whatever is newer."""
    found = 10 * capability[0] + capability[1]
    if found >= min(int(architecture.rstrip("af")) for architecture in architectures):
        return None
    return Reason(
        f"the extension was built for sm_{', sm_'.join(architectures)} and newer, and this GPU is sm_{found}",
        f"reinstall with ERD_FAST_CUDA_ARCHS={found}, or take another backend",
    )


def driver_too_old(driver: int, toolkit: int) -> Reason | None:
    """Why a driver of this CUDA version cannot run what this toolkit built; 13000 is 13.0. Machine code runs on every
    driver of its major version and of later ones."""
    if driver // 1000 >= toolkit // 1000:
        return None
    return Reason(
        f"the extension was built with CUDA {dotted(toolkit)}, and this driver is for CUDA {dotted(driver)}",
        f"update the driver, or reinstall with a toolkit of CUDA {driver // 1000}",
    )


def dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


@functools.cache
def _gpu() -> bool:
    return torch.cuda.is_available()


@functools.cache
def triton_unavailable() -> Reason | None:
    if importlib.util.find_spec("triton") is None:
        return Reason("Triton is not installed", "pip install triton")
    return None if _gpu() or interpreted() else NO_GPU


@functools.cache
def interpreted() -> bool:
    """Whether Triton runs its kernels on the CPU, slowly, for tests. Triton reads the variable once too."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def extension() -> tuple[frozenset[str], str]:
    """(compiled backends, why not more) of the extension ``erd_fast._C``, which is loaded at the first call."""
    built = build_facts()
    reason = str(built.get("reason") or "the compiled extension was not built")
    library = next(_PACKAGE.glob("_C*.so"), None)
    if library is None:
        return frozenset(), reason
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return frozenset(), f"the compiled extension does not load with torch {torch.__version__}: {error}"
    return frozenset(name for name in ("cpu", "cuda") if built.get(name)), reason


def build_facts() -> dict[str, Any]:
    """What setup.py wrote about the extension it built."""
    try:
        return dict(json.loads((_PACKAGE / "_build.json").read_text()))
    except (OSError, ValueError):
        return {}
