"""Many tensors as one launch: a device table of addresses, and the chunks that its tensors are cut into.

``rows`` (tensors, 12) int64 has a row for each gradient with what belongs to it; ``places`` (chunks, 2) int32 has the
row and the number of each chunk of ``CHUNK`` elements within its tensor. So flat buffers, views of the buckets of
DistributedDataParallel and modules of other projects are one case. Address 0 is: there is none.
"""

import enum
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 8192
MOST_EMAS = 4
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""dtypes that kernels take of gradients and copies; the rest is float32."""
_ALIGNMENT = 16


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

    def row(self) -> list[int]:
        kept = (self.parameter, self.exp_avg, self.exp_avg_sq, self.copy, *self.emas)
        kept += (None,) * (Column.NUMEL - 1 - len(kept))
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in (self.gradient, *kept)]
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
        """Raises ValueError where some slots have other averages than the rest, or too many."""
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


class ChunkTable:
    """The table of some slots on a device. Its memory stays while the sizes of the tensors do, so that a captured graph
    may read it.

    Attributes:
        rows, places: see above.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._sizes: list[int] = []
        self._rows: list[list[int]] = []
        self._pending = False
        self.rows = torch.zeros((0, COLUMNS), dtype=torch.int64, device=device)
        self.places = torch.zeros((0, 2), dtype=torch.int32, device=device)

    def update(self, slots: Sequence[Slot]) -> None:
        """Describe these slots; nothing is copied if that is what the table has. Within a capture of a CUDA graph the
        addresses are noted and :meth:`upload` must follow it."""
        rows = [slot.row() for slot in slots]
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

    def upload(self) -> None:
        """Copy the addresses that were noted to the device; not within a capture."""
        if self._pending and not capturing(self._device):
            self.rows.copy_(torch.tensor(self._rows, dtype=torch.int64).view(-1, COLUMNS))
            self._pending = False


def capturing(device: torch.device) -> bool:
    """Whether what is launched now goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _places(sizes: Sequence[int]) -> Tensor:
    counts = torch.tensor([-(-size // CHUNK) for size in sizes], dtype=torch.int64)
    row = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    first = torch.cumsum(counts, 0) - counts
    return torch.stack((row, torch.arange(len(row)) - first[row]), dim=1).int()
