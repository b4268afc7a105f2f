"""kernels/draw.py in Triton's interpreter: the bits of erd_fast.ops.draw."""

from typing import Any

import pytest
import torch

from erd_fast.ops import Draw, draw
from erd_fast.random import Purpose, Stream, words
from support.triton_interpreter import Call, interpret

pytestmark = pytest.mark.slow

pytest.importorskip("triton")

SEED = 0xFEDCBA9876543210  # both key words have their top bit in play
BASE: dict[str, Any] = {
    "counter": 1000,
    "seed": SEED,
    "batch_size": 40,  # one full block and a part of the next
    "dataset_size": 1797,
    "num_timesteps": 1000,
    "label_drop": 0.1,
}


def _words(word: int, counter: int = 1000, count: int = 40) -> torch.Tensor:
    g = counter + torch.arange(count)
    return words(SEED, Purpose.TRAIN, Stream.SCALARS, g, torch.tensor([0]))[:, 0, word]


def _edge_table() -> torch.Tensor:
    """An entry at a word of the batch counts, one above it does not; here are both, and every third entry twice."""
    drawn = _words(0).sort().values
    entries = torch.cat((drawn[::2], drawn[1::2] + 1, drawn[::3]))
    return torch.cat((entries.sort().values, torch.tensor([1 << 32])))


def _table(length: int) -> torch.Tensor:
    steps = torch.randint(0, (1 << 33) // length, (length,), generator=torch.Generator().manual_seed(length))
    table = steps.cumsum(0).clamp(max=1 << 32)
    table[-1] = 1 << 32
    return table


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one image": {"batch_size": 1},
    "a full block": {"batch_size": 32},
    "offset, other purpose": {"offset": 77, "purpose": Purpose.EVAL, "seed": 1},
    "counter across 2**32": {"counter": (1 << 32) - 20, "seed": 0},
    "counter 2**61": {"counter": 1 << 61, "offset": 1 << 33},
    "one sample": {"dataset_size": 1},
    "long walks, many epochs": {"dataset_size": 5},
    "2**32 samples": {"dataset_size": 1 << 32, "counter": (1 << 33) - 7},
    "one timestep": {"num_timesteps": 1},
    "2**31 timesteps": {"num_timesteps": 1 << 31},
    "labels never drop": {"label_drop": 0.0},
    "labels always drop": {"label_drop": 1.0},
    "drop at a word": {"label_drop": int(_words(1)[7]) / 2**32},
    "drop above a word": {"label_drop": (int(_words(1)[7]) + 1) / 2**32},
    "table of one": {"t_table": torch.tensor([1 << 32])},
    "table of two": {"t_table": torch.tensor([1 << 31, 1 << 32])},
    "table with empty steps": {"t_table": torch.tensor([0, 0, 1 << 30, 1 << 30, 3 << 30, 1 << 32, 1 << 32])},
    "table at the words": {"t_table": _edge_table()},
    "table of 1023": {"t_table": _table(1023)},
    "table of 1024": {"t_table": _table(1024)},
    "table of 65536": {"t_table": _table(65536)},
    "one stratum": {"strata": 1},
    "strata across batches": {"strata": 5},
    "strata, a large counter": {"strata": 48, "counter": (1 << 61) + 5},
    "strata and table": {"strata": 1000, "t_table": _table(1000)},
    "2**31 strata": {"strata": 1 << 31, "counter": (1 << 40) - 9},
}


def _how(name: str) -> dict[str, Any]:
    how = {**BASE, **CASES[name]}
    if "t_table" in how:
        how["num_timesteps"] = len(how["t_table"])
    return how


def _expected(name: str) -> Draw:
    how = _how(name)
    return draw(torch.tensor(how.pop("counter")), **how)


def _call(name: str) -> Call:
    how, expected = _how(name), _expected(name)
    seed = how["seed"]
    return Call(
        "draw",
        (
            torch.tensor(how["counter"]),
            seed - (1 << 64) if seed >= 1 << 63 else seed,
            how["dataset_size"],
            how["num_timesteps"],
            round(how["label_drop"] * 2**32),
            how.get("offset", 0),
            int(how.get("purpose", Purpose.TRAIN)),
            how.get("t_table"),
            how.get("strata", 0),
            *(torch.full_like(field, -1) for field in expected[:3]),
            *(~field for field in expected[3:]),  # wrong until written
        ),
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, tuple[Any, ...]]:
    calls = {name: _call(name) for name in CASES}
    first = calls["plain"].arguments
    calls["below 0"] = Call(
        "draw",
        (torch.tensor(-3), *(value.clone() if isinstance(value, torch.Tensor) else value for value in first[1:])),
    )
    found = interpret(list(calls.values()), tmp_path_factory.mktemp("draw"))
    return dict(zip(calls, found, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_bits_are_those_of_the_definition(results, case):
    counter, *outputs = results[case][0], *results[case][-5:]
    for name, found, expected in zip(Draw._fields, outputs, _expected(case), strict=True):
        assert torch.equal(found, expected), name
    assert counter == _how(case)["counter"]


def test_images_below_0_have_no_row_and_others_are_as_ever(results):
    ids, sample_index, t_index, *_ = results["below 0"][-5:]
    how = {**BASE, "counter": torch.tensor(0)}
    right = draw(how.pop("counter"), **how)
    assert torch.equal(ids, torch.arange(-3, len(ids) - 3))
    for found, expected in ((sample_index, right.sample_index), (t_index, right.t_index)):
        assert torch.equal(found[:3], torch.tensor([-1, -1, -1])) and torch.equal(found[3:], expected[:-3])


def test_the_cases_reach_what_they_are_named_for():
    assert _expected("drop above a word").label_drop[7] and not _expected("drop at a word").label_drop[7]
    assert _expected("strata across batches").t_index[:5].mul(5).div(1000).int().unique().numel() == 5
    assert _expected("table at the words").t_index.unique().numel() > 20
