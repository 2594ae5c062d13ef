# SPDX-License-Identifier: BSD-3-Clause
"""Loads the compiled library once, and says why when it cannot."""

from __future__ import annotations

import ctypes
import warnings
from functools import cache
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("_C.abi3.so")


def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and the reason."""
    if not LIBRARY.exists():
        where = LIBRARY.parent
        hint = (
            f"{where} is a source tree that hides the installed package: start Python elsewhere"
            if (where.parent / "setup.py").exists()
            else "reinstall with `pip install .` from the source tree"
        )
        return None, f"the compiled library {LIBRARY.name} is missing; {hint}"
    try:
        torch.ops.load_library(str(LIBRARY))
    except Exception as error:
        return None, f"the compiled library does not load with torch {torch.__version__}: {error}"
    return ctypes.CDLL(str(LIBRARY)), ""


_library, _reason = _load()
if _library is None:
    warnings.warn(f"resnet_fused runs on plain PyTorch, without its kernels: {_reason}", stacklevel=2)


def available() -> bool:
    """True if the compiled library is loaded."""
    return _library is not None


def why_not() -> str:
    """Why the library is not loaded; empty if it is."""
    return _reason


@cache
def build_info() -> dict[str, str]:
    """What the library was built with: version, cxx, nvcc, archs; empty without the library."""
    if _library is None:
        return {}
    _library.resnet_fused_build_info.restype = ctypes.c_char_p
    text: bytes = _library.resnet_fused_build_info()
    return dict(line.split("=", 1) for line in text.decode().splitlines())


@cache
def cuda() -> bool:
    """True if the library holds CUDA kernels and this torch can run them."""
    return bool(build_info().get("nvcc")) and torch.version.cuda is not None


@cache
def onednn() -> bool:
    """True if this torch has the oneDNN convolution that the CPU ops call."""
    return _library is not None and bool(_library.resnet_fused_has_onednn()) and torch.backends.mkldnn.is_available()
