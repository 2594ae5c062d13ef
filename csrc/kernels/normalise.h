// SPDX-License-Identifier: BSD-3-Clause
// Images of bytes, normalised: a byte v of channel c stands for v * scale[c] + shift[c], product
// and sum each rounded to fp32, then once to the dtype of the network. A byte has 256 values: on a
// CPU they are computed once, and looked up.
#pragma once

#include "dtype.h"

namespace resnet_fused {

constexpr int64_t kByteValues = 256;

// What an entry of the table holds: a value's bits in a dtype, the upper ones zero; or the two bf16
// whose sum stands for it (bf16x3, tile_conv.h), the low one above.
enum class ByteForm { f32, bf16, f16, split };

// table[c][v] for the scales [C] and shifts [C]. Returns false if an entry is NaN or infinite.
bool make_byte_table_cpu(const float* scale, const float* shift, int64_t C, ByteForm form,
                         uint32_t* table);

// A line of W pixels as C dense channels each, fp32 or 16 bits.
struct LookUpLineParams {
  const uint8_t* x;
  const uint32_t* table;
  void* out;
  int64_t item;  // bytes of an element of out: 4 or 2
  int64_t C, W;
  int64_t c_stride, w_stride;  // of x
};
void look_up_line_cpu(const LookUpLineParams& p);

}  // namespace resnet_fused
