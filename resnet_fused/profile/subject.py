# SPDX-License-Identifier: BSD-3-Clause
"""What is profiled: a model fused and not, its input, and the setting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused.bench import machine, subjects
from resnet_fused.bench.results import versions
from resnet_fused.fuse import fuse
from resnet_fused.fusion.units import original
from resnet_fused.models import ResNet
from resnet_fused.modules import Fused, ungraphed
from resnet_fused.ops.conv_bn import autocast_on
from resnet_fused.profile.record import Recording, record
from resnet_fused.profile.spans import sharing
from resnet_fused.watched import plain


@dataclass(frozen=True)
class Subject:
    """A model fused and in plain PyTorch, and what each consists of.

    Args:
        fused: the model as it runs fused.
        eager: the original without fused calls; both share their parameters.
        x: positional arguments of both.
        after: the layers of `fused`.
        before: the layers of `eager`.
        facts: model, dtype, batch, size, device, threads and versions, by name.
    """

    fused: nn.Module
    eager: nn.Module
    x: tuple[Tensor, ...]
    after: Recording
    before: Recording
    facts: dict[str, Any]

    @property
    def device(self) -> str:
        """Where it runs."""
        return str(self.x[0].device)

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        x = self.x[0]
        return torch.get_autocast_dtype(x.device.type) if autocast_on(x) else x.dtype


def bare(model: nn.Module) -> nn.Module:
    """What `graphed` or `torch.compile` was given: only its operations can be told apart."""
    inner = getattr(ungraphed(model), "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else ungraphed(model)


def pair(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The model fused, and the original in plain PyTorch; both share the parameters of `model`.

    Raises:
        TypeError: `model` is no module.
        ValueError: it is in train mode.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    model = bare(model)
    if model.training:
        raise ValueError("model must be in eval mode, in which it runs fused; call model.eval()")
    if any(isinstance(m, Fused) for m in model.modules()):
        return model, plain(sharing(model))
    return fuse(sharing(model), inplace=True), model


def arguments(x: Any) -> tuple[Tensor, ...]:
    """`x` as positional arguments.

    Raises:
        TypeError: it is no tensor or tuple of tensors.
        ValueError: one is empty, or the first holds no floats, or is on a device without a clock.
    """
    given = x if isinstance(x, tuple) else (x,)
    if not given or not all(isinstance(a, Tensor) for a in given):
        kinds = ", ".join(type(a).__name__ for a in given)
        raise TypeError(
            "x must be a tensor or a tuple of tensors, the model's positional arguments, got "
            + (f"({kinds})" if isinstance(x, tuple) else kinds)
        )
    empty = next((a for a in given if not a.numel()), None)
    if empty is not None:
        raise ValueError(f"x must hold something to compute on, got shape {tuple(empty.shape)}")
    first = given[0]
    if not first.is_floating_point():
        raise ValueError(
            f"x must be floating point, in whose dtype peaks are measured, got {first.dtype}; "
            "normalise images of bytes beforehand"
        )
    if first.device.type not in ("cpu", "cuda"):
        raise ValueError(f"x must be on a CPU or a CUDA device, got {first.device}")
    return given


def subject(model: nn.Module, x: Any) -> Subject:
    """Read a model's layers by running it.

    Args:
        model: in eval mode; nothing in it is changed.
        x: its positional arguments: a tensor, or a tuple of tensors.

    Raises:
        TypeError: `model` is no module, or `x` no tensor or tuple of tensors.
        ValueError: `model` is in train mode, does not take `x`, or runs no operation on it.
    """
    given = arguments(x)
    fused, eager = pair(model)
    name = original(bare(model)).__name__
    with torch.inference_mode():
        try:
            before = record(sharing(eager), lambda net: net(*given))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the user's code
            raise ValueError(
                f"x must be an input that {name} takes; it raised {type(error).__name__}: {error}"
            ) from error
        after = record(sharing(fused), lambda net: net(*given))
        if not before.parts or not after.parts:
            raise ValueError(f"{name} runs no torch operation on x")
        if isinstance(eager, ResNet):  # the same operations with less Python around them
            eager = subjects.plain(eager)
    return Subject(fused, eager, given, after, before, _setting(name, given[0]))


def _setting(name: str, x: Tensor) -> dict[str, Any]:
    """What is measured where."""
    known = machine.describe(str(x.device))
    names = {dtype: short for short, dtype in subjects.DTYPES.items()}
    return {
        "model": name,
        "dtype": names.get(x.dtype, str(x.dtype).removeprefix("torch.")),
        "batch": x.shape[0] if x.dim() else 1,
        "size": "x".join(map(str, x.shape[2:])),
        **{key: known[key] for key in ("device", "threads", "cpu_capability", "amx", "cuda")},
        "versions": versions(),
    }
