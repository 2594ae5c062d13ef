# SPDX-License-Identifier: BSD-3-Clause
"""Defects that are seeded into the kernels' sources, each of which the tests must catch.

A defect is an exact piece of source and what stands there instead. If a change of a kernel makes
the piece disappear, test_defects.py fails: write the defect anew for the changed kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

RACE = "race|uninitialised|in-flight"  # by who comes first


@dataclass(frozen=True)
class Defect:
    """One thing wrong.

    Attributes:
        name: what is wrong.
        file: in csrc/kernels/cuda.
        old: the source that is replaced; it occurs once.
        new: what replaces it.
        case: name of the launch in defect_cases.py that must catch it.
        kinds: what the emulator may call it; "numeric" is a wrong result.
        also: further replacements in the same file.
    """

    name: str
    file: str
    old: str
    new: str
    case: str
    kinds: str = "numeric"
    also: tuple[tuple[str, str], ...] = ()


CONV = [
    Defect(
        "no barrier in the ring",
        "mma_conv.cuh",
        "kShape.stages - 2>();\n    __syncthreads();",
        "kShape.stages - 2>();",
        "conv_long",
        RACE,
    ),
    Defect(
        "waits for one group too few",
        "mma_conv.cuh",
        "ptx::copy_wait<kShape.stages - 2>();",
        "ptx::copy_wait<kShape.stages - 1>();",
        "conv_long",
        "in-flight",
    ),
    Defect(
        "groups are not closed",
        "mma_conv.cuh",
        "    if constexpr (!kShape.narrow) ptx::copy_commit();\n",
        "",
        "conv_long",
        "in-flight",
    ),
    Defect(
        "fills the stage that is still read",
        "mma_conv.cuh",
        "return (stage == 0 ? kShape.ring_bytes() : stage) - kShape.stage_bytes();",
        "return stage;",
        "conv_long",
        RACE,
    ),
    Defect(
        "multiplies the stage behind the right one",
        "mma_conv.cuh",
        "  int stage = 0;\n",
        "  int stage = kShape.stage_bytes();\n",
        "conv_long",
        "in-flight|uninitialised|numeric",
    ),
    Defect(
        "no wait for the residual",
        "mma_conv.cuh",
        "  if constexpr (!kShape.narrow) ptx::copy_wait<0>();\n",
        "",
        "conv_residual",
        "in-flight",
    ),
    Defect(
        "no barrier behind the residual",
        "mma_conv.cuh",
        "ptx::copy_wait<0>();\n  __syncthreads();\n  // `stage`",
        "ptx::copy_wait<0>();\n  // `stage`",
        "conv_residual",
        RACE,
    ),
    Defect(
        "no barrier between the tile and its way out",
        "mma_conv.cuh",
        "stage, sums);\n  __syncthreads();",
        "stage, sums);",
        "conv_residual",
        RACE,
    ),
    Defect(
        "second source not begun",
        "mma_conv.cuh",
        "if (kShape.sources == 2 && next == second) copies.start(p, p.source[1], m0, k0, 0);",
        "",
        "conv_two",
        "numeric|out-of-bounds",
    ),
    Defect(
        "a partial sum of the first source forgotten",
        "mma_conv.cuh",
        "const int end = source == 0 ? first_splits : p.plan.splits;",
        "const int end = source == 0 ? first_splits - 1 : p.plan.splits;",
        "conv_split_two",
    ),
    Defect(
        "last split forgotten",
        "mma_conv.cuh",
        "split + i < end ? count : 0",
        "split + i < end - 1 ? count : 0",
        "conv_split",
    ),
    Defect(
        "the kernel that adds partial sums may begin early",
        "conv_plan.h",
        "return {{blocks, 1, 1}, kSplitSumThreads, 2 * 2 * kSplitSumColumns * 4};",
        "return {{blocks, 1, 1}, kSplitSumThreads, 2 * 2 * kSplitSumColumns * 4, false, true};",
        "conv_split",
        "grid-wait",
    ),
    Defect(
        "partial sums added from the last to the first",
        "mma_conv.cuh",
        "p.workspace + (split + i) * step + at",
        "p.workspace + (end - 1 - split - i) * step + at",
        "conv_split_order",
    ),
    Defect(
        "all splits write one partial sum",
        "epilogue.cuh",
        "p.workspace + (split * rows + m) * p.K + first",
        "p.workspace + (0 * split * rows + m) * p.K + first",
        "conv_split",
        "double-write",
    ),
    Defect(
        "no row predicate on partial sums",
        "epilogue.cuh",
        "    if (m >= rows) continue;\n    float* to",
        "    float* to",
        "conv_split",
        "out-of-bounds|double-write",
    ),
    Defect(
        "epilogue one row too many",
        "epilogue.cuh",
        "if (row >= rows) return;",
        "if (row > rows) return;",
        "conv_residual",
        "out-of-bounds",
    ),
    Defect(
        "no column predicate in the epilogue",
        "epilogue.cuh",
        "  if (k >= p.K) return;\n",
        "",
        "conv_residual",
        "out-of-bounds|double-write",
    ),
    Defect(
        "no row predicate on the residual",
        "epilogue.cuh",
        "row < rows && k < p.K ? 16 : 0",
        "k < p.K ? 16 : 0",
        "conv_residual",
        "out-of-bounds",
    ),
    Defect(
        "residual forgotten",
        "epilogue.cuh",
        "if (finish.residual) pair = *at;",
        "",
        "conv_residual",
    ),
    Defect(
        "scale of the next column",
        "epilogue.cuh",
        "affine + source * 2 * kColumns + j * 8;",
        "affine + source * 2 * kColumns + (j ^ 1) * 8;",
        "conv_residual",
    ),
    Defect(
        "ReLU before the residual",
        "finish.cuh",
        "    if (residual) y += to_float(other);\n    if (relu) y = resnet_fused::relu(y);",
        "    if (relu) y = resnet_fused::relu(y);\n    if (residual) y += to_float(other);",
        "conv_residual",
    ),
    Defect(
        "swizzles of writer and reader differ",
        "conv_mainloop.cuh",
        "(chunk() ^ (row() % 8)) * kChunkBytes",
        "(chunk() ^ (row() % 4)) * kChunkBytes",
        "conv_long",
    ),
    Defect(
        "no swizzle: right, but slow",
        "conv_mainloop.cuh",
        "(chunk() ^ (row() % 8)) * kChunkBytes",
        "chunk() * kChunkBytes",
        "conv_long",
        "bank-conflicts",
        also=(
            ("(lane / 16 ^ lane % 8) * kChunkBytes", "lane / 16 * kChunkBytes"),
            ("(lane / 8 % 2 ^ lane % 8) * kChunkBytes", "lane / 8 % 2 * kChunkBytes"),
            ("(row_chunk ^ part)", "(row_chunk + part)"),
            ("(column_chunk ^ part)", "(column_chunk + part)"),
        ),
    ),
    Defect(
        "wrong register of b",
        "conv_mainloop.cuh",
        "mma<T>(sums[i][j], a[i], b[0], b[1]);\n        mma<T>(sums[i][j + 1], a[i], b[2], b[3]);",
        "mma<T>(sums[i][j], a[i], b[0], b[2]);\n        mma<T>(sums[i][j + 1], a[i], b[1], b[3]);",
        "conv_long",
    ),
    Defect(
        "lanes of a's quarters in the wrong order",
        "conv_mainloop.cuh",
        "lane / 16 ^ lane % 8",
        "lane / 8 % 2 ^ lane % 8",
        "conv_long",
    ),
    Defect(
        "padding off by one",
        "conv_mainloop.cuh",
        "h[i] = static_cast<int>(y) * down - above;",
        "h[i] = static_cast<int>(y) * down - above + 1;",
        "conv_3x3",
    ),
    Defect(
        "no border predicate",
        "conv_mainloop.cuh",
        "there && inside ? 16 : 0",
        "there ? 16 : 0",
        "conv_3x3",
        "out-of-bounds|numeric",
    ),
    Defect(
        "no channel-tail predicate on pixels: a NaN of the next pixel gets in",
        "conv_mainloop.cuh",
        "there && inside ? 16 : 0",
        "inside ? 16 : 0",
        "conv_3x3",
        "out-of-bounds|numeric",
    ),
    Defect(
        "no channel-tail predicate on filters",
        "conv_mainloop.cuh",
        "there && i * Shape::kRowsAtOnce < filters ? 16 : 0",
        "i * Shape::kRowsAtOnce < filters ? 16 : 0",
        "conv_3x3",
        "out-of-bounds|numeric",
    ),
    Defect(
        "no predicate on filters",
        "conv_mainloop.cuh",
        "there && i * Shape::kRowsAtOnce < filters ? 16 : 0",
        "there ? 16 : 0",
        "conv_3x3",
        "out-of-bounds",
    ),
    Defect(
        "rows behind the last pixel are read",
        "conv_mainloop.cuh",
        "if (m0 + row + i * kRowsAtOnce < rows) {",
        "if (m0 + row + i * kRowsAtOnce <= rows) {",
        "conv_long",
        "out-of-bounds",
    ),
    Defect(
        "dilation forgotten",
        "conv_mainloop.cuh",
        "tap_h += dilation_h;",
        "tap_h += 1;",
        "conv_dilated",
        "numeric|out-of-bounds",
    ),
    Defect(
        "a filter row too far",
        "conv_mainloop.cuh",
        "row_end = taps * dilation_w;",
        "row_end = (taps + 1) * dilation_w;",
        "conv_3x3",
        "numeric|out-of-bounds",
    ),
    Defect(
        "narrow: no channel predicate",
        "conv_mainloop.cuh",
        "r < rows && c < static_cast<uint32_t>(channels);",
        "c < static_cast<uint32_t>(channels);",
        "conv_narrow",
        "out-of-bounds|numeric",
    ),
    Defect(
        "shared memory without the scales",
        "conv_plan.h",
        "return ring_bytes() + sources * columns * 8;",
        "return ring_bytes();",
        "conv_long",
        "out-of-bounds",
    ),
]
