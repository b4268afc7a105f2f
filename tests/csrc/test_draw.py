"""draw in C++ and CUDA against its definition: equal bit for bit."""

import functools
import itertools

import pytest
import torch

from erd_fast.ops.draw import draw_reference
from erd_fast.random import Purpose, Stream, words

pytestmark = pytest.mark.build

SEED = 0xFEDCBA9876543210  # as an int64 negative; both key words have their top bit in play


def _signed(seed: int) -> int:
    return seed - (1 << 64) if seed >> 63 else seed


def _draw(ops, counter, count, *, dataset_size, num_timesteps, drop=0.0, offset=0, purpose=0, table=None, strata=0):
    integers = [torch.full((count,), -7) for _ in range(3)]
    flags = [torch.ones(count, dtype=torch.bool) for _ in range(2)]
    threshold = round(drop * 2**32)
    ops.draw_fwd(
        counter,
        _signed(SEED),
        dataset_size,
        num_timesteps,
        threshold,
        offset,
        purpose,
        table,
        strata,
        *integers,
        *flags,
    )
    return (*integers, *flags)


def _table(steps: int) -> torch.Tensor:
    """A rough density, with steps of probability 0 among the others."""
    mass = torch.rand(steps, generator=torch.Generator().manual_seed(steps)).double() ** 3
    mass[::3] = 0.0
    mass[-1] = 1.0
    table = (mass.cumsum(0) / mass.sum() * 2**32).round().long()
    table[-1] = 1 << 32
    return table


@functools.cache
def _expected(counter, count, dataset_size, steps, drop, offset, purpose, strata):
    return draw_reference(
        torch.tensor(counter), seed=SEED, batch_size=count, dataset_size=dataset_size, num_timesteps=steps,
        drop_threshold=round(drop * 2**32), offset=offset, purpose=purpose, t_table=_table(steps) if drop else None,
        strata=strata,
    )  # fmt: skip


@pytest.mark.parametrize("strata", [0, 1, 5, 64, 1024])
@pytest.mark.parametrize("count", [1, 7, 64])
def test_equals_the_definition(ops, count, strata):
    sizes = [(1, 1), (5, 4), (5, 63), (1797, 1000), (1 << 32, 1 << 31)]
    counters = [0, 1795, (1 << 40) - 3]
    for (dataset_size, steps), counter, weighted in itertools.product(sizes, counters, (False, True)):
        if weighted and steps > 1000:
            continue  # a table of 2^31 entries
        drop, offset, purpose = (0.1, 17, Purpose.LAB) if weighted else (0.0, 0, Purpose.TRAIN)
        table = _table(steps) if weighted else None
        start = torch.tensor(counter)
        expected = _expected(counter, count, dataset_size, steps, drop, offset, purpose, strata)
        given = _draw(
            ops, start, count, dataset_size=dataset_size, num_timesteps=steps, drop=drop, offset=offset,
            purpose=int(purpose), table=table, strata=strata,
        )  # fmt: skip
        for name, one, other in zip(expected._fields, given, expected, strict=True):
            assert torch.equal(one, other), (name, dataset_size, steps, counter, weighted)


def test_an_entry_equal_to_the_word_counts(ops):
    ids, block = torch.arange(4), torch.zeros(1, dtype=torch.int64)
    for word, image in zip(words(SEED, Purpose.TRAIN, Stream.SCALARS, ids, block)[:, 0, 0].tolist(), ids, strict=True):
        for step in (0, 1):
            table = torch.tensor([word + step, 1 << 32])
            assert _draw(ops, image, 1, dataset_size=9, num_timesteps=2, table=table)[2] == 1 - step


def test_certain_and_impossible_label_drops(ops):
    counter = torch.tensor(3)
    assert _draw(ops, counter, 64, dataset_size=9, num_timesteps=9, drop=1.0)[3].all()
    assert not _draw(ops, counter, 64, dataset_size=9, num_timesteps=9, drop=0.0)[3].any()


def test_no_image_is_no_work(ops):
    assert all(out.numel() == 0 for out in _draw(ops, torch.tensor(3), 0, dataset_size=9, num_timesteps=9))


def test_threads_change_nothing(cpu_ops):
    given = {"dataset_size": 1281167, "num_timesteps": 1000, "strata": 2048}
    threads = torch.get_num_threads()
    results = []
    for number in (1, 2):
        torch.set_num_threads(number)
        results.append(_draw(cpu_ops, torch.tensor(100), 2048, **given))
    torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_bad_arguments_are_named(cpu_ops):
    counter = torch.tensor(0)
    sizes = {"dataset_size": 9, "num_timesteps": 9}
    with pytest.raises(RuntimeError, match="draw: counter must be Long, got Int"):
        _draw(cpu_ops, counter.int(), 4, **sizes)
    with pytest.raises(RuntimeError, match="draw: counter must have 1 elements, got 2"):
        _draw(cpu_ops, counter.repeat(2), 4, **sizes)
    for outside in (-1, (1 << 62) + 1):
        with pytest.raises(RuntimeError, match=rf"draw: counter must be in \[0, 2\^62\], got {outside}"):
            _draw(cpu_ops, torch.tensor(outside), 4, **sizes)
    with pytest.raises(RuntimeError, match="draw: t_table must have 9 elements, got 8"):
        _draw(cpu_ops, counter, 4, **sizes, table=_table(8))


def test_a_negative_counter_ends_and_leaves_no_row(emulated_ops):
    ids, sample_index, t_index, _, _ = _draw(
        emulated_ops, torch.tensor(-3), 5, dataset_size=9, num_timesteps=9, strata=5
    )
    assert ids.tolist() == [-3, -2, -1, 0, 1]
    assert (sample_index[:3] == -1).all() and (t_index[:3] == -1).all()
    assert (sample_index[3:] >= 0).all() and (t_index[3:] >= 0).all()
