# SPDX-License-Identifier: BSD-3-Clause
"""Seeded defects, each of which fuse(model, verify=x) must find, and the bound that finds them."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fuse_zoo
from fuse_spy import make
from fuse_zoo import Cifar, image, randomise
from resnet_cases import small
from resnet_fused import dispatch, ops, rounding
from resnet_fused.fuse import fuse
from resnet_fused.fusion import steps
from resnet_fused.verify import VerificationError

one_thread = fuse_zoo.one_thread
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def set_norms(model: nn.Module, **values: float) -> nn.Module:
    """Fill tensors of every BatchNorm."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            for name, value in values.items():
                getattr(m, name).data.fill_(value)
    return model


def drops_eps(op: Any, x: Tensor, *convs: Any, **kwargs: Any) -> Tensor:
    return op(
        x, *(c._replace(eps=0.0) if isinstance(c, ops.ConvBN) else c for c in convs), **kwargs
    )


def loses_relu(op: Any, x: Tensor, *convs: Any, **kwargs: Any) -> Tensor:
    if op is CONV_BN_ACT:
        return op(x, *convs, **{**kwargs, "relu": False})
    *main, down = convs if convs[-1] is None or len(convs) > 2 else (*convs, None)
    y = x
    for conv in main[:-1]:
        y = CONV_BN_ACT(y, conv)
    other = x if down is None else CONV_BN_ACT(x, down, relu=False)
    return CONV_BN_ACT(y, main[-1], residual=other, relu=False)


def loses_residual(op: Any, x: Tensor, *convs: Any, **kwargs: Any) -> Tensor:
    if op is CONV_BN_ACT:
        return op(x, *convs, relu=kwargs.get("relu", True))
    for conv in convs[:-1]:
        x = CONV_BN_ACT(x, conv)
    return x


def last_channel(op: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Three times the bound off, in one element of the last channel."""
    y = op(x, *args, **kwargs)
    name = next(n for n, f in ORIGINALS.items() if f is op)
    kind = rounding.Kind(x.dtype, dispatch.choose("cpu", x.dtype, name).name, "cpu")
    want = rounding.exact(name, kind, (x, *args), kwargs)
    y[-1, -1, -1, -1] += 3 * want.error[-1, -1, -1, -1].to(x.dtype)
    return y


def stale_weights(op: Any, x: Tensor, *convs: Any, **kwargs: Any) -> Tensor:
    """As if the weights were packed before they changed a little."""
    old = [c._replace(weight=c.weight * 1.02) if isinstance(c, ops.ConvBN) else c for c in convs]
    return op(x, *old, **kwargs)


def forgets_nan(op: Any, x: Tensor, *convs: Any, **kwargs: Any) -> Tensor:
    return op(x, *convs, **kwargs).nan_to_num(0.0)


ORIGINALS = {name: getattr(ops, name) for name in ("conv_bn_act", "basic_block", "bottleneck")}
CONV_BN_ACT = ops.conv_bn_act
DEFECTS = (drops_eps, loses_relu, loses_residual, last_channel, stale_weights, forgets_nan)


def seed_defect(patch: pytest.MonkeyPatch, defect: Any, also_in_float64: bool) -> None:
    for name, op in ORIGINALS.items():

        def wrong(x: Tensor, *args: Any, _op: Any = op, **kwargs: Any) -> Tensor:
            if x.dtype == torch.float64 and not also_in_float64:
                return _op(x, *args, **kwargs)
            return defect(_op, x, *args, **kwargs)

        patch.setattr(ops, name, wrong)


@pytest.mark.parametrize("also_in_float64", [True, False], ids=["float64 too", "this dtype only"])
@pytest.mark.parametrize("net", [make, small], ids=["fused", "native"])
@pytest.mark.parametrize("defect", DEFECTS)
def test_seeded_defects(
    defect: Any, net: Any, also_in_float64: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A defect that verify lets pass."""
    model = set_norms(net(), running_var=1e-4) if defect is drops_eps else net()
    x = image(2, 24)
    x[0, 0, 4, 5] = float("nan") if defect is forgets_nan else 0.5
    seed_defect(monkeypatch, defect, also_in_float64)
    with pytest.raises(VerificationError) as raised:
        fuse(model, verify=x)
    text = str(raised.value)
    assert "layer1" in text or "output 0" in text or "'Net'" in text, text
    assert "The model is as it was" in text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_seeded_defects_in_other_dtypes(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bound so wide that in 16 bits nothing is ever wrong, or one that float64 never gets."""
    for defect in (loses_relu, loses_residual, last_channel):
        with monkeypatch.context() as patch:
            seed_defect(patch, defect, dtype == torch.float64)
            with pytest.raises(VerificationError, match="layer1"):
                fuse(make().to(dtype), verify=image(2, 24).to(dtype))


@pytest.mark.parametrize(
    "plan",
    [
        lambda x, a, b, down, mode: ops.conv_bn_act(ops.conv_bn_act(x, a), b),
        lambda x, a, b, down, mode: ops.basic_block(x, b, a, down),
        lambda x, a, b, down, mode: ops.basic_block(x * 1.001, a, b, down),
        lambda x, a, b, down, mode: ops.basic_block(x, a, b, down)[:, :, :-1],
    ],
    ids=["no shortcut", "convolutions swapped", "input scaled", "a row short"],
)
def test_a_wrong_plan(plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that are right in themselves, in a forward that is not the original's."""
    monkeypatch.setattr(steps, "basic_block", plan)
    with pytest.raises(VerificationError, match=r"'layers.0' \(Block\), computed in float64"):
        fuse(randomise(Cifar()), verify=image())


def test_wrong_between_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that only the whole model's outputs show, at float32's last digits."""
    module = sys.modules["resnet_fused.fuse"]
    monkeypatch.setattr(module, "as_eager", lambda y, *_: y * (1 + 1e-4))
    with pytest.raises(VerificationError, match="output 0 is .* from float64; the original is"):
        fuse(randomise(Cifar()), verify=image())


def test_a_call_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """The op's own error, without a word on verify and the model."""

    def refuse(*args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(ops, "stem", refuse)
    with pytest.raises(VerificationError, match="it raised RuntimeError: no kernel"):
        fuse(small(), verify=image())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bound_is_not_loose(dtype: torch.dtype) -> None:
    """A bound that would pass an error of a few units in the last place of a 16-bit result."""
    x, conv = image(2, 9, c=8).to(dtype), nn.Conv2d(8, 8, 3).to(dtype)
    args = (x, ops.ConvBN(conv.weight.detach(), conv.bias.detach()))  # type: ignore[union-attr]
    want = rounding.exact("conv_bn_act", rounding.Kind(dtype, "reference", "cpu"), args, {})
    y = ops.conv_bn_act(*args)
    assert not rounding.outside(y, want).any()
    least = 1 if dtype in (torch.bfloat16, torch.float16) else 72 + 20
    unit = rounding.UNIT[dtype]
    sums = F.conv2d(x.abs().double(), conv.weight.abs().double()) + 1
    assert (want.error <= 4 * unit * (least * sums + want.value.abs())).all()
    assert rounding.outside(y + 2.1 * want.error, want).all()
