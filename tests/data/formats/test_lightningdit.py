"""lightningdit: views, statistics, and what is refused."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from erd_fast.errors import ConfigError
from support import foreign

PICKLE = {"allow_pickle": True}


@pytest.fixture
def folder(tmp_path):
    foreign.lightningdit(tmp_path / "shards", 24, 4)
    return tmp_path / "shards"


def shard(folder, rank=0, number=1):
    return folder / f"latents_rank{rank:02d}_shard{number:03d}.safetensors"


def edit(folder, **tensors):
    """Replace tensors of a shard; None removes one."""
    content = load_file(shard(folder)) | tensors
    save_file({name: tensor for name, tensor in content.items() if tensor is not None}, shard(folder))


def test_of_each_shard_the_flips_follow(folder, imported):
    rows = imported("lightningdit", folder, **PICKLE).gather(torch.arange(48)).view(3, 2, 8, 8, 4, 4)
    assert torch.equal(rows[:, 1], rows[:, 0].flip(-1))


def test_the_multiplier_follows_the_normalisation(folder, imported):
    manifest = imported("lightningdit", folder, **PICKLE, multiplier=0.5).manifest
    assert manifest.scale == (0.25,) * 8 and manifest.shift == tuple(range(8))


def test_scale_and_shift_take_the_place_of_the_statistics(folder, imported, refused):
    (folder / "latents_stats.pt").unlink()
    assert refused("lightningdit", folder) == f"{folder} has no latents_stats.pt; give --scale and --shift"
    manifest = imported("lightningdit", folder, scale=(0.3,), shift=(1.0,)).manifest
    assert manifest.scale == (0.3,) * 8 and manifest.shift == (1.0,) * 8
    assert imported("lightningdit", folder, scale=(0.3,)).manifest.shift == ()
    message = refused("lightningdit", folder, ConfigError, scale=(0.3,), multiplier=2.0)
    assert message.startswith("multiplier: given with scale or shift, allowed with latents_stats.pt")


@pytest.mark.parametrize("multiplier", [0.0, float("nan"), float("inf"), -1.0])
def test_a_multiplier_that_scales_nothing_is_refused(multiplier, folder, refused):
    message = refused("lightningdit", folder, ConfigError, **PICKLE, multiplier=multiplier)
    assert message == f"multiplier: given {multiplier}, allowed a finite number above 0"


def test_the_statistics_are_a_pickle_that_needs_to_be_allowed(folder, refused):
    message = refused("lightningdit", folder, ConfigError)
    assert f"{folder}/latents_stats.pt" in message and "--allow-pickle" in message and "--scale and --shift" in message


class Call:
    def __reduce__(self):
        return exec, ("raise SystemExit('ran')",)


@pytest.mark.parametrize(
    "content",
    [
        {"mean": torch.zeros(8), "std": Call()},
        {"mean": torch.zeros(8)},
        {"mean": [0.0], "std": [1.0]},
        torch.zeros(8),
        [],
        {"mean": torch.zeros(8), "std": torch.zeros(8)},
        {"mean": torch.zeros(8), "std": torch.full((8,), float("nan"))},
        {"mean": torch.full((8,), float("inf")), "std": torch.ones(8)},
        {"mean": torch.zeros(8), "std": torch.ones(4)},
    ],
)
def test_statistics_of_another_form_are_named_and_nothing_is_run(content, folder, refused):
    torch.save(content, folder / "latents_stats.pt")
    message = refused("lightningdit", folder, **PICKLE)
    assert message.startswith(f"{folder}/latents_stats.pt")


@pytest.mark.parametrize("size", [0, 100])
def test_damaged_statistics_are_named(size, folder, refused):
    os.truncate(folder / "latents_stats.pt", size)
    assert refused("lightningdit", folder, **PICKLE).startswith(f"{folder}/latents_stats.pt is damaged")


def test_statistics_of_another_number_of_channels_are_refused(folder, refused):
    torch.save({"mean": torch.zeros(4), "std": torch.ones(4)}, folder / "latents_stats.pt")
    message = refused("lightningdit", folder, **PICKLE)
    assert message == f"{folder} has 8 channels, its format 4: give --scale and --shift"


def test_latents_in_bfloat16(folder, imported):
    whole = imported("lightningdit", folder, **PICKLE).gather(torch.arange(48))
    for file in folder.glob("*.safetensors"):
        content = load_file(file)
        save_file({name: t.bfloat16() if t.is_floating_point() else t for name, t in content.items()}, file)
    store = imported("lightningdit", folder, **PICKLE, dtype="bfloat16")
    assert torch.equal(store.gather(torch.arange(48)), whole.bfloat16())


def test_missing_shards_are_told(folder, imported):
    shard(folder, 0, 0).unlink()
    with pytest.warns(UserWarning, match=rf"{folder}/latents_rank00_shard\*: 1 of them, numbered up to 1, and 0 is"):
        assert len(imported("lightningdit", folder, **PICKLE)) == 32
    shard(folder, 0, 1).unlink()
    with pytest.warns(UserWarning, match=rf"{folder}/latents_rank\*: 1 of them, numbered up to 1, and 0 is"):
        assert len(imported("lightningdit", folder, **PICKLE)) == 16


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"latents_flip": None}, "has no latents_flip; it has labels, latents"),
        ({"labels": None}, "has no labels; it has latents, latents_flip"),
        (
            {"labels": torch.zeros(7, dtype=torch.int64)},
            "given latents (8, 8, 4, 4), latents_flip (8, 8, 4, 4) and labels",
        ),
        ({"latents_flip": torch.zeros(8, 8, 4, 3)}, "latents_flip (8, 8, 4, 3)"),
        ({"latents": torch.zeros(8, 8), "latents_flip": torch.zeros(8, 8)}, "allowed (n, C, H, W) twice and (n,)"),
        ({"labels": torch.zeros(8)}, "given labels float32, allowed whole numbers"),
        ({"latents": torch.zeros(8, 8, 4, 4, dtype=torch.int32)}, "given latents torch.int32, allowed floats"),
        (
            {"latents": torch.zeros(8, 8, 2, 2), "latents_flip": torch.zeros(8, 8, 2, 2)},
            "(8, 8, 2, 2), allowed those of",
        ),
    ],
)
def test_shards_of_another_form_are_named(tensors, message, folder, refused):
    edit(folder, **tensors)
    found = refused("lightningdit", folder, **PICKLE)
    assert found.startswith(str(folder)) and message in found


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_a_truncated_shard_is_named(size, folder, refused):
    os.truncate(shard(folder), size)
    assert refused("lightningdit", folder, **PICKLE).startswith(f"{shard(folder)} cannot be read: ")


def test_other_files_are_no_shards(tmp_path, refused):
    save_file({"latents": torch.zeros(1)}, tmp_path / "shard-00000.safetensors")
    assert refused("lightningdit", tmp_path, **PICKLE) == (
        f"{tmp_path} has no files latents_rank00_shard000.safetensors ..."
    )
