// SPDX-License-Identifier: BSD-3-Clause
// Weights brought into each form; pack.h keeps them.
#pragma once

#include "pack.h"

namespace resnet_fused {

// Whether the form is the own kernels', one for every size of the input.
constexpr bool is_tiles(Form form) { return form != Form::folded_f32 && form != Form::folded_bf16; }

// `conv`'s weight in `form`; `plain` says that oneDNN's layout shall serve every size of the input.
std::shared_ptr<const Packed> make_packed(const Conv& conv, const Sizes& in, Form form, bool plain);

}  // namespace resnet_fused
