"""The package is whole in each of the ways it is used: wheel, editable installation, plain checkout."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.build

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("erd_fast", "kernels", "csrc", "build_backend.py", "setup.py", "pyproject.toml", "README.md", "LICENSE")
# What each installation must be able to do, from a folder that holds no sources.
SMOKE = (
    "import erd_fast, erd_fast.kernels, erd_fast.kernels.philox, erd_fast.cli, erd_fast.training.loop; "
    "print(erd_fast.__version__, erd_fast.kernels.__file__)"
)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the sources, since building writes beside them."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__", "_C*.so", "_build.json"))
        else:
            shutil.copy(source, copy / name)
    return copy


@pytest.fixture(scope="module")
def sdist(checkout, tmp_path_factory) -> Path:
    """The sources as an archive, which takes neither a compiler nor torch, whatever is requested of a wheel."""
    out = tmp_path_factory.mktemp("sdist")
    clean = os.environ | {"PYTHONPATH": str(checkout), "PATH": "", "CXX": "", "ERD_FAST_CUDA": "1"}
    code = f"import build_backend; print(build_backend.build_sdist({str(out)!r}))"
    run = subprocess.run([sys.executable, "-c", code], cwd=checkout, env=clean, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return out / run.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """Built from the sdist, which therefore holds all that it takes."""
    out = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(sdist))
    (file,) = out.glob("erd_fast-*.whl")
    return file


@pytest.fixture(scope="module")
def pure_wheel(checkout, tmp_path_factory) -> Path:
    """Built where the whole tools of Python are, and neither g++ nor nvcc."""
    out = tmp_path_factory.mktemp("pure-wheel")
    (out / "bin").mkdir()
    where = {"PATH": str(out / "bin"), "CUDA_HOME": "", "CUDA_PATH": "", "CXX": ""}
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(checkout), **where)
    (file,) = out.glob("erd_fast-*.whl")
    return file


def pip(*arguments: str, python: str = sys.executable, **environment: str) -> None:
    # Without the CUDA part: this is about what is where, and it takes seconds.
    chosen = os.environ | {"ERD_FAST_CUDA": "0"} | environment
    run = subprocess.run([python, "-m", "pip", "--quiet", *arguments], capture_output=True, text=True, env=chosen)
    assert run.returncode == 0, run.stderr


def run_from_root(python: str, code: str, **environment: str) -> str:
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run = subprocess.run([python, "-c", code], cwd="/", env=clean | environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def files_of_the_tree() -> set[str]:
    package = {str(file.relative_to(ROOT)) for file in (ROOT / "erd_fast").rglob("*.py")}
    kernels = {f"erd_fast/kernels/{file.name}" for file in (ROOT / "kernels").glob("*.py")}
    return package | kernels | {"erd_fast/py.typed"}


def test_the_wheel_holds_every_file_of_the_tree_and_no_other(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    built = {"erd_fast/_build.json"} | ({"erd_fast/_C.abi3.so"} if shutil.which("g++") else set())
    assert names == files_of_the_tree() | built
    assert wheel.stat().st_size < 5 << 20


def test_the_wheel_has_the_licence_and_the_command(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.endswith("licenses/LICENSE") for name in names)
    entry_points = next(name for name in names if name.endswith("entry_points.txt"))
    assert "erd-fast = erd_fast.cli:main" in zipfile.ZipFile(wheel).read(entry_points).decode()


def test_the_wheel_works_from_another_folder(wheel, tmp_path):
    pip("install", "--no-deps", "--no-compile", "--target", str(tmp_path), str(wheel))
    assert str(tmp_path / "erd_fast" / "kernels") in run_from_root(sys.executable, SMOKE, PYTHONPATH=str(tmp_path))
    said = run_from_root(sys.executable, "import erd_fast; print(erd_fast.explain('draw'))", PYTHONPATH=str(tmp_path))
    assert ("cpu: can run" in said) == (shutil.which("g++") is not None)


def test_without_a_compiler_the_wheel_is_pure_and_says_why(pure_wheel):
    assert "erd_fast/_C.abi3.so" not in zipfile.ZipFile(pure_wheel).namelist()
    facts = json.loads(zipfile.ZipFile(pure_wheel).read("erd_fast/_build.json"))
    assert not facts["cpu"] and not facts["cuda"] and facts["reason"]


def test_a_run_without_the_extension_says_so_in_one_line(pure_wheel, tiny, tmp_path):
    from erd_fast.training.config import config_text

    pip("install", "--no-deps", "--no-compile", "--target", str(tmp_path / "packages"), str(pure_wheel))
    (tmp_path / "tiny.yaml").write_text(config_text(tiny(train={"steps": 1})))
    arguments = ["train", "digits", "--config", f"{tmp_path}/tiny.yaml", "--out", f"{tmp_path}/run"]
    train = f"from erd_fast.cli import main; main({arguments})"
    clean = {"PYTHONPATH": str(tmp_path / "packages"), "CUDA_VISIBLE_DEVICES": "", "ERD_FAST_BACKEND": ""}
    lines = run_from_root(sys.executable, train, **clean).splitlines()
    (line,) = [number for number, text in enumerate(lines) if "compiled kernels" in text]
    assert lines[line] == (
        "training without the compiled kernels for cpu: no C++ compiler (g++, c++ or CXX) was found; "
        "run pip install . in erd-fast's source folder with a C++ compiler (for cuda also nvcc) on PATH"
    )
    assert line < next(number for number, text in enumerate(lines) if text.startswith("step 1/1"))


def test_an_editable_installation_works_from_another_folder(checkout, tmp_path):
    venv.create(tmp_path / "venv", with_pip=False)
    python = str(tmp_path / "venv" / "bin" / "python")
    library = sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv"), "platbase": str(tmp_path / "venv")})
    # torch and the rest come from this environment; a second copy would be gigabytes.
    (Path(library) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip("install", "--no-deps", "--no-build-isolation", "--editable", str(checkout), python=python)
    assert str(checkout / "kernels") in run_from_root(python, SMOKE)


def test_a_plain_checkout_works_without_installation(checkout):
    assert str(checkout / "kernels") in run_from_root(sys.executable, SMOKE, PYTHONPATH=str(checkout))


def test_a_foreign_kernels_package_beside_an_installed_one_is_left_alone(wheel, tmp_path):
    pip("install", "--no-deps", "--no-compile", "--target", str(tmp_path), str(wheel))
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("raise ImportError('the foreign one')")
    assert str(tmp_path / "erd_fast" / "kernels") in run_from_root(sys.executable, SMOKE, PYTHONPATH=str(tmp_path))


def test_tested_versions_satisfy_the_declared_ones():
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    for requirement in map(Requirement, project["dependencies"]):
        assert requirement.specifier.contains(pinned[requirement.name]), requirement
