# SPDX-License-Identifier: BSD-3-Clause
"""Two convolutions as one Hopper kernel: shapes, how it is run on the emulator, what is right.

Tiles are 128 rows (output pixels); the tensor between has 64 or 128 channels, and the second
convolution's filters come in parts of 64. A block's two consumers are half a tile apart.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import mma_conv_cases
import torch
import wgmma_conv_cases
from mma_conv_cases import Problem, Shape, square
from torch import Tensor

from harness import bounds
from harness.bounds import Exact
from harness.wgmma_plan import pair_tiles

DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class PairShape:
    """A convolution to ``first.K`` channels, then one of 1x1 to K; with ``C2``, a projection."""

    why: str
    first: Shape
    K: int
    C2: int = 0
    stride2: tuple[int, int] = (1, 1)
    window2: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class Pair:
    """Inputs of one call; the second problem's first image has a shape alone."""

    first: Problem
    last: Problem

    def tile(self) -> int:
        """The kernel that makes it."""
        wanted = (self.first.size[1], len(self.last.images))
        return [(t.middle, t.sources) for t in pair_tiles()].index(wanted)

    def following(self, middle: Tensor) -> Problem:
        """The second problem on what the first made."""
        return replace(self.last, images=(middle, *self.last.images[1:]))


def three(n: int, h: int, w: int, c: int, k: int, stride: int = 1, **more: Any) -> Shape:
    """A 3x3 convolution."""
    return Shape("", n, h, w, c, k, **square(3, stride, **more))


SHAPES = (
    PairShape("one pixel, 8 channels, 8 filters: all else is tail", three(1, 1, 1, 8, 64), 8),
    PairShape("exactly one tile, one part", three(1, 8, 16, 64, 64), 64),
    PairShape("a row beyond one tile, a part of 8 columns", three(1, 3, 43, 64, 64), 72),
    PairShape("stage 1: four parts, two tiles and a half", three(1, 16, 20, 64, 64), 256),
    PairShape("stage 2: eight parts, stride 2 on odd sizes", three(1, 31, 23, 128, 128, 2), 512),
    PairShape("stage 2: a tail in the last part", three(1, 13, 20, 128, 128), 456),
    PairShape("more parts than steps: turns without any", Shape("", 1, 11, 13, 40, 64), 512),
    PairShape("a part alone for many steps: the ring wraps", three(1, 9, 17, 136, 128), 40),
    PairShape("7x7 maps: a tile holds parts of images", three(9, 7, 7, 72, 64), 200),
    PairShape("131 images of one pixel", three(131, 1, 1, 16, 128), 136),
    PairShape("dilated, on odd channels", three(1, 9, 15, 24, 64, padding=2, dilation=2), 96),
    PairShape("1x1 with stride 2, twelve tiles", Shape("", 3, 45, 44, 72, 64, **square(1, 2)), 72),
    PairShape("stage 1 with a projection", three(1, 12, 13, 64, 64), 256, C2=64),
    PairShape("stage 2 with one", three(1, 24, 25, 128, 128, 2), 512, C2=256, stride2=(2, 2)),
    PairShape("tails in both sources", three(5, 7, 6, 24, 64, 2), 136, C2=72, stride2=(2, 1)),
    PairShape(
        "a window in the projection, five tiles",
        three(1, 24, 25, 8, 128),
        72,
        C2=40,
        window2=(2, 3),
    ),
)  # fmt: skip


def make(shape: PairShape, dtype: torch.dtype, seed: int, **options: Any) -> Pair:
    """Random tensors of a shape; options as in mma_conv_cases.make, a ReLU between unless off."""
    between = options.pop("between", True)
    first = mma_conv_cases.make(
        shape.first, dtype, seed, **{**options, "residual": False, "relu": between}
    )
    n, k, p, q = first.size
    follow = Shape("", n, p, q, k, shape.K, C2=shape.C2, stride2=shape.stride2)
    last = mma_conv_cases.make(
        replace(follow, window2=shape.window2), dtype, seed + 1000, **options
    )
    return Pair(first, replace(last, images=(last.images[0].to("meta"), *last.images[1:])))


def run(
    library: Any,
    pair: Pair,
    tile: int | None = None,
    seed: int = 1,
    multiprocessors: int = 2,
    dependent: bool = False,
    misalign: Any = (),
) -> Tensor:
    """Both by one kernel, [N, K, P, Q], by so many blocks at most."""
    n, k, p, q = pair.last.size
    off, rest = dict(misalign), {"out": None, "plan": (0, 1)}
    with library.run(seed) as device:
        first = mma_conv_cases.params(device, pair.first, misalign) | rest
        last = mma_conv_cases.params(device, pair.last, misalign) | rest
        last["out"] = device.out(torch.empty(n, p, q, k, dtype=last["dtype"]), off.get("out", 0))
        library.wgmma_pair(
            first=first,
            last=last,
            tile=pair.tile() if tile is None else tile,
            multiprocessors=multiprocessors,
            dependent=dependent,
        )
        got: Tensor = device.get(last["out"])
    return got.permute(0, 3, 1, 2)


def one_by_one(library: Any, pair: Pair) -> Tensor:
    """The same by two kernels."""
    first, following = pair.first, None
    middle = wgmma_conv_cases.run(library, first, wgmma_conv_cases.makers(first)[0])
    following = pair.following(middle)
    return wgmma_conv_cases.run(library, following, wgmma_conv_cases.makers(following)[0])


def exact(pair: Pair) -> Exact:
    """The result in float64 and the bound on a kernel's error, which the first one's passes."""
    dtype = pair.first.images[0].dtype
    x = mma_conv_cases.exact(pair.first)
    y = bounds.conv_bn(x, pair.last.convs[0], dtype, "tensor cores")
    if len(pair.last.images) == 2:
        image = bounds.stored(pair.last.images[1])
        y = bounds.add(y, bounds.conv_bn(image, pair.last.convs[1], dtype, "tensor cores"))
    if pair.last.residual is not None:
        y = bounds.add(y, bounds.stored(pair.last.residual))
    return bounds.rounded(bounds.relu(y) if pair.last.relu else y, dtype)


def exact_integers(pair: Pair) -> Tensor:
    """What must come out of integers: both are exact but for their roundings."""
    dtype = pair.first.images[0].dtype
    middle = mma_conv_cases.exact(pair.first).value.float().to(dtype)
    return mma_conv_cases.exact(pair.following(middle)).value.float().to(dtype)
