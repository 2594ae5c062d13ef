# SPDX-License-Identifier: BSD-3-Clause
"""Shapes for the Hopper convolution, and how it is run on the emulator.

Tiles are 64 to 256 rows (output pixels) by 32 to 256 columns (filters), steps 64 channels of 16
bits or 32 of float32, rings 3 to 8 stages. A block makes tile after tile, its consumers in turns or
together.
"""

from __future__ import annotations

from typing import Any

import mma_conv_cases
import torch
from mma_conv_cases import Problem, Shape, square
from torch import Tensor

from harness.wgmma_plan import tiles

SHAPES = (
    Shape("one pixel, 8 channels, 8 filters: all else is tail", 1, 1, 1, 8, 8),
    Shape("exactly 64 x 64, one step", 1, 8, 8, 64, 64),
    Shape("exactly 128 x 128", 2, 8, 8, 64, 128),
    Shape("one row beyond 128, one chunk beyond 64 columns", 1, 3, 43, 64, 72),
    Shape("one row beyond 256, columns of every width", 1, 1, 257, 72, 264),
    Shape("one row short of 64", 1, 7, 9, 40, 40),
    Shape("three steps: the shortest ring is full", 1, 5, 13, 192, 72),
    Shape("four steps", 1, 5, 13, 256, 96),
    Shape("seven steps and a tail", 1, 4, 5, 456, 64),
    Shape("eight steps: the longest ring is full", 1, 4, 5, 512, 40),
    Shape("nine steps: every ring wraps", 1, 9, 9, 576, 40),
    Shape("seventeen steps: the longest ring wraps twice", 1, 2, 3, 1032, 8),
    Shape("many tiles of one step: phases wrap between tiles", 1, 13, 53, 64, 200),
    Shape("many tiles of two steps, tails everywhere", 3, 15, 16, 72, 136),
    Shape("many column tiles of few rows", 1, 2, 3, 24, 520),
    Shape("3x3 at the image's border", 1, 7, 9, 24, 64, **square(3)),
    Shape("3x3 without padding", 1, 9, 7, 64, 40, **square(3, padding=0)),
    Shape("3x3 with stride 2 on odd sizes", 2, 7, 7, 64, 64, **square(3, 2)),
    Shape("3x3 with stride 2: the last padding is not read", 1, 8, 8, 40, 72, **square(3, 2)),
    Shape("7x7 maps: a tile holds parts of several images", 9, 7, 7, 64, 96, **square(3)),
    Shape("131 images of one pixel: each row is an image", 131, 1, 1, 16, 16, **square(3)),
    Shape("131 images of 2x2 through a 2x2 window", 131, 2, 2, 8, 8, **square(2, padding=0)),
    Shape("a window and strides that differ", 1, 11, 10, 16, 24, (5, 3), (2, 1), (2, 1)),
    Shape("height and width differ in all", 1, 13, 3, 8, 8, (3, 5), (1, 2), (0, 3), (2, 1)),
    Shape("7x7, 8 channels", 1, 15, 13, 8, 64, **square(7, 2)),
    Shape("1x1 with stride 2", 2, 9, 8, 72, 200, **square(1, 2)),
    Shape("stride 3 over a window of 1: pixels are skipped", 2, 10, 11, 40, 64, **square(1, 3)),
    Shape("stride 8, the largest, over a window of 2", 1, 19, 26, 8, 8, **square(2, 8, 0)),
    Shape("1x1 with padding: border outputs see no pixel", 1, 3, 4, 64, 64, **square(1, 1, 2)),
    Shape("padding 3 beyond the window", 1, 4, 3, 16, 8, **square(3, 2, 3)),
    Shape("dilation 2", 1, 9, 8, 64, 64, **square(3, 1, 2, 2)),
    Shape("dilations that differ, with stride", 1, 12, 14, 8, 8, (3, 3), (2, 3), (2, 4), (2, 3)),
    Shape("one row of pixels", 1, 1, 150, 16, 16, (1, 3), padding=(0, 1)),
    Shape("one column of pixels", 2, 70, 1, 16, 16, (3, 1), padding=(1, 0)),
    Shape("a bottleneck's end: 1x1 and a projection", 1, 10, 12, 64, 136, C2=32, stride2=(2, 2)),
    Shape("one step each", 1, 8, 8, 64, 64, C2=64),
    Shape("a basic block's end", 3, 7, 7, 64, 72, **square(3), C2=32, stride2=(2, 2)),
    Shape("a second source longer than the first and the ring", 1, 9, 9, 8, 72, C2=648),
    Shape("windows in both sources", 3, 7, 7, 24, 16, **square(3, 2), C2=16, window2=(3, 2)),
)  # fmt: skip


def make(shape: Shape, dtype: torch.dtype, seed: int, **options: Any) -> Problem:
    """As in mma_conv_cases; but no float32 lies halfway between two of TF32.

    Nobody documents to which of them the copy unit rounds, and the emulator takes any.
    """
    problem = mma_conv_cases.make(shape, dtype, seed, **options)
    if dtype == torch.float32 and not options.get("integer"):
        for t in (*problem.images, *(conv.weight for conv in problem.convs)):
            t.permute(0, 2, 3, 1).view(torch.int32).bitwise_or_(1)
    return problem


def makers(problem: Problem) -> list[int]:
    """Kernels that can make it without splits."""
    size, sources = problem.images[0].element_size(), len(problem.images)
    return [i for i, t in enumerate(tiles(size)) if t.exists and t.sources == sources]


def splitters(problem: Problem) -> list[int]:
    """Kernels that can make a part of its sums."""
    size = problem.images[0].element_size()
    return [i for i, t in enumerate(tiles(size)) if t.exists and t.sources == 1]


def run(
    library: Any,
    problem: Problem,
    tile: int,
    splits: int = 1,
    seed: int = 1,
    multiprocessors: int = 2,
    dependent: bool = False,
    misalign: Any = (),
) -> Tensor:
    """The convolution on the emulator, [N, K, P, Q], by so many blocks at most."""
    more = {"multiprocessors": multiprocessors, "dependent": dependent}
    return mma_conv_cases.run(
        library, problem, tile, splits, seed, misalign, kernel="wgmma_conv", **more
    )
