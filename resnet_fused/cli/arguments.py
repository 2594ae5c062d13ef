# SPDX-License-Identifier: BSD-3-Clause
"""What several commands read from their arguments, and how they open what they write."""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from pathlib import Path
from typing import Any

import torch

LARGEST = 2**31 - 1


def positive(text: str) -> int:
    """Read an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    if int(text) > LARGEST:
        raise argparse.ArgumentTypeError(f"must be at most {LARGEST}, got {text}")
    return int(text)


def seed(text: str) -> int:
    """Read what a random generator begins with."""
    if not text.isdecimal() or int(text) > LARGEST:
        raise argparse.ArgumentTypeError(f"must be an integer from 0 to {LARGEST}, got {text!r}")
    return int(text)


def count(text: str) -> int:
    """Read an integer of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be an integer of at least 0, got {text!r}")
    return int(text)


def share(text: str) -> float:
    """Read `5%` or `5` as 0.05."""
    value = finite(text.removesuffix("%"))
    if value is None or value < 0:
        raise argparse.ArgumentTypeError(f"must be a percentage such as 5%, got {text!r}")
    return value / 100


def three_numbers(text: str) -> tuple[float, ...]:
    """Read `0.5,0.5,0.5`."""
    values = [value for part in text.split(",") if (value := finite(part)) is not None]
    if len(values) != 3 or text.count(",") != 2:
        raise argparse.ArgumentTypeError(f"must be three numbers such as 0.5,0.5,0.5, got {text!r}")
    return tuple(values)


def finite(text: str) -> float | None:
    """Read a finite number; None if it is none."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def lacks_memory(problem: BaseException) -> bool:
    """Whether torch found too little memory, on a GPU or in the machine."""
    return isinstance(problem, torch.OutOfMemoryError) or "can't allocate memory" in str(problem)


def reason(problem: BaseException) -> str:
    """What went wrong, and what helps where memory was short."""
    return f"{problem}; give a smaller --batch-size" if lacks_memory(problem) else str(problem)


def why_unwritable(
    places: dict[str, str | Path | None],
    stdout: tuple[str, ...] = (),
    folders: tuple[str, ...] = (),
) -> str:
    """Say which file cannot be written, before any time is spent; empty if all can.

    Args:
        places: file by option; `-` is stdout, None is not asked for.
        stdout: the options of which one may be `-`.
        folders: the options that take a folder, too.
    """
    given = {option: str(place) for option, place in places.items() if place}
    asked = [option for option in given if given[option] == "-"]
    if wrong := [option for option in asked if option not in stdout]:
        return f"{wrong[0]} -: cannot be stdout; give a file"
    if len(asked) > 1:
        return f"{' - and '.join(asked)} - cannot share stdout: give one of them a file"
    taken: dict[Path, str] = {}
    for option, place in given.items():
        path = Path(place).absolute()
        if option in asked or (path.is_dir() and option in folders):
            continue
        if path.is_dir():
            return f"{option} {place}: is a folder, not a file"
        if not path.parent.is_dir():
            return f"{option} {place}: the folder does not exist"
        if taken.setdefault(path, option) != option:
            return f"{option} {place}: is the file of {taken[path]}, too; give another"
    return ""


def open_output(place: str) -> Any:
    """Open a file for writing; `-` is stdout, which stays open."""
    if place == "-":
        return contextlib.nullcontext(sys.stdout)
    return Path(place).open("w", encoding="utf-8", newline="")
