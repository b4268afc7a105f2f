"""AdamWEMA: PyTorch's AdamW, clipping, and an average that follows it."""

import copy
import math

import pytest
import torch
from torch import nn

from erd_fast.errors import ConfigError
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
        assert torch.allclose(parameter.grad, gradient * 3.0 / norm, rtol=1e-6, atol=0)  # PyTorch's 1e-6 in the norm


def test_small_gradients_are_left_alone():
    parameters = _parameters()
    _set_gradients(parameters, 0)
    before = [p.grad.clone() for p in parameters]
    assert _norm(parameters) < 3
    AdamWEMA(parameters, **HOW, grad_clip=3.0).step()
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(parameters, before, strict=True))


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


@pytest.mark.parametrize("ema_decay", [-0.1, 1.0, float("nan")])
def test_decays_outside_the_range_are_refused(ema_decay):
    with pytest.raises(ConfigError, match=rf"ema_decay: given {ema_decay}, allowed 0 <= ema_decay < 1"):
        AdamWEMA(_parameters(), ema_decay=ema_decay)


def test_negative_clip_is_refused():
    with pytest.raises(ConfigError, match=r"grad_clip: given -1.0, allowed 0 \(off\) or more"):
        AdamWEMA(_parameters(), grad_clip=-1.0)
