# SPDX-License-Identifier: BSD-3-Clause
"""Seeded defects: kernels with one thing wrong must be caught, the kernels as they are must not."""

from __future__ import annotations

import re
from pathlib import Path

import emulated
import emulator_build as make
import pytest
from defect_cases import CASES, Wrong
from defect_cases import CONV as CONV_CASES
from defect_cases import PAIR as PAIR_CASES
from defect_cases import WGMMA as WGMMA_CASES
from defects import CONV, Defect
from defects_hopper import HOPPER
from defects_pair import PAIR
from defects_small import SMALL
from emulated import EmulatorError, Library

DEFECTS = [*CONV, *HOPPER, *PAIR, *SMALL]
SEEDS = (1, 2, 3)
# The file to compile for a case; the other types of the convolution stay as they are.
FILES = {"conv": "mma_conv_f16", "wgmma": "wgmma_conv_f16", "pair": "wgmma_pair_f16"}


def source_file(defect: Defect) -> str:
    """Stem of the source file that a defect is compiled in: its own, or the case's kernel's."""
    if defect.file.endswith(".cu"):
        return Path(defect.file).stem
    case = defect.case
    names = [FILES.get(case.split("_")[0], ""), *emulated.KERNELS]
    return next(n for n in names if n and (n in FILES.values() or case.startswith(n)))


def misses(defect: Defect) -> list[str]:
    """Pieces of source that do not occur once."""
    text = (make.KERNELS / "cuda" / defect.file).read_text()
    return [old for old, _ in ((defect.old, ""), *defect.also) if text.count(old) != 1]


def patched(text: str, defect: Defect) -> str:
    """The source with the defect in it."""
    for old, new in ((defect.old, defect.new), *defect.also):
        text = text.replace(old, new)
    return text


def only(text: str, kernel: str, tile: int) -> str:
    """KERNEL.cuh with one tile's kernel instantiated: to compile in a fraction of the time.

    The launch function's name stays that of tile 0, which KERNEL.cu calls.
    """
    head, name, rest = text.partition(f"cudaError_t launch_{kernel}_as(")
    body, end, tail = rest.partition("\n}\n")
    assert "kTile" in body, f"launch_{kernel}_as has changed"
    return head + name + body.replace("kTile", str(tile)) + end + tail


def write(path: Path, text: str) -> None:
    """Unless it is there already: what has not changed is not compiled again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def seed_defect(defect: Defect, folder: Path) -> Path:
    """A copy of the kernels' sources with the defect; returns the file to compile."""
    for path in sorted(make.KERNELS.glob("*.h")) + sorted(make.KERNELS.glob("cuda/*")):
        text = path.read_text()
        if path.name == defect.file:
            text = patched(text, defect)
        if path.name == "mma_conv.cuh" and defect.case in CONV_CASES:
            text = only(text, "mma_conv", CONV_CASES[defect.case][0])
        if path.name == "wgmma_conv.cuh" and defect.case in WGMMA_CASES:
            text = only(text, "wgmma_conv", WGMMA_CASES[defect.case][0])
        if path.name == "wgmma_pair.cuh" and defect.case in PAIR_CASES:
            text = only(text, "wgmma_pair", PAIR_CASES[defect.case][0])
        write(folder / path.relative_to(make.KERNELS), text)
    return folder / "cuda" / f"{source_file(defect)}.cu"


def verdict(library: Library, case: str, seed: int) -> str:
    """What is found wrong, or nothing."""
    try:
        CASES[case](library, seed)
    except (EmulatorError, Wrong) as found:
        return found.kind
    return ""


@pytest.fixture(scope="module")
def broken() -> dict[str, Library]:
    """The kernels with each defect, compiled together; without those that cannot be seeded."""
    sources = {}
    for defect in DEFECTS:
        if not misses(defect):
            folder = make.folder() / "defects" / re.sub(r"\W+", "_", defect.name)
            sources[defect.name] = {source_file(defect): seed_defect(defect, folder)}
    return emulated.build_variants(sources)


@pytest.mark.parametrize("case", CASES)
def test_the_kernels_as_they_are_pass(case: str) -> None:
    """A case that cries wolf, which would prove nothing about defects."""
    library = emulated.build()
    assert [verdict(library, case, seed) for seed in SEEDS] == [""] * len(SEEDS)


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda d: d.name)
def test_defect_is_caught(broken: dict[str, Library], defect: Defect) -> None:
    """A defect that no run notices, or only some schedules."""
    assert misses(defect) == [], f"write the defect anew for {defect.file} as it is now"
    for seed in SEEDS:
        kind = verdict(broken[defect.name], defect.case, seed)
        assert re.fullmatch(defect.kinds, kind), f"seed {seed}: {kind or 'nothing found'}"


def test_names_are_unique() -> None:
    """Two defects that share a folder, of which one is then not tested."""
    names = [re.sub(r"\W+", "_", d.name) for d in DEFECTS]
    assert len(set(names)) == len(names) >= 20
    assert {d.case for d in DEFECTS} == set(CASES)
