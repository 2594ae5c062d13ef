# SPDX-License-Identifier: BSD-3-Clause
"""A model under load, eager channels_last first, then resnet_fused: LoadGen scenarios and the
largest rate that keeps a latency budget. These are no MLPerf results.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused import dispatch
from resnet_fused.bench import loadgen, subjects
from resnet_fused.bench.compare import prepare
from resnet_fused.bench.contenders import FUSED, first_line
from resnet_fused.bench.loadgen import JUDGED, Load, Outcome
from resnet_fused.bench.results import LABELS, Setting, columns, digits, versions
from resnet_fused.timing import P99_FROM, Ratio

EAGER = "channels_last"
RATE = "infer_samples_per_sec"
POOL = 64
"""Different images that the load is made of."""
HALVINGS = 6
"""Trials of a search, by which it knows the rate to 1/64 of what the model can do at all."""
CONFIRM = 3
"""Further trials, each at a tenth less, if the found rate does not keep the budget again."""
LONGEST = 4
"""How many times as long as asked for a trial may take, for the sake of a 99th percentile."""


@dataclass(frozen=True)
class Plan:
    """What is asked of every contender.

    Args:
        scenario: one of `loadgen.SCENARIOS`.
        seconds: length of a run; of every trial of a search.
        rate: images per second offered by `server`; None for half of what eager can do.
        budget_s: search for the largest rate that keeps the 99th percentile of the latency below
            this; None for one run at `rate`.
        wait_s: as in `loadgen.Load`.
        logs: a folder for LoadGen's files, or None.
    """

    scenario: str
    seconds: float
    rate: float | None = None
    budget_s: float | None = None
    wait_s: float = 0.0
    logs: Path | None = None

    def takes(self) -> tuple[float, float]:
        """Give the seconds that a setting's load takes usually, and at most, but for warming up."""
        if self.budget_s is None:
            return 2 * self.seconds, 2 * Load(self.scenario, self.seconds, 1.0).limit_s
        trial = Load("server", LONGEST * self.seconds, 1.0).limit_s
        return 2 * (HALVINGS + 1) * self.seconds, 2 * (HALVINGS + 1 + CONFIRM) * trial


@dataclass(frozen=True)
class Found:
    """One contender under load.

    Args:
        setting: what was measured; its batch is the largest allowed.
        plan: what was asked of it.
        contender: who ran it.
        path: what computed it.
        param_count: parameters of the model.
        rate: offered; of a search, the rate that was found; None if there is none.
        max_batch: the largest batch that it was allowed to make.
        outcome: what came of it; None if nothing did.
        versus: against eager: rate, or latency where that is what counts; None for eager itself.
        max_err: relative error against float64.
        bound: error above which the result is called wrong; None where nothing is demanded.
        note: what to know about it.
    """

    setting: Setting
    plan: Plan
    contender: str
    path: str
    param_count: int
    rate: float | None
    max_batch: int
    outcome: Outcome | None
    versus: Ratio | None = None
    max_err: float | None = None
    bound: float | None = None
    note: str = ""

    @property
    def tag(self) -> str:
        """What to call its file after."""
        return f"{self.setting.dtype}-{'budget' if self.plan.budget_s else self.plan.scenario}"

    @property
    def agrees(self) -> bool:
        """Whether the contender gave the result demanded of it, if any was."""
        return self.bound is None or (self.max_err is not None and self.max_err <= self.bound)

    @property
    def judged_by(self) -> str:
        """The column of `record` that says how good it is."""
        q = None if self.plan.budget_s else JUDGED[self.plan.scenario]
        return RATE if q is None else f"p{q}"

    @property
    def figure(self) -> float | None:
        """That column's value."""
        if self.outcome is None:
            return None
        if self.judged_by == RATE:
            return self.outcome.rate
        value: float | None = getattr(self.outcome.latency, self.judged_by)
        return value

    def record(self) -> dict[str, Any]:
        """Give the row for CSV and JSON: timm's columns first, times in ms, None for unknown."""
        done, plan = self.outcome, self.plan
        latency = done.latency if done else None
        return {
            "model": self.setting.model,
            "infer_samples_per_sec": digits(done.rate if done else None),
            "infer_step_time": digits(latency.p50 if latency else None),
            "infer_batch_size": self.setting.batch,
            "infer_img_size": self.setting.size,
            "param_count": round(self.param_count / 1e6, 2),
            "infer_gmacs": round(subjects.gmacs(self.setting.model, self.setting.size), 2),
            "contender": self.contender,
            "dtype": self.setting.dtype,
            "layout": "nhwc",
            "device": self.setting.device,
            "threads": torch.get_num_threads(),
            "scenario": plan.scenario,
            "rate": digits(self.rate) if plan.scenario == "server" and not plan.budget_s else None,
            "budget_ms": digits(1e3 * plan.budget_s) if plan.budget_s else None,
            "wait_ms": digits(1e3 * plan.wait_s) if plan.scenario == "server" else None,
            "duration_s": plan.seconds,
            "count": done.count if done else 0,
            **{f"p{q}": digits(getattr(latency, f"p{q}", None)) for q in (50, 90, 95, 99)},
            "used_batch": self.max_batch,
            "mean_batch": digits(done.mean_batch if done else None),
            "judged_by": self.judged_by,
            "noise": digits(done.noise if done else None),
            "ratio": digits(self.versus.value if self.versus else None),
            "max_err": digits(self.max_err),
            "err_bound": digits(self.bound),
            "agrees": self.agrees,
            "path": self.path,
            "note": self.note,
            "versions": f"{versions()}, loadgen {loadgen.version()}",
        }


class Answers:
    """A network that answers numbers of images from a small pool, as LoadGen asks.

    Args:
        net: in eval mode.
        pool: [POOL, size, size, 3], so that a batch of them is channels_last.
    """

    def __init__(self, net: nn.Module, pool: Tensor) -> None:
        self.net = net
        self.pool = pool

    @torch.inference_mode()
    def __call__(self, images: list[int]) -> None:
        """Compute the logits of a batch; returns when they are there."""
        self.net(self.pool[images].permute(0, 3, 1, 2))
        if self.pool.is_cuda:
            torch.cuda.synchronize(self.pool.device)

    def seconds(self, batch: int) -> float:
        """Time one batch, after warming up: the median of at least three calls."""
        images = [i % POOL for i in range(batch)]
        self(images)
        times: list[float] = []
        while len(times) < 3 or (len(times) < 20 and sum(times) < 0.1):
            start = time.perf_counter()
            self(images)
            times.append(time.perf_counter() - start)
        return statistics.median(times)


def batches(largest: int) -> list[int]:
    """Give the powers of two up to `largest`, and that."""
    return sorted({*(2**k for k in range(largest.bit_length())), largest})


def measure(
    setting: Setting,
    model: nn.Module,
    plan: Plan,
    say: Callable[[str], None] = lambda text: None,
) -> list[Found]:
    """Put the same load on eager channels_last and on resnet_fused, one after the other.

    Args:
        setting: what to measure; its batch is the largest allowed.
        model: the float32 model by that name, as `subjects.make_model` gives it; it is copied.
        plan: what to ask.
        say: told what happens now, and every trial of a search.

    Returns:
        Eager's row and resnet_fused's.

    Raises:
        ModuleNotFoundError: LoadGen is not installed.
    """
    loadgen.find()
    if plan.scenario == "single-stream":
        setting = replace(setting, batch=1)
    usual, most = plan.takes()
    say(f"{setting}: preparing; then {usual:.0f} s of load, {most:.0f} s at most")
    _, errors, bound = prepare(setting, model, None)
    dtype = subjects.DTYPES[setting.dtype]
    fused = copy.deepcopy(model).to(setting.device, dtype)
    fused = fused.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    draw = torch.Generator().manual_seed(setting.seed + 2)
    pool = torch.randn(POOL, setting.size, setting.size, 3, generator=draw)
    pool = pool.to(setting.device, dtype)
    rows: list[Found] = []
    for name, net in ((EAGER, subjects.plain(fused)), (FUSED, fused)):
        path = dispatch.path_on(torch.device(setting.device), dtype, "conv_bn_act").name
        row = Found(
            setting=setting,
            plan=plan,
            contender=name,
            path=path if name == FUSED else "aten",
            param_count=sum(p.numel() for p in fused.parameters()),
            rate=plan.rate,
            max_batch=setting.batch,
            outcome=None,
            max_err=errors.get(name),
            bound=bound if name == FUSED else None,
        )
        answers = Answers(net, pool)
        try:
            row = _search(row, answers, say) if plan.budget_s else _once(row, answers, say)
        except Exception as error:  # one contender's failure must not hide the other's figures
            row = replace(row, note=first_line(error), max_err=None)
        if rows:
            row = replace(row, versus=_versus(row, rows[0]))
        elif plan.scenario == "server" and plan.budget_s is None:
            plan = replace(plan, rate=row.rate)  # both get the same
        rows.append(row)
    return rows


def _once(row: Found, answers: Answers, say: Callable[[str], None]) -> Found:
    """Run one scenario."""
    plan = row.plan
    sizes = batches(row.max_batch) if plan.scenario == "server" else [row.max_batch]
    capacity = max(batch / answers.seconds(batch) for batch in sizes)
    rate = capacity if plan.scenario != "server" else plan.rate or float(f"{capacity / 2:.3g}")
    say(f"{row.setting} {row.contender}: {plan.scenario}, {plan.seconds:g} s")
    load = Load(
        plan.scenario, plan.seconds, rate, row.max_batch, plan.wait_s, seed=row.setting.seed
    )
    outcome = loadgen.run(answers, POOL, load, plan.logs and plan.logs / row.contender)
    note = "" if outcome.finished else f"overloaded: not done after {load.limit_s:.0f} s"
    if outcome.latency and plan.scenario == "server" and outcome.latency.p99 is None:
        note = f"{outcome.count} images are too few for p99, {P99_FROM} are not: raise --duration"
    row = replace(row, rate=rate if plan.scenario == "server" else None, note=note)
    return replace(row, outcome=outcome) if outcome.finished else row


def _search(row: Found, answers: Answers, say: Callable[[str], None]) -> Found:
    """Find the largest rate whose 99th percentile stays below the budget.

    The largest batch is the largest of which two in a row keep the budget, since an image may have
    to wait for one that has just begun. The rate is halved in between nothing and what the model
    can do back to back. What is found must keep the budget once more, with other arrivals.
    """
    plan, budget_s = row.plan, row.plan.budget_s or 0.0
    seconds: dict[int, float] = {}
    for batch in batches(row.setting.batch):
        seconds[batch] = answers.seconds(batch)
        if 2 * seconds[batch] > budget_s:
            break
    fitting = [batch for batch, s in seconds.items() if 2 * s <= budget_s] or [1]
    row = replace(row, max_batch=max(fitting))
    if seconds[1] > budget_s:
        return replace(row, note=f"one image alone takes {1e3 * seconds[1]:.3g} ms")
    capacity = max(batch / seconds[batch] for batch in fitting)
    say(f"{row.setting} {row.contender}: at most {capacity:.4g} images/s, batch {row.max_batch}")
    tried: list[str] = []

    def trial(rate: float, seed: int) -> Outcome | None:
        outcome, why = _trial(row, answers, rate, seed)
        tried.append(f"{rate:.4g} {why}")
        say(f"  {rate:.4g} images/s: {why}")
        return outcome

    low, high = 0.0, capacity
    found: Outcome | None = None
    for number in range(HALVINGS):
        rate = (low + high) / 2
        if _trial_s(plan, rate) > LONGEST * plan.seconds:
            lasts = _trial_s(plan, rate)
            tried.append(f"{rate:.4g} and less not: {P99_FROM} images would take {lasts:.0f} s")
            say(f"  {tried[-1]}; raise --duration")
            break
        outcome = trial(rate, row.setting.seed + number)
        low, high, found = (low, rate, found) if outcome is None else (rate, high, outcome)
    for number in range(CONFIRM + 1) if found else ():
        found = trial(low, row.setting.seed + HALVINGS + number)
        if found:
            break
        high, low = low, 0.9 * low
    note = "tried " + "; ".join(tried)
    if found is None:
        return replace(row, note=f"found no rate that keeps {1e3 * budget_s:g} ms; {note}")
    # What was offered counts, not how many the random arrivals came to; the search knows it so far.
    found = replace(found, rate=low, noise=high / low - 1)
    return replace(row, rate=low, outcome=found, note=note)


def _trial_s(plan: Plan, rate: float) -> float:
    """Say how long a trial must be for a 99th percentile; arrivals are random, hence 1.3."""
    return max(plan.seconds, 1.3 * P99_FROM / rate)


def _trial(row: Found, answers: Answers, rate: float, seed: int) -> tuple[Outcome | None, str]:
    """Offer a rate; returns the outcome if the budget was kept, and what to say."""
    plan, budget_s = row.plan, row.plan.budget_s or 0.0
    load = Load("server", _trial_s(plan, rate), rate, row.max_batch, plan.wait_s, seed)
    logs = plan.logs and plan.logs / row.contender / f"{rate:.4g}"
    outcome = loadgen.run(answers, POOL, load, logs)
    if outcome.latency is None:
        return None, "overloaded"
    p99 = outcome.latency.p99
    if p99 is None:
        return None, f"only {outcome.count} images"
    kept = p99 <= 1e3 * budget_s
    return outcome if kept else None, f"p99 {p99:.3g} ms, {'kept' if kept else 'too late'}"


def _versus(row: Found, base: Found) -> Ratio | None:
    """Say how much better a row is than its base: by rate, or by latency if that counts."""
    if not row.figure or not base.figure or not row.outcome or not base.outcome:
        return None
    value = row.figure / base.figure
    value = value if row.judged_by == RATE else 1 / value
    noise = math.expm1(math.log1p(row.outcome.noise) + math.log1p(base.outcome.noise))
    return Ratio(value, value, value, noise, loadgen.WINDOWS)


HEAD = ["asked", "img/s", "p50 ms", "p90", "p95", "p99", "images", "mean batch"]
HEAD = [*HEAD, "vs channels_last", "by", "noise", "max err"]


def table(rows: Sequence[Found]) -> str:
    """Lay the rows out for a terminal, with their notes below."""
    lines = [LABELS + HEAD]
    for row in rows:
        s, done, latency = row.setting, row.outcome, row.outcome and row.outcome.latency
        asked = f"{row.rate:.4g}/s" if row.rate and row.plan.scenario == "server" else "-"
        times = [getattr(latency, f"p{q}", None) for q in (50, 90, 95, 99)]
        lines.append(
            [s.model, s.dtype, str(row.max_batch), row.contender, asked]
            + [f"{done.rate:.1f}" if done else "-"]
            + ["-" if ms is None else f"{ms:.2f}" for ms in times]
            + [str(done.count) if done else "-", f"{done.mean_batch:.1f}" if done else "-"]
            + [str(row.versus or ("base" if row.contender == EAGER else "-"))]
            + ["img/s" if row.judged_by == RATE else row.judged_by]
            + [f"{done.noise:.1%}" if done and math.isfinite(done.noise) else "-"]
            + [("-" if row.max_err is None else f"{row.max_err:.1e}")]
        )
        lines[-1][-1] += "" if row.agrees else " WRONG"
    notes = [f"{row.contender}, {row.setting}: {row.note}" for row in rows if row.note]
    return "\n".join(columns(lines, len(LABELS)) + notes)
