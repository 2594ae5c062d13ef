# SPDX-License-Identifier: BSD-3-Clause
"""Shapes and text of an SVG, in two palettes, with the boxes of all text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

# Okabe and Ito's colours, which the colour-blind tell apart, made to stand on both papers.
LIGHT = {
    "paper": "#ffffff",
    "ink": "#1f2328",
    "soft": "#59636e",
    "grid": "#d8dee4",
    "conv": "#0072b2",
    "bn": "#e69f00",
    "relu": "#009e73",
    "add": "#cc79a7",
    "pool": "#56b4e9",
    "linear": "#8a7a00",
    "other": "#8c959f",
    "fused": "#d55e00",
}
DARK = {
    "paper": "#0d1117",
    "ink": "#e6edf3",
    "soft": "#9da7b1",
    "grid": "#30363d",
    "conv": "#3b9ad9",
    "bn": "#f0b429",
    "relu": "#2bbf93",
    "add": "#de93bd",
    "pool": "#8fd0f5",
    "linear": "#e3d84a",
    "other": "#7d8590",
    "fused": "#ff7b29",
}
KINDS = ("conv", "bn", "relu", "add", "pool", "linear")
WIDE = 0.6
"""Width of a letter of its font's size, taken large: fonts differ from reader to reader."""


class Box(NamedTuple):
    """A rectangle: left, top, right, bottom."""

    x0: float
    y0: float
    x1: float
    y1: float

    def meets(self, other: Box) -> bool:
        """Whether the two overlap."""
        return (
            self.x0 < other.x1 and other.x0 < self.x1 and self.y0 < other.y1 and other.y0 < self.y1
        )


def colour_of(kind: str) -> str:
    """The palette's name for a layer's kind."""
    return kind if kind in KINDS else "other"


def text_box(x: float, y: float, text: str, size: float, anchor: str = "start") -> Box:
    """Where a text stands whose baseline begins, or is centred or ends, at (x, y)."""
    width = WIDE * size * len(text)
    left = x - width * {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor]
    return Box(left, y - 0.8 * size, left + width, y + 0.25 * size)


def fitted(text: str, size: float, width: float) -> str:
    """A text cut so that it takes no more than `width`."""
    most = max(int(width / (WIDE * size)), 1)
    return text if len(text) <= most else text[: most - 1] + "…"


def number(value: float) -> str:
    """A coordinate, with as few digits as do."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


class Canvas:
    """Collects shapes; `labels` are the boxes of its texts."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.labels: list[Box] = []
        self._shapes: list[str] = []

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = 11,
        anchor: str = "start",
        style: str = "ink",
        bold: bool = False,
        halo: bool = False,
    ) -> None:
        """Write a line; `y` is its baseline; a halo of paper sets it off from what is below."""
        self.labels.append(text_box(x, y, text, size, anchor))
        where = f'x="{number(x)}" y="{number(y)}" font-size="{number(size)}"'
        where += "" if anchor == "start" else f' text-anchor="{anchor}"'
        where += ' font-weight="600"' if bold else ""
        if halo:
            self._shapes.append(
                f'<text class="paper halo" aria-hidden="true" {where}>{escape(text)}</text>'
            )
        self._shapes.append(f'<text class="{style}" {where}>{escape(text)}</text>')

    def is_free(self, box: Box, among: Sequence[Box] = ()) -> bool:
        """Whether a text in `box` would meet no other, and none of the boxes `among`."""
        return not any(box.meets(other) for other in (*self.labels, *among))

    def rect(self, box: Box, style: str, title: str = "", extra: str = "") -> None:
        """Fill a rectangle."""
        size = f'width="{number(box.x1 - box.x0)}" height="{number(box.y1 - box.y0)}"'
        where = f'x="{number(box.x0)}" y="{number(box.y0)}"'
        self.shape(f'rect class="{style}" {where} {size}{extra}', title)

    def line(self, x0: float, y0: float, x1: float, y1: float, style: str, extra: str = "") -> None:
        """Draw a straight line; `style` ends in `-line`."""
        ends = f'x1="{number(x0)}" y1="{number(y0)}" x2="{number(x1)}" y2="{number(y1)}"'
        self.shape(f'line class="{style}" {ends}{extra}')

    def polygon(
        self, points: Sequence[tuple[float, float]], style: str, title: str = "", extra: str = ""
    ) -> None:
        """Fill a polygon."""
        found = " ".join(f"{number(x)},{number(y)}" for x, y in points)
        self.shape(f'polygon class="{style}" points="{found}"{extra}', title)

    def circle(self, x: float, y: float, radius: float, style: str, title: str = "") -> None:
        """Draw a dot."""
        where = f'cx="{number(x)}" cy="{number(y)}" r="{number(radius)}"'
        self.shape(f'circle class="{style}" {where}', title)

    def shape(self, tag: str, title: str = "") -> None:
        """Add an element; its title shows when the mouse rests on it."""
        name = tag.split(" ", 1)[0]
        inside = f"<title>{escape(title)}</title>" if title else ""
        self._shapes.append(f"<{tag}>{inside}</{name}>" if inside else f"<{tag}/>")

    def svg(self, title: str) -> str:
        """The whole picture."""
        size = f'width="{number(self.width)}" height="{number(self.height)}"'
        view = f'viewBox="0 0 {number(self.width)} {number(self.height)}"'
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" {size} {view} role="img" '
                'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">',
                f"<title>{escape(title)}</title>",
                f"<style>{styles()}</style>",
                *self._shapes,
                "</svg>\n",
            ]
        )


def _rules(palette: dict[str, str]) -> str:
    """A class of that name for every colour, one for lines of it, and one for its veil."""
    return (
        "".join(
            f".{name}{{fill:{colour}}}.{name}-line{{stroke:{colour}}}"
            for name, colour in palette.items()
        )
        + f".halo{{stroke:{palette['paper']}}}"
    )


def styles() -> str:
    """The style sheet: light, and dark where the reader prefers that.

    No variables: a viewer that knows neither these nor media queries shows the light picture.
    """
    dark = f"@media (prefers-color-scheme:dark){{{_rules(DARK)}}}"
    fixed = ".veil{fill-opacity:.13}.veil.odd{fill-opacity:.26}.halo{stroke-width:3}"
    return f"{_rules(LIGHT)}{fixed}{dark}"
