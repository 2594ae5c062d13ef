# SPDX-License-Identifier: BSD-3-Clause
"""Class names from a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_labels(path: str, num_classes: int) -> list[str]:
    """Read one name per class.

    Args:
        path: ``.json`` with a list of names or an object from index to name (or to a list that ends
            with the name, as in ImageNet's class index); any other file has one name per line.
        num_classes: outputs of the model.

    Returns:
        Names by class index.

    Raises:
        ValueError: the file is of no such kind or does not name ``num_classes`` classes.
        OSError: the file cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        content = json.loads(text) if path.lower().endswith(".json") else text.strip().split("\n")
    except ValueError as error:  # both not UTF-8 and not JSON
        raise ValueError(
            f"labels {path} must be UTF-8 text, JSON if it ends in .json: {error}"
        ) from error
    if isinstance(content, Mapping):
        content = _by_index(content, path)
    return check_labels(content, num_classes, f"labels {path}")


def check_labels(names: Any, num_classes: int, what: str) -> list[str]:
    """The names without white space around them; raises ValueError if they cannot be right."""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{what} must hold a list of names or an object from class index to name")
    if len(names) != num_classes:
        raise ValueError(
            f"{what} must name {num_classes} classes, one for each output of the model, "
            f"got {len(names)}"
        )
    return [name.strip() for name in names]


def _by_index(content: Mapping[str, Any], path: str) -> list[Any]:
    expected = [str(index) for index in range(len(content))]
    if set(content) != set(expected):
        odd = next(key for key in content if key not in expected)
        raise ValueError(
            f'labels {path} must have the keys "0" to "{len(content) - 1}", got {odd!r}'
        )
    names = [content[key] for key in expected]
    return [name[-1] if isinstance(name, list) and name else name for name in names]
