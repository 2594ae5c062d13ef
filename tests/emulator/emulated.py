# SPDX-License-Identifier: BSD-3-Clause
"""The CUDA kernels on a CPU: launch functions, device buffers, and what went wrong.

lib = emulated.build()
with lib.run(seed=1) as dev:
    x = dev.put(tensor)
    out = dev.out(tensor)
    lib.add_relu(x=x, y=x, out=out, n=tensor.numel(), dtype=tensor.dtype)
    result = dev.get(out)
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import importlib.util
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import emulator_build as make
import torch
import torch.nn.functional as F
from torch import Tensor

KERNELS = ("add_relu", "mma_conv", "pool_linear", "relu_max_pool", "stem")
KERNELS += ("wgmma_conv", "wgmma_pair")


@dataclass
class EmulatorError(Exception):
    """A kernel did something wrong, or refused its arguments."""

    kind: str
    text: str
    kernel: str = ""
    block: tuple[int, int, int] = (0, 0, 0)
    thread: int = -1
    place: str = ""

    def __str__(self) -> str:
        where = f"{self.kernel}, block {self.block}" if self.kernel else "host"
        if self.thread >= 0:
            where += f", thread {self.thread}"
        return f"{self.kind}: {self.text}\n  in {where}" + (
            f"\n  at {self.place}" if self.place else ""
        )


def kernel_name(signature: str) -> str:
    """The kernel out of the compiler's text for launch<kernel>."""
    name = signature.split("kKernel = ", 1)[-1].split("; Args", 1)[0].rstrip("]")
    return name.replace("resnet_fused::", "").replace("{anonymous}::", "")


def _size(t: Tensor) -> int:
    """Elements from the first to the last one of a tensor in memory."""
    if t.numel() == 0:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))


@dataclass
class Device:
    """The device buffers of one run."""

    native: ModuleType
    like: dict[int, Tensor] = field(default_factory=dict)

    def _allocate(self, t: Tensor, kind: str, misalign: int) -> int:
        size = _size(t)
        address: int = self.native.allocate(size * t.element_size(), kind, misalign)
        if size != t.numel():
            unit = torch.zeros(size, t.element_size(), dtype=torch.uint8)
            for part in unit.unbind(1):
                part.as_strided(t.shape, [s * unit.shape[1] for s in t.stride()]).fill_(1)
            unit = F.pad(unit.flatten(), (0, unit.numel() % 2)).view(-1, 2).amax(1)
            self.native.mark_elements(address, unit.numpy().tobytes())
        self.like[address] = t
        return address

    def _memory(self, address: int) -> Tensor:
        """A tensor over the buffer."""
        t = self.like[address]
        size = _size(t)
        if size == 0:
            return t.new_empty(t.shape)
        raw = (ctypes.c_char * (size * t.element_size())).from_address(address)
        return torch.frombuffer(raw, dtype=t.dtype, count=size).as_strided(t.shape, t.stride())

    def put(self, t: Tensor | None, misalign: int = 0) -> int | None:
        """A buffer with the tensor's elements at the tensor's strides, which kernels only read.

        It begins at the first element, ends at the last, and is ``misalign`` bytes past a multiple
        of 256. None stays None.
        """
        if t is None:
            return None
        address = self._allocate(t.detach(), "input", misalign)
        self._memory(address).copy_(t.detach())
        return address

    def out(self, like: Tensor, misalign: int = 0) -> int:
        """A poisoned buffer of the tensor's shape, strides and dtype, to be written once."""
        return self._allocate(like.detach(), "output", misalign)

    def scratch(self, nbytes: int, misalign: int = 0) -> int:
        """A poisoned buffer that kernels write and read."""
        return self._allocate(torch.empty(nbytes, dtype=torch.uint8), "scratch", misalign)

    def get(self, address: int) -> Tensor:
        """What a buffer holds, a copy; every element of an output must have been written."""
        unwritten = self.native.count_unwritten(address)
        if unwritten and self.like[address].dtype != torch.uint8:
            raise EmulatorError("never-written", f"{unwritten} units of two bytes of an output")
        return self._memory(address).clone()


@dataclass
class Library:
    """Kernels that were compiled for the emulator."""

    native: ModuleType
    path: Path
    failed: dict[str, str]  # kernels that do not compile: the compiler's words

    @contextmanager
    def run(self, seed: int = 1, workers: int = 2) -> Iterator[Device]:
        """Device buffers, and a schedule that depends on the seed alone."""
        native = self.native
        native.findings()
        native.release_buffers()
        native.configure(seed, True, workers)
        native.reset_counters()
        try:
            yield Device(native)
        except BaseException:
            native.release_buffers()
            native.findings()
            raise
        native.release_buffers()
        self._raise()

    def _raise(self) -> None:
        found = self.native.findings()
        if not found:
            return
        first = dict(found[0])
        program = first.pop("program")
        first["kernel"] = kernel_name(first["kernel"])
        raise EmulatorError(**first, place=self._place(program))

    def _place(self, program: int) -> str:
        """File and line of an instruction, innermost first, if addr2line is there."""
        if not program:
            return ""
        try:
            done = subprocess.run(
                ["addr2line", "-e", str(self.path), "-i", "-s", hex(program - 1)],
                capture_output=True,
                text=True,
            )
        except OSError:
            return ""
        lines = [
            line.split(" (")[0] for line in done.stdout.split("\n") if line[:1] not in ("", "?")
        ]
        return ", from ".join(dict.fromkeys(lines))

    def launch(self, kernel: str, **params: object) -> None:
        """Call a launch function; raises EmulatorError for whatever was wrong."""
        if kernel in self.failed:
            raise make.BuildError(self.failed[kernel])
        error = getattr(self.native, kernel)(**params)
        self._raise()
        if error != 0:
            raise EmulatorError("launch", f"{kernel} returned error {error}")

    def test_kernel(
        self,
        name: str,
        *pointers: int,
        numbers: Sequence[int] = (),
        grid: Sequence[int] = (1, 1, 1),
        threads: int = 32,
        shared: int = 0,
        maps: Sequence[bytes] = (),
        hopper: bool = False,
        dependent: bool = False,
    ) -> None:
        """Launch one of kernels/*.cu; raises EmulatorError for whatever was wrong."""
        if self.failed:
            raise make.BuildError("".join(self.failed.values()))
        error = self.native.test_kernel(
            name, pointers, numbers, grid, threads, shared, maps, hopper, dependent
        )
        self._raise()
        if error != 0:
            raise EmulatorError("launch", f"{name} returned error {error}")

    add_relu = functools.partialmethod(launch, "add_relu")
    mma_conv = functools.partialmethod(launch, "mma_conv")
    pool_linear = functools.partialmethod(launch, "pool_linear")
    relu_max_pool = functools.partialmethod(launch, "relu_max_pool")
    stem = functools.partialmethod(launch, "stem")
    wgmma_conv = functools.partialmethod(launch, "wgmma_conv")
    wgmma_pair = functools.partialmethod(launch, "wgmma_pair")

    def stats(self) -> dict[str, int]:
        """Counters since run() began: mma, ldmatrix, bank_conflicts, copied_bytes, ..."""
        return dict(self.native.counters())


def _load(path: Path) -> ModuleType:
    """Import a module; pybind11 takes two of one full name for the same."""
    name = "_".join(path.parent.parts[-3:]).replace(".", "_") + f".{path.stem}"
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def sources() -> list[Path]:
    """What another shared library needs besides the kernels: the emulator without Python."""
    return make.runtime_sources()


def cxxflags(checked: bool) -> list[str]:
    """Flags for a file of kernels in another shared library."""
    return make.cxxflags(checked)


def _kernel_of(stem: str) -> str:
    """The kernel that a source file belongs to: mma_conv_f16 is a part of mma_conv."""
    return next((k for k in KERNELS if stem.startswith(k)), stem)


def _runtime() -> list[make.Object]:
    flags = tuple(make.runtime_flags())
    return [
        make.Object(source, make.folder() / "runtime" / f"{source.stem}.o", flags)
        for source in sorted(make.RUNTIME.glob("*.cpp"))
    ]


def _compile(objects: Sequence[make.Object]) -> dict[str, str]:
    """Compile objects and the runtime; returns the kernels that failed and why."""
    runtime = _runtime()
    errors = make.compile_objects([*runtime, *objects], make.folder())
    for o in runtime:
        if o.target in errors:
            raise make.BuildError(errors[o.target])
    return {_kernel_of(o.stem): text for o, text in errors.items()}


def _build(variant: str, files: Sequence[Path], checks: bool) -> Library:
    """Compile kernels, link them with the runtime, load the module."""
    folder = make.folder()
    flags = tuple(make.cxxflags(checks))
    kernels = [make.Object(f, folder / variant / f"{f.stem}.o", flags) for f in files]
    with make.locked(folder / "lock"):
        failed = _compile(kernels)
        objects = [o.target for o in _runtime()]
        objects += [o.target for o in kernels if _kernel_of(o.target.stem) not in failed]
        library = folder / variant / "emulator_native.so"
        make.link(objects, library)
        return Library(_load(library), library, failed)


@functools.cache
def build(checks: bool = True) -> Library:
    """Compile the kernels (once per session) and load them.

    Args:
        checks: whether every load and store is checked; without, kernels run faster.
    """
    return _build("checked" if checks else "fast", make.kernel_sources(), checks)


@functools.cache
def build_tests(checks: bool = True) -> Library:
    """The small kernels of kernels/, which test the emulator itself."""
    files = sorted((make.HERE / "kernels").glob("*.cu"))
    return _build("tests_checked" if checks else "tests_fast", files, checks)


def build_variants(sources: Mapping[str, Mapping[str, Path]]) -> dict[str, Library]:
    """The kernels with some files replaced, all checked; ``sources``: file by variant and stem.

    The replacements come first for the linker: a function that several files share is theirs.
    """
    kernels = build()
    assert not kernels.failed, kernels.failed
    folder, flags = make.folder(), tuple(make.cxxflags(True, "-O1"))
    objects = {
        variant: [make.Object(f, f.with_suffix(".o"), flags) for f in files.values()]
        for variant, files in sources.items()
    }
    libraries = {}
    with make.locked(folder / "lock"):
        failed = _compile([o for some in objects.values() for o in some])
        assert not failed, failed
        for variant, own in objects.items():
            others = [f for f in make.kernel_sources() if f.stem not in sources[variant]]
            targets = [o.target for o in [*_runtime(), *own]]
            targets += [folder / "checked" / f"{f.stem}.o" for f in others]
            library = own[0].target.with_name("emulator_native.so")
            make.link(targets, library)
            libraries[variant] = Library(_load(library), library, {})
    return libraries
