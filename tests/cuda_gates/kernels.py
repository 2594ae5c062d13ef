# SPDX-License-Identifier: BSD-3-Clause
"""Compiles CUDA files to machine code and reads what became of each kernel.

Sources of a kernel's facts: ptxas's report (registers, memory), the PTX (launch bounds), nvdisasm
(instructions). The parsers take text, so that they can be tested without a compiler.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from source_tree import ROOT, build_tools

toolchain = build_tools("toolchain")
cuda_archs = build_tools("cuda_archs")
compile_ = build_tools("compile")


@dataclass
class Kernel:
    """One kernel as compiled for one architecture."""

    name: str  # demangled, without namespaces and parameters
    arch: str
    symbol: str
    registers: int = 0
    stack: int = 0  # bytes
    spill_stores: int = 0
    spill_loads: int = 0
    static_shared: int = 0
    threads: int = 0  # of __launch_bounds__; 0 if it has none
    min_blocks: int = 0
    opcodes: set[str] = field(default_factory=set)  # with modifiers: LDG.E.128.CONSTANT

    def __str__(self) -> str:
        return f"{self.name} for sm_{self.arch}"


@dataclass
class Compiled:
    """What the compiler made of all files, and what that took."""

    kernels: list[Kernel]
    notes: list[str]  # warnings of ptxas and its C75xx remarks
    cpu_seconds: float
    peak_bytes: int  # of the largest process


@cache
def tools() -> Any:
    """The build's compilers for the default list of architectures; None if some are missing."""
    environ = {name: text for name, text in os.environ.items() if name != "RESNET_FUSED_CUDA"}
    try:
        found = toolchain.find_toolchain({**environ, "TORCH_CUDA_ARCH_LIST": ""})
    except toolchain.ToolchainError:
        return None
    return found if found.cuda else None


def why_not() -> str:
    """Why nothing can be compiled and disassembled here; empty if it can."""
    if tools() is None:
        return "no CUDA compiler"
    if find_nvdisasm(tools().cuda.nvcc) is None:
        return "no nvdisasm: pip install nvidia-cuda-nvdisasm"
    return "" if shutil.which("c++filt") else "no c++filt: install binutils"


def find_nvdisasm(nvcc: Path) -> Path | None:
    """The disassembler of the toolkit, of pip's package or of Triton's."""
    packages = Path(sysconfig.get_path("purelib"))
    on_path = shutil.which("nvdisasm")
    candidates = [
        nvcc.with_name("nvdisasm"),
        *sorted(packages.glob("nvidia/cu*/bin/nvdisasm"), reverse=True),
        packages / "triton/backends/nvidia/bin/nvdisasm",
        *([Path(on_path)] if on_path else []),
    ]
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


# ------------------------------------------------------------------------------------- parsers
def parse_ptxas(log: str, arch: str) -> tuple[list[Kernel], list[str]]:
    """The kernels and the complaints in what `ptxas -v` prints."""
    kernels: list[Kernel] = []
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            kernels.append(Kernel(match[1], arch, match[1]))
        elif match := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            # Functions that were not inlined report here too; their frames count for the kernel.
            if not kernels:
                raise ValueError(f"a stack frame before any kernel: {line}")
            kernels[-1].stack += int(match[1])
            kernels[-1].spill_stores += int(match[2])
            kernels[-1].spill_loads += int(match[3])
        elif match := re.search(r"Used (\d+) registers", line):
            kernels[-1].registers = int(match[1])
            shared = re.search(r"(\d+) bytes smem", line)
            kernels[-1].static_shared = int(shared[1]) if shared else 0
    notes = [
        line.strip()
        for line in log.splitlines()
        if re.search(r"\(C7\d{3}\)|\bwarning\b|Potential Performance Loss", line)
    ]
    return kernels, notes


def parse_launch_bounds(ptx: str) -> dict[str, tuple[int, int]]:
    """Symbol -> threads per block and blocks per multiprocessor that __launch_bounds__ names."""
    bounds = {}
    for match in re.finditer(r"\.entry (\w+)\s*\((.*?)\)([^{]*)\{", ptx, re.S):
        directives = match[3]
        threads = re.search(r"\.maxntid (\d+)(?:, (\d+))?(?:, (\d+))?", directives)
        blocks = re.search(r"\.minnctapersm (\d+)", directives)
        count = 1
        for number in threads.groups() if threads else (0,):
            count *= int(number) if number is not None else 1
        bounds[match[1]] = count, int(blocks[1]) if blocks else 0
    return bounds


def parse_sass(text: str) -> dict[str, set[str]]:
    """Symbol -> the opcodes of its code."""
    found: dict[str, set[str]] = {}
    opcodes: set[str] = set()
    for line in text.splitlines():
        if match := re.match(r"\.text\.(\w+):", line):
            opcodes = found.setdefault(match[1], set())
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
            opcodes.add(match[1])
    return found


def short_name(demangled: str) -> str:
    """`stem_kernel<Half>` of `void resnet_fused::(anonymous namespace)::stem_kernel<...>(...)`."""
    text = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+::|resnet_fused::", "", demangled)
    text = re.sub(r"^void ", "", text)
    depth = 0
    for at, letter in enumerate(text):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0:
            return text[:at]
    return text


def demangle(symbols: Sequence[str]) -> list[str]:
    """Readable names."""
    done = subprocess.run(
        ["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


# ------------------------------------------------------------------------------------ compiling
# A new process counts the memory of the one that made it as its own peak, and pytest's is large. So
# a small process stands between, and writes what its children needed.
_MEASURE = """
import json, resource, subprocess, sys
status = subprocess.call(sys.argv[2:])
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
with open(sys.argv[1], "w") as file:
    json.dump([usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024], file)
sys.exit(status)
"""


def _compile_one(source: Path, arch: Any, folder: Path) -> Compiled:
    """One file for one architecture, with the build's own flags; raises if it does not compile."""
    one = tools().cuda._replace(archs=[arch._replace(ptx=False)], compress=[])
    name = f"{arch.number}{arch.suffix}"
    keep = folder / f"{source.stem}.{name}"
    keep.mkdir(parents=True)
    cubin = keep / "out.cubin"
    command = [
        str(one.nvcc),
        *compile_.cuda_flags(tools(), one, source.name),
        "-cubin",
        "-Xptxas=-v",
    ]
    command += ["--keep", "--keep-dir", str(keep), str(source), "-o", str(cubin)]
    measured = keep / "measured.json"
    measure = [sys.executable, "-I", "-S", "-c", _MEASURE, str(measured)]
    with (keep / "log").open("w") as log:
        process = subprocess.run(
            measure + command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=False
        )
    text = (keep / "log").read_text()
    if process.returncode != 0:
        raise RuntimeError(f"{source.name} does not compile for sm_{name}:\n{text}")

    kernels, notes = parse_ptxas(text, name)
    bounds = parse_launch_bounds(next(keep.glob("*.ptx")).read_text())
    nvdisasm = find_nvdisasm(one.nvcc)
    sass = subprocess.run([str(nvdisasm), "-c", str(cubin)], capture_output=True, text=True)
    if sass.returncode != 0:
        raise RuntimeError(f"{nvdisasm} {cubin}: {sass.stderr}")
    code = parse_sass(sass.stdout)
    for kernel in kernels:
        kernel.threads, kernel.min_blocks = bounds[kernel.symbol]
        kernel.opcodes = code[kernel.symbol]
    for kernel, full in zip(kernels, demangle([k.symbol for k in kernels]), strict=True):
        kernel.name = short_name(full)
    seconds, peak = json.loads(measured.read_text())
    notes = [f"{source.name} for sm_{name}: {note}" for note in notes]
    return Compiled(kernels, notes, seconds, peak)


def compile_all(sources: Iterable[Path], archs: Iterable[Any], folder: Path) -> Compiled:
    """Every file for every architecture (of `cuda_archs.Arch`) that the build compiles it for.

    As many at once as there are CPUs; the largest files go first, so that the last one to end is a
    small one.
    """
    archs = list(archs)
    ordered = sorted(sources, key=lambda path: path.stat().st_size, reverse=True)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        tasks = [
            pool.submit(_compile_one, source, arch, folder)
            for source in ordered
            for arch in compile_.archs_of(source.name, archs)
        ]
        done = [task.result() for task in tasks]
    return Compiled(
        [kernel for one in done for kernel in one.kernels],
        [note for one in done for note in one.notes],
        sum(one.cpu_seconds for one in done),
        max((one.peak_bytes for one in done), default=0),
    )
