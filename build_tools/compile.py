# SPDX-License-Identifier: BSD-3-Clause
"""Writes build.ninja and runs ninja: csrc/ becomes one shared library.

PyTorch is neither imported nor linked. The linker gets a stand-in libtorch.so with an empty
function for each name in csrc/torch_abi.h; at run time the loader takes the libtorch that
``import torch`` has loaded.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from build_tools.cuda_archs import Arch, nvcc_flags
from build_tools.toolchain import Cuda, Toolchain, ToolchainError

BUILD = Path("build/native")  # kept between builds, so that only changed files are compiled
LIBRARY = "_C.abi3.so"
STANDIN = BUILD / "standin" / "libtorch.cpp"
TORCH_ABI = "csrc/torch_abi.h"
SOURCES = ("csrc/*.cpp", "csrc/ops/*.cpp", "csrc/kernels/cpu/*.cpp")
CUDA_SOURCES = ("csrc/kernels/cuda/*.cu",)
HOPPER_STEM = "wgmma"  # files of CUDA kernels that begin so are for compute capability 9.0a alone
COMMON = ["-std=c++17", "-O3", "-DNDEBUG", "-Icsrc"]  # baseline code: no -march=native
HOST = ["-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]  # nvcc has to pass these on
CUDA_DEFINE = "-DRESNET_FUSED_CUDA=1"
HOPPER_DEFINE = "-DRESNET_FUSED_SM90A=1"  # the kernels for Hopper GPUs are there

RULES = """\
rule cxx
  command = $cxx $flags $defines -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = c++ $in
rule nvcc
  command = $nvcc $nvccflags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = nvcc $in
rule standin
  command = $cxx -shared -nostdlib -fPIC $in -Wl,-soname,libtorch.so -o $out
  description = stand-in $out
rule link
  command = $cxx -shared $in -o $out $ldflags
  description = link $out
"""


def sources(root: Path, patterns: tuple[str, ...]) -> list[str]:
    """The files under ``root`` that match, relative to it and sorted."""
    return sorted(
        str(path.relative_to(root)) for pattern in patterns for path in root.glob(pattern)
    )


def standin_source(torch_abi: str) -> str:
    """C++ that defines, empty, every function of libtorch that the header's text declares."""
    names = sorted(set(re.findall(r"\b((?:aoti_)?torch_\w+)\(", torch_abi)))
    return "".join(f'extern "C" void {name}() {{}}\n' for name in names)


def _write(file: Path, text: str) -> None:
    """Write unless it is there already, so that ninja sees a change only where there is one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists() or file.read_text() != text:
        file.write_text(text)


def _path(path: str | Path) -> str:
    """A path in a build statement."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _words(words: list[str]) -> str:
    """Shell words in a variable."""
    return " ".join(shlex.quote(word) for word in words).replace("$", "$$")


def _build(rule: str, target: Path, inputs: list[str], implicit: str = "", **variables: str) -> str:
    tail = f" | {implicit}" if implicit else ""
    lines = [f"build {_path(target)}: {rule} {' '.join(map(_path, inputs))}{tail}"]
    return "\n".join(lines + [f"  {name} = {value}" for name, value in variables.items()]) + "\n"


def _info(tools: Toolchain, version: str) -> list[str]:
    """Build information for csrc/*.cpp only, so that a new version recompiles little."""
    texts = {
        "VERSION": version,
        "BUILD_CXX": tools.cxx_version.replace('"', "'"),
        "BUILD_NVCC": tools.cuda.version if tools.cuda else "",
        "BUILD_ARCHS": ";".join(map(str, tools.cuda.archs)) if tools.cuda else "",
    }
    return [f'-DRESNET_FUSED_{name}="{text}"' for name, text in texts.items()]


def archs_of(source: str, archs: Sequence[Arch]) -> list[Arch]:
    """The architectures that a file of CUDA kernels is compiled for."""
    if not Path(source).name.startswith(HOPPER_STEM):
        return list(archs)
    return [Arch(90, "a", False)] if any(a[:2] == (90, "a") for a in archs) else []


def cuda_flags(tools: Toolchain, cuda: Cuda, source: str) -> list[str]:
    """nvcc's flags for one file of csrc/kernels/cuda."""
    passed_on = [f"-Xcompiler={flag}" for flag in HOST]
    flags = [*COMMON, CUDA_DEFINE, "-ccbin", tools.host_compiler]
    return [*flags, *cuda.compress, *nvcc_flags(archs_of(source, cuda.archs)), *passed_on]


def ninja_file(root: Path, tools: Toolchain, version: str, environ: Mapping[str, str]) -> str:
    """The text of build.ninja; every path in it is relative to ``root`` where it can be."""
    cuda = tools.cuda
    # Only debug information, if CXXFLAGS asks for it, would name the folder.
    flags = [*COMMON, *HOST, f"-ffile-prefix-map={root}=."]
    ldflags = [
        "-Wl,--no-as-needed",
        f"-L{STANDIN.parent}",
        "-ltorch",
        "-Wl,--as-needed",
        "-Wl,--exclude-libs,ALL",
        "-Wl,-z,defs",  # a missing function fails here, not when the library is loaded
    ]
    if cuda:
        flags += [CUDA_DEFINE, "-isystem", str(cuda.include)]
        flags += [HOPPER_DEFINE] if archs_of(HOPPER_STEM, cuda.archs) else []
        ldflags += [str(cuda.cudart), "-ldl", "-lrt", "-lpthread"]
    flags += shlex.split(environ.get("CXXFLAGS", ""))
    ldflags += shlex.split(environ.get("LDFLAGS", ""))
    text = [
        f"builddir = {BUILD}\n",
        f"cxx = {_words(tools.cxx)}\n",
        f"flags = {_words(flags)}\n",
        f"ldflags = {_words(ldflags)}\n",
    ]
    if cuda:
        text += [
            f"nvcc = {_words([str(cuda.nvcc)])}\n",
            f"nvccflags = {_words(cuda_flags(tools, cuda, ''))}\n",
            f"hopperflags = {_words(cuda_flags(tools, cuda, HOPPER_STEM))}\n",
        ]
    text.append(RULES)
    objects = []
    for source in sources(root, SOURCES):
        objects.append(f"{BUILD}/{source}.o")
        top = str(Path(source).parent) == "csrc"
        text.append(
            _build(
                "cxx",
                Path(objects[-1]),
                [source],
                defines=_words(_info(tools, version)) if top else "",
            )
        )
    for source in sources(root, CUDA_SOURCES) if cuda else []:
        if not cuda or not archs_of(source, cuda.archs):
            continue
        objects.append(f"{BUILD}/{source}.o")
        hopper = Path(source).name.startswith(HOPPER_STEM)
        own = {"nvccflags": "$hopperflags"} if hopper else {}
        text.append(_build("nvcc", Path(objects[-1]), [source], **own))
    standin = STANDIN.with_name("libtorch.so")
    text.append(_build("standin", standin, [str(STANDIN)]))
    text.append(_build("link", BUILD / LIBRARY, objects, implicit=_path(standin)))
    return "".join(text)


def compile_library(
    root: Path, tools: Toolchain, version: str, jobs: int, environ: Mapping[str, str]
) -> Path:
    """Compile what has changed and return the library.

    Raises:
        ToolchainError: a compiler failed; its messages are on the terminal.
    """
    _write(root / STANDIN, standin_source((root / TORCH_ABI).read_text()))
    _write(root / BUILD / "build.ninja", ninja_file(root, tools, version, environ))
    done = subprocess.run(
        [tools.ninja, "-C", str(root), "-f", str(BUILD / "build.ninja"), "-j", str(jobs)]
    )
    if done.returncode != 0:
        hint = "; RESNET_FUSED_CUDA=0 builds without CUDA" if tools.cuda else ""
        raise ToolchainError(f"compiling failed, see the first error above{hint}")
    return root / BUILD / LIBRARY
