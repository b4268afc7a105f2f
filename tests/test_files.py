"""files: whole or absent."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from erd_fast.errors import DataError, RunError
from erd_fast.files import (
    cache_dir,
    make_folder,
    new_folder,
    read_json,
    remove_partial,
    whole_file,
    write_json,
    write_text,
)


def _below_a_file(folder: Path) -> Path:
    (folder / "file").write_text("")
    return folder / "file" / "below"


def test_the_cache_is_where_the_environment_says(monkeypatch):
    monkeypatch.setenv("ERD_FAST_CACHE", "/some/where")
    assert cache_dir() == Path("/some/where")
    for unset in ("", None):
        monkeypatch.setenv("ERD_FAST_CACHE", "") if unset == "" else monkeypatch.delenv("ERD_FAST_CACHE")
        assert cache_dir() == Path.home() / ".cache" / "erd-fast"


def test_folders_are_made_with_their_parents_and_kept(tmp_path):
    assert make_folder(tmp_path / "a" / "b").is_dir()
    (tmp_path / "a" / "b" / "kept").write_text("")
    assert (make_folder(tmp_path / "a" / "b") / "kept").is_file()


def test_a_folder_below_a_file_is_refused_by_name(tmp_path):
    path = _below_a_file(tmp_path)
    with pytest.raises(RunError, match=rf"cannot create the folder {path}: Not a directory"):
        make_folder(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused_by_name(tmp_path):
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(RunError, match=rf"no permission to write in {tmp_path}"):
            make_folder(tmp_path)
        with pytest.raises(RunError, match=r"cannot create the folder .*: Permission denied"):
            make_folder(tmp_path / "below")
    finally:
        tmp_path.chmod(0o755)


def test_text_is_replaced_whole(tmp_path):
    file = tmp_path / "text"
    write_text(file, "old")
    with open(file) as reader:
        write_text(file, "new ü")
        assert reader.read() == "old"  # another file took the name; this one was never written to
    assert file.read_text(encoding="utf-8") == "new ü"
    assert list(tmp_path.iterdir()) == [file]


def test_a_failed_write_keeps_the_old_text_and_leaves_nothing(tmp_path, monkeypatch):
    file = tmp_path / "text"
    write_text(file, "old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunError, match=f"cannot write {file}: No space left on device"):
        write_text(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_json_round_trip(tmp_path):
    value = {"b": [1, 2.5, None, "ü"], "a": {"c": True}}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value == json.loads((tmp_path / "x.json").read_text())


@pytest.mark.parametrize(("content", "message"), [(None, "does not exist"), (b"{", "JSON"), (b"\xff", "JSON")])
def test_json_that_cannot_be_read_is_named(tmp_path, content, message):
    file = tmp_path / "x.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=f"{file} .*{message}"):
        read_json(file)


def test_a_new_folder_appears_whole(tmp_path):
    path = tmp_path / "parent" / "folder"
    with new_folder(path) as partial:
        (partial / "content").write_text("all")
        assert not path.exists()
        assert partial.name.startswith(".")
    assert (path / "content").read_text() == "all"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("umask", "of_folders", "of_files"), [(0o022, 0o755, 0o644), (0o077, 0o700, 0o600), (2, 0o775, 0o664)]
)
def test_permissions_follow_the_umask(tmp_path, umask, of_folders, of_files):
    before = os.umask(umask)
    left = tmp_path / f".x.txt.{os.getpid()}.partial"  # by a process of this number
    left.touch(0o400)
    try:
        with new_folder(tmp_path / "folder") as folder:
            save_file({"x": torch.zeros(1)}, folder / "x.safetensors")
            write_json(folder / "x.json", {})
            (folder / "below").mkdir()
        with whole_file(tmp_path / "x.safetensors") as partial:
            save_file({"x": torch.zeros(1)}, partial)
        write_text(tmp_path / "x.txt", "new")
        write_text(tmp_path / "x.txt", "replaced")
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert len(modes) == 6
    assert {mode for path, mode in modes.items() if path.is_dir()} == {of_folders}
    assert {mode for path, mode in modes.items() if path.is_file()} == {of_files}


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(28, "No space left on device"), RunError),
        (SafetensorError("File too large"), RunError),
        (KeyError, KeyError),
    ],
)
def test_a_new_folder_that_fails_leaves_nothing(tmp_path, error, raised):
    def fill() -> None:
        with new_folder(tmp_path / "folder") as partial:
            (partial / "content").write_text("some")
            raise error

    with pytest.raises(raised) as caught:
        fill()
    assert raised is KeyError or str(tmp_path / "folder") in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_appeared_meanwhile_is_kept(tmp_path):
    path = tmp_path / "folder"
    with new_folder(path) as partial:
        (partial / "mine").write_text("")
        path.mkdir()
        (path / "theirs").write_text("")
    assert [file.name for file in path.iterdir()] == ["theirs"]
    assert list(tmp_path.iterdir()) == [path]


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    (tmp_path / ".step.x1.partial").mkdir()
    (tmp_path / ".step.x1.partial" / "model").write_text("")
    (tmp_path / ".text.17.partial").write_text("")
    for kept in ("step", ".lock", "a.partial"):
        (tmp_path / kept).write_text("")
    remove_partial(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "a.partial", "step"]
    remove_partial(tmp_path / "absent")
