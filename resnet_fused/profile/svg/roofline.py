# SPDX-License-Identifier: BSD-3-Clause
"""The roofline: rate of products over operations per byte, with an arrow from eager to fused."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from resnet_fused.profile.result import Layer, Profile, Row
from resnet_fused.profile.svg.draw import Box, Canvas, text_box
from resnet_fused.profile.svg.titles import of_row

Scale = Callable[[float], float]
DOT = 4.0


@dataclass(frozen=True)
class Plot:
    """A log-log plot: where it stands, and both scales in pixels."""

    box: Box
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, intensity: float) -> float:
        """Pixel of a number of operations per byte."""
        return self.box.x0 + _part(intensity, self.x_range) * (self.box.x1 - self.box.x0)

    def y(self, rate: float) -> float:
        """Pixel of a rate."""
        return self.box.y1 - _part(rate, self.y_range) * (self.box.y1 - self.box.y0)


def _part(value: float, ends: tuple[float, float]) -> float:
    """Place of a value between two others, on a logarithmic scale: 0 to 1."""
    low, high = (math.log(end) for end in ends)
    return (math.log(value) - low) / (high - low)


def _point(layer: Layer) -> tuple[float, float] | None:
    """Operations per byte, and operations per second; None without any."""
    if not layer.work.flop or not layer.work.bytes or layer.ms <= 0:
        return None
    return layer.work.flop / layer.work.bytes, layer.work.flop / layer.ms * 1e3


def arrows(profile: Profile) -> list[tuple[Row, tuple[float, float], tuple[float, float]]]:
    """The rows with products: eager's point and the fused one's."""
    found = [(row, _point(row.before), _point(row.layer)) for row in profile.rows]
    return [(row, a, b) for row, a, b in found if a is not None and b is not None]


def plan(profile: Profile, box: Box) -> Plot:
    """Choose the ranges so that every point, the ridge and the compute roof are inside."""
    points = [point for _, *both in arrows(profile) for point in both]
    peaks = profile.peaks
    xs = [*(x for x, _ in points), peaks.peak / peaks.bandwidth]
    ys = [*(y for _, y in points), peaks.peak]
    return Plot(box, (min(xs) / 2, max(xs) * 2.2), (min(ys) / 2, max(ys) * 1.8))


def ticks(ends: tuple[float, float]) -> Iterator[float]:
    """1, 2 and 5 of every decade; only the powers of ten where those would be many."""
    steps = (1, 2, 5) if ends[1] / ends[0] < 1e3 else (1,)
    for decade in range(math.floor(math.log10(ends[0])), math.ceil(math.log10(ends[1])) + 1):
        for step in steps:
            value = step * 10.0**decade
            if ends[0] <= value <= ends[1]:
                yield value


def draw(canvas: Canvas, profile: Profile, box: Box) -> None:
    """Draw the roofline into `box`; axis labels stand to its left and below."""
    plot = plan(profile, box)
    _axes(canvas, plot)
    _roofs(canvas, plot, profile)
    dots: list[Box] = []
    for row, a, b in arrows(profile):
        start, end = ((plot.x(x), plot.y(y)) for x, y in (a, b))
        _arrow(canvas, start, end)
        title = of_row(row, profile)
        canvas.circle(*start, DOT, "paper soft-line", title)
        canvas.circle(*end, DOT, "fused", title)
        dots += [Box(x - DOT, y - DOT, x + DOT, y + DOT) for x, y in (start, end)]
    _names(canvas, plot, profile, dots)


def _axes(canvas: Canvas, plot: Plot) -> None:
    box = plot.box
    for value in ticks(plot.x_range):
        x = plot.x(value)
        canvas.line(x, box.y0, x, box.y1, "grid-line")
        canvas.text(x, box.y1 + 15, f"{value:g}", size=10, anchor="middle", style="soft")
    for value in ticks(plot.y_range):
        y = plot.y(value)
        canvas.line(box.x0, y, box.x1, y, "grid-line")
        canvas.text(box.x0 - 6, y + 3.5, f"{value / 1e12:g}", size=10, anchor="end", style="soft")
    middle = (box.x0 + box.x1) / 2
    canvas.text(
        middle, box.y1 + 32, "operations per byte moved", size=11, anchor="middle", style="soft"
    )
    canvas.text(box.x0, box.y0 - 8, "TFLOP/s", size=11, anchor="end", style="soft")


def _roofs(canvas: Canvas, plot: Plot, profile: Profile) -> None:
    """The slope of the memory and the flat roof of the arithmetic, and their figures."""
    box, peaks = plot.box, profile.peaks
    ridge = peaks.peak / peaks.bandwidth
    low = max(plot.x_range[0], plot.y_range[0] / peaks.bandwidth)
    foot = (plot.x(low), plot.y(low * peaks.bandwidth))
    top = (plot.x(ridge), plot.y(peaks.peak))
    canvas.line(*foot, *top, "ink-line", ' stroke-width="1.6"')
    canvas.line(*top, box.x1, top[1], "ink-line", ' stroke-width="1.6"')
    dtype = profile.facts.get("dtype", "")
    text = f"arithmetic, {dtype}: {peaks.peak / 1e12:.3g} TFLOP/s"
    canvas.text(box.x1 - 4, top[1] - 6, text, size=10, anchor="end")
    text = f"memory: {peaks.bandwidth / 1e9:.3g} GB/s"
    middle = math.sqrt(low * ridge)
    x, y = plot.x(middle) - 8, plot.y(middle * peaks.bandwidth) - 6
    if text_box(x, y, text, 10, "end").x0 > box.x0:
        canvas.text(x, y, text, size=10, anchor="end")
    else:
        canvas.text(box.x0 + 6, box.y0 + 14, text, size=10)


def _arrow(canvas: Canvas, start: tuple[float, float], end: tuple[float, float]) -> None:
    """A line between two dots, with a head before the second."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    length = math.hypot(dx, dy)
    if length < 2 * DOT + 2:  # the dots touch
        return
    ux, uy = dx / length, dy / length
    tip = (end[0] - ux * (DOT + 0.5), end[1] - uy * (DOT + 0.5))
    back = (tip[0] - ux * 7, tip[1] - uy * 7)
    canvas.line(
        start[0] + ux * DOT, start[1] + uy * DOT, *back, "fused-line", ' stroke-opacity=".75"'
    )
    sides = [(back[0] - uy * 3.2 * s, back[1] + ux * 3.2 * s) for s in (1, -1)]
    canvas.polygon([tip, *sides], "fused")


def _names(canvas: Canvas, plot: Plot, profile: Profile, dots: list[Box]) -> None:
    """Write names beside the fused dots, the slowest first, where there is room."""
    for row, _, point in sorted(arrows(profile), key=lambda found: -found[0].layer.ms):
        x, y = plot.x(point[0]), plot.y(point[1])
        places = (
            (x + DOT + 3, y + 3.5, "start"),
            (x - DOT - 3, y + 3.5, "end"),
            (x, y - DOT - 4, "middle"),
            (x, y + DOT + 11, "middle"),
        )
        for left, base, anchor in places:
            box = text_box(left, base, row.layer.name, 10, anchor)
            inside = box.x0 > plot.box.x0 and box.x1 < plot.box.x1 and box.y1 < plot.box.y1
            if inside and canvas.is_free(box, dots):
                canvas.text(left, base, row.layer.name, size=10, anchor=anchor, halo=True)
                break
