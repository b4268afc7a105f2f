"""adamw_ema: what a step does to every parameter, in one pass: unscale, clip, AdamW, averages, copy; or nothing at all.

Two launches: *advance* turns the counters, the settings of the groups and the norm of the gradients into the numbers of
this step, then every chunk is *updated* by them. Nothing is read back, so that a captured graph goes on by itself.
"""

import enum
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from erd_fast.ops.core.backend import Extension, Triton
from erd_fast.ops.core.op import Op, Pass
from erd_fast.ops.tensor_table import CHUNK, FORMATS, MOST_EMAS, Column, Slot, Slots, TensorTable


class Setting(enum.IntEnum):
    """Columns of ``settings``, (groups, 16) float64."""

    LR = 0
    BETA1 = 1
    BETA2 = 2
    EPS = 3
    WEIGHT_DECAY = 4
    GRAD_CLIP = 5
    """0 does not clip."""
    WARMUP = 6
    """Steps of linear warm-up."""
    COSINE_STEPS = 7
    """The step at which half a cosine after the warm-up ends at 0; 0 is a constant rate."""
    START = 8
    """opt_step when the group joined."""
    EMA_DECAY = 9
    """And the next three."""


class Factor(enum.IntEnum):
    """Columns of ``factors``, (groups, 16): the numbers of one step."""

    APPLY = 0
    """1, or 0 for a step that is skipped."""
    GRADIENT = 1
    """Clipping and the loss scale."""
    KEEP = 2
    """1 - lr weight_decay."""
    NEW1 = 3
    """1 - beta1."""
    OLD2 = 4
    """beta2."""
    NEW2 = 5
    """1 - beta2."""
    ROOT = 6
    """1 / sqrt(1 - beta2^n)."""
    EPS = 7
    STEP = 8
    """lr / (1 - beta1^n)."""
    EMA = 9
    """1 - decay; and the next three."""
    LR = 13


COLUMNS = 16
INITIAL_LOSS_SCALE, GROWTH_INTERVAL = 2.0**16, 2000
"""Of float16: doubled after as many steps without overflow, halved at each overflow, between 1 and 2^32."""
SMALLEST_SCALE, LARGEST_SCALE = 1.0, 2.0**32
_COLUMNS_OF_LISTS = (Column.GRADIENT, Column.PARAMETER, Column.EXP_AVG, Column.EXP_AVG_SQ, Column.COPY)
_CLIP_EPS = 1e-6  # PyTorch's: it clips by norm + 1e-6


class StepState(NamedTuple):
    """What an optimizer counts on the device.

    Attributes:
        counts: (3,) int64: opt_step, steps taken; growth, steps since the loss scale changed; skipped.
        scalars: (2,) float32 or 64: loss_scale; grad_norm, of the last step, unscaled and before clipping.
        factors: (groups, 16), of the last step.
    """

    counts: Tensor
    scalars: Tensor
    factors: Tensor


def adamw_ema(
    slots: Slots | Sequence[Slot],
    table: TensorTable,
    settings: Tensor,
    norm: Tensor,
    state: StepState,
    *,
    growth_interval: int = 0,
) -> None:
    """A step of AdamW with averages, in place.

    With N = norm / loss_scale, n = opt_step - start + 1 and for each group: where N is not finite nothing but the
    counters changes; else ::

        g <- gradient min(1, grad_clip / (N + 1e-6)) / loss_scale
        m <- m + (1 - beta1) (g - m)            v <- beta2 v + (1 - beta2) g^2
        p <- p (1 - lr weight_decay) - lr / (1 - beta1^n) m / (sqrt(v) / sqrt(1 - beta2^n) + eps)
        ema <- ema + (1 - d) (p - ema),         d = min(ema_decay, n / (n + 9))
        copy <- p

    lr is its group's, times min(1, n / warmup), and after the warm-up times half a cosine that ends at 0. Then opt_step
    grows by 1, or skipped does. With a ``growth_interval`` the loss scale is halved at a skipped step and doubled after
    as many steps without one.

    Args:
        slots: one or more gradients and what belongs to them; parameter, moments and averages float32 (or all float64).
        table: that of ``slots``.
        settings: (groups, 16) float64, see :class:`Setting`.
        norm: () norm of the gradients as they are, :func:`erd_fast.ops.grad_norm`'s.
        state: changed in place.
        growth_interval: steps; 0 keeps the loss scale.

    Raises:
        ValueError: more than 4 averages, or not as many for each slot; or the table is of other tensors.

    Moves with one average, bfloat16 gradients and copies 36 bytes a parameter: p, m, v, ema in and out 32, gradient 2,
    copy 2; 36 with float32 gradients and no copy.

    Source: Loshchilov and Hutter, arXiv 1711.05101, algorithm 2; docs/math.md F.
    """
    lists = slots if isinstance(slots, Slots) else Slots.of(slots)
    decays = len(lists.emas) // len(lists.gradients)
    if not torch.compiler.is_compiling():
        for column, tensors in zip(_COLUMNS_OF_LISTS, lists[:5], strict=True):
            table.check("adamw_ema", column, tensors)
        table.check("adamw_ema", Column.EMA, lists.emas, step=decays)
    _op(
        rows=table.rows,
        places=table.places,
        chunk=CHUNK,
        settings=settings,
        norm=norm,
        growth_interval=growth_interval,
        decays=decays,
        **state._asdict(),
        **lists._asdict(),
    )
    if not torch.compiler.is_compiling() and not torch._C._len_torch_dispatch_stack():
        # Kernels write by address. Without this a graph that saved a parameter would use its new value, silently.
        changed = (*lists.parameters, *lists.exp_avgs, *lists.exp_avg_sqs, *lists.copies, *lists.emas)
        increment_version((*state, *changed))


def advance_reference(settings: Tensor, norm: Tensor, growth_interval: int, state: StepState) -> None:
    """The definition of the numbers of a step; changes ``state``."""
    counts, scalars, factors = state
    setting = settings.unbind(1)
    n = counts[0] + 1 - setting[Setting.START]  # float64
    unscaled = norm.double() / scalars[0].double()
    finite = unscaled.isfinite()
    lr = setting[Setting.LR] * scheduled(n, setting[Setting.WARMUP], setting[Setting.COSINE_STEPS])
    clip = setting[Setting.GRAD_CLIP]
    beta1, beta2 = setting[Setting.BETA1], setting[Setting.BETA2]
    clipped = torch.where(clip > 0, (clip / (unscaled + _CLIP_EPS)).clamp(max=1.0), torch.ones_like(clip))
    columns: dict[int, Tensor] = {
        Factor.APPLY: finite.double().expand_as(lr),
        Factor.GRADIENT: clipped / scalars[0].double(),
        Factor.KEEP: 1 - lr * setting[Setting.WEIGHT_DECAY],
        Factor.NEW1: 1 - beta1,
        Factor.OLD2: beta2,
        Factor.NEW2: 1 - beta2,
        Factor.ROOT: (1 - beta2**n).rsqrt(),
        Factor.EPS: setting[Setting.EPS],
        Factor.STEP: lr / (1 - beta1**n),
        Factor.LR: lr,
    }
    for number in range(MOST_EMAS):
        columns[Factor.EMA + number] = 1 - torch.minimum(setting[Setting.EMA_DECAY + number], n / (n + 9))
    for column, value in columns.items():
        factors[:, column] = value
    scalars[1] = unscaled
    _count(finite, growth_interval, counts, scalars)


def scheduled(n: Tensor, warmup: Tensor, cosine_steps: Tensor) -> Tensor:
    """Factor of the learning rate at step n = 1, 2, ..."""
    progress = ((n - 1 - warmup) / (cosine_steps - warmup).clamp(min=1)).clamp(max=1)
    cosine = torch.where(cosine_steps > 0, 0.5 * (1 + torch.cos(math.pi * progress)), torch.ones_like(n))
    return torch.where(n <= warmup, n / warmup.clamp(min=1), cosine)


def _count(finite: Tensor, growth_interval: int, counts: Tensor, scalars: Tensor) -> None:
    taken = finite.long()
    counts[0] += taken
    counts[2] += 1 - taken
    if not growth_interval:
        return
    growth = (counts[1] + 1) * taken
    grown = growth >= growth_interval
    factor = torch.where(finite, torch.where(grown, 2.0, 1.0), 0.5)
    scalars[0] = (scalars[0] * factor).clamp(SMALLEST_SCALE, LARGEST_SCALE)
    counts[1] = torch.where(grown, 0, growth)


def update_reference(slot: Slot, factors: Sequence[float]) -> None:
    """The definition of what a step that is not skipped does to one parameter, by its group's row of factors."""
    p, m, v = slot.parameter, slot.exp_avg, slot.exp_avg_sq
    assert p is not None and m is not None and v is not None
    g = slot.gradient.to(p.dtype) * factors[Factor.GRADIENT]
    m.add_(g - m, alpha=factors[Factor.NEW1])
    v.mul_(factors[Factor.OLD2]).add_(g * g, alpha=factors[Factor.NEW2])
    denominator = v.sqrt() * factors[Factor.ROOT] + factors[Factor.EPS]
    p.mul_(factors[Factor.KEEP]).sub_(m / denominator, alpha=factors[Factor.STEP])
    for number, ema in enumerate(slot.emas):
        ema.add_(p - ema, alpha=factors[Factor.EMA + number])
    if slot.copy is not None:
        slot.copy.copy_(p)


def _forward(
    rows: Tensor,
    places: Tensor,
    chunk: int,
    settings: Tensor,
    norm: Tensor,
    growth_interval: int,
    decays: int,
    counts: Tensor,
    scalars: Tensor,
    factors: Tensor,
    gradients: list[Tensor],
    parameters: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    copies: list[Tensor],
    emas: list[Tensor],
    groups: list[int],
) -> None:
    advance_reference(settings, norm, growth_interval, StepState(counts, scalars, factors))
    table = factors.tolist()
    for number, group in enumerate(groups):
        if table[group][Factor.APPLY]:
            copy = copies[number] if copies[number].numel() else None
            own = tuple(emas[number * decays : (number + 1) * decays])
            moments = exp_avgs[number], exp_avg_sqs[number]
            update_reference(Slot(gradients[number], parameters[number], *moments, copy, own), table[group])


def _rule(scalars: Tensor, gradients: list[Tensor], parameters: list[Tensor], **_: Any) -> str | None:
    """Kernels read addresses as the dtypes that the table has: float32 but for gradients and copies."""
    if scalars.dtype != torch.float32 or any(parameter.dtype != torch.float32 for parameter in parameters):
        return "parameters and what is counted are not all float32"
    return None if all(gradient.dtype in FORMATS for gradient in gradients) else "gradients in float64 are PyTorch's"


_MUTATED = ("counts", "scalars", "factors", "parameters", "exp_avgs", "exp_avg_sqs", "copies", "emas")
_op = Op(
    "adamw_ema",
    Pass(_forward, lambda **_: (), mutates=_MUTATED),
    backends=(Extension("cuda", _rule), Triton(_rule), Extension("cpu", _rule)),
)
