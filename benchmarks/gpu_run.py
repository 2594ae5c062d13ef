# SPDX-License-Identifier: BSD-3-Clause
"""Builds, tests and measures on a GPU machine with what is installed there; needs no network.

Sections, in this order: build, test, sanitize, bench, layers, compile. All by default. Each gets a
share of the time that is left, is stopped when it is used up, and leaves what it has; what no
longer fits is skipped, and the result says so. Status 1 if something failed.

Results go to benchmarks/results, to --results or to RESNET_FUSED_RESULTS: JSON of the measuring
scripts and one Markdown file with everything.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
HERE = Path(__file__).resolve().parent
TOTAL_S = 530.0  # of 9 minutes, the rest for reports and stopping
SHARES = {"build": 90, "test": 150, "sanitize": 80, "bench": 120, "layers": 40, "compile": 50}
FEWEST_S = {"build": 20, "test": 20, "sanitize": 20, "bench": 15, "layers": 10, "compile": 30}
TOOLS = ("memcheck", "racecheck", "initcheck")
# What only a GPU can show, then the ops' suites, of which only the part on the GPU comes first.
ONLY_ON_A_GPU = ("test_cuda_gpu.py", "test_cuda_graphed.py")
FIRST = (
    *ONLY_ON_A_GPU,
    *(f"test_{op}.py" for op in ("conv_bn_act", "stem", "basic_block", "bottleneck")),
    *("test_pool_linear.py", "test_add_relu.py", "test_nan.py"),
)
STOP_S = 10.0  # for a process to end once asked to


# --------------------------------------------------------------------------------- time budget
class Budget:
    """Hands out the time that is left in proportion to the shares of the sections to come."""

    def __init__(self, total_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._end = now, now() + total_s

    def left(self) -> float:
        return max(0.0, self._end - self._now())

    def grant(self, section: str, later: Sequence[str]) -> float:
        """Seconds for a section that `later` ones follow; 0 if that is too little to be of use."""
        whole = SHARES[section] + sum(SHARES[name] for name in later)
        seconds = self.left() * SHARES[section] / whole
        return seconds if seconds >= FEWEST_S[section] else 0.0


# ------------------------------------------------------------------------------------ processes
@dataclass(frozen=True)
class Done:
    """How a process ended; its status is None if it was stopped."""

    status: int | None
    output: str
    seconds: float


def run(
    command: Sequence[str | Path],
    seconds: float,
    log: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    ask: signal.Signals = signal.SIGTERM,
) -> Done:
    """Run a process and its children, output into `log`; stop them all after `seconds`."""
    start = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        process = subprocess.Popen(
            list(map(str, command)),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
        status: int | None = None
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(ask)
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_S)
        finally:  # whatever it has left running, also when this script is interrupted
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Done(status, log.read_text(errors="replace"), time.monotonic() - start)


def test_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The test files that come first, in their order, and all that follow, the ops' suites last."""
    first = [folder / name for name in FIRST]
    others = sorted(set(folder.rglob("test_*.py")) - set(first))
    return first, others + first[len(ONLY_ON_A_GPU) :]


def tail(text: str, lines: int = 40) -> str:
    """The end of an output."""
    return "\n".join(text.splitlines()[-lines:])


# -------------------------------------------------------------------------------------- reports
@dataclass(frozen=True)
class Outcome:
    """What became of a section: `passed`, `failed` or `skipped`; `partial` if it was cut short."""

    status: str
    detail: str
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.status} in {self.seconds:.0f} s: {self.detail}"


def read_junit(file: Path) -> tuple[dict[str, int], list[str]]:
    """Counts (tests, failures, errors, skipped) and the failed tests of pytest's XML report."""
    if not file.is_file():
        return {}, []
    try:
        root = ElementTree.parse(file).getroot()
    except ElementTree.ParseError:
        return {}, []
    counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in root.iter("testsuite"):
        for name in counts:
            counts[name] += int(suite.get(name, 0))
    failed = [
        f"{case.get('classname')}.{case.get('name')}"
        for case in root.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return counts, failed


def sanitizer_errors(output: str) -> int | None:
    """How many errors compute-sanitizer counts; None if its output has no summary."""
    found = re.findall(r"=+ ERROR SUMMARY: (\d+) error", output)
    # racecheck: "RACECHECK SUMMARY: 3 hazards displayed (1 error, 2 warnings)"
    found += re.findall(r"=+ RACECHECK SUMMARY: (\d+) hazard", output)
    return sum(map(int, found)) if found else None


def find_sanitizer() -> str | None:
    """compute-sanitizer on PATH or in a CUDA toolkit."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    beside = Path(home) / "bin" / "compute-sanitizer"
    return shutil.which("compute-sanitizer") or (str(beside) if beside.is_file() else None)


# ------------------------------------------------------------------------------------- sections
class Session:
    """What the sections share: where things are, and how long each may take."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.work: Path = args.work
        self.site = self.work / "site"
        self.env = {
            "PYTHONPATH": str(self.site),
            "PATH": f"{self.site / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}",
            "PYTHONUNBUFFERED": "1",
        }

    def script(self, name: str, seconds: float, log: str, *arguments: str) -> Done:
        """Run a script of this folder."""
        command = [sys.executable, HERE / name, *arguments, "--device", self.args.device]
        if self.args.quick:
            command.append("--quick")
        return run(command, seconds, self.work / f"{log}.log", self.env)

    # Installed into a folder of its own: torch may lie in another virtual environment's folder,
    # which a fresh environment would not see.
    def build(self, seconds: float) -> Outcome:
        """pip install, without network."""
        shutil.rmtree(self.site, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
        command += ["--no-index", "--target", str(self.site), "-v", str(ROOT)]
        cuda = {} if self.args.device == "cpu" else {"RESNET_FUSED_CUDA": "1"}
        done = run(command, seconds, self.work / "build.log", {**cuda, "PYTHONPATH": ""})
        library = next(self.site.glob("resnet_fused/_C*.so"), None)
        if done.status != 0 or library is None:
            return Outcome("failed", ended(done) + "\n" + tail(done.output), done.seconds)
        size = library.stat().st_size / 1e6
        return Outcome("passed", f"library of {size:.1f} MB", done.seconds)

    def test(self, seconds: float) -> Outcome:
        """Ops and two models against float64, then the test suite: first what runs on the GPU,
        then all, as far as time allows."""
        start, details = time.monotonic(), list[str]()
        models = ["--model", "resnet18", "--model", "resnet50", "--dtype", "fp32"]
        models += ["--dtype", "fp16", "--dtype", "bf16"] if self.args.device != "cpu" else []
        check = ["-m", "resnet_fused", "check", "--device", self.args.device, *models]
        driver = [str(HERE / "gpu_sanitize.py"), "--device", self.args.device]
        for name, command in (("ops", driver), ("models", check)):
            log = self.work / f"check-{name}.log"
            left = seconds - (time.monotonic() - start)
            done = run([sys.executable, *command], left, log, self.env, ROOT / "tests")
            if done.status is None:
                return Outcome("partial", f"{name} against float64: {ended(done)}", seconds)
            if done.status != 0:
                text = f"{name} against float64: {ended(done)}\n{tail(done.output)}"
                return Outcome("failed", text, time.monotonic() - start)
            details.append(f"{name} agree with float64")
        first, rest = test_files(ROOT / "tests")
        chosen = [ROOT / name for name in (self.args.tests or "").split(",") if name]
        parts = [(chosen, [])] if chosen else [(first, ["-k", "cuda"]), (rest, [])]
        for at, (files, options) in enumerate(parts):
            left = seconds - (time.monotonic() - start)
            if left < 5:
                return Outcome("partial", f"{'; '.join(details)}; the rest did not fit", seconds)
            words = [*options, *map(str, files)]
            done, detail, wrong = self.pytest(words, left, f"test{at + 1}")
            details.append(detail)
            if wrong or done.status not in (0, None):
                text = "; ".join(details) + "\n" + tail(done.output)
                return Outcome("failed", text, time.monotonic() - start)
            if done.status is None:
                return Outcome("partial", "; ".join(details), seconds)
        return Outcome("passed", "; ".join(details), time.monotonic() - start)

    def pytest(self, words: list[str], seconds: float, name: str) -> tuple[Done, str, bool]:
        """Run test files, in several processes if pytest-xdist is there; say what came out."""
        junit = self.work / f"{name}.xml"
        junit.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail=50"]
        command += [f"--junitxml={junit}", "-o", "junit_family=xunit1"]
        env = self.env
        if importlib.util.find_spec("xdist"):
            cpus = len(os.sched_getaffinity(0))
            jobs = max(1, min(8, cpus // 2))
            command += ["-n", str(jobs), "--dist", "loadfile"]
            env = {**env, "OMP_NUM_THREADS": str(max(1, cpus // jobs))}
        # From tests/: python -m puts the current folder first, and the root hides the package.
        # SIGINT lets pytest write its report.
        log = self.work / f"{name}.log"
        done = run([*command, *words], seconds, log, env, ROOT / "tests", signal.SIGINT)
        counts, wrong = read_junit(junit)
        detail = ", ".join(f"{count} {what}" for what, count in counts.items()) or "no report"
        if wrong:
            detail += "; failed: " + ", ".join(wrong[:20])
        return done, detail if done.status == 0 else f"{detail}, {ended(done)}", bool(wrong)

    def sanitize(self, seconds: float) -> Outcome:
        """compute-sanitizer's tools over every op; only our kernels are watched."""
        sanitizer, start = find_sanitizer(), time.monotonic()
        if sanitizer is None:
            return Outcome("skipped", "compute-sanitizer is not installed")
        driver = [sys.executable, str(HERE / "gpu_sanitize.py"), "--device", self.args.device]
        found, wrong, status = list[str](), list[str](), "passed"
        for at, tool in enumerate(TOOLS):
            left = (seconds - (time.monotonic() - start)) / (len(TOOLS) - at)
            command = [sanitizer, "--tool", tool, "--kernel-name", "kns=resnet_fused"]
            command += ["--print-limit", "20", "--error-exitcode", "99"]
            # bf16 differs from fp16 in its conversions only.
            options = [] if tool == "memcheck" else ["--dtypes", "fp16,fp32"]
            if tool == "memcheck":  # torch asks the driver for what may not be there
                command += ["--report-api-errors", "no"]
            env = {**self.env, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            done = run([*command, *driver, *options], left, self.work / f"{tool}.log", env)
            if "Device not supported" in done.output:
                return Outcome("skipped", "compute-sanitizer does not support this device")
            errors = sanitizer_errors(done.output)
            found.append(f"{tool}: {'no summary' if errors is None else f'{errors} errors'}")
            if done.status != 0 or errors != 0:
                found[-1] += f" ({ended(done)})"
            if done.status is None and not errors:
                status = "partial"
            elif done.status != 0 or errors != 0:
                wrong.append(tail(done.output))
        detail = "\n".join([", ".join(found), *wrong])
        return Outcome("failed" if wrong else status, detail, time.monotonic() - start)

    def measure(self, script: str, name: str, seconds: float, *arguments: str) -> Outcome:
        """A measuring script; one that is stopped keeps the rows it has saved."""
        budget = ["--results", str(self.args.results), "--budget-s", f"{max(5.0, seconds - 8):.0f}"]
        done = self.script(script, seconds, name, *budget, *arguments)
        skipped = [line for line in done.output.splitlines() if line.startswith("no time for")]
        if done.status is None:
            return Outcome("partial", f"stopped after {done.seconds:.0f} s", done.seconds)
        if done.status != 0:
            return Outcome("failed", ended(done) + "\n" + tail(done.output), done.seconds)
        return Outcome(
            "partial" if skipped else "passed", "; ".join(skipped) or "all", done.seconds
        )

    def bench(self, seconds: float) -> Outcome:
        """Whole models."""
        return self.measure("gpu_models.py", "bench", seconds, "--part", "grid")

    def layers(self, seconds: float) -> Outcome:
        """Layers of ResNet-50."""
        return self.measure("gpu_layers.py", "layers", seconds)

    def compile(self, seconds: float) -> Outcome:
        """The rivals that take long to build."""
        return self.measure("gpu_models.py", "compile", seconds, "--part", "compile")


def ended(done: Done) -> str:
    """How a process ended, in words."""
    return "stopped for want of time" if done.status is None else f"status {done.status}"


def all_sections(session: Session, wanted: Sequence[str], budget: Budget) -> dict[str, Outcome]:
    """Run the wanted sections in order."""
    found: dict[str, Outcome] = {}
    for at, name in enumerate(wanted):
        seconds = budget.grant(name, wanted[at + 1 :])
        if name != "build" and not (session.site / "resnet_fused").is_dir():
            found[name] = Outcome("skipped", "nothing is built: run the section build first")
        elif seconds == 0:
            found[name] = Outcome("skipped", f"{budget.left():.0f} s are left")
        else:
            print(f"== {name}, at most {seconds:.0f} s", flush=True)
            found[name] = getattr(session, name)(seconds)
        print(f"== {name} {found[name]}", flush=True)
    return found


def failed(outcomes: Mapping[str, Outcome]) -> bool:
    """Whether the run as a whole has failed; what could not be built fails with it."""
    return any(
        o.status == "failed" or (o.status == "skipped" and "nothing is built" in o.detail)
        for o in outcomes.values()
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run; 1 if something failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SHARES))
    given = os.environ.get("RESNET_FUSED_RESULTS")
    parser.add_argument("--results", type=Path, default=Path(given or HERE / "results"))
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "gpu", help="logs, the build")
    parser.add_argument("--device", default="cuda", help="cpu tries the scripts without a GPU")
    parser.add_argument("--quick", action="store_true", help="small models: a trial")
    parser.add_argument("--tests", help="test files instead of all, separated by commas")
    parser.add_argument("--total-s", type=float, default=TOTAL_S)
    args = parser.parse_args(argv)
    unknown = [name for name in args.sections if name not in SHARES]
    if unknown:
        parser.error(f"unknown section {unknown[0]}; there are {', '.join(SHARES)}")
    wanted = [name for name in SHARES if not args.sections or name in args.sections]
    args.results, args.work = args.results.resolve(), args.work.resolve()

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what runs is stopped as well
    session, budget = Session(args), Budget(args.total_s)
    outcomes = all_sections(session, wanted, budget)
    args.work.mkdir(parents=True, exist_ok=True)
    status = args.work / "run.json"
    before = json.loads(status.read_text()) if status.is_file() and args.sections else {}
    after = {**before, **{name: asdict(o) for name, o in outcomes.items()}}
    status.write_text(json.dumps(after, indent=1) + "\n")
    if session.site.is_dir():
        done = session.script("gpu_report.py", 60, "report", "--results", str(args.results),
                              "--run", str(status))  # fmt: skip
        print(done.output)
    return 1 if failed(outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
