# SPDX-License-Identifier: BSD-3-Clause
"""The choice of a CUDA convolution kernel and its launch, over thousands of shapes."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

from harness.conv_plan import (
    BF16,
    F16,
    F32,
    SMS,
    Conv,
    Source,
    layers,
    plan,
    random_source,
    split_range,
    tiles,
)


def test_tiles_fit_every_gpu() -> None:
    """Breaks if a tile asks for more shared memory or registers than any GPU from sm_80 on has."""
    for t in tiles():
        assert t["shared"] == t["ring"] + 8 * t["columns"] * t["sources"] <= 99 * 1024
        assert t["threads"] == 32 * t["down"] * t["across"]
        assert t["stages"] >= 3, "a stage is filled while the one before it may still be read"
        # 65,536 registers, dealt out in eights per thread; two accumulator sets of the warp tile
        # and its operands (24) must leave room for addresses.
        registers = 65536 // (t["blocks"] * t["threads"]) // 8 * 8
        warp = (t["rows"] // t["down"]) * (t["columns"] // t["across"]) // 32
        assert min(registers, 255) >= warp * t["sources"] + 24 + 30
    kinds = {(t["sources"], t["narrow"]) for t in tiles()}
    assert kinds == set(itertools.product((1, 2), (0, 1))), "no plan for some convolution"


def test_every_plan_is_valid_and_launches() -> None:
    """Breaks if some shape gets a kernel that cannot make it, or a launch some GPU refuses."""
    rng = random.Random(0)
    seen = set()
    for i in range(4000):
        wide = i % 3 > 0
        first = random_source(rng, wide, (1, 7, 14, 56, 57, 224, 1000))
        k = rng.choice((8, 64, 128, 136, 1000, 2048)) if wide else rng.choice((1, 10, 33, 130, 999))
        n = rng.choice((0, 1, 2, 8, 33, 256, 4096))
        conv = Conv((first,), n, k, rng.choice((F32, BF16, F16)))
        if i % 2:
            rows, columns = conv.size
            c = rng.choice((8, 64, 1024)) if wide else rng.choice((1, 7, 64))
            stride = rng.choice((1, 2))
            second = Source((rows - 1) * stride + 1, (columns - 1) * stride + 1, c)
            conv = replace(conv, sources=(first, replace(second, stride=(stride, stride))))
        sms = rng.choice(SMS)
        p = plan(conv, sms, invariant := bool(rng.getrandbits(1)))
        if not p.fits:
            # Only what is larger than a GPU's memory.
            h, w = first.H + 2 * first.padding[0] + 21, first.W + 2 * first.padding[1] + 21
            assert n * h * w * first.C > 1 << 31
            continue
        assert p.valid and p.narrow == (not wide) == p.shape["narrow"]
        assert p.shape["sources"] == (len(conv.sources) if p.splits == 1 else 1)
        if n == 0:
            continue
        assert p.grid == p.tiles > 0, "fits_every_gpu refused the launch"
        assert p.shared == p.shape["shared"] and p.threads == p.shape["threads"]
        assert not invariant or p.splits == 1
        if p.splits > 1:
            assert p.tiles < sms and p.splits <= 16
            assert p.steps0 + p.steps1 >= 4 * p.splits
            m = n * conv.size[0] * conv.size[1]
            assert p.workspace == p.splits * m * k * 4
            # Rounds are a handful of tiles at most: the workspace stays small.
            assert p.workspace <= 16 * sms * 128 * 128 * 4
            assert p.sum_grid * 16 * 64 >= m * k and p.sum_threads == 256
            assert p.sum_shared == 2 * 2 * 64 * 4
        else:
            assert p.workspace == 0
        seen.add((p.tile, p.splits > 1))
    assert {tile for tile, _ in seen} == set(range(8)), "some kernel is never chosen"
    assert {True, False} == {split for _, split in seen}


def test_narrow_where_any_row_is_off_16_bytes() -> None:
    """Breaks if 16-byte copies would meet an address that is not on 16 bytes."""
    wide = Conv((Source(14, 14, 64, 3, 3), Source(12, 12, 32)), 2, 64, residual=4 << 20)
    assert not plan(wide).narrow
    first, second = wide.sources
    for off in (
        replace(wide, K=60),
        replace(wide, out=wide.out + 8),
        replace(wide, residual=wide.residual + 2),
        replace(wide, sources=(replace(first, x=first.x + 2), second)),
        replace(wide, sources=(replace(first, weight=first.weight + 8), second)),
        replace(wide, sources=(replace(first, C=60), second)),
        replace(wide, sources=(first, replace(second, x=second.x + 14))),
        replace(wide, sources=(first, replace(second, weight=second.weight + 2))),
        replace(wide, sources=(first, replace(second, C=4))),
    ):
        assert plan(off).narrow and plan(off).shape["narrow"]
        assert not plan(off, tile=5).valid and not plan(off, tile=6).valid
    # 4 channels of fp32 are 16 bytes.
    assert not plan(replace(wide, dtype=F32, sources=(replace(first, C=60), second))).narrow


def test_steps_by_counting() -> None:
    """Breaks if steps do not hold every channel of every tap, in blocks or packed."""
    rng = random.Random(1)
    for _ in range(500):
        dtype = rng.choice((F32, BF16, F16))
        source = random_source(rng, bool(rng.getrandbits(1)), (7, 14))
        size = 4 if dtype == F32 else 2
        got = plan(Conv((source,), 1, 8, dtype)).steps0
        taps, block = source.R * source.S, 128 // size
        if source.C * size % 16 == 0:
            assert got == taps * -(-source.C // block)
        else:
            assert got == -(-taps * source.C // block)


def test_splits_share_all_steps() -> None:
    """Breaks if a step is added twice or never, a split is empty, or one does most of the work."""
    for steps0, steps1, splits in itertools.product(
        (1, 2, 4, 9, 18, 36, 72, 147), (0, 1, 4, 8, 64), range(2, 17)
    ):
        if splits > steps0 + steps1 or (steps1 and splits < 2):
            continue
        ranges = []
        for index in range(splits):
            *bounds, firsts = split_range(steps0, steps1, splits, index)
            ranges.append(tuple(bounds))
        expected = [(0, i) for i in range(steps0)] + [(1, i) for i in range(steps1)]
        assert [(s, i) for s, begin, end in ranges for i in range(begin, end)] == expected
        assert firsts == sum(source == 0 for source, _, _ in ranges)
        if (steps0 + steps1) >= 4 * splits and min(steps0, steps1 or steps0) >= 4:
            lengths = [end - begin for _, begin, end in ranges]
            assert min(lengths) >= 1
            assert max(lengths) <= 2 * -(-(steps0 + steps1) // splits)


def test_layers_with_64_filters_waste_nothing() -> None:
    """Breaks if a 64-wide layer runs on 128 columns, half of them empty."""
    for n, dtype in itertools.product((1, 8, 32, 256), (F16, F32)):
        for conv in layers(n, dtype):
            p = plan(conv)
            assert p.shape["columns"] <= conv.K
            if n == 256 and conv.K == 64:
                assert (p.shape["rows"], p.shape["columns"]) == (128, 64)


def test_large_batches_use_large_tiles_and_no_splits() -> None:
    """Breaks if a full GPU is given small tiles, which read more, or pays for partial sums."""
    for conv in layers(256):
        p = plan(conv)
        assert p.splits == 1
        if conv.K >= 128 and len(conv.sources) == 1 and p.tiles > 8 * 132:
            assert (p.shape["rows"], p.shape["columns"]) == (128, 128)


def test_batch_1_fills_the_gpu() -> None:
    """Breaks if a long sum over few tiles is left to a few multiprocessors."""
    split = 0
    for conv in layers(1):
        p = plan(conv)
        blocks, steps = p.tiles * p.splits, p.steps0 + p.steps1
        # 20 steps of a small tile take less than twice the launch that adds the parts.
        assert blocks >= 66 or steps // p.splits <= 20, conv
        split += p.splits > 1
    assert split >= 4


def test_plan_is_the_fastest_of_its_model() -> None:
    """Breaks if the search skips a tile or a number of splits that its model finds faster, or
    splits a sum for less than a tenth of the time.
    """
    for n, sms in itertools.product((1, 3, 8, 32, 256), SMS):
        for conv in layers(n):
            chosen = plan(conv, sms)
            whole, split = [], []
            for tile, splits in itertools.product(range(len(tiles())), range(1, 17)):
                other = plan(conv, sms, tile=tile, splits=splits)
                if not other.valid or other.shape["narrow"]:
                    continue
                if splits == 1:
                    whole.append(other.cycles)
                elif other.steps0 + other.steps1 >= 4 * splits and other.tiles < sms:
                    split.append(other.cycles)
            worth = bool(split) and 10 * min(split) < 9 * min(whole)
            assert (chosen.splits > 1) == worth
            assert chosen.cycles == min(split if worth else whole)


def test_partial_sums_are_paid_for() -> None:
    """Breaks if splitting is free of the traffic of its parts, which for a batch of 32 is more than
    that of the whole layer.
    """
    block = Source(14, 14, 256, 3, 3, padding=(1, 1))
    for n, splits in itertools.product((1, 32), (1, 2, 8)):
        p = plan(Conv((block,), n, 256), tile=3, splits=splits)
        rounds, steps = -(-p.tiles * splits // 132), -(-p.steps0 // splits)
        assert p.steps0 == 9 * 4 and p.workspace == (splits > 1) * splits * n * 196 * 256 * 4
        extra = 4000 + 2 * p.workspace // (23 * 132)
        # A step: 64 x 128 bytes of rows and of columns written, and read by 2 warps each.
        assert p.cycles == rounds * steps * (2 + 4) * 64 + (splits > 1) * extra
    assert plan(Conv((block,), 1, 256)).splits > 1 and plan(Conv((block,), 32, 256)).splits == 1


def test_invariant_sums_do_not_follow_the_batch() -> None:
    """Breaks if, with the invariant setting, an image's sum is split by the batch's size."""
    for n, sms in itertools.product((1, 2, 16, 256), SMS):
        for conv in layers(n):
            assert plan(conv, sms, invariant=True).splits == 1
