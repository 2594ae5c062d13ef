# SPDX-License-Identifier: BSD-3-Clause
"""What only a GPU can show: streams, graphs, several devices, no waiting, memory. How values are
computed is tested without one, by tests/emulator, and on it by every test that takes a path.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import resnet_fused
import test_small_sizes
from harness.case import DTYPES
from harness.gpu import instead_of_cpu
from harness.suite import floats, make, map_tensors
from harness.table import TABLE
from resnet_cases import exact, images, lively, plain, relative
from resnet_fused import _extension
from resnet_fused.models import ResNet
from source_tree import benchmarks

gpu_sanitize = benchmarks("gpu_sanitize")

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def network(depth: int, dtype: torch.dtype) -> ResNet:
    model = lively(getattr(resnet_fused, f"resnet{depth}")())
    return model.to("cuda", dtype, memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("depth", [18, 50])
def test_networks_are_as_good_as_eager(depth: int, dtype: torch.dtype) -> None:
    """Breaks if a network is further from float64 than 1.5 times eager's error."""
    model, x = network(depth, dtype), images(4, 3, 224, 224)
    want = exact(copy.deepcopy(model).cpu(), x.to(dtype))
    x = x.to("cuda", dtype, memory_format=torch.channels_last)
    with torch.inference_mode():
        got, eager = model(x), plain(model, x)
    assert relative(got.cpu(), want) < 1.5 * relative(eager.cpu(), want) + 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kernel_of_the_convolution(dtype: torch.dtype) -> None:
    """Breaks if a kernel that this GPU would choose for other shapes alone is wrong on it."""
    wrong = gpu_sanitize.check_planned(dtype, "cuda", _extension._library)
    assert [text for text in wrong if text] == []


def kernels(call: Callable[[], Any]) -> str:
    """Names of the kernels that a call starts."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.inference_mode(), torch.profiler.profile(activities=activities) as seen:
        call()
        torch.cuda.synchronize()
    return " ".join(event.key for event in seen.key_averages())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_hopper_kernels_run_where_they_are_forced(dtype: torch.dtype) -> None:
    """Breaks if the other kernels stand in for them, whose results are as right."""
    library: Any = _extension._library
    if torch.cuda.get_device_capability() != (9, 0) or not gpu_sanitize.hopper_built(library):
        pytest.skip("needs a Hopper GPU and a library built for it")
    for case in gpu_sanitize.paired(dtype):
        with gpu_sanitize.pairs(library):
            assert "wgmma_pair_kernel" in kernels(gpu_sanitize.moved(case, "cuda").run), case.name
    for plan, case in gpu_sanitize.planned(dtype, hopper=True):
        with gpu_sanitize.forced(plan, library, hopper=True):
            assert "wgmma_conv_kernel" in kernels(gpu_sanitize.moved(case, "cuda").run), case.name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sizes_of_one_to_three(dtype: torch.dtype) -> None:
    """Breaks where borders meet, or a size-1 dimension's strides are believed."""
    with instead_of_cpu():
        test_small_sizes.test_conv_bn_act(2, 3, dtype)
        test_small_sizes.test_blocks(2, dtype)
        test_small_sizes.test_stem_head_and_add(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_graph_replays_with_new_inputs(dtype: torch.dtype) -> None:
    """Breaks if a call synchronises, allocates outside of torch's allocator, or leaves the stream:
    all are errors while a graph is captured.
    """
    model, x = network(50, dtype), images(2, 3, 96, 96, dtype=dtype).cuda()
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.inference_mode():
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            model(x)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            y = model(x)
        for seed in (2, 3):
            x.copy_(images(2, 3, 96, 96, seed=seed, dtype=dtype))
            graph.replay()
            assert torch.equal(y, model(x))


def test_the_current_stream_is_used() -> None:
    """Breaks if kernels run on another stream: they would not wait for what the input waits for."""
    model, x = network(18, torch.float16), images(2, 3, 96, 96, dtype=torch.float16).cuda()
    side = torch.cuda.Stream()
    with torch.inference_mode():
        want = model(x)
        late = torch.zeros_like(x)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(100_000_000)
            late.copy_(x)
            got = model(late)
        side.synchronize()
    assert torch.equal(got, want)


def test_no_call_waits_for_the_gpu() -> None:
    """Breaks if host code synchronises."""
    model, x = network(50, torch.bfloat16), images(2, 3, 96, 96, dtype=torch.bfloat16).cuda()
    with torch.inference_mode():
        model(x)
        try:
            torch.cuda.set_sync_debug_mode("error")
            model(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_tensors_device_counts() -> None:
    """Breaks if a kernel is launched on the current device instead of its tensors'."""
    model, x = network(18, torch.float16), images(2, 3, 64, 64, dtype=torch.float16).cuda()
    with torch.inference_mode():
        want = model(x)
        other = copy.deepcopy(model).to("cuda:1")
        got = other(x.to("cuda:1"))
    assert torch.cuda.current_device() == 0 and got.device.index == 1
    assert torch.equal(got.cpu(), want.cpu())


def test_memory_is_no_more_than_eagers() -> None:
    """Breaks if intermediates outlive their call."""
    model, x = network(50, torch.float16), images(16, 3, 224, 224, dtype=torch.float16).cuda()
    x = x.contiguous(memory_format=torch.channels_last)

    def peak(forward: Callable[[], Any]) -> int:
        forward()
        torch.cuda.reset_peak_memory_stats()
        forward()
        return torch.cuda.max_memory_allocated()

    with torch.inference_mode():
        assert peak(lambda: model(x)) <= peak(lambda: plain(model, x))


def test_batch_invariance() -> None:
    """Breaks if an image's result depends on the images beside it although it must not."""
    model, x = network(50, torch.bfloat16), images(5, 3, 96, 96, dtype=torch.bfloat16).cuda()
    try:
        resnet_fused.set_batch_invariant(True)
        with torch.inference_mode():
            assert torch.equal(model(x), torch.cat([model(image) for image in x.split(1)]))
    finally:
        resnet_fused.set_batch_invariant(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TABLE)
def test_registrations(name: str, dtype: torch.dtype) -> None:
    """Breaks on a fake kernel, schema or autograd formula that does not fit the CUDA op."""
    op = TABLE[name]
    inputs = map_tensors(lambda t: t.cuda(), make(op, op.cases[0], dtype))
    overload = getattr(torch.ops.resnet_fused, name).default
    torch.library.opcheck(overload, op.flat(*inputs[0], **inputs[1]))


@pytest.mark.parametrize("name", TABLE)
def test_gradients_are_those_of_plain_pytorch(name: str) -> None:
    """Breaks if the backward on a GPU drops an input."""
    op = TABLE[name]
    inputs = make(op, op.cases[0], torch.bfloat16)

    def gradients() -> list[Tensor | None]:
        leaves = map_tensors(lambda t: t.detach().cuda().requires_grad_(), inputs)
        y = op.call(*leaves[0], **leaves[1])
        y.backward(torch.linspace(-1, 1, y.numel(), device="cuda").view(y.shape).to(y.dtype))
        return [t.grad for t in floats(leaves)]

    got = gradients()
    with resnet_fused.backend("reference"):
        want = gradients()
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_compiled_and_under_autocast() -> None:
    """Breaks if compiled code or autocast changes results."""
    model, x = network(18, torch.float32), images(2, 3, 96, 96).cuda()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        assert torch.equal(compiled(x), model(x))
        with torch.autocast("cuda", torch.bfloat16):
            got = model(x)
        assert got.dtype == torch.bfloat16
        assert relative(got.float().cpu(), model(x).double().cpu()) < 0.1
