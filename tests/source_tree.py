# SPDX-License-Identifier: BSD-3-Clause
"""Modules of the source tree that are not installed.

The root on sys.path would hide the installed package.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]


def build_tools(name: str) -> ModuleType:
    """A module of build_tools."""
    if "build_tools" not in sys.modules:
        folder = ROOT / "build_tools"
        spec = importlib.util.spec_from_file_location(
            "build_tools", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec and spec.loader
        sys.modules["build_tools"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["build_tools"])
    return importlib.import_module(f"build_tools.{name}")


def benchmarks(name: str) -> ModuleType:
    """A module of benchmarks/; they import each other by their bare names."""
    folder = str(ROOT / "benchmarks")
    if folder not in sys.path:
        sys.path.append(folder)  # last: it has a conftest.py of its own
    return importlib.import_module(name)
