# SPDX-License-Identifier: BSD-3-Clause
"""What the model tests share: the plain forward, and networks with lively numbers."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from resnet_fused import ops
from resnet_fused.models import BasicBlock, Bottleneck, ResNet

DEPTHS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
WIDE = (
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)
M = TypeVar("M", bound=nn.Module)
OPS = ("stem", "conv_bn_act", "basic_block", "bottleneck", "pool_linear")


def plain_block(block: nn.Module, x: Tensor) -> Tensor:
    """A residual block, child by child, as eager torchvision runs it."""
    out = x
    last = 3 if isinstance(block, Bottleneck) else 2
    for i in range(1, last + 1):
        out = getattr(block, f"conv{i}")(out)
        out = getattr(block, f"bn{i}")(out)
        if i < last:
            out = block.relu(out)
    identity = block.downsample(x) if block.downsample is not None else x
    out += identity
    return block.relu(out)


def plain(model: ResNet, x: Tensor) -> Tensor:
    """The whole network, child by child: calls no fused op whatever the mode."""
    x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in stage:
            x = plain_block(block, x)
    return model.fc(torch.flatten(model.avgpool(x), 1))


def exact(model: ResNet, x: Tensor) -> Tensor:
    """The plain network on the same weights and input in float64."""
    return plain(copy.deepcopy(model).double(), x.double())


def rounded(model: ResNet, x: Tensor, dtype: torch.dtype) -> Tensor:
    """``exact`` with every layer's result rounded to ``dtype``, as eager would do it.

    torch's own bfloat16 convolution cannot serve: it is wrong on AMX CPUs for some shapes.
    """
    net = copy.deepcopy(model).double()
    for m in net.modules():
        if isinstance(m, (nn.Conv2d, nn.BatchNorm2d, nn.AdaptiveAvgPool2d, nn.Linear)):
            m.register_forward_hook(lambda m, args, y: y.to(dtype).double())
        elif isinstance(m, nn.ReLU):  # the residual sum is rounded before its ReLU
            m.register_forward_pre_hook(lambda m, args: (args[0].to(dtype).double(),))
    return plain(net, x.double())


def lively(model: M, seed: int = 0) -> M:
    """Give every BatchNorm, frozen ones too, numbers of its own; returns ``model`` in eval mode.

    A fresh BatchNorm is the identity, so a test on it would not see a missing or swapped one. The
    statistics are those of real activations, disturbed: random ones would drown the image, and
    errors of the first layers with it.
    """
    g = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(like.shape, generator=g) * (high - low) + low

    def measure(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        var, mean = torch.var_mean(args[0], (0, 2, 3))
        norm.running_mean.copy_(mean + uniform(mean, -0.3, 0.3) * var.sqrt())
        norm.running_var.copy_(var * uniform(var, 0.5, 2.0) + 0.1 * var.mean())
        if norm.weight is not None:
            norm.weight.copy_(uniform(norm.weight, 0.2, 0.8))
            norm.bias.copy_(uniform(norm.bias, -0.3, 0.3))

    norms = [m for m in model.modules() if getattr(m, "running_mean", None) is not None]
    handles = [m.register_forward_pre_hook(measure) for m in norms]
    with torch.no_grad():
        model.eval()(images(4, 3, 48, 48, seed=seed + 100))
    for handle in handles:
        handle.remove()
    return model


def small(block: type[BasicBlock | Bottleneck] = BasicBlock, **kwargs: Any) -> ResNet:
    """A network with blocks of all kinds, with and without projection, that is quick to run."""
    if not kwargs:
        return copy.deepcopy(_small(block))
    torch.manual_seed(0)
    return lively(ResNet(block, [2, 1, 1, 1], num_classes=10, **kwargs))


@cache
def _small(block: type[BasicBlock | Bottleneck]) -> ResNet:
    return small(block, groups=1)


def images(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """Seeded normal random images."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)


def relative(y: Tensor, reference: Tensor) -> float:
    """Root mean square of the difference over that of the reference."""
    assert y.shape == reference.shape
    return ((y.double() - reference).norm() / reference.norm()).item()


def watch(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that collects the names of the fused ops called from now on, in order."""
    seen: list[str] = []
    for name in OPS:
        op = getattr(ops, name)

        def spy(*args: Any, _op: Any = op, _name: str = name, **kwargs: Any) -> Any:
            seen.append(_name)
            return _op(*args, **kwargs)

        monkeypatch.setattr(ops, name, spy)
    return seen
