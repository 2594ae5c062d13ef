# SPDX-License-Identifier: BSD-3-Clause
"""Hooks on a fused model fire with the tensors that eager gives them."""

from __future__ import annotations

import pytest
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import fuse_zoo
from fuse_spy import ALL, calls, close, make
from fuse_zoo import image
from resnet_fused.fuse import fuse
from resnet_fused.report import report

one_thread = fuse_zoo.one_thread

__all__ = ["calls", "one_thread"]  # fixtures


def submodules(m: nn.Module) -> list[str]:
    return [name for name, _ in m.named_modules() if name]


@pytest.mark.parametrize("name", submodules(make()))
def test_forward_hook_on_any_submodule(name: str, calls: list[str]) -> None:
    """A hook added after fuse does not fire, or is given values that eager would not give.

    Their memory format is channels_last inside a fused network.
    """
    plain = make()
    fused = fuse(plain)
    seen: list[list[Tensor]] = [[], []]
    for m, tensors in zip((plain, fused), seen, strict=True):
        module = m.get_submodule(name)
        module.register_forward_hook(lambda mod, args, y, t=tensors: t.extend([args[0].clone(), y]))
        m(image())
    assert len(seen[0]) == len(seen[1]) > 0
    for a, b in zip(*seen, strict=True):
        assert a.dtype == b.dtype
        close(b, a)
    assert "bottleneck" in calls or "basic_block" in calls, "everything stepped down"


def test_hooks_step_one_module_down_and_back(calls: list[str]) -> None:
    """The report does not name the hook, or the module stays plain after the hook is gone."""
    fused = fuse(make())
    handle = fused.layer1[0].conv2.register_forward_pre_hook(lambda m, args: None)
    rows = {r.name: r for r in report(fused)}
    assert rows["layer1.0.conv1"].reason == "a hook on 'conv2'" and rows["conv1"].fused
    fused(image())
    assert calls == [name for name in ALL if name != "basic_block"]
    handle.remove()
    calls.clear()
    fused(image())
    assert calls == ALL


def test_hook_that_changes_the_result_and_global_hook() -> None:
    """A hook's return value is ignored; a hook on all modules misses those inside a fused call."""
    plain = make()
    fused = fuse(plain)
    for m in (plain, fused):
        m.layer1[1].layer[0].register_forward_hook(lambda mod, args, y: y * 2)
    close(fused(image()), plain(image()))
    names: list[list[str]] = [[], []]
    for m, seen in zip((plain, fused), names, strict=True):
        handle = register_module_forward_hook(
            lambda mod, args, y, seen=seen: seen.append(type(mod).__name__.removeprefix("Fused"))
        )
        m(image())
        handle.remove()
    assert names[0] == names[1]


def test_backward_hook() -> None:
    """Grad-CAM's hook on the last convolution sees no gradient."""
    plain = make()
    grads: list[Tensor] = []
    for m in (plain, fuse(plain)):
        m.layer1[2].conv3.register_full_backward_hook(lambda mod, gin, gout: grads.append(gout[0]))
        m(image()).sum().backward()
    close(grads[1], grads[0])
