# SPDX-License-Identifier: BSD-3-Clause
"""The picture of a profile: what stands where, in which colours, and that it says the truth."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from xml.etree import ElementTree

import pytest

from profiles import PEAKS, like_resnet50, profile_of
from resnet_fused.profile.result import Profile
from resnet_fused.profile.svg import picture, ribbon, roofline
from resnet_fused.profile.svg.draw import DARK, LIGHT, Box, Canvas, text_box
from resnet_fused.profile.svg.picture import PLOT, WIDTH, stages

SVG = "{http://www.w3.org/2000/svg}"
LONG = "a.very.long.name.of.a.module.in.somebody.elses.model"
PROFILES: dict[str, Profile] = {
    "resnet50": like_resnet50(),
    "fast": like_resnet50(0.01),
    "one layer": profile_of([("only", [1.0], 0.5)]),
    "slower": profile_of([("only", [1.0, 2.0], 9.0)]),
    "no time": profile_of([("zero", [0.0], 0.0)]),
    "nothing replaced": profile_of([("copy", [], 0.5)]),
    "tiny parts": profile_of([(f"s.{i}", [1e-6] * 9, 1e-6) for i in range(60)] + [("t", [9.0], 4)]),
    "many stages": profile_of([(f"stage{i}.0", [1.0, 2.0], 1.0) for i in range(30)]),
    "odd names": profile_of([('<b>&"quoted"', [1.0], 0.5), (LONG, [1.0] * 7, 0.5), ("", [1], 1)]),
}


def parsed(profile: Profile) -> ElementTree.Element:
    return ElementTree.fromstring(picture(profile))


def text_boxes(root: ElementTree.Element) -> list[tuple[str, Box]]:
    """Every visible text and the box that it needs, from the picture alone."""
    found = []
    for text in root.iter(f"{SVG}text"):
        if text.get("aria-hidden"):
            continue
        x, y, size = (float(text.get(key, "")) for key in ("x", "y", "font-size"))
        box = text_box(x, y, text.text or "", size, text.get("text-anchor", "start"))
        found.append((text.text or "", box))
    return found


@pytest.mark.parametrize("name", PROFILES)
def test_no_text_meets_another(name: str) -> None:
    """Breaks if labels are written over each other, or out of the picture."""
    root = parsed(PROFILES[name])
    boxes = text_boxes(root)
    for (a, first), (b, second) in itertools.combinations(boxes, 2):
        assert not first.meets(second), (a, b)
    height = float(root.get("height", ""))
    for text, box in boxes:
        assert box.x0 >= 0 and box.x1 <= WIDTH and box.y0 >= 0 and box.y1 <= height, text


def test_the_check_of_labels_can_fail() -> None:
    """Breaks if the test above looks at nothing."""
    canvas = Canvas(100, 100)
    canvas.text(10, 50, "one")
    canvas.text(20, 52, "two")
    boxes = text_boxes(ElementTree.fromstring(canvas.svg("t")))
    assert [text for text, _ in boxes] == ["one", "two"] and boxes[0][1].meets(boxes[1][1])
    assert [box for _, box in boxes] == canvas.labels
    assert not canvas.is_free(boxes[0][1]) and canvas.is_free(Box(0, 80, 50, 90))


@pytest.mark.parametrize("name", PROFILES)
def test_bars_are_as_wide_as_their_times(name: str) -> None:
    """Breaks if a bar lies about its time, bars overlap, or a small one cannot be seen."""
    profile = PROFILES[name]
    lanes = ribbon.lay_out(profile, 10.0, 900.0)
    eager = [layer for row in profile.rows for layer in row.eager]
    for bars, layers in ((lanes.eager, eager), (lanes.fused, [r.layer for r in profile.rows])):
        assert [bar.layer for bar in bars] == layers
        for bar in bars:
            assert bar.x1 - bar.x0 == pytest.approx(bar.layer.ms * lanes.per_ms)
        for a, b in zip(bars, bars[1:], strict=False):
            assert b.x0 == pytest.approx(a.x1)
    longest = max(profile.eager.ms, profile.fused.ms)
    ends = [10.0 + ms * lanes.per_ms for ms in (profile.eager.ms, profile.fused.ms)]
    assert list(lanes.rest) == pytest.approx(ends)
    assert max(lanes.rest) == pytest.approx(910.0 if longest else 10.0)
    rects = {r.findtext(f"{SVG}title"): r for r in parsed(profile).iter(f"{SVG}rect")}
    for layer in eager:
        found = [r for title, r in rects.items() if (title or "").startswith(layer.name + " (")]
        assert found and all(float(r.get("width", "")) >= ribbon.THINNEST for r in found)


def test_merged_layers_are_one_bar() -> None:
    """Breaks if a fused call has several bars, or is not tied to what it replaces."""
    profile = like_resnet50()
    root = parsed(profile)
    fused = [r for r in root.iter(f"{SVG}rect") if r.get("class") == "fused"]
    assert len([r for r in fused if r.find(f"{SVG}title") is not None]) == len(profile.rows) == 18
    ties = [p for p in root.iter(f"{SVG}polygon") if "veil" in (p.get("class") or "")]
    assert len(ties) == 18
    lanes = ribbon.lay_out(profile, 32.0, WIDTH - 64 - 130)
    for tie, (row, x0, x1) in zip(ties, ribbon.runs(lanes.eager), strict=True):
        points = [float(p.split(",")[0]) for p in tie.get("points", "").split()]
        bar = lanes.fused[row]
        assert points == pytest.approx([x0, x1, bar.x1, bar.x0], abs=0.7)


def test_arrows_go_from_eager_to_fused_below_the_roofs() -> None:
    """Breaks if axes are swapped, a rate is wrong, or a point lies outside the plot."""
    profile = like_resnet50()
    plot = roofline.plan(profile, PLOT)
    found = roofline.arrows(profile)
    assert len(found) == 18
    for row, (x, y), (u, v) in found:
        assert x == pytest.approx(row.before.work.flop / row.before.work.bytes)
        assert v == pytest.approx(row.layer.work.flop / (row.layer.ms * 1e-3))
        assert u > x and v > y  # fewer bytes, less time
        for at in ((plot.x(x), plot.y(y)), (plot.x(u), plot.y(v))):
            assert PLOT.x0 < at[0] < PLOT.x1 and PLOT.y0 < at[1] < PLOT.y1
    ridge = PEAKS.peak / PEAKS.bandwidth
    assert PLOT.x0 < plot.x(ridge) < PLOT.x1 and PLOT.y0 < plot.y(PEAKS.peak) < PLOT.y1
    dots = [c for c in parsed(profile).iter(f"{SVG}circle") if c.find(f"{SVG}title") is not None]
    assert len(dots) == 2 * len(found)


def test_ticks_are_round_numbers_inside() -> None:
    """Breaks if an axis has no tick, or hundreds."""
    assert list(roofline.ticks((0.9, 21))) == [1, 2, 5, 10, 20]
    assert list(roofline.ticks((0.02, 5e3))) == pytest.approx([0.1, 1, 10, 100, 1000])
    assert [ribbon.nice(v) for v in (0.011, 0.9, 1.0, 3.0, 70.0)] == pytest.approx(
        [0.02, 1, 1, 5, 100]
    )


def test_both_palettes_are_there_and_legible() -> None:
    """Breaks if dark readers get dark text, or a colour can hardly be seen on its paper."""
    text = picture(like_resnet50())
    style = re.search(r"<style>(.*)</style>", text)
    assert style is not None
    light, dark = style[1].split("@media (prefers-color-scheme:dark)")
    assert LIGHT.keys() == DARK.keys()
    for palette, sheet in ((LIGHT, light), (DARK, dark)):
        for name, colour in palette.items():
            assert f".{name}{{fill:{colour}}}" in sheet
            assert f".{name}-line{{stroke:{colour}}}" in sheet
        for name in ("ink", "soft"):  # WCAG AA for text
            assert contrast(palette[name], palette["paper"]) > 4.5, name
        for name in ("fused", "conv", "bn", "relu", "add", "pool", "linear"):
            assert contrast(palette[name], palette["paper"]) > 1.9, name
    used = set(" ".join(re.findall(r'class="([^"]*)"', text)).split())
    known = {suffix for name in LIGHT for suffix in (name, name + "-line")}
    assert used <= known | {"veil", "odd", "halo"}


def contrast(a: str, b: str) -> float:
    """WCAG's contrast of two colours."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_names_and_facts_are_escaped() -> None:
    """Breaks if a name with < or & makes the picture unreadable, or a script of it."""
    text = picture(PROFILES["odd names"])
    root = ElementTree.fromstring(text)
    titles = [t.text or "" for t in root.iter(f"{SVG}title")]
    assert any(title.startswith('<b>&"quoted" (bottleneck, amx): 0.5 ms') for title in titles)
    assert "<b>" not in text and "resnet&lt;50&gt; &amp; co" in text
    for outside in ("<script", "@import", "url(", "href", "<image"):
        assert outside not in text


def test_the_heading_says_what_was_measured() -> None:
    """Breaks if setting or outcome is left out, or noise is sold as a gain."""

    def words(profile: Profile) -> str:
        return "\n".join(text for text, _ in text_boxes(parsed(profile)))

    seen = words(like_resnet50())
    for part in ("bf16", "batch 16", "A Processor, 2 threads, AVX512 and AMX", "torch 2.13", "ms"):
        assert part in seen
    assert re.search(r"fused \d\.\d\d times as fast as eager", seen)
    assert "as fast as eager within noise (1.0 ± 0.05)" in words(profile_of([("a", [1.0], 0.95)]))
    busy = profile_of([("a", [3.0], 1.0)], load_by_others=0.5)
    assert "other processes used 50% of the CPUs" in words(busy)


def test_stages_are_the_sums_of_their_blocks() -> None:
    """Breaks if the small table disagrees with the bars."""
    found = like_resnet50()
    by_name: dict[str, Sequence[float]] = {name: times for name, *times in stages(found.rows)}
    assert list(by_name) == ["stem", "layer1", "layer2", "layer3", "layer4", "head"]
    rows = [row for row in found.rows if row.layer.name.startswith("layer2.")]
    assert by_name["layer2"] == pytest.approx(
        [sum(r.eager_ms for r in rows), sum(r.layer.ms for r in rows)]
    )
