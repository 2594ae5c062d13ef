# SPDX-License-Identifier: BSD-3-Clause
"""What one operation of a traced forward is, in whichever way it was written."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from resnet_fused.fusion import steps
from resnet_fused.fusion.effects import IN_PLACE_OPERATORS
from resnet_fused.fusion.standins import MISSING, freeze
from resnet_fused.fusion.tracing import Trace
from resnet_fused.fusion.units import is_norm
from resnet_fused.modules import pair

_RELU = (F.relu, torch.relu, torch.relu_)
_ADD = (operator.add, operator.iadd, torch.add)
_POOL = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")


class Nodes:
    """Questions about the nodes of one trace."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.modules = trace.modules

    def note(self, path: str, *names: str) -> None:
        """Make the plan depend on attributes of a submodule."""
        for name in names:
            value = self.modules[path].__dict__.get(name, MISSING)
            self.trace.reads[path, name] = MISSING if value is MISSING else freeze(value)

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that ``node`` calls with one tensor."""
        one = node.op == "call_module" and len(node.args) == 1 and not node.kwargs
        return self.modules[str(node.target)] if one and isinstance(node.args[0], fx.Node) else None

    def norm(self, node: fx.Node) -> tuple[str, nn.Module] | None:
        """Path and module of the BatchNorm that ``node`` calls with one tensor."""
        if node.target is steps.norm_alone:
            path = str(node.args[1].target)  # type: ignore[union-attr]
            return path, self.modules[path]
        module = self.module(node)
        return None if module is None or not is_norm(module) else (str(node.target), module)

    def name(self, node: fx.Node) -> str:
        """``node`` in words."""
        if node.op == "output":
            return "the caller"
        if node.op == "call_module":
            return type(self.modules[str(node.target)]).__name__
        return str(getattr(node.target, "__name__", node.target))

    def follow(self, node: fx.Node) -> tuple[fx.Node | None, list[fx.Node]]:
        """The only reader of ``node`` behind any nn.Identity, and those Identities."""
        passed: list[fx.Node] = []
        while len(node.users) == 1:
            user = next(iter(node.users))
            if type(self.module(user)) is not nn.Identity:
                return user, passed
            passed.append(user)
            node = user
        return None, passed

    def origin(self, node: fx.Node, clones: bool = True) -> tuple[fx.Node, list[fx.Node]]:
        """``node`` before any nn.Identity or clone() that nobody else reads, and those."""
        passed: list[fx.Node] = []
        while len(node.users) == 1 and (
            type(self.module(node)) is nn.Identity or (clones and self.is_clone(node))
        ):
            passed.insert(0, node)
            node = node.args[0]  # type: ignore[assignment]
        return node, passed

    def is_clone(self, node: fx.Node) -> bool:
        is_clone = node.target is torch.clone or (node.op, node.target) == ("call_method", "clone")
        return is_clone and len(node.args) == 1 and not node.kwargs

    def is_relu(self, node: fx.Node | None) -> bool:
        if node is None:
            return False
        if node.op == "call_function":
            return node.target in _RELU
        if node.op == "call_method":
            return node.target in ("relu", "relu_") and len(node.args) == 1
        return type(self.module(node)) is nn.ReLU

    def operands(self, node: fx.Node | None) -> tuple[fx.Node, fx.Node] | None:
        """The two values that ``node`` adds; None if it is no plain addition of two values."""
        if (
            node is None
            or node.kwargs.get("alpha", 1) != 1
            or set(node.kwargs) - {"alpha", "other"}
        ):
            return None
        is_add = node.op == "call_function" and node.target in _ADD
        is_add = is_add or (node.op == "call_method" and node.target in ("add", "add_"))
        args = (*node.args, *(node.kwargs[k] for k in ("other",) if k in node.kwargs))
        if not is_add or len(args) != 2 or args[0] is args[1]:
            return None
        a, b = args
        return (a, b) if isinstance(a, fx.Node) and isinstance(b, fx.Node) else None

    def adds_in_place(self, add: fx.Node) -> bool:
        return add.target in IN_PLACE_OPERATORS or add.target == "add_"

    def is_stem_pool(self, node: fx.Node) -> bool:
        """True for max-pooling with a 3x3 window, stride 2 and padding 1."""
        values: dict[str, Any] = {"padding": 0, "dilation": 1, "ceil_mode": False}
        values["return_indices"] = False
        module = self.module(node)
        if type(module) is nn.MaxPool2d:
            values.update((name, getattr(module, name)) for name in _POOL)
            self.note(str(node.target), *_POOL)
        elif node.target is F.max_pool2d:
            values.update(zip(_POOL, node.args[1:], strict=False))
            values.update((k, v) for k, v in node.kwargs.items() if k != "input")
        if not all(isinstance(values.get(name), (int, tuple, list)) for name in _POOL):
            return False
        sizes = [pair(values[name]) for name in _POOL[:4]]
        flags = (values["ceil_mode"], values["return_indices"])
        return sizes == [(3, 3), (2, 2), (1, 1), (1, 1)] and flags == (False, False)

    def flattened(self, node: fx.Node) -> list[fx.Node]:
        """The operations, ``node`` last, that make [N, C, 1, 1] two-dimensional; [] if not."""
        module = self.module(node)
        if type(module) is nn.Flatten:
            self.note(str(node.target), "start_dim", "end_dim")
            return [node] if (module.start_dim, module.end_dim) == (1, -1) else []
        if node.target is torch.flatten or (node.op, node.target) == ("call_method", "flatten"):
            dims = (*node.args[1:], *node.kwargs.values())
            return [node] if dims in ((1,), (1, -1)) else []
        if node.op != "call_method" or node.target not in ("view", "reshape"):
            return []
        x, shape = node.args[0], node.args[1:]
        size = shape[0] if len(shape) == 2 and shape[1] == -1 else None
        if not isinstance(size, fx.Node) or not isinstance(x, fx.Node):
            return []
        if size.op == "call_method" and size.target == "size" and size.args == (x, 0):
            return [size, node]
        if size.target is operator.getitem and size.args[1:] == (0,):
            whole = size.args[0]
            if (
                isinstance(whole, fx.Node)
                and whole.target is getattr
                and whole.args == (x, "shape")
            ):
                return [whole, size, node]
        return []

    def pooled(self, node: fx.Node, flat: bool) -> fx.Node | None:
        """What ``node`` averages over height and width; None if it does something else.

        Args:
            flat: the result is made two-dimensional afterwards.
        """
        module = self.module(node)
        dims: Any = (*node.args[1:], *(v for k, v in node.kwargs.items() if k == "dim"))
        if type(module) is nn.AdaptiveAvgPool2d and flat:
            self.note(str(node.target), "output_size")
            ok = module.output_size in (1, (1, 1), [1, 1])
        elif node.target is F.adaptive_avg_pool2d and flat:
            size = (*node.args[1:], *node.kwargs.values())
            ok = size in ((1,), ((1, 1),), ([1, 1],))
        elif node.target is torch.mean or (node.op, node.target) == ("call_method", "mean"):
            keep = node.kwargs.get("keepdim", dims[1] if len(dims) > 1 else False)
            axes = tuple(dims[0]) if dims and isinstance(dims[0], (tuple, list)) else dims
            ok = axes in ((2, 3), (-2, -1), (-1, -2), (3, 2)) and (flat or keep is False)
            ok = ok and set(node.kwargs) <= {"dim", "keepdim"}
        else:
            return None
        return node.args[0] if ok and node.args and isinstance(node.args[0], fx.Node) else None
