# SPDX-License-Identifier: BSD-3-Clause
"""Which eager layers each layer of the fused model replaces."""

from __future__ import annotations

from collections.abc import Sequence

from resnet_fused.profile.record import Part


def match(eager: Sequence[Part], fused: Sequence[Part]) -> list[list[int]]:
    """Give every eager layer to one layer of the fused model.

    A module that a fused call replaces goes to that call; where several do, as with a ReLU that a
    block calls three times, to the last of those whose convolutions eager has come past. A layer
    that runs unfused goes to itself. What is left are operations without a module of their own,
    additions and functional ReLUs: they go to the call that is being put together at that place.

    Args:
        eager: layers of the original model, in order.
        fused: layers of the fused one, in order.

    Returns:
        For every fused layer the numbers of the eager ones, in order.
    """
    groups: list[list[int]] = [[] for _ in fused]
    if not fused:
        return groups
    seen: dict[int, set[str]] = {i: set() for i, part in enumerate(fused) if part.call}
    alone = {i for i, part in enumerate(fused) if part.call is None}
    for number, layer in enumerate(eager):
        of = _owner(layer, fused, seen, alone)
        alone.discard(of)
        if of in seen:
            seen[of].add(layer.module)
        groups[of].append(number)
    return groups


def _owner(layer: Part, fused: Sequence[Part], seen: dict[int, set[str]], alone: set[int]) -> int:
    """The fused layer that stands for an eager one."""
    replacing = [i for i in seen if _replaces(fused[i], layer.module)]
    if replacing:
        new = [i for i in replacing if layer.module not in seen[i]]
        if new and any(layer.module in _convs(fused[i]) for i in new):
            return new[0]
        return max((i for i in replacing if _begun(i, fused, seen)), default=replacing[0])
    same = [i for i in alone if (fused[i].module, fused[i].kind) == (layer.module, layer.kind)]
    if same:
        return min(same)
    begun = [i for i in seen if _begun(i, fused, seen)]
    near = [i for i in begun if _related(fused[i], layer.module)]
    return max(near or begun, default=0, key=lambda i: (len(_owner_of(fused[i])), i))


def _owner_of(part: Part) -> str:
    """The module whose forward runs a layer."""
    return part.call.owner if part.call else part.module


def _convs(part: Part) -> tuple[str, ...]:
    return part.call.convs if part.call else ()


def _replaces(part: Part, module: str) -> bool:
    """Whether a fused call stands for a module, or for one of which it is a part."""
    return part.call is not None and any(
        module == name or module.startswith(name + ".") for name in part.call.modules if name
    )


def _begun(i: int, fused: Sequence[Part], seen: dict[int, set[str]]) -> bool:
    """Whether eager is past a convolution of a call or, if it has none, of all before it."""
    if _convs(fused[i]):
        return bool(seen[i])
    return all(seen[j] for j in seen if j < i and _convs(fused[j]))


def _related(part: Part, module: str) -> bool:
    """Whether the owner of a call is the module in which an operation runs, or around it."""
    owner = _owner_of(part)
    return not owner or module == owner or module.startswith(owner + ".")
