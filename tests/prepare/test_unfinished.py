"""unfinished: the store is the same however often the work was killed, and whoever did it.

Processes are forked from one that has done nothing yet but import: this file, run as a script.
"""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from erd_fast.data import writer
from erd_fast.errors import DataError, RunError
from erd_fast.prepare import encode as encode_module
from erd_fast.prepare.unfinished import Unfinished
from support.encoding import COUNT, content, encode_given
from support.pictures import image_folder

pytestmark = pytest.mark.slow


def _fork(call, *arguments) -> int:
    if (process := os.fork()) == 0:
        torch.set_num_threads(1)
        call(*arguments)
        os._exit(0)
    return process


def _die_at_rename(number: int, given: Path, dst: Path) -> None:
    """Encode, and die before the ``number``-th time that something gets its name."""
    left = [number]

    def counted(real):
        def rename(source, target):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            real(source, target)

        return rename

    os.replace, os.rename = counted(os.replace), counted(os.rename)
    encode_given(given, dst)


def _encode_as_rank(rank: int, size: int, given: Path, dst: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    encode_given(given, dst)


def _die_at_renames(given: Path, folder: Path) -> None:
    for kill in range(RENAMES + 1):
        os.waitpid(_fork(_die_at_rename, kill, given, folder / f"rename-{kill:02d}"), 0)


def _die_at_moments(given: Path, folder: Path) -> None:
    for kill in range(KILLS):
        process = _fork(encode_given, given, folder / f"moment-{kill:02d}")
        time.sleep(random.Random(kill).uniform(0, 0.5))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def _encode_side_by_side(given: Path, folder: Path) -> None:
    for size in SIZES:
        ranks = [_fork(_encode_as_rank, rank, size, given, folder / f"ranks-{size}") for rank in range(size)]
        assert [os.waitpid(rank, 0)[1] for rank in ranks] == [0] * size


def _come_late(given: Path, folder: Path) -> None:
    """Processes that find all shards there, and the store made meanwhile."""
    for kill in range(LATE):
        store = folder / f"late-{kill}"
        os.waitpid(_fork(_die_at_rename, RENAMES - 4, given, store), 0)  # before encode.json
        ranks = []
        for rank in range(3):
            ranks.append(_fork(_encode_as_rank, rank, 3, given, store))
            time.sleep(0.04 * kill)
        assert [os.waitpid(rank, 0)[1] for rank in ranks] == [0] * 3


RENAMES = 1 + 2 * 3 + 3 + 1  # settings; shards and their notes; encode.json, manifest, contact sheet; the store
KILLS, LATE, SIZES = 6, 2, (2, 3)


@pytest.fixture(scope="module")
def disturbed(given, tmp_path_factory) -> Path:
    """A folder with what processes left that were killed, and with what several made together."""
    folder = tmp_path_factory.mktemp("disturbed")
    tests = Path(__file__).parent.parent
    environment = {
        **os.environ,
        "PYTHONPATH": f"{tests}:{tests.parent}",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, __file__, str(given), str(folder)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    return folder


@pytest.mark.parametrize("kill", range(RENAMES + 1))
def test_killed_before_any_of_its_renames_it_goes_on_to_the_same_bytes(given, whole, disturbed, kill):
    store = disturbed / f"rename-{kill:02d}"
    assert store.exists() == (kill == RENAMES)  # nothing half-written
    encode_given(given, store)
    assert content(store) == whole
    assert not list(disturbed.glob(f".{store.name}*"))


@pytest.mark.parametrize("kill", range(KILLS))
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(given, whole, disturbed, kill):
    store = disturbed / f"moment-{kill:02d}"
    encode_given(given, store)
    assert content(store) == whole
    assert not list(disturbed.glob(f".{store.name}*"))


@pytest.mark.parametrize("size", SIZES)
def test_several_processes_make_the_same_bytes(whole, disturbed, size):
    assert content(disturbed / f"ranks-{size}") == whole
    assert not list(disturbed.glob(f".ranks-{size}*"))


def test_processes_that_come_late_leave_the_store_as_it_is(whole, disturbed):
    for kill in range(LATE):
        assert content(disturbed / f"late-{kill}") == whole
    assert not list(disturbed.glob(".late*"))


def test_the_last_to_leave_is_the_one_that_finds_nobody_else(tmp_path):
    work = Unfinished(tmp_path / "store")
    with work.joined(0) as first, work.joined(1) as second:
        with pytest.raises(RunError, match="another process is encoding into"), work.joined(1):
            pass
        assert not work.leave(first) and work.leave(second)


def test_a_process_says_what_it_leaves_to_others(given, whole, tmp_path, monkeypatch, capsys):
    for rank, left in ((1, "2 of 3 shards are left to other processes"), (0, "")):
        with monkeypatch.context() as patch:
            patch.setenv("RANK", str(rank))
            patch.setenv("WORLD_SIZE", "2")
            assert (encode_given(given, tmp_path / "store") is None) == bool(left)
        assert left in capsys.readouterr().out
    assert content(tmp_path / "store") == whole and not list(tmp_path.glob(".*"))


def test_killed_after_the_last_rename_it_tidies_up_or_begins_anew(given, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Unfinished, "remove", lambda work: None)
        encode_given(given, tmp_path / "store")
    assert list(tmp_path.glob(".*"))
    shutil.copytree(tmp_path, tmp_path.with_name("removed"))
    shutil.rmtree(tmp_path.with_name("removed") / "store")  # by its user, and with it the shards
    for folder in (tmp_path, tmp_path.with_name("removed")):
        encode_given(given, folder / "store")
        assert content(folder / "store") == whole and not list(folder.glob(".*"))


def test_what_appeared_meanwhile_is_kept_and_so_are_the_shards(given, whole, tmp_path, monkeypatch):
    def meanwhile(*_):
        (tmp_path / "store").mkdir()
        (tmp_path / "store" / "file").write_text("")
        return b""

    with monkeypatch.context() as patch:
        patch.setattr(encode_module, "contact_sheet", meanwhile)
        with pytest.raises(RunError, match=r"cannot write .*store: Directory not empty"):
            encode_given(given, tmp_path / "store")
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["file"]
    shutil.rmtree(tmp_path / "store")
    monkeypatch.setattr(encode_module, "decode_ahead", lambda *_, **__: (_ for _ in ()))
    encode_given(given, tmp_path / "store")
    assert content(tmp_path / "store") == whole


def test_what_is_finished_is_not_encoded_again(given, whole, tmp_path, monkeypatch, capsys):
    shutil.copytree(given / "whole", tmp_path / "store")
    monkeypatch.setattr(encode_module, "decode_ahead", None)
    assert len(encode_given(given, tmp_path / "store")) == COUNT
    assert "is finished" in capsys.readouterr().out


def test_shards_that_are_there_are_not_encoded_again(given, whole, tmp_path, monkeypatch):
    written: list[int] = []
    real = writer.write_shard

    def limited(folder, number, *rows):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(number)
        return real(folder, number, *rows)

    monkeypatch.setattr(encode_module, "write_shard", limited)
    with pytest.raises(KeyboardInterrupt):
        encode_given(given, tmp_path / "store")
    written[:] = [0]
    encode_given(given, tmp_path / "store")
    assert written == [0, 2] and content(tmp_path / "store") == whole


def test_a_full_disk_ends_with_one_message_and_what_is_finished_stays(given, whole, tmp_path, monkeypatch):
    real = writer.save_file

    def full(tensors, file):
        if "00001" in str(file):
            Path(file).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, file)

    monkeypatch.setattr(writer, "save_file", full)
    with pytest.raises(RunError, match=r"cannot write .*shard-00001.safetensors: No space left on device"):
        encode_given(given, tmp_path / "store")
    assert not (tmp_path / "store").exists()
    kept = sorted(path.name for path in (tmp_path / ".store.encoding" / "store").iterdir())
    assert kept == ["shard-00000.safetensors"]
    monkeypatch.undo()
    encode_given(given, tmp_path / "store")
    assert content(tmp_path / "store") == whole


def test_a_second_writer_is_refused(given, tmp_path, monkeypatch):
    real, seen = writer.write_shard, []

    def meanwhile(*arguments):
        if not seen:
            with pytest.raises(RunError, match=rf"another process is encoding into {tmp_path / 'store'}") as caught:
                encode_given(given, tmp_path / "store")
            seen.append(caught)
        return real(*arguments)

    monkeypatch.setattr(encode_module, "write_shard", meanwhile)
    assert len(encode_given(given, tmp_path / "store")) == COUNT and seen


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"size": 40}, "begun with size 32, given 40: go on with that, or remove .*.store.encoding to begin anew"),
        ({"flip": "stored"}, "begun with flip 'none', given 'stored'"),
        ({"batch_size": 4}, "begun with batch_size 3, given 4"),
        ({"src": "fewer"}, "begun with source 'images', given 'fewer'"),
    ],
)
def test_other_settings_do_not_go_on(given, tmp_path, monkeypatch, changed, message):
    if "src" in changed:
        changed = {"src": tmp_path / changed["src"]}
        image_folder(changed["src"], count=5, side=40)
    with monkeypatch.context() as patch:
        patch.setattr(encode_module, "write_manifest", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            encode_given(given, tmp_path / "store")
    with pytest.raises(DataError, match=message):
        encode_given(given, tmp_path / "store", **changed)
    assert len(encode_given(given, tmp_path / "store", workers=1, max_broken=7)) == COUNT  # these change no byte


if __name__ == "__main__":
    from diffusers import AutoencoderKL  # noqa: F401 - once for all that are forked

    for disturb in (_die_at_renames, _die_at_moments, _encode_side_by_side, _come_late):
        disturb(Path(sys.argv[1]), Path(sys.argv[2]))
