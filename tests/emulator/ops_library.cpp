// SPDX-License-Identifier: BSD-3-Clause
// The CUDA ops on a CPU: the host code of csrc/ops and the kernels as they are, registered for CPU
// tensors in a namespace of its own. What differs from a GPU is here: the device and its stream.
#include "ops/cuda.h"
#include "ops/ops.h"
#include "runtime/api.h"

namespace resnet_fused {
namespace {

int multiprocessor_count = 132;
int64_t calls = 0;  // device guards that were made
int64_t open = 0;   // and are still there

const bool registered = [] {
  TorchLibraryHandle cpu = nullptr;
  check_torch(
      aoti_torch_library_init_impl("resnet_fused_emulated", "CPU", __FILE__, __LINE__, &cpu),
      "registration");
  const struct {
    const char* name;
    Op* op;
  } ops[] = {{"add_relu", add_relu_cuda},       {"basic_block", basic_block_cuda},
             {"bottleneck", bottleneck_cuda},   {"conv_bn_act", conv_bn_act_cuda},
             {"pool_linear", pool_linear_cuda}, {"stem", stem_cuda}};
  for (const auto& [name, op] : ops)
    check_torch(torch_library_impl(cpu, name, op, kTorchVersion), name);
  return true;
}();

}  // namespace

CudaCall::CudaCall(const char* op, const Tensor& x) : op_(op), x_(x) {
  require(open == 0, op, ": a call inside another");
  ++calls;
  ++open;
}

CudaCall::~CudaCall() { --open; }

int CudaCall::multiprocessors() const { return multiprocessor_count; }

void CudaCall::check(int error) const {
  std::string text;
  for (const emulator::Finding& f : emulator::take_findings()) {
    text += "; " + f.kind + ": " + f.text + " in " + f.kernel;
  }
  require(error == 0 && text.empty(), op_, ": error ", error, " for x of shape ", Shape{x_}, text);
}

}  // namespace resnet_fused

extern "C" {
__attribute__((visibility("default"))) void emulated_configure(uint64_t seed, int multiprocessors) {
  resnet_fused::multiprocessor_count = multiprocessors;
  emulator::Settings settings;
  settings.seed = seed;
  emulator::configure(settings);
}
// Kernel launches since the last call.
__attribute__((visibility("default"))) uint64_t emulated_launches() {
  const uint64_t count = emulator::counters().launches;
  emulator::reset_counters();
  return count;
}
// Calls of ops since the library was loaded, -1 if one has not given its device back.
__attribute__((visibility("default"))) int64_t emulated_calls() {
  return resnet_fused::open == 0 ? resnet_fused::calls : -1;
}
}
