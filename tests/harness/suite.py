# SPDX-License-Identifier: BSD-3-Clause
"""The tests that every op must pass; a test file derives a class from Suite and names its op."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import resnet_fused
from harness.bounds import assert_within
from harness.case import DTYPES, Case, Inputs, Op, Source
from harness.table import TABLE
from harness.views import VIEWS
from resnet_fused import _extension

# float32 as bf16x3, as this CPU does it where it has AMX, and portably. Other dtypes' tests of
# these paths are deselected (conftest.py).
BF16X3 = ("portable bf16x3",) + ("auto bf16x3",) * _extension.amx()
# On a GPU, "cuda" sends copies of the tensors there.
PATHS = ("auto", "onednn", "portable", "reference", *BF16X3)
PATHS += ("cuda",) * torch.cuda.is_available()
# Where own kernels promise the same bits in every batch and with any number of threads.
TILES = ("portable",) + ("auto",) * _extension.amx() + BF16X3
TILES += ("portable float32",) + ("auto float32",) * _extension.avx512()


def tile_dtype(path: str) -> torch.dtype:
    """The dtype that goes to tiles on one of TILES."""
    return torch.float32 if path in BF16X3 or path.endswith("float32") else torch.bfloat16


def make(op: Op, case: Case, dtype: torch.dtype, integer: bool = False) -> Inputs:
    return case.make(Source(dtype, integer, seed=len(case.name), terms=op.terms))


def products(path: str) -> str:
    """How a path's convolutions may compute products, as harness.bounds names it."""
    if path in ("cuda", "emulated"):
        return "tensor cores"
    if path in BF16X3:
        return "bf16x3"
    return "exact" if path == "reference" else "folded"


def floats(inputs: Inputs) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)]


def map_tensors(f: Any, inputs: Inputs) -> Inputs:
    mapped: Inputs = pytree.tree_map_only(Tensor, f, inputs)
    return mapped


def bits(t: Tensor) -> Tensor:
    return t.contiguous().flatten().view(torch.uint8)


class PathSuite:
    """Tests of one op that every path must pass."""

    name: str

    @property
    def op(self) -> Op:
        return TABLE[self.name]

    @pytest.fixture(params=PATHS)
    def path(self, request: pytest.FixtureRequest, force_path: Any) -> Iterator[str]:
        """Every implementation: what this CPU chooses, oneDNN, portable tiles, plain PyTorch,
        float32 as bf16x3, and the GPU if there is one.
        """
        with force_path(request.param):
            yield request.param

    def exact(self, path: str, dtype: torch.dtype, inputs: Inputs) -> Any:
        args, kwargs = inputs
        return self.op.exact(dtype, products(path), *args, **kwargs)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_within_the_derived_bound(self, dtype: torch.dtype, path: str) -> None:
        """Breaks on any wrong tail, border, stride or rounding."""
        for case in self.op.cases:
            if case.slow and not path.startswith("auto"):
                continue
            inputs = make(self.op, case, dtype)
            got = self.op.call(*inputs[0], **inputs[1])
            assert got.dtype == dtype, case.name
            try:
                assert_within(got, self.exact(path, dtype, inputs))
            except AssertionError as error:
                raise AssertionError(f"{case.name} ({case.why}): {error}") from None

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_exact_integers(self, dtype: torch.dtype, path: str) -> None:
        """Breaks on a single dropped, repeated or misplaced product: the threshold is 0."""
        for case in self.op.cases:
            if case.slow and not path.startswith("auto"):
                continue
            inputs = make(self.op, case, dtype, integer=True)
            want = self.exact(path, dtype, inputs)
            assert want.peak <= 256, f"{case.name}: {want.peak} may not be exact in bfloat16"
            got = self.op.call(*inputs[0], **inputs[1])
            assert torch.equal(got.double(), want.value), f"{case.name}: {case.why}"

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_views_of_every_argument(self, dtype: torch.dtype, path: str) -> None:
        """Breaks where strides, offsets or layouts of any one argument are not honoured."""
        case = self.op.cases[0] if self.name != "add_relu" else self.op.cases[3]
        inputs = make(self.op, case, dtype)
        want = self.exact(path, dtype, inputs)
        leaves, spec = pytree.tree_flatten(inputs)
        for i, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor):
                continue
            for name, view in VIEWS.items():
                changed = list(leaves)
                changed[i] = view(leaf)
                assert torch.equal(changed[i], leaf)
                args, kwargs = pytree.tree_unflatten(changed, spec)
                try:
                    assert_within(self.op.call(*args, **kwargs), want)
                except AssertionError as error:
                    raise AssertionError(f"argument {i} {name}: {error}") from None

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_poisoned_memory_and_order(self, dtype: torch.dtype, path: str) -> None:
        """Breaks where an element is not written, or what ran before leaks into a result."""
        cases = [c for c in self.op.cases if path.startswith("auto") or not c.slow]
        made = [make(self.op, case, dtype) for case in cases]
        first = [self.op.call(*args, **kwargs) for args, kwargs in made]
        for (args, kwargs), want in reversed(list(zip(made, first, strict=True))):
            # Memory that the op gets again, full of NaN.
            used = self.op.call(*args, **kwargs).fill_(float("nan"))
            holes = [torch.full((2**s,), float("nan")) for s in range(4, 20)]
            del used, holes
            again = self.op.call(*args, **kwargs)
            assert torch.equal(bits(again), bits(want))

    def test_inputs_are_not_written(self, path: str) -> None:
        """Breaks if an op works in place or returns one of its arguments."""
        for case in self.op.cases:
            if case.slow:
                continue
            inputs = make(self.op, case, torch.float32 if path in BF16X3 else torch.bfloat16)
            copies = map_tensors(torch.clone, inputs)
            got = self.op.call(*inputs[0], **inputs[1])
            for t, copy in zip(floats(inputs), floats(copies), strict=True):
                assert torch.equal(t, copy)
                assert got.numel() == 0 or got.data_ptr() != t.data_ptr()


class Suite(PathSuite):
    """All tests of one op."""

    def test_threads_do_not_matter(self, force_path: Any) -> None:
        """Breaks if how the work is divided changes the order of a sum, bit for bit.

        Own kernels only: oneDNN, which does float32 and grouped convolutions, promises no such
        thing.
        """
        threads = torch.get_num_threads()
        for path in TILES:
            for case in self.op.cases:
                inputs = make(self.op, case, tile_dtype(path))
                if case.slow or any(getattr(a, "groups", 1) > 1 for a in inputs[0]):
                    continue
                with force_path(path):
                    want = self.op.call(*inputs[0], **inputs[1])
                    try:
                        for count in (1, 3):
                            torch.set_num_threads(count)
                            got = self.op.call(*inputs[0], **inputs[1])
                            assert torch.equal(bits(got), bits(want)), case.name
                    finally:
                        torch.set_num_threads(threads)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_opcheck(self, dtype: torch.dtype) -> None:
        """Breaks on a wrong fake kernel, schema or autograd registration."""
        overload = getattr(torch.ops.resnet_fused, self.name).default
        inputs = make(self.op, self.op.cases[0], dtype)
        for layout in ("channels_last", "contiguous"):
            grad = layout == "channels_last" and dtype == torch.bfloat16
            changed = map_tensors(
                lambda t, v=VIEWS[layout], g=grad: v(t).detach().requires_grad_(g), inputs
            )
            torch.library.opcheck(overload, self.op.flat(*changed[0], **changed[1]))

    def test_gradients_are_those_of_plain_pytorch(self) -> None:
        """Breaks if the backward is not the reference's, or drops an input."""
        inputs = make(self.op, self.op.cases[0], torch.float32)

        def gradients() -> list[Tensor | None]:
            leaves = map_tensors(lambda t: t.detach().clone().requires_grad_(), inputs)
            y = self.op.call(*leaves[0], **leaves[1])
            (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
            return [t.grad for t in floats(leaves)]

        got = gradients()
        with resnet_fused.backend("reference"):
            want = gradients()
        assert all(g is not None for g in got)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w)

    def test_gradcheck_in_float64(self) -> None:
        """Breaks if the reference is not differentiable, or an op refuses float64."""
        inputs = make(self.op, self.op.cases[1], torch.float32)
        leaves, spec = pytree.tree_flatten(inputs)
        at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

        def call(*tensors: Tensor) -> Tensor:
            changed = list(leaves)
            for i, t in zip(at, tensors, strict=True):
                changed[i] = t
            args, kwargs = pytree.tree_unflatten(changed, spec)
            return self.op.call(*args, **kwargs)

        tensors = [leaves[i].double().requires_grad_() for i in at]
        assert call(*tensors).dtype == torch.float64
        torch.autograd.gradcheck(call, tensors, fast_mode=True)

    def test_compiles_without_graph_break(self) -> None:
        """Breaks if dynamo cannot see through the function, or strides change under it."""
        inputs = make(self.op, self.op.cases[0], torch.float32)
        compiled = torch.compile(self.op.call, fullgraph=True, backend="aot_eager")
        got = compiled(*inputs[0], **inputs[1])
        want = self.op.call(*inputs[0], **inputs[1])
        assert torch.equal(got, want) and got.stride() == want.stride()

    def test_autocast_computes_in_the_autocast_dtype(self) -> None:
        """Breaks if an op ignores autocast, or casts BatchNorm's statistics with it."""
        inputs = make(self.op, self.op.cases[0], torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            got = self.op.call(*inputs[0], **inputs[1])
        assert got.dtype == torch.bfloat16
        want = self.op.call(*inputs[0], **inputs[1])
        # Inputs and weights rounded once each, sums of hundreds of products: 2 % of the largest.
        assert (got.float() - want).abs().max() < 0.02 * want.abs().max()

    def test_meta_and_fake_cuda(self) -> None:
        """Breaks if shapes are computed from data, or a fake tensor reaches a kernel."""
        from torch._subclasses.fake_tensor import FakeTensorMode

        inputs = make(self.op, self.op.cases[0], torch.bfloat16)
        want = self.op.call(*inputs[0], **inputs[1])
        meta = map_tensors(lambda t: t.to("meta"), inputs)
        got = self.op.call(*meta[0], **meta[1])
        assert got.shape == want.shape and got.device.type == "meta"
        with FakeTensorMode():
            fake = map_tensors(
                lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda"),
                inputs,
            )
            got = self.op.call(*fake[0], **fake[1])
        assert got.shape == want.shape and got.device.type == "cuda" and got.dtype == want.dtype
