# SPDX-License-Identifier: BSD-3-Clause
"""What a fused call found when it looked at its modules, and a quick way to say that all of it is
still so.

At batch 1 a network spends as long in Python as in some of its stages, because weights that stream
through the caches push Python's own data out of them. So a module looks at its children once,
closely; later calls compare the same dictionaries and tensors in a few loops of the interpreter
itself: 7 us a block where looking again takes 14, and both some three times that in a network.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import chain
from operator import getitem, is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused import dispatch
from resnet_fused.modules import GLOBAL_HOOKS, HOOKS, Site, get

NAME = "_ready_"  # in a module's __dict__
# Every attribute that decides what a module computes, by kind; of other kinds nothing is known.
READS: dict[type, tuple[str, ...]] = {
    nn.Conv2d: ("stride", "padding", "dilation", "groups", "padding_mode"),
    nn.BatchNorm2d: ("eps", "training"),
    nn.SyncBatchNorm: ("eps", "training"),
    nn.MaxPool2d: ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    nn.AdaptiveAvgPool2d: ("output_size",),
    nn.ReLU: (),
    nn.Linear: (),
    nn.Identity: (),
    nn.Sequential: (),
}


class Unchanged:
    """Says whether modules are as they were: everything by identity, so that no code of others is
    run and equal values of another type count as others.

    Args:
        owner: the module that asks; it is not kept alive.
        holders: modules whose children count, by name; perhaps ``owner``.
        reads: modules and the attributes of each that count; parameters and buffers always do.
        silent: those of them that must have no hooks.
        absent: modules and an attribute that must not be there.
    """

    __slots__ = (
        "_absent",
        "_children",
        "_hooks",
        "_kinds",
        "_modules",
        "_reads",
        "_sizes",
        "_tensors",
        "_values",
    )

    def __init__(
        self,
        owner: nn.Module,
        holders: Iterable[nn.Module],
        reads: Sequence[tuple[nn.Module, tuple[str, ...]]],
        silent: Collection[nn.Module],
        absent: Iterable[tuple[nn.Module, str]] = (),
    ) -> None:
        # None stands for the owner, which would hold itself.
        def kept(module: nn.Module) -> nn.Module | None:
            return None if module is owner else module

        self._children = [(kept(m), list(m._modules), list(m._modules.values())) for m in holders]
        self._modules = [kept(m) for m, _ in reads]
        self._kinds = [type(m) for m, _ in reads]
        self._reads = [
            (itemgetter("_parameters", "_buffers", *names), kept(m)) for m, names in reads
        ]
        # The dictionaries of hooks themselves, too: some code removes hooks by a new one.
        self._reads += [(itemgetter(*HOOKS), kept(m)) for m in silent]
        self._values = list(chain.from_iterable(self._read(owner)))
        self._hooks = (*GLOBAL_HOOKS, *(m.__dict__[name] for m in silent for name in HOOKS))
        self._absent = [(kept(m), name) for m, name in absent]
        held = [d for m, _ in reads for d in (m._parameters, m._buffers)]
        self._sizes = [(d, len(d)) for d in held]
        found = [(d, name, d[name]) for d in held for name in d if name != "num_batches_tracked"]
        self._tensors = tuple(zip(*found, strict=True)) if found else ((), (), ())

    def _read(self, owner: nn.Module) -> list[tuple[Any, ...]]:
        return [get((owner if m is None else m).__dict__) for get, m in self._reads]

    def __call__(self, owner: nn.Module) -> bool:
        where, names, tensors = self._tensors
        try:
            return (
                all(map(is_, map(getitem, where, names), tensors))
                # As many values as there were: each reader always gives the same number.
                and all(map(is_, chain.from_iterable(self._read(owner)), self._values))
                and not any(self._hooks)
                and [type(owner if m is None else m) for m in self._modules] == self._kinds
                and all(len(d) == size for d, size in self._sizes)
                and all(
                    list(now := (owner if m is None else m)._modules) == keys
                    and all(map(is_, now.values(), children))
                    for m, keys, children in self._children
                )
                and not any(
                    name in (owner if m is None else m).__dict__ for m, name in self._absent
                )
            )
        except KeyError:  # a tensor or an attribute is gone
            return False


class Ready:
    """A fused call that may be made again.

    It lives in the module that makes it; copies and pickles of that have None in its place. It is
    no tuple, which torch.export would look into.

    Args:
        unchanged: asks the modules.
        owner: the module that it was made for; a shallow copy is another.
        calls: weight, op and groups of each call with a convolution, which a GPU may refuse.
        made: what ``keep`` was told to give.
        changes: how often the modules had changed.
    """

    __slots__ = ("calls", "changes", "made", "owner", "unchanged")

    def __init__(
        self,
        unchanged: Unchanged,
        owner: weakref.ref[nn.Module],
        calls: tuple[tuple[Tensor, str, int], ...],
        made: Any,
        changes: int,
    ) -> None:
        self.unchanged, self.owner, self.calls = unchanged, owner, calls
        self.made, self.changes = made, changes

    def __reduce__(self) -> tuple[Any, ...]:
        return (_nothing, ())

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None


def _nothing() -> None:
    """What copies and pickles have in the place of a ``Ready``."""


def of_site(owner: nn.Module, site: Site) -> Unchanged | None:
    """Says whether one call's modules are as they were; None if it cannot be told quickly."""
    modules = [get(owner, name) for name in site.modules]
    if any(type(m) not in READS for m in modules):
        return None
    reads = [(m, READS[type(m)]) for m in modules]
    if any(type(m.__dict__.get(name)) is list for m, names in reads for name in names):
        return None  # which may change unseen
    holders = [m for m in (owner, *modules) if m._modules]
    return Unchanged(owner, holders, reads, modules)


def keep(
    owner: nn.Module,
    part: str,
    sites: Iterable[Site],
    unchanged: Unchanged | None,
    look: Callable[[], Any],
) -> None:
    """Remember for ``recall`` that ``owner`` may make its fused calls.

    Args:
        owner: makes the calls.
        part: the name for a part of ``owner``.
        sites: the calls.
        unchanged: what must be so; None if nothing can be remembered.
        look: looks closely and returns what ``recall`` shall give; None if the calls may not be
            made. It is called after ``unchanged`` was made: what another thread changes meanwhile
            is in both, or makes ``unchanged`` false.
    """
    # Whose tensors are replaced at every call, as by torch.func.functional_call, gains nothing.
    most_changes = 16
    before: Ready | int | None = owner.__dict__.get(NAME + part)
    changes = before if isinstance(before, int) else 0
    if unchanged is None or owner.training or changes > most_changes:
        return
    made = look()
    if made is None:
        return
    calls = []
    for site in sites:
        convs: list[Any] = [get(owner, name) for name in site.convs]
        if convs:
            groups = max(conv.groups for conv in convs)
            calls.append((convs[0].weight, site.pattern, groups))
    owner.__dict__[NAME + part] = Ready(unchanged, weakref.ref(owner), tuple(calls), made, changes)


def recall(owner: nn.Module, part: str, x: Any) -> Any:
    """What ``keep`` remembered if that may be done again; None: look closely.

    Args:
        owner: as in ``keep``.
        part: as in ``keep``.
        x: the input of this call.
    """
    if torch.compiler.is_compiling():
        return None
    if owner.training:
        owner.__dict__.pop(NAME + part, None)  # who trains may replace what it holds
        return None
    ready: Any = owner.__dict__.get(NAME + part)
    if (
        type(ready) is not Ready
        or ready.owner() is not owner
        or not isinstance(x, Tensor)
        or dispatch.only_torch_ops()
    ):
        return None
    if not ready.unchanged(owner):
        owner.__dict__[NAME + part] = ready.changes + 1
        return None
    for weight, op, groups in ready.calls:
        if weight.is_cuda and dispatch.why_no_kernel(weight.device, weight.dtype, op, groups):
            return None
    return ready.made
