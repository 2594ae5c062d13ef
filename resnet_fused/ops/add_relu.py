# SPDX-License-Identifier: BSD-3-Clause
"""add_relu: residual addition and ReLU as one op."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fused import reference
from resnet_fused.dispatch import use_reference
from resnet_fused.ops.conv_bn import autocast
from resnet_fused.ops.register import register


def add_relu(x: Tensor, y: Tensor) -> Tensor:
    """Residual addition and ReLU in one pass.

    Formula: ``z = max(x + y, 0)``, added in float32 (float64 for float64 inputs), rounded once; NaN
    stays NaN.

    Args:
        x: any shape and strides, float32, bfloat16, float16 or float64.
        y: shape, dtype and device of ``x``, any strides.

    Returns:
        Shape and dtype of ``x`` (the autocast dtype under autocast); strides as torch's elementwise
        ops give them: ``x``'s where ``x`` is dense.

    Raises:
        ValueError, RuntimeError: shapes, dtypes or devices differ, or the dtype is not a floating
            one.
    """
    x, y = autocast(x), autocast(y)
    if use_reference(x, "add_relu"):
        _check(x, y)
        return reference.add_relu(x, y)
    z: Tensor = torch.ops.resnet_fused.add_relu.default(x, y)
    return z


def _check(x: Tensor, y: Tensor) -> None:
    if not x.dtype.is_floating_point:
        raise ValueError(f"x must have a floating dtype, got {x.dtype}")
    if y.shape != x.shape or y.dtype != x.dtype or y.device != x.device:
        raise ValueError(
            f"y must have x's shape, dtype and device ({tuple(x.shape)}, {x.dtype}, {x.device}), "
            f"got {tuple(y.shape)}, {y.dtype}, {y.device}"
        )


def _fake(x: Tensor, y: Tensor) -> Tensor:
    _check(x, y)
    return torch.empty_like(x)


register("add_relu", reference.add_relu, _fake)
