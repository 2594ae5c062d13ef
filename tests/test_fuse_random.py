# SPDX-License-Identifier: BSD-3-Clause
"""fuse() on random forwards full of in-place operations, aliases and second readers."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fuse_zoo
from fuse_zoo import conv3, randomise
from resnet_fused.fuse import fuse
from resnet_fused.modules import Fused

one_thread = fuse_zoo.one_thread
C = 3


class Opaque(nn.Module):
    """Its caller cannot know that it returns, changes or shares its input."""

    def __init__(self, kind: int) -> None:
        super().__init__()
        self.kind, self.a, self.b = kind, conv3(C, C), conv3(C, C)

    def forward(self, x: Tensor) -> Tensor:
        return (x, x.mul_(0.5) if self.kind == 1 else x, x[:, :], self.b(self.a(x)))[self.kind]


class Random(nn.Module):
    """A forward that ``seed`` makes up; it returns some of its intermediate values."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.convs = nn.ModuleList(conv3(C, C) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(C) for _ in range(4))
        self.down = nn.Sequential(conv3(C, C), nn.BatchNorm2d(C))
        self.opaque = nn.ModuleList(Opaque(kind) for kind in range(4))
        self.inplace, self.relu, self.identity = nn.ReLU(inplace=True), nn.ReLU(), nn.Identity()

    def forward(self, x: Tensor) -> list[Tensor]:
        rng, values = random.Random(self.seed), [x]
        for _ in range(rng.randint(3, 10)):
            values.append(self.step(rng, values))
        return [values[-1], *(v for v in values[1:-1] if rng.random() < 0.15)]

    def step(self, rng: random.Random, values: list[Tensor]) -> Tensor:
        """One operation on the latest value or, less often, on any."""
        v, w = (values[-1] if rng.random() < 0.7 else rng.choice(values) for _ in range(2))
        choice: Any = rng.choice(
            [
                *[self.conv_norm] * 3,
                self.block,
                lambda rng, v, w: rng.choice([self.inplace, self.relu, F.relu, torch.relu_])(v),
                lambda rng, v, w: rng.choice([torch.add, Tensor.add_, Tensor.__iadd__])(v, w),
                lambda rng, v, w: F.relu(v + w, inplace=rng.random() < 0.5),
                lambda rng, v, w: rng.choice([Tensor.clone, self.identity, self.down])(v),
                lambda rng, v, w: rng.choice(list(self.opaque))(v),
                lambda rng, v, w: v.mul_(0.7) if rng.random() < 0.5 else v.view(v.shape),
            ]
        )
        return choice(rng, v, w)

    def conv_norm(self, rng: random.Random, v: Tensor, w: Tensor) -> Tensor:
        y = rng.choice(list(self.convs))(v)
        if rng.random() < 0.1:
            v.mul_(1.25)
        y = rng.choice(list(self.norms))(y)
        end = rng.randrange(5)
        if end == 0:
            y += w
        elif end == 1:
            y = w + y
        return (self.inplace, F.relu, self.identity, Tensor.relu_, self.relu)[rng.randrange(5)](y)

    def block(self, rng: random.Random, v: Tensor, w: Tensor) -> Tensor:
        y = self.norms[0](self.convs[0](self.inplace(self.norms[1](self.convs[1](v)))))
        return F.relu(y + (self.down(v) if rng.random() < 0.5 else v))


def test_random_forwards() -> None:
    """A rule about what may move or be left out has a hole."""
    found: Counter[str] = Counter()
    for seed in range(120):
        plain = randomise(Random(seed), seed).double()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "nothing in")
            fused: Any = fuse(plain)
        x = torch.randn(2, C, 4, 5, generator=torch.Generator().manual_seed(seed)).double()
        mine, theirs = x.clone(), x.clone()
        with torch.no_grad():
            got, want = fused(mine), plain(theirs)
        for a, b in zip([*got, mine], [*want, theirs], strict=True):
            bound = 1e-10 * max(1.0, b.abs().max().item())
            torch.testing.assert_close(a, b, rtol=0, atol=bound, msg=f"seed {seed}")
            assert a.stride() == b.stride(), f"seed {seed}"
        if isinstance(fused, Fused):
            found.update(site.pattern for site in fused.fused_sites())
    assert min(found[p] for p in ("conv_bn_act", "basic_block", "add_relu")) >= 5, found
