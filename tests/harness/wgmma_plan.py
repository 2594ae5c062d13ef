# SPDX-License-Identifier: BSD-3-Clause
"""The choice of a Hopper convolution's kernel, csrc/kernels/cuda/wgmma_plan.h, from Python."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

from harness.conv_plan import Conv

ROOT = Path(__file__).resolve().parents[2]
SOURCE = r"""
#include "kernels/cuda/wgmma_plan.h"
using namespace resnet_fused;
// v as in conv_plan.py. r: fits tile splits valid grid threads shared items steps0 steps1 cycles.
extern "C" void plan(const int64_t* v, int64_t* r) {
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
  r[10] = wgmma_plan_cycles(p, sms);
}
extern "C" int tile(int i, int size, int* r) {
  const WgmmaTile& t = kWgmmaTiles[i];
  const int all[] = {t.rows, t.columns, t.sources, t.together, t.sums(), t.exists(size),
                     t.stages(size), t.shared_bytes(size), t.panel_bytes(size),
                     t.places() * t.place_bytes(size)};
  for (int j = 0; j < 10; ++j) r[j] = all[j];
  return kWgmmaTileCount;
}
"""
PLAN_FIELDS = ("fits", "tile", "splits", "valid", "grid", "threads", "shared", "items")
PLAN_FIELDS += ("steps0", "steps1", "cycles")
TILE_FIELDS = ("rows", "columns", "sources", "together", "sums", "exists", "stages", "shared")
TILE_FIELDS += ("panel", "outputs")
Plan = SimpleNamespace


@functools.cache
def library() -> ctypes.CDLL:
    """The functions, compiled once per session."""
    compiler = shutil.which("c++") or shutil.which("g++")
    assert compiler is not None, "the package was built with a C++ compiler; it must still be there"
    flags = ["-std=c++17", "-shared", "-fPIC", "-ftrapv", f"-I{ROOT / 'csrc'}"]
    with tempfile.TemporaryDirectory() as folder:
        source, built = Path(folder, "plan.cpp"), Path(folder, "plan.so")
        source.write_text(SOURCE)
        subprocess.run([compiler, *flags, str(source), "-o", str(built)], check=True)
        return ctypes.CDLL(str(built))


@functools.cache
def tiles(size: int = 2) -> list[SimpleNamespace]:
    """kWgmmaTiles for elements of ``size`` bytes."""
    values = (ctypes.c_int * len(TILE_FIELDS))()
    table = []
    for i in range(library().tile(0, size, values)):
        library().tile(i, size, values)
        table.append(SimpleNamespace(**dict(zip(TILE_FIELDS, values, strict=True))))
    return table


def plan(
    conv: Conv, sms: int = 132, invariant: bool = False, tile: int = -1, splits: int = 1
) -> Plan:
    """What is said of a convolution on so many multiprocessors; a tile of -1 is to be chosen."""
    values = [conv.N, *conv.size, conv.K, conv.dtype, len(conv.sources), conv.residual]
    values += [conv.out, sms, int(invariant), tile, splits]
    for s in conv.sources:
        values += [s.x, s.weight, s.H, s.W, s.C, s.R, s.S, *s.stride, *s.padding, *s.dilation]
    values += [0] * (38 - len(values))
    result = (ctypes.c_int64 * len(PLAN_FIELDS))()
    library().plan((ctypes.c_int64 * 38)(*values), result)
    out = Plan(**dict(zip(PLAN_FIELDS, result, strict=True)))
    size = 4 if conv.dtype == 0 else 2
    out.shape = tiles(size)[out.tile] if out.fits and out.tile >= 0 else None
    return out
