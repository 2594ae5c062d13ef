# SPDX-License-Identifier: BSD-3-Clause
"""report(): one row per convolution, true at the moment it is asked, printable."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fuse_zoo
from fuse_zoo import Basic, ConvNorm, DataDependent, Net, randomise
from resnet_fused import _extension, dispatch
from resnet_fused.fuse import fuse, unfuse
from resnet_fused.models import resnet18, resnext50_32x4d
from resnet_fused.report import Row, report

one_thread = fuse_zoo.one_thread


def test_before_and_after_fuse() -> None:
    """The report does not say what fuse would do, or changes the model."""
    model = randomise(Net(Basic(8, 8), width=8))
    classes = [type(m) for m in model.modules()]
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    before = report(model)
    assert [r.name for r in before] == names and len(before) == 3
    assert [type(m) for m in model.modules()] == classes
    why = "fuse() was not called on it"
    assert before[0] == Row("conv1", "stem", False, "plain", why)
    assert before.rows[1] == Row("layer1.0.conv1", "basic_block", False, "plain", why)
    path = dispatch.choose("cpu", torch.float32, "stem")
    after = report(fuse(model, inplace=True))
    assert after[0] == Row("conv1", "stem", True, path.name, path.reason)
    assert report(unfuse(model)).rows == before.rows


def test_train_mode() -> None:
    """A model in train mode is reported as fused."""
    fused = fuse(Net(Basic(8, 8), width=8)).train()
    assert {(r.fused, r.path, r.reason) for r in report(fused)} == {
        (False, "plain", "training mode")
    }
    assert all(r.fused for r in report(fused.eval()))


def test_own_models() -> None:
    """The package's models have no rows, or other patterns than they run."""
    model = resnet18().eval()
    rows = report(model)
    assert [r.pattern for r in rows] == ["stem"] + ["basic_block"] * 19
    assert all(r.fused for r in rows)
    model.layer2[0].downsample[1].register_forward_hook(lambda m, args, y: None)
    reasons = {r.name: r.reason for r in report(model) if not r.fused}
    assert list(reasons) == ["layer2.0.conv1", "layer2.0.conv2", "layer2.0.downsample.0"]
    assert set(reasons.values()) == {"a hook on 'downsample.1'"}


def test_what_own_kernels_leave_to_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A convolution that oneDNN computes is said to run on own kernels, or without the reason."""
    monkeypatch.setattr(_extension, "_avx512", True)
    rows = {r.name: r for r in report(resnext50_32x4d().eval())}
    assert rows["conv1"].path == rows["layer1.0.conv1"].path == "avx512"
    assert rows["layer1.0.conv2"][3:] == ("onednn", "own kernels take no grouped convolutions")
    few = fuse(randomise(nn.Sequential(ConvNorm(15, 16, 3), ConvNorm(16, 16, 3))).eval())
    assert [r.path for r in report(few)] == ["onednn", "avx512"]
    assert report(few)[0].reason.startswith("15 channels")
    few[0].conv.padding = (3, 3)  # windows in the padding alone, on which oneDNN may crash
    assert report(few)[0].path == "avx512"


def test_path_follows_dtype_and_backend() -> None:
    """The path is the one of the time of fuse."""
    fused = fuse(randomise(Net(Basic(8, 8), width=8)))
    assert {(r.path, r.reason) for r in report(fused.double())} == {
        ("reference", "no kernel takes torch.float64")
    } or not dispatch_has_kernels()
    with dispatch.backend("reference"):
        assert {r.path for r in report(fused)} == {"reference"}


def dispatch_has_kernels() -> bool:
    return dispatch.choose("cpu", torch.float32).name != "reference"


def test_table() -> None:
    """The table is not aligned, or the summary miscounts."""
    model = DataDependent(Basic(8, 8), ConvNorm(8, 16, 1))
    text = str(report(fuse(randomise(model))))
    lines = text.splitlines()
    assert len(lines) == 1 + 4 + 1
    columns = [lines[0].index(title) for title in ("pattern", "fused", "path")]
    for line in lines[1:-1]:
        assert all(line[c - 1] == " " and line[c] != " " for c in columns[1:])
    assert lines[1].split()[:3] == ["conv1", "no", "plain"]
    # On every CPU: 8 channels are too few for own kernels.
    summary = "3 of 4 convolutions fused: 2 in basic_block on onednn, 1 in conv_bn_act on onednn"
    assert lines[-1] == summary
    assert repr(report(model)).startswith("<Report: 0 of 4 convolutions fused")


class Calls(nn.Module):
    """Two convolutions that no readable forward reaches, one that nothing calls."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Basic(4, 4)
        self.unused = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner.conv2(self.inner.conv1(x)) if x.sum() > 0 else x


def test_nearest_reason() -> None:
    """The reason given for a convolution is that of some module far above it, or none."""
    model = nn.Sequential(nn.Conv1d(1, 1, 1), Calls(), nn.LazyConv2d(4, 3))
    rows = {r.name: r for r in report(fuse(model.eval()))}
    assert rows["0"].reason == "Conv1d is not fused"
    assert rows["1.inner.conv1"].fused  # as a part of Basic, which Calls does not call
    assert rows["1.unused"].reason == (
        "'1' (Calls): its forward depends on the values or the shape of a tensor"
    )
    assert rows["2"].reason == "LazyConv2d is not fused"


def test_children_replaced_after_fuse() -> None:
    """The report is about the children that were there when the model was fused."""
    fused = fuse(randomise(Net(Basic(8, 8), Basic(8, 8), width=8)))
    fused.layer1[0].conv1 = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
    fused.layer1[1].bn1 = nn.GroupNorm(2, 8)
    rows = {r.name: r for r in report(fused)}
    reason = "'conv1': padding_mode is 'circular', not 'zeros'"
    assert {rows[f"layer1.0.conv{i}"].reason for i in (1, 2)} == {reason}
    assert rows["layer1.1.conv1"].reason == "its output goes to GroupNorm, not to a BatchNorm"
    assert rows["layer1.1.conv2"].fused and rows["layer1.1.conv2"].pattern == "conv_bn_act"


@pytest.mark.filterwarnings("ignore:nothing in")
def test_no_convolutions() -> None:
    """An empty table cannot be printed."""
    rows = report(fuse(nn.Linear(2, 2)))
    assert len(rows) == 0 and "0 of 0 convolutions fused" in str(rows)


@pytest.mark.filterwarnings("ignore")
def test_torchscript() -> None:
    """A model that cannot be fused at all gets an empty report."""
    traced = torch.jit.trace(randomise(Net(Basic(8, 8), width=8)), torch.randn(1, 3, 20, 20))
    rows = report(fuse(nn.Sequential(traced), inplace=True))
    assert [r.name for r in rows] == ["0.conv1", "0.layer1.0.conv1", "0.layer1.0.conv2"]
    assert {r.reason for r in rows} == {"TorchScript cannot be changed; fuse the model before"}
