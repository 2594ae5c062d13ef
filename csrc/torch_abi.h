// SPDX-License-Identifier: BSD-3-Clause
// Declarations of the LibTorch stable C ABI (2.10) that this library uses, and a thin RAII layer
// over them. Nothing else in csrc knows torch. Building needs no torch: the functions are found in
// libtorch when the library is loaded. tests/abi holds these declarations against torch's own
// headers.
//
// Functions that some torch builds lack are weak: their address is null there.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

extern "C" {
struct AtenTensorOpaque;
using AtenTensorHandle = AtenTensorOpaque*;
struct TorchLibraryOpaque;
using TorchLibraryHandle = TorchLibraryOpaque*;
struct DeviceGuardOpaque;
using DeviceGuardHandle = DeviceGuardOpaque*;
struct StableListOpaque;
using StableListHandle = StableListOpaque*;
using AOTITorchError = int32_t;
using StableIValue = uint64_t;
typedef void (*ParallelFunc)(int64_t begin, int64_t end, void* ctx);

AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle tensor);
AOTITorchError aoti_torch_new_tensor_handle(AtenTensorHandle orig_handle,
                                            AtenTensorHandle* new_handle);
AOTITorchError aoti_torch_get_dim(AtenTensorHandle tensor, int64_t* ret_dim);
AOTITorchError aoti_torch_get_sizes(AtenTensorHandle tensor, int64_t** ret_sizes);
AOTITorchError aoti_torch_get_strides(AtenTensorHandle tensor, int64_t** ret_strides);
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle tensor, int32_t* ret_dtype);
AOTITorchError aoti_torch_get_device_type(AtenTensorHandle tensor, int32_t* ret_device_type);
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle tensor, int32_t* ret_device_index);
AOTITorchError torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** ret_data_ptr);
AOTITorchError torch_get_const_data_ptr(AtenTensorHandle tensor, const void** ret_data_ptr);
AOTITorchError aoti_torch_empty_strided(int64_t ndim, const int64_t* sizes_ptr,
                                        const int64_t* strides_ptr, int32_t dtype,
                                        int32_t device_type, int32_t device_index,
                                        AtenTensorHandle* ret_new_tensor);
AOTITorchError aoti_torch__reinterpret_tensor(AtenTensorHandle self, int64_t ndim,
                                              const int64_t* sizes_ptr, const int64_t* strides_ptr,
                                              int64_t storage_offset,
                                              AtenTensorHandle* ret_new_tensor);
AOTITorchError aoti_torch_copy_(AtenTensorHandle self, AtenTensorHandle src, int32_t non_blocking);

int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_dtype_float64();
int32_t aoti_torch_dtype_float16();
int32_t aoti_torch_dtype_bfloat16();
int32_t aoti_torch_dtype_uint8();
int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_device_type_cuda();

AOTITorchError aoti_torch_library_init_def(const char* ns, const char* file, uint32_t line,
                                           TorchLibraryHandle* ret_new_torch_lib);
AOTITorchError aoti_torch_library_init_impl(const char* ns, const char* k, const char* file,
                                            uint32_t line, TorchLibraryHandle* ret_new_torch_lib);
AOTITorchError aoti_torch_library_def(TorchLibraryHandle self, const char* schema);
AOTITorchError torch_library_impl(TorchLibraryHandle self, const char* name,
                                  void (*fn)(StableIValue*, uint64_t, uint64_t),
                                  uint64_t extension_build_version);
AOTITorchError torch_call_dispatcher(const char* opName, const char* overloadName,
                                     StableIValue* stack, uint64_t extension_build_version);

AOTITorchError torch_new_list_reserve_size(size_t size, StableListHandle* ret);
AOTITorchError torch_list_size(StableListHandle list_handle, size_t* size);
AOTITorchError torch_list_get_item(StableListHandle list_handle, size_t index,
                                   StableIValue* element);
AOTITorchError torch_list_push_back(StableListHandle list_handle, StableIValue element);
AOTITorchError torch_delete_list(StableListHandle list_handle);

AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain_size, ParallelFunc func,
                                  void* ctx);
AOTITorchError torch_get_num_threads(uint32_t* out_num_threads);

AOTITorchError aoti_torch_create_device_guard(int32_t device_index, DeviceGuardHandle* ret_guard);
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle guard);
// In libtorch_cuda only.
__attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                        void** ret_stream);
// From torch 2.11 on.
__attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes_ptr, const int64_t* strides_ptr,
    int64_t storage_offset, int32_t dtype, int32_t device_type, int32_t device_index,
    AtenTensorHandle* ret, int32_t layout, const uint8_t* opaque_metadata,
    int64_t opaque_metadata_size, void (*deleter)(void* data, void* ctx), void* deleter_ctx);
// From torch 2.13 on.
__attribute__((weak)) const char* torch_exception_get_what_without_backtrace();
// Not part of the stable set, hence weak: torch builds without oneDNN lack them.
__attribute__((weak)) AOTITorchError aoti_torch_cpu_mkldnn__convolution_pointwise(
    AtenTensorHandle X, AtenTensorHandle W, AtenTensorHandle* B, const int64_t* padding,
    int64_t padding_len_, const int64_t* stride, int64_t stride_len_, const int64_t* dilation,
    int64_t dilation_len_, int64_t groups, const char* attr, const double** scalars,
    int64_t scalars_len_, const char** algorithm, AtenTensorHandle* ret0);
__attribute__((weak)) AOTITorchError aoti_torch_cpu_mkldnn__convolution_pointwise_binary(
    AtenTensorHandle X, AtenTensorHandle other, AtenTensorHandle W, AtenTensorHandle* B,
    const int64_t* padding, int64_t padding_len_, const int64_t* stride, int64_t stride_len_,
    const int64_t* dilation, int64_t dilation_len_, int64_t groups, const char* binary_attr,
    double* alpha, const char** unary_attr, const double** unary_scalars,
    int64_t unary_scalars_len_, const char** unary_algorithm, AtenTensorHandle* ret0);
}  // extern "C"

namespace resnet_fused {

// torch 2.10.0, the oldest torch whose C ABI this library speaks.
inline constexpr uint64_t kTorchVersion = 0x020a000000000000;

// Raise torch's own message where this torch can give it.
inline void check_torch(AOTITorchError error, const char* what) {
  if (error == 0) return;
  std::string message = std::string(what) + " failed inside torch";
  if (torch_exception_get_what_without_backtrace != nullptr) {
    const char* inner = torch_exception_get_what_without_backtrace();
    if (inner != nullptr && *inner != '\0') message += std::string(": ") + inner;
  }
  throw std::runtime_error(message);
}

using Sizes = std::vector<int64_t>;

// An owned tensor handle; a default one is an absent optional tensor.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorHandle owned) : handle_(owned) {}
  Tensor(Tensor&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  ~Tensor() {
    if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
  }

  bool defined() const { return handle_ != nullptr; }
  AtenTensorHandle handle() const { return handle_; }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }
  // Another handle to the same tensor.
  Tensor share() const {
    AtenTensorHandle h = nullptr;
    check_torch(aoti_torch_new_tensor_handle(handle_, &h), "sharing a tensor");
    return Tensor(h);
  }

  int64_t dim() const {
    int64_t d = 0;
    check_torch(aoti_torch_get_dim(handle_, &d), "dim");
    return d;
  }
  const int64_t* sizes() const {
    int64_t* s = nullptr;
    check_torch(aoti_torch_get_sizes(handle_, &s), "sizes");
    return s;
  }
  const int64_t* strides() const {
    int64_t* s = nullptr;
    check_torch(aoti_torch_get_strides(handle_, &s), "strides");
    return s;
  }
  int64_t size(int64_t i) const { return sizes()[i]; }
  int64_t stride(int64_t i) const { return strides()[i]; }
  Sizes shape() const { return Sizes(sizes(), sizes() + dim()); }
  int64_t numel() const {
    int64_t n = 1;
    for (int64_t i = 0, d = dim(); i < d; ++i) n *= size(i);
    return n;
  }
  int32_t dtype() const {
    int32_t t = 0;
    check_torch(aoti_torch_get_dtype(handle_, &t), "dtype");
    return t;
  }
  int32_t device_type() const {
    int32_t t = 0;
    check_torch(aoti_torch_get_device_type(handle_, &t), "device type");
    return t;
  }
  int32_t device_index() const {
    int32_t i = 0;
    check_torch(aoti_torch_get_device_index(handle_, &i), "device index");
    return i;
  }
  const void* data() const {
    const void* p = nullptr;
    check_torch(torch_get_const_data_ptr(handle_, &p), "data pointer");
    return p;
  }
  void* mutable_data() const {
    void* p = nullptr;
    check_torch(torch_get_mutable_data_ptr(handle_, &p), "data pointer");
    return p;
  }

 private:
  AtenTensorHandle handle_ = nullptr;
};

// A new tensor with uninitialised memory on the device of `like`.
inline Tensor empty_strided(const Sizes& sizes, const Sizes& strides, int32_t dtype,
                            const Tensor& like) {
  AtenTensorHandle h = nullptr;
  check_torch(
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                               dtype, like.device_type(), like.device_index(), &h),
      "allocation");
  return Tensor(h);
}

inline Sizes contiguous_strides(const Sizes& sizes) {
  Sizes strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;)
    strides[i - 1] = strides[i] * (sizes[i] > 1 ? sizes[i] : 1);
  return strides;
}

// Strides of [N, C, H, W] stored as NHWC, as torch computes them.
inline Sizes channels_last_strides(const Sizes& s) {
  auto at_least_1 = [](int64_t v) { return v > 1 ? v : int64_t{1}; };
  const int64_t w = at_least_1(s[1]), h = w * at_least_1(s[3]);
  return {h * at_least_1(s[2]), 1, h, w};
}

// A view of t: other sizes and strides, beginning `skip` elements after t's first.
inline Tensor view(const Tensor& t, const Sizes& sizes, const Sizes& strides, int64_t skip) {
  AtenTensorHandle h = nullptr;
  // The C function's storage_offset is added to t's own.
  check_torch(aoti_torch__reinterpret_tensor(t.handle(), static_cast<int64_t>(sizes.size()),
                                             sizes.data(), strides.data(), skip, &h),
              "view");
  return Tensor(h);
}

// Images [first, first + count) of a dense NHWC tensor, sharing its memory.
inline Tensor images(const Tensor& t, int64_t first, int64_t count) {
  Sizes sizes = t.shape();
  sizes[0] = count;
  return view(t, sizes, Sizes(t.strides(), t.strides() + 4), first * t.stride(0));
}

// Call f(begin, end) on torch's intra-op threads; f must not throw.
template <typename F>
void parallel_for(int64_t n, int64_t grain, F&& f) {
  auto call = [](int64_t begin, int64_t end, void* ctx) {
    (*static_cast<std::remove_reference_t<F>*>(ctx))(begin, end);
  };
  check_torch(torch_parallel_for(0, n, grain, call, &f), "parallel_for");
}

}  // namespace resnet_fused
