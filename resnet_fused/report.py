# SPDX-License-Identifier: BSD-3-Clause
"""report: what runs fused in a model, on which path, and why the rest does not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from resnet_fused import _extension, dispatch
from resnet_fused.fusion.plan import survey
from resnet_fused.fusion.units import child, is_native, is_planned, original
from resnet_fused.modules import QUANTISED, Fused, Site, pair, ungraphed, why_plain


class Row(NamedTuple):
    """One convolution.

    Args:
        name: its name in the model.
        pattern: the op that computes it, or would; empty if there is none.
        fused: whether the op runs if the model is called now.
        path: what computes it: a path of ``dispatch.choose``, or ``plain``, the original modules.
        reason: why it is not fused or, if it is, why the op takes the reference path, or what
            slows it down.
    """

    name: str
    pattern: str
    fused: bool
    path: str
    reason: str


class Report:
    """The rows of ``report``, one per convolution in the model's order; prints as a table."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __str__(self) -> str:
        head = Row._fields
        cells = [
            head,
            *((r.name, r.pattern, "yes" if r.fused else "no", *r[3:]) for r in self.rows),
        ]
        widths = [max(len(str(c[i])) for c in cells) for i in range(len(head))]
        lines = [
            "  ".join(str(c).ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
            for row in cells
        ]
        return "\n".join([*lines, self.summary()])

    def __repr__(self) -> str:
        return f"<Report: {self.summary()}>"

    def summary(self) -> str:
        """One line: how many convolutions are fused, and into what."""
        fused = [r for r in self.rows if r.fused]
        patterns = Counter(f"{r.pattern} on {r.path}" for r in fused)
        parts = ", ".join(f"{n} in {what}" for what, n in patterns.items())
        return f"{len(fused)} of {len(self.rows)} convolutions fused" + (
            f": {parts}" if parts else ""
        )


class _Rank(IntEnum):
    """What a claim is worth: the first kind that anyone makes decides."""

    FUSED = 0  # part of a fused call
    REFUSED = 1
    BROKEN = 2  # the module was fused, and no longer can be
    POSSIBLE = 3  # fuse() would
    UNREADABLE = 4


class _Claim(NamedTuple):
    """What one module says about a convolution below it."""

    rank: _Rank
    pattern: str
    reason: str
    groups: int = 1  # the most of any convolution in the call


def report(model: nn.Module) -> Report:
    """List every convolution of ``model``: fused or not, on which path, and why.

    Nothing of the model is changed; modules that ``fuse`` has not seen are looked at as it would.

    Args:
        model: any module.

    Returns:
        Rows with ``name``, ``pattern``, ``fused``, ``path`` and ``reason``; prints as a table.
    """
    model = ungraphed(model)
    claims: dict[int, list[_Claim]] = {}
    for conv, claim in _claims(model):
        claims.setdefault(id(conv), []).append(claim)
    return Report(
        [_row(n, m, claims.get(id(m), [])) for n, m in model.named_modules() if is_conv(m)]
    )


def is_conv(module: nn.Module) -> bool:
    """True for anything that a reader would call a convolution."""
    if isinstance(module, _ConvNd):
        return True
    if isinstance(module, torch.jit.ScriptModule):
        return "Conv" in str(getattr(module, "original_name", ""))
    weight = getattr(module, "weight", None)
    if "conv" not in type(module).__name__.lower() or isinstance(module, (nn.Sequential, Fused)):
        return False
    return callable(weight) or (weight is not None and weight.dim() >= 3)


def _claims(model: nn.Module) -> Iterator[tuple[nn.Module, _Claim]]:
    for module in model.modules():
        if isinstance(module, Fused) and is_native(module):
            for site in module.fused_sites():
                reason = why_plain(module, site) or ""
                yield from _claim_site(module, site, _Rank.FUSED, reason)
    for name, module, plan in survey(model):
        planned = is_planned(module)
        rank = _Rank.FUSED if planned else _Rank.POSSIBLE
        reason = (plan.why_plain(module) or "") if planned else "fuse() was not called on it"
        for site in plan.sites:
            yield from _claim_site(module, site, rank, reason)
        for path, why in plan.refused.items():
            yield child(module, path), _Claim(_Rank.REFUSED, "", why)
        if plan.error:
            rank = _Rank.BROKEN if planned else _Rank.UNREADABLE
            where = f"'{name}' ({original(module).__name__})" if name else original(module).__name__
            for below in filter(is_conv, module.modules()):
                yield below, _Claim(rank, "", f"{where}: {plan.error}")


def _claim_site(
    module: nn.Module, site: Site, rank: _Rank, reason: str
) -> Iterator[tuple[nn.Module, _Claim]]:
    """A claim on each convolution of one call."""
    convs = [child(module, conv) for conv in site.convs]
    groups = max((getattr(conv, "groups", 1) for conv in convs), default=1)
    for conv in convs:
        yield conv, _Claim(rank, site.pattern, reason, groups)


def _why_onednn(conv: Any, pattern: str) -> str:
    """Why a CPU's own kernels leave a convolution to oneDNN, as csrc/ops/conv_plan.h decides; empty
    if they do not.
    """
    if conv.groups > 1:
        return "own kernels take no grouped convolutions"
    channels, (_, window) = conv.weight.shape[1], conv.kernel_size
    if pattern == "stem" and channels <= 4 and window <= 8 and conv.dilation[1] == 1:
        return ""
    if channels >= 16:
        return ""
    sizes = zip(pair(conv.padding), conv.dilation, conv.kernel_size, strict=True)
    outside = any(padding > dilation * (size - 1) for padding, dilation, size in sizes)
    return "" if outside else f"{channels} channels fill less than half of an own kernel's step"


def _path(conv: nn.Module, claim: _Claim) -> dispatch.Path:
    """What computes a fused convolution now."""
    weight: Any = conv.weight
    path = dispatch.path_on(weight.device, weight.dtype, claim.pattern, claim.groups)
    if path.name in ("amx", "avx512") and (reason := _why_onednn(conv, claim.pattern)):
        return dispatch.Path("onednn", reason)
    if path.name != "cuda" or claim.pattern == "stem":  # whose kernel reads weights in any order
        return path
    notes = [path.reason] if path.reason else []
    hopper = _extension.hopper()
    if hopper and torch.cuda.get_device_capability(weight.device) == (9, 0):
        pairs = ", two convolutions as one where that is faster" if hopper == "pairs" else ""
        notes.append(
            f"kernels for Hopper GPUs where they fit{pairs}, as RESNET_FUSED_HOPPER={hopper} asks"
        )
    if not weight.is_contiguous(memory_format=torch.channels_last):
        notes.append(
            "weights are converted on each call; model.to(memory_format=torch.channels_last) "
            "avoids it"
        )
    return dispatch.Path(path.name, "; ".join(notes))


def _row(name: str, conv: nn.Module, claims: list[_Claim]) -> Row:
    if not claims:
        reason = f"{type(conv).__name__} is not called by any forward that could be read"
        if isinstance(conv, torch.jit.ScriptModule):
            reason = "TorchScript cannot be changed; fuse the model before"
        elif type(conv).__module__.startswith("torch.ao."):
            reason = QUANTISED
        return Row(name, "", False, "plain", reason)
    rank = min(c.rank for c in claims)
    best = [c for c in claims if c.rank == rank]
    pattern = best[0].pattern
    if rank in (_Rank.BROKEN, _Rank.UNREADABLE):
        reason = best[-1].reason  # the nearest module's
    else:
        reason = next((c.reason for c in best if c.reason), "")  # one plain call decides
    if rank == _Rank.FUSED and not reason:
        others = (c.reason for c in claims if c.rank == _Rank.REFUSED)
        reason = next((f"another call of it: {other}" for other in others), "")
    if rank == _Rank.FUSED and not reason:
        path = _path(conv, best[0])
        return Row(name, pattern, True, path.name, path.reason)
    return Row(name, pattern, False, "plain", reason)
