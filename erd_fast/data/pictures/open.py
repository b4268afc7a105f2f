"""Which kind of collection a path names."""

import glob
from collections.abc import Sequence
from pathlib import Path

from erd_fast.data.pictures.folders import open_folder, open_zip
from erd_fast.data.pictures.parquet import open_parquet
from erd_fast.data.pictures.pictures import Pictures
from erd_fast.data.pictures.tars import open_tar, open_tars
from erd_fast.errors import DataError

_ALLOWED = "a folder of images, .zip, .tar (WebDataset, or a tar of tars as ImageNet's), .parquet, or a folder of these"


def open_pictures(src: Path) -> Pictures:
    """The images of ``src``, none of which is read yet.

    - a folder, or a .zip file: the first folder on an image's way is its class; without folders there are no classes. A
      ``dataset.json`` at its top says otherwise.
    - a .tar file, a folder of them, or a pattern such as ``train-*.tar``: samples ``key.jpg`` with ``key.cls``.
    - a .tar file of .tar files, each of which is a class and has its name: ILSVRC2012_img_train.tar.
    - a .parquet file, a folder of them, or a pattern, with columns ``image`` and ``label``, as Hugging Face's.

    Raises:
        DataError: it is none of these, is damaged, or has no images. ConfigError: pyarrow is not installed.
    """
    pictures = _open(src)
    if not len(pictures):
        raise DataError(f"{src}: found no images, allowed {_ALLOWED}")
    if pictures.labels and max(pictures.labels) >= pictures.num_classes:
        largest, names = max(pictures.labels), len(pictures.class_names)
        raise DataError(f"{src}: given label {largest} and names of {names} classes, allowed labels 0 to {names - 1}")
    return pictures


def _open(src: Path) -> Pictures:
    if src.is_dir():
        files = [*src.glob("*.tar"), *src.glob("*.parquet")]
        return _open_all(src, sorted(files)) if files else open_folder(src)
    if not src.exists():
        files = [Path(file) for file in glob.glob(str(src))]
        if not files:
            raise DataError(f"{src} does not exist")
        return _open_all(src, sorted(files))
    if src.suffix == ".zip":
        return open_zip(src)
    if src.suffix == ".tar":
        return open_tar(src)
    if src.suffix == ".parquet":
        return open_parquet([src])
    packed = " (a packed tar cannot be read in any order: unpack it to .tar)" if ".tar." in src.name else ""
    raise DataError(f"{src}: given a file of another kind{packed}, allowed {_ALLOWED}")


def _open_all(src: Path, files: Sequence[Path]) -> Pictures:
    suffixes = {file.suffix for file in files}
    if suffixes == {".tar"}:
        return open_tars(files)
    if suffixes == {".parquet"}:
        return open_parquet(files)
    raise DataError(f"{src}: given files {', '.join(sorted(suffixes))}, allowed .tar alone or .parquet alone")
