# SPDX-License-Identifier: BSD-3-Clause
"""Copies of a model for verify: in plain PyTorch, in float64, with rounding noise, and with fused
calls that are watched.

Watching changes nothing outside the copies: their forwards are made anew with other globals.
"""

from __future__ import annotations

import copy
import inspect
from types import FunctionType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from resnet_fused import dispatch, ops, rounding
from resnet_fused.fuse import restore
from resnet_fused.fusion import steps
from resnet_fused.fusion.units import child
from resnet_fused.modules import Fused
from resnet_fused.ops.conv_bn import autocast, most_groups
from resnet_fused.ops.stem import of_floats
from resnet_fused.uint8 import BeforeForward, keep_norm


class Trial(Protocol):
    """Who hears of watched calls."""

    where: str
    name: str

    def compare_call(
        self, name: str, op: str, want: rounding.Exact, y: Tensor, path: str
    ) -> None: ...


class Watched:
    """Stands for the module ``resnet_fused.ops`` in the code of a trial; checks every call."""

    def __init__(self, trial: Trial, names: dict[int, str]) -> None:
        self.trial, self.names = trial, names

    def __getattr__(self, op: str) -> Any:
        function = getattr(ops, op)
        if op not in rounding.OPS:
            return function

        def call(*args: Any, **kwargs: Any) -> Tensor:
            convs = [a for a in (*args, *kwargs.values()) if isinstance(a, ops.ConvBN)]
            weights = [c.weight for c in convs] or [a for a in args[1:2] if op == "pool_linear"]
            found = [self.names[id(w)] for w in weights if id(w) in self.names]
            name = ", ".join(found) or self.trial.where or self.trial.name
            given, args = args, of_floats(*args) if op == "stem" else args
            cast: Any = pytree.tree_map_only(
                Tensor, autocast, (args[: 1 + (op == "add_relu")], kwargs.get("residual"))
            )
            dtype, device = cast[0][0].dtype, args[0].device
            path = dispatch.path_on(device, dtype, op, most_groups(*convs)).name
            kind = rounding.Kind(dtype, path, device.type)
            inputs = (*cast[0], *args[len(cast[0]) :])
            options = {**kwargs, "residual": cast[1]} if "residual" in kwargs else kwargs
            want = rounding.exact(op, kind, inputs, options)
            y: Tensor = function(*given, **kwargs)
            self.trial.compare_call(name, op, want, y, path)
            return y

        return call


def remade(function: FunctionType, space: dict[str, Any]) -> FunctionType:
    """``function`` with other globals."""
    made = FunctionType(
        function.__code__, space, function.__name__, function.__defaults__, function.__closure__
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def rebound(space: dict[str, Any], watched: Any) -> dict[str, Any]:
    """A module's globals with ``ops`` replaced, and its functions made anew to see that."""
    new = {**space, "ops": watched}
    for name, value in space.items():
        if isinstance(value, FunctionType) and value.__globals__ is space:
            new[name] = remade(value, new)
    return new


def is_step(value: Any) -> bool:
    return isinstance(value, FunctionType) and value.__globals__ is vars(steps)


class _Quiet:
    """Mixin that keeps the hooks which classes put on being subclassed out of this."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass


def watched_class(cls: type[nn.Module], watched: Any) -> type[nn.Module]:
    """A subclass of a module written with fused calls whose calls are watched."""
    names: dict[str, Any] = {"__module__": cls.__module__, "fused_from": cls}
    for name in dir(cls):
        value = inspect.getattr_static(cls, name)
        if isinstance(value, FunctionType) and value.__globals__.get("ops") is ops:
            names[name] = remade(value, {**value.__globals__, "ops": watched})
    metaclass: Any = type(cls)
    made: type[nn.Module] = metaclass(cls.__name__, (_Quiet, cls), names)
    return made


def copy_of(model: nn.Module) -> nn.Module:
    """A copy in eval mode, without the user's hooks, which may record what they see."""
    before = dict(model.named_modules())
    model = copy.deepcopy(model).eval()
    for path, module in model.named_modules():
        if path in before:
            keep_norm(before[path], module)
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                own = isinstance(hook, BeforeForward)
                if not own and not str(getattr(hook, "__module__", "")).startswith("torch."):
                    del hooks[key]
    return model


def plain(model: nn.Module) -> nn.Module:
    """``model``, in place, without fused calls."""
    restore(model)
    for module in model.modules():
        if isinstance(module, Fused):
            for site in module.fused_sites():  # a hook makes it call its modules
                child(module, site.modules[0]).register_forward_hook(lambda m, args, y: None)
    return model


def double(model: nn.Module) -> nn.Module:
    """``model``, in place, in float64, with the tensors that are neither parameter nor buffer."""
    for module in model.double().modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_floating_point():
                module.__dict__[name] = value.double()
    return model


def double_inputs(x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(a.to(torch.float64, copy=True) if a.is_floating_point() else a.clone() for a in x)


def disturb(model: nn.Module, unit: float) -> list[RemovableHandle]:
    """Disturb every layer's result at random, as rounding might, until the handles are removed.

    Args:
        unit: unit roundoff of the results.
    """
    sums = min(unit, rounding.UNIT[torch.float32])

    def hook(module: nn.Module, args: Any, y: Any) -> Any:
        if not isinstance(y, Tensor) or not y.is_floating_point():
            return y
        # Sums of products of either sign err little; those of equal numbers, as a pool may see,
        # by a quarter of a unit per number.
        x = args[0] if args and isinstance(args[0], Tensor) else y
        pooled = x.shape[2:].numel() / max(1, y.shape[2:].numel())
        most = unit + (16 + pooled / 4) * sums
        return y * (1 + torch.empty_like(y).uniform_(-most, most))

    return [m.register_forward_hook(hook) for m in model.modules() if not m._modules]
