"""kernels/q_sample.py in Triton's interpreter against erd_fast.ops.q_sample."""

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from erd_fast.latents import KINDS, LOGVAR_RANGE
from erd_fast.ops import QSample, q_sample
from erd_fast.random import Purpose, Stream, normals
from support.triton_interpreter import ROUNDING, UNIT, Call, interpret, patchify

pytestmark = pytest.mark.slow

pytest.importorskip("triton")


SEED = 0xFEDCBA9876543210
TIMESTEPS, STORED = 10, 5
DRAWN = 2e-6  # bound on the difference of two backends' normals


@dataclass(frozen=True)
class Case:
    kind: str
    size: tuple[int, int, int] = (4, 8, 8)
    dtype: torch.dtype = torch.float32
    patch: int = 0
    flips: bool = False
    given: bool = False  # both noises
    stored: torch.dtype = torch.float32
    bare: bool = False  # no t_index, index, scale, shift
    purpose: Purpose = Purpose.TRAIN
    count: int = 3

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.size))
        parts = [self.kind, sizes, f"{self.dtype}"[6:], f"patch {self.patch}" if self.patch else "image"]
        parts += [name for name in ("flips", "given", "bare") if getattr(self, name)]
        return " ".join([*parts, f"{self.stored}"[6:], self.purpose.name.lower()])


FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CASES = [
    *(Case(*how) for how in itertools.product(KINDS, [(4, 8, 8)], FLOATS, (0, 2), (False, True))),
    # A width that is no multiple of four: groups of normals straddle rows, and their mirror images are no groups.
    *(Case(kind, (3, 5, 7), flips=flips) for kind in KINDS for flips in (False, True)),
    *(Case(kind, patch=patch, flips=True, given=True) for kind in KINDS for patch in (0, 2)),
    *(Case(kind, (3, 5, 7), flips=True, given=True) for kind in KINDS),
    *(Case(kind, stored=stored) for kind in KINDS[:3] for stored in FLOATS[1:]),
    *(Case(kind, patch=patch, bare=True) for kind in KINDS for patch in (0, 2)),
    Case("mean_std", bare=True, flips=True, purpose=Purpose.EVAL),
    # Several blocks an image: elements in order, and boxes of rows.
    Case("mean_std", (4, 32, 32), torch.bfloat16, 0, True, stored=torch.float16, count=2),
    Case("mean_std", (4, 32, 32), torch.bfloat16, 2, True, stored=torch.float16, count=2),
    Case("pixels", (3, 32, 24), torch.float16, 4, True, count=2),  # boxes wider and deeper than the image
    Case("mean_std", (5, 20, 12), torch.float32, 4, True, count=2),  # the last box has rows too many
    Case("sample", (4, 8, 12), patch=2, count=2),  # all channels of the box, but not all columns
    Case("sample", (2, 4, 8), patch=1),
    Case("mean_std", (3, 6, 10), patch=2, flips=True),  # no box: no width of four
    Case("mean_std", (2, 6, 12), patch=3, flips=True),  # no box: no power of two
    Case("sample", (1, 8, 2048), patch=4, count=1),  # no box: too large
    Case("sample", (1, 1, 1), count=1),
]


def _arguments(case: Case) -> dict[str, Any]:
    """Arguments of :func:`q_sample`."""
    generator = torch.Generator().manual_seed(0)
    channels, height, width = case.size
    count = case.count
    rows = channels * (2 if case.kind.startswith("mean_") else 1)
    total = count if case.bare else STORED
    latents = torch.randn(total, rows, height, width, generator=generator)
    if case.kind == "mean_std":
        latents[:, channels:] = latents[:, channels:].abs() * 0.3
    elif case.kind == "mean_logvar":
        latents[:, channels:] = latents[:, channels:] * 12 - 5  # clamped at both ends
    if case.kind == "pixels":
        latents = torch.randint(0, 256, latents.shape, generator=generator, dtype=torch.uint8)
    else:
        latents = latents.to(case.stored)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def factors(*shape: int) -> Tensor:
        return 0.5 * normal(*shape).clamp(-1, 1)  # small enough that no x_t is beyond float16

    return {
        "latents": latents,
        "coefficients": factors(count if case.bare else TIMESTEPS, 4),
        "t_index": None if case.bare else torch.tensor([7, 0, TIMESTEPS - 1])[:count],
        "index": None if case.bare else torch.tensor([STORED - 1, 2, 0])[:count],
        "kind": case.kind,
        "scale": None if case.bare else factors(channels),
        "shift": None if case.bare else normal(channels),
        "flip": torch.tensor([True, False, True])[:count] if case.flips else None,
        "ids": None if case.given else torch.tensor([(1 << 32) - 1, 3, 1 << 40])[:count],
        "seed": None if case.given else SEED,
        "purpose": case.purpose,
        "noise": normal(count, *case.size) if case.given else None,
        "posterior_noise": normal(count, *case.size) if case.given else None,
        "dtype": case.dtype,
    }


def _call(case: Case, **changes: Any) -> Call:
    a = _arguments(case) | changes
    (channels, height, width), patch = case.size, case.patch
    tokens = (height * width // patch**2, patch**2 * channels) if patch else case.size
    names = ("latents", "coefficients", "t_index", "index")
    return Call(
        "q_sample",
        (
            *(a[name] for name in names),
            KINDS.index(case.kind),
            *(a[name] for name in ("scale", "shift", "flip", "ids")),
            SEED - (1 << 64),
            int(a["purpose"]),
            *(a[name] for name in ("noise", "posterior_noise")),
            patch,
            torch.full((case.count, *tokens), torch.nan, dtype=case.dtype),
            torch.full((case.count, *case.size), torch.nan),
        ),
    )


def _bounds(case: Case, a: dict[str, Any]) -> QSample:
    """Largest difference of two float32 evaluations, element by element, before x_t is rounded to its type.

    Of the stored value: each of four operations rounds once on each side, by UNIT of what it adds up. exp: 2**-22 of
    the hardware's exp2 and two roundings on one side, an ulp on the other. Then three more operations.
    """
    stored = a["latents"] if a["index"] is None else a["latents"][a["index"]]
    stored = stored.double()
    if case.kind.startswith("mean_"):
        mean, spread = stored.chunk(2, dim=1)
        std = spread if case.kind == "mean_std" else torch.exp(0.5 * spread.clamp(*LOGVAR_RANGE))
        n, apart = a["posterior_noise"], 0.0
        if n is None:
            n, apart = normals(SEED, case.purpose, Stream.POSTERIOR, a["ids"], case.size), DRAWN
        exponential = 8 * UNIT if case.kind == "mean_logvar" else 0.0
        size = mean.abs() + std * n.abs()
        error = std * (apart + exponential * n.abs())
    else:
        size = stored.abs() if case.kind == "sample" else torch.ones_like(stored)
        error = torch.zeros_like(stored)
    if a["shift"] is not None:
        size = size + a["shift"].abs()[:, None, None]
    error = error + 8 * UNIT * size
    if a["scale"] is not None:
        size, error = (value * a["scale"].abs()[:, None, None] for value in (size, error))
    if a["flip"] is not None:
        turn = a["flip"][:, None, None, None]
        size, error = (torch.where(turn, value.flip(-1), value) for value in (size, error))
    eps, apart = a["noise"], 0.0
    if eps is None:
        eps, apart = normals(SEED, case.purpose, Stream.NOISE, a["ids"], case.size), DRAWN
    rows = a["coefficients"] if a["t_index"] is None else a["coefficients"][a["t_index"]]
    alpha, sigma, c_x, c_eps = rows.abs().double()[:, :, None, None, None].unbind(1)
    return QSample(
        x_t=alpha * error + sigma * apart + 6 * UNIT * (alpha * size + sigma * eps.abs()),
        target=c_x * error + c_eps * apart + 6 * UNIT * (c_x * size + c_eps * eps.abs()),
    )


OUTSIDE = {"t_index": (-1, TIMESTEPS, 1 << 40), "index": (-1, STORED, -(1 << 40))}
OUTSIDE_CASES = [Case("mean_std", dtype=torch.float16), Case("pixels", dtype=torch.bfloat16, patch=2)]
NAN_CASE = Case("mean_logvar")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, tuple[Tensor, Tensor]]:
    calls = {str(case): _call(case) for case in CASES}
    for case in OUTSIDE_CASES:
        for name, values in OUTSIDE.items():
            for value in values:
                rows = _arguments(case)[name].clone()
                rows[1] = value
                calls[f"{case} {name} {value}"] = _call(case, **{name: rows})
    latents = _arguments(NAN_CASE)["latents"]
    latents[2, 5, 3, 3] = torch.nan  # spread of channel 1, in the row of image 1
    calls["nan"] = _call(NAN_CASE, latents=latents)
    found = interpret(list(calls.values()), tmp_path_factory.mktemp("q_sample"))
    return {name: arguments[-2:] for name, arguments in zip(calls, found, strict=True)}


def test_case_names_are_unique():
    assert len({str(case) for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_are_those_of_the_definition(results, case):
    x_t, target = results[str(case)]
    a = _arguments(case)
    expected, bound = q_sample(**{**a, "dtype": torch.float32}), _bounds(case, a)
    _within(target, expected.target, bound.target)
    relative, absolute = ROUNDING[case.dtype]
    truth, allowed = expected.x_t, bound.x_t + relative * expected.x_t.abs() + absolute
    if case.patch:
        truth, allowed = patchify(truth, case.patch), patchify(allowed, case.patch)
    _within(x_t, truth, allowed)


def _within(found: Tensor, truth: Tensor, allowed: Tensor) -> None:
    assert found.shape == truth.shape
    excess = (found.double() - truth.double()).abs() - allowed
    worst = int(excess.nan_to_num(nan=torch.inf).argmax())
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), found.shape))
    assert (excess <= 0).all(), f"at {place}: {found[place]}, should be {truth[place]} within {allowed[place]}"


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in OUTSIDE for value in OUTSIDE[name]])
@pytest.mark.parametrize("case", OUTSIDE_CASES, ids=str)
def test_a_row_out_of_range_makes_its_image_nan_and_no_other(results, case, name, value):
    for found, right in zip(results[f"{case} {name} {value}"], results[str(case)], strict=True):
        assert found[1].isnan().all()
        assert torch.equal(found[::2], right[::2])


def test_a_nan_spread_is_not_clamped_away(results):
    for found in results["nan"]:
        assert found.isnan().nonzero().tolist() == [[1, 1, 3, 3]]
