# SPDX-License-Identifier: BSD-3-Clause
"""Launches that catch seeded defects: each raises if a kernel's result or conduct is wrong.

Inputs are small integers, so that a right result is exact, and a NaN here and there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import mma_conv_cases as conv_cases
import test_add_relu_kernel as add_relu_tests
import test_pool_linear_kernel as pool_linear_tests
import test_relu_max_pool_kernel as relu_max_pool_tests
import test_stem_bytes as bytes_tests
import test_stem_kernel as stem_tests
import torch
import wgmma_conv_cases as wgmma_cases
import wgmma_pair_cases as pair_cases
from emulated import Library
from mma_conv_cases import Shape, square
from torch import Tensor
from wgmma_pair_cases import PairShape, three

from harness.case import Source
from resnet_fused.input_norm import normalise

HALF, NAN = torch.float16, float("nan")


class Wrong(Exception):
    """A result that is not right: numeric, or reached by a slower way than there is."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


def compare(library: Library, got: Tensor, want: Tensor) -> None:
    """Equal numbers, NaN at the same places, no bank conflict."""
    want = want.to(got.dtype)
    if not torch.equal(got.isnan(), want.isnan()):
        raise Wrong("numeric")
    if not torch.equal(got.nan_to_num(0.0), want.nan_to_num(0.0)):
        raise Wrong("numeric")
    if library.stats()["bank_conflicts"]:
        raise Wrong("bank-conflicts")


def conv(tile: int, shape: Shape, splits: int) -> Callable[[Library, int], None]:
    """The tensor-core convolution; one pixel is NaN."""

    def case(library: Library, seed: int) -> None:
        problem = conv_cases.make(shape, HALF, seed, integer=True)
        image = problem.images[0].clone()
        image[0, 0, -1, -1] = NAN
        problem = replace(problem, images=(image, *problem.images[1:]))
        got = conv_cases.run(library, problem, tile, splits, seed)
        compare(library, got, conv_cases.exact(problem).value)

    return case


def wgmma(
    tile: int, shape: Shape, splits: int = 1, blocks: int = 1, dependent: bool = False
) -> Callable[[Library, int], None]:
    """The Hopper convolution by so many blocks; one pixel is NaN."""

    def case(library: Library, seed: int) -> None:
        problem = conv_cases.make(shape, HALF, seed, integer=True)
        image = problem.images[0].clone()
        image[0, 0, -1, -1] = NAN
        problem = replace(problem, images=(image, *problem.images[1:]))
        got = wgmma_cases.run(library, problem, tile, splits, seed, blocks, dependent)
        compare(library, got, conv_cases.exact(problem).value)

    return case


def pair(
    tile: int, shape: PairShape, blocks: int = 1, dependent: bool = False
) -> Callable[[Library, int], None]:
    """Two convolutions as one by so many blocks; one pixel is NaN."""

    def case(library: Library, seed: int) -> None:
        both = pair_cases.make(shape, HALF, seed, integer=True)
        image = both.first.images[0].clone()
        image[0, 0, -1, -1] = NAN
        both = replace(both, first=replace(both.first, images=(image,)))
        got = pair_cases.run(library, both, tile, seed, multiprocessors=blocks, dependent=dependent)
        compare(library, got, pair_cases.exact_integers(both))

    return case


def wgmma_tf32(library: Library, seed: int) -> None:
    """float32 with more bits than TF32 has."""
    problem = wgmma_cases.make(Shape("", 1, 5, 5, 64, 64), torch.float32, seed, bn="none")
    got, want = wgmma_cases.run(library, problem, 9, seed=seed), conv_cases.exact(problem)
    if not ((got.double() - want.value).abs() <= want.error).all():
        raise Wrong("numeric")


def split_order(library: Library, seed: int) -> None:
    """Numbers that round: the sum of the partial sums in their order, bit for bit."""
    rows, channels, filters, splits = 20, 320, 64, 5
    g = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(n, channels, generator=g).to(HALF) for n in (rows, filters))
    # The first four parts cancel but for their rounding, which then shows beside a small fifth.
    x[:, 128:256], weight[:, 128:256] = -x[:, :128], weight[:, :128]
    x[:, 256:] /= 1024
    with library.run(seed) as device:
        one = {"H": 1, "W": 1, "C": channels, "R": 1, "S": 1}
        one |= {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
        workspace = device.scratch(4 * splits * rows * filters)
        out = device.out(torch.empty(rows, filters, dtype=HALF))
        library.mma_conv(
            source=[{"x": device.put(x), "weight": device.put(weight), **one}],
            out=out,
            workspace=workspace,
            N=rows,
            P=1,
            Q=1,
            K=filters,
            dtype=HALF,
            relu=False,
            plan=(CONV["conv_split"][0], splits),
        )
        got, parts = device.get(out), device.get(workspace).view(torch.float32)
    total = torch.zeros(rows * filters)
    for part in parts.view(splits, -1):
        total += part
    compare(library, got, total.view(rows, filters))


def stem(size: tuple[int, int], nan: bool) -> Callable[[Library, int], None]:
    def case(library: Library, seed: int) -> None:
        source = Source(HALF, integer=True, seed=seed)
        x, c = source.image(1, 3, *size), stem_tests.stem_conv(source, 3, 64)
        if nan:
            x[0, 1, 11, 18 + 4 * seed] = NAN  # where an eighth tap would reach farther
        want = stem_tests.exact(x, c).value
        compare(library, stem_tests.run(library, seed, x, c, most_blocks=1), want)

    return case


def stem_bytes(library: Library, seed: int) -> None:
    """Bytes against the same normalised beforehand."""
    x, c, norm = bytes_tests.problem(seed, HALF, 1, 3, 29, 33, 64)
    want = stem_tests.run(library, seed, normalise(x, norm, HALF), c, most_blocks=1)
    compare(library, stem_tests.run(library, seed, x, c, most_blocks=1, norm=norm), want)


def stem_bytes_rounded(library: Library, seed: int) -> None:
    """Bytes whose product and shift cancel, each rounded."""
    x, c, norm = bytes_tests.cancelling(HALF)
    got = stem_tests.run(library, seed, x, c, norm=norm)
    compare(library, got, torch.zeros_like(got))


def pool_linear(library: Library, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    for n, c, k in ((1, 64, 5), (5, 132, 37)):
        x = torch.randint(-3, 4, (n, 4, 8, c), generator=g).to(HALF)
        weight = torch.randint(-1, 2, (k, c), generator=g).to(HALF)
        x[0, 0, 0, 0] += 32  # means are multiples of 1 / 32: all sums are exact
        got = pool_linear_tests.run(library, seed, x, weight, None)
        compare(library, got, pool_linear_tests.exact(x, weight, None).value.float())


def relu_max_pool(library: Library, seed: int) -> None:
    x = relu_max_pool_tests.values(seed, 2, 6, 5, 16, dtype=HALF)
    x[1, 3, 3, 3] = NAN
    compare(library, relu_max_pool_tests.run(library, seed, x), relu_max_pool_tests.exact(x))


def add_relu(misalign: int) -> Callable[[Library, int], None]:
    def case(library: Library, seed: int) -> None:
        x, y = torch.randn(2, 8 * 256 + 3).to(HALF)
        x[17] = NAN
        got = add_relu_tests.run(library, seed, x, y, (misalign, misalign, misalign))
        compare(library, got, (x + y).relu())

    return case


# Kernel, shape, splits.
CONV: dict[str, tuple[int, Shape, int]] = {
    # Seven steps: the ring wraps. 43 rows of a 128-row tile are missing.
    "conv_long": (1, Shape("", 1, 5, 17, 448, 64), 1),
    # Two column tiles, the second of them with 8 columns; two row tiles, with 13 rows.
    "conv_residual": (1, Shape("", 1, 3, 47, 64, 72), 1),
    "conv_3x3": (3, Shape("", 2, 7, 6, 24, 72, **square(3)), 1),
    "conv_dilated": (3, Shape("", 1, 9, 8, 64, 64, **square(3, 1, 2, 2)), 1),
    "conv_narrow": (4, Shape("", 1, 5, 6, 33, 33, **square(3)), 1),
    "conv_two": (6, Shape("", 1, 9, 9, 64, 72, C2=136), 1),
    "conv_split": (3, Shape("", 1, 5, 5, 64, 72, **square(3)), 3),
    "conv_split_two": (3, Shape("", 1, 5, 5, 64, 72, **square(3), C2=136), 4),
}

# Kernel, shape, splits, blocks. One block unless more are said: it makes tile after tile.
WGMMA: dict[str, tuple[int, Shape, int, int, bool]] = {
    # Two row tiles and two column tiles of 128; two steps.
    "wgmma_turns": (3, Shape("", 1, 3, 47, 72, 136), 1, 1, False),
    "wgmma_dependent": (9, Shape("", 1, 3, 47, 72, 72), 1, 2, True),
    # Seven steps in a ring of 3: the other consumer's first stage is filled twice before its turn.
    "wgmma_long": (7, Shape("", 1, 5, 13, 448, 264), 1, 1, False),
    "wgmma_together": (0, Shape("", 1, 9, 17, 320, 264), 1, 1, False),
    "wgmma_residual": (9, Shape("", 1, 9, 17, 72, 136), 1, 1, False),
    "wgmma_columns": (10, Shape("", 1, 9, 17, 24, 72), 1, 1, False),
    "wgmma_narrow_panels": (4, Shape("", 1, 9, 17, 24, 104), 1, 1, False),
    "wgmma_3x3": (9, Shape("", 2, 7, 6, 24, 72, **square(3)), 1, 1, False),
    "wgmma_strided": (9, Shape("", 3, 13, 11, 24, 8, **square(3, 2)), 1, 1, False),
    "wgmma_dilated": (9, Shape("", 1, 9, 8, 64, 64, **square(3, 1, 2, 2)), 1, 1, False),
    "wgmma_oblong": (9, Shape("", 1, 9, 8, 24, 64, (3, 1), padding=(1, 0)), 1, 1, False),
    "wgmma_two": (15, Shape("", 1, 11, 13, 64, 72, C2=136), 1, 1, False),
    "wgmma_split": (9, Shape("", 1, 9, 9, 320, 72), 3, 2, False),
}

# Kernel, shape, blocks. Tiles of 128 rows: one block makes them one after the other.
PAIR: dict[str, tuple[int, PairShape, int, bool]] = {
    # Five tiles, three parts; eighteen steps in a ring of five.
    "pair_turns": (0, PairShape("", three(1, 13, 47, 72, 64), 136), 1, False),
    # One part: a consumer's tiles follow each other without a turn between.
    "pair_part": (0, PairShape("", three(1, 13, 47, 8, 64), 64), 1, False),
    "pair_wide": (2, PairShape("", three(1, 5, 30, 24, 128), 72), 1, False),
    "pair_two": (1, PairShape("", three(1, 5, 60, 24, 64), 72, C2=72), 1, False),
    "pair_dependent": (0, PairShape("", three(1, 5, 60, 24, 64), 72), 2, True),
}
CASES: dict[str, Callable[[Library, int], None]] = {
    **{name: conv(*arguments) for name, arguments in CONV.items()},
    "conv_split_order": split_order,
    **{name: wgmma(*arguments) for name, arguments in WGMMA.items()},
    "wgmma_tf32": wgmma_tf32,
    **{name: pair(*arguments) for name, arguments in PAIR.items()},
    "stem": stem((29, 33), nan=False),
    "stem_nan": stem((31, 40), nan=True),
    "stem_bytes": stem_bytes,
    "stem_bytes_rounded": stem_bytes_rounded,
    "pool_linear": pool_linear,
    "relu_max_pool": relu_max_pool,
    "add_relu": add_relu(0),
    "add_relu_on_8_bytes": add_relu(4),
}
