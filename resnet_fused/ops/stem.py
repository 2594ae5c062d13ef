# SPDX-License-Identifier: BSD-3-Clause
"""stem: a network's first convolution, BatchNorm, ReLU and 3x3/2 max-pool as one op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resnet_fused import dispatch, reference
from resnet_fused._extension import watch
from resnet_fused.dispatch import clear_case, splits, use_reference
from resnet_fused.input_norm import UNTOLD, InputNorm, normalise
from resnet_fused.ops import conv_bn as cb
from resnet_fused.ops.conv_bn import FLAT, ConvBN
from resnet_fused.ops.register import register


def stem(x: Tensor, conv: ConvBN, norm: InputNorm | None = None) -> Tensor:
    """A network's first convolution, BatchNorm, ReLU and max-pool in one pass.

    Formula: ``y = maxpool(relu(bn(conv(x))))``, max-pool with a 3x3 window, stride 2, padding 1;
    NaN stays NaN. Of bytes the same bits as of ``x`` normalised beforehand; what the convolution
    pads is 0 behind the normalisation.

    Args:
        x: input, shape [N, C, H, W], float32, bfloat16, float16 or float64; any strides, NCHW and
            channels_last cost the same. Or uint8, a quarter or half of the memory to read.
        conv: convolution and BatchNorm; the weight has ``x``'s dtype unless autocast is on, or
            ``x`` is uint8.
        norm: mean and std of ``x`` if that is uint8; what is floating is normalised already.

    Returns:
        Shape [N, K, ceil(OH / 2), ceil(OW / 2)] for a convolution output of OH x OW, ``x``'s dtype,
        or the weight's if that is uint8 (the autocast dtype under autocast), channels_last.

    Raises:
        ValueError, TypeError, RuntimeError: an argument breaks a rule above; the message names it.
    """
    if x.dtype is torch.uint8:
        return _of_bytes(x, conv, norm)
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


def _of_bytes(x: Tensor, conv: ConvBN, norm: InputNorm | None) -> Tensor:
    if norm is None:
        raise ValueError(UNTOLD)
    if not isinstance(norm, InputNorm):
        raise TypeError(f"norm must be an InputNorm, got {type(norm).__name__}")
    w = conv.weight
    path = dispatch.path_on(x.device, w.dtype, "stem", conv.groups).name
    converts = w.dtype != cb.autocast_dtype(x, w.dtype) or dispatch.only_torch_ops()
    if converts or path == "reference" or (path == "cuda" and not _fits_cuda(conv)):
        return stem(*of_floats(x, conv, norm))
    args = (*cb.flatten(conv), splits(w), norm.tensor(x))
    y: Tensor = torch.ops.resnet_fused.stem.default(x, *args)
    if not torch.compiler.is_compiling():
        watch(w)
    return y


def of_floats(x: Tensor, conv: ConvBN, norm: InputNorm | None = None) -> tuple[Tensor, ConvBN]:
    """Arguments of ``stem`` with the bytes normalised: what it means of them."""
    if x.dtype is torch.uint8 and norm is not None:
        x = normalise(x, norm.tensor(x), cb.input_dtype(x, conv.weight.dtype))
    return x, conv


def _fits_cuda(conv: ConvBN) -> bool:
    """True if the CUDA kernel takes bytes: ``stem_fits`` of csrc/kernels/stem.h."""
    k, c, *window = conv.weight.shape
    geometry = (*window, *conv.stride, *conv.padding, *conv.dilation, conv.groups)
    return geometry == (7, 7, 2, 2, 3, 3, 1, 1, 1) and c <= 4 and k % 8 == 0 and k <= 128


def _reference(x: Tensor, *args: Any) -> Tensor:
    return reference.stem(x, cb.unflatten(args[:FLAT]), *args[FLAT + 1 :])


def _fake(x: Tensor, *args: Any) -> Tensor:
    conv, norm = cb.unflatten(args[:FLAT]), (*args[FLAT + 1 :], None)[0]
    like = x if norm is None else cb.Shape(x.shape, conv.weight.dtype, x.device)
    cb.check_conv(like, conv)
    n, k, oh, ow = cb.out_shape(x, conv)
    return cb.empty_channels_last(like, (n, k, (oh - 1) // 2 + 1, (ow - 1) // 2 + 1))


register("stem", _reference, _fake)
