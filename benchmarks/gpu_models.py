# SPDX-License-Identifier: BSD-3-Clause
"""Whole ResNets on a GPU: resnet_fused against eager PyTorch, torch.compile and TensorRT.

`--part grid` times eager in both layouts and resnet_fused, each with and without a CUDA graph, at
every depth, dtype and batch, and `resnet_fused.graphed` at batch 1. `--part compile` times the
rivals that take long to build, in a few settings. Rows are saved after every setting, so that a run
that is stopped keeps what it has, and what matters most comes first.

A time is that of calls back to back on one input, median over interleaved rounds.
`--device cpu --quick` tries the script without a GPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_results
import gpu_roofline
import gpu_subjects
import gpu_timing
import torch
from gpu_roofline import Ceilings
from gpu_subjects import DTYPES, EAGER, FUSED, GRAPHED, Runner, Subject
from gpu_timing import Times

from resnet_fused.bench import machine, subjects

MODELS = ("resnet50", "resnet18", "resnet152")
BATCHES = (1, 256, 32, 8, 128)
COMPILED = (("default", 256), ("default", 1), ("max-autotune", 256), ("max-autotune", 1))


@dataclass(frozen=True)
class Setting:
    """What is measured."""

    model: str
    dtype: str
    batch: int
    size: int

    def __str__(self) -> str:
        return f"{self.model} {self.dtype} batch {self.batch}"


def settings(
    models: Sequence[str], dtypes: Sequence[str], batches: Sequence[int], size: int
) -> list[Setting]:
    """The grid, model by model, 16-bit dtypes of all models before the others."""
    short = [d for d in dtypes if d in ("fp16", "bf16")]
    rest = [d for d in dtypes if d not in short]
    return [
        Setting(model, dtype, batch, size)
        for group in (short, rest)
        for model in models
        for dtype in group
        for batch in batches
    ]


def rows(
    setting: Setting,
    runners: Iterable[Runner],
    times: dict[str, Times],
    subject: Subject,
    ceilings: Ceilings,
) -> list[dict[str, Any]]:
    """One JSON object per contender, timm's column names first."""
    runners = list(runners)
    element = torch.finfo(subject.dtype).bits // 8
    units = gpu_roofline.network(setting.model, setting.size).units(setting.batch, element)
    floor_ms = gpu_roofline.floor(units, ceilings) * 1e3
    eager = [r.error for r in runners if r.name in EAGER and r.error is not None]
    bound = subject.bound(max(eager, default=float("inf")))
    found = []
    for runner in runners:
        t = times.get(str(runner))
        rivals = [times[str(r)].median for r in runners if r.name in EAGER and str(r) in times]
        same = [
            times[str(r)].median
            for r in runners
            if r.name in EAGER and r.graph == runner.graph and str(r) in times
        ]
        demanded = runner.name in (FUSED, GRAPHED)
        row = {
            "model": setting.model,
            "infer_samples_per_sec": 1e3 * setting.batch / t.median if t else None,
            "infer_step_time": t.median if t else None,
            "infer_batch_size": setting.batch,
            "infer_img_size": setting.size,
            "contender": runner.name,
            "graph": runner.graph,
            "dtype": setting.dtype,
            "spread": t.spread if t else None,
            "rounds": len(t.rounds) if t else 0,
            "floor_ms": floor_ms,
            "share_of_floor": floor_ms / t.median if t else None,
            "versus_eager": min(same) / t.median if t and same else None,
            "versus_best_eager": min(rivals) / t.median if t and rivals else None,
            "peak_bytes": runner.peak_bytes,
            "max_err": runner.error,
            "err_bound": bound if demanded else None,
            "agrees": not demanded or (runner.error is not None and runner.error <= bound),
            "build_s": runner.build_s,
            "note": runner.note,
        }
        found.append(gpu_results.rounded(row))
    return found


class Bench:
    """Measures settings one after another until the time is spent, saving as it goes."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.start = time.monotonic()
        self.rows: list[dict[str, Any]] = []
        self.skipped: list[str] = []
        self.ceilings: dict[str, Ceilings] = {}
        self.subject: tuple[tuple[str, str], Subject] | None = None
        self.models: dict[str, torch.nn.Module] = {}

    def left(self) -> float:
        """Seconds."""
        return self.args.budget_s - (time.monotonic() - self.start)

    def prepare(self, setting: Setting) -> Subject:
        """The setting's model on the device; kept while model and dtype stay the same."""
        key = setting.model, setting.dtype
        gpu_timing.set_tf32(setting.dtype == "tf32")
        if self.subject is None or self.subject[0] != key:
            self.subject = None  # frees its memory first
            if setting.model not in self.models:
                self.models[setting.model] = subjects.make_model(setting.model)
            made = self.models[setting.model]
            dtype = DTYPES[setting.dtype]
            self.subject = key, Subject(made, dtype, self.args.device, setting.size)
        if setting.dtype not in self.ceilings:
            self.ceilings[setting.dtype] = gpu_timing.ceilings(
                self.args.device, DTYPES[setting.dtype], quick=self.args.quick
            )
        return self.subject[1]

    def compare(self, setting: Setting, subject: Subject, runners: list[Runner]) -> None:
        """Time what can run, and save."""
        calls = {str(r): r.call for r in runners if r.call is not None}
        budget_s = max(0.2, min(self.args.setting_s, self.left() - 5))
        with torch.inference_mode():
            options = gpu_timing.QUICK if self.args.quick else {}
            times = gpu_timing.measure(calls, self.args.device, budget_s, **options)
        ceilings = self.ceilings[setting.dtype]
        self.rows += rows(setting, runners, times, subject, ceilings)
        self.save()
        took = time.monotonic() - self.start
        shown = ", ".join(f"{name} {t.median:.3f} ms" for name, t in times.items())
        print(f"{took:5.0f} s  {setting}: {shown}", flush=True)

    def grid(self) -> None:
        """Every setting with the contenders that need no building."""
        graphs = gpu_timing.is_cuda(self.args.device)
        for setting in settings(
            self.args.models, self.args.dtypes, self.args.batches, self.args.size
        ):
            if self.left() < self.args.setting_s:
                self.skipped.append(str(setting))
                continue
            subject = self.prepare(setting)
            with torch.inference_mode():
                runners = list(gpu_subjects.plain_and_fused(subject, setting.batch, graphs))
            self.compare(setting, subject, runners)

    def compile(self) -> None:
        """The rivals that take long, for the first model and dtype, each within what is left."""
        model, dtype = self.args.models[0], self.args.dtypes[0]
        graphs = gpu_timing.is_cuda(self.args.device)
        wanted = [(mode, batch) for mode, batch in COMPILED if batch in self.args.batches]
        for done, (mode, batch) in enumerate(wanted):
            setting = Setting(model, dtype, batch, self.args.size)
            share = self.left() / (len(wanted) - done) * 1.5  # later ones rarely need as much
            share = min(share, self.left() - 10)
            if share < gpu_subjects.FEWEST_COMPILE_S and not self.args.quick:
                self.skipped.append(f"{setting} compile {mode}")
                continue
            subject = self.prepare(setting)
            with torch.inference_mode():
                runners = list(gpu_subjects.plain_and_fused(subject, batch, graphs))
                if graphs and mode == "default":
                    runners.append(gpu_subjects.tuned_cudnn(subject, batch))
                    runners.append(gpu_subjects.tensorrt(subject, batch, share / 2))
                if not self.args.quick:
                    runners += gpu_subjects.compiled(mode, subject, batch, share)
            self.compare(setting, subject, runners)

    def save(self) -> None:
        """Write the rows so far."""
        facts = gpu_results.facts(self.args.device)
        facts["ceilings"] = {
            name: {"TB/s": c.bandwidth / 1e12, "TFLOP/s": c.peak / 1e12}
            for name, c in self.ceilings.items()
        }
        name = "models" if self.args.part == "grid" else "compile"
        gpu_results.write(self.args.results, name, self.args.device, facts, self.rows, self.skipped)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure one part; 1 if a result of resnet_fused was wrong or nothing was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("grid", "compile"), default="grid")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"))
    parser.add_argument("--budget-s", type=float, default=150)
    parser.add_argument("--setting-s", type=float, default=1.5, help="timing of one setting")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--dtypes", default="fp16,bf16,tf32")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--quick", action="store_true", help="a trial: one small model, no compile")
    args = parser.parse_args(argv)
    reason = machine.why_no_device(args.device)
    if reason:
        parser.error(f"--device {reason}")
    machine.select(args.device)
    if args.quick:
        args.models, args.size, args.batches, args.setting_s = "resnet18", 32, "2,1", 0.2
        args.dtypes = args.dtypes if gpu_timing.is_cuda(args.device) else "fp32"
    args.models, args.dtypes = args.models.split(","), args.dtypes.split(",")
    args.batches = [int(b) for b in args.batches.split(",")]
    bench = Bench(args)
    getattr(bench, args.part)()
    bench.save()
    for skipped in bench.skipped:
        print(f"no time for {skipped}")
    wrong = [row for row in bench.rows if not row["agrees"]]
    for row in wrong:
        print(f"WRONG: {row}")
    return 1 if wrong or not bench.rows else 0


if __name__ == "__main__":
    sys.exit(main())
