# SPDX-License-Identifier: BSD-3-Clause
"""The package's one timer: contenders take turns in one process, and noise is measured with them.

A machine's clock drifts with its neighbours, so times taken minutes apart say little about a
ratio. Here every round visits every contender once, in a new order, and a ratio is only ever taken
inside a round. The statistics are pure functions of the samples; only `measure` touches a clock.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

P99_FROM = 100
"""Fewest samples for which a 99th percentile is given."""


# ---------------------------------------------------------------------------------- statistics
def percentile(samples: Sequence[float], q: float) -> float:
    """Give the q-th percentile by linear interpolation between the two nearest samples.

    Args:
        samples: at least one number, in any order.
        q: 0 to 100.

    Raises:
        ValueError: no samples, or q outside 0 to 100.
    """
    if not samples:
        raise ValueError("samples must hold at least one number, got none")
    if not 0 <= q <= 100:
        raise ValueError(f"q must lie between 0 and 100, got {q}")
    ordered = sorted(samples)
    place = (len(ordered) - 1) * q / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


@dataclass(frozen=True)
class Summary:
    """Describe one contender's samples, in milliseconds; `p99` is None below 100 samples."""

    count: int
    p50: float
    p90: float
    p95: float
    p99: float | None


def summarize(samples: Sequence[float]) -> Summary:
    """Count samples and give their percentiles; a tail is not guessed from too few of them."""
    return Summary(
        count=len(samples),
        p50=percentile(samples, 50),
        p90=percentile(samples, 90),
        p95=percentile(samples, 95),
        p99=percentile(samples, 99) if len(samples) >= P99_FROM else None,
    )


@dataclass(frozen=True)
class Ratio:
    """Say how many times faster a contender is than its base, and how sure that is.

    `value` is the median over rounds of base time / contender time. `low` and `high` bound that
    median. `noise` is relative: 0.05 means that a value within 5 % of 1 says nothing.
    """

    value: float
    low: float
    high: float
    noise: float
    rounds: int

    @property
    def beyond_noise(self) -> bool:
        """Whether the value differs from 1 by more than the noise."""
        return abs(math.log(self.value)) > math.log1p(self.noise)

    def __str__(self) -> str:
        """Print `1.46x`, or `1.0 ± 0.05` where the noise is larger than the difference."""
        if self.beyond_noise:
            return f"{self.value:.2f}x"
        return f"1.0 ± {self.noise:.2f}" if math.isfinite(self.noise) else "1.0 ± ?"


def median_interval(ordered: Sequence[float]) -> tuple[float, float]:
    """Bound the median of sorted numbers by the sign test, at 95 % or as near as n allows.

    The k-th smallest and k-th largest number enclose the median with probability
    1 - 2 P(Binomial(n, 1/2) < k), whatever the distribution; k is the largest that keeps 95 %.
    Below six numbers none does, and the interval is the whole range.
    """
    n = len(ordered)
    tail, k = 0, 0
    while 40 * (tail + math.comb(n, k)) <= 2**n:  # in integers: 2^n overflows a float
        tail += math.comb(n, k)
        k += 1
    k = max(k, 1)
    return ordered[k - 1], ordered[n - k]


def paired_ratio(base: Sequence[float], contender: Sequence[float]) -> Ratio:
    """Compare two contenders round by round.

    The noise is the larger of two half-widths of the log-ratios: that of the median's sign-test
    interval, which is wide when rounds are few, and that of the interquartile range, which does not
    shrink with more rounds, since neighbouring rounds share the machine's mood. Below three rounds
    no noise can be measured and it is infinite.

    Args:
        base: one positive time per round.
        contender: the other's times in the same rounds.

    Raises:
        ValueError: lengths differ, no rounds, or a time is not positive.
    """
    if len(base) != len(contender) or not base:
        raise ValueError(
            f"base and contender must have the same rounds, got {len(base)} and {len(contender)}"
        )
    if min(*base, *contender) <= 0:
        raise ValueError("times must be positive, got one that is not")
    logs = sorted(math.log(b / c) for b, c in zip(base, contender, strict=True))
    low, high = median_interval(logs)
    noise = math.inf
    if len(logs) >= 3:
        quartiles = percentile(logs, 75) - percentile(logs, 25)
        noise = math.expm1(max(high - low, quartiles) / 2)
    return Ratio(math.exp(statistics.median(logs)), math.exp(low), math.exp(high), noise, len(logs))


def speedup(ratio: Ratio) -> float | None:
    """Give the ratio's value, or None where the measured noise is larger than the difference."""
    return ratio.value if ratio.beyond_noise else None


# ------------------------------------------------------------------------------------ measuring
@dataclass(frozen=True)
class Warmup:
    """Tell how a contender was warmed up; `settled` says that its last two windows agreed."""

    calls: int
    seconds: float
    first_ms: float
    typical_ms: float
    settled: bool


@dataclass(frozen=True)
class Measurement:
    """Hold every sample, in milliseconds: `visits[name][round][call]`."""

    visits: Mapping[str, Sequence[Sequence[float]]]
    warmups: Mapping[str, Warmup]

    def samples(self, name: str) -> list[float]:
        """Give all samples of one contender in the order they were taken."""
        return [ms for visit in self.visits[name] for ms in visit]

    def summary(self, name: str) -> Summary:
        """Summarize all samples of one contender."""
        return summarize(self.samples(name))

    def ratio(self, name: str, base: str) -> Ratio:
        """Compare `name` with `base` by the medians of their visits in each round."""
        medians = [[statistics.median(v) for v in self.visits[n]] for n in (base, name)]
        return paired_ratio(*medians)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector out of the timed calls."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _warm_up(
    timed: Callable[[], float], window_s: float, limit_s: float, agree: float = 0.1
) -> Warmup:
    """Call in windows, one at least, until the last two's medians agree or `limit_s` has passed."""
    windows: list[list[float]] = []
    total, settled = 0.0, False
    while not windows or (not settled and total < limit_s * 1e3):
        windows.append([timed()])
        spent = windows[-1][0]
        while spent < window_s * 1e3:
            windows[-1].append(timed())
            spent += windows[-1][-1]
        total += spent
        middles = [statistics.median(window) for window in windows[-2:]]
        settled = len(middles) == 2 and abs(middles[1] - middles[0]) <= agree * middles[1]
    calls = sum(len(window) for window in windows)
    return Warmup(calls, total / 1e3, windows[0][0], statistics.median(windows[-1]), settled)


def measure(
    contenders: Mapping[str, Callable[[], object]],
    *,
    device: str = "cpu",
    budget_s: float = 10.0,
    min_rounds: int = 3,
    max_rounds: int = 100,
    visit_s: float = 0.1,
    warmup_s: float = 2.0,
    seed: int = 0,
    now: Callable[[], int] = time.perf_counter_ns,
) -> Measurement:
    """Time contenders against each other in interleaved rounds.

    Each contender is warmed up until two windows agree. Then every round visits all of them once in
    a freshly shuffled order. A visit is as many calls as fit `visit_s` (1 to 50), preceded, if more
    than one fits, by an untimed call that brings the contender's own data back into the caches.

    Args:
        contenders: name -> function without arguments; on CUDA it may return before it is done.
        device: where the work runs; for CUDA the clock stops after a synchronisation.
        budget_s: no round starts that would end later than this, warm-up included, once
            `min_rounds` are done.
        min_rounds: rounds done whatever they cost.
        max_rounds: rounds after which to stop early.
        visit_s: time of one visit.
        warmup_s: bound on the warm-up of each contender; all together take half the budget at most.
        seed: of the order within the rounds.
        now: clock in nanoseconds.

    Raises:
        ValueError: no contenders, or not 1 <= min_rounds <= max_rounds.
    """
    if not contenders:
        raise ValueError("contenders must hold at least one function, got none")
    if not 1 <= min_rounds <= max_rounds:
        raise ValueError(
            "min_rounds and max_rounds must satisfy 1 <= min_rounds <= max_rounds, "
            f"got {min_rounds} and {max_rounds}"
        )
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None

    def timed(call: Callable[[], object]) -> float:
        wait()
        start = now()
        call()
        wait()
        return (now() - start) / 1e6

    def visit(name: str) -> list[float]:
        call, count = contenders[name], counts[name]
        if count > 1:
            call()
        return [timed(call) for _ in range(count)]

    warmup_s = min(warmup_s, budget_s / 2 / len(contenders))
    order = list(contenders)
    shuffler = random.Random(seed)
    started = now()
    with _no_collection():
        warmups = {
            name: _warm_up(lambda call=call: timed(call), visit_s, warmup_s)  # type: ignore[misc]
            for name, call in contenders.items()
        }
        counts = {
            name: min(max(int(visit_s * 1e3 / max(w.typical_ms, 1e-6)), 1), 50)
            for name, w in warmups.items()
        }
        visits: dict[str, list[list[float]]] = {name: [] for name in contenders}
        longest = 0
        for done in range(max_rounds):
            round_start = now()
            if done >= min_rounds and round_start - started + longest > budget_s * 1e9:
                break
            shuffler.shuffle(order)
            for name in order:
                visits[name].append(visit(name))
            longest = max(longest, now() - round_start)
    return Measurement(visits, warmups)
