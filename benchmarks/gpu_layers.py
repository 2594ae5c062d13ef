# SPDX-License-Identifier: BSD-3-Clause
"""Every layer of ResNet-50 on a GPU: our kernel against cuDNN, with TFLOP/s, GB/s and floors.

`cudnn` is convolution, BatchNorm, addition and ReLU as separate calls; `cudnn fused` is torch's
cudnn_convolution_relu or cudnn_convolution_add_relu with the BatchNorm folded beforehand. Both get
channels_last tensors. On a Hopper GPU, `hopper` is our kernel for that GPU,
and `pairs`, of the blocks that have one, runs their last two convolutions as one; whether these
become the default is read off here, layer by layer. Every contender is recorded as one CUDA graph
that goes through so many sets of inputs and parameters that none is in the L2 cache when its turn
comes again.
`--device cpu --quick` tries the script without a GPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gpu_results
import gpu_roofline
import gpu_timing
import torch
import torch.nn.functional as F
from gpu_roofline import Block, Ceilings, Conv, Unit
from gpu_subjects import DTYPES
from torch import Tensor

from resnet_fused import _extension, ops
from resnet_fused.bench import machine
from resnet_fused.bench.contenders import first_line
from resnet_fused.ops import ConvBN

OURS, CUDNN, CUDNN_FUSED = "resnet_fused", "cudnn", "cudnn fused"
HOPPER, PAIRS = "hopper", "pairs"
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Layer:
    """A layer that occurs `count` times, its kernels, and what makes a set of contenders."""

    name: str
    count: int
    units: tuple[Unit, ...]
    make: Callable[[], dict[str, Call]]
    conv: bool = True  # part of the sum over the network's convolutions

    @property
    def flops(self) -> float:
        return sum(unit.flops for unit in self.units)

    @property
    def bytes(self) -> float:
        return sum(unit.bytes for unit in self.units)


class Draw:
    """Random inputs and parameters of one dtype on one device."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        x = torch.randn(shape, device=self.device, generator=self.generator) * scale
        return x.to(self.dtype)

    def image(self, n: int, c: int, size: int) -> Tensor:
        """Activations behind a ReLU, channels_last."""
        x = self.normal(n, c, size, size).relu_()
        return x.contiguous(memory_format=torch.channels_last)

    def conv(self, c: Conv) -> ConvBN:
        """A convolution with its BatchNorm."""
        weight = self.normal(c.k, c.c, c.r, c.r, scale=(2 / (c.c * c.r**2)) ** 0.5)
        return ConvBN(
            weight.contiguous(memory_format=torch.channels_last),
            None,
            self.normal(c.k).abs_() + 0.5,
            self.normal(c.k, scale=0.1),
            self.normal(c.k, scale=0.1),
            self.normal(c.k).abs_() + 0.5,
            stride=(c.stride, c.stride),
            padding=(c.r // 2, c.r // 2),
        )


def hopper_built(library: Any) -> bool:
    """Whether the library holds kernels for Hopper GPUs: built for 9.0a, not only for 9.0."""
    if not hasattr(library, "resnet_fused_set_hopper"):
        return False
    before = library.resnet_fused_hopper()
    library.resnet_fused_set_hopper(1)
    try:
        return library.resnet_fused_hopper() == 1
    finally:
        library.resnet_fused_set_hopper(before)


@contextmanager
def on_hopper(library: Any, pairs: bool) -> Iterator[None]:
    """Convolutions on the kernels for Hopper GPUs, two of them as one wherever that can be."""
    before = library.resnet_fused_hopper()
    library.resnet_fused_set_hopper(1)
    library.resnet_fused_force_wgmma_pairs(int(pairs))
    try:
        yield
    finally:
        library.resnet_fused_force_wgmma_pairs(0)
        library.resnet_fused_set_hopper(before)


def hopper_calls(call: Call, x: Tensor, between: int = 0) -> dict[str, Call]:
    """Our call on a Hopper GPU's kernels; nothing on another.

    ``between``: channels of the tensor between a block's last two convolutions, if any.
    """
    library: Any = _extension._library
    if not x.is_cuda or torch.cuda.get_device_capability(x.device) != (9, 0):
        return {}
    if not hopper_built(library):
        return {}
    ways = [(HOPPER, False)]
    if between in (64, 128) and x.dtype != torch.float32:
        ways.append((PAIRS, True))

    def run(pairs: bool) -> Tensor:
        with on_hopper(library, pairs):
            return call()

    return {name: partial(run, pairs) for name, pairs in ways}


def separate(x: Tensor, conv: ConvBN, residual: Tensor | None = None, relu: bool = True) -> Tensor:
    """A layer as eager PyTorch runs it."""
    y = F.conv2d(x, conv.weight, None, conv.stride, conv.padding)
    assert conv.running_mean is not None and conv.running_var is not None
    y = F.batch_norm(
        y, conv.running_mean, conv.running_var, conv.bn_weight, conv.bn_bias, False, 0.0, conv.eps
    )
    if residual is not None:
        y += residual
    return F.relu_(y) if relu else y


def folded(conv: ConvBN) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution with its BatchNorm in them."""
    weight, gamma, beta, mean, var = (
        t.float() for t in (conv.weight, *conv[2:6]) if isinstance(t, Tensor)
    )
    scale = gamma / (var + conv.eps).sqrt()
    w = (weight * scale.view(-1, 1, 1, 1)).to(conv.weight.dtype)
    bias = (beta - mean * scale).to(conv.weight.dtype)
    return w.contiguous(memory_format=torch.channels_last), bias


def conv_calls(draw: Draw, c: Conv, n: int, relu: bool) -> dict[str, Call]:
    """Contenders for one convolution with all that follows it."""
    x, conv = draw.image(n, c.c, c.size), draw.conv(c)
    residual = draw.image(n, c.k, c.out) if c.residual else None

    def ours() -> Tensor:
        return ops.conv_bn_act(x, conv, residual=residual, relu=relu)

    calls = {
        OURS: ours,
        **hopper_calls(ours, x),
        CUDNN: lambda: separate(x, conv, residual, relu),
    }
    if relu and x.is_cuda:
        w, bias = folded(conv)
        geometry = (list(conv.stride), list(conv.padding), [1, 1], 1)
        if residual is None:
            calls[CUDNN_FUSED] = lambda: torch.cudnn_convolution_relu(x, w, bias, *geometry)
        else:
            calls[CUDNN_FUSED] = lambda: torch.cudnn_convolution_add_relu(
                x, w, residual, 1.0, bias, *geometry
            )
    return calls


def block_calls(draw: Draw, block: Block, n: int) -> dict[str, Call]:
    """Contenders for a bottleneck."""
    first, last = block.convs[0], block.convs[-1]
    x = draw.image(n, first.c, first.size)
    convs = [draw.conv(c) for c in block.convs]
    side = draw.conv(block.projection) if block.projection else None

    def plain() -> Tensor:
        y = x
        for conv in convs[:-1]:
            y = separate(y, conv)
        shortcut = x if side is None else separate(x, side, relu=False)
        return separate(y, convs[-1], shortcut)

    assert last.residual
    conv1, conv2, conv3 = convs

    def ours() -> Tensor:
        return ops.bottleneck(x, conv1, conv2, conv3, side)

    return {OURS: ours, **hopper_calls(ours, x, between=last.c), CUDNN: plain}


def stem_calls(draw: Draw, c: Conv, n: int) -> dict[str, Call]:
    """Contenders for the stem."""
    x, conv = draw.image(n, c.c, c.size), draw.conv(c)
    return {
        OURS: lambda: ops.stem(x, conv),
        CUDNN: lambda: F.max_pool2d(separate(x, conv), 3, 2, 1),
    }


def head_calls(draw: Draw, features: int, classes: int, size: int, n: int) -> dict[str, Call]:
    """Contenders for average pool and linear layer."""
    x, weight = draw.image(n, features, size), draw.normal(classes, features, scale=0.02)
    bias = draw.normal(classes)
    return {
        OURS: lambda: ops.pool_linear(x, weight, bias),
        CUDNN: lambda: F.linear(F.adaptive_avg_pool2d(x, 1).flatten(1), weight, bias),
    }


def layers(draw: Draw, n: int, size: int) -> Iterator[Layer]:
    """ResNet-50 layer by layer, equal ones once; then its distinct blocks, once each."""
    net, element = gpu_roofline.network("resnet50", size), torch.finfo(draw.dtype).bits // 8
    stem = (net.stem_unit(n, element),)
    yield Layer("stem", 1, stem, partial(stem_calls, draw, net.stem, n), conv=False)
    found: dict[tuple[Any, ...], list[tuple[Conv, bool]]] = {}
    for block in net.blocks:
        side = [(block.projection, False)] if block.projection else []
        for conv, relu in [*((c, True) for c in block.convs), *side]:
            key = (conv.c, conv.k, conv.r, conv.stride, conv.size, conv.residual, relu)
            found.setdefault(key, []).append((conv, relu))
    for (c, relu), *others in found.values():
        name = f"{c.name}: {c.r}x{c.r}/{c.stride} {c.c}-{c.k} at {c.size}"
        name += " + residual" if c.residual else ""
        calls = partial(conv_calls, draw, c, n, relu)
        yield Layer(name, 1 + len(others), (c.unit(n, element),), calls)
    blocks: dict[tuple[Any, ...], list[Block]] = {}
    for b in net.blocks:
        blocks.setdefault((b.convs[0].c, b.convs[0].size, b.convs[1].stride), []).append(b)
    for b, *rest in blocks.values():
        name = f"{b.convs[0].name.rpartition('.')[0]}: bottleneck at {b.convs[0].size}"
        units = tuple(b.units(n, element))
        yield Layer(name, 1 + len(rest), units, partial(block_calls, draw, b, n), conv=False)
    head, last = (net.head_unit(n, element),), net.blocks[-1].convs[-1].out
    calls = partial(head_calls, draw, net.features, net.classes, last, n)
    yield Layer("pool_linear", 1, head, calls, conv=False)


def sequence(calls: Sequence[Call]) -> Callable[[], object]:
    """One after another; the outputs live to the end, so that each has memory of its own."""
    return lambda: [call() for call in calls]


def time_layer(
    layer: Layer, device: str, budget_s: float, *, quick: bool = False
) -> tuple[dict[str, float], list[str]]:
    """Microseconds of each contender that can run, and why others cannot."""
    count = gpu_timing.rotations(layer.bytes, gpu_timing.cache_bytes(device))
    sets = [layer.make() for _ in range(count)]
    runs, notes = {}, []
    for name in sets[0]:
        run = sequence([calls[name] for calls in sets])
        try:
            runs[name] = gpu_timing.graphed(run, device)[0] if gpu_timing.is_cuda(device) else run
            runs[name]()
            gpu_timing.synchronize(device)
        except RuntimeError as error:
            runs.pop(name, None)
            notes.append(f"{layer.name}: {name}: {first_line(error)}")
    options = {"visit_ms": 4.0, "warmup_s": 0.01, "rounds": (5, 15)}
    times = gpu_timing.measure(runs, device, budget_s, **(gpu_timing.QUICK if quick else options))
    return {name: t.median * 1e3 / count for name, t in times.items()}, notes


def row(layer: Layer, us: dict[str, float], dtype: str, n: int, c: Ceilings) -> dict[str, Any]:
    """One layer for JSON; rates are those of resnet_fused."""
    ours, floor_us = us.get(OURS), gpu_roofline.floor(layer.units, c) * 1e6
    return {
        "layer": layer.name,
        "count": layer.count,
        "conv": layer.conv,
        "dtype": dtype,
        "batch": n,
        "us": gpu_results.rounded(us),
        "gflop": layer.flops / 1e9,
        "mb": layer.bytes / 1e6,
        **gpu_results.rounded(
            {
                "tflops": layer.flops / ours / 1e6 if ours else None,
                "gbs": layer.bytes / ours / 1e3 if ours else None,
                "floor_us": floor_us,
                "share_of_floor": floor_us / ours if ours else None,
            }
        ),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all layers; 1 if nothing was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"))
    parser.add_argument("--budget-s", type=float, default=45)
    parser.add_argument("--layer-s", type=float, default=0.15, help="timing of one layer")
    parser.add_argument("--settings", default="fp16:1,fp16:256,bf16:256,tf32:256,tf32:1,bf16:1")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--quick", action="store_true", help="a trial with small images")
    args = parser.parse_args(argv)
    reason = machine.why_no_device(args.device)
    if reason:
        parser.error(f"--device {reason}")
    machine.select(args.device)
    if args.quick:
        args.size = 32
        args.settings = "fp16:1" if gpu_timing.is_cuda(args.device) else "fp32:1"
    start, rows, skipped = time.monotonic(), [], []
    facts = gpu_results.facts(args.device)
    for setting in args.settings.split(","):
        dtype, batch = setting.split(":")
        gpu_timing.set_tf32(dtype == "tf32")
        c = gpu_timing.ceilings(args.device, DTYPES[dtype], quick=args.quick)
        for layer in layers(Draw(DTYPES[dtype], args.device), int(batch), args.size):
            if time.monotonic() - start > args.budget_s:
                skipped.append(f"{dtype} batch {batch}: {layer.name}")
                continue
            with torch.inference_mode():
                us, notes = time_layer(layer, args.device, args.layer_s, quick=args.quick)
            rows.append(row(layer, us, dtype, int(batch), c))
            skipped += notes
        gpu_results.write(args.results, "layers", args.device, facts, rows, skipped)
        print(f"{time.monotonic() - start:5.0f} s  {setting}: {len(rows)} layers", flush=True)
    print(gpu_results.totals_table(rows))
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
