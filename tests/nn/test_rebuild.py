"""Recipes in place of saved tensors."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

from erd_fast.nn.rebuild import rebuilt

CALLS: list[None] = []


def halved(x: Tensor) -> Tensor:
    CALLS.append(None)
    return (0.5 * x).detach()


def test_the_backward_pass_makes_the_tensor_again():
    CALLS.clear()
    x, weight = torch.randn(2, 3, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    kept = F.linear(0.5 * x, weight)
    y = 0.5 * x
    with rebuilt(y, lambda: halved(x)):
        out = F.linear(y, weight)
    y.untyped_storage().resize_(0)  # nobody needs what was in it any more
    del y
    assert not CALLS
    results = [torch.autograd.grad(value, (x, weight), torch.ones_like(value)) for value in (kept, out)]
    assert len(CALLS) == 1 and all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_other_tensors_are_kept():
    CALLS.clear()
    x, other = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    y = 0.5 * x
    with rebuilt(y, lambda: halved(x)), torch.no_grad():
        part = y[:2]
    with rebuilt(y, lambda: halved(x)):
        product = other * other.detach() * part.sum() + y.detach()[:2].sum() * other
    (gradient,) = torch.autograd.grad(product.sum(), other)
    assert not CALLS and gradient.isfinite().all()


def test_without_gradients_there_is_nothing_to_keep():
    with torch.no_grad(), rebuilt(torch.ones(3), lambda: pytest.fail("made again")):
        assert F.linear(torch.ones(3), torch.ones(2, 3)).tolist() == [3, 3]


def test_a_pass_without_backward_leaves_nothing_behind():
    """A node that saves its own output must not come to own itself."""
    alive: list[weakref.ref] = []
    for _ in range(3):
        x = torch.randn(3, 8, requires_grad=True)
        y = 0.5 * x
        with rebuilt(y, lambda x=x: halved(x)):
            out = y.exp()  # saves its output
        alive.append(weakref.ref(out))
        del x, y, out
    gc.collect()
    assert [reference() for reference in alive] == [None, None, None]


def test_tensors_without_memory_of_their_own_are_kept_as_ever():
    def loss(x: Tensor) -> Tensor:
        y = 0.5 * x
        with rebuilt(y, lambda: pytest.fail("made again")):
            return (y * y).sum()

    x = torch.randn(3)
    assert torch.equal(torch.func.grad(loss)(x), 0.5 * x)  # halves and doubles are exact
    pair = TwoTensor(x.clone().requires_grad_(), x.clone().requires_grad_())
    with rebuilt(pair, lambda: pytest.fail("made again")):
        squares = (pair * pair).sum()
    squares.backward()
