# SPDX-License-Identifier: BSD-3-Clause
"""conv_bn_act: convolution, BatchNorm, residual addition and ReLU as one op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resnet_fused import reference
from resnet_fused._extension import watch
from resnet_fused.dispatch import clear_case, splits, use_reference
from resnet_fused.ops import conv_bn as cb
from resnet_fused.ops.conv_bn import FLAT, ConvBN
from resnet_fused.ops.register import register


def conv_bn_act(
    x: Tensor, conv: ConvBN, *, residual: Tensor | None = None, relu: bool = True
) -> Tensor:
    """Convolution, BatchNorm, residual addition and ReLU in one pass.

    Formula: ``y = act(bn(conv(x)) + residual)`` with ``act(v) = max(v, 0)`` (NaN stays NaN) or the
    identity. Accumulation, BatchNorm and addition are float32 (float64 for float64 inputs), rounded
    once.

    Args:
        x: input, shape [N, C, H, W], float32, bfloat16, float16 or float64; any strides,
            channels_last is fastest.
        conv: convolution and BatchNorm; the weight has ``x``'s dtype unless autocast is on.
        residual: added before the activation, shape, dtype and device of the output, any strides.
        relu: apply ReLU.

    Returns:
        Shape [N, K, OH, OW], ``x``'s dtype (the autocast dtype under autocast), channels_last.

    Raises:
        ValueError, RuntimeError: an argument breaks a rule above; the message names it.
    """
    if not clear_case(x, conv.weight):
        cb.check_same_dtype(x, conv)
        x = cb.autocast(x)
        residual = None if residual is None else cb.autocast(residual)
        if use_reference(x, "conv_bn_act", conv.groups):
            _check(x, conv, residual)
            return reference.conv_bn_act(x, conv, residual, relu)
    y: Tensor = torch.ops.resnet_fused.conv_bn_act.default(
        x, *cb.flatten(conv), residual, relu, splits(x)
    )
    if not torch.compiler.is_compiling():
        watch(conv.weight)
    return y


def _check(x: Tensor, conv: ConvBN, residual: Tensor | None) -> None:
    cb.check_conv(x, conv)
    if residual is not None:
        cb.check_residual(residual, x, cb.out_shape(x, conv))


def _reference(x: Tensor, *args: Any) -> Tensor:
    return reference.conv_bn_act(x, cb.unflatten(args[:FLAT]), *args[FLAT : FLAT + 2])


def _fake(x: Tensor, *args: Any) -> Tensor:
    conv = cb.unflatten(args[:FLAT])
    _check(x, conv, args[FLAT])
    return cb.empty_channels_last(x, cb.out_shape(x, conv))


register("conv_bn_act", _reference, _fake)
