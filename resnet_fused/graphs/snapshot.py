# SPDX-License-Identifier: BSD-3-Clause
"""Whether a model is still what it was when its graphs were captured.

A graph reads the memory that the model's tensors had then. Values may change in it; another tensor,
other memory or another program may not. This is asked at every call, so it is written for speed:
whole lists at a time, without a loop in Python.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from resnet_fused.graphs.calls import Refused
from resnet_fused.modules import GLOBAL_HOOKS, HOOKS

_BOOKKEEPING = frozenset(vars(nn.Module()))
_TRAINING = operator.itemgetter("training")
FORGOTTEN = "the model is in training mode: call eval()"


class Change(NamedTuple):
    """How a model differs from its snapshot.

    Args:
        reason: in words.
        stale: its graphs are of no more use; else they are as soon as the difference is gone.
    """

    reason: str
    stale: bool


class _Attributes(NamedTuple):
    """Modules with attributes of the same names."""

    read: Callable[[dict[str, Any]], Any]
    owners: list[dict[str, Any]]
    values: list[Any]


class Snapshot:
    """The modules, tensors, attributes and modes of a model, held alive so that no other object and
    no other tensor can be taken for one of them.

    Raises:
        Refused: no graph can be captured from the model as it is.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = {id(m): name for name, m in model.named_modules()}
        self._modules = list(model.modules())
        for module in self._modules:
            _check_kind(module)
        reason = self._why_training()
        if reason:
            raise Refused(reason)
        below = self._modules[1:]  # the model's own hooks run around the graph
        self._hooks = [m.__dict__[name] for m in below for name in HOOKS]
        reason = self._why_hooked()
        if reason:
            raise Refused(reason)

        self._types = list(map(type, self._modules))
        self._owners = [m.__dict__ for m in self._modules]
        self._lengths = list(map(len, self._owners))
        self._modes = list(map(_TRAINING, self._owners))
        kinds: list[Any] = [
            d for m in self._modules for d in (m._modules, m._parameters, m._buffers)
        ]
        self._members = [d for d in kinds if d]
        self._empty = [d for d in kinds if not d]
        self._values = list(chain.from_iterable(map(dict.values, self._members)))
        self._attributes, loose = _read_attributes(self._owners)
        self._loose = [(d, name, d[name]) for d, name in loose]
        found = [v for v in self._values if isinstance(v, Tensor)] + [v for *_, v in self._loose]
        for t in found:
            if type(t) not in (Tensor, nn.Parameter):
                raise Refused(f"the model has a {type(t).__name__}, a subclass of Tensor")
        self.tensors = found
        self._addresses = list(map(Tensor.data_ptr, found))

    def change(self) -> Change | None:
        """What must be known before a graph may be replayed; None if it may."""
        if list(map(_TRAINING, self._owners)) != self._modes:
            reason = self._why_training()
            return Change(reason or "modules changed their mode", stale=not reason)
        if any(self._hooks) or any(GLOBAL_HOOKS):
            reason = self._why_hooked()
            if reason:
                return Change(reason, stale=False)
        return None if self._same() else Change("the model was changed", stale=True)

    def _same(self) -> bool:
        try:
            members = list(chain.from_iterable(map(dict.values, self._members)))
            return (
                not any(self._empty)
                and len(members) == len(self._values)
                and all(map(operator.is_, members, self._values))
                and list(map(Tensor.data_ptr, self.tensors)) == self._addresses
                and list(map(type, self._modules)) == self._types
                and list(map(len, self._owners)) == self._lengths
                and all(owner[name] is value for owner, name, value in self._loose)
                and all(list(map(a.read, a.owners)) == a.values for a in self._attributes)
            )
        except (
            Exception
        ):  # an attribute is gone, or a new value does not compare, or has no address
            return False

    def _why_training(self) -> str | None:
        if self._modules[0].training:
            return FORGOTTEN
        for module in self._modules:
            if module.training and isinstance(module, _NormBase):
                return f"'{self._names[id(module)]}' is in training mode"
        return None

    def _why_hooked(self) -> str | None:
        if any(GLOBAL_HOOKS):
            return "a global hook"
        for module in self._modules[1:]:
            if any(getattr(module, name) for name in HOOKS):
                return f"a hook on '{self._names[id(module)]}'"
        return None


def _check_kind(module: nn.Module) -> None:
    """Refuse modules that do more than run their forward, or whose code torch would not run in the
    same way while every operation is watched.
    """
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        raise Refused("a part of it is TorchScript")
    if kind.__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
        raise Refused(
            "a part of it is compiled: torch.compile(mode='reduce-overhead') makes its own graphs"
        )
    if kind.__module__.startswith(("torch.nn.parallel.", "torch.distributed.")):
        raise Refused(f"{kind.__name__} is not captured: graph the module inside it")


def _read_attributes(
    owners: list[dict[str, Any]],
) -> tuple[list[_Attributes], list[tuple[dict[str, Any], str]]]:
    """The attributes that modules were given, and those of them that are tensors."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    loose = []
    for owner in owners:
        own = [name for name in owner if name not in _BOOKKEEPING]
        names = [name for name in own if not isinstance(owner[name], Tensor)]
        loose += [(owner, name) for name in own if name not in names]  # compared by identity
        if names:
            groups.setdefault(tuple(names), []).append(owner)
    found = []
    for key, members in groups.items():
        read = operator.itemgetter(*key)
        found.append(_Attributes(read, members, list(map(read, members))))
    return found, loose
