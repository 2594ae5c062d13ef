// SPDX-License-Identifier: BSD-3-Clause
// Tensor maps: what the driver's encoding functions refuse, and what the copies read of a map.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator {

// The emulator's own layout of the 128 bytes.
struct MapFields {
  uint64_t address;
  uint64_t unused;      // in the driver's layout, some drivers' maps need a bit cleared here
  uint64_t strides[4];  // bytes, of the dimensions from the second on
  uint32_t last[5];     // sizes less one: 2^32 is a size
  uint16_t box[5];      // of tiled maps
  int16_t lower[3], upper[3];
  uint16_t channels, pixels;  // of maps of pixel columns
  uint8_t steps[5];
  uint8_t rank, type, swizzle, columns;  // columns: of pixels, not tiled
  uint8_t magic;
};
static_assert(sizeof(MapFields) <= 128);
constexpr uint8_t kMapMagic = 0x7a;

// Of the driver's numbers for types, those that are modelled.
enum MapType { kMapF16 = 6, kMapF32 = 7, kMapBf16 = 9, kMapTf32 = 11 };
// Bytes of an element, 0 for an unknown type.
size_t map_type_size(int type);
// Bytes within which 16-byte chunks are exchanged: 0, 32, 64 or 128.
inline size_t swizzle_span(int swizzle) { return swizzle == 0 ? 0 : size_t{16} << swizzle; }

}  // namespace emulator

// The driver's functions as cuda.h declares them, with plain types: 0, or 1 for an invalid value.
extern "C" {
int resnet_fused_tensor_map_encode_tiled(void* map, int type, uint32_t rank, void* address,
                                         const uint64_t* dims, const uint64_t* strides,
                                         const uint32_t* box, const uint32_t* element_strides,
                                         int interleave, int swizzle, int l2_promotion, int fill);
int resnet_fused_tensor_map_encode_im2col(void* map, int type, uint32_t rank, void* address,
                                          const uint64_t* dims, const uint64_t* strides,
                                          const int* lower, const int* upper, uint32_t channels,
                                          uint32_t pixels, const uint32_t* element_strides,
                                          int interleave, int swizzle, int l2_promotion, int fill);
}
