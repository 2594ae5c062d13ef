# SPDX-License-Identifier: BSD-3-Clause
"""Float64 results of the ops with the spread of rounding error that any honest computation has.

Each value carries the variance of its rounding error, passed on through the linear steps as for
independent errors. A step that may round (to the tensor's dtype, or in a float32 sum) adds the
variance of that rounding: u^2/3 of the value's square for relative errors uniform within u. Paths
may round at fewer places than are counted here, never at more: the weights once (a BatchNorm folded
into them), then after the convolution, after the BatchNorm and after the addition.

The ops' namesakes here take the ops' own arguments, and `u` besides. They are written apart from
`resnet_fused.reference`, so that a mistake there is seen. What this finds are wrong results; a
kernel that only rounds a little more often than it should stays within the bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused import dispatch
from resnet_fused.bench.subjects import ROUNDOFF
from resnet_fused.input_norm import InputNorm
from resnet_fused.ops import ConvBN

SIGMAS = 6.0
"""How many standard deviations an element may be off: errors are not quite independent."""


@dataclass(frozen=True)
class Roundings:
    """The unit roundoffs on the way: of stored values, of factors inside a product, of sums."""

    stored: float
    factor: float
    summed: float


def roundings(dtype: torch.dtype, device: str) -> Roundings:
    """Say how finely `dtype` is computed on `device`; cuDNN's TF32 switch counts."""
    tf32 = torch.device(device).type == "cuda" and dtype == torch.float32 and dispatch.tf32()
    summed = min(ROUNDOFF[dtype], ROUNDOFF[torch.float32])
    return Roundings(ROUNDOFF[dtype], 2.0**-11 if tf32 else 0.0, summed)


@dataclass(frozen=True)
class Expected:
    """Exact values and the variance of a computed one's error, both float64 on the CPU."""

    value: Tensor
    variance: Tensor

    def worst(self, y: Tensor) -> tuple[float, float]:
        """Give error and bound at the element of `y` that is furthest off in terms of its bound."""
        if y.shape != self.value.shape or not bool(torch.isfinite(y).all()):
            return math.inf, 0.0
        error = (y.detach().cpu().double() - self.value).abs().flatten()
        bound = SIGMAS * self.variance.sqrt().flatten() + torch.finfo(y.dtype).tiny
        if error.numel() == 0:
            return 0.0, 0.0
        at = int((error / bound).argmax())
        return error[at].item(), bound[at].item()


def _exact(x: Tensor) -> Expected:
    """Take an input as it is."""
    value = x.detach().cpu().double()
    return Expected(value, torch.zeros_like(value))


def _normalised(x: Tensor, norm: InputNorm, u: Roundings) -> Expected:
    """Bytes as InputNorm makes them numbers: in float32, of two rounded factors, then stored."""
    mean, std = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (norm.mean, norm.std))
    product, shift = x.detach().cpu().double() / 255 / std, -mean / std
    value = product + shift
    squares = 2 * product.square() + shift.square() + value.square()  # one for each rounding
    return _stored(value, ROUNDOFF[torch.float32] ** 2 / 3 * squares, u)


def _stored(value: Tensor, variance: Tensor, u: Roundings) -> Expected:
    return Expected(value, variance + u.stored**2 / 3 * value.square())


def _product_variance(sum_of_squares: Tensor, terms: int, u: Roundings) -> Tensor:
    """Variance of a sum of products whose squares add up to `sum_of_squares`."""
    return sum_of_squares * ((u.stored**2 + 2 * u.factor**2) / 3 + terms * u.summed**2)


def _conv_bn(x: Expected, conv: ConvBN, u: Roundings) -> Expected:
    """Convolve and normalise."""
    weight, bias, gamma, beta, mean, var = (
        None if t is None else t.detach().cpu().double() for t in conv[:6]
    )
    assert weight is not None
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
    y = F.conv2d(x.value, weight, None, *geometry)
    squares = F.conv2d(x.value.square(), weight.square(), None, *geometry)
    variance = F.conv2d(x.variance, weight.square(), None, *geometry)
    variance = variance + _product_variance(squares, weight[0].numel(), u)

    channels = weight.shape[0]
    zero, one = weight.new_zeros(channels), weight.new_ones(channels)
    scale, shift = one, bias if bias is not None else zero
    if mean is not None and var is not None:
        scale = (gamma if gamma is not None else one) / (var + conv.eps).sqrt()
        shift = (shift - mean) * scale + (beta if beta is not None else zero)
    scale, shift = (t.view(1, -1, 1, 1) for t in (scale, shift))
    product = _stored(y * scale, variance * scale.square(), u)
    variance = product.variance + u.summed**2 * (product.value.square() + shift.square())
    return _stored(product.value + shift, variance, u)


def _add(x: Expected, y: Expected, u: Roundings) -> Expected:
    return _stored(x.value + y.value, x.variance + y.variance, u)


def _relu(x: Expected) -> Expected:
    """Clamp; that never enlarges an error."""
    return Expected(F.relu(x.value), x.variance)


def _conv_bn_act(x: Expected, conv: ConvBN, u: Roundings) -> Expected:
    return _relu(_conv_bn(x, conv, u))


def conv_bn_act(
    x: Tensor, conv: ConvBN, *, u: Roundings, residual: Tensor | None = None, relu: bool = True
) -> Expected:
    """`act(bn(conv(x)) + residual)`."""
    y = _conv_bn(_exact(x), conv, u)
    y = y if residual is None else _add(y, _exact(residual), u)
    return _relu(y) if relu else y


def add_relu(x: Tensor, y: Tensor, *, u: Roundings) -> Expected:
    """`relu(x + y)`."""
    return _relu(_add(_exact(x), _exact(y), u))


def stem(x: Tensor, conv: ConvBN, norm: InputNorm | None = None, *, u: Roundings) -> Expected:
    """3x3/2 max-pool of `relu(bn(conv(x)))`; the maximum's error is at most the largest one's."""
    image = _exact(x) if norm is None else _normalised(x, norm, u)
    y = _conv_bn_act(image, conv, u)
    return Expected(F.max_pool2d(y.value, 3, 2, 1), F.max_pool2d(y.variance, 3, 2, 1))


def basic_block(
    x: Tensor, conv1: ConvBN, conv2: ConvBN, downsample: ConvBN | None = None, *, u: Roundings
) -> Expected:
    """`relu(conv2(relu(conv1(x))) + shortcut)`."""
    identity = _exact(x)
    shortcut = identity if downsample is None else _conv_bn(identity, downsample, u)
    return _relu(_add(_conv_bn(_conv_bn_act(identity, conv1, u), conv2, u), shortcut, u))


def bottleneck(
    x: Tensor,
    conv1: ConvBN,
    conv2: ConvBN,
    conv3: ConvBN,
    downsample: ConvBN | None = None,
    *,
    u: Roundings,
) -> Expected:
    """`relu(conv3(relu(conv2(relu(conv1(x))))) + shortcut)`."""
    identity = _exact(x)
    shortcut = identity if downsample is None else _conv_bn(identity, downsample, u)
    y = _conv_bn_act(_conv_bn_act(identity, conv1, u), conv2, u)
    return _relu(_add(_conv_bn(y, conv3, u), shortcut, u))


def pool_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, u: Roundings) -> Expected:
    """Linear layer on the mean over height and width."""
    image = _exact(x).value
    spread = image.square().mean((2, 3)) * u.summed**2
    pooled = _stored(image.mean((2, 3)), spread, u)
    exact_weight = weight.detach().cpu().double()
    y = F.linear(pooled.value, exact_weight)
    squares = F.linear(pooled.value.square(), exact_weight.square())
    variance = F.linear(pooled.variance, exact_weight.square())
    variance = variance + _product_variance(squares, weight.shape[1], u)
    if bias is not None:
        y = y + bias.detach().cpu().double()
    return _stored(y, variance, u)
