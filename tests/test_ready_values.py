# SPDX-License-Identifier: BSD-3-Clause
"""Attributes of a fused module between calls, whatever their kind: see test_ready.py."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fuse_zoo
from fuse_spy import close
from fuse_zoo import randomise
from resnet_fused.fuse import fuse, unfuse

one_thread = fuse_zoo.one_thread

__all__ = ["one_thread"]  # a fixture


class Scaled(nn.Module):
    """Attributes of kinds that do not compare well, a parameter and a buffer that may be absent."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.register_parameter("gamma", None)
        self.register_buffer("mask", None)
        self.on: Any = 1
        self.by: Any = 2.0

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn(self.conv(x)))
        if self.gamma is not None:
            y = y * self.gamma
        if self.mask is not None:
            y = y * self.mask
        return y * 3 if self.on is True else y * self.by


class Odd:
    """Equals everything, and means something of its own."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]

    def __rmul__(self, y: Tensor) -> Tensor:
        return y * self.value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gamma", nn.Parameter(torch.tensor(2.0))),
        ("mask", torch.zeros(())),
        ("on", True),
        ("by", torch.tensor(4.0, requires_grad=True)),
        ("by", Odd(3.0)),
    ],
)
def test_values_that_do_not_compare(name: str, value: Any) -> None:
    """What equals but is something else, what has no truth value, what was not there before."""
    model = fuse(randomise(Scaled()).eval())
    x = torch.randn(2, 16, 5, 5, generator=torch.Generator().manual_seed(3))
    for _ in range(2):
        model(x)
    old = getattr(model, name)
    for now in (value, old, value):
        setattr(model, name, now)
        want = unfuse(copy.deepcopy(model))(x)
        for _ in range(2):
            y = model(x)
            close(y, want)
            assert y.requires_grad == want.requires_grad
