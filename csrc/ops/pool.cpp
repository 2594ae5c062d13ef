// SPDX-License-Identifier: BSD-3-Clause
#include "pool.h"

#include <sys/mman.h>

#include <iterator>
#include <mutex>
#include <utility>
#include <vector>

#include "checks.h"

namespace resnet_fused {
namespace {

constexpr size_t kLeast = size_t{1} << 20;  // smaller blocks are malloc's business
constexpr size_t kHugePage = size_t{2} << 20;

struct Pool {
  std::mutex mutex;
  std::vector<std::pair<size_t, void*>> unused;  // the last given back at the end
  size_t bytes = 0;
};
// Never destroyed: tensors may die after static destructors have run.
Pool& pool() {
  static Pool* p = new Pool;
  return *p;
}

void* map_block(size_t bytes) {
  void* block = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (block == MAP_FAILED) return nullptr;
#ifdef MADV_HUGEPAGE
  madvise(block, bytes, MADV_HUGEPAGE);
#endif
  return block;
}

// The unused block that was given back last, of those that are large enough and not more than
// sixteen times too large; or a new one. What was used last is most likely still in L3, whatever
// its size: a network whose tensors shrink from layer to layer stays within its two largest ones.
void* take(size_t bytes, size_t* size) {
  Pool& p = pool();
  {
    std::lock_guard<std::mutex> lock(p.mutex);
    for (auto i = p.unused.rbegin(); i != p.unused.rend(); ++i) {
      if (i->first < bytes || i->first > 16 * bytes) continue;
      void* block = i->second;
      *size = i->first;
      p.bytes -= i->first;
      p.unused.erase(std::next(i).base());
      return block;
    }
  }
  *size = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  return map_block(*size);
}

// torch's deleter; the context is the block's size.
void give_back(void* block, void* context) {
  const auto size = reinterpret_cast<size_t>(context);
  Pool& p = pool();
  {
    std::lock_guard<std::mutex> lock(p.mutex);
    if (p.bytes + size <= static_cast<size_t>(kPoolBytes)) {
      p.unused.emplace_back(size, block);
      p.bytes += size;
      return;
    }
  }
  munmap(block, size);
}

}  // namespace

Scratch::Scratch(size_t bytes) : block_(take(bytes > kLeast ? bytes : kLeast, &size_)) {
  require(block_ != nullptr, "out of memory: ", bytes, " bytes of scratch; use a smaller batch");
}
Scratch::~Scratch() { give_back(block_, reinterpret_cast<void*>(size_)); }

Tensor empty_channels_last(const Sizes& sizes, DType dtype, const Tensor& like) {
  const Sizes strides = channels_last_strides(sizes);
  int64_t bytes = item_size(dtype);
  bool fits = true;
  for (int64_t s : sizes) fits = fits && !__builtin_mul_overflow(bytes, s, &bytes);
  if (fits && torch_from_blob != nullptr && bytes >= static_cast<int64_t>(kLeast) &&
      bytes <= kPoolBytes / 2) {
    size_t size = 0;
    void* block = take(static_cast<size_t>(bytes), &size);
    if (block != nullptr) {
      AtenTensorHandle h = nullptr;
      const AOTITorchError error = torch_from_blob(
          block, 4, sizes.data(), strides.data(), 0, torch_dtype(dtype), like.device_type(),
          like.device_index(), &h, 0, nullptr, 0, give_back, reinterpret_cast<void*>(size));
      if (error != 0) give_back(block, reinterpret_cast<void*>(size));
      check_torch(error, "allocation");
      return Tensor(h);
    }
  }
  return empty_strided(sizes, strides, torch_dtype(dtype), like);
}

}  // namespace resnet_fused

int64_t resnet_fused_pool_bytes() {
  resnet_fused::Pool& p = resnet_fused::pool();
  std::lock_guard<std::mutex> lock(p.mutex);
  return static_cast<int64_t>(p.bytes);
}

void resnet_fused_pool_release() {
  resnet_fused::Pool& p = resnet_fused::pool();
  std::lock_guard<std::mutex> lock(p.mutex);
  for (const auto& [size, block] : p.unused) munmap(block, size);
  p.unused.clear();
  p.bytes = 0;
}
