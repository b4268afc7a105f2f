"""Data sets into stores: what ``data.path`` may name, and how it becomes a store on first use."""

from collections.abc import Callable
from pathlib import Path

import torch

from erd_fast.data.store import LatentStore, write_store
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


BUNDLED: dict[str, Callable[[Path], LatentStore]] = {"digits": import_digits}


def open_dataset(path: str, verify: bool | None = None) -> LatentStore:
    """Open ``path``: the name of a bundled data set, imported into the cache on first use, or the folder of a store.

    A folder that has a bundled set's name is ``./digits``.

    Raises:
        DataError: neither a folder nor a bundled name, or the store is damaged.
    """
    if path not in BUNDLED:
        if Path(path).is_dir():
            return LatentStore(path, verify)
        raise DataError(f"data.path: {path} is no folder, and {unknown_name('bundled data set', path, BUNDLED)}")
    cached = cache_folder("stores") / path
    if not cached.is_dir():
        try:
            return BUNDLED[path](cached)
        except DataError:
            if not cached.is_dir():  # else another process imported it meanwhile
                raise
    return LatentStore(cached, verify)
