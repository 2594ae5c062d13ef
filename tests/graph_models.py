# SPDX-License-Identifier: BSD-3-Clause
"""What the tests of ``graphed`` share: models that are quick, and handles that have a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import resnet_fused


class Small(nn.Module):
    """Convolution, BatchNorm, linear layer; quick, and everything in it can be changed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 4)
        self.scale = 2.0
        self.shift = torch.ones(1)
        self.tail = nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn(self.conv(x))).mean((2, 3))
        return self.tail(self.fc(y) * self.scale + self.shift)


class Calls(nn.Module):
    """A model with the forward that is given."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def images(n: int = 1, size: int = 5) -> Tensor:
    return torch.randn(n, 3, size, size)


def ready(x: Tensor | None = None, model: nn.Module | None = None, **kwargs: Any) -> Any:
    """A handle that has a graph for ``x``."""
    handle = resnet_fused.graphed((model or Small()).eval(), **kwargs)
    for _ in range(2):
        handle(images() if x is None else x)
    return handle
