"""What is installed here, which backend each op will use, and why not the others."""

import importlib.metadata
import os
import platform
from typing import Any

import erd_fast
from erd_fast.files import cache_dir

_PACKAGES = ("torch", "triton", "numpy", "safetensors", "tyro")


def collect() -> dict[str, Any]:
    """Versions, devices, folders, and ``["ops"][op][backend] = {"available": bool, "reason": str}``."""
    import torch

    from erd_fast import ops

    cuda = torch.cuda.is_available()
    return {
        "erd_fast": erd_fast.__version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cuda": torch.version.cuda or "torch was built without CUDA",
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if cuda else [],
        "cpu_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cache": str(cache_dir()),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("ERD_FAST_")},
        "ops": {
            name: {backend: _state(op, backend) for backend in dict.fromkeys((*op.backends, *ops.BACKENDS))}
            for name, op in sorted(ops.OPS.items())
        },
    }


def describe() -> str:
    """:func:`collect` as text."""
    facts = collect()
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    lines = [
        f"erd-fast {facts['erd_fast']}, Python {facts['python']}",
        f"packages     {packages}",
        f"GPU          {', '.join(facts['gpus']) or 'none: everything runs on the CPU'} (CUDA {facts['cuda']})",
        f"CPU          {facts['cpu_threads']} threads, {facts['cpu_capability']}",
        f"cache        {facts['cache']}",
        *(f"environment  {name}={value}" for name, value in facts["environment"].items()),
        "ops",
    ]
    for op, backends in facts["ops"].items():
        for backend, state in backends.items():
            mark = "available" if state["available"] else "not available"
            lines.append(f"  {op:<24}{backend:<14}{mark}: {state['reason']}")
    return "\n".join(lines)


def _state(op: Any, backend: str) -> dict[str, Any]:
    """Whether the op can run on the backend here; if not, why, and what to do."""
    reason = op.why_not(backend)
    return {"available": reason is None, "reason": str(reason or "can run")}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
