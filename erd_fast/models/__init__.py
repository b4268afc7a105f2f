"""Models by their published names, and what they cost."""

import inspect
from typing import Any

import torch
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from erd_fast.errors import ConfigError, unknown_name
from erd_fast.models.base import DiffusionModel
from erd_fast.models.dit import SIZES as _DIT_SIZES
from erd_fast.models.dit import DiT
from erd_fast.models.unet import SIZES as _UNET_SIZES
from erd_fast.models.unet import UNet
from erd_fast.models.uvit import SIZES as _UVIT_SIZES
from erd_fast.models.uvit import UViT

MODELS: dict[str, tuple[type[DiffusionModel], dict[str, Any]]] = {
    name: (build, size)
    for build, sizes in ((DiT, _DIT_SIZES), (UViT, _UVIT_SIZES), (UNet, _UNET_SIZES))
    for name, size in sizes.items()
}

__all__ = ["MODELS", "DiT", "DiffusionModel", "UNet", "UViT", "create_model", "model_flops"]


def create_model(
    name: str,
    *,
    device: torch.device | str = "cpu",
    kernels: bool = True,
    residual: torch.dtype = torch.float32,
    recompute: bool | None = None,
    **overrides: Any,
) -> DiffusionModel:
    """Build the model called ``name``, e.g. ``create_model("DiT-XL/2", num_classes=0)``.

    Args:
        device: ``"meta"`` builds shapes without numbers.
        kernels, residual, recompute: how it computes, attributes of :class:`DiffusionModel` that may change later.
        overrides: arguments of the model's class in place of the named size's.

    Raises:
        ConfigError: unknown name or argument, or a size that is not allowed.
    """
    if name not in MODELS:
        raise ConfigError(unknown_name("model", name, MODELS))
    build, size = MODELS[name]
    allowed = inspect.signature(build).parameters
    for argument in overrides:
        if argument not in allowed:
            raise ConfigError(unknown_name(f"argument of {name}", argument, allowed))
    with torch.device(device):
        model = build(**{**size, **overrides})
    model.kernels, model.residual, model.recompute = kernels, residual, recompute
    return model


def model_flops(model: DiffusionModel) -> int:
    """Forward FLOPs of one image, 2 a multiply-add, of matrix products, convolutions and attention alone.

    Counted by PyTorch's own counter, on shapes alone. Training costs three times as much.
    """
    named = (*model.named_parameters(), *model.named_buffers())
    shapes = {name: torch.empty_like(tensor, device="meta", dtype=torch.float32) for name, tensor in named}
    x = torch.empty(1, model.in_channels, model.input_size, model.input_size, device="meta")
    t = torch.zeros(1, device="meta")
    y = torch.zeros(1, dtype=torch.int64, device="meta") if model.num_classes else None
    kernels, model.kernels = model.kernels, False  # PyTorch's counter knows PyTorch's operators
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            functional_call(model, shapes, (x, t, y))
    finally:
        model.kernels = kernels
    return counter.get_total_flops()
