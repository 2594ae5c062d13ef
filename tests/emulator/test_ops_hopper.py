# SPDX-License-Identifier: BSD-3-Clause
"""The ops on the kernels for Hopper GPUs: which convolutions reach them, and whole networks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import emulated_ops
import emulator_build
import pytest
import torch
from emulated_ops import Launch, instead_of_cpu, launches

import resnet_fused
from harness.bounds import assert_within
from harness.case import DTYPES, Op, Source
from harness.table import TABLE
from harness.wgmma_plan import tiles
from resnet_cases import exact, images, lively, relative, rounded
from resnet_fused import ops
from resnet_fused.bench import expected
from source_tree import benchmarks

gpu_sanitize = benchmarks("gpu_sanitize")


def kernels(launched: list[Launch]) -> list[tuple[str, int]]:
    """The family and tile of each convolution that was launched."""
    found = [re.fullmatch(r"(w?g?mma)_conv_kernel<\w+, (\d+)>", x.kernel) for x in launched]
    return [(m[1], int(m[2])) for m in found if m]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("depth", [18, 50])
def test_networks_op_by_op(depth: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if any layer of a network is wrong, or left to the other family: each op is held
    against float64 on its own input.
    """
    model = lively(getattr(resnet_fused, f"resnet{depth}")()).to(dtype)
    model = model.to(memory_format=torch.channels_last)
    x = images(2, 3, 64, 64, dtype=dtype)
    for name in ("stem", "basic_block", "bottleneck", "pool_linear"):

        def check(*args: Any, _op: Op = TABLE[name]) -> torch.Tensor:
            y = _op.call(*args)
            assert_within(y, _op.exact(dtype, "tensor cores", *args))
            return y

        monkeypatch.setattr(ops, name, check)
    with torch.inference_mode(), instead_of_cpu(hopper=1) as library:
        got = model(x)
        launched = kernels(launches(library))
    monkeypatch.undo()
    assert {family for family, _ in launched} == {"wgmma"}
    assert len(launched) == (16 if depth == 18 else 48), "a kernel for each, projections within"
    want = exact(model, x)
    coarse = torch.float16 if dtype == torch.float32 else dtype
    assert relative(got, want) < 1.5 * relative(rounded(model, x, coarse), want)


def test_what_does_not_fit_goes_to_the_other_family() -> None:
    """Breaks if a convolution that the copy unit cannot bring reaches it, or fails."""
    s = Source(torch.float16)
    for x, conv, family in (
        (s.image(1, 64, 6, 6), s.conv(64, 64, 3), "wgmma"),
        (s.image(1, 60, 6, 6), s.conv(60, 64, 3), "mma"),
        (s.image(1, 64, 20, 20), s.conv(64, 64, 3, stride=(9, 1)), "mma"),
    ):
        with instead_of_cpu(hopper=1) as library:
            got = ops.conv_bn_act(x, conv)
            assert [f for f, _ in kernels(launches(library))] == [family]
        assert_within(got, TABLE["conv_bn_act"].exact(torch.float16, "tensor cores", x, conv))


def test_only_where_it_is_asked_for_and_on_a_hopper() -> None:
    """Breaks if kernels that no GPU has run are the default, or run on another GPU."""
    s = Source(torch.float16)
    args = s.image(1, 64, 6, 6), s.conv(64, 64, 3)
    for gpu, wanted, family in ((1, 0, "mma"), (0, 1, "mma"), (1, 1, "wgmma")):
        with instead_of_cpu() as library:
            library.emulated_hopper(gpu)
            library.resnet_fused_set_hopper(wanted)
            assert library.resnet_fused_hopper() == wanted
            ops.conv_bn_act(*args)
            assert [f for f, _ in kernels(launches(library))] == [family]
            library.emulated_hopper(0)
            with gpu_sanitize.forced((9, 1), library, hopper=1):  # on another GPU
                ops.conv_bn_act(*args)
            assert [f for f, _ in kernels(launches(library))] == ["mma"]
            library.resnet_fused_set_hopper(0)


@pytest.mark.parametrize(("value", "on"), [("1", 1), ("pairs", 2), ("0", 0), ("yes", 0)])
def test_the_environment_switches_them_on(value: str, on: int) -> None:
    """Breaks if RESNET_FUSED_HOPPER is not read, or another value is taken for one of its own."""
    emulated_ops.library()
    program = "import ctypes, sys, torch; print(ctypes.CDLL(sys.argv[1]).resnet_fused_hopper())"
    built = emulator_build.folder() / "ops" / "emulated_ops.so"
    done = subprocess.run(
        [sys.executable, "-c", program, str(built)],
        env={**os.environ, "RESNET_FUSED_HOPPER": value},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == str(on), done.stderr


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forced_plans_reach_every_kernel(dtype: torch.dtype) -> None:
    """Breaks if a plan that is forced is not taken, or a kernel, split or not, is in none of the
    calls that compute-sanitizer and the tests on a GPU force.
    """
    seen = set()
    for (tile, splits), case in gpu_sanitize.planned(dtype, hopper=1):
        with instead_of_cpu() as library, gpu_sanitize.forced((tile, splits), library, True):
            library.emulated_hopper(1)
            y = case.run()
            launched = launches(library)
        error, bound = case.expect(expected.roundings(dtype, "cuda")).worst(y)
        assert error <= bound, case.name
        for launch, after in zip(launched, [*launched[1:], None], strict=True):
            split = after is not None and after.kernel.startswith("split_sum_kernel")
            seen |= {(t, split) for family, t in kernels([launch]) if family == "wgmma"}
    table = list(enumerate(tiles(dtype.itemsize)))
    whole = {(i, False) for i, t in table if t.exists}
    assert seen == whole | {(i, True) for i, t in table if t.exists and t.sources == 1}


@pytest.mark.parametrize("multiprocessors", [1, 20, 132])
def test_any_number_of_multiprocessors(multiprocessors: int) -> None:
    """Breaks if a plan that another GPU would get is wrong, or its workspace too small; or, with
    the invariant setting, an image depends on those beside it.
    """
    s = Source(torch.bfloat16)
    convs = s.conv(1024, 256), s.conv(256, 256, 3, stride=(2, 2)), s.conv(256, 256)
    args = (s.image(3, 1024, 4, 4), *convs, s.conv(1024, 256, stride=(2, 2)))
    want = TABLE["bottleneck"].exact(torch.bfloat16, "tensor cores", *args)
    with instead_of_cpu(multiprocessors=multiprocessors, hopper=1) as library:
        assert_within(ops.bottleneck(*args), want)
        split = [x for x in launches(library) if x.kernel.startswith("split_sum_kernel")]
        assert bool(split) == (multiprocessors > 1)
    with instead_of_cpu(multiprocessors=multiprocessors, invariant=True, hopper=1):
        together = ops.bottleneck(*args)
        alone = [ops.bottleneck(x, *args[1:]) for x in args[0].split(1)]
    assert torch.equal(together, torch.cat(alone))
