# SPDX-License-Identifier: BSD-3-Clause
"""pool_linear through the suite of every op, and what is its own."""

from __future__ import annotations

import pytest
import torch

import resnet_fused
from harness.suite import Suite


class TestPoolLinear(Suite):
    name = "pool_linear"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_large_maps(dtype: torch.dtype) -> None:
    """Breaks if all pixels go into one running sum, which loses digits to its own size: an average
    of 56 x 56 equal values was 3e-5 off.

    A sum of 98 sums of 32 pixels each errs by at most (31 + 97) u, of equal values by far less;
    1 + 2^-7 fits every dtype, but its multiples do not fit float32 for ever.
    """
    x = torch.full((1, 16, 56, 56), 1 + 2.0**-7, dtype=dtype)
    y = resnet_fused.pool_linear(x, torch.eye(16, dtype=dtype))
    off = (y.double() - x[:, :, 0, 0].double()).abs().max().item()
    assert off <= 128 * 2.0**-24 + (0 if dtype == torch.float32 else 2.0**-8)
    random = torch.rand(1, 16, 56, 56, generator=torch.Generator().manual_seed(0))
    y = resnet_fused.pool_linear(random, torch.eye(16))
    # Random roundings of a two-level sum add up to some u; one running sum was 35 u off.
    assert (y.double() - random.double().mean((2, 3))).abs().max() < 8 * 2.0**-24
