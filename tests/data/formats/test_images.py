"""images: pixels of any collection that encode reads."""

import io

import pytest
import torch
from PIL import Image

from erd_fast.data.formats import images
from erd_fast.data.pictures import decode, open_pictures
from erd_fast.errors import ConfigError
from support.pictures import COLLECTIONS


@pytest.mark.parametrize("form", COLLECTIONS)
def test_rows_are_the_middle_of_each_image_with_its_class(form, tmp_path, imported, monkeypatch):
    monkeypatch.setattr(images, "ROWS_AT_ONCE", 5)  # the parts' seams leave no trace
    COLLECTIONS[form](tmp_path / form, count=12, side=40)
    store, pictures = imported("images", tmp_path / form, size=24, dtype="float16"), open_pictures(tmp_path / form)
    manifest = store.manifest
    assert (len(store), manifest.kind, manifest.shape, manifest.dtype) == (12, "pixels", (3, 24, 24), "uint8")
    assert (manifest.flip, manifest.crop, manifest.num_classes) == ("mirror", "adm-center", 2)
    assert (store.labels.tolist(), manifest.class_names) == (list(pictures.labels), pictures.class_names)
    for i, row in enumerate(store.gather(torch.arange(12))):
        assert torch.equal(row.permute(1, 2, 0), torch.from_numpy(decode(pictures.read(i), 24).copy()))


def _flat(folder, *contents: bytes) -> None:
    folder.mkdir()
    for number, content in enumerate(contents):
        (folder / f"{number}.png").write_bytes(content)


def _png() -> bytes:
    file = io.BytesIO()
    Image.new("L", (70, 70), 9).save(file, format="png")
    return file.getvalue()


def test_images_without_folders_have_no_classes_and_need_not_be_mirrored(tmp_path, imported):
    _flat(tmp_path / "flat", _png(), _png())
    manifest = imported("images", tmp_path / "flat", flip="none", dtype="float16").manifest
    assert (manifest.num_classes, manifest.flip, manifest.shape) == (0, "none", (3, 64, 64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size: given 0, allowed 1 or more"),
        ({"flip": "stored"}, "flip: given stored, allowed none, mirror: pixels are mirrored in training"),
    ],
)
def test_options_that_are_not_allowed_are_named(options, message, tmp_path, refused):
    _flat(tmp_path / "flat", _png())
    assert refused("images", tmp_path / "flat", ConfigError, **options) == message


def test_a_damaged_image_is_named(tmp_path, refused):
    _flat(tmp_path / "flat", _png(), b"no image")
    assert refused("images", tmp_path / "flat") == f"{tmp_path}/flat: 1.png is damaged: no image of a known format"
