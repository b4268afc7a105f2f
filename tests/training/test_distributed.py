"""Ranks: torchrun with gloo on the CPU. The number of processes changes the speed and nothing else."""

import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from erd_fast.data import LatentStore, open_reader, write_store
from erd_fast.errors import ConfigError
from erd_fast.training.build import build_step
from erd_fast.training.config import RunConfig, TrainConfig
from erd_fast.training.distributed import Ranks, check_shares, process_group
from erd_fast.training.loop import train
from support.ranks import run_ranks
from support.run_folders import events

pytestmark = pytest.mark.slow

STEPS = 50
COMMON = ["train", "digits", "--train.log-every", "1", "--train.sample-every", "0", "--eval.images", "0"]
TINY = ["--model.hidden-size", "32", "--model.depth", "1", "--model.num-heads", "1", "--train.batch-size", "16"]


def _command(ranks: int, *arguments: str) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*torchrun, "-m", "erd_fast.cli", *COMMON, *TINY, *arguments]


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def _run(ranks: int, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = _command(ranks, "--out", str(folder), *arguments)
    return subprocess.run(command, env=_environment(), capture_output=True, text=True, timeout=240)


def _losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny) -> Path:
    """A run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    run_ranks(1, train, tiny(train={"steps": STEPS}), folder)
    return folder


@pytest.mark.parametrize(
    ("ranks", "train_fields", "loader"),
    [(2, {}, "resident"), (4, {}, "mmap"), (2, {"micro_batch": 2}, "resident")],
    ids=["2", "4", "2-micro"],
)
def test_more_ranks_train_the_same_run(alone, tmp_path, tiny, ranks, train_fields, loader):
    folder = tmp_path / "run"
    config = tiny(train={"steps": STEPS, **train_fields}, data={"loader": loader})
    first, *others = run_ranks(ranks, train, config, folder)
    # Sums of a gradient in another order differ by roundings, and so do the parameters after each step and the loss,
    # a mean over 1,024 of them: four roundings of 2^-24 a step, which add up.
    assert _losses(folder) == pytest.approx(_losses(alone), rel=STEPS * 2**-22)
    assert first["world_size"] == ranks and first["local_batch"] == 16 // ranks and others == [None] * (ranks - 1)


@pytest.mark.parametrize(("reduce_dtype", "micro_batch"), [("fp32", 0), ("bf16", 0), ("fp32", 2), ("bf16", 2)])
def test_low_precision_gradients_are_summed_over_ranks(tmp_path, tiny, reduce_dtype, micro_batch):
    how = {"steps": 8, "precision": "bf16", "micro_batch": micro_batch, "reduce_dtype": reduce_dtype}
    for ranks in (1, 2):
        run_ranks(ranks, train, tiny(train=how), tmp_path / str(ranks))
    # bfloat16 has 2^-9: a gradient of a share of the batch is rounded once more, and its sum once.
    assert _losses(tmp_path / "2") == pytest.approx(_losses(tmp_path / "1"), rel=2**-9)


def test_a_run_goes_on_with_another_number_of_ranks(alone, tmp_path, tiny):
    folder = tmp_path / "run"
    run_ranks(2, train, tiny(train={"steps": 20, "log_every": 8}), folder)
    (metrics,) = run_ranks(1, train, tiny(train={"steps": STEPS}), folder)
    assert events(folder) == [("end", 20), ("resume", 20), ("end", STEPS)] and metrics["world_size"] == 1
    assert _losses(folder)[-10:] == pytest.approx(_losses(alone)[-10:], rel=STEPS * 2**-22)


def test_the_sums_of_an_open_log_interval_go_on_once(alone, tmp_path, tiny):
    """Every rank has its share of them, and the checkpoint the whole."""
    folder, how = tmp_path / "run", {"save_every": 5, "keep_checkpoints": 0, "log_every": 8}
    run_ranks(2, train, tiny(train={"steps": 8, **how}), folder)
    shutil.rmtree(folder / "checkpoints" / "step-00000008")  # as if it had been killed before
    run_ranks(2, train, tiny(train={"steps": 9, **how}), folder)
    assert ("resume", 5) in events(folder)
    expected = _losses(alone)
    assert _losses(folder) == pytest.approx([sum(expected[:8]) / 8, expected[8]], rel=STEPS * 2**-22)


def _after_sums(config: RunConfig, store: LatentStore) -> list[np.ndarray]:
    with process_group() as (ranks, device):
        step = build_step(config, store, device, ranks)
        batches = open_reader(store, "resident", device).batches(step.plan, 0)
        for _ in range(2):
            step(batches)
        return [p.grad.numpy() for p in step.model.parameters()]


def test_every_rank_has_the_sum_of_all_gradients(tiny, digits):
    (alone,) = run_ranks(1, _after_sums, tiny(), digits)
    for gradients in run_ranks(2, _after_sums, tiny(), digits):
        for found, expected in zip(gradients, alone, strict=True):
            # By norm: sums of 256 terms (16 images of 16 tokens) in another order, sqrt(256) roundings of 2^-24, and as
            # many in each of the three products that a gradient comes through.
            assert np.linalg.norm(found - expected) <= 4 * 16 * 2**-24 * np.linalg.norm(expected)


def test_a_rank_that_dies_stops_them_all(tmp_path):
    command = _command(2, "--out", str(tmp_path / "run"), "--train.steps", "100000")
    with subprocess.Popen(
        command, env=_environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as run:
        try:
            log = tmp_path / "run" / "log.jsonl"
            _wait(lambda: log.is_file() and log.stat().st_size > 0)
            workers = [int(pid) for pid in _children(run.pid)]
            os.kill(workers[-1], signal.SIGKILL)
            _, errors = run.communicate(timeout=60)
        finally:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode != 0
    assert "another rank has stopped" in errors or "SIGKILL" in errors
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def test_a_signal_stops_all_ranks_at_one_step(tmp_path):
    folder = tmp_path / "run"
    command = _command(2, "--out", str(folder), "--train.steps", "100000")
    with subprocess.Popen(command, env=_environment(), stdout=subprocess.PIPE, text=True) as run:
        log = folder / "log.jsonl"
        _wait(lambda: log.is_file() and log.stat().st_size > 0)
        run.send_signal(signal.SIGTERM)
        said, _ = run.communicate(timeout=60)
    assert "stopped at step" in said
    (checkpoint,) = (folder / "checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step-"))
    assert said.count(f"stopped at step {step};") == 1 and run.returncode != 0


def test_mistakes_are_told_once(tmp_path):
    done = _run(2, tmp_path / "run", "--train.batch-size", "15")
    assert done.returncode != 0
    assert done.stderr.count("erd-fast: error") == 1
    assert "train.batch_size: given 15 for 2 ranks, allowed multiples of 2" in done.stderr
    assert not (tmp_path / "run").exists()


def _config(**fields) -> RunConfig:
    return RunConfig(train=TrainConfig(batch_size=12, **fields))


def test_shares_that_do_not_divide_are_refused():
    check_shares(_config(micro_batch=2), Ranks(0, 3))
    with pytest.raises(ConfigError, match=r"micro_batch: given 6, allowed divisors of a rank's share of the batch, 4"):
        check_shares(_config(micro_batch=6), Ranks(0, 3))


def _train_with_a_seed_of_its_own(config: RunConfig, folder: Path) -> None:
    train(dataclasses.replace(config, train=dataclasses.replace(config.train, seed=int(os.environ["RANK"]))), folder)


def test_differing_configurations_are_named_and_nothing_is_written(tmp_path, tiny):
    with pytest.raises(AssertionError, match=r"train.seed: given 1, and 0 on rank 0: all ranks need the same configur"):
        run_ranks(2, _train_with_a_seed_of_its_own, tiny(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_more_ranks_than_samples_are_refused(tmp_path, tiny):
    latents = [(torch.zeros(1, 1, 8, 8), torch.zeros(1).long())]
    store = write_store(tmp_path / "store", latents, kind="sample", num_classes=0)
    config = tiny(data={"path": str(store.path), "check": False}, eval={"cfg_scale": 1.0})
    with pytest.raises(AssertionError, match=r"nproc-per-node: given 2 ranks, allowed up to 1, one a sample"):
        run_ranks(2, train, config, tmp_path / "run")


def _wait(ready) -> None:
    began = time.monotonic()
    while not ready():
        assert time.monotonic() - began < 120, "the run did not begin"
        time.sleep(0.1)


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_ranks_draw_disjoint_parts_of_one_batch(make_step, tiny, digits):
    config = tiny(train={"micro_batch": 2})
    whole = make_step(tiny()).plan(0).tolist()
    parts = []
    for rank in range(4):
        step = build_step(config, digits, torch.device("cpu"), Ranks(rank, 4))
        parts += [step.plan(number).tolist() for number in range(2)]
    assert sorted(itertools.chain(*parts)) == sorted(whole)
