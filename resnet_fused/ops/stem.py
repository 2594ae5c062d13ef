# SPDX-License-Identifier: BSD-3-Clause
"""stem: a network's first convolution, BatchNorm, ReLU and 3x3/2 max-pool as one op."""

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


def stem(x: Tensor, conv: ConvBN) -> Tensor:
    """A network's first convolution, BatchNorm, ReLU and max-pool in one pass.

    Formula: ``y = maxpool(relu(bn(conv(x))))``, max-pool with a 3x3 window, stride 2, padding 1;
    NaN stays NaN.

    Args:
        x: input, shape [N, C, H, W], float32, bfloat16, float16 or float64; any strides, NCHW and
            channels_last cost the same.
        conv: convolution and BatchNorm; the weight has ``x``'s dtype unless autocast is on.

    Returns:
        Shape [N, K, ceil(OH / 2), ceil(OW / 2)] for a convolution output of OH x OW, ``x``'s dtype
        (the autocast dtype under autocast), channels_last.

    Raises:
        ValueError, RuntimeError: an argument breaks a rule above; the message names it.
    """
    if not clear_case(x, conv.weight):
        cb.check_same_dtype(x, conv)
        x = cb.autocast(x)
        if use_reference(x, "stem", conv.groups):
            cb.check_conv(x, conv)
            return reference.stem(x, conv)
    y: Tensor = torch.ops.resnet_fused.stem.default(x, *cb.flatten(conv), splits(x))
    if not torch.compiler.is_compiling():
        watch(conv.weight)
    return y


def _reference(x: Tensor, *args: Any) -> Tensor:
    return reference.stem(x, cb.unflatten(args[:FLAT]))


def _fake(x: Tensor, *args: Any) -> Tensor:
    conv = cb.unflatten(args[:FLAT])
    cb.check_conv(x, conv)
    n, k, oh, ow = cb.out_shape(x, conv)
    return cb.empty_channels_last(x, (n, k, (oh - 1) // 2 + 1, (ow - 1) // 2 + 1))


register("stem", _reference, _fake)
