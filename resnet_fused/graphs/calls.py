# SPDX-License-Identifier: BSD-3-Clause
"""Which calls of a model may share a CUDA graph. Pure policy: nothing here runs anything."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._device import DeviceContext

from resnet_fused import dispatch

DEVICE = "cuda"  # tests run everything on another
TENSOR = object()  # stands for a tensor among arguments
CONSTANTS = (bool, int, float, str, type(None))  # that a graph may hold as they are

_AUTOGRAD = "autograd records it: call the model under torch.inference_mode() or torch.no_grad()"


class Refused(Exception):
    """No graph can stand for a call; says why."""


class Layout(NamedTuple):
    """What a graph's own copy of an input looks like."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype


class Call(NamedTuple):
    """A call that a graph may stand for.

    Args:
        key: equal for two calls exactly if they may share a graph.
        tensors: the tensors among the arguments, in order.
        layouts: one for each of them.
        device: where they all are.
        leaves: the arguments in order, with ``TENSOR`` in place of each tensor.
        spec: puts such a list together again as positional and keyword arguments.
    """

    key: Hashable
    tensors: list[Tensor]
    layouts: list[Layout]
    device: torch.device
    leaves: list[Any]
    spec: pytree.TreeSpec


def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """What is asked for; None if there is nothing to compute.

    Raises:
        Refused: no graph can take these arguments.
    """
    flat, spec = pytree.tree_flatten((args, kwargs))
    tensors, layouts, leaves, kinds = [], [], [], []
    for value in flat:
        if isinstance(value, Tensor):
            tensors.append(value)
            layouts.append(_layout(value))
            leaves.append(TENSOR)
        elif type(value) in CONSTANTS:
            leaves.append(value)
            kinds.append((len(leaves), type(value), repr(value)))  # 1 == True, and nan != nan
        else:
            raise Refused(f"an argument is a {type(value).__name__}")
    if not tensors:
        raise Refused("no argument is a tensor")
    device = tensors[0].device
    if any(t.device != device for t in tensors):
        raise Refused("the arguments are on more than one device")
    if any(layout.shape.numel() == 0 for layout in layouts):
        return None
    # The usual arguments, one tensor, need no description of how they are nested.
    shape = "" if len(flat) == len(args) == 1 and flat[0] is args[0] else repr(spec)
    key = (shape, tuple(layouts), tuple(kinds), device, settings())
    return Call(key, tensors, layouts, device, leaves, spec)


def _layout(t: Tensor) -> Layout:
    if type(t) not in (Tensor, nn.Parameter):
        raise Refused(f"an argument is a {type(t).__name__}, a subclass of Tensor")
    if t.device.type != DEVICE:
        raise Refused(f"an argument is on {t.device.type!r}, and graphs run on {DEVICE!r}")
    if t.layout is not torch.strided or t.is_quantized:
        raise Refused("an argument is not a strided tensor")
    if t.requires_grad and torch.is_grad_enabled():
        raise Refused(_AUTOGRAD)
    strides = t.stride()
    if not t.is_contiguous() and not t.is_contiguous(memory_format=torch.channels_last):
        # Of a slice, an expanded tensor and the like, a dense copy in the same order of dimensions.
        strides = torch.empty_like(t, device="meta").stride()
    return Layout(t.shape, strides, t.dtype)


def why_recorded(tensors: Iterable[Tensor]) -> str | None:
    """Why a call that reads these is autograd's; None if it is not."""
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return _AUTOGRAD if recorded else None


def settings() -> tuple[Hashable, ...]:
    """Every setting outside of a model on which its kernels or results depend."""
    cudnn: Any = torch.backends.cudnn  # torch's annotations lack what these have
    matmul: Any = torch.backends.cuda.matmul
    autocast = torch.is_autocast_enabled(DEVICE)
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_autocast_dtype(DEVICE) if autocast else None,
        torch.get_default_dtype(),
        _default_devices(),
        dispatch.forced(),
        dispatch.batch_invariant(),
        cudnn.enabled,
        cudnn.benchmark,
        cudnn.deterministic,
        cudnn.conv.fp32_precision,
        matmul.fp32_precision,
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        torch.are_deterministic_algorithms_enabled(),
    )


def _default_devices() -> tuple[str, ...]:
    if not torch._C._len_torch_function_stack():
        return ()
    modes = torch.overrides._get_current_function_mode_stack()
    return tuple(str(m.device) for m in modes if isinstance(m, DeviceContext))


def observed() -> bool:
    """True where the model's own operations are wanted: in a compiler, a tracer, a function
    transform, or a mode that sees every operation.
    """
    if torch.compiler.is_compiling() or dispatch.only_torch_ops():
        return True
    if torch._C._len_torch_dispatch_stack():
        return True
    return torch._C._len_torch_function_stack() != len(_default_devices())
