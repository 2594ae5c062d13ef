# SPDX-License-Identifier: BSD-3-Clause
"""LoadGen scenarios: batching, faults, overload, the search for a rate, and what bench makes of it.

What is timed sleeps instead of computing, so that a busy machine changes little.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from resnet_fused import ops
from resnet_fused.bench import loadgen, scenarios, subjects
from resnet_fused.bench.loadgen import SCENARIOS, Load, Outcome
from resnet_fused.bench.results import Setting
from resnet_fused.bench.scenarios import Found, Plan
from resnet_fused.cli.main import main
from resnet_fused.models import BasicBlock, ResNet
from resnet_fused.timing import Summary

pytest.importorskip("mlperf_loadgen")
IMAGES = 8


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Small images gain nothing from more, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Sleeper:
    """Answers a batch by sleeping, and remembers the batches."""

    def __init__(self, seconds: float = 0.001) -> None:
        self.seconds = seconds
        self.batches: list[list[int]] = []

    def __call__(self, images: list[int]) -> None:
        self.batches.append(images)
        time.sleep(self.seconds)


def run(call: Callable[[list[int]], object], scenario: str, **other: Any) -> Outcome:
    load = Load(scenario, **{"seconds": 0.4, "rate": 200.0, "max_batch": 4, **other})
    return loadgen.run(call, IMAGES, load)


# ------------------------------------------------------------------------------------- LoadGen
def test_server_batches_what_waits_and_answers_everything() -> None:
    """Breaks if a batch outgrows its bound, an image is lost, or a latency leaves the queue out."""
    call = Sleeper(0.02)
    outcome = run(call, "server", rate=150)
    batches = call.batches[1:]  # the first one warms the thread up
    assert outcome.finished and outcome.count == sum(map(len, batches))
    assert max(map(len, batches)) == 4 and {i for b in batches for i in b} <= set(range(IMAGES))
    assert outcome.mean_batch == pytest.approx(outcome.count / len(batches))
    assert outcome.latency is not None and outcome.latency.count == outcome.count
    # 150/s in calls of 20 ms with up to 4: a typical image waits for one that is running.
    assert outcome.latency.p50 > 22 and outcome.latency.p90 >= outcome.latency.p50
    assert (outcome.latency.p99 is None) == (outcome.count < 100)


def test_an_image_waits_for_others_no_longer_than_asked() -> None:
    """Breaks if --wait does nothing, or an image that stays alone is never answered."""
    together = run(Sleeper(0.0), "server", wait_s=0.1, max_batch=16)
    assert together.mean_batch > 5 and together.latency and together.latency.p50 < 140
    alone = run(Sleeper(0.0), "server", wait_s=0.05, rate=5)
    assert alone.finished and alone.latency and alone.latency.p50 > 49


def test_offline_fills_its_batches_and_single_stream_makes_none() -> None:
    """Breaks if offline leaves images out, or single-stream overlaps or collects."""
    call = Sleeper()
    outcome = run(call, "offline")
    assert [len(batch) for batch in call.batches[1:-1]] == [4] * (len(call.batches) - 2)
    assert outcome.count == sum(map(len, call.batches[1:])) >= 0.4 * 200
    assert outcome.latency is None and 0 < outcome.rate < 4 / 0.001

    call = Sleeper(0.004)
    outcome = run(call, "single-stream", max_batch=1)
    assert {len(batch) for batch in call.batches} == {1}
    assert outcome.latency is not None and outcome.latency.p50 >= 4
    assert outcome.rate <= 1000 / 4


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_what_the_model_raises_comes_out_and_the_next_run_works(scenario: str) -> None:
    """Breaks if an exception goes through LoadGen, which ends the process, or hangs it."""

    def broken(images: list[int]) -> None:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise RuntimeError("out of memory")

    calls = 0
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="out of memory"):
        run(broken, scenario)
    assert time.monotonic() - start < 5
    assert run(Sleeper(), scenario).finished


def test_a_load_that_is_too_much_ends_in_time_and_says_so() -> None:
    """Breaks if a queue without end is worked off, or its latencies pass for a result."""
    start = time.monotonic()
    outcome = run(Sleeper(0.2), "server", rate=500)
    assert not outcome.finished and outcome.latency is None
    assert time.monotonic() - start < 1.5 * 0.4 + 1 + 3


def test_logs_are_kept_where_asked_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if LoadGen writes into the working directory, or reads an audit.config there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "audit.config").write_text("*.*.max_query_count = 1\n")
    load = Load("server", 0.2, 100, 4)
    assert loadgen.run(Sleeper(), IMAGES, load).count > 2
    assert [path.name for path in tmp_path.iterdir()] == ["audit.config"]
    loadgen.run(Sleeper(), IMAGES, load, tmp_path / "logs" / "deep")
    assert (tmp_path / "logs" / "deep" / loadgen.DETAILS).stat().st_size > 1000


def test_noise_is_the_spread_of_parts_and_unknown_for_few_images() -> None:
    """Breaks if a run that slows down looks steady, or a guess from few images looks sure."""
    steady = [(0.01 * i, 0.005) for i in range(330)]
    assert loadgen.noise(steady, 90) == 0
    assert loadgen.noise(steady, None) == pytest.approx(0, abs=1e-9)
    slower = [(when, 0.005 if when < 2.2 else 0.010) for when, _ in steady]
    assert loadgen.noise(slower, 99) == pytest.approx(0.5)
    assert loadgen.noise(steady[:299], 99) == math.inf
    assert loadgen.noise(steady[:29], None) == math.inf


def test_ctrl_c_ends_it_at_once() -> None:
    """Breaks if LoadGen, which nothing can stop, keeps the process for the rest of a minute."""
    command = "bench --scenario server --duration 60 --rate 20 --model resnet18 --size 32 --batch 1"
    bench = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "resnet_fused",
            *command.split(),
            "--dtype",
            "fp32",
            "--threads",
            "1",
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert bench.stderr is not None
    for line in bench.stderr:
        if "server, 60 s" in line:
            break
    time.sleep(0.5)
    bench.send_signal(signal.SIGINT)
    start = time.monotonic()
    rest = bench.stderr.read()
    assert bench.wait(30) == 130 and "interrupted" in rest and "Traceback" not in rest
    assert time.monotonic() - start < 10


# -------------------------------------------------------------------------------------- search
class Fake:
    """Stands for a model that does a batch in 4 ms + 1 ms per image."""

    def seconds(self, batch: int) -> float:
        return 0.004 + 0.001 * batch


def search(
    monkeypatch: pytest.MonkeyPatch, keeps: Callable[[float, int], float], budget_s: float = 0.03
) -> tuple[Found, list[float]]:
    """Search where `keeps(rate, trial)` is the 99th percentile in milliseconds."""
    rates: list[float] = []

    def run(call: Any, images: int, load: Load, logs: Path | None = None) -> Outcome:
        rates.append(load.rate)
        p99 = keeps(load.rate, len(rates))
        latency = Summary(200, p99 / 2, p99 / 2, p99, p99)
        return Outcome(200, load.rate * 0.93, latency, 2.0, 0.1)

    monkeypatch.setattr(loadgen, "run", run)
    plan = Plan("server", 2.0, budget_s=budget_s)
    row = Found(Setting("resnet18", "fp32", 16), plan, "resnet_fused", "x", 1, None, 16, None)
    said: list[str] = []
    found = scenarios._search(row, Fake(), said.append)  # type: ignore[arg-type]
    assert len(said) >= len(rates)
    return found, rates


def test_the_search_finds_the_rate_and_says_what_it_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if the search ends above the budget, far below it, or with a batch that is too big."""
    found, rates = search(monkeypatch, lambda rate, trial: 31 if rate > 400 else 29)
    # Two batches of 8 take 24 ms, two of 16 would take 40; 8 images in 12 ms are 667/s at most.
    assert found.max_batch == 8
    assert 400 - 667 / 64 <= (found.rate or 0) <= 400
    assert found.figure == pytest.approx(found.rate) and found.judged_by == "infer_samples_per_sec"
    assert all(f"{rate:.4g} p99" in found.note for rate in rates)
    assert found.outcome is not None and found.outcome.noise < 0.03
    assert len(rates) == scenarios.HALVINGS + 1 and rates[-1] == found.rate


def test_a_rate_that_passed_by_luck_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if one lucky trial decides: here the limit is lower from the seventh trial on."""
    found, rates = search(
        monkeypatch, lambda rate, trial: 31 if rate > (400 if trial <= 6 else 350) else 29
    )
    assert (found.rate or 0) <= 350 and rates[-1] == found.rate
    assert found.outcome is not None and found.outcome.noise > 0.1
    found, rates = search(monkeypatch, lambda rate, trial: 29 if trial <= 6 else 31)
    assert found.rate is None and "found no rate that keeps 30 ms" in found.note
    assert len(rates) == scenarios.HALVINGS + scenarios.CONFIRM + 1


def test_a_budget_nothing_can_keep_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if the search runs for nothing, or goes to rates without enough images for a p99."""
    found, rates = search(monkeypatch, lambda rate, trial: 1, budget_s=0.0049)
    assert not rates and found.rate is None and "one image alone takes 5 ms" in found.note
    found, rates = search(monkeypatch, lambda rate, trial: 31)
    assert found.outcome is None and min(rates) * 2 * scenarios.LONGEST >= 130
    assert "and less not: 100 images would take" in found.note


# ----------------------------------------------------------------------------------- the whole
def tiny() -> ResNet:
    torch.manual_seed(0)
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10).eval()


SETTING = Setting("resnet18", "fp32", 2, 32)


def test_eager_and_fused_get_the_same_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if the two get different rates, the rows lack a column, or the ratio is inverted."""
    given: list[Load] = []

    def run(call: Any, images: int, load: Load, logs: Path | None = None) -> Outcome:
        given.append(load)
        call(list(range(images))[: load.max_batch])
        ms = 8.0 / len(given)
        return Outcome(300, 99.0, Summary(300, ms, ms, ms, ms), 1.5, 0.1)

    monkeypatch.setattr(loadgen, "run", run)
    said: list[str] = []
    eager, fused = scenarios.measure(SETTING, tiny(), Plan("server", 2.0), said.append)
    assert len(given) == 2 and given[0] == given[1] and given[0].max_batch == 2
    assert "4 s of load" in said[0] and "at most" in said[0]
    assert (eager.contender, fused.contender) == ("channels_last", "resnet_fused")
    assert eager.versus is None and fused.versus and fused.versus.value == 2.0
    assert fused.versus.noise == pytest.approx(0.21)
    record = fused.record()
    assert list(record)[:3] == ["model", "infer_samples_per_sec", "infer_step_time"]
    assert record["judged_by"] == "p99" and record["p99"] == 4.0 and record["agrees"] is True
    assert "loadgen" in record["versions"] and record["rate"] == given[0].rate
    assert "WRONG" not in scenarios.table([eager, fused])


def test_a_fused_model_with_wrong_results_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if a load is measured on a model that computes something else."""
    right = ops.basic_block
    monkeypatch.setattr(ops, "basic_block", lambda x, *convs: right(x, *convs) * 1.1)
    monkeypatch.setattr(loadgen, "run", lambda *args: Outcome(30, 9.0, None, 2.0, 0.1))
    eager, fused = scenarios.measure(SETTING, tiny(), Plan("offline", 1.0))
    assert eager.agrees and not fused.agrees
    assert "WRONG" in scenarios.table([fused])


def test_a_contender_that_fails_is_named_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if one contender's exception loses the other's figures, or passes for success."""

    def run(call: scenarios.Answers, images: int, load: Load, logs: Path | None = None) -> Outcome:
        if isinstance(call.net, ResNet):
            raise RuntimeError("out of memory\nbacktrace")
        return Outcome(30, 9.0, None, 2.0, 0.1)

    monkeypatch.setattr(loadgen, "run", run)
    eager, fused = scenarios.measure(SETTING, tiny(), Plan("offline", 1.0))
    assert eager.figure == 9.0 and fused.figure is None and not fused.agrees
    assert fused.note == "RuntimeError: out of memory"


def test_bench_writes_what_compare_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks if the whole way fails: real LoadGen, real network, files, the second command."""
    monkeypatch.setattr(subjects, "make_model", lambda name, seed=0: tiny())
    command = "bench --scenario offline --model resnet18 --size 32 --batch 2 --dtype fp32"
    place = tmp_path / "a.json"
    assert main([*command.split(), "--duration", "0.3", "--json", str(place)]) == 0
    assert "resnet_fused" in capsys.readouterr().out
    rows = json.loads(place.read_text())["results"]
    assert [row["scenario"] for row in rows] == ["offline"] * 2
    assert all(row["infer_samples_per_sec"] > 0 for row in rows)
    assert main(["compare", str(place), str(place)]) == 0
    out = capsys.readouterr().out
    assert "scenario offline" in out and "img/s" in out

    assert main([*command.split(), "--duration", "0.2", "--csv", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*.csv")
    assert file.name.startswith("benchmark-infer-fp32-offline-nhwc-")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--rate 5", "--rate needs --scenario"),
        ("--scenario offline --rate 5", "--rate goes with --scenario server"),
        ("--scenario single-stream --wait 1ms", "--wait goes with --scenario server"),
        ("--scenario offline --plot x.png", "--plot does not go with"),
        ("--scenario offline --budget-s 5", "--budget-s does not go with"),
        ("--scenario server --batch 1,2", "--batch must be one number"),
        ("--budget 15ms --scenario offline", "leave --scenario and --rate out"),
        ("--budget 15ms --rate 3", "leave --scenario and --rate out"),
        ("--budget 15", "must be a time with its unit"),
        ("--budget 0ms", "must be above 0"),
        ("--scenario server --rate nan", "must be above 0"),
        ("--scenario mlperf", "invalid choice"),
    ],
)
def test_options_that_do_nothing_are_refused(
    arguments: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks if an option is taken that changes nothing, or a budget's unit is guessed."""
    try:
        code: object = main(["bench", *arguments.split()])
    except SystemExit as end:
        code = end.code
    assert code == 1 and said in capsys.readouterr().err


def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks if the extra's absence is a traceback, or seen only after the model was built."""
    monkeypatch.setitem(sys.modules, "mlperf_loadgen", None)
    assert main(["bench", "--scenario", "offline"]) == 1
    assert "pip install 'resnet_fused[loadgen]'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="rate must be above 0, got -1"):
        loadgen.run(print, 1, replace(Load("offline", 1, 1), rate=-1))
