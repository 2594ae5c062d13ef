# SPDX-License-Identifier: BSD-3-Clause
"""Memory formats: the ops write channels_last, and no other code may come to grief over it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from resnet_fused.fusion import steps
from resnet_fused.fusion.effects import Effects
from resnet_fused.fusion.tracing import Trace
from resnet_fused.fusion.units import is_leaf, is_planned, is_sequential, is_unit
from resnet_fused.modules import Fused

# Code that asks for these would notice the format; ``view`` can be replaced by ``reshape``.
_ASKS = ("stride", "is_contiguous", "as_strided", "storage", "untyped_storage", "data_ptr", "numpy")


class Layouts:
    """What the plain part of a forward makes of memory formats.

    Args:
        plain: the operations that no fused call replaces.
        plan_of: gives the plan of a module further down.
    """

    def __init__(
        self, trace: Trace, effects: Effects, plain: list[fx.Node], plan_of: Callable[..., Any]
    ) -> None:
        self.trace, self.effects, self.plain, self.plan_of = trace, effects, plain, plan_of
        self.inputs = [n for n in trace.graph.nodes if n.op == "placeholder"]

    def any(self) -> bool:
        """True if the forward does the same for every memory format."""
        return all(
            self._any_layout(self._module(node))
            if node.op == "call_module"
            else node.op != "call_method" or node.target not in ("view", *_ASKS)
            for node in self.plain
        )

    def carries(self) -> bool:
        """True if the forward hands images from one fused module to another.

        Each would restore the format of its input; a forward that converts its own input once
        spares them that.
        """
        calls = [self._module(n) for n in self.plain if n.op == "call_module"]
        return sum(self._is_planned(m) for m in calls) > 1 and self.effects.clean()

    def _module(self, node: fx.Node) -> nn.Module:
        return self.trace.modules[str(node.target)]

    def _is_planned(self, module: nn.Module) -> bool:
        return is_planned(module) or (is_unit(module) and self.plan_of(module).run is not None)

    def _any_layout(self, module: nn.Module) -> bool:
        if is_leaf(module) or isinstance(module, Fused):
            return True
        if is_sequential(module):
            return all(self._any_layout(m) for m in module.children())
        return is_unit(module) and bool(self.plan_of(module).any_layout)

    def prepare(self, carry: bool) -> str | None:
        """Make the plain part independent of memory formats; returns why that cannot be done.

        Args:
            carry: convert the inputs to channels_last first.
        """
        restored: list[tuple[fx.Node, list[fx.Node]]] = []
        for node in self.plain:
            if node.op == "call_method" and node.target in _ASKS:
                return f"its forward asks for the memory layout ({node.target})"
            if node.op == "call_method" and node.target == "view":
                if self._written_later(node):
                    return "its forward changes a view in place"
                if not any(isinstance(a, torch.dtype) for a in (*node.args, *node.kwargs.values())):
                    node.target = "reshape"
            if node.op == "call_module" and not self._any_layout(self._module(node)):
                given = [] if carry else self.inputs  # these are in eager's format
                values = [a for a in node.args if isinstance(a, fx.Node) and a not in given]
                # What may write to its input, or return it, must not be given a copy that shows.
                clean = not self.effects.written[node]
                if not clean and not all(self.effects.unseen(node, a) for a in values):
                    name = type(self._module(node)).__name__
                    return f"{name}, which it calls, may change its input or depend on its layout"
                restored.append((node, values))
        for node, values in restored:
            self._restore(node, values)
        if carry:
            self._convert_inputs()
        return None

    def _written_later(self, view: fx.Node) -> bool:
        effects = self.effects
        return any(
            written & effects.roots[view] and effects.position[n] > effects.position[view]
            for n, written in effects.written.items()
        )

    def _restore(self, node: fx.Node, values: list[fx.Node]) -> None:
        """Give the module that ``node`` calls its inputs in eager's format."""
        graph = self.trace.graph
        with graph.inserting_before(node):
            for value in values:
                eager = graph.call_function(steps.as_eager, (value, self.inputs[0]))
                node.args = tuple(eager if a is value else a for a in node.args)

    def _convert_inputs(self) -> None:
        graph = self.trace.graph
        with graph.inserting_after(self.inputs[-1]):
            for value in self.inputs:
                users = [n for n in value.users if n.target is not steps.as_eager]
                converted = graph.call_function(steps.to_channels_last, (value,))
                for user in users:
                    user.replace_input_with(value, converted)
                for user in value.users:  # as_eager(value, the format wanted)
                    if user.target is steps.as_eager and user.args[0] is value:
                        user.args = (converted, user.args[1])
