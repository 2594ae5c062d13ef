# SPDX-License-Identifier: BSD-3-Clause
"""Compiles resnet_fused/_C.abi3.so from csrc/; all else about the package is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.dist_info import dist_info

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from build_tools.compile import CUDA_SOURCES, SOURCES, compile_library, sources  # noqa: E402
from build_tools.jobs import usable_jobs  # noqa: E402
from build_tools.toolchain import Toolchain, ToolchainError, find_toolchain  # noqa: E402


def say(message: str) -> None:
    """One line to whoever builds (pip shows it with -v)."""
    print(f"resnet_fused: {message}", file=sys.stderr, flush=True)


def toolchain() -> Toolchain:
    """The compilers, or one line that says what is missing."""
    try:
        return find_toolchain(os.environ)
    except (ToolchainError, ValueError) as error:
        raise SystemExit(f"resnet_fused: error: {error}") from None


class CheckFirst(dist_info):
    """Looks for the compilers when asked for the metadata: before anything large is downloaded."""

    def run(self) -> None:
        toolchain()
        super().run()


class CleanCopy(build_py):
    """Drops the files of an earlier build, so that a deleted module does not stay in the wheel."""

    def run(self) -> None:
        shutil.rmtree(Path(self.build_lib, "resnet_fused"), ignore_errors=True)
        super().run()


class BuildLibrary(build_ext):
    """Compiles with ninja instead of setuptools' one-file-at-a-time compiler."""

    def build_extension(self, ext: Extension) -> None:
        tools = toolchain()
        if tools.cuda:
            archs = ";".join(map(str, tools.cuda.archs))
            say(f"with CUDA kernels for {archs}, by {tools.cuda.nvcc} {tools.cuda.version}")
        else:
            say(f"CPU only, without CUDA kernels: {tools.why_no_cuda}")
        try:
            jobs = usable_jobs(os.environ, with_nvcc=tools.cuda is not None)
            version = self.distribution.get_version()
            library = compile_library(ROOT, tools, version, jobs, os.environ)
        except (ToolchainError, ValueError) as error:
            raise SystemExit(f"resnet_fused: error: {error}") from None
        self.copy_file(str(library), self.get_ext_fullpath(ext.name))

    def copy_file(
        self, infile: str, outfile: str, *args: object, **kwargs: object
    ) -> tuple[str, bool]:
        """Replaces by rename: a running process keeps the library that it has mapped."""
        target = Path(outfile)
        target.parent.mkdir(parents=True, exist_ok=True)
        new = target.with_name(f"{target.name}.{os.getpid()}.new")
        shutil.copy2(infile, new)
        os.replace(new, target)
        return outfile, True


setup(
    ext_modules=[
        Extension("resnet_fused._C", sources(ROOT, SOURCES + CUDA_SOURCES), py_limited_api=True),
    ],
    cmdclass={
        "build_ext": BuildLibrary,
        "build_py": CleanCopy,
        "dist_info": CheckFirst,
    },
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
