# SPDX-License-Identifier: BSD-3-Clause
"""Which path computes an op: pure policy, no mechanism.

``choose`` looks only at what is known before an op runs (device type, dtype, groups, settings, what
was built), ``path_on`` also at the GPU itself. Cases that depend on shapes are settled inside the
C++ op, which returns a right result or raises.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from resnet_fused import _extension

BACKENDS = ("auto", "reference")
HOPPER = ("0", "1", "pairs")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that kernels take
_forced = "auto"


class Path(NamedTuple):
    """The path an op takes and, where it is the reference, why."""

    name: str
    reason: str


def from_environment(value: str | None) -> str:
    """Read ``RESNET_FUSED_BACKEND``; raises ValueError for an unknown name."""
    value = value or "auto"
    if value not in BACKENDS:
        raise ValueError(f"RESNET_FUSED_BACKEND must be one of {BACKENDS}, got {value!r}")
    return value


def check_hopper(value: str | None) -> None:
    """Refuse a ``RESNET_FUSED_HOPPER`` that the library would take for none of its values."""
    if (value or "0") not in HOPPER:
        raise ValueError(f"RESNET_FUSED_HOPPER must be one of {HOPPER}, got {value!r}")


check_hopper(os.environ.get("RESNET_FUSED_HOPPER"))
_forced = from_environment(os.environ.get("RESNET_FUSED_BACKEND"))


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force a path for the whole process while the context is open.

    Args:
        name: ``"reference"`` for plain PyTorch, ``"auto"`` for the fastest path there is.

    Raises:
        ValueError: ``name`` is neither.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {name!r}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def forced() -> str:
    """The backend that is forced now, or ``"auto"``."""
    return _forced


def _switch(value: str | None) -> bool:
    """Read ``RESNET_FUSED_BATCH_INVARIANT``; raises ValueError for anything but 0 and 1."""
    if value not in (None, "", "0", "1"):
        raise ValueError(f"RESNET_FUSED_BATCH_INVARIANT must be 0 or 1, got {value!r}")
    return value == "1"


def set_batch_invariant(on: bool) -> None:
    """Make an image's result independent of the images beside it, bit for bit.

    On a GPU, off, a convolution of few images may be divided into partial sums, so that a small
    batch fills the GPU; results then differ between batch sizes by rounding. On, the order of every
    sum follows from the layer alone, and small batches take longer.

    On a CPU, own kernels (paths ``amx`` and ``avx512``) never depend on the batch. oneDNN, which
    computes float16 and grouped convolutions, and all others on other CPUs, makes no such promise;
    on, it gets images one by one, which costs 1.1 to 1.6 times the time.

    Either way the same call gives the same bits. Applies to the whole process, compiled models
    included, from the next call on; not to the path ``reference``, where cuDNN and others decide.

    Args:
        on: the new setting; the environment variable ``RESNET_FUSED_BATCH_INVARIANT=1`` turns it on
            from the start.
    """
    global _invariant
    _invariant = bool(on)
    _extension.set_batch_invariant(_invariant)


def batch_invariant() -> bool:
    """The setting of ``set_batch_invariant``."""
    return _invariant


_invariant = _switch(os.environ.get("RESNET_FUSED_BATCH_INVARIANT"))
_extension.set_batch_invariant(_invariant)


@_extension.compiled_as_constant
def tf32() -> bool:
    """True if torch's settings let convolutions on a GPU round float32 factors to TF32.

    These are ``torch.backends.cudnn.conv.fp32_precision`` and what it inherits from, or the older
    ``torch.backends.cudnn.allow_tf32``. Compiled code keeps the answer of when it was compiled.
    """
    cudnn: Any = torch.backends.cudnn  # torch's annotations lack what it has
    return bool(cudnn.conv.fp32_precision == "tf32")


@_extension.compiled_as_constant
def bf16x3() -> bool:
    """True if float32 convolutions on this CPU are multiplied as bf16x3.

    It takes AMX, and torch's settings must allow less than float32:
    ``torch.backends.mkldnn.conv.fp32_precision``, or what it inherits from, is ``"tf32"`` or
    ``"bf16"``; or it says nothing, and ``torch.set_float32_matmul_precision`` is ``"high"`` or
    ``"medium"``. Each value is split in two bfloat16, which keeps 16 of its 24 bits, and three of
    their four products are summed in float32. Compiled code keeps the answer of when it was
    compiled.
    """
    if not _extension.amx():
        return False
    mkldnn: Any = torch.backends.mkldnn  # torch's annotations lack what it has
    precision = mkldnn.conv.fp32_precision
    if precision == "none":
        precision = mkldnn.matmul.fp32_precision
    return precision in ("tf32", "bf16")


def splits(x: torch.Tensor) -> bool:
    """True if ops on ``x``, on this CPU, multiply as bf16x3."""
    return x.dtype == torch.float32 and bf16x3()


def choose(device_type: str, dtype: torch.dtype, op: str = "conv_bn_act", groups: int = 1) -> Path:
    """The path of ``op`` for tensors of this device type and dtype.

    Args:
        device_type: as in ``torch.device.type``.
        dtype: of the activations.
        op: name of the op.
        groups: the most groups of any of its convolutions.

    Returns:
        ``amx`` (CPU, own kernels on matrix tiles, for float32 as bf16x3), ``avx512`` (CPU, own
        kernels for float32; with either, grouped and few-channel convolutions still go to oneDNN),
        ``onednn`` (CPU, torch's oneDNN convolutions), ``cpu`` (own C++), ``cuda`` (own CUDA) or
        ``reference`` (plain PyTorch), with the reason where there is one to give.
    """
    if _forced == "reference":
        return Path("reference", "forced by backend('reference') or RESNET_FUSED_BACKEND")
    if not _extension.available():
        return Path("reference", _extension.why_not())
    if dtype not in DTYPES:
        return Path("reference", f"no kernel takes {dtype}")
    if device_type == "cpu":
        if op in ("add_relu", "pool_linear"):
            return Path("cpu", "")
        if not _extension.onednn():
            return Path("reference", "this torch build has no oneDNN convolution")
        if dtype == torch.float16:
            return Path("onednn", "float16 is computed in float32")
        if dtype == torch.float32 and bf16x3():
            return Path("amx", "float32 is multiplied as bf16x3")
        if dtype == torch.float32:
            return Path("avx512" if _extension.avx512() else "onednn", "")
        return Path("amx" if _extension.amx() else "onednn", "")
    if device_type == "cuda":
        return _choose_cuda(dtype, op, groups)
    return Path("reference", f"no kernel runs on {device_type}")


def _choose_cuda(dtype: torch.dtype, op: str, groups: int) -> Path:
    if not _extension.cuda():
        return Path("reference", "resnet_fused was built without CUDA, or torch was")
    if op in ("add_relu", "pool_linear"):
        return Path("cuda", "")
    if groups > 1:
        return Path("reference", "no CUDA kernel takes grouped convolutions")
    if dtype != torch.float32:
        return Path("cuda", "")
    if tf32():
        return Path("cuda", "float32 is multiplied as TF32")
    return Path(
        "reference",
        "torch.backends.cudnn.conv.fp32_precision asks for more than TF32, in which the CUDA "
        "kernels multiply float32",
    )


def path_on(device: torch.device, dtype: torch.dtype, op: str, groups: int = 1) -> Path:
    """``choose`` for this very device: a GPU may be too old for the kernels, or its driver."""
    path = choose(device.type, dtype, op, groups)
    if path.name == "cuda" and (problem := _extension.gpu_problem(device.index or 0)):
        return Path("reference", problem)
    return path


def why_no_kernel(device: torch.device, dtype: torch.dtype, op: str, groups: int) -> str | None:
    """Why a model on a GPU should call its own modules for ``op`` now; None if a kernel runs.

    An op's reference path is the op's formula, computed in float32; the modules cost what eager
    costs. Where the reference path is asked for, it is taken. On a CPU it always is: eager's own
    bfloat16 convolutions can be wrong there.

    Args:
        device: a GPU.
        dtype: of the weights; under autocast the ops compute in another.
        op: name of the op.
        groups: the most groups of any of its convolutions.
    """
    if _forced == "reference":
        return None
    if dtype in DTYPES and torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    path = path_on(device, dtype, op, groups)
    return path.reason if path.name == "reference" else None


def only_torch_ops() -> bool:
    """True where only torch's own operations will do: in TorchScript and ONNX export, in function
    transforms (``torch.func``), in forward-mode differentiation.
    """
    return (
        torch.jit.is_tracing()
        or torch.jit.is_scripting()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or (torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export())
    )


def clear_case(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """True if nothing else needs asking: a kernel takes ``x``, on a CPU, in the weight's dtype.

    What is not so clear may run as well, see ``use_reference``. This costs a fifth of asking that,
    which at batch 1 is some percent of a network's time.
    """
    return (
        x.is_cpu
        and x.dtype is weight.dtype
        and x.dtype in DTYPES
        and _forced == "auto"
        and _extension.onednn()
        and not torch.is_autocast_enabled("cpu")
        and not only_torch_ops()
    )


def use_reference(x: torch.Tensor, op: str, groups: int = 1) -> bool:
    """True if ``op`` on ``x`` must run as plain PyTorch ops now."""
    if only_torch_ops():
        return True
    return path_on(x.device, x.dtype, op, groups).name == "reference"
