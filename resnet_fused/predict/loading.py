# SPDX-License-Identifier: BSD-3-Clause
"""One image, from wherever it is to the pixels the model takes; a bad one becomes an error."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from resnet_fused.predict.decode import Decoded, decode
from resnet_fused.predict.preprocess import Preprocessing, resize_and_crop
from resnet_fused.predict.sources import Found

STAGES = ("read", "decode", "resize")


class Loaded(NamedTuple):
    """One image as the model takes it, uint8 [crop, crop, 3], or why there is none."""

    path: str
    pixels: Tensor | None
    error: str | None
    seconds: dict[str, float]


def load(found: Found, prep: Preprocessing) -> Loaded:
    """Read, decode and resize one file; never raises for a bad one."""
    if found.error is not None:
        return Loaded(found.path, None, found.error, {})
    return _load(found.path, lambda: Path(found.path).read_bytes(), decode, prep)


def load_bytes(data: Any, prep: Preprocessing) -> Loaded:
    """Decode and resize one encoded file that is in memory; never raises for a bad one."""

    def read() -> bytes:
        if not isinstance(data, bytes | bytearray | memoryview):
            raise ValueError(f"must be the bytes of an image file, got {type(data).__name__}")
        return bytes(data)

    return _load("", read, decode, prep)


def load_array(image: Any, prep: Preprocessing) -> Loaded:
    """Resize one decoded image as if it had been read from a PNG file; never raises for a bad one.

    Args:
        image: uint8, shape [H, W, 3].
        prep: what to do.
    """

    def check() -> np.ndarray:
        array = np.asarray(image)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
            raise ValueError(
                "must be uint8 of shape [H, W, 3], H and W at least 1, "
                f"got {array.dtype} of shape {list(array.shape)}"
            )
        return array

    return _load("", check, lambda array: Decoded(Image.fromarray(array), 1), prep)


def _load(
    path: str, read: Callable[[], Any], to_image: Callable[[Any], Decoded], prep: Preprocessing
) -> Loaded:
    times = [time.perf_counter()]
    pixels = error = None
    try:
        data = read()
        times.append(time.perf_counter())
        image = to_image(data)
        times.append(time.perf_counter())
        pixels = resize_and_crop(image, prep)
    except Exception as problem:  # decoders raise nearly anything on damaged data
        error = describe(problem)
    times.append(time.perf_counter())
    spans = (later - earlier for earlier, later in itertools.pairwise(times))
    return Loaded(path, pixels, error, dict(zip(STAGES, spans, strict=False)))


def describe(problem: Exception) -> str:
    """One line about an exception, without the file's name, which has its own column."""
    if isinstance(problem, OSError) and problem.strerror:
        return problem.strerror
    text = " ".join(str(problem).split())
    return text if type(problem) is ValueError else f"{type(problem).__name__}: {text}"
