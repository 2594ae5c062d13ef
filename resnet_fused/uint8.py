# SPDX-License-Identifier: BSD-3-Clause
"""set_input_norm: models that take images of bytes."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused.input_norm import UNTOLD, InputNorm, normalise
from resnet_fused.modules import ungraphed
from resnet_fused.ops.conv_bn import input_dtype

NAME = "_uint8_norm"  # in the __dict__ of a module that was told


def to_floats(module: nn.Module, norm: InputNorm | None, x: Any) -> Any:
    """``x`` as ``module``'s own code takes it: bytes are normalised, all else is as it was.

    Args:
        module: its first convolution says the dtype.
        norm: what it was told.
        x: the first argument of a call.

    Raises:
        ValueError: ``x`` is bytes, and ``module`` was told nothing.
    """
    if not isinstance(x, Tensor) or x.dtype is not torch.uint8:
        return x
    if norm is None:
        raise ValueError(UNTOLD)
    return normalise(x, norm.tensor(x), input_dtype(x, _dtype(module)))


def _dtype(module: nn.Module) -> torch.dtype:
    """The dtype of the first convolution's weight, else of the first weight, else float32."""
    first = None
    for m in module.modules():
        # A replica of nn.DataParallel's has no parameters, but the tensors as plain attributes. Not
        # m.weight, which may be a property that computes.
        for p in (*m._parameters.values(), m.__dict__.get("weight")):
            if isinstance(p, Tensor) and p.is_floating_point():
                if p.dim() == 4:
                    return p.dtype
                first = first or p.dtype
    return first or torch.float32


def with_floats(
    module: nn.Module, norm: InputNorm, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with ``to_floats`` of the forward's first, also if given by name."""
    if args:
        return (to_floats(module, norm, args[0]), *args[1:]), kwargs
    images = next(iter(inspect.signature(module.forward).parameters), "") if kwargs else ""
    if images not in kwargs:
        return args, kwargs
    return args, {**kwargs, images: to_floats(module, norm, kwargs[images])}


def takes_bytes(module: nn.Module) -> bool:
    """True if ``module`` itself looks for ``NAME``, before anybody else's code sees bytes."""
    cls = type(module)
    cls = cls.__dict__.get("graphed_from", cls)
    way: dict[str, Any] = getattr(cls, "_way_of_bytes", {})
    if not way:
        return False
    for name, function in way.items():
        if name in module.__dict__ or getattr(cls, name) is not function:
            return False
    return True


def _needs_hook(model: nn.Module) -> bool:
    # What fuse() gave a module, unfuse() takes away.
    return not takes_bytes(model) or "fused_from" in type(ungraphed(model)).__dict__


def keep_norm(module: nn.Module, copy: nn.Module) -> None:
    """Tell a copy what ``module`` was told; torch.fx.GraphModule's forget attributes and hooks.

    ``copy`` may be ``module``: it is one, then, that forgot its hook alone.
    """
    norm = module.__dict__.get(NAME)
    if norm is None:
        return
    hooked = any(isinstance(hook, BeforeForward) for hook in copy._forward_pre_hooks.values())
    if NAME not in copy.__dict__ or (_needs_hook(copy) and not hooked):
        set_input_norm(copy, norm.mean, norm.std)


class BeforeForward:
    """The hook that normalises for a forward that does not do it itself."""

    def __init__(self, norm: InputNorm) -> None:
        self.norm = norm

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if NAME in module.__dict__ and takes_bytes(module):
            return args, kwargs
        return with_floats(module, self.norm, args, kwargs)


def _forget(model: nn.Module) -> None:
    model.__dict__.pop(NAME, None)
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, BeforeForward):
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)


def set_input_norm(
    model: nn.Module, mean: Sequence[float] | None, std: Sequence[float] | None
) -> nn.Module:
    """Let ``model`` take images as bytes, too: uint8 of 0 to 255, normalised on their way in.

    ``model(x)`` of uint8 ``x`` then equals ``model((x / 255 - mean) / std)``, see ``InputNorm`` for
    the roundings; a fused stem at the model's beginning reads the bytes itself. Floating inputs are
    taken as before, as already normalised. ``state_dict`` and its keys stay as they are.

    Args:
        model: any module whose first argument is the images, shape [N, C, H, W], any strides: an
            array [N, H, W, C] is ``x.permute(0, 3, 1, 2)``. It may be fused before or afterwards.
        mean: per channel, of values in [0, 1]; None takes back what was said.
        std: likewise.

    Returns:
        ``model``, changed in place.

    Raises:
        TypeError, ValueError: ``model`` is no module; ``mean`` and ``std`` are not as ``InputNorm``
            wants them.
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        kind = type(model).__name__
        raise TypeError(f"model must be an nn.Module, and not TorchScript, got {kind}")
    if (mean is None) != (std is None):
        raise ValueError(f"mean and std must be given together, got {mean} and {std}")
    norm = None if mean is None or std is None else InputNorm(mean, std)
    _forget(model)
    if norm is None:
        return model
    model.__dict__[NAME] = norm
    for p in model.parameters():
        norm.tensor(p)  # before torch.compile or a CUDA graph comes across it
        break
    if _needs_hook(model):
        model.register_forward_pre_hook(BeforeForward(norm), prepend=True, with_kwargs=True)
    return model
