# SPDX-License-Identifier: BSD-3-Clause
"""basic_block: the two-convolution residual block of ResNet-18 and 34 as one op."""

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


def basic_block(
    x: Tensor, conv1: ConvBN, conv2: ConvBN, downsample: ConvBN | None = None
) -> Tensor:
    """A residual block of two convolutions in one call.

    Formula: ``y = relu(bn2(conv2(relu(bn1(conv1(x))))) + s)`` with ``s = bn(downsample(x))``, or
    ``x`` without ``downsample``. Intermediate tensors are rounded to ``x``'s dtype once each.

    Args:
        x: input, shape [N, C, H, W], float32, bfloat16, float16 or float64; any strides,
            channels_last is fastest.
        conv1: first convolution; all weights have ``x``'s dtype unless autocast is on.
        conv2: second convolution, takes what ``conv1`` gives.
        downsample: projection of the shortcut, needed where the output's shape is not ``x``'s.

    Returns:
        Shape of ``conv2``'s output, ``x``'s dtype (the autocast dtype under autocast),
        channels_last.

    Raises:
        ValueError, RuntimeError: an argument breaks a rule above; the message names it.
    """
    if not clear_case(x, conv1.weight):
        cb.check_same_dtype(x, conv1, "conv1")
        x = cb.autocast(x)
        if use_reference(x, "basic_block", cb.most_groups(conv1, conv2, downsample)):
            _check(x, conv1, conv2, downsample)
            return reference.basic_block(x, conv1, conv2, downsample)
    y: Tensor = torch.ops.resnet_fused.basic_block.default(
        x, *cb.flatten(conv1), *cb.flatten(conv2), *cb.flatten_optional(downsample), splits(x)
    )
    if not torch.compiler.is_compiling():
        watch(conv1.weight, conv2.weight, downsample and downsample.weight)
    return y


def _check(x: Tensor, conv1: ConvBN, conv2: ConvBN, downsample: ConvBN | None) -> tuple[Any, ...]:
    """Check the chain; returns the output's shape."""
    shape = cb.check_chain(x, {"conv1": conv1, "conv2": conv2})
    cb.check_shortcut(x, downsample, shape)
    return shape


def _unflatten(args: tuple[Any, ...]) -> tuple[ConvBN, ConvBN, ConvBN | None]:
    downsample = cb.unflatten_optional(args[2 * FLAT : 3 * FLAT])
    return cb.unflatten(args[:FLAT]), cb.unflatten(args[FLAT : 2 * FLAT]), downsample


def _reference(x: Tensor, *args: Any) -> Tensor:
    return reference.basic_block(x, *_unflatten(args))


def _fake(x: Tensor, *args: Any) -> Tensor:
    return cb.empty_channels_last(x, _check(x, *_unflatten(args)))


register("basic_block", _reference, _fake)
