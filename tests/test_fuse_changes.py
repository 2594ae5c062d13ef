# SPDX-License-Identifier: BSD-3-Clause
"""A fused model that is changed, copied, pickled or shared by threads."""

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

import fuse_zoo
from fuse_spy import ALL, calls, close, make
from fuse_zoo import Basic, Bottle, ConvNorm, DataDependent, Net, image, randomise
from resnet_fused.fuse import fuse, unfuse
from resnet_fused.modules import Fused
from resnet_fused.report import report

one_thread = fuse_zoo.one_thread

__all__ = ["calls", "one_thread"]  # fixtures


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


def test_graph_module(calls: list[str]) -> None:
    """A fused torch.fx.GraphModule, as feature extractors are, cannot be copied, pickled or edited:
    it keeps its code in its class, which fuse() replaces.
    """
    plain = torch.fx.symbolic_trace(make()).eval()
    cls = type(plain)
    again = [copy.deepcopy, fuse]
    try:
        pickle.dumps(plain)
        again.append(lambda m: pickle.loads(pickle.dumps(m)))
    except AttributeError:  # torch 2.13 cannot
        pass
    fused = fuse(plain, inplace=True)
    with torch.no_grad():
        want = fused(image())
        assert calls == ALL
        for c in (make_again(fused) for make_again in again):
            calls.clear()
            c.eval()  # torch.fx's own copies forget the mode
            assert torch.equal(c(image()), want) and calls == ALL
            assert list(c.state_dict()) == list(fused.state_dict())
            assert not isinstance(unfuse(c), Fused)
            close(c(image()), want)
        output = next(n for n in fused.graph.nodes if n.op == "output")
        with fused.graph.inserting_before(output):
            output.replace_input_with(
                output.args[0], fused.graph.call_function(torch.neg, (output.args[0],))
            )
        fused.recompile()
        calls.clear()
        assert torch.equal(fused(image()), -want) and calls == ALL
    assert type(unfuse(fused)) is cls


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
