# SPDX-License-Identifier: BSD-3-Clause
"""Puts heading, roofline, legend, stages and ribbon on one sheet."""

from __future__ import annotations

from collections.abc import Sequence

from resnet_fused.profile.result import Profile, Row
from resnet_fused.profile.svg import ribbon, roofline
from resnet_fused.profile.svg.draw import KINDS, Box, Canvas, colour_of, fitted
from resnet_fused.profile.svg.titles import heading, milliseconds, setting, totals

WIDTH, HEIGHT, MARGIN = 1120.0, 764.0, 32.0
PLOT = Box(76, 134, 660, 420)
COLUMN = 706.0
MOST = 7  # stages in the list
NOTES = (
    "Fewer bytes move a dot to the right, less time moves it up.",
    "Dots above the slope: data came from a cache, not from memory.",
    "The roof is the best that a large matrix product or convolution",
    "reaches here. Layers without products have no dot.",
)


def picture(profile: Profile) -> str:
    """A profile as one SVG without script, fonts or anything else from outside.

    Args:
        profile: of `resnet_fused.profile.profile`.
    """
    canvas = Canvas(WIDTH, HEIGHT)
    canvas.rect(Box(0, 0, WIDTH, HEIGHT), "paper", extra=' rx="8"')
    full = WIDTH - 2 * MARGIN
    canvas.text(MARGIN, 40, fitted(heading(profile), 20, full), size=20, bold=True)
    for y, line in ((62, setting(profile)), (80, totals(profile))):
        canvas.text(MARGIN, y, fitted(line, 12, full), size=12, style="soft")
    canvas.text(MARGIN, 110, "Roofline of this machine, as measured", size=13, bold=True)
    roofline.draw(canvas, profile, PLOT)
    below = _legend(canvas, profile, COLUMN, 110)
    below = _stages(canvas, profile, COLUMN, below + 26)
    for i, line in enumerate(NOTES):
        canvas.text(COLUMN, below + 26 + 15 * i, line, size=10.5, style="soft")
    canvas.text(MARGIN, 486, "Before and after, on the same time scale", size=13, bold=True)
    ribbon.draw(canvas, profile, MARGIN, 504, WIDTH - 2 * MARGIN - 130)
    return canvas.svg(heading(profile))


def _legend(canvas: Canvas, profile: Profile, x: float, y: float) -> float:
    """What dots and colours mean; returns where it ends."""
    canvas.text(x, y, "How to read it", size=13, bold=True)
    y += 20
    canvas.circle(x + 6, y - 4, roofline.DOT, "paper soft-line")
    canvas.line(x + 10, y - 4, x + 30, y - 4, "fused-line")
    canvas.polygon([(x + 37, y - 4), (x + 30, y - 7.2), (x + 30, y - 0.8)], "fused")
    canvas.circle(x + 42, y - 4, roofline.DOT, "fused")
    canvas.text(x + 54, y, "from a layer's eager parts to its fused call", size=11)
    y += 18
    found = {colour_of(layer.kind) for row in profile.rows for layer in (row.layer, *row.eager)}
    names = [kind for kind in KINDS if kind in found]
    at = x
    for kind in [*names, "other"]:
        canvas.rect(Box(at, y - 9, at + 11, y + 2), kind)
        canvas.text(at + 15, y, kind, size=11)
        at += 22 + 6.6 * len(kind)
    y += 18
    canvas.rect(Box(x, y - 9, x + 11, y + 2), "fused")
    canvas.text(x + 15, y, "one fused call", size=11)
    canvas.rect(Box(x + 130, y - 6, x + 141, y - 1), "other", extra=' fill-opacity=".45"')
    canvas.text(x + 145, y, "between layers (Python)", size=11)
    return y


def stages(rows: Sequence[Row]) -> list[tuple[str, float, float]]:
    """Eager and fused time per stage: rows whose names begin alike, in order."""
    found: dict[str, list[float]] = {}
    for row in rows:
        times = found.setdefault(row.layer.name.split(".")[0], [0.0, 0.0])
        times[0] += row.eager_ms
        times[1] += row.layer.ms
    return [(name, eager, fused) for name, (eager, fused) in found.items()]


def _stages(canvas: Canvas, profile: Profile, x: float, y: float) -> float:
    """A small table of the stages that take most time, in the model's order; returns its end."""
    found = stages(profile.rows)
    kept = sorted(found, key=lambda stage: -stage[1] - stage[2])[:MOST]
    columns = (x + 190, x + 270, x + 340)
    for at, text in zip((x, *columns), ("stage", "eager", "fused", "ratio"), strict=True):
        anchor = "start" if at == x else "end"
        canvas.text(at, y, text, size=11, anchor=anchor, style="soft")
    for stage in found:
        if stage not in kept:
            continue
        y += 18
        name, eager, fused = stage
        ratio = f"{eager / fused:.2f}x" if eager > 0 and fused > 0 else "-"
        canvas.text(x, y, fitted(name, 11, 120), size=11)
        for at, text in zip(
            columns, (milliseconds(eager), milliseconds(fused), ratio), strict=True
        ):
            canvas.text(at, y, text, size=11, anchor="end")
    return y
