# SPDX-License-Identifier: BSD-3-Clause
"""The decisions of the build (architectures, jobs, compilers) and a library of two tiny files."""

from __future__ import annotations

import os
import re
import stat
import subprocess
from pathlib import Path

import pytest

from source_tree import ROOT, build_tools

NVCC_13 = [75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121]


cuda_archs = build_tools("cuda_archs")
jobs = build_tools("jobs")
toolchain = build_tools("toolchain")
compile_ = build_tools("compile")


def script(path: Path, text: str) -> Path:
    """An executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def fake_toolkit(
    root: Path, codes: str = "sm_80\nsm_90\nsm_100\nsm_120", help_text: str = ""
) -> Path:
    """A toolkit laid out as NVIDIA's, whose nvcc only answers questions."""
    include, lib = root / "targets/x86_64-linux/include", root / "lib64"
    include.mkdir(parents=True)
    lib.mkdir()
    (include / "cuda_runtime.h").touch()
    (lib / "libcudart_static.a").touch()
    return script(
        root / "bin/nvcc",
        f"""case "$1" in
--version) echo 'Cuda compilation tools, release 13.0, V13.0.88';;
-dryrun) echo '#$ _HERE_={root}/bin'; echo '#$ TOP={root}/bin/..';;
--list-gpu-code) printf '{codes}\\n';;
--help) echo '{help_text}';;
*) exit 1;;
esac
""",
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8.0;9.0a;10.0;12.0+PTX", "8.0 9.0a 10.0 12.0+PTX"),
        ("8.0, 9.0+PTX", "8.0 9.0+PTX"),
        ("8.0 8.6\t8.9", "8.0 8.6 8.9"),
        (" ;8.0;; ", "8.0"),  # leftovers of hand-edited lists
        ("10.0f;12.1a+PTX", "10.0f 12.1a+PTX"),
        ("Ampere;Hopper", "8.0 8.6+PTX 9.0+PTX"),
        ("Ampere+Tegra", "8.7"),  # the plus sign belongs to the name
        ("8.0;8.0+PTX;8.0", "8.0+PTX"),  # nvcc rejects an architecture named twice
        ("9.0;9.0a", "9.0 9.0a"),
    ],
)
def test_arch_list_is_read(text: str, expected: str) -> None:
    """A separator, suffix or family that PyTorch accepts and we do not."""
    assert " ".join(map(str, cuda_archs.parse(text))) == expected


@pytest.mark.parametrize(
    "text", ["80", "8.0x", "sm_80", "8", "ampere", "8.0+ptx", "native", "8.0:9.0"]
)
def test_malformed_arch_is_named(text: str) -> None:
    """A typo that builds something other than what was asked for."""
    with pytest.raises(ValueError, match="is not an architecture") as caught:
        cuda_archs.parse(f"8.0;{text}")
    assert repr(text) in str(caught.value)


def test_default_archs_drop_what_nvcc_lacks() -> None:
    """An old toolkit on which the default list would fail."""
    for nothing in (None, "", " ;"):
        assert ";".join(map(str, cuda_archs.select(nothing, NVCC_13))) == cuda_archs.DEFAULT
    assert ";".join(map(str, cuda_archs.select(None, [50, 75, 80, 86, 90]))) == "8.0;9.0a"
    with pytest.raises(ValueError, match="newer CUDA toolkit"):
        cuda_archs.select(None, [50, 75])


def test_requested_arch_that_nvcc_lacks_is_rejected() -> None:
    """A request that is dropped in silence and missed on the GPU."""
    with pytest.raises(ValueError, match=r"asks for 12\.0\+PTX.*it can: 8\.0, 9\.0\)"):
        cuda_archs.select("8.0;12.0+PTX", [75, 80, 90])


def test_archs_older_than_the_kernels_are_left_out() -> None:
    """A list made for torch as a whole, with 7.5 in it, that makes the build fail."""
    assert ";".join(map(str, cuda_archs.select("7.0;Turing;8.0;9.0+PTX", NVCC_13))) == "8.0;9.0+PTX"
    with pytest.raises(ValueError, match="nothing from 8.0 on"):
        cuda_archs.select("7.0;7.5+PTX", NVCC_13)


def test_nvcc_flags_hold_machine_code_and_ptx() -> None:
    """PTX without machine code (slow first start), or machine code for the wrong number."""
    assert cuda_archs.nvcc_flags(cuda_archs.parse("9.0a;12.0+PTX")) == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


@pytest.mark.parametrize(
    ("cores", "free_gib", "max_jobs", "expected"),
    [
        (8, 64, None, 8),
        (8, 3.9, None, 3),  # memory is the limit, rounded down
        (8, 0.2, None, 1),  # never 0, which ninja takes for unlimited
        (8, None, "", 8),
        (8, 64, "2", 2),
        (2, 64, "16", 2),  # a cap, not a wish
    ],
)
def test_jobs_are_capped(
    cores: int, free_gib: float | None, max_jobs: str | None, expected: int
) -> None:
    """A limit that is not applied, so that the build runs out of memory."""
    free = None if free_gib is None else int(free_gib * jobs.GIB)
    assert jobs.job_count(cores, free, jobs.NVCC_BYTES, max_jobs) == expected


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
def test_bad_max_jobs_is_named(value: str) -> None:
    """A MAX_JOBS that is ignored or reaches ninja."""
    with pytest.raises(ValueError, match="MAX_JOBS must be a positive whole number"):
        jobs.job_count(4, None, jobs.CXX_BYTES, value)


def test_free_memory_is_the_least_of_machine_and_container(tmp_path: Path) -> None:
    """A container whose limit is overlooked, or whose file cache counts as used."""
    assert jobs.free_memory(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    assert jobs.free_memory(tmp_path) == 8000 * 1024
    cgroup = tmp_path / "sys/fs/cgroup"
    cgroup.mkdir(parents=True)
    (cgroup / "memory.current").write_text("3000000\n")
    (cgroup / "memory.max").write_text("max\n")
    assert jobs.free_memory(tmp_path) == 8000 * 1024
    (cgroup / "memory.max").write_text("4000000\n")
    assert jobs.free_memory(tmp_path) == 1000000
    (cgroup / "memory.stat").write_text("anon 5\ninactive_file 500000\n")
    assert jobs.free_memory(tmp_path) == 1500000


def test_nvcc_is_searched_in_order(tmp_path: Path) -> None:
    """CUDA_HOME overruled by PATH, or pip's toolkit not found."""
    home, path_, on_path = (script(tmp_path / n / "bin/nvcc", "") for n in ("home", "path_", "on"))
    packaged = script(tmp_path / "site/nvidia/cu13/bin/nvcc", "")
    last = script(tmp_path / "default/bin/nvcc", "")
    environ = {
        "CUDA_HOME": str(tmp_path / "home"),
        "CUDA_PATH": str(tmp_path / "path_"),
        "PATH": str(on_path.parent),
    }
    for expected in (home, path_, on_path, packaged, last):
        found = toolchain.find_nvcc(environ, [str(tmp_path / "site")], tmp_path / "default")
        assert found == expected
        expected.unlink()
    assert toolchain.find_nvcc(environ, [str(tmp_path / "site")], tmp_path / "default") is None


def test_toolkit_root_comes_from_nvcc(tmp_path: Path) -> None:
    """A wrapper script on PATH whose parent folder is no toolkit."""
    real = fake_toolkit(tmp_path / "toolkit", help_text="--compress-mode")
    wrapper = script(tmp_path / "bin/nvcc", f'exec {real} "$@"\n')
    cuda = toolchain.inspect_nvcc(wrapper, None)
    assert cuda.nvcc == wrapper and cuda.version == "13.0.88"
    assert cuda.include == tmp_path / "toolkit/targets/x86_64-linux/include"
    assert cuda.cudart == tmp_path / "toolkit/lib64/libcudart_static.a"
    assert ";".join(map(str, cuda.archs)) == cuda_archs.DEFAULT
    assert cuda.compress == ["--compress-mode=size"]


def test_older_nvcc_gets_flags_it_knows(tmp_path: Path) -> None:
    """An nvcc without --compress-mode, which would refuse the flag."""
    cuda = toolchain.inspect_nvcc(fake_toolkit(tmp_path, codes="sm_80\\nsm_90"), None)
    assert cuda.compress == ["-Xfatbin", "-compress-all"]
    assert ";".join(map(str, cuda.archs)) == "8.0;9.0a"


@pytest.mark.parametrize("missing", ["cuda_runtime.h", "libcudart_static.a"])
def test_half_a_toolkit_is_no_toolkit(tmp_path: Path, missing: str) -> None:
    """An nvcc without headers or runtime that breaks an install which could be CPU-only."""
    fake_toolkit(tmp_path)
    next(tmp_path.rglob(missing)).unlink()
    environ = {"CUDA_HOME": str(tmp_path)}
    cuda, why = toolchain.find_cuda(environ)
    assert cuda is None and missing in why
    with pytest.raises(toolchain.ToolchainError, match=f"{missing}; install the CUDA toolkit"):
        toolchain.find_cuda({**environ, "RESNET_FUSED_CUDA": "1"})


def test_cuda_can_be_forced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RESNET_FUSED_CUDA ignored, or its error without the way out."""
    fake_toolkit(tmp_path)
    assert toolchain.find_cuda({"CUDA_HOME": str(tmp_path)})[0] is not None
    off = {"CUDA_HOME": str(tmp_path), "RESNET_FUSED_CUDA": "0"}
    assert toolchain.find_cuda(off) == (None, "RESNET_FUSED_CUDA=0")
    with pytest.raises(toolchain.ToolchainError, match="must be 0 .* got 'yes'"):
        toolchain.find_cuda({"RESNET_FUSED_CUDA": "yes"})
    monkeypatch.setattr(toolchain, "find_nvcc", lambda environ: None)
    assert "no nvcc in CUDA_HOME" in toolchain.find_cuda({})[1]
    with pytest.raises(toolchain.ToolchainError) as caught:
        toolchain.find_cuda({"RESNET_FUSED_CUDA": "1"})
    assert "set CUDA_HOME" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_compiler_names_the_package(tmp_path: Path) -> None:
    """A machine without g++, where the error must say what to install."""
    with pytest.raises(toolchain.ToolchainError, match=r"apt install g\+\+"):
        toolchain.find_cxx({"PATH": str(tmp_path)})
    with pytest.raises(toolchain.ToolchainError, match="CXX=nothing-here does not run"):
        toolchain.find_cxx({"PATH": os.environ["PATH"], "CXX": "nothing-here"})


def test_cxx_may_hold_a_launcher_and_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`CXX="ccache g++-13 -m64"`, where nvcc's host compiler is neither ccache nor the flag."""
    script(tmp_path / "ccache", 'exec "$@"\n')
    script(tmp_path / "g++-13", "echo 'g++-13 13.2.0'; echo more\n")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("CXX", "ccache g++-13 -m64")
    cxx, version = toolchain.find_cxx(os.environ)
    assert version == "g++-13 13.2.0"
    assert toolchain.Toolchain(cxx, version, "ninja", None, "").host_compiler == "g++-13"


TINY_ABI = 'extern "C" int torch_answer(); extern "C" __attribute__((weak)) int torch_maybe();'
TINY_CPP = """
#include "torch_abi.h"
#ifdef RESNET_FUSED_CUDA
extern "C" int launch();
extern "C" __attribute__((visibility("default"))) int run() { return launch(); }
#endif
extern "C" __attribute__((visibility("default"))) const char* info() {
  if (torch_answer() == 42 && torch_maybe != nullptr) return nullptr;
  return __FILE__ RESNET_FUSED_VERSION RESNET_FUSED_BUILD_NVCC RESNET_FUSED_BUILD_ARCHS;
}
"""
TINY_CU = """
#include <cuda_runtime.h>
__global__ void kernel() {}
extern "C" int launch() { kernel<<<1, 1>>>(); return cudaGetLastError(); }
"""


def tiny_tree(root: Path) -> Path:
    """A csrc of three files."""
    for name, text in {
        "csrc/torch_abi.h": TINY_ABI,
        "csrc/library.cpp": TINY_CPP,
        "csrc/kernels/cuda/k.cu": TINY_CU,
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_build_is_incremental_and_survives_odd_paths(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A path with spaces that breaks the build, or a second build that compiles all again."""
    root = tiny_tree(tmp_path / "a $dir with: spaces'")
    tools = toolchain.find_toolchain({**os.environ, "RESNET_FUSED_CUDA": "0"})
    library = compile_.compile_library(root, tools, "1.2.3", 1, {})
    assert "c++ csrc/library.cpp" in capfd.readouterr().out
    binary = library.read_bytes()
    assert b"csrc/library.cpp1.2.3" in binary
    assert str(root).encode() not in binary and b"libtorch.so\0" in binary
    compile_.compile_library(root, tools, "1.2.3", 1, {})
    assert "no work to do" in capfd.readouterr().out
    (root / "csrc/library.cpp").write_text("not C++")
    with pytest.raises(toolchain.ToolchainError, match="compiling failed"):
        compile_.compile_library(root, tools, "1.2.3", 1, {})


def test_only_torch_may_be_undefined(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A forgotten function, found only when the library is loaded, and then in silence."""
    root = tiny_tree(tmp_path)
    tools = toolchain.find_toolchain({**os.environ, "RESNET_FUSED_CUDA": "0"})
    library = compile_.compile_library(root, tools, "1.2.3", 1, {})
    symbols = subprocess.run(["nm", "-D", "-u", library], capture_output=True, text=True).stdout
    # Weak stays weak: a torch without the function must still load the library.
    assert "U torch_answer\n" in symbols and "w torch_maybe\n" in symbols
    (root / "csrc/ops").mkdir()
    (root / "csrc/ops/new.cpp").write_text("int forgotten(); int caller() { return forgotten(); }")
    with pytest.raises(toolchain.ToolchainError, match="compiling failed"):
        compile_.compile_library(root, tools, "1.2.3", 1, {})
    assert "forgotten" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("archs", "built"), [("8.0;9.0a;12.0+PTX", True), ("8.0;9.0+PTX", False), ("9.0a+PTX", True)]
)
def test_kernels_for_hopper_are_for_hopper_alone(tmp_path: Path, archs: str, built: bool) -> None:
    """Code of 9.0a that another architecture's compiler refuses, or that a library without it
    believes to have.
    """
    fake_toolkit(tmp_path)
    environ = {"CUDA_HOME": str(tmp_path), "TORCH_CUDA_ARCH_LIST": archs}
    tools = toolchain.find_toolchain({**os.environ, **environ, "RESNET_FUSED_CUDA": "1"})
    text = compile_.ninja_file(ROOT, tools, "1", {})
    lines = text.splitlines()
    (at,) = [i for i, s in enumerate(lines) if "nvcc csrc/kernels/cuda/mma_conv.cu" in s]
    assert "nvccflags" not in lines[at + 1]
    hopper = [i for i, s in enumerate(lines) if "nvcc csrc/kernels/cuda/wgmma" in s]
    assert len(hopper) == (8 if built else 0)
    assert all(lines[i + 1] == "  nvccflags = $hopperflags" for i in hopper)
    (flags,) = [s for s in lines if s.startswith("hopperflags")]
    codes = re.findall(r"-gencode=\S+", flags)
    assert codes == ["-gencode=arch=compute_90a,code=sm_90a"] * built
    (cxx,) = [s for s in lines if s.startswith("flags")]
    assert ("-DRESNET_FUSED_SM90A=1" in cxx) == built


def test_cuda_source_is_compiled_and_linked(tmp_path: Path) -> None:
    """Flags or a path that nvcc refuses, or a library that needs a shared CUDA runtime."""
    tools = toolchain.find_toolchain({**os.environ, "TORCH_CUDA_ARCH_LIST": "8.0+PTX"})
    if tools.cuda is None:
        pytest.skip(f"built without CUDA here: {tools.why_no_cuda}")
    root = tiny_tree(tmp_path / "a $dir, with: spaces'")
    library = compile_.compile_library(root, tools, "1.2.3", 1, {})
    binary = library.read_bytes()
    assert f"{tools.cuda.version}8.0+PTX".encode() in binary
    assert b"libcudart.so" not in binary
    assert str(tmp_path).encode() not in binary
