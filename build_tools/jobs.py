# SPDX-License-Identifier: BSD-3-Clause
"""How many compilers run at once: limited by cores, MAX_JOBS and free memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

GIB = 1 << 30
CXX_BYTES = GIB // 2  # memory of one C++ compiler
NVCC_BYTES = GIB  # memory of one nvcc


def job_count(cores: int, free_bytes: int | None, bytes_per_job: int, max_jobs: str | None) -> int:
    """The number of parallel jobs, at least one.

    Args:
        cores: usable cores.
        free_bytes: free memory; None if unknown.
        bytes_per_job: what one job may need.
        max_jobs: the value of MAX_JOBS; empty or None for no limit.

    Raises:
        ValueError: MAX_JOBS is not a positive whole number.
    """
    limits = [cores]
    if free_bytes is not None:
        limits.append(free_bytes // bytes_per_job)
    if max_jobs:
        if not max_jobs.isdecimal() or int(max_jobs) == 0:
            raise ValueError(f"MAX_JOBS must be a positive whole number, got {max_jobs!r}")
        limits.append(int(max_jobs))
    return max(1, min(limits))


def _numbers(file: Path) -> dict[str, int]:
    """The ``name value`` lines of a file; a file of one number gives it under ``""``."""
    if not file.is_file():
        return {}
    found = {}
    for line in file.read_text().splitlines():
        name, _, value = line.removesuffix(" kB").rpartition(" ")
        if value.isdecimal():
            found[name.rstrip(": ")] = int(value)
    return found


def free_memory(root: Path = Path("/")) -> int | None:
    """Free bytes of this machine or, if less, of this container; None if the system does not say.

    Args:
        root: where ``proc`` and ``sys`` are; tests pass a made-up one.
    """
    free = []
    meminfo = _numbers(root / "proc/meminfo")
    if "MemAvailable" in meminfo:
        free.append(meminfo["MemAvailable"] * 1024)
    for folder, limit, used in (
        (root / "sys/fs/cgroup", "memory.max", "memory.current"),
        (root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        limits, uses = _numbers(folder / limit), _numbers(folder / used)
        if limits and uses:  # no limit is the word "max", not a number
            # Cached files count as used but give way at once.
            cached = _numbers(folder / "memory.stat").get("inactive_file", 0)
            free.append(max(0, limits[""] - uses[""] + cached))
    return min(free, default=None)


def usable_jobs(environ: Mapping[str, str], with_nvcc: bool) -> int:
    """`job_count` for this machine."""
    return job_count(
        len(os.sched_getaffinity(0)),
        free_memory(),
        NVCC_BYTES if with_nvcc else CXX_BYTES,
        environ.get("MAX_JOBS"),
    )
