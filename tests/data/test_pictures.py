"""pictures: five forms of one collection are one collection, and what is damaged is named."""

import io
import json
import os
import struct
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from erd_fast.data.pictures import decode, open_pictures
from erd_fast.data.pictures.crop import centre_crop
from erd_fast.errors import DataError
from support.pictures import COLLECTIONS, add_to_tar, pictures

WHICH = {"count": 12, "side": 40}


@pytest.fixture(scope="module")
def collections(tmp_path_factory):
    folder = tmp_path_factory.mktemp("collections")
    for name, make in COLLECTIONS.items():
        make(folder / name, **WHICH)
    return folder


def _png(colour: object = 7, size: tuple[int, int] = (9, 9), mode: str = "L") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, format="png")
    return file.getvalue()


@pytest.mark.parametrize("form", COLLECTIONS)
def test_every_form_gives_the_files_in_one_order_with_their_classes(collections, form):
    expected = sorted(pictures(**WHICH))
    found = open_pictures(collections / form)
    assert [found.read(i) for i in range(len(found))] == [content for _, _, content in expected]
    assert list(found.labels) == [label for _, label, _ in expected]
    assert found.num_classes == 2 and len(set(found.names)) == 12
    named = form in ("images", "images.parquet", "imagenet.tar")
    assert found.class_names == (("china", "flower") if named else ())


@pytest.mark.parametrize("form", COLLECTIONS)
def test_images_are_read_in_any_order_by_several_threads(collections, form):
    found = open_pictures(collections / form)
    expected = [found.read(i) for i in range(12)]
    wanted = np.random.default_rng(0).integers(0, 12, 300).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(found.read, wanted)) == [expected[i] for i in wanted]


def test_another_name_size_or_class_is_another_identity(tmp_path):
    identities = set()
    for number, (folder, name, content) in enumerate(
        [("a", "x.png", _png()), ("a", "y.png", _png()), ("b", "x.png", _png()), ("a", "x.png", _png() + b" ")]
    ):
        path = tmp_path / str(number) / folder / name
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        identities |= {open_pictures(tmp_path / str(number)).identity for _ in range(2)}
    assert len(identities) == 4


def test_a_flat_folder_has_no_classes_and_other_files_do_not_count(tmp_path):
    for name in ("b.PNG", "a.jpeg", "notes.txt", ".hidden.png"):
        (tmp_path / name).write_bytes(_png())
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "a.png").write_bytes(b"")
    found = open_pictures(tmp_path)
    assert (found.names, found.labels, found.num_classes) == (["a.jpeg", "b.PNG"], None, 0)


def test_the_first_folder_is_the_class_at_any_depth(tmp_path):
    for name in ("dog/x/1.png", "cat/y/z/2.png", "dog/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(_png())
    found = open_pictures(tmp_path)
    assert dict(zip(found.names, found.labels, strict=True)) == {"cat/y/z/2.png": 0, "dog/3.png": 1, "dog/x/1.png": 1}


def test_tars_without_labels_have_no_classes_and_keys_may_repeat_in_another_shard(tmp_path):
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as archive:
            add_to_tar(archive, "a.txt", b"words")
            add_to_tar(archive, "a.png", _png(shard))
            add_to_tar(archive, "b.json", b"{}")  # a sample without an image
    found = open_pictures(tmp_path)
    assert (found.names, found.labels) == (["0.tar/a.png", "1.tar/a.png"], None)
    assert [found.read(i) for i in range(2)] == [_png(0), _png(1)]


def test_other_pictures_of_a_sample_are_passed_over(tmp_path):
    _tar(tmp_path / "x.tar", {"1.JPG": PNG, "1.seg.png": PNG, "1.cls": b"7", "._2.png": PNG, "2.mask.png": PNG})
    found = open_pictures(tmp_path / "x.tar")
    assert (found.names, found.labels) == (["1.JPG"], [7])


@pytest.mark.parametrize("form", ["tar", "parquet"])
def test_a_pattern_names_several_files(tmp_path, form):
    for number in range(3):
        file = tmp_path / f"{'train' if number else 'val'}-{number}.{form}"
        _tar(file, {"1.png": _png(number)}) if form == "tar" else _parquet(file, image=[_png(number)])
    found = open_pictures(tmp_path / f"train-*.{form}")
    assert [found.read(i) for i in range(2)] == [_png(1), _png(2)]
    with pytest.raises(DataError, match=r"test-\*.tar does not exist"):
        open_pictures(tmp_path / "test-*.tar")


@pytest.mark.parametrize("form", ["images", "images-webdataset", "images.parquet", "imagenet.tar"])
def test_no_file_is_held_open(collections, form):
    """A data set may have more files than a process may open."""
    before = len(os.listdir("/proc/self/fd"))
    found = open_pictures(collections / form)
    assert all(map(found.read, range(12))) and len(os.listdir("/proc/self/fd")) == before


def test_other_bytes_in_parquet_are_another_identity(tmp_path):
    identities = set()
    for content in (PNG, PNG + b" "):
        _parquet(tmp_path / "x.parquet", image=[content])
        identities |= {open_pictures(tmp_path / "x.parquet").identity for _ in range(2)}
    assert len(identities) == 2


def test_parquet_may_hold_plain_bytes_and_no_labels(tmp_path):
    for number, labels in enumerate(({}, {"label": [-1, -1]})):
        table = pyarrow.table({"image": [_png(1), _png(2)], **labels})
        pyarrow.parquet.write_table(table, tmp_path / f"{number}.parquet")
    found = open_pictures(tmp_path / "1.parquet")
    assert found.labels is None and found.read(1) == _png(2)
    assert len(open_pictures(tmp_path)) == 4


def _zip(path, entries: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def _tar(path, entries: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in entries.items():
            add_to_tar(archive, name, content)


def _parquet(path, **columns) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def _named_parquet(path, names: list[str], **columns) -> None:
    described = json.dumps({"info": {"features": {"label": {"names": names}}}})
    pyarrow.parquet.write_table(pyarrow.table(columns).replace_schema_metadata({"huggingface": described}), path)


def _change(path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(content)


def _cut(path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


PNG = _png()
NESTED = {"a.tar": b"", "b.txt": b""}
BAD = {
    "empty": ("x", lambda p: p.mkdir(), "found no images, allowed a folder of images, .zip"),
    "missing": ("x", lambda p: None, "does not exist"),
    "other": ("x.rar", lambda p: p.write_bytes(b""), "given a file of another kind, allowed"),
    "packed": ("x.tar.gz", lambda p: p.write_bytes(b""), r"of another kind \(a packed tar cannot be read in any order"),
    "no zip": ("x.zip", lambda p: p.write_bytes(b"PK"), "as a zip file cannot be read: File is not a zip file"),
    "zip out": ("x.zip", lambda p: _zip(p, {"../a.png": PNG}), r"entry '\.\./a.png' leaves the folder"),
    "zip root": ("x.zip", lambda p: _zip(p, {"/etc/a.png": PNG}), "entry '/etc/a.png' leaves the folder"),
    "zip drive": ("x.zip", lambda p: _zip(p, {"C:a.png": PNG}), "entry 'C:a.png' leaves the folder"),
    "mixed": ("x.zip", lambda p: _zip(p, {"a/1.png": PNG, "2.png": PNG}), "2.png lies beside folders"),
    "json": ("x.zip", lambda p: _zip(p, {"1.png": PNG, "dataset.json": b"[]"}), "x.zip/dataset.json: given"),
    "json sum": (
        "x.zip",
        lambda p: (_zip(p, {"1.png": PNG, "dataset.json": b"{'labels'"}), _change(p, p.read_bytes().index(b"{'lab"))),
        "dataset.json cannot be read: Bad CRC-32",
    ),
    "tar header": (
        "x.tar",
        lambda p: (_tar(p, {"1.png": bytes(600), "2.png": PNG, "3.png": PNG}), _change(p, 1536 + 20)),
        "x.tar is damaged: what comes after 1,536 bytes is no file",
    ),
    "tar header cut": (
        "x.tar",
        lambda p: (_tar(p, {"1.png": bytes(600), "2.png": PNG}), _cut(p, 1536 + 300)),
        "x.tar is damaged: what comes after 1,536 bytes is no file",
    ),
    "large cls": ("x.tar", lambda p: _tar(p, {"1.png": PNG, "1.cls": b"2147483648"}), "given label 2147483648"),
    "names": (
        "x.parquet",
        lambda p: _named_parquet(p, ["a", "b"], image=[PNG] * 2, label=[0, 2]),
        "given label 2 and names of 2 classes, allowed labels 0 to 1",
    ),
    "tar and parquet": (
        "x",
        lambda p: (p.mkdir(), _tar(p / "1.tar", {"1.png": PNG}), _parquet(p / "1.parquet", image=[PNG])),
        r"given files \.parquet, \.tar, allowed \.tar alone or \.parquet alone",
    ),
    "no tar": ("x.tar", lambda p: p.write_bytes(b"x" * 2000), "cannot be read as a tar file"),
    "tar cut": ("x.tar", lambda p: (_tar(p, {"1.png": bytes(9999)}), _cut(p, 2000)), "truncated: it ends within 1.png"),
    "two images": ("x.tar", lambda p: _tar(p, {"1.png": PNG, "1.jpg": PNG}), "sample 1 has two images, 1.png"),
    "cls": ("x.tar", lambda p: _tar(p, {"1.png": PNG, "1.cls": b"cat"}), "1.cls: given b'cat', allowed a whole number"),
    "some cls": ("x.tar", lambda p: _tar(p, {"1.png": PNG, "2.png": PNG, "2.cls": b"1"}), "sample 2 has a .cls"),
    "lost cls": ("x.tar", lambda p: _tar(p, {"2.png": PNG, "2.cls": b"1", "3.png": PNG}), "sample 3 has no .cls"),
    "tar and file": ("x.tar", lambda p: _tar(p, {"a.tar": bytes(1024), "b.txt": b""}), "given b.txt among tar files"),
    "inner": ("x.tar", lambda p: _tar(p, {"a.tar": b"x" * 600}), "x.tar, a.tar cannot be read as a tar file"),
    "no parquet": ("x.parquet", lambda p: p.write_bytes(b"PAR1"), "cannot be read as Parquet"),
    "columns": ("x.parquet", lambda p: _parquet(p, img=[PNG]), "given columns img; allowed are"),
    "column": ("x.parquet", lambda p: _parquet(p, image=[3]), "column image: given int64, allowed binary, or a struct"),
    "labels": ("x.parquet", lambda p: _parquet(p, image=[PNG], label=["a"]), "column label: given 'a', allowed whole"),
    "some labels": ("x.parquet", lambda p: _parquet(p, image=[PNG] * 2, label=[-1, 3]), "given images with a label"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
def test_what_is_no_collection_is_told_by_its_name(tmp_path, fault):
    name, make, message = BAD[fault]
    make(tmp_path / name)
    with pytest.raises(DataError, match=message) as caught:
        open_pictures(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_a_class_without_images_keeps_its_number(tmp_path):
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as archive:
        add_to_tar(archive, "1.png", PNG)
    _tar(tmp_path / "x.tar", {"n02.tar": inner.getvalue(), "n01.tar": bytes(10240)})
    found = open_pictures(tmp_path / "x.tar")
    assert (found.class_names, list(found.labels)) == (("n01", "n02"), [1])


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 90), height=st.integers(1, 90), size=st.integers(1, 40))
def test_the_crop_is_a_square_of_the_size_asked_for(width, height, size):
    image = Image.new("RGB", (width, height), (200, 100, 50))
    cropped = np.asarray(centre_crop(image, size))
    assert cropped.shape == (size, size, 3) and (cropped == (200, 100, 50)).all()


@pytest.mark.parametrize(("width", "height"), [(80, 60), (60, 80), (151, 97), (320, 240), (16, 33)])
def test_the_crop_shows_the_middle_at_one_scale(width, height):
    columns, rows = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    image = Image.fromarray(np.stack((columns, rows, columns), -1).round().astype(np.uint8))
    found = np.asarray(centre_crop(image, 16)).astype(float)
    part = [min(width, height) / side for side in (width, height)]  # of each side that is shown
    places = [(0.5 + (np.arange(2, 14) - 7.5) / 16 * shown) * 255 for shown in part]
    # Rounding at each halving, an odd row or column that is left over, and half a pixel where the middle is cut out.
    allowed = 3 + 255 * np.array([1.5 / width + part[0] / 16, 1.5 / height + part[1] / 16])
    assert np.abs(found[:, 2:14, 0].mean(0) - places[0]).max() <= allowed[0]
    assert np.abs(found[2:14, :, 1].mean(1) - places[1]).max() <= allowed[1]


def test_large_images_are_halved_by_averages_first():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    halved = noise.reshape(32, 2, 32, 2).mean((1, 3)).round().astype(np.uint8).reshape(16, 2, 16, 2).mean((1, 3))
    found = np.asarray(centre_crop(Image.fromarray(noise), 16)).astype(float)
    assert np.abs(found - halved).max() <= 2  # a half goes up, along rows and along columns, twice


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGB", (1, 2, 3), (1, 2, 3)),
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("RGBA", (10, 20, 30, 0), (10, 20, 30)),
        ("LA", (9, 0), (9, 9, 9)),
        ("I;16", 200 << 8, (200, 200, 200)),
        ("P", 5, None),
    ],
)
def test_every_mode_becomes_rgb(mode, colour, expected):
    image = Image.new(mode, (9, 9), colour)
    if mode == "P":
        image.putpalette([i // 3 for i in range(768)])
        expected = (5, 5, 5)
    file = io.BytesIO()
    image.save(file, format="png", **({"transparency": bytes(range(256))} if mode == "P" else {}))
    assert (decode(file.getvalue(), 4) == expected).all()


def test_cmyk_becomes_rgb_and_an_orientation_is_not_followed():
    file = io.BytesIO()
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(file, format="jpeg", quality=95)
    # JPEG rounds colours on the way there and back; inks taken for light would be off by 255.
    assert np.abs(decode(file.getvalue(), 8).astype(int) - (255, 0, 0)).max() <= 4
    turned = Image.new("L", (8, 8))
    turned.paste(255, (0, 0, 4, 8))
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    turned.save(file, format="png", exif=exif)
    assert decode(file.getvalue(), 8)[:, 0].min() == 255


@pytest.mark.parametrize("content", [b"", b"no image", PNG[:45], struct.pack(">I", 0) + PNG[4:]])
def test_damaged_files_raise(content):
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever Pillow has for it
        decode(content, 8)


def _bytes_of(image: Image.Image, form: str) -> bytes:
    file = io.BytesIO()
    image.save(file, format=form)
    return file.getvalue()


def test_sixteen_bits_in_other_forms_become_eight(tmp_path):
    assert (decode(_bytes_of(Image.new("I", (9, 9), 200 << 8), "ppm"), 4) == 200).all()
    assert (decode(_bytes_of(Image.new("I", (9, 9), 1 << 20), "tiff"), 4) == 255).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no image", "^no image of a known format$"),
        (_bytes_of(Image.new("F", (9, 9)), "tiff"), "pixels are floats"),
        (_bytes_of(Image.new("L", (60_000, 1)), "png"), "60000 x 1 pixels, too long for its width"),
    ],
)
def test_what_cannot_become_a_square_is_told_in_words_that_are_always_the_same(content, message):
    with pytest.raises(DataError, match=message):
        decode(content, 256)


def test_the_dataset_json_of_a_folder_counts_too(tmp_path):
    (tmp_path / "1.png").write_bytes(PNG)
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": None}))
    assert open_pictures(tmp_path).labels is None
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": [["1.png", 4]]}))
    assert (open_pictures(tmp_path).labels, open_pictures(tmp_path).num_classes) == ([4], 5)
