# SPDX-License-Identifier: BSD-3-Clause
"""Calls that go by what an earlier one saw: whatever changed since then counts, and nothing is
looked at closely without need.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules import module as global_hooks

import fuse_zoo
from fuse_spy import close
from fuse_zoo import Basic, Net, randomise
from resnet_cases import plain, plain_block, small
from resnet_fused import modules, ready
from resnet_fused.fuse import fuse, unfuse

one_thread = fuse_zoo.one_thread

__all__ = ["one_thread"]  # a fixture

SIZE = (2, 64, 7, 5)


class Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5


def halve(module: nn.Module, *args: Any) -> Tensor:
    """A forward hook: what it is given last is the output."""
    return args[-1] * 0.5


def _attribute(name: str, attribute: str, value: Any) -> Callable[[Any], None]:
    return lambda block: setattr(block.get_submodule(name), attribute, value)


def _parameter(name: str, attribute: str) -> Callable[[Any], None]:
    def change(block: Any) -> None:
        m = block.get_submodule(name)
        setattr(m, attribute, nn.Parameter(getattr(m, attribute).detach() * 1.5 + 0.1))

    return change


def _new_hooks(block: Any) -> None:
    block.conv1._forward_hooks = OrderedDict()  # as some code removes hooks
    block.conv1.register_forward_hook(halve)


def _statistics(block: Any) -> None:
    block.bn1._buffers["running_mean"] = block.bn1.running_mean + 1


def _swapped(block: Any) -> None:
    block.conv1.weight.data = block.conv1.weight.data * 2


def _in_place(block: Any) -> None:
    with torch.no_grad():
        block.bn2.running_var.mul_(3)


def _class(block: Any) -> None:
    class Twice(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    block.conv2.__class__ = Twice


CHANGES: dict[str, Callable[[Any], Any]] = {
    "hook": lambda b: b.conv1.register_forward_hook(halve),
    "hook behind the block": lambda b: b.register_forward_hook(halve),
    "hooks in a new dictionary": _new_hooks,
    "hook on the ReLU": lambda b: b.relu.register_forward_hook(halve),
    "stride": _attribute("conv2", "dilation", (2, 2)),
    "padding mode": _attribute("conv2", "padding_mode", "circular"),
    "eps": _attribute("bn1", "eps", 0.5),
    "another weight": _parameter("conv1", "weight"),
    "another gamma": _parameter("bn2", "weight"),
    "memory of a weight": _swapped,
    "another mean": _statistics,
    "variance in place": _in_place,
    "another child": lambda b: setattr(b, "relu", nn.Hardtanh(0, 1)),
    "another convolution": lambda b: setattr(
        b, "conv2", randomise(nn.Conv2d(64, 64, 3, padding=1), 7)
    ),
    "class of a child": _class,
    "one child in two places": lambda b: setattr(b, "bn2", b.bn1),
}
# dilation 2 with padding 1 makes the result smaller: the block must fail as its modules do.
FAILS = {"stride"}


def native() -> tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]:
    """A block of the package's own models, and what it must give."""
    return small().layer1[1], plain_block


def planned() -> tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]:
    """Somebody's block with a fused forward."""
    model = fuse(randomise(Basic(64, 64)))
    return model, lambda m, x: unfuse(copy.deepcopy(m))(x)


@pytest.mark.parametrize("kind", [native, planned])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_calls_counts(change: str, kind: Callable[[], Any]) -> None:
    """A call that trusts what the one before it saw."""
    block, expect = kind()
    block.eval()
    x = torch.randn(SIZE, generator=torch.Generator().manual_seed(3))
    for _ in range(3):
        before = block(x)
    CHANGES[change](block)
    hooks = [h for h in block._forward_hooks.values()]
    if change in FAILS:
        for _ in range(2):
            with pytest.raises(RuntimeError):
                block(x)
        return
    want = expect(block, x)
    if kind is native and hooks:  # plain_block calls the children, not the block
        want = want * 0.5
    for _ in range(3):
        close(block(x), want)
    assert not torch.allclose(want, before, atol=1e-3)


@pytest.mark.parametrize("kind", [native, planned])
def test_modes_that_come_and_go(kind: Callable[[], Any]) -> None:
    """Training, a global hook, a BatchNorm that trains: plain meanwhile, then fused again."""
    block, expect = kind()
    block.eval()
    x = torch.randn(SIZE, generator=torch.Generator().manual_seed(3))
    want = expect(block, x)
    for _ in range(2):
        close(block(x), want)
        seen: list[type] = []
        handle = global_hooks.register_module_forward_hook(
            lambda m, a, y, seen=seen: seen.append(type(m))
        )
        block(x)
        handle.remove()
        assert nn.Conv2d in seen
        mean = block.bn1.running_mean.clone()
        block.bn1.train()
        block(x)
        assert not torch.equal(block.bn1.running_mean, mean)
        block.bn1.running_mean.copy_(mean)
        block.bn1.running_var.copy_(block.bn1.running_var)
        block.eval()
        want = expect(block, x)


def test_a_projection_gets_a_third_part() -> None:
    """The children of a Sequential are counted when they are two, and not again."""
    block = small().layer2[0]
    x = torch.randn(SIZE, generator=torch.Generator().manual_seed(3))
    before = [block(x) for _ in range(2)][1]
    assert isinstance(block.downsample, nn.Sequential)
    block.downsample.append(Half())
    want = plain_block(block, x)
    close(block(x), want)
    assert not torch.allclose(want, before, atol=1e-3)


@pytest.mark.parametrize("kind", [native, planned])
@pytest.mark.parametrize("way", ["copy", "deepcopy", "pickle", "save"])
def test_copies_look_for_themselves(way: str, kind: Callable[[], Any]) -> None:
    """A copy that goes by its original's modules."""
    block, expect = kind()
    block.eval()
    x = torch.randn(SIZE, generator=torch.Generator().manual_seed(3))
    before = [block(x) for _ in range(2)][1]
    if way == "copy":
        other = copy.copy(block)
        other._modules = dict(block._modules)
    elif way == "deepcopy":
        other = copy.deepcopy(block)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(block))
    else:
        file = io.BytesIO()
        torch.save(block, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    torch.testing.assert_close(other(x), before)
    other.conv2 = randomise(nn.Conv2d(64, 64, 3, padding=1, bias=False), 9)
    want = expect(other, x)
    for _ in range(2):
        close(other(x), want)
        torch.testing.assert_close(block(x), before)
    assert not torch.allclose(want, before, atol=1e-3)


@pytest.mark.parametrize("kind", [native, planned])
def test_modules_are_looked_at_once(
    kind: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first call's close look at every later one: a fifth of ResNet-50's time at batch 1."""
    block, _ = kind()
    block.eval()
    looked: list[str] = []
    look = modules.why_not_fusible

    def spy(module: nn.Module) -> str | None:
        looked.append(type(module).__name__)
        return look(module)

    monkeypatch.setattr(modules, "why_not_fusible", spy)
    x = torch.randn(SIZE)
    block(x)
    assert looked
    looked.clear()
    for n in range(1, 4):
        block(torch.randn(n, *SIZE[1:]))
    assert not looked
    block.bn1.eps *= 2
    block(x)
    assert looked


def test_a_whole_network_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a fused network with every pattern no part is looked at again."""
    model = fuse(randomise(Net(Basic(8, 8), Basic(8, 16, 2))).eval())
    x = fuse_zoo.image()
    want = model(x)
    monkeypatch.setattr(modules, "why_not_fusible", lambda module: "it was looked at")
    assert torch.equal(model(x), want)


def test_tensors_replaced_at_every_call() -> None:
    """functional_call: right every time, and what never holds is no longer prepared."""
    block, x = small().layer1[1], torch.randn(SIZE, generator=torch.Generator().manual_seed(3))
    for i in range(40):
        weight = block.conv1.weight.detach() * (1 + i)
        y = functional_call(block, {"conv1.weight": weight}, (x,))
        twin = copy.deepcopy(block)
        twin.conv1.weight = nn.Parameter(weight)
        close(y, plain_block(twin, x))
    assert isinstance(block.__dict__[ready.NAME + "block"], int)


def test_an_absent_attribute_appears() -> None:
    """A forward set on an instance, which eager calls."""
    block, expect = planned()
    block.eval()
    x = torch.randn(SIZE, generator=torch.Generator().manual_seed(3))
    for _ in range(2):
        before = block(x)
    conv: Any = block.conv1
    conv.forward = lambda x: nn.Conv2d.forward(conv, x) * 2
    want = expect(block, x)
    close(block(x), want)
    assert not torch.allclose(want, before, atol=1e-3)


@pytest.mark.parametrize("kind", [native, planned])
def test_export_and_compile_of_a_called_module(kind: Callable[[], Any]) -> None:
    """Whoever looks into a module's attributes meets what was kept, and it holds the module."""
    block, _ = kind()
    block.eval()
    x = torch.randn(SIZE, generator=torch.Generator().manual_seed(3))
    want = [block(x) for _ in range(2)][1].detach()
    program = torch.export.export(block, (x,), strict=False)
    torch.testing.assert_close(program.module()(x).detach(), want)
    assert not any("ready" in name for name, _ in program.named_parameters())
    assert list(block.state_dict()) == list(copy.deepcopy(block).state_dict())
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x).detach(), want)


@pytest.mark.parametrize("kind", [native, planned])
def test_a_called_model_dies_with_its_last_reference(kind: Callable[[], Any]) -> None:
    """A cycle that waits for the collector: the weights, and packed ones, would pile up."""
    block = kind()[0]
    block.eval()
    gc.collect()  # what fuse() needed
    for _ in range(2):
        block(torch.randn(SIZE))
    alive = weakref.ref(block.conv1)
    gc.disable()
    try:
        del block
        assert alive() is None
    finally:
        gc.enable()


def test_training_lets_go_of_what_was_kept() -> None:
    """A replaced layer that lives on beside the new one for as long as the model is trained."""
    block = small().layer1[1]
    block(torch.randn(SIZE))
    old = weakref.ref(block.conv1)
    block.conv1 = nn.Conv2d(64, 64, 3, padding=1, bias=False)
    block.train()
    block(torch.randn(SIZE))
    gc.collect()
    assert old() is None


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("kind", [native, planned])
def test_a_change_while_the_modules_are_looked_at(
    kind: Callable[[], Any], before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread replaces a weight just before or after the picture is taken."""
    block, expect = kind()
    block.eval()
    x = torch.randn(SIZE, generator=torch.Generator().manual_seed(3))
    new = nn.Parameter(block.conv1.weight.detach() * 1.5)
    take = ready.Unchanged.__init__

    def disturbed(self: Any, *args: Any) -> None:
        if before:
            block.conv1.weight = new
        take(self, *args)
        block.conv1.weight = new

    monkeypatch.setattr(ready.Unchanged, "__init__", disturbed)
    block(x)
    monkeypatch.undo()
    assert block.conv1.weight is new
    want = expect(block, x)
    for _ in range(3):
        close(block(x), want)


def _new_modules(block: Any, other: Any) -> None:
    block._modules = dict(other._modules)


def _new_dictionary(block: Any, other: Any) -> None:
    block.conv1.__dict__ = other.conv1.__dict__


@pytest.mark.parametrize("change", [_new_modules, _new_dictionary])
@pytest.mark.parametrize("kind", [native, planned])
def test_a_dictionary_is_replaced(
    kind: Callable[[], Any], change: Callable[[Any, Any], None]
) -> None:
    """The module's own dictionaries, not those it had, say what it has."""
    (block, expect), (other, _) = kind(), kind()
    block.eval()
    randomise(other, 8).eval()
    x = torch.randn(SIZE, generator=torch.Generator().manual_seed(3))
    before = [block(x) for _ in range(2)][1]
    change(block, other)
    want = expect(block, x)
    for _ in range(2):
        close(block(x), want)
    assert not torch.allclose(want, before, atol=1e-3)


def test_a_list_that_changes_in_place() -> None:
    """A pool whose sizes are lists, which stay the same object."""
    model = small()
    pool: Any = nn.MaxPool2d([3, 3], [2, 2], [1, 1])  # type: ignore[arg-type]
    model.maxpool = pool
    x = torch.randn(2, 3, 32, 32)
    for _ in range(2):
        before = model(x)
    pool.kernel_size[0], pool.padding[0] = 2, 0
    want = plain(model, x)
    close(model(x), want)
    assert not torch.allclose(want, before, atol=1e-3)
