# SPDX-License-Identifier: BSD-3-Clause
"""Reads files of times: what `resnet-fused bench` and the scripts in benchmarks/ write."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The same things under other names, in files of other scripts.
ALIASES = {"infer_batch_size": "batch", "infer_img_size": "size", "peer": "contender"}
GROUP = ("model", "dtype", "batch", "size", "device", "threads")
CASE = ("scenario", "rate", "budget_ms", "wait_ms", "graph", "stage", "contender")
KEY = (*GROUP, *CASE)
SOFTWARE = ("resnet_fused", "torch", "cuda", "cudnn", "driver", "python", "platform")
PEERS = ("openvino", "onnxruntime", "onnx", "numpy", "loadgen")
MACHINE = ("cpu", "cpus", "cpu_capability", "amx", "device_name", "capability", "multiprocessors")
SETTINGS = ("date", *MACHINE, *SOFTWARE, *PEERS, *KEY)
TIMES = ("infer_step_time", "median_ms")
RATE = "infer_samples_per_sec"
SPREAD_FROM = 20
"""Fewest samples whose percentiles say how much they spread."""


@dataclass(frozen=True)
class Timed:
    """One row of a file.

    Args:
        key: its value of each column of KEY that it has.
        column: where its figure comes from.
        figure: milliseconds, or images per second if `column` is RATE; None if it did not run.
        noise: relative; infinite where the file carries none.
        versus_eager: its ratio to the faster eager layout, as the file has it.
        path: what computed it; empty where the file does not tell.
        wrong: whether the file says that its results were wrong.
    """

    key: tuple[tuple[str, str], ...]
    column: str
    figure: float | None
    noise: float
    versus_eager: float | None
    path: str
    wrong: bool

    @property
    def group(self) -> tuple[tuple[str, str], ...]:
        """What it shares with the other contenders of its setting."""
        return tuple(item for item in self.key if item[0] in GROUP)

    @property
    def contender(self) -> str:
        """Who ran it."""
        return dict(self.key).get("contender", "")

    def __str__(self) -> str:
        """Print `resnet50 bf16 batch 1 size 224 resnet_fused`."""
        bare = ("model", "dtype", "contender", "scenario", "stage", "device")
        return " ".join(value if name in bare else f"{name} {value}" for name, value in self.key)


@dataclass(frozen=True)
class TimingFile:
    """A file's settings, by name as text, and its rows by key."""

    path: Path
    settings: dict[str, str]
    rows: dict[tuple[tuple[str, str], ...], Timed]
    load: float | None


def is_timing_header(columns: Iterable[str]) -> bool:
    """Whether a CSV file with these columns is one of times."""
    return not {*TIMES, "judged_by"}.isdisjoint(columns)


def read(path: Path) -> TimingFile:
    """Read one file, JSON if its name ends so, else CSV.

    Raises:
        ValueError: it holds no rows of times.
        OSError: it cannot be read.
    """
    machine: Mapping[str, Any] = {}
    try:
        if path.suffix.lower() == ".json":
            whole = json.loads(path.read_text(encoding="utf-8"))
            machine, records = _opened(whole)
        else:
            with path.open(encoding="utf-8", newline="") as file:
                records = list(csv.DictReader(file))
    except (ValueError, csv.Error) as error:  # not UTF-8, not JSON, or a broken CSV
        raise ValueError(f"{path} must be CSV, or JSON if it ends in .json: {error}") from error
    if not records:
        raise ValueError(f"{path} holds no rows: nothing was measured, or it is no result file")
    if not all(is_timing_header(record) for record in records):
        raise ValueError(
            f"{path} must have rows with {' or '.join(TIMES)}, as resnet-fused bench and "
            f"benchmarks/ write them; it has {', '.join(map(str, list(records[0])[:6]))}"
        )
    plain = [_renamed(record) for record in records]
    rows: dict[tuple[tuple[str, str], ...], Timed] = {}
    for row in _rows(plain):
        if rows.setdefault(row.key, row) is not row:
            raise ValueError(
                f"{path} must have one row per setting and contender, but has two for {row}; "
                "give each run a file of its own"
            )
    facts = {"device_name" if name == "device" else name: machine[name] for name in machine}
    cells = [facts.get("load_by_others"), *(record.get("load_by_others") for record in plain)]
    load = max((share for share in map(_number, cells) if share is not None), default=None)
    return TimingFile(path, _settings(facts, plain), rows, load)


def _opened(whole: Any) -> tuple[Mapping[str, Any], list[Mapping[str, Any]]]:
    """Give machine and rows of a JSON file; no rows if it is of another kind."""
    if not isinstance(whole, dict) or not isinstance(whole.get("results"), list):
        return {}, []
    machine: Any = whole.get("machine")
    rows: list[Mapping[str, Any]] = [row for row in whole["results"] if isinstance(row, dict)]
    return machine if isinstance(machine, dict) else {}, rows


def _renamed(record: Mapping[str, Any]) -> dict[str, str]:
    """Give all values as the text that CSV has, under one name each."""
    plain = {
        ALIASES.get(str(name), str(name)): "" if value is None else str(value)
        for name, value in record.items()
    }
    plain.setdefault("device", "cpu")  # the CPU scripts do not say so
    for part in filter(None, plain.pop("versions", "").split(", ")):
        name, _, version = part.rpartition(" ")
        plain.setdefault(name, version)
    return plain


def _settings(machine: Mapping[str, Any], rows: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Give every setting that machine or rows name; several values are listed."""
    found: dict[str, str] = {}
    for name in SETTINGS:
        values = {row[name] for row in rows if row.get(name)}
        if not values and machine.get(name) is not None:
            values = {str(machine[name])}
        if values:
            found[name] = ", ".join(sorted(values, key=lambda text: (_number(text) or 0.0, text)))
    return found


def _number(value: object) -> float | None:
    """Read a number; None for an empty cell or what is none."""
    try:
        number = float(str(value))
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _rows(records: Sequence[Mapping[str, str]]) -> Iterable[Timed]:
    """Turn records into rows; one without a noise of its own takes its setting's largest.

    That noise is of a ratio to another contender and holds the other's, too; where the row's own
    samples spread less, their spread is taken.
    """
    group_noise: dict[tuple[str, ...], float] = {}
    for record in records:
        group = tuple(record.get(name, "") for name in GROUP)
        for name in ("noise", "noise_channels_last"):
            noise = _number(record.get(name))
            if noise is not None:
                group_noise[group] = max(noise, group_noise.get(group, 0.0))
    for record in records:
        column = record.get("judged_by") or next((name for name in TIMES if name in record), "")
        if not column:
            raise ValueError(f"a row has none of the columns judged_by, {', '.join(TIMES)}")
        figure = _number(record.get(column))
        noise = _number(record.get("noise"))
        if noise is None:
            noise = group_noise.get(tuple(record.get(name, "") for name in GROUP), math.inf)
        yield Timed(
            key=tuple((name, record[name]) for name in KEY if record.get(name)),
            column=column,
            figure=figure if figure is not None and figure > 0 else None,
            noise=min(_spread(record) if column in TIMES else math.inf, noise),
            versus_eager=_number(record.get("ratio")),
            path=record.get("path", ""),
            wrong=record.get("agrees") == "False",
        )


def _spread(record: Mapping[str, str]) -> float:
    """Give how far the 90th percentile lies above the median; infinite for too few samples."""
    middle, high = _number(record.get("p50")), _number(record.get("p90"))
    enough = (_number(record.get("count")) or 0) >= SPREAD_FROM
    return high / middle - 1 if middle and high and enough else math.inf
