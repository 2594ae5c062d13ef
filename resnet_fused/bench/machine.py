# SPDX-License-Identifier: BSD-3-Clause
"""Says what machine the times come from, and whether it is fit to be timed on."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch


def usable_cpus() -> int:
    """Count the CPUs this process may run on, and no more than its control group pays for."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(count or 1, int(quota) // int(period)))
    except (OSError, ValueError):  # no control group, or a quota of "max"
        return count or 1


def cpu_model() -> str:
    """Name the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown CPU"


def why_no_device(device: str) -> str:
    """Say why nothing can run on the device of that name; empty if it can."""
    try:
        kind, index = torch.device(device).type, torch.device(device).index or 0
    except RuntimeError:
        kind, index = "", 0
    if kind not in ("cpu", "cuda"):
        return f"must be cpu, cuda or cuda:N, got {device!r}"
    if kind == "cuda" and index >= torch.cuda.device_count():
        return f"{device} is not there: torch sees {torch.cuda.device_count()} CUDA devices"
    return ""


def select(device: str) -> None:
    """Make a GPU the current one, where events and streams are made, and start CUDA there, without
    which `dispatch.path_on` cannot ask it; does nothing for a CPU.
    """
    found = torch.device(device)
    if found.type == "cuda":
        torch.cuda.init()
        torch.cuda.set_device(found.index or 0)


@contextlib.contextmanager
def selected(device: str) -> Iterator[None]:
    """`select`, and the GPU that was the current one again."""
    if torch.device(device).type != "cuda":
        yield
        return
    with torch.cuda.device(torch.device(device).index or 0):
        yield


def device_name(device: str) -> str:
    """Name the processor or the GPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_model()


def device_slug(device: str) -> str:
    """Give `device_name` as a part of a file name; for a CPU with its thread count."""
    name = re.sub(r"\((r|tm)\)", "", device_name(device).lower())
    slug = re.sub(r"[^a-z0-9]+", "-", name).strip("-")
    return slug if torch.device(device).type == "cuda" else f"{slug}-{torch.get_num_threads()}t"


class LoadMeter:
    """Measure which share of the machine other processes use, from construction to `others()`."""

    def __init__(self) -> None:
        """Start measuring."""
        self._start = self._read()

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        """Give (all, busy, own) CPU seconds since boot, or None where the kernel does not tell."""
        try:
            ticks = [int(t) for t in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
            scale = 1 / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError):
            return None
        own = sum(os.times()[:4])
        return sum(ticks) * scale, (sum(ticks) - ticks[3] - ticks[4]) * scale, own

    def others(self) -> float | None:
        """Give the share, 0 to 1, of all CPUs' time that others used; None where unknown."""
        now = self._read()
        if now is None or self._start is None or now[0] <= self._start[0]:
            return None
        whole, busy, own = (b - a for a, b in zip(self._start, now, strict=True))
        return min(max((busy - own) / whole, 0.0), 1.0)


def describe(device: str) -> dict[str, object]:
    """Describe the machine and the software, for the head of a report and for its JSON."""
    return {
        "cpu": cpu_model(),
        "cpus": usable_cpus(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "amx": "amx_tile" in _cpu_flags(),
        "device": device_name(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if torch.device(device).type == "cuda" else None,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def _cpu_flags() -> set[str]:
    """Give the CPU's feature flags; empty where the kernel does not list them."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return set(found[1].split()) if found else set()


def headline(facts: Mapping[str, object]) -> str:
    """Give `describe` in one line."""
    threads = f"{facts['threads']} thread{'' if facts['threads'] == 1 else 's'}"
    cpu = f"{facts['cpu']}, {threads} on {facts['cpus']} CPUs"
    cpu += f", {facts['cpu_capability']}" + (", AMX" if facts["amx"] else "")
    gpu = f"{facts['device']}, CUDA {facts['cuda']}; " if facts["cuda"] else ""
    return f"{gpu}{cpu}; torch {facts['torch']}, Python {facts['python']}"


def complaints(watch_s: float = 0.3) -> list[str]:
    """List what would spoil times on this machine now; watches the load for `watch_s` seconds."""
    found = []
    threads, cpus = torch.get_num_threads(), usable_cpus()
    if threads > cpus:
        found.append(f"{threads} threads on {cpus} usable CPUs: pass --threads {cpus}")
    meter = LoadMeter()
    time.sleep(watch_s)
    others = meter.others()
    if others is not None and others > 0.1:
        found.append(
            f"other processes use {others:.0%} of the CPUs (load average "
            f"{os.getloadavg()[0]:.1f}): times will be too long and ratios noisy"
        )
    return found
