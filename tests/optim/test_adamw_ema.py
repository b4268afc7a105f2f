"""AdamWEMA: PyTorch's AdamW, clipping, and an average that follows it."""

import copy
import math
import pickle
import re

import pytest
import torch
from torch import nn

from erd_fast.errors import ConfigError
from erd_fast.ops import record
from erd_fast.optim import AdamWEMA

HOW = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
SHAPES = ((4, 3), (7,), ())
STEPS = 20


def _parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in SHAPES]


def _set_gradients(parameters: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in parameters:
        size = 10.0 ** (step % 3 - 1)  # norms from 0.5 to 50, on both sides of the clip below
        parameter.grad = (size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)).to(
            parameter.dtype
        )


def _norm(parameters: list[nn.Parameter]) -> float:
    return math.sqrt(sum(value**2 for p in parameters for value in p.grad.double().flatten().tolist()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("ema_decay", [0.9999, 0.3, 0.0])
@pytest.mark.parametrize("grad_clip", [0.0, 3.0])
def test_steps_are_adamw_clipped_and_averaged(grad_clip, ema_decay, dtype):
    ours, theirs = _parameters(dtype), [nn.Parameter(p.detach().double()) for p in _parameters(dtype)]
    optimizer = AdamWEMA(ours, **HOW, ema_decay=ema_decay, grad_clip=grad_clip)
    adamw = torch.optim.AdamW(theirs, **HOW, fused=False, foreach=False)
    average = [p.detach().clone() for p in theirs]
    for step in range(STEPS):
        _set_gradients(ours, step)
        for own, other in zip(ours, theirs, strict=True):
            other.grad = own.grad.double().clone()
        norm = _norm(theirs)
        if grad_clip and norm > grad_clip:
            for other in theirs:
                other.grad *= grad_clip / norm
        optimizer.step()
        adamw.step()
        decay = min(ema_decay, (1 + step) / (10 + step))
        average = [decay * mean + (1 - decay) * p.detach() for mean, p in zip(average, theirs, strict=True)]

        # In the dtype, a step costs lr times 100 roundings of an update of about 1 (moments, powers, root, quotient)
        # and one of a parameter below 4; PyTorch clips by norm + 1e-6, 2e-6 of it at most: an update moves as much.
        rounding = torch.finfo(dtype).eps / 2
        bound = (step + 1) * (HOW["lr"] * (100 * rounding + (2e-6 if grad_clip else 0.0)) + 4 * rounding)
        assert abs(optimizer.grad_norm.item() - norm) <= 30 * rounding * norm  # before clipping; 20 summands
        for own, other, mean in zip(ours, theirs, average, strict=True):
            assert (own - other).abs().max() <= bound
            assert (optimizer.state[own]["ema"] - mean).abs().max() <= 2 * bound


def test_gradients_are_clipped_by_the_norm_over_all_groups():
    parameters = _parameters()
    optimizer = AdamWEMA([{"params": parameters[:1]}, {"params": parameters[1:]}], **HOW, grad_clip=3.0)
    _set_gradients(parameters, 2)
    before = [p.grad.clone() for p in parameters]
    norm = _norm(parameters)
    assert norm > 10
    optimizer.step()
    assert optimizer.grad_norm.item() == pytest.approx(norm, rel=30 * 2.0**-53)
    for parameter, gradient in zip(parameters, before, strict=True):
        assert torch.equal(parameter.grad, gradient)  # clipped on its way, not in place
        moved = optimizer.state[parameter]["exp_avg"] / 0.1
        assert torch.allclose(moved, gradient * 3.0 / norm, rtol=1e-6, atol=0)  # PyTorch's 1e-6 in the norm


def test_small_gradients_are_not_clipped():
    plain, clipped = _parameters(), _parameters()
    for parameters, grad_clip in ((plain, 0.0), (clipped, 3.0)):
        _set_gradients(parameters, 0)
        assert _norm(parameters) < 3
        AdamWEMA(parameters, **HOW, grad_clip=grad_clip).step()
    assert all(torch.equal(one, other) for one, other in zip(plain, clipped, strict=True))


def test_the_average_warms_up_from_the_initial_parameters():
    # With d = 1/10 at the first step the average moves nine tenths of the way from where training began.
    parameter = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = AdamWEMA([parameter], lr=0.5, ema_decay=0.9999)
    start = parameter.detach().clone()
    parameter.grad = torch.tensor([1.0, 1.0], dtype=torch.float64)
    optimizer.step()
    expected = 0.1 * start + 0.9 * parameter.detach()
    assert torch.allclose(optimizer.state[parameter]["ema"], expected, rtol=1e-15, atol=0)


def test_parameters_without_a_gradient_are_left_alone():
    first, second, third = _parameters()
    optimizer = AdamWEMA([first, second, third], **HOW)
    for step in range(3):
        _set_gradients([first, second, third], step)
        second.grad = None
        if step:
            third.grad = None
        kept = [p.detach().clone() for p in (second, third)]
        average = optimizer.state[third]["ema"].clone() if step else None
        optimizer.step()
        assert torch.equal(second, kept[0])
        if step:
            assert torch.equal(third, kept[1]) and torch.equal(optimizer.state[third]["ema"], average)
    before = second.detach().clone()
    with optimizer.swap_ema():
        assert torch.equal(second, before)  # its average is itself


def test_a_step_without_any_gradient_changes_nothing():
    parameters = _parameters()
    before = [p.detach().clone() for p in parameters]
    optimizer = AdamWEMA(parameters, **HOW, grad_clip=1.0)
    optimizer.step()
    assert all(torch.equal(p, kept) for p, kept in zip(parameters, before, strict=True))
    assert optimizer.grad_norm.item() == 0.0


def test_a_closure_gives_the_gradients_of_its_step():
    plain, closed = _parameters(), _parameters()
    one, other = AdamWEMA(plain, **HOW, grad_clip=3.0), AdamWEMA(closed, **HOW, grad_clip=3.0)
    for step in range(3):
        _set_gradients(plain, step)
        one.step()

        def closure(step: int = step) -> float:
            _set_gradients(closed, step)
            return 0.25 * step

        assert other.step(closure) == 0.25 * step
    for own, theirs in zip(plain, closed, strict=True):
        assert torch.equal(own, theirs)
        assert torch.equal(one.state[own]["ema"], other.state[theirs]["ema"])


def _trained(steps: int = 3) -> tuple[list[nn.Parameter], AdamWEMA]:
    parameters = _parameters(torch.float32)
    optimizer = AdamWEMA(parameters, **HOW)
    for step in range(steps):
        _set_gradients(parameters, step)
        optimizer.step()
    return parameters, optimizer


def test_swap_exchanges_contents_and_never_addresses():
    parameters, optimizer = _trained()
    averages = [optimizer.state[p]["ema"] for p in parameters]
    trained, averaged = ([t.detach().clone() for t in tensors] for tensors in (parameters, averages))
    addresses = [t.data_ptr() for t in (*parameters, *averages)]
    assert not any(torch.equal(one, other) for one, other in zip(trained, averaged, strict=True))

    def holds(values: list[torch.Tensor], means: list[torch.Tensor]) -> bool:
        now = [optimizer.state[p]["ema"] for p in parameters]
        assert [t.data_ptr() for t in (*parameters, *now)] == addresses
        pairs = (*zip(parameters, values, strict=True), *zip(now, means, strict=True))
        return all(torch.equal(one, other) for one, other in pairs)

    with optimizer.swap_ema():
        assert holds(averaged, trained)
        assert all(p.requires_grad for p in parameters)
    assert holds(trained, averaged)
    with pytest.raises(KeyError, match="from within"), optimizer.swap_ema():
        raise KeyError("from within")
    assert holds(trained, averaged)


def test_swap_before_the_first_step_changes_nothing():
    parameters = _parameters()
    before = [p.detach().clone() for p in parameters]
    with AdamWEMA(parameters, **HOW).swap_ema():
        assert all(torch.equal(p, kept) for p, kept in zip(parameters, before, strict=True))


def test_a_saved_optimizer_goes_on_bit_for_bit():
    parameters, optimizer = _trained()
    copies = [nn.Parameter(p.detach().clone()) for p in parameters]
    resumed = AdamWEMA(copies, **HOW)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(3, 6):
        for own, used in ((parameters, optimizer), (copies, resumed)):
            _set_gradients(own, step)
            used.step()
    for one, other in zip(parameters, copies, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(optimizer.state[one]["ema"], resumed.state[other]["ema"])


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        *(("ema_decay", decay, f"at least 0 and less than 1, got {decay}") for decay in (-0.1, 1.0, float("nan"))),
        ("ema_decay", (0.9,) * 5, "1 to 4 numbers, got 5"),
        ("ema_decay", "x", "at least 0 and less than 1, got 'x'"),
        ("betas", 0.9, "two numbers, got 0.9"),
        ("betas", (0.9, 0.95, 0.99), r"two numbers, got \(0.9, 0.95, 0.99\)"),
        ("betas", (0.9,), r"two numbers, got \(0.9,\)"),
        ("betas", (0.9, None), "at least 0 and less than 1, got None"),
        *((name, -1, r"at least 0 \(off\), got -1") for name in ("grad_clip", "warmup", "cosine_steps")),
    ],
)
def test_settings_outside_their_range_are_refused(name, value, allowed):
    with pytest.raises(ConfigError, match=f"AdamWEMA: {name} must be {allowed}"):
        AdamWEMA(_parameters(), **{name: value})


def test_several_averages_are_those_of_several_optimizers():
    decays = (0.9, 0.5, 0.99)
    several = _parameters(torch.float32)
    optimizer = AdamWEMA(several, **HOW, ema_decay=decays)
    others = [(_parameters(torch.float32), decay) for decay in decays]
    singles = [(parameters, AdamWEMA(parameters, **HOW, ema_decay=decay)) for parameters, decay in others]
    for step in range(12):
        for parameters, used in ((several, optimizer), *singles):
            _set_gradients(parameters, step)
            used.step()
    for index, (parameters, single) in enumerate(singles):
        for own, other in zip(several, parameters, strict=True):
            assert torch.equal(optimizer.average(own, index), single.average(other))
    with optimizer.swap_ema(2):
        assert torch.equal(several[0], singles[2][1].average(singles[2][0][0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_are_copies_of_masters(dtype):
    full, low = _parameters(torch.float32), _parameters(dtype)
    masters = dict(zip(low, (p.detach().clone() for p in full), strict=True))
    one, other = AdamWEMA(full, **HOW, grad_clip=3.0), AdamWEMA(low, **HOW, grad_clip=3.0, masters=masters)
    for step in range(5):
        _set_gradients(low, step)
        for mine, theirs in zip(full, low, strict=True):
            mine.grad = theirs.grad.float()
        one.step(), other.step()
    for mine, theirs in zip(full, low, strict=True):
        assert torch.equal(other.master(theirs), mine) and torch.equal(theirs, mine.to(dtype))
        assert torch.equal(other.average(theirs), one.average(mine))
    with other.swap_ema():
        assert all(torch.equal(p, other.average(p).to(dtype)) for p in low)
    assert all(torch.equal(p, other.master(p).to(dtype)) for p in low)
    resumed = AdamWEMA(low, **HOW, grad_clip=3.0)
    resumed.load_state_dict(copy.deepcopy(other.state_dict()))
    assert all(torch.equal(resumed.master(p), other.master(p)) for p in low)  # not rounded on the way


def test_a_main_gradient_goes_before_the_other():
    plain, main = _parameters(torch.float32), _parameters(torch.float32)
    one, other = AdamWEMA(plain, **HOW), AdamWEMA(main, **HOW)
    for step in range(3):
        _set_gradients(plain, step)
        for mine, theirs in zip(plain, main, strict=True):
            theirs.main_grad, theirs.grad = mine.grad.clone(), torch.full_like(mine, 1e6)
        one.step(), other.step()
    assert all(torch.equal(a, b) for a, b in zip(plain, main, strict=True))


def test_gradients_in_another_order_of_memory_are_those_of_the_parameter():
    plain, turned = (nn.Parameter(torch.arange(24.0).view(2, 3, 2, 2)) for _ in range(2))
    gradient = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    plain.grad, turned.grad = gradient, gradient.to(memory_format=torch.channels_last)
    for parameter in (plain, turned):
        AdamWEMA([parameter], **HOW).step()
    assert torch.equal(plain, turned)


def test_torchs_schedulers_set_the_rate():
    ours, theirs = _parameters(), _parameters()
    one, other = AdamWEMA(ours, **HOW), torch.optim.AdamW(theirs, **HOW)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(used, 10) for used in (one, other)]
    for step in range(10):
        for parameters, used, schedule in ((ours, one, schedules[0]), (theirs, other, schedules[1])):
            _set_gradients(parameters, step)
            used.step()
            schedule.step()
    for own, expected in zip(ours, theirs, strict=True):
        assert torch.allclose(own, expected, rtol=1e-9, atol=1e-12)


def test_a_group_that_joins_later_begins_at_its_own_first_step():
    early, late = _parameters()[:1], _parameters()[1:]
    fresh = [nn.Parameter(p.detach().clone()) for p in late]
    optimizer, alone = AdamWEMA(early, **HOW), AdamWEMA(fresh, **HOW)
    for step in range(6):
        _set_gradients([*early, *late], step)
        if step == 2:
            optimizer.add_param_group({"params": late})
        if step >= 2:
            for own, other in zip(late, fresh, strict=True):
                other.grad = own.grad.clone()
            alone.step()
        optimizer.step()
    for own, other in zip(late, fresh, strict=True):
        assert torch.equal(own, other) and torch.equal(optimizer.average(own), alone.average(other))


def test_float64_beside_float32_is_pytorchs():
    """Also in a step in which the float64 parameter has no gradient: what the optimizer counts is float64 then."""
    single, double = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3).double())
    optimizer = AdamWEMA([single, double], **HOW)
    single.grad = torch.ones(3)
    with record() as recording:
        optimizer.step()
    assert recording.backends["adamw_ema"] == ["reference"] and not torch.equal(single, torch.ones(3))


def test_parameters_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match=r"params: given torch.complex64"):
        AdamWEMA([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    with pytest.raises(ValueError, match=r"params: given strides \(2,\)"):
        AdamWEMA([nn.Parameter(torch.zeros(6)[::2])])


def test_a_state_of_another_optimizer_is_refused():
    with pytest.raises(
        ConfigError, match=r"state_dict must be one of an AdamWEMA, got keys \['param_groups', 'state'\]"
    ):
        AdamWEMA(_parameters()).load_state_dict(torch.optim.AdamW(_parameters()).state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_state_in_another_dtype_becomes_float32(dtype):
    """Of a checkpoint that was converted: read as float32 where they lie, its numbers would be others."""
    parameters = _parameters(torch.float32)
    optimizer = AdamWEMA(parameters, **HOW)
    _set_gradients(parameters, 0)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state |= {name: value.to(dtype) for name, value in state.items()}
    for resumed in (optimizer, AdamWEMA(parameters, **HOW)):  # with a state, whose memory is kept, and without
        resumed.load_state_dict(copy.deepcopy(saved))
        for number, parameter in enumerate(parameters):
            for name, value in resumed.state[parameter].items():
                assert value.dtype == torch.float32 and torch.equal(value, saved["state"][number][name].float())
        resumed.step()
        assert all(p.isfinite().all() and p.abs().max() < 10 for p in parameters)


@pytest.mark.parametrize("shape", [(1,), (3, 4), (12,)])
def test_a_state_of_another_shape_is_refused_and_nothing_is_changed(shape):
    parameters = _parameters(torch.float32)
    optimizer = AdamWEMA(parameters, **HOW)
    _set_gradients(parameters, 0)
    optimizer.step()
    before, saved = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["exp_avg_sq"] = torch.zeros(shape)
    saved["state"][1]["exp_avg"] += 1
    with pytest.raises(ConfigError, match=r"exp_avg_sq of parameter 0 must be floating point of shape \(4, 3\), got"):
        optimizer.load_state_dict(saved)
    for number, state in before["state"].items():
        assert all(torch.equal(optimizer.state[parameters[number]][name], value) for name, value in state.items())


def test_distributed_tensors_are_refused_by_name():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharded = nn.Parameter(distribute_tensor(torch.ones(4, 2), init_device_mesh("cpu", (1,))))
        with pytest.raises(ValueError, match="params must be plain tensors, got DTensor"):
            AdamWEMA([sharded])
    finally:
        dist.destroy_process_group()


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = AdamWEMA(embedding.parameters(), **HOW)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(
        ValueError, match=r"AdamWEMA: grad must be a plain dense tensor, got torch.sparse_coo \(of an emb"
    ):
        optimizer.step()


def test_a_thousand_steps_are_as_exact_as_pytorchs():
    """Against float64 at most twice the error of torch.optim.AdamW and a lerp, on one recorded run of gradients."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(2000, generator=generator, dtype=torch.float64).float()
    gradients = torch.randn(1000, 2000, generator=generator) * torch.logspace(-4, 1, 2000)
    how = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    results = {}
    for name, dtype in (("ours", torch.float32), ("torch", torch.float32), ("truth", torch.float64)):
        parameter = nn.Parameter(start.to(dtype, copy=True))
        ema = parameter.detach().clone()
        optimizer = AdamWEMA([parameter], **how) if name == "ours" else torch.optim.AdamW([parameter], **how)
        for step, gradient in enumerate(gradients):
            parameter.grad = gradient.to(dtype)
            optimizer.step()
            decay = min(0.9999, (1 + step) / (10 + step))
            ema.lerp_(parameter.detach(), 1 - decay)
        results[name] = (parameter.detach(), optimizer.average(parameter) if name == "ours" else ema)
    for ours, plain, truth in zip(results["ours"], results["torch"], results["truth"], strict=True):
        assert (ours - truth).abs().max() <= 2 * (plain - truth).abs().max()
        assert (ours - truth).square().mean() <= 4 * (plain - truth).square().mean()


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["copy", "pickle"]
)
def test_a_copy_goes_on_as_the_original(again):
    parameters, optimizer = _trained()
    others, copied = again((parameters, optimizer))
    for own, used in ((parameters, optimizer), (others, copied)):
        _set_gradients(own, 3)
        used.step()
    assert copied.counts.tolist() == [4, 0, 0]
    assert all(torch.equal(one, other) for one, other in zip(parameters, others, strict=True))


def test_a_gradient_that_is_turned_in_its_memory_is_seen():
    plain, turned = (nn.Parameter(torch.zeros(3, 3)) for _ in range(2))
    gradient = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    one, other = AdamWEMA([plain], **HOW), AdamWEMA([turned], **HOW)
    for value in (gradient, gradient.t()):
        plain.grad, turned.grad = value.contiguous(), value
        one.step(), other.step()
    assert torch.equal(plain, turned)


def test_a_state_of_other_averages_is_refused_and_one_of_float32_makes_masters():
    _, optimizer = _trained()
    with pytest.raises(ConfigError, match="state_dict: ema_decay must have 2 numbers in each group, got 1"):
        AdamWEMA(_parameters(torch.float32), **HOW, ema_decay=[0.9, 0.99]).load_state_dict(optimizer.state_dict())
    low = _parameters(torch.bfloat16)
    resumed = AdamWEMA(low, **HOW)
    resumed.load_state_dict(optimizer.state_dict())
    assert all(resumed.master(p).dtype == torch.float32 for p in low)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("betas", (0.9, 1.0), "betas must be at least 0 and less than 1, got 1.0"),
        ("lr", -1.0, "lr must be at least 0, got -1.0"),
        ("eps", -1.0, "eps must be at least 0, got -1.0"),
        ("weight_decay", -0.1, "weight_decay must be at least 0, got -0.1"),
        ("ema_decay", (0.9, 0.99), "ema_decay must have 1 numbers in each group, got 2"),
        ("grad_clip", -1.0, r"grad_clip must be at least 0 \(off\), got -1.0"),
    ],
)
def test_a_group_with_a_setting_outside_its_range_is_refused_and_does_not_join(name, value, allowed):
    first, second, _ = _parameters()
    optimizer = AdamWEMA([first])
    with pytest.raises(ConfigError, match=allowed):
        optimizer.add_param_group({"params": [second], name: value})
    assert len(optimizer.param_groups) == 1


def test_loading_a_state_keeps_the_memory_that_a_captured_step_reads():
    parameters, optimizer = _trained()
    saved = copy.deepcopy(optimizer.state_dict())
    own = [optimizer.counts, optimizer.grad_norm, optimizer._table.rows, optimizer._settings]
    own += [tensor for state in optimizer.state.values() for tensor in state.values()]
    addresses = [tensor.data_ptr() for tensor in own]
    optimizer.load_state_dict(saved)
    _set_gradients(parameters, 3)
    optimizer.step()
    now = [optimizer.counts, optimizer.grad_norm, optimizer._table.rows, optimizer._settings]
    now += [tensor for state in optimizer.state.values() for tensor in state.values()]
    assert [tensor.data_ptr() for tensor in now] == addresses


def _spoiled(saved: dict, *path: object, value: object = None) -> dict:
    """A state_dict whose entry at ``path`` is ``value``, or missing."""
    *outer, last = path
    inner = saved
    for key in outer:
        inner = inner[key]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return saved


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        *((("state", 1, name), None, f"parameter 1 must have .*, got a state without {name}$") for name in
          ("exp_avg", "exp_avg_sq")),
        (("state", 1, "ema_1"), None, "parameter 1 must have 2 averages, got 1"),
        (("state", 1, "ema"), None, "parameter 1 must have 2 averages, got 1"),
        (("state", 1), {}, "parameter 1 must have 2 averages, got 0"),
        (("state", 1), 7, "parameter 1 must have 2 averages, got 0"),
        (("state", 1, "exp_avg"), 0.5, r"exp_avg of parameter 1 must be floating point of shape \(7,\), got float"),
        (("state", 1, "exp_avg"), torch.zeros(7).long(), r"exp_avg of parameter 1 must be .*, got torch.int64 \(7,\)"),
        (("state", 1, "exp_avg"), torch.zeros(7).to_sparse(), "exp_avg of parameter 1 must be .*torch.sparse_coo"),
        (("state", 1, "exp_avg"), torch.zeros(7, device="meta"), "exp_avg of parameter 1 must be .* on meta"),
        (("state", 1, "master"), torch.zeros(7), "parameter 1 must be bfloat16 or float16 to have a master"),
        (("state", 5), {}, "state must be of parameters in a group, got 5"),
        (("erd_fast",), 5, r"counts must be torch.int64 of shape \(3,\), got NoneType"),
        (("erd_fast", "counts"), None, r"counts must be torch.int64 of shape \(3,\), got NoneType"),
        (("erd_fast", "counts"), torch.zeros(2).long(), r"counts must be .*, got torch.int64 \(2,\)"),
        (("erd_fast", "counts"), torch.zeros(3), r"counts must be .*, got torch.float32 \(3,\)"),
        (("erd_fast", "scalars"), None, r"scalars must be floating point of shape \(2,\), got NoneType"),
        (("erd_fast", "scalars"), torch.zeros(3), r"scalars must be .*, got torch.float32 \(3,\)"),
        (("erd_fast", "scalars"), torch.zeros(2).int(), r"scalars must be .*, got torch.int32 \(2,\)"),
        (("param_groups",), None, "must be one of an AdamWEMA, got keys"),
        (("state",), None, "must be one of an AdamWEMA, got keys"),
        *((("param_groups", 0, name), None, f"each group must have lr, .*, got one without {name}")
          for name in ("lr", "betas", "eps", "weight_decay", "ema_decay", "grad_clip", "warmup", "cosine_steps",
                       "start", "params")),
        (("param_groups", 0, "betas"), (0.9, 1.0), "betas must be at least 0 and less than 1, got 1.0"),
        (("param_groups", 0, "betas"), 0.9, "betas must be two numbers, got 0.9"),
        (("param_groups", 0, "lr"), "fast", "lr must be at least 0, got 'fast'"),
        (("param_groups", 0, "start"), -1, "start must be at least 0, got -1"),
        (("param_groups", 0, "ema_decay"), (0.9, 0.5, 0.1), "ema_decay must have 2 numbers in each group, got 3"),
    ],
)  # fmt: skip
def test_a_state_that_is_not_whole_is_refused_and_nothing_is_changed(path, value, message):
    parameters = _parameters(torch.float32)
    optimizer = AdamWEMA(parameters, **HOW, ema_decay=(0.9, 0.5))
    _set_gradients(parameters, 0)
    optimizer.step()
    before, saved = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["exp_avg"] += 1
    saved["erd_fast"]["counts"] += 1
    saved["param_groups"][0]["eps"] = 0.5
    with pytest.raises(ConfigError, match=f"AdamWEMA: state_dict:? {message}"):
        optimizer.load_state_dict(_spoiled(saved, *path, value=value))
    now = optimizer.state_dict()
    assert now["param_groups"] == before["param_groups"]
    assert torch.equal(now["erd_fast"]["counts"], before["erd_fast"]["counts"])
    for number, state in before["state"].items():
        assert now["state"][number].keys() == state.keys()
        assert all(torch.equal(now["state"][number][name], value) for name, value in state.items())


def test_a_state_of_some_parameters_is_loaded_and_so_is_one_of_low_precision():
    parameters = _parameters(torch.float32)
    optimizer = AdamWEMA(parameters, **HOW)
    parameters[1].grad = torch.ones(7)
    optimizer.step()
    low = _parameters(torch.bfloat16)
    resumed, again = AdamWEMA(low, **HOW), AdamWEMA(_parameters(torch.bfloat16), **HOW)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert list(resumed.state) == [low[1]] and torch.equal(resumed.average(low[1]), optimizer.average(parameters[1]))
    again.load_state_dict(copy.deepcopy(resumed.state_dict()))
    assert all(state["master"].dtype == torch.float32 for state in again.state.values())


def test_negative_views_are_gradients_by_their_values():
    """As the imaginary part of a conjugate: a bit says that its memory has the other sign."""
    plain, negative = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    one, other = AdamWEMA([plain], **HOW), AdamWEMA([negative], **HOW)
    for step in range(3):
        value = torch.complex(torch.ones(3), torch.arange(3.0) - step).conj().imag
        assert value.is_neg()
        plain.grad, negative.grad = value.clone().resolve_neg(), value
        one.step(), other.step()
    plain.main_grad, negative.main_grad = torch.ones(3), torch._neg_view(-torch.ones(3))
    one.step(), other.step()
    assert torch.equal(plain, negative) and plain.any()


@pytest.mark.parametrize(
    ("main", "message"),
    [
        (torch.ones(1), r"must have shape \(4, 3\) and device cpu as its parameter, got \(1,\) and cpu"),
        (torch.ones(3), r"must have shape \(4, 3\) and device cpu as its parameter, got \(3,\)"),
        (torch.ones(3, 4), r"must have shape \(4, 3\)"),
        (torch.ones(4, 3, device="meta"), r"must have shape .* and meta"),
        (torch.ones(4, 3).long(), "must be floating point, got torch.int64"),
        (torch.ones(4, 3) * 1j, "must be floating point, got torch.complex64"),
        (torch.ones(4, 3).to_sparse(), "must be a plain dense tensor, got torch.sparse_coo"),
        ([1.0], "must be a plain dense tensor, got list"),
    ],
)
@pytest.mark.parametrize("steps", [0, 2])
def test_a_main_gradient_that_is_not_its_parameters_is_refused(main, message, steps):
    parameters, optimizer = _trained(steps)
    _set_gradients(parameters, steps)
    before = [p.detach().clone() for p in parameters]
    parameters[0].main_grad = main
    with pytest.raises(ValueError, match=f"AdamWEMA: main_grad {message}"):
        optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(parameters, before, strict=True))
    assert bool(optimizer.state) == bool(steps) and optimizer.counts[0] == steps


def test_a_main_gradient_whose_shape_changes_in_its_memory_is_refused():
    parameter = nn.Parameter(torch.zeros(2, 3))
    optimizer, memory = AdamWEMA([parameter], **HOW), torch.ones(2, 3)
    parameter.main_grad = memory
    optimizer.step()
    parameter.main_grad = memory[:1]
    with pytest.raises(ValueError, match=r"AdamWEMA: main_grad must have shape \(2, 3\)"):
        optimizer.step()


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "ema"])
def test_a_state_that_was_replaced_is_the_one_of_the_next_step(name):
    parameters, optimizer = _trained()
    expected, truth = _trained()
    for own, used in ((parameters, optimizer), (expected, truth)):
        value = torch.full_like(own[0], 0.5)
        if used is optimizer:
            used.state[own[0]][name] = value
        else:
            used.state[own[0]][name].copy_(value)
    for own, used in ((parameters, optimizer), (expected, truth)):
        for parameter in own:
            parameter.grad.fill_(0.25)  # at the same address
        used.step()
    for own, other in zip(parameters, expected, strict=True):
        assert torch.equal(own, other)
        assert torch.equal(optimizer.state[own][name], truth.state[other][name])
    optimizer.state[parameters[0]][name] = torch.zeros(3)
    before = parameters[0].detach().clone()
    place = "emas[0]" if name == "ema" else name
    with pytest.raises(ValueError, match=re.escape(f"slots[0].{place} must have shape (4, 3)")):
        optimizer.step()
    assert torch.equal(parameters[0], before)


def test_autograd_notices_that_a_step_changed_a_parameter():
    for optimizer_class in (torch.optim.AdamW, AdamWEMA):
        parameter = nn.Parameter(torch.ones(3))
        optimizer = optimizer_class([parameter], lr=0.5)
        for _ in range(2):  # in the second one with what the first one kept
            y = (parameter**3).sum()
            parameter.grad = torch.ones(3)
            optimizer.step()
            parameter.grad = None
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.backward()
