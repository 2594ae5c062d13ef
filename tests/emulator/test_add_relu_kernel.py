# SPDX-License-Identifier: BSD-3-Clause
"""add_relu's kernels on the emulator: one addition and one rounding, so equal to torch's bits."""

from __future__ import annotations

from typing import Any

import emulated
import pytest
import torch
from torch import Tensor

from harness.case import DTYPES

# Elements, and what each would break. A block takes 1,024 vectors of 4 or 8 elements.
SIZES = (
    (1, "less than a vector"),
    (3, "a tail alone, in float32"),
    (7, "a tail alone, in 16 bits"),
    (8, "vectors and no tail"),
    (8193, "one element beyond a block of 16 bits, three beyond two of float32"),
    (4095, "one element short of a block of float32"),
    (2_051, "a block whose last vectors are missing"),
)


def run(
    library: Any, seed: int, x: Tensor, y: Tensor, offsets: tuple[int, int, int] = (0, 0, 0)
) -> Tensor:
    """``offsets``: elements by which x, y and the result miss a multiple of 16 bytes."""
    i, j, k = (offset * x.element_size() for offset in offsets)
    with library.run(seed) as device:
        out = device.out(torch.empty_like(x), misalign=k)
        library.add_relu(
            x=device.put(x, misalign=i),
            y=device.put(y, misalign=j),
            out=out,
            n=x.numel(),
            dtype=x.dtype,
        )
        got: Tensor = device.get(out)
    return got


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.uint8)


@pytest.fixture(scope="module")
def library() -> Any:
    return emulated.build()


@pytest.mark.parametrize("seed", (0, 1, 2))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_to_torch(library: Any, dtype: torch.dtype, seed: int) -> None:
    """Breaks on a wrong tail, a wrong rounding, or NaN, infinity and signs of zero lost."""
    generator = torch.Generator().manual_seed(seed)
    for n, why in SIZES:
        x = torch.randn(n, generator=generator).to(dtype)
        y = torch.randn(n, generator=generator).to(dtype)
        for at, value in ((n // 2, float("nan")), (n - 1, float("inf")), (n // 3, -1e4)):
            x[at] = value
        want = (x.float() + y.float()).clamp_min(0).to(dtype)
        got = run(library, seed, x, y)
        assert torch.equal(got.isnan(), want.isnan()), (n, why)
        assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0)), (n, why)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned_views(library: Any, dtype: torch.dtype) -> None:
    """Breaks if 16-byte accesses go to addresses that are not multiples of 16."""
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(1000, generator=generator).to(dtype) for _ in range(2))
    want = (x.float() + y.float()).clamp_min(0).to(dtype)
    for offsets in ((1, 0, 0), (0, 3, 0), (0, 0, 2), (1, 1, 1), (8, 16, 8)):
        assert torch.equal(run(library, 3, x, y, offsets), want), offsets


def test_nothing_to_do(library: Any) -> None:
    """Breaks if an empty tensor becomes a launch of no blocks, which CUDA refuses."""
    assert run(library, 0, torch.empty(0), torch.empty(0)).numel() == 0
