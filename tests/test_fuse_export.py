# SPDX-License-Identifier: BSD-3-Clause
"""Fused models under exporters: AOTInductor, ONNX, TorchScript traces."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fuse_zoo
from fuse_spy import calls, close, make
from fuse_zoo import Basic, Bottle, Net, image, randomise
from resnet_fused.dispatch import backend
from resnet_fused.fuse import fuse
from resnet_fused.models import resnet18

one_thread = fuse_zoo.one_thread
__all__ = ["calls", "one_thread"]  # fixtures

MODELS: dict[str, Callable[[], nn.Module]] = {
    "fused": lambda: fuse(make()),
    "own": lambda: randomise(resnet18(num_classes=5)),
}


def eager(model: nn.Module, x: Tensor) -> Tensor:
    """What torch's own modules give, in float64."""
    with backend("reference"), torch.no_grad():
        return copy.deepcopy(model).double()(x.double()).float()


def test_aot_inductor(tmp_path: Path) -> None:
    """A compiled package does not load, or loses an argument of a block without projection."""
    model = fuse(randomise(nn.Sequential(Basic(3, 3), Bottle(3, 2, 4, 2))))
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(model, (image(4),), dynamic_shapes=({0: batch},))
        called = [str(n.target) for n in program.graph.nodes if "resnet_fused" in str(n.target)]
        assert called == ["resnet_fused.basic_block.default", "resnet_fused.bottleneck.default"]
        path = str(tmp_path / "model.pt2")
        torch._inductor.aoti_compile_and_package(program, package_path=path)
        run = torch._inductor.aoti_load_package(path)
        close(run(image(7)), eager(model, image(7)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_onnx(name: str, dynamo: bool, tmp_path: Path, calls: list[str]) -> None:
    """The file holds operators that only this package has, or fixes the batch size."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model, path = MODELS[name](), str(tmp_path / "model.onnx")
    options: dict[str, Any] = (
        {"dynamic_shapes": ({0: torch.export.Dim("batch", min=1, max=64)},), "verbose": False}
        if dynamo
        else {"input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}}
    )
    torch.onnx.export(model, (image(4, 40),), path, dynamo=dynamo, **options)
    assert calls == []
    graph = onnx.load(path).graph
    assert {n.domain for n in graph.node} == {""}, {n.op_type for n in graph.node}
    assert sum(n.op_type == "Conv" for n in graph.node) == sum(
        isinstance(m, nn.Conv2d) for m in model.modules()
    )
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(path)
    x = image(7, 40)
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    close(torch.from_numpy(y), eager(model, x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_trace_that_is_saved(name: str, calls: list[str]) -> None:
    """A traced and saved model needs this package, or fixes the size of the images."""
    model = MODELS[name]()
    with torch.no_grad():
        traced = torch.jit.trace(model, image(2, 40), check_trace=False)
        buffer = io.BytesIO()
        torch.jit.save(traced, buffer)
        buffer.seek(0)
        loaded = torch.jit.load(buffer)
        assert "resnet_fused::" not in str(loaded.inlined_graph) and calls == []
        x = image(3, 48)
        close(loaded(x), eager(model, x))


def test_exported_program_is_saved() -> None:
    """An exported program with the ops cannot be saved, or a block without projection is lost."""
    model = fuse(randomise(Net(Basic(8, 8), width=8)))
    buffer = io.BytesIO()
    with torch.no_grad():
        torch.export.save(torch.export.export(model, (image(),)), buffer)
        buffer.seek(0)
        close(torch.export.load(buffer).module()(image()), eager(model, image()))
