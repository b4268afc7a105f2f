"""Images in tar files, which are indexed once by their headers; nothing is unpacked."""

import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from erd_fast.data.pictures.pictures import Pictures, is_image
from erd_fast.errors import DataError


class _Image(NamedTuple):
    """Where an image lies."""

    name: str
    archive: Path
    begin: int
    size: int


def open_tar(src: Path) -> Pictures:
    """One tar file: a tar of tars, each of which is a class, or a shard of a WebDataset."""
    with _opened(src) as archive:
        first = next(_files(src, archive), None)
    if first is not None and first.name.endswith(".tar"):
        return _tar_of_tars(src)
    return open_tars([src])


def open_tars(tars: Sequence[Path]) -> Pictures:
    """Shards of a WebDataset: ``key.jpg`` and ``key.cls``, a number in ASCII, one after the other. Other files of a
    sample are passed over."""
    images: list[_Image] = []
    labels: list[int] = []
    for tar in tars:
        for key, image, label in _samples(tar):
            images.append(image)
            if label is not None:
                labels.append(label)
            if len(labels) not in (0, len(images)):
                raise DataError(
                    f"{tar}: sample {key} has {'no' if label is None else 'a'} .cls, unlike those before it"
                )
    # Keys may be the same in two shards.
    names = [f"{image.archive.name}/{image.name}" if len(tars) > 1 else image.name for image in images]
    return Pictures(names, [image.size for image in images], labels or None, (), _reader(images))


def _tar_of_tars(src: Path) -> Pictures:
    by_class: dict[str, list[_Image]] = {}
    with _opened(src) as archive:
        for inner in _files(src, archive):
            if not inner.name.endswith(".tar"):
                raise DataError(f"{src}: given {inner.name} among tar files, allowed tar files alone")
            where = f"{src}, {inner.name}"
            with _opened(where, archive.extractfile(inner)) as within:
                found = [(file.name, inner.offset_data + file.offset_data, file.size) for file in _files(where, within)]
            by_class[Path(inner.name).stem] = [
                _Image(name, src, *place) for name, *place in sorted(found) if is_image(name)
            ]
    classes = sorted(by_class)
    images = [image for name in classes for image in by_class[name]]
    names = [f"{name}/{image.name}" for name in classes for image in by_class[name]]
    labels = [label for label, name in enumerate(classes) for _ in by_class[name]]
    return Pictures(names, [image.size for image in images], labels, tuple(classes), _reader(images))


def _samples(tar: Path) -> Iterator[tuple[str, _Image, int | None]]:
    """(key, image, class) of each sample that has an image."""
    key, image, label = "", None, None
    with _opened(tar) as archive, open(tar, "rb") as stream:
        for file in _files(tar, archive):
            folder, slash, name = file.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            if (found := folder + slash + stem) != key:
                if image is not None:
                    yield key, image, label
                key, image, label = found, None, None
            if suffix == "cls":
                stream.seek(file.offset_data)
                label = _label(f"{tar}: {file.name}", stream.read(file.size))
            elif is_image(file.name):
                if image is not None:
                    raise DataError(f"{tar}: sample {key} has two images, {image.name} and {file.name}; allowed one")
                image = _Image(file.name, tar, file.offset_data, file.size)
    if image is not None:
        yield key, image, label


def _label(where: str, text: bytes) -> int:
    if not text.strip().isdigit():
        raise DataError(f"{where}: given {text[:20]!r}, allowed a whole number, 0 or more, in ASCII")
    return int(text)


def _opened(where: object, content: IO[bytes] | None = None) -> tarfile.TarFile:
    try:
        return tarfile.open(str(where), "r:") if content is None else tarfile.open(fileobj=content, mode="r:")
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{where} cannot be read as a tar file: {error}") from error


def _files(where: object, archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The files of an archive in order, of which no list is kept: ImageNet's would take a gigabyte."""
    stream: Any = archive.fileobj
    end = stream.seek(0, os.SEEK_END)
    try:
        while (info := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]
            if info.isfile():
                if info.offset_data + info.size > end:
                    raise DataError(f"{where} is truncated: it ends within {info.name}")
                yield info
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{where} is damaged: {error}") from error


def _reader(images: Sequence[_Image]) -> Callable[[int], bytes]:
    """Reads by place, so that threads need not wait for each other."""
    handles = {archive: os.open(archive, os.O_RDONLY) for archive in sorted({image.archive for image in images})}

    def read(i: int) -> bytes:
        image = images[i]
        return os.pread(handles[image.archive], image.size, image.begin)

    return read
