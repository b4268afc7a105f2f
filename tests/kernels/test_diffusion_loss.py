"""kernels/diffusion_loss.py in Triton's interpreter against erd_fast.ops.diffusion_loss in float64."""

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from erd_fast.ops.diffusion_loss import diffusion_loss_reference
from support.triton_interpreter import ROUNDING, UNIT, Call, interpret, patchify

pytestmark = pytest.mark.slow

pytest.importorskip("triton")

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype = torch.float32
    patch: int = 0
    size: tuple[int, int, int] = (4, 8, 8)
    extra: int = 0  # channels predicted beyond those of the target
    count: int = 5
    bins: int = 10
    timesteps: int | None = 1000  # None: a weight a sample
    batch_size: int | None = None
    loss_scale: float | None = None
    gradient: bool = True

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.size))
        parts = [f"{self.dtype}"[6:], sizes, f"patch {self.patch}" if self.patch else "image"]
        for name in ("extra", "count", "bins", "timesteps", "batch_size", "loss_scale", "gradient"):
            if getattr(self, name) != getattr(Case, name):
                parts.append(f"{name} {getattr(self, name)}")
        return " ".join(parts)


CASES = [
    *(Case(dtype, patch, extra=extra) for dtype, patch, extra in itertools.product(FLOATS, (0, 2), (0, 4))),
    *(Case(dtype, patch, loss_scale=1024.0, batch_size=48) for dtype in FLOATS for patch in (0, 2)),
    *(Case(dtype, size=(3, 5, 7), extra=1) for dtype in FLOATS),  # no power of two, no alignment
    Case(patch=2, size=(3, 6, 10), extra=2),
    Case(patch=3, size=(1, 6, 9)),
    Case(timesteps=None),
    Case(timesteps=None, patch=2, loss_scale=0.5),
    Case(gradient=False, extra=4),
    Case(gradient=False, extra=4, patch=2),
    Case(count=1),
    Case(bins=1),
    Case(bins=150, count=20),  # several sweeps over the images, the last one in part
    Case(timesteps=7, bins=10),  # bins that nothing can fall into
    Case(timesteps=65536, bins=3),
    Case(torch.bfloat16, 2, (4, 32, 32), extra=4, count=2),  # several blocks an image
    Case(torch.bfloat16, 0, (3, 41, 37), count=2),
    Case(size=(1, 2, 2), count=530),  # more images than the last program takes at once
]


EXTRA = Case(extra=4)
OUTSIDE = (-1, 1000, -(-(1 << 64) // 10))  # ten bins times the last is a small number modulo 2**64


class Inputs(NamedTuple):
    prediction: Tensor  # (N, C', H, W), extra channels NaN: nothing may read them
    target: Tensor
    weight: Tensor
    t_index: Tensor | None


def _inputs(case: Case) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    channels, height, width = case.size
    prediction = torch.randn(case.count, channels + case.extra, height, width, generator=generator).to(case.dtype)
    prediction[:, channels:] = torch.nan
    rows = case.count if case.timesteps is None else case.timesteps
    t_index = torch.randint(rows, (case.count,), generator=generator)
    t_index[0] = rows - 1
    return Inputs(
        prediction,
        torch.randn(case.count, *case.size, generator=generator),
        torch.rand(rows, generator=generator) + 0.1,
        None if case.timesteps is None else t_index,
    )


def _call(case: Case, inputs: Inputs) -> Call:
    prediction = patchify(inputs.prediction, case.patch) if case.patch else inputs.prediction
    count = len(inputs.target)
    return Call(
        "diffusion_loss",
        (
            prediction,
            inputs.target,
            inputs.weight,
            inputs.t_index,
            case.batch_size or count,
            None if case.loss_scale is None else torch.tensor(case.loss_scale),
            case.patch,
            torch.tensor(torch.nan),
            torch.full((count,), torch.nan),
            torch.full((case.bins,), torch.nan),
            torch.full((case.bins,), torch.nan),
            torch.full_like(prediction, torch.nan) if case.gradient else None,
        ),
    )


class Found(NamedTuple):
    loss: Tensor
    per_sample: Tensor
    bin_sum: Tensor
    bin_count: Tensor
    dprediction: Tensor | None


def _sum_bound(terms: int) -> float:
    """Relative error of a sum of non-negative terms: 32 partial sums deep (registers, warp, warps or NumPy's), and one
    more for each further block of at least 512; four roundings of a term."""
    return (32 + 4 + math.ceil(terms / 512)) * UNIT


def _shared_calls() -> dict[str, Call]:
    """Calls whose results are compared with each other."""
    calls = {}
    for name, case in {"image": Case(count=7), "odd": Case(torch.bfloat16, size=(3, 5, 7), count=7),
                       "tokens": Case(torch.float16, 2, count=7)}.items():  # fmt: skip
        whole = _inputs(case)
        assert whole.t_index is not None
        parts = {"all": slice(None), "tail": slice(3, None), "one": slice(4, 5), "mixed": torch.tensor([6, 4, 0])}
        for part, rows in parts.items():
            inputs = Inputs(whole.prediction[rows], whole.target[rows], whole.weight, whole.t_index[rows])
            calls[f"{name} {part}"] = _call(case, inputs)
    for turn in ("first", "second"):
        calls[turn] = _call(Case(), _inputs(Case()))
    for value in OUTSIDE:
        inputs = _inputs(EXTRA)
        assert inputs.t_index is not None
        inputs.t_index[2] = value
        calls[f"t_index {value}"] = _call(EXTRA, inputs)
    empty = replace(Case(), count=0, batch_size=4)
    calls["no images"] = _call(empty, Inputs(*(value if value is None else value[:0] for value in _inputs(Case()))))
    return calls


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, Found]:
    calls = {str(case): _call(case, _inputs(case)) for case in CASES} | _shared_calls()
    found = interpret(list(calls.values()), tmp_path_factory.mktemp("diffusion_loss"))
    return {name: Found(*arguments[-5:]) for name, arguments in zip(calls, found, strict=True)}


def test_case_names_are_unique():
    assert len({str(case) for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_are_those_of_the_definition(results, case):
    found, (prediction, target, weight, t_index) = results[str(case)], _inputs(case)
    prediction = prediction.double().requires_grad_()
    batch_size = case.batch_size or case.count
    # By sample, since the reference keeps its bins in float32; and its own float() must not round the truth.
    by_sample = weight.double() if t_index is None else weight.double()[t_index]
    truth = _in_float64(prediction, target, by_sample, batch_size)
    bound = _sum_bound(math.prod(case.size))
    _close(found.per_sample, truth.per_sample, bound * truth.per_sample)
    _close(found.loss, truth.loss, (bound + _sum_bound(case.count)) * truth.loss)

    bin_sum, bin_count = torch.zeros(2, case.bins, dtype=torch.float64)
    if t_index is not None:
        bins = t_index * case.bins // len(weight)
        bin_sum.index_add_(0, bins, truth.per_sample)
        bin_count.index_add_(0, bins, torch.ones_like(truth.per_sample))
    _close(found.bin_sum, bin_sum, (bound + _sum_bound(case.count)) * bin_sum)
    assert torch.equal(found.bin_count.double(), bin_count)

    if not case.gradient:
        assert found.dprediction is None
        return
    (gradient,) = torch.autograd.grad(truth.loss, prediction)
    gradient *= case.loss_scale or 1.0
    if case.patch:
        gradient = patchify(gradient, case.patch)
    relative, absolute = ROUNDING[case.dtype]
    assert found.dprediction is not None and found.dprediction.dtype == case.dtype
    # Six operations in float32, then one rounding to the type; where nothing was predicted, exactly 0.
    _close(found.dprediction, gradient, (6 * UNIT + relative) * gradient.abs() + absolute * (gradient != 0))


def _in_float64(prediction: Tensor, target: Tensor, weight: Tensor, batch_size: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "float", lambda self: self)
        return diffusion_loss_reference(prediction, target.double(), weight, None, num_bins=1, batch_size=batch_size)


def _close(found: Tensor, truth: Tensor, allowed: Tensor) -> None:
    assert found.shape == truth.shape
    excess = (found.double() - truth).abs() - allowed
    assert (excess <= 0).all(), f"{int((~(excess <= 0)).sum())} of {excess.numel()} beyond the bound by {excess.max()}"


@pytest.mark.parametrize("layout", ["image", "odd", "tokens"])
def test_an_image_counts_the_same_in_any_batch(results, layout):
    whole = results[f"{layout} all"].per_sample
    for part, rows in {"tail": slice(3, None), "one": slice(4, 5), "mixed": torch.tensor([6, 4, 0])}.items():
        assert torch.equal(results[f"{layout} {part}"].per_sample, whole[rows]), part


def test_the_same_call_gives_the_same_bits(results):
    first, second = results["first"], results["second"]
    for name, one, other in zip(Found._fields, first, second, strict=True):
        assert one is not None and torch.equal(one, other), name


@pytest.mark.parametrize("value", OUTSIDE)
def test_a_timestep_out_of_range_is_nan_and_in_no_bin(results, value):
    found, right = results[f"t_index {value}"], results[str(EXTRA)]
    assert found.dprediction is not None and right.dprediction is not None
    others = [0, 1, 3, 4]
    assert found.loss.isnan() and found.dprediction[2, :4].isnan().all()
    assert not found.dprediction[2, 4:].any()
    assert torch.equal(found.dprediction[others], right.dprediction[others])
    assert torch.equal(found.per_sample, right.per_sample)
    assert found.bin_count.sum() == 4


def test_no_images_are_no_loss(results):
    found: Any = results["no images"]
    assert found.loss == 0 and not found.bin_sum.any() and not found.bin_count.any()
