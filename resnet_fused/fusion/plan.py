# SPDX-License-Identifier: BSD-3-Clause
"""The plan of a module: its forward with fused calls, and what must hold for it to run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from operator import getitem
from threading import RLock
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from resnet_fused.fusion.layouts import Layouts
from resnet_fused.fusion.matching import Found, Matcher, Own, Pair, Param
from resnet_fused.fusion.standins import CONTAINERS, MISSING, Refused, freeze, is_fixed
from resnet_fused.fusion.tracing import Trace, kinds, read
from resnet_fused.fusion.units import (
    child,
    inlinable,
    is_native,
    is_planned,
    is_unit,
    original,
)
from resnet_fused.modules import Site, conv_bn, why_plain
from resnet_fused.ops import ConvBN
from resnet_fused.ready import READS, Unchanged, keep

_MAX_CHANGES = 16
_making = RLock()


PlanOf = Callable[[nn.Module], "Plan"]


class Watch(NamedTuple):
    """What a plan depends on in one submodule.

    Args:
        path: the submodule.
        children: names and classes of its children; None if they do not matter.
        reads: attributes by name, as they were and as ``freeze`` pictures them.
        absent: parameters and buffers by kind and name, and whether they are None.
    """

    path: tuple[str, ...]
    children: tuple[tuple[str, type], ...] | None
    reads: tuple[tuple[str, Any, Any], ...] = ()
    absent: tuple[tuple[str, str, bool], ...] = ()


@dataclass(frozen=True, eq=False)
class Plan:
    """How one module runs.

    Args:
        sites: the fused calls, in order.
        run: the forward with fused calls, ``run(module, convs, *tensors)``; None if nothing is to
            gain. Without sites it spares fused modules below the conversion of memory formats.
        pairs: the modules of its ``convs``.
        inputs: number of tensors it takes.
        watched: per submodule, what the plan was made from.
        inlined: submodules that ``run`` does not call though eager does.
        eval_only: modules whose training flag must be off.
        refused: convolutions that stay plain, with the reason.
        error: why the forward could not be read at all.
        clean: the forward neither writes to its inputs nor returns memory of theirs.
        takes_bytes: the first input goes to a stem, which reads bytes, and nowhere else.
        any_layout: the forward does the same whatever the memory format of its input.
        forward: the class's forward that was read.
        changes: how often a plan was made for this module because something had changed.
    """

    sites: tuple[Site, ...] = ()
    run: Callable[..., Any] | None = None
    pairs: tuple[Pair, ...] = ()
    inputs: int = 0
    watched: tuple[Watch, ...] = ()
    inlined: tuple[str, ...] = ()
    eval_only: tuple[str, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    clean: bool = False
    takes_bytes: bool = False
    any_layout: bool = False
    forward: Any = None
    changes: int = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        return self  # a copy differs from the plan no more than the original does

    def __reduce__(self) -> tuple[Any, ...]:
        return (forgotten, ())  # generated code is not pickled, it is made again at the next call

    def changed(self, owner: nn.Module) -> str | None:
        """What differs from the module that the plan was made for; None if nothing does."""
        if not self.is_of(owner):
            return "the forward of its class was replaced"
        # This runs at every call, so it is written for speed.
        for path, children, reads, absent in self.watched:
            module: Any = owner
            for part in path:
                module = module._modules.get(part)
                if module is None:
                    return f"'{'.'.join(path)}' is gone"
            if children is not None:
                now = module._modules
                if len(now) != len(children):
                    return f"children of '{'.'.join(path)}' were added or removed"
                for name, cls in children:
                    found = type(now.get(name, MISSING))
                    if found is not cls and getattr(found, "fused_from", None) is not cls:
                        return f"'{'.'.join((*path, name))}' was replaced"
            attributes = module.__dict__
            for name, value, frozen in reads:
                current = attributes.get(name, MISSING)
                if current is not value and freeze(current) != frozen:
                    return f"the attribute {name!r} of '{'.'.join(path)}' was changed"
            for kind, name, none in absent:
                if (attributes[kind].get(name) is None) is not none:
                    return f"'{'.'.join((*path, name))}' was set or removed"
        return None

    def why_plain(self, owner: nn.Module) -> str | None:
        """Why the fused calls may not be made now; None if they may and nothing ``changed``."""
        if self.run is None:
            return self.error or "nothing to fuse"
        if not self.sites and owner.training:
            return "training mode"
        for path in self.eval_only:
            if child(owner, path).training:
                return f"'{path}' is in training mode" if path else "training mode"
        for path in self.inlined:
            module: Any = child(owner, path)
            if (
                module._forward_hooks
                or module._forward_pre_hooks
                or module._backward_hooks
                or module._backward_pre_hooks
            ):
                return f"a hook on '{path}'"
        for site in self.sites:
            reason = why_plain(owner, site)
            if reason is not None:
                return reason
        return None

    def is_of(self, owner: nn.Module) -> bool:
        """True if the class of ``owner`` still has the forward that was read."""
        return self.forward is None or original(owner).forward is self.forward

    def convs(self, owner: nn.Module) -> list[ConvBN]:
        """What ``run`` wants beside the tensors, read off the modules."""
        return [conv_bn(child(owner, p.conv), child(owner, p.bn)) for p in self.pairs]

    def look(self, owner: nn.Module) -> tuple[Plan, list[ConvBN]] | None:
        """What ``ready`` remembers, if nothing ``changed`` and there is no reason ``why_plain``."""
        if self.changed(owner) is not None or self.why_plain(owner) is not None:
            return None
        return self, self.convs(owner)

    def keep(self, owner: nn.Module) -> None:
        """Spare the next call to ``look``: see ``ready``."""
        reads: dict[str, dict[str, None]] = {path: {} for path in self.inlined}
        holders, absent = {""}, []
        for path in self.eval_only:
            reads.setdefault(path, {})["training"] = None
        for parts, children, attributes, tensors in self.watched:
            path = ".".join(parts)
            if tensors:
                reads.setdefault(path, {})
            if children is not None:
                holders.add(path)
            for name, value, frozen in attributes:
                if value is MISSING:
                    absent.append((child(owner, path), name))
                elif value is frozen and not is_fixed(child(owner, path).__dict__[name]):
                    return
                else:
                    reads.setdefault(path, {})[name] = None
        silent = dict.fromkeys(self.inlined)
        for site in self.sites:
            for path in site.modules:
                names = READS.get(type(child(owner, path)))
                if names is None:
                    return
                reads.setdefault(path, {}).update(dict.fromkeys(names))
                silent[path] = None
        for path in reads:
            while path:  # the way there
                path = path.rpartition(".")[0]
                holders.add(path)
        unchanged = Unchanged(
            owner,
            [child(owner, path) for path in holders],
            [(child(owner, path), tuple(names)) for path, names in reads.items()],
            [child(owner, path) for path in silent],
            absent,
        )
        keep(owner, "plan", self.sites, unchanged, lambda: self.look(owner))

    def takes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """True for a call like the one that was traced: the required tensors and nothing else."""
        return (
            self.run is not None
            and not kwargs
            and len(args) == self.inputs
            and all(isinstance(a, Tensor) and a.layout is torch.strided for a in args)
        )


def forgotten() -> Plan:
    """The plan of an unpickled module: out of date, so that the next call makes a new one."""
    return Plan(watched=(Watch((), ((MISSING, type(None)),)),))


def make_plan(module: nn.Module, before: Plan | None = None, plan_of: PlanOf | None = None) -> Plan:
    """Read the forward of ``module`` and put fused calls into it.

    Args:
        before: the plan that this one replaces.
        plan_of: gives the plans of modules further down.
    """
    changes = 0 if before is None else before.changes + 1
    if changes > _MAX_CHANGES:
        return Plan(error="its attributes or children keep changing", changes=changes)
    if "forward" in module.__dict__:
        return Plan(error="its forward is replaced on the instance", changes=changes)
    trace = _read(module)
    if isinstance(trace, str):
        return Plan(error=trace, watched=_watch_kinds(module), changes=changes)
    plan_of = plan_of or plan_now

    def is_clean(below: nn.Module) -> bool:
        return is_native(below) or (is_unit(below) and plan_of(below).clean)

    matcher = Matcher(trace, is_clean)
    for path in trace.inlined:
        trace.reads[path, "forward"] = MISSING
    plan = Plan(
        inputs=trace.inputs,
        watched=_watched(module, trace),
        inlined=tuple(trace.inlined),
        eval_only=tuple({**dict.fromkeys(trace.inlined), **trace.eval_only}),
        refused=matcher.refused,
        clean=matcher.effects.clean(),
        forward=original(module).forward,
        changes=changes,
    )
    layouts = Layouts(trace, matcher.effects, matcher.plain(), plan_of)
    carry = not any(f.site.convs for f in matcher.found) and layouts.carries()
    if not matcher.found and not carry:
        return replace(plan, any_layout=layouts.any())
    error = layouts.prepare(carry)
    if error:
        return replace(plan, error=error)
    sites = tuple(f.site for f in matcher.found)
    for site in sites:
        _ = site.paths  # worked out once, before torch.compile comes across it
    takes_bytes = _feeds_a_stem(trace.graph, matcher.found)
    run, pairs = _compile(trace.graph, matcher.found, original(module).__name__)
    return replace(
        plan, sites=sites, run=run, pairs=pairs, takes_bytes=takes_bytes, any_layout=True
    )


def survey(model: nn.Module) -> Iterator[tuple[str, nn.Module, Plan]]:
    """The plan of every unit of ``model`` that is not part of another's, outermost first."""
    plans: dict[int, Plan] = {}
    inlined: set[int] = set()

    def plan_of(module: nn.Module) -> Plan:
        if id(module) not in plans:
            plans[id(module)] = (
                current_plan(module) if is_planned(module) else make_plan(module, plan_of=plan_of)
            )
        return plans[id(module)]

    for name, module in model.named_modules():
        if is_native(module):
            native: Any = module
            paths = {path for site in native.fused_sites() for path in site.modules}
            inlined.update(id(child(module, path)) for path in paths)
        elif is_unit(module) and id(module) not in inlined:
            plan = plan_of(module)
            inlined.update(id(child(module, path)) for path in plan.inlined if plan.run is not None)
            yield name, module, plan


def current_plan(module: Any) -> Plan:
    """The plan of a fused module, made again if the module is no longer what it was made for."""
    plan: Plan = module._fuse_plan
    if plan.changed(module) is None:
        return plan
    if torch.compiler.is_compiling():
        return Plan(error="the module was changed after fuse()")
    with _making:
        plan = module._fuse_plan
        if plan.changed(module) is not None:
            plan = module._fuse_plan = make_plan(module, plan)
        return plan


def plan_now(module: nn.Module) -> Plan:
    """The plan that a module has or could have."""
    return current_plan(module) if is_planned(module) else make_plan(module)


def _read(module: nn.Module) -> Trace | str:
    # A forward may draw random numbers, and reading it runs that code.
    with torch.random.fork_rng(devices=[]):
        try:
            return read(module, inlinable)
        except Refused:
            pass  # perhaps only a helper could not be read
        try:
            return read(module, lambda m: inlinable(m, helpers=False))
        except Refused as refused:
            return str(refused)


def _watch_kinds(module: nn.Module) -> tuple[Watch, ...]:
    """For a forward that could not be read: try again when a child or attribute has changed."""
    reads = tuple(
        (name, value, freeze(value))
        for name, value in module.__dict__.items()
        if type(value) in (bool, int, str) and name != "training"
    )
    return (Watch((), kinds(module), reads),)


def _watched(module: nn.Module, trace: Trace) -> tuple[Watch, ...]:
    def entry(attributes: dict[str, Any], name: str, frozen: Any) -> tuple[str, Any, Any]:
        # A value that compares by identity at once; what is inside a container may change unseen.
        value = attributes.get(name, MISSING)
        by_content = isinstance(value, (Tensor, *CONTAINERS))
        return (name, frozen if by_content else value, frozen)

    result = []
    keys = (*trace.reads, *trace.absent)
    for path in dict.fromkeys([*trace.children, *(key[0] for key in keys)]):
        attributes = child(module, path).__dict__
        reads = tuple(
            entry(attributes, name, frozen)
            for (where, name), frozen in trace.reads.items()
            if where == path
        )
        absent = tuple((*key[1:], none) for key, none in trace.absent.items() if key[0] == path)
        parts = tuple(path.split(".")) if path else ()
        result.append(Watch(parts, trace.children.get(path), reads, absent))
    return tuple(result)


def _feeds_a_stem(graph: fx.Graph, found: list[Found]) -> bool:
    """True if the first input is read by a stem, and otherwise only asked for its size."""
    x = next(n for n in graph.nodes if n.op == "placeholder")

    def asks(node: fx.Node) -> bool:
        shape = node.target is getattr and node.args[1:] == ("shape",)
        return shape or (node.op == "call_method" and node.target in ("size", "dim"))

    readers = {n for n in x.users if not asks(n)}
    return any(f.pattern == "stem" and f.args[0] is x and readers <= {*f.nodes} for f in found)


def _compile(
    graph: fx.Graph, found: list[Found], name: str
) -> tuple[Callable[..., Any], tuple[Pair, ...]]:
    """Put the fused calls into ``graph`` and make a function of it; and what it reads."""
    replaced: dict[fx.Node, fx.Node] = {}
    pairs: list[Pair] = []
    with graph.inserting_before(next(iter(graph.nodes))):
        convs = graph.placeholder("convs")

    def argument(value: Any) -> Any:
        if isinstance(value, Pair):
            pairs.append(value)
            return graph.call_function(getitem, (convs, len(pairs) - 1))
        if isinstance(value, Param):
            return graph.get_attr(value.path)
        if isinstance(value, Own):
            return graph.call_method("get", (graph.get_attr("__dict__"), value.name))
        return replaced.get(value, value) if isinstance(value, fx.Node) else value

    for call in found:
        end = call.nodes[-1]
        with graph.inserting_before(end):
            new = graph.call_function(call.step, tuple(argument(a) for a in call.args))
        end.replace_all_uses_with(new)
        replaced[end] = new
        for node in reversed(call.nodes):
            graph.erase_node(node)
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, f"<fused forward of {name}>", "exec"), namespace)
    run: Callable[..., Any] = namespace["forward"]
    return run, tuple(pairs)
