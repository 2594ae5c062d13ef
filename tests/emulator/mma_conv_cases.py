# SPDX-License-Identifier: BSD-3-Clause
"""Shapes for the tensor-core convolution, how it is run on the emulator, and what is right.

Tiles are 64 or 128 rows (output pixels) by 64 or 128 columns (filters), steps 64 channels of 16
bits or 32 of float32, rings 3 or 4 stages.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from harness import bounds
from harness.bounds import Exact
from resnet_fused.ops import ConvBN

# Rows, columns, warps, sources and narrow, as in kMmaTiles.
TILES = (
    (128, 128, 8, 1, False),
    (128, 64, 4, 1, False),
    (64, 128, 4, 1, False),
    (64, 64, 4, 1, False),
    (64, 64, 4, 1, True),
    (128, 64, 8, 2, False),
    (64, 64, 4, 2, False),
    (64, 64, 4, 2, True),
)
Pair = tuple[int, int]


@dataclass(frozen=True)
class Shape:
    """A convolution of [N, C, H, W] to K channels; with ``C2``, a 1x1 projection beside it."""

    why: str
    N: int
    H: int
    W: int
    C: int
    K: int
    window: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    C2: int = 0
    stride2: Pair = (1, 1)
    window2: Pair = (1, 1)

    @property
    def size(self) -> Pair:
        image = (self.H, self.W)
        sums = zip(image, self.window, self.stride, self.padding, self.dilation, strict=True)
        p, q = ((i + 2 * pad - d * (r - 1) - 1) // s + 1 for i, r, s, pad, d in sums)
        return p, q


def square(window: int, stride: int = 1, padding: int | None = None, dilation: int = 1) -> Any:
    """The geometry of a square window."""
    padding = window // 2 if padding is None else padding
    names = ("window", "stride", "padding", "dilation")
    return {n: (v, v) for n, v in zip(names, (window, stride, padding, dilation), strict=True)}


SHAPES = (
    Shape("one pixel, one chunk of channels, 8 filters: all else is tail", 1, 1, 1, 8, 8),
    Shape("exactly a 64 x 64 tile, one step: the ring is longer than the loop", 1, 8, 8, 64, 64),
    Shape("exactly one tile of 128 x 128 and two of its halves", 2, 8, 8, 64, 128),
    Shape("one row beyond 128", 1, 3, 43, 64, 64),
    Shape("one row short of 64; two steps, as many as are copied ahead", 1, 7, 9, 128, 64),
    Shape("three steps: as long as the ring", 1, 4, 5, 192, 72),
    Shape("four steps: the ring of the small tile, one more than the others'", 1, 4, 5, 256, 64),
    Shape("five steps: every ring wraps", 1, 4, 5, 320, 8),
    Shape("a channel tail of 8 in the second step, a column tail of 8", 1, 9, 9, 72, 72),
    Shape("column tiles 1 and 2 beyond 128 and 64", 1, 5, 5, 136, 136),
    Shape("many column tiles of few rows", 1, 2, 3, 24, 264),
    Shape("several tiles down and across, with tails: each must find its place", 1, 11, 31, 8, 200),
    Shape("3x3 at the image's border", 1, 7, 9, 24, 64, **square(3)),
    Shape("3x3 without padding: no position is outside", 1, 9, 7, 64, 64, **square(3, padding=0)),
    Shape("3x3 with stride 2 on odd sizes", 2, 7, 7, 64, 64, **square(3, 2)),
    Shape("3x3 with stride 2: the last padding is not read", 1, 8, 8, 32, 72, **square(3, 2)),
    Shape("7x7 maps: a tile holds parts of several images", 5, 7, 7, 64, 64, **square(3)),
    Shape("131 images of one pixel: each row of a tile is an image", 131, 1, 1, 16, 16),
    Shape("131 images of 2x2 through a 2x2 window", 131, 2, 2, 8, 8, **square(2, padding=0)),
    Shape(
        "a window and strides that differ",
        *(1, 11, 10, 16, 24, (5, 3), (2, 1), (2, 1)),
    ),
    Shape("height and width differ in all", 1, 13, 3, 8, 8, (3, 5), (1, 2), (0, 3), (2, 1)),
    Shape("7x7, 8 channels: an eighth of a step per tap", 1, 15, 13, 8, 64, **square(7, 2)),
    Shape("stride 3 over a window of 1: pixels are skipped", 2, 10, 11, 40, 64, **square(1, 3)),
    Shape("stride 3 over a window of 2", 1, 11, 13, 64, 40, **square(2, 3, 0)),
    Shape("1x1 with padding: border outputs see no pixel", 1, 3, 4, 64, 64, **square(1, 1, 2)),
    Shape("padding beyond the window", 1, 4, 3, 16, 8, **square(3, 2, 4)),
    Shape("an image of one pixel, mostly padding", 3, 1, 1, 8, 16, **square(3, 1, 3)),
    Shape("dilation 2", 1, 9, 8, 64, 64, **square(3, 1, 2, 2)),
    Shape("dilations that differ, with stride", 1, 12, 14, 8, 8, (3, 3), (2, 3), (2, 4), (2, 3)),
    Shape("dilated taps farther apart than the image is wide", 1, 5, 5, 8, 8, **square(3, 1, 6, 6)),
    Shape("one row of pixels", 1, 1, 150, 16, 16, (1, 3), padding=(0, 1)),
    Shape("one column of pixels", 2, 70, 1, 16, 16, (3, 1), padding=(1, 0)),
    Shape("33 channels and filters: one beyond 32", 1, 5, 6, 33, 33, **square(3)),
    Shape("one channel, one filter", 2, 6, 5, 1, 1, **square(3)),
    Shape("an image's 3 channels: several taps in a chunk", 1, 9, 11, 3, 10, **square(3, 2)),
    Shape("a 7x7 stem without its pool", 1, 13, 14, 3, 64, **square(7, 2)),
    Shape("17 channels: taps begin anywhere in a chunk", 2, 5, 4, 17, 64, (3, 2)),
    Shape("odd channels over several steps, 130 filters", 1, 3, 3, 129, 130, **square(3)),
    Shape("4 channels: whole chunks of float32 only", 1, 6, 7, 4, 12, **square(3)),
    Shape("whole chunks of channels, filters that are not", 1, 5, 5, 72, 10, **square(3)),
    Shape("100 channels to one filter, dilated", 3, 5, 5, 100, 1, **square(3, 1, 2, 2)),
    Shape("a bottleneck's end: 1x1 and a projection", 1, 5, 6, 64, 136, C2=32, stride2=(2, 2)),
    Shape("one step each: both sources within the ring's first round", 1, 8, 8, 64, 64, C2=64),
    Shape("a basic block's end", 2, 7, 7, 64, 64, **square(3), C2=32, stride2=(2, 2)),
    Shape("a second source longer than the first, channel tails in both", 1, 9, 9, 8, 72, C2=264),
    Shape("windows in both sources", 3, 7, 7, 24, 16, **square(3, 2), C2=16, window2=(3, 2)),
    Shape("two narrow sources", 1, 5, 7, 17, 33, **square(3), C2=5, stride2=(1, 2)),
    Shape("a narrow source beside a wide one", 1, 6, 6, 64, 64, C2=3, stride2=(3, 1)),
)  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """Inputs of one call: images [N, C, H, W] (dense as [N, H, W, C]), convolutions, residual."""

    images: tuple[Tensor, ...]
    convs: tuple[ConvBN, ...]
    residual: Tensor | None
    relu: bool

    @property
    def size(self) -> tuple[int, int, int, int]:
        """N, K, P, Q."""
        conv, image = self.convs[0], self.images[0]
        shape = Shape(
            "",
            image.shape[0],
            *image.shape[2:],
            image.shape[1],
            conv.weight.shape[0],
            (conv.weight.shape[2], conv.weight.shape[3]),
            conv.stride,
            conv.padding,
            conv.dilation,
        )
        return shape.N, shape.K, *shape.size

    @property
    def wide(self) -> bool:
        """Whether 16-byte copies can do: whole chunks of channels and filters."""
        size = self.images[0].element_size()
        counts = [self.convs[0].weight.shape[0], *(x.shape[1] for x in self.images)]
        return all(count * size % 16 == 0 for count in counts)

    def tiles(self) -> list[int]:
        """Kernels that can make it."""
        kinds = [(sources, narrow) for _, _, _, sources, narrow in TILES]
        wanted = [(len(self.images), True)] + [(len(self.images), False)] * self.wide
        return [i for i, kind in enumerate(kinds) if kind in wanted]

    def steps(self) -> list[int]:
        """Steps of each source."""
        block = 128 // self.images[0].element_size()
        out = []
        for x, conv in zip(self.images, self.convs, strict=True):
            c, taps = x.shape[1], conv.weight[0, 0].numel()
            whole = c * x.element_size() % 16 == 0
            out.append(taps * -(-c // block) if whole else -(-taps * c // block))
        return out


def make(
    shape: Shape,
    dtype: torch.dtype,
    seed: int,
    integer: bool = False,
    bn: str = "full",
    residual: bool = True,
    relu: bool = True,
) -> Problem:
    """Random tensors of a shape; ``integer``: small ones, whose sums float32 holds exactly."""
    g = torch.Generator().manual_seed(seed)

    def numbers(*size: int, scale: float = 1.0) -> Tensor:
        if integer:
            return torch.randint(-3, 4, size, generator=g).float()
        return torch.randn(size, generator=g) * scale

    def image(n: int, h: int, w: int, c: int) -> Tensor:
        return numbers(n, h, w, c).to(dtype).permute(0, 3, 1, 2)

    def conv(k: int, c: int, window: Pair, **geometry: Pair) -> ConvBN:
        weight = numbers(k, *window, c, scale=(c * window[0] * window[1]) ** -0.5).to(dtype)
        out = ConvBN(weight.permute(0, 3, 1, 2), **geometry)
        if bn == "none":
            return out
        if bn == "bias":
            return out._replace(bias=numbers(k))
        positive = torch.tensor([1.0, 4.0, 0.25])[torch.arange(k) % 3]
        if not integer:
            positive = torch.rand(k, generator=g) + 0.5
        kind = {"half": torch.float16, "bfloat": torch.bfloat16}.get(bn, torch.float32)
        mean, var = numbers(k).to(kind), positive.to(kind)
        out = out._replace(running_mean=mean, running_var=var, eps=0.0 if integer else 1e-5)
        if bn == "statistics":
            return out
        gamma, beta = numbers(k).to(kind), numbers(k).to(kind)
        out = out._replace(bn_weight=gamma, bn_bias=beta)
        if bn == "all":
            # Every vector of another type.
            return out._replace(bias=numbers(k).bfloat16(), bn_weight=gamma.half())
        if bn == "extreme":
            # From the smallest to huge; gamma 0 in every fifth channel.
            scales = torch.tensor([1e-38, 1e-12, 1.0, 1e12, 1e30])[torch.arange(k) % 5]
            gamma = torch.where(torch.arange(k) % 5 == 2, 0.0, gamma.float() * 1e-3)
            return out._replace(running_var=scales, bn_weight=gamma, eps=1e-12)
        return out

    p, q = shape.size
    images = [image(shape.N, shape.H, shape.W, shape.C)]
    geometry = {name: getattr(shape, name) for name in ("stride", "padding", "dilation")}
    convs = [conv(shape.K, shape.C, shape.window, **geometry)]
    if shape.C2:
        h, w = (
            (n - 1) * s + r for n, s, r in zip((p, q), shape.stride2, shape.window2, strict=True)
        )
        images.append(image(shape.N, h, w, shape.C2))
        convs.append(conv(shape.K, shape.C2, shape.window2, stride=shape.stride2))
    other = image(shape.N, p, q, shape.K) if residual else None
    return Problem(tuple(images), tuple(convs), other, relu)


def params(device: Any, problem: Problem, misalign: Any = ()) -> dict[str, Any]:
    """The launch function's arguments besides outputs and plan; ``misalign``: bytes by buffer."""
    n, k, p, q = problem.size
    off = dict(misalign)

    def vector(t: Tensor | None) -> Any:
        return None if t is None else (device.put(t), t.dtype)

    sources = []
    for i, (x, conv) in enumerate(zip(problem.images, problem.convs, strict=True)):
        bn = {
            "conv_bias": vector(conv.bias),
            "weight": vector(conv.bn_weight),
            "bias": vector(conv.bn_bias),
            "mean": vector(conv.running_mean),
            "var": vector(conv.running_var),
            "eps": conv.eps,
        }
        _, c, h, w = x.shape
        r, s = conv.weight.shape[2:]
        geometry = {name: getattr(conv, name) for name in ("stride", "padding", "dilation")}
        # An image without memory is what another convolution of the same kernel makes.
        dense = None if x.is_meta else x.permute(0, 2, 3, 1).contiguous()
        weight = device.put(conv.weight.permute(0, 2, 3, 1).contiguous(), off.get(f"w{i}", 0))
        sizes = {"H": h, "W": w, "C": c, "R": r, "S": s}
        x_at = device.put(dense, off.get(f"x{i}", 0))
        sources.append({"x": x_at, "weight": weight, "bn": bn, **sizes, **geometry})
    residual = None
    if problem.residual is not None:
        dense = problem.residual.permute(0, 2, 3, 1).contiguous()
        residual = device.put(dense, off.get("residual", 0))
    sizes = {"N": n, "P": p, "Q": q, "K": k, "dtype": problem.images[0].dtype}
    return {"source": sources, "residual": residual, "relu": problem.relu, **sizes}


def run(
    library: Any,
    problem: Problem,
    tile: int,
    splits: int = 1,
    seed: int = 1,
    misalign: Any = (),
    kernel: str = "mma_conv",
    **more: object,
) -> Tensor:
    """The convolution on the emulator, [N, K, P, Q]; ``misalign``: bytes by buffer name."""
    n, k, p, q = problem.size
    with library.run(seed) as device:
        arguments = params(device, problem, misalign)
        like = torch.empty(n, p, q, k, dtype=problem.images[0].dtype)
        out = device.out(like, dict(misalign).get("out", 0))
        workspace = device.scratch(4 * splits * n * p * q * k) if splits > 1 else None
        plan = (tile, splits)
        library.launch(kernel, out=out, workspace=workspace, plan=plan, **arguments, **more)
        got: Tensor = device.get(out)
    return got.permute(0, 3, 1, 2)


def exact(problem: Problem) -> Exact:
    """The result in float64 and the bound on a kernel's error.

    Beyond what harness.bounds adds up: tensor cores may cut sums off where they do not round them,
    another u for each of the products and sums. float32 is rounded to TF32, 10 of 23 bits: each
    factor is off by at most 2**-11 of itself, a product by 2 * 2**-11 + 2**-22.
    """
    total: Exact | None = None
    dtype = problem.images[0].dtype
    for x, conv in zip(problem.images, problem.convs, strict=True):
        y = bounds.conv_bn(bounds.stored(x), conv, dtype)
        scale = conv.weight.new_ones(conv.weight.shape[0], dtype=torch.float64)
        if conv.running_var is not None:
            scale = scale / (conv.running_var.double() + conv.eps).sqrt()
        if conv.bn_weight is not None:
            scale = scale * conv.bn_weight.double()
        sums = torch.nn.functional.conv2d(
            x.double().abs(),
            conv.weight.double().abs(),
            None,
            conv.stride,
            conv.padding,
            conv.dilation,
        ) * scale.abs().view(1, -1, 1, 1)
        lost = conv.weight[0].numel() * bounds.U
        if dtype == torch.float32:
            lost += 2 * 2.0**-11 + 2.0**-22
        y = replace(y, error=y.error + lost * sums)
        total = y if total is None else bounds.add(total, y)
    assert total is not None
    if problem.residual is not None:
        total = bounds.add(total, bounds.stored(problem.residual))
    if problem.relu:
        total = bounds.relu(total)
    return bounds.rounded(total, dtype)


def bits(t: Tensor) -> Tensor:
    """The elements' bits, so that NaN equals NaN and -0 is not 0."""
    return t.flatten().view(torch.int32 if t.element_size() == 4 else torch.int16)
