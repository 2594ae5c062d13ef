# SPDX-License-Identifier: BSD-3-Clause
"""A tiny predictor, images and comparisons for the tests of jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from resnet_fused import Predictor
from resnet_fused.predict.preprocess import Preprocessing

PREP = Preprocessing(resize=8, crop=8)


class Means(nn.Module):
    """Logits: the means of the three channels."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) * self.scale


def predictor(**options: Any) -> Predictor:
    options = {"preprocessing": PREP, "top": 2, "labels": ["r", "g", "b"], **options}
    return Predictor(Means(), **options)


def photos(folder: Path, count: int, broken: tuple[int, ...] = ()) -> Path:
    """PNG files that all differ, some of them broken."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / f"{i:03}.png"
        Image.fromarray(rng.integers(0, 256, (9, 10, 3), dtype=np.uint8)).save(path)
        if i in broken:
            path.write_bytes(path.read_bytes()[:60])
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a job's folder, hidden ones included."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
