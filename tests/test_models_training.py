# SPDX-License-Identifier: BSD-3-Clause
"""One network trains as plain PyTorch and infers fused, and nothing goes stale between the two."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_cases import images, plain, small, watch
from resnet_fused.models import BasicBlock, Bottleneck, ResNet

Forward = Callable[[ResNet, Tensor], Tensor]
LABELS = torch.tensor([1, 7, 3, 0])


def train(model: ResNet, forward: Forward, steps: int) -> list[Tensor]:
    """The losses of ``steps`` steps of SGD with momentum on seeded images."""
    sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    losses = []
    for step in range(steps):
        loss = F.cross_entropy(forward(model, images(4, 3, 32, 32, seed=step)), LABELS)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        losses.append(loss.detach())
    return losses


def call(model: ResNet, x: Tensor) -> Tensor:
    return model(x)


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    for (name, s), t in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(s, t), name


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@pytest.mark.parametrize("frozen", [False, True])
def test_training_equals_plain_bit_for_bit_and_eval_uses_the_result(
    block: Any, frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fused op, another order of operations or another BatchNorm update in train mode."""
    model, x = small(block), images(2, 3, 40, 40, seed=9)
    other = copy.deepcopy(model)
    before = model(x)  # in eval mode first: what the kernels cache now must not be used later
    for m in (model, other):
        m.train()
        for child in m.modules() if frozen else ():
            if isinstance(child, nn.BatchNorm2d):
                child.eval()
    calls = watch(monkeypatch)
    assert torch.equal(torch.stack(train(model, call, 5)), torch.stack(train(other, plain, 5)))
    assert calls == []
    assert_same_state(model, other)
    model.eval()
    with torch.no_grad():
        y = model(x)
        torch.testing.assert_close(y, plain(other.eval(), x), rtol=1e-4, atol=1e-4)
    assert "pool_linear" in calls and not torch.allclose(y, before, rtol=1e-2, atol=1e-2)
    assert_same_state(model, other)  # eval leaves no trace


def test_a_trained_step_between_two_evals_is_seen() -> None:
    """Packed weights of the first eval used in the second."""
    model, x = small(), images(2, 3, 40, 40, seed=9)
    for _ in range(3):
        model.train()
        train(model, call, 1)
        model.eval()
        with torch.no_grad():
            torch.testing.assert_close(model(x), plain(model, x), rtol=1e-4, atol=1e-4)


CHANGES: dict[str, Callable[[ResNet], object]] = {
    "weight in place": lambda m: m.layer1[0].conv2.weight.detach().mul_(2),
    "weight data in place": lambda m: m.layer1[0].conv2.weight.data.mul_(2),
    "weight replaced": lambda m: setattr(
        m.layer1[0].conv2, "weight", nn.Parameter(m.layer1[0].conv2.weight * 2)
    ),
    "data replaced": lambda m: setattr(
        m.layer1[0].conv2.weight, "data", m.layer1[0].conv2.weight.data * 2
    ),
    "running_var": lambda m: m.layer2[0].bn2.running_var.mul_(3),
    "running_mean": lambda m: m.bn1.running_mean.add_(0.5),
    "eps": lambda m: setattr(m.layer3[0].bn1, "eps", 0.7),
    "projection": lambda m: m.layer4[0].downsample[1].bias.data.add_(1),
    "fc": lambda m: m.fc.bias.data.add_(1),
    "stem": lambda m: m.conv1.weight.data.neg_(),
    "load_state_dict": lambda m: m.load_state_dict(
        {k: v * 1.5 if v.is_floating_point() else v for k, v in m.state_dict().items()}
    ),
    "double": lambda m: m.double().float(),
    "channels_last": lambda m: m.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_tensor_counts_on_the_next_call(change: str) -> None:
    """A stale copy of any parameter or buffer."""
    model, x = small(Bottleneck), images(2, 3, 40, 40)
    with torch.no_grad():
        before = model(x)
        CHANGES[change](model)
        y = model(x)
        torch.testing.assert_close(y, plain(model, x), rtol=1e-4, atol=1e-5)
    keeps = change in ("double", "channels_last")
    assert torch.allclose(y, before, rtol=1e-3, atol=1e-3) is keeps


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=str
)
def test_gradients_in_eval_equal_plain(block: Any, dtype: torch.dtype, tolerance: float) -> None:
    """Fine-tuning or saliency in eval mode: a gradient that is missing, or of another tensor."""
    model = small(block).to(dtype)
    other = copy.deepcopy(model)
    x = images(2, 3, 40, 40, dtype=dtype).requires_grad_()
    z = x.detach().clone().requires_grad_()
    model(x).square().sum().backward()
    plain(other, z).square().sum().backward()
    pairs = [("x", x, z)]
    pairs += [(n, p, dict(other.named_parameters())[n]) for n, p in model.named_parameters()]
    for name, a, b in pairs:
        assert a.grad is not None and b.grad is not None, name
        scale = b.grad.abs().max()
        assert scale > 0, name
        assert (a.grad - b.grad).abs().max() <= tolerance * scale, name


def test_only_what_requires_grad_gets_one() -> None:
    """A frozen backbone with a trained head: gradients that are computed or kept for nothing."""
    model = small().requires_grad_(False)
    model.fc.requires_grad_(True)
    model(images(2, 3, 40, 40)).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is not None] == [
        "fc.weight",
        "fc.bias",
    ]
    assert not model.forward_features(images(1, 3, 40, 40)).requires_grad


def test_inference_mode_leaves_a_network_that_trains() -> None:
    """Tensors kept from inference_mode cannot be saved for backward."""
    model, x = small(), images(4, 3, 64, 64)
    with torch.inference_mode():
        y = model(x)
    torch.testing.assert_close(model(x), y.clone())
    model(x).sum().backward()
    train(model.train(), call, 1)


def test_autocast_training_equals_plain() -> None:
    """Mixed-precision training must also be what it was, 16-bit convolutions included."""
    model = small(Bottleneck).train()
    other = copy.deepcopy(model)
    x = images(4, 3, 128, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y, z = model(x), plain(other, x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, z)
