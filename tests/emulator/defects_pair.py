# SPDX-License-Identifier: BSD-3-Clause
"""Defects that are seeded into the kernel that runs two convolutions as one; see defects.py."""

from __future__ import annotations

from defects import Defect

PAIR = [
    # ------------------------------------------------------------------------ the tile between
    Defect(
        "the tile between is not made visible to wgmma",
        "wgmma_pair.cuh",
        "    ptx::fence_async_shared();\n    ptx::barrier_sync(1 + self.consumer, kWarpgroup);\n",
        "    ptx::barrier_sync(1 + self.consumer, kWarpgroup);\n",
        "pair_turns",
        "proxy",
    ),
    Defect(
        "multiplies before all warps have written the tile between",
        "wgmma_pair.cuh",
        "    ptx::fence_async_shared();\n    ptx::barrier_sync(1 + self.consumer, kWarpgroup);\n",
        "    ptx::fence_async_shared();\n",
        "pair_turns",
        "race|uninitialised",
    ),
    Defect(
        "the tile between is overwritten while the other consumer multiplies it",
        "wgmma_pair_tile.cuh",
        "return begin + kMiddle + consumer * kShape.middle_bytes();",
        "return begin + kMiddle;",
        "pair_turns",
        "race|in-flight|uninitialised",
    ),
    Defect(
        "the second step over the tile between begins where the first one does",
        "wgmma_pair_tile.cuh",
        "consumer * kShape.middle_bytes() + block * kShape.rows * kStepBytes;",
        "consumer * kShape.middle_bytes();",
        "pair_wide",
    ),
    # ------------------------------------------------------------------------ the epilogues
    Defect(
        "the first BatchNorm omitted",
        "wgmma_pair.cuh",
        "make(a.pair.first.source[0].bn,",
        "make(BatchNorm{},",
        "pair_turns",
    ),
    Defect(
        "the first BatchNorm again behind the second convolution",
        "wgmma_pair.cuh",
        "make(a.pair.last.source[i].bn,",
        "make(a.pair.first.source[0].bn,",
        "pair_part",
    ),
    Defect(
        "no ReLU between",
        "wgmma_pair.cuh",
        "Finish{false, a.pair.first.relu}",
        "Finish{false, false}",
        "pair_turns",
    ),
    Defect(
        "scales of the first part for all",
        "wgmma_pair.cuh",
        "shared.last_affine() + part * kShape.columns,",
        "shared.last_affine(),",
        "pair_turns",
    ),
    # ------------------------------------------------------------------------ the ring and turns
    Defect(
        "filters of the wrong stage",
        "wgmma_pair.cuh",
        "ptx::wgmma_descriptor(shared.part_filters(at.stage, block))",
        "ptx::wgmma_descriptor(shared.part_filters((at.stage + 1) % Shared::kStages, block))",
        "pair_turns",
        "in-flight|uninitialised|numeric",
    ),
    Defect(
        "does not wait for the second convolution's filters",
        "wgmma_pair.cuh",
        "      ptx::barrier_wait(shared.full(at.stage), at.parity);\n",
        "",
        "pair_turns",
        "in-flight|uninitialised",
    ),
    Defect(
        "consumers of two convolutions do not take turns",
        "wgmma_pair.cuh",
        "    ptx::barrier_wait(shared.turn(self.consumer),"
        " self.consumer == 0 ? parity ^ 1 : parity);\n",
        "",
        "pair_turns",
        "in-flight|deadlock|over-arrival|uninitialised|numeric|race",
    ),
    Defect(
        "the other consumer's stages are not skipped",
        "wgmma_pair.cuh",
        "    if (self.consumer == 0) at.skip(others);\n",
        "",
        "pair_turns",
        "deadlock|in-flight|over-arrival",
    ),
    Defect(
        "operands come in the order of the convolutions, not of the consumers",
        "wgmma_pair.cuh",
        "        if (round % 2 != 0) second(round - 1, turn);\n",
        "",
        "pair_turns",
        "numeric|in-flight|uninitialised|deadlock",
        also=(("if (round % 2 == 0) second(round - 1, turn);", "second(round - 1, turn);"),),
    ),
    Defect(
        "the last round is not waited out",
        "wgmma_pair.cuh",
        "    if (work.tiles % kConsumers == self.consumer) idle_round(work.tiles);\n",
        "",
        "pair_turns",
        "deadlock",
    ),
    # ------------------------------------------------------------------------ the outputs
    Defect(
        "the residual's barrier in the wrong phase",
        "wgmma_pair.cuh",
        "ptx::barrier_wait(shared.open(place.stage), place.parity);",
        "ptx::barrier_wait(shared.open(place.stage), place.parity ^ 1);",
        "pair_turns",
        "in-flight|deadlock|uninitialised",
    ),
    Defect(
        "the other consumer's places are not skipped",
        "wgmma_pair.cuh",
        "      place.skip(work.parts);  // the other one's, of tile i + 1\n",
        "",
        "pair_turns",
        "in-flight|deadlock|over-arrival|race|numeric",
    ),
    Defect(
        "the projection of the tile before",
        "wgmma_pair.cuh",
        "const FirstPixel pixel(a.pair.last, work.tile(i) * kShape.rows);",
        "const FirstPixel pixel(a.pair.last, work.tile(0) * kShape.rows);",
        "pair_two",
    ),
    Defect(
        "does not wait for the kernel before (two convolutions)",
        "wgmma_pair.cuh",
        "    ptx::grid_wait();\n",
        "",
        "pair_dependent",
        "grid-wait",
    ),
]
