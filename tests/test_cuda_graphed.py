# SPDX-License-Identifier: BSD-3-Clause
"""graphed on a GPU: what the stand-in for CUDA of the other tests cannot show."""

from __future__ import annotations

import copy
import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fused
from graph_models import Calls
from harness.case import DTYPES
from resnet_cases import images, relative
from test_cuda_gpu import network

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.filterwarnings("error", "(?s).*without a CUDA graph")
        yield


def photos(n: int, dtype: torch.dtype = torch.float16, seed: int = 1, size: int = 96) -> Tensor:
    x = images(n, 3, size, size, seed=seed, dtype=dtype).cuda()
    return x.contiguous(memory_format=torch.channels_last)


def ready(model: nn.Module, *inputs: Tensor, **kwargs: Any) -> Any:
    handle = resnet_fused.graphed(model, **kwargs)
    for x in inputs * 2:
        handle(x)
    assert len(handle._graphs._shelf) == len(inputs)
    return handle


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("depth", [18, 50])
def test_replays_have_the_bits_of_the_model(depth: int, dtype: torch.dtype) -> None:
    """Breaks if a replay leaves out a kernel, or reads an input or weights of before."""
    model = network(depth, dtype)
    handle = ready(model, photos(1, dtype), photos(3, dtype))
    for seed in (2, 3):
        for n in (1, 3):
            x = photos(n, dtype, seed)
            assert torch.equal(handle(x), model(x))
    model.conv1.weight.mul_(1.5)
    model.layer4[0].bn1.running_mean.add_(0.5)
    x = photos(3, dtype, 4)
    assert torch.equal(handle(x), model(x))
    model.fc.weight = nn.Parameter(model.fc.weight.flip(0))
    for _ in range(4):
        assert torch.equal(handle(x), model(x))


def test_outputs_are_the_callers() -> None:
    """Breaks if a later replay, or its memory, reaches an earlier output."""
    model = network(18, torch.float16)
    xs = [photos(2, seed=seed) for seed in range(6)]
    handle = ready(model, xs[0])
    ys = [handle(x) for x in xs]
    for x, y in zip(xs, ys, strict=True):
        assert torch.equal(y, model(x))


def test_graphs_that_share_memory_do_not_disturb_each_other() -> None:
    """Breaks if a capture in the pool takes memory that another graph's input or output is in."""
    model = network(18, torch.bfloat16)
    xs = [photos(n, torch.bfloat16) for n in (1, 5, 2, 8, 3)]
    handle = ready(model, *xs, max_shapes=5)
    want = [model(x) for x in xs]
    for order in ((0, 1, 2, 3, 4), (3, 0, 4, 1, 2)):
        got = {i: handle(xs[i]) for i in order}
        assert all(torch.equal(y, want[i]) for i, y in got.items())


def test_streams() -> None:
    """Breaks if a replay does not wait for its input, for the replay before it on another stream,
    or if what follows on the caller's stream does not wait for the output.
    """
    model = network(50, torch.float16)
    xs = [photos(4, seed=seed) for seed in range(8)]
    want = [model(x) for x in xs]
    handle = ready(model, xs[0])
    streams = [torch.cuda.Stream() for _ in range(3)]
    got, late = [], [torch.zeros_like(x) for x in xs]
    torch.cuda.synchronize()
    for i, x in enumerate(xs):
        with torch.cuda.stream(streams[i % 3]):
            torch.cuda._sleep(20_000_000 * (3 - i % 3))
            late[i].copy_(x)
            got.append(handle(late[i]) + 0)
            late[i].zero_()
    torch.cuda.synchronize()
    assert all(torch.equal(y, w) for y, w in zip(got, want, strict=True))


def test_replays_do_not_wait_for_the_gpu() -> None:
    """Breaks if a replay synchronises."""
    model, x = network(18, torch.float16), photos(1)
    handle = ready(model, x)
    side = torch.cuda.Stream()
    try:
        torch.cuda.set_sync_debug_mode("error")
        handle(x)
        with torch.cuda.stream(side):
            handle(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_threads_beside_captures() -> None:
    """Breaks if a capture fails, or makes others fail, because other threads allocate, free, wait
    for the GPU, or replay.
    """
    model = network(18, torch.float16)
    xs = {n: photos(n) for n in range(1, 9)}
    want = {n: model(x) for n, x in xs.items()}
    handle = resnet_fused.graphed(model, max_shapes=4)
    stop = threading.Event()

    def disturb() -> int:
        rounds = 0
        with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
            while not stop.is_set():
                held = [torch.randn(1 << 20, device="cuda") for _ in range(8)]
                assert held[0].sum().isfinite().item()
                torch.cuda.empty_cache()
                torch.cuda.synchronize()
                rounds += 1
        return rounds

    def work(seed: int) -> bool:
        right = True
        with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
            for i in range(60):
                n = 1 + (seed + i // 10) % 8
                right &= torch.equal(handle(xs[n]), want[n])
        return right

    torch.cuda.synchronize()
    with ThreadPoolExecutor(6) as pool:
        others = [pool.submit(disturb) for _ in range(2)]
        done = list(pool.map(work, range(4)))
        stop.set()
        assert all(done) and all(other.result() > 0 for other in others)


def reserved() -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def test_memory_is_bounded_and_given_back() -> None:
    """Breaks if dropped graphs, or a dropped handle, keep their memory; or if graphs do not share
    what their forwards need.
    """
    model = network(50, torch.float16)
    with torch.cuda.stream(torch.cuda.Stream()):  # workspaces of libraries
        model(photos(32, size=224))
    before = reserved()
    torch.cuda.reset_peak_memory_stats()
    model(photos(32, size=224))
    eager = torch.cuda.max_memory_allocated()
    handle = ready(model, photos(32, size=224))
    one = reserved() - before
    assert one <= 1.5 * eager
    for n in (31, 30, 29, 28, 27, 26):
        for _ in range(3):
            handle(photos(n, size=224))
    assert len(handle._graphs._shelf) == 7 and reserved() - before <= 2 * one
    handle = ready(model, photos(32, size=224), max_shapes=1)
    for n in (31, 30, 29):
        for _ in range(3):
            handle(photos(n, size=224))
        assert reserved() - before <= 1.5 * one
    del handle
    assert reserved() - before <= 64 << 20  # a workspace per capture stream may stay


def test_a_model_that_leaves_the_gpu_takes_its_graphs_along() -> None:
    """Breaks if graphs keep the weights that the model had on the GPU."""
    before = reserved()
    model, x = network(18, torch.float32), photos(2, torch.float32)
    handle = ready(model, x)
    model.cpu()
    with pytest.warns(UserWarning, match="an argument is on 'cpu'"):
        handle(x.cpu())
    assert len(handle._graphs._shelf) == 0
    del x
    assert reserved() - before <= 64 << 20


def _synchronise(self: Any, x: Tensor) -> Tensor:
    y = self.fc(x)
    torch.cuda.synchronize()
    return y


def _hidden_mask(self: Any, x: Tensor) -> Tensor:
    y = x.clone()
    y[x > 0] = self.fc(x)[x > 0] * 0 + 1
    return y


def _error(self: Any, x: Tensor) -> Tensor:
    if torch.cuda.is_current_stream_capturing():
        raise KeyError("no such thing")
    return self.fc(x)


BREAKING: dict[str, Callable[..., Any]] = {
    "item": lambda self, x: self.fc(x) * x.sum().item(),
    "synchronize": _synchronise,
    "mask": _hidden_mask,
    "to the host": lambda self, x: self.fc(x).cpu().cuda(),
    "error": _error,
}


@pytest.mark.parametrize("name", BREAKING)
def test_a_failed_capture_leaves_the_gpu_usable(name: str) -> None:
    """Breaks if after a failure the stream, the allocator, the random numbers, or later captures
    are not as they were.
    """
    before = reserved()
    torch.cuda.manual_seed(5)
    want_random = torch.randn(100, device="cuda")
    model = Calls(BREAKING[name]).cuda().eval()
    x = torch.randn(8, 4, device="cuda")
    handle = resnet_fused.graphed(model)
    handle(x)
    with pytest.warns(UserWarning, match="is called without a CUDA graph"):
        y = handle(x)
    assert torch.equal(y, model(x)) and torch.equal(handle(x), y)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert not torch.cuda.is_current_stream_capturing()
    torch.cuda.manual_seed(5)
    assert torch.equal(torch.randn(100, device="cuda"), want_random)
    with torch.cuda.stream(torch.cuda.Stream()):  # freed behind an event, which is asked for later
        torch.ones(1 << 22, device="cuda").record_stream(torch.cuda.default_stream())
    other = network(18, torch.float16)
    z = photos(2)
    assert torch.equal(ready(other, z)(z), other(z))
    del handle, model, other, y, z
    assert reserved() - before <= 96 << 20


def test_random_numbers_go_on() -> None:
    """Breaks if every replay draws the same numbers, or does not follow the seed."""
    model = Calls(lambda self, x: nn.functional.dropout(x, 0.5, True)).cuda().eval()
    x = torch.ones(1000, device="cuda")
    handle = ready(model, x)
    torch.cuda.manual_seed(3)
    first, second = handle(x), handle(x)
    assert not torch.equal(first, second)
    torch.cuda.manual_seed(3)
    assert torch.equal(handle(x), first)


def test_autocast_and_settings() -> None:
    """Breaks if a graph has another precision than the caller asks for, or stale cast weights."""
    model, x = network(18, torch.float32), photos(2, torch.float32)
    handle = ready(model, x)
    with torch.autocast("cuda", torch.float16):
        for _ in range(3):
            got = handle(x)
        assert got.dtype == torch.float16 and torch.equal(got, model(x))
        model.conv1.weight.mul_(2)
        got = handle(x)
        torch.clear_autocast_cache()
        assert torch.equal(got, model(x))
    try:
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        for _ in range(3):
            strict = handle(x)
        assert relative(strict.cpu(), model(x).double().cpu()) < 1e-6
    finally:
        torch.backends.cudnn.conv.fp32_precision = "tf32"


def test_the_callers_own_graph() -> None:
    """Breaks if a handle inside of another capture ends it, or is missing from that graph."""
    model, x = network(18, torch.float16), photos(2)
    handle = ready(model, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = handle(x)
    x.copy_(photos(2, seed=9))
    graph.replay()
    assert torch.equal(y, model(x))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_gpu_than_the_current_one() -> None:
    """Breaks if a graph is captured, replayed or waited for on the current device."""
    model = network(18, torch.float16)
    other, x = copy.deepcopy(model).to("cuda:1"), photos(2)
    handle = ready(other, x.to("cuda:1"))
    got = handle(x.to("cuda:1"))
    assert torch.cuda.current_device() == 0 and got.device.index == 1
    assert torch.equal(got.cpu(), model(x).cpu())
