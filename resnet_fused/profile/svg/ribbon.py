# SPDX-License-Identifier: BSD-3-Clause
"""The ribbon: eager's layers above, the fused calls below, on one time scale."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from resnet_fused.profile.result import Layer, Profile, Row
from resnet_fused.profile.svg.draw import Box, Canvas, colour_of, text_box
from resnet_fused.profile.svg.titles import milliseconds, of_layer, of_row

BAR = 38.0
GAP = 74.0
THINNEST = 0.6  # of a bar, so that it can be seen


@dataclass(frozen=True)
class Bar:
    """A layer's place on the time axis, in pixels, and the number of its row."""

    layer: Layer
    row: int
    x0: float
    x1: float


@dataclass(frozen=True)
class Lanes:
    """Both lanes; `rest` are the ends of the untouched models, in pixels."""

    eager: list[Bar]
    fused: list[Bar]
    rest: tuple[float, float]
    per_ms: float


def lay_out(profile: Profile, left: float, width: float) -> Lanes:
    """Give each layer of both models its place; the longer model takes all of `width`."""
    layers = [(layer, i) for i, row in enumerate(profile.rows) for layer in row.eager]
    layers.sort(key=lambda found: found[0].place)
    sums = [sum(layer.ms for layer, _ in layers), sum(row.layer.ms for row in profile.rows)]
    longest = max(profile.eager.ms, profile.fused.ms, *sums)
    per_ms = width / longest if longest > 0 else 0.0

    def row_of_bars(found: Sequence[tuple[Layer, int]]) -> list[Bar]:
        bars, x = [], left
        for layer, row in found:
            bars.append(Bar(layer, row, x, x + layer.ms * per_ms))
            x = bars[-1].x1
        return bars

    eager = row_of_bars(layers)
    fused = row_of_bars([(row.layer, i) for i, row in enumerate(profile.rows)])
    wholes = profile.eager.ms, profile.fused.ms
    return Lanes(eager, fused, (left + wholes[0] * per_ms, left + wholes[1] * per_ms), per_ms)


def runs(bars: Sequence[Bar]) -> Iterator[tuple[int, float, float]]:
    """Neighbours of one row: its number, where they begin and end."""
    for row, found in groupby(bars, key=lambda bar: bar.row):
        group = list(found)
        yield row, group[0].x0, group[-1].x1


def draw(canvas: Canvas, profile: Profile, left: float, top: float, width: float) -> float:
    """Draw the ribbon; returns where it ends."""
    lanes = lay_out(profile, left, width)
    upper, lower = top + 32, top + 32 + BAR + GAP
    _connect(canvas, profile, lanes, upper + BAR, lower)
    for bar in lanes.eager:
        _bar(canvas, bar, upper, colour_of(bar.layer.kind), of_layer(bar.layer, profile))
    for bar in lanes.fused:
        row = profile.rows[bar.row]
        merged = row.layer.path != "eager"
        style = "fused" if merged else colour_of(bar.layer.kind)
        _bar(canvas, bar, lower, style, of_row(row, profile))
    for bars, end, y, what in (
        (lanes.eager, lanes.rest[0], upper, "eager"),
        (lanes.fused, lanes.rest[1], lower, "fused"),
    ):
        _between(canvas, bars[-1].x1 if bars else left, end, y, f"{what}: between layers")
        for x in _edges(bars):
            canvas.line(x, y, x, y + BAR, "paper-line", ' stroke-width="1"')
    _labels(canvas, profile, lanes.eager, upper - 5, -1)
    _labels(canvas, profile, lanes.fused, lower + BAR + 12, 1)
    _ends(canvas, profile, lanes, upper, lower)
    return _axis(canvas, lanes, left, width, lower + BAR + 42)


def _bar(canvas: Canvas, bar: Bar, y: float, style: str, title: str) -> None:
    width = max(bar.x1 - bar.x0, THINNEST)
    canvas.rect(Box(bar.x0, y, bar.x0 + width, y + BAR), style, title)


def _edges(bars: Sequence[Bar]) -> list[float]:
    """Where a gap between two rows does not eat up either."""
    found = list(runs(bars))
    return [
        a[2] for a, b in zip(found, found[1:], strict=False) if min(a[2] - a[1], b[2] - b[1]) > 3
    ]


def _between(canvas: Canvas, start: float, end: float, y: float, title: str) -> None:
    """What the untouched model takes beyond its layers: Python, and torch's way to the kernels."""
    if end - start > THINNEST:
        box = Box(start, y + BAR / 2 - 3, end, y + BAR / 2 + 3)
        canvas.rect(box, "other", title, ' fill-opacity=".45"')


def _connect(canvas: Canvas, profile: Profile, lanes: Lanes, upper: float, lower: float) -> None:
    """Tie each group of eager layers to the bar that it has become."""
    below = {bar.row: bar for bar in lanes.fused}
    for count, (row, x0, x1) in enumerate(runs(lanes.eager)):
        bar = below[row]
        found = profile.rows[row]
        style = "fused" if found.layer.path != "eager" else colour_of(bar.layer.kind)
        corners = [(x0, upper), (max(x1, x0 + THINNEST), upper)]
        corners += [(max(bar.x1, bar.x0 + THINNEST), lower), (bar.x0, lower)]
        odd = " odd" if count % 2 else ""
        canvas.polygon(corners, f"{style} veil{odd}", of_row(found, profile))


def _split(row: Row) -> tuple[str, str]:
    """A name's stem and its last part: `layer1`, `0`."""
    stem, _, last = row.layer.name.rpartition(".")
    return (stem, last) if stem else (last, "")


def _labels(canvas: Canvas, profile: Profile, bars: Sequence[Bar], y: float, away: int) -> None:
    """Numbers of blocks beside their bars, and beyond them the stages, where there is room."""
    stages: dict[str, list[tuple[Row, float, float]]] = {}
    for number, x0, x1 in runs(bars):
        row = profile.rows[number]
        stages.setdefault(_split(row)[0], []).append((row, x0, x1))
    for stem, group in stages.items():
        if len(group) == 1:
            row, x0, x1 = group[0]
            _label(canvas, row.layer.name, x0 - 4, x1 + 4, y + away * 15, 10, "ink")
            continue
        for row, x0, x1 in group:
            _label(canvas, _split(row)[1], x0, x1, y, 9, "soft")
        x0, x1 = group[0][1], group[-1][2]
        canvas.line(x0 + 1, y + away * 5 - 3, x1 - 1, y + away * 5 - 3, "soft-line")
        _label(canvas, stem, x0, x1, y + away * 15, 10, "ink")


def _label(
    canvas: Canvas, text: str, x0: float, x1: float, y: float, size: float, style: str
) -> None:
    """Write a text centred between two places if it is not wider, and is in nobody's way."""
    middle = (x0 + x1) / 2
    box = text_box(middle, y, text, size, "middle")
    if text and box.x1 - box.x0 <= x1 - x0 and canvas.is_free(box):
        canvas.text(middle, y, text, size=size, anchor="middle", style=style)


def _ends(canvas: Canvas, profile: Profile, lanes: Lanes, upper: float, lower: float) -> None:
    """The whole models' times, at the end of the shorter lane or inside the longer's."""
    both = ((profile.eager.ms, lanes.rest[0], upper), (profile.fused.ms, lanes.rest[1], lower))
    for (ms, end, y), who in zip(both, ("eager", "fused"), strict=True):
        bars = lanes.eager if who == "eager" else lanes.fused
        right = max([end, *(bar.x1 for bar in bars[-1:])])
        text = f"{who} {milliseconds(ms)}"
        if who == "fused" and profile.ratio.beyond_noise:
            text += f", {profile.ratio}"
        if right + 10 + text_box(0, 0, text, 13).x1 < canvas.width - 10:
            canvas.text(right + 10, y + BAR / 2 + 4.5, text, size=13, bold=True)


def _axis(canvas: Canvas, lanes: Lanes, left: float, width: float, y: float) -> float:
    """The time axis."""
    canvas.line(left, y, left + width, y, "soft-line")
    if lanes.per_ms > 0:
        step = nice(width / lanes.per_ms / 8)
        count = int(width / lanes.per_ms / step + 1e-9)
        for i in range(count + 1):
            x = left + i * step * lanes.per_ms
            canvas.line(x, y, x, y + 4, "soft-line")
            text = f"{i * step:g}" + (" ms" if i == count else "")
            canvas.text(x, y + 16, text, size=10, anchor="middle", style="soft")
    return y + 16


def nice(value: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    power = 1.0
    while power > value:
        power /= 10
    while power * 10 <= value:
        power *= 10
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value)
