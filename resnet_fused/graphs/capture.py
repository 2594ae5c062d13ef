# SPDX-License-Identifier: BSD-3-Clause
"""CUDA graphs of calls: recorded, replayed in order whatever the stream, and dropped.

The graphs of one model share their memory: each leaves its intermediate results where another one
writes its own. So they never run at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor, cuda
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_fused.graphs import calls
from resnet_fused.graphs.calls import CONSTANTS, TENSOR, Call, Refused

_one_capture = Lock()  # torch allows one at a time in a process
_abandoned: list[Any] = []  # graphs whose capture broke: torch's allocators may still ask them


def underway() -> bool:
    """True if the current stream is being captured, by whomever."""
    return cuda.is_current_stream_capturing()


@dataclass
class Graph:
    """A call that was recorded.

    Args:
        graph: torch's.
        inputs: what it reads; the arguments are copied there.
        outputs: what it writes, and constants, in order.
        spec: puts such a list together as the forward did.
        held: the memory that it reads besides, which must not become another tensor's.
    """

    graph: Any
    inputs: list[Tensor]
    outputs: list[Any]
    spec: pytree.TreeSpec
    held: list[torch.UntypedStorage]


class Player:
    """Records and replays the graphs of one model on one GPU.

    Only one thread at a time may use it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._side = cuda.Stream(device)  # the same for all captures, or they could not share
        self._done = cuda.Event()
        self._last: Any = None  # the stream of the last replay

    def play(self, graph: Graph, tensors: Sequence[Tensor]) -> Any:
        """Replay a graph on the current stream.

        Returns:
            The outputs, in new tensors.
        """
        stream = cuda.current_stream(self.device)
        if self._last is not None and self._last != stream:
            stream.wait_event(self._done)
        self._last = stream
        try:
            for own, given in zip(graph.inputs, tensors, strict=True):
                own.copy_(given)
            graph.graph.replay()
            copies = {id(y): y.clone() for y in graph.outputs if isinstance(y, Tensor)}
        finally:
            self._done.record(stream)
        flat = [copies[id(y)] if isinstance(y, Tensor) else y for y in graph.outputs]
        return pytree.tree_unflatten(flat, graph.spec)

    def drop(self, graphs: list[Graph]) -> None:
        """Give back the memory of graphs, once they no longer run."""
        if graphs and self._last is not None:
            self._done.synchronize()
        while graphs:
            graphs.pop().graph.reset()

    def record(self, forward: Callable[..., Any], call: Call, beside: Graph | None) -> Graph:
        """Capture ``forward``, which has run like this in this thread before; nothing is computed.

        Args:
            forward: the model's.
            call: its arguments; only their layouts matter.
            beside: a graph to share memory with.

        Raises:
            Refused: there can be no graph; the GPU is as it was.
        """
        graph = cuda.CUDAGraph()
        pool = beside.graph.pool() if beside is not None else cuda.graph_pool_handle()
        watch = Watch()
        failure: BaseException | None = None
        made: Any = None
        with _one_capture, cuda.device(self.device), _streams(self.device), _no_autocast_cache():
            try:
                # Other threads go on meanwhile: they may allocate, and wait.
                with cuda.graph(graph, pool, self._side, capture_error_mode="thread_local"):
                    try:
                        made = _run(forward, call, watch)
                    except BaseException as error:
                        failure = error  # capturing must end in any case
            except Exception as error:
                # What went wrong in the forward says more than that the capture is void.
                failure = self._mend(graph, pool, failure or error)
        if failure is not None:
            with suppress(Exception):
                graph.reset()
            if isinstance(failure, Refused) or not isinstance(failure, Exception):
                raise failure
            text = next(iter(str(failure).splitlines()), "")
            raise Refused(f"{type(failure).__name__}: {text}") from failure
        inputs, outputs, spec = made
        return Graph(graph, inputs, outputs, spec, list(watch.held.values()))

    def _mend(self, graph: Any, pool: Any, failure: BaseException) -> BaseException:
        """Make torch forget a capture that CUDA has ended with an error.

        Some versions go on sending memory to its pool, and believe that random numbers are being
        captured, until another capture succeeds.
        """
        _abandoned.append(graph)
        with suppress(Exception):
            graph.reset()
        with suppress(Exception):
            torch._C._cuda_endAllocateToPool(self.device.index, pool)
        try:
            with cuda.graph(cuda.CUDAGraph(), None, self._side, capture_error_mode="thread_local"):
                torch.zeros(1, device=self.device)
        except Exception as error:
            return RuntimeError(f"{failure}; and no graph can be captured any more: {error}")
        return failure


def _run(
    forward: Callable[..., Any], call: Call, watch: Watch
) -> tuple[list[Tensor], list[Any], pytree.TreeSpec]:
    """The forward on inputs of its own, which are in the graph's memory as all that it makes."""
    with torch.inference_mode(False):  # else nobody could write to them outside of that mode
        inputs = [
            torch.empty_strided(n.shape, n.strides, dtype=n.dtype, device=call.device)
            for n in call.layouts
        ]
    watch.inputs = {t.untyped_storage().data_ptr() for t in inputs}
    own = iter(inputs)
    flat = [next(own) if value is TENSOR else value for value in call.leaves]
    args, kwargs = pytree.tree_unflatten(flat, call.spec)
    with watch:
        result = forward(*args, **kwargs)
    outputs, spec = pytree.tree_flatten(result)
    for y in outputs:
        if isinstance(y, Tensor):
            _check_output(y)
        elif type(y) not in CONSTANTS:
            raise Refused(f"an output is a {type(y).__name__}")
    return inputs, outputs, spec


def _check_output(y: Tensor) -> None:
    if type(y) not in (Tensor, torch.nn.Parameter):
        raise Refused(f"an output is a {type(y).__name__}, a subclass of Tensor")
    if y.device.type != calls.DEVICE or y.layout is not torch.strided:
        raise Refused(f"an output is not a strided tensor on {calls.DEVICE!r}")
    if y.requires_grad and torch.is_grad_enabled():
        raise Refused("an output requires a gradient")


@contextmanager
def _streams(device: torch.device) -> Iterator[None]:
    """Bring the current stream back, which torch leaves where it was if a capture ends badly."""
    stream = cuda.current_stream(device)
    try:
        yield
    finally:
        cuda.set_stream(stream)


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """Let autocast convert weights inside of the graph.

    From its cache a graph would take weights converted before, which stay as they are when the
    weights change; and what it put there would be overwritten by the next replay.
    """
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


class Watch(TorchDispatchMode):
    """Sees every operation of a forward that is captured: refuses those that a graph cannot hold
    before CUDA sees them, which would break the capture, and keeps the memory they read alive.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inputs: set[int] = set()
        self.held: dict[int, torch.UntypedStorage] = {}
        self._made: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.name()
        _check_operation(func, name, args, kwargs)
        for t in _tensors((args, kwargs)):
            where = self._address(t, name)
            if where and where not in self.inputs and where not in self._made:
                self.held[where] = t.untyped_storage()
        for t in _tensors(_written(func, args, kwargs)):
            if self._address(t, name) in self.inputs:
                raise Refused(f"its forward changes its input ({name})")
        result = func(*args, **kwargs)
        self._made.update(
            where for t in _tensors(result) if (where := self._address(t, name)) not in self.held
        )
        return result

    def _address(self, t: Tensor, name: str) -> int:
        if t.device.type != calls.DEVICE:
            raise Refused(f"its forward uses a tensor on {t.device.type!r} ({name})")
        return t.untyped_storage().data_ptr()


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]


def _check_operation(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    tags = func.tags
    mask = name == "aten::index.Tensor"  # whose output is of any shape for a mask only
    unknown = torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags
    if mask:
        unknown = any(t.dtype in (torch.bool, torch.uint8) for t in _tensors(args[1]))
    if unknown:
        raise Refused(f"its forward depends on values ({name})")
    device = kwargs.get("device")
    if device is not None and torch.device(device).type != calls.DEVICE:
        raise Refused(f"its forward uses a tensor on {torch.device(device).type!r} ({name})")
    if "batch_norm" in name and _argument(func, args, kwargs, "training") is True:
        raise Refused(f"BatchNorm in training mode ({name})")


def _argument(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], wanted: str) -> Any:
    for at, argument in enumerate(func._schema.arguments):
        if argument.name == wanted:
            return args[at] if at < len(args) else kwargs.get(wanted)
    return None


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operation changes."""
    return [
        args[at] if at < len(args) else kwargs.get(argument.name)
        for at, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
