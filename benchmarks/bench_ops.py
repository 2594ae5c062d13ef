# SPDX-License-Identifier: BSD-3-Clause
"""Every op at every shape of ResNet-18 to 152: eager, channels_last, compile, resnet_fused.

Run with `pytest benchmarks/bench_ops.py -k 'bottleneck and not compile'`; the README beside this
file explains the options.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import pytest
import shapes
import torch
from torch import Tensor, nn

from resnet_fused import ops
from resnet_fused.bench import contenders, subjects
from resnet_fused.bench.contenders import Rivals
from resnet_fused.modules import conv_bn

Fused = Callable[[Tensor], Tensor]


class Piece(NamedTuple):
    """An op at one shape: its plain modules, the fused call on them, the input's C and H = W."""

    op: str
    name: str
    make: Callable[[], nn.Module]
    fuse: Callable[[Any], Fused]
    c: int
    size: int


class AddReLU(nn.Module):
    """Adds its input to a tensor of the same shape, which it makes at its first call."""

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "other"):
            self.other = torch.randn_like(x)
        return torch.relu_(x + self.other)


def conv_bn_act(m: Any) -> Fused:
    return lambda x: ops.conv_bn_act(x, conv_bn(m[0], m[1]))


def block(m: Any) -> Fused:
    fused: Fused = m
    return fused


def add_relu(m: Any) -> Fused:
    return lambda x: ops.add_relu(x, m.other)


def stem(m: Any) -> Fused:
    return lambda x: ops.stem(x, conv_bn(m[0], m[1]))


def pool_linear(m: Any) -> Fused:
    return lambda x: ops.pool_linear(x, m[2].weight, m[2].bias)


def stem_modules() -> nn.Module:
    return nn.Sequential(*shapes.Conv(224, 3, 64, 7, 2).module(), nn.MaxPool2d(3, 2, 1))


def head_modules(c: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 1000))


def pieces() -> Iterator[Piece]:
    """What is timed: all shapes of all ops for images of 224 x 224."""
    for s in shapes.convs():
        yield Piece("conv_bn_act", str(s), s.module, conv_bn_act, s.c, s.size)
    for s in shapes.blocks():
        yield Piece(s.op, str(s), s.module, block, s.c, s.size)
    for c, size in shapes.features():
        yield Piece("add_relu", f"{c}-at{size}", AddReLU, add_relu, c, size)
    yield Piece("stem", "3-64-at224", stem_modules, stem, 3, 224)
    for c in (512, 2048):
        yield Piece("pool_linear", f"{c}-1000-at7", partial(head_modules, c), pool_linear, c, 7)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one group per piece, dtype and batch, with one test per contender."""
    option = metafunc.config.getoption
    settings = [
        (piece, dtype, int(batch))
        for piece in pieces()
        for dtype in option("--dtypes").split(",")
        for batch in option("--batches").split(",")
    ]
    names = [f"{piece.op}-{piece.name}-{dtype}-b{batch}" for piece, dtype, batch in settings]
    metafunc.parametrize("rivals", settings, ids=names, indirect=True, scope="module")
    metafunc.parametrize("contender", contenders.ALL)


@pytest.fixture(scope="module")
def rivals(request: pytest.FixtureRequest) -> tuple[str, Rivals]:
    """A setting's name and what its contenders share."""
    piece, dtype, batch = request.param
    device, kind = request.config.getoption("--device"), subjects.DTYPES[dtype]
    torch.manual_seed(0)
    module = piece.make().eval().to(device, kind)
    x = torch.randn(batch, piece.c, piece.size, piece.size).to(device, kind)
    last = deepcopy(module).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        last(x.contiguous(memory_format=torch.channels_last))
    if piece.fuse is block:
        field = Rivals(subjects.plain(module), subjects.plain(last), last, x, piece.op)
    else:
        field = Rivals(module, last, piece.fuse(last), x, piece.op)
    return f"{piece.op} {piece.name} {dtype} batch {batch}", field


def test_op(rivals: tuple[str, Rivals], contender: str, timed: Callable[..., None]) -> None:
    """Time of one op; `extra_info` holds batch, path and threads."""
    group, field = rivals
    made = field.make(contender)
    if made.call is None:
        pytest.skip(made.note)
    timed(made.call, group, batch=field.x.shape[0], path=made.path)
