# SPDX-License-Identifier: BSD-3-Clause
"""The CUDA ops, host code and kernels, through the suite of every op and in whole networks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from emulated_ops import Launch, instead_of_cpu, launches
from mma_conv_cases import TILES

import resnet_fused
import test_nan
import test_small_sizes
from harness.bounds import assert_within
from harness.case import DTYPES, Op, Source
from harness.suite import PathSuite
from harness.table import TABLE
from resnet_cases import exact, images, lively, relative, rounded
from resnet_fused import ops
from resnet_fused.bench import expected
from resnet_fused.ops import ConvBN
from resnet_fused.ops.conv_bn import flatten
from source_tree import benchmarks

gpu_sanitize = benchmarks("gpu_sanitize")
VECTORS = ("bn_weight", "bn_bias", "running_mean", "running_var")


class Emulated(PathSuite):
    """The suite on the one path."""

    @pytest.fixture
    def path(self, force_path: Any) -> Iterator[str]:  # type: ignore[override]
        with force_path("emulated"):
            yield "emulated"


class TestAddRelu(Emulated):
    name = "add_relu"


class TestConvBnAct(Emulated):
    name = "conv_bn_act"


class TestStem(Emulated):
    name = "stem"


class TestBasicBlock(Emulated):
    name = "basic_block"


class TestBottleneck(Emulated):
    name = "bottleneck"


class TestPoolLinear(Emulated):
    name = "pool_linear"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("depth", [18, 50])
def test_networks_op_by_op(depth: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if any layer of a network is wrong: each op is held against float64 on its own input.

    Images of 64 x 64 give every layer's channels, strides and projections, and maps of 2 x 2. The
    logits are as far off as those of a network whose every result is rounded to 8 bits (bfloat16)
    or 11 (float16, TF32), or nearer; a layer left out or taken twice would be further off.
    """
    model = lively(getattr(resnet_fused, f"resnet{depth}")()).to(dtype)
    if dtype != torch.float16:  # float16 tests the conversion of weights on each call
        model = model.to(memory_format=torch.channels_last)
    x = images(2, 3, 64, 64, dtype=dtype)
    names = []
    for name in ("stem", "basic_block", "bottleneck", "pool_linear"):

        def check(*args: Any, _op: Op = TABLE[name]) -> torch.Tensor:
            y = _op.call(*args)
            assert_within(y, _op.exact(dtype, "tensor cores", *args))
            names.append(_op.name)
            return y

        monkeypatch.setattr(ops, name, check)
    with torch.inference_mode(), instead_of_cpu():
        got = model(x)
    monkeypatch.undo()
    blocks = ["basic_block"] * 8 if depth == 18 else ["bottleneck"] * 16
    assert names == ["stem", *blocks, "pool_linear"]
    want = exact(model, x)
    coarse = torch.float16 if dtype == torch.float32 else dtype
    assert relative(got, want) < 1.5 * relative(rounded(model, x, coarse), want)


def test_special_values(force_path: Any) -> None:
    """Breaks where NaN or infinity is lost, or leaves its receptive field by a product with 0."""
    for dtype in DTYPES:
        for channels, special in product((3, 17, 64), (test_nan.NAN, test_nan.INF)):
            test_nan.test_one_pixel_reaches_its_receptive_field_only(
                channels, special, dtype, "emulated", force_path
            )
        test_nan.test_stem_and_head(dtype, "emulated", force_path)
        test_nan.test_residual(dtype, "emulated", force_path)
        for gamma, variance in ((0.0, 1e-12), (-1.0, 1e5), (1e3, 1e-12)):
            test_nan.test_extreme_batchnorm(gamma, variance, dtype, "emulated", force_path)
    for special in (float("nan"), float("inf")):
        test_nan.test_block_in_float32((2, 3), special, "emulated", force_path)
    for where in range(3):
        test_nan.test_overflow_inside_a_block(where, "emulated", force_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sizes_of_one_to_three(dtype: torch.dtype) -> None:
    """Breaks where borders meet, or a size-1 dimension's strides are believed."""
    with instead_of_cpu():
        test_small_sizes.test_conv_bn_act(2, 3, dtype)
        test_small_sizes.test_blocks(2, dtype)
        test_small_sizes.test_stem_head_and_add(dtype)


def block(dtype: torch.dtype, n: int = 5) -> tuple[Any, ...]:
    """A projection block whose convolutions are long enough to be split."""
    s = Source(dtype)
    convs = s.conv(1024, 256), s.conv(256, 256, 3, stride=(2, 2)), s.conv(256, 256)
    return (s.image(n, 1024, 4, 4), *convs, s.conv(1024, 256, stride=(2, 2)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_invariance(dtype: torch.dtype) -> None:
    """Breaks if the setting does not reach the plan; without it, these sums are split by batch."""
    x, *convs = block(dtype, 17)  # more than a tile of rows in the last two
    for invariant in (True, False):
        with instead_of_cpu(multiprocessors=20, invariant=invariant) as library:
            together = ops.bottleneck(x, *convs)
            splits = [x.grid[1] for x in launches(library) if "mma_conv" in x.kernel]
            alone = []
            for image in x[:5].split(1):
                alone.append(ops.bottleneck(image, *convs))
                found = [x.grid[1] for x in launches(library) if "mma_conv" in x.kernel]
                assert (found == splits == [1, 1, 1]) == invariant
                assert found[1] > splits[1] or invariant
        assert torch.equal(together[:5], torch.cat(alone)) or not invariant


@pytest.mark.parametrize("multiprocessors", [1, 20, 132, 1000])
def test_any_number_of_multiprocessors(multiprocessors: int) -> None:
    """Breaks if a plan that another GPU would get is wrong, or its workspace too small."""
    for n in (1, 3):
        args = block(torch.bfloat16, n)
        with instead_of_cpu(multiprocessors=multiprocessors) as library:
            got = ops.bottleneck(*args)
            launches = library.emulated_launches()
        assert_within(got, TABLE["bottleneck"].exact(torch.bfloat16, "tensor cores", *args))
        # One kernel for each convolution, the projection within the last one's; a split one has a
        # second that adds the parts.
        assert launches == 3 if multiprocessors == 1 else 3 < launches <= 6


def kernels(launched: list[Launch]) -> set[tuple[int, bool]]:
    """Tiles of the convolution that were launched, and whether their sums were split."""
    found = [(re.fullmatch(r"mma_conv_kernel<\w+, (\d)>", x.kernel), x.grid[1]) for x in launched]
    return {(int(tile[1]), splits > 1) for tile, splits in found if tile}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forced_plans_reach_every_kernel(dtype: torch.dtype) -> None:
    """Breaks if a plan that is forced is not taken, or a kernel, split or not, is in none of the
    calls that compute-sanitizer and the tests on a GPU force: nothing but the emulator saw it.
    """
    seen, sums = set(), set()
    for (tile, splits), case in gpu_sanitize.planned(dtype):
        with instead_of_cpu() as library, gpu_sanitize.forced((tile, splits), library):
            y = case.run()
            launched = launches(library)
        error, bound = case.expect(expected.roundings(dtype, "cuda")).worst(y)
        assert error <= bound, case.name
        assert (tile, splits > 1) in kernels(launched), case.name
        seen |= kernels(launched)
        sums |= {x.kernel for x in launched if x.kernel.startswith("split_sum_kernel")}
    one_source = [tile for tile, (*_, sources, _) in enumerate(TILES) if sources == 1]
    assert seen == {(tile, split) for tile in range(8) for split in (False, tile in one_source)}
    assert len(TILES) == 8 and len(sums) == 2, "wide and narrow sums of the parts"


@pytest.mark.parametrize("plan", [(5, 1), (8, 1), (0, 17), (0, 0), (-2, 3)])
def test_a_plan_that_cannot_be_forced(plan: tuple[int, int]) -> None:
    """Breaks if a kernel is launched on what it cannot make, or a call fails, for a test's sake."""
    s = Source(torch.float16)
    args = s.image(1, 64, 6, 6), s.conv(64, 64, 3)
    with instead_of_cpu() as library:
        want, automatic = ops.conv_bn_act(*args), launches(library)
        with gpu_sanitize.forced(plan, library):
            got = ops.conv_bn_act(*args)
        assert launches(library) == automatic and torch.equal(got, want)


@pytest.mark.parametrize(
    ("multiprocessors", "dtype", "grid"),
    [
        (1, torch.float16, (2, 1, 1)),
        (3, torch.float16, (6, 1, 1)),
        (3, torch.float32, (3, 2, 1)),  # two groups of filters
        (132, torch.bfloat16, (32, 1, 1)),
    ],
)
def test_the_stems_blocks_are_resident_at_once(
    multiprocessors: int, dtype: torch.dtype, grid: tuple[int, int, int]
) -> None:
    """Breaks if a GPU gets another number of blocks than it holds, two to a multiprocessor: the
    rest would load their weights again behind the first ones, or some would have none to do.
    """
    s = Source(dtype)
    x, conv = s.image(8, 3, 56, 56), s.conv(3, 64, 7, stride=(2, 2))  # 32 tiles
    with instead_of_cpu(multiprocessors=multiprocessors) as library:
        ops.stem(x, conv)
        (launch,) = launches(library)
    assert launch.kernel.startswith("stem_kernel") and launch.grid == grid


@pytest.mark.parametrize("n", [1, 3])
def test_a_workspace_that_is_too_small(n: int) -> None:
    """Breaks if a tensor that a kernel overruns by one element, be it a workspace, is not seen."""
    args = block(torch.bfloat16, n)
    with instead_of_cpu() as library:
        for size in (2, 4):
            library.emulated_cut(size)
            try:
                with pytest.raises(RuntimeError, match="bottleneck: .*; written behind a tensor"):
                    ops.bottleneck(*args)
            finally:
                library.emulated_cut(0)
        ops.bottleneck(*args)


def test_the_schedule_does_not_matter() -> None:
    """Breaks if a result depends on which thread comes first."""
    args = block(torch.float16)
    results = []
    for seed in (1, 2, 3):
        with instead_of_cpu(seed):
            results.append(ops.bottleneck(*args))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_parameters_of_other_dtypes(dtype: torch.dtype) -> None:
    """Breaks if a weight is read in another dtype than its own, as autocast gives them, or a
    vector of BatchNorm is.
    """
    x, *convs = block(dtype)
    wide = [c._replace(weight=c.weight.double() / 3) for c in convs]
    near = [c._replace(weight=c.weight.to(dtype)) for c in wide]
    for other in (torch.float16, torch.bfloat16, torch.float64):
        want = [c._replace(**{f: getattr(c, f).to(other).float() for f in VECTORS}) for c in near]
        got = [c._replace(**{f: getattr(c, f).to(other) for f in VECTORS}) for c in wide]
        stem = Source(dtype).conv(3, 64, 7, stride=(2, 2))
        image = Source(dtype).image(2, 3, 21, 18)
        overload = torch.ops.resnet_fused_emulated
        with instead_of_cpu():
            a, b = (
                overload.bottleneck(x, *(v for c in cs for v in flatten(c))) for cs in (got, want)
            )
            c = overload.stem(image, *flatten(stem._replace(weight=stem.weight.double())))
            d = ops.stem(image, stem)
        assert torch.equal(a, b) and torch.equal(c, d)


X = torch.ones(2, 8, 6, 6)
CONV = ConvBN(torch.ones(8, 8, 3, 3))


@pytest.mark.parametrize(
    ("x", "conv", "message"),
    [
        (X, ConvBN(torch.ones(8, 2, 3, 3), groups=4), "conv.groups must be 1 on a GPU, got 4"),
        (X.double(), CONV, "x must be float32, bfloat16 or float16, got float64"),
        (X, CONV._replace(padding=(2**29, 0), stride=(2**28, 1)), "no kernel counts as far"),
        (X[:, :, :0], ConvBN(torch.ones(8, 8, 1, 1), padding=(1, 1)), "no kernel counts as far"),
        (
            X,
            CONV._replace(bn_weight=torch.ones(8)),
            "conv.bn_weight is a BatchNorm's and needs conv.",
        ),
        (X, CONV._replace(bn_bias=torch.ones(8)), "conv.bn_bias is a BatchNorm's and needs conv."),
        (X[:, :7], CONV, "x must have 8 channels to fit conv.weight, got 7"),
    ],
)
def test_refused_by_the_op(x: torch.Tensor, conv: ConvBN, message: str) -> None:
    """Breaks if what Python should have sent elsewhere is computed, wrongly, or leaks a guard."""
    args = flatten(conv)
    for name, call in (("conv_bn_act", (*args, None, True)), ("stem", args)):
        with (
            instead_of_cpu() as library,
            pytest.raises(RuntimeError, match=f"{name}: .*{re.escape(message)}"),
        ):
            getattr(torch.ops.resnet_fused_emulated, name)(x, *call)
        assert library.emulated_calls() >= 0


def test_grouped_convolutions_take_the_reference() -> None:
    """Breaks if a block with one grouped convolution reaches the kernels, which have no groups."""
    s = Source(torch.float32)
    x, convs = s.image(2, 32, 6, 6), (s.conv(32, 32), s.conv(32, 32, 3, groups=4), s.conv(32, 32))
    with resnet_fused.backend("reference"):
        want = ops.bottleneck(x, *convs)
    with instead_of_cpu() as library:
        got = ops.bottleneck(x, *convs)
        assert library.emulated_launches() == 0
    assert torch.equal(got, want)
