"""Every target, weighting, schedule and timestep sampler trains: finite, and its own objective falls."""

import math

import pytest
import torch

from erd_fast.data import open_reader
from erd_fast.diffusion import RULES, SCHEDULES, TARGETS
from erd_fast.random import Purpose

pytestmark = pytest.mark.slow

STEPS = 32


def objective(step, store, count: int = 256) -> float:
    """The weighted loss of the model on fixed images, noises, and times over the whole grid."""
    rows = torch.arange(count) * len(store) // count
    process = step.process
    t_index = torch.arange(count) * (len(process.schedule) - 1) // (count - 1)
    x_t, target = process.q_sample(
        store.gather(rows), t_index, kind="pixels", ids=torch.arange(count), seed=0, purpose=Purpose.EVAL
    )
    with torch.no_grad():
        prediction = step.model(x_t, process.time[t_index], store.labels[rows])
    return float(process.loss(prediction, target, t_index).loss)


def before_and_after(config, make_step, store) -> tuple[float, float]:
    step = make_step(config)
    batches = open_reader(store, "resident", torch.device("cpu")).batches(step.plan, 0)
    before = objective(step, store)
    losses = [float(step(batches)) for _ in range(STEPS)]
    batches.close()
    assert all(map(math.isfinite, losses))
    return before, objective(step, store)


@pytest.mark.parametrize("weighting", RULES)
@pytest.mark.parametrize("target", TARGETS)
def test_every_rule_trains_every_target(target, weighting, tiny, make_step, digits):
    # On cosine the flow target near the data is noise that nothing predicts, and sigma_sqrt weighs little else.
    schedule = "flow" if (target, weighting) == ("flow", "sigma_sqrt") else "cosine"
    config = tiny(diffusion={"schedule": schedule, "target": target, "weighting": weighting}, optim={"lr": 3e-3})
    before, after = before_and_after(config, make_step, digits)
    assert after < before


@pytest.mark.filterwarnings("ignore:target 'v'")
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_trains_every_target(schedule, target, tiny, make_step, digits):
    config = tiny(diffusion={"target": target, "schedule": schedule}, optim={"lr": 3e-3})
    before, after = before_and_after(config, make_step, digits)
    assert after < before


@pytest.mark.parametrize(
    "fields",
    [
        {"t_sampler": "stratified"},
        {"t_sampler": "logit_normal", "logit_mean": 0.5, "logit_std": 0.8},
        {"t_sampler": "logit_normal", "importance_correct": True, "clip_max": 10.0},
        {"t_sampler": "weight"},
        {"reading": "log_snr", "clip_max": 5.0},
        {"weighting": "p2", "gamma": 0.5, "k": 2.0, "normalize": "max"},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_every_option_trains(fields, tiny, make_step, digits):
    before, after = before_and_after(tiny(diffusion=fields, optim={"lr": 3e-3}), make_step, digits)
    assert after < before


def test_the_objective_of_one_step_is_that_of_its_options(tiny, make_step, digits):
    """The options reach the step: another weight is another loss on the same images and noise."""
    losses = set()
    for fields in ({}, {"weighting": "min_snr"}, {"weighting": "min_snr", "gamma": 2.0}, {"reading": "log_snr"}):
        step = make_step(tiny(diffusion=fields))
        batches = open_reader(digits, "resident", torch.device("cpu")).batches(step.plan, 0)
        losses.add(float(step(batches)))
        batches.close()
    assert len(losses) == 4


@pytest.mark.parametrize("cut", [0, 4])
def test_stratified_times_fill_the_global_batch(cut, tiny, make_step):
    step = make_step(tiny(diffusion={"t_sampler": "stratified"}, train={"batch_size": 16, "micro_batch": cut}))
    drawn = [step._draw(torch.tensor(32), micro).t_index for micro in range(step.micro_batches)]
    assert sorted((torch.cat(drawn) * 16 // 1000).tolist()) == list(range(16))
