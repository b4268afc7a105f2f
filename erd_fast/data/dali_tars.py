"""Reading foreign WebDataset tars by NVIDIA DALI's own reader, for a trainer of your own."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from erd_fast.data.dali import CARRIED, pipeline_settings
from erd_fast.data.reading import Batch
from erd_fast.errors import ConfigError, DataError
from erd_fast.extras import load


@dataclasses.dataclass(frozen=True)
class RawLatents:
    """Files that hold the numbers of one latent, in the order of (C, H, W), and nothing else."""

    ext: str
    """What the files are called by: ``latent`` for ``000123.latent``."""
    shape: tuple[int, int, int]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.dtype not in CARRIED:
            raise ConfigError(f"dtype: given {self.dtype}, allowed {', '.join(map(str, CARRIED))}")


class DaliTars:
    """Batches without end from tars of ``key.npy`` (format 1.0), or raw numbers, and ``key.cls``, a label in ASCII.

    Samples come in the order in which they are stored or, with ``shuffle``, out of a buffer of that many. In its first
    epoch a rank reads its share of the samples, and in the next ones those of the ranks after it.

    Args:
        tars: equal on all ranks.
        batch_size: samples of a batch on this rank.
        raw: what the latents are if they are not ``key.npy``.
        device: where the batches go.
        rank, size: this rank, and how many there are.
        shuffle: samples in the buffer; 0 is the order in which they are stored.
        seed: of what the buffer gives.
        indexes: for each tar what DALI's ``wds2idx`` makes of it; None lets DALI look for the samples at the start.
        checkpoint: what :meth:`checkpoint` gave, all else being equal; goes on from there.

    Raises:
        ConfigError: NVIDIA DALI is not installed, or there are no tars. DataError: a tar is missing or damaged, a
            sample has no latent or no label, or one of another form, or there are fewer samples than ranks.
    """

    def __init__(
        self,
        tars: Sequence[Path],
        batch_size: int,
        *,
        raw: RawLatents | None = None,
        device: torch.device | str = "cpu",
        rank: int = 0,
        size: int = 1,
        shuffle: int = 1024,
        seed: int = 0,
        indexes: Sequence[Path] | None = None,
        checkpoint: bytes | None = None,
    ):
        dali = load("nvidia.dali", "dali", "DaliTars")
        if not tars:
            raise ConfigError("tars: given none, allowed 1 or more")
        for file in (*tars, *(indexes or ())):
            if not file.is_file():
                raise DataError(f"{file} does not exist")
        self._tars, self._raw, self._device = tars, raw, torch.device(device)
        self._pipeline = dali.Pipeline(**pipeline_settings(batch_size, self._device, checkpoint))
        how = {
            "paths": [str(tar) for tar in tars],
            "index_paths": [str(index) for index in indexes] if indexes else None,
            "random_shuffle": shuffle > 0,
            "initial_fill": max(shuffle, 1),
            "seed": seed,
            "shard_id": rank,
            "num_shards": size,
        }
        with self._pipeline:
            self._pipeline.set_outputs(*self._read(dali, how))
        self._checked(self._pipeline.build)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        on_gpu = self._device.type == "cuda"
        arguments = (torch.cuda.current_stream(self._device),) if on_gpu else ()
        latents, labels = self._checked(lambda: self._pipeline.run(*arguments))
        if not latents.is_dense_tensor():
            shapes = sorted({tuple(shape) for shape in latents.shape()})
            raise DataError(f"{self._where()}: given latents of shapes {shapes}, allowed one shape")
        rows = torch.from_dlpack(latents.as_tensor())
        rows = rows if self._raw is None else rows.view(self._raw.dtype)
        return Batch(rows, self._labels(labels).to(self._device), False)

    def checkpoint(self) -> bytes:
        """The position after the last batch."""
        return self._pipeline.checkpoint()

    def _read(self, dali: ModuleType, how: dict[str, Any]) -> tuple[Any, Any]:
        fn, types, raw = dali.fn, dali.types, self._raw
        latent = "npy" if raw is None else raw.ext
        carried = types.UINT8 if raw is None else getattr(types, CARRIED[raw.dtype])
        how |= {"ext": [latent, "cls"], "dtypes": [carried, types.UINT8], "missing_component_behavior": "error"}
        latents, labels = fn.readers.webdataset(**how)
        latents = fn.decoders.numpy(latents) if raw is None else fn.reshape(latents, shape=list(raw.shape))
        return (latents.gpu() if self._device.type == "cuda" else latents), labels

    def _labels(self, texts: Any) -> Tensor:
        return torch.tensor([self._label(bytes(np.asarray(text))) for text in texts])

    def _label(self, text: bytes) -> int:
        if not re.fullmatch(rb"\s*\d+\s*", text):
            raise DataError(f"{self._where()}: given label {text!r}, allowed a whole number in ASCII")
        return int(text)

    def _checked(self, call: Callable[[], Any]) -> Any:
        """``call()``; of DALI's RuntimeError the reason alone, without its traceback of the pipeline."""
        try:
            return call()
        except RuntimeError as error:
            found = re.search(r"encountered:\s*(.+?)\s*(?:C\+\+ context|$)", str(error), re.DOTALL)
            reason = found[1] if found else str(error)
            raise DataError(f"{self._where()}: {' '.join(reason.split())}") from error

    def _where(self) -> str:
        return f"{self._tars[0]}{f' and {len(self._tars) - 1} more' if len(self._tars) > 1 else ''}"
