# SPDX-License-Identifier: BSD-3-Clause
"""The choice of a Hopper convolution's kernel and its launch, over thousands of shapes."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from harness.conv_plan import (
    BF16,
    F16,
    F32,
    SMS,
    Conv,
    Source,
    basic_layers,
    layers,
    random_source,
)
from harness.wgmma_plan import cycles_with_narrow_tiles, plan, tiles

SHARED = 227 * 1024  # of a block on compute capability 9.0
ONE = Source(14, 14, 64)


def test_tiles_fit_a_hopper() -> None:
    """Breaks if a tile asks for more shared memory or registers than there are."""
    for size, t in [(bytes_, t) for bytes_ in (2, 4) for t in tiles(bytes_)]:
        assert (t.rows, t.columns % 32) in ((64, 0), (128, 0), (256, 0)) and t.columns <= 256
        assert t.sums == t.sources * t.rows * t.columns // (256 if t.together else 128) <= 128
        if not t.exists:
            assert size == 4 and t.stages < 3
            continue
        assert 3 <= t.stages <= 8
        ring = t.stages * (t.rows + t.columns) * 128
        assert t.outputs == (1 if t.together else 2) * t.rows * t.columns * size
        # Scales and shifts of both consumers, and at least the barriers of the ring.
        assert ring + t.outputs + 16 * t.columns * t.sources + 1024 < t.shared <= SHARED
        assert t.columns * size % t.panel == 0
    for size in (2, 4):
        made = [t for t in tiles(size) if t.exists]
        assert {(t.sources, t.together) for t in made} == set(itertools.product((1, 2), (0, 1)))


def test_every_plan_is_valid_and_launches() -> None:
    """Breaks if some shape gets a kernel that cannot make it, or a launch that is refused."""
    rng = random.Random(0)
    seen = set()
    for i in range(4000):
        first = random_source(rng, True, (1, 7, 14, 56, 57, 224))
        k = rng.choice((8, 32, 64, 96, 128, 136, 192, 384, 1000, 2048))
        n = rng.choice((0, 1, 2, 8, 33, 256, 4096))
        conv = Conv((first,), n, k, rng.choice((F32, BF16, F16)), residual=i % 3 << 20)
        if i % 2:
            rows, columns = conv.size
            stride = rng.choice((1, 2))
            second = Source((rows - 1) * stride + 1, (columns - 1) * stride + 1, 64)
            conv = replace(conv, sources=(first, replace(second, stride=(stride, stride))))
        sms = rng.choice(SMS)
        p = plan(conv, sms, invariant := bool(rng.getrandbits(1)))
        if not p.fits:
            # Only what is larger than a GPU's memory.
            h, w = first.H + 2 * first.padding[0] + 21, first.W + 2 * first.padding[1] + 21
            assert n * h * w * first.C > 1 << 31 or n * conv.size[0] * conv.size[1] >= 1 << 27
            continue
        assert p.valid and p.shape.exists
        assert p.shape.sources == (len(conv.sources) if p.splits == 1 else 1)
        if n == 0:
            continue
        m = n * conv.size[0] * conv.size[1]
        assert p.items == -(-m // p.shape.rows) * -(-k // p.shape.columns) * p.splits
        assert p.grid == min(p.items, sms) > 0, "fits_every_gpu refused the launch"
        assert p.threads == 384 and p.shared == p.shape.shared
        assert not invariant or p.splits == 1
        if p.splits > 1:
            assert p.items // p.splits < sms and 2 <= p.splits <= 16
            assert p.steps0 + p.steps1 >= 4 * p.splits
        seen.add((p.tile, p.splits > 1))
    assert {tile for tile, _ in seen} == set(range(len(tiles()))), "some kernel is never chosen"
    assert {split for _, split in seen} == {True, False}


def test_what_the_copy_unit_cannot_do_is_left_to_the_other_kernels() -> None:
    """Breaks if a tensor map would be refused, or a window walked that it does not describe."""
    wide = Conv((Source(14, 14, 64, 3, 3, (1, 1), (1, 1)), Source(14, 14, 32)), 2, 64)
    assert plan(wide).fits
    first, second = wide.sources
    for off in (
        replace(wide, K=60),
        replace(wide, out=wide.out + 8),
        replace(wide, residual=(4 << 20) + 2),
        replace(wide, sources=(replace(first, x=first.x + 2), second)),
        replace(wide, sources=(first, replace(second, weight=second.weight + 2))),
        replace(wide, sources=(replace(first, C=60), second)),
        replace(wide, dtype=3),
        # A projection that would find more outputs than there are.
        replace(wide, sources=(first, replace(second, H=15))),
    ):
        assert not plan(off).fits, off


@pytest.mark.parametrize(
    ("within", "beyond"),
    [
        # Strides from pixel to pixel are 1 to 8.
        (replace(ONE, stride=(8, 8)), replace(ONE, stride=(9, 8))),
        (replace(ONE, stride=(8, 8)), replace(ONE, stride=(8, 9))),
        # The lower corner is -padding, from -128 on,
        (replace(ONE, padding=(128, 0), R=3), replace(ONE, padding=(129, 0), R=3)),
        # the upper one padding - (taps - 1) * dilation, up to 127 and from -128 on.
        (replace(ONE, padding=(0, 127)), replace(ONE, padding=(0, 128))),
        (replace(ONE, H=300, R=129), replace(ONE, H=300, R=130)),
        (replace(ONE, W=300, S=2, dilation=(1, 128)), replace(ONE, W=300, S=2, dilation=(1, 129))),
        # A tap's offset has 8 bits.
        (
            replace(ONE, R=256, padding=(127, 0)),
            replace(ONE, R=257, padding=(128, 0)),
        ),
        (
            replace(ONE, S=2, dilation=(1, 255), padding=(0, 127), W=16),
            replace(ONE, S=2, dilation=(1, 256), padding=(0, 128), W=16),
        ),
    ],
    ids=["stride h", "stride w", "lower", "upper", "upper h", "upper w", "taps", "dilation"],
)  # fmt: skip
def test_limits_of_windows_are_exact(within: Source, beyond: Source) -> None:
    """Breaks if a limit of the driver is off by one in either direction."""
    assert plan(Conv((within,), 1, 64)).fits and not plan(Conv((beyond,), 1, 64)).fits


def test_coordinates_have_32_bits() -> None:
    """Breaks if a row, or a row of a tile behind the last one, has no coordinate."""
    row = Source(1, 1 << 20, 8)
    assert plan(Conv((row,), 2047, 8)).fits
    assert not plan(Conv((row,), 2048, 8)).fits
    # As many parts of the work as can be counted: 16 splits of tiles of 64 x 32.
    assert not plan(Conv((row,), 2047, 256)).fits


def zoo(n: int, dtype: int) -> list[Conv]:
    """Every convolution of every ResNet, wide and ResNeXt, that is not grouped."""
    out = [*basic_layers(n, dtype), *layers(n, dtype), *layers(n, dtype, width=128)]
    for width in (128, 256):  # ResNeXt 32x4d, and 32x8d or 64x4d
        out += layers(n, dtype, width=width, grouped=True)
    return list(dict.fromkeys(out))


@pytest.mark.parametrize("dtype", [F16, F32])
def test_which_widths_a_network_wants(dtype: int) -> None:
    """Breaks if a tile of 160 or 224 columns that is not built would make some layer of some batch
    faster by more than 2 %; or if those that are built would be missed by nobody.

    Such tiles have a place where the last round of a narrower one would be mostly empty. 64 rows of
    them would read more filters than they multiply pixels.
    """
    chosen = set()
    for n in range(1, 257):
        for conv in zoo(n, dtype):
            p = plan(conv)
            assert p.cycles <= 1.02 * cycles_with_narrow_tiles(conv), (n, conv)
            chosen.add((p.shape.rows, p.shape.columns))
    assert chosen >= {(128, 160), (128, 224)} if dtype == F16 else chosen >= {(128, 160)}


def test_float32_has_tiles_of_128_columns() -> None:
    """Breaks if float32, whose outputs take twice the room, falls back to tiles that read more: no
    tile of two consumers in turns is left to it.
    """
    wide = [t for t in tiles(4) if t.exists and t.columns >= 128 and t.sources == 1]
    assert {(t.rows, t.columns, t.together) for t in wide} >= {(128, 128, 1), (128, 160, 1)}
    for conv in basic_layers(256, F32):
        assert plan(conv).shape.rows * plan(conv).shape.columns >= 128 * min(conv.K, 96)


def test_layers_with_64_filters_waste_nothing() -> None:
    """Breaks if a 64-wide layer runs on a wider tile, part of it empty."""
    for n, dtype in itertools.product((1, 8, 32, 256), (F16, F32)):
        for conv in layers(n, dtype):
            assert plan(conv).shape.columns <= conv.K


def test_large_batches_use_large_tiles_and_no_splits() -> None:
    """Breaks if a full GPU is given small tiles, which read more, or pays for partial sums."""
    for conv in layers(256):
        p = plan(conv)
        assert p.splits == 1 and p.shape.rows >= 128 and p.shape.columns >= min(conv.K, 64)
        if conv.K >= 128 and len(conv.sources) == 1:
            assert p.shape.columns >= 128


def test_short_sums_take_turns() -> None:
    """Breaks if a layer whose tiles end after a step or two, with a residual, ends them in the open
    where there are many of them.
    """
    for conv in layers(256):
        p = plan(conv)
        if conv.residual and p.steps0 <= 4:
            assert not p.shape.together


def test_batch_1_fills_the_gpu() -> None:
    """Breaks if a long sum over few tiles is left to a few multiprocessors."""
    for conv in layers(1):
        p = plan(conv)
        assert p.items >= 66 or (p.steps0 + p.steps1) // p.splits <= 20, conv


def test_plan_is_the_fastest_of_its_model() -> None:
    """Breaks if the search skips a tile or a number of splits that its model finds faster, or
    splits a sum for less than a tenth of the time.
    """
    for n, sms in itertools.product((1, 8, 256), (20, 132)):
        for conv in layers(n):
            chosen = plan(conv, sms)
            whole, split = [], []
            for tile, splits in itertools.product(range(len(tiles())), range(1, 17)):
                other = plan(conv, sms, tile=tile, splits=splits)
                if not other.valid:
                    continue
                if splits == 1:
                    whole.append(other.cycles)
                elif (other.steps0 + other.steps1 >= 4 * splits) and other.items < sms * splits:
                    split.append(other.cycles)
            worth = bool(split) and 10 * min(split) < 9 * min(whole)
            assert (chosen.splits > 1) == worth
            assert chosen.cycles == min(split if worth else whole)


def test_the_time_of_a_plan() -> None:
    """Breaks if a round, a step, what ends a tile, or the turns of the consumers is not counted."""
    block = Source(14, 14, 256, 3, 3, padding=(1, 1))
    conv = Conv((block,), 256, 256)
    # 128 + 256 rows of 128 bytes come from L2 in 1228 cycles, longer than the 1024 of the products;
    # 392 tiles are 3 rounds of 132.
    assert plan(conv, tile=0).cycles == 3 * (36 * 1228 + 1500 + 128 * 256 * 2 * 2 // 128)
    # Consumers that take turns: only the last tile's end is seen, if steps are many.
    end = 1500 + 128 * 128 * 2 * 2 // 128
    assert plan(conv, tile=3).cycles == 6 * 36 * 819 + end
    short = Conv((Source(56, 56, 64),), 256, 256, residual=4 << 20)
    p = plan(short, tile=3)
    end = 1500 + 128 * 128 * 2 * 4 // 128
    assert p.cycles == 819 + end + (-(-p.items // 132) - 1) * ((819 + end) // 2)


def test_invariant_sums_do_not_follow_the_batch() -> None:
    """Breaks if, with the invariant setting, an image's sum is split by the batch's size."""
    for n, sms in itertools.product((1, 2, 16, 256), SMS):
        for conv in layers(n):
            assert plan(conv, sms, invariant=True).splits == 1


def test_every_layer_of_every_batch_has_a_plan() -> None:
    """Breaks if some layer of a ResNet falls back to the other kernels."""
    for n, dtype in itertools.product((1, 2, 3, 5, 8, 16, 31, 64, 100, 128, 255, 256), (F16, F32)):
        for conv in layers(n, dtype):
            assert plan(conv).valid
