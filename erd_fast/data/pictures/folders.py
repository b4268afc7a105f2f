"""Images in a folder, or in a .zip file that has the same form."""

import os
import zipfile
from collections.abc import Callable
from pathlib import Path

from erd_fast.data.pictures.pictures import Pictures, classes_of_folders, classes_of_json, is_image, refuse_escape
from erd_fast.errors import DataError

_JSON = "dataset.json"


def open_folder(src: Path) -> Pictures:
    """Images below ``src``, at any depth."""
    sizes: dict[str, int] = {}
    for folder, folders, files in os.walk(src, followlinks=True):
        folders.sort()
        inside = Path(folder).relative_to(src)
        for file in files:
            name = (inside / file).as_posix()
            if is_image(name):
                sizes[name] = (src / name).stat().st_size
    return _pictures(src, sizes, lambda name: (src / name).read_bytes(), has_json=(src / _JSON).is_file())


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
    labels, class_names = (classes_of_json(src, names, read(_JSON)), ()) if has_json else classes_of_folders(src, names)
    return Pictures(names, [sizes[name] for name in names], labels, class_names, lambda i: read(names[i]))
