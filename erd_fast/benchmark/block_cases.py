"""Ops of a transformer block and what models write in their place, on the same inputs: forward, and gradients alone.

On a GPU dtypes are those of autocast to bfloat16. The residual stream and parameters of a LayerNorm are float32; a
branch, its input, the modulation and the MLP with its parameters are bfloat16. On a CPU all is float32.
"""

import dataclasses
import functools
import importlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from erd_fast.benchmark.timing import copies_past_cache
from erd_fast.benchmark.workload import Backward, Tensors, Workload, Wrap, elementwise
from erd_fast.ops import OPS, ada_layer_norm, gelu_mlp, residual_ada_layer_norm
from erd_fast.ops.ada_layer_norm import ada_layer_norm_reference
from erd_fast.ops.linear_gelu import gelu_mlp_reference
from erd_fast.ops.residual_ada_layer_norm import residual_ada_layer_norm_reference

BLOCK_OPS = ("ada_layer_norm", "residual_ada_layer_norm", "linear_gelu")
WIDTHS, TOKENS, UVIT_TOKENS = (384, 768, 1024, 1152), 256, 258
BLOCK_SIZES = (8, 64, 256)
_EPS, _UVIT_EPS = 1e-6, 1e-5
_MLP_RATIO = 4
# Tensors of the compute dtype, each a rounding, between inputs and a result of the baseline. LayerNorm: 1 + scale. With
# the residual: the gated branch, its gradient and that one's product with the branch too. MLP, ours too: both sides of
# GELU, and their gradients.
_ROUNDED = {"ada_layer_norm": 1, "residual_ada_layer_norm": 4, "linear_gelu": 4}

Norm = Callable[[Tensor, Tensor | None, Tensor | None, float], Tensor]
"""LayerNorm of x with weight, bias and eps."""


@dataclasses.dataclass(frozen=True)
class BlockOpCase:
    """One op on ``size`` samples of ``tokens`` tokens of ``width``; ``uvit``: with the LayerNorm's own weight and bias,
    or GELU by erf, in place of DiT's modulation and tanh."""

    op: str
    mode: str
    size: int
    width: int
    uvit: bool = False
    usual: bool = True
    called: bool = False

    @property
    def tokens(self) -> int:
        return UVIT_TOKENS if self.uvit else TOKENS

    @property
    def multiplies(self) -> bool:
        return self.op == "linear_gelu"

    @property
    def group(self) -> str:
        return f"ops/{self.op}"

    @property
    def name(self) -> str:
        kind = ("erf " if self.multiplies else "affine ") if self.uvit else ""
        return f"{kind}D={self.width} T={self.tokens} N={self.size} {self.mode}"

    @property
    def ops(self) -> tuple[str, ...]:
        return (self.op,)

    def baselines(self, device: torch.device) -> tuple[str, ...]:
        return ("eager", "compile", *([] if self.multiplies else _library_norms(device)))

    def backends(self, device: torch.device) -> tuple[str, ...]:
        elsewhere = "cpu" if device.type == "cuda" else "cuda"
        return tuple(backend for backend in OPS[self.op].backends if backend != elsewhere)

    def build(self, device: torch.device) -> Workload:
        return (_mlp if self.multiplies else _norm)(self, device)


def block_cases(device: torch.device) -> list[BlockOpCase]:
    """Every case that is measured on ``device``. Usual on a GPU: the largest width at all sizes, the others at one."""
    on_gpu = device.type == "cuda"
    kinds = [(width, False) for width in (WIDTHS if on_gpu else (WIDTHS[0], WIDTHS[-1]))] + [(WIDTHS[-1], True)]
    sizes = BLOCK_SIZES if on_gpu else BLOCK_SIZES[:1]
    grid = itertools.product(BLOCK_OPS, kinds, sizes, ("forward", "backward"))
    return [
        BlockOpCase(op, mode, size, width, uvit, not on_gpu or size == 64 or (width == WIDTHS[-1] and not uvit))
        for op, (width, uvit), size, mode in grid
    ]


def _dtypes(device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """Of the residual stream, and of what matrix products take and give."""
    return torch.float32, torch.bfloat16 if device.type == "cuda" else torch.float32


def _library_norms(device: torch.device) -> dict[str, Norm]:
    """LayerNorms of other projects that are installed here, for a GPU."""
    found = {"apex": _apex, "liger": _liger} if device.type == "cuda" else {}
    return {name: norm for name, load in found.items() if (norm := load()) is not None}


@functools.cache
def _apex() -> Norm | None:
    """NVIDIA's; apex on PyPI is another project, without this function."""
    try:
        normalization = importlib.import_module("apex.normalization.fused_layer_norm")
        importlib.import_module("fused_layer_norm_cuda")
        affine, plain = normalization.fused_layer_norm_affine, normalization.fused_layer_norm
    except (ImportError, AttributeError):
        return None

    def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        shape = x.shape[-1:]
        return plain(x, shape, eps) if weight is None else affine(x, weight, bias, shape, eps)

    return norm


@functools.cache
def _liger() -> Norm | None:
    """Has no form without weight and bias: it gets ones and zeros."""
    try:
        function = importlib.import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction
    except (ImportError, AttributeError):
        return None
    constant = functools.cache(lambda width, value, device: torch.full((width,), value, device=device))

    def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        one, zero = (constant(x.shape[-1], value, x.device) for value in (1.0, 0.0))
        return function.apply(x, one if weight is None else weight, zero if bias is None else bias, eps)

    return norm


def _torch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _norm(case: BlockOpCase, device: torch.device) -> Workload:
    """Inputs in the order x, branch and gate with a residual, then shift and scale, chunks of a wide projection as
    models have them, or weight and bias. U-ViT's branch has no gate."""
    stream, dtype = _dtypes(device)
    bytes_moved = _norm_bytes(case, stream.itemsize, dtype.itemsize)
    generator = torch.Generator(device).manual_seed(0)
    how: dict[str, Any] = {"generator": generator, "device": device}
    shape, residual = (case.size, case.tokens, case.width), case.op == "residual_ada_layer_norm"

    def drawn(*dtypes: torch.dtype) -> Tensors:
        return tuple(torch.randn(shape, **how, dtype=dtype) for dtype in dtypes)

    def inputs() -> Tensors:
        big = drawn(stream, dtype) if residual else drawn(stream)
        if case.uvit:
            return (*big, 1 + 0.1 * torch.randn(case.width, **how), 0.1 * torch.randn(case.width, **how))
        wide = 0.5 * torch.randn(case.size, 6 * case.width, **how, dtype=dtype)
        shift, scale, gate, *_ = wide.chunk(6, dim=-1)
        return (*big, gate, shift, scale) if residual else (*big, shift, scale)

    def gradients() -> Tensors:
        return drawn(stream, dtype) if residual else drawn(dtype)

    chain = functools.partial(_joined_norm if residual else _plain_norm, uvit=case.uvit, dtype=dtype)
    return _workload(
        case,
        copies_past_cache(bytes_moved),
        inputs,
        gradients,
        functools.partial(_our_norm, case, dtype),
        functools.partial(chain, norm=_torch_norm),
        functools.partial(_norm_reference, case),
        others={name: functools.partial(chain, norm=norm) for name, norm in _library_norms(device).items()},
        compute=dtype,
        bytes_moved=bytes_moved,
    )


def _norm_bytes(case: BlockOpCase, stream: int, branch: int) -> int:
    """As the ops' docstrings count them: by element, and mean and rstd by token."""
    forward, backward = stream + branch, 2 * stream + branch
    if case.op == "residual_ada_layer_norm":
        forward, backward = 2 * stream + 2 * branch, 3 * stream + 3 * branch
    tokens = case.size * case.tokens
    return tokens * (case.width * (forward if case.mode == "forward" else backward) + 2 * 4)


def _our_norm(case: BlockOpCase, dtype: torch.dtype, *inputs: Tensor) -> Tensors:
    names = ("weight", "bias") if case.uvit else ("shift", "scale")
    how: dict[str, Any] = {**dict(zip(names, inputs[-2:], strict=True)), "eps": _eps(case), "dtype": dtype}
    if case.op == "residual_ada_layer_norm":
        x, branch, *gate = inputs[:-2]
        return residual_ada_layer_norm(x, branch, gate[0] if gate else None, **how)
    return (ada_layer_norm(inputs[0], **how),)


def _eps(case: BlockOpCase) -> float:
    return _UVIT_EPS if case.uvit else _EPS


def _plain_norm(x: Tensor, first: Tensor, second: Tensor, *, norm: Norm, uvit: bool, dtype: torch.dtype) -> Tensors:
    if uvit:
        return (norm(x, first, second, _UVIT_EPS).to(dtype),)
    return ((norm(x, None, None, _EPS) * (1 + second[:, None]) + first[:, None]).to(dtype),)


def _joined_norm(x: Tensor, branch: Tensor, *rest: Tensor, norm: Norm, uvit: bool, dtype: torch.dtype) -> Tensors:
    *gate, first, second = rest
    x = x + gate[0][:, None] * branch if gate else x + branch
    return x, *_plain_norm(x, first, second, norm=norm, uvit=uvit, dtype=dtype)


def _norm_reference(case: BlockOpCase, *inputs: Tensor) -> Tensors:
    """Of float64 inputs, in float64."""
    *big, first, second = inputs
    shift, scale = (second.expand(case.size, -1), first.expand(case.size, -1)) if case.uvit else (first, second)
    how: dict[str, Any] = {"offset": 0.0 if case.uvit else 1.0, "eps": _eps(case), "dtype": torch.float64}
    if case.op == "residual_ada_layer_norm":
        x, branch, *gate = big
        return residual_ada_layer_norm_reference(x, branch, gate[0] if gate else None, shift, scale, **how)
    return (ada_layer_norm_reference(big[0], shift, scale, **how),)


def _mlp(case: BlockOpCase, device: torch.device) -> Workload:
    """The whole MLP, on parameters in the dtype of the products, as autocast would have cast them."""
    dtype = _dtypes(device)[1]
    generator = torch.Generator(device).manual_seed(0)
    shape, wide = (case.size, case.tokens, case.width), _MLP_RATIO * case.width
    sizes = [shape, (wide, case.width), (wide,), (case.width, wide), (case.width,)]
    scales = [1.0, case.width**-0.5, 0.1, wide**-0.5, 0.1]
    approximate = "none" if case.uvit else "tanh"

    def drawn(scale: float, *size: int) -> Tensor:
        return scale * torch.randn(size, generator=generator, device=device, dtype=dtype)

    def eager(x: Tensor, weight: Tensor, bias: Tensor, next_weight: Tensor, next_bias: Tensor) -> Tensors:
        return (F.linear(F.gelu(F.linear(x, weight, bias), approximate=approximate), next_weight, next_bias),)

    products = 4 * case.size * case.tokens * case.width * wide
    activations = case.size * case.tokens * wide * dtype.itemsize
    return _workload(
        case,
        copies_past_cache(activations),
        lambda: tuple(drawn(scale, *size) for scale, size in zip(scales, sizes, strict=True)),
        lambda: (drawn(1.0, *shape),),
        lambda *inputs: (gelu_mlp(*inputs, approximate=approximate),),
        eager,
        lambda *inputs: (gelu_mlp_reference(*inputs, approximate=approximate),),
        ours_rounds=True,
        compute=dtype,
        flops=products * (1 if case.mode == "forward" else 2),
    )


def _workload(
    case: BlockOpCase,
    copies: int,
    inputs: Callable[[], Tensors],
    gradients: Callable[[], Tensors],
    ours: Callable[..., Tensors],
    eager: Callable[..., Tensors],
    reference: Callable[..., Tensors],
    *,
    compute: torch.dtype,
    others: dict[str, Callable[..., Tensors]] | None = None,
    ours_rounds: bool = False,
    **measured: Any,
) -> Workload:
    """Functions of the inputs as calls on copies of them, which all need gradients."""
    given = [tuple(tensor.requires_grad_() for tensor in inputs()) for _ in range(copies)]
    backward = Backward(given, [gradients() for _ in given]) if case.mode == "backward" else None

    def on_copies(function: Callable[..., Tensors]) -> Callable[[int], Tensors]:
        return lambda copy: function(*given[copy])

    def baseline(wrap: Wrap) -> Callable[[int], Tensors]:
        return on_copies(wrap(eager))

    def truth() -> Tensors:
        return _truth(reference, given[0], backward.gradients[0] if backward else None, compute)

    def terms(value: Tensor) -> int:
        """Sums run over a row and, in gradients of a vector, over the tokens that share it."""
        shared = {1: case.size * case.tokens, 2: case.tokens, 3: case.width}
        return max(case.width, case.size * case.tokens if case.multiplies else shared[value.dim()])

    def relative(is_ours: bool) -> float:
        """Each rounding is off by half an eps. In a sum of random terms errors add up as the terms do, whose largest
        sum is no less than their deviation: twice that is allowed."""
        return _ROUNDED[case.op] * torch.finfo(compute).eps if ours_rounds or not is_ours else 0.0

    return Workload(
        copies,
        on_copies(ours),
        baseline,
        functools.partial(elementwise, terms=terms, relative=relative),
        others={name: on_copies(function) for name, function in (others or {}).items()},
        truth=truth,
        backward=backward,
        **measured,
    )


def _truth(
    reference: Callable[..., Tensors], inputs: Tensors, gradients: Tensors | None, compute: torch.dtype
) -> Tensors:
    """The definition in float64, rounded to the dtypes that results have."""
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    outputs = reference(*wide)
    if gradients is None:
        dtypes: Sequence[torch.dtype] = [*[inputs[0].dtype] * (len(outputs) - 1), compute]
    else:
        outputs = torch.autograd.grad(outputs, wide, [gradient.double() for gradient in gradients])
        dtypes = [tensor.dtype for tensor in inputs]
    return tuple(output.detach().to(dtype) for output, dtype in zip(outputs, dtypes, strict=True))
