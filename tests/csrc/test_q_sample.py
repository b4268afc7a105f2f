"""q_sample in C++ and CUDA against its definition: equal bits but for the exponential, whose error is bounded."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from erd_fast.latents import KINDS, LOGVAR_RANGE
from erd_fast.ops.patchify import patch_shape
from erd_fast.ops.q_sample import q_sample_reference
from erd_fast.random import Purpose, Stream, normals

pytestmark = pytest.mark.build

SEED = 0x123456789ABCDEF0
HALF_ULP = 2.0**-24  # what one float32 rounding may add, relative
STORED = (torch.float32, torch.bfloat16, torch.float16)
# (C, H, W) and patch sizes: a DiT latent cut to size, and whole; several runs and tiles, the last not full; no width by
# 4; neither; one row; and tiles that no 16-byte store fits.
SHAPES = {
    (4, 8, 8): (0, 1, 2, 4),
    (4, 32, 32): (0, 2),
    (3, 70, 64): (0, 2),
    (3, 5, 7): (0, 1),
    (2, 6, 10): (0, 2),
    (1, 1, 4): (0, 1),
    (5, 1, 3): (0, 1),
}


def _case(kind: str, shape: tuple[int, ...], stored: torch.dtype = torch.float32, count: int = 3) -> dict[str, Any]:
    """Arguments by name: rows are picked out of a larger store, in some order and one twice."""
    channels, height, width = shape
    generator = torch.Generator().manual_seed(channels * 1000 + width)
    rows = 2 * channels if kind.startswith("mean_") else channels
    if kind == "pixels":
        latents = torch.randint(0, 256, (6, rows, height, width), generator=generator, dtype=torch.uint8)
    else:
        latents = torch.randn(6, rows, height, width, generator=generator).to(stored)
    return {
        "latents": latents,
        "coefficients": torch.randn(11, 4, generator=generator),
        "t_index": torch.randint(0, 11, (count,), generator=generator),
        "index": torch.tensor([5, 0, 5, 2])[:count],
        "kind": kind,
        "scale": torch.rand(channels, generator=generator) + 0.5,
        "shift": torch.randn(channels, generator=generator),
        "flip": torch.tensor([True, False, True, True])[:count],
        "ids": torch.tensor([0, (1 << 40) + 5, 77, 3])[:count],
        "noise": torch.randn(count, *shape, generator=generator),
        "posterior_noise": torch.randn(count, *shape, generator=generator) if kind.startswith("mean_") else None,
        "patch": 0,
        "dtype": torch.float32,
    }


def _run(ops: Any, case: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The op on outputs that hold NaN."""
    case = dict(case)
    rows = case["latents"].shape[1] // (2 if case["kind"].startswith("mean_") else 1)
    count = (case["latents"] if case["index"] is None else case["index"]).shape[0]
    shape = (count, rows, *case["latents"].shape[2:])
    x_t = torch.full(patch_shape(shape, case["patch"]), torch.nan, dtype=case.pop("dtype"))
    target = torch.full(shape, torch.nan)
    case["kind"] = KINDS.index(case["kind"])
    ops.q_sample_fwd(
        case.pop("latents"), case.pop("coefficients"), **{"seed": SEED, "purpose": 2, **case}, x_t=x_t, target=target
    )
    return x_t, target


def _expected(case: dict[str, Any]) -> tuple[Tensor, Tensor]:
    case = dict(case)
    latents, coefficients, t_index = case.pop("latents"), case.pop("coefficients"), case.pop("t_index")
    case["kind"] = KINDS.index(case["kind"])
    return tuple(q_sample_reference(latents, coefficients, t_index, seed=SEED, purpose=Purpose.SAMPLE, **case))


def _drawn(ops: Any, stream: Stream, case: dict[str, Any]) -> Tensor:
    """The op's own normals: x_t = 0 x0 + 1 eps, or 1 (0 + 1 n) + 0 eps."""
    rows, height, width = case["latents"].shape[1:]
    count = case["ids"].shape[0]
    of_noise = stream == Stream.NOISE
    channels = rows // 2 if case["kind"].startswith("mean_") else rows
    latents = torch.zeros(count, channels if of_noise else 2 * channels, height, width)
    latents[:, channels:] = 1.0
    coefficients = (
        torch.tensor([0.0, 1.0, 0.0, 1.0] if of_noise else [1.0, 0.0, 1.0, 0.0]).expand(count, 4).contiguous()
    )
    nothing = dict.fromkeys(("t_index", "index", "scale", "shift", "flip", "noise", "posterior_noise"))
    given = {} if of_noise else {"noise": torch.zeros(count, channels, height, width)}
    kind = "sample" if of_noise else "mean_std"
    drawing = {**case, **nothing, **given, "latents": latents, "coefficients": coefficients, "kind": kind}
    return _run(ops, {**drawing, "patch": 0, "dtype": torch.float32})[0]


@pytest.mark.parametrize("kind", ["sample", "mean_std", "pixels"])
def test_equals_the_definition_on_given_noise(ops, kind):
    for (shape, patches), stored in itertools.product(SHAPES.items(), STORED[: 1 if kind == "pixels" else 3]):
        for patch, dtype in itertools.product(patches, STORED):
            case = _case(kind, shape, stored) | {"patch": patch, "dtype": dtype}
            for name, one, other in zip(("x_t", "target"), _run(ops, case), _expected(case), strict=True):
                assert one.dtype == other.dtype
                assert torch.equal(one, other), (name, shape, patch, stored, dtype)


@pytest.mark.parametrize("left_out", ["t_index", "index", "scale", "shift", "flip"])
def test_equals_the_definition_without(ops, left_out):
    case = _case("mean_std", (4, 8, 8)) | {left_out: None}
    if left_out == "t_index":
        case["coefficients"] = case["coefficients"][:3].contiguous()
    if left_out == "index":
        case["latents"] = case["latents"][:3].contiguous()
    for one, other in zip(_run(ops, case), _expected(case), strict=True):
        assert torch.equal(one, other)


def test_log_variance_is_within_the_rounding_of_the_exponential(ops):
    for (shape, patches), stored in itertools.product(SHAPES.items(), STORED):
        for patch in patches:
            case = _case("mean_logvar", shape, stored) | {"patch": patch}
            mean, logvar = case["latents"][case["index"]].double().chunk(2, 1)
            spread = torch.exp(logvar / 2) * case["posterior_noise"].double()
            scale = case["scale"].double()[:, None, None]
            # Two units in the last place for each exponential, half of one for the product and each sum, on both sides.
            error = HALF_ULP * (10 * spread.abs() + 4 * mean.abs() + 4 * case["shift"].abs()[:, None, None]) * scale
            error = torch.where(case["flip"][:, None, None, None], error.flip(-1), error)
            k = case["coefficients"][case["t_index"]].double()[:, :, None, None, None].abs().unbind(1)
            x_t, target = _run(ops, case)
            x_t_expected, target_expected = _expected(case)
            bound = k[2] * error + 4 * HALF_ULP * (target_expected.abs() + k[3] * case["noise"].abs())
            assert ((target - target_expected).abs() <= bound).all(), (shape, stored, patch)
            k_x, k_eps = k[:2]
            bound = k_x * error + 4 * HALF_ULP * (k_eps * case["noise"].abs())
            x_0 = _expected(case | {"coefficients": case["coefficients"][:, [0, 1, 0, 1]].contiguous(), "patch": 0})[1]
            bound = patch_of(bound + 4 * HALF_ULP * x_0.abs(), patch)
            assert ((x_t - x_t_expected).abs() <= bound).all(), (shape, stored, patch)


def patch_of(images: Tensor, patch: int) -> Tensor:
    from erd_fast.ops.patchify import patchify

    return patchify(images, patch)


def test_exponential_is_within_one_unit_in_the_last_place(ops):
    # Past both ends of the clamp, and what is no number.
    logvar = torch.cat((torch.linspace(-40, 30, 4093), torch.tensor([torch.inf, -torch.inf, torch.nan])))
    case = _case("mean_logvar", (1, 1, 4096), count=1) | dict.fromkeys(("index", "t_index", "scale", "shift", "flip"))
    case["latents"] = torch.stack((torch.zeros(4096), logvar)).view(1, 2, 1, 4096)
    case |= {"posterior_noise": torch.ones(1, 1, 1, 4096), "coefficients": torch.tensor([[1.0, 0.0, 1.0, 0.0]])}
    std = _run(ops, case)[0].flatten()
    truth = torch.exp(logvar.double().clamp(*LOGVAR_RANGE) / 2)
    unit = torch.exp2(torch.floor(torch.log2(truth)) - 23)
    assert std[-1].isnan()
    assert ((std.double() - truth).abs() / unit)[:-1].max() <= 1.0


@pytest.mark.parametrize("shape", SHAPES)
def test_drawn_noise_is_that_of_the_definition(ops, shape):
    case = _case("mean_std", shape, count=4)
    for stream in (Stream.POSTERIOR, Stream.NOISE):
        expected = normals(SEED, Purpose.SAMPLE, stream, case["ids"], shape)
        assert (_drawn(ops, stream, case) - expected).abs().max() <= 2e-6


@pytest.mark.parametrize("kind", KINDS)
def test_drawing_is_giving_what_was_drawn(ops, kind):
    # Mirrored or not, in any layout: posterior noise belongs to the stored element, the other to the written one.
    for shape, patches in SHAPES.items():
        for patch, flip in itertools.product(patches, (True, False)):
            case = _case(kind, shape) | {"patch": patch} | ({} if flip else {"flip": None})
            own = {"noise": _drawn(ops, Stream.NOISE, case)}
            if kind.startswith("mean_"):
                own["posterior_noise"] = _drawn(ops, Stream.POSTERIOR, case)
            given = _run(ops, case | own)
            drawn = _run(ops, case | dict.fromkeys(own))
            assert all(torch.equal(one, other) for one, other in zip(given, drawn, strict=True)), (shape, patch, flip)


def test_instruction_sets_give_equal_bits(cpu_ops):
    case = _case("mean_logvar", (4, 32, 32), torch.float16) | {"noise": None, "posterior_noise": None, "patch": 2}
    best, results = cpu_ops.cpu_level(), []
    for level in range(best + 1):
        cpu_ops.cpu_level(level)
        results.append(_run(cpu_ops, case | {"dtype": torch.bfloat16}))
    cpu_ops.cpu_level(best)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_emulated_kernels_and_twins_give_equal_bits(cpu_ops, emulated_ops):
    for kind, (shape, patches) in itertools.product(KINDS, SHAPES.items()):
        case = _case(kind, shape) | {"noise": None, "posterior_noise": None, "patch": patches[-1]}
        for one, other in zip(_run(cpu_ops, case), _run(emulated_ops, case), strict=True):
            assert torch.equal(one, other), (kind, shape)


def test_odd_addresses(ops):
    case = _case("mean_std", (4, 8, 8), torch.bfloat16)
    shifted = {name: _shifted(case[name]) for name in ("latents", "noise", "posterior_noise")}
    for one, other in zip(_run(ops, case), _run(ops, case | shifted), strict=True):
        assert torch.equal(one, other)


def _shifted(tensor: Tensor) -> Tensor:
    """The same numbers, contiguous, at an address that no pack of four allows."""
    copy = tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape)
    return copy.copy_(tensor)


def test_number_formats_at_their_ends(ops):
    # Ties, the largest finite number, overflow, subnormals, infinities, NaN, through x_t = 1 x0 + 0 eps.
    exact = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    odd = torch.tensor([65519.0, 65520.0, 3.4e38, 2.0**-24, 2.0**-25, 2.0**-25 * 1.01, 6e-8, 1e-40, 0.0])
    near = torch.cat((exact.view(torch.float16).float(), exact.view(torch.bfloat16).float()))
    near = torch.cat((near, near * (1 + 2.0**-11), near * (1 + 2.0**-9), odd))
    near = torch.nn.functional.pad(torch.cat((near, -near)), (0, -2 * near.numel() % 8))
    shape = (1, 8, near.numel() // 8)
    case = _case("sample", shape, count=1) | dict.fromkeys(("index", "t_index", "scale", "shift", "flip"))
    case |= {"coefficients": torch.tensor([[1.0, 0.0, 1.0, 0.0]]), "noise": torch.zeros(1, *shape)}
    for dtype in STORED:
        latents = near.view(1, *shape)
        written = _run(ops, case | {"latents": latents, "dtype": dtype})[0]
        assert torch.equal(written.nan_to_num(7.0, 9.0, -9.0), latents.to(dtype).nan_to_num(7.0, 9.0, -9.0))
        assert torch.equal(written.isnan(), latents.isnan())
        read = _run(ops, case | {"latents": latents.to(dtype)})[1]
        assert torch.equal(read.nan_to_num(7.0), latents.to(dtype).float().nan_to_num(7.0))


def test_threads_change_nothing(cpu_ops):
    case = _case("mean_std", (4, 32, 32), count=3) | {"noise": None, "posterior_noise": None}
    for name in ("t_index", "index", "flip", "ids"):
        case[name] = case[name].repeat(12)
    threads, results = torch.get_num_threads(), []
    for number in (1, 2):
        torch.set_num_threads(number)
        results.append(_run(cpu_ops, case))
    torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize(("name", "rows"), [("index", 6), ("t_index", 11)])
@pytest.mark.parametrize("row", [-1, None, 1 << 40])
def test_rows_out_of_range_are_named(cpu_ops, name, rows, row):
    row = rows if row is None else row
    case = _case("sample", (4, 8, 8)) | {name: torch.tensor([0, row, 1])}
    with pytest.raises(RuntimeError, match=rf"q_sample: {name} must be in \[0, {rows}\), got {row}"):
        _run(cpu_ops, case)


@pytest.mark.parametrize("shape", [(4, 8, 8), (3, 5, 7)])
@pytest.mark.parametrize(("name", "rows"), [("index", 6), ("t_index", 11)])
def test_on_a_gpu_rows_out_of_range_make_that_image_nan(emulated_ops, shape, name, rows):
    for row, kind, patch in itertools.product((-1, rows, 1 << 40), KINDS, (0, 1)):
        good = _case(kind, shape) | {"patch": patch}
        bad = good | {name: torch.tensor([int(good[name][0]), row, int(good[name][2])])}
        for one, other in zip(_run(emulated_ops, bad), _run(emulated_ops, good), strict=True):
            assert one[1].isnan().all()
            assert torch.equal(one[[0, 2]], other[[0, 2]])


def test_bad_arguments_are_named(cpu_ops):
    case = _case("mean_std", (4, 8, 8))
    for changed, message in (
        ({"latents": case["latents"].double()}, "latents must be Float, BFloat16 or Half, got Double"),
        ({"kind": "pixels", "posterior_noise": None}, "latents must be Byte, got Float"),
        ({"latents": case["latents"][:, :7].contiguous()}, "latents must have 2304 elements, got 2688"),
        ({"t_index": case["t_index"].int()}, "t_index must be Long, got Int"),
        ({"scale": torch.ones(3)}, "scale must have 4 elements, got 3"),
        ({"noise": case["noise"].transpose(2, 3)}, "noise must be contiguous"),
        ({"t_index": None}, "coefficients must have 12 elements, got 44"),
        ({"dtype": torch.float64}, "x_t must be Float, BFloat16 or Half, got Double"),
    ):
        with pytest.raises(RuntimeError, match=f"q_sample: {message}"):
            _run(cpu_ops, case | changed)


def test_no_image_is_no_work(ops):
    case = _case("sample", (4, 8, 8), count=0)
    assert all(out.numel() == 0 for out in _run(ops, case))
