# SPDX-License-Identifier: BSD-3-Clause
"""200 forwards of 200 shapes: nothing is compiled, packed or kept per shape."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import nn

import fuse_zoo
import resnet_fused
from fuse_zoo import Basic, Bottle, Net, randomise
from resnet_cases import small
from resnet_fused import _extension

NETS: dict[str, Callable[[], nn.Module]] = {
    "native": small,
    "fused": lambda: resnet_fused.fuse(
        randomise(Net(Basic(64, 64), Bottle(64, 32, 128, 2), Basic(128, 128), width=128, stem=64))
    ),
}
Shape = tuple[int, int, int]
FIXED: Shape = (2, 80, 80)
one_thread = fuse_zoo.one_thread


def shapes(count: int) -> list[Shape]:
    """Different (N, H, W), large enough that a call's fixed cost is small beside the pixels'."""
    rng = random.Random(0)
    found: dict[Shape, None] = {}
    while len(found) < count:
        found[rng.randint(1, 4), rng.randint(48, 112), rng.randint(48, 112)] = None
    return list(found)


def per_pixel(model: nn.Module, shape: Shape, dtype: torch.dtype) -> float:
    """This thread's seconds per pixel of one call: what else the machine does counts little."""
    n, h, w = shape
    x = torch.randn(n, 3, h, w, dtype=dtype)
    start = time.thread_time()
    model(x)
    return (time.thread_time() - start) / (n * h * w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NETS)
def test_200_shapes(name: str, dtype: torch.dtype) -> None:
    """Breaks if a new shape is compiled, tuned or packed for: memory grows, or a call is slow.

    A call that seems slow may have been disturbed. It is followed by calls of other new shapes:
    what is done for every shape makes all of them slow. Weights that oneDNN takes are packed again
    for a size of the feature map that comes twice running, as small ones do by chance.
    """
    model, new, fixed = NETS[name]().to(dtype), [], []
    library = _extension._library
    assert library is not None
    convs = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    start, start_bytes = library.resnet_fused_pack_count(), library.resnet_fused_pack_bytes()
    with torch.inference_mode():
        for shape in (FIXED, FIXED, *shapes(3)):
            per_pixel(model, shape, dtype)
        first, first_bytes = library.resnet_fused_pack_count(), library.resnet_fused_pack_bytes()
        assert convs <= first - start <= 2 * convs
        for n, h, w in shapes(203)[3:]:
            new.append(per_pixel(model, (n, h, w), dtype))
            fixed.append(per_pixel(model, FIXED, dtype))
            if new[-1] > 5 * statistics.median(new):
                again = (per_pixel(model, (n, h + i, w + 113), dtype) for i in range(5))
                assert any(t <= 5 * statistics.median(new) for t in again), (n, h, w)
        assert library.resnet_fused_pack_count() - first <= 200 * convs / 10
        # Four layouts are kept per weight.
        assert library.resnet_fused_pack_bytes() - start_bytes <= 4 * (first_bytes - start_bytes)
        assert library.resnet_fused_pool_bytes() <= 512 << 20
    # A compilation takes hundreds of calls' time. oneDNN's own preparation of a new shape takes
    # about as long as one of these small calls.
    assert statistics.median(new) <= 5 * statistics.median(fixed)
