# SPDX-License-Identifier: BSD-3-Clause
"""A trace for Perfetto, and NVTX ranges for Nsight Systems, with ranges named like modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.cuda import nvtx
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as torch_profile

from resnet_fused.profile.spans import Call, Spans, sharing
from resnet_fused.profile.subject import arguments, pair

WARM = 2  # forwards before the one that is traced
ENDINGS = (".json", ".json.gz")


class Ranges:
    """Opens a range for every module and every fused call, and closes it behind them.

    Args:
        name: the range around a model.
        to_nvtx: open NVTX ranges, too, which Nsight Systems shows.
    """

    def __init__(self, name: str, to_nvtx: bool) -> None:
        self._root, self._nvtx = name, to_nvtx
        self._open: list[tuple[str, Any]] = []

    def enter(self, name: str, leaf: bool) -> None:
        """Open the range of a module; the model itself has the name given above."""
        name = name or self._root
        if self._nvtx:
            nvtx.range_push(name)
        range_ = record_function(name)
        range_.__enter__()
        self._open.append((name, range_))

    def enter_call(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Open the range of a fused call: that of a whole block is named like its op."""
        around = self._open[-1][0] if self._open else ""
        self.enter(call.op if call.name == around else call.name, True)

    def leave(self) -> None:
        """Close the last range."""
        self._open.pop()[1].__exit__(None, None, None)
        if self._nvtx:
            nvtx.range_pop()


def trace(model: nn.Module, x: Any, place: Path) -> None:
    """Write a Chrome trace of one eager and one fused forward, for https://ui.perfetto.dev.

    The models' code is not touched: copies that share the parameters are traced. On a GPU the same
    ranges go to NVTX, so that `nsys profile` shows them.

    Args:
        model: as for `profile`.
        x: as for `profile`.
        place: ends in .json, or in .json.gz, which is compressed.

    Raises:
        TypeError, ValueError: as for `profile`, or `place` ends otherwise.
    """
    if not place.name.endswith(ENDINGS):
        raise ValueError(f"place must end in {' or '.join(ENDINGS)}, got {place}")
    given = arguments(x)
    on_gpu = given[0].is_cuda
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    fused, eager = pair(model)
    nets = {"eager": sharing(eager), "fused": sharing(fused)}
    for name, net in nets.items():
        Spans(net, Ranges(name, on_gpu))
    with torch.inference_mode():
        for net in nets.values():
            for _ in range(WARM):
                net(*given)
        with torch_profile(activities=kinds) as found:
            for net in nets.values():
                net(*given)
            if on_gpu:
                torch.cuda.synchronize(given[0].device)
    found.export_chrome_trace(str(place))
