"""encode: the store is what the autoencoder says, however often the work was killed, and whoever did it."""

import dataclasses
import errno
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from erd_fast import cli
from erd_fast.data import LatentStore, writer
from erd_fast.data import encode as encode_module
from erd_fast.data.autoencoder import Autoencoder
from erd_fast.data.encode import EncodeOptions, encode
from erd_fast.data.pictures import decode, open_pictures
from erd_fast.data.unfinished import Unfinished
from erd_fast.errors import ConfigError, DataError, RunError
from erd_fast.random import Purpose, Stream, normals
from fixtures import latent_store
from pictures import COLLECTIONS, image_folder, tiny_vae

COUNT = 11
OPTIONS = EncodeOptions(size=32, batch_size=3, shard_size=4, workers=2)


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """A folder with ``images`` and ``vae``."""
    folder = tmp_path_factory.mktemp("given")
    image_folder(folder / "images", count=COUNT, side=40)
    tiny_vae(folder / "vae", size=32, count=COUNT)
    return folder


@pytest.fixture(scope="module")
def whole(given) -> dict[str, bytes]:
    """The store that an undisturbed encoding makes."""
    encode(given / "images", given / "whole", str(given / "vae"), OPTIONS)
    assert not list(given.glob(".*"))
    return _content(given / "whole")


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _encode(given: Path, dst: Path, src: str = "images", **options) -> LatentStore | None:
    return encode(given / src, dst, str(given / "vae"), dataclasses.replace(OPTIONS, **options))


def _vae(given: Path):
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(given / "vae").eval()


def _posterior(given: Path, mirrored: bool = False):
    pictures = open_pictures(given / "images")
    pixels = np.stack([decode(pictures.read(i), 32) for i in range(len(pictures))])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.inference_mode():
        return _vae(given).encode(images.flip(3) if mirrored else images).latent_dist


def test_rows_are_moments_of_the_autoencoder_in_the_order_of_the_images(given, whole):
    store, posterior = LatentStore(given / "whole", verify=True), _posterior(given)
    stored = store.gather(torch.arange(COUNT)).float()
    torch.testing.assert_close(stored[:, :4], posterior.mean, rtol=2**-10, atol=1e-5)
    torch.testing.assert_close(stored[:, 4:], posterior.std, rtol=2**-10, atol=1e-5)
    assert store.labels.tolist() == open_pictures(given / "images").labels
    manifest = store.manifest
    factor = json.loads((given / "vae" / "config.json").read_text())["scaling_factor"]
    assert (manifest.kind, manifest.shape, manifest.dtype) == ("mean_std", (4, 4, 4), "float16")
    assert (manifest.scale, manifest.shift, manifest.class_names) == ((factor,) * 4, (), ("china", "flower"))
    assert (manifest.crop, manifest.flip, manifest.pixel_range) == ("adm-center", "none", (-1.0, 1.0))
    assert manifest.vae.startswith("vae@") and [shard.count for shard in manifest.shards] == [4, 4, 3]
    assert json.loads(whole["encode.json"])["broken"] == [] and str(given) not in whole["encode.json"].decode()


def test_log_variance_and_float32_are_kept_on_request(given, tmp_path):
    store, posterior = _encode(given, tmp_path / "s", kind="mean_logvar", dtype="float32"), _posterior(given)
    assert (store.manifest.kind, store.manifest.dtype) == ("mean_logvar", "float32")
    expected = torch.cat((posterior.mean, posterior.logvar), 1)
    torch.testing.assert_close(store.gather(torch.arange(COUNT)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("flip", ["none", "stored"])
def test_a_sample_is_drawn_by_the_number_of_its_row(given, tmp_path, flip):
    store, posterior = _encode(given, tmp_path / "s", kind="sample", flip=flip, seed=5), _posterior(given)
    views = 2 if flip == "stored" else 1
    noise = normals(5, Purpose.ENCODE, Stream.POSTERIOR, views * torch.arange(COUNT), (4, 4, 4))
    found = store.gather(views * torch.arange(COUNT)).float()
    assert (store.manifest.kind, store.manifest.shape) == ("sample", (4, 4, 4))
    torch.testing.assert_close(found, posterior.mean + posterior.std * noise, rtol=2**-10, atol=1e-4)


def test_mirror_images_follow_the_images(given, tmp_path):
    store = _encode(given, tmp_path / "s", flip="stored")
    assert len(store) == 2 * COUNT and store.manifest.flip == "stored"
    rows = store.gather(torch.arange(2 * COUNT)).float()[:, :4]
    for first, mirrored in ((0, False), (1, True)):
        torch.testing.assert_close(rows[first::2], _posterior(given, mirrored).mean, rtol=2**-10, atol=1e-5)
    assert torch.equal(store.labels[::2], store.labels[1::2])


@pytest.mark.parametrize("form", [form for form in COLLECTIONS if form != "images"])
def test_every_form_makes_the_same_rows(given, whole, tmp_path, form):
    COLLECTIONS[form](tmp_path / form, count=COUNT, side=40)
    encode(tmp_path / form, tmp_path / "store", str(given / "vae"), OPTIONS)
    found = _content(tmp_path / "store")
    assert [found[name] == content for name, content in whole.items() if name.startswith("shard")] == [True] * 3


def test_shards_and_threads_change_no_row(given, whole, tmp_path):
    store = _encode(given, tmp_path / "s", shard_size=9, workers=1)  # batches begin where they did
    assert [shard.count for shard in store.manifest.shards] == [9, 2]
    assert torch.equal(store.gather(torch.arange(3)), LatentStore(given / "whole").gather(torch.arange(3)))


@pytest.mark.parametrize("threads", [2, 5])
def test_the_number_of_threads_changes_no_byte_and_stays(given, whole, tmp_path, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        _encode(given, tmp_path / "s", workers=threads)
        assert torch.get_num_threads() == threads
        assert ThreadPoolExecutor(1).submit(torch.get_num_threads).result() == threads
    finally:
        torch.set_num_threads(before)
    assert _content(tmp_path / "s") == whole


def test_shift_and_a_pipelines_folder_are_understood(given, tmp_path):
    shutil.copytree(given / "vae", tmp_path / "pipeline" / "vae")
    config = tmp_path / "pipeline" / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"shift_factor": 0.25, "scaling_factor": 2.0}))
    store = encode(given / "images", tmp_path / "s", str(tmp_path / "pipeline"), OPTIONS)
    assert (store.manifest.scale, store.manifest.shift) == ((2.0,) * 4, (0.25,) * 4)
    assert store.manifest.vae.startswith("pipeline@")


def test_means_and_stds_of_channels_are_understood(given, tmp_path):
    vae = _altered(given, tmp_path / "vae", latents_mean=[1, 2, 3, 0], latents_std=[1, 2, 4, 8], scaling_factor=0.5)
    manifest = encode(given / "images", tmp_path / "s", vae, OPTIONS).manifest
    assert (manifest.scale, manifest.shift) == ((0.5, 0.25, 0.125, 0.0625), (1.0, 2.0, 3.0, 0.0))


@pytest.mark.parametrize(("precision", "digits"), [("bf16", 7), ("fp32", 10)])
def test_precision_changes_digits_and_no_name(given, tmp_path, precision, digits):
    store, known = _encode(given, tmp_path / "s", precision=precision), LatentStore(given / "whole")
    means, expected = (of.gather(torch.arange(COUNT)).float()[:, :4] for of in (store, known))
    assert (means - expected).abs().max() <= 8 * 2**-digits * expected.abs().max()
    assert torch.equal(means, expected) == (precision == "fp32")  # tf32 on a CPU, too
    assert store.manifest.vae == known.manifest.vae


def test_the_contact_sheet_shows_images_over_what_is_decoded_of_their_rows(given, whole):
    sheet = np.asarray(Image.open(io.BytesIO(whole["contact_sheet.png"])))
    assert sheet.shape == (2 * 260 + 12, 8 * 132 - 4, 3)
    pictures, rows = open_pictures(given / "images"), LatentStore(given / "whole").gather(torch.arange(COUNT))

    def tile(pixels: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(pixels).resize((128, 128), Image.Resampling.LANCZOS))

    for image, (top, left) in {0: (0, 0), 5: (0, 5 * 132), 10: (272, 2 * 132)}.items():
        assert np.array_equal(sheet[top : top + 128, left : left + 128], tile(decode(pictures.read(image), 32)))
        with torch.inference_mode():
            decoded = _vae(given).decode(rows[image : image + 1, :4].float()).sample[0]
        pixels = ((decoded + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
        below = sheet[top + 132 : top + 260, left : left + 128].astype(int)
        assert np.abs(below - tile(pixels)).max() <= 3  # a rounding of the decoder, by either memory format


# What can end the work, and how it goes on. Processes are forked from one that has done nothing yet but import.


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
    _encode(given, dst)


def _encode_as_rank(rank: int, size: int, given: Path, dst: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    _encode(given, dst)


def _die_at_renames(given: Path, folder: Path) -> None:
    for kill in range(RENAMES + 1):
        os.waitpid(_fork(_die_at_rename, kill, given, folder / f"rename-{kill:02d}"), 0)


def _die_at_moments(given: Path, folder: Path) -> None:
    for kill in range(KILLS):
        process = _fork(_encode, given, folder / f"moment-{kill:02d}")
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
    _encode(given, store)
    assert _content(store) == whole
    assert not list(disturbed.glob(f".{store.name}*"))


@pytest.mark.parametrize("kill", range(KILLS))
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(given, whole, disturbed, kill):
    store = disturbed / f"moment-{kill:02d}"
    _encode(given, store)
    assert _content(store) == whole
    assert not list(disturbed.glob(f".{store.name}*"))


@pytest.mark.parametrize("size", SIZES)
def test_several_processes_make_the_same_bytes(whole, disturbed, size):
    assert _content(disturbed / f"ranks-{size}") == whole
    assert not list(disturbed.glob(f".ranks-{size}*"))


def test_processes_that_come_late_leave_the_store_as_it_is(whole, disturbed):
    for kill in range(LATE):
        assert _content(disturbed / f"late-{kill}") == whole
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
            assert (_encode(given, tmp_path / "store") is None) == bool(left)
        assert left in capsys.readouterr().out
    assert _content(tmp_path / "store") == whole and not list(tmp_path.glob(".*"))


def test_killed_after_the_last_rename_it_tidies_up_or_begins_anew(given, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Unfinished, "remove", lambda work: None)
        _encode(given, tmp_path / "store")
    assert list(tmp_path.glob(".*"))
    shutil.copytree(tmp_path, tmp_path.with_name("removed"))
    shutil.rmtree(tmp_path.with_name("removed") / "store")  # by its user, and with it the shards
    for folder in (tmp_path, tmp_path.with_name("removed")):
        _encode(given, folder / "store")
        assert _content(folder / "store") == whole and not list(folder.glob(".*"))


def test_what_appeared_meanwhile_is_kept_and_so_are_the_shards(given, whole, tmp_path, monkeypatch):
    def meanwhile(*_):
        (tmp_path / "store").mkdir()
        (tmp_path / "store" / "file").write_text("")
        return b""

    with monkeypatch.context() as patch:
        patch.setattr(encode_module, "contact_sheet", meanwhile)
        with pytest.raises(RunError, match=r"cannot write .*store: Directory not empty"):
            _encode(given, tmp_path / "store")
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["file"]
    shutil.rmtree(tmp_path / "store")
    monkeypatch.setattr(encode_module, "decode_ahead", lambda *_, **__: (_ for _ in ()))
    _encode(given, tmp_path / "store")
    assert _content(tmp_path / "store") == whole


def test_what_is_finished_is_not_encoded_again(given, whole, tmp_path, monkeypatch, capsys):
    shutil.copytree(given / "whole", tmp_path / "store")
    monkeypatch.setattr(encode_module, "decode_ahead", None)
    assert len(_encode(given, tmp_path / "store")) == COUNT
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
        _encode(given, tmp_path / "store")
    written[:] = [0]
    _encode(given, tmp_path / "store")
    assert written == [0, 2] and _content(tmp_path / "store") == whole


def test_a_full_disk_ends_with_one_message_and_what_is_finished_stays(given, whole, tmp_path, monkeypatch):
    real = writer.save_file

    def full(tensors, file):
        if "00001" in str(file):
            Path(file).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, file)

    monkeypatch.setattr(writer, "save_file", full)
    with pytest.raises(RunError, match=r"cannot write .*shard-00001.safetensors: No space left on device"):
        _encode(given, tmp_path / "store")
    assert not (tmp_path / "store").exists()
    kept = sorted(path.name for path in (tmp_path / ".store.encoding" / "store").iterdir())
    assert kept == ["shard-00000.safetensors"]
    monkeypatch.undo()
    _encode(given, tmp_path / "store")
    assert _content(tmp_path / "store") == whole


def test_a_full_gpu_ends_with_one_message(given, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore.")

    monkeypatch.setattr(Autoencoder, "encode", full)
    with pytest.raises(
        RunError, match=r"^batch_size: given 3, and the GPU's memory is full: take a smaller one \(CUDA"
    ):
        _encode(given, tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


def test_a_second_writer_is_refused(given, tmp_path, monkeypatch):
    real, seen = writer.write_shard, []

    def meanwhile(*arguments):
        if not seen:
            with pytest.raises(RunError, match=rf"another process is encoding into {tmp_path / 'store'}") as caught:
                _encode(given, tmp_path / "store")
            seen.append(caught)
        return real(*arguments)

    monkeypatch.setattr(encode_module, "write_shard", meanwhile)
    assert len(_encode(given, tmp_path / "store")) == COUNT and seen


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
    image_folder(given / "fewer", count=5, side=40)
    with monkeypatch.context() as patch:
        patch.setattr(encode_module, "write_manifest", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            _encode(given, tmp_path / "store")
    with pytest.raises(DataError, match=message):
        _encode(given, tmp_path / "store", **changed)
    assert len(_encode(given, tmp_path / "store", workers=1, max_broken=7)) == COUNT  # these change no byte


# What is wrong with what was given.


def _broken(given: Path, folder: Path, *numbers: int) -> None:
    shutil.copytree(given / "images", folder)
    for number in numbers:
        name = open_pictures(given / "images").names[number]
        (folder / name).write_bytes((folder / name).read_bytes()[:200])


def test_broken_images_are_left_out_and_listed(given, whole, tmp_path, capsys):
    _broken(given, tmp_path / "images", 1, 8, 9, 10)
    store = encode(tmp_path / "images", tmp_path / "store", str(given / "vae"), OPTIONS)
    there = torch.tensor([0, 2, 3, 4, 5, 6, 7])
    names = open_pictures(given / "images").names
    whole_rows = LatentStore(given / "whole").gather(there).float()
    torch.testing.assert_close(store.gather(torch.arange(7)).float(), whole_rows, rtol=2**-9, atol=1e-5)
    assert [shard.file for shard in store.manifest.shards] == ["shard-00000.safetensors", "shard-00001.safetensors"]
    listed = json.loads((store.path / "encode.json").read_text())["broken"]
    assert [name for name, _ in listed] == [names[i] for i in (1, 8, 9, 10)]
    assert all("truncated" in reason.lower() for _, reason in listed)


def test_the_list_of_broken_images_is_the_same_on_every_machine(given, tmp_path):
    shutil.copytree(given / "images", tmp_path / "images")
    first, second, *_ = open_pictures(given / "images").names
    (tmp_path / "images" / first).write_bytes(b"no image")
    (tmp_path / "images" / second).unlink()
    (tmp_path / "images" / second).symlink_to(tmp_path / "nowhere")
    store = encode(tmp_path / "images", tmp_path / "store", str(given / "vae"), OPTIONS)
    listed = json.loads((store.path / "encode.json").read_text())["broken"]
    assert listed == [[first, "no image of a known format"], [second, "No such file or directory"]]


@pytest.mark.parametrize("limit", [0, 2])
def test_more_broken_images_than_allowed_end_it(given, tmp_path, limit):
    _broken(given, tmp_path / "images", 1, 6, 7)
    options = dataclasses.replace(OPTIONS, max_broken=limit)
    message = rf"{limit + 1} images are broken, allowed up to {limit} \(max_broken\); first china/.* \(.*[Tt]runcated"
    for _ in range(2):  # what was counted stays counted
        with pytest.raises(DataError, match=message):
            encode(tmp_path / "images", tmp_path / "store", str(given / "vae"), options)
    assert not (tmp_path / "store").exists()
    encode(tmp_path / "images", tmp_path / "store", str(given / "vae"), OPTIONS)


def test_nothing_but_broken_images_is_no_store(given, tmp_path):
    _broken(given, tmp_path / "images", *range(COUNT))
    with pytest.raises(DataError, match="all 11 images are broken, first china"):
        encode(tmp_path / "images", tmp_path / "store", str(given / "vae"), OPTIONS)


def _altered(given: Path, folder: Path, **config) -> str:
    shutil.copytree(given / "vae", folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return str(folder)


def _not_finite(given: Path, folder: Path) -> str:
    name = _altered(given, folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({key: torch.full_like(value, torch.nan) for key, value in weights.items()}, file)
    return name


def _with_some_weights(given: Path, folder: Path) -> str:
    name = _altered(given, folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    weights = {key: value for key, value in load_file(file).items() if not key.startswith("encoder.conv_in")}
    save_file(weights, file, {"format": "pt"})
    return name


def _without_weights(given: Path, folder: Path) -> str:
    name = _altered(given, folder)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    return name


VAES = {
    "absent": (lambda given, folder: str(folder), "vae: .* is no folder"),
    "empty": (
        lambda given, folder: folder.mkdir() or str(folder),
        "vae has no config.json, allowed the folder of an AutoencoderKL or of a pipeline",
    ),
    "another model": (
        lambda given, folder: _altered(given, folder, _class_name="UNet2DModel"),
        "config.json: _class_name: given 'UNet2DModel', allowed 'AutoencoderKL'",
    ),
    "grey": (lambda given, folder: _altered(given, folder, in_channels=1), "in_channels: given 1, allowed 3"),
    "no weights": (_without_weights, "vae cannot be loaded from safetensors: Error no file named"),
    "some weights": (_with_some_weights, "its file lacks 2 weights, first encoder.conv_in.bias; allowed all"),
    "other sizes": (
        lambda given, folder: _altered(given, folder, latent_channels=16),
        "vae cannot be loaded from safetensors: .*size mismatch",
    ),
    "not finite": (
        _not_finite,
        "images: the latents of china/0000.jpg are not finite in float16, made in tf32; allowed finite numbers",
    ),
}


@pytest.mark.parametrize("fault", VAES)
def test_an_autoencoder_that_is_none_is_named(given, tmp_path, fault):
    make, message = VAES[fault]
    vae = make(given, tmp_path / "vae")
    with pytest.raises(DataError, match=message):
        encode(given / "images", tmp_path / "store", vae, OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] in ([], ["vae"])  # nothing to go on from


def test_latents_that_are_not_finite_are_told_by_the_name_of_their_image(given, tmp_path, monkeypatch):
    real = Autoencoder.encode

    def encoded(autoencoder, pixels):
        posterior = real(autoencoder, pixels)
        mean = posterior.mean.clone()
        mean[-1, 1, 2, 3] = 7e4  # of the last image of a batch, mirrored
        return posterior._replace(mean=mean)

    monkeypatch.setattr(Autoencoder, "encode", encoded)
    name = open_pictures(given / "images").names[2]
    with pytest.raises(DataError, match=f"the latents of {name} are not finite in float16"):
        _encode(given, tmp_path / "store", flip="stored")
    assert len(_encode(given, tmp_path / "store", flip="stored", dtype="bfloat16")) == 2 * COUNT


def test_a_name_that_the_hub_does_not_know_is_named(given, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"nobody/nothing is no folder, and the .* hub does not give it: Cannot reach"):
        encode(given / "images", tmp_path / "store", "nobody/nothing", OPTIONS)


def test_without_diffusers_the_extra_is_named(given, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ConfigError, match=r"diffusers is not installed: pip install 'erd-fast\[vae\]'"):
        _encode(given, tmp_path / "store")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 36}, "size: given 36, allowed multiples of 8"),
        ({"size": 0}, "size: given 0, allowed 1 or more"),
        ({"batch_size": 0}, "batch_size: given 0, allowed 1 or more"),
        ({"max_broken": -1}, "max_broken: given -1, allowed 0 or more"),
    ],
)
def test_options_that_are_not_allowed_are_named(given, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        _encode(given, tmp_path / "store", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_refused_and_kept(given, tmp_path):
    store = latent_store(tmp_path / "store", "sample", count=10)
    before = _content(store.path)
    (tmp_path / "empty").mkdir()
    for name in ("store", "empty"):
        with pytest.raises(DataError, match=f"{name} exists already; stores are never changed"):
            _encode(given, tmp_path / name)
    with pytest.raises(DataError, match="whole exists already"):
        _encode(given, given / "whole", flip="stored")
    assert _content(store.path) == before


def test_the_command_says_what_it_wrote(given, whole, tmp_path, capsys):
    settings = [f"--{name}={getattr(OPTIONS, name)}" for name in ("size", "batch_size", "shard_size")]
    command = ["data", "encode", str(given / "images"), str(tmp_path / "store"), "--vae", str(given / "vae"), *settings]
    cli.main(command)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"encoding 11 images in 2 classes of {given / 'images'}"
    assert lines[1].startswith("encoding 11/11  ") and "images/s" in lines[1]
    assert lines[2:] == [f"wrote {tmp_path / 'store'}: 11 samples, mean_std (4, 4, 4)"]
    assert _content(tmp_path / "store") == whole
    with pytest.raises(SystemExit) as ended:
        cli.main([*command[:3], str(tmp_path / "other"), "--vae", str(tmp_path / "absent")])
    assert ended.value.code == 1 and len(capsys.readouterr().err.splitlines()) == 1


if __name__ == "__main__":
    from diffusers import AutoencoderKL  # noqa: F401 - once for all that are forked

    for disturb in (_die_at_renames, _die_at_moments, _encode_side_by_side, _come_late):
        disturb(Path(sys.argv[1]), Path(sys.argv[2]))
