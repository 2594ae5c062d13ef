// SPDX-License-Identifier: BSD-3-Clause
#include <cuda_runtime.h>

#include <cstring>
#include <mutex>
#include <type_traits>

#include "tensor_maps.h"

// The driver's functions, as cuda.h of CUDA 12.0 declares them; enumerations are ints.
using EncodeTiled = int (*)(void* map, int type, uint32_t rank, void* address, const uint64_t* dims,
                            const uint64_t* strides, const uint32_t* box,
                            const uint32_t* element_strides, int interleave, int swizzle,
                            int l2_promotion, int fill);
using EncodeIm2col = int (*)(void* map, int type, uint32_t rank, void* address,
                             const uint64_t* dims, const uint64_t* strides, const int* lower,
                             const int* upper, uint32_t channels, uint32_t pixels,
                             const uint32_t* element_strides, int interleave, int swizzle,
                             int l2_promotion, int fill);
#ifndef __CUDACC__
// The emulator stands in for the driver.
extern "C" {
std::remove_pointer_t<EncodeTiled> resnet_fused_tensor_map_encode_tiled;
std::remove_pointer_t<EncodeIm2col> resnet_fused_tensor_map_encode_im2col;
}
#endif

namespace resnet_fused {
namespace {

struct Driver {
  EncodeTiled tiled = nullptr;
  EncodeIm2col im2col = nullptr;
  int version = 0;
  int error = cudaSuccess;
};

#ifdef __CUDACC__
// Through the runtime, so that the library loads where there is no driver.
int entry_point(const char* name, void** function) {
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  // The interface of 12.0, whatever later drivers have under this name.
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(name, function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(name, function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess) cudaGetLastError();
  if (error == cudaSuccess && found != cudaDriverEntryPointSuccess) {
    return cudaErrorSymbolNotFound;
  }
  return error;
}

Driver find_driver() {
  Driver d;
  d.error = entry_point("cuTensorMapEncodeTiled", reinterpret_cast<void**>(&d.tiled));
  if (d.error == cudaSuccess) {
    d.error = entry_point("cuTensorMapEncodeIm2col", reinterpret_cast<void**>(&d.im2col));
  }
  if (d.error == cudaSuccess) d.error = cudaDriverGetVersion(&d.version);
  return d;
}
#else
Driver find_driver() {
  return {resnet_fused_tensor_map_encode_tiled, resnet_fused_tensor_map_encode_im2col, 1 << 30,
          cudaSuccess};
}
#endif

// The driver's numbers for types and patterns.
int type_number(const TensorMapShape& s) {
  if (s.dtype == DType::f16) return 6;
  if (s.dtype == DType::bf16) return 9;
  return s.tf32 ? 11 : 7;
}

int64_t tensor_bytes(const TensorMapShape& s) {
  return s.sizes[s.rank - 1] * s.strides[s.rank - 2];
}

int encode(const Driver& d, const TensorMapShape& s, TensorMap* map) {
  if (d.error != cudaSuccess) return d.error;
  constexpr int kNoInterleave = 0, kPromoteTo256 = 3, kFillZero = 0;
  const int swizzle = s.swizzle == 128 ? 3 : 2, type = type_number(s);
  const auto rank = static_cast<uint32_t>(s.rank);
  void* address = const_cast<void*>(s.address);
  uint64_t sizes[4], strides[3];
  for (int i = 0; i < 4; ++i) sizes[i] = static_cast<uint64_t>(s.sizes[i]);
  for (int i = 0; i < 3; ++i) strides[i] = static_cast<uint64_t>(s.strides[i]);
  int error = 0;
  if (s.rank == 4) {
    const uint32_t steps[4] = {1, static_cast<uint32_t>(s.steps[0]),
                               static_cast<uint32_t>(s.steps[1]), 1};
    error = d.im2col(map, type, rank, address, sizes, strides, s.lower, s.upper,
                     static_cast<uint32_t>(s.channels), static_cast<uint32_t>(s.pixels), steps,
                     kNoInterleave, swizzle, kPromoteTo256, kFillZero);
  } else {
    const uint32_t box[3] = {static_cast<uint32_t>(s.box[0]), static_cast<uint32_t>(s.box[1]),
                             static_cast<uint32_t>(s.box[2])};
    const uint32_t steps[3] = {1, 1, 1};
    error = d.tiled(map, type, rank, address, sizes, strides, box, steps, kNoInterleave, swizzle,
                    kPromoteTo256, kFillZero);
  }
  if (error != 0) return cudaErrorInvalidValue;
  repair_tensor_map(*map, tensor_bytes(s), d.version);
  return cudaSuccess;
}

bool same(const TensorMapShape& a, const TensorMapShape& b) {
  bool equal = a.address == b.address && a.rank == b.rank && a.dtype == b.dtype &&
               a.tf32 == b.tf32 && a.pixels == b.pixels && a.channels == b.channels &&
               a.swizzle == b.swizzle;
  for (int i = 0; i < 4; ++i) equal = equal && a.sizes[i] == b.sizes[i];
  for (int i = 0; i < 3; ++i) equal = equal && a.strides[i] == b.strides[i] && a.box[i] == b.box[i];
  for (int i = 0; i < 2; ++i) {
    equal =
        equal && a.lower[i] == b.lower[i] && a.upper[i] == b.upper[i] && a.steps[i] == b.steps[i];
  }
  return equal;
}

size_t slot_of(const TensorMapShape& s, size_t slots) {
  uint64_t hash = reinterpret_cast<uintptr_t>(s.address);
  const auto mix = [&](int64_t v) {
    hash = (hash ^ static_cast<uint64_t>(v)) * 0x9e3779b97f4a7c15;
  };
  for (const int64_t size : s.sizes) mix(size);
  for (const int box : s.box) mix(box);
  mix(s.rank);
  mix(s.pixels);
  return static_cast<size_t>(hash >> 32) % slots;
}

// A map depends on its shape alone, so that one which another displaces is only made again.
struct Kept {
  TensorMapShape shape;
  TensorMap map;
};
constexpr size_t kKept = 1024;
Kept kept[kKept];
Driver driver;
bool driver_known = false;
std::mutex mutex;  // of all these; encoding takes about a microsecond

}  // namespace

const char* tensor_map_problem(const TensorMapShape& s) {
  if (s.rank < 2 || s.rank > 4) return "rank must be 2 to 4";
  if (s.dtype != DType::f32 && s.dtype != DType::f16 && s.dtype != DType::bf16) return "dtype";
  if (s.address == nullptr || reinterpret_cast<uintptr_t>(s.address) % 16 != 0) {
    return "the address must be a multiple of 16";
  }
  const int64_t size = item_size(s.dtype);
  for (int i = 0; i < s.rank; ++i) {
    if (s.sizes[i] < 1 || s.sizes[i] > int64_t{1} << 32) return "sizes must be 1 to 2^32";
    if (i == 0) continue;
    const int64_t stride = s.strides[i - 1];
    const int64_t least = i == 1 ? s.sizes[0] * size : s.strides[i - 2] * s.sizes[i - 1];
    if (stride % 16 != 0 || stride >= int64_t{1} << 40) {
      return "strides must be multiples of 16 below 2^40";
    }
    if (stride < least) return "a stride must reach over the dimensions within it";
  }
  if (s.swizzle != 64 && s.swizzle != 128) return "swizzle must be 64 or 128";
  const int64_t inner = (s.rank == 4 ? s.channels : s.box[0]) * size;
  if (inner % 16 != 0 || inner < 16 || inner > s.swizzle) {
    return "the box's rows must be multiples of 16 bytes within the swizzle";
  }
  if (s.rank < 4) {
    for (int i = 0; i < s.rank; ++i) {
      if (s.box[i] < 1 || s.box[i] > 256) return "box must be 1 to 256";
    }
    return nullptr;
  }
  if (s.channels > 256) return "channels must be 1 to 256";
  if (s.pixels < 1 || s.pixels > 1024) return "pixels must be 1 to 1024";
  for (int i = 0; i < 2; ++i) {
    if (s.steps[i] < 1 || s.steps[i] > 8) return "strides of pixels must be 1 to 8";
    if (s.lower[i] < -128 || s.lower[i] > 127 || s.upper[i] < -128 || s.upper[i] > 127) {
      return "corners must be -128 to 127";
    }
    if (s.sizes[1 + i] + s.upper[i] - s.lower[i] < 1) return "the bounding box is empty";
  }
  return nullptr;
}

void repair_tensor_map(TensorMap& map, int64_t tensor_bytes, int driver_version) {
  if (driver_version > 13010 || tensor_bytes >= kSmallTensor) return;
  uint64_t word;
  std::memcpy(&word, map.bytes + 8, sizeof(word));
  word &= ~(uint64_t{1} << 21);
  std::memcpy(map.bytes + 8, &word, sizeof(word));
}

int make_tensor_map(const TensorMapShape& s, TensorMap* map) {
  if (tensor_map_problem(s) != nullptr) return cudaErrorInvalidValue;
  const std::lock_guard<std::mutex> lock(mutex);
  Kept& slot = kept[slot_of(s, kKept)];
  if (!same(slot.shape, s)) {
    if (!driver_known) driver = find_driver();
    driver_known = true;
    slot.shape.rank = 0;  // nothing's, should this fail
    const int error = encode(driver, s, &slot.map);
    if (error != cudaSuccess) return error;
    slot.shape = s;
  }
  *map = slot.map;
  return cudaSuccess;
}

}  // namespace resnet_fused
