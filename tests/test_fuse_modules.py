# SPDX-License-Identifier: BSD-3-Clause
"""fuse() on modules that are not what their class says: pruned, parametrised, overridden."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fuse_zoo
from fuse_zoo import Basic, Net, conv3, image, randomise
from resnet_fused.fuse import fuse, unfuse
from resnet_fused.models import resnet18
from resnet_fused.report import report
from test_fuse_refused import C, One, check, straight

one_thread = fuse_zoo.one_thread


def pruned() -> nn.Module:
    m = One(straight)
    prune.l1_unstructured(m.conv, "weight", 0.5)
    return m


def parametrised() -> nn.Module:
    m = One(straight)
    parametrizations.weight_norm(m.conv)
    return m


def old_weight_norm() -> nn.Module:
    m = One(straight)
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(m.conv)
    return m


def spectral() -> nn.Module:
    m = One(straight)
    parametrizations.spectral_norm(m.conv)
    return m


def old_spectral_norm() -> nn.Module:
    m = One(straight)
    nn.utils.spectral_norm(m.conv)
    return m


def aware() -> nn.Module:
    conv = torch.ao.nn.qat.Conv2d(C, C, 3, qconfig=torch.ao.quantization.get_default_qat_qconfig())
    return One(straight, conv=conv)


class Adapter(nn.Module):
    """A convolution with a low-rank one beside it, as LoRA puts there."""

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base_layer = base
        self.down, self.up = nn.Conv2d(C, 1, 3, padding=1, bias=False), nn.Conv2d(1, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x)) * 0.5


class MyConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class MyNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class MyBlock(Basic):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sigmoid()


def patched() -> nn.Module:
    m = One(straight)
    m.conv.forward = lambda x: x * 2  # type: ignore[method-assign]
    return m


CHANGED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "pruned": (pruned, "its weight is computed from other tensors"),
    "parametrised": (parametrised, "ParametrizedConv2d is not fused"),
    "weight_norm": (old_weight_norm, "its weight is computed from other tensors"),
    "subclass of conv": (lambda: One(straight, conv=MyConv(C, C, 3)), "MyConv is not fused"),
    "subclass of norm": (lambda: One(straight, bn=MyNorm(C)), "'bn': MyNorm is not fused"),
    "spectral_norm": (spectral, "ParametrizedConv2d is not fused"),
    "old spectral_norm": (old_spectral_norm, "its weight is computed from other tensors"),
    "low-rank adapter": (lambda: One(straight, conv=Adapter(conv3(C, C))), "goes to add"),
    "quantisation-aware": (aware, "there is no INT8"),
    "patched forward": (patched, "its forward is replaced"),
}


@pytest.mark.filterwarnings("ignore:nothing in")
@pytest.mark.parametrize("name", CHANGED)
def test_changed_modules(name: str) -> None:
    """A convolution or BatchNorm that computes its own thing is taken for the ordinary one."""
    make, reason = CHANGED[name]
    model = randomise(make())
    fused = fuse(model, inplace=True)
    rows = report(fused)
    assert not any(r.fused for r in rows) and reason in rows[0].reason, rows[0]
    assert [type(m) for m in fused.modules()] == [type(m) for m in model.modules()]


def test_unfuse_of_a_model_of_this_package() -> None:
    """Breaks if it is taken for plain PyTorch afterwards, to compare with."""
    model = resnet18().eval()
    with pytest.warns(UserWarning, match=r"unfuse\(\) leaves \w+ as it is.*backend\('reference'\)"):
        assert unfuse(model) is model
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert type(unfuse(fuse(One(straight).eval()))) is One


@pytest.mark.parametrize("change", ["weight_norm", "prune", "adapter"])
def test_changed_after_fuse(change: str) -> None:
    """A module that somebody parametrises, prunes or wraps later is still fused as it was."""
    models = [randomise(Net(Basic(8, 8), width=8))]
    models.append(fuse(models[0]))
    for m in models:
        torch.manual_seed(0)
        if change == "weight_norm":
            parametrizations.weight_norm(m.layer1[0].conv1)
            m.layer1[0].conv1.parametrizations.weight.original0.data.mul_(2)
        elif change == "prune":
            prune.l1_unstructured(m.layer1[0].conv1, "weight", 0.5)
        else:
            beside = nn.Sequential(m.layer1[0].conv1, nn.Conv2d(8, 8, 1)).eval()
            m.layer1[0].conv1 = beside
    plain, fused = models
    want = plain(image())
    torch.testing.assert_close(fused(image()), want, rtol=0, atol=3e-6 * want.abs().max().item())
    rows = {r.name: r for r in report(fused)}
    assert rows["conv1"].fused
    name = "layer1.0.conv1" + (".0" if change == "adapter" else "")
    assert not rows[name].fused and rows[name].reason, rows[name]


def test_block_with_another_forward() -> None:
    """A subclass's forward is replaced by its base's; its inherited code is still fused."""
    rows = check(MyBlock(C, C))
    assert all(r.fused and r.pattern == "basic_block" for r in rows)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantised_modules_are_listed() -> None:
    """An INT8 convolution is missing from the report, or taken for a float one."""
    q = torch.ao.nn.quantized.Conv2d(C, C, 1)
    rows = report(nn.Sequential(q, nn.ReLU()))
    assert [(r.name, r.fused) for r in rows] == [("0", False)] and "INT8" in rows[0].reason


def test_instance_forward_is_kept() -> None:
    """A forward put on an instance is lost."""
    model = randomise(Net(Basic(8, 8), width=8))
    model.layer1[0].forward = lambda x: x * 0  # type: ignore[method-assign]
    fused = fuse(model, inplace=True)
    rows = {r.name: r for r in report(fused)}
    assert rows["conv1"].fused
    assert (
        "'layer1.0' (Basic): its forward is replaced on the instance"
        in rows["layer1.0.conv1"].reason
    )
    with torch.no_grad():
        assert torch.equal(fused(image()), fused(image(seed=5)))


def test_frozen_batchnorm_of_another_kind() -> None:
    """One whose eps is a constant of its forward is left alone, not guessed."""

    class FrozenBatchNorm2d(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("weight", "bias", "running_mean", "running_var"):
                self.register_buffer(name, torch.rand(C) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            scale = self.weight * (self.running_var + 1e-5).rsqrt()
            return x * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)

    model = One(straight, bn=FrozenBatchNorm2d())
    (row,) = check(model, image(c=C))
    assert not row.fused
