"""Whole models and single blocks of them: what a training step does with its model, forward and backward."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from erd_fast.benchmark.workload import EPS, Deviation, Tensors, Workload, Wrap
from erd_fast.diffusion import DiffusionProcess, get_schedule
from erd_fast.models import DiffusionModel, create_model, model_flops
from erd_fast.ops.patchify import patchify

MODEL_NAMES = ("DiT-S/2", "DiT-B/2", "DiT-L/2", "DiT-XL/2", "U-ViT-H/2")
_COPIES = 2
CHUNK = 8  # images of which float32 keeps all activations of the largest model
_ROUNDED = 40  # tensors of a block, forward and backward, that are rounded to the dtype of matrix products


@dataclasses.dataclass(frozen=True)
class ModelCase:
    """Loss and gradients of all parameters on ``size`` latents of (4, 32, 32). ``block``: of a model with one block, or
    of a U-ViT with the three that a long skip needs."""

    model: str
    size: int
    block: bool = False
    usual: bool = True
    multiplies: bool = True

    @property
    def group(self) -> str:
        return f"{'block' if self.block else 'model'}/{self.model}"

    @property
    def name(self) -> str:
        return f"N={self.size}"

    @property
    def called(self) -> bool:
        return not self.block

    @property
    def ops(self) -> tuple[str, ...]:
        return ("ada_layer_norm", "residual_ada_layer_norm", "attention", "linear_gelu")

    def baselines(self, device: torch.device) -> tuple[str, ...]:
        slow = device.type == "cpu" and not self.block  # compiling it takes a minute there
        return ("eager",) if slow else ("eager", "compile")

    def backends(self, device: torch.device) -> tuple[str, ...]:
        return ("",)

    def build(self, device: torch.device) -> Workload:
        return _workload(self, device)


def model_cases(device: torch.device) -> list[ModelCase]:
    """Every case that is measured on ``device``."""
    if device.type == "cpu":
        return [ModelCase(MODEL_NAMES[0], 8, block) for block in (True, False)]
    usual = {("block", "DiT-XL/2", 64), ("model", "DiT-XL/2", 64)}
    blocks = [ModelCase(model, size, block=True) for model in MODEL_NAMES for size in (64, 256)]
    models = [ModelCase(model, 64) for model in MODEL_NAMES] + [ModelCase("DiT-XL/2", 256)]
    kinds = [((case.group.split("/")[0], case.model, case.size), case) for case in (*blocks, *models)]
    return [dataclasses.replace(case, usual=kind in usual) for kind, case in kinds]


class _Step:
    """The model part of a training step: x_t, time and label to loss and gradients; on a GPU in autocast to bfloat16.

    x_t and the loss are in the layout that the training step gives the model: patch tokens for the kernels, images for
    plain PyTorch. All variants take the loss from the same op.
    """

    def __init__(self, case: ModelCase, device: torch.device):
        self.device, self.on_gpu = device, device.type == "cuda"
        self.model = _model(case, device)
        self.names, self.parameters = zip(*self.model.named_parameters(), strict=True)
        self.process = DiffusionProcess(get_schedule("cosine"), "v", device=device)
        generator = torch.Generator(device).manual_seed(0)
        how: dict[str, Any] = {"generator": generator, "device": device}
        shape = (_COPIES, case.size, self.model.in_channels, self.model.input_size, self.model.input_size)
        self.images = torch.randn(shape, **how).to(torch.bfloat16 if self.on_gpu else torch.float32).unbind()
        self.tokens = [patchify(image, self.model.token_patch).contiguous() for image in self.images]
        self.targets = torch.randn(shape, **how)
        self.t_index = torch.randint(len(self.process.schedule), (case.size,), **how)
        self.labels = torch.randint(self.model.num_classes, (case.size,), **how)

    def ours(self, copy: int) -> Tensors:
        self.model.kernels = True
        return self._of(self.model, self.tokens[copy], copy, self.model.token_patch)

    def baseline(self, wrap: Wrap) -> Callable[[int], Tensors]:
        forward = wrap(self.model)

        def call(copy: int) -> Tensors:
            self.model.kernels = False
            return self._of(forward, self.images[copy], copy, 0)

        return call

    def truth(self) -> Tensors:
        """Plain PyTorch in float32, a few images at a time."""
        self.model.kernels = False
        size = len(self.t_index)
        parts = [slice(begin, begin + CHUNK) for begin in range(0, size, CHUNK)]
        sums: Tensors = ()
        for part in parts:
            with torch.autocast(self.device.type, enabled=False):
                inputs = self.images[0][part].float(), self.process.time[self.t_index[part]], self.labels[part]
                found = self._loss(self.model(*inputs), self.targets[0][part], self.t_index[part], 0, size)
            sums = tuple(a + b for a, b in zip(sums, found, strict=True)) if sums else found
        return sums

    def _of(self, forward: Callable[..., Tensor], x: Tensor, copy: int, patch: int) -> Tensors:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.on_gpu):
            prediction = forward(x, self.process.time[self.t_index], self.labels)
        return self._loss(prediction, self.targets[copy], self.t_index, patch, len(self.t_index))

    def _loss(self, prediction: Tensor, target: Tensor, t_index: Tensor, patch: int, size: int) -> Tensors:
        how: dict[str, Any] = {"patch": patch, "batch_size": size, "compute_grad": True}
        result = self.process.loss(prediction.detach(), target, t_index, **how)
        return result.loss, *torch.autograd.grad(prediction, self.parameters, result.dprediction)


def _model(case: ModelCase, device: torch.device) -> DiffusionModel:
    overrides: dict[str, Any] = {"depth": 2 if case.model.startswith("U-ViT") else 1} if case.block else {}
    return random_model(case.model, device, **overrides)


def random_model(name: str, device: torch.device, **how: Any) -> DiffusionModel:
    """With drawn numbers throughout, in what begins as zero too, as the ends of DiT's branches do: most gradients would
    be zero otherwise. ``how``: arguments of :func:`create_model`."""
    model = create_model(name, device="meta", **how).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(1)
    with torch.no_grad():
        for part, tensor in (*model.named_parameters(), *model.named_buffers()):
            tensor.normal_(std=0.02, generator=generator)
            if "norm" in part and part.endswith("weight"):
                tensor += 1
    return model


def _workload(case: ModelCase, device: torch.device) -> Workload:
    step = _Step(case, device)
    blocks = sum(name.endswith("attn") for name, _ in step.model.named_modules())
    longest = max(parameter[0].numel() for parameter in step.parameters)
    off = relative(torch.bfloat16 if step.on_gpu else torch.float32, blocks, longest)

    def compare(found: Tensors, expected: Tensors, ours: bool) -> Iterator[Deviation]:
        for name, value, wanted in zip(["loss", *step.names], found, expected, strict=True):
            yield Deviation(name, distance(value, wanted), off)

    return Workload(
        _COPIES,
        step.ours,
        step.baseline,
        compare,
        truth=step.truth,
        flops=3 * case.size * model_flops(step.model),
        images=case.size,
    )


def relative(dtype: torch.dtype, blocks: int, terms: int) -> float:
    """By norm: rounding a tensor puts it off by half an eps at most, and float32 sums of n terms by sqrt(n) of theirs.
    What is independent adds up in squares, over the blocks and over what stands before and after them."""
    one = torch.finfo(dtype).eps / 2 + math.sqrt(terms) * EPS / 2
    return one * math.sqrt(_ROUNDED * (blocks + 1))


def distance(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return math.inf
    return float((found.double() - expected.double()).norm() / expected.double().norm())
