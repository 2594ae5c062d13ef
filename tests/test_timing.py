# SPDX-License-Identifier: BSD-3-Clause
"""The timer: statistics on made-up samples, and the loop under a clock that follows a script."""

from __future__ import annotations

import gc
import math
import random
import statistics

import pytest

from resnet_fused import timing
from resnet_fused.timing import Ratio, measure, median_interval, paired_ratio, percentile, summarize


class Clock:
    """A clock in nanoseconds that only moves when a contender works."""

    def __init__(self) -> None:
        self.ns = 0
        self.calls: list[str] = []

    def __call__(self) -> int:
        return self.ns

    def work(self, name: str, *milliseconds: float):
        """Make a contender whose n-th call takes the n-th time; the last time repeats."""
        times = list(milliseconds)

        def call() -> None:
            self.calls.append(name)
            self.ns += round(1e6 * (times.pop(0) if len(times) > 1 else times[0]))

        return call


def test_percentiles_interpolate_between_samples_in_any_order() -> None:
    """Breaks if the samples are not sorted or a nearest-rank rule is used."""
    samples = [40.0, 10.0, 30.0, 20.0]
    assert [percentile(samples, q) for q in (0, 50, 75, 100)] == pytest.approx([10, 25, 32.5, 40])
    assert percentile([7.0], 95) == 7.0
    rng = random.Random(1)
    many = [rng.random() for _ in range(101)]
    assert percentile(many, 50) == statistics.median(many)


@pytest.mark.parametrize(("samples", "q"), [([], 50), ([1.0], -1), ([1.0], 101)])
def test_percentile_refuses_what_has_no_answer(samples: list[float], q: float) -> None:
    """Breaks if an empty list or a percentage out of range gives a number."""
    with pytest.raises(ValueError, match="samples|q must"):
        percentile(samples, q)


@pytest.mark.parametrize(("count", "known"), [(1, False), (99, False), (100, True), (250, True)])
def test_p99_needs_100_samples(count: int, known: bool) -> None:
    """Breaks if a tail is claimed that too few samples cannot show."""
    summary = summarize([float(i) for i in range(count)])
    assert summary.count == count
    assert (summary.p99 is not None) == known
    assert summary.p50 <= summary.p90 <= summary.p95 <= (summary.p99 or math.inf)


def test_pairing_cancels_a_drift_that_is_larger_than_the_difference() -> None:
    """Breaks if ratios are taken between unpaired samples: here the clock slows down 10-fold."""
    clock = [1.1**i for i in range(25)]
    ratio = paired_ratio([3.0 * c for c in clock], [2.0 * c for c in clock])
    assert ratio.value == pytest.approx(1.5)
    assert ratio.noise == pytest.approx(0.0, abs=1e-9)
    assert ratio.beyond_noise and timing.speedup(ratio) == pytest.approx(1.5)


def test_a_difference_within_the_noise_is_no_speedup() -> None:
    """Breaks if 3 % is claimed where rounds differ by 10 %."""
    rng = random.Random(3)
    base = [math.exp(rng.gauss(math.log(1.03), 0.1)) for _ in range(60)]
    ratio = paired_ratio(base, [1.0] * 60)
    assert 0.04 < ratio.noise < 0.12
    assert timing.speedup(ratio) is None
    assert str(ratio) == f"1.0 ± {ratio.noise:.2f}"


def test_a_slowdown_is_shown_as_readily_as_a_speedup() -> None:
    """Breaks if only ratios above 1 pass the noise test."""
    slow = paired_ratio([1.0, 1.01, 0.99, 1.0], [2.0, 2.0, 2.0, 2.0])
    assert slow.beyond_noise and str(slow) == "0.50x"


def test_the_ratio_and_its_inverse_agree() -> None:
    """Breaks if the noise is judged on ratios instead of their logarithms."""
    rng = random.Random(5)
    a = [1.3 + rng.random() for _ in range(20)]
    b = [1.0 + rng.random() for _ in range(20)]
    there, back = paired_ratio(a, b), paired_ratio(b, a)
    assert there.value * back.value == pytest.approx(1)
    assert there.low * back.high == pytest.approx(1)
    assert there.noise == pytest.approx(back.noise)
    assert there.beyond_noise == back.beyond_noise


@pytest.mark.parametrize("rounds", [1, 2])
def test_too_few_rounds_measure_no_noise_and_so_show_no_speedup(rounds: int) -> None:
    """Breaks if one lucky round is enough for a claim."""
    ratio = paired_ratio([10.0] * rounds, [1.0] * rounds)
    assert math.isinf(ratio.noise)
    assert timing.speedup(ratio) is None and str(ratio) == "1.0 ± ?"


def test_three_rounds_use_their_whole_range_as_noise() -> None:
    """Breaks if few rounds are judged by quartiles, which three values hardly have."""
    ratio = paired_ratio([1.0, 1.2, 1.5], [1.0, 1.0, 1.0])
    assert (ratio.low, ratio.high) == pytest.approx((1.0, 1.5))
    assert ratio.noise == pytest.approx(math.sqrt(1.5) - 1)
    assert timing.speedup(ratio) is None


def test_more_rounds_do_not_shrink_the_noise_below_the_spread_of_rounds() -> None:
    """Breaks if the noise is only the median's confidence interval, which ignores slow drifts."""
    rng = random.Random(7)
    base = [math.exp(rng.gauss(0, 0.1)) for _ in range(2000)]
    ratio = paired_ratio(base, [1.0] * 2000)
    assert ratio.high / ratio.low < 1.03
    assert ratio.noise > 0.05


@pytest.mark.parametrize(("n", "kept"), [(1, 1), (5, 1), (6, 1), (8, 1), (9, 2), (20, 6), (50, 18)])
def test_the_median_interval_is_the_sign_test_of_the_textbooks(n: int, kept: int) -> None:
    """Breaks if the binomial tail is off by one; the ranks are from a table of the sign test."""
    low, high = median_interval(list(range(1, n + 1)))
    assert (low, high) == (kept, n + 1 - kept)


def test_the_median_interval_covers_the_true_median_often_enough() -> None:
    """Breaks if the interval is too narrow: 400 samples of a skewed law, 95 % promised."""
    rng = random.Random(11)
    hits = 0
    for _ in range(400):
        low, high = median_interval(sorted(rng.expovariate(1) for _ in range(15)))
        hits += low <= math.log(2) <= high
    assert hits >= 0.93 * 400


@pytest.mark.parametrize(
    ("base", "other"), [([], []), ([1.0], [1.0, 2.0]), ([1.0, 0.0], [1.0, 1.0]), ([1.0], [-1.0])]
)
def test_ratios_refuse_unpaired_or_impossible_times(base: list[float], other: list[float]) -> None:
    """Breaks if rounds are silently cut to the shorter list or a zero time passes."""
    with pytest.raises(ValueError, match="rounds|positive"):
        paired_ratio(base, other)


def test_measure_gives_back_exactly_the_times_that_passed() -> None:
    """Breaks if something but the calls is timed, or the two contenders are mixed up."""
    clock = Clock()
    work = {"slow": clock.work("slow", 300.0), "fast": clock.work("fast", 30.0)}
    result = measure(work, budget_s=10, min_rounds=3, max_rounds=7, now=clock)
    assert result.visits["slow"] == [[300.0]] * 7
    assert result.visits["fast"] == [[30.0] * 3] * 7
    assert result.summary("slow").p50 == 300.0 and result.summary("fast").count == 21
    assert result.ratio("fast", "slow").value == pytest.approx(10)


def test_every_round_visits_everyone_in_changing_order_that_the_seed_fixes() -> None:
    """Breaks if the contenders run one after the other, in a fixed order, or unrepeatably."""

    def order(seed: int) -> list[str]:
        clock = Clock()
        work = {name: clock.work(name, 200.0) for name in "abc"}
        measure(work, budget_s=99, max_rounds=12, seed=seed, now=clock)
        return clock.calls[-36:]

    rounds = [tuple(order(1)[i : i + 3]) for i in range(0, 36, 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len(set(rounds)) > 2
    assert order(1) == order(1) != order(2)


def test_warm_up_goes_on_until_two_windows_agree() -> None:
    """Breaks if the first, slow calls enter the samples."""
    clock = Clock()
    work = clock.work("a", 900.0, 400.0, 210.0, 200.0)
    result = measure({"a": work}, warmup_s=60, max_rounds=3, now=clock)
    warmup = result.warmups["a"]
    assert warmup.settled and warmup.calls == 4
    assert (warmup.first_ms, warmup.typical_ms) == (900.0, 200.0)
    assert result.samples("a") == [200.0] * 3


def test_warm_up_of_something_that_never_settles_ends() -> None:
    """Breaks if the warm-up has no bound."""
    clock = Clock()
    work = clock.work("a", *[100.0 * 1.5 ** (i % 7) for i in range(500)])
    result = measure({"a": work}, warmup_s=3, max_rounds=3, budget_s=9, now=clock)
    assert not result.warmups["a"].settled
    assert 3 <= result.warmups["a"].seconds < 5


def test_a_spent_budget_leaves_one_warm_up_call_and_the_minimum_of_rounds() -> None:
    """Breaks if a budget of zero or less skips the warm-up, which tells how long a call takes."""
    for budget in (0.0, -5.0):
        clock = Clock()
        result = measure({"a": clock.work("a", 300.0)}, budget_s=budget, now=clock)
        assert result.warmups["a"].calls == 1 and not result.warmups["a"].settled
        assert result.samples("a") == [300.0] * 3


def test_the_budget_stops_rounds_but_never_below_the_minimum() -> None:
    """Breaks if a round starts that cannot end in time, or too few rounds are done."""
    clock = Clock()
    result = measure({"a": clock.work("a", 1000.0)}, budget_s=10.5, warmup_s=2, now=clock)
    assert clock.ns <= 10.5e9
    assert len(result.visits["a"]) == 8
    clock = Clock()
    result = measure({"a": clock.work("a", 1000.0)}, budget_s=0, min_rounds=4, now=clock)
    assert len(result.visits["a"]) == 4


def test_the_first_call_of_a_visit_with_several_is_not_timed() -> None:
    """Breaks if the caches that the other contender has filled are charged to this one."""
    clock = Clock()
    cold = {"last": ""}

    def call(name: str):
        def run() -> None:
            clock.ns += 5_000_000 if cold["last"] != name else 2_000_000
            cold["last"] = name

        return run

    result = measure({"a": call("a"), "b": call("b")}, max_rounds=5, now=clock)
    assert set(result.samples("a")) == {2.0} == set(result.samples("b"))


def test_the_garbage_collector_is_off_while_timing_and_back_on_after() -> None:
    """Breaks if a collection can fall into a timed call, or stays off after an error."""
    clock = Clock()
    seen: list[bool] = []
    work = clock.work("a", 500.0)

    def call() -> None:
        seen.append(gc.isenabled())
        work()

    measure({"a": call}, max_rounds=3, now=clock)
    assert seen and not any(seen)
    with pytest.raises(ZeroDivisionError):
        measure({"a": lambda: 1 // 0}, now=clock)
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("work", "rounds"), [({}, (3, 9)), ({"a": int}, (0, 9)), ({"a": int}, (5, 4))]
)
def test_measure_refuses_nothing_to_measure(work: dict, rounds: tuple[int, int]) -> None:
    """Breaks if wrong arguments give an empty result instead of an error."""
    with pytest.raises(ValueError, match="contenders must|min_rounds"):
        measure(work, min_rounds=rounds[0], max_rounds=rounds[1], now=Clock())


def test_the_real_clock_sees_a_sleep() -> None:
    """Breaks if the default clock or its unit is wrong."""
    import time

    result = measure(
        {"nap": lambda: time.sleep(0.02)}, budget_s=0.4, warmup_s=0.1, visit_s=0.05, max_rounds=4
    )
    assert 20 <= result.summary("nap").p50 < 200


def test_ratio_prints_what_it_can_stand_for() -> None:
    """Breaks if the printed form and the noise rule part ways."""
    assert str(Ratio(1.46, 1.4, 1.5, 0.03, 20)) == "1.46x"
    assert str(Ratio(1.02, 1.0, 1.05, 0.03, 20)) == "1.0 ± 0.03"
    assert str(Ratio(0.90, 0.85, 0.95, 0.03, 20)) == "0.90x"
