# SPDX-License-Identifier: BSD-3-Clause
"""Which modules are read on their own, which are one operation, which belong to their caller."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from resnet_fused.modules import FROZEN, Fused, ends_in_activation, is_graphed


def child(module: nn.Module, path: str) -> nn.Module:
    """The submodule of ``module`` at a dotted path; ``""`` is the module itself.

    Raises:
        KeyError, AttributeError: there is none.
    """
    for name in path.split(".") if path else ():
        module = module._modules[name]  # type: ignore[assignment]
    return module


def original(module: nn.Module) -> type[nn.Module]:
    """The class of ``module`` as it was before fuse()."""
    return getattr(type(module), "fused_from", type(module))


def is_planned(module: nn.Module) -> bool:
    """True for a module that fuse() has changed."""
    return "fused_from" in type(module).__dict__


def is_conv(module: nn.Module) -> bool:
    """True for torch's convolutions of any kind and their subclasses."""
    return isinstance(module, _ConvNd)


def is_norm(module: nn.Module) -> bool:
    """True for a BatchNorm of any kind, frozen ones and subclasses included."""
    frozen = original(module).__name__ in FROZEN or ends_in_activation(module)
    return frozen or isinstance(module, _NormBase)


def is_native(module: nn.Module) -> bool:
    """True for a module written with fused calls, as the package's own models are."""
    mro = original(module).__mro__
    if Fused not in mro:
        return False
    # A subclass with a forward of its own no longer makes the calls that its base class lists.
    forward, sites = (
        next(i for i, c in enumerate(mro) if name in c.__dict__)
        for name in ("forward", "fused_sites")
    )
    return forward >= sites


def is_sequential(module: nn.Module) -> bool:
    """True for nn.Sequential and subclasses that run as it does."""
    return isinstance(module, nn.Sequential) and original(module).forward is nn.Sequential.forward


def is_leaf(module: nn.Module) -> bool:
    """True for one operation to its caller: torch's own, any BatchNorm or convolution."""
    if is_norm(module) or is_conv(module) or isinstance(module, torch.jit.ScriptModule):
        return True
    if is_native(module) or is_graphed(module):
        return True
    return original(module).__module__.startswith("torch.") and not is_sequential(module)


def is_unit(module: nn.Module) -> bool:
    """True for a module whose forward fuse() tries to read on its own."""
    if isinstance(module, torch.fx.GraphModule):
        return True
    return not is_leaf(module) and original(module).forward is not nn.Module.forward


def inlinable(module: nn.Module, helpers: bool = True) -> bool:
    """Whether the forward of ``module`` is read as part of its caller's.

    That is an nn.Sequential of operations, and (with ``helpers``) a small module of them, such as a
    convolution with its BatchNorm and activation.
    """
    if is_leaf(module) or "forward" in module.__dict__:
        return False
    if not is_sequential(module):
        convs = sum(is_conv(m) for m in module.modules())
        if not helpers or convs > 1 or original(module).forward is nn.Module.forward:
            return False
        helpers = False
    return all(is_leaf(m) or inlinable(m, helpers) for m in module.children())
