# SPDX-License-Identifier: BSD-3-Clause
"""fuse() on the ResNets of timm and transformers, and on torchvision's segmentation models."""

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

one_thread = fuse_zoo.one_thread
__all__ = ["one_thread"]  # a fixture


def outputs(y: Any) -> list[Tensor]:
    """The tensors of a model's result, whatever holds them."""
    if isinstance(y, Tensor):
        return [y]
    values = y.values() if hasattr(y, "values") else y
    return [t for v in values for t in outputs(v)]


def check(plain: nn.Module, size: int, least: float) -> None:
    """Fused in at least that share of its convolutions, within 1.5 of eager's error, reversible."""
    tame(plain.eval())
    keys = list(plain.state_dict())
    classes = [type(m) for m in plain.modules()]
    x = image(2, size)
    fused = fuse(plain)
    rows = report(fused).rows
    share = sum(r.fused for r in rows) / len(rows)
    assert share >= least, [r for r in rows if not r.fused]
    assert all(r.fused or r.reason for r in rows)
    assert list(fused.state_dict()) == keys
    with torch.no_grad():
        eager, got = outputs(plain(x)), outputs(fused(x))
        exact = outputs(copy.deepcopy(plain).double()(x.double()))
    assert len(got) == len(eager) > 0
    for want, like, y in zip(exact, eager, got, strict=True):
        scale = want.abs().max().item()
        error = (like - want).abs().max().item()
        assert scale > 0 and y.shape == like.shape
        torch.testing.assert_close(y.double(), want, rtol=0, atol=1.5 * error + 2e-6 * scale)
    assert [type(m) for m in unfuse(fused).modules()] == classes


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("resnet18", 1.0),
        ("resnet50", 1.0),
        ("resnet26d", 0.8),  # deep stem and average-pooled shortcuts
        ("seresnet50", 0.6),  # squeeze and excitation between the convolutions
        ("resnext50_32x4d", 1.0),
        ("ecaresnet26t", 0.6),
        ("resnext26ts", 1.0),  # every norm is a BatchNormAct2d
        ("regnetx_002", 1.0),
    ],
)
def test_timm(name: str, least: float) -> None:
    """BatchNormAct2d, act1/act2 or an attention module between layers is misread."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    check(timm.create_model(name, pretrained=False, num_classes=10), 64, least)


@pytest.mark.parametrize("kind", ["frozen", "synchronised"])
def test_timm_converted(kind: str) -> None:
    """FrozenBatchNormAct2d or SyncBatchNormAct is left alone, or its activation is lost."""
    timm = pytest.importorskip("timm")
    from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d

    torch.manual_seed(0)
    convert = {"frozen": freeze_batch_norm_2d, "synchronised": convert_sync_batchnorm}[kind]
    for name in ("regnetx_002", "resnet18"):
        check(convert(timm.create_model(name, pretrained=False, num_classes=10).eval()), 64, 1.0)


def test_timm_features() -> None:
    """features_only wraps the network and reads intermediates that a block call would hide."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    check(timm.create_model("resnet18", pretrained=False, features_only=True), 64, 0.9)


def test_transformers_with_a_frozen_norm_of_its_own() -> None:
    """One whose eps stands in its code is guessed; and the report must say what is in the way."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.RTDetrResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic"
    )
    model = transformers.RTDetrResNetBackbone(config)
    check(model, 64, 1.0)
    from transformers.models.rt_detr.modeling_rt_detr import replace_batch_norm

    replace_batch_norm(model)
    rows = report(model)
    assert {(r.pattern, r.reason) for r in rows} == {
        ("", "its output goes to mul, not to a BatchNorm")
    }


@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
def test_transformers(layer_type: str) -> None:
    """A ResNet whose activation is looked up by name and whose result is a named tuple."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], layer_type=layer_type
    )
    check(transformers.ResNetModel(config), 64, 1.0)


@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_resnet50"])
def test_segmentation(name: str) -> None:
    """A dilated backbone behind a getter, with a head of other convolutions."""
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None)
    check(model, 64, 0.9)
