"""What a collection of images is, wherever it lies: names, labels, and bytes on request."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import PurePosixPath

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
