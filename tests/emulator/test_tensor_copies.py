# SPDX-License-Identifier: BSD-3-Clause
"""The emulator's copies of tensors, and the driver's functions that encode their maps.

What is copied is written here a second time, from the PTX manual, with loops; the rules that the
driver keeps are those of cuda.h.
"""

from __future__ import annotations

import itertools
from typing import Any

import emulated
import pytest
import torch
from emulated import EmulatorError, Library
from tensor_maps import TF32, columns, tiled
from torch import Tensor

SEEDS = range(3)


@pytest.fixture(scope="module")
def library() -> Library:
    return emulated.build_tests()


def unswizzled(box: Tensor, span: int = 128) -> Tensor:
    """Rows of `span` bytes as they are meant, of bytes as they lie from a multiple of 1024 on."""
    at = torch.arange(box.numel() * box.itemsize // 16)
    chunks = span // 16
    meant = at ^ (at // 8 % chunks)
    flat = box.view(torch.uint8).view(-1, 16)[meant].flatten()
    return flat.view(box.dtype).view(-1, span // box.itemsize)


def load(
    library: Library, encode: Any, x: Tensor, place: list[int], rows: int, **options: Any
) -> Tensor:
    """The rows of a box, from a map that `encode` makes."""
    seed, offsets = options.pop("seed", 1), options.pop("offsets", [0, 0])
    span, turns = options.pop("span", 128), options.pop("turns", 0)
    with library.run(seed) as dev:
        address = dev.put(x)
        out = dev.out(torch.empty(rows * span // x.itemsize, dtype=x.dtype))
        library.test_kernel(
            "tensor_load",
            out,
            maps=[encode(library, address, x, **options)],
            numbers=[len(place), rows * span, *place, *[0] * (4 - len(place)), *offsets, turns],
            threads=64,
            shared=1024 + rows * span + 8,
            hopper=True,
        )
        return unswizzled(dev.get(out), span)


def inside(x: Tensor, place: list[int], shape: tuple[int, ...]) -> Tensor:
    """A box of a tensor, outermost dimension first, zero where it lies outside."""
    out = torch.zeros(shape, dtype=x.dtype)
    for at in itertools.product(*map(range, shape[:-1])):
        where = [p + a for p, a in zip(place, at, strict=False)]
        if any(w < 0 or w >= n for w, n in zip(where, x.shape, strict=False)):
            continue
        line = x[tuple(where)]
        for c in range(shape[-1]):
            if 0 <= place[-1] + c < line.numel():
                out[(*at, c)] = line[place[-1] + c]
    return out


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("shape", "place", "box"),
    [
        ((40, 128), [0, 64], (32, 128)),
        ((40, 72), [20, 64], (32, 128)),  # beyond the last row and column
        ((40, 72), [-5, -8], (16, 128)),
        ((40, 8), [0, 0], (8, 64)),
        ((20, 9, 72), [3, 8, 64], (16, 1, 128)),  # a tap of filters
        ((20, 9, 8), [10, 0, 0], (16, 1, 128)),
        ((20, 9, 8), [10, -1, 0], (16, 1, 128)),
        ((40, 72), [4, 32], (16, 64)),  # rows of 64 bytes
    ],
)
def test_tiled_load(library: Library, dtype: torch.dtype, shape: Any, place: Any, box: Any) -> None:
    """Elements from elsewhere, what is outside not zero, chunks that are not exchanged."""
    x = torch.arange(1, 1 + torch.Size(shape).numel()).view(shape).to(dtype)
    span, count = box[-1], box[-1] // dtype.itemsize
    rows = torch.Size(box[:-1]).numel()
    sizes = [count, *box[-2::-1]]
    for seed in SEEDS:
        got = load(
            library,
            tiled,
            x,
            place[::-1],
            rows,
            box=sizes,
            swizzle=3 if span == 128 else 2,
            span=span,
            seed=seed,
            turns=1,
        )
        want = inside(x, place, (*box[:-1], count))
        assert torch.equal(got, want.view(rows, count))


CONVOLUTIONS = [
    # N, H, W, C, R, S, stride, padding, dilation
    (2, 7, 7, 64, 3, 3, (1, 1), (1, 1), (1, 1)),
    (2, 9, 8, 72, 3, 3, (2, 2), (1, 1), (1, 1)),
    (1, 11, 13, 8, 3, 5, (2, 3), (3, 0), (2, 1)),
    (3, 7, 7, 64, 1, 1, (2, 2), (0, 0), (1, 1)),
    (2, 5, 6, 64, 2, 2, (1, 2), (0, 1), (3, 2)),
]


@pytest.mark.parametrize(
    ("N", "H", "W", "C", "R", "S", "stride", "padding", "dilation"), CONVOLUTIONS
)
def test_columns_of_pixels(
    library: Library, N: int, H: int, W: int, C: int, R: int, S: int, stride: Any, padding: Any,
    dilation: Any,
) -> None:  # fmt: skip
    """A pixel of another window, line or image: tiles that begin anywhere and span images."""
    x = torch.randn(N, H, W, C).half()
    P = (H + 2 * padding[0] - dilation[0] * (R - 1) - 1) // stride[0] + 1
    Q = (W + 2 * padding[1] - dilation[1] * (S - 1) - 1) // stride[1] + 1
    total, pixels = N * P * Q, 32
    steps = [1, stride[1], stride[0], 1]
    lower = [-padding[1], -padding[0]]
    upper = [padding[1] - (S - 1) * dilation[1], padding[0] - (R - 1) * dilation[0]]
    cases = [
        (0, 0, 0, 0),
        (total // 2, R - 1, S - 1, 0),
        (total - 5, R // 2, 0, C - 8),
        (Q + 1, 0, S - 1, 0),
    ]
    for seed, (first, r, s, c) in enumerate(cases):
        n, rest = divmod(first, P * Q)
        p, q = divmod(rest, Q)
        got = load(
            library,
            columns,
            x,
            [c, q * stride[1] - padding[1], p * stride[0] - padding[0], n],
            pixels,
            offsets=[s * dilation[1], r * dilation[0]],
            pixels=pixels,
            steps=steps,
            lower=lower,
            upper=upper,
            seed=seed,
        )
        want = torch.zeros(pixels, 64, dtype=x.dtype)
        for i in range(min(pixels, total - first)):
            image, rest = divmod(first + i, P * Q)
            p, q = divmod(rest, Q)
            h = p * stride[0] - padding[0] + r * dilation[0]
            w = q * stride[1] - padding[1] + s * dilation[1]
            if 0 <= h < H and 0 <= w < W:
                line = x[image, h, w, c : c + 64]
                want[i, : line.numel()] = line
        assert torch.equal(got, want), (first, r, s, c)


def test_tf32_on_the_way(library: Library) -> None:
    """A value that is cut off and not rounded, a NaN or an infinity that is lost."""
    ties = torch.arange(128, dtype=torch.int32) * 0x1000 + 0x3F800000
    other = torch.randn(31 * 32).view(torch.int32)
    x = torch.cat([ties, other]).view(torch.float32)
    x[200:203] = torch.tensor([float("inf"), -float("inf"), float("nan")])
    x = x.view(-1, 32)
    got = load(library, tiled, x, [0, 0], 32, box=[32, 32], type=TF32)
    x = x[:32]
    assert torch.equal(got.isnan(), x.isnan())
    fine = x.isfinite()
    assert torch.equal(got[~fine & ~x.isnan()], x[~fine & ~x.isnan()])
    assert (got[fine].view(torch.int32) & 0x1FFF == 0).all()
    ulp = torch.ldexp(torch.ones_like(x), torch.frexp(x).exponent - 11)
    assert ((got - x).abs()[fine] <= ulp[fine] / 2).all()


@pytest.mark.parametrize(("rows", "width"), [(64, 64), (40, 72), (7, 8)])
def test_tiled_store(library: Library, rows: int, width: int) -> None:
    """An element beside the tensor that is written, or one within that is not."""
    tile = torch.randn(16, 64).half()
    at = torch.arange(128)
    swizzled = tile.view(torch.uint8).view(-1, 16)[at ^ (at // 8 % 8)].view(torch.float16)
    for seed, (row, column) in enumerate(((rows - 7, width - 8), (0, 0), (-3, -8))):
        with library.run(seed) as dev:
            out = dev.scratch(rows * width * 2)
            like = torch.empty(rows, width, dtype=torch.half)
            library.test_kernel(
                "tensor_store",
                dev.put(swizzled),
                maps=[tiled(library, out, like, (64, 16))],
                numbers=[2048, column, row],
                threads=64,
                shared=1024 + 2048,
                hopper=True,
            )
            got = dev.get(out).view(torch.float16).view(rows, width)
        want = torch.full((rows, width), -1, dtype=torch.int16).view(torch.float16)
        for i, j in itertools.product(range(16), range(64)):
            if 0 <= row + i < rows and 0 <= column + j < width:
                want[row + i, column + j] = tile[i, j]
        assert torch.equal(got.view(torch.int16), want.view(torch.int16))


# A tensor of 40 rows of 64 halves, and images of 2 x 9 x 9 x 64: what the driver refuses.
TILED_WRONG = {
    "a map off 64 bytes": {"misplaced": 32},
    "a type that nothing has": {"type": 13},
    "a tensor off 16 bytes": {"address": 4104},
    "no element": {"dims": [64, 0]},
    "too many elements": {"dims": [64, 2**32 + 1]},
    "a stride off 16 bytes": {"strides": [136]},
    "a stride that is too large": {"strides": [2**40]},
    "rows within each other": {"strides": [112]},
    "an empty box": {"box": [64, 0]},
    "a box that is too large": {"box": [64, 257]},
    "a box off 16 bytes": {"box": [60, 8]},
    "a box beyond the swizzle": {"box": [72, 8]},
    "no step": {"steps": [1, 0]},
    "a step that is too large": {"steps": [1, 9]},
    "an interleave that nothing has": {"interleave": 3},
    "a swizzle that nothing has": {"swizzle": 7},
    "a promotion that nothing has": {"l2_promotion": 4},
    "a fill that nothing has": {"fill": 2},
}
COLUMNS_WRONG = {
    "a corner too low": {"lower": [-129, 0]},
    "a corner too high": {"upper": [0, 128]},
    "an empty bounding box": {"lower": [5, 0], "upper": [-4, 0]},
    "no pixels": {"pixels": 0},
    "too many pixels": {"pixels": 1025},
    "no channels": {"channels": 0},
    "too many channels": {"channels": 264, "swizzle": 0},
    "channels beyond the swizzle": {"channels": 72},
    "a step that is too large": {"steps": [1, 9, 1, 1]},
    "a rank that is too small": {"dims": [64, 9], "strides": [128]},
}


@pytest.mark.parametrize("why", TILED_WRONG)
def test_the_driver_refuses_a_box(library: Library, why: str) -> None:
    """A rule of cuTensorMapEncodeTiled that the emulator does not keep."""
    x = torch.empty(40, 64).half()
    assert tiled(library, 4096, x, (64, 256), steps=[1, 8]) is not None
    assert tiled(library, 4096, x, (64, 8), dims=[64, 2**32]) is not None
    wrong: dict[str, Any] = {"address": 4096, "box": [64, 8], **TILED_WRONG[why]}
    assert tiled(library, like=x, **wrong) is None


@pytest.mark.parametrize("why", COLUMNS_WRONG)
def test_the_driver_refuses_columns(library: Library, why: str) -> None:
    """A rule of cuTensorMapEncodeIm2col that the emulator does not keep."""
    x = torch.empty(2, 9, 9, 64).half()
    most = {"lower": [-128, 4], "upper": [127, -4], "pixels": 1024, "steps": [1, 8, 8, 1]}
    assert columns(library, 4096, x, **most) is not None
    assert columns(library, 4096, x, **COLUMNS_WRONG[why]) is None


def test_an_offset_beyond_a_byte(library: Library) -> None:
    """A filter that is wider than an instruction can say."""
    x = torch.randn(1, 9, 9, 64).half()
    with pytest.raises(EmulatorError, match="an offset of 256 pixels"):
        load(library, columns, x, [0, 0, 0, 0], 64, offsets=[256, 0])


@pytest.mark.parametrize("beyond", [False, True])
def test_a_tensor_beyond_its_buffer(library: Library, beyond: bool) -> None:
    """A map of more rows than there are: what is copied is checked, not what the map says."""
    x = torch.randn(8, 64).half()
    if not beyond:
        load(library, tiled, x, [0, 0], 8, box=[64, 8], dims=[64, 9])
        return
    with pytest.raises(EmulatorError) as caught:
        load(library, tiled, x, [0, 1], 8, box=[64, 8], dims=[64, 9])
    assert caught.value.kind == "out-of-bounds"
