# SPDX-License-Identifier: BSD-3-Clause
"""The GPU scripts of benchmarks/ without a GPU: what they compute, write and decide."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from resnet_fused import dispatch, models
from resnet_fused.bench import subjects
from source_tree import benchmarks

roofline = benchmarks("gpu_roofline")
timing = benchmarks("gpu_timing")
results = benchmarks("gpu_results")
report = benchmarks("gpu_report")
gpu_models = benchmarks("gpu_models")
gpu_layers = benchmarks("gpu_layers")
gpu_sanitize = benchmarks("gpu_sanitize")
gpu_subjects = benchmarks("gpu_subjects")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small calls of several threads are slow on a machine that is busy with other tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------- roofline
@pytest.mark.parametrize(
    ("name", "kernels"), [("resnet18", 18), ("resnet34", 34), ("resnet50", 50), ("resnet152", 152)]
)
def test_the_units_are_the_network(name: str, kernels: int) -> None:
    """A layer, a projection or a parameter that the floor leaves out or counts twice.

    Each convolution is a kernel but the projections, which run in another's.
    """
    net = roofline.network(name)
    units = net.units(1, 2)
    assert len(units) == kernels
    convs = sum(unit.flops for unit in units[:-1])
    head = units[-1].flops
    assert (convs + head) / 2e9 == pytest.approx(subjects.gmacs(name, 224), rel=1e-9)

    with torch.device("meta"):
        model = getattr(models, name)()
    wanted = sum(p.numel() for p in model.parameters())
    wanted += sum(b.numel() for b in model.buffers() if b.dim() == 1)  # running mean and variance
    blocks = [c for b in net.blocks for c in (*b.convs, *([b.projection] if b.projection else []))]
    found = sum(c.parameters() for c in (net.stem, *blocks)) + (net.features + 1) * net.classes
    assert found == wanted


def test_bytes_are_counted_once() -> None:
    """A projection's output that is stored after all, or a residual that nobody reads."""
    plain = roofline.Conv("a", c=8, k=16, r=1, stride=1, size=4, out=4)
    last = roofline.Conv("b", c=16, k=32, r=1, stride=1, size=4, out=4, residual=True)
    side = roofline.Conv("s", c=8, k=32, r=1, stride=1, size=4, out=4)
    n, pixels = 3, 3 * 16
    assert plain.unit(n, 2).bytes == 2 * (pixels * 8 + 8 * 16 + 4 * 16 + pixels * 16)
    assert plain.unit(n, 2).flops == 2 * pixels * 8 * 16
    with_residual = pixels * 16 + 16 * 32 + 4 * 32 + 2 * pixels * 32
    assert last.unit(n, 2).bytes == 2 * with_residual
    identity = roofline.Block((plain, last), None).units(n, 2)
    assert [u.bytes for u in identity] == [plain.unit(n, 2).bytes, last.unit(n, 2).bytes]
    joined = roofline.Block((plain, last), side).units(n, 2)[1]
    extra = pixels * 8 + 8 * 32 + 4 * 32
    assert joined.bytes == 2 * (with_residual - pixels * 32 + extra)
    assert joined.flops == last.flops(n) + side.flops(n)
    # A strided 1x1 reads one pixel in four; a 3x3 reads all.
    assert roofline.Conv("", c=1, k=1, r=1, stride=2, size=8, out=4).inputs(1) == 16
    assert roofline.Conv("", c=1, k=1, r=3, stride=2, size=8, out=4).inputs(1) == 64


def test_a_floor_is_the_slower_of_two() -> None:
    """Memory-bound and compute-bound kernels that are added up before the maximum is taken."""
    c = roofline.Ceilings(bandwidth=100.0, peak=10.0)
    units = [roofline.Unit("memory", 1, 200), roofline.Unit("compute", 30, 100)]
    assert [u.floor(c) for u in units] == [2.0, 3.0]
    assert roofline.floor(units, c) == 5.0


# --------------------------------------------------------------------------------------- timing
def test_rounds_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """One contender timed after another, so that a clock that drifts favours one of them."""
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    monkeypatch.setattr(timing, "calls_per_visit", lambda ms, visit_ms, most=0: 1)
    found = timing.measure(calls, "cpu", budget_s=60, rounds=(3, 8))
    assert {len(t.rounds) for t in found.values()} == {8}
    rounds = [order[9:][at : at + 3] for at in range(0, 24, 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len({tuple(r) for r in rounds}) > 1


def test_measuring_ends_when_the_time_is_up() -> None:
    """A slow contender that is timed for all rounds, or a fast one for too few to have a median."""
    clock = iter(range(0, 1000, 10))
    found = timing.measure({"a": lambda: None}, "cpu", 5, rounds=(3, 50), now=lambda: next(clock))
    assert len(found["a"].rounds) == 3
    assert timing.Times((3.0, 1.0, 2.0)).median == 2.0
    assert timing.Times((1.0, 2.0)).spread == math.inf


@pytest.mark.parametrize(
    ("ms", "visit_ms", "count"), [(0.1, 25, 200), (1.0, 25, 25), (40.0, 25, 1), (0.0, 25, 200)]
)
def test_calls_per_visit(ms: float, visit_ms: float, count: int) -> None:
    """No call at all of something slow, or thousands of something fast."""
    assert timing.calls_per_visit(ms, visit_ms) == count


def test_inputs_are_rotated_beyond_the_cache() -> None:
    """Inputs that are still in L2 when they are used again, which flatters the time."""
    assert timing.rotations(1e6, 50_000_000) == 150
    assert timing.rotations(1e9, 50_000_000) == 2
    assert timing.rotations(1.0, 50_000_000) == 512


def test_ceilings_are_plausible() -> None:
    """Bandwidth or rate in the wrong unit."""
    found = timing.ceilings("cpu", torch.float32, quick=True)
    assert 1e7 < found.bandwidth < 1e13 and 1e7 < found.peak < 1e14


# -------------------------------------------------------------------------------------- results
def row(contender: str, ms: float | None, graph: bool = False, **more: Any) -> dict[str, Any]:
    """A row as gpu_models writes it."""
    base = {
        "model": "resnet50",
        "dtype": "fp16",
        "infer_batch_size": 8,
        "contender": contender,
        "graph": graph,
        "infer_step_time": ms,
        "infer_samples_per_sec": 8e3 / ms if ms else None,
        "share_of_floor": 0.5 if ms else None,
        "versus_best_eager": 2.0 if ms else None,
        "peak_bytes": 3 << 20,
        "agrees": True,
        "note": "",
        "max_err": 0.01,
        "err_bound": 0.1,
    }
    return base | more


def test_the_models_table_shows_the_best_of_ours() -> None:
    """Images per second of the slower way to run resnet_fused, or columns that shift when a
    contender is missing in a setting."""
    rows = [
        row("eager", 4.0),
        row("resnet_fused", 2.0),
        row("resnet_fused", 1.0, graph=True, peak_bytes=1 << 20),
        row("eager", None, dtype="bf16", note="out of memory"),
        row("resnet_fused", 8.0, dtype="bf16"),
    ]
    head, rule, first, second = results.models_table(rows).splitlines()
    assert head.startswith("| model | dtype | batch | eager | resnet_fused | resnet_fused graph |")
    assert rule.count("|") == head.count("|") == first.count("|") == second.count("|")
    assert first == "| resnet50 | fp16 | 8 | 4.000 | 2.000 | 1.000 | 8,000 | 2.00 | 50% | 1 | 3 |"
    assert second.startswith("| resnet50 | bf16 | 8 | - | 8.000 | - | 1,000 |")


def test_layer_totals_weigh_by_occurrence() -> None:
    """A layer that occurs six times counted once, or a block counted beside its convolutions."""
    common = {"dtype": "fp16", "batch": 1, "tflops": 1.0, "gbs": 2.0, "share_of_floor": 0.5}
    ours = {"resnet_fused": 2.0, "cudnn": 3.0}
    rows = [
        {**common, "layer": "a", "count": 6, "conv": True, "us": ours, "floor_us": 1.0},
        {**common, "layer": "b", "count": 1, "conv": True, "us": ours, "floor_us": 1.0},
        {**common, "layer": "block", "count": 1, "conv": False, "us": ours, "floor_us": 1.0},
    ]
    assert results.totals_table(rows).splitlines()[2] == "| fp16 | 1 | 14 | 21 | 7 |"
    rows[0]["us"] = {"resnet_fused": 2.0}  # no sum of times that are not all there
    assert results.totals_table(rows).splitlines()[2] == "| fp16 | 1 | 14 | - | 7 |"
    assert results.layers_table(rows).count("\n") == 5


def test_json_holds_no_infinities(tmp_path: Path) -> None:
    """A file that JSON readers refuse, or half a file after a stop."""
    rows = [results.rounded({"a": math.inf, "b": 1.23456789, "c": "text", "d": True, "e": None})]
    file = results.write(tmp_path, "models", "cpu", {"cpus": 2}, rows, ["x"])
    assert file.name.startswith("benchmark-infer-models-nhwc-pt") and file.suffix == ".json"
    whole = json.loads(file.read_text())
    assert whole["results"] == [{"a": None, "b": 1.23457, "c": "text", "d": True, "e": None}]
    assert whole["skipped"] == ["x"] and [p.name for p in tmp_path.iterdir()] == [file.name]


def test_the_report_has_everything() -> None:
    """A failure, a wrong result or a skipped setting that the report does not mention."""
    facts = results.facts("cpu")
    run = {
        "build": {"status": "passed", "detail": "library of 4 MB\nmore", "seconds": 61.4},
        "test": {"status": "failed", "detail": "1 failures | 2", "seconds": 5},
    }
    bad = row("resnet_fused", 2.0, agrees=False)
    machine = {"ceilings": {"fp16": {"TB/s": 3.0, "TFLOP/s": 700.0}}}
    models = {
        "machine": machine,
        "results": [row("tensorrt", None, note="not installed"), bad],
        "skipped": ["resnet152 fp16 batch 256"],
    }
    text = report.report(facts, run, {"models": models})
    assert "| build | passed | 61 | library of 4 MB |" in text
    assert "| test | failed | 5 | 1 failures / 2 |" in text
    assert "fp16: 3.00 TB/s, 700 TFLOP/s" in text
    assert "- tensorrt in resnet50 fp16 batch 8: not installed" in text
    assert "- WRONG: resnet_fused in resnet50 fp16 batch 8: error 0.01, bound 0.1" in text
    assert "- resnet152 fp16 batch 256" in text and "## Layers" not in text


# ---------------------------------------------------------------------- the scripts on the CPU
def test_the_grid_is_the_promised_one() -> None:
    """A setting left out or measured twice; TF32 before the 16-bit types of all depths."""
    found = gpu_models.settings(
        gpu_models.MODELS, ("fp16", "bf16", "tf32"), gpu_models.BATCHES, 224
    )
    assert len(found) == len(set(found)) == 3 * 3 * 5
    assert {s.batch for s in found} == {1, 8, 32, 128, 256}
    assert [s.dtype for s in found].index("tf32") == 30
    assert str(found[0]) == "resnet50 fp16 batch 1"


def test_models_run_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A typo that would cost the first minutes on a GPU."""
    arguments = ["--device", "cpu", "--quick", "--results", str(tmp_path)]
    assert gpu_models.main(arguments) == 0
    assert gpu_models.main([*arguments, "--part", "compile"]) == 0
    assert "resnet18 fp32 batch 2: eager" in capsys.readouterr().out
    (grid,) = tmp_path.glob("*-models-*.json")
    rows = json.loads(grid.read_text())["results"]
    assert [r["contender"] for r in rows[:3]] == ["eager", "channels_last", "resnet_fused"]
    assert all(r["infer_step_time"] > 0 and r["agrees"] for r in rows)
    assert rows[2]["max_err"] <= rows[2]["err_bound"] and rows[0]["err_bound"] is None
    assert max(r["versus_best_eager"] for r in rows[:2]) == 1.0
    assert len(list(tmp_path.glob("*-compile-*.json"))) == 1


def test_a_wrong_result_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times of a kernel that computes something else, published."""
    right = gpu_subjects.Subject.error

    def error(subject: Any, y: torch.Tensor) -> float:
        wrong: float = right(subject, y + 1)
        return wrong

    monkeypatch.setattr(gpu_subjects.Subject, "error", error)
    arguments = ["--device", "cpu", "--quick", "--results", str(tmp_path)]
    assert gpu_models.main(arguments) == 1


def test_a_rival_that_cannot_run_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """One contender's failure that ends the whole run."""
    subject = gpu_subjects.Subject(models.resnet18().eval(), torch.float32, "cpu", 32)
    monkeypatch.setattr(gpu_subjects.importlib.util, "find_spec", lambda name: None)
    runner = gpu_subjects.tensorrt(subject, 1, 100.0)
    assert runner.call is None and "torch_tensorrt is not installed" in runner.note
    (late,) = gpu_subjects.compiled("default", subject, 1, 1.0)
    assert late.call is None and "too few" in late.note


def test_graphed_is_measured_at_batch_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of plain calls under the name of replays; a failed capture that is not noted."""
    subject = gpu_subjects.Subject(models.resnet18().eval(), torch.float32, "cpu", 32)
    monkeypatch.setattr(timing, "graphed", lambda call, device: (call, call()))
    with torch.inference_mode():
        names = [[str(r) for r in gpu_subjects.plain_and_fused(subject, n, True)] for n in (1, 2)]
        *_, runner = gpu_subjects.plain_and_fused(subject, 1, True)
    assert set(names[0]) - set(names[1]) == {gpu_subjects.GRAPHED}
    assert runner.call is None and "graphs run on 'cuda'" in runner.note


def test_tf32_is_judged_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager's own TF32 convolutions called wrong by a bound for float32, or float32 on a CPU, or
    strict float32 on a GPU, judged as loosely as TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert subjects.factors(torch.float32, "cuda") == torch.float16
    assert subjects.factors(torch.float32, "cpu") == torch.float32
    assert subjects.factors(torch.bfloat16, "cuda") == torch.bfloat16
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert subjects.factors(torch.float32, "cuda") == torch.float32


def test_no_time_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Settings that are silently missing; a run without any row that counts as a success."""
    arguments = ["--device", "cpu", "--quick", "--results", str(tmp_path), "--budget-s", "0"]
    assert gpu_models.main(arguments) == 1
    assert "no time for resnet18 fp32 batch 1" in capsys.readouterr().out


def test_layers_run_on_the_cpu(tmp_path: Path) -> None:
    """A layer of ResNet-50 left out of the table, or a contender that cannot run."""
    assert gpu_layers.main(["--device", "cpu", "--quick", "--results", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*-layers-*.json")
    whole = json.loads(file.read_text())
    rows = whole["results"]
    assert not whole["skipped"]
    assert sum(r["count"] for r in rows if r["conv"]) == 52  # 53 with the stem
    assert sum(r["count"] for r in rows if "bottleneck" in r["layer"]) == 16
    assert {r["layer"] for r in rows} >= {"stem", "pool_linear"}
    assert all(r["us"]["resnet_fused"] > 0 and r["us"]["cudnn"] > 0 for r in rows)


@pytest.mark.parametrize("residual", [False, True])
def test_layer_contenders_compute_the_same(residual: bool) -> None:
    """A comparison of different things: another BatchNorm, a missing addition."""
    draw = gpu_layers.Draw(torch.float32, "cpu")
    conv = roofline.Conv("", 16, 24, 3, 2, 9, 5, residual)
    calls = gpu_layers.conv_calls(draw, conv, 2, relu=True)
    ours, cudnn = (calls[name]() for name in ("resnet_fused", "cudnn"))
    torch.testing.assert_close(ours, cudnn)
    assert ours.shape == (2, 24, 5, 5) and ours.min() == 0


class Note:
    """A library and a tensor on a Hopper GPU that take notes."""

    is_cuda, device, dtype = True, "cuda:0", torch.float16

    def __init__(self) -> None:
        self.level, self.pairs = 0, 0

    def resnet_fused_hopper(self) -> int:
        return self.level

    def resnet_fused_set_hopper(self, level: int) -> None:
        self.level = level

    def resnet_fused_force_wgmma_pairs(self, on: int) -> None:
        self.pairs = on


def test_kernels_for_hopper_are_rows_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of stage 1 or 2 that is not timed both ways; a switch that a row leaves on."""
    note: Any = Note()
    capability = (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(gpu_layers._extension, "_library", note)

    def call() -> Any:
        return note.level, note.pairs

    for between, names in ((64, ["hopper", "pairs"]), (128, ["hopper", "pairs"]), (0, ["hopper"])):
        calls = gpu_layers.hopper_calls(call, note, between)
        assert list(calls) == names
        assert [calls[name]() for name in names] == [(1, 0), (1, 1)][: len(names)]
        assert call() == (0, 0)
    capability = (8, 0)
    assert gpu_layers.hopper_calls(call, note, 64) == {}
    capability, note.resnet_fused_hopper = (9, 0), lambda: 0  # built for 9.0, not 9.0a
    assert gpu_layers.hopper_calls(call, note, 64) == {}


def test_folding_keeps_the_function() -> None:
    """cuDNN's fused call timed on other numbers than the rest."""
    draw = gpu_layers.Draw(torch.float32, "cpu")
    conv = draw.conv(roofline.Conv("", 8, 8, 3, 1, 6, 6))
    x, (weight, bias) = draw.image(1, 8, 6), gpu_layers.folded(conv)
    got = torch.relu(torch.nn.functional.conv2d(x, weight, bias, 1, 1))
    torch.testing.assert_close(got, gpu_layers.separate(x, conv))


def test_the_sanitizers_driver_covers_every_op(capsys: pytest.CaptureFixture[str]) -> None:
    """An op that no sanitizer sees; results that are not judged."""
    assert gpu_sanitize.main(["--device", "cpu", "--quick", "--dtypes", "fp32"]) == 0
    out = capsys.readouterr().out
    assert "calls: {'fp32': " in out and "WRONG" not in out
    ops = {case.op for case in gpu_sanitize.cases(torch.float32, quick=True)}
    assert ops == set(gpu_sanitize.op_cases.NAMES)
    assert not any(
        "grouped" in case.name for case in gpu_sanitize.cases(torch.float32, quick=False)
    )


def test_the_sanitizers_driver_fails_on_the_reference_path(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library without CUDA kernels, or a GPU that refuses them: every tool reports no error."""

    def refused(
        device: torch.device, dtype: torch.dtype, op: str, groups: int = 1
    ) -> dispatch.Path:
        return dispatch.Path("reference", "too old") if op == "stem" else path_on(device, dtype, op)

    path_on = dispatch.path_on
    monkeypatch.setattr(dispatch, "path_on", refused)
    assert gpu_sanitize.main(["--device", "cpu", "--quick", "--dtypes", "fp32"]) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[1:] == ["WRONG: stem torch.float32 ran no kernel: too old"]
