"""linear_gelu and gelu_mlp: values and every gradient against PyTorch in float64, on every backend that is here."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from erd_fast.ops import OPS, explain, gelu_mlp, linear_gelu, use_backend
from erd_fast.ops.linear_gelu import gelu_mlp_reference, linear_gelu_reference
from support.parity import errors, gradients, hold, no_worse

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FORMS = ("tanh", "none")
OP = OPS["linear_gelu"]
HERE = [name for name in OP.backends if OP.why_not(name) is None]
SIZES = (((2, 33), 24, 40, 16), ((7,), 5, 9, 3), ((2, 3, 4), 16, 8, 24), ((), 1, 1, 1))
MLP = ("dx", "dweight", "dbias", "dnext_weight", "dnext_bias")


@pytest.fixture(params=HERE)
def backend(request) -> Iterator[str]:
    with use_backend(linear_gelu=request.param):
        yield request.param


def drawn(seed: int, dtype: torch.dtype = torch.float32, size: Any = SIZES[0], mlp: bool = True) -> list[Tensor]:
    """Leaves of an MLP (x, weight, bias, next_weight, next_bias) or of its first layer, and their output's gradient."""
    rows, inputs, hidden, outputs = size
    shapes = [(*rows, inputs), (hidden, inputs), (hidden,)]
    shapes += [(outputs, hidden), (outputs,), (*rows, outputs)] if mlp else [(*rows, hidden)]
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    tensors[1] *= inputs**-0.5
    return [tensor.to(DEVICE, dtype).requires_grad_(tensor is not tensors[-1]) for tensor in tensors]


def plain_layer(x: Tensor, weight: Tensor, bias: Tensor, approximate: str) -> Tensor:
    return F.gelu(F.linear(x, weight, bias), approximate=approximate)


def plain(*leaves: Tensor, approximate: str = "tanh") -> Tensor:
    return F.linear(plain_layer(*leaves[:3], approximate), *leaves[3:])


def refuses(backend: str, size: Any, approximate: str) -> bool:
    return backend == "cuda" and (approximate == "none" or size[1] % 8 > 0 or size[2] % 8 > 0)


@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_an_mlp_and_its_gradients_are_pytorchs(backend, size, dtype, approximate):
    if refuses(backend, size, approximate):
        pytest.skip("not for this backend")
    for recompute in (True, False):
        hold(
            lambda *given, recompute=recompute: gradients(
                lambda *leaves: [gelu_mlp(*leaves, approximate=approximate, recompute=recompute)],
                given[:-1],
                given[-1:],
            ),
            lambda *given: gradients(lambda *leaves: [plain(*leaves, approximate=approximate)], given[:-1], given[-1:]),
            lambda seed: drawn(seed, dtype, size),
            ("y", *MLP),
        )


@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_layer_and_its_gradients_are_pytorchs(backend, size, dtype, approximate):
    if refuses(backend, size, approximate):
        pytest.skip("not for this backend")
    hold(
        lambda *given: gradients(
            lambda *leaves: [linear_gelu(*leaves, approximate=approximate)], given[:-1], given[-1:]
        ),
        lambda *given: gradients(lambda *leaves: [plain_layer(*leaves, approximate)], given[:-1], given[-1:]),
        lambda seed: drawn(seed, dtype, size, mlp=False),
        ("activation", *MLP[:3]),
    )


@pytest.mark.parametrize("approximate", FORMS)
def test_the_definition_is_the_formula(approximate):
    *leaves, _ = (tensor.detach().double() for tensor in drawn(0))
    z = leaves[0] @ leaves[1].T + leaves[2]
    inner = (2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)
    activation = z / 2 * (1 + (inner.tanh() if approximate == "tanh" else (z * 0.5**0.5).erf()))
    found = linear_gelu_reference(*leaves[:3], approximate=approximate)
    # float64 sums of 24 and 40 products in another order, and some ten roundings of GELU's formula.
    assert errors(found, activation)[0] <= (24 + 10) * 2.0**-52
    found = gelu_mlp_reference(*leaves, approximate=approximate)
    assert errors(found, activation @ leaves[3].T + leaves[4])[0] <= (24 + 10 + 40) * 2.0**-52
    for dtype in FLOATS:
        *leaves, _ = drawn(0, dtype)
        assert linear_gelu_reference(*leaves[:3], approximate=approximate).dtype == dtype
        assert gelu_mlp_reference(*leaves, approximate=approximate).dtype == dtype


def test_keeping_and_computing_again_give_the_same_bits(backend):
    *leaves, dy = drawn(0)
    kept, again, automatic = (
        gradients(lambda *given, how=how: [gelu_mlp(*given, recompute=how)], leaves, [dy])
        for how in (False, True, None)
    )
    names = ("y", *MLP)
    for name, one, other, third in zip(names, kept, again, automatic, strict=True):
        # cuBLASLt has GELU of z before z is rounded, and its own tanh.
        if backend == "cuda" and name == "dnext_weight":
            wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
            no_worse([one], [other], [gradients(lambda *given: [plain(*given)], wide, [dy.double()])[4]])
        else:
            assert torch.equal(one, other), name
        assert torch.equal(third, again[names.index(name)] if DEVICE.type == "cuda" else one), name


def test_inputs_in_any_layout_count_the_same(backend):
    *leaves, dy = drawn(0)
    expected = gradients(lambda *given: [gelu_mlp(*given)], leaves, [dy])
    turned = [leaf.detach().mT.contiguous().mT if leaf.dim() > 1 else leaf.detach() for leaf in leaves]
    turned = [leaf.requires_grad_() for leaf in turned]
    found = gradients(lambda *given: [gelu_mlp(*given)], turned, [dy.mT.contiguous().mT])
    assert not turned[0].is_contiguous() and not turned[1].is_contiguous()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    layer = gradients(lambda *given: [linear_gelu(*given)], leaves[:3], [torch.ones(*dy.shape[:-1], 40, device=DEVICE)])
    wide = torch.ones((), device=DEVICE).expand(*dy.shape[:-1], 40)
    again = gradients(lambda *given: [linear_gelu(*given)], turned[:3], [wide])
    assert all(torch.equal(one, other) for one, other in zip(layer, again, strict=True))


@pytest.mark.parametrize("trained", [*itertools.combinations(range(5), 1), (0, 1, 2), (3, 4), (0, 3)], ids=str)
def test_only_what_is_trained_has_a_gradient(backend, trained):
    *leaves, dy = drawn(0)
    expected = gradients(lambda *given: [gelu_mlp(*given)], leaves, [dy])[1:]
    for place, leaf in enumerate(leaves):
        leaf.requires_grad_(place in trained)
    gelu_mlp(*leaves).backward(dy)
    for place, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == (place in trained)
        assert leaf.grad is None or torch.equal(leaf.grad, expected[place])
    if trained[0] < 3:
        kept = [leaf.grad for leaf in leaves]
        layer = drawn(0, mlp=False)
        whole = gradients(lambda *given: [linear_gelu(*given)], layer[:-1], layer[-1:])[1:]
        for place, leaf in enumerate(layer[:-1]):
            leaf.requires_grad_(place in trained)
        linear_gelu(*layer[:-1]).backward(layer[-1])
        for place, leaf in enumerate(layer[:-1]):
            assert (leaf.grad is None) == (kept[place] is None)
            assert leaf.grad is None or torch.equal(leaf.grad, whole[place])


@pytest.mark.parametrize("recompute", [True, False])
def test_what_is_kept_is_x_as_given_and_the_preactivation(recompute):
    *leaves, dy = drawn(0)
    leaves[0] = leaves[0] * 1.0
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = gelu_mlp(*leaves, recompute=recompute)
    assert kept[0].shape == leaves[0].shape and kept[0].data_ptr() == leaves[0].data_ptr()
    rows = dy.shape[0] * dy.shape[1]
    assert [tuple(tensor.shape) for tensor in kept[3:]] == [(rows, 40)] * (1 if recompute else 2)
    wide = [leaf.detach().double() for leaf in leaves[:3]]
    no_worse([kept[3]], [F.linear(*leaves[:3]).view(rows, 40)], [F.linear(*wide).view(rows, 40)])
    y.backward(dy)
    with torch.no_grad():
        assert torch.equal(gelu_mlp(*leaves), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_all_of_them(backend, dtype):
    leaves = drawn(0)[:-1]
    cast = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
    for call, count in ((gelu_mlp, 5), (linear_gelu, 3)):
        with torch.autocast(DEVICE.type, dtype):
            found = call(*leaves[:count])
        expected = call(*cast[:count])
        assert found.dtype == dtype and torch.equal(found, expected)
        grads = [torch.autograd.grad(value, given[:count], torch.ones_like(value)) for value, given in
                 ((found, leaves), (expected, cast))]  # fmt: skip
        for one, other in zip(*grads, strict=True):
            assert one.dtype == torch.float32 and torch.equal(one, other.float())


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # torch's own, at the first use
@pytest.mark.parametrize("approximate", FORMS)
def test_transforms_differentiate_the_definition(approximate):
    leaves = [tensor.detach() for tensor in drawn(0)[:-1]]
    directions = [torch.randn_like(leaf) for leaf in leaves]
    cases = (
        (lambda *given: gelu_mlp(*given, approximate=approximate), gelu_mlp_reference, 5),
        (lambda *given: linear_gelu(*given, approximate=approximate), linear_gelu_reference, 3),
    )
    for call, reference, count in cases:

        def definition(*given: Tensor, reference: Any = reference) -> Tensor:
            return reference(*given, approximate=approximate)

        primals, tangents = tuple(leaves[:count]), tuple(directions[:count])
        found, expected = (torch.func.jvp(one, primals, tangents) for one in (call, definition))
        assert all(map(torch.equal, found, expected))
        with torch.autograd.forward_ad.dual_level():
            dual = call(*map(torch.autograd.forward_ad.make_dual, primals, tangents))
            assert torch.equal(torch.autograd.forward_ad.unpack_dual(dual).tangent, expected[1])
        found, expected = (
            torch.func.vmap(torch.func.jacrev(one), in_dims=(0, *[None] * (count - 1)))(primals[0][0], *primals[1:])
            for one in (call, definition)
        )
        assert torch.equal(found, expected)


def test_second_derivatives_are_refused(backend):
    leaves = drawn(0)[:-1]
    for name, call, count in (("gelu_mlp", gelu_mlp, 5), ("linear_gelu", linear_gelu, 3)):
        y = call(*leaves[:count])
        with pytest.raises(RuntimeError, match=f"{name}: double backward"):
            torch.autograd.grad(y.sum(), leaves[:count], create_graph=True)


@pytest.mark.parametrize("approximate", FORMS)
def test_compiled_in_one_graph_it_gives_the_same(approximate):
    leaves = drawn(0)[:-1]
    for call, count in ((gelu_mlp, 5), (linear_gelu, 3)):

        def layer(*given: Tensor, call: Any = call) -> Tensor:
            return call(*given, approximate=approximate) * 2.0

        given = leaves[:count]
        out = torch.randn_like(layer(*given))
        found, expected = (
            gradients(lambda *some, one=one: [one(*some)], given, [out])
            for one in (torch.compile(layer, fullgraph=True, backend="aot_eager"), layer)
        )
        reference = gelu_mlp_reference if call is gelu_mlp else linear_gelu_reference
        wide = [leaf.detach().double().requires_grad_() for leaf in given]
        how = {"approximate": approximate}
        truth = gradients(lambda *some, r=reference, h=how: [2.0 * r(*some, **h)], wide, [out.double()])
        no_worse(found, expected, truth)


def test_compiled_under_autocast():
    *leaves, dy = drawn(0)

    def call(*given: Tensor) -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return gelu_mlp(*given)

    found, expected = (
        gradients(lambda *given, one=one: [one(*given)], leaves, [dy])
        for one in (torch.compile(call, fullgraph=True, backend="aot_eager"), call)
    )
    assert [one.dtype for one in found] == [other.dtype for other in expected]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth = gradients(lambda *given: [gelu_mlp_reference(*given)], wide, [dy.double()])
    no_worse([one.bfloat16() for one in found], expected, truth)  # what was computed in bfloat16 is held as such


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of copies that the check makes
@pytest.mark.parametrize("approximate", FORMS)
def test_torch_accepts_the_ops(approximate):
    x, weight, bias, next_weight, _, dy = drawn(0)
    flat = (x.detach().view(-1, 24).requires_grad_(), weight, bias, approximate, "reference")
    torch.library.opcheck(torch.ops.erd_fast.linear_gelu_fwd.default, flat)
    pre = torch.randn(66, 40, device=DEVICE)
    given = (dy.view(-1, 16), next_weight.detach(), pre, approximate)
    torch.library.opcheck(torch.ops.erd_fast.linear_gelu_bwd.default, (*given, True, "reference"))
    torch.library.opcheck(
        torch.ops.erd_fast.linear_gelu_bwd.default, (torch.randn_like(pre), None, *given[2:], False, "reference")
    )


def test_shapes_without_numbers():
    *leaves, dy = drawn(0)
    meta = [leaf.detach().to("meta").requires_grad_() for leaf in leaves]
    found = gradients(lambda *given: [gelu_mlp(*given)], meta, [dy.to("meta")])
    assert [value.shape for value in found] == [dy.shape, *(leaf.shape for leaf in leaves)]
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(leaf) for leaf in leaves]
        assert gelu_mlp(*fake).shape == dy.shape and linear_gelu(*fake[:3]).shape == (2, 33, 40)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": torch.zeros(3, 5)}, r"x: given shape \(3, 5\), allowed \(\.\.\., 24\) with one row or more"),
        ({"x": torch.zeros(0, 24)}, r"x: given shape \(0, 24\), allowed"),
        ({"x": torch.zeros(())}, r"x: given shape \(\), allowed"),
        ({"x": torch.zeros(3, 24).double()}, "x: given torch.float64, allowed torch.float32"),
        ({"x": torch.zeros(3, 24).long()}, "x: given torch.int64, allowed torch.float32"),
        ({"x": torch.zeros(3, 24, device="meta")}, "weight must be on meta as the other tensors, got .*"),
        ({"weight": torch.zeros(24)}, r"weight: given shape \(24,\), allowed \(H, K\)"),
        ({"weight": torch.zeros(0, 24)}, r"weight: given shape \(0, 24\), allowed \(H, K\)"),
        ({"weight": torch.zeros(40, 24).half()}, "weight: given torch.float16, allowed torch.float32"),
        ({"bias": torch.zeros(41)}, r"bias: given shape \(41,\), allowed \(40,\)"),
        ({"bias": torch.zeros(40).bfloat16()}, "bias: given torch.bfloat16, allowed torch.float32"),
        ({"approximate": "erf"}, "approximate: given 'erf', allowed 'tanh' or 'none'"),
    ],
)
def test_wrong_arguments_say_what_is_allowed(wrong, message):
    names = ("x", "weight", "bias", "next_weight", "next_bias")
    right = dict(zip(names, (leaf.detach().cpu() for leaf in drawn(0)), strict=False))
    with pytest.raises(ValueError, match=f"gelu_mlp: {message}"):
        gelu_mlp(**{**right, **wrong})
    with pytest.raises(ValueError, match=f"linear_gelu: {message}"):
        linear_gelu(**{name: value for name, value in {**right, **wrong}.items() if not name.startswith("next")})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"next_weight": torch.zeros(16, 41)}, r"next_weight: given shape \(16, 41\), allowed \(D, 40\)"),
        ({"next_weight": torch.zeros(0, 40)}, r"next_weight: given shape \(0, 40\), allowed \(D, 40\)"),
        ({"next_weight": torch.zeros(16, 40).half()}, "next_weight: given torch.float16, allowed torch.float32"),
        ({"next_bias": torch.zeros(15)}, r"next_bias: given shape \(15,\), allowed \(16,\)"),
        ({"next_bias": torch.zeros(16, device="meta")}, "next_bias must be on cpu as the other tensors, got meta"),
    ],
)
def test_wrong_arguments_of_the_next_layer_say_what_is_allowed(wrong, message):
    names = ("x", "weight", "bias", "next_weight", "next_bias")
    right = dict(zip(names, (leaf.detach().cpu() for leaf in drawn(0)), strict=False))
    with pytest.raises(ValueError, match=f"gelu_mlp: {message}"):
        gelu_mlp(**{**right, **wrong})


def test_cuda_says_what_its_epilogues_cannot_take():
    x, weight, bias = (leaf.detach() for leaf in drawn(0, torch.bfloat16)[:3])
    x = x.view(-1, 24)
    rule = OP.backends["cuda"].rule

    def against(*args):
        return rule(**dict(zip(OP.forward.names, args, strict=True)))

    assert against(x, weight, bias, "tanh") is None
    assert "only in its tanh form" in against(x, weight, bias, "none")
    assert "multiple of 8 numbers, and one here has 20" in against(x[:, :20], weight[:, :20], bias, "tanh")
    assert "multiple of 8 numbers, and one here has 39" in against(x, weight[:39], bias[:39], "tanh")
    assert "16 bytes" in against(torch.zeros(49, dtype=x.dtype)[1:].view(2, 24), weight, bias, "tanh")
    wide = [value.float() for value in (x, weight, bias)]
    assert against(*wide, "tanh") is None
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert "TF32" in against(*wide, "tanh") and against(x, weight, bias, "tanh") is None
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_explain_names_the_backend():
    *leaves, _ = drawn(0)
    assert explain("linear_gelu", *leaves[:3]).startswith("linear_gelu takes ")


def test_it_is_timed_where_a_run_probes():
    assert OP.timed
