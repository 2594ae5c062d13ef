# SPDX-License-Identifier: BSD-3-Clause
"""Fixtures that several test files share."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch

import resnet_fused
from fake_graphs import FakeCuda
from resnet_cases import lively
from resnet_fused import _extension
from resnet_fused.graphs import calls, capture


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
    matmul, amx = torch.backends.mkldnn.matmul, _extension._amx
    precision = matmul.fp32_precision
    kernels, _, fp32 = name.partition(" ")
    library.resnet_fused_cpu_path({"auto": 0, "onednn": 1, "portable": 2}[kernels])
    if fp32 == "bf16x3":
        matmul.fp32_precision = "tf32"  # what set_float32_matmul_precision("high") sets
        _extension._amx = True  # portable tiles stand in where there are none
    try:
        yield
    finally:
        library.resnet_fused_cpu_path(0)
        matmul.fp32_precision, _extension._amx = precision, amx


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Up to four processes, in which idle OpenMP threads sleep: spinning, they take the cores that
    the other processes' threads need (2.5 times the CPU time on two cores).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    return min(4, len(os.sched_getaffinity(0)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """bf16x3 is about float32: no other dtype is tested on its paths."""

    def pointless(item: pytest.Item) -> bool:
        params = getattr(getattr(item, "callspec", None), "params", {})
        on_bf16x3 = "bf16x3" in str(params.get("path"))
        return on_bf16x3 and params.get("dtype", torch.float32) is not torch.float32

    config.hook.pytest_deselected(items=[i for i in items if pointless(i)])
    items[:] = [i for i in items if not pointless(i)]


@pytest.fixture
def force_path() -> Callable[[str], AbstractContextManager[None]]:
    """Context manager that sends ops on CPU tensors one way: auto, onednn, portable, reference;
    "auto bf16x3" and "portable bf16x3" let these multiply float32 so;
    cuda, which computes them on copies on a GPU; or emulated, which runs the CUDA ops on the CPU.
    """
    return _force_path


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """The stand-in for CUDA on which graphed captures CPU tensors; no gradients, warnings raise."""
    fake = FakeCuda()
    monkeypatch.setattr(capture, "cuda", fake)
    monkeypatch.setattr(calls, "DEVICE", "cpu")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`torch.jit")
        yield fake


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of weights for a ResNet-18 of seven classes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "seven.pth"
    torch.save(lively(resnet_fused.resnet18(num_classes=7)).state_dict(), path)
    return str(path)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """The same random numbers and PyTorch's own precisions for every test and all its fixtures."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
