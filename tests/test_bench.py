# SPDX-License-Identifier: BSD-3-Clause
"""`resnet-fused bench` on a small model at a small size: what it prints, writes and refuses."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from resnet_fused import ops, timing
from resnet_fused.bench import compare, contenders, machine, results, subjects
from resnet_fused.bench.results import Row, Setting
from resnet_fused.cli import bench
from resnet_fused.cli.arguments import why_unwritable
from resnet_fused.cli.main import main
from resnet_fused.timing import Ratio, Summary

# 64 pixels: the smallest size at which no stage of a ResNet shrinks to one pixel.
SMALL = ["bench", "--model", "resnet18", "--size", "64", "--threads", "1", "--budget-s", "1"]
TIMM = [
    "model",
    "infer_samples_per_sec",
    "infer_step_time",
    "infer_batch_size",
    "infer_img_size",
    "param_count",
    "infer_gmacs",
]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """`--threads` sets them for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run over two dtypes and two batches that writes everything."""
    folder = tmp_path_factory.mktemp("bench")
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", out)
        patch.setattr("sys.stderr", err)
        wanted = ["--dtype", "fp32,bf16", "--batch", "2,3", "--no-compile", "--json", "-"]
        files = ["--csv", str(folder)]
        if importlib.util.find_spec("matplotlib"):
            files += ["--plot", str(folder / "bars.png")]
        code = main([*SMALL, *wanted, *files])
    return {"code": code, "out": out.getvalue(), "err": err.getvalue(), "folder": folder}


def test_stdout_holds_nothing_but_json_and_stderr_the_table(run: dict[str, Any]) -> None:
    """Breaks if a progress line, a warning or the table gets into the JSON."""
    found = json.loads(run["out"])
    assert run["code"] == 0
    assert len(found["results"]) == 2 * 2 * 3
    assert {r["contender"] for r in found["results"]} == {"eager", "channels_last", "resnet_fused"}
    assert "median ms" in run["err"] and "resnet_fused" in run["err"]
    assert {"cpu", "threads", "torch", "load_by_others"} <= found["machine"].keys()
    assert found["machine"]["threads"] == 1


def test_columns_are_timms_first_and_agree_with_each_other(run: dict[str, Any]) -> None:
    """Breaks if a rate is per batch, a time per image, or the two come from different samples."""
    for r in json.loads(run["out"])["results"]:
        assert list(r)[: len(TIMM)] == TIMM
        product = r["infer_samples_per_sec"] * r["infer_step_time"]
        assert product == pytest.approx(1000 * r["infer_batch_size"], rel=0.02)
        assert (r["param_count"], r["infer_img_size"]) == (11.69, 64)
        assert r["p50"] <= r["p90"] <= r["p95"]
        assert (r["p99"] is None) == (r["count"] < 100)
        assert 0 < r["max_err"] < 0.05
        assert str(torch.__version__) in r["versions"]


def test_ratios_are_against_the_better_eager_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if ratios are inverted, in the wrong row, or against the slower layout."""
    times = {"eager": 8.0, "channels_last": 6.0, "resnet_fused": 3.0}
    visits = {name: [[ms]] * 5 for name, ms in times.items()}
    monkeypatch.setattr(timing, "measure", lambda *a, **k: timing.Measurement(visits, {}))
    setting = Setting("resnet18", "fp32", 1, 64)
    model = subjects.make_model("resnet18")
    rows = {row.contender: row for row in compare.compare(setting, model, budget_s=1)}

    def ratios(name: str) -> tuple[float | None, float | None]:
        row = rows[name].record()
        return row["ratio"], row["ratio_channels_last"]

    assert ratios("eager") == (0.75, 0.75)
    assert ratios("channels_last") == (None, None)
    assert ratios("resnet_fused") == (2.0, 2.0)
    assert rows["resnet_fused"].bound is not None and rows["eager"].bound is None


def test_csv_in_a_folder_is_named_after_what_was_measured(run: dict[str, Any]) -> None:
    """Breaks if dtypes share a file, or the file differs from the JSON."""
    files = sorted(run["folder"].glob("*.csv"))
    pattern = r"benchmark-infer-(bf16|fp32)-nhwc-pt\d+-cpu-[a-z0-9-]+-1t\.csv"
    assert len(files) == 2 and all(re.fullmatch(pattern, f.name) for f in files)
    rows = [r for f in files for r in csv.DictReader(f.open())]
    known = json.loads(run["out"])["results"]
    assert list(rows[0]) == list(known[0])
    assert sorted(float(r["p50"]) for r in rows) == sorted(r["p50"] for r in known)


def test_the_plot_shows_every_contender(run: dict[str, Any]) -> None:
    """Breaks if the picture is blank or a contender's bars are missing; bars have known colours."""
    image = pytest.importorskip("matplotlib.image")
    from resnet_fused.bench.plot import COLOURS

    pixels = (image.imread(run["folder"] / "bars.png")[..., :3] * 255).round().astype(int)
    assert pixels.shape[0] > 300 and pixels.shape[1] > 600
    for name in ("eager", "channels_last", "resnet_fused"):
        colour = [int(COLOURS[name][i : i + 2], 16) for i in (1, 3, 5)]
        assert (abs(pixels - colour).max(-1) <= 2).sum() > 500, name


def test_a_wrong_op_makes_the_command_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks if outputs are not compared: the residual addition is left out, all else is right."""
    right = ops.basic_block

    def wrong(x: torch.Tensor, *convs: Any) -> torch.Tensor:
        y = right(x, *convs)
        return y - x if y.shape == x.shape else y

    monkeypatch.setattr(ops, "basic_block", wrong)
    assert main([*SMALL, "--dtype", "fp32", "--batch", "1", "--no-compile"]) == 1
    out = capsys.readouterr().out
    assert "WRONG: resnet_fused in resnet18 fp32 batch 1" in out
    assert out.count(" WRONG\n") == 1


def test_an_op_that_raises_fails_and_leaves_the_others_times(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks if one contender's failure hides the rest or goes unnoticed."""

    def broken(*args: Any) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(ops, "stem", broken)
    arguments = ["--dtype", "bf16", "--batch", "1", "--no-compile", "--csv", "-"]
    assert main([*SMALL, *arguments]) == 1
    rows = {r["contender"]: r for r in csv.DictReader(io.StringIO(capsys.readouterr().out))}
    assert rows["resnet_fused"]["note"] == "RuntimeError: no such kernel"
    assert rows["resnet_fused"]["p50"] == "" and float(rows["eager"]["p50"]) > 0


def test_a_compiler_that_fails_or_dawdles_costs_its_row_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Breaks if a missing compiler ends the run, or a slow one takes more than its share."""

    def absent(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no working C++ compiler found\nlong advice")

    def endless(*args: Any, **kwargs: Any) -> Any:
        try:
            time.sleep(60)
        except Exception:  # a compiler that swallows errors must not swallow the limit
            time.sleep(60)

    net, x = torch.nn.ReLU(), torch.ones(1)
    monkeypatch.setattr(torch, "compile", absent)
    row = contenders.compiled(net, x, 30)
    assert row.call is None and row.note == "RuntimeError: no working C++ compiler found"
    monkeypatch.setattr(torch, "compile", endless)
    row = contenders.compiled(net, x, 0.3)
    assert row.call is None and "not done after" in row.note and 0.2 < row.compile_s < 20
    row = contenders.compiled(net, x, 0)
    assert row.call is None and "--budget-s" in row.note


def test_the_time_limit_leaves_other_threads_and_alarms_alone() -> None:
    """Breaks if the limit is set where no signal can arrive, or a used one rings later."""
    seen: list[str] = []

    def elsewhere() -> None:
        with contenders.time_limit(0.01):
            time.sleep(0.05)
            seen.append("done")

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == ["done"]
    with contenders.time_limit(0.05):
        pass
    time.sleep(0.1)
    with pytest.raises(TimeoutError, match="not done after"), contenders.time_limit(0.05):
        time.sleep(5)


def test_results_may_go_to_a_folder(tmp_path: Path) -> None:
    """Breaks if --csv FOLDER, which names its files itself, is refused."""
    places = {"--json": None, "--csv": str(tmp_path)}
    assert why_unwritable(places, stdout=("--csv",), folders=("--csv",)) == ""


def test_a_file_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks if a full disk hides two minutes of measurements behind a traceback."""

    def full(*args: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bench, "_measure", lambda args: [])
    monkeypatch.setattr(bench, "table", lambda rows: "the table")
    monkeypatch.setattr(bench, "open_output", full)
    assert main([*SMALL, "--json", str(tmp_path / "b.json")]) == 1
    out, err = capsys.readouterr()
    assert "the table" in out and "bench: error: [Errno 28] No space left on device" in err


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--model", "resnet19"], "model must be one of resnet18"),
        (["--dtype", "fp32,int3"], "got 'int3'"),
        (["--batch", "1,0"], "integer of at least 1, got '0'"),
        (["--batch", ""], "integer of at least 1, got ''"),
        (["--device", "toaster"], "must be cpu, cuda or cuda:N, got 'toaster'"),
        (["--device", "cuda:99"], "torch sees"),
        (["--json", "-", "--csv", "-"], "cannot share stdout"),
        (["--plot", "no/such/folder/x.png"], "the folder does not exist"),
        (["--json", "."], "--json .: is a folder"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_measured(
    wrong: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Breaks if a typing mistake shows up after minutes, or as a traceback."""
    monkeypatch.setattr(bench, "compare", lambda *a, **k: pytest.fail("measured"))
    try:
        code = main([*SMALL, *wrong])
    except SystemExit as stop:
        code = stop.code
    assert code == 1
    assert message in capsys.readouterr().err


def _row(name: str, ratio: Ratio | None = None, summary: Summary | None = None) -> Row:
    setting = Setting("resnet50", "bf16", 16)
    return Row(setting, name, "nhwc", "onednn", 1, 1.0, "why", summary, ratio, ratio)


def test_the_table_prints_no_speedup_below_the_noise() -> None:
    """Breaks if a ratio of 1.04 with 6 % noise is shown as a gain, or a real gain is hidden."""
    times = Summary(9, 10.0, 11.0, 12.0, None)
    noisy = Ratio(1.04, 0.99, 1.1, 0.06, 9)
    rows = [_row("eager", None, times), _row("compile"), _row("resnet_fused", noisy, times)]
    text = results.table(rows)
    assert "1.0 ± 0.06" in text and "1.04" not in text
    assert "no times for compile in resnet50 bf16 batch 16: why" in text
    assert rows[2].record()["speedup"] is None
    clear = _row("resnet_fused", Ratio(1.46, 1.4, 1.5, 0.06, 9), times)
    assert "1.46x" in results.table([clear]) and clear.record()["speedup"] == 1.46


def test_results_hold_no_number_that_json_cannot() -> None:
    """Breaks if an infinite error or noise is written as NaN or Infinity, which is not JSON."""
    row = _row("resnet_fused", Ratio(1.2, 1.1, 1.3, float("inf"), 1), Summary(1, 1, 1, 1, None))
    row = Row(**{**row.__dict__, "max_err": float("inf"), "bound": 0.1})
    file = io.StringIO()
    results.write_json([row], {"cpu": "x"}, file)
    found = json.loads(file.getvalue())["results"][0]
    assert found["max_err"] is None and found["noise"] is None and found["agrees"] is False


def test_progress_names_each_setting(run: dict[str, Any]) -> None:
    """Breaks if a long run says nothing about where it is."""
    for dtype in ("fp32", "bf16"):
        for batch in (2, 3):
            assert f"resnet18 {dtype} batch {batch}: timing" in run["err"]


def test_a_single_csv_file_holds_all_dtypes(tmp_path: Path) -> None:
    """Breaks if the file that was named is not the one that is written."""
    times = Summary(9, 10.0, 11.0, 12.0, None)
    other = Row(
        **{**_row("eager", None, times).__dict__, "setting": Setting("resnet50", "fp32", 1)}
    )
    place = tmp_path / "all.csv"
    assert results.save_csv([_row("eager", None, times), other], place) == [place]
    assert [r["dtype"] for r in csv.DictReader(place.open())] == ["bf16", "fp32"]


def test_the_load_of_others_is_seen() -> None:
    """Breaks if a busy neighbour is not counted: a child process spins for half a second."""
    cpus = os.cpu_count() or 1
    spin = "import time; end = time.perf_counter() + 60\nwhile time.perf_counter() < end: pass"
    child = subprocess.Popen([sys.executable, "-c", spin])
    try:
        time.sleep(0.3)  # until it spins
        meter = machine.LoadMeter()
        time.sleep(0.5)
        others = meter.others()
    finally:
        child.kill()
        child.wait()
    if others is None:
        assert not Path("/proc/stat").exists()
    else:
        assert 0.3 / cpus < others <= 1


def test_own_work_is_not_the_load_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if a benchmark warns about itself: all, busy and own CPU seconds at two times."""
    readings = iter([(100.0, 50.0, 5.0), (110.0, 58.0, 12.0)])
    monkeypatch.setattr(machine.LoadMeter, "_read", staticmethod(lambda: next(readings)))
    assert machine.LoadMeter().others() == pytest.approx(0.1)


def test_more_threads_than_cpus_is_complained_about(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if oversubscription, which ruins every time, goes unmentioned."""
    monkeypatch.setattr(machine, "usable_cpus", lambda: 1)
    torch.set_num_threads(3)
    assert any("--threads 1" in text for text in machine.complaints(0.01))
