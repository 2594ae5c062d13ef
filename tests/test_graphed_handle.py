# SPDX-License-Identifier: BSD-3-Clause
"""What graphed returns is the model, but for its forward."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import resnet_fused
from fake_graphs import FakeCuda
from fuse_zoo import Basic, Net
from graph_models import Calls, Small, images, ready
from resnet_cases import small
from resnet_fused.models import BasicBlock

pytestmark = pytest.mark.usefixtures("cuda")


def test_the_handle_is_the_model() -> None:
    """Keys with a prefix; an attribute, a mode or a hook that one has and the other has not."""
    model = Small()
    handle: Any = resnet_fused.graphed(model)
    assert isinstance(handle, Small) and repr(handle).startswith("GraphedSmall(")
    assert list(handle.state_dict()) == list(model.state_dict())
    assert [n for n, _ in handle.named_modules()] == [n for n, _ in model.named_modules()]
    assert handle.conv is model.conv and handle.scale == 2.0
    assert handle.eval() is handle and not model.training and not model.bn.training
    handle.scale, model.more = 4.0, 5
    assert model.scale == 4.0 and handle.more == 5
    handle.fc = nn.Linear(4, 2)
    assert model.fc is handle.fc and handle.half() is handle and model.fc.weight.dtype == torch.half
    assert resnet_fused.graphed(handle)._graphs.model is model


def test_a_forward_hook_runs_once() -> None:
    """Hooks of the model that run around the handle and again inside."""
    model = Calls(lambda self, x: x + 1).eval()
    handle = resnet_fused.graphed(model)
    model.register_forward_hook(lambda m, args, y: 2 * y)
    assert [handle(torch.ones(1)).item() for _ in range(4)] == [4, 4, 4, 4]


@pytest.mark.parametrize("traced", [False, True])
def test_copies(traced: bool, cuda: FakeCuda) -> None:
    """A copy that shares graphs or weights with the original, or is none."""
    model: Any = Small().eval()
    if traced:
        model = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval())
    handle, x = ready(model=model, max_shapes=3), images()
    both = copy.deepcopy({"handle": handle, "model": model})
    copies = [both["handle"], pickle.loads(pickle.dumps(handle))]
    for new in copies:
        assert new._graphs.max_shapes == 3 and len(new._graphs._shelf) == 0
        assert next(new.parameters()) is not next(model.parameters())
        assert all(torch.equal(new(x), model(x)) for _ in range(4))
    if traced:
        handle.graph.output_node().args = (next(iter(handle.graph.nodes)),)
        handle.recompile()
        assert torch.equal(handle(x), x)
    else:
        assert both["handle"]._graphs.model is both["model"]


def test_fused_models(cuda: FakeCuda) -> None:
    """Fused calls that a graph, or a report, cannot see; a handle that fuse() takes apart."""
    model = resnet_fused.fuse(Net(Basic(8, 8), width=8).eval())
    handle, x = ready(images(2, 32), model), images(2, 32)
    torch.testing.assert_close(handle(x), model(x))
    assert cuda.replays() == 1
    assert str(resnet_fused.report(handle)) == str(resnet_fused.report(model))
    assert resnet_fused.verify(handle, x)
    with pytest.raises(TypeError, match=r"graphed\(fuse\(model\)\)"):
        resnet_fused.fuse(handle)
    assert resnet_fused.unfuse(handle) is handle
    for _ in range(6):
        torch.testing.assert_close(handle(x), model(x))
    assert cuda.captures() == 2 and type(model) is Net
    own = small(BasicBlock)
    assert torch.equal(ready(x, own)(x), own(x))
    whole = nn.Sequential(nn.Identity(), resnet_fused.graphed(own)).eval()
    assert torch.equal(resnet_fused.fuse(whole)(x), own(x))


@pytest.mark.parametrize(
    ("args", "error", "match"),
    [
        ((len,), TypeError, "nn.Module, got builtin"),
        ((nn.ReLU(), 0), ValueError, "1 or more, got 0"),
        ((nn.ReLU(), True), TypeError, "an int, got bool"),
        ((torch.jit.script(nn.ReLU()),), TypeError, "TorchScript"),
    ],
)
def test_errors(args: Any, error: type[Exception], match: str) -> None:
    """A message that does not say what to do."""
    with pytest.raises(error, match=match):
        resnet_fused.graphed(*args)


def test_parts_that_have_runtimes_of_their_own(cuda: FakeCuda) -> None:
    """TorchScript, compiled or wrapped modules that a capture would run in another way."""
    inner = nn.Sequential(nn.Linear(3, 3)).eval()
    parts = {
        "TorchScript": torch.jit.script(inner),
        "reduce-overhead": torch.compile(inner, backend="eager"),
        "graph the module inside": nn.DataParallel(inner),
    }
    for reason, part in parts.items():
        handle = resnet_fused.graphed(nn.Sequential(part).eval())
        with pytest.warns(UserWarning, match=reason):
            for _ in range(3):
                handle(torch.ones(2, 3))
    with pytest.warns(UserWarning, match="replaced on the instance"):
        inner.forward = lambda x: x  # type: ignore[method-assign]
        resnet_fused.graphed(inner)
    assert cuda.captures() == 0
