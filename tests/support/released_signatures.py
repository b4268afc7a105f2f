"""Records the signatures of other projects' functions that erd-fast calls: tests/ops/released_signatures.json.

    python tests/support/released_signatures.py [--git OWNER/NAME=FOLDER ...]

Sources come from PyPI (pip download, nothing is installed or run) and from GitHub at a tag or commit. ``--git`` names a
clone that is here already. Only facts are kept: names, parameters, defaults, the form of what is returned, versions and
dates. tests/ops/test_released_signatures.py binds our calls against them; rerun this when a project makes a release.
"""

import argparse
import ast
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

RECORD = Path(__file__).resolve().parents[1] / "ops" / "released_signatures.json"


class Source(NamedTuple):
    """Attributes:
    project: its name on PyPI or OWNER/NAME on GitHub.
    version: a version on PyPI; a tag or commit on GitHub.
    path: of the file that defines the functions.
    module: from which we import them.
    names: functions, or classes with a constructor or a ``forward``.
    """

    project: str
    version: str
    path: str
    module: str
    names: tuple[str, ...]


_FLASH, _APEX = "Dao-AILab/flash-attention", "NVIDIA/apex"
_FLASH_MAIN, _APEX_MAIN = "0251105a2fb19d2957484b7f023cd8c115286ced", "6424da3b4faa6c8f062da4a48c424fff3f02d42d"
_PACKED, _NORMS = ("flash_attn_qkvpacked_func",), ("fused_layer_norm", "fused_layer_norm_affine")
_FUSED_NORM = ("apex/normalization/fused_layer_norm.py", "apex.normalization.fused_layer_norm", _NORMS)
_FUSED_ADAM = ("apex/optimizers/fused_adam.py", "apex.optimizers", ("FusedAdam",))
SOURCES = (
    Source(_FLASH, "v2.8.3.post1", "flash_attn/flash_attn_interface.py", "flash_attn", _PACKED),
    # flash-attention 3 has no release of its own: its package on PyPI is empty, and it is installed from hopper/.
    Source(_FLASH, "v2.8.3.post1", "hopper/flash_attn_interface.py", "flash_attn_interface", _PACKED),
    Source(_FLASH, _FLASH_MAIN, "hopper/flash_attn_interface.py", "flash_attn_interface", _PACKED),
    Source("flash-attn-4", "4.0.0b36", "flash_attn/cute/interface.py", "flash_attn.cute", ("flash_attn_func",)),
    Source(_APEX, "25.09", *_FUSED_NORM),
    Source(_APEX, _APEX_MAIN, *_FUSED_NORM),
    Source(_APEX, "25.09", *_FUSED_ADAM),
    Source(_APEX, _APEX_MAIN, *_FUSED_ADAM),
    Source(
        "liger-kernel", "0.8.5", "liger_kernel/ops/layer_norm.py", "liger_kernel.ops.layer_norm",
        ("LigerLayerNormFunction",),
    ),
)  # fmt: skip


# ----------------------------------------------------------------------------
# sources


def read(source: Source, clones: dict[str, Path], folder: Path) -> tuple[str, str]:
    """The file's text, and the day of the release or commit."""
    if "/" not in source.project:
        return _from_wheel(source, folder)
    clone = clones.get(source.project)
    if clone is None:
        clone = clones[source.project] = folder / source.project.replace("/", "+")
        _run(
            "git",
            "clone",
            "--quiet",
            "--bare",
            "--filter=blob:none",
            f"https://github.com/{source.project}",
            str(clone),
        )
    git = ("git", "-C", str(clone))
    return _run(*git, "show", f"{source.version}:{source.path}"), _run(
        *git, "log", "-1", "--format=%cs", source.version
    )


def _from_wheel(source: Source, folder: Path) -> tuple[str, str]:
    into = folder / source.project
    pip = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:")
    _run(*pip, "--dest", str(into), f"{source.project}=={source.version}")
    (wheel,) = into.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        year, month, day = content.getinfo(source.path).date_time[:3]
        return content.read(source.path).decode(), f"{year}-{month:02}-{day:02}"


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


# ----------------------------------------------------------------------------
# signatures


def signature(module: ast.Module, name: str) -> dict[str, str]:
    """The parameters with their defaults, without annotations, and what a call returns: a tensor or a tuple."""
    function, constructor = _callable(module, name)
    arguments = ast.parse(ast.unparse(function.args).join(("def f(", "): ..."))).body[0].args  # a copy
    del arguments.args[: int(constructor)]
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    for argument in filter(None, every):
        argument.annotation = None
    found = {"signature": f"({ast.unparse(arguments)})"}
    if function.name != "__init__":
        lengths = set(_returned(module, function, {}))
        assert len(lengths) == 1, f"{name} returns {lengths}"
        found["returns"] = "tensor" if lengths == {1} else "tuple"
    return found


def _callable(module: ast.Module, name: str) -> tuple[ast.FunctionDef, bool]:
    """A function, or a class's constructor or ``forward``, which have a first argument that is not passed."""
    for node in module.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return node, False
        if isinstance(node, ast.ClassDef) and node.name == name:
            methods = {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}
            return methods["forward" if "forward" in methods else "__init__"], True
    raise LookupError(name)


def _returned(module: ast.Module, function: ast.FunctionDef, flags: dict[str, bool]) -> Iterator[int]:
    """How many values each return gives; ``flags`` are arguments that were passed on, by name."""
    arguments = function.args
    pairs = zip(reversed([*arguments.posonlyargs, *arguments.args]), reversed(arguments.defaults), strict=False)
    values = {argument.arg: _literal(default) for argument, default in pairs} | flags
    for node in ast.walk(function):
        if isinstance(node, ast.Return) and node.value is not None:
            yield from _count(module, node.value, values)


def _count(module: ast.Module, value: ast.expr, values: dict[str, Any]) -> Iterator[int]:
    if isinstance(value, ast.IfExp):
        yield from _count(module, value.body if _is_true(value.test, values) else value.orelse, values)
    elif isinstance(value, ast.Tuple):
        yield len(value.elts)
    elif isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr == "apply":
        forward, _ = _callable(module, ast.unparse(value.func.value))
        names = [argument.arg for argument in forward.args.args[1:]]
        passed = {
            name: values.get(ast.unparse(given))
            for name, given in zip(names, value.args, strict=False)
            if isinstance(given, ast.Name)
        }
        yield from _returned(module, forward, passed)
    elif isinstance(value, (ast.Name, ast.Subscript)):
        yield 1
    else:
        raise NotImplementedError(ast.unparse(value))


def _is_true(test: ast.expr, values: dict[str, Any]) -> bool:
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return not _is_true(test.operand, values)
    given = values[ast.unparse(test)]
    assert isinstance(given, bool), ast.unparse(test)
    return given


def _literal(value: ast.expr) -> Any:
    try:
        return ast.literal_eval(value)
    except ValueError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--git", nargs="*", default=[], metavar="OWNER/NAME=FOLDER", help="clones to read")
    options = parser.parse_args()
    clones = {project: Path(folder) for project, _, folder in (pair.partition("=") for pair in options.git)}
    records = []
    with tempfile.TemporaryDirectory() as folder:
        for source in SOURCES:
            text, day = read(source, clones, Path(folder))
            module = ast.parse(text)
            about = {"project": source.project, "version": source.version, "date": day, "path": source.path}
            for name in source.names:
                records.append({**about, "module": source.module, "name": name, **signature(module, name)})
                print(f"{source.project} {source.version[:12]} ({day}): {name}, returns {records[-1].get('returns')}")
    RECORD.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
