# SPDX-License-Identifier: BSD-3-Clause
"""The same values under other strides, offsets and layouts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Viewer = Callable[[Tensor], Tensor]


def _like(t: Tensor, view: Tensor) -> Tensor:
    return view.copy_(t)


def _sliced(t: Tensor) -> Tensor:
    """Every dimension cut out of a longer one, gaps full of NaN."""
    big = torch.full([s + 3 for s in t.shape], float("nan"), dtype=t.dtype)
    return _like(t, big[tuple(slice(1, 1 + s) for s in t.shape)])


def _stepped(t: Tensor) -> Tensor:
    """Every second element of the last dimension."""
    big = torch.full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"), dtype=t.dtype)
    return _like(t, big[..., ::2])


def _transposed(t: Tensor) -> Tensor:
    """Dimensions stored in reverse order."""
    back = tuple(reversed(range(t.dim())))
    return t.permute(back).contiguous().permute(back)


def _offset(t: Tensor) -> Tensor:
    """One element into its storage: not aligned to anything but itself."""
    flat = torch.full((t.numel() + 1,), float("nan"), dtype=t.dtype)
    return _like(t, flat[1:].view(t.shape))


def _channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t.contiguous()


def _second_half(t: Tensor) -> Tensor:
    """Dense channels_last behind other images: nothing but the storage offset is unusual."""
    big = torch.full((t.shape[0] + 2, *t.shape[1:]), float("nan"), dtype=t.dtype)
    big = _channels_last(big)
    return _like(t, big[2:])


VIEWS: dict[str, Viewer] = {
    "channels_last": _channels_last,
    "contiguous": lambda t: t.contiguous(),
    "sliced": _sliced,
    "stepped": _stepped,
    "transposed": _transposed,
    "offset": _offset,
    "second half": _second_half,
}


def expanded(t: Tensor) -> Tensor:
    """The first entry of the first dimension, repeated with stride 0."""
    return t[:1].expand_as(t)
