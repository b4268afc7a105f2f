"""What shows on a GPU alone: graphs that count on, streams, no waiting for the device, and sizes past 32 bits."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from erd_fast.diffusion import DiffusionProcess, get_schedule
from erd_fast.ops import OPS, diffusion_loss, draw, q_sample, use_backend
from erd_fast.ops.patchify import patchify
from erd_fast.ops.q_sample import KINDS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible to PyTorch"),
]
DEVICE = torch.device("cuda")
COMPILED = ("cuda", "triton")
SIZE, STORED = 64, 100
ROUND, NORMALS = 2.0**-24, 2e-6  # a float32 rounding; by which drawn normals may differ between backends
BFLOAT16 = 2.0**-8


@pytest.fixture(params=COMPILED)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    reason = OPS["q_sample"].why_not(request.param)
    if reason is not None:
        pytest.skip(str(reason))
    with use_backend(request.param):
        yield request.param


class Step:
    """draw, q_sample and diffusion_loss on resident data, as a training step calls them; all outputs in one tuple."""

    def __init__(self) -> None:
        generator = torch.Generator(DEVICE).manual_seed(0)
        self.process = DiffusionProcess(get_schedule("cosine"), "v", device=DEVICE)
        self.store = torch.rand(STORED, 8, 32, 32, generator=generator, device=DEVICE).half()
        self.prediction = torch.randn(SIZE, 256, 16, generator=generator, device=DEVICE).bfloat16()
        self.scale = torch.full((4,), 0.18215, device=DEVICE)

    def __call__(self, counter: Tensor) -> tuple[Tensor, ...]:
        how = {"seed": 7, "batch_size": SIZE, "dataset_size": STORED, "label_drop": 0.1}
        drawn = self.process.draw(counter, global_batch=SIZE, **how)
        noisy = self.process.q_sample(
            self.store,
            drawn.t_index,
            index=drawn.sample_index,
            kind="mean_std",
            scale=self.scale,
            flip=drawn.flip,
            ids=drawn.ids,
            seed=7,
            dtype=torch.bfloat16,
            patch=2,
        )
        loss = self.process.loss(self.prediction, noisy.target, drawn.t_index, patch=2, compute_grad=True)
        return (*drawn, *noisy, *loss)


def counted(images: int) -> Tensor:
    return torch.tensor(images, device=DEVICE)


def equal(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def captured(step: Step, counter: Tensor) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(counter)
        counter += SIZE
    return graph, outputs


def test_a_captured_step_counts_on_and_equals_the_eager_one(backend):
    step, counter = Step(), counted(0)
    expected = [step(counted(SIZE * number)) for number in range(3)]
    captured(step, counter)  # a graph that never runs leaves nothing behind that the next one needs
    graph, outputs = captured(step, counter)
    for eager in expected:
        graph.replay()
        assert equal(outputs, eager)
    assert counter.item() == 3 * SIZE
    for number, (first, second) in enumerate(zip(*expected[:2], strict=True)):
        assert not torch.equal(first, second), f"output {number} is that of the step before"


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_no_op_waits_for_the_device(backend):
    step, counter = Step(), counted(0)
    step(counter)  # compiled and loaded
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(counter)
        with pytest.raises(RuntimeError, match="synchronizing"):  # so the mode sees what waits
            counter.item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_ops_run_on_the_current_stream(backend):
    step, late = Step(), Step()
    expected = step(counted(SIZE))
    counter = counted(0)
    for tensor in (late.store, late.prediction):
        tensor.fill_(float("nan"))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # some 50 ms, in which a launch elsewhere would read what is not there yet
        late.store.copy_(step.store)
        late.prediction.copy_(step.prediction)
        counter += SIZE
        found = late(counter)
    stream.synchronize()
    assert equal(found, expected)


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_step_compiles_into_one_graph(backend, mode):
    step = Step()
    torch.compiler.reset()
    compiled = torch.compile(step.__call__, fullgraph=True, mode=mode)
    for number in range(4):  # the second call of reduce-overhead records a CUDA graph, later ones replay it
        torch.compiler.cudagraph_mark_step_begin()
        assert equal(compiled(counted(SIZE * number)), step(counted(SIZE * number)))


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"strata": 8192},
        {"t_sampler": "logit_normal"},
        {"dataset_size": 1 << 32, "offset": 5, "label_drop": 0.5},
    ],
    ids=["plain", "stratified", "table", "largest"],
)
def test_integers_are_the_same_bits_on_every_backend(how):
    reasons = {name: reason for name in COMPILED if (reason := OPS["draw"].why_not(name))}
    if reasons:
        pytest.skip(f"{reasons}")
    sampler, how = how.get("t_sampler", "uniform"), {"dataset_size": 1_281_167, **how}
    how.pop("t_sampler", None)
    table = DiffusionProcess(get_schedule("cosine"), t_sampler=sampler, device=DEVICE)._timesteps
    for images in (0, 1_281_167 - 4096, (1 << 40) + 3):
        results = []
        for name in (*COMPILED, "reference"):
            with use_backend(name):
                call = {"seed": (1 << 64) - 1, "batch_size": 8192, "num_timesteps": 1000, "t_table": table, **how}
                results.append(draw(counted(images), **call))
        assert all(equal(found, results[-1]) for found in results[:-1])


def stored_latents(kind: str, count: int, generator: torch.Generator) -> Tensor:
    if kind == "pixels":
        return torch.randint(256, (count, 4, 32, 32), generator=generator, device=DEVICE, dtype=torch.uint8)
    latents = torch.rand(count, 4 if kind == "sample" else 8, 32, 32, generator=generator, device=DEVICE)
    return (-latents if kind == "mean_logvar" else latents).half()  # a standard deviation of 1 at most


@pytest.mark.parametrize("kind", KINDS)
def test_large_batches_hold_the_images_of_small_ones(backend, kind):
    count, rows = 8192, torch.tensor([0, 1, 4097, 8191], device=DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(1)
    latents = stored_latents(kind, 1000, generator)
    coefficients = torch.rand(1000, 4, generator=generator, device=DEVICE)
    t, index = torch.randint(1000, (2, count), generator=generator, device=DEVICE)
    flip, ids = torch.rand(count, generator=generator, device=DEVICE) < 0.5, torch.arange(count, device=DEVICE)
    how: dict[str, Any] = {"kind": kind, "seed": 3, "dtype": torch.bfloat16, "patch": 2}
    found = q_sample(latents, coefficients, t, index=index, flip=flip, ids=ids, **how)
    with use_backend("reference"):
        few = {"index": index[rows], "flip": flip[rows], "ids": ids[rows]}
        expected = q_sample(latents, coefficients, t[rows], **few, **how)
    for value, wanted in zip(found, expected, strict=True):
        assert value.isfinite().all()
        # Sixteen float32 roundings, one to the dtype, and two drawn normals with factors of at most 1.
        unit = BFLOAT16 if wanted.dtype == torch.bfloat16 else 0.0
        bound = (16 * ROUND + unit) * wanted.double().abs().max() + 2 * NORMALS
        assert (value[rows].double() - wanted.double()).abs().max() <= bound


def test_offsets_take_more_than_32_bits(backend):
    """Every tensor but the tables has more than 2^31 elements; the last images are those of a batch of three."""
    count = (1 << 31) // 4096 + 3
    if torch.cuda.mem_get_info()[0] < 32 << 30:
        pytest.skip("needs 32 GiB of free GPU memory")
    latents = torch.zeros(count, 4, 32, 32, dtype=torch.uint8, device=DEVICE)
    latents[-3:] = stored_latents("pixels", 3, torch.Generator(DEVICE).manual_seed(2))
    process = DiffusionProcess(get_schedule("cosine"), "v", device=DEVICE)
    ids = torch.arange(count, device=DEVICE)
    t = ids % 1000
    how: dict[str, Any] = {"kind": "pixels", "seed": 3, "dtype": torch.bfloat16, "patch": 2}
    noisy = process.q_sample(latents, t, ids=ids, **how)
    few = process.q_sample(latents[-3:], t[-3:], ids=ids[-3:], **how)
    assert equal(tuple(value[-3:] for value in noisy), few)
    loss = process.loss(noisy.x_t, noisy.target, t, patch=2, compute_grad=True)
    few_loss = process.loss(few.x_t, few.target, t[-3:], patch=2, compute_grad=True, batch_size=count)
    assert torch.equal(loss.per_sample[-3:], few_loss.per_sample)
    assert torch.equal(loss.dprediction[-3:], few_loss.dprediction)


def test_rows_out_of_range_are_nan_and_their_neighbours_as_they_were(backend):
    generator = torch.Generator(DEVICE).manual_seed(4)
    latents = stored_latents("sample", 5, generator)
    coefficients, weight = (torch.rand(10, width, generator=generator, device=DEVICE) for width in (4, 1))
    right = torch.tensor([0, 1, 2, 3, 4], device=DEVICE)
    for wrong in (-1, 10, 1 << 40):
        spoiled = right.clone()
        spoiled[2] = wrong
        _spoils(lambda row: q_sample(latents, coefficients, row, ids=right, seed=0), right, spoiled)
        _spoils(lambda row: q_sample(latents, coefficients, right, index=row, ids=right, seed=0), right, spoiled)
        _spoils(lambda row: _losses(latents.float(), weight[:, 0], row), right, spoiled)
        assert diffusion_loss(latents, latents.float(), weight[:, 0], spoiled).loss.isnan()
        assert diffusion_loss(latents, latents.float(), weight[:, 0], spoiled).bin_count.sum() == 4


def _losses(images: Tensor, weight: Tensor, t: Tensor) -> tuple[Tensor]:
    result = diffusion_loss(patchify(2 * images, 2), images, weight, t, patch=2, compute_grad=True)
    assert result.dprediction is not None
    return (result.dprediction,)


def _spoils(call: Callable[[Tensor], tuple[Tensor, ...]], right: Tensor, spoiled: Tensor) -> None:
    """Image 2 becomes NaN, and no other image changes."""
    for value, wanted in zip(call(spoiled), call(right), strict=True):
        assert value[2].isnan().all() and wanted.isfinite().all()
        assert torch.equal(value[right != 2], wanted[right != 2])


def test_negative_counters_give_no_image(backend):
    drawn = draw(counted(-2), seed=0, batch_size=4, dataset_size=100, num_timesteps=10)
    assert drawn.sample_index[:2].tolist() == [-1, -1] and drawn.t_index[:2].tolist() == [-1, -1]
    assert (drawn.sample_index[2:] >= 0).all() and (drawn.t_index[2:] >= 0).all()
