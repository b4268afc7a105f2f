"""step: what one step draws, computes and remembers."""

import math
from itertools import repeat

import pytest
import torch
from torch import nn

from erd_fast.data import Batch, LatentStore, open_reader, write_store
from erd_fast.diffusion import process as process_module
from erd_fast.ops import Draw
from erd_fast.training.step import LOSS_BINS, TrainStep

CPU = torch.device("cpu")
BATCH = 16
ROUNDING = 2**-23 * math.sqrt(BATCH * 64)  # of a mean over as many terms, summed in another order


@pytest.fixture
def draws(monkeypatch) -> list[Draw]:
    """Every draw of a training step, in order."""
    made: list[Draw] = []
    draw = process_module.draw
    monkeypatch.setattr(process_module, "draw", lambda *args, **how: made.append(draw(*args, **how)) or made[-1])
    return made


def _batches(step: TrainStep, store: LatentStore, loader: str = "resident"):
    return open_reader(store, loader, CPU).batches(step.plan, 0)


def _join(draws: list[Draw]) -> Draw:
    return Draw(*(torch.cat(field) for field in zip(*draws, strict=True)))


@pytest.mark.parametrize("parts", [2, 4, 16])
def test_micro_batches_draw_the_same_images_and_give_the_same_loss(make_step, tiny, digits, draws, parts):
    whole, cut = make_step(tiny()), make_step(tiny(train={"micro_batch": BATCH // parts}))
    one, other = _batches(whole, digits), _batches(cut, digits)
    for _ in range(6):
        draws.clear()
        loss = whole(one).item()
        expected = _join(draws)
        draws.clear()
        found = cut(other).item()
        assert len(draws) == parts
        assert all(torch.equal(a, b) for a, b in zip(_join(draws), expected, strict=True))
        assert found == pytest.approx(loss, rel=ROUNDING)


def test_micro_batches_give_the_gradient_of_the_whole_batch(make_step, tiny, digits):
    norms = []
    for micro in (0, 8, 4):
        step = make_step(tiny(train={"micro_batch": micro}))
        step(_batches(step, digits))
        norms.append(step.optimizer.grad_norm.item())
    assert norms[1:] == pytest.approx(norms[:1] * 2, rel=ROUNDING)


def test_each_step_trains_the_next_images(make_step, tiny, digits, draws):
    step = make_step(tiny())
    batches = _batches(step, digits)
    for _ in range(3):
        step(batches)
    assert _join(draws).ids.tolist() == list(range(3 * BATCH))
    assert step.counter.item() == 3 * BATCH


def test_readers_are_told_the_images_that_the_step_draws(make_step, tiny, digits, draws):
    step = make_step(tiny(train={"micro_batch": 4}))
    planned = torch.cat([step.plan(number) for number in range(8)])
    draws.clear()
    batches = _batches(step, digits)
    step(batches), step(batches)
    assert torch.equal(_join(draws).sample_index, planned)


def test_resident_and_mmap_give_the_same_bits(make_step, tiny, digits):
    losses = []
    for loader in ("resident", "mmap"):
        step = make_step(tiny(train={"micro_batch": 8}))
        batches = _batches(step, digits, loader)
        losses.append([step(batches).item() for _ in range(4)])
        batches.close()
    assert losses[0] == losses[1]


def test_labels_are_dropped_to_the_null_label(make_step, tiny, digits, draws, monkeypatch):
    step = make_step(tiny(train={"label_drop": 0.5}))
    seen = []
    forward = step.model.forward
    monkeypatch.setattr(step.model, "forward", lambda x, t, y: seen.append((t, y)) or forward(x, t, y))
    step(_batches(step, digits))
    (drawn,), ((time, labels),) = draws, seen
    expected = digits.labels[drawn.sample_index]
    expected[drawn.label_drop] = 10
    assert 0 < drawn.label_drop.sum() < BATCH
    assert torch.equal(labels, expected)
    assert torch.equal(time, step.process.time[drawn.t_index])


def test_the_loss_is_the_weighted_mean_and_the_bins_are_not_weighted(make_step, tiny, digits, draws):
    """At its start the model predicts 0, so the loss of an image is the mean square of its target, the noise."""
    step = make_step(tiny())
    loss = step(_batches(step, digits)).item()
    (drawn,) = draws
    x0 = digits.gather(drawn.sample_index)
    _, noise = step.process.q_sample(x0, drawn.t_index, kind="pixels", ids=drawn.ids, seed=0)
    mse = noise.square().mean((1, 2, 3)).double()
    weight = step.process.weight[drawn.t_index].double()
    assert loss == pytest.approx((weight * mse).mean().item(), rel=1e-5)
    assert loss != pytest.approx(mse.mean().item(), rel=1e-3)
    mean, by_t = step.take_totals()
    assert mean == loss
    for number in range(LOSS_BINS):
        inside = drawn.t_index * LOSS_BINS // len(step.process.time) == number
        assert by_t[number] == (pytest.approx(mse[inside].mean().item(), rel=1e-5) if inside.any() else None)


def test_totals_are_means_since_they_were_taken(make_step, tiny, digits):
    step = make_step(tiny())
    batches = _batches(step, digits)
    for count in (5, 3):
        losses = [step(batches).item() for _ in range(count)]
        assert step.take_totals()[0] == pytest.approx(sum(losses) / count, rel=1e-12)
        assert all(not total.any() for total in step.totals.values())


def _one_image(tmp_path, name: str, latents: torch.Tensor, **how) -> LatentStore:
    return write_store(tmp_path / name, [(latents, torch.zeros(len(latents)).long())], num_classes=0, **how)


def test_latents_are_scaled_and_shifted_as_the_store_says(make_step, tiny, tmp_path):
    latents = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    scale, shift = torch.tensor([0.5, 2.0]), torch.tensor([1.0, -1.0])
    ready = (latents - shift[:, None, None]) * scale[:, None, None]
    how = {"scale": tuple(scale.tolist()), "shift": tuple(shift.tolist())}
    stores = [
        _one_image(tmp_path, "raw", latents, kind="sample", **how),
        _one_image(tmp_path, "ready", ready, kind="sample"),
        _one_image(tmp_path, "plain", latents, kind="sample"),
    ]
    config = tiny(diffusion={"target": "x0"})
    losses = [make_step(config, store)(_batches(make_step(config, store), store)).item() for store in stores]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] != pytest.approx(losses[2], rel=1e-2)


def test_pixels_are_mirrored_where_the_store_allows_it(make_step, tiny, tmp_path, draws, monkeypatch):
    pixels = torch.randint(256, (4, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    x_ts = []
    for flip in ("none", "mirror"):
        store = _one_image(tmp_path, flip, pixels, kind="pixels", flip=flip)
        step = make_step(tiny(), store)
        forward = step.model.forward
        monkeypatch.setattr(step.model, "forward", lambda x, t, y, f=forward: x_ts.append(x) or f(x, t, y))
        step(_batches(step, store))
    differ = (x_ts[0] != x_ts[1]).flatten(1).any(1)
    assert torch.equal(differ, draws[0].flip) and 0 < differ.sum() < BATCH


@pytest.mark.parametrize("name", ["DiT-tiny/2", "U-ViT-tiny", "ADM-tiny"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains_masters_by_copies_without_autocast(make_step, tiny, digits, monkeypatch, name, precision):
    sizes = {"hidden_size": None, "depth": None, "num_heads": None}
    step = make_step(tiny(train={"precision": precision}, model={"name": name, **sizes}))
    dtype, inputs = getattr(torch, {"bf16": "bfloat16", "fp16": "float16"}[precision]), []
    forward, before = step.model.forward, {}

    def noted(x, t, y):
        assert not torch.is_autocast_enabled("cpu")
        inputs.append(x.dtype)
        return forward(x, t, y)

    monkeypatch.setattr(step.model, "forward", noted)
    for parameter in step.model.parameters():
        before[parameter] = step.optimizer.master(parameter).clone()
    full = make_step(tiny(model={"name": name, **sizes})).model
    assert all(torch.equal(a, b) for a, b in zip(before.values(), full.parameters(), strict=True))  # nothing is rounded
    batches = _batches(step, digits)
    for _ in range(3):  # branches begin at zero, and what is behind them has no gradient yet
        loss = step(batches)
    assert inputs == [dtype] * 3 and loss.dtype == torch.float32 and step.optimizer.counts[0] == 3
    layers = [m for m in step.model.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)]
    products = {parameter for layer in layers for parameter in layer.parameters(recurse=False)}
    moved = 0
    for parameter in step.model.parameters():
        master = step.optimizer.master(parameter)
        assert parameter.dtype == (dtype if parameter in products else torch.float32)
        assert master.dtype == torch.float32 and torch.equal(parameter, master.to(parameter.dtype))
        moved += not torch.equal(master, before[parameter])
    assert moved > len(before) // 2


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_plain_models_run_in_autocast_on_full_parameters(make_step, tiny, digits, monkeypatch, precision):
    step = make_step(tiny(train={"precision": precision}, model={"kernels": False}))
    seen, forward = [], step.model.forward
    monkeypatch.setattr(
        step.model, "forward", lambda *given: seen.append(torch.get_autocast_dtype("cpu")) or forward(*given)
    )
    step(_batches(step, digits))
    assert seen == [{"bf16": torch.bfloat16, "fp16": torch.float16}[precision]]
    assert {parameter.dtype for parameter in step.model.parameters()} == {torch.float32}


def test_low_precision_micro_batches_are_summed_in_float32(make_step, tiny, digits, monkeypatch):
    step, parts = make_step(tiny(train={"micro_batch": 4, "precision": "bf16"})), []
    accumulate = step._accumulate

    def noted(micro: int, last: bool) -> None:
        parts.append([p.grad.clone() for p in step.model.parameters() if p.dtype == torch.bfloat16])
        accumulate(micro, last)

    monkeypatch.setattr(step, "_accumulate", noted)
    batches = _batches(step, digits)
    for _ in range(2):  # the second sum begins anew
        parts.clear()
        step(batches)
    lowered = [p for p in step.model.parameters() if p.dtype == torch.bfloat16]
    assert len(parts) == 4 and lowered
    for parameter, *gradients in zip(lowered, *parts, strict=True):
        assert torch.equal(parameter.main_grad, sum(gradient.float() for gradient in gradients))


def test_float16_finds_its_scale_and_skips_what_overflows(make_step, tiny, digits):
    step = make_step(tiny(train={"precision": "fp16"}))
    step.optimizer.loss_scale.fill_(2.0**32)  # no gradient fits
    kept = [step.optimizer.master(p).clone() for p in step.model.parameters()]
    batches = _batches(step, digits)
    step(batches)
    assert step.optimizer.counts.tolist() == [0, 0, 1] and step.optimizer.loss_scale == 2.0**31
    assert all(torch.equal(a, step.optimizer.master(p)) for a, p in zip(kept, step.model.parameters(), strict=True))
    assert step.take_totals() == (None, [None] * LOSS_BINS) and step.counter == BATCH
    while not step.optimizer.counts[0]:
        step(batches)
    loss, by_t = step.take_totals()
    assert loss is not None and math.isfinite(loss)
    assert step.totals["steps"] == 0 and all(value is None or math.isfinite(value) for value in by_t)


def test_a_batch_of_the_step_is_taken_from_the_reader(make_step, tiny, digits):
    """With a reader that is not resident the step takes the rows as they come."""
    step = make_step(tiny())
    index = step.plan(0)
    resident = Batch(digits.gather(torch.arange(len(digits))), digits.labels, True)
    rows = Batch(digits.gather(index), digits.labels[index], False)
    other = make_step(tiny())
    assert step(repeat(resident)).item() == other(repeat(rows)).item()
