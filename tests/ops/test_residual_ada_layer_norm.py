"""residual_ada_layer_norm: every backend that is here against its definition, in values and in every gradient."""

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from erd_fast.ops import OPS, Branch, ada_layer_norm, residual_ada_layer_norm, use_backend
from erd_fast.ops.residual_ada_layer_norm import rebuild_normalized, residual_ada_layer_norm_reference
from support.norm_inputs import modulation, tokens
from support.parity import gradients, hold

OP = OPS["residual_ada_layer_norm"]
HERE = [name for name in OP.backends if OP.why_not(name) is None]
NAMES = ("x_out", "y", "dx", "dbranch", "dgate", "dshift", "dscale")
SHAPES = [(3, 63, 72), (2, 256, 384), (2, 258, 1152), (4, 1, 5)]
HALF = torch.bfloat16


def plain(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> list[Tensor]:
    """As models write it under autocast: in the dtype of x, and y in that of the branch."""
    x = x + gate.to(x.dtype)[:, None] * branch.to(x.dtype)
    normal = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    y = normal * (1 + scale.to(x.dtype)[:, None]) + shift.to(x.dtype)[:, None]
    return [x, y.to(branch.dtype)]


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("stream", "inner"),
    [(torch.float32, torch.float32), (torch.float32, HALF), (HALF, HALF), (torch.float32, torch.float16)],
    ids=["fp32", "fp32-bf16", "bf16", "fp32-fp16"],
)
def test_values_and_gradients_are_those_of_the_definition(backend, shape, stream, inner):
    def inputs(seed: int) -> list[Tensor]:
        douts = tokens(seed + 9, shape, stream, False), tokens(seed + 5, shape, inner, False)
        return [tokens(seed, shape, stream), tokens(seed + 3, shape, inner), *modulation(seed, 3, shape, inner), *douts]

    def held(*given: Tensor) -> list[Tensor | None]:
        def call(*args: Tensor) -> tuple[Tensor, Tensor]:
            return residual_ada_layer_norm(*args, dtype=inner)

        with use_backend(backend):
            return gradients(call, given[:5], given[5:])

    hold(held, lambda *given: gradients(plain, given[:5], given[5:]), inputs, NAMES)


@pytest.mark.parametrize("backend", HERE)
def test_without_gate_and_with_an_affine_norm_it_is_a_block_of_u_vit(backend):
    shape = (3, 63, 72)

    def inputs(seed: int) -> list[Tensor]:
        affine = [vector[0].detach().requires_grad_() for vector in modulation(seed, 2, (1, 1, 72), torch.float32)]
        streams = [tokens(seed + number, shape, torch.float32, number < 2) for number in range(4)]
        return [*streams[:2], *affine, *streams[2:]]

    def pytorch(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
        x = x + branch
        return [x, F.layer_norm(x, x.shape[-1:], weight, bias, eps=1e-5)]

    def held(*given: Tensor) -> list[Tensor | None]:
        def call(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            return residual_ada_layer_norm(x, branch, weight=weight, bias=bias, eps=1e-5)

        with use_backend(backend):
            return gradients(call, given[:4], given[4:])

    names = ("x_out", "y", "dx", "dbranch", "dweight", "dbias")
    hold(held, lambda *given: gradients(pytorch, given[:4], given[4:]), inputs, names)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("stream", [torch.float32, HALF])
def test_of_two_calls_one_keeps_its_stream(backend, gated, stream):
    """With ``source`` the second call's backward pass makes its x again, with the same bits, and x is not saved."""
    shape = (3, 63, 72)
    given = [tokens(0, shape, stream), tokens(1, shape, HALF), tokens(2, shape, HALF), *modulation(0, 6, shape, HALF)]
    douts = [tokens(3, shape, stream, False), tokens(4, shape, HALF, False), tokens(5, shape, HALF, False)]
    saved: list[int] = []

    def two(with_source: bool, x: Tensor, first: Tensor, second: Tensor, *vectors: Tensor) -> list[Tensor]:
        gate, shift, scale, gate_2, shift_2, scale_2 = vectors
        gates = (gate, gate_2) if gated else (None, None)
        x_1, y_1 = residual_ada_layer_norm(x, first, gates[0], shift, scale, dtype=HALF)
        source = Branch(x, first, gates[0]) if with_source else None

        def note(tensor: Tensor) -> Tensor:
            saved.append(tensor.data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            x_2, y_2 = residual_ada_layer_norm(x_1, second, gates[1], shift_2, scale_2, dtype=HALF, source=source)
        assert (x_1.data_ptr() in saved) == (not with_source)
        saved.clear()
        return [x_2, y_1, y_2]

    if not gated:
        given[3].requires_grad_(False)
        given[6].requires_grad_(False)
    with use_backend(backend):
        without, rebuilt = (gradients(lambda *g, w=w: two(w, *g), given, douts) for w in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(without, rebuilt, strict=True))


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("stream", [torch.float32, HALF])
def test_y_is_made_again_to_the_bit_and_is_that_of_the_rounded_stream(backend, stream):
    shape = (3, 63, 72)
    x, branch = tokens(0, shape, stream), tokens(1, shape, HALF)
    gate, shift, scale = modulation(0, 3, shape, HALF)
    with use_backend(backend):
        x_out, y = residual_ada_layer_norm(x, branch, gate, shift, scale, dtype=HALF)
        assert torch.equal(y, ada_layer_norm(x_out, shift, scale, dtype=HALF))
        again = rebuild_normalized(Branch(x, branch, gate), shift, scale, dtype=HALF)
    assert torch.equal(again, y) and not again.requires_grad


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("used", ["x_out", "y"])
def test_an_output_that_nobody_uses_has_no_gradient(backend, used):
    shape = (2, 9, 72)
    given = [tokens(0, shape, torch.float32), tokens(1, shape, torch.float32), *modulation(0, 3, shape, torch.float32)]
    dout = tokens(2, shape, torch.float32, False)
    place = ("x_out", "y").index(used)
    douts = [dout if number == place else torch.zeros_like(dout) for number in range(2)]
    with use_backend(backend):
        both = gradients(residual_ada_layer_norm, given, douts)[2:]
        alone = gradients(lambda *g: [residual_ada_layer_norm(*g)[place]], given, [dout])[1:]
    for value, expected in zip(alone, both, strict=True):
        assert torch.equal(value, expected)


def call(**other: object) -> tuple[Tensor, Tensor]:
    given: dict[str, object] = {"x": torch.randn(2, 3, 8), "branch": torch.randn(2, 3, 8), "gate": torch.randn(2, 8)}
    given |= {"shift": torch.randn(2, 8), "scale": torch.randn(2, 8)}
    return residual_ada_layer_norm(**{**given, **other})


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"branch": torch.randn(2, 4, 8)}, "branch: given shape (2, 4, 8), allowed (2, 3, 8)"),
        ({"branch": torch.randn(2, 3, 8).int()}, "branch: given torch.int32, allowed torch.float32"),
        ({"gate": torch.randn(8)}, "gate: given shape (8,), allowed (2, 8)"),
        ({"gate": torch.randn(2, 8).half()}, "gate: given torch.float16, allowed torch.float32"),
        (
            {"branch": torch.empty(2, 3, 8, device="meta")},
            "branch must be on cpu as the other tensors, got meta",
        ),
        ({"source": Branch(torch.randn(2, 3, 7), torch.randn(2, 3, 8), None)}, "source.x: given shape (2, 3, 7)"),
        ({"source": Branch(torch.randn(2, 3, 8), torch.randn(1, 1, 8), None)}, "source.branch: given shape (1, 1, 8)"),
        ({"source": Branch(*torch.randn(2, 2, 3, 8), torch.randn(8))}, "gate: given shape (8,), allowed (2, 8)"),
    ],
)
def test_mistakes_name_op_argument_given_and_allowed(other, message):
    with pytest.raises(ValueError, match=re.escape(f"residual_ada_layer_norm: {message}")):
        call(**other)


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # torch.func.jvp's own
def test_transforms_take_the_definition_and_a_second_derivative_is_refused():
    x, direction, branch = torch.randn(3, 2, 3, 8).unbind()
    gate, shift, scale = torch.randn(3, 2, 8)

    def reference(x: Tensor) -> Tensor:
        how = {"offset": 1.0, "eps": 1e-6, "dtype": x.dtype}
        return torch.cat(residual_ada_layer_norm_reference(x, branch, gate, shift, scale, **how))

    def op(x: Tensor) -> Tensor:
        return torch.cat(residual_ada_layer_norm(x, branch, gate, shift, scale))

    for found, expected in zip(*(torch.func.jvp(f, (x,), (direction,)) for f in (op, reference)), strict=True):
        assert torch.equal(found, expected)
    leaf = x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="residual_ada_layer_norm: double backward"):
        torch.autograd.grad(op(leaf).sum(), leaf, create_graph=True)


@pytest.mark.filterwarnings("ignore")  # of torch's own tests
@pytest.mark.parametrize("gated", [True, False])
def test_the_passes_are_those_of_torch_library(gated):
    x, branch, dx_out, dy = torch.randn(4, 2, 3, 8).unbind()
    gate, shift, scale = torch.randn(3, 2, 8).unbind()
    used = gate if gated else None
    forward = (
        x.requires_grad_(),
        branch,
        used,
        shift,
        scale,
        x.detach(),
        None,
        None,
        1.0,
        1e-6,
        HALF,
        True,
        "reference",
    )
    torch.library.opcheck(torch.ops.erd_fast.residual_ada_layer_norm_fwd.default, forward)
    statistics = torch.rand(2, 2, 3, 1)
    backward = (dx_out, dy, x.detach(), branch, used, branch, used, scale, 1.0, *statistics, "reference")
    torch.library.opcheck(torch.ops.erd_fast.residual_ada_layer_norm_bwd.default, backward)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_it_compiles_into_one_graph_with_its_gradient():
    shape = (2, 9, 72)
    given = [tokens(0, shape, torch.float32), tokens(1, shape, torch.float32), *modulation(0, 3, shape, torch.float32)]
    douts = [tokens(2, shape, torch.float32, False), tokens(3, shape, torch.float32, False)]
    compiled = torch.compile(residual_ada_layer_norm, fullgraph=True, backend="aot_eager")
    results = [gradients(lambda *g, f=f: f(*g), given, douts) for f in (residual_ada_layer_norm, compiled)]
    for eager, traced in zip(*results, strict=True):
        assert torch.equal(eager, traced)


@pytest.mark.parametrize("backend", HERE)
def test_sources_lie_in_memory_as_they_like(backend, monkeypatch):
    """Kernels get them side by side."""
    for direction in (OP.forward, OP.backward):
        body = direction.body

        def checked(body: Callable[..., tuple[Tensor, ...]] = body, **args: object) -> tuple[Tensor, ...]:
            assert all(it.is_contiguous() for it in args.values() if isinstance(it, Tensor) and it.dim() == 3)
            return body(**args)

        monkeypatch.setattr(direction, "body", checked)
    shape = (3, 63, 72)
    x, first, second = (tokens(seed, shape, torch.float32) for seed in range(3))
    gate, shift, scale, gate_2, shift_2, scale_2 = modulation(0, 6, shape, torch.float32)
    apart = [value.detach().transpose(0, 2).contiguous().transpose(0, 2) for value in (x, first)]
    turned = gate.detach().t().contiguous().t()
    with use_backend(backend):
        x_1, y_1 = residual_ada_layer_norm(x, first, gate, shift, scale)
        assert torch.equal(rebuild_normalized(Branch(*apart, turned), shift, scale, dtype=torch.float32), y_1)
        results = []
        for source in (None, Branch(*apart, turned)):
            leaf = x_1.detach().requires_grad_()
            outs = residual_ada_layer_norm(leaf, second, gate_2, shift_2, scale_2, source=source)
            results.append(torch.autograd.grad(outs[0].sum() + outs[1].square().sum(), (leaf, second, scale_2)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
