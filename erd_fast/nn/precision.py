"""Parameters of matrix products in low precision, with their float32 values beside them."""

import torch
from torch import Tensor, nn


@torch.no_grad()
def lower_precision(model: nn.Module, dtype: torch.dtype) -> dict[nn.Parameter, Tensor]:
    """Cast the parameters of linear layers and convolutions to ``dtype``, and return what they were.

    Norms, embeddings and positions stay float32: they are added or looked up, and no product reads them. What is
    returned are the ``masters`` of :class:`erd_fast.optim.AdamWEMA`, so that training begins at the same values as in
    float32.
    """
    masters: dict[nn.Parameter, Tensor] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            masters |= {parameter: parameter.detach().clone() for parameter in module.parameters(recurse=False)}
            module.to(dtype)
    model.to(next(model.parameters()).device)  # as after any .to(), a model may put parameters next to each other
    return masters
