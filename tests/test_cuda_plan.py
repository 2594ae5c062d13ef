# SPDX-License-Identifier: BSD-3-Clause
"""The choice of a CUDA convolution kernel and its launch, over thousands of shapes."""

from __future__ import annotations

import ctypes
import itertools
import random
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = r"""
#include "kernels/cuda/conv_plan.h"
using namespace resnet_fused;
// v: N P Q K dtype sources residual out sms invariant tile splits, then for each source x weight H
// W C R S stride padding dilation. tile -1: choose. r: fits narrow tile splits valid grid threads
// shared workspace steps0 steps1 sum-grid sum-threads sum-shared tiles cycles.
extern "C" void plan(const int64_t* v, int64_t* r) {
  MmaConvParams p{};
  p.N = v[0], p.P = v[1], p.Q = v[2], p.K = v[3];
  p.dtype = static_cast<DType>(v[4]);
  p.sources = static_cast<int>(v[5]);
  p.residual = reinterpret_cast<const void*>(v[6]);
  p.out = reinterpret_cast<void*>(v[7]);
  p.workspace = reinterpret_cast<float*>(256);
  for (int i = 0; i < 2; ++i) {
    const int64_t* at = v + 12 + i * 13;
    ConvSource& s = p.source[i];
    s.x = reinterpret_cast<const void*>(at[0]);
    s.weight = reinterpret_cast<const void*>(at[1]);
    s.H = at[2], s.W = at[3], s.C = at[4], s.R = at[5], s.S = at[6];
    for (int d = 0; d < 2; ++d) {
      s.stride[d] = at[7 + d], s.padding[d] = at[9 + d], s.dilation[d] = at[11 + d];
    }
  }
  for (int i = 0; i < 16; ++i) r[i] = -1;
  r[0] = mma_conv_fits(p);
  if (!r[0]) return;
  r[1] = is_narrow(p);
  p.plan = {static_cast<int>(v[10]), static_cast<int>(v[11])};
  if (v[10] < 0) p.plan = plan_mma_conv(p, static_cast<int>(v[8]), v[9] != 0);
  r[2] = p.plan.tile, r[3] = p.plan.splits, r[4] = plan_is_valid(p);
  const LaunchShape conv = mma_conv_shape(p), sum = split_sum_shape(p);
  if (output_rows(p) * p.K > 0 && !(fits_every_gpu(conv) && fits_every_gpu(sum))) return;
  r[5] = conv.grid[0], r[6] = conv.threads, r[7] = conv.shared_bytes;
  r[8] = mma_conv_workspace(p);
  r[9] = source_steps(p.source[0], p.dtype);
  r[10] = p.sources == 2 ? source_steps(p.source[1], p.dtype) : 0;
  r[11] = sum.grid[0], r[12] = sum.threads, r[13] = sum.shared_bytes;
  r[14] = output_tiles(p, kMmaTiles[p.plan.tile]);
  r[15] = plan_cycles(p, p.plan, static_cast<int>(v[8]));
}
extern "C" int tile(int i, int* r) {
  const MmaTile& t = kMmaTiles[i];
  const int all[] = {t.rows, t.columns, t.warps_down, t.warps_across, t.stages,
                     t.blocks, t.sources, t.narrow, t.threads(), t.ring_bytes(), t.shared_bytes()};
  for (int j = 0; j < 11; ++j) r[j] = all[j];
  return kMmaTileCount;
}
extern "C" void range(int64_t steps0, int64_t steps1, int splits, int index, int* r) {
  const StepRange range = split_range(steps0, steps1, splits, index);
  r[0] = range.source, r[1] = range.begin, r[2] = range.end;
  r[3] = first_source_splits(steps0, steps1, splits);
}
"""
F32, BF16, F16 = 0, 1, 2
SMS = (1, 20, 108, 132, 170)


@dataclass(frozen=True)
class Source:
    """One convolution of a plan."""

    H: int
    W: int
    C: int
    R: int = 1
    S: int = 1
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    x: int = 1 << 20
    weight: int = 2 << 20


@dataclass(frozen=True)
class Conv:
    """What a plan is made for; P and Q follow from the first source."""

    sources: tuple[Source, ...]
    N: int
    K: int
    dtype: int = F16
    residual: int = 0
    out: int = 3 << 20

    @property
    def size(self) -> tuple[int, int]:
        s = self.sources[0]
        rows, columns = (
            (image + 2 * pad - dilation * (taps - 1) - 1) // stride + 1
            for image, pad, dilation, taps, stride in zip(
                (s.H, s.W), s.padding, s.dilation, (s.R, s.S), s.stride, strict=True
            )
        )
        return rows, columns


# What the functions say of a convolution; and, of its tile, what TILE_FIELDS names.
PLAN_FIELDS = (
    *("fits", "narrow", "tile", "splits", "valid", "grid", "threads", "shared", "workspace"),
    *("steps0", "steps1", "sum_grid", "sum_threads", "sum_shared", "tiles", "cycles"),
)
Plan = SimpleNamespace
Planner = Callable[..., Plan]
TILE_FIELDS = ("rows", "columns", "down", "across", "stages", "blocks", "sources", "narrow")
TILE_FIELDS += ("threads", "ring", "shared")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("c++") or shutil.which("g++")
    assert compiler is not None, "the package was built with a C++ compiler; it must still be there"
    folder = tmp_path_factory.mktemp("cuda_plan")
    (folder / "plan.cpp").write_text(SOURCE)
    built = folder / "plan.so"
    # Overflow of a signed size is caught as well: the sizes below come close to 64 bits.
    command = [compiler, "-std=c++17", "-shared", "-fPIC", "-ftrapv", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*command, str(folder / "plan.cpp"), "-o", str(built)], check=True)
    loaded = ctypes.CDLL(str(built))
    loaded.range.argtypes = [
        ctypes.c_long,
        ctypes.c_long,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_void_p,
    ]
    return loaded


@pytest.fixture(scope="module")
def tiles(library: ctypes.CDLL) -> list[dict[str, int]]:
    values = (ctypes.c_int * len(TILE_FIELDS))()
    count = library.tile(0, values)
    table = []
    for i in range(count):
        library.tile(i, values)
        table.append(dict(zip(TILE_FIELDS, values, strict=True)))
    return table


@pytest.fixture(scope="module")
def plan(library: ctypes.CDLL, tiles: list[dict[str, int]]) -> Planner:
    def run(
        conv: Conv, sms: int = 132, invariant: bool = False, tile: int = -1, splits: int = 1
    ) -> Plan:
        values = [conv.N, *conv.size, conv.K, conv.dtype, len(conv.sources), conv.residual]
        values += [conv.out, sms, int(invariant), tile, splits]
        for s in conv.sources:
            values += [s.x, s.weight, s.H, s.W, s.C, s.R, s.S, *s.stride, *s.padding, *s.dilation]
        values += [0] * (38 - len(values))
        result = (ctypes.c_int64 * 16)()
        library.plan((ctypes.c_int64 * 38)(*values), result)
        out = Plan(**dict(zip(PLAN_FIELDS, result, strict=True)))
        out.shape = tiles[out.tile] if out.fits else {}
        return out

    return run


def layers(n: int, dtype: int = F16, size: int = 224) -> list[Conv]:
    """The convolutions of ResNet-50 behind the stem, projections as second sources too."""
    out = []
    inner, side = 64, size // 4
    planes = 64
    for stage in range(4):
        stride = (1, 1) if stage == 0 else (2, 2)
        small = side if stage == 0 else side // 2
        wide = 4 * inner
        mid = Source(small, small, inner)
        out.append(Conv((Source(side, side, planes),), n, inner, dtype))
        three = Source(side, side, inner, 3, 3, stride, (1, 1))
        out.append(Conv((three,), n, inner, dtype))
        out.append(Conv((mid, Source(side, side, planes, stride=stride)), n, wide, dtype))
        out.append(Conv((Source(small, small, wide),), n, inner, dtype))
        out.append(Conv((replace(three, H=small, W=small, stride=(1, 1)),), n, inner, dtype))
        out.append(Conv((mid,), n, wide, dtype, residual=4 << 20))
        planes, inner, side = wide, 2 * inner, small
    return out


def random_source(rng: random.Random, wide: bool, sizes: tuple[int, ...]) -> Source:
    taps = rng.choice((1, 1, 3, 3, 5, 7)), rng.choice((1, 1, 3, 3, 5, 7))
    dilation = rng.randint(1, 3), rng.randint(1, 3)
    c = rng.choice((8, 16, 64, 72, 136, 2048)) if wide else rng.choice((1, 3, 5, 17, 33, 100, 513))
    padding = rng.randint(0, 4), rng.randint(0, 4)
    # At least one position of the window in each direction.
    least = [d * (t - 1) + 1 - 2 * p for t, d, p in zip(taps, dilation, padding, strict=True)]
    h, w = (max(1, low, rng.choice(sizes)) for low in least)
    stride = rng.randint(1, 4), rng.randint(1, 4)
    return Source(h, w, c, *taps, stride, padding, dilation)


def test_tiles_fit_every_gpu(tiles: list[dict[str, int]]) -> None:
    """Breaks if a tile asks for more shared memory or registers than any GPU from sm_80 on has."""
    for t in tiles:
        assert t["shared"] == t["ring"] + 8 * t["columns"] * t["sources"] <= 99 * 1024
        assert t["threads"] == 32 * t["down"] * t["across"]
        assert t["stages"] >= 3, "a stage is filled while the one before it may still be read"
        # 65,536 registers, dealt out in eights per thread; two accumulator sets of the warp tile
        # and its operands (24) must leave room for addresses.
        registers = 65536 // (t["blocks"] * t["threads"]) // 8 * 8
        warp = (t["rows"] // t["down"]) * (t["columns"] // t["across"]) // 32
        assert min(registers, 255) >= warp * t["sources"] + 24 + 30
    kinds = {(t["sources"], t["narrow"]) for t in tiles}
    assert kinds == set(itertools.product((1, 2), (0, 1))), "no plan for some convolution"


def test_every_plan_is_valid_and_launches(plan: Planner) -> None:
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


def test_narrow_where_any_row_is_off_16_bytes(plan: Planner) -> None:
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


def test_steps_by_counting(plan: Planner) -> None:
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


def test_splits_share_all_steps(library: ctypes.CDLL) -> None:
    """Breaks if a step is added twice or never, a split is empty, or one does most of the work."""
    out = (ctypes.c_int * 4)()
    for steps0, steps1, splits in itertools.product(
        (1, 2, 4, 9, 18, 36, 72, 147), (0, 1, 4, 8, 64), range(2, 17)
    ):
        if splits > steps0 + steps1 or (steps1 and splits < 2):
            continue
        ranges = []
        for index in range(splits):
            library.range(steps0, steps1, splits, index, out)
            ranges.append(tuple(out[:3]))
        expected = [(0, i) for i in range(steps0)] + [(1, i) for i in range(steps1)]
        assert [(s, i) for s, begin, end in ranges for i in range(begin, end)] == expected
        assert out[3] == sum(source == 0 for source, _, _ in ranges)
        if (steps0 + steps1) >= 4 * splits and min(steps0, steps1 or steps0) >= 4:
            lengths = [end - begin for _, begin, end in ranges]
            assert min(lengths) >= 1
            assert max(lengths) <= 2 * -(-(steps0 + steps1) // splits)


def test_layers_with_64_filters_waste_nothing(plan: Planner) -> None:
    """Breaks if a 64-wide layer runs on 128 columns, half of them empty."""
    for n, dtype in itertools.product((1, 8, 32, 256), (F16, F32)):
        for conv in layers(n, dtype):
            p = plan(conv)
            assert p.shape["columns"] <= conv.K
            if n == 256 and conv.K == 64:
                assert (p.shape["rows"], p.shape["columns"]) == (128, 64)


def test_large_batches_use_large_tiles_and_no_splits(plan: Planner) -> None:
    """Breaks if a full GPU is given small tiles, which read more, or pays for partial sums."""
    for conv in layers(256):
        p = plan(conv)
        assert p.splits == 1
        if conv.K >= 128 and len(conv.sources) == 1 and p.tiles > 8 * 132:
            assert (p.shape["rows"], p.shape["columns"]) == (128, 128)


def test_batch_1_fills_the_gpu(plan: Planner) -> None:
    """Breaks if a long sum over few tiles is left to a few multiprocessors."""
    split = 0
    for conv in layers(1):
        p = plan(conv)
        blocks, steps = p.tiles * p.splits, p.steps0 + p.steps1
        assert blocks >= 66 or steps // p.splits <= 12, conv
        split += p.splits > 1
    assert split >= 4


def test_plan_is_the_fastest_of_its_model(plan: Planner, tiles: list[dict[str, int]]) -> None:
    """Breaks if the search skips a tile or a number of splits that its model finds faster."""
    for n, sms in itertools.product((1, 3, 8, 32, 256), SMS):
        for conv in layers(n):
            chosen = plan(conv, sms)
            steps = chosen.steps0 + chosen.steps1
            for tile, splits in itertools.product(range(len(tiles)), range(1, 17)):
                if steps < 4 * splits and splits > 1:
                    continue
                other = plan(conv, sms, tile=tile, splits=splits)
                if other.valid and not other.shape["narrow"] and (splits == 1 or other.tiles < sms):
                    assert chosen.cycles <= other.cycles


def test_invariant_sums_do_not_follow_the_batch(plan: Planner) -> None:
    """Breaks if, with the invariant setting, an image's sum is split by the batch's size."""
    for n, sms in itertools.product((1, 2, 16, 256), SMS):
        for conv in layers(n):
            assert plan(conv, sms, invariant=True).splits == 1


def test_counts_beyond_32_bits(plan: Planner) -> None:
    """Breaks if a size that 32-bit counters cannot hold is accepted, or a legal one refused."""
    image = Source(112, 112, 64, 3, 3, padding=(1, 1))
    # 822 million pixels, 52.6 billion elements: offsets have 64 bits.
    p = plan(Conv((image,), 65536, 64))
    assert p.fits and p.valid and p.grid == 65536 * 112 * 112 // 128
    assert plan(Conv((replace(image, H=16384, W=16384, C=8),), 4, 8)).fits
    for large in (
        Conv((replace(image, H=1 << 29),), 1, 64),
        Conv((replace(image, H=1 << 16, W=1 << 16),), 1, 64),
        Conv((replace(image, H=1 << 14, W=1 << 14, C=64),), 1, 64),
        Conv((replace(image, C=1 << 29),), 1, 64),
        Conv((replace(image, C=1 << 20),), 1, 1 << 20),
        Conv((replace(image, padding=(1 << 29, 1)),), 1, 64),
        Conv((replace(image, H=1 << 20, dilation=(1 << 28, 1), padding=(1 << 28, 1)),), 1, 64),
        Conv((image,), 1 << 28, 1 << 12),
    ):
        assert not plan(large).fits, large
    # Nothing multiplies float64.
    assert not plan(replace(Conv((Source(8, 8, 8),), 1, 8), dtype=3)).fits
