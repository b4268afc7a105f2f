"""Ops on latents and what people write in their place, on the same inputs.

On a GPU x_t and prediction are bfloat16, and ours are patch tokens, as a transformer takes and gives them. Baselines
keep images: to go to tokens and back would cost them a copy each.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from erd_fast.benchmark.timing import copies_past_cache
from erd_fast.benchmark.workload import Tensors, Workload, Wrap, elementwise
from erd_fast.diffusion import DiffusionProcess, get_schedule
from erd_fast.ops import diffusion_loss, draw, q_sample
from erd_fast.ops.patchify import patchify

SHAPE = (4, 32, 32)
ELEMENTS = 4096
SIZES = (8, 64, 256, 1024, 8192)
MODES = {"draw": ("",), "q_sample": ("drawn", "given"), "diffusion_loss": ("",), "step": ("",)}
"""Kinds of cases of each op; ``step`` is all three, q_sample drawing its noise and diffusion_loss with its gradient."""

SCALE = 0.18215
_TIMESTEPS = 1000
_LABEL_DROP = 0.1
_IMAGENET = 1_281_167
_STORED = 16_384  # rows of the step's data set: 256 MiB
_NORMALS = 2e-6  # by which drawn normals may differ between backends
_REFERENCE_SIZE = 1024  # the definition takes ten seconds a call on a CPU beyond


@dataclasses.dataclass(frozen=True)
class OpCase:
    """One op, or the step, on ``size`` images of (4, 32, 32). It weighs nothing until it is built."""

    op: str
    mode: str
    size: int
    called: bool = False
    usual: bool = True
    multiplies: bool = False

    @property
    def group(self) -> str:
        return f"{'calls' if self.called else 'ops'}/{self.op}"

    @property
    def name(self) -> str:
        return f"{self.mode} N={self.size}".strip()

    @property
    def ops(self) -> tuple[str, ...]:
        return ("draw", "q_sample", "diffusion_loss") if self.op == "step" else (self.op,)

    def baselines(self, device: torch.device) -> tuple[str, ...]:
        return ("eager", "compile", *(["compile-graphs"] if self.called else []))

    def backends(self, device: torch.device) -> tuple[str, ...]:
        if device.type == "cpu":
            return ("cpu", "reference") if self.size <= _REFERENCE_SIZE else ("cpu",)
        # Its order bijection asks the device whether to go on, which a CUDA graph cannot.
        return ("cuda", "triton", "reference") if self.called else ("cuda", "triton")

    def build(self, device: torch.device) -> Workload:
        builders = {"draw": _draw, "q_sample": _q_sample, "diffusion_loss": _diffusion_loss, "step": _step}
        return builders[self.op](self, device)


def op_cases(device: torch.device) -> list[OpCase]:
    """Every case that is measured on ``device``."""
    cases = [OpCase(op, mode, size) for op, modes in MODES.items() for mode in modes for size in SIZES]
    if device.type == "cuda":
        cases += [OpCase("step", "", size, called=True) for size in SIZES]
    return cases


def _layout(device: torch.device) -> tuple[torch.dtype, int]:
    """dtype of x_t and prediction, and patch size of ours."""
    return (torch.bfloat16, 2) if device.type == "cuda" else (torch.float32, 0)


def _compare(case: OpCase, *, drawn: bool) -> Callable[..., Any]:
    """A mean runs over all elements; two drawn normals may differ, with factors of at most 1."""

    def terms(value: Tensor) -> int:
        return 1 if value.dim() else case.size * ELEMENTS

    return functools.partial(elementwise, terms=terms, relative=lambda ours: drawn * 2 * _NORMALS)


def _process(device: torch.device) -> DiffusionProcess:
    return DiffusionProcess(get_schedule("cosine", _TIMESTEPS), "v", device=device)


def _draw(case: OpCase, device: torch.device) -> Workload:
    size, bytes_moved = case.size, 26 * case.size
    copies = copies_past_cache(bytes_moved)
    counters = [torch.tensor(1000 + size * copy, device=device) for copy in range(copies)]
    how: dict[str, Any] = {"dataset_size": _IMAGENET, "num_timesteps": _TIMESTEPS, "label_drop": _LABEL_DROP}

    def ours(copy: int) -> Tensors:
        return draw(counters[copy], seed=1, batch_size=size, **how)

    def chain() -> Tensors:
        index = torch.randint(_IMAGENET, (size,), device=device)
        t = torch.randint(_TIMESTEPS, (size,), device=device)
        return index, t, torch.rand(size, device=device) < _LABEL_DROP, torch.rand(size, device=device) < 0.5

    def baseline(wrap: Wrap) -> Callable[[int], Tensors]:
        drawn = wrap(chain)
        return lambda copy: drawn()

    compare = _compare(case, drawn=True)
    return Workload(copies, ours, baseline, compare, as_ours=None, bytes_moved=bytes_moved)


def noised(moments: Tensor, posterior: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor, dtype: Any) -> Tensors:
    """x_t and the target v from stored (mean, std); alpha and sigma by image."""
    mean, std = moments.chunk(2, dim=1)
    x0 = (mean.float() + std.float() * posterior) * SCALE
    alpha, sigma = alpha[:, None, None, None], sigma[:, None, None, None]
    return (alpha * x0 + sigma * eps).to(dtype), alpha * eps - sigma * x0


def _q_sample(case: OpCase, device: torch.device) -> Workload:
    """fp16 moments (mean, std), as a store keeps them; target v on the cosine schedule."""
    size, given = case.size, case.mode == "given"
    dtype, patch = _layout(device)
    process = _process(device)
    alpha, sigma = process.coefficients[:, :2].unbind(1)
    bytes_moved = size * ELEMENTS * (2 * 2 + dtype.itemsize + 4 + (8 if given else 0))
    copies = copies_past_cache(bytes_moved)
    generator = torch.Generator(device).manual_seed(0)
    moments = torch.rand(copies, size, 8, *SHAPE[1:], generator=generator, device=device, dtype=torch.float16)
    noise = torch.randn(2, copies, size, *SHAPE, generator=generator, device=device) if given else None
    t = torch.randint(_TIMESTEPS, (size,), generator=generator, device=device)
    scale, ids = torch.full((4,), SCALE, device=device), torch.arange(size, device=device)
    how: dict[str, Any] = {"kind": "mean_std", "scale": scale, "ids": ids, "dtype": dtype, "patch": patch}

    def ours(copy: int) -> Tensors:
        noises: dict[str, Any] = {} if noise is None else {"posterior_noise": noise[0, copy], "noise": noise[1, copy]}
        return q_sample(moments[copy], process.coefficients, t, seed=copy, **how, **noises)

    def drawing(latents: Tensor, t: Tensor) -> Tensors:
        posterior, eps = torch.randn(size, *SHAPE, device=device), torch.randn(size, *SHAPE, device=device)
        return noised(latents, posterior, eps, alpha[t], sigma[t], dtype)

    def chain(latents: Tensor, t: Tensor, posterior: Tensor, eps: Tensor) -> Tensors:
        return noised(latents, posterior, eps, alpha[t], sigma[t], dtype)

    def baseline(wrap: Wrap) -> Callable[[int], Tensors]:
        if noise is None:
            drawn = wrap(drawing)
            return lambda copy: drawn(moments[copy], t)
        wrapped = wrap(chain)
        return lambda copy: wrapped(moments[copy], t, noise[0, copy], noise[1, copy])

    def as_ours(found: Tensors) -> Tensors:
        return patchify(found[0], patch), found[1]

    compare, layout = _compare(case, drawn=not given), as_ours if given else None
    return Workload(copies, ours, baseline, compare, as_ours=layout, bytes_moved=bytes_moved)


def weighted_mse(prediction: Tensor, target: Tensor, weight: Tensor, t: Tensor) -> Tensor:
    error = (prediction.float() - target).square().flatten(1).mean(1)
    return (weight[t] * error).mean()


def _diffusion_loss(case: OpCase, device: torch.device) -> Workload:
    """ERD-weighted loss with its gradient on the prediction."""
    dtype, patch = _layout(device)
    weight = _process(device).weight
    bytes_moved = case.size * ELEMENTS * (2 * dtype.itemsize + 4)
    copies = copies_past_cache(bytes_moved)
    generator = torch.Generator(device).manual_seed(0)
    shape = (copies, case.size, *SHAPE)
    images = torch.randn(shape, generator=generator, device=device).to(dtype).unbind()
    targets = torch.randn(shape, generator=generator, device=device)
    tokens = [patchify(image, patch).contiguous() for image in images]
    predictions = [image.clone().requires_grad_() for image in images]
    t = torch.randint(_TIMESTEPS, (case.size,), generator=generator, device=device)

    def ours(copy: int) -> Tensors:
        result = diffusion_loss(tokens[copy], targets[copy], weight, t, patch=patch, compute_grad=True)
        assert result.dprediction is not None
        return result.loss, result.dprediction

    def baseline(wrap: Wrap) -> Callable[[int], Tensors]:
        loss_of = wrap(weighted_mse)

        def call(copy: int) -> Tensors:
            loss = loss_of(predictions[copy], targets[copy], weight, t)
            return loss.detach(), *torch.autograd.grad(loss, predictions[copy])

        return call

    def as_ours(found: Tensors) -> Tensors:
        return found[0], patchify(found[1], patch)

    compare = _compare(case, drawn=False)
    return Workload(copies, ours, baseline, compare, as_ours=as_ours, bytes_moved=bytes_moved)


def _step(case: OpCase, device: torch.device) -> Workload:
    """All of a training step but model and optimizer: which images, their noise, loss and gradient of a prediction."""
    size, (dtype, patch) = case.size, _layout(device)
    process = _process(device)
    alpha, sigma = process.coefficients[:, :2].unbind(1)
    bytes_moved = size * (26 + ELEMENTS * (2 * 2 + dtype.itemsize + 4 + 2 * dtype.itemsize + 4))
    copies = 1 if case.called else copies_past_cache(bytes_moved)
    generator = torch.Generator(device).manual_seed(0)
    store = torch.rand(_STORED, 8, *SHAPE[1:], generator=generator, device=device, dtype=torch.float16)
    images = torch.randn(copies, size, *SHAPE, generator=generator, device=device).to(dtype).unbind()
    tokens = [patchify(image, patch).contiguous() for image in images]
    predictions = [image.clone().requires_grad_() for image in images]
    counters = [torch.tensor(1000 + size * copy, device=device) for copy in range(copies)]
    scale = torch.full((4,), SCALE, device=device)
    if case.called:  # CUDA graphs of torch.compile would copy these into buffers of their own at each call
        for static in (store, *predictions):
            torch._dynamo.mark_static_address(static)

    def ours(copy: int) -> Tensors:
        how = {"dataset_size": _STORED, "label_drop": _LABEL_DROP}
        drawn = process.draw(counters[copy], global_batch=size, seed=1, batch_size=size, **how)
        noisy = process.q_sample(
            store,
            drawn.t_index,
            index=drawn.sample_index,
            kind="mean_std",
            scale=scale,
            ids=drawn.ids,
            seed=1,
            dtype=dtype,
            patch=patch,
        )
        result = process.loss(tokens[copy], noisy.target, drawn.t_index, patch=patch, compute_grad=True)
        assert result.dprediction is not None
        return drawn.label_drop, *noisy, result.loss, result.dprediction, counters[copy] + size

    def noising() -> Tensors:
        moments = store[torch.randint(_STORED, (size,), device=device)]
        t = torch.randint(_TIMESTEPS, (size,), device=device)
        label_drop = torch.rand(size, device=device) < _LABEL_DROP
        posterior, eps = torch.randn(size, *SHAPE, device=device), torch.randn(size, *SHAPE, device=device)
        return *noised(moments, posterior, eps, alpha[t], sigma[t], dtype), t, label_drop

    def baseline(wrap: Wrap) -> Callable[[int], Tensors]:
        noise, loss_of = wrap(noising), wrap(weighted_mse)  # two parts: the model stands between them

        def call(copy: int) -> Tensors:
            x_t, target, t, label_drop = noise()
            loss = loss_of(predictions[copy], target, process.weight, t)
            return label_drop, x_t, target, loss.detach(), *torch.autograd.grad(loss, predictions[copy])

        return call

    compare = _compare(case, drawn=True)
    return Workload(copies, ours, baseline, compare, as_ours=None, bytes_moved=bytes_moved)
