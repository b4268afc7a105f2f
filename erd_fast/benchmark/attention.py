"""`erd-fast bench attention`: every attention that is installed, on the sequences of the models."""

import dataclasses
import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from erd_fast.benchmark.timing import copies_past_cache
from erd_fast.benchmark.workload import Backward, Call, Tensors, Workload, Wrap, elementwise
from erd_fast.ops import OPS, attention
from erd_fast.ops.attention import attention_reference

SEQUENCES = {  # tokens, heads, numbers of a head
    "DiT-S/2": (256, 6, 64),
    "DiT-XL/2": (256, 16, 72),
    "U-ViT-M/2": (258, 12, 64),
    "U-ViT-H/2": (258, 16, 72),
}
_SIZES = (8, 64, 256)
_ROUNDED = 3  # tensors of the compute dtype within: weights; in the backward pass their gradient, and the scores'


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """Attention of ``size`` sequences of a model; mode ``backward`` is the gradient of qkv alone."""

    model: str
    size: int
    mode: str
    usual: bool = True
    called: bool = False
    multiplies: bool = True
    group: str = "attention"
    ops: tuple[str, ...] = ("attention",)

    @property
    def name(self) -> str:
        tokens, heads, width = SEQUENCES[self.model]
        return f"{self.model} T={tokens} H={heads} K={width} N={self.size} {self.mode}"

    def baselines(self, device: torch.device) -> tuple[str, ...]:
        return ("eager", "compile")

    def backends(self, device: torch.device) -> tuple[str, ...]:
        return tuple(OPS["attention"].backends)

    def build(self, device: torch.device) -> Workload:
        return _workload(self, device)


def attention_cases(device: torch.device) -> list[AttentionCase]:
    """Every case that is measured on ``device``; on a CPU the smallest batch."""
    sizes = _SIZES if device.type == "cuda" else _SIZES[:1]
    modes = ("forward", "backward")
    return [AttentionCase(model, size, mode) for model in SEQUENCES for size in sizes for mode in modes]


def _workload(case: AttentionCase, device: torch.device) -> Workload:
    """bfloat16 on a GPU, float32 on a CPU. The baseline is F.scaled_dot_product_attention on the same packed qkv."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokens, heads, width = SEQUENCES[case.model]
    count, back = case.size * tokens * heads * width, case.mode == "backward"
    bytes_moved = count * dtype.itemsize * (8 if back else 4)
    copies = copies_past_cache(bytes_moved)
    generator = torch.Generator(device).manual_seed(0)

    def drawn(parts: int) -> Tensor:
        shape = (case.size, tokens, parts * heads * width)
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    given = [drawn(3).requires_grad_() for _ in range(copies)]
    douts = [drawn(1) for _ in given] if back else []

    def baseline(wrap: Wrap) -> Call:
        attend = wrap(functools.partial(eager_attention, heads))
        return lambda copy: (attend(given[copy]),)

    def truth() -> Tensors:
        wide = given[0].detach().float().requires_grad_()
        out = attention_reference(wide, heads)
        found = torch.autograd.grad(out, wide, douts[0].float())[0] if back else out.detach()
        return (found.to(dtype),)

    def relative(is_ours: bool) -> float:
        """Each rounding is off by half an eps; the errors of a sum add up as its terms do, whose largest sum is no less
        than their deviation: twice that is allowed."""
        return _ROUNDED * torch.finfo(dtype).eps

    return Workload(
        copies,
        lambda copy: (attention(given[copy], heads),),
        baseline,
        functools.partial(elementwise, terms=lambda value: tokens + width, relative=relative),
        truth=truth,
        backward=Backward([(qkv,) for qkv in given], [(dout,) for dout in douts]) if back else None,
        bytes_moved=bytes_moved,
        flops=int(4 * count * tokens * (2.5 if back else 1)),
    )


def eager_attention(heads: int, qkv: Tensor) -> Tensor:
    """As models write it: (N, T, 3 D) to (N, T, D)."""
    n, t, row = qkv.shape
    q, k, v = qkv.view(n, t, 3, heads, row // (3 * heads)).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, row // 3)
