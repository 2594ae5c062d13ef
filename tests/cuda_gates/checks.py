# SPDX-License-Identifier: BSD-3-Clause
"""What every kernel must keep, each a function from a kernel to its violations."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from cuda_gates.kernels import Kernel
from source_tree import ROOT

REGISTERS = 65536  # 32-bit ones of a multiprocessor, from sm_80 to sm_120
MOST_THREADS = 1024

TENSOR_CORES = (r"HMMA\.", r"LDSM\.16\.M88\.4")  # products, and operands by ldmatrix
WIDE = (r"LDG\.E(\.\w+)*\.128", r"STG\.E(\.\w+)*\.128")  # 16 bytes in one access
ASYNC = (r"LDGSTS\.E\.BYPASS\.(LTC128B\.)?128",)  # 16 bytes past the registers and L1

# What a kernel for Hopper is made of: copies by the copy unit both ways, barrier objects, registers
# that change hands, waiting for the kernel before and making way for the next.
HOPPER = (
    r"UTMALDG\.2D",
    r"UTMALDG\.3D",
    r"UTMALDG\.4D\.IM2COL",
    r"UTMASTG\.2D",
    r"SYNCS\.PHASECHK\.TRANS64\.TRYWAIT",
    r"FENCE\.VIEW\.ASYNC",
    r"USETMAXREG\.DEALLOC",
    r"USETMAXREG\.TRY_ALLOC",
    "ACQBULK",
    "PREEXIT",
)

KEEPS_NAN = (r"V?[FH]MNMX\w*(\.\w+)*\.NAN",)
# By element type: the product, and what rounds to the type, always to nearest.
PRODUCTS = {
    "Half": r"HMMA\.16816\.F32",
    "BFloat": r"HMMA\.16816\.F32\.BF16",
    "float": r"HMMA\.1688\.F32\.TF32",
}
WARPGROUP_PRODUCTS = {
    "Half": r"HGMMA\.64x\d+x16\.F32",
    "BFloat": r"HGMMA\.64x\d+x16\.F32\.BF16",
    "float": r"HGMMA\.64x\d+x8\.F32\.TF32",
}
ROUNDINGS = {
    "Half": r"F2F\.F16\.F32|F2FP\.(F16\.F32\.)?PACK_AB",
    "BFloat": r"F2F\.BF16\.F32|F2FP\.BF16\.(F32\.)?PACK_AB",
}


class Row(NamedTuple):
    """What is expected of the kernels whose name matches, and why so many registers are allowed.

    `blocks` is how many blocks a multiprocessor must hold at once, or more if the kernel's launch
    bounds say so; the ceiling follows: registers x threads x blocks <= 65536. 0: never launched.
    """

    pattern: str
    blocks: int
    reason: str
    opcodes: tuple[str, ...] = ()
    rounds: bool = True  # its results to its element type

    def matches(self, kernel: Kernel) -> bool:
        return re.fullmatch(self.pattern, kernel.name) is not None


def conv_rows(plan: str) -> tuple[Row, ...]:
    """Rows of the convolution's tiles, which kernels name by their place in conv_plan.h's list."""
    entries = re.search(r"kMmaTiles\[\] = \{(.*?)\n\};", plan, re.S)
    narrow = re.findall(r"\{[^{}]*(true|false)\}", entries[1]) if entries else []
    wide = [str(at) for at, text in enumerate(narrow) if text == "false"]
    rest = [str(at) for at, text in enumerate(narrow) if text == "true"]
    why = "two blocks at least, so that one multiplies while the other waits or stores"
    return (
        Row(rf"mma_conv_kernel<\w+, ({'|'.join(wide)})>", 2, why, TENSOR_CORES + ASYNC + WIDE[1:]),
        Row(rf"mma_conv_kernel<\w+, ({'|'.join(rest)})>", 2, why, TENSOR_CORES),
    )


def hopper_rows(plan: str) -> tuple[Row, ...]:
    """Rows of the Hopper convolution's tiles, by columns: wgmma takes all of them at once."""
    entries = re.search(r"kWgmmaTiles\[\] = \{(.*?)\n\};", plan, re.S)
    columns = re.findall(r"\{\d+, (\d+), [^{}]*\}", entries[1]) if entries else []
    why = "a block has all registers of a multiprocessor, and deals them out anew"
    rows = []
    for wanted in sorted(set(columns), key=int):
        tiles = "|".join(str(i) for i, found in enumerate(columns) if found == wanted)
        instructions = (rf"HGMMA\.64x{wanted}x", *HOPPER)
        rows.append(Row(rf"wgmma_conv_kernel<\w+, ({tiles})>", 1, why, instructions))
    return tuple(rows)


def pair_rows(plan: str) -> tuple[Row, ...]:
    """Rows of the kernels that run two convolutions as one: both products, by their columns."""
    entries = re.search(r"kWgmmaPairTiles\[\] = \{(.*?)\n\};", plan, re.S)
    sizes = re.findall(r"\{\d+, (\d+), (\d+), [^{}]*\}", entries[1]) if entries else []
    why = "as the Hopper convolution"
    return tuple(
        Row(
            rf"wgmma_pair_kernel<\w+, {i}>",
            1,
            why,
            (rf"HGMMA\.64x{middle}x", rf"HGMMA\.64x{columns}x", *HOPPER),
        )
        for i, (middle, columns) in enumerate(sizes)
    )


HOPPER_PLAN = (ROOT / "csrc/kernels/cuda/wgmma_plan.h").read_text()
TABLE = (
    *hopper_rows(HOPPER_PLAN),
    *pair_rows((ROOT / "csrc/kernels/cuda/wgmma_pair_plan.h").read_text()),
    *conv_rows((ROOT / "csrc/kernels/cuda/conv_plan.h").read_text()),
    Row(
        r"split_sum_kernel<\w+, \w+>",
        3,
        "3 x 256 threads with 8 loads of 16 bytes each keep 96 KB in flight",
    ),
    Row(
        r"add_relu_vector_kernel<\w+>",
        5,
        "5 x 256 threads with 8 loads of 16 bytes each keep 160 KB in flight",
        WIDE,
    ),
    Row(r"add_relu_scalar_kernel<\w+>", 6, "occupancy only: one element per thread"),
    Row(
        r"stem_kernel<\w+, [\w ]+>",
        2,
        "one block multiplies while the other loads or pools; shared memory allows two as well",
        TENSOR_CORES + KEEPS_NAN,
    ),
    Row(r"relu_max_pool_kernel<\w+, [48]>", 4, "9 loads of 16 bytes per thread in flight", WIDE),
    Row(r"relu_max_pool_kernel<\w+, 1>", 4, "as the wide one"),
    Row(r"pool_kernel<\w+, true>", 4, "4 loads of 16 bytes per thread in flight", WIDE[:1], False),
    Row(r"pool_kernel<\w+, false>", 4, "as the wide one", rounds=False),
    Row(
        r"linear_kernel<\w+, 4, 8, true>",
        2,
        "32 sums per thread, 48 operands; a second block hides the loads",
        WIDE[:1],
    ),
    Row("probe_kernel", 0, "only asked for, to learn whether code for this GPU was built"),
    Row(r"linear_kernel<\w+, 1, 1, \w+>", 4, "the weights' loads limit it, so many in flight"),
)


def row_of(kernel: Kernel, table: tuple[Row, ...] = TABLE) -> Row | None:
    """The row that speaks for a kernel."""
    return next((row for row in table if row.matches(kernel)), None)


def ceiling(threads: int, blocks: int) -> int:
    """Most registers per thread that let `blocks` blocks share a multiprocessor.

    Registers are handed out to warps in units of 256, 8 per thread.
    """
    return min(255, REGISTERS // (threads * blocks) // 8 * 8)


# ---------------------------------------------------------------------------------- the checks
def no_local_memory(kernel: Kernel) -> list[str]:
    """Nothing of a thread lies in local memory: no spills, no stack, no such access."""
    found = [
        f"{kernel}: {count} bytes of {what}"
        for what, count in (
            ("spill stores", kernel.spill_stores),
            ("spill loads", kernel.spill_loads),
            ("stack frame", kernel.stack),
        )
        if count
    ]
    local = sorted(o for o in kernel.opcodes if o.split(".")[0] in ("LDL", "STL"))
    return found + ([f"{kernel}: {', '.join(local)}"] if local else [])


def known(kernel: Kernel) -> list[str]:
    """The table speaks for the kernel, whose code and registers were found."""
    found = [] if row_of(kernel) else [f"{kernel}: no row in the table of tests/cuda_gates"]
    if not kernel.opcodes or not kernel.registers:
        found.append(f"{kernel}: no code or no registers in the reports")
    if "12resnet_fused" not in kernel.symbol:  # benchmarks select our kernels by it
        found.append(f"{kernel}: outside of namespace resnet_fused")
    return found


def launch_bounds(kernel: Kernel) -> list[str]:
    """__launch_bounds__ names whole warps, and no more threads than a block may have."""
    row = row_of(kernel)
    if row and row.blocks == 0:
        return []
    if not kernel.threads:
        return [f"{kernel}: no __launch_bounds__"]
    if kernel.threads % 32 or kernel.threads > MOST_THREADS:
        return [f"{kernel}: {kernel.threads} threads"]
    return []


def few_registers(kernel: Kernel) -> list[str]:
    """As many blocks fit into the registers of a multiprocessor as the table promises."""
    row = row_of(kernel)
    if row is None or not kernel.threads or row.blocks == 0:
        return []
    blocks = max(row.blocks, kernel.min_blocks)
    most = ceiling(kernel.threads, blocks)
    if kernel.registers <= most:
        return []
    return [
        f"{kernel}: {kernel.registers} registers, at most {most} for {blocks} blocks of "
        f"{kernel.threads} threads ({row.reason})"
    ]


def registers_to_hand_on(kernel: Kernel) -> list[str]:
    """A kernel that hands on registers begins with those that its plan counts with.

    ptxas says nothing of it; with fewer, who asks for more would wait for ever.
    """
    if not any(opcode.startswith("USETMAXREG") for opcode in kernel.opcodes):
        return []
    planned = re.search(r"\bkLaunchRegisters = (\d+)\b", HOPPER_PLAN)
    if planned and int(planned[1]) == kernel.registers:
        return []
    return [f"{kernel}: {kernel.registers} registers, {planned and planned[1]} in the plan"]


def no_static_shared(kernel: Kernel) -> list[str]:
    """All shared memory is dynamic: launches can state it, and the emulator bound it."""
    return [f"{kernel}: {kernel.static_shared} bytes static"] if kernel.static_shared else []


def expected_instructions(kernel: Kernel) -> list[str]:
    """The instructions that the kernel was written for are in its code."""
    row = row_of(kernel)
    return [
        f"{kernel}: no {wanted}"
        for wanted in (row.opcodes if row else ())
        if not any(re.match(wanted, opcode) for opcode in kernel.opcodes)
    ]


def right_numbers(kernel: Kernel) -> list[str]:
    """Products and results of the kernel's type, rounded to nearest; maxima that keep NaN."""
    row, found = row_of(kernel), re.search(r"<(\w+)", kernel.name)
    kind = found[1] if found else ""
    allowed = {
        "HMMA": PRODUCTS.get(kind, ""),
        "HGMMA": WARPGROUP_PRODUCTS.get(kind, ""),
        "F2F": "|".join(ROUNDINGS.values()),
        "FMNMX": KEEPS_NAN[0],
        "HMNMX": KEEPS_NAN[0],
        "VHMNMX": KEEPS_NAN[0],
    }
    wrong = [
        f"{kernel}: {opcode}"
        for opcode in sorted(kernel.opcodes)
        for family, pattern in allowed.items()
        if opcode.startswith(family) and not re.fullmatch(pattern, opcode)
    ]
    rounding = ROUNDINGS.get(kind) if row and row.rounds else None
    if rounding and not any(re.fullmatch(rounding, opcode) for opcode in kernel.opcodes):
        wrong.append(f"{kernel}: no rounding to {kind}")
    return wrong


CHECKS: tuple[Callable[[Kernel], list[str]], ...] = (
    no_local_memory,
    known,
    launch_bounds,
    few_registers,
    registers_to_hand_on,
    no_static_shared,
    expected_instructions,
    right_numbers,
)
