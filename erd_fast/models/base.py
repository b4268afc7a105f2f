"""What every model of the engine tells about itself, and the checks that models share."""

from torch import Tensor, nn

from erd_fast.errors import ConfigError


class DiffusionModel(nn.Module):
    """A network that predicts the diffusion target of x_t: ``model(x_t, t, y)``.

    Attributes:
        input_size: height and width of x_t.
        in_channels: channels of x_t.
        num_classes: labels are 0 ... num_classes - 1; 0 for an unconditional model, which takes no labels.
        null_label: the model has a learned label ``num_classes`` for images without one.
    """

    input_size: int
    in_channels: int
    num_classes: int
    null_label: bool

    def check_inputs(self, x: Tensor, y: Tensor | None) -> None:
        """Raise ValueError unless x is (N, C, H, W) as the model has them, and labels come if it takes them."""
        name, shape = type(self).__name__, (self.in_channels, self.input_size, self.input_size)
        if x.shape[1:] != shape:
            raise ValueError(f"{name}: x: given {tuple(x.shape)}, allowed (N, {', '.join(map(str, shape))})")
        if (y is None) != (self.num_classes == 0):
            need = "needs labels y" if y is None else "is unconditional, so y must be None"
            raise ValueError(f"{name}: this model {need}")


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
