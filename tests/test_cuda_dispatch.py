# SPDX-License-Identifier: BSD-3-Clause
"""Which path CUDA tensors take and why: pure decisions, made without a GPU."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import resnet_fused
from resnet_fused import _extension, dispatch

CONV_OPS = ("conv_bn_act", "stem", "basic_block", "bottleneck")
EXACT_OPS = ("add_relu", "pool_linear")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if library and torch had CUDA."""
    monkeypatch.setattr(_extension, "_cuda", True)


@pytest.fixture
def precision() -> Iterator[Any]:
    """cuDNN's settings for convolutions, restored."""
    before = torch.backends.cudnn.conv.fp32_precision
    yield torch.backends.cudnn
    torch.backends.fp32_precision = torch.backends.cudnn.fp32_precision = "none"
    torch.backends.cudnn.conv.fp32_precision = before


@pytest.mark.parametrize("op", CONV_OPS + EXACT_OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("built")
def test_every_op_runs_on_a_gpu(op: str, dtype: torch.dtype) -> None:
    """Breaks if an op or a dtype is sent to the reference without need: TF32 is torch's default."""
    path = dispatch.choose("cuda", dtype, op)
    tf32 = dtype == torch.float32 and op in CONV_OPS
    assert path == ("cuda", "float32 is multiplied as TF32" if tf32 else "")


@pytest.mark.parametrize("op", CONV_OPS + EXACT_OPS)
def test_a_library_without_cuda(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if a CUDA tensor is sent to a library that has no kernels for it."""
    monkeypatch.setattr(_extension, "_cuda", False)
    path = dispatch.choose("cuda", torch.float16, op)
    assert path == ("reference", "resnet_fused was built without CUDA, or torch was")


@pytest.mark.usefixtures("built")
def test_grouped_convolutions() -> None:
    """Breaks if a grouped convolution reaches the kernels, or groups keep a CPU from its own."""
    for op in CONV_OPS:
        for dtype in DTYPES:
            path = dispatch.choose("cuda", dtype, op, groups=2)
            assert path == ("reference", "no CUDA kernel takes grouped convolutions")
    assert dispatch.choose("cpu", torch.float32, groups=2).name != "cuda"
    assert dispatch.choose("cpu", torch.float32, groups=2) == dispatch.choose("cpu", torch.float32)


@pytest.mark.usefixtures("built")
def test_float32_follows_torchs_settings(precision: Any) -> None:
    """Breaks if TF32 is used where torch's own convolutions would not, or a setting warns."""
    changes = [
        (lambda: setattr(precision, "allow_tf32", False), False),
        (lambda: setattr(precision, "allow_tf32", True), True),
        (lambda: setattr(precision.conv, "fp32_precision", "ieee"), False),
        (lambda: setattr(precision.conv, "fp32_precision", "tf32"), True),
        (lambda: setattr(precision.conv, "fp32_precision", "none"), False),
        (lambda: setattr(precision, "fp32_precision", "ieee"), False),
        (lambda: setattr(precision, "fp32_precision", "tf32"), True),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i, (change, tf32) in enumerate(changes):
            change()
            for op in CONV_OPS:
                path = dispatch.choose("cuda", torch.float32, op)
                assert path.name == ("cuda" if tf32 else "reference"), i
                assert tf32 or "torch.backends.cudnn.conv.fp32_precision" in path.reason
                assert dispatch.choose("cuda", torch.float16, op).name == "cuda"
            for op in EXACT_OPS:
                assert dispatch.choose("cuda", torch.float32, op) == ("cuda", "")
            assert resnet_fused.info()["cuda_tf32"] == tf32


@pytest.mark.usefixtures("built")
def test_other_devices_and_dtypes() -> None:
    """Breaks if a device or dtype without kernels is claimed."""
    assert dispatch.choose("cuda", torch.float64).reason == "no kernel takes torch.float64"
    assert dispatch.choose("xpu", torch.float32) == ("reference", "no kernel runs on xpu")
    with resnet_fused.backend("reference"):
        assert dispatch.choose("cuda", torch.float16).name == "reference"


class Gpu:
    """Stands for the library's probe and torch's description of a GPU."""

    def __init__(self, error: int, capability: tuple[int, int]) -> None:
        self.error, self.capability, self.probes = error, capability, 0

    def resnet_fused_cuda_probe(self) -> int:
        self.probes += 1
        return self.error

    def resnet_fused_cuda_error_text(self, error: int) -> bytes:
        return f"text of {error}".encode()


@pytest.mark.parametrize(
    ("error", "capability", "message"),
    [
        (0, (9, 0), ""),
        (209, (7, 5), "Some GPU has compute capability 7.5, and the kernels need 8.0"),
        (209, (8, 6), "has compute capability 8.6, and the library was built for 9.0a; build it "),
        (98, (8, 6), "again with TORCH_CUDA_ARCH_LIST=8.6"),
        (35, (9, 0), "the driver of Some GPU is too old for CUDA 13.0, with which the library was"),
        (222, (9, 0), "(text of 222); update the driver, or build with an older CUDA toolkit"),
        (46, (9, 0), "Some GPU refuses the kernels: CUDA error 46, text of 46"),
    ],
)
@pytest.mark.usefixtures("built")
def test_a_gpu_that_refuses_the_kernels(
    error: int, capability: tuple[int, int], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if such a GPU gets a kernel, is asked or warned of more than once, or does not say how
    to mend it.
    """
    gpu = Gpu(error, capability)
    monkeypatch.setattr(_extension, "_library", gpu)
    monkeypatch.setattr(_extension, "_build", {"nvcc": "13.0", "archs": "9.0a"})
    monkeypatch.setattr(_extension, "_gpu_problems", {})
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda index: warnings.catch_warnings())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    x: Any = SimpleNamespace(device=torch.device("cuda", 1), dtype=torch.float16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = [dispatch.use_reference(x, "stem") for _ in range(3)]
    path = dispatch.path_on(x.device, x.dtype, "stem")
    assert message in path.reason and path.name == ("reference" if error else "cuda")
    assert results == [error != 0] * 3 and gpu.probes == 1
    warned = [str(w.message) for w in caught]
    assert warned == ([f"resnet_fused runs on plain PyTorch on cuda:1: {path.reason}"][:error])
    other: Any = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dispatch.use_reference(other, "stem")
    assert gpu.probes == 2


@pytest.mark.usefixtures("built")
def test_nothing_is_asked_where_nobody_uses_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if fake tensors initialise CUDA."""
    monkeypatch.setattr(_extension, "_library", object())  # without functions to call
    monkeypatch.setattr(_extension, "_gpu_problems", {})
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert dispatch.path_on(torch.device("cuda", 0), torch.float16, "stem") == ("cuda", "")
    assert _extension._gpu_problems == {}


def test_batch_invariance_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if the setting does not reach the library, or needs one."""
    calls: list[int] = []
    library = SimpleNamespace(resnet_fused_set_batch_invariant=calls.append)
    monkeypatch.setattr(_extension, "_library", library)
    for on in (True, False):
        resnet_fused.set_batch_invariant(on)
        assert dispatch.batch_invariant() is on and resnet_fused.info()["batch_invariant"] is on
    assert calls == [1, 0]
    monkeypatch.setattr(_extension, "_library", None)
    resnet_fused.set_batch_invariant(True)
    resnet_fused.set_batch_invariant(False)
    assert calls == [1, 0]


@pytest.mark.parametrize(
    ("value", "expected"), [("1", "True"), ("0", "False"), ("", "False"), ("yes", "ValueError")]
)
def test_batch_invariance_from_the_environment(value: str, expected: str) -> None:
    """Breaks if the variable is ignored, or a misspelt value is taken for no."""
    program = (
        "import sys; sys.path[:0] = [p for p in sys.argv[1].split(':') if p]\n"
        "from resnet_fused import dispatch; print(dispatch.batch_invariant())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, ":".join(sys.path)],
        env={**os.environ, "RESNET_FUSED_BATCH_INVARIANT": value},
        capture_output=True,
        text=True,
    )
    assert expected in done.stdout + done.stderr


def test_hopper_kernels_from_the_environment() -> None:
    """Breaks if a misspelt value is taken for no."""
    for value in (None, "", "0", "1", "pairs"):
        dispatch.check_hopper(value)
    with pytest.raises(ValueError, match="RESNET_FUSED_HOPPER must be one of .*'pairs'.* got 'on'"):
        dispatch.check_hopper("on")


def test_a_library_with_cuda_has_its_c_functions() -> None:
    """Breaks if the probe or the setting is missing from the build that needs it."""
    library, names = _extension._library, ("probe", "error_text")
    assert isinstance(library, ctypes.CDLL)
    has = bool(_extension.build_info()["nvcc"])
    assert [hasattr(library, f"resnet_fused_cuda_{name}") for name in names] == [has, has]
    assert hasattr(library, "resnet_fused_force_mma_plan") == has
