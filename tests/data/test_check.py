"""check: the mistakes that cost days are named, and what is right passes."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from erd_fast import cli
from erd_fast.data import LatentStore, write_store
from erd_fast.data.check import check_scale, check_store, judge_labels
from erd_fast.data.store import sha256_of
from erd_fast.errors import DataError
from erd_fast.training.loop import train
from support.fixtures import latent_store

SD = 0.18215


def _latents(count: int = 64, channels: int = 4, std: float = 1 / SD, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, channels, 8, 8, generator=torch.Generator().manual_seed(seed)) * std


def _store(path, latents: torch.Tensor, labels: torch.Tensor | None = None, **how) -> LatentStore:
    labels = torch.arange(len(latents)) % 4 if labels is None else labels
    how = {"kind": "sample", "num_classes": 4, "scale": (SD,) * 4, **how}
    return write_store(path, [(latents, labels)], **{"shard_size": 25, **how})


def _moments(second: float, spread: float, **how) -> torch.Tensor:
    return torch.cat((_latents(**how), second + spread * _latents(std=1.0, seed=1)), dim=1)


@pytest.mark.parametrize("kind", ["sample", "mean_std", "mean_logvar"])
def test_a_right_store_passes_and_shows_its_numbers(tmp_path, capsys, kind):
    store = latent_store(tmp_path / "store", kind)
    before = {file.name: file.read_bytes() for file in store.path.iterdir()}
    check_store(store.path)
    progress, *lines = capsys.readouterr().out.splitlines()
    assert progress.startswith("checking 256/256  ")
    assert lines[-1] == "passed" and not any("warning" in line or "error" in line for line in lines)
    assert lines[1].split() == ["samples", "256"]
    all_channels = next(line.split() for line in lines if line.split()[0] == "all")
    assert abs(float(all_channels[1])) < 0.03 and abs(float(all_channels[2]) - 1) < 0.03
    with Image.open(tmp_path / "store-check.png") as picture:
        assert picture.size[0] == (1100 if kind == "sample" else 1650)  # a panel more for the posterior
    assert {file.name: file.read_bytes() for file in store.path.iterdir()} == before


def test_pixels_pass_whatever_their_std(tmp_path, digits, capsys):
    check_store(digits.path, tmp_path / "digits.png")
    check_scale(digits)
    dark = write_store(
        tmp_path / "dark", [(torch.zeros(3, 1, 4, 4).byte(), torch.zeros(3).long())], kind="pixels", num_classes=0
    )
    check_scale(dark)
    assert capsys.readouterr().out.endswith(f"wrote {tmp_path / 'digits.png'}\npassed\n")


NAN = _latents()
NAN[[7, 50], 2, 3, 4] = torch.nan
EMPTY = _latents()
EMPTY[9] = 0
STUCK = _latents()
STUCK[40:43] = STUCK[3]
LOGVAR, STD = (-8.0, 1.0), (0.2, 0.01)

FAULTS = {
    "scale missing": (
        {"scale": ()},
        r"std after scaling is 5\.\d+, allowed 0.5 to 2.0: the manifest has no scale, and 0\.18\d would make it 1",
    ),
    "scale twice": (
        {"latents": _latents(std=1.0)},
        r"std after scaling is 0\.18\d, .*: without the manifest's scale of 0.182 it is \d.*: was it applied twice\?",
    ),
    "another scale": ({"scale": (1.5,) * 4}, r"std after scaling is 8.*: the manifest's scale is 1.5, and 0\.18"),
    "log-variance as std": (
        {"latents": _moments(*LOGVAR), "kind": "mean_std"},
        r"kind mean_std, and the second half .* lies in -\d.*: that is no std, but log-variance perhaps",
    ),
    "std as log-variance": (
        {"latents": _moments(*STD), "kind": "mean_logvar"},
        r"kind mean_logvar, and .* lies in 0\.1\d+ to 0\.2\d+: that is no log-variance .*, but std perhaps",
    ),
    "moments as sample": (
        {"latents": _moments(*STD), "scale": (SD,) * 8},
        r"kind sample, and of its 8 channels the second half has no number below 0",
    ),
    "never filled in": ({"latents": EMPTY}, r"1 of 64 samples have one number everywhere, first sample 9"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_by_the_check_and_refused_in_training(tmp_path, tiny, capsys, fault):
    how, message = FAULTS[fault]
    store = _store(tmp_path / "store", **{"latents": _latents(), **how})
    with pytest.raises(DataError, match=message):
        check_store(store.path)
    printed = capsys.readouterr().out
    assert "error: " in printed and "passed" not in printed
    assert (tmp_path / "store-check.png").is_file()
    with pytest.raises(DataError, match=rf"data.path: {store.path}: .*{message}.*--data.check off trains on it"):
        train(tiny(data={"path": str(store.path)}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_training_goes_on_where_it_is_told_to(tmp_path, tiny):
    store = _store(tmp_path / "store", _latents(), scale=())
    train(tiny(train={"steps": 1}, data={"path": str(store.path), "check": False}), tmp_path / "run")
    train(tiny(train={"steps": 2}, data={"path": str(store.path), "check": False}), tmp_path / "run")
    with pytest.raises(DataError, match="std after scaling"):
        train(tiny(train={"steps": 3}, data={"path": str(store.path)}), tmp_path / "run")


def _written_elsewhere(path, latents: torch.Tensor) -> LatentStore:
    """A store of one shard with numbers that ours would not write."""
    _store(path, _latents(), shard_size=64)
    file = path / "shard-00000.safetensors"
    save_file({"latents": latents, "labels": load_file(file)["labels"]}, file)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["shards"][0]["sha256"] = sha256_of(file)
    (path / "manifest.json").write_text(json.dumps(manifest))
    return LatentStore(path)


def test_numbers_that_are_not_finite_are_counted(tmp_path):
    store = _written_elsewhere(tmp_path / "store", NAN)
    message = "2 of 64 samples are not finite, first sample 7"
    with pytest.raises(DataError, match=message):
        check_store(store.path)
    with pytest.raises(DataError, match=message):
        check_scale(store)


def test_equal_samples_are_an_error_when_they_are_many(tmp_path, capsys):
    store = _store(tmp_path / "store", STUCK)
    with pytest.raises(DataError, match=r"3 of 64 samples are equal to another .*, first sample 40 and 3; .* 4 of one"):
        check_store(store.path)
    pair = torch.randn(2000, 1, 2, 2)
    pair[1999] = pair[0]
    few = write_store(tmp_path / "few", [(pair, torch.zeros(2000).long())], kind="sample", num_classes=0)
    capsys.readouterr()
    check_store(few.path)
    assert "warning: 1 of 2,000 samples are equal to another one, first sample 1999 and 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("how", "warning"),
    [
        ({"num_classes": 6}, "2 of 6 classes have no sample, first class 4"),
        ({"latents": _latents() + torch.tensor([0.0, 9.0, 0.0, 0.0])[:, None, None]}, "channel 1 has mean 1.6"),
        ({"latents": _latents() * torch.tensor([1.0, 1.0, 0.3, 1.0])[:, None, None]}, "channel 2 has std 0.29"),
    ],
)
def test_what_may_be_right_is_a_warning(tmp_path, capsys, how, warning):
    store = _store(tmp_path / "store", **{"latents": _latents(), **how})
    check_store(store.path)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and warnings[0].startswith(f"warning: {warning}")
    check_scale(store)


def test_shards_that_nobody_lists_or_that_repeat_are_named(tmp_path, capsys):
    latents = _latents()
    store = _store(tmp_path / "store", latents)
    (store.path / "shard-00007.safetensors").write_bytes(b"")
    check_store(store.path)
    assert "warning: shard-00007.safetensors is not in the manifest (files like it: 1)" in capsys.readouterr().out
    again = _store(tmp_path / "again", torch.cat((latents[:24], latents[:24])), shard_size=24)
    with pytest.raises(DataError, match=r"24 of 48 samples are equal .* \(and 1 more\)"):
        check_store(again.path)
    assert "error: 1 shards have the content of another one" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("count", "flip", "said"),
    [
        (1_281_166, "none", ["1,281,166 images in 1000 classes, 1 fewer than ImageNet's training set has"]),
        (1_281_167, "none", []),
        (2_562_334, "stored", []),
        (50_000, "none", []),
    ],
)
def test_images_missing_of_imagenet_are_a_warning(tmp_path, count, flip, said):
    batch = (torch.randn(count, 1, 1, 1), torch.arange(count) % 1000)
    store = write_store(tmp_path / "store", [batch], kind="sample", num_classes=1000, flip=flip, shard_size=count)
    assert [finding.text for finding in judge_labels(store)] == said


def test_images_that_encode_left_out_are_told(tmp_path, capsys):
    store = _store(tmp_path / "store", _latents())
    (store.path / "encode.json").write_text(json.dumps({"broken": [["a/1.jpg", "truncated"], ["b/2.jpg", "empty"]]}))
    check_store(store.path)
    told = "warning: 2 images were damaged and are left out, first a/1.jpg (truncated)"
    assert told in capsys.readouterr().out.splitlines()


def test_an_altered_shard_ends_the_check(tmp_path):
    store = _store(tmp_path / "store", _latents())
    file = store.path / "shard-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[1000] ^= 4
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"shard-00001.safetensors was altered"):
        check_store(store.path)


def test_the_command_ends_with_one_line_and_its_status(tmp_path, capsys, monkeypatch):
    store = _store(tmp_path / "store", _latents(), scale=())
    with pytest.raises(SystemExit) as ended:
        cli.main(["data", "check", str(store.path)])
    assert ended.value.code == 1
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and told[0].startswith(f"erd-fast: error: {store.path}: std after scaling")
    monkeypatch.chdir(latent_store(tmp_path / "right", "sample").path)
    cli.main(["data", "check", "."])
    assert (tmp_path / "right-check.png").is_file()
    cli.main(["data", "check", ".", "--picture", str(tmp_path / "x.png")])
    assert (tmp_path / "x.png").is_file()
