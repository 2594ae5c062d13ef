# SPDX-License-Identifier: BSD-3-Clause
"""Other people's ResNets on images of bytes, fused and not."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import resnet_fused
from fuse_spy import ALL, calls, make  # noqa: F401
from fuse_zoo import Backbone, Basic, Cifar, Net, one_thread, randomise  # noqa: F401
from resnet_fused import InputNorm, fuse, set_input_norm, unfuse
from resnet_fused.input_norm import normalise

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
X = torch.randint(0, 256, (2, 3, 20, 23), generator=torch.Generator().manual_seed(3)).byte()


def floats(dtype: torch.dtype = torch.float32, x: Tensor = X) -> Tensor:
    return normalise(x, InputNorm(MEAN, STD).tensor(x), dtype)


def told(model: nn.Module) -> Any:
    return set_input_norm(model, MEAN, STD)


class Deep(Net):
    """A stem of three convolutions, as timm's d-variants have."""

    def __init__(self) -> None:
        super().__init__(Basic(8, 16))
        self.conv1 = nn.Sequential(  # type: ignore[assignment]
            nn.Conv2d(3, 4, 3, 2, 1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 8, 3, 1, 1, bias=False),
        )


class Twice(Net):
    """The image is read again behind the stem."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.mean((1, 2, 3)).unsqueeze(1)


class Sized(Net):
    """The image is asked for its size as well."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        return F.interpolate(y, size=x.shape[-2:])


class Own(Net):
    """Takes bytes by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float() / 255 - 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_fused_stem_reads_the_bytes(dtype: torch.dtype, calls: list[str]) -> None:  # noqa: F811
    """Breaks if bytes give other bits than the same normalised beforehand, or are not fused."""
    fused = told(fuse(make().to(dtype)))
    assert fused._fuse_plan.takes_bytes
    for x in (X, X.contiguous(memory_format=torch.channels_last), X[:, :, 1:, ::2]):
        calls.clear()
        got = fused(x)
        assert calls == ALL
        assert torch.equal(got, fused(floats(dtype, x)))


@pytest.mark.parametrize(
    ("model", "reads"),
    [
        (Net(Basic(8, 16)), True),
        (Sized(Basic(8, 16)), True),
        (Twice(Basic(8, 16)), False),
        (Deep(), False),
        (Cifar(), False),
        (Backbone(), None),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else str(v),
)
@pytest.mark.parametrize("first", ["fuse", "norm"])
@torch.no_grad()
def test_any_model(model: nn.Module, reads: bool | None, first: str) -> None:
    """Breaks if a model whose stem cannot read bytes is wrong on them, or the order of the calls
    matters, or unfuse() takes the norm away.
    """
    model = randomise(copy.deepcopy(model))
    keys = list(model.state_dict())
    fused = told(fuse(model)) if first == "fuse" else fuse(told(model))
    if reads is not None:
        assert fused._fuse_plan.takes_bytes is reads
    assert list(fused.state_dict()) == keys

    def same(m: Any) -> None:
        for a, b in ((m(X), m(floats())), (m(x=X), m(x=floats()))):
            for u, v in zip(_leaves(a), _leaves(b), strict=True):
                assert torch.equal(u, v)

    same(fused)
    same(copy.deepcopy(fused))
    same(pickle.loads(pickle.dumps(fused)))
    with resnet_fused.backend("reference"):
        same(fused)
    handle = fused.register_forward_pre_hook(lambda m, args: None)
    inner = next(m for m in fused.modules() if isinstance(m, nn.Conv2d))
    again = inner.register_forward_hook(lambda m, args, y: None)
    same(fused)
    handle.remove()
    again.remove()
    with torch.autocast("cpu", torch.bfloat16):
        same(fused)
    plain = unfuse(copy.deepcopy(fused))
    assert torch.equal(_leaves(plain(X))[0], _leaves(plain(floats()))[0])
    fused.train()
    twin = copy.deepcopy(fused)
    assert torch.equal(_leaves(fused(X))[0], _leaves(twin(floats()))[0])


def _leaves(y: Any) -> list[Tensor]:
    return [v for v in torch.utils._pytree.tree_leaves(y) if isinstance(v, Tensor)]


@torch.no_grad()
def test_images_by_name_behind_an_option() -> None:
    """Breaks if only the first of the named arguments is looked at, or an option is changed."""

    class Output(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = make()

        def forward(self, pixels: Tensor, scale: Any = 1) -> dict[str, Tensor]:
            return {"logits": scale * self.net(pixels)}

    for model in (told(Output().eval()), fuse(told(Output().eval()))):
        want = model(scale=2, pixels=floats())["logits"]
        assert torch.equal(model(scale=2, pixels=X)["logits"], want)


@torch.no_grad()
def test_other_bytes_by_name() -> None:
    """Breaks if bytes that are no images are normalised for coming first in a call by names."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = make()

        def forward(self, pixels: Tensor, mask: Tensor) -> Tensor:
            assert mask.dtype is torch.uint8
            y: Tensor = self.net(pixels * mask)
            return y

    mask = (X > 99).byte()
    for model in (told(Masked().eval()), fuse(told(Masked().eval()))):
        want = model(floats(), mask)
        assert torch.equal(model(mask=mask, pixels=X), want)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.equal(compiled(mask=mask, pixels=X), want)
        assert torch.equal(model(mask=mask, pixels=floats()), want)


@torch.no_grad()
def test_without_a_norm() -> None:
    """Breaks if bytes are computed with as if they were normalised, or the error helps nobody; or
    a model that takes bytes by itself is disturbed.
    """
    fused = fuse(make())
    with pytest.raises(ValueError, match=r"x is uint8.*resnet_fused.set_input_norm\(model"):
        fused(X)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="x is uint8"):
        fused(X)
    own = randomise(Own(Basic(8, 16)))
    torch.testing.assert_close(fuse(own)(X), own(X), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_norm_can_be_changed_and_taken_back() -> None:
    """Breaks if an old norm is remembered with the plan, or a hook stays behind."""
    fused = told(fuse(make()))
    for _ in range(3):  # the plan is remembered
        first = fused(X)
    set_input_norm(fused, (0.5,) * 3, (0.5,) * 3)
    want = normalise(X, InputNorm((0.5,) * 3, (0.5,) * 3).tensor(X), torch.float32)
    assert torch.equal(fused(X), fused(want)) and not torch.equal(fused(X), first)
    assert len(fused._forward_pre_hooks) == 1
    set_input_norm(fused, None, None)
    assert not fused._forward_pre_hooks and not fused._forward_pre_hooks_with_kwargs
    with pytest.raises(ValueError, match="x is uint8"):
        fused(X)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
@torch.no_grad()
def test_compiled_exported_and_traced() -> None:
    """Breaks if a compiler cannot see through the norm or the hook."""
    for model in (fuse(told(make())), told(make())):
        want = model(X)
        assert torch.equal(torch.compile(model, fullgraph=True, backend="eager")(X), want)
        program = torch.export.export(model, (X,))
        assert torch.equal(program.module()(X), want)
        assert program.state_dict.keys() == model.state_dict().keys()
        traced = torch.jit.trace(model, (X,))
        torch.testing.assert_close(traced(X), want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_graph_module() -> None:
    """Breaks if torch.fx's own way of copying loses the norm."""
    fused = told(fuse(fx.symbolic_trace(make())))
    for model in (fused, fuse(told(fx.symbolic_trace(make()))), copy.deepcopy(fused)):
        torch.testing.assert_close(model(X), fused(floats()), rtol=1e-5, atol=1e-5)


def _pickled(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize(
    "copied",
    [
        lambda graph: _pickled(fuse(graph)),
        lambda graph: copy.deepcopy(_pickled(fuse(graph))),
        lambda graph: fuse(_pickled(graph)),
        lambda graph: fuse(_pickled(graph), inplace=True),
    ],
)
@torch.no_grad()
def test_a_graph_module_that_lost_its_hook(copied: Any) -> None:
    """Breaks if what torch.fx leaves of the norm, the attribute without the hook, is taken for all
    of it: fused it works, and after unfuse() no more.
    """
    net = nn.Sequential(
        nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    ).eval()
    model = copied(told(fx.symbolic_trace(net)))
    assert torch.equal(model(X), model(floats()))
    assert len(model._forward_pre_hooks) == 1
    assert torch.equal(unfuse(model)(X), net(floats()))


def test_gradients() -> None:
    """Breaks if parameters get other gradients from bytes."""
    grads = []
    for x in (X, floats()):
        model = told(fuse(make()))
        model(x).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_verify_on_bytes() -> None:
    """Breaks if verify cannot judge calls on bytes, or loses the norm of its copies."""
    model = told(make())
    found = resnet_fused.verify(fuse(model), X)
    assert [stage.op for stage in found] == ALL
    fuse(model, verify=X)
    fuse(told(fx.symbolic_trace(make())), verify=X)


def test_graphed(cuda: Any) -> None:
    """Breaks if a replayed graph keeps the norm, or the image, of the call that it was made of."""
    model = told(fuse(make()))
    handle = resnet_fused.graphed(model)
    for shift in range(4):
        x = X + shift
        assert torch.equal(handle(x), model(x))


@pytest.mark.parametrize("model", [None, "resnet50", torch.nn.functional.relu])
def test_refused(model: Any) -> None:
    """Breaks if something that is no module is accepted, or half of a norm."""
    with pytest.raises(TypeError, match="model must be an nn.Module"):
        set_input_norm(model, MEAN, STD)
    with pytest.raises(ValueError, match="mean and std must be given together"):
        set_input_norm(nn.ReLU(), MEAN, None)
