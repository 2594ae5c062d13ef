# SPDX-License-Identifier: BSD-3-Clause
"""Exact results in float64 and how far a right kernel may be from them.

A kernel computes in float32 from inputs as they are stored and rounds once to its dtype. With unit
roundoffs ``u = 2**-24`` and ``u_d`` of the dtype, a sum of K products in any order of fused or
separate float32 operations is within ``K u sum |x w|`` of the exact one (Higham, Accuracy and
Stability of Numerical Algorithms, section 3.1). What follows adds one ``u`` per operation on the
magnitude it acts on, and ``u_d`` of the result for the last rounding. Every function returns the
exact value and the bound on its error, and takes the bound on its input's error, so that chains of
convolutions compose.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.ops import ConvBN

U = 2.0**-24
UNIT = {torch.float32: U, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# Spacing of the smallest numbers; AMX and its bf16 rounding flush subnormals, as bf16's are below
# every normal float32.
TINY = {torch.float32: 2.0**-126, torch.bfloat16: 2.0**-126, torch.float16: 2.0**-24}


@dataclass
class Exact:
    """A float64 value and how far from it a kernel's may be, elementwise."""

    value: Tensor
    error: Tensor
    peak: float = 0.0  # largest magnitude that had to be rounded on the way


def stored(x: Tensor) -> Exact:
    """An input: exact as it is stored."""
    return Exact(x.double(), torch.zeros_like(x, dtype=torch.float64))


def rounded(y: Exact, dtype: torch.dtype) -> Exact:
    """Round to ``dtype`` once."""
    error = y.error + UNIT[dtype] * (y.value.abs() + y.error) + TINY[dtype]
    largest = float(y.value.abs().max()) if y.value.numel() else 0.0
    return Exact(y.value, error, max(y.peak, largest))


def relu(y: Exact) -> Exact:
    """ReLU never increases a difference."""
    return Exact(y.value.clamp_min(0), y.error, y.peak)


def conv_bn(x: Exact, conv: ConvBN, dtype: torch.dtype, products: str = "exact") -> Exact:
    """``bn(conv(x))`` before it is rounded.

    ``products`` says how they are computed. ``exact``: of the inputs as they are, added as above.
    ``folded``: ``weight * scale`` and ``shift`` are rounded to the dtype of the convolution, which
    adds one unit of that dtype to each. ``tensor cores``: these may cut sums off where they do not
    round them, another ``u`` for each product and sum; and float32 is rounded to TF32, 10 of 23
    bits: each factor is off by at most 2**-11 of itself, a product by 2 * 2**-11 + 2**-22.
    ``bf16x3``: like ``folded``, or float32 is split: with u = 2**-8, bfloat16's, v = high + low +
    d, |low| <= u (1 + u) |v| and |d| <= u^2 |v|; of x w the three parts low(x) low(w), d(x) w and
    x d(w) are missing, 3 u^2 (1 + u)^2 |x w| at most, and there are three sums for one.
    """
    w = conv.weight.double()
    k = w[0].numel()
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
    zero = torch.zeros(w.shape[0], dtype=torch.float64)

    def vector(t: Tensor | None, default: float) -> Tensor:
        return zero + default if t is None else t.double()

    has_bn = conv.running_var is not None
    variance = vector(conv.running_var, 1.0) + (conv.eps if has_bn else 0.0)
    scale = vector(conv.bn_weight, 1.0) / variance.sqrt()
    offset = vector(conv.bias, 0.0) - vector(conv.running_mean, 0.0)
    beta = vector(conv.bn_bias, 0.0)
    shift = beta + offset * scale
    spread = (vector(conv.bias, 0.0).abs() + vector(conv.running_mean, 0.0).abs()) * scale.abs()

    def per_channel(t: Tensor) -> Tensor:
        return t.view(1, -1, 1, 1)

    plain = F.conv2d(x.value, w, None, *geometry)
    sums = F.conv2d(x.value.abs() + x.error, w.abs(), None, *geometry) * per_channel(scale.abs())
    passed = F.conv2d(x.error, w.abs(), None, *geometry) * per_channel(scale.abs())
    value = plain * per_channel(scale) + per_channel(shift)
    # Per output: K products and sums, 5 operations for scale, 8 for shift, 2 to apply them.
    error = passed + (k + 7) * U * sums + per_channel(8 * U * (spread + beta.abs()))
    error = error + 2 * U * (sums + per_channel(shift.abs()))
    if products == "bf16x3" and dtype == torch.float32:
        error = error + (3 * 2.0**-16 * (1 + 2.0**-8) ** 2 + 2 * k * U) * sums
    if products in ("folded", "bf16x3"):
        unit = 2.0**-8 if dtype == torch.bfloat16 else U
        error = error + unit * (sums + per_channel(shift.abs()))
    if products == "tensor cores":
        lost = 2 * 2.0**-11 + 2.0**-22 if dtype == torch.float32 else 0.0
        error = error + (k * U + lost) * sums
    return Exact(value, error + (k + 8) * TINY[dtype], x.peak)


def add(y: Exact, other: Exact) -> Exact:
    """One addition in float32."""
    value = y.value + other.value
    error = y.error + other.error
    error = error + U * (y.value.abs() + other.value.abs() + error)
    return Exact(value, error, max(y.peak, other.peak))


def pool_linear(x: Exact, weight: Tensor, bias: Tensor | None) -> Exact:
    """Mean over H and W, then a linear layer, before it is rounded."""
    hw, c = x.value.shape[2] * x.value.shape[3], x.value.shape[1]
    w = weight.double()
    sums = F.linear(x.value.abs().mean((2, 3)), w.abs())
    value = F.linear(x.value.mean((2, 3)), w, None if bias is None else bias.double())
    error = (hw + c + 2) * U * sums
    if bias is not None:
        error = error + 17 * U * (bias.double().abs() + sums)
    return Exact(value, error)


def violations(got: Tensor, want: Exact) -> Tensor:
    """Where ``got`` is outside the bound; NaN and infinity count unless they are expected."""
    finite = want.value.isfinite() & want.error.isfinite()
    off = (got.double() - want.value).abs() > want.error
    other = got.double().nan_to_num(1e300) != want.value.nan_to_num(1e300)
    return torch.where(finite, off | ~got.isfinite(), other)


def assert_within(got: Tensor, want: Exact) -> None:
    """Fail with the worst element if any is outside its bound."""
    assert got.shape == want.value.shape
    bad = violations(got, want)
    if bad.any():
        excess = torch.where(bad, (got.double() - want.value).abs() / want.error, 0).nan_to_num(
            1e300
        )
        at = int(excess.argmax())
        raise AssertionError(
            f"{int(bad.sum())} of {bad.numel()} elements are outside the bound; the worst is "
            f"element {at}: got {got.flatten()[at].item()}, "
            f"exact {want.value.flatten()[at].item()}, "
            f"bound {want.error.flatten()[at].item()}"
        )
