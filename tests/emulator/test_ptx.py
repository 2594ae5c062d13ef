# SPDX-License-Identifier: BSD-3-Clause
"""The emulator's instructions against definitions of their own.

What ptx.cuh's functions do on a GPU is written here a second time, from the PTX manual, in numpy
and torch; ptx.cuh's host bodies, in C++, must agree. Same names and signatures as on the GPU are
checked as text.
"""

from __future__ import annotations

import functools
import re

import emulated
import numpy as np
import pytest
import torch
from emulated import EmulatorError, Library
from emulator_build import HERE, KERNELS
from torch import Tensor

SPECIAL = [0.0, -0.0, 1.0, -1.0, float("inf"), -float("inf"), 65504.0, 65519.0, 65520.0, 65536.0]
SPECIAL += [2.0**-14, 2.0**-15, 2.0**-24, 2.0**-25, 1.5 * 2.0**-24, 2.0**-26, 1e-45, 3.4e38, 1e-40]


@pytest.fixture(scope="module")
def library() -> Library:
    return emulated.build_tests()


def elementwise(library: Library, name: str, out: Tensor, *inputs: Tensor) -> Tensor:
    """A kernel that makes out[i] from inputs[i]."""
    with library.run() as dev:
        to = dev.out(out)
        pointers = [dev.put(x) for x in inputs]
        blocks = -(-out.numel() // 128)
        library.test_kernel(
            name, *pointers, to, numbers=[out.numel()], grid=(blocks, 1, 1), threads=128
        )
        return dev.get(to)


def bits(t: Tensor) -> Tensor:
    return t.view(torch.int16 if t.element_size() == 2 else torch.int32)


def floats() -> Tensor:
    """Every exponent, halfway cases of both 16-bit types, and special values."""
    g = torch.Generator().manual_seed(1)
    random = torch.randint(-(2**31), 2**31, (20000,), generator=g).int()
    half = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    near = torch.tensor(
        [0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0x18000], dtype=torch.int32
    )
    middles = bits(half[::7].contiguous())[:, None] + near
    return torch.cat([random, middles.flatten(), bits(torch.tensor(SPECIAL))]).view(torch.float32)


def test_float_from_f16(library: Library) -> None:
    """A half that becomes another number: all 65536 of them, subnormals and NaN included."""
    half = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)
    got = elementwise(library, "float_from_f16", torch.empty(65536), half)
    nan = half.isnan()
    assert torch.equal(got.isnan(), nan)
    assert torch.equal(bits(got)[~nan], bits(half.float())[~nan])


@pytest.mark.parametrize(
    ("name", "dtype"), [("f16_from_float", torch.float16), ("bf16_from_float", torch.bfloat16)]
)
def test_rounding(library: Library, name: str, dtype: torch.dtype) -> None:
    """Rounding other than to nearest even, an overflow that is not infinity, a NaN that is lost."""
    x = floats()
    got = elementwise(library, name, torch.empty(x.numel(), dtype=dtype), x)
    nan = x.isnan()
    assert torch.equal(got.isnan(), nan)
    assert torch.equal(bits(got)[~nan], bits(x.to(dtype))[~nan])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("max_nan_f32", torch.float32),
        ("max_nan_f16x2", torch.float16),
        ("max_nan_bf16x2", torch.bfloat16),
    ],
)
def test_maximum(library: Library, name: str, dtype: torch.dtype) -> None:
    """A maximum that loses a NaN, takes -0 for +0, or mixes up the two halves of a register."""
    values = torch.tensor([*SPECIAL, float("nan"), 3.25, -7.5]).to(dtype)
    x, y = (t.flatten().contiguous() for t in torch.meshgrid(values, values, indexing="ij"))
    if x.numel() % 2:
        x, y = x[:-1].contiguous(), y[:-1].contiguous()
    raw = [bits(t) if dtype == torch.float32 else t.view(torch.int32) for t in (x, y)]
    got = elementwise(library, name, torch.empty_like(raw[0]), *raw).view(dtype)
    want = torch.maximum(x, y)
    both_zero = (x == 0) & (y == 0)
    want = torch.where(both_zero & (x.signbit() & y.signbit()), -0.0, want)
    want = torch.where(both_zero & ~(x.signbit() & y.signbit()), 0.0, want)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(bits(got)[~want.isnan()], bits(want.to(dtype))[~want.isnan()])


def test_load_16_streaming(library: Library) -> None:
    """Bytes from another place; an address that is not on 16 bytes, or beyond the buffer."""
    x = torch.arange(128, dtype=torch.int32)
    with library.run() as dev:
        out = dev.out(x)
        library.test_kernel("load_16_streaming", dev.put(x), out, numbers=[0])
        assert torch.equal(dev.get(out), x)
    for offset, kind in ((4, "misaligned"), (16, "out-of-bounds")):
        with pytest.raises(EmulatorError) as caught, library.run() as dev:
            source = dev.put(x)
            library.test_kernel("load_16_streaming", source, dev.out(x), numbers=[offset])
        assert caught.value.kind == kind


def fragments(matrix: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """A matrix of 32-bit words as registers [lane][register], 8 x 4 words per register.

    Registers go down the rows first: (top left, bottom left, top right, bottom right).
    """
    out = np.empty((32, rows * columns), dtype=np.uint32)
    for lane in range(32):
        g, t = lane // 4, lane % 4
        for register in range(rows * columns):
            down, right = register % rows, register // rows
            out[lane, register] = matrix[8 * down + g, 4 * right + t]
    return out


def words(values: Tensor) -> np.ndarray:
    """Rows of a matrix as 32-bit words: two 16-bit elements or one fp32 each."""
    return (
        values.contiguous().numpy().view(np.uint32)
        if values.dtype == torch.float32
        else (values.contiguous().view(torch.int16).numpy().view(np.uint32))
    )


@pytest.mark.parametrize(
    ("name", "dtype", "depth"),
    [
        ("mma_f16", torch.float16, 16),
        ("mma_bf16", torch.bfloat16, 16),
        ("mma_tf32", torch.float32, 8),
    ],
)
@pytest.mark.parametrize("integer", [True, False])
def test_product(
    library: Library, name: str, dtype: torch.dtype, depth: int, integer: bool
) -> None:
    """An operand taken from another lane or register."""
    g = torch.Generator().manual_seed(depth)

    def draw(*size: int) -> Tensor:
        x = torch.randn(size, generator=g)
        return torch.randint(-8, 9, size, generator=g).float() if integer else x

    warps = 3
    a, b = draw(warps, 16, depth).to(dtype), draw(warps, depth, 8).to(dtype)
    if dtype == torch.float32:
        a, b = ((bits(t) & ~0x1FFF).view(torch.float32) for t in (a, b))
    d = draw(warps, 16, 8)
    lane = torch.arange(32)
    rows = torch.stack([lane // 4, lane // 4, lane // 4 + 8, lane // 4 + 8], 1)
    columns = torch.stack([lane % 4 * 2, lane % 4 * 2 + 1] * 2, 1)
    a_registers = np.stack([fragments(words(a[w]), 2, 2) for w in range(warps)])
    b_registers = np.stack([fragments(words(b[w].T), 1, 2) for w in range(warps)])
    with library.run() as dev:
        out = dev.out(torch.empty(warps, 32, 4))
        library.test_kernel(
            name,
            dev.put(d[:, rows, columns]),
            dev.put(torch.from_numpy(a_registers.view(np.int32))),
            dev.put(torch.from_numpy(b_registers.view(np.int32))),
            out,
            grid=(warps, 1, 1),
        )
        got = dev.get(out)
    want = d.double() + a.double() @ b.double()
    error = (got.double() - want[:, rows, columns]).abs()
    size = d.double().abs() + a.double().abs() @ b.double().abs()
    allowed = 0.0 if integer else (depth + 1) * 2.0**-24 * size[:, rows, columns]
    assert bool((error <= allowed).all())


@pytest.mark.parametrize(
    ("operand", "right"),
    [(0x3F802000, True), (0x3F800001, False), (0x7FFFFFFF, True), (0x7F801000, False)],
)
@pytest.mark.parametrize("second", [False, True])
def test_tf32_operands(library: Library, operand: int, right: bool, second: bool) -> None:
    """Bits that tensor cores ignore, and a product that changes if they do not: of a number that
    was not rounded, or of infinity (a NaN, read as fp32)."""
    factors = [torch.zeros(32, count, dtype=torch.int32) for count in (4, 2)]
    factors[second][5, 1] = operand
    with library.run() as dev:
        a, b = map(dev.put, factors)
        out = dev.out(torch.empty(32, 4))
        arguments = (dev.put(torch.zeros(32, 4)), a, b, out)
        if right:
            library.test_kernel("mma_tf32", *arguments)
            return
        with pytest.raises(EmulatorError) as caught:
            library.test_kernel("mma_tf32", *arguments)
    assert caught.value.kind == "operand"


@pytest.mark.parametrize("seed", range(3))
def test_load_matrix_4(library: Library, seed: int) -> None:
    """A row, a lane or a register mixed up: any 32 rows, in any order, also the same one twice."""
    rng = np.random.default_rng(seed)
    memory = rng.integers(0, 256, 2048, dtype=np.uint8)
    rows = rng.integers(0, 2048 // 16, 32).astype(np.uint32) * 16
    with library.run(seed) as dev:
        out = dev.out(torch.empty(32, 4, dtype=torch.int32))
        library.test_kernel(
            "load_matrix_4",
            dev.put(torch.from_numpy(memory.view(np.int16))),
            dev.put(torch.from_numpy(rows.view(np.int32))),
            out,
            numbers=[2048],
            shared=2048,
        )
        got = dev.get(out).numpy().view(np.uint32)
    matrices = np.stack([memory[r : r + 16].view(np.uint32) for r in rows]).reshape(4, 8, 4)
    for lane in range(32):
        assert np.array_equal(got[lane], matrices[:, lane // 4, lane % 4])


@pytest.mark.parametrize(
    ("pitch", "conflicts"),
    [(16, 0), (128, 28), (144, 0), (32, 4), (64, 12), (80, 0), (0, 0)],
    ids=lambda v: str(v),
)
def test_bank_conflicts_of_load_matrix(library: Library, pitch: int, conflicts: int) -> None:
    """A count that is not the passes beyond one per matrix: rows on the same four banks."""
    rows = torch.arange(32, dtype=torch.int32) * pitch
    with library.run() as dev:
        out = dev.out(torch.empty(32, 4, dtype=torch.int32))
        size = 32 * 144 + 16
        memory = dev.put(torch.zeros(size // 4, dtype=torch.int32))
        library.test_kernel(
            "load_matrix_4", memory, dev.put(rows), out, numbers=[size], shared=size
        )
        assert library.stats()["bank_conflicts"] == conflicts
        assert library.stats()["ldmatrix"] == 1


def test_copy_async_fills_with_zeros(library: Library) -> None:
    """Bytes behind the last one read that are not zero, or are read: they need not exist."""
    x = torch.randint(1, 127, (32 * 16 // 2,), dtype=torch.int16)
    lengths = torch.arange(32, dtype=torch.int32) % 17
    lengths[31] = 3
    for seed in range(3):
        with library.run(seed) as dev:
            out = dev.out(x)
            # The source ends with the third byte of the last copy.
            source = dev.put(x[: 31 * 8 + 2])
            library.test_kernel(
                "copy_async_16", source, dev.put(lengths), out, numbers=[0], shared=512
            )
            got = dev.get(out).view(torch.uint8).view(32, 16)
        want = x.view(torch.uint8).view(32, 16).clone()
        want[torch.arange(16) >= lengths[:, None]] = 0
        assert torch.equal(got, want)


@pytest.mark.parametrize(("length", "offset"), [(17, 0), (-1, 0), (16, 8), (16, 16)])
def test_copy_async_misused(library: Library, length: int, offset: int) -> None:
    """More bytes than the copy has, a shared address not on 16 bytes, one beyond the memory."""
    kind = {0: "instruction", 8: "misaligned", 16: "out-of-bounds"}[offset]
    x = torch.ones(32 * 8, dtype=torch.int16)
    lengths = torch.full((32,), length, dtype=torch.int32)
    with pytest.raises(EmulatorError) as caught, library.run() as dev:
        source, out = dev.put(x), dev.out(x)
        library.test_kernel(
            "copy_async_16", source, dev.put(lengths), out, numbers=[offset], shared=512
        )
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    ("read", "empty_group", "last_open", "right"),
    [
        (0, 0, 0, True),
        (1, 0, 0, True),
        (2, 0, 0, False),
        (3, 0, 0, False),
        (2, 1, 0, True),  # an empty group is one of the two that may stay
        (3, 1, 0, False),
        (0, 0, 1, True),  # three groups: the fourth copy was not committed
        (1, 0, 1, False),
        (3, 0, 1, False),
    ],
)
def test_wait_groups(
    library: Library, read: int, empty_group: int, last_open: int, right: bool
) -> None:
    """A wait that waits for a group too many or too few, or does not count an empty one."""
    x = torch.arange(16, dtype=torch.int32)
    for seed in range(5):
        with library.run(seed) as dev:
            out = dev.out(x[:4])
            launch = functools.partial(
                library.test_kernel,
                "copy_groups",
                dev.put(x),
                out,
                numbers=[read, empty_group, last_open],
                threads=1,
                shared=64,
            )
            if right:
                launch()
                assert torch.equal(dev.get(out), x[4 * read : 4 * read + 4])
                continue
            with pytest.raises(EmulatorError) as caught:
                launch()
            assert caught.value.kind == "in-flight"


def test_shared_address(library: Library) -> None:
    """Shared memory that always begins on more than 128 bytes, which hides missing alignment."""
    seen = set()
    for seed in range(20):
        with library.run(seed) as dev:
            out = dev.out(torch.empty(2, dtype=torch.int32))
            library.test_kernel("shared_address", out, threads=1, shared=64)
            begin, distance = dev.get(out).tolist()
        assert begin % 128 == 0 and distance == 48
        seen.add(begin % 256)
    assert seen == {0, 128}


@pytest.mark.parametrize("width", [32, 16, 4])
@pytest.mark.parametrize("by", [0, 1, 3, 8, 31])
def test_shuffles(library: Library, by: int, width: int) -> None:
    """A value from another lane than the manual says, in a part of the warp as well."""
    x = torch.randn(32)
    with library.run() as dev:
        out = dev.out(torch.empty(32, 4))
        library.test_kernel("shuffles", dev.put(x), out, numbers=[by, width])
        got = dev.get(out)
    for lane in range(32):
        first, at = lane // width * width, lane % width
        sources = [by % width, at ^ by, at - by, at + by]
        for column, source in enumerate(sources):
            inside = source if 0 <= source < width else at
            assert got[lane, column] == x[first + inside], (lane, column)


@pytest.mark.parametrize("votes", [0, 1, 0x80000001, 0xFFFFFFFE, 0xFFFFFFFF])
def test_votes(library: Library, votes: int) -> None:
    """A vote of another lane, or one that says all where one is missing."""
    x = torch.tensor([votes >> lane & 1 for lane in range(32)], dtype=torch.int32) * 7
    with library.run() as dev:
        out = dev.out(torch.empty(32, 3, dtype=torch.int32))
        library.test_kernel("votes", dev.put(x), out)
        got = dev.get(out).numpy().view(np.uint32)
    assert (got == [votes, int(votes != 0), int(votes == 0xFFFFFFFF)]).all()


def test_indices(library: Library) -> None:
    """A block that runs twice or not at all, or does not know which one it is."""
    grid, threads = (3, 4, 5), 48
    with library.run() as dev:
        out = dev.out(torch.empty(60 * threads, 4, dtype=torch.int32))
        library.test_kernel("indices", out, grid=grid, threads=threads)
        got = dev.get(out)
    z, y, x, t = torch.meshgrid(*map(torch.arange, (5, 4, 3, threads)), indexing="ij")
    want = torch.stack([x, y, z, t], -1).view(-1, 4).int()
    assert torch.equal(got, want)


def declarations(text: str) -> dict[str, str]:
    """Functions of namespace ptx with template head, result and parameters, spaces collapsed."""
    found = {}
    head = r"(template <[^>]*>\s*)?(?:__device__ __forceinline__|inline)"
    pattern = head + r" ([\w ]+?)\s(\w+)\(([^{]*)\) \{"
    for template, result, name, parameters in re.findall(pattern, text):
        found[name] = re.sub(r"\s+", " ", f"{template}{result} ({parameters})")
    return found


def test_host_and_gpu_declare_the_same() -> None:
    """A function that exists on one side alone, or takes its operands in another order."""
    gpu = declarations((KERNELS / "cuda" / "ptx.cuh").read_text())
    host = declarations((HERE / "include" / "emulated_ptx.h").read_text())
    assert len(gpu) >= 15 and gpu == host


def test_every_function_has_a_test() -> None:
    """A new function of ptx.cuh that kernels/instructions.cu does not run."""
    tested = (HERE / "kernels" / "instructions.cu").read_text() + "mma_f16 mma_bf16 mma_tf32"
    gpu = declarations((KERNELS / "cuda" / "ptx.cuh").read_text())
    assert [name for name in gpu if not re.search(rf"\b{name}\b", tested)] == []
