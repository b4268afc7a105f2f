"""UViT: published sizes and names, and numbers against a second implementation written out here."""

import math
import time

import pytest
import torch
from torch import Tensor, nn

from erd_fast.errors import ConfigError
from erd_fast.models import create_model, model_flops
from erd_fast.models.uvit import SIZES, UViT
from erd_fast.nn.blocks import timestep_embedding

SMALL = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 3,
    "hidden_size": 24,
    "depth": 4,
    "num_heads": 3,
    "num_classes": 5,
}


def _small(**how) -> UViT:
    return UViT(**{**SMALL, **how})


def _published(name: str, **how) -> UViT:
    with torch.device("meta"):
        return UViT(**{**SIZES[name], **how})


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# ImageNet's 1000 labels and the null label on 4 x 32 x 32 latents: parameters, and forward GMACs of one image. Nobody
# has published S-D's 16.04; they are the sum of products in test_flops_are_those_of_the_products.
@pytest.mark.parametrize(
    ("name", "parameters", "gmacs"),
    [
        ("U-ViT-S/2", 44_772_516, 12.25),
        ("U-ViT-S-D/2", 58_425_508, 16.04),
        ("U-ViT-M/2", 130_891_940, 35.22),
        ("U-ViT-L/2", 286_763_172, 76.46),
        ("U-ViT-H/2", 500_832_016, 133.20),
    ],
)
def test_published_sizes(name, parameters, gmacs):
    model = _published(name)
    assert _count(model) == parameters
    assert model_flops(model) / 2e9 == pytest.approx(gmacs, rel=0.005)


CELEBA_64 = {"input_size": 64, "in_channels": 3, "num_classes": 0}
IMAGENET_64 = {"input_size": 64, "in_channels": 3, "null_label": False}
IMAGENET_512 = {"input_size": 64}


# (layers, D, patch, channels, side, labels, convolution) of the models that U-ViT was published with.
@pytest.mark.parametrize(
    ("name", "how", "layers", "D", "p", "C", "side", "labels", "conv"),
    [
        ("U-ViT-S/2", {}, 13, 512, 2, 4, 32, 1001, True),
        ("U-ViT-S-D/2", {}, 17, 512, 2, 4, 32, 1001, True),
        ("U-ViT-M/2", {}, 17, 768, 2, 4, 32, 1001, True),
        ("U-ViT-L/2", {}, 21, 1024, 2, 4, 32, 1001, True),
        ("U-ViT-H/2", {}, 29, 1152, 2, 4, 32, 1001, False),
        ("U-ViT-S/4", CELEBA_64, 13, 512, 4, 3, 64, 0, True),
        ("U-ViT-M/4", IMAGENET_64, 17, 768, 4, 3, 64, 1000, True),
        ("U-ViT-L/4", IMAGENET_64, 21, 1024, 4, 3, 64, 1000, True),
        ("U-ViT-L/4", IMAGENET_512, 21, 1024, 4, 4, 64, 1001, True),
        ("U-ViT-H/4", IMAGENET_512, 29, 1152, 4, 4, 64, 1001, False),
    ],
)
def test_parameters_are_those_of_the_architecture(name, how, layers, D, p, C, side, labels, conv):
    tokens = (side // p) ** 2 + (2 if labels else 1)
    block = 3 * D * D + (D * D + D) + (4 * D * D + 4 * D) + (4 * D * D + D) + 2 * 2 * D
    expected = (p * p * C * D + D) + labels * D + tokens * D
    expected += layers * block + (layers - 1) // 2 * (2 * D * D + D)
    expected += 2 * D + (D * p * p * C + p * p * C) + (9 * C * C + C if conv else 0)
    assert _count(_published(name, **how)) == expected


def test_the_convolution_of_the_huge_model_is_148_parameters():
    assert _count(_published("U-ViT-H/2", conv=True)) - _count(_published("U-ViT-H/2")) == 148


def test_the_tiny_model_costs_what_tiny_dit_costs():
    digits = {"input_size": 8, "in_channels": 1, "num_classes": 10}
    dit = create_model("DiT-tiny/2", device="meta", **digits)
    assert model_flops(_published("U-ViT-tiny/2", **digits)) == pytest.approx(model_flops(dit), rel=0.05)
    assert SIZES["U-ViT-tiny"] == SIZES["U-ViT-tiny/2"]


def test_flops_are_those_of_the_products():
    tokens, patches, width, depth, patch, channels, side = 18, 16, 24, 4, 12, 3, 8
    macs = patches * patch * width
    # q, k, v and output and the MLP; scores and their mix; the ends of the long skips.
    macs += (depth + 1) * (12 * tokens * width**2 + 2 * tokens**2 * width) + depth // 2 * 2 * tokens * width**2
    macs += tokens * width * patch + 9 * channels**2 * side**2
    assert model_flops(_small()) == 2 * macs


def test_state_dict_has_the_published_names():
    expected = {"pos_embed", "label_emb.weight"}
    plain = ["in_blocks.0", "in_blocks.1", "mid_block", "out_blocks.0", "out_blocks.1"]
    layers = ["patch_embed.proj", "norm", "decoder_pred", "final_layer", *(f"{b}.skip_linear" for b in plain[3:])]
    for block in plain:
        expected.add(f"{block}.attn.qkv.weight")
        layers += [f"{block}.{layer}" for layer in ("norm1", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")]
    for layer in layers:
        expected |= {f"{layer}.weight", f"{layer}.bias"}
    convolution = {"final_layer.weight", "final_layer.bias"}
    time_mlp = {f"time_embed.{i}.{what}" for i in (0, 2) for what in ("weight", "bias")}
    assert set(_small().state_dict()) == expected
    assert set(_small(num_classes=0).state_dict()) == expected - {"label_emb.weight"}
    assert set(_small(conv=False).state_dict()) == expected - convolution
    assert set(_small(mlp_time_embed=True).state_dict()) == expected | time_mlp
    assert set(dict(_small().named_parameters())) == expected


def _layer_norm(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    mean = x.sum(-1, keepdim=True) / x.shape[-1]
    variance = ((x - mean) ** 2).sum(-1, keepdim=True) / x.shape[-1]
    return (x - mean) / (variance + 1e-5) ** 0.5 * p[f"{name}.weight"] + p[f"{name}.bias"]


def _linear(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return torch.einsum("...i,oi->...o", x, p[f"{name}.weight"]) + p.get(f"{name}.bias", 0)


def _attention(p: dict[str, Tensor], name: str, x: Tensor, heads: int) -> Tensor:
    width = x.shape[-1]
    q, k, v = _linear(p, f"{name}.qkv", x).split(width, dim=-1)
    size, mixed = width // heads, []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        scores = torch.einsum("nik,njk->nij", q[..., part], k[..., part]) / math.sqrt(size)
        share = torch.exp(scores) / torch.exp(scores).sum(-1, keepdim=True)
        mixed.append(torch.einsum("nij,njk->nik", share, v[..., part]))
    return _linear(p, f"{name}.proj", torch.cat(mixed, dim=-1))


def _block(p: dict[str, Tensor], name: str, h: Tensor, heads: int) -> Tensor:
    h = h + _attention(p, f"{name}.attn", _layer_norm(p, f"{name}.norm1", h), heads)
    g = _linear(p, f"{name}.mlp.fc1", _layer_norm(p, f"{name}.norm2", h))
    return h + _linear(p, f"{name}.mlp.fc2", 0.5 * g * (1 + torch.erf(g / math.sqrt(2))))


def _straightforward(p: dict[str, Tensor], model: UViT, heads: int, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
    size, side, depth = model.patch_size, model.input_size // model.patch_size, 2 * len(model.in_blocks)
    time_token = timestep_embedding(t, p["pos_embed"].shape[-1]).double()  # its own test is in test_dit.py
    if "time_embed.0.weight" in p:
        hidden = _linear(p, "time_embed.0", time_token)
        time_token = _linear(p, "time_embed.2", hidden / (1 + torch.exp(-hidden)))
    tokens = [time_token]
    if y is not None:
        tokens = [torch.stack([p["label_emb.weight"][label] for label in y.tolist()]), time_token]
    for row in range(side):
        for column in range(side):
            patch = x[:, :, row * size : (row + 1) * size, column * size : (column + 1) * size]
            values = torch.einsum("nchw,dchw->nd", patch, p["patch_embed.proj.weight"])
            tokens.append(values + p["patch_embed.proj.bias"])
    h = torch.stack(tokens, dim=1) + p["pos_embed"]

    kept = {}
    for i in range(depth // 2):
        h = kept[i] = _block(p, f"in_blocks.{i}", h, heads)
    h = _block(p, "mid_block", h, heads)
    for i in range(depth // 2):
        joined = torch.cat((h, kept[depth // 2 - 1 - i]), dim=-1)  # the last in is the first out
        h = _block(p, f"out_blocks.{i}", _linear(p, f"out_blocks.{i}.skip_linear", joined), heads)

    values = _linear(p, "decoder_pred", _layer_norm(p, "norm", h))
    out = torch.empty_like(x)
    for row in range(side):
        for column in range(side):
            patch = values[:, len(tokens) - side * side + row * side + column].view(len(x), size, size, -1)
            for i in range(size):
                for j in range(size):
                    out[:, :, row * size + i, column * size + j] = patch[:, i, j]
    return _convolution(p, out) if "final_layer.weight" in p else out


def _convolution(p: dict[str, Tensor], x: Tensor) -> Tensor:
    n, channels, height, width = x.shape
    padded = torch.zeros(n, channels, height + 2, width + 2, dtype=x.dtype)
    padded[:, :, 1:-1, 1:-1] = x
    out = p["final_layer.bias"][None, :, None, None]
    for i in range(3):
        for j in range(3):
            window = padded[:, :, i : i + height, j : j + width]
            out = out + torch.einsum("nchw,oc->nohw", window, p["final_layer.weight"][:, :, i, j])
    return out


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"depth": 2},
        {"depth": 6},
        {"patch_size": 1, "input_size": 4},
        {"patch_size": 4},
        {"num_classes": 0},
        {"null_label": False},
        {"conv": False},
        {"mlp_time_embed": True},
        {"mlp_ratio": 2.5, "num_heads": 1, "in_channels": 1},
    ],
    ids=lambda how: " ".join(f"{name}={value}" for name, value in how.items()) or "default",
)
def test_forward_and_backward_equal_a_straightforward_implementation(how):
    model = _small(**how).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # biases of zero and norms of one would hide what they are for
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    shape = (3, model.in_channels, model.input_size, model.input_size)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    t = torch.tensor([0.0, 0.6, 730.0])
    y = torch.tensor([4, 0, 4 + model.null_label]) if model.num_classes else None

    own = {name: value.detach().clone().requires_grad_() for name, value in model.state_dict().items()}
    own_x = x.detach().clone().requires_grad_()
    found, expected = model(x, t, y), _straightforward(own, model, how.get("num_heads", 3), own_x, t, y)
    direction = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    (found * direction).sum().backward()
    (expected * direction).sum().backward()

    # float64 has 2^-53 a rounding; values pass some 1000 of them, and a softmax or LayerNorm may magnify their error
    # some 100 times: 1e-10 is generous to rounding, and 1e7 times smaller than any wrong term.
    pairs = {"output": (found, expected), "x": (x.grad, own_x.grad)}
    pairs |= {name: (parameter.grad, own[name].grad) for name, parameter in model.named_parameters()}
    for name, (ours, theirs) in pairs.items():
        assert theirs.abs().max() > 1e-3, name
        assert (ours - theirs).abs().max() <= 1e-10 * theirs.abs().max(), name


def test_what_becomes_of_an_image_does_not_depend_on_the_others():
    model = _small()
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    first = model(x, torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1, 2]))[0]
    first.square().sum().backward()
    assert x.grad[0].any() and not x.grad[1:].any()
    others = torch.cat((x[:1].detach(), torch.zeros(2, 3, 8, 8)))
    # The same bits: a batch of one shape is computed in one way.
    assert torch.equal(first, model(others, torch.tensor([1.0, 500.0, 0.0]), torch.tensor([0, 5, 5]))[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mlp_time_embed", [False, True])
def test_a_model_runs_in_the_dtype_of_its_parameters(dtype, mlp_time_embed):
    model = _small(mlp_time_embed=mlp_time_embed).to(dtype)
    out = model(torch.zeros(1, 3, 8, 8, dtype=dtype), torch.tensor([3.0]), torch.tensor([0]))
    assert out.dtype == dtype and out.isfinite().all()


def test_initial_parameters_have_the_published_scales():
    model = _small(hidden_size=96, mlp_time_embed=True, num_classes=300)
    for name, parameter in model.named_parameters():
        values = parameter.detach()
        if name in ("patch_embed.proj.weight", "patch_embed.proj.bias", "final_layer.weight", "final_layer.bias"):
            bound = 1 / math.sqrt(3 * (4 if name.startswith("patch_embed") else 9))  # channels x pixels of the kernel
            assert 0 < values.abs().max() <= bound * (1 + 2.0**-23), name
            # A uniform's variance is bound^2 / 3; its square deviates from that by 2 / sqrt(5) of it.
            relative = 5 * 2 / math.sqrt(5 * values.numel())
            assert (values**2).mean().item() == pytest.approx(bound**2 / 3, rel=relative), name
        elif name.endswith("bias"):
            assert not values.any(), name
        elif "norm" in name:
            assert (values == 1).all(), name
        else:
            std = 1.0 if name == "label_emb.weight" else 0.02
            # The deviation of n normals is off by sqrt(1 / 2n) of itself, their mean by sqrt(1 / n); 5 of those.
            assert values.std().item() == pytest.approx(std, rel=5 * math.sqrt(0.5 / values.numel())), name
            assert abs(values.mean().item()) <= 5 * std / math.sqrt(values.numel()), name


def test_positions_of_the_tiny_model_begin_large_enough_to_be_told_apart():
    sizes = {name: SIZES[name].get("pos_std", 0.02) for name in SIZES}
    assert {name for name, std in sizes.items() if std != 0.02} == {"U-ViT-tiny", "U-ViT-tiny/2", "U-ViT-tiny/4"}
    narrow, wide = _small(seed=3), _small(seed=3, pos_std=0.5)
    for name, value in wide.state_dict().items():
        # One product of the same normals, by another factor.
        factor = 25.0 if name == "pos_embed" else 1.0
        assert torch.allclose(value, factor * narrow.state_dict()[name], rtol=4 * 2.0**-24, atol=0), name


def test_initial_parameters_follow_seed_and_name_alone():
    torch.manual_seed(0)
    one = _small(seed=3)
    torch.manual_seed(1)
    again, deeper, other = _small(seed=3), _small(seed=3, depth=6), _small(seed=4)
    theirs, deep = other.state_dict(), deeper.state_dict()
    for name, value in one.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
        assert torch.equal(value, deep[name]), name  # blocks keep their numbers when others are added
        fixed = "norm" in name or (name.endswith("bias") and not name.startswith(("patch_embed", "final_layer")))
        assert torch.equal(value, theirs[name]) == fixed, name
    assert not torch.equal(one.in_blocks[0].attn.qkv.weight, one.in_blocks[1].attn.qkv.weight)


def test_a_state_dict_carries_the_whole_model():
    one, other = _small(seed=1), _small(seed=2)
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 500.0]), torch.tensor([0, 5])
    expected = one(x, t, y)
    assert not torch.allclose(other(x, t, y), expected, rtol=0.1)
    other.load_state_dict({name: value.clone() for name, value in one.state_dict().items()})
    assert torch.equal(other(x, t, y), expected)


def test_a_model_says_what_it_takes():
    model = _small(null_label=False)
    assert (model.input_size, model.in_channels, model.num_classes, model.null_label) == (8, 3, 5, False)
    assert _small().pos_embed.shape == (1, 18, 24)
    assert _small(num_classes=0).pos_embed.shape == (1, 17, 24)


def test_the_null_label_is_the_last_row():
    assert _small().label_emb.num_embeddings == 6
    assert _small(null_label=False).label_emb.num_embeddings == 5
    x, t = torch.randn(1, 3, 8, 8), torch.zeros(1)
    _small()(x, t, torch.tensor([5]))  # exists
    with pytest.raises(IndexError):
        _small(null_label=False)(x, t, torch.tensor([5]))


def test_models_are_built_without_numbers_in_a_second():
    _published("U-ViT-tiny")  # the first model on meta makes torch import its shape functions
    for name in SIZES:
        begin = time.process_time()  # of this process: other work on the machine does not count
        model = _published(name)
        assert time.process_time() - begin < 1.0, name
        assert all(value.is_meta for value in model.state_dict().values()), name


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"input_size": 9}, "input_size: given 9, allowed multiples of patch_size 2"),
        ({"num_heads": 5}, "hidden_size: given 24, allowed multiples of 2 and of num_heads 5"),
        ({"hidden_size": 15}, "hidden_size: given 15, allowed multiples of 2 and of num_heads 3"),
        ({"depth": 13}, "depth: given 13, allowed even numbers"),
        ({"depth": 0}, "depth: given 0, allowed 1 or more"),
        ({"patch_size": 0}, "patch_size: given 0, allowed 1 or more"),
        ({"num_classes": -1}, "num_classes: given -1, allowed 0 or more"),
    ],
)
def test_sizes_that_cannot_be_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=f"UViT: {message}"):
        _small(**wrong)


def test_wrong_inputs_say_what_is_allowed():
    x, t, y = torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"UViT: x: given \(1, 3, 8, 6\), allowed \(N, 3, 8, 8\)"):
        _small()(x[..., :6], t, y)
    with pytest.raises(ValueError, match="UViT: this model needs labels y"):
        _small()(x, t)
    with pytest.raises(ValueError, match="UViT: this model is unconditional, so y must be None"):
        _small(num_classes=0)(x, t, y)
