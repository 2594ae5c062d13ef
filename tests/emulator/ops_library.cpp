// SPDX-License-Identifier: BSD-3-Clause
// The CUDA ops on a CPU: the host code of csrc/ops and the kernels as they are, registered for CPU
// tensors in a namespace of its own. What differs from a GPU is here: the device, its stream and
// its memory.
#include <algorithm>
#include <vector>

#include "ops/cuda.h"
#include "ops/ops.h"
#include "runtime/api.h"

namespace resnet_fused {
namespace {

int multiprocessor_count = 132;
bool hopper_gpu = false;
int64_t calls = 0;  // device guards that were made
int64_t open = 0;   // and are still there

// Behind every tensor that an op allocates is a strip that no kernel may write.
struct Guarded {
  Tensor whole;
  unsigned char *strip, *end;
};
std::vector<Guarded> guarded;  // of this call
int64_t cut = 0;               // bytes at a tensor's end that are taken for the strip
constexpr int kStripByte = 0xa5;

bool strips_are_whole() {
  for (const Guarded& g : guarded) {
    if (std::any_of(g.strip, g.end, [](unsigned char c) { return c != kStripByte; })) return false;
  }
  return true;
}

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

CudaCall::~CudaCall() {
  --open;
  guarded.clear();
}

int CudaCall::multiprocessors() const { return multiprocessor_count; }

bool CudaCall::hopper() const { return hopper_gpu; }

void CudaCall::check(int error) const {
  std::string text;
  for (const emulator::Finding& f : emulator::take_findings()) {
    text += "; " + f.kind + ": " + f.text + " in " + f.kernel;
  }
  if (!strips_are_whole()) text += "; written behind a tensor";
  require(error == 0 && text.empty(), op_, ": error ", error, " for x of shape ", Shape{x_}, text);
}

}  // namespace resnet_fused

extern "C" {
// What csrc/ops calls for aoti_torch_empty_strided.
AOTITorchError emulated_empty_strided(int64_t ndim, const int64_t* sizes, const int64_t* strides,
                                      int32_t dtype, int32_t device_type, int32_t device_index,
                                      AtenTensorHandle* out) {
  int64_t last = 0, numel = 1;
  for (int64_t i = 0; i < ndim; ++i) {
    numel *= sizes[i];
    last += (sizes[i] - 1) * strides[i];
  }
  const int64_t count = numel > 0 ? last + 1 : 0, all = 2 * count + 1024, one = 1;
  AtenTensorHandle h = nullptr;
  const auto error = aoti_torch_empty_strided(1, &all, &one, dtype, device_type, device_index, &h);
  if (error != 0) return error;
  using namespace resnet_fused;
  Tensor whole(h);
  auto* begin = static_cast<unsigned char*>(whole.mutable_data());
  const int64_t size = item_size(dtype_of(whole));
  unsigned char* strip = begin + std::max<int64_t>(count * size - cut, 0);
  std::fill(strip, begin + all * size, static_cast<unsigned char>(kStripByte));
  guarded.push_back({whole.share(), strip, begin + all * size});
  return aoti_torch__reinterpret_tensor(h, ndim, sizes, strides, 0, out);
}

// Tensors that are this much too small.
__attribute__((visibility("default"))) void emulated_cut(int64_t bytes) {
  resnet_fused::cut = bytes;
}
__attribute__((visibility("default"))) void emulated_configure(uint64_t seed, int multiprocessors) {
  resnet_fused::multiprocessor_count = multiprocessors;
  emulator::Settings settings;
  settings.seed = seed;
  emulator::configure(settings);
}
// Whether the GPU is said to be a Hopper.
__attribute__((visibility("default"))) void emulated_hopper(int on) {
  resnet_fused::hopper_gpu = on != 0;
}
// Kernel launches since the last call.
__attribute__((visibility("default"))) uint64_t emulated_launches() {
  const uint64_t count = emulator::counters().launches;
  emulator::reset_counters();
  return count;
}
// Kernel launches since the last call of emulated_launches(), a line for each: the size of the
// grid, then the kernel.
__attribute__((visibility("default"))) const char* emulated_log() {
  static std::string text;
  text.clear();
  for (const emulator::Launched& l : emulator::launched()) {
    for (const int64_t size : l.grid) text += std::to_string(size) + " ";
    text += l.kernel + "\n";
  }
  return text.c_str();
}
// Calls of ops since the library was loaded, -1 if one has not given its device back.
__attribute__((visibility("default"))) int64_t emulated_calls() {
  return resnet_fused::open == 0 ? resnet_fused::calls : -1;
}
}
