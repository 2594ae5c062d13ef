# SPDX-License-Identifier: BSD-3-Clause
"""Which convolutions the CUDA kernels count as far as: conv_plan.h's mma_conv_fits."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from harness.conv_plan import F16, F32, Conv, Source, plan

ONE = Source(1, 1, 8)
TALL = Source((1 << 27) + 2, 1, 8, 2)  # two taps, as far apart as the image is high


def square(side: int, stride: tuple[int, int]) -> Source:
    """A large image of which few pixels are read; it spans side + 1 pixels each way."""
    return Source(side, side, 8, stride=stride)


@pytest.mark.parametrize(
    ("within", "beyond"),
    [
        # Filters: 8 chunks each, up to 127 of a tile behind the last; 2^31 - 1 chunks in all.
        (
            Conv((replace(ONE, C=64),), 1, (1 << 28) - 129),
            Conv((replace(ONE, C=64),), 1, (1 << 28) - 128),
        ),
        # Images: 128 rows of one pixel are parts of 130 images at most, as the code counts them,
        (
            Conv((square(4063, (9999, 9999)),), 200, 8),
            Conv((square(4064, (9999, 9999)),), 200, 8),
        ),
        # of 128 pixels, of 3,
        (
            Conv((square(26753, (40000, 210)),), 200, 8),
            Conv((square(26754, (40000, 210)),), 200, 8),
        ),
        # of 129, of 2,
        (
            Conv((square(32766, (40000, 255)),), 200, 8),
            Conv((square(32767, (40000, 255)),), 200, 8),
        ),
        # and no more than there are.
        (
            Conv((square(46339, (1 << 16, 1 << 16)),), 1, 8),
            Conv((square(46340, (1 << 16, 1 << 16)),), 1, 8),
        ),
        # Taps: 2^28 pixels, or what is beyond the last pixel would meet the image.
        (
            Conv((replace(TALL, dilation=(1 << 27, 1)),), 1, 8),
            Conv((replace(TALL, dilation=((1 << 27) + 1, 1)),), 1, 8),
        ),
    ],
    ids=["filters", "images of 1", "images of 128", "images of 129", "one image", "taps"],
)
def test_limits_are_exact(within: Conv, beyond: Conv) -> None:
    """Breaks if a limit is off by one in either direction: beyond it a 32-bit position overflows,
    and what is within it would be refused for nothing.
    """
    assert plan(within).fits and not plan(beyond).fits


@pytest.mark.parametrize("dtype", [F32, F16])
def test_channels_through_all_taps_have_32_bits(dtype: int) -> None:
    """Breaks if the narrow copies' count of channels, with a step beyond, can overflow within the
    limit on filters: in whole vectors of 16 bytes or not, in one tap or in many.
    """
    step = 128 // (4 if dtype == F32 else 2)
    for c, taps in itertools.product((1, 2, 7, 8, 9, 60, 64, 65, 72, 1 << 20), (1, 3, 1 << 12)):
        low, high = 1, 1 << 28
        while high - low > 1:  # the most taps in the other direction that fit
            middle = (low + high) // 2
            source = Source(1, 1, c, taps, middle, padding=(taps, middle))
            fits = plan(Conv((source,), 1, 0, dtype)).fits
            low, high = (middle, high) if fits else (low, middle)
        source = Source(1, 1, c, taps, low, padding=(taps, low))
        assert (plan(Conv((source,), 1, 0, dtype)).steps0 + 1) * step < 1 << 31


def test_counts_beyond_32_bits() -> None:
    """Breaks if a size that 32-bit counters cannot hold is accepted, or a legal one refused."""
    image = Source(112, 112, 64, 3, 3, padding=(1, 1))
    # 822 million pixels, 52.6 billion elements: offsets have 64 bits.
    p = plan(Conv((image,), 65536, 64))
    assert p.fits and p.valid and p.grid == 65536 * 112 * 112 // 128
    assert plan(Conv((replace(image, H=16384, W=16384, C=8),), 4, 8)).fits
    for large in (
        Conv((replace(image, H=1 << 29),), 1, 64),
        Conv((replace(image, H=1 << 16, W=1 << 16),), 1, 64),
        Conv((replace(image, H=1 << 14, W=1 << 14, C=64),), 1, 64),
        Conv((replace(image, C=1 << 29),), 1, 64),
        Conv((replace(image, C=1 << 20),), 1, 1 << 20),
        Conv((replace(image, padding=(1 << 29, 1)),), 1, 64),
        Conv((replace(image, H=1 << 20, dilation=(1 << 28, 1), padding=(1 << 28, 1)),), 1, 64),
        Conv((image,), 1 << 28, 1 << 12),
    ):
        assert not plan(large).fits, large
    # Nothing multiplies float64.
    assert not plan(replace(Conv((Source(8, 8, 8),), 1, 8), dtype=3)).fits
