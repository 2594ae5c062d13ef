# SPDX-License-Identifier: BSD-3-Clause
"""Finds in a traced forward the operations that one fused call can stand for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from resnet_fused.fusion import steps
from resnet_fused.fusion.effects import Effects, IsClean, use_results
from resnet_fused.fusion.nodes import Nodes
from resnet_fused.fusion.tracing import Trace
from resnet_fused.fusion.units import is_conv
from resnet_fused.modules import Site, why_not_fusible
from resnet_fused.uint8 import NAME as NORM


@dataclass(frozen=True)
class Pair:
    """A convolution and the BatchNorm behind it, by path; an argument of a step."""

    conv: str
    bn: str


@dataclass(frozen=True)
class Param:
    """A parameter by path; an argument of a step."""

    path: str


@dataclass(frozen=True)
class Own:
    """What lies in the module's own ``__dict__`` under a name, or None; an argument of a step."""

    name: str


@dataclass
class Link:
    """A convolution, its BatchNorm, and what follows them as far as one op can compute it.

    Args:
        x: the convolution's input.
        pair: the two modules.
        nodes: the operations, in order; the last gives the result.
        relu: ends in a ReLU.
        residual: value added before the ReLU.
        add: the addition.
    """

    x: fx.Node
    pair: Pair
    nodes: list[fx.Node]
    relu: bool = False
    residual: fx.Node | None = None
    add: fx.Node | None = None

    @property
    def end(self) -> fx.Node:
        return self.nodes[-1]


@dataclass
class Found:
    """One fused call: ``step(*args)`` replaces ``nodes``, the last of which gives the result."""

    pattern: str
    nodes: list[fx.Node]
    step: Callable[..., Any]
    args: tuple[Any, ...]
    site: Site = field(init=False)


class Matcher:
    """The fused calls of one trace, and why other convolutions are refused."""

    def __init__(self, trace: Trace, is_clean: IsClean) -> None:
        self.trace = trace
        self.modules = trace.modules
        self.nodes = Nodes(trace)
        use_results(trace.graph)
        self.effects = Effects(trace.graph, trace.modules, is_clean)
        self.found: list[Found] = []
        self.refused: dict[str, str] = {}
        self.taken: set[fx.Node] = set()
        for path, module in self.modules.items():
            if "inplace" in module.__dict__:
                self.nodes.note(path, "inplace")
        self._convolutions()
        self._adds()
        self._heads()
        self.found.sort(key=lambda f: self.effects.position[f.nodes[-1]])
        for found in self.found:
            found.site = self._site(found)

    def plain(self) -> list[fx.Node]:
        """The operations that no fused call replaces."""
        return [n for n in self.trace.graph.nodes if n not in self.taken]

    # Convolutions

    def _convolutions(self) -> None:
        links: dict[fx.Node, Link] = {}
        for node in self.trace.graph.nodes:
            if node.op != "call_module" or not is_conv(self.modules[node.target]):
                continue
            link = self._link(node)
            if isinstance(link, str):
                self.refused[node.target] = link
            else:
                links[link.end] = link
        links = self._with_add(links)
        for link in sorted(links.values(), key=lambda li: -self.effects.position[li.end]):
            if link.end not in self.taken:
                self._block(link, links) or self._stem(link) or self._single(link)

    def _link(self, conv: fx.Node) -> Link | str:
        """The convolution, its BatchNorm and, if it follows, the ReLU; else why not."""
        module = self.modules[str(conv.target)]
        reason = why_not_fusible(module)
        if reason or "forward" in module.__dict__:
            return reason or "its forward is replaced"
        if self.nodes.module(conv) is None:
            return "it is not called with one tensor"
        bn, passed = self.nodes.follow(conv)
        if bn is None:
            n = len((passed or [conv])[-1].users)
            return f"its output is read {n} times" if n else "its output is not used"
        norm = self.nodes.norm(bn)
        if norm is None:
            if bn.target is F.batch_norm:
                return "BatchNorm is called as a function"
            return f"its output goes to {self.nodes.name(bn)}, not to a BatchNorm"
        path, bn_module = norm
        reason = why_not_fusible(bn_module)
        if reason or "forward" in bn_module.__dict__:
            return f"'{path}': {reason or 'its forward is replaced'}"
        link = Link(conv.args[0], Pair(str(conv.target), path), [conv, *passed, bn])  # type: ignore[arg-type]
        after, passed = self.nodes.follow(bn)
        if self.nodes.is_relu(after):
            with_relu = Link(link.x, link.pair, [*link.nodes, *passed, after], True)  # type: ignore[list-item]
            if self._may_run_at_end(with_relu):
                return with_relu
        if not self._may_run_at_end(link):
            return "its input is changed in place before the BatchNorm runs"
        return link

    def _may_run_at_end(self, link: Link) -> bool:
        own = set(link.nodes)
        ok = self.effects.may_move(link.x, link.nodes[0], link.end, own)
        if link.residual is not None and link.add is not None:
            ok = ok and self.effects.may_move(link.residual, link.add, link.end, own)
            if self.nodes.adds_in_place(link.add):
                ok = ok and self.effects.unseen(link.add, link.add.args[0])  # type: ignore[arg-type]
        return ok

    def _with_add(self, links: dict[fx.Node, Link]) -> dict[fx.Node, Link]:
        """Give every addition to one link it reads: the one that makes a block, else the first."""
        result = dict(links)
        for add in self.trace.graph.nodes:
            values = self.nodes.operands(add)
            if values is None:
                continue
            longer = [
                made
                for value, other in (values, values[::-1])
                if (made := self._extend(value, other, add, links)) is not None
            ]
            blocks = [li for li in longer if self._block_parts(li, result) is not None]
            for link in (blocks or longer)[:1]:
                bn = next(n for n in link.nodes if n in result)
                del result[bn]
                result[link.end] = link
        return result

    def _extend(
        self, value: fx.Node, other: fx.Node, add: fx.Node, links: dict[fx.Node, Link]
    ) -> Link | None:
        """The link that ends in ``value``, with the addition of ``other`` and the ReLU after it."""
        passed: list[fx.Node] = []
        while type(self.nodes.module(value)) is nn.Identity and len(value.users) == 1:
            passed.insert(0, value)
            value = value.args[0]  # type: ignore[assignment]
        link = links.get(value)
        if link is None or link.relu or len(value.users) != 1:
            return None
        nodes = [*link.nodes, *passed, add]
        relu, behind = self.nodes.follow(add)
        options = [Link(link.x, link.pair, nodes, False, other, add)]
        if self.nodes.is_relu(relu):
            options.insert(0, Link(link.x, link.pair, [*nodes, *behind, relu], True, other, add))  # type: ignore[list-item]
        return next((li for li in options if self._may_run_at_end(li)), None)

    # Calls

    def _take(self, pattern: str, nodes: list[fx.Node], step: Any, args: tuple[Any, ...]) -> bool:
        nodes = sorted(nodes, key=self.effects.position.__getitem__)
        self.taken.update(nodes)
        self.found.append(Found(pattern, nodes, step, args))
        return True

    def _single(self, link: Link) -> bool:
        if link.residual is None:
            return self._take(
                "conv_bn_act", link.nodes, steps.conv_bn_act, (link.x, link.pair, link.relu)
            )
        assert link.add is not None
        args = (
            link.x,
            link.pair,
            link.residual,
            link.relu,
            self._add_mode(link.add, link.residual),
        )
        return self._take("conv_bn_act", link.nodes, steps.conv_bn_add, args)

    def _add_mode(self, add: fx.Node, residual: fx.Node) -> str:
        if not self.nodes.adds_in_place(add):
            return "new"
        return "into residual" if add.args[0] is residual else "into result"

    def _block_parts(
        self, last: Link, links: dict[fx.Node, Link]
    ) -> tuple[list[Link], Link | None, list[fx.Node]] | None:
        """The links of the block that ends in ``last``, its projection, and what else it runs."""
        if last.residual is None or not last.relu:
            return None
        shortcut, extra = self.nodes.origin(last.residual)
        down = links.get(shortcut)
        if down is not None and (down.relu or down.residual or len(down.end.users) != 1):
            down = None
        source = shortcut
        if down is not None:
            source, before = self.nodes.origin(down.x)
            extra = [*extra, *before]
        parts = [last]
        best = None
        while len(parts) < 3:
            x, passed = self.nodes.origin(parts[0].x)
            inner = links.get(x)
            if inner is None or not inner.relu or inner.residual or len(inner.end.users) != 1:
                break
            parts, extra = [inner, *parts], [*extra, *passed]
            if inner.x is source:
                best = (parts, down, extra)
        return best

    def _block(self, last: Link, links: dict[fx.Node, Link]) -> bool:
        found = self._block_parts(last, links)
        if found is None:
            return False
        parts, down, extra = found
        nodes = [n for link in (*parts, *([down] if down else [])) for n in link.nodes] + extra
        x, own = parts[0].x, set(nodes)
        start = min(own, key=self.effects.position.__getitem__)
        if own & self.taken or not self.effects.may_move(x, start, last.end, own):
            return False
        pattern, step = (
            ("basic_block", steps.basic_block)
            if len(parts) == 2
            else ("bottleneck", steps.bottleneck)
        )
        assert last.add is not None and last.residual is not None
        mode = self._add_mode(last.add, last.residual)
        pairs = tuple(link.pair for link in parts)
        return self._take(pattern, nodes, step, (x, *pairs, down.pair if down else None, mode))

    def _stem(self, link: Link) -> bool:
        """conv, BatchNorm, ReLU and a 3x3/2 max-pool."""
        pool, passed = self.nodes.follow(link.end)
        if (
            pool is None
            or not link.relu
            or link.residual is not None
            or not self.nodes.is_stem_pool(pool)
        ):
            return False
        own = {*link.nodes, *passed, pool}
        if not self.effects.may_move(link.x, link.nodes[0], pool, own):
            return False
        args = (link.x, link.pair, Own(NORM))
        return self._take("stem", [*own], steps.stem, args)

    def _adds(self) -> None:
        """Additions followed by a ReLU that no convolution took."""
        for add in self.trace.graph.nodes:
            values = self.nodes.operands(add)
            if values is None or add in self.taken:
                continue
            relu, passed = self.nodes.follow(add)
            if not self.nodes.is_relu(relu) or (
                self.nodes.adds_in_place(add) and not self.effects.unseen(add, values[0])
            ):
                continue
            nodes: list[fx.Node] = [add, *passed, relu]  # type: ignore[list-item]
            if all(self.effects.may_move(v, add, nodes[-1], set(nodes)) for v in values):
                self._take(
                    "add_relu", nodes, steps.add_relu, (*values, self.nodes.adds_in_place(add))
                )

    # Heads

    def _heads(self) -> None:
        """A linear layer behind a global average pool."""
        for linear in self.trace.graph.nodes:
            module = self.nodes.module(linear)
            if type(module) is not nn.Linear or "forward" in module.__dict__:
                continue
            nodes: list[Any] = [linear]
            value: Any = linear.args[0]
            value, passed = self.nodes.origin(value)
            flat = self.nodes.flattened(value)
            if flat:
                nodes = [*flat, *passed, *nodes]
                value, passed = self.nodes.origin(flat[-1].args[0])  # type: ignore[arg-type]
            nodes = [*passed, *nodes]
            pooled = self.nodes.pooled(value, bool(flat))
            own = {value, *nodes}
            if pooled is None or any(set(n.users) - own for n in own - {linear}):
                continue
            if self.effects.may_move(pooled, value, linear, own):
                params = (Param(f"{linear.target}.weight"), Param(f"{linear.target}.bias"))
                self._take("pool_linear", [*own], steps.pool_linear, (pooled, *params))

    def _site(self, found: Found) -> Site:
        """The submodules of a call, with the containers read into the graph around them."""
        paths = []
        for node in found.nodes:
            norm = self.nodes.norm(node)
            if norm is not None or node.op == "call_module":
                paths.append(str(node.target) if norm is None else norm[0])
        names: list[str] = []
        for path in paths:
            for inlined, module in self.trace.inlined.items():
                if path.startswith(inlined + ".") and type(module) is nn.Sequential:
                    names.append(inlined)
            names.append(path)
            self.nodes.note(path, "forward")
        convs = [p for p in paths if is_conv(self.modules[p])]
        return Site(found.pattern, tuple(dict.fromkeys(names)), tuple(dict.fromkeys(convs)))
