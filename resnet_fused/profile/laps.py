# SPDX-License-Identifier: BSD-3-Clause
"""A clock that is read around every torch operation of a forward; which calls count."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_fused.timing import Measurement

Laps = Sequence[Sequence[Sequence[float]]]
"""Milliseconds: `laps[round][call][layer]`."""


def timed_laps(laps: Sequence[Sequence[float]], measured: Measurement, name: str) -> Laps:
    """Pick the laps of the timed calls, round by round, out of those of all calls.

    `timing.measure` first warms a contender up and, where a visit has several calls, begins it with
    one that is not timed.

    Raises:
        ValueError: there are not as many laps as there were calls.
    """
    visits, warm = measured.visits[name], measured.warmups[name].calls
    timed = len(visits[0])
    made = timed + (timed > 1)
    if len(laps) != warm + made * len(visits):
        raise ValueError(
            f"laps of {name} must be those of {warm} calls and {len(visits)} visits of {made}, "
            f"got {len(laps)}"
        )
    ends = [warm + made * (visit + 1) for visit in range(len(visits))]
    return [laps[end - timed : end] for end in ends]


def layer_times(laps: Laps, places: Sequence[int]) -> list[list[float]]:
    """Milliseconds of the layers at `places` together: `[round][call]`."""
    return [[sum(call[i] for i in places) for call in visit] for visit in laps]


def _event() -> Any:
    """A mark on a GPU's current stream."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class _Marks(TorchDispatchMode):
    """Notes when each operation began and ended; on a GPU, when its kernels did."""

    def __init__(self, mark: Callable[[], Any]) -> None:
        super().__init__()
        self._mark = mark
        self.marks: list[tuple[Any, Any]] = []

    def _operation(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        start = self._mark()
        y = func(*args, **(kwargs or {}))
        self.marks.append((start, self._mark()))
        return y


# Set here, for torch would wrap a method of that name in what takes longer than many a layer.
_Marks.__torch_dispatch__ = _Marks._operation  # type: ignore[assignment]


class Lapped:
    """A call of which every layer is timed: the sum of its torch operations.

    What passes between operations, in Python and in torch's way to this clock, belongs to none.

    Args:
        call: makes the forward.
        layers: for each torch operation of the forward, in order, the number of its layer.
        count: layers.
        device: where it runs.
        now: reads the host's clock in nanoseconds.
    """

    def __init__(
        self,
        call: Callable[[], object],
        layers: Sequence[int],
        count: int,
        device: str = "cpu",
        now: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        self._call, self._layers, self._count = call, layers, count
        self._cuda = torch.device(device).type == "cuda"
        self._mark: Callable[[], Any] = _event if self._cuda else now
        self._open: list[Any] = []
        self._laps: list[list[float]] = []

    def __call__(self) -> object:
        """Make the call.

        Raises:
            RuntimeError: it ran other operations than those of `layers`.
        """
        self._close()
        with _Marks(self._mark) as mode:
            y = self._call()
        if len(mode.marks) != len(self._layers):
            raise RuntimeError(
                f"the forward ran {len(mode.marks)} operations where it ran "
                f"{len(self._layers)} before: a model whose operations differ from call to call "
                "cannot be profiled"
            )
        self._open = mode.marks
        return y

    def _close(self) -> None:
        """Turn the marks of the last call into laps; who times calls has waited for its end."""
        if not self._open:
            return
        laps = [0.0] * self._count
        for layer, (a, b) in zip(self._layers, self._open, strict=True):
            laps[layer] += a.elapsed_time(b) if self._cuda else (b - a) / 1e6
        self._laps.append(laps)
        self._open = []

    def laps(self) -> list[list[float]]:
        """Milliseconds per layer of every call so far."""
        self._close()
        return self._laps
