// SPDX-License-Identifier: BSD-3-Clause
// The emulator and the kernels' launch functions for Python. A launch function takes its params
// struct as keywords of the same names; pointers are numbers, or None.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "../../../csrc/kernels/add_relu.h"
#include "../../../csrc/kernels/mma_conv.h"
#include "../../../csrc/kernels/pool_linear.h"
#include "../../../csrc/kernels/stem.h"
#include "../../../csrc/kernels/wgmma_conv.h"
#include "../../../csrc/kernels/wgmma_pair.h"
#include "api.h"
#include "tensor_map.h"
#include "test_kernels.h"

namespace py = pybind11;

namespace resnet_fused {
#define RESNET_FUSED_MAYBE __attribute__((weak, visibility("hidden")))
// Weak: a library of one kernel, such as one with a seeded defect, links without the others.
RESNET_FUSED_MAYBE int launch_add_relu_cuda(const AddReluParams& p, void* stream);
RESNET_FUSED_MAYBE int launch_mma_conv(const MmaConvParams& p, void* stream);
RESNET_FUSED_MAYBE int launch_pool_linear_cuda(const PoolLinearParams& p, void* stream);
RESNET_FUSED_MAYBE int launch_relu_max_pool_cuda(const ReluMaxPoolParams& p, void* stream);
RESNET_FUSED_MAYBE int launch_stem_cuda(const StemParams& p, void* stream);
RESNET_FUSED_MAYBE int launch_wgmma_conv(const MmaConvParams& p, int multiprocessors,
                                         bool dependent, void* stream);
RESNET_FUSED_MAYBE int launch_wgmma_pair(const WgmmaPairParams& p, int multiprocessors,
                                         bool dependent, void* stream);

}  // namespace resnet_fused

std::map<std::string, emulator::TestLaunch>& emulator::test_kernels() {
  static std::map<std::string, TestLaunch> all;
  return all;
}

namespace {

using namespace resnet_fused;

DType dtype_of(const py::handle& v) {
  const std::string name = py::str(v);
  if (name == "torch.float32") return DType::f32;
  if (name == "torch.bfloat16") return DType::bf16;
  if (name == "torch.float16") return DType::f16;
  throw py::value_error("dtype must be float32, bfloat16 or float16, got " + name);
}

// Keywords, each to be taken once.
class Fields {
 public:
  explicit Fields(const py::handle& fields) : left_(py::reinterpret_borrow<py::dict>(fields)) {
    left_ = py::dict(**left_);  // a copy
  }
  py::object take(const char* name) {
    if (!left_.contains(name)) throw py::type_error(std::string("missing argument ") + name);
    return left_.attr("pop")(name);
  }
  py::object take(const char* name, py::object absent) {
    return left_.attr("pop")(name, std::move(absent));
  }
  int64_t number(const char* name) { return take(name).cast<int64_t>(); }
  DType dtype(const char* name) { return dtype_of(take(name)); }
  // Absent or None: null.
  template <typename T = void>
  T* pointer(const char* name) {
    const py::object v = take(name, py::none());
    return v.is_none() ? nullptr : reinterpret_cast<T*>(v.cast<uintptr_t>());
  }
  template <int kCount>
  void numbers(const char* name, int64_t (&to)[kCount]) {
    const auto values = take(name).cast<std::vector<int64_t>>();
    if (values.size() != kCount) {
      throw py::value_error(std::string(name) + " must have " + std::to_string(kCount) +
                            " numbers");
    }
    std::copy(values.begin(), values.end(), to);
  }
  ~Fields() noexcept(false) {
    if (!left_.empty() && std::uncaught_exceptions() == 0) {
      throw py::type_error("unknown arguments: " + std::string(py::str(py::list(left_))));
    }
  }

 private:
  py::dict left_;
};

// (pointer, dtype) or None.
ChannelVector channel_vector(const py::object& v) {
  if (v.is_none()) return {nullptr, DType::f32};
  const auto pair = v.cast<py::tuple>();
  if (pair[0].is_none()) return {nullptr, DType::f32};
  return {reinterpret_cast<const void*>(pair[0].cast<uintptr_t>()), dtype_of(pair[1])};
}

BatchNorm batch_norm(const py::object& v) {
  Fields f(v);
  BatchNorm bn{};
  bn.conv_bias = channel_vector(f.take("conv_bias", py::none()));
  bn.weight = channel_vector(f.take("weight", py::none()));
  bn.bias = channel_vector(f.take("bias", py::none()));
  bn.mean = channel_vector(f.take("mean", py::none()));
  bn.var = channel_vector(f.take("var", py::none()));
  bn.eps = f.take("eps", py::float_(1e-5)).cast<float>();
  return bn;
}

ConvSource conv_source(const py::handle& v) {
  Fields f(v);
  ConvSource s{};
  s.x = f.pointer("x");
  s.weight = f.pointer("weight");
  s.H = f.number("H");
  s.W = f.number("W");
  s.C = f.number("C");
  s.R = f.number("R");
  s.S = f.number("S");
  f.numbers("stride", s.stride);
  f.numbers("padding", s.padding);
  f.numbers("dilation", s.dilation);
  s.bn = batch_norm(f.take("bn", py::dict()));
  return s;
}

template <typename Params>
int run(int (*launch)(const Params&, void*), const Params& p) {
  if (launch == nullptr) throw py::import_error("this library has no such kernel");
  py::gil_scoped_release unlocked;
  return launch(p, nullptr);
}

int add_relu(const py::kwargs& kwargs) {
  AddReluParams p{};
  {
    Fields f(kwargs);
    p.x = f.pointer("x");
    p.y = f.pointer("y");
    p.out = f.pointer("out");
    p.n = f.number("n");
    p.dtype = f.dtype("dtype");
  }
  return run(launch_add_relu_cuda, p);
}

int relu_max_pool(const py::kwargs& kwargs) {
  ReluMaxPoolParams p{};
  {
    Fields f(kwargs);
    p.in = f.pointer("in_");
    p.out = f.pointer("out");
    p.N = f.number("N");
    p.H = f.number("H");
    p.W = f.number("W");
    p.K = f.number("K");
    p.dtype = f.dtype("dtype");
  }
  return run(launch_relu_max_pool_cuda, p);
}

int pool_linear(const py::kwargs& kwargs) {
  PoolLinearParams p{};
  {
    Fields f(kwargs);
    p.x = f.pointer("x");
    p.pooled = f.pointer<float>("pooled");
    p.weight = f.pointer("weight");
    p.bias = f.pointer("bias");
    p.out = f.pointer("out");
    p.N = f.number("N");
    p.HW = f.number("HW");
    p.C = f.number("C");
    p.K = f.number("K");
    p.x_dtype = f.dtype("x_dtype");
    p.weight_dtype = f.dtype("weight_dtype");
    const py::object bias_dtype = f.take("bias_dtype", py::none());
    p.bias_dtype = bias_dtype.is_none() ? DType::f32 : dtype_of(bias_dtype);
  }
  return run(launch_pool_linear_cuda, p);
}

int stem(const py::kwargs& kwargs) {
  StemParams p{};
  {
    Fields f(kwargs);
    p.x = f.pointer("x");
    f.numbers("x_strides", p.x_strides);
    p.norm = f.pointer<const float>("norm");
    p.weight = f.pointer("weight");
    f.numbers("weight_strides", p.weight_strides);
    p.bn = batch_norm(f.take("bn", py::dict()));
    p.out = f.pointer("out");
    p.N = f.number("N");
    p.C = f.number("C");
    p.H = f.number("H");
    p.W = f.number("W");
    p.K = f.number("K");
    p.dtype = f.dtype("dtype");
    p.most_blocks = f.take("most_blocks", py::int_(p.most_blocks)).cast<int64_t>();
  }
  return run(launch_stem_cuda, p);
}

MmaConvParams conv_params(Fields& f) {
  MmaConvParams p{};
  const auto sources = f.take("source").cast<py::list>();
  p.sources = static_cast<int>(sources.size());
  if (p.sources < 1 || p.sources > 2) throw py::value_error("source must have 1 or 2 entries");
  for (int i = 0; i < p.sources; ++i) p.source[i] = conv_source(sources[i]);
  p.residual = f.pointer("residual");
  p.out = f.pointer("out");
  p.workspace = f.pointer<float>("workspace");
  p.N = f.number("N");
  p.P = f.number("P");
  p.Q = f.number("Q");
  p.K = f.number("K");
  p.dtype = f.dtype("dtype");
  p.relu = f.take("relu").cast<bool>();
  const auto plan = f.take("plan").cast<std::vector<int>>();
  if (plan.size() != 2) throw py::value_error("plan must be (tile, splits)");
  p.plan.tile = plan[0];
  p.plan.splits = plan[1];
  return p;
}

int mma_conv(const py::kwargs& kwargs) {
  MmaConvParams p{};
  {
    Fields f(kwargs);
    p = conv_params(f);
  }
  return run(launch_mma_conv, p);
}

// How a kernel for Hopper GPUs is launched, besides its params.
struct HopperLaunch {
  int multiprocessors;
  bool dependent;
};
HopperLaunch hopper_launch(Fields& f) {
  return {f.take("multiprocessors").cast<int>(),
          f.take("dependent", py::bool_(false)).cast<bool>()};
}

template <typename Params>
int run(int (*launch)(const Params&, int, bool, void*), const Params& p, const HopperLaunch& how) {
  if (launch == nullptr) throw py::import_error("this library has no such kernel");
  py::gil_scoped_release unlocked;
  return launch(p, how.multiprocessors, how.dependent, nullptr);
}

int wgmma_conv(const py::kwargs& kwargs) {
  MmaConvParams p{};
  HopperLaunch how{};
  {
    Fields f(kwargs);
    p = conv_params(f);
    how = hopper_launch(f);
  }
  return run(launch_wgmma_conv, p, how);
}

int wgmma_pair(const py::kwargs& kwargs) {
  WgmmaPairParams p{};
  HopperLaunch how{};
  {
    Fields f(kwargs);
    Fields first(f.take("first")), last(f.take("last"));
    p.first = conv_params(first);
    p.last = conv_params(last);
    p.tile = static_cast<int>(f.number("tile"));
    how = hopper_launch(f);
  }
  return run(launch_wgmma_pair, p, how);
}

char* as_chars(unsigned char* p) { return reinterpret_cast<char*>(p); }

int test_kernel(const std::string& name, const std::vector<uintptr_t>& pointers,
                const std::vector<int64_t>& numbers, const std::vector<int64_t>& grid, int threads,
                int64_t shared_bytes, const std::vector<std::string>& maps, bool hopper,
                bool dependent) {
  emulator::TestArguments a{};
  for (size_t i = 0; i < pointers.size(); ++i) a.p[i] = reinterpret_cast<void*>(pointers.at(i));
  for (size_t i = 0; i < numbers.size(); ++i) a.n[i] = numbers.at(i);
  for (size_t i = 0; i < maps.size(); ++i) maps[i].copy(as_chars(a.map[i].bytes), 128);
  const emulator::TestShape shape{
      {grid.at(0), grid.at(1), grid.at(2)}, threads, shared_bytes, hopper, dependent};
  const auto launch = emulator::test_kernels().at(name);
  py::gil_scoped_release unlocked;
  return launch(shape, a);
}

// The driver's functions; None where they refuse.
py::object encode_tiled(int type, uintptr_t address, const std::vector<uint64_t>& dims,
                        const std::vector<uint64_t>& strides, const std::vector<uint32_t>& box,
                        const std::vector<uint32_t>& steps, int swizzle, int interleave,
                        int l2_promotion, int fill, int misplaced) {
  alignas(64) char map[256];
  const int error = resnet_fused_tensor_map_encode_tiled(
      map + misplaced, type, static_cast<uint32_t>(dims.size()), reinterpret_cast<void*>(address),
      dims.data(), strides.data(), box.data(), steps.data(), interleave, swizzle, l2_promotion,
      fill);
  return error != 0 ? py::object(py::none()) : py::bytes(map + misplaced, 128);
}
py::object encode_im2col(int type, uintptr_t address, const std::vector<uint64_t>& dims,
                         const std::vector<uint64_t>& strides, const std::vector<int>& lower,
                         const std::vector<int>& upper, uint32_t channels, uint32_t pixels,
                         const std::vector<uint32_t>& steps, int swizzle, int interleave,
                         int l2_promotion, int fill, int misplaced) {
  alignas(64) char map[256];
  const int error = resnet_fused_tensor_map_encode_im2col(
      map + misplaced, type, static_cast<uint32_t>(dims.size()), reinterpret_cast<void*>(address),
      dims.data(), strides.data(), lower.data(), upper.data(), channels, pixels, steps.data(),
      interleave, swizzle, l2_promotion, fill);
  return error != 0 ? py::object(py::none()) : py::bytes(map + misplaced, 128);
}

emulator::BufferKind kind_of(const std::string& name) {
  if (name == "input") return emulator::BufferKind::input;
  if (name == "output") return emulator::BufferKind::output;
  return emulator::BufferKind::scratch;
}

const void* at(uintptr_t address) { return reinterpret_cast<const void*>(address); }

py::list findings() {
  py::list all;
  for (const auto& f : emulator::take_findings()) {
    py::dict d;
    d["kind"] = f.kind;
    d["text"] = f.text;
    d["kernel"] = f.kernel;
    d["block"] = py::make_tuple(f.block[0], f.block[1], f.block[2]);
    d["thread"] = f.thread;
    d["program"] = f.program;
    all.append(d);
  }
  return all;
}

py::dict counters() {
  const emulator::Counters c = emulator::counters();
  py::dict d;
  d["launches"] = c.launches;
  d["blocks"] = c.blocks;
  d["barriers"] = c.barriers;
  d["mma"] = c.products;
  d["ldmatrix"] = c.matrix_loads;
  d["bank_conflicts"] = c.bank_conflicts;
  d["copied_bytes"] = c.copied_bytes;
  d["wgmma"] = c.wgmma;
  d["tensor_loads"] = c.tensor_loads;
  d["tensor_stores"] = c.tensor_stores;
  d["tensor_bytes"] = c.tensor_bytes;
  d["read_bytes"] = c.read_bytes;
  d["written_bytes"] = c.written_bytes;
  d["shared_bytes"] = c.shared_bytes;
  return d;
}

}  // namespace

PYBIND11_MODULE(emulator_native, m) {
  m.def("configure", [](uint64_t seed, bool strict, int workers) {
    emulator::configure({seed, strict, workers});
  });
  m.def("checks_every_access", emulator::checks_every_access);
  m.def("findings", findings);
  m.def("counters", counters);
  m.def("reset_counters", emulator::reset_counters);
  m.def("allocate", [](size_t bytes, const std::string& kind, size_t misalign) {
    return reinterpret_cast<uintptr_t>(emulator::allocate(bytes, kind_of(kind), misalign));
  });
  m.def("mark_elements", [](uintptr_t address, const py::bytes& units) {
    const auto view = std::string_view(units);
    emulator::mark_elements(at(address), reinterpret_cast<const unsigned char*>(view.data()),
                            view.size());
  });
  m.def("count_unwritten", [](uintptr_t p) { return emulator::count_unwritten(at(p)); });
  m.def("release_buffers", emulator::release_buffers);
  m.def("add_relu", add_relu);
  m.def("mma_conv", mma_conv);
  m.def("pool_linear", pool_linear);
  m.def("relu_max_pool", relu_max_pool);
  m.def("stem", stem);
  m.def("test_kernel", test_kernel);
  m.def("wgmma_conv", wgmma_conv);
  m.def("wgmma_pair", wgmma_pair);
  using py::literals::operator""_a;
  m.def("encode_tiled", encode_tiled, "type"_a, "address"_a, "dims"_a, "strides"_a, "box"_a,
        "steps"_a, "swizzle"_a, "interleave"_a, "l2_promotion"_a, "fill"_a, "misplaced"_a);
  m.def("encode_im2col", encode_im2col, "type"_a, "address"_a, "dims"_a, "strides"_a, "lower"_a,
        "upper"_a, "channels"_a, "pixels"_a, "steps"_a, "swizzle"_a, "interleave"_a,
        "l2_promotion"_a, "fill"_a, "misplaced"_a);
}
