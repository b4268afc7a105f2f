"""attention: values and the gradient against PyTorch in float64 on every backend that is here, and who takes a call."""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from erd_fast.errors import BackendUnavailableError
from erd_fast.ops import OPS, Autotuner, attention, autotune, explain, record, use_backend
from erd_fast.ops.attention import attention_reference
from erd_fast.ops.core.autotune import signature
from erd_fast.ops.core.backend import External
from erd_fast.ops.external_attention import cudnn_is_late, cudnn_rule
from support.parity import errors, gradients, hold

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_CPU = pytest.mark.skipif(DEVICE.type == "cuda", reason="what a CPU takes")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
OP = OPS["attention"]
HERE = [name for name in OP.backends if OP.why_not(name) is None]
SIZES = ((2, 1, 1, 64), (2, 17, 3, 72), (3, 63, 2, 32), (2, 256, 1, 64), (2, 258, 2, 72))  # N, T, H, K


@pytest.fixture(params=HERE)
def backend(request) -> Iterator[str]:
    with use_backend(attention=request.param):
        yield request.param


def why_not(backend: str, qkv: Tensor, num_heads: int) -> Any:
    return OP.why_not(backend, {"qkv": qkv, "num_heads": num_heads})


def drawn(seed: int, dtype: torch.dtype = torch.float32, size: tuple[int, ...] = SIZES[1]) -> list[Tensor]:
    """qkv, which requires a gradient, and that of the output."""
    n, t, h, k = size
    generator = torch.Generator().manual_seed(seed)
    qkv, dout = (torch.randn(n, t, parts * h * k, generator=generator) for parts in (3, 1))
    return [qkv.to(DEVICE, dtype).requires_grad_(), dout.to(DEVICE, dtype)]


def plain(qkv: Tensor, num_heads: int) -> Tensor:
    n, t, row = qkv.shape
    q, k, v = qkv.view(n, t, 3, num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    weight = (q.shape[-1] ** -0.5 * q @ k.transpose(-1, -2)).softmax(-1)
    return (weight @ v).transpose(1, 2).reshape(n, t, row // 3)


def torchs_own(qkv: Tensor, num_heads: int) -> Tensor:
    n, t, row = qkv.shape
    q, k, v = qkv.view(n, t, 3, num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, row // 3)


def separate(found: list[Tensor | None]) -> list[Tensor]:
    """out, dq, dk and dv of [out, dqkv]."""
    out, dqkv = found
    assert out is not None and dqkv is not None
    return [out, *dqkv.chunk(3, -1)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", SIZES[1:], ids=str)
def test_values_and_gradients_are_pytorchs(backend, size, dtype):
    if reason := why_not(backend, drawn(0, dtype, size)[0], size[2]):
        pytest.skip(reason.reason)
    # Other projects answer for their own exponentials.
    rule = torchs_own if isinstance(OP.backends[backend], External) else plain
    hold(
        lambda qkv, dout: separate(gradients(lambda leaf: [attention(leaf, size[2])], [qkv], [dout])),
        lambda qkv, dout: separate(gradients(lambda leaf: [rule(leaf, size[2])], [qkv], [dout])),
        lambda seed: drawn(seed, dtype, size),
        ("out", "dq", "dk", "dv"),
    )
    with record() as recording:
        out = attention(drawn(0, dtype, size)[0], size[2])
    assert recording.names() == {"attention": backend} and out.is_contiguous() and out.dtype == dtype


def test_the_definition_is_the_formula():
    qkv = drawn(0)[0].detach().double().cpu()
    n, t, h, k = SIZES[1]
    parts = qkv.view(n, t, 3, h, k)
    expected = torch.empty(n, t, h, k, dtype=torch.float64)
    for sample in range(n):
        for head in range(h):
            q, key, v = (parts[sample, :, part, head] for part in range(3))
            weight = torch.exp(q @ key.T / k**0.5)
            expected[sample, :, head] = weight @ v / weight.sum(1, keepdim=True)
    # float64 sums of K and of T terms in another order, and some ten roundings besides.
    assert errors(attention_reference(qkv, h), expected.view(n, t, h * k))[0] <= (t + k + 10) * 2.0**-52


def test_one_token_is_its_own_value(backend):
    qkv, dout = drawn(0, size=SIZES[0])
    if why_not(backend, qkv, 1) is not None:
        pytest.skip("not for this backend")
    out = attention(qkv, 1)
    (dqkv,) = torch.autograd.grad(out, qkv, dout)
    assert torch.equal(out, qkv[..., 128:]) and torch.equal(dqkv[..., 128:], dout)
    # What is left of dout v - dout out: two float32 sums of the same 64 terms, times a factor of 1/8.
    assert dqkv[..., :128].abs().max() <= 64 * 2.0**-24 * float(dout.norm() * qkv.detach().norm() ** 2)


def test_large_scores_stay_finite_and_right(backend):
    """A float32 score of 1e4 is off by 1e4 x 2^-24 x sqrt(72) at most, and so is the logarithm of its weight."""
    qkv, dout = drawn(0)
    large = torch.cat((40.0 * qkv.detach()[..., : 2 * dout.shape[2]], qkv.detach()[..., 2 * dout.shape[2] :]), -1)
    if why_not(backend, large, 3) is not None:
        pytest.skip("not for this backend")
    found = gradients(lambda leaf: [attention(leaf, 3)], [large.requires_grad_()], [dout])
    wide = [large.detach().double().requires_grad_()]
    truths = gradients(lambda leaf: [attention_reference(leaf, 3)], wide, [dout.double()])
    for value, truth in zip(found, truths, strict=True):
        assert value.isfinite().all()
        assert (value.double() - truth).abs().max() <= 0.02 * truth.abs().max()


def test_the_same_call_gives_the_same_bits_and_a_sample_the_same_in_any_batch():
    for name in ("triton", "reference"):
        if name not in HERE:
            continue
        qkv, dout = drawn(0)
        with use_backend(attention=name):
            calls = [gradients(lambda leaf: [attention(leaf, 3)], [qkv], [dout]) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*calls, strict=True))


def test_other_layouts_are_taken():
    qkv, dout = drawn(0)
    wide = torch.cat((qkv, qkv), -1).detach()[..., : qkv.shape[2]].requires_grad_()
    assert not wide.is_contiguous()
    found, expected = (gradients(lambda leaf: [attention(leaf, 3)], [leaf], [dout]) for leaf in (wide, qkv))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    columns = dout.transpose(1, 2).contiguous().transpose(1, 2)
    with use_backend(attention="reference"):
        found = gradients(lambda leaf: [attention(leaf, 3)], [qkv], [columns])
        expected = gradients(lambda leaf: [attention(leaf, 3)], [qkv], [dout])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_autocast_chooses_the_dtype_and_leaves_softmax_alone(backend):
    qkv, _ = drawn(0)
    half = qkv.detach().to(torch.bfloat16)
    if why_not(backend, half, 3) is not None:
        pytest.skip("not for this backend")
    with torch.autocast(DEVICE.type, torch.bfloat16):
        out = attention(qkv, 3)
        out.sum().backward()
    assert out.dtype == torch.bfloat16 and qkv.grad.dtype == torch.float32
    assert torch.equal(out, attention(half, 3))


@pytest.mark.parametrize(
    ("qkv", "num_heads", "message"),
    [
        (torch.zeros(2, 24), 2, r"qkv: given shape \(2, 24\), allowed \(N, T, 3 D\)"),
        (torch.zeros(0, 4, 24), 2, r"qkv: given shape \(0, 4, 24\), allowed .* N and T of 1 or more"),
        (torch.zeros(2, 0, 24), 2, r"qkv: given shape \(2, 0, 24\), allowed"),
        (torch.zeros(2, 4, 21), 2, r"qkv: given shape \(2, 4, 21\), allowed .* D a multiple of the 2 heads"),
        (torch.zeros(2, 4, 16), 2, r"qkv: given shape \(2, 4, 16\), allowed"),
        (torch.zeros(2, 4, 24).double(), 2, "qkv: given torch.float64, allowed torch.float32, torch.bfloat16"),
        (torch.zeros(2, 4, 24), 0, "num_heads: given 0, allowed 1 or more"),
        (torch.zeros(2, 4, 24), -3, "num_heads: given -3, allowed 1 or more"),
    ],
)
def test_wrong_arguments_say_what_is_allowed(qkv, num_heads, message):
    with pytest.raises(ValueError, match=f"attention: {message}"):
        attention(qkv, num_heads)


@pytest.mark.filterwarnings("ignore")  # of torch's own tests
def test_the_passes_pass_the_checks_of_torch():
    for name in ("reference", *(["triton"] if "triton" in HERE else [])):
        qkv, dout = drawn(0)
        torch.library.opcheck(torch.ops.erd_fast.attention_fwd.default, (qkv, 3, name))
        out, lse = torch.ops.erd_fast.attention_fwd(qkv.detach(), 3, name)
        torch.library.opcheck(torch.ops.erd_fast.attention_bwd.default, (dout, qkv.detach(), out, lse, 3, name))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_graph_has_pytorchs_own_attention_or_what_was_asked_for():
    qkv, dout = drawn(0)
    graphs: list[str] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(attention, fullgraph=True, backend=keep)
    for choice, ours in (("", False), ("attention=reference", True), ("attention=flash", False)):
        with use_backend(choice):
            compiled(qkv.detach(), 3)
        assert ("scaled_dot_product_attention" in graphs[-1]) != ours and ("erd_fast" in graphs[-1]) == ours
    torch.compiler.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    found, expected = (gradients(lambda leaf, f=f: [f(leaf, 3)], [qkv], [dout]) for f in (compiled, torchs_own))
    for value, wanted in zip(found, expected, strict=True):
        assert (value - wanted).abs().max() <= 4 * torch.finfo(value.dtype).eps * wanted.abs().max()


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # torch.func.jvp's own; its category changes with the version
def test_functorch_and_forward_mode_are_those_of_the_reference():
    (qkv, _), (direction, _) = drawn(0), drawn(1)
    qkv, direction = qkv.detach(), direction.detach()

    def size(function: Any, leaf: Tensor) -> Tensor:
        return function(leaf, 3).square().sum()

    for transform in (torch.func.grad, torch.func.jacrev):
        found, expected = (transform(lambda leaf, f=f: size(f, leaf))(qkv) for f in (attention, attention_reference))
        assert torch.equal(found, expected) and found.any()
    found, expected = (torch.func.jvp(lambda leaf, f=f: f(leaf, 3), (qkv,), (direction,))[1]
                       for f in (attention, attention_reference))  # fmt: skip
    assert torch.equal(found, expected) and found.any()
    stacked = torch.stack((qkv, direction))
    found, expected = (torch.func.vmap(lambda leaf, f=f: f(leaf, 3))(stacked) for f in (attention, attention_reference))
    assert torch.equal(found, expected)


def test_a_second_derivative_is_refused_and_the_reference_has_it():
    qkv, dout = drawn(0)
    with (
        use_backend(attention="reference"),
        pytest.raises(RuntimeError, match="attention: double backward"),
    ):
        torch.autograd.grad(attention(qkv, 3), qkv, dout, create_graph=True)
    (gradient,) = torch.autograd.grad(attention_reference(qkv, 3), qkv, dout, create_graph=True)
    assert torch.autograd.grad(gradient.square().sum(), qkv)[0].any()


def test_an_output_that_nobody_uses_has_no_gradient():
    qkv, _ = drawn(0)
    with use_backend(attention="reference"):
        attention(qkv, 3)
    assert qkv.grad is None


def test_multiply_adds_are_counted_on_shapes_alone():
    n, t, h, k = SIZES[1]
    qkv, product = torch.empty(n, t, 3 * h * k, device="meta", requires_grad=True), 2 * n * h * t * t * k
    with FlopCounterMode(display=False) as counter:
        attention(qkv, h)
    assert counter.get_total_flops() == 2 * product
    with use_backend(attention="reference"), FlopCounterMode(display=False) as counter:
        attention(qkv, h).sum().backward()
    assert counter.get_total_flops() == (2 + 5) * product  # the scores are computed again
    with FakeTensorMode():
        assert isinstance(attention(torch.empty(n, t, 3 * h * k), h), FakeTensor)


@ON_CPU
def test_a_cpu_takes_pytorchs_flash_attention_without_copies(monkeypatch):
    qkv, dout = drawn(0)
    seen: list[Tensor] = []
    sdpa = F.scaled_dot_product_attention

    def watched(*heads: Tensor) -> Tensor:
        seen.extend(heads)
        return sdpa(*heads)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    with record() as recording:
        out = attention(qkv, 3)
    assert recording.names() == {"attention": "flash"} and "FlashAttention" in _names(out.grad_fn)
    assert {head.untyped_storage().data_ptr() for head in seen} == {qkv.untyped_storage().data_ptr()}
    assert not {"Clone", "Unsafe"} & {name[:6] for name in _names(out.grad_fn).split()}
    (dqkv,) = torch.autograd.grad(out, qkv, dout)
    assert dqkv.is_contiguous()


def _names(node: Any) -> str:
    """Names of the nodes that autograd goes through."""
    return " ".join([node.name(), *(_names(other) for other, _ in node.next_functions if other is not None)])


@pytest.fixture
def another(monkeypatch) -> Callable[..., None]:
    """``another(name, call)``: let ``attention`` have this backend, on a CPU, in place of its own of that name."""

    def add(name: str, call: Callable[[Tensor, int], Tensor]) -> None:
        monkeypatch.setitem(OP.backends, name, External(name, call, device=""))
        monkeypatch.setattr(OP, "_available", ())

    return add


@ON_CPU
def test_the_fastest_is_taken_where_it_was_timed(another):
    qkv, _ = drawn(0)
    another("efficient", torchs_own)
    with autotune() as tuner:
        attention(qkv, 3)
        (found, chosen), *rest = tuner.choices(DEVICE)["attention"].items()
        assert found == "float32[2, 17, 648] with gradient, 3" and chosen in ("flash", "efficient") and not rest
        tuner.timing = False
        tuner.load({"attention": {found: "efficient"}}, DEVICE, "kernels.json")
        with record() as recording:
            attention(qkv, 3)
            attention(qkv[:1], 3)
        assert recording.backends["attention"] == ["efficient", "flash"]
        assert "takes efficient, the fastest of those timed" in explain("attention", qkv, 3)
        assert "takes flash, the first that can run" in explain("attention", qkv[:1], 3)


@ON_CPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_numbers_that_are_not_finite_give_nan_where_the_reference_does(part, bad, dtype):
    for size in ((2, 3, 1, 16), (1, 17, 2, 32), (1, 64, 1, 72)):
        _, tokens, heads, width = size
        for rows in (slice(None), slice(0, 1), slice(tokens - 1, tokens)):
            qkv = drawn(0, dtype, size)[0].detach().clone()
            start = "qkv".index(part) * heads * width
            qkv[0, rows, start : start + heads * width] = bad
            found, wanted = attention(qkv, heads), attention_reference(qkv, heads)
            assert torch.equal(found.isnan(), wanted.isnan())


@ON_CPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 17])
def test_scores_that_overflow_give_nan_where_the_reference_does(tokens, dtype):
    qkv = drawn(0, dtype, (2, tokens, 1, 16))[0].detach().clone()
    qkv[1, :, :16], qkv[1, :, 16:32] = 1e20, -1e20
    assert attention(qkv, 1).isnan().flatten(1).all(1).tolist() == [False, True]


@ON_CPU
@pytest.mark.parametrize("stored", [False, True])
def test_an_external_backend_that_fails_raises_and_the_remedy_is_named(another, stored):
    def broken(qkv: Tensor, num_heads: int) -> Tensor:
        raise RuntimeError("No available kernel. Aborting execution.")

    another("cudnn", broken)
    qkv, tuner = drawn(0)[0], Autotuner(timing=False)
    if stored:
        tuner.load({"attention": {signature((qkv, 3)): "cudnn"}}, DEVICE, "kernels.json")
    with autotune(tuner), pytest.raises(RuntimeError, match="No available kernel") as caught:
        attention(qkv, 3)
    assert "attention failed on backend cudnn; ERD_FAST_BACKEND=attention=reference" in str(caught.value.__notes__)


def test_cudnn_is_first_where_pytorch_has_it_first():
    assert not cudnn_is_late(91501, 9) and not cudnn_is_late(91501, 10)
    assert cudnn_is_late(91501, 8) and cudnn_is_late(91500, 9)
    assert next(iter(OP.backends)) == "cudnn"


@ON_CPU
@pytest.mark.parametrize("name", [name for name in OP.backends if name not in HERE])
def test_what_is_not_here_says_why_and_what_to_do(name):
    with use_backend(attention=name), pytest.raises(BackendUnavailableError, match=f"attention: backend {name}"):
        attention(drawn(0)[0], 3)
    assert re.search(rf"{name}: no CUDA device is visible to PyTorch; run it on", explain("attention"))


@pytest.mark.parametrize(
    ("name", "tokens", "head_dim", "dtype", "reason"),
    [
        ("triton", 513, 64, torch.float32, "up to 512 tokens, and these are 513"),
        ("triton", 16, 12, torch.float32, "multiples of 8, and this is 12"),
        ("triton", 16, 136, torch.float32, "K of 16 to 128"),
        ("triton", 512, 128, torch.float32, None),
        ("triton", 1, 16, torch.float16, None),
        ("flash-attn-2", 16, 64, torch.float32, "bfloat16 and float16, and this is torch.float32"),
        ("flash-attn-3", 16, 264, torch.float16, "K up to 256"),
        ("flash-attn-4", 16, 72, torch.bfloat16, None),
        ("cudnn", 1, 64, torch.bfloat16, "T of 2 or more"),
        ("cudnn", 256, 136, torch.bfloat16, "K up to 128"),
        ("cudnn", 256, 72, torch.float32, "bfloat16 and float16"),
        ("cudnn", 256, 72, torch.bfloat16, None),
        ("efficient", 16, 6, torch.float32, "multiples of 4, and this is 6"),
        ("efficient", 16, 4, torch.float32, None),
        ("efficient", 16, 4, torch.float16, "multiples of 8, and this is 4"),
    ],
)
def test_what_a_backend_cannot_take_is_known_before(name, tokens, head_dim, dtype, reason):
    found = OP.backends[name].rule(qkv=torch.empty(1, tokens, 3 * head_dim, dtype=dtype), num_heads=1)
    assert found is None if reason is None else reason in found


def test_an_old_cudnn_reads_beyond_the_last_token():
    qkv = torch.empty(1, 258, 192, dtype=torch.bfloat16)
    assert "multiples of 128 tokens, and this is 258" in cudnn_rule(qkv, 1, 91500)
    assert cudnn_rule(qkv[:, :256], 1, 91500) is None and cudnn_rule(qkv, 1, 91501) is None
