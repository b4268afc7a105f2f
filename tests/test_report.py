"""The report page of a run folder: whole, self-contained, and safe with any text in the configuration."""

import base64
import dataclasses
import html
import io
import json
import re
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from erd_fast.diffusion import get_schedule
from erd_fast.errors import DataError, RunError
from erd_fast.report import write_report
from erd_fast.training.config import DataConfig, RunConfig, config_text
from erd_fast.training.presets import get_preset

STEPS = (20, 40, 60)
SCORES = {"class_accuracy": 0.875, "fd_classifier": 12.5799, "judge_holdout_accuracy": 0.9916}


def _png(shade: int) -> bytes:
    """A grey picture of 4 x 3 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", 4, 3, 8, 0, 0, 0, 0)
    pixels = zlib.compress((b"\0" + bytes([shade] * 4)) * 3)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def _log_line(step: int) -> dict[str, Any]:
    by_t: list[float | None] = [0.9 / (b + 1) / step for b in range(10)]
    by_t[3] = None  # no sample fell into this bin
    return {
        "step": step,
        "images": 128 * step,
        "loss": 10.0 / step,
        "grad_norm": 0.5,
        "loss_by_t": by_t,
        "lr": 1e-3,
        "images_per_sec": 411.5,
        "data_wait_pct": 0.25,
    }


def _make_run(folder: Path, config: RunConfig, lines: list[Any], samples: tuple[int, ...] = ()) -> Path:
    (folder / "samples").mkdir(parents=True)
    (folder / "config.yaml").write_text(config_text(config))
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    metrics = {name: line[name] for line in lines if "event" not in line for name in line}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    for step in samples:
        (folder / "samples" / f"step-{step:08d}.png").write_bytes(_png(step))
    return folder


class _Page(HTMLParser):
    """Tags with their attributes, and texts, of a page whose tags must match."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = [*map(_log_line, STEPS), {"step": 60, **SCORES}]
    lines.insert(2, {"event": "resume", "step": 40})
    folder = tmp_path_factory.mktemp("runs") / "first <try>"
    _make_run(folder, get_preset("digits"), lines, samples=(40, 60, 10, 30))
    assert write_report(folder) == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return (run / "report.html").read_text(encoding="utf-8")


def test_nothing_is_loaded_from_outside_the_page(page: str) -> None:
    parsed = _Page(page)
    for tag, attributes in parsed.tags:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "href", "xlink:href", "srcset", "data", "poster", "background"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,"))
        assert not any(name.startswith("on") for name in attributes)
    assert re.findall(r"https?://|@import|url\((?!#)", page) == []


def test_references_inside_charts_are_unique_and_resolve(page: str) -> None:
    identifiers = re.findall(r' id="([^"]*)"', page)
    assert len(identifiers) == len(set(identifiers))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]*)', page)) <= set(identifiers)


def test_samples_are_embedded_unchanged_in_order_with_the_last_one_first(run: Path, page: str) -> None:
    pictures = _Page(page).named("img")
    contents = [base64.b64decode((picture["src"] or "").partition(",")[2]) for picture in pictures]
    shown = (60, 10, 30, 40, 60)
    assert contents == [(run / "samples" / f"step-{step:08d}.png").read_bytes() for step in shown]
    assert [picture["alt"] for picture in pictures] == [f"Grid of samples at step {step}" for step in shown]
    assert (pictures[0]["width"], pictures[0]["height"]) == ("4", "3")


def test_every_chart_has_a_text_alternative_and_text_labels(page: str) -> None:
    parsed = _Page(page)
    labels = {(chart["aria-label"] or "").split()[0].rstrip(",") for chart in parsed.named("svg")}
    assert labels == {"Loss", "Gradient", "Unweighted", "Weight", "Training", "Data"}
    axes = {"step", "loss", "images/s", "% of time", "unweighted loss", "weight w(t)"}
    assert axes | {"constant 1", "1: 0 to 0.1", "10: 0.9 to 1"} <= set(parsed.texts)
    assert "Loss, loss: 0.5 at step 20, 0.1667 at step 60." in page


def test_headline_figures_and_metrics_with_their_meaning(page: str) -> None:
    texts = _Page(page).texts
    planned = get_preset("digits").train.steps
    for figure in ("87.5 %", "12.58", "0.1667", "411.5", "60", f"of {planned:,} steps"):
        assert figure in texts
    for name in (*SCORES, *_log_line(60)):
        assert name in texts
    assert "what the judge itself reaches on unseen real images" in texts
    assert any("no FID" in text for text in texts)


def test_events_tell_of_the_resume(page: str) -> None:
    texts = _Page(page).texts
    assert texts[texts.index("resumed from the checkpoint of this step") - 1] == "step 40"


def test_every_configuration_field_is_shown_with_its_value(page: str) -> None:
    cells = [text for text in _Page(page).texts if text]
    for name, value in get_preset("digits").flat().items():
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        assert cells[cells.index(name) + 1] == ("not set" if value is None else shown)


def test_names_and_values_are_escaped(run: Path, tmp_path: Path) -> None:
    attack = "<script>alert('x')</script>&\""
    config = dataclasses.replace(get_preset("digits"), data=DataConfig(path=attack))
    lines = [{"event": attack, "step": 1}, {"step": 1, attack: attack}]
    page = write_report(_make_run(tmp_path / "run", config, lines)).read_text(encoding="utf-8")
    assert "<script" not in page
    assert html.escape(attack) in page
    assert _Page(page).texts.count(attack) == 4  # data.path, the event, the metric and its value
    assert "<h1>first &lt;try&gt; <span>" in (run / "report.html").read_text(encoding="utf-8")


def test_what_the_run_lacks_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(config_text(get_preset("digits")))
    parsed = _Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert set(parsed.texts) & {"Samples", "Training", "Speed", "Metrics", "Events"} == set()
    assert parsed.named("img") == []
    assert len(parsed.named("svg")) == 1  # the loss weighting, which the configuration alone gives
    assert "train.batch_size" in parsed.texts


def test_long_logs_make_a_small_page_and_damaged_samples_are_left_out(tmp_path: Path) -> None:
    lines = [_log_line(step) for step in range(1, 2002)]
    folder = _make_run(tmp_path / "run", get_preset("digits"), lines, samples=(5,))
    (folder / "samples" / "step-00000009.png").write_bytes(_png(9)[:-4])
    (folder / "samples" / "step-later.png").write_bytes(_png(9))
    page = write_report(folder).read_text(encoding="utf-8")
    assert len(page) < 300_000
    assert "Each point is the mean of several log lines." in page
    assert [picture["alt"] for picture in _Page(page).named("img")] == ["Grid of samples at step 5"]


def test_wide_previews_are_narrowed_in_the_strip_alone(tmp_path: Path) -> None:
    """Those of 256 x 256 images have megabytes each."""
    folder = _make_run(tmp_path / "run", get_preset("digits"), [_log_line(1)], samples=(1,))
    wide = folder / "samples" / "step-00000002.png"
    pixels = np.full((1034, 2582, 3), (20, 120, 220), np.uint8)
    Image.fromarray(pixels).save(wide)
    final, small, narrow = (
        base64.b64decode((picture["src"] or "").partition(",")[2])
        for picture in _Page(write_report(folder).read_text(encoding="utf-8")).named("img")
    )
    assert final == wide.read_bytes() and small == (folder / "samples" / "step-00000001.png").read_bytes()
    with Image.open(io.BytesIO(narrow)) as picture:
        assert picture.size == (662, 265) and picture.getpixel((330, 130)) == (20, 120, 220)


def test_a_speed_of_zero_has_an_axis(tmp_path: Path) -> None:
    """A run of one step ends before a speed is known; matplotlib's warning would be an error here."""
    write_report(_make_run(tmp_path / "run", get_preset("digits"), [_log_line(1) | {"images_per_sec": 0.0}]))


def test_writing_again_gives_the_same_page(run: Path, page: str) -> None:
    assert write_report(run).read_text(encoding="utf-8") == page
    assert [path.name for path in run.iterdir() if path.name.endswith(".partial")] == []


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no config\.yaml.*folder that training wrote") as caught:
        write_report(tmp_path)
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(RunError, match="is not a folder"):
        write_report(tmp_path / "absent")
    assert list(tmp_path.iterdir()) == []


def test_damaged_metrics_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(config_text(get_preset("digits")))
    (tmp_path / "metrics.json").write_text('{"loss": ')
    with pytest.raises(DataError, match=r"metrics\.json"):
        write_report(tmp_path)


def test_the_weight_chart_is_that_of_the_run(tmp_path, tiny) -> None:
    """With the rule's own parameters, and the density of t where it is not uniform."""
    fields = {"weighting": "p2", "gamma": 0.5, "normalize": "none", "t_sampler": "logit_normal"}
    (tmp_path / "config.yaml").write_text(config_text(tiny(diffusion=fields)))
    page = write_report(tmp_path).read_text()
    assert "density of t" in page and "t logit_normal" in page
    at_quarter = get_schedule("cosine").sigma[251]  # P2 with gamma = 1/2; the first time is never drawn
    assert f"Weight p2, least to most noise: 0, {at_quarter:.4g}, " in page
