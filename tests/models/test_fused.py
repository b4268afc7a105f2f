"""Models by the fused ops against the same models in plain PyTorch: predictions, gradients, and what they keep."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import graph
from torch.nn.attention import SDPBackend, sdpa_kernel

from erd_fast.models import DiffusionModel, create_model, model_flops
from erd_fast.ops import record, use_backend
from erd_fast.ops.patchify import patchify, unpatchify
from support.parity import no_worse

SIZES: dict[str, dict[str, Any]] = {
    "DiT-tiny/2": {"input_size": 8, "in_channels": 3, "num_classes": 10, "depth": 3},
    "DiT-S/4": {"input_size": 12, "num_classes": 0, "depth": 2, "hidden_size": 72, "num_heads": 3, "learn_sigma": True},
    "U-ViT-tiny": {"input_size": 8, "in_channels": 3, "num_classes": 10},
    "U-ViT-H/2": {"input_size": 8, "num_classes": 0, "depth": 4, "hidden_size": 72, "num_heads": 1},
}
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}


def make(name: str, **how: Any) -> DiffusionModel:
    """A model in which nothing is zero: at its start no branch reaches the stream."""
    model = create_model(name, **SIZES[name], **how)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def batch(model: DiffusionModel) -> tuple[Tensor, Tensor, Tensor | None]:
    """Three images, each with a time and a label of its own."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, model.in_channels, model.input_size, model.input_size, generator=generator)
    labels = torch.tensor([0, 7, 10]) if model.num_classes else None
    return x, torch.tensor([3.0, 500.0, 990.0]), labels


def results(model: DiffusionModel, autocast: bool = False, tokens: bool = False) -> list[Tensor]:
    """Prediction as an image, and the gradient of every parameter."""
    x, t, labels = batch(model)
    patch = model.token_patch if tokens else 0
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(patchify(x, patch), t, labels)
    out = unpatchify(out, patch, model.input_size, model.input_size)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    return [out.detach().float(), *torch.autograd.grad(out, list(model.parameters()), dout.to(out.dtype))]


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """Norm of the difference of all tensors together, relative."""
    pairs = zip(found, expected, strict=True)
    return float(sum((a - b).square().sum() for a, b in pairs).sqrt() / sum(b.square().sum() for b in expected).sqrt())


def exact(model: DiffusionModel) -> list[Tensor]:
    """:func:`results` of the model in float64, which is plain PyTorch."""
    x, t, labels = batch(model)
    wide = copy.deepcopy(model).double()
    out = wide(x.double(), t, labels)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).double()
    return [out.detach(), *torch.autograd.grad(out, list(wide.parameters()), dout)]


def held(found: list[Tensor], plain: list[Tensor], truth: list[Tensor], rounding: float) -> None:
    """Prediction, and all gradients together: no further from the truth than twice plain PyTorch."""
    for part in (slice(0, 1), slice(1, None)):
        error, limit = (distance(values[part], truth[part]) for values in (found, plain))
        assert error <= 2 * limit + rounding


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("recompute", [False, True])
def test_in_float32_predictions_and_gradients_are_those_of_plain_pytorch(name, recompute):
    model = make(name, recompute=recompute)
    fused = results(model)
    model.kernels = False
    held(fused, results(model), exact(model), UNIT[torch.float32])


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16])
def test_in_bfloat16_they_err_no_more_than_plain_pytorch(name, residual):
    """Truth is the model in float64; plain PyTorch runs under autocast. A stream in bfloat16 is rounded at each of the
    branches' ends besides, relative to its size and once each: as many units as there are ends, at most."""
    model = make(name, residual=residual)
    fused = results(model, autocast=True)
    model.kernels = False
    plain = results(model, autocast=True)
    ends = 2 * sum(part.endswith("mlp") for part, _ in model.named_modules())
    rounding = ends * UNIT[torch.bfloat16] if residual == torch.bfloat16 else 0.0
    held(fused, plain, exact(model), UNIT[torch.bfloat16] + rounding)


@pytest.mark.parametrize("name", SIZES)
def test_tokens_in_are_tokens_out(name):
    model = make(name)
    for kernels in (True, False):
        model.kernels = kernels
        for value, expected in zip(results(model, tokens=True), results(model), strict=True):
            assert torch.equal(value, expected)
    with pytest.raises(ValueError, match=r"x: given \(3, 5, 7\), allowed \(N, \d, \d+, \d+\) or \(N, \d+, \d+\)"):
        model(torch.zeros(3, 5, 7), *batch(model)[1:])


@pytest.mark.parametrize("name", ["DiT-tiny/2", "U-ViT-tiny"])
@pytest.mark.parametrize("autocast", [False, True])
def test_what_is_made_again_has_the_same_bits(name, autocast):
    kept, made = (results(make(name, recompute=recompute), autocast) for recompute in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(kept, made, strict=True))


@pytest.mark.parametrize("name", ["DiT-tiny/2", "U-ViT-tiny"])
def test_a_sample_does_not_depend_on_its_neighbours(name):
    model = make(name)
    x, t, labels = batch(model)
    assert labels is not None
    alone = [model(x[1:2], t[1:2], labels[1:2])]
    model.kernels = False
    no_worse(alone, [model(x, t, labels)[1:2]], [exact(model)[0][1:2]])


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
@pytest.mark.parametrize("name", ["DiT-tiny/2", "U-ViT-tiny"])
def test_it_compiles_into_one_graph(name):
    model = make(name)
    compiled = copy.deepcopy(model)
    compiled.forward = torch.compile(compiled.forward, fullgraph=True, backend="aot_eager")  # type: ignore[method-assign]
    found = results(compiled)
    model.kernels = False
    held(found, results(model), exact(model), UNIT[torch.float32])


def test_kernels_change_no_count_of_flops():
    model = make("DiT-tiny/2")
    count = model_flops(model)
    assert model.kernels and count > 0
    model.kernels = False
    assert model_flops(model) == count


def kept_bytes(depth: int, samples: int, **how: Any) -> int:
    """Bytes that autograd keeps of a forward pass under bfloat16 autocast: of each storage once."""
    sizes = {"input_size": 16, "num_classes": 0, "hidden_size": 64, "num_heads": 2}
    model = create_model("DiT-S/2", depth=depth, **sizes, **how)
    storages: dict[int, Tensor] = {}
    original = graph.saved_tensors_hooks

    class Noting(original):
        def __init__(self, pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]):
            def note(tensor: Tensor) -> Any:
                packed = pack(tensor)
                if isinstance(packed, Tensor):
                    storages[packed.untyped_storage().data_ptr()] = packed
                return packed

            super().__init__(note, unpack)

    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(graph, "saved_tensors_hooks", Noting)  # blocks within use it too
        with Noting(lambda tensor: tensor, lambda kept: kept):
            model(torch.randn(samples, 4, 16, 16), torch.ones(samples))
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"kernels": False}, 48),
        ({"recompute": False}, 36),
        ({"recompute": True}, 24),
        ({"recompute": True, "residual": torch.bfloat16}, 22),
    ],
    ids=["plain", "kept", "recomputed", "recomputed-bf16"],
)
def test_a_block_keeps_what_docs_models_md_says(how, expected):
    """Bytes an element of (N, T, D), from differences of two depths and two batches, so that weights do not count."""
    counts = [[kept_bytes(depth, samples, **how) for samples in (1, 2)] for depth in (1, 2)]
    found = (counts[1][1] - counts[1][0] - counts[0][1] + counts[0][0]) / (64 * 64)
    by_token, by_sample = 2 * 2 * 4 + 2 * 4, 6 * 64 * 2  # mean and rstd of two norms, lse of two heads; the modulation
    assert expected <= found <= expected + (by_token * 64 + 2 * by_sample) / (64 * 64)


def test_named_backends_reach_the_ops_of_a_model():
    model = make("DiT-tiny/2")
    with use_backend("reference"), record() as recording:
        model(*batch(model))
    for op in ("ada_layer_norm", "residual_ada_layer_norm", "linear_gelu", "attention"):
        assert recording.backends[op] == ["reference"]


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # torch.func.jvp's own
@pytest.mark.parametrize("name", ["DiT-tiny/2", "U-ViT-tiny"])
def test_transforms_go_through_models(name):
    model = make(name, recompute=True)
    x, t, labels = batch(model)

    plain, wide = copy.deepcopy(model), copy.deepcopy(model).double()
    plain.kernels = False

    def derivatives(one: DiffusionModel, x: Tensor) -> list[Tensor]:
        def predict(x: Tensor) -> Tensor:
            return one(x, t, labels)

        gradient = torch.func.grad(lambda x: predict(x).square().sum())(x)
        return [gradient, torch.func.jvp(predict, (x,), (torch.ones_like(x),))[1]]

    found = derivatives(model, x)
    with sdpa_kernel(SDPBackend.MATH):  # PyTorch's others have no forward mode
        no_worse(found, derivatives(plain, x), derivatives(wide, x.double()))


def test_models_run_on_shapes_alone():
    for name in ("DiT-tiny/2", "U-ViT-tiny"):
        model = make(name).to("meta")
        x, t, labels = (value.to("meta") for value in batch(model))
        assert model(x, t, labels).shape == x.shape


@pytest.mark.parametrize("name", ["DiT-tiny/2", "U-ViT-tiny"])
def test_hooks_and_layers_of_others_are_not_passed_over(name):
    model = make(name)
    expected = results(model)
    blocks = list(getattr(model, "blocks", None) or model.in_blocks)
    seen = []
    handle = blocks[0].mlp.register_forward_hook(lambda *given: seen.append(given))
    with pytest.warns(RuntimeWarning, match=r"blocks\.0\.mlp has hooks, .* the model runs in plain PyTorch"):
        results(model)
    assert len(seen) == 1
    handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(results(model), expected, strict=True))

    class Adapter(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    layer = blocks[0].mlp.fc1
    layer.__class__ = Adapter
    with pytest.warns(RuntimeWarning, match=r"mlp\.fc1 is a Adapter"):
        assert not torch.equal(results(model)[0], expected[0])
