# SPDX-License-Identifier: BSD-3-Clause
"""One model in many threads, and memory that does not grow."""

from __future__ import annotations

import gc
import resource
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import resnet_fused
from resnet_fused import _extension


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_eight_threads_give_the_bits_of_one(dtype: torch.dtype) -> None:
    """Breaks if calls share scratch memory or race for the packed weights."""
    model = resnet_fused.resnet18().eval().to(dtype)
    images = [torch.randn(1 + i % 3, 3, 40, 48, dtype=dtype) for i in range(8)]
    with torch.inference_mode():
        want = [model(x) for x in images]
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # so nothing is packed when threads start
        with ThreadPoolExecutor(8) as pool:
            for _ in range(3):

                def forward(x: torch.Tensor) -> torch.Tensor:
                    with torch.inference_mode():
                        return model(x)

                for got, expected in zip(pool.map(forward, images), want, strict=True):
                    assert torch.equal(got, expected)


def test_memory_stays_flat() -> None:
    """Breaks on a leak per call: forwards of changing sizes, then errors, within 24 MB."""
    model = resnet_fused.resnet18().eval().bfloat16()
    images = [torch.randn(1, 3, 33 + 8 * i, 47, dtype=torch.bfloat16) for i in range(4)]
    conv = resnet_fused.ConvBN(torch.ones(4, 8, 1, 1))

    def work(rounds: int) -> int:
        with torch.inference_mode():
            for _ in range(rounds):
                for x in images:
                    model(x)
        for _ in range(50 * rounds):
            with pytest.raises(RuntimeError):
                resnet_fused.conv_bn_act(torch.ones(1, 7, 2, 2), conv)
        gc.collect()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    work(15)
    before = work(15)
    assert work(60) - before < 24 * 1024


def test_the_pool_is_bounded_and_can_be_emptied() -> None:
    """Breaks if large outputs stay mapped after their tensors died."""
    library = _extension._library
    assert library is not None
    conv = resnet_fused.ConvBN(torch.randn(64, 64, 1, 1))
    x = torch.randn(4, 64, 112, 112)
    outputs = [resnet_fused.conv_bn_act(x, conv) for _ in range(50)]  # 12.8 MB each
    del outputs
    assert 0 <= library.resnet_fused_pool_bytes() <= 512 << 20
    library.resnet_fused_pool_release()
    assert library.resnet_fused_pool_bytes() == 0
    y = resnet_fused.conv_bn_act(x, conv)
    assert torch.equal(y, resnet_fused.conv_bn_act(x, conv))
