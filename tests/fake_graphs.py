# SPDX-License-Identifier: BSD-3-Clause
"""A stand-in for what ``graphed`` uses of torch.cuda, on the CPU: streams and events that are noted
and graphs that compute nothing when captured and the same operations on the same memory at every
replay, whatever has become of the tensors. It can fail wherever CUDA can.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


def tensors(tree: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]


def alias(t: Any) -> Any:
    """The memory that a tensor has now."""
    return t.detach() if isinstance(t, Tensor) else t


class Recorder(TorchDispatchMode):
    """Notes operations; on leaving, nothing that they wrote is there any more."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self._before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        taken = pytree.tree_map(alias, (args, kwargs))
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._before += [(alias(t), t.clone()) for t in tensors(value)]
        result = func(*args, **kwargs)
        if not func.name().startswith("aten::empty"):  # memory that is there, and no kernel
            self.operations.append((func, *taken, pytree.tree_map(alias, result)))
        return result

    def forget(self) -> None:
        with torch.inference_mode():
            for *given, results in self.operations:
                known = {t.untyped_storage().data_ptr() for t in tensors(given)}
                for t in tensors(results):
                    if t.untyped_storage().data_ptr() not in known:
                        t.fill_(torch.nan if t.is_floating_point() else 77)
            for t, value in reversed(self._before):
                t.copy_(value)

    def replay(self) -> None:
        with torch.inference_mode():
            for func, args, kwargs, results in self.operations:
                known = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
                new = func(*args, **kwargs)
                for t, value in zip(tensors(results), tensors(new), strict=True):
                    if t.untyped_storage().data_ptr() not in known:
                        t.copy_(value)


class Stream:
    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def wait_event(self, event: Event) -> None:
        self.cuda.log.append(f"{self.name} waits for {event.where}")


class Event:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.where = cuda, "nothing"

    def record(self, stream: Stream) -> None:
        self.where = stream.name

    def synchronize(self) -> None:
        self.cuda.log.append(f"host waits for {self.where}")


class CUDAGraph:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.recorder, self.pool_id = cuda, Recorder(), ""
        self.name = f"graph{cuda.count('graph')}"

    def pool(self) -> str:
        return self.pool_id

    def replay(self) -> None:
        self.cuda.log.append(f"{self.name} on {self.cuda.current_stream().name}")
        self.cuda.check("replay")
        self.recorder.replay()

    def reset(self) -> None:
        self.cuda.log.append(f"{self.name} reset")
        self.cuda.alive.discard(self.name)
        self.recorder.operations.clear()


class FakeCuda:
    """Stands for the module ``torch.cuda``.

    ``fail`` names the places where calls fail: begin, end, replay.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.fail: set[str] = set()
        self.alive: set[str] = set()
        self.capturing = threading.local()
        self._streams = threading.local()
        self._counts: dict[str, int] = {}
        self.default = Stream(self, "default")
        self.underway = 0

    def count(self, what: str) -> int:
        self._counts[what] = self._counts.get(what, 0) + 1
        return self._counts[what]

    def check(self, place: str) -> None:
        if place in self.fail:
            raise RuntimeError(f"CUDA error in {place}")

    def captures(self) -> int:
        return self._counts.get("capture", 0)

    def replays(self) -> int:
        return sum(" on " in line for line in self.log)

    def CUDAGraph(self) -> CUDAGraph:  # noqa: N802
        return CUDAGraph(self)

    def Event(self) -> Event:  # noqa: N802
        return Event(self)

    def Stream(self, device: Any = None) -> Stream:  # noqa: N802
        return Stream(self, f"side{self.count('stream')}")

    def graph_pool_handle(self) -> str:
        return f"pool{self.count('pool')}"

    def current_stream(self, device: Any = None) -> Stream:
        return getattr(self._streams, "now", self.default)

    def set_stream(self, stream: Stream) -> None:
        self._streams.now = stream

    def is_current_stream_capturing(self) -> bool:
        return getattr(self.capturing, "on", False)

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        yield

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before = self.current_stream()
        self.set_stream(stream)
        yield
        self.set_stream(before)

    @contextmanager
    def graph(
        self, graph: CUDAGraph, pool: Any, stream: Stream, capture_error_mode: str = "global"
    ) -> Iterator[None]:
        """As torch's: a failure leaves the stream where it was."""
        assert capture_error_mode == "thread_local"
        self.count("capture")
        graph.pool_id = pool or self.graph_pool_handle()
        before = self.current_stream()
        self.set_stream(stream)
        self.check("begin")
        self.underway += 1
        assert self.underway == 1, "two captures at a time"
        self.capturing.on = True
        try:
            with graph.recorder:
                yield
        finally:
            self.capturing.on = False
            self.underway -= 1
            graph.recorder.forget()
            self.check("end")
            self.alive.add(graph.name)
            self.set_stream(before)
