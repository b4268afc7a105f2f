"""cli: what the commands print, write and refuse."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import erd_fast
from erd_fast import info
from erd_fast.autoencoder import Autoencoder
from erd_fast.cli import main
from erd_fast.sampling.images import grid
from erd_fast.training.config import RunConfig, config_text, load_config
from erd_fast.training.presets import PRESETS, get_preset

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def empty(tmp_path, monkeypatch) -> Path:
    """The current folder: nothing may appear in it unless a test asks for it."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "120")
    return folder


@pytest.fixture
def fails(capsys, empty):
    """``fails(*arguments)``: run them, check that they end with an error and write nothing; (status, message)."""

    def run(*arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        out, error = capsys.readouterr()
        assert out == "" and "Traceback" not in error and list(empty.iterdir()) == []
        return ended.value.code, " ".join(error.replace("│", " ").split())

    return run


@pytest.fixture
def tiny_yaml(tmp_path, tiny) -> str:
    (tmp_path / "tiny.yaml").write_text(config_text(tiny()))
    return str(tmp_path / "tiny.yaml")


def test_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"erd-fast {erd_fast.__version__}\n"


def test_info_as_text_and_as_json(capsys):
    main(["info"])
    assert capsys.readouterr().out == info.describe() + "\n"
    main(["info", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts == info.collect()
    assert facts["ops"]["q_sample"]["reference"].keys() == {"available", "reason"}


def test_help_of_train_lists_presets_and_every_field(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", "--help"])
    words = capsys.readouterr().out.replace("_", "-").split()
    assert ended.value.code == 0
    assert all(f"{name}:" in words for name in PRESETS)
    for name in RunConfig().flat():
        assert any(word.rstrip(",") == f"--{name.replace('_', '-')}" for word in words), name


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_lists_the_commands(capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    out = capsys.readouterr().out
    assert ended.value.code == 0 and all(name in out for name in ("train", "sample", "report", "info", "--version"))


@pytest.mark.parametrize(("word", "value"), [("on", "true"), ("off", "false"), ("true", "true"), ("False", "false")])
def test_booleans_take_a_word(capsys, empty, word, value):
    main(["train", "digits", "--train.deterministic", word, "--model.kernels", word, "--dry-run"])
    printed = capsys.readouterr().out
    assert f"deterministic: {value}" in printed and f"kernels: {value}" in printed


def test_a_boolean_that_is_neither_on_nor_off_is_named(capsys, empty):
    with pytest.raises(SystemExit):
        main(["train", "digits", "--model.kernels", "of", "--dry-run"])
    assert "--model.kernels: must be on or off (true or false), got of" in " ".join(capsys.readouterr().err.split())


def test_dry_run_prints_configuration_and_size_and_writes_nothing(capsys, tmp_path, empty):
    main(["train", "digits", "--dry-run"])
    out = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(out)
    assert load_config(tmp_path / "printed.yaml") == get_preset("digits")
    assert "parameters" in out and "1,797 samples" in out and "epochs" in out
    assert list(empty.iterdir()) == []


def test_options_go_before_the_file_and_the_file_before_the_preset(capsys, tmp_path):
    (tmp_path / "c.yaml").write_text("train: {steps: 7, batch_size: 32}\noptim: {lr: 3e-4}\n")
    for spelling in (["--config", f"{tmp_path}/c.yaml"], [f"--config={tmp_path}/c.yaml"]):
        options = ["--train.steps", "9", "--optim.betas", "0.8", "0.9", "--train.keep-checkpoints", "5", "--dry-run"]
        main(["train", "digits", *spelling, *options])
        (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
        found, preset = load_config(tmp_path / "printed.yaml").flat(), get_preset("digits").flat()
        changed = {name: value for name, value in found.items() if value != preset[name]}
        assert changed == {
            "train.steps": 9,
            "train.batch_size": 32,
            "train.keep_checkpoints": 5,
            "optim.lr": 3e-4,
            "optim.betas": (0.8, 0.9),
        }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("trian digits", "trian"),
        ("train digit", "unknown preset 'digit' (did you mean 'digits'?); allowed: digits"),
        ("train --train.steps 3 nonsense", "nonsense"),
        ("train digits --train.stepz 3", "--train.steps"),
        ("train digits --train.steps x", "--train.steps"),
        ("train digits --train.steps 0", "train.steps: given 0, allowed 1 or more"),
        ("train digits --train.steps", "--train.steps"),
        ("train digits --train.precision fp8", "fp8"),
        ("train digits --train.micro-batch 7", "train.micro_batch: given 7, allowed divisors of train.batch_size"),
        (
            "train digits --diffusion.schedule cosin",
            "diffusion.schedule: unknown name 'cosin' (did you mean 'cosine'?)",
        ),
        ("train digits --model.name DiT-Tiny/2", "model.name: unknown name 'DiT-Tiny/2' (did you mean 'DiT-tiny/2'?)"),
        ("train digits --model.hidden-size 33", "hidden_size: given 33"),
        ("train digits --optim.betas 0.9", "--optim.betas"),
        ("train digits --eval.cfg-scale 2 --train.label-drop 0", "guidance needs a trained null label"),
        ("train digits --config none.yaml", "none.yaml: cannot be read"),
        ("sample run --out x.gif", "out: given x.gif, allowed a name ending in .png or .npz, or a folder"),
        ("sample run", "--out"),
        ("sample run --out x.png --guidance-interval 1 0", "guidance interval: given 1.0 to 0.0, allowed lo <= hi"),
    ],
)
def test_a_mistake_is_one_message_and_status_2(fails, arguments, message):
    code, error = fails(*arguments.split())
    assert code == 2 and message in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train digits --data.path digit", "data.path: digit is no folder"),
        ("sample run --out x.png", "run is no checkpoint and no run with one"),
        ("report run", "run is not a folder"),
    ],
)
def test_what_is_not_there_is_one_message_and_status_1(fails, arguments, message):
    code, error = fails(*arguments.split())
    assert code == 1 and error.startswith("erd-fast: error: ") and message in error


def test_a_file_with_an_unknown_field_is_refused(fails, tmp_path):
    (tmp_path / "c.yaml").write_text("train: {step: 7}\n")
    code, error = fails("train", "digits", "--config", f"{tmp_path}/c.yaml")
    assert code == 2 and "c.yaml: unknown field 'train.step' (did you mean 'train.steps'?)" in error


def test_one_file_at_a_time(fails, tiny_yaml):
    code, error = fails("train", "digits", "--config", tiny_yaml, "--config", "other.yaml")
    assert code == 2 and "--config once" in error


def test_folders_that_cannot_be_trained_in_are_refused(fails, tmp_path, trained, tiny_yaml):
    train = ("train", "digits", "--config", tiny_yaml, "--out")
    code, error = fails(*train, str(trained))
    assert code == 2 and "optim.lr: the run has 0.01, given 0.001" in error
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("")
    code, error = fails(*train, f"{tmp_path}/full")
    assert code == 1 and "is not empty and holds no run" in error
    code, error = fails(*train, f"{tmp_path}/full/notes/run")
    assert code == 1 and "cannot create the folder" in error


def test_train_writes_a_run_with_its_report_and_resumes_by_the_same_command(capsys, empty, tiny_yaml, tiny):
    arguments = ["train", "digits", "--config", tiny_yaml, "--train.steps", "3"]
    main(arguments)
    run = empty / "runs" / "digits"
    names = {"config.yaml", "log.jsonl", "metrics.json", "checkpoints", "report.html"}
    assert names <= set(os.listdir(run)) and os.listdir(empty) == ["runs"]
    assert f"report: {Path('runs/digits/report.html')}" in capsys.readouterr().out
    assert load_config(run / "config.yaml") == dataclasses.replace(
        tiny(), train=dataclasses.replace(tiny().train, steps=3)
    )
    main(arguments)
    assert "runs/digits is finished: step 3 of 3" in capsys.readouterr().out
    main([*arguments[:-1], "4"])
    assert "resuming at step 3" in capsys.readouterr().out
    (run / "report.html").unlink()
    main(["report", str(run)])
    assert (run / "report.html").is_file()


def test_samples_as_a_grid(capsys, empty, trained):
    main(["sample", str(trained), "--n", "12", "--steps", "2", "--out", "x.png"])
    with Image.open(empty / "x.png") as picture:
        assert picture.size == (10 * 66 + 2, 2 * 66 + 2)
    assert capsys.readouterr().out == "wrote x.png: 12 samples, uint8 (8, 8, 1)\n"


def test_samples_as_arrays_and_as_a_folder_are_the_same_images(empty, trained):
    checkpoint = trained / "checkpoints" / "step-00000040"
    for source, out in ((trained, "x.npz"), (checkpoint, "folder")):
        main(["sample", str(source), "--n", "5", "--classes", "7", "3", "--steps", "2", "--seed", "9", "--out", out])
    stored = np.load(empty / "x.npz")
    assert stored["arr_0"].shape == (5, 8, 8, 1) and stored["arr_0"].dtype == np.uint8
    assert stored["arr_1"].tolist() == [7, 3, 7, 3, 7]
    assert sorted(os.listdir("folder")) == [f"{number:06d}.png" for number in range(5)]
    for number, pixels in enumerate(stored["arr_0"]):
        with Image.open(empty / "folder" / f"{number:06d}.png") as picture:
            assert np.array_equal(np.asarray(picture), pixels[:, :, 0])


def test_samples_of_latents_are_pictures_and_latents_on_request(capsys, empty, latent_run, given):
    command = ["sample", str(latent_run), "--n", "5", "--steps", "2", "--out"]
    for out in (["x.png"], ["x.npz"], ["folder"], ["z.npz", "--vae", "none"]):
        main([*command, *out])
    assert capsys.readouterr().out.splitlines() == [
        *(f"wrote {out}: 5 samples, uint8 (32, 32, 3)" for out in ("x.png", "x.npz", "folder")),
        "wrote z.npz: 5 samples, float32 (4, 4, 4)",
    ]
    latents = torch.from_numpy(np.load("z.npz")["arr_0"])
    decoded = Autoencoder(str(given / "vae"), torch.device("cpu")).decode(latents).numpy()
    assert np.array_equal(np.load("x.npz")["arr_0"], decoded) and len(np.unique(decoded)) > 50
    with Image.open("x.png") as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(grid(decoded)))
    for number, image in enumerate(decoded):
        with Image.open(f"folder/{number:06d}.png") as picture:
            assert np.array_equal(np.asarray(picture), image)


@pytest.mark.parametrize("out", ["x.png", "x.npz", "folder"])
def test_without_an_autoencoder_nothing_is_sampled(fails, latent_run, monkeypatch, out):
    """Nor are latents written that were not asked for."""
    monkeypatch.setattr("erd_fast.training.sample_run.generate", lambda *_, **__: pytest.fail("sampled"))
    remedy = "name an autoencoder with --vae PATH|ID, or write latents with --vae none --out x.npz"
    code, error = fails("sample", str(latent_run), "--vae", "absent", "--out", out)
    assert code == 1 and error.endswith(f"got absent; {remedy}")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    code, error = fails("sample", str(latent_run), "--out", out)
    assert code == 2 and error.endswith(f"diffusers is not installed: pip install 'erd-fast[vae]'; {remedy}")


def test_latents_are_no_picture_files(fails, latent_run):
    for out in ("x.png", "folder"):
        code, error = fails("sample", str(latent_run), "--vae", "none", "--out", out)
        assert code == 2 and "vae must be a PATH or an ID for pictures, got none" in error


def test_pixels_take_no_autoencoder(fails, trained):
    code, error = fails("sample", str(trained), "--vae", "owner/name", "--out", "x.png")
    assert code == 2 and "vae must be none for a run on pixels, got owner/name" in error


def test_guidance_options_reach_the_sampler(empty, trained):
    options = {
        "plain": [],
        "guided": ["--cfg-scale", "3"],
        "everywhere": ["--cfg-scale", "3", "--guidance-interval", "0", "1"],
        "nowhere": ["--cfg-scale", "3", "--guidance-interval", "7", "9", "--guidance-unit", "step"],
        "raw": ["--no-ema"],
    }
    images = {}
    for name, more in options.items():
        main(["sample", str(trained), "--n", "4", "--steps", "3", "--out", f"{name}.npz", *more])
        images[name] = np.load(empty / f"{name}.npz")["arr_0"].tobytes()
    assert images["everywhere"] == images["guided"] and images["nowhere"] == images["plain"]
    assert len(set(images.values())) == 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--classes 10", "classes: given 10, allowed 0 to 9"),
        ("--n 0", "n: given 0, allowed 1 or more"),
        ("--steps 0", "steps: given 0, allowed 1 or more"),
        ("--guidance-unit radians", "radians"),
    ],
)
def test_samples_that_are_not_allowed_are_refused(fails, trained, more, message):
    code, error = fails("sample", str(trained), "--out", "x.png", *more.split())
    assert code == 2 and message in error


def test_samples_below_a_file_are_refused(fails, trained, tmp_path):
    (tmp_path / "file").write_text("")
    code, error = fails("sample", str(trained), "--n", "1", "--steps", "1", "--out", f"{tmp_path}/file/x.png")
    assert code == 1 and "cannot create the folder" in error


def test_a_damaged_checkpoint_is_one_message(fails, trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    os.truncate(run / "checkpoints" / "step-00000040" / "ema.safetensors", 100)
    code, error = fails("sample", str(run), "--out", "x.png")
    assert code == 1 and "ema.safetensors is damaged" in error


def test_the_program_ends_quietly_when_nobody_reads():
    """Output that fits Python's buffer meets the closed pipe at the last flush, longer output before."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "erd_fast.cli", "--version"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with os.fdopen(writer, "w") as closed:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=closed, stderr=subprocess.PIPE, timeout=60)
    assert (done.returncode, done.stderr) == (1, b"")


def test_what_the_system_refuses_is_one_message(monkeypatch, capsys, tmp_path):
    def refused(self):
        raise PermissionError(13, "Permission denied", "locked/config.yaml")

    monkeypatch.setattr(Path, "is_file", refused)
    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path)])
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert error == "erd-fast: error: [Errno 13] Permission denied: 'locked/config.yaml'\n"


@pytest.mark.parametrize(("option", "given"), [("--seed", "-1"), ("--cfg-scale", "nan"), ("--cfg-scale", "-1")])
def test_sampler_settings_out_of_range_are_refused(trained, tmp_path, capsys, option, given):
    with pytest.raises(SystemExit) as ended:
        main(["sample", str(trained), "--out", str(tmp_path / "x.png"), option, given])
    assert ended.value.code == 2
    assert f"{option[2:].replace('-', '_')}: given {given}" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


def test_a_run_that_is_not_there_leaves_no_output_folder(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["sample", str(tmp_path / "typo"), "--out", str(tmp_path / "pictures")])
    assert ended.value.code == 1
    assert "typo is no checkpoint and no run with one" in capsys.readouterr().err
    assert not (tmp_path / "pictures").exists()
