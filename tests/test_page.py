"""The page itself: whole, self-contained, safe with any text, and drawn in its own colours."""

import base64
import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import matplotlib
import pytest
import torch
from PIL import Image

import erd_fast
from erd_fast import page

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ATTACK = "<script>alert('x')</script>&\""


def _draw(axes: "Axes") -> None:
    """Every colour that follows the page, a marker and a clip path, which SVG refers to by identifiers."""
    for height, colour in enumerate((page.INK, page.MUTED, page.GRID, page.ACCENT)):
        axes.plot([0, 1], [height, height + 1], color=colour, marker="o", label="name")
    axes.set(xlabel="across", ylabel=ATTACK)
    axes.legend()


def _png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (width, height), 200).save(file, format="PNG")
    return file.getvalue()


def _parsed(fragment: str) -> ElementTree.Element:
    """Also checks that tags match: a fragment is XML but for img, which HTML leaves open."""
    return ElementTree.fromstring(re.sub(r"(<img[^>]*)>", r"\1/>", f"<div>{fragment}</div>"))


def _texts(element: ElementTree.Element) -> list[str]:
    return [text.strip() for text in element.itertext() if text.strip()]


@pytest.fixture(scope="module")
def charts() -> list[str]:
    return [page.chart(name, "Title", "Note.", "In words.", _draw) for name in ("first", "second")]


@pytest.fixture(scope="module")
def whole(charts: list[str]) -> str:
    parts = [
        page.header("One", "two", "Three."),
        "",
        page.tiles({"steps": "1,000"}),
        page.section("Charts", page.grid(*charts)),
        page.section("Table", page.table([("a", "b")], "First", "Second")),
        page.section("Picture", page.picture(_png(4, 3), "grey")),
    ]
    return page.page("A title", parts)


def test_parts_stand_in_the_body_in_order_before_the_versions(whole: str) -> None:
    assert whole.startswith("<!DOCTYPE html>\n<html lang=")
    assert "<title>A title</title>" in whole
    body = _parsed(whole.partition("<body>")[2].partition("</body>")[0])
    assert [part.tag for part in body] == ["header", "dl", "section", "section", "section", "footer"]
    versions = (f"erd-fast {erd_fast.__version__}", f"PyTorch {torch.__version__}", matplotlib.__version__, "Python 3.")
    assert all(version in _texts(body[-1])[0] for version in versions)
    assert "\n\n" not in whole.partition("<body>")[2]  # the empty part leaves no trace


def test_nothing_is_loaded_from_outside_the_page(whole: str) -> None:
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert f'<meta http-equiv="Content-Security-Policy" content="{policy}">' in whole
    assert re.findall(r"https?://|@import|url\((?!#)|<(?:script|link|iframe|object)| on\w+=", whole) == []
    sources = re.findall(r' (?:\w+:)?(?:src|href|srcset|data|poster|background)="(.{0,22})', whole)
    assert any(source.startswith("#") for source in sources)
    assert all(source.startswith("#") or source == "data:image/png;base64," for source in sources)


def test_identifiers_of_two_charts_are_distinct_and_references_resolve_in_their_own_chart(charts: list[str]) -> None:
    found = [re.findall(r' id="([^"]*)"', chart) for chart in charts]
    assert len(found[0] + found[1]) == len({*found[0], *found[1]})
    for chart, own in zip(charts, found, strict=True):
        used = re.findall(r'(?:href="#|url\(#)([^")]*)', chart)
        assert used and set(used) <= set(own)


def test_charts_take_their_colours_from_the_page(whole: str, charts: list[str]) -> None:
    style = whole.partition("<style>")[2].partition("</style>")[0]
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    names = {"--ink", "--muted", "--rule", "--accent"}
    assert set(re.findall(r"var\((--[a-z]+)\)", charts[0])) == names
    assert names <= set(re.findall(r"(--[a-z]+):", light)) & set(re.findall(r"(--[a-z]+):", dark))
    texts = re.findall(r"<text [^>]*>", charts[0])
    assert texts and all("fill: var(--" in text for text in texts)
    assert re.findall(r"#0[1-4]0[1-4]0[1-4]|#000000|#ffffff", "".join(charts)) == []


def test_a_chart_has_title_note_text_alternative_and_text_labels(charts: list[str]) -> None:
    figure = _parsed(charts[0])[0]
    caption, svg = figure
    assert (figure.tag, _texts(caption)) == ("figure", ["Title", "Note."])
    assert (svg.get("role"), svg.get("aria-label")) == ("img", "In words.")
    assert {"across", ATTACK} <= set(_texts(svg))


def test_a_chart_is_as_large_as_asked_for() -> None:
    def size(chart: str) -> list[float]:
        box = _parsed(chart)[0][1].get("viewBox") or ""
        return [float(number) / 72 for number in box.split()[2:]]

    assert size(page.chart("a", "", "", "", _draw)) == pytest.approx([4.7, 2.8])
    assert size(page.chart("a", "", "", "", _draw, size=(7, 3))) == pytest.approx([7, 3])


def test_drawing_again_gives_the_same_chart_and_leaves_matplotlib_as_it_was(charts: list[str]) -> None:
    before = dict(matplotlib.rcParams)
    assert page.chart("first", "Title", "Note.", "In words.", _draw) == charts[0]
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    ("make", "times"),
    [
        (lambda: page.header(ATTACK, ATTACK, ATTACK), 3),
        (lambda: page.tiles({ATTACK: ATTACK}), 2),
        (lambda: page.section(ATTACK, "<p>body</p>", ATTACK), 2),
        (lambda: page.table([(ATTACK, ATTACK, "")], ATTACK, ATTACK, ATTACK), 5),
        (lambda: page.picture(_png(1, 1), ATTACK, ATTACK), 1),
        (lambda: page.chart("a", ATTACK, ATTACK, ATTACK, lambda axes: None), 2),
    ],
    ids=["header", "tiles", "section", "table", "picture", "chart"],
)
def test_text_is_escaped(make: Callable[[], str], times: int) -> None:
    fragment = make()
    assert "<script" not in fragment
    parsed = _parsed(fragment)
    assert _texts(parsed).count(ATTACK) == times
    assert all(element.get(name, ATTACK) == ATTACK for element in parsed.iter() for name in ("alt", "aria-label"))


def test_the_title_is_escaped() -> None:
    assert "<title>&lt;b&gt; &amp;</title>" in page.page("<b> &", [])


def test_a_table_has_its_titles_above_and_names_its_rows() -> None:
    table = _parsed(page.table([("x", "1", "2"), ("y", "3", "")], "Name", "One", "Two"))[0]
    head, body = table
    assert [(cell.tag, cell.get("scope"), cell.text) for cell in head[0]] == [
        ("th", "col", "Name"),
        ("th", "col", "One"),
        ("th", "col", "Two"),
    ]
    rows = [[(cell.tag, cell.get("scope"), cell.text) for cell in row] for row in body]
    assert rows == [
        [("th", "row", "x"), ("td", None, "1"), ("td", None, "2")],
        [("th", "row", "y"), ("td", None, "3"), ("td", None, None)],
    ]
    assert [part.tag for part in _parsed(page.table([("x", "1")]))[0]] == ["tbody"]


def test_what_is_empty_shows_nothing() -> None:
    assert page.table([], "Name") == page.tiles({}) == page.grid("", "") == page.section("Title", "", "Note.") == ""
    assert page.lines(["a", "", "b"]) == "a\nb"
    assert [part.tag for part in _parsed(page.section("Title", "<b/>"))[0]] == ["h2", "b"]
    assert [part.tag for part in _parsed(page.section("Title", "<b/>", "Note."))[0]] == ["h2", "p", "b"]
    header = _parsed(page.header("Title"))[0]
    assert [part.tag for part in header.iter()] == ["header", "h1"]


@pytest.mark.parametrize(
    ("magnify", "width", "style"),
    [
        (True, 40, "max-width: 1040px"),
        (True, 1100, "max-width: 1100px; image-rendering: auto"),
        (False, 40, "max-width: 40px; image-rendering: auto"),
    ],
)
def test_a_picture_is_embedded_unchanged_and_keeps_its_proportions(magnify: bool, width: int, style: str) -> None:
    png = _png(width, 30)
    image, caption = _parsed(page.picture(png, "grey", "Below.", magnify=magnify))[0]
    assert base64.b64decode((image.get("src") or "").partition(",")[2]) == png
    assert (image.get("width"), image.get("height"), image.get("style")) == (str(width), "30", style)
    assert (image.get("alt"), caption.text) == ("grey", "Below.")
    assert [part.tag for part in _parsed(page.picture(png, "grey"))[0]] == ["img"]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (1234567, "1,234,567"),
        (1234.5678, "1,235"),
        (0.000123456, "0.0001235"),
        (-12.0, "-12"),
        (1e20, "1e+20"),
        (10**15, "1,000,000,000,000,000"),
        ([1, None, [0.5]], "1, none, 0.5"),
        (True, "True"),
        ("flow", "flow"),
    ],
)
def test_values_in_words(value: object, words: str) -> None:
    assert page.text(value) == words
