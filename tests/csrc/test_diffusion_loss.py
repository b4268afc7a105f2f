"""diffusion_loss in C++ and CUDA against its definition in float64, within the rounding that float32 sums allow."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from erd_fast.ops.diffusion_loss import diffusion_loss_reference
from erd_fast.ops.patchify import patchify, unpatchify

pytestmark = pytest.mark.build

HALF_ULP = 2.0**-24
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (C, H, W), C', patch: DiT and its learned variance, whole blocks and parts, odd sizes, one pixel.
SHAPES = [
    ((4, 8, 8), 4, 0),
    ((4, 8, 8), 8, 2),
    ((4, 32, 32), 8, 0),
    ((4, 32, 32), 4, 2),
    ((3, 5, 7), 3, 0),
    ((3, 5, 7), 4, 1),
    ((3, 8, 12), 6, 4),
    ((1, 6, 10), 1, 2),
    ((1, 1, 1), 2, 0),
]
STEPS = 11


def _case(shape: tuple[int, ...], predicted: int, patch: int, dtype: torch.dtype, count: int = 5) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(sum(shape))
    prediction = torch.randn(count, predicted, *shape[1:], generator=generator).to(dtype)
    prediction[:, shape[0] :] = torch.nan  # counts for nothing
    return {
        "prediction": patchify(prediction, patch).contiguous(),
        "target": torch.randn(count, *shape, generator=generator),
        "weight": torch.rand(STEPS, generator=generator) + 0.1,
        "t_index": torch.randint(0, STEPS, (count,), generator=generator),
        "batch_size": 2 * count + 1,
        "loss_scale": torch.tensor(3.0),
        "patch": patch,
    }


def _run(ops: Any, case: dict[str, Any], *, bins: int = 10, gradient: bool = True) -> dict[str, Tensor]:
    """The op on outputs that hold NaN."""
    count = case["target"].shape[0]
    shapes = {"loss": (), "per_sample": (count,), "bin_sum": (bins,), "bin_count": (bins,)}
    outputs = {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}
    outputs["dprediction"] = torch.full_like(case["prediction"], torch.nan) if gradient else None
    ops.diffusion_loss_fwd(**case, **outputs)
    return outputs


def _truth(case: dict[str, Any], bins: int) -> dict[str, Tensor]:
    """The definition, and its gradient by autograd, in float64, of what the inputs hold once they are rounded."""
    prediction = case["prediction"].double().nan_to_num(0.0).requires_grad_()
    channels, height, width = case["target"].shape[1:]
    images = unpatchify(prediction, case["patch"], height, width)[:, :channels]
    # The definition works in float32; its formulas, here in float64.
    mse = (images - case["target"].double()).square().flatten(1).mean(1)
    weight = case["weight"].double()
    loss = ((weight if case["t_index"] is None else weight[case["t_index"]]) * mse).sum() / case["batch_size"]
    (gradient,) = torch.autograd.grad(loss, prediction)
    scale = 1.0 if case["loss_scale"] is None else case["loss_scale"].double()
    result = {"loss": loss.detach(), "per_sample": mse.detach(), "dprediction": gradient * scale}
    for name, values in {"bin_sum": mse.detach(), "bin_count": torch.ones_like(mse)}.items():
        result[name] = torch.zeros(bins, dtype=torch.float64)
        if case["t_index"] is not None:
            result[name] = result[name].index_add(0, case["t_index"] * bins // STEPS, values)
    return result


def _check(given: dict[str, Tensor], truth: dict[str, Tensor], size: int) -> None:
    count = truth["per_sample"].numel()
    # Every term is positive, so relative errors add up: three roundings of a square, at most size / 32 sums by one
    # thread or lane, a tree of at most 8 + 8, the mean; for sums over images as many again as there are images.
    of_image = HALF_ULP * (3 + size / 32 + 16 + 2)
    of_batch = of_image + HALF_ULP * (count + 4)
    bounds = {"per_sample": of_image, "loss": of_batch, "bin_sum": of_batch, "bin_count": 0.0}
    for name, bound in bounds.items():
        assert given[name].dtype == torch.float32
        assert ((given[name] - truth[name]).abs() <= bound * truth[name]).all(), name
    gradient = given["dprediction"]
    if gradient is None:
        return
    # One rounding each for the error, B C H W, the slope, its scale, the product; then the one to the dtype, whose
    # smallest step counts where numbers are subnormal.
    kind = torch.finfo(gradient.dtype)
    bound = (5 * HALF_ULP + kind.eps / 2) * truth["dprediction"].abs() + kind.tiny * kind.eps / 2
    assert ((gradient.double() - truth["dprediction"]).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "predicted", "patch"), SHAPES)
def test_is_within_rounding_of_the_definition(ops, shape, predicted, patch, dtype):
    case = _case(shape, predicted, patch, dtype)
    size = case["target"][0].numel()
    for bins, changed in (
        (10, {}),
        (1, {"loss_scale": None}),
        (100, {"batch_size": 1}),
        (3, {"t_index": None, "weight": case["weight"][:5].contiguous()}),
    ):
        given = _run(ops, case | changed, bins=bins)
        _check(given, _truth(case | changed, bins), size)
        value_only = _run(ops, case | changed, bins=bins, gradient=False)
        for name in ("loss", "per_sample", "bin_sum", "bin_count"):
            assert torch.equal(value_only[name], given[name]), name


def test_float64_truth_is_the_definition():
    case = _case((4, 8, 8), 8, 2, torch.float32)
    truth = _truth(case, 10)
    expected = diffusion_loss_reference(
        case["prediction"], case["target"], case["weight"], case["t_index"], num_bins=10,
        batch_size=case["batch_size"], patch=case["patch"],
    )  # fmt: skip
    for name in ("loss", "per_sample", "bin_sum", "bin_count"):
        assert torch.allclose(getattr(expected, name).double(), truth[name], rtol=1e-5), name


@pytest.mark.parametrize(("count", "shape"), [(1, (2, 4, 4)), (1000, (2, 4, 4)), (31, (4, 32, 32)), (300, (4, 32, 32))])
def test_sums_over_any_number_of_images(ops, count, shape):
    # On a GPU by one warp, and by eight: fewer, and more, images than threads.
    case = _case(shape, shape[0], 0, torch.float32, count)
    for bins in (10, 100):
        _check(_run(ops, case, bins=bins), _truth(case, bins), case["target"][0].numel())


@pytest.mark.parametrize(("shape", "predicted", "patch"), SHAPES)
def test_the_error_of_an_image_depends_on_it_alone(ops, shape, predicted, patch):
    # A slice of an odd shape begins at an odd address: other loads, the same sum.
    case = _case(shape, predicted, patch, torch.bfloat16)
    whole = _run(ops, case)
    for first, last in ((0, 1), (3, 4), (1, 5)):
        part = {name: case[name][first:last] for name in ("prediction", "target", "t_index")}
        given = _run(ops, case | part)
        for name in ("per_sample", "dprediction"):
            assert torch.equal(given[name], whole[name][first:last]), (name, first, last)


def test_odd_addresses_change_nothing(ops):
    case = _case((4, 8, 8), 8, 2, torch.bfloat16)
    shifted = {name: _shifted(case[name]) for name in ("prediction", "target")}
    given, expected = _run(ops, case | shifted), _run(ops, case)
    assert all(torch.equal(given[name], expected[name]) for name in expected)


def _shifted(tensor: Tensor) -> Tensor:
    """The same numbers, contiguous, at an address that no pack of four allows."""
    return tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)


def test_layouts_give_the_same_errors_on_a_cpu(cpu_ops):
    tokens = _case((4, 32, 32), 8, 2, torch.bfloat16)
    image = tokens | {"patch": 0, "prediction": unpatchify(tokens["prediction"], 2, 32, 32).contiguous()}
    one, other = _run(cpu_ops, tokens), _run(cpu_ops, image)
    for name in ("loss", "per_sample", "bin_sum"):
        assert torch.equal(one[name], other[name])
    assert torch.equal(one["dprediction"], patchify(other["dprediction"], 2))


def test_instruction_sets_give_equal_bits(cpu_ops):
    best = cpu_ops.cpu_level()
    for (shape, predicted, patch), dtype in itertools.product(SHAPES, DTYPES):
        case, results = _case(shape, predicted, patch, dtype), []
        for level in range(best + 1):
            cpu_ops.cpu_level(level)
            results.append(_run(cpu_ops, case))
        for other in results[1:]:
            assert all(torch.equal(results[0][name], other[name]) for name in other), (shape, dtype)


def test_threads_change_nothing(cpu_ops):
    case = _case((4, 32, 32), 4, 2, torch.float32, count=40)
    threads, results = torch.get_num_threads(), []
    for number in (1, 2):
        torch.set_num_threads(number)
        results.append(_run(cpu_ops, case))
    torch.set_num_threads(threads)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_gradient_overflows_to_infinity_and_nan_passes(ops):
    case = _case((4, 8, 8), 4, 0, torch.float16) | {"loss_scale": torch.tensor(2.0**40)}
    case["prediction"][1, 0, 0, 0] = torch.nan
    given = _run(ops, case)
    assert given["dprediction"][0].abs().max() == torch.inf  # the step is then skipped, as with any loss scale
    assert given["per_sample"].isnan().tolist() == [False, True, False, False, False]
    assert given["loss"].isnan()


@pytest.mark.parametrize(("shape", "predicted", "patch"), [((4, 8, 8), 8, 2), ((3, 5, 7), 4, 0)])
@pytest.mark.parametrize("row", [-1, STEPS, 1 << 40])
def test_on_a_gpu_a_timestep_out_of_range_makes_the_loss_nan(emulated_ops, shape, predicted, patch, row):
    case = _case(shape, predicted, patch, torch.float32)
    good = _run(emulated_ops, case)
    bins = case["t_index"] * 10 // STEPS
    case["t_index"] = torch.cat((case["t_index"][:1], torch.tensor([row]), case["t_index"][2:]))
    given = _run(emulated_ops, case)
    assert given["loss"].isnan()
    assert torch.equal(given["per_sample"], good["per_sample"])
    good["bin_count"][bins[1]] -= 1
    assert torch.equal(given["bin_count"], good["bin_count"])
    channels, height, width = shape
    gradient = unpatchify(given["dprediction"], patch, height, width)
    assert gradient[1, :channels].isnan().all()
    assert (gradient[:, channels:] == 0).all()
    others = [0, 2, 3, 4]
    assert torch.equal(given["dprediction"][others], good["dprediction"][others])


@pytest.mark.parametrize("row", [-1, STEPS])
def test_rows_out_of_range_are_named(cpu_ops, row):
    case = _case((4, 8, 8), 4, 0, torch.float32) | {"t_index": torch.tensor([0, 1, row, 2, 3])}
    with pytest.raises(RuntimeError, match=rf"diffusion_loss: t_index must be in \[0, {STEPS}\), got {row}"):
        _run(cpu_ops, case)


def test_bad_arguments_are_named(cpu_ops):
    case = _case((4, 8, 8), 4, 0, torch.float32)
    for changed, message in (
        ({"prediction": case["prediction"].double()}, "prediction must be Float, BFloat16 or Half, got Double"),
        ({"prediction": case["prediction"][:3]}, "prediction must have 1280 elements, got 768"),
        ({"prediction": case["prediction"].transpose(2, 3)}, "prediction must be contiguous"),
        ({"target": case["target"].half()}, "target must be Float, got Half"),
        ({"t_index": None}, "weight must have 5 elements, got 11"),
        ({"t_index": case["t_index"][:3]}, "t_index must have 5 elements, got 3"),
        ({"loss_scale": torch.ones(2)}, "loss_scale must have 1 elements, got 2"),
    ):
        with pytest.raises(RuntimeError, match=f"diffusion_loss: {message}"):
            _run(cpu_ops, case | changed)


def test_no_image_has_no_loss(ops):
    given = _run(ops, _case((4, 8, 8), 4, 0, torch.float32, count=0))
    assert given["loss"] == 0 and (given["bin_sum"] == 0).all() and (given["bin_count"] == 0).all()
