"""celeba: the crop, the partition, and what is refused."""

import pytest
import torch
from PIL import Image

from erd_fast import cli
from erd_fast.data import LatentStore
from erd_fast.data.formats import celeba
from erd_fast.data.formats.source import ImportOptions
from erd_fast.data.importers import import_dataset
from erd_fast.errors import DataError
from support.fixtures import celeba_folder


@pytest.fixture
def faces(tmp_path):
    celeba_folder(tmp_path / "faces", count=5)
    return tmp_path / "faces"


def import_celeba(folder, path, partition=None):
    return import_dataset("celeba", folder, path, ImportOptions(partition=partition))


def test_the_store_holds_the_box_around_the_face(faces, tmp_path, monkeypatch):
    monkeypatch.setattr(celeba, "_AT_ONCE", 2)  # the batches' seams leave no trace
    store = import_celeba(faces, tmp_path / "store")
    manifest = store.manifest
    assert (len(store), manifest.kind, manifest.shape, manifest.dtype) == (5, "pixels", (3, 64, 64), "uint8")
    assert (manifest.num_classes, manifest.flip) == (0, "mirror") and not store.labels.any()
    red, green, blue = store.gather(torch.arange(5)).float().unbind(1)
    # A pixel is a mean around columns 25 + 2 i and 26 + 2 i, rows 57 + 2 i and 58 + 2 i; at the edges those outside the
    # box do not count. JPEG of quality 95 adds a few levels.
    place = torch.arange(1, 63) * 2 + 0.5
    assert (red[:, 1:-1, 1:-1] - (25 + place)).abs().max() <= 6
    assert (green[:, 1:-1, 1:-1] - (57 + place)[:, None]).abs().max() <= 6
    assert (red.mean((0, 1)) - (25 + torch.arange(64) * 2 + 0.5)).abs().max() <= 2
    # Files come in the order of their names.
    assert (blue.mean((1, 2)) - 6 * torch.arange(5)).abs().max() <= 3


def test_pixels_beyond_the_box_have_no_part(tmp_path):
    (tmp_path / "faces").mkdir()
    image = Image.new("RGB", (178, 218), "white")
    image.paste("black", (25, 57, 153, 185))
    image.save(tmp_path / "faces" / "000001.jpg", quality=100, subsampling=0)
    pixels = import_celeba(tmp_path / "faces", tmp_path / "store").gather(torch.tensor([0]))
    # The box begins within a JPEG block of 8 x 8, which rings; a neighbour of weight 1/8 would add 32.
    assert pixels.max() <= 8


def test_a_partition_leaves_the_training_images(faces, tmp_path, capsys):
    partition = tmp_path / "list_eval_partition.txt"
    partition.write_text("000004.jpg 0\n000001.jpg 1\n000002.jpg 0\n000003.jpg 2\n\n")
    cli.main(["data", "import", "celeba", str(faces), str(tmp_path / "store"), "--partition", str(partition)])
    assert f"wrote {tmp_path / 'store'}: 2 samples, pixels (3, 64, 64)" in capsys.readouterr().out
    blue = LatentStore(tmp_path / "store").gather(torch.arange(2)).float()[:, 2].mean((1, 2))
    assert (blue - torch.tensor([6.0, 18.0])).abs().max() <= 3
    cli.main(["data", "info", str(tmp_path / "store")])
    said = capsys.readouterr().out
    assert "samples      2\n" in said and "pixels, uint8, 3 x 64 x 64" in said and "classes      none" in said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("000001.jpg 0\n000009.jpg 0\n000008.jpg 0", "names 2 training images that are not in .*, first 000008.jpg"),
        ("000001.jpg 0\n000002.jpg 3", "line 2: given '000002.jpg 3', allowed a file's name and 0, 1 or 2"),
        ("000001.jpg", "line 1: given '000001.jpg'"),
        ("000001.jpg 2", "names no training image"),
        ("", "names no training image"),
        (None, "cannot be read"),
    ],
)
def test_a_wrong_partition_is_refused(faces, tmp_path, content, message):
    partition = tmp_path / "list_eval_partition.txt"
    if content is not None:
        partition.write_text(content)
    with pytest.raises(DataError, match=message):
        import_celeba(faces, tmp_path / "store", partition)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("damage", ["other size", "truncated", "text"])
def test_an_image_that_is_no_aligned_face_is_named(faces, tmp_path, damage):
    file = faces / "000003.jpg"
    if damage == "other size":
        Image.new("RGB", (218, 178)).save(file)
    else:
        file.write_bytes(file.read_bytes()[:700] if damage == "truncated" else b"no image")
    message = {"other size": r"given 218 x 178 pixels, allowed aligned images of 178 x 218"}.get(damage, "is damaged")
    with pytest.raises(DataError, match=f"000003.jpg.*{message}"):
        import_celeba(faces, tmp_path / "store")
    assert [path.name for path in tmp_path.iterdir()] == ["faces"]


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"found no \*\.jpg, allowed CelebA's folder img_align_celeba"):
        import_celeba(tmp_path, tmp_path / "store")
    with pytest.raises(DataError, match="nowhere does not exist"):
        import_celeba(tmp_path / "nowhere", tmp_path / "store")


def test_a_store_that_is_there_is_left_as_it_is(faces, tmp_path):
    fingerprint = import_celeba(faces, tmp_path / "store").fingerprint
    (faces / "000001.jpg").unlink()
    with pytest.raises(DataError, match="exists already"):
        import_celeba(faces, tmp_path / "store")
    assert LatentStore(tmp_path / "store").fingerprint == fingerprint
