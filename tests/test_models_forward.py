# SPDX-License-Identifier: BSD-3-Clause
"""In eval mode the fused networks compute what the plain ones do, whatever the user did to them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resnet_cases import (
    DEPTHS,
    exact,
    images,
    lively,
    plain,
    plain_block,
    relative,
    rounded,
    small,
    watch,
)
from resnet_fused import models
from resnet_fused.models import BasicBlock, Bottleneck, ResNet

BLOCKS = {"resnet18": 8, "resnet34": 16, "resnet50": 16, "resnet101": 33, "resnet152": 50}
# Rounding errors grow by chance on their way through random layers, so that of one path may be this
# many times the other's; the smallest bug is thousands of times larger.
LUCK = 3
FLOOR = 2e-6


def check(model: ResNet, x: Tensor) -> Tensor:
    """The fused network is as near to float64 as the plain one."""
    with torch.no_grad():
        y, eager, truth = model(x), plain(model, x), exact(model, x)
    assert y.dtype == eager.dtype
    assert truth.abs().max() > 0.01
    assert relative(y, truth) <= LUCK * relative(eager, truth) + FLOOR
    return y


class FrozenBatchNorm2d(nn.Module):
    """Fixed statistics in buffers and no counter, as in detection libraries."""

    def __init__(self, channels: int, eps: float = 0.1) -> None:
        super().__init__()
        self.eps = eps  # large, so that a forgotten one shows
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


@pytest.mark.parametrize("name", [*DEPTHS, "resnext50_32x4d", "wide_resnet50_2"])
def test_every_depth_equals_the_plain_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong block, stride, group or order of ops at any depth, or a block that is not fused."""
    torch.manual_seed(0)
    model = lively(getattr(models, name)(num_classes=10))
    calls = watch(monkeypatch)
    check(model, images(1, 3, 33, 33))
    block = "basic_block" if name in ("resnet18", "resnet34") else "bottleneck"
    assert calls == ["stem", *[block] * BLOCKS.get(name, 16), "pool_linear"]


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 3, 33, 47),  # odd in every stage
        (3, 3, 32, 32),  # 1 x 1 at the end
        (2, 3, 64, 16),  # one pixel wide from stage 3 on
        (5, 3, 7, 9),  # smaller than every window but the first
        (1, 3, 1, 1),
    ],
)
def test_awkward_image_sizes(block: Any, shape: tuple[int, ...]) -> None:
    """An output size or a border that is computed differently from the module's."""
    check(small(block), images(*shape))


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (2, 3, 64, 32), (1, 3, 224, 16)])
def test_low_precision_is_as_good_as_layerwise_rounding(
    block: Any, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """A path that loses more than eager; 32 and 16 wide end in one-pixel-wide convolutions."""
    model, x = small(block).to(dtype), images(*shape, dtype=dtype)
    with torch.no_grad():
        y, truth, budget = model(x), exact(model, x), rounded(model, x, dtype)
    assert y.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert relative(y, truth) <= 1.5 * relative(budget, truth) + eps


@pytest.mark.parametrize("channels", [1, 4, 12])
def test_conv1_replaced_for_other_images(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grey, RGBA and multispectral images: a stem that assumes three channels."""
    model = small()
    model.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
    calls = watch(monkeypatch)
    check(model, images(2, channels, 40, 40))
    assert calls[0] == "stem"


def test_conv1_replaced_by_a_small_one_with_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CIFAR stem: 3x3 stride 1 convolution and no max-pool; a forgotten convolution bias."""
    model = small()
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1)
    model.maxpool = nn.Identity()
    calls = watch(monkeypatch)
    check(model, images(2, 3, 16, 16))
    assert calls[:2] == ["conv_bn_act", "basic_block"]


@pytest.mark.parametrize(
    "pool",
    [
        nn.Identity(),
        nn.MaxPool2d(2),
        nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        nn.MaxPool2d(3, 2, 1, dilation=2),
        nn.AvgPool2d(3, 2, 1),
    ],
    ids=str,
)
def test_other_max_pools_are_not_taken_for_the_stems(
    pool: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stem op computes exactly one max-pool; any other must run as the module it is."""
    model = small()
    model.maxpool = pool
    calls = watch(monkeypatch)
    check(model, images(2, 3, 37, 38))
    assert calls[0] == "conv_bn_act"


def test_fc_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transfer learning: another Linear, none, or a small network, must all run."""
    model, x = small(), images(2, 3, 32, 32)
    calls = watch(monkeypatch)
    fcs = [nn.Linear(512, 3), nn.Linear(512, 3, bias=False)]
    fcs += [nn.Identity(), nn.Sequential(nn.Dropout(), nn.Linear(512, 3)).eval()]
    for fc, fused in zip(fcs, [True, True, False, False], strict=True):
        model.fc = fc
        calls.clear()
        check(model, x)
        assert ("pool_linear" in calls) is fused


@pytest.mark.parametrize(
    "pool", [nn.AdaptiveAvgPool2d((2, 2)), nn.AdaptiveMaxPool2d(1), nn.AvgPool2d(2)], ids=str
)
def test_other_head_pools_are_not_taken_for_the_mean(pool: nn.Module) -> None:
    """A head that ignores what avgpool is."""
    model = small()
    model.avgpool = pool
    model.fc = nn.LazyLinear(4)
    plain(model, images(1, 3, 64, 64))
    check(model, images(2, 3, 64, 64))


def test_forward_features_and_head_make_the_whole() -> None:
    """timm's two halves: features of the wrong stage, or a head that pools twice."""
    model, x = small(Bottleneck), images(2, 3, 64, 64)
    features = model.forward_features(x)
    assert features.shape == (2, 2048, 2, 2)
    assert torch.equal(model.forward_head(features), model(x))
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean((2, 3)))


def test_group_norm_runs_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm_layer that is no BatchNorm: the ops must not be called with it."""
    model = small(norm_layer=lambda channels: nn.GroupNorm(8, channels))
    x = images(2, 3, 32, 32)
    calls = watch(monkeypatch)
    y = model.forward_features(x)
    assert calls == []
    model.avgpool, model.fc = nn.Identity(), nn.Identity()
    assert torch.equal(model(x), plain(model, x)) and y.isfinite().all()


@pytest.mark.parametrize(
    "norm",
    [
        FrozenBatchNorm2d,
        lambda c: nn.BatchNorm2d(c, eps=0.1),
        lambda c: nn.BatchNorm2d(c, affine=False),
    ],
    ids=["frozen", "eps", "no affine"],
)
def test_batch_norm_variants_fuse(norm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variant whose eps or missing affine part the fused path forgets."""
    model = small(Bottleneck, norm_layer=norm)
    calls = watch(monkeypatch)
    check(model, images(2, 3, 32, 32))
    assert calls == ["stem", *["bottleneck"] * 5, "pool_linear"]


def test_batch_norm_without_statistics_runs_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """track_running_stats=False uses the batch's statistics in eval mode too."""
    model = small(norm_layer=lambda c: nn.BatchNorm2d(c, track_running_stats=False))
    x = images(4, 3, 64, 64)
    calls = watch(monkeypatch)
    assert torch.equal(model.forward_features(x), _features(model, x)) and calls == []


def test_sync_batch_norm_conversion_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """convert_sync_batchnorm swaps children; a block that keeps the old ones would go stale."""
    model, x = small(Bottleneck), images(2, 3, 32, 32)
    before = model(x)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(model.layer1[0].bn1) is nn.SyncBatchNorm
    calls = watch(monkeypatch)
    assert torch.equal(model(x), before)
    assert "bottleneck" in calls


@pytest.mark.parametrize("dilate", [(False, False, True), (False, True, True), (True, True, True)])
def test_dilated_networks(dilate: tuple[bool, ...]) -> None:
    """Segmentation backbones: padding and dilation of a stage mixed up."""
    model = small(Bottleneck, replace_stride_with_dilation=dilate, groups=4, width_per_group=32)
    check(model, images(1, 3, 48, 33))


def test_layouts_agree() -> None:
    """An input in channels_last, or a view with gaps and offset, read as if it were dense NCHW."""
    model, x = small(), images(2, 3, 40, 36)
    gaps = torch.full((2, 5, 42, 80), float("nan"))
    view = gaps[:, 1:4, 1:41, 3:75:2]
    view.copy_(x)
    last = x.contiguous(memory_format=torch.channels_last)
    y = check(model, x)
    for other in (last, view, x.flip(0).flip(0), x.half().float()[:1].expand(2, -1, -1, -1)):
        expected = y if torch.equal(other, x) else plain(model, other)
        torch.testing.assert_close(model(other), expected, rtol=1e-4, atol=1e-5)
    model = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(check(model, last), y, rtol=1e-4, atol=1e-5)


def test_autocast_computes_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast that is ignored (fp32 out), or that rounds the weights of BatchNorm."""
    model, x = small(Bottleneck), images(2, 3, 64, 32)
    calls = watch(monkeypatch)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16 and len(calls) == 7
    truth, budget = exact(model, x), rounded(model, x, torch.bfloat16)
    assert relative(y, truth) <= 1.5 * relative(budget, truth) + 2**-7


def test_no_images_give_no_logits() -> None:
    """N = 0 is a legal batch."""
    for block in (BasicBlock, Bottleneck):
        assert small(block)(images(0, 3, 64, 64)).shape == (0, 10)


def test_nan_stays_nan() -> None:
    """A ReLU or max-pool that turns a bad image into plausible logits, or spoils its neighbour."""
    model, x = small(Bottleneck), images(2, 3, 32, 32)
    clean = model(x)
    x[1, 0, 16, 16] = float("nan")
    y = model(x)
    assert y[1].isnan().all()
    torch.testing.assert_close(y[0], clean[0])


def _features(model: ResNet, x: Tensor) -> Tensor:
    x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in stage:
            x = plain_block(block, x)
    return x
