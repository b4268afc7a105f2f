"""support.builds: what is compiled again, and what is not."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from support import builds

# Stands for a compiler: notes that it ran, then writes its output.
PROGRAM = "import sys; open(sys.argv[1], 'a').write('ran '); print('done'); open(sys.argv[2], 'w').write(sys.argv[3])"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(builds, "_folder", lambda: tmp_path)
    return tmp_path


def _build(folder: Path, text: str = "one") -> Path:
    return builds.build("a.o", lambda output: [sys.executable, "-c", PROGRAM, str(folder / "runs"), str(output), text])


def test_the_same_command_runs_once(folder):
    first = _build(folder)
    assert _build(folder) == first and first.read_text() == "one" and first.name.endswith("-a.o")
    assert builds.log_of(first).read_text() == "done\n"
    assert (folder / "runs").read_text() == "ran "
    assert _build(folder, "two").read_text() == "two" and first.read_text() == "one"
    assert (folder / "runs").read_text() == "ran ran "


def test_a_changed_source_is_compiled_again(folder, monkeypatch):
    first = _build(folder)
    monkeypatch.setattr(builds, "_sources", lambda: "others")
    assert _build(folder) != first
    one, two = (builds.source("a.cpp", text) for text in ("int a;", "int b;"))
    assert one != two and builds.source("a.cpp", "int a;") == one and one.read_text() == "int a;"


def test_sources_are_those_of_csrc_and_of_its_tests(tmp_path, monkeypatch):
    for name in ("csrc", "tests/csrc"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setattr(builds, "ROOT", tmp_path)
    digests = {builds._sources.__wrapped__()}
    for name in ("csrc/a.cu", "csrc/a.h", "tests/csrc/b.cpp"):
        for text in ("1", "2"):
            (tmp_path / name).write_text(text)
            digests.add(builds._sources.__wrapped__())
    assert len(digests) == 7
    (tmp_path / "tests/csrc/test_a.py").write_text("a test may change")
    assert builds._sources.__wrapped__() in digests


def test_two_at_once_compile_once(folder):
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: _build(folder), range(8)))
    assert len(found) == 1 and (folder / "runs").read_text() == "ran "


def test_a_failure_leaves_no_result(folder):
    fails = "import sys; open(sys.argv[1], 'w').write('half'); sys.exit('a.cpp:1: error')"
    for _ in range(2):
        with pytest.raises(builds.CompileError, match=r"a\.cpp:1: error"):
            builds.build("a.o", lambda output: [sys.executable, "-c", fails, str(output)])
    assert not list(folder.glob("*.o"))


def test_what_is_not_used_for_long_is_deleted(folder):
    old, used = _build(folder, "old"), _build(folder, "used")
    for file in folder.iterdir():
        os.utime(file, (0, 0))
    assert _build(folder, "used") == used
    builds.delete_unused(folder)
    assert used.exists() and builds.log_of(used).exists() and not old.exists() and not builds.log_of(old).exists()
