"""The training loop: start or resume, step, log, preview, judge, save."""

import contextlib
import fcntl
import math
import os
import signal
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from erd_fast.data import Batch, LatentStore, open_dataset, open_reader
from erd_fast.errors import ConfigError, RunError
from erd_fast.files import make_folder, read_json, remove_partial, write_json, write_text
from erd_fast.models import create_model, model_flops
from erd_fast.ops import OPS, choices
from erd_fast.optim import AdamWEMA
from erd_fast.training.checkpoint import CheckpointState, latest_checkpoint, load_state, restore, save_checkpoint
from erd_fast.training.config import RunConfig, config_text, load_config, refuse_changes
from erd_fast.training.metrics import RunLog, Speed, read_log
from erd_fast.training.preview import can_preview, judge_samples, why_not_judged, write_preview
from erd_fast.training.step import TrainStep, learning_rate, make_process


def train(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Train ``config`` in the run folder, from its newest checkpoint if it has one. Returns the last metrics.

    The first SIGINT or SIGTERM ends the current step, saves a checkpoint and exits with 128 + its number.

    Raises:
        ConfigError: the folder holds a run of another configuration, or the configuration does not fit the store.
        DataError: the store or a checkpoint is damaged.
        RunError: no permission, another process trains in the folder, or the loss is not finite.
    """
    _check_folder(config, folder)
    run = _Run(config, folder, open_store(config))  # before anything is written: sizes may not be allowed
    make_folder(folder)
    with _only_process_in(folder), _stop_requests() as stop:
        return run.go(stop)


def open_store(config: RunConfig) -> LatentStore:
    """The store of ``data.path``, checked against the configuration."""
    if not config.data.path:
        raise ConfigError("data.path: not given, allowed a folder of a latent store or of IDX files, or digits")
    store = open_dataset(config.data.path)
    if not store.manifest.num_classes and config.eval.cfg_scale != 1:
        raise ConfigError(f"eval.cfg_scale: given {config.eval.cfg_scale}, allowed 1: {store.path} has no classes")
    _, height, width = store.manifest.shape
    if height != width:
        raise ConfigError(f"data.path: {store.path} holds {height} x {width} images; allowed square ones")
    return store


def model_arguments(config: RunConfig, store: LatentStore) -> dict[str, Any]:
    """Arguments of ``create_model`` for this configuration on this store."""
    channels, size, _ = store.manifest.shape
    return {
        "name": config.model.name,
        **config.model.overrides(),
        "input_size": size,
        "in_channels": channels,
        "num_classes": store.manifest.num_classes,
        "null_label": config.train.label_drop > 0,
    }


def computing(config: RunConfig) -> dict[str, Any]:
    """Arguments of ``create_model`` that say how the model computes, and not what."""
    model = config.model
    return {
        "kernels": model.kernels == "on",
        "residual": torch.bfloat16 if model.residual == "bf16" else torch.float32,
        "recompute": {"auto": None, "on": True, "off": False}[model.recompute],
    }


def describe(config: RunConfig) -> str:
    """What ``--dry-run`` prints: the configuration as YAML, then the size of the run. Makes no run folder."""
    store = open_store(config)
    model = create_model(**model_arguments(config, store), device="meta")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    per_image, images = 3 * model_flops(model), config.train.steps * config.train.batch_size
    size = (
        f"# {config.model.name}: {parameters:,} parameters, {per_image / 1e9:.3f} GFLOP an image in training\n"
        f"# {store.path}: {len(store):,} samples, {store.manifest.kind} {store.manifest.shape}\n"
        f"# {config.train.steps:,} steps of {config.train.batch_size} images: {images / len(store):.2f} epochs, "
        f"{images * per_image / 1e15:.3g} PFLOP"
    )
    return f"{config_text(config)}{size}"


class _Run:
    """One process's work on one run folder."""

    def __init__(self, config: RunConfig, folder: Path, store: LatentStore):
        self.config, self.folder, self.store = config, folder, store
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if config.train.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic in no other way
            torch.use_deterministic_algorithms(True)
        optim = config.optim
        self.arguments = model_arguments(config, store)
        how = computing(config)
        model = create_model(**self.arguments, **how, seed=config.train.seed).to(self.device)
        optimizer = AdamWEMA(
            model.parameters(),
            lr=optim.lr,
            betas=optim.betas,
            weight_decay=optim.weight_decay,
            ema_decay=optim.ema_decay,
            grad_clip=optim.grad_clip,
        )
        self.step = TrainStep(config, model, optimizer, make_process(config, self.device), store, self.device)
        self.log = RunLog(folder, local_batch=config.train.batch_size)
        self.speed = Speed(model_flops(model), self.device, config.train.precision)
        self.done = 0  # steps taken

    def go(self, stop: "_StopRequest") -> dict[str, Any]:
        config, folder = self.config, self.folder
        if not self._start_or_resume():
            return self.log.last
        reader = open_reader(self.store, config.data.loader, self.device)
        print(self._headline(reader.name), flush=True)
        batches = self._timed(reader.batches(self.step.plan, self.done * self.step.micro_batches))
        bar = tqdm(total=config.train.steps, initial=self.done, unit="step", disable=not sys.stderr.isatty())
        with contextlib.closing(batches), bar:
            self.speed.restart()
            first = True
            while self.done < config.train.steps:
                self._set_learning_rate()
                loss = self._first_step(batches) if first else self.step(batches)
                first = False
                self.done += 1
                self.speed.count(config.train.batch_size)
                bar.update()
                last = self.done == config.train.steps
                if last or self._due(config.train.log_every):
                    self._log_line(bar)
                began = self._clock(config.train.sample_every, config.train.save_every, config.eval.every)
                if self._due(config.train.sample_every) or (last and config.train.sample_every):
                    self._preview()
                if self._due(config.eval.every) and not last:
                    self._judge()
                if last or stop.signal or self._due(config.train.save_every):
                    self._save(float(loss))
                self.speed.pause(time.perf_counter() - began)
                if stop.signal and not last:
                    bar.close()
                    print(f"stopped at step {self.done}; the same command goes on from there", flush=True)
                    raise SystemExit(128 + stop.signal)
        self._judge()
        self.log.write({"event": "end", "step": self.done})
        print(f"finished {folder} at step {self.done}", flush=True)
        return self.log.last

    def _start_or_resume(self) -> bool:
        """Go back to the newest checkpoint, if there is one. False if the run is finished."""
        checkpoints, config_file = self.folder / "checkpoints", self.folder / "config.yaml"
        remove_partial(self.folder)
        remove_partial(checkpoints)
        newest = latest_checkpoint(checkpoints)
        steps = self.config.train.steps
        ends = [line["step"] for line in read_log(self.folder / "log.jsonl") if line.get("event") == "end"]
        if newest is None:
            # The configuration comes first: it is what makes the folder a run, whenever a kill comes.
            write_text(config_file, config_text(self.config))
            self.log.cut_back(0)
            return True
        if ends and max(ends) >= steps:
            print(f"{self.folder} is finished: step {max(ends)} of {steps}; raise --train.steps to go on", flush=True)
            return False
        state = load_state(newest)
        if state.data != self.store.fingerprint:
            raise RunError(
                f"{self.folder} was trained on a store with fingerprint {state.data}, {self.store.path} has "
                f"{self.store.fingerprint}; data.path may name a copy, not other data"
            )
        if state.step > steps:
            print(f"{self.folder} is at step {state.step}, past train.steps {steps}; nothing to do", flush=True)
            return False
        restore(newest, state, self.step)
        write_text(config_file, config_text(self.config))
        self.done = state.step
        self.log.cut_back(self.done)
        self.log.write({"event": "resume", "step": self.done})
        print(f"resuming at step {self.done}", flush=True)
        return True

    def _first_step(self, batches: Iterator[Batch]) -> Tensor:
        """A step in which ops time what they can run on, unless the run has stored that; then it is stored.

        A deterministic run takes each op's first backend: the fastest one by time need not be the same twice.
        """
        file = self.folder / "kernels.json"
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        choices.forget()
        if file.exists():
            _load_choices(file, device)
        for op in OPS.values():
            op.used = None
        with contextlib.nullcontext() if self.config.train.deterministic else choices.probing():
            loss = self.step(batches)
        used = {name: op.used for name, op in OPS.items() if op.used}
        write_json(file, {"device": device, "used": used, "choices": choices.stored()})
        return loss

    def _headline(self, reader: str) -> str:
        parameters = sum(p.numel() for p in self.step.model.parameters())
        train = self.config.train
        return (
            f"{self.config.model.name}: {parameters / 1e6:.2f} M parameters on {self.device}, {train.precision}; "
            f"{len(self.store)} samples, {reader} reader; batch {train.batch_size}, steps {self.done} to {train.steps}"
        )

    def _due(self, every: int) -> bool:
        return every > 0 and self.done % every == 0

    def _clock(self, *intervals: int) -> float:
        """Host time; where one of the ``intervals`` is due, after the device has done what it was given."""
        if self.device.type == "cuda" and any(map(self._due, intervals)):
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _set_learning_rate(self) -> None:
        for group in self.step.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.done)

    def _timed(self, batches: Generator[Batch, None, None]) -> Generator[Batch, None, None]:
        """The batches, with the time spent waiting for them."""
        try:
            while True:
                began = time.perf_counter()
                batch = next(batches)
                self.speed.waited += time.perf_counter() - began
                yield batch
        finally:
            batches.close()  # ends its reading thread

    def _log_line(self, bar: "tqdm[Any]") -> None:
        loss, loss_by_t = self.step.take_totals()
        grad_norm = float(self.step.optimizer.grad_norm)
        self._check_finite(loss=loss, grad_norm=grad_norm)
        line: dict[str, Any] = {"step": self.done, "images": self.done * self.config.train.batch_size, "loss": loss}
        line |= {"grad_norm": grad_norm, "loss_by_t": loss_by_t}
        line |= {"lr": learning_rate(self.config, self.done - 1), **self.speed.read()}
        self.log.write(line)
        self.log.write_metrics()
        rate = line["images_per_sec"]
        bar.set_postfix(loss=f"{loss:.4f}", images_per_sec=f"{rate:.0f}")
        if bar.disable:
            left = (self.config.train.steps - self.done) * line["step_ms"] / 1e3
            total = self.config.train.steps
            eta = f"{left // 60:.0f}:{left % 60:02.0f}"
            print(f"step {self.done}/{total}  loss {loss:.4f}  {rate:.0f} images/s  {eta} left", flush=True)

    def _check_finite(self, **values: float) -> None:
        for name, value in values.items():
            if not math.isfinite(value):
                raise RunError(
                    f"{name} is {value} at step {self.done}, and nothing is saved of it. "
                    "Try a lower optim.lr, a longer optim.warmup, or train.precision fp32"
                )

    def _preview(self) -> None:
        if can_preview(self.store):
            write_preview(self.config, self.step, self.store, self.folder / "samples" / f"step-{self.done:08d}.png")

    def _judge(self) -> None:
        if not self.config.eval.images or self.log.has("class_accuracy", self.done):
            return
        if (reason := why_not_judged(self.store)) is not None:
            tqdm.write(f"samples are not judged: {reason}")
            return
        scores = judge_samples(self.config, self.step, self.store)
        self.log.write({"step": self.done, **scores})
        self.log.write_metrics()
        text = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
        tqdm.write(f"step {self.done}  {text}")

    def _save(self, loss: float) -> None:
        largest = max(float(parameter.detach().abs().max()) for parameter in self.step.model.parameters())
        self._check_finite(loss=loss, largest_parameter=largest)
        arguments, manifest = self.arguments, self.store.manifest
        state = CheckpointState(
            step=self.done,
            images=self.done * self.config.train.batch_size,
            ema_steps=self.step.optimizer.param_groups[0]["ema_steps"],
            data=self.store.fingerprint,
            model=arguments,
            schedule=self.step.process.schedule.name,
            target=self.step.process.target,
            kind=manifest.kind,
            scale=list(manifest.scale),
            shift=list(manifest.shift),
        )
        save_checkpoint(self.folder / "checkpoints", state, self.step, self.config.train.keep_checkpoints)


def _check_folder(config: RunConfig, folder: Path) -> None:
    stored = folder / "config.yaml"
    if stored.is_file():
        refuse_changes(load_config(stored), config, folder)
    elif folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise RunError(f"{folder} is not empty and holds no run (no config.yaml); name another folder by --out")


@contextlib.contextmanager
def _only_process_in(folder: Path) -> Iterator[None]:
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(
                f"another process is training in {folder}; wait for it, or name another folder by --out"
            ) from None
        yield


def _load_choices(file: Path, device: str) -> None:
    """Take over a run's choices, unless they were made on another device."""
    stored = read_json(file)
    if not isinstance(stored, dict):
        raise ConfigError(f"{file}: given {stored!r}, allowed what a run has written there")
    if stored.get("device") == device:
        choices.load(stored.get("choices"), str(file))


class _StopRequest:
    """The signal that asked the run to stop, or 0."""

    signal = 0


@contextlib.contextmanager
def _stop_requests() -> Iterator[_StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request; a second one acts as usual."""
    stop = _StopRequest()

    def note(number: int, frame: Any) -> None:
        stop.signal = number
        for name, handler in before.items():
            signal.signal(name, handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
