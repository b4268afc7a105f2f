"""Who reads: the readers of a run and two DataLoaders, each as batches without end, checked before they are timed."""

import contextlib
import dataclasses
import functools
import gc
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import torch
from torch import Tensor

from erd_fast.benchmark.data_sources import Hdf5Samples, NpyFiles, loaded, write_hdf5, write_npy
from erd_fast.benchmark.ops import leave_out
from erd_fast.data import Batch, LatentStore, Loader, open_reader
from erd_fast.data.reading import Plan
from erd_fast.errors import ConfigError, RunError
from erd_fast.training.build import make_process
from erd_fast.training.config import RunConfig

OURS: tuple[Loader, ...] = ("mmap", "resident", "dali")
BASELINES = ("dataloader-npy", "hdf5")

Batches = Generator[Batch, None, None]


@dataclasses.dataclass
class Variant:
    """One way to read, at work."""

    name: str
    batches: Iterator[Batch]
    """Without end, on the device."""
    epoch: int
    """Batches."""
    plan: Plan | None = None
    """What ours are asked for."""
    processes: tuple[int, ...] = ()
    """Of a DataLoader, beside this one."""
    taken: int = 0
    seconds: float = 0.0
    """That a batch takes, roughly."""

    def take(self) -> Batch:
        self.taken += 1
        return next(self.batches)

    def rows(self) -> tuple[Tensor, Tensor]:
        """Latents (N, 2C, H, W) and labels (N,) of the next batch; of a resident store copies, although a step reads
        them where they are."""
        batch = self.take()
        if not batch.resident:
            return batch.latents, batch.labels
        assert self.plan is not None
        index = self.plan(self.taken - 1).to(batch.latents.device)
        return batch.latents[index], batch.labels[index]

    @property
    def ahead(self) -> int:
        """Batches that may be ready when nobody has asked for a while."""
        return 2 * max(2, len(self.processes))

    def settle(self) -> None:
        """Let it read ahead as far as it goes, before another one is timed."""
        time.sleep(self.ahead * self.seconds)

    def cpu_seconds(self) -> float:
        """That this process and those of the variant have used so far."""
        return time.process_time() + sum(map(_cpu_seconds, self.processes))

    def anonymous_bytes(self) -> int:
        """Memory of these processes that is no file's."""
        gc.collect()
        return sum(map(_anonymous_bytes, (os.getpid(), *self.processes)))


@contextlib.contextmanager
def at_work(
    store: LatentStore, batch_size: int, counts: tuple[int, int], device: torch.device
) -> Iterator[list[Variant]]:
    """All variants that are installed; each has given an epoch, which was checked. ``counts``: how many of the store's
    samples the NumPy files have, and the HDF5 file.

    Raises:
        RunError: one gave something else than the store has.
    """
    plan, keys, folder, found = plan_of(store, batch_size), keys_of_store(store), store.path.parent, []

    def baseline(dataset: NpyFiles | Hdf5Samples) -> tuple[Batches, int, None]:
        return loaded(dataset, batch_size, device), len(dataset), None

    def ours(name: Loader) -> tuple[Batches, int, Plan]:
        return open_reader(store, name, device).batches(plan, 0), len(store), plan

    makers: dict[str, Callable[[], tuple[Batches, int, Plan | None]]] = {
        # Those with processes first: they are forked before there are threads.
        "dataloader-npy": lambda: baseline(write_npy(folder / "npy", store, counts[0])),
        "hdf5": lambda: baseline(write_hdf5(folder / "latents.h5", store, counts[1])),
        **{name: functools.partial(ours, name) for name in OURS},
    }
    with contextlib.ExitStack() as held:
        for name, make in makers.items():
            others = set(multiprocessing.active_children())
            try:
                batches, count, asked = make()
            except ConfigError as error:
                leave_out(name, error)
                continue
            held.enter_context(contextlib.closing(batches))
            first = next(batches)
            processes = tuple(child.pid or 0 for child in multiprocessing.active_children() if child not in others)
            variant = Variant(name, itertools.chain([first], batches), count // batch_size, asked, processes)
            began = time.perf_counter()
            check(variant, keys)
            variant.seconds = (time.perf_counter() - began) / variant.epoch
            found.append(variant)
        yield sorted(found, key=lambda variant: [*OURS, *BASELINES].index(variant.name))


def plan_of(store: LatentStore, batch_size: int) -> Plan:
    """What a run on one device draws, from its beginning."""
    process, train = make_process(RunConfig()), RunConfig().train

    def plan(number: int) -> Tensor:
        return process.draw(
            torch.tensor(number * batch_size),
            global_batch=batch_size,
            seed=train.seed,
            batch_size=batch_size,
            dataset_size=len(store),
            label_drop=train.label_drop,
        ).sample_index

    return plan


def check(variant: Variant, keys: Tensor) -> None:
    """An epoch of ``variant`` has each of the store's samples once, or of the first ones as many as it has; what has a
    plan follows it. ``keys`` are those of :func:`keys_of_store`.

    Raises:
        RunError: it has others.
    """
    given = []
    for number in range(variant.epoch):
        latents, labels = variant.rows()
        given.append(_keys(latents.cpu().half(), labels.cpu()))
        if variant.plan is not None and not torch.equal(given[-1], keys[variant.plan(number)]):
            raise RunError(f"bench: data, {variant.name}: batch {number} has other latents than those asked for")
    found = torch.cat(given)
    if not torch.equal(found.sort().values, keys[: len(found)].sort().values):
        raise RunError(f"bench: data, {variant.name}: an epoch has other latents than the store")


def keys_of_store(store: LatentStore) -> Tensor:
    """A number for each sample, which two that differ have alike by chance alone."""
    parts = torch.arange(len(store)).split(1024)
    return torch.cat([_keys(store.gather(part), store.labels[part]) for part in parts])


def _keys(latents: Tensor, labels: Tensor) -> Tensor:
    bits = latents.flatten(1).view(torch.int32).long()
    factors = torch.randint(-(2**62), 2**62, (bits.shape[1],), generator=torch.Generator().manual_seed(0))
    return (bits * factors).sum(1) + labels.long()  # modulo 2**64


def _cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _anonymous_bytes(process: int) -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))
