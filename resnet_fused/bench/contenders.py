# SPDX-License-Identifier: BSD-3-Clause
"""The rivals in a benchmark: eager in both layouts, torch.compile, and resnet_fused."""

from __future__ import annotations

import copy
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import torch
from torch import Tensor, nn

from resnet_fused import dispatch
from resnet_fused.bench.subjects import plain

EAGER = ("eager", "channels_last")
COMPILE = "compile"
FUSED = "resnet_fused"
ALL = (*EAGER, COMPILE, FUSED)


@dataclass(frozen=True)
class Contender:
    """One way to run a model on one input, or the reason why it cannot.

    Args:
        name: one of `ALL`.
        layout: `nchw` or `nhwc`.
        path: what computes it.
        call: runs the model; None if it cannot run here.
        note: why it cannot, or what to know about it.
        compile_s: seconds spent on compiling, whether or not that succeeded.
    """

    name: str
    layout: str
    path: str
    call: Callable[[], Tensor] | None
    note: str = ""
    compile_s: float = 0.0


class _TimeUpError(BaseException):
    """Ends a compilation; no Exception, so that no handler inside the compiler swallows it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Interrupt the block after `seconds` by a TimeoutError.

    Only the main thread of a POSIX process can be interrupted; elsewhere the block runs to its end.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(signum: int, frame: FrameType | None) -> None:
        raise _TimeUpError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, min(max(seconds, 1e-3), 1e6))
    try:
        yield
    except _TimeUpError:
        raise TimeoutError(f"not done after {seconds:.0f} s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def first_line(error: BaseException) -> str:
    """Say what went wrong in one short line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:160].rstrip(": ")


def compiled(net: Callable[[Tensor], Tensor], x: Tensor, seconds: float) -> Contender:
    """Compile `net` for exactly this input with torch.compile's defaults, within a time limit."""

    def failed(note: str) -> Contender:
        torch.compiler.reset()
        return Contender(COMPILE, "nhwc", "inductor", None, note, time.perf_counter() - start)

    start = time.perf_counter()
    if seconds <= 0:
        return failed("the time for compiling is spent; raise --budget-s")
    torch.compiler.reset()
    try:
        with time_limit(seconds), torch.inference_mode():
            compiled_net = torch.compile(net, dynamic=False)
            compiled_net(x)
    except TimeoutError as error:
        return failed(f"compiling was {error}; raise --budget-s")
    except Exception as error:  # no compiler, an unsupported build: whatever it is, the row says so
        return failed(first_line(error))
    took = time.perf_counter() - start
    return Contender(COMPILE, "nhwc", "inductor", lambda: compiled_net(x), "", took)


@dataclass(frozen=True)
class Rivals:
    """One piece of a network and one input, ready to be run by every contender.

    Args:
        net: plain PyTorch, contiguous weights.
        net_last: the same with channels_last weights.
        fused: computes the same through this package's ops.
        x: input, [N, C, H, W], contiguous.
        op: the op whose path stands for all of `fused`.
    """

    net: Callable[[Tensor], Tensor]
    net_last: Callable[[Tensor], Tensor]
    fused: Callable[[Tensor], Tensor]
    x: Tensor
    op: str = "conv_bn_act"

    @classmethod
    def of(cls, model: nn.Module, x: Tensor) -> Rivals:
        """Prepare a model of this package, in eval mode, with the dtype and device of `x`."""
        fused = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return cls(plain(model), plain(fused), fused, x)

    def make(self, name: str, compile_s: float = math.inf) -> Contender:
        """Prepare one contender; only `compile` takes long, at most `compile_s` seconds."""
        if name == "eager":
            return Contender(name, "nchw", "aten", lambda: self.net(self.x))
        x = self.x.contiguous(memory_format=torch.channels_last)
        if name == "channels_last":
            return Contender(name, "nhwc", "aten", lambda: self.net_last(x))
        if name == COMPILE:
            return compiled(self.net_last, x, compile_s)
        path = dispatch.path_on(x.device, x.dtype, self.op)
        return Contender(FUSED, "nhwc", path.name, lambda: self.fused(x), path.reason)
