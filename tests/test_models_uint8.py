# SPDX-License-Identifier: BSD-3-Clause
"""The package's own ResNets on images of bytes."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fused
from harness.case import DTYPES
from resnet_cases import small, watch
from resnet_fused import InputNorm, set_input_norm
from resnet_fused.input_norm import normalise
from resnet_fused.models import Bottleneck, ResNet

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
X = torch.randint(0, 256, (2, 3, 33, 47), generator=torch.Generator().manual_seed(3)).byte()


def floats(dtype: torch.dtype = torch.float32, x: Tensor = X) -> Tensor:
    return normalise(x, InputNorm(MEAN, STD).tensor(x), dtype)


def told(model: nn.Module) -> Any:
    return set_input_norm(model, MEAN, STD)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_bytes_equal_images_normalised_beforehand(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if the stem does not read the bytes, or a conversion of the model rounds the norm."""
    model = told(small(Bottleneck)).to(dtype)
    want = model(floats(dtype))
    calls = watch(monkeypatch)
    for x in (X, X.contiguous(memory_format=torch.channels_last)):
        calls.clear()
        assert torch.equal(model(x), want) and calls[0] == "stem"
    features = model.forward_features(X)
    assert torch.equal(features, model.forward_features(floats(dtype)))
    assert model(X[:0]).shape == (0, 10)


def _training(model: ResNet) -> None:
    model.train()


def _hook(model: ResNet) -> None:
    model.conv1.register_forward_hook(lambda m, args, y: None)


def _pool(model: ResNet) -> None:
    model.maxpool = nn.MaxPool2d(3, 2, 1, ceil_mode=True)  # the convolution alone is fused


def _identity(model: ResNet) -> None:
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    model.maxpool = nn.Identity()  # type: ignore[assignment]


def _sequential(model: ResNet) -> None:
    model.conv1 = nn.Sequential(model.conv1)  # type: ignore[assignment]


def _frozen(model: ResNet) -> None:
    for p in model.parameters():
        p.requires_grad_(False)


@pytest.mark.parametrize("change", [_training, _hook, _pool, _identity, _sequential, _frozen])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_where_the_stem_is_plain(change: Callable[[ResNet], None], dtype: torch.dtype) -> None:
    """Breaks if a stem that is not fused gets bytes, or the norm in another dtype."""
    model = told(small())
    change(model)
    twin = copy.deepcopy(model.to(dtype))
    assert torch.equal(model(X), twin(floats(dtype)))


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_gradients(mode: str) -> None:
    """Breaks if parameters get other gradients from bytes than from images, training or not."""
    grads = []
    for x in (X, floats()):
        model = told(small())
        model.train(mode == "train")
        model(x).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@torch.no_grad()
def test_keys_copies_and_pickles() -> None:
    """Breaks if the norm shows in a state_dict, or is lost by a copy."""
    model = small()
    keys, names = list(model.state_dict()), [n for n, _ in model.named_modules()]
    want = told(model)(X)
    assert list(model.state_dict()) == keys and [n for n, _ in model.named_modules()] == names
    assert not model._forward_pre_hooks
    assert not told(resnet_fused.graphed(small()))._forward_pre_hooks
    model.load_state_dict(small().state_dict())
    for again in (copy.copy(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(X), want)
    assert torch.equal(model.double().float()(X), want)


@torch.no_grad()
def test_autocast_reference_and_inference_mode() -> None:
    """Breaks if a mode of torch, or the other backend, computes another image."""
    model = told(small())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(X), model(floats()))
    with resnet_fused.backend("reference"):
        assert torch.equal(model(X), model(floats()))
    with torch.inference_mode():
        assert torch.equal(model(X), model(floats()))


@torch.no_grad()
def test_compiled_and_exported() -> None:
    """Breaks if a compiler cannot see through the norm, or keeps the first image's size."""
    model = told(small())
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    program = torch.export.export(
        model, (X,), dynamic_shapes=({0: torch.export.Dim("n", min=1, max=64)},)
    )
    for x in (X, torch.cat([X, 255 - X, X])):
        assert torch.equal(compiled(x), model(x))
        assert torch.equal(program.module()(x), model(x))
    assert program.state_dict.keys() == model.state_dict().keys()


@torch.no_grad()
def test_without_a_norm() -> None:
    """Breaks if bytes are taken for normalised images, or the error does not say what to do."""
    for change in (lambda m: None, _hook, _pool):
        model = small()
        change(model)
        with pytest.raises(ValueError, match=r"x is uint8.*resnet_fused.set_input_norm\(model"):
            model(X)
    model = told(small())
    with pytest.raises(RuntimeError, match=r"norm must have shape \[2, 1\]"):
        model(X[:, :1])
    with pytest.raises(ValueError, match="3 channels"):
        model.train()(X.permute(0, 2, 3, 1))


@torch.no_grad()
def test_a_norm_can_be_changed_and_taken_back() -> None:
    """Breaks if an old norm is remembered with the stem."""
    model = told(small())
    for _ in range(3):
        first = model(X)
    set_input_norm(model, (0.5,) * 3, (0.5,) * 3)
    want = normalise(X, InputNorm((0.5,) * 3, (0.5,) * 3).tensor(X), torch.float32)
    assert torch.equal(model(X), model(want)) and not torch.equal(model(X), first)
    with pytest.raises(ValueError, match="x is uint8"):
        set_input_norm(model, None, None)(X)


@torch.no_grad()
def test_a_subclass_with_a_forward_of_its_own() -> None:
    """Breaks if such a class, which may do anything with its images, gets bytes."""

    class Brighter(ResNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(1.5 * x)

    model = small()
    model.__class__ = Brighter
    told(model)
    assert torch.equal(model(X), model(floats()))


@pytest.mark.parametrize("name", ["forward", "_forward_impl", "forward_features", "_stem"])
@pytest.mark.parametrize("whose", ["class", "instance", "wrapped"])
@torch.no_grad()
def test_own_code_before_the_stem(name: str, whose: str) -> None:
    """Breaks if somebody's code between a call and the stem gets bytes."""
    own = getattr(ResNet, name)

    def brighter(self: ResNet, x: Tensor) -> Tensor:
        y: Tensor = own(self, 1.5 * x)
        return y

    model = small()
    if whose == "instance":
        setattr(model, name, functools.partial(brighter, model))
    else:
        function = functools.wraps(own)(brighter) if whose == "wrapped" else brighter
        model.__class__ = type("Brighter", (ResNet,), {name: function})
    assert not torch.equal(model(floats()), small()(floats()))
    told(model)
    assert torch.equal(model(X), model(floats()))


@torch.no_grad()
def test_within_another_module() -> None:
    """Breaks if only the outermost module can be told."""
    inner = told(small())
    outer = nn.Sequential(inner, nn.Softmax(1))
    assert torch.equal(outer(X), outer(floats()))
    assert torch.equal(resnet_fused.fuse(outer)(X), outer(X))
    whole = told(nn.Sequential(small(), nn.Softmax(1)))
    assert torch.equal(whole(X), outer(X))
    assert torch.equal(resnet_fused.graphed(inner)(X), inner(X))
    assert torch.equal(nn.DataParallel(inner)(X), inner(X))


def _replica(model: nn.Module) -> nn.Module:
    """As torch.nn.parallel.replicate makes them on GPUs."""
    made: Any = model._replicate_for_data_parallel()
    for name, child in model._modules.items():
        if child is not None:
            made._modules[name] = _replica(child)
    for name, p in model._parameters.items():
        if p is None:
            made._parameters[name] = None
        else:
            setattr(made, name, p.detach())
    return made  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("own", [True, False])
@torch.no_grad()
def test_replicas_of_data_parallel(dtype: torch.dtype, own: bool) -> None:
    """Breaks if the images' dtype is taken from parameters, which a replica has not."""
    model = small().to(dtype)
    told(model if own else model.conv1)
    if own:
        _hook(model)  # a plain stem, which is normalised before
    module = _replica(model if own else model.conv1)
    assert not list(module.parameters())
    assert torch.equal(module(X), module(floats(dtype)))


def test_verify_on_bytes() -> None:
    """Breaks if verify cannot judge calls on bytes."""
    assert resnet_fused.verify(told(small()), X)[0].op == "stem"
