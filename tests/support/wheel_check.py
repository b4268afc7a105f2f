"""The wheel in ``dist/`` under the oldest torch that it admits and the newest that pip installs: ``make wheel-check``.

Each torch gets a virtual environment with the wheel and what the wheel depends on. In it, from a folder that holds
tests and no sources, run ``erd-fast info``, a look at the extension, and the tests of ops and kernels, those in
Triton's interpreter and ahead-of-time compilation included. A table comes last.
``make wheel-check PYTHON=python3.12`` does it for another Python.
"""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
VENVS = ROOT / "build" / "wheel-check"
TOOLS = ("hypothesis", "pytest", "pytest-xdist")  # in the versions of the dev extra
LARGEST = 5_000_000  # bytes of the wheel
# What an installation says of itself. `extension` loads the library; the functions to ask exist only then.
LOOK = """
import json, torch, triton, erd_fast
from erd_fast.ops.availability import extension
compiled, reason = extension()
ours = torch.ops._erd_fast_C
print(json.dumps({
    "__file__": erd_fast.__file__, "torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda,
    "compiled": sorted(compiled), "reason": "" if "cuda" in compiled else reason,
    "has_cuda": bool(compiled) and ours.has_cuda(), "has_cuda_stream": bool(compiled) and ours.has_cuda_stream(),
}))
"""


class CommandError(Exception):
    """A command failed; the message is what it said."""


@dataclass
class Row:
    """A line of the table, and what is wrong under its torch."""

    torch: str
    triton: str = "-"
    outcomes: Counter[str] = field(default_factory=Counter)  # of tests: passed, skipped, failure, error
    failures: list[str] = field(default_factory=list)


def newest_wheel() -> Path:
    wheels = sorted((ROOT / "dist").glob("erd_fast-*.whl"), key=lambda file: file.stat().st_mtime)
    if not wheels:
        raise SystemExit("wheel-check: no erd_fast-*.whl in dist/: run make wheel first")
    return wheels[-1]


def requirements(wheel: Path) -> list[str]:
    """``Requires-Dist`` of the wheel, extras included."""
    name = "-".join(wheel.name.split("-")[:2])
    return importlib.metadata.PathDistribution(zipfile.Path(wheel, f"{name}.dist-info/")).requires or []


def torch_versions(declared: list[str]) -> list[str]:
    """The oldest and the newest.

    The newest is what pip takes today where nothing is pinned, as for a user, and not the version of constraints.txt:
    ``make test`` has that one, and a torch that came after it is what can break a wheel that people have.
    """
    (oldest,) = (found[1] for text in declared if (found := re.fullmatch(r"torch>=([\d.]+)", text)))
    with tempfile.TemporaryDirectory() as folder:  # a pip of our own: this Python need not have one
        venv.create(folder, with_pip=True)
        python = Path(folder, "bin", "python")
        return list(dict.fromkeys(resolved(python, text) for text in (f"torch=={oldest}", "torch")))


def resolved(python: Path, requirement: str) -> str:
    options = ("--quiet", "--dry-run", "--no-deps", "--ignore-installed", "--report", "-")
    report = output([python, "-m", "pip", "install", *options, requirement])
    return str(json.loads(report)["install"][0]["metadata"]["version"])


def needed(version: str, declared: list[str]) -> list[str]:
    tools = [text.partition(";")[0] for text in declared if re.split(r"[=;<> ]", text)[0] in TOOLS]
    return [f"torch=={version}", *tools, *(text for text in declared if ";" not in text)]


def is_ready(version: str, declared: list[str]) -> bool:
    stamp = VENVS / version / "ready"
    return stamp.is_file() and stamp.read_text() == stamp_text(version, declared)


def stamp_text(version: str, declared: list[str]) -> str:
    return "\n".join((platform.python_version(), *needed(version, declared)))


def make_environment(version: str, wheel: Path, declared: list[str]) -> Path:
    """Python of the environment with this torch and the wheel. Only the wheel is installed anew each time."""
    folder = VENVS / version
    python = folder / "bin" / "python"
    if not is_ready(version, declared):
        venv.create(folder, clear=True, with_pip=True)
        output([python, "-m", "pip", "install", "--quiet", *needed(version, declared)])
        (folder / "ready").write_text(stamp_text(version, declared))  # last: half an installation is not a whole one
    output([python, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", wheel])
    return python


def copy_tests(folder: Path) -> None:
    """The tests of ops and kernels with what they share; pyproject.toml is pytest's configuration."""
    shutil.copy(ROOT / "pyproject.toml", folder)
    tests = folder / "tests"
    for name in ("ops", "kernels", "support"):
        shutil.copytree(ROOT / "tests" / name, tests / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "tests" / "conftest.py", tests)


def check(version: str, wheel: Path, declared: list[str]) -> Row:
    row = Row(version)
    print(f"\ntorch {version}", flush=True)
    try:
        python = make_environment(version, wheel, declared)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            copy_tests(folder)
            print(output([python.with_name("erd-fast"), "info"], folder), end="")
            facts = json.loads(output([python, "-c", LOOK], folder))
            print("\n".join(f"{name:<17}{value}" for name, value in facts.items()), flush=True)
            row.triton = facts["triton"]
            row.failures += wrong(facts, version, wheel)
            run_tests(python, folder, row)
    except CommandError as error:
        row.failures.append(str(error))
    return row


def wrong(facts: dict[str, Any], version: str, wheel: Path) -> list[str]:
    """What an installation says of itself and should not."""
    built = json.loads(zipfile.ZipFile(wheel).read("erd_fast/_build.json"))
    found = []
    if not Path(facts["__file__"]).is_relative_to(VENVS / version):
        found.append("erd_fast is not that of the wheel")
    if facts["torch"].partition("+")[0] != version:
        found.append(f"torch is {facts['torch']}")
    if "cpu" not in facts["compiled"]:
        found.append(f"no extension: {facts['reason']}")
    if built["cuda"] and facts["cuda"]:
        found += [f"{name} is false" for name in ("has_cuda", "has_cuda_stream") if not facts[name]]
    return found


def run_tests(python: Path, folder: Path, row: Row) -> None:
    report = folder / "report.xml"
    options = ("--quiet", "--numprocesses", "2", f"--junitxml={report}")
    status = subprocess.run([python, "-m", "pytest", *options], cwd=folder, env=surroundings()).returncode
    if status:
        row.failures.append(f"pytest ended with {status}")
    if not report.is_file():
        return
    for case in ElementTree.parse(report).iter("testcase"):
        outcome = next((child for child in case if child.tag in ("skipped", "failure", "error")), None)
        row.outcomes["passed" if outcome is None else outcome.tag] += 1
        # importorskip: in an environment made for these tests, nothing that they import may be missing.
        if outcome is not None and outcome.tag == "skipped" and "could not import" in (outcome.text or ""):
            row.failures.append(f"skipped: {outcome.text}")


def surroundings() -> dict[str, str]:
    """This process's environment without what points at a checkout or changes what an op runs on."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("ERD_FAST_", "PYTHON", "TRITON_"))}
    return kept | {"OMP_NUM_THREADS": "1"}


def output(command: list[str | Path], folder: Path = ROOT) -> str:
    done = subprocess.run(command, cwd=folder, env=surroundings(), capture_output=True, text=True)
    if done.returncode:
        said = f"{done.stdout}{done.stderr}".strip()
        raise CommandError(f"{' '.join(map(str, command))}: ended with {done.returncode}\n{said}")
    return done.stdout


def main() -> int:
    wheel = newest_wheel()
    size, declared = wheel.stat().st_size, requirements(wheel)
    versions = torch_versions(declared)
    print(f"{wheel.name} under torch {' and '.join(versions)}, in {VENVS.relative_to(ROOT)}/")
    if missing := [version for version in versions if not is_ready(version, declared)]:
        print(f"Installing torch {' and '.join(missing)}: about 3 GB to download, 6 GB on disk, each.", flush=True)
    rows = [check(version, wheel, declared) for version in versions]

    print(f"\n{'torch':<10}{'triton':<10}{'python':<10}{'tests passed':<24}wheel")
    for row in rows:
        tests = f"{row.outcomes['passed']} of {row.outcomes.total()}"
        tests += f", {row.outcomes['skipped']} skipped" if row.outcomes["skipped"] else ""
        print(f"{row.torch:<10}{row.triton:<10}{platform.python_version():<10}{tests:<24}{size / 1e6:.2f} MB")
    failures = [f"torch {row.torch}: {text}" for row in rows for text in row.failures]
    if size <= LARGEST:
        print(f"The wheel has {size:,} bytes: at most 5 MB.")
    else:
        failures.append(f"the wheel has {size:,} bytes: more than 5 MB")
    for text in failures:
        print(f"FAILED {text}")
    return int(bool(failures))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CommandError as error:
        sys.exit(f"wheel-check: {error}")
