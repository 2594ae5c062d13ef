# SPDX-License-Identifier: BSD-3-Clause
"""The least time that a network can take when every fused op is one kernel.

A unit is one kernel. Its floor is max(operations / peak, bytes / bandwidth), where the bytes are
those of its inputs, parameters and outputs, each counted once. The floor of a network is the sum
over its units: kernels do not overlap. Between kernels everything is counted as coming from memory,
so a network whose activations or weights stay in L2 can be faster than its floor.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import groupby

import torch
from torch import nn

from resnet_fused import models
from resnet_fused.profile.peaks import Ceilings


@dataclass(frozen=True)
class Unit:
    """One kernel: operations (a multiply-add is two) and bytes to and from memory."""

    name: str
    flops: float
    bytes: float

    def floor(self, c: Ceilings) -> float:
        """Seconds."""
        return c.floor(self.flops, self.bytes)


@dataclass(frozen=True)
class Conv:
    """A square convolution with its BatchNorm: channels, window, stride, sizes in and out."""

    name: str
    c: int
    k: int
    r: int
    stride: int
    size: int
    out: int
    residual: bool = False  # something is added behind it

    def flops(self, n: int) -> float:
        return 2.0 * n * self.out**2 * self.k * self.c * self.r**2

    def inputs(self, n: int) -> int:
        """Elements read; a strided 1x1 touches only the pixels it samples."""
        return n * (self.out if self.r == 1 else self.size) ** 2 * self.c

    def outputs(self, n: int) -> int:
        return n * self.out**2 * self.k

    def parameters(self) -> int:
        """Elements of the weight and of the BatchNorm's four vectors."""
        return self.k * self.c * self.r**2 + 4 * self.k

    def unit(self, n: int, element: int) -> Unit:
        """The convolution with everything behind it as one kernel; `element` in bytes."""
        moved = self.inputs(n) + self.parameters() + self.outputs(n) * (2 if self.residual else 1)
        return Unit(self.name, self.flops(n), element * moved)


@dataclass(frozen=True)
class Block:
    """A residual block: its convolutions in order and its projection, if it has one."""

    convs: tuple[Conv, ...]
    projection: Conv | None

    def units(self, n: int, element: int) -> list[Unit]:
        """A projection runs inside the last convolution's kernel: its result is never stored."""
        units = [conv.unit(n, element) for conv in self.convs]
        if self.projection is not None:
            last, side = self.convs[-1], self.projection
            extra = side.inputs(n) + side.parameters() - last.outputs(n)
            units[-1] = Unit(
                f"{last.name} + projection",
                units[-1].flops + side.flops(n),
                units[-1].bytes + element * extra,
            )
        return units


@dataclass(frozen=True)
class Network:
    """A ResNet as the kernels see it."""

    stem: Conv
    blocks: tuple[Block, ...]
    features: int
    classes: int

    @property
    def pooled(self) -> int:
        """Height and width behind the stem's max-pool."""
        return (self.stem.out - 1) // 2 + 1

    def stem_unit(self, n: int, element: int) -> Unit:
        """Convolution and max-pool in one kernel."""
        moved = self.stem.inputs(n) + self.stem.parameters() + n * self.pooled**2 * self.stem.k
        return Unit("stem", self.stem.flops(n), element * moved)

    def head_unit(self, n: int, element: int) -> Unit:
        """Average pool and linear layer."""
        last = self.blocks[-1].convs[-1]
        moved = last.outputs(n) + (self.features + 1) * self.classes + n * self.classes
        return Unit("pool_linear", 2.0 * n * self.features * self.classes, element * moved)

    def units(self, n: int, element: int) -> list[Unit]:
        """Every kernel of a forward pass of n images, `element` bytes per number."""
        blocks = [unit for block in self.blocks for unit in block.units(n, element)]
        return [self.stem_unit(n, element), *blocks, self.head_unit(n, element)]


def floor(units: Iterable[Unit], c: Ceilings) -> float:
    """Seconds for kernels one after another."""
    return sum(unit.floor(c) for unit in units)


def _convolutions(name: str, size: int) -> list[Conv]:
    """Every convolution of a model in execution order, named by its place in the model."""
    found: list[Conv] = []

    def note(path: str, module: nn.Conv2d, args: tuple[torch.Tensor]) -> None:
        at, r, stride = args[0].shape[2], module.kernel_size[0], module.stride[0]
        pad = int(module.padding[0])
        out = (at + 2 * pad - r) // stride + 1
        found.append(Conv(path, module.in_channels, module.out_channels, r, stride, at, out))

    with torch.device("meta"):
        model = getattr(models, name)()
        for path, module in model.named_modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_pre_hook(partial(note, path))
        model.train()(torch.empty(2, 3, size, size))  # train mode calls every module
    return found


@cache
def network(name: str, size: int = 224) -> Network:
    """Read a model of this package off itself, for square images of `size`."""
    stem, *convs = _convolutions(name, size)
    blocks = []
    for _, group in groupby(convs, key=lambda conv: conv.name.split(".")[:2]):
        main, side = [], None
        for conv in group:
            if ".downsample" in conv.name:
                side = conv
            else:
                main.append(conv)
        main[-1] = replace(main[-1], residual=True)
        blocks.append(Block(tuple(main), side))
    return Network(stem, tuple(blocks), blocks[-1].convs[-1].k, 1000)
