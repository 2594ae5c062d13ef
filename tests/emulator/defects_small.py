# SPDX-License-Identifier: BSD-3-Clause
"""Seeded defects of the kernels beside the convolution; see defects.py."""

from __future__ import annotations

from defects import RACE, Defect

STEM = [
    Defect(
        "stem: no barrier behind the first tile's place",
        "stem.cu",
        "  __syncthreads();\n  load_patch(p, places[0], pixels);",
        "  load_patch(p, places[0], pixels);",
        "stem",
        RACE,
    ),
    Defect(
        "stem: no barrier before the first product",
        "stem.cu",
        "pixels);\n  __syncthreads();\n  int place = 0;",
        "pixels);\n  int place = 0;",
        "stem",
        RACE,
    ),
    Defect(
        "stem: no barrier behind the tile",
        "stem.cu",
        "    __syncthreads();  // the tile is complete, the patch has been read\n",
        "",
        "stem",
        RACE,
    ),
    Defect(
        "stem: no barrier behind the next patch",
        "stem.cu",
        "    __syncthreads();  // the patch is complete, the tile has been read\n",
        "",
        "stem",
        RACE,
    ),
    Defect(
        "stem: the eighth tap's weight of zero does not hide a NaN",
        "stem.cu",
        "const bool beyond = lane % 4 >= kFirstBeyond;",
        "const bool beyond = false && lane % 4 >= kFirstBeyond;",
        "stem_nan",
    ),
    Defect(
        "stem: one row beyond the image",
        "stem.cu",
        "static_cast<uint32_t>(h + i * kRowsAtOnce) < height;",
        "static_cast<uint32_t>(h + i * kRowsAtOnce) <= height;",
        "stem",
        "out-of-bounds|numeric",
    ),
    Defect(
        "stem: no row predicate on the output",
        "stem.cu",
        "    if (h < height) {\n",
        "    {\n",
        "stem",
        "out-of-bounds|double-write",
    ),
    Defect(
        "stem: wrong register of b",
        "stem.cu",
        "mma<T>(sums[i][2 * j], a[i], b[0], b[1]);",
        "mma<T>(sums[i][2 * j], a[i], b[0], b[2]);",
        "stem",
    ),
    Defect(
        "stem: what is padded is normalised, too",
        "stem_bytes.cuh",
        "pixel.v[c] = inside ? from_float<T>(v) : T{};",
        "pixel.v[c] = from_float<T>(v);",
        "stem_bytes",
    ),
    Defect(
        "stem: bytes normalised with another channel's scale",
        "stem_bytes.cuh",
        "__fmul_rn(bytes.v[c], norm[c])",
        "__fmul_rn(bytes.v[c], norm[c / 2])",
        "stem_bytes",
    ),
    Defect(
        "stem: one byte too many, which a scale of 0 hides",
        "stem.cu",
        "inside && c < p.C ? *from",
        "inside && c <= p.C ? *from",
        "stem_bytes",
        "out-of-bounds",
    ),
    Defect(
        "stem: borders of the tile before",
        "stem.cu",
        "store_patch<T>(p, places[1 - place], shared, pixels);",
        "store_patch<T>(p, places[place], shared, pixels);",
        "stem_bytes",
    ),
    Defect(
        "stem: shifts of bytes not read where there is one channel less than four",
        "stem_bytes.cuh",
        "p.norm[row * p.C + c]",
        "p.norm[row * kChannels + c]",
        "stem_bytes",
        "out-of-bounds|numeric",
    ),
    Defect(
        "stem: product and sum rounded as one",
        "stem_bytes.cuh",
        "__fadd_rn(__fmul_rn(bytes.v[c], norm[c]), norm[kChannels + c])",
        "__fmaf_rn(bytes.v[c], norm[c], norm[kChannels + c])",
        "stem_bytes_rounded",
    ),
    Defect(
        "stem: rows of the patch without their pad: right, but slow",
        "stem.cu",
        "kFilterSize * kTaps * sizeof(Pixel<T>) + 16;",
        "kFilterSize * kTaps * sizeof(Pixel<T>);",
        "stem",
        "bank-conflicts",
        also=(
            (
                '  static_assert(kFilter / 16 % 2 == 1, "filters are in different banks");\n',
                "",
            ),
        ),
    ),
]

POOL_LINEAR = [
    Defect(
        "pool_linear: no barrier in the mean",
        "pool_linear.cu",
        "  __syncthreads();\n  if (threadIdx.x < kChannels",
        "  if (threadIdx.x < kChannels",
        "pool_linear",
        RACE,
    ),
    Defect(
        "pool_linear: a group of pixels forgotten",
        "pool_linear.cu",
        "g < kPoolGroups; ++g) total",
        "g < kPoolGroups - 1; ++g) total",
        "pool_linear",
    ),
    Defect(
        "pool_linear: one channel too many",
        "pool_linear.cu",
        "threadIdx.x < kChannels && first + threadIdx.x < C",
        "threadIdx.x < kChannels && first + threadIdx.x <= C",
        "pool_linear",
        "out-of-bounds|double-write",
    ),
    Defect(
        "pool_linear: half of the lanes are not added",
        "pool_linear.cu",
        "int apart = 16; apart > 0;",
        "int apart = 8; apart > 0;",
        "pool_linear",
        "numeric|undefined",
    ),
    Defect(
        "pool_linear: no predicate on outputs",
        "pool_linear.cu",
        "n < images && k < outputs)",
        "n < images)",
        "pool_linear",
        "out-of-bounds|double-write",
    ),
    Defect(
        "pool_linear: weights of outputs that do not exist are read",
        "pool_linear.cu",
        "k < outputs ? p.C - c : 0",
        "p.C - c",
        "pool_linear",
        "out-of-bounds",
    ),
]

ELEMENTWISE = [
    Defect(
        "relu_max_pool: a column beyond the image",
        "relu_max_pool.cu",
        "2 * q + 1 < W ? 2 * q + 1",
        "2 * q + 1 <= W ? 2 * q + 1",
        "relu_max_pool",
        "out-of-bounds|numeric",
    ),
    Defect(
        "relu_max_pool: a row before the image",
        "relu_max_pool.cu",
        "{p > 0 ? 2 * p - 1 : 0,",
        "{2 * p - 1,",
        "relu_max_pool",
        "out-of-bounds",
    ),
    Defect(
        "relu_max_pool: NaN lost",
        "relu_max_pool.cu",
        "if (v > top[e] || v != v)",
        "if (v > top[e])",
        "relu_max_pool",
    ),
    Defect(
        "add_relu: one element too many in the tail",
        "add_relu.cu",
        "threadIdx.x < n % kSize",
        "threadIdx.x <= n % kSize",
        "add_relu",
        "out-of-bounds",
    ),
    Defect(
        "add_relu: one vector too many",
        "add_relu.cu",
        "    if (at < vectors) {\n      a[i] =",
        "    if (at <= vectors) {\n      a[i] =",
        "add_relu",
        "out-of-bounds",
    ),
    Defect(
        "add_relu: vectors on 8 bytes",
        "add_relu.cu",
        "const bool aligned = bits % 16 == 0;",
        "const bool aligned = bits % 8 == 0;",
        "add_relu_on_8_bytes",
        "misaligned",
    ),
    Defect(
        "relu turns NaN into 0",
        "numeric.cuh",
        "return v < 0.0f ? 0.0f : v;",
        "return v > 0.0f ? v : 0.0f;",
        "add_relu",
    ),
]

SMALL = [*STEM, *POOL_LINEAR, *ELEMENTWISE]
