# SPDX-License-Identifier: BSD-3-Clause
"""Fused models under torch's compilers, exporters and function transforms."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import fuse_zoo
from fuse_zoo import Basic, Bottle, HelperBlock, Net, image, randomise
from resnet_fused import dispatch
from resnet_fused.fuse import fuse
from resnet_fused.models import resnet18
from resnet_fused.report import report

one_thread = fuse_zoo.one_thread


def make() -> tuple[nn.Module, nn.Module]:
    plain = randomise(Net(Basic(8, 8), HelperBlock(8, 4, 8), Bottle(8, 4, 16, 2)))
    return plain, fuse(plain)


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=3e-6 * b.abs().max().item())


def check_ops(graph: torch.fx.Graph) -> None:
    """The graph holds the five fused calls of ``make``, or none where they are plain PyTorch."""
    found = [str(n.target) for n in graph.nodes if "resnet_fused" in str(n.target)]
    fused = dispatch.choose("cpu", torch.float32).name != "reference"
    assert len(found) == (5 if fused else 0), found


@pytest.fixture
def graphs() -> Any:
    """A dynamo backend that keeps the graphs it is given."""
    torch._dynamo.reset()
    kept: list[torch.fx.GraphModule] = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        kept.append(gm)
        return gm.forward

    backend.kept = kept  # type: ignore[attr-defined]
    yield backend
    torch._dynamo.reset()


def test_compile_fullgraph(graphs: Any) -> None:
    """The checks before a fused call break the graph, or the ops do not get into it."""
    plain, fused = make()
    compiled = torch.compile(fused, fullgraph=True, backend=graphs)
    with torch.no_grad():
        close(compiled(image()), plain(image()))
        close(compiled(image(5, 27)), plain(image(5, 27)))
    check_ops(graphs.kept[0].graph)


def test_compile_notices_changes(graphs: Any) -> None:
    """Compiled code goes on calling a fused op after a child or a mode has changed.

    Of hooks added later torch.compile itself takes no notice.
    """
    plain = randomise(nn.Sequential(Basic(3, 4), Basic(4, 4)))
    fused = fuse(plain)
    compiled = torch.compile(fused, backend=graphs, fullgraph=True)
    x = image()
    with torch.no_grad():
        close(compiled(x), plain(x))
        assert compiled(x).stride() == plain(x).stride()
        for m in (plain, fused):
            m[0].relu = nn.Sigmoid()
        close(compiled(x), plain(x))
        for m in (plain, fused):
            m[1].bn1.train()
        close(compiled(x), plain(x))


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_batch(strict: bool) -> None:
    """torch.export fails, fixes the batch size or loses the ops."""
    plain, fused = make()
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(
            fused, (image(4),), dynamic_shapes=({0: batch},), strict=strict
        )
        close(program.module()(image(7)), plain(image(7)))
    check_ops(program.graph)
    assert set(program.state_dict) == set(plain.state_dict())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace_gives_standard_ops() -> None:
    """A traced model needs this package to run."""
    plain, fused = make()
    with torch.no_grad():
        traced = torch.jit.trace(fused, image())
        close(traced(image(seed=3)), plain(image(seed=3)))
    assert "resnet_fused" not in str(traced.inlined_graph)


def test_symbolic_trace_sees_the_modules() -> None:
    """Feature extractors built on torch.fx find no convolution; what they give cannot be fused."""
    plain, fused = make()
    traced = torch.fx.symbolic_trace(fused)
    targets = {n.target for n in traced.graph.nodes if n.op == "call_module"}
    assert {"layer1.0.conv1", "layer1.0.bn1", "fc"} <= targets
    again = fuse(traced)
    assert all(r.fused for r in report(again))
    with torch.no_grad():
        close(again(image()), plain(image()))
        traced.graph.erase_node(next(n for n in traced.graph.nodes if n.op == "output"))
        traced.graph.output(next(n for n in traced.graph.nodes if n.target == "layer1.0.relu"))
        traced.recompile()
        close(fuse(traced)(image()), traced(image()))


def test_vmap_and_grad() -> None:
    """A function transform gives wrong numbers where eager gives right ones."""
    plain, fused = make()
    xs = torch.stack([image(seed=i) for i in range(3)])
    with torch.no_grad():
        close(torch.vmap(fused)(xs), torch.vmap(plain)(xs))
    grads = [torch.func.grad(lambda x, m=m: m(x).sum())(image()) for m in (fused, plain)]
    close(*grads)

    def loss(params: dict[str, torch.Tensor], m: nn.Module) -> torch.Tensor:
        return torch.func.functional_call(m, params, (image(),)).sum()

    params = dict(plain.named_parameters())
    for name, want in torch.func.grad(loss)(params, plain).items():
        close(torch.func.grad(loss)(params, fused)[name], want)


@pytest.mark.parametrize("grad", [False, True])
def test_autocast(grad: bool) -> None:
    """Autocast's dtype is ignored, or stays where autocast was left."""
    plain, fused = make()
    with torch.set_grad_enabled(grad):
        with torch.autocast("cpu", torch.bfloat16):
            got, like = fused(image()), plain(image())
        assert got.dtype == like.dtype == torch.bfloat16
        want = copy.deepcopy(plain).double()(image().double())
        scale = want.abs().max().item()
        # a dozen layers, each rounded to 8 bits; more precise than eager, which also rounds weights
        torch.testing.assert_close(got.double(), want, rtol=0, atol=12 * 2**-8 * scale)
        close(fused(image()), plain(image()))


def test_meta_and_fake_tensors() -> None:
    """Shapes cannot be worked out without data."""
    plain, fused = make()
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert fused(torch.empty(3, 3, 64, 64)).shape == (3, 10)
    meta = fused.to("meta")
    assert meta(torch.empty(3, 3, 64, 64, device="meta")).shape == (3, 10)
    assert all(r.fused and r.path == "reference" for r in report(meta))


def own() -> tuple[nn.Module, nn.Module]:
    """A model written with the ops, and a copy that a hook keeps from calling any of them."""
    model = randomise(resnet18(num_classes=3)).double()
    plain = copy.deepcopy(model)
    for m in plain.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            m.register_forward_hook(lambda mod, args, y: None)
    return plain, model


@pytest.mark.parametrize("pair", [make, own])
def test_function_transforms(pair: Any) -> None:
    """A derivative is zero, as that of an op without a forward-mode formula may be, or raises."""
    plain, fused = (m.double() for m in pair())
    x = image(2, 32).double()
    for transform in (
        lambda m: torch.func.grad(lambda v: m(v).square().sum())(x),
        lambda m: torch.func.jvp(m, (x,), (x.cos(),))[1],
        lambda m: torch.func.jacrev(lambda v: m(v)[:, 0])(x),
        lambda m: torch.vmap(m)(torch.stack((x, x + 1))),
    ):
        want, got = transform(plain), transform(fused)
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("pair", [make, own])
def test_forward_mode(pair: Any) -> None:
    """Dual tensors lose their tangent or raise, where eager differentiates."""
    tangents, x = [], image(2, 32).double()
    for m in pair():
        m.double()
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, x.cos())
            tangents.append(forward_ad.unpack_dual(m(dual)).tangent)
    assert tangents[0].abs().max() > 0
    torch.testing.assert_close(tangents[1], tangents[0])


@pytest.mark.parametrize("pair", [make, own])
def test_second_derivative(pair: Any) -> None:
    """The gradient's gradient, which gradient penalties need, is missing or wrong."""
    results = []
    for m in pair():
        m.double()
        x = image(2, 32).double().requires_grad_()
        (g,) = torch.autograd.grad(m(x).square().sum(), x, create_graph=True)
        g.square().sum().backward()
        results.append(x.grad)
    assert results[0].abs().max() > 0
    torch.testing.assert_close(results[1], results[0])


def test_deterministic_algorithms() -> None:
    """An op is refused in deterministic mode, or gives other bits from call to call."""
    plain, fused = make()
    torch.use_deterministic_algorithms(True)
    try:
        ys = [fused(image()) for _ in range(3)]
        close(ys[0], plain(image()))
        assert all(torch.equal(y, ys[0]) for y in ys)
        for m in (plain, fused):
            m(image()).square().sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(plain.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=0, atol=1e-5 * a.grad.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_dtypes_are_eagers(dtype: torch.dtype) -> None:
    """A result or a block's output has another dtype than eager gives it under autocast."""
    plain, fused = make()
    seen: list[list[torch.dtype]] = [[], []]
    for m, dtypes in zip((plain, fused), seen, strict=True):
        for child in (m.layer1[0], m.layer1[2], m):
            child.register_forward_hook(lambda mod, args, y, d=dtypes: d.append(y.dtype))
        with torch.no_grad(), torch.autocast("cpu", dtype):
            m(image())
            m(image().to(dtype))
            m(image()[:1])
    assert seen[0] == seen[1] and dtype in seen[0]
