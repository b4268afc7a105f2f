"""ADM's U-Net: published sizes and names, and numbers against a second implementation written out here."""

import math
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from erd_fast.errors import ConfigError
from erd_fast.models import model_flops
from erd_fast.models.unet import SIZES, AttentionBlock, GroupNorm32, UNet
from erd_fast.nn.blocks import timestep_embedding

# Widths 64 and 96: two channels a group or more, since a bias before a norm of its own channel would have no gradient.
SMALL: dict[str, Any] = {
    "input_size": 8,
    "in_channels": 3,
    "model_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": (2, 3),
    "attention_resolutions": (4,),
    "num_heads": 2,
    "num_classes": 5,
}


def _small(**how) -> UNet:
    return UNet(**{**SMALL, **how})


def _named(name: str, **how) -> UNet:
    with torch.device("meta"):
        return UNet(**{**SIZES[name], **how})


def _randomized(model: UNet, generator: torch.Generator) -> UNet:
    with torch.no_grad():  # zero branches would hide what is behind them
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.1 * noise + (parameter == 1))  # the scales of norms stay near 1
    return model


def _blocks(size: dict[str, Any]) -> Iterator[tuple[int, int, int, bool]]:
    """(channels in, channels out, pixels, attention) of each residual block, from the published description alone."""
    widths = [multiple * size["model_channels"] for multiple in size["channel_mult"]]
    count, last = size["num_res_blocks"], len(widths) - 1
    for level, width in enumerate(widths):
        side = size["input_size"] // 2**level
        attention = side in size["attention_resolutions"]
        before, below = widths[max(level - 1, 0)], widths[min(level + 1, last)]
        for channels in [before] + [width] * (count - 1):  # down
            yield channels, width, side**2, attention
        for channels in [below + width] + [2 * width] * (count - 1) + [width + before]:  # up, beside what was kept
            yield channels, width, side**2, attention
        if level < last:
            yield width, width, (side // 2) ** 2, False  # to the next level
            yield below, below, side**2, False  # and back
    yield widths[-1], widths[-1], side**2, True  # the middle
    yield widths[-1], widths[-1], side**2, False


def _expected(size: dict[str, Any], out_channels: int, labels: int) -> tuple[int, int]:
    """Parameters, and multiply-adds of one image."""
    base, first, ends = size["model_channels"], size["channel_mult"][0], size.get("in_channels", 3) + out_channels
    first, cond = first * base, 4 * base
    parameters = base * cond + cond + cond * cond + cond + labels * cond  # time, label
    parameters += 9 * ends * first + first + out_channels + 2 * first  # first and last convolution, last norm
    macs = base * cond + cond * cond + 9 * ends * first * size["input_size"] ** 2
    for channels, width, pixels, attention in _blocks(size):
        kernels = 9 * channels * width + 9 * width * width + (channels * width if channels != width else 0)
        parameters += kernels + width * (2 + (channels != width)) + 2 * channels + 2 * width + 2 * width * (cond + 1)
        macs += pixels * kernels + 2 * width * cond
        if attention:
            parameters += 4 * width**2 + 4 * width + 2 * width
            macs += pixels * 4 * width**2 + 2 * pixels**2 * width
    return parameters, macs


# 58.94 M is the size of the CelebA-64 model, 296 M the published one of ImageNet-64, whose checkpoint has 2C outputs.
@pytest.mark.parametrize(
    ("name", "how", "parameters"),
    [
        ("ADM-CelebA64", {}, 58_936_963),
        ("ADM-64", {"learn_sigma": True}, 295_904_454),
        ("ADM-64", {}, 295_899_267),
        ("ADM-tiny", {}, 1_152_897),
        ("ADM-tiny", {"num_classes": 0}, 1_151_489),
    ],
)
def test_published_sizes(name, how, parameters):
    model = _named(name, **how)
    labels = model.num_classes + model.null_label if model.num_classes else 0
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert parameters == _expected(SIZES[name], model.out_channels, labels)[0]


def test_what_the_sizes_mean():
    assert _named("ADM-CelebA64").label_emb is None
    assert _named("ADM-64").label_emb.num_embeddings == 1000
    for name, heads, new_order in (("ADM-CelebA64", {1}, False), ("ADM-64", {6, 9, 12}, True)):
        blocks = [module for module in _named(name).modules() if isinstance(module, AttentionBlock)]
        assert {block.num_heads for block in blocks} == heads
        assert all(block.new_order == new_order for block in blocks)


@pytest.mark.parametrize("name", [*SIZES, None])
def test_flops_are_those_of_the_products(name):
    model, size = (_named(name), SIZES[name]) if name else (_small(), SMALL)
    assert model_flops(model) == 2 * _expected(size, model.out_channels, 0)[1]


def test_state_dict_has_the_published_names():
    residual = {"in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3"}
    wider, attention = residual | {"skip_connection"}, {"norm", "qkv", "proj_out"}
    layers = {
        "input_blocks.1.0": residual,
        "input_blocks.2.0": residual,  # down
        "input_blocks.3.0": wider,
        "input_blocks.3.1": attention,
        "middle_block.0": residual,
        "middle_block.1": attention,
        "middle_block.2": residual,
        "output_blocks.0.0": wider,
        "output_blocks.0.1": attention,
        "output_blocks.1.0": wider,
        "output_blocks.1.1": attention,
        "output_blocks.1.2": residual,  # up
        "output_blocks.2.0": wider,
        "output_blocks.3.0": wider,
    }
    names = {f"{place}.{layer}" for place, parts in layers.items() for layer in parts}
    names |= {"time_embed.0", "time_embed.2", "input_blocks.0.0", "out.0", "out.2"}
    expected = {f"{name}.{kind}" for name in names for kind in ("weight", "bias")} | {"label_emb.weight"}
    found = _small().state_dict()
    assert set(found) == expected
    assert set(_small(num_classes=0).state_dict()) == expected - {"label_emb.weight"}
    assert found["middle_block.1.qkv.weight"].shape == (288, 96, 1)
    assert found["output_blocks.2.0.skip_connection.weight"].shape == (64, 160, 1, 1)
    assert found["output_blocks.2.0.emb_layers.1.weight"].shape == (128, 128)


def _conv(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    weight, bias = p[f"{name}.weight"], p[f"{name}.bias"]
    size, (height, width) = weight.shape[2], x.shape[2:]
    padded, total = F.pad(x, [size // 2] * 4), bias[:, None, None]
    for i in range(size):
        for j in range(size):
            part = padded[:, :, i : i + height, j : j + width]
            total = total + torch.einsum("ncij,dc->ndij", part, weight[:, :, i, j])
    return total


def _norm(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    groups = []
    for part in x.chunk(32, dim=1):
        mean = part.mean((1, 2, 3), keepdim=True)
        variance = ((part - mean) ** 2).mean((1, 2, 3), keepdim=True)
        groups.append((part - mean) / (variance + 1e-5) ** 0.5)
    return torch.cat(groups, dim=1) * p[f"{name}.weight"][:, None, None] + p[f"{name}.bias"][:, None, None]


def _linear(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return torch.einsum("ni,oi->no", x, p[f"{name}.weight"]) + p[f"{name}.bias"]


def _silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def _same(x: Tensor) -> Tensor:
    return x


def _halve(x: Tensor) -> Tensor:
    return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4


def _double(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def _residual(p: dict[str, Tensor], name: str, x: Tensor, c: Tensor, resample=_same) -> Tensor:
    h = _conv(p, f"{name}.in_layers.2", resample(_silu(_norm(p, f"{name}.in_layers.0", x))))
    modulation = _linear(p, f"{name}.emb_layers.1", _silu(c))[:, :, None, None]
    scale, shift = modulation[:, : h.shape[1]], modulation[:, h.shape[1] :]
    h = _conv(p, f"{name}.out_layers.3", _silu((1 + scale) * _norm(p, f"{name}.out_layers.0", h) + shift))
    x = resample(x)
    return h + (_conv(p, f"{name}.skip_connection", x) if f"{name}.skip_connection.weight" in p else x)


def _pointwise(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return torch.einsum("nct,dc->ndt", x, p[f"{name}.weight"][:, :, 0]) + p[f"{name}.bias"][:, None]


def _attention(p: dict[str, Tensor], name: str, x: Tensor, heads: int, new_order: bool) -> Tensor:
    qkv = _pointwise(p, f"{name}.qkv", _norm(p, f"{name}.norm", x).flatten(2))
    channels = x.shape[1]
    size, mixed = channels // heads, []
    for head in range(heads):
        starts = [part * channels + head * size if new_order else (3 * head + part) * size for part in range(3)]
        q, k, v = (qkv[:, start : start + size] for start in starts)
        root = 1 / math.sqrt(math.sqrt(size))
        scores = torch.exp(torch.einsum("nci,ncj->nij", q * root, k * root))
        mixed.append(torch.einsum("nij,ncj->nci", scores / scores.sum(-1, keepdim=True), v))
    return x + _pointwise(p, f"{name}.proj_out", torch.cat(mixed, dim=1)).view(x.shape)


def _straightforward(p: dict[str, Tensor], size: dict[str, Any], x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
    embedded = timestep_embedding(t, size["model_channels"]).double()  # tested in test_dit.py
    c = _linear(p, "time_embed.2", _silu(_linear(p, "time_embed.0", embedded)))
    if y is not None:
        c = c + torch.stack([p["label_emb.weight"][label] for label in y.tolist()])

    def attend(name: str, h: Tensor, always: bool = False) -> Tensor:
        if h.shape[-1] not in size["attention_resolutions"] and not always:
            return h
        heads = h.shape[1] // size["head_channels"] if "head_channels" in size else size["num_heads"]
        return _attention(p, name, h, heads, size.get("new_attention_order", False))

    levels, count = len(size["channel_mult"]), size["num_res_blocks"]
    h = _conv(p, "input_blocks.0.0", x)
    kept = [h]
    for level in range(levels):
        for _ in range(count):
            name = f"input_blocks.{len(kept)}"
            h = attend(f"{name}.1", _residual(p, f"{name}.0", h, c))
            kept.append(h)
        if level < levels - 1:
            h = _residual(p, f"input_blocks.{len(kept)}.0", h, c, _halve)
            kept.append(h)
    h = attend("middle_block.1", _residual(p, "middle_block.0", h, c), always=True)
    h = _residual(p, "middle_block.2", h, c)
    for number, skip in enumerate(reversed(kept)):
        name = f"output_blocks.{number}"
        attended = attend(f"{name}.1", _residual(p, f"{name}.0", torch.cat([h, skip], dim=1), c))
        last_of_level = number % (count + 1) == count and number < len(kept) - 1
        place = 2 if attended.shape[-1] in size["attention_resolutions"] else 1
        h = _residual(p, f"{name}.{place}", attended, c, _double) if last_of_level else attended
    return _conv(p, "out.2", _silu(_norm(p, "out.0", h)))


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"new_attention_order": True},
        {"num_heads": 1},
        {"head_channels": 32, "num_classes": 0},
        {"num_res_blocks": 2, "attention_resolutions": (8,), "in_channels": 1},
        {"channel_mult": (2, 2, 3), "attention_resolutions": (8, 2), "head_channels": 16, "new_attention_order": True},
        {"channel_mult": (2,), "attention_resolutions": (), "input_size": 3},
        {"learn_sigma": True, "null_label": False},
    ],
    ids=lambda how: " ".join(f"{name}={value}" for name, value in how.items()) or "default",
)
def test_forward_and_backward_equal_a_straightforward_implementation(how):
    generator = torch.Generator().manual_seed(0)
    model = _randomized(_small(**how).double(), generator)
    shape = (3, model.in_channels, model.input_size, model.input_size)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    t = torch.tensor([0.0, 0.6, 730.0])
    y = torch.tensor([4, 0, 4 + model.null_label]) if model.num_classes else None

    own = {name: value.detach().clone().requires_grad_() for name, value in model.state_dict().items()}
    own_x = x.detach().clone().requires_grad_()
    found, expected = model(x, t, y), _straightforward(own, {**SMALL, **how}, own_x, t, y)
    assert expected.shape == found.shape
    direction = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    (found * direction).sum().backward()
    (expected * direction).sum().backward()

    # float64 has 2^-53 a rounding; values pass some 1000 of them, and a softmax or a norm of two channels may magnify
    # their error some 100 times: 1e-10 is generous to rounding, and 1e7 times smaller than any wrong term.
    pairs = {"output": (found, expected), "x": (x.grad, own_x.grad)}
    pairs |= {name: (parameter.grad, own[name].grad) for name, parameter in model.named_parameters()}
    for name, (ours, theirs) in pairs.items():
        assert theirs.abs().max() > 1e-3, name
        assert (ours - theirs).abs().max() <= 1e-10 * theirs.abs().max(), name


def test_the_images_of_a_batch_do_not_mix():
    generator = torch.Generator().manual_seed(1)
    model = _randomized(_small().double(), generator)
    x = torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64)
    t, y = torch.tensor([0.0, 10.0, 400.0, 999.0]), torch.tensor([0, 1, 4, 5])
    together = model(x, t, y)
    for i in range(4):
        alone = model(x[i : i + 1], t[i : i + 1], y[i : i + 1])
        # Other orders of summation, bounded as above.
        assert (together[i] - alone[0]).abs().max() <= 1e-10 * together.abs().max()
    assert (together[0] - together[1]).abs().max() > 1e-3 * together.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_runs_in_the_dtype_of_its_parameters(dtype):
    model = _small().to(dtype)
    out = model(torch.zeros(1, 3, 8, 8, dtype=dtype), torch.tensor([3.0]), torch.tensor([0]))
    assert out.dtype == dtype and not out.any()


def test_norms_of_bfloat16_have_float32_statistics():
    generator = torch.Generator().manual_seed(2)
    x, dy = (torch.randn(2, 64, 8, 8, generator=generator).bfloat16() for _ in range(2))
    x = x + 100  # a mean that bfloat16 would round by up to a quarter
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        norm, given = GroupNorm32(64).to(dtype), x.to(dtype, copy=True).requires_grad_()
        y = norm(given)
        y.backward(dy.to(dtype))
        assert y.dtype == dtype
        results.append([value.double() for value in (y, given.grad, norm.weight.grad, norm.bias.grad)])
    for ours, truth in zip(*results, strict=True):
        # Half a bfloat16 step of the largest result, and as much again for the float32 before it.
        assert (ours - truth).abs().max() <= 2 * 2.0**-9 * truth.abs().max()


def test_a_fresh_model_predicts_zero_and_its_middle_passes_values_through():
    model = _small()
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 500.0]), torch.tensor([0, 5])
    assert (model(x, t, y) == 0).all()
    h = torch.randn(2, 96, 4, 4)
    assert torch.equal(model.middle_block(h, torch.randn(2, 128)), h)


def test_initial_parameters_have_pytorchs_distributions():
    parameters = dict(_small(num_classes=1000).named_parameters())
    zero = ("out_layers.3", "proj_out", "out.2")
    norms = ("in_layers.0", "out_layers.0", "norm", "out.0")
    for name, parameter in parameters.items():
        values, (layer, kind) = parameter.detach().double(), name.rsplit(".", 1)
        count = values.numel()
        if layer.endswith(norms):
            assert (values == (kind == "weight")).all(), name
        elif layer.endswith(zero):
            assert not values.any(), name
        elif layer == "label_emb":
            # The deviation of n normals is off by sqrt(1 / 2n) of itself; 5 of those.
            assert values.std().item() == pytest.approx(1, rel=5 * math.sqrt(0.5 / count)), name
        else:
            bound = 1 / math.sqrt(parameters[f"{layer}.weight"][0].numel())
            assert values.abs().max() <= bound * (1 + 2.0**-23), name
            # A uniform's variance is bound^2 / 3; its square deviates from that by 2 / sqrt(5) of it.
            assert (values**2).mean().item() == pytest.approx(bound**2 / 3, rel=10 / math.sqrt(5 * count)), name
            assert abs(values.mean().item()) <= 5 * bound / math.sqrt(3 * count), name


def test_initial_parameters_follow_seed_and_name_alone():
    torch.manual_seed(0)
    one = _small(seed=3)
    torch.manual_seed(1)
    again, unconditional, other = _small(seed=3), _small(seed=3, num_classes=0).state_dict(), _small(seed=4)
    theirs = other.state_dict()
    for name, value in one.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
        if name in unconditional:
            assert torch.equal(value, unconditional[name]), name
        if value.unique().numel() > 1:  # neither zeros nor ones
            assert not torch.equal(value, theirs[name]), name
    first, second = (one.input_blocks[i][0].in_layers[2].weight for i in (1, 2))
    assert not torch.equal(first, second)


def test_the_null_label_is_the_last_row():
    model = _small()
    assert model.label_emb.num_embeddings == 6
    x, t = torch.randn(1, 3, 8, 8), torch.zeros(1)
    model(x, t, torch.tensor([model.num_classes]))  # exists
    with pytest.raises(IndexError):
        _small(null_label=False)(x, t, torch.tensor([5]))


def test_attention_follows_pixels_and_never_leaves_the_middle():
    def places(**how) -> list[str]:
        return [name for name, module in _small(**how).named_modules() if isinstance(module, AttentionBlock)]

    assert places(attention_resolutions=()) == ["middle_block.1"]
    assert places(input_size=16) == ["middle_block.1"]  # levels of 16 and 8: none has 4
    of_level_0 = ["input_blocks.1.1", "middle_block.1", "output_blocks.2.1", "output_blocks.3.1"]
    assert places(attention_resolutions=[8]) == of_level_0


def test_every_size_is_built_without_numbers_in_a_second():
    _named("ADM-tiny")  # the first model on meta makes torch import its shape functions
    begin = time.process_time()  # of this process: other work on the machine does not count
    models = [_named(name) for name in SIZES]
    assert time.process_time() - begin < 1.0
    assert all(value.is_meta for model in models for value in model.state_dict().values())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"input_size": 9}, r"input_size: given 9, allowed multiples of 2\^\(levels - 1\) = 2"),
        ({"input_size": 0}, "input_size: given 0, allowed 1 or more"),
        ({"in_channels": 0}, "in_channels: given 0, allowed 1 or more"),
        ({"num_res_blocks": 0}, "num_res_blocks: given 0, allowed 1 or more"),
        ({"model_channels": 48}, "model_channels: given 48, allowed multiples of 32"),
        ({"model_channels": 0}, "model_channels: given 0, allowed 1 or more"),
        ({"channel_mult": ()}, r"channel_mult: given \(\), allowed one or more numbers from 1"),
        ({"channel_mult": [1, 0]}, r"channel_mult: given \(1, 0\), allowed one or more numbers from 1"),
        ({"num_heads": 5}, "num_heads: given 5, allowed divisors of the widths with attention, 96"),
        ({"num_heads": 0}, "num_heads: given 0, allowed divisors of the widths with attention, 96"),
        (
            {"head_channels": 96, "attention_resolutions": (8,)},
            "head_channels: given 96, allowed divisors of the widths with attention, 64, 96",
        ),
        ({"head_channels": 0}, "head_channels: given 0, allowed divisors of the widths with attention, 96"),
        ({"num_classes": -1}, "num_classes: given -1, allowed 0 or more"),
    ],
)
def test_sizes_that_cannot_be_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=f"UNet: {message}"):
        _small(**wrong)


def test_wrong_inputs_say_what_is_allowed():
    x, t, y = torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"UNet: x: given \(1, 3, 8, 6\), allowed \(N, 3, 8, 8\)"):
        _small()(x[..., :6], t, y)
    with pytest.raises(ValueError, match="UNet: this model needs labels y"):
        _small()(x, t)
    with pytest.raises(ValueError, match="UNet: this model is unconditional, so y must be None"):
        _small(num_classes=0)(x, t, y)
