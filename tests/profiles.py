# SPDX-License-Identifier: BSD-3-Clause
"""Models to profile, and profiles made up for tests of what is drawn and written."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fused.profile.peaks import Ceilings
from resnet_fused.profile.result import Layer, Profile, Row, Whole, Work
from resnet_fused.timing import Ratio

PEAKS = Ceilings(bandwidth=20e9, peak=2e12)
FACTS: dict[str, Any] = {
    "model": "resnet<50> & co",
    "dtype": "bf16",
    "batch": 16,
    "size": "224x224",
    "device": "A Processor(R)",
    "threads": 2,
    "cpu_capability": "AVX512",
    "amx": True,
    "cuda": None,
    "versions": "resnet_fused 1.0, torch 2.13, python 3.11",
    "load_by_others": 0.0,
}


class Squeezed(nn.Module):
    """A block that fuse() takes apart: something that is not fused stands before its addition."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.gate = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y = y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))
        return F.relu(x + y)


class Net(nn.Module):
    """A convolution, a block like torchvision's, one that cannot be one call, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.blocks = nn.Sequential(Squeezed(), Squeezed())
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(self.blocks(x).mean((2, 3)))


def layer(name: str, kind: str, ms: float, place: int = 0, flop: float = 1e9) -> Layer:
    """A layer with some work."""
    path = "amx" if kind in ("stem", "bottleneck", "pool_linear") else "eager"
    return Layer(name, kind, path, Work(flop, 4e6, 4e6, 1e6), ms, place)


def profile_of(times: list[tuple[str, list[float], float]], **facts: Any) -> Profile:
    """A profile with the given rows: name, times of the eager layers, time of the fused call."""
    rows, place = [], 0
    kinds = ("conv", "bn", "relu", "add", "pool", "linear", "sigmoid")
    for i, (name, eager, fused) in enumerate(times):
        parts = []
        for j, ms in enumerate(eager):
            kind = kinds[j % len(kinds)]
            parts.append(layer(f"{name}.{kind}", kind, ms, place, 1e9 * (kind == "conv")))
            place += 1
        flop = sum(part.work.flop for part in parts)
        work = Work(flop, 2e6, 2e6, 1e6)
        ratio = Ratio(sum(eager) / fused, 1.0, 9.0, 0.05, 9) if fused and sum(eager) else None
        mine = Layer(name, "bottleneck", "amx", work, fused, i)
        rows.append(Row(mine, tuple(parts), sum(eager), ratio))
    wholes = [sum(sum(e) for _, e, _ in times) * 1.05, sum(f for *_, f in times) * 1.1]
    value = wholes[0] / wholes[1] if min(wholes) > 0 else 1.0
    return Profile(
        tuple(rows),
        Whole(wholes[1], wholes[1] * 1.02),
        Whole(wholes[0], wholes[0] * 1.03),
        Ratio(value, value, value, 0.05, 9),
        PEAKS,
        FACTS | facts,
    )


def like_resnet50(scale: float = 1.0) -> Profile:
    """A stem, sixteen blocks and a head with plausible times in milliseconds."""
    found = [("stem", [3.0 * scale, 1.5, 1.2, 3.1], 2.2 * scale)]
    for stage, (blocks, ms) in enumerate(((3, 4.0), (4, 2.5), (6, 1.8), (3, 2.4)), 1):
        for i in range(blocks):
            eager = [v * ms * scale for v in (0.5, 0.2, 0.1, 0.6, 0.15, 0.05, 0.5, 0.2, 0.1, 0.3)]
            found.append((f"layer{stage}.{i}", eager, ms * scale * (0.9 + 0.05 * i)))
    return profile_of([*found, ("head", [0.02, 0.3], 0.2)])
