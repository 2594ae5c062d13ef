# SPDX-License-Identifier: BSD-3-Clause
"""ResNet inference in PyTorch by fused kernels, without changing anything else about the model."""

from typing import TYPE_CHECKING, Any

from resnet_fused import models, ops
from resnet_fused._info import info
from resnet_fused.dispatch import backend, set_batch_invariant
from resnet_fused.fuse import fuse, unfuse
from resnet_fused.graphed import graphed
from resnet_fused.input_norm import InputNorm
from resnet_fused.models import (
    BasicBlock,
    Bottleneck,
    ResNet,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    wide_resnet50_2,
    wide_resnet101_2,
)
from resnet_fused.ops import (
    ConvBN,
    add_relu,
    basic_block,
    bottleneck,
    conv_bn_act,
    pool_linear,
    stem,
)
from resnet_fused.report import report
from resnet_fused.uint8 import set_input_norm
from resnet_fused.verify import VerificationError, verify

if TYPE_CHECKING:
    from resnet_fused.predict.predictor import Predictor

__version__ = "0.1.0"

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "ConvBN",
    "InputNorm",
    "Predictor",
    "ResNet",
    "VerificationError",
    "add_relu",
    "backend",
    "basic_block",
    "bottleneck",
    "conv_bn_act",
    "fuse",
    "graphed",
    "info",
    "models",
    "ops",
    "pool_linear",
    "report",
    "resnet101",
    "resnet152",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "resnext50_32x4d",
    "set_batch_invariant",
    "set_input_norm",
    "stem",
    "unfuse",
    "verify",
    "wide_resnet101_2",
    "wide_resnet50_2",
]


def __getattr__(name: str) -> Any:
    """``Predictor`` needs Pillow, which nothing else here does: imported when it is asked for."""
    if name != "Predictor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from resnet_fused.predict.predictor import Predictor

    return Predictor
