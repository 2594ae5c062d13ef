# SPDX-License-Identifier: BSD-3-Clause
"""The choice of a CUDA convolution's kernel, csrc/kernels/cuda/conv_plan.h, called from Python."""

from __future__ import annotations

import ctypes
import functools
import random
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
# v: N P Q K dtype sources residual out sms invariant tile splits, then for each source x weight H
# W C R S stride padding dilation.
PARAMS = r"""
using namespace resnet_fused;
static MmaConvParams params(const int64_t* v) {
  MmaConvParams p{};
  p.N = v[0], p.P = v[1], p.Q = v[2], p.K = v[3];
  p.dtype = static_cast<DType>(v[4]);
  p.sources = static_cast<int>(v[5]);
  p.residual = reinterpret_cast<const void*>(v[6]);
  p.out = reinterpret_cast<void*>(v[7]);
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
  return p;
}
"""
SOURCE = f'#include "kernels/cuda/conv_plan.h"\n{PARAMS}'
SOURCE += r"""
// v as in params; tile -1: choose. r: fits narrow tile splits valid grid threads
// shared workspace steps0 steps1 sum-grid sum-threads sum-shared tiles cycles.
extern "C" void plan(const int64_t* v, int64_t* r) {
  MmaConvParams p = params(v);
  p.workspace = reinterpret_cast<float*>(256);
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
SMS = (1, 20, 108, 132, 170)  # multiprocessors


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
TILE_FIELDS = ("rows", "columns", "down", "across", "stages", "blocks", "sources", "narrow")
TILE_FIELDS += ("threads", "ring", "shared")


@functools.cache
def library() -> ctypes.CDLL:
    """The functions, compiled once per session."""
    compiler = shutil.which("c++") or shutil.which("g++")
    assert compiler is not None, "the package was built with a C++ compiler; it must still be there"
    # Overflow of a signed size is caught as well: some sizes come close to 64 bits.
    flags = ["-std=c++17", "-shared", "-fPIC", "-ftrapv", f"-I{ROOT / 'csrc'}"]
    with tempfile.TemporaryDirectory() as folder:
        source, built = Path(folder, "plan.cpp"), Path(folder, "plan.so")
        source.write_text(SOURCE)
        subprocess.run([compiler, *flags, str(source), "-o", str(built)], check=True)
        loaded = ctypes.CDLL(str(built))
    loaded.range.argtypes = [*[ctypes.c_long] * 2, *[ctypes.c_int] * 2, ctypes.c_void_p]
    return loaded


@functools.cache
def tiles() -> list[dict[str, int]]:
    """kMmaTiles."""
    values = (ctypes.c_int * len(TILE_FIELDS))()
    table = []
    for i in range(library().tile(0, values)):
        library().tile(i, values)
        table.append(dict(zip(TILE_FIELDS, values, strict=True)))
    return table


def split_range(steps0: int, steps1: int, splits: int, index: int) -> tuple[int, int, int, int]:
    """Source, first step and end of a split; and how many splits the first source has."""
    out = (ctypes.c_int * 4)()
    library().range(steps0, steps1, splits, index, out)
    source, begin, end, first = out
    return source, begin, end, first


def plan(
    conv: Conv, sms: int = 132, invariant: bool = False, tile: int = -1, splits: int = 1
) -> Plan:
    """What is said of a convolution on so many multiprocessors; a tile of -1 is to be chosen."""
    values = [conv.N, *conv.size, conv.K, conv.dtype, len(conv.sources), conv.residual]
    values += [conv.out, sms, int(invariant), tile, splits]
    for s in conv.sources:
        values += [s.x, s.weight, s.H, s.W, s.C, s.R, s.S, *s.stride, *s.padding, *s.dilation]
    values += [0] * (38 - len(values))
    result = (ctypes.c_int64 * 16)()
    library().plan((ctypes.c_int64 * 38)(*values), result)
    out = Plan(**dict(zip(PLAN_FIELDS, result, strict=True)))
    out.shape = tiles()[out.tile] if out.fits else {}
    return out


def layers(
    n: int, dtype: int = F16, size: int = 224, width: int = 64, grouped: bool = False
) -> list[Conv]:
    """The convolutions of ResNet-50 behind the stem, projections as second sources too.

    ``width``: of the first stage's inner tensors, 128 in wide networks. ``grouped``: without the
    3x3 convolutions, as in ResNeXt, where they are.
    """
    out = []
    inner, side = width, size // 4
    planes, wide = 64, 256
    for stage in range(4):
        stride = (1, 1) if stage == 0 else (2, 2)
        small = side if stage == 0 else side // 2
        mid = Source(small, small, inner)
        out.append(Conv((Source(side, side, planes),), n, inner, dtype))
        three = Source(side, side, inner, 3, 3, stride, (1, 1))
        if not grouped:
            out.append(Conv((three,), n, inner, dtype))
        out.append(Conv((mid, Source(side, side, planes, stride=stride)), n, wide, dtype))
        out.append(Conv((Source(small, small, wide),), n, inner, dtype))
        if not grouped:
            out.append(Conv((replace(three, H=small, W=small, stride=(1, 1)),), n, inner, dtype))
        out.append(Conv((mid,), n, wide, dtype, residual=4 << 20))
        planes, inner, side, wide = wide, 2 * inner, small, 2 * wide
    return out


def basic_layers(n: int, dtype: int = F16) -> list[Conv]:
    """Those of ResNet-18 and -34."""
    out = []
    planes, inner, side = 64, 64, 56
    for stage in range(4):
        stride = (1, 1) if stage == 0 else (2, 2)
        small = side if stage == 0 else side // 2
        three = Source(small, small, inner, 3, 3, padding=(1, 1))
        first = Source(side, side, planes, 3, 3, stride, (1, 1))
        out.append(Conv((first,), n, inner, dtype))
        if stage > 0:
            out.append(Conv((three, Source(side, side, planes, stride=stride)), n, inner, dtype))
        out.append(Conv((three,), n, inner, dtype))
        out.append(Conv((three,), n, inner, dtype, residual=4 << 20))
        planes, inner, side = inner, 2 * inner, small
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
