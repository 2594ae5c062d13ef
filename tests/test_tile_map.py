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
KERNELS = ("tile_pack", "tile_conv_portable", "tile_conv_amx")
FLAGS = ["-std=c++17", "-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def compiler() -> str:
    found = shutil.which("c++") or shutil.which("g++")
    assert found is not None, "the package was built with a C++ compiler; it must still be there"
    return found


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Everything but the tables."""
    folder = tmp_path_factory.mktemp("tiles")
    sources = [CSRC / "kernels/cpu" / f"{name}.cpp" for name in KERNELS]
    sources.append(ROOT / "tests/native/tile_driver.cpp")
    for source in sources:
        command = [compiler(), *FLAGS, f"-I{CSRC}", "-c", str(source)]
        subprocess.run([*command, "-o", str(folder / f"{source.stem}.o")], check=True)
    return [str(folder / f"{source.stem}.o") for source in sources]


def driver(objects: list[str], tables: Path, folder: Path) -> str:
    program = str(folder / "driver")
    command = [compiler(), *FLAGS, f"-I{CSRC}", f"-I{CSRC / 'ops'}", str(tables), *objects]
    subprocess.run([*command, "-o", program], check=True)
    return program


def run(program: str, seed: int, count: int, amx: bool) -> subprocess.CompletedProcess[str]:
    command = [program, str(seed), str(count), str(int(amx))]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_random_shapes(objects: list[str], tmp_path: Path) -> None:
    """Breaks if a pixel is lost or made twice, a tap reads a wrong one, a buffer is overrun, or
    lines are said to be complete before they are.
    """
    program = driver(objects, CSRC / "ops/tile_map.cpp", tmp_path)
    for seed in range(2):
        done = run(program, seed, 120, True)
        assert done.returncode == 0, done.stdout + done.stderr[-1500:]


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("exists = at < flat && x < w.out[1]", "exists = at < flat"),
        ("in_place ? std::max<int64_t>(at + kTileRows - rows, 0) : 0", "0"),
        ("if (used[i] != 0) continue;", "if (used[i] != 0 || i % 7 == 0) continue;"),
        ("static_cast<int32_t>(b + 1);", "static_cast<int32_t>(b);"),
    ],
    ids=["pixels beyond a line", "reads behind a tensor", "padding left out", "a line too early"],
)
def test_the_driver_finds_mistakes(
    right: str, wrong: str, objects: list[str], tmp_path: Path
) -> None:
    """The check above can fail: otherwise it proves nothing."""
    source = (CSRC / "ops/tile_map.cpp").read_text()
    assert source.count(right) == 1
    tables = tmp_path / "tile_map.cpp"
    tables.write_text(source.replace(right, wrong))
    assert run(driver(objects, tables, tmp_path), 0, 60, False).returncode not in (0, 2)
