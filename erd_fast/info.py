"""What is installed here, which backends each op has, and why the others are unavailable."""

import importlib.metadata
import os
import platform
import textwrap
from typing import Any

import erd_fast
from erd_fast.files import cache_dir

_PACKAGES = ("torch", "triton", "numpy", "safetensors", "tyro")
_INDENT = 13


def collect() -> dict[str, Any]:
    """Versions, devices, folders, and ``["ops"][op][backend] = {"available": bool, "reason": str}``, first the backends
    that ``auto`` can take, in its order."""
    import torch

    from erd_fast import ops
    from erd_fast.benchmark.records import checkout_commit
    from erd_fast.ops.availability import dotted, driver_version
    from erd_fast.ops.core.selection import requested

    cuda, driver, (commit, changed) = torch.cuda.is_available(), driver_version(), checkout_commit()
    wanted = {name: requested(name) for name in sorted(ops.OPS)}
    return {
        "erd_fast": erd_fast.__version__,
        "commit": commit + " with changes" * bool(changed),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cuda": torch.version.cuda or "torch was built without CUDA",
        "driver_cuda": dotted(driver) if driver else "",
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if cuda else [],
        "cpu_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "extension": _extension(),
        "cache": str(cache_dir()),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("ERD_FAST_")},
        "requested": {name: backend for name, backend in wanted.items() if backend},
        "ops": {name: _states(op, ops.BACKENDS) for name, op in sorted(ops.OPS.items())},
    }


def describe() -> str:
    """:func:`collect` as text: a line for each op, and each reason once."""
    from erd_fast import ops

    facts = collect()
    extension = facts["extension"]
    rows = {
        "packages": ", ".join(f"{name} {version}" for name, version in facts["packages"].items()),
        "GPU": f"{', '.join(facts['gpus']) or 'none: everything runs on the CPU'} (CUDA of PyTorch {facts['cuda']}, "
        f"of the driver {facts['driver_cuda'] or 'none'})",
        "CPU": f"{facts['cpu_threads']} threads, {facts['cpu_capability']}",
        "extension": _compiled(extension),
        "cache": facts["cache"],
        "environment": ", ".join(f"{name}={value}" for name, value in facts["environment"].items()),
        "ops": "available backends in the order of auto (unavailable ones in parentheses)",
    }
    commit = f" (commit {facts['commit']})" if facts["commit"] else ""
    lines = [f"erd-fast {facts['erd_fast']}{commit}, Python {facts['python']}"]
    lines += [_wrapped(f"{name:<{_INDENT}}{text}") for name, text in rows.items() if text]

    reasons: dict[str, dict[str, None]] = {}  # reason -> backends, each once
    for op, states in facts["ops"].items():
        own, wanted = ops.OPS[op].backends, facts["requested"].get(op)
        there = [name for name, state in states.items() if state["available"]]
        missing = [name for name, state in states.items() if name in own and not state["available"]]
        requested = "as requested" if wanted in there else "requested but unavailable"
        request = f"{wanted}, {requested}; auto: " if wanted else ""
        rest = f" ({', '.join(missing)})" if missing else ""
        lines.append(_wrapped(f"  {op:<24} {request}{', '.join(there)}{rest}", 27))
        for name in missing:
            reasons.setdefault(states[name]["reason"], {})[name] = None
        if wanted and wanted not in own:
            reasons.setdefault(str(ops.OPS[op].why_not(wanted)), {})[f"{op}={wanted}"] = None
    if reasons:
        lines.append("unavailable")
    for reason, backends in reasons.items():
        why = "see extension above" if reason == extension["reason"] else reason
        lines.append(_wrapped(f"  {', '.join(backends)}: {why}", 4))
    return "\n".join(lines)


def _states(op: Any, general: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Whether the op can run on each backend here; if not, why, and what to do."""
    order = dict.fromkeys((*(backend.name for backend in op.available()), *op.backends, *general))
    reasons = {name: op.why_not(name) for name in order}
    return {name: {"available": it is None, "reason": str(it or "can run")} for name, it in reasons.items()}


def _extension() -> dict[str, Any]:
    """Which kernels the extension has, for which CUDA architectures, by which toolkit; why not more."""
    from erd_fast.ops.availability import build_facts, dotted, extension, extension_unavailable

    compiled, facts = extension()[0], build_facts()
    missing = next((name for name in ("cpu", "cuda") if name not in compiled), None)
    return {
        "cpu": "cpu" in compiled,
        "cuda": "cuda" in compiled,
        "archs": facts["archs"] if "cuda" in compiled else [],
        "toolkit": dotted(facts["toolkit"]) if "cuda" in compiled else "",
        "reason": str(extension_unavailable(missing)) if missing else "",
    }


def _compiled(extension: dict[str, Any]) -> str:
    cpu, cuda = (f"{name} kernels {'yes' if extension[name.lower()] else 'no'}" for name in ("CPU", "CUDA"))
    if extension["cuda"]:
        cuda += f", for sm_{', sm_'.join(extension['archs'])} (CUDA {extension['toolkit']})"
    return f"{cpu}; {cuda}{': ' * bool(extension['reason'])}{extension['reason']}"


def _wrapped(line: str, indent: int = _INDENT) -> str:
    return textwrap.fill(line, 120, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
