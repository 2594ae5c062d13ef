# SPDX-License-Identifier: BSD-3-Clause
"""Every distinct convolution and block of ResNet-18 to 152, read off the models themselves.

`python benchmarks/shapes.py` prints them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from resnet_fused import models

MODELS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


@dataclass(frozen=True, order=True)
class Conv:
    """A square convolution without groups: channels in and out, window, stride, input size."""

    size: int
    c: int
    k: int
    r: int
    stride: int

    def __str__(self) -> str:
        return f"{self.r}x{self.r}s{self.stride}-{self.c}-{self.k}-at{self.size}"

    def module(self) -> nn.Sequential:
        """The convolution with its BatchNorm and ReLU."""
        conv = nn.Conv2d(self.c, self.k, self.r, self.stride, self.r // 2, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(self.k), nn.ReLU(inplace=True))


@dataclass(frozen=True, order=True)
class Block:
    """A residual block: its op, input size and channels, `planes`, stride."""

    op: str
    size: int
    c: int
    planes: int
    stride: int
    projection: bool

    def __str__(self) -> str:
        kind = "projection" if self.projection else "identity"
        return f"{self.c}-{self.planes}s{self.stride}-{kind}-at{self.size}"

    def module(self) -> nn.Module:
        """The block."""
        kind = models.BasicBlock if self.op == "basic_block" else models.Bottleneck
        out = self.planes * kind.expansion
        down = None
        if self.projection:
            conv = nn.Conv2d(self.c, out, 1, self.stride, bias=False)
            down = nn.Sequential(conv, nn.BatchNorm2d(out))
        return kind(self.c, self.planes, self.stride, down)


@cache
def _inputs(name: str, size: int) -> list[tuple[nn.Module, torch.Size]]:
    """Every convolution and block of a model with its input's shape, in execution order."""
    seen: list[tuple[nn.Module, torch.Size]] = []

    def note(module: nn.Module, args: Any) -> None:
        seen.append((module, args[0].shape))

    with torch.device("meta"):
        model = getattr(models, name)()
        for module in model.modules():
            if isinstance(module, nn.Conv2d | models.BasicBlock | models.Bottleneck):
                module.register_forward_pre_hook(note)
        model.train()(torch.empty(2, 3, size, size))  # train mode calls every module
    return seen


def convs(size: int = 224) -> list[Conv]:
    """Distinct convolutions of all models behind the stem, for square images of `size`."""
    found = set()
    for name in MODELS:
        for module, shape in _inputs(name, size):
            if isinstance(module, nn.Conv2d) and module.in_channels > 3:
                k, r, stride = module.out_channels, module.kernel_size[0], module.stride[0]
                found.add(Conv(shape[2], shape[1], k, r, stride))
    return sorted(found, reverse=True)


def blocks(size: int = 224) -> list[Block]:
    """Distinct residual blocks of all models."""
    found = set()
    for name in MODELS:
        for module, shape in _inputs(name, size):
            if isinstance(module, models.BasicBlock | models.Bottleneck):
                basic = isinstance(module, models.BasicBlock)
                planes = module.conv1.out_channels
                op = "basic_block" if basic else "bottleneck"
                down = module.downsample is not None
                found.add(Block(op, shape[2], shape[1], planes, module.stride, down))
    return sorted(found, reverse=True)


def features(size: int = 224) -> list[tuple[int, int]]:
    """Distinct (channels, size) of the blocks' outputs: what residual additions work on."""
    sizes = {}
    for b in blocks(size):
        channels = b.planes * (1 if b.op == "basic_block" else 4)
        sizes[channels, -(-b.size // b.stride)] = None
    return list(sizes)


def main() -> None:
    """Print all shapes."""
    for title, shapes in (("convolutions", convs()), ("blocks", blocks())):
        print(f"{len(shapes)} {title}")
        for shape in shapes:
            print(f"  {getattr(shape, 'op', 'conv_bn_act'):12} {shape}")


if __name__ == "__main__":
    main()
