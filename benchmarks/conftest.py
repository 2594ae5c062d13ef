# SPDX-License-Identifier: BSD-3-Clause
"""Command-line options of the benchmark suites and what both need to run a contender."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from resnet_fused.bench import machine

OPTIONS = {
    "--dtypes": ("fp32,bf16", "dtypes, of fp32, bf16, fp16, fp64"),
    "--batches": ("1,16", "batch sizes"),
    "--models": ("resnet18,resnet34,resnet50,resnet101,resnet152", "models of bench_models.py"),
    "--size": ("224", "height and width of the images"),
    "--device": ("cpu", "cpu, cuda or cuda:N"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add OPTIONS; lists are separated by commas."""
    group = parser.getgroup("resnet_fused benchmarks")
    for name, (default, text) in OPTIONS.items():
        group.addoption(name, default=default, help=f"{text} (default: {default})")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """What is timed has the machine for itself."""
    return 0


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Grade the machine before anything is timed."""
    machine.select(config.getoption("--device"))
    facts = machine.describe(config.getoption("--device"))
    return [machine.headline(facts), *(f"warning: {text}" for text in machine.complaints())]


@pytest.fixture
def timed(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Time a function under inference_mode; on CUDA until the device is done."""
    cuda = torch.device(request.config.getoption("--device")).type == "cuda"

    def run(call: Callable[[], object], group: str, **facts: object) -> None:
        def call_and_wait() -> None:
            call()
            if cuda:
                torch.cuda.synchronize()

        benchmark.group = group
        benchmark.extra_info.update(facts, threads=torch.get_num_threads())
        with torch.inference_mode():
            for _ in range(3):
                call_and_wait()
            benchmark(call_and_wait)

    return run
