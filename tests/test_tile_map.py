# SPDX-License-Identifier: BSD-3-Clause
"""Tables and kernels of the tile convolution on random shapes, under the address and undefined
behaviour sanitizers, in buffers of exactly the size they ask for.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from source_tree import ROOT

CSRC = ROOT / "csrc"
CPU = CSRC / "kernels/cpu"
TABLES = CSRC / "ops/tile_map.cpp"
KERNELS = (
    "tile_pack",
    "tile_conv_portable",
    "tile_conv_amx",
    "fma_conv_portable",
    "fma_conv_avx512",
)
FLAGS = ["-std=c++17", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def compiler() -> str:
    found = shutil.which("c++") or shutil.which("g++")
    assert found is not None, "the package was built with a C++ compiler; it must still be there"
    return found


def build(source: Path, folder: Path) -> Path:
    """An object. Headers beside the source come before those of the package."""
    made = folder / f"{source.stem}.o"
    # The kernels take longest to compile, and the driver, which sums everything again, to run.
    flags = [*FLAGS, "-O1" if source.stem == "tile_driver" else "-O0"]
    flags += [f"-I{path}" for path in (CSRC, CSRC / "ops", CPU)]
    subprocess.run([compiler(), *flags, "-c", str(source), "-o", str(made)], check=True)
    return made


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("tiles")
    sources = [CPU / f"{name}.cpp" for name in KERNELS]
    sources += [TABLES, ROOT / "tests/native/tile_driver.cpp"]
    return [build(source, folder) for source in sources]


def driver(objects: list[Path], folder: Path) -> str:
    program = str(folder / "driver")
    subprocess.run([compiler(), *FLAGS, *map(str, objects), "-o", program], check=True)
    return program


def run(program: str, seed: int, count: int, any_kernel: bool) -> subprocess.CompletedProcess[str]:
    command = [program, str(seed), str(count), str(int(any_kernel))]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_random_shapes(objects: list[Path], tmp_path: Path) -> None:
    """Breaks if a pixel is lost or made twice, a tap reads a wrong one, a buffer is overrun, or
    lines are said to be complete before they are.
    """
    program = driver(objects, tmp_path)
    for seed in range(2):
        done = run(program, seed, 100, True)
        assert done.returncode == 0, done.stdout + done.stderr[-1500:]


@pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [
        (TABLES, "exists = at < flat && x < w.out[1]", "exists = at < flat"),
        (TABLES, "in_place ? std::max<int64_t>(at + kTileRows - rows, 0) : 0", "0"),
        (TABLES, "if (used[i] != 0) continue;", "if (used[i] != 0 || i % 7 == 0) continue;"),
        (TABLES, "static_cast<int32_t>(b + 1);", "static_cast<int32_t>(b);"),
        (CPU / "fma_conv_body.h", "v < Vector{} ? Vector{} : v", "v > Vector{} ? v : Vector{}"),
        (CPU / "fma_conv_body.h", "if (p.whole) std::memset", "if (!p.whole) std::memset"),
        (CPU / "fma_conv_body.h", "if (first == 0) {", "if (true) {"),
        (CPU / "fma_conv_body.h", "w += p.depth * kTileN;", "w += kTileK * kTileN;"),
    ],
    ids=[
        "pixels beyond a line",
        "reads behind a tensor",
        "padding left out",
        "a line too early",
        "NaN lost",
        "zeros on the wrong side",
        "partial sums lost",
        "weights of full depth",
    ],
)
def test_the_driver_finds_mistakes(
    file: Path, right: str, wrong: str, objects: list[Path], tmp_path: Path
) -> None:
    """The check above can fail: otherwise it proves nothing."""
    text = file.read_text()
    assert text.count(right) == 1
    (tmp_path / file.name).write_text(text.replace(right, wrong))
    source = tmp_path / ("fma_conv_portable.cpp" if file.suffix == ".h" else file.name)
    if not source.exists():
        shutil.copy(CPU / source.name, source)
    changed = build(source, tmp_path)
    others = [made for made in objects if made.name != changed.name]
    assert run(driver([*others, changed], tmp_path), 0, 60, False).returncode not in (0, 2)
