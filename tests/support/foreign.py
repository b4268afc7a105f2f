"""Small data sets in the formats of others, written as their own tools write them."""

import json
import pickle
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from erd_fast.files import make_folder
from erd_fast.random import Purpose, Stream, normals

SD_SCALE = (0.18215,) * 4
EDM2_SHIFT = (5.81, 3.25, 0.12, -2.15)
EDM2_SCALE = (1 / 4.17, 1 / 4.62, 1 / 3.71, 1 / 3.28)
SPREAD = 0.1
"""Of the posterior, as a part of the std of the means."""


def samples(count: int, side: int, scale: tuple[float, ...], shift: tuple[float, ...] = (0.0,) * 4) -> NDArray[Any]:
    """(count, C, side, side) float32; (z - shift) * scale is standard normal."""
    noise = normals(0, Purpose.LAB, Stream.POSTERIOR, torch.arange(count), (len(scale), side, side)).numpy()
    return noise / _columns(scale) + _columns(shift)


def moments(
    count: int, side: int, scale: tuple[float, ...], shift: tuple[float, ...] = (0.0,) * 4, logvar: bool = False
) -> NDArray[Any]:
    """(count, 2C, side, side) float32: such means, and their posterior's std or log-variance."""
    mean = samples(count, side, scale, shift)
    std = np.broadcast_to(SPREAD / _columns(scale), mean.shape)
    return np.concatenate((mean, 2 * np.log(std) if logvar else std), axis=1)


def labels_of(count: int, classes: int = 10) -> NDArray[Any]:
    """Sorted, as folders of classes are read."""
    return np.arange(count) * classes // count


def _columns(values: tuple[float, ...]) -> NDArray[Any]:
    return np.array(values, np.float32)[:, None, None]


def erd_hdf5(path: Path, count: int = 64, side: int = 32, **how: Any) -> None:
    """``how``: further arguments of h5py's create_dataset for the latents."""
    import h5py

    with h5py.File(path, "w") as file:
        for split, number in (("train", count), ("val", count // 4)):
            file.create_dataset(f"{split}_latents", data=moments(number, side, SD_SCALE), **how)
            file.create_dataset(f"{split}_labels", data=labels_of(number).astype(np.uint16))


def fast_dit(path: Path, count: int = 24, side: int = 32) -> None:
    features, labels = (make_folder(path / f"imagenet256_{what}") for what in ("features", "labels"))
    for number, (row, label) in enumerate(zip(samples(count, side, (1.0,) * 4), labels_of(count), strict=True)):
        np.save(features / f"{number}.npy", row[None])
        np.save(labels / f"{number}.npy", np.array([label]))


def uvit(path: Path, count: int = 24, side: int = 32) -> None:
    """Half of them mirrored, after each batch of 8."""
    make_folder(path)
    rows, labels = moments(count // 2, side, SD_SCALE, logvar=True), labels_of(count // 2)
    number = 0
    for first in range(0, count // 2, 8):
        batch, classes = rows[first : first + 8], labels[first : first + 8]
        for row, label in zip((*batch, *batch[..., ::-1]), (*classes, *classes), strict=True):
            (path / f"{number}.npy").write_bytes(pickled_npy(row, label))
            number += 1


def pickled_npy(*items: Any) -> bytes:
    """What NumPy stored of a tuple until 1.24."""
    array = np.empty(len(items), object)
    array[:] = items
    stream = BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def maskdit_lmdb(path: Path, count: int = 24, side: int = 32, mirrored: bool = True) -> None:
    """``mirrored``: half of them, at the end."""
    import lmdb

    make_folder(path.parent)
    originals = count // 2 if mirrored else count
    rows, labels = moments(originals, side, SD_SCALE, logvar=True), labels_of(originals)
    if mirrored:
        rows, labels = np.concatenate((rows, rows[..., ::-1])), np.tile(labels, 2)
    with lmdb.open(str(path), map_size=1 << 26) as environment, environment.begin(write=True) as transaction:
        for number, (row, label) in enumerate(zip(rows, labels, strict=True)):
            transaction.put(f"z-{number}".encode(), row.tobytes())
            transaction.put(f"y-{number}".encode(), str(label).encode())
        transaction.put(b"length", str(count).encode())


def maskdit_webdataset(path: Path, count: int = 24, side: int = 32, shard: int = 10) -> None:
    import webdataset

    make_folder(path)
    rows, labels = moments(count, side, SD_SCALE, logvar=True), labels_of(count)
    for first in range(0, count, shard):
        with webdataset.TarWriter(str(path / f"latent_imagenet_512_train-{first // shard:04d}.tar")) as tar:
            for number in range(first, min(first + shard, count)):
                label = int(labels[number])
                tar.write({"__key__": f"{number:07d}", "latent": pickle.dumps(rows[number]), "cls": label})


def edm2(path: Path, count: int = 24, side: int = 8) -> None:
    """A zip file, or a folder."""
    _npy_json(path, moments(count, side, EDM2_SCALE, EDM2_SHIFT))


def repa(path: Path, count: int = 24, side: int = 8) -> None:
    _npy_json(path / "vae-sd", moments(count, side, SD_SCALE))


def _npy_json(path: Path, rows: NDArray[Any]) -> None:
    files = dict(_npy_json_files(rows))
    if path.suffix == ".zip":
        make_folder(path.parent)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return
    for name, content in files.items():
        make_folder((path / name).parent)
        (path / name).write_bytes(content)


def _npy_json_files(rows: NDArray[Any]) -> Iterator[tuple[str, bytes]]:
    labels = []
    for number, (row, label) in enumerate(zip(rows, labels_of(len(rows)), strict=True)):
        name = f"{number:08d}"[:5] + f"/img-mean-std-{number:08d}.npy"
        labels.append([name, int(label)])
        yield name, npy_bytes(row)
    yield "dataset.json", json.dumps({"labels": labels}).encode()


def npy_bytes(array: NDArray[Any]) -> bytes:
    stream = BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def lightningdit(
    path: Path, count: int = 24, side: int = 8, shards: tuple[tuple[int, int], ...] = ((0, 0), (0, 1), (1, 0))
) -> None:
    """``shards``: rank and number of each."""
    from safetensors.torch import save_file

    make_folder(path)
    mean, std = torch.arange(8.0), torch.full((8,), 2.0)
    rows = torch.from_numpy(samples(count, side, tuple((1 / std).tolist()), tuple(mean.tolist())))
    labels = torch.from_numpy(labels_of(count))
    for (rank, number), part in zip(shards, torch.arange(count).chunk(len(shards)), strict=True):
        views = {"latents": rows[part], "latents_flip": rows[part].flip(-1).contiguous(), "labels": labels[part]}
        save_file(views, path / f"latents_rank{rank:02d}_shard{number:03d}.safetensors")
    torch.save({"mean": mean.view(1, 8, 1, 1), "std": std.view(1, 8, 1, 1)}, path / "latents_stats.pt")


def numpy_folder(path: Path, count: int = 24, side: int = 8) -> None:
    make_folder(path)
    np.save(path / "latents.npy", samples(count, side, (1.0,) * 4).astype(np.float16))
    np.save(path / "labels.npy", labels_of(count))
