"""Models on a GPU: every choice of backends against plain PyTorch, in a CUDA graph, and without waiting."""

from typing import Any

import pytest
import torch
from torch import Tensor

from erd_fast.models import DiffusionModel, create_model
from erd_fast.ops import OPS, use_backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible to PyTorch"),
]
DEVICE = torch.device("cuda")
MODELS: dict[str, dict[str, Any]] = {"DiT-XL/2": {"depth": 2}, "DiT-S/2": {"depth": 3}, "U-ViT-H/2": {"depth": 2}}
CHOICES = ("auto", "triton", "linear_gelu=cuda", "attention=cudnn", "attention=flash", "reference")
BFLOAT16 = 2.0**-8


@pytest.fixture(params=CHOICES)
def choice(request: pytest.FixtureRequest) -> str:
    for op, _, backend in (part.rpartition("=") for part in request.param.split(",")):
        reasons = [OPS[name].why_not(backend) for name in ([op] if op else ("ada_layer_norm",)) if backend != "auto"]
        if any(reasons):
            pytest.skip(f"{reasons}")
    return request.param


def make(name: str, **how: Any) -> DiffusionModel:
    """A model in which nothing is zero."""
    model = create_model(name, num_classes=10, **MODELS[name], **how)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model.to(DEVICE)


class Pass:
    """Forward and backward of a model on a batch of its own: prediction and gradients."""

    def __init__(self, model: DiffusionModel, size: int = 3):
        generator = torch.Generator(DEVICE).manual_seed(2)
        self.model = model
        self.x, self.dout = torch.randn(2, size, 4, 32, 32, generator=generator, device=DEVICE)
        self.t = 900.0 * torch.rand(size, generator=generator, device=DEVICE)
        self.labels = torch.arange(size, device=DEVICE) * 3 % 11

    def __call__(self, autocast: bool = True) -> list[Tensor]:
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            out = self.model(self.x, self.t, self.labels)
        return [out.detach().float(), *torch.autograd.grad(out, list(self.model.parameters()), self.dout.to(out.dtype))]


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    pairs = zip(found, expected, strict=True)
    return float(sum((a - b).square().sum() for a, b in pairs).sqrt() / sum(b.square().sum() for b in expected).sqrt())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recompute", [False, True])
def test_they_err_no_more_than_plain_pytorch_under_autocast(choice, name, recompute):
    run = Pass(make(name, recompute=recompute))
    choice = "" if choice == "linear_gelu=cuda" and name.startswith("U-ViT") else choice  # it has GELU by tanh alone
    with use_backend(choice):
        fused = run()
    run.model.kernels = False
    plain, exact = run(), run(autocast=False)
    for part in (slice(0, 1), slice(1, None)):
        error, limit = (distance(values[part], exact[part]) for values in (fused, plain))
        assert error <= 2 * limit + BFLOAT16


@pytest.mark.parametrize("name", MODELS)
def test_a_captured_pass_computes_the_same(name):
    run = Pass(make(name))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):  # what is compiled, loaded and allocated by first calls is no part of the graph
            expected = run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = run()
    for tensor in found:
        tensor.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    # Libraries may take another algorithm, and flash attention adds in any order: roundings to bfloat16, no more.
    assert distance(found, expected) <= BFLOAT16


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_no_model_waits_for_the_device():
    run = Pass(make("DiT-S/2"))
    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
