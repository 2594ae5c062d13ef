# SPDX-License-Identifier: BSD-3-Clause
"""graphed: a model whose calls are replayed from CUDA graphs."""

from __future__ import annotations

import functools
import threading
import warnings
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import fx, nn

from resnet_fused.graphs import calls, capture
from resnet_fused.graphs.calls import Call, Refused
from resnet_fused.graphs.capture import Graph, Player
from resnet_fused.graphs.shelf import Shelf
from resnet_fused.graphs.snapshot import FORGOTTEN, Snapshot
from resnet_fused.modules import ungraphed

_MOST_FAILURES = 3  # in a row, after which nothing is captured any more
_MOST_WARNINGS = 8


class Graphs:
    """The graphs of one model, and the decision of every call between them and the model.

    Args:
        model: the module that is called where no graph can be replayed.
        max_shapes: the largest number of graphs.
    """

    def __init__(self, model: nn.Module, max_shapes: int) -> None:
        self.model: Any = model
        self.max_shapes = max_shapes
        self._shelf: Shelf[Graph] = Shelf(max_shapes)
        self._snapshot: Snapshot | None = None
        self._player: Player | None = None
        self._lock = threading.RLock()
        self._inside: int | None = None  # the thread that has the lock
        self._failures = 0
        self._warned: set[str] = set()

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Replay a graph, or call the model's forward and perhaps capture it."""
        plain = functools.partial(self.model.forward, *args, **kwargs)
        hopeless = self._failures >= _MOST_FAILURES
        if calls.observed() or (hopeless and not len(self._shelf)):
            return plain()
        call: Call | None = None
        reason: str | None = None
        try:
            call = calls.read(args, kwargs)
        except Refused as refused:
            reason = str(refused)
        if reason is not None:
            self._expire()  # a model that was moved off the GPU is called like this
            self._say(reason)
        # The caller's own graph takes the plain call in; a forward or a finaliser that calls
        # the wrapper again must not find it half-way.
        if call is None or capture.underway() or self._inside == _thread():
            return plain()
        due = False
        with self._lock:
            self._inside = _thread()
            try:
                graph, reason = self._find(call)
                if graph is not None:
                    return self._player.play(graph, call.tensors)  # type: ignore[union-attr]
                if reason is None and not hopeless:
                    due = self._shelf.due(call.key)
            finally:
                self._inside = None
        if reason is not None:
            self._say(reason)
        # Behind a plain call in the same thread, libraries have chosen their algorithms and made
        # their handles, which cannot be done while a graph is captured.
        result = plain()
        if due:
            self._try_capture(call)
        return result

    def _find(self, call: Call) -> tuple[Graph | None, str | None]:
        """The graph for a call; or None, and the reason if it must not be captured now."""
        if self.model.training:
            # Who trains wants no advice; who forgot eval() does.
            return None, "" if torch.is_grad_enabled() else FORGOTTEN
        if self._snapshot is not None:
            change = self._snapshot.change()
            if change is not None and not change.stale:
                return None, change.reason
            if change is not None:
                self._forget()
        reason = calls.why_recorded(
            self._snapshot.tensors if self._snapshot else self.model.parameters()
        )
        return (self._shelf.take(call.key), None) if reason is None else (None, reason)

    def _expire(self) -> None:
        """Give back what graphs hold that will never be replayed again."""
        with self._lock:
            if self._snapshot is None or self._inside is not None:
                return
            if not capture.underway():  # dropping waits for the GPU, which a capture forbids
                change = self._snapshot.change()
                if change is not None and change.stale:
                    self._forget()

    def _forget(self) -> None:
        self._snapshot = None
        self._drop(self._shelf.clear())

    def _drop(self, graphs: list[Graph]) -> None:
        if self._player is not None:
            self._player.drop(graphs)

    def _try_capture(self, call: Call) -> None:
        """Capture a call that has just run; whatever comes of it, its result stands."""
        with self._lock:
            self._inside = _thread()
            try:
                reason = self._capture(call)
            except Exception as error:
                self._shelf.refuse(call.key)
                self._failures += 1
                kind = "" if isinstance(error, Refused) else f"{type(error).__name__}: "
                reason = f"{kind}{error}"
            finally:
                self._inside = None
        if self._failures >= _MOST_FAILURES:
            reason = f"{reason}; no more is captured"
        self._say(reason)

    def _capture(self, call: Call) -> str:
        """Capture a call; returns why it cannot be done now, and raises what shows it never can."""
        change = self._snapshot.change() if self._snapshot is not None else None
        if change is not None and not change.stale:
            return change.reason
        if change is not None:
            self._forget()
        if call.key in self._shelf:
            return ""  # another thread was quicker
        try:
            snapshot = self._snapshot or Snapshot(self.model)
        except Refused as refused:
            self._shelf.defer(call.key)
            return str(refused)
        if self._player is None or self._player.device != call.device:
            self._forget()
            self._player = Player(call.device)
        self._drop(self._shelf.make_room())
        graph = self._player.record(self.model.forward, call, self._shelf.any())
        change = snapshot.change()
        if change is not None:
            self._drop([graph])
            raise Refused(f"{change.reason} while its forward ran")
        self._failures, self._snapshot = 0, snapshot
        self._shelf.put(call.key, graph)
        return ""

    def _say(self, reason: str) -> None:
        """Warn of a plain call, once for every reason."""
        if reason and reason not in self._warned and len(self._warned) < _MOST_WARNINGS:
            self._warned.add(reason)
            name = type(self.model).__name__
            warnings.warn(f"{name} is called without a CUDA graph: {reason}", stacklevel=3)


_thread = threading.get_ident


class Graphed(nn.Module):
    """Mixin that graphed() puts before a model's class."""

    graphed_from: type
    _graphs: Graphs

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keep the hooks that classes put on being subclassed (registries) out of this."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle as the model; graphs are captured anew."""
        return (graphed, (self._graphs.model, self._graphs.max_shapes))

    def _replicate_for_data_parallel(self) -> nn.Module:
        replica: nn.Module = self._graphs.model._replicate_for_data_parallel()
        return replica


class GraphedGraph(Graphed):
    """The mixin for a torch.fx.GraphModule, which writes its code into its class, and itself makes
    its copies.
    """

    def recompile(self) -> Any:
        """Make the model's forward anew from ``graph``."""
        return self._graphs.model.recompile()

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return graphed(self._graphs.model.__deepcopy__(memo), self._graphs.max_shapes)


_CLASSES: WeakValueDictionary[type, type[nn.Module]] = WeakValueDictionary()


def _graphed_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``cls`` whose forward replays graphs."""
    made = _CLASSES.get(cls)
    if made is not None:
        return made

    @functools.wraps(cls.forward)  # tools look at the parameters
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return cls.forward(self, *args, **kwargs)
        return self._graphs(args, kwargs)

    names = {
        "__module__": cls.__module__,
        "__doc__": cls.__doc__,
        "__slots__": ("_graphs",),  # not in the dictionary, which it shares with the model
        "graphed_from": cls,
        "forward": forward,
    }
    mixin = GraphedGraph if issubclass(cls, fx.GraphModule) else Graphed
    metaclass: Any = type(cls)
    new: type[nn.Module] = metaclass(f"Graphed{cls.__name__}", (mixin, cls), names)
    _CLASSES[cls] = new
    return new


def graphed(model: nn.Module, max_shapes: int = 8) -> nn.Module:
    """A second handle on ``model`` whose calls on a GPU are replayed from CUDA graphs.

    A graph launches all of a forward's kernels at once, which is what small batches wait for. The
    second call of every shape, dtype and memory format of the arguments captures one, and the calls
    from the third on replay it. Fuse first: ``graphed(fuse(model.eval().cuda()))``.

    The handle *is* the model but for its ``forward``: an instance of its class with the same
    parameters, buffers, ``state_dict`` keys, attributes, hooks and mode; what is changed on one is
    changed on both, and ``model`` itself is called without graphs as ever.

    - Outputs are the caller's: new tensors at every call (also where eager returns its input).
    - Weights changed in place (``load_state_dict``, optimizer steps) count from the next call. When
      parameters, buffers, modules or attributes are replaced, moved or converted, all graphs are
      dropped and captured anew. Python code in a forward does not run at a replay: what it reads
      elsewhere (globals, the inside of lists and dictionaries) stays as it was when captured, and
      what it prints, counts or appends is missing.
    - Any thread and any stream may call. A replay is ordered like a kernel on the caller's current
      stream. Replays of one handle never overlap, whatever their streams; make a handle per stream
      for that.
    - Called as before, without a graph: the first time of every shape; in training mode; where
      autograd records; with hooks on submodules (the model's own run around the graph); with empty
      tensors; while the caller captures a graph himself; in ``torch.compile``, ``torch.export``,
      tracing and ``torch.func``. And, with one warning that says why, what no graph can hold:
      tensors on a CPU or on several GPUs; arguments or outputs other than tensors, numbers, strings
      and None in tuples, lists and dictionaries; a forward that depends on values (``.item()``,
      boolean masks), changes its input, or uses the CPU. After three failures in a row no more is
      captured.
    - Memory: the graphs share what one forward of the largest shape needs, on top of eager's; each
      keeps its inputs and outputs, and CUDA's description of its kernels (some hundred kilobytes to
      megabytes). At most ``max_shapes`` are kept, the least recently used one is dropped first, and
      all go with the handle. A forward that is captured in one thread keeps calls of the handle in
      others waiting meanwhile.

    Args:
        model: any module; a forward that was put on the instance instead of the class is called as
            it is, without graphs.
        max_shapes: how many graphs are kept.

    Returns:
        The handle. It can be copied and pickled; the copy has a copy of the model and no graphs.

    Raises:
        TypeError, ValueError: ``model`` is no module, or TorchScript; ``max_shapes`` is not a
            number from 1 on.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model must not be TorchScript; give graphed() what was scripted")
    if isinstance(max_shapes, bool) or not isinstance(max_shapes, int):
        raise TypeError(f"max_shapes must be an int, got {type(max_shapes).__name__}")
    if max_shapes < 1:
        raise ValueError(f"max_shapes must be 1 or more, got {max_shapes}")
    model = ungraphed(model)
    if "forward" in vars(model):
        warnings.warn(
            f"the forward of {type(model).__name__} is replaced on the instance, so it is called "
            "without CUDA graphs; put it into the class",
            stacklevel=2,
        )
    cls = _graphed_class(type(model))
    handle: nn.Module = object.__new__(cls)  # torch.fx's own __new__ makes another class
    object.__setattr__(handle, "__dict__", vars(model))
    object.__setattr__(handle, "_graphs", Graphs(model, max_shapes))
    return handle
