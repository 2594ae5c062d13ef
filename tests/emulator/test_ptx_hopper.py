# SPDX-License-Identifier: BSD-3-Clause
"""The emulator's instructions of Hopper against definitions of their own.

What ptx_hopper.cuh's functions do on a GPU is written here a second time, from the PTX manual, with
torch; the copies of tensors are in test_tensor_copies.py.
"""

from __future__ import annotations

import re
from typing import Any

import emulated
import pytest
import torch
from emulated import EmulatorError, Library
from emulator_build import HERE, KERNELS
from tensor_maps import tiled
from test_ptx import declarations


@pytest.fixture(scope="module")
def library() -> Library:
    return emulated.build_tests()


@pytest.mark.parametrize(
    ("kernel", "dtype", "columns"),
    [
        ("wgmma_f16_32", torch.float16, 32),
        ("wgmma_f16_96", torch.float16, 96),
        ("wgmma_f16_256", torch.float16, 256),
        ("wgmma_bf16_64", torch.bfloat16, 64),
        ("wgmma_tf32_64", torch.float32, 64),
        ("wgmma_tf32_128", torch.float32, 128),
    ],
)
def test_wgmma(library: Library, kernel: str, dtype: torch.dtype, columns: int) -> None:
    """A sum in another register, a step from another place, sums that are not added to."""
    g = torch.Generator().manual_seed(columns)
    each = 128 // dtype.itemsize
    a, b = (torch.randint(-8, 9, (n, each), generator=g).to(dtype) for n in (64, columns))
    before = torch.randint(-99, 100, (64, columns), generator=g).float()
    at = torch.arange((64 + columns) * 8)
    rows = torch.cat([a, b]).view(torch.uint8).view(-1, 16)[at ^ (at // 8 % 8)]
    # Thread, register -> row, column.
    t, i = torch.meshgrid(torch.arange(128), torch.arange(columns // 2), indexing="ij")
    row = 16 * (t // 32) + t % 32 // 4 + 8 * (i // 2 % 2)
    column = 8 * (i // 4) + 2 * (t % 4) + i % 2
    for seed, (steps, add) in enumerate(((4, 0), (1, 1), (3, 1))):
        with library.run(seed) as dev:
            out = dev.out(torch.empty(128, columns // 2))
            library.test_kernel(
                kernel,
                dev.put(rows.contiguous()),
                dev.put(before[row, column]),
                out,
                numbers=[steps, add],
                threads=128,
                shared=1024 + (64 + columns) * 128,
                hopper=True,
            )
            got = dev.get(out)
            assert library.stats()["wgmma"] == steps
        depth = steps * 32 // dtype.itemsize
        want = a[:, :depth].float() @ b[:, :depth].float().T + add * before
        assert torch.equal(got, want[row, column])


@pytest.mark.parametrize(
    ("tiles", "steps", "blocks"), [((1, 1), 1, 1), ((3, 2), 5, 2), ((4, 1), 2, 1)]
)
def test_a_pipeline(library: Library, tiles: Any, steps: int, blocks: int) -> None:
    """A correct kernel that is found fault with, or a schedule that makes it wrong."""
    g = torch.Generator().manual_seed(steps)
    rows, width, depth = 64 * tiles[0] - 10, 64 * tiles[1] - 24, 64 * steps - 8
    a, b = (torch.randint(-4, 5, (n, depth), generator=g).half() for n in (rows, width))
    want = (a.float() @ b.float().T).half()
    for seed in range(8):
        with library.run(seed) as dev:
            like = torch.empty(rows, width).half()
            places = [(dev.put(a), a), (dev.put(b), b), (dev.out(like), like)]
            library.test_kernel(
                "pipeline",
                maps=[tiled(library, place, t, (64, 64)) for place, t in places],
                numbers=[*tiles, steps],
                grid=(blocks, 1, 1),
                threads=384,
                shared=1024 + 6 * 8192 + 48,
                hopper=True,
            )
            assert torch.equal(dev.get(places[2][0]), want)
            stats = library.stats()
        products = tiles[0] * tiles[1] * steps
        assert stats["wgmma"] == 4 * products and stats["tensor_loads"] == 2 * products
        assert stats["tensor_stores"] == tiles[0] * tiles[1]


@pytest.mark.parametrize("arrivals", [1, 3])
def test_phases(library: Library, arrivals: int) -> None:
    """A phase that ends early or late; a try that never fails, or always."""
    with library.run() as dev:
        out = dev.out(torch.empty(12, dtype=torch.int32))
        library.test_kernel("phases", out, numbers=[12, arrivals], threads=1, shared=8, hopper=True)
        over = dev.get(out)
    assert ((over > 32) & (over < 64)).all(), over


def test_named_barriers(library: Library) -> None:
    """A barrier that lets threads go too early, or holds those of another."""
    x = torch.arange(128, dtype=torch.int32)
    for seed in range(10):
        with library.run(seed) as dev:
            out = dev.out(x)
            library.test_kernel(
                "named_barriers", dev.put(x), out, threads=128, shared=512, hopper=True
            )
            got = dev.get(out)
        assert torch.equal(got, x.view(2, 64).flip(1).flatten().flip(0) + 1)


def test_elect(library: Library) -> None:
    """More than one lane of a warp, none, always the first, or another one each time."""
    seen = set()
    for seed in range(10):
        with library.run(seed) as dev:
            out = dev.out(torch.empty(64, 2, dtype=torch.int32))
            library.test_kernel("elected", out, threads=64, hopper=True)
            got = dev.get(out)
        assert torch.equal(got[:, 0], got[:, 1])
        assert got[:32, 0].sum() == got[32:, 0].sum() == 1
        seen.add(int(got[:32, 0].argmax()))
    assert len(seen) > 2


@pytest.mark.parametrize("dependent", [False, True])
def test_grids(library: Library, dependent: bool) -> None:
    """A wait for the grid before that one thread does for all, with a barrier."""
    x = torch.randn(64)
    with library.run() as dev:
        out = dev.out(x)
        library.test_kernel("grids", dev.put(x), out, threads=64, hopper=True, dependent=dependent)
        assert torch.equal(dev.get(out), x)


def test_a_fence_behind_the_grid_before(library: Library) -> None:
    """One thread's wait and fence do for copies that any thread of the block issues behind it."""
    x = torch.randn(8, 64).half()
    for seed in range(5):
        with library.run(seed) as dev:
            out = dev.out(x)
            maps = [tiled(library, dev.put(x), x, (64, 8))]
            numbers = [2, 1024, 0, 0, 0, 0, 0, 0, 0]
            options: dict[str, Any] = {"threads": 64, "shared": 3072, "hopper": True}
            library.test_kernel(
                "tensor_load", out, maps=maps, numbers=numbers, dependent=True, **options
            )
            got = dev.get(out)
        # Row r has its 16-byte chunks at j ^ r.
        for r in range(8):
            chunks = [got[r, 8 * (j ^ r) : 8 * (j ^ r) + 8] for j in range(8)]
            assert torch.equal(torch.cat(chunks), x[r])


@pytest.mark.parametrize(
    ("place", "last_open", "right"),
    [(0, 0, True), (1, 0, True), (2, 0, False), (1, 1, False), (0, 1, True)],
)
def test_groups_of_stores(library: Library, place: int, last_open: int, right: bool) -> None:
    """A wait that waits for a group too many or too few."""
    x = torch.randn(24, 64).half()
    for seed in range(5):
        with library.run(seed) as dev:
            out = dev.scratch(24 * 64 * 2)
            arguments: dict[str, Any] = {
                "maps": [tiled(library, out, x, (64, 8))],
                "numbers": [place, last_open],
                "threads": 32,
                "shared": 1024 + 3072,
                "hopper": True,
            }
            if right:
                library.test_kernel("store_groups", dev.put(x), **arguments)
                continue
            with pytest.raises(EmulatorError) as caught:
                library.test_kernel("store_groups", dev.put(x), **arguments)
            assert caught.value.kind == "in-flight"


def test_shared_memory_of_a_block(library: Library) -> None:
    """A block that gets less than a Hopper GPU has, or more; another GPU's block with so much."""
    most = 227 * 1024
    for shared, hopper, right in (
        (most, True, True),
        (most + 1, True, False),
        (most, False, False),
    ):
        with library.run() as dev:
            out = dev.out(torch.empty(64, 2, dtype=torch.int32))
            arguments: dict[str, Any] = {"threads": 64, "shared": shared, "hopper": hopper}
            if right:
                library.test_kernel("elected", out, **arguments)
                continue
            with pytest.raises(EmulatorError) as caught:
                library.test_kernel("elected", out, **arguments)
            assert caught.value.kind == "launch"


def test_host_and_gpu_declare_the_same() -> None:
    """A function that exists on one side alone, or takes its operands in another order."""
    gpu = declarations((KERNELS / "cuda" / "ptx_hopper.cuh").read_text())
    host = declarations((HERE / "include" / "emulated_ptx_hopper.h").read_text())
    assert len(gpu) >= 25 and gpu == host


def test_every_function_has_a_test() -> None:
    """A new function of ptx_hopper.cuh that kernels/instructions_hopper.cu does not run."""
    tested = (HERE / "kernels" / "instructions_hopper.cu").read_text()
    gpu = declarations((KERNELS / "cuda" / "ptx_hopper.cuh").read_text())
    assert [name for name in gpu if name != "hold" and f"ptx::{name}" not in tested] == []
    assert not re.search(r"\basm\b", tested)
