# SPDX-License-Identifier: BSD-3-Clause
"""stem through the suite of every op, and what is its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import resnet_fused
from harness.case import Source
from harness.suite import Suite


class TestStem(Suite):
    name = "stem"


@pytest.mark.parametrize("path", ["auto", "portable"])
def test_an_image_with_nan_changes_no_other(path: str, force_path: Any) -> None:
    """Breaks if one image that the window kernel cannot take keeps its neighbours from it, or its
    NaN or infinity reaches outputs whose windows it is not in.

    The eighth pixel of a window's row has a weight of zero, which would not hide either.
    """
    s = Source(torch.bfloat16)
    conv, x = s.conv(3, 64, 7, stride=(2, 2)), s.image(5, 3, 40, 37)
    with force_path(path):
        want = resnet_fused.stem(x, conv)
        for value in (float("nan"), float("inf")):
            bad = x.clone()
            bad[3, 1, 20, 21] = value
            got = resnet_fused.stem(bad, conv)
            for n in (0, 1, 2, 4):
                assert torch.equal(got[n], want[n])
            # Pixel (20, 21) is in the windows of convolution outputs 9..11 and 9..12, which the
            # pool hands on to 4..6 and 4..6.
            other = torch.ones(10, 10, dtype=torch.bool)
            other[4:7, 4:7] = False
            torch.testing.assert_close(
                got[3][:, other].float(), want[3][:, other].float(), rtol=2**-7, atol=2**-7
            )
            assert not got[3][:, ~other].isfinite().all()


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "slice", "every other", "expanded"])
def test_any_strides(layout: str) -> None:
    """Breaks if the kernel, which reads x where it is, takes one memory order for another."""
    s = Source(torch.bfloat16)
    conv, wide = s.conv(3, 64, 7, stride=(2, 2)), s.normal(3, 4, 36, 70)
    x = {
        "nchw": wide[:, :3, :33, :35].contiguous(),
        "channels_last": s.image(3, 3, 33, 35),
        "slice": wide[1:, 1:, 2:35, 3:38],
        "every other": wide[:, :3, ::2, ::2],
        "expanded": wide[:1, :1, :33, :35].expand(3, 3, 33, 35),
    }[layout]
    want = resnet_fused.stem(x.clone(memory_format=torch.contiguous_format), conv)
    assert torch.equal(resnet_fused.stem(x, conv), want)
