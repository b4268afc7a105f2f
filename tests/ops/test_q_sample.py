"""q_sample: noisy input and target, against a float64 formula written out here."""

import math

import numpy as np
import pytest
import torch

from erd_fast.ops import q_sample
from erd_fast.random import Purpose, Stream, normals

COUNT, CHANNELS, HEIGHT, WIDTH, ROWS = 5, 3, 4, 6, 11
SHAPE = (COUNT, CHANNELS, HEIGHT, WIDTH)
KINDS = ("sample", "mean_std", "mean_logvar", "pixels")
ROUND32 = 2.0**-24  # largest relative error of one float32 rounding


def _latents(kind: str, dtype: torch.dtype = torch.float32, count: int = COUNT) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (count, CHANNELS, HEIGHT, WIDTH)
    if kind == "pixels":
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    mean = torch.randn(shape, generator=generator)
    if kind == "sample":
        return mean.to(dtype)
    spread = (
        torch.rand(shape, generator=generator) if kind == "mean_std" else 3 * torch.randn(shape, generator=generator)
    )
    if kind == "mean_logvar":
        spread[0, 0, 0, :2] = torch.tensor([-100.0, 100.0])  # beyond the clamp
    return torch.cat((mean, spread), dim=1).to(dtype)


def _given() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        "coefficients": torch.randn(ROWS, 4, generator=generator),
        "t_index": torch.tensor([3, 0, 10, 7, 3]),
        "scale": torch.tensor([0.18, 1.5, -2.0]),
        "shift": torch.tensor([0.1, -0.7, 2.0]),
        "flip": torch.tensor([True, False, False, True, True]),
        "noise": torch.randn(SHAPE, generator=generator),
        "posterior_noise": torch.randn(SHAPE, generator=generator),
    }


def _expected(kind: str, latents: torch.Tensor, given: dict[str, torch.Tensor]):
    """x_t, target and the size of the terms each is summed from, image by image in float64."""
    fields = {name: value.double().numpy() for name, value in given.items()}
    x_t, target, x_size, y_size = (np.empty(SHAPE) for _ in range(4))
    for image in range(COUNT):
        row = latents[image].double().numpy()
        draw = fields["posterior_noise"][image]
        if kind == "pixels":
            z, spread = row / 127.5 - 1.0, np.zeros_like(row)
            size = row / 127.5 + 1.0
        elif kind == "sample":
            z, size = row, np.abs(row)
        else:
            mean, spread = row[:CHANNELS], row[CHANNELS:]
            std = spread if kind == "mean_std" else np.sqrt(np.exp(np.minimum(np.maximum(spread, -30), 20)))
            z, size = mean + std * draw, np.abs(mean) + np.abs(std * draw)
        scale, shift = (fields[name].reshape(-1, 1, 1) for name in ("scale", "shift"))
        x0, size = (z - shift) * scale, (size + np.abs(shift)) * np.abs(scale)
        if given["flip"][image]:
            x0, size = x0[:, :, ::-1], size[:, :, ::-1]
        alpha, sigma, c_x, c_eps = fields["coefficients"][given["t_index"][image]]
        eps = fields["noise"][image]
        x_t[image], x_size[image] = alpha * x0 + sigma * eps, abs(alpha) * size + np.abs(sigma * eps)
        target[image], y_size[image] = c_x * x0 + c_eps * eps, abs(c_x) * size + np.abs(c_eps * eps)
    return x_t, target, x_size, y_size


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("pixels", torch.uint8),
        *[(kind, dtype) for kind in KINDS[:3] for dtype in (torch.float32, torch.bfloat16, torch.float16)],
    ],
)
def test_formula_in_float64(kind, dtype):
    latents, given = _latents(kind, dtype), _given()
    found = q_sample(latents, kind=kind, **given)
    x_t, target, x_size, y_size = _expected(kind, latents, given)
    # A term meets at most 8 roundings on its way: posterior product and sum, shift, scale, coefficient, last sum,
    # and two for a float32 exp or the division of a pixel. Each costs ROUND32 of the sizes summed.
    assert (np.abs(found.x_t.double().numpy() - x_t) <= 8 * ROUND32 * x_size).all()
    assert (np.abs(found.target.double().numpy() - target) <= 8 * ROUND32 * y_size).all()
    assert found.x_t.dtype == found.target.dtype == torch.float32


@pytest.mark.parametrize("absent", ["scale", "shift", "flip"])
def test_absent_scale_shift_and_flip_change_nothing(absent):
    neutral = {
        "scale": torch.ones(CHANNELS),
        "shift": torch.zeros(CHANNELS),
        "flip": torch.zeros(COUNT, dtype=torch.bool),
    }
    given = _given()
    with_neutral = q_sample(_latents("sample"), **{**given, absent: neutral[absent]})
    given.pop(absent)
    without = q_sample(_latents("sample"), **given)
    assert torch.equal(without.x_t, with_neutral.x_t) and torch.equal(without.target, with_neutral.target)


def test_pixel_ends_are_exactly_minus_one_and_one():
    latents = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
    clean = torch.tensor([[1.0, 0.0, 1.0, 0.0]]).expand(2, 4)  # x_t = target = x0
    found = q_sample(latents, clean, kind="pixels", noise=torch.full((2, 1, 1, 1), 9.0))
    assert found.x_t.flatten().tolist() == found.target.flatten().tolist() == [-1.0, 1.0]


def test_flip_mirrors_the_image_and_not_the_noise():
    latents, noise = _latents("sample"), _given()["noise"]
    flip = torch.tensor([True, False, True, False, False])
    only_x = torch.tensor([[1.0, 0.0, 0.0, 1.0]]).expand(COUNT, 4)  # x_t = x0, target = eps
    found = q_sample(latents, only_x, noise=noise, flip=flip)
    for image in range(COUNT):
        columns = range(WIDTH - 1, -1, -1) if flip[image] else range(WIDTH)
        assert torch.equal(found.x_t[image], latents[image][..., list(columns)])
    assert torch.equal(found.target, noise)


def test_drawn_noise_is_that_of_the_ids():
    ids = torch.tensor([9, 0, 1 << 40, 3, 4])
    pure_noise = torch.tensor([[0.0, 1.0, 0.0, 1.0]]).expand(COUNT, 4)
    found = q_sample(_latents("sample"), pure_noise, ids=ids, seed=5)
    assert torch.equal(found.x_t, normals(5, Purpose.TRAIN, Stream.NOISE, ids, SHAPE[1:]))
    assert torch.equal(found.target, found.x_t)


@pytest.mark.parametrize("kind", KINDS)
def test_drawing_equals_giving_the_same_normals(kind):
    ids, given, latents = torch.arange(20, 20 + COUNT), _given(), _latents(kind)
    key = {"ids": ids, "seed": 1 << 63, "purpose": Purpose.EVAL}
    streams = {"noise": Stream.NOISE, "posterior_noise": Stream.POSTERIOR}
    for name, stream in streams.items():
        given[name] = normals(1 << 63, Purpose.EVAL, stream, ids, SHAPE[1:])
    explicit = q_sample(latents, kind=kind, **given)
    for drawn in (("noise",), ("posterior_noise",), ("noise", "posterior_noise")):
        rest = {name: value for name, value in given.items() if name not in drawn}
        found = q_sample(latents, kind=kind, **rest, **key)
        assert torch.equal(found.x_t, explicit.x_t) and torch.equal(found.target, explicit.target)


def test_posterior_and_diffusion_noise_are_different_numbers():
    latents = torch.cat((torch.zeros(SHAPE), torch.ones(SHAPE)), dim=1)  # z = n
    apart = torch.tensor([[1.0, 0.0, 0.0, 1.0]]).expand(COUNT, 4)  # x_t = n, target = eps
    found = q_sample(latents, apart, kind="mean_std", ids=torch.arange(COUNT), seed=0)
    assert not (found.x_t == found.target).any()


@pytest.mark.parametrize("integer", [torch.int64, torch.int32])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resident_data_set_gives_what_gathered_rows_give(kind, integer):
    resident, index = _latents(kind, count=9), torch.tensor([8, 0, 4, 4, 2])
    given = _given()
    gathered = q_sample(resident[index], kind=kind, **given)
    given["t_index"] = given["t_index"].to(integer)
    found = q_sample(resident, kind=kind, index=index.to(integer), **given)
    assert torch.equal(found.x_t, gathered.x_t) and torch.equal(found.target, gathered.target)


def test_rows_by_sample_equal_rows_by_timestep():
    given = _given()
    by_timestep = q_sample(_latents("sample"), **given)
    given["coefficients"] = given["coefficients"][given.pop("t_index")]
    by_sample = q_sample(_latents("sample"), **given)
    assert torch.equal(by_sample.x_t, by_timestep.x_t) and torch.equal(by_sample.target, by_timestep.target)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_x_t_is_rounded_once_and_the_target_never(dtype):
    exact, found = (
        q_sample(_latents("sample"), **_given()),
        q_sample(_latents("sample"), **_given(), dtype=dtype),
    )
    assert found.x_t.dtype == dtype and torch.equal(found.x_t, exact.x_t.to(dtype))
    assert found.target.dtype == torch.float32 and torch.equal(found.target, exact.target)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_the_same_in_any_batch_and_at_any_position(kind):
    latents, ids, given = _latents(kind), torch.arange(COUNT) + (1 << 33), _given()
    rows = ("t_index", "flip")
    shared = {name: given[name] for name in ("coefficients", "scale", "shift")}

    def of(part: torch.Tensor):
        chosen = {name: given[name][part] for name in rows}
        return q_sample(latents[part], kind=kind, **chosen, **shared, ids=ids[part], seed=3)

    whole = of(torch.arange(COUNT))
    for part in (torch.tensor([2]), torch.tensor([4, 1]), torch.tensor([3, 0, 2, 4, 1])):
        assert torch.equal(of(part).x_t, whole.x_t[part]) and torch.equal(of(part).target, whole.target[part])


def test_inputs_may_be_non_contiguous_and_stay_as_they_were():
    latents, given = _latents("sample"), _given()
    strided = latents.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    kept = {name: value.clone() for name, value in given.items()}
    assert torch.equal(q_sample(strided, **given).x_t, q_sample(latents, **given).x_t)
    assert torch.equal(strided, latents) and all(torch.equal(given[name], kept[name]) for name in kept)


def test_logvar_is_clamped_where_the_autoencoder_clamps():
    def std(logvar: float) -> float:
        latents = torch.tensor([0.0, logvar]).view(1, 2, 1, 1)
        one, clean = torch.ones(1, 1, 1, 1), torch.tensor([[1.0, 0.0, 0.0, 0.0]])
        return q_sample(latents, clean, kind="mean_logvar", noise=one, posterior_noise=one).x_t.item()

    for logvar, clamped in ((-100.0, -30.0), (-30.0, -30.0), (0.0, 0.0), (20.0, 20.0), (1e4, 20.0)):
        assert std(logvar) == pytest.approx(math.exp(clamped / 2), rel=4 * ROUND32)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "mean"}, "kind: given 'mean', allowed sample, mean_std, mean_logvar, pixels"),
        (
            {"latents": torch.zeros(CHANNELS, HEIGHT, WIDTH)},
            r"latents: given shape \(3, 4, 6\), allowed \(M, C, H, W\)",
        ),
        ({"kind": "pixels"}, "latents: given torch.float32 for kind 'pixels'; uint8 goes with pixels alone"),
        ({"latents": torch.zeros(SHAPE, dtype=torch.uint8)}, "latents: given torch.uint8 for kind 'sample'"),
        ({"kind": "mean_std"}, "latents: given 3 channels, allowed an even number for 'mean_std'"),
        (
            {"t_index": torch.zeros(4, dtype=torch.int64)},
            r"t_index: given shape \(4,\), allowed \(5,\)",
        ),
        (
            {"t_index": None},
            r"coefficients: given shape \(11, 4\), allowed \(5, 4\), or \(K, 4\) with t_index",
        ),
        ({"coefficients": torch.zeros(ROWS, 3)}, r"coefficients: given shape \(11, 3\), allowed \(K, 4\)"),
        ({"coefficients": torch.zeros(())}, r"coefficients: given shape \(\), allowed \(K, 4\)"),
        ({"coefficients": torch.zeros(ROWS, 4).long()}, "coefficients: given torch.int64, allowed torch.float32"),
        ({"coefficients": torch.full((ROWS, 4), math.nan)}, "coefficients: given .* in row 0, allowed finite numbers"),
        ({"coefficients": torch.eye(ROWS, 4) / 0.0}, "coefficients: given .*inf.* in row 0, allowed finite numbers"),
        ({"t_index": torch.tensor([0, 1, 2, 3, ROWS])}, "t_index: given 11, allowed 0 to 10"),
        ({"t_index": torch.tensor([0, 1, -1, 3, 4])}, "t_index: given -1, allowed 0 to 10"),
        ({"t_index": torch.zeros(5)}, "t_index: given torch.float32, allowed torch.int64"),
        ({"index": torch.zeros(4, dtype=torch.int64)}, r"t_index: given shape \(5,\), allowed \(4,\)"),
        ({"index": torch.tensor([0, 1, 2, 3, 1 << 40])}, "index: given 1099511627776, allowed 0 to "),
        ({"index": torch.zeros(0, dtype=torch.int64)}, "latents: given 0 images, allowed 1 or more"),
        ({"flip": torch.zeros(5)}, "flip: given torch.float32, allowed torch.bool"),
        (
            {"scale": torch.ones(CHANNELS, device="meta")},
            "scale must be on cpu as the other tensors, got meta",
        ),
        (
            {"coefficients": torch.ones(ROWS, 4, device="meta")},
            "coefficients must be on cpu as the other tensors, got meta",
        ),
        ({"noise": None}, "noise is not given, so ids and seed are needed"),
        ({"noise": None, "seed": 1}, "ids and seed are needed"),
        ({"noise": None, "ids": torch.arange(COUNT)}, "ids and seed are needed"),
    ],
)
def test_wrong_arguments_say_what_is_allowed(wrong, message):
    good = {"latents": _latents("sample"), **_given()}
    with pytest.raises(ValueError, match=message):
        q_sample(**{**good, **wrong})


@pytest.mark.parametrize(
    "wrong",
    [
        {"noise": torch.zeros(1, CHANNELS, HEIGHT, WIDTH)},
        {"noise": torch.zeros(CHANNELS, HEIGHT, WIDTH)},
        {"noise": None, "ids": torch.arange(1), "seed": 0},
        {"flip": torch.ones(1, dtype=torch.bool)},
        {"scale": torch.ones(1)},
    ],
    ids=[
        "one noise for all",
        "noise without a batch",
        "one id for all",
        "one flip for all",
        "one scale for all",
    ],
)
def test_one_row_is_not_silently_shared_by_the_batch(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)) if "ids" not in wrong else "ids"):
        q_sample(**{"latents": _latents("sample"), **_given(), **wrong})


def test_a_table_that_was_finite_is_looked_at_again_when_it_changes():
    latents, given = _latents("sample"), _given()
    table = given["coefficients"].clone()
    q_sample(latents, **(given | {"coefficients": table}))
    table[3, 1] = math.inf
    with pytest.raises(ValueError, match=r"coefficients: given .*inf.* in row 3, allowed finite numbers"):
        q_sample(latents, **(given | {"coefficients": table}))
    with torch.inference_mode():
        table = torch.full_like(table, math.nan)
        with pytest.raises(ValueError, match="in row 0, allowed finite numbers"):
            q_sample(latents, **(given | {"coefficients": table}))
