# SPDX-License-Identifier: BSD-3-Clause
"""The models that are timed and checked, their plain PyTorch twins, and how far results may differ.

Nothing here calls the fused ops: the expectation must not share an error with what it judges.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from resnet_fused import dispatch, models

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
"""Largest relative error of one rounding."""


def model_names() -> list[str]:
    """Name the package's model builders."""
    return [name for name in models.__all__ if "resne" in name and name.islower()]


def make_model(name: str, seed: int = 0) -> nn.Module:
    """Build a model with random weights whose BatchNorms behave as trained ones do.

    Scales and shifts are random, and the running statistics are those of a seeded random batch, so
    activations neither vanish nor grow with depth.

    Args:
        name: one of `model_names()`.
        seed: of weights and statistics.

    Returns:
        The model in eval mode, float32, on the CPU.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU, too
        model: nn.Module = getattr(models, name)()
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, 0.0, 0.2)
            norm.momentum = None  # one pass leaves exactly the batch's statistics
        for block in model.modules():  # in a trained network each block changes its input a little
            if isinstance(block, models.BasicBlock | models.Bottleneck):
                last: Any = block.bn3 if isinstance(block, models.Bottleneck) else block.bn2
                nn.init.uniform_(last.weight, 0.0, 0.2)
        with torch.no_grad():
            model.train()(torch.randn(8, 3, 64, 64))
        for norm in norms:
            norm.momentum = 0.1
    return model.eval()


def plain(model: nn.Module) -> fx.GraphModule:
    """Give a model as the flat list of its PyTorch modules, with no fused op and no other overhead.

    This is eager PyTorch at its best: the same calls as torchvision's, without the nesting. The
    modules themselves are shared with `model`.
    """
    return fx.symbolic_trace(model)


@cache
def gmacs(name: str, size: int) -> float:
    """Count the multiply-accumulates of one image of size x size, in 10^9."""
    with torch.device("meta"):
        net = plain(getattr(models, name)()).eval()
        with FlopCounterMode(display=False) as counter:
            net(torch.empty(1, 3, size, size))
    return counter.get_total_flops() / 2e9


def relative_error(y: Tensor, expected: Tensor) -> float:
    """Give max |y - expected| / max |expected|; infinite if `y` is not finite."""
    if y.shape != expected.shape or not bool(torch.isfinite(y).all()):
        return math.inf
    scale = max(expected.abs().max().item(), torch.finfo(torch.float64).tiny)
    return (y.double() - expected).abs().max().item() / scale


@dataclass(frozen=True)
class Expectation:
    """A model's float64 result for some images of a batch."""

    images: tuple[int, ...]
    logits: Tensor

    def error(self, y: Tensor) -> float:
        """Give the relative error of a whole batch's logits, at the images that are known."""
        if y.shape[1:] != self.logits.shape[1:] or y.shape[0] <= max(self.images):
            return math.inf
        return relative_error(y[list(self.images)].detach().double().cpu(), self.logits)


def expect(net: nn.Module, x: Tensor) -> Expectation:
    """Compute the first and the last image of `x` in float64 from the same (rounded) weights."""
    images = tuple(sorted({0, x.shape[0] - 1}))
    with torch.inference_mode():
        exact = copy.deepcopy(net).cpu().double()
        return Expectation(images, exact(x[list(images)].detach().cpu().double()))


def factors(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """Give the dtype that has as many bits as the factors of a convolution's products.

    That is `dtype` itself, but float16 for float32 on a GPU where torch may round it to TF32.
    """
    tf32 = device_type == "cuda" and dispatch.tf32()
    return torch.float16 if dtype == torch.float32 and tf32 else dtype


def error_bound(eager_error: float, net: nn.Module, dtype: torch.dtype) -> float:
    """Say how wrong a fused network may be: 1.5 x eager's error plus a rounding floor.

    Eager is not always right (its bfloat16 convolutions read uninitialised memory on AMX CPUs where
    a strided output is one pixel wide), so its error counts only up to what roundings explain:
    c u sqrt(n) for n convolutions, c = 2 where every result is rounded to 16 bits, c = 8 where the
    error comes from long sums instead. Both are about twice what is seen on sound machines.

    Args:
        eager_error: relative error of plain PyTorch in `dtype`, the larger of its two layouts.
        net: the network, for its number of convolutions.
        dtype: what it computes in; TF32 counts as float16.
    """
    device_type = next((p.device.type for p in net.parameters()), "cpu")
    unit = ROUNDOFF[factors(dtype, device_type)]
    wide = unit <= ROUNDOFF[torch.float32]
    convs = sum(isinstance(m, nn.Conv2d) for m in net.modules())
    explained = (8 if wide else 2) * unit * math.sqrt(convs)
    return 1.5 * min(eager_error, explained) + (8 if wide else 1) * unit
