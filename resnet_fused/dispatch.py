# SPDX-License-Identifier: BSD-3-Clause
"""Which path computes an op: pure policy, no mechanism.

``choose`` looks only at what is known before an op runs (device, dtype, what was built). Cases that
depend on shapes are settled inside the C++ op, which always returns a right result.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from resnet_fused import _extension

BACKENDS = ("auto", "reference")
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


def choose(device_type: str, dtype: torch.dtype, op: str = "conv_bn_act") -> Path:
    """The path of ``op`` for tensors of this device type and dtype.

    Returns:
        ``amx`` (CPU, own kernels on matrix tiles; grouped and few-channel convolutions still go to
        oneDNN), ``onednn`` (CPU, torch's oneDNN convolutions), ``cpu`` (own C++), ``cuda`` (own
        CUDA) or ``reference`` (plain PyTorch), with the reason where there is one to give.
    """
    if _forced == "reference":
        return Path("reference", "forced by backend('reference') or RESNET_FUSED_BACKEND")
    if not _extension.available():
        return Path("reference", _extension.why_not())
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return Path("reference", f"no kernel takes {dtype}")
    if device_type == "cpu":
        if op in ("add_relu", "pool_linear"):
            return Path("cpu", "")
        if not _extension.onednn():
            return Path("reference", "this torch build has no oneDNN convolution")
        if dtype == torch.float16:
            return Path("onednn", "float16 is computed in float32")
        return Path("amx" if dtype == torch.bfloat16 and _extension.amx() else "onednn", "")
    if device_type == "cuda" and op == "add_relu":
        if _extension.cuda():
            return Path("cuda", "")
        return Path("reference", "resnet_fused was built without CUDA")
    return Path("reference", f"no {device_type} kernel for {op} yet")


def use_reference(x: torch.Tensor, op: str) -> bool:
    """True if ``op`` on ``x`` must run as plain PyTorch ops now.

    TorchScript tracing and ONNX export need standard ops, whatever the device.
    """
    if torch.jit.is_tracing() or torch.jit.is_scripting():
        return True
    return choose(x.device.type, x.dtype, op).name == "reference"
