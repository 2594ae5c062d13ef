# SPDX-License-Identifier: BSD-3-Clause
"""Times on a GPU: CUDA events, CUDA graphs, contenders in turn, and what the device can do at best.

On a CPU the same functions work with the host's clock and without graphs, for trying the scripts.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resnet_fused.profile import peaks

Call = Callable[[], object]
QUICK: dict[str, Any] = {"visit_ms": 1.0, "warmup_s": 0.0, "rounds": (1, 2)}
"""Arguments of `measure` for trying a script."""


@dataclass(frozen=True)
class Times:
    """Milliseconds per call, one number per round, of one contender."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def spread(self) -> float:
        """Half the range between the quartiles, relative to the median."""
        if len(self.rounds) < 3:
            return float("inf")
        low, _, high = statistics.quantiles(self.rounds, n=4)
        return (high - low) / 2 / self.median


def is_cuda(device: str) -> bool:
    return torch.device(device).type == "cuda"


def synchronize(device: str) -> None:
    if is_cuda(device):
        torch.cuda.synchronize(device)


def elapsed(call: Call, count: int, device: str) -> float:
    """Milliseconds per call of `count` calls back to back."""
    if not is_cuda(device):
        start = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - start) * 1e3 / count
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / count


def graphed(call: Call, device: str) -> tuple[Call, Tensor | None]:
    """Record a call as a CUDA graph.

    Returns:
        A function that replays it, and the output that every replay writes.

    Raises:
        RuntimeError: the call cannot be recorded.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):  # libraries choose algorithms and allocate workspaces here
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()

    def replay(graph: torch.cuda.CUDAGraph = graph) -> None:
        graph.replay()

    return replay, out if isinstance(out, Tensor) else None


def calls_per_visit(ms: float, visit_ms: float, most: int = 200) -> int:
    """How many calls of about `ms` make a visit of about `visit_ms`; one at least."""
    return max(1, min(most, int(visit_ms / max(ms, 1e-6))))


def measure(
    calls: Mapping[str, Call],
    device: str,
    budget_s: float,
    *,
    visit_ms: float = 25.0,
    warmup_s: float = 0.1,
    rounds: tuple[int, int] = (3, 15),
    seed: int = 0,
    now: Callable[[], float] = time.monotonic,
) -> dict[str, Times]:
    """Time contenders in interleaved rounds of shuffled order, so that clock changes hit all.

    Args:
        calls: name -> function that enqueues its work.
        device: where.
        budget_s: no round starts behind this, once the least number of rounds is done.
        visit_ms: about how long one contender runs in one round.
        warmup_s: how long a contender runs before the first round.
        rounds: the least and the greatest number of them.
        seed: of the order.
        now: clock, in seconds.
    """
    counts = {}
    for name, call in calls.items():
        call()
        synchronize(device)
        warm = calls_per_visit(elapsed(call, 1, device), warmup_s * 1e3)
        counts[name] = calls_per_visit(elapsed(call, warm, device), visit_ms)
    found: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffler, start = list(calls), random.Random(seed), now()
    for done in range(rounds[1]):
        if done >= rounds[0] and now() - start > budget_s:
            break
        shuffler.shuffle(order)
        for name in order:
            found[name].append(elapsed(calls[name], counts[name], device))
    return {name: Times(tuple(ms)) for name, ms in found.items()}


def rotations(call_bytes: float, cache_bytes: int, most: int = 512) -> int:
    """How many sets of inputs a loop must go through to find none of them in the cache again."""
    return max(2, min(most, -(-3 * cache_bytes // max(int(call_bytes), 1))))


def cache_bytes(device: str) -> int:
    """The L2 of a GPU; on a CPU a small number, which keeps a trial short."""
    return torch.cuda.get_device_properties(device).L2_cache_size if is_cuda(device) else 1 << 16


def ceilings(device: str, dtype: torch.dtype, *, quick: bool = False) -> peaks.Ceilings:
    """Measure copy bandwidth and the best rate of arithmetic; `quick` ones try a script."""
    if quick:
        return peaks.ceilings(device, dtype, sizes=(256,), count=1 << 20, budget_s=0.0)
    return peaks.ceilings(device, dtype, budget_s=0.5)


def set_tf32(allowed: bool) -> None:
    """Let fp32 convolutions and products use TF32, or not; the same for every contender."""
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cuda.matmul.allow_tf32 = allowed


def geometric_mean(values: Sequence[float]) -> float:
    """Of ratios; 0 of none."""
    return statistics.geometric_mean(values) if values else 0.0
