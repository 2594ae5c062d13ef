# SPDX-License-Identifier: BSD-3-Clause
"""The Hopper convolution on the emulator: every kernel, against float64 and exact integers.

Each launch is also checked by the emulator for races, copies and products that are used before they
are done, barriers that are miscounted, missing fences and accesses out of bounds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import emulated
import mma_conv_cases
import pytest
import torch
from mma_conv_cases import Problem, Shape, bits, exact, square
from test_mma_conv import BN, reached
from torch import Tensor
from wgmma_conv_cases import SHAPES, make, makers, run, splitters

from harness.bounds import assert_within
from harness.case import DTYPES
from harness.wgmma_plan import tiles
from resnet_fused.ops import ConvBN

TAIL = next(s for s in SHAPES if (s.C, s.K) == (72, 136))
TWO = next(s for s in SHAPES if s.C2 == 648)
LONG = next(s for s in SHAPES if s.C == 576)


@pytest.fixture(scope="module")
def library() -> Any:
    return emulated.build()


def work(problem: Problem, tile: int) -> tuple[int, int, int]:
    """Products, loads and stores of one launch without splits: a step has a load of pixels and one
    of filters, and 4 products for each 64 rows; outputs come and go in panels of columns.
    """
    size = problem.images[0].element_size()
    t, (n, k, p, q), steps = tiles(size)[tile], problem.size, sum(problem.steps())
    down, across = -(-n * p * q // t.rows), -(-k // t.columns)
    panels = t.columns * size // t.panel
    loads = down * across * (2 * steps + (panels if problem.residual is not None else 0))
    stores = down * sum(
        -(-min(t.columns, k - first) * size // t.panel) for first in range(0, k, t.columns)
    )
    return down * across * steps * 4 * t.rows // 64, loads, stores


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
def test_shapes(library: Any, shape: Shape, dtype: torch.dtype) -> None:
    """Within the bound; the same bits from kernels of other tiles, by one block, two or many.

    Each kernel, and each kind of epilogue, meets shapes of every kind. Breaks as well if a kernel
    multiplies or moves more than there is.
    """
    index = SHAPES.index(shape)
    options = {"bn": BN[index % len(BN)], "residual": index % 2 == 0, "relu": index % 3 > 0}
    problem = make(shape, dtype, index, **options)
    want = exact(problem)
    can = makers(problem)
    first: Tensor | None = None
    for i in range(3):
        tile = can[(index + i * 5) % len(can)]
        blocks = (1, 2, 132)[(i + index) % 3]
        got = run(library, problem, tile, seed=index + i, multiprocessors=blocks)
        assert_within(got, want)
        stats = library.stats()
        done = tuple(stats[name] for name in ("wgmma", "tensor_loads", "tensor_stores"))
        assert done == work(problem, tile)
        first = got if first is None else first
        assert torch.equal(bits(got), bits(first)), f"tile {tile} adds in another order"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", range(len(tiles())))
def test_every_tile(library: Any, tile: int, dtype: torch.dtype) -> None:
    """Exact integers, with a ring that wraps and tails everywhere: more tiles than blocks, so that
    both consumers make several, and phases of every barrier come back.
    """
    t = tiles(dtype.itemsize)[tile]
    if not t.exists:
        pytest.skip("no room for float32 outputs")
    rows, columns = t.rows * (3 if t.rows < 256 else 2) + 3, t.columns + 8
    c2 = {"C2": 136} if t.sources == 2 else {}
    shape = Shape("", 1, 1, rows, 72, columns, (1, 3), padding=(0, 1), **c2)  # fmt: skip
    for residual in (True, False):
        problem = make(shape, dtype, tile, integer=True, residual=residual, relu=residual)
        want = exact(problem).value
        got = run(library, problem, tile, seed=tile + residual, multiprocessors=1 + residual)
        assert torch.equal(got.double(), want.float().to(dtype).double())


@pytest.mark.parametrize("splits", [2, 3, 4, 7])
@cases(
    Shape("steps that do not divide evenly, tails everywhere", 2, 7, 7, 72, 136, **square(3)),
    Shape("two sources, of which each has its splits", 1, 5, 5, 64, 64, **square(3), C2=200),
    Shape("a step for each split", 1, 5, 13, 456, 72),
)
def test_splits(library: Any, shape: Shape, dtype: torch.dtype, splits: int) -> None:
    """Within the bound, and the same bits from every tile: partial sums are added in one order."""
    problem = make(shape, dtype, splits, bn=BN[splits % len(BN)], residual=splits % 2 == 0)
    can = splitters(problem)
    results = []
    for i in range(2):
        tile = can[(splits + i * 3) % len(can)]
        results.append(run(library, problem, tile, splits, splits + i, multiprocessors=3 + 40 * i))
    assert_within(results[0], exact(problem))
    assert torch.equal(bits(results[0]), bits(results[1]))
    integers = make(shape, dtype, splits, integer=True)
    got = run(library, integers, can[splits % len(can)], splits)
    assert torch.equal(got.double(), exact(integers).value.float().to(dtype).double())


@pytest.mark.parametrize("bn", [*BN, "extreme"])
@cases(TAIL, TWO)
def test_epilogue(library: Any, shape: Shape, dtype: torch.dtype, bn: str) -> None:
    """Every kind of BatchNorm with residual and ReLU."""
    kind = BN.index(bn) if bn in BN else 7
    small = replace(shape, N=1)
    problem = make(small, dtype, len(bn), bn=bn, residual=kind % 2 == 0, relu=kind % 4 < 2)
    can = makers(problem)
    assert_within(run(library, problem, can[kind % len(can)], seed=kind), exact(problem))


@cases(TAIL, TWO, Shape("several images in a tile", 6, 5, 5, 24, 72, **square(3)))
def test_an_image_does_not_depend_on_those_beside_it(
    library: Any, shape: Shape, dtype: torch.dtype
) -> None:
    """Bit for bit the same alone and anywhere in a batch."""
    problem = make(replace(shape, N=3), dtype, 7)
    can = makers(problem)
    batch = run(library, problem, can[0])
    for n in range(3):
        assert problem.residual is not None
        images = tuple(x[n : n + 1] for x in problem.images)
        alone = replace(problem, images=images, residual=problem.residual[n : n + 1])
        got = run(library, alone, can[(n + 1) % len(can)])
        assert torch.equal(bits(got), bits(batch[n : n + 1]))


@cases(LONG, next(s for s in SHAPES if s.stride == (2, 2)), TWO)
def test_the_other_family_adds_in_the_same_order(
    library: Any, shape: Shape, dtype: torch.dtype
) -> None:
    """The bits of the mma.sync kernels, as far as the order of sums decides them."""
    problem = make(shape, dtype, 3)
    other = mma_conv_cases.run(library, problem, problem.tiles()[-1])
    assert torch.equal(bits(run(library, problem, makers(problem)[0])), bits(other))


NAN_SHAPES = (
    TWO,
    Shape("1x1: behind the tail is the next pixel", 1, 9, 9, 72, 72),
    Shape("3x3 over 24 channels", 2, 6, 5, 24, 16, **square(3)),
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
    for i, tile in enumerate(makers(problem)[:2]):
        clean = run(library, problem, tile)
        image = problem.images[source].clone()
        n, c, h, w = image.shape
        image[n - 1, (0, c - 1)[i], h // 2, w // 2] = float("nan")
        images = (*problem.images[:source], image)
        got = run(library, replace(problem, images=images), tile)
        where = reached(problem.convs[source], image).unsqueeze(1).expand_as(got)
        assert torch.equal(got.isnan(), where)
        assert torch.equal(bits(got)[~where.flatten()], bits(clean)[~where.flatten()])


@cases(*NAN_SHAPES[:2])
def test_nan_of_a_filter_or_residual_stays_there(
    library: Any, shape: Shape, dtype: torch.dtype
) -> None:
    """A NaN in a filter's last weight, next to the following filter, or in one residual element."""
    problem = make(shape, dtype, 11)
    residual = problem.residual
    assert residual is not None
    column, tile = shape.K // 2, makers(problem)[-1]
    clean = run(library, problem, tile)
    weight = problem.convs[-1].weight.clone()
    weight[column, -1, -1, -1] = float("nan")
    convs = (*problem.convs[:-1], problem.convs[-1]._replace(weight=weight))
    got = run(library, replace(problem, convs=convs), tile)
    others = torch.arange(shape.K) != column
    assert got[:, column].isnan().any()
    assert torch.equal(bits(got[:, others]), bits(clean[:, others]))
    residual = residual.clone()
    residual[0, column, -1, -1] = float("nan")
    got = run(library, replace(problem, residual=residual), tile)
    assert torch.equal(got.isnan(), residual.isnan())


def test_float32_is_rounded_to_the_nearest(library: Any) -> None:
    """Breaks if low bits of float32 are cut off, which would shrink every product alike."""
    g = torch.Generator().manual_seed(1)
    x, w = torch.rand(1, 1024, 1, 1, generator=g) + 1, torch.rand(8, 1024, 1, 1, generator=g) + 1
    conv = ConvBN(w.contiguous(memory_format=torch.channels_last))
    problem = Problem((x,), (conv,), None, False)
    want = exact(problem).value
    got = run(library, problem, makers(problem)[-1])
    assert ((got.double() - want) / want).mean().abs() < 2e-5


def test_dependent_launches(library: Any) -> None:
    """Breaks if a kernel that may begin early does not wait before it touches tensors."""
    for shape in (TAIL, TWO):
        problem = make(shape, torch.float16, 5, integer=True)
        for tile in makers(problem)[:3]:
            got = run(library, problem, tile, dependent=True)
            assert torch.equal(got.double(), exact(problem).value.float().half().double())
    # Partial sums are added by a kernel that begins when this one has ended, so it need not wait.
    problem = make(TAIL, torch.float16, 5, integer=True)
    got = run(library, problem, 9, splits=2, dependent=True)
    assert torch.equal(got.double(), exact(problem).value.float().half().double())
    assert library.stats()["launches"] == 2


def test_plans_that_cannot_be_are_refused(library: Any) -> None:
    """Breaks if a kernel is launched on what it was not made for."""
    one, two = make(TAIL, torch.float16, 1), make(TWO, torch.float16, 1)
    narrow = make(Shape("", 1, 3, 3, 60, 64), torch.float16, 1)
    wide = make(TAIL, torch.float32, 1)
    steep = make(Shape("", 1, 19, 19, 8, 8, **square(3, 9)), torch.float16, 1)
    refused = ((one, 12, 1), (two, 0, 1), (narrow, 9, 1), (two, 13, 2), (wide, 0, 1), (steep, 9, 1))
    few = ((one, -1, 1), (one, 19, 1), (one, 0, 0), (one, 0, 17), (one, 9, 3))
    for problem, tile, splits in (*refused, *few):
        with pytest.raises(emulated.EmulatorError, match="returned error"):
            run(library, problem, tile, splits)
    with pytest.raises(emulated.EmulatorError, match="returned error"):
        run(library, one, 9, misalign={"x0": 8})


def test_no_images(library: Any) -> None:
    """A batch of none launches nothing and is no error."""
    problem = make(replace(TAIL, N=0), torch.float16, 1)
    assert run(library, problem, 9).shape == (0, 136, 15, 16)
    assert library.stats()["launches"] == 0
