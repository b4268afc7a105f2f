"""draw: what each image of a training batch is, as integers: sample, timestep, label drop, flip."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from erd_fast.ops.checks import check_device, check_rows
from erd_fast.ops.core.backend import Extension, Triton
from erd_fast.ops.core.op import Op, Pass
from erd_fast.random import (
    Purpose,
    Stream,
    bounded,
    sample_order,
    signed_seed,
    stratified_word,
    stratum,
    unsigned_seed,
    words,
)

_LARGEST_IMAGE = 1 << 62


class Draw(NamedTuple):
    """One batch of decisions. Every field is (N,); integers are int64."""

    ids: Tensor  # g: number of the image in the training sequence, key of all its random numbers
    sample_index: Tensor  # row of the data set, in [0, dataset_size)
    t_index: Tensor  # index on the timestep grid, in [0, num_timesteps)
    label_drop: Tensor  # bool: train this image without its label
    flip: Tensor  # bool: mirror this image, where the store allows it


def draw(
    counter: Tensor,
    *,
    seed: int,
    batch_size: int,
    dataset_size: int,
    num_timesteps: int,
    label_drop: float = 0.0,
    offset: int = 0,
    purpose: Purpose = Purpose.TRAIN,
    t_table: Tensor | None = None,
    strata: int = 0,
) -> Draw:
    """Decide sample, timestep, label drop and flip for ``batch_size`` images, in integer arithmetic alone.

    Image ``i`` of the call is number ``g = counter + offset + i``. Its sample is ``sample_order(g)``; the words of its
    ``SCALARS`` block give t = ``(w0 * K) >> 32``, drop = ``w1 < round(label_drop * 2**32)`` and flip = top bit of
    ``w2`` (``w3`` is spare). A batch cut in any way over ranks and micro-batches is therefore the same batch.

    With ``t_table`` c, t is the number of entries ``c_k <= w0``, so that time k has probability (c_k - c_(k-1)) 2**-32.
    With ``strata`` B, the B images of ``g // B`` take the B equal parts of the words' range in a random order:
    ``(part * 2**32 + w0) // B`` stands for ``w0``.

    Args:
        counter: () int64, images seen before this batch, on the device that shall hold the result; 0 to 2**62, and
            the last image's number below 2**63.
        seed: 64-bit key.
        batch_size: N, images of this call.
        dataset_size: number of samples, 1 to 2**32.
        num_timesteps: K, 1 to 2**31.
        label_drop: probability in [0, 1], exact to 2**-32.
        offset: rank offset plus micro-batch offset within the global batch.
        t_table: (K,) int64, not falling, its last entry 2**32; None is uniform. Tables on a GPU are not read back to
            check.
        strata: images of the global batch whose timesteps are spread evenly, 1 to 2**31; 0 draws each for itself.

    Raises:
        ValueError: an argument is outside its range. (A counter on a GPU is not read back: images of a number below 0
            get row and timestep -1, which make them NaN.)

    Writes 26 bytes an image. Source: docs/design.md, "Randomness".
    """
    if counter.dtype != torch.int64 or counter.dim() != 0:
        raise ValueError(f"draw: counter: given {counter.dtype} {tuple(counter.shape)}, allowed an int64 scalar tensor")
    if batch_size < 1:
        raise ValueError(f"draw: batch_size: given {batch_size}, allowed 1 or more")
    if not 1 <= dataset_size <= 1 << 32:
        raise ValueError(f"draw: dataset_size: given {dataset_size}, allowed 1 to 2**32")
    if not 1 <= num_timesteps <= 1 << 31:
        raise ValueError(f"draw: num_timesteps: given {num_timesteps}, allowed 1 to 2**31")
    if not 0.0 <= label_drop <= 1.0:
        raise ValueError(f"draw: label_drop: given {label_drop}, allowed 0 to 1")
    if not 0 <= strata <= 1 << 31:
        raise ValueError(f"draw: strata: given {strata}, allowed 0 to 2**31")
    if not 0 <= offset <= _LARGEST_IMAGE:
        raise ValueError(f"draw: offset: given {offset}, allowed 0 to 2**62")
    check_rows("draw", "counter", counter, min(_LARGEST_IMAGE + 1, (1 << 63) - offset - batch_size))
    if t_table is not None:
        check_device("draw", counter=counter, t_table=t_table)
        _check_table(t_table, num_timesteps)
    return _op(
        counter=counter,
        seed=signed_seed(seed),
        batch_size=batch_size,
        dataset_size=dataset_size,
        num_timesteps=num_timesteps,
        drop_threshold=round(label_drop * 2**32),
        offset=offset,
        purpose=int(purpose),
        t_table=t_table,
        strata=strata,
    )


def _check_table(table: Tensor, num_timesteps: int) -> None:
    if table.dtype != torch.int64 or tuple(table.shape) != (num_timesteps,):
        raise ValueError(
            f"draw: t_table: given {table.dtype} {tuple(table.shape)}, allowed torch.int64 ({num_timesteps},)"
        )
    if table.device.type == "cpu" and (table[0] < 0 or table[-1] != 1 << 32 or (table.diff() < 0).any()):
        raise ValueError("draw: t_table: given a table that falls or does not end in 2**32, allowed those of a density")


def draw_reference(
    counter: Tensor,
    *,
    seed: int,
    batch_size: int,
    dataset_size: int,
    num_timesteps: int,
    drop_threshold: int,
    offset: int,
    purpose: int,
    t_table: Tensor | None,
    strata: int,
) -> Draw:
    """The definition of :func:`draw`; ``drop_threshold`` is ``round(label_drop * 2**32)``, ``seed`` the signed integer
    of its 64 bits."""
    key, what = unsigned_seed(seed), Purpose(purpose)
    ids = counter + offset + torch.arange(batch_size, dtype=torch.int64, device=counter.device)
    block = torch.zeros(1, dtype=torch.int64, device=counter.device)
    t_word, drop_word, flip_word, _ = words(key, what, Stream.SCALARS, ids, block)[:, 0].unbind(-1)
    if strata:
        t_word = stratified_word(t_word, stratum(key, what, ids, strata), strata)
    return Draw(
        ids=ids,
        sample_index=sample_order(key, ids, dataset_size),
        t_index=_t_index(t_word, num_timesteps, t_table),
        label_drop=drop_word < drop_threshold,
        flip=(flip_word >> 31) == 1,
    )


def _t_index(word: Tensor, num_timesteps: int, table: Tensor | None) -> Tensor:
    if table is None:
        return bounded(word, num_timesteps)
    return torch.searchsorted(table, word.contiguous(), right=True)


def _empty(counter: Tensor, batch_size: int, **_: Any) -> Draw:
    integers = [counter.new_empty(batch_size) for _ in range(3)]
    flags = [counter.new_empty(batch_size, dtype=torch.bool) for _ in range(2)]
    return Draw(*integers, *flags)


_op = Op("draw", Pass(draw_reference, _empty), backends=(Extension("cuda"), Triton(), Extension("cpu")))
