"""Initial parameters: a pure function of seed, name and element."""

import hashlib
import math

import pytest
import scipy.stats
import torch
from torch import nn

from erd_fast.nn import init
from erd_fast.nn.init import init_normal, init_uniform, init_xavier_uniform
from erd_fast.random import Purpose, Stream, box_muller, normals, unit_interval, words

RARE = 1e-6  # chance that a right generator misses a bound below


class _Holder(nn.Module):
    def __init__(self, **shapes: tuple[int, ...]):
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.full(shape, float("nan"))))


def _normal(shape: tuple[int, ...], seed: int = 0, name: str = "weight", std: float = 1.0) -> torch.Tensor:
    holder = _Holder(**{name: shape})
    init_normal(holder, name, seed, std)
    return holder.get_parameter(name).detach()


def _xavier(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    holder = _Holder(weight=shape)
    init_xavier_uniform(holder, "weight", seed)
    return holder.weight.detach()


def test_normals_are_those_of_the_hashed_name():
    g = int.from_bytes(hashlib.blake2b(b"weight", digest_size=8).digest(), "little") >> 1  # 63 bits: fits int64
    expected = normals(9, Purpose.INIT, Stream.SCALARS, torch.tensor([g]), (3, 7))[0]
    assert torch.equal(_normal((3, 7), seed=9), expected)
    assert torch.equal(_normal((3, 7), seed=9, std=0.5), expected * 0.5)


def test_large_parameters_have_no_seams(monkeypatch):
    shape = (61, 83)  # 5063 elements: the last block is cut
    whole = _normal(shape)
    monkeypatch.setattr(init, "_BLOCKS_AT_ONCE", 100)
    assert torch.equal(_normal(shape), whole)


def test_the_block_number_goes_on_past_one_part():
    count = 4 * init._BLOCKS_AT_ONCE + 6
    found = _normal((count,))
    g = torch.tensor([int.from_bytes(hashlib.blake2b(b"weight", digest_size=8).digest(), "little") >> 1])
    last = torch.tensor([init._BLOCKS_AT_ONCE, init._BLOCKS_AT_ONCE + 1])
    expected = box_muller(words(0, Purpose.INIT, Stream.SCALARS, g, last)).flatten()
    assert torch.equal(found[-6:], expected[:6])


def test_names_and_seeds_give_unrelated_numbers():
    one = _normal((100, 100))
    assert torch.equal(_normal((100, 100)), one)
    for other in (
        _normal((100, 100), name="bias"),
        _normal((100, 100), seed=1),
        _normal((100, 100), seed=1 << 32),
    ):
        # The mean of 10,000 products of independent standard normals.
        assert abs((one * other).mean()) <= scipy.stats.norm.isf(RARE / 2) / 100


def test_order_of_initialisation_does_not_matter():
    names = ("a", "b", "c")
    forward, backward = (_Holder(**dict.fromkeys(names, (5, 5))) for _ in range(2))
    for name in names:
        init_normal(forward, name, 0, 1.0)
    for name in reversed(names):
        init_normal(backward, name, 0, 1.0)
    assert all(torch.equal(forward.get_parameter(name), backward.get_parameter(name)) for name in names)


def test_the_generator_of_torch_is_not_used():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first = _normal((4, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(_normal((4, 4)), first)


def test_nested_names_reach_their_parameter():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    init_normal(model, "1.weight", 0, 1.0)
    g = int.from_bytes(hashlib.blake2b(b"1.weight", digest_size=8).digest(), "little") >> 1
    expected = normals(0, Purpose.INIT, Stream.SCALARS, torch.tensor([g]), (4, 4))[0]
    assert torch.equal(model[1].weight.detach(), expected)
    assert model[1].weight.requires_grad and model[1].weight.is_leaf


@pytest.mark.parametrize(
    ("shape", "fan_in", "fan_out"), [((200, 50), 50, 200), ((64, 4, 3, 3), 36, 64), ((1000, 3), 3, 1000)]
)
def test_xavier_is_uniform_up_to_the_bound_of_its_fans(shape, fan_in, fan_out):
    found = _xavier(shape).double().flatten()
    bound = math.sqrt(6 / (fan_in + fan_out))  # a uniform of variance bound^2 / 3
    assert found.abs().max() <= bound * (1 + 2.0**-23)
    assert scipy.stats.kstest(found.numpy(), "uniform", (-bound, 2 * bound)).pvalue >= RARE


def test_xavier_elements_are_the_uniforms_of_the_words():
    g = torch.tensor([int.from_bytes(hashlib.blake2b(b"weight", digest_size=8).digest(), "little") >> 1])
    u = unit_interval(words(3, Purpose.INIT, Stream.SCALARS, g, torch.arange(6))).flatten()[:21].double()
    expected = (2 * u - 1) * math.sqrt(6 / 10)
    # float32: a difference and a product, of terms up to 2.
    assert (_xavier((7, 3), seed=3).flatten() - expected).abs().max() <= 4 * 2.0**-24


def test_meta_parameters_stay_without_numbers():
    with torch.device("meta"):
        model = nn.Linear(3, 3)
    init_normal(model, "weight", 0, 1.0)
    init_uniform(model, "weight", 0, 1.0)
    init_xavier_uniform(model, "weight", 0)
    assert model.weight.is_meta


def test_uniforms_reach_their_bound_and_no_further():
    holder, other = _Holder(weight=(100, 100)), _Holder(weight=(100, 100))
    init_uniform(holder, "weight", 2, 0.25)
    init_xavier_uniform(other, "weight", 2)  # of the same words: bound sqrt(6 / 200)
    found = holder.weight.detach().double().flatten()
    assert scipy.stats.kstest(found.numpy(), "uniform", (-0.25, 0.5)).pvalue >= RARE
    assert found.abs().max() <= 0.25
    # Both scale one float32 uniform, by a rounded product each.
    same = other.weight.detach().double().flatten() * 0.25 / math.sqrt(6 / 200)
    assert (found - same).abs().max() <= 4 * 2.0**-24 * 0.25
