# SPDX-License-Identifier: BSD-3-Clause
"""Result files of the GPU benchmarks: JSON from the measuring scripts, and tables made from it."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from resnet_fused.bench import machine
from resnet_fused.bench.results import file_name, versions

Row = Mapping[str, Any]


def rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    """Six significant digits; None for what JSON cannot hold."""

    def digits(value: Any) -> Any:
        if not isinstance(value, float):
            return value
        return float(f"{value:.6g}") if math.isfinite(value) else None

    return {name: digits(value) for name, value in row.items()}


def path(folder: Path, name: str, device: str) -> Path:
    """Where the file called `name` goes, for example
    `benchmark-infer-models-nhwc-pt211-cu130-nvidia-h100-80gb-hbm3.json`."""
    return (folder / file_name(name, "nhwc", device)).with_suffix(".json")


def driver() -> str:
    """The NVIDIA driver's version; empty where nvidia-smi does not tell."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.split("\n")[0].strip() if done.returncode == 0 else ""


def facts(device: str) -> dict[str, Any]:
    """The machine, the GPU and the versions that times depend on."""
    found: dict[str, Any] = {**machine.describe(device), "versions": versions()}
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "cudnn": torch.backends.cudnn.version(),
            "driver": driver(),
        }
    return found


def write(
    folder: Path,
    name: str,
    device: str,
    facts: Mapping[str, Any],
    rows: Sequence[Row],
    skipped: Sequence[str],
) -> Path:
    """Write one part's JSON, through a temporary file so that a stop leaves no half of one."""
    folder.mkdir(parents=True, exist_ok=True)
    target = path(folder, name, device)
    whole = {"machine": dict(facts), "results": list(rows), "skipped": list(skipped)}
    new = target.with_suffix(".new")
    new.write_text(json.dumps(whole, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    new.replace(target)
    return target


# -------------------------------------------------------------------------------------- tables
def cell(value: Any, form: str = "") -> str:
    """A number in a table; a dash where there is none."""
    return "-" if value is None else format(value, form)


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; the first `left` columns are text."""
    rule = ["---" if at < left else "---:" for at in range(len(head))]
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *lines))


def models_table(rows: Sequence[Row]) -> str:
    """One line per setting: milliseconds of every contender, and what resnet_fused makes of it."""
    names = list(dict.fromkeys((row["contender"], row["graph"]) for row in rows))
    head = ["model", "dtype", "batch", *(n + (" graph" if g else "") for n, g in names)]
    head += ["images/s", "vs eager", "share of floor", "MiB", "eager MiB"]
    settings = dict.fromkeys((r["model"], r["dtype"], r["infer_batch_size"]) for r in rows)
    lines = []
    for setting in settings:
        group = {
            (r["contender"], r["graph"]): r
            for r in rows
            if (r["model"], r["dtype"], r["infer_batch_size"]) == setting
        }
        times = [cell((group.get(name) or {}).get("infer_step_time"), ".3f") for name in names]
        ours = [r for (name, _), r in group.items() if name == "resnet_fused"]
        best = min(ours, key=lambda r: r["infer_step_time"] or math.inf, default={})
        memory = [
            min(
                (r["peak_bytes"] for r in group.values() if named(r) and r["peak_bytes"]),
                default=None,
            )
            for named in (
                lambda r: r["contender"] == "resnet_fused",
                lambda r: r["contender"] in ("eager", "channels_last"),
            )
        ]
        lines.append(
            [
                *map(str, setting),
                *times,
                cell(best.get("infer_samples_per_sec"), ",.0f"),
                cell(best.get("versus_best_eager"), ".2f"),
                cell(best.get("share_of_floor"), ".0%"),
                *(cell(None if m is None else m / 2**20, ".0f") for m in memory),
            ]
        )
    return markdown(head, lines, left=2)


def layers_table(rows: Sequence[Row]) -> str:
    """One line per layer, with a total over the network's convolutions."""
    names = list(dict.fromkeys(name for row in rows for name in row["us"]))
    head = ["layer", "times", "dtype", "batch", *(f"{name} us" for name in names)]
    head += ["TFLOP/s", "GB/s", "floor us", "share of floor"]
    lines = []
    for row in rows:
        lines.append(
            [
                row["layer"],
                str(row["count"]),
                row["dtype"],
                str(row["batch"]),
                *(cell(row["us"].get(name), ".2f") for name in names),
                cell(row["tflops"], ".1f"),
                cell(row["gbs"], ",.0f"),
                cell(row["floor_us"], ".2f"),
                cell(row["share_of_floor"], ".0%"),
            ]
        )
    return markdown(head, lines)


def totals_table(rows: Sequence[Row]) -> str:
    """Sums over a network's convolutions, each as often as it occurs, by dtype and batch."""
    names = list(dict.fromkeys(name for row in rows for name in row["us"]))
    lines = []
    for dtype, batch in dict.fromkeys((row["dtype"], row["batch"]) for row in rows):
        group = [r for r in rows if (r["dtype"], r["batch"]) == (dtype, batch) and r["conv"]]
        sums = [
            sum(r["count"] * r["us"][name] for r in group)
            if all(r["us"].get(name) is not None for r in group)
            else None
            for name in names
        ]
        floor = sum(r["count"] * r["floor_us"] for r in group)
        lines.append([dtype, str(batch), *(cell(s, ",.0f") for s in sums), f"{floor:,.0f}"])
    return markdown(["dtype", "batch", *(f"{n} us" for n in names), "floor us"], lines)
