"""Whole training steps with each reader: what a run logs of its speed, and of its wait for data."""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Generator, Iterator

import torch

from erd_fast.benchmark.ops import backends_used, leave_out, say
from erd_fast.benchmark.records import Record
from erd_fast.benchmark.timing import timing_of
from erd_fast.data import Batch, LatentStore, Loader, open_reader
from erd_fast.errors import ConfigError
from erd_fast.models import model_flops
from erd_fast.ops import Autotuner, autotune, record
from erd_fast.training.build import build_step
from erd_fast.training.config import DiffusionConfig, ModelConfig, RunConfig, TrainConfig
from erd_fast.training.graph import StepGraph
from erd_fast.training.metrics import Speed

_WARM_UP = 10  # steps; on a GPU they are replays of a graph by then
_STEPS = TrainConfig().log_every  # between two looks at the loss, as in a run
_INTERVALS = 3


def bench_steps(
    model: ModelConfig,
    case: str,
    batch_size: int,
    store: LatentStore,
    loaders: tuple[Loader, ...],
    device: torch.device,
    steps: int = _STEPS,
) -> Iterator[Record]:
    """A record for each of the ``loaders`` that is installed: of training ``model`` on the store, which is latents.
    ``steps``: between two looks at the loss."""
    config = RunConfig(
        train=TrainConfig(batch_size=batch_size, precision="bf16" if device.type == "cuda" else "fp32"),
        model=model,
        diffusion=DiffusionConfig(target="v"),
    )
    for loader in loaders:
        say(f"  {loader}")
        try:
            reader = open_reader(store, loader, device)
        except ConfigError as error:
            leave_out(loader, error)
            continue
        step = build_step(config, store, device)
        tuner = Autotuner()
        with autotune(tuner):
            step.rehearse(step.micro_batch)
        tuner.timing = False
        graph, speed = StepGraph(step), Speed(model_flops(step.model), device, config.train.precision)
        with (
            autotune(tuner),
            record() as recording,
            contextlib.closing(_timed(reader.batches(step.plan, 0), speed)) as batches,
            contextlib.closing(graph),
        ):
            for _ in range(_WARM_UP):
                graph(batches)
            logged = [_interval(graph, batches, speed, batch_size, steps) for _ in range(_INTERVALS)]
        timing = timing_of([line["step_ms"] / 1e3 for line in logged])
        yield Record(
            "data/step",
            case,
            loader,
            backends_used(recording),
            **dataclasses.asdict(timing),
            images_per_sec=batch_size / timing.median_s,
            wait_pct=statistics.median(line["data_wait_pct"] for line in logged),
        )


def _interval(
    graph: StepGraph, batches: Generator[Batch, None, None], speed: Speed, batch_size: int, steps: int
) -> dict[str, float]:
    """What a run logs of this many steps."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    speed.restart()
    for _ in range(steps):
        loss = graph(batches)
        speed.count(batch_size)
    float(loss)
    return speed.read()


def _timed(batches: Generator[Batch, None, None], speed: Speed) -> Generator[Batch, None, None]:
    """The batches, with the time spent waiting for them, as in a run."""
    with contextlib.closing(batches):
        while True:
            began = time.perf_counter()
            batch = next(batches)
            speed.waited += time.perf_counter() - began
            yield batch
