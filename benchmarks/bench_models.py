# SPDX-License-Identifier: BSD-3-Clause
"""Whole models: eager, channels_last, compile and resnet_fused side by side.

Run with `pytest benchmarks/bench_models.py`; the README beside this file explains the options.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from resnet_fused.bench import contenders, subjects
from resnet_fused.bench.contenders import Rivals


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one group per model, dtype and batch, with one test per contender."""
    option = metafunc.config.getoption
    settings = [
        (model, dtype, int(batch))
        for model in option("--models").split(",")
        for dtype in option("--dtypes").split(",")
        for batch in option("--batches").split(",")
    ]
    names = [f"{model}-{dtype}-b{batch}" for model, dtype, batch in settings]
    metafunc.parametrize("rivals", settings, ids=names, indirect=True, scope="module")
    metafunc.parametrize("contender", contenders.ALL)


@pytest.fixture(scope="module")
def rivals(request: pytest.FixtureRequest) -> tuple[str, Rivals]:
    """A setting's name and what its contenders share."""
    name, dtype, batch = request.param
    option = request.config.getoption
    size, kind = int(option("--size")), subjects.DTYPES[dtype]
    model = subjects.make_model(name).to(option("--device"), kind)
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))
    field = Rivals.of(model, x.to(option("--device"), kind))
    return f"{name} {dtype} batch {batch}", field


def test_model(rivals: tuple[str, Rivals], contender: str, timed: Callable[..., None]) -> None:
    """Images per second of one model; `extra_info` holds batch, path and threads."""
    group, field = rivals
    made = field.make(contender)
    if made.call is None:
        pytest.skip(made.note)
    timed(made.call, group, batch=field.x.shape[0], path=made.path)
