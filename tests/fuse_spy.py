# SPDX-License-Identifier: BSD-3-Clause
"""A network with every pattern, and a fixture that sees which fused ops a forward calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fuse_zoo import Basic, Bottle, HelperBlock, Net, randomise
from resnet_fused import ops

OPS = ("conv_bn_act", "stem", "basic_block", "bottleneck", "pool_linear", "add_relu")


def make() -> Net:
    """Every pattern that a whole network has."""
    return randomise(Net(Basic(8, 8), HelperBlock(8, 4, 8), Bottle(8, 4, 16, 2)))  # type: ignore[return-value]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The fused ops that were called, so that a test sees which way a forward went."""
    seen: list[str] = []

    def spy(name: str, op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            seen.append(name)
            return op(*args, **kwargs)

        return call

    for name in OPS:
        monkeypatch.setattr(ops, name, spy(name, getattr(ops, name)))
    return seen


ALL = ["stem", "basic_block", "bottleneck", "bottleneck", "pool_linear"]


def close(a: Tensor, b: Tensor) -> None:
    """Equal but for float32 rounding in a dozen layers, relative to the largest value."""
    torch.testing.assert_close(a, b, rtol=0, atol=3e-6 * max(1.0, b.abs().max().item()))
