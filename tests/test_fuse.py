# SPDX-License-Identifier: BSD-3-Clause
"""fuse(): what it finds in models written in the usual styles, and that the numbers stay right."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fuse_zoo
from fuse_zoo import (
    AddBlock,
    Backbone,
    Basic,
    Bottle,
    Cifar,
    D2l,
    DataDependent,
    HelperBlock,
    Net,
    PreAct,
    SqueezeBlock,
    TimmBlock,
    image,
    randomise,
)
from resnet_fused.fuse import fuse, unfuse
from resnet_fused.modules import Fused
from resnet_fused.report import report

one_thread = fuse_zoo.one_thread

STEM = {"conv1": "stem"}


def block(prefix: str, pattern: str, *convs: str) -> dict[str, str]:
    return {f"{prefix}.{conv}": pattern for conv in convs}


def basic(down: str) -> dict[str, str]:
    """Rows of two basic blocks, the second with a projection."""
    return {
        **block("layer1.0", "basic_block", "conv1", "conv2"),
        **block("layer1.1", "basic_block", "conv1", "conv2", down),
    }


# model and, per convolution, the pattern or, after "-", a part of the reason
ZOO: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "torchvision": (lambda: Net(Basic(8, 8), Basic(8, 16, 2)), {**STEM, **basic("downsample.0")}),
    "bottleneck": (
        lambda: Net(Bottle(8, 4, 8), Bottle(8, 4, 16, 2, groups=2)),
        {
            **STEM,
            **block("layer1.0", "bottleneck", "conv1", "conv2", "conv3"),
            **block("layer1.1", "bottleneck", "conv1", "conv2", "conv3", "identity_downsample.0"),
        },
    ),
    "cifar": (
        Cifar,
        {
            "conv1": "conv_bn_act",
            **block("layers.0", "basic_block", "conv1", "conv2"),
            **block("layers.1", "basic_block", "conv1", "conv2", "shortcut.0"),
        },
    ),
    "sequential": (
        D2l,
        {
            "0.0": "stem",
            **block("1.0", "basic_block", "conv1", "conv2"),
            **block("1.1", "conv_bn_act", "conv1", "conv2"),
            "1.1.conv3": "-its output goes to iadd, not to a BatchNorm",
        },
    ),
    "helpers": (
        lambda: Net(HelperBlock(8, 4, 8), HelperBlock(8, 4, 16, 2)),
        {
            **STEM,
            **block("layer1.0.layer", "bottleneck", "0.conv", "1.conv", "2.conv"),
            **block("layer1.1.layer", "bottleneck", "0.conv", "1.conv", "2.conv"),
            "layer1.1.shortcut.conv": "bottleneck",
        },
    ),
    "timm": (
        lambda: Net(TimmBlock(8, 8), TimmBlock(8, 16, 2)),
        {
            **STEM,
            **block("layer1.0", "basic_block", "conv1", "conv2"),
            **block("layer1.1", "conv_bn_act", "conv1", "conv2", "downsample.1"),
        },
    ),
    "squeeze": (
        lambda: Net(SqueezeBlock(8), width=8),
        {**STEM, **block("layer1.0", "conv_bn_act", "conv1", "conv2")},
    ),
    "preactivation": (
        lambda: Net(PreAct(8), PreAct(8, inplace=True), width=8),
        {
            **STEM,
            "layer1.0.conv1": "conv_bn_act",
            "layer1.0.conv2": "-its output goes to add",
            "layer1.1.conv1": "conv_bn_act",
            "layer1.1.conv2": "-its output goes to add",
        },
    ),
    "data dependent": (
        lambda: DataDependent(Basic(8, 8), Basic(8, 16, 2)),
        {
            "conv1": "-DataDependent: its forward depends on the values or the shape of a tensor",
            **basic("downsample.0"),
        },
    ),
    "backbone": (
        Backbone,
        {
            "stem.conv": "conv_bn_act",
            **block("stages.0", "basic_block", "conv1", "conv2"),
            **block("stages.1", "basic_block", "conv1", "conv2", "downsample.0"),
        },
    ),
    **{
        f"add: {style}": (
            lambda style=style: Net(AddBlock(8, style), width=8),
            {**STEM, **block("layer1.0", "basic_block", "a", "b")},
        )
        for style in AddBlock.STYLES
    },
}


def outputs(y: Any) -> list[Tensor]:
    return list(y.values()) if isinstance(y, dict) else [y]


def check_like_float64(fused: nn.Module, plain: nn.Module, x: Tensor) -> None:
    """``fused(x)`` is within float32 rounding of the unfused model in float64."""
    with torch.no_grad():
        exact = outputs(copy.deepcopy(plain).double()(x.double()))
        eager, got = outputs(plain(x)), outputs(fused(x))
    assert len(exact) == len(got)
    for want, like, y in zip(exact, eager, got, strict=True):
        assert y.shape == like.shape and y.dtype == like.dtype and y.stride() == like.stride()
        # Twenty layers of relative error 2^-24, each with a condition number of a few.
        torch.testing.assert_close(y.double(), want, rtol=0, atol=3e-6 * want.abs().max().item())


@pytest.mark.parametrize("name", ZOO)
def test_zoo(name: str) -> None:
    """A pattern is missed, misread or given the wrong modules."""
    make, expected = ZOO[name]
    plain = randomise(make())
    fused = fuse(plain)
    rows = report(fused)
    assert [r.name for r in rows] == list(expected)
    for row in rows:
        want = expected[row.name]
        if want.startswith("-"):
            assert not row.fused and want[1:] in row.reason, row
        else:
            assert row.fused and row.pattern == want, row
    check_like_float64(fused, plain, image())
    if name != "backbone":  # its ``view`` fails in eager, too
        check_like_float64(fused, plain, image().contiguous(memory_format=torch.channels_last))
    assert not any(isinstance(m, Fused) for m in plain.modules()), "the original was changed"


@pytest.mark.parametrize("name", ["torchvision", "helpers", "sequential", "backbone"])
def test_unfuse_and_again(name: str) -> None:
    """unfuse leaves a class, name, key or attribute behind; a second fuse changes something."""
    model = randomise(ZOO[name][0]())
    before = {n: (type(m), list(m.__dict__)) for n, m in model.named_modules()}
    keys = list(model.state_dict())
    assert fuse(model, inplace=True) is model
    assert [n for n, _ in model.named_modules()] == list(before)
    assert list(model.state_dict()) == keys
    first = {n: type(m) for n, m in model.named_modules()}
    rows = report(model).rows
    fuse(model, inplace=True)
    assert {n: type(m) for n, m in model.named_modules()} == first
    assert report(model).rows == rows
    assert unfuse(model) is model
    assert {n: (type(m), list(m.__dict__)) for n, m in model.named_modules()} == before


def test_fused_classes_are_the_old_ones_and_more() -> None:
    """isinstance checks of other code fail, or two models of one class get two classes."""
    a, b = fuse(Net(Basic(8, 8), width=8)), fuse(Net(Basic(8, 8), width=8))
    assert isinstance(a, Net) and isinstance(a.layer1[0], Basic)
    assert type(a) is type(b) and type(a).__name__ == "FusedNet"
    assert type(a).__module__ == Net.__module__


def test_nothing_to_fuse_warns_and_changes_nothing() -> None:
    """A user who fuses the wrong thing is not told, or gets a changed model."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    with pytest.warns(UserWarning, match=r"nothing in Sequential was fused"):
        fused = fuse(model)
    assert type(fused) is nn.Sequential
    (row,) = report(fused)
    assert not row.fused and row.reason == "its output goes to ReLU, not to a BatchNorm"


def test_own_models_are_left_as_they_are() -> None:
    """fuse() wraps modules that are fused already, or warns about them."""
    from resnet_fused.models import resnet18

    model = resnet18()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [type(m) for m in fuse(model).modules()] == [type(m) for m in model.modules()]
    assert all(r.fused for r in report(model.eval()))


def test_own_block_with_another_forward() -> None:
    """A forward written over an own block's is taken for the own block's."""
    from resnet_fused.models import BasicBlock

    class Mine(BasicBlock):
        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.bn1(self.conv1(x)))

    plain = randomise(Mine(3, 3))
    fused = fuse(plain)
    assert [(r.name, r.pattern, r.fused) for r in report(fused)] == [
        ("conv1", "conv_bn_act", True),
        ("conv2", "", False),
    ]
    check_like_float64(fused, plain, image())


def test_sites() -> None:
    """fused_sites() forgets a submodule, or its order is not that of execution."""
    fused: Any = fuse(randomise(Net(Basic(8, 8), Basic(8, 16, 2))))
    assert [(s.pattern, s.modules, s.convs) for s in fused.fused_sites()] == [
        ("stem", ("conv1", "bn1", "relu", "maxpool"), ("conv1",)),
        ("pool_linear", ("avgpool", "fc"), ()),
    ]
    (site,) = fused.layer1[1].fused_sites()
    own = ("conv1", "bn1", "relu", "conv2", "bn2")
    assert site.modules == (*own, "downsample", "downsample.0", "downsample.1")
    assert site.convs == ("conv1", "conv2", "downsample.0")


def test_wrong_argument() -> None:
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
        fuse("resnet50")  # type: ignore[arg-type]


def test_memory_formats() -> None:
    """The output's strides differ from eager's, so that a ``view`` behind it fails."""
    plain = randomise(nn.Sequential(Basic(3, 4), Basic(4, 4)))
    fused = fuse(plain)
    x = image()
    last = torch.channels_last
    views = {
        "contiguous": x,
        "channels_last": x.contiguous(memory_format=last),
        "every second row": image(2, 40)[:, :, ::2],
        "expanded batch": x[:1].expand(3, -1, -1, -1),
        "one channel of many": image(2, 20, c=9)[:, ::3],
        "second half of the batch": image(4).contiguous(memory_format=last)[2:],
        "one pixel": x[:, :, :1, :1],
        "empty batch": x[:0],
    }
    for name, view in views.items():
        with torch.no_grad():
            want, got = plain(view), fused(view)
        assert got.stride() == want.stride(), name
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, msg=name)
    with torch.no_grad():
        plain.to(memory_format=last)
        assert fuse(plain)(x).stride() == plain(x).stride(), "channels_last weights"


def test_one_conversion_per_sequence() -> None:
    """Every block converts to channels_last and back, not just the first and the last."""
    plain = randomise(nn.Sequential(Basic(3, 4), Basic(4, 4), Basic(4, 4)))
    fused = fuse(plain)
    seen: list[bool] = []
    for block in fused:
        block.register_forward_pre_hook(
            lambda m, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
        )
    x = image()
    check_like_float64(fused, plain, x)
    assert seen == [True] * 3
    kept = x.clone()
    fused(x)
    assert torch.equal(x, kept) and x.is_contiguous()


class Writes(nn.Module):
    """Blocks around a module that changes its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = Basic(3, 3), Basic(3, 3), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(self.c(x))) + x


def test_no_conversion_of_an_input_that_is_written() -> None:
    """An in-place operation changes a converted copy, and the caller's tensor stays as it was."""
    plain = randomise(Writes())
    fused = fuse(plain)
    a, b = image(), image()
    with torch.no_grad():
        torch.testing.assert_close(fused(a), plain(b), rtol=1e-4, atol=1e-5)
    assert torch.equal(a, b) and not torch.equal(a, image())
