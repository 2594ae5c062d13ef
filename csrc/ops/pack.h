// SPDX-License-Identifier: BSD-3-Clause
// Weights as the kernels want them, cached.
//
// An entry belongs to a weight's address and a form, and is stamped with the weight's version
// counter, a hash over samples of the weight and, where BatchNorm is folded in, a hash of all its
// values; a different stamp packs anew. In-place updates that torch tracks always count. Edits
// behind its back (`.data`) of whole tensors are noticed through the samples. Inference tensors
// have no version counter and are hashed whole.
//
// An entry goes when its weight dies, which Python tells; until it has said that it will (compiled
// code never does), the entry keeps the weight's memory, so that no other weight comes to lie
// there.
#pragma once

#include <limits>
#include <memory>

#include "../kernels/tile_conv.h"
#include "conv.h"

namespace resnet_fused {

enum class Form {
  folded_f32,     // BatchNorm folded in, oneDNN's blocked layout, fp32
  folded_bf16,    // likewise, bf16
  tiles,          // as it is, in the tile convolution's blocks, bf16
  tile_windows,   // likewise, a row of the window (8 pixels of 4 channels) as 32 channels of a tap
  split_tiles,    // like tiles, but fp32 split in two bf16
  split_windows,  // like tile_windows, but split
  floats,         // as it is, in the fp32 convolution's blocks
  float_windows   // likewise, a row of the window as one k-step
};

// Whether a chain of tile convolutions takes it, and what those multiply.
constexpr bool is_chained(Form form) {
  return form == Form::tiles || form == Form::split_tiles || form == Form::floats;
}
constexpr Products products_of(Form form) {
  if (form == Form::floats || form == Form::float_windows) return Products::fp32;
  return form == Form::tiles || form == Form::tile_windows ? Products::bf16 : Products::bf16x3;
}

struct Packed {
  Tensor weight;
  Tensor shift;  // [K], dtype of the weight; folded forms only
  // No output or partial sum is larger than gain * max|x| + offset; known for folded fp32 only.
  double gain = std::numeric_limits<double>::infinity(), offset = 0;
};

// `conv`'s weight in `form`; `in` are the input's sizes, which oneDNN's layouts depend on.
std::shared_ptr<const Packed> pack(const Conv& conv, const Sizes& in, Form form);

}  // namespace resnet_fused

extern "C" {
// Drop what is packed of the weight at this address.
__attribute__((visibility("default"))) void resnet_fused_pack_drop(const void* weight);
// The weight at this address will be dropped when its memory is freed.
__attribute__((visibility("default"))) void resnet_fused_pack_watched(const void* weight);
// Counts packings since the library was loaded.
__attribute__((visibility("default"))) int64_t resnet_fused_pack_count();
// Bytes that packed weights take now.
__attribute__((visibility("default"))) int64_t resnet_fused_pack_bytes();
}
