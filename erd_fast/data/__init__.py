"""Latent stores and their readers."""

from erd_fast.data.importers import BUNDLED, open_dataset
from erd_fast.data.loaders import Batch, Loader, Reader, open_reader
from erd_fast.data.manifest import Manifest
from erd_fast.data.store import LatentStore
from erd_fast.data.writer import write_store
from erd_fast.latents import LatentKind

__all__ = [
    "BUNDLED",
    "Batch",
    "LatentKind",
    "LatentStore",
    "Loader",
    "Manifest",
    "Reader",
    "open_dataset",
    "open_reader",
    "write_store",
]
