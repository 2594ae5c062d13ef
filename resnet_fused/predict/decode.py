# SPDX-License-Identifier: BSD-3-Clause
"""From the bytes of an image file to 8-bit RGB pixels."""

from __future__ import annotations

import functools
import importlib
import io
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

END_OF_JPEG = b"\xff\xd9"
EXIF_ORIENTATION = 0x0112
# Beyond this ratio of the sides, resizing the whole image costs more than torchvision's decoder
# saves; Pillow resizes only the part that is kept.
LONGEST_ASPECT = 4


class Decoded(NamedTuple):
    """Pixels as stored, and the EXIF orientation (1 to 8) that is still to be applied.

    ``pixels`` is an RGB Pillow image, or a uint8 tensor of shape [3, H, W].
    """

    pixels: Image.Image | Tensor
    orientation: int


def decode(data: bytes) -> Decoded:
    """Decode one image, the first frame if there are several.

    Grey, palette, CMYK and YCbCr become RGB, 16 bits become 8 (the high byte), alpha is dropped.

    Args:
        data: the whole file.

    Raises:
        ValueError: the data are empty, no image, or of a kind with no defined 8-bit value.
        OSError: the image is truncated or damaged.
        PIL.Image.DecompressionBombError: more than twice ``PIL.Image.MAX_IMAGE_PIXELS``.
    """
    if not data:
        raise ValueError("empty file")
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise ValueError("no image in a format that Pillow can read") from None
    tensor = _decode_plain_jpeg(image, data)
    if tensor is not None:
        return Decoded(tensor, _orientation(image))
    image.load()
    # Read after load(), because Pillow turns TIFF images itself and then removes the tag.
    return Decoded(_to_rgb(image), _orientation(image))


@functools.cache
def torchvision_decoder() -> Callable[[Tensor], Tensor] | None:
    """torchvision's JPEG decoder, a third faster than Pillow's with equal pixels; None without."""
    try:
        io_module = importlib.import_module("torchvision.io")
        rgb = io_module.ImageReadMode.RGB
        probe = io.BytesIO()
        Image.new("RGB", (1, 1)).save(probe, "JPEG")
        io_module.decode_jpeg(_bytes_to_tensor(probe.getvalue()), mode=rgb)
    except (ImportError, RuntimeError, AttributeError):  # absent, for another torch, or without it
        return None
    return functools.partial(io_module.decode_jpeg, mode=rgb)


def _decode_plain_jpeg(image: Image.Image, data: bytes) -> Tensor | None:
    """Decode with torchvision where it is sure to give what Pillow would; else None."""
    decoder = torchvision_decoder()
    plain = (
        decoder is not None
        and image.format == "JPEG"
        and image.mode == "RGB"
        # torchvision fills a truncated image with grey and says nothing; Pillow reports it.
        and data.endswith(END_OF_JPEG)
        and max(image.width, image.height) <= LONGEST_ASPECT * min(image.width, image.height)
    )
    if not plain or decoder is None:
        return None
    try:
        return decoder(_bytes_to_tensor(data))
    except RuntimeError:
        return None  # Pillow decides, and says what is wrong


def _bytes_to_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image  # convert() would copy it
    if image.mode == "F" or image.mode.startswith("I"):
        image = _high_byte(image)
    return image.convert("RGB")


def _high_byte(image: Image.Image) -> Image.Image:
    """16-bit grey to 8-bit grey; Pillow's own conversion may clip at 255 instead."""
    levels = image.convert("I")
    extrema: Any = levels.getextrema()
    if image.mode == "F" or extrema[0] < 0 or extrema[1] > 65535:
        raise ValueError(
            f"pixels of Pillow mode {image.mode} beyond 16 bits have no defined range; "
            "save the image with 8 bits per channel"
        )
    return levels.point(lambda level: level * (1 / 256)).convert("L")


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(EXIF_ORIENTATION)
    except Exception:  # a damaged EXIF block can raise nearly anything, and the pixels are fine
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1
