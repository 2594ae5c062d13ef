# SPDX-License-Identifier: BSD-3-Clause
"""resnet_fused.profile: which layers there are, what each fused call replaces, and their work."""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import resnet_fused
from profiles import PEAKS, Net, Squeezed, like_resnet50, profile_of
from resnet_fused import profile as package
from resnet_fused.profile.laps import Lapped, layer_times, timed_laps
from resnet_fused.profile.match import match
from resnet_fused.profile.record import kind_of
from resnet_fused.profile.result import Profile
from resnet_fused.profile.subject import Subject, subject
from resnet_fused.timing import Measurement, Warmup


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small calls of several threads are slow on a machine that is busy with other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def native() -> nn.Module:
    return resnet_fused.resnet18(num_classes=10).eval()


def fused_net() -> nn.Module:
    return resnet_fused.fuse(Net().eval())


def hooked() -> nn.Module:
    """A model of which one block cannot be one call."""
    model: Any = native()
    model.layer2[0].conv2.register_forward_hook(lambda module, args, y: None)
    return model


def unfused() -> nn.Module:
    return Net().eval()


MODELS: list[Callable[[], nn.Module]] = [native, fused_net, hooked, unfused]


def groups_of(found: Subject) -> list[list[int]]:
    return match(found.before.parts, found.after.parts)


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_every_eager_module_is_in_one_fused_bar(make: Callable[[], nn.Module]) -> None:
    """Breaks if a layer is lost, counted twice, or one module is torn apart."""
    found = subject(make(), torch.randn(2, 3, 33, 33))
    groups = groups_of(found)
    assert sorted(sum(groups, [])) == list(range(len(found.before.parts)))
    ran = {p.module for p in found.before.parts}
    counted = (nn.Conv2d, nn.BatchNorm2d, nn.Linear, nn.MaxPool2d)
    wanted = {n for n, m in found.fused.named_modules() if isinstance(m, counted)}
    assert wanted <= ran
    of = {found.before.parts[i].module: k for k, group in enumerate(groups) for i in group}
    for k, part in enumerate(found.after.parts):
        if part.call is not None:
            assert all(of[name] == k for name in part.call.modules if name in wanted), part.name


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_the_layers_do_the_networks_work(make: Callable[[], nn.Module]) -> None:
    """Breaks if operations are left out or counted twice: torch's own counter is the judge."""
    x = torch.randn(2, 3, 33, 33)
    found = subject(make(), x)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        found.eager(x)
    total = counter.get_total_flops()
    assert sum(p.flop for p in found.before.parts) == total > 0


def test_the_calls_of_a_native_model_are_its_blocks() -> None:
    """Breaks if looking at the layers unfuses them, or a name or a kind is wrong."""
    found = subject(resnet_fused.resnet50().eval(), torch.randn(1, 3, 32, 32))
    names = [part.name for part in found.after.parts]
    assert names[:3] == ["stem", "layer1.0", "layer1.1"] and names[-1] == "head"
    assert len(names) == 18 and all(part.call for part in found.after.parts)
    first = [found.before.parts[i] for i in groups_of(found)[1]]
    assert [p.kind for p in first] == ["conv", "bn", "relu"] * 2 + [
        *("conv", "bn", "conv", "bn", "add", "relu")
    ]
    assert first[-2].name == "layer1.0.add" and first[-3].name == "layer1.0.downsample.1"


def test_bytes_are_what_a_layer_reads_and_writes() -> None:
    """Breaks if parameters are taken for activations, or a tensor is counted twice."""
    reference: Any = native().double()  # a call of many operations
    own: Any = native()
    for kind, net in ((4, own), (8, reference)):
        x = torch.randn(2, 3, 32, 32, dtype=torch.float64 if kind == 8 else torch.float32)
        found = subject(net, x)
        stem, block = found.after.parts[:2]
        assert stem.name == "stem" and block.name == "layer1.0", kind
        assert stem.read == 2 * 3 * 32 * 32 * kind
        assert stem.written == block.read == block.written == 2 * 64 * 8 * 8 * kind
        tensors = [*net.layer1[0].parameters(), *net.layer1[0].buffers()]
        assert block.weights == sum(t.nbytes for t in tensors if t.dim())
        assert sum(p.weights for p in found.before.parts) == sum(
            p.weights for p in found.after.parts
        )


def test_a_block_in_parts_is_matched_part_by_part() -> None:
    """Breaks if what runs unfused is hidden in a fused call, or a functional ReLU goes astray."""
    found = subject(fused_net(), torch.randn(2, 3, 33, 33))
    seen = {
        part.name: [found.before.parts[i].name for i in group]
        for part, group in zip(found.after.parts, groups_of(found), strict=True)
    }
    assert seen["stem"] == ["conv1", "bn1", "relu", "maxpool"]
    assert seen["blocks.1.conv1"] == ["blocks.1.conv1", "blocks.1.bn1", "blocks.1.relu"]
    assert seen["blocks.1.conv2"] == ["blocks.1.conv2", "blocks.1.bn2"]
    assert seen["blocks.1.gate"] == ["blocks.1.gate"]
    assert seen["blocks.1.mul"] == ["blocks.1.mul"]
    assert seen["blocks.1.add_relu"] == ["blocks.1.add", "blocks.1.relu"]
    assert seen["head"] == ["pool", "fc"]


def test_one_relu_for_many_calls_and_one_block_run_twice() -> None:
    """Breaks if shared modules confuse which call an eager layer belongs to."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Squeezed()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.block(self.block(x))

    found = subject(resnet_fused.fuse(Twice().eval()), torch.randn(1, 16, 8, 8))
    groups = groups_of(found)
    assert sorted(sum(groups, [])) == list(range(len(found.before.parts)))
    sizes = [len(g) for g in groups if g]  # without conversions of the memory format
    assert sizes == [3, 2, 1, 1, 1, 1, 2] * 2
    names = [part.name for part in found.after.parts]
    assert "block.conv1" in names and "block.conv1 (2)" in names


def test_what_computes_nothing_is_no_layer() -> None:
    """Breaks if views, or modules that hand on their input, get bars of their own."""
    net = nn.Sequential(nn.Dropout(), nn.Identity(), nn.Flatten(), nn.Linear(12, 3), nn.Flatten())
    with pytest.warns(UserWarning, match="nothing in Sequential was fused"):
        found = subject(net.eval(), torch.randn(2, 3, 2, 2))
    assert [part.name for part in found.before.parts] == ["3"]
    assert set(found.before.layers) == set(found.after.layers) == {0}


def test_nothing_of_the_model_is_changed() -> None:
    """Breaks if hooks, classes or stand-ins for ops are left in the user's model."""
    for model in (native(), fused_net()):
        x = torch.randn(1, 3, 32, 32)
        before = [
            (type(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()
        ]
        y = model(x)
        found = package.profile(model, x, budget_s=0.1, min_rounds=3, peaks=PEAKS)
        assert [
            (type(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()
        ] == before
        assert torch.equal(model(x), y) and all(
            row.fused for row in resnet_fused.report(model) if "gate" not in row.name
        )
        assert found.fused.ms > 0


def test_a_profile_adds_up() -> None:
    """Breaks if times land in other rows, or fused work is not that of the layers it replaces."""
    x = torch.randn(2, 3, 64, 64)
    model = fused_net()
    found = package.profile(model, x, budget_s=0.5, min_rounds=3, peaks=PEAKS)
    paths = {row.layer.name: row.layer.path for row in found.rows}
    assert paths["blocks.0.gate"] == "eager" and paths["head"] == "cpu"
    assert paths["blocks.0.conv1"] == resnet_fused.report(model)[1].path
    for row in found.rows:
        assert row.layer.work.flop == sum(layer.work.flop for layer in row.eager)
        assert row.layer.ms > 0 and (row.ratio is not None) == bool(row.eager)
    for who, layers in (
        (found.fused, [row.layer for row in found.rows]),
        (found.eager, [layer for row in found.rows for layer in row.eager]),
    ):
        assert 0 < sum(layer.ms for layer in layers) < 1.5 * max(who.ms, who.profiled)
    assert found.facts["model"] == "Net"
    assert "blocks.0.add_relu" in str(found) and "untouched" in str(found)


@pytest.mark.parametrize(
    ("model", "x", "error", "message"),
    [
        ("resnet50", torch.ones(1), TypeError, "model must be an nn.Module, got str"),
        (Net(), torch.ones(1, 3, 8, 8), ValueError, "model must be in eval mode"),
        (Net().eval(), [1], TypeError, "x must be a tensor or a tuple of tensors, .* got list"),
        (Net().eval(), (), TypeError, r"got \(\)"),
        (Net().eval(), torch.ones(0, 3, 8, 8), ValueError, r"got shape \(0, 3, 8, 8\)"),
        (Net().eval(), torch.ones(1, 5, 8, 8), ValueError, "x must be an input that Net takes"),
        (nn.Identity().eval(), torch.ones(1), ValueError, "Identity runs no torch operation"),
        (Net().eval(), torch.ones(1, 3, 8, 8, dtype=torch.uint8), ValueError, "floating point"),
    ],
)
def test_wrong_arguments_are_named(model: Any, x: Any, error: type, message: str) -> None:
    """Breaks if the user gets a traceback from the inside instead of a sentence."""
    with (
        pytest.warns() if isinstance(model, nn.Identity) else _quiet(),
        pytest.raises(error, match=message),
    ):
        package.profile(model, x)


def _quiet() -> Any:
    import contextlib

    return contextlib.nullcontext()


def test_a_forward_that_varies_is_refused() -> None:
    """Breaks if times of one layer are booked on another."""

    class Fickle(Net):
        count = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            type(self).count += 1
            y = super().forward(x)
            return y if self.count % 2 else y + 1

    with pytest.raises(RuntimeError, match="differ from call to call"):
        package.profile(Fickle().eval(), torch.ones(1, 3, 16, 16), budget_s=0.1, peaks=PEAKS)


# ------------------------------------------------------------------------------------- the clock
def test_the_clock_is_read_around_operations_only() -> None:
    """Breaks if what passes between two operations is booked on a layer, or a view makes one."""
    ticks = iter(range(0, 10_000_000, 1_000_000))
    x = torch.ones(4)
    lapped = Lapped(lambda: (x + 1).view(2, 2).mul(2), [0, 1, 1], 2, now=lambda: next(ticks))
    with torch.inference_mode():
        lapped()
    assert lapped.laps() == [[1.0, 2.0]]
    wrong = Lapped(lambda: x + 1, [0, 0], 1)
    with (
        torch.inference_mode(),
        pytest.raises(RuntimeError, match="ran 1 operations where it ran 2"),
    ):
        wrong()


@pytest.mark.parametrize(
    ("visits", "picked"),
    [
        ([[1.0], [1.0]], [[[3.0]], [[4.0]]]),  # a call a visit
        ([[1.0, 1.0], [1.0, 1.0]], [[[4.0], [5.0]], [[7.0], [8.0]]]),  # the first is not timed
    ],
)
def test_only_timed_calls_count(visits: list[list[float]], picked: list[list[list[float]]]) -> None:
    """Breaks if calls that warm the caches are taken for samples."""
    measured = Measurement({"a": visits}, {"a": Warmup(3, 1.0, 1.0, 1.0, True)})
    laps = [[float(i)] for i in range(3 + len(visits) * (len(visits[0]) + (len(visits[0]) > 1)))]
    assert timed_laps(laps, measured, "a") == picked
    for wrong in (laps[1:], [*laps, [0.0]]):
        with pytest.raises(ValueError, match="laps of a must be those of 3 calls and 2 visits"):
            timed_laps(wrong, measured, "a")
    assert layer_times([[[1.0, 2.0, 4.0]]], [0, 2]) == [[5.0]]


def test_on_a_gpu_events_are_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if a GPU's kernels are timed by the host, which only launches them."""
    made: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            made.append(self)

        def record(self) -> None:
            self.at = len(made)

        def elapsed_time(self, end: Any) -> float:
            return float(end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    x = torch.ones(3)
    lapped = Lapped(lambda: x + 1, [0], 1, device="cuda")
    with torch.inference_mode():
        lapped()
        lapped()
    assert lapped.laps() == [[1.0], [1.0]] and len(made) == 4


# ------------------------------------------------------------------------------------- the files
def test_csv_and_json_hold_what_the_profile_does() -> None:
    """Breaks if a column is lost, a unit is wrong, or a number does not come back."""
    found = like_resnet50()
    text = io.StringIO()
    found.write_csv(text)
    rows = list(csv.DictReader(io.StringIO(text.getvalue())))
    assert len(rows) == sum(1 + len(row.eager) for row in found.rows)
    fused = [row for row in rows if row["side"] == "fused"]
    for row, read in zip(found.rows, fused, strict=True):
        assert read["layer"] == read["group"] == row.layer.name
        assert float(read["ms"]) == pytest.approx(row.layer.ms, rel=1e-5)
        assert float(read["eager_ms"]) == pytest.approx(row.eager_ms, rel=1e-5)
        assert float(read["tflops"]) == pytest.approx(
            row.layer.work.flop / row.layer.ms / 1e9, rel=1e-5
        )
        assert float(read["gb_per_s"]) == pytest.approx(5e6 / row.layer.ms / 1e6, rel=1e-5)
        least = max(row.layer.work.flop / PEAKS.peak, 5e6 / PEAKS.bandwidth)
        assert float(read["share_of_peak"]) == pytest.approx(1e3 * least / row.layer.ms, rel=1e-5)
    assert rows[0]["model"] == "resnet<50> & co" and Counter(r["group"] for r in rows)["stem"] == 5
    text = io.StringIO()
    found.write_json(text)
    whole = json.loads(text.getvalue())
    assert whole["layers"] == found.records()
    assert whole["whole"]["fused"]["ms"] == pytest.approx(found.fused.ms, rel=1e-5)
    assert whole["peaks"] == {"tflops": 2.0, "gb_per_s": 20.0}


@pytest.mark.parametrize(
    "odd",
    [
        profile_of([("only", [1.0], 0.5)]),
        profile_of([("none", [], 0.5)]),
        profile_of([("zero", [0.0], 0.0)]),
    ],
    ids=["one layer", "nothing replaced", "no time"],
)
def test_odd_profiles_can_be_written(odd: Profile) -> None:
    """Breaks if a layer without time or counterpart divides by zero, or NaN gets into JSON."""
    assert odd.rows[0].layer.name in str(odd)
    json.dumps(odd.as_dict(), allow_nan=False)
    text = io.StringIO()
    odd.write_csv(text)
    assert "nan" not in text.getvalue() and "inf" not in text.getvalue()
    assert math.isfinite(odd.fused.overhead)


def test_kinds() -> None:
    """Breaks if torch's names, in place or not, composite or not, fall into several kinds."""
    for ops, kind in (
        (("conv2d", "convolution", "mkldnn_convolution"), "conv"),
        (("batch_norm", "native_batch_norm", "cudnn_batch_norm"), "bn"),
        (("relu", "relu_"), "relu"),
        (("add", "add_"), "add"),
        (("max_pool2d", "max_pool2d_with_indices", "adaptive_avg_pool2d", "mean"), "pool"),
        (("linear", "addmm"), "linear"),
        (("sigmoid_",), "sigmoid"),
    ):
        assert {kind_of(op) for op in ops} == {kind}
