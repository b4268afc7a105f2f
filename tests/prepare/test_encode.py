"""encode: the store is what the autoencoder says of the images."""

import dataclasses
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from erd_fast import cli
from erd_fast.autoencoder import Autoencoder
from erd_fast.data import LatentStore
from erd_fast.data.pictures import decode, open_pictures
from erd_fast.errors import ConfigError, DataError, RunError
from erd_fast.prepare.encode import encode
from erd_fast.random import Purpose, Stream, normals
from support.encoding import COUNT, OPTIONS, content, encode_given
from support.fixtures import latent_store
from support.pictures import COLLECTIONS


def _vae(given: Path):
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(given / "vae").eval()


def _assert_computed(found: torch.Tensor, expected: torch.Tensor, stored: float = 2**-11) -> None:
    """``found`` is ``expected``, but for half a step of what it is stored in (float16), and for float32: 22 layers of
    sums over 72 products (3 x 3 x 8), each off by sqrt(72) roundings of its largest number."""
    rounding = 22 * 72**0.5 * 2**-24 * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=stored, atol=rounding)


def _posterior(given: Path, mirrored: bool = False):
    pictures = open_pictures(given / "images")
    pixels = np.stack([decode(pictures.read(i), 32) for i in range(len(pictures))])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.inference_mode():
        return _vae(given).encode(images.flip(3) if mirrored else images).latent_dist


def test_rows_are_moments_of_the_autoencoder_in_the_order_of_the_images(given, whole):
    store, posterior = LatentStore(given / "whole", verify=True), _posterior(given)
    stored = store.gather(torch.arange(COUNT)).float()
    _assert_computed(stored[:, :4], posterior.mean)
    _assert_computed(stored[:, 4:], posterior.std)
    assert store.labels.tolist() == open_pictures(given / "images").labels
    manifest = store.manifest
    factor = json.loads((given / "vae" / "config.json").read_text())["scaling_factor"]
    assert (manifest.kind, manifest.shape, manifest.dtype) == ("mean_std", (4, 4, 4), "float16")
    assert (manifest.scale, manifest.shift, manifest.class_names) == ((factor,) * 4, (), ("china", "flower"))
    assert (manifest.crop, manifest.flip, manifest.pixel_range) == ("adm-center", "none", (-1.0, 1.0))
    assert manifest.vae.startswith("vae@") and manifest.vae_source == str(given / "vae")
    assert [shard.count for shard in manifest.shards] == [4, 4, 3]
    assert json.loads(whole["encode.json"])["broken"] == [] and str(given) not in whole["encode.json"].decode()


def test_log_variance_and_float32_are_kept_on_request(given, tmp_path):
    store, posterior = encode_given(given, tmp_path / "s", kind="mean_logvar", dtype="float32"), _posterior(given)
    assert (store.manifest.kind, store.manifest.dtype) == ("mean_logvar", "float32")
    expected = torch.cat((posterior.mean, posterior.logvar), 1)
    _assert_computed(store.gather(torch.arange(COUNT)), expected, stored=0)


@pytest.mark.parametrize("flip", ["none", "stored"])
def test_a_sample_is_drawn_by_the_number_of_its_row(given, tmp_path, flip):
    store, posterior = encode_given(given, tmp_path / "s", kind="sample", flip=flip, seed=5), _posterior(given)
    views = 2 if flip == "stored" else 1
    noise = normals(5, Purpose.ENCODE, Stream.POSTERIOR, views * torch.arange(COUNT), (4, 4, 4))
    found = store.gather(views * torch.arange(COUNT)).float()
    assert (store.manifest.kind, store.manifest.shape) == ("sample", (4, 4, 4))
    _assert_computed(found, posterior.mean + posterior.std * noise)


def test_mirror_images_follow_the_images(given, tmp_path):
    store = encode_given(given, tmp_path / "s", flip="stored")
    assert len(store) == 2 * COUNT and store.manifest.flip == "stored"
    rows = store.gather(torch.arange(2 * COUNT)).float()[:, :4]
    for first, mirrored in ((0, False), (1, True)):
        _assert_computed(rows[first::2], _posterior(given, mirrored).mean)
    assert torch.equal(store.labels[::2], store.labels[1::2])


@pytest.mark.parametrize("form", [form for form in COLLECTIONS if form != "images"])
def test_every_form_makes_the_same_rows(given, whole, tmp_path, form):
    COLLECTIONS[form](tmp_path / form, count=COUNT, side=40)
    encode(tmp_path / form, tmp_path / "store", str(given / "vae"), OPTIONS)
    found = content(tmp_path / "store")
    assert [found[name] == content for name, content in whole.items() if name.startswith("shard")] == [True] * 3


def test_shards_and_threads_change_no_row(given, whole, tmp_path):
    store = encode_given(given, tmp_path / "s", shard_size=9, workers=1)  # batches begin where they did
    assert [shard.count for shard in store.manifest.shards] == [9, 2]
    assert torch.equal(store.gather(torch.arange(3)), LatentStore(given / "whole").gather(torch.arange(3)))


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
        assert np.abs(below - tile(pixels)).max() <= 3  # a level of rounding, by weights of 2.2 in sum, and rounded


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
        encode_given(given, tmp_path / "store", flip="stored")
    assert len(encode_given(given, tmp_path / "store", flip="stored", dtype="bfloat16")) == 2 * COUNT


def test_a_full_gpu_ends_with_one_message(given, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore.")

    monkeypatch.setattr(Autoencoder, "encode", full)
    with pytest.raises(
        RunError, match=r"^batch_size: given 3, and the GPU's memory is full: take a smaller one \(CUDA"
    ):
        encode_given(given, tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


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
    assert torch.equal(store.gather(torch.arange(7)), LatentStore(given / "whole").gather(there))
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


def test_a_store_knows_its_autoencoder_from_any_folder(given, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(given)
    store = encode(Path("images"), tmp_path / "store", "./vae", OPTIONS)
    assert store.manifest.vae_source == str(given / "vae") and content(store.path) == whole


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
        encode_given(given, tmp_path / "store", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_refused_and_kept(given, whole, tmp_path):
    store = latent_store(tmp_path / "store", "sample", count=10)
    before = content(store.path)
    (tmp_path / "empty").mkdir()
    for name in ("store", "empty"):
        with pytest.raises(DataError, match=f"{name} exists already; stores are never changed"):
            encode_given(given, tmp_path / name)
    with pytest.raises(DataError, match="whole exists already"):
        encode_given(given, given / "whole", flip="stored")
    assert content(store.path) == before


def test_the_command_says_what_it_wrote(given, whole, tmp_path, capsys):
    settings = [f"--{name}={getattr(OPTIONS, name)}" for name in ("size", "batch_size", "shard_size")]
    command = ["data", "encode", str(given / "images"), str(tmp_path / "store"), "--vae", str(given / "vae"), *settings]
    cli.main(command)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"encoding 11 images in 2 classes of {given / 'images'}"
    assert lines[1].startswith("encoding 11/11  ") and "images/s" in lines[1]
    assert lines[2:] == [f"wrote {tmp_path / 'store'}: 11 samples, mean_std (4, 4, 4)"]
    assert content(tmp_path / "store") == whole
    with pytest.raises(SystemExit) as ended:
        cli.main([*command[:3], str(tmp_path / "other"), "--vae", str(tmp_path / "absent")])
    assert ended.value.code == 1 and len(capsys.readouterr().err.splitlines()) == 1
