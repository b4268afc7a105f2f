"""One self-contained HTML page: skeleton, tables, charts and pictures, to read offline, send or keep.

It needs no network and no script. Charts are SVG whose colours are CSS variables, which follow the reader's light
or dark setting; pictures are PNG files, byte for byte. Arguments are plain text and are escaped here, except
``parts``, ``body`` and ``charts``: HTML that these functions gave. Where there is nothing to show, it is empty.
"""

import base64
import html
import io
import platform
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

import erd_fast

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours to draw charts in, and the CSS variables that take their place.
INK, MUTED, GRID, ACCENT = "#010101", "#020202", "#030303", "#040404"
_VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--rule)", ACCENT: "var(--accent)"}
NOISE_COLOURS = ("#2b83c6", "#9274c8", "#d8634a", "#d99a2b")  # least to most noise; on white and on black

_WIDTH = 1060  # of the page's content at most, in CSS pixels: max-width of the body less its padding
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE: dict[str, Any] = {
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), MUTED),
    **dict.fromkeys(("axes.spines.right", "axes.spines.top", "legend.frameon"), False),
    **{"axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.6, "text.color": INK},
    **{"font.size": 8.5, "lines.linewidth": 1.4, "lines.markersize": 2.2, "svg.fonttype": "none"},
}
_CSS = """
:root { color-scheme: light dark; --page: #fcfcfa; --card: #f3f2ee; --ink: #1d1f22; --muted: #62676e;
  --rule: #dddbd5; --accent: #2468ad; }
@media (prefers-color-scheme: dark) { :root { --page: #15171a; --card: #1e2125; --ink: #e8e6e1;
  --muted: #a0a5ac; --rule: #353a40; --accent: #76b0ee; } }
* { box-sizing: border-box; overflow-wrap: anywhere; }
body { margin: 0 auto; max-width: 1100px; padding: 2.5rem 1.25rem 3rem; background: var(--page);
  color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0; } h1 span { color: var(--muted); font-weight: 400; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 3rem 0 1rem; } p { margin: .4rem 0 0; }
h2, footer { padding-top: .75rem; border-top: 1px solid var(--rule); } footer { margin-top: 3rem; }
.note, figcaption, footer { color: var(--muted); font-size: .875rem; } .note { margin: -.6rem 0 1rem; }
.tiles, .grid, .strip { display: grid; gap: 2rem 2.5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); }
.strip { gap: 1.25rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); }
.tiles { gap: .75rem; margin: 1.75rem 0 0; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); }
.tiles div { display: flex; flex-direction: column-reverse; justify-content: flex-end; padding: .8rem 1rem;
  background: var(--card); border-radius: 8px; }
.tiles dt, .metrics td:last-child, thead th { color: var(--muted); } .tiles dt { font-size: .8125rem; }
.tiles dd { margin: 0; font-size: 1.6rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
figure { margin: 0; min-width: 0; } figcaption strong { display: block; color: var(--ink); font-size: 1rem; }
svg, img { display: block; width: 100%; height: auto; margin: .4rem 0; stroke-linejoin: round; }
img { image-rendering: pixelated; border-radius: 4px; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .3rem 1rem .3rem 0; font-weight: 400; }
tr { border-bottom: 1px solid var(--rule); } tbody th { width: 14rem; white-space: nowrap; }
.metrics tbody th, .config th { font: .8125rem/1.6 ui-monospace, Menlo, Consolas, monospace; }
.config { columns: 26rem 2; column-gap: 2.5rem; } .config table { break-inside: avoid; margin: 0 0 1rem; }
@media (max-width: 600px) { body { padding: 1.5rem 1rem 2rem; } thead { display: none; }
  .metrics tr { display: grid; grid-template-columns: auto 1fr; gap: 0 1rem; padding: .35rem 0; }
  .metrics th, .metrics td { padding: 0; }
  .metrics td:last-child { grid-column: 1 / -1; } .metrics td:nth-child(2) { text-align: right; } }
"""


def page(title: str, parts: Iterable[str]) -> str:
    """The whole document: ``parts`` in their order, then the versions it was written with."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n"
        f"<body>\n{lines([*parts, _footer()])}\n</body>\n</html>\n"
    )


def lines(parts: Iterable[str]) -> str:
    """The parts that are not empty, each on lines of its own."""
    return "\n".join(part for part in parts if part)


def header(title: str, subtitle: str = "", summary: str = "") -> str:
    """Top of the page: the title, the subtitle beside it in grey, the summary below."""
    subtitle = f" <span>{html.escape(subtitle)}</span>" if subtitle else ""
    summary = f"<p>{html.escape(summary)}</p>" if summary else ""
    return lines(["<header>", f"<h1>{html.escape(title)}{subtitle}</h1>", summary, "</header>"])


def tiles(figures: Mapping[str, str]) -> str:
    """Headline figures, large, by what they are."""
    rows = (f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in figures.items())
    return f'<dl class="tiles">\n{lines(rows)}\n</dl>' if figures else ""


def section(title: str, body: str, note: str = "") -> str:
    """``body`` under a heading; nothing without a body."""
    note = f'<p class="note">{html.escape(note)}</p>' if note else ""
    return lines(["<section>", f"<h2>{html.escape(title)}</h2>", note, body, "</section>"]) if body else ""


def grid(*charts: str) -> str:
    """Charts side by side, as many as the window is wide."""
    return f'<div class="grid">\n{lines(charts)}\n</div>' if any(charts) else ""


def table(rows: Sequence[tuple[str, ...]], *titles: str) -> str:
    """Rows of plain text under the titles of their columns; the first cell names its row."""
    head = "".join(f'<th scope="col">{html.escape(title)}</th>' for title in titles)
    body = []
    for name, *cells in rows:
        data = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        body.append(f'<tr><th scope="row">{html.escape(name)}</th>{data}</tr>')
    head = f"<thead><tr>{head}</tr></thead>" if titles else ""
    return f"<table>{head}<tbody>\n{lines(body)}\n</tbody></table>" if rows else ""


def chart(
    name: str,
    title: str,
    note: str,
    alt: str,
    draw: Callable[["Axes"], None],
    size: tuple[float, float] = (4.7, 2.8),
) -> str:
    """What ``draw`` draws, as SVG with its title and note above.

    Args:
        name: identifier that no other chart of the page has: letters, digits, ``_`` and ``-``.
        title: heading of the chart.
        note: what a reader must know about the numbers.
        alt: the chart in words, for those who do not see it.
        draw: called once, to fill the axes; the module's colours follow the page, others stay as they are.
        size: width and height in inches at a font size of 8.5 points; on the page the width is that of its column.
    """
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context(_STYLE | {"svg.hashsalt": name}, after_reset=True):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
    caption = f"<figcaption><strong>{html.escape(title)}</strong>{html.escape(note)}</figcaption>"
    return f"<figure>{caption}{_inline(file.getvalue(), name, html.escape(alt))}</figure>"


def picture(png: bytes, alt: str, caption: str = "", *, magnify: bool = False) -> str:
    """A whole PNG file, at most as large as it is, and smooth where it must be made smaller.

    ``magnify`` is for small pictures whose pixels are to be seen: sharp, and as large as a whole multiple lets the
    picture fit the page, so that all pixels are equally large. It does nothing to pictures wider than the page.
    """
    width, height = struct.unpack(">II", png[16:24])
    factor = _WIDTH // width if magnify else 0
    most, scaling = (width * factor, "") if factor else (width, "; image-rendering: auto")
    size = f'width="{width}" height="{height}" style="max-width: {most}px{scaling}"'
    source = "data:image/png;base64," + base64.b64encode(png).decode()
    image = f'<img src="{source}" {size} alt="{html.escape(alt)}">'
    caption = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{image}{caption}</figure>"


def number(value: float) -> str:
    """Four significant digits; whole numbers and large ones with their thousands separated."""
    return f"{value:,.0f}" if isinstance(value, int) or 1000 <= abs(value) < 1e15 else f"{value:.4g}"


def text(value: Any) -> str:
    """A value from JSON in words: numbers as :func:`number` writes them, lists with commas."""
    if isinstance(value, list):
        return ", ".join(text(item) for item in value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return number(value)
    return "none" if value is None else str(value)


def _inline(svg: str, name: str, label: str) -> str:
    """Matplotlib's SVG file as an element of a page: own identifiers, the page's font and colours, label."""
    svg = re.sub(r"^.*?(?=<svg)|<metadata>.*?</metadata>\s*|<style.*?</style>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r' font-family: [^;"]*;| xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def _footer() -> str:
    import matplotlib

    modules = {"erd-fast": erd_fast, "PyTorch": torch, "Matplotlib": matplotlib}
    versions = ", ".join(f"{name} {module.__version__}" for name, module in modules.items())
    return f"<footer>Written with {html.escape(versions)}, Python {platform.python_version()}.</footer>"
