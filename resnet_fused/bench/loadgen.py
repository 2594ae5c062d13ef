# SPDX-License-Identifier: BSD-3-Clause
"""One run of a LoadGen scenario (package mlcommons-loadgen) against a function in this process.

LoadGen cannot be stopped, and an exception that passes through it ends the process when the next
test starts. So nothing raised in a callback gets out: the problem is kept, every query from then on
is answered at once without work, and LoadGen runs to the end of its schedule in its own thread.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from resnet_fused.timing import P99_FROM, Summary, percentile

SCENARIOS = ("offline", "server", "single-stream")
WINDOWS = 3
"""Parts of a run that are compared with each other for its noise."""
DETAILS = "mlperf_log_detail.txt"
RATES = {
    "offline": "result_samples_per_second",
    "server": "result_completed_samples_per_sec",
    "single-stream": "result_qps_with_loadgen_overhead",
}
JUDGED = {"offline": None, "server": 99, "single-stream": 90}
"""The percentile of the latencies that a scenario is judged by; offline has only its rate."""

_one_at_a_time = threading.Lock()  # LoadGen keeps its state in globals


@dataclass(frozen=True)
class Load:
    """What LoadGen is to do.

    Args:
        scenario: one of SCENARIOS. offline: all images at once; server: single images at random
            times (Poisson arrivals); single-stream: the next image when the last is done.
        seconds: how long.
        rate: images per second: offered by server; for the others the rate that is expected,
            from which LoadGen decides how many queries to prepare.
        max_batch: images that may go into one call.
        wait_s: how long an image may wait for others to fill its batch; server only.
        seed: of arrival times and of the choice of images.
    """

    scenario: str
    seconds: float
    rate: float
    max_batch: int = 1
    wait_s: float = 0.0
    seed: int = 0

    @property
    def limit_s(self) -> float:
        """Seconds after which what is left is given up: it is too much for this machine."""
        return 1.5 * self.seconds + 1


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Args:
        count: images answered.
        rate: images answered per second.
        latency: milliseconds from an image's arrival to its answer; None for offline.
        mean_batch: images per call.
        noise: half the spread of the figure that the scenario is judged by over three parts of the
            run, relative; infinite where these hold too few images to tell.
        finished: whether all images were answered before `Load.limit_s`.
    """

    count: int
    rate: float
    latency: Summary | None
    mean_batch: float
    noise: float
    finished: bool = True


class _GaveUp(Exception):
    """The load is too much."""


class _Sample(NamedTuple):
    ticket: int
    image: int
    arrived: float


class _System:
    """What LoadGen asks: batches what waits, and never raises.

    Args:
        complete: takes the tickets of answered samples.
        call: answers a batch of image numbers.
        load: says how to batch.
    """

    def __init__(
        self,
        complete: Callable[[list[int]], None],
        call: Callable[[list[int]], object],
        load: Load,
    ) -> None:
        self._complete = complete
        self._call = call
        self._load = load
        self._queued = load.scenario == "server"
        self._waiting: deque[_Sample] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._until = math.inf
        self.warmed = threading.Event()
        self.problem: BaseException | None = None
        self.calls = 0
        self.done: list[tuple[float, float]] = []  # when, and after how many seconds

    def start(self) -> None:
        """Start the clock that `Load.limit_s` runs by, once a thread is warm."""
        self.warmed.wait()
        self._until = time.perf_counter() + self._load.limit_s

    def issue(self, samples: Sequence[Any]) -> None:
        """Take new samples; LoadGen calls it."""
        try:
            now = time.perf_counter()
            new = [_Sample(sample.id, sample.index, now) for sample in samples]
            if self._queued:
                with self._changed:
                    self._waiting.extend(new)
                    self._changed.notify()
                return
            for start in range(0, len(new), self._load.max_batch):
                self._answer(new[start : start + self._load.max_batch])
        except BaseException as problem:  # see the top of this file
            self.problem = self.problem or problem

    def warm(self) -> None:
        """Make the calling thread's first call, which starts the threads that compute."""
        try:
            self._call([0])
        except BaseException as problem:  # see the top of this file
            self.problem = problem
        self.warmed.set()

    def serve(self) -> None:
        """Answer what waits, until `close`; runs in a thread of its own."""
        self.warm()
        while batch := self._next():
            self._answer(batch)

    def close(self) -> None:
        """End `serve` when nothing waits any more."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _next(self) -> list[_Sample]:
        """Wait for a batch; empty when closed."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            end = self._waiting[0].arrived + self._load.wait_s if self._waiting else 0.0
            while len(self._waiting) < self._load.max_batch and not self._closed:
                left = end - time.perf_counter()
                if left <= 0:
                    break
                self._changed.wait(left)
            count = min(self._load.max_batch, len(self._waiting))
            return [self._waiting.popleft() for _ in range(count)]

    def _answer(self, batch: Sequence[_Sample]) -> None:
        """Run one batch, unless there was a problem, and tell LoadGen that it is done."""
        try:
            if self.problem is None:
                if time.perf_counter() > self._until:
                    raise _GaveUp
                self._call([sample.image for sample in batch])
                now = time.perf_counter()
                self.calls += 1
                self.done += [(now, now - sample.arrived) for sample in batch]
        except BaseException as problem:  # see the top of this file
            self.problem = problem
        self._complete([sample.ticket for sample in batch])


def find() -> Any:
    """Import LoadGen.

    Raises:
        ModuleNotFoundError: it is not installed; the message says how.
    """
    try:
        # Not mlcommons_loadgen: that package puts itself, empty, in the place of this module.
        return importlib.import_module("mlperf_loadgen")
    except ImportError:
        raise ModuleNotFoundError(
            "LoadGen scenarios need mlcommons-loadgen: pip install 'resnet_fused[loadgen]'"
        ) from None


def version() -> str:
    """LoadGen's version; "unknown" for one that pip does not know."""
    try:
        return metadata.version("mlcommons-loadgen")
    except metadata.PackageNotFoundError:
        return "unknown"


def _settings(loadgen: Any, load: Load) -> Any:
    """Translate a Load."""
    settings = loadgen.TestSettings()
    settings.mode = loadgen.TestMode.PerformanceOnly
    settings.min_duration_ms = max(int(load.seconds * 1e3), 1)
    settings.min_query_count = 1
    settings.schedule_rng_seed = settings.sample_index_rng_seed = load.seed
    settings.qsl_rng_seed = load.seed
    if load.scenario == "server":
        settings.scenario = loadgen.TestScenario.Server
        settings.server_target_qps = load.rate
    elif load.scenario == "offline":
        settings.scenario = loadgen.TestScenario.Offline
        settings.offline_expected_qps = load.rate / 1.1  # LoadGen prepares a tenth more
    else:
        settings.scenario = loadgen.TestScenario.SingleStream
        # Half of it, because the run ends early when the prepared queries run out.
        settings.single_stream_expected_latency_ns = max(int(0.5e9 / load.rate), 1)
    return settings


def run(
    call: Callable[[list[int]], object], images: int, load: Load, logs: Path | None = None
) -> Outcome:
    """Let LoadGen put a load on a function.

    Args:
        call: answers a batch, given the numbers of its images (0 to `images` - 1); is called in
            another thread, but never twice at a time.
        images: how many there are to choose from.
        load: what to do.
        logs: a folder for LoadGen's files; None throws them away.

    Raises:
        Exception: what `call` raised.
        ModuleNotFoundError: LoadGen is not installed.
        ValueError: an argument is out of its range.
    """
    if load.scenario not in SCENARIOS:
        raise ValueError(f"scenario must be one of {', '.join(SCENARIOS)}, got {load.scenario!r}")
    for name in ("seconds", "rate", "max_batch"):
        if not 0 < getattr(load, name) < math.inf:
            raise ValueError(f"{name} must be above 0, got {getattr(load, name)}")
    loadgen = find()

    def complete(tickets: list[int]) -> None:
        response = loadgen.QuerySampleResponse
        loadgen.QuerySamplesComplete([response(ticket, 0, 0) for ticket in tickets])

    system = _System(complete, call, load)
    with _folder(logs) as folder:
        tester = threading.Thread(target=_test, args=(loadgen, system, images, load, folder))
        tester.start()
        try:
            while tester.is_alive() and system.problem is None:
                tester.join(0.1)  # a join without end would not hear Ctrl-C
            tester.join()  # LoadGen writes to the folder until its last query has been answered
        except BaseException as problem:
            system.problem = problem
            raise
        if system.problem is None:
            return _outcome(load, system, _details(folder / DETAILS))
        if isinstance(system.problem, _GaveUp):
            return Outcome(len(system.done), math.nan, None, math.nan, math.inf, finished=False)
        raise system.problem


def _test(loadgen: Any, system: _System, images: int, load: Load, folder: Path) -> None:
    """Run LoadGen to its end."""
    try:
        logging = loadgen.LogSettings()
        logging.log_output.outdir = str(folder)
        logging.log_output.copy_summary_to_stdout = False
        logging.enable_trace = False
        with _one_at_a_time:
            if load.scenario == "server":
                threading.Thread(target=system.serve).start()
            else:
                system.warm()
            system.start()
            if system.problem is not None:
                return
            sut = loadgen.ConstructSUT(system.issue, lambda: None)
            qsl = loadgen.ConstructQSL(images, images, lambda chosen: None, lambda chosen: None)
            # A file that is not there, instead of an audit.config that the user may have here.
            audit = str(folder / "no-audit.config")
            settings = _settings(loadgen, load)
            loadgen.StartTestWithLogSettings(sut, qsl, settings, logging, audit)
            loadgen.DestroyQSL(qsl)
            loadgen.DestroySUT(sut)
    except BaseException as problem:  # has no other way out of this thread
        system.problem = system.problem or problem
    finally:
        system.close()


@contextlib.contextmanager
def _folder(logs: Path | None) -> Iterator[Path]:
    if logs is not None:
        logs.mkdir(parents=True, exist_ok=True)
        yield logs
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _details(path: Path) -> dict[str, Any]:
    """Read the results in LoadGen's detail log: lines of JSON behind a marker."""
    found: dict[str, Any] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        marker, _, text = line.partition(" ")
        if marker == ":::MLLOG":
            entry = json.loads(text)
            found[entry["key"]] = entry["value"]
    return found


def _outcome(load: Load, system: _System, details: dict[str, Any]) -> Outcome:
    """Put together what LoadGen measured and what was seen here."""
    count = len(system.done)
    latency = None
    if load.scenario != "offline":
        ms = {q: details[f"result_{q}.00_percentile_latency_ns"] / 1e6 for q in (50, 90, 95, 99)}
        p99 = ms[99] if count >= P99_FROM else None
        latency = Summary(count, ms[50], ms[90], ms[95], p99)
    return Outcome(
        count=count,
        rate=float(details[RATES[load.scenario]]),
        latency=latency,
        mean_batch=count / max(system.calls, 1),
        noise=noise(system.done, JUDGED[load.scenario]),
    )


def noise(done: Sequence[tuple[float, float]], q: int | None) -> float:
    """Compare parts of a run.

    Args:
        done: when each image was answered, in order, and after how many seconds.
        q: the percentile of the latencies that counts; None for the rate.

    Returns:
        Half the range of the parts' figures relative to their median; infinite if a part has fewer
        images than the percentile needs (rate: ten).
    """
    size = len(done) // WINDOWS
    if size < (10 if q is None else math.ceil(100 / (100 - q))):
        return math.inf
    figures = []
    for at in range(WINDOWS):
        part = done[at * size : (at + 1) * size]
        if q is not None:
            figures.append(percentile([latency for _, latency in part], q))
            continue
        # Images that end together have one time; the first such group only starts the clock.
        later = [when for when, _ in part if when > part[0][0]]
        if not later:
            return math.inf
        figures.append(len(later) / (part[-1][0] - part[0][0]))
    figures.sort()
    return (figures[-1] - figures[0]) / 2 / figures[len(figures) // 2]
