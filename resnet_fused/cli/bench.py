# SPDX-License-Identifier: BSD-3-Clause
"""`resnet-fused bench`: the fused models against eager PyTorch and torch.compile, in one run."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

import torch

from resnet_fused.bench import machine, scenarios, subjects
from resnet_fused.bench.compare import compare
from resnet_fused.bench.results import Row, Setting, save_csv, table, write_csv, write_json
from resnet_fused.bench.scenarios import Found
from resnet_fused.cli import bench_load
from resnet_fused.cli.arguments import open_output, positive, seed, why_unwritable

BUDGET_S = 105
COMPILE_SHARE = 0.6
"""Part of the time budget that torch.compile may take for compiling, all settings together."""

EPILOG = """\
times:
Contenders: eager (NCHW), channels_last (eager), compile (torch.compile with its defaults,
channels_last), resnet_fused. All have the same random weights, run under inference_mode and take
turns in one process. Ratios are medians of paired rounds; one smaller than its noise is printed
as `1.0 ± noise`. The error is the largest difference of a logit from a float64 run, relative to
the largest logit. Exit code 1: resnet_fused is further off than 1.5 x eager plus rounding.

load (--scenario, --budget; needs mlcommons-loadgen):
LoadGen puts the same load on eager channels_last and then on resnet_fused. offline: all images at
once; server: single images at random times, batched as they wait, --batch N at most; single-stream:
the next image when the last is done. Latencies are from an image's arrival to its logits. --budget
looks for the largest rate of server whose 99th percentile stays below the budget, and prints what
it tried on stderr. An overloaded run gives up after 1.5 x its time. These are LoadGen scenarios on
random images, not MLPerf results.

examples:
  resnet-fused bench
  resnet-fused bench --model resnet18,resnet50 --batch 1,8,32 --dtype bf16 --no-compile
  resnet-fused bench --json - --threads 4 > result.json
  resnet-fused bench --scenario server --rate 20 --dtype bf16
  resnet-fused bench --budget 50ms --dtype bf16 --duration 3
"""


def _words(text: str) -> list[str]:
    """Split a comma-separated argument."""
    return [word.strip() for word in text.split(",")]


def _names(text: str) -> list[str]:
    return _known(_words(text), subjects.model_names(), "model")


def _dtypes(text: str) -> list[str]:
    return _known(_words(text), list(subjects.DTYPES), "dtype")


def _known(words: list[str], known: list[str], what: str) -> list[str]:
    for word in words:
        if word not in known:
            raise argparse.ArgumentTypeError(
                f"{what} must be one of {', '.join(known)}, got {word!r}"
            )
    return words


def _batches(text: str) -> list[int]:
    return [positive(word) for word in _words(text)]


def add_parser(subparsers: Any) -> None:
    """Add the `bench` command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "bench",
        help="compare the fused models with eager PyTorch on this machine",
        description="Time ResNets in eager PyTorch, torch.compile and resnet_fused in one run.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=_names, action="extend", metavar="NAME[,NAME]", help="default: resnet50")
    add(
        "--batch",
        type=_batches,
        metavar="N[,N]",
        help="default: 1,16; under load the largest batch, default: 16",
    )
    add(
        "--dtype",
        type=_dtypes,
        default=["fp32", "bf16"],
        metavar="D[,D]",
        help=f"of {', '.join(subjects.DTYPES)}; default: fp32,bf16",
    )
    add("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    add("--size", type=positive, default=224, help="height and width of the images (default: 224)")
    add("--threads", type=positive, help="CPU threads (default: torch's choice)")
    add(
        "--budget-s",
        type=positive,
        metavar="S",
        help="seconds for the whole run, 60 %% of it at most for compiling (default: 105)",
    )
    add("--no-compile", action="store_true", help="leave torch.compile out")
    add("--seed", type=seed, default=0, help="of weights, images and order (default: 0)")
    add("--json", metavar="FILE", help="write machine and results; - is stdout")
    add("--csv", metavar="FILE", help="write results; - is stdout, a folder gets named files")
    add("--plot", type=Path, metavar="FILE", help="draw a bar chart (.png, .svg, .pdf)")
    bench_load.add_arguments(parser)


def _refuse(args: argparse.Namespace) -> str:
    """Say what is wrong with the arguments before any time is spent; empty if nothing."""
    missing = machine.why_no_device(args.device)
    if missing:
        return f"--device {missing}"
    load = bench_load.why_not(args)
    if load:
        return load
    places = {"--json": args.json, "--csv": args.csv, "--plot": args.plot}
    unwritable = why_unwritable(places, stdout=("--json", "--csv"), folders=("--csv",))
    if unwritable:
        return unwritable
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        return "--plot needs matplotlib: pip install 'resnet_fused[plot]'"
    return ""


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _measure(args: argparse.Namespace) -> list[Row]:
    """Measure all settings within the budget; progress goes to stderr."""
    settings = [
        Setting(model, dtype, batch, args.size, args.device, args.seed)
        for model in dict.fromkeys(args.model or ["resnet50"])
        for dtype in dict.fromkeys(args.dtype)
        for batch in dict.fromkeys(args.batch or [1, 16])
    ]
    budget_s = args.budget_s or BUDGET_S
    end = time.monotonic() + budget_s
    compile_left = 0.0 if args.no_compile else COMPILE_SHARE * budget_s
    rows: list[Row] = []
    model = None
    for i, setting in enumerate(settings):
        if i == 0 or setting.model != settings[i - 1].model:
            model = subjects.make_model(setting.model, args.seed)
        assert model is not None
        share = (end - time.monotonic() - compile_left) / (len(settings) - i)
        new = compare(
            setting,
            model,
            budget_s=share,
            compile_s=None if args.no_compile else compile_left,
            say=_progress,
        )
        compile_left -= sum(row.compile_s for row in new)
        rows += new
    return rows


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        0, or 1 if an argument cannot be met, resnet_fused gave a wrong result in any setting, or a
        file cannot be written.
    """
    wrong = _refuse(args)
    if wrong:
        print(f"resnet-fused bench: error: {wrong}", file=sys.stderr)
        return 1
    if args.threads:
        torch.set_num_threads(args.threads)
    report = sys.stderr if "-" in (args.json, args.csv) else sys.stdout
    machine.select(args.device)
    facts = machine.describe(args.device)
    print(machine.headline(facts), file=report)
    for complaint in machine.complaints():
        print(f"warning: {complaint}", file=report)
    report.flush()

    meter = machine.LoadMeter()
    times: list[Row] = []
    rows: list[Row] | list[Found]
    if bench_load.wanted(args):
        rows = loads = bench_load.measure(args, _progress)
        text = scenarios.table(loads)
    else:
        rows = times = _measure(args)
        text = table(times)
    others = meter.others()
    facts["load_by_others"] = None if others is None else round(others, 3)

    print(f"\n{text}", file=report)
    if others is not None and others > 0.1:
        print(f"warning: other processes used {others:.0%} of the CPUs meanwhile", file=report)
    unwritten = False
    try:
        _write(args, rows, facts)
        if args.plot:
            _plot(times, args.plot, facts)
    except BrokenPipeError:
        raise  # main() knows what to do
    except OSError as problem:
        unwritten = True
        print(f"resnet-fused bench: error: {problem}", file=sys.stderr)
    failed = [row for row in rows if not row.agrees]
    for row in failed:
        error = "no result" if row.max_err is None else f"error {row.max_err:.1e}"
        print(
            f"WRONG: {row.contender} in {row.setting}: {error}, bound {row.bound:.1e}", file=report
        )
    return 1 if failed or unwritten else 0


def _write(
    args: argparse.Namespace, rows: list[Row] | list[Found], facts: dict[str, object]
) -> None:
    """Write the files that were asked for."""
    if args.json:
        with open_output(args.json) as file:
            write_json(rows, facts, file)
    if args.csv == "-":
        write_csv(rows, sys.stdout)
    elif args.csv:
        for path in save_csv(rows, Path(args.csv)):
            print(f"wrote {path}", file=sys.stderr)


def _plot(rows: list[Row], place: Path, facts: dict[str, object]) -> None:
    from resnet_fused.bench.plot import save_plot

    save_plot(rows, place, machine.headline(facts))
    print(f"wrote {place}", file=sys.stderr)
