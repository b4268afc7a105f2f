"""Many tensors as one launch: a device table of addresses, and the chunks that its tensors are cut into.

``rows`` (tensors, 12) int64 has a row for each gradient with what belongs to it; ``places`` (chunks, 2) int32 has the
row and the number of each chunk of ``CHUNK`` elements within its tensor. So flat buffers, views of the buckets of
DistributedDataParallel and modules of other projects are one case. Address 0 is: there is none.
"""

import enum
from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from erd_fast.ops.checks import check_dense
from erd_fast.ops.core.autotune import capturing

CHUNK = 8192
MOST_EMAS = 4
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""dtypes that kernels take of gradients and copies; the rest is float32."""
_ALIGNMENT = 16
_PLAIN = {Tensor, nn.Parameter}
_LAYOUT = attrgetter("layout")
_READ = (Tensor.data_ptr, attrgetter("shape"), Tensor.stride, attrgetter("dtype"), Tensor.is_neg)
_Identity = tuple[int, torch.Size, tuple[int, ...], torch.dtype, bool]


class Column(enum.IntEnum):
    """Columns of ``rows``: addresses, then integers."""

    GRADIENT = 0
    PARAMETER = 1
    EXP_AVG = 2
    EXP_AVG_SQ = 3
    COPY = 4
    EMA = 5
    """And the next three: one for each decay."""
    NUMEL = 9
    GROUP = 10
    FORMAT = 11
    """Format of the gradient + 4 * that of the copy + 16 if all addresses are multiples of 16 bytes."""


COLUMNS = 12


class Slot(NamedTuple):
    """A gradient and the tensors of its shape and strides that a step changes."""

    gradient: Tensor
    parameter: Tensor | None = None
    """float32: the parameter, or the master of one in lower precision."""
    exp_avg: Tensor | None = None
    exp_avg_sq: Tensor | None = None
    copy: Tensor | None = None
    """The parameter itself, where it has a master."""
    emas: tuple[Tensor, ...] = ()
    group: int = 0

    def named(self) -> Iterator[tuple[str, Tensor | None]]:
        """The tensors in the order of the columns of a row."""
        yield from zip(self._fields[:5], self[:5], strict=True)
        yield from ((f"emas[{index}]", ema) for index, ema in enumerate(self.emas))

    def check(self, op: str, number: int) -> None:
        """Raise ValueError unless the tensors are dense and have one shape, strides and device, gradient and copy a
        dtype of floating point, and the rest one dtype: kernels take the gradient's size for all of them."""
        first, dtype = self.gradient, None
        for name, tensor in self.named():
            if tensor is None:
                continue
            argument = f"gradients[{number}]" if op == "grad_norm" else f"slots[{number}].{name}"
            given = f"{op}: {argument}"
            check_plain(given, tensor)
            if tensor.is_neg():  # read by its address it would have the other sign
                raise ValueError(f"{given} must be a tensor without the negative bit, got one with it; use resolve_neg")
            if tensor.numel() and not tensor.data_ptr() and not tensor.is_meta:
                raise ValueError(f"{given} must have memory, got a tensor without")
            check_dense(op, argument, tensor)
            if (tensor.shape, tensor.stride(), tensor.device) != (first.shape, first.stride(), first.device):
                raise ValueError(
                    f"{given} must have shape {tuple(first.shape)}, strides {first.stride()} and device {first.device} "
                    f"as its gradient, got {tuple(tensor.shape)}, {tensor.stride()} and {tensor.device}"
                )
            if name == "gradient":
                check_floating(given, tensor)
                continue
            if name == "copy":
                if tensor.dtype not in (*FORMATS, dtype):  # of float64 only beside float64, which no kernel takes
                    raise ValueError(f"{given} must be one of {', '.join(map(str, FORMATS))}, got {tensor.dtype}")
                continue
            dtype = dtype or (torch.float64 if tensor.dtype == torch.float64 else torch.float32)
            if tensor.dtype != dtype:
                raise ValueError(f"{given} must be {dtype}, got {tensor.dtype}")

    def row(self) -> list[int]:
        kept = [tensor for _, tensor in self.named()]
        kept += (None,) * (Column.NUMEL - len(kept))
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in kept]
        form = FORMATS.get(self.gradient.dtype, 0)
        if self.copy is not None:
            form += 4 * FORMATS.get(self.copy.dtype, 0)
        if not any(address % _ALIGNMENT for address in addresses):
            form += 16
        return [*addresses, self.gradient.numel(), self.group, form]


class Slots(NamedTuple):
    """Slots as a list of each kind of tensor, what an op of many tensors takes."""

    gradients: list[Tensor]
    parameters: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    copies: list[Tensor]
    """Without elements where there is none."""
    emas: list[Tensor]
    """Of the first slot, then of the second."""
    groups: list[int]

    @classmethod
    def of(cls, slots: Sequence[Slot]) -> "Slots":
        """Raises ValueError where a slot has no parameter or moment, other averages than the rest, or too many."""
        for number, slot in enumerate(slots):
            for name in ("parameter", "exp_avg", "exp_avg_sq"):
                if getattr(slot, name) is None:
                    raise ValueError(f"adamw_ema: slots[{number}].{name} must be a tensor, got None")
        counts = sorted({len(slot.emas) for slot in slots})
        if len(counts) > 1 or counts[-1] > MOST_EMAS:
            raise ValueError(f"adamw_ema: slots: given {counts} averages, allowed 0 to {MOST_EMAS}, as many for each")
        none = torch.empty(0, dtype=torch.float32, device=slots[0].gradient.device)

        def all_of(name: str) -> list[Tensor]:
            return [none if (tensor := getattr(slot, name)) is None else tensor for slot in slots]

        names = ("gradient", "parameter", "exp_avg", "exp_avg_sq", "copy")
        gradients, parameters, exp_avgs, exp_avg_sqs, copies = map(all_of, names)
        emas = [ema for slot in slots for ema in slot.emas]
        return cls(gradients, parameters, exp_avgs, exp_avg_sqs, copies, emas, [slot.group for slot in slots])


class TensorTable:
    """The table of some slots on a device. Its memory stays while the sizes of the tensors do, so that a captured graph
    may read it.

    Attributes:
        rows, places: see above.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._sizes: list[int] = []
        self._rows: list[list[int]] = []
        self._identities: list[list[_Identity]] = []
        self._pending = False
        self.rows = torch.zeros((0, COLUMNS), dtype=torch.int64, device=device)
        self.places = torch.zeros((0, 2), dtype=torch.int32, device=device)

    def update(self, slots: Sequence[Slot], op: str = "adamw_ema") -> None:
        """Describe these slots; nothing is copied if that is what the table has. Within a capture of a CUDA graph the
        addresses are noted and :meth:`upload` must follow it.

        Raises:
            ValueError: the tensors of a slot do not go together, see :meth:`Slot.check`, or are on another device than
                the table; the message names ``op``.
        """
        for number, slot in enumerate(slots):
            slot.check(op, number)
            if (device := slot.gradient.device) != self.rows.device:
                raise ValueError(f"{op}: gradients[{number}] must be on {self.rows.device} as the table, got {device}")
        rows = [slot.row() for slot in slots]
        none = torch.empty(0, dtype=torch.float32)  # as in Slots
        self._identities = [_identities([none if it is None else it for _, it in slot.named()]) for slot in slots]
        if rows == self._rows:
            return
        sizes = [row[Column.NUMEL] for row in rows]
        if sizes != self._sizes:
            if capturing(self._device):
                raise RuntimeError("the tensors of a captured step are not those of the steps before it")
            self.places = _places(sizes).to(self._device)
            self.rows = torch.zeros((len(rows), COLUMNS), dtype=torch.int64, device=self._device)
        self._sizes, self._rows, self._pending = sizes, rows, True
        self.upload()

    def check(self, op: str, column: Column, tensors: Sequence[Tensor], step: int = 1) -> None:
        """Raise ValueError unless ``tensors`` have the addresses, shapes, strides, dtypes and signs of ``column`` and
        those after it up to ``step``. Kernels read the table, and nothing else keeps them from memory that was freed or
        has another dtype or order. Tensors of a trace, which have no memory, are not checked."""
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            return
        found = [it for row in self._identities for it in row[column : column + step]]
        if found != _identities(tensors):
            raise ValueError(f"{op}: table must be that of these tensors, got one with other {column.name.lower()}s")

    def upload(self) -> None:
        """Copy the addresses that were noted to the device; not within a capture."""
        if self._pending and not capturing(self._device):
            self.rows.copy_(torch.tensor(self._rows, dtype=torch.int64).view(-1, COLUMNS))
            self._pending = False


def check_plain(given: str, tensor: Tensor | None) -> None:
    """Raise ValueError unless ``tensor`` is a plain dense one; ``given`` is the op and the argument."""
    sparse = isinstance(tensor, Tensor) and tensor.layout != torch.strided
    if sparse or type(tensor) not in _PLAIN:
        kind = f"{tensor.layout} (of an embedding with sparse=True?)" if sparse else type(tensor).__name__  # type: ignore[union-attr]
        raise ValueError(f"{given} must be a plain dense tensor, got {kind}")


def check_floating(given: str, tensor: Tensor) -> None:
    """Raise ValueError unless ``tensor`` is of floating point."""
    if not tensor.is_floating_point():
        raise ValueError(f"{given} must be floating point, got {tensor.dtype}")


def _identities(tensors: Sequence[Tensor]) -> list[_Identity]:
    """All that a kernel assumes of each tensor, without the tensor, which would outlive its step; nothing if one is not
    plain. An eager step calls it for thousands: map takes half as long as a loop."""
    if not _PLAIN.issuperset(map(type, tensors)) or any(it != torch.strided for it in map(_LAYOUT, tensors)):
        return []
    return list(zip(*(map(read, tensors) for read in _READ), strict=True))


def _places(sizes: Sequence[int]) -> Tensor:
    counts = torch.tensor([-(-size // CHUNK) for size in sizes], dtype=torch.int64)
    row = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    first = torch.cumsum(counts, 0) - counts
    return torch.stack((row, torch.arange(len(row)) - first[row]), dim=1).int()
