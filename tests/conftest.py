# SPDX-License-Identifier: BSD-3-Clause
"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

import resnet_fused
from resnet_fused import _extension


@contextmanager
def _force_path(name: str) -> Iterator[None]:
    if name == "reference":
        with resnet_fused.backend("reference"):
            yield
        return
    if name == "emulated":
        from emulated_ops import instead_of_cpu

        with instead_of_cpu():
            yield
        return
    if name == "cuda":
        from harness.gpu import instead_of_cpu

        with instead_of_cpu():
            yield
        return
    library = _extension._library
    assert library is not None, f"the kernels must be built to be tested: {_extension.why_not()}"
    library.resnet_fused_cpu_path({"auto": 0, "onednn": 1, "portable": 2}[name])
    try:
        yield
    finally:
        library.resnet_fused_cpu_path(0)


@pytest.fixture
def force_path() -> Callable[[str], AbstractContextManager[None]]:
    """Context manager that sends ops on CPU tensors one way: auto, onednn, portable, reference;
    cuda, which computes them on copies on a GPU; or emulated, which runs the CUDA ops on the CPU.
    """
    return _force_path


@pytest.fixture(autouse=True)
def _seed() -> None:
    import torch

    torch.manual_seed(0)
