# SPDX-License-Identifier: BSD-3-Clause
"""Calls every op on small inputs and compares with float64: what compute-sanitizer watches.

Inputs are made and results judged on the CPU, so that next to our kernels only copies run on the
GPU. PYTORCH_NO_CUDA_MEMORY_CACHING=1 gives every tensor an allocation of its own, at whose end an
access out of bounds is noticed.

A GPU's plans for such small inputs are few, so each kernel of the convolution gets its calls by a
plan that is forced.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from gpu_layers import hopper_built

from resnet_fused import _extension, dispatch
from resnet_fused.bench import expected, machine, op_cases
from resnet_fused.bench.op_cases import Case
from resnet_fused.bench.subjects import DTYPES
from resnet_fused.ops import ConvBN

# Tiles of csrc/kernels/cuda/conv_plan.h, by the sources they take.
ONE_SOURCE, TWO_SOURCES = range(5), range(5, 8)
NARROW = (4, 7)
# In one part or in three, so that of two sources one is split itself.
PLANS = (*((tile, n) for tile in ONE_SOURCE for n in (1, 3)), *((tile, 1) for tile in TWO_SOURCES))
# Those of wgmma_plan.h. Their parts have a step each at least, of which 1x1 convolutions have two.
HOPPER_ONE, HOPPER_TWO = (*range(12), *range(16, 19)), range(12, 16)
HOPPER_PLANS = (*((t, n) for t in HOPPER_ONE for n in (1, 2)), *((t, 1) for t in HOPPER_TWO))
Plan = tuple[int, int]


def to_device(value: object, device: str) -> object:
    """A tensor, or all tensors of a convolution, on the device; its strides stay."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, ConvBN):
        return ConvBN(*(to_device(part, device) for part in value))  # type: ignore[arg-type]
    return value


def moved(case: Case, device: str) -> Case:
    """The same call on the device."""
    args = tuple(to_device(value, device) for value in case.args)
    kwargs = {name: to_device(value, device) for name, value in case.kwargs.items()}
    return Case(case.op, case.name, args, kwargs)


def cases(dtype: torch.dtype, *, quick: bool) -> Iterator[Case]:
    """The cases of `resnet-fused check`, without those that may be cuDNN's: grouped and dilated."""
    for op in op_cases.NAMES:
        chosen = [
            case
            for case in op_cases.cases(op, dtype, "cpu")
            if "grouped" not in case.name and "dilated" not in case.name
        ]
        yield from chosen[:: len(chosen) // 2 or 1] if quick else chosen


def planned(dtype: torch.dtype, hopper: bool = False) -> Iterator[tuple[Plan, Case]]:
    """Each plan of the convolution with what it can make: every kernel, and every way to split.
    ``hopper``: those of the kernels for Hopper GPUs.

    The projection block has a 1x1 and a strided 3x3 convolution for the kernels of one source, and
    its last convolution for those of two; sizes leave rest rows, columns and channels everywhere.
    """
    draw = op_cases.Draw(dtype, "cpu", torch.channels_last, seed=0)
    narrow, one_source = ((), HOPPER_ONE) if hopper else (NARROW, ONE_SOURCE)
    for plan in HOPPER_PLANS if hopper else PLANS:
        tile, _ = plan
        for kind in ("wide", "narrow") if tile in narrow else ("wide",):
            c, mid, out = (72, 136, 72) if kind == "wide" else (33, 35, 65)
            convs = draw.conv(c, mid, 1), draw.conv(mid, mid, 3, 2), draw.conv(mid, out, 1)
            args = (draw.image(2, c, 9, 7), *convs, draw.conv(c, out, 1, 2))
            yield plan, Case("bottleneck", f"{kind}, plan {plan}", args, {})
            if tile in one_source:
                args = (draw.image(2, c, 9, 8), draw.conv(c, mid, 3))
                residual = {"residual": draw.image(2, mid, 9, 8)}
                yield plan, Case("conv_bn_act", f"{kind}, plan {plan}", args, residual)


def paired(dtype: torch.dtype) -> Iterator[Case]:
    """Bottlenecks whose last two convolutions each kernel for two of them can run as one."""
    draw = op_cases.Draw(dtype, "cpu", torch.channels_last, seed=0)
    for mid, stride in itertools.product((64, 128), (1, 2)):
        convs = draw.conv(72, mid, 1), draw.conv(mid, mid, 3, stride), draw.conv(mid, 72, 1)
        projection = [draw.conv(72, 72, 1, stride)] if stride == 2 else []
        args = (draw.image(3, 72, 11, 15), *convs, *projection)
        yield Case("bottleneck", f"{mid} channels between, stride {stride}", args, {})


@contextmanager
def pairs(library: Any) -> Iterator[None]:
    """Two convolutions run as one on a Hopper wherever a kernel can."""
    library.resnet_fused_force_wgmma_pairs(1)
    try:
        yield
    finally:
        library.resnet_fused_force_wgmma_pairs(0)


@contextmanager
def forced(plan: Plan, library: Any, hopper: bool = False) -> Iterator[None]:
    """Every convolution on a GPU that can follow this plan does."""
    force = getattr(library, f"resnet_fused_force_{'wgmma' if hopper else 'mma'}_plan")
    force(*plan)
    try:
        yield
    finally:
        force(-1, 1)


def check(case: Case, dtype: torch.dtype, device: str) -> str:
    """Run a case; what is wrong with its result or its path, or nothing."""
    path = dispatch.path_on(torch.device(device), dtype, case.op)
    if path.name == "reference":
        return f"{case.op} {dtype} ran no kernel: {path.reason}"
    result = moved(case, device).run().cpu()
    error, bound = case.expect(expected.roundings(dtype, device)).worst(result)
    return "" if error <= bound else f"{case.op} {case.name} {dtype}: {error:.2e} > {bound:.2e}"


def check_planned(dtype: torch.dtype, device: str, library: Any) -> Iterator[str]:
    """The outcome of `check` for each plan's cases; on a Hopper, of both families of kernels."""
    on_hopper = torch.cuda.get_device_capability(device) == (9, 0)
    families = (False, True) if on_hopper and hopper_built(library) else (False,)
    for hopper in families:
        for plan, case in planned(dtype, hopper):
            with forced(plan, library, hopper):
                yield check(case, dtype, device)
    if True in families and dtype != torch.float32:
        with pairs(library):
            yield from (check(case, dtype, device) for case in paired(dtype))


def main(argv: Sequence[str] | None = None) -> int:
    """Run all cases; 1 if a result was wrong, or a call ran no kernel of ours."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtypes", default="fp16,bf16,fp32")
    parser.add_argument("--quick", action="store_true", help="two cases per op")
    args = parser.parse_args(argv)
    reason = machine.why_no_device(args.device)
    if reason:
        parser.error(f"--device {reason}")
    machine.select(args.device)
    on_gpu = torch.device(args.device).type == "cuda"
    if on_gpu:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    calls, outcomes = Counter[str](), Counter[str]()
    with torch.inference_mode():
        for name in args.dtypes.split(","):
            dtype = DTYPES[name]
            found = [check(case, dtype, args.device) for case in cases(dtype, quick=args.quick)]
            if on_gpu:
                found += check_planned(dtype, args.device, _extension._library)
            calls[name] += len(found)
            outcomes.update(found)
    print(f"calls: {dict(calls)}")
    for text in filter(None, outcomes):
        print(f"WRONG: {text}")
    return 1 if any(outcomes.keys()) else 0


if __name__ == "__main__":
    sys.exit(main())
