// SPDX-License-Identifier: BSD-3-Clause
// The producer's two threads: one has operands copied into the ring, the other brings residuals and
// takes outputs away. Neither waits for the other.
#pragma once

#include "wgmma_tile.cuh"

namespace resnet_fused {

// The output that a tile begins with.
struct FirstPixel {
  int m0, n, y, x;

  __device__ __forceinline__ FirstPixel(const MmaConvParams& p, int first) : m0(first) {
    const auto across = static_cast<uint32_t>(p.Q);
    const uint32_t image = static_cast<uint32_t>(p.P) * across;
    const auto m = static_cast<uint32_t>(first);
    const uint32_t at = m / image, in_image = m - at * image, line = in_image / across;
    n = static_cast<int>(at);
    y = static_cast<int>(line);
    x = static_cast<int>(in_image - line * across);
  }
};

// Operands of a source's steps for one tile and the filters from k0 on: `bytes` for each step,
// which is 128 bytes of channels of one filter tap. What does not exist (channels, pixels, filters)
// comes as zero.
template <typename T, typename Shared>
__device__ __forceinline__ void load_steps(const WgmmaSource& s, const TensorMap* image,
                                           const TensorMap* weight, const FirstPixel& pixel, int k0,
                                           int begin, int end, uint32_t bytes, const Shared& shared,
                                           RingPlace<Shared::kStages>& at) {
  constexpr int kChannels = kStepBytes / static_cast<int>(sizeof(T));
  const int h = pixel.y * s.stride[0] - s.padding[0];
  const int w = pixel.x * s.stride[1] - s.padding[1];
  int tap = begin / s.blocks, block = begin - tap * s.blocks;
  int tap_h = tap / s.across, tap_w = tap - tap_h * s.across;
  for (int step = begin; step < end; ++step) {
    ptx::barrier_wait(shared.empty(at.stage), at.parity ^ 1);
    const uint32_t full = shared.full(at.stage);
    ptx::barrier_arrive_expect(full, bytes);
    const int c = block * kChannels;
    if (s.plain) {
      ptx::tensor_load_2d(shared.pixels(at.stage), image, c, pixel.m0, full);
    } else {
      ptx::tensor_load_im2col(shared.pixels(at.stage), image, c, w, h, pixel.n,
                              static_cast<uint16_t>(tap_w * s.dilation[1]),
                              static_cast<uint16_t>(tap_h * s.dilation[0]), full);
    }
    ptx::tensor_load_3d(shared.filters(at.stage), weight, c, tap, k0, full);
    at.next();
    if (++block < s.blocks) continue;
    block = 0;
    ++tap;
    if (++tap_w < s.across) continue;
    tap_w = 0;
    ++tap_h;
  }
}

// Operands of every tile of the block.
template <typename T, int kTile>
__device__ __forceinline__ void load_operands(const WgmmaConvArgs& a,
                                              const WgmmaShared<T, kTile>& shared) {
  using Shared = WgmmaShared<T, kTile>;
  for (int i = 0; i < a.conv.sources; ++i) {
    ptx::tensor_map_prefetch(&a.image[i]);
    ptx::tensor_map_prefetch(&a.weight[i]);
  }
  RingPlace<Shared::kStages> at;
  for (int item = static_cast<int>(blockIdx.x); item < a.items;
       item += static_cast<int>(gridDim.x)) {
    const Work<kTile> work(a, item);
    const FirstPixel pixel(a.conv, work.m0);
    for (int i = 0; i < Shared::kShape.sources; ++i) {
      const int source = work.range.source + i;
      const WgmmaSource& s = a.source[source];
      const int begin = i == 0 ? work.range.begin : 0, end = i == 0 ? work.range.end : s.steps;
      load_steps<T>(s, &a.image[source], &a.weight[source], pixel, work.k0, begin, end,
                    Shared::kShape.stage_bytes(), shared, at);
    }
  }
  if (a.dependent) ptx::grid_launch();
}

// Opens a place to a consumer, for the outputs from row `m0` and column `k0` on: after the residual
// has come, if any.
template <typename Shared>
__device__ __forceinline__ void open_place(const Shared& shared, const TensorMap* residual,
                                           int place, int m0, int k0) {
  const uint32_t open = shared.open(place);
  if (residual == nullptr) {
    ptx::barrier_arrive(open);
    return;
  }
  ptx::barrier_arrive_expect(open, Shared::kPlaceBytes);
  for (int i = 0; i < Shared::kPanels; ++i) {
    ptx::tensor_load_2d(shared.panel(place, i), residual, k0 + i * Shared::kPanelColumns, m0, open);
  }
}

// Places of outputs, in turns: each is opened for a part of the outputs, and when the consumers are
// done with it, copied to memory and opened for a later one. Rows and columns that do not exist
// stay behind. `corner(i)` has m0 and k0 of the block's part i of `count`.
template <typename Shared, typename Corner>
__device__ __forceinline__ void move_outputs(const Shared& shared, const TensorMap* residual,
                                             const TensorMap* out, int columns, int count,
                                             const Corner& corner) {
  for (int i = 0; i < Shared::kPlaces && i < count; ++i) {
    const auto next = corner(i);
    open_place(shared, residual, i, next.m0, next.k0);
  }
  RingPlace<Shared::kPlaces> at;
  for (int i = 0; i < count; ++i) {
    ptx::barrier_wait(shared.done(at.stage), at.parity);
    const auto done = corner(i);
    for (int panel = 0; panel < Shared::kPanels; ++panel) {
      const int k = done.k0 + panel * Shared::kPanelColumns;
      if (k < columns) ptx::tensor_store_2d(out, shared.panel(at.stage, panel), k, done.m0);
    }
    ptx::tensor_store_commit();
    if (i + Shared::kPlaces < count) {
      ptx::tensor_store_wait_read<0>();
      const auto next = corner(i + Shared::kPlaces);
      open_place(shared, residual, at.stage, next.m0, next.k0);
    }
    at.next();
  }
  ptx::tensor_store_wait<0>();
}

// Those of every tile of the block.
template <typename T, int kTile>
__device__ __forceinline__ void move_tiles(const WgmmaConvArgs& a,
                                           const WgmmaShared<T, kTile>& shared) {
  const int first = static_cast<int>(blockIdx.x), stride = static_cast<int>(gridDim.x);
  move_outputs(shared, a.conv.residual != nullptr ? &a.residual : nullptr, &a.out,
               static_cast<int>(a.conv.K), (a.items - first + stride - 1) / stride,
               [&](int i) { return Work<kTile>(a, first + i * stride); });
}

}  // namespace resnet_fused
