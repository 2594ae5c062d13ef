# SPDX-License-Identifier: BSD-3-Clause
"""Inputs of the ops: random numbers for the bound, small integers whose results are exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from harness.bounds import Exact
from resnet_fused.ops import ConvBN

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Source:
    """Seeded tensors; ``integer`` ones give exact sums below 256, which every dtype holds."""

    dtype: torch.dtype
    integer: bool = False
    seed: int = 0
    terms: int = 6  # non-zero integer weights per filter, about
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed + 1)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        t = torch.randn(shape, generator=self.generator) * scale
        return t.to(dtype or self.dtype)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=self.generator).to(self.dtype)

    def image(self, *shape: int) -> Tensor:
        """An activation [N, C, H, W] in channels_last."""
        t = self.integers(-2, 2, *shape) if self.integer else self.normal(*shape)
        return t.contiguous(memory_format=torch.channels_last)

    def sparse(self, *shape: int, terms: int) -> Tensor:
        """Weights of -1, 0 and 1 of which about ``terms`` per filter are not 0."""
        per_filter = max(1, int(torch.tensor(shape[1:]).prod()))
        chance = torch.rand(shape, generator=self.generator)
        return self.integers(0, 1, *shape).mul(2).sub(1) * (chance < terms / per_filter)

    def conv(self, c: int, k: int, window: int = 1, bias: bool = False, **options: Any) -> ConvBN:
        """A convolution of C to K channels with BatchNorm; padding keeps the size unless given.

        A given ``eps`` comes with variances as small, so that it counts.
        """
        groups, eps = options.get("groups", 1), options.pop("eps", None)
        shape = (k, c // groups, window, window)
        options.setdefault("padding", (window // 2, window // 2))
        if self.integer:
            # Scales of 1 and 2 from gamma / sqrt(var + 0), shifts that are whole numbers.
            var = torch.tensor([1.0, 4.0])[torch.arange(k) % 2]
            statistics = (var, self.integers(-1, 1, k).float(), self.integers(-2, 2, k).float())
            return ConvBN(
                self.sparse(*shape, terms=self.terms),
                self.integers(-1, 1, k) if bias else None,
                statistics[0],
                statistics[1],
                statistics[2],
                var,
                0.0,
                **options,
            )
        fan = c // groups * window * window
        return ConvBN(
            self.normal(*shape, scale=fan**-0.5),
            self.normal(k) if bias else None,
            torch.rand(k, generator=self.generator) + 0.5,
            self.normal(k, dtype=torch.float32),
            self.normal(k, dtype=torch.float32),
            (torch.rand(k, generator=self.generator) + 0.5) * (eps or 1.0),
            eps or 1e-5,
            **options,
        )


Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """Inputs worth testing; ``why`` says what would break them.

    A ``slow`` one is large: only the path that this CPU chooses is tested with it.
    """

    name: str
    make: Callable[[Source], Inputs]
    why: str
    slow: bool = False


@dataclass(frozen=True)
class Op:
    """An op as the suite sees it."""

    name: str
    call: Callable[..., Tensor]
    exact: Callable[..., Exact]  # (dtype, products, *args, **kwargs) -> rounded result
    cases: tuple[Case, ...]
    flat: Callable[..., tuple[Any, ...]]  # the dispatcher's arguments
    terms: int = 6  # as in Source: fewer where convolutions follow each other
