# SPDX-License-Identifier: BSD-3-Clause
"""The fused ops: one file per op."""

from resnet_fused.ops.add_relu import add_relu
from resnet_fused.ops.basic_block import basic_block
from resnet_fused.ops.bottleneck import bottleneck
from resnet_fused.ops.conv_bn import ConvBN
from resnet_fused.ops.conv_bn_act import conv_bn_act
from resnet_fused.ops.pool_linear import pool_linear
from resnet_fused.ops.stem import stem

__all__ = [
    "ConvBN",
    "add_relu",
    "basic_block",
    "bottleneck",
    "conv_bn_act",
    "pool_linear",
    "stem",
]
