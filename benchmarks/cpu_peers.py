# SPDX-License-Identifier: BSD-3-Clause
"""Times resnet_fused on a CPU against eager PyTorch, torch.compile, OpenVINO and onnxruntime.

    python benchmarks/cpu_peers.py --model resnet50 --dtype bf16 --batch 1,16

All contenders of a setting live in one process and take turns, so that a clock that drifts moves
all alike; a ratio is the median of the ratios within the rounds (`resnet_fused.timing`). Before
anything is timed their logits are compared: one that computes something else ends the run.

* `channels_last`: eager PyTorch, the plain modules called one after the other.
* `compile`: torch.compile with freezing, that is, with BatchNorms folded and weights packed.
* `openvino`: latency mode, one stream, the same threads and precision.
* `onnxruntime`: float32 only.

Peers that are not installed are left out, and a line says so. Beside the times stand the rate of a
large matrix product on this machine and, for three contenders, the time of the first call and the
peak memory in a new process (`cpu_cold.py`).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cpu_cold
import cpu_common
import cpu_contenders
import torch
from cpu_contenders import COMPILE, FUSED, PEERS, DisagreementError, Field
from torch import nn

from resnet_fused import timing
from resnet_fused.bench import machine, subjects
from resnet_fused.bench.contenders import Contender
from resnet_fused.bench.results import Setting
from resnet_fused.timing import Ratio

PACKAGES = ("openvino", "onnxruntime", "onnx", "numpy")
"""Whose versions are written down, beside torch's."""


@dataclass(frozen=True)
class Row:
    """One contender in one setting.

    Args:
        setting: what was measured.
        peer: who ran it.
        path: what computed it, with version and precision.
        samples: milliseconds of every timed call; empty if it did not run.
        ratio: its time / resnet_fused's time in the same round; None for resnet_fused.
        difference: of its logits from resnet_fused's, relative to the largest.
        rate: TFLOP/s of a matrix product on all threads, bf16 or fp32.
        build_s: seconds of conversion and compilation.
        note: why there are no times, or what to know about them.
        cold: medians of `cpu_cold.first_results`; None if there were no cold starts.
    """

    setting: Setting
    peer: str
    path: str
    samples: Sequence[float]
    ratio: Ratio | None
    difference: float | None
    rate: float
    build_s: float = 0.0
    note: str = ""
    cold: Mapping[str, float] | None = None

    @property
    def median(self) -> float | None:
        """Median time of a call in milliseconds."""
        return statistics.median(self.samples) if self.samples else None

    @property
    def tflops(self) -> float | None:
        """The network's multiplications and additions per second, in 10^12."""
        s = self.setting
        work = 2 * subjects.gmacs(s.model, s.size) * s.batch
        return work / self.median if self.median else None

    def record(self) -> dict[str, Any]:
        """Give the row for CSV, behind the machine's facts; None for unknown."""
        s, ratio = self.setting, self.ratio
        return {
            "model": s.model,
            "dtype": s.dtype,
            "batch": s.batch,
            "size": s.size,
            "peer": self.peer,
            "path": self.path,
            "median_ms": self.median,
            "min_ms": min(self.samples, default=None),
            "calls": len(self.samples),
            "images_per_s": 1e3 * s.batch / self.median if self.median else None,
            "ratio": ratio and ratio.value,
            "ratio_low": ratio and ratio.low,
            "ratio_high": ratio and ratio.high,
            "noise": ratio and ratio.noise,
            "rounds": ratio and ratio.rounds,
            "difference": self.difference,
            "difference_limit": cpu_common.LIMITS[s.dtype],
            "tflops": self.tflops,
            "share_of_matmul": self.tflops / self.rate if self.tflops else None,
            "build_s": self.build_s,
            **{name: (self.cold or {}).get(name) for name in ("first_ms", "second_ms", "peak_mib")},
            "note": self.note,
        }


HEAD = ("model", "dtype", "batch", "peer")
FIGURES = ("median ms", "min ms", "img/s", "resnet_fused is", "noise", "of matmul", "difference")
COLD = ("first ms", "peak MiB")


def _cells(row: Row) -> list[str]:
    """Give the cells under FIGURES and COLD."""
    r = row.record()

    def cell(name: str, form: str) -> str:
        return "-" if r[name] is None else format(r[name], form)

    return [
        cell("median_ms", ".2f"),
        cell("min_ms", ".2f"),
        cell("images_per_s", ".1f"),
        "base" if row.peer == FUSED else str(row.ratio or "-"),
        cell("noise", ".1%"),
        cell("share_of_matmul", ".0%"),
        "base" if row.peer == FUSED else cell("difference", ".1e"),
        cell("first_ms", ".0f"),
        cell("peak_mib", ".0f"),
    ]


def table(rows: Sequence[Row]) -> str:
    """Lay the rows out for a terminal, with the reasons for missing times below.

    `resnet_fused is` says how many times faster resnet_fused was than the row's contender.
    """
    lines, before = [], None
    for row in rows:
        s = row.setting
        labels = [s.model, s.dtype, str(s.batch)] if s != before else ["", "", ""]
        lines.append([*labels, row.peer, *_cells(row)])
        before = s
    text = cpu_common.layout((*HEAD, *FIGURES, *COLD), lines, len(HEAD))
    notes = [f"no times for {r.peer} in {r.setting}: {r.note}" for r in rows if not r.samples]
    return "\n".join([text, *notes])


def cold_starts(
    setting: Setting,
    peers: Sequence[str],
    runs: int,
    file: Path,
    ask: Callable[[dict[str, Any]], dict[str, float]] = cpu_cold.ask_child,
) -> dict[str, dict[str, float]]:
    """Start each of `peers` that `cpu_cold` knows `runs` times, taking turns, and give medians.

    A peer whose process fails is named on stderr and left out.
    """
    found: dict[str, list[dict[str, float]]] = {p: [] for p in peers if p in cpu_cold.PEERS}
    what: dict[str, Any] = {
        "model": setting.model,
        "dtype": setting.dtype,
        "batch": setting.batch,
        "size": setting.size,
        "threads": torch.get_num_threads(),
        "file": str(file),
    }
    for _ in range(runs):
        for peer in list(found):
            try:
                found[peer].append(ask({**what, "peer": peer}))
            except RuntimeError as error:
                print(error, file=sys.stderr)
                del found[peer]
    return {
        peer: {name: statistics.median(run[name] for run in all_runs) for name in all_runs[0]}
        for peer, all_runs in found.items()
        if all_runs
    }


def compare(
    setting: Setting, model: nn.Module, peers: Sequence[str], args: argparse.Namespace, rate: float
) -> list[Row]:
    """Check and time one setting.

    Args:
        setting: what to measure.
        model: the float32 model by that name.
        peers: those that can run, without resnet_fused.
        args: budget_s, compile_s, rounds, cold_runs.
        rate: TFLOP/s of a matrix product, for the shares.

    Raises:
        DisagreementError: a contender computes something else.
    """
    with tempfile.TemporaryDirectory() as name, cpu_common.precision(setting.dtype):
        field = Field(setting, model, Path(name))
        made = list(cpu_contenders.contenders(field, peers, args.compile_s))
        errors = cpu_contenders.differences(made, setting.dtype)
        for peer, error in list(errors.items())[1:]:
            print(f"{setting}: {peer} differs from resnet_fused by {error:.1e}", flush=True)
        with torch.inference_mode():
            measured = timing.measure(
                {c.name: c.call for c in made if c.call is not None},
                budget_s=args.budget_s,
                min_rounds=args.rounds,
            )
        cold = cold_starts(setting, list(errors), args.cold_runs, field.openvino_file)

    def row(c: Contender) -> Row:
        ran = c.call is not None
        return Row(
            setting=setting,
            peer=c.name,
            path=c.path,
            samples=measured.samples(c.name) if ran else (),
            ratio=measured.ratio(FUSED, c.name) if ran and c.name != FUSED else None,
            difference=errors.get(c.name),
            rate=rate,
            build_s=c.compile_s,
            note=c.note,
            cold=cold.get(c.name),
        )

    return [row(c) for c in made]


def parser() -> argparse.ArgumentParser:
    """Make the command line's parser."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cpu_common.add_arguments(made, dtype="bf16", batch="1,16")
    made.add_argument(
        "--peers",
        type=cpu_common.one_of(PEERS, "--peers"),
        default=list(PEERS),
        help=f"of {', '.join(PEERS)}; all by default. {COMPILE} takes longest to build",
    )
    made.add_argument(
        "--budget-s", type=cpu_common.seconds, default=15.0, help="timing of a setting"
    )
    made.add_argument("--rounds", type=cpu_common.count, default=7, help="at least so many")
    made.add_argument(
        "--compile-s", type=cpu_common.seconds, default=180.0, help="limit for torch.compile"
    )
    made.add_argument(
        "--cold-runs",
        type=partial(cpu_common.count, least=0),
        default=3,
        help="new processes per contender and setting; 0: none",
    )
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all settings; 1 if a contender computed something else."""
    args = parser().parse_args(argv)
    cpu_common.begin(args)
    about, meter = cpu_common.facts(PACKAGES), machine.LoadMeter()
    records: list[dict[str, Any]] = []
    rows: list[Row] = []
    peers, rates = {}, {}
    for dtype in args.dtype:
        peers[dtype], lines = cpu_contenders.present(args.peers, dtype)
        for line in lines:
            print(line)
        rates[dtype] = cpu_common.matmul_rates(dtype)
        print(cpu_common.rates_line(rates[dtype]), flush=True)
    for model_name in args.model:
        model = subjects.make_model(model_name)
        for dtype in args.dtype:
            rate = rates[dtype][cpu_common.RATES[dtype][0]]
            for batch in args.batch:
                setting = Setting(model_name, dtype, batch, args.size)
                try:
                    new = compare(setting, model, peers[dtype], args, rate)
                except DisagreementError as error:
                    print(f"error: {setting}: {error}", file=sys.stderr)
                    return 1
                rows += new
                where = {**about, "load_by_others": meter.others()}
                columns = cpu_common.rate_columns(rates[dtype])
                records += [{**where, **row.record(), **columns} for row in new]
                if args.output is not None:  # a run that is stopped leaves what it has
                    cpu_common.save_csv(records, args.output)
    print(f"\n{table(rows)}")
    print(f"share of the CPUs that other processes used: {meter.others()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
