# SPDX-License-Identifier: BSD-3-Clause
"""Tensor maps for the emulator's own tests, as the driver's functions take their arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from emulated import Library
from torch import Tensor

TYPES = {torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}
TF32 = 11


def layout(like: Tensor) -> tuple[list[int], list[int]]:
    """Sizes in elements and strides in bytes, innermost first, without the innermost stride."""
    assert like.stride(-1) == 1
    strides = [step * like.element_size() for step in like.stride()]
    return list(like.shape)[::-1], strides[::-1][1:]


def tiled(library: Library, address: int, like: Tensor, box: Sequence[int], **other: Any) -> bytes:
    """The map of a tensor in boxes, innermost dimension first; None if it is refused."""
    sizes, strides = layout(like)
    arguments = {
        "type": TYPES[like.dtype],
        "address": address,
        "dims": sizes,
        "strides": strides,
        "box": list(box),
        "steps": [1] * len(sizes),
        "swizzle": 3,
        "interleave": 0,
        "l2_promotion": 3,
        "fill": 0,
        "misplaced": 0,
        **other,
    }
    return library.native.encode_tiled(**arguments)


def columns(library: Library, address: int, like: Tensor, **other: Any) -> bytes:
    """The map of pixel columns of images [N, H, W, C]; None if it is refused."""
    sizes, strides = layout(like)
    arguments = {
        "type": TYPES[like.dtype],
        "address": address,
        "dims": sizes,
        "strides": strides,
        "lower": [0, 0],
        "upper": [0, 0],
        "channels": 64,
        "pixels": 64,
        "steps": [1] * 4,
        "swizzle": 3,
        "interleave": 0,
        "l2_promotion": 3,
        "fill": 0,
        "misplaced": 0,
        **other,
    }
    return library.native.encode_im2col(**arguments)
