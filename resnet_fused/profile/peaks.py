# SPDX-License-Identifier: BSD-3-Clause
"""What this machine reaches at its best: the rate of arithmetic, and memory bandwidth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from resnet_fused import ops, timing
from resnet_fused.ops import ConvBN


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
_MOST_IMAGES = {"cpu": 16, "cuda": 256}
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
        return _best(seconds, lambda n: 2 * n**3, 1024, _LARGEST[torch.device(device).type])


def conv_rate(dtype: torch.dtype, device: str = "cpu", *, budget_s: float = 0.05) -> float:
    """Measure the rate of this package's 3x3 convolution on 128 channels of 28 x 28, in FLOP/s.

    Of a ResNet's layers it is the one that leaves a matrix unit idle least, so it says what the
    others could reach. Unlike a product it packs its weights once.

    Args:
        dtype: of image and weight.
        device: where; on a CPU with torch's number of threads.
        budget_s: as for `matmul_rate`, for each number of images.
    """
    channels, edge, window = 128, 28, 9
    draw = torch.Generator(device).manual_seed(0)

    def tensor(*shape: int) -> torch.Tensor:
        made = torch.randn(shape, generator=draw, device=device).to(dtype)
        return made.contiguous(memory_format=torch.channels_last)

    conv = ConvBN(tensor(channels, channels, 3, 3), padding=(1, 1))

    def seconds(n: int) -> float:
        x = tensor(n, channels, edge, edge)
        return _fastest(lambda: ops.conv_bn_act(x, conv), device, budget_s)

    with torch.inference_mode():
        flop = 2 * edge**2 * channels**2 * window
        return _best(seconds, lambda n: n * flop, 1, _MOST_IMAGES[torch.device(device).type])


def _best(
    seconds: Callable[[int], float], flop: Callable[[int], int], first: int, last: int
) -> float:
    """The highest rate, of sizes that are doubled until one takes long enough."""
    n, took = first, seconds(first)
    best = flop(n) / took
    while took < _ENOUGH_S and n < last:
        n *= 2
        took = seconds(n)
        best = max(best, flop(n) / took)
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
    """Measure `copy_bandwidth`, and the better of `matmul_rate` and `conv_rate`."""
    product = matmul_rate(dtype, device, sizes=sizes, budget_s=budget_s)
    return Ceilings(
        copy_bandwidth(device, count=count, budget_s=budget_s),
        max(product, conv_rate(dtype, device, budget_s=budget_s)),
    )
