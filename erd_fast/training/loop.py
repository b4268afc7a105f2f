"""The training loop: start or resume, step, log, preview, judge, save."""

import contextlib
import fcntl
import math
import sys
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from erd_fast.data import Batch, LatentStore, open_reader
from erd_fast.errors import ConfigError, ErdFastError, RunError
from erd_fast.files import make_folder, remove_partial, write_text
from erd_fast.models import model_flops
from erd_fast.numerics import explained_out_of_memory, is_out_of_memory
from erd_fast.ops import Autotuner, Recording, autotune, record
from erd_fast.ops.adamw_ema import SMALLEST_SCALE
from erd_fast.ops.availability import extension_unavailable
from erd_fast.progress import duration, progress_bar
from erd_fast.sampling.images import Decode
from erd_fast.training.build import build_step, model_arguments, open_store
from erd_fast.training.checkpoint import CheckpointState, latest_checkpoint, load_state, restore, save_checkpoint
from erd_fast.training.config import RunConfig, config_text, load_config, refuse_changes
from erd_fast.training.distributed import Ranks, check_equal, check_shares, process_group
from erd_fast.training.graph import StepGraph
from erd_fast.training.metrics import RunLog, Speed, read_log
from erd_fast.training.preview import judge_samples, preview_decoder, why_not_judged, write_preview
from erd_fast.training.profiling import StepProfiler
from erd_fast.training.rehearsal import rehearse, write_choices
from erd_fast.training.stopping import StopRequest, stop_requests
from erd_fast.training.tracking import open_tracker

T = TypeVar("T")
_WATCHED = 10
"""Steps over which a run is judged by those it could take."""


def train(config: RunConfig, folder: Path, *, profile: bool = False) -> dict[str, Any] | None:
    """Train ``config`` in the run folder, from its newest checkpoint if it has one. Returns the last metrics, on the
    first rank alone. ``profile`` writes where the time of a few steps went into ``folder/profile``.

    Under torchrun each process is a rank that does its share of every batch; the first one writes the folder, which all
    must see.

    The first SIGINT or SIGTERM ends the current step, saves a checkpoint and exits with 128 + its number.

    Raises:
        ConfigError: the folder holds a run of another configuration, or the configuration does not fit the store.
        DataError: the store or a checkpoint is damaged.
        RunError: no permission, another process trains in the folder, the loss is not finite, a step does not fit into
            the GPU, or another rank has stopped.
    """
    # Where warm-up did not foresee it: parameters and moments, or what another process has allocated meanwhile.
    given = f"given {config.train.micro_batch} of train.batch_size {config.train.batch_size}"
    advice = f"train.micro_batch: {given}, and the GPU's memory is full: take a smaller one, or a smaller model"
    with process_group() as (ranks, device), explained_out_of_memory(advice):
        ranks.together(lambda: _check_folder(config, folder))
        store = ranks.together(lambda: open_store(config))
        _check_ranks(config, folder, store, ranks)
        # Before anything is written: sizes may not be allowed.
        run = ranks.together(lambda: _Run(config, folder, store, ranks, device))
        with contextlib.ExitStack() as held:
            ranks.from_first(lambda: _take_folder(folder, held))
            ranks.from_first(lambda: _open_tracker(config, folder, held, run.log))
            held.callback(run.graph.close)  # before the process group ends, which waits for graphs with its reductions
            metrics = run.go(held.enter_context(stop_requests()), profile)
        return metrics if ranks.first else None


class _Run:
    """One rank's work on one run folder."""

    def __init__(self, config: RunConfig, folder: Path, store: LatentStore, ranks: Ranks, device: torch.device):
        self.config, self.folder, self.store, self.ranks, self.device = config, folder, store, ranks, device
        self.step = build_step(config, store, device, ranks)
        self.graph = StepGraph(self.step)
        self.tuner, self.recording = Autotuner(captured=config.train.cuda_graph), Recording()
        local = config.train.batch_size // ranks.size
        self.log = RunLog(folder, {"world_size": ranks.size, "local_batch": local}, writes=ranks.first)
        flops = model_flops(self.step.model)
        self.speed = Speed(flops, device, config.train.precision, ranks.size)
        self.done = 0  # steps taken
        self.decode: Decode | None = None
        self._watched = 0, 0  # steps, and those that were not skipped, when that was last judged

    def go(self, stop: StopRequest, profile: bool) -> dict[str, Any]:
        config, folder = self.config, self.folder
        if not self._start_or_resume():
            return self.log.last
        self.decode = self._open_decoder()
        kernels = folder / "kernels.json"
        needed = rehearse(self.step, self.tuner, kernels)
        reader = self.ranks.together(lambda: open_reader(self.store, config.data.loader, self.device, needed))
        self._say(self._headline(reader.name))
        if missing := extension_unavailable(self.device.type):
            self._say(f"training without the compiled kernels for {self.device.type}: {missing}")
        batches = self._timed(reader.batches(self.step.plan, self.done * self.step.micro_batches))
        bar = progress_bar(config.train.steps, initial=self.done, unit="step", disable=not self._shows_bar())
        begin = self.done
        with contextlib.closing(batches), bar, autotune(self.tuner), record(self.recording):
            profiler = self._profiler() if profile and self.ranks.first else None
            self.speed.restart()
            while self.done < config.train.steps:
                if profiler is not None:
                    self._uncounted(profiler.before)
                self.graph(batches)
                if profiler is not None and (found := self._uncounted(profiler.after)) is not None:
                    tqdm.write(f"{found}wrote {folder / 'profile'}")
                self.done += 1
                self.speed.count(config.train.batch_size)
                bar.update()
                if self.done == begin + 1 and self.ranks.first:
                    write_choices(self.step, self.tuner, self.recording, kernels)
                last = self.done == config.train.steps
                if last or self._due(config.train.log_every):
                    self._log_line(bar)
                began = self._clock(config.train.sample_every, config.train.save_every, config.eval.every)
                if self._due(config.train.sample_every) or (last and config.train.sample_every):
                    self._preview()
                if self._due(config.eval.every) and not last:
                    self._judge()
                signal_number = self._agreed(stop)
                if last or signal_number or self._due(config.train.save_every):
                    self._save()
                self.speed.pause(time.perf_counter() - began)
                if signal_number and not last:
                    bar.close()
                    self._say(f"stopped at step {self.done}; the same command goes on from there")
                    raise SystemExit(128 + signal_number)
        self._judge()
        self.log.write({"event": "end", "step": self.done})
        self._say(f"finished {folder} at step {self.done}")
        return self.log.last

    def _open_decoder(self) -> Decode | None:
        """The decoder of previews, on the first rank; None without previews, or with a message if it is unavailable."""
        if not self.ranks.first or not self.config.train.sample_every:
            return None
        try:
            return preview_decoder(self.store.manifest)
        except ErdFastError as error:
            command = f"erd-fast sample {self.folder} --vae PATH|ID --out x.png"
            self._say(f'no previews: {error}; draw samples with "{command}"')
            return None

    def _start_or_resume(self) -> bool:
        """Go back to the newest checkpoint, if there is one. False if the run is finished."""
        newest, goes_on = self.ranks.from_first(self._prepare_folder)
        if newest is None or not goes_on:
            return goes_on
        state = self.ranks.together(lambda: load_state(newest))
        self.ranks.together(lambda: restore(newest, state, self.step))
        self.done = state.step
        if self.ranks.first:
            write_text(self.folder / "config.yaml", config_text(self.config))
        self.log.cut_back(self.done)
        self._watched = self.done, int(self.step.optimizer.counts[0])
        self.log.write({"event": "resume", "step": self.done})
        self._say(f"resuming at step {self.done}")
        return True

    def _prepare_folder(self) -> tuple[Path | None, bool]:
        """(newest checkpoint, whether there is something left to train)."""
        checkpoints = self.folder / "checkpoints"
        remove_partial(self.folder)
        remove_partial(checkpoints)
        newest = latest_checkpoint(checkpoints)
        steps = self.config.train.steps
        ends = [line["step"] for line in read_log(self.folder / "log.jsonl") if line.get("event") == "end"]
        if newest is None:
            # The configuration comes first: it is what makes the folder a run, whenever a kill comes.
            write_text(self.folder / "config.yaml", config_text(self.config))
            self.log.cut_back(0)
            return None, True
        if ends and max(ends) >= steps:
            self._say(f"{self.folder} is finished: step {max(ends)} of {steps}; raise --train.steps to go on")
            return newest, False
        state = load_state(newest)
        if state.data != self.store.fingerprint:
            raise RunError(
                f"{self.folder} was trained on a store with fingerprint {state.data}, {self.store.path} has "
                f"{self.store.fingerprint}; data.path may name a copy, not other data"
            )
        if state.step > steps:
            self._say(f"{self.folder} is at step {state.step}, past train.steps {steps}; nothing to do")
            return newest, False
        return newest, True

    def _profiler(self) -> StepProfiler:
        left = self.config.train.steps - self.done
        return StepProfiler(self.folder / "profile", self.device, self.ranks.size > 1, left)

    def _uncounted(self, call: Callable[[], T]) -> T:
        began = time.perf_counter()
        result = call()
        self.speed.pause(time.perf_counter() - began)
        return result

    def _say(self, text: str) -> None:
        if self.ranks.first:
            print(text, flush=True)

    def _shows_bar(self) -> bool:
        return self.ranks.first and sys.stderr.isatty()

    def _agreed(self, stop: StopRequest) -> int:
        """The signal that asks the run to stop, on all ranks at the same step."""
        return self.ranks.largest(stop.signal)

    def _headline(self, reader: str) -> str:
        parameters = sum(p.numel() for p in self.step.model.parameters())
        train = self.config.train
        return (
            f"{self.config.model.name}: {parameters / 1e6:.2f} M parameters on {self._where()}, {train.precision}; "
            f"{len(self.store)} samples, {reader} reader; batch {train.batch_size}, steps {self.done} to {train.steps}"
        )

    def _where(self) -> str:
        return f"{self.ranks.size} x {self.device.type}" if self.ranks.size > 1 else str(self.device)

    def _due(self, every: int) -> bool:
        return every > 0 and self.done % every == 0

    def _clock(self, *intervals: int) -> float:
        """Host time; where one of the ``intervals`` is due, after the device has done what it was given."""
        if self.device.type == "cuda" and any(map(self._due, intervals)):
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

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
        self._check_taken()
        optimizer = self.step.optimizer
        loss, loss_by_t = self.step.take_totals()
        skipped, scale = int(optimizer.counts[2]), float(optimizer.loss_scale)
        if loss is None:  # float16 looks for its scale, or a single batch is bad
            self.log.write({"event": "skipped", "step": self.done, "loss_scale": scale})
            return
        self._check_finite(loss=loss)
        line: dict[str, Any] = {"step": self.done, "images": self.done * self.config.train.batch_size, "loss": loss}
        norm = float(optimizer.grad_norm)
        line |= {"grad_norm": norm if math.isfinite(norm) else None, "loss_by_t": loss_by_t, "skipped": skipped}
        if self.config.train.precision == "fp16":
            line["loss_scale"] = scale
        line |= {"lr": float(optimizer.last_lr), **self.speed.read()}
        self.log.write(line)
        self.log.write_metrics()
        rate = line["images_per_sec"]
        bar.set_postfix(loss=f"{loss:.4f}", images_per_sec=f"{rate:.0f}")
        if bar.disable:
            total = self.config.train.steps
            left = duration((total - self.done) * line["step_ms"] / 1e3)
            self._say(f"step {self.done}/{total}  loss {loss:.4f}  {rate:.0f} images/s  {left} left")

    def _check_taken(self) -> None:
        """One batch may have gradients that are not finite, and is skipped; a run that goes on so is lost, unless
        float16 still has room to lower its scale."""
        optimizer, (done, taken) = self.step.optimizer, self._watched
        steps, now = self.done - done, int(optimizer.counts[0])
        if steps < _WATCHED and self.done < self.config.train.steps:
            return
        judged = steps > 1 or now == 0  # one bad batch is no verdict on a run, unless it is all of it
        if judged and float(optimizer.loss_scale) <= SMALLEST_SCALE and 2 * (now - taken) <= steps:
            self._check_finite(grad_norm=float(optimizer.grad_norm))
        self._watched = self.done, now

    def _check_finite(self, **values: float) -> None:
        for name, value in values.items():
            if not math.isfinite(value):
                error = RunError(
                    f"{name} is {value} at step {self.done}, and nothing is saved of it. "
                    "Try a lower optim.lr, a longer optim.warmup, or train.precision fp32"
                )
                error.told = not self.ranks.first  # all ranks find it
                raise error

    def _preview(self) -> None:
        if self.decode is None:
            return
        path = self.folder / "samples" / f"step-{self.done:08d}.png"
        with self.graph.memory():
            try:
                write_preview(self.config, self.step, self.store, self.decode, path)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                tqdm.write(f"no preview at step {self.done}: the GPU's memory is full ({str(error).splitlines()[0]})")

    def _judge(self) -> None:
        if not self.ranks.first or not self.config.eval.images or self.log.has("class_accuracy", self.done):
            return
        if (reason := why_not_judged(self.store)) is not None:
            tqdm.write(f"samples are not judged: {reason}")
            return
        with self.graph.memory():
            scores = judge_samples(self.config, self.step, self.store)
        self.log.write({"step": self.done, **scores})
        self.log.write_metrics()
        text = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
        tqdm.write(f"step {self.done}  {text}")

    def _save(self) -> None:
        self._check_taken()
        largest = max(float(self.step.optimizer.master(p).abs().max()) for p in self.step.model.parameters())
        self._check_finite(largest_parameter=largest)
        arguments, manifest = model_arguments(self.config, self.store), self.store.manifest
        state = CheckpointState(
            step=self.done,
            images=self.done * self.config.train.batch_size,
            data=self.store.fingerprint,
            model=arguments,
            schedule=self.step.process.schedule.name,
            target=self.step.process.target,
            kind=manifest.kind,
            scale=list(manifest.scale),
            shift=list(manifest.shift),
            vae=manifest.vae,
            vae_source=manifest.vae_source,
            pixel_range=manifest.pixel_range,
        )
        totals = self.step.sum_totals()
        self.ranks.from_first(
            lambda: save_checkpoint(
                self.folder / "checkpoints", state, self.step, totals, self.config.train.keep_checkpoints
            )
        )


def _check_folder(config: RunConfig, folder: Path) -> None:
    stored = folder / "config.yaml"
    if stored.is_file():
        refuse_changes(load_config(stored), config, folder)
    elif folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise RunError(f"{folder} is not empty and holds no run (no config.yaml); name another folder by --out")


def _check_ranks(config: RunConfig, folder: Path, store: LatentStore, ranks: Ranks) -> None:
    """All ranks have one configuration and one store, and each has something to do."""
    data = {"data.path": store.fingerprint}
    check_equal(ranks, configuration={**config.flat(), "data.path": "", "out": str(folder)}, data=data)

    def check() -> None:
        check_shares(config, ranks)
        if ranks.size > len(store):
            raise ConfigError(f"nproc-per-node: given {ranks.size} ranks, allowed up to {len(store)}, one a sample")

    ranks.together(check)


def _take_folder(folder: Path, held: contextlib.ExitStack) -> None:
    make_folder(folder)
    held.enter_context(_only_process_in(folder))


def _open_tracker(config: RunConfig, folder: Path, held: contextlib.ExitStack, log: RunLog) -> None:
    log.tracker = open_tracker(config.train.track, folder, config.flat())
    if log.tracker is not None:
        held.callback(log.tracker.close)


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
