# SPDX-License-Identifier: BSD-3-Clause
"""fuse() on random graphs of blocks: every geometry, order, spelling and reader.

The examples are the same in every run. ``FUSE_EXAMPLES=5000 pytest tests/test_fuse_graphs.py``
looks further, at random; what fails is shrunk and printed.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fuse_zoo
from fuse_zoo import randomise
from resnet_fused.fuse import fuse
from resnet_fused.modules import Fused
from resnet_fused.report import report
from resnet_fused.verify import verify

one_thread = fuse_zoo.one_thread
MORE = int(os.environ.get("FUSE_EXAMPLES", "0"))
SIZE = (4, 7, 6)  # channels, height, width of the input


@dataclass(frozen=True)
class Unit:
    """Some convolutions, their norms and activations, and an addition.

    Args:
        source: the input: 0 is the latest value, 1 the one before.
        channels: of the result.
        inner: convolutions before the last, as in a residual block; these keep the size.
        kernel, stride, dilation, padding, groups, bias: of the convolutions.
        norm: where BatchNorm is: after the convolution, before it, nowhere, or as a function.
        affine, tracked: of the BatchNorm.
        shortcut: what is added: nothing, the unit's input (projected if need be), or another value.
        add: how the addition is written.
        act: the activation.
        act_first: it comes before the addition.
        pooled: a 3x3/2 max-pool follows.
        reuse: which module of the unit before is used again.
        reader: which intermediate value is returned, too.
    """

    source: int = 0
    channels: int = 4
    inner: int = 0
    kernel: int = 3
    stride: int = 1
    dilation: int = 1
    padding: int = 1
    groups: int = 1
    bias: bool = False
    norm: str = "after"
    affine: bool = True
    tracked: bool = True
    shortcut: str = "none"
    add: str = "+"
    act: str = "module"
    act_first: bool = False
    pooled: bool = False
    reuse: str = "nothing"
    reader: str = "nothing"


ADDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "+": lambda a, b: a + b,
    "swapped": lambda a, b: b + a,
    "+=": lambda a, b: a.__iadd__(b),
    "into the shortcut": lambda a, b: b.add_(a),
    "torch.add": torch.add,
    "scaled": lambda a, b: torch.add(a, b, alpha=2),
}
ACTS: dict[str, Callable[[Tensor], Tensor] | nn.Module] = {
    "module": nn.ReLU(),
    "inplace": nn.ReLU(inplace=True),
    "function": F.relu,
    "relu_": torch.relu_,
    "ReLU6": nn.ReLU6(),
    "SiLU": nn.SiLU(),
    "none": nn.Identity(),
}


def mostly(usual: Any, *others: Any, weight: int = 3) -> st.SearchStrategy[Any]:
    return st.sampled_from([usual] * weight * max(1, len(others)) + list(others))


UNITS = st.lists(
    st.builds(
        Unit,
        source=mostly(0, 1, 2),
        channels=st.sampled_from([4, 2, 6]),
        inner=st.sampled_from([1, 0, 2]),
        kernel=st.sampled_from([3, 1, 2]),
        stride=mostly(1, 2),
        dilation=mostly(1, 2, weight=6),
        padding=mostly(1, 0, 2),
        groups=mostly(1, 2),
        bias=st.booleans(),
        norm=mostly("after", "before", "none", "function", weight=4),
        affine=mostly(True, False),
        tracked=mostly(True, False, weight=9),
        shortcut=st.sampled_from(["input", "input", "none", "other"]),
        add=mostly(*ADDS, weight=1),
        act=mostly(*ACTS, weight=2),
        act_first=mostly(False, True, weight=6),
        pooled=mostly(False, True),
        reuse=mostly("nothing", "conv", "norm", weight=4),
        reader=mostly("nothing", "conv", "norm", "sum", "result"),
    ),
    min_size=1,
    max_size=3,
)


class Graph(nn.Module):
    """Runs a program: each instruction makes a value from earlier ones, or from modules."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict()
        self.program: list[tuple[str, str, int, int]] = []
        self.returned: list[int] = []

    def forward(self, x: Tensor) -> list[Tensor]:
        values = [x]
        for kind, name, a, b in self.program:
            if kind == "module":
                y = self.parts[name](values[a])
            elif kind == "add":
                y = ADDS[name](values[a], values[b])
            elif kind == "norm":
                norm: Any = self.parts[name]
                statistics = norm.running_mean, norm.running_var
                y = F.batch_norm(values[a], *statistics, norm.weight, norm.bias)
            else:
                function: Any = ACTS[name]
                y = function(values[a])
            values.append(y)
        return [values[i] for i in self.returned]


class Builder:
    """Turns units into a graph, mending what does not fit: every list of units is an example."""

    def __init__(self, units: list[Unit], head: bool) -> None:
        self.graph = Graph()
        self.shapes = [SIZE]
        self.ends = [0]  # results of units
        self.last: dict[str, tuple[str, tuple[int, ...]]] = {}
        for unit in units:
            self.unit(unit)
        if head and self.shapes[-1][0]:
            self.module(nn.AdaptiveAvgPool2d(1), (self.shapes[-1][0], 1, 1))
            self.module(nn.Flatten(), (self.shapes[-1][0],))
            self.module(nn.Linear(self.shapes[-1][0], 3), (3,))
        self.graph.returned.append(len(self.shapes) - 1)

    def emit(
        self, kind: str, name: str, shape: tuple[int, ...], a: int | None = None, b: int = 0
    ) -> int:
        self.graph.program.append((kind, name, len(self.shapes) - 1 if a is None else a, b))
        self.shapes.append(shape)  # type: ignore[arg-type]
        return len(self.shapes) - 1

    def module(self, module: nn.Module, shape: tuple[int, ...], a: int | None = None) -> int:
        name = f"m{len(self.graph.parts)}"
        self.graph.parts[name] = module
        return self.emit("module", name, shape, a)

    def read(self, unit: Unit, what: str, value: int) -> None:
        if unit.reader == what:
            self.graph.returned.append(value)

    def conv(self, unit: Unit, a: int, out: int) -> int:
        """A convolution, or the last unit's once more."""
        c, *size = self.shapes[a]
        span = unit.dilation * (unit.kernel - 1) + 1
        if min(size) + 2 * unit.padding < span:
            unit = replace(unit, kernel=1, dilation=1, padding=0, stride=1)
            span = 1
        key = (c, out, unit.kernel, unit.stride, unit.dilation, unit.padding)
        shape = (out, *((s + 2 * unit.padding - span) // unit.stride + 1 for s in size))
        if unit.reuse == "conv" and self.last.get("conv", ("", ()))[1] == key:
            return self.emit("module", self.last["conv"][0], shape, a)
        options = (unit.kernel, unit.stride, unit.padding, unit.dilation, unit.groups, unit.bias)
        y = self.module(nn.Conv2d(c, out, *options), shape, a)
        self.last["conv"] = (self.graph.program[-1][1], key)
        self.read(unit, "conv", y)
        return y

    def norm(self, unit: Unit, a: int) -> int:
        shape = self.shapes[a]
        if unit.reuse == "norm" and self.last.get("norm", ("", ()))[1] == shape[:1]:
            return self.emit("module", self.last["norm"][0], shape, a)
        module = nn.BatchNorm2d(shape[0], 1e-3, None, unit.affine, unit.tracked)
        if unit.norm == "function" and unit.affine and unit.tracked:
            self.graph.parts[name := f"m{len(self.graph.parts)}"] = module
            y = self.emit("norm", name, shape, a)
        else:
            y = self.module(module, shape, a)
            self.last["norm"] = (self.graph.program[-1][1], shape[:1])
        self.read(unit, "norm", y)
        return y

    def conv_norm(self, unit: Unit, a: int, out: int) -> int:
        if unit.norm == "before":
            return self.conv(
                unit, self.emit("act", unit.act, self.shapes[a], self.norm(unit, a)), out
            )
        y = self.conv(unit, a, out)
        return y if unit.norm == "none" else self.norm(unit, y)

    def unit(self, unit: Unit) -> None:
        start = y = self.ends[-1 - unit.source % len(self.ends)]
        for _ in range(unit.inner):
            same = replace(unit, kernel=3 if unit.kernel == 3 else 1, stride=1, dilation=1)
            same = replace(same, padding=same.kernel // 2, reader="nothing")
            y = self.conv_norm(same, y, unit.channels)
            if unit.norm != "before":
                y = self.emit("act", unit.act, self.shapes[y], y)
        y = self.conv_norm(unit, y, unit.channels)
        other = self.shortcut(unit, start, y)
        if other is not None:
            if unit.act_first:
                y = self.emit("act", unit.act, self.shapes[y], y)
            y = self.emit("add", unit.add, self.shapes[y], y, other)
            self.read(unit, "sum", y)
        if not (unit.act_first and other is not None):
            y = self.emit("act", unit.act, self.shapes[y], y)
        c, h, w = self.shapes[y]
        if unit.pooled:
            y = self.module(nn.MaxPool2d(3, 2, 1), (c, (h + 1) // 2, (w + 1) // 2), y)
        self.read(unit, "result", y)
        self.ends.append(y)

    def shortcut(self, unit: Unit, start: int, y: int) -> int | None:
        """The value to add to ``y``."""
        if unit.shortcut == "none":
            return None
        if unit.shortcut == "other":
            fits = [i for i, s in enumerate(self.shapes[:-1]) if s == self.shapes[y] and i != y]
            return fits[-1 - unit.source % len(fits)] if fits else None
        if self.shapes[start] == self.shapes[y]:
            return start
        (c, *size), out = self.shapes[start], self.shapes[y]
        if any(-(-s // unit.stride) != o for s, o in zip(size, out[1:], strict=True)):
            return None  # no 1x1 projection gives this size
        down = nn.Sequential(nn.Conv2d(c, out[0], 1, unit.stride), nn.BatchNorm2d(out[0]))
        return self.module(down, out, start)


def test_random_graphs() -> None:
    """A rule about what may be fused has a hole, or fuse refuses what it should not.

    In float64 only the order of operations differs: 10 layers of at most 54 products are within
    1e-13 of each other, and may grow a thousand times. In float32 and bfloat16 ``verify`` holds
    every call against its bound, which also shows that it raises no false alarm.
    """
    found: Counter[str] = Counter()

    @settings(
        max_examples=MORE or 500,
        derandomize=not MORE,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(UNITS, st.booleans(), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    def check(units: list[Unit], head: bool, dtype: torch.dtype) -> None:
        plain = randomise(Builder(units, head).graph, len(units)).to(dtype).double()
        x = torch.randn(2, *SIZE, generator=torch.Generator().manual_seed(1)).double()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "nothing in|no fused call")
            fused: Any = fuse(plain)
            if dtype != torch.float64:
                verify(copy.deepcopy(plain).to(dtype), x.to(dtype))
        mine, theirs = x.clone(), x.clone()
        with torch.no_grad():
            got, want = fused(mine), plain(theirs)
        for a, b in zip([*got, mine], [*want, theirs], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10 * max(1.0, b.abs().max().item()))
            assert a.stride() == b.stride()
        rows = report(fused)
        found.update({"graphs": 1, "convolutions": len(rows), "fused": sum(r.fused for r in rows)})
        found.update(
            s.pattern for m in fused.modules() if isinstance(m, Fused) for s in m.fused_sites()
        )

    check()
    assert found["graphs"] >= (MORE or 500)
    assert found["fused"] >= 0.5 * found["convolutions"], found
    patterns = ("conv_bn_act", "basic_block", "bottleneck", "stem", "add_relu", "pool_linear")
    assert min(found[p] for p in patterns) >= 15, found
