# SPDX-License-Identifier: BSD-3-Clause
"""Reads one module's forward into a graph without touching the module.

The forward runs on symbolic values and on stand-ins for the module and its children. Nothing global
is patched, so other threads may use the model meanwhile.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Scope, TracerBase

from resnet_fused.fusion import steps
from resnet_fused.fusion.standins import (
    CONTAINERS,
    INTERNAL,
    MISSING,
    OWN,
    Children,
    Refused,
    Tensors,
    Value,
    freeze,
    stand_in_class,
)
from resnet_fused.fusion.units import original
from resnet_fused.modules import ends_in_activation


@dataclass
class Trace:
    """What a forward does, and everything about the module that decided it.

    Args:
        graph: the operations; submodules are named relative to the module.
        modules: the original of every submodule called in ``graph``.
        inputs: number of tensors the forward takes.
        children: names and classes of the children of every submodule looked into.
        reads: attributes read, by submodule path and name.
        absent: parameters and buffers read, by path, kind and name, and whether they are None.
        inlined: submodules whose own forward was read into the graph.
        eval_only: paths of modules whose training flag was read, as if it were off.
    """

    graph: fx.Graph
    modules: dict[str, nn.Module] = field(default_factory=dict)
    inputs: int = 0
    children: dict[str, tuple[tuple[str, type], ...]] = field(default_factory=dict)
    reads: dict[tuple[str, str], Any] = field(default_factory=dict)
    absent: dict[tuple[str, str, str], bool] = field(default_factory=dict)
    inlined: dict[str, nn.Module] = field(default_factory=dict)
    eval_only: dict[str, None] = field(default_factory=dict)

    def key(self) -> tuple[Any, ...]:
        """Two traces of a forward that depends only on the module have equal keys."""
        return (self.graph.python_code("self").src, self.inputs, self.children, self.reads)


def _state() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(d) for d in ("cpu", "cuda")),
    )


class Tracer(TracerBase):
    """Runs one forward on stand-ins.

    Args:
        root: the module.
        inline: True for a submodule whose forward is to be read as part of the root's.
    """

    def __init__(self, root: nn.Module, inline: Callable[[nn.Module], bool]) -> None:
        self.graph = fx.Graph()
        self.scope = Scope("", None)
        self.module_stack = OrderedDict()
        self.node_name_to_scope = {}
        self.root, self.inline = root, inline
        self.trace = Trace(self.graph)
        self.state = _state()
        self.made: dict[int, Any] = {}
        self.refusal: Refused | None = None

    def run(self) -> Trace:
        """Read the forward.

        Raises:
            Refused: it depends on values, changes state, or does what a graph cannot hold.
        """
        try:
            stand_in = self.stand_in(self.root, "")
            for it in self.made.values():
                own = object.__getattribute__(it, "__dict__")
                own.update(self._containers(own["_before"]))
                own["_before"] = {k: freeze(own[k]) for k in own.keys() - INTERNAL - set(OWN)}
            forward = type(stand_in).forward
            names = self._inputs(forward)
            values = [self.create_proxy("placeholder", name, (), {}) for name in names]
            self.trace.inputs = len(values)
            result = forward(stand_in, *values)
            self.create_node("output", "output", (self.create_arg(result),), {})
        except Refused:
            raise
        except Exception as error:  # the user's code, on values it was not written for
            raise Refused(f"its forward cannot be traced: {_first_line(error)}") from error
        if self.refusal is not None:  # the forward caught it
            raise self.refusal
        self._check_unchanged()
        return self.trace

    def refuse(self, reason: str) -> NoReturn:
        """Stop; also if the forward catches the exception."""
        self.refusal = Refused(reason)
        raise self.refusal

    def _inputs(self, forward: Any) -> list[str]:
        """Names of the required parameters; the others keep their defaults."""
        parameters = list(inspect.signature(forward).parameters.values())[1:]
        needed = [
            p
            for p in parameters
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        if not needed or any(p.kind is p.KEYWORD_ONLY for p in needed):
            raise Refused("its forward takes no plain positional argument")
        return [p.name for p in needed]

    def stand_in(self, module: nn.Module, path: str) -> Any:
        """A stand-in of ``module`` and of all below it."""
        if id(module) in self.made:
            return self.made[id(module)]
        opaque = isinstance(module, torch.jit.ScriptModule)
        it: Any = object.__new__(stand_in_class(nn.Module if opaque else original(module)))
        self.made[id(module)] = it
        own = object.__getattribute__(it, "__dict__")
        own.update(nn.Module().__dict__ if opaque else module.__dict__)
        own.update(_tracer=self, _path=path, _original=module, training=False)
        own["_before"] = dict(own)
        prefix = path + "." if path else ""
        children = own["_modules"] = Children(
            (name, None if child is None else self.stand_in(child, prefix + name))
            for name, child in ({} if opaque else module._modules).items()
        )
        children.note = lambda: self._note_children(module, path)
        for kind in ("_parameters", "_buffers"):
            tensors = own[kind] = Tensors(own[kind])
            tensors.note = partial(self._note_tensor, path, kind)
        return it

    def _containers(self, attributes: dict[str, Any]) -> dict[str, Any]:
        """Copies of the list-like attributes, with stand-ins for the modules in them."""

        def copy(value: Any) -> Any:
            if type(value) in (dict, OrderedDict):
                return type(value)((k, copy(v)) for k, v in value.items())
            if type(value) in CONTAINERS:
                return type(value)(copy(v) for v in value)
            return self.made.get(id(value), value) if isinstance(value, nn.Module) else value

        return {
            name: copy(value)
            for name, value in attributes.items()
            if name not in INTERNAL and name not in OWN and type(value) in CONTAINERS
        }

    def note_read(self, module: nn.Module, path: str, name: str) -> None:
        """Remember what an attribute was; children and tensors are looked up at every call."""
        if any(name in module.__dict__[kind] for kind in ("_modules", "_parameters", "_buffers")):
            return
        if name == "training":
            self.trace.eval_only[path] = None
            return
        value = freeze(module.__dict__[name]) if name in module.__dict__ else MISSING
        self.trace.reads[path, name] = value

    def _note_children(self, module: nn.Module, path: str) -> None:
        if path not in self.trace.children:
            self.trace.children[path] = kinds(module)

    def _note_tensor(self, path: str, kind: str, name: str, absent: bool) -> Any:
        self.trace.absent[path, kind, name] = absent
        return None if absent else self.tensor(path, name)

    def tensor(self, path: str, name: str) -> Any:
        """The symbolic value of a parameter, buffer or tensor attribute."""
        return self.create_proxy("get_attr", f"{path}.{name}" if path else name, (), {})

    def call(self, stand_in: Any, args: Any, kwargs: Any) -> Any:
        """Called in place of ``nn.Module.__call__``."""
        module, path = stand_in._original, stand_in._path
        if module is self.root:
            self.refuse("its forward calls itself")
        if self.inline(module):
            self.trace.inlined[path] = module
            return type(stand_in).forward(stand_in, *args, **kwargs)
        self.trace.modules[path] = module
        if ends_in_activation(module) and "forward" not in module.__dict__ and not kwargs:
            self.trace.inlined[path] = module
            bn = self.create_proxy("get_attr", path, (), {})
            normalised = self.create_proxy("call_function", steps.norm_alone, (*args, bn), {})
            return stand_in.act(stand_in.drop(normalised))
        return self.create_proxy("call_module", path, args, kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Value(node, self)

    def iter(self, obj: Any) -> Any:
        self.refuse("its forward loops over a tensor or its shape")

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _state() != self.state:
            self.refuse("its forward changes the gradient, inference or autocast mode")
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Value):
            return a.node
        if isinstance(a, Tensor):
            self.refuse("its forward uses a tensor that is no attribute of the module")
        if isinstance(a, nn.Module):
            self.refuse("its forward passes a module on")
        if type(a) is OrderedDict:
            pairs = self.create_arg([(k, v) for k, v in a.items()])
            return self.create_node("call_function", OrderedDict, (pairs,), {})
        if isinstance(a, dict) and type(a) is not dict:
            self.refuse(f"its forward makes a {type(a).__name__}")
        return super().create_arg(a)

    def _check_unchanged(self) -> None:
        for stand_in in self.made.values():
            own = object.__getattribute__(stand_in, "__dict__")
            before = own["_before"]
            for name in (own.keys() | before.keys()) - INTERNAL - set(OWN):
                if name not in own or name not in before or freeze(own[name]) != before[name]:
                    raise Refused(f"its forward sets the attribute {name!r}")
            for kind in ("_parameters", "_buffers", "_modules"):
                if own[kind].keys() != own["_original"].__dict__.get(kind, own[kind]).keys():
                    raise Refused("its forward adds or removes parameters, buffers or modules")


def kinds(module: nn.Module) -> tuple[tuple[str, type], ...]:
    """Names and classes of a module's children."""
    return tuple(
        (name, type(None) if child is None else original(child))
        for name, child in module._modules.items()
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def read(module: nn.Module, inline: Callable[[nn.Module], bool]) -> Trace:
    """Trace ``module`` in eval mode; see ``Tracer``.

    Raises:
        Refused: the forward cannot be read, or gives different graphs under different global modes.
    """
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        trace = Tracer(module, inline).run()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        again = Tracer(module, inline).run()
    if trace.key() != again.key():
        raise Refused("its forward differs from call to call or between gradient or autocast modes")
    return trace
