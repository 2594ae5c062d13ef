# SPDX-License-Identifier: BSD-3-Clause
"""Every op in plain PyTorch: the specification, the fallback and the backward.

16-bit inputs are computed in float32 and rounded once at the end, so these functions never call
torch's bfloat16 convolution, which on AMX CPUs reads uninitialised memory when a strided
convolution's output is one pixel wide.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.input_norm import normalise

if TYPE_CHECKING:
    from resnet_fused.ops.conv_bn import ConvBN


def _without_autocast(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``op`` with autocast off: it would cast the float32 copies back, to the bug above."""

    @wraps(op)
    def call(x: Tensor, *args: Any) -> Tensor:
        device = x.device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return op(x, *args)
        with torch.autocast(device, enabled=False):
            return op(x, *args)

    return call


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which an op on ``dtype`` is computed: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _cast(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(dtype)


def _conv_bn(x: Tensor, conv: ConvBN) -> Tensor:
    """``bn(conv(x))`` in the dtype of ``x``, which is a compute dtype; the result is not
    rounded.
    """
    acc = x.dtype
    y = F.conv2d(
        x,
        conv.weight.to(acc),
        _cast(conv.bias, acc),
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
    )
    if conv.running_mean is None or conv.running_var is None:
        return y
    scale = torch.rsqrt(conv.running_var.to(acc) + conv.eps)
    if conv.bn_weight is not None:
        scale = scale * conv.bn_weight.to(acc)
    y = (y - conv.running_mean.to(acc).view(-1, 1, 1)) * scale.view(-1, 1, 1)
    return y if conv.bn_bias is None else y + conv.bn_bias.to(acc).view(-1, 1, 1)


@_without_autocast
def conv_bn_act(x: Tensor, conv: ConvBN, residual: Tensor | None, relu: bool) -> Tensor:
    """``act(bn(conv(x)) + residual)``, rounded once."""
    acc = compute_dtype(x.dtype)
    y = _conv_bn(x.to(acc), conv)
    if residual is not None:
        y = y + residual.to(acc)
    return (F.relu(y) if relu else y).to(x.dtype)


@_without_autocast
def add_relu(x: Tensor, y: Tensor) -> Tensor:
    """``relu(x + y)``, rounded once."""
    acc = compute_dtype(x.dtype)
    return F.relu(x.to(acc) + y.to(acc)).to(x.dtype)


@_without_autocast
def stem(x: Tensor, conv: ConvBN, norm: Tensor | None = None) -> Tensor:
    """3x3/2 max-pool (padding 1) of ``relu(bn(conv(x)))``; rounding before or after the max is the
    same. Bytes, which come with ``norm``, are normalised first.
    """
    if norm is not None:
        x = normalise(x, norm, conv.weight.dtype)
    return F.max_pool2d(conv_bn_act(x, conv, None, True), 3, 2, 1)


@_without_autocast
def basic_block(x: Tensor, conv1: ConvBN, conv2: ConvBN, downsample: ConvBN | None) -> Tensor:
    """``relu(conv2(relu(conv1(x))) + shortcut)``; each intermediate tensor is rounded once."""
    identity = x if downsample is None else conv_bn_act(x, downsample, None, False)
    return conv_bn_act(conv_bn_act(x, conv1, None, True), conv2, identity, True)


@_without_autocast
def bottleneck(
    x: Tensor, conv1: ConvBN, conv2: ConvBN, conv3: ConvBN, downsample: ConvBN | None
) -> Tensor:
    """``relu(conv3(relu(conv2(relu(conv1(x))))) + shortcut)``; each intermediate tensor is rounded
    once.
    """
    identity = x if downsample is None else conv_bn_act(x, downsample, None, False)
    y = conv_bn_act(conv_bn_act(x, conv1, None, True), conv2, None, True)
    return conv_bn_act(y, conv3, identity, True)


@_without_autocast
def pool_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``linear(mean of x over H and W)``, rounded once."""
    acc = compute_dtype(x.dtype)
    return F.linear(x.to(acc).mean((2, 3)), weight.to(acc), _cast(bias, acc)).to(x.dtype)
