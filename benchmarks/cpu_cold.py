# SPDX-License-Identifier: BSD-3-Clause
"""A model's first results and peak memory in a process of its own; started by cpu_peers.py.

    python benchmarks/cpu_cold.py '{"peer": "resnet_fused", "model": "resnet50", ...}'

Prints a JSON object:

* `first_ms`: from a model in memory to its first logits. It includes all that is done once: packing
  of weights, making of kernels, for OpenVINO `compile_model`. Imports, building or reading the
  model and, for OpenVINO, its conversion do not count.
* `second_ms`: the same call once more.
* `peak_mib`: peak memory beyond that of the imports: weights, input, packings, activations.

For OpenVINO the process holds no torch: it reads the converted model from a file, as in use.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PEERS = ("resnet_fused", "channels_last", "openvino")
"""Those that are measured here."""


def peak_bytes() -> int:
    """Peak resident memory of this process.

    From /proc: `ru_maxrss` would be that of the parent at least, for it survives exec.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the kernel does not tell peak memory: /proc/self/status has no VmHWM")


def openvino_config(dtype: str, threads: int) -> dict[str, Any]:
    """OpenVINO's settings for one request at a time on `threads` threads, in this precision."""
    return {
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == "bf16" else "f32",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }


def _openvino(ask: dict[str, Any]) -> Callable[[], Callable[[], object]]:
    """Read the model; the result compiles it and gives what runs it."""
    import numpy as np
    import openvino as ov

    _imported()
    core = ov.Core()
    model = core.read_model(ask["file"])
    shape = (ask["batch"], 3, ask["size"], ask["size"])
    x = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)

    def start() -> Callable[[], object]:
        compiled = core.compile_model(model, "CPU", openvino_config(ask["dtype"], ask["threads"]))
        request = compiled.create_infer_request()
        return lambda: request.infer({0: x}, share_inputs=True, share_outputs=True)

    return start


def _torch(ask: dict[str, Any]) -> Callable[[], Callable[[], object]]:
    """Build the model, in its dtype from the start: no float32 copy counts."""
    import cpu_common
    import torch

    from resnet_fused import models
    from resnet_fused.bench import subjects

    _imported()
    torch.set_num_threads(ask["threads"])
    torch.set_default_dtype(cpu_common.DTYPES[ask["dtype"]])
    torch.manual_seed(0)
    model = getattr(models, ask["model"])().eval().to(memory_format=torch.channels_last)
    x = torch.randn(ask["batch"], 3, ask["size"], ask["size"])
    x = x.contiguous(memory_format=torch.channels_last)
    net = model if ask["peer"] == "resnet_fused" else subjects.plain(model)

    def call() -> object:
        with cpu_common.precision(ask["dtype"]), torch.inference_mode():
            return net(x)

    return lambda: call


_baseline = 0


def _imported() -> None:
    """Note the peak so far: what follows is the model's."""
    global _baseline
    _baseline = peak_bytes()


def first_results(ask: dict[str, Any]) -> dict[str, float]:
    """Measure what the module's docstring lists, in this process, which must be new."""
    make = (_openvino if ask["peer"] == "openvino" else _torch)(ask)
    marks = [time.perf_counter()]
    call = make()
    for _ in range(2):
        call()
        marks.append(time.perf_counter())
    return {
        "first_ms": (marks[1] - marks[0]) * 1e3,
        "second_ms": (marks[2] - marks[1]) * 1e3,
        "peak_mib": (peak_bytes() - _baseline) / 2**20,
    }


def ask_child(ask: dict[str, Any]) -> dict[str, float]:
    """Run `first_results` in a new process.

    Args:
        ask: peer (one of `PEERS`), model, dtype, batch, size, threads; for OpenVINO also file, the
            converted model's.

    Raises:
        RuntimeError: the process failed.
    """
    command = [sys.executable, __file__, json.dumps(ask)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise RuntimeError(f"the cold start of {ask['peer']} failed: {last}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    print(json.dumps(first_results(json.loads(sys.argv[1]))))
