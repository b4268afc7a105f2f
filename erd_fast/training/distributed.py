"""Several processes, one model: PyTorch's process groups and DistributedDataParallel, started by torchrun.

A rank is a process with a device of its own. It trains its share of every batch; gradients are summed, so that the
number of ranks changes the speed and nothing else.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from erd_fast.errors import ConfigError, ErdFastError, RunError
from erd_fast.torchrun import own_device, own_place
from erd_fast.training.config import RunConfig

T = TypeVar("T")
_LOST = ("closed by peer", "reset by peer", "Broken pipe", "Timed out", "timed out", "remote process exited")


class Ranks:
    """The processes of a run, of which this is number ``rank`` of ``size``; alone it is 0 of 1."""

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size

    @property
    def first(self) -> bool:
        """Whether this rank writes the run folder and speaks."""
        return self.rank == 0

    def together(self, call: Callable[[], T]) -> T:
        """``call()`` on every rank. Where it fails on one, all raise the error of the first of these.

        Raises:
            ErdFastError: as ``call``, with ``told`` set on all ranks but the first, which tells it.
        """
        result, error = None, None
        try:
            result = call()
        except ErdFastError as caught:
            error = caught
        found = self._gather(None if error is None else (isinstance(error, ConfigError), str(error)))
        failed = next((rank for rank, failure in enumerate(found) if failure is not None), None)
        if failed is None:
            return result  # type: ignore[return-value]
        if error is None or failed != self.rank:
            misused, text = found[failed]  # type: ignore[misc]
            error = (ConfigError if misused else RunError)(f"rank {failed}: {text}")
        error.told = not self.first
        raise error

    def from_first(self, call: Callable[[], T]) -> T:
        """What ``call()`` gives on the first rank, alone to call it, for all ranks."""
        values = [self.together(lambda: call() if self.first else None)]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]  # type: ignore[return-value]

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Each tensor summed over the ranks."""
        summed = [tensor.clone() for tensor in tensors]
        if self.size > 1:
            for tensor in summed:
                dist.all_reduce(tensor)
        return summed

    def largest(self, number: int) -> int:
        """The largest ``number`` that a rank has, by way of the host: no device waits for it."""
        if self.size == 1:
            return number
        found = torch.tensor(number)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def _gather(self, value: T) -> list[T]:
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


@contextlib.contextmanager
def process_group() -> Iterator[tuple[Ranks, torch.device]]:
    """The ranks that torchrun started, and the device of this one; without torchrun one rank.

    Raises:
        ConfigError: there are more ranks on this machine than GPUs. RunError: another rank has stopped.
    """
    rank, size, *_ = own_place()
    device = own_device()
    if size == 1:
        yield Ranks(), device
        return
    # Objects and flags go by gloo and keep the host from waiting for the device; gradients by NCCL.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, device_id=device if device.type == "cuda" else None)
    try:
        yield Ranks(rank, size), device
    except SystemExit:  # a signal, which all ranks follow at one step
        dist.destroy_process_group()
        raise
    except BaseException as error:
        _leave(device)
        if isinstance(error, RuntimeError) and any(text in str(error) for text in _LOST):
            text = f"rank {rank}: another rank has stopped, see its error ({_first_line(error)})"
            raise RunError(text) from error
        raise
    dist.destroy_process_group()


def _leave(device: torch.device) -> None:
    """Go without waiting for what the other ranks will not send any more, as NCCL would."""
    if device.type == "cuda":
        dist.distributed_c10d._abort_process_group()
    else:
        dist.destroy_process_group()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def check_shares(config: RunConfig, ranks: Ranks) -> None:
    """Raise ConfigError unless the batch divides among the ranks, and each rank's share into micro-batches."""
    train = config.train
    if train.batch_size % ranks.size:
        raise ConfigError(
            f"train.batch_size: given {train.batch_size} for {ranks.size} ranks, allowed multiples of {ranks.size}"
        )
    share = train.batch_size // ranks.size
    if train.micro_batch and share % train.micro_batch:
        raise ConfigError(
            f"train.micro_batch: given {train.micro_batch}, allowed divisors of a rank's share of the batch, {share}"
        )


def check_equal(ranks: Ranks, **facts: dict[str, Any]) -> None:
    """Raise ConfigError, on all ranks, unless each has the facts of the first."""

    def compare() -> None:
        for what, own in facts.items():
            differing = [name for name in own if own[name] != first[what].get(name)]
            if differing:
                name = differing[0]
                raise ConfigError(
                    f"{name}: given {own[name]!r}, and {first[what].get(name)!r} on rank 0: "
                    f"all ranks need the same {what}"
                )

    first = ranks.from_first(lambda: facts)
    ranks.together(compare)


class Reduction(NamedTuple):
    """How gradients are summed over the ranks.

    Attributes:
        dtype: in which they are sent and summed.
        accumulated: whether a ``main_grad`` has the gradients of micro-batches before the last one.
    """

    dtype: torch.dtype
    accumulated: bool


def replicate(model: nn.Module, device: torch.device, reduction: Reduction) -> DistributedDataParallel:
    """The model with gradients that are sums over the ranks, reduced while the backward pass goes on.

    Where a parameter has a ``main_grad`` (float32), its sum is left there, and no rounding comes after the reduction.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # and what replaces it is new in 2.14
        replica = DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            broadcast_buffers=False,  # constants, equal everywhere
            gradient_as_bucket_view=True,
            static_graph=not reduction.accumulated,  # whose first backward pass must reduce
        )
    # Of the first layer's convolution, whose gradient is that of a matrix product: small, and copied into its place.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    replica.register_comm_hook(reduction, _sum_over_ranks)
    return replica


def _sum_over_ranks(reduction: Reduction, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DistributedDataParallel would give the mean; the loss of a rank is its share of the whole batch's already."""
    buffer = bucket.buffer()
    mains = [getattr(parameter, "main_grad", None) for parameter in bucket.parameters()]
    wide = _with_mains(bucket, mains) if reduction.accumulated and mains[0] is not None else buffer
    sent = wide.to(reduction.dtype)

    def finish(future: torch.futures.Future[list[Tensor]]) -> Tensor:
        total = future.value()[0]
        for main, place in zip(mains, _places(bucket, total), strict=True):
            if main is not None:
                main.copy_(place)
        return buffer if total is buffer else buffer.copy_(total)

    return dist.all_reduce(sent, async_op=True).get_future().then(finish)


def _with_mains(bucket: dist.GradBucket, mains: list[Tensor | None]) -> Tensor:
    wide = bucket.buffer().float()
    for main, place in zip(mains, _places(bucket, wide), strict=True):
        assert main is not None  # parameters of one dtype are one bucket, and have a main_grad or none of them
        place.add_(main)
    return wide


def _places(bucket: dist.GradBucket, flat: Tensor) -> list[Tensor]:
    """The parts of ``flat``, laid out as the bucket is, that belong to its parameters."""
    start = bucket.buffer().storage_offset()
    gradients = bucket.gradients()
    return [flat.as_strided(g.shape, g.stride(), g.storage_offset() - start + flat.storage_offset()) for g in gradients]
