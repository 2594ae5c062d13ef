# SPDX-License-Identifier: BSD-3-Clause
"""graphed without a GPU: what its calls return and when they replay, on a stand-in for CUDA."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fused
from fake_graphs import FakeCuda
from graph_models import Calls, Small, images, ready

pytestmark = pytest.mark.usefixtures("cuda")


def test_the_third_call_replays(cuda: FakeCuda) -> None:
    """A graph for a shape that comes once; a replay that computes nothing, or the captured input's
    result."""
    model = Small().eval()
    handle = resnet_fused.graphed(model)
    for turn in range(5):
        x = images()
        assert torch.equal(handle(x), model(x))
        assert (cuda.captures(), cuda.replays()) == (int(turn > 0), max(0, turn - 1))


def test_outputs_are_the_callers(cuda: FakeCuda) -> None:
    """An output that the next call overwrites, or that changes the next result when written to."""
    model = Small().eval()
    handle, x, other = ready(model=model), images(), images()
    first = handle(x)
    first_kept = first.clone()
    assert torch.equal(handle(other), model(other)) and torch.equal(first, first_kept)
    first.fill_(7)
    assert torch.equal(handle(x), first_kept)
    same = resnet_fused.graphed(nn.Identity().eval())
    assert all(same(x).data_ptr() == x.data_ptr() for _ in range(2))
    y = same(x)  # eager would return x itself
    assert y.data_ptr() != x.data_ptr() and torch.equal(y, x)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "in place": lambda m: m.conv.weight.copy_(torch.randn(4, 3, 3, 3)),
    "state_dict": lambda m: m.load_state_dict(Small().state_dict()),
    "buffer in place": lambda m: m.bn.running_var.mul_(4),
    "data": lambda m: setattr(m.conv.weight, "data", torch.randn(4, 3, 3, 3)),
    "parameter": lambda m: setattr(m.fc, "weight", nn.Parameter(torch.randn(4, 4))),
    "buffer": lambda m: setattr(m.bn, "running_mean", torch.randn(4)),
    "removed": lambda m: setattr(m.fc, "bias", None),
    "child": lambda m: setattr(m, "fc", nn.Linear(4, 4)),
    "appended": lambda m: m.tail.append(nn.Sigmoid()),
    "attribute": lambda m: setattr(m, "scale", 3.0),
    "eps": lambda m: setattr(m.bn, "eps", 0.5),
    "tensor attribute": lambda m: setattr(m, "shift", torch.zeros(1)),
    "of another size": lambda m: setattr(m, "shift", torch.zeros(4)),
    "tensor attribute in place": lambda m: m.shift.mul_(3),
    "forward on a child": lambda m: setattr(m.tail, "forward", lambda y: y + 1),
    "class of a child": lambda m: setattr(m.tail, "__class__", Doubled),
}


class Doubled(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize("name", CHANGES)
def test_changes_of_the_model_count_at_once(name: str, cuda: FakeCuda) -> None:
    """A replay from memory that the model no longer has, or of a program that it no longer is."""
    torch.manual_seed(1)
    model = Small().eval()
    handle, x = ready(model=model), images()
    before = handle(x)
    CHANGES[name](model)
    for _ in range(5):
        assert torch.equal(handle(x), model(x))
    assert not torch.equal(handle(x), before)
    kept = "in place" in name or name == "state_dict"
    assert cuda.captures() == (1 if kept else 2)
    assert cuda.log[-1].startswith("graph1" if kept else "graph2")  # captured again


def test_nothing_that_a_graph_reads_is_taken_for_something_else() -> None:
    """A new parameter at the address, or with the id, of one that died."""
    model = Small().eval()
    handle, x = ready(model=model), images()
    for _ in range(30):
        model.fc.weight.data = torch.randn(4, 4)
        assert torch.equal(handle(x), model(x))
        model.fc.weight = nn.Parameter(torch.randn(4, 4))
        assert torch.equal(handle(x), model(x))


def test_what_a_graph_reads_is_held() -> None:
    """Memory of a tensor that only the forward knows, given to another one after its death."""
    known = {"t": torch.ones(4)}
    model = Calls(lambda self, x: self.fc(x) + known["t"]).eval()
    handle = ready(torch.ones(1, 4), model)
    held = {storage.data_ptr() for storage in handle._graphs._shelf.any().held}
    assert held == {t.data_ptr() for t in (model.fc.weight, model.fc.bias, known["t"])}


def test_a_model_that_moved_away_takes_its_graphs_along(cuda: FakeCuda) -> None:
    """Weights on a GPU that nobody uses any more, held by graphs that nobody can replay."""
    model = Calls(lambda self, x: self.fc(x)).eval()
    handle = ready(torch.ones(1, 4), model)
    model.to("meta")
    with pytest.warns(UserWarning, match="an argument is on 'meta'"):
        handle(torch.ones(1, 4, device="meta"))
    assert cuda.alive == set() and len(handle._graphs._shelf) == 0


def test_models_that_keep_changing_are_captured_ever_less(cuda: FakeCuda) -> None:
    """A capture, which costs a hundred calls, behind every change."""
    model = Small().eval()
    handle = resnet_fused.graphed(model)
    for _ in range(100):
        model.fc.weight = nn.Parameter(torch.randn(4, 4))
        for _ in range(3):
            handle(images())
    assert cuda.captures() < 10


def test_shapes_layouts_and_dtypes_have_graphs_of_their_own(cuda: FakeCuda) -> None:
    """An input read through another's strides; a result in another memory format than eager's."""
    model = Small().eval()
    handle = resnet_fused.graphed(model, max_shapes=16)
    x = images(2, 8)
    variants = [
        x,
        images(1, 8),
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(2, 3),
        torch.randn(2, 3, 8, 16)[..., ::2],
        torch.randn(3, 1, 1).expand(2, 3, 8, 8),
        torch.randn(3, 2, 8, 8).transpose(0, 1),
    ]
    for variant in variants * 3:
        torch.testing.assert_close(handle(variant), model(variant))
    # The slice and the expanded image have dense copies like x, and so its graph.
    assert cuda.captures() == 5 and cuda.replays() == 1 + 3 + 7
    handle.double()
    assert handle(x.double()).dtype == torch.float64


@pytest.mark.parametrize(
    "context",
    [
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: resnet_fused.backend("reference"),
        lambda: torch.backends.cudnn.flags(deterministic=True, benchmark=True),
    ],
    ids=["grad mode", "autocast", "backend", "cudnn"],
)
def test_settings_have_graphs_of_their_own(context: Callable[[], Any], cuda: FakeCuda) -> None:
    """A result in the precision, or on the path, of other settings than the caller's."""
    model = Small().eval()
    handle, x = ready(model=model), images()
    for _ in range(3):
        with context():
            got, want = handle(x), model(x)
            assert torch.equal(got, want) and got.dtype == want.dtype
            assert got.is_inference() == want.is_inference() and not got.requires_grad
        assert torch.equal(handle(x), model(x))
    assert cuda.captures() == 2


def test_autocast_sees_changed_weights(cuda: FakeCuda) -> None:
    """A graph that reads what autocast's cache made of the weights before."""
    model = Small().eval()
    x = images()
    with torch.autocast("cpu", torch.bfloat16):
        handle = ready(x, model)
        model.conv.weight.mul_(2)
        got = handle(x)
        assert cuda.replays() == 1
        torch.clear_autocast_cache()
        assert torch.equal(got, model(x)) and torch.is_autocast_cache_enabled()


def test_the_least_recently_used_goes(cuda: FakeCuda) -> None:
    """More graphs than were allowed; the one in use dropped; memory that is not given back, or
    given back while a replay may still run in it."""
    handle = resnet_fused.graphed(Small().eval(), max_shapes=2)
    for n in (1, 1, 1, 2, 2, 1, 3, 3):  # 1, 2, then 3 in place of 2
        handle(images(n))
        assert len(cuda.alive) <= 2
    assert cuda.alive == {"graph1", "graph3"}
    at = cuda.log.index("graph2 reset")
    assert cuda.log[at - 1].startswith("host waits")
    for n in (1, 3):
        handle(images(n))
    assert [line.split()[0] for line in cuda.log[-2:]] == ["graph1", "graph3"]


def test_more_shapes_than_graphs_do_not_capture_all_the_time(cuda: FakeCuda) -> None:
    """A capture at every call of a program that takes turns."""
    handle = resnet_fused.graphed(Small().eval(), max_shapes=2)
    for i in range(300):
        handle(images(1 + i % 3))
    assert cuda.captures() < 30


def test_graphs_share_one_pool(cuda: FakeCuda) -> None:
    """Memory for every shape instead of for the largest; a pool used again after it was freed."""
    model = Small().eval()
    handle = resnet_fused.graphed(model)
    for n in (1, 1, 2, 2):
        handle(images(n))
    graphs = [kept.graph.graph for kept in handle._graphs._shelf._kept.values()]
    assert [g.pool_id for g in graphs] == ["pool1", "pool1"]
    model.scale = 5.0
    for _ in range(5):
        handle(images())
    assert handle._graphs._shelf.any().graph.pool_id == "pool2"


def test_all_goes_with_the_handle() -> None:
    """A cycle, or a registry, that keeps graphs and models alive."""
    model = Small().eval()
    handle = ready(model=model)
    gone = [
        weakref.ref(handle._graphs),
        weakref.ref(handle._graphs._shelf.any()),
        weakref.ref(model),
    ]
    gc.disable()
    try:
        del handle, model
        assert [ref() for ref in gone] == [None, None, None]
    finally:
        gc.enable()
