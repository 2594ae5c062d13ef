# SPDX-License-Identifier: BSD-3-Clause
"""Seeded defects: the checkers must catch wrong kernels, or they prove nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from harness import bounds
from harness.case import Source
from harness.gpu import moved
from harness.views import VIEWS
from resnet_fused.ops import ConvBN

C = 2048


def _right(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x.float(), w.float()).to(torch.bfloat16)


def _last_term_dropped(x: Tensor, w: Tensor) -> Tensor:
    return _right(x[:, :-1], w[:, :-1])


def _partial_sums_in_bf16(x: Tensor, w: Tensor) -> Tensor:
    total = torch.zeros(x.shape[0], w.shape[0])
    for i in range(0, C, 64):
        part = F.linear(x[:, i : i + 64].float(), w[:, i : i + 64].float())
        total = (total + part).to(torch.bfloat16).float()
    return total.to(torch.bfloat16)


def _truncated(x: Tensor, w: Tensor) -> Tensor:
    bits = F.linear(x.float(), w.float()).view(torch.int32) & ~0xFFFF
    return bits.view(torch.float32).to(torch.bfloat16)


def _rows_swapped(x: Tensor, w: Tensor) -> Tensor:
    return _right(x, w).flip(0)


def _check(kernel: Callable[[Tensor, Tensor], Tensor]) -> None:
    s = Source(torch.bfloat16)
    x, w = s.normal(64, C), s.normal(32, C, scale=C**-0.5)
    conv = ConvBN(w.view(32, C, 1, 1))
    want = bounds.conv_bn(bounds.stored(x.view(64, C, 1, 1)), conv, torch.bfloat16)
    got = kernel(x, w).view(64, 32, 1, 1)
    bounds.assert_within(got, bounds.rounded(want, torch.bfloat16))


def test_the_bound_accepts_a_right_kernel() -> None:
    _check(_right)


@pytest.mark.parametrize(
    "defect", [_last_term_dropped, _partial_sums_in_bf16, _truncated, _rows_swapped]
)
def test_the_bound_catches(defect: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(AssertionError, match="outside the bound"):
        _check(defect)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_the_bound_catches_one_wrong_value(value: float) -> None:
    exact = bounds.stored(torch.ones(3, 4))
    got = torch.ones(3, 4)
    got[1, 2] = value
    with pytest.raises(AssertionError, match="1 of 12 elements"):
        bounds.assert_within(got, exact)


def test_the_bound_is_tight() -> None:
    """A bound far above real errors lets defects through: bf16 errors reach 80 % of it."""
    s = Source(torch.bfloat16)
    x, w = s.normal(64, 64), s.normal(32, 64, scale=1 / 8)
    conv = ConvBN(w.view(32, 64, 1, 1))
    want = bounds.conv_bn(bounds.stored(x.view(64, 64, 1, 1)), conv, torch.bfloat16)
    want = bounds.rounded(want, torch.bfloat16)
    got = _right(x, w).view(64, 32, 1, 1).double()
    assert ((got - want.value).abs() / want.error).max() > 0.8


def test_integers_are_exact_and_not_mostly_zero() -> None:
    """Zeros prove nothing: most sums must be something else."""
    s = Source(torch.bfloat16, integer=True)
    x, conv = s.image(2, 64, 9, 9), s.conv(64, 32, 3)
    y = bounds.conv_bn(bounds.stored(x), conv, torch.bfloat16).value
    assert torch.equal(y, y.round()) and (y != 0).double().mean() > 0.8


@pytest.mark.parametrize("name", VIEWS)
def test_copies_for_a_gpu_keep_their_strides(name: str) -> None:
    """A copy that is made dense would hide what a kernel does with strides and offsets."""
    view = VIEWS[name](Source(torch.bfloat16).image(3, 5, 4, 6))
    copy = moved(view, "cpu")
    assert torch.equal(copy, view) and copy.stride() == view.stride()
    assert copy.storage_offset() == view.storage_offset()
    assert copy.untyped_storage().data_ptr() != view.untyped_storage().data_ptr()
    assert copy.untyped_storage().nbytes() == view.untyped_storage().nbytes()
