"""grad_norm: one number over many tensors."""

import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from erd_fast.ops import grad_norm
from erd_fast.ops.tensor_table import CHUNK, Column, Slot, TensorTable

SIZES = (1, 7, CHUNK - 1, CHUNK, CHUNK + 1, 20_000)


def _gradients(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator).to(dtype) for size in SIZES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_it_is_the_root_of_the_sum_of_squares(dtype):
    gradients = _gradients(dtype=dtype)
    truth = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    # A sum of n positive terms in any order is off by at most n eps / 2 of itself, by the square root of n on average;
    # its root by half as much.
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    found = grad_norm(gradients)
    assert found.shape == () and float(found) == pytest.approx(truth, rel=eps * math.sqrt(CHUNK))
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(found, grad_norm(gradients))


def test_dtypes_and_layouts_may_be_mixed():
    one, two, three = torch.randn(5, 3), torch.randn(7).bfloat16(), torch.randn(2, 3, 4, 4).half()
    three = three.to(memory_format=torch.channels_last)
    truth = math.sqrt(sum(float(g.double().square().sum()) for g in (one, two, three)))
    assert float(grad_norm([one, two, three])) == pytest.approx(truth, rel=1e-6)


@given(st.lists(st.integers(0, 3 * CHUNK), min_size=1, max_size=6))
@settings(max_examples=25, deadline=None)
def test_chunks_cover_every_element_once(sizes):
    table = TensorTable(torch.device("cpu"))
    table.update([Slot(torch.empty(size)) for size in sizes])
    assert table.rows[:, Column.NUMEL].tolist() == sizes
    covered = [(row, number * CHUNK + i) for row, number in table.places.tolist() for i in (0, CHUNK - 1)]
    assert len(set(covered)) == len(covered)
    counts = torch.bincount(table.places[:, 0], minlength=len(sizes)).tolist()
    assert counts == [-(-size // CHUNK) for size in sizes]


def test_a_table_changes_in_place_while_the_sizes_do_not():
    table, first, second = TensorTable(torch.device("cpu")), torch.zeros(5), torch.zeros(5)
    table.update([Slot(first)])
    address = table.rows.data_ptr()
    table.update([Slot(second)])
    assert table.rows.data_ptr() == address and table.rows[0, Column.GRADIENT] == second.data_ptr()
    table.update([Slot(second), Slot(first)])
    assert table.rows.shape == (2, 12) and table.places.tolist() == [[0, 0], [1, 0]]


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", range(len(SIZES)))
def test_what_is_not_finite_comes_through(bad, where):
    gradients = _gradients()
    gradients[where][-1] = bad
    assert not grad_norm(gradients).isfinite()


@pytest.mark.parametrize("gradients", [[], [torch.zeros(0)], [torch.zeros(0, 3), torch.zeros(2, 0)]])
def test_no_gradients_have_norm_0(gradients):
    assert grad_norm(gradients) == 0


def test_holes_and_several_devices_are_refused():
    with pytest.raises(ValueError, match=r"grad_norm: gradients\[1\]: given strides \(2,\) of shape \(3,\)"):
        grad_norm([torch.zeros(2), torch.zeros(6)[::2]])
    with pytest.raises(ValueError, match=r"gradients\[1\] must be on cpu as gradients\[0\], got meta"):
        grad_norm([torch.zeros(2), torch.zeros(2, device="meta")])


@pytest.mark.parametrize(
    "other",
    [
        lambda g: g.view(torch.bfloat16)[:6],
        lambda g: g.view(torch.int32),
        lambda g: g.view(2, 3),
        lambda g: g.as_strided((6,), (0,)),
        lambda g: torch._neg_view(g),
        lambda g: g.to_sparse(),
        lambda g: None,
    ],
    ids=["dtype", "integers", "shape", "strides", "negative", "sparse", "none"],
)
def test_a_table_of_the_same_memory_in_another_form_is_refused(other):
    table, gradient = TensorTable(torch.device("cpu")), torch.ones(6)
    table.update([Slot(gradient)])
    assert grad_norm([gradient.view(6)], table) == grad_norm([gradient])
    with pytest.raises(ValueError, match="grad_norm: table must be that of these tensors, got one with other gradient"):
        grad_norm([other(gradient)], table)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (None, "a plain dense tensor, got NoneType"),
        (1.0, "a plain dense tensor, got float"),
        (torch.ones(2).to_sparse(), "a plain dense tensor, got torch.sparse_coo"),
        (torch.ones(2) > 0, "floating point, got torch.bool"),
        (torch.ones(2).int(), "floating point, got torch.int32"),
        (torch.ones(2) * 1j, "floating point, got torch.complex64"),
        (torch._neg_view(torch.ones(2)), "a tensor without the negative bit"),
        ((torch.ones(2) * 1j).conj().imag[:1], "a tensor without the negative bit"),
    ],
)
def test_gradients_that_a_kernel_cannot_read_are_refused_by_name(bad, message):
    with pytest.raises(ValueError, match=rf"grad_norm: gradients\[0\] must be {message}"):
        grad_norm([bad, torch.ones(2)])


def test_tensors_without_memory_are_refused():
    with pytest.raises(ValueError, match=r"grad_norm: gradients\[0\] must have memory"):
        grad_norm([torch._efficientzerotensor(4)])


def test_a_table_of_another_device_is_refused():
    with pytest.raises(ValueError, match=r"gradients\[0\] must be on meta as the table, got cpu"):
        TensorTable(torch.device("meta")).update([Slot(torch.zeros(2))])


def test_a_table_keeps_no_gradient():
    table, gradient = TensorTable(torch.device("cpu")), torch.zeros(5)
    table.update([Slot(gradient)])
    gone = weakref.ref(gradient)
    del gradient
    assert gone() is None


def test_functorch_transforms_run_the_reference():
    x = torch.arange(12.0).view(3, 4)
    assert torch.allclose(torch.vmap(lambda row: grad_norm([row, row]))(x), (2 * x.square().sum(1)).sqrt())
    assert torch.allclose(torch.func.grad(lambda row: grad_norm([row]))(x), x / x.norm())
    table = TensorTable(torch.device("cpu"))
    table.update([Slot(x)])
    assert torch.allclose(torch.vmap(lambda row: grad_norm([row], table))(x), x.norm(dim=1))


def test_gradients_that_require_a_gradient_have_one():
    x = torch.arange(4.0, requires_grad=True)
    grad_norm([x]).backward()
    assert torch.allclose(x.grad, x.detach() / x.detach().norm())
