"""What a collection of images is, wherever it lies: names, labels, and bytes on request."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import PurePosixPath
from typing import Any

from erd_fast.errors import DataError

SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"))


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Images that can be read in any order, by several threads."""

    names: Sequence[str]
    """Of images, unlike each other."""
    sizes: Sequence[int]
    """Bytes of each, or of the part of a file that it lies in."""
    labels: Sequence[int] | None
    """None: the collection has no classes."""
    class_names: tuple[str, ...]
    """Of labels 0, 1, ...; empty where they have no names."""
    read: Callable[[int], bytes]
    """The file of image ``i``."""

    def __len__(self) -> int:
        return len(self.names)

    @property
    def num_classes(self) -> int:
        return 0 if self.labels is None else len(self.class_names) or max(self.labels) + 1

    @property
    def identity(self) -> str:
        """A hash of names, sizes and labels: another collection has another one."""
        total = hashlib.sha256(json.dumps(self.class_names).encode())
        labels = self.labels or [-1] * len(self)
        for line in zip(self.names, self.sizes, labels, strict=True):
            total.update(json.dumps(line).encode())
        return total.hexdigest()[:16]


def is_image(name: str) -> bool:
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    return path.suffix.lower() in SUFFIXES and not hidden


def refuse_escape(source: object, name: str) -> None:
    """Raise DataError for the name of an entry that is no place within its archive."""
    if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name) or re.match(r"[A-Za-z]:", name):
        raise DataError(f"{source}: entry {name!r} leaves the folder; allowed are paths within it")


def classes_of_folders(source: object, names: Iterable[str]) -> tuple[list[int] | None, tuple[str, ...]]:
    """(labels, class names): the first folder of a name is its class, in the order of their names; without folders
    there are no classes."""
    parts = [name.split("/") for name in names]
    loose = [path[0] for path in parts if len(path) == 1]
    if len(loose) == len(parts):
        return None, ()
    if loose:
        raise DataError(
            f"{source}: {loose[0]} lies beside folders; allowed are images in a folder for each class, or no folders"
        )
    folders = sorted({path[0] for path in parts})
    number = {folder: label for label, folder in enumerate(folders)}
    return [number[path[0]] for path in parts], tuple(folders)


def classes_of_json(source: object, names: Sequence[str], content: bytes) -> list[int] | None:
    """Labels of ``dataset.json``, {"labels": [[name, class], ...]} or null, as EDM2's tools write it."""
    labels = _labels_of_json(f"{source}: dataset.json", content)
    if labels is None:
        return None
    if missing := [name for name in names if name not in labels]:
        raise DataError(f"{source}: dataset.json has no label of {missing[0]} ({len(missing):,} images are without)")
    if absent := sorted(labels.keys() - set(names)):
        raise DataError(f"{source}: dataset.json names {absent[0]}, which is not there ({len(absent):,} like it)")
    return [labels[name] for name in names]


def _labels_of_json(where: str, content: bytes) -> dict[str, int] | None:
    allowed = 'allowed {"labels": [[name, class], ...]}'
    try:
        found: Any = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("labels", 0), list | None):
        raise DataError(f"{where}: given {str(found)[:60]}, {allowed}")
    labels: dict[str, int] = {}
    for pair in found["labels"] or ():
        if not isinstance(pair, list) or [type(item) for item in pair] != [str, int] or pair[1] < 0:
            raise DataError(f"{where}: given {str(pair)[:60]}, {allowed}, classes 0 or more")
        if pair[0] in labels:
            raise DataError(f"{where} names {pair[0]} twice")
        labels[pair[0]] = pair[1]
    return None if found["labels"] is None else labels
