"""DiT: published sizes and names, and numbers against a second implementation written out here."""

import math
import time

import pytest
import torch
from torch import Tensor

from erd_fast.errors import ConfigError
from erd_fast.models import MODELS, DiT, create_model, model_flops
from erd_fast.nn.blocks import timestep_embedding

SMALL = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 3,
    "hidden_size": 24,
    "depth": 2,
    "num_heads": 3,
    "num_classes": 5,
}


def _small(**how) -> DiT:
    return DiT(**{**SMALL, **how})


# The published models with ImageNet's 1000 labels and the null label: parameters, and forward GMACs of one image.
@pytest.mark.parametrize(
    ("name", "parameters", "gmacs"),
    [
        ("DiT-S/2", 32_858_896, 6.05),
        ("DiT-B/2", 130_303_504, 23.00),
        ("DiT-L/2", 457_824_272, 80.69),
        ("DiT-XL/2", 674_816_272, 118.62),
    ],
)
def test_published_sizes(name, parameters, gmacs):
    model = create_model(name, device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert model_flops(model) / 2e9 == pytest.approx(gmacs, rel=0.005)


def test_flops_are_those_of_the_products():
    tokens, width, depth, patch = 16, 24, 2, 12
    macs = tokens * patch * width  # patches in
    macs += (256 + width) * width  # time
    # Conditioning; q, k, v and output; scores and their mix; the MLP.
    macs += depth * (6 * width**2 + 4 * tokens * width**2 + 2 * tokens**2 * width + 8 * tokens * width**2)
    macs += 2 * width**2 + tokens * patch * width  # last conditioning, patches out
    assert model_flops(_small()) == 2 * macs


def test_flops_leave_the_model_as_it_was():
    model = _small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model_flops(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_state_dict_has_the_published_names():
    expected = {
        "pos_embed",
        "x_embedder.proj.weight",
        "x_embedder.proj.bias",
        "t_embedder.mlp.0.weight",
        "t_embedder.mlp.0.bias",
        "t_embedder.mlp.2.weight",
        "t_embedder.mlp.2.bias",
        "y_embedder.embedding_table.weight",
        "final_layer.linear.weight",
        "final_layer.linear.bias",
        "final_layer.adaLN_modulation.1.weight",
        "final_layer.adaLN_modulation.1.bias",
    }
    for block in range(2):
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"):
            expected |= {f"blocks.{block}.{layer}.weight", f"blocks.{block}.{layer}.bias"}
    assert set(_small().state_dict()) == expected
    assert set(_small(num_classes=0).state_dict()) == expected - {"y_embedder.embedding_table.weight"}
    assert "pos_embed" not in dict(_small().named_parameters())


def test_time_embedding_is_cosines_beside_sines():
    t = torch.tensor([0.0, 0.37, 1.0, 12.0, 999.0])
    found = timestep_embedding(t, 256)
    for row, moment in zip(found.tolist(), t.tolist(), strict=True):
        for i in range(128):
            frequency = 10_000.0 ** (-i / 128)
            # float32 rounds ln 10000 * i / 128 <= 9.2 twice, then exp and the product; an angle's error is the value's.
            bound = moment * frequency * (2 * 9.2 + 4) * 2.0**-24 + 2 * 2.0**-24
            assert abs(row[i] - math.cos(moment * frequency)) <= bound
            assert abs(row[128 + i] - math.sin(moment * frequency)) <= bound


def test_positions_are_columns_then_rows_of_sines_then_cosines():
    side, width = 4, 24
    found = _small().pos_embed[0].tolist()
    for row in range(side):
        for column in range(side):
            expected = []
            for place in (column, row):
                angles = [place / 10_000 ** (i / (width // 4)) for i in range(width // 4)]
                expected += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
            assert found[row * side + column] == pytest.approx(expected, abs=2.0**-24)


def _layer_norm(x: Tensor) -> Tensor:
    mean = x.sum(-1, keepdim=True) / x.shape[-1]
    variance = ((x - mean) ** 2).sum(-1, keepdim=True) / x.shape[-1]
    return (x - mean) / (variance + 1e-6) ** 0.5


def _linear(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return torch.einsum("...i,oi->...o", x, p[f"{name}.weight"]) + p[f"{name}.bias"]


def _silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


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


def _mlp(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    h = _linear(p, f"{name}.fc1", x)
    h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    return _linear(p, f"{name}.fc2", h)


def _straightforward(p: dict[str, Tensor], model: DiT, heads: int, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
    size, channels = model.patch_size, model.out_channels
    side = model.input_size // size
    kernel = p["x_embedder.proj.weight"]
    tokens = []
    for row in range(side):
        for column in range(side):
            patch = x[:, :, row * size : (row + 1) * size, column * size : (column + 1) * size]
            tokens.append(torch.einsum("nchw,dchw->nd", patch, kernel) + p["x_embedder.proj.bias"])
    h = torch.stack(tokens, dim=1) + p["pos_embed"]

    embedded = timestep_embedding(t, 256).double()  # its own test is above
    c = _linear(p, "t_embedder.mlp.2", _silu(_linear(p, "t_embedder.mlp.0", embedded)))
    if y is not None:
        c = c + torch.stack([p["y_embedder.embedding_table.weight"][label] for label in y.tolist()])

    for block in range(len(model.blocks)):
        name = f"blocks.{block}"
        m = _linear(p, f"{name}.adaLN_modulation.1", _silu(c)).unflatten(1, (6, -1)).unsqueeze(2)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (m[:, i] for i in range(6))
        h = h + gate_a * _attention(p, f"{name}.attn", (1 + scale_a) * _layer_norm(h) + shift_a, heads)
        h = h + gate_m * _mlp(p, f"{name}.mlp", (1 + scale_m) * _layer_norm(h) + shift_m)

    m = _linear(p, "final_layer.adaLN_modulation.1", _silu(c)).unflatten(1, (2, -1)).unsqueeze(2)
    patches = _linear(p, "final_layer.linear", (1 + m[:, 1]) * _layer_norm(h) + m[:, 0])
    out = torch.empty(len(x), channels, model.input_size, model.input_size, dtype=x.dtype)
    for row in range(side):
        for column in range(side):
            patch = patches[:, row * side + column].view(-1, size, size, channels)
            for i in range(size):
                for j in range(size):
                    out[:, :, row * size + i, column * size + j] = patch[:, i, j]
    return out


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"patch_size": 1, "input_size": 4},
        {"patch_size": 4},
        {"patch_size": 8, "input_size": 16},
        {"num_classes": 0},
        {"learn_sigma": True},
        {"null_label": False},
        {"mlp_ratio": 2.5, "num_heads": 1, "in_channels": 1},
    ],
    ids=lambda how: " ".join(f"{name}={value}" for name, value in how.items()) or "default",
)
def test_forward_and_backward_equal_a_straightforward_implementation(how):
    model = _small(**how).double()
    # The sinusoids of the time are float32 by definition; whoever runs a float64 model casts them, and so do we.
    model.t_embedder.mlp.register_forward_pre_hook(lambda _, inputs: inputs[0].double())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # zero branches would hide what is behind them
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    shape = (3, model.in_channels, model.input_size, model.input_size)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    t = torch.tensor([0.0, 0.6, 730.0])
    y = torch.tensor([4, 0, 4 + model.null_label]) if model.num_classes else None

    own = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for name, _ in model.named_parameters():
        own[name].requires_grad_()
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_runs_in_the_dtype_of_its_parameters(dtype):
    model = _small().to(dtype)
    out = model(torch.zeros(1, 3, 8, 8, dtype=dtype), torch.tensor([3.0]), torch.tensor([0]))
    assert out.dtype == dtype and not out.any()


def test_a_fresh_model_predicts_zero_and_its_blocks_pass_tokens_through():
    model = _small()
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 500.0]), torch.tensor([0, 5])
    assert (model(x, t, y) == 0).all()
    tokens = torch.randn(2, 16, 24)
    assert torch.equal(model.blocks[0](tokens, torch.randn(2, 24)), tokens)


def test_initial_parameters_have_the_published_scales():
    model = create_model("DiT-tiny/2", num_classes=1000)
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten(1) if parameter.dim() > 1 else parameter.detach()
        if name.endswith("bias") or "adaLN_modulation" in name or name.startswith("final_layer"):
            assert not values.any(), name
        elif name.startswith(("t_embedder", "y_embedder")):
            # The deviation of n normals is off by sqrt(1 / 2n) of itself; 5 of those.
            assert values.std().item() == pytest.approx(0.02, rel=5 * math.sqrt(0.5 / values.numel())), name
        else:
            bound = math.sqrt(6 / sum(values.shape))
            assert values.abs().max() <= bound * (1 + 2.0**-23), name
            assert values.abs().max() >= 0.99 * bound, name  # 3072 uniforms or more: missing it has chance 4e-14
            # A uniform's variance is bound^2 / 3; its square deviates from that by 2 / sqrt(5) of it.
            relative = 5 * 2 / math.sqrt(5 * values.numel())
            assert (values**2).mean().item() == pytest.approx(bound**2 / 3, rel=relative), name


def test_initial_parameters_follow_seed_and_name_alone():
    torch.manual_seed(0)
    one = _small(seed=3)
    torch.manual_seed(1)
    _small(seed=4)
    again, deeper, other = _small(seed=3), _small(seed=3, depth=4, num_classes=0), _small(seed=4)
    theirs, deep = other.state_dict(), deeper.state_dict()
    for name, value in one.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
        if name in deep:  # blocks keep their numbers when others are added
            assert torch.equal(value, deep[name]), name
        if name != "pos_embed" and value.any():
            assert not torch.equal(value, theirs[name]), name
    assert not torch.equal(one.blocks[0].attn.qkv.weight, one.blocks[1].attn.qkv.weight)


def test_the_null_label_is_the_last_row():
    model = _small()
    assert model.y_embedder.embedding_table.num_embeddings == 6
    assert _small(null_label=False).y_embedder.embedding_table.num_embeddings == 5
    x, t = torch.randn(1, 3, 8, 8), torch.zeros(1)
    model(x, t, torch.tensor([model.num_classes]))  # exists
    with pytest.raises(IndexError):
        _small(null_label=False)(x, t, torch.tensor([5]))


def test_the_largest_model_is_built_without_numbers_in_a_second():
    create_model("DiT-tiny/8", device="meta")  # the first model on meta makes torch import its shape functions
    begin = time.process_time()  # of this process: other work on the machine does not count
    model = create_model("DiT-XL/2", device="meta")
    assert time.process_time() - begin < 1.0
    assert all(value.is_meta for value in model.state_dict().values())


def test_names_give_width_and_patch():
    assert {f"DiT-{size}/{patch}" for size in ("tiny", "S", "B", "L", "XL") for patch in (1, 2, 4, 8)} <= set(MODELS)
    model = create_model("DiT-S/4", device="meta", input_size=64, num_classes=10)
    assert model.x_embedder.proj.kernel_size == (4, 4) and model.pos_embed.shape == (1, 256, 384)
    assert model.y_embedder.embedding_table.num_embeddings == 11


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"input_size": 9}, "input_size: given 9, allowed multiples of patch_size 2"),
        (
            {"hidden_size": 26, "num_heads": 13},
            "hidden_size: given 26, allowed multiples of 4 and of num_heads 13",
        ),
        ({"num_heads": 5}, "hidden_size: given 24, allowed multiples of 4 and of num_heads 5"),
        ({"num_classes": -1}, "num_classes: given -1, allowed 0 or more"),
        ({"depth": 0}, "depth: given 0, allowed 1 or more"),
        ({"patch_size": 0}, "patch_size: given 0, allowed 1 or more"),
    ],
)
def test_sizes_that_cannot_be_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        _small(**wrong)


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown model 'DiT-XL2' \(did you mean 'DiT-XL/2'\?\)"):
        create_model("DiT-XL2")
    with pytest.raises(ConfigError, match=r"unknown argument of DiT-S/2 'num_class' \(did you mean 'num_classes'\?\)"):
        create_model("DiT-S/2", num_class=10)


def test_wrong_inputs_say_what_is_allowed():
    x, t, y = torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"x: given \(1, 3, 8, 6\), allowed \(N, 3, 8, 8\)"):
        _small()(x[..., :6], t, y)
    with pytest.raises(ValueError, match="this model needs labels y"):
        _small()(x, t)
    with pytest.raises(ValueError, match="this model is unconditional, so y must be None"):
        _small(num_classes=0)(x, t, y)
