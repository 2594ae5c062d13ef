# SPDX-License-Identifier: BSD-3-Clause
"""The tensor-core convolution on the emulator: every kernel, against float64 and exact integers.

Each launch is also checked for races, copies that have not landed, reads of what was never written
and accesses out of bounds, by the emulator.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import emulated
import pytest
import torch
from mma_conv_cases import SHAPES, TILES, Problem, Shape, bits, exact, make, run, square
from torch import Tensor

from harness.bounds import assert_within
from harness.case import DTYPES
from resnet_fused.ops import ConvBN

BN = ("full", "none", "half", "bfloat", "bias", "statistics", "all")
SEEDS = (1, 2, 3)
WIDE_TAIL = next(s for s in SHAPES if (s.C, s.K, s.window) == (72, 72, (1, 1)))
NARROW = next(s for s in SHAPES if (s.C, s.K) == (33, 33))
TWO = next(s for s in SHAPES if (s.C, s.C2) == (8, 264))


@pytest.fixture(scope="module")
def library() -> Any:
    return emulated.build()


def products(problem: Problem, tile: int) -> int:
    """mma instructions of one launch without splits: 16 x 8 outputs, a quarter of a step each."""
    n, k, p, q = problem.size
    rows, columns = TILES[tile][:2]
    tiles = -(-n * p * q // rows) * -(-k // columns)
    return tiles * (rows // 16) * (columns // 8) * 4 * sum(problem.steps())


def cases(*of: Shape) -> Any:
    """A test for each shape and dtype, named by what the shape would break."""
    shapes = of or SHAPES
    return pytest.mark.parametrize(
        ("shape", "dtype"),
        [
            pytest.param(shape, dtype, id=f"{str(dtype)[6:]}-{shape.why}")
            for shape in shapes
            for dtype in DTYPES
        ],
    )


@cases()
def test_every_tile_makes_every_shape(library: Any, shape: Shape, dtype: torch.dtype) -> None:
    """Within the bound; the same bits from every kernel that can make it, under other schedules.

    Breaks as well if ldmatrix meets a bank twice, or if a kernel multiplies more steps than there
    are.
    """
    index = SHAPES.index(shape)
    # Each combination of residual and ReLU, and each kind of BatchNorm, meets many shapes.
    options = {"bn": BN[index % len(BN)], "residual": index % 2 == 0, "relu": index % 3 > 0}
    problem = make(shape, dtype, index, **options)
    want = exact(problem)
    first: Tensor | None = None
    for i, tile in enumerate(problem.tiles()):
        got = run(library, problem, tile, seed=SEEDS[(i + index) % 3])
        stats = library.stats()
        assert_within(got, want)
        assert stats["bank_conflicts"] == 0
        assert stats["mma"] == products(problem, tile)
        first = got if first is None else first
        assert torch.equal(bits(got), bits(first)), f"tile {tile} adds in another order"


@cases()
def test_exact_integers(library: Any, shape: Shape, dtype: torch.dtype) -> None:
    """Not one element off, with sums of whole numbers that float32 holds.

    Many exceed 256, beyond which bfloat16 rounds: breaks too if anything is rounded on the way.
    """
    index = SHAPES.index(shape)
    problem = make(shape, dtype, 100 + index, integer=True, relu=index % 2 == 0)
    tiles = problem.tiles()
    got = run(library, problem, tiles[index % len(tiles)], seed=SEEDS[index % 3])
    want = exact(problem).value
    assert torch.equal(want, want.float().double()), "the inputs are not what this test is for"
    assert torch.equal(got.double(), want.float().to(dtype).double())


@pytest.mark.parametrize("splits", [2, 3, 4, 5, 6, 7])
@cases(
    Shape("more splits than there are steps", 1, 4, 5, 136, 72),
    Shape("steps that do not divide evenly, tails everywhere", 2, 7, 7, 72, 136, **square(3)),
    Shape("odd channels: splits begin inside a tap", 1, 5, 7, 33, 33, **square(5)),
    Shape("a narrow last map", 1, 3, 3, 20, 10, **square(3)),
    Shape("two sources, of which each has its splits", 1, 5, 5, 64, 64, **square(3), C2=200),
    Shape("two sources, one step in the second", 1, 5, 5, 320, 72, C2=8, stride2=(2, 2)),
    Shape("two narrow sources", 1, 5, 5, 100, 33, **square(3), C2=33),
)
def test_splits(library: Any, shape: Shape, dtype: torch.dtype, splits: int) -> None:
    """Within the bound, and the same bits from every tile: partial sums are added in one order."""
    problem = make(shape, dtype, splits, bn=BN[splits % len(BN)], residual=splits % 2 == 0)
    want = exact(problem)
    one = replace(problem, images=problem.images[:1], convs=problem.convs[:1])
    wide = [0, 1, 2, 3, 4] if problem.wide else [4]
    assert set(one.tiles()) >= set(wide)
    chosen = {wide[splits % len(wide)], wide[(splits + 2) % len(wide)]}
    results = []
    for seed, tile in enumerate(sorted(chosen), splits):
        results.append(run(library, problem, tile, splits, seed=seed))
        assert library.stats()["bank_conflicts"] == 0
    assert_within(results[0], want)
    assert torch.equal(bits(results[0]), bits(results[-1]))
    integers = make(shape, dtype, splits, integer=True)
    got = run(library, integers, max(chosen), splits, seed=splits)
    assert torch.equal(got.double(), exact(integers).value.float().to(dtype).double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_order_of_partial_sums(library: Any, dtype: torch.dtype) -> None:
    """Three splits with sums of which 1 is lost beside 2**24: only the right order gives these."""
    step = 128 // dtype.itemsize
    big = 2.0**12
    image, weight = torch.zeros(1, 3 * step, 1, 1), torch.zeros(8, 3 * step, 1, 1)
    image[0, ::step] = big
    image[0, 1::step] = 1.0
    one = 1.0
    for k, parts in enumerate(((big, one, -big), (one, big, -big), (big, -big, one))):
        for split, part in enumerate(parts):
            weight[k, split * step + (abs(part) == one)] = part
    conv = ConvBN(weight.to(dtype).contiguous(memory_format=torch.channels_last))
    problem = Problem((image.to(dtype),), (conv,), None, False)
    for tile in problem.tiles():
        got = run(library, problem, tile, 3).flatten().tolist()
        assert got == [0, 0, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("bn", [*BN, "extreme"])
@cases(WIDE_TAIL, NARROW, TWO)
def test_epilogue(library: Any, shape: Shape, dtype: torch.dtype, bn: str) -> None:
    """Every kind of BatchNorm with and without residual and ReLU, and the same behind a split."""
    for residual, relu in ((False, False), (False, True), (True, False), (True, True)):
        problem = make(shape, dtype, len(bn), bn=bn, residual=residual, relu=relu)
        want = exact(problem)
        tiles = problem.tiles()
        tile = tiles[(2 * residual + relu) % len(tiles)]
        assert_within(run(library, problem, tile, seed=1 + residual), want)
        split_tile = 3 if problem.wide else 4
        assert_within(run(library, problem, split_tile, 2, seed=2 + relu), want)


@cases(WIDE_TAIL, SHAPES[0], NARROW)
def test_nothing_but_the_shift_where_gamma_is_0(
    library: Any, shape: Shape, dtype: torch.dtype
) -> None:
    """Breaks if the scale is divided out of the sums, as a ratio of two scales would be."""
    problem = make(shape, dtype, 5, bn="full", residual=False, relu=False)
    beta = torch.arange(shape.K) / 4 - 3
    conv = problem.convs[0]._replace(bn_weight=torch.zeros(shape.K), bn_bias=beta)
    got = run(library, replace(problem, convs=(conv,)), problem.tiles()[-1])
    assert torch.equal(got, beta.to(dtype).view(1, -1, 1, 1).expand_as(got))


@cases(SHAPES[5], NARROW, TWO, Shape("several images in a tile", 6, 5, 5, 24, 72, **square(3)))
def test_an_image_does_not_depend_on_those_beside_it(
    library: Any, shape: Shape, dtype: torch.dtype
) -> None:
    """Bit for bit the same alone and anywhere in a batch."""
    problem = make(replace(shape, N=3), dtype, 7)
    tiles = problem.tiles()
    batch = run(library, problem, tiles[0])
    for n in range(3):
        assert problem.residual is not None
        alone = replace(
            problem,
            images=tuple(x[n : n + 1] for x in problem.images),
            residual=problem.residual[n : n + 1],
        )
        got = run(library, alone, tiles[n % len(tiles)])
        assert torch.equal(bits(got), bits(batch[n : n + 1]))


def reached(conv: Any, image: Tensor) -> Tensor:
    """Output pixels [N, P, Q] whose window holds a NaN of the image."""
    marks = image.isnan().any(1, keepdim=True).double()
    window = torch.ones(1, 1, *conv.weight.shape[2:], dtype=torch.float64)
    out = torch.nn.functional.conv2d(marks, window, None, conv.stride, conv.padding, conv.dilation)
    return out[:, 0] > 0


NAN_SHAPES = (
    WIDE_TAIL,
    NARROW,
    TWO,
    Shape("3x3 over 24 channels: behind the tail is the next pixel", 2, 6, 5, 24, 16, **square(3)),
    Shape("packed taps of 3 channels", 2, 6, 5, 3, 8, **square(3, 2)),
    Shape("stride 3: most pixels are read by nobody", 1, 7, 8, 8, 8, **square(1, 3)),
    Shape("dilated and padded", 1, 6, 6, 40, 8, **square(3, 1, 2, 2)),
)  # fmt: skip


@cases(*NAN_SHAPES)
def test_nan_reaches_its_windows_and_nothing_else(
    library: Any, shape: Shape, dtype: torch.dtype
) -> None:
    """A NaN in the first or last channel of a pixel: next to its neighbours' ends in memory."""
    problem = make(shape, dtype, 9, residual=False)
    source = len(problem.images) - 1
    for i, tile in enumerate(problem.tiles()):
        clean = run(library, problem, tile)
        image = problem.images[source].clone()
        n, c, h, w = image.shape
        image[n - 1, (0, c - 1)[i % 2], h // 2, w // 2] = float("nan")
        images = (*problem.images[:source], image)
        got = run(library, replace(problem, images=images), tile)
        where = reached(problem.convs[source], image)
        where = where.unsqueeze(1).expand_as(got)
        assert torch.equal(got.isnan(), where)
        assert torch.equal(bits(got)[~where.flatten()], bits(clean)[~where.flatten()])


@cases(*NAN_SHAPES[:3])
def test_nan_of_a_filter_or_residual_stays_there(
    library: Any, shape: Shape, dtype: torch.dtype
) -> None:
    """A NaN in a filter's last weight, next to the following filter, or in one residual element."""
    problem = make(shape, dtype, 11)
    clean_residual = problem.residual
    assert clean_residual is not None
    column = shape.K // 2
    for tile in problem.tiles():
        clean = run(library, problem, tile)
        weight = problem.convs[-1].weight.clone()
        weight[column, -1, -1, -1] = float("nan")
        convs = (*problem.convs[:-1], problem.convs[-1]._replace(weight=weight))
        got = run(library, replace(problem, convs=convs), tile)
        others = torch.arange(shape.K) != column
        assert got[:, column].isnan().any()
        assert torch.equal(bits(got[:, others]), bits(clean[:, others]))
        residual = clean_residual.clone()
        residual[0, column, -1, -1] = float("nan")
        got = run(library, replace(problem, residual=residual), tile)
        assert torch.equal(got.isnan(), residual.isnan())


@pytest.mark.parametrize("buffer", ["x0", "w0", "x1", "w1", "residual", "out"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned_buffers(library: Any, dtype: torch.dtype, buffer: str) -> None:
    """A buffer off 16 bytes changes the kernel, not one bit; the others refuse it."""
    problem = make(TWO, dtype, 13)
    narrow = next(t for t in problem.tiles() if TILES[t][4])
    wide = next(t for t in problem.tiles() if not TILES[t][4])
    off = {buffer: dtype.itemsize}
    got = run(library, problem, narrow, misalign=off)
    assert torch.equal(bits(got), bits(run(library, problem, wide)))
    with pytest.raises(emulated.EmulatorError, match="returned error"):
        run(library, problem, wide, misalign=off)


@pytest.mark.parametrize("tile", range(5))
def test_rows_behind_the_last_pixel_of_a_huge_image(library: Any, tile: int) -> None:
    """Breaks if positions in images that do not exist are computed: they need more than 32 bits.

    Of the 32768 x 32768 pixels, one is read, so that one is all there need be.
    """
    x, weight = torch.arange(8.0).half(), torch.ones(8, 8).half()
    huge = {"H": 1 << 15, "W": 1 << 15, "C": 8, "R": 1, "S": 1}
    huge |= {"stride": (1 << 16, 1 << 16), "padding": (0, 0), "dilation": (1, 1)}
    with library.run() as device:
        out = device.out(torch.empty(8).half())
        source = {"x": device.put(x), "weight": device.put(weight), **huge}
        sizes = {"N": 1, "P": 1, "Q": 1, "K": 8, "dtype": torch.float16, "relu": False}
        library.mma_conv(source=[source], out=out, plan=(tile, 1), **sizes)
        assert device.get(out).tolist() == [28.0] * 8


def test_plans_that_cannot_be_are_refused(library: Any) -> None:
    """Breaks if a kernel is launched on what it was not made for."""
    one, two = make(WIDE_TAIL, torch.float16, 1), make(TWO, torch.float16, 1)
    narrow = make(NARROW, torch.float16, 1)
    refused = ((one, 5, 1), (two, 0, 1), (narrow, 0, 1), (narrow, 3, 2), (two, 6, 2))
    for problem, tile, splits in (*refused, (one, -1, 1), (one, 8, 1), (one, 0, 0), (one, 0, 17)):
        with pytest.raises(emulated.EmulatorError, match="returned error"):
            run(library, problem, tile, splits)


def test_no_images(library: Any) -> None:
    """A batch of none launches nothing and is no error."""
    problem = make(replace(WIDE_TAIL, N=0), torch.float16, 1)
    assert run(library, problem, 0).shape == (0, 72, 9, 9)
    assert library.stats()["launches"] == 0
