// SPDX-License-Identifier: BSD-3-Clause
#include "pack.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <list>
#include <mutex>
#include <optional>
#include <tuple>
#include <unordered_map>

#include "../kernels/conv_bn_act.h"
#include "pack_forms.h"

namespace resnet_fused {
namespace {

// Of a weight, per call, each a cache miss: enough to notice every edit of a whole tensor.
constexpr int kSamples = 16;
constexpr size_t kLayouts =
    4;  // packings kept per weight: oneDNN's layout depends on the input's height and width

constexpr int kCallsToPack = 3;

struct Layout {
  int64_t height, width;  // of the input; 0: serves every size
  std::shared_ptr<const Packed> packed;
};

struct Entry {
  uint64_t stamp = 0;
  bool inference = false;                   // the weight is an inference tensor
  std::list<Layout> layouts;                // most recently made first
  int64_t new_height = -1, new_width = -1;  // the last input size that had no layout of its own
  int new_calls = 0;                        // with it, running
  int64_t bytes = 0;
  uint64_t last_use = 0;
  Tensor held;  // the weight's memory, while nobody watches it

  int64_t held_bytes() const {
    return held.defined() ? held.numel() * item_size(dtype_of(held)) : 0;
  }
};

struct Key {
  const void* weight;
  Form form;
  bool operator==(const Key& o) const { return weight == o.weight && form == o.form; }
};
struct KeyHash {
  size_t operator()(const Key& k) const {
    return std::hash<const void*>()(k.weight) * 31 + static_cast<size_t>(k.form);
  }
};

struct Cache {
  std::mutex mutex;
  std::unordered_map<Key, Entry, KeyHash> entries;
  int64_t bytes = 0;
  uint64_t clock = 0;
};
// Never destroyed: torch may be gone when static destructors run.
Cache& cache() {
  static Cache* c = new Cache;
  return *c;
}
std::atomic<int64_t> packings{0};

// A quarter of the machine's memory; beyond it the longest unused weights are dropped.
int64_t capacity() {
  static const int64_t bytes = std::max<int64_t>(
      int64_t{1} << 30, int64_t{sysconf(_SC_PHYS_PAGES)} * sysconf(_SC_PAGE_SIZE) / 4);
  return bytes;
}

// The bytes that hold t's elements, gaps of strided tensors included.
size_t extent(const Tensor& t) {
  int64_t last = 0;
  for (int64_t i = 0, d = t.dim(); i < d; ++i) {
    if (t.size(i) == 0) return 0;
    last += (t.size(i) - 1) * t.stride(i);
  }
  return static_cast<size_t>((last + 1) * item_size(dtype_of(t)));
}

bool is_inference(const Tensor& t) {
  StableIValue stack[1] = {boxed(t.share())};
  call_op("aten::is_inference", stack);
  bool value = false;
  std::memcpy(&value, stack, sizeof(value));
  return value;
}

bool version(const Tensor& t, uint64_t* value) {
  StableIValue stack[1] = {boxed(t.share())};
  if (torch_call_dispatcher("aten::_version", "", stack, kTorchVersion) != 0) return false;
  *value = stack[0];
  return true;
}

// What a folded and reordered packing depends on beside the weight.
uint64_t folded_stamp(const Conv& conv, uint64_t hash) {
  const int64_t geometry[] = {conv.stride[0],   conv.stride[1],   conv.padding[0], conv.padding[1],
                              conv.dilation[0], conv.dilation[1], conv.groups};
  hash = hash_cpu(geometry, sizeof(geometry), hash);
  hash = hash_cpu(&conv.eps, sizeof(conv.eps), hash);
  for (const Tensor* t :
       {&conv.bias, &conv.bn_weight, &conv.bn_bias, &conv.running_mean, &conv.running_var}) {
    hash = t->defined()
               ? hash_cpu(t->data(), extent(*t), hash + 1 + static_cast<uint64_t>(dtype_of(*t)))
               : hash + 7;
  }
  return hash;
}

// `inference` says whether the weight is an inference tensor, which has no version, if that is
// known: asking torch takes 1 us. If it is known wrongly, because two tensors share their memory,
// the version cannot be had, and torch logs that.
uint64_t stamp_of(const Conv& conv, Form form, std::optional<bool>& inference) {
  const Tensor& w = conv.weight;
  uint64_t hash = static_cast<uint64_t>(dtype_of(w));
  for (int64_t i = 0; i < 4; ++i)
    hash = hash_cpu(w.sizes() + i, 8, hash_cpu(w.strides() + i, 8, hash));
  if (!is_tiles(form)) hash = folded_stamp(conv, hash);
  if (!inference.has_value() || *inference) inference = is_inference(w);
  uint64_t v = 0;
  if (*inference || !version(w, &v)) {
    inference = true;
    return hash_cpu(w.data(), extent(w), hash);
  }
  return sample_hash_cpu(w.data(), extent(w), kSamples, hash_cpu(&v, sizeof(v), hash));
}

constexpr Form kForms[] = {Form::folded_f32,   Form::folded_bf16,  Form::tiles,
                           Form::tile_windows, Form::split_tiles,  Form::split_windows,
                           Form::floats,       Form::float_windows};

// Tensors that must die behind the lock: freeing memory may call Python, and Python drop a packing.
using Dead = std::vector<Tensor>;

void let_go(Cache& c, Entry& e, Dead& dead) {
  c.bytes -= e.held_bytes();
  if (e.held.defined()) dead.push_back(std::move(e.held));
}

void erase(Cache& c, const Key& key, Dead& dead) {
  auto found = c.entries.find(key);
  if (found == c.entries.end()) return;
  let_go(c, found->second, dead);
  c.bytes -= found->second.bytes;
  c.entries.erase(found);
}

// Drop the longest unused entries until the cache fits, but never `keep`.
void shrink(Cache& c, const Key& keep, Dead& dead) {
  while (c.bytes > capacity() && c.entries.size() > 1) {
    auto oldest = c.entries.end();
    for (auto e = c.entries.begin(); e != c.entries.end(); ++e) {
      if (e->first == keep) continue;
      if (oldest == c.entries.end() || e->second.last_use < oldest->second.last_use) oldest = e;
    }
    erase(c, Key(oldest->first), dead);
  }
}

// A packing that serves inputs of this size, or null if one must be made. oneDNN's blocked layouts
// are for one size each. The first size gets one, further sizes when they come three times running;
// until then they share weights without blocks (`*plain`), which oneDNN reorders at every call, as
// it does eager's: 10 to 20 % more time. So random sizes never pack.
std::shared_ptr<const Packed> find(Entry& e, int64_t height, int64_t width, bool* plain) {
  for (const Layout& l : e.layouts) {
    if (l.height == height && l.width == width) return l.packed;
  }
  const bool same = e.new_height == height && e.new_width == width;
  e.new_calls = same ? e.new_calls + 1 : 1;
  e.new_height = height;
  e.new_width = width;
  if (e.layouts.empty() || e.new_calls == kCallsToPack) return nullptr;
  *plain = true;
  for (const Layout& l : e.layouts) {
    if (l.height == 0) return l.packed;
  }
  return nullptr;
}

}  // namespace

std::shared_ptr<const Packed> pack(const Conv& conv, const Sizes& in, Form form) {
  const Key key{conv.weight.data(), form};
  Cache& c = cache();
  std::optional<bool> inference;
  {
    std::lock_guard<std::mutex> lock(c.mutex);
    const auto found = c.entries.find(key);
    if (found != c.entries.end()) inference = found->second.inference;
  }
  const uint64_t stamp = stamp_of(conv, form, inference);
  bool plain = false;
  // A tile packing serves every input.
  int64_t height = is_tiles(form) ? 0 : in[2], width = is_tiles(form) ? 0 : in[3];
  {
    std::lock_guard<std::mutex> lock(c.mutex);
    auto found = c.entries.find(key);
    if (found != c.entries.end() && found->second.stamp == stamp) {
      found->second.last_use = ++c.clock;
      if (auto packed = find(found->second, height, width, &plain)) return packed;
    }
  }
  // Outside the lock: two threads may both pack, and one result is dropped.
  auto packed = make_packed(conv, in, form, plain);
  if (plain) height = width = 0;
  packings.fetch_add(1, std::memory_order_relaxed);
  const int64_t bytes =
      conv.weight.numel() *
      (form == Form::folded_bf16 || form == Form::tiles || form == Form::tile_windows ? 2 : 4);
  Tensor held = view(conv.weight, conv.weight.shape(),
                     Sizes(conv.weight.strides(), conv.weight.strides() + 4), 0);
  Dead dead;
  std::lock_guard<std::mutex> lock(c.mutex);
  Entry& e = c.entries[key];
  let_go(c, e, dead);
  if (e.stamp != stamp || e.layouts.size() >= kLayouts) {
    // Other weights now, or more sizes than are worth keeping: start over.
    c.bytes -= e.bytes;
    e = Entry{};
    e.stamp = stamp;
    e.inference = *inference;
  }
  e.layouts.push_front({height, width, packed});
  e.bytes += bytes;
  e.last_use = ++c.clock;
  e.held = std::move(held);
  c.bytes += bytes + e.held_bytes();
  shrink(c, key, dead);
  return packed;
}

}  // namespace resnet_fused

void resnet_fused_pack_drop(const void* weight) {
  using namespace resnet_fused;
  Cache& c = cache();
  Dead dead;
  std::lock_guard<std::mutex> lock(c.mutex);
  for (Form form : kForms) erase(c, {weight, form}, dead);
}

void resnet_fused_pack_watched(const void* weight) {
  using namespace resnet_fused;
  Cache& c = cache();
  Dead dead;
  std::lock_guard<std::mutex> lock(c.mutex);
  for (Form form : kForms) {
    const auto found = c.entries.find({weight, form});
    if (found != c.entries.end()) let_go(c, found->second, dead);
  }
}

int64_t resnet_fused_pack_count() { return resnet_fused::packings.load(std::memory_order_relaxed); }

int64_t resnet_fused_pack_bytes() {
  resnet_fused::Cache& c = resnet_fused::cache();
  std::lock_guard<std::mutex> lock(c.mutex);
  return c.bytes;
}
