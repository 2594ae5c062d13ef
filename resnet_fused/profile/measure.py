# SPDX-License-Identifier: BSD-3-Clause
"""Times every layer of a model, fused and eager, in turns with the models left alone."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused import dispatch, timing
from resnet_fused.bench import machine
from resnet_fused.profile import peaks as rates
from resnet_fused.profile.laps import Lapped, Laps, layer_times, timed_laps
from resnet_fused.profile.match import match
from resnet_fused.profile.peaks import Ceilings
from resnet_fused.profile.record import Part
from resnet_fused.profile.result import Layer, Profile, Row, Whole, Work
from resnet_fused.profile.subject import Subject, subject
from resnet_fused.report import report
from resnet_fused.timing import Measurement, Ratio

OURS, EAGER = "fused", "eager"
LAYERS = " by layer"


def profile(
    model: nn.Module,
    x: Tensor | tuple[Tensor, ...],
    *,
    budget_s: float = 10.0,
    min_rounds: int = 5,
    peaks: Ceilings | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Profile:
    """Time every layer of a model, fused beside eager.

    The fused model and the original, each once left alone and once with a clock that is read around
    every torch operation, take turns in one process under `inference_mode`. Nothing is changed in
    `model`.

    Args:
        model: in eval mode: of this package, fused, or not fused, of which a copy then is.
        x: its positional arguments: a tensor, or a tuple of tensors.
        budget_s: seconds for the timing.
        min_rounds: rounds made in any case.
        peaks: of this machine; None measures them, before and after the model.
        facts: more to say about the setting, by name.

    Returns:
        The layers of the fused model, with the eager ones that each replaces.

    Raises:
        TypeError: `model` is no module, or `x` no tensor or tuple of tensors.
        ValueError: `model` is in train mode, does not take `x`, or runs no operation on it.
        RuntimeError: its operations differ from call to call.
    """
    found = subject(model, x)
    with machine.selected(found.device):
        return measure(found, budget_s, min_rounds, peaks, facts or {})


def measure(
    found: Subject,
    budget_s: float,
    min_rounds: int,
    peaks: Ceilings | None,
    facts: Mapping[str, Any],
) -> Profile:
    """Time a subject on the current device; the arguments are those of `profile`."""
    known = peaks or rates.ceilings(found.device, found.dtype)
    meter = machine.LoadMeter()
    calls: dict[str, Callable[[], object]] = {}
    clocks = {}
    for who, net, parts in (
        (OURS, found.fused, found.after),
        (EAGER, found.eager, found.before),
    ):
        calls[who] = partial(net, *found.x)
        clocks[who] = Lapped(calls[who], parts.layers, len(parts.parts), found.device)
    with torch.inference_mode():
        measured = timing.measure(
            calls | {who + LAYERS: clock for who, clock in clocks.items()},
            device=found.device,
            budget_s=budget_s,
            min_rounds=min_rounds,
        )
    others = meter.others()
    laps = {who: timed_laps(c.laps(), measured, who + LAYERS) for who, c in clocks.items()}
    whole = {
        who: Whole(*(statistics.median(measured.samples(name)) for name in (who, who + LAYERS)))
        for who in clocks
    }
    if peaks is None:  # once more: whatever was in the way the first time may be gone
        with contextlib.suppress(torch.OutOfMemoryError):  # what was timed is worth more
            known = known.best(rates.ceilings(found.device, found.dtype))
    return Profile(
        rows(found, laps[OURS], laps[EAGER]),
        whole[OURS],
        whole[EAGER],
        measured.ratio(OURS, EAGER),
        known,
        found.facts | {"load_by_others": others and round(others, 3)} | dict(facts),
    )


def rows(found: Subject, ours: Laps, eager: Laps) -> tuple[Row, ...]:
    """Put each fused layer beside the eager ones that it replaces.

    Args:
        found: what was timed.
        ours: times of the fused model's layers.
        eager: times of the eager ones.
    """
    before, after = found.before.parts, found.after.parts
    paths = {row.name: row.path for row in report(found.fused) if row.fused}
    layers = [
        Layer(part.name, part.kind, "eager", part.work, _median(layer_times(eager, [i])), i)
        for i, part in enumerate(before)
    ]
    made = []
    for i, (part, group) in enumerate(zip(after, match(before, after), strict=True)):
        mine, theirs = layer_times(ours, [i]), layer_times(eager, group)
        replaced = tuple(layers[j] for j in group)
        # torch counts no operations in a fused call: they are those of what it replaces.
        work = Work(
            sum(layer.work.flop for layer in replaced), part.read, part.written, part.weights
        )
        layer = Layer(part.name, part.kind, _path(part, paths, found), work, _median(mine), i)
        made.append(Row(layer, replaced, _median(theirs), _ratio(theirs, mine)))
    return tuple(made)


def _path(part: Part, paths: Mapping[str, str], found: Subject) -> str:
    """What computes a layer of the fused model, as `report` says."""
    if part.call is None:
        return "eager"
    of_convs = dict.fromkeys(paths[name] for name in part.call.convs if name in paths)
    if of_convs and found.dtype == found.x[0].dtype:
        return "+".join(of_convs)
    return dispatch.path_on(found.x[0].device, found.dtype, part.call.op).name  # or under autocast


def _ratio(eager: Sequence[Sequence[float]], ours: Sequence[Sequence[float]]) -> Ratio | None:
    """The ratio of two layers' times; None if one of them took no time."""
    found = Measurement({OURS: ours, EAGER: eager}, {})
    if min(*found.samples(OURS), *found.samples(EAGER)) <= 0:
        return None
    return found.ratio(OURS, EAGER)


def _median(visits: Sequence[Sequence[float]]) -> float:
    return statistics.median(ms for visit in visits for ms in visit)
