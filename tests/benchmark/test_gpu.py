"""Whole steps on a GPU: every variant runs, computes what it should, and ours are graphs where they should be."""

import pytest
import torch

from erd_fast.benchmark import step, step_cases
from erd_fast.benchmark.step import bench_case, make_trainer, variants_of
from erd_fast.benchmark.step_baselines import baselines
from erd_fast.benchmark.step_cases import StepCase, make_problem
from erd_fast.benchmark.step_check import check, witness
from erd_fast.benchmark.step_ours import OURS, ablations
from erd_fast.training.config import ModelConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible to PyTorch"),
    pytest.mark.filterwarnings("ignore"),  # torch.compile and a capturable optimizer have much to say
]
DEVICE = torch.device("cuda")
SMALL = {"DiT-S/2": ModelConfig("DiT-S/2", depth=2), "U-ViT-M/2": ModelConfig("U-ViT-M/2", depth=2)}


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    monkeypatch.setattr(step_cases, "_STORED", 64)


@pytest.mark.parametrize("model", SMALL)
def test_every_variant_runs_and_is_right(model):
    case = StepCase(SMALL[model], 8)
    records = list(bench_case(case, DEVICE, 0.05))
    assert [record.variant for record in records] == variants_of(case, DEVICE)
    for record in records:
        assert record.images_per_sec > 0 and record.peak_bytes > 0
        assert bool(record.backend) == (record.variant not in baselines(DEVICE))


@pytest.mark.parametrize("name", [OURS, *ablations(DEVICE)])
def test_ours_is_a_graph_and_a_replay_is_right(name):
    problem = make_problem(StepCase(SMALL["DiT-S/2"], 4), DEVICE)
    trainer = make_trainer(problem, name)
    for _ in range(8):
        trainer.step()
    assert (trainer._graph._graph is not None) == (name != "no-graph")
    first, second = witness(trainer), witness(trainer)
    assert not torch.equal(first.drawn.noise, second.drawn.noise)
    for evidence in (first, second):
        check(problem, evidence, name)


def test_a_variant_at_its_largest_batch(monkeypatch):
    """Within a limit of the test's own: a GPU takes long to fill."""
    fits = step._fits
    monkeypatch.setattr(
        step, "_fits", lambda problem, name: problem.config.train.batch_size <= 8 and fits(problem, name)
    )
    monkeypatch.setattr(step, "variants_of", lambda case, device: [OURS, "official"])
    records = list(bench_case(StepCase(SMALL["DiT-S/2"], 4, largest=True), DEVICE, 0.05))
    assert [(record.variant, record.batch) for record in records] == [(OURS, 8), ("official", 8)]
