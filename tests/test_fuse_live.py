# SPDX-License-Identifier: BSD-3-Clause
"""A fused model stays a model: weights are live, it trains, hooks fire, it can be copied."""

from __future__ import annotations

import copy
import io
import pickle
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import fuse_zoo
from fuse_zoo import Basic, Bottle, ConvNorm, DataDependent, HelperBlock, Net, image, randomise
from resnet_fused import ops
from resnet_fused.fuse import fuse, unfuse
from resnet_fused.report import report

one_thread = fuse_zoo.one_thread

OPS = ("conv_bn_act", "stem", "basic_block", "bottleneck", "pool_linear", "add_relu")


def make() -> Net:
    """Every pattern that a whole network has."""
    return randomise(Net(Basic(8, 8), HelperBlock(8, 4, 8), Bottle(8, 4, 16, 2)))  # type: ignore[return-value]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The fused ops that were called, so that a test sees which way a forward went."""
    seen: list[str] = []

    def spy(name: str, op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            seen.append(name)
            return op(*args, **kwargs)

        return call

    for name in OPS:
        monkeypatch.setattr(ops, name, spy(name, getattr(ops, name)))
    return seen


ALL = ["stem", "basic_block", "bottleneck", "bottleneck", "pool_linear"]


def close(a: Tensor, b: Tensor) -> None:
    """Equal but for float32 rounding in a dozen layers, relative to the largest value."""
    torch.testing.assert_close(a, b, rtol=0, atol=3e-6 * max(1.0, b.abs().max().item()))


def test_eval_calls_the_ops(calls: list[str]) -> None:
    """The report says fused, but the original forward runs."""
    model = fuse(make())
    model(image())
    assert calls == ALL
    calls.clear()
    model.train()(image())
    assert calls == []
    model.eval()
    unfuse(model)(image())
    assert calls == []


def change_data(m: nn.Module) -> None:
    for p in m.parameters():
        p.data.mul_(1.1)


def change_in_place(m: nn.Module) -> None:
    with torch.no_grad():
        for t in [*m.parameters(), *m.buffers()]:
            t.add_(1) if t.dtype == torch.long else t.mul_(1.1)


def change_state(m: nn.Module) -> None:
    m.load_state_dict(randomise(make(), seed=3).state_dict())


def change_assign(m: nn.Module) -> None:
    m.load_state_dict(randomise(make(), seed=3).state_dict(), assign=True)


def change_parameter(m: nn.Module) -> None:
    for sub in m.modules():
        if isinstance(sub, nn.Conv2d):
            sub.weight = nn.Parameter(sub.weight.detach() * 0.9)
        if isinstance(sub, nn.BatchNorm2d):
            sub.running_mean = sub.running_mean + 0.1
            sub.eps = 0.01


def change_child(m: nn.Module) -> None:
    m.layer1[0].conv1 = nn.Conv2d(8, 8, 5, padding=2)
    down = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16))
    m.layer1[2].identity_downsample = down
    m.fc = nn.Linear(16, 3)
    randomise(m)


CHANGES: list[Callable[[nn.Module], Any]] = [  # the last two change no value
    change_data,
    change_in_place,
    change_state,
    change_assign,
    change_parameter,
    change_child,
    lambda m: m.double(),
    lambda m: m.to(memory_format=torch.channels_last),
]


@pytest.mark.parametrize("change", CHANGES)
def test_weights_are_live(change: Callable[[nn.Module], Any], calls: list[str]) -> None:
    """A copy of the weights made by fuse or by an earlier call is used after they changed."""
    plain = make()
    fused = fuse(plain)
    before = fused(image())
    for m in (plain, fused):
        change(m)
    x = image().to(next(plain.parameters()).dtype)
    calls.clear()
    with torch.no_grad():
        got, want = fused(x), plain(x)
    assert calls == ALL
    close(got, want)
    if change not in CHANGES[-2:]:
        assert got.shape != before.shape or not torch.allclose(got, before)


def test_half() -> None:
    """.half() is ignored by the fused forward."""
    plain = make()
    fused = fuse(plain).half()
    y = fused(image().half())
    assert y.dtype == torch.float16
    # 20 roundings to 11 bits, against the values before them
    torch.testing.assert_close(y.float(), plain(image()), rtol=0, atol=20 * 2**-11 * 4)


def test_trains_as_the_original(calls: list[str]) -> None:
    """Train mode is not the original code: a weight or BatchNorm buffer differs in a bit."""
    plain = make()
    models = [plain, fuse(plain)]
    for m in models:
        m.train()
        step = torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9)
        g = torch.Generator().manual_seed(0)
        for _ in range(5):
            x = torch.randn(4, 3, 20, 20, generator=g)
            step.zero_grad()
            m(x).square().mean().backward()
            step.step()
    assert calls == []
    for (name, a), (_, b) in zip(*(m.state_dict().items() for m in models), strict=True):
        assert torch.equal(a, b), name
    plain.eval()
    models[1].eval()
    with torch.no_grad():
        close(models[1](image()), plain(image()))
    assert calls == ALL


def test_frozen_batchnorm_while_training(calls: list[str]) -> None:
    """A block in train mode with BatchNorms in eval mode uses or changes the wrong statistics."""
    plain = make()
    models = [plain, fuse(plain)]
    for m in models:
        m.train()
        for bn in m.modules():
            if isinstance(bn, nn.BatchNorm2d):
                bn.eval()
        m(image()).sum().backward()
    assert calls == []
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_one_batchnorm_in_train_mode(calls: list[str]) -> None:
    """A single BatchNorm that still learns is frozen by the fused call around it."""
    plain = make()
    models = [plain, fuse(plain)]
    for m in models:
        m.layer1[0].bn1.train()
        m(image())
    close(models[1].layer1[0].bn1.running_mean, models[0].layer1[0].bn1.running_mean)
    assert not torch.equal(models[0].layer1[0].bn1.running_mean, make().layer1[0].bn1.running_mean)
    assert calls == [name for name in ALL if name != "basic_block"]
    row = next(r for r in report(models[1]) if r.name == "layer1.0.conv1")
    assert not row.fused and row.reason == "'bn1' is in training mode"


class ReadsMode(nn.Module):
    """Its forward asks for its own mode, which differs from its children's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return y * 2 if self.training else y.relu()


@pytest.mark.parametrize("nested", [False, True])
def test_mode_of_the_module_alone(nested: bool, calls: list[str]) -> None:
    """The plan for eval mode runs in train mode, because every child is in eval mode."""
    plain = randomise(nn.Sequential(ReadsMode(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    fused = fuse(plain)
    for mode in (True, False, True):
        for m in (plain, fused):
            (m[0] if nested else m).training = mode
        close(fused(image()), plain(image()))
    if nested:
        assert calls == ["conv_bn_act"] * 2  # once, in eval mode


def test_helper_in_train_mode_again_and_again(calls: list[str]) -> None:
    """A mode counts as a change of the module, and after a few calls the module is given up."""
    fused = fuse(make())
    for mode in [True, False] * 20:
        fused.layer1[1].layer[0].train(mode)
        fused(image())
    calls.clear()
    fused(image())
    assert calls == ALL


def test_gradients() -> None:
    """Gradients in eval mode differ from the original's in float64."""
    plain = make().double()
    fused = fuse(plain)
    xs = [image().double().requires_grad_() for _ in range(2)]
    for m, x in zip((plain, fused), xs, strict=True):
        m(x).square().sum().backward()
    torch.testing.assert_close(xs[1].grad, xs[0].grad)
    for (name, a), (_, b) in zip(*(m.named_parameters() for m in (plain, fused)), strict=True):
        torch.testing.assert_close(b.grad, a.grad, msg=name)


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


class Switch(nn.Module):
    """Control flow on attributes of every kind that people change afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = ConvNorm(3, 4, 3), ConvNorm(4, 4, 3)
        self.skip, self.order, self.act = False, ["a", "b"], nn.ReLU()
        self.gain = torch.tensor(1.0)
        self.register_parameter("bias", None)

    def last(self, x: Tensor) -> Tensor:
        return self.act(x)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.order:
            x = getattr(self, name)(x)
        if self.bias is not None:
            x = x + self.bias
        return x if self.skip else self.last(x) * self.gain


def test_attributes_changed_after_fuse(calls: list[str]) -> None:
    """The plan goes on with an attribute, method or child that is no longer there."""

    def set_gain(m: Switch) -> None:
        m.gain = torch.tensor(3.0)

    steps: list[Callable[[Switch], Any]] = [
        lambda m: setattr(m, "skip", True),
        lambda m: m.order.append("b"),
        lambda m: setattr(m, "skip", False),
        lambda m: setattr(m, "act", nn.Sigmoid()),
        lambda m: setattr(m, "last", torch.neg),
        lambda m: setattr(m.a, "act", nn.Identity()),
        lambda m: setattr(m.b, "forward", lambda x: x * 2),
        set_gain,
        lambda m: setattr(m, "bias", nn.Parameter(torch.ones(1))),
        lambda m: setattr(m, "bias", None),
        lambda m: setattr(m, "order", ["a"]),
    ]
    plain = randomise(Switch())
    fused = fuse(plain)
    for step in steps:
        for m in (plain, fused):
            step(m)  # type: ignore[arg-type]
        close(fused(image()), plain(image()))
    assert calls[-1:] == ["conv_bn_act"]


def test_class_patched_after_fuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward put on a class later is not seen by the fused modules of that class."""
    plain = make()
    fused = fuse(plain)
    monkeypatch.setattr(Basic, "forward", lambda self, x: self.relu(self.bn2(self.conv2(x))))
    close(fused(image()), plain(image()))
    rows = {r.name: r for r in report(fused)}
    assert rows["layer1.0.conv2"].pattern == "conv_bn_act" and rows["layer1.0.conv2"].fused


def test_attribute_that_keeps_changing(calls: list[str]) -> None:
    """Every call reads the forward again, for ever."""
    fused: Any = fuse(randomise(Switch()))
    for i in range(40):
        fused.skip = bool(i % 2)
        fused(image())
    assert 0 < len(calls) < 60
    assert report(fused)[0].reason == "Switch: its attributes or children keep changing"


def test_replicas(calls: list[str]) -> None:
    """DataParallel's replicas, whose weights are no parameters, use the original's weights."""
    plain = make()
    fused = fuse(plain)

    def replicate(module: nn.Module) -> nn.Module:
        copy = module._replicate_for_data_parallel()
        for name, child in module._modules.items():
            copy._modules[name] = None if child is None else replicate(child)
        for name, p in module._parameters.items():
            copy._parameters.pop(name, None)
            if p is None:
                copy._parameters[name] = None
            else:
                setattr(copy, name, p * 2)
        return copy

    with torch.no_grad():
        close(replicate(fused)(image()), replicate(plain)(image()))


def test_deepcopy_and_pickle(calls: list[str]) -> None:
    """A copy is not fused, shares weights or differs; a saved model does not load."""
    fused = fuse(make())
    fused.layer1[0].fused_attribute = ["kept"]
    want = fused(image())
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(fused),
        pickle.loads(pickle.dumps(fused)),
        torch.load(buffer, weights_only=False),
        copy.deepcopy(copy.deepcopy(fused)),
    ]
    for c in copies:
        calls.clear()
        assert type(c) is type(fused) and c.layer1[0].fused_attribute == ["kept"]
        assert torch.equal(c(image()), want) and calls == ALL
        with torch.no_grad():
            c.conv1.weight.zero_()
        assert not torch.equal(c(image()), want)
        assert type(unfuse(c)) is Net
    assert torch.equal(fused(image()), want)


def test_state_dict_is_the_same() -> None:
    """A key, dtype, value or stride changes, or inference_mode leaves inference tensors behind."""
    plain = make().to(memory_format=torch.channels_last)
    with torch.inference_mode():
        fused = fuse(plain, inplace=True)
        fused(image())
    other = make().to(memory_format=torch.channels_last)
    for (name, a), (key, b) in zip(
        other.state_dict().items(), fused.state_dict().items(), strict=True
    ):
        assert name == key and a.dtype == b.dtype and a.stride() == b.stride()
        assert torch.equal(a, b) and not b.is_inference()
    fused.train()(image()).sum().backward()


def test_threads() -> None:
    """Threads that share a model disturb each other, also while one of them makes a new plan."""
    fused: Any = fuse(randomise(DataDependent(Basic(8, 8), Bottle(8, 4, 16, 2))))
    xs = [image(seed=i) for i in range(8)]
    want = [fused(x) for x in xs]
    fused.layer1[0].bn1 = copy.deepcopy(fused.layer1[0].bn1)
    fused.layer1[0].relu = nn.ReLU()  # makes the plan out of date
    got: list[Any] = [None] * 8
    interval = sys.getswitchinterval()

    def run(i: int) -> None:
        for _ in range(3):
            got[i] = fused(xs[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    sys.setswitchinterval(1e-5)
    try:
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        sys.setswitchinterval(interval)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
