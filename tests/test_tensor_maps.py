# SPDX-License-Identifier: BSD-3-Clause
"""Tensor maps for a Hopper GPU's copy unit, with a driver that only takes notes."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = r"""
#include "kernels/cuda/tensor_map.cu"
#define SEEN extern "C" __attribute__((visibility("default")))
struct Noted {
  int64_t calls, error, type, rank, interleave, swizzle, promotion, fill, channels, pixels;
  int64_t address, dims[5], strides[4], box[5], steps[5], lower[3], upper[3];
};
static Noted noted;
static std::mutex noted_mutex;
static int note(void* map, int type, uint32_t rank, void* address, const uint64_t* dims,
                const uint64_t* strides, const uint32_t* steps, int interleave, int swizzle,
                int promotion, int fill) {
  ++noted.calls;
  noted.type = type, noted.rank = rank, noted.interleave = interleave, noted.swizzle = swizzle;
  noted.promotion = promotion, noted.fill = fill;
  noted.address = reinterpret_cast<int64_t>(address);
  for (uint32_t i = 0; i < rank; ++i) {
    noted.dims[i] = static_cast<int64_t>(dims[i]);
    noted.steps[i] = steps[i];
    if (i + 1 < rank) noted.strides[i] = static_cast<int64_t>(strides[i]);
  }
  memset(map, 0xff, 128);
  memcpy(map, &address, sizeof(address));
  return static_cast<int>(noted.error);
}
extern "C" int resnet_fused_tensor_map_encode_tiled(
    void* map, int type, uint32_t rank, void* address, const uint64_t* dims,
    const uint64_t* strides, const uint32_t* box, const uint32_t* steps, int interleave,
    int swizzle, int promotion, int fill) {
  const std::lock_guard<std::mutex> lock(noted_mutex);
  for (uint32_t i = 0; i < rank; ++i) noted.box[i] = box[i];
  return note(map, type, rank, address, dims, strides, steps, interleave, swizzle, promotion, fill);
}
extern "C" int resnet_fused_tensor_map_encode_im2col(
    void* map, int type, uint32_t rank, void* address, const uint64_t* dims,
    const uint64_t* strides, const int* lower, const int* upper, uint32_t channels,
    uint32_t pixels, const uint32_t* steps, int interleave, int swizzle, int promotion, int fill) {
  const std::lock_guard<std::mutex> lock(noted_mutex);
  for (int i = 0; i < 2; ++i) noted.lower[i] = lower[i], noted.upper[i] = upper[i];
  noted.channels = channels, noted.pixels = pixels;
  return note(map, type, rank, address, dims, strides, steps, interleave, swizzle, promotion, fill);
}
SEEN Noted* notes() { return &noted; }
// v: address rank dtype tf32 sizes[4] strides[3] box[3] pixels channels lower[2] upper[2] steps[2]
// swizzle.
static resnet_fused::TensorMapShape shape(const int64_t* v) {
  resnet_fused::TensorMapShape s{};
  s.address = reinterpret_cast<const void*>(*v++);
  s.rank = static_cast<int>(*v++);
  s.dtype = static_cast<resnet_fused::DType>(*v++);
  s.tf32 = *v++ != 0;
  for (auto& x : s.sizes) x = *v++;
  for (auto& x : s.strides) x = *v++;
  for (auto& x : s.box) x = static_cast<int>(*v++);
  s.pixels = static_cast<int>(*v++), s.channels = static_cast<int>(*v++);
  for (auto& x : s.lower) x = static_cast<int>(*v++);
  for (auto& x : s.upper) x = static_cast<int>(*v++);
  for (auto& x : s.steps) x = static_cast<int>(*v++);
  s.swizzle = static_cast<int>(*v++);
  return s;
}
SEEN const char* problem(const int64_t* v) {
  const char* text = resnet_fused::tensor_map_problem(shape(v));
  return text == nullptr ? "" : text;
}
SEEN int make(const int64_t* v, resnet_fused::TensorMap* map) {
  return resnet_fused::make_tensor_map(shape(v), map);
}
SEEN void repair(resnet_fused::TensorMap* map, int64_t bytes, int version) {
  resnet_fused::repair_tensor_map(*map, bytes, version);
}
"""
NAMES = (
    *("address", "rank", "dtype", "tf32", "sizes", "strides", "box", "pixels", "channels"),
    *("lower", "upper", "steps", "swizzle"),
)
# Filters [72][9][24] in fp16.
FILTERS: dict[str, Any] = {
    **{"address": 1 << 20, "rank": 3, "dtype": 2, "tf32": 0, "sizes": (24, 9, 72, 0)},
    **{"strides": (48, 432, 0), "box": (64, 1, 128), "pixels": 0, "channels": 0},
    **{"lower": (0, 0), "upper": (0, 0), "steps": (0, 0), "swizzle": 128},
}
# Images [5][30][40][24], a window of 3 x 5 with padding 1 and 2.
IMAGES = FILTERS | {
    **{"rank": 4, "sizes": (24, 40, 30, 5), "strides": (48, 1920, 57600), "box": (0, 0, 0)},
    **{"pixels": 128, "channels": 64, "lower": (-2, -1), "upper": (-2, -1), "steps": (2, 1)},
}


class Notes(ctypes.Structure):
    """What the driver was asked."""

    _fields_ = (
        *((n, ctypes.c_int64) for n in ("calls", "error", "type", "rank", "interleave")),
        *((n, ctypes.c_int64) for n in ("swizzle", "promotion", "fill", "channels", "pixels")),
        ("address", ctypes.c_int64),
        *((n, ctypes.c_int64 * c) for n, c in (("dims", 5), ("strides", 4), ("box", 5))),
        *((n, ctypes.c_int64 * c) for n, c in (("steps", 5), ("lower", 3), ("upper", 3))),
    )


class Maps:
    """The functions, and the driver's notes."""

    def __init__(self, loaded: ctypes.CDLL) -> None:
        self.loaded = loaded
        loaded.notes.restype = ctypes.POINTER(Notes)
        loaded.problem.restype = ctypes.c_char_p
        loaded.repair.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
        self.notes = loaded.notes().contents

    def _values(self, shape: dict[str, Any]) -> Any:
        flat: list[int] = []
        for name in NAMES:
            value = shape[name]
            flat += value if isinstance(value, tuple) else (value,)
        return (ctypes.c_int64 * len(flat))(*flat)

    def problem(self, shape: dict[str, Any]) -> str:
        text: bytes = self.loaded.problem(self._values(shape))
        return text.decode()

    def make(self, shape: dict[str, Any]) -> tuple[int, bytes]:
        room = ctypes.create_string_buffer(192)
        at = ctypes.addressof(room) + -ctypes.addressof(room) % 64
        error = self.loaded.make(self._values(shape), ctypes.c_void_p(at))
        return error, ctypes.string_at(at, 128)


@pytest.fixture
def maps(tmp_path: Path) -> Maps:
    """Loaded anew: it remembers maps."""
    compiler = shutil.which("c++") or shutil.which("g++")
    assert compiler is not None, "the package was built with a C++ compiler; it must still be there"
    (tmp_path / "maps.cpp").write_text(SOURCE)
    built = tmp_path / "maps.so"
    include = ROOT / "tests/emulator/include"
    flags = ["-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", f"-I{include}"]
    command = [compiler, *flags, f"-I{ROOT / 'csrc'}", str(tmp_path / "maps.cpp"), "-lpthread"]
    subprocess.run([*command, "-o", str(built)], check=True)
    return Maps(ctypes.CDLL(str(built)))


def test_what_the_driver_is_told(maps: Maps) -> None:
    """Breaks if a field ends up in another, or corners are passed height first."""
    assert maps.make(FILTERS)[0] == 0
    n = maps.notes
    assert (n.address, n.rank, n.type) == (1 << 20, 3, 6)
    assert (n.interleave, n.swizzle, n.promotion, n.fill) == (0, 3, 3, 0)
    assert n.dims[:3] == [24, 9, 72] and n.strides[:2] == [48, 432]
    assert n.box[:3] == [64, 1, 128] and n.steps[:3] == [1, 1, 1]
    assert maps.make(IMAGES)[0] == 0
    assert n.dims[:4] == [24, 40, 30, 5] and n.strides[:3] == [48, 1920, 57600]
    assert (n.rank, n.channels, n.pixels) == (4, 64, 128) and n.steps[:4] == [1, 2, 1, 1]
    assert n.lower[:2] == [-2, -1] and n.upper[:2] == [-2, -1]
    for changed, number in (({"dtype": 1}, 9), ({"dtype": 0}, 7), ({"dtype": 0, "tf32": 1}, 11)):
        size = {"box": (16, 1, 128), "strides": (96, 864, 0)} if changed["dtype"] == 0 else {}
        assert maps.make(FILTERS | changed | size)[0] == 0 and n.type == number
    assert maps.make(FILTERS | {"swizzle": 64, "box": (32, 1, 128)})[0] == 0 and n.swizzle == 2


@pytest.mark.parametrize(
    ("base", "wrong", "message"),
    [
        (FILTERS, {"address": (1 << 20) + 8}, "address"),
        (FILTERS, {"address": 0}, "address"),
        (FILTERS, {"rank": 5}, "rank"),
        (FILTERS, {"dtype": 3}, "dtype"),
        (FILTERS, {"sizes": (24, 0, 72, 0)}, "sizes"),
        (FILTERS, {"sizes": (24, 9, (1 << 32) + 1, 0)}, "sizes"),
        (FILTERS, {"strides": (56, 504, 0)}, "multiples of 16"),
        (FILTERS, {"strides": (48, 1 << 40, 0)}, "below 2"),
        (FILTERS, {"strides": (32, 432, 0)}, "reach over"),
        (FILTERS, {"strides": (48, 416, 0)}, "reach over"),
        (FILTERS, {"box": (64, 1, 257)}, "box must be"),
        (FILTERS, {"box": (64, 0, 128)}, "box must be"),
        (FILTERS, {"box": (72, 1, 128)}, "swizzle"),
        (FILTERS, {"box": (60, 1, 128)}, "multiples of 16"),
        (FILTERS, {"swizzle": 64}, "within the swizzle"),
        (FILTERS, {"swizzle": 32, "box": (16, 1, 128)}, "64 or 128"),
        (IMAGES, {"channels": 128}, "swizzle"),
        (IMAGES, {"pixels": 1025}, "pixels"),
        (IMAGES, {"pixels": 0}, "pixels"),
        (IMAGES, {"steps": (9, 1)}, "strides of pixels"),
        (IMAGES, {"steps": (1, 0)}, "strides of pixels"),
        (IMAGES, {"lower": (-129, 0)}, "corners"),
        (IMAGES, {"upper": (0, 128)}, "corners"),
        (IMAGES, {"upper": (-2, -31)}, "empty"),
    ],
)
def test_what_the_driver_would_refuse_is_refused(
    maps: Maps, base: dict[str, Any], wrong: dict[str, Any], message: str
) -> None:
    """Breaks if a documented rule is not looked at before the driver is asked."""
    assert maps.problem(base) == ""
    assert message in maps.problem(base | wrong)
    assert maps.make(base | wrong)[0] != 0 and maps.notes.calls == 0


def test_maps_are_kept(maps: Maps) -> None:
    """Breaks if a map is made on each call, taken for another one, or kept after a failure."""
    maps.notes.error = 1
    assert maps.make(IMAGES)[0] != 0
    maps.notes.error = 0
    first = maps.make(IMAGES)[1]
    assert maps.notes.calls == 2 and maps.make(IMAGES)[1] == first and maps.notes.calls == 2
    others = (
        *({"address": 2 << 20}, {"sizes": (24, 40, 30, 6)}, {"pixels": 64}, {"steps": (1, 1)}),
        *({"lower": (-1, -1)}, {"upper": (-1, -1)}, {"dtype": 1}, {"swizzle": 64, "channels": 32}),
    )
    for i, other in enumerate(others):
        assert maps.make(IMAGES | other)[0] == 0 and maps.notes.calls == 3 + i
    for _ in range(2):
        for address in range(16, 16 * 20000, 16):  # more than are kept
            assert maps.make(IMAGES | {"address": address})[1][:8] == address.to_bytes(8, "little")


def test_maps_for_many_threads(maps: Maps) -> None:
    """Breaks if a thread gets half of one map and half of another."""
    addresses = [16 * (1 + i % 3000) for i in range(30000)]
    with ThreadPoolExecutor(8) as pool:
        got = pool.map(lambda a: maps.make(IMAGES | {"address": a})[1], addresses)
        assert all(m[:8] == a.to_bytes(8, "little") for m, a in zip(got, addresses, strict=True))


@pytest.mark.parametrize(
    ("size", "version", "repaired"),
    [
        (128 * 1024 - 1, 12000, True),
        (128 * 1024, 12000, False),
        (16, 13010, True),
        (16, 13020, False),
    ],
)
def test_small_tensors_are_repaired(maps: Maps, size: int, version: int, repaired: bool) -> None:
    """Breaks if the wrong bit is cleared, or one of a map that is right."""
    room = ctypes.create_string_buffer(b"\xff" * 191)
    at = ctypes.addressof(room) + -ctypes.addressof(room) % 64
    maps.loaded.repair(at, size, version)
    words = int.from_bytes(ctypes.string_at(at, 128), "little")
    missing = ((1 << 1024) - 1) ^ words
    assert missing == (1 << (64 + 21) if repaired else 0)
