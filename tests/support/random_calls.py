"""Random calls of the ops that run on a CPU, valid and invalid, compared between two backends.

    python tests/support/random_calls.py --ops draw q_sample --first 0 --count 5000
    python tests/support/random_calls.py --ops draw --first 17 --count 1                repeats call 17 of draw

A call is a function of op and number. Valid calls run on the CPU backend and on the reference. Every result must be
within a bound of the formula in float64, or equal to the reference's to the bit; inputs must not change. Invalid calls
must raise ValueError or TypeError on both. A call that exceeds the time limit ends the process with a traceback.
Memory that an op allocates is filled with NaN or the largest integer first, so an element that is never written shows.

Bounds: u = 2**-24 is the largest relative error of one float32 rounding. Each bound counts the roundings on the way to
a result and multiplies u by the size of what was rounded; a result in another dtype is rounded once more.
"""

import argparse
import dataclasses
import faulthandler
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import erd_fast
from erd_fast.errors import BackendUnavailableError
from erd_fast.ops import adamw_ema, attention, diffusion_loss, draw, grad_norm, q_sample, use_backend
from erd_fast.ops.adamw_ema import COLUMNS, Factor, Setting, StepState
from erd_fast.ops.tensor_table import CHUNK, Slot, TensorTable
from erd_fast.random import Purpose, Stream, normals

INVALID_SHARE = 0.2
SECONDS_PER_CALL = 60
UNAVAILABLE = 5
MOST_FAILURES = 20
U = 2.0**-24
TINY = 2.0**-148
"""Twice the rounding of a subnormal float32, which has no relative bound."""
NORMALS_ERROR = 2e-6
"""Absolute, between backends: docs/design.md, "Randomness"."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
REALS = (*FLOATS, torch.float64)
EXTREMES = (0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, -1e-30, 1e15, -3e14, 65504.0)


class Bound(NamedTuple):
    """A result in float64 and how far from it a backend may be before its last rounding."""

    truth: Tensor
    error: Tensor


@dataclasses.dataclass
class Call:
    """One call of an op.

    Attributes:
        run: calls the op on the active backend; the results by name.
        inputs: tensors that must not change.
        bounds: of results; those without one are equal to the bit on both backends.
        wrong: what is invalid about the arguments, or "".
        backend: compared with the reference.
    """

    run: Callable[[], dict[str, Tensor]]
    inputs: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    bounds: Callable[[], dict[str, Bound]] = dict
    wrong: str = ""
    backend: str = "cpu"


class Source:
    """Random arguments."""

    def __init__(self, key: str):
        self.random = random.Random(key)
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(63))
        self.extreme = self.chance(0.3)
        """Whether data has zeros, infinities, NaN, subnormal and large numbers."""

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def pick(self, *values: Any) -> Any:
        return self.random.choice(values)

    def number(self, low: int, high: int) -> int:
        return self.random.randint(low, high)

    def magnitude(self, low: int, high: int) -> int:
        """Of any order of magnitude, often an end, a power of two or a neighbour of one."""
        power = 1 << self.number(0, high.bit_length())
        drawn = self.pick(low, high, high - 1, power, power - 1, power + 1, *[self.number(0, power)] * 6)
        return min(max(drawn, low), high)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=self.generator, dtype=torch.float64)).to(dtype)

    def data(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        """Normals, some of them extreme."""
        made = self.normal(*shape, dtype=dtype, scale=scale)
        if self.extreme and made.numel():
            flat = made.view(-1)
            for _ in range(self.number(1, 4)):
                flat[self.number(0, flat.numel() - 1)] = self.pick(*EXTREMES)
        return made

    def rows(self, count: int, limit: int) -> Tensor:
        made = torch.randint(0, limit, (count,), generator=self.generator)
        return self.layout(made.to(self.pick(torch.int64, torch.int32)))

    def flags(self, count: int) -> Tensor:
        return self.layout(torch.rand(count, generator=self.generator) < self.pick(0.0, 0.5, 1.0))

    def layout(self, tensor: Tensor) -> Tensor:
        """The same numbers, often in memory that is not contiguous or not aligned."""
        how = self.pick("contiguous", "contiguous", "offset", "strided", "permuted", "expanded")
        if how == "offset":
            return self.offset(tensor)
        if how == "strided" and tensor.dim():
            room = torch.zeros((*tensor.shape[:-1], 2 * tensor.shape[-1]), dtype=tensor.dtype)
            return room[..., self.number(0, 1) :: 2].copy_(tensor)
        if how == "permuted":
            return self.permuted(tensor)
        if how == "expanded" and tensor.dim() and tensor.shape[0]:
            return tensor[:1].expand(tensor.shape)  # other numbers, one row for all
        return tensor

    def offset(self, tensor: Tensor) -> Tensor:
        """Contiguous, its address no multiple of 16 bytes."""
        return torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape).copy_(tensor)

    def permuted(self, tensor: Tensor) -> Tensor:
        """Dense, its dimensions in another order in memory."""
        order = list(range(tensor.dim()))
        self.random.shuffle(order)
        back = [order.index(dim) for dim in range(tensor.dim())]
        return tensor.permute(order).contiguous().permute(back)

    def noise_key(self, count: int) -> dict[str, Any]:
        ids = torch.tensor([self.magnitude(0, (1 << 63) - 1) for _ in range(count)])
        return {"ids": self.layout(ids), "seed": self.magnitude(0, (1 << 64) - 1)}


def of_mutation(source: Source, arguments: dict[str, Any], mutations: dict[str, Callable[[], dict[str, Any]]]) -> str:
    """Make a share of calls invalid: one of ``mutations``, arguments by a description, replaces some. The description,
    or ""."""
    if not source.chance(INVALID_SHARE):
        return ""
    wrong = source.random.choice(list(mutations))
    arguments.update(mutations[wrong]())
    return wrong


def tensors_in(arguments: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in arguments.items() if isinstance(value, Tensor)}


# ----------------------------------------------------------------------------
# draw


def draw_call(s: Source) -> Call:
    batch_size = s.pick(1, 2, 3, s.number(1, 64), s.number(1, 64), s.number(200, 700))
    offset = s.magnitude(0, 1 << 62) if s.chance(0.5) else 0
    counter = min(s.magnitude(0, 1 << 62), (1 << 63) - 1 - offset - batch_size)
    num_timesteps = s.magnitude(1, 1 << 31)
    table = None
    if s.chance(0.4):
        num_timesteps = s.number(1, 300)
        entries = [s.magnitude(0, 1 << 32) for _ in range(num_timesteps - 1)]
        table = torch.tensor(sorted([*entries, 1 << 32]))
        if s.chance(0.5):
            table = s.permuted(s.offset(table))
    arguments: dict[str, Any] = {
        "counter": torch.tensor(counter),
        "seed": s.magnitude(0, (1 << 64) - 1),
        "batch_size": batch_size,
        "dataset_size": s.magnitude(1, 1 << 32),
        "num_timesteps": num_timesteps,
        "label_drop": s.pick(0.0, 1.0, 2.0**-33, s.random.random()),
        "offset": offset,
        "purpose": s.pick(*Purpose),
        "t_table": table,
        "strata": s.magnitude(0, 1 << 31) if s.chance(0.5) else 0,
    }
    wrong = of_mutation(
        s,
        arguments,
        {
            "negative counter": lambda: {"counter": torch.tensor(-s.magnitude(1, 1 << 62))},
            "counter beyond 2**62": lambda: {"counter": torch.tensor((1 << 62) + 1)},
            "last image beyond 2**63": lambda: {"counter": torch.tensor(1 << 62), "offset": 1 << 62},
            "counter of another dtype": lambda: {"counter": torch.tensor(1, dtype=torch.int32)},
            "counter of one dimension": lambda: {"counter": torch.tensor([1])},
            "no images": lambda: {"batch_size": -s.number(0, 3)},
            "empty data set": lambda: {"dataset_size": 0},
            "large data set": lambda: {"dataset_size": (1 << 32) + 1},
            "no timesteps": lambda: {"num_timesteps": -s.number(0, 3)},
            "many timesteps": lambda: {"num_timesteps": (1 << 31) + 1, "t_table": None},
            "probability": lambda: {"label_drop": s.pick(-0.1, 1.1, math.nan, math.inf)},
            "negative offset": lambda: {"offset": -1},
            "strata": lambda: {"strata": s.pick(-1, (1 << 31) + 1)},
            "seed": lambda: {"seed": s.pick(-1, 1 << 64)},
            "seed is not an integer": lambda: {"seed": 1.5},
            "table of another length": lambda: {"t_table": torch.full((2 * s.number(1, 9),), 1 << 32),
                                                "num_timesteps": 2 * s.number(1, 9) + 1},
            "table of another dtype": lambda: {"t_table": torch.ones(3), "num_timesteps": 3},
            "table that falls": lambda: {"t_table": torch.tensor([5, 4, 1 << 32]), "num_timesteps": 3},
            "table that ends early": lambda: {"t_table": torch.tensor([5, 6]), "num_timesteps": 2},
        },
    )  # fmt: skip
    return Call(lambda: draw(**arguments)._asdict(), tensors_in(arguments), wrong=wrong)


# ----------------------------------------------------------------------------
# q_sample


def patched(image: Tensor, patch: int) -> Tensor:
    """Tokens of images: token (y / p, x / p), feature ((y % p) p + x % p) C + c."""
    if not patch:
        return image
    n, c, h, w = image.shape
    parts = image.reshape(n, c, h // patch, patch, w // patch, patch)
    return torch.einsum("nchpwq->nhwpqc", parts).reshape(n, h * w // patch**2, patch**2 * c)


def image_shape(s: Source) -> tuple[tuple[int, int, int, int], int]:
    """(N, C, H, W) and the patch size."""
    patch = s.pick(0, 0, 1, 2, 2, 3, 4)
    side = patch or 1
    count, channels = s.pick(1, s.number(1, 9), s.number(1, 9), s.number(10, 40)), s.pick(1, 3, 4, 4, s.number(1, 6))
    height, width = side * s.number(1, 6), side * s.number(1, 6)
    if s.chance(0.1):  # rows longer than the runs in which a CPU works
        count, channels, height, width = s.number(1, 2), s.number(1, 2), side, side * s.number(250, 1200)
    return (count, channels, height, width), patch


def q_sample_call(s: Source) -> Call:
    shape, patch = image_shape(s)
    count, channels, height, width = shape
    kind = s.pick("sample", "mean_std", "mean_logvar", "pixels")
    spreads = kind.startswith("mean_")
    stored, steps = s.number(1, 12), s.number(1, 20)
    by_index, by_t = s.chance(0.5), s.chance(0.7)
    latents_shape = (stored if by_index else count, channels * (1 + spreads), height, width)
    if kind == "pixels":
        latents = torch.randint(0, 256, latents_shape, generator=s.generator, dtype=torch.uint8)
    else:
        latents = s.data(*latents_shape, dtype=s.pick(*FLOATS), scale=s.pick(1.0, 1.0, 20.0))
    drawn, drawn_posterior = s.chance(0.5), s.chance(0.5)
    arguments: dict[str, Any] = {
        "latents": s.layout(latents),
        "coefficients": s.layout(s.normal(steps if by_t else count, 4, dtype=s.pick(*[torch.float32] * 4, *REALS))),
        "t_index": s.rows(count, steps) if by_t else None,
        "index": s.rows(count, stored) if by_index else None,
        "kind": kind,
        "scale": s.layout(s.data(channels, dtype=s.pick(*REALS))) if s.chance(0.6) else None,
        "shift": s.layout(s.data(channels, dtype=s.pick(*REALS))) if s.chance(0.6) else None,
        "flip": s.flags(count) if s.chance(0.6) else None,
        "purpose": s.pick(*Purpose),
        "noise": None if drawn else s.layout(s.data(*shape, dtype=s.pick(*REALS))),
        "posterior_noise": None if drawn_posterior else s.layout(s.data(*shape, dtype=s.pick(*REALS))),
        "dtype": s.pick(*FLOATS),
        "patch": patch,
    }
    needs_key = drawn or (spreads and drawn_posterior)
    if needs_key or s.chance(0.3):
        arguments |= s.noise_key(count)
    wrong = of_mutation(s, arguments, _wrong_q_samples(s, arguments, shape))
    exact = not needs_key and kind != "mean_logvar"  # the same products and sums in the same order
    return Call(
        lambda: q_sample(**arguments)._asdict(),
        tensors_in(arguments),
        dict if exact or wrong else lambda: _q_sample_bounds(arguments),
        wrong,
    )


def _wrong_q_samples(s: Source, given: dict[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
    count, channels, height, width = shape
    steps, latents = given["coefficients"].shape[0], given["latents"]
    stored = latents.shape[0]

    def with_row(limit: int, bad: int) -> Tensor:
        rows = torch.randint(0, limit, (count,), generator=s.generator)
        rows[s.number(0, count - 1)] = bad
        return rows

    def table_with(bad: float) -> Tensor:
        table = s.normal(steps, 4)
        table[s.number(0, steps - 1), s.number(0, 3)] = bad
        return table

    return {
        "unknown kind": lambda: {"kind": s.pick("mean", "", "pixel")},
        "latents of three dimensions": lambda: {"latents": latents[0]},
        "latents of another dtype": lambda: {"latents": latents.to(s.pick(torch.float64, torch.int32))},
        "kind of another dtype": lambda: {"kind": "sample" if given["kind"] == "pixels" else "pixels"},
        "odd channels": lambda: {"latents": s.normal(stored, 3, height, width), "index": None,
                                 "kind": s.pick("mean_std", "mean_logvar")},
        "t_index out of range": lambda: {"t_index": with_row(steps, s.pick(-1, steps, 1 << 40, -(1 << 40)))},
        "index out of range": lambda: {"index": with_row(stored, s.pick(-1, stored, 1 << 40, -(1 << 40)))},
        "t_index of another length": lambda: {"t_index": torch.zeros(count + s.pick(-1, 1), dtype=torch.int64)},
        "t_index of another dtype": lambda: {"t_index": torch.zeros(count)},
        "no images": lambda: {"index": torch.zeros(0, dtype=torch.int64)},
        "coefficients of another width": lambda: {"coefficients": s.normal(steps, s.pick(3, 5))},
        "coefficients by sample of another length": lambda: {"coefficients": s.normal(count + 1, 4), "t_index": None},
        "coefficients of integers": lambda: {"coefficients": torch.zeros(steps, 4, dtype=torch.int64)},
        "coefficients that are not finite": lambda: {"coefficients": table_with(s.pick(math.nan, math.inf, -math.inf))},
        "scale of another length": lambda: {"scale": torch.ones(channels + 1)},
        "scale of two dimensions": lambda: {"scale": torch.ones(channels, 1)},
        "shift of another dtype": lambda: {"shift": torch.ones(channels, dtype=torch.int64)},
        "flip of another dtype": lambda: {"flip": torch.ones(count)},
        "flip of another length": lambda: {"flip": torch.ones(count + 1, dtype=torch.bool)},
        "noise of another shape": lambda: {"noise": torch.zeros(count, channels, height, width + 1)},
        "noise for one image": lambda: {"noise": torch.zeros(channels, height, width)},
        "no key": lambda: {"noise": None, s.pick("ids", "seed"): None},
        "ids of another length": lambda: {"noise": None, "ids": torch.zeros(count + 1, dtype=torch.int64), "seed": 0},
        "seed": lambda: {"noise": None, "ids": torch.zeros(count, dtype=torch.int64), "seed": s.pick(-1, 1 << 64)},
        "dtype": lambda: {"dtype": s.pick(torch.float64, torch.int32)},
        "patch that does not divide": lambda: {"patch": s.pick(height + 1, width + 1, 7919)},
        "negative patch": lambda: {"patch": -s.number(1, 3)},
        "another device": lambda: {"scale": torch.ones(channels, device="meta")},
    }  # fmt: skip


def _q_sample_bounds(given: dict[str, Any]) -> dict[str, Bound]:
    def wide(name: str) -> Tensor:
        return given[name].float().double()

    stored, kind = given["latents"].double(), given["kind"]
    if given["index"] is not None:
        stored = stored[given["index"].long()]
    channels = stored.shape[1] // (2 if kind.startswith("mean_") else 1)
    shape = (stored.shape[0], channels, *stored.shape[2:])

    def noise(name: str, stream: Stream) -> tuple[Tensor, float]:
        if given[name] is not None:
            return wide(name), 0.0
        return normals(given["seed"], given["purpose"], stream, given["ids"].long(), shape[1:]).double(), NORMALS_ERROR

    if kind == "pixels":
        x, size, error = stored / 127.5 - 1.0, stored / 127.5 + 1.0, torch.zeros(shape, dtype=torch.float64)
    elif kind == "sample":
        x, size, error = stored, stored.abs(), torch.zeros(shape, dtype=torch.float64)
    else:
        mean, spread = stored.chunk(2, dim=1)
        std = spread if kind == "mean_std" else (0.5 * spread.clamp(-30.0, 20.0)).exp()
        n, off = noise("posterior_noise", Stream.POSTERIOR)
        x, size, error = mean + std * n, mean.abs() + (std * n).abs(), std.abs() * off
    if given["shift"] is not None:
        shift = wide("shift")[:, None, None]
        x, size = x - shift, size + shift.abs()
    if given["scale"] is not None:
        scale = wide("scale")[:, None, None]
        x, size, error = x * scale, size * scale.abs(), error * scale.abs()
    if given["flip"] is not None:
        turned = given["flip"][:, None, None, None]
        x, size, error = (torch.where(turned, value.flip(-1), value) for value in (x, size, error))
    eps, off = noise("noise", Stream.NOISE)
    rows = wide("coefficients")
    if given["t_index"] is not None:
        rows = rows[given["t_index"].long()]
    alpha, sigma, c_x, c_eps = rows[:, :, None, None, None].unbind(1)
    # A term meets at most 8 roundings: posterior product and sum, shift, scale, coefficient, last sum, and two for a
    # float32 exp or the division of a pixel.
    found = {}
    for name, a, b, patch in (("x_t", alpha, sigma, given["patch"]), ("target", c_x, c_eps, 0)):
        bound = 8 * U * (a.abs() * size + (b * eps).abs()) + a.abs() * error + b.abs() * off + 8 * TINY
        found[name] = Bound(patched(a * x + b * eps, patch), patched(bound, patch))
    return found


# ----------------------------------------------------------------------------
# diffusion_loss


def diffusion_loss_call(s: Source) -> Call:
    shape, patch = image_shape(s)
    count, channels, height, width = shape
    predicted = channels + s.pick(0, 0, channels, s.number(1, 3))
    dtype, mode = s.pick(*FLOATS), s.pick("autograd", "gradient", "gradient", "none", "value")
    steps, by_t = s.number(1, 20), s.chance(0.7)
    prediction = patched(s.data(count, predicted, height, width, dtype=dtype), patch)
    weight = s.normal(steps if by_t else count, scale=s.pick(1.0, 1e-3, 1e3))
    if s.chance(0.3):
        weight[s.number(0, len(weight) - 1)] = 0.0
    arguments: dict[str, Any] = {
        "prediction": s.layout(prediction),
        "target": s.layout(s.data(*shape)),
        "weight": s.layout(weight),
        "t_index": s.rows(count, steps) if by_t else None,
        "num_bins": s.pick(1, 10, s.number(1, 30)),
        "batch_size": s.pick(None, s.number(1, 3 * count)),
        "patch": patch,
        "compute_grad": {"autograd": None, "gradient": True, "none": False, "value": None}[mode],
        "loss_scale": torch.tensor(2.0 ** s.number(0, 16)) if mode == "gradient" and s.chance(0.5) else None,
    }
    wrong = of_mutation(s, arguments, _wrong_losses(s, arguments, shape))
    if mode == "autograd":
        arguments["prediction"] = arguments["prediction"].detach().requires_grad_()

    def run() -> dict[str, Tensor]:
        result = diffusion_loss(**arguments)
        found = {name: value.detach() for name, value in result._asdict().items() if value is not None}
        if mode == "autograd":
            (found["gradient"],) = torch.autograd.grad(result.loss, arguments["prediction"])
        return found

    return Call(run, tensors_in(arguments), dict if wrong else lambda: _loss_bounds(arguments, mode), wrong)


def _wrong_losses(s: Source, given: dict[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
    count, channels, height, width = shape
    steps, prediction = given["weight"].shape[0], given["prediction"]

    def with_row(bad: int) -> Tensor:
        rows = torch.randint(0, steps, (count,), generator=s.generator)
        rows[s.number(0, count - 1)] = bad
        return rows

    def weight_with(bad: float) -> Tensor:
        weight = s.normal(steps)
        weight[s.number(0, steps - 1)] = bad
        return weight

    wrong: dict[str, Any] = {
        "target of another dtype": lambda: {"target": given["target"].to(s.pick(torch.float64, torch.bfloat16))},
        "prediction of another dtype": lambda: {"prediction": prediction.double()},
        "no images": lambda: {"target": torch.zeros(0, *shape[1:]), "prediction": prediction[:0]},
        "target of three dimensions": lambda: {"target": given["target"][0]},
        "more images": lambda: {"prediction": torch.cat((prediction, prediction[:1]))},
        "another dimension": lambda: {"prediction": prediction[..., None]},
        "weight of two dimensions": lambda: {"weight": given["weight"][:, None]},
        "weight of another dtype": lambda: {"weight": given["weight"].double()},
        "weight that is not finite": lambda: {"weight": weight_with(s.pick(math.nan, math.inf, -math.inf))},
        "weight by sample of another length": lambda: {"weight": s.normal(count + 1), "t_index": None},
        "t_index out of range": lambda: {"t_index": with_row(s.pick(-1, steps, 1 << 40, -(1 << 40)))},
        "t_index of another length": lambda: {"t_index": torch.zeros(count + 1, dtype=torch.int64)},
        "t_index of another dtype": lambda: {"t_index": torch.zeros(count)},
        "num_bins": lambda: {"num_bins": -s.number(0, 2)},
        "batch_size": lambda: {"batch_size": -s.number(0, 2)},
        "negative patch": lambda: {"patch": -s.number(1, 3)},
        "patch that does not divide": lambda: {"patch": s.pick(height + 1, width + 1, 7919)},
        "loss_scale of one dimension": lambda: {"loss_scale": torch.ones(1)},
        "loss_scale of another dtype": lambda: {"loss_scale": torch.ones((), dtype=torch.float64)},
        "another device": lambda: {"target": given["target"].to("meta")},
    }
    if channels > 1 and not given["patch"]:
        wrong["too few channels"] = lambda: {"prediction": prediction[:, : channels - 1]}
    return wrong


def _loss_bounds(given: dict[str, Any], mode: str) -> dict[str, Bound]:
    target, patch = given["target"].double(), given["patch"]
    count, channels, height, width = target.shape
    prediction = given["prediction"].detach().double()
    if patch:
        parts = prediction.reshape(count, height // patch, width // patch, patch, patch, -1)
        prediction = torch.einsum("nhwpqc->nchpwq", parts).reshape(count, -1, height, width)
    size, batch_size = channels * height * width, given["batch_size"] or count
    error = prediction[:, :channels] - target
    mse = error.square().flatten(1).mean(1)
    # A difference, a square and a division, and any order of a sum of n positive terms has at most n - 1 roundings.
    mse_error = (size + 4) * U * mse + size * TINY
    weight = given["weight"].double()
    if given["t_index"] is not None:
        weight = weight[given["t_index"].long()]
    terms, scale = (weight * mse).abs().sum() / batch_size, given["loss_scale"]
    loss_error = (size + count + 8) * U * terms + size * TINY * (1 + weight.abs().sum())
    found = {
        "loss": Bound((weight * mse).sum() / batch_size, loss_error),
        "per_sample": Bound(mse, mse_error),
    }
    sums, counts, sum_errors = (torch.zeros(given["num_bins"], dtype=torch.float64) for _ in range(3))
    if given["t_index"] is not None:
        bins = given["t_index"].long() * given["num_bins"] // given["weight"].shape[0]
        for number, place in enumerate(bins.tolist()):
            sums[place] += mse[number]
            counts[place] += 1
            sum_errors[place] += mse_error[number] + count * U * mse[number]
    found |= {"bin_sum": Bound(sums, sum_errors), "bin_count": Bound(counts, torch.zeros_like(counts))}
    if mode in ("autograd", "gradient"):
        factor = weight * (2.0 / (batch_size * size)) * (1.0 if scale is None else float(scale))
        gradient = torch.zeros(prediction.shape, dtype=torch.float64)
        gradient[:, :channels] = error * factor[:, None, None, None]
        # Five factors, and under autograd a product with the gradient of the loss, rounded to the prediction's dtype
        # before it and after it.
        kept = torch.finfo(given["prediction"].dtype)
        bound = 10 * U * gradient.abs() + 4 * TINY
        if mode == "autograd":
            bound += kept.eps * gradient.abs()
            # float16 is kept times the largest power of two up to B C H W, which may leave its range.
            overflows = gradient.abs() * batch_size * size >= kept.max
            bound = torch.where(overflows, math.inf, bound) if kept.max < 1e5 else bound
        name = "gradient" if mode == "autograd" else "dprediction"
        found[name] = Bound(patched(gradient, patch), patched(bound, patch))
    return found


# ----------------------------------------------------------------------------
# grad_norm


def gradient_shapes(s: Source) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = []
    for _ in range(s.number(1, 7)):
        long = s.pick(CHUNK - 1, CHUNK, CHUNK + 1, s.number(1, 20_000))
        small = tuple(s.number(1, 6) for _ in range(s.number(0, 4)))
        shapes.append(s.pick((0,), (1,), (long,), small, small, (3, 0, 2), (s.number(1, 70), s.number(1, 70))))
    return shapes


def dense(s: Source, tensor: Tensor) -> Tensor:
    how = s.pick("contiguous", "contiguous", "offset", "permuted")
    return tensor if how == "contiguous" else s.offset(tensor) if how == "offset" else s.permuted(tensor)


def grad_norm_call(s: Source) -> Call:
    dtype = s.pick(None, *FLOATS)
    huge = s.chance(0.05)
    gradients = []
    for shape in gradient_shapes(s):
        made = s.data(*shape, dtype=dtype or s.pick(*FLOATS), scale=10.0 ** s.number(-3, 3))
        gradients.append(dense(s, made))
    if huge and gradients[0].numel():
        gradients[0][(0,) * gradients[0].dim()] = 1e25  # its square leaves float32
    inputs = {f"gradients[{number}]": gradient for number, gradient in enumerate(gradients)}
    table = None
    if s.chance(0.5):
        table = TensorTable(torch.device("cpu"))
        table.update([Slot(gradient) for gradient in gradients])

    arguments: dict[str, Any] = {"gradients": gradients, "table": table}

    def tables_of(others: Sequence[Tensor]) -> TensorTable:
        made = TensorTable(torch.device("cpu"))
        made.update([Slot(other) for other in others])
        arguments["kept"] = others
        return made

    wrong = of_mutation(
        s,
        arguments,
        {
            "memory with holes": lambda: {"gradients": [*gradients, torch.ones(6)[::2]], "table": None},
            "expanded memory": lambda: {"gradients": [*gradients, torch.ones(1).expand(4)], "table": None},
            "several devices": lambda: {"gradients": [*gradients, torch.ones(3, device="meta")], "table": None},
            "table of fewer": lambda: {"gradients": [*gradients, torch.ones(3)], "table": tables_of(gradients)},
            "table of more": lambda: {"table": tables_of([*gradients, torch.ones(3)])},
            "table of others": lambda: {"gradients": [*gradients, torch.ones(3)],
                                        "table": tables_of([*gradients, torch.ones(3)])},
        },
    )  # fmt: skip

    def bounds() -> dict[str, Bound]:
        squares = [gradient.double().square().sum() for gradient in gradients]
        truth = torch.stack(squares).sum().sqrt()
        if huge and gradients[0].numel():
            truth = truth.where(truth.isnan(), torch.tensor(math.inf, dtype=torch.float64))
        longest, total = max(g.numel() for g in gradients), sum(g.numel() for g in gradients)
        # The roundings of a sum of n positive terms, in float32, are independent: their sum is within 4 sqrt(n) u but
        # for a chance of 1e-4 at most, and of 1e-9 in the blocks in which backends add; the root halves it.
        return {"norm": Bound(truth, (2 * math.sqrt(longest) + 4) * U * truth + math.sqrt(total) * 2.0**-74)}

    return Call(
        lambda: {"norm": grad_norm(arguments["gradients"], arguments["table"])},
        inputs,
        dict if wrong else bounds,
        wrong,
    )


# ----------------------------------------------------------------------------
# adamw_ema


def adamw_ema_call(s: Source) -> Call:
    emas, groups = s.number(0, 4), s.number(1, 3)
    gradient_dtype, copy_dtype = s.pick(None, *FLOATS), s.pick(None, *FLOATS)
    scale = 2.0 ** s.pick(0, 0, s.number(0, 32))
    slots = []
    for shape in gradient_shapes(s):
        gradient = (s.data(*shape) * min(scale, 1e4)).to(gradient_dtype or s.pick(*FLOATS))
        with_copy = s.chance(0.5)
        copy = s.normal(*shape, dtype=copy_dtype or s.pick(*FLOATS)) if with_copy else None
        second = 0.01 * s.normal(*shape).square()
        drawn = [s.data(*shape), 0.1 * s.normal(*shape), second, *(s.data(*shape) for _ in range(emas))]
        order = s.random.getstate()

        def placed(tensor: Tensor, state: Any = order) -> Tensor:
            s.random.setstate(state)  # the same strides for all tensors of a slot
            return dense(s, tensor)

        parameter, exp_avg, exp_avg_sq, *averages = map(placed, drawn)
        made = Slot(placed(gradient), parameter, exp_avg, exp_avg_sq, None if copy is None else placed(copy))
        slots.append(made._replace(emas=tuple(averages), group=s.number(0, groups - 1)))
    opt_step = s.pick(0, s.number(0, 20), s.magnitude(0, 1 << 40))
    settings = torch.zeros(groups, COLUMNS, dtype=torch.float64)
    for group in range(groups):
        warmup, start = s.pick(0, s.number(1, 30)), s.pick(0, s.number(0, min(opt_step, 1 << 20)))
        cosine = s.pick(0, 0, warmup + s.number(1, 50))
        values = {
            Setting.LR: 10.0 ** -s.number(0, 5), Setting.BETA1: s.pick(0.0, 0.9, 0.999),
            Setting.BETA2: s.pick(0.0, 0.95, 0.999), Setting.EPS: 10.0 ** -s.number(4, 12),
            Setting.WEIGHT_DECAY: s.pick(0.0, 0.1), Setting.GRAD_CLIP: s.pick(0.0, 1.0, 1e-3),
            Setting.WARMUP: warmup, Setting.COSINE_STEPS: cosine, Setting.START: start,
        }  # fmt: skip
        for column, value in values.items():
            settings[group, column] = value
        for number in range(4):
            settings[group, Setting.EMA_DECAY + number] = s.pick(0.0, 0.9, 0.9999, 1.0)
    state = StepState(
        torch.tensor([opt_step, s.number(0, 5), s.number(0, 5)]),
        torch.tensor([scale, s.random.random()]),
        s.normal(groups, COLUMNS),
    )
    if s.chance(0.5):
        with torch.no_grad():
            norm = torch.stack([slot.gradient.double().square().sum() for slot in slots]).sum().sqrt().float()
    else:
        norm = torch.tensor(s.pick(0.0, 1e-40, 1.0, 1e30, math.inf, math.nan, scale * s.random.random()))
    interval = s.pick(0, s.number(1, 6))
    table = TensorTable(torch.device("cpu"))
    table.update(slots)
    arguments: dict[str, Any] = {"slots": slots, "table": table}

    def replaced(**changes: Any) -> list[Slot]:
        number = s.number(0, len(slots) - 1)
        return [*slots[:number], slots[number]._replace(**changes), *slots[number + 1 :]]

    some = torch.ones(3)
    holes = torch.ones(6)[::2]
    extra = Slot(some, *(torch.ones(3) for _ in range(3)), emas=tuple(torch.ones(3) for _ in range(emas)))
    wrong = of_mutation(
        s,
        arguments,
        {
            "table of fewer": lambda: {"slots": [*slots, extra]},
            "table of more": lambda: {"slots": slots[:-1] or [extra]},
            "other gradients": lambda: {"slots": replaced(gradient=torch.ones(2, 3, 5))},
            "other parameters": lambda: {"slots": replaced(parameter=torch.ones(2, 3, 5))},
            "other averages": lambda: {"slots": replaced(emas=(*[torch.ones(2, 3, 5)] * emas, torch.ones(2)))},
            "other copies": lambda: {"slots": replaced(copy=torch.ones(2, 3, 5))},
            "memory with holes": lambda: {"slots": [*slots, extra._replace(gradient=holes)], "table": None},
            "another shape": lambda: {"slots": [*slots, extra._replace(parameter=torch.ones(4))], "table": None},
            "another dtype": lambda: {"slots": [*slots, extra._replace(exp_avg=torch.ones(3).half())], "table": None},
            "another device": lambda: {"slots": [extra._replace(copy=torch.ones(3, device="meta"))], "table": None},
            "five averages": lambda: {"slots": [extra._replace(emas=(some,) * 5)]},
        },
    )  # fmt: skip
    inputs = {"settings": settings, "norm": norm} | {f"gradients[{i}]": slot.gradient for i, slot in enumerate(slots)}

    def run() -> dict[str, Tensor]:
        if arguments["table"] is None:
            arguments["table"] = TensorTable(torch.device("cpu"))
            arguments["table"].update(arguments["slots"])
        adamw_ema(arguments["slots"], arguments["table"], settings, norm, state, growth_interval=interval)
        found = dict(zip(("counts", "scalars", "factors"), state, strict=True))
        for number, slot in enumerate(slots):
            found |= {f"{number}.{name}": value for name, value in slot.named() if value is not None}
            del found[f"{number}.gradient"]
            if slot.copy is not None and slot.parameter is not None and bool((state.factors[:, 0] > 0).any()):
                assert same_bits(slot.copy, slot.parameter.to(slot.copy.dtype)), f"{number}.copy is not the parameter"
        return found

    return Call(run, inputs, dict if wrong else _adamw_bounds(slots, settings, norm, state, interval), wrong)


def _adamw_bounds(
    slots: Sequence[Slot], settings: Tensor, norm: Tensor, state: StepState, interval: int
) -> Callable[[], dict[str, Bound]]:
    """Computed now: a call changes its arguments."""
    counts, scalars = state.counts.tolist(), state.scalars.double()
    opt_step, growth, skipped = counts
    s = {setting: settings[:, setting] for setting in Setting}
    n = opt_step + 1 - s[Setting.START]
    unscaled = norm.double() / scalars[0]
    taken = math.isfinite(float(unscaled))
    progress = ((n - 1 - s[Setting.WARMUP]) / (s[Setting.COSINE_STEPS] - s[Setting.WARMUP]).clamp(min=1)).clamp(max=1)
    cosine = torch.where(s[Setting.COSINE_STEPS] > 0, 0.5 + 0.5 * torch.cos(math.pi * progress), 1.0)
    lr = s[Setting.LR] * torch.where(n <= s[Setting.WARMUP], n / s[Setting.WARMUP].clamp(min=1), cosine)
    clip = s[Setting.GRAD_CLIP]
    clipped = torch.where(clip > 0, (clip / (unscaled + 1e-6)).clamp(max=1.0), 1.0)
    f = state.factors.double()
    columns = {
        Factor.APPLY: torch.full_like(lr, float(taken)), Factor.GRADIENT: clipped / scalars[0],
        Factor.KEEP: 1 - lr * s[Setting.WEIGHT_DECAY], Factor.NEW1: 1 - s[Setting.BETA1],
        Factor.OLD2: s[Setting.BETA2], Factor.NEW2: 1 - s[Setting.BETA2],
        Factor.ROOT: (1 - s[Setting.BETA2] ** n).rsqrt(), Factor.EPS: s[Setting.EPS],
        Factor.STEP: lr / (1 - s[Setting.BETA1] ** n), Factor.LR: lr,
    }  # fmt: skip
    for number in range(4):
        columns[Factor.EMA + number] = 1 - torch.minimum(settings[:, Setting.EMA_DECAY + number], n / (n + 9))
    for column, value in columns.items():
        f[:, column] = value
    # float64, but for a cosine near its end: absolute, of the full rate.
    f_error = 1e-12 * f.abs() + 1e-15 * s[Setting.LR][:, None] / (1 - s[Setting.BETA1][:, None])
    f_error[:, max(Factor) + 1 :] = 0.0  # columns without a meaning stay as they were
    scale = float(scalars[0])
    if interval:
        growth = (growth + 1) * taken
        scale = min(max(scale * (0.5 if not taken else 2.0 if growth >= interval else 1.0), 1.0), 2.0**32)
        growth = 0 if growth >= interval else growth
    new_counts = torch.tensor([opt_step + taken, growth, skipped + (not taken)], dtype=torch.float64)
    new_scalars = torch.stack((torch.tensor(scale, dtype=torch.float64), unscaled))
    found = {
        "counts": Bound(new_counts, torch.zeros(3, dtype=torch.float64)),
        "scalars": Bound(new_scalars, 1e-12 * new_scalars.abs()),
        "factors": Bound(f, f_error),
    }
    for number, slot in enumerate(slots):
        names = [name for name, value in slot.named() if value is not None and name != "gradient"]
        if not taken:
            kept = {name: value.double() for name, value in slot.named() if value is not None}
            found |= {f"{number}.{name}": Bound(kept[name].clone(), torch.zeros(kept[name].shape)) for name in names}
        else:
            made = _adamw_slot(slot, f[slot.group])
            found |= {f"{number}.{name}": made[name] for name in names}
    return lambda: found


def _adamw_slot(slot: Slot, f: Tensor) -> dict[str, Bound]:
    """A step of one parameter by its factors, with the roundings of each line and of the factors in it."""
    assert slot.parameter is not None and slot.exp_avg is not None and slot.exp_avg_sq is not None
    p, m, v = slot.parameter.double(), slot.exp_avg.double(), slot.exp_avg_sq.double()
    factor = {column: f[column] for column in Factor}
    g = slot.gradient.double() * factor[Factor.GRADIENT]
    g_error = 2 * U * g.abs() + TINY
    new_m = m + factor[Factor.NEW1] * (g - m)
    m_error = 4 * U * (m.abs() + factor[Factor.NEW1] * (g.abs() + m.abs())) + factor[Factor.NEW1] * g_error + TINY
    new_v = factor[Factor.OLD2] * v + factor[Factor.NEW2] * g * g
    v_error = 5 * U * new_v + factor[Factor.NEW2] * (2 * g.abs() + g_error) * g_error + 2 * TINY
    root_error = torch.minimum(v_error.sqrt(), v_error / new_v.sqrt())
    denominator = new_v.sqrt() * factor[Factor.ROOT] + factor[Factor.EPS]
    denominator_error = factor[Factor.ROOT] * root_error + 5 * U * denominator + TINY
    change = new_m / denominator
    least = (denominator - denominator_error).clamp(min=0.0)
    change_error = (m_error + change.abs() * denominator_error) / least + U * change.abs() + TINY
    step = factor[Factor.STEP]
    new_p = p * factor[Factor.KEEP] - step * change
    p_error = 4 * U * ((p * factor[Factor.KEEP]).abs() + p.abs() + step * change.abs()) + step * change_error + TINY
    found = {
        "parameter": Bound(new_p, p_error), "exp_avg": Bound(new_m, m_error), "exp_avg_sq": Bound(new_v, v_error),
        "copy": Bound(new_p, p_error),
    }  # fmt: skip
    for number, ema in enumerate(slot.emas):
        old, rate = ema.double(), f[Factor.EMA + number]
        error = 4 * U * (old.abs() + rate * (new_p.abs() + old.abs())) + rate * p_error + TINY
        found[f"emas[{number}]"] = Bound(old + rate * (new_p - old), error)
    return found


# ----------------------------------------------------------------------------
# attention


def attention_call(s: Source) -> Call:
    count, tokens, heads = (
        s.number(1, 3),
        s.pick(1, s.number(1, 40), s.number(1, 40), s.number(60, 280)),
        s.number(1, 3),
    )
    width, dtype, bad = s.pick(8, 16, 64, 72, s.number(1, 80)), s.pick(*FLOATS), s.chance(0.1)
    qkv = s.normal(count, tokens, 3 * heads * width, dtype=dtype, scale=s.pick(1.0, 1.0, 0.0, 1e-3, 8.0))
    if bad:
        qkv[s.number(0, count - 1), s.number(0, tokens - 1), s.number(0, qkv.shape[2] - 1)] = s.pick(*EXTREMES[2:5])
    arguments: dict[str, Any] = {"qkv": s.layout(qkv), "num_heads": heads}
    bad = not arguments["qkv"].isfinite().all()
    dout = s.normal(count, tokens, heads * width, dtype=dtype)
    wrong = of_mutation(
        s,
        arguments,
        {
            "two dimensions": lambda: {"qkv": qkv[0]},
            "four dimensions": lambda: {"qkv": qkv[None]},
            "no samples": lambda: {"qkv": qkv[:0]},
            "no tokens": lambda: {"qkv": qkv[:, :0]},
            "another dtype": lambda: {"qkv": qkv.to(s.pick(torch.float64, torch.int32))},
            "heads that do not divide": lambda: {"num_heads": heads * width + 1},
            "no heads": lambda: {"num_heads": -s.number(0, 3)},
            "heads are not an integer": lambda: {"num_heads": "2"},
        },
    )
    backward = s.chance(0.5) and not bad and not wrong
    arguments["qkv"].requires_grad_(backward)

    def run() -> dict[str, Tensor]:
        out = attention(**arguments)
        # A weight that float32 rounds to 0 makes an infinite value NaN.
        found = {"out": out.detach().where(out.isfinite(), torch.nan)}
        if backward:
            (found["dqkv"],) = torch.autograd.grad(out, arguments["qkv"], dout)
        return found

    inputs = {"qkv": arguments["qkv"], "dout": dout}
    bounds = dict if wrong else lambda: _attention_bounds(arguments["qkv"].detach(), heads, dout if backward else None)
    return Call(run, inputs, bounds, wrong, backend="flash")


def _attention_bounds(qkv: Tensor, heads: int, dout: Tensor | None) -> dict[str, Bound]:
    """By the worst case: a kernel may keep weights and their gradients in the dtype of ``qkv``, and sums in float32."""
    n, t, row = qkv.shape
    width = row // (3 * heads)
    q, k, v = qkv.double().view(n, t, 3, heads, width).permute(2, 0, 3, 1, 4).unbind(0)
    kind = torch.finfo(qkv.dtype)
    half = kind.eps / 2 if qkv.dtype != torch.float32 else 0.0
    tiny = t * kind.smallest_normal * kind.eps  # T weights, or their gradients, that are subnormal
    scale = width**-0.5
    scores = scale * q @ k.transpose(-1, -2)
    weight = scores.softmax(-1)
    q_norm, k_norm, v_norm = (part.norm(dim=-1, keepdim=True) for part in (q, k, v))

    def most(norms: Tensor) -> Tensor:
        return norms.amax(-2, keepdim=True)

    # A score is a sum of K products and a factor; a weight an exponential of it, less the largest or the log of the
    # sum, over a sum of T.
    score_error = (width + 3) * U * scale * q_norm * most(k_norm)
    weight_error = (3 * score_error).expm1() + (t + 10 + scores.abs().amax(-1, keepdim=True)) * U + 2 * half
    out = weight @ v
    out = out.where(out.isfinite(), torch.nan)
    out_error = most(v.abs()) * (weight_error + t * U + tiny)

    def joined(value: Tensor) -> Tensor:
        return value.expand(n, heads, t, width).transpose(1, 2).reshape(n, t, heads * width)

    found = {"out": Bound(joined(out), joined(out_error) + TINY)}
    if dout is None:
        return found
    d = dout.double().view(n, t, heads, width).transpose(1, 2)
    d_norm = d.norm(dim=-1, keepdim=True)
    products = d @ v.transpose(-1, -2) - (d * out).sum(-1, keepdim=True)
    dscores = weight * products
    # |dout v| and |dout out| are at most A; their sums have K terms, and out was rounded.
    largest = d_norm * most(v_norm)
    out_rounding = kind.eps / 2 + weight_error
    dscore_error = largest * (2 * weight_error + out_rounding + 2 * (width + 2) * U + 2 * half)
    columns = weight.sum(-2, keepdim=True).transpose(-1, -2)
    dq = scale * dscores @ k
    dq_error = scale * most(k_norm) * (dscore_error + 2 * t * U * largest + tiny)
    dk = scale * dscores.transpose(-1, -2) @ q
    dk_error = scale * most(q_norm) * (columns * most(dscore_error + 2 * t * U * largest) + tiny)
    dv = weight.transpose(-1, -2) @ d
    dv_error = most(d_norm) * (columns * most(weight_error + t * U) + tiny)
    parts = [
        torch.cat([joined(part) for part in three], -1) for three in ((dq, dk, dv), (dq_error, dk_error, dv_error))
    ]
    return found | {"dqkv": Bound(parts[0], parts[1] + TINY)}


# ----------------------------------------------------------------------------
# comparing

OPS: dict[str, Callable[[Source], Call]] = {
    "draw": draw_call,
    "q_sample": q_sample_call,
    "diffusion_loss": diffusion_loss_call,
    "grad_norm": grad_norm_call,
    "adamw_ema": adamw_ema_call,
    "attention": attention_call,
}


def made(op: str, number: int) -> Call:
    return OPS[op](Source(f"{op} {number}"))


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Also of NaN, whatever its payload."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def within(value: Tensor, bound: Bound) -> Tensor:
    """By element, whether ``value`` is the truth to its error and one rounding to its dtype. Infinities are equal, or
    what a number rounds to that leaves the dtype."""
    wide, truth, error = value.double(), bound.truth, bound.error
    if value.is_floating_point():
        kind = torch.finfo(value.dtype)
        error = error + kind.eps / 2 * (truth.abs() + error) + kind.smallest_normal * kind.eps
        left = wide.isinf() & (wide.sign() == truth.sign()) & (truth.abs() + error >= kind.max)
    else:
        left = torch.zeros_like(truth, dtype=torch.bool)
    return (wide == truth) | (wide.isnan() & truth.isnan()) | ((wide - truth).abs() <= error) | left


def fault_of(op: str, number: int) -> str:
    """What is wrong with a call's results; "" if nothing."""
    call, other = made(op, number), made(op, number)
    torch.set_num_threads(1 + number % 3)
    if call.wrong:
        found = (_not_refused(one, op, backend) for one, backend in ((call, call.backend), (other, "reference")))
        return next(filter(None, found), "")
    bounds = call.bounds()
    with use_backend(**{op: call.backend}):
        found = call.run()
    changed = [
        name for name, value in call.inputs.items() if not same_bits(value.detach(), other.inputs[name].detach())
    ]
    if changed:
        return f"changed its input {changed[0]}"
    with use_backend(**{op: "reference"}):
        expected = other.run()
    if set(found) != set(expected):
        return f"gave {sorted(found)}, the reference {sorted(expected)}"
    for name, value in found.items():
        wanted = expected[name]
        if (value.shape, value.dtype) != (wanted.shape, wanted.dtype):
            return f"{name}: {value.dtype} {tuple(value.shape)}, the reference {wanted.dtype} {tuple(wanted.shape)}"
        if name not in bounds:
            if not same_bits(value, wanted):
                return _worst(name, value, wanted.double(), (value == wanted) | (value.isnan() & wanted.isnan()))
            continue
        for who, one in ((call.backend, value), ("reference", wanted)):
            if not (right := within(one, bounds[name])).all():
                return _worst(f"{name} of {who}", one, bounds[name].truth, right, bounds[name].error)
    return ""


def _worst(name: str, value: Tensor, truth: Tensor, right: Tensor, error: Tensor | None = None) -> str:
    place = tuple((~right).nonzero()[0].tolist())
    bound = "" if error is None else f", bound {float(error.expand(truth.shape)[place]):.3g}"
    wrong = f"{int((~right).sum())} of {value.numel()}"
    return f"{name}: {wrong} wrong, first at {place}: {value[place].item()}, not {truth[place].item()}{bound}"


def _not_refused(call: Call, op: str, backend: str) -> str:
    try:
        with use_backend(**{op: backend}):
            call.run()
    except (ValueError, TypeError):
        return ""
    except Exception as error:
        return f"{call.wrong}, on {backend}: {type(error).__name__}: {error}, not ValueError"
    return f"{call.wrong}, on {backend}: nothing was raised"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--first", type=int, default=0, help="number of the first call")
    parser.add_argument("--count", type=int, default=100, help="calls of each op")
    options = parser.parse_args(arguments)
    faulthandler.enable()
    torch.use_deterministic_algorithms(True)  # so empty tensors are filled with NaN or the largest integer
    print(f"erd_fast from {Path(erd_fast.__file__).parent}", flush=True)
    failures = 0
    for op in options.ops:
        seconds = []
        for number in range(options.first, options.first + options.count):
            print(op, number, flush=True)  # the last line of a process that crashes
            faulthandler.dump_traceback_later(SECONDS_PER_CALL, exit=True)
            start = time.monotonic()
            try:
                fault = fault_of(op, number)
            except BackendUnavailableError as error:
                print(error)
                return UNAVAILABLE
            except Exception as error:
                fault = f"{type(error).__name__}: {error}"
            seconds.append(time.monotonic() - start)
            faulthandler.cancel_dump_traceback_later()
            if fault:
                print(f"FAILED {op} {number}: {fault}", flush=True)
                failures += 1
            if failures == MOST_FAILURES:
                return 1
        print(f"{op}: {options.count} calls in {sum(seconds):.1f} s, the longest {max(seconds):.2f} s", flush=True)
    return int(failures > 0)


def run_calls(ops: Sequence[str], count: int, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """:func:`main` in a process of its own, with the erd_fast of this one unless ``environment`` names another."""
    command = [sys.executable, __file__, "--ops", *ops, "--count", str(count)]
    variables = {**os.environ, "PYTHONPATH": str(Path(erd_fast.__file__).parents[1]), **(environment or {})}
    return subprocess.run(command, env=variables, capture_output=True, text=True)


def assert_right(run: subprocess.CompletedProcess) -> None:
    """Fails with the calls that failed, or those before a crash."""
    lines = run.stdout.splitlines()
    shown = [line for line in lines if line.startswith("FAILED")] or lines[-3:]
    assert run.returncode == 0, "\n".join(
        [f"exit code {run.returncode}; repeat call N with --ops OP --first N --count 1", *shown, run.stderr[:6000]]
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
