# SPDX-License-Identifier: BSD-3-Clause
"""fuse and unfuse: give modules a forward with fused calls, and take it away again.

Nothing of a model is renamed, copied or re-registered. A module whose forward can be improved gets
a subclass of its class, whose forward runs the plan where it may, else the original forward.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import warnings
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import fx, nn

from resnet_fused.dispatch import only_torch_ops
from resnet_fused.fusion.plan import Plan, current_plan, forgotten, survey
from resnet_fused.fusion.steps import as_eager
from resnet_fused.fusion.units import child, is_planned
from resnet_fused.modules import Fused, Site, is_graphed, ungraphed
from resnet_fused.ops import ConvBN
from resnet_fused.ready import NAME, recall
from resnet_fused.uint8 import NAME as NORM
from resnet_fused.uint8 import keep_norm, with_floats

_PLAN = "_fuse_plan"


class Planned(Fused):
    """Mixin that fuse() puts before a module's class."""

    fused_from: type
    _fuse_plan: Plan

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keep the hooks that classes put on being subclassed (registries) out of this."""

    def fused_sites(self) -> tuple[Site, ...]:
        """The fused calls in the forward."""
        return current_plan(self).sites

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as the original class, to be fused again when loaded."""
        reduced: Any = super().__reduce_ex__(max(2, protocol))
        function, args = reduced[:2]
        if function is copyreg.__newobj__ and args[0] is type(self):  # type: ignore[attr-defined]
            return (_new, (self.fused_from, *args[1:]), *reduced[2:])
        return reduced


class PlannedGraph(Planned):
    """The mixin for a torch.fx.GraphModule, which writes its code into its class, and itself makes
    its copies.
    """

    def _unfused(self, method: str, *args: Any) -> Any:
        """Call a method as the original class; who calls the model meanwhile gets that, too."""
        fused: Any = type(self)
        self.__class__ = fused.fused_from
        try:
            return getattr(self, method)(*args)
        finally:
            self.__class__ = fused

    def recompile(self) -> Any:
        """Make the forward anew from ``graph``; the next call fuses it again."""
        return self._unfused("recompile")

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        made = _fused_graph(self._unfused("__deepcopy__", memo))
        keep_norm(self, made)  # type: ignore[arg-type]
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        return (_unpickled_graph, self._unfused("__reduce_ex__", protocol)[:2])


def _fused_graph(module: nn.Module) -> nn.Module:
    """A plain GraphModule as a fused one, whose plan is made at the first call."""
    module._fuse_plan = forgotten()  # type: ignore[assignment]
    module.__class__ = _planned_class(type(module))
    return module


def _unpickled_graph(function: Any, args: Any) -> nn.Module:
    made = _fused_graph(function(*args))
    keep_norm(made, made)  # its hook is lost
    return made


_CLASSES: WeakValueDictionary[type, type[nn.Module]] = WeakValueDictionary()


def _planned_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``cls`` whose forward runs the plan where it may be run."""
    made = _CLASSES.get(cls)
    if made is not None:
        return made

    @functools.wraps(cls.forward)  # tools look at the parameters
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = _planned_call(self, args, kwargs)
        norm = self.__dict__.get(NORM)
        if norm is not None and (call is None or not call[0].takes_bytes):
            args, kwargs = with_floats(self, norm, args, kwargs)
        if call is None:
            return cls.forward(self, *args, **kwargs)
        plan, convs = call
        y = plan.run(self, convs, *args)  # type: ignore[misc]
        return as_eager(y, args[0], lambda: first_weight(self))

    names = {
        "__module__": cls.__module__,
        "__doc__": cls.__doc__,
        "fused_from": cls,
        "forward": forward,
        "_way_of_bytes": {"forward": forward},
    }
    mixin = PlannedGraph if issubclass(cls, fx.GraphModule) else Planned
    metaclass: Any = type(cls)
    fused: type[nn.Module] = metaclass(f"Fused{cls.__name__}", (mixin, cls), names)
    _CLASSES[cls] = fused
    return fused


def _planned_call(
    owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Plan, list[ConvBN]] | None:
    """The plan of a fused module, and its convolutions as they are now, if this call is for it."""
    known: tuple[Plan, list[ConvBN]] | None = recall(owner, "plan", args[0] if args else None)
    if known is not None and known[0] is owner._fuse_plan and known[0].is_of(owner):
        return known if known[0].takes(args, kwargs) else None
    if only_torch_ops():
        return None
    plan = current_plan(owner)
    if not plan.takes(args, kwargs) or plan.why_plain(owner) is not None:
        return None
    convs = plan.convs(owner)
    if not torch.compiler.is_compiling():
        plan.keep(owner)
    return plan, convs


def _new(cls: type[nn.Module], *args: Any) -> Any:
    """An uninitialised instance of the fused form of ``cls``; pickle fills it."""
    fused: Any = _planned_class(cls)
    return fused.__new__(fused, *args)


def first_weight(module: nn.Module) -> torch.Tensor | None:
    """The first convolution's weight: in eager its memory format decides the output's, too."""
    return next((p for p in module.parameters() if p.dim() == 4), None)


def fuse(
    model: nn.Module,
    inplace: bool = False,
    verify: torch.Tensor | tuple[torch.Tensor, ...] | None = None,
) -> nn.Module:
    """Make every convolution + BatchNorm (+ addition) + ReLU run as one call in eval mode.

    Parameters, buffers, names, hooks and ``state_dict`` keys stay as they are, weights stay live,
    and training runs the original code. ``report`` says what was fused and why the rest was not;
    ``unfuse`` undoes.

    Args:
        model: any module; what cannot be fused safely is left alone.
        inplace: change ``model`` itself; else a deep copy.
        verify: positional arguments of ``model``, a tensor or a tuple of tensors. On these the
            fused model is first compared with the original, see ``resnet_fused.verify``.

    Returns:
        The changed model. If there is nothing to fuse, it is unchanged and a warning says so.

    Raises:
        TypeError, ValueError: ``model`` is no module, or ``verify`` is nothing that it takes.
        VerificationError: on ``verify`` the fused model is wrong; ``model`` stays as it is.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if is_graphed(model):
        raise TypeError("model is graphed already; call graphed(fuse(model)) instead")
    if verify is not None:
        from resnet_fused.verify import verify as check  # which fuses, too

        check(model, verify)
    if not inplace:
        model = _copied(model)
    fuse_in_place(model)
    if not any(isinstance(m, Fused) for m in model.modules()):
        warnings.warn(
            f"nothing in {type(model).__name__} was fused; resnet_fused.report(model) says why",
            stacklevel=2,
        )
    return model


def _copied(model: nn.Module) -> nn.Module:
    """A deep copy in the same modes, told the same, which torch.fx.GraphModule's copies forget."""
    before = dict(model.named_modules())
    with torch.inference_mode(False):  # tensors made in inference mode cannot be trained
        model = copy.deepcopy(model)
    for name, m in model.named_modules():
        if name in before:
            m.training = before[name].training
            keep_norm(before[name], m)
    return model


def fuse_in_place(model: nn.Module) -> None:
    """``fuse`` without a word."""
    plans = list(survey(model))
    parts: set[int] = set()  # read as part of their callers' plans
    for _, module, plan in plans:
        if plan.run is not None:
            parts.update(id(child(module, path)) for path in plan.inlined)
    for _, module, plan in plans:
        if plan.run is not None and id(module) not in parts and not is_planned(module):
            module._fuse_plan = plan  # type: ignore[assignment]
            module.__class__ = _planned_class(type(module))
            keep_norm(module, module)
    for module in model.modules():
        if id(module) in parts:
            _restore(module)


def unfuse(model: nn.Module) -> nn.Module:
    """Undo ``fuse`` in place: every module gets its class back.

    Models of this package were built of fused ops, never fused; a warning says that they stay.

    Args:
        model: a module given to ``fuse``, or any part of it.

    Returns:
        ``model``.
    """
    net = restore(ungraphed(model))
    own = next((type(module).__name__ for module in net.modules() if isinstance(module, Fused)), "")
    if own:
        warnings.warn(
            f"unfuse() leaves {own} as it is: this package builds it of fused ops; run it within "
            "resnet_fused.backend('reference') to have plain PyTorch",
            stacklevel=2,
        )
    return model


def restore(model: nn.Module) -> nn.Module:
    """What ``unfuse`` does, whatever the model is."""
    for module in model.modules():
        _restore(module)
    return model


def _restore(module: nn.Module) -> None:
    if is_planned(module):
        module.__class__ = module.fused_from  # type: ignore[assignment]
        del module.__dict__[_PLAN]
        module.__dict__.pop(NAME + "plan", None)
    elif isinstance(module, Planned):  # somebody subclassed the fused class
        module._fuse_plan = Plan(error="unfuse() was called")
