// SPDX-License-Identifier: BSD-3-Clause
// The producer's two threads: one has operands copied into the ring, the other brings residuals and
// takes outputs away. Neither waits for the other.
#pragma once

#include "wgmma_tile.cuh"

namespace resnet_fused {

// Operands of every tile of the block, step by step: 128 bytes of channels of one filter tap. What
// does not exist (channels, pixels, filters) comes as zero.
template <typename T, int kTile>
__device__ __forceinline__ void load_operands(const WgmmaConvArgs& a,
                                              const WgmmaShared<T, kTile>& shared) {
  using Shared = WgmmaShared<T, kTile>;
  constexpr int kChannels = kStepBytes / static_cast<int>(sizeof(T));
  for (int i = 0; i < a.conv.sources; ++i) {
    ptx::tensor_map_prefetch(&a.image[i]);
    ptx::tensor_map_prefetch(&a.weight[i]);
  }
  RingPlace<Shared::kStages> at;
  for (int item = static_cast<int>(blockIdx.x); item < a.items;
       item += static_cast<int>(gridDim.x)) {
    const Work<kTile> work(a, item);
    const auto across = static_cast<uint32_t>(a.conv.Q);
    const uint32_t image = static_cast<uint32_t>(a.conv.P) * across;
    const auto m0 = static_cast<uint32_t>(work.m0);
    const uint32_t n = m0 / image, y = (m0 - n * image) / across, x = m0 - n * image - y * across;
    for (int i = 0; i < Shared::kShape.sources; ++i) {
      const int source = work.range.source + i;
      const WgmmaSource& s = a.source[source];
      const int begin = i == 0 ? work.range.begin : 0, end = i == 0 ? work.range.end : s.steps;
      const int h = static_cast<int>(y) * s.stride[0] - s.padding[0];
      const int w = static_cast<int>(x) * s.stride[1] - s.padding[1];
      int tap = begin / s.blocks, block = begin - tap * s.blocks;
      int tap_h = tap / s.across, tap_w = tap - tap_h * s.across;
      for (int step = begin; step < end; ++step) {
        ptx::barrier_wait(shared.empty(at.stage), at.parity ^ 1);
        const uint32_t full = shared.full(at.stage);
        ptx::barrier_arrive_expect(full, Shared::kShape.stage_bytes());
        const int c = block * kChannels;
        if (s.plain) {
          ptx::tensor_load_2d(shared.pixels(at.stage), &a.image[source], c, work.m0, full);
        } else {
          ptx::tensor_load_im2col(shared.pixels(at.stage), &a.image[source], c, w, h,
                                  static_cast<int>(n), static_cast<uint16_t>(tap_w * s.dilation[1]),
                                  static_cast<uint16_t>(tap_h * s.dilation[0]), full);
        }
        ptx::tensor_load_3d(shared.filters(at.stage), &a.weight[source], c, tap, work.k0, full);
        at.next();
        if (++block < s.blocks) continue;
        block = 0;
        ++tap;
        if (++tap_w < s.across) continue;
        tap_w = 0;
        ++tap_h;
      }
    }
  }
  if (a.dependent) ptx::grid_launch();
}

// Opens a place to a consumer, for the outputs of a tile: after the residual has come, if any.
template <typename T, int kTile>
__device__ __forceinline__ void open_place(const WgmmaConvArgs& a,
                                           const WgmmaShared<T, kTile>& shared, int place,
                                           int item) {
  using Shared = WgmmaShared<T, kTile>;
  const uint32_t open = shared.open(place);
  if (a.conv.residual == nullptr) {
    ptx::barrier_arrive(open);
    return;
  }
  const Work<kTile> work(a, item);
  ptx::barrier_arrive_expect(open, Shared::kShape.place_bytes(sizeof(T)));
  for (int i = 0; i < Shared::kPanels; ++i) {
    ptx::tensor_load_2d(shared.panel(place, i), &a.residual, work.k0 + i * Shared::kPanelColumns,
                        work.m0, open);
  }
}

// Places of outputs, in turns: each is opened for a tile, and when the consumers are done with it,
// copied to memory and opened for a later tile. Rows and columns that do not exist stay behind.
template <typename T, int kTile>
__device__ __forceinline__ void move_outputs(const WgmmaConvArgs& a,
                                             const WgmmaShared<T, kTile>& shared) {
  using Shared = WgmmaShared<T, kTile>;
  const int stride = static_cast<int>(gridDim.x);
  const int first = static_cast<int>(blockIdx.x);
  for (int i = 0; i < Shared::kPlaces; ++i) {
    if (first < a.items - i * stride) open_place<T, kTile>(a, shared, i, first + i * stride);
  }
  int place = 0;
  uint32_t parity = 0;
  for (int item = first; item < a.items; item += stride) {
    ptx::barrier_wait(shared.done(place), parity);
    const Work<kTile> work(a, item);
    for (int i = 0; i < Shared::kPanels; ++i) {
      const int k = work.k0 + i * Shared::kPanelColumns;
      if (k < a.conv.K) ptx::tensor_store_2d(&a.out, shared.panel(place, i), k, work.m0);
    }
    ptx::tensor_store_commit();
    if (item < a.items - Shared::kPlaces * stride) {
      ptx::tensor_store_wait_read<0>();
      open_place<T, kTile>(a, shared, place, item + Shared::kPlaces * stride);
    }
    if (++place == Shared::kPlaces) {
      place = 0;
      parity ^= 1;
    }
  }
  ptx::tensor_store_wait<0>();
}

}  // namespace resnet_fused
