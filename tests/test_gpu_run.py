# SPDX-License-Identifier: BSD-3-Clause
"""What benchmarks/gpu_run.sh decides: time for each section, what counts as failed, and that
nothing hangs."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from source_tree import ROOT, benchmarks

gpu_run = benchmarks("gpu_run")
Outcome = gpu_run.Outcome


class Clock:
    """Stands still unless told otherwise."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


# --------------------------------------------------------------------------------- time budget
def test_the_shares_fit_into_nine_minutes() -> None:
    """A section added for which the others have to be cut short."""
    assert sum(gpu_run.SHARES.values()) <= gpu_run.TOTAL_S < 9 * 60
    assert gpu_run.SHARES.keys() == gpu_run.FEWEST_S.keys()
    assert all(hasattr(gpu_run.Session, name) for name in gpu_run.SHARES)
    assert all(gpu_run.FEWEST_S[name] <= gpu_run.SHARES[name] for name in gpu_run.SHARES)


def test_time_is_handed_on() -> None:
    """Time that a section did not need is lost, or one that overran takes all from the others."""
    clock, names = Clock(), list(gpu_run.SHARES)
    budget = gpu_run.Budget(530.0, clock)
    whole = sum(gpu_run.SHARES.values())
    assert budget.grant("build", names[1:]) == pytest.approx(530 * 90 / whole)
    clock.time += 10  # quick
    left = whole - gpu_run.SHARES["build"]
    assert budget.grant("test", names[2:]) == pytest.approx(520 * gpu_run.SHARES["test"] / left)
    assert budget.grant("compile", []) == pytest.approx(520.0)
    granted = [budget.grant(name, names[at + 1 :]) for at, name in enumerate(names)]
    assert all(0 < seconds < 520 for seconds in granted[:-1])
    clock.time += 505
    assert budget.grant("bench", ["layers", "compile"]) == 0  # too little to be of use
    assert budget.grant("layers", []) == pytest.approx(15.0)
    clock.time += 100
    assert budget.left() == 0 and budget.grant("layers", []) == 0


# ------------------------------------------------------------------------------------ processes
def test_a_process_that_hangs_is_stopped_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that never ends; a grandchild that keeps the GPU afterwards."""
    monkeypatch.setattr(gpu_run, "STOP_S", 0.2)
    code = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])
print(child.pid, flush=True)
time.sleep(60)
"""
    start = time.monotonic()
    done = gpu_run.run([sys.executable, "-c", code], 2.0, tmp_path / "log")
    assert done.status is None and time.monotonic() - start < 20
    assert gpu_run.ended(done) == "stopped for want of time"
    child = Path("/proc", done.output.strip(), "stat")
    for _ in range(50):  # until init has seen its end
        if not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the grandchild is still running")


def test_a_process_that_is_asked_may_say_something(tmp_path: Path) -> None:
    """pytest's report of an unfinished run that is lost because it is killed at once."""
    code = """
import time
try:
    print("begun", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("report")
"""
    command = [sys.executable, "-c", code]
    done = gpu_run.run(command, 3.0, tmp_path / "log", ask=gpu_run.signal.SIGINT)
    assert done.status is None and done.output.split() == ["begun", "report"]
    ended = gpu_run.run([sys.executable, "-c", "raise SystemExit(7)"], 30, tmp_path / "log")
    assert ended.status == 7 and gpu_run.ended(ended) == "status 7"


# -------------------------------------------------------------------------------------- reports
@pytest.mark.parametrize(
    ("output", "errors"),
    [
        ("========= ERROR SUMMARY: 0 errors\n", 0),
        ("========= ERROR SUMMARY: 1 error\n", 1),
        ("x\n========= ERROR SUMMARY: 37 errors\n========= ERROR SUMMARY: 20 errors were not", 57),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", 0),
        ("========= RACECHECK SUMMARY: 3 hazards displayed (1 error, 2 warnings)\n", 3),
        ("========= COMPUTE-SANITIZER\nall right\n", None),
        ("", None),
    ],
)
def test_sanitizer_summaries_are_read(output: str, errors: int | None) -> None:
    """A tool that did not start, or whose wording changed, taken for one that found nothing."""
    assert gpu_run.sanitizer_errors(output) == errors


def test_junit_is_read(tmp_path: Path) -> None:
    """A failure or an error during set-up that is not counted; a report cut off by a stop."""
    file = tmp_path / "junit.xml"
    file.write_text(
        '<testsuites><testsuite tests="4" failures="1" errors="1" skipped="1">'
        '<testcase classname="a" name="good"/><testcase classname="a" name="bad"><failure/>'
        '</testcase><testcase classname="b" name="setup"><error/></testcase>'
        '<testcase classname="b" name="not"><skipped/></testcase></testsuite></testsuites>'
    )
    counts, failed = gpu_run.read_junit(file)
    assert counts == {"tests": 4, "failures": 1, "errors": 1, "skipped": 1}
    assert failed == ["a.bad", "b.setup"]
    file.write_text("<testsuites><test")
    assert gpu_run.read_junit(file) == gpu_run.read_junit(tmp_path / "none") == ({}, [])


def test_every_test_file_is_run() -> None:
    """A new file that neither part of the suite runs; one that is first and is not there."""
    first, rest = gpu_run.test_files(ROOT / "tests")
    assert sorted({*first, *rest}) == sorted((ROOT / "tests").rglob("test_*.py"))
    assert len(set(rest)) == len(rest) and set(first) - set(rest) == set(first[:2])
    assert first[0].name == "test_cuda_gpu.py" and len(first) == 9
    assert all(path.is_file() for path in first)


# ------------------------------------------------------------------------------------- sections
@pytest.fixture
def session(tmp_path: Path) -> Any:
    """A session with something built, in a folder of its own."""
    (tmp_path / "work/site/resnet_fused").mkdir(parents=True)
    args = argparse.Namespace(
        work=tmp_path / "work", results=tmp_path / "results", device="cpu", quick=True, tests=None
    )
    return gpu_run.Session(args)


def test_sections_run_in_order_within_their_time(
    session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A section that starts although its time is gone, or a failure that stops the others."""
    clock, asked = Clock(), []
    for name in gpu_run.SHARES:

        def section(self: Any, seconds: float, name: str = name) -> Any:
            asked.append(name)
            clock.time += 300 if name == "test" else 1
            return Outcome("failed" if name == "build" else "passed", "", 1.0)

        monkeypatch.setattr(gpu_run.Session, name, section)
    found = gpu_run.all_sections(session, list(gpu_run.SHARES), gpu_run.Budget(320, clock))
    assert asked == ["build", "test"]
    assert [o.status for o in found.values()] == ["failed", "passed"] + ["skipped"] * 4
    assert "s are left" in found["bench"].detail and gpu_run.failed(found)
    assert not gpu_run.failed({name: found[name] for name in ("test", "bench")})


def test_nothing_is_measured_without_a_build(session: Any) -> None:
    """A run over an older library, or one that ends well although nothing ran."""
    (session.site / "resnet_fused").rmdir()
    found = gpu_run.all_sections(session, ["bench"], gpu_run.Budget(100))
    assert found["bench"].status == "skipped" and gpu_run.failed(found)


FAKE = """#!/bin/sh
echo "$@" >> "$LOG"
echo "========= COMPUTE-SANITIZER"
{body}
"""


def fake_sanitizer(body: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compute-sanitizer that does ``body`` and writes its arguments to ``folder / "calls"``."""
    tool = folder / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(FAKE.format(body=body))
    tool.chmod(0o755)
    monkeypatch.setenv("LOG", str(folder / "calls"))
    return tool


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ('echo "========= ERROR SUMMARY: 0 errors"', "passed", "memcheck: 0 errors"),
        ('echo "========= ERROR SUMMARY: 2 errors"; exit 99', "failed", "racecheck: 2 errors"),
        ("exit 0", "failed", "initcheck: no summary (status 0)"),
        ('echo "========= ERROR SUMMARY: 0 errors"; exit 1', "failed", "0 errors (status 1)"),
        ('echo "========= Error: Device not supported"; exit 1', "skipped", "does not support"),
    ],
)
def test_the_sanitizer_decides(
    body: str,
    status: str,
    message: str,
    session: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Errors, a wrong result of the driver or a tool that did nothing, taken for a success."""
    tool = fake_sanitizer(body, tmp_path, monkeypatch)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    outcome = session.sanitize(60.0)
    assert outcome.status == status and message in outcome.detail
    calls = (tmp_path / "calls").read_text().splitlines()
    assert all("gpu_sanitize.py" in c and "kns=resnet_fused" in c for c in calls)
    assert status == "skipped" or [c.split()[1] for c in calls] == list(gpu_run.TOOLS)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ("sleep 60", "partial", "racecheck: no summary (stopped for want of time)"),
        ('echo "========= ERROR SUMMARY: 1 error"; sleep 60', "failed", "memcheck: 1 errors"),
    ],
)
def test_a_sanitizer_without_time(
    body: str,
    status: str,
    message: str,
    session: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A slow GPU taken for a wrong kernel, or errors that are lost because the tool was stopped."""
    tool = fake_sanitizer(body, tmp_path, monkeypatch)
    monkeypatch.setattr(gpu_run, "find_sanitizer", lambda: str(tool))
    outcome = session.sanitize(3.0)
    assert outcome.status == status and message in outcome.detail
    assert gpu_run.failed({"sanitize": outcome}) == (status == "failed")


@pytest.mark.parametrize(
    ("ends", "status", "parts"),
    [
        ([0, 0, 0, 0], "passed", 2),
        ([None], "partial", 0),  # the ops, in all the time there was
        ([0, 1], "failed", 0),
        ([0, 0, None], "partial", 1),
        ([0, 0, 0, None], "partial", 2),
        ([0, 0, 1], "failed", 1),
        ([0, 0, 0, 1], "failed", 2),
    ],
)
def test_tests_without_time(
    ends: list[int | None],
    status: str,
    parts: int,
    session: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A section that fails because its time ran out, or passes although tests failed."""
    asked: list[list[str]] = []

    def run(command: Any, seconds: float, *_: Any, **__: Any) -> Any:
        asked.append(list(map(str, command)))
        end = ends[len(asked) - 1]
        return gpu_run.Done(end, "", 1.0)

    monkeypatch.setattr(gpu_run, "run", run)
    outcome = session.test(60.0)
    assert outcome.status == status and len(asked) == len(ends)
    suites = [command for command in asked if "pytest" in command]
    assert len(suites) == parts
    assert ["-k" in command[3:] for command in suites] == [True, False][:parts]


def test_no_sanitizer_is_said(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that is left out without a word."""
    monkeypatch.setattr(gpu_run, "find_sanitizer", lambda: None)
    outcome = session.sanitize(60.0)
    assert outcome.status == "skipped" and "not installed" in outcome.detail


@pytest.mark.parametrize(
    ("status", "output", "expected"),
    [
        (0, "done", ("passed", "all")),
        (0, "no time for resnet18 fp16 batch 8", ("partial", "no time for resnet18")),
        (1, "WRONG: row", ("failed", "WRONG: row")),
        (None, "", ("partial", "stopped")),
    ],
)
def test_measuring_scripts_are_judged(
    status: int | None,
    output: str,
    expected: tuple[str, str],
    session: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A wrong result that passes, or settings left out that nobody mentions."""
    asked: list[Any] = []

    def run(command: Any, seconds: float, *_: Any, **__: Any) -> Any:
        asked.append((list(map(str, command)), seconds))
        return gpu_run.Done(status, output, 3.0)

    monkeypatch.setattr(gpu_run, "run", run)
    outcome = session.bench(50.0)
    assert outcome.status == expected[0] and expected[1] in outcome.detail
    ((command, seconds),) = asked
    assert seconds == 50.0 and command[command.index("--budget-s") + 1] == "42"


def test_the_whole_runs_on_a_cpu(tmp_path: Path) -> None:
    """A script that cannot find its interpreter, its folder or the package; results elsewhere than
    asked for. What is installed here stands for the build."""
    import resnet_fused

    site = tmp_path / "work/site"
    site.mkdir(parents=True)
    (site / "resnet_fused").symlink_to(Path(resnet_fused.__file__).parent)
    command = ["sh", str(ROOT / "benchmarks/gpu_run.sh"), "layers", "--device", "cpu", "--quick"]
    env = {
        **os.environ,
        "PYTHON": sys.executable,
        "RESNET_FUSED_RESULTS": str(tmp_path / "out"),
        "OMP_NUM_THREADS": "1",
    }
    work = ["--work", str(tmp_path / "work")]
    done = subprocess.run([*command, *work], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    names = sorted(path.name.split("-nhwc-")[0] for path in (tmp_path / "out").iterdir())
    assert names == ["benchmark-infer-layers", "benchmark-infer-run", "benchmark-infer-run"]
    (text,) = (path.read_text() for path in (tmp_path / "out").glob("*.md"))
    assert "| layers | passed |" in text and "pool_linear" in text
    sections = json.loads((tmp_path / "work/run.json").read_text())
    assert sections["layers"]["status"] == "passed"
    wrong = subprocess.run([*command[:2], "tests"], capture_output=True, text=True, env=env)
    assert wrong.returncode == 2 and "unknown section tests" in wrong.stderr
