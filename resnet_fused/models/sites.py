# SPDX-License-Identifier: BSD-3-Clause
"""Which children of a ResNet each fused call replaces, and whether they stand in their places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from resnet_fused import modules, ready
from resnet_fused.dispatch import only_torch_ops
from resnet_fused.modules import Site, pair

DOWN = ("downsample", "downsample.0", "downsample.1")
BASIC = Site("basic_block", ("conv1", "bn1", "relu", "conv2", "bn2"), ("conv1", "conv2"))
BASIC_DOWN = Site("basic_block", (*BASIC.modules, *DOWN), (*BASIC.convs, DOWN[1]))
BOTTLENECK = Site(
    "bottleneck",
    ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "relu"),
    ("conv1", "conv2", "conv3"),
)
BOTTLENECK_DOWN = Site("bottleneck", (*BOTTLENECK.modules, *DOWN), (*BOTTLENECK.convs, DOWN[1]))
STEM = Site("stem", ("conv1", "bn1", "relu", "maxpool"), ("conv1",))
STEM_CONV = Site("conv_bn_act", ("conv1", "bn1", "relu"), ("conv1",))
HEAD = Site("pool_linear", ("avgpool", "fc"), ())

# why_plain says whether a module can be fused at all. These kinds can, but only in their places: an
# Identity where a BatchNorm was computes something else.
_PLACE: dict[type, str] = {
    nn.Conv2d: "conv",
    nn.BatchNorm2d: "bn",
    nn.SyncBatchNorm: "bn",
    nn.ReLU: "relu",
    nn.MaxPool2d: "maxpool",
    nn.AdaptiveAvgPool2d: "avgpool",
    nn.Linear: "fc",
    nn.Sequential: "downsample",
    nn.Identity: "",
    nn.Flatten: "",
}
_PLACE_OF_NAME = {
    name: {"downsample.0": "conv", "downsample.1": "bn"}.get(name) or name.rstrip("123")
    for site in (BASIC_DOWN, BOTTLENECK_DOWN, STEM, HEAD)
    for name in site.modules
}


def in_place(owner: nn.Module, site: Site) -> Site | None:
    """``site`` if no child of ``owner`` stands where another kind belongs, else None."""
    for name, path in site.paths:
        module: nn.Module | None = owner
        for part in path:
            module = module._modules.get(part) if module is not None else None
        place = _PLACE_OF_NAME[name]
        if _PLACE.get(type(module), place) != place:  # a missing one is left to why_plain
            return None
    return site


def why_plain(owner: nn.Module, site: Site, x: Any) -> str | None:
    """``modules.why_plain``, and plain modules for what wants to see them."""
    if isinstance(x, fx.Proxy):
        return "symbolic tracing"
    return "only torch's operations" if only_torch_ops() else modules.why_plain(owner, site)


def call(
    owner: nn.Module, part: str, x: Any, look: Callable[[Any], tuple[Site, Any] | None]
) -> tuple[Site, Any] | None:
    """What ``look(x)`` gives, or gave when the modules were as they are: see ``ready``.

    Args:
        owner: makes the call.
        part: the name for a part of ``owner``.
        x: the input of this call.
        look: looks closely; returns a fused call and what it needs, or None for plain modules.
    """
    known: tuple[Site, Any] | None = ready.recall(owner, part, x)
    if known is not None:
        return known
    found = look(x)
    if found is not None and not torch.compiler.is_compiling():
        site = found[0]
        ready.keep(owner, part, (site,), ready.of_site(owner, site), lambda: look(x))
    return found


def is_stem_pool(pool: nn.Module | None) -> bool:
    """True for the max-pool that the stem op computes: 3x3, stride 2, padding 1."""
    return (
        type(pool) is nn.MaxPool2d
        and (pair(pool.kernel_size), pair(pool.stride), pair(pool.padding), pair(pool.dilation))
        == ((3, 3), (2, 2), (1, 1), (1, 1))
        and not pool.ceil_mode
        and not pool.return_indices
    )
