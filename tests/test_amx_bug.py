# SPDX-License-Identifier: BSD-3-Clause
"""Narrow images in bfloat16, where torch's own convolution on AMX CPUs returns garbage."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import resnet_fused
from harness.suite import PATHS


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("size", [(224, 16), (224, 32), (256, 2)])
def test_resnet18_on_narrow_images(size: tuple[int, int], path: str, force_path: Any) -> None:
    """Breaks where a strided bf16 convolution with an output one pixel wide reaches oneDNN.

    The bound: 20 layers whose inputs and weights are rounded to 2**-9 each, errors adding up as
    independent ones do, and a factor of 4: sqrt(2 * 20) * 2**-9 * 4 = 5 % of the largest logit.
    """
    torch.manual_seed(1)
    model = resnet_fused.resnet18().eval()
    x = torch.randn(2, 3, *size)
    with torch.inference_mode():
        model, x = model.bfloat16(), x.bfloat16()
        want = copy.deepcopy(model).double()(x.double())
        with force_path(path):
            first, second = model(x), model(x)
    assert torch.equal(first, second), "uninitialised memory gives another result each time"
    assert (first.double() - want).abs().max() < 0.05 * want.abs().max()
