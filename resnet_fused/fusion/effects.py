# SPDX-License-Identifier: BSD-3-Clause
"""Which values of a graph may share memory, and which operations change it.

Everything unknown counts as sharing and changing, so that in doubt code is left alone.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx, nn
from torch.nn.modules import activation, batchnorm, conv, pooling

from resnet_fused.fusion import steps
from resnet_fused.fusion.standins import IN_PLACE
from resnet_fused.modules import FROZEN

IsClean = Callable[[nn.Module], bool]

IN_PLACE_OPERATORS = frozenset(getattr(operator, f"__{name}__") for name in IN_PLACE)
# These give a new tensor; other torch modules and functions may hand on or look into their input.
_NEW_MODULES = (
    conv._ConvNd,
    batchnorm._NormBase,
    pooling._MaxPoolNd,
    pooling._AvgPoolNd,
    pooling._AdaptiveAvgPoolNd,
    activation.ReLU,
    activation.SiLU,
    activation.ReLU6,
    activation.GELU,
    activation.Sigmoid,
    nn.Linear,
    nn.Upsample,
)
_NEW_NAMES = frozenset(
    ("add", "sub", "mul", "truediv", "div", "clone", "relu", "relu6", "silu", "gelu", "sigmoid")
    + ("mean", "sum", "cat", "stack", "conv2d", "batch_norm", "linear", "interpolate")
    + ("adaptive_avg_pool2d", "avg_pool2d", "max_pool2d")
)


def nodes_in(value: Any) -> list[fx.Node]:
    """The nodes in an argument structure."""
    found: list[fx.Node] = []
    fx.map_arg(value, found.append)
    return found


def overwrites(node: fx.Node) -> bool | None:
    """Whether ``node``, no module, writes to its first argument; None if it may write to any."""
    if node.op == "call_method":
        name = str(node.target)
        if name == "__call__":
            return None
        return name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
    if node.op != "call_function":
        return False
    target: Any = node.target
    if target in IN_PLACE_OPERATORS:
        return True
    if target in (getattr, steps.norm_alone) or getattr(target, "__module__", "") == "_operator":
        return False
    name = getattr(target, "__name__", "")
    if _from_torch(target):
        # A positional True may be an inplace flag or something else.
        if "out" in node.kwargs or any(a is True for a in node.args):
            return None
        return name.endswith("_") or node.kwargs.get("inplace") is True
    return None


def _from_torch(target: Any) -> bool:
    return f"{getattr(target, '__module__', None)}.".startswith("torch.")


def _known(module: nn.Module) -> bool:
    """True for torch's own operations; a container or a wrapper may do anything."""
    own = type(module).__module__.startswith(("torch.nn.modules.", "torch.ao."))
    return own and not isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))


def makes_new(node: fx.Node) -> bool:
    """True if the result of ``node``, no module, shares memory with nothing else."""
    if node.op == "call_method":
        return node.target in _NEW_NAMES
    if node.op == "call_function":
        if node.target is steps.norm_alone:
            return True
        known = _from_torch(node.target) or getattr(node.target, "__module__", "") == "_operator"
        return known and getattr(node.target, "__name__", "") in _NEW_NAMES
    return False


def use_results(graph: fx.Graph) -> None:
    """Let what follows ``x.add_(y)`` read the result instead of ``x``: they are one tensor.

    A module is left out, since a hook may make it return something else.
    """
    seen: set[fx.Node] = set()
    for node in graph.nodes:
        seen.add(node)
        if node.op in ("call_function", "call_method") and overwrites(node):
            target = node.args[0] if node.args else None
            if isinstance(target, fx.Node):
                for user in [u for u in target.users if u not in seen]:
                    user.replace_input_with(target, node)


class Effects:
    """Memory shared and changed in one graph.

    Args:
        modules: what the graph calls.
        is_clean: True for a module that neither writes to its inputs nor returns memory of theirs.
    """

    def __init__(self, graph: fx.Graph, modules: dict[str, nn.Module], is_clean: IsClean) -> None:
        self.modules, self.is_clean = modules, is_clean
        self.position = {node: i for i, node in enumerate(graph.nodes)}
        self.roots: dict[fx.Node, frozenset[fx.Node]] = {}
        self.written: dict[fx.Node, frozenset[fx.Node]] = {}
        for node in graph.nodes:
            inputs = nodes_in((node.args, node.kwargs))
            everything = frozenset[fx.Node]().union(*(self.roots[n] for n in inputs))
            first = self.roots[inputs[0]] if inputs else frozenset()
            writes, new = self._kind(node)
            self.written[node] = everything if writes is None else first if writes else frozenset()
            if writes:
                self.roots[node] = first
            elif writes is False and (new or not inputs):
                self.roots[node] = frozenset((node,))
            else:
                self.roots[node] = everything | {node}

    def _kind(self, node: fx.Node) -> tuple[bool | None, bool]:
        """Whether ``node`` writes, as ``overwrites``, and whether its result is new."""
        if node.op != "call_module":
            return overwrites(node), makes_new(node)
        module = self.modules[str(node.target)]
        if _known(module):
            in_place = bool(getattr(module, "inplace", False))
            return in_place, not in_place and isinstance(module, _NEW_MODULES)
        clean = type(module).__name__ in FROZEN or self.is_clean(module)
        return (False, True) if clean else (None, False)

    def clean(self) -> bool:
        """True if the graph neither writes to its inputs nor returns memory of theirs."""
        graph = next(iter(self.position)).graph
        inputs = {n for n in graph.nodes if n.op == "placeholder"}
        results = nodes_in(next(n for n in graph.nodes if n.op == "output").args)
        written = (*self.written.values(), *(self.roots[n] for n in results))
        return not any(roots & inputs for roots in written)

    def may_move(self, value: fx.Node, start: fx.Node, end: fx.Node, own: set[fx.Node]) -> bool:
        """True if reading ``value`` at ``end`` gives what it gave at ``start``.

        Args:
            own: operations between the two that will not run.
        """
        between = range(self.position[start], self.position[end])
        return not any(
            self.position[n] in between and n not in own and w & self.roots[value]
            for n, w in self.written.items()
        )

    def unseen(self, write: fx.Node, value: fx.Node) -> bool:
        """True if only the result of ``write`` shows that ``write`` changed ``value``."""
        roots, at = self.roots[value], self.position[write]
        if any(root.op in ("placeholder", "get_attr") for root in roots):
            return False
        return all(
            self.position[user] <= at
            for node, its in self.roots.items()
            if its & roots and self.position[node] < at
            for user in node.users
        )
