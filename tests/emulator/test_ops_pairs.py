# SPDX-License-Identifier: BSD-3-Clause
"""Blocks whose last two convolutions run as one kernel: the bits of two kernels, on any GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulated_ops import instead_of_cpu, launches
from torch import Tensor, nn

import resnet_fused
from harness.bounds import assert_within
from harness.case import Source
from harness.table import TABLE
from harness.wgmma_plan import pair_tiles
from resnet_cases import images, lively
from resnet_fused import ops
from resnet_fused.bench import expected
from source_tree import benchmarks

gpu_sanitize = benchmarks("gpu_sanitize")
HALVES = (torch.float16, torch.bfloat16)


def kinds(library: Any) -> list[str]:
    """The kernels that were launched, without template arguments."""
    return [launch.kernel.partition("<")[0] for launch in launches(library)]


def both_ways(call: Any) -> tuple[Tensor, list[str]]:
    """The result wherever two convolutions can be one kernel, and its kernels; two kernels must
    make the same bits, where they do not split sums.
    """
    with instead_of_cpu(hopper=1, multiprocessors=1) as library:
        want = call()
        assert "wgmma_pair_kernel" not in kinds(library)
    with instead_of_cpu(hopper=1, multiprocessors=4) as library, gpu_sanitize.pairs(library):
        got = call()
        launched = kinds(library)
    assert torch.equal(got.view(torch.int16), want.view(torch.int16))
    return got, launched


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("mid", "stride"), [(64, 1), (64, 2), (128, 1), (128, 2)])
def test_bottleneck(mid: int, stride: int, dtype: torch.dtype) -> None:
    """Breaks if the two ways differ, or a block with or without a projection is left to two."""
    s = Source(dtype)
    convs = s.conv(72, mid), s.conv(mid, mid, 3, stride=(stride, stride)), s.conv(mid, 72)
    side = [s.conv(72, 72, stride=(stride, stride))] if stride == 2 else []
    args = (s.image(2, 72, 15, 13), *convs, *side)
    got, launched = both_ways(lambda: ops.bottleneck(*args))
    assert launched == ["wgmma_conv_kernel", "wgmma_pair_kernel"]
    assert_within(got, TABLE["bottleneck"].exact(dtype, "tensor cores", *args))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_stages_of_a_network(dtype: torch.dtype) -> None:
    """Breaks if a block of ResNet-50's first two stages cannot be had in two kernels; or one of the
    third can, whose tensor between is too wide.
    """
    model = lively(resnet_fused.resnet50()).to(dtype).to(memory_format=torch.channels_last)
    stages = nn.Sequential(model.layer1, model.layer2, model.layer3[0])
    x = images(1, 64, 16, 16, dtype=dtype)
    with torch.inference_mode():
        _, launched = both_ways(lambda: stages(x))
    assert launched == ["wgmma_conv_kernel", "wgmma_pair_kernel"] * 7 + ["wgmma_conv_kernel"] * 3


def test_what_stays_with_two_kernels() -> None:
    """Breaks if a block reaches the kernel that cannot make it."""
    s, full = Source(torch.float16), Source(torch.float32)
    for gpu, args in (
        # A tensor between of another width, too many filters, float32, another GPU.
        (1, (s.image(1, 64, 6, 6), s.conv(64, 72), s.conv(72, 72, 3), s.conv(72, 64))),
        (1, (s.image(1, 520, 6, 6), s.conv(520, 64), s.conv(64, 64, 3), s.conv(64, 520))),
        (1, (full.image(1, 64, 6, 6), *(full.conv(64, 64, n) for n in (1, 3, 1)))),
        (0, (s.image(1, 64, 6, 6), *(s.conv(64, 64, n) for n in (1, 3, 1)))),
    ):
        with instead_of_cpu(hopper=2) as library, gpu_sanitize.pairs(library):
            library.emulated_hopper(gpu)
            got = ops.bottleneck(*args)
            assert "wgmma_pair_kernel" not in kinds(library)
        dtype = args[0].dtype
        assert_within(got, TABLE["bottleneck"].exact(dtype, "tensor cores", *args))
    with instead_of_cpu(hopper=2) as library, gpu_sanitize.pairs(library):
        ops.basic_block(s.image(1, 64, 6, 6), s.conv(64, 64, 3), s.conv(64, 64, 3))
        assert kinds(library) == ["wgmma_conv_kernel"] * 2


def test_only_where_it_is_asked_for_and_faster() -> None:
    """Breaks if one kernel is the default, if nobody can ask for it, or if it is taken where two
    would split a sum: no switch may change a result.
    """
    s = Source(torch.float16)
    few = s.image(1, 64, 6, 6), s.conv(64, 1024), s.conv(1024, 128, 3), s.conv(128, 64)
    many = s.image(1, 64, 18, 18), s.conv(64, 64), s.conv(64, 64, 3), s.conv(64, 64)
    for args, level, multiprocessors, one in ((many, 2, 1, 1), (many, 1, 1, 0), (few, 2, 132, 0)):
        with instead_of_cpu(hopper=level, multiprocessors=multiprocessors) as library:
            ops.bottleneck(*args)
            found = kinds(library)
            assert found.count("wgmma_pair_kernel") == one
            assert ("split_sum_kernel" in found) == (args is few)


def test_an_image_does_not_depend_on_those_beside_it() -> None:
    """Breaks if, with the invariant setting, the way that a batch takes changes a result."""
    s = Source(torch.bfloat16)
    args = s.image(3, 64, 9, 9), s.conv(64, 64), s.conv(64, 64, 3), s.conv(64, 64)
    with instead_of_cpu(invariant=True, hopper=2, multiprocessors=1):
        together = ops.bottleneck(*args)
    with instead_of_cpu(invariant=True, hopper=2):
        alone = [ops.bottleneck(x, *args[1:]) for x in args[0].split(1)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_forced_pairs_reach_every_kernel(dtype: torch.dtype) -> None:
    """Breaks if a kernel is in none of the calls that compute-sanitizer watches on a GPU."""
    seen = set()
    for case in gpu_sanitize.paired(dtype):
        with instead_of_cpu() as library, gpu_sanitize.pairs(library):
            library.emulated_hopper(1)
            y = case.run()
            seen |= {launch.kernel.rpartition(" ")[2] for launch in launches(library)[1:]}
        error, bound = case.expect(expected.roundings(dtype, "cuda")).worst(y)
        assert error <= bound, case.name
    assert seen == {f"{i}>" for i in range(len(pair_tiles()))}
