"""kernels/attention.py in Triton's interpreter against attention in float64."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from support.parity import hold
from support.triton_interpreter import Call, interpret

pytestmark = pytest.mark.slow

pytest.importorskip("triton")

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    tokens: int
    head_dim: int
    dtype: torch.dtype
    samples: int = 2
    heads: int = 2

    def __str__(self) -> str:
        return f"T={self.tokens} K={self.head_dim} {str(self.dtype)[6:]} N={self.samples} H={self.heads}"

    def inputs(self, seed: int) -> tuple[Tensor, Tensor]:
        """qkv and dout."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.samples, self.tokens, self.heads * self.head_dim)
        qkv = torch.randn(*shape[:2], 3 * shape[2], generator=generator)
        return qkv.to(self.dtype), torch.randn(shape, generator=generator).to(self.dtype)

    def plain(self, qkv: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        """out, lse and dqkv, by PyTorch in the dtype of ``qkv``; lse in float32 at least, as it is kept."""
        leaf = qkv.detach().requires_grad_()
        split = leaf.view(*qkv.shape[:2], 3, self.heads, self.head_dim)
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind()
        scores = self.head_dim**-0.5 * q @ k.transpose(-1, -2)
        out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(dout.shape)
        wide = torch.promote_types(qkv.dtype, torch.float32)
        lse = (self.head_dim**-0.5 * q.to(wide) @ k.to(wide).transpose(-1, -2)).logsumexp(-1)
        return out.detach(), lse.detach(), *torch.autograd.grad(out, leaf, dout)


def _calls(case: Case, qkv: Tensor, dout: Tensor, out: Tensor, lse: Tensor) -> list[Call]:
    """The forward pass into NaN, and the backward pass from ``out`` and ``lse``."""
    kept = torch.full_like(dout, torch.nan), torch.full(lse.shape, torch.nan)
    return [
        Call("attention", (qkv, case.heads, *kept)),
        Call("attention", (dout, qkv, out, lse, case.heads, torch.full_like(qkv, torch.nan)), "backward"),
    ]


# Every dtype on one block, on several with the last in part, and on one that is nearly empty; the models' heads.
CASES = [
    *(Case(17, 72, dtype) for dtype in FLOATS),
    *(Case(63, 32, dtype) for dtype in FLOATS),
    Case(256, 64, torch.bfloat16, heads=1),
    Case(258, 72, torch.bfloat16, heads=1),
    Case(48, 40, torch.float32, heads=1),
    Case(33, 128, torch.float16, heads=1),
    Case(20, 104, torch.float32, heads=1),
    Case(16, 16, torch.float32, samples=3, heads=3),
]
LARGE = Case(40, 72, torch.float32)
ONE = Case(1, 64, torch.float16)
SHARED = Case(20, 72, torch.float16, samples=5, heads=1)
PARTS = {"tail": slice(2, None), "one": slice(3, 4), "mixed": torch.tensor([4, 0])}


def _large(seed: int) -> tuple[Tensor, Tensor]:
    """Scores of up to 1e4: a softmax that is nearly one of 0 and 1. Those of the last sample are negative throughout:
    against its lse a key that is not there, of score 0, would have an infinite weight."""
    qkv, dout = LARGE.inputs(seed)
    q, k, _ = qkv.chunk(3, -1)
    q *= 40.0
    k *= 40.0
    q[-1].abs_()
    k[-1].abs_().neg_()
    return qkv, dout


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, tuple[Tensor, ...]]:
    """out, lse and dqkv by name of the case, or of what is compared."""
    calls = {str(case): _with_plain(case, *case.inputs(0)) for case in (*CASES, ONE)}
    calls["large"] = _with_plain(LARGE, *_large(0))
    whole, again = SHARED.inputs(0), SHARED.inputs(0)
    calls["whole"], calls["again"] = _with_plain(SHARED, *whole), _with_plain(SHARED, *again)
    for name, rows in PARTS.items():
        calls[name] = _with_plain(SHARED, whole[0][rows], whole[1][rows])
    flat = [call for pair in calls.values() for call in pair]
    found = iter(interpret(flat, tmp_path_factory.mktemp("attention")))
    return {name: (*next(found)[2:], next(found)[5]) for name in calls}


def _with_plain(case: Case, qkv: Tensor, dout: Tensor) -> list[Call]:
    """The backward pass has the true out and lse, rounded once."""
    out, lse, _ = case.plain(qkv.double(), dout.double())
    return _calls(case, qkv, dout, out.to(qkv.dtype), lse.float())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_are_pytorchs(results, case):
    def found(qkv: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        out, lse, dqkv = results[str(case)]
        assert (out.dtype, lse.dtype, dqkv.dtype) == (case.dtype, torch.float32, case.dtype)
        q, k, v = dqkv.chunk(3, -1)
        return out, lse, q, k, v

    def plain(qkv: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        out, lse, dqkv = case.plain(qkv, dout)
        return out, lse, *dqkv.chunk(3, -1)

    hold(found, plain, case.inputs, ("out", "lse", "dq", "dk", "dv"), seeds=1)


def test_one_token_sees_itself_alone(results):
    (qkv, dout), (out, lse, dqkv) = ONE.inputs(0), results[str(ONE)]
    q, k, v = qkv.double().view(2, 2 * 3, 64).unflatten(1, (3, 2)).unbind(1)
    assert torch.equal(out, qkv[..., -128:]) and torch.equal(dqkv[..., -128:], dout)
    assert (lse[..., 0] - (q * k).sum(-1) / 8).abs().max() <= 64 * 2.0**-24 * (q * k).abs().sum(-1).max() / 8
    # The gradient of the only weight is dout v - dout out: two float32 sums of the same 64 terms.
    size = (dout.double().view(2, 2, 64) * v).abs().sum(-1).max() * max(q.abs().max(), k.abs().max()) / 8
    assert dqkv[..., :-128].abs().max() <= 128 * 2.0**-24 * size


def test_large_scores_stay_finite_and_right(results):
    qkv, dout = _large(0)
    truths = LARGE.plain(qkv.double(), dout.double())
    assert truths[1][0].max() > 2e3 and truths[1][-1].max() < -2e3
    for value, truth in zip(results["large"], truths, strict=True):
        assert value.isfinite().all()
        # float32 scores of 1e4 are off by 1e4 x 2^-24 x sqrt(72) at most, and so is the logarithm of every weight.
        assert (value.double() - truth).abs().max() <= 0.02 * truth.abs().max()


def test_the_same_call_gives_the_same_bits(results):
    assert all(torch.equal(one, other) for one, other in zip(results["whole"], results["again"], strict=True))


@pytest.mark.parametrize("part", PARTS)
def test_a_sample_counts_the_same_in_any_batch(results, part):
    for whole, some in zip(results["whole"], results[part], strict=True):
        assert torch.equal(whole[PARTS[part]], some)


def test_case_names_are_unique():
    assert len({str(case) for case in CASES}) == len(CASES) and str(replace(LARGE, heads=9)) != str(LARGE)
