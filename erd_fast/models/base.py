"""What every model of the engine tells about itself, and the checks that models share."""

import warnings

import torch
from torch import Tensor, nn

from erd_fast.errors import ConfigError
from erd_fast.ops.checks import autocast_dtype
from erd_fast.ops.patchify import patchify, unpatchify


class DiffusionModel(nn.Module):
    """A network that predicts the diffusion target of x_t: ``model(x_t, t, y)``.

    Attributes:
        input_size: height and width of x_t.
        in_channels: channels of x_t.
        num_classes: labels are 0 ... num_classes - 1; 0 for an unconditional model, which takes no labels.
        null_label: the model has a learned label ``num_classes`` for images without one.
        token_patch: p of the patch tokens (N, T, p p C), in the layout of :mod:`erd_fast.ops.patchify`, that the model
            takes and gives in place of images; 0 if it takes images alone.
        kernels: run the fused ops; False is plain PyTorch, what they are held against and compared with.
        residual: dtype of the residual stream that the fused ops keep; bfloat16 halves its traffic and loses digits.
        recompute: make normalised inputs and GELU's outputs again in the backward pass, in place of keeping them; None
            is on a GPU alone. The numbers are the same, but for the rounding of GELU on linear_gelu's backend cuda.
    """

    input_size: int
    in_channels: int
    num_classes: int
    null_label: bool
    token_patch: int = 0
    kernels: bool = True
    residual: torch.dtype = torch.float32
    recompute: bool | None = None

    def check_inputs(self, x: Tensor, y: Tensor | None) -> None:
        """Raise ValueError unless x is (N, C, H, W) as the model has them, or their tokens, and labels come if it takes
        them."""
        name, channels, side, patch = type(self).__name__, self.in_channels, self.input_size, self.token_patch
        allowed: list[tuple[int, ...]] = [(channels, side, side)]
        if patch:
            allowed.append(((side // patch) ** 2, patch**2 * channels))
        if x.shape[1:] not in allowed:
            forms = " or ".join(f"(N, {', '.join(map(str, form))})" for form in allowed)
            raise ValueError(f"{name}: x: given {tuple(x.shape)}, allowed {forms}")
        if (y is None) != (self.num_classes == 0):
            need = "needs labels y" if y is None else "is unconditional, so y must be None"
            raise ValueError(f"{name}: this model {need}")

    def fused(self, parameter: Tensor) -> bool:
        """Whether the fused ops run. They do not take float64, and they read the parameters of layers that they do not
        call: hooks on layers, and layers of other projects in their place, want plain PyTorch."""
        if not self.kernels or parameter.dtype == torch.float64:
            return False
        if torch.compiler.is_compiling() or (altered := self._altered()) is None:
            return True
        warnings.warn(
            f"{type(self).__name__}: {altered}, which the fused ops would pass over: the model runs in plain PyTorch "
            "(kernels = False is the same without this warning)",
            RuntimeWarning,
            stacklevel=3,
        )
        return False

    def _altered(self) -> str | None:
        """What somebody did to a layer within."""
        for name, module in self.named_modules():
            if module is self:
                continue
            if not type(module).__module__.startswith(("torch.nn.modules.", "erd_fast.")):
                return f"{name} is a {type(module).__name__}"
            if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
                return f"{name} has hooks"
        return None

    def as_tokens(self, x: Tensor) -> Tensor:
        """Images or their patch tokens as patch tokens."""
        return patchify(x, self.token_patch) if x.dim() == 4 else x

    def as_images(self, x: Tensor) -> Tensor:
        """Images or their patch tokens as images."""
        return unpatchify(x, self.token_patch, self.input_size, self.input_size) if x.dim() == 3 else x

    def compute_dtype(self, parameter: Tensor) -> torch.dtype:
        """The dtype of matrix products: autocast's where it is on, else the parameters'."""
        return autocast_dtype(parameter) or parameter.dtype


def check_sizes(model: str, *, num_classes: int, **sizes: int) -> None:
    """Raise ConfigError unless each of ``sizes`` is 1 or more, and ``num_classes`` 0 or more."""
    for name, value in sizes.items():
        if value < 1:
            raise ConfigError(f"{model}: {name}: given {value}, allowed 1 or more")
    if num_classes < 0:
        raise ConfigError(f"{model}: num_classes: given {num_classes}, allowed 0 or more")


def check_multiple(model: str, name: str, given: int, *of: tuple[str, int]) -> None:
    """Raise ConfigError unless ``given`` is a multiple of each of ``of``, (what it is, number)."""
    if any(given % number for _, number in of):
        allowed = " and of ".join(f"{what} {number}".strip() for what, number in of)
        raise ConfigError(f"{model}: {name}: given {given}, allowed multiples of {allowed}")
