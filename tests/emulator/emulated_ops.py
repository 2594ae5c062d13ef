# SPDX-License-Identifier: BSD-3-Clause
"""The CUDA ops on a CPU: csrc/ops and the kernels, compiled against the emulator.

The ops are torch.ops.resnet_fused_emulated.*, for CPU tensors; ``instead_of_cpu`` lets the package
call them as it calls the CUDA ops for CUDA tensors.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import emulated
import emulator_build as make
import torch

from harness import gpu

OPS = ("add_relu", "basic_block", "bottleneck", "conv_bn_act", "pool_linear", "stem")


@functools.cache
def library() -> ctypes.CDLL:
    """Compile the ops (once per session) and register them."""
    folder, csrc = make.folder() / "ops", make.ROOT / "csrc"
    flags = [
        *make.COMMON,
        "-O1",
        f"-I{csrc}",
        f"-I{make.HERE}",
        "-DRESNET_FUSED_CUDA=1",
        "-DRESNET_FUSED_SM90A=1",
    ]
    ops = [path for path in sorted(csrc.glob("ops/*.cpp")) if path.name != "cuda.cpp"]
    ops += sorted(csrc.glob("kernels/cpu/*.cpp"))
    own = make.HERE / "ops_library.cpp"
    guarded = [*flags, "-Daoti_torch_empty_strided=emulated_empty_strided"]
    groups = (
        (ops, guarded),
        ([own], flags),
        (make.runtime_sources(), make.runtime_flags()),
        (make.kernel_sources(), make.cxxflags(False)),
    )
    objects = [
        make.Object(path, folder / path.parent.name / f"{path.stem}.o", tuple(options))
        for paths, options in groups
        for path in paths
    ]
    target = folder / "emulated_ops.so"
    with make.locked(folder / "lock"):
        for text in make.compile_objects(objects, folder).values():
            raise make.BuildError(text)
        torch_library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
        make.link([*(o.target for o in objects), torch_library], target)
        loaded = ctypes.CDLL(str(target))
    loaded.emulated_configure.argtypes = [ctypes.c_uint64, ctypes.c_int]
    loaded.emulated_launches.restype = ctypes.c_uint64
    loaded.emulated_cut.argtypes = [ctypes.c_int64]
    loaded.emulated_log.restype = ctypes.c_char_p
    loaded.emulated_calls.restype = ctypes.c_int64
    namespace = torch.library.Library("resnet_fused_emulated", "DEF")
    for name in OPS:
        schema = str(getattr(torch.ops.resnet_fused, name).default._schema)
        namespace.define(schema.removeprefix("resnet_fused::"))
    loaded.namespace = namespace  # lives as long as the library
    return loaded


@contextmanager
def instead_of_cpu(
    seed: int = 1, multiprocessors: int = 132, invariant: bool = False, hopper: int = 0
) -> Iterator[ctypes.CDLL]:
    """CPU tensors take the way of CUDA tensors, and end in the emulated ops.

    Args:
        seed: of the order in which threads run.
        multiprocessors: what the GPU is said to have.
        invariant: what ``set_batch_invariant`` sets.
        hopper: 1 if the GPU is a Hopper and RESNET_FUSED_HOPPER is 1, 2 if it is "pairs".
    """
    loaded = library()
    loaded.emulated_configure(seed, multiprocessors)
    loaded.resnet_fused_set_batch_invariant(int(invariant))
    loaded.emulated_hopper(int(hopper > 0))
    loaded.resnet_fused_set_hopper(hopper)
    loaded.emulated_launches()
    with gpu.replaced(torch.ops.resnet_fused_emulated):
        yield loaded
    loaded.resnet_fused_set_batch_invariant(0)
    loaded.emulated_hopper(0)


@dataclass(frozen=True)
class Launch:
    """A kernel's launch: its name with template arguments, and the blocks of its grid."""

    kernel: str
    grid: tuple[int, int, int]


def launches(loaded: ctypes.CDLL) -> list[Launch]:
    """Launches since the last call, or since ``instead_of_cpu`` began."""
    text = loaded.emulated_log().decode()
    loaded.emulated_launches()
    found = []
    for line in text.splitlines():
        x, y, z, name = line.split(" ", 3)
        found.append(Launch(emulated.kernel_name(name), (int(x), int(y), int(z))))
    return found
