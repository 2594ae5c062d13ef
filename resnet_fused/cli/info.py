# SPDX-License-Identifier: BSD-3-Clause
"""`resnet-fused info`: versions, the loaded library and what this machine supports."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from typing import Any

import resnet_fused


def add_parser(subparsers: Any) -> None:
    """Add the `info` command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "info",
        help="show versions, the loaded library and what this machine supports",
        description="Show what a bug report should contain.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def readable(facts: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """Give one line per fact, aligned; nested facts are indented."""
    width = max((len(name) for name in facts), default=0)
    for name, value in facts.items():
        label = f"{indent}{name:<{width}}"
        if isinstance(value, Mapping) and value:
            yield label.rstrip()
            yield from readable(value, indent + "  ")
        else:
            yield f"{label}  {_text(value)}"


def _text(value: Any) -> str:
    """Write one value as people do."""
    if value is None or (isinstance(value, str | list | tuple | Mapping) and not value):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return str(value)


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        0: a library that does not load is a fact to show, not a failure of this command.
    """
    facts = resnet_fused.info()
    if args.json:
        print(json.dumps(facts, indent=1, default=str))
    else:
        print("\n".join(readable(facts)))
    return 0
