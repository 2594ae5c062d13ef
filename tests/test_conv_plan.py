# SPDX-License-Identifier: BSD-3-Clause
"""The CPU's choices of path, pieces and planes, over thousands of shapes: pure functions."""

from __future__ import annotations

import ctypes
import itertools
import random
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = r"""
#include "ops/conv_plan.h"
using namespace resnet_fused;
extern "C" {
int conv_path_of(int dtype, int bf16x3, long c, long groups, long r, long s, long sh, long sw,
                 long out_w, int outside, int tiles, int fma) {
  const int64_t stride[2] = {sh, sw};
  const auto type = static_cast<DType>(dtype);
  return static_cast<int>(conv_path(type, bf16x3, c, groups, r, s, stride, out_w, outside, tiles,
                                    fma));
}
int outside(long r, long s, long ph, long pw, long dh, long dw) {
  const int64_t padding[2] = {ph, pw}, dilation[2] = {dh, dw};
  return reaches_outside(r, s, padding, dilation);
}
long piece(long n, long bytes, long threads) { return images_per_piece(n, bytes, threads); }
long group(long images, long bytes, long weight_bytes) {
  return images_per_group(images, bytes, weight_bytes);
}
long filters(long blocks, long panels, long threads, long weight_bytes, long input_bytes) {
  return divide_filters(blocks, panels, threads, weight_bytes, input_bytes);
}
int fits(long h, long w) { return map_fits(h, w); }
int cover(long in, long out, long window, long stride, long padding, long dilation) {
  return windows_cover(in, out, window, stride, padding, dilation);
}
// Fills out[0..5] with phases, lines, width, pitch and pixels.
void planes(long H, long W, long P, long Q, long R, long S, const int64_t* g, int64_t* out) {
  const Planes p = plan_planes(H, W, P, Q, R, S, g, g + 2, g + 4);
  const int64_t all[] = {p.phases[0], p.phases[1], p.lines, p.width, p.pitch, p.pixels};
  for (int i = 0; i < 6; ++i) out[i] = all[i];
}
}
"""
F32, BF16, F16 = 0, 1, 2
TILES, FMA, ONEDNN, ONEDNN_F32 = 0, 1, 2, 3


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("c++") or shutil.which("g++")
    assert compiler is not None, "the package was built with a C++ compiler; it must still be there"
    folder = tmp_path_factory.mktemp("plan")
    (folder / "plan.cpp").write_text(SOURCE)
    library = folder / "plan.so"
    command = [compiler, "-std=c++17", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*command, str(folder / "plan.cpp"), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.conv_path_of.argtypes = [
        *[ctypes.c_int] * 2,
        *[ctypes.c_long] * 7,
        *[ctypes.c_int] * 3,
    ]
    for name, count in (
        ("piece", 3),
        ("group", 3),
        ("filters", 5),
        ("cover", 6),
        ("fits", 2),
        ("outside", 6),
    ):
        function = getattr(loaded, name)
        function.restype, function.argtypes = ctypes.c_long, [ctypes.c_long] * count
    return loaded


def test_path(plan: ctypes.CDLL) -> None:
    """Breaks if a shape goes where it is wrong or slow."""
    for c, groups, r, stride, out_w, outside, tiles, fma in itertools.product(
        (1, 3, 16, 64), (1, 4), (1, 3, 7), (1, 2), (1, 2, 50), (0, 1), (0, 1), (0, 1)
    ):
        args = (c, groups, r, r, stride, stride, out_w, outside, tiles, fma)
        own = groups == 1 and (c >= 16 or outside)
        on_tiles = tiles and own
        strict = FMA if fma and own else ONEDNN
        assert plan.conv_path_of(F32, 0, *args) == strict
        assert plan.conv_path_of(F32, 1, *args) == (TILES if on_tiles else strict)
        assert plan.conv_path_of(F16, 1, *args) == ONEDNN_F32
        path = plan.conv_path_of(BF16, 0, *args)
        if on_tiles:
            assert path == TILES
        else:
            # The AMX bug of oneDNN: never a strided window with an output one pixel wide.
            assert path == (ONEDNN_F32 if r > 1 and stride > 1 and out_w == 1 else ONEDNN)


def test_windows_in_the_padding(plan: ctypes.CDLL) -> None:
    """Breaks if a window without a pixel of the image is not seen, or one is seen that is none."""
    for size, padding, dilation in itertools.product((1, 2, 3, 7), (0, 1, 2, 3, 7), (1, 2, 3)):
        first = range(-padding, -padding + dilation * (size - 1) + 1, dilation)
        alone = all(at < 0 for at in first)
        assert plan.outside(size, 3, padding, 0, dilation, 1) == alone
        assert plan.outside(3, size, 0, padding, 1, dilation) == alone


def test_pieces_cover_all_images(plan: ctypes.CDLL) -> None:
    """Breaks if images are lost, a piece is empty, or threads are left without an image."""
    for n, size, threads in itertools.product(
        (1, 2, 3, 7, 16, 33, 256), (1, 10**5, 3 * 10**6, 10**9, 2**40), (1, 2, 3, 64)
    ):
        piece = plan.piece(n, size, threads)
        assert 1 <= piece <= n
        assert piece == n or piece >= min(n, threads)
        # A piece may exceed the caches only to give every thread one image.
        assert piece <= threads or piece * size <= 2 * threads * (3 << 20)


def test_groups_of_images(plan: ctypes.CDLL) -> None:
    """Breaks if a group is empty, larger than there are images, or does not fit L2 without need."""
    for images, size, weights in itertools.product(
        (1, 2, 8, 100), (0, 1, 10**5, 10**6, 10**9), (0, 10**5, 10**7)
    ):
        group = plan.group(images, size, weights)
        assert 1 <= group <= images
        assert group == 1 or group * size <= max(1 << 20, weights // 2)


def test_all_threads_have_work(plan: ctypes.CDLL) -> None:
    """Breaks if threads divide what is too little for them, though they could divide the other."""
    for blocks, panels, threads in itertools.product((1, 2, 7, 98), (1, 2, 8, 64), (1, 2, 3, 64)):
        for weights, inputs in ((1, 2), (2, 1)):
            filters = plan.filters(blocks, panels, threads, weights, inputs)
            by_rows = -(-blocks // threads) * panels
            by_filters = -(-panels // threads) * blocks
            took, other = (by_filters, by_rows) if filters else (by_rows, by_filters)
            assert took <= 9 / 8 * other


def test_pixels_are_counted_in_32_bits(plan: ctypes.CDLL) -> None:
    """Breaks if planes of the most padding could have more pixels than their tables can name."""
    for h, w in ((1, 1), (224, 224), (16000, 16000), (1, 2**20)):
        assert plan.fits(h, w)
    for h, w in ((2**14, 2**14), (1, 2**28), (2**62, 1), (2**40, 2**40)):
        assert not plan.fits(h, w)
    # Planes hold an image with its padding (32 on each side), and lines that taps reach beyond.
    assert (2**28) * 4 < 2**31


def test_planes_hold_every_tap_of_every_output(plan: ctypes.CDLL) -> None:
    """Breaks if a tap reads another line's pixels, or beyond its plane.

    Lines overlap by `width - pitch` pixels, which must be padding at both ends.
    """
    rng = random.Random(0)
    for _ in range(4000):
        r, s = rng.randint(1, 7), rng.randint(1, 7)
        sh, sw = rng.randint(1, 4), rng.randint(1, 4)
        dh, dw = rng.randint(1, 3), rng.randint(1, 3)
        ph, pw = rng.randint(0, 5), rng.randint(0, 5)
        h, w = rng.randint(1, 20), rng.randint(1, 20)
        p, q = (h + 2 * ph - dh * (r - 1) - 1) // sh + 1, (w + 2 * pw - dw * (s - 1) - 1) // sw + 1
        if p < 1 or q < 1:
            continue
        geometry = (ctypes.c_int64 * 6)(sh, sw, ph, pw, dh, dw)
        out = (ctypes.c_int64 * 6)()
        plan.planes(*map(ctypes.c_long, (h, w, p, q, r, s)), geometry, out)
        phases_h, phases_w, lines, width, pitch, pixels = out
        assert pitch <= width and pitch >= q
        for a in range(r):
            y, fy = a * dh // sh, a * dh % sh
            assert fy < phases_h and p - 1 + y < lines
        for b in range(s):
            x, fx = b * dw // sw, b * dw % sw
            assert fx < phases_w and q - 1 + x < width
        rows = (p - 1) * pitch + q
        last_tap = ((r - 1) * dh // sh) * pitch + (s - 1) * dw // sw
        assert max(rows, 32) - 1 + last_tap < pixels
        for f in range(phases_w):
            for i in range(width - pitch):
                first, last = i * sw + f - pw, (width - 1 - i) * sw + f - pw
                assert not 0 <= first < w and not 0 <= last < w, "a line's ends are shared: padding"


def test_windows_that_leave_nothing_out(plan: ctypes.CDLL) -> None:
    """Breaks if a row that no window reads is said to be read: it may hold the only NaN."""
    said = {True: 0, False: 0}
    for size, window, stride, padding, dilation in itertools.product(
        range(1, 9), range(1, 5), range(1, 5), range(4), range(1, 3)
    ):
        count = (size + 2 * padding - dilation * (window - 1) - 1) // stride + 1
        if count < 1:
            continue
        read = {
            p * stride + r * dilation - padding for p in range(count) for r in range(window)
        } >= set(range(size))
        got = bool(plan.cover(size, count, window, stride, padding, dilation))
        assert read or not got, (size, window, stride, padding, dilation)
        if dilation == 1 and window >= stride:
            assert got == read, (size, window, stride, padding)
        said[got] += 1
    assert min(said.values()) > 100
