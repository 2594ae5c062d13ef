# SPDX-License-Identifier: BSD-3-Clause
"""The choice of a Hopper convolution's kernel, csrc/kernels/cuda/wgmma_plan.h, from Python."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from harness.conv_plan import PARAMS, Conv

ROOT = Path(__file__).resolve().parents[2]
SOURCE = f'#include "kernels/cuda/wgmma_pair_plan.h"\n{PARAMS}'
SOURCE += r"""
// v as in conv_plan.py. r: fits tile splits valid grid threads shared items steps0 steps1 cycles.
extern "C" void plan(const int64_t* v, int64_t* r) {
  MmaConvParams p = params(v);
  for (int i = 0; i < 11; ++i) r[i] = -1;
  const int sms = static_cast<int>(v[8]);
  r[0] = wgmma_conv_fits(p);
  if (!r[0]) return;
  p.plan = {static_cast<int>(v[10]), static_cast<int>(v[11])};
  if (v[10] < 0) p.plan = plan_wgmma_conv(p, sms, v[9] != 0);
  r[1] = p.plan.tile, r[2] = p.plan.splits, r[3] = wgmma_plan_fits(p);
  const LaunchShape conv = wgmma_conv_shape(p, sms, false);
  if (output_rows(p) * p.K > 0 && !fits_every_gpu(conv)) return;
  r[4] = conv.grid[0], r[5] = conv.threads, r[6] = conv.shared_bytes;
  r[7] = wgmma_items(p, kWgmmaTiles[p.plan.tile]);
  r[8] = source_steps(p.source[0], p.dtype);
  r[9] = p.sources == 2 ? source_steps(p.source[1], p.dtype) : 0;
  r[10] = wgmma_plan_cycles(p, kWgmmaTiles[p.plan.tile], sms);
}
// The cycles of the fastest plan if there were tiles of 64 rows and 160 or 224 columns as well.
extern "C" int64_t with_narrow_tiles(const int64_t* v) {
  MmaConvParams p = params(v);
  const int sms = static_cast<int>(v[8]);
  WgmmaTile tiles[kWgmmaTileCount + 2] = {};
  for (int i = 0; i < kWgmmaTileCount; ++i) tiles[i] = kWgmmaTiles[i];
  tiles[kWgmmaTileCount] = {64, 160, 1, false};
  tiles[kWgmmaTileCount + 1] = {64, 224, 1, false};
  p.plan = plan_wgmma_conv(p, sms, v[9] != 0, tiles, kWgmmaTileCount + 2);
  return wgmma_plan_cycles(p, tiles[p.plan.tile], sms);
}
extern "C" int tile(int i, int size, int* r) {
  const WgmmaTile& t = kWgmmaTiles[i];
  const int all[] = {t.rows, t.columns, t.sources, t.together, t.sums(), t.exists(size),
                     t.stages(size), t.shared_bytes(size), t.panel_bytes(size),
                     t.places() * t.place_bytes(size)};
  for (int j = 0; j < 10; ++j) r[j] = all[j];
  return kWgmmaTileCount;
}
extern "C" int pair_tile(int i, int* r) {
  const WgmmaPairTile& t = kWgmmaPairTiles[i];
  const int all[] = {t.rows, t.middle, t.columns, t.sources, t.places, t.sums(), t.stages(),
                     t.stage_bytes(), t.shared_bytes()};
  for (int j = 0; j < 9; ++j) r[j] = all[j];
  return kWgmmaPairTileCount;
}
// Both convolutions as for plan, the second one's first x and the first one's out being null.
// r: chosen fits tiles parts grid threads shared cycles layerwise.
extern "C" void pair(const int64_t* v, const int64_t* w, int64_t tile, int64_t* r) {
  const MmaConvParams first = params(v), last = params(w);
  const int sms = static_cast<int>(v[8]);
  for (int i = 0; i < 9; ++i) r[i] = -1;
  r[0] = plan_wgmma_pair(first, last, sms, v[9] != 0);
  const WgmmaPairParams p{first, last, static_cast<int>(tile < 0 ? r[0] : tile)};
  r[1] = wgmma_pair_fits(p);
  if (!r[1]) return;
  const WgmmaPairTile& t = kWgmmaPairTiles[p.tile];
  const LaunchShape shape = wgmma_pair_shape(last, t, sms, false);
  r[2] = wgmma_pair_tiles(last, t), r[3] = wgmma_pair_parts(last, t);
  if (output_rows(last) > 0 && !fits_every_gpu(shape)) return;
  r[4] = shape.grid[0], r[5] = shape.threads, r[6] = shape.shared_bytes;
  const PairTimes times = wgmma_pair_times(first, last, t, sms, v[9] != 0);
  r[7] = times.together, r[8] = times.layerwise;
}
"""
PLAN_FIELDS = ("fits", "tile", "splits", "valid", "grid", "threads", "shared", "items")
PLAN_FIELDS += ("steps0", "steps1", "cycles")
TILE_FIELDS = ("rows", "columns", "sources", "together", "sums", "exists", "stages", "shared")
TILE_FIELDS += ("panel", "outputs")
PAIR_TILE_FIELDS = ("rows", "middle", "columns", "sources", "places", "sums", "stages")
PAIR_TILE_FIELDS += ("stage", "shared")
PAIR_FIELDS = ("chosen", "fits", "tiles", "parts", "grid", "threads", "shared", "together")
PAIR_FIELDS += ("layerwise",)
Plan = SimpleNamespace


@functools.cache
def library() -> ctypes.CDLL:
    """The functions, compiled once per session."""
    compiler = shutil.which("c++") or shutil.which("g++")
    assert compiler is not None, "the package was built with a C++ compiler; it must still be there"
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-ftrapv", f"-I{ROOT / 'csrc'}"]
    with tempfile.TemporaryDirectory() as folder:
        source, built = Path(folder, "plan.cpp"), Path(folder, "plan.so")
        source.write_text(SOURCE)
        subprocess.run([compiler, *flags, str(source), "-o", str(built)], check=True)
        loaded = ctypes.CDLL(str(built))
    loaded.with_narrow_tiles.restype = ctypes.c_int64
    return loaded


@functools.cache
def tiles(size: int = 2) -> list[SimpleNamespace]:
    """kWgmmaTiles for elements of ``size`` bytes."""
    values = (ctypes.c_int * len(TILE_FIELDS))()
    table = []
    for i in range(library().tile(0, size, values)):
        library().tile(i, size, values)
        table.append(SimpleNamespace(**dict(zip(TILE_FIELDS, values, strict=True))))
    return table


@functools.cache
def pair_tiles() -> list[SimpleNamespace]:
    """kWgmmaPairTiles."""
    values = (ctypes.c_int * len(PAIR_TILE_FIELDS))()
    table = []
    for i in range(library().pair_tile(0, values)):
        library().pair_tile(i, values)
        table.append(SimpleNamespace(**dict(zip(PAIR_TILE_FIELDS, values, strict=True))))
    return table


def _arguments(conv: Conv, sms: int, invariant: bool, tile: int, splits: int) -> ctypes.Array[Any]:
    values = [conv.N, *conv.size, conv.K, conv.dtype, len(conv.sources), conv.residual]
    values += [conv.out, sms, int(invariant), tile, splits]
    for s in conv.sources:
        values += [s.x, s.weight, s.H, s.W, s.C, s.R, s.S, *s.stride, *s.padding, *s.dilation]
    return (ctypes.c_int64 * 38)(*values, *[0] * (38 - len(values)))


def pair(
    first: Conv, last: Conv, sms: int = 132, invariant: bool = False, tile: int = -1
) -> SimpleNamespace:
    """What is said of two convolutions as one kernel, on a tile or on the one that is chosen.

    ``chosen`` is -1 if two kernels are faster; times are in cycles.
    """
    first = replace(first, out=0)
    last = replace(last, sources=(replace(last.sources[0], x=0), *last.sources[1:]))
    result = (ctypes.c_int64 * len(PAIR_FIELDS))()
    arguments = [_arguments(conv, sms, invariant, -1, 1) for conv in (first, last)]
    library().pair(*arguments, ctypes.c_int64(tile), result)
    return SimpleNamespace(**dict(zip(PAIR_FIELDS, result, strict=True)))


def cycles_with_narrow_tiles(conv: Conv, sms: int = 132) -> int:
    """The time of the fastest plan if there were 64 x 160 and 64 x 224 tiles, too."""
    cycles: int = library().with_narrow_tiles(_arguments(conv, sms, False, -1, 1))
    return cycles


def plan(
    conv: Conv, sms: int = 132, invariant: bool = False, tile: int = -1, splits: int = 1
) -> Plan:
    """What is said of a convolution on so many multiprocessors; a tile of -1 is to be chosen."""
    result = (ctypes.c_int64 * len(PLAN_FIELDS))()
    library().plan(_arguments(conv, sms, invariant, tile, splits), result)
    out = Plan(**dict(zip(PLAN_FIELDS, result, strict=True)))
    size = 4 if conv.dtype == 0 else 2
    out.shape = tiles(size)[out.tile] if out.fits and out.tile >= 0 else None
    return out
