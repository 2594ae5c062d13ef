# SPDX-License-Identifier: BSD-3-Clause
"""What a machine is said to reach at its best."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from resnet_fused import timing
from resnet_fused.profile import peaks
from resnet_fused.timing import Measurement


def test_the_matmul_rate_is_that_of_the_best_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if sizes, units or dtype are mixed up, or zeros are multiplied."""
    seen = []

    def measure(calls: dict[str, Callable[[], torch.Tensor]], **how: Any) -> Measurement:
        y = calls["call"]()
        seen.append((y.dtype, y.shape[0]))
        assert y.float().std() > 1
        return Measurement({"call": [[8.0, 4.0] if y.shape[0] == 16 else [16.0, 20.0]]}, {})

    monkeypatch.setattr(timing, "measure", measure)
    rate = peaks.matmul_rate(torch.bfloat16, sizes=(16, 32))
    assert rate == pytest.approx(2 * 32**3 / 16e-3)
    assert seen == [(torch.bfloat16, 16), (torch.bfloat16, 32)]


def test_the_convolutions_rate_is_that_of_the_best_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if images are not counted, more are tried than needed, or it does not count."""
    seen = []

    def measure(calls: dict[str, Callable[[], torch.Tensor]], **how: Any) -> Measurement:
        y = calls["call"]()
        seen.append((y.dtype, *y.shape))
        return Measurement({"call": [[{1: 4.0, 2: 4.5, 4: 10.0}[y.shape[0]]]]}, {})

    monkeypatch.setattr(timing, "measure", measure)
    rate = peaks.conv_rate(torch.bfloat16)
    assert rate == pytest.approx(2 * (2 * 28**2 * 128**2 * 9) / 4.5e-3)
    assert seen == [(torch.bfloat16, n, 128, 28, 28) for n in (1, 2, 4)]
    monkeypatch.setattr(peaks, "matmul_rate", lambda *args, **kwargs: rate / 2)
    monkeypatch.setattr(peaks, "copy_bandwidth", lambda *args, **kwargs: 1.0)
    assert peaks.ceilings("cpu", torch.bfloat16) == peaks.Ceilings(1.0, pytest.approx(rate))
    monkeypatch.setattr(peaks, "matmul_rate", lambda *args, **kwargs: rate * 2)
    assert peaks.ceilings("cpu", torch.bfloat16).peak == rate * 2


def test_the_peaks_are_plausible() -> None:
    """Breaks if a unit is off by a power of ten, or a measurement takes seconds."""
    found = peaks.ceilings("cpu", torch.float32, sizes=(256,), count=1 << 22, budget_s=0.01)
    assert 1e8 < found.bandwidth < 1e13 and 1e8 < found.peak < 1e15
    best = found.best(peaks.Ceilings(found.bandwidth * 2, found.peak / 2))
    assert best == peaks.Ceilings(found.bandwidth * 2, found.peak)
    assert best.floor(best.peak, 0.0) == 1 and best.floor(0.0, 4 * best.bandwidth) == 4
