# SPDX-License-Identifier: BSD-3-Clause
"""A profile: its rows, its totals, and its forms as table, CSV and JSON."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

from resnet_fused.profile.peaks import Ceilings
from resnet_fused.timing import Ratio, speedup


@dataclass(frozen=True)
class Work:
    """What has to be done: floating-point operations, and bytes that must be moved once."""

    flop: float
    read: float
    written: float
    weights: float

    @property
    def bytes(self) -> float:
        """All that must be moved at least once."""
        return self.read + self.written + self.weights

    def __add__(self, other: Work) -> Work:
        """The work of both, one after the other."""
        return Work(
            self.flop + other.flop,
            self.read + other.read,
            self.written + other.written,
            self.weights + other.weights,
        )


NOTHING = Work(0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Layer:
    """One layer of one of the models.

    Args:
        name: of the module, the block or the operation.
        kind: conv, bn, relu, add, pool, linear, another operation's name, or a fused call's op.
        path: what computes it: a path of `dispatch.choose`, or `eager`.
        work: what it must do; only products count as operations.
        ms: median time in milliseconds.
        place: its number in the model's order.
    """

    name: str
    kind: str
    path: str
    work: Work
    ms: float
    place: int = 0

    @property
    def tflops(self) -> float | None:
        """Rate of its products, in 10^12 operations per second; None if it took no time."""
        return self.work.flop / self.ms / 1e9 if self.ms > 0 else None

    @property
    def gbs(self) -> float | None:
        """Rate of its bytes, in 10^9 per second; None if it took no time."""
        return self.work.bytes / self.ms / 1e6 if self.ms > 0 else None

    def share(self, peaks: Ceilings) -> float | None:
        """Least time that its work takes at the machine's peaks, over the time taken.

        Above 1 where data stay in a cache, which is faster than the memory that was measured.
        """
        return peaks.floor(self.work.flop, self.work.bytes) * 1e3 / self.ms if self.ms > 0 else None

    def bound(self, peaks: Ceilings) -> str:
        """Which peak sets that least time: `compute` or `memory`."""
        compute = self.work.flop / peaks.peak >= self.work.bytes / peaks.bandwidth
        return "compute" if compute and self.work.flop else "memory"


@dataclass(frozen=True)
class Row:
    """A layer of the fused model, and the eager layers that it replaces.

    Args:
        layer: of the fused model.
        eager: the layers of the original, in order; empty for what only the fused model does.
        eager_ms: median time of these together.
        ratio: eager time / fused time, the median over rounds; None where one of them is 0.
    """

    layer: Layer
    eager: tuple[Layer, ...]
    eager_ms: float
    ratio: Ratio | None

    @property
    def before(self) -> Layer:
        """The eager layers as one."""
        work = sum((layer.work for layer in self.eager), NOTHING)
        return Layer(self.layer.name, "eager", "eager", work, self.eager_ms)


@dataclass(frozen=True)
class Whole:
    """A whole model, in milliseconds: `ms` untouched, `profiled` with the clock between layers."""

    ms: float
    profiled: float

    @property
    def overhead(self) -> float:
        """How much longer it takes with the clock; 0.02 is 2 %."""
        return self.profiled / self.ms - 1 if self.ms > 0 else 0.0


@dataclass(frozen=True)
class Profile:
    """Where the time of a model goes, fused and not.

    Args:
        rows: the fused model's layers in order.
        fused: the whole model, fused.
        eager: the whole original.
        ratio: of these two, untouched.
        peaks: what this machine reaches at its best.
        facts: model, dtype, batch, size, device, threads and versions, by name.
    """

    rows: tuple[Row, ...]
    fused: Whole
    eager: Whole
    ratio: Ratio
    peaks: Ceilings
    facts: Mapping[str, Any]

    def __str__(self) -> str:
        """The table, and the whole models below it."""
        return table(self)

    def __repr__(self) -> str:
        return (
            f"<Profile of {self.facts.get('model')}: {len(self.rows)} layers, eager "
            f"{self.eager.ms:.2f} ms, fused {self.fused.ms:.2f} ms>"
        )

    def records(self) -> list[dict[str, Any]]:
        """One dictionary per layer of either model, for CSV and JSON; None for unknown.

        `group` names the fused layer, `side` says `fused` or `eager`; the ratio stands in the row
        of the fused layer, `eager_ms` beside it.
        """
        found = []
        for row in self.rows:
            name = row.layer.name
            found.append(_record(row.layer, "fused", name, self.peaks) | _ratio(row))
            found += [
                _record(layer, "eager", name, self.peaks) | _ratio(None) for layer in row.eager
            ]
        return found

    def as_dict(self) -> dict[str, Any]:
        """Everything as one JSON object."""
        return {
            "setting": dict(self.facts),
            "peaks": {
                "tflops": _digits(self.peaks.peak / 1e12),
                "gb_per_s": _digits(self.peaks.bandwidth / 1e9),
            },
            "whole": {
                name: {"ms": _digits(w.ms), "profiled_ms": _digits(w.profiled)}
                for name, w in (("eager", self.eager), ("fused", self.fused))
            },
            "ratio": _digits(self.ratio.value),
            "noise": _digits(self.ratio.noise),
            "rounds": self.ratio.rounds,
            "speedup": _digits(speedup(self.ratio)),
            "layers": self.records(),
        }

    def write_csv(self, file: IO[str]) -> None:
        """Write `records` as CSV with a header; what was measured stands in every row."""
        kept = {k: v for k, v in self.facts.items() if not isinstance(v, dict)}
        records = [{**kept, **record} for record in self.records()]
        writer = csv.DictWriter(file, records[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)

    def write_json(self, file: IO[str]) -> None:
        """Write `as_dict`."""
        json.dump(self.as_dict(), file, indent=1, allow_nan=False)
        file.write("\n")


def _record(layer: Layer, side: str, group: str, peaks: Ceilings) -> dict[str, Any]:
    w = layer.work
    return {
        "side": side,
        "place": layer.place,
        "layer": layer.name,
        "group": group,
        "kind": layer.kind,
        "path": layer.path,
        "ms": _digits(layer.ms),
        "gflop": _digits(w.flop / 1e9),
        "mb_read": _digits(w.read / 1e6),
        "mb_written": _digits(w.written / 1e6),
        "mb_weights": _digits(w.weights / 1e6),
        "tflops": _digits(layer.tflops),
        "gb_per_s": _digits(layer.gbs),
        "share_of_peak": _digits(layer.share(peaks)),
        "bound": layer.bound(peaks),
    }


def _ratio(row: Row | None) -> dict[str, Any]:
    ratio = row.ratio if row else None
    return {
        "eager_ms": _digits(row.eager_ms) if row else None,
        "ratio": _digits(ratio.value if ratio else None),
        "noise": _digits(ratio.noise if ratio else None),
    }


def _digits(value: float | None) -> float | None:
    """Round to six significant digits; None for what JSON cannot hold."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


HEAD = ("layer", "op", "path", "replaces")
FIGURES = ("GFLOP", "MB", "ms", "TFLOP/s", "GB/s", "of peak", "bound by", "eager ms")
EAGER = ("TFLOP/s", "GB/s", "of peak", "ratio")


def _cells(layer: Layer, peaks: Ceilings) -> list[str]:
    share = layer.share(peaks)
    return [
        "-" if layer.tflops is None else f"{layer.tflops:.3f}",
        "-" if layer.gbs is None else f"{layer.gbs:.1f}",
        "-" if share is None else f"{share:.0%}",
    ]


def _line(row: Row, peaks: Ceilings) -> list[str]:
    layer, w = row.layer, row.layer.work
    return [
        layer.name,
        layer.kind,
        layer.path,
        replaced(row.eager),
        f"{w.flop / 1e9:.2f}",
        f"{w.bytes / 1e6:.2f}",
        f"{layer.ms:.3f}",
        *_cells(layer, peaks),
        layer.bound(peaks),
        f"{row.eager_ms:.3f}",
        *_cells(row.before, peaks),
        "-" if row.ratio is None else str(row.ratio),
    ]


def replaced(layers: Sequence[Layer]) -> str:
    """How many layers of which kinds: `3 conv, 3 bn, 1 add`."""
    kinds = [layer.kind for layer in layers]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)) or "-"


def table(profile: Profile) -> str:
    """Lay a profile out for a terminal; eager's figures stand behind `eager ms`."""
    lines = [[*HEAD, *FIGURES, *EAGER], *(_line(row, profile.peaks) for row in profile.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = len(HEAD)
    text = []
    for line in lines:
        cells = enumerate(zip(line, widths, strict=True))
        text.append("  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in cells))
    sums = [sum(row.layer.ms for row in profile.rows), sum(row.eager_ms for row in profile.rows)]
    text.append("")
    for name, whole, total in (
        ("fused", profile.fused, sums[0]),
        ("eager", profile.eager, sums[1]),
    ):
        text.append(
            f"{name}: {whole.ms:.3f} ms untouched; {whole.profiled:.3f} ms with the clock "
            f"({whole.overhead:+.1%}); its layers add up to {total:.3f} ms"
        )
    text.append(f"fused is {profile.ratio} (untouched, {profile.ratio.rounds} rounds)")
    text.append(
        f"peaks measured here: {profile.peaks.peak / 1e12:.3f} TFLOP/s (matrix product or "
        f"convolution), {profile.peaks.bandwidth / 1e9:.1f} GB/s (copy)"
    )
    text += [f"warning: {busy}"] if (busy := disturbed(profile)) else []
    return "\n".join(line.rstrip() for line in text)


def disturbed(profile: Profile) -> str:
    """Say so if others used the CPUs meanwhile; empty if not."""
    others = profile.facts.get("load_by_others")
    return f"other processes used {others:.0%} of the CPUs meanwhile" if (others or 0) > 0.1 else ""
