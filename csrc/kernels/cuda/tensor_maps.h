// SPDX-License-Identifier: BSD-3-Clause
// Tensor maps for the copy unit of a Hopper GPU: what the driver demands of their arguments, and
// the maps themselves, which are kept for the next call. Host only.
#pragma once

#include <cstdint>

#include "../dtype.h"
#include "tensor_map.h"

namespace resnet_fused {

// A box of a tensor (rank 2 or 3), or columns of pixels of images [N, H, W, C] (rank 4). Innermost
// dimension first. Every field takes part in the comparison of two: unused ones are 0.
struct TensorMapShape {
  const void* address;
  int rank;
  DType dtype;
  bool tf32;               // fp32 that is rounded to TF32 on its way
  int64_t sizes[4];        // in elements
  int64_t strides[3];      // in bytes, of the dimensions from the second on
  int box[3];              // elements, rank 2 and 3
  int pixels, channels;    // of a column, rank 4
  int lower[2], upper[2];  // corners of the bounding box, width first, rank 4
  int steps[2];            // from pixel to pixel, width first, rank 4
  int swizzle;             // bytes: 64 or 128
};

// Which of the driver's documented rules is broken, or null. The driver reports no more than an
// invalid value, and the emulator of the tests relies on these.
const char* tensor_map_problem(const TensorMapShape& s);

// Drivers up to 13.1 set a bit of the maps of small tensors that must not be set.
constexpr int64_t kSmallTensor = 128 * 1024;
void repair_tensor_map(TensorMap& map, int64_t tensor_bytes, int driver_version);

// The map of a shape; a cudaError_t. Maps are kept, a bounded number of them, for all threads.
int make_tensor_map(const TensorMapShape& s, TensorMap* map);

}  // namespace resnet_fused
