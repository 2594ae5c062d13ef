# SPDX-License-Identifier: BSD-3-Clause
"""Two files of times: first which settings differ, then the rows whose settings are the same."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from resnet_fused.bench.results import columns
from resnet_fused.bench.timing_files import KEY, RATE, Timed, TimingFile
from resnet_fused.timing import Ratio

BASES = ("eager", "channels_last")
OURS = ("resnet_fused", "date")
"""Settings that change no time of plain PyTorch."""
BUSY = 0.1


def settings_lines(a: Mapping[str, str], b: Mapping[str, str]) -> Iterator[str]:
    """Say which settings differ, which only one file names, and which agree.

    Args:
        a: settings of the first file by name.
        b: likewise of the second.
    """
    both = [name for name in a if name in b]
    unlike = [name for name in both if a[name] != b[name]]
    yield "settings that differ:" if unlike else "settings that differ: none"
    if unlike:
        cells = [[name, a[name], b[name]] for name in unlike]
        yield from (f"  {line}" for line in columns([["", "A", "B"], *cells], left=3))
    for one, other, name in ((a, b, "B"), (b, a, "A")):
        lone = [f"{key} {one[key]}" for key in one if key not in other]
        if lone:
            yield f"not said in {name}: {'; '.join(lone)}"
    alike = [name for name in both if a[name] == b[name]]
    if alike:
        yield f"the same in both: {', '.join(alike)}"


@dataclass(frozen=True)
class Pair:
    """A row of each file with equal settings."""

    a: Timed
    b: Timed
    noise: float

    @property
    def ratio(self) -> Ratio | None:
        """How many times as fast B is as A; None where one has no figure."""
        if self.a.figure is None or self.b.figure is None:
            return None
        value = self.a.figure / self.b.figure
        value = 1 / value if self.a.column == RATE else value
        return Ratio(value, value, value, self.noise, 1)

    def slower_than(self, allowed: float) -> bool:
        """Whether B is slower by more than `allowed` (0.05: 5 %), and by more than the noise."""
        ratio = self.ratio
        return ratio is not None and ratio.beyond_noise and 1 / ratio.value > 1 + allowed

    @property
    def got_worse(self) -> str:
        """Say what B lost besides speed; empty for nothing."""
        if self.b.wrong and not self.a.wrong:
            return "B's results are wrong"
        return "did not run in B" if self.a.figure is not None and self.b.figure is None else ""


class Differences:
    """What two files of times have in common, and what not.

    The noise of a ratio is that of both files together. Where the files say that machine and
    versions are the same but for resnet_fused, eager PyTorch ran the same code both times, and what
    it differs by is noise of its setting, too: the machine's from one run to the next.

    Args:
        a: the first file, against which the second is compared.
        b: the second.
    """

    def __init__(self, a: TimingFile, b: TimingFile) -> None:
        self.a, self.b = a, b
        drifts = self._drifts()
        self.pairs = [
            Pair(row, b.rows[key], max(_both(row, b.rows[key]), drifts.get(row.group, 0.0)))
            for key, row in a.rows.items()
            if key in b.rows and b.rows[key].column == row.column
        ]
        paired = {pair.a.key for pair in self.pairs}
        self.only = {
            name: [row for row in file.rows.values() if row.key not in paired]
            for name, file in (("A", a), ("B", b))
        }

    @property
    def same_machine(self) -> bool:
        """Whether the files say that plain PyTorch ran on the same machine in the same versions."""
        a, b = self.a.settings, self.b.settings
        names = [n for n in {*a, *b} if n not in OURS and n not in KEY]
        return "cpu" in a and all(a.get(name) == b.get(name) for name in names)

    def _drifts(self) -> dict[tuple[tuple[str, str], ...], float]:
        """Give by how much eager's time differs between the files, for every setting."""
        drifts: dict[tuple[tuple[str, str], ...], float] = {}
        for key, row in self.a.rows.items() if self.same_machine else ():
            other = self.b.rows.get(key)
            if row.contender in BASES and other and row.figure and other.figure:
                drift = math.expm1(abs(math.log(row.figure / other.figure)))
                drifts[row.group] = max(drift, drifts.get(row.group, 0.0))
        return drifts

    def lines(self) -> Iterator[str]:
        """Give the whole report, line by line."""
        yield from settings_lines(self.a.settings, self.b.settings)
        if "cpu" not in self.a.settings or "cpu" not in self.b.settings:
            yield (
                "warning: not both files name their machine (CSV of bench does not, --json does): "
                "a difference may be the machine's"
            )
        elif not self.same_machine:
            yield "warning: a difference may come from any of these settings"
        for name, file in (("A", self.a), ("B", self.b)):
            if file.load is not None and file.load > BUSY:
                yield f"warning: other processes used {file.load:.0%} of the CPUs during {name}"
        yield ""
        if self.pairs:
            yield from self._table()
        for name, rows in self.only.items():
            if rows:
                yield f"only in {name}, not compared:"
                yield from _grouped(rows)

    def _table(self) -> Iterator[str]:
        """Lay out the pairs, columns that are the same in all of them named once above."""
        keys = [dict(pair.a.key) for pair in self.pairs]
        names = [name for name in KEY if any(name in key for key in keys)]
        constant = [n for n in names if n != "contender" and len({k.get(n) for k in keys}) == 1]
        if constant:
            yield "every row: " + ", ".join(f"{name} {keys[0][name]}" for name in constant)
        varied = [name for name in names if name not in constant]
        head = [*varied, "figure", "A", "B", "speed B/A", "noise", "vs eager A", "B"]
        cells = [
            [key.get(name, "") for name in varied] + _cells(pair)
            for key, pair in zip(keys, self.pairs, strict=True)
        ]
        remarks = ["", *map(_remark, self.pairs)]
        lines = columns([head, *cells], left=len(varied) + 1)
        yield from (f"{a}  {b}".rstrip() for a, b in zip(lines, remarks, strict=True))


def _grouped(rows: Sequence[Timed]) -> Iterator[str]:
    """List rows, the contenders of a setting on one line."""
    names: dict[str, list[str]] = {}
    for row in rows:
        setting = str(row).removesuffix(row.contender).strip()
        names.setdefault(setting, []).append(row.contender)
    for setting, found in names.items():
        yield f"  {setting}" + (f": {', '.join(found)}" if any(found) else "")


def _both(a: Timed, b: Timed) -> float:
    """Give the noise of a ratio of two figures measured apart."""
    return math.expm1(math.log1p(a.noise) + math.log1p(b.noise))


def _cells(pair: Pair) -> list[str]:
    """Give the figures of a pair."""
    names = {RATE: "img/s", "infer_step_time": "ms", "median_ms": "ms"}
    figure = names.get(pair.a.column, f"{pair.a.column} ms")
    ratio = pair.ratio
    return [
        figure,
        *("-" if row.figure is None else f"{row.figure:.4g}" for row in (pair.a, pair.b)),
        str(ratio or "-"),
        f"{pair.noise:.1%}" if math.isfinite(pair.noise) else "?",
        *(
            "-" if row.versus_eager is None else f"{row.versus_eager:.2f}x"
            for row in (pair.a, pair.b)
        ),
    ]


def _remark(pair: Pair) -> str:
    """Say what else differs in a pair."""
    path = f"path {pair.a.path or '?'} -> {pair.b.path or '?'}"
    return "; ".join(filter(None, [pair.got_worse, path if pair.a.path != pair.b.path else ""]))
