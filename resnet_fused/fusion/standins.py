# SPDX-License-Identifier: BSD-3-Clause
"""What a forward sees while it is read: symbolic values, and stand-ins for the modules.

A stand-in has the class, attributes and children of the original, so ordinary control flow on
attributes goes the way it would go. It tells the tracer what was read, and what the forward writes
lands on the stand-in, not on the module.
"""

from __future__ import annotations

import operator
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute

from resnet_fused.ready import NAME

if TYPE_CHECKING:
    from resnet_fused.fusion.tracing import Tracer

MISSING = "<missing>"
# Code here may ask for the type of a Value; a model's code may not.
_TRUSTED = (str(Path(torch.__file__).parent) + os.sep, str(Path(__file__).parent) + os.sep)
_BASE = dir(nn.Module) + list(nn.Module().__dict__)
INTERNAL = frozenset(_BASE) - {"training", "forward"}
_SIMPLE = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size)
CONTAINERS = (list, tuple, set, dict, OrderedDict)
IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor")
OWN = ("_tracer", "_path", "_original", "_before", "_fuse_plan", NAME + "plan")


class Refused(Exception):
    """The forward cannot be read; the message says why."""


@dataclass(frozen=True)
class Same:
    """An object that only itself equals, for attributes whose value cannot be compared."""

    it: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.it is self.it

    __hash__ = None  # type: ignore[assignment]


def freeze(value: Any) -> Any:
    """A picture of an attribute that equals a later picture if and only if nothing changed."""
    kind = type(value)
    if kind in _SIMPLE:
        return (kind, value)
    if kind in (dict, OrderedDict):
        return (kind, *((k, freeze(v)) for k, v in value.items()))
    if kind in CONTAINERS:
        return (kind, *(freeze(v) for v in value))
    return (Tensor,) if isinstance(value, Tensor) else Same(value)


def is_fixed(value: Any) -> bool:
    """True for a tuple whose content cannot change unseen."""
    return type(value) is tuple and all(type(v) in _SIMPLE for v in value)


class Value(fx.Proxy):
    """A tensor that is not there yet."""

    tracer: Any

    def __getattr__(self, name: str) -> ValueAttribute:
        return ValueAttribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node", "root", "attr", "_node"):
            self.tracer.refuse(f"its forward sets the attribute {name!r} of a tensor")
        object.__setattr__(self, name, value)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # isinstance() asks here. torch's own questions are about the symbol; a model's are about
        # what it stands for, and an answer to those could be wrong for what comes in later.
        if not sys._getframe(1).f_code.co_filename.startswith(_TRUSTED):
            self.tracer.refuse("its forward asks for the type of a value")
        return type(self)


class ValueAttribute(Value, Attribute):
    """An attribute of a Value, or the method that is about to be called."""


def _needs_value(name: str) -> Callable[..., Any]:
    def method(self: Value, *args: Any) -> Any:
        self.tracer.refuse("its forward depends on the values or the shape of a tensor")

    return method


for _name in ("bool", "len", "int", "float", "complex", "index", "contains"):
    setattr(Value, f"__{_name}__", _needs_value(_name))


def _in_place(name: str) -> Callable[[Value, Any], Any]:
    def method(self: Value, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    return method


# fx would record ``a += b`` as ``a = a + b``, which is not the same for whoever else holds ``a``.
for _name in IN_PLACE:
    setattr(Value, f"__{_name}__", _in_place(_name))


class Children(dict[str, Any]):
    """The ``_modules`` of a stand-in: reading them means the forward may depend on them."""

    note: Callable[[], None]

    def __getitem__(self, name: str) -> Any:
        self.note()
        return super().__getitem__(name)

    def __contains__(self, name: object) -> bool:
        self.note()
        return super().__contains__(name)

    def __iter__(self) -> Iterator[str]:
        self.note()
        return super().__iter__()

    def __len__(self) -> int:
        self.note()
        return super().__len__()

    def values(self) -> Any:
        self.note()
        return super().values()

    def items(self) -> Any:
        self.note()
        return super().items()


class Tensors(dict[str, Any]):
    """The ``_parameters`` or ``_buffers`` of a stand-in: symbolic values, made when asked for."""

    note: Callable[[str, bool], Any]

    def __getitem__(self, name: str) -> Any:
        return self.note(name, super().__getitem__(name) is None)


class _StandIn:
    """Mixin put before a module's class to make its stand-in."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keep the hooks that classes put on being subclassed (registries) out of this."""

    def __getattribute__(self, name: str) -> Any:
        if name in INTERNAL or name.startswith("__"):
            return super().__getattribute__(name)
        own = object.__getattribute__(self, "__dict__")
        if name in OWN:
            return own[name]
        tracer: Tracer = own["_tracer"]
        tracer.note_read(own["_original"], own["_path"], name)
        value = super().__getattribute__(name)
        if name in own and isinstance(value, Tensor):
            return tracer.tensor(own["_path"], name)
        return value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own = object.__getattribute__(self, "__dict__")
        return own["_tracer"].call(self, args, kwargs)


_STAND_INS: WeakValueDictionary[type, type] = WeakValueDictionary()


def stand_in_class(cls: type) -> type:
    made = _STAND_INS.get(cls)
    if made is None:
        made = _STAND_INS[cls] = type(cls)(cls.__name__, (_StandIn, cls), {})
    return made
