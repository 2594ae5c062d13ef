# SPDX-License-Identifier: BSD-3-Clause
"""Compiles kernels and the emulator's runtime into Python modules, with ninja.

One folder per checkout under the system's temporary folder keeps the objects, so that a later
session compiles only what has changed. Every module is linked from the same runtime objects and its
own kernel objects.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ninja
import pybind11

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
KERNELS = ROOT / "csrc" / "kernels"
RUNTIME = HERE / "runtime"
CXX = shlex.split(os.environ.get("CXX", "c++"))

COMMON = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-g1", "-Wall", "-Wextra"]
KERNEL = ["-x", "c++", f"-I{HERE / 'include'}", "-fno-strict-aliasing", "-Wno-unknown-pragmas"]
KERNEL += ["-Wno-psabi"]  # a note on passing tensor maps by value
# For the compiler's call-backs into the runtime; neither sanitizer's own library is linked.
INSTRUMENT = [
    "-fsanitize=thread",
    "--param=tsan-instrument-func-entry-exit=0",
    "-fsanitize=alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero",
]
LINK = ["-shared", "-Wl,-Bsymbolic", "-lpthread", "-ldl"]


class BuildError(Exception):
    """A kernel does not compile; the message is the compiler's."""


def folder() -> Path:
    """Where this checkout's objects are."""
    key = hashlib.sha256(f"{ROOT}{sys.executable}{CXX}".encode()).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"resnet_fused_emulator_{os.getuid()}_{key}"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def cxxflags(checks: bool, optimize: str = "-O2") -> list[str]:
    """How a file of kernels is compiled for the emulator."""
    return [*COMMON, *KERNEL, optimize, *(INSTRUMENT if checks else [])]


def runtime_flags() -> list[str]:
    """How the runtime and its bindings are compiled: never instrumented."""
    includes = [pybind11.get_include(), sysconfig.get_paths()["include"]]
    quiet = [word for folder in includes for word in ("-isystem", folder)]
    # Many of these libraries are loaded at once, and the room for static thread-local variables is
    # small: so they are found through descriptors. In pybind11, NDEBUG saves one.
    local = ["-DNDEBUG", *(["-mtls-dialect=gnu2"] if platform.machine() == "x86_64" else [])]
    return [*COMMON, "-O3", *local, f"-I{HERE / 'include'}", f"-I{RUNTIME}", *quiet]


def runtime_sources() -> list[Path]:
    """The emulator itself, without its Python bindings."""
    return sorted(path for path in RUNTIME.glob("*.cpp") if path.name != "bindings.cpp")


def kernel_sources(kernels: Path = KERNELS) -> list[Path]:
    """Every file of CUDA kernels."""
    return sorted((kernels / "cuda").glob("*.cu"))


@dataclass(frozen=True)
class Object:
    """A file to compile."""

    source: Path
    target: Path
    flags: tuple[str, ...]


def _path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def compile_objects(objects: Sequence[Object], build: Path) -> dict[Path, str]:
    """Compile what has changed; returns the targets that failed with what was said.

    A file that does not compile leaves no object and does not keep the others from being compiled.
    """
    flags = sorted({o.flags for o in objects})
    text = [
        f"builddir = {_path(build)}\n",
        "".join(
            f"rule cxx{i}\n"
            f"  command = {shlex.join(CXX)} {shlex.join(f).replace('$', '$$')} "
            "-MMD -MF $out.d -c $in -o $out\n"
            "  depfile = $out.d\n  deps = gcc\n"
            for i, f in enumerate(flags)
        ),
    ]
    for o in objects:
        rule = f"cxx{flags.index(o.flags)}"
        text.append(f"build {_path(o.target)}: {rule} {_path(o.source)}\n")
        o.target.parent.mkdir(parents=True, exist_ok=True)
    file = build / "build.ninja"
    file.write_text("".join(text))
    program = str(Path(ninja.BIN_DIR) / "ninja")
    done = subprocess.run(
        [program, "-k", "0", "-f", str(file), "-j", str(os.cpu_count() or 1)],
        capture_output=True,
        text=True,
    )
    if done.returncode == 0:
        return {}
    failed: dict[Path, str] = {}
    for part in done.stdout.split("FAILED: ")[1:]:
        words = part.split("\n", 1)[0].split()
        failed |= {o.target: part for o in objects if str(o.target) in words}
    if not failed:
        raise BuildError(done.stdout + done.stderr)
    for target in failed:
        target.unlink(missing_ok=True)
    return failed


def link(objects: Sequence[Path], library: Path) -> None:
    """Link unless the library is newer than all of its objects, and made of the same ones."""
    names = library.with_suffix(".objects")
    listed = "\n".join(map(str, objects))
    if library.exists() and names.exists() and names.read_text() == listed:
        newest = max(o.stat().st_mtime_ns for o in objects)
        if library.stat().st_mtime_ns > newest:
            return
    library.parent.mkdir(parents=True, exist_ok=True)
    new = library.with_suffix(".new")
    done = subprocess.run(
        [*CXX, *map(str, objects), *LINK, "-o", str(new)], capture_output=True, text=True
    )
    if done.returncode != 0:
        raise BuildError(done.stderr)
    os.replace(new, library)  # a process that has the old one loaded keeps it
    names.write_text(listed)
