# SPDX-License-Identifier: BSD-3-Clause
"""From a decoded image to the model's input: resize and crop in uint8, normalise last.

The result differs from the usual order (to float, resize, crop, normalise) by at most one level of
255; more only where bicubic overshoots black or white, which 8 bits clip after each of two passes.
"""

from __future__ import annotations

import numbers
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from resnet_fused import input_norm
from resnet_fused.input_norm import InputNorm, check_mean
from resnet_fused.predict.decode import Decoded

INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
# What undoes each EXIF orientation.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

FIELDS = ("resize", "crop", "interpolation", "mean", "std")  # of Preprocessing, by the user

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Preprocessing:
    """What a model's weights were made for.

    Args:
        resize: length of the shorter side after the resize.
        crop: side of the square cut from the centre; at most ``resize``.
        interpolation: "bilinear" or "bicubic", always with antialias.
        mean: per channel, of values in [0, 1].
        std: likewise.
        origin: where these values come from, for the user.

    Raises:
        ValueError: a value is out of its range.
    """

    resize: int = 256
    crop: int = 224
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    origin: str = "the default for weights that name none"

    def __post_init__(self) -> None:
        for name in ("resize", "crop"):
            if not isinstance(getattr(self, name), numbers.Integral):
                raise ValueError(f"{name} must be an integer, got {getattr(self, name)!r}")
        if not 1 <= self.crop <= self.resize:
            raise ValueError(
                f"crop must be from 1 to resize ({self.resize}), got {self.crop}; "
                "give --resize and --crop together"
            )
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"interpolation must be {' or '.join(INTERPOLATIONS)}, got {self.interpolation}"
            )
        for name in ("mean", "std"):
            if len(getattr(self, name)) != 3:
                raise ValueError(f"{name} must have 3 values, got {len(getattr(self, name))}")
        check_mean(self.mean)
        if min(self.std) <= 0:
            raise ValueError(f"std must be above 0, got {self.std}")

    def __str__(self) -> str:
        def numbers(values: tuple[float, ...]) -> str:
            return ",".join(f"{value:g}" for value in values)

        return (
            f"resize {self.resize} (shorter side, {self.interpolation}, antialias), centre crop "
            f"{self.crop}, mean {numbers(self.mean)}, std {numbers(self.std)}; {self.origin}"
        )


def preprocessing_of(weights: Any, **overrides: Any) -> Preprocessing:
    """The preprocessing that weights name, else the default, changed where the user says so.

    Args:
        weights: None, a file's path, or an object whose ``transforms()`` has torchvision's
            attributes ``crop_size, resize_size, mean, std, interpolation``.
        **overrides: fields of Preprocessing; None leaves a field as it is. If all are given, the
            weights are not asked.

    Raises:
        ValueError: a value is out of its range, or the weights name none that this can be.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    if given.keys() >= set(FIELDS):
        return Preprocessing(**given, origin="as given")
    named = _named_by(weights) if hasattr(weights, "transforms") else Preprocessing()
    if given:
        given["origin"] = f"{named.origin}, except {' '.join(given)} as given"
    return replace(named, **given)


def _named_by(weights: Any) -> Preprocessing:
    try:
        preset = weights.transforms()
        return Preprocessing(
            resize=preset.resize_size[0],
            crop=preset.crop_size[0],
            interpolation=preset.interpolation.value,
            mean=tuple(preset.mean),
            std=tuple(preset.std),
            origin=f"from {weights}",
        )
    except ValueError as error:
        raise ValueError(f"{error}; or give all of {', '.join(FIELDS)}") from error


def geometry(width: int, height: int, prep: Preprocessing) -> tuple[tuple[int, int], Box]:
    """Size of the whole image after the resize, and the box of the crop in it.

    Args:
        width: of the upright image.
        height: likewise.
        prep: says ``resize`` and ``crop``.

    Returns:
        ``(width, height)`` and ``(left, top, right, bottom)``, rounded as torchvision rounds.
    """
    short, long = sorted((width, height))
    longer = int(prep.resize * long / short)
    size = (prep.resize, longer) if width <= height else (longer, prep.resize)
    left, top = (round((side - prep.crop) / 2) for side in size)
    return size, (left, top, left + prep.crop, top + prep.crop)


def stored(size: tuple[int, int], box: Box, orientation: int) -> tuple[tuple[int, int], Box]:
    """Size and box in the image as it is stored, given those in the upright image.

    Args:
        size: ``(width, height)`` of the upright image.
        box: ``(left, top, right, bottom)`` in it.
        orientation: EXIF's, 1 to 8.
    """
    (width, height), (left, top, right, bottom) = size, box
    if orientation in (2, 3, 6, 7):
        left, right = width - right, width - left
    if orientation in (3, 4, 7, 8):
        top, bottom = height - bottom, height - top
    if orientation >= 5:
        return (height, width), (top, left, bottom, right)
    return size, (left, top, right, bottom)


def resize_and_crop(image: Decoded, prep: Preprocessing) -> Tensor:
    """Make the model's input of one image, still in uint8.

    The orientation is applied to the small result, which equals turning the large image first.

    Args:
        image: from ``decode``.
        prep: what to do.

    Returns:
        uint8, shape [crop, crop, 3].
    """
    pixels, orientation = image
    if isinstance(pixels, Tensor):
        raw_height, raw_width = pixels.shape[1:]
    else:
        raw_width, raw_height = pixels.size
    turned = orientation >= 5
    upright = (raw_height, raw_width) if turned else (raw_width, raw_height)
    size, box = stored(*geometry(*upright, prep), orientation)
    if isinstance(pixels, Tensor):
        return _resize_tensor(pixels, size, box, orientation, prep)
    # Pillow computes only this box; min() because a product may round to just outside the image.
    x, y = raw_width / size[0], raw_height / size[1]
    left, top, right, bottom = box
    source = (left * x, top * y, min(right * x, raw_width), min(bottom * y, raw_height))
    small = pixels.resize((prep.crop, prep.crop), INTERPOLATIONS[prep.interpolation], source)
    if orientation != 1:
        small = small.transpose(UPRIGHT[orientation])
    return torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(
        prep.crop, prep.crop, 3
    )


def _resize_tensor(
    pixels: Tensor, size: tuple[int, int], box: Box, orientation: int, prep: Preprocessing
) -> Tensor:
    left, top = int(box[0]), int(box[1])
    whole = F.interpolate(pixels[None], size=size[::-1], mode=prep.interpolation, antialias=True)[0]
    small = whole[:, top : top + prep.crop, left : left + prep.crop].permute(1, 2, 0)
    if orientation >= 5:
        small = small.transpose(0, 1)
    if orientation in (2, 3, 6, 7):
        small = small.flip(1)
    if orientation in (3, 4, 7, 8):
        small = small.flip(0)
    return small


def normalise(pixels: Tensor, prep: Preprocessing, dtype: torch.dtype) -> Tensor:
    """``(pixels / 255 - mean) / std``, computed in fp32 and rounded once to ``dtype``.

    Args:
        pixels: uint8, shape [N, H, W, 3].
        prep: says ``mean`` and ``std``.
        dtype: of the result.

    Returns:
        Shape [N, 3, H, W], channels_last, on the device of ``pixels``.
    """
    norm = InputNorm(prep.mean, prep.std).tensor(pixels)
    return input_norm.normalise(pixels.contiguous().permute(0, 3, 1, 2), norm, dtype)
