# SPDX-License-Identifier: BSD-3-Clause
"""Loads the compiled library once, says why when it cannot, and offers its C functions."""

from __future__ import annotations

import ctypes
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

_F = TypeVar("_F", bound=Callable[..., Any])

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
    for name in ("drop", "watched"):
        getattr(library, f"resnet_fused_pack_{name}").argtypes = [ctypes.c_void_p]
    for name in ("pack_count", "pack_bytes", "pool_bytes"):
        getattr(library, f"resnet_fused_{name}").restype = ctypes.c_int64
    if hasattr(library, "resnet_fused_cuda_error_text"):
        library.resnet_fused_cuda_error_text.restype = ctypes.c_char_p
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
_avx512 = _library is not None and bool(_library.resnet_fused_has_avx512())


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


def hopper() -> str:
    """What of the library's kernels for Hopper GPUs is on, as RESNET_FUSED_HOPPER says: "1" for
    those of single convolutions, "pairs" for those that run two as one as well, "" for none.
    """
    if not hasattr(_library, "resnet_fused_hopper"):
        return ""
    return ("", "1", "pairs")[_library.resnet_fused_hopper()]  # type: ignore[union-attr]


def set_batch_invariant(on: bool) -> None:
    """Tell the ops whether the order of sums may depend on the batch."""
    if _library is not None:
        _library.resnet_fused_set_batch_invariant(int(on))


def onednn() -> bool:
    """True if this torch has the oneDNN convolution that the CPU ops call."""
    return _onednn


def amx() -> bool:
    """True if this CPU and its kernel let the library use AMX tiles."""
    return _amx


def avx512() -> bool:
    """True if this CPU and its kernel let the library use AVX-512."""
    return _avx512


def compiled_as_constant(function: _F) -> _F:
    """``torch.compiler.assume_constant_result``, which would import the compiler: 0.8 s."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# Errors of the CUDA runtime: no machine code for the GPU; a driver older than the toolkit.
_NO_CODE = (98, 209)
_OLD_DRIVER = (35, 222)
_gpu_problems: dict[int, str] = {}


def explain_gpu(error: int, text: str, gpu: str, capability: tuple[int, int]) -> str:
    """Why the kernels do not run on a GPU and how to mend it, from the CUDA error; empty for 0."""
    if error == 0:
        return ""
    archs, toolkit = _build.get("archs", ""), _build.get("nvcc", "")
    number = f"{capability[0]}.{capability[1]}"
    if error in _NO_CODE and capability < (8, 0):
        return f"{gpu} has compute capability {number}, and the kernels need 8.0"
    if error in _NO_CODE:
        return (
            f"{gpu} has compute capability {number}, and the library was built for {archs}; build "
            f"it again with TORCH_CUDA_ARCH_LIST={number}"
        )
    if error in _OLD_DRIVER:
        return (
            f"the driver of {gpu} is too old for CUDA {toolkit}, with which the library was built "
            f"({text}); update the driver, or build with an older CUDA toolkit"
        )
    return f"{gpu} refuses the kernels: CUDA error {error}, {text}"


@compiled_as_constant
def gpu_problem(index: int) -> str:
    """Why the kernels do not run on GPU ``index``; empty if they do.

    Asks the GPU once and warns if it refuses. CUDA is never initialised here: where nobody has used
    a GPU, a tensor on one is a fake, for which there is no problem.
    """
    problem = _gpu_problems.get(index)
    if problem is None:
        if _library is None or not torch.cuda.is_initialized():
            return ""
        with torch.cuda.device(index):
            error: int = _library.resnet_fused_cuda_probe()
            text: bytes = _library.resnet_fused_cuda_error_text(error)
        problem = explain_gpu(
            error,
            text.decode(),
            torch.cuda.get_device_name(index),
            torch.cuda.get_device_capability(index),
        )
        _gpu_problems[index] = problem
        if problem:
            warnings.warn(
                f"resnet_fused runs on plain PyTorch on cuda:{index}: {problem}", stacklevel=2
            )
    return problem


# Packed weights live in the library, keyed by the address of the weight they were made from. When
# that memory dies they must go too, or a long-running process would collect those of dead models;
# until it is watched, the library keeps the memory. The storage is watched, not the tensor: a
# parameter gets new storage by `.half()` and the like, and torch.utils.swap_tensors refuses tensors
# that someone watches.
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
        if weight is None:
            continue
        if (address := weight.data_ptr()) not in _watched:
            _watched.add(address)
            weakref.finalize(weight.untyped_storage(), _forget, address).atexit = False
        _library.resnet_fused_pack_watched(address)


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Drop the packings of what an optimizer of ``fused=True`` changed.

    Its kernels leave the version of a tensor as it was, and small steps most 16-bit weights.
    """
    if _library is None:
        return
    for group in optimizer.param_groups:
        for p in group["params"] if group.get("fused") else ():
            if type(p) is torch.nn.Parameter and p.device.type == "cpu":
                _library.resnet_fused_pack_drop(p.data_ptr())


register_optimizer_step_post_hook(_after_step)
