"""Which backend an op runs on: what is available, what was asked for, and why not the others.

``auto`` takes the first of an op's backends (cuda, triton, cpu, reference, if it has no order of its own) that is there
and supports the call. A backend that was asked for by name, through ``ERD_FAST_BACKEND`` or :func:`use_backend`, runs
or raises; only ``auto`` looks further.
"""

import contextlib
import contextvars
import ctypes
import functools
import importlib.util
import json
import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import erd_fast
from erd_fast.errors import ConfigError, unknown_name

OPS: dict[str, Any] = {}
"""Every declared op by its name, an :class:`erd_fast.ops.declare.Op`."""
BACKENDS = ("cuda", "triton", "cpu", "reference")
"""In the order in which ``auto`` tries them."""
_PACKAGE = Path(erd_fast.__file__).parent
_VARIABLE = "ERD_FAST_BACKEND"
_NO_GPU = "no CUDA device is visible to PyTorch"
_BUILD = "run pip install . in erd-fast's source folder with a C++ compiler (for cuda also nvcc) on PATH"

_chosen: contextvars.ContextVar[str | None] = contextvars.ContextVar("erd_fast_backend", default=None)


class _Traced(threading.local):
    """The same request where torch.compile can read it and guard its graphs by it: torch 2.11 traces no ContextVar, and
    of a thread-local object no attribute of its class."""

    def __init__(self) -> None:
        self.chosen: str | None = None


_traced = _Traced()


@contextlib.contextmanager
def use_backend(choice: str = "", **ops: str) -> Iterator[None]:
    """Run ops on named backends within a ``with`` block: ``use_backend("triton")`` for all ops that have it,
    ``use_backend(q_sample="cpu", draw="reference")`` or ``use_backend("q_sample=cpu,draw=reference")`` for single ones.

    The block's choice replaces that of ``ERD_FAST_BACKEND``; ``auto`` is a name too. A backward pass runs on the
    backend of its forward pass in any thread. A forward pass that torch.utils.checkpoint recomputes on a GPU runs in a
    thread of autograd, which knows the variable but not the block; ``context_fn`` of checkpoint can enter it there.

    Raises:
        ConfigError: unknown backend or op.
    """
    text = ",".join(filter(None, (choice, *(f"{op}={backend}" for op, backend in ops.items()))))
    _parsed(text, "use_backend")
    token, before = _chosen.set(text), _traced.chosen
    _traced.chosen = text
    try:
        yield
    finally:
        _chosen.reset(token)
        _traced.chosen = before


def asked_for(op: str, has: tuple[str, ...]) -> str | None:
    """The backend named for ``op``, which has the backends ``has``; None is auto.

    torch.compile traces this: a graph has the name as a constant. Another ``use_backend`` block recompiles; the
    environment variable is read once per graph.
    """
    return _named(_traced.chosen if torch.compiler.is_compiling() else _chosen.get(), op, has)


def _named(chosen: str | None, op: str, has: tuple[str, ...]) -> str | None:
    """By the text of a block, or where that is None by the environment."""
    choice = _parsed(os.environ.get(_VARIABLE, ""), _VARIABLE) if chosen is None else _parsed(chosen, "use_backend")
    general = choice.get("")
    named = choice.get(op, general if general in has else None)
    return None if named == "auto" else named


# What torch.compiler.assume_constant_result sets, which imports the compiler to do so. The text is guarded.
_named._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=64)
def _parsed(text: str, where: str) -> dict[str, str]:
    """``"triton"`` is {"": "triton"}; ``"q_sample=cuda,draw=cpu"`` is {"q_sample": "cuda", "draw": "cpu"}."""
    choice: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        op, _, backend = part.rpartition("=")
        if op and op not in OPS:
            raise ConfigError(f"{where}: {unknown_name('op', op, OPS)}")
        allowed = dict.fromkeys((*BACKENDS, *(name for declared in OPS.values() for name in declared.backends), "auto"))
        if backend not in allowed:
            raise ConfigError(f"{where}: {unknown_name('backend', backend, allowed)}")
        choice[op] = backend
    return choice


def absence(backend: str) -> tuple[str, str] | None:
    """(reason, remedy) why no op can run on ``backend`` here; None if it is there."""
    if backend == "reference":
        return None
    if backend == "triton":
        return _triton_absence()
    compiled, reason = extension()
    if backend not in compiled:
        return reason, _BUILD
    if backend == "cuda":
        return _cuda_absence()
    return None


@functools.cache
def _cuda_absence() -> tuple[str, str] | None:
    facts, driver = _build_facts(), _driver_version()
    if driver and (reason := driver_too_old(driver, facts.get("toolkit", 0))):  # PyTorch may not see the GPU then
        warnings.warn(f"the CUDA kernels are left out: {'; '.join(reason)}", RuntimeWarning, stacklevel=2)
        return reason
    if not _gpu():
        return _NO_GPU, "run it on a machine with an NVIDIA GPU, or take another backend"
    return too_old(torch.cuda.get_device_capability(), facts["archs"])


def _driver_version() -> int:
    """As CUDA counts, 13000 is 13.0; 0 where there is no driver."""
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return version.value


def too_old(capability: tuple[int, int], architectures: list[str]) -> tuple[str, str] | None:
    """(reason, remedy) why a GPU of this compute capability cannot run what was built for ``architectures``, or None.

    The PTX of the lowest of them runs on whatever is newer.
    """
    given = 10 * capability[0] + capability[1]
    if given >= min(int(architecture.rstrip("af")) for architecture in architectures):
        return None
    return (
        f"the extension was built for sm_{', sm_'.join(architectures)} and newer, and this GPU is sm_{given}",
        f"reinstall with ERD_FAST_CUDA_ARCHS={given}, or take another backend",
    )


def driver_too_old(driver: int, toolkit: int) -> tuple[str, str] | None:
    """(reason, remedy) why a driver of this CUDA version cannot run what this toolkit built, or None; 13000 is 13.0.

    Machine code runs on every driver of its major version and of later ones.
    """
    if driver // 1000 >= toolkit // 1000:
        return None
    return (
        f"the extension was built with CUDA {_dotted(toolkit)}, and this driver is for CUDA {_dotted(driver)}",
        f"update the driver, or reinstall with a toolkit of CUDA {driver // 1000}",
    )


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


@functools.cache
def _gpu() -> bool:
    return torch.cuda.is_available()


@functools.cache
def _triton_absence() -> tuple[str, str] | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed", "pip install triton"
    if not _gpu() and not interpreted():
        return _NO_GPU, "run it on a machine with an NVIDIA GPU, or take another backend (reference runs everywhere)"
    return None


@functools.cache
def interpreted() -> bool:
    """Whether Triton runs its kernels on the CPU, slowly, for tests. Triton reads the variable once too."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def extension() -> tuple[frozenset[str], str]:
    """(compiled backends, why not more) of the extension ``erd_fast._C``, which is loaded at the first call."""
    built = _build_facts()
    reason = str(built.get("reason") or "the compiled extension was not built")
    library = next(_PACKAGE.glob("_C*.so"), None)
    if library is None:
        return frozenset(), reason
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return frozenset(), f"the compiled extension does not load with torch {torch.__version__}: {error}"
    return frozenset(name for name in ("cpu", "cuda") if built.get(name)), reason


def _build_facts() -> dict[str, Any]:
    try:
        return dict(json.loads((_PACKAGE / "_build.json").read_text()))
    except (OSError, ValueError):
        return {}
