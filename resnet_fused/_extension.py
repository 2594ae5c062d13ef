# SPDX-License-Identifier: BSD-3-Clause
"""Loads the compiled library once, says why when it cannot, and offers its C functions."""

from __future__ import annotations

import ctypes
import warnings
import weakref
from pathlib import Path

import torch
from torch import Tensor

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
        library = ctypes.CDLL(str(LIBRARY))
    except Exception as error:
        return None, f"the compiled library does not load with torch {torch.__version__}: {error}"
    library.resnet_fused_build_info.restype = ctypes.c_char_p
    library.resnet_fused_pack_drop.argtypes = [ctypes.c_void_p]
    for name in ("pack_count", "pack_bytes", "pool_bytes"):
        getattr(library, f"resnet_fused_{name}").restype = ctypes.c_int64
    return library, ""


_library, _reason = _load()
if _library is None:
    warnings.warn(
        f"resnet_fused runs on plain PyTorch, without its kernels: {_reason}", stacklevel=2
    )


def _build_info() -> dict[str, str]:
    if _library is None:
        return {}
    text: bytes = _library.resnet_fused_build_info()
    return dict(line.split("=", 1) for line in text.decode().splitlines())


# Constants, so that torch.compile can see through whoever asks.
_build = _build_info()
_cuda = bool(_build.get("nvcc")) and torch.version.cuda is not None
_onednn = _library is not None and bool(_library.resnet_fused_has_onednn())
_amx = _library is not None and bool(_library.resnet_fused_has_amx())


def available() -> bool:
    """True if the compiled library is loaded."""
    return _library is not None


def why_not() -> str:
    """Why the library is not loaded; empty if it is."""
    return _reason


def build_info() -> dict[str, str]:
    """What the library was built with: version, cxx, nvcc, archs; empty without the library."""
    return _build


def cuda() -> bool:
    """True if the library holds CUDA kernels and this torch can run them."""
    return _cuda


def onednn() -> bool:
    """True if this torch has the oneDNN convolution that the CPU ops call."""
    return _onednn


def amx() -> bool:
    """True if this CPU and its kernel let the library use AMX tiles."""
    return _amx


# Packed weights live in the library, keyed by the address of the weight they were made from. When
# that memory dies they must go too, or a long-running process would collect those of dead models.
# The storage is watched, not the tensor: a parameter gets new storage by `.half()` and the like,
# and torch.utils.swap_tensors refuses tensors that someone watches.
_seen = 0
_watched: set[int] = set()


def _forget(address: int) -> None:
    _watched.discard(address)
    if _library is not None:
        _library.resnet_fused_pack_drop(address)


def watch(*weights: Tensor | None) -> None:
    """Drop the packed forms of ``weights`` when they die; cheap if nothing was just packed."""
    global _seen
    if _library is None or (count := _library.resnet_fused_pack_count()) == _seen:
        return
    _seen = count
    for weight in weights:
        if weight is not None and (address := weight.data_ptr()) not in _watched:
            _watched.add(address)
            weakref.finalize(weight.untyped_storage(), _forget, address).atexit = False
