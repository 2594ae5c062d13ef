# SPDX-License-Identifier: BSD-3-Clause
"""Two convolutions as one Hopper kernel on the emulator: the bits of two kernels, and float64.

Each launch is also checked by the emulator, as in test_wgmma_conv.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import emulated
import mma_conv_cases
import pytest
import torch
from mma_conv_cases import Shape, bits
from test_mma_conv import BN, reached
from wgmma_pair_cases import (
    DTYPES,
    SHAPES,
    Pair,
    PairShape,
    exact,
    exact_integers,
    make,
    one_by_one,
    run,
    three,
)

from harness.bounds import assert_within
from harness.wgmma_plan import pair_tiles

TAIL = next(s for s in SHAPES if s.K == 72 and s.first.C == 64)
TWO = next(s for s in SHAPES if s.C2 == 72)


@pytest.fixture(scope="module")
def library() -> Any:
    return emulated.build()


def work(pair: Pair) -> tuple[int, int, int]:
    """Products, loads and stores of one launch: a step of the first convolution or of a projection
    has a load of pixels and one of filters, the second convolution a load of filters; each step
    has 4 products for each 64 rows; residuals come and outputs go in parts.
    """
    t, (n, k, p, q) = pair_tiles()[pair.tile()], pair.last.size
    tiles, parts = -(-n * p * q // t.rows), -(-k // t.columns)
    (begin,), (blocks, *project) = pair.first.steps(), pair.last.steps()
    steps = begin + parts * (blocks + sum(project))
    loads = 2 * begin + parts * (blocks + 2 * sum(project))
    loads += parts if pair.last.residual is not None else 0
    return tiles * steps * 4 * t.rows // 64, tiles * loads, tiles * parts


def cases(*of: PairShape) -> Any:
    """A test for each shape and dtype, named by what the shape would break."""
    return pytest.mark.parametrize(
        ("shape", "dtype"),
        [
            pytest.param(shape, dtype, id=f"{str(dtype)[6:]}-{shape.why}")
            for shape in of or SHAPES
            for dtype in DTYPES
        ],
    )


@cases()
def test_shapes(library: Any, shape: PairShape, dtype: torch.dtype) -> None:
    """Within the bound, and bit for bit what two kernels make; by one block, two or many.

    Breaks as well if a kernel multiplies or moves more than there is.
    """
    index = SHAPES.index(shape)
    options = {"bn": BN[index % len(BN)], "residual": index % 2 == 0, "relu": index % 3 > 0}
    pair = make(shape, dtype, index, **options)
    want = bits(one_by_one(library, pair))
    for blocks in (1, (2, 132)[index % 2]):
        got = run(library, pair, seed=index + blocks, multiprocessors=blocks)
        stats = library.stats()
        done = tuple(stats[name] for name in ("wgmma", "tensor_loads", "tensor_stores"))
        assert done == work(pair)
        assert stats["bank_conflicts"] == 0
        assert torch.equal(bits(got), want), "two kernels make other bits"
        assert_within(got, exact(pair))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", range(len(pair_tiles())))
@pytest.mark.parametrize("tiles", [1, 2, 3, 6])
def test_every_tile(library: Any, tile: int, dtype: torch.dtype, tiles: int) -> None:
    """Exact integers by one block that makes so many tiles: both consumers several, one more than
    the other, or one alone; phases of every barrier come back.
    """
    t = pair_tiles()[tile]
    first = Shape("", 1, 1, t.rows * tiles - 5, 72, t.middle, (1, 3), padding=(0, 1))
    shape = PairShape("", first, 72 + 64 * (tiles % 3), C2=136 if t.sources == 2 else 0)
    residual = tiles % 2 == 0
    pair = make(
        shape, dtype, tile, integer=True, residual=residual, relu=residual, between=tiles < 6
    )
    got = run(library, pair, tile, seed=tile + tiles, multiprocessors=1)
    assert torch.equal(got.double(), exact_integers(pair).double())


@pytest.mark.parametrize("bn", [*BN, "extreme"])
@cases(TAIL, TWO)
def test_epilogue(library: Any, shape: PairShape, dtype: torch.dtype, bn: str) -> None:
    """Every kind of BatchNorm in both, with residual and ReLU: the bits of two kernels."""
    kind = BN.index(bn) if bn in BN else 7
    pair = make(shape, dtype, len(bn), bn=bn, residual=kind % 2 == 0, relu=kind % 4 < 2)
    assert torch.equal(bits(run(library, pair, seed=kind)), bits(one_by_one(library, pair)))


@cases(TWO, PairShape("several images in a tile", three(6, 5, 5, 24, 128), 72))
def test_an_image_does_not_depend_on_those_beside_it(
    library: Any, shape: PairShape, dtype: torch.dtype
) -> None:
    """Bit for bit the same alone and anywhere in a batch."""
    pair = make(shape, dtype, 7)
    batch = run(library, pair)
    assert pair.last.residual is not None
    for n in (0, batch.shape[0] - 1):
        alone = Pair(
            replace(pair.first, images=tuple(x[n : n + 1] for x in pair.first.images)),
            replace(
                pair.last,
                images=tuple(x[n : n + 1] for x in pair.last.images),
                residual=pair.last.residual[n : n + 1],
            ),
        )
        assert torch.equal(bits(run(library, alone)), bits(batch[n : n + 1]))


@cases(
    TAIL, PairShape("a window that skips pixels", Shape("", 1, 9, 20, 40, 128, (1, 1), (2, 2)), 40)
)
def test_nan_reaches_its_windows_and_nothing_else(
    library: Any, shape: PairShape, dtype: torch.dtype
) -> None:
    """A NaN in the first or last channel of a pixel: it goes through the tile between, whose other
    rows keep their bits.
    """
    pair = make(shape, dtype, 9, residual=False)
    clean = run(library, pair)
    for channel in (0, -1):
        image = pair.first.images[0].clone()
        image[-1, channel, image.shape[2] // 2, image.shape[3] // 2] = float("nan")
        got = run(library, replace(pair, first=replace(pair.first, images=(image,))))
        where = reached(pair.first.convs[0], image).unsqueeze(1).expand_as(got)
        assert torch.equal(got.isnan(), where)
        assert torch.equal(bits(got)[~where.flatten()], bits(clean)[~where.flatten()])


@cases(TAIL, TWO)
def test_nan_and_infinity_of_a_filter_or_residual_stay_there(
    library: Any, shape: PairShape, dtype: torch.dtype
) -> None:
    """A NaN in the last weight of the second convolution's last filter, next to where filters end;
    in one residual element; infinity in a pixel of the first.
    """
    pair = make(shape, dtype, 11)
    clean, residual = run(library, pair), pair.last.residual
    assert residual is not None
    weight = pair.last.convs[0].weight.clone()
    weight[-1, -1] = float("nan")
    convs = (pair.last.convs[0]._replace(weight=weight), *pair.last.convs[1:])
    got = run(library, replace(pair, last=replace(pair.last, convs=convs)))
    assert got[:, -1].isnan().all()
    assert torch.equal(bits(got[:, :-1]), bits(clean[:, :-1]))
    residual = residual.clone()
    residual[0, 3, -1, -1] = float("nan")
    got = run(library, replace(pair, last=replace(pair.last, residual=residual)))
    assert torch.equal(got.isnan(), residual.isnan())
    image = pair.first.images[0].clone()
    image[0, 1, 0, 0] = float("inf")
    infinite = replace(pair, first=replace(pair.first, images=(image,)))
    assert torch.equal(bits(run(library, infinite)), bits(one_by_one(library, infinite)))


def test_dependent_launches(library: Any) -> None:
    """Breaks if a kernel that may begin early does not wait before it touches tensors."""
    for shape in (TAIL, TWO):
        pair = make(shape, torch.float16, 5, integer=True)
        got = run(library, pair, dependent=True)
        assert torch.equal(got.double(), exact_integers(pair).double())


def test_pairs_that_cannot_be_are_refused(library: Any) -> None:
    """Breaks if a kernel is launched on what it was not made for."""
    good, two = make(TAIL, torch.float16, 1), make(TWO, torch.float16, 1)
    wide = make(replace(TAIL, K=520), torch.float16, 1)
    other = make(replace(TAIL, first=three(1, 3, 43, 64, 72)), torch.float16, 1)
    narrow = make(replace(TAIL, K=60), torch.float16, 1)
    moved = replace(
        good, last=make(replace(TAIL, first=three(1, 4, 43, 64, 64)), torch.float16, 1).last
    )
    single = make(TAIL, torch.float32, 1)
    added = replace(good, first=mma_conv_cases.make(TAIL.first, torch.float16, 1))
    refused = ((good, -1), (good, 4), (good, 1), (good, 2), (two, 0), (wide, 0), (other, 0))
    for pair, tile in (*refused, (narrow, 0), (moved, 0), (single, 0), (added, 0)):
        with pytest.raises(emulated.EmulatorError, match="returned error"):
            run(library, pair, tile)
    with pytest.raises(emulated.EmulatorError, match="returned error"):
        run(library, good, 0, misalign={"residual": 8})


def test_no_images(library: Any) -> None:
    """A batch of none launches nothing and is no error."""
    pair = make(replace(TAIL, first=replace(TAIL.first, N=0)), torch.float16, 1)
    assert run(library, pair).shape == (0, 72, 3, 43)
    assert library.stats()["launches"] == 0
