"""What every model of the engine tells about itself."""

from torch import nn


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
