# SPDX-License-Identifier: BSD-3-Clause
"""The stem kernel on images of bytes: the same bits as on what they stand for, whatever the norm.

That those are right is test_stem_kernel.py's business.
"""

from __future__ import annotations

from typing import Any

import emulated
import pytest
import torch
from emulated_ops import instead_of_cpu, launches
from test_stem_kernel import CASES, SEEDS, bits, run, stem_conv
from torch import Tensor

from harness.case import DTYPES, Source
from harness.views import VIEWS
from resnet_fused import InputNorm, ops
from resnet_fused.input_norm import normalise
from resnet_fused.ops import ConvBN


def problem(
    seed: int, dtype: torch.dtype, n: int, c: int, h: int, w: int, k: int
) -> tuple[Tensor, ConvBN, Tensor]:
    """An image of bytes in channels_last, a convolution, and a norm that differs by channel."""
    source = Source(dtype, seed=seed)
    x = torch.randint(0, 256, (n, c, h, w), generator=source.generator, dtype=torch.uint8)
    scale = 0.01 + 0.01 * torch.rand(c, generator=source.generator)
    norm = torch.stack([scale, -2 - torch.arange(c) / 3])
    return x.contiguous(memory_format=torch.channels_last), stem_conv(source, c, k), norm


def cancelling(dtype: torch.dtype) -> tuple[Tensor, ConvBN, Tensor]:
    """A grey image of 129, of which nothing is left if product and sum are rounded each."""
    scale = torch.tensor(1 / 3)
    assert 129 * scale.double() != (129 * scale).double()
    x = torch.full((1, 1, 9, 8), 129, dtype=torch.uint8)
    weight = torch.ones(8, 1, 7, 7, dtype=dtype) * torch.tensor([1.0, -1.0] * 4).view(-1, 1, 1, 1)
    conv = ConvBN(weight.to(dtype) * 512, stride=(2, 2), padding=(3, 3))
    return x, conv, torch.stack([scale, -(129 * scale)]).view(2, 1)


@pytest.fixture(scope="module")
def library() -> Any:
    return emulated.build()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_as_normalised_beforehand(
    library: Any, dtype: torch.dtype, seed: int
) -> None:
    """Breaks on a wrong border, channel, scale or rounding; padding is 0 behind the norm."""
    for n, c, h, w, k, why in CASES:
        x, conv, norm = problem(seed, dtype, n, c, h, w, k)
        if seed == 2:
            x = x.contiguous()
        want = run(library, seed, normalise(x, norm, dtype), conv)
        assert torch.equal(bits(run(library, seed, x, conv, norm=norm)), bits(want)), why


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_product_and_sum_are_rounded_each(library: Any, dtype: torch.dtype) -> None:
    """Breaks if the compiler makes one rounding of the two: the image would not be zero."""
    x, conv, norm = cancelling(dtype)
    got = run(library, 0, x, conv, norm=norm)
    assert torch.equal(got, torch.zeros_like(got))


def test_any_strides(library: Any) -> None:
    """Breaks where strides or offsets of the image are not honoured, or bytes between are read."""
    x, conv, norm = problem(0, torch.float16, 2, 3, 9, 34, 8)
    want = run(library, 0, x, conv, norm=norm)
    for name, view in VIEWS.items():
        flat = view(x.half())  # whose gaps are NaN
        there = torch.empty(0, dtype=torch.uint8).set_(
            flat.untyped_storage().__class__(flat.untyped_storage().nbytes() // 2),
            flat.storage_offset(),
            flat.shape,
            flat.stride(),
        )
        there.copy_(x)
        assert torch.equal(bits(run(library, 0, there, conv, norm=norm)), bits(want)), name


def test_every_byte(library: Any) -> None:
    """Breaks if a value is read as a signed byte, or one of the 256 is not converted rightly."""
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    conv = stem_conv(Source(torch.float32, integer=True), 1, 8)
    norm = torch.tensor([[1.0], [0.0]])
    want = run(library, 0, x.float(), conv)
    assert torch.equal(run(library, 0, x, conv, norm=norm), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_op(dtype: torch.dtype) -> None:
    """Breaks if the op's host side hands on other strides or norms, or a stem that the kernel does
    not take is not normalised first.
    """
    norm = InputNorm((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    for k, window, kernel in ((64, 7, "stem_kernel<"), (60, 7, "mma_conv"), (64, 5, "mma_conv")):
        conv = Source(dtype).conv(3, k, window, stride=(2, 2))
        x = torch.randint(0, 256, (3, 21, 18, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
        for image in (x, x.contiguous(), x[1:, :, 2:, ::2], x[:0]):
            with instead_of_cpu() as loaded:
                got = ops.stem(image, conv, norm)
                names = [launch.kernel for launch in launches(loaded)]
                want = ops.stem(normalise(image, norm.tensor(image), dtype), conv)
            assert got.dtype == dtype and torch.equal(bits(got), bits(want))
            assert not image.numel() or names[0].startswith(kernel)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_bank_conflicts(library: Any, dtype: torch.dtype) -> None:
    """Breaks if bytes' values are stored another way than others': right, but slower."""
    x, conv, norm = problem(0, dtype, 1, 3, 28, 32, 64)
    run(library, 0, x, conv, norm=norm)
    assert library.stats()["bank_conflicts"] == 0
