// SPDX-License-Identifier: BSD-3-Clause
// Memory for the CPU ops' large tensors, kept for the next call.
//
// A fresh tensor of some megabytes costs a page fault per 4 KB, a quarter of a batched forward's
// time; the pool hands out blocks that are already mapped. A tensor's block returns to the pool
// when torch drops the tensor. At most kPoolBytes lie unused; what exceeds them goes back to the
// system at once.
#pragma once

#include "dispatch.h"

namespace resnet_fused {

constexpr int64_t kPoolBytes = int64_t{512} << 20;

// A new dense NHWC tensor with uninitialised memory, from the pool where that pays and torch (2.11
// on) can give memory back to it.
Tensor empty_channels_last(const Sizes& sizes, DType dtype, const Tensor& like);

// Uninitialised memory from the pool, on a page boundary.
class Scratch {
 public:
  explicit Scratch(size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  unsigned char* data() const { return static_cast<unsigned char*>(block_); }

 private:
  size_t size_ = 0;  // before block_, which sets it
  void* block_;
};

}  // namespace resnet_fused

extern "C" {
// Bytes of unused blocks in the pool.
__attribute__((visibility("default"))) int64_t resnet_fused_pool_bytes();
// Give all unused blocks back to the system.
__attribute__((visibility("default"))) void resnet_fused_pool_release();
}
