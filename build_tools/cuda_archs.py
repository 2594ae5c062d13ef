# SPDX-License-Identifier: BSD-3-Clause
"""Which GPU architectures are compiled: reads TORCH_CUDA_ARCH_LIST and writes nvcc's flags."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

DEFAULT = "8.0;9.0a;10.0;12.0+PTX"
OLDEST = 80  # the kernels use instructions of compute capability 8.0

FAMILIES = {  # the names PyTorch accepts
    "Pascal": "6.0;6.1+PTX",
    "Volta": "7.0+PTX",
    "Volta+Tegra": "7.2",
    "Turing": "7.5+PTX",
    "Ampere": "8.0;8.6+PTX",
    "Ampere+Tegra": "8.7",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
    "Blackwell+Tegra": "11.0",
}


class Arch(NamedTuple):
    """Machine code for one architecture and, with ``ptx``, PTX that newer GPUs can translate."""

    number: int  # 90 for 9.0
    suffix: str  # "a" or "f" for architecture- or family-specific instructions, else ""
    ptx: bool

    def __str__(self) -> str:
        number = f"{self.number // 10}.{self.number % 10}"
        return f"{number}{self.suffix}{'+PTX' if self.ptx else ''}"


def parse(text: str) -> list[Arch]:
    """Read a list such as ``8.0;9.0a 12.0+PTX`` or ``Ampere, Hopper``.

    Raises:
        ValueError: an entry is neither ``x.y``, ``x.ya`` or ``x.yf``, with or without ``+PTX``,
            nor a family.
    """
    found: dict[tuple[int, str], bool] = {}
    for entry in re.split(r"[;,\s]+", text.strip(" ;,\t\n")):
        for part in FAMILIES.get(entry, entry).split(";"):
            match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", part)
            if match is None:
                raise ValueError(
                    f"TORCH_CUDA_ARCH_LIST: {entry!r} is not an architecture; write x.y, x.ya or "
                    "x.yf, each with or without +PTX, or a family "
                    f"({', '.join(FAMILIES)}), for example '{DEFAULT}'"
                )
            key = int(match[1]) * 10 + int(match[2]), match[3]
            found[key] = found.get(key, False) or match[4] is not None
    return [Arch(number, suffix, ptx) for (number, suffix), ptx in found.items()]


def select(requested: str | None, supported: Iterable[int]) -> list[Arch]:
    """The architectures to compile.

    Args:
        requested: the value of TORCH_CUDA_ARCH_LIST; empty or None for the default list.
        supported: what nvcc can compile, 80 for 8.0.

    Returns:
        The requested list without what is older than 8.0, or the default list without what nvcc
        lacks.

    Raises:
        ValueError: a requested architecture is malformed or unknown to nvcc, or nothing is left.
    """
    known = set(supported)
    if not requested or not requested.strip(" ;,\t\n"):
        archs = [arch for arch in parse(DEFAULT) if arch.number in known]
        if not archs:
            raise ValueError(f"nvcc compiles for none of {DEFAULT}; install a newer CUDA toolkit")
        return archs
    archs = [arch for arch in parse(requested) if arch.number >= OLDEST]
    if not archs:
        raise ValueError(
            f"TORCH_CUDA_ARCH_LIST={requested!r} holds nothing from 8.0 on, which the kernels "
            f"need; add an architecture or unset it for the default {DEFAULT}"
        )
    for arch in archs:
        if arch.number not in known:
            can = ", ".join(
                str(Arch(number, "", False)) for number in sorted(known) if number >= OLDEST
            )
            raise ValueError(
                f"TORCH_CUDA_ARCH_LIST asks for {arch}, which this nvcc cannot compile (it can: "
                f"{can}); remove it from the list or install another CUDA toolkit"
            )
    return archs


def nvcc_flags(archs: Iterable[Arch]) -> list[str]:
    """nvcc's ``-gencode`` flags."""
    flags = []
    for arch in archs:
        name = f"{arch.number}{arch.suffix}"
        flags.append(f"-gencode=arch=compute_{name},code=sm_{name}")
        if arch.ptx:
            flags.append(f"-gencode=arch=compute_{name},code=compute_{name}")
    return flags
