# SPDX-License-Identifier: BSD-3-Clause
"""The stem kernel's own source on the emulator, against float64 and against exact integers.

What the bound has beside that of a sum in float32, per product, as an error of x that reaches the
result through the magnitudes of the weights: tensor cores may cut a sum off where they do not round
it, which is another ``u`` for each of the C * 49 sums. And float32 operands are rounded to TF32,
to 11 bits, each by at most ``2**-11`` of itself, a product by ``(1 + 2**-11)**2 - 1`` of itself.
16-bit products are exact in float32.
"""

from __future__ import annotations

from typing import Any

import emulated
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from harness import bounds
from harness.bounds import Exact, assert_within
from harness.case import DTYPES, Source
from harness.views import VIEWS
from resnet_fused.ops import ConvBN

SEEDS = (0, 1, 2)

# N, C, H, W, K and what each would break. A tile is 28 x 32 pixels of the image.
CASES = (
    (1, 3, 1, 1, 64, "one pixel: the window is padding but for its middle"),
    (1, 3, 28, 32, 64, "exactly one tile"),
    (2, 3, 29, 33, 64, "one pixel beyond a tile in both directions, two images"),
    (1, 3, 27, 31, 8, "one pixel short of a tile; one eighth of the filters of a group"),
    (3, 1, 5, 33, 64, "one channel: three of four are zeros; an odd batch"),
    (1, 2, 33, 6, 72, "two channels; the last group of filters has eight"),
    (2, 4, 9, 20, 128, "every channel in use, several groups of filters"),
    (1, 3, 57, 66, 64, "three tiles down and across, odd and even sizes"),
)


def run(
    library: Any,
    seed: int,
    x: Tensor,
    conv: ConvBN,
    most_blocks: int = 3,
    misalign: int = 0,
    norm: Tensor | None = None,
) -> Tensor:
    """The kernel's result as [N, K, P, Q]; few blocks, so that each has several tiles."""
    dtype = x.dtype if norm is None else conv.weight.dtype
    n, c, h, w = x.shape
    k = conv.weight.shape[0]
    like = torch.empty(n, -(-h // 4), -(-w // 4), k, dtype=dtype)
    vectors = {
        "conv_bias": conv.bias,
        "weight": conv.bn_weight,
        "bias": conv.bn_bias,
        "mean": conv.running_mean,
        "var": conv.running_var,
    }
    with library.run(seed) as device:
        out = device.out(like, misalign)
        library.stem(
            x=device.put(x),
            x_strides=x.stride(),
            norm=device.put(norm),
            weight=device.put(conv.weight),
            weight_strides=conv.weight.stride(),
            bn={
                name: None if v is None else (device.put(v), v.dtype) for name, v in vectors.items()
            }
            | {"eps": conv.eps},
            out=out,
            N=n,
            C=c,
            H=h,
            W=w,
            K=k,
            dtype=dtype,
            most_blocks=most_blocks,
        )
        got: Tensor = device.get(out)
    return got.permute(0, 3, 1, 2)


def exact(x: Tensor, conv: ConvBN) -> Exact:
    """The stem in float64 and the bound on the kernel's error."""
    start = bounds.stored(x)
    lost = conv.weight[0].numel() * bounds.U
    if x.dtype == torch.float32:
        lost += (1 + 2**-11) ** 2 - 1
    start.error = start.value.abs() * lost
    y = bounds.rounded(bounds.relu(bounds.conv_bn(start, conv, x.dtype)), x.dtype)
    # A maximum moves by no more than the largest error in its window.
    return Exact(F.max_pool2d(y.value, 3, 2, 1), F.max_pool2d(y.error, 3, 2, 1), y.peak)


def marks(dtype: torch.dtype) -> Tensor:
    """NaN with the least fraction, with the largest, the usual one, and infinity."""
    whole, least = {
        torch.float32: (torch.int32, 0x7F800001),
        torch.bfloat16: (torch.int16, 0x7F81),
        torch.float16: (torch.int16, 0x7C01),
    }[dtype]
    odd = torch.tensor([least, torch.iinfo(whole).max], dtype=whole).view(dtype)
    return torch.cat([odd, torch.tensor([float("nan"), float("inf")], dtype=dtype)])


def field(x: Tensor, n: int, h: int, w: int) -> Tensor:
    """The outputs [N, 1, P, Q] that one pixel of the image reaches."""
    pixel = torch.zeros(x.shape[0], 1, *x.shape[2:])
    pixel[n, 0, h, w] = 1
    reached = F.conv2d(pixel, torch.ones(1, 1, 7, 7), stride=2, padding=3) > 0
    return F.max_pool2d(reached.float(), 3, 2, 1) > 0


def stem_conv(source: Source, c: int, k: int, bias: bool = False) -> ConvBN:
    return source.conv(c, k, 7, bias, stride=(2, 2))


def bits(t: Tensor) -> Tensor:
    return t.contiguous().flatten().view(torch.uint8)


@pytest.fixture(scope="module")
def library() -> Any:
    return emulated.build()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_within_the_derived_bound(library: Any, dtype: torch.dtype, seed: int) -> None:
    """Breaks on any wrong tap, border, fragment, channel parameter or rounding."""
    for n, c, h, w, k, why in CASES:
        source = Source(dtype, seed=seed)
        x, conv = source.image(n, c, h, w), stem_conv(source, c, k, bias=seed == 1)
        if seed == 2:
            x = x.contiguous()
        try:
            assert_within(run(library, seed, x, conv), exact(x, conv))
        except AssertionError as error:
            raise AssertionError(f"{(n, c, h, w, k)} ({why}): {error}") from None


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_integers(library: Any, dtype: torch.dtype, seed: int) -> None:
    """Breaks on a single dropped, repeated or misplaced product: the threshold is 0."""
    for n, c, h, w, k, why in CASES:
        source = Source(dtype, integer=True, seed=seed)
        x, conv = source.image(n, c, h, w), stem_conv(source, c, k, bias=True)
        want = exact(x, conv)
        assert want.peak <= 256, "beyond this bfloat16 would have to round"
        assert torch.equal(run(library, seed, x, conv).double(), want.value), why


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_small_size(library: Any, dtype: torch.dtype) -> None:
    """Breaks where the convolution's or the pool's last row or column depends on H or W mod 4."""
    for h in range(1, 21):
        c, k = 1 + h % 4, (8, 64, 72, 128)[h // 2 % 4]
        source = Source(dtype, integer=True, seed=h)
        x, conv = source.image(1, c, h, 21 - h), stem_conv(source, c, k)
        want = exact(x, conv).value
        assert torch.equal(run(library, h, x, conv).double(), want), (c, h, 21 - h, k)


def test_tf32_is_rounded_not_cut_off(library: Any) -> None:
    """Breaks if float32 operands lose their low bits: all products would be too small.

    One tap is 1, so that a result is one pixel of x, rounded to 11 bits.
    """
    x = torch.rand(1, 1, 8, 8) + 1
    weight = torch.zeros(8, 1, 7, 7)
    weight[:, 0, 3, 3] = 1
    nearest = (x.double() * 2**10).round() / 2**10
    want = F.max_pool2d(nearest[:, :, ::2, ::2], 3, 2, 1)
    conv = ConvBN(weight, stride=(2, 2), padding=(3, 3))
    assert torch.equal(run(library, 0, x, conv).double(), want.expand(-1, 8, -1, -1))


def test_a_band_of_a_photograph(library: Any) -> None:
    """Breaks where tiles of one row of 224 pixels are put in the wrong place."""
    source = Source(torch.float16)
    x, conv = source.image(1, 3, 30, 224).contiguous(), stem_conv(source, 3, 64)
    assert_within(run(library, 0, x, conv, most_blocks=1056), exact(x, conv))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_reaches_its_field_and_nothing_else(library: Any, dtype: torch.dtype) -> None:
    """Breaks if the eighth tap, a padded channel or a pixel beyond a border lets a value in.

    Every column from 20 to 39 has a NaN once, on rows of every residue mod 4: so each tap of a
    filter row, the eighth too, meets it on even and odd columns, within a tile and across tiles.
    """
    source = Source(dtype)
    x, conv = source.image(1, 3, 31, 40), stem_conv(source, 3, 8)
    clean = run(library, 0, x, conv)
    for i in range(20):
        h, w, mark = (7 * i) % 31, 20 + i, marks(dtype)[i % 4]
        changed = x.clone()
        changed[0, i % 3, h, w] = mark
        got = run(library, i, changed, conv)
        reached = field(x, 0, h, w).expand_as(got)
        assert torch.equal(bits(got[~reached]), bits(clean[~reached])), (h, w)
        if mark.isnan():
            assert got[reached].isnan().all(), (h, w)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_of_a_filter_stays_in_its_channel(library: Any, dtype: torch.dtype) -> None:
    """Breaks if filters of one group, or BatchNorm's parameters of two channels, are mixed."""
    source = Source(dtype)
    x, conv = source.image(1, 3, 12, 9), stem_conv(source, 3, 72)
    clean = run(library, 0, x, conv)
    weight, mean = conv.weight.clone(), conv.running_mean
    assert mean is not None
    weight[37, 2, 6, 6] = float("nan")
    mean = mean.clone()
    mean[70] = float("nan")
    got = run(library, 0, x, conv._replace(weight=weight, running_mean=mean))
    others = [k for k in range(72) if k not in (37, 70)]
    assert got[:, (37, 70)].isnan().all()
    assert torch.equal(bits(got[:, others]), bits(clean[:, others]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(library: Any, dtype: torch.dtype) -> None:
    """Breaks where strides or offsets of the image or the weights are not honoured."""
    source = Source(dtype)
    x, conv = source.image(2, 3, 9, 34), stem_conv(source, 3, 8)
    want = run(library, 0, x, conv)
    for name, view in VIEWS.items():
        got = run(library, 0, view(x), conv._replace(weight=view(conv.weight)))
        assert torch.equal(bits(got), bits(want)), name


def test_parameters_of_any_dtype_or_absent(library: Any) -> None:
    """Breaks if a parameter is read as another dtype, or an absent one is not the neutral one."""
    source = Source(torch.bfloat16)
    x, conv = source.image(1, 3, 10, 9), stem_conv(source, 3, 8, bias=True)
    half, bfloat = torch.float16, torch.bfloat16
    bias, gamma, beta, mean, var = conv[1:6]
    assert bias is not None and gamma is not None and beta is not None
    assert mean is not None and var is not None
    mixed = (bias.to(half), gamma.to(bfloat), beta.to(half), mean.to(bfloat), var.to(half))
    for vectors in (
        mixed,
        (None, None, None, mean.to(half), var.to(bfloat)),
        (bias.float(), None, None, None, None),
        (None, None, None, None, None),
    ):
        changed = ConvBN(conv.weight, *vectors, stride=(2, 2), padding=(3, 3))
        assert_within(run(library, 0, x, changed), exact(x, changed))


def test_what_does_not_fit_is_refused(library: Any) -> None:
    """Breaks if the kernel runs with filters or an output that its 16-byte stores do not suit."""
    source = Source(torch.float16)
    x, conv = source.image(1, 3, 4, 4), stem_conv(source, 3, 12)
    with pytest.raises(emulated.EmulatorError, match="returned error 1"):
        run(library, 0, x, conv)


def test_blocks_and_batch_do_not_matter(library: Any) -> None:
    """Breaks if a tile's result depends on which block makes it, or on what the block made before.

    One block makes all tiles, or each its own; an image alone gives the same bits.
    """
    source = Source(torch.float16)
    x, conv = source.image(3, 3, 33, 40), stem_conv(source, 3, 128)
    want = run(library, 0, x, conv, most_blocks=1056)
    for blocks in (1, 2, 5):
        assert torch.equal(bits(run(library, blocks, x, conv, most_blocks=blocks)), bits(want))
    alone = torch.cat([run(library, 7, x[i : i + 1], conv) for i in range(3)])
    assert torch.equal(bits(alone), bits(want))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_bank_conflicts(library: Any, dtype: torch.dtype) -> None:
    """Breaks if a pad of the shared memory's layout is lost: right results at half the speed."""
    source = Source(dtype)
    x, conv = source.image(1, 3, 28, 32), stem_conv(source, 3, 64)
    run(library, 0, x, conv)
    assert library.stats()["bank_conflicts"] == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_off_16_bytes_are_refused(library: Any, dtype: torch.dtype) -> None:
    """Breaks if the kernel, which has no other way to store, meets such an address."""
    source = Source(dtype)
    x, conv = source.image(1, 3, 8, 8), stem_conv(source, 3, 64)
    with pytest.raises(emulated.EmulatorError, match="stem returned error 1"):
        run(library, 0, x, conv, misalign=8)
    run(library, 0, x, conv, misalign=16)
