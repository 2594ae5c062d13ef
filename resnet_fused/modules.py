# SPDX-License-Identifier: BSD-3-Clause
"""Between modules and ops: reads live tensors off modules, and says when a fused call may replace
them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as global_hooks
from torch.nn.modules.batchnorm import _NormBase

from resnet_fused import dispatch
from resnet_fused.ops.conv_bn import ConvBN

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS = tuple(getattr(global_hooks, f"_global{kind}") for kind in HOOKS)
# Frozen variants hold buffers of the same names and behave as BatchNorm in eval mode; each library
# has its own.
FROZEN = ("FrozenBatchNorm2d",)
STATISTICS = {"weight", "bias", "running_mean", "running_var"}
QUANTISED = "it is quantised, or made ready for that, and there is no INT8"
# timm's, which go on with their children ``drop`` and ``act``; fuse() takes them apart.
WITH_ACTIVATION = ("BatchNormAct2d", "SyncBatchNormAct", "FrozenBatchNormAct2d")


@dataclass(frozen=True)
class Site:
    """The submodules that one fused call replaces; names are relative to the module that owns the
    call.

    Args:
        pattern: name of the op.
        modules: every submodule replaced, in execution order.
        convs: those of them that are convolutions.
    """

    pattern: str
    modules: tuple[str, ...]
    convs: tuple[str, ...]

    # Each name and its parts, split once.
    paths: tuple[tuple[str, tuple[str, ...]], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        paths = tuple((name, tuple(name.split("."))) for name in self.modules)
        object.__setattr__(self, "paths", paths)


class Fused:
    """Mixin of every module whose forward may call a fused op."""

    def fused_sites(self) -> tuple[Site, ...]:
        """The calls this module makes when nothing keeps it from making them."""
        raise NotImplementedError


def is_graphed(module: nn.Module) -> bool:
    """True for what ``graphed`` returns."""
    return "graphed_from" in type(module).__dict__


def ungraphed(module: nn.Module) -> nn.Module:
    """The model that ``graphed`` was given; any other module as it is."""
    handle: Any = module
    model: nn.Module = handle._graphs.model if is_graphed(module) else module
    return model


def pair(value: Any) -> tuple[int, int]:
    """A convolution attribute as (vertical, horizontal)."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def conv_bn(conv: Any, bn: Any | None) -> ConvBN:
    """The live tensors and geometry of ``conv`` and the BatchNorm ``bn`` behind it, if any.

    Nothing is copied: whatever changed a parameter before this call counts.
    """
    geometry = (pair(conv.stride), pair(conv.padding), pair(conv.dilation), conv.groups)
    # Module.__getattr__ takes 0.5 us per tensor, a tenth of a small network's time; its
    # dictionaries are quick.
    own = conv._parameters
    if bn is None:
        return ConvBN(own["weight"], own["bias"], None, None, None, None, 0.0, *geometry)
    stats = bn._buffers
    affine = stats if "weight" in stats else bn._parameters  # frozen variants hold buffers only
    return ConvBN(
        own["weight"],
        own["bias"],
        affine["weight"],
        affine["bias"],
        stats["running_mean"],
        stats["running_var"],
        bn.eps,
        *geometry,
    )


def get(owner: nn.Module, name: str) -> nn.Module:
    """The submodule at the dotted path ``name``."""
    for part in name.split("."):
        owner = owner._modules[part]  # type: ignore[assignment]
    return owner


def has_hooks(module: nn.Module) -> bool:
    """True if something watches or changes calls of ``module``."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def ends_in_activation(module: nn.Module) -> bool:
    """True for timm's BatchNorms that run ``drop`` and ``act`` as well."""
    kind = type(module)
    named = kind.__name__ in WITH_ACTIVATION and kind.__module__.startswith("timm.")
    return named and module._modules.keys() >= {"drop", "act"}


# Modules with nothing to check beyond their exact type.
PLAIN = frozenset(
    (nn.ReLU, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Linear, nn.Identity, nn.Flatten, nn.Sequential)
)
NORMS = frozenset((nn.BatchNorm2d, nn.SyncBatchNorm))


def why_not_fusible(module: nn.Module) -> str | None:
    """Why a fused op cannot stand for ``module``, whatever its mode; None if it can."""
    kind = type(module)
    if kind is nn.Conv2d:
        if module.padding_mode != "zeros":
            return f"padding_mode is {module.padding_mode!r}, not 'zeros'"
        if isinstance(module.padding, str):
            return f"padding is {module.padding!r}, not a number"
        if module._parameters.get("weight") is None:
            return "its weight is computed from other tensors"
        return None
    act = kind not in PLAIN and ends_in_activation(module)
    if kind in NORMS or (act and isinstance(module, _NormBase)):
        if module._buffers.get("running_mean") is None:
            return "BatchNorm without running statistics"
        return (
            None if "weight" in module._parameters else "its weight is computed from other tensors"
        )
    if kind in PLAIN:
        return None
    if act or kind.__name__ in FROZEN:
        fits = (
            isinstance(getattr(module, "eps", None), float) and set(module._buffers) >= STATISTICS
        )
        return None if fits else f"{kind.__name__} without eps and the four usual buffers"
    if kind.__module__.startswith("torch.ao."):
        return QUANTISED
    return f"{kind.__name__} is not fused"


def why_plain(owner: nn.Module, site: Site) -> str | None:
    """Why the modules of ``site`` must run as plain PyTorch at this call; None if the fused op may
    stand for them.

    Checked at every call, because hooks, modes and replaced submodules come after construction.
    """
    # Its own flag alone says nothing: a new Sequential around children in eval mode has it set.
    training = owner.training
    if training and not site.paths:
        return "training mode"
    weight, groups = None, 1
    for name, path in site.paths:
        module: Any = owner
        for part in path:
            module = module._modules.get(part)
            if module is None:
                return f"'{name}' is gone"
        kind = type(module)
        if kind not in PLAIN:
            reason = why_not_fusible(module)
            if reason is not None:
                return f"'{name}': {reason}"
        if module.training and (training or isinstance(module, _NormBase)):
            return "training mode" if training else f"'{name}' is in training mode"
        if has_hooks(module):
            return f"a hook on '{name}'"
        if kind is nn.Conv2d:
            weight = module._parameters["weight"]
            groups = max(groups, module.groups)
    if weight is not None and weight.is_cuda:
        reason = dispatch.why_no_kernel(weight.device, weight.dtype, site.pattern, groups)
        if reason is not None:
            return reason
    if global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks:
        return "a global forward hook"
    if global_hooks._global_backward_hooks or global_hooks._global_backward_pre_hooks:
        return "a global backward hook"
    return None


def compiling() -> bool:
    """True inside torch.compile or torch.export."""
    return torch.compiler.is_compiling()
