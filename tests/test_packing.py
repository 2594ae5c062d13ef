# SPDX-License-Identifier: BSD-3-Clause
"""Packed weights follow every change of the parameters they were made from."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import resnet_fused
from harness.case import Source
from resnet_fused import _extension
from resnet_fused.ops import ConvBN
from resnet_fused.ops import conv_bn as cb

FIELDS = ("weight", "bias", "bn_weight", "bn_bias", "running_mean", "running_var")
CHANGES: dict[str, Callable[[Tensor], object]] = {
    "in place": lambda t: t.mul_(1.5),
    "one element": lambda t: t.view(-1)[t.numel() // 2].add_(3.0),
    "copy_": lambda t: t.copy_(t.flip(0)),
    "data": lambda t: t.data.mul_(1.5),
    "data copy_": lambda t: t.data.copy_(t.data.flip(0) + 1),
    "set_": lambda t: t.set_(t.detach().clone().mul_(2.0)),
}


def _expect(x: Tensor, conv: ConvBN) -> Tensor:
    with resnet_fused.backend("reference"):
        return resnet_fused.conv_bn_act(x, conv, relu=False).float()


@pytest.mark.parametrize("path", ["auto", "onednn", "portable", "portable bf16x3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_any_change_counts_at_the_next_call(
    change: str, inference: bool, dtype: torch.dtype, path: str, force_path: Any
) -> None:
    """Breaks if a stale packing is used; inference tensors have no version counter to ask."""
    with torch.inference_mode(inference), force_path(path):
        s = Source(dtype)
        x, conv = s.image(1, 64, 6, 6), s.conv(64, 32, 3, bias=True)
        for field in FIELDS:
            before = resnet_fused.conv_bn_act(x, conv, relu=False).float()
            CHANGES[change](getattr(conv, field))
            after = resnet_fused.conv_bn_act(x, conv, relu=False).float()
            want = _expect(x, conv)
            tolerance = (
                0.03 * want.abs().max()
            )  # bf16 weights rounded once more; a change is larger
            assert (after - want).abs().max() < tolerance, field
            assert not torch.equal(before, after), field


@pytest.mark.parametrize("path", ["auto", "onednn", "portable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fused_optimizers_step_counts(dtype: torch.dtype, path: str, force_path: Any) -> None:
    """Breaks if a step that autograd takes no note of is missed: those of ``fused=True``, which in
    16 bits leave most weights as they are; here, all but one.
    """
    s = Source(dtype)
    x, conv = s.image(1, 64, 6, 6), s.conv(64, 64, 3)
    weight = torch.nn.Parameter(conv.weight)
    weight.grad = torch.zeros_like(weight)
    weight.grad[5, 6, 1, 1] = 1
    conv, adam = conv._replace(weight=weight), torch.optim.Adam([weight], lr=1.0, fused=True)
    with torch.no_grad(), force_path(path):
        before = resnet_fused.conv_bn_act(x, conv, relu=False)
        adam.step()
        assert weight._version == 0, "torch counts such steps now: nothing need be done for them"
        assert not torch.equal(resnet_fused.conv_bn_act(x, conv, relu=False), before)


def test_a_surgical_edit_behind_autograds_back_is_the_documented_limit() -> None:
    """``.data`` edits have no version; whole tensors are noticed (above), one element need not be.

    Fails if that ever gets better: then README should promise it.
    """
    s = Source(torch.float32)
    x, conv = s.image(1, 64, 6, 6), s.conv(64, 64, 3)
    before = resnet_fused.conv_bn_act(x, conv)
    conv.weight.data[5, 6, 1, 1] += 1
    assert torch.equal(resnet_fused.conv_bn_act(x, conv), before)
    conv.weight.mul_(1)  # any tracked update brings it in
    assert not torch.equal(resnet_fused.conv_bn_act(x, conv), before)


def test_a_filter_edited_behind_autograds_back_is_mostly_noticed() -> None:
    """Breaks if fewer bytes of a weight are looked at than lie in the cache lines that are read."""
    s = Source(torch.bfloat16)
    x, noticed = s.image(1, 64, 6, 6), 0
    for _ in range(40):
        conv = s.conv(64, 64, 3)
        before = resnet_fused.conv_bn_act(x, conv)
        # What FSDP2's gathering does: 1 % of the elements, and no version counts it.
        edited = torch.rand(conv.weight.shape, generator=s.generator) < 0.01
        conv.weight.data[edited] += 1
        noticed += not torch.equal(resnet_fused.conv_bn_act(x, conv), before)
    assert noticed >= 36


def test_no_weight_comes_to_lie_where_a_packed_one_died() -> None:
    """Breaks if a packing outlives the weight it was made from where nobody watches that, as in
    compiled code: the next model may lie there, and differ in elements that are not looked at.
    """
    library = _extension._library
    assert library is not None
    gc.collect()
    before = library.resnet_fused_pack_bytes()
    s = Source(torch.bfloat16)
    x, base = s.image(1, 64, 6, 6), s.conv(64, 64, 3)
    op = torch.ops.resnet_fused.conv_bn_act.default
    for k in range(64):
        weight = base.weight.clone()
        weight[k, 3, 1, 1] += 4
        conv = base._replace(weight=weight)
        got = op(x, *cb.flatten(conv), None, False)
        want = _expect(x, conv)
        assert (got.float() - want).abs().max() < 0.03 * want.abs().max(), k
        del weight, conv
    held = library.resnet_fused_pack_bytes() - before
    assert held == 64 * 2 * base.weight.numel() * 2, "packings and weights are kept, and counted"
    # Whoever calls the function with such a weight has it watched.
    weight = base.weight.clone()
    op(x, *cb.flatten(base._replace(weight=weight)), None, False)
    resnet_fused.conv_bn_act(x, base._replace(weight=weight))
    del weight
    gc.collect()
    assert library.resnet_fused_pack_bytes() - before == held


def test_geometry_is_part_of_the_key() -> None:
    """Breaks if one weight used with two strides shares a packing."""
    s = Source(torch.float32)
    x, conv = s.image(1, 32, 9, 9), s.conv(32, 32, 3)
    for stride, dilation in ((1, 1), (2, 1), (1, 2), (2, 2), (1, 1)):
        changed = conv._replace(stride=(stride, stride), dilation=(dilation, dilation))
        got = resnet_fused.conv_bn_act(x, changed, relu=False)
        torch.testing.assert_close(got, _expect(x, changed), rtol=1e-5, atol=1e-5)


def test_packings_die_with_their_weights() -> None:
    """Breaks if a process that loads model after model keeps every packing."""
    library = _extension._library
    assert library is not None
    gc.collect()
    before = library.resnet_fused_pack_bytes()
    s = Source(torch.bfloat16)
    for _ in range(3):
        convs = [s.conv(64, 64, 3) for _ in range(4)]
        for conv in convs:
            resnet_fused.conv_bn_act(s.image(1, 64, 6, 6), conv)
        assert library.resnet_fused_pack_bytes() >= before + 4 * 64 * 64 * 9 * 2
        del convs, conv
        gc.collect()
        assert library.resnet_fused_pack_bytes() <= before


def test_packings_die_with_the_storage_of_a_parameter() -> None:
    """Breaks if a model that changes its dtype keeps the packings of the memory it left."""
    library = _extension._library
    assert library is not None
    gc.collect()
    before = library.resnet_fused_pack_bytes()
    model = resnet_fused.resnet18().eval()
    x = torch.randn(1, 3, 33, 33)
    with torch.no_grad():
        model(x)
        full = library.resnet_fused_pack_bytes()
        model.bfloat16()(x.bfloat16())
        assert library.resnet_fused_pack_bytes() - before < 0.6 * (full - before)
        # Refuses tensors that someone holds weak references to.
        torch.utils.swap_tensors(model.conv1.weight, torch.nn.Parameter(model.conv1.weight * 2))
    del model
    gc.collect()
    assert library.resnet_fused_pack_bytes() <= before


def test_new_sizes_do_not_pack_each_time(force_path: Any) -> None:
    """Breaks if images of ever new sizes pay for packing, or fill the memory with layouts."""
    library = _extension._library
    assert library is not None
    s = Source(torch.float32)
    with force_path("onednn"):
        conv = s.conv(32, 32, 3)
        resnet_fused.conv_bn_act(s.image(1, 32, 8, 8), conv)
        count, size = library.resnet_fused_pack_count(), library.resnet_fused_pack_bytes()
        for n in range(9, 30):
            x = s.image(1, 32, n, n + 1)
            got = resnet_fused.conv_bn_act(x, conv, relu=False)
            torch.testing.assert_close(got, _expect(x, conv), rtol=1e-5, atol=1e-5)
        # One that serves every size.
        assert library.resnet_fused_pack_count() == count + 1
        for n in range(9, 19):
            for _ in range(2):  # an image and its mirror image
                resnet_fused.conv_bn_act(s.image(1, 32, n, n), conv)
        assert library.resnet_fused_pack_count() == count + 1
        for n in range(9, 19):
            for _ in range(4):
                resnet_fused.conv_bn_act(s.image(1, 32, n, n), conv)
        assert library.resnet_fused_pack_count() > count + 5
        assert library.resnet_fused_pack_bytes() <= size + 4 * conv.weight.numel() * 4


@pytest.mark.parametrize("path", ["auto", "onednn", "portable"])
def test_tensors_with_and_without_version_share_memory(path: str, force_path: Any) -> None:
    """Breaks if what was learned of one tensor, that it counts its versions, is believed of an
    inference tensor at the same address; the 1 element that changes lies between samples.
    """
    s = Source(torch.float32)
    x, conv = s.image(1, 64, 6, 6), s.conv(64, 64, 3)
    with force_path(path):
        for i in range(3):
            with torch.inference_mode():
                alias = torch.from_numpy(conv.weight.numpy())
                assert alias.is_inference() and alias.data_ptr() == conv.weight.data_ptr()
                y = resnet_fused.conv_bn_act(x, conv)
                assert torch.equal(resnet_fused.conv_bn_act(x, conv._replace(weight=alias)), y)
                alias[1, 2, 1, 1] += 10 * (1 + i)
                z = resnet_fused.conv_bn_act(x, conv._replace(weight=alias))
            with resnet_fused.backend("reference"):
                want = resnet_fused.conv_bn_act(x, conv)
            assert (z - want).abs().max() < 1e-4 * want.abs().max()
            conv.weight.mul_(1.0)  # a new version: a sampled tensor's owner must say so
