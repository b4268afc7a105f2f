"""lower_precision: what products read, as copies; the rest stays."""

import pytest
import torch
from torch import nn

from erd_fast.models import create_model
from erd_fast.nn.joined import _adjacent
from erd_fast.nn.precision import lower_precision

SIZES = {"hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 3}


def _forward(model: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(2, model.in_channels, model.input_size, model.input_size, dtype=dtype)
    return model(x, torch.tensor([3.0, 700.0]), torch.tensor([0, 2]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("DiT-tiny/2", {"input_size": 8, **SIZES}),
        ("U-ViT-tiny", {"input_size": 8, **SIZES}),
        ("U-ViT-tiny", {"input_size": 8, "mlp_time_embed": True, **SIZES}),
        ("ADM-tiny", {"num_classes": 3}),
    ],
    ids=["dit", "uvit", "uvit-mlp", "adm"],
)
def test_products_are_lowered_and_the_model_runs_without_autocast(name, how, dtype):
    model = create_model(name, **how)
    before = {n: parameter.detach().clone() for n, parameter in model.named_parameters()}
    masters = lower_precision(model, dtype)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)]
    products = {parameter for layer in layers for parameter in layer.parameters(recurse=False)}
    assert masters.keys() == products
    for n, parameter in model.named_parameters():
        assert parameter.dtype == (dtype if parameter in products else torch.float32)
        assert torch.equal(masters.get(parameter, parameter), before[n])
    with torch.no_grad():
        assert _forward(model, dtype).dtype == dtype


def test_joined_layers_stay_joined():
    model = create_model("DiT-tiny/2", input_size=8, **SIZES)
    lower_precision(model, torch.bfloat16)
    layers = model._conditioned()
    assert _adjacent([layer.weight for layer in layers]) and _adjacent([layer.bias for layer in layers])
