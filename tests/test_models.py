# SPDX-License-Identifier: BSD-3-Clause
"""The ResNets are built as torchvision's: keys, children, attributes, initial weights, errors."""

from __future__ import annotations

import hashlib
import inspect
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import resnet_fused
from resnet_cases import DEPTHS, WIDE, images, plain_block
from resnet_fused import models
from resnet_fused.models import BasicBlock, Bottleneck, ResNet
from resnet_fused.models.resnet import conv1x1, conv3x3
from resnet_fused.modules import Fused

GOLDEN = json.loads((Path(__file__).parent / "data" / "resnet_keys.json").read_text())


def empty(name: str, **kwargs: object) -> ResNet:
    """A network without memory: enough for names and shapes."""
    with torch.device("meta"):
        return getattr(models, name)(**kwargs)


def lines(model: nn.Module) -> list[str]:
    state = model.state_dict()
    return [f"{k} {'x'.join(map(str, v.shape))}".strip() for k, v in state.items()]


@pytest.mark.parametrize("name", DEPTHS + WIDE)
def test_keys_shapes_and_parameter_counts_are_torchvisions(name: str) -> None:
    """A renamed, reordered, added or resized tensor: checkpoints would not load either way."""
    golden, model = GOLDEN[name], empty(name)
    assert sum(p.numel() for p in model.parameters()) == golden["parameters"]
    if name in DEPTHS:
        assert lines(model) == golden["keys"]
    assert hashlib.sha256("\n".join(lines(model)).encode()).hexdigest() == golden["sha256"]


def test_the_golden_list_holds_the_published_parameter_counts() -> None:
    """A golden file regenerated from wrong code."""
    counts = [GOLDEN[name]["parameters"] for name in DEPTHS]
    assert counts == [11689512, 21797672, 25557032, 44549160, 60192808]
    assert [GOLDEN[name]["entries"] for name in DEPTHS] == [122, 218, 320, 626, 932]


def test_builders_and_classes_are_reachable_from_the_top() -> None:
    """A name that drops out of the package's public names."""
    for name in (*DEPTHS, *WIDE, "ResNet"):
        assert getattr(resnet_fused, name) is getattr(models, name)
    for name in (*DEPTHS, *WIDE, "ResNet", "BasicBlock", "Bottleneck", "conv1x1", "conv3x3"):
        assert hasattr(models.resnet, name)


def test_children_come_in_torchvisions_order() -> None:
    """Code that walks named_children, such as IntermediateLayerGetter, runs them in this order."""

    def children(module: nn.Module) -> str:
        return " ".join(name for name, _ in module.named_children())

    model = empty("resnet50")
    assert children(model) == "conv1 bn1 relu maxpool layer1 layer2 layer3 layer4 avgpool fc"
    assert children(model.layer1[0]) == "conv1 bn1 conv2 bn2 conv3 bn3 relu downsample"
    assert children(empty("resnet18").layer2[0]) == "conv1 bn1 relu conv2 bn2 downsample"
    assert [type(m) for m in model.layer1[0].downsample] == [nn.Conv2d, nn.BatchNorm2d]
    assert model.layer1[1].downsample is None


def test_children_are_plain_modules() -> None:
    """SyncBatchNorm.convert, pruning and quantisation tools look for the exact classes."""
    kinds = {type(m) for m in empty("resnet50").modules()}
    assert kinds == {
        *(ResNet, Bottleneck, nn.Sequential, nn.Conv2d, nn.BatchNorm2d, nn.ReLU),
        *(nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Linear),
    }


def test_attributes_other_code_reads() -> None:
    """resnet_fpn_backbone reads inplanes; others stride, expansion and fc.in_features."""
    model = empty("resnext50_32x4d", replace_stride_with_dilation=[False, True, True])
    got = (model.inplanes, model.dilation, model.groups, model.base_width, model._norm_layer)
    assert got == (2048, 4, 32, 4, nn.BatchNorm2d)
    assert (BasicBlock.expansion, Bottleneck.expansion) == (1, 4)
    assert model.fc.in_features == 2048
    assert [layer[0].stride for layer in (model.layer1, model.layer2, model.layer3)] == [1, 2, 1]


@pytest.mark.parametrize("function", [ResNet, BasicBlock, Bottleneck, conv1x1, conv3x3])
def test_signatures_are_torchvisions(function: type) -> None:
    """An argument renamed, moved or with another default."""
    block = (
        "inplanes planes stride=1 downsample=None groups=1 base_width=64 dilation=1 norm_layer=None"
    )
    expected = {
        ResNet: "block layers num_classes=1000 zero_init_residual=False groups=1 "
        "width_per_group=64 replace_stride_with_dilation=None norm_layer=None",
        BasicBlock: block,
        Bottleneck: block,
        conv1x1: "in_planes out_planes stride=1",
        conv3x3: "in_planes out_planes stride=1 groups=1 dilation=1",
    }[function]
    got = inspect.signature(function).parameters.values()
    assert " ".join(str(p.replace(annotation=p.empty)) for p in got) == expected


@pytest.mark.parametrize(
    ("dilate", "strides", "dilations"),
    [
        ((False, False, False), [1, 2, 2, 2], [1, 1, 1, 1, 1, 1]),
        ((False, False, True), [1, 2, 2, 1], [1, 1, 1, 1, 1, 2]),
        ((False, True, True), [1, 2, 1, 1], [1, 1, 1, 2, 2, 4]),
        ((True, True, True), [1, 1, 1, 1], [1, 2, 2, 4, 4, 8]),
    ],
)
def test_dilation_replaces_stride(
    dilate: tuple[bool, ...], strides: list[int], dilations: list[int]
) -> None:
    """The first block of a dilated stage keeps the dilation before it, or features shift."""
    model = empty("resnet50", replace_stride_with_dilation=dilate)
    stages = [model.layer1, model.layer2, model.layer3, model.layer4]
    assert [s[0].conv2.stride[0] for s in stages] == strides
    assert [s[0].downsample[0].stride[0] for s in stages] == strides
    assert [b.conv2.dilation[0] for s in stages[1:] for b in s[:2]] == dilations
    assert all(b.conv2.padding == b.conv2.dilation for s in stages for b in s)


def test_weights_start_as_the_formula_says() -> None:
    """Another order of random draws: the same seed would no longer give torchvision's weights."""
    torch.manual_seed(3)
    model = ResNet(Bottleneck, [1, 2, 1, 1], num_classes=7, groups=2, width_per_group=32)
    named = dict(model.named_modules())
    convs = [n for n, m in named.items() if isinstance(m, nn.Conv2d)]
    # A stage makes its projection before the block that owns it.
    built = sorted(convs, key=lambda n: (n[:8] if n[0] == "l" else "", "downsample" not in n))

    torch.manual_seed(3)
    weight = {}
    for name in built:
        m = named[name]
        k, s, p, d = m.kernel_size, m.stride, m.padding, m.dilation
        new = nn.Conv2d(m.in_channels, m.out_channels, k, s, p, d, m.groups, bias=False)
        weight[name] = new.weight
    fc = nn.Linear(2048, 7)
    for name in convs:
        w = weight[name].data
        w.normal_(0, (2 / (w.shape[0] * w.shape[2] * w.shape[3])) ** 0.5)

    for name in convs:
        assert torch.equal(named[name].weight, weight[name]), name
    assert torch.equal(model.fc.weight, fc.weight) and torch.equal(model.fc.bias, fc.bias)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            assert m.weight.eq(1).all() and m.bias.eq(0).all()


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_zero_init_residual_makes_blocks_the_identity(block: type) -> None:
    """The flag zeroes another BatchNorm, or none."""
    torch.manual_seed(0)
    model = ResNet(block, [2, 1, 1, 1], zero_init_residual=True).eval()
    x = images(2, 64 * block.expansion, 5, 7)
    assert torch.equal(model.layer1[1](x), x.relu())
    assert torch.equal(plain_block(model.layer1[1], x), x.relu())
    last = "bn2" if block is BasicBlock else "bn3"
    zero = [n for n, p in model.named_parameters() if n.endswith("weight") and not p.any()]
    assert zero == [f"layer{i}.{last}.weight" for i in ("1.0", "1.1", "2.0", "3.0", "4.0")]


def test_every_module_names_the_calls_it_makes() -> None:
    """A report built on fused_sites that misses a convolution or names one twice."""
    for model in (empty("resnet18"), empty("resnet50")):
        covered = [
            f"{name}.{conv}".lstrip(".")
            for name, m in model.named_modules()
            if isinstance(m, Fused)
            for site in m.fused_sites()
            for conv in site.convs
        ]
        convs = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
        assert sorted(covered) == sorted(convs)
        for m in model.modules():
            for site in m.fused_sites() if isinstance(m, Fused) else ():
                assert set(site.convs) <= set(site.modules)
                assert all(m.get_submodule(name) is not None for name in site.modules)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: BasicBlock(8, 8, groups=2), ValueError, "groups=1 and base_width=64, got 2"),
        (lambda: BasicBlock(8, 8, base_width=128), ValueError, "base_width=64, got 1 and 128"),
        (lambda: BasicBlock(8, 8, dilation=2), NotImplementedError, "dilation=1, got 2"),
        (lambda: empty("resnet18", groups=2), ValueError, "groups=1"),
        (
            lambda: empty("resnet18", replace_stride_with_dilation=(False, True, False)),
            NotImplementedError,
            "dilation=1, got 2",
        ),
        (
            lambda: empty("resnet50", replace_stride_with_dilation=[True, False]),
            ValueError,
            r"replace_stride_with_dilation must be None or three booleans, got \[True, False\]",
        ),
        (lambda: empty("resnext50_32x4d", groups=8), ValueError, "groups must be 32 .* got 8"),
        (lambda: empty("wide_resnet50_2", width_per_group=64), ValueError, "must be 128"),
        (lambda: empty("resnet18", pretrained=True), TypeError, "weights='IMAGENET1K_V1'"),
        (lambda: empty("resnet18", classes=3), TypeError, "classes"),
    ],
)
def test_wrong_arguments_raise_torchvisions_error_types(
    make: object, error: type[Exception], message: str
) -> None:
    """A wrong argument that is taken silently, or an error that does not say what to change."""
    with pytest.raises(error, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 4, 64, 64)])
def test_wrong_input_raises(training: bool, shape: tuple[int, ...]) -> None:
    """An image without a batch, or with other channels, that gives numbers instead of an error."""
    model = models.resnet18(num_classes=2).train(training)
    with pytest.raises((ValueError, RuntimeError)):
        model(images(*shape))
