# SPDX-License-Identifier: BSD-3-Clause
"""Commands and scripts on a GPU other than the first, or on one that refuses the kernels."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import resnet_fused
from resnet_fused import dispatch
from resnet_fused.bench import contenders, machine, subjects
from resnet_fused.cli import check
from resnet_fused.cli.main import main
from source_tree import benchmarks


def _run(name: str) -> Any:
    return benchmarks(name).main(["--device", "cuda:3"])


ON_GPU_3: dict[str, Callable[[], Any]] = {
    "check": lambda: main(["check", "--device", "cuda:3"]),
    "bench": lambda: main(["bench", "--device", "cuda:3"]),
    "collect": lambda: benchmarks("collect").main(),
    **{name: partial(_run, name) for name in ("gpu_models", "gpu_layers", "gpu_sanitize")},
}


class Selected(Exception):
    """Ends a command when it selects its device."""


@pytest.mark.parametrize("name", ON_GPU_3)
def test_the_device_asked_for_is_the_current_one(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events, streams and memory statistics of the first GPU, while another one is measured."""

    def select(device: str) -> None:
        raise Selected(device)

    monkeypatch.setattr(machine, "why_no_device", lambda device: "")
    monkeypatch.setattr(machine, "select", select)
    monkeypatch.setattr(sys, "argv", ["collect.py", "--device", "cuda:3"])
    with pytest.raises(Selected, match="cuda:3"):
        ON_GPU_3[name]()


def test_a_device_is_selected(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA that is not started, so that no GPU is asked whether it takes the kernels."""
    calls: list[object] = []
    monkeypatch.setattr(torch.cuda, "init", lambda: calls.append("init"))
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    for device in ("cpu", "cuda", "cuda:3"):
        machine.select(device)
    assert calls == ["init", 0, "init", 3]


def test_a_gpu_that_refuses_the_kernels_is_not_called_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors, times or facts of plain PyTorch under the name of a kernel's path."""

    def refused(device: torch.device, dtype: torch.dtype, op: str, groups: int = 1) -> Any:
        return dispatch.Path("reference", f"{device} is too old")

    monkeypatch.setattr(dispatch, "path_on", refused)
    assert check.check_op("stem", "bf16", "cpu").path == "reference"
    model = subjects.make_model("resnet18")
    assert check.check_model(model, "resnet18", "fp32", "cpu").path == "reference"
    ours = contenders.Rivals.of(model, torch.ones(1, 3, 32, 32)).make(contenders.FUSED)
    assert (ours.path, ours.note) == ("reference", "cpu is too old")
    assert set(resnet_fused.info()["paths"].values()) == {"reference"}
