# SPDX-License-Identifier: BSD-3-Clause
"""Sizes 1, 2 and 3 in every dimension of every op, all combinations of them.

Vector tails, borders that meet and outputs of one pixel are where kernels break; libraries, too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch

from harness.bounds import assert_within
from harness.case import DTYPES, Inputs, Source
from harness.suite import TILES, products, tile_dtype
from harness.table import TABLE

SMALL = (1, 2, 3)


def check(name: str, dtype: torch.dtype, cases: Iterable[Inputs]) -> None:
    op = TABLE[name]
    count = 0
    for args, kwargs in cases:
        got = op.call(*args, **kwargs)
        want = op.exact(dtype, "folded", *args, **kwargs)
        try:
            assert_within(got, want)
        except AssertionError as error:
            raise AssertionError(f"{[getattr(a, 'shape', a) for a in args]}: {error}") from None
        count += 1
    assert count >= 3**4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", SMALL)
@pytest.mark.parametrize("stride", SMALL)
def test_conv_bn_act(stride: int, window: int, dtype: torch.dtype) -> None:
    """17 channels stand for more than the tile kernels' least; few of them go to oneDNN."""
    s = Source(dtype)

    def cases() -> Iterator[Inputs]:
        for n, c, k, h, w in itertools.product(SMALL, (*SMALL, 17), SMALL, SMALL, SMALL):
            conv = s.conv(c, k, window, stride=(stride, stride))
            yield (s.image(n, c, h, w), conv), {"relu": bool((h + w) % 2)}

    check("conv_bn_act", dtype, cases())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", SMALL)
def test_blocks(stride: int, dtype: torch.dtype) -> None:
    """The projection appears where the stride is not 1."""
    s, step = Source(dtype), (stride, stride)

    def cases(deep: bool) -> Iterator[Inputs]:
        for n, c, h, w in itertools.product(SMALL, (*SMALL, 17), SMALL, SMALL):
            down = s.conv(c, c, stride=step) if stride > 1 else None
            middle = s.conv(c, c, 3, stride=step)
            convs = (s.conv(c, c), middle, s.conv(c, c)) if deep else (middle, s.conv(c, c, 3))
            yield (s.image(n, c, h, w), *convs, down), {}

    check("basic_block", dtype, cases(False))
    check("bottleneck", dtype, cases(True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stem_head_and_add(dtype: torch.dtype) -> None:
    s = Source(dtype)
    sizes = list(itertools.product(SMALL, SMALL, SMALL, SMALL))
    stem = [
        ((s.image(n, c, h, w), s.conv(c, k, 7, stride=(2, 2))), {})
        for n, c, h, w in sizes
        for k in (1, 8)
    ]
    check("stem", dtype, stem)
    head = [
        ((s.image(n, c, h, w), s.normal(k, c), s.normal(k)), {})
        for n, c, h, w in sizes
        for k in SMALL
    ]
    check("pool_linear", dtype, head)
    check("add_relu", dtype, [((s.normal(*shape), s.normal(*shape)), {}) for shape in sizes])


@pytest.mark.parametrize("path", TILES)
def test_windows_that_lie_in_the_padding(path: str, force_path: Any) -> None:
    """Breaks with the process: on these oneDNN 3.12 reads where nothing is, if there is a bias.

    Few channels, which else go there; a window of 16 positions beside images one pixel wide.
    """
    op, s = TABLE["conv_bn_act"], Source(tile_dtype(path))
    for c in (2, 3, 15):
        options: dict[str, Any] = {"stride": (1, 5), "padding": (1, 7), "dilation": (1, 3)}
        conv = s.conv(c, 64, 1, **options)
        conv = conv._replace(weight=s.normal(64, c, 6, 1))
        args = (s.image(1, c, 15, 1), conv)
        with force_path(path):
            got = op.call(*args)
        assert_within(got, op.exact(tile_dtype(path), products(path), *args))
