# SPDX-License-Identifier: BSD-3-Clause
"""When two convolutions run as one Hopper kernel, and its launch, over thousands of shapes."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

from harness.conv_plan import BF16, F16, F32, SMS, Conv, Source, layers, random_source
from harness.wgmma_plan import pair, pair_tiles, plan

SHARED = 227 * 1024  # of a block on compute capability 9.0
RATIO = 0.9  # of two kernels' time, which one must stay below


def pairs(n: int, dtype: int = F16, width: int = 64) -> dict[str, tuple[Conv, Conv]]:
    """The last two convolutions of ResNet-50's blocks, by stage: the first block's, the others'."""
    found = {}
    all_layers = layers(n, dtype, width=width)
    for stage in range(4):
        _, strided, projected, _, inner, last = all_layers[6 * stage : 6 * stage + 6]
        found[f"{stage + 1} first"] = strided, projected
        found[f"{stage + 1}"] = inner, last
    return found


def test_tiles_fit_a_hopper() -> None:
    """Breaks if a tile asks for more shared memory or registers than there are, or counts wrong."""
    for t in pair_tiles():
        assert t.sums == max(t.middle, t.sources * t.columns) * t.rows // 128 <= 128
        assert t.stages >= 3 and t.places >= 2
        assert t.stage == (t.rows + max(t.middle, t.columns)) * 128
        # Both consumers' tiles between, parts of outputs, scales and shifts of all columns.
        room = t.stages * t.stage + 2 * t.rows * t.middle * 2 + t.places * t.rows * t.columns * 2
        room += 8 * (t.middle + t.sources * 512) + 1024
        assert room < t.shared <= SHARED
    assert {(t.middle, t.sources) for t in pair_tiles()} == {(64, 1), (64, 2), (128, 1), (128, 2)}


def test_every_pair_that_fits_can_be_launched() -> None:
    """Breaks if a shape gets a kernel that cannot make it, or a launch that is refused; or if
    something of a right pair is taken for wrong.
    """
    rng = random.Random(0)
    seen = set()
    for i in range(3000):
        source = random_source(rng, True, (1, 7, 14, 56, 57))
        k, last_k = rng.choice((64, 128)), rng.choice((8, 64, 72, 256, 456, 512))
        n, dtype = rng.choice((1, 2, 33, 256)), rng.choice((F16, BF16))
        first = Conv((source,), n, k, dtype)
        rows, columns = first.size
        others = (Source(2 * rows - 1, 2 * columns, 72, stride=(2, 2)),) if i % 2 else ()
        last = Conv((Source(rows, columns, k), *others), n, last_k, dtype, residual=i % 3 << 20)
        sms = rng.choice(SMS)
        p = pair(first, last, sms, bool(rng.getrandbits(1)))
        tile = [(t.middle, t.sources) for t in pair_tiles()].index((k, len(last.sources)))
        assert p.chosen in (-1, tile)
        p = pair(first, last, sms, tile=tile)
        if not p.fits:
            assert not (plan(first).fits and plan(last).fits)
            continue
        assert p.tiles == -(-n * rows * columns // 128) and p.parts == -(-last_k // 64)
        assert p.grid == min(p.tiles, sms) and p.threads == 384
        assert p.shared == pair_tiles()[tile].shared and p.together > 0
        seen.add((tile, p.chosen >= 0))
    assert {tile for tile, _ in seen} == set(range(len(pair_tiles())))


def test_what_is_no_pair_is_left_to_two_kernels() -> None:
    """Breaks if a kernel would read what is not there."""
    first, last = pairs(256)["1"]
    assert pair(first, last).chosen == 0 and pair(first, last, tile=1).fits == 0
    middle = last.sources[0]
    for off in (
        (replace(first, K=128), last),
        (replace(first, K=72), replace(last, sources=(replace(middle, C=72),))),
        (replace(first, residual=4 << 20), last),
        (replace(first, N=255), last),
        (replace(first, dtype=BF16), last),
        (first, replace(last, K=520)),
        (first, replace(last, K=60)),
        (first, replace(last, sources=(replace(middle, R=3, padding=(1, 0)),))),
        (first, replace(last, sources=(replace(middle, stride=(2, 2)),))),
        (first, replace(last, residual=(4 << 20) + 8)),
        (first, replace(last, out=last.out + 8)),
        (replace(first, dtype=F32), replace(last, dtype=F32)),
    ):
        assert pair(*off).chosen == -1
        assert not any(pair(*off, tile=tile).fits for tile in range(len(pair_tiles()))), off
    assert pair(first, last, tile=4).fits == 0


def test_a_pair_never_changes_a_sum() -> None:
    """Breaks if one kernel is chosen where two would split a sum, whose bits splits change."""
    for n, sms, width in itertools.product((1, 2, 4, 8), SMS, (64, 128)):
        for first, last in pairs(n, width=width).values():
            split = plan(first, sms).splits > 1 or plan(last, sms).splits > 1
            assert not (split and pair(first, last, sms).chosen >= 0)
    # A case in which it would be the faster one.
    first = Conv((Source(16, 16, 4096),), 1, 64)
    last = Conv((Source(16, 16, 64),), 1, 64)
    assert plan(first, 132).splits > 1 and pair(first, last, 132, tile=0).layerwise == -1
    assert pair(first, last, 132, invariant=True, tile=0).layerwise > 0


def test_the_time_of_a_pair() -> None:
    """Breaks if a step, a part, what ends it, a round or memory is not counted."""
    first, last = pairs(8)["2"]
    # A step of the second one reads 128 rows, and 64 columns for each 64 of them, written before.
    begin, part, end = 18 * 819, 2 * (128 + 64 + 2 * 64), 1500 + 128 * 64 * 2 * 4 // 128
    # 49 tiles: one each for 132 multiprocessors, 49 for one, whose memory has time.
    assert pair(first, last, tile=2).together == begin + 8 * (part + end)
    cycles = begin + 8 * (part + end) + 48 * max(begin + 8 * part, 8 * (part + end))
    assert pair(first, last, 1, tile=2).together == cycles
    # 3584 tiles, 28 for the busiest, are faster than the memory of all tensors but the one between.
    first, last = pairs(256)["1"]
    rows = 256 * 56 * 56
    assert pair(first, last).together == rows * (64 + 2 * 256) * 2 // (132 * 14)
    # Two kernels, of which each has its memory. Small tensors stay in the cache.
    for n, speed in ((256, 14), (8, 23)):
        first, last = pairs(n)["1"]
        each = [
            max(plan(conv).cycles, n * 56 * 56 * (64 + k) * 2 // (132 * speed))
            for conv, k in ((first, 64), (last, 2 * 256))
        ]
        assert pair(first, last, tile=0).layerwise == sum(each) + 4000


def test_a_pair_is_chosen_where_it_is_faster_by_a_tenth() -> None:
    """Breaks if the choice does not follow the model, or the model does not see what a pair saves:
    the tensor between, written and read, which in stages 1 and 2 is most of what can be saved; or
    if a batch of one, whose tiles are few, is made by few multiprocessors.
    """
    for n, sms in itertools.product((1, 8, 16, 32, 64, 256), (20, 132)):
        for name, (first, last) in pairs(n).items():
            p = pair(first, last, sms)
            assert (p.chosen >= 0) == bool(p.fits and 0 < p.together < RATIO * p.layerwise)
            assert p.fits == 1 or p.chosen == -1
            if name[0] in "34":
                assert p.chosen == -1, "the tensor between is too wide"
    for n in (64, 128, 256):
        for name in ("1", "2"):
            p = pair(*pairs(n)[name])
            assert p.chosen >= 0 and p.layerwise > 1.4 * p.together
    for n in (1, 2, 4):
        assert all(pair(*of).chosen == -1 for of in pairs(n).values())
