# SPDX-License-Identifier: BSD-3-Clause
"""Draws measured rows as a bar chart; matplotlib is only imported here, and only when asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from resnet_fused.bench.results import Row

COLOURS = {
    "eager": "#c9ccd1",
    "channels_last": "#8d949e",
    "compile": "#e3a23c",
    "resnet_fused": "#1f6fb4",
}


def save_plot(rows: Sequence[Row], path: Path, subtitle: str) -> None:
    """Draw images per second, one group of bars per setting, zero at the bottom.

    Groups that share model and batch share a panel, so that small and large rates stay readable.

    Args:
        rows: what to draw; rows without times leave a gap.
        path: where to write; the ending chooses the format.
        subtitle: line below the title: the machine and the versions.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        panels.setdefault((row.setting.model, row.setting.batch), []).append(row)
    names = [name for name in COLOURS if any(row.contender == name for row in rows)]
    columns = min(len({batch for _, batch in panels}), 4)
    lines = -(-len(panels) // columns)
    height = 3.1 * lines + 1.2
    figure, grid = pyplot.subplots(
        lines,
        columns,
        figsize=(max(6.5, 3.6 * columns), height),
        squeeze=False,
        layout="constrained",
    )
    axes = list(grid.flat)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    width = 0.84 / len(names)
    for axis, ((model, batch), group) in zip(axes, panels.items(), strict=False):
        dtypes = list(dict.fromkeys(row.setting.dtype for row in group))
        for row in group:
            if row.images_per_second is None:
                continue
            place = dtypes.index(row.setting.dtype) - 0.42
            place += (names.index(row.contender) + 0.5) * width
            rate = row.images_per_second
            bars = axis.bar(place, rate, width * 0.92, color=COLOURS[row.contender])
            text = f"{rate:.0f}" if rate >= 100 else f"{rate:.1f}"
            axis.bar_label(bars, [text], padding=2, fontsize=8, color="#333333")
        axis.set_title(f"{model}, batch {batch}", fontsize=10, loc="left")
        axis.set_xticks(range(len(dtypes)), dtypes)
        axis.margins(y=0.12)
        axis.tick_params(axis="x", length=0)
        axis.tick_params(axis="y", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axis.set_axisbelow(True)
    for line in grid:
        line[0].set_ylabel("images per second", fontsize=9)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=COLOURS[name]) for name in names]
    size = rows[0].setting.size
    title = f"ResNet inference at {size} x {size}, images per second"
    figure.suptitle(f"{title}\n", x=0.01, ha="left", fontsize=12, fontweight="bold")
    figure.text(0.01, 1 - 0.31 / height, subtitle, va="top", fontsize=8, color="#555555")
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    figure.savefig(path, dpi=150, facecolor="white")
    pyplot.close(figure)
