# SPDX-License-Identifier: BSD-3-Clause
"""A fused model stays a model: weights are live, it trains and has gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fuse_zoo
from fuse_spy import ALL, calls, close, make
from fuse_zoo import Basic, Bottle, HelperBlock, Net, image, randomise
from resnet_fused.fuse import fuse, unfuse
from resnet_fused.report import report

one_thread = fuse_zoo.one_thread

__all__ = ["calls", "one_thread"]  # fixtures


def test_eval_calls_the_ops(calls: list[str]) -> None:
    """The report says fused, but the original forward runs."""
    model = fuse(make())
    model(image())
    assert calls == ALL
    calls.clear()
    model.train()(image())
    assert calls == []
    model.eval()
    unfuse(model)(image())
    assert calls == []


def change_data(m: nn.Module) -> None:
    for p in m.parameters():
        p.data.mul_(1.1)


def change_in_place(m: nn.Module) -> None:
    with torch.no_grad():
        for t in [*m.parameters(), *m.buffers()]:
            t.add_(1) if t.dtype == torch.long else t.mul_(1.1)


def change_state(m: nn.Module) -> None:
    m.load_state_dict(randomise(make(), seed=3).state_dict())


def change_assign(m: nn.Module) -> None:
    m.load_state_dict(randomise(make(), seed=3).state_dict(), assign=True)


def change_parameter(m: nn.Module) -> None:
    for sub in m.modules():
        if isinstance(sub, nn.Conv2d):
            sub.weight = nn.Parameter(sub.weight.detach() * 0.9)
        if isinstance(sub, nn.BatchNorm2d):
            sub.running_mean = sub.running_mean + 0.1
            sub.eps = 0.01


def change_child(m: nn.Module) -> None:
    m.layer1[0].conv1 = nn.Conv2d(8, 8, 5, padding=2)
    down = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16))
    m.layer1[2].identity_downsample = down
    m.fc = nn.Linear(16, 3)
    randomise(m)


CHANGES: list[Callable[[nn.Module], Any]] = [  # the last two change no value
    change_data,
    change_in_place,
    change_state,
    change_assign,
    change_parameter,
    change_child,
    lambda m: m.double(),
    lambda m: m.to(memory_format=torch.channels_last),
]


@pytest.mark.parametrize("change", CHANGES)
def test_weights_are_live(change: Callable[[nn.Module], Any], calls: list[str]) -> None:
    """A copy of the weights made by fuse or by an earlier call is used after they changed."""
    plain = make()
    fused = fuse(plain)
    before = fused(image())
    for m in (plain, fused):
        change(m)
    x = image().to(next(plain.parameters()).dtype)
    calls.clear()
    with torch.no_grad():
        got, want = fused(x), plain(x)
    assert calls == ALL
    close(got, want)
    if change not in CHANGES[-2:]:
        assert got.shape != before.shape or not torch.allclose(got, before)


def test_half() -> None:
    """.half() is ignored by the fused forward."""
    plain = make()
    fused = fuse(plain).half()
    y = fused(image().half())
    assert y.dtype == torch.float16
    # 20 roundings to 11 bits, against the values before them
    torch.testing.assert_close(y.float(), plain(image()), rtol=0, atol=20 * 2**-11 * 4)


def test_trains_as_the_original(calls: list[str]) -> None:
    """Train mode is not the original code: a weight or BatchNorm buffer differs in a bit."""
    plain = make()
    models = [plain, fuse(plain)]
    for m in models:
        m.train()
        step = torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9)
        g = torch.Generator().manual_seed(0)
        for _ in range(5):
            x = torch.randn(4, 3, 20, 20, generator=g)
            step.zero_grad()
            m(x).square().mean().backward()
            step.step()
    assert calls == []
    for (name, a), (_, b) in zip(*(m.state_dict().items() for m in models), strict=True):
        assert torch.equal(a, b), name
    plain.eval()
    models[1].eval()
    with torch.no_grad():
        close(models[1](image()), plain(image()))
    assert calls == ALL


def test_frozen_batchnorm_while_training(calls: list[str]) -> None:
    """A block in train mode with BatchNorms in eval mode uses or changes the wrong statistics."""
    plain = make()
    models = [plain, fuse(plain)]
    for m in models:
        m.train()
        for bn in m.modules():
            if isinstance(bn, nn.BatchNorm2d):
                bn.eval()
        m(image()).sum().backward()
    assert calls == []
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_one_batchnorm_in_train_mode(calls: list[str]) -> None:
    """A single BatchNorm that still learns is frozen by the fused call around it."""
    plain = make()
    models = [plain, fuse(plain)]
    for m in models:
        m.layer1[0].bn1.train()
        m(image())
    close(models[1].layer1[0].bn1.running_mean, models[0].layer1[0].bn1.running_mean)
    assert not torch.equal(models[0].layer1[0].bn1.running_mean, make().layer1[0].bn1.running_mean)
    assert calls == [name for name in ALL if name != "basic_block"]
    row = next(r for r in report(models[1]) if r.name == "layer1.0.conv1")
    assert not row.fused and row.reason == "'bn1' is in training mode"


def test_new_owner_of_children_in_eval_mode(calls: list[str]) -> None:
    """A Sequential made of an eval model's children is itself in train mode, and runs plain."""
    model = make()
    plain = nn.Sequential(model.conv1, model.bn1, nn.ReLU().eval(), nn.MaxPool2d(3, 2, 1).eval())
    fused = fuse(plain)
    assert plain.training and report(fused)[0].fused
    close(fused(image()), plain(image()))
    assert calls == ["stem"]
    fused.train()(image())
    assert calls == ["stem"] and report(fused)[0].reason == "training mode"


class ReadsMode(nn.Module):
    """Its forward asks for its own mode, which differs from its children's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return y * 2 if self.training else y.relu()


@pytest.mark.parametrize("nested", [False, True])
def test_mode_of_the_module_alone(nested: bool, calls: list[str]) -> None:
    """The plan for eval mode runs in train mode, because every child is in eval mode."""
    plain = randomise(nn.Sequential(ReadsMode(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    fused = fuse(plain)
    for mode in (True, False, True):
        for m in (plain, fused):
            (m[0] if nested else m).training = mode
        close(fused(image()), plain(image()))
    if nested:
        assert calls == ["conv_bn_act"] * 2  # once, in eval mode


def test_helper_in_train_mode_again_and_again(calls: list[str]) -> None:
    """A mode counts as a change of the module, and after a few calls the module is given up."""
    fused = fuse(make())
    for mode in [True, False] * 20:
        fused.layer1[1].layer[0].train(mode)
        fused(image())
    calls.clear()
    fused(image())
    assert calls == ALL


def test_gradients() -> None:
    """Gradients in eval mode differ from the original's in float64."""
    plain = make().double()
    fused = fuse(plain)
    xs = [image().double().requires_grad_() for _ in range(2)]
    for m, x in zip((plain, fused), xs, strict=True):
        m(x).square().sum().backward()
    torch.testing.assert_close(xs[1].grad, xs[0].grad)
    for (name, a), (_, b) in zip(*(m.named_parameters() for m in (plain, fused)), strict=True):
        torch.testing.assert_close(b.grad, a.grad, msg=name)


def test_copy_made_in_inference_mode(calls: list[str]) -> None:
    """The copy's weights are inference tensors, so that it can never be trained."""
    plain = make()
    with torch.inference_mode():
        fused = fuse(plain)
        fused(image())
    assert calls == ALL
    assert not any(t.is_inference() for t in fused.state_dict().values())
    fused.train()(image()).sum().backward()


def test_moving_average_is_swapped_in(calls: list[str]) -> None:
    """An average of the weights is not fused, or swapping it in and out has no effect."""
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    plain = make()
    fused = fuse(plain)
    kept = []
    for m in (plain, fused):
        ema = torch.optim.swa_utils.AveragedModel(m, multi_avg_fn=average, use_buffers=True)
        ema.update_parameters(m)
        change_in_place(m)
        ema.update_parameters(m)
        raw = {k: v.clone() for k, v in m.state_dict().items()}
        ys = [ema.eval()(image()), m(image())]
        m.load_state_dict(ema.module.state_dict())
        ys.append(m(image()))
        m.load_state_dict(raw)
        kept.append([*ys, m(image())])
    assert calls == ALL * 4
    assert torch.equal(kept[1][0], kept[1][2]) and torch.equal(kept[1][1], kept[1][3])
    assert not torch.allclose(kept[1][0], kept[1][1])
    for want, got in zip(*kept, strict=True):
        close(got, want)


def test_fused_on_meta_then_loaded(calls: list[str]) -> None:
    """A model fused before it has weights does not find those that are loaded."""
    plain = make()
    with torch.device("meta"):
        skeleton = Net(Basic(8, 8), HelperBlock(8, 4, 8), Bottle(8, 4, 16, 2)).eval()
    fused = fuse(skeleton).to_empty(device="cpu")
    fused.load_state_dict(plain.state_dict())
    close(fused(image()), plain(image()))
    assert calls == ALL
