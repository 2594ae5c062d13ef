# SPDX-License-Identifier: BSD-3-Clause
"""NaN and infinity go where the mathematics sends them, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import resnet_fused
from harness.case import DTYPES, Source
from harness.suite import PATHS, products
from resnet_fused.ops import ConvBN

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("special", [NAN, INF, -INF])
@pytest.mark.parametrize("channels", [1, 3, 17, 31, 33, 48, 64])
def test_one_pixel_reaches_its_receptive_field_only(
    channels: int, special: float, dtype: torch.dtype, path: str, force_path: Any
) -> None:
    """Breaks where channels or columns beyond the end are multiplied by 0 instead of left out."""
    s = Source(dtype, seed=channels)
    for window, stride in ((1, 1), (3, 1), (3, 2), (7, 2)):
        x = s.image(1, channels, 13, 14)
        x[0, channels - 1, 6, 7] = special
        conv = ConvBN(
            s.normal(33, channels, window, window),
            stride=(stride, stride),
            padding=(window // 2, window // 2),
        )
        geometry = (conv.stride, conv.padding)
        want = F.conv2d(x.double(), conv.weight.double(), None, *geometry)
        with force_path(path):
            linear = resnet_fused.conv_bn_act(x, conv, relu=False)
            act = resnet_fused.conv_bn_act(x, conv)
        assert torch.equal(linear.isnan(), want.isnan())
        assert torch.equal(linear == INF, want == INF)
        assert torch.equal(linear == -INF, want == -INF)
        assert torch.equal(act.isnan(), want.isnan()), "ReLU must keep NaN"
        assert torch.equal(act == INF, want == INF)
        assert not (act < 0).any()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stem_and_head(dtype: torch.dtype, path: str, force_path: Any) -> None:
    """Breaks if the pool's maximum drops a NaN, or a mean skips one; negative NaN included."""
    s = Source(dtype)
    x = s.image(2, 3, 30, 31)
    x[1, 2, 11, 12] = -NAN
    conv = s.conv(3, 8, 7, stride=(2, 2))
    args = (conv.weight.double(), None, conv.stride, conv.padding)
    want = F.max_pool2d(F.conv2d(x.double(), *args).relu(), 3, 2, 1).isnan()
    with force_path(path):
        assert torch.equal(resnet_fused.stem(x, conv).isnan(), want)
        features = s.image(3, 40, 4, 3)
        features[1, 39, 3, 2] = NAN
        logits = resnet_fused.pool_linear(features, s.normal(5, 40))
    assert torch.equal(logits.isnan().any(1), torch.tensor([False, True, False]))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual(dtype: torch.dtype, path: str, force_path: Any) -> None:
    """Breaks if a special value of the shortcut is lost or spreads."""
    s = Source(dtype)
    x, conv = s.image(1, 64, 5, 6), s.conv(64, 64)
    residual = s.image(1, 64, 5, 6)
    residual[0, 3, 1, 2], residual[0, 4, 2, 2], residual[0, 5, 3, 3] = NAN, INF, -INF
    with force_path(path):
        y = resnet_fused.conv_bn_act(x, conv, residual=residual)
        z = resnet_fused.add_relu(x, residual)
    for out in (y, z):
        assert out.isnan().sum() == 1 and out[0, 3, 1, 2].isnan()
        assert (out == INF).sum() == 1 and out[0, 4, 2, 2] == INF
        assert out[0, 5, 3, 3] == 0


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("special", [NAN, INF, -INF])
@pytest.mark.parametrize("at", [(0, 0), (2, 3), (5, 5)])
def test_block_in_float32(at: tuple[int, int], special: float, path: str, force_path: Any) -> None:
    """Breaks if a library's ReLU, which turns NaN into 0, runs where a sum may be NaN."""
    s = Source(torch.float32)
    x = s.image(2, 16, 6, 6)
    x[1, 5, at[0], at[1]] = special
    same = {"basic": (s.conv(16, 16, 3), s.conv(16, 16, 3))}
    # Reads every second pixel, and pads the result back to 6 x 6: the others are in the shortcut
    # alone.
    same["skips"] = (s.conv(16, 8, 1, stride=(2, 2)), s.conv(8, 16, 2, padding=(2, 2)))
    for name, convs in same.items():
        with resnet_fused.backend("reference"):
            want = resnet_fused.basic_block(x, *convs)
        with force_path(path):
            got = resnet_fused.basic_block(x, *convs)
        assert torch.equal(got.isnan(), want.isnan()) and want.isnan().sum() != want.numel(), name
        assert torch.equal(got.isinf(), want.isinf()), name
    convs = s.conv(16, 8), s.conv(8, 8, 3), s.conv(8, 16)
    for down in (None, s.conv(16, 16)):
        with resnet_fused.backend("reference"):
            want = resnet_fused.bottleneck(x, *convs, down)
        with force_path(path):
            got = resnet_fused.bottleneck(x, *convs, down)
        assert torch.equal(got.isnan(), want.isnan()) and want.isnan().any()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("where", [0, 1, 2])
def test_overflow_inside_a_block(where: int, path: str, force_path: Any) -> None:
    """Breaks if finite inputs are taken as proof that no sum is infinity less infinity."""
    s = Source(torch.float32)
    x = s.image(1, 16, 5, 5).abs() + 1.0

    def conv(**rows: float) -> ConvBN:
        """Outputs 1 but for some channels, whose weights are all the same."""
        weight, bias = torch.zeros(16, 16, 1, 1), torch.ones(16)
        for row, value in rows.items():
            weight[int(row[1:])], bias[int(row[1:])] = value, 0.0
        return ConvBN(weight, bias)

    overflows, cancels = conv(k3=3e38, k4=3e38), conv()
    cancels.weight[5, 3], cancels.weight[5, 4] = 1.0, -1.0
    if where < 2:  # the first or the second convolution's output is infinite in two channels
        args = [conv(k0=1.0), conv(k0=1.0), cancels, None]
        args[where : where + 2] = [overflows, cancels]
    else:  # the last one's less than the projection's
        args = [conv(k0=1.0), conv(k0=1.0), conv(k5=-3e38), conv(k5=3e38)]
    with resnet_fused.backend("reference"):
        want = resnet_fused.bottleneck(x, *args)
    assert want.isnan().any()
    with force_path(path):
        got = resnet_fused.bottleneck(x, *args)
    assert torch.equal(got.isnan(), want.isnan())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variance", [1e-12, 1.0, 1e5])
@pytest.mark.parametrize("gamma", [0.0, -1.0, 1e3])
def test_extreme_batchnorm(
    gamma: float, variance: float, dtype: torch.dtype, path: str, force_path: Any
) -> None:
    """Breaks if folding overflows or underflows a 16-bit weight."""
    from harness import bounds

    s = Source(dtype)
    x = s.image(2, 64, 5, 5)
    conv = s.conv(64, 32, 3)._replace(
        bn_weight=torch.full((32,), gamma), running_var=torch.full((32,), variance)
    )
    want = bounds.conv_bn(bounds.stored(x), conv, dtype, products(path))
    if dtype == torch.float16 and gamma == 1e3:
        # Results beyond 65504 are infinite in float16, whoever computes them.
        want.value.masked_fill_(want.value.abs() > 65504, INF).abs_()
        conv = conv._replace(bn_weight=conv.bn_weight.clamp_max(1.0))
        want = bounds.conv_bn(bounds.stored(x), conv, dtype, products(path))
    with force_path(path):
        got = resnet_fused.conv_bn_act(x, conv, relu=False)
    bounds.assert_within(got, bounds.rounded(want, dtype))
