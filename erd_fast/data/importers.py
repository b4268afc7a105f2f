"""Data sets into stores: the formats that are imported, and what ``data.path`` may name."""

import functools
from collections.abc import Callable
from pathlib import Path

import torch

from erd_fast.data.formats.convert import write_source
from erd_fast.data.formats.source import ImportOptions
from erd_fast.data.idx import find_idx, idx_identity, import_idx
from erd_fast.data.store import LatentStore
from erd_fast.data.writer import refuse_existing, write_store
from erd_fast.errors import DataError, unknown_name
from erd_fast.files import cache_folder


def import_digits(path: Path) -> LatentStore:
    """scikit-learn's handwritten digits (UCI, Alpaydin & Kaynak): 1,797 images (1, 8, 8) in 10 classes.

    Grey levels 0 to 16 become uint8 0 to 255. The data come with scikit-learn; nothing is downloaded.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(digits.target)
    names = tuple(str(name) for name in digits.target_names)
    return write_store(path, [(pixels, labels)], kind="pixels", num_classes=10, class_names=names)


def import_dataset(name: str, src: Path, dst: Path, options: ImportOptions | None = None) -> LatentStore:
    """Write what lies in ``src`` in the format ``name`` as a store ``dst``. Of the data a shard is held in memory.

    Raises:
        ConfigError: the format is unknown, or an option is not for it.
        DataError: ``src`` is missing, damaged or in another format, or ``dst`` exists. Nothing is left then.
        RunError: ``dst`` cannot be written.
    """
    from erd_fast.data.formats.registry import open_source  # with Pillow, which `make gpu` does without

    refuse_existing(dst)  # before millions of files are listed
    options = options or ImportOptions()
    return write_source(open_source(name, src, options), src, dst, options)


BUNDLED: dict[str, Callable[[Path], LatentStore]] = {"digits": import_digits}


FASHION_MNIST = "/usr/share/datasets/fashion-mnist"  # where Debian's package dataset-fashion-mnist puts its IDX files


def open_dataset(path: str, verify: bool | None = None) -> LatentStore:
    """Open ``path``: a bundled data set's name, the folder of a store, or a folder of IDX files.

    What is no store yet is imported into the cache on first use. A folder that has a bundled set's name is
    ``./digits``.

    Raises:
        DataError: none of these, or the store or the files are damaged.
    """
    if path in BUNDLED:
        return _cached(path, BUNDLED[path], verify)
    folder = Path(path)
    if not folder.is_dir():
        hint = f", and {unknown_name('bundled data set', path, BUNDLED)}" if "/" not in path else ""
        if path == FASHION_MNIST:
            hint = "; Debian's package dataset-fashion-mnist makes it, or name another folder of IDX files"
        raise DataError(f"data.path: {path} is no folder{hint}")
    if (folder / "manifest.json").is_file() or (files := find_idx(folder)) is None:
        return LatentStore(folder, verify)
    return _cached(idx_identity(files), functools.partial(import_idx, files), verify)


def _cached(name: str, make: Callable[[Path], LatentStore], verify: bool | None) -> LatentStore:
    cached = cache_folder("stores") / name
    if not cached.is_dir():
        try:
            return make(cached)
        except DataError:
            if not cached.is_dir():  # else another process imported it meanwhile
                raise
    return LatentStore(cached, verify)
