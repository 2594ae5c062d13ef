# SPDX-License-Identifier: BSD-3-Clause
"""The checks of Hopper's instructions can fail: kernels with one thing wrong, and the same right.

Each kernel of kernels/broken_hopper.cu and broken_wgmma.cu is right if its first number is 1 and
wrong if it is 0.
"""

from __future__ import annotations

import re

import emulated
import pytest
import torch
from emulated import EmulatorError, Library
from emulator_build import HERE
from tensor_maps import tiled

# Kernel, what the checks call the fault. Who comes first may decide.
BROKEN = [
    ("no_init_fence", "proxy"),
    ("no_barrier_behind_init", "race|uninitialised"),
    ("made_twice", "instruction"),
    ("misaligned_barrier_object", "misaligned"),
    ("barrier_object_overwritten", "barrier-object"),
    ("too_many_arrivals", "over-arrival"),
    ("no_phase_ends", "deadlock"),
    ("one_lane_for_all", "race"),
    ("copy_not_waited_for", "in-flight|uninitialised"),
    ("copy_waited_for_by_one", "in-flight|uninitialised"),
    ("copy_waited_for_with_other_parity", "in-flight|uninitialised"),
    ("too_little_announced", "expect-tx"),
    ("one_copy_announced_of_two", "expect-tx"),
    ("too_much_announced", "deadlock"),
    ("ends_with_a_copy_from_a_tensor", "in-flight"),
    ("copy_over_what_is_read", "race|in-flight"),
    ("copy_over_what_was_written", "proxy"),
    ("misaligned_tile", "misaligned"),
    ("copy_beyond_shared_memory", "out-of-bounds"),
    ("copy_of_another_rank", "tensor-map"),
    ("map_of_nobody", "tensor-map"),
    ("store_of_what_is_not_fenced", "proxy"),
    ("store_fenced_by_another", "proxy"),
    ("store_without_a_barrier", "race|uninitialised"),
    ("written_under_a_store", "in-flight"),
    ("ends_with_a_copy_to_a_tensor", "in-flight"),
    ("stored_twice", "double-write"),
    ("grid_not_waited_for", "grid-wait"),
    ("grid_waited_for_by_another", "grid-wait"),
    ("grid_waited_for_without_a_fence", "proxy"),
    ("not_for_hopper", "instruction"),
    ("no_wgmma_fence", "wgmma-fence"),
    ("no_wgmma_fence_behind_a_sum", "wgmma-fence"),
    ("sums_read_too_early", "in-flight"),
    ("sums_not_named", "in-flight"),
    ("one_wgmma_too_many_under_way", "in-flight"),
    ("wgmma_not_committed", "in-flight"),
    ("ends_with_a_wgmma", "in-flight"),
    ("wgmma_of_what_is_not_fenced", "proxy"),
    ("wgmma_of_what_one_warp_waited_for", "in-flight"),
    ("slot_given_back_too_early", "in-flight"),
    ("misaligned_operand", "misaligned"),
    ("other_operand_in_one_thread", "divergent-collective"),
    ("three_warps_multiply", "deadlock"),
    ("half_a_warp_fences", "divergent-collective|deadlock"),
    ("other_swizzle", "instruction"),
    ("not_rounded_to_tf32", "operand"),
    ("more_registers_than_there_are", "deadlock"),
    ("takes_while_it_gives", "instruction"),
    ("one_warp_gives_registers", "divergent-collective"),
    ("a_warp_gives_other_registers", "divergent-collective"),
    ("other_count_at_a_barrier", "divergent-barrier"),
    ("a_warp_misses_a_barrier", "deadlock"),
    ("half_a_warp_at_a_barrier", "divergent-barrier"),
    ("barrier_of_syncthreads", "instruction"),
    ("another_barrier", "race|uninitialised"),
    ("half_a_warp_elects", "divergent-collective|deadlock"),
]
DEPENDENT = ("grid_not_waited_for", "grid_waited_for_by_another", "grid_waited_for_without_a_fence")


@pytest.fixture(scope="module")
def library() -> Library:
    return emulated.build_tests()


def run(library: Library, kernel: str, right: bool, seed: int) -> torch.Tensor:
    """Launch one of the broken kernels; its 256 floats."""
    x = torch.zeros(64, 64, dtype=torch.half)
    with library.run(seed, workers=1) as dev:
        places = [dev.put(x), dev.put(x), dev.out(x)]
        out = dev.scratch(4 * 256)
        library.test_kernel(
            kernel,
            out,
            maps=[tiled(library, place, x, (64, 64)) for place in places],
            numbers=[int(right)],
            threads=256,
            shared=1024 + 3 * 8192 + 64,
            hopper=kernel != "not_for_hopper",
            dependent=kernel in DEPENDENT,
        )
        return dev.get(out).view(torch.float32)


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
    names = [
        name
        for file in ("broken_hopper.cu", "broken_wgmma.cu")
        for name in re.findall(r"^KERNEL\((\w+)\)", (HERE / "kernels" / file).read_text(), re.M)
    ]
    assert names == [name for name, _ in BROKEN]


def test_a_deadlock_lists_the_barrier_objects(library: Library) -> None:
    """A report that says only that something hangs."""
    with pytest.raises(EmulatorError) as caught:
        run(library, "too_much_announced", right=False, seed=1)
    text = caught.value.text
    assert re.search(r"wait at the barrier object at byte \d+ for parity 0;", text), text
    assert "in phase 0 lacks 0 of 1 arrivals and 16 bytes" in text
    with pytest.raises(EmulatorError, match="setmaxnreg for 256 registers, of which 0 are free"):
        run(library, "more_registers_than_there_are", right=False, seed=1)


@pytest.mark.parametrize(
    "kernel",
    [
        "too_many_arrivals",
        "too_much_announced",
        "misaligned_tile",
        "no_wgmma_fence",
        "ends_with_a_wgmma",
    ],
)
def test_found_without_instrumentation(kernel: str) -> None:
    """Speed bought with blindness: what instructions do is checked in every build."""
    kind = dict(BROKEN)[kernel]
    fast = emulated.build_tests(checks=False)
    run(fast, kernel, right=True, seed=1)
    with pytest.raises(EmulatorError) as caught:
        run(fast, kernel, right=False, seed=1)
    assert re.fullmatch(kind, caught.value.kind), str(caught.value)


def test_poison_without_instrumentation() -> None:
    """Sums and copies that are looked at too early must not look right by luck."""
    fast = emulated.build_tests(checks=False)
    for kernel in ("sums_not_named", "copy_not_waited_for"):
        for seed in range(10):
            out = run(fast, kernel, right=False, seed=seed)[:128]
            assert (out.isnan() | (out > 0)).any(), kernel  # all is 0 where it was waited for
