# SPDX-License-Identifier: BSD-3-Clause
"""`resnet-fused check`: every op and model against float64 on this machine, one line each."""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from resnet_fused import dispatch
from resnet_fused.bench import expected, machine, op_cases, subjects
from resnet_fused.bench.contenders import first_line
from resnet_fused.cli import check_images
from resnet_fused.cli.arguments import seed

SIZE = 64
"""Height and width of the models' images: the last stage still has more than one pixel."""

EPILOG = f"""\
Ops: the worst element of several awkward cases in both layouts; the bound is {expected.SIGMAS:.0f}
standard deviations of the rounding error that the op's own steps have. Models: the largest
difference of a logit, relative to the largest logit; the bound is 1.5 x eager's error plus a
rounding floor. Inputs and weights are random and seeded. Exit code 1 if any line says FAIL.

images:
  --data and --images run the weights on your own images three times: fused, in eager PyTorch in
  the same dtype, and, below float32, in eager float32 from the same rounded weights, which judges
  the other two. Every image whose best class differs is listed with the margin between the two
  logits. --data DIR has one folder per class: folders named like the labels belong to these, else
  the sorted names are the classes in order.
  Exit code 1: the fused logits are further off than the bound of the models above, or wrong use;
  2: done, some images failed.

examples:
  resnet-fused check
  resnet-fused check --data val --weights IMAGENET1K_V2 --dtype bf16
  resnet-fused check --images photos --model resnet18 --weights trained.pth
"""


@dataclass(frozen=True)
class Line:
    """The outcome for one op or model in one dtype."""

    name: str
    dtype: str
    error: float
    bound: float
    path: str
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether the error is within the bound; NaN is not."""
        return self.error <= self.bound

    def __str__(self) -> str:
        """Print `ok    stem  bf16  error 8.4e-03  bound 3.1e-02  onednn`."""
        text = f"{'ok' if self.ok else 'FAIL':<4}  {self.name:<16}  {self.dtype}"
        text += f"  error {self.error:.1e}  bound {self.bound:.1e}  {self.path}"
        return f"{text}  ({self.note})" if self.note else text


def check_op(op: str, dtype: str, device: str, seed: int = 0) -> Line:
    """Run all cases of one op.

    Args:
        op: one of `op_cases.NAMES`.
        dtype: a key of `subjects.DTYPES`.
        device: where to run.
        seed: of the inputs.

    Returns:
        Error and bound where their ratio is worst; a case that raises is an infinite error.
    """
    kind = subjects.DTYPES[dtype]
    u = expected.roundings(kind, device)
    path = dispatch.path_on(torch.device(device), kind, op).name
    worst = Line(op, dtype, 0.0, 0.0, path)
    for case in op_cases.cases(op, kind, device, seed):
        try:
            error, bound = case.expect(u).worst(case.run())
            note = case.name
        except Exception as problem:  # whatever an op raises here is a failure to report
            error, bound, note = math.inf, 0.0, f"{case.name}: {first_line(problem)}"
        if error * worst.bound >= worst.error * bound or error == math.inf:
            worst = Line(op, dtype, error, bound, path, note)
        if not worst.ok:
            return worst
    return Line(op, dtype, worst.error, worst.bound, path)


def check_model(model: nn.Module, name: str, dtype: str, device: str, seed: int = 0) -> Line:
    """Run one model on two images.

    Args:
        model: float32, as `subjects.make_model` gives it; it is copied.
        name: what to call it.
        dtype: a key of `subjects.DTYPES`.
        device: where to run.
        seed: of the images.

    Returns:
        Error and bound relative to the largest logit; a model that raises has an infinite error.
    """
    kind = subjects.DTYPES[dtype]
    fused = copy.deepcopy(model).to(device, kind)
    net = subjects.plain(fused)
    draw = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(2, 3, SIZE, SIZE, generator=draw).to(device, kind)
    known = subjects.expect(net, x)
    path, note = dispatch.path_on(torch.device(device), kind, "conv_bn_act").name, ""
    eager, error = 0.0, 0.0
    with torch.inference_mode():
        for layout in (torch.contiguous_format, torch.channels_last):
            fused.to(memory_format=layout)  # type: ignore[call-overload]
            image = x.contiguous(memory_format=layout)
            eager = max(eager, known.error(net(image)))
            try:
                error = max(error, known.error(fused(image)))
            except Exception as problem:  # whatever a model raises here is a failure to report
                error, note = math.inf, first_line(problem)
    return Line(name, dtype, error, subjects.error_bound(eager, net, kind), path, note)


def lines(args: argparse.Namespace) -> Iterator[Line]:
    """Check what was asked for, one line at a time."""
    everything = not args.op and not args.model
    for op in args.op or (op_cases.NAMES if everything else ()):
        for dtype in args.dtype or subjects.DTYPES:
            yield check_op(op, dtype, args.device, args.seed)
    for name in args.model or (subjects.model_names() if everything else ()):
        model = subjects.make_model(name, args.seed)
        for dtype in args.dtype or ("fp32", "bf16"):
            yield check_model(model, name, dtype, args.device, args.seed)


def add_parser(subparsers: Any) -> None:
    """Add the `check` command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "check",
        help="compare every op and model with the reference on this machine",
        description="Compare every op and model with a float64 computation on this machine.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--op", action="append", choices=op_cases.NAMES, help="only this op (repeatable)")
    names = subjects.model_names()
    add("--model", action="append", choices=names, metavar="NAME", help="only this model")
    add("--dtype", action="append", choices=list(subjects.DTYPES), help="only this dtype")
    add("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    add("--seed", type=seed, default=0, help="of weights and inputs (default: 0)")
    check_images.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        0, or 1 if the device is not there or anything failed; 2 if only images did.
    """
    missing = machine.why_no_device(args.device)
    wrong = f"--device {missing}" if missing else check_images.why_not(args)
    if wrong:
        print(f"resnet-fused check: error: {wrong}", file=sys.stderr)
        return 1
    machine.select(args.device)
    if check_images.wanted(args):
        return check_images.run(args)
    print(machine.headline(machine.describe(args.device)))
    done = failed = 0
    for line in lines(args):
        print(line, flush=True)
        done += 1
        failed += not line.ok
    print(f"{done - failed} ok, {failed} failed")
    return 1 if failed else 0
