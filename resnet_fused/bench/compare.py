# SPDX-License-Identifier: BSD-3-Clause
"""Measures one setting (model, dtype, batch, size) with all contenders and makes its rows."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import nn

from resnet_fused import timing
from resnet_fused.bench import subjects
from resnet_fused.bench.contenders import (
    ALL,
    COMPILE,
    EAGER,
    FUSED,
    Contender,
    Rivals,
    first_line,
)
from resnet_fused.bench.results import Row, Setting


def prepare(
    setting: Setting, model: nn.Module, compile_s: float | None
) -> tuple[list[Contender], dict[str, float], float]:
    """Build the contenders of a setting and compare their results with float64.

    Args:
        setting: what to build.
        model: the float32 model by that name; it is copied.
        compile_s: seconds torch.compile may take; None leaves it out.

    Returns:
        The contenders, their relative errors by name (infinite for wrong results; none for those
        that did not run), and the bound that the fused one must keep.
    """
    dtype = subjects.DTYPES[setting.dtype]
    model = copy.deepcopy(model).to(setting.device, dtype)
    draw = torch.Generator().manual_seed(setting.seed + 1)
    shape = (setting.batch, 3, setting.size, setting.size)
    x = torch.randn(shape, generator=draw).to(setting.device, dtype)
    field, net = Rivals.of(model, x), subjects.plain(model)
    expected = subjects.expect(net, x)
    rivals, errors = [], {}
    for name in ALL:
        if name == COMPILE and compile_s is None:
            continue
        rival = field.make(name, compile_s or 0.0)
        if rival.call is not None:
            try:
                with torch.inference_mode():
                    errors[rival.name] = expected.error(rival.call())
            except Exception as error:  # one rival's failure must not hide the others' times
                rival = Contender(rival.name, rival.layout, rival.path, None, first_line(error))
        rivals.append(rival)
    eager = max((errors[name] for name in EAGER if name in errors), default=math.inf)
    return rivals, errors, subjects.error_bound(eager, net, dtype)


def compare(
    setting: Setting,
    model: nn.Module,
    *,
    budget_s: float,
    compile_s: float | None = None,
    min_rounds: int = 3,
    max_rounds: int = 100,
    say: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Check and time one setting.

    Args:
        setting: what to measure.
        model: the float32 model by that name, as `subjects.make_model` gives it.
        budget_s: seconds for the timing; at least `min_rounds` rounds are done all the same.
        compile_s: seconds torch.compile may take; None leaves it out.
        min_rounds: as in `timing.measure`.
        max_rounds: as in `timing.measure`.
        say: told what happens now.

    Returns:
        One row per contender; a contender that could not run has a note and no times.
    """
    say(f"{setting}: preparing" + (", compiling" if compile_s else ""))
    rivals, errors, bound = prepare(setting, model, compile_s)
    say(f"{setting}: timing")
    calls = {r.name: r.call for r in rivals if r.call is not None}
    measured = timing.Measurement({}, {})
    if calls:
        with torch.inference_mode():
            measured = timing.measure(
                calls,
                device=setting.device,
                budget_s=budget_s,
                min_rounds=min_rounds,
                max_rounds=max_rounds,
                seed=setting.seed,
            )
    eager = [name for name in EAGER if name in calls]
    best = min(eager, key=lambda name: measured.summary(name).p50, default=None)
    return [
        _row(setting, model, rival, measured, best, errors.get(rival.name), bound)
        for rival in rivals
    ]


def _row(
    setting: Setting,
    model: nn.Module,
    rival: Contender,
    measured: timing.Measurement,
    best: str | None,
    error: float | None,
    bound: float,
) -> Row:
    """Collect what is known about one contender."""

    def versus(base: str | None) -> timing.Ratio | None:
        if base == rival.name or not {base, rival.name} <= measured.visits.keys():
            return None
        return measured.ratio(rival.name, str(base))

    return Row(
        setting=setting,
        contender=rival.name,
        layout=rival.layout,
        path=rival.path,
        param_count=sum(p.numel() for p in model.parameters()),
        gmacs=subjects.gmacs(setting.model, setting.size),
        note=rival.note,
        summary=measured.summary(rival.name) if rival.name in measured.visits else None,
        versus_best=versus(best),
        versus_channels_last=versus("channels_last"),
        max_err=error,
        bound=bound if rival.name == FUSED else None,
        compile_s=rival.compile_s,
    )
