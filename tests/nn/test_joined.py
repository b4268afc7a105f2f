"""Linear layers as one product: same numbers, same gradients, wherever their parameters lie."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from erd_fast.nn.joined import join, joined_linear
from support.parity import no_worse


class Noted(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def layers() -> list[nn.Linear]:
    return [nn.Linear(8, rows) for rows in (12, 12, 4)]


def results(joined: list[nn.Linear], x: Tensor) -> list[Tensor]:
    output = joined_linear(x, joined)
    parameters = [parameter for layer in joined for parameter in layer.parameters()]
    return [output, *torch.autograd.grad(output.square().sum(), [x, *parameters])]


def separately(apart: list[nn.Linear], x: Tensor) -> list[Tensor]:
    output = torch.cat([layer(x) for layer in apart], dim=-1)
    parameters = [parameter for layer in apart for parameter in layer.parameters()]
    return [output, *torch.autograd.grad(output.square().sum(), [x, *parameters])]


def held(found: list[Tensor], some: list[nn.Linear], x: Tensor) -> None:
    """No further from float64 than twice layer by layer."""
    plain = separately(copy.deepcopy(some), x)
    truth = separately([layer.double() for layer in copy.deepcopy(some)], x.detach().double().requires_grad_())
    no_worse(found, plain, truth)


@pytest.mark.parametrize("joined", [True, False])
def test_one_product_is_all_of_them(joined):
    torch.manual_seed(0)
    some, x = layers(), torch.randn(5, 8, requires_grad=True)
    if joined:
        join(some)
    held(results(some, x), some, x)
    held(separately(some, x), some, x)


def test_joined_weights_are_one_matrix_without_a_copy():
    some, x = layers(), torch.randn(5, 8)
    before = [layer.weight.clone() for layer in some]
    join(some)
    place = some[0].weight.data_ptr()
    join(some)  # a second time moves nothing
    assert some[0].weight.data_ptr() == place
    for layer, weight in zip(some, before, strict=True):
        assert torch.equal(layer.weight, weight) and layer.weight.data_ptr() == place
        place += 4 * weight.numel()
    with torch.no_grad():
        some[1].weight.zero_()
        some[1].bias.zero_()
    assert joined_linear(x, some)[:, 12:24].abs().max() == 0  # so what is multiplied is the parameters themselves
    with Noted() as mode:
        joined_linear(x, some)
    assert mode.seen and not any("cat" in name for name in mode.seen)


def test_gradients_are_parts_of_one():
    some, x = layers(), torch.randn(5, 8)
    join(some)
    joined_linear(x, some).sum().backward()
    place = some[0].weight.grad.data_ptr()
    for layer in some:
        assert layer.weight.grad.data_ptr() == place
        place += 4 * layer.weight.numel()


def test_copies_and_moved_parts_give_the_same():
    torch.manual_seed(0)
    some, x = layers(), torch.randn(5, 8, requires_grad=True)
    join(some)
    held(results(copy.deepcopy(some), x), some, x)
    some[1].weight.data = some[1].weight.data.clone()
    held(results(some, x), some, x)
