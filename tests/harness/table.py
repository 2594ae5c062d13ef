# SPDX-License-Identifier: BSD-3-Clause
"""Every op with its exact result and its cases."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from harness import bounds
from harness.bounds import Exact
from harness.case import Case, Inputs, Op, Source
from resnet_fused import ops
from resnet_fused.ops import ConvBN
from resnet_fused.ops.conv_bn import flatten, flatten_optional
from resnet_fused.ops.stem import of_floats


def _act(
    x: Exact, conv: ConvBN, other: Exact | None, relu: bool, dtype: torch.dtype, products: str
) -> Exact:
    y = bounds.conv_bn(x, conv, dtype, products)
    if other is not None:
        y = bounds.add(y, other)
    return bounds.rounded(bounds.relu(y) if relu else y, dtype)


def _conv_bn_act(
    dtype: torch.dtype,
    products: str,
    x: Tensor,
    conv: ConvBN,
    residual: Tensor | None = None,
    relu: bool = True,
) -> Exact:
    other = None if residual is None else bounds.stored(residual)
    return _act(bounds.stored(x), conv, other, relu, dtype, products)


def _chain(dtype: torch.dtype, products: str, x: Tensor, *convs: ConvBN | None) -> Exact:
    """A residual block; the last of ``convs`` is the downsample convolution or None."""
    *main, downsample = convs
    h = start = bounds.stored(x)
    other = start if downsample is None else _act(start, downsample, None, False, dtype, products)
    for conv in main[:-1]:
        h = _act(h, conv, None, True, dtype, products)
    return _act(h, main[-1], other, True, dtype, products)


def _basic_block(
    dtype: torch.dtype,
    products: str,
    x: Tensor,
    conv1: ConvBN,
    conv2: ConvBN,
    downsample: ConvBN | None = None,
) -> Exact:
    return _chain(dtype, products, x, conv1, conv2, downsample)


def _bottleneck(
    dtype: torch.dtype,
    products: str,
    x: Tensor,
    conv1: ConvBN,
    conv2: ConvBN,
    conv3: ConvBN,
    downsample: ConvBN | None = None,
) -> Exact:
    return _chain(dtype, products, x, conv1, conv2, conv3, downsample)


def _stem(dtype: torch.dtype, products: str, *args: Any) -> Exact:
    x, conv = of_floats(*args)
    y = _act(bounds.stored(x), conv, None, True, dtype, products)
    # A maximum moves by no more than the largest error in its window.
    return Exact(F.max_pool2d(y.value, 3, 2, 1), F.max_pool2d(y.error, 3, 2, 1), y.peak)


def _add_relu(dtype: torch.dtype, products: str, x: Tensor, y: Tensor) -> Exact:
    total = bounds.add(bounds.stored(x), bounds.stored(y))
    return bounds.rounded(bounds.relu(total), dtype)


def _pool_linear(
    dtype: torch.dtype, products: str, x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Exact:
    return bounds.rounded(bounds.pool_linear(bounds.stored(x), weight, bias), dtype)


def _conv_case(
    n: int, c: int, k: int, hw: tuple[int, int], window: int, why: str, **options: Any
) -> Case:
    residual, bias = options.pop("residual", False), options.pop("bias", False)
    relu = options.pop("relu", True)

    def make(s: Source) -> Inputs:
        x = s.image(n, c, *hw)
        conv = s.conv(c, k, window, bias, **options)
        shape = ops.conv_bn.out_shape(x, conv)
        return (x, conv), {"residual": s.image(*shape) if residual else None, "relu": relu}

    text = "-".join(f"{key}{value}" for key, value in options.items())
    name = f"n{n}-c{c}-k{k}-{hw[0]}x{hw[1]}-w{window}-{text}".replace(" ", "")
    return Case(name + ("-residual" * residual) + ("-linear" * (not relu)), make, why)


_S2 = {"stride": (2, 2)}
CONV_CASES = (
    _conv_case(2, 64, 64, (7, 7), 1, "one k-step pair, rows not a multiple of 32", residual=True),
    _conv_case(1, 32, 32, (1, 1), 1, "one pixel: fewer rows than a tile"),
    _conv_case(2, 3, 4, (1, 1), 3, "one pixel and a residual: torch 2.10", residual=True),
    _conv_case(2, 64, 32, (2, 2), 3, "output of one pixel, residual", **_S2, residual=True),
    _conv_case(3, 32, 96, (2, 3), 3, "maps smaller than the window", bias=True),
    _conv_case(1, 64, 32, (31, 33), 3, "tile plus and minus one", relu=False),
    _conv_case(2, 48, 40, (9, 5), 3, "half a k-step and a quarter block left over", residual=True),
    _conv_case(2, 33, 31, (8, 8), 3, "one channel beyond a k-step, one filter short of a block"),
    _conv_case(2, 17, 17, (6, 6), 1, "prime channels", residual=True),
    _conv_case(1, 1, 1, (5, 4), 3, "one channel in and out"),
    _conv_case(2, 3, 64, (18, 20), 7, "the stem's convolution", **_S2),
    _conv_case(2, 64, 64, (15, 14), 3, "stride 2, odd and even sizes", **_S2, residual=True),
    _conv_case(1, 64, 128, (56, 2), 3, "output one pixel wide: torch's AMX bug", **_S2),
    _conv_case(1, 64, 64, (9, 1), 3, "input one pixel wide, stride 2", **_S2),
    _conv_case(2, 64, 48, (13, 11), 1, "projection: 1x1 of stride 2", **_S2, relu=False),
    _conv_case(1, 32, 32, (7, 9), 1, "stride beyond the window", stride=(3, 3)),
    _conv_case(1, 32, 32, (10, 12), 3, "stride beyond the window", stride=(4, 5)),
    _conv_case(2, 32, 64, (9, 10), 3, "dilation", dilation=(2, 2), padding=(2, 2)),
    _conv_case(
        1, 32, 32, (12, 13), 3, "dilation and stride", dilation=(3, 2), padding=(1, 4), **_S2
    ),
    _conv_case(1, 32, 32, (6, 7), 3, "no padding", padding=(0, 0)),
    _conv_case(1, 32, 32, (3, 3), 3, "padding beyond the window", padding=(5, 4)),
    _conv_case(2, 64, 64, (6, 5), 3, "groups, as in ResNeXt", groups=4, residual=True),
    _conv_case(1, 32, 32, (6, 5), 3, "depthwise", groups=32),
    _conv_case(5, 96, 160, (11, 6), 1, "odd batch over two threads", residual=True),
    _conv_case(2, 32, 48, (5, 6), 3, "an eps of its own, as large as variances", eps=1e-3),
    _conv_case(0, 64, 64, (7, 7), 3, "an empty batch"),
)


def _block_case(name: str, why: str, n: int, c: int, mid: int, out: int, **options: Any) -> Case:
    """A block: two convolutions if mid is 0, else a bottleneck; projection where sizes differ."""
    stride, hw = options.get("stride", (1, 1)), options.get("hw", (7, 6))

    def make(s: Source) -> Inputs:
        x = s.image(n, c, *hw)
        if mid:
            convs = [s.conv(c, mid), s.conv(mid, mid, 3, stride=stride), s.conv(mid, out)]
        else:
            convs = [s.conv(c, out, 3, stride=stride), s.conv(out, out, 3)]
        project = stride != (1, 1) or c != out
        window = options.get("window", 1)
        return (x, *convs, s.conv(c, out, window, stride=stride) if project else None), {}

    return Case(name, make, why, slow=name in ("pieces", "strips", "groups"))


def _flat_conv(
    x: Tensor, conv: ConvBN, residual: Tensor | None = None, relu: bool = True
) -> tuple[Any, ...]:
    return (x, *flatten(conv), residual, relu)


def _flat_block(x: Tensor, *convs: ConvBN | None) -> tuple[Any, ...]:
    *main, last = convs
    return (x, *(a for conv in main for a in flatten(conv)), *flatten_optional(last))


def _elementwise(shape: tuple[int, ...], why: str) -> Case:
    def make(s: Source) -> Inputs:
        two = [s.integers(-9, 9, *shape) if s.integer else s.normal(*shape) for _ in range(2)]
        return (two[0], two[1]), {}

    return Case("x".join(map(str, shape)) or "scalar", make, why)


def _head(n: int, c: int, k: int, hw: tuple[int, int], bias: bool, why: str) -> Case:
    def make(s: Source) -> Inputs:
        if s.integer:
            # A constant map has an exact mean whatever its size.
            x = s.integers(-2, 2, n, c, 1, 1).expand(n, c, *hw).contiguous()
            weight = s.sparse(k, c, terms=6)
        else:
            x, weight = s.image(n, c, *hw), s.normal(k, c, scale=c**-0.5)
        return (x, weight, s.integers(-3, 3, k) if bias else None), {}

    return Case(f"n{n}-c{c}-k{k}-{hw[0]}x{hw[1]}" + ("-bias" * bias), make, why)


TABLE = {
    "conv_bn_act": Op("conv_bn_act", ops.conv_bn_act, _conv_bn_act, CONV_CASES, _flat_conv),
    "add_relu": Op(
        "add_relu",
        ops.add_relu,
        _add_relu,
        (
            _elementwise((), "no dimension"),
            _elementwise((1,), "one element"),
            _elementwise((3, 5, 7), "no power of two"),
            _elementwise((2, 17, 6, 9), "an odd number of channels"),
            _elementwise((2, 0, 3), "no element"),
            _elementwise((33, 1031), "more than one piece per thread"),
        ),
        lambda x, y: (x, y),
    ),
    "stem": Op(
        "stem",
        ops.stem,
        _stem,
        tuple(
            Case(
                f"n{n}-c{c}-{h}x{w}-w{window}",
                lambda s, n=n, c=c, h=h, w=w, window=window: (
                    (s.image(n, c, h, w), s.conv(c, 64, window, stride=(2, 2))),
                    {},
                ),
                why,
                slow=h > 100,
            )
            for n, c, h, w, window, why in (
                (2, 3, 32, 30, 7, "the usual stem"),
                (1, 1, 9, 11, 7, "grey images, odd sizes"),
                (3, 4, 16, 1, 3, "one pixel wide: torch's AMX bug"),
                (1, 3, 1, 1, 7, "one pixel"),
                (3, 2, 331, 141, 7, "several strips of lines, an image left over for two threads"),
                (2, 3, 250, 36, 5, "several strips, another window"),
                (1, 64, 12, 10, 3, "the last convolution of a deep stem"),
                (0, 3, 32, 32, 7, "an empty batch"),
            )
        ),
        lambda x, conv: (x, *flatten(conv)),
    ),
    "basic_block": Op(
        "basic_block",
        ops.basic_block,
        _basic_block,
        (
            _block_case("identity", "the usual block", 2, 64, 0, 64),
            _block_case("stride2", "projection of stride 2", 3, 32, 0, 64, stride=(2, 2)),
            _block_case("widen", "projection of stride 1", 1, 24, 0, 40, hw=(1, 2)),
            _block_case("window", "projection 3x3", 2, 32, 0, 64, stride=(2, 2), window=3),
            _block_case("narrow", "one pixel wide", 1, 64, 0, 64, hw=(5, 2), stride=(2, 2)),
            _block_case("pieces", "more images than a piece", 5, 64, 0, 64, hw=(112, 112)),
            _block_case("strips", "several strips of lines", 2, 64, 0, 64, hw=(65, 57)),
            _block_case("groups", "images side by side on small maps", 19, 64, 0, 64),
            _block_case("empty", "an empty batch", 0, 64, 0, 64),
        ),
        _flat_block,
        terms=2,
    ),
    "bottleneck": Op(
        "bottleneck",
        ops.bottleneck,
        _bottleneck,
        (
            _block_case("identity", "the usual block", 2, 128, 32, 128),
            _block_case("stride2", "projection of stride 2", 3, 64, 32, 96, stride=(2, 2)),
            _block_case("widen", "projection of stride 1", 2, 64, 64, 256, hw=(9, 9)),
            _block_case("whole", "projection of whole tiles of x", 3, 64, 32, 128, hw=(8, 8)),
            _block_case("window", "projection 3x3", 2, 64, 32, 96, hw=(8, 9), window=3),
            _block_case("odd", "no multiple of a tile", 5, 70, 33, 70, hw=(3, 1)),
            _block_case("pieces", "more images than a piece", 5, 256, 32, 256, hw=(56, 56)),
            _block_case("strips", "several strips of lines", 2, 512, 32, 512, hw=(31, 30)),
            _block_case(
                "strips", "strips of a stride", 3, 256, 64, 320, hw=(57, 55), stride=(2, 2)
            ),
            _block_case("groups", "images side by side on small maps", 19, 96, 64, 96),
            _block_case("groups", "and a stride", 33, 64, 64, 128, stride=(2, 2)),
            _block_case("empty", "an empty batch", 0, 64, 32, 64),
        ),
        _flat_block,
        terms=2,
    ),
    "pool_linear": Op(
        "pool_linear",
        ops.pool_linear,
        _pool_linear,
        (
            _head(2, 64, 10, (7, 7), True, "the usual head"),
            _head(1, 1, 1, (1, 1), False, "one of everything"),
            _head(5, 33, 17, (3, 2), True, "one channel beyond the lanes, one image beyond four"),
            _head(9, 512, 101, (2, 1), False, "several groups of images"),
            _head(0, 64, 10, (7, 7), True, "an empty batch"),
        ),
        lambda x, weight, bias=None: (x, weight, bias),
    ),
}
