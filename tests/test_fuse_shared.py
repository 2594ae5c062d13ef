# SPDX-License-Identifier: BSD-3-Clause
"""fuse() where modules, weights or results are shared, which converters get wrong unnoticed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fuse_zoo
from fuse_spy import calls
from fuse_zoo import Basic, conv3, image, randomise
from resnet_fused.fuse import fuse
from resnet_fused.report import report

one_thread = fuse_zoo.one_thread
__all__ = ["calls", "one_thread"]  # fixtures
C = 4


class Shared(nn.Module):
    """Two convolutions and two BatchNorms; ``run`` is the forward, on two inputs."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.conv, self.bn = conv3(C, C), nn.BatchNorm2d(C)
        self.conv2, self.bn2 = conv3(C, C), nn.BatchNorm2d(C)
        self.run = run

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.run(self, x, y)


def issue_104593(m: Shared, x: Tensor, y: Tensor) -> Tensor:
    """The convolution's other call has no BatchNorm."""
    return m.conv(x) + m.bn(m.conv(y))


def issue_197539(m: Shared, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The same with two results."""
    return m.bn(m.conv(x)), m.conv(y)


def norm_used_twice(m: Shared, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return F.relu(m.bn(m.conv(x))), F.relu(m.bn(m.conv2(y)))


def norm_without_convolution(m: Shared, x: Tensor, y: Tensor) -> Tensor:
    return F.relu(m.bn(m.conv(x))) + m.bn(y)


def pair_used_twice(m: Shared, x: Tensor, y: Tensor) -> Tensor:
    return F.relu(m.bn(m.conv(F.relu(m.bn(m.conv(x)))))) + y


def norm_read_twice(m: Shared, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    h = m.bn(m.conv(x))
    return F.relu(h), m.bn2(m.conv2(h)) + y


def relu_read_twice(m: Shared, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The middle of a residual block is a result, too."""
    h = F.relu(m.bn(m.conv(x)))
    return F.relu(m.bn2(m.conv2(h)) + x), h


CASES: dict[str, tuple[Callable[..., Any], list[str], dict[str, str]]] = {
    # forward, ops called, reason by convolution that the report does not call fused
    "pytorch#104593": (issue_104593, ["conv_bn_act"], {"conv": "another call of it: its output"}),
    "pytorch#197539": (issue_197539, ["conv_bn_act"], {"conv": "another call of it: its output"}),
    "norm used twice": (norm_used_twice, ["conv_bn_act"] * 2, {}),
    "norm without convolution": (norm_without_convolution, ["conv_bn_act"], {}),
    "pair used twice": (pair_used_twice, ["conv_bn_act"] * 2, {}),
    "norm read twice": (norm_read_twice, ["conv_bn_act"] * 2, {}),
    "relu read twice": (relu_read_twice, ["conv_bn_act"] * 2, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_shared_in_one_forward(name: str, calls: list[str]) -> None:
    """A call of a shared module gets what belongs to another call, or a result is missing."""
    run, ops, reasons = CASES[name]
    plain = randomise(Shared(run))
    fused = fuse(plain)
    used = {"conv", "conv2"} if "conv2" in run.__code__.co_names else {"conv"}
    for row in report(fused):
        if row.name in used:
            assert row.fused == (row.name not in reasons), row
            assert reasons.get(row.name, "") in row.reason, row
    x, y = image(c=C), image(c=C, seed=2)
    with torch.no_grad():
        exact = copy.deepcopy(plain).double()(x.double(), y.double())
        got = fused(x, y)
    assert calls == ops and type(got) is type(exact)
    pairs = [(got, exact)] if isinstance(got, Tensor) else list(zip(got, exact, strict=True))
    for a, b in pairs:
        torch.testing.assert_close(a.double(), b, rtol=0, atol=3e-6 * b.abs().max().item())


def test_tied_weights(calls: list[str]) -> None:
    """A change of one of two tied weights is not seen by the other, or a copy unties them."""
    plain = nn.Sequential(Basic(C, C), Basic(C, C))
    plain[1].conv1.weight = plain[0].conv1.weight
    plain[1].bn1.running_mean = plain[0].bn1.running_mean
    randomise(plain)
    fused = fuse(plain)
    assert fused[0].conv1.weight is fused[1].conv1.weight
    x = image(c=C)
    for factor in (1.0, 0.5):
        with torch.no_grad():
            for m in (plain, fused):
                m[0].conv1.weight.mul_(factor)
                m[1].bn1.running_mean.add_(1 - factor)
            want = copy.deepcopy(plain).double()(x.double())
            got = fused(x)
        bound = 3e-6 * want.abs().max().item()
        torch.testing.assert_close(got.double(), want, rtol=0, atol=bound)
    assert calls == ["basic_block"] * 4


def test_same_norm_in_train_mode_for_one_user(calls: list[str]) -> None:
    """A BatchNorm shared by two blocks goes on learning in both, or in none."""
    plain = nn.Sequential(Basic(C, C), Basic(C, C), Basic(C, C))
    plain[1].bn2 = plain[0].bn1
    randomise(plain)
    fused = fuse(plain)
    for m in (plain, fused):
        m[0].bn1.train()
        m(image(c=C))
    assert calls == ["basic_block"]
    torch.testing.assert_close(fused[0].bn1.running_var, plain[0].bn1.running_var)
    assert fused[0].bn1.num_batches_tracked == 2
