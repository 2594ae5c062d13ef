// SPDX-License-Identifier: BSD-3-Clause
// A consumer warpgroup: products of the ring's steps, and what happens to the sums: BatchNorm,
// residual, ReLU, rounding, in registers; outputs go to shared memory in the copy unit's pattern.
#pragma once

#include "batch_norm.cuh"
#include "finish.cuh"
#include "wgmma_tile.cuh"

namespace resnet_fused {

template <int kTile>
using WgmmaSums = float[kWgmmaTiles[kTile].groups()][kWgmmaTiles[kTile].columns / 2];

// This thread's place among the consumers: its lane's row and columns in each 16 x 8 part of a
// warpgroup's sums, as wgmma leaves them.
struct ConsumerThread {
  int consumer, thread, lane;
  int row, column;

  __device__ __forceinline__ ConsumerThread() {
    consumer = static_cast<int>(threadIdx.x) / kWarpgroup - 1;
    thread = static_cast<int>(threadIdx.x) % kWarpgroup;
    lane = thread % 32;
    row = thread / 32 * 16 + lane / 4;
    column = lane % 4 * 2;
  }
};

// Sums begin here: registers that nothing defines before their first products would be taken for
// used from the kernel's begin on, beside those of the other convolution.
template <int kGroups, int kHalf>
__device__ __forceinline__ void begin_sums(float (&sums)[kGroups][kHalf]) {
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
#pragma unroll
    for (int i = 0; i < kHalf; ++i) sums[g][i] = 0.0f;
    ptx::wgmma_fence(sums[g]);
  }
}

// Adds the products of a step: rows at `a`, in groups of 64, with columns at `b`, both places in
// shared memory as descriptors. The first one overwrites unless `add`.
template <typename T, int kGroups, int kHalf>
__device__ __forceinline__ void multiply_step(uint64_t a, uint64_t b, bool add,
                                              float (&sums)[kGroups][kHalf]) {
  ptx::wgmma_fence();
#pragma unroll
  for (int part = 0; part < kStepBytes; part += 32) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      // A descriptor counts in units of 16 bytes.
      ptx::wgmma<T, 2 * kHalf>(sums[g], a + (g * 64 * kStepBytes + part) / 16, b + part / 16,
                               add || part > 0);
    }
  }
  ptx::wgmma_commit();
}

// Waits for step after step of a sum, from `begin` on, and adds its products; a stage is given back
// one step later, when its products are done. `last` is the one still to be given back, or -1.
template <typename T, typename Shared, int kGroups, int kHalf>
__device__ __forceinline__ void multiply_steps(const Shared& shared, const ConsumerThread& self,
                                               int first_row, int begin, int end,
                                               RingPlace<Shared::kStages>& at, int& last,
                                               float (&sums)[kGroups][kHalf]) {
#pragma unroll 1
  for (int step = begin; step < end; ++step) {
    ptx::barrier_wait(shared.full(at.stage), at.parity);
    const uint64_t a = ptx::wgmma_descriptor(shared.pixels(at.stage) + first_row * kStepBytes);
    const uint64_t b = ptx::wgmma_descriptor(shared.filters(at.stage));
    multiply_step<T>(a, b, step > 0, sums);
    ptx::wgmma_wait<1>();
    if (last >= 0 && self.lane == 0) ptx::barrier_arrive(shared.empty(last));
    last = at.stage;
    at.next();
  }
}

// Scales and shifts of the columns from k0 on: for each source all scales, then all shifts; 0
// behind the last column.
template <int kTile>
__device__ __forceinline__ void make_affine(const MmaConvParams& p, const ConsumerThread& self,
                                            int k0, float* affine) {
  constexpr WgmmaTile kShape = kWgmmaTiles[kTile];
  // The warpgroup has read what is there.
  ptx::barrier_sync(1 + self.consumer, kWarpgroup);
#pragma unroll
  for (int i = 0; i < kShape.sources * kShape.columns; i += kWarpgroup) {
    const int index = i + self.thread;
    if (index >= kShape.sources * kShape.columns) break;
    const int source = index / kShape.columns, column = index % kShape.columns;
    float scale = 0.0f, shift = 0.0f;
    if (k0 + column < p.K) channel_affine(p.source[source].bn, k0 + column, scale, shift);
    affine[source * 2 * kShape.columns + column] = scale;
    affine[(source * 2 + 1) * kShape.columns + column] = shift;
  }
  ptx::barrier_sync(1 + self.consumer, kWarpgroup);
}

// Outputs of this thread's sums, to a place where the residual is, if any: from its row `first` on.
// A place is panels of kRows rows of kPanel bytes, of which the copy unit swizzles the 16-byte
// chunks: a warp's 8 rows are in different banks. `affine`: the first column's scale, and for each
// source kTable scales, then as many shifts.
template <typename T, int kRows, int kPanel, int kTable, int kSources, int kGroups, int kHalf>
__device__ __forceinline__ void finish_sums(const Finish& finish, const ConsumerThread& self,
                                            int first, const float* affine, unsigned char* place,
                                            const float (&sums)[kSources][kGroups][kHalf]) {
  constexpr int kSize = sizeof(T), kColumns = 2 * kHalf;
  const int swizzle = kPanel == 128 ? self.lane / 4 : self.lane / 8;
  const int in_row = self.column * kSize;
  unsigned char* row = place + first * kPanel;
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j) {
    float2 scale[kSources], shift[kSources];
#pragma unroll
    for (int source = 0; source < kSources; ++source) {
      const float* at = affine + source * 2 * kTable + j * 8 + self.column;
      scale[source] = *reinterpret_cast<const float2*>(at);
      shift[source] = *reinterpret_cast<const float2*>(at + kTable);
    }
    const int byte = j * 8 * kSize % kPanel + in_row;
    unsigned char* outputs =
        row + j * 8 * kSize / kPanel * (kRows * kPanel) + (byte / 16 ^ swizzle) * 16 + byte % 16;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        auto* at = reinterpret_cast<ColumnPair<T>*>(outputs + (g * 64 + half * 8) * kPanel);
        ColumnPair<T> pair = {};
        if (finish.residual) pair = *at;
        float y[2];
#pragma unroll
        for (int source = 0; source < kSources; ++source) {
          const float* sum = &sums[source][g][j * 4 + half * 2];
          const float a = fmaf(sum[0], scale[source].x, shift[source].x);
          const float b = fmaf(sum[1], scale[source].y, shift[source].y);
          y[0] = source == 0 ? a : y[0] + a;
          y[1] = source == 0 ? b : y[1] + b;
        }
        pair.set(finish(y[0], pair.get(0)), finish(y[1], pair.get(1)));
        *at = pair;
      }
    }
  }
}

// Sums as they are, to this split's part of the workspace: K is even.
template <int kTile>
__device__ __forceinline__ void store_sums(const MmaConvParams& p, const ConsumerThread& self,
                                           const Work<kTile>& work, const WgmmaSums<kTile>& sums) {
  constexpr WgmmaTile kShape = kWgmmaTiles[kTile];
  const int64_t rows = p.N * p.P * p.Q;
  const int64_t first = work.m0 + (kShape.together ? self.consumer * (kShape.rows / 2) : 0);
  const int k = work.k0 + self.column;
#pragma unroll
  for (int g = 0; g < kShape.groups(); ++g) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t m = first + g * 64 + half * 8 + self.row;
      if (m >= rows) continue;
      float* to = p.workspace + (work.split * rows + m) * p.K + k;
#pragma unroll
      for (int j = 0; j < kShape.columns / 8; ++j) {
        const float* pair = &sums[g][j * 4 + half * 2];
        if (k + j * 8 < p.K) *reinterpret_cast<float2*>(to + j * 8) = {pair[0], pair[1]};
      }
    }
  }
}

// A consumer's tiles of the block.
template <typename T, int kTile>
__device__ __forceinline__ void consume(const WgmmaConvArgs& a,
                                        const WgmmaShared<T, kTile>& shared) {
  constexpr WgmmaTile kShape = kWgmmaTiles[kTile];
  constexpr int kSources = kShape.sources;
  const ConsumerThread self;
  const int place = kShape.together ? 0 : self.consumer;
  const int first_row = kShape.together ? self.consumer * (kShape.rows / 2) : 0;
  float* affine = shared.affine(self.consumer);
  const bool whole = kSources == 2 || a.conv.plan.splits == 1;
  RingPlace<WgmmaShared<T, kTile>::kStages> at;
  int affine_of = -1;   // the column that scales and shifts begin with
  int tiles = 0;        // of the block so far
  uint32_t parity = 0;  // of this consumer's tiles
#pragma unroll 1
  for (int item = static_cast<int>(blockIdx.x); item < a.items;
       item += static_cast<int>(gridDim.x)) {
    const Work<kTile> work(a, item);
    if (!kShape.together && tiles++ % kConsumers != self.consumer) {
      at.skip(work.steps(a));
      continue;
    }
    if (whole && affine_of != work.k0) {
      make_affine<kTile>(a.conv, self, work.k0, affine);
      affine_of = work.k0;
    }
    // The ring's barriers tell two phases apart, no more: a consumer looks at them only when the
    // other one has seen all stages before its own. The first tile is nobody's to wait for.
    if constexpr (!kShape.together) {
      ptx::barrier_wait(shared.turn(self.consumer), self.consumer == 0 ? parity ^ 1 : parity);
    }
    WgmmaSums<kTile> sums[kSources];
    int last = -1;
    multiply_steps<T>(shared, self, first_row, 0, work.first_steps(), at, last, sums[0]);
    if constexpr (kSources == 2) {
      multiply_steps<T>(shared, self, first_row, 0, a.source[1].steps, at, last, sums[1]);
    }
    if constexpr (!kShape.together) {
      __syncwarp();
      if (self.lane == 0) ptx::barrier_arrive(shared.turn(1 - self.consumer));
    }
#pragma unroll
    for (int source = 0; source < kSources; ++source) {
#pragma unroll
      for (int g = 0; g < kShape.groups(); ++g) ptx::wgmma_wait<0>(sums[source][g]);
    }
    if (self.lane == 0) ptx::barrier_arrive(shared.empty(last));

    if (whole) {
      ptx::barrier_wait(shared.open(place), parity);
      finish_sums<T, kShape.rows, WgmmaShared<T, kTile>::kPanel, kShape.columns>(
          Finish{a.conv.residual != nullptr, a.conv.relu}, self, first_row + self.row, affine,
          shared.outputs(place), sums);
      ptx::fence_async_shared();
      __syncwarp();
      if (self.lane == 0) ptx::barrier_arrive(shared.done(place));
    } else {
      store_sums<kTile>(a.conv, self, work, sums[0]);
    }
    parity ^= 1;
  }
}

}  // namespace resnet_fused
