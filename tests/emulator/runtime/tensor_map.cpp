// SPDX-License-Identifier: BSD-3-Clause
// The arguments' rules are those of cuTensorMapEncodeTiled and cuTensorMapEncodeIm2col in cuda.h.
// Types and patterns that no kernel here uses are refused as well.
#include "tensor_map.h"

#include <cstring>

namespace emulator {

size_t map_type_size(int type) {
  static const unsigned char sizes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  return type >= 0 && type < static_cast<int>(sizeof(sizes)) ? sizes[type] : 0;
}

namespace {

constexpr int kInvalid = 1;
constexpr uint64_t kLargest = uint64_t{1} << 32, kLargestStride = uint64_t{1} << 40;

bool is_modelled(int type) {
  return type == kMapF16 || type == kMapF32 || type == kMapBf16 || type == kMapTf32;
}

// What both functions demand; fills what both leave in the map.
bool common(MapFields& f, const void* map, int type, uint32_t rank, void* address,
            const uint64_t* dims, const uint64_t* strides, const uint32_t* steps, int interleave,
            int swizzle, int l2_promotion, int fill, uint64_t inner) {
  const size_t size = map_type_size(type);
  if (map == nullptr || reinterpret_cast<uintptr_t>(map) % 64 != 0 || size == 0) return false;
  if (rank < 1 || rank > 5 || address == nullptr || dims == nullptr || steps == nullptr) {
    return false;
  }
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) return false;
  if (interleave != 0 || swizzle < 0 || swizzle > 3) return false;
  if (l2_promotion < 0 || l2_promotion > 3 || fill != 0) return false;
  for (uint32_t i = 0; i < rank; ++i) {
    if (dims[i] == 0 || dims[i] > kLargest) return false;
    if (i > 0 && (steps[i] == 0 || steps[i] > 8)) return false;
    f.last[i] = static_cast<uint32_t>(dims[i] - 1);
    f.steps[i] = static_cast<uint8_t>(i == 0 ? 1 : steps[i]);
  }
  uint64_t least = dims[0] * size;
  for (uint32_t i = 0; i + 1 < rank; ++i) {
    if (strides[i] % 16 != 0 || strides[i] >= kLargestStride || strides[i] < least) return false;
    least = strides[i] * dims[i + 1];
    f.strides[i] = strides[i];
  }
  const uint64_t row = inner * size;
  if (row % 16 != 0 || (swizzle != 0 && row > swizzle_span(swizzle))) return false;
  if (!is_modelled(type)) return false;
  f.address = reinterpret_cast<uintptr_t>(address);
  f.rank = static_cast<uint8_t>(rank);
  f.type = static_cast<uint8_t>(type);
  f.swizzle = static_cast<uint8_t>(swizzle);
  f.magic = kMapMagic;
  return true;
}

int write_map(void* map, const MapFields& f) {
  std::memset(map, 0, 128);
  std::memcpy(map, &f, sizeof(f));
  return 0;
}

}  // namespace
}  // namespace emulator

int resnet_fused_tensor_map_encode_tiled(void* map, int type, uint32_t rank, void* address,
                                         const uint64_t* dims, const uint64_t* strides,
                                         const uint32_t* box, const uint32_t* element_strides,
                                         int interleave, int swizzle, int l2_promotion, int fill) {
  using namespace emulator;
  MapFields f{};
  if (box == nullptr) return kInvalid;
  if (!common(f, map, type, rank, address, dims, strides, element_strides, interleave, swizzle,
              l2_promotion, fill, box[0])) {
    return kInvalid;
  }
  for (uint32_t i = 0; i < rank; ++i) {
    if (box[i] == 0 || box[i] > 256) return kInvalid;
    f.box[i] = static_cast<uint16_t>(box[i]);
  }
  return write_map(map, f);
}

int resnet_fused_tensor_map_encode_im2col(void* map, int type, uint32_t rank, void* address,
                                          const uint64_t* dims, const uint64_t* strides,
                                          const int* lower, const int* upper, uint32_t channels,
                                          uint32_t pixels, const uint32_t* element_strides,
                                          int interleave, int swizzle, int l2_promotion, int fill) {
  using namespace emulator;
  MapFields f{};
  if (rank < 3 || rank > 5 || lower == nullptr || upper == nullptr) return kInvalid;
  if (channels == 0 || channels > 256 || pixels == 0 || pixels > 1024) return kInvalid;
  if (!common(f, map, type, rank, address, dims, strides, element_strides, interleave, swizzle,
              l2_promotion, fill, channels)) {
    return kInvalid;
  }
  const int bound = rank == 3 ? 32768 : rank == 4 ? 128 : 16;
  for (uint32_t i = 0; i < rank - 2; ++i) {
    if (lower[i] < -bound || lower[i] >= bound || upper[i] < -bound || upper[i] >= bound) {
      return kInvalid;
    }
    // From the first pixel to the last one, which is at size - 1 + upper.
    if (static_cast<int64_t>(dims[1 + i]) - 1 + upper[i] < lower[i]) return kInvalid;
    f.lower[i] = static_cast<int16_t>(lower[i]);
    f.upper[i] = static_cast<int16_t>(upper[i]);
  }
  f.channels = static_cast<uint16_t>(channels);
  f.pixels = static_cast<uint16_t>(pixels);
  f.columns = 1;
  return write_map(map, f);
}
