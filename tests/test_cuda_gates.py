# SPDX-License-Identifier: BSD-3-Clause
"""Static gates of the CUDA kernels, where nvcc is there: registers, memory, instructions, build.

Every .cu file is compiled once for every architecture of the default list; all tests read that one
compilation. `tests/cuda_gates/checks.py` has the checks and the table of what each kernel may use.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cuda_gates import kernels
from cuda_gates.checks import CHECKS, TABLE, Row, ceiling, row_of
from cuda_gates.kernels import Compiled, Kernel
from source_tree import ROOT, build_tools

jobs = build_tools("jobs")
ARCHS = kernels.cuda_archs.parse(kernels.cuda_archs.DEFAULT)
SOURCES = sorted((ROOT / "csrc/kernels/cuda").glob("*.cu"))
BUILD_SECONDS = 240
BUILD_CORES = 2
BUILD_BYTES = 4 << 30
LIBRARY_BYTES = 15_000_000
needs_nvcc = pytest.mark.skipif(bool(kernels.why_not()), reason=kernels.why_not() or "there")


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """All kernels for all architectures."""
    return kernels.compile_all(SOURCES, ARCHS, tmp_path_factory.mktemp("cubins"))


# --------------------------------------------------------------------------------- the kernels
@needs_nvcc
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_every_kernel_keeps(check: Callable[[Kernel], list[str]], compiled: Compiled) -> None:
    """A kernel that spills, has no row in the table, takes more registers than its row allows..."""
    violations = [violation for kernel in compiled.kernels for violation in check(kernel)]
    assert not violations, "\n".join(violations)


@pytest.mark.skipif(kernels.tools() is None, reason="no CUDA compiler")
def test_the_disassembler_is_there() -> None:
    """Gates that are skipped for want of a package in the test extra."""
    assert kernels.why_not() == ""


@needs_nvcc
def test_the_compiler_has_nothing_to_say(compiled: Compiled) -> None:
    """A warning of ptxas, or a remark such as C7510, which means many times slower code."""
    assert compiled.notes == []


@needs_nvcc
def test_every_file_and_architecture_was_looked_at(compiled: Compiled) -> None:
    """Reports that parse to nothing, in which no check can find anything."""
    names = {f"{arch.number}{arch.suffix}" for arch in ARCHS}
    assert len(names) == 4 and {kernel.arch for kernel in compiled.kernels} == names
    by_arch = {name: {k.name for k in compiled.kernels if k.arch == name} for name in names}
    hopper = by_arch["90a"] - by_arch["80"]
    kinds = {name.partition("<")[0] for name in hopper}
    assert kinds == {"wgmma_conv_kernel", "wgmma_pair_kernel"}
    assert all(found in (by_arch["90a"], by_arch["90a"] - hopper) for found in by_arch.values())
    for source in (*SOURCES, *sorted((ROOT / "csrc/kernels/cuda").glob("*.cuh"))):
        for kernel in re.findall(r"__global__[^;{}]*?\b(\w+_kernel)\(", source.read_text()):
            assert any(re.match(rf"{kernel}\b", name) for name in by_arch["90a"]), kernel


@needs_nvcc
@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.pattern)
def test_every_row_of_the_table_speaks_for_a_kernel(row: Row, compiled: Compiled) -> None:
    """A row left over from a kernel that was renamed, whose demands nothing meets any more."""
    assert row.reason
    assert any(row_of(kernel) == row for kernel in compiled.kernels)


# ----------------------------------------------------------------------------- seeded defects
DEFECTS = """
#include <cstdint>
namespace resnet_fused {
__global__ void __launch_bounds__(256) indexed_array_kernel(const int* x, int* y, int n) {
  int local[64];
  for (int i = 0; i < 64; ++i) local[i] = x[i * n];
  for (int i = 0; i < n; ++i) local[x[i] & 63] += i;
  int sum = 0;
  for (int i = 0; i < 64; ++i) sum += local[i] * y[i];
  y[threadIdx.x] = sum;
}
template <int kMinBlocks>
__global__ void __launch_bounds__(512, kMinBlocks) crowded_kernel(const float* x, float* y, int n) {
  float v[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) v[i] = x[threadIdx.x * 64 + i];
  for (int k = 0; k < n; ++k) {
#pragma unroll
    for (int i = 0; i < 64; ++i) v[i] = v[i] * v[(i + 7) % 64] + x[k];
  }
#pragma unroll
  for (int i = 0; i < 64; ++i) y[threadIdx.x * 64 + i] = v[i];
}
template __global__ void crowded_kernel<1>(const float*, float*, int);
template __global__ void crowded_kernel<4>(const float*, float*, int);
struct Half {};
struct BFloat {};
template <typename T>
__global__ void __launch_bounds__(32) numbers_kernel(const uint32_t* x, uint32_t* y) {
  const uint32_t a = x[threadIdx.x], b = x[threadIdx.x + 32];
  uint16_t r[2];
  float d[4] = {}, m;
  uint32_t n[2];
  asm("cvt.rz.f16.f32 %0, %1;" : "=h"(r[0]) : "f"(__uint_as_float(a)));
  asm("cvt.rz.bf16.f32 %0, %1;" : "=h"(r[1]) : "f"(__uint_as_float(a)));
  asm("max.f32 %0, %1, %2;" : "=f"(m) : "f"(__uint_as_float(a)), "f"(__uint_as_float(b)));
  asm("max.f16x2 %0, %1, %2;" : "=r"(n[0]) : "r"(a), "r"(b));
  asm("max.bf16x2 %0, %1, %2;" : "=r"(n[1]) : "r"(a), "r"(b));
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, "
               "{%4}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a), "r"(b));
  y[threadIdx.x] = r[0] + r[1] + __float_as_uint(m) + n[0] + n[1] + __float_as_uint(d[0]);
}
template __global__ void numbers_kernel<Half>(const uint32_t*, uint32_t*);
template __global__ void numbers_kernel<BFloat>(const uint32_t*, uint32_t*);
__global__ void unbounded_kernel(float* y) {
  __shared__ float s[32];
  s[threadIdx.x] = y[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = s[31 - threadIdx.x];
}
}  // namespace resnet_fused
__global__ void __launch_bounds__(100) stray_kernel(float* y) { y[threadIdx.x] *= 2; }
#if __CUDA_ARCH_FEAT_SM90_ALL
__global__ void __launch_bounds__(128) serial_kernel(float* y, uint64_t a, uint64_t b) {
  float d[4] = {};
  for (int i = 0; i < 9; ++i) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0, %1, %2, %3}, %4, %5, "
                 "1, 1, 1, 0, 0;"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b));
    d[0] += y[i];
  }
  y[threadIdx.x] = d[0] + d[1] + d[2] + d[3];
}
namespace resnet_fused {
template <typename T>
__global__ void __launch_bounds__(256, 1) other_type_kernel(float* y, uint64_t a, uint64_t b) {
  float d[4];
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0, %1, %2, %3}, %4, %5, "
               "0, 1, 1, 0, 0;"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b));
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  for (int i = 0; i < 4; ++i) y[threadIdx.x * 4 + i] = d[i];
}
template __global__ void other_type_kernel<BFloat>(float*, uint64_t, uint64_t);
}  // namespace resnet_fused
#endif
"""


@pytest.fixture(scope="session")
def defective(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """Kernels that break every check, compiled as ours are, for sm_90a."""
    folder = tmp_path_factory.mktemp("defects")
    source = folder / "defects.cu"
    source.write_text(DEFECTS)
    return kernels.compile_all([source], ARCHS[1:2], folder)


@needs_nvcc
@pytest.mark.parametrize(
    ("check", "name", "row", "message"),
    [
        ("no_local_memory", "indexed_array_kernel", None, "256 bytes of stack frame"),
        ("no_local_memory", "indexed_array_kernel", None, "LDL"),
        ("no_local_memory", "crowded_kernel<4>", None, "bytes of spill stores"),
        ("no_local_memory", "crowded_kernel<4>", None, "bytes of spill loads"),
        ("no_local_memory", "crowded_kernel<4>", None, "STL"),
        ("known", "unbounded_kernel", None, "no row in the table"),
        ("known", "stray_kernel", None, "outside of namespace"),
        ("launch_bounds", "unbounded_kernel", None, "no __launch_bounds__"),
        ("launch_bounds", "stray_kernel", None, "100 threads"),
        ("few_registers", "crowded_kernel<1>", Row(r"crowded.*", 2, "why"), "at most 64 for 2"),
        ("no_static_shared", "unbounded_kernel", None, "128 bytes static"),
        ("expected_instructions", "stray_kernel", Row("stray.*", 1, "why", ("HMMA",)), "no HMMA"),
        ("right_numbers", "numbers_kernel<Half>", None, "<Half> for sm_90a: HMMA.1688.F32.BF16"),
        ("right_numbers", "numbers_kernel<BFloat>", None, "<BFloat> for sm_90a: HMMA.1688.F32"),
        ("right_numbers", "numbers_kernel<Half>", None, ": F2F.F16.F32.RZ"),
        ("right_numbers", "numbers_kernel<Half>", None, ": F2F.BF16.F32.RZ"),
        ("right_numbers", "numbers_kernel<Half>", None, ": FMNMX"),
        ("right_numbers", "numbers_kernel<Half>", None, ": HMNMX2"),
        ("right_numbers", "numbers_kernel<Half>", None, ": HMNMX2.BF16_V2"),
        ("right_numbers", "other_type_kernel<BFloat>", None, "<BFloat> for sm_90a: HGMMA.64x8x16."),
        (
            "right_numbers",
            "numbers_kernel<Half>",
            Row("numbers.*", 1, "why"),
            "no rounding to Half",
        ),
        ("expected_instructions", "stray_kernel", Row("stray.*", 1, "", (r"LDG\.E\.128",)), "LDG"),
    ],
)
def test_a_seeded_defect_is_found(
    check: str,
    name: str,
    row: Row | None,
    message: str,
    defective: Compiled,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A check that cannot fail."""
    if row:
        monkeypatch.setattr("cuda_gates.checks.row_of", lambda kernel: row)
    (kernel,) = [k for k in defective.kernels if k.name == name]
    (rule,) = [rule for rule in CHECKS if rule.__name__ == check]
    assert any(message in violation for violation in rule(kernel)), (kernel, rule(kernel))


def test_registers_that_nobody_gives_back() -> None:
    """A kernel that begins with fewer registers than its plan hands out: it would hang."""
    (rule,) = [rule for rule in CHECKS if rule.__name__ == "registers_to_hand_on"]
    kernel = Kernel("k", "90a", "k", registers=168, opcodes={"USETMAXREG.DEALLOC.CTAPOOL"})
    assert rule(kernel) == []
    assert "160 registers, 168 in the plan" in rule(replace(kernel, registers=160))[0]


@needs_nvcc
def test_serialised_tensor_cores_are_noticed(defective: Compiled) -> None:
    """A C75xx remark that the parser of the log does not see."""
    assert any(re.search(r"defects\.cu for sm_90a: .*\(C75\d\d\)", n) for n in defective.notes)


def test_the_ceiling_counts_whole_units() -> None:
    """A ceiling at which one block fewer fits than promised: 65536 / (3 x 256) is 85.3."""
    assert ceiling(256, 2) == 128
    assert ceiling(256, 3) == 80
    assert ceiling(128, 1) == 255


def test_the_reports_are_read_in_full() -> None:
    """A spill in a function that was not inlined; a frame or a number in the wrong kernel."""
    log = """ptxas info    : Compiling entry function 'one' for 'sm_80'
ptxas info    : Function properties for one
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 24 registers, used 1 barriers, 2048 bytes smem, 372 bytes cmem[0]
ptxas info    : Function properties for helper
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas warning : Value of threads per SM for entry one is out of range
ptxas info    : Compiling entry function 'two' for 'sm_80'
ptxas info    : Function properties for two
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 372 bytes cmem[0]
ptxas info    : (C7508) something was ignored
"""
    (one, two), notes = kernels.parse_ptxas(log, "80")
    assert (one.registers, one.stack, one.spill_stores, one.spill_loads) == (24, 16, 12, 8)
    assert (one.static_shared, two.static_shared, two.registers) == (2048, 0, 255)
    assert two == replace(two, stack=0, spill_stores=0, spill_loads=0)
    assert len(notes) == 2 and "out of range" in notes[0] and "C7508" in notes[1]

    ptx = """.visible .entry one(
 .param .u64 one_param_0
)
.maxntid 16, 8, 1
.minnctapersm 2
{
.visible .entry two(.param .u64 p)
{"""
    assert kernels.parse_launch_bounds(ptx) == {"one": (128, 2), "two": (0, 0)}

    sass = """.text.one:
one:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, [R2.64] ;
        /*10020*/             @UP1 HMMA.16816.F32 R4, R4, R8, RZ ;
.text.two:
        /*0000*/              @P6 STL [R1], R2 ;
"""
    found = kernels.parse_sass(sass)
    assert found == {"one": {"MOV", "LDG.E.128.CONSTANT", "HMMA.16816.F32"}, "two": {"STL"}}


@pytest.mark.parametrize(
    ("demangled", "short"),
    [
        ("void resnet_fused::(anonymous namespace)::a<float>(int, float*)", "a<float>"),
        (
            "void resnet_fused::_GLOBAL__N__ef6_7_x_cu_7::b<resnet_fused::Half, 4>(int)",
            "b<Half, 4>",
        ),
        ("void c<(resnet_fused::DType)0, true>(int (*)(int))", "c<(DType)0, true>"),
        ("plain(float*)", "plain"),
    ],
)
def test_names_are_shortened(demangled: str, short: str) -> None:
    """A row of the table that matches nothing because the compiler names a namespace anew."""
    assert kernels.short_name(demangled) == short


# ------------------------------------------------------------------------------------ the build
@needs_nvcc
def test_the_build_is_cheap(compiled: Compiled) -> None:
    """A CUDA build of more than 4 minutes on 2 cores, or of more than 4 GB, or a compiler that
    needs more memory than the build reckons with when it counts its jobs.

    In CPU seconds, of which half the time allowed is left for the host's part and for imbalance.
    """
    print(f"{compiled.cpu_seconds:.0f} CPU seconds, {compiled.peak_bytes >> 20} MiB")
    assert compiled.cpu_seconds < BUILD_SECONDS * BUILD_CORES / 2
    assert compiled.peak_bytes < jobs.NVCC_BYTES <= BUILD_BYTES // BUILD_CORES


def test_the_library_is_small() -> None:
    """An installed library, with CUDA where it was built, of more than 15 MB."""
    import resnet_fused

    library = next(Path(resnet_fused.__file__).parent.glob("_C*.so"))
    assert library.stat().st_size < LIBRARY_BYTES
