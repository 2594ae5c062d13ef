# SPDX-License-Identifier: BSD-3-Clause
"""fuse() on torchvision's models and on what torchvision builds from them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fuse_zoo
from fuse_zoo import image, tame
from resnet_fused.fuse import fuse, unfuse
from resnet_fused.report import report

torchvision = pytest.importorskip("torchvision")
one_thread = fuse_zoo.one_thread

RESNETS = {
    "resnet18": "basic_block",
    "resnet34": "basic_block",
    "resnet50": "bottleneck",
    "resnet101": "bottleneck",
    "resnet152": "bottleneck",
    "resnext50_32x4d": "bottleneck",
    "resnext101_32x8d": "bottleneck",
    "resnext101_64x4d": "bottleneck",
    "wide_resnet50_2": "bottleneck",
    "wide_resnet101_2": "bottleneck",
}


def build(name: str, **kwargs: Any) -> Any:
    """A torchvision model without the costly initialisation of its weights."""
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None, **kwargs)
    return model.to_empty(device="cpu").eval()


def tensors(y: Any) -> list[Tensor]:
    return list(y.values()) if isinstance(y, dict) else [y]


def check(plain: nn.Module, fused: nn.Module, x: Tensor) -> None:
    """As near to float64 as eager is, but for a half more and a rounding floor."""
    with torch.no_grad():
        eager, got = tensors(plain(x)), tensors(fused(x))
        exact = tensors(copy.deepcopy(plain).double()(x.double()))
    for want, like, y in zip(exact, eager, got, strict=True):
        scale = want.abs().max().item()
        assert scale > 0 and y.stride() == like.stride()
        bound = 1.5 * (like - want).abs().max().item() + 2e-6 * scale
        torch.testing.assert_close(y.double(), want, rtol=0, atol=bound)


@pytest.mark.parametrize("name", RESNETS)
def test_every_convolution_is_fused(name: str) -> None:
    """A depth, width or group count leaves a convolution out, or makes a block fall apart."""
    model = build(name)
    rows = report(fuse(model, inplace=True)).rows
    assert all(r.fused for r in rows), [r for r in rows if not r.fused]
    assert [r.pattern for r in rows] == ["stem"] + [RESNETS[name]] * (len(rows) - 1)
    assert [type(m) for m in unfuse(model).modules()] == [type(m) for m in build(name).modules()]


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_numbers(name: str) -> None:
    """A fused network computes something else."""
    plain = tame(build(name))
    check(plain, fuse(plain), image(2, 64))


def test_dilated_and_frozen() -> None:
    """Dilation, or FrozenBatchNorm2d with its own eps, is misread."""
    frozen = torchvision.ops.misc.FrozenBatchNorm2d
    options = {"replace_stride_with_dilation": [False, True, True], "norm_layer": frozen}
    plain = tame(build("resnet50", **options))
    fused = fuse(plain)
    assert all(r.fused for r in report(fused))
    check(plain, fused, image(1, 64))


def test_intermediate_layer_getter() -> None:
    """The getter calls the children itself: fused before or after, outputs must stay eager's."""
    from torchvision.models._utils import IntermediateLayerGetter

    plain_model = tame(build("resnet18"))
    layers = {"relu": "a", "layer2": "b", "layer4": "c"}
    plain = IntermediateLayerGetter(plain_model, layers).eval()
    outside = fuse(plain)
    assert all(r.fused for r in report(outside))
    check(plain, outside, image(1, 64))
    inside = IntermediateLayerGetter(fuse(plain_model), layers)
    assert [r.name for r in report(inside) if not r.fused] == ["conv1"]
    check(plain, inside, image(1, 64))


def test_feature_extractor() -> None:
    """fx-based extraction of a fused model, and fusing of an extractor."""
    from torchvision.models.feature_extraction import create_feature_extractor

    plain_model = tame(build("resnet18"))
    nodes = ["layer1.0.relu", "layer3", "flatten"]
    plain = create_feature_extractor(plain_model, nodes)
    check(plain, create_feature_extractor(fuse(plain_model), nodes), image(1, 64))
    check(plain, fuse(plain), image(1, 64))
    fused = fuse(plain)
    assert all(r.fused or r.name == "conv1" for r in report(fused))
    assert [m.training for m in fused.modules()] == [False] * len(list(plain.modules()))
    copied = copy.deepcopy(fused).eval()
    check(plain, copied, image(1, 64))
    assert report(copied).rows == report(fused).rows


def test_fpn_backbone() -> None:
    """The backbone of the detectors: frozen BatchNorm, an untraceable pyramid around it."""
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    plain = tame(resnet_fpn_backbone(backbone_name="resnet18", weights=None)).eval()
    fused = fuse(plain)
    rows = report(fused)
    assert all(r.fused == r.name.startswith("body.") for r in rows)
    check(plain, fused, image(1, 64))


def test_detector() -> None:
    """A whole Faster R-CNN: frozen BatchNorm in the backbone, lists of images in, boxes out."""
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None)
    plain = torchvision.models.detection.FasterRCNN(backbone, 5, min_size=64, max_size=96)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in plain.modules())
    tame(plain.eval())
    fused = fuse(plain)
    rows = report(fused)
    assert all(r.fused for r in rows if r.name.startswith("backbone.body."))
    assert sum(r.fused for r in rows) == 53 and all(r.fused or r.reason for r in rows)
    x = image(2, 64)
    check(plain.backbone, fused.backbone, x)
    with torch.no_grad():
        want, got = plain(list(x)), fused(list(x))
    assert [d.keys() for d in got] == [d.keys() for d in want] and len(got) == 2
    for m in (plain, fused):
        m.train()
    boxes = [{"boxes": torch.tensor([[4.0, 4, 40, 40]]), "labels": torch.tensor([1])}] * 2
    losses = []
    for m in (plain, fused):
        torch.manual_seed(0)
        losses.append(m(list(x), boxes))
    assert all(torch.equal(losses[0][k], losses[1][k]) for k in losses[0])


@pytest.mark.filterwarnings("ignore:The default weight initialization")
def test_other_families() -> None:
    """Other torchvision models break, rather than being fused in part."""
    for name in ("mobilenet_v2", "densenet121", "vgg11_bn", "googlenet"):
        plain = tame(build(name))
        fused = fuse(plain)
        assert any(r.fused for r in report(fused)), name
        x = image(1, 64)
        with torch.no_grad():
            got, want = fused(x), plain(x)
        scale = want.abs().max().item()
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * scale, msg=name)
