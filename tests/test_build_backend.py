"""build_backend: torch is a build requirement where the extension lacks nothing else, and only there."""

import json
import os
import shutil
import subprocess
import venv
from pathlib import Path

import _distutils_hack
import pytest
import setuptools
import torch

pytestmark = pytest.mark.build

ROOT = Path(__file__).resolve().parent.parent
TORCH = Path(torch.__file__).parent
NOTHING = {"wheel": [], "editable": [], "sdist": []}
ONLY_TORCH = {"wheel": ["torch>=2.11"], "editable": ["torch>=2.11"], "sdist": []}
# As a frontend does it: build requirements are importable, and packages of the installing environment are not. A hook
# that a backend does not define requests nothing.
HOOKS = """
import json, sys, sysconfig
sys.path.remove(sysconfig.get_path("purelib"))
import build_backend, setup
kinds = ("wheel", "editable", "sdist")
requested = {kind: getattr(build_backend, f"get_requires_for_build_{kind}", list)() for kind in kinds}
print(json.dumps([requested, str(setup.find_torch())]))
"""
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


class Environments:
    """An environment that installs, and an isolated one with the build requirements."""

    def __init__(self, folder: Path):
        venv.create(folder / "venv", with_pip=False)
        self.python = folder / "venv" / "bin" / "python"
        (self.installing,) = (folder / "venv" / "lib").glob("python*/site-packages")
        self.isolated = folder / "isolated"
        self.isolated.mkdir()
        for module in (setuptools, _distutils_hack):
            package = Path(module.__file__).parent
            (self.isolated / package.name).symlink_to(package)

    def requested(self, **variables: str) -> tuple[dict[str, list[str]], str]:
        """(requirements by kind of distribution, folder of the torch that setup.py finds)."""
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{self.isolated}", "CXX": ""} | variables
        run = subprocess.run([self.python, "-c", HOOKS], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return tuple(json.loads(run.stdout))


@pytest.fixture
def environments(tmp_path):
    return Environments(tmp_path)


@needs_compiler
@pytest.mark.parametrize("cuda", ["auto", "0", "1"])
def test_torch_is_requested_where_no_environment_has_it(environments, cuda):
    assert environments.requested(ERD_FAST_CUDA=cuda) == (ONLY_TORCH, "None")


@pytest.mark.parametrize("where", ["installing", "isolated"])
def test_torch_that_is_installed_is_used(environments, where):
    folder = getattr(environments, where) / "torch"
    folder.symlink_to(TORCH)
    assert environments.requested() == (NOTHING, str(folder))


@needs_compiler
def test_torch_that_is_too_old_for_csrc_counts_as_none(environments):
    stable = environments.installing / "torch/include/torch/csrc/stable"
    stable.mkdir(parents=True)
    (stable / "library.h").touch()  # torch 2.9 has this header, and no version.h
    assert environments.requested() == (ONLY_TORCH, "None")


def test_without_a_compiler_torch_is_not_requested(environments):
    assert environments.requested(PATH="") == (NOTHING, "None")
