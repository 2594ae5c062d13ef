# SPDX-License-Identifier: BSD-3-Clause
"""pool_linear: global average pool and the classifier as one op."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fused import reference
from resnet_fused.dispatch import use_reference
from resnet_fused.ops.conv_bn import autocast, autocast_on
from resnet_fused.ops.register import register


def pool_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Global average pool and linear layer in one pass.

    Formula: ``y[n, k] = sum_c weight[k, c] * mean_hw(x[n, c]) + bias[k]``, in float32 (float64 for
    float64 inputs), rounded once: the pooled features are not rounded in between.

    Args:
        x: feature map, shape [N, C, H, W] with H and W at least 1, float32, bfloat16, float16 or
            float64; any strides, channels_last is fastest.
        weight: shape [K, C]; ``x``'s dtype unless autocast is on.
        bias: shape [K].

    Returns:
        Shape [N, K], contiguous, ``x``'s dtype (the autocast dtype under autocast).

    Raises:
        ValueError, RuntimeError: an argument breaks a rule above; the message names it.
    """
    if x.dtype != weight.dtype and not autocast_on(x):
        raise ValueError(
            f"x must have weight's dtype {weight.dtype}, got {x.dtype}; convert one of them"
        )
    x = autocast(x)
    if use_reference(x, "pool_linear"):
        _check(x, weight, bias)
        return reference.pool_linear(x, weight, bias)
    y: Tensor = torch.ops.resnet_fused.pool_linear.default(x, weight, bias)
    return y


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if torch.jit.is_tracing():
        return
    if x.dim() != 4 or x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(
            f"x must be [N, C, H, W] with H and W at least 1, got shape {tuple(x.shape)}"
        )
    if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight must have shape [K, {x.shape[1]}], got {tuple(weight.shape)}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias must have shape [{weight.shape[0]}], got {tuple(bias.shape)}")
    for name, t in (("x", x), ("weight", weight), ("bias", bias)):
        if t is not None and not t.dtype.is_floating_point:
            raise ValueError(f"{name} must have a floating dtype, got {t.dtype}")
        if t is not None and t.device != x.device:
            raise ValueError(f"{name} must be on {x.device} like x, got {t.device}; move it there")


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _check(x, weight, bias)
    return torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)


register("pool_linear", reference.pool_linear, _fake)
