# SPDX-License-Identifier: BSD-3-Clause
"""How launch.cuh launches a kernel, with a CUDA runtime that only takes notes."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = (
    "kKernel<<<grid, shape.threads, static_cast<size_t>(shape.shared_bytes), stream>>>(args...);"
)
NOTED = "noted_launch(grid.x, shape.threads, shape.shared_bytes, stream);"
RUNTIME = r"""
#pragma once
#include <cstddef>
using cudaError_t = int;
using cudaStream_t = void*;
enum { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
enum { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
struct cudaLaunchAttribute {
  int id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
struct Noted {
  int device, get_error, set_error, launch_error;  // what the runtime is to say
  int last, sets, set_bytes, launches, threads, dependent;
  const void* set_kernel;
  long long launch_bytes;
};
extern Noted noted;
inline int say(int error) {
  if (error != 0) noted.last = error;
  return error;
}
inline int cudaGetDevice(int* device) {
  *device = noted.device;
  return say(noted.get_error);
}
inline int cudaFuncSetAttribute(const void* kernel, int attribute, int value) {
  ++noted.sets;
  noted.set_kernel = kernel;
  noted.set_bytes = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize ? value : -1;
  return say(noted.set_error);
}
inline int cudaGetLastError() {
  const int last = noted.last;
  noted.last = 0;
  return last;
}
inline void noted_launch(unsigned, int threads, long long bytes, cudaStream_t) {
  ++noted.launches;
  noted.threads = threads;
  noted.launch_bytes = bytes;
  say(noted.launch_error);
}
template <typename Kernel, typename... Args>
int cudaLaunchKernelEx(const cudaLaunchConfig_t* config, Kernel, Args...) {
  noted_launch(config->gridDim.x, config->blockDim.x, config->dynamicSmemBytes, config->stream);
  noted.dependent += config->attrs->id == cudaLaunchAttributeProgrammaticStreamSerialization &&
                     config->attrs->val.programmaticStreamSerializationAllowed;
  return noted.launch_error;
}
"""
SOURCE = r"""
#include "launch.cuh"
#define SEEN __attribute__((visibility("default")))
Noted noted;
void first(int) {}
void second(int) {}
extern "C" SEEN int run(int kernel, int64_t bytes, int threads, bool hopper, bool dependent) {
  const resnet_fused::LaunchShape shape{{1, 1, 1}, threads, bytes, hopper, dependent};
  if (kernel == 0) return resnet_fused::launch<first>(shape, nullptr, 1);
  return resnet_fused::launch<second>(shape, nullptr, 1);
}
extern "C" SEEN Noted* notes() { return &noted; }
extern "C" SEEN int set_for(int kernel) {
  return noted.set_kernel == reinterpret_cast<void*>(kernel == 0 ? first : second);
}
"""
SMALL, LARGE, HOPPER = 48 * 1024, 99 * 1024, 227 * 1024
Run = Callable[..., int]


class Notes(ctypes.Structure):
    """What the runtime is to say, and what it was asked."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("device", "get_error", "set_error", "launch_error")),
        *((name, ctypes.c_int) for name in ("last", "sets", "set_bytes", "launches", "threads")),
        ("dependent", ctypes.c_int),
        ("set_kernel", ctypes.c_void_p),
        ("launch_bytes", ctypes.c_longlong),
    )


@pytest.fixture
def library(tmp_path: Path) -> ctypes.CDLL:
    """launch.cuh as it is but for the launch itself, loaded anew: it remembers its devices."""
    compiler = shutil.which("c++") or shutil.which("g++")
    assert compiler is not None, "the package was built with a C++ compiler; it must still be there"
    folder = ROOT / "csrc/kernels/cuda"
    text = (folder / "launch.cuh").read_text()
    assert text.count(LAUNCH) == 1, "write the launch anew as it is now"
    (tmp_path / "launch.cuh").write_text(text.replace(LAUNCH, NOTED))
    (tmp_path / "launch_shape.h").write_text((folder / "launch_shape.h").read_text())
    (tmp_path / "cuda_runtime.h").write_text(RUNTIME)
    (tmp_path / "launch.cpp").write_text(SOURCE)
    # Hidden, or libraries share the statics of their templates.
    flags = [
        "-std=c++17",
        "-shared",
        "-fPIC",
        "-fvisibility=hidden",
        "-D__CUDACC__",
        f"-I{tmp_path}",
    ]
    built = tmp_path / "launch.so"
    subprocess.run([compiler, *flags, str(tmp_path / "launch.cpp"), "-o", str(built)], check=True)
    loaded = ctypes.CDLL(str(built))
    run = loaded.run
    run.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int, ctypes.c_bool, ctypes.c_bool]
    loaded.run = lambda kernel, shared, threads, hopper=False, dependent=False: run(
        kernel, shared, threads, hopper, dependent
    )
    loaded.notes.restype = ctypes.POINTER(Notes)
    return loaded


def test_large_shared_memory_is_asked_for(library: ctypes.CDLL) -> None:
    """A kernel of more than 48 KB that no GPU launches; a request on every launch, or none for
    another kernel, or on another GPU.
    """
    notes = library.notes().contents
    assert library.run(0, SMALL, 64) == 0 and (notes.sets, notes.launches) == (0, 1)
    for kernel, device, asked in ((0, 0, 1), (0, 0, 1), (0, 5, 2), (1, 5, 3), (1, 5, 3)):
        notes.device = device
        assert library.run(kernel, SMALL + 16, 64) == 0
        assert notes.sets == asked and library.set_for(kernel)
    # Once, for all launches of a kernel: so the most there can be.
    assert notes.set_bytes == LARGE
    assert (notes.launches, notes.threads, notes.launch_bytes) == (6, 64, SMALL + 16)
    assert library.run(0, LARGE, 64) == 0
    for device in (64, 64, 133):  # beyond what is remembered
        notes.device = device
        before = notes.sets
        assert library.run(0, LARGE, 64) == 0 and notes.sets == before + 1


@pytest.mark.parametrize("where", ["get_error", "set_error", "launch_error"])
def test_errors_are_returned_once(library: ctypes.CDLL, where: str) -> None:
    """A failure that is launched over, or that torch finds behind its own next launch."""
    notes = library.notes().contents
    setattr(notes, where, 46)
    assert library.run(0, LARGE, 64) == 46
    assert notes.last == 0 and notes.launches == (where == "launch_error")
    setattr(notes, where, 0)
    assert library.run(0, LARGE, 64) == 0
    assert notes.sets == (2 if where == "set_error" else 1)


def test_kernels_for_hopper_alone(library: ctypes.CDLL) -> None:
    """A kernel of sm_90a that gets no more than all GPUs have, or more than a Hopper has; a launch
    that may overlap the one before although nobody asked for it, or the other way round.
    """
    notes = library.notes().contents
    assert library.run(0, HOPPER + 1, 384, hopper=True) == 9 and notes.launches == 0
    assert library.run(0, HOPPER, 384, hopper=True) == 0
    assert (notes.set_bytes, notes.launches, notes.dependent) == (HOPPER, 1, 0)
    assert library.run(0, HOPPER, 384, hopper=True, dependent=True) == 0
    assert (notes.launches, notes.launch_bytes, notes.dependent) == (2, HOPPER, 1)
    notes.launch_error = 46
    assert library.run(0, HOPPER, 384, hopper=True, dependent=True) == 46 and notes.last == 0


@pytest.mark.parametrize(("threads", "shared"), [(64, LARGE + 1), (0, 0), (1025, 0)])
def test_what_some_gpu_refuses_is_not_tried(
    library: ctypes.CDLL, threads: int, shared: int
) -> None:
    """A launch beyond the limits that works on the GPU at hand alone."""
    notes = library.notes().contents
    assert library.run(0, shared, threads) == 9
    assert (notes.sets, notes.launches, notes.last) == (0, 0, 0)
