# SPDX-License-Identifier: BSD-3-Clause
"""What users do to a built network: other children, hooks, tracing, compiling, copying."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize, prune

from resnet_cases import images, plain, plain_block, small, watch
from resnet_fused.models import BasicBlock, Bottleneck, ResNet


class Double(nn.Conv2d):
    """A convolution that does more than nn.Conv2d."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _conv(**kwargs: object) -> nn.Conv2d:
    torch.manual_seed(5)
    return nn.Conv2d(64, 64, 3, padding=1, **kwargs)  # type: ignore[arg-type]


CHANGES: dict[str, tuple[Callable[[Any], object], bool]] = {
    # what the user does to a block of 64 channels without projection, and whether it still fuses
    "another convolution": (lambda b: setattr(b, "conv2", _conv(bias=True)), True),
    "grouped convolution": (lambda b: setattr(b, "conv1", _conv(groups=4)), True),
    "ReLU not in place": (lambda b: setattr(b, "relu", nn.ReLU()), True),
    "projection added": (
        lambda b: setattr(
            b, "downsample", nn.Sequential(nn.Conv2d(64, 64, 1), nn.BatchNorm2d(64)).eval()
        ),
        True,
    ),
    "subclassed convolution": (lambda b: setattr(b, "conv2", Double(64, 64, 3, padding=1)), False),
    "circular padding": (lambda b: setattr(b, "conv1", _conv(padding_mode="circular")), False),
    "padding by name": (
        lambda b: setattr(b, "conv1", nn.Conv2d(64, 64, 3, padding="same")),
        False,
    ),
    "LeakyReLU": (lambda b: setattr(b, "relu", nn.LeakyReLU(0.3)), False),
    "no ReLU": (lambda b: setattr(b, "relu", nn.Identity()), False),
    "no BatchNorm": (lambda b: setattr(b, "bn2", nn.Identity()), False),
    "no convolution": (lambda b: setattr(b, "conv2", nn.Identity()), False),
    "ReLU for BatchNorm": (lambda b: setattr(b, "bn1", nn.ReLU()), False),
    "BatchNorm trains": (lambda b: b.bn1.train(), False),
    "three-part projection": (
        lambda b: setattr(
            b,
            "downsample",
            nn.Sequential(nn.Conv2d(64, 64, 1), nn.BatchNorm2d(64), nn.ReLU()).eval(),
        ),
        False,
    ),
    "pooling projection": (
        lambda b: setattr(
            b, "downsample", nn.Sequential(nn.AvgPool2d(1), nn.Conv2d(64, 64, 1)).eval()
        ),
        False,
    ),
    "module as projection": (lambda b: setattr(b, "downsample", nn.Conv2d(64, 64, 1)), False),
    "empty projection": (lambda b: setattr(b, "downsample", nn.Sequential()), False),
    "pruned": (lambda b: prune.random_unstructured(b.conv1, "weight", 0.5), False),
    "parametrised": (
        lambda b: parametrize.register_parametrization(b.conv2, "weight", nn.Tanh()),
        False,
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_child_is_honoured(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that goes on with its first children, or fuses what it must not."""
    block = small().layer1[1]
    apply, fuses = CHANGES[change]
    x = images(2, 64, 9, 9)
    before = block(x)
    apply(block)
    expected = plain_block(block, x)
    calls = watch(monkeypatch)
    y = block(x)
    assert calls == (["basic_block"] if fuses else [])
    assert [s.pattern for s in block.fused_sites()] == ["basic_block"] or not fuses
    torch.testing.assert_close(y, expected)
    changes_nothing = change in ("ReLU not in place", "empty projection")
    assert torch.allclose(y, before, atol=1e-4) is changes_nothing


def test_removing_the_projection_takes_effect() -> None:
    """downsample = None where shapes allow it: the identity, not the old projection."""
    block = small(Bottleneck).layer1[0]
    block.conv3 = nn.Conv2d(64, 64, 1, bias=False)
    block.bn3 = nn.BatchNorm2d(64).eval()
    block.downsample = None
    x = images(1, 64, 5, 5)
    torch.testing.assert_close(block(x), plain_block(block, x))


@pytest.mark.parametrize("name", ["layer1.0.bn1", "layer2.0.downsample", "conv1", "maxpool", "fc"])
def test_hooks_see_what_eager_shows_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Feature extraction by hook: a fused call would skip the child, the hook would stay silent."""
    model, x = small(), images(2, 3, 32, 32)
    fused = model(x)
    seen: list[Tensor] = []
    child = model.get_submodule(name)
    handle = child.register_forward_hook(lambda m, args, y: seen.append(y.clone()))
    plain(model, x)
    torch.testing.assert_close(model(x), fused)
    assert len(seen) == 2
    torch.testing.assert_close(seen[1], seen[0])
    handle.remove()
    calls = watch(monkeypatch)
    assert torch.equal(model(x), fused)
    assert len(seen) == 2 and len(calls) == 7


@pytest.mark.parametrize("name", ["layer1", "layer1.0", "layer4"])
def test_hooks_on_blocks_and_stages_do_not_stop_fusion(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The usual feature hooks sit on stages: they must fire and cost nothing."""
    model, x = small(), images(2, 3, 32, 32)
    seen: list[Tensor] = []
    model.get_submodule(name).register_forward_hook(lambda m, args, y: seen.append(y))
    calls = watch(monkeypatch)
    model(x)
    assert len(seen) == 1 and len(calls) == 7


def test_symbolic_tracing_sees_the_plain_modules() -> None:
    """create_feature_extractor names nodes after children; a fused op would hide them or fail."""
    model, x = small(Bottleneck), images(2, 3, 32, 32)
    graph = fx.symbolic_trace(model)
    targets = {n.target for n in graph.graph.nodes if n.op == "call_module"}
    assert {"conv1", "maxpool", "layer1.0.conv2", "layer4.0.downsample.1", "fc"} <= targets
    torch.testing.assert_close(graph(x), plain(model, x))


def test_compiles_in_one_graph() -> None:
    """A forward that torch.compile must leave, or that another batch size breaks."""
    torch._dynamo.reset()
    model = small()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        for n in (2, 3):
            x = images(n, 3, 40, 40)
            torch.testing.assert_close(compiled(x), model(x))


def test_exports() -> None:
    """torch.export of a network for deployment."""
    model, x = small(Bottleneck), images(2, 3, 40, 40)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), model(x))


def test_traces() -> None:
    """torch.jit.trace, still used for deployment, needs standard ops, and no check that it would
    freeze into the graph.
    """
    model, x = small(), images(2, 3, 40, 40)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(model, x)
        other = images(3, 3, 40, 40, seed=9)
        torch.testing.assert_close(traced(other), model(other))
    assert "resnet_fused::" not in str(traced.inlined_graph)


def test_deepcopy_is_independent() -> None:
    """A copy that shares tensors with the original (weight averaging keeps such copies)."""
    model, x = small(Bottleneck), images(2, 3, 32, 32)
    before = model(x)
    other = copy.deepcopy(model)
    assert torch.equal(other(x), before)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    assert torch.equal(other(x), before)
    assert not torch.allclose(model(x), before)


def test_pickle_and_state_dict_round_trip() -> None:
    """A network that cannot be sent to another process, or stale weights after a load."""
    model, x = small(Bottleneck), images(2, 3, 32, 32)
    before = model(x)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), before)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = ResNet(Bottleneck, [2, 1, 1, 1], num_classes=10).eval()
    other(x)  # whatever the kernels cache of the old weights must not survive the load
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), before)


def test_blocks_stand_alone() -> None:
    """BasicBlock and Bottleneck used in a network of the user's own."""
    torch.manual_seed(0)
    for block in (BasicBlock(16, 16), Bottleneck(32, 8)):
        x = images(2, 16 if isinstance(block, BasicBlock) else 32, 11, 13)
        torch.testing.assert_close(block.eval()(x), plain_block(block, x))
