# SPDX-License-Identifier: BSD-3-Clause
"""Ten thousand forwards leave no memory behind.

The work is ten equal cycles of a thousand forwards: two networks that live throughout, whose
weights are changed now and then, and two that come and go; in bfloat16, and in float32 in both of
torch's precisions for it; on images of changing sizes and batches. What a cycle leaves behind, the
next one would leave again, so memory and counters must be the same at the end of each. It runs in a
process of its own, since other tests' memory would be counted.
"""

from __future__ import annotations

import ctypes
import gc
import json
import random
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn

import resnet_fused
from resnet_fused import _extension
from resnet_fused.models import BasicBlock, Bottleneck, ResNet

CYCLES, FORWARDS = 10, 1000
WARM = 3
"""Cycles after which everything that is made once has been made."""
ALLOWED = {"rss": 4 << 20, "packed": 20, "pack_bytes": 1 << 20, "pool_bytes": 2 << 20}
"""Growth over the other seven cycles: 600 bytes per forward; a packing in ten, not one in every
forward; less than one network's packings, and one block of the pool, where seven would leak."""
BATCHES = (1, 2, 3, 4)
SIZES = (8, 17, 26)
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Reading:
    """What is held at the end of a cycle; `packed` counts the packings made in it."""

    rss: int
    packed: int
    pack_bytes: int
    pool_bytes: int


def resident() -> int:
    """Bytes of memory this process holds, without what malloc keeps for later."""
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def readings(cycle: Callable[[], object], cycles: int = CYCLES) -> list[Reading]:
    """Run the cycles and read memory and the library's counters after each."""
    library = _extension._library
    assert library is not None, _extension.why_not()
    found, before = [], library.resnet_fused_pack_count()
    for _ in range(cycles):
        cycle()
        gc.collect()
        count = library.resnet_fused_pack_count()
        packs, pool = library.resnet_fused_pack_bytes(), library.resnet_fused_pool_bytes()
        found.append(Reading(resident(), count - before, packs, pool))
        before = count
    return found


def complaints(found: list[Reading]) -> list[str]:
    """List what grew after the first `WARM` cycles."""
    first, last = found[WARM - 1], found[-1]
    lines = []
    for name, allowed in ALLOWED.items():
        if getattr(last, name) > getattr(first, name) + allowed:
            values = [getattr(reading, name) for reading in found]
            lines.append(f"{name} grew by more than {allowed} after cycle {WARM}: {values}")
    return lines


class Work:
    """A thousand forwards at each call, always the same."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.images = {
            (n, size, dtype): torch.randn(n, 3, size, size).to(dtype)
            for n in BATCHES
            for size in SIZES
            for dtype in DTYPES
        }
        # At this size activations come from the library's pool.
        self.large = {dtype: torch.randn(1, 3, 192, 192).to(dtype) for dtype in DTYPES}
        self.kept = {dtype: self.network(Bottleneck, dtype) for dtype in DTYPES}

    @staticmethod
    def network(block: type[BasicBlock | Bottleneck], dtype: torch.dtype) -> ResNet:
        """The first half of a small ResNet: it has every op of the second, which is only wider."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            net = ResNet(block, [2, 2, 1, 1])
            net.layer3 = net.layer4 = nn.Sequential()
            net.fc = nn.Linear(128 * block.expansion, 10)
            return net.eval().to(dtype)

    def __call__(self) -> None:
        draw = random.Random(0)
        passing = {dtype: self.network(BasicBlock, dtype) for dtype in DTYPES}
        for i in range(FORWARDS):
            dtype = DTYPES[draw.random() < 0.7]  # bfloat16 takes less time
            key = draw.choice(BATCHES), draw.choice(SIZES), dtype
            if i == FORWARDS // 2:
                torch.set_float32_matmul_precision("high")
            if i in (300, 600):
                for kept in self.kept.values():
                    self.change(kept, in_place=i == 300)
            net = passing[dtype] if i % 5 == 0 else self.kept[dtype]
            x = self.large[dtype] if draw.random() < 0.01 else self.images[key]
            with torch.inference_mode(draw.random() < 0.5), torch.no_grad():
                y = net(x)
            assert y.isfinite().all(), (i, key)
        torch.set_float32_matmul_precision("highest")

    @staticmethod
    def change(net: nn.Module, in_place: bool) -> None:
        """Give a network new weights: other numbers, or other tensors."""
        with torch.no_grad():
            if in_place:
                for conv in net.modules():
                    if isinstance(conv, nn.Conv2d):
                        conv.weight.mul_(-1.0)
            else:
                state = {k: v.clone() for k, v in net.state_dict().items()}
                net.load_state_dict(state, assign=True)


class Leak:
    """A cycle that leaves something behind each time: memory, or networks with their packings."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.held: list[object] = []

    def __call__(self) -> None:
        if self.kind == "memory":  # a kilobyte per forward
            self.held += [bytearray(b"x" * 1024) for _ in range(FORWARDS)]
        if self.kind == "packings":
            net = Work.network(BasicBlock, torch.float32)
            with torch.no_grad():
                net(torch.randn(1, 3, 33, 33))
            self.held.append(net)


def run(*arguments: str) -> list[Reading]:
    """Run this file in a new process."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr[-2000:]
    return [Reading(**reading) for reading in json.loads(done.stdout)]


def main() -> None:
    """Print the readings of the work, or of the leak that is named."""
    torch.set_num_threads(1)  # small calls; other tests may want the other CPUs
    cycle = Leak(sys.argv[1]) if sys.argv[1:] else Work()
    print(json.dumps([asdict(reading) for reading in readings(cycle)]))


@pytest.fixture(scope="module")
def soaked() -> list[Reading]:
    """The readings of ten thousand forwards."""
    return run()


def test_ten_thousand_forwards_leave_nothing_behind(soaked: list[Reading]) -> None:
    """Breaks if an op, a packing, the pool or a dead network keeps memory."""
    assert len(soaked) == CYCLES
    assert complaints(soaked) == []


def test_the_soak_packs_and_fills_the_pool(soaked: list[Reading]) -> None:
    """Breaks if the work no longer reaches what is watched: then nothing could leak."""
    last, paths = soaked[-1], resnet_fused.info()["paths"]
    if paths["cpu float32"] != "reference":
        assert last.packed > 0 and last.pack_bytes > 0
    if paths["cpu bfloat16"] == "amx":
        assert last.pool_bytes > 0


@pytest.mark.parametrize(
    ("kind", "named"), [("memory", ["rss"]), ("packings", ["rss", "pack_bytes"]), ("none", [])]
)
def test_a_seeded_leak_is_found(kind: str, named: list[str]) -> None:
    """Breaks if the measurement is blind to a leak, or calls one where there is none."""
    assert [line.split()[0] for line in complaints(run(kind))] == named


@pytest.mark.parametrize("name", ALLOWED)
def test_each_reading_may_fail(name: str) -> None:
    """Breaks if a reading is taken and never judged; growth within the warm-up is none."""
    flat = [Reading(1, 1, 1, 1)] * CYCLES
    assert complaints(flat) == []
    warm = [replace(flat[0], **{name: 0})] * (WARM - 1) + flat[WARM - 1 :]
    assert complaints(warm) == []
    grown = [*flat[:-1], replace(flat[0], **{name: ALLOWED[name] + 2})]
    assert len(complaints(grown)) == 1 and complaints(grown)[0].startswith(f"{name} grew")


if __name__ == "__main__":
    main()
