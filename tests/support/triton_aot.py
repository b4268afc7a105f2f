"""Compile the kernels of kernels/ ahead of time for GPUs that need not be there, and read what they use.

A configuration is one call of a launcher on tensors of the ``meta`` device. Its launches are caught, so what is
compiled is what the launcher would launch: the same types, constants, alignments and warps. A new kernel joins by a
function below with an entry in CONFIGURATIONS; tests/kernels/test_aot.py checks every entry for every architecture.

``python tests/support/triton_aot.py [op ...]`` prints the table.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # an interpreted function has nothing to compile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from erd_fast.kernels import (
    ada_layer_norm,
    adamw_ema,
    attention,
    diffusion_loss,
    draw,
    grad_norm,
    linear_gelu,
    q_sample,
    residual_ada_layer_norm,
)

ARCHITECTURES = (80, 90, 100)
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Launch:
    """One kernel launch, as its launcher asked for it."""

    kernel: JITFunction
    arguments: dict[str, Any]  # by parameter name
    options: dict[str, Any]  # num_warps and the like


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel uses: of a thread (registers, bytes of stack and local memory), of a program (shared)."""

    registers: int
    stack: int  # a spilled register lies here, so 0 is also no spills
    local: int
    shared: int
    ptx: str


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def longs(*shape: int) -> torch.Tensor:
    return empty(*shape, dtype=torch.int64)


def bools(*shape: int) -> torch.Tensor:
    return empty(*shape, dtype=torch.bool)


def _draw(table: bool = False, strata: int = 0) -> None:
    outputs = (longs(256), longs(256), longs(256), bools(256), bools(256))
    draw.forward(longs(), -5, 1281167, 1000, 1 << 31, 0, 0, longs(1000) if table else None, strata, *outputs)


def _q_sample(
    kind: int,
    stored: torch.dtype = torch.float16,
    dtype: torch.dtype = torch.bfloat16,
    size: tuple[int, int, int] = (4, 32, 32),
    patch: int = 2,
    flip: bool = False,
    given: bool = False,
) -> None:
    (channels, height, width), count = size, 256
    rows = channels * (2 if kind in (1, 2) else 1)
    tokens = (height * width // patch**2, patch**2 * channels) if patch else size
    noise = empty(count, *size) if given else None
    q_sample.forward(
        empty(50000, rows, height, width, dtype=stored),
        empty(1000, 4),
        longs(count),
        longs(count),
        kind,
        empty(channels),
        empty(channels),
        bools(count) if flip else None,
        longs(count),
        -5,
        0,
        noise,
        noise,
        patch,
        empty(count, *tokens, dtype=dtype),
        empty(count, *size),
    )


def _diffusion_loss(
    dtype: torch.dtype = torch.bfloat16,
    size: tuple[int, int, int] = (4, 32, 32),
    patch: int = 2,
    predicted: int = 4,
    gradient: bool = True,
    scaled: bool = False,
    bins: int = 10,
) -> None:
    (channels, height, width), count = size, 256
    tokens = (height * width // patch**2, patch**2 * predicted) if patch else (predicted, height, width)
    prediction = empty(count, *tokens, dtype=dtype)
    diffusion_loss.forward(
        prediction,
        empty(count, channels, height, width),
        empty(1000),
        longs(count),
        256,
        empty() if scaled else None,
        patch,
        empty(),
        empty(count),
        empty(bins),
        empty(bins),
        prediction if gradient else None,
    )


def _linear_gelu(
    dtype: torch.dtype = torch.bfloat16,
    width: int = 4608,
    approximate: str = "tanh",
    backward: bool = False,
    again: bool = False,
    rows: int = 65536,
) -> None:
    inputs = width // 4 or 1
    wide = empty(rows, width, dtype=dtype)
    if not backward:
        weight, bias = empty(width, inputs, dtype=dtype), empty(width, dtype=dtype)
        return linear_gelu.forward(empty(rows, inputs, dtype=dtype), weight, bias, approximate, wide, wide)
    dy, next_weight = empty(rows, inputs, dtype=dtype), empty(inputs, width, dtype=dtype)
    linear_gelu.backward(dy, next_weight, wide, approximate, wide, empty(width), wide if again else None)


def _vectors(count: int, width: int, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """Chunks of one projection for 28 blocks."""
    return list(empty(256, 28 * 6 * width, dtype=dtype)[:, : count * width].chunk(count, dim=1))


def _attention(
    tokens: int, head_dim: int, dtype: torch.dtype = torch.bfloat16, heads: int = 16, backward: bool = False
) -> None:
    width, lse = heads * head_dim, empty(64, heads, tokens)
    qkv, out = empty(64, tokens, 3 * width, dtype=dtype), empty(64, tokens, width, dtype=dtype)
    if backward:
        attention.backward(out, qkv, out, lse, heads, qkv)
    else:
        attention.forward(qkv, heads, out, lse)


def _ada_layer_norm(width: int, dtype: torch.dtype = torch.float32, affine: bool = False) -> None:
    x, y = empty(256, 256, width, dtype=dtype), empty(256, 256, width, dtype=torch.bfloat16)
    shift, scale = [empty(width).expand(256, width)] * 2 if affine else _vectors(2, width)
    mean, rstd, sums = empty(256, 256), empty(256, 256), empty(256, width)
    ada_layer_norm.forward(x, shift, scale, 1.0, 1e-6, y, mean, rstd)
    ada_layer_norm.backward(y, x, scale, 1.0, mean, rstd, x, sums, sums)


def _residual_ada_layer_norm(
    width: int,
    dtype: torch.dtype = torch.float32,
    inner: torch.dtype = torch.bfloat16,
    gated: bool = True,
    keep: bool = True,
    tokens: int = 256,
) -> None:
    x, branch = empty(256, tokens, width, dtype=dtype), empty(256, tokens, width, dtype=inner)
    gate, shift, scale = _vectors(3, width, inner)
    mean, rstd, gated_by = empty(256, tokens), empty(256, tokens), gate if gated else None
    outputs = (x if keep else None, branch, mean, rstd)
    residual_ada_layer_norm.forward(x, branch, gated_by, shift, scale, 1.0, 1e-6, *outputs)


def _residual_backward(
    width: int,
    dtype: torch.dtype = torch.float32,
    inner: torch.dtype = torch.bfloat16,
    gated: bool = True,
    before: bool = False,
    dx_out: bool = True,
    tokens: int = 256,
) -> None:
    x, branch = empty(256, tokens, width, dtype=dtype), empty(256, tokens, width, dtype=inner)
    gate, before_gate, scale = _vectors(3, width, inner)
    mean, rstd, sums = empty(256, tokens), empty(256, tokens), empty(256, width)
    source = (branch if before else None, before_gate if before and gated else None)
    inputs = (x if dx_out else None, branch, x, branch, gate if gated else None, *source, scale, 1.0, mean, rstd)
    residual_ada_layer_norm.backward(*inputs, x, branch, sums if gated else None, sums, sums)


def _table() -> tuple[torch.Tensor, torch.Tensor, int]:
    return longs(300, 12), empty(80000, 2, dtype=torch.int32), 8192


def _adamw_ema(decays: int) -> None:
    settings = empty(2, 16, dtype=torch.float64)
    adamw_ema.forward(*_table(), settings, empty(), 2000, decays, longs(3), empty(2), empty(2, 16))


# What training launches at real sizes, each branch of a kernel at least once, and the odd sizes.
CONFIGURATIONS: dict[str, Callable[[], None]] = {
    "draw": lambda: _draw(),
    "draw table strata": lambda: _draw(table=True, strata=256),
    "q_sample sample": lambda: _q_sample(0),
    "q_sample mean_std": lambda: _q_sample(1),
    "q_sample mean_std flip": lambda: _q_sample(1, flip=True),
    "q_sample mean_logvar image fp16": lambda: _q_sample(2, dtype=torch.float16, patch=0),
    "q_sample mean_std given noise": lambda: _q_sample(1, torch.float32, torch.float32, given=True, flip=True),
    "q_sample pixels 3x64x64 p4 flip": lambda: _q_sample(3, torch.uint8, size=(3, 64, 64), patch=4, flip=True),
    "q_sample pixels 1x8x8": lambda: _q_sample(3, torch.uint8, size=(1, 8, 8)),
    "q_sample mean_logvar 16x64x64": lambda: _q_sample(2, torch.bfloat16, size=(16, 64, 64), flip=True),
    "q_sample mean_std 3x5x7 flip": lambda: _q_sample(1, size=(3, 5, 7), patch=0, flip=True),
    "q_sample sample 3x6x10 p2": lambda: _q_sample(0, size=(3, 6, 10)),
    "diffusion_loss": lambda: _diffusion_loss(),
    "diffusion_loss fp16 scaled": lambda: _diffusion_loss(torch.float16, scaled=True),
    "diffusion_loss learned sigma": lambda: _diffusion_loss(predicted=8),
    "diffusion_loss image": lambda: _diffusion_loss(patch=0),
    "diffusion_loss image fp32 no gradient": lambda: _diffusion_loss(torch.float32, patch=0, gradient=False),
    "diffusion_loss 3x5x7 bins 100": lambda: _diffusion_loss(size=(3, 5, 7), patch=0, predicted=3, bins=100),
    "diffusion_loss 1x8x8": lambda: _diffusion_loss(size=(1, 8, 8), predicted=1),
    "ada_layer_norm 1152": lambda: _ada_layer_norm(1152),
    "ada_layer_norm bf16 affine 72": lambda: _ada_layer_norm(72, torch.bfloat16, affine=True),
    "residual_ada_layer_norm 384": lambda: _residual_ada_layer_norm(384),
    "residual_ada_layer_norm bf16 512 no gate": lambda: _residual_ada_layer_norm(512, torch.bfloat16, gated=False),
    "residual_ada_layer_norm 768": lambda: _residual_ada_layer_norm(768),
    "residual_ada_layer_norm bf16 1024": lambda: _residual_ada_layer_norm(1024, torch.bfloat16),
    "residual_ada_layer_norm 1152": lambda: _residual_ada_layer_norm(1152),
    "residual_ada_layer_norm 1152 y alone": lambda: _residual_ada_layer_norm(1152, keep=False),
    "residual_ada_layer_norm bf16 1152": lambda: _residual_ada_layer_norm(1152, torch.bfloat16),
    "residual_ada_layer_norm fp16 100": lambda: _residual_ada_layer_norm(100, torch.float16, torch.float16, tokens=258),
    "residual_ada_layer_norm backward 384 before": lambda: _residual_backward(384, before=True),
    "residual_ada_layer_norm backward bf16 512 no gate": lambda: _residual_backward(512, torch.bfloat16, gated=False),
    "residual_ada_layer_norm backward 768 y alone": lambda: _residual_backward(768, dx_out=False),
    "residual_ada_layer_norm backward bf16 1024": lambda: _residual_backward(1024, torch.bfloat16),
    "residual_ada_layer_norm backward 1152": lambda: _residual_backward(1152),
    "residual_ada_layer_norm backward 1152 before": lambda: _residual_backward(1152, before=True),
    "residual_ada_layer_norm backward bf16 1152 before": lambda: _residual_backward(1152, torch.bfloat16, before=True),
    "residual_ada_layer_norm backward bf16 1153": lambda: _residual_backward(1153, torch.bfloat16),
    "residual_ada_layer_norm backward fp16 100": lambda: _residual_backward(100, torch.float16, torch.float16),
    "residual_ada_layer_norm backward fp32 4096 before": lambda: _residual_backward(
        4096, inner=torch.float32, before=True, tokens=258
    ),
    "linear_gelu": lambda: _linear_gelu(),
    "linear_gelu erf fp16 1153 wide": lambda: _linear_gelu(torch.float16, 1153, "none"),
    "linear_gelu fp32 1536 wide": lambda: _linear_gelu(torch.float32, 1536, rows=255),
    "linear_gelu backward": lambda: _linear_gelu(backward=True),
    "linear_gelu backward again": lambda: _linear_gelu(backward=True, again=True),
    "linear_gelu backward erf again": lambda: _linear_gelu(torch.float16, 3072, "none", backward=True, again=True),
    "linear_gelu backward erf fp32 again": lambda: _linear_gelu(torch.float32, 1536, "none", True, True, 255),
    "linear_gelu backward 1153 wide again": lambda: _linear_gelu(width=1153, backward=True, again=True),
    "linear_gelu backward 24 wide": lambda: _linear_gelu(width=24, backward=True),
    "attention 256x64 fp16": lambda: _attention(256, 64, torch.float16),
    "attention 256x72": lambda: _attention(256, 72),
    "attention 258x72": lambda: _attention(258, 72),
    "attention 64x32 fp32": lambda: _attention(64, 32, torch.float32),
    "attention backward 256x64 fp16": lambda: _attention(256, 64, torch.float16, backward=True),
    "attention backward 256x72": lambda: _attention(256, 72, backward=True),
    "attention backward 258x72": lambda: _attention(258, 72, backward=True),
    "attention backward 64x32 fp32": lambda: _attention(64, 32, torch.float32, backward=True),
    "grad_norm": lambda: grad_norm.forward(*_table(), empty(), empty(80000)),
    "adamw_ema 0 averages": lambda: _adamw_ema(0),
    "adamw_ema 1 average": lambda: _adamw_ema(1),
    "adamw_ema 2 averages": lambda: _adamw_ema(2),
    "adamw_ema 3 averages": lambda: _adamw_ema(3),
    "adamw_ema 4 averages": lambda: _adamw_ema(4),
}


def launches(call: Callable[[], None]) -> list[Launch]:
    """The kernel launches that ``call`` makes; none of them happens."""
    with _caught() as found:
        call()
    return found


@contextmanager
def _caught() -> Iterator[list[Launch]]:
    found: list[Launch] = []

    def catch(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        named = {name: kwargs.pop(name) for name in list(kwargs) if name in self.arg_names}
        found.append(Launch(self, {**dict(zip(self.arg_names, args, strict=False)), **named}, kwargs))

    run, JITFunction.run = JITFunction.run, catch
    try:
        yield found
    finally:
        JITFunction.run = run


def _source(launch: Launch) -> ASTSource:
    """Types and specialization by the rules of Triton's launch: see JITFunction.run."""
    signature, constants, attributes = {}, {}, {}
    for number, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        specialized = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and specialized):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            divisible = not parameter.do_not_specialize_on_alignment
        else:
            wide = isinstance(value, int) and not -(1 << 31) <= value < 1 << 31
            signature[name] = parameter.annotation_type or _SCALARS[type(value)] or ("i64" if wide else "i32")
            divisible = specialized and isinstance(value, int) and value % 16 == 0
        if divisible:
            attributes[(number,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "i1",
}
_SCALARS = {float: "fp32", bool: "i1", int: ""}


def compile_launch(launch: Launch, architecture: int) -> Resources:
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(_source(launch), target=target, options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(_CUOBJDUMP), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    # Shared memory is asked for at launch; the cubin does not know it.
    return Resources(used["REG"], used["STACK"], used["LOCAL"], compiled.metadata.shared, compiled.asm["ptx"])


def compile_configuration(name: str, architecture: int) -> list[tuple[str, Resources]]:
    """(kernel, resources) of each launch of a configuration."""
    caught = launches(CONFIGURATIONS[name])
    return [(launch.kernel.__name__, compile_launch(launch, architecture)) for launch in caught]


def _main(ops: list[str]) -> None:
    jobs = [(name, sm) for name in CONFIGURATIONS if not ops or name.split()[0] in ops for sm in ARCHITECTURES]
    start = time.perf_counter()
    print(f"{'configuration':<40} {'kernel':<28} {'sm':>4} {'registers':>9} {'stack':>6} {'local':>6} {'shared':>7}")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        with ProcessPoolExecutor() as pool:
            for (name, sm), found in zip(jobs, pool.map(compile_configuration, *zip(*jobs, strict=True)), strict=True):
                for kernel, r in found:
                    print(f"{name:<40} {kernel:<28} {sm:>4} {r.registers:>9} {r.stack:>6} {r.local:>6} {r.shared:>7}")
    print(f"Triton {triton.__version__}, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    _main(sys.argv[1:])
