# SPDX-License-Identifier: BSD-3-Clause
"""graphed, without a GPU: arguments and outputs, and the calls that no graph can stand for."""

from __future__ import annotations

import sys
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fused
from fake_graphs import FakeCuda
from graph_models import Calls, Small, images, ready
from resnet_fused.graphs import capture

pytestmark = pytest.mark.usefixtures("cuda")


Pair = namedtuple("Pair", "a b")


def test_nested_arguments_and_outputs(cuda: FakeCuda) -> None:
    """An output in another structure than the forward's; keywords or numbers that are mixed up."""

    def forward(self: Any, x: Tensor, *, other: dict[str, Any], sign: float) -> Any:
        y = self.fc(x) * sign
        return {"a": (y, [y + other["b"]], None), "p": Pair(y, "text"), "n": x.shape[0]}

    model = Calls(forward).eval()
    handle = resnet_fused.graphed(model)
    for sign in (1, 1.0, True, 1, 1.0, True, -0.0, 1, 1.0, True):
        x, b = torch.randn(2, 4), torch.randn(4)
        got, want = (f(x, other={"b": b}, sign=sign) for f in (handle, model))
        assert torch.equal(got["a"][0], want["a"][0]) and torch.equal(
            got["a"][1][0], want["a"][1][0]
        )
        assert type(got["p"]) is Pair and got["p"].b == "text" and got["n"] == 2
        assert got["a"][2] is None and type(got["a"][1]) is list
    assert got["p"].a is got["a"][0]  # one tensor, as in eager
    assert cuda.captures() == 3 and cuda.replays() == 3


def unchanged(result: Any) -> Callable[..., Any]:
    return lambda self, x: result(self, x)


class Sub(Tensor):
    pass


def _change_input(self: Any, x: Tensor) -> Tensor:
    return x.relu_() + 1


def _count(self: Any, x: Tensor) -> Tensor:
    self.count = getattr(self, "count", 0) + 1
    return x + 1


def _fail(self: Any, x: Tensor) -> Tensor:
    if capture.underway():
        raise KeyError("no such thing")
    return x + 1


IMPOSSIBLE: dict[str, tuple[Callable[..., Any], str]] = {
    "item": (lambda self, x: x * x.sum().item(), "depends on values"),
    "if": (lambda self, x: x if x.sum() > 0 else -x, "depends on values"),
    "mask": (lambda self, x: x[x > 0], "depends on values"),
    "nonzero": (lambda self, x: x.nonzero(), "depends on values"),
    "other device": (lambda self, x: torch.ones(2, device="meta"), "a tensor on 'meta'"),
    "input changed": (_change_input, "changes its input"),
    "own state": (_count, "the model was changed while its forward ran"),
    "batch statistics": (
        lambda self, x: nn.functional.batch_norm(x, None, None, training=True),
        "BatchNorm in training mode",
    ),
    "output": (lambda self, x: (x, object()), "an output is a object"),
    "error": (_fail, "KeyError: 'no such thing'"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible_forwards_run_as_before_with_one_warning(name: str, cuda: FakeCuda) -> None:
    """A wrong result, a warning at every call, a capture at every call, a stream that stays."""
    forward, reason = IMPOSSIBLE[name]
    model = Calls(forward).eval()
    handle = resnet_fused.graphed(model)
    handle(torch.randn(2, 4))
    with pytest.warns(UserWarning, match=f"Calls is called without a CUDA graph: .*{reason}"):
        handle(torch.randn(2, 4))
    for _ in range(5):
        x = torch.randn(2, 4)
        got, want = handle(x.clone()), model(x.clone())
        got, want = (y[0] if isinstance(y, tuple) else y for y in (got, want))
        assert got.is_meta or torch.equal(got, want)
    assert (cuda.captures(), cuda.replays(), cuda.alive) == (1, 0, set())
    assert cuda.current_stream() is cuda.default


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "device": (lambda: torch.ones(2, 4, device="meta"), "on 'meta', and graphs run on 'cpu'"),
    "subclass": (lambda: torch.ones(2, 4).as_subclass(Sub), "an argument is a Sub"),
    "sparse": (lambda: torch.ones(2, 4).to_sparse(), "strided"),
    "none": (lambda: 3, "no argument is a tensor"),
    "object": (lambda: [torch.ones(2, 4), object()], "an argument is a object"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_impossible_arguments_run_as_before_with_one_warning(name: str, cuda: FakeCuda) -> None:
    """A graph that reads an argument where it is not, or takes it for a constant."""
    make, reason = REFUSED[name]
    handle = resnet_fused.graphed(Calls(lambda self, x: x).eval())
    x = make()
    with pytest.warns(UserWarning, match=reason):
        assert handle(x) is x
    assert all(handle(x) is x for _ in range(4)) and cuda.captures() == 0


def test_empty_tensors_run_as_before(cuda: FakeCuda) -> None:
    """A graph of nothing, of which CUDA warns."""
    handle = resnet_fused.graphed(Small().eval())
    assert all(handle(torch.ones(0, 3, 5, 5)).shape == (0, 4) for _ in range(4))
    assert cuda.captures() == 0


# ------------------------------------------------------------------------------- modes and hooks
def test_training_and_hooks_run_as_before(cuda: FakeCuda) -> None:
    """Statistics that are not updated, hooks that do not run, or run twice; lost graphs."""
    model = Small().eval()
    handle, x, seen = ready(model=model), images(2), []
    handle(x), handle(x)
    with torch.enable_grad():
        handle.train()
        before = model.bn.running_mean.clone()
        handle(x.clone()).sum().backward()
        assert not torch.equal(model.bn.running_mean, before) and model.fc.weight.grad is not None
        handle.zero_grad()
        handle.eval()
    hook = model.bn.register_forward_hook(lambda m, args, y: seen.append(y))
    with pytest.warns(UserWarning, match="a hook on 'bn'"):
        handle(x)
    handle(x)
    assert len(seen) == 2 and cuda.replays() == 0
    hook.remove()
    handle(x)
    assert cuda.replays() == 1 and cuda.captures() == 2
    handle.register_forward_hook(lambda m, args, y: y + 1)  # the model's own, around the graph
    assert torch.equal(handle(x), model(x)) and cuda.replays() == 2
    model.bn.train()
    with pytest.warns(UserWarning, match="'bn' is in training mode"):
        handle(x)
    model.train()
    with pytest.warns(UserWarning, match=r"training mode: call eval\(\)"):
        handle(x)
    assert cuda.captures() == 2


def test_a_model_that_is_never_in_eval_mode_is_not_walked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training that pays for graphs."""
    monkeypatch.setattr(sys.modules["resnet_fused.graphed"], "Snapshot", None)
    handle = resnet_fused.graphed(Small())
    with torch.enable_grad():
        for _ in range(5):
            handle(images(2)).sum().backward()


def test_autograd_runs_as_before(cuda: FakeCuda) -> None:
    """Gradients that are lost."""
    model = Small().eval()
    handle = ready(model=model)
    with torch.enable_grad():
        x = images().requires_grad_()
        with pytest.warns(UserWarning, match="autograd records it"):
            handle(x).sum().backward()
        assert x.grad is not None
        for p in model.parameters():
            p.requires_grad_(False)
        for _ in range(3):
            handle(x.detach())
        assert cuda.replays() == 1


def test_compilers_tracers_and_modes_see_the_model(cuda: FakeCuda) -> None:
    """A replay where operations are looked for, or a compiler that runs into graphs."""
    model = Small().eval()
    x = images()
    handle = ready(x, model)
    y = model(x)
    torch._dynamo.reset()
    compiled = torch.compile(handle, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), y)
    program = torch.export.export(handle, (x,))
    torch.testing.assert_close(program.module()(x), y)
    assert set(program.state_dict) == set(model.state_dict())
    traced = torch.jit.trace(handle, x, check_trace=False)  # which calls it without tracing
    other = images()
    torch.testing.assert_close(traced(other), model(other))
    torch.testing.assert_close(torch.func.vmap(handle)(x[None])[0], y)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as flops:
        handle(x)
    assert flops.get_total_flops() > 0
    cuda.capturing.on = True  # the caller captures a graph
    handle(x)
    cuda.capturing.on = False
    assert cuda.replays() == 0
