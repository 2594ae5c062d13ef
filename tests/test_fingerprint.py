# SPDX-License-Identifier: BSD-3-Clause
"""What a predictor's fingerprint holds: whatever its results depend on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from resnet_fused import Predictor, _extension
from resnet_fused.predict import fingerprint as fingerprints
from resnet_fused.predict.preprocess import Preprocessing

CLASSES = 7
NAMES = [f"class {i}" for i in range(CLASSES)]
PREP = Preprocessing(resize=40, crop=33)


def test_settings_of_pytorch_are_in_it(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if a job goes on where PyTorch's own operations round in another way."""
    predictor = Predictor("resnet18", weights, preprocessing=PREP, top=3, labels=NAMES)
    before = predictor.fingerprint["kernels"]
    assert "ONEDNN" not in before and "conv " not in before
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert predictor.fingerprint["kernels"] == f"{before}, ONEDNN_MAX_CPU_ISA=AVX2"
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    torch.set_float32_matmul_precision("medium")
    try:
        assert predictor.fingerprint["kernels"].endswith(", matmul bf16")
    finally:
        torch.set_float32_matmul_precision("highest")


def test_fingerprint_follows_what_results_depend_on(weights: str, tmp_path: Path) -> None:
    """Breaks if a job could be continued with something that gives other results."""

    def fingerprint(**options: Any) -> dict[str, str]:
        return Predictor("resnet18", weights, **({"preprocessing": PREP} | options)).fingerprint

    base = fingerprint()
    assert all(type(text) is str for text in base.values())
    same_values = Preprocessing(resize=40, crop=33, origin="another file")
    assert fingerprint(preprocessing=same_values, threads=torch.get_num_threads()) == base

    def differing(**options: Any) -> set[str]:
        other = fingerprint(**options)
        return {key for key in base if other[key] != base[key]}

    assert differing(preprocessing=Preprocessing(resize=41, crop=33)) == {"preprocessing"}
    assert differing(preprocessing=Preprocessing(40, 33, mean=(0.1, 0.2, 0.30000001))) == {
        "preprocessing"
    }
    assert differing(top=2) == {"top"}
    assert differing(labels=NAMES) == {"labels"}
    assert {"dtype", "weights_sha256"} <= differing(dtype="bf16")
    predictor = Predictor("resnet18", weights, preprocessing=PREP)
    with torch.no_grad():
        predictor.model.get_parameter("layer3.0.bn1.bias")[5] += 1e-3
    assert {k for k in base if predictor.fingerprint[k] != base[k]} == {"weights_sha256"}


def test_fingerprint_tells_which_kernels_a_gpu_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if a job begun with one RESNET_FUSED_HOPPER, which decides in what order a GPU adds,
    could be continued with another; a CPU's results do not depend on it."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    texts: dict[str, set[str]] = {"cuda": set(), "cpu": set()}
    for value in ("", "1", "pairs"):
        monkeypatch.setattr(_extension, "hopper", lambda value=value: value)
        for name, found in texts.items():
            found.add(fingerprints._machine(torch.device(name)))
    assert len(texts["cuda"]) == 3 and len(texts["cpu"]) == 1
