# SPDX-License-Identifier: BSD-3-Clause
"""fuse() on BatchNorms that end in an activation, as timm's do; these here stand for timm's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fuse_zoo
from fuse_spy import calls, close
from fuse_zoo import conv3, image, randomise
from resnet_fused.fuse import fuse, unfuse
from resnet_fused.report import report
from test_fuse_refused import One, check, straight

one_thread = fuse_zoo.one_thread
__all__ = ["calls", "one_thread"]  # fixtures
C = 4


class BatchNormAct2d(nn.BatchNorm2d):
    """A BatchNorm with ``drop`` and ``act``; asks for the rank of its input, as timm's does."""

    def __init__(self, c: int, act: nn.Module | None = None) -> None:
        super().__init__(c)
        self.drop, self.act = nn.Identity(), act or nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, "expected 4D input")
        return self.act(self.drop(super().forward(x)))


class FrozenBatchNormAct2d(nn.Module):
    """The same with buffers and eps, spelt out."""

    def __init__(self, c: int, act: nn.Module | None = None) -> None:
        super().__init__()
        self.eps = 1e-3
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(c) + 0.5)
        self.drop, self.act = nn.Identity(), act or nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        bias = self.bias - self.running_mean * scale
        return self.act(self.drop(x * scale.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)))


class Elsewhere(BatchNormAct2d):
    pass


NORMS = [BatchNormAct2d, FrozenBatchNormAct2d]
for _norm in NORMS:
    _norm.__module__ = "timm.layers.norm_act"
Elsewhere.__name__ = "BatchNormAct2d"


class Block(nn.Module):
    """A residual block of convolutions with such norms; the last has no activation."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3(C, C), norm(C)
        self.conv2, self.bn2 = conv3(C, C), norm(C, nn.Identity())
        self.down, self.bn3 = nn.Conv2d(C, C, 1), norm(C, nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        return F.relu(y + self.bn3(self.down(x)))


@pytest.mark.parametrize("norm", NORMS)
def test_block(norm: type, calls: list[str]) -> None:
    """The activation inside a norm is lost, applied twice, or keeps a block from being one."""
    rows = check(Block(norm))
    assert all(r.fused and r.pattern == "basic_block" for r in rows) and calls == ["basic_block"]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("act", [nn.SiLU(inplace=True), nn.ReLU6(), nn.Hardtanh(-1, 2)])
def test_other_activation(norm: type, act: nn.Module) -> None:
    """Another activation than ReLU is taken for ReLU or left out."""
    (row,) = check(One(straight, bn=norm(C, act), relu=nn.Identity()))
    assert row.fused and row.pattern == "conv_bn_act"


@pytest.mark.parametrize("norm", NORMS)
def test_norm_that_no_convolution_takes(norm: type) -> None:
    """Where the norm alone stays, its activation comes twice or not at all."""

    def run(m: One, x: Tensor) -> Tensor:
        y = m.conv(x)
        return m.bn(y) + m.bn(x) + y + m.relu(m.bn2(m.conv2(x)))

    (first, second) = check(One(run, bn=norm(C), conv2=conv3(C, C), bn2=nn.BatchNorm2d(C)))
    assert not first.fused and "read 2 times" in first.reason and second.fused


@pytest.mark.parametrize("norm", NORMS)
def test_changed_later(norm: type, calls: list[str]) -> None:
    """Modes, hooks, weights and activations that change after fuse() are not noticed."""
    plain = randomise(Block(norm))
    fused = fuse(plain)
    x = image(c=C)
    seen: list[list[Tensor]] = [[], []]
    handles = [
        m.bn1.register_forward_hook(lambda mod, args, y, s=s: s.append(y.clone()))
        for m, s in zip((plain, fused), seen, strict=True)
    ]
    close(fused(x), plain(x))
    assert calls == [] and torch.equal(seen[0][0], seen[1][0])
    assert {r.reason for r in report(fused)} == {"a hook on 'bn1'"}
    for handle in handles:
        handle.remove()
    for m in (plain, fused):
        m.bn1.act = nn.Sigmoid()
        m.bn2.running_mean.add_(0.5)
        m.bn3.eps = 0.1
    close(fused(x), plain(x))
    assert "conv_bn_act" in calls
    calls.clear()
    for m in (plain, fused):
        m.bn1.train()
        m(x)
    assert not any(m.bn1.training and r.fused for m in (fused,) for r in report(fused))
    assert calls == []
    for a, b in zip(plain.buffers(), fused.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    assert type(unfuse(fused)) is Block


def test_namesake_is_left_alone() -> None:
    """A class of that name from elsewhere, which may do anything, is taken for timm's."""
    with pytest.warns(UserWarning, match="nothing in One"):
        (row,) = report(fuse(randomise(One(straight, bn=Elsewhere(C)))))
    assert not row.fused and row.reason == "'bn': BatchNormAct2d is not fused"
