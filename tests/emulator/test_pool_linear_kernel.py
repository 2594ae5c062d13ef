# SPDX-License-Identifier: BSD-3-Clause
"""pool_linear's kernels on the emulator, against float64 and against exact integers."""

from __future__ import annotations

from typing import Any

import emulated
import pytest
import torch
from torch import Tensor

from harness import bounds
from harness.bounds import Exact, assert_within
from harness.case import DTYPES

# N, H, W, C, K and what each would break. The pool's blocks take 128 channels (64 in float32) and
# 16 pixels at a time, the linear layer's warps 128 channels, and 1 x 1 or 4 x 8 outputs.
SHAPES = (
    (1, 1, 1, 1, 1, "one number: every lane but one has nothing to add"),
    (1, 7, 7, 512, 10, "ResNet-18's last map, a batch of one"),
    (4, 4, 4, 64, 9, "the last batch that gets a warp per output; as many pixels as groups"),
    (5, 7, 7, 64, 37, "tails of images and of outputs in a tile of 4 x 8"),
    (9, 1, 17, 132, 70, "channels one quad beyond a warp's; two tiles down, three across"),
    (6, 3, 5, 33, 7, "odd channels: no wide load, and a tail of one channel"),
    (2, 2, 3, 130, 3, "channels even but not a multiple of four"),
    (8, 2, 2, 260, 8, "channels a multiple of four and not of eight: wide in float32 alone"),
)


def run(
    library: Any, seed: int, x: Tensor, weight: Tensor, bias: Tensor | None, misalign: int = 0
) -> Tensor:
    """``x`` is [N, H, W, C]; bytes by which x and weight miss a multiple of 16."""
    n, h, w, c = x.shape
    k = weight.shape[0]
    with library.run(seed) as device:
        out = device.out(torch.empty(n, k, dtype=x.dtype))
        library.pool_linear(
            x=device.put(x, misalign),
            pooled=device.scratch(4 * n * c),
            weight=device.put(weight, misalign),
            bias=device.put(bias),
            out=out,
            N=n,
            HW=h * w,
            C=c,
            K=k,
            x_dtype=x.dtype,
            weight_dtype=weight.dtype,
            bias_dtype=torch.float32 if bias is None else bias.dtype,
        )
        got: Tensor = device.get(out)
    return got


def exact(x: Tensor, weight: Tensor, bias: Tensor | None) -> Exact:
    y = bounds.pool_linear(bounds.stored(x.permute(0, 3, 1, 2)), weight, bias)
    return bounds.rounded(y, x.dtype)


def normal(generator: torch.Generator, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.uint8)


@pytest.fixture(scope="module")
def library() -> Any:
    return emulated.build()


@pytest.mark.parametrize("seed", (0, 1, 2))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_within_the_derived_bound(library: Any, dtype: torch.dtype, seed: int) -> None:
    """Breaks on a wrong tail, a wrong lane or a wrong dtype of x, weight or bias."""
    generator = torch.Generator().manual_seed(seed)
    for i, (n, h, w, c, k, why) in enumerate(SHAPES):
        x = normal(generator, n, h, w, c, dtype=dtype)
        weight = normal(generator, k, c, dtype=DTYPES[(i + seed) % 3])
        bias = None if i % 4 == 3 else normal(generator, k, dtype=DTYPES[(i // 2 + seed) % 3])
        try:
            assert_within(run(library, seed, x, weight, bias), exact(x, weight, bias))
        except AssertionError as error:
            raise AssertionError(f"{(n, h, w, c, k)} ({why}): {error}") from None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_integers(library: Any, dtype: torch.dtype) -> None:
    """Breaks on a single dropped or repeated pixel, product or lane: the threshold is 0.

    Pixels are multiples of H * W, so that the mean is a whole number, and few weights are not 0.
    """
    generator = torch.Generator().manual_seed(0)
    for n, h, w, c, k, why in SHAPES:
        x = torch.zeros(n, h * w, c)
        at = torch.randint(0, h * w, (n, 1, c), generator=generator)
        pixels = h * w * torch.randint(-2, 3, (n, 1, c), generator=generator).float()
        x = x.scatter(1, at, pixels).view(n, h, w, c).to(dtype)
        weight = torch.randint(-1, 2, (k, c), generator=generator).float()
        weight *= torch.rand(k, c, generator=generator) < 20 / c
        bias = torch.randint(-3, 4, (k,), generator=generator).to(dtype)
        want = exact(x, weight, bias)
        assert want.peak <= 256, "beyond this bfloat16 would have to round"
        got = run(library, 0, x, weight.to(dtype), bias)
        assert torch.equal(got.double(), want.value), ((n, h, w, c, k), why)


@pytest.mark.parametrize("c", (132, 260, 33))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_batch_does_not_matter(library: Any, dtype: torch.dtype, c: int) -> None:
    """Breaks if an image's sums run in another order when it comes alone, or unaligned."""
    generator = torch.Generator().manual_seed(1)
    x, weight = normal(generator, 6, 5, 4, c, dtype=dtype), normal(generator, 11, c, dtype=dtype)
    want = run(library, 0, x, weight, None)
    alone = torch.cat([run(library, i, x[i : i + 1], weight, None) for i in range(6)])
    assert torch.equal(bits(alone), bits(want))
    assert torch.equal(bits(run(library, 0, x, weight, None, misalign=4)), bits(want))


def test_nan_stays_in_its_image_and_output(library: Any) -> None:
    """Breaks if a tile's missing rows, or a lane's missing channels, let a value in."""
    generator = torch.Generator().manual_seed(2)
    for c in (68, 67):
        x = normal(generator, 5, 2, 2, c, dtype=torch.float32)
        weight = normal(generator, 10, c, dtype=torch.float32)
        clean = run(library, 0, x, weight, None)
        x[3, 1, 0, c - 1] = float("nan")
        weight[9, 0] = float("nan")
        got = run(library, 0, x, weight, None)
        assert got[3].isnan().all() and got[:, 9].isnan().all()
        rest = [0, 1, 2, 4]
        assert torch.equal(bits(got[rest, :9]), bits(clean[rest, :9]))


def test_nothing_to_do(library: Any) -> None:
    """Breaks if an empty batch becomes a launch of no blocks, which CUDA refuses."""
    got = run(library, 0, torch.empty(0, 2, 2, 8), torch.empty(3, 8), None)
    assert got.shape == (0, 3)
