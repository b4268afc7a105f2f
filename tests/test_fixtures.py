"""make fixtures: what it writes can be opened, and a second time costs nothing."""

from erd_fast.data import LatentStore
from erd_fast.data.idx import find_idx
from erd_fast.data.pictures import open_pictures
from support.fixtures import write_fixtures


def test_fixtures_are_stores_of_each_kind_and_images(tmp_path):
    written = {path.name: path for path in write_fixtures(tmp_path)}
    assert find_idx(written["idx"])
    assert LatentStore(written["digits"]).manifest.kind == "pixels"
    for kind in ("sample", "mean_std", "mean_logvar"):
        assert LatentStore(written[f"latents-{kind}"]).manifest.kind == kind
    assert len(open_pictures(written["images"])) == 48
    assert (written["tiny_vae"] / "config.json").is_file()
    assert len(sorted(written["celeba"].glob("*.jpg"))) == 40
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    write_fixtures(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
