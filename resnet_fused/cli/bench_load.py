# SPDX-License-Identifier: BSD-3-Clause
"""The part of `resnet-fused bench` that puts models under load: its arguments and its run."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from resnet_fused.bench import loadgen, scenarios, subjects
from resnet_fused.bench.loadgen import SCENARIOS
from resnet_fused.bench.results import Setting
from resnet_fused.bench.scenarios import Found, Plan
from resnet_fused.cli.arguments import finite

LOAD_ONLY = ("rate", "wait", "duration", "logs")
TIMES_ONLY = ("budget_s", "no_compile", "plot")
INTERRUPTED = 130


def _above_0(text: str) -> float:
    value = finite(text)
    if value is None or value <= 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text!r}")
    return value


def _span(text: str) -> float:
    """Read `15ms` or `0.5s` as seconds."""
    for unit, factor in (("ms", 1e-3), ("s", 1.0)):
        number = text.removesuffix(unit)
        if number != text:
            return factor * _above_0(number)
    raise argparse.ArgumentTypeError(
        f"must be a time with its unit, such as 15ms or 0.5s, got {text!r}; "
        "--budget-s is the one for the seconds of the whole run"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that only a load has."""
    add = parser.add_argument_group("load").add_argument
    add("--scenario", choices=SCENARIOS, help="measure under LoadGen's load instead")
    add("--rate", type=_above_0, metavar="R", help="images/s of server (default: half of eager's)")
    add(
        "--budget",
        type=_span,
        metavar="TIME",
        help="find the largest rate that keeps p99 below this, such as 15ms",
    )
    add("--wait", type=_span, metavar="TIME", help="how long an image waits for its batch to fill")
    add(
        "--duration",
        type=_above_0,
        metavar="S",
        help="seconds of every run (default: 10; 5 for each trial of --budget)",
    )
    add("--logs", type=Path, metavar="DIR", help="keep LoadGen's files there")


def wanted(args: argparse.Namespace) -> bool:
    """Whether a load was asked for."""
    return args.scenario is not None or args.budget is not None


def why_not(args: argparse.Namespace) -> str:
    """Say which option does nothing beside the others, or what is missing; empty if nothing."""
    loaded = wanted(args)
    given = [name for name in LOAD_ONLY if getattr(args, name) is not None]
    if given and not loaded:
        return f"--{given[0]} needs --scenario or --budget"
    if not loaded:
        return ""
    given = [name for name in TIMES_ONLY if getattr(args, name)]
    if given:
        return f"--{given[0].replace('_', '-')} does not go with --scenario and --budget"
    if len(args.batch or [1]) > 1:
        return "--batch must be one number with --scenario and --budget: the largest batch"
    if args.budget is not None and (args.scenario not in (None, "server") or args.rate):
        return "--budget searches over rates of server: leave --scenario and --rate out"
    if args.rate and args.scenario != "server":
        return f"--rate goes with --scenario server, not with {args.scenario}"
    if args.wait and args.scenario not in (None, "server"):
        return f"--wait goes with --scenario server, not with {args.scenario}"
    if args.logs and args.logs.exists() and not args.logs.is_dir():
        return f"--logs must be a folder, got {args.logs}"
    try:
        loadgen.find()
    except ModuleNotFoundError as missing:
        return str(missing)
    return ""


def measure(args: argparse.Namespace, say: Callable[[str], None]) -> list[Found]:
    """Measure all settings under load; Ctrl-C ends the process."""
    try:
        return list(_rows(args, say))
    except KeyboardInterrupt:
        # LoadGen cannot be stopped, and the interpreter would wait for it to end.
        print("resnet-fused: interrupted", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)


def _rows(args: argparse.Namespace, say: Callable[[str], None]) -> Iterator[Found]:
    plan = Plan(
        scenario=args.scenario or "server",
        seconds=args.duration or (10.0 if args.budget is None else 5.0),
        rate=args.rate,
        budget_s=args.budget,
        wait_s=args.wait or 0.0,
        logs=args.logs,
    )
    for name in dict.fromkeys(args.model or ["resnet50"]):
        model = subjects.make_model(name, args.seed)
        for dtype in dict.fromkeys(args.dtype):
            batch = (args.batch or [16])[0]
            setting = Setting(name, dtype, batch, args.size, args.device, args.seed)
            place = plan.logs and plan.logs / f"{name}-{dtype}"
            yield from scenarios.measure(setting, model, replace(plan, logs=place), say)
