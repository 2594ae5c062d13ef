# SPDX-License-Identifier: BSD-3-Clause
"""ConvBN, the argument that every convolution op takes, and the rules it must keep."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class ConvBN(NamedTuple):
    """One convolution and the BatchNorm behind it, as the live tensors of the two modules.

    Formula: ``bn(conv(x)) = (conv(x) + bias - running_mean) / sqrt(running_var + eps) * bn_weight +
    bn_bias``. Without ``running_mean`` and ``running_var`` there is no BatchNorm, and no
    ``bn_weight`` or ``bn_bias`` either: the result is ``conv(x) + bias``.

    The tensors are float32, bfloat16, float16 or float64, need not share a dtype, and may have any
    strides.

    Args:
        weight: filters, shape [K, C / groups, R, S].
        bias: bias of the convolution, shape [K].
        bn_weight: gamma, shape [K]; None is 1.
        bn_bias: beta, shape [K]; None is 0.
        running_mean: shape [K].
        running_var: shape [K].
        eps: added to the variance.
        stride: (vertical, horizontal), at least 1.
        padding: zeros on each side (vertical, horizontal), at least 0.
        dilation: (vertical, horizontal), at least 1.
        groups: divides C and K.
    """

    weight: Tensor
    bias: Tensor | None = None
    bn_weight: Tensor | None = None
    bn_bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    eps: float = 1e-5
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


# A convolution as dispatcher arguments: six tensors, eps, and its geometry as seven integers.
FLAT = 8


def flatten(conv: ConvBN) -> tuple[Any, ...]:
    """The dispatcher arguments of ``conv``."""
    return (*conv[:7], [*conv.stride, *conv.padding, *conv.dilation, conv.groups])


def most_groups(*convs: ConvBN | None) -> int:
    """The most groups of any of these convolutions."""
    most = 1
    for conv in convs:
        if conv is not None and conv.groups > most:
            most = conv.groups
    return most


def flatten_optional(conv: ConvBN | None) -> tuple[Any, ...]:
    """The dispatcher arguments of a convolution that may be absent: its weight is None then."""
    # AOTInductor hands an empty list on as None, so an absent one has a geometry, too.
    return (None,) * 6 + (0.0, [1, 1, 0, 0, 1, 1, 1]) if conv is None else flatten(conv)


def unflatten(args: tuple[Any, ...]) -> ConvBN:
    """Inverse of ``flatten``."""
    weight, bias, bn_weight, bn_bias, mean, var, eps, g = args
    geometry = ((g[0], g[1]), (g[2], g[3]), (g[4], g[5]), g[6])
    return ConvBN(weight, bias, bn_weight, bn_bias, mean, var, eps, *geometry)


def unflatten_optional(args: tuple[Any, ...]) -> ConvBN | None:
    """Inverse of ``flatten_optional``."""
    return None if args[0] is None else unflatten(args)


def out_size(size: Any, window: Any, stride: int, padding: int, dilation: int) -> Any:
    """Output height or width of a convolution; the arguments may be symbolic."""
    return (size + 2 * padding - dilation * (window - 1) - 1) // stride + 1


class Shape(NamedTuple):
    """Stands for a tensor in the checks, as for one in the middle of a chain."""

    shape: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device

    def dim(self) -> int:
        return len(self.shape)


def check_conv(x: Tensor | Shape, conv: ConvBN, name: str = "conv") -> None:
    """Raise ValueError if ``conv`` does not fit ``x``; the C++ ops hold the same rules.

    Like the other checks here it is silent under ``torch.jit.trace``, where sizes are tensors and
    torch's own ops check them.
    """
    if torch.jit.is_tracing():
        return
    w = conv.weight
    if x.dim() != 4:
        raise ValueError(f"x must have 4 dimensions [N, C, H, W], got shape {tuple(x.shape)}")
    if w.dim() != 4:
        raise ValueError(
            f"{name}.weight must have 4 dimensions [K, C/groups, R, S], got shape {tuple(w.shape)}"
        )
    if conv.groups < 1 or w.shape[0] % conv.groups:
        raise ValueError(
            f"{name}.groups must divide the {w.shape[0]} output channels, got {conv.groups}"
        )
    if x.shape[1] != w.shape[1] * conv.groups:
        raise ValueError(
            f"x must have {w.shape[1] * conv.groups} channels to fit {name}.weight, "
            f"got {x.shape[1]}"
        )
    if min(conv.stride) < 1 or min(conv.dilation) < 1 or min(conv.padding) < 0:
        raise ValueError(
            f"{name} needs stride >= 1, dilation >= 1 and padding >= 0, got stride {conv.stride}, "
            f"dilation {conv.dilation}, padding {conv.padding}"
        )
    if max(*conv.stride, *conv.padding, *conv.dilation) >= 2**31:
        raise ValueError(
            f"{name}'s stride, dilation and padding must be below 2^31, got {conv.stride}, "
            f"{conv.dilation}, {conv.padding}"
        )
    for i, d in enumerate("HW"):
        out = out_size(
            x.shape[2 + i], w.shape[2 + i], conv.stride[i], conv.padding[i], conv.dilation[i]
        )
        if out < 1:
            raise ValueError(
                f"x must be large enough for {name}: {d} = {x.shape[2 + i]} gives {out} outputs; "
                f"enlarge x"
            )
    if (conv.running_mean is None) != (conv.running_var is None):
        raise ValueError(f"{name}.running_mean and {name}.running_var must be given together")
    for field, t in zip(ConvBN._fields[2:4], conv[2:4], strict=True):
        if t is not None and conv.running_var is None:
            raise ValueError(
                f"{name}.{field} is a BatchNorm's and needs {name}.running_mean and "
                f"{name}.running_var; give both, or leave {field} out"
            )
    for field, t in zip(ConvBN._fields[1:6], conv[1:6], strict=True):
        if t is not None and tuple(t.shape) != (w.shape[0],):
            raise ValueError(f"{name}.{field} must have shape [{w.shape[0]}], got {tuple(t.shape)}")
    for field, t in zip(ConvBN._fields[:6], conv[:6], strict=True):
        if t is not None and t.device != x.device:
            raise ValueError(
                f"{name}.{field} must be on {x.device} like x, got {t.device}; move it there"
            )
        if t is not None and not t.dtype.is_floating_point:
            raise ValueError(f"{name}.{field} must have a floating dtype, got {t.dtype}")
    if not x.dtype.is_floating_point:
        raise ValueError(f"x must have a floating dtype, got {x.dtype}")


def check_residual(residual: Tensor, x: Tensor, shape: tuple[Any, ...]) -> None:
    """Raise ValueError if ``residual`` cannot be added to an output of ``shape``."""
    if torch.jit.is_tracing():
        return
    if tuple(residual.shape) != shape:
        raise ValueError(
            f"residual must have the output's shape {shape}, got {tuple(residual.shape)}"
        )
    if residual.dtype != x.dtype or residual.device != x.device:
        raise ValueError(
            f"residual must have x's dtype and device ({x.dtype}, {x.device}), "
            f"got {residual.dtype}, {residual.device}"
        )


def out_shape(x: Tensor | Shape, conv: ConvBN) -> tuple[Any, ...]:
    """Shape [N, K, OH, OW] of ``conv(x)``."""
    w = conv.weight
    h, v = (
        out_size(x.shape[2 + i], w.shape[2 + i], conv.stride[i], conv.padding[i], conv.dilation[i])
        for i in range(2)
    )
    return (x.shape[0], w.shape[0], h, v)


def empty_channels_last(x: Tensor | Shape, shape: tuple[Any, ...]) -> Tensor:
    """What the kernels return: dtype and device of ``x``, channels_last strides."""
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def autocast(x: Tensor) -> Tensor:
    """``x`` as eager's convolutions would see it: in the autocast dtype where autocast is on.

    Only the activations are cast: the ops take parameters of any dtype, so weights keep their
    precision until they are packed, and BatchNorm stays in float32 as it does under eager's
    autocast.
    """
    return x.to(autocast_dtype(x, x.dtype))


def autocast_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Dtype in which eager's convolutions on ``x``'s device take an input of ``dtype``."""
    if autocast_on(x) and dtype in (torch.float32, torch.bfloat16, torch.float16):
        return torch.get_autocast_dtype(x.device.type)
    return dtype


def input_dtype(x: Tensor, weight: torch.dtype) -> torch.dtype:
    """Dtype to which bytes are normalised for a weight: what autocast casts must not have been
    rounded to another dtype before.
    """
    return weight if autocast_dtype(x, weight) == weight else torch.float32


def autocast_on(x: Tensor) -> bool:
    """True if eager's ops on ``x`` would run under autocast; asking for meta would raise."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def check_same_dtype(x: Tensor, conv: ConvBN, name: str = "conv") -> None:
    """Raise ValueError where eager would refuse: input and weight differ in dtype without
    autocast.
    """
    if x.dtype != conv.weight.dtype and not autocast_on(x):
        raise ValueError(
            f"x must have {name}.weight's dtype {conv.weight.dtype}, got {x.dtype}; "
            f"convert one of them, or use torch.autocast"
        )


def check_chain(x: Tensor, convs: dict[str, ConvBN]) -> tuple[Any, ...]:
    """Check convolutions that feed each other; returns the last one's output shape."""
    here: Any = x
    for name, conv in convs.items():
        check_conv(here, conv, name)
        here = Shape(out_shape(here, conv), x.dtype, x.device)
    shape: tuple[Any, ...] = here.shape
    return shape


def check_shortcut(x: Tensor, downsample: ConvBN | None, shape: tuple[Any, ...]) -> None:
    """Raise ValueError if the shortcut of a block does not have the block's output shape."""
    if torch.jit.is_tracing():
        return
    if downsample is not None:
        check_conv(x, downsample, "downsample")
    got = tuple(x.shape) if downsample is None else out_shape(x, downsample)
    if got != shape:
        what = "x" if downsample is None else "downsample(x)"
        raise ValueError(
            f"{what} must have the block's output shape {shape} to be added, got {got}; "
            f"give a downsample convolution that maps x to it"
        )
