# SPDX-License-Identifier: BSD-3-Clause
"""What a forward consists of: its torch operations, put together to layers, with their work."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from resnet_fused.profile.result import Work
from resnet_fused.profile.spans import Call, Spans, join

_KINDS = {"conv": "conv", "batch_norm": "bn", "relu": "relu", "pool": "pool"}
_NAMES = {"add": "add", "mean": "pool", "linear": "linear", "addmm": "linear", "mm": "linear"}


def kind_of(op: str) -> str:
    """What sort of layer a torch operation is: conv, bn, relu, add, pool, linear, or its name."""
    op = op.strip("_")
    found = (kind for part, kind in _KINDS.items() if part in op)
    return _NAMES.get(op) or next(found, op)


@dataclass
class Part:
    """One layer of a forward: a leaf module, an operation outside of any, or a fused call.

    Args:
        name: of the module or call; of an operation outside of leaves, its block and its kind.
        kind: see `kind_of`; of a fused call its op.
        module: the innermost module that runs it.
        call: the fused call, if it is one.
        read: bytes of activations that it reads.
        written: bytes that it writes.
        weights: bytes of parameters and buffers that it reads.
        flop: operations of its products, a multiply-add is two; none are known of fused calls.
    """

    name: str
    kind: str
    module: str
    call: Call | None = None
    read: float = 0.0
    written: float = 0.0
    weights: float = 0.0
    flop: float = 0.0

    @property
    def work(self) -> Work:
        return Work(self.flop, self.read, self.written, self.weights)


@dataclass
class Recording:
    """The layers of one forward.

    Args:
        parts: in order.
        layers: the number in `parts` of each torch operation, in order.
        output: what the forward gave.
    """

    parts: list[Part] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    output: Any = None


class _Recorder(TorchDispatchMode):
    """Hears of modules, fused calls and torch operations, and puts them together."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__()
        self.found = Recording()
        self._parameters = {_storage(t) for t in parameters}
        self._inside: list[tuple[str, bool, Part | None]] = []  # module, whether a leaf, its part
        self._waiting = 0  # operations that belong to the next layer

    # What Spans tells

    def enter(self, name: str, leaf: bool) -> None:
        self._inside.append((name, leaf, None))

    def enter_call(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        part = Part(call.name, call.op, call.owner, call)
        self._add_inputs(part, (args, kwargs))
        self._inside.append((call.owner, True, part))

    def leave(self) -> None:
        self._inside.pop()

    # What torch does

    def _operation(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        before = [_storage(t) for t in _tensors((args, kwargs))]
        y = func(*args, **(kwargs or {}))
        if _only_views(func, y, before):
            self._waiting += 1
            return y
        part = self._part(kind_of(func.overloadpacket.__name__))
        self.found.layers += [len(self.found.parts) - 1] * (self._waiting + 1)
        self._waiting = 0
        if part.call is None:
            self._add_inputs(part, (args, kwargs))
            part.written += sum(t.nbytes for t in _tensors(y))
        else:
            part.written = sum(t.nbytes for t in _tensors(y))  # the last operation's is the call's
        part.flop += _flop(func, args, kwargs or {}, y)
        return y

    def _part(self, kind: str) -> Part:
        """The layer that an operation belongs to, as the last of `found.parts`."""
        name, leaf, part = self._inside[-1] if self._inside else ("", False, None)
        parts = self.found.parts
        if part is None:
            part = Part(name if leaf else join(name, kind), kind, name)
            if leaf:  # one layer for all that it does
                self._inside[-1] = (name, leaf, part)
        if not parts or parts[-1] is not part:
            parts.append(part)
        return part

    def _add_inputs(self, part: Part, tree: Any) -> None:
        """Count what is read, each tensor once."""
        for t in {_storage(t): t for t in _tensors(tree)}.values():
            if _storage(t) in self._parameters:
                part.weights += t.nbytes
            else:
                part.read += t.nbytes

    def done(self, output: Any) -> Recording:
        """All that was heard; views at the very end belong to the last layer."""
        self.found.layers += [max(len(self.found.parts) - 1, 0)] * self._waiting
        self.found.output = output
        return self.found


# Set here, for torch would wrap a method of that name in what imports its compiler.
_Recorder.__torch_dispatch__ = _Recorder._operation  # type: ignore[assignment]


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr() if t.layout is torch.strided else id(t)


def _flop(func: Any, args: Any, kwargs: Mapping[str, Any], y: Any) -> float:
    """Operations of a product, as torch counts them; 0 of anything else."""
    count = flop_registry.get(func.overloadpacket)
    if count is not None:
        return float(count(*args, **kwargs, out_val=y))
    # Under inference_mode composite operations arrive whole, which torch's table has in parts only.
    name = func.overloadpacket.__name__
    if name in ("conv1d", "conv2d", "conv3d"):
        return 2.0 * y.numel() * math.prod(args[1].shape[1:])
    if name.startswith("conv_transpose"):
        return 2.0 * args[0].numel() * math.prod(args[1].shape[1:])
    return 2.0 * y.numel() * args[0].shape[-1] if name in ("linear", "matmul") else 0.0


def _only_views(func: Any, y: Any, before: Sequence[int]) -> bool:
    """Whether an operation only looks at its inputs' memory in another way."""
    return not _writes(func) and all(_storage(t) in before for t in _tensors(y))


def _writes(func: Any) -> bool:
    """Whether an operation works in place."""
    return any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)


def record(model: nn.Module, run: Callable[[nn.Module], Any]) -> Recording:
    """Run a forward and say what it consisted of.

    Args:
        model: a copy that nobody else uses; hooks are put onto it and taken off again.
        run: makes the forward.
    """
    recorder = _Recorder((*model.parameters(), *model.buffers()))
    spans = Spans(model, recorder)
    try:
        with recorder:
            y = run(model)
    finally:
        spans.remove_hooks()
    return recorder.done(y)
