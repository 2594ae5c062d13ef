# SPDX-License-Identifier: BSD-3-Clause
"""The calls that a fused forward makes: an op, or eager's addition where an op would do another.

Eager's additions broadcast shapes and promote dtypes; the ops take a residual of exactly the
result's shape and dtype. ``mode`` says what eager's addition made: a ``new`` tensor, or it wrote
``into result`` of the convolution or ``into residual``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_map_only

from resnet_fused import ops
from resnet_fused.input_norm import InputNorm
from resnet_fused.ops import ConvBN
from resnet_fused.ops.conv_bn import autocast_on, out_size


def _shape(x: Tensor, *convs: ConvBN) -> tuple[Any, ...]:
    """Shape of ``x`` behind ``convs``; () if ``x`` is no image batch."""
    if x.dim() != 4:
        return ()
    n, k, h, w = x.shape
    for conv in convs:
        k, _, r, s = conv.weight.shape
        h = out_size(h, r, conv.stride[0], conv.padding[0], conv.dilation[0])
        w = out_size(w, s, conv.stride[1], conv.padding[1], conv.dilation[1])
    return (n, k, h, w)


def _dtype(x: Tensor) -> torch.dtype:
    """Dtype of a convolution of ``x``."""
    autocasts = autocast_on(x) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if autocasts else x.dtype


def norm_alone(x: Tensor, bn: Any) -> Tensor:
    """``bn(x)`` without the activation that ``bn`` goes on with."""
    if isinstance(bn, _NormBase):
        mean, var, weight, bias = bn.running_mean, bn.running_var, bn.weight, bn.bias
        return F.batch_norm(x, mean, var, weight, bias, mean is None, 0.0, bn.eps)
    scale = bn.weight * (bn.running_var + bn.eps).rsqrt()
    bias = bn.bias - bn.running_mean * scale
    return x * scale.view(-1, 1, 1) + bias.view(-1, 1, 1)


def conv_bn_act(x: Tensor, conv: ConvBN, relu: bool) -> Tensor:
    """``act(bn(conv(x)))``."""
    return ops.conv_bn_act(x, conv, relu=relu)


def conv_bn_add(x: Tensor, conv: ConvBN, residual: Tensor, relu: bool, mode: str) -> Tensor:
    """``act(bn(conv(x)) + residual)``."""
    if (
        isinstance(residual, Tensor)
        and residual.dtype == _dtype(x)
        and tuple(residual.shape) == _shape(x, conv)
    ):
        return ops.conv_bn_act(x, conv, residual=residual, relu=relu)
    y = ops.conv_bn_act(x, conv, relu=False)
    if mode == "new":
        y = y + residual
    else:
        y = y.add_(residual) if mode == "into result" else residual.clone().add_(y)
    return F.relu(y) if relu else y


def add_relu(x: Tensor, y: Tensor, in_place: bool) -> Tensor:
    """``relu(x + y)``."""
    if (
        isinstance(x, Tensor)
        and isinstance(y, Tensor)
        and x.shape == y.shape
        and x.dtype == y.dtype == _dtype(x)
        and x.is_floating_point()
    ):
        return ops.add_relu(x, y)
    return F.relu(x.add_(y) if in_place else x + y)


def stem(x: Tensor, conv: ConvBN, norm: InputNorm | None) -> Tensor:
    """3x3/2 max-pool of ``relu(bn(conv(x)))``; ``norm`` is what the model was told of its bytes."""
    return ops.stem(x, conv, norm)


def _shortcut_fits(x: Tensor, convs: tuple[ConvBN, ...], down: ConvBN | None) -> bool:
    if down is None:
        return x.dtype == _dtype(x) and _shape(x) == _shape(x, *convs)
    return _shape(x, down) == _shape(x, *convs)


def basic_block(x: Tensor, conv1: ConvBN, conv2: ConvBN, down: ConvBN | None, mode: str) -> Tensor:
    """``relu(conv2(relu(conv1(x))) + shortcut)``."""
    if _shortcut_fits(x, (conv1, conv2), down):
        return ops.basic_block(x, conv1, conv2, down)
    return _by_parts(x, (conv1, conv2), down, mode)


def bottleneck(
    x: Tensor, conv1: ConvBN, conv2: ConvBN, conv3: ConvBN, down: ConvBN | None, mode: str
) -> Tensor:
    """``relu(conv3(relu(conv2(relu(conv1(x))))) + shortcut)``."""
    if _shortcut_fits(x, (conv1, conv2, conv3), down):
        return ops.bottleneck(x, conv1, conv2, conv3, down)
    return _by_parts(x, (conv1, conv2, conv3), down, mode)


def _by_parts(x: Tensor, convs: tuple[ConvBN, ...], down: ConvBN | None, mode: str) -> Tensor:
    y = x
    for conv in convs[:-1]:
        y = ops.conv_bn_act(y, conv)
    shortcut = x if down is None else ops.conv_bn_act(x, down, relu=False)
    return conv_bn_add(y, convs[-1], shortcut, True, mode)


def pool_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``linear(mean over height and width)``."""
    return ops.pool_linear(x, weight, bias)


def is_channels_last(x: Tensor) -> bool:
    """True if eager takes ``x`` as channels_last; a tensor that fits both counts as contiguous."""
    _, c, h, w = x.shape
    sn, sc, sh, sw = x.stride()
    return 0 < sc <= sw and sw >= sc * c and sh >= sw * w and sn >= sh * h and sn != sc


def to_channels_last(x: Any) -> Any:
    """``x`` in the format in which the ops take it fastest."""
    is_image = isinstance(x, Tensor) and x.dim() == 4
    return x.contiguous(memory_format=torch.channels_last) if is_image else x


def as_eager(y: Any, x: Any, weight: Callable[[], Tensor | None] | None = None) -> Any:
    """``y`` with its images in the memory format that eager gives for ``x`` and ``weight()``.

    The ops write channels_last whatever comes in; code outside may rely on the format, as ``view``
    does.
    """
    if isinstance(y, Tensor):
        if x.dim() != 4 or y.dim() != 4 or is_channels_last(x) or not is_channels_last(y):
            return y
        w = None if weight is None else weight()
        if w is not None and is_channels_last(w):
            return y
        return y.clone(memory_format=torch.contiguous_format)
    return tree_map_only(Tensor, lambda v: as_eager(v, x, weight), y)
