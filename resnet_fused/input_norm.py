# SPDX-License-Identifier: BSD-3-Clause
"""InputNorm: mean and std of images, with which a model takes them as bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

UNTOLD = (
    "x is uint8, and nothing says how to normalise it: tell the model once by "
    "resnet_fused.set_input_norm(model, mean, std), give the op norm=InputNorm(mean, std), or "
    "normalise x beforehand"
)


def check_mean(mean: Sequence[float]) -> None:
    """Refuse a mean of values up to 255: no values in [0, 1] have one above 1.

    Raises:
        ValueError: one is above 1.
    """
    if max(mean) > 1:
        raise ValueError(
            f"mean must be of values in [0, 1], got {tuple(mean)}; divide mean and std by 255 if "
            "they are of values from 0 to 255"
        )


@dataclass(frozen=True)
class InputNorm:
    """What a network's images were normalised with: ``(v / 255 - mean) / std`` for a byte ``v``.

    Computed as ``v * scale + shift`` with ``scale = 1 / (255 std)`` and ``shift = -mean / std``
    rounded to float32, product and sum each rounded to float32, then once to the network's dtype.

    Args:
        mean: per channel, of values in [0, 1].
        std: likewise, above 0.

    Raises:
        ValueError: a value is out of its range, or the two have not the same length.
    """

    mean: Sequence[float]
    std: Sequence[float]
    # By device. Neither parameter nor buffer: state_dict and conversions of dtype leave it alone.
    _tensors: dict[tuple[str, int | None], Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            value = getattr(self, name)
            try:
                numbers = tuple(float(v) for v in value)
            except (TypeError, ValueError):
                raise ValueError(f"{name} must be one number per channel, got {value!r}") from None
            object.__setattr__(self, name, numbers)
        if not self.mean or len(self.mean) != len(self.std):
            raise ValueError(
                f"mean and std must have one number per channel each, got {len(self.mean)} and "
                f"{len(self.std)}"
            )
        if not all(0 < s < math.inf for s in self.std):
            raise ValueError(f"std must be above 0, got {self.std}")
        numbers32 = torch.tensor(self._rows(), dtype=torch.float32)
        if not numbers32.isfinite().all():
            raise ValueError(
                f"mean and std must give finite 1 / (255 std) and mean / std in float32, got mean "
                f"{self.mean} and std {self.std}"
            )
        check_mean(self.mean)

    def _rows(self) -> list[list[float]]:
        scale = [1 / (255 * s) for s in self.std]
        return [scale, [-m / s for m, s in zip(self.mean, self.std, strict=True)]]

    def tensor(self, x: Tensor) -> Tensor:
        """Scales and shifts, shape [2, C], float32, on the device of ``x``; made there once."""
        if isinstance(x, FakeTensor):  # which takes no real one beside it
            with x.fake_mode:
                return torch.tensor(self._rows(), dtype=torch.float32).to(x.device)
        key = (x.device.type, x.device.index)
        made = self._tensors.get(key)
        if made is None:
            with torch.inference_mode(False):  # what is made in it cannot be saved for a backward
                made = torch.tensor(self._rows(), dtype=torch.float32, device=x.device)
            if type(made) is Tensor and not torch.compiler.is_compiling():
                self._tensors[key] = made
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> InputNorm:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return (InputNorm, (self.mean, self.std))


def normalise(x: Tensor, norm: Tensor, dtype: torch.dtype) -> Tensor:
    """Images of bytes as a network takes them; the meaning of ``InputNorm``.

    Args:
        x: uint8, shape [N, C, H, W].
        norm: scales and shifts as ``InputNorm.tensor`` gives them, shape [2, C], float32.
        dtype: of the result.

    Returns:
        ``x``'s shape, device and memory format.

    Raises:
        ValueError: ``norm`` has not one number per channel.
    """
    tracing = torch.jit.is_tracing()
    if not tracing and (x.dim() < 3 or x.shape[-3] != norm.shape[1]):
        raise ValueError(
            f"x must have {norm.shape[1]} channels [N, C, H, W], one for each mean and std, got "
            f"shape {tuple(x.shape)}; an array [N, H, W, C] is x.permute(0, 3, 1, 2)"
        )
    scale, shift = norm.unbind()
    symbolic = tracing or torch.compiler.is_compiling()
    if not symbolic and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        # As long as a row of pixels: torch is six times slower when it repeats three numbers.
        scale, shift = (v.repeat(x.shape[3]) for v in (scale, shift))
        rows = x.permute(0, 2, 3, 1).flatten(2).float().mul_(scale).add_(shift).to(dtype)
        return rows.unflatten(2, (x.shape[3], x.shape[1])).permute(0, 3, 1, 2)
    return (x.float() * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)).to(dtype)
