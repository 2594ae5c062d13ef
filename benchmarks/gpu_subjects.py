# SPDX-License-Identifier: BSD-3-Clause
"""A ResNet on a GPU with all who run it: eager PyTorch, resnet_fused, torch.compile, TensorRT."""

from __future__ import annotations

import copy
import importlib.util
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import gpu_timing
import torch
from gpu_timing import Call
from torch import Tensor, nn

import resnet_fused
from resnet_fused.bench import subjects
from resnet_fused.bench.contenders import first_line, time_limit

DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "tf32": torch.float32,  # fp32 data; convolutions and products may round them to TF32
    "fp32": torch.float32,  # for trials on a CPU
}
EAGER = ("eager", "channels_last")
FUSED = "resnet_fused"
GRAPHED = "resnet_fused graphed"  # what a user calls: new outputs, freshness of the model checked
FEWEST_COMPILE_S = 15.0


@dataclass
class Runner:
    """One contender, with or without a CUDA graph, ready to be timed; or why it cannot run."""

    name: str
    graph: bool
    call: Call | None = None
    note: str = ""
    error: float | None = None
    peak_bytes: int | None = None
    build_s: float = 0.0

    def __str__(self) -> str:
        return self.name + (" graph" if self.graph else "")


@dataclass
class Subject:
    """A model in one dtype on a device, and two images with their float64 logits."""

    model: nn.Module
    dtype: torch.dtype
    device: str
    size: int
    nchw: nn.Module = field(init=False)
    nhwc: nn.Module = field(init=False)
    fused: nn.Module = field(init=False)
    images: Tensor = field(init=False)
    logits: Tensor = field(init=False)

    def __post_init__(self) -> None:
        base = copy.deepcopy(self.model).to(self.device, self.dtype)
        self.fused = copy.deepcopy(base).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.nchw, self.nhwc = subjects.plain(base), subjects.plain(self.fused)
        draw = torch.Generator().manual_seed(1)
        pair = torch.randn(2, 3, self.size, self.size, generator=draw)
        self.images = pair.to(self.device, self.dtype)
        with torch.inference_mode():
            self.logits = copy.deepcopy(self.nchw).double()(self.images.double()).cpu()

    def batch(self, n: int) -> Tensor:
        """n images: the first is the first of those known, the last the second."""
        draw = torch.Generator(self.device).manual_seed(n)
        shape = (n, 3, self.size, self.size)
        x = torch.randn(shape, generator=draw, device=self.device).to(self.dtype)
        x[-1], x[0] = self.images[1], self.images[0]
        return x

    def error(self, y: Tensor) -> float:
        """Relative error of a batch's logits at the images that are known."""
        rows = [0, -1] if y.shape[0] > 1 else [0]
        found = y[rows].detach().double().cpu()
        return subjects.relative_error(found, self.logits[: len(rows)])

    def bound(self, eager: float) -> float:
        """Largest error that resnet_fused may have."""
        return subjects.error_bound(eager, self.nchw, self.dtype)


def build(name: str, graph: bool, make: Callable[[], Call], subject: Subject) -> Runner:
    """Prepare a contender, run it once and judge its result; a failure becomes its note."""
    runner, device, start = Runner(name, graph), subject.device, time.monotonic()
    cuda, before = gpu_timing.is_cuda(device), 0
    try:
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        call = make()
        y: Any = call()
        if graph:
            call, y = gpu_timing.graphed(call, device)
            call()
        gpu_timing.synchronize(device)
        if cuda:
            runner.peak_bytes = torch.cuda.max_memory_allocated(device) - before
        runner.error = subject.error(y)
        runner.call = call
    except Exception as error:  # one contender's failure must not hide the others' times
        runner.note = first_line(error) or type(error).__name__
    runner.build_s = time.monotonic() - start
    return runner


def plain_and_fused(subject: Subject, n: int, graphs: bool) -> Iterator[Runner]:
    """Eager in both layouts and resnet_fused; with `graphs` each as a CUDA graph too."""
    x = subject.batch(n)
    last = x.contiguous(memory_format=torch.channels_last)
    makers: dict[str, Callable[[], Call]] = {
        "eager": lambda: lambda: subject.nchw(x),
        "channels_last": lambda: lambda: subject.nhwc(last),
        FUSED: lambda: lambda: subject.fused(last),
    }
    for graph in (False, True) if graphs else (False,):
        for name, make in makers.items():
            yield build(name, graph, make, subject)
    if graphs and n == 1:
        yield build(GRAPHED, False, lambda: graphed(subject.fused, last), subject)


def graphed(model: nn.Module, x: Tensor) -> Call:
    """Calls that are replayed by resnet_fused.graphed.

    Raises:
        UserWarning: nothing could be captured.
    """
    handle = resnet_fused.graphed(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for _ in range(3):  # the second call captures
            handle(x)
    return lambda: handle(x)


def tuned_cudnn(subject: Subject, n: int) -> Runner:
    """channels_last with cuDNN trying its algorithms on every layer, as a CUDA graph."""
    last = subject.batch(n).contiguous(memory_format=torch.channels_last)

    def make() -> Call:
        torch.backends.cudnn.benchmark = True
        subject.nhwc(last)
        return lambda: subject.nhwc(last)

    try:
        return build("channels_last tuned", True, make, subject)
    finally:
        torch.backends.cudnn.benchmark = False


def compiled(mode: str, subject: Subject, n: int, seconds: float) -> Iterator[Runner]:
    """torch.compile on channels_last, in at most `seconds`; the default mode as a graph too.

    The mode max-autotune uses CUDA graphs by itself.
    """
    last = subject.batch(n).contiguous(memory_format=torch.channels_last)
    name = "compile" if mode == "default" else f"compile {mode}"
    nets: list[Callable[[Tensor], Tensor]] = []

    def make() -> Call:
        if seconds < FEWEST_COMPILE_S:
            raise TimeoutError(f"{seconds:.0f} s left are too few for compiling")
        torch.compiler.reset()
        with time_limit(seconds):
            net = torch.compile(subject.nhwc, dynamic=False, mode=mode)
            for _ in range(3):  # the graph is recorded behind the first call
                net(last)
            nets.append(net)
        return lambda: net(last)

    yield build(name, False, make, subject)
    if nets and mode == "default" and gpu_timing.is_cuda(subject.device):
        yield build(name, True, lambda: lambda: nets[0](last), subject)


def tensorrt(subject: Subject, n: int, seconds: float) -> Runner:
    """TensorRT through torch_tensorrt, if that is installed."""
    x = subject.batch(n)

    def make() -> Call:
        if importlib.util.find_spec("torch_tensorrt") is None:
            raise ModuleNotFoundError("torch_tensorrt is not installed")
        if seconds < FEWEST_COMPILE_S:
            raise TimeoutError(f"{seconds:.0f} s left are too few for building an engine")
        import torch_tensorrt  # type: ignore[import-not-found]

        with time_limit(seconds):
            net = torch_tensorrt.compile(
                subject.nchw, ir="dynamo", inputs=[x], enabled_precisions={subject.dtype}
            )
            net(x)
        return lambda: net(x)

    return build("tensorrt", False, make, subject)
