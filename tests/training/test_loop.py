"""loop: the same run however often it is stopped, and what it refuses."""

import fcntl
import json
import math
import os
import re
import signal
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from erd_fast.autoencoder import Autoencoder
from erd_fast.data import write_store
from erd_fast.errors import ConfigError, RunError
from erd_fast.ops.availability import extension_unavailable
from erd_fast.report import write_report
from erd_fast.sampling.images import save
from erd_fast.training import loop
from erd_fast.training.build import describe
from erd_fast.training.config import load_config
from erd_fast.training.loop import train
from erd_fast.training.sample_run import open_decoder, sample_run
from support.fixtures import latent_store
from support.run_folders import Killed, checkpoints, die, events, same_weights, terminate


def test_a_seed_is_a_run_bit_for_bit(tmp_path, tiny, training_lines):
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        train(tiny(train={"seed": seed}), tmp_path / name)
    one, two, other = (training_lines(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two and same_weights(tmp_path / "one", tmp_path / "two", 6)
    assert [line["step"] for line in one] == [1, 2, 3, 4, 5, 6]
    assert all(a["loss"] != b["loss"] for a, b in zip(one, other, strict=True))


def test_the_learning_rate_that_is_logged_warms_up_and_falls_to_the_end(tmp_path, tiny, training_lines):
    train(tiny(optim={"lr": 2e-3, "warmup": 2, "schedule": "cosine"}), tmp_path / "run")
    logged = [line["lr"] for line in training_lines(tmp_path / "run")]
    half_cosine = [1e-3 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    assert logged == pytest.approx([1e-3, 2e-3, *half_cosine], rel=2**-22)


def test_readers_give_the_same_run_bit_for_bit(tmp_path, tiny, training_lines):
    for loader in ("resident", "mmap"):
        train(tiny(data={"loader": loader}), tmp_path / loader)
    assert training_lines(tmp_path / "resident") == training_lines(tmp_path / "mmap")
    assert same_weights(tmp_path / "resident", tmp_path / "mmap", 6)


def test_lines_of_longer_intervals_are_means_of_those_of_every_step(tmp_path, tiny, training_lines):
    train(tiny(), tmp_path / "each")
    train(tiny(train={"log_every": 4}), tmp_path / "four")
    each, four = training_lines(tmp_path / "each"), training_lines(tmp_path / "four")
    assert [line["step"] for line in four] == [4, 6]  # the last step is logged in any case
    losses = [line["loss"] for line in each]
    assert [line["loss"] for line in four] == pytest.approx([sum(losses[:4]) / 4, sum(losses[4:]) / 2], rel=1e-12)
    assert [line["grad_norm"] for line in four] == [each[3]["grad_norm"], each[5]["grad_norm"]]


def test_another_configuration_is_refused_and_the_run_kept(trained, tiny):
    before = (trained / "config.yaml").read_bytes()
    with pytest.raises(ConfigError, match=r"optim.lr: the run has 0.01, given 0.5.*another folder by --out"):
        train(tiny(train={"steps": 50}, optim={"lr": 0.5}), trained)
    assert (trained / "config.yaml").read_bytes() == before


def test_a_folder_that_is_no_run_is_refused(tmp_path, tiny):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match=f"{tmp_path} is not empty and holds no run"):
        train(tiny(), tmp_path)
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_a_folder_below_a_file_is_refused(tmp_path, tiny):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=f"cannot create the folder {tmp_path}/file/run: Not a directory"):
        train(tiny(), tmp_path / "file" / "run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(tmp_path, tiny):
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(RunError, match=r"no permission to write|cannot create the folder"):
            train(tiny(), tmp_path)
    finally:
        tmp_path.chmod(0o755)


def test_one_process_trains_in_a_folder(tmp_path, tiny):
    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RunError, match=f"another process is training in {tmp_path}"):
            train(tiny(), tmp_path)
    train(tiny(), tmp_path)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"hidden_size": 33}}, "hidden_size: given 33"),
        ({"model": {"patch_size": 3}}, "patch_size"),
        ({"data": {"path": ""}}, "--data.path must name a latent store"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, tiny, sections, message):
    with pytest.raises(ConfigError, match=message):
        train(tiny(**sections), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_images_that_are_not_square_are_refused(tmp_path, tiny):
    store = write_store(
        tmp_path / "s", [(torch.zeros(2, 1, 4, 8), torch.zeros(2).long())], kind="sample", num_classes=0
    )
    with pytest.raises(ConfigError, match=r"data.path: .* holds 4 x 8 images; allowed square ones"):
        train(tiny(data={"path": str(store.path)}), tmp_path / "run")


def test_a_run_stopped_before_its_first_line_can_begin_again(tmp_path, tiny, monkeypatch):
    config = tiny()
    with monkeypatch.context() as patch:
        patch.setattr(loop.RunLog, "cut_back", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "run")
    train(config, tmp_path / "run")
    assert checkpoints(tmp_path / "run")


def test_a_run_on_latents_samples_latents_as_they_are_stored(tmp_path, tiny):
    store = latent_store(tmp_path / "store", "mean_std")
    train(tiny(data={"path": str(store.path)}, eval={"cfg_scale": 1.0}), tmp_path / "run")
    latents, labels = sample_run(tmp_path / "run", 4, decode=open_decoder(tmp_path / "run", "none"), steps=2)
    assert latents.dtype == np.float32 and latents.shape == (4, 4, 8, 8)
    assert labels.tolist() == [0, 2, 5, 7]
    # Stored as (x0 / 0.5 + 1): an untrained model gives x0 of mean 0, so z of mean 1, within its own spread.
    assert abs(latents.mean() - 1.0) < 4 * latents.std() / latents.size**0.5 + 0.5
    save(latents, labels, tmp_path / "z.npz")
    assert np.array_equal(np.load(tmp_path / "z.npz")["arr_0"], latents)
    with pytest.raises(ConfigError, match=r"out must end in .npz for latents, got .*z\.png"):
        save(latents, labels, tmp_path / "z.png")


def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_saved(tmp_path, tiny):
    config = tiny(train={"steps": 40, "save_every": 1, "keep_checkpoints": 0, "log_every": 100}, optim={"lr": 1e18})
    with pytest.raises(
        RunError, match=r"(grad_norm|largest_parameter) is (nan|inf) at step (\d+), .*lower optim.lr"
    ) as ended:
        train(config, tmp_path / "run")
    step = int(str(ended.value).split(" at step ")[1].split(",")[0])
    assert step < 40  # found when it should have been saved; the next log line would be that of step 40
    assert checkpoints(tmp_path / "run") == list(range(1, step))


def test_a_batch_that_is_not_finite_is_skipped_and_counted(tmp_path, tiny, monkeypatch):
    def spoil(number: int) -> None:
        backward = torch.autograd.backward
        calls = []

        def spoiled(tensor, gradient):
            calls.append(None)
            backward(tensor, gradient * math.nan if len(calls) == number else gradient)

        monkeypatch.setattr(torch.autograd, "backward", spoiled)

    spoil(number=5)  # the first is the rehearsal
    train(tiny(train={"steps": 8, "log_every": 4}), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines if "loss" in line] == [1, 1]
    assert all(math.isfinite(line["loss"]) for line in lines if "loss" in line)


def test_a_run_that_could_take_no_step_at_all_fails(tmp_path, tiny, monkeypatch):
    backward = torch.autograd.backward
    monkeypatch.setattr(torch.autograd, "backward", lambda tensor, gradient: backward(tensor, gradient * math.nan))
    for steps in (1, 3):
        with pytest.raises(RunError, match=f"grad_norm is nan at step {steps}, and nothing is saved of it"):
            train(tiny(train={"steps": steps}), tmp_path / str(steps))
        assert not (tmp_path / str(steps) / "checkpoints").exists()


def test_float16_logs_that_it_looks_for_its_scale(tmp_path, tiny, monkeypatch, training_lines):
    monkeypatch.setattr("erd_fast.optim.adamw_ema.INITIAL_LOSS_SCALE", 2.0**32)
    train(tiny(train={"steps": 30, "precision": "fp16"}), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    looked = [line["loss_scale"] for line in lines if line.get("event") == "skipped"]
    taken = [line for line in lines if "loss" in line]
    assert looked and looked == [2.0 ** (31 - number) for number in range(len(looked))]
    assert taken[-1]["skipped"] >= len(looked) and taken[0]["loss_scale"] == looked[-1]
    assert "no step was taken" in write_report(tmp_path / "run").read_text()


def test_previews_come_at_their_steps_and_at_the_end(tmp_path, tiny):
    train(tiny(train={"steps": 5, "sample_every": 2}), tmp_path / "run")
    names = sorted(os.listdir(tmp_path / "run" / "samples"))
    assert names == ["step-00000002.png", "step-00000004.png", "step-00000005.png"]
    for name in names:
        with Image.open(tmp_path / "run" / "samples" / name) as picture:
            assert picture.size == (662, 266)


def test_previews_and_judgements_change_nothing_in_training(tmp_path, tiny, training_lines, monkeypatch):
    monkeypatch.setattr(loop, "judge_samples", lambda config, step, store: {"class_accuracy": int(step.counter) / 1e3})
    train(tiny(), tmp_path / "plain")
    train(tiny(train={"sample_every": 1}, eval={"every": 2, "images": 20}), tmp_path / "watched")
    assert training_lines(tmp_path / "plain") == training_lines(tmp_path / "watched")
    assert same_weights(tmp_path / "plain", tmp_path / "watched", 6)
    lines = [json.loads(line) for line in (tmp_path / "watched" / "log.jsonl").read_text().splitlines()]
    judged = [(line["step"], line["class_accuracy"]) for line in lines if "class_accuracy" in line]
    assert judged == [(2, 0.032), (4, 0.064), (6, 0.096)]
    assert json.loads((tmp_path / "watched" / "metrics.json").read_text())["class_accuracy"] == 0.096


def test_a_run_killed_in_its_last_judgement_judges_when_it_goes_on(tmp_path, tiny, monkeypatch, training_lines):
    config = tiny(eval={"images": 20})
    monkeypatch.setattr(loop, "judge_samples", lambda *given: die())
    with pytest.raises(Killed):
        train(config, tmp_path / "run")
    monkeypatch.setattr(loop, "judge_samples", lambda *given: {"class_accuracy": 0.5})
    assert train(config, tmp_path / "run")["class_accuracy"] == 0.5
    assert events(tmp_path / "run") == [("resume", 6), ("end", 6)]
    assert [line["step"] for line in training_lines(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_metrics_are_the_last_values_with_the_size_of_the_world(tmp_path, tiny, training_lines):
    result = train(tiny(), tmp_path / "run")
    stored = json.loads((tmp_path / "run" / "metrics.json").read_text())
    last = training_lines(tmp_path / "run")[-1]
    assert stored == result and stored.items() >= last.items()
    assert (stored["world_size"], stored["local_batch"], stored["images"]) == (1, 16, 96)
    assert all(stored[name] > 0 for name in ("images_per_sec", "step_ms", "tflops"))
    assert 0 <= stored["data_wait_pct"] <= 100


def test_latents_of_no_known_autoencoder_are_trained_without_previews(tmp_path, tiny, capsys):
    store = latent_store(tmp_path / "store", "mean_std", count=20, shard_size=7)
    config = tiny(data={"path": str(store.path)}, train={"sample_every": 1}, eval={"images": 10})
    result = train(config, tmp_path / "run")
    assert "class_accuracy" not in result and not (tmp_path / "run" / "samples").exists()
    command = f"erd-fast sample {tmp_path}/run --vae PATH|ID --out x.png"
    assert capsys.readouterr().out.splitlines()[0] == (
        f'no previews: the source of the autoencoder is not recorded; draw samples with "{command}"'
    )


def test_without_diffusers_latents_are_trained_without_previews(tmp_path, tiny, given, whole, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for every, lines in ((0, 0), (1, 1)):
        config = tiny(data={"path": str(given / "whole")}, train={"steps": 2, "sample_every": every})
        train(config, tmp_path / str(every))
        said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("no previews: ")]
        assert len(said) == lines and all("pip install 'erd-fast[vae]'" in line for line in said)
    assert checkpoints(tmp_path / "1") == [2] and not (tmp_path / "1" / "samples").exists()


def test_previews_of_latents_change_nothing_in_training(tmp_path, tiny, given, latent_run, training_lines):
    train(tiny(data={"path": str(given / "whole")}, train={"steps": 3}), tmp_path / "plain")
    assert training_lines(tmp_path / "plain") == training_lines(latent_run)
    assert same_weights(tmp_path / "plain", latent_run, 3)


def test_a_preview_that_does_not_fit_into_the_gpu_is_left_out(tmp_path, tiny, given, whole, capsys, monkeypatch):
    decode, steps = Autoencoder.decode, []

    def full_at_first(*arguments):
        steps.append(None)
        if len(steps) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore.")
        return decode(*arguments)

    monkeypatch.setattr(Autoencoder, "decode", full_at_first)
    train(tiny(data={"path": str(given / "whole")}, train={"steps": 2, "sample_every": 1}), tmp_path / "run")
    said = "no preview at step 1: the GPU's memory is full (CUDA out of memory. Tried to allocate 2 GiB.)"
    assert capsys.readouterr().out.splitlines().count(said) == 1
    assert os.listdir(tmp_path / "run" / "samples") == ["step-00000002.png"]


def test_plain_lines_tell_size_rate_and_time_left(tmp_path, tiny, capsys):
    train(tiny(), tmp_path / "run")
    head, *lines, last = capsys.readouterr().out.splitlines()
    if extension_unavailable("cpu"):
        del lines[0]  # it says so
    assert "1797 samples, resident reader; batch 16, steps 0 to 6" in head and "fp32" in head
    assert [line.split()[1] for line in lines] == [f"{step}/6" for step in range(1, 7)]
    assert all("loss" in line and re.search(r" images/s  00:00:\d\d left$", line) for line in lines)
    assert last == f"finished {tmp_path / 'run'} at step 6"


@pytest.fixture
def interruptible():
    """Python's own handler of SIGINT, which programs started in the background of a shell do not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_second_signal_acts_at_once_and_handlers_are_put_back(tmp_path, tiny, at_step):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    at_step(2, lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), tmp_path / "run")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_an_interrupt_saves_and_exits_with_its_number(tmp_path, tiny, at_step):
    at_step(2, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as stopped:
        train(tiny(), tmp_path / "run")
    assert stopped.value.code == 130 and checkpoints(tmp_path / "run") == [2]


def test_a_signal_in_the_last_step_lets_the_run_finish(tmp_path, tiny, at_step):
    at_step(6, terminate)
    train(tiny(), tmp_path / "run")
    assert events(tmp_path / "run") == [("end", 6)]


@pytest.mark.parametrize("deterministic", [True, False])
def test_deterministic_is_passed_to_torch(tmp_path, tiny, at_step, deterministic):
    seen = []
    at_step(1, lambda: seen.append(torch.are_deterministic_algorithms_enabled()))
    try:
        train(tiny(train={"steps": 1, "deterministic": deterministic}), tmp_path / "run")
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [deterministic]


def test_the_description_is_the_configuration_and_the_size(tmp_path, tiny):
    text = describe(tiny())
    (tmp_path / "config.yaml").write_text(text)
    assert load_config(tmp_path / "config.yaml") == tiny()
    assert "# 6 steps of 16 images: 0.05 epochs" in text and "1,797 samples, pixels (1, 8, 8)" in text


@pytest.mark.parametrize(("schedule", "target", "share"), [("cosine", "eps", 0.5), ("flow", "u", 0.8)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_small_model_learns_the_digits(tmp_path, tiny, training_lines, schedule, target, share, precision):
    """The flow target has more that nobody can predict, the digit itself, so its loss falls by less."""
    objective = {"schedule": schedule, "target": target}
    train(tiny(train={"steps": 60, "precision": precision}, diffusion=objective, optim={"lr": 3e-3}), tmp_path / "run")
    losses = [line["loss"] for line in training_lines(tmp_path / "run")]
    assert sum(losses[-10:]) < share * sum(losses[:10])
