"""Images in a folder, or in a .zip file that has the same form."""

import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from erd_fast.data.formats.source import reading
from erd_fast.data.pictures.pictures import Pictures, classes_of_folders, classes_of_json, is_image, refuse_escape
from erd_fast.errors import DataError

_JSON = "dataset.json"


def open_folder(src: Path) -> Pictures:
    """Images below ``src``, at any depth."""

    def read(name: str) -> bytes:
        with open(f"{src}/{name}", "rb") as stream:
            return stream.read()

    return _pictures(src, dict(_files(src)), read, has_json=(src / _JSON).is_file())


def _files(src: Path) -> Iterator[tuple[str, int]]:
    """(name below ``src``, size) of each image."""
    begin = len(str(src)) + 1
    for folder, _, files in os.walk(src, followlinks=True):
        for file in files:
            path = f"{folder}/{file}"
            if is_image(path[begin:]):
                yield path[begin:], _size(path)


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:  # a link that leads nowhere: a broken image, as all that cannot be read
        return 0


def open_zip(src: Path) -> Pictures:
    """Images in a .zip file."""
    try:
        archive = zipfile.ZipFile(src)
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"{src} cannot be read as a zip file: {error}") from error
    entries = [entry for entry in archive.infolist() if not entry.is_dir()]
    for entry in entries:
        refuse_escape(src, entry.filename)
    sizes = {entry.filename: entry.file_size for entry in entries if is_image(entry.filename)}
    return _pictures(src, sizes, archive.read, has_json=any(entry.filename == _JSON for entry in entries))


def _pictures(src: Path, sizes: dict[str, int], read: Callable[[str], bytes], has_json: bool) -> Pictures:
    names = sorted(sizes)
    class_names: tuple[str, ...] = ()
    if has_json:
        with reading(f"{src}: {_JSON}", zipfile.BadZipFile, RuntimeError, zlib.error):
            content = read(_JSON)
        labels = classes_of_json(src, names, content)
    else:
        labels, class_names = classes_of_folders(src, names)
    return Pictures(names, [sizes[name] for name in names], labels, class_names, lambda i: read(names[i]))
