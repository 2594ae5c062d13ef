# SPDX-License-Identifier: BSD-3-Clause
"""ResNet inference in PyTorch, made fast by fused kernels, without changing anything else about the model."""

from resnet_fused import ops
from resnet_fused.dispatch import backend
from resnet_fused.ops import ConvBN, add_relu, basic_block, bottleneck, conv_bn_act, pool_linear, stem

__version__ = "0.1.0"
