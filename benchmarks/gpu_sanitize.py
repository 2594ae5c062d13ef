# SPDX-License-Identifier: BSD-3-Clause
"""Calls every op on small inputs and compares with float64: what compute-sanitizer watches.

Inputs are made and results judged on the CPU, so that next to our kernels only copies run on the
GPU. PYTORCH_NO_CUDA_MEMORY_CACHING=1 gives every tensor an allocation of its own, at whose end an
access out of bounds is noticed.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence

import torch

from resnet_fused import dispatch
from resnet_fused.bench import expected, machine, op_cases
from resnet_fused.bench.op_cases import Case
from resnet_fused.bench.subjects import DTYPES
from resnet_fused.ops import ConvBN


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


def check(case: Case, dtype: torch.dtype, device: str) -> str:
    """Run a case; what is wrong with its result, or nothing."""
    result = moved(case, device).run().cpu()
    error, bound = case.expect(expected.roundings(dtype, device)).worst(result)
    return "" if error <= bound else f"{case.op} {case.name} {dtype}: {error:.2e} > {bound:.2e}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run all cases; 1 if a result was wrong or no kernel of ours ran."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtypes", default="fp16,bf16,fp32")
    parser.add_argument("--quick", action="store_true", help="two cases per op")
    args = parser.parse_args(argv)
    reason = machine.why_no_device(args.device)
    if reason:
        parser.error(f"--device {reason}")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    device_type, paths, count = torch.device(args.device).type, Counter[str](), 0
    wrong: list[str] = []
    with torch.inference_mode():
        for name in args.dtypes.split(","):
            dtype = DTYPES[name]
            for case in cases(dtype, quick=args.quick):
                paths[dispatch.choose(device_type, dtype, case.op).name] += 1
                wrong += filter(None, [check(case, dtype, args.device)])
                count += 1
    print(f"{count} calls, by path: {dict(paths)}")
    for text in wrong:
        print(f"WRONG: {text}")
    only_reference = set(paths) == {"reference"}
    if only_reference:
        print("WRONG: every call took the reference path, so no kernel was looked at")
    return 1 if wrong or only_reference else 0


if __name__ == "__main__":
    sys.exit(main())
