# SPDX-License-Identifier: BSD-3-Clause
"""What this machine reaches at its best: the rate of a matrix product, and memory bandwidth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from resnet_fused import timing


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches at its best: bytes per second, operations per second."""

    bandwidth: float
    peak: float

    def best(self, other: Ceilings) -> Ceilings:
        """The higher of each of two measurements."""
        return Ceilings(max(self.bandwidth, other.bandwidth), max(self.peak, other.peak))

    def floor(self, flop: float, moved: float) -> float:
        """Least time in seconds for ``flop`` operations and ``moved`` bytes."""
        return max(flop / self.peak, moved / self.bandwidth)


_LARGEST = {"cpu": 4096, "cuda": 8192}
_ENOUGH_S = 5e-3  # a product that takes so long is large enough to be fast


def _fastest(call: Callable[[], object], device: str, budget_s: float) -> float:
    """Least time of a call in seconds."""
    measured = timing.measure(
        {"call": call}, device=device, budget_s=budget_s, visit_s=budget_s / 10
    )
    return min(measured.samples("call")) / 1e3


def matmul_rate(
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    sizes: Sequence[int] | None = None,
    budget_s: float = 0.05,
) -> float:
    """Measure the rate of `torch.matmul` on large square random matrices, in FLOP/s.

    On an AMX CPU the bf16 rate stands for what the matrix unit gives oneDNN, elsewhere for its FMA
    units: 2 n^3 / fastest time, of the best size. It is what a well-kept library reaches today, not
    the data sheet's peak, and no upper bound: the product packs its factors at every call, which a
    network's weights need only once. The data are random, for a chip may run zeros faster.

    Args:
        dtype: of the factors and the result.
        device: where; on a CPU with torch's number of threads.
        sizes: edges of the matrices; None goes on to larger ones while they take too little time.
        budget_s: seconds, for each size; the first call and three more are made in any case.
    """
    draw = torch.Generator(device).manual_seed(0)

    def seconds(n: int) -> float:
        a, b = (torch.randn(n, n, generator=draw, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        return _fastest(lambda: torch.matmul(a, b, out=out), device, budget_s)

    with torch.inference_mode():
        if sizes is not None:
            return max(2 * n**3 / seconds(n) for n in sizes)
        n, best, took = 512, 0.0, 0.0
        while took < _ENOUGH_S and n < _LARGEST[torch.device(device).type]:
            n *= 2
            took = seconds(n)
            best = max(best, 2 * n**3 / took)
        return best


def copy_bandwidth(
    device: str = "cpu", *, count: int | None = None, budget_s: float = 0.05
) -> float:
    """Measure how fast memory is copied, in bytes per second, those read and those written.

    Args:
        device: where; on a CPU with torch's number of threads.
        count: bytes to copy, more than any cache holds; None chooses by the device.
        budget_s: seconds; the first call and three more are made in any case.
    """
    if count is None:
        count = 2 << 30 if torch.device(device).type == "cuda" else 128 << 20
    with torch.inference_mode():
        source = torch.zeros(count // 4, dtype=torch.float32, device=device)
        target = torch.zeros_like(source)  # every page is there before the first copy
        return 2 * 4 * (count // 4) / _fastest(lambda: target.copy_(source), device, budget_s)


def ceilings(
    device: str,
    dtype: torch.dtype,
    *,
    sizes: Sequence[int] | None = None,
    count: int | None = None,
    budget_s: float = 0.05,
) -> Ceilings:
    """Measure `copy_bandwidth` and `matmul_rate`."""
    return Ceilings(
        copy_bandwidth(device, count=count, budget_s=budget_s),
        matmul_rate(dtype, device, sizes=sizes, budget_s=budget_s),
    )
