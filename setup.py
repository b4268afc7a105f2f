"""Builds csrc/ into erd_fast/_C.abi3.so; everything else about the package is in pyproject.toml.

torch is never imported: its headers and libraries are found by path, in the environment that installs (also under build
isolation) or else in the isolated build environment, where build_backend.py had torch installed. One binary serves
Python >= 3.11 (limited API) and torch >= 2.11 (stable ABI), with or without a GPU.

What is there decides what is built: nvcc and a compiler, both parts; a compiler, the CPU part; otherwise none, and
erd-fast runs in PyTorch. erd_fast/_build.json says which, and why not more; ``erd-fast info`` prints it.

    ERD_FAST_CUDA=auto|0|1      1 fails where the CUDA part cannot be built, 0 leaves it out
    ERD_FAST_CUDA_ARCHS=80;90   machine code for these, PTX of the lowest for what is newer; default 80;90;100
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CPU_SOURCES = ("bindings.cpp", "draw.cpp", "q_sample.cpp", "diffusion_loss.cpp", "grad_norm.cpp", "adamw_ema.cpp",
               "cpu_twin.cpp")  # fmt: skip
CUDA_SOURCES = ("draw.cu", "q_sample.cu", "diffusion_loss.cu", "linear_gelu.cu", "grad_norm.cu", "adamw_ema.cu")
HEADERS = ("adamw_ema.h", "chunks.h", "cublaslt.h", "cpu_twin.h", "diffusion_math.h", "host_device.h", "kernel.cuh",
           "launchers.h", "philox.h")  # fmt: skip
LIBRARY, RECORD = "_C.abi3.so", "_build.json"
DEFAULT_ARCHS = ("80", "90", "100")

DEFINES = ("-DTORCH_TARGET_VERSION=0x020b000000000000", "-DPy_LIMITED_API=0x030b0000", "-DNDEBUG")
# A product and a sum are never contracted, so that CPU, GPU and the definition agree; nothing is reordered.
CXX_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
             "-ffp-contract=off", "-Wall", "-Wextra")  # fmt: skip
NVCC_FLAGS = ("-std=c++17", "-O3", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra")


@dataclass
class Plan:
    """What this environment can build, and the reason for what it cannot."""

    compiler: str | None = None
    torch: Path | None = None
    toolkit: Path | None = None
    archs: list[str] = field(default_factory=list)
    reason: str = ""

    @property
    def cpu(self) -> bool:
        return self.compiler is not None and self.torch is not None


@cache
def plan() -> Plan:
    if reason := missing_tool():
        return without_cuda(Plan(reason=reason))
    torch = find_torch()
    if torch is None:
        return without_cuda(Plan(reason="torch was not found when erd-fast was built, or only one that is too old"))
    found = Plan(find_compiler(), torch)
    if wanted_cuda() == "0":
        found.reason = "ERD_FAST_CUDA=0 left the CUDA part out"
        return found
    toolkit, reason = find_toolkit(torch.parent)
    if toolkit is None:
        found.reason = reason
        return without_cuda(found)
    found.toolkit, found.archs = toolkit, architectures(toolkit)
    return found


def wanted_cuda() -> str:
    value = os.environ.get("ERD_FAST_CUDA", "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"ERD_FAST_CUDA: given {value!r}, allowed auto, 0 or 1")
    return value


def without_cuda(found: Plan) -> Plan:
    if wanted_cuda() == "1":
        raise SystemExit(f"ERD_FAST_CUDA=1, but the CUDA part cannot be built: {found.reason}")
    return found


def missing_tool() -> str:
    """Why nothing can be compiled here, whether torch is found or not; empty if it can."""
    if find_compiler() is None:
        return "no C++ compiler (g++, c++ or CXX) was found"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Python.h was not found: install Python's development package"
    return ""


def find_compiler() -> str | None:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def find_torch() -> Path | None:
    """The torch of the environment that installs, to which sysconfig points under pip's build isolation too, or else
    the one that was installed for the build."""
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path]
    for folder in dict.fromkeys(folders):
        # A header of torch 2.10. csrc does not compile with older ones; where they are, pip is about to replace them.
        if (Path(folder) / "torch/include/torch/csrc/stable/version.h").is_file():
            return Path(folder) / "torch"
    return None


def find_toolkit(packages: Path) -> tuple[Path | None, str]:
    """Folder of a CUDA toolkit, or None and what is missing. ``nvcc`` on PATH may be a wrapper: it is asked."""
    candidates = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    if nvcc := shutil.which("nvcc"):
        candidates.append(Path(nvcc).resolve().parent.parent)
        asked = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
        candidates += [Path(top).resolve() for top in re.findall(r"^#\$ TOP=(.+)$", asked.stderr, re.MULTILINE)]
    candidates += [packages / "nvidia/cu13", packages / "nvidia/cu12", Path("/usr/local/cuda")]
    for folder in candidates:
        if all(path.is_file() for path in (folder / "bin/nvcc", folder / "include/cuda_runtime.h")):
            if cudart(folder) is None:
                return None, f"libcudart_static.a is missing in the CUDA toolkit {folder}"
            return folder, ""
    return None, "no CUDA toolkit (nvcc with include/cuda_runtime.h) was found: set CUDA_HOME"


def cudart(toolkit: Path) -> Path | None:
    folders = ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib")
    return next((file for name in folders if (file := toolkit / name / "libcudart_static.a").is_file()), None)


def architectures(toolkit: Path) -> list[str]:
    if given := os.environ.get("ERD_FAST_CUDA_ARCHS"):
        archs = re.split(r"[;, ]+", given.strip().replace(".", ""))
        if not all(re.fullmatch(r"\d{2,3}[af]?", arch) for arch in archs):
            raise SystemExit(f"ERD_FAST_CUDA_ARCHS: given {given!r}, allowed numbers such as 80;90;100")
        return archs
    known = subprocess.run([toolkit / "bin/nvcc", "--list-gpu-code"], capture_output=True, text=True).stdout
    return [arch for arch in DEFAULT_ARCHS if f"sm_{arch}" in known.split()]


def nvcc_command(toolkit: Path, compiler: str, archs: list[str], source: Path | str, output: Path) -> list[str]:
    lowest = min(archs, key=lambda arch: int(arch.rstrip("af"))).rstrip("af")
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    codes.append(f"-gencode=arch=compute_{lowest},code=compute_{lowest}")
    flags = [*NVCC_FLAGS, "-DERD_FAST_CUDA", "-DNDEBUG", f"-ccbin={compiler}", *codes]
    return [str(toolkit / "bin/nvcc"), *flags, "-c", str(source), "-o", str(output)]


class BuildError(Exception):
    """A compiler or linker refused; the message is what it said."""


def run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    if done.stderr:
        print(done.stderr, file=sys.stderr)


def compile_all(found: Plan, work: Path, sources: Sequence[str]) -> list[Path]:
    """Compile sources of csrc/ into ``work``, as many at a time as there are processors; the objects."""
    work.mkdir(parents=True, exist_ok=True)
    objects = [work / f"{name}.o" for name in sources]
    commands = [compile_command(found, f"csrc/{name}", item) for name, item in zip(sources, objects, strict=True)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, commands))
    return objects


def compile_command(found: Plan, source: str, output: Path) -> list[str]:
    assert found.compiler and found.torch
    if found.toolkit and source.endswith(".cu"):
        return nvcc_command(found.toolkit, found.compiler, found.archs, source, output)
    folders = [found.torch / "include", sysconfig.get_path("include")]
    cuda = ["-DERD_FAST_CUDA"] if found.toolkit else []
    if found.toolkit:
        folders.append(found.toolkit / "include")
    includes = [part for folder in folders for part in ("-isystem", str(folder))]
    return [found.compiler, *CXX_FLAGS, *DEFINES, *cuda, *includes, "-c", source, "-o", str(output)]


def link(found: Plan, objects: Sequence[Path], output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    run(link_command(found, objects, output))


def link_command(found: Plan, objects: Sequence[Path], output: Path) -> list[str]:
    assert found.compiler and found.torch
    # --no-as-needed: nothing of libtorch.so itself is used, but through it the library sees libtorch_cuda.so where that
    # exists. No rpath: ``import torch`` has loaded both.
    libraries = [f"-L{found.torch / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu", "-ltorch", "-Wl,--as-needed"]
    if found.toolkit:
        libraries += [str(cudart(found.toolkit)), "-ldl", "-lrt", "-lpthread"]
    flags = ["-shared", "-s", "-Wl,--exclude-libs,ALL"]
    return [found.compiler, *flags, *map(str, objects), *libraries, "-o", str(output)]


def build_library(found: Plan, output: Path, work: Path) -> None:
    cuda = CUDA_SOURCES if found.toolkit else ()
    link(found, compile_all(found, work, (*cuda, *CPU_SOURCES)), output)  # the slow ones first


def describe(found: Plan, *, cpu: bool) -> dict[str, object]:
    cuda = cpu and found.toolkit is not None
    facts = {"archs": found.archs, "toolkit": version(found.toolkit)} if cuda and found.toolkit else {"archs": []}
    return {"cuda": cuda, "cpu": cpu, **facts, "reason": found.reason}


def version(toolkit: Path) -> int:
    """As CUDA counts: 13000 is 13.0."""
    header = (toolkit / "include/cuda_runtime_api.h").read_text(errors="replace")
    return int(re.findall(r"#define CUDART_VERSION\s+(\d+)", header)[0])


class BuildExt(build_ext):
    """Compiles in our own way: nvcc beside g++, in parallel, without torch's build helpers."""

    def build_extension(self, ext: Extension) -> None:
        found = plan()
        output, work = Path(self.get_ext_fullpath(ext.name)).resolve(), Path(self.build_temp).resolve()
        cpu = True
        try:
            try:
                build_library(found, output, work)
            except BuildError as error:
                if found.toolkit is None or wanted_cuda() == "1":
                    raise
                print(f"erd-fast: the CUDA part failed to build and is left out:\n{error}", file=sys.stderr)
                found.toolkit, found.reason = None, f"the CUDA part failed to build: {first_error(error)}"
                build_library(found, output, work)
        except BuildError as error:
            if wanted_cuda() == "1":
                raise SystemExit(f"erd-fast: {error}") from None
            print(f"erd-fast: csrc failed to build, PyTorch is used instead:\n{error}", file=sys.stderr)
            cpu, found.reason = False, f"csrc failed to build: {first_error(error)}"
        record(output.parent, describe(found, cpu=cpu))

    def copy_extensions_to_source(self) -> None:
        """For ``--inplace`` and editable installations."""
        record(ROOT / "erd_fast", json.loads((Path(self.build_lib) / "erd_fast" / RECORD).read_text()))
        super().copy_extensions_to_source()


def first_error(error: BuildError) -> str:
    lines = str(error).splitlines()
    return next((line.strip() for line in lines[1:] if "error" in line.lower()), lines[-1].strip())


class BuildPy(build_py):
    """Adds _build.json where there is nothing to compile; BuildExt writes it otherwise."""

    def run(self) -> None:
        super().run()
        if not plan().cpu:
            folder = ROOT if self.editable_mode else Path(self.build_lib)
            record(folder / "erd_fast", describe(plan(), cpu=False))


def record(folder: Path, built: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).write_text(json.dumps(built) + "\n")
    if not built["cpu"]:
        (folder / LIBRARY).unlink(missing_ok=True)  # of an earlier build
    print(f"erd-fast: {built}")


def extensions() -> list[Extension]:
    if "sdist" not in sys.argv and not plan().cpu:  # an sdist has the sources, whatever this machine can build
        return []
    sources = [f"csrc/{name}" for name in (*CPU_SOURCES, *CUDA_SOURCES)]
    # `depends` takes files into the sdist.
    depends = [*(f"csrc/{name}" for name in HEADERS), "build_backend.py"]
    # optional: BuildExt says itself what failed, and an installation goes on without.
    return [Extension("erd_fast._C", sources=sources, depends=depends, py_limited_api=True, optional=True)]


if __name__ == "__main__":
    compiled = extensions()
    setup(
        ext_modules=compiled,
        cmdclass={"build_ext": BuildExt, "build_py": BuildPy},
        options={"bdist_wheel": {"py_limited_api": "cp311"}} if compiled else {},
    )
