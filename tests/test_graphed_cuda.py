# SPDX-License-Identifier: BSD-3-Clause
"""graphed and its use of CUDA, without a GPU: streams, threads, failures."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import resnet_fused
from fake_graphs import CUDAGraph, FakeCuda
from graph_models import Calls, Small, images, ready
from resnet_fused.graphs import capture

pytestmark = pytest.mark.usefixtures("cuda")


def test_streams_wait_for_each_other(cuda: FakeCuda) -> None:
    """A replay that runs beside another one in the same memory."""
    handle, x = ready(), images()
    with cuda.stream(cuda.Stream()):
        for _ in range(2):
            handle(x)
    handle(x)
    assert cuda.log == [
        "graph1 on side2",
        "graph1 on side2",
        "default waits for side2",
        "graph1 on default",
    ]


def test_a_replay_that_fails_is_waited_for(cuda: FakeCuda) -> None:
    """A lock that is never given back; what was launched before the failure forgotten."""
    handle, x = ready(), images()
    cuda.fail = {"replay"}
    with cuda.stream(cuda.Stream()), pytest.raises(RuntimeError, match="error in replay"):
        handle(x)
    cuda.fail = set()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(torch.no_grad()(handle), x).result(5)
    assert cuda.log[-2:] == ["default waits for side2", "graph1 on default"]


@pytest.mark.parametrize("place", ["begin", "end"])
def test_a_failed_capture_leaves_all_as_it_was(
    place: str, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream that stays the side stream; an allocator that goes on sending memory to the pool; a
    shape that is tried at every call; a lock that is never given back."""
    ended: list[Any] = []
    monkeypatch.setattr(
        torch._C, "_cuda_endAllocateToPool", lambda *args: ended.append(args), raising=False
    )
    handle = resnet_fused.graphed(Small().eval())
    x = images()
    handle(x)
    cuda.fail = {place}
    with pytest.warns(UserWarning, match=f"CUDA error in {place}; and no graph .* any more"):
        handle(x)
    assert cuda.current_stream() is cuda.default and ended == [(None, "pool1")]
    assert not cuda.is_current_stream_capturing() and torch.is_autocast_cache_enabled()
    cuda.fail = set()
    captures = cuda.captures()
    assert all(handle(x).shape == (1, 4) for _ in range(3)) and cuda.captures() == captures
    for _ in range(3):
        handle(images(2))
    assert cuda.replays() == 1


def test_an_interrupt_during_a_capture_is_one(cuda: FakeCuda) -> None:
    """Ctrl-C that is taken for a forward which cannot be captured."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if capture.underway() and cuda.captures() == 1:
            raise KeyboardInterrupt
        return x + 1

    handle = resnet_fused.graphed(Calls(forward).eval())
    handle(torch.ones(2))
    with pytest.raises(KeyboardInterrupt):
        handle(torch.ones(2))
    assert cuda.current_stream() is cuda.default and handle(torch.ones(2)).sum() == 4


def test_after_three_failures_no_more_is_captured(cuda: FakeCuda) -> None:
    """A broken capture for every new shape."""
    handle = resnet_fused.graphed(Calls(lambda self, x: x * x.sum().item()).eval())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for n in range(1, 9):
            for _ in range(3):
                handle(torch.ones(n))
    assert cuda.captures() == 3 and len(said) == 2
    assert str(said[1].message).endswith("(aten::_local_scalar_dense); no more is captured")


def test_failures_leave_the_graphs_there_are(cuda: FakeCuda) -> None:
    """Shapes that cannot be captured, which end the replays of those that can."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.fc(x) if len(x) == 1 else self.fc(x) * x.sum().item()

    handle = ready(torch.ones(1, 4), Calls(forward))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for n in (2, 3, 4, 5, 5, 4, 3, 2, 5):
            handle(torch.ones(n, 4))
    assert cuda.captures() == 4
    handle(torch.ones(1, 4))
    assert cuda.replays() == 1


def test_threads(cuda: FakeCuda) -> None:
    """An input or output of another thread's call; two captures at a time."""
    model = Small().eval()
    handles = [resnet_fused.graphed(model, max_shapes=2) for _ in range(2)]

    def work(seed: int) -> bool:
        draw = torch.Generator().manual_seed(seed)
        right = True
        with torch.no_grad(), cuda.stream(cuda.Stream()):
            for i in range(30):
                x = torch.randn(1 + (seed + i) % 3, 3, 5, 5, generator=draw)
                right &= torch.equal(handles[i % 2](x), model(x))
        return right

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(6)))
    assert cuda.replays() > 50 and len(cuda.alive) <= 4


def test_a_forward_that_calls_the_handle(cuda: FakeCuda) -> None:
    """A lock that waits for itself, or a graph in a graph."""
    handles: list[Any] = []
    model = Calls(lambda self, x: handles[0](x[:1]) if len(x) > 1 else self.fc(x)).eval()
    handles.append(resnet_fused.graphed(model))
    x = torch.randn(3, 4)
    for _ in range(6):
        assert torch.equal(handles[0](x), model.fc(x[:1]))
    assert cuda.replays() > 0


def test_a_call_in_the_middle_of_a_replay(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finaliser, run at any place, whose call overwrites the input of the one it interrupts."""
    model = Small().eval()
    handle, x, other = ready(model=model), images(), images()
    replay, seen = CUDAGraph.replay, []

    def interrupted(graph: CUDAGraph) -> None:
        seen.append(handle(other))
        replay(graph)

    monkeypatch.setattr(CUDAGraph, "replay", interrupted)
    assert torch.equal(handle(x), model(x)) and cuda.replays() == 1
    assert len(seen) == 1 and torch.equal(seen[0], model(other))
