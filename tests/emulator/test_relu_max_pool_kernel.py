# SPDX-License-Identifier: BSD-3-Clause
"""The max-pool's kernels on the emulator: nothing is rounded, so equal to torch's bits."""

from __future__ import annotations

from typing import Any

import emulated
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from harness.case import DTYPES

# N, H, W, K and what each would break.
SHAPES = (
    (1, 1, 1, 8, "one pixel: eight of nine are beyond the image"),
    (2, 2, 2, 8, "one window, which meets two borders"),
    (1, 5, 6, 16, "odd height, even width, two vectors of 16 bits"),
    (3, 6, 5, 12, "even height, odd width; vectors in float32 alone"),
    (1, 4, 3, 5, "no vector of any dtype"),
    (2, 3, 37, 64, "a row beyond one block in float32"),
    (1, 9, 7, 72, "a row's last block is part empty"),
)


def run(library: Any, seed: int, x: Tensor, misalign: tuple[int, int] = (0, 0)) -> Tensor:
    """``x`` and the result are [N, H, W, K]; bytes by which they miss a multiple of 16."""
    n, h, w, k = x.shape
    with library.run(seed) as device:
        out = device.out(torch.empty(n, (h + 1) // 2, (w + 1) // 2, k, dtype=x.dtype), misalign[1])
        address = device.put(x, misalign[0])
        library.relu_max_pool(in_=address, out=out, N=n, H=h, W=w, K=k, dtype=x.dtype)
        got: Tensor = device.get(out)
    return got


def exact(x: Tensor) -> Tensor:
    y = F.max_pool2d(x.double().permute(0, 3, 1, 2).clamp_min(0), 3, 2, 1)
    return y.permute(0, 2, 3, 1).to(x.dtype)


def values(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    """Mostly negative, so that the ReLU and the missing pixels of a border decide."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) - 1).to(dtype)


@pytest.fixture(scope="module")
def library() -> Any:
    return emulated.build()


@pytest.mark.parametrize("seed", (0, 1, 2))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_to_torch(library: Any, dtype: torch.dtype, seed: int) -> None:
    """Breaks on a wrong border, a missing ReLU or a vector put in the wrong place."""
    for *shape, why in SHAPES:
        x = values(seed, *shape, dtype=dtype)
        assert torch.equal(run(library, seed, x), exact(x)), (shape, why)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_wins_in_its_windows(library: Any, dtype: torch.dtype) -> None:
    """Breaks if a comparison drops NaN, whichever of the nine pixels it is, or spreads it."""
    for h in range(5):
        for w in range(4):
            x = values(h, 1, 5, 4, 8, dtype=dtype)
            x[0, h, w, 3] = float("nan")
            got, want = run(library, w, x), exact(x)
            assert torch.equal(got.isnan(), want.isnan()), (h, w)
            assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0)), (h, w)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned_views(library: Any, dtype: torch.dtype) -> None:
    """Breaks if 16-byte accesses go to addresses that are not multiples of 16."""
    x = values(5, 1, 4, 5, 8, dtype=dtype)
    for misalign in ((4, 0), (0, 8), (16, 32)):
        assert torch.equal(run(library, 0, x, misalign), exact(x)), misalign


def test_nothing_to_do(library: Any) -> None:
    """Breaks if an empty batch becomes a launch of no blocks, which CUDA refuses."""
    assert run(library, 0, torch.empty(0, 4, 4, 8)).shape == (0, 2, 2, 8)
