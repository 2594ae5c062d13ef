// SPDX-License-Identifier: BSD-3-Clause
// The boxed calling convention of LibTorch's stable ABI: every argument and result is 64 bits.
// Tensors and lists are owning handles, an optional is a heap pointer to such a value or null.
#pragma once

#include "../torch_abi.h"

namespace resnet_fused {

// Reads the arguments of an op in order; takes over what it reads.
class Args {
 public:
  explicit Args(StableIValue* stack) : next_(stack) {}

  Tensor tensor() { return Tensor(read<AtenTensorHandle>(*next_++)); }
  Tensor optional_tensor() {
    auto* boxed = read<StableIValue*>(*next_++);
    if (boxed == nullptr) return Tensor();
    Tensor t(read<AtenTensorHandle>(*boxed));
    delete boxed;
    return t;
  }
  double number() { return read<double>(*next_++); }
  bool boolean() { return read<bool>(*next_++); }
  Sizes integers() {
    auto list = read<StableListHandle>(*next_++);
    size_t size = 0;
    AOTITorchError error = torch_list_size(list, &size);
    Sizes values;
    for (size_t i = 0; error == 0 && i < size; ++i) {
      StableIValue v = 0;
      error = torch_list_get_item(list, i, &v);
      values.push_back(read<int64_t>(v));
    }
    torch_delete_list(list);
    check_torch(error, "reading a list");
    return values;
  }

 private:
  template <typename T>
  static T read(StableIValue v) {
    static_assert(sizeof(T) <= sizeof(StableIValue));
    T value;
    std::memcpy(&value, &v, sizeof(T));
    return value;
  }
  StableIValue* next_;
};

template <typename T>
StableIValue boxed(T value) {
  static_assert(sizeof(T) <= sizeof(StableIValue));
  StableIValue v = 0;
  std::memcpy(&v, &value, sizeof(T));
  return v;
}

inline StableIValue boxed(Tensor t) { return boxed(t.release()); }

inline StableIValue boxed(const Sizes& values) {
  StableListHandle list = nullptr;
  check_torch(torch_new_list_reserve_size(values.size(), &list), "making a list");
  for (int64_t v : values) check_torch(torch_list_push_back(list, boxed(v)), "filling a list");
  return boxed(list);
}

// Call an op of torch; `stack` holds its arguments and then its results.
inline void call_op(const char* name, StableIValue* stack) {
  check_torch(torch_call_dispatcher(name, "", stack, kTorchVersion), name);
}

}  // namespace resnet_fused
