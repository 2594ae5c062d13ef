# SPDX-License-Identifier: BSD-3-Clause
"""`resnet-fused profile`: where a model's time goes, each fused call beside what it replaces."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused import models
from resnet_fused.bench import machine, subjects
from resnet_fused.cli.arguments import open_output, positive, seed, why_unwritable
from resnet_fused.models.weights import resolve
from resnet_fused.profile.trace import ENDINGS

DTYPES = ("fp32", "bf16", "fp16")

EPILOG = """\
A layer is a fused call (stem, block, head) or what still runs unfused; beside it stand the eager
layers that it replaces, in channels_last as well. Times are medians of rounds in which the fused
model, eager, and both with a clock around every torch operation take turns: the whole models are
timed without that clock, and its overhead is printed. `of peak` is the least time that the layer's
work needs at this machine's measured peaks, over the time it took; data in caches can exceed 100 %.
docs/profile.md explains the picture.

examples:
  resnet-fused profile --dtype bf16 --batch 16 --svg profile.svg
  resnet-fused profile --model resnet18 --csv - > layers.csv
  resnet-fused profile --device cuda --dtype fp16 --batch 256 --trace trace.json.gz
"""


def add_parser(subparsers: Any) -> None:
    """Add the `profile` command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "profile",
        help="show where a model's time goes, each fused call beside what it replaces",
        description="Time every layer of a ResNet, fused beside eager, on this machine.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    names = subjects.model_names()
    add("--model", default="resnet50", choices=names, metavar="NAME", help="default: resnet50")
    add(
        "--weights",
        default="random",
        metavar="FILE|NAME",
        help="a .pth or .safetensors file, the name of torchvision weights, or random (default)",
    )
    add("--batch", type=positive, default=1, metavar="N", help="images (default: 1)")
    add("--dtype", default="fp32", choices=DTYPES, help="default: fp32")
    add("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    add("--size", type=positive, default=224, help="height and width of the images (default: 224)")
    add("--threads", type=positive, help="CPU threads (default: torch's choice)")
    add("--seed", type=seed, default=0, help="of random weights and images (default: 0)")
    add(
        "--budget-s",
        type=positive,
        default=20,
        metavar="S",
        help="seconds for the timing; five rounds are made in any case (default: 20)",
    )
    add("--json", metavar="FILE", help="write everything as one object; - is stdout")
    add("--csv", metavar="FILE", help="write the layers of both models; - is stdout")
    add("--svg", type=Path, metavar="FILE", help="draw a roofline and a before/after ribbon")
    add("--trace", type=Path, metavar="FILE", help="write a trace for Perfetto (.json, .json.gz)")


def _refuse(args: argparse.Namespace) -> str:
    """Say what is wrong with the arguments before any time is spent; empty if nothing."""
    missing = machine.why_no_device(args.device)
    if missing:
        return f"--device {missing}"
    if args.trace and not args.trace.name.endswith(ENDINGS):
        return f"--trace must end in .json or .json.gz, got {args.trace}"
    places = {option: getattr(args, option[2:]) for option in ("--json", "--csv", "--svg")}
    return why_unwritable(places | {"--trace": args.trace}, stdout=("--json", "--csv"))


def _make(args: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """Build the model and a batch of random images, in channels_last.

    Raises:
        ValueError, OSError, RuntimeError, TypeError: the weights cannot be had or do not fit.
    """
    if args.weights == "random":
        model = subjects.make_model(args.model, args.seed)
    else:
        weights = resolve(args.weights, args.model)
        model = getattr(models, args.model)(weights=weights, progress=False).eval()
    dtype, last = subjects.DTYPES[args.dtype], torch.channels_last
    model = model.to(args.device, dtype).to(memory_format=last)  # type: ignore[call-overload]
    draw = torch.Generator().manual_seed(args.seed + 1)
    x = torch.randn(args.batch, 3, args.size, args.size, generator=draw)
    return model, x.to(args.device, dtype).contiguous(memory_format=last)


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        0, or 1 if an argument cannot be met.
    """
    wrong = _refuse(args)
    if not wrong:
        if args.threads:
            torch.set_num_threads(args.threads)
        machine.select(args.device)
        try:
            model, x = _make(args)
        except (ImportError, OSError, RuntimeError, TypeError, ValueError) as problem:
            wrong = str(problem)
    if wrong:
        print(f"resnet-fused profile: error: {wrong}", file=sys.stderr)
        return 1
    from resnet_fused import profile  # late: wrong arguments need no profiler

    to = sys.stderr if "-" in (args.json, args.csv) else sys.stdout
    print(machine.headline(machine.describe(args.device)), file=to)
    for complaint in machine.complaints():
        print(f"warning: {complaint}", file=to)
    to.flush()
    try:
        found = profile.profile(
            model, x, budget_s=args.budget_s, facts={"model": args.model, "weights": args.weights}
        )
    except (RuntimeError, ValueError) as problem:  # memory that is not enough is one of the former
        print(f"resnet-fused profile: error: {problem}", file=sys.stderr)
        return 1
    print(f"\n{found}", file=to)
    try:
        _write(args, found, model, x)
    except BrokenPipeError:
        raise  # main() knows what to do
    except OSError as problem:
        print(f"resnet-fused profile: error: {problem}", file=sys.stderr)
        return 1
    return 0


def _write(args: argparse.Namespace, found: Any, model: nn.Module, x: Tensor) -> None:
    """Write the files that were asked for."""
    for place, write in ((args.json, found.write_json), (args.csv, found.write_csv)):
        if place:
            with open_output(place) as file:
                write(file)
    if args.svg:
        from resnet_fused.profile.svg import picture

        args.svg.write_text(picture(found), encoding="utf-8")
    if args.trace:
        from resnet_fused.profile.trace import trace

        trace(model, x, args.trace)
    for path in (args.json, args.csv, args.svg, args.trace):
        if path and str(path) != "-":
            print(f"wrote {path}", file=sys.stderr)
