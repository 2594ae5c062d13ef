# SPDX-License-Identifier: BSD-3-Clause
"""Hooks on a fused model fire with the tensors that eager gives them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils import _pytree as pytree

import fuse_zoo
from fuse_spy import ALL, calls, close, make
from fuse_zoo import Basic, Bottle, HelperBlock, image, randomise
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


HOOKS: dict[str, Callable[[nn.Module, Callable[..., None]], Any]] = {
    "register_forward_hook": lambda m, note: m.register_forward_hook(
        lambda mod, args, y: note(args, y)
    ),
    "register_forward_pre_hook": lambda m, note: m.register_forward_pre_hook(
        lambda mod, args: note(args)
    ),
    "register_full_backward_hook": lambda m, note: m.register_full_backward_hook(
        lambda mod, gin, gout: note(gin, gout)
    ),
    "register_full_backward_pre_hook": lambda m, note: m.register_full_backward_pre_hook(
        lambda mod, gout: note(gout)
    ),
}
BLOCKS = {
    "basic": lambda: Basic(4, 6, 2),
    "bottleneck": lambda: Bottle(4, 4, 8, 2),
    "helpers": lambda: HelperBlock(4, 4, 8, 2),
}


def record(model: nn.Module, names: list[str], kind: str, x: Tensor) -> Any:
    """What hooks on the named submodules see, in order, and the result; the error if there is one:
    eager refuses some backward hooks where something works in place.
    """
    seen: list[Any] = []

    def note(name: str) -> Callable[..., None]:
        def call(*values: Any) -> None:
            flat = [v.detach().clone() for v in pytree.tree_leaves(values) if v is not None]
            seen.append((name, flat))

        return call

    handles = [HOOKS[kind](model.get_submodule(name), note(name)) for name in names]
    try:
        y = model(x.clone().requires_grad_())
        y.square().sum().backward()
        return [*seen, ("result", [y.detach()])]
    except RuntimeError as error:
        return str(error)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("block", BLOCKS)
def test_hooked_block_is_eager_bit_for_bit(block: str, kind: str, calls: list[str]) -> None:
    """A block steps down in part only, so a hook fires too often, or sees other bits than eager."""
    plain = randomise(BLOCKS[block]())
    for m in plain.modules():
        if isinstance(m, nn.ReLU):
            m.inplace = False
    fused = fuse(plain)
    x = image(c=4)
    answers = 0
    for name in submodules(plain):
        want, got = (record(m, [name], kind, x) for m in (plain, fused))
        assert calls == [], name
        assert all(not r.fused and "hook on" in r.reason for r in report_under(fused, name, kind))
        if isinstance(want, str):
            assert got == want, name
            continue
        answers += 1
        assert [n for n, _ in got] == [n for n, _ in want] and len(want) > 1, name
        for (_, a), (_, b) in zip(got, want, strict=True):
            assert len(a) == len(b) and all(map(torch.equal, a, b)), name
    assert answers > 3
    record(fused, [], kind, x)
    assert len(calls) == 1, "the hooks are gone, and the block is still plain"


def report_under(model: nn.Module, name: str, kind: str) -> list[Any]:
    """The report's rows while a hook is there."""
    handle = HOOKS[kind](model.get_submodule(name), lambda *values: None)
    rows = report(model).rows
    handle.remove()
    return rows


def test_hooks_on_every_module_at_once(calls: list[str]) -> None:
    """Names change, a module is called twice or not at all, or one call is not eager's."""
    plain = make()
    fused = fuse(plain)
    assert [n for n, _ in fused.named_modules()] == [n for n, _ in plain.named_modules()]
    want, got = (
        record(m, submodules(plain), "register_forward_hook", image()) for m in (plain, fused)
    )
    assert calls == [] and [n for n, _ in got] == [n for n, _ in want]
    for (name, a), (_, b) in zip(got, want, strict=True):
        assert all(map(torch.equal, a, b)), name


def cam_by_hooks(model: nn.Module, stage: nn.Module, x: Tensor) -> Tensor:
    """Grad-CAM as its packages do it: a forward and a backward hook on the last stage."""
    kept: dict[str, Tensor] = {}
    handles = (
        stage.register_forward_hook(lambda m, args, y: kept.update(a=y)),
        stage.register_full_backward_hook(lambda m, gin, gout: kept.update(g=gout[0])),
    )
    model(x)[:, 1].sum().backward()
    for handle in handles:
        handle.remove()
    return (kept["a"] * kept["g"].mean((2, 3), keepdim=True)).sum(1).relu().detach()


def cam_by_retain_grad(model: nn.Module, stage: nn.Module, x: Tensor) -> Tensor:
    """Grad-CAM by retain_grad on the stage's output."""
    kept: list[Tensor] = []

    def keep(m: nn.Module, args: Any, y: Tensor) -> None:
        y.retain_grad()
        kept.append(y)

    handle = stage.register_forward_hook(keep)
    model(x)[:, 1].sum().backward()
    handle.remove()
    grad = kept[0].grad
    assert grad is not None
    return (kept[0] * grad.mean((2, 3), keepdim=True)).sum(1).relu().detach()


@pytest.mark.parametrize("cam", [cam_by_hooks, cam_by_retain_grad])
def test_grad_cam(cam: Callable[..., Tensor], calls: list[str]) -> None:
    """The stage's output has no gradient, or a hook on a whole stage makes its blocks plain."""
    plain = make()
    fused = fuse(plain)
    want = cam(plain, plain.layer1, image())
    close(cam(fused, fused.layer1, image()), want)
    assert calls == ALL and want.max() > 0
