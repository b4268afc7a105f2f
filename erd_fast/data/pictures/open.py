"""Which kind of collection a path names."""

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
    - a .tar file, or a folder of them, of ``key.jpg`` with ``key.cls``.
    - a .tar file of .tar files, each of which is a class and has its name: ILSVRC2012_img_train.tar.
    - a .parquet file, or a folder of them, with columns ``image`` and ``label``, as Hugging Face's.

    Raises:
        DataError: it is none of these, is damaged, or has no images. ConfigError: pyarrow is not installed.
    """
    if not src.exists():
        raise DataError(f"{src} does not exist")
    pictures = _open(src)
    if not len(pictures):
        raise DataError(f"{src}: found no images, allowed {_ALLOWED}")
    return pictures


def _open(src: Path) -> Pictures:
    if src.is_dir():
        if tars := sorted(src.glob("*.tar")):
            return open_tars(tars)
        if files := sorted(src.glob("*.parquet")):
            return open_parquet(files)
        return open_folder(src)
    if src.suffix == ".zip":
        return open_zip(src)
    if src.suffix == ".tar":
        return open_tar(src)
    if src.suffix == ".parquet":
        return open_parquet([src])
    packed = " (a packed tar cannot be read in any order: unpack it to .tar)" if ".tar." in src.name else ""
    raise DataError(f"{src}: given a file of another kind{packed}, allowed {_ALLOWED}")
