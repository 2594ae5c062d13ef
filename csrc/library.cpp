// SPDX-License-Identifier: BSD-3-Clause
// The index of the library: every op's schema and its kernels, registered when the library is
// loaded. Fake kernels and autograd formulas are registered in resnet_fused/ops.
#include "kernels/tile_conv.h"
#include "ops/ops.h"

#ifndef RESNET_FUSED_VERSION
#define RESNET_FUSED_VERSION "unknown"
#endif
#ifndef RESNET_FUSED_BUILD_CXX
#define RESNET_FUSED_BUILD_CXX "unknown"
#endif
#ifndef RESNET_FUSED_BUILD_NVCC
#define RESNET_FUSED_BUILD_NVCC ""
#endif
#ifndef RESNET_FUSED_BUILD_ARCHS
#define RESNET_FUSED_BUILD_ARCHS ""
#endif

// One convolution and its BatchNorm; geometry is stride, padding and dilation of H and W each, and
// groups.
#define CONV_BN(name)                                                                     \
  "Tensor " name "weight, Tensor? " name "bias, Tensor? " name "bn_weight, Tensor? " name \
  "bn_bias, Tensor? " name "running_mean, Tensor? " name "running_var, float " name       \
  "eps, int[] " name "geometry"
#define OPTIONAL_CONV_BN(name)                                                             \
  "Tensor? " name "weight, Tensor? " name "bias, Tensor? " name "bn_weight, Tensor? " name \
  "bn_bias, Tensor? " name "running_mean, Tensor? " name "running_var, float " name        \
  "eps, int[] " name "geometry"

// float32 may be multiplied as three products of bf16 (kernels/tile_conv.h); a CPU's affair.
#define BF16X3 "bool bf16x3=False"

namespace resnet_fused {
namespace {

struct Registration {
  const char* schema;
  const char* name;
  Op* cpu;
  Op* cuda;
};

#ifdef RESNET_FUSED_CUDA
#define OP(name) #name, name##_cpu, name##_cuda
#else
#define OP(name) #name, name##_cpu, nullptr
#endif

constexpr Registration kOps[] = {
    {"conv_bn_act(Tensor x, " CONV_BN("") ", Tensor? residual, bool relu, " BF16X3 ") -> Tensor",
     OP(conv_bn_act)},
    {"add_relu(Tensor x, Tensor y) -> Tensor", OP(add_relu)},
    {"stem(Tensor x, " CONV_BN("") ", " BF16X3 ", Tensor? norm=None) -> Tensor", OP(stem)},
    {"basic_block(Tensor x, " CONV_BN("conv1_") ", " CONV_BN("conv2_") ", " OPTIONAL_CONV_BN(
         "downsample_") ", " BF16X3 ") -> Tensor",
     OP(basic_block)},
    {"bottleneck(Tensor x, " CONV_BN("conv1_") ", " CONV_BN("conv2_") ", " CONV_BN(
         "conv3_") ", " OPTIONAL_CONV_BN("downsample_") ", " BF16X3 ") -> Tensor",
     OP(bottleneck)},
    {"pool_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", OP(pool_linear)},
};

// Library objects live as long as the process: torch frees them last.
TorchLibraryHandle open_impl(const char* key) {
  TorchLibraryHandle library = nullptr;
  check_torch(aoti_torch_library_init_impl("resnet_fused", key, __FILE__, __LINE__, &library),
              "registration");
  return library;
}

const bool registered = [] {
  TorchLibraryHandle def = nullptr;
  check_torch(aoti_torch_library_init_def("resnet_fused", __FILE__, __LINE__, &def),
              "registration");
  const TorchLibraryHandle cpu = open_impl("CPU"), cuda = open_impl("CUDA");
  for (const Registration& op : kOps) {
    check_torch(aoti_torch_library_def(def, op.schema), op.name);
    if (op.cpu != nullptr)
      check_torch(torch_library_impl(cpu, op.name, op.cpu, kTorchVersion), op.name);
    if (op.cuda != nullptr)
      check_torch(torch_library_impl(cuda, op.name, op.cuda, kTorchVersion), op.name);
  }
  return true;
}();

}  // namespace
}  // namespace resnet_fused

extern "C" {
// Lines of key=value about the build; nvcc and archs are empty without CUDA.
__attribute__((visibility("default"))) const char* resnet_fused_build_info() {
  return "version=" RESNET_FUSED_VERSION "\ncxx=" RESNET_FUSED_BUILD_CXX
         "\nnvcc=" RESNET_FUSED_BUILD_NVCC "\narchs=" RESNET_FUSED_BUILD_ARCHS;
}

// 1 if the loaded torch has the oneDNN convolutions the CPU ops call.
__attribute__((visibility("default"))) int resnet_fused_has_onednn() {
  return aoti_torch_cpu_mkldnn__convolution_pointwise != nullptr &&
         aoti_torch_cpu_mkldnn__convolution_pointwise_binary != nullptr;
}

// 1 if this CPU and kernel let the process use AMX.
__attribute__((visibility("default"))) int resnet_fused_has_amx() {
  return resnet_fused::amx_available();
}

// 1 if this CPU and kernel let the process use AVX-512.
__attribute__((visibility("default"))) int resnet_fused_has_avx512() {
  return resnet_fused::avx512_available();
}
}
