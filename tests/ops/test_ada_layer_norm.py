"""ada_layer_norm: every backend that is here against its definition, in values and in every gradient."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from erd_fast.ops import OPS, ada_layer_norm, use_backend
from erd_fast.ops.ada_layer_norm import ada_layer_norm_reference
from support.norm_inputs import DEVICE, modulation, tokens
from support.parity import gradients, hold

HERE = [name for name in OPS["ada_layer_norm"].backends if OPS["ada_layer_norm"].why_not(name) is None]
NAMES = ("y", "dx", "dshift", "dscale")
SHAPES = [(3, 63, 72), (2, 256, 384), (2, 258, 1152), (4, 1, 5), (1, 2, 1024)]
"""Odd sizes, a model's width with its tokens, U-ViT's tokens, the least, and a power of two."""


def plain(x: Tensor, shift: Tensor, scale: Tensor) -> list[Tensor]:
    """As models write it, in the dtype of x."""
    normal = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return [normal * (1 + scale.to(x.dtype)[:, None]) + shift.to(x.dtype)[:, None]]


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients_are_those_of_the_definition(backend, shape, dtype):
    def inputs(seed: int) -> list[Tensor]:
        return [tokens(seed, shape, dtype), *modulation(seed, 2, shape, dtype), tokens(seed + 9, shape, dtype, False)]

    def held(x: Tensor, shift: Tensor, scale: Tensor, dy: Tensor) -> list[Tensor | None]:
        with use_backend(backend):
            return gradients(lambda *given: [ada_layer_norm(*given)], (x, shift, scale), [dy])

    hold(held, lambda *given: gradients(plain, given[:3], given[3:]), inputs, NAMES)


@pytest.mark.parametrize("backend", HERE)
def test_an_affine_norm_is_that_of_pytorch(backend):
    """Weight and bias are shared by all samples; y in another dtype than x."""

    def inputs(seed: int) -> list[Tensor]:
        vectors = modulation(seed, 2, (1, 1, 72), torch.float32)
        affine = [vector[0].detach().requires_grad_() for vector in vectors]
        return [tokens(seed, (3, 63, 72), torch.float32), *affine, tokens(seed + 9, (3, 63, 72), torch.float32, False)]

    def held(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> list[Tensor | None]:
        def call(*given: Tensor) -> list[Tensor]:
            return [ada_layer_norm(given[0], weight=given[1], bias=given[2], eps=1e-5)]

        with use_backend(backend):
            return gradients(call, (x, weight, bias), [dy])

    def expected(*given: Tensor) -> list[Tensor | None]:
        return gradients(lambda x, w, b: [F.layer_norm(x, x.shape[-1:], w, b, eps=1e-5)], given[:3], given[3:])

    hold(held, expected, inputs, ("y", "dx", "dweight", "dbias"))


@pytest.mark.parametrize("backend", HERE)
def test_the_dtype_of_y_is_one_rounding_of_the_same(backend):
    x = tokens(0, (2, 9, 72), torch.float32)
    shift, scale = modulation(0, 2, (2, 9, 72), torch.float32)
    with use_backend(backend):
        y = ada_layer_norm(x, shift, scale)
        for dtype in (torch.bfloat16, torch.float16):
            assert torch.equal(ada_layer_norm(x, shift, scale, dtype=dtype), y.to(dtype))
        with torch.autocast(DEVICE.type, torch.bfloat16):
            assert torch.equal(ada_layer_norm(x, shift, scale), y.bfloat16())


@pytest.mark.parametrize("backend", HERE)
def test_a_part_that_is_left_out_does_nothing(backend):
    x = tokens(0, (2, 9, 72), torch.float32)
    shift, scale = modulation(0, 2, (2, 9, 72), torch.float32)
    zero = torch.zeros_like(shift)
    with use_backend(backend):
        assert torch.equal(ada_layer_norm(x), ada_layer_norm(x, zero, zero))
        assert torch.equal(ada_layer_norm(x, shift), ada_layer_norm(x, shift, zero))
        assert torch.equal(ada_layer_norm(x, None, scale), ada_layer_norm(x, zero, scale))
        assert torch.equal(ada_layer_norm(x, bias=shift[0]), ada_layer_norm(x, shift[:1].expand(2, -1), zero))


@pytest.mark.parametrize("backend", HERE)
def test_a_sample_depends_on_no_other_and_results_repeat(backend):
    x, dy = tokens(0, (5, 63, 72), torch.bfloat16), tokens(1, (5, 63, 72), torch.bfloat16, False)
    shift, scale = modulation(0, 2, (5, 63, 72), torch.bfloat16)
    with use_backend(backend):
        whole, again = (gradients(lambda *g: [ada_layer_norm(*g)], (x, shift, scale), [dy]) for _ in range(2))
        for value, repeated in zip(whole, again, strict=True):
            assert torch.equal(value, repeated)
        part = slice(2, 4)
        given = [value.detach()[part].requires_grad_() for value in (x, shift, scale)]
        some = gradients(lambda *g: [ada_layer_norm(*g)], given, [dy[part]])
    for value, expected in zip(some, whole, strict=True):
        assert torch.equal(value, expected[part])


def call(**other: object) -> Tensor:
    given: dict[str, object] = {"x": torch.randn(2, 3, 8), "shift": torch.randn(2, 8), "scale": torch.randn(2, 8)}
    return ada_layer_norm(**{**given, **other})


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"x": torch.randn(2, 0, 8)}, "x: given shape (2, 0, 8), allowed (N, T, D) with N and T of 1 or more"),
        ({"x": torch.randn(2, 8)}, "x: given shape (2, 8), allowed (N, T, D)"),
        ({"x": torch.empty(2, 1, 8193)}, "x: given shape (2, 1, 8193), allowed (N, T, D)"),
        ({"x": torch.randn(2, 3, 8).double()}, "x: given torch.float64, allowed torch.float32"),
        ({"shift": torch.randn(3, 8)}, "shift: given shape (3, 8), allowed (2, 8)"),
        ({"scale": torch.randn(2, 3, 8)}, "scale: given shape (2, 3, 8), allowed (2, 8)"),
        ({"scale": torch.randn(2, 8).bfloat16()}, "scale: given torch.bfloat16, allowed torch.float32"),
        (
            {"shift": torch.randn(2, 8, device="meta")},
            "shift must be on cpu as the other tensors, got meta",
        ),
        ({"weight": torch.ones(8)}, "weight must not be given together with shift"),
        ({"shift": None, "scale": None, "bias": torch.ones(9)}, "bias: given shape (9,), allowed (8,)"),
        ({"dtype": torch.float64}, "dtype: given torch.float64, allowed torch.float32"),
    ],
)
def test_mistakes_name_op_argument_given_and_allowed(other, message):
    with pytest.raises(ValueError, match=re.escape(f"ada_layer_norm: {message}")):
        call(**other)


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # torch.func.jvp's own
def test_transforms_take_the_definition_and_a_second_derivative_is_refused():
    x, direction = torch.randn(2, 2, 3, 8).unbind()
    shift, scale = torch.randn(2, 2, 8)

    def reference(x: Tensor) -> Tensor:
        return ada_layer_norm_reference(x, shift, scale, offset=1.0, eps=1e-6, dtype=x.dtype)

    def op(x: Tensor) -> Tensor:
        return ada_layer_norm(x, shift, scale)

    for found, expected in zip(*(torch.func.jvp(f, (x,), (direction,)) for f in (op, reference)), strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(torch.func.jacrev(op)(x), torch.func.jacrev(reference)(x))
    stacked = torch.stack((x, 2 * x))
    assert torch.equal(torch.func.vmap(op)(stacked), torch.func.vmap(reference)(stacked))
    leaf = x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="ada_layer_norm: double backward"):
        torch.autograd.grad(op(leaf).sum(), leaf, create_graph=True)


@pytest.mark.filterwarnings("ignore")  # of torch's own tests
def test_the_passes_are_those_of_torch_library():
    x = torch.randn(2, 3, 8).requires_grad_()
    shift, scale = torch.randn(2, 2, 8)
    forward = (x, shift, scale, 1.0, 1e-6, torch.bfloat16, "reference")
    torch.library.opcheck(torch.ops.erd_fast.ada_layer_norm_fwd.default, forward)
    backward = (torch.randn(2, 3, 8), x.detach(), scale, 1.0, *torch.rand(2, 2, 3, 1), "reference")
    torch.library.opcheck(torch.ops.erd_fast.ada_layer_norm_bwd.default, backward)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_it_compiles_into_one_graph_with_its_gradient():
    given = [tokens(0, (2, 9, 72), torch.float32), *modulation(0, 2, (2, 9, 72), torch.float32)]
    dy = tokens(1, (2, 9, 72), torch.float32, False)
    compiled = torch.compile(ada_layer_norm, fullgraph=True, backend="aot_eager")
    results = [gradients(lambda *g, f=f: [f(*g)], given, [dy]) for f in (ada_layer_norm, compiled)]
    for eager, traced in zip(*results, strict=True):
        assert torch.equal(eager, traced)
