# SPDX-License-Identifier: BSD-3-Clause
"""Finds the C++ compiler, ninja and nvcc; says in one line what is missing and how to mend it."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from build_tools import cuda_archs

LAUNCHERS = ("ccache", "sccache", "distcc")


class ToolchainError(Exception):
    """Something needed to build is missing; the message names the remedy."""


class Cuda(NamedTuple):
    """A working nvcc and what its objects are linked with."""

    nvcc: Path
    version: str
    include: Path
    cudart: Path
    archs: list[cuda_archs.Arch]
    compress: list[str]


class Toolchain(NamedTuple):
    """What the build calls; ``cuda`` is None for a CPU-only build, ``why_no_cuda`` says why."""

    cxx: list[str]
    cxx_version: str
    ninja: str
    cuda: Cuda | None
    why_no_cuda: str

    @property
    def host_compiler(self) -> str:
        """The compiler itself, without a launcher such as ccache and without flags."""
        return next(word for word in self.cxx if Path(word).name not in LAUNCHERS)


def _output(command: list[str]) -> str:
    """What a command prints; empty if it fails or cannot be started."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout


def find_cxx(environ: Mapping[str, str]) -> tuple[list[str], str]:
    """The C++ compiler's command and the first line of its ``--version``.

    Raises:
        ToolchainError: no compiler, or CXX names none.
    """
    path = environ.get("PATH")
    given = environ.get("CXX")
    for command in [shlex.split(given)] if given else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0], path=path):
            version = _output([*command, "--version"])
            if version:
                return command, version.splitlines()[0]
    if given:
        raise ToolchainError(f"CXX={given} does not run; set CXX to a C++17 compiler or unset it")
    raise ToolchainError(
        "no C++ compiler found; install one (Debian, Ubuntu: apt install g++; Fedora, RHEL: "
        "dnf install gcc-c++; conda: conda install cxx-compiler) or set CXX"
    )


def find_ninja(environ: Mapping[str, str]) -> str:
    """The ninja executable: of the Python package, else on PATH."""
    try:
        import ninja
    except ImportError:
        pass
    else:
        packaged = Path(ninja.BIN_DIR, "ninja")
        if ninja.BIN_DIR and packaged.is_file():
            return str(packaged)
    found = shutil.which("ninja", path=environ.get("PATH"))
    if found is None:
        raise ToolchainError(
            "ninja not found; install it with pip install ninja, or build with isolation"
        )
    return found


def _nvcc_candidates(
    environ: Mapping[str, str], site_packages: list[str], default: Path
) -> Iterator[Path]:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if environ.get(name):
            yield Path(environ[name], "bin", "nvcc")
    on_path = shutil.which("nvcc", path=environ.get("PATH"))
    if on_path:
        yield Path(on_path)
    for folder in site_packages:
        yield from sorted(Path(folder).glob("nvidia/cu*/bin/nvcc"), reverse=True)
    yield default / "bin" / "nvcc"


def find_nvcc(
    environ: Mapping[str, str],
    site_packages: list[str] | None = None,
    default: Path = Path("/usr/local/cuda"),
) -> Path | None:
    """The first nvcc of CUDA_HOME, CUDA_PATH, PATH, pip's nvidia packages and /usr/local/cuda."""
    if site_packages is None:
        # Under pip's build isolation sys.path lacks the target's packages; sysconfig names them.
        site_packages = list(dict.fromkeys([sysconfig.get_path("purelib"), *sys.path]))
    candidates = _nvcc_candidates(environ, site_packages, default)
    return next((path for path in candidates if path.is_file()), None)


def inspect_nvcc(nvcc: Path, arch_list: str | None) -> Cuda:
    """Ask ``nvcc`` where its toolkit is and what it can compile.

    Raises:
        ToolchainError: it does not run, or its headers or static runtime are not there.
        ValueError: ``arch_list`` cannot be met.
    """
    release = re.search(r"V(\d+[\d.]+)", _output([str(nvcc), "--version"]))
    # The root comes from nvcc itself: it may be a wrapper script, or lie in a pip package.
    top = re.search(
        r"^#\$ TOP=(.+)$", _output([str(nvcc), "-dryrun", "-c", "-x", "cu", "/dev/null"]), re.M
    )
    if release is None or top is None:
        raise ToolchainError(f"{nvcc} does not run")
    root = Path(top[1].strip()).resolve()
    targets = sorted(root.glob("targets/*"))
    includes = [folder / "include" for folder in (*targets, root)]
    libraries = [folder / lib for folder in (root, *targets) for lib in ("lib64", "lib")]
    include = next((folder for folder in includes if (folder / "cuda_runtime.h").is_file()), None)
    cudart = next(
        (folder for folder in libraries if (folder / "libcudart_static.a").is_file()), None
    )
    if include is None or cudart is None:
        missing = "cuda_runtime.h" if include is None else "libcudart_static.a"
        raise ToolchainError(f"{nvcc} is there, but its toolkit {root} has no {missing}")
    numbers = [
        int(number) for number in re.findall(r"sm_(\d+)", _output([str(nvcc), "--list-gpu-code"]))
    ]
    # Older toolkits compress too, with another flag.
    has_modes = "--compress-mode" in _output([str(nvcc), "--help"])
    compress = ["--compress-mode=size"] if has_modes else ["-Xfatbin", "-compress-all"]
    archs = cuda_archs.select(arch_list, numbers)
    return Cuda(nvcc, release[1], include, cudart / "libcudart_static.a", archs, compress)


def find_cuda(environ: Mapping[str, str]) -> tuple[Cuda | None, str]:
    """The CUDA compiler, or None and the reason; RESNET_FUSED_CUDA=0 or 1 forces.

    Raises:
        ToolchainError: RESNET_FUSED_CUDA=1 cannot be met, or has another value.
        ValueError: TORCH_CUDA_ARCH_LIST cannot be met.
    """
    forced = environ.get("RESNET_FUSED_CUDA", "")
    if forced not in ("", "0", "1"):
        raise ToolchainError(
            f"RESNET_FUSED_CUDA must be 0 (CPU only), 1 (CUDA) or unset, got {forced!r}"
        )
    if forced == "0":
        return None, "RESNET_FUSED_CUDA=0"
    nvcc = find_nvcc(environ)
    try:
        if nvcc is None:
            raise ToolchainError(
                "no nvcc in CUDA_HOME, CUDA_PATH, PATH, pip's nvidia packages or /usr/local/cuda"
            )
        return inspect_nvcc(nvcc, environ.get("TORCH_CUDA_ARCH_LIST")), ""
    except ToolchainError as error:
        if forced == "1":
            raise ToolchainError(
                f"RESNET_FUSED_CUDA=1, but {error}; install the CUDA toolkit and set CUDA_HOME to "
                "it, or unset RESNET_FUSED_CUDA for a CPU-only build"
            ) from error
        return None, str(error)


def find_toolchain(environ: Mapping[str, str]) -> Toolchain:
    """All of the above.

    Raises:
        ToolchainError: something needed is missing.
        ValueError: TORCH_CUDA_ARCH_LIST cannot be met.
    """
    if sys.platform != "linux":
        raise ToolchainError(f"resnet_fused builds on Linux only; this is {sys.platform}")
    cxx, cxx_version = find_cxx(environ)
    ninja = find_ninja(environ)
    cuda, why_no_cuda = find_cuda(environ)
    return Toolchain(cxx, cxx_version, ninja, cuda, why_no_cuda)
