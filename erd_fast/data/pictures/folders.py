"""Images in a folder, or in a .zip file that has the same form."""

import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from erd_fast.data.foreign import DATASET_JSON, ZIP_ERRORS, check_entries, labels_of_json, reading
from erd_fast.data.pictures.pictures import Pictures, classes_of_folders, is_image


def open_folder(src: Path) -> Pictures:
    """Images below ``src``, at any depth."""

    def read(name: str) -> bytes:
        with open(f"{src}/{name}", "rb") as stream:
            return stream.read()

    return _pictures(src, dict(_files(src)), read, has_json=(src / DATASET_JSON).is_file())


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
    with reading(f"{src} as a zip file", *ZIP_ERRORS):
        archive = zipfile.ZipFile(src)
    entries = [entry for entry in archive.infolist() if not entry.is_dir()]
    check_entries(src, [entry.filename for entry in entries])
    sizes = {entry.filename: entry.file_size for entry in entries if is_image(entry.filename)}
    return _pictures(src, sizes, archive.read, has_json=any(entry.filename == DATASET_JSON for entry in entries))


def _pictures(src: Path, sizes: dict[str, int], read: Callable[[str], bytes], has_json: bool) -> Pictures:
    names = sorted(sizes)
    class_names: tuple[str, ...] = ()
    if has_json:
        with reading(f"{src}/{DATASET_JSON}", *ZIP_ERRORS):
            content = read(DATASET_JSON)
        labels = labels_of_json(src, names, content)
    else:
        labels, class_names = classes_of_folders(src, names)
    return Pictures(names, [sizes[name] for name in names], labels, class_names, lambda i: read(names[i]))
