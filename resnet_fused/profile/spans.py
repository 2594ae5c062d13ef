# SPDX-License-Identifier: BSD-3-Clause
"""Copies of a model that say which module, and which fused call, is running.

A hook on a module that a fused call replaces would unfuse that call. So hooks go only onto the
others, and fused calls are heard of through a stand-in for `resnet_fused.ops` in the copy's code.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from resnet_fused import modules, ops
from resnet_fused.fusion import steps
from resnet_fused.fusion.plan import current_plan
from resnet_fused.fusion.units import child, is_native, is_planned
from resnet_fused.modules import Site
from resnet_fused.watched import is_step, rebound, remade, watched_class


@dataclass(frozen=True)
class Call:
    """One fused call of a forward.

    Args:
        name: of the block or layer that it computes.
        op: the op.
        modules: names of the modules that it replaces.
        convs: those of them that are convolutions.
        owner: name of the module whose forward makes it.
    """

    name: str
    op: str
    modules: tuple[str, ...]
    convs: tuple[str, ...]
    owner: str


_Named = tuple[str, Site, tuple[str, ...]]  # name of the owner, call, names of its modules


class Listener(Protocol):
    """Hears of modules and fused calls as they begin and end."""

    def enter(self, name: str, leaf: bool) -> None:
        """The module `name` begins; a leaf has no children."""

    def enter_call(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A fused call begins."""

    def leave(self) -> None:
        """What was entered last has ended."""


def sharing(model: nn.Module) -> nn.Module:
    """A copy of `model` with the same parameters and buffers."""
    modes = {name: m.training for name, m in model.named_modules()}
    tensors = (*model.parameters(), *model.buffers())
    twin = copy.deepcopy(model, {id(t): t for t in tensors})
    for name, m in twin.named_modules():  # which torch.fx.GraphModule's copies forget
        m.training = modes.get(name, m.training)
    return twin


def join(owner: str, name: str) -> str:
    """The dotted name of what is `name` to `owner`."""
    return f"{owner}.{name}" if owner and name else owner or name


def live_sites(model: nn.Module) -> Iterator[tuple[str, nn.Module, Site]]:
    """The fused calls that a forward makes now: name and module of the owner, and the call."""
    for name, module in model.named_modules():
        if is_native(module):
            native: Any = module
            for site in native.fused_sites():
                if modules.why_plain(module, site) is None:
                    yield name, module, site
        elif is_planned(module):
            plan = current_plan(module)
            if plan.run is not None and plan.why_plain(module) is None:
                for site in plan.sites:
                    yield name, module, site


class _Ops:
    """Stands for the module `resnet_fused.ops` in the copy's code; tells of every call."""

    def __init__(self, spans: Spans) -> None:
        self._spans = spans

    def __getattr__(self, op: str) -> Any:
        function = getattr(ops, op)
        if op == "ConvBN":
            return function

        def call(*args: Any, **kwargs: Any) -> Any:
            self._spans.listener.enter_call(self._spans.call(op, args), args, kwargs)
            try:
                return function(*args, **kwargs)
            finally:
                self._spans.listener.leave()

        return call


class Spans:
    """Makes `model`, a copy that nobody else uses, tell `listener` what it runs.

    Args:
        model: changed in place.
        listener: told in the order of the forward.
    """

    def __init__(self, model: nn.Module, listener: Listener) -> None:
        self.model, self.listener = model, listener
        self._owners: list[str] = []  # modules that are running, innermost last
        self._names = {id(m): name for name, m in model.named_modules()}
        self._weights = {
            id(t): name for name, m in model.named_modules() for t in m._parameters.values()
        }
        self._sites: list[_Named] = [
            (name, site, self._replaced(owner, site)) for name, owner, site in live_sites(model)
        ]
        self._given: Counter[str] = Counter()
        self._unused = list(self._sites)
        self._handles: list[Any] = []
        self._instrument()

    def _replaced(self, owner: nn.Module, site: Site) -> tuple[str, ...]:
        """Names of a call's modules, but for the containers around them."""
        found = [child(owner, path) for path in site.modules]
        return tuple(self._names[id(m)] for m in found if not isinstance(m, nn.Sequential))

    def remove_hooks(self) -> None:
        """Take the hooks off again, but not the stand-ins for fused calls."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _instrument(self) -> None:
        silent = {
            id(child(owner, path))
            for _, owner, site in live_sites(self.model)
            for path in site.modules
        }
        stand_in = _Ops(self)
        space = rebound(vars(steps), stand_in)
        for module in list(self.model.modules()):
            if is_planned(module):
                plan = current_plan(module)
                if plan.run is None or plan.why_plain(module) is not None:
                    continue
                silent.update(id(child(module, path)) for path in plan.inlined)
                code: Any = plan.run
                own = {
                    k: space[v.__name__] if is_step(v) else v for k, v in code.__globals__.items()
                }
                module.__dict__["_fuse_plan"] = replace(plan, run=remade(code, own))
            elif is_native(module):
                module.__class__ = watched_class(type(module), stand_in)
        for name, module in self.model.named_modules():
            if id(module) not in silent and not isinstance(module, torch.jit.ScriptModule):
                self._hook(name, module)

    def _hook(self, name: str, module: nn.Module) -> None:
        leaf = not module._modules

        def before(module: nn.Module, args: Any) -> None:
            if not self._owners:  # a forward begins
                self._given.clear()
                self._unused = list(self._sites)
            self._owners.append(name)
            self.listener.enter(name, leaf)

        def after(module: nn.Module, args: Any, y: Any) -> None:
            self._owners.pop()
            self.listener.leave()

        self._handles.append(module.register_forward_pre_hook(before))
        self._handles.append(module.register_forward_hook(after))

    def call(self, op: str, args: tuple[Any, ...]) -> Call:
        """What a fused call with these arguments stands for."""
        owner = self._owners[-1] if self._owners else ""
        weights = [a.weight for a in args if isinstance(a, ops.ConvBN)]
        weights += [a for a in args[1:2] if op == "pool_linear" and isinstance(a, Tensor)]
        mine = tuple(self._weights[id(w)] for w in weights if id(w) in self._weights)
        fits = [s for s in self._unused or self._sites if _fits(s, owner, op, mine)]
        replaced = fits[0][2] if fits else mine
        if fits and fits[0] in self._unused:
            self._unused.remove(fits[0])
        convs = () if op == "pool_linear" else mine
        return Call(self._unique(_title(op, owner, mine)), op, replaced, convs, owner)

    def _unique(self, name: str) -> str:
        self._given[name] += 1
        return name if self._given[name] == 1 else f"{name} ({self._given[name]})"


def _fits(site: _Named, owner: str, op: str, layers: tuple[str, ...]) -> bool:
    """Whether a call of `op` on these layers, made by `owner`, is the one of `site`."""
    where, found, names = site
    return where == owner and found.pattern == op and set(layers) <= set(names)


def _title(op: str, owner: str, layers: tuple[str, ...]) -> str:
    """A call's name: that of the block or of the layer with weights, else of the op."""
    if op in ("basic_block", "bottleneck") and layers:
        parts = [name.split(".")[:-1] for name in layers]
        shared = []
        for column in zip(*parts, strict=False):
            if len(set(column)) > 1:
                break
            shared.append(column[0])
        return ".".join(shared) or "-".join((layers[0], layers[-1]))
    if op == "conv_bn_act" and layers:
        return layers[0]
    return join(owner, {"pool_linear": "head"}.get(op, op))
