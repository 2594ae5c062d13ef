# SPDX-License-Identifier: BSD-3-Clause
"""Small seeded inputs for every op, each with what the op must give for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resnet_fused import ops
from resnet_fused.bench import expected
from resnet_fused.input_norm import InputNorm
from resnet_fused.ops import ConvBN


@dataclass(frozen=True)
class Case:
    """One call of one op; `resnet_fused.bench.expected` has a function that takes the same."""

    op: str
    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def run(self) -> Tensor:
        """Call the op."""
        y: Tensor = getattr(ops, self.op)(*self.args, **self.kwargs)
        return y

    def expect(self, u: expected.Roundings) -> expected.Expected:
        """Compute the same in float64."""
        e: expected.Expected = getattr(expected, self.op)(*self.args, **self.kwargs, u=u)
        return e


class Draw:
    """Makes random inputs of one dtype on one device from one seed."""

    def __init__(
        self, dtype: torch.dtype, device: str, layout: torch.memory_format, seed: int
    ) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._dtype, self._device = dtype, device
        self._layout = layout

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator)

    def _place(self, t: Tensor) -> Tensor:
        return t.to(self._device, self._dtype)

    def image(self, *shape: int) -> Tensor:
        """A feature map or a batch of images, in the layout."""
        return self._place(self._normal(*shape)).contiguous(memory_format=self._layout)

    def bytes(self, *shape: int) -> Tensor:
        """A batch of images as they are decoded, in the layout."""
        levels = torch.randint(256, shape, generator=self._generator, dtype=torch.uint8)
        return levels.to(self._device).contiguous(memory_format=self._layout)

    def vector(self, *shape: int) -> Tensor:
        """A weight or bias of a linear layer."""
        return self._place(self._normal(*shape))

    def conv(
        self,
        c: int,
        k: int,
        r: int,
        stride: int = 1,
        *,
        groups: int = 1,
        dilation: int = 1,
        bn: bool = True,
    ) -> ConvBN:
        """An r x r convolution from c to k channels that keeps the size, with its BatchNorm."""
        weight = self._normal(k, c // groups, r, r) * (2 / (c // groups * r * r)) ** 0.5
        spread = 0.5 + torch.rand(2, k, generator=self._generator)
        shift = self._normal(3, k) * 0.3
        weight, gamma, var, bias, beta, mean = (
            self._place(t) for t in (weight.contiguous(memory_format=self._layout), *spread, *shift)
        )
        pad = dilation * (r - 1) // 2
        plain = ConvBN(
            weight,
            bias,
            stride=(stride, stride),
            padding=(pad, pad),
            dilation=(dilation, dilation),
            groups=groups,
        )
        if not bn:
            return plain
        return plain._replace(bn_weight=gamma, bn_bias=beta, running_mean=mean, running_var=var)


Plan = tuple[str, tuple[Any, ...], dict[str, Any]]


def _conv_bn_act(draw: Draw) -> Iterator[Plan]:
    image, conv = draw.image, draw.conv
    yield "3x3", (image(2, 64, 14, 14), conv(64, 64, 3)), {"residual": image(2, 64, 14, 14)}
    yield "1x1 without relu", (image(2, 64, 7, 7), conv(64, 256, 1)), {"relu": False}
    yield (
        "odd sizes, stride 2",
        (image(3, 33, 15, 13), conv(33, 17, 3, 2)),
        {"residual": image(3, 17, 8, 7)},
    )
    yield "7x7 on 3 channels", (image(1, 3, 31, 45), conv(3, 64, 7, 2)), {}
    yield "grouped", (image(2, 32, 9, 9), conv(32, 64, 3, groups=8)), {}
    yield "dilated", (image(1, 16, 11, 10), conv(16, 16, 3, dilation=2)), {}
    yield "no BatchNorm", (image(2, 8, 5, 6), conv(8, 24, 3, bn=False)), {}
    # torch's own bfloat16 convolution is wrong here on CPUs with AMX
    yield "output 1 pixel wide", (image(1, 64, 56, 2), conv(64, 64, 3, 2)), {}


def _add_relu(draw: Draw) -> Iterator[Plan]:
    for shape in ((2, 64, 14, 14), (1, 3, 5, 7), (1, 1, 1, 1)):
        yield f"{list(shape)}", (draw.image(*shape), draw.image(*shape)), {}


def _stem(draw: Draw) -> Iterator[Plan]:
    yield "64x64", (draw.image(2, 3, 64, 64), draw.conv(3, 64, 7, 2)), {}
    yield "odd sizes", (draw.image(1, 3, 33, 47), draw.conv(3, 40, 7, 2)), {}
    norm = InputNorm((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    yield "bytes", (draw.bytes(2, 3, 37, 43), draw.conv(3, 64, 7, 2)), {"norm": norm}


def _basic_block(draw: Draw) -> Iterator[Plan]:
    conv = draw.conv
    yield "identity", (draw.image(2, 64, 14, 14), conv(64, 64, 3), conv(64, 64, 3)), {}
    yield (
        "projection",
        (draw.image(2, 32, 15, 13), conv(32, 48, 3, 2), conv(48, 48, 3), conv(32, 48, 1, 2)),
        {},
    )


def _bottleneck(draw: Draw) -> Iterator[Plan]:
    conv = draw.conv
    convs = conv(128, 32, 1), conv(32, 32, 3), conv(32, 128, 1)
    yield "identity", (draw.image(2, 128, 14, 14), *convs), {}
    convs = conv(64, 32, 1), conv(32, 32, 3, 2, groups=4), conv(32, 96, 1)
    yield "grouped, projection", (draw.image(2, 64, 15, 13), *convs, conv(64, 96, 1, 2)), {}


def _pool_linear(draw: Draw) -> Iterator[Plan]:
    yield "7x7", (draw.image(3, 512, 7, 7), draw.vector(10, 512), draw.vector(10)), {}
    yield "1 pixel", (draw.image(2, 33, 1, 1), draw.vector(17, 33), draw.vector(17)), {}


_PLANS = {
    "conv_bn_act": _conv_bn_act,
    "add_relu": _add_relu,
    "stem": _stem,
    "basic_block": _basic_block,
    "bottleneck": _bottleneck,
    "pool_linear": _pool_linear,
}
NAMES = tuple(_PLANS)


def cases(op: str, dtype: torch.dtype, device: str, seed: int = 0) -> Iterator[Case]:
    """Give the cases of one op, in both layouts.

    Args:
        op: one of `NAMES`.
        dtype: of inputs and parameters.
        device: where they are.
        seed: of all random numbers.
    """
    for layout, mark in ((torch.contiguous_format, "NCHW"), (torch.channels_last, "NHWC")):
        for name, args, kwargs in _PLANS[op](Draw(dtype, device, layout, seed)):
            yield Case(op, f"{name}, {mark}", args, kwargs)
