# SPDX-License-Identifier: BSD-3-Clause
"""Memory formats: one conversion of the images per forward, whatever comes in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import fuse_zoo
from fuse_spy import make
from fuse_zoo import Backbone, Basic, Bottle, image, randomise
from resnet_fused.fuse import fuse
from resnet_fused.models import resnet18

one_thread = fuse_zoo.one_thread
__all__ = ["one_thread"]  # a fixture

INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every second row": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "channels of more": lambda x: torch.cat((x, x), 1)[:, ::2].copy_(x),
    "part of a batch": lambda x: torch.cat((x[:1], x))[1:],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


def keeps_format(copy_event: Any) -> bool:
    """True for a copy of a residual, which torch 2.10's oneDNN adds to in place: a clone made by an
    op; the ops convert by copying into memory of their own.
    """
    above = copy_event.cpu_parent
    cloned = above is not None and above.name == "aten::clone"
    while above is not None and not str(above.name).startswith("resnet_fused::"):
        above = above.cpu_parent
    return cloned and above is not None


def image_copies(model: nn.Module, x: Tensor) -> int:
    """Copies of tensors with the batch's first dimension in a warm forward, as the profiler sees
    them, the library's own included; packings of weights are none.
    """
    with torch.no_grad():
        for _ in range(3):
            model(x)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
            model(x)
    copies = [e for e in seen.events() or () if e.name == "aten::copy_" and not keeps_format(e)]
    shapes = [e.input_shapes[0] for e in copies]
    return sum(len(s) == 4 and s[0] == x.shape[0] for s in shapes)


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # model, images it returns
    "fused": (lambda: fuse(make()), 0),
    "own": (lambda: randomise(resnet18(num_classes=5)), 0),
    "blocks": (lambda: fuse(randomise(nn.Sequential(Basic(3, 4), Bottle(4, 2, 8)))), 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_one_conversion(name: str, dtype: torch.dtype) -> None:
    """Every block converts for itself; or a result is left in a format that is not eager's, which
    costs one more conversion for every image returned.
    """
    make_model, returned = MODELS[name]
    model = make_model().to(dtype)
    for kind, view in INPUTS.items():
        x = view(image(3, 40).to(dtype))
        most = 0 if kind == "channels_last" else 1 + returned
        assert image_copies(model, x) <= most, kind


@pytest.mark.parametrize("name", ["fused", "own", "blocks"])
def test_same_result_for_every_layout(name: str) -> None:
    """Strides are misread: a view of the same values gives other results."""
    model = MODELS[name][0]()
    x = image(3, 40)
    with torch.no_grad():
        want = model(x)
        for kind, view in INPUTS.items():
            v = view(x)
            assert torch.equal(v, x)
            torch.testing.assert_close(model(v), want, rtol=1e-5, atol=1e-5, msg=kind)


def test_features_have_eagers_format() -> None:
    """Features that a fused backbone hands out are not in the format that eager gives them."""

    class Features(Backbone):
        def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
            y = self.stem(x)
            return [y, *(y := stage(y) for stage in self.stages)]

    plain = randomise(Features())
    for model in (plain, copy.deepcopy(plain).to(memory_format=torch.channels_last)):
        other = fuse(model)
        for kind, view in INPUTS.items():
            with torch.no_grad():
                want, got = model(view(image())), other(view(image()))
            assert [t.stride() for t in got] == [t.stride() for t in want], kind
