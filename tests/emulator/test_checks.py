# SPDX-License-Identifier: BSD-3-Clause
"""The emulator's checks can fail: kernels with one thing wrong, and the same ones right.

Each kernel of kernels/broken.cu is right if its first number is 1 and wrong if it is 0.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import emulated
import pytest
import torch
from emulated import EmulatorError, Library
from emulator_build import HERE, BuildError

# Kernel, what the checks call the fault. Who comes first may decide: what is read without a barrier
# was written too early or not at all.
BROKEN = [
    ("write_barrier_read", "race|uninitialised"),
    ("read_barrier_write", "race"),
    ("two_writers", "race"),
    ("warp_barrier_only", "race|uninitialised"),
    ("no_warp_barrier", "race|uninitialised"),
    ("shuffle_is_no_barrier", "race|uninitialised"),
    ("never_waited", "in-flight"),
    ("waited_by_another", "race|in-flight|uninitialised"),
    ("never_committed", "in-flight"),
    ("copy_into_what_is_read", "race"),
    ("ends_with_a_copy", "in-flight"),
    ("global_read_beyond", "out-of-bounds"),
    ("global_read_before", "out-of-bounds"),
    ("global_write_beyond", "out-of-bounds"),
    ("copy_beyond", "out-of-bounds"),
    ("shared_beyond", "out-of-bounds"),
    ("wide_shared_beyond", "out-of-bounds"),
    ("misaligned_vector", "misaligned"),
    ("misaligned_element", "misaligned"),
    ("misaligned_shared_store", "misaligned"),
    ("misaligned_copy", "misaligned"),
    ("misaligned_copy_source", "misaligned"),
    ("too_long_copy", "instruction"),
    ("misaligned_matrix", "misaligned"),
    ("uninitialised_shared", "uninitialised"),
    ("uninitialised_matrix", "uninitialised"),
    ("uninitialised_scratch", "uninitialised"),
    ("scratch_without_barrier", "race|uninitialised"),
    ("ended_lanes_at_barrier", "divergent-barrier"),
    ("two_barriers", "divergent-barrier"),
    ("barrier_against_shuffle", "deadlock"),
    ("half_a_warp_multiplies", "divergent-collective|deadlock"),
    ("two_instructions_in_a_warp", "divergent-collective"),
    ("partial_mask", "partial-mask"),
    ("written_twice", "double-write"),
    ("written_by_two_blocks", "double-write"),
    ("read_from_another_block", "race|uninitialised"),
    ("not_written", "never-written"),
    ("input_written", "input-written"),
    ("register_index", "undefined"),
    ("host_pointer", "out-of-bounds"),
]
SHARED = {
    "ends_with_a_copy": 1024,
    "copy_beyond": 1024,
    "misaligned_matrix": 1024,
    "uninitialised_matrix": 512,
}
TWO_BLOCKS = ("written_by_two_blocks", "read_from_another_block")


@pytest.fixture(scope="module")
def library() -> Library:
    return emulated.build_tests()


def run(library: Library, kernel: str, right: bool, seed: int) -> None:
    """Launch one of the broken kernels."""
    x = torch.randn(64)
    with library.run(seed) as dev:
        out = dev.out(x)
        library.test_kernel(
            kernel,
            dev.put(x),
            out,
            dev.scratch(256),
            numbers=[int(right)],
            grid=(2 if kernel in TWO_BLOCKS else 1, 1, 1),
            threads=64,
            shared=SHARED.get(kernel, 256),
        )
        dev.get(out)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("kernel", "kind"), BROKEN, ids=[name for name, _ in BROKEN])
def test_caught_on_every_schedule(library: Library, kernel: str, kind: str, seed: int) -> None:
    """A check that does not fail, or fails only by luck."""
    with pytest.raises(EmulatorError) as caught:
        run(library, kernel, right=False, seed=seed)
    assert re.fullmatch(kind, caught.value.kind), str(caught.value)


@pytest.mark.parametrize("kernel", [name for name, _ in BROKEN])
def test_no_false_alarm(library: Library, kernel: str) -> None:
    """A check that also fails what is right."""
    for seed in range(10):
        run(library, kernel, right=True, seed=seed)


def test_every_broken_kernel_is_in_the_table() -> None:
    """A kernel that nobody runs."""
    text = (HERE / "kernels" / "broken.cu").read_text()
    assert re.findall(r"TEST_KERNEL\((\w+)\)", text) == [name for name, _ in BROKEN]


def test_a_report_names_the_place(library: Library) -> None:
    """A finding from which nobody can tell where to look."""
    with pytest.raises(EmulatorError) as caught:
        run(library, "not_written", right=False, seed=1)
    assert "never-written" in str(caught.value)
    with pytest.raises(EmulatorError) as caught:
        run(library, "global_read_beyond", right=False, seed=1)
    error = caught.value
    assert error.kernel == "global_read_beyond" and error.block == (0, 0, 0)
    assert error.thread == 63 and "byte 256 of an input buffer of 256 bytes" in error.text
    assert re.search(r"broken\.cu:\d+", error.place), error.place


def test_a_deadlock_lists_who_waits(library: Library) -> None:
    """A report that says only that something hangs."""
    with pytest.raises(EmulatorError) as caught:
        run(library, "barrier_against_shuffle", right=False, seed=1)
    text = caught.value.text
    assert "warp 0 lanes 0-15 wait at a shuffle; warp 0 lanes 16-31 wait at __syncthreads" in text


@pytest.mark.parametrize(
    ("grid", "threads", "shared"),
    [
        ((0, 1, 1), 64, 0),
        ((1, 65536, 1), 64, 0),
        ((1, 1, 1), 1056, 0),
        ((1, 1, 1), 64, 99 * 1024 + 1),
    ],
)
def test_launch_limits(
    library: Library, grid: tuple[int, int, int], threads: int, shared: int
) -> None:
    """A launch that some GPU from sm_80 on would refuse."""
    with library.run() as dev, pytest.raises(EmulatorError) as caught:
        library.test_kernel("indices", dev.scratch(64), grid=grid, threads=threads, shared=shared)
    assert caught.value.kind == "launch"


def test_an_uninstrumented_build_still_poisons() -> None:
    """Speed bought with blindness: without instrumentation, a missing wait gives NaN."""
    fast = emulated.build_tests(checks=False)
    assert not fast.native.checks_every_access()
    x = torch.randn(64)
    seen = set()
    for seed in range(20):
        with fast.run(seed) as dev:
            out = dev.out(x)
            fast.test_kernel("never_waited", dev.put(x), out, numbers=[0], threads=64, shared=256)
            seen.add(bool(dev.get(out).isnan().any()))
    assert True in seen


def test_memory_beside_a_buffer_is_watched_without_instrumentation() -> None:
    """A store beyond the end that no call-back sees."""
    fast = emulated.build_tests(checks=False)
    x = torch.randn(64)
    with pytest.raises(EmulatorError, match="beside"), fast.run() as dev:
        out = dev.out(x)
        fast.test_kernel("global_write_beyond", dev.put(x), out, numbers=[0], threads=64)


def test_holes_of_a_strided_buffer_are_out_of_bounds(library: Library) -> None:
    """A kernel that ignores strides and reads what lies between the rows."""
    x = torch.randn(8, 16)[:, :8]
    with library.run() as dev, pytest.raises(EmulatorError, match="between two rows"):
        library.test_kernel(
            "global_read_beyond", dev.put(x), dev.scratch(256), numbers=[1], threads=64
        )


def test_lenient_buffers(library: Library) -> None:
    """Kernels within another library work on memory nobody registered; shared memory is checked."""
    x, out = torch.randn(64), torch.empty(64)
    with library.run():
        pointers = (x.data_ptr(), out.data_ptr())
        library.native.configure(1, False, 2)
        library.test_kernel("write_barrier_read", *pointers, numbers=[1], threads=64, shared=256)
        assert torch.equal(out, x.flip(0))
        with pytest.raises(EmulatorError):
            library.test_kernel(
                "write_barrier_read", *pointers, numbers=[0], threads=64, shared=256
            )


def test_launches_from_many_threads(library: Library) -> None:
    """Two launches that mix: torch may call from several threads."""
    x = torch.randn(8, 64)
    out = torch.empty_like(x)

    def launch(i: int) -> None:
        for _ in range(20):
            library.test_kernel(
                "write_barrier_read",
                x[i].data_ptr(),
                out[i].data_ptr(),
                numbers=[1],
                threads=64,
                shared=256,
            )

    with library.run():
        library.native.configure(1, False, 2)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(launch, range(8)))
    assert torch.equal(out, x.flip(1))


def test_a_kernel_that_does_not_compile(tmp_path: Path) -> None:
    """A kernel left out in silence: calling it must say what the compiler said."""
    broken = tmp_path / "add_relu.cu"
    broken.write_text("int launch_add_relu_cuda() { return no_such_name; }")
    library = emulated._build("tests_uncompiled", [broken], checks=True)
    with pytest.raises(BuildError, match="no_such_name"):
        library.add_relu(n=1)
