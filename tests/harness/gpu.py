# SPDX-License-Identifier: BSD-3-Clause
"""Sends ops on CPU tensors the way of CUDA tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from resnet_fused import _extension, dispatch


@contextmanager
def replaced(namespace: Any) -> Iterator[None]:
    """CPU tensors take the path of CUDA tensors, and ``namespace`` has the ops that they reach.

    Fresh memory is full of NaN: what a kernel does not write shows.
    """
    ops, choose, cuda = torch.ops.resnet_fused, dispatch.choose, _extension._cuda
    deterministic = torch.are_deterministic_algorithms_enabled()

    def as_on_gpu(device_type: str, *args: Any, **kwargs: Any) -> dispatch.Path:
        return choose("cuda", *args, **kwargs)

    torch.ops.resnet_fused, dispatch.choose, _extension._cuda = namespace, as_on_gpu, True
    onednn, _extension._onednn = _extension._onednn, False  # for the CPU no case is clear
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.ops.resnet_fused, dispatch.choose, _extension._cuda = ops, choose, cuda
        _extension._onednn = onednn


def moved(t: Tensor, device: str) -> Tensor:
    """A copy of ``t`` and of all memory around it, so that strides and offset stay as they are."""
    there = torch.empty(0, dtype=t.dtype, device=device)
    storage = torch.tensor([], dtype=torch.uint8).set_(t.untyped_storage()).to(device, copy=True)
    return there.set_(storage.untyped_storage(), t.storage_offset(), t.shape, t.stride())


class OnGpu:
    """The ops of the library for CPU tensors, computed on a GPU."""

    def __init__(self, ops: Any) -> None:
        self.ops = ops

    def __getattr__(self, name: str) -> Any:
        op = getattr(self.ops, name).default

        def call(*args: Any) -> Tensor:
            there = [moved(a, "cuda") if isinstance(a, Tensor) else a for a in args]
            y: Tensor = op(*there)
            assert y.device.type == "cuda"
            return moved(y, "cpu")

        return SimpleNamespace(default=call)


@contextmanager
def instead_of_cpu() -> Iterator[None]:
    """Compute what is called on CPU tensors on the first GPU."""
    with replaced(OnGpu(torch.ops.resnet_fused)):
        yield
