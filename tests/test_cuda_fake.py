# SPDX-License-Identifier: BSD-3-Clause
"""CUDA tensors in fuse, models, autocast, autograd, compile and export, without a GPU: fake tensors
have a device, shapes and strides, but no memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

import resnet_fused
from fuse_zoo import Basic, Bottle, Net
from resnet_fused import _extension, reference
from resnet_fused.models import BasicBlock, Bottleneck, ResNet

M = TypeVar("M", bound=nn.Module)


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A library with CUDA, and tensors that are all fake."""
    monkeypatch.setattr(_extension, "_cuda", True)
    with FakeTensorMode():
        yield


@pytest.fixture
def called() -> Iterator[list[str]]:
    """The library's ops that are called from now on, in order."""
    seen: list[str] = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func.namespace == "resnet_fused":
                seen.append(func.__name__.split(".")[0])
            return func(*args, **(kwargs or {}))

    with Recorder():
        yield seen


# torch cannot run a backward on device "cuda" without a GPU, not even one of fake tensors.
DIFFERENTIABLE = "cuda" if torch.cuda.is_available() else "cpu"


def on_gpu(net: M, dtype: torch.dtype, device: str = "cuda") -> M:
    """``net`` in eval mode, its tensors replaced by others of the same shapes and strides."""
    for module in net.modules():
        for tensors in (module._parameters, module._buffers):
            for name, t in tensors.items():
                if t is not None:
                    kind = dtype if t.is_floating_point() else t.dtype
                    new = torch.empty_strided(t.shape, t.stride(), dtype=kind, device=device)
                    if tensors is module._parameters:
                        new = nn.Parameter(new, requires_grad=device == DIFFERENTIABLE)
                    tensors[name] = new
    return net.eval()


def model(
    block: Any = BasicBlock, dtype: torch.dtype = torch.float16, device: str = "cuda", **kwargs: Any
) -> ResNet:
    return on_gpu(ResNet(block, [1, 1, 1, 1], num_classes=10, **kwargs), dtype, device)


def images(dtype: torch.dtype = torch.float16, device: str = "cuda") -> Tensor:
    return torch.empty(2, 3, 64, 64, device=device, dtype=dtype)


def network(block: str) -> list[str]:
    return ["stem", *[block] * 4, "pool_linear"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_models(block: Any, dtype: torch.dtype, called: list[str]) -> None:
    """Breaks if a network on a GPU does not run on the ops, or their results have other shapes."""
    y = model(block, dtype)(images(dtype))
    assert called == network("basic_block" if block is BasicBlock else "bottleneck")
    assert y.shape == (2, 10) and y.dtype == dtype and y.device == torch.device("cuda", 0)


@pytest.fixture
def no_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ops' reference path, which computes 16-bit types in float32, must not be taken."""
    for op in ("conv_bn_act", "stem", "basic_block", "bottleneck"):
        monkeypatch.delattr(reference, op)


@pytest.mark.usefixtures("no_formula")
def test_grouped_convolutions_run_plain(called: list[str]) -> None:
    """Breaks if ResNeXt's blocks reach kernels without groups, or cost more than eager's."""
    y = model(Bottleneck, groups=32, width_per_group=4)(images())
    assert called == ["stem", "pool_linear"] and y.shape == (2, 10)


@pytest.mark.usefixtures("no_formula")
def test_strict_float32_runs_plain(called: list[str]) -> None:
    """Breaks if TF32 is used against the user's setting, or autocast is mistaken for float32."""
    net, x = model(dtype=torch.float32), images(torch.float32)
    try:
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        y = net(x)
        assert called == ["pool_linear"] and y.shape == (2, 10)
        called.clear()
        with autocast(torch.bfloat16):
            assert net(x).dtype == torch.bfloat16
        assert called == network("basic_block")
    finally:
        torch.backends.cudnn.conv.fp32_precision = "tf32"


@pytest.mark.usefixtures("no_formula")
def test_a_library_without_cuda_runs_plain(
    called: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if a CPU-only build makes a model on a GPU slower than eager's."""
    monkeypatch.setattr(_extension, "_cuda", False)
    for net in (model(), fused("basic_block", torch.float16)):
        assert net(images()).device.type == "cuda" and called == []
        why = "resnet_fused was built without CUDA, or torch was"
        assert {r[2:] for r in resnet_fused.report(net)} == {(False, "plain", why)}
        with resnet_fused.backend("reference"), pytest.raises(AttributeError):
            net(images())  # asked for, so taken


def fused(pattern: str, dtype: torch.dtype) -> nn.Module:
    """A network that was fused before it came to the GPU."""
    with unset_fake_temporarily():
        block = Basic(64, 64) if pattern == "basic_block" else Bottle(64, 16, 64)
        net = resnet_fused.fuse(Net(block, width=64, stem=64).eval())
    return on_gpu(net, dtype)


@pytest.mark.parametrize("pattern", ["basic_block", "bottleneck"])
def test_fuse(pattern: str, called: list[str]) -> None:
    """Breaks if fused modules call no op on a GPU."""
    net, x = fused(pattern, torch.bfloat16), images(torch.bfloat16)
    got = net(x)
    assert called == ["stem", pattern, "pool_linear"]
    want = resnet_fused.unfuse(net)(x)
    assert len(called) == 3 and got.shape == want.shape and got.dtype == want.dtype


def test_report() -> None:
    """Breaks if the report names another path than the ops take, or hides what slows them down."""
    net = model(Bottleneck)
    rows = {r.name: r for r in resnet_fused.report(net)}
    assert {r.path for r in rows.values()} == {"cuda"}
    converted = (
        "weights are converted on each call; model.to(memory_format=torch.channels_last) avoids it"
    )
    assert rows["layer1.0.conv2"].reason == converted
    assert rows["conv1"].reason == rows["layer1.0.conv1"].reason == ""  # read in any order; 1x1
    for conv in net.modules():
        if isinstance(conv, nn.Conv2d):
            k, c, r, s = conv.weight.shape
            strides = (c * r * s, 1, s * c, c)
            new = torch.empty_strided((k, c, r, s), strides, device="cuda", dtype=torch.float16)
            conv._parameters["weight"] = new
    assert {r.reason for r in resnet_fused.report(net)} == {""}
    reasons = {r.reason for r in resnet_fused.report(on_gpu(net, torch.float32))}
    assert reasons == {"float32 is multiplied as TF32"}
    rows = {r.name: r for r in resnet_fused.report(model(Bottleneck, groups=32, width_per_group=4))}
    grouped = ("plain", "no CUDA kernel takes grouped convolutions")
    assert all(rows[f"layer1.0.conv{i}"][3:] == grouped for i in (1, 2, 3))
    assert rows["conv1"].path == "cuda"


@pytest.mark.parametrize(
    ("on", "capability"), [("1", (9, 0)), ("pairs", (9, 0)), ("1", (8, 0)), ("", (9, 0))]
)
def test_report_of_kernels_for_hopper(
    on: str, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if kernels that are asked for are not named, or named where they do not run."""
    net = model(Bottleneck)
    monkeypatch.setattr(_extension, "hopper", lambda: on)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    rows = {r.name: r for r in resnet_fused.report(net)}
    assert resnet_fused.info()["hopper_kernels"] == (on or "off")
    named = on != "" and capability == (9, 0)
    for name in ("layer1.0.conv1", "layer1.0.conv2"):
        assert (f"RESNET_FUSED_HOPPER={on} asks" in rows[name].reason) == named
        assert ("two convolutions as one" in rows[name].reason) == (named and on == "pairs")
    assert "converted" in rows["layer1.0.conv2"].reason and rows["conv1"].reason == ""


@contextmanager
def autocast(dtype: torch.dtype) -> Iterator[None]:
    """``torch.autocast("cuda")``, which turns itself off where there is no GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    try:
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", dtype)
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


def test_autocast(called: list[str]) -> None:
    """Breaks if the ops compute in another dtype than eager's convolutions under autocast."""
    net, x = model(dtype=torch.float32), images(torch.float32)
    for want in (torch.float16, torch.bfloat16):
        with autocast(want):
            called.clear()
            assert net(x).dtype == want and called == network("basic_block")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients(dtype: torch.dtype, called: list[str]) -> None:
    """Breaks if an op on a GPU has no backward, or it leaves out an input."""
    net = model(Bottleneck, dtype, DIFFERENTIABLE)
    x = images(dtype, DIFFERENTIABLE).requires_grad_()
    net(x).sum().backward()
    assert called == network("bottleneck")
    for t in (x, *net.parameters()):
        assert t.grad is not None and t.grad.shape == t.shape and t.grad.device == t.device


class Graphs:
    """A backend of torch.compile that keeps the graphs."""

    def __init__(self) -> None:
        self.ops: list[str] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.ops += fused_ops(graph)
        return graph.forward


def fused_ops(graph: torch.fx.GraphModule) -> list[str]:
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    return [name.split(".")[1] for name in names if name.startswith("resnet_fused.")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("own", [True, False], ids=["own model", "fuse"])
def test_compile_in_one_graph(own: bool, dtype: torch.dtype) -> None:
    """Breaks if dynamo cannot see through the choice of a path on a GPU."""
    net = model(dtype=dtype) if own else fused("basic_block", dtype)
    torch._dynamo.reset()
    graphs = Graphs()
    y = torch.compile(net, fullgraph=True, backend=graphs)(images(dtype))
    assert y.device.type == "cuda" and y.dtype == dtype
    assert set(graphs.ops) >= {"stem", "basic_block"}


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    """Breaks if an exported network on a GPU has lost the ops, or its batch is fixed."""
    batch = {0: torch.export.Dim("n", min=2, max=64)}
    program = torch.export.export(
        model(Bottleneck), (images(),), dynamic_shapes={"x": batch}, strict=strict
    )
    assert fused_ops(program.graph_module) == network("bottleneck")
