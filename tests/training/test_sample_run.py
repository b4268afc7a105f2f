"""sample_run: images of a run's newest checkpoint, or of one checkpoint."""

import json
import re
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from erd_fast.data import LatentStore, write_store
from erd_fast.errors import ConfigError, DataError
from erd_fast.sampling import GuidanceInterval
from erd_fast.training.checkpoint import load_state
from erd_fast.training.loop import train
from erd_fast.training.sample_run import find_checkpoint, open_decoder, sample_run
from support.pictures import tiny_vae

LABELS = (3, 1, 4, 1, 5)


def _sample(path, count: int = 5, classes=LABELS, steps: int = 3, **how):
    return sample_run(path, count, classes=classes, steps=steps, **how)[0]


def test_a_run_and_its_newest_checkpoint_give_the_same_images(trained):
    pixels, labels = sample_run(trained, 12, steps=3)
    assert pixels.shape == (12, 8, 8, 1) and pixels.dtype == np.uint8
    assert labels.tolist() == [*range(10), 0, 1]
    again, _ = sample_run(trained / "checkpoints" / "step-00000040", 12, steps=3)
    assert np.array_equal(again, pixels)


def test_the_newest_checkpoint_is_that_of_the_largest_step(trained, tmp_path, tiny):
    shutil.copytree(trained, tmp_path / "run")
    train(tiny(train={"steps": 42}, optim={"lr": 1e-2}), tmp_path / "run")
    assert np.array_equal(_sample(tmp_path / "run"), _sample(tmp_path / "run/checkpoints/step-00000042"))
    assert not np.array_equal(_sample(tmp_path / "run"), _sample(tmp_path / "run/checkpoints/step-00000040"))


def test_classes_are_cycled_through(trained):
    _, labels = sample_run(trained, 7, classes=(9, 2), steps=1)
    assert labels.tolist() == [9, 2, 9, 2, 9, 2, 9] and labels.dtype == np.int64


def test_an_image_depends_on_its_number_and_label_and_not_on_how_many(trained):
    many = _sample(trained)
    few = _sample(trained, 3)
    # Matrix products of other sizes round otherwise: a grey level may tip over, no more.
    assert np.abs(few.astype(int) - many[:3]).max() <= 1
    other = _sample(trained, classes=(3, 1, 4, 2, 5)).astype(int)
    same = [np.abs(one - two).max() <= 1 for one, two in zip(other, many, strict=True)]
    assert same == [True, True, True, False, True]


@pytest.mark.parametrize("how", [{"seed": 1}, {"ema": False}, {"steps": 4}, {"cfg_scale": 3.0}])
def test_settings_change_the_images(trained, how):
    assert not np.array_equal(_sample(trained, **how), _sample(trained))


def test_guidance_acts_within_its_interval_alone(trained):
    plain, guided = _sample(trained), _sample(trained, cfg_scale=3.0)
    for interval, expected in ((GuidanceInterval(0.0, 1.0), guided), (GuidanceInterval(2.0, 3.0), plain)):
        assert np.array_equal(_sample(trained, cfg_scale=3.0, guidance_interval=interval), expected)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"count": 0}, "n: given 0, allowed 1 or more"),
        ({"classes": (3, 10)}, "classes: given 10, allowed 0 to 9"),
        ({"classes": (-1,)}, "classes: given -1, allowed 0 to 9"),
        ({"steps": 0}, "steps: given 0, allowed 1 or more"),
    ],
)
def test_settings_that_are_not_allowed_are_named(trained, how, message):
    with pytest.raises(ConfigError, match=message):
        _sample(trained, **how)


def test_where_no_checkpoint_is_there_are_no_samples(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(DataError, match=f"{path} is no checkpoint and no run with one"):
            _sample(path)


def test_an_unconditional_model_has_no_labels(tmp_path, tiny, digits):
    images = digits.gather(digits.labels[:64])
    store = write_store(tmp_path / "store", [(images, digits.labels[:64] * 0)], kind="pixels", num_classes=0)
    train(tiny(data={"path": str(store.path)}, train={"steps": 2}), tmp_path / "run")
    pixels, labels = sample_run(tmp_path / "run", 3, steps=2)
    assert pixels.shape == (3, 8, 8, 1) and labels is None
    with pytest.raises(ConfigError, match="classes: given 0, allowed none, the model is unconditional"):
        _sample(tmp_path / "run", classes=(0,))
    with pytest.raises(ConfigError, match=r"cfg_scale: given 2\.0; guidance needs labels"):
        _sample(tmp_path / "run", classes=(), cfg_scale=2.0)


def _latents(run: Path, **how) -> np.ndarray:
    return sample_run(run, 5, decode=open_decoder(run, "none"), steps=2, **how)[0]


def _copy(run: Path, folder: Path, **state) -> Path:
    """A copy of the newest checkpoint, alone, with other fields in its state; None removes one."""
    checkpoint = shutil.copytree(find_checkpoint(run), folder)
    file = checkpoint / "state.json"
    content = {**json.loads(file.read_text()), **state}
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
    return checkpoint


def _other_vae(given: Path, folder: Path) -> str:
    """The autoencoder with other weights, whose pictures differ."""
    shutil.copytree(given / "vae", folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    save_file({name: 1.5 * weight for name, weight in load_file(file).items()}, file, {"format": "pt"})
    return str(folder)


REMEDY = "; name an autoencoder with --vae PATH|ID, or write latents with --vae none --out x.npz"


def test_a_checkpoint_records_the_autoencoder_of_its_store(latent_run, given):
    state, manifest = load_state(find_checkpoint(latent_run)), LatentStore(given / "whole").manifest
    assert (state.vae, state.vae_source) == (manifest.vae, str(given / "vae")) and state.vae.startswith("vae@")


def test_samples_of_a_run_on_latents_are_decoded_by_its_autoencoder(latent_run, given):
    from diffusers import AutoencoderKL

    pixels, labels = sample_run(latent_run, 5, steps=2)
    latents = _latents(latent_run)
    assert latents.dtype == np.float32 and latents.shape == (5, 4, 4, 4) and labels.tolist() == [0, 1, 0, 1, 0]
    with torch.inference_mode():
        decoded = AutoencoderKL.from_pretrained(given / "vae").eval().decode(torch.from_numpy(latents)).sample
    expected = ((decoded + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1).numpy()
    assert pixels.dtype == np.uint8 and pixels.shape == (5, 32, 32, 3)
    assert np.abs(pixels - expected).max() <= 1  # convolutions of one image round otherwise than those of five
    assert len(np.unique(pixels)) > 50


def test_samples_have_the_range_of_pixels_that_was_encoded(latent_run, tmp_path):
    """EDM2's autoencoder saw 0 to 1, and gives that back."""
    usual = sample_run(latent_run, 5, steps=2)[0].astype(int)
    half, _ = sample_run(_copy(latent_run, tmp_path / "half", pixel_range=[0.0, 1.0]), 5, steps=2)
    seen = half > 0
    assert seen.any() and np.abs(usual[seen] - (half[seen] + 255.0) / 2).max() <= 1


def test_a_run_on_latents_is_scaled_back(latent_run, tmp_path):
    """Otherwise the same checkpoint, so the same x0: z = x0 / scale + shift."""
    scale, shift = [2.0, 4.0, 0.5, 1.0], [0.0, 1.0, -1.0, 3.0]
    x = _latents(_copy(latent_run, tmp_path / "plain", scale=[], shift=[]))
    found = _latents(_copy(latent_run, tmp_path / "scaled", scale=scale, shift=shift))
    expected = x / np.array(scale).reshape(4, 1, 1) + np.array(shift).reshape(4, 1, 1)
    np.testing.assert_allclose(found, expected, rtol=2**-23, atol=2**-23 * np.abs(expected).max())  # two roundings


def test_checkpoints_of_before_autoencoders_were_recorded_need_one_to_be_named(latent_run, given, tmp_path):
    old = _copy(latent_run, tmp_path / "old", vae=None, vae_source=None, pixel_range=None)
    with pytest.raises(DataError, match=r"^the source of the autoencoder is not recorded" + re.escape(REMEDY)):
        sample_run(old, 5)
    pixels, _ = sample_run(old, 5, decode=open_decoder(old, str(given / "vae")), steps=2)
    assert np.array_equal(pixels, sample_run(latent_run, 5, steps=2)[0])
    assert np.array_equal(_latents(old), _latents(latent_run))


def test_another_autoencoder_is_not_taken_by_itself(latent_run, given, tmp_path):
    other = _other_vae(given, tmp_path / "vae")
    moved = _copy(latent_run, tmp_path / "moved", vae_source=other)
    message = rf"^{other} is now vae@[0-9a-f]{{8}}, but the latents were made by vae@[0-9a-f]{{8}}"
    with pytest.raises(DataError, match=message + re.escape(REMEDY)):
        open_decoder(moved)
    gone = _copy(latent_run, tmp_path / "gone", vae_source=f"{tmp_path}/gone-vae")
    with pytest.raises(
        DataError, match=rf"the recorded autoencoder {tmp_path}/gone-vae does not exist" + re.escape(REMEDY)
    ):
        open_decoder(gone)


def test_another_autoencoder_is_used_on_request_with_a_warning(latent_run, given, tmp_path):
    other = _other_vae(given, tmp_path / "other")
    recorded = load_state(find_checkpoint(latent_run)).vae
    with pytest.warns(UserWarning, match=rf"^decoding with other@[0-9a-f]{{8}}; the latents were made by {recorded}$"):
        decode = open_decoder(latent_run, other)
    pixels, _ = sample_run(latent_run, 5, decode=decode, steps=2)
    assert not np.array_equal(pixels, sample_run(latent_run, 5, steps=2)[0])
    with warnings.catch_warnings(action="error"):  # a copy is the same one
        open_decoder(latent_run, shutil.copytree(given / "vae", tmp_path / "copy"))


def test_an_autoencoder_of_other_latents_is_refused(latent_run, tmp_path):
    tiny_vae(tmp_path / "wide", size=32, count=2, channels=8)
    message = r"^vae must have 4 latent channels, got 8 \(wide@[0-9a-f]{8}\)" + re.escape(REMEDY)
    with pytest.raises(ConfigError, match=message):
        open_decoder(latent_run, str(tmp_path / "wide"))
    imported = _copy(latent_run, tmp_path / "imported", vae="wide", vae_source=str(tmp_path / "wide"))
    with pytest.raises(ConfigError, match=message):
        open_decoder(imported)


def test_without_diffusers_the_extra_and_the_alternative_are_named(latent_run, given, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for vae in ("", str(given / "vae")):
        with pytest.raises(ConfigError, match=r"diffusers is not installed: pip install 'erd-fast\[vae\]'") as caught:
            open_decoder(latent_run, vae)
        assert str(caught.value).endswith(REMEDY)
    assert _latents(latent_run).shape == (5, 4, 4, 4)


def test_pixels_need_no_autoencoder(trained):
    pixels, _ = sample_run(trained, 5, classes=LABELS, decode=open_decoder(trained, "none"), steps=3)
    assert np.array_equal(pixels, _sample(trained))
    with pytest.raises(ConfigError, match=r"^vae must be none for a run on pixels, got owner/name$"):
        open_decoder(trained, "owner/name")


def test_latents_are_no_pictures(latent_run):
    message = "vae must be a PATH or an ID for pictures, got none; --out x.npz takes latents"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        open_decoder(latent_run, "none", pictures=True)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("vae", 5, "text"),
        ("vae_source", [1], "text"),
        ("pixel_range", [1.0], "two numbers, the smaller one first"),
        ("pixel_range", [1.0, 1.0], "two numbers, the smaller one first"),
        ("pixel_range", [0, 10**400], "two numbers, the smaller one first"),
        ("pixel_range", "ab", "two numbers, the smaller one first"),
        ("scale", [1.0, 2.0], "4 numbers or none"),
        ("scale", ["a"] * 4, "4 numbers or none"),
        ("shift", 3.0, "4 numbers or none"),
    ],
)
def test_a_damaged_state_is_named(latent_run, tmp_path, field, value, allowed):
    damaged = _copy(latent_run, tmp_path / "damaged", **{field: value})
    with pytest.raises(DataError, match=rf"state.json: {field} must be {allowed}, got"):
        open_decoder(damaged, "none")
