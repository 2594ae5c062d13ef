# SPDX-License-Identifier: BSD-3-Clause
"""The exact result of an op in float64, and how far from it a right result may be.

A sum of K products in float32, in any order, is within ``K u sum |x w|`` of the exact one, where u
is 2**-24. Each further operation adds one ``u`` of the magnitude it acts on, each stored result one
unit roundoff of its dtype. Every function takes the bound on its input's error and returns that of
its result, so that the convolutions of a block follow each other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused import dispatch
from resnet_fused.ops import ConvBN
from resnet_fused.reference import compute_dtype

UNIT = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}
# Spacing of the smallest numbers; bfloat16 and float32 kernels may flush what is below normal.
_TINY = {
    torch.float64: 2.0**-1022,
    torch.float32: 2.0**-126,
    torch.bfloat16: 2.0**-126,
    torch.float16: 2.0**-24,
}
_TF32 = 2 * 2.0**-11 + 2.0**-22  # relative error of a product of two rounded factors
# The same of bf16x3: a factor is split to 2**-16, of a product the part low * low is left out, and
# each of these is larger by less than 2**-6.
_BF16X3 = 3 * 2.0**-16 * (1 + 2.0**-6)
_INF = float("inf")


class Exact(NamedTuple):
    """A result and the bound on its error, elementwise.

    Args:
        value: float64.
        error: float64; infinity where a sum may leave the dtype's range, and anything is right.
    """

    value: Tensor
    error: Tensor


class Kind(NamedTuple):
    """What decides how an op rounds.

    Args:
        dtype: of the activations.
        path: name of a path of ``dispatch.choose``.
        device: as in ``torch.device.type``.
    """

    dtype: torch.dtype
    path: str
    device: str

    @property
    def unit(self) -> float:
        """Unit roundoff of the accumulation, doubled where the judge has no more bits itself."""
        unit = UNIT[compute_dtype(self.dtype)]
        return 2 * unit if self.dtype == torch.float64 else unit


def unit_of_results(dtype: torch.dtype) -> float:
    """How far, relative to it, an element of a layer's result may be off by being kept and used."""
    return 2.0**-16 if dtype == torch.float32 and dispatch.bf16x3() else UNIT.get(dtype, 0.0)


def stored(x: Tensor) -> Exact:
    """An input: exact as it is stored."""
    return Exact(x.double(), torch.zeros_like(x, dtype=torch.float64))


def _bounded(value: Tensor, error: Tensor, magnitude: Tensor, dtype: torch.dtype) -> Exact:
    """No bound where ``magnitude`` may overflow ``dtype``."""
    far = magnitude + error >= torch.finfo(dtype).max
    return Exact(value, error.nan_to_num(_INF, _INF).masked_fill(far, _INF))


def _magnitude(x: Tensor) -> Tensor:
    """``abs(x)``; infinity and NaN, where results are judged by their kind, count as 0."""
    return x.abs().nan_to_num(0.0, 0.0, 0.0)


def rounded(y: Exact, dtype: torch.dtype) -> Exact:
    """Round to ``dtype`` once."""
    size = _magnitude(y.value)
    error = y.error + UNIT[dtype] * (size + y.error) + _TINY[dtype]
    return _bounded(y.value, error, size, dtype)


def _kept(y: Exact, dtype: torch.dtype) -> Exact:
    """What a kernel has stored between two convolutions, for sure rounded to ``dtype``.

    Nearly always that is the rounded exact value: only a value near the middle between two numbers
    of a 16-bit dtype may go either way.
    """
    value, low, high = (
        v.to(dtype).double() for v in (y.value, y.value - y.error, y.value + y.error)
    )
    error = torch.maximum(high - value, value - low).nan_to_num(_INF) + _TINY[dtype]
    finite = y.value.isfinite()
    return Exact(torch.where(value.isfinite(), value, y.value), error.where(finite, y.error))


def conv_bn(x: Exact, conv: ConvBN, kind: Kind) -> Exact:
    """``bn(conv(x))`` before it is rounded.

    Where BatchNorm is folded, ``weight * scale`` and ``shift`` are rounded to the dtype of the
    convolution. Tensor cores may cut sums off where others round them, and round float32 to TF32;
    a CPU's tiles multiply float32 as bf16x3 (``dispatch.bf16x3``).
    """
    u, w = kind.unit, conv.weight.double()
    k = w[0].numel()
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
    zero = w.new_zeros(w.shape[0])

    def vector(t: Tensor | None, default: float) -> Tensor:
        return zero + default if t is None else t.double()

    variance = vector(conv.running_var, 1.0) + (0.0 if conv.running_var is None else conv.eps)
    scale = vector(conv.bn_weight, 1.0) / variance.sqrt()
    bias, mean, beta = (
        vector(conv.bias, 0.0),
        vector(conv.running_mean, 0.0),
        vector(conv.bn_bias, 0.0),
    )
    shift = beta + (bias - mean) * scale
    spread = (bias.abs() + mean.abs()) * scale.abs() + beta.abs()

    def channels(t: Tensor) -> Tensor:
        return t.view(1, -1, 1, 1)

    def through(t: Tensor) -> Tensor:
        return F.conv2d(t, w.abs(), None, *geometry) * channels(scale.abs())

    value = F.conv2d(x.value, w, None, *geometry) * channels(scale) + channels(shift)
    sums = through(_magnitude(x.value))
    error = 0 * sums
    if bool(x.error.any()):
        error = through(x.error)
        sums = sums + error
    # K products and sums, 5 operations for scale, 8 for shift, 2 to apply them, and 2 for
    # parameters that are wider than the accumulation.
    error = error + (k + 11) * u * sums + channels(10 * u * spread) + (k + 8) * _TINY[kind.dtype]
    lost = _of_products(conv, kind, k)
    error = error + lost * (sums + channels(spread))
    return _bounded(value, error, sums + channels(spread), compute_dtype(kind.dtype))


def _of_products(conv: ConvBN, kind: Kind, k: int) -> float:
    """What else a kernel may lose of the sum of absolute products, relative to it."""
    lost = 0.0
    if kind.device == "cuda":
        lost += k * kind.unit
        if kind.dtype == torch.float32 and dispatch.tf32():
            lost += _TF32
    elif kind.path != "reference":
        tiles = kind.path == "amx" and conv.groups == 1 and conv.weight.shape[1] >= 16
        folded = kind.dtype == torch.bfloat16 and not tiles
        lost += UNIT[torch.bfloat16] if folded else kind.unit
        if kind.path == "amx" and kind.dtype == torch.float32:
            lost += _BF16X3 + 2 * k * kind.unit  # three products for one
    if conv.weight.dtype.itemsize > kind.dtype.itemsize and kind.path != "reference":
        lost += UNIT[kind.dtype]  # rounded when it is packed
    return lost


def _add(y: Exact, other: Exact, kind: Kind) -> Exact:
    error = y.error + other.error
    error = error + kind.unit * (_magnitude(y.value) + _magnitude(other.value) + error)
    return Exact(y.value + other.value, error)


def _relu(y: Exact) -> Exact:
    """ReLU never increases a difference."""
    return Exact(y.value.clamp_min(0), y.error)


def _conv_bn_act(
    kind: Kind, x: Exact, conv: ConvBN, residual: Exact | None = None, relu: bool = True
) -> Exact:
    y = conv_bn(x, conv, kind)
    if residual is not None:
        y = _add(y, residual, kind)
    return rounded(_relu(y) if relu else y, kind.dtype)


def _block(kind: Kind, x: Exact, *convs: ConvBN | None) -> Exact:
    """The last of ``convs`` is the projection, which may or may not be rounded, or None."""
    *main, down = convs
    other = x if down is None else _conv_bn_act(kind, x, down, None, False)
    y = x
    for conv in main[:-1]:
        assert conv is not None
        y = _kept(_relu(conv_bn(y, conv, kind)), kind.dtype)
    assert main[-1] is not None
    return _conv_bn_act(kind, y, main[-1], other)


def _basic_block(
    kind: Kind, x: Exact, conv1: ConvBN, conv2: ConvBN, downsample: ConvBN | None = None
) -> Exact:
    return _block(kind, x, conv1, conv2, downsample)


def _bottleneck(
    kind: Kind,
    x: Exact,
    conv1: ConvBN,
    conv2: ConvBN,
    conv3: ConvBN,
    downsample: ConvBN | None = None,
) -> Exact:
    return _block(kind, x, conv1, conv2, conv3, downsample)


def _stem(kind: Kind, x: Exact, conv: ConvBN) -> Exact:
    y = _conv_bn_act(kind, x, conv)
    # A maximum moves by no more than the largest error in its window.
    return Exact(F.max_pool2d(y.value, 3, 2, 1), F.max_pool2d(y.error, 3, 2, 1))


def _add_relu(kind: Kind, x: Exact, y: Exact) -> Exact:
    return rounded(_relu(_add(x, y, kind)), kind.dtype)


def _pool_linear(kind: Kind, x: Exact, weight: Tensor, bias: Tensor | None = None) -> Exact:
    w, b = weight.double(), weight.new_zeros(len(weight), dtype=torch.float64)
    b = b if bias is None else bias.double()
    area, c = x.value.shape[2] * x.value.shape[3], x.value.shape[1]
    sums = F.linear(_magnitude(x.value).mean((2, 3)), w.abs()) + b.abs()
    value = F.linear(x.value.mean((2, 3)), w, b)
    error = (area + c + 19) * kind.unit * sums
    if weight.dtype.itemsize > kind.dtype.itemsize and kind.path != "reference":
        error = error + UNIT[kind.dtype] * sums
    far = sums * area
    return rounded(_bounded(value, error, far, compute_dtype(kind.dtype)), kind.dtype)


OPS: dict[str, Callable[..., Exact]] = {
    "conv_bn_act": _conv_bn_act,
    "add_relu": _add_relu,
    "stem": _stem,
    "basic_block": _basic_block,
    "bottleneck": _bottleneck,
    "pool_linear": _pool_linear,
}
_ACTIVATIONS = {"add_relu": 2}  # leading arguments that are activations; of the others, one


def exact(op: str, kind: Kind, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Exact:
    """The exact result of an op's call and the bound on its error.

    Args:
        op: its name.
        kind: how it rounds.
        args: as the op takes them, activations in ``kind.dtype``.
        kwargs: likewise.
    """
    count = _ACTIVATIONS.get(op, 1)
    args = (*(stored(a) for a in args[:count]), *args[count:])
    if kwargs.get("residual") is not None:
        kwargs = {**kwargs, "residual": stored(kwargs["residual"])}
    return OPS[op](kind, *args, **kwargs)


def outside(y: Tensor, want: Exact) -> Tensor:
    """Where ``y`` is beyond the bound; infinity and NaN must be where they are expected."""
    got = y.double()
    finite = want.value.isfinite()
    far = ~((got - want.value).abs() <= want.error)
    same = (got == want.value) | (got.isnan() & want.value.isnan())
    return torch.where(finite, far, ~same) & want.error.isfinite()
