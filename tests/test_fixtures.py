"""make fixtures: what it writes can be opened, and a second time costs nothing."""

from PIL import Image

from erd_fast.data import LatentStore
from erd_fast.data.idx import find_idx
from fixtures import write_fixtures


def test_fixtures_are_stores_of_each_kind_and_images(tmp_path):
    *stores, idx, images, celeba = write_fixtures(tmp_path)
    assert find_idx(idx)
    assert [LatentStore(path).manifest.kind for path in stores] == ["pixels", "sample", "mean_std", "mean_logvar"]
    pictures = sorted(images.rglob("*.png"))
    assert len(pictures) == 100
    with Image.open(pictures[0]) as picture:
        assert picture.size == (8, 8)
    assert len(sorted(celeba.glob("*.jpg"))) == 40
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    write_fixtures(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
