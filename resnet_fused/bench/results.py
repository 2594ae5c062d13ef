# SPDX-License-Identifier: BSD-3-Clause
"""One row per contender and setting: a table for people, CSV and JSON in timm's column names."""

from __future__ import annotations

import csv
import json
import math
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import torch

from resnet_fused.bench.machine import device_slug
from resnet_fused.timing import Ratio, Summary, speedup


@dataclass(frozen=True)
class Setting:
    """What is measured: a model by name, its dtype (a key of `subjects.DTYPES`), batch and size."""

    model: str
    dtype: str
    batch: int
    size: int = 224
    device: str = "cpu"
    seed: int = 0

    def __str__(self) -> str:
        """Print `resnet50 bf16 batch 16`."""
        return f"{self.model} {self.dtype} batch {self.batch}"


@dataclass(frozen=True)
class Row:
    """One contender in one setting.

    Args:
        setting: what was measured.
        contender: who ran it.
        layout: `nchw` or `nhwc`.
        path: what computed it.
        param_count: parameters of the model.
        gmacs: 10^9 multiply-accumulates of one image.
        note: why there are no times, or what to know about them.
        summary: the times; None if it did not run.
        versus_best: against the faster eager layout; None for that one itself.
        versus_channels_last: against eager channels_last; None for that one itself.
        max_err: relative error against float64, infinite for a result that is not finite.
        bound: error above which the result is called wrong; None where nothing is demanded.
        compile_s: seconds spent on compiling, whether or not that succeeded.
    """

    setting: Setting
    contender: str
    layout: str
    path: str
    param_count: int
    gmacs: float
    note: str = ""
    summary: Summary | None = None
    versus_best: Ratio | None = None
    versus_channels_last: Ratio | None = None
    max_err: float | None = None
    bound: float | None = None
    compile_s: float = 0.0

    @property
    def tag(self) -> str:
        """What to call its file after."""
        return self.setting.dtype

    @property
    def agrees(self) -> bool:
        """Whether the contender gave the result demanded of it, if any was."""
        return self.bound is None or (self.max_err is not None and self.max_err <= self.bound)

    @property
    def images_per_second(self) -> float | None:
        """Images per second at the median time."""
        return None if self.summary is None else 1e3 * self.setting.batch / self.summary.p50

    def record(self) -> dict[str, Any]:
        """Give the row for CSV and JSON: timm's columns first, times in ms, None for unknown."""
        s, best, last = self.summary, self.versus_best, self.versus_channels_last
        return {
            "model": self.setting.model,
            "infer_samples_per_sec": digits(self.images_per_second),
            "infer_step_time": digits(s.p50 if s else None),
            "infer_batch_size": self.setting.batch,
            "infer_img_size": self.setting.size,
            "param_count": round(self.param_count / 1e6, 2),
            "infer_gmacs": round(self.gmacs, 2),
            "contender": self.contender,
            "dtype": self.setting.dtype,
            "layout": self.layout,
            "device": self.setting.device,
            "threads": torch.get_num_threads(),
            "count": s.count if s else 0,
            **{f"p{q}": digits(getattr(s, f"p{q}", None)) for q in (50, 90, 95, 99)},
            "ratio": digits(best.value if best else None),
            "ratio_low": digits(best.low if best else None),
            "ratio_high": digits(best.high if best else None),
            "noise": digits(best.noise if best else None),
            "rounds": best.rounds if best else None,
            "speedup": digits(speedup(best) if best else None),
            "ratio_channels_last": digits(last.value if last else None),
            "noise_channels_last": digits(last.noise if last else None),
            "max_err": digits(self.max_err),
            "err_bound": digits(self.bound),
            "agrees": self.agrees,
            "compile_s": round(self.compile_s, 1),
            "path": self.path,
            "note": self.note,
            "versions": versions(),
        }


class Recorded(Protocol):
    """A row of a result file."""

    @property
    def setting(self) -> Setting:
        """What was measured."""

    @property
    def tag(self) -> str:
        """What to call its file after."""

    def record(self) -> dict[str, Any]:
        """Give its columns."""


def digits(value: float | None) -> float | None:
    """Round to six significant digits; None for what JSON cannot hold."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


def versions() -> str:
    """Name the versions that a time depends on."""
    from resnet_fused import __version__

    python = platform.python_version()
    return f"resnet_fused {__version__}, torch {torch.__version__}, python {python}"


def columns(lines: Sequence[Sequence[str]], left: int) -> list[str]:
    """Pad cells to columns, the first `left` of them flush left, the others right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for line in lines:
        cells = zip(line, widths, range(len(line)), strict=True)
        padded = [c.ljust(w) if i < left else c.rjust(w) for c, w, i in cells]
        text.append("  ".join(padded).rstrip())
    return text


LABELS = ["model", "dtype", "batch", "contender"]
FIGURES = ["median ms", "p95 ms", "img/s", "vs best eager", "vs channels_last", "noise", "max err"]


def _figures(row: Row) -> list[str]:
    """Give the cells under FIGURES."""
    if row.summary is None:
        return ["-"] * len(FIGURES)
    best, last = row.versus_best, row.versus_channels_last
    noise = max((ratio.noise for ratio in (best, last) if ratio), default=math.inf)
    return [
        f"{row.summary.p50:.2f}",
        f"{row.summary.p95:.2f}",
        f"{row.images_per_second:.1f}",
        str(best or "base"),
        str(last or "base"),
        f"{noise:.1%}" if math.isfinite(noise) else "-",
        ("-" if row.max_err is None else f"{row.max_err:.1e}") + ("" if row.agrees else " WRONG"),
    ]


def table(rows: Sequence[Row]) -> str:
    """Lay the rows out for a terminal, with the reasons for missing times below."""
    lines = [LABELS + FIGURES]
    before: Setting | None = None
    for row in rows:
        s = row.setting
        labels = [s.model, s.dtype, str(s.batch)] if s != before else ["", "", ""]
        lines.append([*labels, row.contender, *_figures(row)])
        before = s
    text = columns(lines, len(LABELS))
    missing = [row for row in rows if row.summary is None]
    text += [f"no times for {row.contender} in {row.setting}: {row.note}" for row in missing]
    return "\n".join(text)


def write_csv(rows: Sequence[Recorded], file: IO[str]) -> None:
    """Write the rows as CSV with a header."""
    records = [row.record() for row in rows]
    writer = csv.DictWriter(file, records[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)


def write_json(rows: Sequence[Recorded], machine: Mapping[str, object], file: IO[str]) -> None:
    """Write the machine and the rows as one JSON object: `{"machine": ..., "results": [...]}`."""
    whole = {"machine": dict(machine), "results": [row.record() for row in rows]}
    json.dump(whole, file, indent=1, allow_nan=False)
    file.write("\n")


def file_name(tag: str, layout: str, device: str) -> str:
    """Name a results file after what was measured where, as timm does.

    Example: `benchmark-infer-bf16-nhwc-pt213-cpu-intel-xeon-processor-2t.csv`.
    """
    major_minor = re.match(r"(\d+)\.(\d+)", torch.__version__)
    version = "".join(major_minor.groups()) if major_minor else torch.__version__
    kind = "cpu"
    if torch.device(device).type == "cuda":
        kind = "cu" + (torch.version.cuda or "").replace(".", "")
    return f"benchmark-infer-{tag}-{layout}-pt{version}-{kind}-{device_slug(device)}.csv"


def save_csv(rows: Sequence[Recorded], place: Path) -> list[Path]:
    """Write CSV to a file, or, if `place` is a folder, one file per tag under `file_name`."""
    if not place.is_dir():
        with place.open("w", encoding="utf-8", newline="") as file:
            write_csv(rows, file)
        return [place]
    written = []
    for tag in dict.fromkeys(row.tag for row in rows):
        chosen = [row for row in rows if row.tag == tag]
        path = place / file_name(tag, "nhwc", chosen[0].setting.device)
        written += save_csv(chosen, path)
    return written
