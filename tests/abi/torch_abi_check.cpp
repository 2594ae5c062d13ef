// SPDX-License-Identifier: BSD-3-Clause
// Compiled with -fsyntax-only: a function that csrc/torch_abi.h declares otherwise than torch is an
// error.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/c/shim_cpu.h>
#include <torch/csrc/stable/c/shim.h>

#include "torch_abi.h"
